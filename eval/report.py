"""One run as one HTML page that needs no network: results/report.html."""

import base64
import html
from pathlib import Path

from medistill_trl.files import write_text
from medistill_trl.hub.card import METRICS
from medistill_trl.run_directory import RunDirectory

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
img {{ max-width: 100%; }} .note {{ color: #666; }} .big {{ font-size: 1.25rem; }}
.answers td {{ white-space: pre-wrap; }}
</style></head><body>
<h1>{title}</h1>
<p>Method <b>{method}</b>: {teacher} → {student}</p>
<p class="big">{headline}</p>
<p class="note">For research, not for care.</p>
<h2>Held-out teacher completions, before and after training</h2>
<table><tr><th></th><th class="number">before</th><th class="number">after</th></tr>
{metric_rows}</table>
<p class="note">{tokens} tokens of {prompts} prompts the student never trained on; greedy completions. {note}</p>
<h2>Training</h2>
<img alt="training curves" src="data:image/png;base64,{curves}">
<h2>What the run used</h2>
<table>{cost_rows}</table>
{rationales}<h2>The same questions, asked before and after</h2>
{examples}
<h2>Recipe</h2>
<pre>{recipe}</pre>
</body></html>
"""


def write_report(run: RunDirectory) -> Path:
    """Write results/report.html from run.json, the held-out examples and the training curves."""
    record = run.read_result("run.json")
    examples = run.read_result("heldout_examples.json")["examples"]
    before, after = record["heldout"]["before"], record["heldout"]["after"]
    recipe = record["recipe"]
    page = PAGE.format(
        title=html.escape(run.path.name),
        method=html.escape(record["method"]),
        teacher=html.escape(recipe["teacher_model"]),
        student=html.escape(_student_name(recipe)),
        headline=html.escape(headline(before, after)),
        metric_rows="".join(
            _row(label, before[key], after[key])
            for key, label in METRICS.items()
            if after[key] is not None
        ),
        tokens=after["tokens"],
        prompts=after["prompts"],
        note=html.escape(after.get("note", "")),
        curves=base64.b64encode((run.results / "training_curves.png").read_bytes()).decode(),
        cost_rows=_cost_rows(record),
        rationales=_rationales(run),
        examples="".join(_example(example) for example in examples),
        recipe=html.escape(run.recipe.read_text(encoding="utf-8")),
    )
    path = run.results / "report.html"
    write_text(path, page)
    return path


def headline(before: dict, after: dict) -> str:
    """The result in one sentence."""
    key, name = (
        ("kl_nats", "KL(T‖S)")
        if after["kl_nats"] is not None
        else ("bits_per_byte", "bits per byte")
    )
    text = f"{name} on held-out completions: {before[key]:.2f} → {after[key]:.2f}"
    return (
        f"{text}, {after[key] / before[key]:.0%} of what it was." if before[key] > 0 else f"{text}."
    )


def _student_name(recipe: dict) -> str:
    keep = recipe.get("student_keep_layers")
    return recipe["student_model"] + (f" pruned to {len(keep)} layers" if keep else "")


def _row(label: str, *values: float) -> str:
    cells = "".join(f'<td class="number">{value:.3f}</td>' for value in values)
    return f"<tr><td>{html.escape(label)}</td>{cells}</tr>\n"


def _cost_rows(record: dict) -> str:
    tokens = record["tokens"]
    rows = {
        "training time": f"{record['seconds']:.0f} s",
        "peak memory": f"{record['peak_memory_gb']:.2f} GB",
        "device": f"{record['device']}, {record['num_processes']} process(es)",
        "completion tokens trained on": f"{tokens['trained']:,}",
        "tokens the teacher wrote": f"{tokens['generated_teacher']:,}",
        "seed": str(record["seed"]),
        "commit": str(record["git_commit"]),
    }
    return "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in rows.items()
    )


def _rationales(run: RunDirectory) -> str:
    """What became of the rationales, where the method draws any."""
    if not (run.results / "rationales_summary.json").exists():
        return ""
    content = run.read_result("rationales_summary.json")
    prompts = content["prompts"]
    counts = {fate: count for fate, count in content["by_fate"].items() if count}
    counts |= {f"prompts: {name}": count for name, count in prompts.items()}
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{count:,}</td></tr>'
        for name, count in counts.items()
    )
    return f"<h2>What became of the {content['drawn']:,} rationales</h2><table>{rows}</table>"


def _example(example: dict) -> str:
    answers = "".join(
        f"<tr><td><b>{label}</b></td><td>{html.escape(example[key])}</td></tr>"
        for label, key in (("teacher", "teacher"), ("before", "before"), ("after", "after"))
    )
    question = html.escape(example["question"])
    return f'<p><b>{question}</b></p><table class="answers">{answers}</table>'
