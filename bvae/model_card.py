"""The page of a shared model: data, objective, training, figures, pictures, and how to load it."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bvae import __version__
from bvae.architectures import is_ours
from bvae.opening import TABLE, read_bytes
from bvae.training.records import METRICS, read_records

if TYPE_CHECKING:
    from bvae.config import Config
    from bvae.model import BetaVAE

PICTURES = {
    "traversals.png": "Each row changes one latent from -3 to 3; the rows are those of the highest KL.",
    "reconstructions.png": "Held-out images and their reconstructions.",
    "samples.png": "Samples from the prior.",
}
NOT_STATED = "not stated: ask the author of this model"
# What a user of the model must know of the images. The licences are those of the data's authors.
LICENCES = {
    "faces": "drawn by bvae's own code (Apache-2.0); no photographs",
    "celeba": "CelebA, whose agreement allows non-commercial research only",
    "folder": NOT_STATED,
    "sprites": "drawn by bvae's own code (Apache-2.0), with dSprites' geometry",
    "dsprites": "dSprites, Apache-2.0",
    "rooms": "drawn by bvae's own code (Apache-2.0), with 3D Shapes' factors",
    "shapes3d": "3D Shapes, Apache-2.0",
    "mpi3d": "MPI3D, CC BY 4.0",
    "cars3d": "Cars3D (Reed et al. 2015), which comes without a licence: see its authors' page",
    "smallnorb": "SmallNORB, provided for research; it cannot be sold",
    "memory": NOT_STATED,
}
# Figures of a validation record, in words.
FIGURES = {
    "mse": "MSE per pixel, pixels in {range}",
    "kld": "KL, nats per image",
    "elbo": "ELBO, nats per image",
    "explained_variance": "explained variance of the pixels",
}


def write(model: "BetaVAE", repo_id: str, run: Path | None, data_license: str | None) -> str:
    """The card as Markdown with the Hub's header.

    Args:
        run: the run folder, from which configuration, figures and pictures come. None: the network alone.
        data_license: of the training images, in words. None: what is known of the data set.
    """
    config = _config(run) if run else None
    lines = [*_header(), f"# {repo_id.rpartition('/')[2]}", "", *_summary(model, run), ""]
    lines += [*_loading(model, repo_id), "## Data", "", *_data(config, data_license), ""]
    if config:
        lines += ["## Objective", "", *_table(dataclasses.asdict(config.objective)), ""]
        lines += ["## Training", "", *_table(dataclasses.asdict(config.training)), ""]
    if run:
        lines += _figures(model, run)
        lines += _pictures(run)
    return "\n".join(lines).rstrip() + "\n"


def _config(run: Path) -> "Config | None":
    from bvae import config  # needs PyYAML

    file = run / "config.yaml"
    return config.read(file)[0] if file.is_file() else None


def _header() -> list[str]:
    tags = ["beta-vae", "vae", "disentanglement", "pytorch"]
    keys = ["library_name: bvae", "pipeline_tag: unconditional-image-generation", "tags:"]
    return ["---", *keys, *(f"- {tag}" for tag in tags), "---", ""]


def _summary(model: "BetaVAE", run: Path | None) -> list[str]:
    channels, side, _ = model.input_shape
    colours = "grey" if channels == 1 else "RGB"
    weights = sum(value.numel() for value in model.parameters())
    text = (
        f"A beta-VAE trained with bvae {__version__}: network {model.config['arch']}, {weights:,} "
        f"parameters, {model.latent_dim} latents, {colours} images of {side} x {side} pixels."
    )
    first = next((name for name in PICTURES if run and (run / name).is_file()), None)
    return [text, "", f"![{PICTURES[first]}]({first})"] if first else [text]


def _loading(model: "BetaVAE", repo_id: str) -> list[str]:
    arch = model.config["arch"]
    own = [] if is_ours(arch) else [f"Import the module that registers the network {arch} first.", ""]
    code = [
        "from bvae import BetaVAE  # pip install 'bvae[hub]'",
        "",
        f'model = BetaVAE.from_pretrained("{repo_id}")',
        "pictures = model.to_images(model.sample(8))",
        "mu, log_var = model.encode(model.preprocess(pictures))",
    ]
    return ["## Load", "", *own, "```python", *code, "```", ""]


def _data(config: "Config | None", data_license: str | None) -> list[str]:
    name, licence = (config.data.name, LICENCES[config.data.name]) if config else ("not stated", NOT_STATED)
    rows: dict[str, Any] = {"images": name, "licence of the images": data_license or licence}
    if config:
        data = config.data
        rows |= {"crop": data.crop or "default", "image size": data.image_size, "channels": data.channels}
        rows["mirrored at random"] = data.flip
    return _table(rows)


def _figures(model: "BetaVAE", run: Path) -> list[str]:
    low, high = model.pixel_range
    rows: dict[str, Any] = {}
    valid: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):
        valid = [record for _, record in read_records(run / METRICS) if record.get("split") == "valid"]
    for record in valid[-1:]:
        rows["step"] = record["step"]
        for key, text in FIGURES.items():
            if isinstance(value := record.get(key), int | float):
                rows[text.format(range=f"[{low:g}, {high:g}]")] = f"{value:.4g}"
    lines = ["## Figures", "", "On the validation images:", "", *_table(rows), ""] if rows else []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        result = json.loads(read_bytes(run / "evaluation.json", TABLE))
        scores = {name: f"{score['mean']:.3f}" for name, score in result["scores"].items()}
        if scores:
            lines += [f"Disentanglement, on {result['images']} images:", "", *_table(scores), ""]
    return lines


def _pictures(run: Path) -> list[str]:
    there = [(name, text) for name, text in PICTURES.items() if (run / name).is_file()]
    lines = [part for name, text in there[1:] for part in (f"![{text}]({name})", "", text, "")]
    return ["## Pictures", "", *lines] if lines else []


def _table(rows: Mapping[str, Any]) -> list[str]:
    cells = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return ["| | |", "|---|---|", *cells]
