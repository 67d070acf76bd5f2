"""Cross-entropy and distillation from hidden states, without a batch × time × vocabulary tensor.

    L = Σ_t (1−α) CE_t + α w_t T_t² D(p_T, p_S; T_t)

over completion tokens t, with CE at temperature 1 and the divergence D between the two models'
distributions at temperature T_t (Hinton et al. 2015, arXiv 1503.02531). `chunked` says how.

Sums for the log: `tokens`, `ce`, `student_entropy`; if α = 0, `correct` (the target is the likeliest token);
if α > 0, `teacher_entropy`, `kl` (forward, at temperature 1), `divergence` (at the temperature used, without α, w and T²), `agreed` (same likeliest token), with a fold
`teacher_shared_mass` (the teacher's probability of tokens that both have); and if temperatures differ,
`temperature` (sum), `temperature_min`, `temperature_max`, and for a rule with bounds `clipped_low`,
`clipped_high` (counts of tokens at a bound).

Shapes: B batch, T time, N completion tokens of the batch, C tokens of a chunk, H hidden size (each model
has its own), V shared vocabulary.
"""

from collections.abc import Callable, Sequence

import torch

from medistill_trl.losses.chunked import (
    CHUNK_SIZE,
    Side,
    blocks,
    require_same_vocabulary,
    token_sum,
)
from medistill_trl.losses.divergences import Distribution, Divergence, forward_kl, hellinger, kl
from medistill_trl.losses.heads import OutputHead
from medistill_trl.losses.overlap import Fold
from medistill_trl.losses.token_terms import InverseConfidence, Objective, TemperatureRule

IGNORE_INDEX = -100  # label of a token that is not trained on, as in Transformers


