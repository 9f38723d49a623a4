"""Rooms: the bodies against their distance functions, the table against direct rendering, and their use."""

import colorsys
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from bvae import config
from bvae.compare import main as compare
from bvae.config import DataConfig
from bvae.data import main as data
from bvae.datasets import held_out, open_data
from bvae.evaluate import main as evaluate
from bvae.model import BetaVAE
from bvae.pipelines import rooms
from bvae.pipelines.rooms import COUNT, FACTORS, GEOMETRIES, SIZES, Rays, Rooms, ravel, unravel
from bvae.train import main as train

ORIENTATION = 3  # the geometries that the fast tests draw
SHAPES = ("cube", "cylinder", "sphere", "capsule")


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    """The table, with the geometries of one orientation and zeros for the others."""
    table = torch.zeros(*SIZES[3:], 64, 64, 3, dtype=torch.uint8)
    table[:, :, ORIENTATION] = rooms.weights_of(ORIENTATION)
    return table.flatten(0, 2)


@pytest.fixture
def painter(drawn, monkeypatch) -> Rooms:
    monkeypatch.setattr(rooms, "all_weights", lambda: drawn)
    return Rooms()


def room(**chosen: int) -> torch.Tensor:
    """Indices [1, 6] of a red sphere of middle scale, but for the chosen factors."""
    plain = {
        "floor_hue": 5,
        "wall_hue": 3,
        "object_hue": 0,
        "scale": 4,
        "shape": 2,
        "orientation": ORIENTATION,
    }
    return torch.tensor([[{**plain, **chosen}[name] for name in FACTORS]])


# --- Bodies -----------------------------------------------------------------------------------------------
def distance(shape: int, point: torch.Tensor) -> torch.Tensor:
    """From points [N, 3] to the surface of a body; negative inside."""
    x, y, z = point.unbind(1)
    across = (x * x + z * z).sqrt()
    if shape == 0:
        q = torch.stack([x, y - rooms.CUBE, z], 1).abs() - rooms.CUBE
        return q.clamp(min=0).norm(dim=1) + q.amax(1).clamp(max=0)
    if shape == 1:
        radius, height = rooms.CYLINDER
        q = torch.stack([across - radius, (y - height / 2).abs() - height / 2], 1)
        return q.clamp(min=0).norm(dim=1) + q.amax(1).clamp(max=0)
    if shape == 2:
        return (x * x + (y - 1) ** 2 + z * z).sqrt() - 1
    radius, height = rooms.CAPSULE
    return (across**2 + (y - y.clamp(radius, height - radius)) ** 2).sqrt() - radius


@pytest.mark.parametrize("shape", range(4), ids=SHAPES)
def test_rays_end_at_the_surface(shape):
    """Against sphere tracing, which knows only the distance to the body."""
    generator = torch.Generator().manual_seed(0)
    origin, target = torch.randn(2, 500, 3, generator=generator, dtype=torch.float64)
    origin = 4 * functional.normalize(origin, dim=1)
    origin[:, 1] = origin[:, 1].abs()  # nothing looks from below the floor
    target = 0.9 * target + torch.tensor([0.0, 1.0, 0.0])
    direction = target - origin
    length = direction.norm(dim=1)
    t = torch.zeros(500, dtype=torch.float64)
    for _ in range(2000):
        t += distance(shape, origin + t[:, None] * direction) / length
    point = origin + t[:, None] * direction
    reached = distance(shape, point).abs() < 1e-7
    hit = rooms._hit(shape, Rays(origin.T, direction.T))
    assert 100 < reached.sum() < 400
    assert torch.equal(hit.isfinite(), reached)
    assert torch.allclose(hit[reached], t[reached], atol=1e-6)

    point, before = point[reached], (point - 1e-6 * direction)[reached].requires_grad_()
    (gradient,) = torch.autograd.grad(distance(shape, before).sum(), before)
    seen = point[:, 1] > 1e-3
    assert seen.sum() > 100
    assert torch.allclose(rooms._normal(shape, point[seen].T).T, gradient[seen], atol=1e-5)


