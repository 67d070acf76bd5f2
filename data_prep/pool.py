"""The training pool: records → long-form questions, without held-out ones and without duplicates."""

from collections.abc import Iterator

import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets

from data_prep.decontaminate import Guard, HeldOut
from data_prep.duplicates import find_duplicates
from data_prep.fingerprints import (
    PERMUTATIONS,
    exact_key,
    min_hash,
    shingles,
    word_hashes,
    words,
)
from data_prep.ledger import Ledger
from data_prep.open_ended import Unconvertible, convert
from data_prep.output import Output
from data_prep.parts import Part
from data_prep.records import records_of
from data_prep.schema import Record, parse_id
from data_prep.sources import POOL
from data_prep.splits import BRIDGE, choose, split_pool
from data_prep.workspace import Workspace

PROMPTS = Features(
    {name: Value("string") for name in ("id", "question", "reference", "answer", "pmid")}
    # Why the row is not in the pool, and the held-out record it was found to be.
    | {name: Value("string") for name in ("dropped", "held_out")}
    | {"asked": Value("uint64"), "key": Value("uint64"), "signature": Value("binary")}
)


def prepare(work: Workspace, source: str, records: Dataset, guard: Guard) -> Dataset:
    """The table of `PROMPTS`, one for each record, in their order."""
    name = f"{source} convert and decontaminate"
    return work.map(name, records, _prompts, PROMPTS, source=source, guard=guard)


def _prompts(columns: dict, source: str, guard: Guard) -> dict:
    rows = [_prompt(record, guard) for record in records_of(source, columns)]
    return {key: [row[key] for row in rows] for key in PROMPTS}


def _prompt(record: Record, guard: Guard) -> dict:
    row = {key: None for key in PROMPTS} | {"id": record.id, "pmid": record.pmid}
    row |= {"asked": 0, "key": 0, "question": record.question}
    try:
        form = convert(record)
    except Unconvertible as error:
        return row | {"dropped": f"cannot be converted: {error}"}
    leak = guard.leak(
        HeldOut(record.id, record.question, record.options, (form.reference,), record.pmid)
    )
    if leak:
        return row | {"dropped": f"contaminated: {leak.stage}", "held_out": leak.held_out_id}
    asked, answer = words(record.question), words(form.answer)
    signature = min_hash(shingles(word_hashes(asked + answer))).hashvalues
    return row | {
        "question": form.question,
        "reference": form.reference,
        "answer": form.answer,
        "asked": exact_key(asked),
        "key": exact_key(words(form.question), answer),
        "signature": signature.astype(np.uint32).tobytes(),
    }


def write(
    work: Workspace,
    parts: list[Part],
    guard: Guard,
    output: Output,
    ledger: Ledger,
    size: int | None,
) -> tuple[Dataset, dict[str, int]]:
    """Write the three prompt files.

    Returns:
        The table of the whole pool, whatever the size; and how many rows of the files each dataset gave.
    """
    tables, rows = [], []
    for part in parts:
        mine = np.sort(part.rows(POOL))
        table = prepare(work, part.name, part.table.select(mine), guard)
        usable = _drop_unusable(table, part, mine, ledger)
        tables.append(table.select(usable))
        rows.append(mine[usable])
    owners = np.repeat(np.arange(len(parts)), [len(mine) for mine in rows])
    keys = np.concatenate([part.keys[mine] for part, mine in zip(parts, rows, strict=True)])
    table = concatenate_datasets(tables)

    fates, split = _arrange(table, owners, keys, ledger)
    chosen = choose(split, keys, size)
    for name, positions in chosen.items():
        fates[positions] = f"kept: {name}"
        output.write(f"processed/{name}.jsonl", _lines(table, positions))
    in_pool = np.flatnonzero((fates == "") | np.char.startswith(fates.astype(str), "kept"))
    fates[fates == ""] = "left out: --size asks for fewer"
    for number, (part, mine) in enumerate(zip(parts, rows, strict=True)):
        for fate in sorted(set(fates[owners == number])):
            part.account.decide(mine[fates[owners == number] == fate], fate)
    used = np.bincount(owners[np.concatenate(list(chosen.values()))], minlength=len(parts))
    return table.select(in_pool), dict(zip([p.name for p in parts], used.tolist(), strict=True))


def _drop_unusable(table: Dataset, part: Part, rows: np.ndarray, ledger: Ledger) -> np.ndarray:
    """Decide the rows that `prepare` found no use for; returns the positions of the others."""
    reasons = table["dropped"][:]
    for position, reason in enumerate(reasons):
        if reason:
            row = table[position]
            part.account.decide([rows[position]], f"dropped: {reason}")
            shown = {key: row[key] for key in ("id", "question", "held_out") if row[key]}
            ledger.example(reason, **shown)
    return np.array([n for n, reason in enumerate(reasons) if not reason], dtype=np.int64)


def _arrange(
    table: Dataset, owners: np.ndarray, keys: np.ndarray, ledger: Ledger
) -> tuple[np.ndarray, np.ndarray]:
    """Find duplicates, and give every other row its part.

    Returns:
        (rows,) fates, "" where a row is usable; and (rows,) parts, -1 where it is not.
    """
    columns = table.with_format("numpy")
    signatures = _signatures(table)
    pmids = table["pmid"][:]
    same_abstract = np.array([exact_key([p]) if p else 0 for p in pmids], dtype=np.uint64)
    found = find_duplicates(columns["key"][:], signatures, [columns["asked"][:], same_abstract])
    fates = np.full(len(table), "", dtype=object)
    for kind, rows in (("exact", found.exact), ("near", found.near)):
        again = np.flatnonzero(rows >= 0)
        fates[again] = f"dropped: duplicate: {kind}"
        for row in again[:3].tolist():
            first = table[int(rows[row])]
            shown = {"repeats": first["id"], "its question": first["question"]}
            ledger.example(
                f"duplicate: {kind}", id=table[row]["id"], question=table[row]["question"], **shown
            )
    split = split_pool(owners, keys, found.pairs)
    bridges = (split == BRIDGE) & (fates == "")
    fates[bridges] = "dropped: duplicate: alike to rows of two parts"
    return fates, np.where(fates == "", split, BRIDGE)


def _signatures(table: Dataset) -> np.ndarray:
    """(rows, permutations) uint32"""
    result = np.empty((len(table), PERMUTATIONS), dtype=np.uint32)
    start = 0
    for batch in table.select_columns("signature").iter(batch_size=10_000):
        rows = np.frombuffer(b"".join(batch["signature"]), np.uint32).reshape(-1, PERMUTATIONS)
        result[start : start + len(rows)] = rows
        start += len(rows)
    return result


def _lines(table: Dataset, positions: np.ndarray) -> Iterator[dict]:
    names = ("id", "question", "reference", "answer")
    for batch in table.select_columns(list(names)).select(positions).iter(batch_size=1000):
        for values in zip(*(batch[name] for name in names), strict=True):
            row = dict(zip(names, values, strict=True))
            yield {"id": row["id"], "source": parse_id(row["id"])[0], **row}
