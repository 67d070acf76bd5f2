"""Benchmarks of a single question."""

import json


def small_data(folder, name, row, example):
    for place, content in (("", row), ("few_shot/", example)):
        path = folder / f"benchmarks/{place}{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content) + "\n")
    return folder


ROW = {
    "id": "t1",
    "question": "Which vitamin prevents scurvy?",
    "context": "Sailors were given lemons.\n\nThey stayed well.",
    "options": ["Vitamin K", "Vitamin C", "Vitamin D", "Thiamine"],
    "answer": 1,
}
EXAMPLE = ROW | {"id": "f1", "question": "Which vitamin prevents rickets?", "answer": 2}
