"""SFT: cross-entropy on what the teacher writes.

    L = − Σ_t log p_S(y_t | x, y_<t),   y ~ teacher(x)

the report's baseline and sequence-level distillation in the sense of Kim & Rush (2016,
arXiv 1606.07947). Online, as the report has it, the teacher answers each accumulation window's prompts
just before the student trains on them; stored, it has answered every prompt once beforehand.

Completions pass as text, so the two models may have different tokenizers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from datasets import Dataset
from transformers.utils import ModelOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from medistill_trl.arguments import ChunkArguments, CompletionArguments
from medistill_trl.checkpoints import Totals
from medistill_trl.data import Prompt
from medistill_trl.losses.heads import OutputHead, states_before_head
from medistill_trl.losses.token_kl import cross_entropy
from medistill_trl.losses.token_means import TokenMeans
from medistill_trl.methods import Method
from medistill_trl.prompts import PromptFormat, encode_example
from medistill_trl.setting import Setting
from medistill_trl.teacher import (
    Completion,
    Sampling,
    Teacher,
    complete_in_parts,
    window_seed,
)


@dataclass
class SFTDistillConfig(CompletionArguments, ChunkArguments, SFTConfig):
    """`trl.SFTConfig` plus what distillation adds."""

    def __post_init__(self):
        # Examples arrive tokenized, or as prompts that still await the teacher.
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        self.remove_unused_columns = False
        super().__post_init__()


class PromptCollator(DataCollatorForLanguageModeling):
    """Pads tokenized examples; leaves prompts, which have no tokens yet, as a list of rows."""

    def torch_call(self, examples):
        return super().torch_call(examples) if "labels" in examples[0] else examples


class SFTDistillTrainer(SFTTrainer):
    """`SFTTrainer` whose teacher writes the completions of each accumulation window.

    Args:
        teacher: Answers the prompts of the training set; None if the set is tokenized already.
        form: The student's prompt format.
        sampling: How the teacher writes.
        totals: Where tokens are counted.
        teacher_batch_size: Prompts per generation; None for a whole window at once.
    """

    _name = "SFT on teacher completions"

    def __init__(
        self,
        *args,
        form: PromptFormat,
        sampling: Sampling,
        totals: Totals,
        teacher: Teacher | None = None,
        teacher_batch_size: int | None = None,
        **kwargs,
    ):
        collator = PromptCollator(pad_token_id=form.tokenizer.pad_token_id)
        super().__init__(*args, data_collator=collator, processing_class=form.tokenizer, **kwargs)
        self.teacher = teacher
        self.form = form
        self.sampling = sampling
        self.teacher_batch_size = teacher_batch_size
        self.totals = totals
        self._means = {"": TokenMeans(), "eval_": TokenMeans()}  # by prefix in the log
        # TRL's default loss checkpoints each chunk, so the output head runs twice: ours does without. Other losses are
        # TRL's own, and where weights are sharded by FSDP2, a head is only whole within the model's forward.
        self.own_loss = (
            self.args.loss_type == "chunked_nll"
            and not self.aux_loss_enabled
            and not self.is_fsdp_enabled
        )
        if self.own_loss:
            # compute_loss divides by the window's tokens itself: Trainer must not divide by its steps.
            self.model_accepts_loss_kwargs = True
            student = self.accelerator.unwrap_model(self.model)
            OutputHead.of(student).check(student)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        """The window's micro-batches, and its completion tokens over all processes: dividing by them
        makes 1×8 and 8×1 the same step."""
        batches = list(islice(epoch_iterator, num_batches))
        if self.teacher is not None:
            batches = self._write_completions(batches)
        num_items = self._get_num_items_in_batch(batches, device)
        if num_items is not None:
            self.totals.trained += int(num_items)
        return batches, num_items

    def _write_completions(self, batches: list[list[dict]]) -> list[dict[str, torch.Tensor]]:
        rows = [row for batch in batches for row in batch]
        before = self.teacher.generated_tokens
        completions = complete_in_parts(
            self.teacher.complete,
            [row["teacher_prompt"] for row in rows],
            self.sampling,
            window_seed(self),
            self.teacher_batch_size,
        )
        self.totals.generated_teacher += self.teacher.generated_tokens - before
        examples = iter(
            encode_example(self.form, row["question"], c.text, c.finished, self.args.max_length)
            for row, c in zip(rows, completions, strict=True)
        )
        return [self.data_collator(list(islice(examples, len(batch)))) for batch in batches]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.own_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        student = self.accelerator.unwrap_model(model)
        hidden_BTH, _ = states_before_head(model, student, inputs)
        with self.accelerator.autocast():
            total, sums = cross_entropy(
                hidden_BTH, inputs["labels"], OutputHead.of(student), self.args.loss_chunk_size
            )
        self._means[self._prefix].add(sums)
        loss = total / num_items_in_batch.clamp_min(1)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients over processes
        return (loss, ModelOutput()) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means over tokens since the last log."""
        taken = self._means[self._prefix].take(self.accelerator)
        logs |= {self._prefix + n: mean for n, mean in taken.items()}  # evaluate returns it
        super().log(logs, start_time)

    @property
    def _prefix(self) -> str:
        return "" if self.model.training else "eval_"


def build(setting: Setting) -> SFTDistillTrainer:
    """The trainer, with stored completions drawn if the recipe asks for them."""
    teacher_args = setting.arguments.teacher
    stored = teacher_args.teacher_completions == "stored"
    heldout = setting.heldout
    pairs = zip(heldout.prompts, heldout.completions, strict=True)
    return SFTDistillTrainer(
        model=setting.student,
        args=setting.arguments.training,
        train_dataset=_stored_examples(setting) if stored else _prompts(setting),
        eval_dataset=Dataset.from_list([_example(setting, p, c) for p, c in pairs]),
        form=setting.form,
        sampling=setting.sampling,
        totals=setting.totals,
        teacher=None if stored else setting.teacher,
        teacher_batch_size=teacher_args.teacher_batch_size,
    )


def _prompts(setting: Setting) -> Dataset:
    form = setting.teacher.form
    rows = [
        {"question": p.question, "teacher_prompt": form.render(p.question)}
        for p in setting.train_prompts
    ]
    return Dataset.from_list(rows)


def _stored_examples(setting: Setting) -> Dataset:
    drawn = setting.stored_completions(setting.arguments.training.num_completions)
    return Dataset.from_list(
        [
            _example(setting, prompt, completion)
            for prompt, completions in zip(setting.train_prompts, drawn, strict=True)
            for completion in completions
        ]
    )


def _example(setting: Setting, prompt: Prompt, completion: Completion) -> dict[str, list[int]]:
    return encode_example(
        setting.form,
        prompt.question,
        completion.text,
        completion.finished,
        setting.arguments.training.max_length,
    )


METHOD = Method(
    name="sft",
    config=SFTDistillConfig,
    teacher_access="black_box",
    build=build,
    paper="arXiv 1606.07947",
    engines=("zero2", "zero3", "fsdp2"),
    shards_teacher=True,
)
