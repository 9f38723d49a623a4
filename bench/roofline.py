"""The lower bounds of a training step's cost, from the model's own modules, and how near the records come.

    python -m bench.roofline                                    PyTorch-VAE's network, and the records
    python -m bench.roofline --latent-dim 10 --hidden-dims 32 64 --image-size 128 --batch 64 --itemsize 4
    python -m bench.roofline --arch locatello --channels 1 --latent-dim 10 --batch 64

Arithmetic is counted by running the model on meta tensors. Memory traffic is counted in passes over each
tensor; weights and Adam count once per step. Two floors:

    fused   what torch.compile can reach: BatchNorm and LeakyReLU are one kernel for the statistics and one
            for the rest, each way; a convolution reads its operands and writes its result
    ideal   the statistics are part of the convolution before, the normalisation is part of the one after, and
            both gradients of a convolution share a read
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.record import latest, rows
from bvae.model import BetaVAE

WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
ADAM = 28  # bytes per parameter: it and both moments read and written, its gradient read; all float32


@dataclass(frozen=True)
class Cost:
    """A training step's arithmetic and traffic."""

    parameters: int
    forward_flop: int  # per image
    flop: int  # per image, forward and backward
    fused_bytes: int  # per image, at the floors above
    ideal_bytes: int
    weight_bytes: int  # per step
    launches: int  # kernels per step at the fused floor

    def bytes_per_step(self, batch: int, floor: str = "fused") -> int:
        """Memory traffic of a step; floor is 'fused' or 'ideal'."""
        return batch * (self.fused_bytes if floor == "fused" else self.ideal_bytes) + self.weight_bytes

    def seconds(self, batch: int, copy_bytes_per_s: float, flop_per_s: float, floor: str = "fused") -> float:
        """The step's least time on a machine with these rates: that of its traffic or of its arithmetic."""
        traffic = self.bytes_per_step(batch, floor) / copy_bytes_per_s
        return max(traffic, batch * self.flop / flop_per_s)


def _flop(model: BetaVAE) -> tuple[int, int]:
    """FLOP per image: forward, and forward with backward. Counted with two images, as BatchNorm needs."""
    x = torch.empty(2, *model.input_shape, device="meta")
    with FlopCounterMode(display=False) as forward:
        mu, log_var = model.encode(x)
        recon = model.decode_raw(mu + log_var)
    with FlopCounterMode(display=False) as backward:
        recon.sum().backward()
    forward_flop, backward_flop = forward.get_total_flops() // 2, backward.get_total_flops() // 2
    return forward_flop, forward_flop + backward_flop


