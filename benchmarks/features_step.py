"""Time and memory of one FitNets training step, beside the straightforward version:

python -m benchmarks.features_step [--batch 4] [--tokens 256] [--repetitions 5] [--modes full lora] [--tiny]

A step is forward and backward, without optimizer, on the embedded pair and a CPU, in float32; with all weights
training and with LoRA r=16; α 0.5, the recipe's two layer pairs and projections. The variants:

    plain   both models run whole with `output_hidden_states=True`; CE on whole logits; mse on the mapped layers
    trunks  the same without the teacher's logits, and CE from the hidden states, a chunk of tokens at a time
    ours    `FitNetsTrainer.compute_loss`

Markdown on stdout, progress on stderr.
"""

import gc
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from benchmarks.step_pair import LOSS_ALONE, load_pair, no_rows, pair_writer, random_rows
from benchmarks.training_step import (
    MODES,
    checks,
    each_mode,
    options,
    peak,
    peak_during,
    run,
    step_times,
    table_beside_plain,
    timed,
)
from medistill_trl.layers import base_model, layer_pairs
from medistill_trl.losses.heads import OutputHead
from medistill_trl.losses.token_kl import completion_states, distillation_loss
from medistill_trl.methods.fitnets import FitNetsConfig
from medistill_trl.methods.fitnets.trainer import FitNetsTrainer
from medistill_trl.prompts import IGNORED

ALPHA = 0.5
LIMITS = {"memory ours/plain": 0.8}  # above the loaded models


@dataclass
class Bench:
    """What a variant works on.

    Args:
        batch: As the trainer collates it.
        trainer: Ours; its projections and pairs serve all variants.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    batch: dict[str, torch.Tensor]
    trainer: FitNetsTrainer

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {name: self.batch[name] for name in ("input_ids", "attention_mask")}


def prepare(given: Namespace, folder: str) -> Bench:
    """Models, batch and trainer of one mode.

    Args:
        folder: Where the trainer may write; it does not.
    """
    student, teacher, tokenizer = load_pair(given.mode, given.tiny)
    depths = [base_model(m).config.num_hidden_layers for m in (student, teacher)]
    trainer = FitNetsTrainer(
        model=student,
        args=FitNetsConfig(output_dir=folder, alpha=ALPHA, **LOSS_ALONE),
        train_dataset=no_rows(),
        writer=pair_writer(teacher, tokenizer),
        pairs=layer_pairs("uniform", min(2, *depths), *depths),
    )
    rows = random_rows(len(tokenizer), given.batch, given.tokens)
    return Bench(student, teacher, trainer.data_collator(rows), trainer)


# --- the variants: each a forward and a backward


def features(
    bench: Bench, student_states: tuple[torch.Tensor, ...], teacher_states: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """The mean squared error of the mapped layers, summed over pairs."""
    labels_BT = bench.batch["labels"]
    loss = 0.0
    for projection, (layer, teacher_layer) in zip(
        bench.trainer.projections, bench.trainer.pairs, strict=True
    ):
        student_NG, _ = completion_states(student_states[layer], labels_BT)
        teacher_NH, _ = completion_states(teacher_states[teacher_layer], labels_BT)
        loss = loss + F.mse_loss(projection(student_NG), teacher_NH)
    return loss


def plain(bench: Bench) -> None:
    with torch.no_grad():
        teacher = bench.teacher(**bench.inputs, output_hidden_states=True)
    student = bench.student(**bench.inputs, output_hidden_states=True)
    logits_NV, targets_N = completion_states(student.logits, bench.batch["labels"])
    loss = ALPHA * features(bench, student.hidden_states, teacher.hidden_states)
    (loss + (1 - ALPHA) * F.cross_entropy(logits_NV, targets_N)).backward()


def trunks(bench: Bench) -> None:
    base = base_model(bench.student)
    with torch.no_grad():
        teacher = bench.teacher.get_decoder()(**bench.inputs, output_hidden_states=True)
    student = base.get_decoder()(**bench.inputs, output_hidden_states=True)
    states_NH, targets_N = completion_states(student.last_hidden_state, bench.batch["labels"])
    ce, _ = distillation_loss(states_NH, targets_N, OutputHead.of(base), alpha=0.0)
    loss = ALPHA * features(bench, student.hidden_states, teacher.hidden_states)
    (loss + (1 - ALPHA) * ce / len(targets_N)).backward()


def ours(bench: Bench) -> None:
    num_items = (bench.batch["labels"] != IGNORED).sum()
    bench.trainer.compute_loss(bench.student, bench.batch, num_items_in_batch=num_items).backward()


VARIANTS: dict[str, Callable[[Bench], None]] = {"plain": plain, "trunks": trunks, "ours": ours}


# --- the report


def own_peak(given: Namespace) -> int:
    """Bytes that one step of the variant takes above the loaded models, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(given, folder)
    ids = torch.arange(4)[None]
    with torch.no_grad():  # every weight is read from disk once, so none of it counts as the step's
        for model in (bench.student, bench.teacher):
            model(input_ids=ids)
    gc.collect()
    before, most = peak_during(lambda: timed(VARIANTS[given.peak_of], bench))
    return most - before


def compare(given: Namespace) -> str:
    """One mode's section."""
    memory = {name: peak("benchmarks.features_step", name, given) for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(given, folder)
        seconds = step_times(VARIANTS, lambda name: timed(VARIANTS[name], bench), given.repetitions)
    compared = int((bench.batch["labels"] != IGNORED).sum())
    pairs = ", ".join(f"{s} ← {t}" for s, t in bench.trainer.pairs)
    title = f"## {MODES[given.mode]}: {given.batch} × {given.tokens} tokens, {compared} of completions, layers {pairs}"
    found = {"memory ours/plain": memory["ours"] / memory["plain"]}
    return "\n\n".join([title, table_beside_plain(seconds, memory), checks(found, LIMITS)])


def main() -> None:
    run(
        options(__doc__, VARIANTS, batch=4, tokens=256),
        "One FitNets step",
        lambda given: map(compare, each_mode(given)),
        own_peak,
    )


if __name__ == "__main__":
    main()
