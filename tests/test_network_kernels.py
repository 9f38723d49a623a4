"""`--network-kernels`: the race of the captured step, its times in the cache, and what a run makes of them.

On a CPU a captured step is the step itself, a fake clock times it, and the reference stands for our kernels.
The tests marked gpu run the real ones.
"""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_race import COMPILER, OURS, fake_clock, race_on_a_cpu
from test_processes import finish, torchrun
from test_step import batch, build_step
from test_train import assert_same_run
from tiny import FIT, NETWORK
from torch import nn

from bvae import fit, network_ops
from bvae.config import Config, override
from bvae.errors import UsageError, say_once
from bvae.kernels import launch
from bvae.layers import BatchNormLeakyReLU
from bvae.losses import BetaLoss, CapacityLoss
from bvae.pipelines import faces
from bvae.train import main
from bvae.training import checkpoint, step, step_times
from bvae.training.cli import parse
from bvae.training.network_kernels import shortfall, survey
from bvae.training.setup import open_run
from bvae.training.step_times import Record, StepTimes, race

TINY = [
    *NETWORK,
    "--no-compile",
    *("--log-every", "1", "--checkpoint-every", "2", "--decoder", "torchvision"),
]


# ---- the race ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compiler", "ours", "choice"),
    [
        (102.0, 100.0, "ours"),
        (0.51, 0.5, "ours"),
        (101.99, 100.0, "compiler"),
        (100.0, 100.0, "compiler"),
        (99.0, 100.0, "compiler"),
    ],
)
def test_ours_need_two_percent(compiler, ours, choice):
    assert StepTimes(compiler, ours).choice == choice


def raced(compiler, ours):
    """The order and the times of a race. The n-th replay of all takes compiler(n) or ours(n)."""
    order, now, marks = [], [0.0], []

    def mark():
        marks.append(now[0])
        return now[0]

    def milliseconds(start, end):
        assert len(marks) == 4 * step_times.ROUNDS, "the host waits before all replays are queued"
        return end - start

    def step(name, takes):
        def replay():
            now[0] += takes(len(order))
            order.append(name)

        return replay

    clock = SimpleNamespace(mark=mark, milliseconds=milliseconds)
    times = race(step("c", compiler), step("o", ours), clock)
    return "".join(order), times


def test_both_are_replayed_in_turn():
    order, times = raced(lambda n: 5.0, lambda n: 3.0)
    assert order == "cooc" * 15
    assert times == StepTimes(5.0, 3.0)


def test_a_drift_affects_both():
    _, times = raced(lambda n: 10.0 + n, lambda n: 10.0 + n)
    assert times.compiler == times.ours


def test_one_slow_replay_does_not_decide():
    _, times = raced(lambda n: 1.0, lambda n: 1e6 if n == 1 else 0.9)
    assert times.choice == "ours"


# ---- the times in the cache --------------------------------------------------------------------------------


def parts(
    folder, device="H100", processes="1", loss=None, batch_size=144, dtype=None, compile=True, **options
):
    """The parts of a run that its step's times depend on."""
    config = override(Config(), {"cache_dir": str(folder), **options})
    return SimpleNamespace(
        config=config,
        conditions={"device": device, "processes": processes},
        model=SimpleNamespace(config={"latent_dim": config.model.latent_dim}),
        train=SimpleNamespace(batch_size=batch_size),
        step=SimpleNamespace(dtype=dtype, compile=compile),
        loss=loss or BetaLoss(),
    )


@pytest.fixture
def kept(tmp_path):
    """The file with the times of a race, in a folder of its own."""
    Record(parts(tmp_path / "cache")).write(OURS)
    (file,) = (tmp_path / "cache").iterdir()
    return file


def test_what_is_written_is_read(kept):
    assert Record(parts(kept.parent)).read() == OURS


@pytest.mark.parametrize(
    "other",
    [
        {"device": "A100"},
        {"processes": "2"},
        {"latent_dim": 10},
        {"batch_size": 1024},
        {"accumulate": 2},
        {"dtype": torch.bfloat16},
        {"compile": False},
        {"loss": CapacityLoss()},
        {"loss_type": "TC"},
        {"likelihood": "bernoulli"},
        {"recon": "sum"},
        {"optimizer": "muon"},
        {"deterministic": True},
    ],
    ids=str,
)
def test_times_of_another_step_do_not_count(kept, other):
    assert Record(parts(kept.parent, **other)).read() is None


