"""`bvae train ...` is the same as `python -m bvae.train ...`, and so on for all commands."""

import runpy
import sys

from bvae import __version__
from bvae.command_line import nearest

COMMANDS = {
    "train": "train a beta-VAE",
    "evaluate": "measure a trained model",
    "sample": "draw new images from a trained model",
    "traverse": "walk along a model's latents and show what each does",
    "explore": "write a page with a slider for each latent",
    "compare": "show one factor on several models, side by side",
    "infogan": "train an InfoGAN, to compare a VAE with",
    "export": "write a model's encoder and decoder as ONNX and .pt2",
    "sweep": "train a grid with several seeds, and evaluate all of it",
    "data": "check, decode, list and remove data sets",
    "doctor": "report what works on this machine",
}
USAGE = "usage: bvae COMMAND ...    (bvae COMMAND --help lists its options)\n\n"


def main() -> int:
    """Run the command that is named first. Exit status: the command's; 2 if there is no such command."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE + "\n".join(f"  {command:<10}{text}" for command, text in COMMANDS.items()))
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or f": commands: {', '.join(COMMANDS)}"
        print(f"error: bvae has no command {name}{hint}", file=sys.stderr)
        return 2
    sys.argv[1:] = arguments
    runpy.run_module(f"bvae.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
