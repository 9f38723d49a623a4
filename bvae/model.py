"""BetaVAE: encoder, Gaussian heads and decoder of any architecture, saved and loaded."""

import json
import reprlib
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bvae import __version__, files, hub, weights
from bvae.architectures import ARCHITECTURES, STAGES, Network, check_size, is_ours
from bvae.compat import pytorch_vae_weights
from bvae.errors import MissingError, UsageError
from bvae.opening import CONFIG, NotRead, read_text
from bvae.ops import reparam_kl
from bvae.paths import expand
from bvae.reference import scale_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

    from bvae.config import Config  # needs PyYAML; a model does not

ACTIVATIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}
INFOGAN: Final = "infogan"  # the arch of `InfoGAN`, which is no VAE


class VAEOutput(NamedTuple):
    """What `BetaVAE.forward` returns, in the order of PyTorch-VAE's list."""

    recon: Tensor  # [N, C, H, W], in the range of the decoder's activation
    input: Tensor  # [N, C, H, W]
    mu: Tensor  # [N, latent_dim]
    log_var: Tensor  # [N, latent_dim]


class BetaVAE(nn.Module):
    """A variational autoencoder; by default the network of PyTorch-VAE's `BetaVAE`.

    Args:
        in_channels: channels of the image, 1 (grey) or 3 (RGB).
        latent_dim: dimensions of z.
        hidden_dims: for pytorch-vae only: channels of the encoder's stages; the decoder has them in reverse.
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
        numbers = {"in_channels": [in_channels], "latent_dim": [latent_dim], "image_size": [image_size]}
        for name, values in {**numbers, "hidden_dims": widths}.items():
            if not all(isinstance(value, Integral) for value in values):  # such as 4.0 in a JSON file
                raise UsageError(f"{name} takes whole numbers, got {reprlib.repr(list(values))}")
        if in_channels not in (1, 3):
            raise UsageError(f"in_channels must be 1 (grey) or 3 (RGB), got {in_channels}")
        if latent_dim < 1:
            raise UsageError(f"latent_dim must be at least 1, got {latent_dim}")
        if not 1 <= len(widths) <= STAGES or min(widths) < 1:
            shown = reprlib.repr(list(widths))
            raise UsageError(f"hidden_dims must be 1 to {STAGES} positive widths, got {shown}")
        if not 32 <= image_size <= 256:
            raise UsageError(f"image_size must be 32 to 256 pixels, got {image_size}")
        if activation not in ACTIVATIONS:
            raise UsageError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
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
        if not isinstance(network, Network):
            raise UsageError(f"the builder of arch {arch} must return a bvae.architectures.Network")
        self.encoder, self.head, self.decoder_input, self.code_shape, self.decoder = network

    @property
    def pixel_range(self) -> tuple[float, float]:
        """The range of input and output images, to which uint8 pixels are scaled."""
        return (-1.0 if self.activation == "tanh" else 0.0), 1.0

    def scale(self, pixels: Tensor) -> Tensor:
        """uint8 images of any shape to float32 in `pixel_range`.

        >>> model = BetaVAE(latent_dim=10, hidden_dims=(4, 8), image_size=32)
        >>> model.scale(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([-1.,  1.])
        """
        return scale_pixels(pixels, self.pixel_range[0])

    def preprocess(self, images: Any) -> Tensor:
        """Convert pictures to the input of `encode`: `[N, C, H, W]` in `pixel_range`, on the model's device.

        The largest centred square is cropped and resized; grey and RGB are converted to the model's channels.

        Args:
            images: one PIL image or a list of them; an array or tensor `[N, H, W, C]` or `[N, C, H, W]`, or
                one image without N; uint8, or floating point in [0, 1].

        Raises:
            UsageError: another shape or dtype, or values outside [0, 1].

        >>> model = BetaVAE(latent_dim=10, hidden_dims=(4, 8), image_size=32)
        >>> model.preprocess(torch.zeros(5, 40, 60, 3, dtype=torch.uint8)).shape
        torch.Size([5, 3, 32, 32])
        """
        from bvae.pipelines.arrays import collect  # needs Pillow

        shape = getattr(images, "shape", None)  # PIL images have none
        if shape is None:
            one = not isinstance(images, list | tuple)
        else:
            one = len(shape) == 2 or (len(shape) == 3 and (shape[0] in (1, 3) or shape[2] in (1, 3)))
        pixels = collect([images] if one else images, self.input_shape[1], self.input_shape[0])
        return self.scale(pixels.permute(0, 3, 1, 2).to(self.head.weight.device))

    def to_images(self, x: Tensor) -> "list[Image]":
        """Images `[N, C, H, W]` in `pixel_range`, such as the output of `decode`, as PIL images (RGB).

        >>> model = BetaVAE(latent_dim=10, hidden_dims=(4, 8), image_size=32)
        >>> model.to_images(model.sample(2))[0].size
        (32, 32)
        """
        from PIL import Image

        from bvae.images import to_uint8

        if x.dim() != 4:
            raise UsageError(f"x must be [N, C, H, W], got {list(x.shape)}")
        return [Image.fromarray(image.numpy()) for image in to_uint8(x, self.pixel_range)]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images to the posterior's mu and log_var, each `[N, latent_dim]`.

        Args:
            x: `[N, C, H, W]`, uint8, or floating point in `pixel_range`.

        Raises:
            UsageError: another shape, or pixels out of that range. The range is checked on a CPU only; on a
                GPU the check would make the host wait.

        >>> model = BetaVAE(latent_dim=10, hidden_dims=(4, 8), image_size=32)
        >>> mu, log_var = model.encode(torch.zeros(5, 3, 32, 32, dtype=torch.uint8))
        >>> mu.shape
        torch.Size([5, 10])
        """
        if not isinstance(x, Tensor):
            raise UsageError(f"x must be a tensor, got {type(x).__name__}: model.preprocess(x) makes one")
        if x.dim() != 4 or x.shape[1:] != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise UsageError(f"x must be [N, {expected}], got {list(x.shape)}: see model.preprocess")
        if x.dtype == torch.uint8:
            x = self.scale(x)
        elif x.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_range(x)
        return self.encode_scaled(x.to(self.head.weight.dtype) if x.dtype == torch.float64 else x)

    def encode_scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`encode` without its checks, for images that are known to be floating point in `pixel_range`."""
        mu, log_var = self.head(self.encoder(x).flatten(1)).chunk(2, dim=1)
        return mu, log_var

    def _check_range(self, x: Tensor) -> None:
        (low, high), (least, most) = self.pixel_range, (bound.item() for bound in torch.aminmax(x.detach()))
        margin = 0.1 * (high - low)  # resizing and noise may add this much
        if not (low - margin <= least and most <= high + margin):  # NaN too
            raise UsageError(
                f"x must lie in [{low:g}, {high:g}], got {least:.4g} to {most:.4g}: give uint8 pixels, or "
                "model.preprocess(x) of images in [0, 1]"
            )

    def reparameterize(self, mu: Tensor, log_var: Tensor) -> Tensor:
        """z = mu + exp(log_var / 2) * eps, eps ~ N(0, I) (Kingma & Welling 2014); z like mu.

        >>> model = BetaVAE(latent_dim=10, hidden_dims=(4, 8), image_size=32)
        >>> model.reparameterize(torch.zeros(5, 10), torch.zeros(5, 10)).shape
        torch.Size([5, 10])
        """
        return reparam_kl(mu, log_var)[0]

    def decode_raw(self, z: Tensor) -> Tensor:
        """z [N, latent_dim] to images before the activation, the input of the fused losses.

        >>> model = BetaVAE(latent_dim=10, hidden_dims=(4, 8), image_size=32)
        >>> model.decode_raw(torch.zeros(5, 10)).shape
        torch.Size([5, 3, 32, 32])
        """
        return self.decoder(self.decoder_input(z).view(-1, *self.code_shape))

    def decode(self, z: Tensor) -> Tensor:
        """z [N, latent_dim] to images [N, C, H, W] in the activation's range.

        >>> model = BetaVAE(latent_dim=10, hidden_dims=(4, 8), image_size=32)
        >>> model.decode(torch.zeros(5, 10)).shape
        torch.Size([5, 3, 32, 32])
        """
        return self.activate(self.decode_raw(z))

    def activate(self, raw: Tensor) -> Tensor:
        """The output of `decode_raw` to images in `pixel_range`."""
        return ACTIVATIONS[self.activation](raw)

    def forward(self, x: Tensor) -> VAEOutput:
        """Encode, draw z, decode.

        >>> model = BetaVAE(latent_dim=10, hidden_dims=(4, 8), image_size=32)
        >>> recon, x, mu, log_var = model(torch.zeros(5, 3, 32, 32))
        >>> recon.shape
        torch.Size([5, 3, 32, 32])
        """
        mu, log_var = self.encode(x)
        return VAEOutput(self.decode(self.reparameterize(mu, log_var)), x, mu, log_var)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n images [n, C, H, W] from the prior z ~ N(0, I).

        >>> model = BetaVAE(latent_dim=10, hidden_dims=(4, 8), image_size=32)
        >>> model.sample(4).shape
        torch.Size([4, 3, 32, 32])
        """
        device = self.head.weight.device
        return self.decode(torch.randn(n, self.latent_dim, generator=generator, device=device))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Decode the posterior mean of x [N, C, H, W].

        >>> model = BetaVAE(latent_dim=10, hidden_dims=(4, 8), image_size=32)
        >>> model.reconstruct(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 3, 32, 32])
        """
        return self.decode(self.encode(x)[0])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder, which is created if needed.

        >>> import tempfile
        >>> from bvae import BetaVAE
        >>> model = BetaVAE(latent_dim=10, hidden_dims=(4, 8), image_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     again = BetaVAE.from_pretrained(folder)
        >>> again.config == model.config
        True
        """
        folder = expand(folder)
        self.save_config(folder)
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        # "format" is what other libraries look for.
        metadata = {"format": "pt", "bvae": __version__, "config": json.dumps(self.config)}
        files.write_bytes(folder / "model.safetensors", weights.write(state, metadata))

    def push_to_hub(
        self,
        repo_id: str,
        run: str | Path | None = None,
        *,
        private: bool | None = None,
        revision: str | None = None,
        data_license: str | None = None,
    ) -> str:
        """Upload the model to the Hugging Face Hub with a model card; returns the URL of the commit.

        Needs the extra `hub`, and `hf auth login` or HF_TOKEN. The model is made if there is none.

        Args:
            repo_id: "user/repo".
            run: the run folder, from which the card has data, objective, figures and pictures. No path of
                this machine is uploaded. None: the card describes the network alone.
            private: for a new model: who can see it. None: as the account is set.
            revision: the branch. None: main.
            data_license: the licence of the training images, in words. None: that of a known data set.

        Raises:
            MissingError: there is no such run folder, account or revision.
            UsageError: the Hub refuses, or cannot be reached.
            ModuleNotFoundError: huggingface_hub is missing.

        Example, which uploads:

            BetaVAE.from_pretrained("runs/mine").push_to_hub("user/repo", run="runs/mine")
        """
        folder = expand(run) if run is not None else None
        if folder and not folder.is_dir():
            raise MissingError(f"run: {folder} is no folder")
        return hub.upload(self, repo_id, folder, private, revision, data_license)

    def save_config(self, folder: str | Path) -> None:
        """Write `config.json`, from which `from_pretrained` builds the network."""
        folder = expand(folder)
        files.make_folder(folder)
        files.remove_abandoned(folder)
        files.write_text(folder / "config.json", json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls, name: str | Path, which: Literal["last", "best"] = "last", revision: str | None = None
    ) -> "BetaVAE":
        """Load a model, in evaluation mode, from a folder, a run folder at any time, or the Hugging Face Hub.

        Args:
            name: a folder of a saved model, or of a run that has ended, was stopped or is still training; or
                the "user/repo" of a model on the Hub (a text, with the extra `hub`). A folder comes first.
            which: for a run, the newest state, or the checkpoint of the highest ELBO in validation.
            revision: for the Hub: a branch, a tag or a commit. None: the newest.

        Raises:
            MissingError: the folder holds no model, or no best checkpoint; the Hub has no such model, or
                cannot be reached and the model is not in its cache.
            UsageError: its files are damaged, belong to different models, or hold NaN or infinite weights.
            ModuleNotFoundError: the name can only be one of the Hub, and huggingface_hub is missing.

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
        folder = expand(name)
        if not folder.exists() and hub.is_id(name):
            folder = hub.download(str(name), revision)
        elif revision is not None:
            raise UsageError(f"{folder} is a folder, which has no revisions: leave revision={revision!r} out")
        if not (folder / "config.json").exists():
            raise MissingError(f"{folder} holds no config.json: it is not a folder of a saved model or a run")
        try:
            config = json.loads(read_text(folder / "config.json", CONFIG))
            if cls is BetaVAE and isinstance(config, dict) and config.get("arch") == INFOGAN:
                from bvae.infogan_model import InfoGAN as cls
            expected = expected_state(cls, config)
        except NotRead:
            raise
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise UsageError(
                f"{folder / 'config.json'} does not describe a {cls.__name__}: {error}"
            ) from None
        state = _read_weights(folder, which, expected)
        model = cls(**config)
        model.load_state_dict(state)
        return model.eval()

    @classmethod
    def from_pytorch_vae(cls, path: str | Path) -> "BetaVAE":
        """Load PyTorch-VAE's checkpoint of BetaVAE or VanillaVAE, in evaluation mode, with the same outputs.

        Takes a state dict, bare, in a Lightning checkpoint or another wrapper, under any prefix. No pickled
        code in the file runs. The sizes are taken from the weights.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not such a checkpoint.
        """
        config, state = pytorch_vae_weights.load(path)
        if reason := weights.difference(state, expected_state(cls, config)):
            raise UsageError(f"{path} is not a PyTorch-VAE BetaVAE checkpoint: {reason}")
        model = cls(**config)
        model.load_state_dict(state)
        return model.eval()


def build(config: "Config") -> BetaVAE:
    """The untrained model of a configuration; its weights come from torch's generator."""
    return BetaVAE(**_arguments(config))