def completion_states(
    hidden_BTH: torch.Tensor, labels_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states that predict completion tokens, and those tokens.

    The causal shift happens here and nowhere else: the state at position t predicts token t + 1.

    Args:
        hidden_BTH: Last hidden states, after the final norm.
        labels_BT: Token ids, `IGNORE_INDEX` outside the completion.

    Returns:
        (N, H) and (N,), in reading order. A teacher with prompts of its own has labels of its own; its
        rows correspond to the student's one to one if the completions are the same.
    """
    predicted_BT = labels_BT[:, 1:] != IGNORE_INDEX
    return hidden_BTH[:, :-1][predicted_BT], labels_BT[:, 1:][predicted_BT]


def distillation_loss(
    student_hidden_NH: torch.Tensor,
    targets_N: torch.Tensor,
    student_head: OutputHead,
    teacher_hidden_NH: torch.Tensor | None = None,
    teacher_head: OutputHead | None = None,
    *,
    alpha: float,
    temperature: float | torch.Tensor | TemperatureRule = 1.0,
    divergence: Divergence = forward_kl,
    divergence_weights_N: torch.Tensor | None = None,
    vocab_size: int | None = None,
    fold: Fold | None = None,
    chunk_size: int = CHUNK_SIZE,
    metrics: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Σ over tokens of (1−α)·CE + α·w·T²·D, to be divided by the caller, and sums for the log.

    Args:
        student_hidden_NH: States that predict the targets, from `completion_states`. N may be 0.
        targets_N: Token ids below `vocab_size`.
        student_head: Gets gradients where its tensors require them.
        teacher_hidden_NH: The teacher's states for the same tokens; None, and not looked at, if α = 0.
        teacher_head: Never gets gradients; like the states at α = 0.
        alpha: Weight of the divergence, 0 to 1.
        temperature: Of the divergence: one for all; (N,), one per token; or a rule evaluated on each
            block's log-probabilities. The gradient takes it as a constant.
        divergence: From `divergences.by_name`.
        divergence_weights_N: w, on the divergence alone; 0 leaves a token to the cross-entropy. To drop
            a token altogether, give it no target. None for 1.
        vocab_size: Tokens the models share; both distributions are renormalised over them. None if both
            heads have the same rows.
        fold: For models of different vocabularies, instead of `vocab_size`: the divergence is over the
            outcomes they share, CE over the student's own vocabulary.
        chunk_size: Tokens whose logits exist at a time.
        metrics: Also return the sums over tokens that the module's docstring lists.

    Returns:
        The loss, a scalar, and the sums, without gradient; `tokens` is always among them.

    Raises:
        ValueError: arguments out of range, or that do not fit each other.
    """
    if alpha > 0 and (teacher_hidden_NH is None or teacher_head is None):
        raise ValueError(f"alpha {alpha} needs the teacher's hidden states and head")
    student = Side.of(student_hidden_NH, student_head, vocab_size)
    teacher = Side.of(teacher_hidden_NH, teacher_head, vocab_size) if alpha > 0 else None
    temperatures = temperature_per_token(temperature, targets_N, student.dtype)
    objective = Objective(alpha, divergence, temperatures, divergence_weights_N, fold, metrics)
    lengths = [len(student_hidden_NH), len(targets_N)]
    lengths += [] if teacher is None else [len(teacher_hidden_NH)]
    validate(objective, lengths, chunk_size)
    loss, terms = token_sum(objective, student, targets_N, teacher, chunk_size)
    sums = sums_for_log(terms, temperature) if metrics else {}
    sums["tokens"] = torch.tensor(float(len(targets_N)), device=loss.device)
    return loss, sums


def cross_entropy(
    hidden_BTH: torch.Tensor,
    labels_BT: torch.Tensor,
    head: OutputHead,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Σ over completion tokens of −log p_S, to be divided by the caller, and sums for the log.

    Args:
        hidden_BTH, labels_BT: As in `completion_states`.
        head: The student's.
        chunk_size: Tokens whose logits exist at a time.
    """
    states_NH, targets_N = completion_states(hidden_BTH, labels_BT)
    return distillation_loss(states_NH, targets_N, head, alpha=0.0, chunk_size=chunk_size)


@torch.no_grad()
def token_scores(
    student_hidden_NH: torch.Tensor,
    teacher_hidden_NH: torch.Tensor,
    student_head: OutputHead,
    teacher_head: OutputHead,
    *,
    score: str = "forward_kl",
    vocab_size: int | None = None,
    fold: Fold | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """How far student and teacher are apart on each token at temperature 1, without gradient.

    For temperatures and token selections that compare a token with the others (AdaKD, arXiv 2510.11615),
    so need all scores first. It costs both head products once more.

    Args:
        score: `forward_kl` (nats) or `hellinger` (0 to 1).
        vocab_size, fold: As in `distillation_loss`.

    Returns:
        (N,), float32.
    """
    distance = score_by_name(score)
    student = Side.of(student_hidden_NH, student_head, vocab_size)
    teacher = Side.of(teacher_hidden_NH, teacher_head, vocab_size)
    result_N = student_hidden_NH.new_empty(len(student_hidden_NH), dtype=student.dtype)
    for start in range(0, len(result_N), chunk_size):
        chunk = slice(start, start + chunk_size)
        student_CV, teacher_CV = student.project(chunk).logits_CV, teacher.project(chunk).logits_CV
        if fold is None:
            require_same_vocabulary(student_CV, teacher_CV)
        with torch.autocast(student_CV.device.type, enabled=False):
            for rows in blocks(student_CV):
                pair = Distribution.of(student_CV[rows]), Distribution.of(teacher_CV[rows])
                result_N[chunk][rows] = distance(*(pair if fold is None else fold.fold(*pair)))
    return result_N


def score_by_name(name: str) -> Callable[[Distribution, Distribution], torch.Tensor]:
    """(student, teacher) → distance (R,), see `token_scores`."""
    scores = {"forward_kl": lambda student, teacher: kl(teacher, student), "hellinger": hellinger}
    if name not in scores:
        raise ValueError(f"score {name!r} does not exist; one of {', '.join(scores)}")
    return scores[name]


def temperature_per_token(
    temperature: float | torch.Tensor | TemperatureRule, targets_N: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | TemperatureRule | None:
    """As `Objective` takes it: None for 1."""
    if not isinstance(temperature, int | float):
        return temperature
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if temperature == 1:
        return None
    return targets_N.new_full(targets_N.shape, temperature, dtype=dtype)


def sums_for_log(
    terms: dict[str, torch.Tensor], temperature: float | torch.Tensor | TemperatureRule
) -> dict[str, torch.Tensor]:
    """What the log gets, float32."""
    sums = {name: term_N.sum().float() for name, term_N in terms.items()}
    if isinstance(temperature, int | float) or "temperature" not in terms:
        sums.pop("temperature", None)
        return sums
    temperature_N = terms["temperature"].float()
    infinity = temperature_N.new_tensor([float("inf")])  # of no tokens
    sums["temperature_min"] = torch.cat([temperature_N, infinity]).min()
    sums["temperature_max"] = torch.cat([temperature_N, -infinity]).max()
    if isinstance(temperature, InverseConfidence):
        sums["clipped_low"] = (temperature_N <= temperature.minimum).sum().float()
        sums["clipped_high"] = (temperature_N >= temperature.maximum).sum().float()
    return sums


def validate(objective: Objective, lengths: Sequence[int], chunk_size: int) -> None:
    """Refuse what does not fit; the number of tokens must be the same throughout `lengths`."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if len(set(lengths)) > 1:
        raise ValueError(
            f"student, targets and teacher must be of the same tokens, got {list(lengths)} of them"
        )
    vectors = {
        "temperature": objective.temperature,
        "divergence_weights_N": objective.weights_N,
    }
    for name, vector in vectors.items():
        if isinstance(vector, torch.Tensor) and vector.shape != (lengths[0],):
            raise ValueError(f"{name} must be ({lengths[0]},), got {tuple(vector.shape)}")
