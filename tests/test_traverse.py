"""`python -m bvae.traverse` as a user runs it: the pictures, where they start, and bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from bvae import plots
from bvae.evaluation import pictures
from bvae.images import read_image
from bvae.model import BetaVAE
from bvae.plots import HEADER, LABEL, MARGIN, most_visible, save_traversal, traverse
from bvae.traverse import main

SIDE = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """An untrained model of five latents. Latent 3 changes the picture most, latent 1 nothing."""
    torch.manual_seed(0)
    model = BetaVAE(latent_dim=5, hidden_dims=(4, 8), image_size=SIDE).eval()
    with torch.no_grad():
        model.decoder_input.weight[:, 3] *= 5
        model.decoder_input.weight[:, 1] = 0
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory):
    """40 x 60 pixels: grey, but for a red square of 20 in the middle."""
    pixels = np.full((60, 40, 3), 128, np.uint8)
    pixels[20:40, 10:30] = [255, 0, 0]
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def cell(picture: Image.Image, row: int, column: int, header: int = HEADER) -> np.ndarray:
    """One image of a grid with labels."""
    columns = (picture.width + MARGIN - LABEL) // (SIDE + MARGIN)
    left, top = picture.width + MARGIN - (columns - column) * (SIDE + MARGIN), header + row * (SIDE + MARGIN)
    return np.array(picture.convert("RGB"))[top : top + SIDE, left : left + SIDE]


def test_png_of_chosen_latents(run, tmp_path, capsys):
    out = tmp_path / "new" / "walk.png"
    options = ["--latents", "4", "1", "--range", "-2", "1", "--steps", "4", "--out", str(out)]
    assert main([str(run), *options]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    picture = Image.open(out)
    header = np.array(picture.convert("L"))[:HEADER, LABEL:]
    across = SIDE + MARGIN
    assert all(header[:, i * across : i * across + SIDE].min() < 100 for i in range(4))  # -2, -1, 0, 1
    assert picture.size == (LABEL + 4 * (SIDE + MARGIN) - MARGIN, HEADER + 2 * (SIDE + MARGIN) - MARGIN)
    z = torch.zeros(4, 5)
    z[:, 4] = torch.tensor([-2.0, -1, 0, 1])
    with torch.no_grad():
        expected = ((BetaVAE.from_pretrained(run).decode(z) + 1) * 127.5).round().permute(0, 2, 3, 1)
    for step in range(4):
        assert np.abs(cell(picture, 0, step) - expected[step].numpy()).max() <= 1
        assert np.array_equal(cell(picture, 1, step), cell(picture, 1, 0))  # latent 1 does nothing


def test_the_columns_name_the_values(tmp_path, monkeypatch):
    """The middle of -3 to 3 is not quite 0 in float32, and below it."""
    named: list[list[str]] = []
    drawn = plots.grid
    monkeypatch.setattr(plots, "grid", lambda *parts: named.append(parts[2]) or drawn(*parts))
    images = torch.zeros(1, 11, 1, 32, 32, 3, dtype=torch.uint8)
    save_traversal(images, ["a"], torch.linspace(-3, 3, 11), tmp_path / "walk.png")
    assert named == [["-3", "-2.4", "-1.8", "-1.2", "-0.6", "0", "0.6", "1.2", "1.8", "2.4", "3"]]


def test_gif_goes_there_and_back(run, tmp_path):
    out = tmp_path / "walk.gif"
    assert main([str(run), "--latents", "3", "--steps", "5", "--out", str(out)]) == 0
    frames = []
    with Image.open(out) as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(cell(gif, 0, 0, header=0).astype(int))
    assert len(frames) == 8
    assert np.abs(frames[1] - frames[7]).max() <= 1
    assert np.abs(frames[0] - frames[4]).max() > 20


def test_the_default_shows_all_that_fit_the_most_visible_first(run):
    assert main([str(run)]) == 0
    picture = Image.open(run / "traverse.png")
    assert picture.size[1] == HEADER + 5 * (SIDE + MARGIN) - MARGIN
    changes = [
        np.ptp([cell(picture, row, step).astype(int) for step in range(11)], 0).mean() for row in range(5)
    ]
    assert changes == sorted(changes, reverse=True)
    assert changes[4] == 0 < changes[3]


def test_the_walk_starts_at_the_images_code(run, photo, tmp_path):
    out = tmp_path / "walk.png"
    model = BetaVAE.from_pretrained(run)
    x = read_image(photo, 20, model.input_shape, model.pixel_range)
    assert x.shape == (1, 3, SIDE, SIDE)
    assert torch.equal(x, torch.tensor([1.0, -1, -1])[None, :, None, None].expand_as(x))  # all red
    assert main([str(run), "--image", str(photo), "--crop", "20", "--latents", "1", "--out", str(out)]) == 0
    expected = ((model.reconstruct(x)[0] + 1) * 127.5).round().permute(1, 2, 0)  # latent 1 does nothing
    assert np.abs(cell(Image.open(out), 0, 0) - expected.numpy()).max() <= 1


def test_the_labels_say_the_kl_where_it_is_known(run, photo, tmp_path, monkeypatch):
    """That of the image, or of the run's last validation."""
    labels: list[list[str]] = []
    monkeypatch.setattr(pictures, "save_traversal", lambda images, texts, values, out: labels.append(texts))
    out = ("--latents", "1", "--out", str(tmp_path / "walk.png"))
    assert main([str(run), *out]) == 0
    assert main([str(run), "--image", str(photo), *out]) == 0
    trained = tmp_path / "trained"
    shutil.copytree(run, trained)
    valid = {"split": "valid", "step": 3, "kl_per_dim": [0.5, 1.25, 0.0, 0.0, 0.0]}
    lines = [valid, {**valid, "kl_per_dim": ["a"]}, {**valid, "split": "train", "kl_per_dim": [9.0] * 5}, 7]
    (trained / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([str(trained), *out]) == 0
    model = BetaVAE.from_pretrained(run)
    with torch.no_grad():
        mu, log_var = model.encode(read_image(photo, None, model.input_shape, model.pixel_range))
    kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var)[0, 1].item()
    assert labels == [
        ["latent 1\nstarts at 0.00"],
        [f"latent 1, KL {kl:.2f}\nstarts at {mu[0, 1].item():.2f}"],
        ["latent 1, KL 1.25\nstarts at 0.00"],
    ]


