"""The items of a page's browser: each question with its reference and what every model made of it.

Records hold no questions; they stand in the data folder. Its files are read only if they are, byte for byte,
those that were evaluated. Otherwise the items come without their questions, and the page says why.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from eval.data_files import digests, read_rows
from eval.report.names import PARTS, TITLES
from medistill_trl.run_directory import EVALUATION, RunDirectory

OUTCOMES = {  # in the order of the buttons; the page shows those that occur
    "kept": ("kept", "both right"),
    "lost": ("lost", "only the teacher right"),
    "gained": ("gained", "only the student right"),
    "both_wrong": ("both wrong", "neither right, the inherited among them"),
    "inherited": ("inherited", "both wrong, the same answer"),
    "right": ("right", "no teacher to compare with"),
    "wrong": ("wrong", "no teacher to compare with"),
    "same": ("the same words", "the student answers as the teacher does"),
    "different": ("other words", "the student answers otherwise"),
    "no_claims": ("no claims", "one of them claims nothing"),
}
SCORES = {"rouge_l": "ROUGE-L", "semantic_similarity": "cosine"}
TEACHER, BEFORE, STUDENT = "teacher", "before training", "student"

EXAMPLES = "heldout_examples.json"

Records = dict[str, list[dict]]  # of one part, by student; the teacher's among each


def browser(students: Mapping[str, Path], data: Path | None = None) -> dict:
    """Everything the browser shows, JSON-able.

    Args:
        students: Name → folder `results` of a run or an evaluation. Of several students what they wrote to a
            benchmark's questions is left out: the choices stay.
        data: Where the data build lies now; by default where it was.

    Returns:
        `outcomes`, names and meanings; `students`; `sets`, each with `name`, `label` and `items`, which have
        `id`, `question`, `answers` and `outcomes` by student; `questions`, shared by items (`text`, `context`,
        `options`, `answer`, `reference`); `missing`, why questions are not there.
    """
    collected = Collected(list(students))
    examples = {
        name: _run(results).read_result(EXAMPLES)["examples"]
        for name, results in students.items()
        if (results / EXAMPLES).is_file()
    }
    if examples:
        _heldout(collected, examples)
    texts = _evaluated_texts(students, data)
    for part, collect in COLLECTORS.items():
        found = {name: read_items(results, part) for name, results in students.items()}
        found = {name: records for name, records in found.items() if records}
        if found and texts is not None:
            collect(collected, found, texts)
    return {
        "outcomes": OUTCOMES,
        "students": list(students),
        "sets": list(collected.sets.values()),
        "questions": collected.questions,
        "missing": [] if texts is None else list(dict.fromkeys(texts.missing)),
    }


def read_items(results: Path, part: str) -> list[dict]:
    """The records of results/items/<part>.jsonl; none if the file is not there."""
    return _run(results).read_items(part)


def _run(results: Path) -> RunDirectory:
    return RunDirectory(results.parent)


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


def _evaluated_texts(students: Mapping[str, Path], data: Path | None) -> Texts | None:
    """Of the first student that was evaluated; runs that are compared were evaluated on the same."""
    for results in students.values():
        if (results / EVALUATION).is_file():
            evaluated = _run(results).read_result(EVALUATION)["data"]
            return Texts(data or Path(evaluated["folder"]), evaluated["sha256"])
    return None


@dataclass
class Collected:
    """Sets of items, and their questions, each once."""

    students: list[str]
    sets: dict[str, dict] = field(default_factory=dict)
    questions: list[dict] = field(default_factory=list)
    _places: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def one_student(self) -> bool:
        return len(self.students) == 1

    def question(self, file: str, id: str, content: dict) -> int:
        """The place of a question, which is added when it is first asked for."""
        if (file, id) not in self._places:
            self._places[file, id] = len(self.questions)
            self.questions.append(content)
        return self._places[file, id]

    def add(self, name: str, label: str, item: dict) -> None:
        found = self.sets.setdefault(name, {"name": name, "label": label, "items": []})
        found["items"].append(item)


def _by_id(records: list[dict]) -> dict[str, dict]:
    return {record["id"]: record for record in records}


# --- the held-out check ----------------------------------------------------------------------------


def _heldout(collected: Collected, examples: Records) -> None:
    by_student = {name: _by_id(rows) for name, rows in examples.items()}
    for id, row in next(iter(by_student.values())).items():
        students = {name: rows[id] for name, rows in by_student.items() if id in rows}
        answers = {TEACHER: {"text": row["teacher"]}, BEFORE: {"text": row["before"]}}
        answers |= {name: {"text": found["after"]} for name, found in students.items()}
        item = {
            "id": id,
            "question": collected.question("validation", id, {"text": row["question"]}),
            "answers": answers,
            "outcomes": {
                name: _wording(found["after"], found["teacher"]) for name, found in students.items()
            },
        }
        collected.add("heldout", "Held-out check, before and after training", item)


def _wording(student: str, teacher: str) -> str:
    return "same" if student == teacher else "different"


# --- benchmarks ------------------------------------------------------------------------------------


def _by_likelihood(collected: Collected, found: Records, texts: Texts) -> None:
    def answer(record: dict) -> dict:
        shown = {"choice": record["choice"]}
        if collected.one_student:
            shown["chances"] = [round(p, 4) for p in record["probabilities"]]
        return shown

    _benchmark_items(collected, found, texts, "benchmarks", answer)


def _in_writing(collected: Collected, found: Records, texts: Texts) -> None:
    def answer(record: dict) -> dict:
        shown = {"choice": record["choice"]}
        if collected.one_student:
            shown |= {"text": record["text"], "finished": record["finished"]}
        return shown

    _benchmark_items(collected, found, texts, "generative", answer)


def _benchmark_items(
    collected: Collected,
    found: Records,
    texts: Texts,
    part: str,
    answer: Callable[[dict], dict],
) -> None:
    first = next(iter(found.values()))
    for benchmark in dict.fromkeys(record["benchmark"] for record in first):
        file = f"benchmarks/{benchmark}.jsonl"
        rows = texts.rows(file)
        label = f"{TITLES[benchmark]} · {PARTS[part]}"
        teacher = _by_id(_select(first, benchmark, TEACHER))
        students = {
            name: _by_id(_select(records, benchmark, STUDENT)) for name, records in found.items()
        }
        for id, record in next(iter(students.values())).items():
            answering = {name: records[id] for name, records in students.items() if id in records}
            known = {TEACHER: answer(teacher[id])} if id in teacher else {}
            item = {
                "id": id,
                "question": collected.question(file, id, _choices(rows.get(id), record["answer"])),
                "answers": known | {name: answer(own) for name, own in answering.items()},
                "outcomes": {
                    name: outcome(own, teacher.get(id)) for name, own in answering.items()
                },
            }
            collected.add(f"{part}/{benchmark}", label, item)


def _select(records: list[dict], benchmark: str, subject: str) -> list[dict]:
    return [r for r in records if r["benchmark"] == benchmark and r["subject"] == subject]


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


def _fidelity(collected: Collected, found: Records, texts: Texts) -> None:
    rows = texts.rows("processed/test.jsonl")
    written = {
        name: _by_id([record for record in records if "texts" in record])
        for name, records in found.items()
    }
    for id, first in next(iter(written.values())).items():
        students = {name: records[id] for name, records in written.items() if id in records}
        row = rows.get(id)
        question = {} if row is None else {"text": row["question"], "reference": row["reference"]}
        answers = {TEACHER: {"text": first["teacher_text"]}}
        answers |= {name: {"text": own["student_text"]} for name, own in students.items()}
        item = {
            "id": id,
            "question": collected.question("test", id, question),
            "answers": answers,
            "outcomes": {
                name: _wording(own["student_text"], own["teacher_text"])
                for name, own in students.items()
            },
        }
        if collected.one_student:
            item["scores"] = {
                label: round(first[key], 3) for key, label in SCORES.items() if key in first
            }
        collected.add("fidelity", "Long-form answers · Fidelity", item)


def _faithfulness(collected: Collected, found: Records, texts: Texts) -> None:
    file = "fidelitybench_med.jsonl"
    rows = texts.rows(file)
    first = next(iter(found.values()))
    teacher = _by_id([record for record in first if record["subject"] == TEACHER])
    students = {
        name: _by_id([record for record in records if record["subject"] == STUDENT])
        for name, records in found.items()
    }
    for id in next(iter(students.values())):
        answering = {name: records[id] for name, records in students.items() if id in records}
        known = {TEACHER: _claims(teacher[id])} if id in teacher else {}
        outcomes = {
            name: _outcome_of_claims(own, teacher.get(id)) for name, own in answering.items()
        }
        item = {
            "id": id,
            "question": collected.question(file, id, _evidence(rows.get(id))),
            "answers": known | {name: _claims(own) for name, own in answering.items()},
            "outcomes": {name: found for name, found in outcomes.items() if found is not None},
        }
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


COLLECTORS: dict[str, Callable[[Collected, Records, Texts], None]] = {
    "benchmarks": _by_likelihood,
    "generative": _in_writing,
    "fidelity": _fidelity,
    "faithfulness": _faithfulness,
}
