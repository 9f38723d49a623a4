"""A fast beta-VAE trainer, and its fused losses for use in other VAE code.

The names below are imported from their modules at first use, so that `import bvae` does not load torch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "AnnealedBeta",
    "BetaLoss",
    "BetaVAE",
    "CapacityLoss",
    "LossTerms",
    "fit",
    "gaussian_kl",
    "register_architecture",
    "reparam_kl",
    "total_correlation",
    "vae_loss",
]

# In a source tree `kernels/` and `pipelines/` are beside this package, not inside it. Installed, they are
# `bvae.kernels` and `bvae.pipelines`; searching the parent folder too gives them the same names here.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from bvae.architectures import register_architecture
    from bvae.fitting import fit
    from bvae.losses import AnnealedBeta, BetaLoss, CapacityLoss
    from bvae.model import BetaVAE
    from bvae.objective import LossTerms
    from bvae.ops import gaussian_kl, reparam_kl, total_correlation, vae_loss
else:  # hidden from type checkers, which would accept any name
    _MODULES = {
        "AnnealedBeta": "losses",
        "BetaLoss": "losses",
        "BetaVAE": "model",
        "CapacityLoss": "losses",
        "LossTerms": "objective",
        "fit": "fitting",  # not fit.py: importing a module of this name would hide the function
        "gaussian_kl": "ops",
        "register_architecture": "architectures",
        "reparam_kl": "ops",
        "total_correlation": "ops",
        "vae_loss": "ops",
    }

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *_MODULES})
