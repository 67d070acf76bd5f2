"""Out of memory: smaller micro-batches, more of them, and the run goes on.

    per_device_train_batch_size m → m / p,  gradient_accumulation_steps a → a · p,   p the smallest prime of m

so an optimizer step is taken on the same rows, and runs stay comparable. If a model ran out of memory while it
wrote, fewer prompts are answered at a time instead.

The change is a file of the run directory, read before anything is built: it holds for this launch's successor and
for every later --resume, on all processes. The successor is the same process with a new image (`os.execv`), since
nothing else gives back all memory: an exception's frames, fragments and half-built state would stay. Several
processes cannot agree on anything once one of them has failed; torch's agent restarts them if it may
(`accelerate launch --max_restarts`), otherwise the next --resume takes the change up.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from medistill_trl.errors import RunFailed, StartAgain, first_line
from medistill_trl.run_directory import RunDirectory

if TYPE_CHECKING:
    from medistill_trl.setting import Arguments

FILE = "out_of_memory.json"
MICRO_BATCH, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
WRITING = "teacher_batch_size"


class OutOfMemoryWriting(torch.OutOfMemoryError):
    """A model ran out of memory while it answered prompts; `prompts` of them at a time."""

    def __init__(self, message: str, prompts: int):
        super().__init__(message)
        self.prompts = prompts


@dataclass(frozen=True)
class Changes:
    """What running out of memory has changed in a run so far.

    Args:
        values: Recipe key → the value it has now.
        history: Of each time {key: [from, to]}.
    """

    values: dict[str, int]
    history: list[dict]

    @classmethod
    def of(cls, directory: RunDirectory) -> "Changes":
        path = directory.path / FILE
        if not path.exists():
            return cls({}, [])
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def smaller(error: torch.OutOfMemoryError, values: dict[str, int | None]) -> dict[str, int]:
    """What to change so that it needs less memory; empty if nothing is left to.

    Args:
        values: Of `MICRO_BATCH`, `ACCUMULATION` and `WRITING`, now.
    """
    if isinstance(error, OutOfMemoryWriting):
        fewer = error.prompts // 2
        return {WRITING: fewer} if 0 < fewer < (values[WRITING] or error.prompts) else {}
    size = values[MICRO_BATCH]
    prime = next((p for p in range(2, size + 1) if size % p == 0), None)
    if prime is None:
        return {}
    return {MICRO_BATCH: size // prime, ACCUMULATION: values[ACCUMULATION] * prime}


@contextmanager
def recorded(directory: RunDirectory, arguments: "Arguments") -> Iterator[None]:
    """Save what an error within changes, for every later launch of the run.

    Raises:
        StartAgain: once that is saved.
        RunFailed: there is nothing that could be made smaller.
    """
    training, teacher = arguments.training, arguments.teacher
    now = {
        MICRO_BATCH: training.per_device_train_batch_size,
        ACCUMULATION: training.gradient_accumulation_steps,
        WRITING: teacher.teacher_batch_size,
    }
    try:
        yield
    except torch.OutOfMemoryError as error:
        changed = smaller(error, now) if directory.recipe.exists() else {}
        if not changed:
            raise RunFailed(
                f"out of memory, with nothing left that could be made smaller at the same results ({first_line(error)}). "
                "Load a model in 4 bits, set gradient_checkpointing: true, or lower max_length, "
                "teacher_max_new_tokens, loss_chunk_size or per_device_eval_batch_size: that is another run, under "
                "another --run_name. --dry_run shows what takes how much"
            ) from error
        before = Changes.of(directory)
        if not changed.items() <= before.values.items():  # else another process was first
            entry = {key: [now[key], value] for key, value in changed.items()}
            directory.write(
                FILE, {"values": before.values | changed, "history": [*before.history, entry]}
            )
        told = ", ".join(f"{key}: {now[key]} → {value}" for key, value in changed.items())
        raise StartAgain(
            f"out of memory ({first_line(error)}). From the last checkpoint on {told}; a step is taken on as many rows "
            "as before"
        ) from error
