"""Manage data sets: check the files, decode them ahead of training, list and remove decoded images.

  python -m bvae.data check DIR                  print layout, counts, splits, and every damaged file
  python -m bvae.data ingest DIR                 decode the images now, not when training starts
  python -m bvae.data ls                         list the caches in the cache folder
  python -m bvae.data rm KEY                     remove one of them; `rm --all` removes all
  python -m bvae.data faces OUT --n 12000        draw faces with known factors, in CelebA's layout
  python -m bvae.data rooms OUT.png              show what each factor of --data rooms changes

Exit status: 0 no error, 1 damaged files or a failed write, 2 input that cannot be used or no good image.
"""

import argparse
import sys
from pathlib import Path

from bvae.command_line import Parser
from bvae.errors import exit_status, needs_train_extra
from bvae.paths import call
from bvae.pipelines.cache_folder import default_folder

with needs_train_extra(__name__):
    from bvae.config import DataConfig


def _parser() -> Parser:
    parser = Parser(prog="python -m bvae.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")

    def command(name: str, example: str, text: str) -> argparse.ArgumentParser:
        description = f"{text[0].upper()}{text[1:]}.\n\n  python -m bvae.data {name} {example}"
        return commands.add_parser(name, help=text, description=description.rstrip())

    def cache_folder(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--cache-dir", type=Path, default=default_folder(), help="default: %(default)s")

    def decoders(sub: argparse.ArgumentParser) -> None:
        choices = ("auto", "dali", "torchvision")
        sub.add_argument(
            "--decoder", choices=choices, default="auto", help="default: %(default)s, DALI if there is one"
        )

    sub = command("check", "data/celeba", "decode every file; print the counts and the damaged files")
    sub.add_argument("dir", type=Path, metavar="DIR", help="CelebA's folder, or any folder of images")
    decoders(sub)

    default = DataConfig()
    sub = command(
        "ingest", "data/celeba --image-size 64", "decode the training and validation images into the cache"
    )
    sub.add_argument("dir", type=Path, metavar="DIR", help="CelebA's folder, or any folder of images")
    sub.add_argument("--data", choices=("faces", "celeba", "folder"), help="default: detected from DIR")
    sub.add_argument("--crop", type=int, help="side of the centred square; default: 148 or the largest")
    sub.add_argument("--image-size", type=int, default=default.image_size, help="default: %(default)s")
    sub.add_argument(
        "--channels", type=int, choices=(1, 3), default=default.channels, help="default: %(default)s"
    )
    sub.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where DALI decodes; default: %(default)s, the GPU if there is one",
    )
    decoders(sub)
    cache_folder(sub)

    cache_folder(command("ls", "", "list the caches"))

    sub = command("rm", "--all", "remove caches")
    sub.add_argument("key", nargs="*", metavar="KEY", help="as `ls` shows it")
    sub.add_argument("--all", action="store_true", help="every cache in the folder")
    cache_folder(sub)

    sub = command("faces", "data/faces --n 12000", "draw faces with known factors, in CelebA's layout")
    sub.add_argument("out", type=Path, metavar="OUT", help="folder to make OUT/celeba in")
    sub.add_argument("--n", type=int, default=12_000, help="how many; default: %(default)s")
    sub.add_argument("--seed", type=int, default=0, help="default: %(default)s")

    sub = command("rooms", "rooms.png", "show what each factor of --data rooms changes")
    sub.add_argument("out", type=Path, metavar="OUT", help="the picture to write, a .png file")
    sub.add_argument("--seed", type=int, default=0, help="chooses other rooms; default: %(default)s")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 no error, 1 damaged files or a failed write, 2 input that cannot be used."""

    def run() -> int:
        options = _parser().parse_args(argv)  # looks for the user's cache folder
        from bvae import data_tasks  # torch takes seconds, which --help need not

        return call(data_tasks.TASKS[options.command], options)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
