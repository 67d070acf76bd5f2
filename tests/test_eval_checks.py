"""What would stop a part of an evaluation is said before any part begins."""

import shutil

import pytest
from conftest import make_tokenizer
from evaluations import evaluate, own_store, refused, result_of
from transformers import GPT2Config, GPT2LMHeadModel


@pytest.fixture(scope="module")
def data(sample_build):
    return sample_build[0]


@pytest.fixture
def store(tmp_path, monkeypatch):
    return own_store(tmp_path, monkeypatch)


def test_parts_whose_files_are_not_there_are_skipped(teacher_folder, data, tmp_path, store, caplog):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/fidelitybench_med.jsonl").unlink()
    shutil.rmtree(tmp_path / "data/benchmarks")
    words = ["--model", teacher_folder, "--data", tmp_path / "data", "--out", tmp_path / "out"]
    assert evaluate(*words, "--limit", 2) == 0
    results = result_of(tmp_path / "out")["results"]
    assert "fidelitybench_med.jsonl: no such file" in results["faithfulness"]["skipped"]
    assert "faithfulness is skipped" in caplog.text
    assert results["perplexity"]["documents"] == 2


def test_a_part_that_was_asked_for_needs_its_files(capsys, teacher_folder, tmp_path):
    (tmp_path / "medppl_10k.jsonl").write_text("{}")
    words = ["--model", teacher_folder, "--data", tmp_path]
    message = refused(capsys, *words, "--tasks", "perplexity", "faithfulness")
    assert "fidelitybench_med.jsonl: no such file" in message
    assert "faithfulness reads it, --tasks names other parts" in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--verifier", "./nowhere"], "model ./nowhere: no such folder"),
        (["--window", "4096"], "--window: the student"),
        (["--answer_tokens", "512"], "--answer_tokens: must be below 512"),
        (["--generative_tokens", "600"], "--generative_tokens: must be below 512"),
    ],
)
def test_a_mistake_is_found_before_anything_is_measured(
    capsys, teacher_folder, data, tmp_path, store, words, expected
):
    place = ["--model", teacher_folder, "--data", data, "--out", tmp_path / "out", "--limit", 2]
    assert expected in refused(capsys, *place, *words)
    assert not store.exists()
    assert not (tmp_path / "out").exists()


def test_the_advice_without_the_hub_is_one_that_the_command_takes(
    capsys, teacher_folder, data, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place = ["--data", data, "--limit", 2]
    unknown = "nobody/nothing"
    message = refused(capsys, "--model", teacher_folder, *place, "--verifier", unknown)
    assert "give --verifier a folder" in message
    assert "overlay" not in message
    message = refused(capsys, "--model", unknown, *place)
    assert "package:NAME/FILE.gguf" in message
    assert "overlay" not in message


def test_a_gpt2_attends_to_as_many_tokens_as_its_config_says(data, tmp_path, store):
    """It calls them n_positions."""
    tokenizer = make_tokenizer(600, chat=False)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    words = ["--model", tmp_path / "gpt2", "--data", data, "--out", tmp_path, "--limit", 2]
    assert evaluate(*words, "--tasks", "benchmarks", "perplexity") == 0
    results = result_of(tmp_path)["results"]
    assert results["perplexity"]["window_tokens"] == 64
    assert results["benchmarks"]["pubmedqa"]["student"]["truncated_items"] == 2
