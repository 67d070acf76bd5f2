"""FidelityBench-Med: do the models say what the evidence says, and do their citations hold?

Both models answer a question from numbered passages, greedily, and are asked to cite them. Each claim of an
answer (claims.py) is held against each passage by a verifier (verifier.py, support.py). An answer without claims
is neither faithful nor hallucinated: it is counted as what it is.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path

from eval.answers import draw_answers, writing_batches
from eval.claims import Claim, claims
from eval.data_files import read_rows
from eval.faithfulness_rates import (
    Answer,
    agreement,
    quality,
    rates,
    sentence,
    student_minus_teacher,
)
from eval.fitting import Fitted, check_room, fit
from eval.item_store import ItemStore
from eval.options import Options
from eval.subjects import Pair, Subject
from eval.support import SUPPORTED, JudgedClaim, judge_claims, mutual_entailment
from eval.verifier import CrossEncoderVerifier, Verdict, Verifier
from medistill_trl.teacher import Sampling

logger = logging.getLogger(__name__)

FILES = ["fidelitybench_med.jsonl"]
COLUMNS = {
    "question": str,
    "evidence": [{"text": str}],
    "claims": [{"text": str, "label": str}],
}
INSTRUCTION = (
    "Answer the question below in two to four sentences. Use only the numbered evidence, and end each sentence "
    "with the numbers of the passages it rests on, such as [1] or [1][2]."
)
PROMPTS_PER_CHUNK = 16  # so many are judged at a time, and lost if the evaluation is killed
NO_VERIFIER = (
    "no verifier: the answers were drawn and are kept; name a cross-encoder for natural language inference "
    "with --verifier (a hub id such as cross-encoder/nli-deberta-v3-base, or a folder) to have them judged"
)


def check(pair: Pair, data: Path, options: Options) -> None:
    """Raises UserError for what would stop `evaluate`: a row without its columns, a verifier that cannot judge."""
    read_rows(data / FILES[0], options.limit, COLUMNS)
    check_room(pair.subjects, options.answer_tokens, "answer_tokens")
    verifier = _verifier(options)
    if verifier is not None:
        verifier.check()


def evaluate(pair: Pair, data: Path, options: Options, store: ItemStore) -> dict:
    """Both models on the same prompts; see `docs/evaluation.md` for the result's keys."""
    rows = read_rows(data / FILES[0], options.limit, COLUMNS)
    return measure(pair, rows, _verifier(options), options, store)


def _verifier(options: Options) -> CrossEncoderVerifier | None:
    """Found and its labels read; its weights are loaded when it judges."""
    if options.verifier is None:
        return None
    return CrossEncoderVerifier(options.verifier, options.batch_size)


def measure(
    pair: Pair, rows: list[dict], verifier: Verifier | None, options: Options, store: ItemStore
) -> dict:
    """The part with any verifier.

    Args:
        rows: As in fidelitybench_med.jsonl.
        verifier: None to draw the answers and to say what is missing.
    """
    answers = {s.name: answer(s, rows, options, store) for s in pair.subjects}
    result = {"prompts": len(rows), "answer_tokens": options.answer_tokens}
    if verifier is None:
        logger.warning("faithfulness: %s", NO_VERIFIER)
        result["verifier"] = {"skipped": NO_VERIFIER}
    else:
        answers = {name: judge(verifier, found, name, store) for name, found in answers.items()}
        result["verifier"] = {
            "source": verifier.source,
            "fingerprint": verifier.fingerprint,
            **labelled_quality(verifier, rows, store),
        }
    for name, found in answers.items():
        result[name] = rates(found, result["verifier"])
        logger.info("%s", sentence(name, result[name], result["verifier"]))
    if pair.teacher is not None and verifier is not None:
        student, teacher = answers["student"], answers["teacher"]
        result["student_minus_teacher"] = student_minus_teacher(student, teacher, options.seed)
        scores = compare_claims(verifier, student, teacher, store)
        result["agreement"] = agreement([item.id for item in student], scores)
    result["items"] = [record(name, item) for name, found in answers.items() for item in found]
    return result


# --- answers


def ask(question: str, passages: Sequence[str]) -> str:
    """The question with its numbered passages."""
    evidence = "\n".join(f"[{number}] {text}" for number, text in enumerate(passages, start=1))
    return f"{INSTRUCTION}\n\nEvidence:\n{evidence or '(none)'}\n\nQuestion: {question}"


def fitted_prompts(subject: Subject, rows: list[dict], answer_tokens: int) -> list[Fitted]:
    """How the model is asked for each row."""
    return [
        fit(
            subject,
            lambda kept, question=row["question"]: ask(question, kept),
            _texts(row),
            answer_tokens,
        )
        for row in rows
    ]


def answer(subject: Subject, rows: list[dict], options: Options, store: ItemStore) -> list[Answer]:
    """One model's greedy answers, with their claims."""
    prompts = fitted_prompts(subject, rows, options.answer_tokens)
    drawn = draw_answers(
        subject,
        [prompt.prompt for prompt in prompts],
        Sampling(options.answer_tokens),
        writing_batches(options),
        store,
        f"answers of the {subject.name} with evidence",
    )
    return [
        Answer(
            row["id"],
            tuple(_texts(row)),
            completion.text,
            completion.finished,
            prompt.shortened,
            prompt.too_long,
            claims(completion.text, completion.finished),
        )
        for row, prompt, completion in zip(rows, prompts, drawn, strict=True)
    ]


