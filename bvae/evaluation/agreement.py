"""UDR of the runs of a sweep: how far models that differ in their seed alone agree in their latents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bvae.evaluation import measure
from bvae.evaluation.options import Protocol
from bvae.metrics import udr
from bvae.model import BetaVAE


def add_udr(
    runs: Sequence[Path], results: Sequence[dict[str, Any]], protocol: Protocol, device: torch.device
) -> None:
    """Add the UDR of each run to its scores.

    Args:
        runs: 2 or more run folders.
        results: of their evaluations.
    """
    codes = []
    for run in runs:
        model = BetaVAE.from_pretrained(run).to(device)
        truth = measure.open_truth(run, protocol, model, device)
        codes.append(measure.encode(model, truth, measure.sample_numbers(truth, protocol.points), device))
    scores = udr(codes, [result["model"]["kl_per_latent"] for result in results]).scores
    for result, score in zip(results, scores.tolist(), strict=True):
        result["scores"]["udr"] = {"mean": score}