@pytest.mark.parametrize("package", ["torch", "triton", "bvae"])
def test_times_of_another_version_do_not_count(kept, package, monkeypatch):
    now = checkpoint.versions()
    monkeypatch.setattr(checkpoint, "versions", lambda: {**now, package: "9.9"})
    assert Record(parts(kept.parent)).read() is None


def test_times_of_other_kernels_do_not_count(kept, tmp_path, monkeypatch):
    (tmp_path / "batch_norm.py").write_text("another kernel")
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "launch.py"))
    assert Record(parts(kept.parent)).read() is None


def test_what_does_not_matter_keeps_the_times(kept):
    assert Record(parts(kept.parent, lr=1.0, seed=3, epochs=7, gamma=2.0)).read() == OURS


def rewrite(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def pipe(file):
    file.unlink()
    os.mkfifo(file)


def folder(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-9]),
        lambda file: file.write_bytes(b"\xff" * 90),
        lambda file: file.write_text("[" * 100_000),
        lambda file: file.write_text("[1]"),
        lambda file: file.write_text("{}"),
        lambda file: rewrite(file, key={}),
        lambda file: rewrite(file, ours_ms="fast"),
        lambda file: rewrite(file, ours_ms=float("nan")),
        lambda file: rewrite(file, ours_ms=10**999),
        lambda file: rewrite(file, ours_ms=[2]),
        lambda file: rewrite(file, ours_ms=0),
        lambda file: file.chmod(0) if os.getuid() else file.unlink(),
        folder,
        pipe,
    ],
)
def test_a_damaged_file_counts_as_none(kept, damage):
    damage(kept)
    assert Record(parts(kept.parent)).read() is None


def test_another_users_file_counts_as_none(kept, monkeypatch):
    real = os.fstat

    def fstat(handle):
        status = list(real(handle))
        status[4] = os.getuid() + 1  # st_uid
        return os.stat_result(status)

    monkeypatch.setattr(os, "fstat", fstat)
    assert Record(parts(kept.parent)).read() is None


def test_a_folder_that_cannot_be_written_takes_a_line(tmp_path, capsys):
    say_once.cache_clear()
    (tmp_path / "file").write_text("")
    record = Record(parts(tmp_path / "file" / "cache"))
    record.write(OURS)
    assert record.read() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the next start times the network's kernels again: ")
    assert str(tmp_path) in line


def test_no_folder_takes_a_line(tmp_path, monkeypatch, capsys):
    def default_folder():
        raise UsageError("no folder of yours")

    say_once.cache_clear()
    monkeypatch.setattr(step_times, "default_folder", default_folder)
    run = parts(tmp_path)
    run.config = Config()
    Record(run).write(OURS)
    assert Record(run).read() is None
    assert capsys.readouterr().err.endswith("again: no folder of yours\n")


