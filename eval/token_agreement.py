"""How far two models' next-token distributions are apart, token by token.

Float32, nats, temperature 1. The logits of both models exist for one chunk of tokens at a time.

Shapes: N tokens, R tokens of a block, V shared vocabulary, K the largest of `TOP_K`.
"""

import torch

from medistill_trl.losses.chunked import CHUNK_SIZE, Side, blocks, require_same_vocabulary
from medistill_trl.losses.divergences import Distribution, jsd, kl

TOP_K = (1, 5, 10, 50)


def token_terms(
    student: Distribution, teacher: Distribution, targets_R: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What is known about each token, (R,) each.

    Args:
        targets_R: Token ids that were predicted.

    Returns:
        `kl_teacher_student_nats` and `kl_student_teacher_nats`; `js_nats`, the Jensen-Shannon divergence (at most ln 2;
        scipy's `jensenshannon` is its square root); `overlap_at_K`, the share of the teacher's K
        likeliest tokens that are among the student's (at K = 1 the top-1 agreement);
        `teacher_mass_at_K`, the probability the teacher gives to the student's K likeliest tokens;
        `student_nats` and `teacher_nats`, −log p of the target.
    """
    terms = {
        "kl_teacher_student_nats": kl(teacher, student),
        "kl_student_teacher_nats": kl(student, teacher),
        # Both KLs are 0 for the same distributions to the last bit; this one only up to rounding.
        "js_nats": jsd(student, teacher, beta=0.5)[0].clamp_min_(0),
        "student_nats": -_log_prob(student, targets_R),
        "teacher_nats": -_log_prob(teacher, targets_R),
    }
    largest = min(max(TOP_K), student.probs.shape[1])
    student_top_RK, teacher_top_RK = (p.probs.topk(largest).indices for p in (student, teacher))
    same_RKK = student_top_RK[:, :, None] == teacher_top_RK[:, None, :]
    mass_RK = teacher.probs.gather(1, student_top_RK).cumsum(1)
    for k in TOP_K:
        size = min(k, largest)
        terms[f"overlap_at_{k}"] = same_RKK[:, :size, :size].sum((1, 2)) / size
        terms[f"teacher_mass_at_{k}"] = mass_RK[:, size - 1]
    return terms


def _log_prob(distribution: Distribution, targets_R: torch.Tensor) -> torch.Tensor:
    return (distribution.shifted.gather(1, targets_R[:, None]) - distribution.log_norm)[:, 0]


@torch.no_grad()
def compare_states(
    student: Side, teacher: Side, targets_N: torch.Tensor, chunk_size: int = CHUNK_SIZE
) -> dict[str, torch.Tensor]:
    """`token_terms` of many tokens, from both models' hidden states, (N,) each.

    Args:
        student: States that predict the targets, and the head, narrowed to the shared vocabulary, over
            which the distributions are then renormalised.
        teacher: The same, for the same tokens.
        targets_N: At least one token id, below the size of the shared vocabulary.
        chunk_size: Tokens whose logits exist at a time.
    """
    parts = []
    for start in range(0, len(targets_N), chunk_size):
        chunk = slice(start, start + chunk_size)
        parts += _compare_chunk(student, teacher, targets_N, chunk)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _compare_chunk(
    student: Side, teacher: Side, targets_N: torch.Tensor, chunk: slice
) -> list[dict[str, torch.Tensor]]:
    """A function of its own so that a chunk's logits are freed before the next one's are made."""
    student_CV = student.project(chunk).logits_CV
    teacher_CV = teacher.project(chunk).logits_CV.to(student_CV.device)
    require_same_vocabulary(student_CV, teacher_CV)
    with torch.autocast(student_CV.device.type, enabled=False):
        return [
            token_terms(
                Distribution.of(student_CV[rows]),
                Distribution.of(teacher_CV[rows]),
                targets_N[chunk][rows],
            )
            for rows in blocks(student_CV)
        ]
