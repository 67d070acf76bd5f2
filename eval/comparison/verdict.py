"""The answer in words, computed from the numbers of comparison.json."""

from collections.abc import Sequence

from eval.comparison.measures import FAMILIES
from eval.comparison.paired import NO_ITEMS
from eval.statistics import LEVEL

SHOWN = 4  # names in a list
ALPHA = 1 - LEVEL


def sentences(content: dict) -> list[str]:
    """A paragraph, as its sentences."""
    found = [_best(content)]
    few = too_few(content)
    found += [few] if few else [_told_apart(content), _against_baseline(content)]
    found += [_range(content), _benchmarks(content), _cost(content), *_caveats(content)]
    return [sentence for sentence in found if sentence]


# --- numbers in words


def number(value: float | None, share: bool) -> str:
    """A measure's value: shares in percent, the rest with three decimals or three digits."""
    if value is None:
        return "–"
    if share:
        return f"{value:.1%}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def signed(value: float, share: bool) -> str:
    """A difference: of shares in points of percent."""
    return f"{100 * value:+.1f} points" if share else f"{value:+.3f}"


def interval(ends: Sequence[float] | None, share: bool) -> str:
    """Low and high in brackets; nothing where there is no interval."""
    if ends is None:
        return ""
    low, high = (f"{end:.1%}" if share else number(end, share) for end in ends)
    return f"[{low}, {high}]"


def p_value(p: float | None) -> str:
    """A p-value as one shows it."""
    if p is None:
        return "not tested"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def listed(names: Sequence[object]) -> str:
    """Names in a row; only the first of many."""
    names = [str(name) for name in names]
    if len(names) > SHOWN + 1:
        return f"{', '.join(names[:SHOWN])} and {len(names) - SHOWN} others"
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def left_out(content: dict) -> list[str]:
    """Runs that are not compared, a line for each reason."""
    paths: dict[str, list[str]] = {}
    for path, why in content["left_out"].items():
        paths.setdefault(why, []).append(path)
    return [f"left out: {listed(own)}: {why}" for why, own in paths.items()]


# --- sentences


def _quality(content: dict) -> dict:
    return content["measures"][content["quality"]]


def single_students(content: dict) -> bool:
    """Whether the first place rests on single seeds: then it is of students, not of methods."""
    first = content["ranking"]["order"][0]
    pairs = [pair for pair in content["ranking"]["pairs"] if pair["configuration"] == first]
    return any(min(pair["seeds"]) == 1 for pair in pairs)


def _best(content: dict) -> str:
    measure, order = _quality(content), content["ranking"]["order"]
    best = measure["values"][order[0]]
    share = measure["share"]
    shown = f"{number(best['value'], share)} {interval(best['interval_95'], share)}".strip()
    what = f"{measure['label']} ({FAMILIES[measure['family']].lower()})"
    if len(order) == 1:
        return f"{order[0]}: {what} {shown}, {seeds(best['seeds'])}; there is nothing to compare it with."
    count = f"these {len(order)} single students" if single_students(content) else len(order)
    return (
        f"By {what}, the {measure['better']} the better, {order[0]} comes first of {count}: {shown}, "
        f"{seeds(best['seeds'])}."
    )


