"""The quality along a setting that varies: one line a method, a band for its uncertainty."""

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from eval.plots.style import EDGE, as_percent, grid, looks

WIDE = 8  # a ratio of largest to smallest from which the axis is logarithmic


def ablation_plot(content: dict) -> Figure | None:
    """Means over seeds; the band is ± one standard deviation over seeds, with one seed the interval over items.

    None where no number varies.
    """
    ablation = content["ablation"]
    if ablation is None:
        return None
    measure = content["measures"][content["quality"]]
    figure, (axes,) = grid(1, 1, (7.4, 4.4))
    methods = {c["name"]: c["method"] for c in content["configurations"]}
    lines = [
        {"name": line, "method": methods[points[0]["configuration"]]}
        for line, points in ablation["series"].items()
    ]
    for line, look in looks(lines).items():
        points = ablation["series"][line]
        x = [point["x"] for point in points]
        values = [measure["values"][point["configuration"]] for point in points]
        axes.plot(
            x,
            [v["value"] for v in values],
            color=look.colour,
            marker=look.mark,
            linestyle=look.line,
            alpha=look.strength,
            label=line,
            **EDGE,
        )
        bands = [_band(value) for value in values]
        if None not in bands:
            low, high = zip(*bands, strict=True)
            axes.fill_between(x, low, high, color=look.colour, alpha=0.18, linewidth=0)
    every = sorted({point["x"] for points in ablation["series"].values() for point in points})
    if every[0] > 0 and every[-1] >= WIDE * every[0]:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xticks(every, [f"{x:g}" for x in every])
    axes.minorticks_off()
    if measure["share"]:
        as_percent(axes.yaxis)
    seeds = {value["seeds"] for value in measure["values"].values()}
    band = (
        "band: ± 1 standard deviation over seeds"
        if min(seeds) > 1
        else "band: 95 % interval over items"
    )
    if all(_band(value) is None for value in measure["values"].values()):
        band = "one seed: no band"
    direction = {"lower": "↓ better", "higher": "↑ better"}[measure["better"]]
    axes.set(xlabel=ablation["key"], ylabel=f"{measure['label']} ({direction})")
    axes.set_title(f"{measure['label']} along {ablation['key']}; {band}", fontsize=11)
    axes.legend(frameon=False)
    return figure


def _band(value: dict) -> tuple[float, float] | None:
    if "sd_over_seeds" in value:
        return value["value"] - value["sd_over_seeds"], value["value"] + value["sd_over_seeds"]
    return None if value["interval_95"] is None else tuple(value["interval_95"])
