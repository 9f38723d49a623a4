"""The network: shapes, sizes, saving, and PyTorch-VAE's checkpoints."""

import json
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from bvae.compat.pytorch_vae_weights import export_state
from bvae.errors import UsageError
from bvae.model import BetaVAE
from bvae.training import checkpoint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["model", "checkpoint", "best", "theirs"])
def test_weights_that_are_not_finite_are_refused(tmp_path, value, kind):
    model = BetaVAE(latent_dim=2, hidden_dims=(4, 8), image_size=32)
    with torch.no_grad():
        model.decoder_input.weight[3, 1] = value
    model.save_pretrained(tmp_path)
    source, load = tmp_path, BetaVAE.from_pretrained
    if kind == "theirs":
        source, load = tmp_path / "theirs.ckpt", BetaVAE.from_pytorch_vae
        torch.save(export_state(model.state_dict()), source)
    elif kind != "model":
        (tmp_path / "model.safetensors").unlink()
        checkpoint.save(tmp_path / "checkpoints", 3, {"step": 3, "model": model.state_dict()})
        checkpoint.mark_best(tmp_path / "checkpoints", 3, 1.0)
        load = partial(BetaVAE.from_pretrained, which="best" if kind == "best" else "last")
    with pytest.raises(UsageError, match=f"^{source}.*: decoder_input.weight is NaN or infinite"):
        load(source)


class PyTorchVAE(nn.Module):
    """PyTorch-VAE's network as reference.md's table of its layers states it, under its parameter names."""

    def __init__(self, channels=3, latent_dim=128, hidden_dims=(32, 64, 128, 256, 512)):
        super().__init__()
        stages, width = [], channels
        for out in hidden_dims:
            stages.append(
                nn.Sequential(nn.Conv2d(width, out, 3, 2, 1), nn.BatchNorm2d(out), nn.LeakyReLU(0.01))
            )
            width = out
        self.encoder = nn.Sequential(*stages)
        self.fc_mu, self.fc_var = nn.Linear(4 * width, latent_dim), nn.Linear(4 * width, latent_dim)
        self.decoder_input = nn.Linear(latent_dim, 4 * width)
        backwards = hidden_dims[::-1]
        self.decoder = nn.Sequential(*(self.up(a, b) for a, b in pairwise(backwards)))
        self.final_layer = nn.Sequential(
            *self.up(hidden_dims[0], hidden_dims[0]),
            nn.Conv2d(hidden_dims[0], channels, 3, padding=1),
            nn.Tanh(),
        )
        self.width = width

    @staticmethod
    def up(a, b):
        return nn.Sequential(
            nn.ConvTranspose2d(a, b, 3, 2, 1, output_padding=1), nn.BatchNorm2d(b), nn.LeakyReLU(0.01)
        )

    def encode(self, x):
        h = self.encoder(x).flatten(1)
        return self.fc_mu(h), self.fc_var(h)

    def decode(self, z):
        return self.final_layer(self.decoder(self.decoder_input(z).view(-1, self.width, 2, 2)))


def trained_baseline(**kwargs):
    """Weights with every part away from its initial value: biases and running statistics too."""
    torch.manual_seed(0)
    baseline = PyTorchVAE(**kwargs)
    for parameter in baseline.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for module in baseline.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(7)
    return baseline.eval()


def test_parameters_are_pytorch_vaes_less_the_dead_biases():
    dead = sum(module.bias.numel() for module in _before_batchnorm(PyTorchVAE()))
    assert sum(p.numel() for p in PyTorchVAE().parameters()) == 3_937_635
    assert sum(p.numel() for p in BetaVAE().parameters()) == 3_937_635 - dead


def _before_batchnorm(baseline):
    for block in [*baseline.encoder, *baseline.decoder, baseline.final_layer]:
        yield block[0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 50, 64, 96, 127, 256])
def test_any_size_and_channels(channels, size):
    widths = [4, 6, 8]
    model = BetaVAE(channels, 5, widths, size).eval()
    x = torch.rand(2, channels, size, size) * 2 - 1
    out = model(x)
    assert out.recon.shape == x.shape
    assert out.input is x
    assert out.mu.shape == out.log_var.shape == (2, 5)
    assert out.recon.abs().max() <= 1
    assert model.sample(3).shape == (3, channels, size, size)
    assert widths == [4, 6, 8]


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_any_depth(depth):
    model = BetaVAE(3, 2, [4] * depth, 32)
    assert model(torch.zeros(2, 3, 32, 32)).recon.shape == (2, 3, 32, 32)


