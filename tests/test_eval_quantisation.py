"""What quantising costs a teacher: against the plain formula on models loaded here, and by the suite's habits."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from eval import benchmarks, quantisation
from eval.data_files import read_rows
from eval.item_store import ItemStore
from eval.options import ModelOptions, Options
from eval.quantisation import compare, copies
from eval.subjects import Pair, load_models

SETTINGS = {"limit": 3, "benchmarks": ["medqa"], "max_new_tokens": 8}


@pytest.fixture(scope="module")
def data(sample_build):
    return sample_build[0]


@pytest.fixture(scope="module")
def load(teacher_folder, model_cache):
    """The tiny teacher beside itself, as the command loads it."""
    return lambda **how: load_models(
        ModelOptions(model=str(teacher_folder), teacher=str(teacher_folder), **how)
    )


@pytest.fixture(scope="module")
def measured(load, data, tmp_path_factory):
    """By kind: the result of a teacher in full precision, and the store it is kept in."""
    store = ItemStore(tmp_path_factory.mktemp("store"))
    return {
        kind: quantisation.evaluate(
            load(), data, Options(teacher_quantisation=kind, **SETTINGS), store
        )
        for kind in ("nf4", "int8")
    }, store


@torch.no_grad()
def plain(teacher_folder, pair: Pair, data, config: BitsAndBytesConfig) -> dict[str, float]:
    """KL and top-1 agreement on gold answers, from whole logits of freshly loaded models."""
    form, kl, same, tokens = pair.teacher.form, 0.0, 0, 0
    models = [
        AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32, **settings).eval()
        for settings in ({}, {"quantization_config": config, "device_map": {"": "cpu"}})
    ]
    for row in read_rows(data / "processed/test.jsonl", SETTINGS["limit"]):
        start = form.encode(form.render(row["question"]))
        answer = form.tokenizer(row["reference"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([start + answer + [form.tokenizer.eos_token_id]])
        logits = [model(ids).logits[0, len(start) - 1 : -1].double() for model in models]
        p, q = (row.softmax(-1) for row in logits)
        kl += (p * (p / q).log()).sum().item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        tokens += len(p)
    return {"kl": kl / tokens, "top_1": same / tokens, "tokens": tokens}


CONFIGS = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_the_plain_formula(kind, measured, load, data, teacher_folder):
    found = measured[0][kind]["prefixes"]["gold"]
    expected = plain(teacher_folder, load(), data, CONFIGS[kind])
    assert found["tokens"] == expected["tokens"]
    assert found["kl_full_quantised_nats"]["value"] == pytest.approx(expected["kl"], rel=1e-3)
    assert found["overlap_at_1"]["value"] == pytest.approx(expected["top_1"], abs=0.01)


def test_fewer_bits_cost_more_and_weigh_less(measured):
    nf4, int8 = (measured[0][kind] for kind in ("nf4", "int8"))
    for name in quantisation.SETS:
        four, eight = (found["prefixes"][name]["kl_full_quantised_nats"] for found in (nf4, int8))
        assert four["value"] > eight["value"] > 0
    weights = [found["quantised"]["weights_gb"] for found in (nf4, int8)]
    assert weights[0] < weights[1] < nf4["full"]["weights_gb"]
    assert nf4["full"] == int8["full"]
    assert nf4["quantised"]["parameters"] == nf4["full"]["parameters"]


def test_benchmarks_of_both_precisions(measured, load, data, tmp_path):
    found = measured[0]["nf4"]["benchmarks"]["medqa"]
    options = Options(option_shuffles=0, **SETTINGS)
    pair = load(teacher_load_in_4bit=True)  # the full-precision model as the student
    direct = benchmarks.evaluate(pair, data, options, ItemStore(tmp_path / "store"))["medqa"]
    assert found["accuracy_full"] == direct["student"]["accuracy"]
    assert found["accuracy_quantised"] == direct["teacher"]["accuracy"]
    assert {item["subject"] for item in measured[0]["nf4"]["items"]} == {"full", "quantised"}


def test_a_comparison_by_hand():
    def rows(choices):
        return [{"choice": choice, "right": choice == 0} for choice in choices]

    found = compare(rows([0, 0, 0, 1, 1]), rows([0, 1, 1, 0, 2]), seed=0)
    assert found["accuracy_full"]["value"] == pytest.approx(3 / 5)
    assert found["accuracy_quantised"]["value"] == pytest.approx(2 / 5)
    assert found["accuracy_quantised_minus_full"]["value"] == pytest.approx(-1 / 5)
    assert (found["only_full_right"], found["only_quantised_right"]) == (2, 1)
    assert found["choices_changed"]["value"] == pytest.approx(4 / 5)
    assert found["mcnemar_p"] == pytest.approx(1)


def test_a_quantised_teacher_gets_the_same_numbers_from_the_store(measured, load, data):
    """Which of the two the run has does not matter, and what is stored loads nothing."""
    results, store = measured
    pair = load(teacher_load_in_4bit=True)
    options = Options(teacher_quantisation="nf4", **SETTINGS)
    before = store.computed
    assert quantisation.evaluate(pair, data, options, store) == results["nf4"]
    assert store.computed == before
    assert "model" not in vars(pair.teacher)


def test_the_pairs_own_teacher_is_not_loaded_again(load):
    pair = load()
    assert copies(pair, "nf4").teacher is pair.teacher
    pair = load(teacher_load_in_4bit=True)
    assert copies(pair, "nf4").student.model is pair.teacher.model
    assert copies(pair, "int8").student.quantisation == "int8"  # a third


def test_it_is_asked_for(load, data, tmp_path):
    store = ItemStore(tmp_path / "store")
    assert (
        "--teacher_quantisation" in quantisation.evaluate(load(), data, Options(), store)["skipped"]
    )
    alone = Pair(load().student, None, None)
    skipped = quantisation.evaluate(alone, data, Options(teacher_quantisation="nf4"), store)
    assert "--teacher" in skipped["skipped"]
