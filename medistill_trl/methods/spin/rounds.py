"""The pairs of a round: the teacher's answer y⁺ and the student's own y⁻ to every prompt.

y⁻ is written by the weights an iteration starts from, so it cannot be written again later: each round is
a file in the run directory, from which a resumed run reads. It grows batch by batch; after a kill at most
the batch in the making is lost.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from medistill_trl.files import write_text
from medistill_trl.prompts import PromptFormat, encode_completion
from medistill_trl.teacher import Completion

# What may be said of a pair. The first two leave nothing to learn: such pairs carry no loss.
DROPPED = ("equal", "empty_chosen")
NOTES = (*DROPPED, "empty_rejected", "truncated_chosen", "truncated_rejected")


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and of its two completions, each with its end token unless it was cut.

    Args:
        notes: Of `NOTES`, those that apply.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> bool:
        """Does it carry loss?"""
        return not set(self.notes) & set(DROPPED)

    @property
    def num_tokens(self) -> int:
        return len(self.chosen_ids) + len(self.rejected_ids)


def make_pair(
    form: PromptFormat,
    prompt: str,
    chosen: Completion,
    rejected: Completion,
    max_length: int | None,
) -> Pair:
    """A pair as the student reads it.

    y⁺ comes as text, since its writer may have another tokenizer; y⁻ is the student's own tokens. Neither
    has an end token if it was cut at a length limit: the student would learn to stop, or not to stop, at
    a place that means nothing.

    Args:
        form: The student's.
        prompt: Rendered.
        chosen: The teacher's completion.
        rejected: The student's.
        max_length: Longest prompt and completion together; None for no limit.
    """
    prompt_ids = form.encode(prompt)
    chosen_ids = encode_completion(form.tokenizer, prompt, chosen.text, chosen.finished)
    ends = form.tokenizer.eos_token_id if rejected.end_id is None else rejected.end_id
    rejected_ids = [*rejected.token_ids, *([ends] if rejected.finished else [])]
    room = len(prompt_ids) + max(len(chosen_ids), len(rejected_ids))
    if max_length is not None:
        room = max(0, max_length - len(prompt_ids))
    applies = {
        "equal": chosen.text == rejected.text,
        "empty_chosen": not chosen.text,
        "empty_rejected": not rejected.text,
        "truncated_chosen": not chosen.finished or len(chosen_ids) > room,
        "truncated_rejected": not rejected.finished or len(rejected_ids) > room,
    }
    notes = tuple(name for name in NOTES if applies[name])
    return Pair(prompt_ids, chosen_ids[:room], rejected_ids[:room], notes)


def describe(pairs: list[Pair]) -> dict[str, int | float]:
    """Counts of a round's notes, the pairs that carry loss, and the mean lengths in tokens."""
    notes = Counter(note for pair in pairs for note in pair.notes)
    return {
        "pairs": len(pairs),
        "pairs_with_loss": sum(pair.counts for pair in pairs),
        **{name: notes[name] for name in NOTES},
        "chosen_tokens_mean": sum(len(pair.chosen_ids) for pair in pairs) / len(pairs),
        "rejected_tokens_mean": sum(len(pair.rejected_ids) for pair in pairs) / len(pairs),
    }


def fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """sha256 of the tensors' bytes, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class RoundFile:
    """A round on disk: a header line, then one answer a line, in the order they were written.

    Args:
        path: JSONL file.
        header: What the answers depend on. A file with another header is not this round.
    """

    def __init__(self, path: Path, header: dict):
        self.path = path
        self.header = header

    def read(self) -> list[dict]:
        """The answers of all whole lines; none if there is no file, or it has another header."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:  # what follows was cut off
            try:
                records.append(json.loads(line))
            except ValueError:  # damaged: it and what follows must be written anew
                break
        header, *answers = records or [{}]
        matches = all(header.get(name) == value for name, value in self.header.items())
        return answers if matches else []

    def digest(self) -> str:
        """sha256 of the file."""
        with self.path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()

    def start(self, answers: list[dict]) -> None:
        """Begin the file anew with what is known already."""
        write_text(self.path, _lines([self.header, *answers]))

    def append(self, answers: list[dict]) -> None:
        """Add answers; on return they are on disk."""
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(_lines(answers))
            handle.flush()
            os.fsync(handle.fileno())


def _lines(records: list[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def complete_round(
    file: RoundFile, sizes: list[int], answer: Callable[[int], list[dict]]
) -> list[dict]:
    """The answers of a whole round, those that are missing written now; each process writes its share.

    Args:
        file: Where the round is kept.
        sizes: Answers of each batch.
        answer: Index of a batch → its answers. It must not depend on the number of processes.
    """
    state = PartialState()
    answers = file.read()
    if len(answers) >= sum(sizes):
        return answers
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    done = next(n for n, start in enumerate(starts) if start + sizes[n] > len(answers))
    answers = answers[: starts[done]]  # whole batches
    state.wait_for_everyone()  # all have read the file before it changes
    if state.is_main_process:
        file.start(answers)
    bar = tqdm(
        total=sum(sizes),
        initial=len(answers),
        desc=f"student's answers, {file.path.stem}",
        unit="completion",
        disable=not state.is_main_process,
    )
    with bar:
        for first in range(done, len(sizes), state.num_processes):
            mine = first + state.process_index
            written = gather_object(answer(mine) if mine < len(sizes) else [])
            if state.is_main_process:
                file.append(written)
            answers += written
            bar.update(len(written))
    return answers


def to_record(prompt: int, name: str, chosen: Completion, rejected: Completion) -> dict:
    """One line of a round's file. `chosen` is for a reader; it is kept in the completion store."""
    return {
        "prompt": prompt,
        "id": name,
        "chosen": chosen.text,
        "rejected": rejected.text,
        "token_ids": rejected.token_ids,
        "finished": rejected.finished,
        "end_id": rejected.end_id,
    }


def from_record(record: dict) -> Completion:
    """The student's answer in a line of a round's file."""
    return Completion(record["rejected"], record["token_ids"], record["finished"], record["end_id"])
