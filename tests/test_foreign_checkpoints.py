"""Checkpoints of others: found in any wrapper, without running what is pickled, or refused in words."""

import argparse
import pathlib
import pickle

import numpy as np
import pytest
import torch

from bvae.compat.pytorch_vae_weights import export_state
from bvae.errors import UsageError
from bvae.model import BetaVAE


class Module(torch.nn.Module):
    """A network of somebody else's."""

    def __init__(self):
        super().__init__()
        self.fc_mu = torch.nn.Linear(3, 2)


class AttributeDict(dict):
    pass


class Hostile:
    """Unpickled by torch or pickle, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.fixture
def ours():
    torch.manual_seed(0)
    return BetaVAE(latent_dim=3, hidden_dims=(4, 8), image_size=32).eval()


@pytest.fixture
def state(ours):
    return export_state(ours.state_dict())


def assert_read(path, ours):
    model = BetaVAE.from_pytorch_vae(path)
    z = torch.randn(2, 3)
    assert torch.equal(model.decode(z), ours.decode(z))


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


WRAPPERS = {
    "bare": lambda state: state,
    "model.": lambda state: {"state_dict": prefixed(state, "model."), "epoch": 3},
    "torch.compile": lambda state: prefixed(state, "_orig_mod."),
    "DataParallel": lambda state: prefixed(state, "module."),
    "several prefixes": lambda state: {"state_dict": prefixed(state, "model._orig_mod.vae.")},
    "compiled part": lambda state: {k.replace("encoder.", "encoder._orig_mod."): v for k, v in state.items()},
    "in model": lambda state: {"model": state, "optimizer": {}},
    "model_state_dict": lambda state: {"epoch": 1, "model_state_dict": state},
    "deep": lambda state: {"a": {"networks": {"vae": prefixed(state, "net.")}}},
    "beside others": lambda state: {**prefixed(state, "vae."), "classifier.weight": torch.zeros(2)},
    "parameters": lambda state: {
        k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()
    },
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_weights_are_found_in_any_wrapper(tmp_path, ours, state, wrapper, zipped):
    torch.save(WRAPPERS[wrapper](state), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert_read(tmp_path / "x.pt", ours)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_extras_are_passed_over_and_not_run(tmp_path, ours, state, zipped):
    victim = tmp_path / "made"
    extras = {
        "best": np.float64(0.5),
        "history": np.arange(3),
        "args": argparse.Namespace(lr=1e-3),
        "hyper_parameters": AttributeDict(lr=1),
        "path": pathlib.Path("a"),
        "callbacks": {Module: {"monitor": "loss"}},
        "set": {1, 2},
        "hostile": Hostile(victim),
        "state_dict": state,
    }
    torch.save(extras, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    assert_read(tmp_path / "x.ckpt", ours)
    assert not victim.exists()
    torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert victim.exists()  # the file was a hostile one indeed


@pytest.mark.parametrize(
    "call",
    [
        b"cbuiltins\neval\n(V__import__('pathlib').Path(PATH).touch()\ntR.",
        b"cos\nsystem\n(Vtouch PATH\ntR.",
        b"(Vtouch PATH\nios\nsystem\n.",
        b"ctorch.storage\n_load_from_bytes\n(VPATH\ntR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}V__code__\nV1\nsb.",
    ],
)
def test_calls_by_hand_do_nothing(tmp_path, call):
    victim = tmp_path / "made"
    pickled = call.replace(b"PATH", repr(str(victim)).encode())
    for write in (lambda f: f.write(pickled), lambda f: f.write(pickle.dumps(1) + pickled)):
        with open(tmp_path / "x.pt", "wb") as file:
            write(file)
        with pytest.raises(UsageError, match="is not a file of torch.save, or is damaged"):
            BetaVAE.from_pytorch_vae(tmp_path / "x.pt")
    assert not victim.exists()


def broken(state, value):
    state = {name: tensor.clone() for name, tensor in state.items()}
    state["decoder_input.weight"][0, 0] = value
    return state


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda path, _: path.write_text("\n<!DOCTYPE html><html>quota exceeded"),
            "is a web page, not a checkpoint",
        ),
        (
            lambda path, _: path.write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
            ),
            "is a Git LFS pointer, not the file itself: run git lfs pull",
        ),
        (lambda path, _: path.write_bytes(b""), "is empty"),
        (lambda path, _: path.write_text("hello"), "is not a file of torch.save, or is damaged"),
        (lambda path, _: torch.save(Module(), path), "holds a whole pickled model .*Module.*state_dict"),
        (lambda path, _: torch.save({"model": Module()}, path), "holds a whole pickled model"),
        (lambda path, _: torch.jit.script(torch.nn.Linear(1, 1)).save(path), "is a TorchScript program"),
        (
            lambda path, state: torch.save(broken(state, float("nan")), path),
            "decoder_input.weight is NaN or inf",
        ),
        (
            lambda path, state: torch.save(broken(state, float("inf")), path),
            "decoder_input.weight is NaN or inf",
        ),
        (
            lambda path, _: torch.save({"weight": torch.zeros(2)}, path),
            "is not a PyTorch-VAE BetaVAE checkpoint",
        ),
        (lambda path, _: torch.save({"fc_mu.weight": torch.zeros(2)}, path), "is not a PyTorch-VAE BetaVAE"),
        (lambda path, _: torch.save([1, None], path), "is not a PyTorch-VAE BetaVAE checkpoint"),
    ],
    ids=[
        "page",
        "pointer",
        "empty",
        "text",
        "model",
        "model inside",
        "script",
        "nan",
        "inf",
        "other",
        "part",
        "list",
    ],
)
def test_other_files_are_refused_in_our_words(tmp_path, state, write, message):
    path = tmp_path / "x.ckpt"
    write(path, state)
    with pytest.raises(UsageError, match=message) as refused:
        BetaVAE.from_pytorch_vae(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)
    assert "weights_only" not in str(refused.value)


def test_a_damaged_file_is_named(tmp_path, state):
    torch.save(state, tmp_path / "x.ckpt")
    data = (tmp_path / "x.ckpt").read_bytes()
    for size in (100, len(data) // 2, len(data) - 30):
        (tmp_path / "x.ckpt").write_bytes(data[:size])
        with pytest.raises(UsageError, match="is not a file of torch.save, or is damaged"):
            BetaVAE.from_pytorch_vae(tmp_path / "x.ckpt")


def test_no_file():
    with pytest.raises(FileNotFoundError, match="no checkpoint at absent.ckpt"):
        BetaVAE.from_pytorch_vae("absent.ckpt")
