"""Curves over the optimizer steps: of one run, and of several side by side."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.comparison.curves import heldout_curve
from eval.plots.style import EDGE, Look, as_percent, grid, handle, looks, save, tidy
from medistill_trl.run_directory import RunDirectory

# Of quantities within one run; methods have colours of their own in style.py.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
PANELS = {
    "kl_nats": "KL(teacher‖student), nats per token (↓ better)",
    "ce_nats": "cross-entropy, nats per token (↓ better)",
    "top1": "top-1 agreement (↑ better)",
}


def series(log_history: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged quantity."""
    points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
    return [step for step, _ in points], [value for _, value in points]


def _training(axes: plt.Axes, history: list[dict]) -> None:
    """The loss; for methods that learn from rewards the reward, since a policy gradient's loss says nothing."""
    rewards = series(history, "reward_mean")
    if rewards[0]:
        axes.plot(*rewards, color=BLUE, label="training prompts")
        axes.plot(*series(history, "eval_reward_mean"), color=ORANGE, marker="o", label="held out")
        axes.set(title="Mean reward of the student's samples", xlabel="optimizer step")
    else:
        axes.plot(*series(history, "loss"), color=BLUE, label="training loss")
        if any("eval_loss" in entry for entry in history):  # SPIN has none
            axes.plot(
                *series(history, "eval_loss"), color=ORANGE, marker="o", label="held-out loss"
            )
        axes.set(title="Loss", xlabel="optimizer step", ylabel="nats", ylim=(0, None))
    axes.legend(frameon=False)


def training_curves(run: RunDirectory) -> Path:
    """results/training_curves.png of one run: loss or reward on the left, held-out fidelity on the right."""
    record = run.read_result("run.json")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    _training(left, record["log_history"])
    for key, color, label in (
        ("kl_nats", GREEN, "KL(teacher‖student)"),
        ("ce_nats", BLUE, "cross-entropy"),
    ):
        steps, values = heldout_curve(record, key)
        if steps:
            right.plot(steps, values, color=color, marker="o", label=label)
    right.set(
        title="Held-out teacher completions",
        xlabel="optimizer step",
        ylabel="nats per token",
        ylim=(0, None),
    )
    right.legend(frameon=False)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
    figure.suptitle(run.path.name)
    return save(figure, run.results / "training_curves.png")


def compared_curves(content: dict) -> Figure | None:
    """The held-out check of several configurations over their steps; None for a single one.

    Losses are not drawn: each method has its own, and they are different things. The line is the mean over seeds,
    the band from the lowest to the highest.
    """
    if len(content["configurations"]) < 2:
        return None
    curves = content["curves"]
    keys = [key for key in PANELS if any(key in curve for own in curves.values() for curve in own)]
    figure, panels = grid(len(keys), 3, (4.3, 3.9))
    known = looks(content["configurations"])
    for axes, key in zip(panels, keys, strict=True):
        for name, own in curves.items():
            _curve(axes, [curve for curve in own if key in curve], key, known[name])
        axes.set_title(PANELS[key], fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, None)
        if key == "top1":
            as_percent(axes.yaxis)
    handles = [handle(name, look) for name, look in known.items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    figure.suptitle("Held-out teacher completions")
    return figure


def _curve(axes: plt.Axes, own: Sequence[dict], key: str, look: Look) -> None:
    line = {"color": look.colour, "alpha": look.strength, "linestyle": look.line, "linewidth": 1.8}
    if len({tuple(curve["steps"]) for curve in own}) > 1:  # seeds that ended at different steps
        for curve in own:
            axes.plot(curve["steps"], curve[key], **line)
        return
    values = np.array([curve[key] for curve in own])
    for steps in [curve["steps"] for curve in own[:1]]:
        axes.plot(steps, values.mean(axis=0), marker=look.mark, markersize=5, **EDGE, **line)
        axes.fill_between(
            steps,
            values.min(axis=0),
            values.max(axis=0),
            color=look.colour,
            alpha=0.15,
            linewidth=0,
        )
