"""A finished run as training leaves it, without training: small files of the right kinds."""

import json
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save_file

from medistill_trl.hub.card import write_model_card
from medistill_trl.run_directory import RunDirectory
from medistill_trl.sealed_json import write_record

RECIPE = {
    "method": "sft",
    "student_model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "student_dtype": "bfloat16",
    "student_load_in_4bit": True,
    "teacher_model": "epfl-llm/meditron-7b",
    "teacher_dtype": "bfloat16",
    "teacher_load_in_4bit": True,
    "use_lora": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "seed": 42,
    "output_dir": "outputs/sft_x",
}
MEASURED = {"ce_nats": 3.0, "top1": 0.5, "bits_per_byte": 0.9, "tokens": 236, "prompts": 4}
MODELS = {
    "teacher": "epfl-llm/meditron-7b@123 bfloat16 4bit nf4 double_quant",
    "student": "TinyLlama/TinyLlama-1.1B-Chat-v1.0@456",
}
RECORD = {
    "schema_version": 1,
    "method": "sft",
    "recipe": RECIPE,
    "versions": {
        "medistill_trl": "0.1.0",
        "trl": "1.12.0",
        "transformers": "5.23.0",
        "peft": "0.21.2",
        "torch": "2.13.0",
    },
    "git_commit": "0123abc",
    "device": "one GPU",
    "seed": 42,
    "steps": 48,
    "seconds": 348.2,
    "peak_memory_gb": 3.4,
    "tokens": {"trained": 10969, "generated_teacher": 10988, "generated_student": 7},
    "models": MODELS,
    "data": {"files": [{"path": "/home/ann/clinic/train.jsonl", "kept": 64, "sha256": "ab" * 32}]},
    "heldout": {
        "before": {"kl_nats": 4.1891, **MEASURED},
        "after": {"kl_nats": 2.0071, **MEASURED},
    },
}


def estimate(value, n=100):
    return {"value": value, "interval_95": [value - 0.05, value + 0.05], "n": n}


def evaluation(recipe=RECIPE, limit=None) -> dict:
    """What eval.run writes, as far as a card reads it."""

    def models(n):
        accuracies = {"student": estimate(0.31, n), "teacher": estimate(0.42, n)}
        return {role: {"accuracy": accuracy} for role, accuracy in accuracies.items()}

    return {
        "schema_version": 2,
        "recipe": recipe,
        "options": {"limit": limit},
        "results": {
            "benchmarks": {
                "few_shot": 0,
                "medqa": {"floor": {"majority_accuracy": 0.277}, **models(1270)},
                "pubmedqa": {"floor": {"majority_accuracy": 0.5}, **models(14)},
                "pubhealth": {"skipped": "not built"},
            },
            "perplexity": {
                "student": {"bits_per_byte": estimate(0.91)},
                "teacher": {"bits_per_byte": estimate(0.72)},
            },
            "fidelity": {
                "prefixes": {"teacher": {"micro": {"kl_teacher_student_nats": estimate(1.5)}}}
            },
            "faithfulness": {"student": {"claims": {"hallucination": estimate(0.66)}}},
        },
    }


def write_run(folder: Path, base=RECIPE["student_model"]) -> RunDirectory:
    """A complete run in `folder`, named outputs-like."""
    run = RunDirectory(folder / "sft_x")
    model = run.final_model
    for path in (model, run.checkpoints / "checkpoint-2", run.results):
        path.mkdir(parents=True)
    run.recipe.write_text(yaml.safe_dump(RECIPE))
    write_record(run.inputs, MODELS)
    run.complete.write_text("all written\n")
    (run.checkpoints / "checkpoint-2/optimizer.pt").write_bytes(b"pickle")
    run.write_result("run.json", RECORD)
    config = {"peft_type": "LORA", "base_model_name_or_path": base}
    (model / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": np.arange(6, dtype=np.float32)}, model / "adapter_model.safetensors")
    # As a tokenizer writes itself in one line: an address's beginning is a token like any other.
    (model / "tokenizer.json").write_text('{"vocab":{"://":3,"a":4,"@":5,"://x":6}}')
    (model / "chat_template.jinja").write_text("{{ messages }}")
    write_model_card(run, RECORD)
    return run
