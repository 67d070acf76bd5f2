"""Run directories as a training and an evaluation leave them, made of numbers: no model is run.

What a run is good for is said by its `skill`, from 0 to 1: it moves every measure at once.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml
from sealed import read, seal

from eval.options import Options
from eval.statistics import ratio_interval, wilson
from medistill_trl.sealed_json import write_record

BENCHMARKS = {"medqa": 4, "pubmedqa": 3}
DIGEST = "0" * 64
OPTIONS = asdict(Options(limit=40, option_shuffles=0, verifier="nli"))
ENVIRONMENT = {
    "versions": {"python": "3.11", "torch": "2.13.0"},
    "git_commit": "abc",
    "device": "CPU, Test, 1 threads a process",
    "num_processes": 1,
    "num_threads": 1,
}
TERMS = (
    "kl_teacher_student_nats",
    "kl_student_teacher_nats",
    "js_nats",
    *(f"overlap_at_{k}" for k in (1, 5, 10, 50)),
    "teacher_mass_at_10",
)
TEXTS = ("exact_match", "rouge_1", "rouge_2", "rouge_l", "semantic_similarity")


def write_run(
    folder: Path,
    method: str = "sft",
    seed: int = 42,
    skill: float = 0.5,
    items: int = 40,
    evaluated: bool = True,
    seconds: float = 100.0,
    prompts: int = 0,
    **settings,
) -> Path:
    """A finished run.

    Args:
        items: Of every part.
        prompts: Of the held-out check, whose records are kept; 0 for a run that kept only its totals.
        settings: Keys of its recipe.
    """
    recipe = {
        "method": method,
        "seed": seed,
        "teacher_model": "teacher",
        "student_model": "student",
        "teacher_max_new_tokens": 64,
        "output_dir": str(folder),
        "max_steps": 48,
        **settings,
    }
    content = record(recipe, skill, seconds)
    if prompts:
        rng = np.random.default_rng([seed, *method.encode(), 1])
        content["heldout"]["after"], rows = heldout(skill, prompts, rng)
        write_items(folder, "heldout", rows)
    write_json(folder / "results/run.json", content)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "COMPLETE").write_text("done\n")
    if evaluated:
        rng = np.random.default_rng([seed, *method.encode()])
        write_evaluation(folder, recipe, skill, items, rng)
    seal(folder)
    return folder


def record(recipe: dict, skill: float, seconds: float) -> dict:
    before = {"kl_nats": 4.0, "ce_nats": 5.3, "top1": 0.2, "bits_per_byte": 1.5}
    noise = 0.02 * math.sin(recipe["seed"])
    after = {
        "kl_nats": 3.0 - 2.5 * skill + noise,
        "ce_nats": 4.0 - 2.5 * skill + noise,
        "top1": 0.2 + 0.5 * skill,
        "bits_per_byte": 1.4 - skill,
    }
    middle = {
        f"heldout_{k}": (before[k] + 2 * after[k]) / 3 for k in ("kl_nats", "ce_nats", "top1")
    }
    sizes = {"tokens": 256, "prompts": 4}
    return {
        "schema_version": 1,
        "method": recipe["method"],
        "recipe": recipe,
        **ENVIRONMENT,
        "seed": recipe["seed"],
        "steps": 48,
        "ended_by": "schedule",
        "seconds": seconds,
        "peak_memory_gb": 3.3,
        "tokens": {"trained": 11000, "generated_teacher": 3800, "generated_student": 0},
        "teacher_use": {"tokens": 3800, "stored_seconds": 0.0},
        "models": {"teacher": "sha256:t float32", "student": "sha256:s"},
        "data": {"files": [{"path": name, "sha256": DIGEST} for name in ("train", "validation")]},
        "heldout": {"before": before | sizes, "after": after | sizes},
        "log_history": [{"loss": 2.0, "step": 1}, middle | {"step": 24}, {"loss": 1.0, "step": 48}],
    }


def heldout(skill: float, prompts: int, rng) -> tuple[dict, list[dict]]:
    tokens = np.random.default_rng(3).integers(30, 64, prompts)
    rows = []
    for n, length in enumerate(tokens.tolist()):
        kl = (3.0 - 2.5 * skill) * rng.lognormal(0, 0.2)
        sums = {
            "kl_nats": kl * length,
            "ce_nats": (1 + kl) * length,
            "agreed": round(length * skill),
        }
        rows.append({"stage": "after", "id": f"v{n}", "tokens": length, "bytes": 4 * length} | sums)
    total = {
        key: sum(row[key] for row in rows) for key in ("kl_nats", "ce_nats", "agreed", "tokens")
    }
    after = {
        "kl_nats": total["kl_nats"] / total["tokens"],
        "ce_nats": total["ce_nats"] / total["tokens"],
        "top1": total["agreed"] / total["tokens"],
        "bits_per_byte": total["ce_nats"] / math.log(2) / (4 * total["tokens"]),
        "tokens": total["tokens"],
        "prompts": prompts,
    }
    return after, [row | {"stage": "before"} for row in rows] + rows


def write_evaluation(folder: Path, recipe: dict, skill: float, items: int, rng) -> None:
    parts = {
        "benchmarks": benchmarks(skill, items, rng),
        "generative": generative(skill, items, rng),
        "perplexity": perplexity(skill, items, rng),
        "fidelity": fidelity(skill, items, rng),
        "faithfulness": faithfulness(skill, items, rng),
        "speed": ({"student": {"weights_gb": 0.5, "tokens_per_second": 90.0}}, []),
        "quantisation": ({"skipped": "not asked for"}, []),
    }
    results = {name: result for name, (result, _) in parts.items()}
    results["retention"] = retention(parts["benchmarks"][1])
    content = {
        "schema_version": 2,
        "run": str(folder),
        "subjects": {
            "student": {"source": str(folder), "fingerprint": "sha256:s float32 adapter"},
            "teacher": {"source": "teacher", "fingerprint": "sha256:t float32"},
        },
        "recipe": recipe,
        "options": OPTIONS,
        "data": {"folder": "data", "sha256": {"benchmarks/medqa.jsonl": DIGEST}},
        **ENVIRONMENT,
        "results": results,
    }
    write_json(folder / "results/comprehensive_evaluation.json", content)
    for name, (_, rows) in parts.items():
        write_items(folder, name, rows)


def write_json(path: Path, content: dict) -> None:
    write_record(path, content)


def write_items(folder: Path, part: str, rows: list[dict]) -> None:
    path = folder / f"results/items/{part}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seal(folder)


def edit(folder: Path, name: str, **changes) -> None:
    """Change values of a result by their dotted path."""
    path = folder / "results" / name
    content = read(path)
    for place, value in changes.items():
        *parents, last = place.split("__")
        inner = content
        for key in parents:
            inner = inner[int(key)] if isinstance(inner, list) else inner[key]
        inner[last] = value
    write_record(path, content)
    seal(folder)


# --- parts: the result and the items' records


def benchmarks(skill: float, items: int, rng) -> tuple[dict, list[dict]]:
    result, rows = {"few_shot": 0}, []
    fixed = np.random.default_rng(0)  # questions and teacher are the same for every run
    for name, options in BENCHMARKS.items():
        difficulty = fixed.uniform(0, 0.5, items)
        chance = {"teacher": 0.9 - difficulty, "student": 0.25 + 0.6 * skill - 0.4 * difficulty}
        own = {
            subject: [
                _answered(name, subject, n, options, bool(hit))
                for n, hit in enumerate((fixed if subject == "teacher" else rng).random(items) < p)
            ]
            for subject, p in chance.items()
        }
        result[name] = {
            "floor": {
                "majority_label": "A",
                "majority_accuracy": 0.3,
                "random_accuracy": 1 / options,
            },
            **{
                subject: {
                    "accuracy": wilson(sum(r["right"] for r in answered), items).to_dict(),
                    "macro_f1": 0.2 + 0.5 * skill,
                    "expected_calibration_error": 0.3 - 0.2 * skill,
                    "brier": sum(_brier(r) for r in answered) / items,
                }
                for subject, answered in own.items()
            },
        }
        rows += own["student"] + own["teacher"]
    return result, rows


def _answered(name: str, subject: str, n: int, options: int, right: bool) -> dict:
    answer = n % options
    choice = answer if right else (answer + 1) % options
    rest = 0.4 / (options - 1)
    return {
        "benchmark": name,
        "subject": subject,
        "id": f"{name}-{n}",
        "doc_hash": f"{name}{n}",
        "answer": answer,
        "choice": choice,
        "right": right,
        "probabilities": [0.6 if option == choice else rest for option in range(options)],
    }


def _brier(row: dict) -> float:
    return sum((p - (k == row["answer"])) ** 2 for k, p in enumerate(row["probabilities"]))


def retention(rows: list[dict]) -> dict:
    found = {}
    for name in BENCHMARKS:
        of_both = [
            [r for r in rows if (r["benchmark"], r["subject"]) == (name, subject)]
            for subject in ("student", "teacher")
        ]
        kept = [s["right"] for s, t in zip(*of_both, strict=True) if t["right"]]
        found[name] = {"retention": wilson(sum(kept), len(kept)).to_dict()}
    return {"benchmarks": found}


def generative(skill: float, items: int, rng) -> tuple[dict, list[dict]]:
    rows = []
    for subject, chance in (("student", 0.2 + 0.6 * skill), ("teacher", 0.7)):
        for n, draw in enumerate(rng.random(items)):
            row = _answered("medqa", subject, n, 4, bool(draw < chance))
            row |= {"text": "The answer is A.", "finished": True}
            rows.append(row | ({"choice": None, "right": False} if draw > 0.95 else {}))
    own = {s: [row for row in rows if row["subject"] == s] for s in ("student", "teacher")}
    result = {
        subject: {
            "accuracy": wilson(sum(r["right"] for r in of_one), items).to_dict(),
            "unparsed": wilson(sum(r["choice"] is None for r in of_one), items).to_dict(),
        }
        for subject, of_one in own.items()
    }
    return {"protocol": "the answer alone", "answer_tokens": 32, "medqa": result}, rows


def perplexity(skill: float, items: int, rng) -> tuple[dict, list[dict]]:
    tokens = np.random.default_rng(1).integers(80, 400, items)
    rows, result = [], {"documents": items, "window_tokens": 512, "stride_tokens": 256}
    for subject, level in (("student", 4.5 - 1.5 * skill), ("teacher", 2.6)):
        nats = tokens * level * rng.uniform(0.9, 1.1, items)
        rows += [
            {"subject": subject, "id": f"d{n}", "nats": x, "tokens": int(t), "bytes": int(t) * 4}
            for n, (x, t) in enumerate(zip(nats.tolist(), tokens, strict=True))
        ]
        per_token = ratio_interval(nats, tokens).to_dict()
        result[subject] = {
            "nats_per_token": per_token,
            "perplexity": {
                **per_token,
                "value": math.exp(per_token["value"]),
                "interval_95": [math.exp(end) for end in per_token["interval_95"]],
            },
            "bits_per_byte": ratio_interval(nats / math.log(2), 4 * tokens).to_dict(),
        }
    return result, rows


def fidelity(skill: float, items: int, rng) -> tuple[dict, list[dict]]:
    prefixes, rows = {}, []
    for name, harder in (("gold", 1.2), ("teacher", 1.0), ("student", 1.4)):
        lengths = np.random.default_rng(2).integers(20, 64, items)
        if name == "student":
            lengths = rng.integers(5, 64, items)
        of_set = []
        for n, length in enumerate(lengths.tolist()):
            kl = harder * (2.5 - 2.0 * skill) * rng.lognormal(0, 0.3)
            terms = {term: 1 / (1 + kl) for term in TERMS} | {
                "kl_teacher_student_nats": kl,
                "kl_student_teacher_nats": 1.2 * kl,
                "js_nats": 0.69 * kl / (1 + kl),
            }
            of_set.append(
                {"prefixes": name, "id": f"q{n}", "tokens": length, "bytes": 4 * length}
                | {term: value * length for term, value in terms.items()}
                | {"student_nats": (1 + kl) * length, "teacher_nats": 1.0 * length}
            )
        prefixes[name] = {
            "micro": {
                term: ratio_interval([r[term] for r in of_set], lengths).to_dict() for term in TERMS
            },
            "student_bits_per_byte": ratio_interval(
                [r["student_nats"] / math.log(2) for r in of_set], 4 * lengths
            ).to_dict(),
        }
        rows += of_set
    texts = [
        {"texts": "greedy", "id": f"q{n}", "student_text": "Rest.", "teacher_text": "Rest heals."}
        | {name: float(np.clip(0.2 + 0.5 * skill + 0.1 * rng.normal(), 0, 1)) for name in TEXTS}
        | {"exact_match": float(rng.random() < 0.4 * skill)}
        for n in range(items)
    ]
    text = {name: ratio_interval([r[name] for r in texts], [1] * items).to_dict() for name in TEXTS}
    text["bleu"] = {"value": 30 * skill, "interval_95": [28 * skill, 32 * skill], "n": items}
    result = {"sampling": {"max_new_tokens": 64}, "prefixes": prefixes, "text": text}
    return result, rows + texts


def faithfulness(skill: float, items: int, rng) -> tuple[dict, list[dict]]:
    rows = []
    for subject, level in (("student", skill), ("teacher", 0.9)):
        for n in range(items):
            bins = rng.choice(
                ["supported", "contradicted", "unsupported"],
                size=rng.integers(0, 5),
                p=[level, (1 - level) / 2, (1 - level) / 2],
            )
            found = [
                {
                    "text": "Rest heals.",
                    "bin": str(b),
                    "recalled": bool(b == "supported" and rng.random() < 0.8),
                }
                for b in bins
            ]
            answer = {"answer": "Rest heals. " * len(found), "finished": True, "claims": found}
            rows.append({"subject": subject, "id": f"p{n}", **answer})
    result: dict = {"prompts": items, "answer_tokens": 128, "verifier": {"fingerprint": "sha256:v"}}
    for subject in ("student", "teacher"):
        own = [row["claims"] for row in rows if row["subject"] == subject]
        claims = [claim for found in own for claim in found]
        share = {
            "hallucination": [c["bin"] != "supported" for c in claims],
            "contradicted": [c["bin"] == "contradicted" for c in claims],
            "recall": [c["recalled"] for c in claims],
        }
        rates = {name: wilson(sum(hits), len(claims)).to_dict() for name, hits in share.items()}
        result[subject] = {
            "answers": {"without_claims": wilson(sum(not f for f in own), items).to_dict()},
            "claims": {name: rates[name] for name in ("hallucination", "contradicted")},
            "citations": {
                "recall": rates["recall"],
                "precision": {"value": 0.4 + 0.4 * skill, "interval_95": None},
                "existence": {"value": 0.8, "interval_95": None},
            },
        }
    result["agreement"] = {
        "student_claims_of_the_teacher": {"value": 0.5 * skill, "interval_95": None}
    }
    return result, rows
