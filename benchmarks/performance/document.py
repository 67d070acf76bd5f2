"""docs/performance.md from what was measured: the tables between its markers, and nothing of the prose around them."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

from benchmarks.performance.bare_steps import BARE
from benchmarks.performance.trl_losses import NAMES, TRL, WHY_NOT
from benchmarks.training_step import paired_ratio, ratio_with_spread
from medistill_trl.recipe import methods

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
MOST_OVERHEAD = 0.10  # of a step
MOST_SECONDS = {"import": 0.3, "--help": 0.5, "first optimizer step": 20}
ONCE = ("data", "evaluation", "first_step")  # measured in one pass
MISSING = "Not measured yet."
STORED = "store, second time"  # nothing is written
LIMITED = ("s", "processor s", "at most", "")  # columns of what may take so long


def page(folder: Path, document: str) -> str:
    """The document with tables of all that is in the folder.

    Raises:
        ValueError: the document lacks a marker.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document needs the lines {BEGIN} and {END}")
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }
    return f"{before}{BEGIN}\n\n{tables(found)}\n\n{END}{after}"


def tables(found: dict[str, dict]) -> str:
    """All sections.

    Args:
        found: Name of a JSON file → its content.
    """
    measured = {m: found[f"steps_{m}"] for m in methods() if f"steps_{m}" in found}
    sections = [
        ("A training step of each method", steps(measured) if measured else MISSING),
        ("Teacher generation", _section(found, "generation", generation)),
        ("Growth", _section(found, "growth", growth)),
        ("Data build", _section(found, "data", data)),
        ("Evaluation", _section(found, "evaluation", evaluation)),
        ("Startup", _section(found, "startup", startup)),
        ("The way to the first step", _section(found, "first_step", first_step)),
    ]
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in sections)


def _section(found: dict, name: str, table: Callable[[dict], str]) -> str:
    if name not in found:
        return MISSING
    return f"{_where(name, found[name])}\n\n{table(found[name]['found'])}"


def _where(part: str, content: dict) -> str:
    """The command and the machine."""
    words = f"python -m benchmarks.performance {part}"
    if part not in ONCE:
        words += f" --repetitions {content['repetitions']}"
    return f"`{words}`: {content['machine']}."


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; the first column is text."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(list(head)) - 1)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


# --- a step


def overhead(seconds: dict[str, list[float]]) -> float:
    """The share of a step that is not the bare models, by the median of the paired ratios."""
    return 1 - 1 / paired_ratio(seconds["step"], seconds["bare"])


def steps(measured: dict[str, dict]) -> str:
    """A table of all methods, and below it what the bare step of each consists of."""
    head = ["method", "tokens", "learnt", "step, s", "bare, s", "step / bare", "overhead", "≤ 10 %"]
    head += ["peak, GB", "bare peak, GB", "TRL's loss", "ours / TRL's", "peak, ours / TRL's"]
    rows = [_step(content["found"]) for content in measured.values()]
    wheres = {}
    for method, content in measured.items():
        wheres.setdefault(_where("steps", content), []).append(method)
    said = "\n\n".join(f"{where} {', '.join(names)}." for where, names in wheres.items())
    counted = [f"- {method}: {BARE[method].counted}" for method in measured]
    without = [f"- {m}: {WHY_NOT[m]}" for m in measured if m in WHY_NOT]
    return "\n\n".join(
        [
            said,
            markdown(head, rows),
            "What the bare step is:",
            "\n".join(counted),
            *(["Not beside TRL's loss:", "\n".join(without)] if without else []),
        ]
    )


def _step(found: dict) -> list[str]:
    method, seconds, peak = found["method"], found["seconds"], found["peak_bytes"]
    share = overhead(seconds)
    row = [method, f"{found['tokens']:,}", f"{found['completion_tokens']:,}"]
    row += [f"{median(seconds[name]):.2f}" for name in ("step", "bare")]
    row += [ratio_with_spread(seconds["step"], seconds["bare"]), f"{share:.1%}"]
    row += ["holds" if share <= MOST_OVERHEAD else "**does not hold**"]
    row += [f"{peak[name] / 1e9:.2f}" for name in ("step", "bare")]
    if method not in TRL:
        return [*row, "–", "–", "–"]
    ratio = ratio_with_spread(seconds["loss"], seconds["trl"])
    return [*row, NAMES[TRL[method]], ratio, f"{peak['loss'] / peak['trl']:.2f}"]


# --- the other parts


