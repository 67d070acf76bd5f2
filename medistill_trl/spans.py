"""Two tokenizations of one completion, cut into the smallest groups that end at the same byte.

    student   | Give | ▁5 | ▁ | <0xC2> | <0xB5> | g | </s>  |
    teacher   | Give | Ġ5 |         Ġµ          | g | <end> |

Such a group is a *span*: the tokens on either side that write the same bytes. Tokens are compared as bytes
(`token_bytes`), so one that ends inside a word or a character is placed where it ends. The end token of one
side and that of the other make a span of their own.

Where a tokenizer does not keep the text (Qwen2 composes accents, others fold compatibility characters, a
character cut at the length limit decodes to �) the bytes of the two sides differ. The tokens that touch such
a place make one span that is marked as not exact. The place is looked for word by word, so it stays small.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from medistill_trl.overlap import Overlap
from medistill_trl.token_bytes import TokenBytes


class Span(NamedTuple):
    """Tokens [start, end) of each side, counted from the completion's first.

    Args:
        exact: Both sides write the same bytes here.
    """

    student_start: int
    student_end: int
    teacher_start: int
    teacher_end: int
    exact: bool = True


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[Span]:
    """The spans of two tokenizations, in order; linear in their length.

    Every token belongs to one span, unless a side has no tokens at all. A token without bytes belongs to
    the span before it, or to the first.

    Args:
        student, teacher: The bytes of each token.
    """
    differences = _differences(b"".join(student), b"".join(teacher))
    student_ends = _ends(student, differences)
    teacher_ends = _ends(teacher, [(b, a) for a, b in differences])
    spans, start, passed = [], (0, 0), 0
    for place, (student_end, differences_before) in student_ends.items():
        if place == 0 or place not in teacher_ends:
            continue
        end = student_end, teacher_ends[place][0]
        spans.append(Span(start[0], end[0], start[1], end[1], differences_before == passed))
        start, passed = end, differences_before
    return spans


Difference = tuple[tuple[int, int], tuple[int, int]]  # bytes [start, end) of one side, of the other


def _ends(pieces: Sequence[bytes], differences: list[Difference]) -> dict[int, tuple[int, int]]:
    """Where the tokens of one side end, on a ruler that both sides share.

    The ruler has the bytes that are the same once, those that differ one side after the other. A token
    that ends inside a difference ends where no token of the other side can, and is left out.

    Returns:
        Place → the number of tokens up to it, and of differences; in order.
    """
    ends, passed, shift = {}, 0, 0
    for count, end in enumerate(accumulate(map(len, pieces)), 1):
        while passed < len(differences) and differences[passed][0][1] <= end:
            other_start, other_end = differences[passed][1]
            shift += other_end - other_start
            passed += 1
        if passed == len(differences) or end <= differences[passed][0][0]:
            ends[end + shift] = count, passed
    return ends


def _differences(one: bytes, other: bytes) -> list[Difference]:
    """Where two byte strings differ, one place for each word if they have as many words."""
    if one == other:
        return []
    words = one.split(b" "), other.split(b" ")
    if len(words[0]) != len(words[1]):
        words = [one], [other]
    found, at = [], (0, 0)
    for pair in zip(*words, strict=True):
        ends = at[0] + len(pair[0]), at[1] + len(pair[1])
        if pair[0] != pair[1]:
            # As characters: two that differ may have bytes in common, where no token should end.
            texts = [word.decode(errors="surrogateescape") for word in pair]
            prefix = _common_prefix(*texts)
            suffix = _common_prefix(*(text[len(prefix) :][::-1] for text in texts))
            head, tail = _num_bytes(prefix), _num_bytes(suffix)
            found.append(((at[0] + head, ends[0] - tail), (at[1] + head, ends[1] - tail)))
        at = ends[0] + 1, ends[1] + 1
    return found


def _common_prefix(one: str, other: str) -> str:
    different = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(different, min(len(one), len(other)))]


def _num_bytes(text: str) -> int:
    return len(text.encode(errors="surrogateescape"))


@dataclass(frozen=True)
class TokenizerPair:
    """Two tokenizers that read each other's completions.

    Args:
        student, teacher: Their vocabularies as bytes.
        overlap: The tokens they share.
    """

    student: TokenBytes
    teacher: TokenBytes
    overlap: Overlap

    @classmethod
    def of(
        cls, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
    ) -> "TokenizerPair":
        """
        Raises:
            UserError: the bytes of a tokenizer's tokens are not known.
        """
        return cls(TokenBytes.of(student), TokenBytes.of(teacher), Overlap.of(student, teacher))

    def spans(
        self, student_ids: Sequence[int], teacher_ids: Sequence[int], text: str, ended: bool
    ) -> list[Span]:
        """The spans of a completion.

        Args:
            student_ids, teacher_ids: As one side wrote it and the other encodes its text, or as both do.
            text: What the tokens say, without end tokens.
            ended: The last token on each side is its end token, which the text does not show.
        """
        last = 1 if ended else 0
        counts = len(student_ids) - last, len(teacher_ids) - last
        spans = align(
            self.student.pieces(student_ids[: counts[0]], text),
            self.teacher.pieces(teacher_ids[: counts[1]], text),
        )
        if ended:
            spans.append(Span(counts[0], counts[0] + 1, counts[1], counts[1] + 1))
        return spans

    def one_to_one(
        self, span: Span, student_ids: Sequence[int], teacher_ids: Sequence[int]
    ) -> bool:
        """Is this one token on each side, and the same of the shared vocabulary?

        A token and another that differs by the leading space of a text say the same in one place only.
        """
        single = span.student_end - span.student_start == span.teacher_end - span.teacher_start == 1
        partner = self.overlap.partners.get(student_ids[span.student_start])
        return single and span.exact and partner == teacher_ids[span.teacher_start]
