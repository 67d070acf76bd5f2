"""What each row is for: the training pool, a benchmark, the reserve, passages; or why for nothing."""

import numpy as np
import xxhash
from datasets import Dataset

from data_prep.ledger import Account, Ledger
from data_prep.sources import BENCHMARK, POOL, RESERVE, Source

ROLES = np.dtype("U16")


def order_keys(seed: int, ids: list[str]) -> np.ndarray:
    """(ids,) uint64: a shuffle that depends on nothing but the seed and each id."""
    return np.array([xxhash.xxh64_intdigest(f"{seed}:{id}".encode()) for id in ids], np.uint64)


def account_for(source: Source, table: Dataset, ledger: Ledger) -> Account:
    """Open the dataset's account, and decide the rows that are no records or repeat one."""
    account = ledger.open(source.name, table["split"][:])
    bad, dropped, places = table["bad"][:], table["dropped"][:], table["place"][:]
    _find_repeats(table, bad, dropped, places)
    for row, (problem, reason) in enumerate(zip(bad, dropped, strict=True)):
        if problem:
            ledger.bad_rows.append(f"{places[row]}: {problem}")
            account.decide([row], "invalid")
        elif reason:
            account.decide([row], f"dropped: {reason}")
            ledger.example(reason, place=places[row])
    return account


def _find_repeats(table: Dataset, bad: list, dropped: list, places: list[str]) -> None:
    """An id that comes again: the same record is dropped, another one is a bad row."""
    first: dict[tuple[str, str], int] = {}
    keys = table["key"][:]
    ids = zip(table["split"][:], table["native_id"][:], strict=True)
    for row, identity in enumerate(ids):
        if bad[row] or dropped[row]:
            continue
        other = first.setdefault(identity, row)
        if other == row:
            continue
        if keys[other] == keys[row]:
            dropped[row] = "repeats a record"
        else:
            bad[row] = f"id {identity[1]!r} is already that of another record ({places[other]})"


def assign(source: Source, account: Account, keys: np.ndarray, ledger: Ledger) -> np.ndarray:
    """(rows,) the role of each row, "" where its fate is decided.

    A dataset without the rows for its benchmark or for training gets stand-ins from its reserve,
    and a note: fine for development, not for numbers to report.
    """
    roles = np.array([source.roles[split] for split in account.splits], dtype=ROLES)
    roles[~account.undecided()] = ""
    wanted = [role for role in (BENCHMARK, POOL) if role in source.roles.values()]
    for role in wanted:
        if (roles == role).any():
            continue
        name = next(split for split, its_role in source.roles.items() if its_role == role)
        taken = _half(np.flatnonzero(roles == RESERVE), keys)
        roles[taken] = role
        ledger.notes.append(
            f"{source.name}: there is no {name} split; {len(taken)} rows held in reserve stand in for the "
            f"{role}. Do not report scores on them."
            if len(taken)
            else f"{source.name}: there is no {name} split, so it adds nothing to the {role}."
        )
    return roles


def _half(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return np.sort(rows[np.argsort(keys[rows])][: (len(rows) + 1) // 2])
