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

LISTED = "\n- "  # how a question that needs its options shows them
FEWEST_WORDS = 20  # of a passage that two rows cannot share by chance

PROMPTS = Features(
    {name: Value("string") for name in ("id", "question", "reference", "answer", "pmid")}
    # Why the row is not in the pool, and the held-out record it was found to be.
    | {name: Value("string") for name in ("dropped", "held_out")}
    # The question's words, those of its evidence or long explanation, and those that make it unique.
    | {name: Value("uint64") for name in ("asked", "passage", "key")}
    | {"signature": Value("binary")}
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
    row |= {"asked": 0, "passage": 0, "key": 0, "question": record.question}
    try:
        form = convert(record)
    except Unconvertible as error:
        return row | {"dropped": f"cannot be converted: {error}"}
    asked, answer = words(record.question), words(form.answer)
    listed = sorted(map(words, record.options)) if LISTED in form.question else []
    signed = [*asked, *(word for option in listed for word in option), *answer]
    passage = words(" ".join(record.context) or record.explanation)
    row |= {
        "question": form.question,
        "reference": form.reference,
        "answer": form.answer,
        "asked": exact_key(asked),
        "passage": exact_key(passage) if len(passage) >= FEWEST_WORDS else 0,
        "key": exact_key(asked, *listed, answer),
        "signature": min_hash(shingles(word_hashes(signed))).hashvalues.astype(np.uint32).tobytes(),
    }
    leak = guard.leak(
        HeldOut(record.id, record.question, record.options, (form.reference,), record.pmid)
    )
    if leak:
        return row | {"dropped": f"contaminated: {leak.stage}", "held_out": leak.held_out_id}
    return row


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
        usable = _drop_unconvertible(table, part, mine, ledger)
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
        if not len(positions):
            ledger.notes.append(f"processed/{name}.jsonl is missing: no prompt is left for it.")
    usable = int((split >= 0).sum())
    if size is not None and size > usable:
        ledger.notes.append(f"--size asks for {size} prompts; the pool has {usable}.")
    in_pool = np.flatnonzero(split >= 0)
    fates[fates == ""] = "left out: --size asks for fewer"
    for number, (part, mine) in enumerate(zip(parts, rows, strict=True)):
        for fate in sorted(set(fates[owners == number])):
            part.account.decide(mine[fates[owners == number] == fate], fate)
    used = np.bincount(owners[np.concatenate(list(chosen.values()))], minlength=len(parts))
    return table.select(in_pool), dict(zip([p.name for p in parts], used.tolist(), strict=True))


def _drop_unconvertible(table: Dataset, part: Part, rows: np.ndarray, ledger: Ledger) -> np.ndarray:
    """Decide the rows that have no long form; returns the positions of the others."""
    # Of the column itself: the texts as Python strings would take hundreds of megabytes.
    usable = table.data.column("reference").is_valid().to_numpy()
    for position in np.flatnonzero(~usable).tolist():
        row = table[position]
        part.account.decide([rows[position]], f"dropped: {row['dropped']}")
        ledger.example(row["dropped"], id=row["id"], question=row["question"])
    return np.flatnonzero(usable)


def _arrange(
    table: Dataset, owners: np.ndarray, keys: np.ndarray, ledger: Ledger
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the parts, and find what must not be in any.

    Contaminated rows take part in the draw, so that what a further dataset holds out moves no other row.

    Returns:
        (rows,) fates, "" where a row is usable; and (rows,) parts, -1 where it is not.
    """
    columns = table.with_format("numpy")
    same_abstract = np.array([exact_key([p]) if p else 0 for p in table["pmid"][:]], np.uint64)
    groups = [columns["asked"][:], columns["passage"][:], same_abstract]
    found = find_duplicates(columns["key"][:], _signatures(table), groups)
    split = split_pool(owners, keys, found.pairs)
    fates = np.full(len(table), "", dtype=object)
    for row, reason in enumerate(table["dropped"][:]):
        if reason:
            fates[row] = f"dropped: {reason}"
            shown = table[row]
            held_out = shown["held_out"]
            ledger.example(reason, id=shown["id"], question=shown["question"], held_out=held_out)
    for kind, first in (("exact", found.exact), ("near", found.near)):
        for row in np.flatnonzero((first >= 0) & (fates == "")).tolist():
            fates[row] = f"dropped: duplicate: {kind}"
            ledger.example(
                f"duplicate: {kind}",
                id=table[row]["id"],
                question=table[row]["question"],
                repeats=table[int(first[row])]["id"],
            )
    fates[(split == BRIDGE) & (fates == "")] = "dropped: duplicate: alike to rows of two parts"
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
