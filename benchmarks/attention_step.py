"""Time and memory of one attention-transfer step beside the straightforward version:

python -m benchmarks.attention_step [--batch 2] [--tokens 512] [--repetitions 5] [--modes full lora] [--bf16] [--tiny]

A step is forward and backward, without optimizer, on the embedded pair and a CPU, in float32, or with the
products in bfloat16 as on a GPU. The variants:

    plain   both models on eager attention, with the maps of all layers from `output_attentions`; then
            (1−α) CE on whole logits + α Σ ‖A_S − A_T‖² over the mapped pairs
    ours    `AttentionTrainer.compute_loss`, all layers on sdpa
    trunks  both trunks on sdpa, no head and no loss: what no method does without

Times are of the processor, which others on the machine affect less than the clock's. Memory is how far the
peak resident size of a process of its own lies above what it held before the step: the loaded models. Markdown
on stdout, progress on stderr.
"""

import tempfile
import time
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
    paired_ratio,
    peak,
    peak_during,
    run,
    step_times,
    table_beside_plain,
)
from medistill_trl.layers import base_model, pairs_of
from medistill_trl.methods.attention import AttentionConfig, AttentionTrainer
from medistill_trl.prompts import IGNORED

ALPHA = 0.5
# Ratio → the most it may be.
LIMITS = {"memory": 0.4, "time": 0.7}


@dataclass
class Bench:
    """What a variant works on."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    batch: dict[str, torch.Tensor]
    trainer: AttentionTrainer
    bf16: bool


def prepare(given: Namespace, folder: str) -> Bench:
    """Models, batch and trainer of one mode.

    Args:
        folder: Where the trainer may write; it does not.
    """
    student, teacher, tokenizer = load_pair(given.mode, given.tiny)
    pairs = 1 if given.tiny else 2
    args = AttentionConfig(output_dir=folder, alpha=ALPHA, num_layer_pairs=pairs, **LOSS_ALONE)
    trainer = AttentionTrainer(
        model=student,
        args=args,
        train_dataset=no_rows(),
        writer=pair_writer(teacher, tokenizer),
        pairs=pairs_of(args, student.config, teacher.config),
        relation_heads=None,
    )
    rows = random_rows(len(tokenizer), given.batch, given.tokens)
    return Bench(student, teacher, trainer.data_collator(rows), trainer, given.bf16)


# --- the variants


def plain(bench: Bench) -> torch.Tensor:
    inputs = {name: bench.batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        teacher = bench.teacher(**inputs, output_attentions=True).attentions
    student = bench.student(**inputs, output_attentions=True)
    labels = bench.batch["labels"][:, 1:].flatten()
    ce = F.cross_entropy(student.logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORED)
    rows = bench.batch["compared"].bool()
    maps = [(student.attentions[s - 1], teacher[t - 1]) for s, t in bench.trainer.pairs]
    apart = sum((own - its).square().sum((1, 3))[rows].sum() for own, its in maps)
    return (1 - ALPHA) * ce + ALPHA * apart / rows.sum()


def ours(bench: Bench) -> torch.Tensor:
    return bench.trainer.compute_loss(bench.student, bench.batch)


def trunks(bench: Bench) -> torch.Tensor:
    inputs = {name: bench.batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        bench.teacher.get_decoder()(**inputs, use_cache=False)
    decoder = base_model(bench.student).get_decoder()
    return decoder(**inputs, use_cache=False).last_hidden_state.float().mean()


VARIANTS: dict[str, Callable[[Bench], torch.Tensor]] = {
    "plain": plain,
    "ours": ours,
    "trunks": trunks,
}


def step(name: str, bench: Bench) -> tuple[float, float]:
    """Processor seconds of a forward and backward, and the loss."""
    for model in (bench.student, bench.teacher):
        base_model(model).set_attn_implementation("eager" if name == "plain" else "sdpa")
    bench.student.zero_grad(set_to_none=True)
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=bench.bf16):
        loss = VARIANTS[name](bench)
    loss.backward()
    return time.process_time() - start, loss.item()


# --- the report


def own_peak(given: Namespace) -> int:
    """Bytes: how far one step of the variant takes this process above what it held before."""
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(given, folder)
    # All weights must be in memory before: the plain step would otherwise read those of the heads.
    for model in (bench.student, bench.teacher):
        for parameter in model.parameters():
            parameter.sum()
    before, most = peak_during(lambda: step(given.peak_of, bench))
    return most - before


def step_times_of_one_loss(bench: Bench, repetitions: int) -> dict[str, list[float]]:
    """Processor seconds of every repetition but the first.

    Raises:
        RuntimeError: the two losses differ. No step changes a weight, so they are the same in all repetitions.
    """
    losses = {}

    def seconds_of(name: str) -> float:
        seconds, losses[name] = step(name, bench)
        return seconds

    seconds = step_times(VARIANTS, seconds_of, repetitions)
    tolerance = 1e-2 if bench.bf16 else 1e-4
    if abs(losses["plain"] - losses["ours"]) > tolerance * abs(losses["plain"]):
        raise RuntimeError(f"the variants compute different losses: {losses}")
    return seconds


def compare(given: Namespace) -> str:
    """One mode's section."""
    memory = {name: peak("benchmarks.attention_step", name, given) for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(given, folder)
        seconds = step_times_of_one_loss(bench, given.repetitions)
    pairs = ", ".join(f"{teacher} → {student}" for student, teacher in bench.trainer.pairs)
    precision = "bfloat16 products" if given.bf16 else "float32"
    title = f"## {MODES[given.mode]}, {precision}: {given.batch} × {given.tokens} tokens, layers {pairs}"
    found = {
        "memory": memory["ours"] / memory["plain"],
        "time": paired_ratio(seconds["ours"], seconds["plain"]),
    }
    table = table_beside_plain(seconds, memory, "processor s")
    return "\n\n".join([title, table, checks(found, LIMITS)])


def main() -> None:
    parser = options(__doc__, VARIANTS, batch=2, tokens=512)
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    run(
        parser,
        "One attention-transfer step",
        lambda given: map(compare, each_mode(given)),
        own_peak,
    )


if __name__ == "__main__":
    main()
