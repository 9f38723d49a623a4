"""From a configuration to the two data sets of a run."""

from pathlib import Path

import torch

from bvae.config import DataConfig
from bvae.pipelines import celeba, faces, folder, torch_decode
from bvae.pipelines.resident import Resident

DRAWN = 12_000  # faces in the data set that ships
DRAWN_ROOT = Path("data/faces")
CELEBA_CROP = 148  # PyTorch-VAE's


def open_data(
    config: DataConfig, batch_size: int, seed: int, device: torch.device
) -> tuple[Resident, Resident]:
    """The training and the validation images, decoded and on the device.

    The faces are drawn first if they are not there yet. Where a partial CelebA has no validation images,
    every tenth training image stands in for them.

    Raises:
        FileNotFoundError, ValueError: no such data, damaged images, or fewer images than a batch.
    """
    root = config.root
    if root is None and config.name != "faces":
        raise ValueError(f"--data {config.name} needs --data-root, the folder that holds the images")
    if root is None:
        root = DRAWN_ROOT
        if not root.exists():
            print(f"drawing {DRAWN} faces into {root}, once", flush=True)
            faces.write(root, n=DRAWN, seed=0)
    source = folder if config.name == "folder" else celeba
    train, valid = source.files(root, "train"), source.files(root, "valid")
    if not valid:
        print(f"{root} holds no validation images: every tenth training image is held out")
        train, valid = [f for i, f in enumerate(train) if i % 10], train[::10]
    if len(train) < batch_size:
        raise ValueError(f"{root} holds {len(train)} training images, fewer than a batch of {batch_size}")

    crop = config.crop or (None if config.name == "folder" else CELEBA_CROP)
    images = [
        torch_decode.decode(files, crop, config.image_size, config.channels, label).to(device)
        for files, label in ((train, "training images"), (valid, "validation images"))
    ]
    return (
        Resident(images[0], batch_size, seed, train=True, flip=config.flip),
        Resident(images[1], batch_size, seed, train=False, flip=False),
    )
