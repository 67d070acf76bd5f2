"""FidelityBench-Med as a radar for each configuration, its teacher behind it."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from eval.plots.style import TEACHER, looks

COLUMNS = 4
# Spoke → measure, and whether the spoke is what is left of it: on every spoke the rim is best.
SPOKES = {
    "supported": ("hallucination", True),
    "not con-\ntradicted": ("contradicted", True),
    "citation\nrecall": ("citation_recall", False),
    "citation\nprecision": ("citation_precision", False),
    "citations\nexist": ("citation_existence", False),
    "says\nsomething": ("without_claims", True),
}


def fidelitybench_radar(content: dict) -> Figure | None:
    """One panel a configuration; None where no answers were judged."""
    measures = content["measures"]
    if "faithfulness.hallucination" not in measures:
        return None
    names = [
        name
        for name in looks(content["configurations"])
        if name in measures["faithfulness.hallucination"]["values"]
    ]
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.3 * columns, 3.5 * rows + 0.6),
        layout="constrained",
        squeeze=False,
        subplot_kw={"projection": "polar"},
    )
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)  # room for the names of the spokes
    for empty in list(axes.flat)[len(names) :]:
        empty.set_visible(False)
    for panel, name in zip(axes.flat, names, strict=False):
        _panel(panel, content, name)
    figure.legend(
        handles=[Line2D([], [], color=TEACHER, linestyle="--", label="teacher")],
        loc="outside lower center",
        frameon=False,
    )
    figure.suptitle("FidelityBench-Med: the rim is best")
    return figure


def _panel(axes: plt.Axes, content: dict, name: str) -> None:
    look = looks(content["configurations"])[name]
    angles = [2 * math.pi * spoke / len(SPOKES) for spoke in range(len(SPOKES))]
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], [])
    axes.set_xticks(angles, list(SPOKES), fontsize=8)
    axes.tick_params(axis="x", pad=8)
    axes.grid(alpha=0.4)
    teacher = [_spoke(content, spoke, None) for spoke in SPOKES.values()]
    _outline(axes, angles, teacher, color=TEACHER, linestyle="--", linewidth=1.2)
    own = [_spoke(content, spoke, name) for spoke in SPOKES.values()]
    _outline(axes, angles, own, color=look.colour, marker=look.mark, markersize=4, linewidth=2)
    filled = [0.0 if math.isnan(value) else value for value in own]
    axes.fill(angles, filled, color=look.colour, alpha=0.2)
    axes.set_title(name, fontsize=11, fontweight="bold", color=look.colour, pad=10)


def _spoke(content: dict, spoke: tuple[str, bool], name: str | None) -> float:
    """Of a configuration, or of the teacher; not a number where it is not defined: no citations, no claims."""
    key, left_over = spoke
    measure = content["measures"].get(f"faithfulness.{key}")
    if measure is None:
        return math.nan
    estimate = measure["teacher"] if name is None else measure["values"].get(name)
    if estimate is None:
        return math.nan
    return 1 - estimate["value"] if left_over else estimate["value"]


def _outline(axes: plt.Axes, angles: Sequence[float], values: Sequence[float], **line) -> None:
    """A closed line with a gap where a value is not defined."""
    axes.plot([*angles, angles[0]], [*values, values[0]], **line)
