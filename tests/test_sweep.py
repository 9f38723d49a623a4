"""`python -m bvae.sweep` as a user runs it: its runs, what it shows, how it goes on, and bad input."""

import csv
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats

from bvae.config import read
from bvae.errors import UsageError
from bvae.evaluation import (
    baselines,
    grid,
    jobs,
    run_folder,
    statistics,
    sweep_plots,
    sweep_report,
    sweeping,
)
from bvae.evaluation.options import SweepOptions
from bvae.pipelines import sprites
from bvae.sweep import main
from bvae.training import completion
from bvae.training import step as training_step

PRESET = """
data: {name: dsprites, root: ROOT, channels: 1, flip: false}
model: {hidden_dims: [4, 8], latent_dim: 3}
objective: {loss_type: H, beta: 4, recon: sum, likelihood: bernoulli}
training: {batch_size: 16, max_steps: 6, log_every: 2, compile: false}
"""
FEW = ["--points", "40", "--device", "cpu"]


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory):
    """A YAML file of a tiny model of 162 shapes."""
    folder = tmp_path_factory.mktemp("preset")
    indices = 3 * torch.from_numpy(np.indices((1, 2, 3, 3, 3)).reshape(5, -1).T.repeat(3, 0))
    indices[:, 0] = torch.arange(len(indices)) % 3
    classes = np.column_stack([np.zeros(len(indices), np.int64), indices.numpy()])
    np.savez(folder / "d.npz", imgs=sprites.render(indices).numpy(), latents_classes=classes)
    (folder / "tiny.yaml").write_text(PRESET.replace("ROOT", str(folder / "d.npz")))
    return folder / "tiny.yaml"


def run_here(left, arguments):
    return [(job, jobs.train_and_evaluate(job, arguments)) for job in left]


def first_job(preset, folder) -> jobs.Job:
    options = SweepOptions(str(preset), ("beta=4",), 1, device="cpu", points=40)
    return sweeping.plan(options, folder, [])[1][0]


@pytest.fixture
def inline(monkeypatch):
    """Runs in this process: starting one takes seconds."""
    monkeypatch.setattr(sweeping, "run_all", run_here)


@pytest.fixture
def quick(monkeypatch):
    """An evaluation of no metrics, whose figure is of the weights, and baselines that are not measured."""

    def evaluate_weights(run, protocol):
        weights = load_file(run / "model.safetensors")
        figure = sum(value.double().abs().sum().item() for value in weights.values())
        found = {"seeds": protocol.seeds, "points": protocol.points, **result(0.5, figure)}
        found["model"]["kl_per_latent"] = [1.0, 1.0, 1.0]
        (run / "evaluation.json").write_text(json.dumps(found))
        return ""

    monkeypatch.setattr(run_folder, "evaluate", evaluate_weights)
    scores = {name: dict.fromkeys(baselines.FACTORS, (0.5, 0.6)) for name in baselines.PAPER}
    monkeypatch.setattr(baselines, "measure", lambda *_, **__: scores)


def run(preset, out, *options):
    return main([str(preset), "--grid", "beta=1,4", "--seeds", "1", *FEW, "--out", str(out), *options])


# --- The command ------------------------------------------------------------------------------------------
def test_a_sweep_and_the_same_again(preset, tmp_path, inline, quick, monkeypatch, capsys):
    out = tmp_path / "out"
    assert run(preset, out, "--seeds", "2", "--max-steps", "2") == 0
    printed = capsys.readouterr().out
    names = [f"beta-{beta}-seed-{seed}" for beta in (1, 4) for seed in (0, 1)]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == names
    for name in names:
        settings = read(out / name / "config.yaml").config
        assert f"beta-{settings.objective.beta:g}-seed-{settings.training.seed}" == name
        assert settings.training.max_steps == 2
    text = (out / "sweep.md").read_text()
    assert text in printed
    results = [json.loads((out / name / "evaluation.json").read_text()) for name in names]
    nats = [each["model"]["reconstruction_nats"] for each in results[2:]]
    row = next(line for line in text.splitlines() if line.startswith("| 4 | 2 |"))
    assert f"| {np.mean(nats):.1f} ± {np.std(nats, ddof=1):.1f} |" in row
    with Image.open(out / "sweep.png") as picture:
        assert picture.width > picture.height > 300

    monkeypatch.setattr(jobs, "execute", pytest.fail)
    monkeypatch.setattr(baselines, "measure", pytest.fail)
    assert run(preset, out, "--seeds", "2", "--max-steps", "2") == 0
    assert (out / "sweep.md").read_text() == text
    assert run(preset, out) == 2
    said = capsys.readouterr().err
    assert f"{out} holds a sweep with training.max_steps 2 instead of 6: name another folder" in said


