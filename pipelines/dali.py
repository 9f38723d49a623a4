"""Image files to uint8 batches with NVIDIA DALI: on a GPU with its JPEG decoders, or on the CPU's cores."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia import dali
from nvidia.dali import fn, types
from torch import Tensor

from bvae.pipelines.decoder import AHEAD, Decoded, cores, reason
from bvae.pipelines.picture import Picture, inspect
from bvae.pipelines.torch_decode import decode_into, resize
from bvae.pipelines.webdataset import ImageFile, read

LARGE = 1 << 25  # bytes or pixels: DALI decodes a batch at once, and larger JPEGs have to fit a budget
MAX_BATCH = 1 << 16  # files; DALI wants a limit, and takes no memory for it


class _Work(NamedTuple):
    """A batch that is being decoded."""

    images: Tensor  # filled later: uint8 [B, size, size, channels]
    files: Sequence[ImageFile]
    jpegs: list[int]  # positions in the batch of the files that DALI decodes
    others: dict[int, Future[str | None]]  # those that torchvision decodes
    bad: dict[int, str]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread of torch: idle threads spin after each operation, on the cores where DALI decodes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class DaliDecoder:
    """Decodes batches of files, some batches ahead. DALI crops, and torch resizes: DALI's own resizing
    repeats the edge pixels, PIL's does not, and the two differ there by up to 14 of 255.

    A damaged file stops a DALI pipeline, and every batch in it is lost. So each file is inspected first, and
    DALI gets plain JPEGs only; `decode_into` takes all other files. If a file stops the pipeline anyway,
    torchvision decodes the batches in flight and names the file, and a new pipeline is built.

    A pipeline that finished without an error is kept for the next epoch. To build one, and to touch the
    memory of its buffers for the first time, takes as long as to decode some hundred images.

    Args:
        device: a CUDA device, or the CPU.
        roi: decode only the cropped square, not the whole image.
        hw_load: share of the JPEGs for a GPU's fixed-function decoder, if it has one.
    """

    def __init__(
        self, picture: Picture, device: torch.device, *, roi: bool = True, hw_load: float = 0.65
    ) -> None:
        self.picture, self.device, self.roi, self.hw_load = picture, device, roi, hw_load
        self.version = f"DALI {dali.__version__} on the {'GPU' if device.type == 'cuda' else 'CPU'}"
        self._idle: Any = None  # an empty pipeline

    def decode(self, batches: Iterable[Sequence[ImageFile]]) -> Iterator[Decoded]:
        """The batches in their order, each of MAX_BATCH files at most."""
        queue: deque[_Work] = deque()
        idle, self._idle = self._idle, None  # not shared: another epoch may start before this one ends
        pipeline = self._pipeline() if idle is None else idle
        pool = ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,))
        try:
            for files in batches:
                with _one_thread():
                    queue.append(self._start(pipeline, pool, files))
                    if len(queue) > AHEAD:
                        pipeline = self._collect(pipeline, pool, queue)
                if len(queue) > AHEAD:
                    yield self._finish(queue.popleft())
            while queue:
                with _one_thread():
                    pipeline = self._collect(pipeline, pool, queue)
                yield self._finish(queue.popleft())
            self._idle = pipeline  # not after an error, or a reader that stops early: batches are still in it
        finally:
            pool.shutdown(cancel_futures=True)

    def _start(self, pipeline: Any, pool: ThreadPoolExecutor, files: Sequence[ImageFile]) -> _Work:
        """Choose a decoder for each file of a batch, and start both decoders."""
        picture = self.picture
        shape = (len(files), picture.size, picture.size, picture.channels)
        images = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        work = _Work(images, files, [], {}, {})
        encoded, squares = [], []
        for i, file in enumerate(files):
            try:
                data = read(file)
                header = inspect(data)
                if header.plain and len(data) <= LARGE and header.width * header.height <= LARGE:
                    squares.append(picture.square(header.width, header.height))
                    encoded.append(np.frombuffer(data, np.uint8))
                    work.jpegs.append(i)
                else:
                    work.others[i] = pool.submit(decode_into, images[i], file, picture)
            except (ValueError, OSError) as error:
                work.bad[i] = reason(error)
        if encoded:
            corners = np.array([(top, left) for top, left, _ in squares], np.int32)
            sides = np.array([(side, side) for _, _, side in squares], np.int32)
            with suppress(RuntimeError):  # an earlier batch stopped the pipeline: _collect handles it
                pipeline.feed_input("encoded", encoded)
                pipeline.feed_input("corners", corners)
                pipeline.feed_input("sides", sides)
                pipeline.schedule_run()
        return work

    def _collect(self, pipeline: Any, pool: ThreadPoolExecutor, queue: deque[_Work]) -> Any:
        """Copy DALI's result for the first batch; return the pipeline to continue with."""
        work = queue[0]
        if not work.jpegs:
            return pipeline
        try:
            (squares,) = pipeline.share_outputs()
        except RuntimeError:
            for batch in queue:
                for i in batch.jpegs:
                    batch.others[i] = pool.submit(decode_into, batch.images[i], batch.files[i], self.picture)
                batch.jpegs.clear()
            return self._pipeline()
        if squares.is_dense_tensor():
            resized = resize(torch.from_dlpack(squares.as_tensor()), self.picture.size)
            if len(work.jpegs) == len(work.files):
                work.images.copy_(resized)  # many times as fast as []
            else:
                work.images[work.jpegs] = resized
        else:  # the squares have several sizes
            for position, square in zip(work.jpegs, squares, strict=True):
                work.images[position] = resize(torch.from_dlpack(square)[None], self.picture.size)[0]
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # DALI writes to its buffers again
        pipeline.release_outputs()
        return pipeline

    def _finish(self, work: _Work) -> Decoded:
        for i, task in work.others.items():
            if text := task.result():
                work.bad[i] = text
        return Decoded(work.images, work.bad)

    def _pipeline(self) -> Any:
        gpu = self.device.type == "cuda"
        options: dict[str, Any] = {"output_type": types.RGB if self.picture.channels == 3 else types.GRAY}
        if gpu:
            # Fancy upsampling gives the same chroma as the CPU's decoders.
            options |= {"hw_decoder_load": self.hw_load, "jpeg_fancy_upsampling": True}

        @dali.pipeline_def(
            batch_size=MAX_BATCH,
            num_threads=cores(),
            device_id=(self.device.index or 0) if gpu else None,
            exec_pipelined=False,  # one run per batch that is fed, not several before the first result
            prefetch_queue_depth=AHEAD + 1,
        )
        def build() -> Any:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            corners = fn.external_source(name="corners", dtype=types.INT32, ndim=1)
            sides = fn.external_source(name="sides", dtype=types.INT32, ndim=1)
            window = {"start": corners, "shape": sides, "axes": [0, 1]}
            device = "mixed" if gpu else "cpu"
            if self.roi:
                return fn.decoders.image_slice(encoded, device=device, **window, **options)
            return fn.slice(fn.decoders.image(encoded, device=device, **options), **window)

        pipeline = build()
        pipeline.build()
        return pipeline
