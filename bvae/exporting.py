"""Export a model's encoder and decoder, as ONNX and as torch.export's .pt2, checked against the model."""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bvae import __version__, files
from bvae.architectures import is_ours
from bvae.errors import UsageError
from bvae.evaluation.options import ExportOptions
from bvae.infogan_model import InfoGAN
from bvae.model import ACTIVATIONS, BetaVAE
from bvae.reference import scale_pixels

TRACED, CHECKED = 2, (1, 3)  # batch sizes
TOLERANCE = 1e-6  # of the largest value of an output, or of 1
ONNX_LIMIT = 2**31  # bytes of a file in protobuf


class Encoder(nn.Module):
    """`BetaVAE.encode` without the decoder's weights: images to mu and log_var."""

    def __init__(self, model: BetaVAE) -> None:
        super().__init__()
        self.encoder, self.head, self.lowest = model.encoder, model.head, model.pixel_range[0]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [N, C, H, W]: uint8, or floating point in `pixel_range`."""
        x = scale_pixels(images, self.lowest) if images.dtype == torch.uint8 else images
        mu, log_var = self.head(self.encoder(x).flatten(1)).chunk(2, dim=1)
        return mu, log_var


class Decoder(nn.Module):
    """`BetaVAE.decode` without the encoder's weights: z to images."""

    def __init__(self, model: BetaVAE) -> None:
        super().__init__()
        self.decoder_input, self.decoder = model.decoder_input, model.decoder
        self.code_shape, self.activate = model.code_shape, ACTIVATIONS[model.activation]

    def forward(self, z: Tensor) -> Tensor:
        """z [N, latent_dim]; the images [N, C, H, W] are in `pixel_range`."""
        return self.activate(self.decoder(self.decoder_input(z).view(-1, *self.code_shape)))


class Part(NamedTuple):
    """What becomes a pair of files."""

    name: str
    module: nn.Module
    original: Callable[[Tensor], Any]  # the model's method
    make: Callable[[int], Tensor]  # an input for a batch size
    input: str
    outputs: tuple[str, ...]


class Written(NamedTuple):
    """A file that was written."""

    path: Path
    size: int  # bytes
    input: str  # its name, dtype and shape
    outputs: str
    difference: float  # the largest from the model's output, as a share of its largest value or of 1


def export(model: BetaVAE, out: Path, images: Literal["uint8", "float"] = "uint8") -> list[Written]:
    """Write encoder.onnx, encoder.pt2, decoder.onnx and decoder.pt2, for batches of any size.

    Each file is run at other batch sizes than it was traced with, and written if its outputs are the model's.
    Its metadata hold the model's configuration.

    Args:
        model: on the CPU, in evaluation mode.
        out: the folder, which is created if needed.
        images: the dtype that the encoder takes. uint8, or float32 in the model's `pixel_range`.

    Raises:
        UsageError: an InfoGAN, a network that torch cannot export, or one whose exported outputs differ.
        ModuleNotFoundError: onnxscript or onnxruntime is missing.
        OSError: a file cannot be written.
    """
    if isinstance(model, InfoGAN):
        raise UsageError("an InfoGAN has no encoder and decoder of its own to export: use bvae.sample")
    import onnxruntime  # noqa: F401 (before the work, of which it is the last part)
    import onnxscript  # noqa: F401

    size = sum(value.nbytes for value in model.state_dict().values())
    if size >= ONNX_LIMIT:
        raise UsageError(f"an ONNX file holds at most 2 GiB, and this model's weights have {size:,} bytes")
    files.make_folder(out)
    written = []
    for part in tqdm(_parts(model, images), desc="exporting", unit=" part", disable=None):
        metadata = _metadata(model, part)
        for suffix, trace, run in ((".onnx", _onnx, _run_onnx), (".pt2", _pt2, _run_pt2)):
            path = out / f"{part.name}{suffix}"
            with _explained(model, path):
                data = trace(part, metadata)
                difference = max(_difference(part, part.make(n), data, run) for n in CHECKED)
            if not difference <= TOLERANCE:  # NaN too
                raise UsageError(f"{path.name} differs from the model by {difference:.2g}: it is not written")
            files.write_bytes(path, data)
            written.append(Written(path, len(data), metadata["input"], metadata["outputs"], difference))
    return written


