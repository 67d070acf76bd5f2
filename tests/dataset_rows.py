"""Rows in the datasets' schemas, written for the tests, and the way from files of them to records."""

import json
from collections.abc import Callable
from typing import NamedTuple

from data_prep import inputs, parts
from data_prep.ledger import Ledger
from data_prep.schema import Record
from data_prep.sources import load
from data_prep.workspace import Workspace

OPTIONS = {"A": "Iron", "B": "Zinc", "C": "Iodine", "D": "Copper"}
QUESTION = "Lack of which element causes endemic goitre?"


def medqa(**changes):
    base = {"question": QUESTION, "options": OPTIONS, "answer": "Iodine", "answer_idx": "C"}
    return base | {"meta_info": "step1", "metamap_phrases": ["endemic goitre"]} | changes


def medqa_hf(**changes):
    endings = {f"ending{i}": text for i, text in enumerate(OPTIONS.values())}
    return {"id": "d-1", "sent1": QUESTION, "sent2": "", **endings, "label": 2} | changes


def key_value(options):
    return [{"key": key, "value": value} for key, value in options.items()]


def medmcqa(**changes):
    base = {"id": "5a9b-11", "question": QUESTION, "cop": 3, "choice_type": "single"}
    options = {"opa": "Iron", "opb": "Zinc", "opc": "Iodine", "opd": "Copper"}
    rest = {"exp": "The thyroid needs iodine.", "subject_name": "Medicine", "topic_name": None}
    return base | options | rest | changes


def cops(*numbers):
    return [medmcqa(id=f"r{i}", cop=number) for i, number in enumerate(numbers)]


def pubmedqa(**changes):
    base = {
        "pubid": "101",
        "QUESTION": "Does iodised salt prevent goitre?",
        "CONTEXTS": ["A.", "B."],
    }
    rest = {"LABELS": ["BACKGROUND", "RESULTS"], "MESHES": ["Goiter"], "YEAR": "1999"}
    return base | rest | {"LONG_ANSWER": "It does.", "final_decision": "yes"} | changes


def pubmedqa_hub(**changes):
    context = {"contexts": ["A.", "B."], "labels": ["BACKGROUND", "RESULTS"], "meshes": ["Goiter"]}
    context |= {"reasoning_required_pred": ["y", "e", "s"], "reasoning_free_pred": ["n", "o"]}
    base = {"pubid": 101, "question": "Does iodised salt prevent goitre?", "context": context}
    return base | {"long_answer": "It does.", "final_decision": "yes"} | changes


def pubhealth(**changes):
    base = {"claim_id": "17", "claim": "Iodised salt prevents goitre.", "label": "true"}
    rest = {"explanation": "Programmes ended it.", "main_text": "Salt was iodised.", "sources": ""}
    return base | rest | {"subjects": "Nutrition"} | changes


class Case(NamedTuple):
    """How one dataset's rows are made and read; `facts` is what `survey` finds for them."""

    row: Callable[..., dict]
    id: str
    question: str
    stem: str = "train"
    split: str = "train"
    facts: object = None


CASES = {
    "medqa": Case(medqa, "id", "question"),
    "medmcqa": Case(medmcqa, "id", "question", facts={"train": 1, "validation": 1}),
    "pubmedqa": Case(pubmedqa, "pubid", "QUESTION", "ori_pqaa", "artificial", frozenset()),
    "pubhealth": Case(pubhealth, "claim_id", "claim"),
}


def without(row, *keys):
    return {key: value for key, value in row.items() if key not in keys}


def normalise(name, row, split=None, facts=None) -> Record:
    case = CASES[name]
    return load(name).normalise(row, split or case.split, case.facts if facts is None else facts)


def write(folder, **files):
    """`train=rows` becomes train.jsonl; a row may be a line of any text."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, rows in files.items():
        texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{stem}.jsonl").write_text("".join(text + "\n" for text in texts))


def read(tmp_path, name, **files):
    """A dataset's part of a build of the files, and the build's ledger."""
    write(tmp_path / "raw" / name, **files)
    ledger = Ledger()
    work = Workspace(tmp_path / "work", "key", 1)
    return parts.read(work, inputs.find(name, tmp_path / "raw"), 0, ledger), ledger
