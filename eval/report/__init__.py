"""Reports: one run, or a comparison of many, as one HTML page that needs no network.

    python -m eval.report outputs/RUN

What it shows is read from disk; nothing is measured here but intervals.
"""

from pathlib import Path

from eval.report.run_page import EVALUATION, RECORD, run_page
from medistill_trl.errors import UserError
from medistill_trl.files import write_text
from medistill_trl.run_directory import RunDirectory


def write_report(folder: Path, data: Path | None = None) -> Path:
    """Write results/report.html of a run or an evaluation; returns its path.

    Args:
        folder: Of the run, or the `--out` of an evaluation.
        data: Where the evaluated data build lies now; by default where it was.

    Raises:
        UserError: there is nothing to report.
    """
    run = RunDirectory(folder)
    if not any((run.results / name).is_file() for name in (RECORD, EVALUATION)):
        raise UserError(
            f"{folder}: no run and no evaluation: neither results/{RECORD} nor results/{EVALUATION} is there; "
            "name the folder of a finished run"
        )
    path = run.results / "report.html"
    write_text(path, run_page(run, data))
    return path