def run(options: ExportOptions) -> str:
    """The command: load, export, and return the table of what was written."""
    model = BetaVAE.from_pretrained(options.run, options.which)
    out = options.out or options.run / "export"
    rows = [
        f"| {w.path.name} | {w.size / 1e6:.1f} MB | {w.input} | {w.outputs} | {w.difference:.1e} |"
        for w in export(model, out, options.images)
    ]
    head = ["| file | size | input | outputs | largest difference |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows, "", f"results: {out}/"])


def _parts(model: BetaVAE, images: str) -> list[Part]:
    generator = torch.Generator().manual_seed(0)

    def pixels(n: int) -> Tensor:
        x = torch.randint(256, (n, *model.input_shape), dtype=torch.uint8, generator=generator)
        return x if images == "uint8" else model.scale(x)

    def codes(n: int) -> Tensor:
        return torch.randn(n, model.latent_dim, generator=generator)

    return [
        Part("encoder", Encoder(model).eval(), model.encode, pixels, "images", ("mu", "log_var")),
        Part("decoder", Decoder(model).eval(), model.decode, codes, "z", ("images",)),
    ]


def _metadata(model: BetaVAE, part: Part) -> dict[str, str]:
    """What both formats hold beside the network. All values are text, as ONNX wants them."""
    x = part.make(TRACED)
    low, high = model.pixel_range
    image = f"[batch, {', '.join(map(str, model.input_shape))}]"
    outputs = f"images {image}" if part.outputs == ("images",) else f"mu, log_var [batch, {model.latent_dim}]"
    return {
        "producer": f"bvae {__version__}",
        "part": part.name,
        "config": json.dumps(model.config),
        "pixel_range": f"[{low:g}, {high:g}]",
        "input": f"{part.input} {str(x.dtype).removeprefix('torch.')} "
        f"[batch, {', '.join(map(str, x.shape[1:]))}]",
        "outputs": outputs,
    }


def _onnx(part: Part, metadata: dict[str, str]) -> bytes:
    program = torch.onnx.export(
        part.module,
        (part.make(TRACED),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[part.input],
        output_names=list(part.outputs),
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString()


def _pt2(part: Part, metadata: dict[str, str]) -> bytes:
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(part.module, (part.make(TRACED),), dynamic_shapes=dynamic)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(metadata)})
    return buffer.getvalue()


def _run_onnx(data: bytes, x: Tensor) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(each) for each in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def _run_pt2(data: bytes, x: Tensor) -> list[Tensor]:
    return _as_list(torch.export.load(io.BytesIO(data)).module()(x))


@torch.no_grad()
def _difference(part: Part, x: Tensor, data: bytes, run: Callable[[bytes, Tensor], list[Tensor]]) -> float:
    """The largest difference of the outputs on x, as a share of the model's largest value or of 1."""
    pairs = zip(run(data, x), _as_list(part.original(x)), strict=True)
    return max(((ours - own).abs().max() / own.abs().max().clamp(min=1)).item() for ours, own in pairs)


def _as_list(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


@contextmanager
def _explained(model: BetaVAE, path: Path) -> Iterator[None]:
    """torch's error in one line, if the network is the user's own; what torch prints is not shown."""
    disabled, printed = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(printed), redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        arch = model.config["arch"]
        if is_ours(arch):
            raise
        cause = error.__cause__ or error
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UsageError(f"arch {arch} cannot be exported as {path.name}: {first}") from None
    finally:
        logging.disable(disabled)