# --- Pictures ---------------------------------------------------------------------------------------------
def direct(scene: rooms.Scene, hues: list[int]) -> torch.Tensor:
    """A picture without the table: each ray has its colour, and a pixel the mean of its rays."""
    colours = torch.tensor([colorsys.hsv_to_rgb(hue / 10, rooms.SATURATION, 1) for hue in hues]).double()
    rays = scene.light[:, None] * (255 * colours).round()[scene.material]
    return rays.view(64, 4, 64, 4, 3).mean((1, 3)).round()


def test_the_table_equals_direct_rendering_to_1_of_255(painter):
    rng = np.random.default_rng(0)
    empty = rooms.empty_room(ORIENTATION)
    for scale, shape in np.ndindex(8, 4):
        hues = rng.integers(10, size=3).tolist()
        painted = painter.paint(ravel(torch.tensor([[*hues, scale, shape, ORIENTATION]])))[0]
        assert (painted - direct(rooms.furnish(empty, scale, shape), hues)).abs().max() <= 1
        assert painted.float().std() > 20


@pytest.mark.slow
def test_all_480_000_images_equal_direct_rendering_to_1_of_255():
    """A picture is linear in the colours: if the errors of one sign sum to less than 1, so it is for all."""
    weights = rooms.all_weights().view(*SIZES[3:], 64, 64, 3)
    for orientation in range(15):
        empty = rooms.empty_room(orientation)
        for scale, shape in np.ndindex(8, 4):
            exact = 255 * rooms.pixel_weights(rooms.furnish(empty, scale, shape))
            error = weights[scale, shape, orientation] - exact
            assert torch.maximum(error.clamp(min=0).sum(2), (-error).clamp(min=0).sum(2)).max() < 1
    assert weights.nbytes < 6e6
    assert len(weights.flatten(0, 2).flatten(1).unique(dim=0)) == GEOMETRIES


def test_the_light_keeps_to_its_bounds():
    for orientation in (0, 14):
        scene = rooms.furnish(rooms.empty_room(orientation), 7, 3)
        assert 0.28 <= scene.light.min() < 0.4  # in the shadow
        assert 0.9 < scene.light.max() <= 1


def test_a_shadow_lies_on_the_far_side_of_the_lamp():
    empty = rooms.empty_room(7)  # straight ahead; the lamp is on the left
    scene = rooms.furnish(empty, 4, 2)
    darker = (scene.light < empty.empty.light - 1e-9) & (scene.material == rooms.FLOOR)
    columns = darker.view(256, 256).nonzero()[:, 1]
    assert darker.sum() > 500
    assert (columns > 128).double().mean() > 0.8
    assert ((scene.light <= empty.empty.light) | (scene.material == rooms.OBJECT)).all()


def test_each_hue_colours_its_material(painter):
    plain = painter.paint(ravel(room()))[0]
    weights = painter.weights[ravel(room()) % GEOMETRIES][0]
    for material, name in enumerate(("floor_hue", "wall_hue", "object_hue")):
        changed = (painter.paint(ravel(room(**{name: 8})))[0] != plain).any(2)
        assert not changed[weights[..., material] == 0].any()
        assert changed[weights[..., material] > 20].all()


def test_the_object_grows_with_its_scale_and_stays_in_the_middle(painter):
    areas = []
    for scale in range(8):
        weight = painter.weights[ravel(room(scale=scale)) % GEOMETRIES][0][..., rooms.OBJECT] > 0
        areas.append(weight.sum().item())
        assert weight.nonzero()[:, 1].double().mean() == pytest.approx(31.5, abs=0.6)
    assert areas == sorted(areas)
    assert areas[-1] / areas[0] == pytest.approx((1.25 / 0.75) ** 2, rel=0.15)


