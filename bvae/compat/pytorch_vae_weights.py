"""PyTorch-VAE's BetaVAE checkpoints, in both directions.

PyTorch-VAE keeps a bias in every convolution before a BatchNorm. BatchNorm subtracts the batch's mean and the
bias with it, so in training the bias has no effect. In evaluation BN(conv + b) with mean m is BN(conv) with
mean m - b: import subtracts the bias from the running mean; export writes zeros.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bvae.compat import inert_pickle
from bvae.errors import MissingError, UsageError
from bvae.paths import expand

MARK = "fc_mu.weight"  # a name that every such network has
MAPPINGS = 100_000  # values that are looked at


def load(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A PyTorch-VAE checkpoint as `BetaVAE`'s arguments and its state dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint of that network.
    """
    path = expand(path)
    if not path.exists():
        raise MissingError(f"no checkpoint at {path}")
    state = _find_state(inert_pickle.load(path), path)
    for name, value in state.items():
        if not value.isfinite().all():
            raise UsageError(f"{path}: {name} is NaN or infinite: take a checkpoint from before the loss was")
    try:
        depth = len({name.split(".")[1] for name in state if name.startswith("encoder.")})
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
    except KeyError as error:
        raise UsageError(f"{path} is not a PyTorch-VAE BetaVAE checkpoint: it lacks {error}") from None
    except (AttributeError, IndexError, TypeError, ValueError):
        raise UsageError(f"{path} is not a PyTorch-VAE BetaVAE checkpoint") from None


def _find_state(loaded: Any, path: str | Path) -> dict[str, Tensor]:
    """The network's state dict, under any prefix and in any wrapper; UsageError if there is none."""
    mappings, module = [loaded], None
    for mapping in mappings:  # grows: the mappings in it come last
        if isinstance(mapping, inert_pickle.Inert) and mapping.is_module:
            module = mapping
        if not isinstance(mapping, dict) or len(mappings) > MAPPINGS:
            continue
        # torch.compile and DataParallel put these into the names.
        tensors = {
            ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module")): value
            for name, value in mapping.items()
            if isinstance(name, str) and isinstance(value, Tensor)
        }
        for name in tensors:
            if name == MARK or name.endswith(f".{MARK}"):
                prefix = name.removesuffix(MARK)
                return {
                    name.removeprefix(prefix): value
                    for name, value in tensors.items()
                    if name.startswith(prefix)
                }
        mappings += mapping.values()
    if module is not None:
        raise UsageError(
            f"{path} holds a whole pickled model ({module.origin}), whose code is not run here: give a file "
            "of its weights, torch.save(model.state_dict(), path)"
        )
    raise UsageError(f"{path} is not a PyTorch-VAE BetaVAE checkpoint: it lacks {MARK}")


def _blocks(depth: int) -> list[tuple[str, str, str]]:
    """(our block, PyTorch-VAE's convolution, its BatchNorm) for every convolution with a BatchNorm."""
    encoder = [(f"encoder.{i}", f"encoder.{i}.0", f"encoder.{i}.1") for i in range(depth)]
    decoder = [(f"decoder.{i}", f"decoder.{i}.0", f"decoder.{i}.1") for i in range(depth - 1)]
    return [*encoder, *decoder, (f"decoder.{depth - 1}", "final_layer.0", "final_layer.1")]


def _import_state(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    imported = {
        f"head.{kind}": torch.cat([state[f"fc_mu.{kind}"], state[f"fc_var.{kind}"]])
        for kind in ("weight", "bias")
    }
    for kind in ("weight", "bias"):
        imported[f"decoder_input.{kind}"] = state[f"decoder_input.{kind}"]
        imported[f"decoder.{depth}.{kind}"] = state[f"final_layer.3.{kind}"]
    for block, conv, norm in _blocks(depth):
        imported[f"{block}.0.weight"] = state[f"{conv}.weight"]
        for name in ("weight", "bias", "running_var", "num_batches_tracked"):
            imported[f"{block}.1.{name}"] = state[f"{norm}.{name}"]
        imported[f"{block}.1.running_mean"] = state[f"{norm}.running_mean"] - state[f"{conv}.bias"]
    return imported


def export_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`BetaVAE.state_dict()` under PyTorch-VAE's names, for its `load_state_dict`."""
    depth = len({name.split(".")[1] for name in state if name.startswith("encoder.")})
    exported: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        exported[f"fc_mu.{kind}"], exported[f"fc_var.{kind}"] = state[f"head.{kind}"].chunk(2)
        exported[f"decoder_input.{kind}"] = state[f"decoder_input.{kind}"]
        exported[f"final_layer.3.{kind}"] = state[f"decoder.{depth}.{kind}"]
    for block, conv, norm in _blocks(depth):
        exported[f"{conv}.weight"] = state[f"{block}.0.weight"]
        exported[f"{conv}.bias"] = torch.zeros_like(state[f"{block}.1.bias"])
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            exported[f"{norm}.{name}"] = state[f"{block}.1.{name}"]
    return exported
