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


def measured(part: dict) -> dict[str, dict]:
    """The benchmarks of a part, by name."""
    return {name: part[name] for name in TITLES if name in part}
