"""The benchmarks' own code: the race, the records, the floors and the report."""

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import compare, contenders, report, roofline
from bench import race as racing
from bench import record as records
from bench.reference_step import PyTorchVAE, PyTorchVAEStep
from bench.test_kernels import CASES
from bvae.config import TrainingConfig
from bvae.model import BetaVAE

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def run(calls, gate=dict, rounds=4, **facts):
    results = []
    race = racing.Race(CPU, results, sample_seconds=0.0, warm_calls=1)
    race.run("group", "name", gate=gate, prepare=lambda: calls, rounds=rounds, **facts)
    return results[0]


def test_contenders_alternate():
    turns = []
    run({name: lambda name=name: turns.append(name) for name in ("eager", "compiled", "ours")}, rounds=3)
    warm_up, rounds = turns[:3], turns[3:]
    assert warm_up == ["eager", "compiled", "ours"]
    there = ["eager", "compiled", "ours"]
    assert rounds == there + there[::-1] + there


def test_ratios_are_the_rounds_own(monkeypatch):
    """The machine slows down tenfold on the way; the ratio stays what it is."""
    seconds = {"eager": 3.0, "ours": 2.0}
    pace = iter([1.0, 1.0, 1.0, 1.0, 5.0, 5.0, 10.0, 10.0])
    monkeypatch.setattr(racing, "clock", lambda call, device, calls=1: call() * next(pace))
    result = run({name: lambda s=s: s for name, s in seconds.items()}, rounds=3)
    assert result.timings["eager"].ratio == pytest.approx((1.5, 1.5, 1.5))
    assert result.timings["eager"].seconds == pytest.approx((15.0, 9.0, 22.5))
    assert result.hero == "ours"


def test_bars_are_measured_round_by_round_and_fail_nothing():
    bar = racing.Bar("as fast again", "eager", "compiled", 1e9)
    result = run({name: lambda: sum(range(1000)) for name in ("eager", "compiled", "ours")}, bars=[bar])
    ((told, ratio),) = result.bars
    assert told == bar
    assert 0 < ratio[0] < 1e9


def test_launches_are_kernels_and_not_the_spans_round_them():
    def event(name, microseconds, *, device=True, span=False):
        kind = torch.autograd.DeviceType.CUDA if device else torch.autograd.DeviceType.CPU
        elapsed = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=kind, is_user_annotation=span, time_range=elapsed)

    step = [event("adam_kernel", 3), event("Optimizer.step#Adam.step", 9, span=True)]
    launch = event("cudaGraphLaunch", 5, device=False)
    assert racing._count(step) == (1, pytest.approx(3e-6), False)
    assert racing._count([*step, launch]) == (1, pytest.approx(3e-6), True)


def test_a_red_gate_times_nothing():
    timed = []

    def gate():
        raise AssertionError("ours is off by 3")

    with pytest.raises(AssertionError, match="off by 3"):
        run({"eager": lambda: timed.append(1), "ours": lambda: timed.append(2)}, gate=gate)
    assert timed == []


@pytest.mark.parametrize("index", [0, -1], ids=["sample", "loss"])
def test_the_kernels_gate_sees_a_wrong_output_and_a_wrong_gradient(index):
    case = CASES[index]
    inputs = case.make(CPU)
    case.check("eager", case.eager, inputs)

    def wrong_output(*args):
        *first, last = case.eager(*args)
        return *first, 1.1 * last

    def wrong_gradient(*args):
        *first, last = case.eager(*args)
        return *first, 1.1 * last - 0.1 * last.detach()

    for wrong in (wrong_output, wrong_gradient):
        with pytest.raises(AssertionError, match="ours is off by"):
            case.check("ours", wrong, inputs)


def test_the_kernels_gate_sees_noise_that_is_not_normal():
    case = CASES[0]
    with pytest.raises(AssertionError, match=r"deviation of ours's noise is 0\.[45]"):
        case.check(
            "ours", lambda mu, v: (case.eager(mu, v - 1.3863)[0], case.eager(mu, v)[1]), case.make(CPU)
        )


