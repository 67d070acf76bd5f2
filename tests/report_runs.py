"""Crafted run folders, as training and the evaluation leave them, for what reads them."""

import hashlib
import json
import random
from pathlib import Path

from sealed import seal

from eval.report import write_report
from eval.statistics import bootstrap_difference, holm, mcnemar, minimum_detectable_effect, wilson
from medistill_trl import recipe
from medistill_trl.sealed_json import write_record

PNG = bytes.fromhex(  # one grey dot
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000" "1f15c4890000000d4944415478da63"
    "6868680000040601818a4d8a1a0000000049454e44ae426082"
)  # fmt: skip
ATTACK = "<script>window.ran=1</script></script><img src=x onerror='window.ran=2'><!--<script>"
LETTERS = ["A", "B", "C", "D"]
MODELS = {"teacher": "sha256:t float32 full", "student": "sha256:s"}
ENVIRONMENT = {
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "git_commit": "0123abc",
    "device": "CPU, a test, 1 threads a process",
    "num_processes": 1,
    "num_threads": 1,
}


def write_json(path: Path, content) -> None:
    write_record(path, content)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def heldout_records(before: list[float], after: list[float], tokens: int = 10) -> list[dict]:
    """Records of the held-out check with these KL in nats per token, one for each prompt."""
    return [
        {
            "stage": stage,
            "id": f"v{number}",
            "tokens": tokens,
            "bytes": 4 * tokens,
            "kl_nats": kl * tokens,
            "ce_nats": (kl + 1) * tokens,
            "agreed": 2 if stage == "before" else 6,
        }
        for stage, values in (("before", before), ("after", after))
        for number, kl in enumerate(values)
    ]


def heldout_totals(records: list[dict]) -> dict:
    found = {}
    for stage in ("before", "after"):
        rows = [row for row in records if row["stage"] == stage]
        tokens = sum(row["tokens"] for row in rows)
        ce = sum(row["ce_nats"] for row in rows)
        found[stage] = {
            "kl_nats": sum(row["kl_nats"] for row in rows) / tokens,
            "ce_nats": ce / tokens,
            "top1": sum(row["agreed"] for row in rows) / tokens,
            "bits_per_byte": ce / 0.6931471805599453 / sum(row["bytes"] for row in rows),
            "tokens": tokens,
            "prompts": len(rows),
        }
    return found


def write_run(
    folder: Path,
    before: list[float] = (4.0, 4.4, 3.9, 4.2),
    after: list[float] = (2.0, 2.1, 1.8, 2.3),
    answer: str = "Rest.",
    flags: list[str] = (),
) -> Path:
    """A finished run without an evaluation.

    Args:
        before: KL of each held-out prompt, nats per token.
        after: The same after training.
        answer: What the student says to the first prompt.
        flags: Recipe flags that differ from what is shipped.
    """
    values = recipe.load(["recipes/sft.yaml", *flags, "--output_dir", str(folder)])
    records = heldout_records(before, after)
    record = {
        "schema_version": 1,
        "method": "sft",
        "recipe": values.resolved(),
        **ENVIRONMENT,
        "seed": 42,
        "steps": 48,
        "ended_by": "schedule",
        "seconds": 312.7,
        "seconds_drawing": 21.0,
        "peak_memory_gb": 3.342,
        "peak_host_memory_gb": 3.342,
        "tokens": {"trained": 11382, "generated_teacher": 11388, "generated_student": 0},
        "models": MODELS,
        "data": {"files": [{"path": "train.jsonl", "read": 64, "kept": 63, "skipped": ["line 3"]}]},
        "heldout": heldout_totals(records),
        "log_history": [],
    }
    results = folder / "results"
    write_json(results / "run.json", record)
    write_lines(results / "items/heldout.jsonl", records)
    examples = [
        {"id": f"v{n}", "question": f"Why rest number {n}?", "teacher": "Rest heals.", "before": "the the",
         "after": answer if n == 0 else "Rest heals."}
        for n in range(len(before))
    ]  # fmt: skip
    write_json(results / "heldout_examples.json", {"examples": examples})
    (results / "training_curves.png").write_bytes(PNG)
    (folder / "recipe.yaml").write_text(values.to_yaml())
    (folder / "COMPLETE").write_text("complete\n")
    seal(folder)
    return folder


# --- an evaluation ---------------------------------------------------------------------------------


