"""One picture, whoever decodes it; and what is said of files that no one can decode."""

import struct
import sys
import zlib
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import damaged, encoded, flip_bit, png, smooth, write_image
from PIL import Image, ImageOps, features
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from bvae.pipelines import decoder, faces
from bvae.pipelines.picture import Picture, inspect
from bvae.pipelines.streaming_loader import inspect_files
from bvae.pipelines.torch_decode import decode_bytes

CPU = torch.device("cpu")
needs_dali = pytest.mark.skipif(decoder.choose("auto") != "dali", reason="DALI is not installed")
DECODERS = ["torchvision", pytest.param("dali", marks=needs_dali)]
CELEBA = Picture(148, 64, 3)
NAMESPACE = module_from_spec(ModuleSpec("nvidia", None, is_package=True))  # of other wheels than DALI's


def decode(name, files, picture=CELEBA, device=CPU, batch=64):
    """All images [N, size, size, C] on the CPU, and what is bad by file name."""
    reader = decoder.build(name, picture, device)
    batches = [files[i : i + batch] for i in range(0, len(files), batch)]
    images, bad = [], {}
    for files_of, (pixels, wrong) in zip(batches, reader.decode(batches), strict=True):
        images.append(pixels.cpu())
        bad |= {Path(files_of[i]).name: text for i, text in wrong.items()}
    return torch.cat(images), bad


def pil(path, picture=CELEBA):
    """The rule in PIL's words."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    side = picture.crop or min(image.size)
    cut = v2.Compose([v2.CenterCrop(side), v2.Resize(picture.size), v2.PILToTensor()])
    return cut(image).permute(1, 2, 0)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = faces.write(tmp_path_factory.mktemp("faces"), n=60, seed=0, progress=False)
    return sorted(str(path) for path in (root / "img_align_celeba").iterdir())


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Parts of two photographs, of CelebA's size, and the two photographs whole."""
    folder, files = tmp_path_factory.mktemp("photographs"), []
    for number, photograph in enumerate(load_sample_images().images):
        whole = Image.fromarray(photograph)
        places = [(0, 0, *whole.size)]
        places += [(x, y, x + 178, y + 218) for x in range(0, 460, 90) for y in (0, 100, 200)]
        for place in places:
            files.append(str(folder / f"{number}-{'-'.join(map(str, place))}.jpg"))
            whole.crop(place).save(files[-1], quality=75 + 20 * number, subsampling=2 - 2 * number)
    return files


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("source", ["drawn", "photographs"])
@pytest.mark.parametrize("crop", [148, None], ids=["crop 148", "largest square"])
def test_pictures_are_pils(name, source, crop, request):
    files, picture = request.getfixturevalue(source), Picture(crop, 64, 3)
    images, bad = decode(name, files, picture)
    assert not bad
    difference = (images.int() - torch.stack([pil(file, picture) for file in files]).int()).abs()
    assert difference.max() <= 1


@needs_dali
@pytest.mark.gpu
@pytest.mark.parametrize("roi", [True, False], ids=["roi", "whole"])
@pytest.mark.parametrize("source", ["drawn", "photographs"])
def test_a_gpu_decodes_nearly_pils_pictures(source, roi, request):
    from bvae.pipelines.dali import DaliDecoder

    files = request.getfixturevalue(source)
    ((images, bad),) = DaliDecoder(CELEBA, torch.device("cuda"), roi=roi).decode([files])
    assert not bad
    difference = (images.cpu().int() - torch.stack([pil(file) for file in files]).int()).abs()
    assert difference.float().mean() < 0.5
    assert (difference <= 3).float().mean() > 0.999


@needs_dali
def test_part_or_whole_is_the_same_on_a_cpu(drawn):
    from bvae.pipelines.dali import DaliDecoder

    part, whole = (list(DaliDecoder(CELEBA, CPU, roi=roi).decode([drawn])) for roi in (True, False))
    assert torch.equal(part[0].images, whole[0].images)


