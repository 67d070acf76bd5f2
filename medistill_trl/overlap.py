"""What two vocabularies have in common, as outcomes that both models' next-token distributions have.

A text token is shared if the other side has one of the same bytes. A token that only one side has still says
how the text goes on: its text begins with a shared token. So it counts for the first piece that the other
tokenizer cuts it into, and if that is not shared either, for the first piece of that piece:

    only the teacher has Ġhypertension  →  the student cuts ▁hyper|tension, and only it has ▁hyper
                                        →  the teacher cuts Ġhyp|er, and Ġhyp and ▁hyp are shared

Each piece is shorter than what it begins, so this ends. A model whose tokens are cut further, but which gives
every text the same probability, gets the same distribution over the outcomes.

What is left says no text that the other side could: special tokens, and bytes that the other lacks. They are one
outcome, the *tail*.
"""

from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from medistill_trl.token_bytes import TokenBytes


@dataclass(frozen=True)
class Overlap:
    """The outcomes two vocabularies share, numbered from 0; the tail is the last.

    Special tokens are shared if they have the same name, and the two end tokens always are. A student whose tokens
    all have an outcome has no tail, and cannot learn its teacher's: then the teacher's has no outcome.

    Args:
        student_ids, teacher_ids: The shared tokens, in the outcomes' order.
        student_outcomes, teacher_outcomes: Outcome of each token that has one, by id.
    """

    student_ids: list[int]
    teacher_ids: list[int]
    student_outcomes: dict[int, int]
    teacher_outcomes: dict[int, int]

    @classmethod
    def of(cls, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> "Overlap":
        cutters = [Cutter(tokenizer, TokenBytes.of(tokenizer)) for tokenizer in (student, teacher)]
        sides = [cutter.table for cutter in cutters]
        ends = student.eos_token_id, teacher.eos_token_id
        pairs = sorted(
            {ends, *_shared(_named(sides, ends)), *_shared([s.by_bytes() for s in sides])}
        )
        ids = [list(column) for column in zip(*pairs, strict=True)]
        number = {sides[0].texts.get(one): n for n, (one, _) in enumerate(pairs)}
        outcomes = [{id: n for n, id in enumerate(column)} for column in ids]
        for side in (0, 1):
            for id, text in sides[side].texts.items():
                found = _outcome(text, number, [cutters[1 - side], cutters[side]])
                if found is not None:
                    outcomes[side].setdefault(id, found)
        tails = [
            (table.texts.keys() | table.special.keys()) - found.keys()
            for table, found in zip(sides, outcomes, strict=True)
        ]
        if tails[0]:
            for found, tail in zip(outcomes, tails, strict=True):
                found |= dict.fromkeys(tail, len(pairs))
        return cls(*ids, *outcomes)

    @property
    def num_outcomes(self) -> int:
        """With the tail, if there is one."""
        return max(self.student_outcomes.values()) + 1

    @cached_property
    def partners(self) -> dict[int, int]:
        """A shared token of the student → the teacher's."""
        return dict(zip(self.student_ids, self.teacher_ids, strict=True))


def _named(sides: list[TokenBytes], ends: tuple[int, int]) -> list[dict[str, int]]:
    """Special tokens but the end, by name."""
    return [
        {name: id for id, name in side.special.items() if id != end}
        for side, end in zip(sides, ends, strict=True)
    ]


def _shared(sides: list[dict]) -> list[tuple[int, int]]:
    student, teacher = sides
    return [(id, teacher[key]) for key, id in student.items() if key in teacher]


def _outcome(text: bytes, number: dict[bytes, int], cutters: list["Cutter"]) -> int | None:
    """The outcome of a token, cut by the one side and the other in turn until it is shared."""
    turn = 0
    while text not in number:
        piece = cutters[turn].first_piece(text)
        if not piece:
            return None
        text, turn = piece, 1 - turn
    return number[text]


@dataclass(frozen=True)
class Cutter:
    """A tokenizer's model, which cuts texts that go on from others.

    Args:
        table: Its vocabulary.
    """

    tokenizer: PreTrainedTokenizerBase
    table: TokenBytes

    def first_piece(self, text: bytes) -> bytes | None:
        """The first token that a text is cut into, as bytes; None if the vocabulary cannot write it, or has it whole.

        A SentencePiece model writes a character that is not whole in single bytes.
        """
        # Not the tokenizer itself, which would put a space before the text, and cannot take half a character.
        spelled = self.table.spelled(text)
        tokens = self.tokenizer.backend_tokenizer.model.tokenize(spelled) if spelled else []
        piece = self.table.texts.get(tokens[0].id, b"") if tokens else text[:1]
        shorter = 0 < len(piece) < len(text) and text.startswith(piece)
        return piece if shorter else None
