"""Dataset records → long-form questions, and → the multiple-choice schema of the benchmarks.

A long-form question stands alone: no options, no letters. It becomes a row of the column contract of
`medistill_trl.data`; a benchmark record keeps its options, as texts with the index of the right one.
"""

from collections.abc import Callable

TEMPLATES = {
    "medqa": "{question}\n\nGive the answer and explain the reasoning.",
    "medmcqa": "{question} Answer and explain briefly.",
    "pubmedqa": "{question} Answer yes, no or maybe, and explain why.",
    "pubhealth": (
        "Is this health claim true, false, a mixture of both, or unproven? Explain why.\n\nClaim: {question}"
    ),
}
PUBMEDQA_ANSWERS = ["yes", "no", "maybe"]
PUBHEALTH_LABELS = ["true", "false", "mixture", "unproven"]


def medqa(record: dict) -> dict:
    letters = sorted(record["options"])
    return _multiple_choice(
        record["id"],
        record["question"],
        [record["options"][letter] for letter in letters],
        letters.index(record["answer_idx"]),
        record.get("explanation", ""),
    )


def medmcqa(record: dict) -> dict:
    """A raw record: `cop` counts from 1."""
    return _multiple_choice(
        record["id"],
        record["question"],
        [record[key] for key in ("opa", "opb", "opc", "opd")],
        record["cop"] - 1,
        record["exp"] or "",
    ) | {"subject": record["subject_name"]}


def pubmedqa(record: dict) -> dict:
    return {
        "id": str(record["pubid"]),
        "question": record["QUESTION"],
        "context": "\n".join(record["CONTEXTS"]),
        "options": PUBMEDQA_ANSWERS,
        "answer": PUBMEDQA_ANSWERS.index(record["final_decision"]),
        "reference": record["LONG_ANSWER"],
    }


def pubhealth(record: dict) -> dict:
    return {
        "id": str(record["claim_id"]),
        "question": record["claim"],
        "context": record["main_text"],
        "options": PUBHEALTH_LABELS,
        "answer": PUBHEALTH_LABELS.index(record["label"]),
        "reference": record["explanation"],
    }


def _multiple_choice(
    record_id: str, question: str, options: list[str], answer: int, explanation: str
) -> dict:
    return {
        "id": record_id,
        "question": question,
        "options": options,
        "answer": answer,
        "reference": f"{options[answer]}. {explanation}".strip(),
    }


SOURCES: dict[str, Callable[[dict], dict]] = {
    "medqa": medqa,
    "medmcqa": medmcqa,
    "pubmedqa": pubmedqa,
    "pubhealth": pubhealth,
}


def benchmark_record(source: str, record: dict) -> dict:
    """`{"id", "question", "context"?, "subject"?, "options": [...], "answer": int}`."""
    row = SOURCES[source](record)
    return {key: value for key, value in row.items() if key != "reference"}


def long_form_question(source: str, record: dict) -> dict:
    """`{"id", "source", "question", "reference", "answer"}`: the gold answer as text, no letters."""
    row = SOURCES[source](record)
    return {
        "id": row["id"],
        "source": source,
        "question": TEMPLATES[source].format(question=row["question"]),
        "reference": row["reference"],
        "answer": row["options"][row["answer"]],
    }
