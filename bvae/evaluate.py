"""Measure a trained model: `python -m bvae.evaluate runs/faces-B-1`.

Prints a table and writes it to the run folder as evaluation.md and evaluation.json. evaluation.png holds the
matrices of latents by factors, evaluation_traversals.png shows what the latents do. codes.npz holds mu, the
factors and the numbers of the points, for scores of your own. Scores need known factors: sprites, rooms, the
drawn faces' factors.csv, or your own dSprites, 3D Shapes, MPI3D, Cars3D or SmallNORB. CelebA's attributes are
not independent factors: for them the command gives the area under the ROC curve of each latent. Of other
images it measures what the posteriors and reconstructions are.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from bvae.errors import exit_status, needs_train_extra
from bvae.paths import call

with needs_train_extra(__name__):
    import tyro

    from bvae.evaluation.options import OwnNetwork, Protocol


@dataclass(frozen=True)
class Arguments(OwnNetwork):
    """Which model, and how to measure it."""

    run: Annotated[Path, tyro.conf.arg(name="RUN", metavar="RUN"), tyro.conf.Positional]
    """A run folder, or any folder with model.safetensors and config.json."""
    protocol: Protocol = field(default_factory=Protocol)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 input that cannot be used."""

    def run() -> None:
        arguments = tyro.cli(
            Arguments,
            args=argv,
            description=__doc__,
            prog="python -m bvae.evaluate",
            config=(tyro.conf.OmitArgPrefixes,),
        )
        from bvae.evaluation.run_folder import evaluate  # torch takes seconds, which --help need not

        arguments.register_network()
        print(call(lambda o: evaluate(o.run, o.protocol), arguments), end="")

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
