"""One process of a job in which ranks see other times: what each trains with, one line for each start.

torchrun --nproc-per-node 2 tests/race_worker.py IMAGES OUT
"""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from fake_race import COMPILER, OURS, fake_clock, race_on_a_cpu
from tiny import FIT

from bvae import network_ops
from bvae.config import Config, override
from bvae.kernels import launch
from bvae.training import setup
from bvae.training.distributed import exit_process, init_distributed


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


if __name__ == "__main__":
    images, out = map(Path, sys.argv[1:])
    device = torch.device("cpu")
    distributed = init_distributed(device)
    folder = out / str(distributed.rank)  # rank 0 alone keeps times
    options = {name: value for name, value in FIT.items() if name != "device"}
    options |= {"data_root": images, "cache_dir": folder, "compile": False, "network_kernels": "auto"}
    lines = []
    # The ranks' times differ; then there are times of rank 0; then, for another step, one rank fails.
    for accumulate, fails in ((1, False), (1, False), (2, True)):
        config = override(Config(), {**options, "image_size": 32, "accumulate": accumulate})
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
            race_on_a_cpu(patch)
            clocks = fake_clock(patch, OURS if distributed.is_main else COMPILER)
            if fails and not distributed.is_main:
                patch.setattr(network_ops, "batch_norm_leaky_relu", out_of_memory)
            stack.enter_context(setup.switches(config.training, device))
            run = setup.prepare(config, None, device, distributed)
            chosen = run.config.training.network_kernels
            lines.append(f"{chosen}, {launch.NETWORK}, {len(clocks)} races")
    (folder / "lines.txt").write_text("\n".join(lines))
    distributed.close()
    exit_process(0)
