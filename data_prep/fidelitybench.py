"""FidelityBench-Med: questions with the evidence an answer must rest on.

    {"id", "source", "question", "evidence": [{"id", "text"}], "reference", "answer",
     "claims": [{"text", "label"}]}

One to three passages. Labels are derived where the dataset allows it, and only there:
- PubMedQA, answered yes or no: the sentences of the authors' conclusion are `supported` (by the
  abstract they conclude; nobody has checked each sentence);
- PubHealth: a claim found true is `supported`, false `refuted`, unproven `unknown` by the article.
A mixture, and an abstract answered maybe, have no claims.
"""

import itertools
import re
from collections import Counter

from data_prep.benchmarks import held_out
from data_prep.decontaminate import Guard, HeldOut
from data_prep.fingerprints import words
from data_prep.ledger import Ledger
from data_prep.open_ended import Unconvertible, convert
from data_prep.output import Output
from data_prep.parts import Part
from data_prep.schema import Record
from data_prep.sources import RESERVE

PASSAGES = 3
PASSAGE_WORDS = 120
SOURCES = ("pubmedqa", "pubhealth")
NO_EVIDENCE = "no evidence text"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'“])")
_LABELS = {"true": "supported", "false": "refuted", "unproven": "unknown"}


def prompt_row(record: Record, guard: Guard) -> dict | str:
    """The benchmark's row, or the reason why there is none."""
    if not record.context or not record.explanation:
        return NO_EVIDENCE
    leak = guard.leak(held_out(record))
    if leak:
        return f"contaminated: {leak.stage}"
    try:
        form = convert(record)
    except Unconvertible as error:
        return f"cannot be converted: {error}"
    passages = evidence(record)
    return {
        "id": record.id,
        "source": record.source,
        "question": form.question,
        "evidence": [{"id": f"{record.id}-e{n}", "text": t} for n, t in enumerate(passages, 1)],
        "reference": form.reference,
        "answer": form.answer,
        "claims": claims(record),
    }


def evidence(record: Record) -> list[str]:
    """One to three passages: an abstract's sections, or the parts of an article nearest the claim."""
    if record.source == "pubmedqa":
        return _merged(record.context)
    parts = _parts(" ".join(record.context))
    asked = set(words(record.question))
    overlap = [len(asked.intersection(words(part))) for part in parts]
    best = sorted(range(len(parts)), key=lambda n: (-overlap[n], n))[:PASSAGES]
    return [parts[n] for n in sorted(best)]


def _merged(sections: tuple[str, ...]) -> list[str]:
    """At most three passages of about as many sections each, in order."""
    count = min(PASSAGES, len(sections))
    ends = [round(len(sections) * n / count) for n in range(count + 1)]
    return [" ".join(sections[a:b]) for a, b in itertools.pairwise(ends)]


def _parts(article: str) -> list[str]:
    """An article cut at sentence ends into passages of about `PASSAGE_WORDS` words."""
    parts: list[list[str]] = [[]]
    for sentence in sentences(article):
        if sum(len(s.split()) for s in parts[-1]) >= PASSAGE_WORDS:
            parts.append([])
        parts[-1].append(sentence)
    return [" ".join(part) for part in parts]


def sentences(text: str) -> list[str]:
    return [s for s in _SENTENCE_END.split(" ".join(text.split())) if s]


def claims(record: Record) -> list[dict[str, str]]:
    answer = record.options[record.answer]
    if record.source == "pubmedqa":
        told = sentences(record.explanation) if answer != "maybe" else []
        return [{"text": sentence, "label": "supported"} for sentence in told]
    return [{"text": record.question, "label": _LABELS[answer]}] if answer in _LABELS else []


def write(
    parts: list[Part], guard: Guard, output: Output, ledger: Ledger, size: int
) -> list[HeldOut]:
    """Write the benchmark from the datasets' reserves, in turn; returns what it holds out."""
    waiting = {part.name: (part, iter(part.rows(RESERVE))) for part in parts}
    waiting = {name: waiting[name] for name in SOURCES if name in waiting}
    given, asked = Counter(), set()
    lines: list[dict] = []
    protected: list[HeldOut] = []
    while waiting and len(lines) < size:
        part, rows = waiting[min(waiting, key=given.__getitem__)]
        row = next(rows, None)
        if row is None:
            del waiting[part.name]
            continue
        record = part.record(row)
        line = prompt_row(record, guard) if record.question not in asked else "duplicate: exact"
        asked.add(record.question)
        if isinstance(line, str):
            part.account.decide([row], f"dropped: {line}")
            ledger.example(line, id=record.id, question=record.question)
            continue
        part.account.decide([row], "kept: fidelitybench")
        lines.append(line)
        given[part.name] += 1
        protected.append(held_out(record))
    output.write("fidelitybench_med.jsonl", lines)
    if len(lines) < size:
        ledger.notes.append(
            f"FidelityBench-Med has {len(lines)} of {size} prompts: the rows in reserve are used up."
        )
    return protected
