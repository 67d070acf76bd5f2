"""One dataset on its way through a build."""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from data_prep import records, roles
from data_prep.inputs import Input
from data_prep.ledger import Account, Ledger
from data_prep.schema import Record
from data_prep.workspace import Workspace


@dataclass
class Part:
    """A dataset's rows: what they are, what they are for, what became of them.

    Args:
        table: Of `records.RECORDS`, one row for each row read.
        account: The fate of each row.
        keys: (rows,) uint64, the order in which rows are drawn for anything.
        roles: (rows,) what each is for.
    """

    name: str
    table: Dataset
    account: Account
    keys: np.ndarray
    roles: np.ndarray

    def rows(self, role: str) -> np.ndarray:
        """Rows of a role that have no fate yet, in the order of their keys."""
        rows = np.flatnonzero((self.roles == role) & self.account.undecided())
        return rows[np.argsort(self.keys[rows], kind="stable")]

    def record(self, row: int) -> Record:
        return records.record_of(self.name, self.table[int(row)])


def read(work: Workspace, data: Input, seed: int, ledger: Ledger) -> Part:
    """Read a dataset's files, and decide what each row is for."""
    source = data.source
    ledger.notes += [
        f"{name}: not read; its name tells no split, or its suffix no format"
        for name in data.ignored
    ]
    table = records.read(work, data)
    account = roles.account_for(source, table, ledger)
    ids = zip(table["split"][:], table["native_id"][:], strict=True)
    keys = roles.order_keys(seed, [f"{source.name}-{split}-{name}" for split, name in ids])
    return Part(source.name, table, account, keys, roles.assign(source, account, keys, ledger))
