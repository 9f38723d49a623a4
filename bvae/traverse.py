"""Change a model's latents and show what each does: `python -m bvae.traverse runs/faces-B-1`.

A row starts from the code of an image (or from z = 0) and changes one latent at a time.
"""

import sys

from bvae.errors import exit_status, needs_train_extra
from bvae.paths import call

with needs_train_extra(__name__):
    import tyro

    from bvae.evaluation.options import TraverseOptions


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 input that cannot be used."""

    def run() -> None:
        arguments = tyro.cli(TraverseOptions, args=argv, description=__doc__, prog="python -m bvae.traverse")
        from bvae.evaluation.pictures import draw  # torch takes seconds, which --help need not

        arguments.register_network()
        print(call(draw, arguments))

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
