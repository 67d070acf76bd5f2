"""Spans as columns of a batch: for every token of a row, prompt and completion, the span it belongs to.

For attention, whose rows are distributions over all tokens before them: a span whose text a tokenizer has changed is
not compared, and is still attended to.
"""

from collections.abc import Sequence

from medistill_trl.prompt_spans import prompt_spans
from medistill_trl.prompts import IGNORED, PromptFormat
from medistill_trl.spans import Span, TokenizerPair


def span_columns(
    tokenizers: TokenizerPair,
    student: PromptFormat,
    teacher: PromptFormat,
    question: str,
    completion: Sequence[Span],
    lengths: tuple[int, int],
) -> dict[str, list[int]]:
    """The columns of one example.

    Args:
        completion: The spans of its completion, of which all before the last count, exact or not.
        lengths: Tokens of the student's and of the teacher's row.

    Returns:
        `span_of` and `teacher_span_of`, see `span_numbers`, and `row_counts`, as long as the student's row: 1 on the
        completion's exact spans.
    """
    rendered = [form.render(question) for form in (student, teacher)]
    prompts = student.encode(rendered[0]), teacher.encode(rendered[1])
    asked = prompt_spans(
        tokenizers.student.pieces(prompts[0], rendered[0]),
        tokenizers.teacher.pieces(prompts[1], rendered[1]),
        question,
    )
    spans = [*asked, *_moved(completion, len(prompts[0]), len(prompts[1]))]
    own, theirs = span_numbers(spans, *lengths)
    counted = [number >= len(asked) and spans[number].exact for number in own]
    return {"span_of": own, "teacher_span_of": theirs, "row_counts": [int(c) for c in counted]}


def _moved(spans: Sequence[Span], student: int, teacher: int) -> list[Span]:
    """The spans of completions that begin behind so many tokens."""
    return [
        Span(
            span.student_start + student,
            span.student_end + student,
            span.teacher_start + teacher,
            span.teacher_end + teacher,
            span.exact,
        )
        for span in spans
    ]


def span_numbers(
    spans: Sequence[Span], student_length: int, teacher_length: int
) -> tuple[list[int], list[int]]:
    """The span of each token, counted from 0, for the student's row and for the teacher's.

    Returns:
        As long as the rows, `IGNORED` outside of spans.
    """
    student, teacher = [IGNORED] * student_length, [IGNORED] * teacher_length
    for number, span in enumerate(spans):
        for t in range(span.student_start, span.student_end):
            student[t] = number
        for t in range(span.teacher_start, span.teacher_end):
            teacher[t] = number
    return student, teacher
