"""Models on the Hub: Hugging Face's own client against a server on this machine; and the model card."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import bvae
from bvae import BetaVAE, hub, model_card
from bvae.config import Config, DataConfig, DataName, ObjectiveConfig
from bvae.errors import MissingError, UsageError

ROOT = Path(__file__).resolve().parent.parent
# The client reads HF_ENDPOINT when it is imported: a process of its own.
SESSION = """
import json, os, sys
import hub_server
server = hub_server.start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
import torch
from bvae import BetaVAE

run = sys.argv[1]
model = BetaVAE.from_pretrained(run)
hub = server.RequestHandlerClass
hub.repos["user/other"] = {"README.md": b"# Another library's"}
said = {"url": model.push_to_hub("user/repo", run=run, private=True)}
said["pushed"] = sorted(hub.repos["user/repo"])
said["config.yaml"] = hub.repos["user/repo"]["config.yaml"].decode()
said["README.md"] = hub.repos["user/repo"]["README.md"].decode()

def load(name, **options):
    hub.requests.clear()
    try:
        loaded = BetaVAE.from_pretrained(name, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    same = all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    files = sorted({request.split("/")[-1] for request in hub.requests if "resolve" in request})
    return ["the same" if same else "another", files]

said["downloaded"] = load("user/repo")
said["revision"] = load("user/repo", revision=hub_server.COMMIT)
said["no model"] = load("user/none")
said["no revision"] = load("user/repo", revision="old")
said["no name"] = load("user/a--b")
said["another library"] = load("user/other")
os.makedirs("local/folder")
BetaVAE(latent_dim=2, hidden_dims=(4,), image_size=32).save_pretrained("local/folder")
hub.repos["local/folder"] = hub.repos["user/repo"]
said["folder first"] = BetaVAE.from_pretrained("local/folder").latent_dim
server.shutdown()
server.server_close()
said["from the cache"] = load("user/repo")
said["no network"] = load("user/none")
try:
    model.push_to_hub("user/repo")
except Exception as error:
    said["push without network"] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training leaves it, with evaluation."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    BetaVAE(latent_dim=3, hidden_dims=(4,), image_size=32).save_pretrained(folder)
    data = DataConfig(
        name="celeba", root=Path("/home/me/secret"), cache_dir=Path("/home/me/cache"), image_size=32
    )
    config = Config(data=data, objective=ObjectiveConfig(loss_type="H", beta=7.5))
    (folder / "config.yaml").write_text(config.to_yaml())
    records = [
        {"split": "valid", "step": 10, "mse": 0.5, "kld": 1.0},
        {"split": "train", "step": 19, "loss": 3.0},
        {
            "split": "valid",
            "step": 20,
            "mse": 0.0321,
            "kld": 12.5,
            "elbo": -300.0,
            "explained_variance": None,
        },
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"split": "va')
    for name in ("traversals.png", "reconstructions.png", "samples.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    evaluation = {"images": 60, "scores": {"mig": {"mean": 0.25, "half_width": 0.1}}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


@pytest.fixture(scope="module")
def said(run, tmp_path_factory):
    pytest.importorskip("huggingface_hub")
    home = tmp_path_factory.mktemp("home")
    own = {"HF_HOME": str(home / "hf"), "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_XET": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", SESSION, str(run)],
        cwd=home,
        env={**environment, **own, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- The client -------------------------------------------------------------------------------------------
def test_a_run_is_pushed_with_its_card(said):
    assert re.fullmatch(r"http://127.0.0.1:\d+/user/repo/commit/\w{40}", said["url"])
    names = ["README.md", "config.json", "config.yaml", "model.safetensors"]
    assert said["pushed"] == sorted([*names, "traversals.png", "reconstructions.png", "samples.png"])
    assert "secret" not in said["config.yaml"] + said["README.md"]
    assert "/home" not in said["config.yaml"] + said["README.md"]
    assert yaml.safe_load(said["config.yaml"])["objective"]["beta"] == 7.5


def test_what_is_downloaded_is_the_model_alone(said):
    assert said["downloaded"] == ["the same", ["config.json", "model.safetensors"]]
    assert said["revision"][0] == "the same"


def test_a_folder_comes_before_the_hub(said):
    assert said["folder first"] == 2


def test_without_a_network_the_cache_serves(said):
    assert said["from the cache"] == ["the same", []]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no model", "MissingError: user/none: no folder here, and no such model on the Hub (a private"),
        ("no revision", "MissingError: user/repo has no revision old on the Hub"),
        ("no name", "UsageError: user/a--b is no name of a model on the Hub: "),
        (
            "another library",
            "MissingError: user/other on the Hub holds no config.json: it is no model of bvae",
        ),
        (
            "no network",
            "MissingError: user/none: no folder here, not in the Hub's cache, and the Hub cannot be",
        ),
        ("push without network", "UsageError: user/repo: the Hub does not answer as it should: "),
    ],
)
def test_what_cannot_be_loaded_is_one_line(said, what, message):
    assert said[what].startswith(message)
    assert "\n" not in said[what]


# --- Without it -------------------------------------------------------------------------------------------
def test_what_can_be_a_name_of_the_hub():
    assert hub.is_id("user/repo-1.0_b")
    for name in (Path("user/repo"), "repo", "./repo", "../repo", "~/repo", "a/b/c", "/tmp", "user/", "a b/c"):
        assert not hub.is_id(name)


def test_a_path_is_never_looked_for_on_the_hub(tmp_path, monkeypatch):
    """Commands pass paths: a wrong one must not reach the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(MissingError, match=r"runs/none holds no config.json"):
        BetaVAE.from_pretrained(Path("runs/none"))


def test_a_folder_has_no_revisions(run):
    with pytest.raises(UsageError, match="is a folder, which has no revisions"):
        BetaVAE.from_pretrained(run, revision="main")


def test_a_missing_client_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"runs/typo is no folder here. .* pip install 'bvae\[hub\]'"
    ):
        BetaVAE.from_pretrained("runs/typo")


def test_a_run_that_does_not_exist(run, tmp_path):
    with pytest.raises(MissingError, match="is no folder"):
        BetaVAE.from_pretrained(run).push_to_hub("user/repo", run=tmp_path / "none")


def test_weights_with_and_without_metadata(run, tmp_path):
    """Folders that were written before the metadata were load too."""
    model = BetaVAE.from_pretrained(run)
    with safe_open(run / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("config") == json.dumps(model.config)
    assert metadata == {"format": "pt", "bvae": bvae.__version__}
    contents = set()
    for _ in range(8):  # safetensors itself writes metadata in a random order
        model.save_pretrained(tmp_path)
        contents.add((tmp_path / "model.safetensors").read_bytes())
    assert contents == {(run / "model.safetensors").read_bytes()}
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = BetaVAE.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


# --- The card ---------------------------------------------------------------------------------------------
def test_the_card_of_a_run(run):
    card = model_card.write(BetaVAE.from_pretrained(run), "user/faces", run, None)
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "bvae"
    assert header["pipeline_tag"] == "unconditional-image-generation"
    assert "\n# faces\n" in card
    assert "3 latents, RGB images of 32 x 32 pixels" in card
    assert 'BetaVAE.from_pretrained("user/faces")' in card
    assert "| licence of the images | CelebA, whose agreement allows non-commercial research only |" in card
    assert "| loss_type | H |" in card
    assert "| beta | 7.5 |" in card
    assert (
        "| step | 20 |\n| MSE per pixel, pixels in [-1, 1] | 0.0321 |\n| KL, nats per image | 12.5 |" in card
    )
    assert "explained variance" not in card  # it was not finite
    assert "| mig | 0.250 |" in card
    assert re.findall(r"\]\((\S+)\)", card) == ["traversals.png", "reconstructions.png", "samples.png"]


def test_the_card_knows_the_licence_of_each_data_set():
    assert set(model_card.LICENCES) == set(get_args(DataName))


def test_the_code_of_the_card_runs(run):
    card = model_card.write(BetaVAE.from_pretrained(run), str(run), run, None)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["mu"].shape == (8, 3)


def test_the_card_of_a_network_alone():
    model = BetaVAE(1, latent_dim=2, hidden_dims=(4,), image_size=32)
    card = model_card.write(model, "user/grey", None, None)
    assert "| licence of the images | not stated: ask the author of this model |" in card
    assert "## Objective" not in card
    stated = model_card.write(model, "user/grey", None, "CC0 | own photos")
    assert r"| licence of the images | CC0 \| own photos |" in stated


def test_damaged_files_of_a_run_leave_their_part_out(run, tmp_path):
    (tmp_path / "evaluation.json").write_text("[1]")
    (tmp_path / "metrics.jsonl").write_bytes(b'{"split": "valid", "mse": "x"}\n[]\n\xff\n')
    card = model_card.write(BetaVAE.from_pretrained(run), "user/repo", tmp_path, None)
    assert "mse" not in card.lower()
    assert "Disentanglement" not in card
