"""A fast beta-VAE trainer, and its fused losses as a part that other VAE code can take."""

from pathlib import Path

__version__ = "0.1.0"

# In a source tree `kernels/` and `pipelines/` stand beside this package, not inside it. Installed, they are
# `bvae.kernels` and `bvae.pipelines`; searching the parent folder too gives them the same names here.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))
