"""The data set that ships: its files, its determinism, and pictures that do what the factors say."""

import csv
from collections import Counter
from typing import ClassVar

import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.io import decode_jpeg, read_file

from bvae.errors import UsageError
from bvae.pipelines import faces, portrait
from bvae.pipelines.faces import FACTORS, render, sample_factors, write

NAMES = [factor.name for factor in FACTORS]
N = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return write(tmp_path_factory.mktemp("faces"), n=N, seed=3, progress=False)


def plain(n: int = 1, **chosen: float | Tensor) -> Tensor:
    """[n, K]: a face in the middle of every range without glasses, but for the chosen factors."""
    factors = torch.tensor([[(f.low + f.high) / 2 for f in FACTORS]]).repeat(n, 1)
    for name, value in {"glasses": 0.0, **chosen}.items():
        factors[:, NAMES.index(name)] = value
    return factors


def pixels(**chosen: float | Tensor) -> Tensor:
    n = max([len(v) for v in chosen.values() if isinstance(v, Tensor)], default=1)
    return render(plain(n, **chosen)).float()


def table(path, header: int | None = None) -> tuple[list[str], list[list[str]]]:
    """CelebA's space-separated tables, read as torchvision's CelebA reads them."""
    with open(path) as file:
        rows = list(csv.reader(file, delimiter=" ", skipinitialspace=True))
    return (rows[header], rows[header + 1 :]) if header is not None else ([], rows)


# --- Files ------------------------------------------------------------------------------------------------
def test_celebas_layout(folder):
    assert folder.name == "celeba"
    assert sorted(p.name for p in folder.iterdir()) == [
        "factors.csv",
        "identity_CelebA.txt",
        "img_align_celeba",
        "list_attr_celeba.txt",
        "list_bbox_celeba.txt",
        "list_eval_partition.txt",
        "list_landmarks_align_celeba.txt",
    ]
    expected = [f"{i:06d}.jpg" for i in range(1, N + 1)]
    assert sorted(p.name for p in (folder / "img_align_celeba").iterdir()) == expected
    assert [row[0] for row in table(folder / "list_eval_partition.txt")[1]] == expected
    names, rows = table(folder / "list_attr_celeba.txt", header=1)
    assert [row[0] for row in rows] == expected
    assert {"Smiling", "Eyeglasses", "Young", "Black_Hair", "Blond_Hair", "Pale_Skin"} <= set(names)
    assert all(len(row) == 1 + len(names) and set(row[1:]) <= {"-1", "1"} for row in rows)
    assert (folder / "list_attr_celeba.txt").read_text().splitlines()[0] == str(N)


def test_torchvision_opens_the_folder(folder):
    """Its check compares md5 sums with those of CelebA's own lists, which no other lists can have."""
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        torchvision.datasets.CelebA(folder.parent, download=False)

    class Faces(torchvision.datasets.CelebA):
        file_list: ClassVar[list] = []  # no sums to compare

    targets = ["attr", "identity", "bbox", "landmarks"]
    opened = Faces(folder.parent, "train", targets, download=False)
    assert len(opened) == 16
    assert len(Faces(folder.parent, "all")) == N
    image, (attributes, identity, box, landmarks) = opened[4]
    assert image.size == (178, 218)
    assert identity == 5
    assert attributes.tolist() == [
        int(value == "1") for value in table(folder / "list_attr_celeba.txt", header=1)[1][4][1:]
    ]
    left, top, width, height = box.tolist()
    points = landmarks.view(5, 2)
    assert (
        (points >= torch.tensor([left, top])) & (points < torch.tensor([left + width, top + height]))
    ).all()


