"""`python -m bvae.compare` as a user runs it: which latent is walked along, from where, and bad input."""

import contextlib
import csv
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from bvae.compare import main
from bvae.config import Config, DataConfig, ObjectiveConfig
from bvae.evaluation import comparison, measure
from bvae.evaluation.comparison import loss_name
from bvae.evaluation.measure import information_shares
from bvae.evaluation.options import CompareOptions as Arguments
from bvae.evaluation.options import Protocol
from bvae.model import BetaVAE
from bvae.pipelines import faces
from bvae.plots import HEADER, LABEL, MARGIN
from bvae.training.validation import ACTIVE_KL, active_latents

N, SIDE = 60, 32
FEW = ["--points", "40", "--factor-bins", "2"]
LOSSES = {
    "first": ObjectiveConfig(loss_type="H", beta=4),
    "second": ObjectiveConfig(loss_type="VAE"),
    "third": ObjectiveConfig(loss_type="B", gamma=10, max_capacity=25),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    return faces.write(tmp_path_factory.mktemp("data"), n=N, seed=0, progress=False).parent


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory: pytest.TempPathFactory):
    """Three untrained models of three losses; the config.yaml of each names the data."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, (name, objective) in enumerate(LOSSES.items()):
        torch.manual_seed(seed)
        model = BetaVAE(3, 4, (4, 8), SIDE).eval()
        with torch.no_grad():
            model.head.weight[:4] *= 50  # codes as large as a trained model's
        model.save_pretrained(folder / name)
        settings = Config(data=DataConfig(root=data, image_size=SIDE), objective=objective)
        (folder / name / "config.yaml").write_text(settings.to_yaml())
    return folder


@pytest.fixture(scope="module")
def made(runs):
    out = runs / "new" / "side.by.side"
    with open(runs / "printed", "w") as file, contextlib.redirect_stdout(file):
        assert (
            main([*(str(runs / name) for name in LOSSES), "--factor", "glasses", *FEW, "--out", str(out)])
            == 0
        )
    return out


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]


def test_the_table(runs, made):
    table = made.with_name("side.by.side.md").read_text()
    assert (runs / "printed").read_text() == table
    header, _, *rows = cells(table)
    assert "share of glasses" in header
    assert [row[:2] for row in rows] == [
        ["first", "H, beta 4"],
        ["second", "VAE"],
        ["third", "B, gamma 10, C 25"],
    ]
    model = BetaVAE.from_pretrained(runs / "second")
    truth = measure.open_truth(runs / "second", Protocol(factor_bins=2), model, torch.device("cpu"))
    drawn = measure.sample_numbers(truth, 40)
    found = measure.compute_statistics(model, truth, drawn, 0.5, torch.device("cpu"))
    codes = measure.encode(model, truth, drawn, torch.device("cpu"))
    shares = information_shares(codes, truth.factors[drawn])
    glasses = truth.names.index("glasses")
    latent = shares[:, glasses].argmax()
    other = sorted(shares[latent])[-2] if shares[latent].argmax() == glasses else shares[latent].max()
    expected = [found["kl_per_latent"][latent], shares[latent, glasses], other, found["kl"]]
    row = rows[1]
    shown = [float(row[3]), float(row[4]), float(row[5].split()[1]), float(row[6])]
    assert int(row[2]) == latent
    assert shown == pytest.approx(expected, abs=0.0051)
    assert shares[latent, truth.names.index(row[5].split()[0])] == other
    assert float(row[8]) == pytest.approx(found["mse"], abs=1e-4)


def test_the_pictures(runs, made):
    """A row a model; the middle of each is the image that all start from, but for the latent."""
    with Image.open(made.with_name("side.by.side.png")) as opened:
        picture = opened.convert("RGB")
    left = picture.width - (11 * (SIDE + MARGIN) - MARGIN)
    assert left > LABEL  # the texts are longer than a latent's number
    height = 3 * (SIDE + MARGIN) - MARGIN
    assert picture.height == HEADER + height
    assert np.array(picture)[:, left - 4 : left].min() == 255  # and end before the images
    with Image.open(made.with_name("side.by.side.gif")) as gif:
        assert (gif.n_frames, gif.height) == (20, height)


def test_all_models_start_from_the_same_image(runs, monkeypatch):
    started = {}

    def noted(model, z, latents, values):
        started[model] = (z, latents)
        return torch.zeros(len(latents), len(values), SIDE, SIDE, 3, dtype=torch.uint8)

    monkeypatch.setattr(comparison, "traverse", noted)
    arguments = Arguments((), "smile", points=40, factor_bins=2)
    first = comparison.walk_latent(runs / "first", arguments, None)
    second = comparison.walk_latent(runs / "second", arguments, first.start)
    assert second.start == first.start
    for name, (model, (z, _)) in zip(("first", "second"), started.items(), strict=True):
        truth = measure.open_truth(runs / name, Protocol(factor_bins=2), model, torch.device("cpu"))
        image = truth.images(measure.sample_numbers(truth, 40)[[first.start]])
        with torch.no_grad():
            assert torch.allclose(z, model.encode(image)[0], atol=1e-4)


def test_the_latent_that_tells_most(data, runs, monkeypatch):
    """Latents that are the factors themselves are found, and what else they carry is named."""
    with open(data / "celeba" / "factors.csv") as file:
        rows = list(csv.DictReader(file))
    glasses = np.array([float(row["glasses"]) for row in rows])
    smile = np.array([float(row["smile"]) for row in rows])
    smile = smile > (smile.min() + smile.max()) / 2  # its two bins

    def codes(model, truth, numbers, device):
        rng = np.random.default_rng(0)
        noise = rng.normal(size=(len(numbers), 4)).astype(np.float32)
        noise[:, 2] = glasses[numbers] + 0.1 * smile[numbers]
        return noise

    monkeypatch.setattr(measure, "encode", codes)
    row = comparison.walk_latent(runs / "first", Arguments((), "glasses", points=N, factor_bins=2), 0).row
    assert (row.latent, row.other) == (2, "smile")
    assert row.share == pytest.approx(1)
    assert row.other_share > 0.9


def test_names_of_losses():
    assert [loss_name(each) for each in LOSSES.values()] == ["H, beta 4", "VAE", "B, gamma 10, C 25"]
    assert loss_name(None) == "loss not known"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--factor", "hat"], "--factor must be one of azimuth, smile"),
        (["--factor", "smile", "--points", "0"], "--points must be positive, got 0"),
        (["--factor", "smile", "--points", "10"], "10 points are fewer than 20 bins"),
        (["--factor", "smile", "--steps", "1"], "--steps must be at least 2, got 1"),
        (["--factor", "smile", "--data-root", "nowhere"], "nowhere holds no factors.csv"),
    ],
)
def test_options_that_cannot_be_used(runs, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(runs / "first"), *FEW, *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_models_that_do_not_go_together(runs, tmp_path, capsys):
    model = BetaVAE(3, 4, (4, 8), 64)
    model.save_pretrained(tmp_path / "larger")
    (tmp_path / "larger" / "config.yaml").write_text((runs / "first" / "config.yaml").read_text())
    options = ["--factor", "smile", *FEW, "--out", str(tmp_path / "out")]
    assert main([str(runs / "first"), str(tmp_path / "larger"), *options]) == 2
    assert "larger has images of 64 pixels and" in capsys.readouterr().err
    others = faces.write(tmp_path / "faces", n=N, seed=1, progress=False).parent
    settings = Config(data=DataConfig(root=others, image_size=SIDE))
    (tmp_path / "larger" / "config.yaml").write_text(settings.to_yaml())
    assert main([str(runs / "first"), str(tmp_path / "larger"), *options]) == 2
    assert "larger was trained on other images than" in capsys.readouterr().err
    assert main([str(runs / "first"), str(tmp_path), *options]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    assert main(["--factor", "smile"]) == 2
    assert "name the run folders to compare" in capsys.readouterr().err


def test_a_latent_without_information_is_not_walked(runs, tmp_path):
    """Latent 0 is a thousandth of latent 1: the bins of both are the same, but its walk shows nothing."""
    model = BetaVAE.from_pretrained(runs / "second")
    with torch.no_grad():
        mu, log_var = model.head.weight.chunk(2)
        mu[0] = mu[1] / 1000
        model.head.bias[[0, 1, 4]] = 0
        log_var[0] = 0
    model.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text((runs / "second" / "config.yaml").read_text())
    arguments = Arguments((tmp_path / "run",), "glasses", points=40, factor_bins=2)
    device = torch.device("cpu")
    truth = measure.open_truth(tmp_path / "run", Protocol(factor_bins=2), model, device)
    codes = measure.encode(model, truth, np.arange(N), device)
    shares = information_shares(codes, truth.factors)
    assert shares[0] == pytest.approx(shares[1])
    for factor in truth.names:
        row = comparison.walk_latent(
            tmp_path / "run", dataclasses.replace(arguments, factor=factor), None
        ).row
        assert row.latent != 0
        assert row.kl > ACTIVE_KL


def test_the_best_latent_is_an_active_one():
    areas = np.array([[0.9, 0.1], [0.6, 0.3], [0.5, 0.8]])
    best = measure.best_latents(areas, ("a", "b"), active_latents([0.001, 3.0, 0.5]))
    assert {name: found["latent"] for name, found in best.items()} == {"a": 1, "b": 2}
    assert active_latents([0.0, 0.001]).all()
