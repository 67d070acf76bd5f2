"""A Logit-KD step from stored teacher logits beside one with the teacher at hand, and what is lost:

    python -m benchmarks.stored_logits [--batch 4] [--tokens 256] [--repetitions 5] [--modes full lora] [--prompts 8] [--tiny]

A step is forward and backward, without optimizer, on the embedded pair and a CPU, in float32; with all
weights training and with LoRA r=16; from the store that includes reading it. What is lost is measured on completions
that the teacher samples, at T = 2, on the student as it comes.

Markdown on stdout, progress on stderr.
"""

import tempfile
from argparse import Namespace
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from benchmarks.kd_variants import ALPHA, TEMPERATURE
from benchmarks.step_pair import LOSS_ALONE, load_pair, no_rows, pair_writer, random_rows
from benchmarks.training_step import (
    MODES,
    checks,
    each_mode,
    options,
    paired_ratio,
    peak,
    peak_during,
    ratio_with_spread,
    run,
    say,
    step_times,
    timed,
)
from medistill_trl.data import read_prompts
from medistill_trl.losses.heads import OutputHead
from medistill_trl.losses.token_kl import distillation_loss
from medistill_trl.losses.top_k import top_k_distillation_loss
from medistill_trl.methods.logit_kd import LogitKDConfig
from medistill_trl.methods.logit_kd.stored import StoredLogitKDTrainer
from medistill_trl.methods.logit_kd.trainer import LogitKDTrainer
from medistill_trl.pair_writer import PairWriter
from medistill_trl.teacher import Sampling, complete, predicting_states
from medistill_trl.teacher_logits import (
    Kept,
    TeacherLogits,
    in_batches,
    key_of,
    read_by,
    teacher_side,
)

TOP_K = 64
SIZES = (8, 16, 64, 256)  # of K, in the table of what is lost
LIMITS = {"step time stored/online": 0.8}
PROMPTS = "data_prep/sample/processed/train.jsonl"


@dataclass
class Bench:
    """What a variant works on.

    Args:
        trainer: Of this variant, for its loss and its collator.
        rows: Encoded pairs; for the store with their keys.
    """

    student: PreTrainedModel
    trainer: LogitKDTrainer
    rows: list[dict]


def step(bench: Bench) -> None:
    """Collating belongs to it: the store is read then."""
    batch = bench.trainer.data_collator(bench.rows)
    tokens = (batch["labels"] != -100).sum()
    bench.trainer.compute_loss(bench.student, batch, num_items_in_batch=tokens).backward()


def prepare(given: Namespace, names: list[str], folder: str) -> dict[str, Bench]:
    """The variants of one mode, on one student. Without `online` the teacher is let go of."""
    student, teacher, tokenizer = load_pair(given.mode, given.tiny)
    rows = random_rows(len(tokenizer), given.batch, given.tokens)
    args = LogitKDConfig(output_dir=folder, alpha=ALPHA, kd_temperature=TEMPERATURE, **LOSS_ALONE)
    common = {"model": student, "args": args, "train_dataset": no_rows()}
    found = {}
    if "stored" in names:
        kept = Kept.of("benchmark", len(tokenizer), TOP_K, TEMPERATURE)
        logits = TeacherLogits(folder, kept)
        keys = logits.fill(rows, in_batches(lambda batch: read_by(teacher, kept, batch)))
        keyed = [row | {"top_k": key} for row, key in zip(rows, keys, strict=True)]
        writer = pair_writer(None, tokenizer)
        trainer = StoredLogitKDTrainer(**common, writer=writer, logits=logits)
        found["stored"] = Bench(student, trainer, keyed)
    if "online" in names:
        trainer = LogitKDTrainer(**common, writer=pair_writer(teacher, tokenizer))
        found["online"] = Bench(student, trainer, rows)
    return found


VARIANTS = ("online", "stored")


def own_peak(given: Namespace) -> int:
    """Bytes: the largest resident size of this process during a step, models included."""
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(given, [given.peak_of], folder)[given.peak_of]
        return peak_during(lambda: timed(step, bench))[1]


# --- the report


