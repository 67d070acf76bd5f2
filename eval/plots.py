"""Pictures of a run. The data is results/run.json; nothing is measured here."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, on machines without a screen
import matplotlib.pyplot as plt

from medistill_trl.run_directory import RunDirectory

# Okabe and Ito's palette: told apart by colour-blind readers.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


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
    """results/training_curves.png: loss or reward on the left, held-out fidelity on the right."""
    record = run.read_result("run.json")
    history, heldout = record["log_history"], record["heldout"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    _training(left, history)
    last_step = max(entry["step"] for entry in history)
    for key, color, label in (
        ("kl_nats", GREEN, "KL(teacher‖student)"),
        ("ce_nats", BLUE, "cross-entropy"),
    ):
        if heldout["after"][key] is None:
            continue
        steps, values = series(history, f"heldout_{key}")
        between = [(s, v) for s, v in zip(steps, values, strict=True) if s < last_step]
        points = [(0, heldout["before"][key]), *between, (last_step, heldout["after"][key])]
        right.plot(*zip(*points, strict=True), color=color, marker="o", label=label)
    right.set(
        title="Held-out teacher completions",
        xlabel="optimizer step",
        ylabel="nats per token",
        ylim=(0, None),
    )
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(run.path.name)
    path = run.results / "training_curves.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
