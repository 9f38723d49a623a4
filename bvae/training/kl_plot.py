"""The picture of a run's KL per latent against the step: latents switch on one by one as C rises."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bvae import files
from bvae.training.records import METRICS, read_records

NAME = "kl_per_latent.png"
NAMED = 10  # latents in the legend: those of the highest KL at the end


def save(run: Path, latent_dim: int) -> None:
    """Draw the training records of a run folder's log, if there are two that hold the KL per latent.

    As figure 3 of Burgess et al. 2018, "Understanding disentangling in beta-VAE".

    Raises:
        OSError: the log cannot be read, or the picture cannot be written.
    """
    records = [record for _, record in read_records(run / METRICS) if record.get("split") == "train"]
    rows = [row for row in map(_numbers, records) if len(row) == 3 + latent_dim]
    if len(rows) > 1:
        files.write_bytes(run / NAME, _draw(np.stack(rows)))


def _numbers(record: Mapping[str, Any]) -> NDArray[np.float64]:
    """Step, KL, C and the KL per latent: [3 + D]; empty if the record lacks them."""
    try:
        values = [record["step"], record["kld"], record["capacity"], *record["kl_per_dim"]]
        row = np.array(values, float)  # None becomes NaN
    except (KeyError, TypeError, ValueError, OverflowError):  # of another version, or edited
        return np.empty(0)
    return np.where(np.isfinite(row), row, np.nan)


def _draw(rows: NDArray[np.float64]) -> bytes:
    """A PNG: above, the KL of all latents and C; below, the KL of each latent."""
    from matplotlib.figure import Figure  # takes a second

    steps, kl, capacity, *per_latent = rows.T
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(steps, kl, color="black", label="KL")
    if np.nanmax(capacity, initial=0) > 0:
        above.plot(steps, capacity, color="black", linestyle="dashed", linewidth=1, label="C")
    last = np.nan_to_num([curve[-1] for curve in per_latent])
    for place, latent in enumerate(np.argsort(-last).tolist()):
        named = place < NAMED
        label = f"latent {latent}: {last[latent]:.2f}" if named else None
        colour = f"C{place}" if named else "0.8"
        below.plot(steps, per_latent[latent], color=colour, linewidth=1, label=label, zorder=-place)
    above.set(ylabel="KL, nats per image")
    below.set(ylabel="KL per latent, nats per image", xlabel="step", ylim=(0, None))
    above.legend(loc="upper left")
    below.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small", title="nats at the end")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
