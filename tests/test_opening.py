"""Pipes, devices and endless files in the place of every file that is opened: refused in words, at once."""

import contextlib
import os
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from deadlines import in_time
from pictures import encoded, png, smooth, write_celeba, write_folder

from bvae import config, data, evaluate, ground_truth, opening, train, traverse
from bvae.evaluation import jobs
from bvae.evaluation.options import SweepOptions
from bvae.kernels.cpu import library
from bvae.model import BetaVAE
from bvae.opening import NotRead, read_bytes
from bvae.pipelines import budget, cache, celeba, decoder, dsprites, folder, torch_decode, webdataset
from bvae.pipelines.budget import Budget
from bvae.pipelines.passed_over import PassedOver
from bvae.pipelines.picture import Picture
from bvae.training import checkpoint, log

REASON = {
    "pipe": "not a regular file",
    "link to a pipe": "not a regular file",
    "device": "not a regular file",
    "link to a device": "not a regular file",
    "a terabyte": "bytes are more than",
}
ROOM = 4 << 30  # bytes that a test may take


def put(path, kind):
    """A file of this kind in the place of another."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(path.with_name("the pipe"))
        path.symlink_to("the pipe")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to a device":
        path.with_name("between").symlink_to("/dev/zero")
        path.symlink_to("between")
    else:
        with open(path, "wb") as file:
            file.truncate((1 << 40) + 1)


def save_model(root):
    model = BetaVAE(latent_dim=2, hidden_dims=(4, 8), image_size=32).eval()
    model.save_pretrained(root)
    return model


def save_checkpoint(root):
    model = save_model(root)
    checkpoint.save(root / "checkpoints", 7, {"step": 7, "model": model.state_dict(), "config": ""})
    (root / "model.safetensors").unlink()
    return model


def partition(root):
    return write_celeba(root) / "celeba" / "list_eval_partition.txt", lambda: celeba.inventory(root)


def attributes(root):
    write_celeba(root)
    return root / "celeba" / "list_attr_celeba.txt", lambda: celeba.attributes(root)


def factors(root):
    write_celeba(root)
    model = BetaVAE(latent_dim=2, hidden_dims=(4, 8), image_size=32)
    return root / "celeba" / "factors.csv", lambda: ground_truth.folder(root, model, 5)


def npz(root):
    return root / "x.npz", lambda: dsprites.read(root / "x.npz")


def shard(root):
    return root / "x.tar", lambda: webdataset.members(root / "x.tar", PassedOver())


def image(root):
    return root / "x.jpg", lambda: webdataset.read(str(root / "x.jpg"))


def member(root):
    inside = webdataset.Member(str(root / "x.tar"), "a.jpg", 0, 10)
    return root / "x.tar", lambda: webdataset.read(inside)


def description(root):
    save_model(root)
    return root / "config.json", lambda: BetaVAE.from_pretrained(root)


def weights(root):
    save_model(root)
    return root / "model.safetensors", lambda: BetaVAE.from_pretrained(root)


def newest(root):
    save_checkpoint(root)
    return root / "checkpoints" / "step-00000007.pt", lambda: BetaVAE.from_pretrained(root)


def resumed(root):
    save_checkpoint(root)
    folder = root / "checkpoints"
    return folder / "step-00000007.pt", lambda: checkpoint.load_newest(folder, torch.device("cpu"))


def theirs(root):
    return root / "theirs.ckpt", lambda: BetaVAE.from_pytorch_vae(root / "theirs.ckpt")


def configuration(root):
    return root / "run.yaml", lambda: config.read(root / "run.yaml")


REFUSED = (
    *(partition, attributes, factors, npz, shard, image, member, description, weights, newest, resumed),
    *(theirs, configuration),
)


@pytest.fixture(autouse=True)
def bounded():
    """Little address space: a test that reads without end fails, and does not take the machine's memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, before[1]))
    with in_time():
        yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def counted(monkeypatch):
    """Small images count too."""
    monkeypatch.setattr(budget, "SMALL", 0)


@pytest.mark.parametrize("kind", REASON)
@pytest.mark.parametrize("of", REFUSED, ids=lambda of: of.__name__)
def test_what_is_no_file_is_refused_by_name(tmp_path, of, kind):
    path, open_it = of(tmp_path)
    put(path, kind)
    with pytest.raises(NotRead, match=REASON[kind]) as refused:
        open_it()
    said = str(refused.value)
    assert said.startswith(f"{path}: ")
    assert len(said.splitlines()) == 1


def best(root):
    save_checkpoint(root)
    return root / "checkpoints" / "best.json", lambda: checkpoint.best(root / "checkpoints"), None


