"""Completions as two models of different tokenizers read them, and the spans that tie the two together."""

from dataclasses import dataclass

import torch

from medistill_trl.pairs import PairCollator
from medistill_trl.prompts import IGNORED, PromptFormat, encode_completion
from medistill_trl.span_columns import span_columns
from medistill_trl.spans import TokenizerPair
from medistill_trl.teacher import Completion


@dataclass(frozen=True)
class _Side:
    """One model's prompt, completion and end."""

    prompt: list[int]
    text: list[int]
    end: list[int]

    def example(self, max_length: int | None) -> tuple[list[int], list[int], int]:
        """`input_ids`, `labels`, and how many completion tokens are left of `max_length`."""
        ids = [*self.text, *self.end]
        if max_length is not None:
            ids = ids[: max(0, max_length - len(self.prompt))]
        return self.prompt + ids, [IGNORED] * len(self.prompt) + ids, len(ids)


def encode_span_pair(
    tokenizers: TokenizerPair,
    student: PromptFormat,
    teacher: PromptFormat,
    question: str,
    completion: Completion,
    max_length: int | None,
    by_student: bool = False,
    with_columns: bool = False,
) -> dict[str, list]:
    """One example for a loss that compares two models over spans.

    Each side reads the completion after its own prompt, in its own tokens: the writer in those it chose, the
    other in those of the text. Where the writer chose to end, the other side's end token is its partner; a
    completion that ended at a stop string is closed by the student's, which has none.

    Args:
        by_student: The student wrote it, not the teacher.
        with_columns: Tell the span of every token too, see `span_columns`.

    Returns:
        `input_ids` and `labels` as in `encode_example`; `teacher_input_ids` and `teacher_labels`; `spans`,
        those that are exact and whole on both sides, [student start, end, teacher start, end] each in
        completion tokens; and `one_to_one`, 1 for each that is one token of both vocabularies. Each side is
        cut at `max_length` of its own tokens.
    """
    ended = completion.end_id is not None
    sides = []
    for form, writes in ((student, by_student), (teacher, not by_student)):
        prompt = form.render(question)
        text = completion.token_ids
        if not writes:
            text = encode_completion(form.tokenizer, prompt, completion.text, finished=False)
        end = [completion.end_id if writes else form.tokenizer.eos_token_id] if ended else []
        sides.append(_Side(form.encode(prompt), text, end))
    ours, theirs = sides
    ids = [*ours.text, *ours.end], [*theirs.text, *theirs.end]
    if completion.finished and not ended:
        ours.end.append(student.tokenizer.eos_token_id)
    input_ids, labels, length = ours.example(max_length)
    teacher_input_ids, teacher_labels, teacher_length = theirs.example(max_length)
    whole = [
        span
        for span in tokenizers.spans(*ids, completion.text, ended)
        if span.student_end <= length and span.teacher_end <= teacher_length
    ]
    columns = {}
    if with_columns:
        lengths = len(input_ids), len(teacher_input_ids)
        columns = span_columns(tokenizers, student, teacher, question, whole, lengths)
    spans = [span for span in whole if span.exact]
    return {
        "input_ids": input_ids,
        "labels": labels,
        "teacher_input_ids": teacher_input_ids,
        "teacher_labels": teacher_labels,
        "spans": [list(span[:4]) for span in spans],
        "one_to_one": [int(tokenizers.one_to_one(span, *ids)) for span in spans],
        **columns,
    }


class SpanCollator(PairCollator):
    """Pads encoded span pairs on the right, each side with its own token.

    The batch has `spans`, (G, 4), and `one_to_one`, (G,), of all examples: rows of the completion tokens of the
    whole batch, in the order of `completion_states`.
    """

    def __init__(self, pad_token_id: int, teacher_pad_token_id: int):
        super().__init__(pad_token_id)
        del self.padding["compared"]
        self.padding |= {"span_of": IGNORED, "teacher_span_of": IGNORED, "row_counts": 0}
        self.padding["teacher_input_ids"] = teacher_pad_token_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        batch = super().__call__(rows)
        if isinstance(batch, list):
            return batch
        spans, before = [], [0, 0]
        for row in rows:
            for start, end, teacher_start, teacher_end in row["spans"]:
                own = start + before[0], end + before[0]
                spans.append([*own, teacher_start + before[1], teacher_end + before[1]])
            for side, name in enumerate(("labels", "teacher_labels")):
                before[side] += sum(label != IGNORED for label in row[name])
        batch["spans"] = torch.tensor(spans, dtype=torch.long).reshape(-1, 4)
        one_to_one = [bool(flag) for row in rows for flag in row["one_to_one"]]
        batch["one_to_one"] = torch.tensor(one_to_one, dtype=torch.bool)
        return batch
