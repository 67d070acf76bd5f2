"""Write the report of a run again, from what lies in its folder:

python -m eval.report outputs/RUN [--data data]
"""

import argparse
import sys
from pathlib import Path

from eval.report import write_report
from medistill_trl.errors import UserError


def main(arguments: list[str]) -> int:
    """Exit code: 0, or that of the user's error, which is printed without a traceback."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder", type=Path, help="A run, the --out of an evaluation, a study or a comparison."
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="Where the evaluated data build lies now, for the questions; by default where it was.",
    )
    given = parser.parse_args(arguments)
    try:
        path = write_report(given.folder, given.data)
    except UserError as error:
        print(f"\nmedistill_trl: {error}\n", file=sys.stderr)
        return error.exit_code
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
