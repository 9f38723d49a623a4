"""`python -m bvae.evaluate` as a user runs it: its files, its numbers, and bad input."""

import contextlib
import csv
import errno
import json
import math
import shutil

import numpy as np
import pytest
import torch
from deadlines import in_time
from PIL import Image

from bvae import compare, ground_truth
from bvae.config import Config, DataConfig
from bvae.datasets import held_out
from bvae.evaluate import main
from bvae.evaluation import measure, run_folder
from bvae.evaluation.measure import interval
from bvae.evaluation.options import Protocol
from bvae.ground_truth import Truth
from bvae.model import BetaVAE
from bvae.pipelines import faces, sprites
from bvae.pipelines.packed_loader import pack
from bvae.plots import CELL, HEADER, LABEL, LEFT, MARGIN, TOP, heat_map
from bvae.reference import scale_pixels

N = 60
FEW = ["--seeds", "2", "--points", "30", "--factor-bins", "2"]
SCORES = {
    *("mig", "dci_disentanglement", "dci_completeness", "dci_informativeness", "sap", "modularity"),
    *("explicitness", "infom", "infoc", "infoe", "irs"),
    *("beta_vae", "factor_vae"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    return faces.write(tmp_path_factory.mktemp("data"), n=N, seed=0, progress=False).parent


def small_model(channels: int = 3, activation: str = "tanh", image_size: int = 32) -> BetaVAE:
    """Untrained; its codes are as large as a trained one's."""
    torch.manual_seed(0)
    model = BetaVAE(channels, 4, (4, 8), image_size, activation).eval()
    with torch.no_grad():
        model.head.weight[:4] *= 50
    return model


@pytest.fixture(scope="module")
def run(data, tmp_path_factory: pytest.TempPathFactory):
    """A run folder, evaluated; its config.yaml names the data."""
    folder = tmp_path_factory.mktemp("run")
    small_model().save_pretrained(folder)
    (folder / "config.yaml").write_text(Config(data=DataConfig(root=data, image_size=32)).to_yaml())
    with open(folder / "printed", "w") as file, contextlib.redirect_stdout(file):
        assert main([str(folder), *FEW]) == 0
    return folder


# --- The command ------------------------------------------------------------------------------------------
def test_files_and_table(run):
    result = json.loads((run / "evaluation.json").read_text())
    assert result["images"] == N
    assert result["factors"] == [factor.name for factor in faces.FACTORS]
    assert result["scores"].keys() == SCORES
    assert all(0 <= value["mean"] <= 1 <= 1 + value["half_width"] for value in result["scores"].values())
    assert len({value["half_width"] for value in result["scores"].values()}) > 1
    assert {np.shape(matrix) for matrix in result["matrices"].values()} == {(4, 9)}
    assert {"encoding", "score", "beta_vae", "factor_vae"} <= result["seconds"].keys()
    with np.load(run / "codes.npz") as points:  # no pickle in it
        assert points["mu"].shape == (30, 4)
        assert points["names"].tolist() == result["factors"]
        assert points["factors"].shape == (30, 9)
        assert len(set(points["numbers"].tolist())) == 30
    mig = result["scores"]["mig"]
    assert f"| mig | {mig['mean']:.3f} | ± {mig['half_width']:.3f} |" in (run / "evaluation.md").read_text()
    assert (run / "printed").read_text() == (run / "evaluation.md").read_text()
    with Image.open(run / "evaluation.png") as picture:
        assert picture.size[0] > 2 * 9 * CELL[0]
    with Image.open(run / "evaluation_traversals.png") as picture:
        assert picture.size == (LABEL + 11 * (32 + MARGIN) - MARGIN, HEADER + 4 * (32 + MARGIN) - MARGIN)


def test_what_the_posteriors_and_reconstructions_are(run, data):
    model = BetaVAE.from_pretrained(run)
    truth = ground_truth.folder(data, model, bins=2)
    found = measure.compute_statistics(model, truth, np.arange(N), 0.5, torch.device("cpu"))
    x = truth.images(np.arange(N))
    with torch.no_grad():
        mu, log_var = model.encode(x)
        mse = (model.decode(mu) - x).square().mean()
    kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var)
    assert found["mse"] == pytest.approx(mse.item(), rel=1e-5)
    assert found["reconstruction_nats"] == pytest.approx(mse.item() * 3 * 32 * 32, rel=1e-5)
    assert found["kl"] == pytest.approx(kl.sum(1).mean().item(), rel=1e-5)
    assert found["kl_per_latent"] == pytest.approx(kl.mean(0).tolist(), rel=1e-5)
    assert found["active_units"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "sprites"], r"sprites are [1, 64, 64], and this model takes [3, 32, 32]"),
        (["--seeds", "0"], "--seeds must be positive, got 0"),
        (["--points", "-5"], "--points must be positive, got -5"),
        (["--points", "10"], "10 points are fewer than 20 bins"),
        (["--factor-bins", "1"], "bins of the factors must be at least 2"),
        (["--data-root", "nowhere"], "nowhere holds no factors.csv"),
    ],
)
def test_options_that_cannot_be_used(run, options, message, capsys):
    assert main([str(run), *FEW, *options]) == 2
    assert message in capsys.readouterr().err


