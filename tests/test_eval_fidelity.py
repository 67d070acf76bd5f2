"""Fidelity: by hand, against scipy and the plain formula, on a model against itself and against its opposite."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from tiny_subjects import (
    CONTEXT,
    shuffled_vocabulary,
    tiny_pair,
    tiny_subject,
    tiny_tokenizer,
    write_rows,
)

from eval import fidelity
from eval.item_store import ItemStore
from eval.options import Options
from eval.prefixes import SETS
from eval.subjects import Pair
from eval.token_agreement import TOP_K, compare_states, token_terms
from medistill_trl.losses.chunked import Side
from medistill_trl.losses.divergences import Distribution
from medistill_trl.losses.heads import LinearHead
from medistill_trl.prompts import PromptFormat

QUESTIONS = [
    (
        "Why does gout hurt?",
        "Crystals of monosodium urate in the joint start an acute inflammation.",
    ),
    ("What lowers blood glucose?", "Insulin does: it lets muscle and fat take up glucose."),
    ("Which vitamin prevents scurvy?", "Vitamin C."),
    ("Why is the skin yellow in jaundice?", "Bilirubin builds up in blood and tissues."),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"id": f"q{n}", "source": "sample", "question": question, "reference": reference}
        for n, (question, reference) in enumerate(QUESTIONS)
    ]
    write_rows(folder / "processed/test.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def measure(data, tmp_path_factory):
    def run(pair: Pair, store: ItemStore | None = None, **options) -> dict:
        store = store or ItemStore(tmp_path_factory.mktemp("store"))
        return fidelity.evaluate(pair, data, Options(**options), store)

    return run


@pytest.fixture(scope="module")
def measured(measure):
    """Two different models, and what was found."""
    pair = tiny_pair()
    return pair, measure(pair)


def test_each_set_of_answers_is_said_with_what_was_found(measured, measure, caplog):
    caplog.set_level("INFO")
    pair, found = measured
    measure(pair)
    for name, prefixes in found["prefixes"].items():
        divergence = prefixes["micro"]["kl_teacher_student_nats"]["value"]
        assert f"fidelity, {name} answers: KL(T‖S) {divergence:.3f} nats" in caplog.messages


def distributions(rows: int, size: int, seed: int) -> Distribution:
    generator = torch.Generator().manual_seed(seed)
    return Distribution.of(torch.randn(rows, size, generator=generator) * 3)


# --- one token


def test_a_token_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2), so m = (5/8, 3/8); token 0 was predicted."""
    teacher = Distribution.of(torch.tensor([[math.log(3.0), 0.0]]))
    student = Distribution.of(torch.tensor([[0.1, 0.1]]))
    terms = {k: v.item() for k, v in token_terms(student, teacher, torch.tensor([0])).items()}
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert terms["kl_teacher_student_nats"] == pytest.approx(forward, rel=1e-5)
    backward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert terms["kl_student_teacher_nats"] == pytest.approx(backward, rel=1e-5)
    of_teacher = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
    of_student = 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    assert terms["js_nats"] == pytest.approx((of_teacher + of_student) / 2, rel=1e-5)
    assert terms["student_nats"] == pytest.approx(math.log(2))
    assert terms["teacher_nats"] == pytest.approx(-math.log(0.75))
    assert terms["overlap_at_50"] == terms["teacher_mass_at_50"] == 1  # all there are


def test_overlap_and_mass_by_hand():
    probs = {
        "student": [0.4, 0.3, 0.1, 0.1, 0.06, 0.04],
        "teacher": [0.05, 0.05, 0.1, 0.2, 0.25, 0.35],
    }
    student, teacher = (Distribution.of(torch.tensor([p]).log()) for p in probs.values())
    terms = token_terms(student, teacher, torch.tensor([0]))
    assert terms["overlap_at_1"].item() == 0
    assert terms["teacher_mass_at_1"].item() == pytest.approx(0.05)
    # The five likeliest: the student's are 0 to 4, the teacher's 2 to 5 and one of 0 and 1.
    assert terms["overlap_at_5"].item() == pytest.approx(4 / 5)
    assert terms["teacher_mass_at_5"].item() == pytest.approx(0.65)
    assert terms["overlap_at_10"].item() == 1


