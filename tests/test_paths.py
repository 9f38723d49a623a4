"""Paths as users write them, in options and files: expanded in one place, URLs refused by name."""

import os
import pwd
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import NETWORK

from bvae import config, data, ground_truth, sample, sweep, traverse
from bvae.compat.pytorch_vae_weights import export_state
from bvae.config import Config
from bvae.datasets import open_data
from bvae.errors import UsageError, say_once
from bvae.fitting import fit
from bvae.model import BetaVAE
from bvae.paths import expand, option_of
from bvae.pipelines import celeba, dsprites, faces, folder, sprites
from bvae.pipelines.cache_folder import default_folder
from bvae.train import main
from bvae.training import compiler
from bvae.training.cli import Arguments


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLACE", str(tmp_path / "place"))
    return tmp_path / "home"


def test_home_and_variables(home):
    assert expand("~/a") == home / "a"
    assert expand("$PLACE/a") == expand("${PLACE}/a") == home.parent / "place" / "a"
    assert expand("a/b~") == Path("a/b~")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/a", "s3://bucket/a: s3:// is not read here: give a path on this machine"),
        (Path("gs://bucket/a"), "gs://bucket/a: gs:// is not read here"),
        ("file:///a", "file:// is not read here"),
        ("$ABSENT/a", r"the variable \$ABSENT is not set"),
        ("${ABSENT}/a", r"the variable \$\{ABSENT\} is not set"),
        ("~nobody-of-this-name/a", "~nobody-of-this-name is no user's home folder"),
    ],
    ids=str,
)
def test_paths_that_cannot_be_expanded(home, path, message):
    with pytest.raises(UsageError, match=message):
        expand(path)


def test_a_file_may_have_a_name_with_a_dollar(home):
    Path("$x").touch()
    assert expand("$x") == Path("$x")


def test_every_path_of_a_run(home, capsys):
    faces.write(home / "faces", n=30, seed=0, progress=False)
    Path("run.yaml").write_text("data: {root: ~/faces, cache_dir: $PLACE/cache}\n")
    options = [*NETWORK, "--no-compile", "--max-steps", "2", "--batch-size", "4"]
    assert main(["--config", "run.yaml", "--out=~/runs/a", *options]) == 0
    assert f"results: {home}/runs/a/" in capsys.readouterr().out
    assert main(["--resume=~/runs/a", "--max-steps", "3"]) == 0
    assert (home.parent / "place" / "cache").is_dir()
    assert sample.main(["~/runs/a", "--n", "2", "--out=~/two.png"]) == 0
    assert (home / "two.png").is_file()
    assert [path.name for path in Path().iterdir()] == ["run.yaml"]


def test_a_path_that_fit_writes(home):
    images = torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8)
    tiny = {"hidden_dims": (4, 8), "latent_dim": 2, "batch_size": 8, "max_steps": 2, "compile": False}
    fit(images, out="~/fitted", device="cpu", **tiny)
    assert (home / "fitted" / "config.yaml").is_file()


def test_every_public_function_that_takes_a_path(home):
    """Written to ~ and read from $PLACE, or the other way round; nothing is left in the current folder."""
    (home.parent / "place").symlink_to(home)
    model = BetaVAE(latent_dim=2, hidden_dims=(4, 8), image_size=32).eval()
    model.save_pretrained("~/model")
    model.save_pretrained(Path("~/model"))
    assert BetaVAE.from_pretrained("$PLACE/model").config == model.config
    assert BetaVAE.from_pretrained(Path("~/model")).config == model.config
    model.save_config("~/config")
    assert (home / "config" / "config.json").is_file()
    torch.save(export_state(model.state_dict()), home / "theirs.ckpt")
    assert BetaVAE.from_pytorch_vae("~/theirs.ckpt").latent_dim == 2

    assert faces.write("~/faces", n=30, progress=False) == home / "faces" / "celeba"
    data = replace(Config().data, root=Path("~/faces"), cache_dir=Path("$PLACE/cache"), image_size=32)
    opened = open_data(data, 4, 0, torch.device("cpu"))
    assert opened.files[0].startswith(str(home))
    assert (home / "cache").is_dir()
    assert celeba.is_at("~/faces")
    assert len(celeba.inventory("~/faces").splits["train"]) == 24
    assert celeba.attributes("$PLACE/faces")[0][0] == "Black_Hair"
    assert folder.inventory("~/faces").layout == "a folder of images"
    assert len(ground_truth.folder("~/faces", model, bins=5).factors) == 30
    assert len(ground_truth.attributes("$PLACE/faces", model).factors) == 3
    (home / "x.npz").write_bytes(b"x")
    with pytest.raises(UsageError, match=f"{home}/x.npz is not dSprites' npz"):
        dsprites.read("~/x.npz")

    Path(home, "run.yaml").write_text("data: {root: ~/faces}\n")
    assert config.read("~/run.yaml").config.data.root == home / "faces"
    tiny = {"hidden_dims": (4, 8), "latent_dim": 2, "batch_size": 8, "max_steps": 1, "compile": False}
    options = {**tiny, "image_size": 32, "device": "cpu", "cache_dir": "~/cache"}
    fitted = fit("~/faces", **options)
    assert fitted.config.data.root == home / "faces"
    unexpanded = replace(fitted.config, data=replace(fitted.config.data, root=Path("$PLACE/faces")))
    assert fit("~/faces", unexpanded, out=Path("~/out"), device="cpu").config.data.root == home / "faces"
    assert (home / "out" / "model.safetensors").is_file()
    assert not list(Path().iterdir())


