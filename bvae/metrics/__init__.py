"""Measure how well a code separates known factors, and what its posterior holds: arrays in, numbers out.

`score` measures arrays of codes and factors by `mig`, `dci`, `sap`, `modularity`, `explicitness`,
`infomec` and `irs`, which can be called alone; `mig_sampled` takes whole posteriors. `udr` compares models
without factors. `auroc` is for attributes that are not independent. `beta_vae` and `factor_vae` draw their
own observations, with any encoder and any `Sampler`. Protocols and default sizes are those of
disentanglement_lib (Locatello et al. 2019), so that scores can be compared with published ones. All
randomness is a function of `seed`.
"""

from bvae.metrics._auroc import auroc
from bvae.metrics._beta_vae import beta_vae
from bvae.metrics._dci import DCI, Boosting, dci
from bvae.metrics._explicitness import explicitness
from bvae.metrics._factor_vae import factor_vae
from bvae.metrics._infomec import InfoMEC, infomec
from bvae.metrics._irs import irs
from bvae.metrics._mig import mig
from bvae.metrics._mig_sampled import mig_sampled
from bvae.metrics._modularity import modularity
from bvae.metrics._reconstruction import Reconstruction, reconstruction
from bvae.metrics._sap import sap
from bvae.metrics._score import score
from bvae.metrics._ssim import ssim
from bvae.metrics._udr import UDR, udr
from bvae.metrics.posterior import (
    active_units,
    entropy_per_latent,
    gaussian_total_correlation,
    kl_per_latent,
)
from bvae.metrics.sampling import Grid, Sampler, Table

__all__ = [
    "DCI",
    "UDR",
    "Boosting",
    "Grid",
    "InfoMEC",
    "Reconstruction",
    "Sampler",
    "Table",
    "active_units",
    "auroc",
    "beta_vae",
    "dci",
    "entropy_per_latent",
    "explicitness",
    "factor_vae",
    "gaussian_total_correlation",
    "infomec",
    "irs",
    "kl_per_latent",
    "mig",
    "mig_sampled",
    "modularity",
    "reconstruction",
    "sap",
    "score",
    "ssim",
    "udr",
]
