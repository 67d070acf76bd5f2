"""Multiple-choice benchmarks by log-likelihood, through lm-eval's tasks.

The answer is the option whose letter or label the model finds likeliest after the prompt. Every model is
asked the same prompts, without its chat template, as the field does. Besides the accuracy there is what
it must be read against: the floor of answering always alike, and how the answer changes with the order of
the options.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import eq
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.utils import hash_string

from eval.batching import BatchSize
from eval.item_store import ItemStore
from eval.likelihood import SubjectLM
from eval.options import Options
from eval.questions import Benchmark, Question, load_benchmarks, log_skipped
from eval.statistics import brier, expected_calibration_error, macro_f1, wilson
from eval.subjects import Pair, Subject

logger = logging.getLogger(__name__)

FILES = ["benchmarks/*.jsonl", "benchmarks/few_shot/*.jsonl"]
CHUNK = 64  # items between two saves
MEASURE = "log-likelihood of each option, float32, nats"


@dataclass(frozen=True)
class Answer:
    """What a model made of one question; options are counted as in the row, whatever their order was.

    Args:
        log_probs: Of the options, nats.
        cut_tokens: Tokens of the prompt that the model had no room for, cut from the left.
    """

    log_probs: list[float]
    cut_tokens: int

    @property
    def choice(self) -> int:
        """The likeliest option, the first of equals."""
        return self.log_probs.index(max(self.log_probs))

    @property
    def probabilities(self) -> list[float]:
        """Over the options alone: they add up to 1."""
        highest = max(self.log_probs)
        weights = [math.exp(value - highest) for value in self.log_probs]
        return [weight / sum(weights) for weight in weights]


class Respondent:
    """A subject that answers questions; its model is loaded for the first question not in the store."""

    def __init__(self, subject: Subject, store: ItemStore, batch_size: int | None):
        self.subject = subject
        self.store = store
        self.batch_size = batch_size
        self._lm: SubjectLM | None = None

    def answer(self, questions: Sequence[Question], label: str) -> list[Answer]:
        key = {"subject": self.subject.fingerprint, "measure": MEASURE}
        items = [question.item for question in questions]
        records = self.store.records(
            key, items, self._compute, CHUNK, f"{self.subject.name}: {label}"
        )
        return [
            Answer(_unshuffled(record["log_probs"], question.order), record["cut_tokens"])
            for question, record in zip(questions, records, strict=True)
        ]

    def _compute(self, items: list[dict]) -> list[dict]:
        if self._lm is None:
            size = BatchSize.of(self.batch_size, self.subject.model.device)
            self._lm = SubjectLM(self.subject, size)
        requests = [
            Instance("loglikelihood", item, (item["prompt"], choice), index)
            for item in items
            for index, choice in enumerate(item["choices"])
        ]
        likelihoods = iter(self._lm.loglikelihood(requests))
        return [
            {
                "log_probs": [next(likelihoods)[0] for _ in item["choices"]],
                "cut_tokens": self._lm.cut_tokens.get(item["prompt"], 0),
            }
            for item in items
        ]


def _unshuffled(values: Sequence[float], order: Sequence[int]) -> list[float]:
    """Values by place → values by option."""
    by_option = dict(zip(order, values, strict=True))
    return [by_option[option] for option in range(len(order))]


# --- scoring ---------------------------------------------------------------------------------------


def check(pair: Pair, data: Path, options: Options) -> None:
    """Raises UserError for what would stop `evaluate`: a row that cannot be asked, a leaking example."""
    load_benchmarks(data, replace(options, limit=1))


def evaluate(
    pair: Pair, data: Path, options: Options, store: ItemStore, quiet: bool = False
) -> dict:
    """Every benchmark that is there, for the student and the teacher. docs/evaluation.md has the keys.

    Args:
        quiet: Say nothing of what was found.
    """
    benchmarks, skipped = load_benchmarks(data, options)
    result: dict = {"few_shot": options.few_shot}
    result |= {name: describe(benchmark) for name, benchmark in benchmarks.items()}
    items = []
    for subject in pair.subjects:
        respondent = Respondent(subject, store, options.batch_size)
        for name, benchmark in benchmarks.items():
            answers = respondent.answer(benchmark.questions, name)
            shuffled = [
                respondent.answer(questions, f"{name}, shuffled")
                for questions in benchmark.shuffled
            ]
            result[name][subject.name] = score(benchmark, answers) | shuffle_scores(
                benchmark, answers, shuffled
            )
            items += records(benchmark, subject.name, answers, shuffled)
            if not quiet:
                logger.info("%s", _sentence(name, subject.name, result[name]))
    if skipped:
        log_skipped(skipped)
        result["skipped"] = skipped
    return result | {"items": items}


def _sentence(name: str, subject: str, found: dict) -> str:
    floor = found["floor"]
    return (
        f"{name}, {subject}: {100 * found[subject]['accuracy']['value']:.1f}% right; "
        f"{100 * floor['majority_accuracy']:.1f}% for always answering {floor['majority_label']}"
    )


def describe(benchmark: Benchmark) -> dict:
    """What is asked, and what answering without reading it scores."""
    return {
        "num_items": len(benchmark.questions),
        "labels": benchmark.labels,
        "right_answers": _histogram(benchmark, benchmark.answers),
        "floor": floor(benchmark),
    }


def floor(benchmark: Benchmark) -> dict:
    """Accuracy of always giving the commonest answer, and of guessing."""
    label, count = max(_histogram(benchmark, benchmark.answers).items(), key=lambda entry: entry[1])
    return {
        "majority_label": label,
        "majority_accuracy": count / len(benchmark.questions),
        "random_accuracy": 1 / len(benchmark.labels),
    }


def score(benchmark: Benchmark, answers: Sequence[Answer]) -> dict:
    """Accuracy and what goes with it, of one model."""
    right = [a.choice == gold for a, gold in zip(answers, benchmark.answers, strict=True)]
    choices = [answer.choice for answer in answers]
    probabilities = [answer.probabilities for answer in answers]
    accuracy = wilson(sum(right), len(right))
    return {
        "accuracy": accuracy.to_dict(),
        "above_majority": accuracy.interval[0] > floor(benchmark)["majority_accuracy"],
        "macro_f1": macro_f1(choices, benchmark.answers),
        "expected_calibration_error": expected_calibration_error(
            [max(row) for row in probabilities], right
        ),
        "brier": brier(probabilities, benchmark.answers),
        "predictions": _histogram(benchmark, choices),
        "truncated_items": sum(answer.cut_tokens > 0 for answer in answers),
        **_by_medical_subject(benchmark, right),
    }


def _by_medical_subject(benchmark: Benchmark, right: Sequence[bool]) -> dict:
    """Accuracy within each subject, where the benchmark has them."""
    if not benchmark.has_subjects:
        return {}
    by_subject: dict[str, list[bool]] = {}
    for question, hit in zip(benchmark.questions, right, strict=True):
        by_subject.setdefault(question.doc["subject"], []).append(hit)
    return {
        "by_medical_subject": {
            subject or "none": wilson(sum(hits), len(hits)).to_dict()
            for subject, hits in sorted(by_subject.items())
        }
    }


def shuffle_scores(
    benchmark: Benchmark, answers: Sequence[Answer], shuffled: Sequence[Sequence[Answer]]
) -> dict:
    """How much the order of the options decides: accuracy in each order, and how often the same option
    is chosen in all of them."""
    if not shuffled:
        return {}
    asked_again = benchmark.reordered
    first = [answers[number].choice for number in asked_again]
    choices = [first, *([answer.choice for answer in turn] for turn in shuffled)]
    gold = [benchmark.answers[number] for number in asked_again]
    alike = [len(set(chosen)) == 1 for chosen in zip(*choices, strict=True)]
    accuracies = [wilson(sum(map(eq, turn, gold)), len(turn)).value for turn in choices]
    return {
        "option_shuffles": {
            "orders": len(shuffled),
            "items": len(asked_again),
            "items_partly_fixed": benchmark.partly_fixed,
            "items_left_out": len(answers) - len(asked_again),
            "accuracy_as_it_stands": accuracies[0],
            "accuracies": accuracies[1:],
            "answered_alike": wilson(sum(alike), len(alike)).to_dict(),
        }
    }


def _histogram(benchmark: Benchmark, options: Sequence[int]) -> dict[str, int]:
    counts = Counter(options)
    return {label: counts[option] for option, label in enumerate(benchmark.labels)}


def records(
    benchmark: Benchmark,
    subject: str,
    answers: Sequence[Answer],
    shuffled: Sequence[Sequence[Answer]],
) -> list[dict]:
    """Per-item records, for paired tests between models."""
    again = {
        number: [turn[place].choice for turn in shuffled]
        for place, number in enumerate(benchmark.reordered)
    }
    return [
        {
            "benchmark": benchmark.name,
            "subject": subject,
            "id": question.doc["id"],
            "doc_hash": hash_string(repr(sorted(question.doc.items()))),
            "prompt_hash": hash_string(question.prompt),
            "answer": question.doc["answer"],
            "choice": answer.choice,
            "right": answer.choice == question.doc["answer"],
            "log_probs": answer.log_probs,
            "probabilities": answer.probabilities,
            "cut_tokens": answer.cut_tokens,
            "shuffled_choices": again.get(index, []),
        }
        for index, (question, answer) in enumerate(zip(benchmark.questions, answers, strict=True))
    ]
