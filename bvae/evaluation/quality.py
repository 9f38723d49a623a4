"""Distances between sets of images in Inception's features: FID and KID. Needs the extra `quality`."""

import hashlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from tqdm import tqdm

from bvae.compat import inert_pickle
from bvae.errors import MissingError, UsageError
from bvae.ground_truth import Truth
from bvae.images import to_uint8
from bvae.model import BetaVAE
from bvae.opening import WEIGHTS, read_bytes
from bvae.weights import fault

BATCH = 50  # images at a time, each of which Inception sees at 299 x 299
COMPONENTS = 10  # of the mixture, as Ghosh et al. 2020 took
SUBSET = 1000  # most images of a subset of KID
SUBSETS = 100
RESIZING = "bilinear to 299 x 299, not antialiased, as in TensorFlow 1"
FILE = "weights-inception-2015-12-05-6726825d.pth"
SOURCE = f"get {FILE} from the releases of torch-fidelity on GitHub (v0.2.0, 95 MB)"


class Extractor(NamedTuple):
    """Inception, and which weights it has."""

    features: Callable[[Tensor], Tensor]  # uint8 images [N, 3, H, W] to [N, 2048]
    file: str
    sha256: str


@torch.no_grad()
def measure(
    model: BetaVAE,
    truth: Truth,
    numbers: NDArray[np.int64],
    extractor: Extractor,
    device: torch.device,
) -> dict[str, Any]:
    """FID and KID of reconstructions, of samples from the prior, and of samples from a mixture.

    The mixture of Gaussians is fitted to draws from the posteriors of the images (Ghosh et al. 2020, "From
    variational to deterministic autoencoders"). Each set has as many images as `numbers`.

    Args:
        model: on the device, in evaluation mode.
        numbers: which images of `truth` to compare with.
        extractor: from `inception`.

    Raises:
        UsageError: fewer than two images.
    """
    if len(numbers) < 2:
        raise UsageError(f"FID compares sets of at least 2 images, got {len(numbers)}")
    sets = _sets(model, truth, numbers, device)
    with tqdm(total=4 * len(numbers), desc="Inception", unit=" images", disable=None) as bar:
        features = {name: _features(images, extractor.features, bar) for name, images in sets}
    reference = features.pop("images")
    return {
        "images": len(numbers),
        "size": model.input_shape[1],
        "crop": truth.crop,
        "resizing": RESIZING,
        "weights": extractor.file,
        "sha256": extractor.sha256,
        "kid_subsets": SUBSETS,
        "kid_subset_size": min(SUBSET, len(numbers)),
        "distances": distances(reference, features),
    }


def inception(path: Path, device: torch.device) -> Extractor:
    """Inception with the weights of torch-fidelity's file.

    Raises:
        UsageError: a file that is missing, damaged or of another network.
        ModuleNotFoundError: torchmetrics or torch-fidelity is missing.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    if not path.exists():
        raise MissingError(f"--fid-weights {path}: no such file; {SOURCE}")
    sha256 = hashlib.sha256(read_bytes(path, WEIGHTS)).hexdigest()
    try:
        loaded = inert_pickle.load(path)
    except UsageError as error:
        raise UsageError(f"--fid-weights {error}; {SOURCE}") from None
    # torch-fidelity would run the file's code: it gets a copy of the tensors alone.
    try:
        state = {name: value for name, value in loaded.items() if fault(value) is None}
        plain: Any = io.BytesIO()  # its types want a path
        torch.save(state, plain)
        plain.seek(0)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], plain, antialias=False)
    except (AttributeError, RuntimeError, TypeError):  # no mapping of tensors, or of other ones
        raise UsageError(f"--fid-weights {path} does not hold Inception's weights: {SOURCE}") from None
    return Extractor(network.to(device), path.name, sha256)


def distances(reference: Tensor, features: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """FID (Heusel et al. 2017) and KID (Binkowski et al. 2018) of features [N, F] from the reference's.

    KID is an unbiased estimate and may be below 0; `kid_std` is over its subsets.
    """
    from torchmetrics.image import FrechetInceptionDistance, KernelInceptionDistance

    given = _Given(reference.shape[1])
    found = {}
    for name, each in features.items():
        with warnings.catch_warnings(), torch.random.fork_rng([]):
            warnings.simplefilter("ignore")  # KID keeps all features, and says so
            torch.manual_seed(0)  # of KID's subsets
            fid = FrechetInceptionDistance(given)
            kid = KernelInceptionDistance(given, SUBSETS, min(SUBSET, len(reference), len(each)))
            for metric in (fid, kid):
                metric.update(reference, real=True)
                metric.update(each, real=False)
            mean, std = kid.compute()
        found[name] = {"fid": fid.compute().item(), "kid": mean.item(), "kid_std": std.item()}
    return found


class _Given(nn.Module):
    """In the place of Inception: features that were extracted before."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features  # torchmetrics asks for it

    def forward(self, features: Tensor) -> Tensor:
        return features


def _features(images: Iterable[Tensor], extract: Callable[[Tensor], Tensor], bar: "tqdm[Any]") -> Tensor:
    """The features [N, F] of batches of uint8 images, on the CPU."""
    parts = []
    for batch in images:
        parts.append(extract(batch).cpu())
        bar.update(len(batch))
    return torch.cat(parts)


def _sets(
    model: BetaVAE, truth: Truth, numbers: NDArray[np.int64], device: torch.device
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """The sets of uint8 images [n, 3, H, W] by name: the data first, then what the model makes."""
    generator = torch.Generator(device).manual_seed(0)
    batches = np.array_split(numbers, -(-len(numbers) // BATCH))

    def show(images: Tensor) -> Tensor:
        return to_uint8(images, model.pixel_range).permute(0, 3, 1, 2).contiguous().to(device)

    def decoded(codes: Iterable[Tensor]) -> Iterator[Tensor]:
        return (show(model.decode(z.to(device))) for z in codes)

    yield "images", (show(truth.images(part)) for part in batches)
    posteriors = [model.encode(truth.images(part).to(device)) for part in batches]
    yield "reconstructions", decoded(mu for mu, _ in posteriors)
    prior = (torch.randn(mu.shape, generator=generator, device=device) for mu, _ in posteriors)
    yield "samples of the prior", decoded(prior)
    noise = (torch.randn(mu.shape, generator=generator, device=device) for mu, _ in posteriors)
    draws = [mu + (log_var / 2).exp() * eps for (mu, log_var), eps in zip(posteriors, noise, strict=True)]
    yield "samples of a mixture", decoded(fitted_samples(torch.cat(draws).cpu()).split(BATCH))


def fitted_samples(codes: Tensor) -> Tensor:
    """As many samples as codes [N, D], from a mixture of Gaussians fitted to them."""
    mixture = GaussianMixture(min(COMPONENTS, len(codes)), random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged after 100 steps: near enough
        mixture.fit(codes.double().numpy())
    return torch.from_numpy(mixture.sample(len(codes))[0]).to(codes)
