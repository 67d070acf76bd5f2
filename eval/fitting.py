"""Questions with passages that may be longer than a model attends to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval.subjects import Subject
from medistill_trl.errors import UserError


@dataclass(frozen=True)
class Fitted:
    """A prompt that leaves room for an answer.

    Args:
        prompt: As rendered for the model.
        shortened: Whether passages lost their end for it.
    """

    prompt: str
    shortened: bool


def fit(
    subject: Subject,
    ask: Callable[[Sequence[str]], str],
    passages: Sequence[str],
    answer_tokens: int,
    name: str,
) -> Fitted:
    """Ask with as much of the passages as the model can attend to, the longest cut first.

    Args:
        ask: From the passages to the question as a user would put it.
        answer_tokens: Room left for the answer.
        name: Of the row, for the error.

    Raises:
        UserError: not even the question without passages fits.
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
        raise UserError(
            f"{name}: the question alone leaves no room for {answer_tokens} tokens of answer, since the "
            f"{subject.name} {subject.source} attends to {subject.context_length} tokens; lower the "
            "number of answer tokens, or leave the row out of the data"
        )
    low, high = 0, max(len(passage.split()) for passage in passages)
    while high - low > 1:  # `low` words of each passage fit, `high` do not
        middle = (low + high) // 2
        attempted = attempt(middle)
        if attempted is None:
            high = middle
        else:
            low, shortest = middle, attempted
    return Fitted(shortest, True)
