"""ROUGE (Lin 2004): n-grams of words and the longest common subsequence, by the `rouge-score` package.

F1 without stemming; words are lower-case letters and digits of ASCII, as in that package.
"""

import functools

import evaluate
from rouge_score.rouge_scorer import RougeScorer

from eval.metrics.text_pairs import means, text_metric

KINDS = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}


@functools.cache
def _scorer() -> RougeScorer:
    return RougeScorer(list(KINDS), use_stemmer=False)


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """F1 of `rouge_1`, `rouge_2` and `rouge_l`, from 0 to 1. Two texts without words match in nothing: 0."""
    scores = _scorer().score(reference, prediction)
    return {name: scores[kind].fmeasure for kind, name in KINDS.items()}


class Rouge(evaluate.Metric):
    """`rouge_1`, `rouge_2` and `rouge_l`: means over examples of F1."""

    def _info(self):
        return text_metric(
            "ROUGE-1, ROUGE-2 and ROUGE-L, F1, without stemming.",
            "Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
        )

    def _compute(self, predictions, references, per_example=False):
        scored = [rouge(a, b) for a, b in zip(predictions, references, strict=True)]
        columns = {name: [scores[name] for scores in scored] for name in KINDS.values()}
        return means(columns, per_example)