def test_pytorch_vaes_network_and_step():
    model = PyTorchVAE()
    assert sum(p.numel() for p in model.parameters()) == 3_937_635
    step = PyTorchVAEStep(PyTorchVAE(4, (4, 8), 16), kl_weight=4 / 256, max_capacity=2.0, capacity_iters=4)
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    losses = [step(images) for _ in range(60)]
    loss, mse, kld = losses[0]
    assert loss == pytest.approx(mse + 10 * 4 / 256 * abs(kld - 0.5), rel=1e-5)
    assert losses[-1][1] < 0.95 * losses[0][1]


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_the_steps_gate(tmp_path, monkeypatch, factor):
    """Ours trains as PyTorch-VAE does; with half as much again for a learning rate it does not."""
    network = contenders.Network(10, (16, 32, 64, 128, 256))
    images = torch.randint(256, (16, 64, 64, 3), dtype=torch.uint8)
    there = contenders.pytorch_vae(network, images)
    monkeypatch.setattr(contenders, "LR", factor * contenders.LR)
    here = contenders.ours(network, images, tmp_path, TrainingConfig(compile=False))
    if factor == 1.0:
        assert contenders.check(network, {"there": there, "here": here}, CPU).keys() == {"there", "here"}
    else:
        with pytest.raises(AssertionError, match="here, step [23]: MSE .* expected"):
            contenders.check(network, {"there": there, "here": here}, CPU)


def test_the_floor_of_pytorch_vaes_network():
    """Its published arithmetic, and the passes over its tensors that were counted by hand."""
    cost = roofline.cost({}, itemsize=2)
    assert cost.forward_flop == pytest.approx(104.8e6, rel=1e-3)
    assert cost.flop == pytest.approx(312.6e6, rel=1e-3)
    assert cost.fused_bytes == pytest.approx(7.5e6, rel=0.05)
    assert cost.ideal_bytes == pytest.approx(3.2e6, rel=0.05)
    assert cost.weight_bytes == pytest.approx(181e6, rel=0.01)


def test_the_floor_of_another_network():
    config = {"in_channels": 1, "latent_dim": 3, "hidden_dims": [8], "image_size": 32}
    cost = roofline.cost(config, itemsize=4)
    down, head, back = 2 * 16 * 16 * 8 * 9, 2 * 2048 * 6, 2 * 3 * 2048
    up, last = 2 * 16 * 16 * 8 * 8 * 9, 2 * 32 * 32 * 8 * 9
    assert cost.forward_flop == down + head + back + up + last
    assert cost.flop == 3 * cost.forward_flop - down  # the images get no gradient
    assert cost.parameters == sum(p.numel() for p in BetaVAE(**config).parameters())
    assert cost.seconds(1, 1e9, 1e30) == cost.bytes_per_step(1) / 1e9
    assert cost.seconds(1, 1e30, 1e9) == cost.flop / 1e9


@pytest.mark.parametrize("arch", ["pytorch-vae", "locatello", "burgess", "higgins-fc"])
def test_the_ideal_floor_is_the_lower_one(arch: str):
    cost = roofline.cost({"arch": arch, "in_channels": 1, "latent_dim": 10})
    assert cost.ideal_bytes <= cost.fused_bytes


def timing(seconds, ratio, **more):
    return racing.Timing((seconds, 0.9 * seconds, 1.1 * seconds), 12.0, ratio, **more)


def made(kind="cpu", date="2026-01-02T03:04:05+00:00", device="Some CPU, 2 CPU threads", commit="abc1234"):
    """A record of a step and of a kernel that a GPU would be needed for."""
    even = (1.0, 1.0, 1.0)
    step = racing.Result(
        "step",
        "PyTorch-VAE's network, batch 64",
        {
            "PyTorch-VAE": timing(0.64, (4.0, 3.9, 4.2)),
            "ours": timing(0.16, even),
            "ours, no amp": timing(0.2, (1.25, 1.2, 1.3)),
        },
        "ours",
        None,
        9,
        {"images": 64, "model": {}, "dtype": "float32", "headline": "Training step"},
        [
            (racing.Bar("fast", "PyTorch-VAE", "ours", 3.5), (4.0, 3.9, 4.2)),
            (racing.Bar("faster", "PyTorch-VAE", "ours", 4.5), (4.0, 3.9, 4.2)),
        ],
    )
    kernel = racing.Result(
        "kernels",
        "loss",
        {"eager": timing(0.002, (2.0, 1.9, 2.1)), "compiled": timing(0.001, even)},
        "compiled",
        "ours",
        9,
        {"bytes": 10_000_000, "headline": "Loss"},
    )
    scaling = racing.Result(
        "scaling", "batch 16", step.timings, "ours", None, 9, {"axis": "batch", "value": 16, "images": 16}
    )
    machine = {
        "kind": kind,
        "device": device,
        "cpu": "Some CPU",
        "threads": 2,
        "cpu_capability": "AVX512",
        "driver": None,
        "versions": {"torch": "2.15"},
    }
    return {
        "date": date,
        "commit": commit,
        "uncommitted": False,
        "cold": True,
        "machine": machine,
        "rates": {"copy_bytes_per_s": 2e10, "float32_flop_per_s": 1e11, "bfloat16_flop_per_s": 2e11},
        "load_before": 0.0,
        "results": [{**result.as_json(), "date": date} for result in (step, kernel, scaling)],
    }