def compare(given: Namespace) -> str:
    """One mode's section."""
    memory = {name: peak("benchmarks.stored_logits", name, given) for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        benches = prepare(given, list(VARIANTS), folder)
        seconds = step_times(VARIANTS, lambda name: timed(step, benches[name]), given.repetitions)
    lines = [f"## {MODES[given.mode]}: {given.batch} × {given.tokens} tokens, k = {TOP_K}", ""]
    lines += ["| | median s | / online | peak GB, models included |", "|---|---|---|---|"]
    for name in VARIANTS:
        times = sorted(seconds[name])
        ratio = ratio_with_spread(seconds[name], seconds["online"])
        cells = f"{times[len(times) // 2]:.2f} | {ratio} | {memory[name] / 1e9:.2f}"
        lines.append(f"| {name} | {cells} |")
    found = {"step time stored/online": paired_ratio(seconds["stored"], seconds["online"])}
    return "\n".join([*lines, "", checks(found, LIMITS)])


@torch.no_grad()
def losses(given: Namespace) -> str:
    """The section on what is lost, and on bytes."""
    say("== what is lost")
    student, teacher, tokenizer = load_pair("full", given.tiny)
    writer = pair_writer(teacher, tokenizer)
    # The tiny tokenizer has no chat template, and its words cannot be searched for where a plain prompt's answer ends.
    examples = (
        random_rows(len(tokenizer), given.batch, given.tokens)
        if given.tiny
        else _completions(writer, given.prompts)
    )
    sides = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in examples]
    states_NH, targets_N = predicting_states(student.eval(), sides)
    theirs_NH, _ = predicting_states(teacher, [teacher_side(row) for row in examples])
    head, kd = OutputHead.of(student), {"alpha": 1.0, "temperature": TEMPERATURE}
    _, whole = distillation_loss(
        states_NH, targets_N, head, theirs_NH, OutputHead.of(teacher), **kd
    )
    count = len(targets_N)
    lines = [
        f"## What is lost: {count} tokens of {len(examples)} completions, T = {TEMPERATURE:g}",
        "",
    ]
    lines += [
        "| k | bytes a token | teacher's mass in the tail, T = 1 | divergence, nats | of the whole |"
    ]
    lines += ["|---|---|---|---|---|"]
    for top_k in SIZES:
        kept = Kept.of("benchmark", len(tokenizer), top_k, TEMPERATURE)
        with tempfile.TemporaryDirectory() as folder:
            logits = TeacherLogits(folder, kept)
            logits.fill(examples, in_batches(partial(read_by, teacher, kept)))
            stored = logits.batch([key_of(row) for row in examples])
            size = logits.num_bytes / logits.num_tokens
        _, sums = top_k_distillation_loss(states_NH, targets_N, head, stored, **kd)
        mass, found = (sums[name].item() / count for name in ("teacher_tail_mass", "divergence"))
        share = sums["divergence"].item() / whole["divergence"].item()
        lines.append(f"| {kept.top_k} | {size:.0f} | {mass:.4f} | {found:.4f} | {share:.4f} |")
    nats = whole["divergence"].item() / count
    return "\n".join([*lines, f"| all | {2 * len(tokenizer):,} in float16 | 0 | {nats:.4f} | 1 |"])


def _completions(writer: PairWriter, prompts: int) -> list[dict]:
    """Pairs of what the teacher samples, 64 tokens at most."""
    questions = [prompt.question for prompt in read_prompts(PROMPTS, "fail", prompts)[0]]
    form = writer.teacher.form
    rendered = [form.render(question) for question in questions]
    drawn = complete(writer.teacher.model, form, rendered, Sampling(64, 1.0), seed=0)
    pairs = zip(questions, drawn, strict=True)
    return [writer.encode(question, completion) for question, completion in pairs]


def sections(given: Namespace) -> list[str]:
    return [*(compare(one) for one in each_mode(given)), losses(given)]


def main() -> None:
    parser = options(__doc__, VARIANTS, batch=4, tokens=256)
    parser.add_argument("--prompts", type=int, default=8, help="whose completions say what is lost")
    run(parser, "Logit-KD from stored teacher logits", sections, own_peak)


if __name__ == "__main__":
    main()
