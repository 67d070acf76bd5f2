"""The forwards and backwards that a step of each method cannot avoid, on the tokens of a step it has taken.

What the objective asks for counts, what only the log asks for does not: on-policy distillation cannot pay
log p_T − log p_S without reading its samples with both models before it learns from them, but need not read them
with the adapter off. What generation has predicted already counts as read again: with a KV cache, and in other
batches, it is rounded differently from the loss's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Trainer

from benchmarks.bare_models import learn, read, write
from medistill_trl.prompts import IGNORED
from medistill_trl.rollouts import Sample, encode_sample
from medistill_trl.setting import Setting

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Taken:
    """What one optimizer step has worked on.

    Args:
        batches: Its micro-batches, as the loss got them.
        num_items: What the loss was divided by.
        drawn: What the student wrote in it, if it did.
    """

    setting: Setting
    trainer: Trainer
    batches: list[Batch]
    num_items: torch.Tensor | int | None
    drawn: list[Sample]


class Recorder:
    """Remembers what a trainer's steps work on; wraps methods of this one trainer.

    Args:
        setting: That the trainer was built from.
        samples: Does the student write?
    """

    def __init__(self, setting: Setting, trainer: Trainer, samples: bool):
        self.setting = setting
        self.trainer = trainer
        self._window: tuple = ([], None)
        self._drawn: list[Sample] = []
        take_batches = trainer.get_batch_samples

        def get_batch_samples(*args):
            self._window = take_batches(*args)
            return self._window

        trainer.get_batch_samples = get_batch_samples
        if samples:
            self._remember_samples()

    def _remember_samples(self) -> None:
        draw = self.trainer._write

        def remembered(rows, seed):
            samples = draw(rows, seed)
            self._drawn += samples
            return samples

        self.trainer._write = remembered

    def take(self) -> Taken:
        """Of the step that has just ended."""
        drawn, self._drawn = self._drawn, []
        return Taken(self.setting, self.trainer, *self._window, drawn)


# --- what the steps are made of


def _own(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def _teachers(batch: Batch) -> Batch:
    names = ("input_ids", "attention_mask", "labels")
    return {name: batch[f"teacher_{name}"] for name in names}


def _learn(taken: Taken) -> None:
    for batch in taken.batches:
        learn(taken.setting.student, **_own(batch))


def _write(taken: Taken) -> None:
    """As many tokens as the longest of each batch that was written together."""
    setting, trainer = taken.setting, taken.trainer
    size = trainer.write_batch_size or max(1, len(taken.drawn))
    for first in range(0, len(taken.drawn), size):
        part = taken.drawn[first : first + size]
        ids = [setting.form.encode(setting.form.render(sample.question)) for sample in part]
        prompts = setting.form.tokenizer.pad(
            {"input_ids": ids}, padding_side="left", return_tensors="pt"
        )
        longest = max(len(sample.token_ids) for sample in part)
        write(setting.student, dict(prompts), max(1, longest))


def _read_drawn(taken: Taken, model: PreTrainedModel) -> None:
    size = taken.trainer.args.per_device_train_batch_size
    for first in range(0, len(taken.drawn), size):
        part = taken.drawn[first : first + size]
        read(model, **padded([encode_sample(taken.setting.form, sample) for sample in part]))


def padded(examples: Sequence[dict[str, list[int]]]) -> Batch:
    """`input_ids`, `attention_mask` and `labels`, (B, T), padded on the right."""
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    labels = [torch.tensor(example["labels"]) for example in examples]
    return {
        "input_ids": pad_sequence(ids, True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
        "labels": pad_sequence(labels, True, IGNORED),
    }


# --- the steps


def cross_entropy(taken: Taken) -> None:
    _learn(taken)


def logits(taken: Taken) -> None:
    for batch in taken.batches:
        read(taken.setting.teacher.model, **_teachers(batch))
        learn(taken.setting.student, **_own(batch))


def layers(taken: Taken) -> None:
    last = max(layer for _, layer in taken.trainer.pairs)
    for batch in taken.batches:
        inputs = _teachers(batch)
        del inputs["labels"]
        read(taken.setting.teacher.model, **inputs, last_layer=last)
        learn(taken.setting.student, **_own(batch))


def pairs(taken: Taken) -> None:
    for batch in taken.batches:
        ids = batch["input_ids"]
        inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
        inputs["labels"] = ids.where(batch["completion_mask"].bool(), IGNORED)
        with taken.trainer.previous.in_place() as reference:
            read(reference, **inputs)
        learn(taken.setting.student, **inputs)


def best_of_n(taken: Taken) -> None:
    _write(taken)
    _read_drawn(taken, taken.setting.teacher.model)
    _learn(taken)


def policy_gradient(taken: Taken) -> None:
    _write(taken)
    _read_drawn(taken, taken.setting.student)
    _read_drawn(taken, taken.setting.teacher.model)
    _learn(taken)


def penalised_policy_gradient(taken: Taken) -> None:
    """With a penalty on leaving the policy that training began with."""
    _write(taken)
    _read_drawn(taken, taken.setting.student)
    _read_drawn(taken, taken.setting.teacher.model)
    if taken.drawn:
        with taken.setting.student.disable_adapter():
            _read_drawn(taken, taken.setting.student)
    _learn(taken)


@dataclass(frozen=True)
class Bare:
    """The bare step of a method.

    Args:
        run: Does it.
        counted: What that is, in words for the table.
        samples: Does the student write?
    """

    run: Callable[[Taken], None]
    counted: str
    samples: bool = False


LEARN = "student forward and backward"
SFT = Bare(cross_entropy, LEARN)
KD = Bare(logits, f"teacher forward, {LEARN}")
LAYERS = Bare(layers, f"teacher forward up to its last mapped layer, {LEARN}")
BARE = {
    "sft": SFT,
    "cot": SFT,
    "logit_kd": KD,
    "adakd": KD,
    "fitnets": LAYERS,
    "attention": LAYERS,
    "spin": Bare(pairs, f"reference forward, {LEARN}, on both completions of each pair"),
    "on_policy": Bare(
        policy_gradient, f"generation, student and teacher forward on the samples, {LEARN}", True
    ),
    "bond": Bare(
        best_of_n,
        f"generation, teacher forward on the samples, {LEARN} on the best of each prompt",
        True,
    ),
    "ppo": Bare(
        penalised_policy_gradient,
        "generation, student, teacher and start policy forward on the samples, and in each epoch "
        f"{LEARN}",
        True,
    ),
}
