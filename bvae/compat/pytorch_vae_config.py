"""Translate PyTorch-VAE's YAML configurations, in the older and the newer dialect, into ours."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bvae.errors import UsageError

CLOSE = 0.75  # the share of common letters from which a name is worth a hint
_SECTIONS = ("model_params", "data_params", "exp_params", "trainer_params", "logging_params")

# PyTorch-VAE's key -> our "section.key".
_KEYS = {
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
    "data_params.patch_size": "data.image_size",
    "exp_params.dataset": "data.name",
    "exp_params.data_path": "data.root",
    "exp_params.img_size": "data.image_size",
    "exp_params.batch_size": "training.batch_size",
    "exp_params.LR": "training.lr",
    "exp_params.weight_decay": "training.weight_decay",
    "exp_params.scheduler_gamma": "training.lr_gamma",
    "exp_params.kld_weight": "objective.kl_weight",
    "exp_params.manual_seed": "training.seed",
    "trainer_params.max_nb_epochs": "training.epochs",
    "trainer_params.max_epochs": "training.epochs",
    "trainer_params.max_steps": "training.max_steps",
    "trainer_params.gradient_clip_val": "training.clip_grad",
    "trainer_params.accumulate_grad_batches": "training.accumulate",
    "trainer_params.precision": "training.amp",
    "logging_params.manual_seed": "training.seed",
}
# Read here, but not as one of our keys.
_NAMES = ("model_params.name", "logging_params.save_dir", "logging_params.name", "trainer_params.accelerator")
# Options of Lightning's Trainer and loggers, old and new, of DataLoader, and of other models of PyTorch-VAE.
_NOT_USED = {
    "data_params": """drop_last persistent_workers pin_memory prefetch_factor shuffle test_batch_size
        val_batch_size num_workers""",
    "exp_params": "LR_2 num_workers retrain_first_layer scheduler_gamma_2 submodel",
    "trainer_params": """amp_backend amp_level auto_lr_find auto_scale_batch_size auto_select_gpus barebones
        benchmark callbacks check_val_every_n_epoch checkpoint_callback default_root_dir default_save_path
        detect_anomaly deterministic devices distributed_backend early_stop_callback enable_checkpointing
        enable_model_summary enable_progress_bar fast_dev_run flush_logs_every_n_steps gpus
        gradient_clip_algorithm inference_mode ipus limit_predict_batches limit_test_batches
        limit_train_batches limit_val_batches log_every_n_steps log_gpu_memory log_save_interval logger
        max_time min_epochs min_nb_epochs min_steps model_registry move_metrics_to_cpu
        multiple_trainloader_mode nb_gpu_nodes nb_sanity_val_steps num_nodes num_processes
        num_sanity_val_steps overfit_batches overfit_pct plugins prepare_data_per_node print_nan_grads
        process_position profiler progress_bar_refresh_rate reload_dataloaders_every_epoch
        reload_dataloaders_every_n_epochs replace_sampler_ddp resume_from_checkpoint row_log_interval
        show_progress_bar stochastic_weight_avg strategy sync_batchnorm terminate_on_nan test_percent_check
        tpu_cores track_grad_norm train_percent_check truncated_bptt_steps use_amp use_distributed_sampler
        val_check_interval val_percent_check weights_save_path weights_summary""",
    "logging_params": """create_git_tag debug default_hp_metric description flush_secs log_graph max_queue
        prefix project sub_dir version""",
}
_UNUSED = {f"{section}.{key}" for section, keys in _NOT_USED.items() for key in keys.split()}
_AMP = {"16": True, "16-mixed": True, "bf16": True, "bf16-mixed": True, "32": False, "32-true": False}
_DEVICES: dict[str, Literal["auto", "cpu", "cuda"]] = {
    "auto": "auto",
    "cpu": "cpu",
    "gpu": "cuda",
    "cuda": "cuda",
}
_NETWORKS = {"BetaVAE": {}, "VanillaVAE": {"loss_type": "VAE"}}


def is_dialect(config: Mapping[str, Any]) -> bool:
    """Whether a YAML mapping has PyTorch-VAE's sections."""
    return any(section in config for section in _SECTIONS)


class Translation(NamedTuple):
    """A PyTorch-VAE configuration in our words."""

    sections: dict[str, dict[str, Any]]
    names: dict[str, str]  # our key -> the file's, for messages
    unused: list[str]  # keys that have no counterpart here, some with the reason
    out: Path | None  # the run folder `save_dir/name`, if named
    device: Literal["auto", "cpu", "cuda"] | None  # if named


