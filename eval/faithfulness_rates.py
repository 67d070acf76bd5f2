"""What becomes of judged answers: rates with intervals, clustered by prompt. Pure functions."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval.claims import Claims
from eval.statistics import (
    Estimate,
    auroc,
    balanced_accuracy,
    bootstrap_ratio_difference,
    clustered_mean,
    clustered_share,
    wilson,
)
from eval.support import BINS, SUPPORTED, THRESHOLD, JudgedClaim, existing

QUALITY = ("balanced_accuracy", "auroc")


@dataclass(frozen=True)
class Answer:
    """What a model answered to one prompt.

    Args:
        id: Of the prompt.
        evidence: The passages' texts, whole.
        text: As written.
        finished: False if the length limit ended it.
        shortened: Whether the model saw the passages without their ends.
        too_long: Whether not even the question without passages fits the model, so that it was not asked.
        claims: What the text states.
        judged: The claims with the verifier's verdicts; None without a verifier.
    """

    id: str
    evidence: tuple[str, ...]
    text: str
    finished: bool
    shortened: bool
    too_long: bool
    claims: Claims
    judged: list[JudgedClaim] | None = None


def rates(answers: Sequence[Answer], verifier: dict) -> dict:
    """What a model's answers come to.

    Args:
        verifier: Its quality, see `quality`; stands beside the rates.

    Returns:
        `answers` and `citations`, which need no verifier, and with one `claims`, `citations` and `verifier`.
    """
    found = {"answers": _answers(answers), "citations": _citations(answers)}
    if any(answer.judged is None for answer in answers):
        return found
    claims = _claims(answers) | {"verifier": {name: verifier[name] for name in QUALITY}}
    return {**found, "claims": claims, "citations": found["citations"] | _upheld(answers)}


def _answers(answers: Sequence[Answer]) -> dict:
    empty = [not answer.claims.claims for answer in answers]
    abstained = [
        none and answer.claims.abstentions > 0 for none, answer in zip(empty, answers, strict=True)
    ]
    return {
        "without_claims": wilson(sum(empty), len(empty)).to_dict(),
        "abstained": wilson(sum(abstained), len(abstained)).to_dict(),
        "cut_at_limit": sum(not answer.finished for answer in answers),
        "evidence_shortened": sum(answer.shortened for answer in answers),
        "questions_too_long": sum(answer.too_long for answer in answers),
        "claims": sum(len(answer.claims.claims) for answer in answers),
        "abstaining_sentences": sum(answer.claims.abstentions for answer in answers),
        "repeated_sentences": sum(answer.claims.repeated for answer in answers),
        "unfinished_sentences_left_out": sum(answer.claims.cut for answer in answers),
    }


def _citations(answers: Sequence[Answer]) -> dict:
    """Which claims cite, and whether what they cite is there."""
    cites = _over_claims(answers, lambda answer, n: bool(answer.claims.claims[n].citations))
    exist, clusters = [], []
    for answer in answers:
        for claim in answer.claims.claims:
            there = existing(claim, len(answer.evidence))
            exist += [number in there for number in claim.citations]
            clusters += [answer.id] * len(claim.citations)
    return {
        "claims_with_citation": cites.to_dict(),
        "existence": clustered_share(exist, clusters).to_dict(),
    }


def _claims(answers: Sequence[Answer]) -> dict:
    """Shares of claims in each bin, and the mean over answers of the supported share."""
    shares = {
        name: _over_claims(answers, lambda answer, n, name=name: answer.judged[n].bin == name)
        for name in BINS
    }
    hallucinated = _over_claims(answers, _is_hallucinated)
    stating = [answer for answer in answers if answer.judged]
    faithful = [
        sum(claim.bin == SUPPORTED for claim in answer.judged) / len(answer.judged)
        for answer in stating
    ]
    cut = [
        verdict.cut for a in stating for claim in a.judged for verdict in claim.verdicts.values()
    ]
    return {
        **{name: share.to_dict() for name, share in shares.items()},
        "hallucination": hallucinated.to_dict(),
        "faithfulness_by_answer": clustered_mean(faithful, [a.id for a in stating]).to_dict(),
        "pairs_cut": sum(cut),
        "pairs": len(cut),
    }


def _upheld(answers: Sequence[Answer]) -> dict:
    """Citation recall over claims and precision over citations; those of claims with an invented one are not counted
    (ALCE)."""
    precise, clusters = [], []
    for answer in answers:
        for claim in answer.judged:
            precise += [claim.is_precise(number) for number in claim.cited]
            clusters += [answer.id] * len(claim.cited)
    recall = _over_claims(answers, lambda answer, n: answer.judged[n].is_recalled)
    return {
        "recall": recall.to_dict(),
        "precision": clustered_share(precise, clusters).to_dict(),
    }


def _over_claims(answers: Sequence[Answer], holds: Callable[[Answer, int], bool]) -> Estimate:
    """The share of claims for which something holds."""
    hits, clusters = [], []
    for answer in answers:
        for number in range(len(answer.claims.claims)):
            hits.append(holds(answer, number))
            clusters.append(answer.id)
    return clustered_share(hits, clusters)


def _is_hallucinated(answer: Answer, number: int) -> bool:
    return answer.judged[number].bin != SUPPORTED


# --- two models


def student_minus_teacher(
    student: Sequence[Answer], teacher: Sequence[Answer], seed: int
) -> dict[str, dict]:
    """Differences of rates on the same prompts, with paired bootstrap intervals over prompts."""

    def counts(answers: Sequence[Answer], holds: Callable[[JudgedClaim], bool]):
        hits = [sum(map(holds, answer.judged)) for answer in answers]
        return hits, [len(answer.judged) for answer in answers]

    measures = {
        "hallucination": lambda claim: claim.bin != SUPPORTED,
        "citation_recall": lambda claim: claim.is_recalled,
    }
    return {
        name: bootstrap_ratio_difference(
            counts(student, holds), counts(teacher, holds), seed
        ).to_dict()
        for name, holds in measures.items()
    }


def agreement(ids: Sequence[str], scores: Sequence[list[list[float]]]) -> dict:
    """How much of what one model claims the other claims too: entailment both ways.

    Args:
        ids: Of the prompts.
        scores: For each prompt a row for each claim of the student, a number for each of the teacher's; see
            `mutual_entailment`.

    Returns:
        Shares of claims, of prompts on which both models claim something.
    """
    both = [(id, rows) for id, rows in zip(ids, scores, strict=True) if rows and rows[0]]
    shares = {}
    for name, tables in (
        ("student_claims_of_the_teacher", [rows for _, rows in both]),
        ("teacher_claims_of_the_student", [list(zip(*rows, strict=True)) for _, rows in both]),
    ):
        hits = [max(row) >= THRESHOLD for rows in tables for row in rows]
        clusters = [id for (id, _), rows in zip(both, tables, strict=True) for _ in rows]
        shares[name] = clustered_share(hits, clusters).to_dict()
    return {**shares, "prompts": len(both), "prompts_left_out": len(ids) - len(both)}


# --- the verifier


def quality(
    judged: Sequence[JudgedClaim], labels: Sequence[str], mismatched: Sequence[JudgedClaim]
) -> dict:
    """How well a verifier tells supported claims from others.

    Args:
        judged: Labelled claims with the verdicts of their own evidence.
        labels: `supported`, or anything else that is not supported: `refuted`, `unknown`.
        mismatched: Supported claims with the verdicts of evidence about something else.

    Returns:
        `balanced_accuracy` of the bin supported and `auroc` of the support score, on the labelled claims; None and
        a note where all have one label. `other_evidence`: the same for supported claims with their own evidence
        against `mismatched`, an easier task.
    """
    supported = [label == SUPPORTED for label in labels]
    found = {"labelled_claims": len(labels), "labels": dict(Counter(labels))}
    found |= _told_apart(judged, supported)
    if found["auroc"] is None:
        found["note"] = "the labelled claims are all of one kind: see other_evidence"
    own = [claim for claim, is_so in zip(judged, supported, strict=True) if is_so]
    both, truth = [*own, *mismatched], [True] * len(own) + [False] * len(mismatched)
    return found | {"other_evidence": {"claims": len(both), **_told_apart(both, truth)}}


def _told_apart(claims: Sequence[JudgedClaim], truth: Sequence[bool]) -> dict:
    return {
        "balanced_accuracy": balanced_accuracy([c.bin == SUPPORTED for c in claims], truth),
        "auroc": auroc([claim.support for claim in claims], truth),
    }


def sentence(name: str, found: dict, verifier: dict) -> str:
    """One line for the terminal: no rate without the verifier's quality beside it."""
    empty = found["answers"]["without_claims"]["value"]
    start = f"{name}: {found['answers']['claims']} claims, {empty:.0%} of the answers without any"
    if "claims" not in found:
        return start
    shown = ", ".join(f"{bin} {_percent(found['claims'][bin])}" for bin in (*BINS, "hallucination"))
    return f"{start}; {shown} ({verifier_sentence(verifier)})"


def verifier_sentence(verifier: dict) -> str:
    """The verifier's quality in words; from other evidence where the labels are all of one kind."""
    kind, found = "labelled claims", verifier
    if verifier["auroc"] is None:
        kind, found = "claims with other evidence", verifier["other_evidence"]
    if found["auroc"] is None:
        return "the verifier's own quality is not known: no labelled claims"
    return f"verifier on {kind}: balanced accuracy {found['balanced_accuracy']:.2f}, AUROC {found['auroc']:.2f}"


def _percent(estimate: dict) -> str:
    if estimate["value"] is None:
        return "not defined"
    shown = f"{estimate['value']:.0%}"
    if estimate["interval_95"] is None:
        return shown
    low, high = estimate["interval_95"]
    return f"{shown} [{low:.0%}, {high:.0%}]"
