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
    """The pictures for which a comparison has numbers, as PNG files.

    Args:
        content: comparison.json.
    """
    paths = []
    for name, picture in PICTURES.items():
        figure = picture(content)
        if figure is not None:
            paths.append(save(figure, out / f"{name}.png"))
    return paths