def _range(content: dict) -> str:
    """How far the configurations lie apart, and what training did to all of them."""
    measure, order = _quality(content), content["ranking"]["order"]
    parts = []
    if len(order) > 1:
        last = number(measure["values"][order[-1]]["value"], measure["share"])
        parts.append(f"the last, {order[-1]}, has {last}")
    name = content["quality"].removeprefix("heldout.")
    before = {
        curve[name][0] for own in content["curves"].values() for curve in own if name in curve
    }
    if len(before) == 1:  # all started from one student
        parts.append(f"before training it was {number(before.pop(), measure['share'])}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def too_few(content: dict) -> str:
    """Where no difference from the baseline could have passed its test, however large."""
    tested = [test for test in content["primary"] if test["least_p"] is not None]
    if not tested or len(tested) * min(test["least_p"] for test in tested) < ALPHA:
        return ""
    n = max(test["n"] for test in tested)
    items, mend = "items", "evaluate on more (a larger --limit)"
    if content["quality"].startswith("heldout."):
        items, mend = "held-out prompts", "give a larger validation_file"
    after = f" after adjustment for {len(tested)} tests" if len(tested) > 1 else ""
    return (
        f"With {n} {items} no difference can reach 5 %{after}, however large it is: which of them is better on other "
        f"{items} cannot be said; {mend}."
    )


def _told_apart(content: dict) -> str:
    """How far the first place can be trusted."""
    order, pairs = content["ranking"]["order"], content["ranking"]["pairs"]
    best = [pair for pair in pairs if pair["configuration"] == order[0]]
    if not best:
        return ""
    if all(pair["p"] is None for pair in best):
        return (
            "Which is better cannot be said: one run of each and no items to test leave nothing that says how much "
            "another run would differ."
        )
    apart = [pair["minus"] for pair in best if pair["significant"]]
    alike = [pair["minus"] for pair in best if not pair["significant"]]
    who = "This student" if single_students(content) else "It"
    how = f"Holm over all {len(pairs)} pairs" if len(pairs) > 1 else p_value(best[0]["p"])
    if not alike:
        return (
            f"{who} can be told apart from {'all others' if len(apart) > 1 else apart[0]} ({how})."
        )
    start = f"{who} cannot be told apart from {listed(alike)} ({how})"
    return f"{start}, only from {listed(apart)}." if apart else f"{start}."


def _against_baseline(content: dict) -> str:
    tests, measure = content["primary"], _quality(content)
    tested = [test for test in tests if test["p"] is not None]
    if not tested:
        return ""
    sign = 1 if measure["better"] == "higher" else -1
    better = [t for t in tested if t["significant"] and sign * t["value"] > 0]
    worse = [t for t in tested if t["significant"] and sign * t["value"] < 0]
    alike = [t["configuration"] for t in tested if not t["significant"]]
    parts = []
    for word, members in (("better", better), ("worse", worse)):
        shown = [
            f"{t['configuration']} {signed(t['value'], measure['share'])} ({p_value(t['p_holm'])})"
            for t in members
        ]
        parts += [f"{word}: {listed(shown)}"] if shown else []
    parts += [f"not told apart: {listed(alike)}"] if alike else []
    start = "As students, not as methods, against" if single_students(content) else "Against"
    return f"{start} the baseline {content['baseline']}, {'; '.join(parts)}."


def _benchmarks(content: dict) -> str:
    tests = content["differences"].get("benchmarks", [])
    if not tests:
        return ""
    apart = [
        f"{t['configuration']} on {content['measures'][t['measure']]['label']} ({signed(t['value'], True)})"
        for t in tests
        if t["significant"]
    ]
    found = (
        f"On the benchmarks these differ from the baseline: {listed(apart)}."
        if apart
        else f"On the benchmarks no difference from the baseline can be told from none ({len(tests)} tests)."
    )
    if apart:
        return found
    known = [test for test in tests if test["minimum_detectable"] is not None]
    if not known:
        return f"{found} With so few items on which the two disagree, none could have been found."
    least = min(known, key=lambda test: test["minimum_detectable"])
    label = content["measures"][least["measure"]]["label"]
    points = 100 * least["minimum_detectable"]
    return f"{found} The smallest that a single test could have found is {points:.1f} points ({label})."


def _cost(content: dict) -> str:
    front, costs = content["pareto"]["front"], content["cost"]
    if front is None or len(costs) < 2:
        return ""
    base, best = content["baseline"], content["ranking"]["order"][0]
    shown = ""
    if best != base and costs[base]["total_seconds"] > 0:
        ratio = costs[best]["total_seconds"] / costs[base]["total_seconds"]
        times = "as long as" if 0.95 < ratio < 1.05 else f"{ratio:.1f} times as long as"
        shown = f" {best} took {times} {base}."
    verb = "is" if len(front) == 1 else "are"
    return (
        f"On the front of quality against seconds (training and the teacher's writing), by their means, {verb} "
        f"{listed(front)}.{shown}"
    )


def _caveats(content: dict) -> list[str]:
    found = []
    tested = [test for test in content["primary"] if test["p"] is not None]
    if tested and all(test["test"] == NO_ITEMS for test in tested):
        found.append(
            "Nothing is kept of single prompts, so the tests say nothing about other prompts."
        )
    fewest = min(len(c["seeds"]) for c in content["configurations"])
    if tested and fewest == 1:
        found.append(
            "With one seed the tests are of these students, not of the methods: another seed may turn the order around."
        )
    if tested and fewest == 2:
        found.append("Two seeds say little about how much seeds differ; take three or more.")
    if content["missing"]:
        count = len(content["missing"])
        runs = "1 run has" if count == 1 else f"{count} runs have"
        found.append(f"{runs} no evaluation, or less of it than others: see what is missing.")
    return found
