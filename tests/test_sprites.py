"""Sprites: the drawing against frames of dSprites, and the cache of all images."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from bvae.pipelines import sprites
from bvae.pipelines.packed_loader import pack, unpack
from bvae.pipelines.sprites import COUNT, FACTORS, SIZES, all_sprites, render, unravel

FRAMES = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "dsprites_gif_frames.npz"


def draw(**chosen: int) -> torch.Tensor:
    """One image [64, 64]: the largest upright square near the middle, but for the chosen indices."""
    plain = {"shape": 0, "scale": 5, "orientation": 0, "x": 16, "y": 16}
    return render(torch.tensor([[{**plain, **chosen}[name] for name in FACTORS]]))[0]


def centre(image: torch.Tensor) -> tuple[float, float]:
    """Of mass: x, y in pixels from the image's top left corner."""
    rows, columns = image.nonzero().double().mean(0).tolist()
    return columns + 0.5, rows + 0.5


# --- Drawing ----------------------------------------------------------------------------------------------
@pytest.mark.skipif(not FRAMES.is_file(), reason="the frames of the original are not part of the project")
def test_frames_of_the_original():
    with np.load(FRAMES) as file:
        frames = torch.from_numpy(np.unpackbits(file["frames"], axis=1)).view(-1, 64, 64)
        indices = torch.from_numpy(file["latents"])
    wrong = (render(indices) != frames).sum((1, 2))
    square, ellipse, heart = (int(wrong[indices[:, 0] == shape].sum()) for shape in range(3))
    assert square == ellipse == 0
    assert heart <= 8


@pytest.mark.parametrize(("shape", "area"), [(0, 4 * 9.598**2), (1, np.pi * 12.766 * 7.2135)])
def test_area_grows_with_the_square_of_the_scale(shape, area):
    for index, scale in enumerate(np.linspace(0.5, 1, 6)):
        images = render(torch.tensor([[shape, index, o, o % 32, 3] for o in range(40)]))
        assert images.sum((1, 2), dtype=torch.float64).mean() == pytest.approx(area * scale**2, rel=0.01)


@pytest.mark.parametrize("shape", range(3))
def test_positions_are_32_pixels_wide_and_start_at_the_top_left(shape):
    left, right = draw(shape=shape, x=0, y=5), draw(shape=shape, x=31, y=5)
    assert torch.equal(left[:, :32], right[:, 32:])
    top, bottom = draw(shape=shape, y=0), draw(shape=shape, y=31)
    assert torch.equal(top[:32], bottom[32:])
    assert centre(draw(x=0, y=31)) == (16, 48)


def test_turning_goes_counter_clockwise_and_closes_its_circle():
    for shape in range(3):
        assert torch.equal(draw(shape=shape, orientation=39), draw(shape=shape))
    rising = draw(shape=1, orientation=4, x=0, y=0)  # 37 degrees: the ellipse's right end is up
    assert rising[:16, 16:32].sum() > 1.9 * rising[16:32, 16:32].sum()


@pytest.mark.parametrize("shape", range(3))
def test_corners_are_not_cut_off(shape, monkeypatch):
    """A turned square's corner is 13.57 pixels from its centre; here are all its places between pixels."""
    upright = [5, 15, 24, 34]  # orientations in which a corner of the square points almost straight up
    x, y = np.indices((31, 31)).reshape(2, -1)
    indices = torch.tensor([[shape, 5, o, *at] for o in upright for at in zip(x, y, strict=True)])
    images = render(indices)
    monkeypatch.setattr(sprites, "WINDOW", 32)
    assert torch.equal(images, render(indices))


def test_the_heart_stands_on_its_tip_and_is_symmetric():
    heart = draw(shape=2, x=0, y=0)[:32, :32]
    assert torch.equal(heart, heart.flip(1))
    widths = heart.sum(1)[heart.bool().any(1)]
    assert widths[-1] <= 2 < 10 < widths[2]


