"""PubMedQA (Jin et al. 2019, arXiv 1909.06146).

The release is JSON keyed by PMID with QUESTION, CONTEXTS, LONG_ANSWER, final_decision; the hub has
one row per abstract. The official test set is 500 of the 1,000 labelled abstracts; the hub does not
say which, so their PMIDs (test_ground_truth.json of the release) stand in a file beside this one.
"""

import ast
import json
from pathlib import Path

from data_prep.schema import Record
from data_prep.sources import BENCHMARK, PASSAGES, POOL, RESERVE, DataFile, Hub, Source
from data_prep.sources.rows import BadRow, clean, optional_text, pubmed_id, text
from medistill_trl.errors import UserError

ANSWERS = ("yes", "no", "maybe")
GROUND_TRUTH = "test_ground_truth.json"
_PACKAGED = Path(__file__).with_name("pubmedqa_test_pmids.txt")


def official_test_pmids(folder: Path, files: list[DataFile]) -> frozenset[str]:
    """PMIDs of the test set: of the release's own file where the folder has it, else as packaged."""
    told = sorted(folder.rglob(GROUND_TRUTH))
    if not told:
        return frozenset(_PACKAGED.read_text(encoding="utf-8").split())
    try:
        return frozenset(json.loads(told[0].read_text(encoding="utf-8")).keys())
    except (ValueError, AttributeError) as error:
        raise UserError(f"{told[0]}: must be a JSON object keyed by PMID ({error})") from error


def normalise(row: dict, split: str, test: frozenset[str]) -> Record:
    pmid = pubmed_id(row)
    if pmid is None:
        raise BadRow("has no pubid")
    question = text(row, "QUESTION", "question")
    if split == "labelled" and pmid in test:
        split = "test"
    return Record(
        source="pubmedqa",
        split=split,
        native_id=pmid,
        question=question,
        options=ANSWERS,
        answer=-1 if split == "unlabelled" else _decision(row),
        explanation=optional_text(row, "LONG_ANSWER", "long_answer"),
        context=_contexts(row),
        pmid=pmid,
    )


def _decision(row: dict) -> int:
    decision = text(row, "final_decision").lower()
    if decision not in ANSWERS:
        raise BadRow(f"final_decision is {decision[:40]!r}, not one of {', '.join(ANSWERS)}")
    return ANSWERS.index(decision)


def _contexts(row: dict) -> tuple[str, ...]:
    context = row.get("context")
    contexts = row.get(
        "CONTEXTS", context.get("contexts") if isinstance(context, dict) else context
    )
    if isinstance(contexts, str):
        contexts = _listed(contexts)
    if not isinstance(contexts, list) or not contexts:
        raise BadRow(f"contexts must be a list of texts, got {type(contexts).__name__}")
    return tuple(passage for text in contexts if (passage := clean(text, "a context")))


def _listed(value: str) -> list:
    """A list that some exports store as the text of a Python list; any other text is one passage."""
    if not value.startswith("["):
        return [value]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadRow("contexts is the text of a list that cannot be read") from error


SOURCE = Source(
    name="pubmedqa",
    hub=Hub(
        "qiaojin/PubMedQA",
        "9001f2853fb87cab8d220904e0de81ac6973b318",
        ("pqa_*/*.parquet",),
    ),
    splits=(
        ("ground_truth", None),
        ("pqaa|artificial", "artificial"),
        ("pqau|unlabel", "unlabelled"),
        ("test_set", "test"),
        ("pqal|label|train_set|dev_set", "labelled"),
    ),
    roles={"artificial": POOL, "labelled": RESERVE, "test": BENCHMARK, "unlabelled": PASSAGES},
    normalise=normalise,
    survey=official_test_pmids,
)
