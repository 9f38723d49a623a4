"""Models on the Hugging Face Hub: download one, upload one with its card. Needs the extra `hub`."""

import dataclasses
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bvae import __version__, files, model_card
from bvae.errors import MissingError, UsageError, missing

if TYPE_CHECKING:
    from bvae.model import BetaVAE

FILES = ("config.json", "model.safetensors")  # nothing else is downloaded
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
LOGIN = "a private model needs `hf auth login`"


def is_id(name: Any) -> bool:
    """Whether a name can be one of the Hub: a text of two parts.

    >>> is_id("user/repo"), is_id("runs/a/b"), is_id("./repo"), is_id(Path("user/repo"))
    (True, False, False, False)
    """
    return isinstance(name, str) and _ID.fullmatch(name) is not None


def download(repo_id: str, revision: str | None = None) -> Path:
    """The folder of a model in the Hub's cache, downloaded if needed; without a network, as it is there.

    Raises:
        MissingError: there is no such model or revision, or it is not in the cache and there is no network.
        UsageError: the Hub refuses the request.
    """
    with _explained(repo_id, revision):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(FILES),
            library_name="bvae",
            library_version=__version__,
        )
    if not (Path(folder) / "config.json").is_file():
        raise MissingError(f"{repo_id} on the Hub holds no config.json: it is no model of bvae")
    return Path(folder)


def upload(
    model: "BetaVAE",
    repo_id: str,
    run: Path | None,
    private: bool | None,
    revision: str | None,
    data_license: str | None,
) -> str:
    """Upload a model and its card, and the configuration and pictures of its run; return the commit's URL.

    Raises as `download`.
    """
    with TemporaryDirectory() as name, _explained(repo_id, revision):
        from huggingface_hub import HfApi

        folder = Path(name)
        model.save_pretrained(folder)
        if run:
            _copy_run(run, folder)
        files.write_text(folder / "README.md", model_card.write(model, repo_id, run, data_license))
        api = HfApi(library_name="bvae", library_version=__version__)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=f"Upload a beta-VAE of bvae {__version__}",
        )
        return str(commit.commit_url)


def _copy_run(run: Path, folder: Path) -> None:
    """The pictures, and config.yaml without the folders of the author's machine."""
    from bvae import config  # needs PyYAML

    if (run / "config.yaml").is_file():
        own = config.read(run / "config.yaml")[0]
        data = dataclasses.replace(own.data, root=None, cache_dir=None)
        files.write_text(folder / "config.yaml", dataclasses.replace(own, data=data).to_yaml())
    for name in model_card.PICTURES:
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """What the client raises, as one line that says what to do."""
    try:
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{repo_id} is no folder here. {missing(error)}", name=error.name) from None
    try:
        yield
    except errors.GatedRepoError:
        raise UsageError(f"{repo_id} is gated: ask for access on its page, then `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise MissingError(f"{repo_id}: no folder here, and no such model on the Hub ({LOGIN})") from None
    except errors.RevisionNotFoundError:
        raise MissingError(f"{repo_id} has no revision {revision} on the Hub") from None
    except errors.HFValidationError as error:
        raise UsageError(f"{repo_id} is no name of a model on the Hub: {_first_line(error)}") from None
    except errors.LocalEntryNotFoundError as error:
        reason = _first_line(error.__cause__ or error)
        text = f"{repo_id}: no folder here, not in the Hub's cache, and the Hub cannot be reached: {reason}"
        raise MissingError(text) from None
    except (
        errors.HTTPError,
        errors.OfflineModeIsEnabled,
    ) as error:  # HTTPError is that of the client's httpx
        raise UsageError(f"{repo_id}: the Hub does not answer as it should: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
