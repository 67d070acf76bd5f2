"""How close a student is to its teacher: next-token distributions on the teacher's text, and its own text.

Pure functions first, then `measure_student`, which applies them to models.

Shapes: C completion tokens, V vocabulary.
"""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from eval.metrics.rouge import rouge
from eval.token_agreement import token_terms
from medistill_trl.losses.divergences import Distribution
from medistill_trl.prompts import PromptFormat
from medistill_trl.teacher import Sampling, complete, completion_logits

TOP_K = 5
# What the tables call it → what the evaluation suite does.
TERMS = {
    "ce": "student_nats",
    "kl": "kl_teacher_student_nats",
    "js": "js_nats",
    "top_k": f"overlap_at_{TOP_K}",
    "top_1": "overlap_at_1",
}
ROWS_PER_CHUNK = 256  # float32 copies of the logits are made for this many tokens at a time


# --- distributions


def token_sums(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, target_ids: torch.Tensor
) -> Counter:
    """Sums over the tokens of one completion, float32, nats at temperature 1.

    Args:
        student_logits: (C, V), the predictions of `target_ids`.
        teacher_logits: (C, V).
        target_ids: (C,).

    Returns:
        `tokens`, `ce`, `kl` (teacher ‖ student), `js` (at most ln 2 a token), `top_k` (shares of the
        teacher's `TOP_K` likeliest tokens that are also the student's) and `top_1`.
    """
    sums = Counter()
    for start in range(0, len(target_ids), ROWS_PER_CHUNK):
        rows = slice(start, start + ROWS_PER_CHUNK)
        student = Distribution.of(student_logits[rows].float())
        teacher = Distribution.of(teacher_logits[rows].float())
        terms = token_terms(student, teacher, target_ids[rows])
        sums["tokens"] += len(student.probs)
        # Adding counters would drop sums that are not positive.
        sums.update({name: terms[term].sum().item() for name, term in TERMS.items()})
    return sums


# --- text


def token_match(answer_ids: list[int], reference_ids: list[int]) -> float:
    """Share of positions that hold the same token; what one answer has and the other lacks differs."""
    longest = max(len(answer_ids), len(reference_ids))
    same = sum(a == b for a, b in zip(answer_ids, reference_ids, strict=False))
    return same / longest if longest else 1.0


# --- models


@dataclass(frozen=True)
class Answer:
    """What the teacher wrote on one prompt.

    Args:
        prompt: As rendered for the student.
        text: Without special tokens.
        token_ids: (C,), with the end token if the teacher chose one.
        teacher_logits: (C, V); None where only the student's cross-entropy is wanted.
    """

    prompt: str
    text: str
    token_ids: list[int]
    teacher_logits: torch.Tensor | None = None


def measure_student(
    student: PreTrainedModel,
    form: PromptFormat,
    training: list[Answer],
    heldout: list[Answer],
    max_new_tokens: int,
) -> dict[str, float]:
    """One student against its teacher.

    Args:
        student: In evaluation mode.
        form: Its prompt format.
        training: Answers it was trained on.
        heldout: Answers to prompts it was not trained on, greedy, with the teacher's logits.
        max_new_tokens: The limit the teacher wrote under.

    Returns:
        Means over tokens (`train_ce`, `heldout_ce`, `kl`, `js` in nats, `top_k`, `top_1` as shares) and
        over answers (`rouge_l`, `token_match`, `exact_match`, all from 0 to 1).
    """
    train_ce, train_tokens = 0.0, 0
    for answer in training:
        logits = completion_logits(student, form.encode(answer.prompt), answer.token_ids)
        targets = torch.tensor(answer.token_ids)
        train_ce += F.cross_entropy(logits.float(), targets, reduction="sum").item()
        train_tokens += len(targets)
    sums = Counter()
    for answer in heldout:
        logits = completion_logits(student, form.encode(answer.prompt), answer.token_ids)
        # Not `+=`, which drops sums that are not positive.
        sums.update(token_sums(logits, answer.teacher_logits, torch.tensor(answer.token_ids)))
    means = {name: sums[name] / sums["tokens"] for name in ("kl", "js", "top_k", "top_1")}
    return {
        "train_ce": train_ce / train_tokens,
        "heldout_ce": sums["ce"] / sums["tokens"],
        **means,
        **measure_text(student, form, heldout, max_new_tokens),
    }


def measure_text(
    student: PreTrainedModel, form: PromptFormat, heldout: list[Answer], max_new_tokens: int
) -> dict[str, float]:
    """The student's own greedy answers beside the teacher's; means over answers."""
    prompts = [answer.prompt for answer in heldout]
    written = complete(student, form, prompts, Sampling(max_new_tokens))
    own_ids = [w.token_ids + ([] if w.end_id is None else [w.end_id]) for w in written]
    pairs = list(zip(written, own_ids, heldout, strict=True))
    scores = {
        "rouge_l": [rouge(own.text, answer.text)["rouge_l"] for own, _, answer in pairs],
        "token_match": [token_match(ids, answer.token_ids) for _, ids, answer in pairs],
        "exact_match": [float(ids == answer.token_ids) for _, ids, answer in pairs],
    }
    return {name: sum(values) / len(values) for name, values in scores.items()}
