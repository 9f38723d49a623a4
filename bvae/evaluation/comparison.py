"""One factor on several models: the latent that knows most of it, changed from the same image."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bvae import files
from bvae.config import Config, ObjectiveConfig
from bvae.device import choose_device
from bvae.errors import UsageError
from bvae.evaluation import measure
from bvae.evaluation.options import CompareOptions, Protocol
from bvae.infogan_model import InfoGAN
from bvae.metrics.inputs import Factors
from bvae.model import BetaVAE
from bvae.plots import save_traversal, traverse
from bvae.training.validation import active_latents


class Row(NamedTuple):
    """A model and its latent for the factor."""

    name: str
    loss: str
    latent: int
    kl: float  # of that latent, nats per image
    share: float  # mutual information of latent and factor, over the factor's entropy
    other: str  # the factor with the next highest share
    other_share: float
    total_kl: float  # nats per image
    nats: float  # reconstruction, per image
    mse: float  # per pixel


class LatentWalk(NamedTuple):
    """One model's row of the table and of the picture."""

    factors: Factors  # [N, K] of all images
    start: int  # the index, among the points, of the image that the walk starts from
    row: Row
    values: Tensor  # of the latent [steps]
    images: Tensor  # uint8 [steps, 1, H, W, 3]


def categories_by_factor(
    code: NDArray[np.float32], factor: NDArray[np.int64], steps: int
) -> NDArray[np.float32]:
    """The values [steps] for a walk along an InfoGAN's code, which have no order of their own.

    They are sorted by the factor's mean over the images that Q gives each value. A value of no image is left
    out, and some are repeated if there are fewer than steps.

    Args:
        code, factor: [N], of the same images.
    """
    values, number = np.unique(code, return_inverse=True)
    means = np.bincount(number, factor) / np.bincount(number)
    return values[means.argsort()][np.linspace(0, len(values) - 1, steps).round().astype(int)]


def loss_name(objective: ObjectiveConfig | None) -> str:
    """A short name of a loss."""
    if objective is None:
        return "loss not known"
    weights = {
        "VAE": "",
        "H": f", beta {objective.beta:g}",
        "B": f", gamma {objective.gamma:g}, C {objective.max_capacity:g}",
        "TC": f", beta {objective.beta:g}",
        "Factor": f", gamma {objective.gamma:g}",
        "DIP-I": f", lambda_od {objective.lambda_od:g}",
        "DIP-II": f", lambda_od {objective.lambda_od:g}",
    }
    return objective.loss_type + weights[objective.loss_type]


def walk_latent(run: Path, arguments: CompareOptions, start: int | None) -> LatentWalk:
    """Pick one model's latent for the factor, and decode a walk along it.

    It starts from the image at `start`; None: from the most typical image, whose code has the smallest norm.
    """
    device = choose_device(arguments.device)
    model = BetaVAE.from_pretrained(run).to(device)
    protocol = Protocol(arguments.data, arguments.data_root, arguments.factor_bins)
    truth = measure.open_truth(run, protocol, model, device)
    if not truth.names:
        raise UsageError(f"{run} was trained on images without known factors: name others with --data")
    if arguments.factor not in truth.names:
        raise UsageError(f"--factor must be one of {', '.join(truth.names)}, got {arguments.factor!r}")
    factor = truth.names.index(arguments.factor)
    numbers = measure.sample_numbers(truth, arguments.points)
    codes = measure.encode(model, truth, numbers, device)
    shares = measure.information_shares(codes, truth.factors[numbers])
    trained = measure.trained_config(run)
    variance = (trained or Config()).objective.decoder_variance
    statistics = measure.compute_statistics(model, truth, numbers, variance, device)
    kl = statistics["kl_per_latent"]
    latent = int(np.where(active_latents(kl), shares[:, factor], -1).argmax())
    other = int(np.where(np.arange(len(truth.names)) == factor, -1, shares[latent]).argmax())
    if start is None:
        start = int(np.linalg.norm(codes, axis=1).argmin())
    z = torch.from_numpy(codes[[start]]).to(device)
    values = torch.linspace(-3, 3, arguments.steps)
    name = loss_name(trained.objective if trained else None)
    if isinstance(model, InfoGAN):
        factors = truth.factors[numbers, factor]
        values = torch.from_numpy(categories_by_factor(codes[:, latent], factors, arguments.steps))
        name = "InfoGAN"
    images = traverse(model, z, [latent], values)[0]
    row = Row(
        run.resolve().name,
        name,
        latent,
        kl[latent],
        float(shares[latent, factor]),
        truth.names[other],
        float(shares[latent, other]),
        statistics["kl"],
        statistics["reconstruction_nats"],
        statistics["mse"],
    )
    return LatentWalk(truth.factors, start, row, values, images)


def markdown(rows: list[Row], factor: str) -> str:
    """The models as a table; a share is a part of the factor's entropy."""
    lines = [
        f"| model | loss | latent | its KL, nats | share of {factor} | next | total KL, nats "
        "| reconstruction, nats | MSE |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | {r.loss} | {r.latent} | {r.kl:.2f} | {r.share:.2f} | {r.other} {r.other_share:.2f} "
        f"| {r.total_kl:.2f} | {r.nats:.1f} | {r.mse:.4f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def compare(arguments: CompareOptions) -> str:
    """Walk along a latent of each model, write the files, and return the table."""
    arguments.check()
    first, *others = arguments.runs
    walks = [walk_latent(first, arguments, None)]
    for run in others:
        walks.append(walk_latent(run, arguments, walks[0].start))
        if not np.array_equal(walks[-1].factors, walks[0].factors):
            raise UsageError(
                f"{run} was trained on other images than {first}: choose the images for both with --data and "
                "--data-root"
            )
        side, first_side = (walk.images.shape[-2] for walk in (walks[-1], walks[0]))
        if side != first_side:
            raise UsageError(
                f"{run} has images of {side} pixels and {first} of {first_side}: they do not fit side by side"
            )
    rows = [walk.row for walk in walks]
    labels = [f"{row.name}\n{row.loss}: latent {row.latent}, {row.kl:.2f} nats" for row in rows]
    images = torch.stack([walk.images for walk in walks])
    files.make_folder(arguments.out.parent)
    for end in (".png", ".gif"):
        save_traversal(images, labels, walks[0].values, arguments.out.with_name(arguments.out.name + end))
    table = markdown(rows, arguments.factor)
    files.write_text(arguments.out.with_name(arguments.out.name + ".md"), table)
    return table
