"""Differences item by item: their sign-flip tests and bootstrap intervals. Pure functions on arrays.

Shapes: N items, K differences, R resamples.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from scipy import signal, stats

from eval.statistics import BATCH, LEVEL, RESAMPLES, Interval

ROUNDING = 1e-12  # of a sum, relative to its terms
ENUMERATED = 13  # items whose sign flips are all counted: they are fewer than the draws


def variance(values_N: np.ndarray) -> float:
    """Of single values; 0 where they differ by no more than sums are rounded."""
    if np.ptp(values_N) <= ROUNDING * np.abs(values_N).max():
        return 0.0
    return float(values_N.var(ddof=1))


def sign_flip_exact(gaps_N: np.ndarray) -> float:
    """The exact two-sided sign-flip test of whole-numbered differences.

    Were the two sides alike, each item's difference would as soon have the other sign. With one run on each
    side, where differences are −1, 0 and 1, this is the exact McNemar test.
    """
    total = abs(int(gaps_N.sum()))
    sizes, counts = np.unique(np.abs(gaps_N[gaps_N != 0]), return_counts=True)
    chances = np.ones(1)  # of every total, from −largest to largest
    for size, count in zip(sizes, counts, strict=True):
        part = np.zeros(2 * size * count + 1)
        part[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = signal.convolve(chances, part)
    totals = np.arange(len(chances)) - len(chances) // 2
    return float(np.clip(chances[np.abs(totals) >= total].sum(), 0.0, 1.0))


def sign_flip(gaps_NK: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """The sign-flip test of each column, (K,): exact where items are few, else by random draws and then never 0
    (Phipson and Smyth 2010)."""
    n, k = gaps_NK.shape
    total_K = np.abs(gaps_NK.sum(axis=0))
    slack_K = ROUNDING * np.abs(gaps_NK).sum(axis=0)
    if n <= ENUMERATED:
        signs_RN = np.array(list(itertools.product((-1.0, 1.0), repeat=n)))
        return (np.abs(signs_RN @ gaps_NK) >= total_K - slack_K).mean(axis=0)
    rng = np.random.default_rng(seed)
    extreme_K = np.zeros(k, int)
    for size in _batches(resamples):
        signs_RN = 2.0 * rng.integers(2, size=(size, n)) - 1.0
        extreme_K += (np.abs(signs_RN @ gaps_NK) >= total_K - slack_K).sum(axis=0)
    return (1 + extreme_K) / (1 + resamples)


def bca_intervals(
    gaps_NK: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> list[Interval | None]:
    """The BCa bootstrap interval of each column's mean (Efron 1987), all from the same resamples.

    `scipy.stats.bootstrap` gives the same, one column at a time. None where it is not defined: where nothing
    varies, or nearly all resamples lie on one side.
    """
    n, k = gaps_NK.shape
    mean_K = gaps_NK.mean(axis=0)
    centred_NK = gaps_NK - mean_K
    shifts_RK = np.concatenate(
        [counts_RN @ centred_NK / n for counts_RN in _resampled(n, seed, resamples)]
    )
    spread_K = np.abs(centred_NK).sum(axis=0)
    shifts_RK[np.abs(shifts_RK) < ROUNDING * spread_K] = 0.0  # ties stay ties
    below_K = ((shifts_RK < 0).mean(axis=0) + (shifts_RK <= 0).mean(axis=0)) / 2
    found: list[Interval | None] = []
    for column in range(k):
        if variance(gaps_NK[:, column]) == 0:
            found.append(None)
            continue
        levels = _bca_levels(below_K[column], centred_NK[:, column])
        if not np.isfinite(levels).all():
            found.append(None)
            continue
        low, high = np.quantile(shifts_RK[:, column], levels) + mean_K[column]
        found.append((float(low), float(high)))
    return found


def _bca_levels(below: float, centred_N: np.ndarray) -> np.ndarray:
    """Which quantiles of the resamples are the interval's ends.

    Args:
        below: Share of resamples below the estimate, ties a half.
        centred_N: What each item adds; the jackknife of a mean follows from it.
    """
    bias = stats.norm.ppf(below)
    acceleration = (centred_N**3).sum() / (6 * np.square(centred_N).sum() ** 1.5)
    ends = bias + stats.norm.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    with np.errstate(invalid="ignore"):  # where all resamples lie on one side
        return stats.norm.cdf(bias + ends / (1 - acceleration * ends))


def _resampled(n: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each item is drawn, (R, N) at a time."""
    rng = np.random.default_rng(seed)
    for size in _batches(resamples):
        draws_RN = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(draws_RN.ravel(), minlength=size * n).reshape(size, n).astype(float)


def _batches(total: int) -> Iterator[int]:
    for start in range(0, total, BATCH):
        yield min(BATCH, total - start)
