"""FidelityBench-Med: crafted answers get the bins they should, by a real cross-encoder."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rule_verifier import HIP, KNEE, Rules
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from tiny_verifier import FINDINGS, JOINTS, LABELS, statement, train

from eval.answers import STORE
from eval.faithfulness import NO_VERIFIER, ask, check, fitted_prompts, measure
from eval.item_store import ItemStore
from eval.options import ModelOptions, Options
from eval.run import main
from eval.subjects import load_models
from eval.verifier import CrossEncoderVerifier, label_places
from medistill_trl.completion_store import CompletionStore
from medistill_trl.errors import UserError
from medistill_trl.teacher import Completion, Sampling
from medistill_trl.writer import Writer

OPTIONS = Options(answer_tokens=24, batch_size=4)


# --- the verifier ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verifier_folder(tmp_path_factory, model_cache) -> Path:
    return train(tmp_path_factory.mktemp("verifier") / "nli")


@pytest.fixture(scope="module")
def verifier(verifier_folder) -> CrossEncoderVerifier:
    return CrossEncoderVerifier(str(verifier_folder), batch_size=8)


def all_pairs() -> list[tuple[str, str]]:
    statements = [
        statement(j, f, holds) for j in JOINTS for f in FINDINGS for holds in (True, False)
    ]
    return [(premise, claim) for premise in statements for claim in statements]


def test_the_trained_verifier_is_read_right(verifier):
    right = 0
    for (premise, claim), verdict in zip(all_pairs(), verifier.judge(all_pairs()), strict=True):
        same_place = premise.split()[1::2] == claim.split()[1::2]  # the joint and the finding
        assert not verdict.cut
        right += (verdict.entailment > 0.5) == (premise == claim) and (
            verdict.contradiction > 0.5
        ) == (same_place and premise != claim)
    assert (
        right / len(all_pairs()) > 0.98
    )  # its training is short, and differs from machine to machine


def test_verdicts_do_not_depend_on_batch_size_and_padding(verifier, verifier_folder):
    pairs = [*all_pairs()[:20], (f"{KNEE} {HIP}", HIP), (KNEE, KNEE + HIP)]
    alone = CrossEncoderVerifier(str(verifier_folder), batch_size=1).judge(pairs)
    for one, many in zip(alone, verifier.judge(pairs), strict=True):
        assert one.entailment == pytest.approx(many.entailment, abs=1e-5)
        assert one.contradiction == pytest.approx(many.contradiction, abs=1e-5)


def test_the_order_of_labels_is_taken_from_the_model(verifier, verifier_folder, tmp_path):
    model = CrossEncoder(str(verifier_folder))
    order = [2, 0, 1]  # entailment, neutral, contradiction
    head = model.model.classifier
    head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
    model.model.config.id2label = {new: LABELS[old].upper() for new, old in enumerate(order)}
    model.save_pretrained(str(tmp_path / "turned"))
    turned = CrossEncoderVerifier(str(tmp_path / "turned"), batch_size=8)
    pairs = all_pairs()[:30]
    for one, other in zip(verifier.judge(pairs), turned.judge(pairs), strict=True):
        assert one.entailment == pytest.approx(other.entailment, abs=1e-6)
        assert one.contradiction == pytest.approx(other.contradiction, abs=1e-6)


@pytest.mark.parametrize(
    "labels",
    [
        {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"},
        {0: "entailment", 1: "not_entailment"},
        {0: "LABEL_0"},
        {0: "entailment", 1: "neutral", 2: "other"},
    ],
)
def test_a_model_that_does_not_say_what_contradicts_is_refused(labels):
    with pytest.raises(UserError, match="entailment, contradiction and a third"):
        label_places("some/model", labels)


def test_a_missing_verifier_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        CrossEncoderVerifier(str(tmp_path / "nothing"))


def test_a_pair_longer_than_the_verifier_reads_is_marked(verifier):
    assert verifier.judge([(KNEE * 20, KNEE)])[0].cut


# --- crafted answers through the whole part --------------------------------------------------------

CRAFTED = {
    "supported": f"{KNEE[:-1]} [1]. {HIP} [2]",
    "contradicted": "Yes. The knee lacks swelling [1].",
    "invented citation": "The knee shows swelling [7].",
    "unsupported": "The wrist shows warmth [1]. The wrist shows warmth [1].",
    "empty": "",
    "no evidence": "The elbow shows warmth [1]. The elbow",
}
BINS = {
    "supported": ["supported", "supported"],
    "contradicted": ["contradicted"],
    "invented citation": ["supported"],
    "unsupported": ["unsupported"],
    "empty": [],
    "no evidence": ["unsupported"],
}
CLAIMS = {
    "supported": [{"text": KNEE, "label": "supported"}],
    "contradicted": [{"text": "The knee lacks swelling.", "label": "refuted"}],
}
ROWS = [
    {
        "id": name,
        "question": f"What does examination {number} show?",
        "evidence": []
        if name == "no evidence"
        else [{"id": "e1", "text": KNEE}, {"id": "e2", "text": HIP}],
        "claims": CLAIMS.get(name, []),
    }
    for number, name in enumerate(CRAFTED)
]


@dataclass
class Crafted(Writer):
    """Writes into the completion store what a subject would have answered."""

    identity: str
    answers: dict[str, str]

    def complete(self, prompts, sampling, seed=0):
        texts = [self.answers[prompt] for prompt in prompts]
        return [Completion(text, [], finished=not text.endswith("elbow")) for text in texts]


def craft(subject, store: ItemStore, answers: list[str]) -> None:
    prompts = [fitted.prompt for fitted in fitted_prompts(subject, ROWS, OPTIONS.answer_tokens)]
    writer = Crafted(subject.fingerprint, dict(zip(prompts, answers, strict=True)))
    store.folder.mkdir(parents=True, exist_ok=True)
    CompletionStore(store.folder / STORE).draw(writer, prompts, Sampling(OPTIONS.answer_tokens))


@pytest.fixture(scope="module")
def pair(teacher_folder, other_teacher_folder, model_cache):
    return load_models(ModelOptions(model=str(teacher_folder), teacher=str(other_teacher_folder)))


@pytest.fixture(scope="module")
def crafted(pair, tmp_path_factory) -> ItemStore:
    """A store in which the student wrote the crafted answers, and the teacher faithful ones."""
    store = ItemStore(tmp_path_factory.mktemp("crafted"))
    craft(pair.student, store, list(CRAFTED.values()))
    craft(pair.teacher, store, [CRAFTED["supported"]] * len(ROWS))
    return store


@pytest.fixture(scope="module")
def result(pair, crafted, verifier) -> dict:
    return measure(pair, ROWS, verifier, OPTIONS, crafted)


def test_crafted_answers_get_their_bins(result):
    found = {
        item["id"]: [claim["bin"] for claim in item["claims"]]
        for item in result["items"]
        if item["subject"] == "student"
    }
    assert found == BINS


def test_rates_of_crafted_answers(result):
    student = result["student"]
    answers, claims, citations = student["answers"], student["claims"], student["citations"]
    assert answers["claims"] == 6
    assert answers["without_claims"]["value"] == pytest.approx(1 / 6)
    assert answers["repeated_sentences"] == 1
    assert (answers["cut_at_limit"], answers["unfinished_sentences_left_out"]) == (1, 1)
    values = {name: claims[name]["value"] for name in ("supported", "contradicted", "unsupported")}
    assert values == pytest.approx(
        {"supported": 3 / 6, "contradicted": 1 / 6, "unsupported": 2 / 6}
    )
    assert claims["hallucination"]["value"] == pytest.approx(3 / 6)
    # By prompt: five answers state something.
    assert claims["hallucination"]["clusters"] == 5
    assert claims["faithfulness_by_answer"]["value"] == pytest.approx((1 + 0 + 1 + 0 + 0) / 5)
    assert claims["verifier"] == {"balanced_accuracy": 1, "auroc": 1}
    # The only other evidence is that of the prompt without any: nothing to hold a claim against.
    assert result["verifier"]["other_evidence"]["claims"] == 1
    assert citations["existence"]["value"] == pytest.approx(4 / 6)
    assert citations["recall"]["value"] == pytest.approx(2 / 6)
    assert citations["precision"]["value"] == pytest.approx(2 / 4)  # without the two invented ones
    # The teacher says the same everywhere, and where there is no evidence even that is not supported.
    teacher = result["teacher"]["claims"]
    assert teacher["hallucination"]["value"] == pytest.approx(2 / 12)
    difference = result["student_minus_teacher"]["hallucination"]
    assert difference["value"] == pytest.approx(3 / 6 - 2 / 12)
    low, high = difference["interval_95"]
    assert low < difference["value"] < high
    # Of the student's claims the teacher makes those of "supported" and "invented citation".
    assert result["agreement"]["student_claims_of_the_teacher"]["value"] == pytest.approx(3 / 6)
    json.dumps(result, allow_nan=False)


def test_nothing_is_judged_or_written_twice(pair, crafted, verifier, result):
    class Silent:
        source, fingerprint = verifier.source, verifier.fingerprint

        def judge(self, pairs):
            raise AssertionError(pairs)

    again = measure(pair, ROWS, Silent(), OPTIONS, ItemStore(crafted.folder))
    assert again == result


def test_without_a_verifier_answers_are_kept_and_the_part_says_what_is_missing(pair, crafted):
    found = measure(pair, ROWS, None, OPTIONS, crafted)
    assert found["verifier"] == {"skipped": NO_VERIFIER}
    assert "--verifier" in NO_VERIFIER
    assert found["student"]["citations"]["existence"]["value"] == pytest.approx(4 / 6)
    assert "claims" not in found["student"]
    assert "agreement" not in found
    texts = [item["answer"] for item in found["items"] if item["subject"] == "student"]
    assert texts == list(CRAFTED.values())


def test_a_model_agrees_with_itself(pair, crafted, verifier):
    same = replace(pair, teacher=replace(pair.student, name="teacher"))
    found = measure(same, ROWS, verifier, OPTIONS, crafted)
    assert found["agreement"]["student_claims_of_the_teacher"]["value"] == 1
    assert found["agreement"]["teacher_claims_of_the_student"]["value"] == 1
    difference = found["student_minus_teacher"]["hallucination"]
    assert (difference["value"], difference["interval_95"]) == (0, [0, 0])


# --- prompts and real answers ----------------------------------------------------------------------


def test_the_prompt_numbers_the_passages():
    text = ask("Is the knee swollen?", [KNEE, HIP])
    assert f"[1] {KNEE}\n[2] {HIP}\n" in text
    assert text.endswith("Question: Is the knee swollen?")
    assert "(none)" in ask("Is the knee swollen?", [])


def test_evidence_too_long_for_the_model_is_shortened(pair):
    long = {**ROWS[0], "evidence": [{"id": "e1", "text": KNEE * 300}, {"id": "e2", "text": HIP}]}
    fitted = fitted_prompts(pair.student, [long, ROWS[0]], 24)
    assert [prompt.shortened for prompt in fitted] == [True, False]
    form = pair.student.form
    length = len(form.encode(fitted[0].prompt))
    assert 470 < length <= 512 - 24  # of what it attends to, as much as there is room for
    assert HIP in fitted[0].prompt  # the longest passage gives way


def test_a_question_that_leaves_no_room_is_counted_and_not_asked(pair, tmp_path):
    rows = [{**ROWS[0], "id": "long", "question": "Is it? " * 400}, ROWS[0]]
    found = measure(pair, rows, None, OPTIONS, ItemStore(tmp_path))
    answers = found["student"]["answers"]
    assert answers["questions_too_long"] == 1
    assert [item["answer"] == "" for item in found["items"][:2]] == [True, False]


def test_real_answers_do_not_depend_on_the_batch_size(pair, tmp_path):
    def found(size: int) -> dict:
        options = replace(OPTIONS, batch_size=size)
        return measure(pair, ROWS, Rules(), options, ItemStore(tmp_path / str(size)))

    alone, together = found(1), found(8)
    assert alone == together
    assert any(item["answer"].strip() for item in alone["items"])


def cut_off(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-4000])


def with_nan(weights: Path) -> None:
    tensors = load_file(weights)
    tensors["classifier.bias"].fill_(float("nan"))
    save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"), [(cut_off, "weights cannot be loaded"), (with_nan, "gives NaN or infinity")]
)
def test_a_broken_verifier_is_found_before_anything_is_measured(
    pair, verifier_folder, sample_build, tmp_path, damage, said
):
    folder, options = tmp_path / "nli", replace(OPTIONS, limit=1, verifier=str(tmp_path / "nli"))
    shutil.copytree(verifier_folder, folder)
    check(pair, sample_build[0], options)
    damage(folder / "model.safetensors")
    with pytest.raises(UserError, match=said) as caught:
        check(pair, sample_build[0], options)
    assert str(folder) in str(caught.value)


def test_the_command(teacher_folder, verifier_folder, sample_build, tmp_path):
    words = ["--model", teacher_folder, "--teacher", teacher_folder, "--data", sample_build[0]]
    words += ["--tasks", "faithfulness", "--limit", 3, "--answer_tokens", 16]
    words += ["--verifier", verifier_folder, "--out", tmp_path]
    assert main([str(word) for word in words]) == 0
    content = json.loads((tmp_path / "results/comprehensive_evaluation.json").read_text())
    found = content["results"]["faithfulness"]
    assert found["prompts"] == 3
    quality = found["verifier"]
    assert quality["labelled_claims"] > 0
    # Each supported claim once with its own evidence and once with another prompt's.
    assert quality["other_evidence"]["claims"] == 2 * quality["labels"]["supported"]
    items = (tmp_path / "results/items/faithfulness.jsonl").read_text().splitlines()
    assert len(items) == 6
