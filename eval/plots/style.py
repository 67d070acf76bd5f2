"""How pictures look: one colour and one mark for each method, told apart by colour-blind readers too."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, on machines without a screen
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

# Paul Tol's "muted" scheme with an amber for the tenth; the teacher is black. A test holds how far any two of
# them are apart with normal vision and with each of the three kinds of colour blindness.
COLOURS = {
    "sft": "#332288",
    "logit_kd": "#CC6677",
    "adakd": "#882255",
    "cot": "#117733",
    "fitnets": "#88CCEE",
    "attention": "#44AA99",
    "on_policy": "#DDCC77",
    "ppo": "#F2B701",
    "bond": "#999933",
    "spin": "#AA4499",
}
MARKS = dict(zip(COLOURS, "osDP^v<>X*", strict=True))
OTHER_COLOUR, OTHER_MARK = "#777777", "h"  # of a method that is not among them
TEACHER, FLOOR = "#000000", "#888888"
DPI = 120
EDGE = {"markeredgecolor": "#222222", "markeredgewidth": 0.6}
FAINTEST = 0.3  # of the configurations of one method, whose strengths go down evenly from 1
LINES = ("-", "--", "-.", ":")  # and in turn, so that neighbours differ in more than strength


@dataclass(frozen=True)
class Look:
    """Of a configuration: its method's colour and mark; how strong, and what line, tell it from others of the method."""

    colour: str
    mark: str
    strength: float
    line: str


def look_of(method: str, turn: int = 0, count: int = 1) -> Look:
    """The method's colour and mark; grey for methods of one's own.

    Args:
        turn: Place among the `count` configurations of the method, from 0.
    """
    colour, mark = COLOURS.get(method, OTHER_COLOUR), MARKS.get(method, OTHER_MARK)
    strength = 1.0 - (1.0 - FAINTEST) * turn / max(1, count - 1)
    return Look(colour, mark, strength, LINES[turn % len(LINES)])


def looks(configurations: Sequence[dict]) -> dict[str, Look]:
    """The look of each configuration, by its name."""
    methods = [c["method"] for c in configurations]
    return {
        c["name"]: look_of(
            c["method"], methods[:place].count(c["method"]), methods.count(c["method"])
        )
        for place, c in enumerate(configurations)
    }


def grid(count: int, columns: int, panel: tuple[float, float]) -> tuple[Figure, list[plt.Axes]]:
    """A figure with `count` panels, each of (width, height) inches."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(panel[0] * columns, panel[1] * rows),
        layout="constrained",
        squeeze=False,
    )
    panels = list(axes.flat)
    for empty in panels[count:]:
        empty.set_visible(False)
    for axis in panels[:count]:
        tidy(axis)
    return figure, panels[:count]


def tidy(axes: plt.Axes, lines: str = "y") -> None:
    """No box, and thin lines behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=False)
    axes.grid(axis=lines, alpha=0.3)
    axes.set_axisbelow(True)


def as_percent(axis) -> None:
    axis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def handle(label: str, look: Look) -> Line2D:
    """A configuration's entry in a legend."""
    return Line2D(
        [],
        [],
        color=look.colour,
        marker=look.mark,
        alpha=look.strength,
        linestyle=look.line,
        label=label,
        **EDGE,
    )


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path
