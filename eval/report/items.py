"""The items of a run for the page's browser: each question with its reference and what both models made of it.

Records hold no questions; they stand in the data folder. Its files are read only if they are, byte for byte,
those that were evaluated. Otherwise the items come without their questions, and the page says why.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from eval.data_files import digests, read_rows
from eval.report.names import PARTS, TITLES

OUTCOMES = {  # in the order of the buttons; the page shows those that occur
    "kept": "kept: both right",
    "lost": "lost: only the teacher right",
    "gained": "gained: only the student right",
    "inherited": "inherited: both wrong, the same answer",
    "both_wrong": "both wrong, differently",
    "right": "right",
    "wrong": "wrong",
    "same": "the same words",
    "different": "other words",
    "no_claims": "no claims",
}
FIDELITY_SCORES = {
    "rouge_l": "ROUGE-L",
    "semantic_similarity": "cosine",
}


@dataclass
class Texts:
    """Rows of the evaluated data files.

    Args:
        folder: Of the data build.
        sha256: Of each file, as it was evaluated.
        missing: Why files could not be used; filled while reading.
    """

    folder: Path
    sha256: dict[str, str]
    missing: list[str] = field(default_factory=list)

    def rows(self, name: str) -> dict[str, dict]:
        """By id; empty if the file is not there or has changed."""
        path = self.folder / name
        if not path.is_file():
            self.missing.append(f"{path} is not there")
            return {}
        if digests(self.folder, [path])[name] != self.sha256.get(name):
            self.missing.append(f"{path} has changed since the evaluation")
            return {}
        return {row["id"]: row for row in read_rows(path)}


def browser(results: Path, evaluation: dict | None, data: Path | None = None) -> dict:
    """Everything the browser shows, JSON-able.

    Args:
        results: Folder `results` of a run or an evaluation.
        evaluation: Its comprehensive_evaluation.json, if there is one.
        data: Where the data build lies now; by default where it was.

    Returns:
        `outcomes`, labels by name; `sets`, each with `name`, `label` and `items`; `questions`, shared by items
        (`text`, `context`, `options`, `answer`, `reference`); `missing`, why questions are not there.
    """
    collected = Collected()
    if (results / "heldout_examples.json").is_file():
        _heldout(collected, json.loads((results / "heldout_examples.json").read_text("utf-8")))
    missing: list[str] = []
    if evaluation is not None:
        texts = Texts(data or Path(evaluation["data"]["folder"]), evaluation["data"]["sha256"])
        for part, collect in COLLECTORS.items():
            records = read_items(results, part)
            if records:
                collect(collected, records, texts)
        missing = list(dict.fromkeys(texts.missing))
    return {
        "outcomes": OUTCOMES,
        "sets": list(collected.sets.values()),
        "questions": collected.questions,
        "missing": missing,
    }


def read_items(results: Path, part: str) -> list[dict]:
    """The records of results/items/<part>.jsonl; none if the file is not there."""
    path = results / "items" / f"{part}.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@dataclass
class Collected:
    """Sets of items, and their questions, each once."""

    sets: dict[str, dict] = field(default_factory=dict)
    questions: list[dict] = field(default_factory=list)
    _places: dict[tuple[str, str], int] = field(default_factory=dict)

    def question(self, file: str, id: str, content: Callable[[], dict]) -> int:
        """The place of a question, which is added when it is first asked for."""
        if (file, id) not in self._places:
            self._places[file, id] = len(self.questions)
            self.questions.append(content())
        return self._places[file, id]

    def add(self, name: str, label: str, item: dict) -> None:
        found = self.sets.setdefault(name, {"name": name, "label": label, "items": []})
        found["items"].append(item)


# --- the held-out check ----------------------------------------------------------------------------


def _heldout(collected: Collected, content: dict) -> None:
    for row in content["examples"]:
        question = {"text": row["question"]}
        place = collected.question("validation", row["id"], lambda question=question: question)
        item = {
            "id": row["id"],
            "question": place,
            "outcome": _wording(row["after"], row["teacher"]),
            "teacher": {"text": row["teacher"]},
            "before": {"text": row["before"]},
            "student": {"text": row["after"]},
        }
        collected.add("heldout", "Held-out check, before and after", item)


def _wording(student: str, teacher: str) -> str:
    return "same" if student == teacher else "different"


# --- benchmarks ------------------------------------------------------------------------------------


def _by_likelihood(collected: Collected, records: list[dict], texts: Texts) -> None:
    def answer(record: dict) -> dict:
        chances = [round(p, 4) for p in record["probabilities"]]
        return {"choice": record["choice"], "chances": chances}

    _benchmark_items(collected, records, texts, "benchmarks", answer)


def _in_writing(collected: Collected, records: list[dict], texts: Texts) -> None:
    def answer(record: dict) -> dict:
        return {
            "choice": record["choice"],
            "text": record["text"],
            "finished": record["finished"],
        }

    _benchmark_items(collected, records, texts, "generative", answer)


def _benchmark_items(
    collected: Collected,
    records: list[dict],
    texts: Texts,
    part: str,
    answer: Callable[[dict], dict],
) -> None:
    for benchmark in dict.fromkeys(record["benchmark"] for record in records):
        file = f"benchmarks/{benchmark}.jsonl"
        rows = texts.rows(file)
        by_subject: dict[str, dict[str, dict]] = {"student": {}, "teacher": {}}
        for record in records:
            if record["benchmark"] == benchmark:
                by_subject[record["subject"]][record["id"]] = record
        for id, student in by_subject["student"].items():
            teacher = by_subject["teacher"].get(id)
            row = rows.get(id)
            place = collected.question(
                file, id, lambda row=row, right=student["answer"]: _choices(row, right)
            )
            item = {
                "id": id,
                "question": place,
                "outcome": outcome(student, teacher),
                "student": answer(student),
            }
            if teacher is not None:
                item["teacher"] = answer(teacher)
            collected.add(f"{part}/{benchmark}", f"{TITLES[benchmark]} · {PARTS[part]}", item)


def _choices(row: dict | None, right: int) -> dict:
    if row is None:
        return {"answer": right}
    found = {"text": row["question"], "options": row["options"], "answer": right}
    return found | ({"context": row["context"]} if row.get("context") else {})


def outcome(student: dict, teacher: dict | None) -> str:
    """What became of the teacher's answer; an answer that could not be read is never inherited."""
    if teacher is None:
        return "right" if student["right"] else "wrong"
    if teacher["right"]:
        return "kept" if student["right"] else "lost"
    if student["right"]:
        return "gained"
    same = student["choice"] is not None and student["choice"] == teacher["choice"]
    return "inherited" if same else "both_wrong"