def test_the_sprites_folder(home, monkeypatch):
    monkeypatch.setattr(sprites, "COUNT", 100)
    sprites.all_sprites("~/sprites")
    assert (home / "sprites" / sprites.FILE).is_file()


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ((main, "--data", "folder", "--data-root", "s3://b/a"), "--data-root"),
        ((main, "--out", "s3://b/a"), "--out"),
        ((main, "--cache-dir", "s3://b/a"), "--cache-dir"),
        ((main, "--resume", "s3://b/a"), ""),
        ((main, "--config", "s3://b/a"), ""),
        ((data.main, "check", "s3://b/a"), "DIR"),
        ((data.main, "ls", "--cache-dir", "s3://b/a"), "--cache-dir"),
        ((sample.main, "s3://b/a"), "RUN"),
        ((traverse.main, "run", "--image", "s3://b/a"), "--image"),
        ((sweep.main, "--baselines", "--out", "s3://b/a"), "--out"),
    ],
)
def test_a_url_is_refused_in_every_option(home, capsys, command, option):
    run, *arguments = command
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option} s3://b/a: s3:// is not read here".replace("  ", " "))
    assert len(error.splitlines()) == 1
    assert not list(Path().iterdir())


def test_a_url_in_a_file_is_refused_with_its_key(home, capsys):
    Path("run.yaml").write_text("exp_params: {data_path: 's3://b/a'}")
    assert main(["--config", "run.yaml"]) == 2
    said = "error: run.yaml: exp_params.data_path: s3://b/a: s3:// is not read here: give a path on this "
    assert capsys.readouterr().err == f"{said}machine\n"


def test_a_relative_root_is_absolute_in_config_yaml(home):
    faces.write(Path("faces"), n=30, seed=0, progress=False)
    options = [*NETWORK, "--no-compile", "--max-steps", "1", "--batch-size", "4"]
    assert main(["--data-root", "faces", "--cache-dir", "cache", "--out", "run", *options]) == 0
    written = config.read("run/config.yaml").config.data
    assert (written.root, written.cache_dir) == (Path("faces").absolute(), Path("cache").absolute())


def test_the_option_of_a_path():
    arguments = Arguments(out=Path("runs/a"))
    assert option_of("runs/a/checkpoints/x.tmp", arguments) == "--out"
    assert option_of(Path("runs/a").absolute(), arguments) == "--out"
    assert option_of("runs/b", arguments) is None


def test_an_os_error_names_its_path_and_option(home, capsys):
    Path("file").touch()
    faces.write(Path("faces"), n=30, seed=0, progress=False)
    common = ["--data-root", "faces", *NETWORK, "--no-compile", "--max-steps", "1"]
    assert main([*common, "--cache-dir", "file/cache", "--out", "run"]) == 2
    assert capsys.readouterr().err == "error: [Errno 20] Not a directory (--cache-dir): 'file/cache'\n"


def test_a_user_without_a_home_has_a_cache(home, monkeypatch, capsys):
    def unknown(_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(home))
    say_once.cache_clear()
    folder = home / f"bvae-{os.getuid()}"
    assert default_folder() == default_folder() == folder
    assert capsys.readouterr().err.count(f"caches are in {folder}") == 1
    compiler.caches()
    assert os.environ.pop("TRITON_CACHE_DIR") == str(folder / "triton")
    assert data.main(["ls"]) == 0
    assert not list(Path().iterdir())