def test_landmarks_are_where_the_parts_are_painted():
    """The nose turns with the head; pupils are dark, and eyes are white beside them."""
    factors = plain(3, azimuth=torch.tensor([-25.0, 0.0, 25.0]), skin=0.0, hair_colour=0.0)
    images, points = render(factors), portrait.landmarks(factors).view(3, 5, 2)
    assert points[0, 2, 0] < 80 < points[1, 2, 0] < 98 < points[2, 2, 0]
    for image, (left, right, *_) in zip(images, points.tolist(), strict=True):
        for x, y in (left, right):
            assert image[y, x].float().mean() < 80
            assert image[y - 2 : y + 2, x - 12 : x + 13].float().mean(-1).max() > 180


def test_boxes_hold_the_head():
    """A box has the same top and bottom when the head is turned, is centred from the front, and is wide."""
    factors = plain(2, azimuth=torch.tensor([0.0, 36.0]), hair_length=0.0)
    left, top, width, height = portrait.boxes(factors).T
    assert (left[0] + width[0] / 2 - 89).abs() <= 1
    assert width.min() >= 90
    assert (top == 52).all()
    assert (top + height == 170).all()


def test_images_are_the_rendered_faces(folder):
    image = decode_jpeg(read_file(str(folder / "img_align_celeba" / "000007.jpg")))
    assert image.shape == (3, 218, 178)
    drawn = render(sample_factors(N, seed=3)[6:7])[0].permute(2, 0, 1)
    assert (image.float() - drawn.float()).abs().mean() < 3  # JPEG's loss; another face is far from it


def test_factors_csv_is_the_truth(folder):
    with open(folder / "factors.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", *NAMES]
    assert [row[0] for row in rows[1:]] == [f"{i:06d}.jpg" for i in range(1, N + 1)]
    read = torch.tensor([[float(v) for v in row[1:]] for row in rows[1:]])
    assert torch.equal(read, sample_factors(N, seed=3))


def test_attributes_follow_the_factors(folder):
    names, rows = table(folder / "list_attr_celeba.txt", header=1)
    glasses = [int(row[1 + names.index("Eyeglasses")]) for row in rows]
    assert glasses == (sample_factors(N, seed=3)[:, NAMES.index("glasses")] * 2 - 1).int().tolist()
    assert len(set(glasses)) == 2


def test_splits_are_eight_to_one_to_one_in_order(folder):
    splits = [int(row[1]) for row in table(folder / "list_eval_partition.txt")[1]]
    assert Counter(splits) == {0: 16, 1: 2, 2: 2}
    assert splits == sorted(splits)


def test_same_seed_same_bytes_and_another_seed_others(folder, tmp_path):
    def contents(root):
        return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    assert contents(write(tmp_path / "same", n=N, seed=3, progress=False)) == contents(folder)
    other = write(tmp_path / "other", n=1, seed=4, progress=False) / "img_align_celeba" / "000001.jpg"
    assert other.read_bytes() != (folder / "img_align_celeba" / "000001.jpg").read_bytes()


def test_existing_folder_is_refused_and_kept(folder):
    before = (folder / "factors.csv").read_bytes()
    with pytest.raises(UsageError, match=r"exists already.*remove it"):
        write(folder.parent, n=1, progress=False)
    assert (folder / "factors.csv").read_bytes() == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error):
    encode, seen = torchvision.io.encode_jpeg, []

    def fail_on_the_tenth(image, quality):
        seen.append((tmp_path / "celeba").exists())
        if len(seen) == 10:
            raise error
        return encode(image, quality)

    monkeypatch.setattr(torchvision.io, "encode_jpeg", fail_on_the_tenth)
    with pytest.raises(type(error)):
        write(tmp_path, n=400, progress=False)
    assert not any(seen)  # nor did it look complete while it was being written
    assert len(seen) < 100  # the rest was not drawn in vain
    assert list(tmp_path.iterdir()) == []


# --- Factors ----------------------------------------------------------------------------------------------
def test_a_larger_sample_begins_with_the_smaller():
    assert torch.equal(sample_factors(1000, seed=5)[:100], sample_factors(100, seed=5))
    assert not torch.equal(sample_factors(100, seed=6), sample_factors(100, seed=5))


