"""Export a trained model for use without bvae: `python -m bvae.export runs/faces-B-1`.

Writes encoder.onnx, encoder.pt2, decoder.onnx and decoder.pt2, for batches of any size. Each file is compared
with the model before it is written.
"""

import sys

from bvae.errors import exit_status, needs_train_extra
from bvae.paths import call

with needs_train_extra(__name__):
    import tyro

    from bvae.evaluation.options import ExportOptions


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 input that cannot be used."""

    def run() -> None:
        arguments = tyro.cli(ExportOptions, args=argv, description=__doc__, prog="python -m bvae.export")
        from bvae.exporting import run as export  # torch takes seconds, which --help need not

        arguments.register_network()
        print(call(export, arguments))

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