def expected_weights(config: "Config") -> dict[str, Tensor]:
    """The state dict of a configuration's model, on `meta`: names, shapes and dtypes. Raises UsageError."""
    return expected_state(BetaVAE, _arguments(config))


def _arguments(config: "Config") -> dict[str, Any]:
    return {
        "in_channels": config.data.channels,
        "latent_dim": config.model.latent_dim,
        "hidden_dims": config.model.hidden_dims,
        "image_size": config.data.image_size,
        "activation": "tanh" if config.objective.likelihood == "gaussian" else "sigmoid",
        "arch": config.model.arch,
    }


def expected_state(cls: type[BetaVAE], arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of `cls(**arguments)`, without memory for it.

    A network of your own is built as usual, because it may compute with its weights when it is built.
    """
    if not isinstance(arguments, dict):
        raise UsageError(f"not a mapping of arguments, but {reprlib.repr(arguments)}")
    arch = arguments.get("arch", "pytorch-vae")
    ours = arch == INFOGAN or (cls is BetaVAE and is_ours(arch))
    try:
        with torch.device("meta" if ours else "cpu"), torch.random.fork_rng([]):
            return cls(**arguments).state_dict()
    except RuntimeError as error:  # a size beyond 64 bits
        if not ours:
            raise
        raise UsageError(f"no such network: {str(error).splitlines()[0]}") from None


def _read_weights(folder: Path, which: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict in a model's folder, which must fit the expected one."""
    from bvae.training import checkpoint  # part of the trainer, which a saved model does not need

    if which not in ("last", "best"):
        raise UsageError(f"which must be last or best, got {which!r}")
    if which == "best":
        best = checkpoint.best(folder / checkpoint.FOLDER)
        if best is None:
            raise MissingError(f"{folder} holds no best checkpoint: use which='last'")
        return checkpoint.weights(best, expected)
    path = folder / "model.safetensors"
    newest = checkpoint.checkpoints(folder / checkpoint.FOLDER)[-1:]
    if newest and not (path.is_file() and path.stat().st_mtime >= newest[0].stat().st_mtime):
        return checkpoint.weights(newest[0], expected)
    if not path.exists():
        raise MissingError(f"{folder} holds no model.safetensors and no checkpoint: no model was saved yet")
    return weights.read(path, expected)
