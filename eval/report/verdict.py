"""What a run came to, in words that its numbers bear. Nothing here is measured."""

from dataclasses import dataclass, field

from eval.report.evaluation import is_skipped
from eval.report.heldout import MEASURES, UNITS, main_measure
from eval.report.names import TITLES, measured
from eval.report.tables import CHANGE, HUNDREDTHS, PERCENT, POINTS, inline, listed, p_value

LEVEL = 0.05
FEW = 30  # clusters; with fewer, an interval by Student's t leans on how they are distributed


@dataclass
class Verdict:
    """A paragraph.

    Args:
        lead: The result in a few words.
        tone: `better`, `worse` or `unclear`, of the student against what it was.
        sentences: What the lead rests on, and what limits it.
    """

    lead: str
    tone: str
    sentences: list[str] = field(default_factory=list)


def direction(estimate: dict, less_is_better: bool) -> str:
    """`better`, `worse`, or `unclear` where the interval holds 0 or there is none."""
    bounds = estimate["interval_95"]
    if bounds is None or bounds[0] <= 0 <= bounds[1]:
        return "unclear"
    return "better" if (estimate["value"] < 0) == less_is_better else "worse"


def of_training(before: dict, after: dict, changes: dict[str, dict]) -> Verdict:
    """Is the student closer to its teacher than it was?"""
    key = main_measure(after)
    measure, change = MEASURES[key], changes[key]
    tone = direction(change, measure.less_is_better)
    if before[key] == after[key]:
        sentence = f"{measure.name} on held-out teacher completions is what it was, {measure.form(after[key])}."
        return Verdict("No different from the untrained student", "unclear", [sentence])
    verb = "fell" if after[key] < before[key] else "rose"
    ratio = (
        f", {100 * after[key] / before[key]:.0f}\u00a0% of what it was" if before[key] > 0 else ""
    )
    sentence = (
        f"{measure.name} on held-out teacher completions {verb} from {measure.form(before[key])} to "
        f"{measure.form(after[key])}{UNITS[key]}{ratio}"
    )
    told = f"{sentence} (change {inline(change, measure.change)})."
    if change["interval_95"] is None:
        where = "Closer to" if verb == "fell" else "Further from"
        lead = f"{where} its teacher on these prompts"
        why = change["note"].removeprefix("no interval: ")
        return Verdict(lead, "unclear", [f"{sentence}. This has no interval: {why}."])
    leads = {
        "better": "Closer to its teacher than before training",
        "worse": "Further from its teacher than before training",
        "unclear": "Not told apart from the untrained student",
    }
    verdict = Verdict(leads[tone], tone, [told])
    if tone == "unclear":
        verdict.sentences.append(
            "The interval holds 0: training that changes nothing could have come out like this."
        )
    if change["n"] < FEW:
        verdict.sentences.append(
            f"That rests on {change['n']} prompts: few, so take it as an indication."
        )
    return verdict


def of_evaluation(evaluation: dict) -> list[str]:
    """The student beside its teacher, in sentences."""
    results = evaluation["results"]
    parts = {name: part for name, part in results.items() if not is_skipped(part)}
    sentences = []
    if "retention" in parts:
        sentences += _accuracy(parts["retention"]["benchmarks"])
    if "benchmarks" in parts:
        sentences += _floors(parts["benchmarks"])
    if "fidelity" in parts:
        sentences += _exposure(parts["fidelity"])
    if "student_minus_teacher" in parts.get("perplexity", {}):
        sentences.append(_text(parts["perplexity"]["student_minus_teacher"]["bits_per_byte"]))
    if "student_minus_teacher" in parts.get("faithfulness", {}):
        sentences.append(_claims(parts["faithfulness"]["student_minus_teacher"]["hallucination"]))
    limit = evaluation["options"]["limit"]
    if limit is not None:
        sentences.append(
            f"Only the first {limit:,} items of each file were asked: a quick look, not scores to report."
        )
    return sentences


def _accuracy(found: dict[str, dict]) -> list[str]:
    """The primary test: McNemar's against the teacher, adjusted over the benchmarks."""
    told: dict[str, list[str]] = {"worse": [], "better": [], "unclear": []}
    for name, test in found.items():
        gap = test["retention_gap"]["value"]
        side = "unclear" if test["mcnemar_p_holm"] > LEVEL else "worse" if gap > 0 else "better"
        shown = f"{PERCENT(test['student_accuracy']['value'])} against {PERCENT(test['teacher_accuracy']['value'])}"
        told[side].append(f"{TITLES[name]} ({shown}, {_evidence(test, side)})")
    phrases = {
        "worse": "worse than its teacher on {}",
        "better": "better than its teacher on {}",
        "unclear": "not told apart from its teacher on {}",
    }
    said = [phrases[side].format(listed(names)) for side, names in told.items() if names]
    if not said:
        return []
    return [
        f"By McNemar's exact test, adjusted over {len(found)} benchmarks, the student is {'; '.join(said)}."
    ]


def _evidence(test: dict, side: str) -> str:
    if side != "unclear":
        return p_value(test["mcnemar_p_holm"])
    smallest = test["minimum_detectable_gap"]
    if smallest is None:
        return "too few items to find any gap"
    return f"a gap below {POINTS(smallest).removeprefix('+')} could have gone unseen"


def _floors(part: dict) -> list[str]:
    on_floor = [
        TITLES[name]
        for name, found in measured(part).items()
        if not found["student"]["above_majority"]
    ]
    if not on_floor:
        return ["It is above always giving the commonest answer on every benchmark."]
    where = "any benchmark" if len(on_floor) == len(measured(part)) else listed(on_floor)
    return [f"It is not shown to be above always giving the commonest answer on {where}."]


def _exposure(part: dict) -> list[str]:
    found = {
        name: part["prefixes"][name]["micro"]["kl_teacher_student_nats"]
        for name in ("teacher", "student")
        if "micro" in part["prefixes"].get(name, {})
    }
    if len(found) < 2:
        return []
    values = {name: inline(estimate, HUNDREDTHS) for name, estimate in found.items()}
    return [
        f"KL(T‖S) is {values['teacher']} nats per token on the teacher's answers and {values['student']} on its own."
    ]


def _text(difference: dict) -> str:
    tone = direction(difference, less_is_better=True)
    said = inline(difference, CHANGE)
    if tone == "unclear":
        return f"In predicting medical text the two are not told apart ({said} bits per byte)."
    return f"It predicts medical text {tone} than its teacher ({said} bits per byte)."


def _claims(difference: dict) -> str:
    tone = direction(difference, less_is_better=True)
    said = inline(difference, POINTS)
    if difference["value"] is None:
        return "Hallucination cannot be compared: one of the two claims nothing."
    if tone == "unclear":
        return f"How much of their claims the evidence does not support is not told apart ({said})."
    more = "more" if tone == "worse" else "fewer"
    return f"Of its claims {more} lack support by the evidence than of its teacher's ({said})."
