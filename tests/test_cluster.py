"""docs/cluster: the SLURM script run with stand-ins for SLURM's commands, and what the Dockerfile copies."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bvae.training.cli import parse

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "cluster"
SCRIPT = FOLDER / "train.slurm"
# Each writes down how it was called. srun runs its command, as SLURM does on every node.
STAND_INS = {
    "srun": 'echo "srun $*" >> calls; exec "$@"',
    # A reader that leaves after the first node would end it by SIGPIPE.
    "scontrol": 'echo "scontrol $*" >> calls; if [ "$1" = show ]; then echo node1; sleep 0.1; echo node2; fi',
    "python": 'printf "%s\\n" "$@" > arguments; trap "echo stopped >> calls; exit 1" TERM; '
    "echo started >> calls; for _ in $(seq $SLEEP); do sleep 0.05; done; exit $STATUS",
}


@pytest.fixture
def start(tmp_path):
    """A function that starts the script as SLURM would."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    environment = {
        **os.environ,
        **job,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": "python",
    }

    def run(*options, sleep=0, status=0):
        own = {"SLEEP": str(sleep), "STATUS": str(status)}
        return subprocess.Popen(["bash", SCRIPT, *options], cwd=tmp_path, env={**environment, **own})

    return run


def calls(folder):
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def test_each_node_starts_one_torchrun_with_options_that_bvae_takes(start, tmp_path):
    options = ["--data", "folder", "--data-root", "a folder", "--batch-size", "64"]
    assert start(*options).wait(timeout=60) == 0
    arguments = (tmp_path / "arguments").read_text().splitlines()
    torchrun, train = (
        arguments[: arguments.index("bvae.train")],
        arguments[arguments.index("bvae.train") + 1 :],
    )
    assert torchrun[:2] == ["-m", "torch.distributed.run"]
    for pair in (("--nnodes", "2"), ("--nproc-per-node", "8"), ("--rdzv-endpoint", "node1:20007")):
        assert torchrun[torchrun.index(pair[0]) + 1] == pair[1]
    parsed = parse(train, "")
    assert parsed.out == tmp_path / "runs" / "slurm-7"
    assert parsed.resume == Path("auto")
    assert parsed.settings.data.root == Path("a folder")
    assert "scontrol requeue 7" not in calls(tmp_path)


def test_a_failed_run_fails_the_job(start):
    assert start(status=3).wait(timeout=60) == 3


def test_before_the_time_limit_the_run_is_stopped_and_the_job_requeued(start, tmp_path):
    job = start(sleep=600)
    for _ in range(600):
        if "started" in calls(tmp_path):
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 0
    assert calls(tmp_path)[-2:] == ["stopped", "scontrol requeue 7"]


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_directives_go_with_the_script():
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", SCRIPT.read_text(), re.MULTILINE))
    assert directives["signal"].startswith("B:USR1@")  # B: to the script, which has a trap for it
    assert directives["ntasks-per-node"] == "1"
    assert {"requeue", "nodes", "gpus-per-node", "time"} <= directives.keys()


def test_the_dockerfile_installs_what_there_is():
    lines = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    assert steps[0][0] == "FROM"
    assert {name for name, _ in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT"}
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", "\n".join(lines))
    setup = (FOLDER.parent.parent / "setup.py").read_text()
    assert all(f'"{extra}": [' in setup for extra in extras.split(","))
    assert shlex.split(steps[-1][1].strip("[]").replace(",", " ")) == ["python", "-m", "bvae.train"]
