"""Time and memory of one Logit-KD training step, beside TRL's GKD and the plain formula:

python -m benchmarks.kd_step [--batch 4] [--tokens 256] [--repetitions 5] [--sizes 256 512 ...] [--tiny]

A step is forward and backward, without optimizer, on the embedded pair and a CPU, in float32; with all
weights training and with LoRA r=16. The variants:

    gkd     TRL's own `GKDTrainer.compute_loss`, forward KL (beta 0) on whole logits
    plain   (1−α) CE + α T² KL as one would write it, on whole logits of the completion
    ours    `LogitKDTrainer.compute_loss`
    floor   both trunks and the head products that no method can avoid, and nothing else
    trunks  both trunks, no head

Markdown on stdout, progress on stderr.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.kd_variants import VARIANTS, Bench, embedded_pair, prepare, tiny_pair
from medistill_trl import console, run_record

ROOT = Path(__file__).resolve().parent.parent  # recipes name their files from here
MODES = {"full": "all weights", "lora": "LoRA r=16"}
SIZES = [256, 512, 1024, 2048, 4096]
# Ratio → the most it may be.
LIMITS = {"step time ours/GKD": 0.6, "loss memory ours/GKD": 0.15, "step time ours/floor": 1.15}


# --- time


def timed(variant: Callable[[Bench], None], bench: Bench) -> float:
    """Seconds of one step."""
    bench.student.zero_grad(set_to_none=True)
    start = time.perf_counter()
    variant(bench)
    return time.perf_counter() - start


def step_times(bench: Bench, repetitions: int) -> dict[str, list[float]]:
    """Seconds of every repetition but the first, which warms up.

    All variants take turns within a repetition, each time in another order, so that a machine that gets
    slower or faster does so for all of them.
    """
    names = list(VARIANTS)
    seconds = {name: [] for name in names}
    for repetition in range(repetitions):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(timed(VARIANTS[name], bench))
            say(f"  repetition {repetition}: {name} {seconds[name][-1]:.2f} s")
    return {name: times[1:] for name, times in seconds.items()}


# --- memory


def own_peak(variant: str, mode: str, batch: int, tokens: int, tiny: bool) -> int:
    """Bytes: the largest resident size of this process during one step of the variant."""
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(mode, batch, tokens, tiny, folder)
    # Loading took more than a short step will: start the mark anew. The trainer has run both models whole
    # to check their heads, so no weights are read from disk for the first time within the step.
    Path("/proc/self/clear_refs").write_text("5")
    timed(VARIANTS[variant], bench)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))


def peak(variant: str, mode: str, batch: int, tokens: int, tiny: bool) -> int:
    """`own_peak` of a fresh process.

    A process each, since what one variant leaves in the allocator would serve the next. All of them load
    the same and make the same trainer, so what that takes cancels in the difference to `trunks`.
    `ru_maxrss` would not do: a child's starts at the size of the process that started it.
    """
    words = [sys.executable, "-m", "benchmarks.kd_step", "--peak_of", variant, "--mode", mode]
    words += ["--batch", str(batch), "--tokens", str(tokens), *(["--tiny"] if tiny else [])]
    # Blocks from 64 KB on go back to the system when freed; by default the allocator would keep some of
    # the freed ones, and the mark would tell of its habits.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    size = json.loads(child.stdout.splitlines()[-1])
    say(f"  {mode}, {batch} × {tokens} tokens, {variant}: peak {size / 1e9:.3f} GB")
    return size


def above_trunks(names: list[str], *setting) -> dict[str, int]:
    """Bytes that each variant's peak lies above that of the two trunks alone."""
    base = peak("trunks", *setting)
    return {name: peak(name, *setting) - base for name in names}


# --- the report


def ratio_with_spread(numerators: list[float], denominators: list[float]) -> str:
    """Ratio of medians, and the range of the ratios within repetitions."""
    pairs = [a / b for a, b in zip(numerators, denominators, strict=True)]
    ratio = median(numerators) / median(denominators)
    return f"{ratio:.2f} ({min(pairs):.2f}–{max(pairs):.2f})"


