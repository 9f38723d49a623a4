"""Join the explorer: page, script, style, and models with their weights, in one HTML file."""

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bvae import files
from bvae.errors import UsageError
from bvae.explorer.layers import export
from bvae.model import BetaVAE
from bvae.plots import most_visible, traverse
from bvae.training.validation import active_latents

NAME = "explorer.html"
STARTS = 8  # held-out images to start from
FILES = {"page": "page.html", "style": "style.css", "decoder": "decoder.js", "script": "page.js"}


class Shown(NamedTuple):
    """A model to show."""

    name: str
    model: BetaVAE
    kl: Sequence[float] | None  # nats per latent; None: not known


def write(path: Path, shown: Sequence[Shown], images: Tensor | None) -> None:
    """Write the page. Leaves the models in evaluation mode.

    Args:
        path: of the HTML file.
        shown: one model, or two to compare.
        images: held-out images to start from, uint8 [N, H, W, C]. None: each model starts from z = 0.

    Raises:
        UsageError: a decoder that is not a row of plain layers, or models of different images.
        OSError: the file cannot be written.
    """
    first = shown[0].model
    for each in shown[1:]:
        if each.model.input_shape != first.input_shape:
            raise UsageError(
                f"{each.name} has images of {list(each.model.input_shape)} and {shown[0].name} of "
                f"{list(first.input_shape)}: they do not fit side by side"
            )
    starts = None if images is None else images[:STARTS].cpu()
    models = [_describe(each, starts) for each in shown]
    data = {
        "images": [] if starts is None else [_png(image) for image in starts.expand(-1, -1, -1, 3)],
        "start": 0 if starts is None else int(np.linalg.norm(models[0]["codes"], axis=1).argmin()),  # typical
        "models": models,
    }
    files.write_text(path, join(data))


def join(data: Mapping[str, Any]) -> str:
    """The whole page, from what `write` puts into it as JSON: `images`, `start` and `models`."""
    folder = resources.files("bvae.explorer")
    parts = {name: (folder / file).read_text("utf-8") for name, file in FILES.items()}
    parts["title"] = html.escape(" and ".join(model["name"] for model in data["models"]))
    text = json.dumps(data, separators=(",", ":"))
    parts["data"] = text.replace("<", "\\u003c")  # `</script>` would end it
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], parts["page"])


@torch.no_grad()
def _describe(shown: Shown, starts: Tensor | None) -> dict[str, Any]:
    """What the page knows of a model."""
    model = shown.model.eval()
    device = model.head.weight.device
    try:
        exported = export(model)
    except UsageError as error:
        raise UsageError(f"{shown.name}: {error}") from None
    codes: list[list[float]] = []
    if starts is not None:
        codes = model.encode(starts.permute(0, 3, 1, 2).to(device))[0].tolist()
    if shown.kl is None:
        z = torch.zeros(1, model.latent_dim, device=device)
        walks = traverse(model, z, range(model.latent_dim), torch.linspace(-3, 3, 5))
        latents: list[dict[str, Any]] = [
            {"index": i, "kl": None} for i in most_visible(walks, model.latent_dim)
        ]
    else:
        kl = np.asarray(shown.kl)
        chosen = active_latents(shown.kl)
        order = np.argsort(-kl, kind="stable")
        latents = [{"index": int(i), "kl": round(float(kl[i]), 4)} for i in order if chosen[i]]
    return {
        "name": shown.name,
        "latent_dim": model.latent_dim,
        "size": model.input_shape[1],
        "low": model.pixel_range[0],
        "latents": latents,
        "codes": [[round(value, 5) for value in code] for code in codes],
        "layers": exported.layers,
        "weights": base64.b64encode(exported.weights.numpy().astype("<f2").tobytes()).decode(),
    }


def _png(image: Tensor) -> str:
    """A uint8 image [H, W, 3] as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
