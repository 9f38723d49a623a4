"""Measure DALI's options on drawn faces: `python -m bench.dali_sweep`. Prints each result at once.

First the pipeline's largest batch: its memory, and the time of the first batches. Then images per second for
each share of JPEGs that the GPU's hardware decoder takes, for the cropped square and for the whole image.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from bvae.pipelines import dali, faces
from bvae.pipelines.picture import Picture

PICTURE, BATCH, ROUNDS = Picture(148, 64, 3), 144, 5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOADS = (0.0, 0.5, 0.6, 0.65, 0.7, 0.8, 0.9) if DEVICE.type == "cuda" else (0.0,)


def seconds(decoder: dali.DaliDecoder, batches: list[list[str]]) -> float:
    """Seconds to decode all batches, until the device has finished."""
    start = time.perf_counter()
    for images, bad in decoder.decode(batches):
        assert not bad, bad
        images[-1, -1, -1, -1].item()
    return time.perf_counter() - start


def free() -> int:
    """Free bytes of the GPU."""
    return torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.dali_sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=60 * BATCH, help="faces to draw (default: 8640)")
    count = parser.parse_args(argv).images
    with tempfile.TemporaryDirectory() as scratch:
        folder = faces.write(scratch, n=count, progress=False) / "img_align_celeba"
        files = sorted(map(str, Path(folder).iterdir()))
        batches = [files[i : i + BATCH] for i in range(0, count, BATCH)]
        for largest in (BATCH, dali.MAX_BATCH):
            dali.MAX_BATCH = largest
            before = free()
            spent = seconds(dali.DaliDecoder(PICTURE, DEVICE), batches[:2])
            text = f"batches of up to {largest}: the first two take {spent:.2f} s"
            print(f"{text} and {(before - free()) / 1e6:.0f} MB of the GPU", flush=True)
        for roi, load in itertools.product((True, False), LOADS):
            decoder = dali.DaliDecoder(PICTURE, DEVICE, roi=roi, hw_load=load)
            seconds(decoder, batches)  # its buffers grow
            rate = count / statistics.median(seconds(decoder, batches) for _ in range(ROUNDS))
            region = "the square" if roi else "whole images"
            print(f"{region}, hardware decoder {load:.2f}: {rate:.0f} images per second", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
