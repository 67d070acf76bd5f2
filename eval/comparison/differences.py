"""Measures of all configurations: estimates, differences against the baseline, and a ranking with all its pairs."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.comparison.columns import Column, reported
from eval.comparison.measures import FAMILIES, JOINT, MEASURES, Measure, teacher_path
from eval.comparison.paired import RESAMPLES, Difference, Sample, differences, estimate
from eval.comparison.runs import Configuration, Run
from eval.statistics import LEVEL, holm

# What the ranking is by, if nothing is asked for: the first that every configuration has.
QUALITIES = (
    "fidelity.teacher.kl_teacher_student_nats",
    "heldout.kl_nats",
    "heldout.bits_per_byte",
)
ALPHA = 1 - LEVEL

Having = dict[str, dict[str, tuple[Run, ...]]]  # measure → configuration → runs that have it
Samples = dict[str, dict[str, Sample]]  # measure → configuration → sample


def having(
    configurations: Sequence[Configuration],
    columns: Mapping[str, dict[str, Column]],
    partial: bool = False,
) -> Having:
    """Which runs stand for a configuration in each measure: all of them, or none.

    Args:
        columns: Of each run, by its path.
        partial: Take those that have the measure, where some lack it.
    """
    found: Having = {}
    for key in MEASURES:
        for configuration in configurations:
            own = tuple(run for run in configuration.runs if key in columns[str(run.path)])
            if own == configuration.runs or (own and partial):
                found.setdefault(key, {})[configuration.name] = own
    return found


def samples(members: Having, columns: Mapping[str, dict[str, Column]]) -> Samples:
    """Every measure of every configuration that has it."""
    found = {
        key: _aligned(
            {name: [columns[str(run.path)][key] for run in own] for name, own in of_all.items()},
            MEASURES[key],
        )
        for key, of_all in members.items()
    }
    return {key: of_all for key, of_all in found.items() if of_all}


def _aligned(of_all: dict[str, list[Column]], measure: Measure) -> dict[str, Sample]:
    """The measure over the same items for all; empty if they share none."""
    every = [column for own in of_all.values() for column in own]
    kind = every[0].kind
    if any(column.kind == "whole" for column in every):  # some run kept no items
        kind = "whole"
        return {
            name: Sample(np.array([[column.value] for column in own]), kind)
            for name, own in of_all.items()
        }
    items = every[0].items
    if measure.common:
        shared = set.intersection(*(set(column.items) for column in every))
        items = tuple(item for item in items if item in shared)
        of_all = {name: [column.of(items) for column in own] for name, own in of_all.items()}
    if not items:
        return {}
    if any(column.kind != kind for own in of_all.values() for column in own):
        kind = "number"
    return {
        name: Sample(np.stack([column.values for column in own]), kind)
        for name, own in of_all.items()
    }


# --- estimates


def estimates(
    found: Samples, members: Having, configurations: Sequence[Configuration]
) -> dict[str, dict]:
    """Measure → `label`, `family`, `better`, `share`, the `teacher`'s own, and `values` by configuration."""
    all_runs = {configuration.name: configuration.runs for configuration in configurations}
    every = [run for own in all_runs.values() for run in own]
    content = {}
    for key, of_all in found.items():
        measure = MEASURES[key]
        content[key] = {
            "label": measure.label,
            "family": measure.family,
            "better": measure.better,
            "share": measure.share,
            "teacher": _first(reported(run, teacher_path(measure)) for run in every),
            "values": {
                name: _estimate(sample, members[key][name], measure)
                | _without(all_runs[name], members[key][name])
                for name, sample in of_all.items()
            },
        }
    return content


def _first(found: Iterable[dict | None]) -> dict | None:
    """What the first run has that has it: the evaluations of all are of one teacher."""
    return next((estimate for estimate in found if estimate is not None), None)


def _without(runs: Sequence[Run], having: Sequence[Run]) -> dict:
    """The seeds that lack the measure, where there are any."""
    lacking = [run.seed for run in runs if run not in having]
    return {"without_seeds": lacking} if lacking else {}


def _estimate(sample: Sample, runs: Sequence[Run], measure: Measure) -> dict:
    """With `seeds`, and with several of them `by_seed` and `sd_over_seeds`.

    Of one run it is what its evaluation says, if that is of the same items.
    """
    found = estimate(sample).to_dict()
    if sample.seeds == 1:
        own = reported(runs[0], measure.path)
        known = own is not None and own["interval_95"] is not None
        if known and (not measure.common or own["n"] == found["n"]):
            found |= {"interval_95": own["interval_95"]}
            found.pop("note", None)
        return found | {"seeds": 1}
    by_seed = [float(value) for value in sample.by_seed]
    return found | {
        "seeds": sample.seeds,
        "by_seed": by_seed,
        "sd_over_seeds": float(np.std(by_seed, ddof=1)),
    }


# --- against the baseline


@dataclass(frozen=True)
class Test:
    """A difference of two configurations in one measure."""

    measure: str
    first: str
    second: str
    difference: Difference

    def to_dict(self, p_holm: float | None) -> dict:
        significant = p_holm is not None and p_holm < ALPHA
        return {
            "measure": self.measure,
            "configuration": self.first,
            "minus": self.second,
            **self.difference.to_dict(),
            "p_holm": p_holm,
            "significant": significant,
            # Of methods: one seed says nothing of another.
            "told_apart": significant and min(self.difference.seeds) > 1,
        }


def compare(
    found: Samples, pairs: Sequence[tuple[str, str, str]], resamples: int = RESAMPLES
) -> list[Test]:
    """Differences of measure, configuration and configuration."""
    made = differences(
        [(found[key][first], found[key][second]) for key, first, second in pairs],
        resamples=resamples,
    )
    return [Test(*names, difference) for names, difference in zip(pairs, made, strict=True)]


def adjusted(tests: Sequence[Test]) -> list[dict]:
    """The tests of one family, with p-values adjusted by Holm's method for how many there are."""
    tested = [test for test in tests if test.difference.p is not None]
    p_values = iter(holm([test.difference.p for test in tested]))
    return [test.to_dict(None if test.difference.p is None else next(p_values)) for test in tests]


def against_baseline(
    found: Samples, baseline: str, resamples: int = RESAMPLES
) -> dict[str, list[dict]]:
    """Family → every other configuration minus the baseline in each of its measures.

    p-values are adjusted over the configurations, and over the benchmarks too, which ask one thing several times.
    """
    pairs = [
        (key, name, baseline)
        for key, of_all in found.items()
        if baseline in of_all
        for name in of_all
        if name != baseline
    ]
    tests = compare(found, pairs, resamples)
    content: dict[str, list[dict]] = {}
    for family in FAMILIES:
        members = [test for test in tests if MEASURES[test.measure].family == family]
        if family in JOINT:
            parts = [members]
        else:
            keys = dict.fromkeys(test.measure for test in members)
            parts = [[test for test in members if test.measure == key] for key in keys]
        if members:
            content[family] = [line for part in parts for line in adjusted(part)]
    return content


def ranking(found: Samples, quality: str, resamples: int = RESAMPLES) -> dict:
    """All configurations by one measure, the best first, and the tests of every pair of them.

    The best is picked by looking, so every pair counts as a test: `significant` holds for whichever comes first.
    """
    of_all = found[quality]
    sign = 1 if MEASURES[quality].better == "higher" else -1
    order = sorted(of_all, key=lambda name: -sign * of_all[name].value)
    pairs = [(quality, *pair) for pair in itertools.combinations(order, 2)]
    return {"order": order, "pairs": adjusted(compare(found, pairs, resamples))}
