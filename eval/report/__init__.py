"""Reports: one run, or a comparison of many, as one HTML page that needs no network.

    python -m eval.report outputs/RUN
    python -m eval.report outputs/STUDY

What it shows is read from disk; nothing is measured here but intervals.
"""

from pathlib import Path

from eval.report.comparison_page import RESULT, comparison_page
from eval.report.run_page import run_page
from medistill_trl.errors import UserError
from medistill_trl.files import write_text
from medistill_trl.run_directory import EVALUATION, RECORD, RunDirectory
from medistill_trl.study.record import STUDY

PAGE = "report.html"


def write_report(folder: Path, data: Path | None = None) -> Path:
    """Write report.html of a run, an evaluation or a comparison; returns its path.

    Args:
        folder: Of a run or the `--out` of an evaluation; or of a study or a comparison.
        data: Where the evaluated data build lies now; by default where it was.

    Raises:
        UserError: there is nothing to report.
    """
    for compared in (folder, folder / "comparison"):
        if (compared / RESULT).is_file():
            return _write(compared / PAGE, comparison_page(compared, data))
    run = RunDirectory(folder)
    if any((run.results / name).is_file() for name in (RECORD, EVALUATION)):
        return _write(run.results / PAGE, run_page(run, data))
    if (folder / STUDY).is_file():
        raise UserError(
            f"{folder}: the study has not been compared yet; run: python -m eval.compare {folder}"
        )
    raise UserError(
        f"{folder}: nothing to report: neither results/{RECORD} nor results/{EVALUATION} nor {RESULT} is there; name "
        "the folder of a finished run, of an evaluation or of a comparison"
    )


def _write(path: Path, page: str) -> Path:
    write_text(path, page)
    return path
