"""Kill training at random moments, resume it, and compare: `python killed.py FOLDER KILLS SEED` prints a JSON
line for each kill."""

import json
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tiny import NETWORK

from bvae.pipelines import faces

TINY = [
    *NETWORK,
    "--no-compile",
    *("--decoder", "torchvision", "--epochs", "100", "--max-steps", "30", "--log-every", "2"),
    *("--checkpoint-every", "3", "--device", "cpu"),
]


WORKER = """
import os, shlex, sys
from bvae import train
import bvae.training.command  # so that all is imported before the clock starts
print("ready", flush=True)
os.dup2(2, 1)
sys.exit(train.main(shlex.split(input())))
"""


class Runs:
    """Training in processes of its own; one that has imported everything waits for its command."""

    def __init__(self, said):
        self.said = said
        self.start()

    def start(self):
        with open(self.said, "ab") as said:
            pipe = subprocess.PIPE
            self.ready = subprocess.Popen(
                [sys.executable, "-c", WORKER], stdin=pipe, stdout=pipe, stderr=said
            )

    def __call__(self, argv, kill_after=None):
        """Exit status, -9 if it was killed, and seconds."""
        process = self.ready
        assert process.stdout.readline() == b"ready\n"
        start = time.monotonic()
        process.stdin.write((shlex.join(argv) + "\n").encode())
        process.stdin.close()
        try:
            process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
        status, seconds = process.wait(), time.monotonic() - start
        self.start()
        return status, seconds


def doing(out, cache):
    """What the run was at when it was killed, by what it left."""
    if not (out / "config.yaml").exists():
        return "ingest" if list(cache.glob("*.unfinished")) or len(list(cache.glob("*"))) < 2 else "start"
    if list(out.glob("checkpoints/*.tmp")):
        return "checkpoint"
    return "pictures" if (out / "model.safetensors").exists() else "training"


def whole_lines(path):
    """The records of a log, all of which must be whole."""
    text = path.read_text() if path.exists() else ""
    assert text.endswith("\n") or not text
    return [json.loads(line) for line in text.splitlines()]


def kill_and_resume(runs, folder, drawn, moment):
    """Where the kill fell, and whether the run had to begin anew."""
    out, cache = folder / "run", folder / "cache"
    cache.mkdir(parents=True)
    start = ["--data-root", str(drawn), "--out", str(out), "--cache-dir", str(cache), *TINY]
    status, _ = runs(start, moment)
    assert status in (-9, 0)
    where = "over" if status == 0 else doing(out, cache)
    whole_lines(out / "metrics.jsonl")
    status, _ = runs(["--resume", str(out)])
    anew = status == 2  # there was no checkpoint yet
    if anew:
        assert not list(out.glob("checkpoints/*.pt"))
        shutil.rmtree(out, ignore_errors=True)
        status, _ = runs(start)
    assert status == 0, runs.said.read_text()[-3000:]
    return where, anew


if __name__ == "__main__":
    root, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    drawn = faces.write(root / "faces", n=150, seed=0, progress=False)
    runs, chance = Runs(root / "said"), random.Random(seed)
    whole = root / "whole"  # the run that nobody kills
    (whole / "cache").mkdir(parents=True)
    places = ["--out", str(whole / "run"), "--cache-dir", str(whole / "cache")]
    status, seconds = runs(["--data-root", str(drawn), *places, *TINY])
    assert status == 0, runs.said.read_text()[-3000:]
    expected = (whole / "run" / "model.safetensors").read_bytes()
    landed = 0
    while landed < kills:
        folder, moment = root / str(landed), chance.uniform(0, seconds)
        where, anew = kill_and_resume(runs, folder, drawn, moment)
        landed += where != "over"  # the run was faster this time
        same = (folder / "run" / "model.safetensors").read_bytes() == expected
        print(json.dumps({"after": round(moment, 2), "doing": where, "anew": anew, "same": same}), flush=True)
        shutil.rmtree(folder)
    runs.ready.kill()
