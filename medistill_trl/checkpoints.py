"""Checkpoints that can be trusted: a manifest is written last, and only a matching one is resumed.

transformers writes a checkpoint file by file, takes the highest number on resume without looking
inside, and silently continues on another path where optimizer or RNG state is missing.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import filter as matching
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from medistill_trl.files import write_text

MANIFEST = "manifest.json"
ASIDE = "invalid"  # folder of checkpoints that cannot be trusted
TOTALS = "totals.json"

Needed = Callable[[int], set[str]]  # patterns of the files that a checkpoint after a step must hold


@dataclass
class Totals:
    """What a run has used, over all its launches; saved with every checkpoint.

    Args:
        seconds: Wall time of training.
        seconds_drawing: Of these, spent on stored completions and teacher logits: making them, or waiting for
            another run that does.
        trained: Completion tokens the loss was taken on, over all processes.
        generated_teacher: Tokens the teacher wrote for training, over all processes.
        drawn_teacher: Of the teacher's, those that went into the completion store.
        generated_student: Tokens the student wrote for training, over all processes.
    """

    seconds: float = 0.0
    seconds_drawing: float = 0.0
    trained: int = 0
    generated_teacher: int = 0
    drawn_teacher: int = 0
    generated_student: int = 0

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Count time from now on."""
        self._last_lap = time.monotonic()

    def lap(self) -> None:
        """Add the time since the last lap."""
        now = time.monotonic()
        self.seconds += now - self._last_lap
        self._last_lap = now

    def add(self, earlier: "Totals") -> None:
        """Continue from what earlier launches of the run have used."""
        for name, value in asdict(earlier).items():
            setattr(self, name, getattr(self, name) + value)

    def summed(self) -> "Totals":
        """Totals over processes: generation is counted where it happens, the rest is global already."""
        parts = gather_object([self])
        return Totals(
            seconds=self.seconds,
            seconds_drawing=self.seconds_drawing,
            trained=self.trained,
            generated_teacher=sum(part.generated_teacher for part in parts),
            drawn_teacher=sum(part.drawn_teacher for part in parts),
            generated_student=sum(part.generated_student for part in parts),
        )


class CheckpointCallback(TrainerCallback):
    """Completes each checkpoint: the totals, then the manifest, after every process has saved.

    Args:
        totals: Of this process.
    """

    def __init__(self, totals: Totals):
        self.totals = totals

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.totals.lap()
        totals = self.totals.summed()
        if PartialState().is_main_process:
            (folder / TOTALS).write_text(json.dumps(asdict(totals)))
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            write_manifest(folder)


@contextmanager
def kept_dtypes(model: nn.Module) -> Iterator[None]:
    """What is loaded within goes on in the dtype it had.

    PEFT loads every adapter as float32, while that of a quantised student is trained in bfloat16: the resumed
    run would be another one.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes[name]:
            parameter.data = parameter.data.to(dtypes[name])


def resume_in_same_dtypes(trainer: Trainer) -> None:
    """Make a trainer, whatever its method, load its checkpoints within `kept_dtypes`."""
    load = trainer._load_from_checkpoint

    def load_and_keep(*args, **kwargs):
        with kept_dtypes(trainer.model):
            load(*args, **kwargs)

    trainer._load_from_checkpoint = load_and_keep


def write_manifest(folder: Path) -> None:
    """Record size and sha256 of every file of a finished checkpoint, atomically."""
    (folder / MANIFEST).unlink(missing_ok=True)  # of an earlier attempt at the same step
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }
    write_text(folder / MANIFEST, json.dumps(content, indent=1))


def files_of(trainer: Trainer, step: int) -> set[str]:
    """What every run goes on from after a step, as patterns of names: transformers does not miss all of it."""
    processes = range(trainer.args.world_size)
    files = {TRAINER_STATE_NAME, TOTALS}
    if not _deepspeed_schedules(trainer):
        files.add(SCHEDULER_NAME)
    files |= {f"rng_state_{n}.pth" for n in processes} if len(processes) > 1 else {"rng_state.pth"}
    if trainer.is_fsdp_enabled:
        return files
    adapter = isinstance(trainer.model, PeftModel)
    files |= adapter_files() if adapter else {"model*.safetensors"}  # large ones are split
    if trainer.is_deepspeed_enabled:
        share = f"global_step{step}/*zero_pp_rank_%d_mp_rank_00_optim_states.pt"
        return files | {share % n for n in processes}
    if trainer.accelerator.scaler is not None:
        files.add(SCALER_NAME)
    return files | {OPTIMIZER_NAME}


def _deepspeed_schedules(trainer: Trainer) -> bool:
    """Whether a DeepSpeed config of the user's own names optimizer or scheduler: then its checkpoint holds both."""
    if not trainer.is_deepspeed_enabled:
        return False
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    return "optimizer" in config or "scheduler" in config