# ---- a run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """50 drawn faces: 40 to train on, 2 steps an epoch."""
    return faces.write(tmp_path_factory.mktemp("data") / "faces", n=50, seed=0, progress=False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where runs capture, race and train; with the same bits each time."""
    if request.param == "cpu":
        race_on_a_cpu(monkeypatch)
    return request.param


@pytest.fixture
def train(data, device, tmp_path, capsys):
    """Trains in a folder, and gives what it says of the network's kernels."""

    def run(out, *options, steps=4):
        places = [
            "--data-root",
            str(data),
            "--out",
            str(tmp_path / out),
            "--cache-dir",
            str(tmp_path / "cache"),
        ]
        options = [*always(device), "--max-steps", str(steps), *map(str, options)]
        return said(main([*places, *TINY, *options]), capsys)

    return run


def always(device):
    """The same bits each time; on a GPU in bfloat16, which all our kernels take."""
    return ["--device", device, "--deterministic", *(["--amp"] if device == "cuda" else [])]


def said(status, capsys):
    out, err = capsys.readouterr()
    assert status == 0, err
    return [line for line in (out + err).splitlines() if line.startswith(("network", "--network"))]


def kernels_of(out):
    state = checkpoint.load_newest(out / "checkpoints", torch.device("cpu"))
    return next(line.split()[1] for line in state["config"].splitlines() if "network_kernels:" in line)


@pytest.mark.parametrize(
    ("times", "choice"), [(OURS, "ours"), (COMPILER, "compiler")], ids=["ours", "compiler"]
)
def test_a_race_leaves_no_trace(train, times, choice, tmp_path, monkeypatch):
    """A run that has raced is the run with the winner, bit for bit; the next start does not race."""
    clocks = fake_clock(monkeypatch, times)
    measured = f"{times.ours:.3f} ms per step with ours, {times.compiler:.3f} ms with the compiler's"
    assert train("raced", "--network-kernels", "auto")[0] == f"network kernels: {choice}; {measured}"
    train("given", "--network-kernels", choice)
    assert_same_run(tmp_path / "raced", tmp_path / "given")
    assert kernels_of(tmp_path / "raced") == choice
    assert f"network_kernels: {choice}" in (tmp_path / "raced" / "config.yaml").read_text()
    assert len(clocks) == 1
    again = train("again", "--network-kernels", "auto")[0]
    assert again == f"network kernels: {choice}; {measured} (timed at an earlier start)"
    assert len(clocks) == 1
    assert_same_run(tmp_path / "raced", tmp_path / "again")
    assert launch.NETWORK is False


def test_the_two_differ(train, tmp_path):
    """Without this the test above could not fail."""
    for choice in ("ours", "compiler"):
        train(choice, "--network-kernels", choice)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "ours", tmp_path / "compiler")


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_the_gpu_times_both(train, tmp_path):
    (line,) = train("first", "--network-kernels", "auto")
    times = re.fullmatch(
        r"network kernels: (ours|compiler); (\S+) ms per step with ours, (\S+) ms with the compiler's", line
    )
    assert all(0 < float(time) < 100 for time in times.groups()[1:])
    assert train("second", "--network-kernels", "auto") == [f"{line} (timed at an earlier start)"]
    assert_same_run(tmp_path / "first", tmp_path / "second")


def test_state_and_generators_are_restored(data, device, tmp_path, monkeypatch):
    """Also those that a network with dropout would use: here our kernels draw."""
    real = network_ops.batch_norm_leaky_relu

    def draws(x, *arguments, **options):
        torch.rand(1), torch.rand(1, device=x.device)
        return real(x, *arguments, **options)

    monkeypatch.setattr(network_ops, "batch_norm_leaky_relu", draws)
    clocks = fake_clock(monkeypatch, COMPILER)
    found = []
    for choice in ("compiler", "auto"):
        places = [
            "--data-root",
            str(data),
            "--out",
            str(tmp_path / choice),
            "--cache-dir",
            str(tmp_path / "cache"),
        ]
        options = [*places, *TINY, "--device", device, "--max-steps", "4", "--network-kernels", choice]
        with open_run(parse(options, "")) as run:
            generators = [torch.get_rng_state()]
            if device == "cuda":
                generators.append(torch.cuda.get_rng_state())
            found.append([*generators, *(tensor.clone() for tensor in run.step._state())])
    assert len(clocks) == 1
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Broken(Exception):
    """As from Triton."""

    __module__ = "triton.compiler.errors"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Broken("no such layout"), "Broken: no such layout"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
    ],
    ids=["compiler", "memory"],
)
@pytest.mark.parametrize("before", [None, OURS], ids=["race", "timed"])
def test_if_ours_fail_the_compilers_are_used(train, tmp_path, monkeypatch, error, reason, before):
    def fail(*_, **__):
        raise error

    train("given", "--network-kernels", "compiler")
    clocks = fake_clock(monkeypatch, OURS)
    if before:
        train("before", "--network-kernels", "auto")
        clocks.clear()
    monkeypatch.setattr(network_ops, "batch_norm_leaky_relu", fail)
    (line,) = train("auto", "--network-kernels", "auto")
    assert line == f"network kernels: compiler; ours fail here: {reason}"
    assert not clocks
    assert_same_run(tmp_path / "auto", tmp_path / "given")
    assert kernels_of(tmp_path / "auto") == "compiler"


