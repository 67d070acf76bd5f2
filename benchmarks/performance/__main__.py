"""What the project takes of time and memory, beside what it cannot avoid and beside TRL:

    python -m benchmarks.performance [PART ...] [--methods METHOD ...] [--repetitions N] [--again]

Parts: steps (a training step of each method), generation (the teacher's), growth (with batch × length, examples,
samples), data (the build), evaluation, startup (imports and --help), first_step (the way of a run to it); all by default.
Each part is written to outputs/performance as JSON as soon as it is measured, and not measured again without --again.
docs/performance.md is written from all that is there.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from medistill_trl import console
from medistill_trl.errors import UserError
from medistill_trl.files import write_text
from medistill_trl.recipe import methods

PARTS = ("steps", "generation", "growth", "data", "evaluation", "startup", "first_step")
MOST_REPETITIONS = 10  # beside one that warms up, and one for memory
COMMANDS = ("data", "evaluation", "startup", "first_step")  # in processes of their own
ROOT = Path(__file__).resolve().parent.parent.parent  # recipes name their files from here


def parse(words: list[str]) -> argparse.Namespace:
    parser = console.CommandParser(
        prog="python -m benchmarks.performance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--methods", nargs="+", choices=methods(), default=list(methods()))
    parser.add_argument(
        "--repetitions", type=int, default=5, help="Counted ones; by default 5, one more warms up."
    )
    parser.add_argument("--again", action="store_true", help="Measure what was measured before.")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/performance")
    parser.add_argument(
        "--document", type=Path, default=ROOT / "docs/performance.md", help="The page to write."
    )
    given = parser.parse_args(words)
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {min(unknown)}; one of {', '.join(PARTS)}")
    if not 1 <= given.repetitions <= MOST_REPETITIONS:
        parser.error(
            f"--repetitions must be from 1 to {MOST_REPETITIONS}, which three epochs of 16 prompts have room for, "
            f"got {given.repetitions}"
        )
    given.parts = given.parts or list(PARTS)
    return given


def measurements(given: argparse.Namespace) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name of a JSON file, and what fills it: each part, and of the steps each method."""
    from benchmarks.performance import commands, generation, growth, startup, steps

    work, count = given.out / "work", given.repetitions
    of_part = {
        "generation": lambda: generation.measure(work, count),
        "growth": lambda: growth.measure(work, count),
        "data": lambda: commands.data(work),
        "evaluation": lambda: commands.evaluation(work),
        "startup": lambda: startup.commands(count),
        "first_step": lambda: startup.first_step(work),
    }
    for part in given.parts:
        if part == "steps":
            for method in given.methods:
                yield f"steps_{method}", lambda method=method: steps.of_method(method, work, count)
        else:
            yield part, of_part[part]


def main(words: list[str]) -> int:
    try:
        given = parse(words)
    except UserError as error:
        print(f"\nmedistill_trl: {error}\n", file=sys.stderr)
        return error.exit_code
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    from benchmarks.performance import document
    from benchmarks.training_step import machine

    threads = torch.get_num_threads()
    console.set_up(main_process=True)
    console.quiet_loading_bars()
    given.out = given.out.resolve()
    (given.out / "work").mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    for name, measure in measurements(given):
        path = given.out / f"{name}.json"
        if path.is_file() and not given.again:
            continue
        # Threads that wait for each other would spend seconds of the processor too.
        torch.set_num_threads(threads if name in COMMANDS else 1)
        content = {"machine": machine(), "repetitions": given.repetitions, "found": measure()}
        write_text(path, json.dumps(content, indent=1) + "\n")
    text = document.page(given.out, given.document.read_text(encoding="utf-8"))
    write_text(given.document, text)
    print(f"{given.document}: written from {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
