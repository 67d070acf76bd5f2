"""What a teacher says of each token of its completions, read once and kept on disk: the k likeliest tokens with
their log-probabilities, and the probability of all others together.

One teacher pass then serves every epoch, every student and every run of the same pair, and no training step needs
the teacher. What is kept depends on the teacher's exact weights, the shared vocabulary, k and the temperature of
the loss (`Kept`); the distributions of a completion on the tokens the teacher reads, so on its tokenizer, its chat
template, the prompt and the completion.

A token takes k · (2 + 2) + 4 · X bytes: k ids of two bytes (three from a vocabulary of 65,537 on), k log-probabilities
of two, and for each of X temperatures the tail in float32. With k = 64 and T ≠ 1 that is 264 bytes, where a
vocabulary of 49,152 takes 98,304 in float16. A log-probability l is kept as the nearest of 65,536 numbers whose
roots are evenly spaced, −64 (u / 65535)²: it comes back within 1.3e-4 · √|l| + 1e-8 nats, and below −64 as −64.

On disk: a folder for each `Kept`, in it files of about `CHUNK_TOKENS` tokens. A file is written aside and put in
place in one step under the sha256 of its content as its name: after a kill at most a file's tokens are read again,
after an error nothing that was whole before it, and a file that is not what was written is refused. Files are mapped
into memory, not loaded.

Shapes: N completion tokens, K kept tokens, X temperatures, S completions of a file.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.numpy import save
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from medistill_trl.completion_store import DEFAULT_BATCH_SIZE
from medistill_trl.errors import NonFinite, UserError
from medistill_trl.files import write_bytes, write_text
from medistill_trl.losses.chunked import CHUNK_SIZE
from medistill_trl.losses.heads import OutputHead
from medistill_trl.losses.top_k import TopK, largest
from medistill_trl.model_source import remembered_digest
from medistill_trl.out_of_memory import OutOfMemoryWriting
from medistill_trl.teacher import num_targets, predicting_states
from medistill_trl.turns import turn

FORMAT = 1
CHUNK_TOKENS = 2**14  # 4 MB with k = 64
LOWEST = 64.0  # nats below 0
STEPS = 2**16 - 1
LARGEST_SHORT_ID = 2**16 - 1

# (encoded pairs, longest first) → as they are made, of each its place and the distributions that predict its
# `teacher_labels`, one row for each completion token
Producer = Callable[[Sequence[dict]], Iterator[list[tuple[int, TopK]]]]


@dataclass(frozen=True)
class Kept:
    """What is kept of whose distributions.

    Args:
        teacher: Its identity: exact weights, dtype and quantisation, or the name a server has for it.
        vocab_size: Leading tokens the distributions are over.
        top_k: K.
        temperatures: At which the tail is known, see `TopK`.
    """

    teacher: str
    vocab_size: int
    top_k: int
    temperatures: tuple[float, ...]

    @classmethod
    def of(cls, teacher: str, vocab_size: int, top_k: int, temperature: float) -> "Kept":
        """For a loss at one temperature; a vocabulary of fewer than `top_k` tokens is kept whole."""
        temperatures = (1.0,) if temperature == 1 else (1.0, float(temperature))
        return cls(teacher, vocab_size, min(top_k, vocab_size), temperatures)

    @property
    def digest(self) -> str:
        content = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


class TeacherLogits:
    """The store of one `Kept`.

    Args:
        folder: Of all stores; this one's folder is made in it.
        kept: What it holds.
    """

    def __init__(self, folder: str | Path, kept: Kept):
        self.folder = Path(folder) / kept.digest[:16]
        self.kept = kept
        self._files: dict[str, safe_open] = {}
        # Key of a completion → its file's name, and the first of its tokens there and the one after its last.
        self._places: dict[str, tuple[str, int, int]] = {}
        self._short_ids = kept.vocab_size <= LARGEST_SHORT_ID + 1

    def __len__(self) -> int:
        """Completions that are known to be there."""
        return len(self._places)

    @property
    def num_tokens(self) -> int:
        return sum(stop - start for _, start, stop in self._places.values())

    @property
    def num_bytes(self) -> int:
        """On disk."""
        return sum((self.folder / name).stat().st_size for name in self._files)

    def fill(
        self,
        examples: Sequence[dict],
        producer: Producer,
        label: str = "teacher logits",
    ) -> list[str]:
        """Have the distributions of encoded pairs made that are missing.

        With several processes each makes its share; runs side by side take turns, so that nothing is made twice.

        Args:
            examples: With `teacher_input_ids` and `teacher_labels`.
            producer: Makes them.

        Returns:
            The key of each, for `get`.
        """
        keys = [key_of(example) for example in examples]
        state = PartialState()
        write_text(self.folder / "kept.json", json.dumps(asdict(self.kept), indent=1))
        with turn(self.folder / "lock", self.folder):
            self._read_places()
            if state.is_main_process:
                for torn in self.folder.glob("*.safetensors.*.partial"):  # of a run that was killed
                    torn.unlink()
            wanted = dict(zip(keys, examples, strict=True))
            missing = [(key, wanted[key]) for key in wanted if key not in self._places]
            missing.sort(key=lambda entry: (-len(entry[1]["teacher_input_ids"]), entry[0]))
            state.wait_for_everyone()  # all have read the same store before anyone writes to it
            share = missing[state.process_index :: state.num_processes]
            self._make(share, producer, label)
            state.wait_for_everyone()
            self._read_places()
        return keys

    def get(self, key: str) -> TopK:
        """What is kept of a completion, on the CPU: ids int64, the rest float32."""
        name, start, stop = self._places[key]
        file = self._files[name]
        if start == stop:  # safetensors slices nothing at the end of a column
            empty = torch.zeros(0, self.kept.top_k)
            return TopK(empty.long(), empty, torch.zeros(0, len(self.kept.temperatures)))
        names = COLUMNS if self._short_ids else (*COLUMNS, HIGH_IDS)
        return _unpack({name: file.get_slice(name)[start:stop] for name in names})

    def batch(self, keys: Sequence[str]) -> TopK:
        """Of several completions, one after the other."""
        return TopK(*map(torch.cat, zip(*(self.get(key) for key in keys), strict=True)))

    def _make(self, missing: list[tuple[str, dict]], producer: Producer, label: str) -> None:
        waiting: list[tuple[str, TopK]] = []
        progress = tqdm(
            total=len(missing),
            desc=label,
            unit="completion",
            disable=not missing or not PartialState().is_main_process,
        )
        try:
            with progress:
                for made in producer([example for _, example in missing]):
                    for place, top_k in made:
                        key, example = missing[place]
                        self._check(example, top_k)
                        waiting.append((key, top_k))
                    progress.update(len(made))
                    if sum(len(top_k.ids) for _, top_k in waiting) >= CHUNK_TOKENS:
                        self._write(waiting)
                        waiting = []
        finally:  # whatever ends it, a server that is lost for one
            if waiting:
                self._write(waiting)

    def _check(self, example: dict, top_k: TopK) -> None:
        rows = num_targets(teacher_side(example))
        expected = [(rows, self.kept.top_k)] * 2 + [(rows, len(self.kept.temperatures))]
        if (shapes := [tuple(tensor.shape) for tensor in top_k]) != expected:
            raise ValueError(f"the producer gave {shapes}, and {expected} are kept")
        if not all(tensor.isfinite().all() for tensor in top_k[1:]):
            raise NonFinite(
                f"{self.kept.teacher}: its log-probabilities of a completion are NaN or infinite. Check its weights and "
                "its dtype (float16 overflows, bfloat16 does not)",
                [{"input_ids": example["teacher_input_ids"]}],
            )

    def _write(self, made: list[tuple[str, TopK]]) -> None:
        keys, parts = zip(*made, strict=True)
        content = save(
            {
                **_pack(TopK(*map(torch.cat, zip(*parts, strict=True))), self._short_ids),
                "keys": np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, 32),
                "lengths": np.array([len(top_k.ids) for top_k in parts], np.int32),
            }
        )
        write_bytes(self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors", content)

    def _read_places(self) -> None:
        """Of the files that were not known yet."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._files:
                continue
            if remembered_digest(path) != path.stem:
                raise UserError(
                    f"teacher logits {path}: the file is not what was written; remove it, and the teacher reads "
                    "its completions anew"
                )
            file = self._files[path.name] = safe_open(path, framework="numpy")
            stops = np.cumsum(file.get_tensor("lengths")).tolist()
            starts = [0, *stops][: len(stops)]
            keys = [row.tobytes().hex() for row in file.get_tensor("keys")]
            for key, start, stop in zip(keys, starts, stops, strict=True):
                self._places[key] = (path.name, start, stop)


