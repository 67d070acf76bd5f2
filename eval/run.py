"""Evaluate what a run trained, beside its teacher, or any model by itself:

    python -m eval.run outputs/RUN [--data data] [--tasks benchmarks ...] [--limit N]
    python -m eval.run --model ID_OR_PATH [--teacher ID_OR_PATH] [--out DIR]

Results: comprehensive_evaluation.json, items/*.jsonl and report.html in outputs/RUN/results. What was
computed once is kept (in MEDISTILL_CACHE), so an evaluation that was interrupted is continued by the same
command. docs/evaluation.md says what the numbers are.
"""

import argparse
import importlib
import logging
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from eval import data_files
from eval.options import ModelOptions, Options, add_flags, from_flags
from eval.report import write_report
from medistill_trl import console, disk
from medistill_trl.console import CommandParser
from medistill_trl.errors import UserError
from medistill_trl.run_directory import RunDirectory
from medistill_trl.sealed_json import write_record

SCHEMA_VERSION = 1
INTERRUPTED = 130  # exit code, as a shell gives it

# Name → module. A part is a module with
#   FILES      what it reads below the data folder, as glob patterns
#   evaluate(pair: Pair, data: Path, options: Options, store: ItemStore) -> dict
# Its result is JSON-able. `items`, if there, are per-item records; they go to results/items/<name>.jsonl.
PARTS = {
    "benchmarks": "eval.benchmarks",
    "generative": "eval.generative",
    "retention": "eval.retention",
    "perplexity": "eval.perplexity",
    "fidelity": "eval.fidelity",
    "faithfulness": "eval.faithfulness",
    "speed": "eval.speed",
    "quantisation": "eval.quantisation",
}


@dataclass(frozen=True)
class Request:
    """A checked command."""

    run: Path | None
    models: ModelOptions
    data: Path
    parts: dict[str, ModuleType]
    out: Path
    allow_partial: bool
    options: Options


def parse(arguments: list[str]) -> Request:
    """Read and check the command, and import the parts it asks for.

    Raises:
        UserError: what is wrong with it.
    """
    parser = CommandParser(
        prog="python -m eval.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="?", type=Path, help="A run directory.")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="Folder of python -m data_prep.build.",
    )
    every = f"Parts to run, by default all: {', '.join(PARTS)}."
    parser.add_argument("--tasks", nargs="+", choices=PARTS, metavar="PART", help=every)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="By default the run, or outputs/eval_MODEL."
    )
    parser.add_argument(
        "--allow_partial", action="store_true", help="Evaluate a run that is not finished."
    )
    add_flags(parser, ModelOptions)
    add_flags(parser, Options)
    parsed = parser.parse_args(arguments)
    models = from_flags(ModelOptions, parsed)
    if (parsed.run is None) == (models.model is None):
        parser.error("name either a run directory or a --model")
    given = [name for name, value in asdict(models).items() if value not in (None, False)]
    given = [name for name in given if name != "trust_remote_code"]  # never left to a run's recipe
    if parsed.run is not None and given:
        parser.error(f"--{given[0]} is not for a run: its recipe says how its models are loaded")
    options = from_flags(Options, parsed)
    names = [name for name in PARTS if parsed.tasks is None or name in parsed.tasks]
    parts = {name: importlib.import_module(PARTS[name]) for name in names}
    for part in parts.values():
        data_files.require(parsed.data, part.FILES)
    out = parsed.out or parsed.run or Path("outputs") / f"eval_{Path(models.model).stem}"
    return Request(parsed.run, models, parsed.data, parts, out, parsed.allow_partial, options)


def evaluate(request: Request) -> Path:
    """Run the parts in order and write the result; returns its path."""
    from eval import subjects
    from eval.cost import Cost
    from eval.item_store import ItemStore

    console.quiet_loading_bars()
    if request.run is not None:
        trusted = request.models.trust_remote_code
        pair = subjects.load_run(request.run, request.allow_partial, trusted)
    else:
        pair = subjects.load_models(request.models)
    directory = RunDirectory(request.out)
    results, items, costs = {}, {}, {}
    for name, part in request.parts.items():
        store = ItemStore()
        with Cost() as cost:
            result = part.evaluate(pair, request.data, request.options, store)
        items[name] = directory.write_items(name, result.pop("items", []))
        results[name] = result
        costs[name] = {
            **asdict(cost),
            "items_computed": store.computed,
            "items_from_store": store.reused,
        }
    content = {**_describe(request, pair), "results": results, "items": items, "cost": costs}
    write_record(directory.evaluation, content, finite=True)
    return directory.evaluation


def _describe(request: Request, pair) -> dict:
    """What was evaluated, on what and where: all that the numbers depend on."""
    from medistill_trl.run_record import environment

    patterns = sorted({pattern for part in request.parts.values() for pattern in part.FILES})
    files = data_files.require(request.data, patterns)
    return {
        "schema_version": SCHEMA_VERSION,
        "run": None if request.run is None else str(request.run),
        "subjects": {
            subject.name: {"source": subject.source, "fingerprint": subject.fingerprint}
            for subject in pair.subjects
        },
        "recipe": pair.recipe,
        "options": asdict(request.options),
        "data": {"folder": str(request.data), "sha256": data_files.digests(request.data, files)},
        **environment(),
    }


def _check_alone() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "an evaluation runs in one process; start it with python -m eval.run, not with accelerate launch"
        )


def main(arguments: list[str]) -> int:
    """Exit code: 0, or that of the user's error, which is printed without a traceback."""
    try:
        _check_alone()
        console.set_up(main_process=True)
        logging.getLogger("eval").setLevel(logging.INFO)
        request = parse(arguments)
        from medistill_trl.model_source import cache_folder

        folders = (request.out, cache_folder())
        with disk.explained(*folders, how_to_go_on="give the same command again"):
            path = evaluate(request)
            report = write_report(request.out, request.data)
    except UserError as error:
        print(f"\nmedistill_trl: {error}\n", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nmedistill_trl: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    print(f"\nfinished: {path}\nreport:   {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
