"""Measure a model on data whose factors are known: codes, posteriors, reconstructions and scores."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from bvae import config, ground_truth, metrics
from bvae.config import Config, DataConfig
from bvae.datasets import DRAWN_ROOT, READERS, held_out, labelled
from bvae.errors import UsageError
from bvae.evaluation.options import BINS, Protocol
from bvae.ground_truth import Truth
from bvae.infogan_model import InfoGAN
from bvae.metrics import inputs
from bvae.metrics._score import measure as measure_codes
from bvae.metrics.information import discretise, entropy, mutual_information
from bvae.model import ACTIVATIONS, BetaVAE
from bvae.pipelines import dsprites, sprites
from bvae.pipelines.cache_folder import default_folder

Codes = Callable[[NDArray[np.int64]], NDArray[np.float32]]  # numbers of images [n] to codes [n, D]
BATCH = {"cpu": 64, "cuda": 4096}  # images encoded at a time; on a CPU what a core's cache holds


class Interval(NamedTuple):
    """A score over metric seeds."""

    mean: float
    half_width: float | None  # of the 95 % interval of the mean by Student's t; None with one seed


def interval(values: list[float]) -> Interval:
    """The mean of values, and its interval."""
    n = len(values)
    if n == 1:
        return Interval(values[0], None)
    return Interval(float(np.mean(values)), float(stats.t.ppf(0.975, n - 1) * stats.sem(values)))


def trained_config(run: Path) -> Config | None:
    """The configuration that a model was trained with, if its folder holds it."""
    file = run / "config.yaml"
    return config.read(file)[0] if file.is_file() else None


def open_truth(run: Path, protocol: Protocol, model: BetaVAE, device: torch.device) -> Truth:
    """The data that the model is measured on.

    Raises:
        ValueError, FileNotFoundError: no data are named or found.
    """
    trained = trained_config(run)
    data = trained.data if trained else DataConfig()
    name = protocol.data
    if name == "auto":
        if trained is None:
            raise UsageError(f"{run} does not say which data it was trained on: name them with --data")
        if data.name == "memory":
            raise UsageError(f"{run} was trained on images in memory: name others with --data")
        if data.name == "folder":
            return ground_truth.unlabelled(model, held_out(data, protocol.points), data.crop)
        name = data.name
    root, crop = protocol.data_root or data.root, data.crop
    if name == "faces":
        return ground_truth.folder(root or DRAWN_ROOT, model, protocol.factor_bins, crop)
    if name == "sprites":
        ground_truth.check_input(model, "sprites")
        packed = sprites.all_sprites(data.cache_dir or default_folder(), device)
        return ground_truth.shapes(model, packed, sprites.unravel(torch.arange(len(packed))))
    if name == "rooms":
        return ground_truth.all_rooms(model, device)
    if name in READERS:
        return ground_truth.labelled(model, name, labelled(name, root))
    if root is None:
        raise UsageError(f"--data {name} needs --data-root")
    if name == "dsprites":
        packed, indices = dsprites.read(root)
        return ground_truth.shapes(model, packed.to(device), indices)
    return ground_truth.attributes(root, model, crop)


class LazyCodes:
    """The posterior means of a data set's images, which are encoded when they are first asked for."""

    def __init__(self, model: BetaVAE, truth: Truth, device: torch.device) -> None:
        self._parts = model, truth, device
        n = len(truth.factors)
        self._codes = np.empty((n, model.latent_dim), np.float32)
        self._encoded = np.zeros(n, np.bool_)
        self.seconds = 0.0  # of encoding

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """The codes [n, D] of the images with these numbers. Raises ValueError as `encode`."""
        new = np.unique(numbers[~self._encoded[numbers]])
        if len(new):
            start = time.perf_counter()
            model, truth, device = self._parts
            self._codes[new] = encode(model, truth, new, device)
            self._encoded[new] = True
            self.seconds += time.perf_counter() - start
        return self._codes[numbers]


@torch.no_grad()
def encode(
    model: BetaVAE, truth: Truth, numbers: NDArray[np.int64], device: torch.device
) -> NDArray[np.float32]:
    """The posterior means [n, D] of the images with these numbers; shows a progress bar if it takes long.

    Raises:
        ValueError: means that are not finite, or a single latent.
    """
    n, batch = len(numbers), BATCH[device.type]
    codes = np.empty((n, model.latent_dim), np.float32)
    with tqdm(total=n, desc="encoding", unit=" images", disable=None, leave=False, delay=1) as bar:
        for start in range(0, n, batch):
            x = truth.images(numbers[start : start + batch]).to(device)
            codes[start : start + batch] = model.encode(x)[0].cpu().numpy()
            bar.update(len(x))
    inputs.check_codes(codes)
    return codes


def sample_numbers(truth: Truth, points: int) -> NDArray[np.int64]:
    """Draw the numbers of `points` images, or of all if there are fewer; the same numbers on every call."""
    return np.random.default_rng(0).permutation(len(truth.factors))[:points]


def kl_per_latent(model: BetaVAE, mu: Tensor, log_var: Tensor) -> Tensor:
    """KL(posterior, prior) of each latent, float64 [D], nats; an InfoGAN's prior is not N(0, 1)."""
    return model.information(log_var) if isinstance(model, InfoGAN) else metrics.kl_per_latent(mu, log_var)