# --- texts -----------------------------------------------------------------------------------------


def _fidelity(collected: Collected, records: list[dict], texts: Texts) -> None:
    rows = texts.rows("processed/test.jsonl")
    divergence = {
        record["id"]: record["kl_teacher_student_nats"] / record["tokens"]
        for record in records
        if record.get("prefixes") == "teacher" and "kl_teacher_student_nats" in record
    }
    for record in records:
        if record.get("texts") != "greedy":
            continue
        row = rows.get(record["id"])
        place = collected.question("test", record["id"], lambda row=row: _long_form(row))
        scores = {
            label: round(record[key], 3) for key, label in FIDELITY_SCORES.items() if key in record
        }
        if record["id"] in divergence:
            scores["KL(T‖S) on the teacher's answer, nats per token"] = round(
                divergence[record["id"]], 3
            )
        item = {
            "id": record["id"],
            "question": place,
            "outcome": _wording(record["student_text"], record["teacher_text"]),
            "student": {"text": record["student_text"]},
            "teacher": {"text": record["teacher_text"]},
            "scores": scores,
        }
        collected.add("fidelity", "Long-form answers · Fidelity", item)


def _long_form(row: dict | None) -> dict:
    return {} if row is None else {"text": row["question"], "reference": row["reference"]}


def _faithfulness(collected: Collected, records: list[dict], texts: Texts) -> None:
    file = "fidelitybench_med.jsonl"
    rows = texts.rows(file)
    teachers = {record["id"]: record for record in records if record["subject"] == "teacher"}
    for record in records:
        if record["subject"] != "student":
            continue
        row, teacher = rows.get(record["id"]), teachers.get(record["id"])
        place = collected.question(file, record["id"], lambda row=row: _evidence(row))
        item = {"id": record["id"], "question": place, "student": _claims(record)}
        if teacher is not None:
            item["teacher"] = _claims(teacher)
        held = _outcome_of_claims(record, teacher)
        if held is not None:
            item["outcome"] = held
        collected.add("faithfulness", "Answers from evidence · FidelityBench-Med", item)


def _evidence(row: dict | None) -> dict:
    if row is None:
        return {}
    passages = [f"[{number}] {p['text']}" for number, p in enumerate(row["evidence"], start=1)]
    found = {"text": row["question"], "context": "\n\n".join(passages)}
    reference = row.get("reference") or row.get("answer")
    return found | ({"reference": reference} if reference else {})


def _claims(record: dict) -> dict:
    claims = [
        {"text": claim["text"], "bin": claim["bin"]} for claim in record["claims"] if "bin" in claim
    ]
    found = {"text": record["answer"], "finished": record["finished"]}
    return found | ({"claims": claims} if claims else {})


def _outcome_of_claims(student: dict, teacher: dict | None) -> str | None:
    """Right is an answer whose claims are all supported; None where nobody judged."""
    answers = [student] if teacher is None else [student, teacher]
    if any("bin" not in claim for answer in answers for claim in answer["claims"]):
        return None
    if any(not answer["claims"] for answer in answers):
        return "no_claims"
    marks = [
        {"right": all(claim["bin"] == "supported" for claim in answer["claims"]), "choice": None}
        for answer in answers
    ]
    return outcome(marks[0], marks[1] if len(marks) > 1 else None)


COLLECTORS: dict[str, Callable[[Collected, list[dict], Texts], None]] = {
    "benchmarks": _by_likelihood,
    "generative": _in_writing,
    "fidelity": _fidelity,
    "faithfulness": _faithfulness,
}
