"""Tiny models as the evaluation suite takes them, and data for them."""

import copy
import json
from pathlib import Path

import torch
from conftest import make_model
from tiny_setting import make_form
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.subjects import Pair, Subject
from medistill_trl.models import set_generation
from medistill_trl.prompts import PromptFormat

CONTEXT = 512  # of `make_model`


def tiny_tokenizer(**settings) -> PreTrainedTokenizerBase:
    """As `load_tokenizer` leaves it: pad is not EOS."""
    return make_form(**settings).tokenizer


def tiny_subject(
    name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, fingerprint: str
) -> Subject:
    """A subject around a model in memory."""
    set_generation(model, tokenizer)
    return Subject(name, PromptFormat(tokenizer), fingerprint, fingerprint, lambda: model, CONTEXT)


def tiny_pair(student_seed: int | None = 5, teacher_seed: int = 1) -> Pair:
    """Two tiny models with one tokenizer; with `student_seed` None the student is its teacher."""
    tokenizer = tiny_tokenizer()
    teacher = make_model(len(tokenizer), seed=teacher_seed)
    student = teacher if student_seed is None else make_model(len(tokenizer), 2, student_seed)
    return Pair(
        tiny_subject("student", tokenizer, student, f"student of seed {student_seed}"),
        tiny_subject("teacher", tokenizer, teacher, f"teacher of seed {teacher_seed}"),
        {"teacher_max_new_tokens": 12},
    )


def shuffled_vocabulary(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that predicts with the probabilities of the wrong tokens."""
    shuffled = copy.deepcopy(model)
    weight = shuffled.get_output_embeddings().weight
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))
    weight.data = weight.data[order]
    return shuffled


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
