"""Fidelity: how close the student is to its own teacher, token by token and text by text.

On three sets of prefixes (`prefixes`) both models predict every token of the same answers; `token_agreement`
says what is measured there. Means are given over tokens (micro) and over examples (macro), each with an
interval that takes the examples, not the tokens, as independent. Besides, the two models' greedy answers
are compared as texts.

Pairs with different tokenizers have no tokens in common: they get bits per byte and the texts.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import PartialState

from eval.batching import BatchSize
from eval.item_store import ItemStore
from eval.options import Options
from eval.prefixes import FILE, SETS, answers, new_tokens, prefix_set, read_questions
from eval.statistics import Estimate, ratio_interval
from eval.subjects import Pair, Subject
from eval.text_fidelity import compare_texts
from eval.token_agreement import TOP_K, compare_states
from medistill_trl.data import Prompt
from medistill_trl.heldout import comparable_ids
from medistill_trl.losses.chunked import Side
from medistill_trl.losses.heads import OutputHead
from medistill_trl.prompts import IGNORED, encode_completion
from medistill_trl.teacher import (
    Completion,
    Sampling,
    completion_log_probs,
    num_targets,
    predicting_states,
)
from medistill_trl.vocabulary import shared_vocabulary

logger = logging.getLogger(__name__)

FILES = [FILE]
EXAMPLES_PER_CHUNK = 64  # so many are lost if the evaluation is killed
TERMS = (
    "kl_teacher_student_nats",
    "kl_student_teacher_nats",
    "js_nats",
    *(f"overlap_at_{k}" for k in TOP_K),
    *(f"teacher_mass_at_{k}" for k in TOP_K),
    "student_nats",
    "teacher_nats",
)
NO_TEACHER = "there is no teacher to compare with; name one with --teacher"
OTHER_TOKENIZERS = (
    "the tokenizers differ, so the two models' distributions are over different things: KL, JS, overlap "
    "and mass are not defined; bits per byte and the texts are, and so is the divergence over the options of a "
    "benchmark's questions (retention, option_js_nats)"
)


def check(pair: Pair, data: Path, options: Options) -> None:
    """Raises UserError for what would stop `evaluate`: no question that fits both models."""
    if pair.teacher is not None:
        read_questions(pair, data, options)


def evaluate(pair: Pair, data: Path, options: Options, store: ItemStore) -> dict:
    """See `docs/evaluation.md` for the result's keys."""
    if pair.teacher is None:
        return {"skipped": NO_TEACHER}
    questions = read_questions(pair, data, options)
    for line in questions.left_out:
        logger.warning("%s: left out %s", FILE, line)
    prompts, longest = questions.prompts, new_tokens(pair, options)
    sampling = Sampling(longest, options.prefix_temperature)
    measure = Measure.of(pair, options, store)
    prefixes, items = {}, []
    for name in SETS:
        texts = prefix_set(name, pair, prompts, sampling, options, store)
        prefixes[name], records = measure.on(name, prompts, texts)
        items += [{"prefixes": name, **record} for record in records]
        logger.info("%s", _sentence(name, prefixes[name]))
    greedy = [
        answers(pair, writer, prompts, Sampling(longest), options, store)
        for writer in ("student", "teacher")
    ]
    ids = [prompt.id for prompt in prompts]
    text, records = compare_texts(ids, *greedy, options.encoder, store.folder)
    return {
        "questions": len(prompts),
        "questions_left_out": len(questions.left_out),
        "sampling": sampling.to_dict(),
        "shared_vocabulary": measure.shared,
        "prefixes": prefixes,
        "text": text,
        "items": items + [{"texts": "greedy", **record} for record in records],
    }


def _sentence(name: str, found: dict) -> str:
    if "micro" in found:
        said = f"KL(T‖S) {_shown(found['micro']['kl_teacher_student_nats'])} nats"
    else:
        student, teacher = (_shown(found[f"{s}_bits_per_byte"]) for s in ("student", "teacher"))
        said = f"student {student} bits per byte, teacher {teacher}"
    return f"fidelity, {name} answers: {said}"


def _shown(estimate: dict) -> str:
    return "not defined" if estimate["value"] is None else f"{estimate['value']:.3f}"


