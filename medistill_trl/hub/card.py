"""The model card of a run: what it is, how it was made, what it kept of its teacher, what binds it.

A pure function of what the run recorded, so that it can be written again when more is known of the run.
"""

import json
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from medistill_trl.files import write_text
from medistill_trl.hub import licences, scores
from medistill_trl.recipe import read_saved
from medistill_trl.run_directory import EVALUATION, RECORD, RunDirectory
from medistill_trl.schema import read_about

CARD_NAME = "README.md"
METRICS = {
    "kl_nats": "KL(T‖S), nats per token",
    "ce_nats": "cross-entropy, nats per token",
    "top1": "top-1 agreement",
    "bits_per_byte": "bits per byte",
}
FEW_PROMPTS = 1000  # below this the card says that the data was for trying things out

WARNING = """> **For research, not for care.** This model answers medical questions fluently and often wrongly. It must not be
> used to diagnose, treat or advise anyone, nor to inform such a decision."""

INTENDED_USE = """## Intended use

Research on knowledge distillation: how much of a teacher a small model keeps, and by which method. Not for
patients, not for clinical decisions, not as a source of medical facts. Nobody has reviewed its answers medically."""

LOCAL_BASE = """The adapter's base is not on the hub under a name of its own: `adapter_config.json` names a folder of the machine it
was trained on. Make the same base from {student}{layers} and pass its folder as `base_model_name_or_path`."""


def write_model_card(run: RunDirectory, record: dict) -> None:
    """Write final_model/README.md from the run's record."""
    write_text(run.final_model / CARD_NAME, str(model_card(record)))


def read_record(run: RunDirectory) -> dict:
    """results/run.json, or of a run that has none yet what it was started with."""
    if (run.results / RECORD).is_file():
        return run.read_result(RECORD)
    recipe, inputs = read_saved(run.recipe), run.read_inputs()
    models = {role: inputs[role] for role in ("student", "teacher")}
    return {"method": recipe["method"], "recipe": recipe, "models": models}


def read_evaluation(run: RunDirectory, record: dict) -> dict | None:
    """results/comprehensive_evaluation.json where there is one, and it is of this run."""
    if not run.evaluation.is_file():
        return None
    evaluation = run.read_result(EVALUATION)
    return evaluation if evaluation["recipe"] == record["recipe"] else None


def model_card(record: dict, evaluation: dict | None = None) -> ModelCard:
    """The card of a run.

    Args:
        record: See `read_record`; one without measurements gives a card that says so.
        evaluation: See `read_evaluation`.
    """
    name = Path(record["recipe"]["output_dir"]).name
    sections = [
        f"# {name}",
        _introduction(record),
        WARNING,
        INTENDED_USE,
        _making(record),
        _heldout(record.get("heldout")),
        _evaluation(evaluation),
        _limits(record),
        _loading(record),
        _licence(record["recipe"]),
    ]
    text = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{_metadata(name, record, evaluation).to_yaml()}\n---\n\n{text}\n")


def _metadata(name: str, record: dict, evaluation: dict | None) -> ModelCardData:
    recipe = record["recipe"]
    results = scores.eval_results(evaluation) if evaluation else []
    return ModelCardData(
        model_name=name if results else None,
        base_model=recipe["student_model"] if _is_on_hub(record) else None,
        library_name="peft" if recipe["use_lora"] else "transformers",
        pipeline_tag="text-generation",
        tags=["distillation", "medical", "medistill_trl", record["method"]],
        eval_results=results or None,
        **licences.metadata(recipe["student_model"], recipe["teacher_model"]),
    )


def _is_on_hub(record: dict) -> bool:
    """Whether the student's base can be had from the hub as it is, neither pruned nor from a folder."""
    return record["models"]["student"].startswith(f"{record['recipe']['student_model']}@")


def public_name(model: str) -> str:
    """A model's name without folders of this machine."""
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    return f"`{Path(model).name}` (a local model)" if is_path else f"`{model}`"


# --- sections ----------------------------------------------------------------------------------------


def _introduction(record: dict) -> str:
    recipe = record["recipe"]
    summary, _ = read_about(f"medistill_trl.methods.{record['method']}")
    return (
        f"A small language model distilled from {public_name(recipe['teacher_model'])} by medistill_trl. "
        f"{summary}"
    )