def test_divergences_are_scipys():
    student, teacher = distributions(20, 60, 0), distributions(20, 60, 1)
    terms = token_terms(student, teacher, torch.zeros(20, dtype=torch.long))
    p, q = teacher.probs.double().numpy(), student.probs.double().numpy()
    assert terms["kl_teacher_student_nats"].tolist() == pytest.approx(
        entropy(p, q, axis=1), rel=1e-4
    )
    assert terms["kl_student_teacher_nats"].tolist() == pytest.approx(
        entropy(q, p, axis=1), rel=1e-4
    )
    js = jensenshannon(p, q, axis=1) ** 2
    assert terms["js_nats"].tolist() == pytest.approx(js, rel=1e-4)
    for k in TOP_K:
        top = [set(side.topk(k).indices[0].tolist()) for side in (teacher.probs, student.probs)]
        assert terms[f"overlap_at_{k}"][0].item() == pytest.approx(len(top[0] & top[1]) / k)
        mass = teacher.probs[0, list(top[1])].sum().item()
        assert terms[f"teacher_mass_at_{k}"][0].item() == pytest.approx(mass, rel=1e-5)


def test_certain_and_apart():
    apart = torch.eye(60) * 1e4
    terms = token_terms(Distribution.of(apart[:1]), Distribution.of(apart[1:2]), torch.tensor([0]))
    assert terms["js_nats"].item() == pytest.approx(math.log(2))
    assert terms["overlap_at_1"].item() == terms["teacher_mass_at_1"].item() == 0


def test_chunks_of_any_size_and_never_all_logits(monkeypatch):
    torch.manual_seed(0)
    sides = [Side(torch.randn(9, 8), LinearHead(torch.randn(70, 8))) for _ in range(2)]
    targets, most = torch.randint(70, (9,)), []
    project = LinearHead.project

    def seen(self, hidden, dtype, track):
        most.append(len(hidden))
        return project(self, hidden, dtype, track)

    whole = compare_states(*sides, targets)
    monkeypatch.setattr(LinearHead, "project", seen)
    parts = compare_states(*sides, targets, chunk_size=2)
    assert max(most) == 2
    for name, values in whole.items():
        torch.testing.assert_close(parts[name], values)


# --- models


@torch.no_grad()
def plain(pair: Pair, question: str, ids: list[int]) -> dict[str, torch.Tensor]:
    """Both models' distributions on an answer, from whole logits, in float64."""
    result = {}
    for subject in pair.subjects:
        start = subject.form.encode(subject.form.render(question))
        logits = subject.model(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1]
        result[subject.name] = logits.double().softmax(-1)
    return result


def gold_ids(pair: Pair, row: int) -> list[int]:
    tokenizer = pair.student.form.tokenizer
    ids = tokenizer(QUESTIONS[row][1], add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def test_gold_answers_are_the_plain_formula(measured):
    pair, result = measured
    kls, mass = [], []
    for row, (question, _) in enumerate(QUESTIONS):
        p = plain(pair, question, gold_ids(pair, row))
        kls.append((p["teacher"] * (p["teacher"] / p["student"]).log()).sum(-1))
        top = p["student"].topk(5).indices
        mass.append(p["teacher"].gather(1, top).sum(1))
    found = result["prefixes"]["gold"]
    tokens = sum(map(len, kls))
    assert found["tokens"] == tokens
    assert found["examples"] == len(QUESTIONS)
    micro = torch.cat(kls).mean().item()
    assert found["micro"]["kl_teacher_student_nats"]["value"] == pytest.approx(micro, rel=1e-4)
    macro = sum(kl.mean().item() for kl in kls) / len(kls)
    assert found["macro"]["kl_teacher_student_nats"]["value"] == pytest.approx(macro, rel=1e-4)
    assert abs(micro - macro) > 1e-3 * micro  # two different means
    assert found["micro"]["teacher_mass_at_5"]["value"] == pytest.approx(
        torch.cat(mass).mean().item(), rel=1e-4
    )
    low, high = found["micro"]["kl_teacher_student_nats"]["interval_95"]
    assert low < micro < high


def test_each_set_is_its_writers_text(measured):
    pair, result = measured
    for name in ("teacher", "student"):
        texts = [item for item in result["items"] if item.get("texts")]
        records = [item for item in result["items"] if item.get("prefixes") == name]
        tokenizer = pair.student.form.tokenizer
        for text, record in zip(texts, records, strict=True):
            assert record["id"] == text["id"]
            assert record["bytes"] == len(text[f"{name}_text"].encode())
            ids = tokenizer(text[f"{name}_text"], add_special_tokens=False)["input_ids"]
            assert 0 < record["tokens"] <= 12 or not ids
    # Greedy text is what its writer finds likeliest, so it loses fewer nats on it than the other model.
    of = result["prefixes"]
    for writer, other in (("teacher", "student"), ("student", "teacher")):
        mine, theirs = (of[writer]["micro"][f"{who}_nats"]["value"] for who in (writer, other))
        assert mine < theirs


def test_bits_per_byte_of_gold(measured):
    pair, result = measured
    nats = num_bytes = 0
    for row, (question, reference) in enumerate(QUESTIONS):
        ids = gold_ids(pair, row)
        probs = plain(pair, question, ids)["teacher"]
        nats -= probs.gather(1, torch.tensor(ids)[:, None]).log().sum().item()
        num_bytes += len(reference.encode())
    found = result["prefixes"]["gold"]["teacher_bits_per_byte"]["value"]
    assert found == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)