def test_numbers_count_as_3d_shapes_does():
    numbers = torch.randint(COUNT, (1000,), generator=torch.Generator().manual_seed(0))
    assert np.array_equal(unravel(numbers), np.stack(np.unravel_index(numbers.numpy(), SIZES), 1))
    assert torch.equal(ravel(unravel(numbers)), numbers)
    assert unravel(torch.tensor([1]))[0].tolist() == [0, 0, 0, 0, 0, 1]


# --- Use --------------------------------------------------------------------------------------------------
@pytest.fixture
def few(few_rooms, monkeypatch) -> int:
    monkeypatch.setattr("bvae.datasets.VALIDATED", 50)
    return few_rooms


def test_they_are_all_trained_on_and_some_looked_at(few):
    train_on, valid, bad, *_, pixels, _ = open_data(
        DataConfig(name="rooms", flip=False), 64, 7, torch.device("cpu")
    )
    assert (train_on.count, valid.count, bad, len(pixels)) == (few, 50, [], 8)
    train_on.begin(0)
    for step, (images, index) in enumerate(train_on.epoch(0)):
        assert torch.equal(images, Rooms().paint(index))
        assert torch.equal(train_on.batch(torch.tensor(step)), images)
    assert images.shape == (64, 64, 64, 3)
    assert torch.equal(held_out(DataConfig(name="rooms", flip=False), 5), valid.head(5))
    assert images.dtype == torch.uint8


class Copies(TorchDispatchMode):
    """Notes tensors that are made from Python's numbers: on a GPU, each would be a copy from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [str(func)] if "lift_fresh" in str(func) else []
        return func(*args, **(kwargs or {}))


def test_a_batch_copies_nothing_from_the_host(few):
    """A CUDA graph could not hold it."""
    loader = rooms.RoomsLoader(torch.arange(few), Rooms(), 8, 7, train=True)
    loader.begin(0)
    position = torch.tensor(1)
    with Copies() as copies:
        loader.batch(position)
    assert copies.names == []
    with Copies() as copies:
        unravel(position[None])  # it does, where it does not matter
    assert copies.names


def test_rooms_without_a_configuration_are_trained_by_a_preset():
    assert config.default_preset("rooms", "cpu") == "locatello_rooms"
    assert config.read("locatello_rooms").config.data.name == "rooms"


def small_model(folder: Path) -> None:
    """Untrained, of images as rooms are; its codes are as large as a trained one's."""
    torch.manual_seed(0)
    model = BetaVAE(3, 4, (4, 8), 64, "sigmoid").eval()
    with torch.no_grad():
        model.head.weight[:4] *= 50
    model.save_pretrained(folder)


def test_evaluation_and_comparison(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_model(tmp_path / "run")
    assert evaluate(["run", "--data", "rooms", "--seeds", "1", "--points", "60"]) == 0
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (result["images"], tuple(result["factors"])) == (few, FACTORS)
    assert compare(["run", "run", "--data", "rooms", "--factor", "scale", "--points", "60"]) == 0
    assert (tmp_path / "compare.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--channels", "1"], "rooms are RGB, of 64 x 64 pixels"),
        (["--flip"], "must not be mirrored"),
    ],
)
def test_refused(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train(["--data", "rooms", *options, "--out", "run"]) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_other_images(tmp_path, capsys):
    small_model(tmp_path)
    assert evaluate([str(tmp_path), "--data", "sprites"]) == 2
    assert "sprites are [1, 64, 64], and this model takes [3, 64, 64]" in capsys.readouterr().err


def test_the_picture_of_the_factors(few_rooms, tmp_path, capsys):
    assert data(["rooms", str(tmp_path / "new" / "rooms.png")]) == 0
    with Image.open(tmp_path / "new" / "rooms.png") as picture:
        assert picture.height == 6 * 64 + 5 * 2
    assert "python -m bvae.train --data rooms" in capsys.readouterr().out
    assert data(["rooms", str(tmp_path / "rooms.jpg")]) == 2
    assert "OUT must end in .png" in capsys.readouterr().err
