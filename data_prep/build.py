"""Make all the data: the training pool, the held-out benchmarks, MedPPL-10k, FidelityBench-Med.

python -m data_prep.build --out data [--raw_dir DIR | --sample] [--size 120k]
"""

import argparse
import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.sources import NAMES, RESERVE
from medistill_trl.errors import UserError

if TYPE_CHECKING:
    from data_prep.inputs import Input

SIZES = "a number, or a number of thousands such as 120k"


@dataclass(frozen=True)
class Settings:
    """Everything a build depends on besides its inputs.

    Args:
        size: Prompts in the three files of the pool together; None takes all.
        passages: Passages wanted for MedPPL.
        prompts: Prompts wanted for FidelityBench-Med.
    """

    sources: tuple[str, ...] = NAMES
    size: int | None = None
    seed: int = 0
    passages: int = 10_000
    prompts: int = 1_500
    on_bad_row: str = "fail"


def build(settings: Settings, found: "list[Input]", out: Path, jobs: int) -> dict:
    """Build everything into `out`; returns the report.

    Raises:
        UserError: for rows that cannot be used under `on_bad_row: fail`; nothing is written then.
    """
    # Here, so that --help and a wrong command do not wait for them.
    from data_prep import benchmarks, fidelitybench, medppl, parts, pool
    from data_prep.decontaminate import Guard
    from data_prep.ledger import Ledger
    from data_prep.output import Output
    from data_prep.report import markdown, report
    from data_prep.workspace import Workspace

    digests = [digest for data in found for digest in data.digests()]
    work = Workspace(out / ".build", _key(settings, digests), jobs)
    if work.resumed:
        print("continuing the build that was interrupted")
    ledger = Ledger()
    everything = [parts.read(work, data, settings.seed, ledger) for data in found]
    ledger.judge(settings.on_bad_row)
    datasets = [part for part in everything if part.name in NAMES]

    output = Output(work.folder / "out")
    held_out = benchmarks.write(datasets, output)
    guard = Guard(held_out)
    benchmarks.write_few_shot(datasets, guard, output)
    held_out += fidelitybench.write(datasets, guard, output, ledger, settings.prompts)
    guard = Guard(held_out)
    table, processed = pool.write(work, datasets, guard, output, ledger, settings.size)
    medppl.write(work, everything, guard, table, output, ledger, settings.passages)
    for part in everything:
        part.account.decide(part.rows(RESERVE), "left out: held in reserve")
    result = report(asdict(settings), digests, ledger, output.files, processed)
    output.publish(out, result, markdown(result))
    work.close()
    return result


def _key(settings: Settings, digests: list[dict]) -> str:
    """Of everything the tables of the workspace depend on, this code among it."""
    from data_prep import inputs

    kept = {k: v for k, v in asdict(settings).items() if k not in ("size", "on_bad_row")}
    here = Path(__file__).parent
    files = [*here.glob("*.*"), *(here / "sources").glob("*.*")]
    code = [inputs.sha256(path) for path in sorted(files)]
    libraries = [version(name) for name in ("datasketch", "datasets", "numpy", "xxhash")]
    return hashlib.sha256(json.dumps([kept, digests, code, libraries]).encode()).hexdigest()


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        if options.out.exists() and not options.out.is_dir():
            raise UserError(f"--out {options.out}: is a file; give a folder")
        settings = Settings(
            tuple(name for name in NAMES if name in options.sources),
            options.size,
            options.seed,
            options.medppl_size,
            options.fidelitybench_size,
            options.on_bad_row,
        )
        result = build(settings, _find(options, settings.sources), options.out, options.jobs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"error: {error.filename or options.out}: {error.strerror or error}", file=sys.stderr)
        return UserError.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    _tell(result, options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.build",
        description="Make the training pool, the held-out benchmarks, MedPPL-10k and FidelityBench-Med.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write to")
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument(
        "--raw_dir", type=Path, help="folder of downloaded releases, a folder for each dataset"
    )
    origin.add_argument("--sample", action="store_true", help="the packaged sample: no download")
    add("--sources", nargs="+", choices=NAMES, default=NAMES, help="datasets (default: all)")
    add("--size", type=_size, help=f"prompts of the pool: all (default), or {SIZES}")
    add("--seed", type=int, default=0, help="of every draw (default: 0)")
    add(
        "--medppl_from",
        type=Path,
        help="a file or folder of passages for MedPPL, besides PubMedQA's unlabelled abstracts "
        "(default: DIR/passages where there is one)",
    )
    add("--medppl_size", type=_count, default=10_000, help="passages (default: 10k)")
    add("--fidelitybench_size", type=_count, default=1_500, help="prompts (default: 1500)")
    add(
        "--on_bad_row",
        choices=("fail", "skip"),
        default="fail",
        help="a row that cannot be used: fail names them all and writes nothing (default), skip leaves "
        "them out and names them in the report",
    )
    add("--jobs", type=_count, default=os.cpu_count() or 1, help="processes (default: all cores)")
    return parser


def _size(text: str) -> int | None:
    return None if text == "all" else _count(text)


def _count(text: str) -> int:
    digits, thousands = (text[:-1], 1000) if text.endswith("k") else (text, 1)
    if not digits.isascii() or not digits.isdigit() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not {SIZES}")
    return int(digits) * thousands


def _find(options: argparse.Namespace, sources: tuple[str, ...]) -> "list[Input]":
    from data_prep import inputs

    raw_dir = inputs.SAMPLE if options.sample else options.raw_dir
    found = [inputs.find(name, raw_dir) for name in sources]
    given = options.medppl_from or (raw_dir / "passages" if raw_dir else None)
    if options.medppl_from or (given and given.is_dir()):
        found.append(inputs.passages(given))
    return found


def _tell(result: dict, out: Path) -> None:
    for note in result["notes"]:
        print(f"note: {note}")
    for name, file in result["files"].items():
        print(f"{file['rows']:9,d} rows  {name}")
    print(f"{out}: done; {out / 'build_report.md'} says what was dropped and why")


if __name__ == "__main__":
    sys.exit(main())
