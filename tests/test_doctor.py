"""`python -m bvae.doctor` where things are missing or broken: it says so, and never ends in a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bvae import doctor
from bvae.pipelines.decoder import choose

ROOT = Path(__file__).resolve().parent.parent


def script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def found(check):
    return {finding.name: (finding.mark, finding.text) for finding in check()}


@pytest.fixture
def quick(monkeypatch):
    """Trials that succeed at once."""
    monkeypatch.setattr(doctor, "try_in_subprocess", lambda kind: (True, f"tried {kind}"))


def test_everything_is_listed(quick, capsys):
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line[4:21].strip() for line in lines}
    assert names >= {
        *("system", "python", "bvae", "torch", "torchvision", "GPU", "bf16", "triton", "TRITON_INTERPRET"),
        *("C++ compiler", "DALI", "memory", "cache folder", "runs folder", "CPU, eager", "CPU, compiled"),
    }
    assert lines[-1].startswith("Training can run (CPU, eager; CPU, compiled")


def test_a_step_is_taken():
    works, text = doctor.try_in_subprocess("cpu no-compile")
    assert works, text
    assert text.startswith("a tiny step takes ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "cpu compile",
        pytest.param("dali", marks=pytest.mark.skipif(choose("auto") != "dali", reason="no DALI")),
    ],
)
def test_compiled_step_and_dali(kind):
    works, text = doctor.try_in_subprocess(kind)
    assert works, text


@pytest.mark.gpu
def test_steps_on_a_gpu():
    marks = {name: mark for name, (mark, _) in found(doctor.steps).items()}
    assert marks["CUDA, eager"] == marks["CUDA, compiled"] == "ok"


@pytest.mark.parametrize(
    ("module", "raised", "said", "status"),
    [
        (
            "torch",
            "OSError('libcudart.so.13: cannot open shared object file')",
            "OSError: libcudart.so.13: cannot open shared object file",
            1,
        ),
        pytest.param(
            *("tyro", "ModuleNotFoundError('No module named tyro')", "missing: pip install tyro", 1),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("sklearn", "ModuleNotFoundError('No module named sklearn')", "pip install scikit-learn", 0),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_package_missing_or_broken(tmp_path, module, raised, said, status):
    (tmp_path / f"{module}.py").write_text(f"raise {raised}")
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "CXX": "/absent",
    }  # no compiled step: it is slow
    command = [sys.executable, "-m", "bvae.doctor"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout
    assert said in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert f"Training can{'not' if status else ''} run" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("kill -SEGV $$", "it crashed with signal 11"),
        ("exec sleep 60", "it did not end within 0.5 s"),
        ("echo noise >&2; echo 'RuntimeError: no kernel image' >&2; exit 1", "RuntimeError: no kernel image"),
        ("exit 3", "it ended with status 3"),
    ],
)
def test_trial_that_fails(tmp_path, monkeypatch, body, said):
    monkeypatch.setattr(sys, "executable", script(tmp_path / "python", body))
    monkeypatch.setattr(doctor, "LIMIT", 0.5)
    assert doctor.try_in_subprocess("cpu no-compile") == (False, said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_failing_trial_says_why_in_one_line():
    works, text = doctor.try_in_subprocess("cuda no-compile")
    assert not works
    assert text.startswith("UsageError: --device cuda: PyTorch sees no GPU")


def test_nothing_works(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "try_in_subprocess", lambda kind: (False, "it crashed with signal 4"))
    assert doctor.main([]) == 1
    shown = capsys.readouterr().out
    assert "NO  CPU, eager        it crashed with signal 4" in shown
    assert "use --decoder torchvision" in shown
    assert "Training cannot run" in shown.splitlines()[-1]


def test_a_check_that_fails_leaves_the_others(quick, monkeypatch, capsys):
    def broken():
        raise RuntimeError("the driver says no\nand more")

    monkeypatch.setitem(doctor.SECTIONS, "GPU", broken)
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert "NO  GPU               cannot be checked (RuntimeError: the driver says no)" in shown
    assert shown.splitlines()[-1].endswith("Not well: GPU.")


def test_no_compiler(quick, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    mark, text = found(doctor.compilers)["C++ compiler"]
    assert mark == "--"
    assert "install g++" in text
    assert found(doctor.steps)["CPU, compiled"][0] == "--"


def test_triton_needs_a_c_compiler_and_headers(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    lines = found(doctor.compilers)
    for name, said in (
        ("C compiler", "no gcc nor clang"),
        ("Python's headers", f"no Python.h in {tmp_path}"),
    ):
        mark, text = lines[name]
        assert mark == "NO"
        assert text.startswith(said)
        assert text.endswith("--no-compile --no-fused")
    script(tmp_path / "clang", "echo clang version 21")
    (tmp_path / "Python.h").write_text("")
    lines = found(doctor.compilers)
    assert lines["C compiler"] == ("ok", "clang version 21")
    assert lines["Python's headers"] == ("ok", str(tmp_path))


@pytest.mark.slow
def test_a_compiler_that_fails(tmp_path, monkeypatch):
    """Training would be eager; the doctor says that it does not compile."""
    text = 'case "$1" in -*) exec g++ "$@";; esac; echo "a.cpp: error: no headers" >&2; exit 1'
    monkeypatch.setenv("CXX", script(tmp_path / "c++", text))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    works, text = doctor.try_in_subprocess("cpu compile")
    assert not works
    assert text.startswith("RuntimeError: torch.compile failed")


def test_no_dali(monkeypatch):
    monkeypatch.setattr("bvae.pipelines.decoder.find_spec", lambda name: None)
    assert found(doctor.dali)["DALI"][0] == "--"
    assert "pip install nvidia-dali-cuda130" in found(doctor.dali)["DALI"][1]


def test_interpreter_left_on(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    mark, text = found(doctor.triton)["TRITON_INTERPRET"]
    assert mark == "NO"
    assert "unset it" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_driver_without_a_torch_that_sees_it(tmp_path, monkeypatch):
    script(tmp_path / "bin" / "nvidia-smi", "echo 'NVIDIA H100, 580.65'")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    mark, text = found(doctor.gpu_and_driver)["GPU"]
    assert mark == "NO"
    assert text.startswith("NVIDIA H100, 580.65, but PyTorch does not see it; this torch is built for ")


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "runs").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.chdir(tmp_path)
    lines = found(doctor.memory_and_disk)
    for name, option in (("cache folder", "--cache-dir"), ("runs folder", "--out")):
        mark, text = lines[name]
        assert mark == "NO"
        assert text.endswith(f"cannot be written (Not a directory): choose another with {option}")


def test_full_disk(monkeypatch):
    monkeypatch.setattr(doctor, "LITTLE_DISK", 1e30)
    assert found(doctor.memory_and_disk)["cache folder"][0] == "NO"