# --- the columns of a file -------------------------------------------------------------------------

COLUMNS = ("ids", "log_probs", "log_tails")
HIGH_IDS = "high_ids"  # what does not fit into two bytes


def _pack(top_k: TopK, short_ids: bool) -> dict[str, np.ndarray]:
    ids, log_probs, log_tails = (tensor.cpu().numpy() for tensor in top_k)
    roots = np.sqrt(np.clip(-log_probs.astype(np.float64), 0, LOWEST) / LOWEST)
    columns = {
        "ids": (ids & LARGEST_SHORT_ID).astype(np.uint16),
        "log_probs": np.rint(roots * STEPS).astype(np.uint16),
        "log_tails": log_tails.astype(np.float32),
    }
    if not short_ids:
        columns[HIGH_IDS] = (ids >> 16).astype(np.uint8)
    return columns


def _unpack(columns: dict[str, np.ndarray]) -> TopK:
    ids = columns["ids"].astype(np.int64)
    if HIGH_IDS in columns:
        ids += columns[HIGH_IDS].astype(np.int64) << 16
    roots = columns["log_probs"].astype(np.float32) / STEPS
    parts = ids, -LOWEST * roots * roots, columns["log_tails"]
    return TopK(*map(torch.from_numpy, parts))


# --- examples, and a teacher's model -------------------------------------------------------------


