"""The networks by name: their sizes, counted by hand, and what they take."""

import pytest
import torch

from bvae.architectures import ARCHITECTURES
from bvae.model import BetaVAE

PAPERS = [name for name in ARCHITECTURES if name != "pytorch-vae"]


def conv(a, b, side):
    return a * b * side**2 + b


def dense(a, b):
    return a * b + b


def counted_by_hand(arch, channels, latents):
    """Weights and biases at 64 x 64, layer by layer, as the papers state the networks."""
    pixels = channels * 64 * 64
    return sum(
        {
            "burgess": [
                *(conv(channels, 32, 4), 3 * conv(32, 32, 4), dense(512, 256), dense(256, 256)),
                dense(256, 2 * latents),
                *(dense(latents, 256), dense(256, 256), dense(256, 512)),
                *(3 * conv(32, 32, 4), conv(32, channels, 4)),
            ],
            "higgins-fc": [
                *(dense(pixels, 1200), dense(1200, 1200), dense(1200, 2 * latents)),
                *(dense(latents, 1200), 2 * dense(1200, 1200), dense(1200, pixels)),
            ],
            "locatello": [
                *(conv(channels, 32, 4), conv(32, 32, 4), conv(32, 64, 2), conv(64, 64, 2)),
                *(dense(1024, 256), dense(256, 2 * latents)),
                *(dense(latents, 256), dense(256, 1024)),
                *(conv(64, 64, 4), conv(64, 32, 4), conv(32, 32, 4), conv(32, channels, 4)),
            ],
        }[arch]
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("arch", PAPERS)
def test_parameters(arch, channels):
    model = BetaVAE(channels, 10, arch=arch)
    assert sum(p.numel() for p in model.parameters()) == counted_by_hand(arch, channels, 10)


def test_parameters_that_the_documentation_states():
    counts = {arch: counted_by_hand(arch, 1, 10) for arch in PAPERS}
    assert counts == {"burgess": 502_005, "higgins-fc": 14_196_516, "locatello": 690_517}
    for arch, count in counts.items():
        assert f"{count:,} parameters".replace(",", " ") in ARCHITECTURES[arch].__doc__


@pytest.mark.parametrize("size", [32, 48, 64, 128])
@pytest.mark.parametrize("arch", PAPERS)
def test_images_go_in_and_come_out(arch, size):
    torch.manual_seed(0)
    model = BetaVAE(1, 4, image_size=size, activation="sigmoid", arch=arch)
    x = torch.rand(2, 1, size, size)
    out = model(x)
    assert out.recon.shape == x.shape
    assert out.mu.shape == out.log_var.shape == (2, 4)
    assert 0 <= out.recon.min() <= out.recon.max() <= 1
    out.recon.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("arch", PAPERS)
def test_memory_formats_give_the_same(arch):
    torch.manual_seed(0)
    model = BetaVAE(3, 4, image_size=32, arch=arch).eval()
    x = torch.rand(2, 3, 32, 32)
    expected = model.reconstruct(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model.reconstruct(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("arch", ["burgess", "locatello"])
def test_sizes_that_they_cannot_take(arch):
    with pytest.raises(ValueError, match=f"arch {arch} takes images whose side is a multiple of 16.*got 50"):
        BetaVAE(1, 4, image_size=50, arch=arch)
    assert BetaVAE(1, 4, image_size=50, arch="higgins-fc").sample(2).shape == (2, 1, 50, 50)
