"""Text metrics as `evaluate.Metric` classes that need no hub.

    evaluate.combine([ExactMatch(), Bleu(), Rouge()]).compute(predictions=[…], references=[…])

With `per_example=True` those that are means over examples also give the examples' values, as lists.
"""

from eval.metrics.bleu import Bleu
from eval.metrics.exact_match import ExactMatch
from eval.metrics.rouge import Rouge
from eval.metrics.semantic_similarity import SemanticSimilarity

__all__ = ["Bleu", "ExactMatch", "Rouge", "SemanticSimilarity"]