ODD = {
    "CMYK JPEG": lambda: (encoded(smooth().convert("CMYK"), "JPEG", quality=95), 3),
    "grey JPEG": lambda: (encoded(smooth().convert("L"), "JPEG", quality=95), 1),
    "progressive JPEG": lambda: (encoded(smooth(), "JPEG", quality=95, progressive=True), 1),
    "palette PNG": lambda: (encoded(smooth().quantize(64), "PNG"), 1),
    "opaque PNG with alpha": lambda: (encoded(smooth().convert("RGBA"), "PNG"), 1),
    "WebP": lambda: (encoded(smooth(), "WEBP"), 1),
    "BMP": lambda: (encoded(smooth(), "BMP"), 1),
    "GIF": lambda: (encoded(smooth(), "GIF"), 1),
    "TIFF": lambda: (encoded(smooth(), "TIFF"), 1),
    "CMYK TIFF": lambda: (encoded(smooth().convert("CMYK"), "TIFF"), 1),
    "animated GIF": lambda: (encoded(smooth(), "GIF", save_all=True, append_images=[smooth(seed=1)]), 1),
    "animated WebP": lambda: (encoded(smooth(), "WEBP", save_all=True, append_images=[smooth(seed=1)]), 1),
    "TIFF of two pages": lambda: (encoded(smooth(), "TIFF", save_all=True, append_images=[smooth()]), 1),
}
if features.check("avif"):
    ODD["AVIF"] = lambda: (encoded(smooth(), "AVIF"), 1)
ODD["two-colour PNG"] = lambda: (encoded(smooth().convert("1"), "PNG"), 1)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", ODD)
def test_odd_files_are_pils(name, kind, tmp_path):
    data, tolerance = ODD[kind]()
    (tmp_path / "odd").write_bytes(data)
    images, bad = decode(name, [str(tmp_path / "odd")])
    assert not bad
    assert (images[0].int() - pil(tmp_path / "odd").int()).abs().max() <= tolerance


JPEG = encoded(smooth(), "JPEG", quality=95, subsampling=0)


