"""Estimates with their intervals, one line a configuration: benchmarks and fidelity."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from eval.plots.style import EDGE, FLOOR, TEACHER, Look, as_percent, grid, looks, tidy

COLUMNS = 3
BENCHMARKS = ("medqa", "medmcqa", "pubmedqa", "pubhealth", "pubhealth_2class")
SETS = {
    "teacher": ("teacher's answers", "o"),
    "gold": ("gold answers", "D"),
    "student": ("its own answers", "s"),
}
TOKENS = ("kl_teacher_student_nats", "js_nats", "overlap_at_1")
TEXTS = ("text.rouge_l", "text.semantic_similarity", "text.exact_match")
ARROWS = {"higher": "→ better", "lower": "← better"}


def benchmark_comparison(content: dict) -> Figure | None:
    """Accuracy on each benchmark beside the teacher's and the floor, and retention over all; None without any."""
    measures = content["measures"]
    keys = [f"benchmarks.{name}.accuracy" for name in BENCHMARKS] + ["retention.all"]
    keys = [key for key in keys if key in measures]
    if not keys:
        return None
    figure, panels = _panels(content, len(keys))
    for axes, key in zip(panels, keys, strict=True):
        measure = measures[key]
        title = (
            measure["label"] if key != "retention.all" else "Retention: right where the teacher is"
        )
        _dots(axes, content, measure)
        axes.set_title(title, fontsize=11)
        if measure["teacher"] is not None:
            axes.axvline(measure["teacher"]["value"], color=TEACHER, linestyle="--", linewidth=1.3)
        floor = content["floors"].get(key.split(".")[1])
        if floor is not None:
            axes.axvline(floor["majority_accuracy"], color=FLOOR, linestyle=":", linewidth=1.6)
    handles = [
        Line2D([], [], color=TEACHER, linestyle="--", label="teacher"),
        Line2D(
            [], [], color=FLOOR, linestyle=":", linewidth=1.6, label="always the commonest answer"
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Benchmarks by log-likelihood: accuracy, 95 % intervals")
    return figure


def fidelity_metrics(content: dict) -> Figure | None:
    """How close each student is to its teacher, by token on three sets of answers and by text; None without any."""
    measures = content["measures"]
    tokens = [t for t in TOKENS if any(f"fidelity.{name}.{t}" in measures for name in SETS)]
    texts = [key for key in TEXTS if key in measures]
    if not tokens and not texts:
        return None
    figure, panels = _panels(content, len(tokens) + len(texts))
    for axes, term in zip(panels, tokens, strict=False):
        for place, (name, (_, mark)) in enumerate(SETS.items()):
            measure = measures.get(f"fidelity.{name}.{term}")
            if measure is not None:
                _dots(axes, content, measure, mark, 0.25 * (place - 1))
                axes.set_title(f"{measure['label']} ({ARROWS[measure['better']]})", fontsize=11)
    for axes, key in zip(panels[len(tokens) :], texts, strict=True):
        _dots(axes, content, measures[key])
        arrow = ARROWS[measures[key]["better"]]
        axes.set_title(f"greedy answers: {measures[key]['label']} ({arrow})", fontsize=11)
    if tokens:
        handles = [
            Line2D([], [], linestyle="", marker=mark, color="#BBBBBB", label=label, **EDGE)
            for label, mark in SETS.values()
        ]
        figure.legend(
            handles=handles,
            title="both models read",
            loc="outside lower center",
            ncols=3,
            frameon=False,
        )
    figure.suptitle("Fidelity to the teacher, 95 % intervals")
    return figure


def _panels(content: dict, count: int) -> tuple[Figure, list[plt.Axes]]:
    """Panels whose lines are the configurations, named at the left of each row."""
    names = [c["name"] for c in content["configurations"]]
    height = max(2.4, 1.1 + 0.34 * len(names))
    figure, panels = grid(count, COLUMNS, (4.1, height))
    for place, axes in enumerate(panels):
        tidy(axes, lines="x")
        axes.set_ylim(len(names) - 0.4, -0.6)  # the first at the top
        axes.set_yticks(range(len(names)), names if place % COLUMNS == 0 else [""] * len(names))
        axes.tick_params(axis="y", length=0)
    return figure, panels


def _dots(
    axes: plt.Axes, content: dict, measure: dict, mark: str | None = None, shift: float = 0.0
) -> None:
    """One measure of all configurations.

    Args:
        mark: By default each method's own.
        shift: Down from the middle of the line, in lines.
    """
    known = looks(content["configurations"])
    for line, name in enumerate(known):
        value = measure["values"].get(name)
        if value is not None:
            _dot(axes, value, line + shift, known[name], mark)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    if measure["share"]:
        as_percent(axes.xaxis)


def _dot(axes: plt.Axes, value: dict, line: float, look: Look, mark: str | None) -> None:
    ends: Sequence[float] | None = value["interval_95"]
    if ends is not None:
        axes.hlines(line, *ends, color=look.colour, alpha=look.strength, linewidth=2.2)
    size = 7 if mark is None else 5.5  # of several on a line smaller ones
    shape = {"marker": mark or look.mark, "markersize": size, "alpha": max(look.strength, 0.5)}
    axes.plot(value["value"], line, color=look.colour, **shape, **EDGE)
