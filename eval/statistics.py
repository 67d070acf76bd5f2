"""Estimates with their intervals, and tests of differences: pure functions, no models and no files.

Every interval is of 95 %. Where a number is not defined it is None and the note says why: no items, one cluster,
one class. Items that hang together (tokens of one text, claims of one answer) are clusters: their interval comes
from how much the clusters differ, never from how many items there are.
"""

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats
from sklearn import metrics
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_test
from statsmodels.stats.proportion import proportion_confint

LEVEL = 0.95
RESAMPLES = 9999
BATCH = 256  # resamples held at a time
NO_WIDTH = "all items are equal: an interval without width"

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A number and how sure it is.

    Args:
        value: None where it is not defined.
        interval: Low and high, 95 %; None where it is not defined.
        n: Items it is of.
        clusters: Independent groups they fall into; None where each item stands for itself.
        note: What a reader must know: why something is None, or why an interval has no width.
    """

    value: float | None
    interval: Interval | None
    n: int
    clusters: int | None = None
    note: str | None = None

    def to_dict(self) -> dict:
        """`value`, `interval_95` as [low, high] or None, `n`, and where there are any `clusters` and `note`."""
        found = {
            "value": self.value,
            "interval_95": None if self.interval is None else list(self.interval),
            "n": self.n,
        }
        optional = {"clusters": self.clusters, "note": self.note}
        return found | {name: value for name, value in optional.items() if value is not None}


# --- shares and means ------------------------------------------------------------------------------


def wilson(successes: int, n: int) -> Estimate:
    """A share of independent items with Wilson's score interval (1927).

    Raises:
        ValueError: `successes` is not within 0 and `n`.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie within 0 and n, got {successes} of {n}")
    if n == 0:
        return Estimate(None, None, 0, note="no items")
    low, high = proportion_confint(successes, n, alpha=1 - LEVEL, method="wilson")
    return Estimate(successes / n, (float(low), float(high)), n)


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """The mean over items, with an interval that allows the items of a cluster to depend on each other.

    Args:
        values: Of the items.
        clusters: Which cluster each item is of.
    """
    sums, counts = _by_cluster(values, clusters)
    found = ratio_interval(sums, counts)
    return Estimate(found.value, found.interval, len(values), len(sums), found.note)


