"""What the benchmarks of one training step share: options, turns, peak memory, ratios and their report.

A benchmark has variants of the step, by name. They take turns in one process for the time; for the memory each
runs in a process of its own.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median

from medistill_trl import console, run_record

ROOT = Path(__file__).resolve().parent.parent  # recipes name their files from here
MODES = {"full": "all weights", "lora": "LoRA r=16"}


# --- the command


def options(
    description: str, variants: Iterable[str], batch: int, tokens: int
) -> argparse.ArgumentParser:
    """The options that all of them have; `batch` and `tokens` are defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=batch, help="rows")
    parser.add_argument("--tokens", type=int, default=tokens, help="of a row, prompt included")
    parser.add_argument("--repetitions", type=int, default=5, help="the first is discarded")
    parser.add_argument(
        "--modes", choices=MODES, nargs="+", default=list(MODES), help="what trains"
    )
    parser.add_argument("--tiny", action="store_true", help="random models, to try the script")
    # Of the processes that `peak` starts:
    parser.add_argument("--peak_of", choices=list(variants), help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    return parser


def run(
    parser: argparse.ArgumentParser,
    title: str,
    sections: Callable[[Namespace], Iterable[str]],
    own_peak: Callable[[Namespace], int],
) -> None:
    """Parse the command, and print the report; or the peak of one variant, in a process that `peak` started.

    Args:
        sections: Of the report, in Markdown.
        own_peak: Bytes of this process during one step of `given.peak_of` in `given.mode`.
    """
    given = parser.parse_args()
    if given.repetitions < 2:
        parser.error(
            f"--repetitions must be at least 2, the first is discarded; got {given.repetitions}"
        )
    console.set_up(main_process=True)
    console.quiet_loading_bars()
    os.chdir(ROOT)
    if given.peak_of is not None:
        print(own_peak(given))
        return
    print("\n\n".join([f"# {title}", machine(), *sections(given)]))


def each_mode(given: Namespace) -> Iterator[Namespace]:
    """The options of one mode after the other, as `given.mode`."""
    for mode in given.modes:
        say(f"== {MODES[mode]}")
        yield changed(given, mode=mode)


def changed(given: Namespace, **changes) -> Namespace:
    return Namespace(**{**vars(given), **changes})


def machine() -> str:
    here = run_record.environment()
    names = ("torch", "transformers", "trl", "peft")
    versions = ", ".join(f"{name} {here['versions'][name]}" for name in names)
    return f"{len(os.sched_getaffinity(0))} cores; {here['device']}; {versions}; commit {here['git_commit']}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- time


def timed(variant: Callable, bench) -> float:
    """Seconds of one step.

    Args:
        variant: A forward and a backward on `bench`, which has a `student`.
    """
    bench.student.zero_grad(set_to_none=True)
    start = time.perf_counter()
    variant(bench)
    return time.perf_counter() - start


def step_times(
    names: Iterable[str], step: Callable[[str], float], repetitions: int
) -> dict[str, list[float]]:
    """Seconds of every repetition but the first, which warms up.

    All variants take turns within a repetition, each time in another order, so that a machine that gets
    slower or faster does so for all of them.

    Args:
        step: Variant → the seconds it took.
    """
    names = list(names)
    seconds = {name: [] for name in names}
    for repetition in range(repetitions):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(step(name))
            say(f"  repetition {repetition}: {name} {seconds[name][-1]:.2f} s")
    return {name: times[1:] for name, times in seconds.items()}


# --- memory


def peak_during(step: Callable[[], object]) -> tuple[int, int]:
    """Bytes of this process: its resident size before the step, and the largest during it.

    `ru_maxrss` would not do: a child's starts at the size of the process that started it.
    """
    before = mark_peak()
    step()
    return before, peak_since_mark()


def mark_peak() -> int:
    """Bytes resident now; the largest size is counted from here on."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_since_mark() -> int:
    return resident("VmHWM")


def resident(mark: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{mark}:\s+(\d+) kB", status).group(1))


def peak(module: str, variant: str, given: Namespace) -> int:
    """What the benchmark's `own_peak` says of a variant in a fresh process.

    A process each, since what one variant leaves in the allocator would serve the next.

    Args:
        module: The benchmark's name.
        given: Its options, with a `mode`.
    """
    words = [sys.executable, "-m", module, *_words(changed(given, peak_of=variant))]
    # Blocks from 64 KB on go back to the system when freed; by default the allocator would keep some of
    # the freed ones, and the mark would tell of its habits.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    size = json.loads(child.stdout.splitlines()[-1])
    say(f"  {given.mode}, {given.batch} × {given.tokens} tokens, {variant}: {size / 1e9:.3f} GB")
    return size


def _words(given: Namespace) -> list[str]:
    """The options as they are typed."""
    words = []
    for name, value in vars(given).items():
        if value is not None and value is not False:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name}", *map(str, values)]
    return words


# --- the report


def paired_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median of the ratios within repetitions: a shared machine's speed differs more between them."""
    return median(a / b for a, b in zip(numerators, denominators, strict=True))


def ratio_with_spread(numerators: list[float], denominators: list[float]) -> str:
    """The paired ratio, and the range of the ratios within repetitions."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return f"{paired_ratio(numerators, denominators):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def table_beside_plain(
    seconds: dict[str, list[float]], memory: dict[str, int], unit: str = "s"
) -> str:
    """One row a variant, each beside the variant `plain`.

    Args:
        memory: Bytes above the loaded models.
        unit: Of the seconds.
    """
    lines = [
        f"| | median {unit} | / plain | GB above the models | / plain |",
        "|---|---|---|---|---|",
    ]
    for name, times in seconds.items():
        cells = [f"{median(times):.2f}", ratio_with_spread(times, seconds["plain"])]
        cells += [f"{memory[name] / 1e9:.3f}", f"{memory[name] / memory['plain']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def checks(found: dict[str, float], limits: dict[str, float]) -> str:
    """The required ratios and whether they hold."""
    return "\n".join(
        f"- {name} {found[name]:.3f}, required ≤ {limit}: "
        f"{'holds' if found[name] <= limit else 'does not hold'}"
        for name, limit in limits.items()
    )
