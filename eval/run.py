"""Evaluate what a run trained, beside its teacher, or any model by itself:

    python -m eval.run outputs/RUN [--data data] [--tasks benchmarks ...] [--limit N]
    python -m eval.run --model ID_OR_PATH [--teacher ID_OR_PATH] [--out DIR]

Results: comprehensive_evaluation.json, items/*.jsonl and report.html in outputs/RUN/results. What was
computed once is kept (in MEDISTILL_CACHE), so an evaluation that was interrupted is continued by the same
command. Results of an earlier command are kept beside the new ones, or moved to results/earlier-1, -2, …
docs/evaluation.md says what the numbers are.
"""

import argparse
import importlib
import logging
import os
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from eval import data_files
from eval.options import ModelOptions, Options, add_flags, from_flags
from medistill_trl import console, disk
from medistill_trl.console import CommandParser
from medistill_trl.errors import UserError
from medistill_trl.run_directory import RunDirectory
from medistill_trl.sealed_json import write_record

SCHEMA_VERSION = 2
INTERRUPTED = 130  # exit code, as a shell gives it
LONGEST_NAME = 200  # characters of a folder that is named after a model
logger = logging.getLogger("eval.run")  # also when this is __main__

# Name → module. A part is a module with
#   FILES      what it reads below the data folder, as glob patterns
#   check(pair: Pair, data: Path, options: Options) -> None
#              raises UserError for what would stop it; run for all parts before the first one begins
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
    """A checked command.

    Args:
        parts: What to measure, by name.
        absent: Part → which of its files is not there, so that it is skipped.
    """

    run: Path | None
    models: ModelOptions
    data: Path
    parts: dict[str, ModuleType]
    absent: dict[str, str]
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
    absent = _absent(parsed.data, parts)
    if absent and (parsed.tasks is not None or len(absent) == len(parts)):
        name, problem = next(iter(absent.items()))
        raise UserError(f"{problem}; {name} reads it, --tasks names other parts")
    parts = {name: part for name, part in parts.items() if name not in absent}
    out = parsed.out or parsed.run or default_out(models)
    return Request(
        parsed.run, models, parsed.data, parts, absent, out, parsed.allow_partial, options
    )


def _absent(data: Path, parts: dict[str, ModuleType]) -> dict[str, str]:
    problems = {name: data_files.absent(data, part.FILES) for name, part in parts.items()}
    return {name: problem for name, problem in problems.items() if problem is not None}


def default_out(models: ModelOptions) -> Path:
    """outputs/eval_ and what tells a model from others: its whole name, revision, layers and bits."""
    words = [models.model, models.revision]
    if models.keep_layers is not None:
        words.append(f"layers-{'-'.join(map(str, models.keep_layers))}")
    words += ["4bit" if models.load_in_4bit else None, "8bit" if models.load_in_8bit else None]
    name = re.sub(r"[^\w.-]+", "_", "_".join(filter(None, words))).strip("_.")
    return Path("outputs") / f"eval_{name[-LONGEST_NAME:]}"


def evaluate(request: Request) -> Path:
    """Run the parts in order; the result is written whenever one ends. Returns its path.

    Raises:
        UserError: something would stop a part; none has begun then.
    """
    from eval import earlier, subjects

    console.quiet_loading_bars()
    if request.run is not None:
        trusted = request.models.trust_remote_code
        pair = subjects.load_run(request.run, request.allow_partial, trusted)
    else:
        pair = subjects.load_models(request.models)
    request = with_verifier(request, pair.recipe)
    for part in request.parts.values():
        part.check(pair, request.data, request.options)
    described = describe(request, pair)
    content = earlier.keep(request.out, described, list(request.parts)).beside(
        described, list(request.parts)
    )
    for name, why in request.absent.items():
        if name not in content["results"]:
            logger.warning("%s is skipped: %s", name, why)
            content["results"][name] = {"skipped": why}
    directory = RunDirectory(request.out)
    if content["results"]:
        _write(directory.evaluation, content)
    for name, part in request.parts.items():
        result, content["cost"][name] = _measure(part, pair, request)
        content["items"][name] = directory.write_items(name, result.pop("items", []))
        content["results"][name] = result
        _write(directory.evaluation, content)
    return directory.evaluation


def with_verifier(request: Request, recipe: dict | None) -> Request:
    """With the recipe's verifier, where the command names none."""
    verifier = request.options.verifier or (recipe or {}).get("verifier")
    return replace(request, options=replace(request.options, verifier=verifier))


def _measure(part: ModuleType, pair, request: Request) -> tuple[dict, dict]:
    """A part's result and what it cost."""
    from eval.cost import Cost
    from eval.item_store import ItemStore
    from medistill_trl.run_record import device_name, git_commit

    store = ItemStore()
    with Cost() as cost:
        result = part.evaluate(pair, request.data, request.options, store)
    where = {"git_commit": git_commit(), "device": device_name()}
    counts = {"items_computed": store.computed, "items_from_store": store.reused}
    return result, {**asdict(cost), **counts, **where}


def _write(path: Path, content: dict) -> None:
    """The result, its parts in the order of `PARTS`."""
    ordered = {
        key: {name: content[key][name] for name in PARTS if name in content[key]}
        for key in ("results", "items", "cost")
    }
    write_record(path, {**content, **ordered}, finite=True)


def describe(request: Request, pair) -> dict:
    """What was evaluated, on what and where: all that the numbers depend on."""
    from medistill_trl.run_record import environment

    patterns = sorted({pattern for part in request.parts.values() for pattern in part.FILES})
    files = data_files.require(request.data, patterns)
    return {
        "schema_version": SCHEMA_VERSION,
        "run": None if request.run is None else str(request.run),
        "subjects": {
            subject.name: {
                "source": subject.source,
                "fingerprint": subject.fingerprint,
                "system_prompt": subject.form.system_prompt,
            }
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
        from eval.report import write_report
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
