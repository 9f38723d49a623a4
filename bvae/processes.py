"""The processes of a job, one per GPU, as torchrun starts them: who we are, and what all of us agree on."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

MEETING = timedelta(minutes=5)  # the longest that the others may wait for one to start
TIMEOUT = timedelta(minutes=30)  # and once they have met: an ingest
_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """This process among `world` of them; each method is called by all at the same place."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on this machine

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace float tensors by their sums over the processes."""
        self._reduce(tensors, 1)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace float tensors by their means over the processes."""
        self._reduce(tensors, self.world)

    def _reduce(self, tensors: Sequence[Tensor], divisor: int) -> None:
        """One all_reduce for all tensors."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= divisor
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])

    def any(self, flag: bool) -> bool:
        """Whether the flag holds on any process; the hosts meet, the devices do not wait."""
        if self.world == 1:
            return flag
        votes = torch.tensor(int(flag))  # on the host
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes)

    def first_says(self, value: Any) -> Any:
        """The first process's value."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)

    def leave(self) -> None:
        """Part when all are done: the others would see a connection break."""
        if self.world > 1:
            self.wait()
            dist.destroy_process_group()


def join(device: torch.device) -> Processes:
    """Meet the other processes if torchrun started this one; else there are none.

    Gives each process its GPU.

    Raises:
        ValueError: torchrun's variables are incomplete, there are fewer GPUs than processes, or the meeting
            fails.
    """
    if "WORLD_SIZE" not in os.environ:
        return Processes()
    missing = [name for name in _SET_BY_TORCHRUN if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is set, {' and '.join(missing)} not: start with torchrun, "
            "or unset WORLD_SIZE to train in one process"
        )
    rank, world, local_rank = (int(os.environ[name]) for name in _SET_BY_TORCHRUN[:3])
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"more processes than GPUs: local rank {local_rank}, but {torch.cuda.device_count()} GPUs on "
                f"this machine: torchrun --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local_rank)
    if world == 1:
        return Processes()
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=MEETING))
        store.set_timeout(TIMEOUT)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(f"rank {rank} could not meet the others at {where}: {error}") from None
    return Processes(rank, world, local_rank)


def speak_first() -> None:
    """Let only the first process print and draw bars; all may write to stderr."""
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        os.environ["TQDM_DISABLE"] = "1"


def who() -> str:
    """Which process an error comes from: nothing where there is only one."""
    rank = os.environ.get("RANK")
    return f" in rank {rank}" if rank and os.environ.get("WORLD_SIZE", "1") != "1" else ""


def lost_the_others(error: RuntimeError) -> bool:
    """Whether an error of an operation among the processes says that another is gone."""
    return isinstance(error, dist.DistError) or "Connection" in str(error) or "gloo" in str(error)


def end(status: int) -> NoReturn:
    """End this process; one of several without Python's finalization, in which gloo's threads, if they are
    slow to end, abort the process (pytorch #190489)."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(status)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)