def _making(record: dict) -> str:
    recipe = record["recipe"]
    rows = [
        ("method", f"`{record['method']}`, {_paper(record['method'])}"),
        ("teacher", public_name(recipe["teacher_model"]) + _loaded(recipe, "teacher")),
        (
            "student",
            public_name(recipe["student_model"]) + _pruned(recipe) + _loaded(recipe, "student"),
        ),
        ("trained", _trained(recipe)),
    ]
    if "data" in record:
        rows += [("data", "; ".join(map(_data_file, record["data"]["files"])))]
    if "tokens" in record:
        rows += [
            ("budget", _budget(record)),
            ("seed", str(record["seed"])),
            ("made with", _versions(record)),
        ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    unfinished = (
        ""
        if "heldout" in record
        else "\n\n**The run was not finished** when this card was written."
    )
    return f"## How it was made\n\n| | |\n|---|---|\n{table}{unfinished}"


def _paper(method: str) -> str:
    _, paper = read_about(f"medistill_trl.methods.{method}")
    return re.sub(r"^arXiv ([\d.]+)$", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def _loaded(recipe: dict, role: str) -> str:
    bits = next((n for n in (4, 8) if recipe.get(f"{role}_load_in_{n}bit")), None)
    return f", in {bits} bits" if bits else f", {recipe[f'{role}_dtype']}"


def _pruned(recipe: dict) -> str:
    keep = recipe.get("student_keep_layers")
    return f", pruned to its layers {keep}" if keep else ""


def _trained(recipe: dict) -> str:
    if not recipe["use_lora"]:
        return "all weights"
    modules = recipe.get("lora_target_modules")
    where = ", ".join(modules) if modules else "every linear layer but the head"
    return f"a LoRA adapter, r {recipe['lora_r']}, alpha {recipe['lora_alpha']}, on {where}"


def _data_file(report: dict) -> str:
    return (
        f"`{Path(report['path']).name}` ({report['kept']} prompts, sha256 {report['sha256'][:12]})"
    )


def _budget(record: dict) -> str:
    tokens = record["tokens"]
    steps = f"{record['steps']} optimizer steps, " if "steps" in record else ""
    return (
        f"{steps}{tokens['trained']} completion tokens trained on, {tokens['generated_teacher']} written by the "
        f"teacher and {tokens['generated_student']} by the student, {record['seconds']:.0f} s on {record['device']}, "
        f"peak {record['peak_memory_gb']} GB"
    )


def _versions(record: dict) -> str:
    versions = record["versions"]
    commit = f" at {record['git_commit']}" if record["git_commit"] else ""
    others = ", ".join(
        f"{name} {versions[name]}" for name in ("trl", "transformers", "peft", "torch")
    )
    return f"medistill_trl {versions['medistill_trl']}{commit}, {others}"


def _heldout(heldout: dict | None) -> str:
    if heldout is None:
        return ""
    before, after = heldout["before"], heldout["after"]
    rows = [
        f"| {label} | {before[key]:.3f} | {after[key]:.3f} |"
        for key, label in METRICS.items()
        if after[key] is not None
    ]
    note = f" {after['note']}" if after.get("note") else ""
    return (
        "## What it kept of its teacher\n\n| on the teacher's own completions | before | after |\n|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\n{after['tokens']} tokens of {after['prompts']} prompts it never trained on.{note}"
    )


def _evaluation(evaluation: dict | None) -> str:
    table = scores.table(evaluation) if evaluation else ""
    return f"## Evaluation\n\n{table}" if table else ""


def _limits(record: dict) -> str:
    points = [
        "It repeats its teacher's mistakes and adds its own.",
        "What it does beyond questions like those it was trained on is unknown.",
        "Its safety and its fairness towards groups of patients were not measured.",
        "It knows nothing newer than its base and its teacher.",
    ]
    if "heldout" in record:
        points.insert(0, _small_data(record))
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points if point)


def _small_data(record: dict) -> str:
    prompts = record["data"]["files"][0]["kept"]
    if prompts >= FEW_PROMPTS:
        return ""
    return f"It was trained on {prompts} prompts, which shows that the method runs and not how good it can be."


def _loading(record: dict) -> str:
    recipe = record["recipe"]
    if recipe["use_lora"] and not _is_on_hub(record):
        keep = recipe.get("student_keep_layers")
        layers = f", keeping its layers {keep}," if keep else ""
        text = LOCAL_BASE.format(student=public_name(recipe["student_model"]), layers=layers)
    else:
        library, kind = (
            ("peft", "AutoPeftModelForCausalLM")
            if recipe["use_lora"]
            else ("transformers", "AutoModelForCausalLM")
        )
        text = f"```python\nfrom {library} import {kind}\n\nmodel = {kind}.from_pretrained(REPOSITORY)\n```"
    prompt = recipe.get("system_prompt")
    system = f" with the system prompt {json.dumps(prompt, ensure_ascii=False)}" if prompt else ""
    asking = (
        f"Ask it through the tokenizer's chat template{system}; where there is none, the prompt is "
        "`### Question:`, a line break, the question, an empty line, `### Answer:`, a line break."
    )
    return f"## Loading it\n\n{text}\n\n{asking}"


def _licence(recipe: dict) -> str:
    student, teacher = recipe["student_model"], recipe["teacher_model"]
    names = {model: public_name(model) for model in (student, teacher)}
    return "## Licence\n\n" + "\n\n".join(licences.paragraphs(student, teacher, names))
