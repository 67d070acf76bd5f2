"""A SentencePiece-style tokenizer of any text, as Llama-2 has it: ▁ for spaces and before every text, and
`<0xNN>` for what its tokens cannot write. For students whose tokenizer shall differ from their teacher's."""

import json
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.normalizers import Normalizer
from transformers import PreTrainedTokenizerFast

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def train_sentence_piece(
    texts: Iterable[str],
    vocab_size: int,
    special: Sequence[str],
    alphabet: int = 1000,
    normalizer: Normalizer | None = None,
    **names: str,
) -> PreTrainedTokenizerFast:
    """
    Args:
        texts: What it is trained on.
        special: Special tokens; the first are the lowest ids.
        alphabet: Characters that get a token of their own, the most frequent first.
        normalizer: What is done to a text first.
        names: `eos_token` and so on.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(([normalizer] if normalizer else []) + steps)
    # For training alone: no token goes beyond a word.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?<!▁)(?=▁)"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *BYTES],
        limit_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = None
    # The trainer makes special tokens of all it is given; the bytes are text.
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in special]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **names)
