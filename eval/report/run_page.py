"""The page of one run, or of one evaluation without a run."""

from pathlib import Path

from eval.report import evaluation as parts
from eval.report.heldout import MEASURES, changes, main_measure
from eval.report.items import browser, read_items
from eval.report.page import as_data, as_json, render
from eval.report.recipe_diff import differences
from eval.report.tables import (
    COUNT,
    HUNDREDTHS,
    Cell,
    Section,
    Table,
    estimated,
    number,
    words,
)
from eval.report.verdict import Verdict, of_evaluation, of_training
from medistill_trl.run_directory import EVALUATION, RECORD, RunDirectory
from medistill_trl.sealed_json import read_record

CURVES = "training_curves.png"
PICTURES = {
    CURVES: "Training: the loss or the reward, and the held-out check",
    "benchmark_comparison.png": "Benchmarks, with intervals and floors",
    "fidelity_metrics.png": "Fidelity to the teacher",
    "fidelitybench_radar.png": "Faithfulness to evidence",
}


def run_page(run: RunDirectory, data: Path | None = None) -> str:
    """HTML from what lies in `results`: run.json, comprehensive_evaluation.json, or both."""
    record, evaluation = (_read(run, name) for name in (RECORD, EVALUATION))
    about = record or evaluation
    recipe = about["recipe"]
    found = _training(run, record) if record is not None else {"verdict": None, "sections": []}
    verdict, sections = found["verdict"], found["sections"]
    unmeasured = []
    if evaluation is not None:
        sentences = of_evaluation(evaluation)
        verdict = verdict or Verdict("The student beside its teacher", "unclear")
        verdict.sentences += sentences
        sections += parts.sections(evaluation["results"])
        unmeasured = parts.left_out(evaluation["results"])
    if record is not None:
        sections.append(_cost(record))
        sections += _rationales(run)
        verdict.sentences.append(
            "This is one run with one seed: another seed varies by more than these intervals say."
        )
    items = browser({"student": run.results}, data)
    return render(
        "run.html",
        title=run.path.resolve().name,
        method=recipe["method"] if recipe else None,
        models=_models(record, evaluation),
        verdict=verdict,
        sections=sections,
        pictures=[
            {"title": title, "data": as_data(run.results / name)}
            for name, title in PICTURES.items()
            if name in _drawn(run) and (run.results / name).is_file()
        ],
        evaluated=evaluation is not None,
        unmeasured=unmeasured,
        items=items if items["sets"] else None,
        items_json=as_json(items),
        recipe_diff=differences(recipe) if recipe else None,
        recipe=run.recipe.read_text(encoding="utf-8") if run.recipe.is_file() else None,
        environment=_environment(record, evaluation),
    )


def _read(run: RunDirectory, name: str) -> dict | None:
    return run.read_result(name) if (run.results / name).is_file() else None


def _drawn(run: RunDirectory) -> list[str]:
    """Pictures of the run: its own, and what its comparison has drawn of the very results this page shows."""
    compared = run.results / "comparison.json"
    if not compared.is_file():
        return [CURVES]
    content = read_record(compared, f"compare again: python -m eval.compare {run.path}")
    shown = [configuration.get("results") for configuration in content["configurations"]]
    current = shown == [[run.digests()]]  # older comparisons do not say
    return [CURVES, *(content["pictures"] if current else [])]


def _models(record: dict | None, evaluation: dict | None) -> dict[str, str]:
    """Name → what it is."""
    if record is None:
        return {name: found["source"] for name, found in evaluation["subjects"].items()}
    recipe = record["recipe"]
    keep = recipe.get("student_keep_layers")
    student = recipe["student_model"] + (f", pruned to {len(keep)} layers" if keep else "")
    return {"teacher": recipe["teacher_model"], "student": student}


