"""Claims against evidence: what the passages say of each claim, and whether its citations hold.

A claim is `supported` if some passage entails it, `contradicted` if a passage contradicts it more surely than any
entails it, `unsupported` otherwise. Citations are judged as in ALCE (Gao et al. 2023, arXiv 2305.14627): do the
cited passages together entail the claim, and is each of them needed? A claim that cites a passage which is not there
is not recalled, and its citations have no precision. Passages are numbered from 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from eval.claims import Claim
from eval.verifier import Pair, Verdict, Verifier

THRESHOLD = 0.5  # of a probability; with three classes, then none other is as likely
SUPPORTED, CONTRADICTED, UNSUPPORTED = BINS = ("supported", "contradicted", "unsupported")

Passages = tuple[int, ...]  # numbers of passages that are read as one premise


@dataclass(frozen=True)
class JudgedClaim:
    """A claim with what the passages say of it.

    Args:
        claim: Its text and citations.
        passages: How many there are.
        verdicts: Of each passage alone, of the cited ones together, and of those without each one of them.
    """

    claim: Claim
    passages: int
    verdicts: dict[Passages, Verdict]

    @property
    def support(self) -> float:
        """The highest entailment among the passages; 0 without any."""
        return max((self._alone(n).entailment for n in self._numbers), default=0.0)

    @property
    def contradiction(self) -> float:
        """The highest contradiction among the passages; 0 without any."""
        return max((self._alone(n).contradiction for n in self._numbers), default=0.0)

    @property
    def bin(self) -> str:
        """Where passages disagree, the surer one decides; support in a tie."""
        if self.support >= THRESHOLD and self.support >= self.contradiction:
            return SUPPORTED
        return CONTRADICTED if self.contradiction >= THRESHOLD else UNSUPPORTED

    @property
    def cited(self) -> Passages:
        """The passages that count as cited, see `cited`."""
        return cited(self.claim, self.passages)

    @property
    def is_recalled(self) -> bool:
        """Whether the cited passages together entail the claim; not so without citations, or with an invented one."""
        return self._entails(self.cited)

    def is_precise(self, citation: int) -> bool:
        """Whether a citation helps: the claim is recalled, and this passage entails it alone or the others do not."""
        if not self.is_recalled:
            return False
        return self._entails((citation,)) or not self._entails(_without(self.cited, citation))

    @property
    def _numbers(self) -> range:
        return range(1, self.passages + 1)

    def _alone(self, number: int) -> Verdict:
        return self.verdicts[(number,)]

    def _entails(self, passages: Passages) -> bool:
        return bool(passages) and self.verdicts[passages].entailment >= THRESHOLD


def existing(claim: Claim, passages: int) -> Passages:
    """The numbers a claim cites for which there is a passage, in the passages' order."""
    return tuple(sorted(number for number in claim.citations if 1 <= number <= passages))


def cited(claim: Claim, passages: int) -> Passages:
    """The passages a claim rests on by its citations; none if one of them is invented."""
    found = existing(claim, passages)
    return found if len(found) == len(claim.citations) else ()


def wanted(claim: Claim, passages: int) -> list[Passages]:
    """The premises a claim must be judged against, each once."""
    alone = [(number,) for number in range(1, passages + 1)]
    named = cited(claim, passages)
    together = [named, *(_without(named, number) for number in named)]
    return list(dict.fromkeys([*alone, *filter(None, together)]))


def judge_claims(
    answers: Sequence[tuple[Sequence[Claim], Sequence[str]]], verifier: Verifier
) -> list[list[JudgedClaim]]:
    """Judge the claims of some answers, all in one go.

    Args:
        answers: The claims of each answer, and its evidence.

    Returns:
        For each answer its claims in order.
    """
    pairs: dict[Pair, None] = {}
    for claims, evidence in answers:
        for claim in claims:
            for numbers in wanted(claim, len(evidence)):
                pairs[premise(evidence, numbers), claim.text] = None
    verdicts = dict(zip(pairs, verifier.judge(list(pairs)), strict=True))

    def judged(claim: Claim, evidence: Sequence[str]) -> JudgedClaim:
        found = {
            numbers: verdicts[premise(evidence, numbers), claim.text]
            for numbers in wanted(claim, len(evidence))
        }
        return JudgedClaim(claim, len(evidence), found)

    return [[judged(claim, evidence) for claim in claims] for claims, evidence in answers]


def mutual_entailment(
    pairs: Sequence[tuple[Sequence[str], Sequence[str]]], verifier: Verifier
) -> list[list[list[float]]]:
    """How far the claims of two answers say the same: the lower of the entailments either way.

    Args:
        pairs: The claims of one answer, and those of the other.

    Returns:
        For each pair a row for each claim of the first, with a number for each claim of the second; 1 for the same
        words.
    """
    asked: dict[Pair, None] = {}
    for first, second in pairs:
        for one in first:
            for other in second:
                if one != other:
                    asked |= {(one, other): None, (other, one): None}
    verdicts = dict(zip(asked, verifier.judge(list(asked)), strict=True))

    def lower(one: str, other: str) -> float:
        if one == other:
            return 1.0
        return min(verdicts[one, other].entailment, verdicts[other, one].entailment)

    return [[[lower(one, other) for other in second] for one in first] for first, second in pairs]


def premise(evidence: Sequence[str], numbers: Passages) -> str:
    return " ".join(evidence[number - 1] for number in numbers)


def _without(passages: Passages, number: int) -> Passages:
    return tuple(other for other in passages if other != number)
