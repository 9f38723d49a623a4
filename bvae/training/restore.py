"""Continue a run from its newest checkpoint, all of which is compared with the run before any is used.

A run folder may be a stranger's, and a fused update trusts the shapes of its state.
"""

import math
import reprlib
from typing import Any

import torch

from bvae.errors import UsageError
from bvae.training import checkpoint, conditions
from bvae.training.optimizer import load_state
from bvae.training.run import Run
from bvae.weights import difference

LONGEST = 200  # characters of a version or another condition
MOST = 50  # of them


def restore(run: Run, accept_changed_images: bool = False) -> None:
    """Load the newest checkpoint of the run's folder, and say so if the run cannot go on bit for bit.

    Args:
        accept_changed_images: continue although the images have other pixels than at the checkpoint.

    Raises:
        UsageError: there is no checkpoint, it is damaged or of another run, or the data have changed.
        OSError: it cannot be read.
    """
    # Each part copies its tensors to its own device; Adagrad's step count is on the host, even on a GPU.
    assert run.out
    state = checkpoint.load_newest(run.out / checkpoint.FOLDER, torch.device("cpu"))
    with checkpoint.of_another_kind(run.out):
        check_types(state)
    _check_data(run, state, accept_changed_images)
    if state["step"] > run.steps:
        raise UsageError(
            f"{run.out} is at step {state['step']} already, beyond the {run.steps} requested: "
            "raise --epochs or --max-steps"
        )
    with checkpoint.of_another_kind(run.out):
        _load(run, state)
    saved = {**state.get("versions", {}), **state.get("conditions", {})}
    now = {**checkpoint.versions(), **(run.conditions if "conditions" in state else {})}
    if changed := conditions.difference(saved, now):
        print(changed, flush=True)


def check_types(state: dict[str, Any]) -> None:
    """Raise UsageError if a plain value is missing, or is none of its kind. Older checkpoints lack some."""
    kinds = {"images": int, "files": str, "pixels": str, "due": bool, "versions": dict, "conditions": dict}
    for name, kind in kinds.items():
        if (name in state or name == "images") and type(state.get(name)) is not kind:
            raise UsageError(f"{name} is {reprlib.repr(state.get(name))}")
    for name in ("versions", "conditions"):
        if len(state.get(name, {})) > MOST:
            raise UsageError(f"{name} is {reprlib.repr(state[name])}")
        for text in (text for pair in state.get(name, {}).items() for text in pair):
            if not (isinstance(text, str) and len(text) <= LONGEST and text.isprintable()):
                raise UsageError(f"{name} holds {reprlib.repr(text)}")


def _check_data(run: Run, state: dict[str, Any], accept_changed_images: bool) -> None:
    if state["images"] != run.train.count:
        raise UsageError(
            f"{run.out}: the dataset now has {run.train.count} images ({state['images']} at the "
            "checkpoint): cannot resume deterministically"
        )
    if state.get("files", run.listing) != run.listing:
        raise UsageError(
            f"{run.out}: the dataset's files now have other names or another order: cannot resume "
            "deterministically"
        )
    if run.pixels and state.get("pixels", run.pixels) not in (run.pixels, ""):
        if not accept_changed_images:
            raise UsageError(
                f"{run.out}: the images have the same names as at the checkpoint and other pixels: put the "
                "old ones back, or continue with these: --accept-changed-images"
            )
        print("other pixels than at the checkpoint: not bit for bit as without a stop", flush=True)


def _load(run: Run, state: dict[str, Any]) -> None:
    """Compare the tensors with fresh ones, and copy them. Raises UsageError."""
    for name, module in (("model", run.model), ("loss", run.loss)):
        if not isinstance(state.get(name), dict):
            raise UsageError(f"it holds no {name}")
        if reason := difference(state[name], module.state_dict()):
            raise UsageError(f"the {name}: {reason}")
    if run.step.penalty is not None:
        discriminator = state.get("discriminator")
        if not isinstance(discriminator, dict):
            raise UsageError("it holds no discriminator")
        if reason := difference(discriminator, run.step.penalty.state_dict()):
            raise UsageError(f"the discriminator: {reason}")
    load_state(run.optimizer, state.get("optimizer"), state["step"])
    if optimizer := run.step.discriminator_optimizer:
        load_state(optimizer, state.get("discriminator_optimizer"), state["step"])
    run.model.load_state_dict(state["model"])
    run.loss.load_state_dict(state["loss"])
    if run.step.penalty is not None:
        run.step.penalty.load_state_dict(state.get("discriminator", {}))
    _load_scaler(run.step.scaler, state.get("scaler"))
    run.done = state["step"]
    run.due = state.get("due", False)
    run.step.restore(run.done)


def _load_scaler(scaler: torch.amp.GradScaler, saved: Any) -> None:
    """Load the scale, and the steps since it last changed. Empty: of a run without float16."""
    if not isinstance(saved, dict):
        raise UsageError("it holds no scaler")
    if not (saved and scaler.is_enabled()):
        return
    fresh = scaler.state_dict()
    scale, steps = saved.get("scale"), saved.get("_growth_tracker")
    if type(scale) is not float or not 0 < scale < math.inf:
        raise UsageError(f"the scaler's scale is {reprlib.repr(scale)}")
    if type(steps) is not int or not 0 <= steps <= fresh["growth_interval"]:
        raise UsageError(f"the scaler's growth tracker is {reprlib.repr(steps)}")
    scaler.load_state_dict({**fresh, "scale": scale, "_growth_tracker": steps})
