"""PyTorch-VAE's training from JPEG files: PIL, torchvision's transforms, DataLoader, loop."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from bench.reference_step import PyTorchVAE, PyTorchVAEStep
from bvae.config import Config
from bvae.pipelines.decoder import cores


class Files(Dataset):
    """Image files, read with PIL and transformed."""

    def __init__(self, files: Sequence[str], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.files[i]) as image:
            return self.transform(image.convert("RGB"))


def train(files: Sequence[str], config: Config, device: torch.device, crop: int = 148) -> list[float]:
    """Train on all `files` with a resolved configuration of loss B; return the MSE of every step."""
    transform = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.CenterCrop(crop),
            v2.Resize(config.data.image_size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    training, objective = config.training, config.objective
    loader = DataLoader(
        Files(files, transform),
        training.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=cores(),
        pin_memory=device.type == "cuda",
    )
    model = PyTorchVAE(config.model.latent_dim, config.model.hidden_dims, config.data.image_size).to(device)
    numbers: dict[str, Any] = {"kl_weight": objective.kl_weight, "capacity_iters": objective.capacity_iters}
    step = PyTorchVAEStep(
        model, gamma=objective.gamma, max_capacity=objective.max_capacity, lr=training.lr, **numbers
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(step.optimizer, training.lr_gamma)
    errors = []
    for _ in range(training.epochs):
        for images in loader:
            errors.append(step(images.to(device))[1])
        schedule.step()
    return errors