@pytest.fixture
def measured(monkeypatch):
    """Rates, and dates a second apart."""
    rates, seconds = itertools.count(1), itertools.count(10)
    monkeypatch.setattr(records, "rates", lambda device: {"copy_bytes_per_s": 1e9 * next(rates)})
    monkeypatch.setattr(records, "now", lambda: f"2026-05-06T07:08:{next(seconds)}+00:00")
    monkeypatch.setattr(records, "source", lambda: ("abc1234", False))


def race_one(record, name, seconds=1.0):
    """As a benchmark of bench/ does."""
    times = {"eager": timing(2 * seconds, (2.0, 2.0, 2.0)), "ours": timing(seconds, (1.0, 1.0, 1.0))}
    record.results.append(racing.Result("group", name, times, "ours", None, 3, {}, [], records.now()))
    record.save()


def contents(record):
    """Each benchmark's time of ours, in order."""
    return {row["name"]: row["timings"]["ours"]["seconds"][0] for row in record["results"]}


def test_a_record_names_its_machine_and_its_commit(tmp_path, monkeypatch):
    measured = iter((12345678.9, 11111111.1))  # before and after: what was slower was disturbed
    monkeypatch.setattr(records, "rates", lambda device: {"copy_bytes_per_s": next(measured)})
    record = records.Record(CPU, cold=True, path=tmp_path)
    record.results.append(run({"eager": lambda: None, "ours": lambda: None}, bytes=8, nothing=None))
    record.finish()
    saved = records.load(record.path)
    assert record.path.parent == tmp_path / records.slug(saved)
    assert record.path.name == f"{saved['date'][:10]}-{saved['commit']}.json"
    assert saved["machine"]["versions"]["torch"] == torch.__version__
    assert saved["machine"]["threads"] == torch.get_num_threads()
    assert saved["rates"] == {"copy_bytes_per_s": 12350000.0}  # four digits
    assert saved["results"][0]["facts"] == {"bytes": 8}
    assert list(saved["results"][0]["timings"]) == ["eager", "ours"]


def test_a_file_that_is_no_record_is_refused_at_once(tmp_path, measured):
    assert records.Record(CPU, cold=True).path is None
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(ValueError, match="mine.json is not a record of bench/: move it away"):
        records.Record(CPU, cold=True, path=tmp_path / "mine.json")


def test_a_record_is_on_disk_after_every_benchmark(tmp_path, measured):
    record = records.Record(CPU, cold=True, path=tmp_path / "r.json")
    for names in (["a"], ["a", "b"]):
        race_one(record, names[-1])
        assert list(contents(records.load(record.path))) == names
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_second_run_adds_its_rows_and_replaces_its_own(tmp_path, measured):
    first = records.Record(CPU, cold=True, path=tmp_path)
    for name in "ab":
        race_one(first, name)
    first.finish()
    second = records.Record(CPU, cold=False, path=tmp_path)
    assert second.path == first.path
    for name in "bc":
        race_one(second, name, seconds=3.0)
    merged = records.load(second.path)
    assert contents(merged) == {"a": 1.0, "b": 3.0, "c": 3.0}
    assert (merged["cold"], merged["rates"]) == (False, {"copy_bytes_per_s": 3e9})
    a, b, c = merged["results"]
    assert (a["cold"], a["rates"]) == (True, {"copy_bytes_per_s": 2e9})
    assert (a["date"], b["date"]) == ("2026-05-06T07:08:11+00:00", "2026-05-06T07:08:14+00:00")
    for row in (b, c):
        assert not {"cold", "rates", "machine", "commit"} & row.keys()  # as the head has them
    assert merged["date"] == "2026-05-06T07:08:15+00:00"
    assert "date" not in c


