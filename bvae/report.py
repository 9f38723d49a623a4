"""What a run shows: a live bar or lines, metrics.jsonl, TensorBoard, and pictures of what was learned."""

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from bvae.checkpoint import write_text
from bvae.model import BetaVAE
from bvae.validation import Validation

# ---- numbers -----------------------------------------------------------------------------------------------

METRICS = "metrics.jsonl"


class Report:
    """Progress of a run: one live bar on a terminal, else a line each `log`; records in the run folder."""

    def __init__(self, out: Path, steps: int, done: int) -> None:
        if done:
            _drop_lines_after(out / METRICS, done, validate_again=done >= steps)
        self._steps = steps
        self._metrics = open(out / METRICS, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        # TensorBoard's thread hands its error on to who writes next: it need not print it as well.
        self._before, threading.excepthook = threading.excepthook, self._unhandled
        self._tensorboard = SummaryWriter(str(out), purge_step=done + 1)
        self._bar = tqdm(
            total=steps,
            initial=done,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            bar_format="{bar:4} step {n}/{total} ETA {remaining}{postfix}",  # fits 80 columns
        )

    def advance(self) -> None:
        """Count one step."""
        self._bar.update()

    def log(
        self, step: int, epoch: int, values: dict[str, float], images_per_s: float, batch_size: int
    ) -> None:
        """Write one record of training."""
        self._write("train", step, epoch, {**values, "images_per_s": round(images_per_s, 1)})
        shown = (
            f"epoch {epoch} loss {values['loss']:.3g} KL {values['kld']:.1f} C {values['capacity']:.1f} "
            f"{images_per_s:.0f} images/s"
        )
        self._bar.set_postfix_str(shown)
        if self._bar.disable:
            eta = (self._steps - step) * batch_size / images_per_s if images_per_s else 0
            self.line(f"step {step}/{self._steps}, ETA {timedelta(seconds=round(eta))}, {shown}")

    def validation(self, step: int, epoch: int, result: Validation) -> None:
        """Write one record of validation."""
        self._write("valid", step, epoch, {k: v for k, v in result._asdict().items() if k != "kl_per_dim"})
        self.line(
            f"epoch {epoch}: validation mse {result.mse:.4f}, KL {result.kld:.2f} nats, "
            f"explained variance {result.explained_variance:.2f}"
        )

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Raises OSError if what is left cannot be written."""
        self._bar.close()
        try:
            self._metrics.close()
            self._tensorboard.close()
        finally:
            threading.excepthook = self._before

    def _unhandled(self, found: threading.ExceptHookArgs) -> None:
        if not isinstance(found.exc_value, OSError):
            self._before(found)

    def _write(self, split: str, step: int, epoch: int, values: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        record = {"split": split, "step": step, "epoch": epoch, **finite}  # JSON knows no NaN
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{split}/{name}", value, step)


class Speed:
    """Images a second of the training steps alone, without compilation, validation and checkpoints."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._steps, self._seconds = 0, 0.0
        self._step, self._since = 0, time.perf_counter()

    def start(self, step: int) -> None:
        """What happened since the last call was not training; `step` steps are done."""
        self._step, self._since = step, time.perf_counter()

    def reach(self, step: int) -> None:
        """What happened since the last call was training up to this step, which the device has finished."""
        now = time.perf_counter()
        self._steps, self._seconds = self._steps + step - self._step, self._seconds + now - self._since
        self._step, self._since = step, now

    @property
    def images_per_s(self) -> float:
        return self._steps * self._batch_size / self._seconds if self._seconds else 0.0


class Silence:
    """A `Report` of nothing, for all processes but the first."""

    def advance(self) -> None: ...

    def log(self, *_: object) -> None: ...

    def validation(self, *_: object) -> None: ...

    def close(self) -> None: ...


def _drop_lines_after(path: Path, step: int, validate_again: bool) -> None:
    """Keep the records up to the checkpoint's step: a resumed run writes those after it again."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # cut short by a crash
            record = json.loads(line)
            last = step - 1 if validate_again and record["split"] == "valid" else step
            if record["step"] <= last:
                kept.append(line + "\n")
    write_text(path, "".join(kept))


# ---- pictures ----------------------------------------------------------------------------------------------

MARGIN = 2  # pixels between pictures
LABEL = 92  # pixels for a row's text, or more if it takes them
FRAMES = 8  # of the GIF, one way
FACES = 4  # side by side in the GIF
COLOURS = 48  # of a frame of the GIF: it stays under a megabyte


def to_uint8(images: Tensor, activation: str) -> Tensor:
    """Images [N, C, H, W] in the decoder's range to uint8 RGB [N, H, W, 3] on the CPU."""
    unit = (images.float() + 1) / 2 if activation == "tanh" else images.float()
    pixels = (unit.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    return pixels.expand(-1, -1, -1, 3)


def grid(rows: Sequence[Tensor], labels: Sequence[str] = ()) -> Image.Image:
    """Rows of uint8 images [N, H, W, 3] as one picture, with a text at the left of each row."""
    height, width = rows[0].shape[1:3]
    font = ImageFont.load_default(12)
    left = _width(labels, font) if labels else 0
    columns = max(len(row) for row in rows)
    size = (left + columns * (width + MARGIN) - MARGIN, len(rows) * (height + MARGIN) - MARGIN)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        top = i * (height + MARGIN)
        if labels:
            draw.multiline_text((4, top + height // 2 - 14), labels[i], fill="black", font=font)
        for j, image in enumerate(row):
            canvas.paste(Image.fromarray(image.numpy()), (left + j * (width + MARGIN), top))
    return canvas


def _width(labels: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    """Pixels for the longest line of the texts."""
    lines = [line for label in labels for line in label.splitlines()]
    return max(LABEL, *(math.ceil(font.getlength(line)) + 8 for line in lines))


@torch.no_grad()
def save_pictures(model: BetaVAE, x: Tensor, kl_per_dim: Sequence[float], out: Path, rows: int = 8) -> None:
    """Write reconstructions.png, samples.png, traversals.png and traversals.gif.

    Leaves the model in evaluation mode.

    Args:
        x: validation images [N, C, H, W] in the decoder's range. The traversals of the PNG start from the
            most typical one, whose mu is the shortest; those of the GIF from the first ones.
        kl_per_dim: nats per latent; the `rows` latents with the highest are traversed, highest first.
    """
    model.eval()
    activation = model.activation
    pairs = [to_uint8(part, activation) for x8 in x[:32].split(8) for part in (x8, model.reconstruct(x8))]
    grid(pairs, ["input", "reconstruction"] * (len(pairs) // 2)).save(out / "reconstructions.png")
    generator = torch.Generator(x.device).manual_seed(0)
    samples = to_uint8(model.sample(64, generator), activation)
    grid(samples.split(8)).save(out / "samples.png")

    latents = sorted(range(model.latent_dim), key=lambda i: -kl_per_dim[i])[:rows]
    labels = [f"latent {i}\nKL {kl_per_dim[i]:.2f} nats" for i in latents]
    mu = model.encode(x)[0]
    typical = mu[mu.norm(dim=1).argmin()].unsqueeze(0)
    grid([traversal(model, typical, i, 11).squeeze(1) for i in latents], labels).save(out / "traversals.png")

    swing = [traversal(model, mu[:FACES], i, FRAMES) for i in latents]
    there_and_back = [*range(FRAMES), *range(FRAMES - 2, 0, -1)]
    frames = [
        grid([row[t] for row in swing], labels).quantize(COLOURS, dither=Image.Dither.NONE)
        for t in there_and_back
    ]
    frames[0].save(out / "traversals.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)


def traversal(model: BetaVAE, z: Tensor, latent: int, steps: int) -> Tensor:
    """Decode z [N, latent_dim] with one latent from -3 to 3: uint8 [steps, N, H, W, 3]."""
    values = torch.linspace(-3, 3, steps, device=z.device)
    zs = z.repeat(steps, 1)
    zs[:, latent] = values.repeat_interleave(len(z))
    return to_uint8(model.decode(zs), model.activation).unflatten(0, (steps, len(z)))