@pytest.mark.parametrize("text", ["", "{", "[]", '{"mig": 0.5}'])
def test_an_evaluation_that_is_none_is_made_again(preset, tmp_path, inline, quick, text):
    assert run(preset, tmp_path) == 0
    file = tmp_path / "beta-4-seed-0" / "evaluation.json"
    whole = file.read_text()
    file.write_text(text)
    assert run(preset, tmp_path) == 0
    assert file.read_text() == whole


def test_what_is_measured(preset, tmp_path, inline):
    assert main([str(preset), "--grid", "beta=1", "--seeds", "1", *FEW, "--out", str(tmp_path)]) == 0
    scores = json.loads((tmp_path / "beta-1-seed-0" / "evaluation.json").read_text())["scores"]
    text = (tmp_path / "sweep.md").read_text()
    assert f"| VAE | {100 * scores['beta_vae']['mean']:.1f} |" in text
    row = next(line for line in text.splitlines() if line.startswith("| 1 | 1 |"))
    assert all(f" {scores[name]['mean']:.3f} |" in row for name in sweep_report.SCORES.keys() - {"udr"})
    kept = json.loads((tmp_path / "baselines.json").read_text())
    assert kept["points"] == 40
    pixels = sweep_report.spread(kept["scores"]["raw pixels"][baselines.ALL], 1, 100)
    assert "±" in pixels
    assert f"| raw pixels | {pixels} |" in text


def test_it_goes_on_where_it_was_stopped(preset, tmp_path, inline, quick, monkeypatch, capsys):
    """The run that was under way resumes; those that it had not come to begin."""
    assert run(preset, tmp_path / "whole") == 0
    original, commands = training_step.TrainingStep.__call__, []

    def stopped(self, images):
        original(self, images)
        if len(commands) == 2 and int(self.step) == 3:
            signal.raise_signal(signal.SIGTERM)

    def noted(command, description, execute=jobs.execute):
        commands.append(command)
        return execute(command, description)

    monkeypatch.setattr(jobs, "execute", noted)
    monkeypatch.setattr(training_step.TrainingStep, "__call__", stopped)
    out = tmp_path / "parts"
    assert run(preset, out) == 1
    assert "beta-4-seed-0 (status 130)" in capsys.readouterr().err
    assert not completion.is_marked(out / "beta-4-seed-0")
    assert "| 4 |" not in (out / "sweep.md").read_text()
    assert run(preset, out) == 0
    assert run(preset, out) == 0
    assert [command[0] for command in commands] == ["--config", "--config", "--resume"]
    assert (out / "sweep.md").read_text() == (tmp_path / "whole" / "sweep.md").read_text()
    for name in ("beta-1-seed-0", "beta-4-seed-0"):
        ours, wanted = (
            load_file(folder / name / "model.safetensors") for folder in (out, tmp_path / "whole")
        )
        assert all(torch.equal(value, ours[key]) for key, value in wanted.items())


def test_a_run_without_a_checkpoint_begins_anew(preset, tmp_path, quick):
    job = first_job(preset, tmp_path)
    job.out.mkdir()
    (job.out / "config.yaml").write_text(job.config.to_yaml())
    assert jobs.train_and_evaluate(job, SweepOptions(points=40, device="cpu")) == 0
    assert completion.is_marked(job.out)


@pytest.mark.parametrize("checkpoints", ["whole", "damaged"])
def test_a_run_whose_files_are_empty_is_trained_again(preset, tmp_path, inline, quick, checkpoints):
    """As a power cut left them, before every file was synced."""
    assert run(preset, tmp_path) == 0
    out = tmp_path / "beta-4-seed-0"
    wanted = (out / "model.safetensors").read_bytes()
    assert completion.is_marked(out)
    kept = {"finished.json", "traversals.gif", "config.yaml"}
    for path in out.rglob("*"):
        if path.is_file() and path.name not in kept and (checkpoints == "damaged" or path.suffix != ".pt"):
            path.write_bytes(b"")
    assert not completion.is_marked(out)
    assert run(preset, tmp_path) == 0
    assert completion.is_marked(out)
    assert (out / "model.safetensors").read_bytes() == wanted