def test_runs_whose_factors_are_not_known(tmp_path, capsys):
    small_model().save_pretrained(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "does not say which data it was trained on: name them with --data" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(Config(data=DataConfig(name="memory")).to_yaml())
    assert main([str(tmp_path)]) == 2
    assert "images in memory: name others with --data" in capsys.readouterr().err


def test_images_without_factors(data, tmp_path, capsys):
    """One's own photos: what the posteriors and reconstructions are, and no scores."""
    model = small_model()
    model.save_pretrained(tmp_path)
    folder = DataConfig(name="folder", root=data / "celeba" / "img_align_celeba", image_size=32)
    (tmp_path / "config.yaml").write_text(Config(data=folder).to_yaml())
    assert main([str(tmp_path), *FEW]) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    pixels = held_out(folder, 30)
    assert result["images"] == len(pixels) > 0
    x = scale_pixels(pixels.permute(0, 3, 1, 2), -1)
    with torch.no_grad():
        mse = (model.decode(model.encode(x)[0]) - x).square().mean().item()
    assert result["model"]["mse"] == pytest.approx(mse, rel=1e-4)
    assert result["model"].keys() >= {"psnr", "ssim", "kl"}
    assert result["scores"] == result["attributes"] == result["matrices"] == {}
    assert not (tmp_path / "evaluation.png").exists()
    with Image.open(tmp_path / "evaluation_traversals.png") as picture:
        assert picture.width > 11 * 32
    capsys.readouterr()
    assert compare.main([str(tmp_path), "--factor", "smile", "--out", str(tmp_path / "c")]) == 2
    assert "images without known factors" in capsys.readouterr().err
    BetaVAE(3, 4, (4, 8), 64).save_pretrained(tmp_path)
    assert main([str(tmp_path), *FEW]) == 2
    assert "the images are [3, 32, 32], and this model takes [3, 64, 64]" in capsys.readouterr().err


def test_what_is_infinite_is_said_so(tmp_path, monkeypatch):
    """Latents that repeat each other have an infinite total correlation, and JSON has no number for it."""
    factors = np.indices((2, 3)).reshape(2, -1).T.repeat(10, 0)
    truth = Truth(("a", "b"), factors, lambda numbers: torch.rand(len(numbers), 3, 32, 32) * 2 - 1)
    model = small_model()
    with torch.no_grad():
        model.head.weight[1], model.head.bias[1] = model.head.weight[0], model.head.bias[0]
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(run_folder, "open_truth", lambda *arguments: truth)
    table = run_folder.evaluate(tmp_path, Protocol(seeds=1, points=30))
    assert "| total_correlation | infinite | |" in table
    text = (tmp_path / "evaluation.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["model"]["total_correlation"] is None


def test_results_are_there_when_all_is(tmp_path, data, monkeypatch, capsys):
    """A sweep takes evaluation.json for the sign that a run is evaluated."""
    small_model().save_pretrained(tmp_path)

    def fail(*arguments):
        raise OSError(errno.EIO, "no room", "a.png")

    monkeypatch.setattr(run_folder, "save_traversal", fail)
    assert main([str(tmp_path), *FEW, "--data", "faces", "--data-root", str(data)]) == 2
    assert "no room" in capsys.readouterr().err
    assert not (tmp_path / "evaluation.json").exists()


def shapes_run(folder, **data) -> None:
    small_model(1, "sigmoid", 64).save_pretrained(folder)
    settings = DataConfig(**{"name": "sprites", "channels": 1, "flip": False, **data})
    (folder / "config.yaml").write_text(Config(data=settings).to_yaml())


def test_a_users_dsprites(tmp_path, capsys):
    indices = 3 * torch.from_numpy(np.indices((1, 2, 3, 3, 3)).reshape(5, -1).T.repeat(3, 0))
    indices[:, 0] = torch.arange(n := len(indices)) % 3
    classes = np.column_stack([np.zeros(n, np.int64), indices.numpy()])
    np.savez(tmp_path / "d.npz", imgs=sprites.render(indices).numpy(), latents_classes=classes)
    shapes_run(tmp_path)
    assert main([str(tmp_path), *FEW, "--data", "dsprites"]) == 2
    assert "--data dsprites needs --data-root" in capsys.readouterr().err
    shapes_run(tmp_path, name="dsprites", root=tmp_path / "d.npz")
    assert main([str(tmp_path), "--seeds", "1", "--points", "100"]) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert (result["images"], tuple(result["factors"])) == (n, sprites.FACTORS)
    assert result["scores"].keys() == SCORES
    model = BetaVAE.from_pretrained(tmp_path)
    x = sprites.render(indices).float()[:, None]
    error = torch.nn.functional.binary_cross_entropy(model.reconstruct(x), x, reduction="sum") / n
    assert result["model"]["reconstruction_nats"] == pytest.approx(error.item(), rel=1e-4)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("head", ": codes must be finite"),
        ("decoder", "decoder's output has values that are not"),
    ],
)
def test_a_model_that_is_not_finite(tmp_path, monkeypatch, capsys, activation, part, message):
    model = small_model(1, activation, 64)
    with torch.no_grad():
        next(model.get_submodule(part).parameters()).fill_(3e38)  # products are infinite
    model.save_pretrained(tmp_path)
    factors = np.indices((2, 3)).reshape(2, -1).T.repeat(10, 0)
    truth = Truth(("a", "b"), factors, lambda numbers: torch.rand(len(numbers), 1, 64, 64))
    monkeypatch.setattr(run_folder, "open_truth", lambda *arguments: truth)
    assert main([str(tmp_path), "--seeds", "1", "--points", "30"]) == 2
    assert message in capsys.readouterr().err