def test_the_commit_of_a_tree_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert records.source() == ("", False)
    for given, found in (("1a2b3c4", False), ("1a2b3c4d5e6f-dirty", True)):
        monkeypatch.setenv("BVAE_COMMIT", given)
        assert records.source() == ("1a2b3c4", found)
    for wrong in ("main", "../1a2b3c4"):
        monkeypatch.setenv("BVAE_COMMIT", wrong)
        with pytest.raises(ValueError, match="BVAE_COMMIT must be a commit such as 1a2b3c4"):
            records.source()


def test_changes_are_those_of_the_code(tmp_path, monkeypatch):
    """What a run and its report write is none, or the day's second run would be one of changed code."""
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setenv("BVAE_COMMIT", "1a2b3c4")  # of no use where git knows
    kept = [tmp_path / name for name in ("bench/results/some/r.json", "README.md", "code.py")]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    who = ["-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "Begin"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    for path, uncommitted in zip(kept, (False, False, True), strict=True):
        path.write_text("after")
        commit, changed = records.source()
        assert len(commit) == 7
        assert (commit != "1a2b3c4", changed) == (True, uncommitted)


BENCHMARKS = """
import os, pytest, signal

@pytest.mark.parametrize("name", ["first", "fails", "killed", "last"])
def test_one(race, name):
    def gate():
        assert name != "fails", "ours is off"
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return {}
    race("group", name, gate=gate, prepare=lambda: {"eager": lambda: None, "ours": lambda: None})
"""


@pytest.mark.slow
def test_a_run_that_is_killed_keeps_what_it_measured(tmp_path):
    """Also one of which a benchmark fails; and the next run adds to it."""
    (tmp_path / "test_killed.py").write_text(BENCHMARKS)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def bench(*options):
        command = [sys.executable, "-m", "pytest", "-p", "bench.conftest", str(tmp_path), *options]
        done = subprocess.run(command, cwd=records.ROOT, env=environment, capture_output=True, text=True)
        found = list(tmp_path.glob("results/*/*.json"))
        return done, set(contents(records.load(*found))) if found else None

    keep = ["--record", str(tmp_path / "results")]
    done, names = bench("--quick")
    assert (done.returncode, names) == (-signal.SIGKILL, None)
    done, names = bench(*keep)
    assert (done.returncode, names) == (-signal.SIGKILL, {"first"})
    done, names = bench(*keep, "-k", "fails or last")
    assert (done.returncode, names) == (1, {"first", "last"})
    assert "1 failed, 1 passed" in done.stdout
    assert "| last |" in done.stdout
    done, _ = bench("--quick", *keep)
    assert "--quick measures nothing: remove --record" in done.stderr


def write(folder, **more):
    record = made(**more)
    path = folder / records.slug(record) / f"{record['date'][:10]}-{record['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(records.dumps(record))
    return path


def test_the_newest_of_each_benchmark_of_each_device(tmp_path):
    """A newer record of one benchmark hides none of the others, and nothing of another device."""
    write(tmp_path, commit="aaaaaaa", date="2026-03-01T00:00:00+00:00")
    write(tmp_path, kind="cuda", device="Some GPU", date="2026-04-01T00:00:00+00:00")
    write(tmp_path, kind="cuda", device="Other GPU", date="2026-02-01T00:00:00+00:00")
    path = write(tmp_path, commit="bbbbbbb", date="2026-03-02T00:00:00+00:00")
    newer = records.load(path)
    newer["results"] = newer["results"][1:2]
    newer["results"][0]["timings"]["compiled"]["seconds"][0] = 0.5
    path.write_text(records.dumps(newer))
    cpu, *gpus = records.latest(tmp_path)
    assert [record["machine"]["device"] for record in gpus] == ["Other GPU", "Some GPU"]
    assert cpu["commit"] == "bbbbbbb"
    assert [row["name"] for row in cpu["results"]] == ["PyTorch-VAE's network, batch 64", "loss", "batch 16"]
    assert [row.get("commit") for row in cpu["results"]] == ["aaaaaaa", None, "aaaaaaa"]
    assert cpu["results"][1]["timings"]["compiled"]["seconds"][0] == 0.5
    header, _, step, loss = report.headline_table([cpu], brief=False).splitlines()
    assert "2026-03-02, commit bbbbbbb |" in header
    assert "as fast as ours, no amp (2026-03-01, commit aaaaaaa) |" in step
    assert "aaaaaaa" not in loss
    text = report.markdown(cpu)
    assert "| PyTorch-VAE's network, batch 64 (2026-03-01, commit aaaaaaa) |" in text
    assert "| loss |" in text


def test_other_versions_are_named():
    old, new = made(commit="aaaaaaa"), made(date="2026-02-01T00:00:00+00:00")
    old["machine"] = {**old["machine"], "versions": {"torch": "2.11"}}
    new["results"] = new["results"][:1]
    both = records.assemble([*records.rows(old), *records.rows(new)])
    assert "| loss (2026-01-02, commit aaaaaaa, torch 2.11) |" in report.markdown(both)


def test_records_of_before_still_load(tmp_path):
    """When a record was of one run, and its rows had no dates."""
    old = {**made(), "left_out": 3, "load_after": 1.0}
    for row in old["results"]:
        del row["date"]
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "r.json").write_text(json.dumps(old))
    (record,) = records.latest(tmp_path)
    assert report.markdown(record) == report.markdown(made())