def with_chunk(data, kind, content):
    """A PNG with one more chunk before its pixels."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:33] + chunk + data[33:]


TEXT = 3_000_000 * b"a"  # longer than the text that Pillow takes
LONG = {
    "compressed text": (b"zTXt", b"note\0\0" + zlib.compress(TEXT)),
    "international text": (b"iTXt", b"note\0\1\0\0\0" + zlib.compress(TEXT)),
    "colour profile": (b"iCCP", b"icc\0\0" + zlib.compress(TEXT)),
}
BESIDE = {  # what libjpeg and libpng skip
    **{
        name: lambda chunk=chunk: (with_chunk(encoded(smooth(), "PNG"), *chunk), encoded(smooth(), "PNG"))
        for name, chunk in LONG.items()
    },
    "stray bytes": lambda: (JPEG[:20] + b"\0\x01" + JPEG[20:], JPEG),
    "stray and stuffed bytes": lambda: (JPEG[:20] + b"\xff\0\x07\xff" + JPEG[20:], JPEG),
    "a marker without a length": lambda: (JPEG[:20] + b"\xff\xd3" + JPEG[20:], JPEG),
    "fill bytes": lambda: (JPEG[:20] + b"\xff\xff\xff" + JPEG[20:], JPEG),
    "an empty segment of length 0": lambda: (JPEG[:20] + b"\xff\xe5\0\0" + JPEG[20:], JPEG),
    "bytes after the end": lambda: (JPEG + 1000 * b"x", JPEG),
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", BESIDE)
def test_what_libjpeg_and_libpng_skip_is_skipped(name, kind, tmp_path):
    for file, data in zip("ab", BESIDE[kind](), strict=True):
        (tmp_path / file).write_bytes(data)
    images, bad = decode(name, [str(tmp_path / "a"), str(tmp_path / "b")])
    assert not bad
    assert (images[0].int() - images[1].int()).abs().max() <= 1


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", ["WEBP", "BMP", "PNG", "JPEG"])
def test_a_wrong_suffix_does_not_matter(name, kind, tmp_path):
    for file in ("a.jpg", "a.png"):
        (tmp_path / file).write_bytes(encoded(smooth(), kind))
        images, bad = decode(name, [str(tmp_path / file)])
        assert not bad
        assert (images[0].int() - pil(tmp_path / file).int()).abs().max() <= 1


OTHER = {
    b"\0\0\0\x18ftypheic": "HEIC, which is not read: convert it",
    b"\0\0\0\x18ftypmp42": "a video instead of an image",
    b"RIFF\0\0\0\0AVI ": "a sound or a video",
    b"\xff\x0a": "JPEG XL, which is not read",
    b"\0\0\0\x0cjP  ": "JPEG 2000, which is not read",
    b"<?xml version='1.0'?><svg>": "SVG, which is not read",
    b"version https://git-lfs.github.com/spec/v1": "a pointer of Git LFS",
    b"%PDF-1.4": "a PDF",
}


@pytest.mark.parametrize("start", OTHER)
def test_formats_that_are_not_read_are_named(start):
    with pytest.raises(ValueError, match=OTHER[start]):
        inspect(start + bytes(100))


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("length", [0.1, 0.5, 0.9])
def test_a_truncated_file_of_another_format_is_named(kind, length, tmp_path):
    data = encoded(smooth(), kind)
    (tmp_path / "a").write_bytes(data[: int(length * len(data))])
    _, bad = decode("torchvision", [str(tmp_path / "a")])
    assert kind in bad["a"]
    assert inspect_files([str(tmp_path / "a")], "inspecting").keys() == {0}


def test_streaming_finds_what_the_header_does_not_show(tmp_path):
    (tmp_path / "a.jpg").write_bytes(damaged()["marker flipped"][0])
    assert inspect_files([str(tmp_path / "a.jpg")], "inspecting") == {0: damaged()["marker flipped"][1]}


def test_a_tiff_of_32_bits_is_refused():
    data = encoded(Image.fromarray(np.zeros((40, 40), np.float32)), "TIFF")
    with pytest.raises(ValueError, match="values of 32 bits are not read"):
        decode_bytes(data, Picture(None, 16, 3))


TRANSPARENT = {
    "PNG": lambda image: encoded(image, "PNG"),
    "WebP": lambda image: encoded(image, "WEBP", lossless=True, exact=True),
    "TIFF": lambda image: encoded(image, "TIFF"),
    "grey PNG": lambda image: encoded(image.convert("LA"), "PNG"),
    "palette PNG": lambda image: encoded(image.quantize(16), "PNG"),
    "GIF": lambda image: encoded(image, "GIF"),
    "colour key": lambda image: encoded(image.convert("RGB"), "PNG", transparency=(200, 0, 0)),
    "grey key": lambda image: encoded(image.convert("L"), "PNG", transparency=60),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_pixels_are_white(kind, channels, tmp_path):
    """The left half hides red, the right half is blue."""
    values = np.zeros((40, 40, 4), np.uint8)
    values[:, :20], values[:, 20:] = (200, 0, 0, 0), (0, 0, 220, 255)
    data = TRANSPARENT[kind](Image.fromarray(values))
    image = decode_bytes(data, Picture(None, 40, channels))
    blue = 25 if channels == 1 else torch.tensor([25, 25, 25] if "grey" in kind else [0, 0, 220])
    assert (image[:, :19] == 255).all()
    assert (image[:, 21:].int() - blue).abs().max() <= 1


def test_half_transparent_pixels_are_mixed_with_white():
    data = encoded(Image.new("RGBA", (40, 40), (100, 0, 0, 51)), "PNG")
    assert decode_bytes(data, Picture(None, 1, 3)).flatten().tolist() == [224, 204, 204]


def test_transparency_of_16_bits():
    values = np.tile(np.array([0x1234, 0xABCD], np.uint16).repeat(32), (64, 1))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = with_chunk(png(64, 64, 16, 0, rows), b"tRNS", b"\x12\x34")
    image = decode_bytes(data, Picture(None, 64, 1))
    assert (image[:, :32] == 255).all()
    assert (image[:, 32:] == 0xAB).all()


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_rotation(name, orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_image(tmp_path / f"a.{suffix}", (200, 180), exif=exif, subsampling=0)
    images, _ = decode(name, [str(tmp_path / f"a.{suffix}")])
    assert (images[0].int() - pil(tmp_path / f"a.{suffix}").int()).abs().max() <= 1
    assert inspect((tmp_path / f"a.{suffix}").read_bytes()).plain == (orientation == 1 and suffix == "jpg")


@pytest.mark.parametrize("colour", ["grey", "RGB"])
def test_of_16_bits_the_upper_8_count(colour, tmp_path):
    values = np.random.default_rng(0).integers(0, 1 << 16, (64, 64, 3 if colour == "RGB" else 1))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(png(64, 64, 16, 2 if colour == "RGB" else 0, rows))
    images, _ = decode("torchvision", [str(tmp_path / "a.png")], Picture(64, 64, 3))
    assert torch.equal(images[0], torch.from_numpy((values >> 8).astype(np.uint8)).expand(64, 64, 3))


@pytest.mark.parametrize("name", DECODERS)
def test_grey(name, drawn):
    images, _ = decode(name, drawn[:3], Picture(148, 64, 1))
    assert images.shape == (3, 64, 64, 1)
    luma = np.stack(
        [
            Image.open(file).convert("L").crop((15, 35, 163, 183)).resize((64, 64), Image.BILINEAR)
            for file in drawn[:3]
        ]
    )
    assert (images[..., 0].int() - torch.from_numpy(luma).int()).abs().max() <= 2


@pytest.mark.parametrize("name", DECODERS)
def test_every_kind_of_damage_is_named_and_the_others_are_decoded(name, drawn, tmp_path):
    files, expected = list(drawn), {}
    for i, (kind, (data, said)) in enumerate(damaged().items()):
        (tmp_path / kind).write_bytes(data)
        files.insert(4 * i, str(tmp_path / kind))
        expected[kind] = said
    expected["absent.jpg"] = "No such file or directory"
    files.append(str(tmp_path / "absent.jpg"))
    images, bad = decode(name, files, batch=8)
    assert bad.keys() == expected.keys()
    for kind, said in expected.items():
        assert bad[kind].startswith(said), kind
    good = [i for i, file in enumerate(files) if file in drawn]
    assert torch.equal(images[good], decode(name, drawn)[0])


@needs_dali
def test_flipped_bits_cost_dali_no_other_image(drawn, tmp_path):
    """Whether a file is refused depends on the bit; the files beside it are as they would be."""
    flips = []
    for i in range(60):
        data = Path(drawn[i]).read_bytes()
        flips.append(str(tmp_path / f"{i}.jpg"))
        Path(flips[-1]).write_bytes(flip_bit(data, 37 * i % 1200, i % 8))
    mixed = [file for pair in zip(drawn, flips, strict=True) for file in pair]
    images, bad = decode("dali", mixed, batch=16)
    assert torch.equal(images[::2], decode("dali", drawn)[0])
    assert len(bad) > 5
    assert bad == decode("torchvision", flips)[1]


@needs_dali
def test_a_batch_without_a_jpeg(drawn, tmp_path):
    write_image(tmp_path / "a.png")
    batches = [[str(tmp_path / "a.png")], drawn[:2], [str(tmp_path / "absent.jpg")], []]
    reader = decoder.build("dali", CELEBA, CPU)
    assert [len(images) for images, _ in reader.decode(batches)] == [1, 2, 1, 0]


@needs_dali
def test_a_second_epoch_begins_where_no_other_left_anything(drawn, tmp_path):
    """The decoder keeps its pipeline, unless batches are still in it or another epoch has it."""
    batches = [drawn[i : i + 8] for i in range(0, 60, 8)]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(damaged()["table flipped"][0])
    expected = decode("dali", drawn)[0]
    reader = decoder.build("dali", CELEBA, CPU)

    def epoch():
        return torch.cat([images for images, _ in reader.decode(batches)])

    for images, _ in reader.decode(batches):
        assert torch.equal(images, expected[:8])
        break
    assert torch.equal(epoch(), expected)
    kept = reader._idle
    assert torch.equal(epoch(), expected)
    assert reader._idle is kept
    beside = zip(reader.decode(batches), reader.decode(batches[::-1]), strict=True)
    assert all(torch.equal(a.images, expected[8 * i : 8 * i + 8]) for i, (a, _) in enumerate(beside))
    for bad in ([str(broken)], [*drawn[:7], str(broken)]):
        assert [len(wrong) for _, wrong in reader.decode([drawn[:8], bad])] == [0, 1]
        assert torch.equal(epoch(), expected)


def test_auto_takes_dali_where_it_is_installed(monkeypatch, tmp_path):
    (tmp_path / "dali").mkdir()
    (tmp_path / "dali" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "nvidia.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia", NAMESPACE)
    monkeypatch.setattr(NAMESPACE, "__path__", [str(tmp_path)])
    assert decoder.choose("auto") == "dali"


@pytest.mark.parametrize("namespace", [NAMESPACE, None], ids=["of other wheels", "none"])
def test_no_dali(monkeypatch, namespace):
    monkeypatch.delitem(sys.modules, "nvidia.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia", namespace)
    assert decoder.choose("auto") == "torchvision"
    with pytest.raises(ValueError, match="DALI is not installed .pip install nvidia-dali-cuda130"):
        decoder.choose("dali")


def test_dali_that_does_not_load_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "bvae.pipelines.dali", None)
    with pytest.raises(ValueError, match="DALI does not load .*: choose --decoder torchvision"):
        decoder.build("dali", CELEBA, CPU)