def adapter_files(name: str = "") -> set[str]:
    """Those of an adapter in a checkpoint; PEFT puts all but the default one into a folder of its name."""
    return {str(Path(name) / file) for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)}


def problem(folder: Path, needed: Needed | None = None) -> str | None:
    """Why a checkpoint cannot be trusted, or None if it can.

    Args:
        needed: What its manifest must name; None to take it for complete.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in content.items()}
    except FileNotFoundError:
        return "it was never finished (no manifest)"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "its manifest cannot be read"
    held = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    if added := sorted(held - expected.keys() - {MANIFEST}):
        return f"{added[0]} was put there after it was saved"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or _sha256(path) != digest:
            return f"{name} has changed since it was saved"
    try:
        patterns = sorted(needed(_number(folder)) | _shards(folder, expected)) if needed else []
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"its {SAFE_WEIGHTS_INDEX_NAME} cannot be read"
    lacking = (pattern for pattern in patterns if not matching(expected, pattern))
    return next(
        (f"its manifest lacks {name}, which the run goes on from" for name in lacking), None
    )


def _shards(folder: Path, names: Iterable[str]) -> set[str]:
    """The files of weights that are split, by their index; the index, if it is not among the names but a shard is."""
    if SAFE_WEIGHTS_INDEX_NAME not in names:
        return {SAFE_WEIGHTS_INDEX_NAME} if matching(names, "model-*-of-*.safetensors") else set()
    index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())
    return {str(name) for name in index["weight_map"].values()}


def newest_valid(folder: Path, needed: Needed | None = None) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose manifest holds (see `problem`), and why each newer one is passed over."""
    passed_over = {}
    for checkpoint in sorted(_numbered(folder), key=lambda path: -_number(path)):
        reason = problem(checkpoint, needed)
        if reason is None:
            return checkpoint, passed_over
        passed_over[checkpoint] = reason
    return None, passed_over


def choose(folder: Path, needed: Needed | None = None) -> tuple[Path | None, list[str]]:
    """`newest_valid`, with those passed over moved to `folder/invalid`: left in place they would count as the newest
    when older checkpoints are removed. Every process gets the main one's choice.

    Returns:
        The checkpoint, and one line for each that was moved.
    """
    found = None
    if PartialState().is_main_process:
        checkpoint, passed_over = newest_valid(folder, needed)
        lines = [
            f"{path}: not used: {reason}; kept as {_set_aside(path)}"
            for path, reason in passed_over.items()
        ]
        found = checkpoint, lines
    return broadcast_object_list([found])[0]


def _set_aside(checkpoint: Path) -> Path:
    folder = checkpoint.parent / ASIDE
    folder.mkdir(exist_ok=True)
    names = (f"{checkpoint.name}{f'.{n}' if n else ''}" for n in itertools.count())
    target = next(folder / name for name in names if not (folder / name).exists())
    return checkpoint.rename(target)


def load_totals(checkpoint: Path) -> Totals:
    """This process's part of a checkpoint's totals: what is summed over processes goes to the main one."""
    totals = Totals(**json.loads((checkpoint / TOTALS).read_text()))
    if not PartialState().is_main_process:
        totals.generated_teacher = totals.drawn_teacher = totals.generated_student = 0
    return totals


def _numbered(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