def test_sigmoid_gives_probabilities():
    recon = BetaVAE(1, 2, [4, 8], 32, activation="sigmoid").eval().sample(4)
    assert recon.min() >= 0
    assert recon.max() <= 1


def test_decoders_gradient_reaches_the_encoder():
    model = BetaVAE(3, 4, [4, 8], 32)
    model(torch.rand(2, 3, 32, 32)).recon.sum().backward()
    assert model.encoder[0][0].weight.grad.abs().sum() > 0


def test_reconstruct_decodes_the_posterior_mean():
    model = BetaVAE(3, 4, [4, 8], 32).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.reconstruct(x), model.decode(model.encode(x)[0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ({"in_channels": 4}, "in_channels must be 1 .* got 4"),
        ({"hidden_dims": []}, "hidden_dims must be 1 to 64 positive widths"),
        ({"hidden_dims": [8, 0]}, "hidden_dims must be 1 to 64 positive widths"),
        ({"image_size": 16}, "image_size must be 32 to 256 pixels, got 16"),
        ({"activation": "relu"}, "activation must be one of tanh, sigmoid"),
        ({"arch": "resnet"}, "arch must be one of pytorch-vae, burgess, .* got 'resnet'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BetaVAE(**arguments)


def test_wrong_input_shape_is_named():
    with pytest.raises(ValueError, match=r"x must be \[N, 3, 64, 64\], got \[2, 64, 64, 3\]"):
        BetaVAE(hidden_dims=[4])(torch.zeros(2, 64, 64, 3))


def test_pretrained_round_trip(tmp_path):
    model = BetaVAE(1, 3, [4, 8], 40, activation="sigmoid").eval()
    model.save_pretrained(tmp_path / "new")
    again = BetaVAE.from_pretrained(tmp_path / "new")
    x = torch.rand(2, 1, 40, 40)
    assert torch.equal(model.reconstruct(x), again.reconstruct(x))
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        BetaVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("arch", ["burgess", "higgins-fc", "locatello"])
def test_every_architecture_is_saved_and_loaded(tmp_path, arch):
    model = BetaVAE(1, 3, image_size=32, arch=arch).eval()
    model.save_pretrained(tmp_path)
    x = torch.rand(2, 1, 32, 32)
    assert torch.equal(BetaVAE.from_pretrained(tmp_path).reconstruct(x), model.reconstruct(x))


def test_folders_from_before_there_were_architectures(tmp_path):
    model = BetaVAE(1, 3, [4, 8], 40).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("arch") == "pytorch-vae"
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.rand(2, 1, 40, 40)
    assert torch.equal(BetaVAE.from_pretrained(tmp_path).reconstruct(x), model.reconstruct(x))


@pytest.mark.parametrize("form", ["bare", "lightning"])
def test_pytorch_vae_checkpoint_gives_the_same_outputs(tmp_path, form):
    baseline = trained_baseline(latent_dim=12, hidden_dims=(8, 16, 24, 32, 40))
    state = baseline.state_dict()
    if form == "lightning":
        state = {"epoch": 3, "state_dict": {f"model.{name}": value for name, value in state.items()}}
    torch.save(state, tmp_path / "last.ckpt")
    model = BetaVAE.from_pytorch_vae(tmp_path / "last.ckpt")
    x = torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        for ours, theirs in zip(model.encode(x), baseline.encode(x), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        z = torch.randn(3, 12)
        torch.testing.assert_close(model.decode(z), baseline.decode(z), atol=1e-5, rtol=0)


def test_pytorch_vae_export_gives_the_same_outputs():
    torch.manual_seed(0)
    model = BetaVAE(1, 12, (8, 16, 24, 32, 40))
    model(torch.rand(8, 1, 64, 64))  # moves the running statistics
    baseline = PyTorchVAE(1, 12, (8, 16, 24, 32, 40))
    baseline.load_state_dict(export_state(model.state_dict()))
    model.eval(), baseline.eval()
    x = torch.rand(3, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            model.reconstruct(x), baseline.decode(baseline.encode(x)[0]), atol=1e-5, rtol=0
        )