def test_a_sure_mistake_costs_its_logit():
    """A pixel of 0 whose logit is 20 costs 20 nats, though the sigmoid of 20 is 1 in float32."""
    model = small_model(1, "sigmoid", 64)
    last = model.decoder[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(20)
    truth = Truth(("a",), np.zeros((2, 1), int), lambda numbers: torch.zeros(len(numbers), 1, 64, 64))
    found = measure.compute_statistics(model, truth, np.arange(2), 0.5, torch.device("cpu"))
    assert found["reconstruction_nats"] == pytest.approx(20 * 64 * 64, rel=1e-6)


def test_sprites_of_which_a_factor_does_not_vary(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sprites, "COUNT", 100)  # all of them squares of one size
    shapes_run(tmp_path, cache_dir=tmp_path / "cache")
    assert main([str(tmp_path), *FEW]) == 2
    assert "factor 0 has no variation in 30 points" in capsys.readouterr().err


def test_attributes_are_told_by_single_latents(data, tmp_path, monkeypatch):
    """A latent that is the attribute's opposite tells it as well as any."""
    model = small_model()
    truth = ground_truth.attributes(data, model)
    assert truth.factors.shape == (6, len(truth.names))  # a tenth of the images is for testing
    with open(data / "celeba" / "factors.csv") as file:
        rows = list(csv.DictReader(file))[-6:]
    glasses = truth.factors[:, truth.names.index("Eyeglasses")]
    assert glasses.tolist() == [1 if float(row["glasses"]) > 0.5 else -1 for row in rows]
    codes = np.zeros((6, 4), np.float32)
    codes[:, 2] = -glasses
    monkeypatch.setattr(measure, "encode", lambda *_: codes)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.yaml").write_text(
        Config(data=DataConfig(name="celeba", root=data, image_size=32)).to_yaml()
    )
    table = run_folder.evaluate(tmp_path, Protocol())
    assert "| AUROC of Eyeglasses, by latent 2 | 1.000 | |" in table
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["attributes"]["Eyeglasses"] == {"latent": 2, "auroc": 1.0}
    assert result["scores"] == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no list_attr_celeba.txt .or .csv., which gives the attributes"),
        ("", "list_attr_celeba.txt is empty"),
        ("Bald Young\n000055.jpg 1 1\n", "line 1: expected the number of images, which this copy lacks"),
        ("2\nBald Young\n000055.jpg 1\n", "line 3: expected a file name and 2 times 1 or -1"),
        ("2\nBald Young\n000055.jpg 1 0\n", "line 3: expected a file name and 2 times 1 or -1"),
        ("2\nBald Young\n000001.jpg 1 1\n", "the list of attributes lacks 000055.jpg and 5 more"),
        (
            "x\nBald\n" + "".join(f"0000{i}.jpg 1\n" for i in range(55, 61)),
            "its 6 images have the same value in every attribute",
        ),
    ],
)
def test_attributes_that_cannot_be_used(data, tmp_path, text, message):
    shutil.copytree(data / "celeba", tmp_path / "celeba")
    path = tmp_path / "celeba" / "list_attr_celeba.txt"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ground_truth.attributes(tmp_path, small_model())


