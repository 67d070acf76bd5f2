"""Quality against seconds of training and of the teacher's writing, with the front that no configuration beats."""

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from eval.plots.style import EDGE, as_percent, grid, handle, looks

WIDE = 8  # a ratio of largest to smallest from which the axis is logarithmic


def pareto(content: dict) -> Figure | None:
    """Means over seeds with their intervals; None with one configuration or seconds that do not compare."""
    front = content["pareto"]["front"]
    if front is None or len(content["configurations"]) < 2:
        return None
    measure = content["measures"][content["quality"]]
    seconds = {name: cost["total_seconds"] for name, cost in content["cost"].items()}
    figure, (axes,) = grid(1, 1, (8.2, 4.6))
    axes.grid(visible=True, alpha=0.3)
    known = looks(content["configurations"])
    for name, look in known.items():
        value = measure["values"][name]
        ends = value["interval_95"]
        if ends is not None:
            axes.vlines(seconds[name], *ends, color=look.colour, alpha=look.strength, linewidth=2)
        axes.plot(
            seconds[name],
            value["value"],
            look.mark,
            color=look.colour,
            alpha=look.strength,
            markersize=9,
            **EDGE,
        )
    points = [(seconds[name], measure["values"][name]["value"]) for name in front]
    axes.plot(*zip(*points, strict=True), color="#555555", linewidth=1, linestyle="--", zorder=1)
    if min(seconds.values()) > 0 and max(seconds.values()) > WIDE * min(seconds.values()):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
    if measure["share"]:
        as_percent(axes.yaxis)
    direction = {"lower": "↓ better", "higher": "↑ better"}[measure["better"]]
    axes.set(
        title="Quality against cost; dashed: the Pareto front",
        xlabel="seconds of training and of the teacher's writing (← better)",
        ylabel=f"{measure['label']} ({direction})",
    )
    handles = [handle(name + (" *" if name in front else ""), look) for name, look in known.items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, title="* on the front")
    return figure
