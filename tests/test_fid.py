"""PSNR, SSIM, FID and KID: against scikit-image and closed forms, with a tiny extractor and bad files."""

import hashlib
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from test_evaluate import FEW, data, run, small_model  # noqa: F401 (fixtures)

from bvae import ground_truth
from bvae.evaluate import main
from bvae.evaluation import quality, run_folder
from bvae.evaluation.options import Protocol
from bvae.metrics import ssim

CPU = torch.device("cpu")


# --- SSIM -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (2, 1, 11, 40), (1, 3, 17, 64)], ids=str)
@pytest.mark.parametrize("peak", [1, 2])
def test_ssim_is_scikit_images(shape, peak):
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    target = rng.random(shape) * peak - peak / 2
    mean = (target + 0.2 * rng.standard_normal(shape)).clip(-peak / 2, peak / 2)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": peak}
    expected = [
        metrics.structural_similarity(a, b, channel_axis=0, **settings)
        for a, b in zip(mean, target, strict=True)
    ]
    assert ssim(torch.from_numpy(mean), torch.from_numpy(target), peak) == pytest.approx(
        np.mean(expected), rel=1e-10
    )


def test_ssim_of_flat_images():
    """Without contrast only the brightness counts: (2 a b + c1) / (a^2 + b^2 + c1)."""
    a, b, c1 = 0.4, 0.6, 0.01**2
    images = torch.ones(2, 1, 16, 16)
    assert ssim(a * images, b * images, peak=1) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))
    assert ssim(images, images, peak=1) == 1


@pytest.mark.parametrize(
    ("shape", "other", "message"),
    [
        ((2, 3, 16, 16), (2, 3, 16, 8), "must both be"),
        ((0, 3, 16, 16), (0, 3, 16, 16), "must both be"),
        ((2, 16, 16), (2, 16, 16), "must both be"),
        ((2, 3, 10, 16), (2, 3, 10, 16), "at least 11 x 11"),
    ],
)
def test_ssim_refuses(shape, other, message):
    with pytest.raises(ValueError, match=message):
        ssim(torch.zeros(shape), torch.zeros(other), peak=1)


def test_evaluate_has_psnr_and_ssim_always(run):  # noqa: F811
    result = json.loads((run / "evaluation.json").read_text())
    assert -1 <= result["model"]["ssim"] <= 1
    assert result["model"]["psnr"] > 0
    assert result["quality"] is None
    assert f"| ssim | {result['model']['ssim']:.4g} | |" in (run / "evaluation.md").read_text()


# --- FID and KID ------------------------------------------------------------------------------------------
pytest.importorskip("torchmetrics")
pytest.importorskip("torch_fidelity")
FEATURES = 4


def tiny_extractor():
    """Seeded: the mean of each channel and of all pixels' squares, mixed; uint8 [N, 3, H, W] to [N, 4]."""
    mix = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(0))

    def extract(images):
        x = images.float() / 255
        return torch.cat([x.mean((2, 3)), x.square().mean((1, 2, 3))[:, None]], 1) @ mix

    return extract


TINY = quality.Extractor(tiny_extractor(), "inception.pth", "0" * 64)


def gaussian(n, mean, scale, seed):
    noise = torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.tensor(mean) + noise @ torch.tensor(scale).double().diag()


def test_fid_is_the_closed_form_of_gaussians(monkeypatch):
    """Of diagonal covariances: sum of (m1 - m2)^2 + (s1 - s2)^2 (Dowson & Landau 1982)."""
    monkeypatch.setattr(quality, "SUBSETS", 3)
    a = gaussian(20_000, [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 0.5, 1.0], 0)
    b = gaussian(20_000, [1.0, 1.0, 2.0, 2.5], [2.0, 2.0, 1.5, 0.5], 1)
    found = quality.distances(
        a, {"b": b, "again": gaussian(20_000, [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 0.5, 1.0], 2)}
    )
    expected = 1 + 0 + 0 + 0.25 + 1 + 0 + 1 + 0.25
    assert found["b"]["fid"] == pytest.approx(expected, rel=0.03)
    assert found["again"]["fid"] == pytest.approx(0, abs=0.01)
    assert found["b"]["kid"] > 10 * abs(found["again"]["kid"])


def test_kid_is_the_unbiased_estimate_of_its_formula():
    a, b = gaussian(40, [0.0] * 4, [1.0] * 4, 0), gaussian(40, [0.5] * 4, [1.0] * 4, 1)

    def kernel(x, y):
        return (x @ y.T / FEATURES + 1) ** 3

    n = len(a)
    same = sum((k.sum() - k.trace()) / (n * (n - 1)) for k in (kernel(a, a), kernel(b, b)))
    expected = (same - 2 * kernel(a, b).mean()).item()
    found = quality.distances(a, {"b": b})["b"]
    assert found["kid"] == pytest.approx(expected, rel=1e-6)  # every subset is the whole set
    assert found["kid_std"] == pytest.approx(0, abs=1e-6)
    assert quality.distances(a, {"b": b})["b"] == found


def test_the_mixture_has_the_distribution_of_the_codes():
    """Two clusters, which one Gaussian would join by samples between them."""
    side = torch.randint(2, (2000, 1), generator=torch.Generator().manual_seed(0)) * 10.0 - 5
    codes = side + torch.randn(2000, 3, generator=torch.Generator().manual_seed(1))
    samples = quality.fitted_samples(codes)
    assert samples.shape == codes.shape
    assert samples.dtype == codes.dtype
    assert ((samples[:, 0].abs() - 5).abs() < 5).float().mean() > 0.99
    torch.testing.assert_close(samples.mean(0), codes.mean(0), rtol=0, atol=0.5)
    assert quality.fitted_samples(codes[:3]).shape == (3, 3)  # fewer than components


