"""BetaVAE: encoder, Gaussian heads and decoder of any architecture, saved and loaded."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bvae.architectures import ARCHITECTURES, check_size
from bvae.compat import pytorch_vae_weights
from bvae.ops import reparam_kl

if TYPE_CHECKING:
    from bvae.config import Config  # needs PyYAML; a model does not

ACTIVATIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}


class VAEOutput(NamedTuple):
    """What `BetaVAE.forward` returns, in the order of PyTorch-VAE's list."""

    recon: Tensor  # [N, C, H, W], in the range of the decoder's activation
    input: Tensor  # [N, C, H, W]
    mu: Tensor  # [N, latent_dim]
    log_var: Tensor  # [N, latent_dim]


class BetaVAE(nn.Module):
    """A variational autoencoder; by default the seed's network, PyTorch-VAE's `BetaVAE`.

    Args:
        in_channels: channels of the image, 1 (grey) or 3 (RGB).
        latent_dim: dimensions of z.
        hidden_dims: pytorch-vae's alone: channels of the encoder's stages; the decoder runs them backwards.
        image_size: height and width in pixels, 32 to 256.
        activation: range of the images: "tanh" is [-1, 1], "sigmoid" [0, 1] (a Bernoulli's mean).
        arch: a name from `bvae.architectures`.

    Raises:
        ValueError: an argument out of its range.

    >>> import torch
    >>> from bvae import BetaVAE
    >>> model = BetaVAE(latent_dim=10, hidden_dims=(4, 8), image_size=32).eval()
    >>> images = model.sample(5)
    >>> images.shape, bool(images.abs().max() <= 1)
    (torch.Size([5, 3, 32, 32]), True)
    >>> mu, log_var = model.encode(images)
    >>> mu.shape, log_var.shape
    (torch.Size([5, 10]), torch.Size([5, 10]))
    >>> torch.equal(model.decode(mu), model.reconstruct(images))
    True
    >>> recon, images, mu, log_var = model(images)  # as PyTorch-VAE's list
    >>> recon.shape
    torch.Size([5, 3, 32, 32])
    """

    def __init__(
        self,
        in_channels: int = 3,
        latent_dim: int = 128,
        hidden_dims: Sequence[int] = (32, 64, 128, 256, 512),
        image_size: int = 64,
        activation: str = "tanh",
        arch: str = "pytorch-vae",
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
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
        check_size(arch, image_size)
        self.config = {
            "arch": arch,
            "in_channels": in_channels,
            "latent_dim": latent_dim,
            "hidden_dims": list(widths),
            "image_size": image_size,
            "activation": activation,
        }
        self.latent_dim = latent_dim
        self.activation = activation
        self.input_shape = (in_channels, image_size, image_size)
        network = ARCHITECTURES[arch](in_channels, image_size, latent_dim, widths)
        self.encoder, self.head, self.decoder_input, self.code_shape, self.decoder = network

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
        """Write `config.json` and `model.safetensors` into a folder, which is made if need be.

        >>> import tempfile
        >>> from bvae import BetaVAE
        >>> model = BetaVAE(latent_dim=10, hidden_dims=(4, 8), image_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     again = BetaVAE.from_pretrained(folder)
        >>> again.config == model.config
        True
        """
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
            ValueError: one of them is damaged, or they are not of one model.

        >>> import tempfile
        >>> import torch
        >>> from bvae import BetaVAE
        >>> model = BetaVAE(latent_dim=10, hidden_dims=(4, 8), image_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     again = BetaVAE.from_pretrained(folder)
        >>> z = torch.zeros(1, 10)
        >>> torch.equal(again.decode(z), model.eval().decode(z))
        True
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}: it is not a folder of a saved model")
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            model = cls(**config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / 'config.json'} does not describe a BetaVAE: {error}") from None
        try:
            weights = load_file(folder / "model.safetensors")
        except SafetensorError as error:
            raise ValueError(f"{folder / 'model.safetensors'} is damaged: {error}") from None
        if difference := _difference(weights, model.state_dict()):
            raise ValueError(
                f"{folder / 'model.safetensors'} holds another model than the {model.config['arch']} that "
                f"config.json describes: {difference}"
            )
        model.load_state_dict(weights)
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
        config, state = pytorch_vae_weights.load(path)
        model = cls(**config)
        model.load_state_dict(state)
        return model.eval()


def build(config: "Config") -> BetaVAE:
    """The untrained model of a configuration; its weights come from torch's generator."""
    return BetaVAE(
        config.data.channels,
        config.model.latent_dim,
        config.model.hidden_dims,
        config.data.image_size,
        "tanh" if config.objective.likelihood == "gaussian" else "sigmoid",
        config.model.arch,
    )


def _difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """What keeps weights from being loaded; None if nothing does."""
    for name, value in expected.items():
        if name not in found:
            return f"it lacks {name}"
        if found[name].shape != value.shape:
            return f"{name} is {list(found[name].shape)} instead of {list(value.shape)}"
    return next((f"nothing takes its {name}" for name in found if name not in expected), None)
