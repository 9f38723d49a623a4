"""How far a code takes known factors of variation apart, and what its posterior holds.

`score` rates arrays of codes and factors; `beta_vae` and `factor_vae` draw their own observations, from any
encoder and any `sampling.Sampler`. Protocols and default sizes are those of disentanglement_lib (Locatello et
al. 2019), so that scores can be held against published ones. All randomness is a function of `seed`.
"""

from bvae.metrics.beta_vae_score import beta_vae
from bvae.metrics.factor_vae_score import factor_vae
from bvae.metrics.score import score

__all__ = ["beta_vae", "factor_vae", "score"]