@pytest.fixture
def tiny_inception(monkeypatch):
    """In the place of Inception."""
    monkeypatch.setattr(quality, "inception", lambda path, device: TINY)


def test_the_sets_that_are_compared(data):  # noqa: F811
    model = small_model()
    truth = ground_truth.folder(data, model, bins=2)
    numbers = np.arange(20)
    x = truth.images(numbers)
    with torch.no_grad():
        sets = {n: torch.cat(list(images)) for n, images in quality._sets(model, truth, numbers, CPU)}
        decoded = model.decode(model.encode(x)[0])
    for name, expected in (("images", x), ("reconstructions", decoded)):
        pixels = ((expected + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        torch.testing.assert_close(sets[name], pixels, rtol=0, atol=1)
    assert {(tuple(s.shape), s.dtype) for s in sets.values()} == {((20, 3, 32, 32), torch.uint8)}
    found = quality.measure(model, truth, numbers, TINY, CPU)
    features = {name: tiny_extractor()(images) for name, images in sets.items()}
    mean, cov = zip(
        *((f.double().mean(0), f.double().T.cov()) for f in map(features.get, ("images", "reconstructions"))),
        strict=True,
    )
    root = torch.linalg.eigvals(cov[0] @ cov[1]).sqrt().real.sum()
    expected = (mean[0] - mean[1]).square().sum() + cov[0].trace() + cov[1].trace() - 2 * root
    assert found["distances"]["reconstructions"]["fid"] == pytest.approx(expected.item(), rel=1e-3)


def test_the_command_writes_what_a_figure_depends_on(run, tmp_path, tiny_inception, capsys):  # noqa: F811
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert main([str(folder), *FEW, "--seeds", "1", "--fid-weights", "inception.pth"]) == 0
    found = json.loads((folder / "evaluation.json").read_text())["quality"]
    names = {"reconstructions", "samples of the prior", "samples of a mixture"}
    assert found["distances"].keys() == names
    assert all(math.isfinite(value) for each in found["distances"].values() for value in each.values())
    assert (found["images"], found["size"], found["crop"]) == (30, 32, 148)
    assert (found["weights"], found["sha256"]) == ("inception.pth", "0" * 64)
    table = capsys.readouterr().out
    for name in names:
        assert re.search(rf"\| FID of {name} \| \d+\.\d\d \| \|", table)
        assert re.search(rf"\| KID of {name} \| -?\d\.\d{{5}} \| ± ", table)
    assert "| FID, KID: number of images | 30 | |" in table
    assert "| FID, KID: pixels | cropped to 148, 32 x 32; bilinear to 299 x 299, not antialiased" in table
    assert f"| FID, KID: sha256 of inception.pth | {'0' * 64} | |" in table


# --- Inception's file -------------------------------------------------------------------------------------
class Harmful:
    def __reduce__(self):
        return print, ("code from the file has run",)


@pytest.mark.parametrize("content", ["state", "tensor", "module", "code", "nan"])
def test_weights_that_are_not_inceptions_are_one_line(content, run, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "other.pth"
    model = small_model()
    contents = {"tensor": torch.zeros(3), "module": model.head, "code": {"fc.weight": Harmful()}}
    contents["nan"] = {"Conv2d_1a_3x3.conv.weight": torch.full((32, 3, 3, 3), math.nan)}
    torch.save(contents.get(content, model.state_dict()), path)
    assert main([str(run), *FEW, "--fid-weights", str(path)]) == 2
    out, err = capsys.readouterr()
    assert "has run" not in out
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert line.startswith(
        f"error: --fid-weights {path} does not hold Inception's weights: get weights-inception"
    )


def test_a_file_that_is_missing_or_no_weights_at_all(run, tmp_path, capsys):  # noqa: F811
    assert main([str(run), *FEW, "--fid-weights", str(tmp_path / "none.pth")]) == 2
    missing = (
        f"error: --fid-weights {tmp_path / 'none.pth'}: no such file; get {quality.FILE} from the releases"
    )
    assert missing in capsys.readouterr().err
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    assert main([str(run), *FEW, "--fid-weights", str(tmp_path / "page.pth")]) == 2
    damaged = capsys.readouterr().err
    assert "is a web page, not a checkpoint: download it again" in damaged
    assert f"get {quality.FILE} from the releases" in damaged


def test_a_missing_package_is_one_line(run, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    assert main([str(run), *FEW, "--fid-weights", str(tmp_path)]) == 2
    assert "needs torchmetrics: pip install 'bvae[quality]'" in capsys.readouterr().err


@pytest.mark.slow
def test_inception_itself_with_random_weights(run, tmp_path, monkeypatch):  # noqa: F811
    from torchmetrics.image.fid import NoTrainInceptionV3

    torch.manual_seed(0)
    torch.save({}, tmp_path / "empty.pth")
    with monkeypatch.context() as patch:
        patch.setattr(NoTrainInceptionV3, "load_state_dict", lambda *_: None)
        network = NoTrainInceptionV3("random", ["2048"], tmp_path / "empty.pth", antialias=False)
    torch.save(network.state_dict(), tmp_path / "random.pth")
    extract, name, sha256 = quality.inception(tmp_path / "random.pth", CPU)
    assert name == "random.pth"
    assert sha256 == hashlib.sha256((tmp_path / "random.pth").read_bytes()).hexdigest()
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(extract(images), network(images))
    protocol = Protocol(seeds=1, points=20, factor_bins=2, fid_weights=tmp_path / "random.pth")
    table = run_folder.evaluate(run, protocol)
    assert f"| FID, KID: sha256 of random.pth | {sha256} | |" in table
