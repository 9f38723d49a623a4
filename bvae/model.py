"""BetaVAE: the convolutional encoder, the two Gaussian heads and the decoder of PyTorch-VAE's BetaVAE,
for any image size, any number of channels and any widths."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bvae import pytorch_vae
from bvae.batch_norm import BatchNorm2d
from bvae.config import Config
from bvae.ops import reparam_kl

ACTIVATIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}


class VAEOutput(NamedTuple):
    """What `BetaVAE.forward` returns, in the order of PyTorch-VAE's list."""

    recon: Tensor  # [N, C, H, W], in the range of the decoder's activation
    input: Tensor  # [N, C, H, W]
    mu: Tensor  # [N, latent_dim]
    log_var: Tensor  # [N, latent_dim]


class BetaVAE(nn.Module):
    """The network of the seed (PyTorch-VAE, `BetaVAE`), 3 937 635 parameters there with its dead biases.

    Encoder: one [conv 3x3 stride 2, BatchNorm, LeakyReLU] per entry of `hidden_dims`; one linear layer gives
    mu and log_var. Decoder: the mirror image with transposed convolutions, then a 3x3 convolution to
    `in_channels` and the activation.

    Args:
        in_channels: channels of the image, 1 (grey) or 3 (RGB).
        latent_dim: dimensions of z.
        hidden_dims: channels of the encoder's stages, first to last; the decoder runs them backwards.
        image_size: height and width in pixels, 32 to 256.
        activation: range of the images: "tanh" is [-1, 1], "sigmoid" [0, 1] (a Bernoulli's mean).

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        in_channels: int = 3,
        latent_dim: int = 128,
        hidden_dims: Sequence[int] = (32, 64, 128, 256, 512),
        image_size: int = 64,
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        widths = tuple(hidden_dims)
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 (grey) or 3 (RGB), got {in_channels}")
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}")
        if not widths or min(widths) < 1:
            raise ValueError(f"hidden_dims must be one or more positive widths, got {list(widths)}")
        if not 32 <= image_size <= 256:
            raise ValueError(f"image_size must be 32 to 256 pixels, got {image_size}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.config = {
            "in_channels": in_channels,
            "latent_dim": latent_dim,
            "hidden_dims": list(widths),
            "image_size": image_size,
            "activation": activation,
        }
        self.latent_dim = latent_dim
        self.activation = activation
        self.input_shape = (in_channels, image_size, image_size)

        # Each stage halves the size, rounding up; the decoder goes back through the same sizes.
        sizes = [image_size]
        for _ in widths:
            sizes.append((sizes[-1] + 1) // 2)
        self.code_shape = (widths[-1], sizes[-1], sizes[-1])
        code = widths[-1] * sizes[-1] ** 2

        self.encoder = nn.Sequential(
            *(_down(a, b) for a, b in zip((in_channels, *widths), widths, strict=False)),
        )
        self.head = nn.Linear(code, 2 * latent_dim)  # mu and log_var in one matrix product
        self.decoder_input = nn.Linear(latent_dim, code)
        self.decoder = nn.Sequential(
            *(
                _up(widths[i], widths[max(i - 1, 0)], sizes[i + 1], sizes[i])
                for i in reversed(range(len(widths)))
            ),
            nn.Conv2d(widths[0], in_channels, 3, padding=1),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [N, C, H, W] in the activation's range to mu and log_var, each [N, latent_dim]."""
        if x.dim() != 4 or x.shape[1:] != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ValueError(f"x must be [N, {expected}], got {list(x.shape)}")
        mu, log_var = self.head(self.encoder(x).flatten(1)).chunk(2, dim=1)
        return mu, log_var

    def reparameterize(self, mu: Tensor, log_var: Tensor) -> Tensor:
        """z = mu + exp(log_var / 2) * eps, eps ~ N(0, I) (Kingma & Welling 2014); z like mu."""
        return reparam_kl(mu, log_var)[0]

    def decode_raw(self, z: Tensor) -> Tensor:
        """z [N, latent_dim] to images before the activation: what the fused losses take."""
        return self.decoder(self.decoder_input(z).view(-1, *self.code_shape))

    def decode(self, z: Tensor) -> Tensor:
        """z [N, latent_dim] to images [N, C, H, W] in the activation's range."""
        return ACTIVATIONS[self.activation](self.decode_raw(z))

    def forward(self, x: Tensor) -> VAEOutput:
        """Encode, draw z, decode."""
        mu, log_var = self.encode(x)
        return VAEOutput(self.decode(self.reparameterize(mu, log_var)), x, mu, log_var)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n images [n, C, H, W] from the prior z ~ N(0, I)."""
        device = self.head.weight.device
        return self.decode(torch.randn(n, self.latent_dim, generator=generator, device=device))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Decode the posterior mean of x [N, C, H, W]."""
        return self.decode(self.encode(x)[0])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        (folder / "model.safetensors").write_bytes(save(weights))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "BetaVAE":
        """The model that `save_pretrained` (or a training run) left in a folder, in evaluation mode.

        Raises:
            FileNotFoundError: the folder lacks `config.json` or `model.safetensors`.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}: it is not a folder of a saved model")
        model = cls(**json.loads((folder / "config.json").read_text()))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()

    @classmethod
    def from_pytorch_vae(cls, path: str | Path) -> "BetaVAE":
        """A checkpoint of PyTorch-VAE's BetaVAE or VanillaVAE, in evaluation mode, with the same outputs.

        Takes a bare state dict or a Lightning checkpoint, read with `weights_only`, so that no pickled code
        in it runs. The sizes are read off the weights.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not such a checkpoint.
        """
        config, state = pytorch_vae.load(path)
        model = cls(**config)
        model.load_state_dict(state)
        return model.eval()


def build(config: Config) -> BetaVAE:
    """The untrained model of a configuration; its weights come from torch's generator."""
    return BetaVAE(
        config.data.channels,
        config.model.latent_dim,
        config.model.hidden_dims,
        config.data.image_size,
        "tanh" if config.objective.likelihood == "gaussian" else "sigmoid",
    )


def _down(in_channels: int, out_channels: int) -> nn.Sequential:
    # No bias: BatchNorm subtracts it again, so its gradient is zero, yet it would cost a pass over the layer.
    # In place: BatchNorm keeps its input for the backward pass, not its output. 1.06 times faster on a CPU.
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
        BatchNorm2d(out_channels),
        nn.LeakyReLU(0.01, inplace=True),
    )


def _up(in_channels: int, out_channels: int, size: int, new_size: int) -> nn.Sequential:
    output_padding = new_size - (2 * size - 1)  # 1 doubles the size; 0 goes back to an odd one
    return nn.Sequential(
        nn.ConvTranspose2d(
            in_channels, out_channels, 3, stride=2, padding=1, output_padding=output_padding, bias=False
        ),
        BatchNorm2d(out_channels),
        nn.LeakyReLU(0.01, inplace=True),
    )