def generation(found: dict) -> str:
    """Beside plain `generate` in the same batch."""
    plain = found["seconds"]["generate, same batch"]
    rows = [
        [
            name,
            f"{median(values):.2f}",
            f"{found['tokens'] / median(values):,.0f}" if name != STORED else "",
            ratio_with_spread(values, plain),
        ]
        for name, values in found["seconds"].items()
    ]
    said = f"{found['prompts']} prompts, {found['tokens']:,} tokens, greedy."
    head = ["", "processor s", "tokens / processor s", "/ generate, same batch"]
    return f"{said}\n\n{markdown(head, rows)}"


def growth(found: dict) -> str:
    """Three tables."""
    shapes = [
        [
            f"{one['batch']} × {one['tokens']}",
            f"{median(one['seconds']['step']):.2f}",
            f"{1000 * median(one['seconds']['step']) / (one['batch'] * one['tokens']):.1f}",
            f"{overhead(one['seconds']):.1%}",
            f"{one['peak_bytes'] / 1000000000.0:.2f}",
        ]
        for one in found["shapes"]
    ]
    examples = [
        [f"{one['examples']:,}"]
        + [
            f"{value:.2f} ({1000 * value / one['examples']:.2f})"
            for value in one["seconds"].values()
        ]
        for one in found["examples"]
    ]
    samples = [
        [str(one["samples"])]
        + [f"{median(one['seconds'][name]):.2f}" for name in ("step", "bare")]
        + [f"{overhead(one['seconds']):.1%}", f"{one['peak_bytes']['step'] / 1e9:.2f}"]
        for one in found["samples"]
    ]
    columns = ["processor s", "ms / token", "overhead", "peak, GB"]
    return "\n\n".join(
        [
            "A Logit-KD step, LoRA r=16, with rows × tokens:",
            markdown(["", *columns], shapes),
            "Preparing a run on stored completions, processor seconds (milliseconds an example):",
            markdown(["examples", "stored", "looked up", "encoded"], examples),
            "A BOND step of one prompt with N samples of at most 16 tokens:",
            markdown(["N", "step, s", "bare, s", "overhead", "peak, GB"], samples),
        ]
    )


def data(found: list[dict]) -> str:
    rows = [
        [
            f"{one['rows']:,}",
            f"{one['read']:,}",
            f"{one['seconds']:.0f}",
            f"{one['read'] / one['seconds']:,.0f}",
            f"{one['gib']:.2f}",
        ]
        for one in found
    ]
    table = markdown(["rows of the pool", "rows read", "s", "rows / s", "GiB"], rows)
    return f"In one process, by the clock.\n\n{table}"


def evaluation(found: dict) -> str:
    rows = [
        [
            name,
            f"{cost['seconds']:.1f}",
            str(cost["items_computed"]),
            f"{cost['peak_host_memory_gb']:.2f}",
            f"{found['again'][name]['seconds']:.1f}",
        ]
        for name, cost in found["first"].items()
    ]
    totals = found["seconds"]
    rows.append(
        ["the whole command", f"{totals['first'][0]:.1f}", "", "", f"{totals['again'][0]:.1f}"]
    )
    said = (
        f"Both models, {found['limit']} items of each file, by the clock. Of the processor the command took "
        f"{totals['first'][1]:.0f} s, and {totals['again'][1]:.0f} s with every item in the store."
    )
    head = ["part", "s", "items", "peak, GB", "s again"]
    return f"{said}\n\n{markdown(head, rows)}"


def startup(found: list[dict]) -> str:
    rows = []
    for one in found:
        kind = "--help" if one["command"].endswith("--help") else "import"
        rows.append([f"`{one['command']}`", *_within(one, MOST_SECONDS[kind])])
    return markdown(["command", *LIMITED], rows)


def first_step(found: list[dict]) -> str:
    """The way to it, in stages."""
    rows = [[one["stage"], *_within(one, MOST_SECONDS.get(one["stage"]))] for one in found]
    said = "`recipes/sft.yaml` on the embedded pair, with models and completions cached, since the command was given:"
    return f"{said}\n\n{markdown(['stage', *LIMITED], rows)}"


def _within(one: dict, limit: float | None) -> list[str]:
    cells = [f"{one['seconds']:.2f}", f"{one['processor_seconds']:.2f}"]
    if limit is None:
        return [*cells, "", ""]
    return [*cells, f"{limit:g}", "holds" if one["seconds"] <= limit else "**does not hold**"]