def test_an_empty_answers_end_token_is_not_counted_on_no_bytes():
    """As where tokenizers differ, which leaves empty answers out."""
    rows = [{"student_nats": 8 * math.log(2), "bytes": 4}, {"student_nats": 5.0, "bytes": 0}]
    found = fidelity.bits_per_byte(rows, "student_nats")
    assert (found.value, found.n) == (2, 1)


def test_a_model_against_itself(measure):
    result = measure(tiny_pair(student_seed=None))
    for name in SETS:
        found = result["prefixes"][name]["micro"]
        for divergence in ("kl_teacher_student_nats", "kl_student_teacher_nats", "js_nats"):
            assert found[divergence]["value"] == pytest.approx(0, abs=1e-6)
        assert all(found[f"overlap_at_{k}"]["value"] == 1 for k in TOP_K)
    text = result["text"]
    for name in ("exact_match", "rouge_1", "rouge_2", "rouge_l", "semantic_similarity"):
        assert text[name]["value"] == pytest.approx(1, abs=1e-5)
    assert text["bleu"]["value"] == pytest.approx(100)


def test_a_shuffled_vocabulary_is_near_the_worst(measure):
    pair = tiny_pair(student_seed=None)
    tokenizer, teacher = pair.teacher.form.tokenizer, pair.teacher.model
    student = tiny_subject("student", tokenizer, shuffled_vocabulary(teacher), "shuffled")
    sharp = {"teacher": teacher, "student": student.model}
    for model in sharp.values():  # tiny models are nearly uniform, and then all are alike
        model.get_output_embeddings().weight.data.mul_(8)
    result = measure(Pair(student, pair.teacher, pair.recipe))
    found = result["prefixes"]["gold"]["micro"]
    assert found["js_nats"]["value"] > 0.9 * math.log(2)
    assert found["kl_teacher_student_nats"]["value"] > 5
    for k in TOP_K:
        assert found[f"overlap_at_{k}"]["value"] < 5 * k / len(tokenizer)
    assert result["text"]["exact_match"]["value"] == 0


