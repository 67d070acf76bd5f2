"""What two vocabularies have in common, as outcomes that both models' next-token distributions have.

A text token is shared if the other side has one of the same bytes. A token that only one side has still says
how the text goes on: its text begins with a shared token. So it counts for the first piece that the other
tokenizer cuts it into, and if that is not shared either, for the first piece of that piece:

    only the teacher has Ġhypertension  →  the student cuts ▁hyper|tension, and only it has ▁hyper
                                        →  the teacher cuts Ġhyp|er, and Ġhyp and ▁hyp are shared

Each piece is shorter than what it begins, so this ends. A model whose tokens are cut further, but which gives
every text the same probability, gets the same distribution over the outcomes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from medistill_trl.token_bytes import TokenBytes

# A SentencePiece tokenizer puts a space before a text; after a line break it does not.
OPENINGS = ("", "\n")


@dataclass(frozen=True)
class Overlap:
    """The outcomes two vocabularies share, numbered from 0.

    Special tokens are shared if they have the same name, and the two end tokens always are. Those of one
    side only have no outcome, nor has what the other side cannot write or what ends inside a character.

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
        tokenizers = student, teacher
        sides = [TokenBytes.of(tokenizer) for tokenizer in tokenizers]
        ends = student.eos_token_id, teacher.eos_token_id
        pairs = sorted(
            {ends, *_shared(_named(sides, ends)), *_shared([s.by_bytes() for s in sides])}
        )
        ids = [list(column) for column in zip(*pairs, strict=True)]
        number = {sides[0].texts.get(one): n for n, (one, _) in enumerate(pairs)}
        pieces = [
            first_pieces(tokenizer, side, set(other.texts.values()) - number.keys())
            for tokenizer, side, other in zip(tokenizers, sides, sides[::-1], strict=True)
        ]
        outcomes = [{id: n for n, id in enumerate(column)} for column in ids]
        for side in (0, 1):
            for id, text in sides[side].texts.items():
                found = _outcome(text, number, pieces, 1 - side)
                if found is not None:
                    outcomes[side].setdefault(id, found)
        return cls(*ids, *outcomes)

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


def _outcome(
    text: bytes, number: dict[bytes, int], pieces: list[dict[bytes, bytes]], cutter: int
) -> int | None:
    """The outcome of a token, cut by one side and the other in turn until it is shared."""
    while text not in number:
        if text not in pieces[cutter]:
            return None
        text, cutter = pieces[cutter][text], 1 - cutter
    return number[text]


def first_pieces(
    tokenizer: PreTrainedTokenizerBase, table: TokenBytes, texts: Iterable[bytes]
) -> dict[bytes, bytes]:
    """The first token that a tokenizer cuts each text into when it goes on from another; as bytes.

    What is no whole text (a part of a character) or merges with what goes before is left out.
    """
    whole = sorted(text for text in texts if text and _is_whole(text))
    found = {}
    for opening in OPENINGS:
        missing = [text for text in whole if text not in found]
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(
            [opening + text.decode() for text in missing], add_special_tokens=False
        )
        for text, encoding in zip(missing, encodings, strict=True):
            piece = _first_of_last(text, [table.texts.get(id, b"") for id in encoding.ids])
            if piece is not None:
                found[text] = piece
    return found


def _first_of_last(text: bytes, pieces: list[bytes]) -> bytes | None:
    """The first of the last pieces that together are the text; None if there are no such."""
    for n in reversed(range(len(pieces))):
        rest = b"".join(pieces[n:])
        if rest == text and pieces[n]:
            return pieces[n]
        if len(rest) > len(text):
            return None
    return None


def _is_whole(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
