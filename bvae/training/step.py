"""One training step: scale, encode, draw z, decode, loss, gradient, update."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CDLL
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvae.config import TrainingConfig
from bvae.errors import UsageError
from bvae.kernels.cpu import library
from bvae.losses import AnnealedBeta, BetaLoss, CapacityLoss, LossTerms
from bvae.model import BetaVAE
from bvae.network_ops import running_statistics_together
from bvae.ops import reparam_kl
from bvae.penalties import Discriminator, Penalty
from bvae.pipelines.memory_loaders import DeviceLoader
from bvae.training.cuda_graph import capture, preserved
from bvae.training.distributed import Distributed
from bvae.training.last_block import Errors, decode
from bvae.training.metrics_buffer import MetricsBuffer


class NotFinite(FloatingPointError):
    """A number of a step that is NaN or infinite."""

    def __init__(self, text: str, step: int) -> None:
        super().__init__(f"{text} at step {step}")
        self.step = step


class DiscriminatorDiverged(NotFinite):
    """A discriminator whose output or weights are NaN or infinite, where reconstruction and KL are finite."""

    def __init__(self, text: str, step: int) -> None:
        super().__init__(f"the discriminator has diverged: {text}", step)


class Scalars(NamedTuple):
    """The numbers in a step's row of `TrainingStep.metrics_buffer`."""

    step: int
    loss: float
    recon: float
    kld: float  # nats per image
    capacity: float  # nats
    mse: float  # per pixel and channel, in the decoder's range
    penalty: float  # without its weight; 0 if the objective has none
    discriminator: float  # its cross-entropy, nats; 0 without one
    kl_per_dim: list[float]  # nats per latent


_HEAD = len(Scalars._fields) - 2  # numbers in a row before kl_per_dim; the gradient comes last


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


def captures(device: torch.device, training: TrainingConfig) -> tuple[bool, str]:
    """Whether a step can be a CUDA graph, and a line that says why not; empty on a CPU."""
    if device.type != "cuda":
        return False, ""
    if training.optimizer == "adagrad":
        return False, f"not captured: {training.optimizer} counts its steps on the host"
    return training.capture, "" if training.capture else "not captured"


# Inductor's options on a GPU. The counts are from `python -m bench.lowered`, torch 2.14, batch 144:
INDUCTOR: dict[str, Any] = {
    # BatchNorm's backward reads its intermediate six times. With the default of four it would be stored, in
    # float32. If it is computed again each time, a step moves 7.9 MB per image instead of 10.9.
    "realize_reads_threshold": 16,
    # Small independent kernels share launches: a step has 126 of them instead of 142.
    "combo_kernels": True,
}


def load_cpu_layers(training: TrainingConfig, device: torch.device) -> CDLL | None:
    """The C++ layers for a run on a CPU; if they cannot be built, one line says why."""
    if device.type != "cpu" or not training.fused:
        return None
    try:
        return library.load()
    except library.NotBuilt as reason:
        print(f"PyTorch's layers are used, not the faster ones in C++: {reason}", flush=True)
        return None


def pixel_mse(model: BetaVAE, loss: nn.Module, terms: LossTerms, raw: Tensor, target: Tensor) -> Tensor:
    """Squared error per pixel and channel, in the decoder's range, from a loss's terms and arguments."""
    if (
        not isinstance(loss, BetaLoss | CapacityLoss)
        or loss.likelihood != "gaussian"
        or isinstance(loss.decoder_variance, str | Tensor)
    ):
        return (model.activate(raw.detach().float()) - model.scale(target)).square().mean()
    mse = terms.recon.detach() * 2 * loss.decoder_variance
    return mse if loss.reduction == "mean" else mse / raw[0].numel()


class _Cast(torch.autograd.Function):
    """Casts weights for autocast, and their gradients back; when compiled, each in one launch.

    Autocast itself casts each layer's weights and each gradient separately: eleven launches per step, which
    inductor cannot merge. It compiles a foreach operation to one kernel. The product by one changes no bit.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch._foreach_mul([weight.to(dtype) for weight in weights], 1.0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *torch._foreach_mul([gradient.float() for gradient in gradients], 1.0)


class _Call(nn.Module):
    """Wraps a function that runs a model in a module, for `functional_call`, which replaces weights."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


