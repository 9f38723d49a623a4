"""Which way imports point: pipelines and kernels know nothing of the rest, and no library file a command."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "train",
    "evaluate",
    "traverse",
    "explore",
    "compare",
    "infogan",
    "sweep",
    "sample",
    "export",
    "data",
    "doctor",
}
# What every folder may import: it knows nothing of images and models.
LEAVES = (
    "bvae.disk",
    "bvae.errors",
    "bvae.files",
    "bvae.opening",
    "bvae.owner",
    "bvae.paths",
    "bvae.streams",
)
LIBRARY = ("reference", "ops", "losses", "layers", "architectures", "weights", "model")


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("bvae")}


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).glob("**/*.py"))


@pytest.mark.parametrize("path", files("bvae"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_library_file_imports_a_command(path):
    if path.parent.name == "bvae" and path.stem in COMMANDS:
        return
    assert not imported(path) & {f"bvae.{name}" for name in COMMANDS}


@pytest.mark.parametrize(("folder", "own"), [("kernels", "bvae.kernels"), ("pipelines", "bvae.pipelines")])
def test_kernels_and_pipelines_know_nothing_of_the_rest(folder, own):
    for path in files(folder):
        others = {name for name in imported(path) if not name.startswith((own, "bvae.kernels", *LEAVES))}
        assert not others - {"bvae"}, path


@pytest.mark.parametrize("name", LEAVES)
def test_what_every_folder_may_import_knows_nothing_of_the_rest(name):
    path = ROOT / f"{name.replace('.', '/')}.py"
    assert not {other for other in imported(path) if not other.startswith(LEAVES)} - {"bvae"}


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_does_not_need_the_trainer(name):
    tree = ast.parse((ROOT / "bvae" / f"{name}.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
    assert not {module for module in modules if module.startswith(("bvae.training", "bvae.config"))}


def test_commands_have_a_main():
    for name in COMMANDS:
        tree = ast.parse((ROOT / "bvae" / f"{name}.py").read_text(encoding="utf-8"))
        assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
