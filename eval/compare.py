"""Compare runs, from what they left on disk:

    python -m eval.compare outputs/A outputs/B ... [STUDY_FOLDER] [--baseline sft] [--quality kl]

Writes comparison.json, comparison.md, pictures and report.html. Runs that differ in their seed alone are taken together. What
cannot be compared is refused, with the reasons. docs/comparison.md says what the numbers are.
"""

import argparse
import sys
from pathlib import Path

from eval.comparison.runs import STUDY, find
from medistill_trl.console import CommandParser
from medistill_trl.errors import UserError
from medistill_trl.files import write_text
from medistill_trl.run_directory import RunDirectory
from medistill_trl.sealed_json import write_record

RESULT, PAGE = "comparison.json", "comparison.md"
DEFAULT_OUT = Path("outputs/comparison")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command.

    Raises:
        UserError: what is wrong with it.
    """
    parser = CommandParser(
        prog="python -m eval.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="Run directories, and folders of studies.",
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="A configuration, method or run that all others are compared with; by default the SFT one, else the first.",
    )
    parser.add_argument(
        "--quality",
        metavar="MEASURE",
        help="What is ranked and tested first: kl, retention, heldout_kl or any key of comparison.json's measures; by "
        "default kl, or heldout_kl where a run has no evaluation.",
    )
    parser.add_argument(
        "--x",
        metavar="KEY",
        help="Recipe key along which the ablation is plotted; by default the number that varies.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"By default the study's comparison/, the results/ of a single run, else {DEFAULT_OUT}.",
    )
    parser.add_argument(
        "--allow_partial",
        action="store_true",
        help="Compare what is there of unfinished runs and studies, and where some seeds of a configuration lack a "
        "measure take those that have it.",
    )
    return parser.parse_intermixed_args(arguments)


def default_out(paths: list[Path]) -> Path:
    """Beside what is compared, where that is one thing."""
    if len(paths) > 1:
        return DEFAULT_OUT
    study = (paths[0] / STUDY).is_file()
    return paths[0] / "comparison" if study else RunDirectory(paths[0]).results


def compare(request: argparse.Namespace) -> tuple[dict, Path]:
    """Write the comparison; returns it and the path of the report."""
    # Here, so that --help does not wait for the statistics.
    from eval.comparison import tables
    from eval.comparison.result import build
    from eval.plots import draw
    from eval.report import write_report

    found = find(request.paths, request.allow_partial)
    content = build(found, request.baseline, request.quality, request.x, request.allow_partial)
    out = request.out or default_out(request.paths)
    content["pictures"] = [path.name for path in draw(content, out)]
    write_record(out / RESULT, content, finite=True)
    write_text(out / PAGE, tables.document(content))
    single = len(request.paths) == 1 and not (request.paths[0] / STUDY).is_file()
    return content, write_report(request.paths[0] if single else out)  # a run has a page of its own


def _show(markdown: str) -> None:
    """Laid out in a terminal, and as it is elsewhere: a log has no width to fit it in."""
    from rich.console import Console
    from rich.markdown import Markdown

    print()
    console = Console()
    if console.is_terminal:
        console.print(Markdown(markdown))
    else:
        print(markdown)


def main(arguments: list[str]) -> int:
    """Exit code: 0, or that of the user's error, which is printed without a traceback."""
    try:
        content, report = compare(parse(arguments))
    except UserError as error:
        print(f"\nmedistill_trl: {error}\n", file=sys.stderr)
        return error.exit_code
    from eval.comparison import tables
    from eval.comparison.verdict import left_out

    print(" ".join(content["verdict"]))
    if content["primary"]:
        _show(tables.primary(content))
    for entry in content["missing"][: tables.SHOWN]:
        print(f"\n{entry['run']} {entry['what']}; made by\n  {entry['command']}")
    if len(content["missing"]) > tables.SHOWN:
        print(f"\nand {len(content['missing']) - tables.SHOWN} more, alike")
    if content["missing"] and content["studies"]:
        print(f"\n{tables.WHOLE_STUDY}")
    for note in content["notes"]:
        print(f"\nnote: {note}")
    for line in left_out(content):
        print(f"\n{line}")
    print(f"\nfinished: {report.parent / PAGE}\nreport:   {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
