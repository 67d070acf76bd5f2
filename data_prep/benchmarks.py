"""Held-out records → rows of the multiple-choice schema, and few-shot examples from training splits.

    {"id", "source", "split", "question", "context"?, "subject"?, "options": [text], "answer": index,
     "repeated_options"?: true}

`repeated_options` marks records in which one option stands twice (21 of MedMCQA's validation split):
they stay, so that accuracies compare with published ones, and can be left out by who reads them.
"""

from collections.abc import Iterable
from itertools import zip_longest

import numpy as np

from data_prep.decontaminate import Guard, HeldOut
from data_prep.output import Output
from data_prep.parts import Part
from data_prep.schema import Record
from data_prep.sources import BENCHMARK, POOL, RESERVE

FEW_SHOT = 16
FEW_SHOT_CANDIDATES = 200  # looked at, so that rare answers are among them
# Of the training pool, but for PubMedQA: its pool never answers maybe, its labelled reserve does.
FEW_SHOT_ROLE = {"medqa": POOL, "medmcqa": POOL, "pubmedqa": RESERVE, "pubhealth": POOL}
OPTIONS = {"medqa": 4, "medmcqa": 4, "pubmedqa": 3, "pubhealth": 4}
TWO_CLASS = ("true", "false")  # the usual form of PubHealth without its two smaller classes


def benchmark_row(record: Record) -> dict:
    optional = {
        "context": "\n\n".join(record.context),
        "subject": record.subject,
        "repeated_options": len(set(record.options)) < len(record.options),
    }
    return {
        "id": record.id,
        "source": record.source,
        "split": record.split,
        "question": record.question,
        **{key: value for key, value in optional.items() if value},
        "options": list(record.options),
        "answer": record.answer,
    }


def files(source: str, rows: list[dict]) -> dict[str, list[dict]]:
    """Name → rows: the benchmark, and PubHealth's two-class form beside it."""
    if source != "pubhealth":
        return {source: rows}
    two = [r for r in rows if r["options"][r["answer"]] in TWO_CLASS]
    return {source: rows, f"{source}_2class": [r | {"options": list(TWO_CLASS)} for r in two]}


def held_out(record: Record) -> HeldOut:
    """All of its text: what was trained on as an explanation must not be asked for as an answer."""
    texts = (*record.context, record.explanation) if record.explanation else record.context
    return HeldOut(record.id, record.question, record.options, texts, record.pmid)


def few_shot(candidates: Iterable[Record], guard: Guard, size: int) -> list[Record]:
    """Up to `size` of the records that are not held out, the right answers in turn."""
    by_answer: dict[int, list[Record]] = {}
    for record in candidates:
        if guard.leak(held_out(record)) is None:
            by_answer.setdefault(record.answer, []).append(record)
    rounds = zip_longest(*(by_answer[answer] for answer in sorted(by_answer)))
    return [record for turn in rounds for record in turn if record][:size]


def write(parts: list[Part], output: Output) -> list[HeldOut]:
    """Write the benchmarks; returns what they hold out."""
    protected = []
    for part in parts:
        rows = np.sort(part.rows(BENCHMARK))
        chosen = [part.record(row) for row in rows]
        protected += map(held_out, chosen)
        for name, lines in files(part.name, list(map(benchmark_row, chosen))).items():
            output.write(f"benchmarks/{name}.jsonl", lines)
        part.account.decide(rows, "kept: benchmark")
    return protected


def write_few_shot(parts: list[Part], guard: Guard, output: Output) -> None:
    """Write the few-shot examples of each benchmark.

    Those of a training pool stay in it; those of a reserve are FidelityBench-Med's no more.
    """
    for part in parts:
        role = FEW_SHOT_ROLE[part.name]
        rows = part.rows(role)
        # A reserve is scarce where the data is: FidelityBench-Med keeps most of it.
        size = FEW_SHOT if role == POOL else min(FEW_SHOT, len(rows) // 4)
        records = {row: part.record(row) for row in rows[:FEW_SHOT_CANDIDATES].tolist()}
        fitting = {r.id: row for row, r in records.items() if len(r.options) == OPTIONS[r.source]}
        chosen = few_shot((records[row] for row in fitting.values()), guard, size)
        for name, lines in files(part.name, list(map(benchmark_row, chosen))).items():
            output.write(f"benchmarks/few_shot/{name}.jsonl", lines)
        if role == RESERVE:
            part.account.decide([fitting[r.id] for r in chosen], "kept: few-shot example")
