"""A small cross-encoder for natural language inference, trained from scratch on findings at joints.

    premise  The knee shows swelling.
    claim    The knee lacks swelling.     → contradiction

It knows one finding at a time and no other words: enough to prove that real cross-encoders are trained, saved,
loaded, asked and read right.
"""

import random
from pathlib import Path

import torch
from sentence_transformers import CrossEncoder
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

JOINTS = ("knee", "hip", "wrist", "elbow")
FINDINGS = ("swelling", "redness", "warmth")
LABELS = ("neutral", "contradiction", "entailment")  # not in the order of any well-known model
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def statement(joint: str, finding: str, holds: bool) -> str:
    return f"The {joint} {'shows' if holds else 'lacks'} {finding}."


def example(rng: random.Random) -> tuple[str, str, int]:
    """A premise, a claim and the number of its label."""
    joint, finding, holds, claimed = (*_place(rng), *rng.choices((True, False), k=2))
    if rng.random() < 0.6:
        label = "entailment" if claimed == holds else "contradiction"
        return (
            statement(joint, finding, holds),
            statement(joint, finding, claimed),
            LABELS.index(label),
        )
    other = _place(rng)
    while other == (joint, finding):
        other = _place(rng)
    return statement(joint, finding, holds), statement(*other, claimed), LABELS.index("neutral")


def _place(rng: random.Random) -> tuple[str, str]:
    return rng.choice(JOINTS), rng.choice(FINDINGS)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, ".", "the", "shows", "lacks", *JOINTS, *FINDINGS]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def train(folder: Path, steps: int = 300) -> Path:
    """Train it and save it as `CrossEncoder` does."""
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,  # with the usual 0.02 so small a model learns only after thousands of steps
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        premises, claims, labels = zip(*(example(rng) for _ in range(64)), strict=True)
        batch = tokenizer(list(premises), list(claims), padding=True, return_tensors="pt")
        loss = model(**batch, labels=torch.tensor(labels)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    plain = folder.with_name(f"{folder.name}-plain")
    model.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    CrossEncoder(str(plain)).save_pretrained(str(folder))
    return folder
