"""MedPPL-10k: passages to measure perplexity on, which no training text and no benchmark contains.

{"id", "source", "text"}
"""

from collections.abc import Iterator

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from data_prep.decontaminate import COVERAGE, FEWEST_RUNS, Guard, HeldOut, RunIndex
from data_prep.fingerprints import RUN, exact_key, ngrams, word_hashes, words
from data_prep.ledger import Ledger
from data_prep.output import Output
from data_prep.parts import Part
from data_prep.records import records_of
from data_prep.schema import Record, parse_id
from data_prep.sources import PASSAGES
from data_prep.workspace import Workspace

FEWEST_WORDS = 40  # a shorter passage says little about a model
SPARE = 100  # candidates drawn beyond those wanted: some turn out to be in the pool

CANDIDATES = Features(
    {name: Value("string") for name in ("id", "pmid", "text", "dropped", "held_out")}
    | {"key": Value("uint64")}
)
TOUCHED = Features({"passages": List(Value("int32"))})


def text_of(record: Record) -> str:
    """A passage; an abstract's sections with its conclusion."""
    return "\n".join(part for part in (*record.context, record.explanation) if part)


def candidates(work: Workspace, source: str, records: Dataset, guard: Guard) -> Dataset:
    """The table of `CANDIDATES`, one for each record, in their order."""
    name = f"{source} passages"
    return work.map(name, records, _candidates, CANDIDATES, source=source, guard=guard)


def _candidates(columns: dict, source: str, guard: Guard) -> dict:
    rows = [_candidate(record, guard) for record in records_of(source, columns)]
    return {key: [row[key] for row in rows] for key in CANDIDATES}


def _candidate(record: Record, guard: Guard) -> dict:
    text = text_of(record)
    tokens = words(text)
    row = {"id": record.id, "pmid": record.pmid, "text": text, "key": exact_key(tokens)}
    row |= {"dropped": None, "held_out": None}
    if len(tokens) < FEWEST_WORDS:
        return row | {"dropped": f"fewer than {FEWEST_WORDS} words"}
    leak = guard.leak(HeldOut(record.id, record.question, texts=(text,), pmid=record.pmid))
    if leak:
        return row | {"dropped": f"contaminated: {leak.stage}", "held_out": leak.held_out_id}
    return row


def write(
    work: Workspace,
    parts: list[Part],
    guard: Guard,
    pool: Dataset,
    output: Output,
    ledger: Ledger,
    size: int,
) -> None:
    """Write the passages, drawn from all datasets that have some.

    Args:
        pool: The training pool, of `pool.PROMPTS`.
    """
    found = [(part, np.sort(part.rows(PASSAGES))) for part in parts]
    found = [(part, rows) for part, rows in found if len(rows)]
    if not found:
        ledger.notes.append(
            "MedPPL is missing: there are no passages. Add PubMedQA's unlabelled abstracts "
            "(ori_pqau.json), or give --medppl_from FILE_OR_FOLDER."
        )
        return
    tables = [candidates(work, part.name, part.table.select(rows), guard) for part, rows in found]
    table = concatenate_datasets(tables)
    keys = np.concatenate([part.keys[rows] for part, rows in found])
    kept, reasons = choose(work, table, keys, pool, size)
    output.write("medppl_10k.jsonl", _lines(table, kept))
    fates = np.full(len(table), "left out: MedPPL has its size", dtype=object)
    fates[kept] = "kept: medppl"
    for position, reason in reasons.items():
        fates[position] = f"dropped: {reason}"
        shown = {key: table[position][key] for key in ("id", "held_out") if table[position][key]}
        ledger.example(reason, **shown)
    start = 0
    for part, rows in found:
        mine = fates[start : start + len(rows)]
        start += len(rows)
        for fate in sorted(set(mine)):
            part.account.decide(rows[mine == fate], fate)
    if len(kept) < size:
        ledger.notes.append(f"MedPPL has {len(kept)} of {size} passages: there are no more.")


def _lines(table: Dataset, positions: np.ndarray) -> Iterator[dict]:
    for row in table.select(positions):
        yield {"id": row["id"], "source": parse_id(row["id"])[0], "text": row["text"]}


def choose(
    work: Workspace, table: Dataset, keys: np.ndarray, pool: Dataset, size: int
) -> tuple[np.ndarray, dict[int, str]]:
    """The passages to keep, and why others were left out.

    Args:
        table: `CANDIDATES`.
        keys: (candidates,) uint64, the order in which they are drawn.

    Returns:
        Positions in `table`, in the order drawn; and position → reason.
    """
    reasons = {n: reason for n, reason in enumerate(table["dropped"][:]) if reason}
    pool_pmids = {pmid for pmid in pool["pmid"][:] if pmid}
    texts, pmids = table["key"][:], table["pmid"][:]
    seen: set[int] = set()
    drawn: list[int] = []
    for position in np.argsort(keys, kind="stable").tolist():
        if position in reasons:
            continue
        if pmids[position] in pool_pmids:
            reasons[position] = "contaminated: same PubMed id as the training pool"
        elif texts[position] in seen:
            reasons[position] = "duplicate: exact"
        else:
            seen.add(texts[position])
            drawn.append(position)
    kept: list[int] = []
    while drawn and len(kept) < size:
        count = size - len(kept) + SPARE
        taken, drawn = drawn[:count], drawn[count:]
        texts_taken = [table[position]["text"] for position in taken]
        stage = f"pool against passages, {len(drawn)} waiting"
        touched = _in_pool(work, stage, texts_taken, pool)
        reasons |= {taken[n]: "contaminated: text of the training pool" for n in touched}
        kept += [position for n, position in enumerate(taken) if n not in touched]
    return np.array(kept[:size], dtype=np.int64), reasons


def _in_pool(work: Workspace, stage: str, passages: list[str], pool: Dataset) -> set[int]:
    """Passages that share much text with the pool."""
    index = RunIndex(word_hashes(words(passage)) for passage in passages)
    found = work.map(stage, pool, _touched, TOUCHED, index=index)
    return {number for row in found for number in row["passages"]}


def _touched(columns: dict, index: RunIndex) -> dict:
    texts = zip(columns["question"], columns["reference"], strict=True)
    return {
        "passages": [sorted({n for text in row for n in _shared(index, text)}) for row in texts]
    }


def _shared(index: RunIndex, text: str) -> list[int]:
    """Passages with half of this text in them, or half of which is in it."""
    own = ngrams(word_hashes(words(text)), RUN)
    if len(own) < FEWEST_RUNS:
        return []
    passages, counts = index.shared(own)
    smaller = np.minimum(index.sizes[passages], len(own))
    return passages[counts >= COVERAGE * smaller].tolist()
