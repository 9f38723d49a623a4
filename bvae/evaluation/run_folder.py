"""Evaluate a run folder: measure its model, and write evaluation.md, .json, .png, and codes.npz."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from bvae import files
from bvae.config import Config
from bvae.device import choose_device
from bvae.errors import UsageError
from bvae.evaluation import quality
from bvae.evaluation.measure import (
    LazyCodes,
    Protocol,
    best_latents,
    compute_statistics,
    information_shares,
    open_truth,
    sample_numbers,
    score_codes,
    trained_config,
)
from bvae.ground_truth import Truth
from bvae.metrics import auroc
from bvae.model import BetaVAE
from bvae.paths import expand
from bvae.plots import heat_map, most_typical, save_traversal, traverse
from bvae.training import malloc
from bvae.training.validation import active_latents

ROWS = 20  # latents in the picture, those of the highest KL


def _spread(half_width: float | None) -> str:
    return "one seed" if half_width is None else f"± {half_width:.3f}"


def markdown(result: Mapping[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [f"| {result['images']} images | mean | 95 % interval |", "|---|---|---|"]
    lines += [
        f"| {name} | {value['mean']:.3f} | {_spread(value['half_width'])} |"
        for name, value in result["scores"].items()
    ]
    lines += [
        f"| AUROC of {name}, by latent {best['latent']} | {best['auroc']:.3f} | |"
        for name, best in result["attributes"].items()
    ]
    plain = {k: v for k, v in result["model"].items() if not k.endswith("per_latent")}
    lines += [
        f"| {name} | {'infinite' if value is None else f'{value:.4g}'} | |" for name, value in plain.items()
    ]
    if figures := result["quality"]:
        for name, value in figures["distances"].items():
            lines.append(f"| FID of {name} | {value['fid']:.2f} | |")
            lines.append(f"| KID of {name} | {value['kid']:.5f} | ± {value['kid_std']:.5f} (subsets) |")
        crop = f"cropped to {figures['crop']}, " if figures["crop"] else ""
        lines += [
            f"| FID, KID: number of images | {figures['images']} | |",
            f"| FID, KID: pixels | {crop}{figures['size']} x {figures['size']}; {figures['resizing']} | |",
            f"| FID, KID: sha256 of {figures['weights']} | {figures['sha256']} | |",
        ]
    lines += [f"| seconds: {name} | {value:.1f} | |" for name, value in result["seconds"].items()]
    return "\n".join(lines) + "\n"


@malloc.kept()
def evaluate(run: Path, protocol: Protocol) -> str:
    """Measure the model of a run folder, write the files, and return the table.

    Raises:
        ValueError, FileNotFoundError: no model, no data with known factors, or a protocol out of range.
    """
    for name in ("seeds", "points"):
        if getattr(protocol, name) < 1:
            raise UsageError(f"--{name} must be positive, got {getattr(protocol, name)}")
    run = expand(run)
    device = choose_device(protocol.device)
    model = BetaVAE.from_pretrained(run).to(device)
    truth = open_truth(run, protocol, model, device)
    # First, because a file that cannot be used should not be reported after minutes.
    extractor = quality.inception(protocol.fid_weights, device) if protocol.fid_weights else None
    trained = trained_config(run)
    variance = (trained or Config()).objective.decoder_variance
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    codes = LazyCodes(model, truth, device)
    all_images = np.arange(len(truth.factors))
    if not truth.independent or protocol.observations >= len(all_images):
        codes(all_images)  # in large batches, since almost all are needed
    drawn = sample_numbers(truth, protocol.points)
    drawn_codes = codes(drawn)
    statistics = compute_statistics(model, truth, drawn, variance, device, with_mig=truth.independent)
    seconds["posterior and reconstruction"] = time.perf_counter() - start - codes.seconds
    kl = statistics["kl_per_latent"]
    active = active_latents(kl)
    if truth.independent:
        scores, importance = score_codes(codes, truth, protocol, active, seconds)
        best = {}
        pictured = {
            "mutual information / entropy of the factor": information_shares(
                drawn_codes, truth.factors[drawn]
            ),
            "importance (DCI)": importance,
        }
    elif truth.names:
        areas = auroc(codes(all_images), truth.factors)
        scores, best = {}, best_latents(areas, truth.names, active)
        pictured = {"|2 AUROC - 1|": np.abs(2 * areas - 1)}
    else:
        scores, best, pictured = {}, {}, {}
    figures = None
    if extractor:
        before = time.perf_counter()
        figures = quality.measure(model, truth, drawn, extractor, device)
        seconds["FID and KID"] = time.perf_counter() - before
    seconds["encoding"] = codes.seconds  # within the others, if few images are encoded
    seconds["in all"] = time.perf_counter() - start

    result = {
        "images": len(truth.factors),
        "factors": truth.names,
        "seeds": protocol.seeds,
        "points": protocol.points,
        "boosting": protocol.boosting,
        "scores": {name: value._asdict() for name, value in scores.items()},
        "attributes": best,
        "model": {k: v if np.isfinite(v).all() else None for k, v in statistics.items()},  # JSON has no inf
        "quality": figures,
        "matrices": {title: matrix.tolist() for title, matrix in pictured.items()},
        "seconds": seconds,
    }
    table = markdown(result)
    files.write_text(run / "evaluation.md", table)
    _write_pictures(run, model, drawn_codes, kl, active, pictured, truth.names)
    _write_codes(run / "codes.npz", drawn, drawn_codes, truth)
    # Last: for a sweep, this file means that the evaluation is complete.
    files.write_text(run / "evaluation.json", json.dumps(result, indent=1) + "\n")
    return table


def _write_pictures(
    run: Path,
    model: BetaVAE,
    codes: NDArray[np.float32],
    kl: Sequence[float],
    active: NDArray[np.bool_],
    matrices: Mapping[str, NDArray[np.float64]],
    factors: Sequence[str],
) -> None:
    """The active latents' rows of the matrices, if the factors are known, and their traversals."""
    shown = sorted(np.flatnonzero(active).tolist(), key=lambda i: -kl[i])[:ROWS]
    labels = [f"latent {i}, {kl[i]:.2f} nats" for i in shown]
    if matrices:
        picture = heat_map({title: matrix[shown] for title, matrix in matrices.items()}, labels, factors)
        files.write_image(run / "evaluation.png", picture)
    typical = most_typical(torch.from_numpy(codes)).to(model.head.weight.device)
    values = torch.linspace(-3, 3, 11)
    labels = [f"latent {i}\nKL {kl[i]:.2f} nats" for i in shown]
    images = traverse(model, typical, shown, values)
    save_traversal(images, labels, values, run / "evaluation_traversals.png")


def _write_codes(path: Path, numbers: NDArray[np.int64], codes: NDArray[np.float32], truth: Truth) -> None:
    def write(file: IO[bytes]) -> None:
        factors, names = truth.factors[numbers], np.array(truth.names)
        np.savez(file, numbers=numbers, mu=codes, factors=factors, names=names)

    files.write(path, write, codes.nbytes)