@dataclass
class Measure:
    """Both models on given answers.

    Args:
        shared: Size of the shared vocabulary, over which both distributions are renormalised; None if the
            tokenizers differ.
    """

    pair: Pair
    shared: int | None
    batches: BatchSize
    store: ItemStore

    @classmethod
    def of(cls, pair: Pair, options: Options, store: ItemStore) -> "Measure":
        forms = pair.student.form, pair.teacher.form
        shared = shared_vocabulary(*(form.tokenizer for form in forms))
        batches = BatchSize.of(options.batch_size, PartialState().device)
        return cls(pair, shared, batches, store)

    def on(
        self, name: str, prompts: Sequence[Prompt], texts: Sequence[Completion]
    ) -> tuple[dict, list[dict]]:
        """The summary and the examples' records on one set of answers.

        Args:
            name: Of the set, for the progress bar.
            texts: One for each prompt; empty ones have no token and are left out.
        """
        if self.shared is None:
            return self._bits_per_byte(name, prompts, texts)
        items = [self._item(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        items = [item for item in items if item["completion"]]
        key = {
            "measure": "fidelity, version 1",
            "student": self.pair.student.fingerprint,
            "teacher": self.pair.teacher.fingerprint,
            "vocabulary": self.shared,
        }
        label = f"fidelity on {name} answers"
        records = self.store.records(key, items, self._compare_all, EXAMPLES_PER_CHUNK, label)
        return summary(records), records

    def _item(self, prompt: Prompt, text: Completion) -> dict:
        """Of both models the ids before the answer, and the answer's, which are the same for both."""
        forms = {"student": self.pair.student.form, "teacher": self.pair.teacher.form}
        ids = comparable_ids(text, self.shared)
        whole = len(ids) >= len(text.token_ids)
        shown = text.text if whole else forms["student"].tokenizer.decode(ids)
        prompt_ids = {
            name: form.encode(form.render(prompt.question)) for name, form in forms.items()
        }
        return {"id": prompt.id, **prompt_ids, "completion": ids, "bytes": len(shown.encode())}

    def _compare_all(self, items: list[dict]) -> list[dict]:
        by_length = sorted(range(len(items)), key=lambda i: -len(items[i]["student"]))
        found = self.batches.map(self._compare, [items[i] for i in by_length])
        return [record for _, record in sorted(zip(by_length, found, strict=True))]

    @torch.no_grad()
    def _compare(self, items: Sequence[dict]) -> list[dict]:
        """Sums over the tokens of each example."""
        sides = []
        for subject, head in zip(self.pair.subjects, self._heads, strict=True):
            examples = [_example(item[subject.name], item["completion"]) for item in items]
            states_NH, targets_N = predicting_states(subject.model, examples)
            sides.append(Side.of(states_NH, head, self.shared))
        terms = compare_states(*sides, targets_N)
        lengths = [num_targets(example) for example in examples]
        sums = {
            name: [part.double().sum().item() for part in term.split(lengths)]
            for name, term in terms.items()
        }
        return [
            {
                "tokens": length,
                "bytes": items[row]["bytes"],
                **{name: sums[name][row] for name in TERMS},
            }
            for row, length in enumerate(lengths)
        ]

    @cached_property
    def _heads(self) -> list[OutputHead]:
        return [OutputHead.of(subject.model) for subject in self.pair.subjects]

    def _bits_per_byte(
        self, name: str, prompts: Sequence[Prompt], texts: Sequence[Completion]
    ) -> tuple[dict, list[dict]]:
        """Each model on the same texts in its own tokens."""
        result, records = {"skipped": OTHER_TOKENIZERS}, []
        for subject in self.pair.subjects:
            rows = self._likelihoods(subject, name, prompts, texts)
            result["examples"] = len(rows)
            result[f"{subject.name}_bits_per_byte"] = bits_per_byte(rows, "nats").to_dict()
            records += [{"subject": subject.name, **row} for row in rows]
        return result, records

    def _likelihoods(
        self, subject: Subject, name: str, prompts: Sequence[Prompt], texts: Sequence[Completion]
    ) -> list[dict]:
        items = []
        for prompt, text in zip(prompts, texts, strict=True):
            rendered = subject.form.render(prompt.question)
            ids = encode_completion(subject.form.tokenizer, rendered, text.text, text.finished)
            item = {
                "id": prompt.id,
                "prompt": subject.form.encode(rendered),
                "completion": ids,
                "bytes": len(text.text.encode()),
            }
            items += [item] if text.text else []

        def compute(part: list[dict]) -> Iterator[dict]:
            examples = [_example(item["prompt"], item["completion"]) for item in part]
            scored = self.batches.map(lambda e: completion_log_probs(subject.model, e), examples)
            for item, log_probs in zip(part, scored, strict=True):
                nats = -log_probs.double().sum().item()
                yield {"tokens": len(log_probs), "bytes": item["bytes"], "nats": nats}

        key = {"measure": "likelihood of an answer, version 1", "subject": subject.fingerprint}
        label = f"likelihood of {name} answers, {subject.name}"
        return self.store.records(key, items, compute, EXAMPLES_PER_CHUNK, label)


def _example(prompt_ids: list[int], completion_ids: list[int]) -> dict[str, list[int]]:
    return {
        "input_ids": prompt_ids + completion_ids,
        "labels": [IGNORED] * len(prompt_ids) + completion_ids,
    }


# --- summaries


def summary(records: Sequence[dict]) -> dict:
    """Means over tokens and over examples, and bits per byte of both models."""
    tokens = [record["tokens"] for record in records]
    micro = {
        name: ratio_interval([record[name] for record in records], tokens).to_dict()
        for name in TERMS
    }
    macro = {name: mean_of_examples(records, name).to_dict() for name in TERMS}
    return {
        "examples": len(records),
        "tokens": sum(tokens),
        "micro": micro,
        "macro": macro,
        "student_bits_per_byte": bits_per_byte(records, "student_nats").to_dict(),
        "teacher_bits_per_byte": bits_per_byte(records, "teacher_nats").to_dict(),
    }


def mean_of_examples(records: Sequence[dict], name: str) -> Estimate:
    """The mean over examples of their means over tokens."""
    means = [record[name] / record["tokens"] for record in records]
    return ratio_interval(means, [1] * len(means))


def bits_per_byte(records: Sequence[dict], name: str) -> Estimate:
    """Answers without text are left out: their end token has no bytes to be counted on."""
    records = [record for record in records if record["bytes"]]
    bits = [record[name] / math.log(2) for record in records]
    return ratio_interval(bits, [record["bytes"] for record in records])