def test_attributes_and_factors_of_images_with_another_suffix(data, tmp_path):
    shutil.copytree(data / "celeba", tmp_path / "celeba")
    for path in (tmp_path / "celeba" / "img_align_celeba").iterdir():
        path.rename(path.with_suffix(".JPEG"))
    for truth in (ground_truth.attributes, lambda root, model: ground_truth.folder(root, model, bins=5)):
        ours, theirs = truth(tmp_path, small_model()), truth(data, small_model())
        assert np.array_equal(ours.factors, theirs.factors)
        assert torch.equal(ours.images(np.arange(3)), theirs.images(np.arange(3)))


@pytest.mark.parametrize("index", [False, True], ids=["Kaggle", "pandas with its index"])
def test_attributes_as_csv(data, tmp_path, index):
    shutil.copytree(data / "celeba", tmp_path / "celeba")
    path = tmp_path / "celeba" / "list_attr_celeba.txt"
    _, names, *rows = path.read_text().splitlines()
    lines = [",".join(["image_id", *names.split()]), *(",".join(row.split()) for row in rows)]
    if index:
        lines = [
            "," + lines[0],
            *(f'{i},"{line.replace(",", chr(34) + ",", 1)}' for i, line in enumerate(lines[1:])),
        ]
    path.with_suffix(".csv").write_text("\n".join(lines) + "\n")
    path.unlink()
    ours = ground_truth.attributes(tmp_path, small_model())
    theirs = ground_truth.attributes(data, small_model())
    assert ours.names == theirs.names
    assert np.array_equal(ours.factors, theirs.factors)


# --- Its parts --------------------------------------------------------------------------------------------
def test_intervals_are_students():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2, 4.302653 / math.sqrt(3)))
    assert interval([0.25]) == (0.25, None)


def test_the_true_factors_rate_best(tmp_path):
    factors = np.indices((2, 3, 4)).reshape(3, -1).T.repeat(20, 0)
    truth = Truth(("a", "b", "c"), factors, lambda numbers: torch.empty(0))
    codes = (factors / [1, 2, 3]).astype(np.float32)
    seconds: dict[str, float] = {}
    active, protocol = np.ones(3, np.bool_), Protocol(seeds=2, points=480)
    found, importance = measure.score_codes(lambda rows: codes[rows], truth, protocol, active, seconds)
    assert found.keys() == SCORES
    for name in SCORES - {"sap", "explicitness"}:  # no linear classifier tells a value between two others
        assert found[name].mean > 0.97, name
    assert seconds.keys() == {"score", "beta_vae", "factor_vae"}
    for matrix in (importance, measure.information_shares(codes, factors)):
        assert matrix.argmax(0).tolist() == [0, 1, 2]
        assert np.allclose(matrix.max(0), 1, atol=0.02)


def test_scores_of_active_latents_alone():
    """A latent of almost no spread that copies a factor counts among all latents only."""
    factors = np.indices((2, 3, 4)).reshape(3, -1).T.repeat(20, 0)
    truth = Truth(("a", "b", "c"), factors, lambda numbers: torch.empty(0))
    codes = np.concatenate([factors / [1, 2, 3], 1e-3 * factors[:, [2]]], 1).astype(np.float32)
    active, protocol = np.array([True, True, True, False]), Protocol(seeds=2, points=480)
    found, _ = measure.score_codes(lambda rows: codes[rows], truth, protocol, active, {})
    assert found.keys() == SCORES | {"mig_active", "sap_active", "modularity_active"}
    assert found["mig"].mean < 0.7
    assert found["mig_active"].mean > 0.99
    alone, _ = measure.score_codes(lambda rows: codes[rows][:, :3], truth, protocol, np.ones(3, np.bool_), {})
    for name in ("mig", "sap", "modularity"):
        assert found[f"{name}_active"] == alone[name]


def test_few_points_encode_few_images(tmp_path, monkeypatch):
    """With all points, all images are encoded, each once."""
    factors = np.indices((2, 2)).reshape(2, 4).T.repeat(2500, 0)
    truth = Truth(("a", "b"), factors, lambda numbers: torch.empty(len(numbers), 0))
    encoded: list[int] = []

    def encode(model, truth, numbers, device):
        encoded.extend(numbers.tolist())
        return factors[numbers].astype(np.float32)

    monkeypatch.setattr(measure, "encode", encode)
    model = BetaVAE(1, 2, (4,), 32)
    codes = measure.LazyCodes(model, truth, torch.device("cpu"))
    protocol = Protocol(seeds=1, points=20)
    assert protocol.observations == 30 * 192
    measure.score_codes(codes, truth, protocol, np.ones(2, np.bool_), {})
    assert 20 <= len(encoded) == len(set(encoded)) < 5000
    codes(np.arange(10_000))
    assert sorted(encoded) == list(range(10_000))