def _texts(row: dict) -> list[str]:
    return [passage["text"] for passage in row["evidence"]]


# --- verdicts, by way of the store


def judge(verifier: Verifier, answers: list[Answer], name: str, store: ItemStore) -> list[Answer]:
    """The answers with their claims judged against their evidence."""
    items = [_item(a.id, a.claims.claims, a.evidence) for a in answers]
    judged = judge_items(verifier, items, f"claims of the {name}", store)
    return [replace(a, judged=found) for a, found in zip(answers, judged, strict=True)]


def judge_items(
    verifier: Verifier, items: list[dict], label: str, store: ItemStore
) -> list[list[JudgedClaim]]:
    """The judged claims of each item, from the store where it has them.

    Args:
        items: Each with `claims` (text and citations) and `evidence`.
    """

    def compute(part: list[dict]) -> list[dict]:
        answers = [(_claims(item), item["evidence"]) for item in part]
        return [
            {"verdicts": [_packed(claim) for claim in found]}
            for found in judge_claims(answers, verifier)
        ]

    key = {"measure": "claims against evidence, version 2", "verifier": verifier.fingerprint}
    records = store.records(key, items, compute, PROMPTS_PER_CHUNK, label)
    return [
        [
            JudgedClaim(claim, len(item["evidence"]), _unpacked(verdicts))
            for claim, verdicts in zip(_claims(item), found["verdicts"], strict=True)
        ]
        for item, found in zip(items, records, strict=True)
    ]


def compare_claims(
    verifier: Verifier, student: list[Answer], teacher: list[Answer], store: ItemStore
) -> list[list[list[float]]]:
    """For each prompt how far each claim of the student says what each of the teacher's says."""
    items = [
        {
            "id": one.id,
            "student": [claim.text for claim in one.claims.claims],
            "teacher": [claim.text for claim in other.claims.claims],
        }
        for one, other in zip(student, teacher, strict=True)
    ]

    def compute(part: list[dict]) -> list[dict]:
        texts = [(item["student"], item["teacher"]) for item in part]
        return [{"scores": scores} for scores in mutual_entailment(texts, verifier)]

    key = {"measure": "claims against claims, version 1", "verifier": verifier.fingerprint}
    label = "claims of the student against the teacher's"
    return [r["scores"] for r in store.records(key, items, compute, PROMPTS_PER_CHUNK, label)]


def labelled_quality(verifier: Verifier, rows: list[dict], store: ItemStore) -> dict:
    """How good the verifier is on the benchmark's labelled claims, and on supported ones with another prompt's
    evidence, which is about something else: there they are taken to be unsupported."""
    evidence = [_texts(row) for row in rows]
    own, other, labels = [], [], []
    for number, row in enumerate(rows):
        following = (e for e in evidence[number + 1 :] + evidence[:number] if e != evidence[number])
        elsewhere = next(following, None)
        for place, labelled in enumerate(row["claims"]):
            claim, name = (Claim(labelled["text"], ()),), f"{row['id']}#{place}"
            own.append(_item(name, claim, evidence[number]))
            labels.append(labelled["label"])
            if labels[-1] == SUPPORTED and elsewhere:
                other.append(_item(name, claim, elsewhere))
    judged = judge_items(verifier, own, "labelled claims", store)
    mismatched = judge_items(verifier, other, "claims with other evidence", store)
    return quality([claims[0] for claims in judged], labels, [claims[0] for claims in mismatched])


def _item(id: str, found: Sequence[Claim], evidence: Sequence[str]) -> dict:
    return {
        "id": id,
        "claims": [[claim.text, list(claim.citations)] for claim in found],
        "evidence": list(evidence),
    }


def _claims(item: dict) -> list[Claim]:
    return [Claim(text, tuple(cited)) for text, cited in item["claims"]]


def _packed(claim: JudgedClaim) -> dict[str, list[float]]:
    """Verdicts as JSON: the passages' numbers → entailment, contradiction, cut."""
    return {
        " ".join(map(str, numbers)): list(astuple(verdict))
        for numbers, verdict in claim.verdicts.items()
    }


def _unpacked(packed: dict[str, list[float]]) -> dict[tuple[int, ...], Verdict]:
    return {
        tuple(map(int, numbers.split())): Verdict(*scores) for numbers, scores in packed.items()
    }


def record(name: str, item: Answer) -> dict:
    """One answer for results/items: what was written, and what became of each claim."""
    found = [asdict(claim) for claim in item.claims.claims]
    if item.judged is not None:
        for line, claim in zip(found, item.judged, strict=True):
            line |= {
                "bin": claim.bin,
                "support": claim.support,
                "contradiction": claim.contradiction,
                "recalled": claim.is_recalled,
            }
    return {
        "subject": name,
        "id": item.id,
        "answer": item.text,
        "finished": item.finished,
        "claims": found,
    }