def test_the_table_of_headlines():
    header, _, step, kernel = report.headline_table([made()], brief=False).splitlines()
    assert header == "|  | Some CPU, 2 CPU threads, 2026-01-02, commit abc1234 |"
    assert (
        step == "| Training step | 400 images/s<br>4.00 x (3.90 to 4.20) as fast as PyTorch-VAE<br>"
        "1.25 x (1.20 to 1.30) as fast as ours, no amp |"
    )
    assert kernel == (
        "| Loss | ours: not measured yet; compiled: 1 ms<br>2.00 x (1.90 to 2.10) as fast as eager |"
    )


def test_the_brief_table():
    """One measured benchmark of each group, beside what people have."""
    record = made()
    kernel = {**record["results"][1], "missing": None, "facts": {"headline": "Another loss"}}
    record["results"] += [kernel, {**kernel, "facts": {"headline": "A third"}}]
    _, _, step, loss = report.headline_table([record], brief=True).splitlines()
    assert step == "| Training step | 400 images/s<br>4.00 x (3.90 to 4.20) as fast as PyTorch-VAE |"
    assert loss.startswith("| Another loss | 1 ms<br>2.00 x")
    assert len(report.headline_table([made()], brief=True).splitlines()) == 3


def test_steps_come_first():
    record = made()
    record["results"].reverse()
    for brief in (False, True):
        table = report.headline_table([record], brief=brief)
        assert table == report.headline_table([made()], brief=brief)
    assert report.markdown(record) == report.markdown(made())


def test_each_device_has_its_own_column():
    devices = [made("cuda", device="A"), made(), made("cuda", device="B")]
    header, _, step, _ = report.headline_table(devices, brief=False).splitlines()
    assert [cell.split(",")[0].strip() for cell in header.split("|")[2:-1]] == ["Some CPU", "A", "B"]
    assert step.count("400 images/s") == 3
    header, *_ = report.headline_table(devices[:1], brief=False).splitlines()
    assert [cell.split(",")[0].strip() for cell in header.split("|")[1:-1]] == ["", "A"]


def test_a_busy_machine_is_said_to_be_one():
    assert "shared, load 1.7" in report.headline_table([{**made(), "load_before": 1.71}], brief=True)


def test_the_whole_record_as_markdown():
    text = report.markdown(made())
    assert "| step | PyTorch-VAE | ours | ours, no amp | first call | of the floor |" in text
    assert "| 100 images/s (ours: 4.00 x (3.90 to 4.20)) | 400 images/s |" in text
    assert "| 12 s | 125% |" in text  # 64 x 312.6 MFLOP
    assert "| 2 ms (compiled: 2.00 x (1.90 to 2.10)) | 1 ms | not measured yet |" in text
    assert "| 12 s | 50% (10 GB/s) |" in text
    assert "| fast | 3.5 x | 4.00 x (3.90 to 4.20) | met |" in text
    assert "| faster | 4.5 x | 4.00 x (3.90 to 4.20) | missed |" in text