class Captured(NamedTuple):
    """A step as a CUDA graph."""

    replay: Callable[[], None]
    images: Tensor | None  # its input; None: it gathers its images from the data set


class TrainingStep:
    """Turns uint8 images [B, H, W, C] into one update of the model; the host never waits for the device.

    Args:
        model, loss, optimizer, penalty: on one device. An optimizer whose learning rate is a tensor reads it
            there.
        seed: of the noise, with the step and the image's number in the whole batch.
        dtype: of autocast; None is float32. float16 gets a gradient scaler.
        discriminator_optimizer: of a penalty that is a `Discriminator`.
        compile: run the forward and backward pass under torch.compile.
        buffer_steps: steps whose scalars the buffer holds; call `send` at least that often.
        clip_grad: the gradient's largest norm, or None.
        accumulate: equal parts into which the images are divided; their gradients are averaged. BatchNorm and
            |KL - C| use one part at a time.
        distributed: the ranks whose gradients are averaged; each has its own B images of the whole batch.
    """

    def __init__(
        self,
        model: BetaVAE,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        dtype: torch.dtype | None,
        compile: bool,
        buffer_steps: int,
        penalty: Penalty | None = None,
        discriminator_optimizer: torch.optim.Optimizer | None = None,
        clip_grad: float | None = None,
        accumulate: int = 1,
        distributed: Distributed = Distributed(),  # noqa: B008 (frozen)
    ) -> None:
        self.device = next(model.parameters()).device
        self.model, self.loss, self.optimizer, self.dtype = model, loss, optimizer, dtype
        self.penalty, self.discriminator_optimizer = penalty, discriminator_optimizer
        self.clip_grad, self.accumulate, self.distributed = clip_grad, accumulate, distributed
        for group in optimizer.param_groups:  # as torch's schedulers do
            group.setdefault("initial_lr", float(group["lr"]))
        self._lr_factor = 1.0
        self.seed = torch.tensor(seed, device=self.device)
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)  # steps done
        # Constants on the device, so that no launch has to fill them in: the first part of a step adds 1 to
        # the step counter, other parts add 0, and `_share` is the gradient of a part's loss.
        self._one, self._zero = self.step + 1, self.step.clone()
        self._share = torch.full((), 1 / accumulate, device=self.device)
        self.metrics_buffer = MetricsBuffer(buffer_steps, _HEAD + model.latent_dim + 1, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        if self.scaler.is_enabled():
            self.scaler.scale(torch.zeros((), device=self.device))  # creates its tensors before a capture
        self.recompile(compile)
        self._parameters = [p for m in (model, loss) for p in m.parameters() if p.requires_grad]
        self._adversary = list(penalty.parameters()) if penalty else []
        self._call = _Call(model, self._reconstruct)
        self._cast = {  # the weights that autocast casts
            f"{name}.weight": module.weight
            for name, module in self._call.named_modules()
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module.weight.requires_grad
        }
        self.captured: Captured | None = None

    @property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [each for each in (self.optimizer, self.discriminator_optimizer) if each is not None]

    def __call__(self, images: Tensor | None = None) -> None:
        """One step on uint8 images [B, H, W, C]; None if the step `gathers` its own.

        Raises:
            ValueError: a captured step gets images of another kind; the message says what changed.
        """
        if self.captured is None:
            assert images is not None
            self._update(images)
            return
        if self.captured.images is not None:
            assert images is not None
            _check_same(images, self.captured.images)
            self.captured.images.copy_(images, non_blocking=True)
        self.captured.replay()

    @property
    def gathers(self) -> bool:
        """Whether the step is captured, and reads its images from the data set itself."""
        return self.captured is not None and self.captured.images is None

    def capture(self, images: DeviceLoader | Tensor) -> bool:
        """Make every later step a replay of one CUDA graph; False, without a change, if memory is short.

        Args:
            images: the loader, whose batches the graph gathers itself (call `DeviceLoader.begin` before each
                epoch); or images like those of later steps.
        """
        static = None
        if isinstance(images, DeviceLoader):
            images.begin(0)
            per_epoch, batch = len(images), images.batch

            def gather(done: Tensor) -> Tensor:
                return batch(done % per_epoch)

            gather = torch.compile(gather) if self.compile else gather

            def step() -> None:
                self._update(gather(self.step))
        else:
            static = own = images.clone()

            def step() -> None:
                self._update(own)

        replay = capture(step, self._state)
        self.captured = Captured(replay, static) if replay else None
        return replay is not None

    def recompile(self, compile: bool) -> None:
        """Discard the compiled code; the next step compiles again, or is eager."""
        self.compile = compile
        options = INDUCTOR if self.device.type == "cuda" else None
        self._objective = torch.compile(self.objective, options=options) if compile else self.objective

    def compile_and_restore(self, images: Tensor) -> None:
        """Run one step on uint8 images [B, H, W, C], to compile it, and restore all state afterwards."""
        with self.undone():
            self._update(images)

    def rehearse(self, images: Tensor) -> None:
        """`compile_and_restore` without an update: no rank waits for another."""
        with self.undone():
            self.zero_grad()
            self._backward(images)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Restore after a block of steps all that they change, and the generators of random numbers."""
        devices = [self.device.index or 0] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), preserved(self._state):
            yield

    def release(self) -> None:
        """Release the captured graph; later steps run without one."""
        self.captured = None

    def zero_grad(self) -> None:
        """Discard all gradients, and their memory."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def restore(self, step: int) -> None:
        """Set the counters as if `step` steps had been done."""
        self.step.fill_(step)
        self.metrics_buffer.start(step)

    def set_lr_factor(self, factor: float) -> None:
        """Multiply the initial learning rates for later steps; a captured step reads them from the device."""
        if factor == self._lr_factor:
            return
        self._lr_factor = factor
        for group in self.optimizer.param_groups:
            lr = group["initial_lr"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def receive(self, wait: bool) -> Scalars | None:
        """The scalars of the last step that `metrics_buffer` has sent; None if there is nothing new.

        Raises:
            NotFinite: a step's loss or gradient is NaN or infinite; the message names the first such step.
        """
        received = self.metrics_buffer.receive(wait)
        for step, row in received:
            if not math.isfinite(row[0]):
                recon, kld, penalty = row[1], row[2], row[5]
                if self.discriminator_optimizer and math.isfinite(recon + kld):
                    raise DiscriminatorDiverged(f"its estimate is {penalty}", step)
                raise NotFinite(f"the loss is {row[0]}", step)
            if not math.isfinite(row[-1]) and not self.scaler.is_enabled():  # a scaler skips such steps
                raise NotFinite(f"the gradient is {row[-1]}", step)
        if not received:
            return None
        step, row = received[-1]
        loss, recon, kld, capacity, mse, penalty, discriminator, *kl_per_dim, _ = row
        return Scalars(step, loss, recon, kld, capacity, mse, penalty, discriminator, kl_per_dim)

    def objective(self, images: Tensor, first: int, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of uint8 images [B, H, W, C], numbered from `first`; adds `counts` to the step counter.

        A discriminator's loss is added. The two share no parameter, so one backward pass of the sum gives
        both gradients, before either update. The metrics are computed here too, because compiled together
        they cost hardly any extra launch.

        Returns:
            the loss, 0-d; the row [1, width] of the metrics buffer, whose last number is later set to the
            gradient; and the row's index [1].
        """
        self.step += counts
        if self.accumulate > 1 and isinstance(self.loss, CapacityLoss | AnnealedBeta):
            self.loss.step.add_(counts - 1)  # it counts forward passes; the parts are one step
        target = images.permute(0, 3, 1, 2)
        if torch.compiler.is_compiling() and self.dtype is not None:
            cast = _Cast.apply(self.dtype, *self._cast.values())
            weights = dict(zip(self._cast, cast, strict=True))
            parts = torch.func.functional_call(self._call, weights, (target, first))
        else:
            parts = self._reconstruct(target, first)
        decoded, kl, kl_per_dim, latents = parts
        if isinstance(decoded, Errors):
            assert isinstance(self.loss, BetaLoss | CapacityLoss)
            terms = self.loss.of_errors(decoded.sums, decoded.elements, kl)
            mse = decoded.squares.mean() / decoded.elements
        else:
            terms = self.loss(decoded, target, kl)
            if not (isinstance(terms, LossTerms) and all(isinstance(term, Tensor) for term in terms)):
                raise UsageError(
                    "the loss must return LossTerms(loss, recon, kld, capacity), four 0-d tensors"
                )
            mse = pixel_mse(self.model, self.loss, terms, decoded, target)
        extra = []  # the penalty and the discriminator's loss, of the objectives that have them
        if self.penalty is not None:
            extra.append(self.penalty(*latents).to(terms.kld.dtype))
            terms = terms._replace(loss=terms.loss + self.penalty.weight * extra[0])
        loss = terms.loss
        if isinstance(self.penalty, Discriminator):
            extra.append(self.penalty.loss(latents[0], self.seed, self.step, first).to(loss.dtype))
            loss = loss + extra[1]
        head = F.pad(torch.stack([*terms, mse, *extra]), (0, 2 - len(extra)))
        row = F.pad(torch.cat([head, kl_per_dim]), (0, 1))
        return loss, row.detach().float().view(1, -1), self.metrics_buffer.row_index(self.step)

    def _reconstruct(
        self, target: Tensor, first: int
    ) -> tuple[Tensor | Errors, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """What `decode` gives for uint8 images [B, C, H, W], their KL [B], its mean per latent, and the
        latents z, mu, log_var."""
        autocast = torch.autocast(target.device.type, self.dtype, enabled=self.dtype is not None)
        with autocast, running_statistics_together():
            x = self.model.scale(target).to(self._parameters[0].dtype)
            mu, log_var = self.model.encode_scaled(x)
            z, kl, kl_per_dim = reparam_kl(
                mu, log_var, seed=self.seed, step=self.step, first_sample=first, per_dim=True
            )
            return decode(self.model, self.loss, z, target), kl, kl_per_dim, (z, mu, log_var)

    def _update(self, images: Tensor) -> None:
        """The whole step, on the device only."""
        self.zero_grad()
        row, index = self._backward(images)
        gradients = [p.grad for p in [*self._parameters, *self._adversary] if p.grad is not None]
        self.distributed.all_reduce_mean([*gradients, row])
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self._parameters, self.clip_grad)
        for optimizer in self._optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.metrics_buffer.write(index, row)

    def _backward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of the mean over the parts; return the metrics row [1, width], its index."""
        size, rest = divmod(len(images), self.accumulate)
        if rest:
            raise ValueError(f"{len(images)} images cannot be divided into {self.accumulate} equal parts")
        rows = []
        for number, part in enumerate(images.split(size)):
            first = (self.distributed.rank * self.accumulate + number) * size
            loss, row, index = self._objective(part, first, self._zero if number else self._one)
            self.scaler.scale(loss).backward(self._share.to(loss.dtype))
            rows.append(row)
        row = rows[0] if self.accumulate == 1 else torch.stack(rows).mean(0)
        # NaN and Inf propagate backward, so checking the first layer's gradient suffices.
        gradient = self._parameters[0].grad
        assert gradient is not None
        torch.sum(gradient, dim=None, dtype=torch.float32, out=row[0, -1])
        return row, index

    def _state(self) -> Iterator[Tensor]:
        """Every tensor that a step changes."""
        yield from (self.step, self.metrics_buffer.rows)
        for module in (self.model, self.loss, self.penalty):
            if module is not None:
                yield from module.parameters()
                yield from module.buffers()
        for optimizer in self._optimizers:
            for moments in optimizer.state.values():
                yield from (value for value in moments.values() if isinstance(value, Tensor))
        if self.scaler.is_enabled():
            state = (self.scaler._scale, self.scaler._growth_tracker)
            yield from (tensor for tensor in state if tensor is not None)


def _check_same(images: Tensor, captured: Tensor) -> None:
    for attribute in ("shape", "dtype", "device"):
        value, expected = getattr(images, attribute), getattr(captured, attribute)
        if value != expected:
            raise ValueError(
                f"the step was captured for images of {attribute} {_text(expected)}, these have "
                f"{_text(value)}: use whole batches, or do not capture the step"
            )


def _text(value: object) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value)
