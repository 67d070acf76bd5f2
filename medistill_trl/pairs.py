"""Completions as two models read them: for losses that compare both on the same tokens."""

from itertools import takewhile

import torch
from torch.nn.utils.rnn import pad_sequence

from medistill_trl.prompts import IGNORED, PromptFormat
from medistill_trl.teacher import Completion


def encode_completion_pair(
    student: PromptFormat,
    teacher: PromptFormat,
    shared: int,
    question: str,
    completion: Completion,
    max_length: int | None,
) -> dict[str, list[int]]:
    """A completion as both models read it, see `encode_pair`.

    The writer's own tokens, cut before the first that the models do not share. A completion that ended at
    a stop string is closed by the student's end token, which the teacher would not have written.
    """
    written = [*completion.token_ids, *([] if completion.end_id is None else [completion.end_id])]
    ids = list(takewhile(lambda token: token < shared, written))
    stopped = completion.finished and completion.end_id is None and len(ids) == len(written)
    closing = [student.tokenizer.eos_token_id] if stopped else []
    return encode_pair(student, teacher, question, ids, closing, max_length)


def encode_pair(
    student: PromptFormat,
    teacher: PromptFormat,
    question: str,
    completion_ids: list[int],
    closing_ids: list[int],
    max_length: int | None,
) -> dict[str, list[int]]:
    """One example for a loss that compares both models on the same completion tokens.

    Each model reads the completion after its own prompt, so their rows differ in length but not in the
    number, nor the order, of completion tokens.

    Args:
        completion_ids: Tokens of a vocabulary the models share, with the end token if its writer chose it.
        closing_ids: Tokens that only the student learns, by cross-entropy: its end token after a
            completion that ended at a stop string, where the teacher expects something else.

    Returns:
        `input_ids` and `labels` as in `encode_example`; `teacher_input_ids` and `teacher_labels`; and
        `compared`, as long as `labels`: 1 where the teacher's prediction counts. What exceeds
        `max_length` on either side is cut from the completion's end.
    """
    prompts = [form.encode(form.render(question)) for form in (student, teacher)]
    ids = [*completion_ids, *closing_ids]
    if max_length is not None:
        ids = ids[: max(0, max_length - max(map(len, prompts)))]
    student_ids, teacher_ids = (prompt + ids for prompt in prompts)
    student_labels, teacher_labels = ([IGNORED] * len(prompt) + ids for prompt in prompts)
    compared = min(len(completion_ids), len(ids))
    return {
        "input_ids": student_ids,
        "labels": student_labels,
        "teacher_input_ids": teacher_ids,
        "teacher_labels": teacher_labels,
        "compared": [0] * len(prompts[0]) + [1] * compared + [0] * (len(ids) - compared),
    }


class PairCollator:
    """Pads encoded pairs on the right; leaves rows that still await a completion as they are.

    Args:
        pad_token_id: Of the vocabulary the models share.
    """

    def __init__(self, pad_token_id: int):
        self.padding = {
            "input_ids": pad_token_id,
            "labels": IGNORED,
            "teacher_input_ids": pad_token_id,
            "teacher_labels": IGNORED,
            "compared": 0,
        }

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        if "example" in rows[0]:
            return rows
        batch = {
            name: pad_sequence([torch.tensor(row[name]) for row in rows], True, value)
            for name, value in self.padding.items()
            if name in rows[0]
        }
        for side in ("", "teacher_"):
            lengths = torch.tensor([len(row[f"{side}input_ids"]) for row in rows])
            time = torch.arange(batch[f"{side}input_ids"].shape[1])
            batch[f"{side}attention_mask"] = (time < lengths[:, None]).long()
        batch["on_policy"] = torch.tensor([row.get("on_policy", False) for row in rows])
        return batch