def key_of(example: dict) -> str:
    """Names a completion after its prompt, as the teacher reads them."""
    side = teacher_side(example)
    content = json.dumps([side["input_ids"], num_targets(side)])
    return hashlib.sha256(content.encode()).hexdigest()


def teacher_side(example: dict) -> dict[str, list[int]]:
    """An encoded pair as `predicting_states` takes it."""
    return {"input_ids": example["teacher_input_ids"], "labels": example["teacher_labels"]}


def in_batches(
    make: Callable[[Sequence[dict]], list[TopK]], batch_size: int | None = None
) -> Producer:
    """A `Producer` that makes so many at a time."""

    def produce(examples: Sequence[dict]) -> Iterator[list[tuple[int, TopK]]]:
        size = batch_size or DEFAULT_BATCH_SIZE
        for start in range(0, len(examples), size):
            yield list(enumerate(make(examples[start : start + size]), start))

    return produce


@torch.no_grad()
def read_by(
    model: PreTrainedModel, kept: Kept, examples: Sequence[dict], chunk_size: int = CHUNK_SIZE
) -> list[TopK]:
    """What is kept of encoded pairs, by one forward for all of them.

    Args:
        model: The frozen teacher.
        chunk_size: Tokens whose logits exist at a time.

    Raises:
        OutOfMemoryWriting: there are too many examples.
    """
    head = OutputHead.of(model)
    head.check(model)
    head = head.narrow(kept.vocab_size)
    sides = [teacher_side(example) for example in examples]
    try:
        states_NH, _ = predicting_states(model, sides)
        parts = []
        for start in range(0, max(1, len(states_NH)), chunk_size):
            logits_CV = head.project(
                states_NH[start : start + chunk_size], torch.float32, track=False
            ).logits_CV
            parts.append(largest(logits_CV, kept.top_k, kept.temperatures).each(torch.Tensor.cpu))
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryWriting(str(error), len(examples)) from error
    whole = TopK(*map(torch.cat, zip(*parts, strict=True)))
    counts = [num_targets(side) for side in sides]
    return [TopK(*rows) for rows in zip(*(tensor.split(counts) for tensor in whole), strict=True)]
