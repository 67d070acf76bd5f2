"""Where a run's log goes besides its own folder: TensorBoard, trackio, Weights & Biases; nowhere by default.

Transformers' callbacks do the sending. Here stands what they leave open: which trackers there are, what a run
is called there, where files go, and a login that is missed before anything long begins.
"""

import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from medistill_trl.errors import UserError, first_line

TRACKERS = ("trackio", "tensorboard", "wandb")  # each in the package of its name
PROJECT = "medistill_trl"


def problems(report_to: Any) -> Iterator[str]:
    """What is wrong with a recipe's `report_to`: no tracker, or one that is not installed. Loads no torch."""
    chosen = report_to if isinstance(report_to, list) else [report_to]
    if chosen == ["none"]:
        return
    for tracker in chosen:
        if tracker not in TRACKERS:
            yield f"{tracker!r} is not a choice; none, or some of {', '.join(TRACKERS)}"
        elif not _installed(tracker):
            yield (
                f"{tracker} is not installed: `pip install -c constraints.txt {tracker}`, or use none"
            )


def _installed(package: str) -> bool:
    # Not find_spec: the folder `wandb` that offline runs leave behind would pass for the package.
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def start(report_to: list[str], project: str, folder: Path, main_process: bool) -> None:
    """Tell the trackers where to write, and begin what may have to ask for a login.

    Args:
        report_to: As transformers has it: a list, empty for none.
        project: Name of the project there.
        folder: The run directory; trackers that write files get a folder in it.
        main_process: Only that one reports.

    Raises:
        UserError: Weights & Biases does not let the run begin: no login, no connection.
    """
    # Read by transformers' callback, which otherwise makes a folder named by date and host.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    if "wandb" in report_to and main_process:
        _start_wandb(project, folder)


def _start_wandb(project: str, folder: Path) -> None:
    """Begin the run that transformers' callback then finds."""
    import wandb

    # No copy of the terminal, of code, or of git's remote, whose address may hold a password.
    settings = wandb.Settings(console="off", save_code=False, disable_git=True)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)  # elsewhere it falls back to another folder
    try:
        wandb.init(project=project, name=folder.name, dir=str(folder), settings=settings)
    except wandb.Error as error:
        if made:
            _take_back(folder)
        raise UserError(
            f"report_to: wandb refuses the run: {first_line(error)}\nLog in with `wandb login`, keep it on "
            "this machine with WANDB_MODE=offline, or use --report_to none"
        ) from error


def _take_back(folder: Path) -> None:
    """What was made for wandb alone. While it asked for a login, another launch may have begun the run here."""
    shutil.rmtree(folder / "wandb", ignore_errors=True)
    with suppress(OSError):  # it holds something else
        folder.rmdir()
