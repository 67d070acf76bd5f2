"""Memory of every run of a study, from the models' configs; no weights are loaded.

    python -m medistill_trl.study.plan < {"launcher": [...], "runs": {name: words}}

writes one line of JSON for each run. A process of its own, since it loads torch and a study does not.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from medistill_trl.errors import RunFailed, UserError
from medistill_trl.study.grid import Run


def measure(runs: list[Run], launcher: list[str]) -> dict[str, dict[str, Any]]:
    """What each run would hold: `peak_gb`, or `problem` where the run would be refused.

    Args:
        launcher: Words of accelerate launch.

    Raises:
        RunFailed: the process ended early.
    """
    asked = {"launcher": launcher, "runs": {run.name: run.words for run in runs}}
    command = [sys.executable, "-m", "medistill_trl.study.plan"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # The answer waits for the whole question, so these pipes cannot block each other. What libraries say goes to a
    # file: nobody reads it before the end, and a full pipe would stop them.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as said,
        subprocess.Popen(command, text=True, stderr=said, **pipes) as process,
    ):
        process.stdin.write(json.dumps(asked))
        process.stdin.close()
        lines = tqdm(process.stdout, total=len(runs), desc="planning", unit="run", disable=None)
        found = {line["run"]: line for line in map(json.loads, lines)}
        process.wait()
        said.seek(0)
        errors = said.read()
    if len(found) < len(runs):
        raise RunFailed(f"the memory of {len(runs) - len(found)} runs was not found:\n{errors}")
    return found


def _answer(asked: dict) -> Iterator[dict[str, Any]]:
    from medistill_trl import launch, methods, recipe
    from medistill_trl.dry_run import memory_plan
    from medistill_trl.pipeline import build_arguments, check_inputs
    from medistill_trl.run_directory import RunDirectory

    use_cpu = launch.read_request(asked["launcher"]).use_cpu
    for name, words in asked["runs"].items():
        checked = recipe.load(words)
        method = methods.load(checked.values["method"])
        try:
            directory = RunDirectory(checked.output_dir)
            arguments = build_arguments(checked, method, directory, use_cpu)
            loaded = check_inputs(method, arguments)
        except UserError as error:
            yield {"run": name, "problem": str(error)}
            continue
        peak = memory_plan(method, arguments, loaded).peak
        yield {"run": name, "peak_gb": round(peak.gb, 2), "phase": peak.name}


def main() -> None:
    output, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not the answer
    for line in _answer(json.load(sys.stdin)):
        print(json.dumps(line), file=output, flush=True)


if __name__ == "__main__":
    main()
