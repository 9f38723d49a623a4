"""Train an InfoGAN: one step, its state saved and restored, and the command's loop."""

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bvae import files
from bvae.config import Config, TrainingConfig
from bvae.datasets import Data, open_data
from bvae.device import choose_device
from bvae.errors import UsageError
from bvae.infogan_model import InfoGAN
from bvae.plots import save_pictures
from bvae.training import checkpoint, completion, conditions
from bvae.training.claim import claim
from bvae.training.distributed import Distributed
from bvae.training.failures import continue_with
from bvae.training.infogan_cli import Arguments, InfoGANConfig, parse
from bvae.training.log import RunLog, Throughput
from bvae.training.optimizer import load_state
from bvae.training.restore import check_types
from bvae.training.setup import switches
from bvae.training.signals import StopRequest
from bvae.training.step import NotFinite
from bvae.weights import difference

BETAS = (0.5, 0.999)  # of Adam; Radford et al. 2016, "DCGAN"
MEASURED = 10_000  # generated images from which the share of codes that Q reads is computed
BATCH = 500  # of them at a time


class Losses(NamedTuple):
    """The numbers of a step."""

    discriminator: float  # cross-entropy of real and generated images, nats
    generator: float  # of generated images, taken for real ones
    codes: float  # cross-entropy of all codes under Q, nats per image
    codes_read: float  # share of the codes that are Q's most probable ones


