"""Exact match: the share of texts that are the reference, character by character."""

import evaluate

from eval.metrics.text_pairs import means, text_metric


class ExactMatch(evaluate.Metric):
    """`exact_match`, from 0 to 1."""

    def _info(self):
        return text_metric("The share of predictions that equal their reference.", "")

    def _compute(self, predictions, references, per_example=False):
        same = [float(a == b) for a, b in zip(predictions, references, strict=True)]
        return means({"exact_match": same}, per_example)