def clustered_share(hits: Sequence[bool], clusters: Sequence[Hashable]) -> Estimate:
    """A share of clustered items: Wilson's interval at the effective number of items.

    Unlike that of a mean, it stays within 0 and 1 and has a width at a share of 0 or 1, where the data cannot
    say how alike the items of a cluster are: there each cluster counts once (Dean and Pagano 2015, "Evaluating
    confidence interval methods for binomial proportions in clustered surveys").
    """
    mean = clustered_mean([float(hit) for hit in hits], clusters)
    n, groups, share = mean.n, mean.clusters, mean.value
    if n == 0:
        return Estimate(None, None, 0, 0, mean.note)
    if groups == 1:
        return mean
    effective = float(groups)
    if 0 < share < 1:
        # The interval of the mean is t standard errors wide on each side.
        error = (mean.interval[1] - share) / stats.t.ppf((1 + LEVEL) / 2, groups - 1)
        effective = min(n, share * (1 - share) / error**2) if error else n
    low, high = proportion_confint(share * effective, effective, alpha=1 - LEVEL, method="wilson")
    return Estimate(share, (float(low), float(high)), n, groups)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Σ numerators / Σ denominators, where each row is a cluster: means that are weighted by tokens.

    The variance is that of the linearised ratio, G/(G−1) · Σ (aᵢ − R bᵢ)² / (Σ b)² (Cochran 1977, chapter 6), with
    Student's t at G − 1 degrees of freedom.

    Args:
        numerators: For each row, a sum over its items.
        denominators: For each row, their number or weight; not negative.
    """
    a, b = np.asarray(numerators, float), np.asarray(denominators, float)
    if a.shape != b.shape:
        raise ValueError(f"as many numerators as denominators, got {a.size} and {b.size}")
    rows = len(a)
    if b.sum() == 0:
        note = "no items" if rows == 0 else "no row has any item"
        return Estimate(None, None, rows, note=note)
    ratio = float(a.sum() / b.sum())
    if rows == 1:
        return Estimate(ratio, None, 1, note="one cluster: no interval")
    residuals = a - ratio * b
    variance = rows / (rows - 1) * np.square(residuals).sum() / b.sum() ** 2
    half = float(stats.t.ppf((1 + LEVEL) / 2, rows - 1) * math.sqrt(variance))
    return Estimate(ratio, (ratio - half, ratio + half), rows)


def _by_cluster(
    values: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[list[float], list[int]]:
    """The sum and the number of the items of each cluster."""
    sums: dict[Hashable, float] = {}
    counts: dict[Hashable, int] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + float(value)
        counts[cluster] = counts.get(cluster, 0) + 1
    return list(sums.values()), list(counts.values())


# --- differences -----------------------------------------------------------------------------------


def bootstrap_difference(
    first: Sequence[float], second: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """mean(first) − mean(second) over the same items, with a paired BCa bootstrap interval (Efron 1987).

    Args:
        first: One value for each item.
        second: For the same items in the same order.
    """
    if len(first) != len(second):
        raise ValueError(f"the same items for both, got {len(first)} and {len(second)}")
    differences = np.asarray(first, float) - np.asarray(second, float)
    return bootstrap([differences], lambda d, axis=-1: d.mean(axis=axis), seed, resamples)


def bootstrap_ratio_difference(
    first: tuple[Sequence[float], Sequence[float]],
    second: tuple[Sequence[float], Sequence[float]],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Σa₁/Σb₁ − Σa₂/Σb₂ over the same rows: rates whose number of items differs, such as of claims.

    Args:
        first: Numerators and denominators of each row.
        second: Those of the other, in the same order.
    """
    columns = [np.asarray(column, float) for column in (*first, *second)]

    def difference(a, b, c, d, axis=-1):
        return a.sum(axis=axis) / b.sum(axis=axis) - c.sum(axis=axis) / d.sum(axis=axis)

    a, b, c, d = columns
    if b.sum() == 0 or d.sum() == 0:
        return Estimate(None, None, len(a), note="one of the two has no items")
    # What each row adds to the difference: where that is nothing, no resample differs.
    influence = (a - b * a.sum() / b.sum()) / b.sum() - (c - d * c.sum() / d.sum()) / d.sum()
    if len(a) > 1 and np.allclose(influence, 0):
        value = float(difference(*columns))
        return Estimate(value, (value, value), len(a), note=NO_WIDTH)
    return bootstrap(columns, difference, seed, resamples)


