"""The model card of a finished run."""

from medistill_trl.files import write_text
from medistill_trl.run_directory import RunDirectory

CARD = """---
{base_model}library_name: {library}
tags:
- distillation
- medical
- medistill_trl
- {method}
---

# {name}

A small language model distilled from `{teacher}` with the method `{method}` of medistill_trl.

**For research, not for care.** It answers medical questions fluently and often wrongly. It must not be
used to diagnose, treat or advise anyone.

| held-out teacher completions | before | after |
|---|---|---|
{rows}

Student before distillation: `{student}`{pruned}. Trained on {tokens} completion tokens in {seconds:.0f} s
on {device}. The whole recipe is in `recipe.yaml` beside this folder, the full record in
`results/run.json`.
{base_note}
A student derived from Llama 2 or Meditron is bound by the Llama 2 Community License; otherwise the
licences of teacher and student apply together.
"""

BASE_NOTE = """
The adapter names its base by a folder of the machine it was trained on. Elsewhere, make the same base with
`recipe.yaml` (`--dry_run` is enough) and pass its folder to PEFT.
"""

METRICS = {
    "kl_nats": "KL(T‖S), nats per token",
    "ce_nats": "cross-entropy, nats per token",
    "top1": "top-1 agreement",
    "bits_per_byte": "bits per byte",
}


def write_model_card(directory: RunDirectory, record: dict) -> None:
    """Write final_model/README.md from the run's record."""
    recipe, heldout = record["recipe"], record["heldout"]
    rows = [
        f"| {label} | {heldout['before'][key]:.3f} | {heldout['after'][key]:.3f} |"
        for key, label in METRICS.items()
        if heldout["after"][key] is not None
    ]
    keep = recipe.get("student_keep_layers")
    student = recipe["student_model"]
    on_hub = (
        not keep and not student.startswith((".", "/", "~", "package:")) and student.count("/") == 1
    )
    card = CARD.format(
        name=directory.path.name,
        student=student,
        base_model=f"base_model: {student}\n" if on_hub else "",
        base_note="" if on_hub or not recipe["use_lora"] else BASE_NOTE,
        teacher=recipe["teacher_model"],
        library="peft" if recipe["use_lora"] else "transformers",
        method=record["method"],
        rows="\n".join(rows),
        pruned=f", pruned to {len(keep)} layers" if keep else "",
        tokens=record["tokens"]["trained"],
        seconds=record["seconds"],
        device=record["device"],
    )
    write_text(directory.final_model / "README.md", card)
