"""Spans of two prompts that ask the same question in different templates.

    student   <|im_start|>user\\n | Why | does | gout  | hurt | ?<|im_end|>\\n<|im_start|>assistant\\n
    teacher   ### Question:\\n    | Why | does | go ut | hurt | ?\\n\\n### Answer:\\n

The question's text is aligned as a completion's is. What stands before it is one span, and so is what stands
behind it; a token in which question and template have grown together belongs to the template. Prompts that are the
same text, as those of two base models, are aligned from the beginning.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from medistill_trl.spans import Span


def prompt_spans(student: Sequence[bytes], teacher: Sequence[bytes], question: str) -> list[Span]:
    """The spans of two prompts, in order; every token is in one.

    Args:
        student, teacher: The bytes of each token, at least one token a side.
        question: What both prompts hold. Where one does not hold it as it is (a tokenizer that composes accents has
            changed it), the two prompts are one span.
    """
    prompts = [b"".join(pieces) for pieces in (student, teacher)]
    text = prompts[0] if prompts[0] == prompts[1] else question.encode()
    student_ends, teacher_ends = (_ends_within(pieces, text) for pieces in (student, teacher))
    common = sorted(student_ends.keys() & teacher_ends.keys())
    cuts = [(0, 0), *((student_ends[end], teacher_ends[end]) for end in common)]
    ends = len(student), len(teacher)
    if len(cuts) > 1 and any(cut == end for cut, end in zip(cuts[-1], ends, strict=True)):
        cuts.pop()  # a span has tokens on both sides
    return [
        Span(start[0], stop[0], start[1], stop[1], exact=start != cuts[0] and stop != ends)
        for start, stop in pairwise([*cuts, ends])
    ]


def _ends_within(pieces: Sequence[bytes], text: bytes) -> dict[int, int]:
    """Bytes of a text that have been written where a token ends → the tokens until there."""
    start = b"".join(pieces).rfind(text)
    if start < 0:
        return {}
    ends = enumerate(accumulate(map(len, pieces)), 1)
    return {end - start: count for count, end in ends if 0 <= end - start <= len(text)}