def test_a_floors_share_and_its_rate_are_of_the_same_time():
    """On a GPU, where the gaps between kernels count for neither."""
    record = made("cuda")
    kernel = record["results"][1]["timings"]["compiled"]
    kernel.update(device_seconds=kernel["seconds"][0] / 2, launches=3)
    assert "| 100% (20 GB/s) | 3 |" in report.markdown(record)


def test_only_the_table_between_the_markers_is_rewritten():
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.rewrite(text, "| new \\1 |")
    assert once == f"before\n{report.BEGIN}\n| new \\1 |\n{report.END}\nafter\n"
    assert report.rewrite(once, "| new \\1 |") == once
    with pytest.raises(ValueError, match="needs each of the lines"):
        report.rewrite("no markers", "")


def test_the_report_rewrites_both_tables_and_draws(tmp_path, capsys):
    pages, folder = (
        [tmp_path / "README.md", tmp_path / "full.md"],
        tmp_path / "results" / "some-cpu-2-cpu-threads",
    )
    folder.mkdir(parents=True)
    for page in pages:
        page.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert report.main(*pages, tmp_path / "results") == 1
    assert "make one with `make bench`" in capsys.readouterr().err
    (folder / "r.json").write_text(json.dumps(made()))
    assert report.main(*pages, tmp_path / "results") == 0
    for page, brief in zip(pages, (True, False), strict=True):
        assert report.headline_table([made()], brief=brief) in page.read_text()
    for name in ("ratios", "roofline", "scaling"):
        assert (folder / f"{name}.png").stat().st_size > 1000
    before = pages[0].read_text()
    pages[1].write_text("no markers")
    assert report.main(*pages, tmp_path / "results") == 1
    assert pages[0].read_text() == before


def slower(factor):
    """The record with "ours" in the step slower, and everything else as it was within its spread."""
    record = copy.deepcopy(made())
    ours = record["results"][0]["timings"]["ours"]
    ours["seconds"] = [factor * s for s in ours["seconds"]]
    return record


def test_a_regression_beyond_the_spread_is_seen():
    moved = compare.moves([made(), made()], [slower(1.3), slower(1.3)])
    assert [move.name for move in moved] == ["step: PyTorch-VAE's network, batch 64: ours"]
    assert moved[0].speedup == pytest.approx(1 / 1.3)
    shown = compare.table([made()], [slower(1.3)])
    assert "1 of 8 timings moved" in shown
    assert "| 400 images/s | 307.7 images/s | 0.77 x |" in shown
    assert compare.moves([made()], [slower(0.5)])[0].speedup == 2


def test_a_change_within_the_spread_is_not():
    assert compare.moves([made()], [slower(1.15)]) == []
    assert compare.moves([made(), slower(1.3)], [slower(1.3)]) == []  # base varies as much itself
    assert compare.table([made()], [made()]) == "0 of 8 timings moved beyond the spread."


def test_a_base_that_is_no_commit(capsys):
    assert compare.main(["no-such-commit"]) == 2
    assert "error: no-such-commit: fatal:" in capsys.readouterr().err


@pytest.mark.slow
def test_a_commit_is_compared_with_the_tree(capfd):
    """With itself: the base is checked out, measured in turn with the tree, and taken away again."""
    trees = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, cwd=records.ROOT)
    assert compare.main(["HEAD", "--rounds", "1", "-k", "sample and 144 and float32 and both"]) == 0
    shown = capfd.readouterr().out
    assert "round 1 of 1: base" in shown
    assert "of 3 timings moved beyond the spread" in shown  # eager, compiled and ours
    after = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, cwd=records.ROOT)
    assert after.stdout == trees.stdout


def test_the_pages_show_the_newest_records():
    """`python -m bench.report` was run after the last record was made."""
    latest = records.latest()
    assert latest
    for page, brief in ((report.README, True), (report.PERFORMANCE, False)):
        text = page.read_text()
        assert report.rewrite(text, report.headline_table(latest, brief=brief)) == text
    for record in latest:
        page = records.RESULTS / records.slug(record) / "README.md"
        assert page.read_text().startswith(report.markdown(record))
