"""`python -m bvae.data` as a user runs it, and what training does with the same data."""

import subprocess
import sys

import pytest
from pictures import write_celeba, write_folder

from bvae.data import main
from bvae.pipelines import cache
from bvae.train import main as train

TINY = [
    *("--image-size", "32", "--hidden-dims", "4", "8", "--latent-dim", "3", "--batch-size", "4"),
    *("--max-steps", "3", "--no-compile", "--device", "cpu"),
]


@pytest.fixture
def celeba(tmp_path):
    return write_celeba(tmp_path / "data")


@pytest.fixture
def caches(tmp_path):
    return tmp_path / "caches"


def test_check_counts(celeba, capsys):
    assert main(["check", str(celeba)]) == 0
    out = capsys.readouterr().out
    assert f"{celeba}: CelebA's layout; 8 train, 2 valid, 2 test" in out
    assert "12 of 12 images can be used" in out


def test_check_names_every_bad_file(tmp_path, capsys):
    root = write_folder(tmp_path / "images", 20)
    (root / "000.jpg").write_text("<html>")
    (root / "009.jpg").write_bytes(b"")
    assert main(["check", str(root)]) == 1
    out = capsys.readouterr().out
    assert f"{root}: a folder of images; 16 train, 2 valid, 2 test" in out
    assert f"{root / '000.jpg'}: a web page instead of an image" in out
    assert f"{root / '009.jpg'}: empty" in out
    assert "18 of 20 images can be used" in out


def test_ingest_is_what_training_then_finds(celeba, caches, tmp_path, capsys):
    assert main(["ingest", str(celeba), "--image-size", "32", "--cache-dir", str(caches)]) == 0
    assert "training images: decoding 8 with" in capsys.readouterr().out
    options = ["--data", "celeba", "--data-root", str(celeba), "--cache-dir", str(caches)]
    assert train([*options, *TINY, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "training images: 8 from the cache" in out
    assert "validation images: 2 from the cache" in out
    assert "decoding" not in out


def test_ingest_names_bad_files(tmp_path, caches, capsys):
    root = write_folder(tmp_path / "images", 20)
    (root / "003.jpg").write_bytes(b"")
    assert main(["ingest", str(root), "--cache-dir", str(caches)]) == 1
    assert "1 of 18 images cannot be used" in capsys.readouterr().err


def test_ls_and_rm(celeba, caches, capsys):
    assert main(["ls", "--cache-dir", str(caches)]) == 0
    assert f"0.0 MB in {caches}" in capsys.readouterr().out
    main(["ingest", str(celeba), "--cache-dir", str(caches)])
    (caches / f"{'0' * 20}.unfinished").mkdir()
    (caches / "mine").mkdir()
    (caches / "mine.txt").write_text("precious")
    capsys.readouterr()

    assert main(["ls", "--cache-dir", str(caches)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "unfinished or damaged" in lines[0]
    assert sorted(line.split("crop")[0].split()[-7:] for line in lines[1:3]) == [
        ["2", "x", "64", "x", "64", "x", "3,"],
        ["8", "x", "64", "x", "64", "x", "3,"],
    ]
    assert all(str(celeba) in line for line in lines[1:3])

    key = lines[1].split()[0]
    assert main(["rm", key, "--cache-dir", str(caches)]) == 0
    assert not (caches / key).exists()
    assert main(["rm", "--all", "--cache-dir", str(caches)]) == 0
    assert sorted(path.name for path in caches.iterdir()) == ["mine", "mine.txt"]


def test_faces(tmp_path, capsys):
    assert main(["faces", str(tmp_path), "--n", "20", "--seed", "3"]) == 0
    assert "20 faces in" in capsys.readouterr().out
    assert main(["check", str(tmp_path)]) == 0
    assert "16 train, 2 valid, 2 test" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("check /absent", "no folder at /absent"),
        ("ingest {root} --image-size 8", "data.image_size must be 32 to 256 pixels, got 8"),
        ("ingest {root} --cache-dir {root}/000.jpg/x", "Not a directory"),
        ("rm", "name the caches to remove, as `ls` shows them, or give --all"),
        ("rm mine --cache-dir {root}", "no cache mine in {root}"),
        ("faces {root} --n 0", "--n must be positive, got 0"),
    ],
)
def test_usage_errors(arguments, message, tmp_path, capsys):
    root = write_folder(tmp_path / "images", 12)
    assert main(arguments.format(root=root).split()) == 2
    assert message.format(root=root) in capsys.readouterr().err


def test_help_teaches():
    shown = subprocess.run(
        [sys.executable, "-m", "bvae.data", "--help"], capture_output=True, text=True, check=True
    )
    for part in ("check DIR", "ingest DIR", "ls", "rm KEY", "faces OUT", "Exit status"):
        assert part in shown.stdout


# ---- in training -------------------------------------------------------------------------------------------


def options(root, caches, out):
    return [
        "--data",
        "folder",
        "--data-root",
        str(root),
        "--cache-dir",
        str(caches),
        *TINY,
        "--out",
        str(out),
    ]


def test_training_stops_at_bad_files_or_skips_them(tmp_path, caches, capsys):
    root, out = write_folder(tmp_path / "images", 20), tmp_path / "run"
    (root / "003.jpg").write_bytes(b"")
    assert train(options(root, caches, out)) == 2
    assert f"1 of 18 images cannot be used:\n  {root / '003.jpg'}: empty" in capsys.readouterr().err
    assert not out.exists()
    assert train([*options(root, caches, out), "--on-bad", "skip"]) == 0
    assert "15 training and 2 validation images" in capsys.readouterr().out
    assert (out / "bad_files.txt").read_text() == f"{root / '003.jpg'}\tempty\n"


def test_a_run_resumes_with_another_cache_or_none(tmp_path, caches, capsys):
    root, out = write_folder(tmp_path / "images", 20), tmp_path / "run"
    assert train(options(root, caches, out)) == 0
    elsewhere = str(tmp_path / "elsewhere")
    assert train(["--resume", str(out), "--max-steps", "5", "--cache-dir", elsewhere]) == 0
    assert "training images: decoding 16" in capsys.readouterr().out


def test_streaming_trains_as_the_cache_does(tmp_path, caches):
    root = write_folder(tmp_path / "images", 20)
    assert train(options(root, caches, tmp_path / "cached")) == 0
    assert train([*options(root, tmp_path / "unused", tmp_path / "streamed"), "--stream"]) == 0
    assert not (tmp_path / "unused").exists()
    cached, streamed = (tmp_path / run / "model.safetensors" for run in ("cached", "streamed"))
    assert cached.read_bytes() == streamed.read_bytes()


def test_a_full_disk_is_a_failed_run(tmp_path, caches, monkeypatch, capsys):
    root = write_folder(tmp_path / "images", 20)
    usage = cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=0))
    assert train(options(root, caches, tmp_path / "run")) == 1
    assert "choose another disk with --cache-dir" in capsys.readouterr().err
    assert main(["ingest", str(root), "--cache-dir", str(caches)]) == 1
    assert "choose another disk with --cache-dir" in capsys.readouterr().err
