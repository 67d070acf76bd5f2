"""Damaged inputs against the real entries: each must end well, or with a message that says what to do.

    PYTHONPATH=tests python -m torture.fuzz [--count 2400] [--seed 0] [--targets recipe rows ...]

Every attempt has a seed of its own and can be repeated alone: `--targets NAME --only SEED`. An attempt fails on any
exception that is no `UserError`, an exit status other than 0 and 2, a message that names nothing, more than
`SECONDS`, or a change to what was read.
"""

import argparse
import contextlib
import hashlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from medistill_trl.errors import UserError

SECONDS = 20  # of one attempt; the slowest that is well takes two
MEMORY = 6 * 2**30  # bytes an attempt may ask for beyond what is in use
Start = Callable[[], object]


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Args:
        name: For the command line and the report.
        damage: Writes a damaged input into a folder and returns what a user would start on it; an integer that this
            returns is an exit status.
        share: Of all attempts, relative to the other targets'.
    """

    name: str
    damage: Callable[[random.Random, Path], Start]
    share: int


@dataclass(frozen=True)
class Outcome:
    """What became of one attempt.

    Args:
        kind: accepted, refused or failed.
        text: The message, or the traceback.
    """

    kind: str
    text: str = ""


class TooLong(Exception):
    """An attempt hung. Not an OSError, which libraries take for a missing file."""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Time and memory for one attempt: a hang or a bomb becomes an exception."""

    def stop(number, frame):
        raise TooLong(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def attempt(target: Target, seed: int, folder: Path) -> Outcome:
    """One damaged input in an empty folder."""
    start = target.damage(random.Random(f"{target.name} {seed}"), folder)
    given = _contents(folder)
    said = io.StringIO()
    try:
        with (
            _limited(),
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            status = start()
    except UserError as error:
        outcome = _judge(str(error))
    except SystemExit as error:
        outcome = _by_status(error.code, said.getvalue())
    except BaseException:  # whatever it is, it is what this looks for
        outcome = Outcome("failed", traceback.format_exc())
    else:
        outcome = _by_status(status if type(status) is int else 0, said.getvalue())
    changed = [name for name, digest in given.items() if _contents(folder).get(name) != digest]
    if changed:
        return Outcome("failed", f"changed what it was given: {', '.join(changed)}\n{outcome.text}")
    return outcome


def _by_status(status: object, said: str) -> Outcome:
    if status in (0, None):
        return Outcome("accepted")
    if status == UserError.exit_code and "Traceback" not in said:
        return _judge(said)
    return Outcome("failed", f"exit status {status}\n{said}")


def _judge(message: str) -> Outcome:
    """A message has to say something, and must be printable as it is."""
    if len(message.split()) < 4:
        return Outcome("failed", f"a message that says nothing: {message!r}")
    if len(message) > 20_000:
        return Outcome("failed", f"a message of {len(message):,} characters: {message[:300]!r}")
    return Outcome("refused", message)


def _contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "written" not in path.relative_to(folder).parts
    }


def attempts(targets: list[Target], count: int) -> list[tuple[Target, int]]:
    """`count` attempts shared out among the targets."""
    total = sum(target.share for target in targets)
    return [
        (target, number)
        for target in targets
        for number in range(max(1, round(count * target.share / total)))
    ]


def run(targets: list[Target], count: int, seed: int, only: int | None = None) -> list[str]:
    """Make the attempts and print what became of them; returns the failures."""
    planned = attempts(targets, count) if only is None else [(target, only) for target in targets]
    counts: Counter = Counter()
    failures = []
    for target, number in tqdm(planned, unit="input", disable=None):
        own = number if only is not None else seed * 1_000_000 + number
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            outcome = attempt(target, own, folder)
        finally:
            shutil.rmtree(folder)
        counts[target.name, outcome.kind] += 1
        if outcome.kind == "failed" or only is not None:
            failures.append(f"--targets {target.name} --only {own}: {outcome.kind}\n{outcome.text}")
    for target in targets:
        own = {kind: counts[target.name, kind] for kind in ("accepted", "refused", "failed")}
        print(f"{target.name:24} " + "  ".join(f"{n:5} {kind}" for kind, n in own.items()))
    print(
        f"{sum(counts.values())} damaged inputs, {sum(n for (_, k), n in counts.items() if k == 'failed')} failed"
    )
    return failures


def main(arguments: list[str]) -> int:
    from torture.targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m torture.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=2400, help="damaged inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=[t.name for t in TARGETS])
    parser.add_argument("--only", type=int, help="repeat one attempt of each target, and show it")
    given = parser.parse_args(arguments)
    chosen = [t for t in TARGETS if given.targets is None or t.name in given.targets]
    failures = run(chosen, given.count, given.seed, given.only)
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures and given.only is None else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main(sys.argv[1:]))
