"""What a command may not wait for before it can say what it does, or that its words are wrong."""

import subprocess
import sys

import pytest
from conftest import ROOT

# Each takes from a third of a second to several to import.
SLOW = ("torch", "transformers", "trl", "datasets", "pandas", "scipy", "sklearn", "matplotlib")
COMMANDS = {
    "recipes/run.py": ["recipes/run.py", "--help"],
    "medistill": ["-m", "medistill_trl.cli", "--help"],
    "study": ["-m", "medistill_trl.study", "--help"],
    "eval.run": ["-m", "eval.run", "--help"],
    "eval.compare": ["-m", "eval.compare", "--help"],
    "data_prep.build": ["-m", "data_prep.build", "--help"],
    "import": ["-c", "import medistill_trl"],
    "benchmarks.performance": ["-m", "benchmarks.performance", "--help"],
}


def imported(words: list[str]) -> tuple[subprocess.CompletedProcess, set[str]]:
    """The finished command, and the top-level packages it has imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done, {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself_without_loading_what_it_works_with(name):
    done, packages = imported(COMMANDS[name])
    assert done.returncode == 0
    assert "argparse" in packages or "typer" in packages or name in ("import", "recipes/run.py")
    assert not packages & set(SLOW)


def test_what_is_looked_for_would_be_found():
    assert "scipy" in imported(["-c", "import scipy.stats"])[1]