def bootstrap(
    columns: Sequence[np.ndarray],
    statistic: Callable[..., np.ndarray],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """A statistic of rows, with the BCa interval over resampled rows.

    Args:
        columns: Each (n,), of the same rows, which are drawn together.
        statistic: Of the columns, along `axis`.
    """
    n = len(columns[0])
    if n == 0:
        return Estimate(None, None, 0, note="no items")
    value = float(statistic(*columns, axis=-1))
    if n == 1:
        return Estimate(value, None, 1, note="one item: no interval")
    if all(np.ptp(column) == 0 for column in columns):
        return Estimate(value, (value, value), n, note=NO_WIDTH)
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # the note below says it
        found = stats.bootstrap(
            tuple(columns),
            statistic,
            n_resamples=resamples,
            batch=BATCH,
            paired=True,
            vectorized=True,
            confidence_level=LEVEL,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return Estimate(value, None, n, note="too few items with something in them: no interval")
    return Estimate(value, (float(found.low), float(found.high)), n)


def mcnemar(first_right: Sequence[bool], second_right: Sequence[bool]) -> dict:
    """Exact McNemar test: are two models right equally often, on the same items?

    Returns:
        `only_first` and `only_second`, the items that one alone has right, and `p_value`; 1 where there are none.
    """
    pairs = [(bool(a), bool(b)) for a, b in zip(first_right, second_right, strict=True)]
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    table = [
        [pairs.count((True, True)), only_first],
        [only_second, pairs.count((False, False))],
    ]
    p_value = float(mcnemar_test(table, exact=True).pvalue)
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for how many tests there are (Holm 1979), in their order."""
    # Not statsmodels' multipletests, which collects garbage at each call: a tenth of a second.
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()


def minimum_detectable_effect(
    n: int, discordant_share: float, alpha: float = 0.05, power: float = 0.8
) -> float | None:
    """The smallest difference of two accuracies that McNemar's test on n items finds with this power.

    Solves Connor's equation (1987), n δ² = (z₁ √ψ + z₂ √(ψ − δ²))², for δ.

    Args:
        n: Items.
        discordant_share: ψ, the share of items that one model alone has right.

    Returns:
        δ as a share; None where no difference that ψ allows (at most ψ) could be found.
    """
    if not 0 <= discordant_share <= 1:
        raise ValueError(f"discordant_share must lie within 0 and 1, got {discordant_share}")
    z_alpha, z_power = stats.norm.ppf(1 - alpha / 2), stats.norm.ppf(power)

    def missing(delta: float) -> float:
        spread = math.sqrt(max(0.0, discordant_share - delta**2))
        return math.sqrt(n) * delta - z_alpha * math.sqrt(discordant_share) - z_power * spread

    if n == 0 or discordant_share == 0 or missing(discordant_share) < 0:
        return None
    return float(optimize.brentq(missing, 0.0, discordant_share))


# --- calibration -----------------------------------------------------------------------------------


def expected_calibration_error(
    confidences: Sequence[float], right: Sequence[bool], bins: int = 15
) -> float | None:
    """Σ (items of a bin / n) · |accuracy − mean confidence|, over bins of equal width (Guo et al. 2017).

    Args:
        confidences: The probability of the chosen answer, from 0 to 1.
        right: Whether it was right.

    Returns:
        From 0 to 1; None without items.
    """
    p, hit = np.asarray(confidences, float), np.asarray(right, float)
    if p.shape != hit.shape:
        raise ValueError(f"as many confidences as answers, got {p.size} and {hit.size}")
    if len(p) == 0:
        return None
    # The bins are open below: (0, 1/bins], ...; 0 itself is of the first.
    place = np.clip(np.ceil(p * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=hit - p, minlength=bins)
    return float(np.abs(gaps).sum() / len(p))


def brier(probabilities: Sequence[Sequence[float]], answers: Sequence[int]) -> float | None:
    """mean Σ_k (p_k − [k is right])²: Brier's score (1950) over all options, 0 is best and 2 worst.

    Args:
        probabilities: For each item one for each of its options; items may differ in their number.
        answers: The right option of each.
    """
    scores = []
    for row, answer in zip(probabilities, answers, strict=True):
        missed = np.asarray(row, float).copy()
        missed[answer] -= 1
        scores.append(float(np.square(missed).sum()))
    return sum(scores) / len(scores) if scores else None


# --- labels ----------------------------------------------------------------------------------------


def macro_f1(predicted: Sequence[Hashable], answers: Sequence[Hashable]) -> float | None:
    """F1 averaged over the labels that are predicted or right somewhere; None without items.

    A prediction of None is none: wrong, and no label of its own.
    """
    if not len(answers):
        return None
    given, right, labels = _codes(
        predicted, answers, [x for x in (*predicted, *answers) if x is not None]
    )
    scores = metrics.f1_score(
        right, given, labels=sorted(set(labels)), average=None, zero_division=0
    )
    return float(scores.mean())


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement beyond chance (Cohen 1960); None without items, or where both always say the same one thing."""
    if len({*first, *second}) < 2:
        return None
    return float(metrics.cohen_kappa_score(*_codes(first, second)))


def balanced_accuracy(predicted: Sequence[Hashable], answers: Sequence[Hashable]) -> float | None:
    """The mean over the labels of the share that is found; None unless at least two labels are right somewhere."""
    if len(set(answers)) < 2:
        return None
    # Not scikit-learn's, which warns where something is predicted that is never right.
    pairs = list(zip(predicted, answers, strict=True))
    found = [
        [p == label for p, a in pairs if a == label] for label in sorted(set(answers), key=str)
    ]
    return float(np.mean([np.mean(hits) for hits in found]))


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float | None:
    """How often a positive item scores above a negative one, ties a half; None with one class alone."""
    if len(set(map(bool, positive))) < 2:
        return None
    return float(metrics.roc_auc_score(list(map(bool, positive)), scores))


def _codes(*columns: Sequence[Hashable]) -> list[list[int]]:
    """Labels of any kind, None among them, as numbers that scikit-learn takes."""
    known: dict[Hashable, int] = {}
    return [[known.setdefault(label, len(known)) for label in column] for column in columns]
