"""Set models side by side: `python -m bvae.compare runs/faces-H-1 runs/faces-VAE-1 --factor azimuth`.

For each model, the command changes the latent that has the most information about one factor, starting from
the same image: one row per model. In a model that separates the factors, only that factor changes. Writes the
picture, as PNG and as GIF, and the table that it prints.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from bvae import files
from bvae.errors import UsageError, exit_status, needs_train_extra

with needs_train_extra(__name__):
    import numpy as np
    import torch
    import tyro
    from torch import Tensor

    from bvae.config import Config, ObjectiveConfig
    from bvae.device import choose_device
    from bvae.evaluation import measure
    from bvae.metrics.inputs import Factors
    from bvae.model import BetaVAE
    from bvae.plots import save_traversal, traverse


@dataclass(frozen=True)
class Arguments:
    """Which models, and which factor of their data."""

    runs: Annotated[tuple[Path, ...], tyro.conf.arg(name="RUN"), tyro.conf.Positional]
    """Run folders; all models see the same images."""
    factor: str
    """For sprites: shape, scale, orientation, x or y. For the drawn faces: azimuth, smile and more."""
    data: Literal["auto", "faces", "celeba", "sprites", "dsprites"] = "auto"
    """The images. auto: what each run's config.yaml names."""
    data_root: Path | None = None
    """Folder or file of the images, as for bvae.evaluate. None: the one in config.yaml."""
    factor_bins: int = 10
    """A factor of more values than this is cut into as many bins of equal width (faces)."""
    points: int = 10_000
    """Images from which the table's numbers are computed."""
    steps: int = 11
    """Pictures per row, with the latent from -3 to 3."""
    out: Path = Path("compare")
    """Path of the files to write, without .png, .gif and .md."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""

    def check(self) -> None:
        """Raise ValueError for the first value out of its range."""
        if not self.runs:
            raise UsageError("name the run folders to compare")
        if self.points < 1:
            raise UsageError(f"--points must be positive, got {self.points}")
        if self.steps < 2:
            raise UsageError(f"--steps must be at least 2, got {self.steps}")


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
    images: Tensor  # uint8 [steps, 1, H, W, 3]


def loss_name(objective: ObjectiveConfig | None) -> str:
    """A short name of a loss."""
    if objective is None:
        return "loss not known"
    weights = {
        "VAE": "",
        "H": f", beta {objective.beta:g}",
        "B": f", gamma {objective.gamma:g}, C {objective.max_capacity:g}",
    }
    return objective.loss_type + weights[objective.loss_type]


def walk_latent(run: Path, arguments: Arguments, start: int | None) -> LatentWalk:
    """Pick one model's latent for the factor, and decode a walk along it.

    It starts from the image at `start`; None: from the most typical image, whose code has the smallest norm.
    """
    device = choose_device(arguments.device)
    model = BetaVAE.from_pretrained(run).to(device)
    protocol = measure.Protocol(arguments.data, arguments.data_root, arguments.factor_bins)
    truth = measure.open_truth(run, protocol, model, device)
    if arguments.factor not in truth.names:
        raise UsageError(f"--factor must be one of {', '.join(truth.names)}, got {arguments.factor!r}")
    factor = truth.names.index(arguments.factor)
    numbers = measure.sample_numbers(truth, arguments.points)
    codes = measure.encode(model, truth, numbers, device)
    shares = measure.information_shares(codes, truth.factors[numbers])
    latent = int(shares[:, factor].argmax())
    other = int(np.where(np.arange(len(truth.names)) == factor, -1, shares[latent]).argmax())

    trained = measure.trained_config(run)
    variance = (trained or Config()).objective.decoder_variance
    statistics = measure.compute_statistics(model, truth, numbers, variance, device)
    if start is None:
        start = int(np.linalg.norm(codes, axis=1).argmin())
    z = torch.from_numpy(codes[[start]]).to(device)
    images = traverse(model, z, [latent], torch.linspace(-3, 3, arguments.steps))[0]
    row = Row(
        run.resolve().name,
        loss_name(trained.objective if trained else None),
        latent,
        statistics["kl_per_latent"][latent],
        float(shares[latent, factor]),
        truth.names[other],
        float(shares[latent, other]),
        statistics["kl"],
        statistics["reconstruction_nats"],
        statistics["mse"],
    )
    return LatentWalk(truth.factors, start, row, images)


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


def compare(arguments: Arguments) -> str:
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
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for end in (".png", ".gif"):
        save_traversal(images, labels, arguments.out.with_name(arguments.out.name + end))
    table = markdown(rows, arguments.factor)
    files.write_text(arguments.out.with_name(arguments.out.name + ".md"), table)
    return table


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 input that cannot be used."""
    arguments = tyro.cli(Arguments, args=argv, description=__doc__, prog="python -m bvae.compare")
    return exit_status(lambda: print(compare(arguments), end=""))


if __name__ == "__main__":
    sys.exit(main())
