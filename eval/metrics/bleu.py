"""Corpus BLEU by sacreBLEU (Post 2018, arXiv 1804.08771), with its signature."""

import json

import evaluate
from sacrebleu.metrics import BLEU

from eval.metrics.text_pairs import text_metric

RESAMPLES = 1000


class Bleu(evaluate.Metric):
    """`bleu` from 0 to 100, its 95 % interval `bleu_low`, `bleu_high`, and `bleu_signature`.

    BLEU is not a mean over examples, so there are no values of the examples; the interval is sacreBLEU's
    bootstrap over them, clipped to the scale. Where no answer has four words there is no 4-gram, and BLEU is not
    defined: all three are None.
    """

    def _info(self):
        return text_metric("Corpus BLEU by sacreBLEU.", "Post 2018, arXiv 1804.08771")

    def _compute(self, predictions, references, per_example=False):
        metric = BLEU()
        score = metric.corpus_score(predictions, [references], n_bootstrap=RESAMPLES)
        signature = str(metric.get_signature())
        # The bootstrap's outcome is public only in this form.
        bootstrap = json.loads(score.format(width=6, signature=signature, is_json=True))
        mean = bootstrap.get("confidence_mean", score.score)
        half_width = bootstrap.get("confidence_var", 0.0)
        defined = score.totals[-1] > 0  # 4-grams of the predictions
        values = (score.score, max(0.0, mean - half_width), min(100.0, mean + half_width))
        names = ("bleu", "bleu_low", "bleu_high")
        found = dict(zip(names, values if defined else [None] * 3, strict=True))
        return {**found, "bleu_signature": signature}