def benchmark_records(name: str, items: int, student: float, teacher: float, seed: int = 0):
    """Rows of a benchmark and both models' records, right with these probabilities."""
    draw = random.Random(f"{name} {seed}")
    rows, records = [], []
    for number in range(items):
        right = number % 4
        row = {
            "id": f"{name}-{number}",
            "source": name,
            "question": f"Which drug is number {number} of {name}?",
            "options": [f"drug {number}{letter}" for letter in LETTERS],
            "answer": right,
        }
        rows.append(row)
        for subject, chance in (("student", student), ("teacher", teacher)):
            choice = (
                right
                if draw.random() < chance
                else draw.choice([n for n in range(4) if n != right])
            )
            records.append(
                {
                    "benchmark": name,
                    "subject": subject,
                    "id": row["id"],
                    "doc_hash": f"d{number}",
                    "answer": right,
                    "choice": choice,
                    "right": choice == right,
                    "probabilities": [0.7 if n == choice else 0.1 for n in range(4)],
                }
            )  # fmt: skip
    return rows, records


def _rights(records: list[dict], name: str, subject: str) -> list[bool]:
    return [r["right"] for r in records if (r["benchmark"], r["subject"]) == (name, subject)]


def _score(right: list[bool], floor: float) -> dict:
    accuracy = wilson(sum(right), len(right)).to_dict()
    return {
        "accuracy": accuracy,
        "above_majority": accuracy["interval_95"][0] > floor,
        "macro_f1": 0.3,
        "expected_calibration_error": 0.2,
        "brier": 0.8,
        "predictions": dict.fromkeys(LETTERS, len(right) // 4),
        "truncated_items": 0,
    }


def _benchmarks(records: list[dict], names: list[str]) -> dict:
    found = {"few_shot": 0}
    for name in names:
        rights = {s: _rights(records, name, s) for s in ("student", "teacher")}
        items = len(rights["student"])
        floor = {"majority_label": "A", "majority_accuracy": 0.27, "random_accuracy": 0.25}
        found[name] = {
            "num_items": items,
            "labels": LETTERS,
            "right_answers": dict.fromkeys(LETTERS, items // 4),
            "floor": floor,
            **{subject: _score(right, 0.27) for subject, right in rights.items()},
        }
    return found


def _retention(records: list[dict], names: list[str]) -> dict:
    found = {}
    for name in names:
        student, teacher = (_rights(records, name, s) for s in ("student", "teacher"))
        test = mcnemar(student, teacher)
        kept = sum(s and t for s, t in zip(student, teacher, strict=True))
        lost, gained, n = test["only_second"], test["only_first"], len(student)
        found[name] = {
            "items": n,
            "student_accuracy": wilson(sum(student), n).to_dict(),
            "teacher_accuracy": wilson(sum(teacher), n).to_dict(),
            "retention_gap": bootstrap_difference(teacher, student, resamples=200).to_dict(),
            "retention": wilson(kept, sum(teacher)).to_dict(),
            "kept": kept,
            "lost": lost,
            "gained": gained,
            "both_wrong": n - kept - lost - gained,
            "inherited_errors": wilson(1, 3).to_dict(),
            "agreement": wilson(n // 2, n).to_dict(),
            "kappa": 0.2,
            "mcnemar_p": test["p_value"],
            "minimum_detectable_gap": minimum_detectable_effect(n, (lost + gained) / n),
        }
    adjusted = holm([found[name]["mcnemar_p"] for name in names])
    return {n: found[n] | {"mcnemar_p_holm": p} for n, p in zip(names, adjusted, strict=True)}


def write_evaluation(
    folder: Path,
    data: Path,
    chances: dict[str, tuple[float, float]],
    items: int = 400,
    answer: str = "Take a rest.",
    limit: int | None = None,
) -> dict:
    """An evaluation of benchmarks and texts, beside a run or alone; returns its content.

    Args:
        data: A data build is made here.
        chances: Benchmark → how often student and teacher are right.
        items: Of each benchmark.
        answer: What the student writes to the first long-form question.
        limit: The option of that name.
    """
    all_records = []
    for name, (student, teacher) in chances.items():
        rows, records = benchmark_records(name, items, student, teacher)
        write_lines(data / f"benchmarks/{name}.jsonl", rows)
        all_records += records
    write_lines(folder / "results/items/benchmarks.jsonl", all_records)
    test = [{"id": f"t{n}", "source": "s", "question": f"Why is {n} so?", "reference": f"Since {n}.", "answer": None} for n in range(3)]  # fmt: skip
    write_lines(data / "processed/test.jsonl", test)
    texts = [
        {"texts": "greedy", "id": f"t{n}", "student_text": answer if n == 0 else "No.", "teacher_text": "No.", "rouge_l": 0.5}
        for n in range(3)
    ]  # fmt: skip
    write_lines(folder / "results/items/fidelity.jsonl", texts)
    names = list(chances)
    files = sorted(path for path in data.rglob("*.jsonl"))
    content = {
        "schema_version": 2,
        "run": str(folder),
        "subjects": {
            name: {"source": f"a {name}", "fingerprint": identity}
            for name, identity in MODELS.items()
        },
        "recipe": None,
        "options": {"limit": limit, "seed": 42},
        "data": {
            "folder": str(data),
            "sha256": {
                str(path.relative_to(data)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in files
            },
        },
        **ENVIRONMENT,
        "results": {
            "benchmarks": _benchmarks(all_records, names),
            "retention": {"benchmarks": _retention(all_records, names)},
            "quantisation": {"skipped": "not asked for; give --teacher_quantisation nf4 or int8"},
        },
        "cost": {},
    }
    write_json(folder / "results/comprehensive_evaluation.json", content)
    seal(folder)
    return content


# --- a comparison ----------------------------------------------------------------------------------


KL, ACCURACY = "fidelity.teacher.kl_teacher_student_nats", "benchmarks.medqa.accuracy"


def write_attacking_run(root: Path) -> Path:
    """An evaluated run with its report, whose student tries to break out of the page; data lie beside it."""
    run = write_run(root / "sft_first", answer=ATTACK, flags=["--lora_r", "8"])
    chances = {"medqa": (0.28, 0.42), "medmcqa": (0.30, 0.33), "pubmedqa": (0.55, 0.40)}
    write_evaluation(run, root / "data", chances, answer=ATTACK)
    write_report(run)
    return run


def _compared(value: float) -> dict:
    return {"value": value, "interval_95": [value - 0.1, value + 0.1], "n": 200, "seeds": 1}


def _tested(measure: str, value: float, told_apart: bool, seeds: int) -> dict:
    p = 0.001 if told_apart else 0.4
    return {
        "measure": measure,
        "configuration": "logit_kd",
        "minus": "sft",
        "value": value,
        "interval_95": [value - 0.1, value + 0.1],
        "n": 200,
        "p": p,
        "p_holm": p,
        "significant": told_apart,
        "told_apart": told_apart and seeds > 1,
        "seeds": [seeds, seeds],
        "least_p": 0.0001,
        "minimum_detectable": 0.09,
    }


def _measure(label: str, family: str, share: bool, teacher: dict | None, values: list) -> dict:
    return {
        "label": label,
        "family": family,
        "better": "higher" if share else "lower",
        "share": share,
        "teacher": teacher,
        "values": dict(zip(("sft", "logit_kd"), map(_compared, values), strict=True)),
    }


def write_comparison(
    folder: Path, runs: dict[str, Path], told_apart: bool = True, seeds: int = 3
) -> dict:
    """comparison.json of SFT, the baseline, and Logit-KD, which comes first; returns it.

    Args:
        runs: Of both.
    """
    kl, accuracy = (
        _tested(key, gap, told_apart, seeds) for key, gap in ((KL, -0.3), (ACCURACY, 0.1))
    )
    cost = {"total_seconds": 100.0, "teacher_seconds": None, "steps": 48}
    content = {
        "schema_version": 1,
        "studies": [],
        "configurations": [
            {"name": name, "method": name, "settings": {}, "seeds": [42], "runs": [str(run)]}
            for name, run in runs.items()
        ],
        "baseline": "sft",
        "quality": KL,
        "left_out": {},
        "missing": [],
        "pictures": ["benchmark_comparison.png"],
        "notes": ["trained on the packaged sample"],
        "measures": {
            KL: _measure("KL(T‖S), nats", "fidelity_teacher", False, None, [1.6, 1.3]),
            ACCURACY: _measure("MedQA", "benchmarks", True, _compared(0.5), [0.3, 0.4]),
        },
        "floors": {"medqa": {"majority_label": "A", "majority_accuracy": 0.27}},
        "primary": [kl],
        "differences": {"fidelity_teacher": [kl], "benchmarks": [accuracy]},
        "ranking": {"order": ["logit_kd", "sft"], "pairs": [kl]},
        "cost": {"sft": cost, "logit_kd": cost | {"total_seconds": 150.0}},
        "pareto": {"cost": "total_seconds", "front": ["sft", "logit_kd"]},
        "verdict": ["By KL logit_kd comes first of 2."],
    }
    write_json(folder / "comparison.json", content)
    (folder / "benchmark_comparison.png").write_bytes(PNG)
    return content
