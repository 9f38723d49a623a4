"""Set models side by side: `python -m bvae.compare runs/faces-H-1 runs/faces-VAE-1 --factor azimuth`.

Of each model, the latent that tells most of one factor of the data is walked along, from the same image: a
row a model. In a model that takes the factors apart, nothing but that factor changes. Writes the picture, as
PNG and as GIF, and the table that it prints.
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
    """Of sprites shape, scale, orientation, x or y; of the drawn faces azimuth, smile and more."""
    data: Literal["auto", "faces", "celeba", "sprites", "dsprites"] = "auto"
    """The images. auto: what each run's config.yaml names."""
    data_root: Path | None = None
    """Where they are, as for bvae.evaluate. None: where config.yaml says."""
    factor_bins: int = 10
    """A factor of more values than this is cut into as many bins of equal width (faces)."""
    points: int = 10_000
    """Images that the table's numbers are of."""
    steps: int = 11
    """Pictures in a row, as the latent goes from -3 to 3."""
    out: Path = Path("compare")
    """What to write, without the ends .png, .gif and .md."""
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
    share: float  # of the factor's entropy that the latent tells
    other: str  # the factor of which it tells most after that
    other_share: float
    kl_in_all: float  # nats per image
    nats: float  # reconstruction, per image
    mse: float  # per pixel


class Answer(NamedTuple):
    """What one model gives."""

    factors: Factors  # [N, K] of all images
    start: int  # the place, among the points, of the image that the walk starts from
    row: Row
    images: Tensor  # uint8 [steps, 1, H, W, 3]


def loss_name(objective: ObjectiveConfig | None) -> str:
    """A loss in a few letters."""
    if objective is None:
        return "loss not known"
    weights = {
        "VAE": "",
        "H": f", beta {objective.beta:g}",
        "B": f", gamma {objective.gamma:g}, C {objective.max_capacity:g}",
    }
    return objective.loss_type + weights[objective.loss_type]


def ask(run: Path, arguments: Arguments, start: int | None) -> Answer:
    """One model's latent for the factor, walked along from the image at `start`, or from its most typical."""
    device = choose_device(arguments.device)
    model = BetaVAE.from_pretrained(run).to(device)
    protocol = measure.Protocol(arguments.data, arguments.data_root, arguments.factor_bins)
    known = measure.open_truth(run, protocol, model, device)
    if arguments.factor not in known.names:
        raise UsageError(f"--factor must be one of {', '.join(known.names)}, got {arguments.factor!r}")
    wanted = known.names.index(arguments.factor)
    numbers = measure.some(known, arguments.points)
    codes = measure.encode(model, known, numbers, device)
    told = measure.shares(codes, known.factors[numbers])
    latent = int(told[:, wanted].argmax())
    other = int(np.where(np.arange(len(known.names)) == wanted, -1, told[latent]).argmax())

    trained = measure.settings(run)
    variance = (trained or Config()).objective.decoder_variance
    found = measure.describe(model, known, numbers, variance, device)
    if start is None:
        start = int(np.linalg.norm(codes, axis=1).argmin())
    z = torch.from_numpy(codes[[start]]).to(device)
    images = traverse(model, z, [latent], torch.linspace(-3, 3, arguments.steps))[0]
    row = Row(
        run.resolve().name,
        loss_name(trained.objective if trained else None),
        latent,
        found["kl_per_latent"][latent],
        float(told[latent, wanted]),
        known.names[other],
        float(told[latent, other]),
        found["kl"],
        found["reconstruction_nats"],
        found["mse"],
    )
    return Answer(known.factors, start, row, images)


def markdown(rows: list[Row], factor: str) -> str:
    """The models as a table; shares are of the factor's entropy."""
    lines = [
        f"| model | loss | latent | its KL, nats | share of {factor} | next | KL in all, nats "
        "| reconstruction, nats | MSE |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | {r.loss} | {r.latent} | {r.kl:.2f} | {r.share:.2f} | {r.other} {r.other_share:.2f} "
        f"| {r.kl_in_all:.2f} | {r.nats:.1f} | {r.mse:.4f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def compare(arguments: Arguments) -> str:
    """Ask each model, write the files, and give the table."""
    arguments.check()
    first, *others = arguments.runs
    answers = [ask(first, arguments, None)]
    for run in others:
        answers.append(ask(run, arguments, answers[0].start))
        if not np.array_equal(answers[-1].factors, answers[0].factors):
            raise UsageError(
                f"{run} was trained on other images than {first}: name those to compare them on with --data "
                "and --data-root"
            )
        side, wanted = (answer.images.shape[-2] for answer in (answers[-1], answers[0]))
        if side != wanted:
            raise UsageError(
                f"{run} gives images of {side} pixels and {first} of {wanted}: they do not fit side by side"
            )
    rows = [answer.row for answer in answers]
    labels = [f"{row.name}\n{row.loss}: latent {row.latent}, {row.kl:.2f} nats" for row in rows]
    images = torch.stack([answer.images for answer in answers])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for end in (".png", ".gif"):
        save_traversal(images, labels, arguments.out.with_name(arguments.out.name + end))
    table = markdown(rows, arguments.factor)
    files.write_text(arguments.out.with_name(arguments.out.name + ".md"), table)
    return table


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 not as asked for."""
    arguments = tyro.cli(Arguments, args=argv, description=__doc__, prog="python -m bvae.compare")
    return exit_status(lambda: print(compare(arguments), end=""))


if __name__ == "__main__":
    sys.exit(main())
