"""How a command ends: its exit status, and one line in place of a traceback."""

import errno

import pytest

from bvae.errors import exit_status


def stop(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("--n must be positive"), 2, "error: --n must be positive\n"),
        (FileNotFoundError("no such run"), 2, "error: no such run\n"),
        (OSError(errno.ENOSPC, "No space left"), 1, "error: [Errno 28] No space left\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_what_stops_a_command(error, status, said, capsys):
    assert exit_status(lambda: stop(error)) == status
    assert capsys.readouterr().err == said


def test_its_own_status_and_its_bugs():
    assert exit_status(lambda: None) == 0
    assert exit_status(lambda: 3) == 3
    with pytest.raises(KeyError):  # to be seen whole
        exit_status(lambda: stop(KeyError("bug")))