def _training(run: RunDirectory, record: dict) -> dict:
    before, after = record["heldout"]["before"], record["heldout"]["after"]
    found = changes(before, after, read_items(run.results, "heldout"))
    rows = [
        [
            words(MEASURES[key].label, "the verdict rests on this" if key == main_measure(after) else ""),
            number(before[key], MEASURES[key].form),
            number(after[key], MEASURES[key].form),
            estimated(change, MEASURES[key].change),
        ]
        for key, change in found.items()
    ]  # fmt: skip
    section = Section(
        "heldout",
        "Before and after training",
        f"The teacher's own greedy completions of {after['prompts']:,} prompts the student never trained on, "
        f"{after['tokens']:,} tokens. Intervals take the prompts as independent.",
        [Table(["measure", "before", "after", "change"], rows)],
        [after["note"]] if "note" in after else [],
    )
    return {"verdict": of_training(before, after, found), "sections": [section]}


def _cost(record: dict) -> Section:
    tokens = record["tokens"]
    amounts = {
        "training time": f"{record['seconds']:,.0f} s",
        "of it, drawing completions": f"{record['seconds_drawing']:,.0f} s",
        "optimizer steps": f"{record['steps']:,}, ended by {record['ended_by']}",
        "peak memory": f"{HUNDREDTHS(record['peak_memory_gb'])} GB",
        "completion tokens trained on": COUNT(tokens["trained"]),
        "tokens the teacher wrote": COUNT(tokens["generated_teacher"]),
        "tokens the student wrote": COUNT(tokens["generated_student"]),
    }
    rows = [[words(name), words(value)] for name, value in amounts.items()]
    return Section("cost", "What the run used", tables=[Table([], rows, sortable=False)])


def _rationales(run: RunDirectory) -> list[Section]:
    """What became of the rationales, where the method draws any."""
    content = _read(run, "rationales_summary.json")
    if content is None:
        return []
    counts = {fate: count for fate, count in content["by_fate"].items() if count}
    counts |= {f"prompts: {name}": count for name, count in content["prompts"].items()}
    rows = [[words(name), number(count, COUNT)] for name, count in counts.items()]
    title = f"What became of the {content['drawn']:,} rationales"
    return [Section("rationales", title, tables=[Table(["fate", "number"], rows)])]


def _environment(record: dict | None, evaluation: dict | None) -> list[Table]:
    """Training and evaluation side by side, which may have run on different machines; then what was read."""
    contents = {"training": record, "evaluation": evaluation}
    known = {name: content for name, content in contents.items() if content is not None}
    columns = {name: _described(content) for name, content in known.items()}
    files = [row for content in known.values() for row in _read_files(content)]
    return [
        _pairs({key: [column.get(key, "") for column in columns.values()] for key in _keys(columns)}, list(columns)),
        Table(["file", "what of it"], files, "Data", folded=True),
    ]  # fmt: skip


def _keys(columns: dict[str, dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(key for column in columns.values() for key in column))


def _pairs(rows: dict[str, list[str]], columns: list[str]) -> Table:
    cells = [[words(key), *map(words, values)] for key, values in rows.items()]
    return Table(["", *columns], cells, sortable=False)


def _described(content: dict) -> dict[str, str]:
    found = {
        "device": content["device"],
        "processes": str(content["num_processes"]),
        "threads a process": str(content["num_threads"]),
        "commit": str(content["git_commit"]),
        **content["versions"],
    }
    if "seed" in content:
        found["seed"] = str(content["seed"])
    models = content.get("models") or {
        name: subject["fingerprint"] for name, subject in content["subjects"].items()
    }
    found |= {f"{name}, exactly": identity for name, identity in models.items()}
    if "options" in content:
        given = {key: value for key, value in content["options"].items() if value is not None}
        found["options"] = ", ".join(f"{key} {value}" for key, value in given.items())
    return found


def _read_files(content: dict) -> list[list[Cell]]:
    """The data files of a training or of an evaluation."""
    if "sha256" in content["data"]:
        files = content["data"]["sha256"].items()
        return [[words(name), words(f"evaluated, sha256 {digest}")] for name, digest in files]
    return [
        [words(file["path"]), words(f"{file['kept']:,} of {file['read']:,} rows used")]
        for file in content["data"]["files"]
    ]
