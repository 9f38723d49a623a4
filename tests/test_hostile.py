"""Files and options made to break things: each gives a message, soon, and touches no file it should not.

Every kind of input is tried with a fixed number of cases that hypothesis makes from a fixed seed: few by
default, 10 000 in all under `-m slow`.
"""

import contextlib
import io
import json
import os
import random
import re
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from deadlines import in_time
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pictures import encoded, png, smooth, write_celeba, write_folder

from bvae import config as configuration
from bvae import data, evaluate, ground_truth, train, traverse
from bvae.model import BetaVAE
from bvae.pipelines import cache, celeba, decoder, dsprites, folder
from bvae.pipelines.picture import Picture
from bvae.pipelines.torch_decode import TorchDecoder, decode_bytes
from bvae.pipelines.webdataset import read
from bvae.training import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # torch and Pillow have much to say about such files

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"),
    *("shutil.rmtree", "shutil.copyfile", "shutil.move", "os.chown", "os.utime"),
}

# ---- what was touched --------------------------------------------------------------------------------------

touched: set[str] | None = None  # paths, while a test wants to know


def _watch(event, arguments):
    if touched is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes) and (flags or 0) & WRITES:
            touched.add(os.path.abspath(os.fsdecode(path)))
    elif event in CHANGES:
        relative = any(isinstance(a, int) and a >= 0 for a in arguments[1:])  # to an open folder: rmtree's
        if not relative:
            touched.update(os.path.abspath(os.fsdecode(a)) for a in arguments if isinstance(a, str | bytes))


sys.addaudithook(_watch)  # cannot be taken back


@contextlib.contextmanager
def touches_only(where):
    global touched
    touched = set()
    try:
        yield
    finally:
        found, touched = touched, None
    outside = {path for path in found if not path.startswith(str(where)) and "__pycache__" not in path}
    assert outside <= {os.devnull}


@contextlib.contextmanager
def quiet():
    """Standard output and error that are strict where those of a process are, and that nobody reads."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


# ---- inputs ------------------------------------------------------------------------------------------------


@st.composite
def mutated(draw, seeds):
    """One of the seeds, bytes, with some places overwritten, cut out, repeated or filled in."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        some = draw(
            st.one_of(st.binary(max_size=6), st.sampled_from([b"\xff", b"\0\0\0\0", b"\xff\xff\xff\xff"]))
        )
        match draw(st.sampled_from(["overwrite", "insert", "cut", "repeat", "end"])):
            case "overwrite":
                data[at : at + len(some)] = some
            case "insert":
                data[at:at] = some
            case "cut":
                del data[at : at + draw(st.integers(0, 40))]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(0, 400))]
            case "end":
                del data[at:]
    return bytes(data)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [0, -1, 10**400, -(2**63), 1e308, "1e999", "nan", "auto", "..", "/etc", "\0", "~", "x" * 300]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=8,
)
OURS = yaml.safe_load(configuration.Config().to_yaml())
THEIRS = {
    "model_params": ["name", "in_channels", "latent_dim", "hidden_dims", "loss_type", "Capacity_max_iter"],
    "exp_params": ["dataset", "data_path", "img_size", "batch_size", "LR", "manual_seed", "kld_weight"],
    "data_params": ["data_path", "train_batch_size", "patch_size", "num_workers"],
    "trainer_params": ["gpus", "max_epochs"],
    "logging_params": ["save_dir", "name", "manual_seed"],
}


def sections(known):
    """Mappings of sections to mappings of keys, most of them known."""
    return st.fixed_dictionaries(
        {},
        optional={
            name: st.dictionaries(st.sampled_from([*keys]) | scalars, values, max_size=4) | values
            for name, keys in known.items()
        },
    )


configurations = st.one_of(
    st.one_of(sections(OURS), sections(THEIRS), values).map(
        lambda found: yaml.safe_dump(found, allow_unicode=True).encode("utf-8", "surrogatepass")
    ),
    mutated([yaml.safe_dump(OURS).encode()]),
    st.binary(max_size=60),
    st.text(alphabet="[]{}&*!-:,?|>'\"%@` \n\tab0", max_size=60).map(str.encode),
    st.integers(1, 3000).map(lambda n: b"[" * n),
)

