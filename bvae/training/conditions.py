"""What the bits of a run depend on besides its configuration and images: kept in each checkpoint."""

from collections.abc import Mapping

import torch

Conditions = Mapping[str, str]


def conditions(device: torch.device, processes: int, decoder: str) -> dict[str, str]:
    """The conditions here, by name; the packages' versions are apart, see `checkpoint.versions`.

    Args:
        decoder: of images that are decoded again in each epoch, with its version; else empty.
    """
    found = {"processes": str(processes)}
    if device.type == "cpu":
        found["threads"] = str(torch.get_num_threads())
        found["instruction set"] = torch.backends.cpu.get_cpu_capability()
    else:
        found["device"] = torch.cuda.get_device_name(device)
    return {**found, "decoder": decoder} if decoder else found


def difference(saved: Conditions, now: Conditions) -> str | None:
    """How the conditions of a checkpoint differ from those now, in one line; None if they do not.

    >>> print(difference({"threads": "2", "torch": "2.14"}, {"threads": "4", "torch": "2.14"}))
    trained so far with threads 2, now with threads 4: not bit for bit as without a stop
    """
    changed = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if not changed:
        return None
    old, new = (", ".join(f"{name} {each.get(name, 'none')}" for name in changed) for each in (saved, now))
    return f"trained so far with {old}, now with {new}: not bit for bit as without a stop"
