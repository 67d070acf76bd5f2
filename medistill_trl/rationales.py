"""How a teacher is asked for a rationale, how its text is taken apart, and what becomes of each one.

A rationale is the reasoning before a separator, an answer what follows it on its line:

    The wrist cannot be extended, so the nerve of the extensors is hurt.

    Final answer: radial nerve

Separator and end marker are plain text: a special token would be one the student's tokenizer has to be
given, and its embedding one that 64 examples have to train.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from medistill_trl.answer_matching import answer_key, matches
from medistill_trl.data import Prompt

if TYPE_CHECKING:  # which would load torch
    from medistill_trl.teacher import Completion

# What Markdown may put before a separator's line, and around its words.
LINE_MARKUP = r"[ \t>*_#-]*"
WORD_MARKUP = r"[ \t*_]*"


class Fate(StrEnum):
    """What became of a drawn rationale: the first that applies, in this order."""

    EMPTY = "empty"  # the teacher wrote nothing
    CUT = "cut_at_limit"  # its answer was not finished when the length limit came
    TOO_LONG = "rationale_too_long"
    NO_SEPARATOR = "no_separator"
    SEVERAL_ANSWERS = "several_answers"  # that differ
    EMPTY_RATIONALE = "empty_rationale"
    EMPTY_ANSWER = "empty_answer"
    TOO_SHORT = "rationale_too_short"
    ANSWER_TOO_LONG = "answer_too_long"
    OVER_MAX_LENGTH = "over_max_length"  # its answer would be cut from the training example
    WRONG_ANSWER = "wrong_answer"
    DUPLICATE = "duplicate"  # of an earlier one of the same prompt
    CONTRADICTORY = "contradictory"  # to the best of the same prompt
    NOT_SELECTED = "not_selected"
    KEPT = "kept"


@dataclass(frozen=True)
class RationaleFormat:
    """The plain-text form of a rationale with its answer.

    Args:
        separator: Stands at the beginning of the answer's line.
        end_marker: Closes the answer; empty for none.
        instruction: Follows the question; `{separator}` stands for the separator.
    """

    separator: str
    end_marker: str
    instruction: str

    def ask(self, question: str) -> str:
        """The question with the instruction to reason and to answer in this form."""
        asked = f"{question}\n\n{self.instruction.replace('{separator}', self.separator)}"
        return f'{asked} End with "{self.end_marker}".' if self.end_marker else asked

    def render(self, rationale: str, answer: str) -> tuple[str, str]:
        """What the student learns, in two parts to be joined; the separator belongs to the second."""
        return rationale, f"\n\n{self.separator} {answer}" + (
            f" {self.end_marker}" if self.end_marker else ""
        )

    def parse(self, text: str) -> "Parsed":
        """Take a teacher's text apart.

        The separator is found at the beginning of a line or after a sentence, in any case and inside Markdown.
        The answer ends with its line or at the end marker; what comes later is not part of the rationale.
        """
        pieces = self._pattern.split(text)
        answers = [self._answer(piece) for piece in pieces[1:]]
        rationale = re.sub(rf"\n{LINE_MARKUP}$", "", pieces[0].strip()).strip()  # a rule above it
        if not answers:
            return Parsed(rationale, None)
        answer, closed = answers[0]
        differ = any(answer_key(other) != answer_key(answer) for other, _ in answers[1:] if other)
        return Parsed(rationale, answer, closed or len(answers) > 1, differ)

    @property
    def _pattern(self) -> re.Pattern:
        words = r"\s+".join(map(re.escape, self.separator.rstrip(":").split()))
        end = rf"{WORD_MARKUP}(?::{WORD_MARKUP}|$)" if self.separator.endswith(":") else WORD_MARKUP
        return re.compile(rf"(?:^|(?<=[.!?])[ \t]+){LINE_MARKUP}{words}{end}", re.I | re.M)

    def _answer(self, piece: str) -> tuple[str, bool]:
        """The answer that a piece begins with, and whether the text shows where it ends."""
        before, marker, _ = piece.partition(self.end_marker) if self.end_marker else (piece, "", "")
        line, newline, _ = before.lstrip().partition("\n")
        return line.strip("*_` \t\r"), bool(marker or newline)


@dataclass(frozen=True)
class Parsed:
    """A teacher's text in its parts.

    Args:
        rationale: Before the separator; all of the text where there is none.
        answer: None without a separator.
        closed: The answer is complete even if the text was cut later.
        answers_differ: More than one final answer stands in the text, and they do not say the same.
    """

    rationale: str
    answer: str | None
    closed: bool = False
    answers_differ: bool = False


@dataclass(frozen=True)
class Limits:
    """What a rationale must keep to, in the student's tokens.

    Args:
        check_answer: Require the reference's answer where the prompt has one.
    """

    min_rationale_tokens: int
    max_rationale_tokens: int
    max_answer_tokens: int
    check_answer: bool


@dataclass
class Rationale:
    """One drawn rationale.

    Args:
        id: Of its prompt.
        sample: Which of the prompt's draws.
        text: As the teacher wrote it.
        rationale: Its reasoning.
        answer: Its final answer; None without a separator.
        rationale_tokens: Student tokens of the reasoning.
        answer_tokens: Student tokens of the answer.
        key: What the answer says, see `answer_key`; None if it could not be read.
        right: Whether that is the reference's answer; None without either.
        vote: Share of the prompt's readable answers that say the same.
        score: The teacher's mean log-likelihood of it, nats per token; only for those that reach the
            selection.
        fate: None until it is decided.
    """

    id: str
    sample: int
    text: str
    rationale: str
    answer: str | None
    rationale_tokens: int
    answer_tokens: int
    key: str | None = None
    right: bool | None = None
    vote: float | None = None
    score: float | None = None
    fate: Fate | None = None


def judge(
    prompt: Prompt,
    sample: int,
    completion: "Completion",
    form: RationaleFormat,
    limits: Limits,
    count_tokens: Callable[[str], int],
    room: int | None,
) -> Rationale:
    """Read one completion; its fate is set if it fails a filter that needs no other rationale.

    Args:
        count_tokens: Of a text, in the student's tokens.
        room: Student tokens that `max_length` leaves after the prompt; None without a limit.
    """
    parsed = form.parse(completion.text)
    rationale = Rationale(
        id=prompt.id,
        sample=sample,
        text=completion.text,
        rationale=parsed.rationale,
        answer=parsed.answer,
        rationale_tokens=count_tokens(parsed.rationale),
        answer_tokens=count_tokens(parsed.answer or ""),
    )
    whole = count_tokens("".join(form.render(parsed.rationale, parsed.answer or ""))) + 1  # EOS
    cut = not completion.finished and not parsed.closed
    reference = (prompt.answer or "").strip() or None
    if parsed.rationale and parsed.answer and not cut and not parsed.answers_differ:
        rationale.key = answer_key(parsed.answer, reference)
        rationale.right = None if reference is None else matches(parsed.answer, reference)
    faults = {
        Fate.EMPTY: not completion.text.strip(),
        Fate.CUT: cut,
        Fate.TOO_LONG: rationale.rationale_tokens > limits.max_rationale_tokens,
        Fate.NO_SEPARATOR: parsed.answer is None,
        Fate.SEVERAL_ANSWERS: parsed.answers_differ,
        Fate.EMPTY_RATIONALE: not parsed.rationale,
        Fate.EMPTY_ANSWER: not parsed.answer,
        Fate.TOO_SHORT: rationale.rationale_tokens < limits.min_rationale_tokens,
        Fate.ANSWER_TOO_LONG: rationale.answer_tokens > limits.max_answer_tokens,
        Fate.OVER_MAX_LENGTH: room is not None and whole > room,
        Fate.WRONG_ANSWER: limits.check_answer and rationale.right is False,
    }
    rationale.fate = next((fate for fate, applies in faults.items() if applies), None)
    return rationale
