"""Questions with passages that may be longer than a model attends to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval.subjects import Subject
from medistill_trl.errors import UserError


@dataclass(frozen=True)
class Fitted:
    """A prompt that leaves room for an answer.

    Args:
        prompt: As rendered for the model; None where not even the question without passages fits.
        shortened: Whether passages lost their end for it.
    """

    prompt: str | None
    shortened: bool

    @property
    def too_long(self) -> bool:
        return self.prompt is None


def check_room(subjects: Sequence[Subject], answer_tokens: int, flag: str) -> None:
    """Refuse answers that leave no room for any question.

    Raises:
        UserError: naming the flag, such as `answer_tokens`.
    """
    for subject in subjects:
        if subject.context_length is not None and answer_tokens >= subject.context_length:
            raise UserError(
                f"--{flag}: must be below {subject.context_length}, the tokens that the {subject.name} "
                f"{subject.source} attends to, got {answer_tokens}"
            )


def fit(
    subject: Subject,
    ask: Callable[[Sequence[str]], str],
    passages: Sequence[str],
    answer_tokens: int,
) -> Fitted:
    """Ask with as much of the passages as the model can attend to, the longest cut first.

    Args:
        ask: From the passages to the question as a user would put it.
        answer_tokens: Room left for the answer.
    """
    room = None
    if subject.context_length is not None:
        room = subject.context_length - answer_tokens

    def attempt(words: int | None) -> str | None:
        kept = passages if words is None else [" ".join(p.split()[:words]) for p in passages]
        prompt = subject.form.render(ask(kept))
        fits = room is None or len(subject.form.encode(prompt)) <= room
        return prompt if fits else None

    prompt = attempt(None)
    if prompt is not None:
        return Fitted(prompt, False)
    shortest = attempt(0)
    if shortest is None:
        return Fitted(None, False)
    low, high = 0, max(len(passage.split()) for passage in passages)
    while high - low > 1:  # `low` words of each passage fit, `high` do not
        middle = (low + high) // 2
        attempted = attempt(middle)
        if attempted is None:
            high = middle
        else:
            low, shortest = middle, attempted
    return Fitted(shortest, True)