def translate(config: Mapping[str, Any]) -> Translation:
    """Translate a PyTorch-VAE configuration into ours.

    Keys that are missing, or null, have our defaults, not PyTorch-VAE's.

    Raises:
        ValueError: unknown keys, two keys that disagree, or a network other than BetaVAE and VanillaVAE.
    """
    options: dict[str, Any] = {}
    unknown = [str(section) for section in config if section not in _SECTIONS]
    for section in _SECTIONS:
        values = config.get(section) or {}
        if not isinstance(values, Mapping):
            raise UsageError(f"{section} must be a section of keys, got {brief(values)}")
        options.update({f"{section}.{key}": value for key, value in values.items() if value is not None})
    unknown += [key for key in options if key not in _UNUSED and key not in _KEYS and key not in _NAMES]
    if unknown:
        raise unknown_keys(unknown, [*_SECTIONS, *_KEYS, *_NAMES])
    for key in _NAMES:
        if not isinstance(options.get(key, ""), str):
            raise UsageError(f"{key} must be text, got {brief(options[key])}")

    network = options.pop("model_params.name", "BetaVAE")
    if network not in _NETWORKS:
        raise UsageError(f"model_params.name: {network} is not trained here, only {' and '.join(_NETWORKS)}")
    save_dir, name = options.pop("logging_params.save_dir", None), options.pop("logging_params.name", None)
    out = Path(save_dir or "runs") / (name or network) if save_dir or name else None
    unused = [_with_reason(key, value) for key, value in options.items() if key in _UNUSED]
    options = {key: value for key, value in options.items() if key not in _UNUSED}
    accelerator = options.pop("trainer_params.accelerator", None)
    device = _DEVICES.get(accelerator)
    if accelerator and not device:
        unused.append(f"trainer_params.accelerator {accelerator}")
    _translate_limits(options, unused)
    if isinstance(dataset := options.get("exp_params.dataset"), str):
        options["exp_params.dataset"] = dataset.lower()
    precision = options.get("trainer_params.precision", 32)
    if str(precision) not in _AMP:
        raise UsageError(f"trainer_params.precision must be one of {', '.join(_AMP)}, got {brief(precision)}")
    if "trainer_params.precision" in options:
        options["trainer_params.precision"] = _AMP[str(precision)]

    # PyTorch-VAE trains on CelebA by default.
    ours: dict[str, dict[str, Any]] = {"data": {"name": "celeba"}, "objective": dict(_NETWORKS[network])}
    names: dict[str, str] = {}
    for key, value in options.items():
        section, field = _KEYS[key].split(".")
        if (other := names.get(_KEYS[key])) and value != ours[section][field]:
            raise UsageError(
                f"{other} is {brief(ours[section][field])} and {key} is {brief(value)}: remove one of them"
            )
        names[_KEYS[key]] = key
        ours.setdefault(section, {})[field] = value
    training = ours.get("training", {})
    batch_size, parts = (_whole(training.get(field)) for field in ("batch_size", "accumulate"))
    if batch_size and parts:
        training["batch_size"] = batch_size * parts  # Lightning's is of a part, ours of a step
    return Translation(ours, names, unused, out, device)


def _translate_limits(options: dict[str, Any], unused: list[str]) -> None:
    """Remove Lightning's values for "no limit", and the number of epochs if the number of steps is given."""
    for name in ("max_steps", "max_epochs", "max_nb_epochs"):
        if options.get(f"trainer_params.{name}") == -1:
            del options[f"trainer_params.{name}"]
            unused.append(f"trainer_params.{name} -1")
    if "trainer_params.max_steps" in options:
        for name in ("max_epochs", "max_nb_epochs"):
            if options.pop(f"trainer_params.{name}", None) is not None:
                unused.append(f"trainer_params.{name} (max_steps decides)")
    if options.get("trainer_params.gradient_clip_val") == 0:
        del options["trainer_params.gradient_clip_val"]


def _whole(value: Any) -> int | None:
    """A whole number, which may be text; None for all else, which is refused later."""
    try:
        return int(value) if not isinstance(value, bool) and float(value) == int(value) else None
    except (TypeError, ValueError, OverflowError):
        return None


def _with_reason(key: str, value: Any) -> str:
    """A key that is not used; for several GPUs, with what to do."""
    if key in ("trainer_params.gpus", "trainer_params.devices"):
        count = len(value) if isinstance(value, list) else _whole(value)
        if count and count > 1:
            return f"{key} (for {count} processes start with torchrun --nproc-per-node {count})"
    return key


def brief(value: object) -> str:
    """A short form of a value for messages: a few lines of YAML can expand to billions of values."""
    shown = reprlib.Repr()
    shown.maxlevel, shown.maxstring, shown.maxother = 2, 100, 100
    return shown.repr(value)


def unknown_keys(keys: Sequence[str], names: Iterable[str]) -> UsageError:
    """The error for mistyped keys; it gives a hint for those that differ little from a known one."""
    names = list(names)
    hints = [nearest(key, names) for key in keys]
    shown = [
        f"'{key}'" + (f", did you mean '{hint}'?" if hint else "")
        for key, hint in zip(keys, hints, strict=True)
    ]
    if len(keys) > 1:
        return UsageError(f"unknown keys {'; '.join(shown)}")
    section = keys[0].rpartition(".")[0]
    known = [name for name in names if name.rpartition(".")[0] == section] or names
    return UsageError(f"unknown key {shown[0]}" + ("" if hints[0] else f"; known: {', '.join(known)}"))


def nearest(key: str, names: Iterable[str]) -> str | None:
    """The name whose last part differs little from the key's, in the same section if possible."""
    section, _, last = key.rpartition(".")

    def closeness(name: str) -> tuple[float, bool]:
        own_section, _, own_last = name.rpartition(".")
        return difflib.SequenceMatcher(None, last.lower(), own_last.lower()).ratio(), own_section == section

    best = max(names, key=closeness)
    return best if closeness(best)[0] >= CLOSE else None
