"""Training on 2D shapes: the data sets, and the presets as a user runs them."""

import pytest
import torch
from test_dsprites import archive

from bvae import config
from bvae.config import DataConfig
from bvae.datasets import VALIDATED, open_data
from bvae.model import BetaVAE, build
from bvae.pipelines import faces, sprites
from bvae.reference import scale_pixels
from bvae.train import main

CPU = torch.device("cpu")
PRESETS = sorted(file.stem for file in config.PRESETS.glob("*.yaml"))
SHORT = ["--max-steps", "2", "--no-compile", "--log-every", "1"]
BETAS = [1, 2, 4, 6, 8, 16]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path) -> int:
    """The set ends early, and is kept where the next test does not find it."""
    monkeypatch.setattr(sprites, "COUNT", 300)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return 300


# --- Data sets --------------------------------------------------------------------------------------------
def test_sprites_are_all_trained_on_and_some_looked_at(few, tmp_path, monkeypatch):
    monkeypatch.setattr("bvae.datasets.VALIDATED", 50)
    options = DataConfig(name="sprites", channels=1, flip=False, cache_dir=tmp_path)
    train, valid, bad, *_ = open_data(options, 64, 7, CPU)
    assert (train.count, valid.count, bad) == (few, 50, [])
    for images, index in train.epoch(0):
        assert images.shape == (64, 64, 64, 1)
        drawn = sprites.render(sprites.unravel(index))
        assert torch.equal(scale_pixels(images[..., 0], 0.0), drawn.float())  # a pixel of 1 becomes 1.0
    assert VALIDATED == 10_000
    again = open_data(options, 64, 8, CPU).valid
    assert torch.equal(valid.head(50), again.head(50))
    assert len(valid.head(50).flatten(1).unique(dim=0)) > 45
    assert (tmp_path / sprites.FILE).is_file()


def test_a_users_file(tmp_path):
    options = DataConfig(name="dsprites", root=archive(tmp_path / "d.npz"), channels=1, flip=False)
    train, valid, *_ = open_data(options, 4, 7, CPU)
    assert (train.count, valid.count) == (12, 12)
    indices = sprites.unravel(torch.arange(0, sprites.COUNT, sprites.COUNT // 12)[:12])
    assert torch.equal(train.head(12)[..., 0], 255 * sprites.render(indices))
    assert open_data(options, 13, 7, CPU).train.batch_size == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "dsprites"], "--data dsprites needs --data-root, the dsprites_*.npz file"),
        (["--data", "dsprites", "--data-root", "absent.npz"], "absent.npz"),
        (["--data", "dsprites", "--data-root", "page.npz"], "page.npz is not dSprites' npz"),
        (["--data", "sprites", "--channels", "3"], "sprites are grey"),
        (["--data", "sprites", "--image-size", "32"], "sprites are grey, of 64 x 64"),
    ],
)
def test_refused(few, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.npz").write_text("<html>")
    assert main([*options, "--out", "run"]) == 2
    assert message in capsys.readouterr().err


# --- Presets ----------------------------------------------------------------------------------------------
def test_presets_of_the_papers():
    assert {"higgins_sprites", "burgess_sprites", "celeba_b"} < set(PRESETS)
    for beta in BETAS:
        settings = config.read(f"locatello_sprites_beta{beta}")[0].resolve(11_520)
        assert (settings.objective.beta, settings.objective.weight_on_kl) == (beta, beta)
        assert settings.training.steps(sprites.COUNT // 64) == 300_000
    settings = config.read("burgess_sprites")[0].resolve(11_520)
    assert (settings.objective.weight_on_kl, settings.objective.capacity_iters) == (1000, 100_000)
    settings = config.read("locatello_rooms")[0].resolve(7_500)
    assert (settings.objective.beta, settings.data.channels, settings.training.max_steps) == (4, 3, 300_000)
    assert config.read("celeba_b")[0].resolve(1130).objective.kl_weight == 128 / 64**2


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_their_models(name):
    settings = config.read(name)[0]
    settings.check()
    model = build(settings)
    assert model.config["arch"] == settings.model.arch
    assert model.input_shape == (settings.data.channels, 64, 64)
    if "sprites" in name or "rooms" in name:
        assert (model.activation, model.latent_dim) == ("sigmoid", 10)


# The betas of one preset differ in a number alone.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "_beta" in name else ()) for name in PRESETS]
)
def test_presets_train(few, few_rooms, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = []
    if not any(drawn in name for drawn in ("sprites", "rooms")):  # drawn faces stand in for CelebA's
        data = ["--data-root", str(faces.write(tmp_path / "faces", n=200, seed=0, progress=False))]
    assert main(["--config", name, *data, *SHORT, "--out", "run"]) == 0
    model = BetaVAE.from_pretrained("run")
    assert model.config["arch"] == config.read(name)[0].model.arch
    assert config.read("run/config.yaml")[0].training.optimizer == config.read(name)[0].training.optimizer


def test_shapes_without_a_configuration_are_trained_by_a_preset(few, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--data", "sprites", *SHORT, "--out", "run"]) == 0
    assert (
        "options that are not on the command line come from the preset burgess_sprites"
        in capsys.readouterr().out
    )
    assert config.read("run/config.yaml")[0].model.arch == "burgess"
