"""The bytes that each token of a vocabulary stands for, by the rules of its tokenizer's decoder.

Two vocabularies meet in bytes and nowhere else: `Ġdose` of a byte-level BPE, `▁dose` of a SentencePiece
model and ` dose` are the same five bytes, and `<0xCE>` is the byte that a byte-level BPE writes `Î`.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from medistill_trl.errors import UserError

CHAR_OF = bytes_to_unicode()  # GPT-2's byte alphabet
BYTE_OF = {char: byte for byte, char in CHAR_OF.items()}
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Decoder steps that change no token: they join tokens, or strip the text's leading space, for which see
# `TokenBytes.pieces`.
NEUTRAL = {"Fuse", "Strip"}


@dataclass(frozen=True)
class TokenBytes:
    """A vocabulary as bytes.

    Args:
        texts: Bytes of each token that is text, by id.
        special: Content of each special token, by id: the text does not show it.
        fallbacks: Ids of `<0xNN>` tokens, which stand for what the other tokens cannot write.
        replaced: What tokens have in place of a text's characters, as (▁, space); None if they are written in
            GPT-2's byte alphabet.
    """

    texts: dict[int, bytes]
    special: dict[int, str]
    fallbacks: frozenset[int]
    replaced: tuple[tuple[str, str], ...] | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "TokenBytes":
        """Read a tokenizer's vocabulary and decoder.

        Raises:
            UserError: its decoder does something else than byte-level BPE and SentencePiece models do.
        """
        steps = _decoder_steps(tokenizer)
        kinds = [step["type"] for step in steps]
        replaced = None if "ByteLevel" in kinds else _replaced(steps)
        to_bytes = _byte_level if replaced is None else _sentence_piece(replaced, kinds)
        added = tokenizer.added_tokens_decoder
        special = {id: token.content for id, token in added.items() if token.special}
        special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        texts = {id: text for text, id in tokenizer.get_vocab().items() if id not in special}
        fallbacks = [id for id, text in texts.items() if BYTE_TOKEN.fullmatch(text)]
        return cls(
            {id: to_bytes(text) for id, text in texts.items()},
            special,
            frozenset(fallbacks if "ByteFallback" in kinds else ()),
            replaced,
        )

    def by_bytes(self) -> dict[bytes, int]:
        """Bytes → the token that stands for them, a plain one before a `<0xNN>`."""
        order = sorted(self.texts, key=lambda id: (id in self.fallbacks, id), reverse=True)
        return {self.texts[id]: id for id in order if self.texts[id]}

    def spelled(self, text: bytes) -> str:
        """A text as the tokenizer's model gets it; without SentencePiece's space before it, and there up to a
        character that is not whole."""
        if self.replaced is None:
            return "".join(CHAR_OF[byte] for byte in text)
        spelled = _whole_characters(text)
        for char, meant in self.replaced:
            spelled = spelled.replace(meant, char)
        return spelled

    def pieces(self, ids: Sequence[int], text: str) -> list[bytes]:
        """The bytes of each token of a completion, so that joined they are the completion's text.

        Decoders of SentencePiece models drop the space that their tokenizers put in front of every text,
        so leading spaces that the text does not have are taken from the first tokens. A special token
        has no bytes, unless the text spells it out.

        Args:
            ids: Tokens that decode to the text, or that the text was encoded to.
        """
        pieces = [self._piece(id, text) for id in ids]
        extra = _leading_spaces(b"".join(pieces)) - _leading_spaces(text.encode())
        for n, piece in enumerate(pieces):
            if extra <= 0:
                break
            taken = min(extra, len(piece))
            pieces[n], extra = piece[taken:], extra - taken
        return pieces

    def _piece(self, id: int, text: str) -> bytes:
        if id in self.special:
            return self.special[id].encode() if self.special[id] in text else b""
        return self.texts.get(id, b"")  # rows of a head beyond the vocabulary are no text


def _decoder_steps(tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """The tokenizer's decoder as the library serialises it, a sequence flattened."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    advice = "take cross_tokenizer: refuse, and a method that passes text"
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer {name} is no `tokenizers` tokenizer: its tokens' bytes are not known; {advice}"
        )
    decoder = tokenizer.backend_tokenizer.decoder
    state = {"type": "none"} if decoder is None else json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = {step["type"] for step in steps}
    if kinds - NEUTRAL != {"ByteLevel"} and not kinds <= {
        "Replace",
        "Metaspace",
        "ByteFallback",
        *NEUTRAL,
    }:
        raise UserError(
            f"tokenizer {name} decodes by {', '.join(sorted(kinds))}; only byte-level BPE and "
            f"SentencePiece models (with ▁ and <0xNN>) are read as bytes; {advice}"
        )
    return steps


def _byte_level(token: str) -> bytes:
    """A token in GPT-2's alphabet; one with other characters was added as it is."""
    if all(char in BYTE_OF for char in token):
        return bytes(BYTE_OF[char] for char in token)
    return token.encode()


def _replaced(steps: list[dict]) -> tuple[tuple[str, str], ...]:
    """Characters that a decoder replaces, and what by."""
    replaced = []
    for step in steps:
        if step["type"] == "Metaspace":
            replaced.append((step["replacement"], " "))
        elif step["type"] == "Replace":
            replaced.append((step["pattern"]["String"], step["content"]))
    return tuple(replaced)


def _sentence_piece(
    replaced: tuple[tuple[str, str], ...], kinds: list[str]
) -> Callable[[str], bytes]:
    """A token in which another character stands for the space, or that is a single byte."""
    by_byte = "ByteFallback" in kinds

    def to_bytes(token: str) -> bytes:
        byte = BYTE_TOKEN.fullmatch(token) if by_byte else None
        if byte:
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return to_bytes


def _whole_characters(text: bytes) -> str:
    """Up to the first character that is not whole."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        return text[: error.start].decode()


def _leading_spaces(text: bytes) -> int:
    return len(text) - len(text.lstrip(b" "))
