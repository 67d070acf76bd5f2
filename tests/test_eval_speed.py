"""Speed, size and memory of models."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import make_model
from peft import LoraConfig, get_peft_model
from tiny_subjects import tiny_pair, write_rows
from torch import nn

from eval import speed
from eval.footprint import num_parameters, weights_bytes
from eval.item_store import ItemStore
from eval.options import Options


def test_what_is_measured(tmp_path):
    # The second is the middle one by length, and not by the alphabet.
    questions = [
        "But why?",
        "Always in the morning?",
        "Could it be that all of this is so, and why?",
    ]
    rows = [
        {"id": f"q{n}", "source": "s", "question": question, "reference": "So."}
        for n, question in enumerate(questions)
    ]
    write_rows(tmp_path / "data/processed/test.jsonl", rows)
    pair = tiny_pair()
    store = ItemStore(tmp_path / "store")
    result = speed.evaluate(pair, tmp_path / "data", Options(batch_size=3), store)
    for name, subject in {"student": pair.student, "teacher": pair.teacher}.items():
        found = result[name]
        parameters = sum(p.numel() for p in subject.model.parameters())
        assert found["parameters"] == parameters
        assert found["weights_gb"] >= 4 * parameters / 1e9
        assert found["batch_size"] == 3
        prompt = subject.form.encode(subject.form.render(rows[1]["question"]))
        assert found["prompt_tokens"] == len(prompt)
        assert found["tokens_per_second"] > 0
        assert found["peak_memory_gb"] == found["weights_gb"] + found["generation_gb"]
    ratios = result["student_to_teacher"]
    assert ratios["parameters"] < 1  # two layers instead of four
    speeds = [result[name]["tokens_per_second"] for name in ("student", "teacher")]
    assert ratios["tokens_per_second"] == speeds[0] / speeds[1]


@pytest.mark.parametrize("smaller", ["student", "teacher"])
def test_both_are_timed_with_the_batch_that_fits_both(tmp_path, smaller):
    rows = [{"id": "q", "source": "s", "question": "Why?", "reference": "So."}]
    write_rows(tmp_path / "data/processed/test.jsonl", rows)
    pair = tiny_pair()

    def refuse_more_than_four(module, args, kwargs):
        if len(kwargs["input_ids"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model = {"student": pair.student, "teacher": pair.teacher}[smaller].model
    model.register_forward_pre_hook(refuse_more_than_four, with_kwargs=True)
    found = speed.evaluate(pair, tmp_path / "data", Options(), ItemStore(tmp_path / "store"))
    assert (found["student"]["batch_size"], found["teacher"]["batch_size"]) == (4, 4)


def test_answers_have_the_length_asked_for():
    """Also where the model would end at once: its likeliest token is EOS."""
    subject = tiny_pair().student
    head = nn.Linear(64, len(subject.form.tokenizer))
    nn.init.zeros_(head.weight)
    head.bias.data[subject.form.tokenizer.eos_token_id] = 100.0
    subject.model.set_output_embeddings(head)
    lengths = []
    subject.model.register_forward_hook(lambda *_: lengths.append(1))
    speed.generate(subject, speed.encode(subject, ["Why?", "Why not?"]), 7)
    assert len(lengths) == 7


def test_memory_that_work_adds():
    numbers = 50 * 10**6
    added = speed.memory_added(lambda: torch.ones(numbers).max())
    assert added == pytest.approx(4 * numbers / 1e9, rel=0.2)


def test_bytes_of_weights():
    plain = make_model(600)
    assert weights_bytes(plain) >= 4 * num_parameters(plain)
    adapted = get_peft_model(make_model(600), LoraConfig(r=4, target_modules=["q_proj"]))
    assert num_parameters(adapted) == num_parameters(plain) + 4 * 4 * (64 + 64)
    layer = Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=False).to("cpu")
    packed, scales, codes = 64 * 64 // 2, 4 * 64, 4 * 16
    assert weights_bytes(layer) == packed + scales + codes
