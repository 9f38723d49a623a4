"""Translate PyTorch-VAE's YAML configurations, in the older and the newer dialect, into ours."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bvae.errors import UsageError

_SECTIONS = ("model_params", "data_params", "exp_params", "trainer_params", "logging_params")

# PyTorch-VAE's key -> our "section.key". None: an option of Lightning or the DataLoader, not used here.
_KEYS: dict[str, str | None] = {
    "model_params.in_channels": "data.channels",
    "model_params.latent_dim": "model.latent_dim",
    "model_params.hidden_dims": "model.hidden_dims",
    "model_params.loss_type": "objective.loss_type",
    "model_params.beta": "objective.beta",
    "model_params.gamma": "objective.gamma",
    "model_params.max_capacity": "objective.max_capacity",
    "model_params.Capacity_max_iter": "objective.capacity_iters",
    "data_params.data_path": "data.root",
    "data_params.train_batch_size": "training.batch_size",
    "data_params.val_batch_size": None,
    "data_params.patch_size": "data.image_size",
    "data_params.num_workers": None,
    "data_params.pin_memory": None,
    "exp_params.dataset": "data.name",
    "exp_params.data_path": "data.root",
    "exp_params.img_size": "data.image_size",
    "exp_params.batch_size": "training.batch_size",
    "exp_params.LR": "training.lr",
    "exp_params.weight_decay": "training.weight_decay",
    "exp_params.scheduler_gamma": "training.lr_gamma",
    "exp_params.kld_weight": "objective.kl_weight",
    "exp_params.manual_seed": "training.seed",
    "trainer_params.gpus": None,
    "trainer_params.max_nb_epochs": "training.epochs",
    "trainer_params.max_epochs": "training.epochs",
    "logging_params.manual_seed": "training.seed",
}
_NETWORKS = {"BetaVAE": {}, "VanillaVAE": {"loss_type": "VAE"}}


def is_dialect(config: Mapping[str, Any]) -> bool:
    """Whether a YAML mapping has PyTorch-VAE's sections."""
    return any(section in config for section in _SECTIONS)


def translate(config: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str], Path | None]:
    """Translate a PyTorch-VAE configuration into ours.

    Keys that are missing, or null, have our defaults, not PyTorch-VAE's.

    Returns:
        our sections; the keys that have no counterpart here; the run folder `save_dir/name`, if named.

    Raises:
        ValueError: an unknown key (with the nearest one), or a network other than BetaVAE and VanillaVAE.
    """
    options: dict[str, Any] = {}
    for section, values in config.items():
        if section not in _SECTIONS:
            raise unknown_key(section, _SECTIONS)
        if not isinstance(values or {}, Mapping):
            raise UsageError(f"{section} must be a section of keys, got {brief(values)}")
        options.update(
            {f"{section}.{key}": value for key, value in (values or {}).items() if value is not None}
        )
    for key in ("model_params.name", "logging_params.save_dir", "logging_params.name"):
        if not isinstance(options.get(key, ""), str):
            raise UsageError(f"{key} must be text, got {brief(options[key])}")

    network = options.pop("model_params.name", "BetaVAE")
    if network not in _NETWORKS:
        raise UsageError(f"model_params.name: {network} is not trained here, only {' and '.join(_NETWORKS)}")
    save_dir, name = options.pop("logging_params.save_dir", None), options.pop("logging_params.name", None)
    out = Path(save_dir or "runs") / (name or network) if save_dir or name else None

    # PyTorch-VAE trains on CelebA by default.
    ours: dict[str, dict[str, Any]] = {"data": {"name": "celeba"}, "objective": dict(_NETWORKS[network])}
    unused = []
    for key, value in options.items():
        if key not in _KEYS:
            raise unknown_key(
                key, [*_KEYS, "model_params.name", "logging_params.name", "logging_params.save_dir"]
            )
        target = _KEYS[key]
        if target is None:
            unused.append(key)
        else:
            section, field = target.split(".")
            ours.setdefault(section, {})[field] = value
    return ours, unused, out


def brief(value: object) -> str:
    """A short form of a value for messages: a few lines of YAML can expand to billions of values."""
    shown = reprlib.Repr()
    shown.maxlevel, shown.maxstring, shown.maxother = 2, 100, 100
    return shown.repr(value)


def unknown_key(key: object, names: Iterable[str]) -> UsageError:
    """The error for a mistyped key; it names the nearest one."""
    names = list(names)
    nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
    return UsageError(
        f"unknown key '{key}'"
        + (f", did you mean '{nearest[0]}'?" if nearest else f"; known: {', '.join(names)}")
    )
