"""What of a run goes to the hub: the model, its tokenizer, its card. And what does not, or forbids it.

Only files that a model consists of are taken, by a list of what is allowed; everything is read before anything
is sent, and one file with a secret in it stops the whole upload.
"""

import json
import mmap
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from medistill_trl.errors import UserError, first_line
from medistill_trl.hub import card, licences
from medistill_trl.recipe_rules import SECRET_VALUE
from medistill_trl.run_directory import RunDirectory

WEIGHTS = ".safetensors"
ALLOWED = {WEIGHTS, ".json", ".jinja", ".md", ".model", ".txt"}
# Formats that may run code when they are opened, or that nobody can look into.
UNSAFE = {
    ".bin",
    ".ckpt",
    ".h5",
    ".joblib",
    ".msgpack",
    ".npy",
    ".npz",
    ".pickle",
    ".pkl",
    ".pt",
    ".pth",
}
# Pickles that come with training and are no part of a model.
TRAINING_STATE = {
    "training_args.bin",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
}
MODEL_FILES = ("adapter_config.json", "config.json")


@dataclass(frozen=True)
class File:
    """A file as it will stand on the hub; `content` is where it lies, or what is in it."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class LeftOut:
    name: str
    size: int
    why: str


@dataclass
class Selection:
    """What a push would do.

    Args:
        files: To be uploaded.
        left_out: What lies in the run and is not.
        notes: What a user should know before it happens.
    """

    files: list[File]
    left_out: list[LeftOut]
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def select(run: RunDirectory, allow_partial: bool, own_token: str | None) -> Selection:
    """Choose and read the files of a run.

    Args:
        allow_partial: Take a run that never finished.
        own_token: Of the user's login; must not stand in any file.

    Raises:
        UserError: there is no run, it is not finished, a weight is no safetensors file, or a file holds a secret.
    """
    _check_run(run, allow_partial)
    selection = Selection([], _beside_the_model(run))
    for path in sorted(run.final_model.iterdir()):
        why = _why_not(path)
        if why is None:
            selection.files.append(File(path.name, path))
        else:
            selection.left_out.append(LeftOut(f"final_model/{path.name}", _size(path), why))
    if not any(file.name.endswith(WEIGHTS) for file in selection.files):
        raise UserError(f"{run.final_model}: there is no {WEIGHTS} file, so no model to push")
    _put_card(run, selection)
    for file in selection.files:
        _refuse_secrets(file, own_token)
    _note_local_base(run, selection)
    return selection


def _check_run(run: RunDirectory, allow_partial: bool) -> None:
    if not run.recipe.is_file():
        raise UserError(
            f"{run.path}: no run is here (no recipe.yaml, looked below {Path.cwd()}); name a run directory, such "
            "as outputs/sft_demo"
        )
    if not run.is_complete and not allow_partial:
        raise UserError(
            f"{run.path}: this run is not finished (no COMPLETE); continue it with --resume, or push what is there "
            "with --allow_partial"
        )
    if not any((run.final_model / name).is_file() for name in MODEL_FILES):
        raise UserError(f"{run.final_model}: no model is here; continue the run with --resume")


def _beside_the_model(run: RunDirectory) -> list[LeftOut]:
    others = [path for path in sorted(run.path.iterdir()) if path != run.final_model]
    return [
        LeftOut(
            path.name + ("/" if path.is_dir() else ""), _size(path), "only final_model is pushed"
        )
        for path in others
    ]


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.lstat().st_size


def _why_not(path: Path) -> str | None:
    """Why a file of final_model is left out; None if it belongs to the model.

    Raises:
        UserError: it is a weight of an unsafe format.
    """
    if path.is_symlink() or not path.is_file():
        return "a link or a folder; a model's files are plain files"
    if path.name in TRAINING_STATE:
        return "a pickle of training, no part of the model"
    if path.suffix in UNSAFE:
        raise UserError(
            f"{path}: not pushed, since opening such a file can run code; save the weights as {WEIGHTS} "
            "(save_pretrained does) and remove this file"
        )
    return None if path.suffix in ALLOWED else "not known as a model's file"


# --- the card ----------------------------------------------------------------------------------------


def _put_card(run: RunDirectory, selection: Selection) -> None:
    """The card as it is written now, with the evaluation; one that was edited by hand is kept."""
    record = card.read_record(run)
    clause = licences.restriction(
        record["recipe"]["student_model"], record["recipe"]["teacher_model"]
    )
    if clause is not None:
        selection.notes.append(f"the teacher's licence bears on this student: {clause}")
    evaluation = card.read_evaluation(run, record)
    path = run.final_model / card.CARD_NAME
    written = str(card.model_card(record))
    if path.is_file() and _text(path) != written:
        selection.notes.append(
            f"{path} is not as training wrote it and is pushed as it is; remove it to have it written anew"
        )
        return
    if evaluation is None:
        selection.notes.append(
            f"the card has no scores: there is no evaluation of this run; medistill evaluate {run.path} makes one"
        )
    content = str(card.model_card(record, evaluation)).encode()
    others = [file for file in selection.files if file.name != card.CARD_NAME]
    selection.files = sorted([*others, File(card.CARD_NAME, content)], key=lambda file: file.name)


def _text(card: Path) -> str:
    try:
        return card.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{card}: not UTF-8 text (byte {error.start}), so nothing is pushed; remove it to have it written anew"
        ) from error


def _note_local_base(run: RunDirectory, selection: Selection) -> None:
    path = run.final_model / "adapter_config.json"
    if not path.is_file():
        return
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
        is_local = Path(base).is_absolute()
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: damaged ({first_line(error)}), so nothing is pushed; put a copy back, or make the run anew"
        ) from error
    if is_local:
        selection.notes.append(
            f"adapter_config.json names a folder of this machine as the base ({base}): others see that name, and "
            "need the card to make the base"
        )


# --- secrets -----------------------------------------------------------------------------------------


def _refuse_secrets(file: File, own_token: str | None) -> None:
    """Read a file through for anything that looks like a credential; the message never repeats it."""
    if isinstance(file.content, bytes):
        place = _secret_in_text(file.content, own_token)
    elif file.name.endswith(WEIGHTS):
        place = _secret_in_weights(file.content, own_token)
    else:
        place = _secret_in_text(file.content.read_bytes(), own_token)
    if place is not None:
        raise UserError(
            f"{file.name}: nothing is pushed, {place} holds what looks like a token or a password. Remove it, and "
            "if it is real, revoke it where it was issued"
        )


def _secret_in_text(content: bytes, own_token: str | None) -> str | None:
    text = content.decode("utf-8", errors="replace")
    found = SECRET_VALUE.search(text)
    at = found.start() if found else text.find(own_token) if own_token else -1
    return None if at < 0 else f"line {text.count(chr(10), 0, at) + 1}"


def _secret_in_weights(path: Path, own_token: str | None) -> str | None:
    """The header is text, with metadata and names; among the numbers only the user's own token is looked for,
    since patterns would match numbers by chance.

    Raises:
        UserError: it is no safetensors file, whatever its name says.
    """
    try:
        with safe_open(path, framework="np") as tensors:
            header = json.dumps([tensors.metadata(), *tensors.keys()])
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error}); it is not pushed") from error
    if _secret_in_text(header.encode(), own_token):
        return "its header"
    with (
        path.open("rb") as handle,
        mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return "it" if own_token and content.find(own_token.encode()) >= 0 else None