def test_bytes_of_0_and_1_whatever_the_integer_type_and_the_company():
    numbers = torch.tensor([0, COUNT - 1, 300_000, 500_000, 123_456])
    images = render(unravel(numbers))
    assert images.dtype == torch.uint8
    assert images.unique().tolist() == [0, 1]
    assert torch.equal(render(unravel(numbers).to(torch.int16)), images)
    assert torch.equal(torch.cat([render(one[None]) for one in unravel(numbers)]), images)
    assert render(torch.empty(0, 5, dtype=torch.long)).shape == (0, 64, 64)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.zeros(3, 5), r"integers \[N, 5\].*got torch.float32 \[3, 5\]"),
        (torch.zeros(3, 6, dtype=torch.long), r"got torch.int64 \[3, 6\]"),
        (torch.tensor([[0, 0, 0, 0, 0], [0, 6, 0, 0, 0]]), r"indices\[1\]: scale must be 0 to 5, got 6"),
        (torch.tensor([[-1, 0, 0, 0, 0]]), r"indices\[0\]: shape must be 0 to 2, got -1"),
    ],
)
def test_indices_that_name_no_image(indices, message):
    with pytest.raises(ValueError, match=message):
        render(indices)


# --- Names ------------------------------------------------------------------------------------------------
def test_numbers_count_as_the_original_does():
    numbers = torch.arange(COUNT)
    indices = unravel(numbers)
    assert torch.equal(indices[:4, 4], torch.arange(4))
    expected = np.stack(np.unravel_index(numbers.numpy(), SIZES), 1)
    assert np.array_equal(indices.numpy(), expected)


# --- All images -------------------------------------------------------------------------------------------
@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """The set ends early, in the middle of a chunk: what is drawn and kept is 700 images."""
    monkeypatch.setattr(sprites, "COUNT", 700)
    monkeypatch.setattr(sprites, "BLOCK", 300)
    return 700


def test_the_cache_is_drawn_once(small, tmp_path, monkeypatch):
    images = all_sprites(tmp_path / "new")
    assert torch.equal(images, pack(render(unravel(torch.arange(small)))))
    (file,) = (tmp_path / "new").iterdir()
    assert file.stat().st_size == small * 512 + 4
    monkeypatch.setattr(sprites, "render", None)
    assert torch.equal(all_sprites(tmp_path / "new"), images)


@pytest.mark.parametrize("harm", ["truncated", "changed"])
def test_a_damaged_cache_is_drawn_again(small, tmp_path, capsys, harm):
    images = all_sprites(tmp_path)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[1000] ^= 255
    file.write_bytes(data if harm == "changed" else data[:-10])
    assert torch.equal(all_sprites(tmp_path), images)
    assert f"{file} is damaged" in capsys.readouterr().out
    all_sprites(tmp_path)
    assert "damaged" not in capsys.readouterr().out


def test_a_full_disk_leaves_nothing(small, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        all_sprites(tmp_path)
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_said_beforehand(small, tmp_path, monkeypatch):
    usage = sprites.shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(sprites, "render", None)
    with pytest.raises(OSError, match="make room or choose another folder"):
        all_sprites(tmp_path)


def test_a_cache_that_must_not_be_written_to_is_read(small, tmp_path, monkeypatch):
    images = all_sprites(tmp_path)
    monkeypatch.setattr(sprites, "wait", None)
    assert torch.equal(all_sprites(tmp_path), images)


def test_who_waited_for_another_process_takes_what_it_drew(small, tmp_path, monkeypatch):
    images = all_sprites(tmp_path / "other")

    @contextlib.contextmanager
    def waited(path, label):
        (tmp_path / "other" / sprites.FILE).rename(tmp_path / sprites.FILE)
        yield

    monkeypatch.setattr(sprites, "wait", waited)
    monkeypatch.setattr(sprites, "render", None)
    assert torch.equal(all_sprites(tmp_path), images)


@pytest.mark.gpu
def test_a_gpu_draws_what_a_cpu_draws(tmp_path):
    numbers = torch.randint(COUNT, (20_000,), generator=torch.Generator().manual_seed(0))
    drawn = all_sprites(tmp_path, "cuda")[numbers.cuda()]
    assert not list(tmp_path.iterdir())
    assert torch.equal(drawn.cpu(), pack(render(unravel(numbers))))


@pytest.mark.slow
def test_all_737_280_images(tmp_path):
    images = all_sprites(tmp_path)
    assert images.shape == (737_280, 512)
    numbers = torch.randint(COUNT, (2000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(images[numbers], 64)[..., 0], 255 * render(unravel(numbers)))
    assert torch.equal(all_sprites(tmp_path)[numbers], images[numbers])