def sweep_result(root):
    return root / "evaluation.json", lambda: jobs.read_evaluation(root, SweepOptions()), None


def metrics(root):
    path = root / "metrics.jsonl"
    return path, lambda: log._start(path, 1), (False, {"train": 0, "valid": 0})


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("of", [best, sweep_result, metrics], ids=lambda of: of.__name__)
def test_what_is_no_file_counts_as_absent(tmp_path, of, kind):
    path, open_it, result = of(tmp_path)
    put(path, kind)
    assert open_it() == result


@pytest.mark.parametrize("kind", REASON)
@pytest.mark.parametrize("name", ["manifest.json", "images.bin"])
def test_a_cache_with_what_is_no_file_is_built_again(tmp_path, kind, name):
    root = write_folder(tmp_path / "images", 4)
    request = cache.Request(root, sorted(map(str, root.iterdir())), Picture(None, 32, 3), "torchvision")
    options = (
        tmp_path / "cache",
        lambda: decoder.build("torchvision", request.picture, torch.device("cpu")),
        "images",
    )
    entry = cache.open_or_build(request, *options).folder
    put(entry / name, kind)
    with pytest.raises(cache.Damaged, match=name.replace(".", r"\.")):
        cache.read(entry)
    assert len(cache.open_or_build(request, *options).images) == 4


@pytest.mark.parametrize("kind", REASON)
def test_every_command_says_it_in_one_line(tmp_path, capsys, kind):
    with contextlib.suppress(library.NotBuilt):
        library.load()  # the first training on a machine says that it compiles the layers
    save_model(tmp_path / "model")
    bad = tmp_path / "bad.jpg"
    put(bad, kind)
    commands = (
        (traverse.main, str(tmp_path / "model"), "--image", str(bad)),
        (train.main, "--config", str(bad)),
        (train.main, "--data", "dsprites", "--data-root", str(bad), "--cache-dir", str(tmp_path)),
        (evaluate.main, str(tmp_path / "model"), "--data", "dsprites", "--data-root", str(bad)),
    )
    for command, *options in commands:
        capsys.readouterr()
        assert command(options) == 2
        error = capsys.readouterr().err
        assert error == f"error: {bad}: {error.partition(': ')[2].partition(': ')[2]}"
        assert REASON[kind] in error
        assert len(error.splitlines()) == 1


def test_check_passes_over_pipes_and_counts_endless_files(tmp_path, capsys):
    root = write_folder(tmp_path / "images", 4)
    put(root / "a.jpg", "pipe")
    put(root / "b.jpg", "device")
    put(root / "c.jpg", "a terabyte")
    assert data.main(["check", str(root)]) == 1
    said = capsys.readouterr().out
    assert f"{root / 'c.jpg'}: 1,099,511,627,777 bytes are more than 1,073,741,824: not read" in said
    assert "4 of 5 images can be used" in said


