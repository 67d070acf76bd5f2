"""What parts and benchmarks of an evaluation are called on a page."""

TITLES = {
    "medqa": "MedQA",
    "medmcqa": "MedMCQA",
    "pubmedqa": "PubMedQA",
    "pubhealth": "PubHealth (4 classes)",
    "pubhealth_2class": "PubHealth (2 classes)",
}
PARTS = {
    "benchmarks": "Benchmarks, by likelihood",
    "generative": "Benchmarks, answered in writing",
    "retention": "What of the teacher is kept",
    "perplexity": "Medical text",
    "fidelity": "Fidelity to the teacher",
    "faithfulness": "Faithfulness to evidence",
    "speed": "Speed and memory",
    "quantisation": "What quantising costs the teacher",
}


FAMILIES = {  # of comparison.json's measures
    "heldout": "Held-out teacher completions",
    "fidelity_teacher": "Fidelity on the teacher's answers",
    "fidelity_gold": "Fidelity on the references",
    "fidelity_student": "Fidelity on the student's own answers",
    "text": "Greedy answers beside the teacher's",
    "benchmarks": "Benchmarks, by likelihood: accuracy",
    "retention": "What is kept of what the teacher has right",
    "macro_f1": "Benchmarks, by likelihood: macro F1",
    "calibration": "Benchmarks, by likelihood: calibration",
    "generative": "Benchmarks, answered in writing: accuracy",
    "unparsed": "Written answers that cannot be read",
    "perplexity": "Medical text",
    "faithfulness": "Faithfulness to evidence",
}
COSTS = {
    "total_seconds": "in all, s",
    "training_seconds": "training, s",
    "teacher_seconds": "teacher's writing, s",
    "steps": "steps",
    "trained_tokens": "tokens trained on",
    "teacher_tokens": "tokens by the teacher, used",
    "student_tokens": "tokens by the student",
    "trained_tokens_per_second": "trained tokens per second",
    "peak_memory_gb": "peak memory, GB",
    "student_weights_gb": "student's weights, GB",
    "student_tokens_per_second": "student writes, tokens per second",
}


def measured(part: dict) -> dict[str, dict]:
    """The benchmarks of a part, by name."""
    return {name: part[name] for name in TITLES if name in part}
