"""One process of a job: ten steps on its share of every batch of 64; the first writes the weights.

torchrun --nproc-per-node N tests/worker.py OUT.pt float64|float32 adam|muon
"""

import sys

import torch
from torch import nn

from bvae.config import TrainingConfig
from bvae.losses import CapacityLoss
from bvae.model import BetaVAE
from bvae.pipelines.memory_loaders import DeviceLoader
from bvae.training.distributed import exit_process, init_distributed
from bvae.training.optimizer import build_optimizer
from bvae.training.step import TrainingStep

if __name__ == "__main__":
    out, dtype, optimizer = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3]
    distributed = init_distributed(torch.device("cpu"))
    torch.manual_seed(0)
    model = BetaVAE(3, 5, (4, 8), 32).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    step = TrainingStep(
        model,
        CapacityLoss(10.0, 25.0, 10**6, kl_weight=0.01, activation="tanh"),
        build_optimizer(TrainingConfig(optimizer=optimizer, lr=1e-3), model.parameters()),
        seed=3,
        dtype=None,
        compile=False,
        buffer_steps=10,
        clip_grad=0.1,
        distributed=distributed,
    )
    images = torch.randint(256, (320, 32, 32, 3), dtype=torch.uint8)
    share = {"rank": distributed.rank, "world_size": distributed.world_size}
    data = DeviceLoader(images, 64 // distributed.world_size, 1, train=True, flip=True, **share)
    for epoch in range(2):
        for batch, _ in data.epoch(epoch):
            step(batch)
    if distributed.is_main:
        torch.save(model.state_dict(), out)
    distributed.close()
    exit_process(0)