def test_a_failure_is_not_kept(train, tmp_path, monkeypatch):
    clocks = fake_clock(monkeypatch, OURS)
    with monkeypatch.context() as patch:
        patch.setattr(network_ops, "batch_norm_leaky_relu", lambda *_, **__: torch.empty(0, device="nowhere"))
        with pytest.raises(RuntimeError, match="nowhere"):  # a bug keeps its traceback
            train("bug", "--network-kernels", "auto")
    assert launch.NETWORK is False
    train("auto", "--network-kernels", "auto")
    assert len(clocks) == 1


def test_two_graphs_that_do_not_fit_leave_the_compilers(data, train, tmp_path, monkeypatch):
    fake_clock(monkeypatch, OURS)
    real = step.capture
    monkeypatch.setattr(step, "capture", lambda *parts: None if launch.NETWORK else real(*parts))
    (line,) = train("auto", "--network-kernels", "auto")
    assert line == "network kernels: compiler; ours fail here: the graph does not fit the GPU's memory"
    assert kernels_of(tmp_path / "auto") == "compiler"


# ---- a run that goes on ------------------------------------------------------------------------------------


def resume(out, capsys, *options):
    return said(main(["--resume", str(out), "--max-steps", "4", *options]), capsys)


def test_a_resumed_run_keeps_its_kernels(train, device, tmp_path, monkeypatch, capsys):
    clocks = fake_clock(monkeypatch, OURS)
    constant = ("--schedule", "constant", "--capacity-iters", 4)
    train("whole", "--network-kernels", "auto", *constant)
    train("part", "--network-kernels", "auto", *constant, steps=2)
    assert resume(tmp_path / "part", capsys, "--device", device) == []
    assert_same_run(tmp_path / "part", tmp_path / "whole")
    assert kernels_of(tmp_path / "part") == "ours"
    assert len(clocks) == 1


@pytest.mark.parametrize("again", ["--resume RUN", "--resume auto --out RUN"])
@pytest.mark.parametrize(
    ("asked", "lines"),
    [
        ("compiler", ["--network-kernels compiler is not used: RUN continues with ours"]),
        ("ours", []),
        ("auto", []),
    ],
)
def test_a_resumed_run_says_what_it_does_not_use(
    train, device, tmp_path, monkeypatch, capsys, data, again, asked, lines
):
    clocks = fake_clock(monkeypatch, OURS)
    train("run", "--network-kernels", "auto", steps=2)
    out = str(tmp_path / "run")
    options = [word.replace("RUN", out) for word in again.split()]
    if "auto" in options:  # the command is the whole command each time
        places = ["--data-root", str(data), "--cache-dir", str(tmp_path / "cache")]
        options += [*places, *TINY]
    options += [*always(device), "--max-steps", "4", "--network-kernels", asked]
    assert said(main(options), capsys) == [line.replace("RUN", out) for line in lines]
    assert kernels_of(tmp_path / "run") == "ours"
    assert len(clocks) == 1


# ---- without a GPU, and layers that they cannot take -------------------------------------------------------


def on_a_cpu(data, tmp_path, capsys, *options):
    out = tmp_path / "run"
    options = ["--data-root", str(data), "--out", str(out), "--max-steps", "2", *map(str, options)]
    return said(main([*TINY, *options]), capsys), kernels_of(out)


def test_auto_is_the_compilers_without_a_gpu(data, tmp_path, capsys):
    assert on_a_cpu(data, tmp_path, capsys, "--network-kernels", "auto") == ([], "compiler")


def test_ours_without_a_gpu_takes_a_line(data, tmp_path, capsys):
    line = "--network-kernels ours has no effect: they need a GPU and Triton"
    assert on_a_cpu(data, tmp_path, capsys, "--network-kernels", "ours") == ([line], "ours")


def test_the_default_is_the_compilers(data, tmp_path, capsys):
    assert on_a_cpu(data, tmp_path, capsys) == ([], "compiler")


