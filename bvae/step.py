"""One training step: scale, encode, draw z, decode, loss, gradient, Adam."""

import math
import os
import shutil

import torch
from torch import Tensor

from bvae.losses import BetaLoss, CapacityLoss, LossTerms
from bvae.model import BetaVAE
from bvae.ops import reparam_kl
from bvae.reference import scale_pixels

SCALARS = ("loss", "recon", "kld", "capacity", "mse")


def autocast_dtype(device: torch.device, amp: bool) -> tuple[torch.dtype | None, str]:
    """The dtype of mixed precision on a device, None for float32, and a line that says which and why."""
    if not amp:
        return None, "float32"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bfloat16 autocast"
        return torch.float16, "float16 autocast with a gradient scaler (this GPU has no bfloat16)"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "bfloat16 autocast"
    return (
        None,
        "float32 (--amp has no effect: this CPU has no bfloat16 arithmetic, autocast would be slower)",
    )


def compiles(device: torch.device, wanted: bool) -> tuple[bool, str]:
    """Whether to use torch.compile on a device, and a line that says which and why."""
    if not wanted:
        return False, "eager"
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return False, "eager (torch.compile needs a C++ compiler on a CPU: install g++)"
    return True, "torch.compile"


def pixel_mse(loss: BetaLoss | CapacityLoss, terms: LossTerms, raw: Tensor, target: Tensor) -> Tensor:
    """Squared error per pixel and channel, in the decoder's range, of a loss's terms and arguments."""
    if loss.likelihood == "bernoulli":
        return (torch.sigmoid(raw.detach().float()) - scale_pixels(target, 0.0)).square().mean()
    mse = terms.recon.detach() * 2 * loss.decoder_variance
    return mse if loss.reduction == "mean" else mse / raw[0].numel()


class TrainingStep:
    """Turns uint8 images [B, H, W, C] into one update of the model; never waits for the device.

    The last `len(history)` steps' `SCALARS` stay on the device in `history`, step k in row (k - 1) mod N;
    `kl_per_dim` [latent_dim] is the last batch's KL per latent, in nats.
    """

    def __init__(
        self,
        model: BetaVAE,
        loss: BetaLoss | CapacityLoss,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        dtype: torch.dtype | None,
        compile: bool,
        history: int,
    ) -> None:
        device = next(model.parameters()).device
        self.model, self.loss, self.optimizer, self.dtype = model, loss, optimizer, dtype
        self.seed = torch.tensor(seed, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)  # steps done; keys the noise
        self.history = torch.zeros(history, len(SCALARS), device=device)
        self._read = 0  # steps whose scalars have been checked
        self.kl_per_dim = torch.zeros(model.latent_dim, device=device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self._objective = torch.compile(self.objective, dynamic=False) if compile else self.objective

    def restore(self, step: int) -> None:
        """Go on as if `step` steps had been done."""
        self.step.fill_(step)
        self._read = step

    def read(self, done: int) -> dict[str, float]:
        """The last step's scalars; `done` is the number of steps done. Waits for the device.

        Raises:
            FloatingPointError: a loss since the last call is not finite; names its step.
        """
        rows = self.history.tolist()
        for step in range(self._read + 1, done + 1):
            if not math.isfinite(rows[(step - 1) % len(rows)][0]):
                raise FloatingPointError(f"the loss is {rows[(step - 1) % len(rows)][0]} at step {step}")
        self._read = done
        return dict(zip(SCALARS, rows[(done - 1) % len(rows)], strict=True))

    def objective(self, images: Tensor, step: Tensor) -> tuple[LossTerms, Tensor, Tensor]:
        """Loss terms, MSE per pixel and KL per latent of uint8 images [B, H, W, C]."""
        target = images.permute(0, 3, 1, 2)
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            mu, log_var = self.model.encode(scale_pixels(target, self.loss.pixel_range[0]))
            z, kl, kl_per_dim = reparam_kl(mu, log_var, seed=self.seed, step=step, per_dim=True)
            raw = self.model.decode_raw(z)
        terms = self.loss(raw, target, kl)
        return terms, pixel_mse(self.loss, terms, raw, target), kl_per_dim

    def __call__(self, images: Tensor) -> None:
        self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        terms, mse, kl_per_dim = self._objective(images, self.step)
        self.scaler.scale(terms.loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        row = (self.step - 1) % len(self.history)
        scalars = torch.stack([*(term.detach() for term in terms), mse])
        self.history.index_copy_(0, row.view(1), scalars.view(1, -1))
        self.kl_per_dim = kl_per_dim.detach()
