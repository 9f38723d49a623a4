"""A compiler that fails, and its cache after a crash: a run compiles again, is eager, or says why not."""

import _ctypes
import errno
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import NETWORK

from bvae.errors import say_once
from bvae.pipelines import faces
from bvae.training import compiler
from bvae.training.cli import parse
from bvae.training.cuda_graph import is_out_of_memory
from bvae.training.setup import open_run

ROOT = Path(__file__).resolve().parent.parent
KEY = "c" + "a2" * 25 + "b"
TINY = [
    *NETWORK,
    *("--decoder", "torchvision", "--max-steps", "2", "--log-every", "1", "--device", "cpu"),
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of inductor's; Triton's is a folder in it, as on a GPU."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache" / "triton"))
    (tmp_path / "cache" / "a2").mkdir(parents=True)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces.write(tmp_path_factory.mktemp("data") / "faces", n=60, seed=0, progress=False)


# ---- memory ------------------------------------------------------------------------------------------------


def test_the_cpu_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("text", ["cudaMallocAsync allocator is not supported", "an unallocated storage"])
def test_text_with_alloc_in_it_is_not_out_of_memory(text):
    assert not is_out_of_memory(RuntimeError(text))


# ---- files of the cache that are cut short -----------------------------------------------------------------


def test_only_what_is_cut_short_is_removed(cache, capsys):
    whole = Path(_ctypes.__file__).read_bytes()  # as the linker wrote it
    kept = {"whole.so": whole, "whole.json": b'{"shared": 0}', "text.py": b"", f"{KEY}.so.load_ok": b""}
    cut = {f"cut{part}.so": whole[: part * len(whole) // 100] for part in (0, 1, 25, 50, 75, 99)}
    cut |= {"zeros.so": bytes(len(whole)), "kernel.cubin": whole[:1000], "kernel.json": b'{"shared": '}
    for name, content in {**kept, **cut}.items():
        (cache / "a2" / name).write_bytes(content)
    compiler.remove_truncated()
    assert {path.name for path in (cache / "a2").iterdir()} == set(kept)
    assert f"{len(cut)} truncated files are deleted" in capsys.readouterr().err


def test_what_another_process_is_writing_stays(cache):
    path, locks = cache / "a2" / f"{KEY}.main.so", cache / "locks"
    path.write_bytes(b"\x7fELF")
    locks.mkdir()
    with (locks / f"{KEY}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compiler.remove_truncated()
        assert path.exists()
    compiler.remove_truncated()
    assert not path.exists()


# ---- failures, in a step that a failing backend compiles ---------------------------------------------------


class Attempt:
    """A compiled function whose backend raises, so many times; eager it succeeds."""

    def __init__(self, error, times=1):
        self.error, self.times, self.compiles = error, times, True

    def __call__(self):
        def backend(module, inputs):
            if self.times:
                self.times -= 1
                raise self.error
            return module

        function = torch.compile(torch.sin, backend=backend) if self.compiles else torch.sin
        return function(torch.ones(3))

    def recompile(self, compile):
        self.compiles = compile

    def run(self):
        return compiler.first_step(self, self.recompile, compile=True)


def damaged(cache):
    path = cache / "a2" / f"{KEY}.main.so"
    path.write_bytes(b"")
    return path, ImportError(f"{path}: file too short")


def test_a_damaged_file_is_deleted_and_compiled_again(cache, capsys):
    path, error = damaged(cache)
    attempt = Attempt(error)
    assert torch.equal(attempt.run(), torch.ones(3).sin())
    assert attempt.compiles
    assert not path.exists()
    assert "file too short): its files are deleted and compiled again" in capsys.readouterr().err


def test_twice_in_vain_leaves_eager_mode(cache, capsys):
    attempt = Attempt(damaged(cache)[1], times=2)
    assert torch.equal(attempt.run(), torch.ones(3).sin())
    assert not attempt.compiles
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "eager mode is used, as with --no-compile" in shown.splitlines()[-1]


def test_a_failure_names_the_option(cache):
    with pytest.raises(
        compiler.CompileFailed, match=r"RuntimeError: no gcc\): --no-compile trains without"
    ) as caught:
        Attempt(RuntimeError("no gcc")).run()
    assert caught.value.__cause__  # with the traceback


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("as: a.o: No space left on device")],
    ids=["python", "compiler"],
)
def test_full_disk(cache, error):
    with pytest.raises(OSError, match="the compiler needs space, and [0-9,]+ bytes are free") as caught:
        Attempt(error).run()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.__suppress_context__


def test_a_full_disk_that_does_not_matter_takes_one_line(cache, capsys, caplog):
    """PyTorch goes on without its cache, and logs a traceback for each file."""

    def attempt():
        for name in ("torch._inductor.codecache", "torch._functorch._aot_autograd.autograd_cache"):
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                logging.getLogger(name).warning("unable to write to cache", exc_info=True)
        logging.getLogger("torch._inductor.codecache").warning("something else")
        return 7

    say_once.cache_clear()
    assert compiler.first_step(attempt, None, compile=True) == 7
    said = capsys.readouterr().err.splitlines()
    line = "No space left on device: the compiler cannot fill its cache: the next run compiles again"
    assert said.count(line) == 1
    assert "Traceback" not in said
    assert caplog.messages == ["something else"]


def test_out_of_memory_and_other_errors_pass(cache):
    with pytest.raises(Exception, match="CUDA out of memory") as caught:
        Attempt(torch.OutOfMemoryError("CUDA out of memory")).run()
    assert is_out_of_memory(caught.value)

    def bug():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        compiler.first_step(bug, Attempt(None).recompile, compile=True)


# ---- a run -------------------------------------------------------------------------------------------------


def losses(data, tmp_path, rehearse):
    places = [
        "--data-root",
        str(data),
        "--out",
        str(tmp_path / "run"),
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    with open_run(parse([*TINY, *places, "--no-compile"], "")) as run:
        if rehearse:
            run.step.compile_and_restore(run.train.head(16))
        shown = []
        for images in run.batches():
            run.advance(images)
            run.step.metrics_buffer.send(run.done)
            shown.append(run.step.receive(wait=True))
        return shown


def test_a_rehearsal_leaves_no_trace(data, tmp_path):
    plain = losses(data, tmp_path / "plain", rehearse=False)
    assert losses(data, tmp_path / "rehearsed", rehearse=True) == plain
    assert len(plain) > 1


def train(data, folder, name, **environment):
    """A compiled run in a process of its own, with its own cache, unless the environment says otherwise."""
    places = ["--data-root", str(data), "--out", str(folder / name), "--cache-dir", str(folder / "images")]
    command = [sys.executable, "-m", "bvae.train", *TINY, *places, "--compile"]
    own = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    everything = {**os.environ, **own, **environment}
    return subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True)


@pytest.mark.slow
def test_full_disk_under_the_compiler(data, tmp_path):
    script = tmp_path / "c++"
    script.write_text(
        '#!/bin/sh\ncase "$1" in -*) exec g++ "$@";; esac\n'  # asked for its version
        "echo 'as: a.o: No space left on device' >&2; exit 1\n"
    )
    script.chmod(0o755)
    done = train(data, tmp_path, "run", CXX=str(script))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "No space left on device: the compiler needs space, and " in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_killed_while_compiling(data, tmp_path):
    """Each kind of file that a run leaves half written; what the next run makes of it."""
    cache = tmp_path / "cache"

    def trained(name):
        done = train(data, tmp_path, name)
        assert done.returncode == 0, f"{name}: {done.returncode} {done.stderr}"
        assert "; torch.compile; " in done.stdout, f"{name}: {done.stderr}"
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines if '"train"' in line], done.stderr

    def cut(path, part):
        os.truncate(path, int(part * path.stat().st_size))

    def source_alone(library):
        source = library.with_suffix(".cpp")
        library.unlink()
        cut(source, 0.5)

    expected, shown = trained("whole")
    assert "truncated" not in shown
    saved = shutil.copytree(cache, tmp_path / "saved")
    library = sorted(cache.glob("*/*.main.so"))[0]
    module = sorted(cache.glob("??/*.py"))[0]
    damages = {
        "library": (lambda: cut(library, 0.25), "1 truncated files are deleted"),
        "module": (lambda: cut(module, 0.5), "deleted and compiled again"),
        "empty": (lambda: cut(module, 0.0), "deleted and compiled again"),
        "source": (lambda: source_alone(library), "deleted and compiled again"),
    }
    for name, (damage, said) in damages.items():
        shutil.rmtree(cache)
        shutil.copytree(saved, cache)
        damage()
        losses, shown = trained(name)
        assert losses == expected, name
        assert said in shown, f"{name}: {shown}"
        assert library.stat().st_size == (saved / library.relative_to(cache)).stat().st_size
        assert module.read_bytes() == (saved / module.relative_to(cache)).read_bytes()
