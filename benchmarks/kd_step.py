"""Time and memory of one Logit-KD training step, beside TRL's GKD and the plain formula:

python -m benchmarks.kd_step [--batch 4] [--tokens 256] [--repetitions 5] [--modes full lora] [--sizes 256 512 ...] [--tiny]

A step is forward and backward, without optimizer, on the embedded pair and a CPU, in float32; with all
weights training and with LoRA r=16. The variants:

    gkd     TRL's own `GKDTrainer.compute_loss`, forward KL (beta 0) on whole logits
    plain   (1−α) CE + α T² KL as one would write it, on whole logits of the completion
    ours    `LogitKDTrainer.compute_loss`
    floor   both trunks and the head products that no method can avoid, and nothing else
    trunks  both trunks, no head

Markdown on stdout, progress on stderr.
"""

import tempfile
from argparse import Namespace
from statistics import median

from benchmarks.kd_variants import VARIANTS, prepare
from benchmarks.step_pair import load_pair
from benchmarks.training_step import (
    MODES,
    changed,
    checks,
    each_mode,
    options,
    paired_ratio,
    peak,
    peak_during,
    ratio_with_spread,
    run,
    say,
    step_times,
    timed,
)

SIZES = [256, 512, 1024, 2048, 4096]
# Ratio → the most it may be.
LIMITS = {"step time ours/GKD": 0.6, "loss memory ours/GKD": 0.15, "step time ours/floor": 1.15}


def own_peak(given: Namespace) -> int:
    """Bytes: the largest resident size of this process during one step of the variant.

    All variants load the same and make the same trainer, so what that takes cancels in the difference to
    `trunks`. The trainer has run both models whole to check their heads, so no weights are read from disk for
    the first time within the step.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(given.mode, given.batch, given.tokens, given.tiny, folder)
    return peak_during(lambda: timed(VARIANTS[given.peak_of], bench))[1]


def above_trunks(names: list[str], given: Namespace) -> dict[str, int]:
    """Bytes that each variant's peak lies above that of the two trunks alone."""
    base = peak("benchmarks.kd_step", "trunks", given)
    return {name: peak("benchmarks.kd_step", name, given) - base for name in names}


# --- the report


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


def ratios(seconds: dict[str, list[float]], memory: dict[str, int]) -> dict[str, float]:
    """Those that `LIMITS` bounds."""
    return {
        "step time ours/GKD": paired_ratio(seconds["ours"], seconds["gkd"]),
        "loss memory ours/GKD": memory["ours"] / memory["gkd"],
        "step time ours/floor": paired_ratio(seconds["ours"], seconds["floor"]),
    }


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


def compare(given: Namespace) -> str:
    """One mode's section."""
    memory = above_trunks(["gkd", "plain", "ours"], given)
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(given.mode, given.batch, given.tokens, given.tiny, folder)
        seconds = step_times(VARIANTS, lambda name: timed(VARIANTS[name], bench), given.repetitions)
    vocab_size = bench.teacher.config.vocab_size
    title = (
        f"## {MODES[given.mode]}: {given.batch} × {given.tokens} tokens, {int(bench.num_items)} of completions, "
        f"vocabulary {vocab_size:,}"
    )
    table = step_table(seconds, memory)
    return "\n\n".join([title, table, checks(ratios(seconds, memory), LIMITS)])


def sizes(given: Namespace) -> str:
    """The section on growing batches."""
    say("== memory over batch × time")
    pair = load_pair("full", given.tiny)
    width = sum(model.config.hidden_size for model in pair[:2])
    rows = []
    for one in each_mode(given):
        for total in given.sizes:
            above = above_trunks(["ours"], changed(one, tokens=total // given.batch))["ours"]
            rows.append((one.mode, total, above, 4 * total * width))
    return f"## Memory of ours over batch × time\n\n{size_table(rows)}"


def sections(given: Namespace) -> list[str]:
    found = [compare(one) for one in each_mode(given)]
    return [*found, sizes(given)] if given.sizes else found


def main() -> None:
    parser = options(__doc__, VARIANTS, batch=4, tokens=256)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="batch × time, a table")
    run(parser, "One Logit-KD step", sections, own_peak)


if __name__ == "__main__":
    main()
