"""What an import costs, which packages it needs, and what a command says when one is missing."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bvae
from bvae import __main__ as commands
from bvae.errors import EXTRA

ROOT = Path(__file__).resolve().parent.parent
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def python(code, *, without=()):
    """Run code in a Python of its own in which some packages cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(names=set(without)) + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_alone_loads_python_only():
    code = "import bvae; print([m for m in sys.modules if m.partition('.')[0] in ('torch', 'numpy')])"
    assert python(code).strip() == "[]"
    dir_and_missing = "import bvae; assert 'BetaVAE' in dir(bvae); print(hasattr(bvae, 'BetaVAF'))"
    assert python(dir_and_missing).strip() == "False"


@pytest.mark.parametrize("name", bvae.__all__)
def test_each_public_name_is_there(name):
    assert callable(getattr(bvae, name))
    names: dict = {}
    exec(f"from bvae import {name}", names)
    assert names[name] is getattr(bvae, name)


def test_the_losses_need_torch_alone():
    python("import bvae.losses", without={*EXTRA, "safetensors", "numpy"})


def test_a_model_needs_no_extra():
    python("from bvae import BetaVAE; BetaVAE(hidden_dims=[4], latent_dim=2)", without=EXTRA)


@pytest.mark.parametrize(
    ("command", "package", "options"),
    [
        *(
            (name, "tyro", ["--help"])
            for name in ("train", "evaluate", "sample", "traverse", "explore", "export", "compare", "sweep")
        ),
        ("train", "tqdm", ["--max-steps", "1"]),
        ("data", "torchvision", ["faces", "OUT", "--n", "1"]),
    ],
)
def test_a_command_says_which_package_it_needs(command, package, options, tmp_path):
    options = [str(tmp_path / "out") if option == "OUT" else option for option in options]
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('none', name={package!r})\n")
    start = ["-m", "bvae", command] if package == "tqdm" else ["-m", f"bvae.{command}"]
    done = subprocess.run(
        [sys.executable, *start, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stderr == f"error: bvae.{command} needs {package}: pip install 'bvae[train]'\n"
    assert done.returncode == 2


def test_a_missing_package_of_another_kind_is_a_bug(tmp_path):
    code = (
        "from bvae.errors import needs_train_extra\n"
        "try:\n"
        "    with needs_train_extra('bvae.some'): import nothing_of_this_name\n"
        "except ModuleNotFoundError as error: print(error)\n"
        "try:\n"
        "    with needs_train_extra('bvae.some'): import tyro\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    first, second = python(code, without={"tyro"}).splitlines()
    assert first == "No module named 'nothing_of_this_name'"
    assert second == "bvae needs tyro: pip install 'bvae[train]'"


OF_DATA = ("check", "ingest", "ls", "rm", "faces", "rooms")


@pytest.mark.parametrize("command", [*commands.COMMANDS, *(f"data {name}" for name in OF_DATA)])
def test_help_needs_no_torch_and_shows_an_example_and_the_values_that_apply(command):
    """torch takes seconds, and torchvision more."""
    name, *words = command.split()
    code = (
        f"import sys; from bvae.{name} import main\n"
        f"try: main({[*words, '--help']})\n"
        "finally: print(sorted(sys.modules.keys() & {'torch', 'torchvision', 'numpy'}))"
    )
    shown = python(code, without={"torch", "torchvision", "numpy"})
    text = " ".join(shown.replace("\u2502", " ").split())
    assert text.endswith("[]")
    _, _, rest = text.partition(f"usage: python -m bvae.{command}")[2].partition("] ")
    assert f"python -m bvae.{command}" in rest  # the example
    parts = re.split(r" (--[a-z][\w-]*) (?=\{|INT|FLOAT|STR|PATH|[A-Z_]+ )", rest)
    described = dict(zip(parts[1::2], parts[2::2], strict=True))  # the usage comes before the descriptions
    for option, description in described.items():
        assert re.search(r"default: |required|repeatable", description), option


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_help_to_a_reader_that_is_gone(command):
    """As `| head` leaves a command."""
    reader, writer = os.pipe()
    os.close(reader)
    start = [sys.executable, "-m", f"bvae.{command}", "--help"]
    done = subprocess.run(start, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


TYPOS = {
    "train --betaa 3": "--beta ",
    "evaluate RUN --pionts 50": "--points",
    "sample RUN --ssed 3": "--seed",
    "traverse RUN --stesp 3": "--steps",
    "explore RUN --uot page.html": "--out",
    "export RUN --imags float": "--images",
    "compare RUN --factor x --stesp 3": "--steps",
    "infogan --max-stesp 3": "--max-steps",
    "sweep small --gird beta=1": "--grid",
    "sweep small --grid beta=1 --sedes 2": "--seeds",
    "sweep small --grid beta=1 --max-stesp 2": "--max-steps",
    "data ingest DIR --imge-size 64": "--image-size",
    "data ls --cahce-dir DIR": "--cache-dir",
    "data ingst DIR": "ingest",
    "data check DIR --decoder torchvison": "torchvision",
    "doctor --hlep": "--help",
}


@pytest.mark.parametrize("line", TYPOS)
def test_a_typo_gets_the_nearest_option(line, capsys):
    name, *words = line.split()
    main = importlib.import_module(f"bvae.{name}").main
    try:
        status = main(words)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    shown = capsys.readouterr().err
    assert TYPOS[line] in re.split("did you mean|Perhaps you meant", shown)[1]


def test_every_command_has_a_typo():
    assert {line.split()[0] for line in TYPOS} == set(commands.COMMANDS)


@pytest.mark.parametrize("name", ["evaluate", "sample", "traverse", "explore", "export", "compare"])
def test_a_command_that_takes_a_run_imports_its_network_first(name, capsys):
    words = ["RUN", *(["--factor", "x"] if name == "compare" else []), "--import", "no_such_module"]
    assert importlib.import_module(f"bvae.{name}").main(words) == 2
    assert capsys.readouterr().err.startswith("error: --import no_such_module: no such module")


# --- The command `bvae` -----------------------------------------------------------------------------------
def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bvae", *arguments])
    return commands.main()


def test_every_command_is_listed(monkeypatch, capsys):
    modules = [path for path in (ROOT / "bvae").glob("*.py") if "__main__" in path.read_text()]
    assert {path.stem for path in modules} - {"__main__", "errors"} == set(commands.COMMANDS)
    for help_of_all in ([], ["-h"], ["--help"]):
        assert run(monkeypatch, *help_of_all) == 0
        shown = capsys.readouterr().out
        assert all(f"\n  {name} " in shown for name in commands.COMMANDS)
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{bvae.__version__}\n"


def test_an_unknown_command_is_an_error(monkeypatch, capsys):
    assert run(monkeypatch, "tarin") == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert run(monkeypatch, "xyz") == 2
    assert "commands: train, evaluate" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_command_gets_the_arguments_and_gives_the_status(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "data", "ls", "--cache-dir", str(tmp_path))
    assert ended.value.code == 0
    assert str(tmp_path) in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "traverse", str(tmp_path))
    assert ended.value.code == 2
    assert "holds no config.json" in capsys.readouterr().err
