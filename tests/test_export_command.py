"""`python -m bvae.export`: what the files compute, hold and refuse."""

import contextlib
import json
import sys

import pytest
import torch
from test_imports import python
from torch import nn

from bvae import BetaVAE, exporting
from bvae.architectures import ARCHITECTURES, Network, register_architecture
from bvae.export import main

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FILES = ("encoder.onnx", "encoder.pt2", "decoder.onnx", "decoder.pt2")


def trained_like() -> BetaVAE:
    """BatchNorm's statistics and the codes are not those of a new network."""
    torch.manual_seed(0)
    model = BetaVAE(latent_dim=4, hidden_dims=(4, 8), image_size=32)
    with torch.no_grad():
        model.head.weight *= 20
        for _ in range(3):
            model(torch.rand(8, 3, 32, 32))
    return model.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trained_like().save_pretrained(folder)
    with open(folder / "printed", "w") as file, contextlib.redirect_stdout(file):
        assert main([str(folder)]) == 0
    return folder


def outputs(path, x):
    """What a file of either format computes from x, and its metadata."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        return [torch.from_numpy(each) for each in found], session.get_modelmeta().custom_metadata_map
    extra = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra)
    found = program.module()(x)
    return list(found) if isinstance(found, tuple) else [found], json.loads(extra["metadata.json"])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("batch", [1, 5])
def test_a_file_computes_what_the_model_does(run, file, batch):
    model = BetaVAE.from_pretrained(run)
    if file.startswith("encoder"):
        x = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8)
        expected = model.encode(x)
    else:
        x = torch.randn(batch, 4)
        expected = (model.decode(x),)
    found, metadata = outputs(run / "export" / file, x)
    assert len(found) == len(expected)
    for ours, own in zip(found, expected, strict=True):
        assert own.std() > 0.01
        torch.testing.assert_close(ours, own.detach(), rtol=1e-6, atol=1e-6)
    assert BetaVAE(**json.loads(metadata["config"])).config == model.config
    assert metadata["pixel_range"] == "[-1, 1]"
    assert metadata["part"] == file.partition(".")[0]


def test_names_and_the_table(run):
    session = onnxruntime.InferenceSession(run / "export" / "encoder.onnx")
    assert [(each.name, each.shape) for each in session.get_inputs()] == [("images", ["batch", 3, 32, 32])]
    assert [each.name for each in session.get_outputs()] == ["mu", "log_var"]
    printed = (run / "printed").read_text()
    assert "| encoder.onnx | 0.0 MB | images uint8 [batch, 3, 32, 32] | mu, log_var [batch, 4] |" in printed
    assert printed.endswith(f"results: {run / 'export'}/\n")
    assert sorted(path.name for path in (run / "export").iterdir()) == sorted(FILES)


def test_a_part_holds_its_own_weights_only(run):
    names = torch.export.load(run / "export" / "encoder.pt2").state_dict
    assert {name.partition(".")[0] for name in names} == {"encoder", "head"}


@pytest.mark.slow
def test_float_images(tmp_path):
    model = BetaVAE(1, latent_dim=2, image_size=32, activation="sigmoid", arch="burgess").eval()
    exporting.export(model, tmp_path, images="float")
    x = torch.rand(3, 1, 32, 32)
    (mu, _), metadata = outputs(tmp_path / "encoder.onnx", x)
    torch.testing.assert_close(mu, model.encode(x)[0].detach(), rtol=1e-6, atol=1e-6)
    assert metadata["input"] == "images float32 [batch, 1, 32, 32]"
    assert metadata["pixel_range"] == "[0, 1]"


# --- What is refused --------------------------------------------------------------------------------------
class Peeks(nn.Module):
    """Its graph depends on the data, which torch cannot export."""

    def forward(self, x):
        return x.flatten(1) * (2 if x.sum() > 0 else 1)


class Noisy(nn.Module):
    def forward(self, x):
        return x.flatten(1) + torch.rand(1)


def own_network(encoder):
    def build(channels, size, latent_dim, widths):
        pixels = channels * size * size
        decoder = nn.Unflatten(1, (channels, size, size))
        head, back = nn.Linear(pixels, 2 * latent_dim), nn.Linear(latent_dim, pixels)
        return Network(encoder(), head, back, (pixels,), decoder)

    return build


@pytest.fixture
def registered(monkeypatch):
    """Networks that a test registers are gone after it."""
    monkeypatch.setitem(ARCHITECTURES, "mine", None)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (Peeks, "error: arch mine cannot be exported as encoder.onnx: "),
        (Noisy, "error: encoder.onnx differs from the model by "),
    ],
)
def test_a_network_that_cannot_be_exported_is_one_line(encoder, message, registered, tmp_path, capsys):
    register_architecture("mine", own_network(encoder))
    BetaVAE(1, latent_dim=2, image_size=32, arch="mine").save_pretrained(tmp_path)
    assert main([str(tmp_path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "exporting" not in line]
    assert line.startswith(message)
    assert list((tmp_path / "export").iterdir()) == []


def test_a_network_that_is_not_registered_is_one_line(tmp_path, capsys):
    BetaVAE(latent_dim=2, hidden_dims=(4,), image_size=32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "arch": "mine"}))
    assert main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: {tmp_path / 'config.json'} does not describe a BetaVAE: arch must be one of "
    )
    assert line.endswith("(--import MODULE)")


@pytest.mark.slow
def test_a_module_that_registers_a_network(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "from bvae import register_architecture\n"
        "from bvae.architectures import Network\n"
        "def linear(channels, size, latent_dim, widths):\n"
        "    n = channels * size * size\n"
        "    head, back = nn.Linear(n, 2 * latent_dim), nn.Linear(latent_dim, n)\n"
        "    return Network(nn.Flatten(), head, back, (n,), nn.Unflatten(1, (channels, size, size)))\n"
        "register_architecture('linear', linear)\n"
    )
    said = python(
        f"import os; os.chdir({str(tmp_path)!r}); import mine; from bvae import BetaVAE\n"
        "from bvae.export import main\n"
        "BetaVAE(1, latent_dim=2, image_size=32, arch='linear').save_pretrained('run')\n"
        "main(['run', '--import', 'mine'])"
    )
    assert said.splitlines()[-1] == "results: run/export/"


def test_a_missing_package_is_one_line(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main([str(run)]) == 2
    assert capsys.readouterr().err.endswith("needs onnxscript: pip install 'bvae[export]'\n")
