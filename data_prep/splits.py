"""Training, validation and test parts of the pool: 90/5/5, alike rows together, stable.

A row's part depends on its own dataset and on those named before it, never on those after it, nor on
the size asked for. A smaller size is a subset of a larger one.
"""

import itertools

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

TRAIN, VALIDATION, TEST = range(3)
PARTS = ("train", "validation", "test")
HELD_OUT_SHARE = 0.05  # of each dataset's rows, for validation and again for test
BRIDGE = -1  # alike to rows of two different parts: belongs to neither


def split_pool(sources: np.ndarray, keys: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The part of each row.

    Args:
        sources: (rows,) number of its dataset, ascending.
        keys: (rows,) uint64, the order in which groups are drawn.
        pairs: (pairs, 2) rows that must not be torn apart.

    Returns:
        (rows,) int8: TRAIN, VALIDATION, TEST or BRIDGE.
    """
    parts = np.full(len(sources), BRIDGE, dtype=np.int8)
    ends = np.searchsorted(sources, np.arange(sources.max(initial=-1) + 2))
    for start, end in itertools.pairwise(ends):
        inside = pairs[(pairs >= start).all(axis=1) & (pairs < end).all(axis=1)] - start
        earlier = pairs[(pairs.min(axis=1) < start) & (pairs.max(axis=1) >= start)]
        earlier = np.sort(earlier[earlier.max(axis=1) < end], axis=1)
        groups = _groups(end - start, inside)
        given = _inherited(groups, earlier[:, 1] - start, parts[earlier[:, 0]])
        parts[start:end] = _draw(groups, keys[start:end], given)[groups]
    return parts


def _groups(rows: int, pairs: np.ndarray) -> np.ndarray:
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), (rows, rows))
    return connected_components(graph, directed=False)[1]


_FREE = -2


def _inherited(groups: np.ndarray, rows: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """(groups,) the part that rows of earlier datasets force on a group; BRIDGE if they disagree."""
    given = np.full(groups.max(initial=-1) + 1, _FREE, dtype=np.int8)
    for group, part in zip(groups[rows], parts, strict=True):
        if part != BRIDGE:
            given[group] = part if given[group] in (_FREE, part) else BRIDGE
    return given


def _draw(groups: np.ndarray, keys: np.ndarray, given: np.ndarray) -> np.ndarray:
    """(groups,) its part: validation and test are filled in the order of the keys, the rest trains.

    A large group trains whatever its key: it would fill a held-out part with one topic.
    """
    sizes = np.bincount(groups, minlength=len(given))
    first_key = np.full(len(given), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(first_key, groups, keys)
    quota = round(HELD_OUT_SHARE * len(groups))
    largest = max(1, quota // 20)
    parts = np.where(given == _FREE, TRAIN, given)
    free = np.flatnonzero((given == _FREE) & (sizes <= largest))
    waiting = iter(free[np.argsort(first_key[free], kind="stable")])
    for part in (VALIDATION, TEST):
        filled = int(sizes[given == part].sum())
        while filled < quota and (group := next(waiting, None)) is not None:
            parts[group] = part
            filled += int(sizes[group])
    return parts


def choose(parts: np.ndarray, keys: np.ndarray, size: int | None) -> dict[str, np.ndarray]:
    """The rows of each part, in the order of their keys, as many as `size` asks for.

    Args:
        size: Rows of the three parts together, 90/5/5; None takes all.
    """
    held_out = None if size is None else round(HELD_OUT_SHARE * size)
    wanted = (None, None, None) if size is None else (size - 2 * held_out, held_out, held_out)
    chosen = {}
    for part, (name, limit) in enumerate(zip(PARTS, wanted, strict=True)):
        rows = np.flatnonzero(parts == part)
        chosen[name] = rows[np.argsort(keys[rows], kind="stable")][:limit]
    return chosen