@dataclass
class InfoGANRun:
    """Everything that training needs."""

    config: InfoGANConfig
    out: Path
    model: InfoGAN
    generator_optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    data: Data
    done: int = 0  # steps
    rows: list[Tensor] = field(default_factory=list)  # of `Losses`, since they were last received

    @property
    def conditions(self) -> dict[str, str]:
        """What the bits depend on besides configuration and images."""
        return conditions.conditions(self.model.head.weight.device, 1, self.data.decoder)

    def epoch(self, step: int) -> int:
        """The epoch of a step; both start at 1."""
        return (step - 1) // len(self.data.train) + 1

    def batches(self) -> Iterator[Tensor]:
        """Yield uint8 images [B, H, W, C] for each remaining step."""
        while self.done < self.config.max_steps:
            epoch = (images for images, _ in self.data.train.epoch(*divmod(self.done, len(self.data.train))))
            yield from islice(epoch, self.config.max_steps - self.done)

    def advance(self, images: Tensor) -> None:
        """One step of the discriminator and Q, then one of the generator, on the same generated images.

        The learning rates fall to 0 on a line over the run. Without that the losses oscillate to the end, and
        what Q reads with them.
        """
        factor = 1 - self.done / self.config.max_steps
        for optimizer in (self.generator_optimizer, self.discriminator_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        self.done += 1
        model, weight = self.model, self.config.code_weight
        x = model.scale(images.permute(0, 3, 1, 2))
        # torch's generator on a CPU uses 32 bits of a seed.
        seed = (self.config.seed * 1_000_003 + self.done) % 2**32
        codes, noise = model.draw(len(x), torch.Generator(x.device).manual_seed(seed))
        fake = model.activate(model.generate(codes, noise))

        real_logits = model.discriminator(model.trunk(x))
        features = model.trunk(fake.detach())
        fake_logits = model.discriminator(features)
        loss_d = _cross_entropy(real_logits, 1) + _cross_entropy(fake_logits, 0)
        loss_q = _code_loss(model.logits(features), codes)
        self.discriminator_optimizer.zero_grad()
        (loss_d + weight * loss_q).backward()
        self.discriminator_optimizer.step()

        features = model.trunk(fake)
        logits = model.logits(features)
        loss_g = _cross_entropy(model.discriminator(features), 1)
        loss_q = _code_loss(logits, codes)
        self.generator_optimizer.zero_grad()
        (loss_g + weight * loss_q).backward(inputs=list(model.generator.parameters()))
        self.generator_optimizer.step()

        read = (logits.argmax(2) == codes).float().mean()
        self.rows.append(torch.stack([loss_d, loss_g, loss_q, read]).detach())

    def receive(self) -> Losses:
        """The numbers of the last step. Raises NotFinite for the first loss since the last call."""
        rows = torch.stack(self.rows).tolist()
        first = self.done - len(rows) + 1
        self.rows.clear()
        for step, row in enumerate(rows, first):
            for name, value in zip(Losses._fields, row, strict=True):
                if not math.isfinite(value):
                    raise NotFinite(f"the loss of {name} is {value}", step)
        return Losses(*rows[-1])

    def save(self) -> None:
        """Write a checkpoint. Raises NotFinite, OSError; the older checkpoints are unchanged."""
        for name, value in self.model.state_dict().items():
            if not value.isfinite().all():
                raise NotFinite(f"{name} is not finite", self.done)
        state = {
            "model": self.model.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            "step": self.done,
            "images": self.data.train.count,
            "pixels": self.data.pixels,
            "conditions": self.conditions,
            "config": self.config.to_yaml(),
        }
        checkpoint.save(self.out / checkpoint.FOLDER, self.done, state)

    def restore(self) -> None:
        """Load the newest checkpoint, after comparing all of it with this run. Raises UsageError, OSError."""
        state = checkpoint.load_newest(self.out / checkpoint.FOLDER, torch.device("cpu"))
        with checkpoint.of_another_kind(self.out):
            check_types(state)
        images = (state["images"], state.get("pixels", ""))
        if images != (self.data.train.count, self.data.pixels):
            raise UsageError(
                f"{self.out}: the images are not those of the checkpoint: cannot resume deterministically"
            )
        if state["step"] > self.config.max_steps:
            raise UsageError(f"{self.out} is at step {state['step']} already: raise --max-steps")
        with checkpoint.of_another_kind(self.out):
            self._load(state)
        saved = {**state.get("versions", {}), **state.get("conditions", {})}
        if changed := conditions.difference(saved, {**checkpoint.versions(), **self.conditions}):
            print(changed, flush=True)

    def _load(self, state: dict[str, Any]) -> None:
        if reason := difference(state["model"], self.model.state_dict()):
            raise UsageError(f"the model: {reason}")
        for name in ("generator_optimizer", "discriminator_optimizer"):
            load_state(getattr(self, name), state.get(name), state["step"])
        self.model.load_state_dict(state["model"])
        self.done = state["step"]


def _cross_entropy(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _code_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy of the codes [B, D] under Q, summed over codes, nats per image."""
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten()) * codes.shape[1]


@torch.no_grad()
def codes_read(model: InfoGAN, seed: int) -> Tensor:
    """The share of each code that Q reads from generated images, 0 to 1: [D]. In evaluation mode."""
    model.eval()
    generator = torch.Generator(model.head.weight.device).manual_seed(seed % 2**32)
    shares = []
    for _ in range(MEASURED // BATCH):
        codes, noise = model.draw(BATCH, generator)
        fake = model.activate(model.generate(codes, noise))
        shares.append((model.logits(model.trunk(fake)).argmax(2) == codes).float().mean(0))
    return torch.stack(shares).mean(0)


# --- The command ------------------------------------------------------------------------------------------
@contextlib.contextmanager
def open_run(arguments: Arguments) -> Iterator[InfoGANRun]:
    """The run that a command line describes. Raises UsageError, OSError."""
    config, resume = arguments.settings, arguments.resume is not None
    device, alone = choose_device(arguments.device), Distributed()
    name = f"{config.data.name}-InfoGAN"
    out_or_none = arguments.resume or arguments.out
    with (
        claim(out_or_none, name, alone, resume=resume) as out,
        switches(TrainingConfig(seed=config.seed, fused=False), device),
    ):
        data = open_data(config.data, config.batch_size, config.seed, device)
        model = InfoGAN(**config.network).to(device).to(memory_format=torch.channels_last).train()
        run = InfoGANRun(
            config,
            out,
            model,
            _adam((config.lr, model.generator)),
            _adam(
                (config.discriminator_lr, model.trunk),
                (config.discriminator_lr, model.discriminator),
                (config.code_lr, model.reader),
                (config.code_lr, model.head),
            ),
            data,
        )
        if resume:
            run.restore()
        completion.unmark(out)
        files.write_text(out / "infogan.yaml", config.to_yaml())
        files.write_text(out / "config.yaml", Config(data=config.data).to_yaml())  # for bvae.evaluate
        model.save_config(out)
        yield run


def _adam(*parts: tuple[float, torch.nn.Module]) -> torch.optim.Adam:
    """Adam with a learning rate for each module."""
    groups = [{"params": list(module.parameters()), "lr": lr, "initial_lr": lr} for lr, module in parts]
    return torch.optim.Adam(groups, betas=BETAS, fused=True)


def train(run: InfoGANRun, stop: StopRequest) -> bool:
    """Train to the end, or until a signal asks to stop (False). The last step is in a checkpoint.

    Raises:
        NotFinite: a loss or a weight is NaN or infinite; the message names the step.
        KeyboardInterrupt: a request to stop before the first step is done.
        OSError: the run folder cannot be written.
    """
    config = run.config
    speed = Throughput(config.batch_size)
    with contextlib.closing(RunLog(run.out, config.max_steps, run.done)) as log:
        speed.start(run.done)
        for images in run.batches():
            run.advance(images)
            log.advance()
            stop.interrupt_now = False
            ends = run.done == config.max_steps or stop.signal is not None
            saves = ends or run.done % config.checkpoint_every == 0
            if saves or run.done % config.log_every == 0:
                losses = run.receive()
                speed.reach(run.done)
                shown = f"D {losses.discriminator:.2f} G {losses.generator:.2f} read {losses.codes_read:.0%}"
                numbers = {**losses._asdict(), "images_per_s": round(speed.images_per_s, 1)}
                log.log_shown(run.done, run.epoch(run.done), numbers, shown, config.batch_size)
            if saves:
                log.sync()
                run.save()
                speed.start(run.done)
            if stop.signal is not None:
                break
    stop.interrupt_now = True
    return run.done == config.max_steps


def write_results(run: InfoGANRun) -> None:
    """Write the model and the pictures, then the mark of a finished run, and print what Q reads."""
    model = run.model
    shares = codes_read(model, run.config.seed)
    x = model.scale(run.data.valid.head(32).permute(0, 3, 1, 2))
    with torch.no_grad():
        information = model.information(model.encode(x)[1])
    model.save_pretrained(run.out)
    save_pictures(model, x, information.tolist(), run.out)
    completion.mark(run.out)
    print(
        f"Q reads {shares.mean():.1%} of the codes of {MEASURED} generated images; "
        f"of the code that it reads worst, {shares.min():.1%}"
    )
    print(f"results: {run.out}/ (see traversals.gif, traversals.png, reconstructions.png, samples.png)")


def execute(argv: list[str], description: str) -> int:
    """Train, write the results, and return the exit status of `bvae.infogan.main`."""
    out: Path | None = None
    with StopRequest() as stop:
        try:
            with open_run(parse(argv, description)) as run:
                out = run.out
                if not train(run, stop):
                    print(f"stopped at step {run.done} of {run.config.max_steps}. {_continue_with(out)}")
                    return 0
                write_results(run)
                return 0
        except NotFinite as error:
            remedy = "The GAN has diverged: a lower --lr or --discriminator-lr may help"
            print(f"error: {error}. {remedy}. {_continue_with(out)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"stopped. {_continue_with(out)}", flush=True)
            return 0 if out and checkpoint.checkpoints(out / checkpoint.FOLDER) else 130


def _continue_with(out: Path | None) -> str:
    return continue_with(out, "bvae.infogan")