def test_batches_do_not_matter(measure, measured):
    one, eight = measure(measured[0], batch_size=1), measured[1]
    assert one["text"] == eight["text"]
    for a, b in zip(one["items"], eight["items"], strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert value == (
                pytest.approx(b[name], rel=1e-5) if name in fidelity.TERMS else b[name]
            )


def test_other_tokenizers_get_what_is_defined(measure):
    large = tiny_tokenizer()
    small = tiny_tokenizer(vocab_size=450)
    small.chat_template = None
    pair = Pair(
        tiny_subject("student", small, make_model(len(small), seed=3), "small"),
        tiny_subject("teacher", large, make_model(len(large), seed=4), "large"),
        {"teacher_max_new_tokens": 8},
    )
    result = measure(pair)
    assert result["shared_vocabulary"] is None
    for name in SETS:
        found = result["prefixes"][name]
        assert "tokenizers differ" in found["skipped"]
        assert "micro" not in found
        for subject in ("student", "teacher"):
            assert found[f"{subject}_bits_per_byte"]["value"] > 0
    question, reference = QUESTIONS[2]
    record = next(i for i in result["items"] if i["id"] == "q2" and i["subject"] == "student")
    start = small(pair.student.form.render(question), add_special_tokens=False)["input_ids"]
    joint = small(pair.student.form.render(question) + reference, add_special_tokens=False)
    assert record["tokens"] == len(joint["input_ids"]) - len(start) + 1  # with EOS
    assert record["bytes"] == len(reference)
    assert result["text"]["rouge_l"]["n"] == len(QUESTIONS)


def test_models_with_prompts_of_their_own(measure, measured):
    """The same tokens after different prompts still stand side by side."""
    pair = measured[0]
    asked = PromptFormat(pair.student.form.tokenizer, "Answer briefly.")
    student = replace(pair.student, form=asked)
    found = measure(Pair(student, pair.teacher, pair.recipe))["prefixes"]["gold"]
    assert found["tokens"] == measured[1]["prefixes"]["gold"]["tokens"]
    before = measured[1]["prefixes"]["gold"]["micro"]
    assert found["micro"]["teacher_nats"]["value"] == pytest.approx(
        before["teacher_nats"]["value"], rel=1e-5
    )
    assert found["micro"]["student_nats"]["value"] != before["student_nats"]["value"]


def test_an_adapter_is_the_merged_model(measure, measured):
    tokenizer = measured[0].student.form.tokenizer
    config = LoraConfig(
        r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    adapted = get_peft_model(make_model(len(tokenizer), 2, seed=5), config)
    student = tiny_subject("student", tokenizer, adapted, "adapted")
    found = measure(replace(measured[0], student=student))["prefixes"]["gold"]["micro"]
    before = measured[1]["prefixes"]["gold"]["micro"]
    merged = tiny_subject("student", tokenizer, adapted.merge_and_unload(), "merged")
    same = measure(replace(measured[0], student=merged))["prefixes"]["gold"]["micro"]
    for name in ("kl_teacher_student_nats", "js_nats", "student_nats"):
        assert found[name]["value"] == pytest.approx(same[name]["value"], rel=1e-4)
        assert found[name]["value"] != pytest.approx(before[name]["value"], rel=1e-3)


# --- the suite's habits


def test_stored_results_need_no_model(measure, tmp_path):
    store = ItemStore(tmp_path / "kept")
    first = measure(tiny_pair(), store)
    computed = store.computed

    def refuse():
        raise AssertionError("loaded")

    pair = tiny_pair()
    again = [replace(subject, load=refuse) for subject in pair.subjects]
    assert measure(Pair(*again, pair.recipe), store) == first
    assert store.computed == computed


def test_sampled_prefixes_are_kept(measure, tmp_path):
    store = ItemStore(tmp_path / "kept")
    pair = tiny_pair()
    sampled = measure(pair, store, prefix_temperature=1.0)
    assert sampled["sampling"]["temperature"] == 1
    greedy = measure(pair, store)
    assert sampled["text"] == greedy["text"]  # texts are compared greedily
    assert sampled["prefixes"]["gold"] == greedy["prefixes"]["gold"]
    assert sampled["prefixes"]["student"] != greedy["prefixes"]["student"]
    assert measure(pair, store, prefix_temperature=1.0) == sampled


def test_what_cannot_be_measured_says_why(measure, tmp_path):
    pair = tiny_pair()
    alone = measure(Pair(pair.student, None, None))
    assert "--teacher" in alone["skipped"]
    result = measure(pair, encoder=str(tmp_path / "nowhere"))
    assert "cannot be loaded" in result["text"]["semantic_similarity"]["skipped"]
    assert result["text"]["rouge_l"]["value"] is not None


def test_questions_that_do_not_fit_are_left_out(data, tmp_path):
    rows = [
        {"id": "long", "source": "s", "question": "why " * CONTEXT, "reference": "Because."},
        {"id": "short", "source": "s", "question": "Why?", "reference": "Because."},
    ]
    write_rows(tmp_path / "data/processed/test.jsonl", rows)
    store = ItemStore(tmp_path / "store")
    result = fidelity.evaluate(tiny_pair(), tmp_path / "data", Options(limit=1), store)
    assert (result["questions"], result["questions_left_out"]) == (1, 1)
    assert {item["id"] for item in result["items"]} == {"short"}
