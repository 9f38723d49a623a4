"""InfoGAN: a generator whose codes a second network reads from its images; a comparison for the VAEs."""

import math
from itertools import pairwise
from numbers import Integral
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvae.errors import UsageError
from bvae.model import INFOGAN, BetaVAE

SIDE = 4  # pixels of the generator's first feature map
WIDEST = 4  # a layer has at most this many times `width` channels
LIMIT = 3.0  # codes go from -LIMIT to LIMIT, as the walks along a VAE's latents do
SLOPE = 0.1  # of the LeakyReLUs


class InfoGAN(BetaVAE):
    """A GAN with categorical codes that can be read from its images (Chen et al. 2016, "InfoGAN").

    To the commands it is a `BetaVAE`: `encode` reads the codes of an image, `decode` generates an image from
    codes. Code i is one of `categories` values, equally likely and evenly spaced from -3 to 3: a walk along
    a VAE's latent passes through all of them. The order of the values has no meaning. `decode` takes the
    nearest value, and leaves out the generator's noise.

    The discriminator and Q, which reads the codes, share their convolutions, with GroupNorm of one group in
    place of the paper's BatchNorm. The statistics of BatchNorm would be of batches of real images and of
    generated ones in turn: with it, Q in evaluation read half of the codes, although its loss in training was
    near zero.

    Args:
        in_channels: channels of the image, 1 (grey) or 3 (RGB).
        image_size: height and width in pixels: 32, 64, 128 or 256.
        latent_dim: codes.
        categories: values of each code.
        noise: dimensions of the noise, N(0, I).
        width: channels of the layers beside the image; the layers further in have up to 4 times as many.
        arch: tells config.json from a VAE's.

    Raises:
        UsageError: an argument out of its range.

    >>> import torch
    >>> from bvae.infogan_model import InfoGAN
    >>> model = InfoGAN(latent_dim=2, categories=3, width=4).eval()
    >>> images = model.sample(5)
    >>> images.shape
    torch.Size([5, 3, 32, 32])
    >>> codes, log_var = model.encode(images)
    >>> codes.shape, bool(torch.isin(codes, torch.tensor([-3.0, 0.0, 3.0])).all())
    (torch.Size([5, 2]), True)
    >>> torch.equal(model.decode(codes), model.decode(codes + 0.1))
    True
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        latent_dim: int = 10,
        categories: int = 10,
        noise: int = 128,
        width: int = 64,
        arch: Literal["infogan"] = INFOGAN,
    ) -> None:
        nn.Module.__init__(self)  # BetaVAE's would build its own networks
        self.config = {
            "arch": arch,
            "in_channels": in_channels,
            "image_size": image_size,
            "latent_dim": latent_dim,
            "categories": categories,
            "noise": noise,
            "width": width,
        }
        for name, value in self.config.items():
            if name != "arch" and not isinstance(value, Integral):  # such as 4.0 in a JSON file
                raise UsageError(f"{name} takes whole numbers, got {value!r}")
        if arch != INFOGAN:
            raise UsageError(f"arch must be {INFOGAN}, got {arch!r}")
        if in_channels not in (1, 3):
            raise UsageError(f"in_channels must be 1 (grey) or 3 (RGB), got {in_channels}")
        if image_size not in (32, 64, 128, 256):
            raise UsageError(f"image_size must be 32, 64, 128 or 256 pixels for an InfoGAN, got {image_size}")
        for name, value, least in (
            ("latent_dim", latent_dim, 1),
            ("categories", categories, 2),
            ("noise", noise, 1),
            ("width", width, 1),
        ):
            if value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}")
        self.latent_dim, self.categories, self.noise = latent_dim, categories, noise
        self.activation = "tanh"
        self.input_shape = (in_channels, image_size, image_size)
        stages = int(math.log2(image_size // SIDE))
        widths = [width * min(2**i, WIDEST) for i in range(stages)]
        features = widths[-1] * SIDE**2
        self.generator = _generator(latent_dim * categories + noise, [*reversed(widths), in_channels])
        self.trunk = _trunk([in_channels, *widths])
        self.discriminator = nn.Linear(features, 1)
        self.reader = nn.Sequential(nn.Linear(features, 2 * width), nn.LeakyReLU(SLOPE))
        self.head = nn.Linear(2 * width, latent_dim * categories)  # Q's logits

    # --- Codes --------------------------------------------------------------------------------------------
    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Categories int64 [n, latent_dim] and noise [n, noise] from their priors, on the model's device."""
        device = self.head.weight.device
        shape = (n, self.latent_dim)
        categories = torch.randint(self.categories, shape, generator=generator, device=device)
        return categories, torch.randn(n, self.noise, generator=generator, device=device)

    def generate(self, categories: Tensor, noise: Tensor) -> Tensor:
        """Images [N, C, H, W] before tanh, from int64 [N, latent_dim] and the noise [N, noise]."""
        one_hot = F.one_hot(categories, self.categories).flatten(1)
        return self.generator(torch.cat([one_hot.to(noise), noise], 1))

    def logits(self, features: Tensor) -> Tensor:
        """Q's logits [N, latent_dim, categories], from the trunk's features."""
        return self.head(self.reader(features)).unflatten(1, (self.latent_dim, self.categories))

    def information(self, log_var: Tensor) -> Tensor:
        """KL(Q, prior) of each code: log(categories) minus the entropy of Q.

        Args:
            log_var: [N, latent_dim], from `encode`.

        Returns:
            float64 [latent_dim], nats, the mean over images.
        """
        return (math.log(2 * LIMIT) - _gaussian_entropy(log_var.double())).mean(0)

    # --- As a BetaVAE -------------------------------------------------------------------------------------
    def encode_scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable codes under Q, and the log variance of the Gaussian that has Q's entropy.

        For that entropy, a category is a uniform density over its share of -3 to 3.
        """
        log_q = self.logits(self.trunk(x)).log_softmax(2)
        entropy = -(log_q.exp() * log_q).sum(2) + math.log(2 * LIMIT / self.categories)
        codes = log_q.argmax(2) * (2 * LIMIT / (self.categories - 1)) - LIMIT
        return codes.to(log_q), 2 * (entropy - _gaussian_entropy(torch.zeros_like(entropy)))

    def decode_raw(self, z: Tensor) -> Tensor:
        """Codes [N, latent_dim], -3 to 3, to images before tanh, with noise 0."""
        places = (z + LIMIT) * ((self.categories - 1) / (2 * LIMIT))
        categories = places.round().clamp(0, self.categories - 1).long()
        return self.generate(categories, z.new_zeros(len(z), self.noise))

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n images [n, C, H, W] of codes and noise from their priors."""
        return self.activate(self.generate(*self.draw(n, generator)))

    def push_to_hub(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raise UsageError: the Hub's model card is a VAE's."""
        raise UsageError("an InfoGAN cannot be uploaded: the model card describes VAEs")


def _gaussian_entropy(log_var: Tensor) -> Tensor:
    """The differential entropy of Gaussians, in nats."""
    return 0.5 * (math.log(2 * math.pi * math.e) + log_var)


def _generator(inputs: int, widths: list[int]) -> nn.Sequential:
    """From codes and noise [N, inputs] to images before tanh; each stage doubles the size."""
    first = widths[0]
    layers: list[Any] = [nn.Linear(inputs, first * SIDE**2, bias=False), nn.Unflatten(1, (first, SIDE, SIDE))]
    for a, b in pairwise(widths):
        layers += [nn.BatchNorm2d(a), nn.ReLU(inplace=True), nn.ConvTranspose2d(a, b, 4, stride=2, padding=1)]
    for layer in layers:
        if isinstance(layer, nn.Linear | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0, 0.02)  # Radford et al. 2016, "DCGAN"
    return nn.Sequential(*layers)


def _trunk(widths: list[int]) -> nn.Sequential:
    """From images to features [N, F]; each stage halves the size."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        norm = [nn.GroupNorm(1, b)] if i else []
        layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), *norm, nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers, nn.Flatten())
