"""`python -m eval.run` in this process, and what it left."""

from pathlib import Path

import pytest
from sealed import read

from eval import run as command
from eval.item_store import ItemStore
from medistill_trl.run_directory import EVALUATION


def evaluate(*arguments):
    return command.main([str(word) for word in arguments])


def result_of(folder):
    return read(folder / "results" / EVALUATION)


def refused(capsys, *arguments):
    """The message of a command that is refused."""
    assert evaluate(*arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def own_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for results, with the models' kept."""
    monkeypatch.setattr(ItemStore.__init__, "__defaults__", (folder / "evaluations",))
    return folder / "evaluations"
