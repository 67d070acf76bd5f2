"""The five variants of a training step that `kd_step` compares.

Shapes: N completion tokens of the batch, V vocabulary.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from trl.experimental.gkd import GKDTrainer

from benchmarks.bare_models import learn, read
from benchmarks.step_pair import LOSS_ALONE, load_pair, no_rows, random_rows
from medistill_trl.checkpoints import Totals
from medistill_trl.layers import base_model
from medistill_trl.losses.token_kl import completion_states
from medistill_trl.methods.logit_kd import LogitKDConfig, LogitKDTrainer
from medistill_trl.pair_writer import PairWriter
from medistill_trl.prompts import IGNORED, PromptFormat
from medistill_trl.teacher import Sampling, Teacher

ALPHA, TEMPERATURE = 0.5, 2.0


@dataclass
class Bench:
    """What a variant works on.

    Args:
        batch: As `LogitKDTrainer` collates it: labels are `IGNORED` on the prompt.
        trainer: Ours, for its loss.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    batch: dict[str, torch.Tensor]
    trainer: LogitKDTrainer

    @property
    def base(self) -> PreTrainedModel:
        """The student without its adapter's wrapper; the adapted layers stay."""
        return base_model(self.student)

    @property
    def num_items(self) -> torch.Tensor:
        return (self.batch["labels"] != IGNORED).sum()


def prepare(mode: str, batch: int, tokens: int, tiny: bool, folder: str) -> Bench:
    """Models, batch and trainer of one mode.

    Args:
        folder: Where the trainer may write; it does not.
    """
    student, teacher, tokenizer = load_pair(mode, tiny)
    rows = random_rows(len(tokenizer), batch, tokens)
    form = PromptFormat(tokenizer)
    judge = Teacher(teacher, tokenizer, form, "benchmark")
    trainer = LogitKDTrainer(
        model=student,
        args=LogitKDConfig(
            output_dir=folder,
            alpha=ALPHA,
            kd_temperature=TEMPERATURE,
            **LOSS_ALONE,
        ),
        train_dataset=no_rows(),
        writer=PairWriter(form, judge, len(tokenizer), Sampling(1), Totals(), None),
    )
    return Bench(student, teacher, trainer.data_collator(rows), trainer)


# --- the variants: each a forward and a backward


def gkd(bench: Bench) -> None:
    """TRL's method itself, on a stand-in for the trainer that has what it looks at."""
    trainer = SimpleNamespace(
        use_liger_gkd_loss=False,
        teacher_model=bench.teacher,
        beta=0.0,
        generalized_jsd_loss=GKDTrainer.generalized_jsd_loss,
    )
    loss = GKDTrainer.compute_loss(
        trainer, bench.student, bench.batch, num_items_in_batch=bench.num_items
    )
    loss.backward()


def plain(bench: Bench) -> None:
    inputs = {name: bench.batch[name] for name in ("input_ids", "attention_mask")}
    student_NV, targets_N = completion_states(bench.student(**inputs).logits, bench.batch["labels"])
    with torch.no_grad():
        teacher_NV, _ = completion_states(bench.teacher(**inputs).logits, bench.batch["labels"])
    ce = F.cross_entropy(student_NV, targets_N, reduction="sum")
    softened = [(logits / TEMPERATURE).log_softmax(-1) for logits in (student_NV, teacher_NV)]
    kl = F.kl_div(*softened, reduction="sum", log_target=True)
    loss = (1 - ALPHA) * ce + ALPHA * TEMPERATURE**2 * kl
    (loss / len(targets_N)).backward()


def ours(bench: Bench) -> None:
    loss = bench.trainer.compute_loss(
        bench.student, bench.batch, num_items_in_batch=bench.num_items
    )
    loss.backward()


def trunks(bench: Bench) -> None:
    inputs = {name: bench.batch[name] for name in ("input_ids", "attention_mask")}
    read(bench.teacher, **inputs)
    learn(bench.student, **inputs, labels=bench.batch["labels"], with_head=False)


def floor(bench: Bench) -> None:
    inputs = {name: bench.batch[name] for name in ("input_ids", "attention_mask")}
    read(bench.teacher, **inputs, labels=bench.batch["labels"])
    learn(bench.student, **inputs, labels=bench.batch["labels"])


VARIANTS: dict[str, Callable[[Bench], None]] = {
    "gkd": gkd,
    "plain": plain,
    "ours": ours,
    "floor": floor,
    "trunks": trunks,
}
