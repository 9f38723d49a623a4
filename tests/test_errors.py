"""How a command ends: its exit status, and one line in place of a traceback, for the user's errors alone."""

import errno

import pytest

from bvae.errors import MissingError, UsageError, exit_status


def stop(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UsageError("--n must be positive"), 2, "error: --n must be positive\n"),
        (MissingError("no run at runs/a"), 2, "error: no run at runs/a\n"),
        (PermissionError(errno.EACCES, "denied", "a.png"), 2, "error: [Errno 13] denied: 'a.png'\n"),
        (OSError(errno.ENOSPC, "No space left"), 1, "error: [Errno 28] No space left\n"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1, "error: [Errno 122] Disk quota exceeded\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
    ids=str,
)
def test_what_stops_a_command(error, status, said, capsys):
    assert exit_status(lambda: stop(error)) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "bug", [KeyError("k"), ValueError("operands"), OSError("handle is closed")], ids=repr
)
def test_a_bug_shows_its_traceback(bug):
    with pytest.raises(type(bug)):
        exit_status(lambda: stop(bug))


def test_its_own_status():
    assert exit_status(lambda: None) == 0
    assert exit_status(lambda: 3) == 3


def test_a_missing_file_is_both():
    assert isinstance(MissingError("gone"), FileNotFoundError)
    assert isinstance(MissingError("gone"), ValueError)