def _sizes(model: BetaVAE) -> list[tuple[nn.Module, int, int]]:
    """Every layer with weights or statistics, and the elements per image that it reads and writes."""
    sizes: list[tuple[nn.Module, int, int]] = []

    def add_size(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append((module, inputs[0][0].numel(), output[0].numel()))

    hooks = [
        module.register_forward_hook(add_size)
        for module in model.modules()
        if isinstance(module, (*WEIGHTED, nn.BatchNorm2d))
    ]
    mu, log_var = model.encode(torch.empty(2, *model.input_shape, device="meta"))
    model.decode_raw(mu + log_var)
    for hook in hooks:
        hook.remove()
    return sizes


def cost(config: dict[str, Any], itemsize: int = 2) -> Cost:
    """The cost of `BetaVAE(**config)` with activations of `itemsize` bytes, weights in float32 and Adam.

    Args:
        config: BetaVAE's arguments.
        itemsize: 2 in mixed precision, which also casts the weights and their gradients; 4 in float32.
    """
    with torch.device("meta"):
        model = BetaVAE(**config)
    layers = _sizes(model)
    pixels = torch.Size(model.input_shape).numel()
    # uint8 read, scaled and written; raw output and target read, its gradient written; the latents' few
    fused = ideal = pixels * (1 + itemsize) + pixels * (2 * itemsize + 1) + 8 * model.latent_dim * itemsize
    launches = 6  # scaling; latents and loss, forward and backward; Adam
    for position, (module, read, written) in enumerate(layers):
        if isinstance(module, nn.BatchNorm2d):
            # forward: read, read, write; backward: two tensors read, two read, one written. At the ideal
            # floor, between convolutions, it costs nothing.
            fused += 8 * written * itemsize
            launches += 4
            continue
        first = position == 0  # the images get no gradient
        # forward: read, write; input's gradient: read, write; weights' gradient: two read
        passes = read + written + (0 if first else written + read) + written + read
        fused += passes * itemsize
        # forward: read, write; gradient and output read once for both gradients, the input's written
        normed = position + 1 < len(layers) and isinstance(layers[position + 1][0], nn.BatchNorm2d)
        ideal += itemsize * (
            read + written + written + (written if normed else 0) + read + (0 if first else read)
        )
        launches += 2 if first else 3
    parameters = sum(p.numel() for p in model.parameters())
    # forward and the inputs' gradients read the weights, the weights' gradients are written; mixed precision
    # reads and writes each of them once more, to cast it
    touched = 3 * itemsize + (2 * (4 + itemsize) if itemsize < 4 else 0)
    forward_flop, flop = _flop(model)
    return Cost(parameters, forward_flop, flop, fused, ideal, parameters * (ADAM + touched), launches)


def floor_seconds(result: dict[str, Any], rates: dict[str, float]) -> float | None:
    """The fused floor of a record's result on its machine; None if it has none."""
    facts = result["facts"]
    if "bytes" in facts:
        return facts["bytes"] / rates["copy_bytes_per_s"]
    if "model" in facts:
        dtype = facts["dtype"]
        total = cost(facts["model"], 4 if dtype == "float32" else 2)
        return total.seconds(facts["images"], rates["copy_bytes_per_s"], rates[f"{dtype}_flop_per_s"])
    return None


def share(row: dict[str, Any]) -> float | None:
    """The floor over the measured time; above 1 if a cache holds data that the floor reads from memory."""
    floor = floor_seconds(row, row["rates"])
    return floor and floor / busy_seconds(row["timings"][row["hero"]])


def busy_seconds(timing: dict[str, Any]) -> float:
    """Seconds of a call: on a GPU without the gaps between kernels, else wall time."""
    return timing["device_seconds"] or timing["seconds"][0]


def _print_record(record: dict[str, Any]) -> None:
    print(f"\n{record['machine']['device']}, {record['date'][:10]}, commit {record['commit']}")
    for row in rows(record):
        ratio = share(row)
        if ratio is not None:
            name = f"{row['group']}: {row['name']}"
            print(f"  {name:66}{row['hero']:>10}{ratio:8.0%} of the floor's rate")


def main(
    latent_dim: int = 128,
    hidden_dims: tuple[int, ...] = (32, 64, 128, 256, 512),
    image_size: int = 64,
    channels: int = 3,
    batch: int = 144,
    itemsize: int = 2,
    arch: str = "pytorch-vae",
) -> None:
    """Print a configuration's costs, and each newest record's share of its floors.

    Args:
        batch: images per step, which share the weights' traffic and the launches.
        itemsize: bytes of an activation: 2 in mixed precision, 4 in float32.
        arch: of the network, as for `bvae.train`.
    """
    config = {
        "arch": arch,
        "in_channels": channels,
        "latent_dim": latent_dim,
        "hidden_dims": hidden_dims,
        "image_size": image_size,
    }
    total = cost(config, itemsize)
    print(f"parameters          {total.parameters:>12}")
    print(
        f"MFLOP per image     {total.forward_flop / 1e6:12.1f} forward, {total.flop / 1e6:.1f} with backward"
    )
    for floor in ("fused", "ideal"):
        print(
            f"MB per image, {floor} {total.bytes_per_step(batch, floor) / batch / 1e6:12.2f} at batch {batch}"
        )
    print(f"MB per step, weights{total.weight_bytes / 1e6:12.1f}")
    print(f"launches per step   {total.launches:>12} = {total.launches / batch:.2f} per image")
    for record in latest():
        _print_record(record)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