def test_without_a_crop_the_largest_square(photo):
    x = read_image(photo, None, (3, SIDE, SIDE), (0.0, 1.0))
    assert x[0, 1].sum() == pytest.approx(128 / 255 * SIDE**2 * (1 - 20**2 / 40**2), rel=0.01)
    assert read_image(photo, None, (1, SIDE, SIDE), (-1.0, 1.0)).shape == (1, 1, SIDE, SIDE)


def test_rows_by_change():
    images = torch.zeros(3, 4, 1, 2, 2, 3, dtype=torch.uint8)
    images[1, 0], images[2, 0] = 10, 20
    assert most_visible(images, 2) == [2, 1]


def test_many_latents_are_decoded_in_parts(run, monkeypatch):
    model = BetaVAE.from_pretrained(run)
    z, values = torch.ones(1, 5), torch.linspace(-1, 1, 3)
    whole = traverse(model, z, range(5), values)
    monkeypatch.setattr("bvae.plots.BATCH", 4)
    assert (traverse(model, z, range(5), values).int() - whole.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--latents", "5"], "--latents must be 0 to 4 for this model, got 5"),
        (["--range", "2", "2"], "--range must be two different numbers"),
        (["--steps", "1"], "--steps must be at least 2, got 1"),
        (["--out", "walk.jpg"], "--out must end in .png or .gif, got walk.jpg"),
        (["--image", "nothing.png"], "nothing.png"),
        (["--crop", "0"], "--crop must be positive"),
    ],
)
def test_options_that_cannot_be_used(run, options, message, capsys):
    assert main([str(run), *options]) == 2
    assert message in capsys.readouterr().err


def test_an_image_smaller_than_the_crop(run, photo, capsys):
    assert main([str(run), "--image", str(photo), "--crop", "148"]) == 2
    assert "40 x 60 pixels are smaller than the crop of 148" in capsys.readouterr().err


def test_folders_of_no_model_of_another_one_and_of_a_damaged_one(run, tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    config = json.loads((run / "config.json").read_text())
    weights = (run / "model.safetensors").read_bytes()
    for other, held, message in [
        (
            {**config, "hidden_dims": [4, 8, 8]},
            weights,
            "model.safetensors is not the model that its config.json describes: it lacks encoder.2.0.weight",
        ),
        ({**config, "image_size": 64}, weights, r"head.weight is \[\d+, \d+\] instead of"),
        ({**config, "arch": "burgess"}, weights, "config.json describes: it lacks encoder.0.0.bias"),
        ({**config, "arch": "resnet"}, weights, "does not describe a BetaVAE: arch must be one of"),
        ({"architecture": "another"}, weights, "config.json does not describe a BetaVAE"),
        ([], weights, "config.json does not describe a BetaVAE"),
        (config, weights[:-100], "model.safetensors is damaged"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(other))
        (tmp_path / "model.safetensors").write_bytes(held)
        with pytest.raises(ValueError, match=message):
            BetaVAE.from_pretrained(tmp_path)
        assert main([str(tmp_path)]) == 2
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json does not describe a BetaVAE"):
        BetaVAE.from_pretrained(tmp_path)