def step_table(seconds: dict[str, list[float]], memory: dict[str, int]) -> str:
    """One row a variant."""
    lines = [
        "| | median s | / GKD | / floor | GB above trunks | / GKD |",
        "|---|---|---|---|---|---|",
    ]
    for name, times in seconds.items():
        cells = [f"{median(times):.2f}"]
        cells += [ratio_with_spread(times, seconds[other]) for other in ("gkd", "floor")]
        if name in memory:
            cells += [f"{memory[name] / 1e9:.3f}", f"{memory[name] / memory['gkd']:.3f}"]
        else:
            cells += ["–", "–"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def checks(seconds: dict[str, list[float]], memory: dict[str, int]) -> str:
    """The required ratios and whether they hold."""
    middle = {name: median(times) for name, times in seconds.items()}
    found = {
        "step time ours/GKD": middle["ours"] / middle["gkd"],
        "loss memory ours/GKD": memory["ours"] / memory["gkd"],
        "step time ours/floor": middle["ours"] / middle["floor"],
    }
    return "\n".join(
        f"- {name} {found[name]:.3f}, required ≤ {limit}: "
        f"{'holds' if found[name] <= limit else 'does not hold'}"
        for name, limit in LIMITS.items()
    )


def size_table(rows: list[tuple[str, int, int, int]]) -> str:
    """Memory of ours at growing batch × time.

    Args:
        rows: Mode, tokens, bytes above the trunks, and bytes of both models' last hidden states.
    """
    lines = [
        "| | tokens | GB above trunks | both models' last hidden states, GB |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {MODES[mode]} | {tokens} | {above / 1e9:.3f} | {hidden / 1e9:.3f} |"
        for mode, tokens, above, hidden in rows
    ]
    return "\n".join(lines)


def machine() -> str:
    here = run_record.environment()
    names = ("torch", "transformers", "trl", "peft")
    versions = ", ".join(f"{name} {here['versions'][name]}" for name in names)
    return f"{len(os.sched_getaffinity(0))} cores; {here['device']}; {versions}; commit {here['git_commit']}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def compare(given: argparse.Namespace, mode: str) -> str:
    """One mode's section."""
    say(f"== {MODES[mode]}")
    setting = (mode, given.batch, given.tokens, given.tiny)
    memory = above_trunks(["gkd", "plain", "ours"], *setting)
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(*setting, folder)
        seconds = step_times(bench, given.repetitions)
    vocab_size = bench.teacher.config.vocab_size
    title = (
        f"## {MODES[mode]}: {given.batch} × {given.tokens} tokens, {int(bench.num_items)} of completions, "
        f"vocabulary {vocab_size:,}"
    )
    return "\n\n".join([title, step_table(seconds, memory), checks(seconds, memory)])


def sizes(given: argparse.Namespace) -> str:
    """The section on growing batches."""
    say("== memory over batch × time")
    pair = tiny_pair(lora=False) if given.tiny else embedded_pair(lora=False)
    width = sum(model.config.hidden_size for model in pair[:2])
    rows = []
    for mode in MODES:
        for total in given.sizes:
            setting = (mode, given.batch, total // given.batch, given.tiny)
            above = above_trunks(["ours"], *setting)["ours"]
            rows.append((mode, total, above, 4 * total * width))
    return f"## Memory of ours over batch × time\n\n{size_table(rows)}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--tokens", type=int, default=256, help="of a row, prompt included")
    parser.add_argument("--repetitions", type=int, default=5, help="the first is discarded")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="batch × time, a table")
    parser.add_argument("--tiny", action="store_true", help="random models, to try the script")
    parser.add_argument("--peak_of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.repetitions < 2:
        parser.error(
            f"--repetitions must be at least 2, the first is discarded; got {given.repetitions}"
        )
    return given


def main() -> None:
    given = parse()
    console.set_up(main_process=True)
    console.quiet_loading_bars()
    os.chdir(ROOT)
    if given.peak_of is not None:
        print(own_peak(given.peak_of, given.mode, given.batch, given.tokens, given.tiny))
        return
    sections = ["# One Logit-KD step", machine(), *(compare(given, mode) for mode in MODES)]
    if given.sizes:
        sections.append(sizes(given))
    print("\n\n".join(sections))


if __name__ == "__main__":
    main()
