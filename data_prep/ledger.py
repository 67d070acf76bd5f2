"""What became of every row: one fate each, so that rows read = rows kept + rows dropped by reason."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from medistill_trl.errors import UserError

SHOWN_PROBLEMS = 20
EXAMPLES = 3
UNDECIDED = ""


@dataclass
class Account:
    """The rows of one dataset.

    Args:
        splits: Of each row, as its dataset names it.
        fates: Of each row; decided once.
    """

    splits: np.ndarray
    fates: np.ndarray

    def undecided(self) -> np.ndarray:
        """(rows,) bool"""
        return self.fates == UNDECIDED

    def decide(self, rows: np.ndarray | list[int], fate: str) -> None:
        assert (self.fates[rows] == UNDECIDED).all(), f"a row has a fate before {fate}"
        self.fates[rows] = fate


@dataclass
class Ledger:
    """What became of the rows of all datasets.

    Args:
        accounts: By dataset.
        examples: What some dropped rows looked like, by reason.
        bad_rows: `file, place: reason`, all of them.
        notes: What a user should know about this build; printed and kept in the report.
    """

    accounts: dict[str, Account] = field(default_factory=dict)
    examples: dict[str, list[dict]] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def open(self, source: str, splits: list[str]) -> Account:
        account = Account(np.array(splits, dtype=object), np.full(len(splits), "", dtype=object))
        self.accounts[source] = account
        return account

    def example(self, reason: str, **shown: str) -> None:
        """Keep the first few of each reason."""
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES:
            kept.append(shown)

    def counts(self, source: str) -> dict[str, dict[str, int]]:
        """Split → fate → rows.

        Raises:
            AssertionError: if a row has no fate: the build lost it.
        """
        account = self.accounts[source]
        lost = int(account.undecided().sum())
        assert not lost, f"{lost} rows of {source} have no fate"
        pairs = Counter(zip(account.splits, account.fates, strict=True))
        table: dict[str, dict[str, int]] = {}
        for (split, fate), count in sorted(pairs.items()):
            table.setdefault(split, {})[fate] = count
        return table

    def judge(self, on_bad_row: str) -> None:
        """Stop if there are bad rows and the policy is fail.

        Raises:
            UserError: naming the first of them by file and place.
        """
        if not self.bad_rows or on_bad_row == "skip":
            return
        shown = "\n".join(f"  {text}" for text in self.bad_rows[:SHOWN_PROBLEMS])
        if len(self.bad_rows) > SHOWN_PROBLEMS:
            shown += f"\n  ... and {len(self.bad_rows) - SHOWN_PROBLEMS} more"
        raise UserError(
            f"{len(self.bad_rows)} rows cannot be used:\n{shown}\nNothing was written. Mend them, or give "
            "--on_bad_row skip to leave them out; the report then names each."
        )
