"""Tokenizers of the two families a pair may be of, and changed copies of a tokenizer."""

import json

from conftest import CORPUS, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.sentence_piece import BYTES, train_sentence_piece

SPECIAL = ["<unk>", "<s>", "</s>"]
PLAIN = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}


def wrap(tokenizer: Tokenizer, **special) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def llama_like(vocab_size: int = 700, normalizer=None) -> PreTrainedTokenizerFast:
    """SentencePiece-style BPE, with an alphabet that leaves something to the bytes."""
    return train_sentence_piece(CORPUS, vocab_size, SPECIAL, 60, normalizer, **PLAIN)


def unigram(vocab_size: int = 700) -> PreTrainedTokenizerFast:
    """A SentencePiece unigram model with byte fallback and a Metaspace of its own."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    model = state["model"]
    model["vocab"] += [[token, -20.0] for token in BYTES]
    model["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace()],
    )
    return wrap(tokenizer, **PLAIN)


def composing(vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """Byte-level BPE that composes accents first, as Qwen2 does."""
    tokenizer = make_tokenizer(vocab_size)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def permuted(tokenizer: PreTrainedTokenizerFast, order: list[int]) -> PreTrainedTokenizerFast:
    """The same tokenizer with other ids: token `id` becomes token `order[id]`."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: order[id] for token, id in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] = order[token["id"]]
    return _like(tokenizer, state)


def without_merges(tokenizer: PreTrainedTokenizerFast, count: int) -> PreTrainedTokenizerFast:
    """The same tokenizer without its last merges, and without their tokens, which have the highest ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    kept = len(model["vocab"]) - count
    model["merges"] = model["merges"][:-count]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if id < kept}
    return _like(tokenizer, state)


def _like(tokenizer: PreTrainedTokenizerFast, state: dict) -> PreTrainedTokenizerFast:
    changed = wrap(Tokenizer.from_str(json.dumps(state)), **tokenizer.special_tokens_map)
    changed.chat_template = tokenizer.chat_template
    return changed