@torch.no_grad()
def compute_statistics(
    model: BetaVAE,
    truth: Truth,
    drawn: NDArray[np.int64],
    variance: float,
    device: torch.device,
    with_mig: bool = False,
) -> dict[str, Any]:
    """Statistics of the posteriors and reconstructions of the images with these numbers.

    Args:
        with_mig: include mig_sampled; if one of the factors is a shape, once more without it, because it has
            no order. An InfoGAN has none: the posterior of its codes is not Gaussian.
        variance: of the Gaussian likelihood; not used if the model has a Bernoulli likelihood.
    """
    mus: list[Tensor] = []
    log_vars: list[Tensor] = []
    sums: list[tuple[float, ...]] = []
    low, high = model.pixel_range
    spread = None if model.activation == "sigmoid" else variance
    batch = BATCH[device.type]
    for start in tqdm(range(0, len(drawn), batch), desc="decoding", disable=None):
        x = truth.images(drawn[start : start + batch]).to(device)
        mu, log_var = model.encode(x)
        # float64: in float32 the sigmoid of 17 is 1, and such a wrong pixel would cost 100 nats.
        mean = ACTIVATIONS[model.activation](model.decode_raw(mu).double())
        distances = metrics.reconstruction(mean, x, peak=high - low, variance=spread)
        mus.append(mu.cpu())
        log_vars.append(log_var.cpu())
        similarity = metrics.ssim(mean, x, peak=high - low)
        sums.append(tuple(len(x) * value for value in (*distances, similarity)))
    mu, log_var = torch.cat(mus), torch.cat(log_vars)
    nats, mse, psnr, ssim = np.sum(sums, 0) / len(drawn)
    kl = kl_per_latent(model, mu, log_var)
    sampled = {}
    if with_mig and not isinstance(model, InfoGAN):
        factors = truth.factors[drawn]
        sampled["mig_sampled"] = metrics.mig_sampled(mu, log_var, factors)
        if "shape" in truth.names:
            others = np.delete(factors, truth.names.index("shape"), 1)
            sampled["mig_sampled_without_shape"] = metrics.mig_sampled(mu, log_var, others)
    return {
        **sampled,
        "kl": kl.sum().item(),
        "active_units": metrics.active_units(mu),
        "total_correlation": metrics.gaussian_total_correlation(mu),
        "reconstruction_nats": float(nats),
        "mse": float(mse),
        "psnr": float(psnr),
        "ssim": float(ssim),
        "kl_per_latent": kl.tolist(),
        "entropy_per_latent": metrics.entropy_per_latent(log_var).tolist(),
    }


def score_codes(
    codes: Codes,
    truth: Truth,
    protocol: Protocol,
    active: NDArray[np.bool_],
    seconds: dict[str, float],
) -> tuple[dict[str, Interval], NDArray[np.float64]]:
    """All metrics over the seeds, and DCI's importance [D, K] with the first seed.

    Args:
        codes: gives those of the images with these numbers.
        active: the latents of mig_active and its like: [D].
        seconds: gets the seconds of each group of metrics.
    """
    sample, sizes, n = metrics.Table(truth.factors), protocol.sizes, len(truth.factors)
    importances: list[NDArray[np.float64]] = []

    def score(seed: int) -> dict[str, float]:
        # From as many points as the metrics draw, so that no others are encoded.
        rows = np.random.default_rng(seed).permutation(n)[: max(protocol.points, sum(sizes.values()))]
        scores, importance = measure_codes(
            codes(rows),
            truth.factors[rows],
            seed=seed,
            points=protocol.points,
            bins=BINS,
            boosting=protocol.boosting,
            active=active,
            **sizes,
        )
        importances.append(importance)
        return scores

    groups: dict[str, Callable[[int], Mapping[str, float]]] = {
        "score": score,
        "beta_vae": lambda seed: {"beta_vae": metrics.beta_vae(codes, sample, seed=seed, **sizes)},
        "factor_vae": lambda seed: {
            "factor_vae": metrics.factor_vae(
                codes, sample, seed=seed, variance_points=max(2, protocol.points), **sizes
            )
        },
    }
    values: dict[str, list[float]] = {}
    with tqdm(total=len(groups) * protocol.seeds, desc="metrics", disable=None) as bar:
        for seed in range(protocol.seeds):
            for name, measure in groups.items():
                start = time.perf_counter()
                for key, value in measure(seed).items():
                    values.setdefault(key, []).append(value)
                seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
                bar.update()
    return {name: interval(each) for name, each in values.items()}, importances[0]


def information_shares(codes: NDArray[np.float32], factors: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mutual information of each latent and factor, as a share of the factor's entropy, 0 to 1: [D, K]."""
    checked, factors = inputs.check(codes, factors)
    return mutual_information(discretise(checked), factors) / entropy(factors)


def best_latents(
    areas: NDArray[np.float64], names: Sequence[str], active: NDArray[np.bool_]
) -> dict[str, dict[str, float]]:
    """The best active latent for each attribute, from AUROCs [D, K], and its area; 1 - area if below 0.5."""
    folded = np.maximum(areas, 1 - areas)
    best = np.where(active[:, None], folded, -1).argmax(0)
    return {
        name: {"latent": int(latent), "auroc": float(folded[latent, k])}
        for k, (name, latent) in enumerate(zip(names, best, strict=True))
    }