names = st.text(max_size=12) | st.sampled_from(
    ["../../etc/passwd", "/etc/passwd", "..", ".", "a/../b.jpg", "..\\x.jpg", "000001.jpg", "\0.jpg", ""]
)
tables = st.one_of(
    st.lists(st.lists(names | st.floats().map(str) | st.integers().map(str), max_size=3), max_size=4).map(
        lambda rows: "\n".join(["file,a,b", *map(",".join, rows)]).encode("utf-8", "surrogatepass")
    ),
    mutated([b"file,a,b\n000001.jpg,0.5,1\n000002.jpg,1,0\n"]),
)
lists = st.one_of(
    st.lists(st.tuples(names, st.integers(-1, 3) | st.text(max_size=3)), max_size=8).map(
        lambda rows: "\n".join(f"{name} {split}" for name, split in rows).encode("utf-8", "surrogatepass")
    ),
    mutated([b"000001.jpg 0\n000002.jpg 1\n", b"image_id,partition\n000001.jpg,0\n"]),
    st.binary(max_size=60),
)


PICTURES = [
    encoded(smooth((40, 30)), "JPEG"),
    encoded(smooth((40, 30)), "JPEG", progressive=True),
    encoded(smooth((40, 30)).convert("L"), "JPEG"),
    encoded(smooth((40, 30)).convert("CMYK"), "JPEG"),
    encoded(
        smooth((40, 30)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    ),
    encoded(smooth((40, 30)), "PNG"),
    encoded(smooth((40, 30)).quantize(16), "PNG"),
    encoded(smooth((40, 30)).convert("I;16"), "PNG"),
    encoded(smooth((20, 15)), "PNG", save_all=True, append_images=[smooth((20, 15), 1)]),
    *(encoded(smooth((20, 15)), kind) for kind in ("WEBP", "BMP", "GIF", "TIFF")),
]
pictures = mutated(PICTURES)


def tar(form, *members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


SOME = [("a.jpg", PICTURES[0]), ("n" * 80 + "/" + "n" * 80 + ".png", PICTURES[5]), ("b/c.jpg", PICTURES[1])]
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
tars = st.one_of(
    mutated([tar(form, *SOME) for form in FORMATS]),
    st.tuples(st.sampled_from(FORMATS), names).map(
        lambda found: tar(found[0], (found[1] + ".jpg", PICTURES[0]))
    ),
)

FIELDS = ("root", "crop", "size", "channels", "decoder", "count", "files", "bad", "checksums")
ABSENT = "absent"
manifests = st.one_of(
    st.dictionaries(
        st.sampled_from(FIELDS), st.just(ABSENT) | values, max_size=3
    ),  # changed, with a right checksum
    mutated([b'{"count": 3, "size": 8, "checksum": "x"}', b"[]", b'""', b"[" * 3000]),
)

saved = io.BytesIO()
torch.save({"model": {"w": torch.arange(6.0).view(2, 3).T}, "step": 1, "config": ""}, saved)
PICKLE = zipfile.ZipFile(saved).read("archive/data.pkl")
checkpoints = st.one_of(
    mutated([saved.getvalue()]).map(lambda data: (None, data)),
    mutated([PICKLE]).map(lambda data: ("archive/data.pkl", data)),  # with a right checksum
)

buffer = io.BytesIO()
CLASSES = np.stack([np.zeros((3, 6)), np.ones((3, 6))]).astype(np.int64).reshape(6, 6)
np.savez_compressed(buffer, imgs=np.eye(64, dtype=np.uint8)[None].repeat(6, 0), latents_classes=CLASSES)
NPZ = buffer.getvalue()
NPY = {name: zipfile.ZipFile(buffer).read(name) for name in ("imgs.npy", "latents_classes.npy")}
shapes = st.one_of(
    mutated([NPZ]).map(lambda data: (None, data)),
    *(mutated([data]).map(lambda data, name=name: (name, data)) for name, data in NPY.items()),
)
attributes = mutated(
    [
        b"12\nBald Bangs\n" + b"".join(b"%06d.jpg %d -1\n" % (i, (-1) ** i) for i in range(1, 13)),
        b"1\nBald\n000001.jpg 1\n",
    ]
)


def repacked(data, record, changed):
    """A zip file with one record changed, its checksum right; or no record: what is to stand in its place."""
    if record is None:
        return changed
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            target.writestr(name, changed if name == record else source.read(name))
    return buffer.getvalue()


OPTIONS = [f"--{name.replace('_', '-')}" for section in OURS.values() for name in section]
words = st.one_of(
    st.sampled_from(
        [*OPTIONS, "--data", "--data-root", "--no-compile", "--config", "--resume", "--out", "--device"]
    ),
    st.sampled_from(
        ["faces", "folder", "celeba", "run.yaml", "faces_cpu", "auto", "cpu", "cuda", "None", "B", "H"]
    ),
    st.sampled_from(
        ["0", "-1", "1e400", "nan", "64", "9" * 400, "check", "ingest", "ls", "rm", "--all", "--n"]
    ),
    st.text(max_size=6).filter(lambda text: "/" not in text),
    st.binary(max_size=4).map(os.fsdecode).filter(lambda text: "/" not in text and "\0" not in text),
)
commands = st.tuples(
    st.sampled_from([train.main, data.main, traverse.main, evaluate.main]), st.lists(words, max_size=6)
)


# ---- what they are fed to ----------------------------------------------------------------------------------


def read_configuration(data, where):
    path = where / "run.yaml"
    path.write_bytes(data)
    with contextlib.suppress(ValueError):
        found, _, _ = configuration.read(path)
        found.check()
        again = where / "again.yaml"
        again.write_text(found.to_yaml(), encoding="utf-8")
        assert configuration.read(again)[0] == found


def read_list(data, where):
    if not (where / "celeba").exists():
        write_celeba(where)
    base = where / "celeba"
    for path in base.glob("list_eval_partition.*"):
        path.unlink()
    (base / f"list_eval_partition.{'csv' if b',' in data else 'txt'}").write_bytes(data)
    with contextlib.suppress(ValueError, FileNotFoundError):
        for files in celeba.inventory(where).splits.values():
            for file in files:
                assert Path(file).parent == base / "img_align_celeba"


def decode(data, where):
    for picture in (Picture(None, 16, 3), Picture(20, 8, 1)):
        with contextlib.suppress(ValueError, RuntimeError):
            assert decode_bytes(data, picture).shape == (picture.size, picture.size, picture.channels)


def read_shard(data, where):
    (where / "shard.tar").write_bytes(data)
    with contextlib.suppress(ValueError, FileNotFoundError):
        for files in folder.inventory(where).splits.values():
            for member in files:
                assert ".." not in member.name.split("/")
                assert not member.name.startswith("/")
                with contextlib.suppress(ValueError, OSError):
                    read(member)


def read_cache(found, where):
    picture, reader = Picture(None, 8, 3), lambda: TorchDecoder(Picture(None, 8, 3))
    if not (where / "images").exists():
        write_folder(where / "images", 3)
    files = [str(path) for path in sorted((where / "images").iterdir())]
    request = cache.Request(where / "images", files, picture, "torchvision")
    with quiet():
        entry = cache.open_or_build(request, where / "cache", reader, "images").folder
        if isinstance(found, dict):
            manifest = json.loads((entry / "manifest.json").read_text())
            manifest = {k: v for k, v in {**manifest, **found}.items() if v != ABSENT and k != "checksum"}
            with contextlib.suppress(TypeError):  # what JSON cannot say
                found = json.dumps({**manifest, "checksum": cache._digest(manifest)}).encode()
        if isinstance(found, bytes):
            (entry / "manifest.json").write_bytes(found)
        assert data.main(["ls", "--cache-dir", str(where / "cache")]) == 0
        assert len(cache.open_or_build(request, where / "cache", reader, "images").images) == 3


def read_checkpoint(case, where):
    record, data = case
    path = where / "step-00000001.pt"
    path.write_bytes(repacked(saved.getvalue(), record, data))
    with contextlib.suppress(checkpoint.Damaged):
        assert checkpoint._load(path, torch.device("cpu"))["step"] == 1


def run_command(case, where):
    command, words = case
    (where / "run.yaml").write_text("data: {name: folder, root: absent}")
    words = [*words, "--data-root", "absent"] if command is train.main else words
    words = [*words, "--n", "2"] if command is data.main and words[:1] == ["faces"] else words
    with quiet(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setenv("XDG_CACHE_HOME", str(where / "cache"))
        try:
            status = command(words)
        except SystemExit as stopped:
            status = stopped.code
    assert status in (0, 2)


def read_table(data, where):
    (where / "factors.csv").write_bytes(data)
    with contextlib.suppress(ValueError):
        found = ground_truth.folder(where, BetaVAE(hidden_dims=[2], image_size=32, latent_dim=1), bins=5)
        assert found.factors.min() >= 0
        assert found.factors.max() < 5
        with contextlib.suppress(ValueError, OSError):
            found.images(np.arange(len(found.factors)))


def read_attributes(data, where):
    if not (where / "celeba").exists():
        write_celeba(where)
    (where / "celeba" / "list_attr_celeba.txt").write_bytes(data)
    with contextlib.suppress(ValueError):
        ground_truth.attributes(where, BetaVAE(hidden_dims=[2], image_size=32, latent_dim=1))


def read_shapes(case, where):
    path, (record, data) = where / "dsprites.npz", case
    path.write_bytes(repacked(NPZ, record, data))
    with contextlib.suppress(ValueError):
        assert dsprites.read(path).packed.shape[1:] == (512,)


class Target(NamedTuple):
    """What is fed, to what, and with how many cases, by default and in the slow run."""

    cases: st.SearchStrategy
    feed: Callable
    few: int
    many: int


TARGETS = {
    "configuration": Target(configurations, read_configuration, 100, 750),
    "list": Target(lists, read_list, 100, 2000),
    "table": Target(tables, read_table, 60, 500),
    "attributes": Target(attributes, read_attributes, 50, 500),
    "shapes": Target(shapes, read_shapes, 50, 500),
    "picture": Target(pictures, decode, 200, 2500),
    "shard": Target(tars, read_shard, 100, 1000),
    "cache": Target(manifests, read_cache, 60, 1000),
    "checkpoint": Target(checkpoints, read_checkpoint, 100, 1000),
    "command": Target(commands, run_command, 60, 500),
}


def explore(name, examples, where):
    target = TARGETS[name]

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(target.cases)
    def case(value):
        with in_time(), touches_only(where):
            target.feed(value, where)

    case()


@pytest.mark.parametrize("name", TARGETS)
def test_few_cases(name, tmp_path):
    explore(name, TARGETS[name].few, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_cases(name, tmp_path):
    explore(name, TARGETS[name].many, tmp_path)


# ---- what was found, or known beforehand -------------------------------------------------------------------

JPEG, PROGRESSIVE, _, _, _, PNG, *_ = PICTURES


def enlarged(jpeg):
    """A JPEG whose header says 60000 x 60000."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", 60_000, 60_000) + jpeg[at + 4 :]


def claiming(kind):
    """A small image whose header says 60000 x 60000, or as many as it can say."""
    data, side = bytearray(encoded(smooth((40, 30)), kind)), 60_000
    match kind:
        case "BMP":
            data[18:26] = struct.pack("<II", side, side)
        case "GIF":
            data[6:10] = struct.pack("<HH", side, side)
        case "TIFF":
            for tag in (256, 257):
                at = data.index(struct.pack("<HHI", tag, 4 if struct.pack("<HH", tag, 4) in data else 3, 1))
                data[at + 8 : at + 12] = struct.pack("<I", side)
        case "WEBP":
            data = bytearray(encoded(smooth((40, 30)), kind, lossless=True))
            data[21:24] = b"\xff\xff\xff"
    return bytes(data)


def bombs():
    larger = png(12_000, 12_000, 8, 2)[8:33]  # Pillow alone would decode it
    scan = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : PROGRESSIVE.rindex(b"\xff\xd9")]
    return {
        "PNG": (png(60_000, 60_000, 8, 2), "60000 x 60000 pixels are more than 80,000,000: not decoded"),
        "JPEG": (enlarged(JPEG), "60000 x 60000 pixels are more than 80,000,000: not decoded"),
        "PNG with two headers": (PNG[:33] + larger + PNG[33:], "broken PNG: it has two headers"),
        "marker without a length": (
            JPEG[:2] + b"\xff\xd0" + enlarged(JPEG)[2:],
            "60000 x 60000 pixels are more than 80,000,000: not decoded",
        ),
        "length of nothing": (
            JPEG[:2] + b"\xff\xe2\0\0" + enlarged(JPEG)[2:],
            "60000 x 60000 pixels are more than 80,000,000: not decoded",
        ),
        "stray bytes": (
            JPEG[:2] + b"\0\xff\0\x01" + enlarged(JPEG)[2:],
            "60000 x 60000 pixels are more than 80,000,000: not decoded",
        ),
        **{
            kind: (claiming(kind), f"60000 x 60000 pixels are more than|broken {kind}")
            for kind in ("BMP", "GIF", "TIFF", "WEBP")
        },
        "hundred scans": (
            PROGRESSIVE[:-2] + 100 * scan + b"\xff\xd9",
            " scans are more than 30: not decoded",
        ),
    }


@pytest.mark.parametrize("name", bombs())
def test_bomb_is_refused_before_it_is_decoded(name):
    bomb, said = bombs()[name]
    with in_time(), pytest.raises(ValueError, match=said):
        decode_bytes(bomb, Picture(None, 16, 3))


def test_few_lines_that_stand_for_billions(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join(8 * [f'*a{i - 1}'])}]" for i in range(1, 12)]
    (tmp_path / "run.yaml").write_text(
        "\n".join([*lines, "model: {latent_dim: *a11}"]).replace("a0:", "training:", 1)
    )
    with in_time(), pytest.raises(ValueError) as refused:  # noqa: PT011 (any text that is short)
        configuration.read(tmp_path / "run.yaml")
    assert len(str(refused.value)) < 2000


def test_pipes_devices_and_giants_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe.tar")
    os.symlink("/dev/zero", tmp_path / "zero.jpg")
    with open(tmp_path / "giant.jpg", "wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "good.jpg").write_bytes(JPEG)
    with in_time():
        files = [file for split in folder.inventory(tmp_path).splits.values() for file in split]
        assert {Path(file).name for file in files} == {"giant.jpg", "good.jpg"}
        for name, said in [
            ("pipe", "regular file"),
            ("zero", "regular file"),
            ("giant", "bytes are more than"),
        ]:
            with pytest.raises(ValueError, match=said):
                read(str(tmp_path / f"{name}.jpg"))


def test_tar_that_goes_in_circles(tmp_path):
    """A member of negative size ends where it starts, so that the next one is the same."""
    data = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    data[124:136] = b"\xff" * 10 + struct.pack(">H", 0x10000 - 512)  # the size, in base 256
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    (tmp_path / "x.tar").write_bytes(tarfile.TarInfo("b.txt").tobuf() + data + bytes(10240))
    with in_time(), pytest.raises(ValueError, match="a negative size"):
        folder.inventory(tmp_path)


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg"])
def test_tar_member_that_leads_out(tmp_path, name):
    (tmp_path / "x.tar").write_bytes(tar(tarfile.GNU_FORMAT, (name, JPEG)))
    with pytest.raises(ValueError, match=re.escape(f"{name!r} points outside the shard's folder")):
        folder.inventory(tmp_path)


@pytest.mark.parametrize("name", ["../000001.jpg", "/etc/passwd", "a/b.jpg", ".."])
def test_listed_file_that_leads_out(tmp_path, name):
    base = write_celeba(tmp_path) / "celeba"
    (base / "list_eval_partition.txt").write_text(f"{name} 0\n")
    (base / "factors.csv").write_text(f"file,a\n{name},1\n")
    with pytest.raises(ValueError, match="is outside the image folder"):
        celeba.inventory(tmp_path)
    with pytest.raises(ValueError, match="is outside the image folder"):
        ground_truth.folder(tmp_path, BetaVAE(hidden_dims=[2], image_size=32), bins=5)


@pytest.mark.parametrize("name", NPY)
def test_shapes_that_claim_to_be_many(tmp_path, name):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**15, 64, 64)}
    )
    (tmp_path / "x.npz").write_bytes(repacked(NPZ, name, header.getvalue() + bytes(1000)))
    with in_time(), pytest.raises(ValueError, match="is not dSprites' npz"):
        dsprites.read(tmp_path / "x.npz")


@pytest.mark.skipif(decoder.choose("auto") != "dali", reason="DALI is not installed")
def test_dali_takes_what_others_refuse(tmp_path):
    """Damaged files beside good ones: each damaged one is named or decoded, and the good ones are as ever."""
    seeded = random.Random(0)
    files = []
    for i in range(60):
        damaged = bytearray(PICTURES[i % len(PICTURES)])
        for _ in range(i % 4):
            damaged[seeded.randrange(len(damaged))] = seeded.randrange(256)
        files.append(str(tmp_path / f"{i:02}.jpg"))
        Path(files[-1]).write_bytes(damaged)
    picture = Picture(None, 16, 3)
    ((images, bad),) = decoder.build("dali", picture, torch.device("cpu")).decode([files])
    for i in range(0, 60, 4):
        assert i not in bad
        assert (images[i].int() - decode_bytes(Path(files[i]).read_bytes(), picture).int()).abs().max() <= 1