def test_all_images_are_encoded_in_order(data):
    model = small_model()
    truth = ground_truth.folder(data, model, bins=5)
    with torch.no_grad():
        expected = model.encode(truth.images(np.arange(N)))[0]
    codes = measure.encode(model, truth, np.arange(N), torch.device("cpu"))
    assert np.allclose(codes, expected, atol=1e-4)


def test_faces_and_their_factors(data):
    model = small_model(image_size=64)
    truth = ground_truth.folder(data / "celeba", model, bins=5)
    assert truth.names[5] == "glasses"
    with open(data / "celeba" / "factors.csv") as file:
        rows = list(csv.DictReader(file))
    assert truth.factors[:, 5].tolist() == [float(row["glasses"]) for row in rows]
    skin = np.array([float(row["skin"]) for row in rows])
    edges = np.linspace(skin.min(), skin.max(), 6)[1:-1]
    assert truth.factors[:, 2].tolist() == np.digitize(skin, edges).tolist()
    drawn = faces.render(faces.sample_factors(N, 0)[[7, 3]]).permute(0, 3, 1, 2)[:, :, 35:183, 15:163]
    expected = torch.nn.functional.interpolate(drawn / 127.5 - 1, size=64, mode="bilinear", antialias=True)
    assert (truth.images(np.array([7, 3])) - expected).abs().mean() < 0.03  # JPEG's share


@pytest.mark.parametrize("text", ["file,a\n1.jpg,x\n", "file,a,b\n1.jpg,1\n", "file,a\n1.jpg,nan\n"])
def test_factors_that_are_no_table_of_numbers(tmp_path, text):
    (tmp_path / "factors.csv").write_text(text)
    with pytest.raises(ValueError, match="factors.csv"):
        ground_truth.folder(tmp_path, small_model(), bins=5)


def test_a_table_of_a_million_factors_is_refused_at_once(tmp_path):
    header = ",".join(["file", *(f"f{i}" for i in range(1_000_000))])
    row = ",".join(["1.jpg", *["0.5"] * 1_000_000])
    (tmp_path / "factors.csv").write_text("\n".join([header, *[row] * 10]))
    with in_time(), pytest.raises(ValueError, match="factors.csv: 1,000,000 factors are more than 1,000"):
        ground_truth.folder(tmp_path, small_model(), bins=5)


@pytest.mark.parametrize(("activation", "low"), [("tanh", -1), ("sigmoid", 0)])
def test_sprites_and_their_factors(activation, low):
    indices = sprites.unravel(torch.arange(0, sprites.COUNT, 1000))
    truth = ground_truth.shapes(small_model(1, activation, 64), pack(sprites.render(indices)), indices)
    numbers = np.array([5, 700, 300])
    assert truth.factors.shape == (738, 5)
    x = truth.images(numbers)
    assert x.shape == (3, 1, 64, 64)
    assert x.unique().tolist() == [low, 1]
    assert torch.equal(x[:, 0] == 1, sprites.render(torch.from_numpy(truth.factors[numbers])).bool())


def test_heat_map_is_white_at_0_and_dark_at_1():
    picture = heat_map({"first": np.eye(2), "second": np.zeros((2, 2))}, ["r0", "r1"], ["c0", "c1"])
    corner = [
        picture.getpixel((LEFT + column * CELL[0] + 2, TOP + row * CELL[1] + 2))
        for row, column in [(0, 0), (0, 1), (1, 1)]
    ]
    assert corner == [(8, 48, 107), (255, 255, 255), (8, 48, 107)]


def test_one_metric_seed_says_nothing_of_its_spread(data, tmp_path):
    small_model().save_pretrained(tmp_path)
    (tmp_path / "config.yaml").write_text(Config(data=DataConfig(root=data, image_size=32)).to_yaml())
    assert main([str(tmp_path), *FEW, "--seeds", "1"]) == 0
    scores = json.loads((tmp_path / "evaluation.json").read_text())["scores"]
    assert scores["mig"]["half_width"] is None
    assert f"| mig | {scores['mig']['mean']:.3f} | one seed |" in (tmp_path / "evaluation.md").read_text()