def test_factors_fill_their_ranges_independently():
    sample = sample_factors(4000, seed=0)
    for factor, column in zip(FACTORS, sample.T, strict=True):
        span = factor.high - factor.low
        assert factor.low <= column.min() < factor.low + 0.01 * span, factor.name
        assert factor.high - 0.01 * span < column.max() <= factor.high, factor.name
        assert column.unique().numel() == 2 if factor.kind == "binary" else column.unique().numel() > 3000
        assert abs((column.mean() - factor.low) / span - 0.5) < 0.03, factor.name
    correlation = torch.corrcoef(sample.T) - torch.eye(len(FACTORS))
    assert correlation.abs().max() < 0.07  # 4.4 standard errors


# --- Pictures ---------------------------------------------------------------------------------------------
def test_render_is_deterministic_and_independent_of_the_batch():
    factors = sample_factors(faces.CHUNK + 3, seed=1)
    images = render(factors)
    assert images.shape == (len(factors), 218, 178, 3)
    assert images.dtype == torch.uint8
    alone = torch.cat([render(row[None]) for row in factors])
    assert (alone.int() - images.int()).abs().max() <= 1  # vectorised tails may round otherwise
    assert torch.equal(render(factors), images)


@pytest.mark.parametrize("factor", FACTORS, ids=NAMES)
def test_every_factor_shows_in_the_training_crop(factor):
    away = factor.low + (factor.high - factor.low) * (0.5 if factor.kind == "circular" else 1.0)
    a, b = pixels(**{factor.name: torch.tensor([factor.low, away])})[:, 35:183, 15:163]
    assert (a - b).square().mean().sqrt() > 3


@pytest.mark.parametrize("factor", [f for f in FACTORS if f.kind != "binary"], ids=lambda f: f.name)
def test_pictures_change_smoothly(factor):
    """Nothing pops: no step of a fine sweep changes the picture by much more than the mean step."""
    sweep = torch.linspace(factor.low, factor.high, 61)
    images = pixels(**{factor.name: sweep}, **({} if factor.name == "hair_length" else {"hair_length": 0.7}))
    steps = images.diff(dim=0).abs().mean((1, 2, 3))
    assert steps.max() < 3.5 * steps.mean()


def test_hue_closes_its_circle():
    a, b, c = pixels(background=torch.tensor([0.0, 360.0, 180.0]))
    assert (a - b).abs().max() <= 1
    assert (a - c).abs().mean() > 5


def test_mirrored_pose_and_light_mirror_the_picture():
    factors = sample_factors(8, seed=2)
    mirrored = factors.clone()
    mirrored[:, [NAMES.index("azimuth"), NAMES.index("light")]] *= -1
    difference = (render(mirrored).flip(2).int() - render(factors).int()).abs()
    assert difference.max() <= 2
    assert (render(mirrored).int() - render(factors).int()).abs().max() > 50  # unmirrored, they do differ


def test_positive_azimuth_turns_the_face_to_the_right():
    """The eye whites, the brightest part of a dark face with dark hair, move with the face."""
    images = pixels(azimuth=torch.tensor([-30.0, 0.0, 30.0]), skin=1.0, hair_colour=0.0, light=0.0)
    eyes = (images[:, 100:122, 40:138].amin(-1) > 90).float().sum(1)
    centre = (eyes * torch.arange(40.5, 138)).sum(1) / eyes.sum(1)
    assert centre[0] < 80 < 98 < centre[2]
    assert abs(centre[1] - 89) < 0.5


def test_light_brightens_its_side():
    left, right = pixels(light=torch.tensor([-60.0, 60.0]), hair_length=0.0)[:, 120:150].mean((1, 3))
    assert left[60:80].mean() > left[98:118].mean() + 10
    assert right[98:118].mean() > right[60:80].mean() + 10
