"""results/comprehensive_evaluation.json as sections of a page. docs/evaluation.md says what each key means."""

from collections.abc import Callable

from eval.report.benchmark_sections import benchmarks, generative, retention
from eval.report.names import PARTS, TITLES
from eval.report.tables import (
    COUNT,
    HUNDREDTHS,
    PERCENT,
    PLAIN,
    POINTS,
    Form,
    Section,
    Table,
    estimated,
    number,
    p_value,
    words,
)
from eval.report.text_sections import PREFIXES, faithfulness, fidelity, perplexity


def sections(results: dict) -> list[Section]:
    """A section for each part that was measured."""
    return [BUILDERS[name](part) for name, part in results.items() if not is_skipped(part)]


def is_skipped(part: dict) -> bool:
    """A part's `skipped` is the reason why nothing was measured; in benchmarks it names those that are missing."""
    return isinstance(part.get("skipped"), str)


def left_out(results: dict) -> list[str]:
    """What was not measured, and why."""
    found = [
        f"{PARTS[name]}: {part['skipped']}" for name, part in results.items() if is_skipped(part)
    ]
    for name, part in results.items():
        if isinstance(part.get("skipped"), dict):
            found += [
                f"{PARTS[name]}, {TITLES[key]}: {why}" for key, why in part["skipped"].items()
            ]
    return found + [f"{title}: not run" for name, title in PARTS.items() if name not in results]


# --- cost ------------------------------------------------------------------------------------------


def speed(part: dict) -> Section:
    measures = {
        "parameters": ("parameters", COUNT),
        "weights_gb": ("weights, GB", PLAIN),
        "peak_memory_gb": ("peak memory, GB", PLAIN),
        "tokens_per_second": ("tokens per second", Form(1)),
        "batch_size": ("batch size", COUNT),
        "prompt_tokens": ("tokens of the longest prompt", COUNT),
    }
    subjects = [name for name in ("student", "teacher") if name in part]
    ratio = part.get("student_to_teacher")
    rows = []
    for key, (label, form) in measures.items():
        cells = [number(part[name][key], form) for name in subjects]
        if ratio is not None:
            cells.append(number(ratio.get(key), HUNDREDTHS))
        rows.append([words(label), *cells])
    columns = ["measure", *subjects, *(["student / teacher"] if ratio is not None else [])]
    return Section(
        "speed",
        PARTS["speed"],
        f"Greedy generation of exactly {part['new_tokens']} tokens. Times depend on what else the machine does.",
        [Table(columns, rows)],
    )


def quantisation(part: dict) -> Section:
    rows = []
    for benchmark, found in part.get("benchmarks", {}).items():
        rows.append(
            [
                words(TITLES[benchmark]),
                estimated(found["accuracy_full"], PERCENT),
                estimated(found["accuracy_quantised"], PERCENT),
                estimated(found["accuracy_quantised_minus_full"], POINTS),
                words(p_value(found["mcnemar_p"])),
                estimated(found["choices_changed"], PERCENT),
            ]
        )
    accuracy = Table(
        ["benchmark", "full", "quantised", "quantised − full", "McNemar", "choices changed"],
        rows,
        "Accuracy",
    )
    prefixes = part.get("prefixes", {})
    tokens = [
        [
            words(label),
            *(estimated(found.get(key), PLAIN) for found in prefixes.values()),
        ]
        for key, label in (
            ("kl_full_quantised_nats", "KL(full‖quantised), nats"),
            ("js_nats", "Jensen-Shannon divergence, nats"),
        )
    ]
    columns = ["measure", *(f"on {PREFIXES[name]}" for name in prefixes)]
    return Section(
        "quantisation",
        PARTS["quantisation"],
        "The teacher in full precision beside its quantised copy, on the same items.",
        [accuracy, Table(columns, tokens, "Token by token")],
    )


BUILDERS: dict[str, Callable[[dict], Section]] = {
    "benchmarks": benchmarks,
    "generative": generative,
    "retention": retention,
    "perplexity": perplexity,
    "fidelity": fidelity,
    "faithfulness": faithfulness,
    "speed": speed,
    "quantisation": quantisation,
}
