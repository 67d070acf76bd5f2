"""Which of a prompt's rationales are kept, and the account of all of them.

The vote is self-consistency (Wang et al. 2022, arXiv 2203.11171): the answer most samples agree on is
the likeliest to be right. Keeping only rationales that end in the right answer is what Fine-tune-CoT
does (Ho et al. 2022, arXiv 2212.10071).
"""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from medistill_trl.rationales import Fate, Rationale


@dataclass(frozen=True)
class Selection:
    """What is kept of a prompt's rationales that pass the filters.

    Args:
        keep: `best`, `all` or `top_k`.
        top_k: How many `top_k` keeps, at most.
        rank_by: `vote` or `likelihood`; the other one decides ties, then the order they were drawn in.
        keep_contradictory: Keep rationales of one prompt whose answers differ.
    """

    keep: str
    top_k: int
    rank_by: str
    keep_contradictory: bool

    def count(self) -> int | None:
        """How many are kept of a prompt; None for all."""
        return {"best": 1, "top_k": self.top_k, "all": None}[self.keep]


def vote(rationales: Sequence[Rationale]) -> None:
    """Give every readable rationale of one prompt its share of the prompt's votes."""
    votes = Counter(r.key for r in rationales if r.key is not None)
    for rationale in rationales:
        if rationale.key is not None:
            rationale.vote = votes[rationale.key] / votes.total()


def drop_duplicates(rationales: Sequence[Rationale]) -> None:
    """Set aside what says the same as an earlier rationale of one prompt, word for word."""
    seen = set()
    for rationale in rationales:
        if rationale.fate is None:
            content = " ".join(rationale.rationale.casefold().split()), rationale.key
            if content in seen:
                rationale.fate = Fate.DUPLICATE
            seen.add(content)


def select(rationales: Sequence[Rationale], selection: Selection) -> list[Rationale]:
    """Decide all of one prompt's rationales that are still open; they must be scored.

    Returns:
        Those kept, best first.
    """

    def rank(rationale: Rationale) -> tuple[float, float, int]:
        scores = rationale.vote, rationale.score
        first, second = scores if selection.rank_by == "vote" else scores[::-1]
        return -first, -second, rationale.sample

    ranked = sorted((r for r in rationales if r.fate is None), key=rank)
    kept: list[Rationale] = []
    for rationale in ranked:
        if kept and rationale.key != kept[0].key and not selection.keep_contradictory:
            rationale.fate = Fate.CONTRADICTORY
        elif selection.count() is not None and len(kept) == selection.count():
            rationale.fate = Fate.NOT_SELECTED
        else:
            rationale.fate = Fate.KEPT
            kept.append(rationale)
    return kept


# --- the account -----------------------------------------------------------------------------------


def summary(groups: Sequence[Sequence[Rationale]], on_no_rationale: str) -> dict:
    """Counts of all that was drawn: kept and set aside, lengths, agreement, prompts left without.

    Args:
        groups: The rationales of each prompt, all decided.
        on_no_rationale: What is done with prompts that keep none: `fallback` or `drop`.
    """
    drawn = [rationale for group in groups for rationale in group]
    by_fate = {fate: sum(rationale.fate is fate for rationale in drawn) for fate in Fate}
    assert sum(by_fate.values()) == len(drawn), "a rationale has no fate"
    kept = [rationale for rationale in drawn if rationale.fate is Fate.KEPT]
    without = sum(all(r.fate is not Fate.KEPT for r in group) for group in groups)
    votes = [[r.vote for r in group if r.vote is not None] for group in groups]
    checked = [rationale.right for rationale in drawn if rationale.right is not None]
    return {
        "drawn": len(drawn),
        "by_fate": {str(fate): count for fate, count in by_fate.items()},
        "prompts": {
            "total": len(groups),
            "with_rationale": len(groups) - without,
            "fallback": without if on_no_rationale == "fallback" else 0,
            "dropped": without if on_no_rationale == "drop" else 0,
        },
        "kept": {
            "rationale_tokens": _spread([r.rationale_tokens for r in kept]),
            "answer_tokens": _spread([r.answer_tokens for r in kept]),
            "mean_log_likelihood_nats": _mean([r.score for r in kept]),
            "mean_vote": _mean([r.vote for r in kept]),
        },
        "agreement": {
            "readable": sum(map(len, votes)),
            "mean_majority_share": _mean([max(shares) for shares in votes if shares]),
        },
        "reference": {"compared": len(checked), "right": sum(checked)},
    }


def _spread(counts: Sequence[int]) -> dict | None:
    if not counts:
        return None
    return {"min": min(counts), "median": statistics.median(counts), "max": max(counts)}


def _mean(values: Sequence[float]) -> float | None:
    return round(statistics.mean(values), 4) if values else None


def to_text(content: dict) -> str:
    """A summary in two lines."""
    by_fate, prompts = content["by_fate"], content["prompts"]
    reasons = sorted(((n, fate) for fate, n in by_fate.items() if n and fate != Fate.KEPT))[::-1]
    aside = f" ({', '.join(f'{fate} {n}' for n, fate in reasons)})" if reasons else ""
    left = f", {prompts['fallback']} fall back to a plain answer" if prompts["fallback"] else ""
    left += f", {prompts['dropped']} are dropped" if prompts["dropped"] else ""
    return (
        f"rationales: {by_fate[Fate.KEPT]} of {content['drawn']} kept{aside}\n"
        f"prompts: {prompts['with_rationale']} of {prompts['total']} have a rationale{left}"
    )


def to_jsonl(groups: Sequence[Sequence[Rationale]]) -> str:
    """One line per drawn rationale."""
    rows = (asdict(rationale) for group in groups for rationale in group)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
