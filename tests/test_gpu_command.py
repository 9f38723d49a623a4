"""`python -m bench.gpu`: its stages in order, one that fails or hangs beside the others, and no GPU."""

import pytest
import torch

from bench import every_kernel, gpu
from bvae.kernels import (
    batch_norm,
    capacity_loss,
    image_errors,
    last_block,
    launch,
    reparam_kl,
    total_correlation,
)
from bvae.pipelines.decoder import choose

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")


def test_without_a_gpu_one_line(capsys, tmp_path):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1
    assert shown[0].startswith("no GPU here")
    assert not (tmp_path / "out").exists()


def test_an_unknown_stage(capsys):
    with pytest.raises(SystemExit) as caught:
        gpu.main(["no-such-stage"])
    assert caught.value.code == 2
    assert "choose from tests, step-tests, step-144" in capsys.readouterr().err


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next(monkeypatch, tmp_path, capsys):
    hangs = "import time, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); print(1); time.sleep(60)"
    stages = {
        "fails": gpu.Stage("", "-c \"print('why'); raise SystemExit(3)\""),
        "hangs": gpu.Stage("", f'-c "{hangs}"'),
        "writes": gpu.Stage("", "-c \"open(r'{out}/mark', 'w')\""),
    }
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    assert gpu.main(["--dry", "--out", str(tmp_path), "--limit", "2"]) == 1
    assert (tmp_path / "mark").exists()
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[0].strip() for row in rows] == ["stage", *stages]
    results = [" ".join(row).split() for row in rows[1:]]
    assert results[0][1:4] == ["failed,", "status", "3"]
    assert results[1][1:4] == ["over", "2", "s"]
    assert results[2][1] == "ok"
    log = (tmp_path / "gpu" / "fails.txt").read_text().splitlines()
    assert log[0].endswith("SystemExit(3)'")
    assert log[1].split() == [log[1].split()[0], "why"]


def test_without_the_sanitizer_its_stage_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert gpu.main(["sanitizer", "--out", str(tmp_path)]) == 0
    assert "left out: no compute-sanitizer" in capsys.readouterr().out.splitlines()[-1]


def test_the_sanitizers_pass_launches_every_kernel(kernels, monkeypatch):
    launched, run = set(), launch.Launch.run

    def recorded(self, device):
        launched.add(self.kernel)
        run(self, device)

    monkeypatch.setattr(launch.Launch, "run", recorded)
    monkeypatch.setattr(every_kernel, "LATENTS", ((3, 41),))
    monkeypatch.setattr(every_kernel, "IMAGES", ((2, 1, 5, 7),))
    assert every_kernel.main() == 0
    modules = (reparam_kl, capacity_loss, image_errors, total_correlation, batch_norm, last_block)
    assert launched == {value for m in modules for name, value in vars(m).items() if name.endswith("_kernel")}


@pytest.mark.slow
def test_every_stage_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    lines = capsys.readouterr().out.splitlines()
    rows = lines[-len(gpu.STAGES) :]
    assert [row.split()[0] for row in rows] == list(gpu.STAGES)
    for name, row in zip(gpu.STAGES, rows, strict=True):
        if name == "dali" and choose("auto") != "dali":
            continue
        assert row.split()[1] == "ok", row
        assert row.endswith(f"{name}.txt")
        assert len((tmp_path / "gpu" / f"{name}.txt").read_text().splitlines()) > 1
