"""Pictures: of a run from its record, of a comparison from comparison.json alone. Nothing is measured here.

A method has one colour and one mark in every picture (style.py).
"""

from pathlib import Path

from eval.plots.ablation import ablation_plot
from eval.plots.dots import benchmark_comparison, fidelity_metrics
from eval.plots.pareto import pareto
from eval.plots.radar import fidelitybench_radar
from eval.plots.style import save
from eval.plots.training import compared_curves, training_curves

__all__ = ["draw", "training_curves"]

PICTURES = {
    "pareto": pareto,
    "ablation_plot": ablation_plot,
    "benchmark_comparison": benchmark_comparison,
    "fidelity_metrics": fidelity_metrics,
    "fidelitybench_radar": fidelitybench_radar,
    "training_curves": compared_curves,
}


def draw(content: dict, out: Path) -> list[Path]:
    """The pictures for which a comparison has numbers, as PNG files; those an earlier one has left are removed.

    Args:
        content: comparison.json.
    """
    paths = []
    single = len(content["configurations"]) == 1
    for name, picture in PICTURES.items():
        path, figure = out / f"{name}.png", picture(content)
        if figure is not None:
            paths.append(save(figure, path))
        elif not (
            single and picture is compared_curves
        ):  # a run has curves of its own by this name
            path.unlink(missing_ok=True)
    return paths
