"""The processes of a torchrun job, one per GPU: rank, world size and collective operations."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from bvae.errors import UsageError, say_once

START_TIMEOUT = timedelta(minutes=5)  # for the last rank to start
TIMEOUT = timedelta(minutes=30)  # of a collective operation: one rank may decode the data meanwhile
_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Distributed:
    """This process among `world_size` of them. All ranks must call each method at the same point."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which logs and writes."""
        return self.rank == 0

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace float tensors by their sums over the ranks."""
        self._all_reduce(tensors, 1)

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        """Replace float tensors by their means over the ranks."""
        self._all_reduce(tensors, self.world_size)

    def _all_reduce(self, tensors: Sequence[Tensor], divisor: int) -> None:
        """One all_reduce for all tensors."""
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= divisor
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. This blocks the host, not the device."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(int(flag))  # on the host
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        self.any_rank(False)

    def close(self) -> None:
        """Leave the job when all ranks are done; otherwise the others would see a broken connection."""
        if self.world_size > 1:
            self.barrier()
            dist.destroy_process_group()


def init_distributed(device: torch.device) -> Distributed:
    """Join the job if torchrun started this process, and select its GPU; else a world size of one.

    Raises:
        ValueError: torchrun's variables are incomplete, there are fewer GPUs than processes, or the other
            ranks cannot be reached.
    """
    if "WORLD_SIZE" not in os.environ:
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
        if tasks not in ("", "1"):
            say_once(
                f"SLURM has {tasks} tasks, and this run is a single process: processes that srun started "
                "train each for itself; for one run on all of them start one torchrun per node"
            )
        return Distributed()
    missing = [name for name in _SET_BY_TORCHRUN if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is set, but not {' and '.join(missing)}: start with torchrun, "
            "or unset WORLD_SIZE to train in one process"
        )
    rank, world_size, local_rank = (int(os.environ[name]) for name in _SET_BY_TORCHRUN[:3])
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"more processes than GPUs: local rank {local_rank}, but {torch.cuda.device_count()} GPUs on "
                f"this machine: torchrun --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local_rank)
    if world_size == 1:
        return Distributed()
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        store.set_timeout(TIMEOUT)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UsageError(f"rank {rank} could not connect to the others at {address}: {error}") from None
    return Distributed(rank, world_size, local_rank)


def silence_other_ranks() -> None:
    """Let only rank 0 print and draw progress bars; all ranks may write to stderr."""
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        os.environ["TQDM_DISABLE"] = "1"


def rank_suffix() -> str:
    """The rank of this process, for error messages; empty if there is only one process."""
    rank = os.environ.get("RANK")
    return f" in rank {rank}" if rank and os.environ.get("WORLD_SIZE", "1") != "1" else ""


def lost_connection(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another rank has ended."""
    return isinstance(error, dist.DistError) or "Connection" in str(error) or "gloo" in str(error)


def exit_process(status: int) -> NoReturn:
    """End this process. In a job of several, skip Python's finalization: gloo's threads abort the process if
    they end late (pytorch #190489)."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(status)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)
