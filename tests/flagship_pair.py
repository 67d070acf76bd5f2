"""A tiny pair with the tokenizers of the flagship: Meditron-70B's (Llama 2) and Qwen2-1.5B's.

The teacher is a base model: SentencePiece's word marks, bytes for what its vocabulary lacks, a BOS before every text,
no chat template. The student is a chat model: byte-level BPE over NFC, no BOS. They differ in width and heads too.
"""

import json
from functools import cache

import torch
from conftest import CHAT_TEMPLATE, CORPUS
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _trained(tokenizer: Tokenizer, first: list[str], alphabet: list[str], vocab_size: int) -> dict:
    """Vocabulary and merges of a BPE trained on the packaged sample."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


@cache
def _llama_parts() -> dict:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return _trained(tokenizer, ["<unk>", "<s>", "</s>", *BYTES], [], 700)


@cache
def _qwen_parts() -> dict:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _trained(tokenizer, [], pre_tokenizers.ByteLevel.alphabet(), 600)


def llama_tokenizer() -> PreTrainedTokenizerBase:
    """As Meditron's."""
    return LlamaTokenizer(**_llama_parts(), add_bos_token=True)


def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """As that of Qwen2's instruct models."""
    tokenizer = Qwen2Tokenizer(
        **_qwen_parts(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


SIZES = {"intermediate_size": 128, "max_position_embeddings": 512, "initializer_range": 0.1}


def llama_model(seed: int = 1) -> PreTrainedModel:
    """Four layers of eight heads."""
    torch.manual_seed(seed)
    tokenizer = llama_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 4,  # rows that no token has, as Meditron's
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **SIZES,
    )
    return LlamaForCausalLM(config)


def qwen_model(layers: int = 2, seed: int = 2) -> PreTrainedModel:
    """Four heads a layer."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SIZES,
    )
    return Qwen2ForCausalLM(config)
