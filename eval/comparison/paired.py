"""Two configurations on the same items: estimates, intervals and tests. Pure functions on arrays.

A measure of a run is the mean over its items of one number an item; `linearised` makes shares, means and ratios
that. A configuration is one or several runs that differ in their seed alone, so it comes as an array of runs by
items, and two things make a difference uncertain:

- **items**: would other questions say the same? Exact McNemar test for right and wrong; sign-flip test and BCa
  bootstrap for numbers, or Student's t where items are few. Runs are averaged item by item first: more seeds do not
  make more questions.
- **seeds**: would other seeds say the same? Known only with two runs or more on both sides. Then the variance between
  items and that between runs are added, and Student's t is taken at Satterthwaite's degrees of freedom; with two runs on
  a side at no more than the runs have, all runs less two. The interval of one configuration of two runs has at most
  two, as the difference of two such has.

Shapes: S runs, N items, K differences.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from scipy import stats

from eval.comparison.flips import (
    ENUMERATED,
    bca_intervals,
    sign_flip,
    sign_flip_exact,
    variance,
)
from eval.statistics import (
    LEVEL,
    RESAMPLES,
    Estimate,
    Interval,
    mcnemar,
    minimum_detectable_effect,
    wilson,
)

POWER = 0.8
NO_ITEMS = "no items"
ALL_EQUAL = "all values are equal: no interval"
# Below, a bootstrap interval is too narrow: of 4 items it holds the truth in 80 % of cases.
FEW_ITEMS = 15
# Runs of a side with which Satterthwaite's degrees of freedom are too many: up to 11 % of studies find what is not there.
FEW_SEEDS = 2

Kind = Literal["right or wrong", "number", "whole"]


def linearised(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """One number an item whose mean is Σ numerators / Σ denominators, and whose variance that of the ratio.

    They are R + N (aᵢ − R bᵢ) / Σ b, the delta method (Cochran 1977, chapter 6). Where every denominator is the
    same they are the items' own values.
    """
    a, b = np.asarray(numerators, float), np.asarray(denominators, float)
    if np.ptp(b) == 0:
        return a / b
    ratio = a.sum() / b.sum()
    return ratio + len(a) * (a - ratio * b) / b.sum()


@dataclass(frozen=True)
class Sample:
    """A measure of one configuration.

    Args:
        values_SN: A row for each run; its mean is the run's measure.
        kind: `right or wrong`, 0 or 1 for each item; `number`; `whole`, one number a run, without items (N = 1).
    """

    values_SN: np.ndarray
    kind: Kind

    @property
    def seeds(self) -> int:
        return len(self.values_SN)

    @property
    def by_seed(self) -> np.ndarray:
        return self.values_SN.mean(axis=1)

    @property
    def by_item(self) -> np.ndarray:
        return self.values_SN.mean(axis=0)

    @property
    def value(self) -> float:
        return float(self.by_seed.mean())

    @cached_property
    def seed_variance(self) -> float | None:
        """Of the mean over seeds; None with one seed."""
        return variance(self.by_seed) / self.seeds if self.seeds > 1 else None


@dataclass(frozen=True)
class Error:
    """How uncertain a number is.

    Args:
        standard: Its standard error.
        freedom: Degrees of freedom of Student's t.
    """

    standard: float
    freedom: float

    @classmethod
    def sum(cls, parts: Sequence[tuple[float, int]]) -> "Error | None":
        """Of independent variances, each with its degrees of freedom (Satterthwaite 1946).

        None where nothing varies: what was equal so far need not be so once more.
        """
        variance = sum(part for part, _ in parts)
        if variance == 0:
            return None
        spread = sum(part**2 / freedom for part, freedom in parts)
        return cls(math.sqrt(variance), variance**2 / spread)

    def at_most(self, freedom: float) -> "Error":
        """The same with no more degrees of freedom than these."""
        return Error(self.standard, min(self.freedom, freedom))

    @property
    def half_width(self) -> float:
        return float(stats.t.ppf((1 + LEVEL) / 2, self.freedom) * self.standard)

    def p_value(self, value: float) -> float:
        """Two-sided, of there being no difference."""
        return float(2 * stats.t.sf(abs(value) / self.standard, self.freedom))

    def detectable(self) -> float:
        """The smallest true difference that a test at 5 % finds with a power of 80 %."""
        return (
            float(stats.t.ppf((1 + LEVEL) / 2, self.freedom) + stats.t.ppf(POWER, self.freedom))
            * self.standard
        )


def _item_part(values_N: np.ndarray) -> list[tuple[float, int]]:
    """Variance of a mean over items; none for a measure without items."""
    n = len(values_N)
    return [(variance(values_N) / n, n - 1)] if n > 1 else []


def estimate(sample: Sample) -> Estimate:
    """A configuration's measure; with several seeds its interval is for other items and other seeds, with one seed
    for other items of this run."""
    n = sample.values_SN.shape[1]
    if sample.seeds == 1:
        if sample.kind == "right or wrong":
            return wilson(round(sample.values_SN.sum()), n)
        parts = _item_part(sample.by_item)
    else:
        parts = [*_item_part(sample.by_item), (sample.seed_variance, sample.seeds - 1)]
    if not parts:
        return Estimate(sample.value, None, n, note="one number: no interval")
    error = Error.sum(parts)
    if error is None:
        # Of shares the items say something all the same: none of 40 may be one of the next.
        known = wilson(round(sample.value * n), n) if sample.kind == "right or wrong" else None
        return Estimate(
            sample.value, known and known.interval, n, note=None if known else ALL_EQUAL
        )
    if sample.seeds == FEW_SEEDS:
        error = error.at_most(2 * FEW_SEEDS - 2)
    low, high = sample.value - error.half_width, sample.value + error.half_width
    if sample.kind == "right or wrong":
        low, high = max(0.0, low), min(1.0, high)
    return Estimate(sample.value, (low, high), n)


# --- differences


@dataclass(frozen=True)
class Difference:
    """First − second.

    Args:
        value: Of the means over seeds and items.
        interval: 95 %: for other items and other seeds where both sides have several, else for other items; None
            where neither is known.
        items: The interval over items alone: BCa, of few items Student's t.
        n: Items.
        seeds: Runs of both sides.
        test: Of the items, in words.
        p_items: That other items would say the same of these runs; None without items.
        p_seeds: That other items and seeds would; None with one seed on either side.
        least_p: The smallest p-value that so many items can have; None without items.
        detectable: The smallest difference found with a power of 80 % before adjustment for several tests; None
            where it is not known, or where the items are too few for any to be found.
        alone: Items that the first alone and the second alone has right; None unless each is one run.
    """

    value: float
    interval: Interval | None
    items: Interval | None
    n: int
    seeds: tuple[int, int]
    test: str
    p_items: float | None
    p_seeds: float | None
    least_p: float | None
    detectable: float | None
    alone: tuple[int, int] | None = None

    @property
    def p(self) -> float | None:
        """What counts: the larger of the two, so a difference holds for items and for seeds."""
        known = [p for p in (self.p_items, self.p_seeds) if p is not None]
        return max(known, default=None)

    def to_dict(self) -> dict:
        content = {
            "value": self.value,
            "interval_95": _listed(self.interval),
            "interval_items_95": _listed(self.items),
            "n": self.n,
            "seeds": list(self.seeds),
            "test": self.test,
            "p_items": self.p_items,
            "p_seeds": self.p_seeds,
            "p": self.p,
            "least_p": self.least_p,
            "minimum_detectable": self.detectable,
        }
        if self.alone is not None:
            content |= {"only_first_right": self.alone[0], "only_second_right": self.alone[1]}
        return content


def _listed(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def differences(
    pairs: Sequence[tuple[Sample, Sample]], seed: int = 0, resamples: int = RESAMPLES
) -> list[Difference]:
    """Compare many pairs at once; those with equally many items share their resamples.

    Args:
        pairs: Of each the same items in the same order and the same kind.
    """
    by_length: dict[int, list[int]] = {}
    for place, (first, second) in enumerate(pairs):
        if first.values_SN.shape[1] != second.values_SN.shape[1] or first.kind != second.kind:
            raise ValueError("a pair needs the same items and the same kind of values")
        by_length.setdefault(first.values_SN.shape[1], []).append(place)
    found: dict[int, Difference] = {}
    for _n, places in by_length.items():
        gaps_NK = np.stack([pairs[k][0].by_item - pairs[k][1].by_item for k in places], axis=1)
        intervals = item_intervals(gaps_NK, seed, resamples)
        flipped = sign_flip(gaps_NK, seed, resamples)
        for k, interval, p in zip(places, intervals, flipped, strict=True):
            found[k] = _difference(*pairs[k], interval, float(p), resamples)
    return [found[place] for place in range(len(pairs))]


def _difference(
    first: Sample, second: Sample, items: Interval | None, flipped: float, resamples: int
) -> Difference:
    n, seeds = first.values_SN.shape[1], (first.seeds, second.seeds)
    value = first.value - second.value
    parts = [] if first.kind == "whole" else _item_part(first.by_item - second.by_item)
    test = "exact sign-flip" if n <= ENUMERATED else f"sign-flip, {resamples:,} draws"
    p_items, alone, least_p = flipped, None, 2.0 ** (1 - n)
    if first.kind == "whole":
        test, p_items, items, least_p = NO_ITEMS, None, None, None
    elif first.kind == "right or wrong":
        test, p_items, alone = _exact(first, second)
    interval, p_seeds = items, None
    if min(seeds) > 1:
        parts += [(first.seed_variance, seeds[0] - 1), (second.seed_variance, seeds[1] - 1)]
    error = Error.sum(parts)
    if min(seeds) > 1:
        if error and min(seeds) == FEW_SEEDS:
            error = error.at_most(sum(seeds) - 2)
        interval = error and (value - error.half_width, value + error.half_width)
        p_seeds = error and error.p_value(value)
    detectable = error.detectable() if error is not None else None
    if alone is not None:
        detectable = minimum_detectable_effect(n, sum(alone) / n)
    if least_p is not None and least_p >= 1 - LEVEL:
        detectable = None
    return Difference(
        value, interval, items, n, seeds, test, p_items, p_seeds, least_p, detectable, alone
    )


def _exact(first: Sample, second: Sample) -> tuple[str, float, tuple[int, int] | None]:
    """The exact test of right and wrong answers: its name, its p-value and who is right alone."""
    if first.seeds == second.seeds == 1:
        found = mcnemar(first.values_SN[0], second.values_SN[0])
        alone = (found["only_first"], found["only_second"])
        return "exact McNemar", found["p_value"], alone
    # In whole numbers: shares of runs that have an item right, over a common denominator.
    gaps_N = (first.by_item - second.by_item) * math.lcm(first.seeds, second.seeds)
    return "exact sign-flip", sign_flip_exact(np.rint(gaps_N).astype(int)), None


def item_intervals(
    gaps_NK: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> list[Interval | None]:
    """The 95 % interval of each column's mean, for other items; None of a single item."""
    n, k = gaps_NK.shape
    if n >= FEW_ITEMS:
        return bca_intervals(gaps_NK, seed, resamples)
    if n == 1:
        return [None] * k
    mean_K = gaps_NK.mean(axis=0)
    errors_K = [Error.sum(_item_part(gaps_NK[:, column])) for column in range(k)]
    return [
        e and (float(m - e.half_width), float(m + e.half_width))
        for m, e in zip(mean_K, errors_K, strict=True)
    ]
