"""PyTorch-VAE's files: its BetaVAE checkpoints, read and written, and its YAML dialects, old and new."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# ---- checkpoints -------------------------------------------------------------------------------------------
#
# PyTorch-VAE keeps a bias in every convolution before a BatchNorm. BatchNorm subtracts the batch's mean and
# the bias with it, so in training it does nothing; in evaluation BN(conv + b) with mean m is BN(conv) with
# mean m - b. Import subtracts it from the running mean; export writes zeros.


def load(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A PyTorch-VAE checkpoint as `BetaVAE`'s arguments and its state dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint of that network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no common exception type for files it cannot read
        raise ValueError(f"{path} cannot be read with torch.load(weights_only=True): {error}") from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else {}
    state = {name.removeprefix("model."): value for name, value in state.items()}  # Lightning's prefix

    depth = len({name.split(".")[1] for name in state if name.startswith("encoder.")})
    try:
        widths = [state[f"encoder.{i}.0.weight"].shape[0] for i in range(depth)]
        latent_dim, code = state["fc_mu.weight"].shape
        code_size = round((code / widths[-1]) ** 0.5)
        config = {
            "in_channels": state["encoder.0.0.weight"].shape[1],
            "latent_dim": latent_dim,
            "hidden_dims": widths,
            "image_size": code_size * 2**depth,
        }
        return config, _import_state(state, depth)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path} is not a PyTorch-VAE BetaVAE checkpoint: it lacks {error}") from None


def _blocks(depth: int) -> list[tuple[str, str, str]]:
    """(our block, its convolution there, its BatchNorm there) for every convolution with a BatchNorm."""
    encoder = [(f"encoder.{i}", f"encoder.{i}.0", f"encoder.{i}.1") for i in range(depth)]
    decoder = [(f"decoder.{i}", f"decoder.{i}.0", f"decoder.{i}.1") for i in range(depth - 1)]
    return [*encoder, *decoder, (f"decoder.{depth - 1}", "final_layer.0", "final_layer.1")]


def _import_state(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    ours = {
        f"head.{kind}": torch.cat([state[f"fc_mu.{kind}"], state[f"fc_var.{kind}"]])
        for kind in ("weight", "bias")
    }
    for kind in ("weight", "bias"):
        ours[f"decoder_input.{kind}"] = state[f"decoder_input.{kind}"]
        ours[f"decoder.{depth}.{kind}"] = state[f"final_layer.3.{kind}"]
    for block, conv, norm in _blocks(depth):
        ours[f"{block}.0.weight"] = state[f"{conv}.weight"]
        for name in ("weight", "bias", "running_var", "num_batches_tracked"):
            ours[f"{block}.1.{name}"] = state[f"{norm}.{name}"]
        ours[f"{block}.1.running_mean"] = state[f"{norm}.running_mean"] - state[f"{conv}.bias"]
    return ours


def export_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`BetaVAE.state_dict()` under PyTorch-VAE's names, for its `load_state_dict`."""
    depth = len({name.split(".")[1] for name in state if name.startswith("encoder.")})
    theirs: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        theirs[f"fc_mu.{kind}"], theirs[f"fc_var.{kind}"] = state[f"head.{kind}"].chunk(2)
        theirs[f"decoder_input.{kind}"] = state[f"decoder_input.{kind}"]
        theirs[f"final_layer.3.{kind}"] = state[f"decoder.{depth}.{kind}"]
    for block, conv, norm in _blocks(depth):
        theirs[f"{conv}.weight"] = state[f"{block}.0.weight"]
        theirs[f"{conv}.bias"] = torch.zeros_like(state[f"{block}.1.bias"])
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            theirs[f"{norm}.{name}"] = state[f"{block}.1.{name}"]
    return theirs


# ---- configurations ----------------------------------------------------------------------------------------

_SECTIONS = ("model_params", "data_params", "exp_params", "trainer_params", "logging_params")

# Their key -> ours, "section.key". None: a switch of Lightning or of the DataLoader, without a counterpart.
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
    """Whether a YAML mapping is written in PyTorch-VAE's words."""
    return any(section in config for section in _SECTIONS)


def translate(config: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str], Path | None]:
    """A PyTorch-VAE configuration in our words.

    Returns:
        our sections; the keys that have no counterpart here; the run folder `save_dir/name`, if named.

    Raises:
        ValueError: an unknown key (with the nearest one), or a network other than BetaVAE and VanillaVAE.
    """
    from bvae.config import unknown_key

    given: dict[str, Any] = {}
    for section, values in config.items():
        if section not in _SECTIONS:
            raise unknown_key(section, _SECTIONS)
        given.update({f"{section}.{key}": value for key, value in (values or {}).items()})

    network = given.pop("model_params.name", "BetaVAE")
    if network not in _NETWORKS:
        raise ValueError(f"model_params.name: {network} is not trained here, only {' and '.join(_NETWORKS)}")
    save_dir, name = given.pop("logging_params.save_dir", None), given.pop("logging_params.name", None)
    out = Path(save_dir or "runs") / (name or network) if save_dir or name else None

    # PyTorch-VAE trains on CelebA unless told otherwise.
    ours: dict[str, dict[str, Any]] = {"data": {"name": "celeba"}, "objective": dict(_NETWORKS[network])}
    unused = []
    for key, value in given.items():
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
