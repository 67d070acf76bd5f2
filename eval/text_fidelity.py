"""Two models' answers as texts: the same words, the same sense?"""

from collections.abc import Sequence
from pathlib import Path

import evaluate
from accelerate import PartialState

from eval.metrics import Bleu, ExactMatch, Rouge, SemanticSimilarity
from eval.metrics.semantic_similarity import HUB_ID, load_encoder
from eval.statistics import ratio_interval, wilson
from medistill_trl.errors import UserError
from medistill_trl.teacher import Completion

NO_FOUR_WORDS = "no answer has four words, so there are no 4-grams to count"
MEANS = ("rouge_1", "rouge_2", "rouge_l", "semantic_similarity")


def compare_texts(
    ids: Sequence[str],
    student: Sequence[Completion],
    teacher: Sequence[Completion],
    encoder: str | None,
    folder: Path,
) -> tuple[dict, list[dict]]:
    """The summary and a record for each question.

    Args:
        ids: Of the questions.
        student: Its answers.
        teacher: Its answers, the references.
        encoder: Hub id or folder of a sentence encoder; None for the default one.
        folder: Where `evaluate` may make its folders.
    """
    settings = {"cache_dir": str(folder / "metrics"), "keep_in_memory": True}
    metrics = [kind(**settings) for kind in (ExactMatch, Bleu, Rouge)]
    similarity: dict = {}
    try:
        device = str(PartialState().device)
        metrics.append(SemanticSimilarity(load_encoder(encoder, device), **settings))
    except UserError as error:
        similarity = {"skipped": str(error)}
    texts = [[answer.text for answer in answers] for answers in (student, teacher)]
    scores = evaluate.combine(metrics).compute(*texts, per_example=True)
    columns = {
        name.removesuffix("_per_example"): values
        for name, values in scores.items()
        if name.endswith("_per_example")
    }
    summary = {
        "exact_match": wilson(int(sum(columns["exact_match"])), len(ids)).to_dict(),
        "bleu": _bleu(scores, len(ids)),
        "semantic_similarity": similarity,
    }
    for name in MEANS:
        if name in columns:
            summary[name] = ratio_interval(columns[name], [1] * len(ids)).to_dict()
    if not similarity:
        summary["semantic_similarity"]["encoder"] = encoder or HUB_ID
    return summary, _records(ids, texts, columns)


def _bleu(scores: dict, n: int) -> dict:
    found = {"n": n, "signature": scores["bleu_signature"]}
    if scores["bleu"] is None:
        return {"value": None, "interval_95": None, **found, "note": NO_FOUR_WORDS}
    interval = [scores["bleu_low"], scores["bleu_high"]]
    return {"value": scores["bleu"], "interval_95": interval, **found}


def _records(
    ids: Sequence[str], texts: Sequence[Sequence[str]], columns: dict[str, list[float]]
) -> list[dict]:
    return [
        {
            "id": id,
            "student_text": student,
            "teacher_text": teacher,
            **{name: values[row] for name, values in columns.items()},
        }
        for row, (id, student, teacher) in enumerate(zip(ids, *texts, strict=True))
    ]