def test_a_run_that_is_a_link_is_left_alone(preset, tmp_path, quick):
    job = first_job(preset, tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("")
    job.out.symlink_to(tmp_path / "mine")
    with pytest.raises(UsageError, match="is a link"):
        jobs.train_and_evaluate(job, SweepOptions(points=40, device="cpu"))
    assert (tmp_path / "mine" / "precious").exists()


def test_a_failed_run_does_not_lose_the_others(preset, tmp_path, inline, quick, capsys):
    grid = ["--grid", "lr=1e30,1e-3", "--seeds", "1"]
    assert main([str(preset), *grid, *FEW, "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "1 of 2 runs failed" in said
    assert "lr-1e30-seed-0 (status 1)" in said
    assert completion.is_marked(tmp_path / "lr-1e-3-seed-0")
    assert "| 1e-3 | 1 |" in (tmp_path / "sweep.md").read_text()


@pytest.mark.slow
def test_a_killed_process_does_not_end_the_sweep(preset, tmp_path, capsys):
    def kill_the_first():
        while not multiprocessing.active_children():
            time.sleep(0.01)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    assert run(preset, tmp_path) == 1
    killer.join()
    assert "beta-1-seed-0 (SIGKILL)" in capsys.readouterr().err
    assert "| 4 | 1 |" in (tmp_path / "sweep.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_leaves_a_checkpoint(preset, tmp_path, number):
    command = [sys.executable, "-m", "bvae.sweep", str(preset), "--grid", "beta=4", "--max-steps", "100000"]
    started = subprocess.Popen(
        [*command, *FEW, "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in started.stdout:
        if line.startswith("step "):
            break
    started.send_signal(number)
    rest = started.stdout.read()
    assert started.wait() == 130
    assert "stopped at step" in rest
    assert list((tmp_path / "beta-4-seed-0" / "checkpoints").glob("step-*.pt"))
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name a preset and a grid"),
        (["burgess_sprites"], "name a preset and a grid"),
        (["nothing", "--grid", "beta=1,4"], "no configuration at nothing; presets: burgess_sprites"),
        (
            ["burgess_sprites", "--grid", "beta=1,4"],
            "beta has no effect on burgess_sprites's loss B: add --loss-type H",
        ),
        (["higgins_sprites", "--grid", "beta"], "--grid must be options and different values"),
        (["higgins_sprites", "--grid", " "], "--grid must be options and different values"),
        (["higgins_sprites", "--grid", "beta=1,1"], "--grid must hold different values, got 'beta=1,1'"),
        (["higgins_sprites", "--grid", "gamma=-1,1"], "objective.gamma must be 0 or more, got -1"),
        (["higgins_sprites", "--grid", "beta=1,4", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (
            ["higgins_sprites", "--grid", "beta=1,4", "--metric-seeds", "0"],
            "--metric-seeds must be at least 1",
        ),
        (["--baselines", "--points", "19"], "--points must be at least 20, got 19"),
        (["higgins_sprites", "--grid", "beta=1,4,4.0"], "two of the values make no difference"),
        (["--baselines", "--grid", "beta=1"], "--baselines trains nothing: --grid beta=1 has no effect"),
        (
            ["higgins_sprites", "--grid", "beta=1", "--data", "folder"],
            "a folder's images have no known factors",
        ),
        (["higgins_sprites", "--grid", "beta=1", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (
            ["higgins_sprites", "--grid", "beta=1", "--cluster-parameters", "a=1"],
            "have no effect without --cluster",
        ),
        (
            ["higgins_sprites", "--grid", "beta=1", "--cluster", "slurm", "--jobs", "2"],
            "--jobs has no effect",
        ),
        (["--baselines", "--max-steps", "3"], "--baselines trains nothing: --max-steps 3 has no effect"),
    ],
)
def test_options_that_cannot_be_used(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(options) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_options_that_training_does_not_know(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["higgins_sprites", "--grid", "beta=1,4", "--sedes", "3"]) == 2
    assert capsys.readouterr().err == "error: unknown option --sedes: did you mean --seeds?\n"


@pytest.mark.slow
def test_two_at_a_time_give_the_models_of_one(preset, tmp_path, capfd):
    """Their messages are in log files."""
    assert run(preset, tmp_path / "one") == 0
    capfd.readouterr()
    assert run(preset, tmp_path / "two", "--jobs", "2") == 0
    assert "step 6/6" not in capfd.readouterr().out
    for name in ("beta-1-seed-0", "beta-4-seed-0"):
        one, two = (load_file(tmp_path / folder / name / "model.safetensors") for folder in ("one", "two"))
        assert all(torch.allclose(value, two[key], atol=1e-5) for key, value in one.items())
        assert "step 6/6" in (tmp_path / "two" / f"{name}.log").read_text()


@pytest.mark.slow
def test_jobs_of_a_cluster(preset, tmp_path, capsys):
    """submitit's local executor stands for SLURM. A job that fails does not lose the other."""
    pytest.importorskip("submitit")
    options = ["--cluster", "local", "--cluster-parameters", "timeout_min=5"]
    grid = ["--grid", "lr=1e30,1e-3", "--seeds", "1"]
    assert main([str(preset), *grid, *FEW, "--out", str(tmp_path), *options]) == 1
    said = capsys.readouterr()
    assert "lr-1e30-seed-0 (status 1)" in said.err
    assert f"their messages are in {tmp_path / 'cluster'}/" in said.err
    assert completion.is_marked(tmp_path / "lr-1e-3-seed-0")
    assert "| 1e-3 | 1 |" in (tmp_path / "sweep.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cluster", "slurm"], "--cluster slurm: "),  # there is none here
        (["--cluster", "local", "--cluster-parameters", "time"], "must be NAME=VALUE, got 'time'"),
        (["--cluster", "local", "--cluster-parameters", "no_such=1"], "--cluster local: "),
    ],
)
def test_clusters_that_cannot_be_used(preset, tmp_path, capsys, options, message):
    pytest.importorskip("submitit")
    assert run(preset, tmp_path, *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("visible", "shown"), [("3,5", ["3", "5", "3"]), (None, ["0", "1", "0"])])
def test_several_runs_take_the_gpus_in_turn(monkeypatch, visible, shown):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for slot in range(3):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        jobs.use_gpu(slot)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == shown[slot]


# --- The grid ---------------------------------------------------------------------------------------------
def test_a_grid_of_one_option():
    key, cells = grid.parse(["beta=1,4"])
    assert key == "beta"
    assert [(cell.label, cell.folder, cell.command) for cell in cells] == [
        ("1", "beta-1", ["--beta", "1"]),
        ("4", "beta-4", ["--beta", "4"]),
    ]


def test_grids_of_several_options():
    key, cells = grid.parse(["loss_type=H beta=1,4", "loss_type=B"])
    assert key == "model"
    assert [cell.label for cell in cells] == ["loss_type=H beta=1", "loss_type=H beta=4", "loss_type=B"]
    assert cells[1].folder == "loss_type-H-beta-4"
    assert cells[1].command == ["--loss-type", "H", "--beta", "4"]


def test_losses_and_their_strengths(preset, tmp_path, inline, quick):
    grids = ["--grid", "loss_type=H beta=1,4", "--grid", "loss_type=B gamma=2"]
    assert main([str(preset), *grids, "--seeds", "2", *FEW, "--out", str(tmp_path)]) == 0
    table = (tmp_path / "sweep.md").read_text()
    rows = ("| loss_type=H beta=1 | 2 |", "| loss_type=H beta=4 | 2 |", "| loss_type=B gamma=2 | 2 |")
    assert all(row in table for row in rows)
    assert read(tmp_path / "loss_type-B-gamma-2-seed-1" / "config.yaml").config.objective.gamma == 2
    with open(tmp_path / "sweep.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["run"] for line in lines[-2:]] == [f"loss_type-B-gamma-2-seed-{seed}" for seed in (0, 1)]
    stored = json.loads((tmp_path / lines[0]["run"] / "evaluation.json").read_text())
    assert float(lines[0]["reconstruction_nats"]) == stored["model"]["reconstruction_nats"]
    assert "loss\\_type=H beta=1 & 2 &" in (tmp_path / "sweep.tex").read_text()
    assert (tmp_path / "statistics.md").read_text().startswith("## Differences between models")
    with Image.open(tmp_path / "tradeoffs.png") as picture:
        assert picture.width > 1000


# --- What it shows ----------------------------------------------------------------------------------------
def result(mig: float, nats: float, beta_vae: float = 0.5) -> dict:
    scores = {name: {"mean": value} for name, value in (("mig", mig), ("beta_vae", beta_vae))}
    return {
        "run": "a",
        "scores": scores,
        "model": {"reconstruction_nats": nats, "kl": 10.0, "active_units": 5},
    }


FOUND = {"1": [result(0.1, 20, 0.6), result(0.3, 24, 0.8)], "4": [result(0.5, 40)]}


def test_table():
    assert sweep_report.table("beta", FOUND).splitlines() == [
        "| beta | runs | BetaVAE | MIG | reconstruction, nats | KL, nats | active units |",
        "|---|---|---|---|---|---|---|",
        "| 1 | 2 | 0.700 ± 0.141 | 0.200 ± 0.141 | 22.0 ± 2.8 | 10.0 ± 0.0 | 5.0 ± 0.0 |",
        "| 4 | 1 | 0.500 | 0.500 | 40.0 | 10.0 | 5.0 |",
    ]


def test_paper_table():
    scores = {name: {baselines.ALL: [0.25, 0.35], baselines.INTERPOLATED: [0.5]} for name in baselines.PAPER}
    text = sweep_report.paper_table(scores, {"1.0": FOUND["1"], "2": FOUND["4"]})
    assert "| raw pixels | 30.0 ± 7.1 | 50.0 | 45.75 |" in text
    assert "| VAE | 70.0 ± 14.1 |  | 61.58 |" in text
    assert "| beta-VAE, beta 4 |  |  | 99.23 |" in text
    assert "secondary source" in text


def test_plot():
    figure = sweep_plots.draw("beta", FOUND)
    left, middle, right = figure.axes
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    assert lines["MIG"].get_xydata().tolist() == [[0, 0.2], [1, 0.5]]
    assert lines["reconstruction"].get_ydata().tolist() == [22, 40]
    assert [text.get_text() for text in left.get_xticklabels()] == ["1", "4"]
    assert [len(axes.lines) for axes in (middle, right)] == [1, 1]  # 3200 nats and 0.1 share no axis
    assert len(middle.collections[1].get_offsets()) == 3  # a dot a run
    assert middle.collections[0].get_paths()[0].vertices[:, 1].min() == 20  # from the lowest run


def test_holm_corrects_for_the_number_of_pairs():
    """By hand: 0.01 x 3; 0.03 x 2; 0.04 x 1, but no less than the one before."""
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, math.nan, 0.6])[::2] == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_pairwise_is_welchs_test():
    found = {"1": [result(m, 20) for m in (0.1, 0.2, 0.3)], "4": [result(m, 20) for m in (0.5, 0.7, 0.6)]}
    text = statistics.pairwise(found, {"mig": "MIG", "kl": "KL"}, sweep_report.values)
    p = stats.ttest_ind([0.1, 0.2, 0.3], [0.5, 0.7, 0.6], equal_var=False).pvalue
    assert text.splitlines()[2:] == [f"| MIG | 1 | 4 | -0.4 | {p:.2g} |", "| KL | 1 | 4 | +0 |  |"]
    assert statistics.pairwise({"1": found["1"]}, {"mig": "MIG"}, sweep_report.values) == ""


def test_correlations_are_spearmans():
    runs = [result(m, n) for m, n in ((0.1, 20), (0.2, 24), (0.2, 19), (0.9, 100))]
    names = {"mig": "MIG", "reconstruction_nats": "nats", "kl": "KL"}
    text = statistics.correlations(runs, names, sweep_report.values)
    rho = stats.spearmanr([0.1, 0.2, 0.2, 0.9], [20, 24, 19, 100]).statistic
    assert text.splitlines()[2:] == [
        f"| MIG | 1.00 | {rho:.2f} |  |",
        f"| nats | {rho:.2f} | 1.00 |  |",
        "| KL |  |  |  |",
    ]
    assert statistics.correlations(runs[:2], names, sweep_report.values) == ""


def test_too_few_runs_are_said_so():
    assert "Too few runs" in sweep_report.comparisons({"1": [result(0.1, 20)]})


def test_tradeoffs():
    """A dot per run, a colour per model."""
    figure = sweep_plots.draw_tradeoffs("beta", FOUND)
    assert [axes.get_title() for axes in figure.axes] == ["", "BetaVAE", "MIG"]
    dots = [group.get_offsets().tolist() for group in figure.axes[0].collections]
    assert dots == [[[10, 20], [10, 24]], [[10, 40]]]
