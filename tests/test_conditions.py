"""What "bit for bit" depends on is in each checkpoint, and a resumed run says what has changed."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NETWORK

from bvae.pipelines import faces, sprites, torch_decode
from bvae.train import main
from bvae.training import checkpoint

TINY = [*NETWORK, "--no-compile", *("--log-every", "2", "--device", "cpu", "--decoder", "torchvision")]
OTHER = "not bit for bit as without a stop"


@pytest.fixture
def data(tmp_path):
    return faces.write(tmp_path / "faces", n=60, seed=0, progress=False)


@pytest.fixture
def out(data, tmp_path, capsys):
    """A run of two steps."""
    out = tmp_path / "run"
    assert main(["--data-root", str(data), "--out", str(out), *TINY, "--max-steps", "2"]) == 0
    capsys.readouterr()
    return out


def resume(out, *options):
    return main(["--resume", str(out), "--max-steps", "4", *options])


def state(out):
    return checkpoint.load_newest(out / "checkpoints", torch.device("cpu"))


def test_what_a_checkpoint_says(out):
    found = state(out)
    assert found["conditions"] == {
        "processes": "1",
        "threads": str(torch.get_num_threads()),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
    }
    assert len(found["pixels"]) == 32


def test_nothing_is_said_if_nothing_has_changed(out, capsys):
    assert resume(out) == 0
    assert OTHER not in capsys.readouterr().out


def test_another_number_of_threads(out, capsys):
    torch.set_num_threads(2)
    try:
        assert resume(out) == 0
    finally:
        torch.set_num_threads(1)
    said = [line for line in capsys.readouterr().out.splitlines() if OTHER in line]
    assert said == [f"trained so far with threads 1, now with threads 2: {OTHER}"]


def test_another_instruction_set(out, monkeypatch, capsys):
    here = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert resume(out) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if OTHER in line]
    assert line.startswith("trained so far with ")
    assert f"instruction set {here}, now with " in line
    assert line.endswith(f"instruction set DEFAULT: {OTHER}")  # the layers in C++ are none for it


def test_another_version_of_the_decoder_of_streamed_images(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "streamed"
    options = ["--data-root", str(data), "--out", str(out), *TINY, "--stream"]
    assert main([*options, "--max-steps", "2"]) == 0
    assert state(out)["conditions"]["decoder"] == torch_decode.TorchDecoder.version
    assert state(out)["pixels"] == ""
    monkeypatch.setattr(torch_decode.TorchDecoder, "version", "torchvision 9")
    assert resume(out) == 0
    assert f"now with decoder torchvision 9: {OTHER}" in capsys.readouterr().out


def change(data):
    """Another picture under the name of a training image."""
    path = data / "img_align_celeba" / "000001.jpg"
    Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path, quality=100)


def test_other_pixels_under_the_same_names_are_refused(data, out, capsys):
    change(data)
    assert resume(out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the images have the same names as at the checkpoint and other pixels" in line
    assert line.endswith("continue with these: --accept-changed-images")
    assert resume(out, "--accept-changed-images") == 0
    assert f"other pixels than at the checkpoint: {OTHER}" in capsys.readouterr().out
    assert main(["--resume", str(out), "--max-steps", "5"]) == 0  # they are now the run's
    assert OTHER not in capsys.readouterr().out


def test_the_same_pixels_in_other_files_go_on(data, out, tmp_path, capsys):
    """Copied, and decoded again into another cache."""
    shutil.copytree(data, tmp_path / "copied")
    assert resume(out, "--data-root", str(tmp_path / "copied"), "--cache-dir", str(tmp_path / "cache")) == 0
    assert OTHER not in capsys.readouterr().out


def test_other_pixels_of_2d_shapes_are_refused(tmp_path, capsys):
    indices = 3 * torch.from_numpy(np.indices((1, 2, 3, 3, 3)).reshape(5, -1).T.repeat(3, 0))
    images = sprites.render(indices).numpy()
    classes = np.column_stack([np.zeros(len(indices), np.int64), indices.numpy()])
    np.savez(tmp_path / "d.npz", imgs=images, latents_classes=classes)
    options = ["--data", "dsprites", "--data-root", str(tmp_path / "d.npz"), "--config", "burgess_sprites"]
    options += ["--out", str(tmp_path / "run"), "--batch-size", "16", "--no-compile", "--device", "cpu"]
    assert main([*options, "--max-steps", "2"]) == 0
    np.savez(tmp_path / "d.npz", imgs=images[::-1], latents_classes=classes)
    assert resume(tmp_path / "run") == 2
    assert "other pixels" in capsys.readouterr().err


def test_checkpoints_from_before_these_were_recorded_resume(out, capsys):
    path = checkpoint.checkpoints(out / "checkpoints")[-1]
    found = state(out)
    for name in ("conditions", "pixels", "due"):
        del found[name]
    torch.save(found, path)
    assert resume(out) == 0
    assert OTHER not in capsys.readouterr().out
