"""From a folder of photos to a page with a slider for each latent.

python examples/own_photos_to_explorer/run.py PHOTOS
"""

import argparse
import sys
from pathlib import Path

import bvae
from bvae.errors import exit_status

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("photos", type=Path, metavar="PHOTOS", help="a folder of images, at any depth")
parser.add_argument("--out", type=Path, default=Path("runs/photos"), help="run folder; default: %(default)s")
parser.add_argument("--max-steps", type=int, default=4000, help="default: %(default)s, or Ctrl-C earlier")
options = parser.parse_args()


def main() -> None:
    # B lets the KL rise to 25 nats step by step: latents take over one factor after another.
    fitted = bvae.fit(
        options.photos,
        out=options.out,
        max_steps=options.max_steps,
        latent_dim=10,
        loss_type="B",
        max_capacity=25,
    )
    if fitted.validation is None:  # Ctrl-C: a checkpoint is there, and the page is made from it
        print(f"stopped; for the page: python -m bvae.explore {options.out}")
    else:
        print(f"open {options.out / 'explorer.html'}")


sys.exit(exit_status(main))
