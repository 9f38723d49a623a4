"""Write a page with a slider for each latent: `python -m bvae.explore runs/faces-B-1`.

The page is one HTML file with the decoder inside. It opens by a double click and needs no network. Two run
folders are shown side by side.
"""

import sys

from bvae.errors import exit_status, needs_train_extra
from bvae.paths import call

with needs_train_extra(__name__):
    import tyro

    from bvae.evaluation.options import ExploreOptions


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 input that cannot be used."""

    def run() -> None:
        arguments = tyro.cli(ExploreOptions, args=argv, description=__doc__, prog="python -m bvae.explore")
        from bvae.explorer.runs import explore  # torch takes seconds, which --help need not

        arguments.register_network()
        print(call(explore, arguments))

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