def test_a_file_at_the_limit_is_read(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bytes(tmp_path / "x", 5) == b"12345"
    with pytest.raises(NotRead, match=f"{tmp_path}/x: 5 bytes are more than 4: not read"):
        read_bytes(tmp_path / "x", 4)
    (tmp_path / "y").symlink_to("x")
    assert read_bytes(tmp_path / "y", 5) == b"12345"


def test_what_does_not_fit_into_memory_is_said(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.truncate(opening.WEIGHTS)
    with pytest.raises(NotRead, match=r"x: its 8,589,934,592 bytes do not fit into memory"):
        read_bytes(tmp_path / "x", opening.WEIGHTS)


def test_an_npz_that_unpacks_to_more_than_dsprites(tmp_path):
    """Zeros, a thousand times as long when they are unpacked."""
    np.savez_compressed(tmp_path / "x.npz", latents_classes=np.zeros(50_000_000, np.uint8), imgs=np.zeros(1))
    with pytest.raises(ValueError, match="latents_classes of 50,000,128 bytes are more than 35,390,440"):
        dsprites.read(tmp_path / "x.npz")


# ---- one decoder for all pictures --------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"
STRANGE = {
    "EPS": (EPS, "no image: neither JPEG, PNG, WEBP, BMP, GIF, TIFF nor AVIF"),
    "bomb": (png(30_000, 30_000, 8, 2), "30000 x 30000 pixels are more than 80,000,000: not decoded"),
    "PDF": (b"%PDF-1.4\n", "a PDF instead of an image"),
    "PPM": (b"P6 4 4 255\n" + bytes(48), "no image: neither JPEG"),
}


@pytest.fixture
def no_ghostscript(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", refuse)
    monkeypatch.setattr("subprocess.Popen", refuse)


@pytest.mark.parametrize("name", STRANGE)
def test_pictures_of_traverse_go_through_the_same_decoder(tmp_path, capsys, name, no_ghostscript):
    content, said = STRANGE[name]
    save_model(tmp_path / "model")
    (tmp_path / "x.jpg").write_bytes(content)
    assert traverse.main([str(tmp_path / "model"), "--image", str(tmp_path / "x.jpg")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'x.jpg'}: {said}")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("crop", [None, 20])
def test_pictures_of_an_evaluation_too(tmp_path, capsys, name, crop, no_ghostscript):
    content, said = STRANGE[name]
    root = write_celeba(tmp_path / "data")
    images = root / "celeba" / "img_align_celeba"
    lines = [f"{path.name},{i}\n" for i, path in enumerate(sorted(images.iterdir()))]
    (root / "celeba" / "factors.csv").write_text("file,a\n" + "".join(lines))
    (images / "000002.jpg").write_bytes(content)
    save_model(tmp_path / "model")
    options = ["--data", "faces", "--data-root", str(root), "--points", "12", "--device", "cpu"]
    assert evaluate.main([str(tmp_path / "model"), *options]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert f"000002.jpg: {said}" in error[0]


def test_folders_of_strange_pictures_start_nothing(tmp_path, no_ghostscript):
    """The inventory looks at headers."""
    root = write_folder(tmp_path, 4)
    for name, (content, _) in STRANGE.items():
        (root / f"{name}.png").write_bytes(content)
    assert sum(map(len, folder.inventory(root).splits.values())) == 8


# ---- memory ------------------------------------------------------------------------------------------------


def test_a_budget_is_never_exceeded(counted):
    shared, taken, most = Budget(100), [], []

    def work(size):
        with shared.take(size):
            taken.append(size)
            most.append(sum(taken))
            threading.Event().wait(0.002)
            taken.remove(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in 8 * [10, 30, 60, 100]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) <= 100
    assert len(most) == 32


def test_what_is_larger_than_the_budget_is_decoded_alone(counted):
    shared = Budget(100)
    with shared.take(1000):
        assert shared._taken == 100
    assert shared._taken == 0


def test_a_container_s_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "GROUP", tmp_path / "memory.max")
    whole = budget.memory()
    (tmp_path / "memory.max").write_text("max\n")
    assert budget.memory() == whole
    (tmp_path / "memory.max").write_text("123456\n")
    assert budget.memory() == 123456


def test_all_decoders_of_a_process_share_the_budget(tmp_path, monkeypatch, counted):
    """Two large images at once would exceed it; small ones are decoded beside each other."""
    pixels = 400 * 300
    shared = Budget(2 * torch_decode.OTHERS * pixels - 1)
    monkeypatch.setattr(torch_decode, "DECODING", shared)
    monkeypatch.setattr(torch_decode, "cores", lambda: 8)
    original, now, most = torch_decode._decode, [], []

    def counted(data, header, picture):
        now.append(1)
        most.append(len(now))
        threading.Event().wait(0.02)
        image = original(data, header, picture)
        now.pop()
        return image

    monkeypatch.setattr(torch_decode, "_decode", counted)
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(encoded(smooth((400, 300), i), "PNG"))
    files = sorted(map(str, tmp_path.iterdir()))
    reader = torch_decode.TorchDecoder(Picture(None, 32, 3))
    ((images, bad),) = reader.decode([files])
    assert (bad, max(most)) == ({}, 1)
    alone = torch_decode.decode_bytes((tmp_path / "3.png").read_bytes(), reader.picture)
    assert torch.equal(images[3], alone)
    shared.total *= 10
    most.clear()
    list(reader.decode([files]))
    assert max(most) > 1
    assert shared._taken == 0


@pytest.mark.slow
def test_large_images_on_many_threads_take_the_memory_of_one(tmp_path):
    """Four of 20 megapixels and 16 bits, whose decoding takes 440 MB each."""
    width, height = 5000, 4000
    bomb = png(width, height, 16, 6, (b"\0" + bytes(8 * width)) * height)
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(bomb)
    code = f"""
import glob, resource
from bvae.pipelines import budget, torch_decode
from bvae.pipelines.picture import Picture
torch_decode.cores = lambda: 4
torch_decode.DECODING.total = 700 << 20
reader = torch_decode.TorchDecoder(Picture(None, 32, 3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
((_, bad),) = reader.decode([sorted(glob.glob({str(tmp_path)!r} + "/*.png"))])
assert not bad
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 700