def test_a_network_without_such_layers(data, tmp_path, capsys, monkeypatch):
    line = "--network-kernels ours has no effect: the network has no layer that they take"
    options = ("--arch", "burgess", "--image-size", 64, "--network-kernels")
    assert on_a_cpu(data, tmp_path, capsys, *options, "ours") == ([line], "ours")
    race_on_a_cpu(monkeypatch)
    assert fake_clock(monkeypatch, OURS) == []
    options = ("--out", tmp_path / "auto", *options)
    assert on_a_cpu(data, tmp_path, capsys, *options, "auto")[0] == []


def test_layers_that_they_do_not_take_are_named_once(kernels, monkeypatch):
    """In Triton's interpreter or on a GPU."""
    built, images = build_step(kernels, dtype=torch.bfloat16), batch(2, device=kernels)
    assert set(survey(built, images).values()) == {None}
    line = "--network-kernels ours: PyTorch's layers are used for "
    built.dtype = None
    block = "float32 [2, 4, 32, 32] for CapacityLoss"
    assert shortfall(survey(built, images)) == f"{line}the last block: {block}"
    first = built.model.encoder[0][0].register_forward_hook(lambda module, inputs, y: y.contiguous())
    reason = "float32 [2, 4, 16, 16], not in channels_last"
    assert shortfall(survey(built, images)) == f"{line}encoder.0.1, the last block: {reason}; {block}"
    first.remove()
    built.model.double()
    assert shortfall(survey(built, images)).startswith(
        "--network-kernels ours has no effect: float64 [2, 4, 16, 16]; "
    )
    monkeypatch.setattr(launch, "ENABLED", False)
    assert shortfall(survey(built, images)) == "--network-kernels ours has no effect: --no-fused"


def test_a_loss_of_the_users_leaves_the_last_block(kernels):
    built = build_step(kernels, nn.Identity(), dtype=torch.bfloat16)
    found = survey(built, batch(2, device=kernels))
    assert found.pop("the last block") == "bfloat16 [2, 4, 32, 32] for Identity"
    assert set(found.values()) == {None}


def test_a_survey_runs_no_kernel(monkeypatch):
    """One that cannot be compiled would end the run without the line on what to do."""
    monkeypatch.setattr(network_ops, "has_batch_norm_kernel", lambda x: True)
    monkeypatch.setattr(network_ops, "batch_norm_leaky_relu", None)
    monkeypatch.setattr(launch, "NETWORK", True)
    assert None in survey(build_step(), batch(2)).values()
    assert launch.NETWORK


def test_from_python(capsys):
    images = torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8)
    fitted = fit(images, compile=False, network_kernels="ours", **FIT)
    assert fitted.config.training.network_kernels == "ours"
    assert (
        "--network-kernels ours has no effect: they need a GPU and Triton"
        in capsys.readouterr().out.splitlines()
    )
    with pytest.raises(UsageError, match="network_kernels must be compiler or ours or auto, got 'fast'"):
        fit(images, network_kernels="fast", **FIT)


def test_compiled_code_follows_the_choice(monkeypatch):
    monkeypatch.setattr(network_ops, "has_batch_norm_kernel", lambda x: True)
    monkeypatch.setattr(network_ops, "batch_norm_leaky_relu", lambda x, *_, **__: 0 * x)
    layer = torch.compile(BatchNormLeakyReLU(3), backend="eager")
    x = torch.randn(2, 3, 4, 4)
    for network in (False, True, False):
        monkeypatch.setattr(launch, "NETWORK", network)
        assert (layer(x) == 0).all() == network


# ---- several processes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_agree(data, tmp_path):
    """Rank 0's times decide, and those that it has kept; ours, if they fail on one rank, are used by none."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    status, _, err = finish(torchrun(2, Path(__file__).with_name("race_worker.py"), data, tmp_path))
    assert status == 0, err
    expected = ["ours, True, 1 races", "ours, True, 0 races", "compiler, False, 0 races"]
    for rank in range(2):
        assert (tmp_path / str(rank) / "lines.txt").read_text().splitlines() == expected
