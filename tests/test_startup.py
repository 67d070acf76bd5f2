"""What a command may not wait for before it can say what it does, or that its words are wrong; and a run, before it trains."""

import gc
import subprocess
import sys

import pytest
from conftest import ROOT

from medistill_trl.importing import many_modules

# Each takes from a third of a second to several to import.
SLOW = ("torch", "transformers", "trl", "datasets", "pandas", "scipy", "sklearn", "matplotlib")
# What no training run needs before its last step; each takes from half a second to several.
NOT_TO_TRAIN = (
    *(
        "matplotlib",
        "sklearn",
        "scipy.stats",
        "sentence_transformers",
        "tensorboard",
        "torchvision",
    ),
    *("wandb", "deepspeed", "vllm", "lm_eval", "eval.report", "eval.plots", "data_prep"),
)
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
    """The finished command, and the modules it has imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done, {line.rpartition("|")[2].strip() for line in lines}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself_without_loading_what_it_works_with(name):
    done, modules = imported(COMMANDS[name])
    packages = {module.partition(".")[0] for module in modules}
    assert done.returncode == 0
    assert "argparse" in packages or "typer" in packages or name in ("import", "recipes/run.py")
    assert not packages & set(SLOW)


def test_what_is_looked_for_would_be_found():
    assert {"scipy", "scipy.stats"} <= imported(["-c", "import scipy.stats"])[1]


# As `recipes/run.py` does it, up to the weights; then whether the collector is on, and what it passes over.
DRY_RUN = """
import gc, runpy, sys
sys.argv[0] = "recipes/run.py"
runpy.run_path("recipes/run.py", run_name="__main__")
print("collector", gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


def test_a_run_loads_nothing_that_training_does_not_need(tiny_overlay):
    words = ["recipes/sft.yaml", str(tiny_overlay), "--use_cpu", "true", "--dry_run"]
    done, modules = imported(["-c", DRY_RUN, *words])
    assert done.returncode == 0, done.stderr[-4000:]
    assert {"torch", "trl", "trl.trainer.base_trainer"} <= modules
    assert not modules & set(NOT_TO_TRAIN)
    assert "collector True True" in done.stdout


def test_imports_are_not_interrupted_by_the_garbage_collector():
    try:
        with many_modules():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
        with pytest.raises(ImportError), many_modules():
            raise ImportError
        assert gc.isenabled()
    finally:
        gc.unfreeze()
