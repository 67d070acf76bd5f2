"""What an earlier evaluation left is kept where it stands for the same, and moved aside where not."""

import pytest
from evaluations import evaluate, own_store, refused, result_of
from sealed import read

from eval import run as command
from eval.options import ModelOptions
from medistill_trl.run_directory import EVALUATION

BENCHMARKS = ["--tasks", "benchmarks", "--limit", "3", "--benchmarks", "pubmedqa"]


@pytest.fixture(scope="module")
def data(sample_build):
    return sample_build[0]


@pytest.fixture
def store(tmp_path, monkeypatch):
    return own_store(tmp_path, monkeypatch)


def test_parts_measured_by_several_commands_stand_beside_each_other(
    teacher_folder, data, tmp_path, store
):
    words = ["--model", teacher_folder, "--data", data, "--limit", 2, "--out", tmp_path]
    assert evaluate(*words, "--tasks", "perplexity", "--window", 64) == 0
    first = result_of(tmp_path)
    assert evaluate(*words, "--tasks", "benchmarks", "--benchmarks", "medqa") == 0
    both = result_of(tmp_path)
    assert list(both["results"]) == list(both["cost"]) == ["benchmarks", "perplexity"]
    assert both["results"]["perplexity"] == first["results"]["perplexity"]
    assert (both["options"]["window"], both["options"]["benchmarks"]) == (64, ["medqa"])
    assert {"medppl_10k.jsonl", "benchmarks/medqa.jsonl"} <= set(both["data"]["sha256"])
    assert not list((tmp_path / "results").glob("earlier-*"))
    # The window bears on perplexity alone: that is replaced, the other part stays.
    assert evaluate(*words, "--tasks", "perplexity", "--window", 32) == 0
    again = result_of(tmp_path)
    assert again["results"]["benchmarks"] == both["results"]["benchmarks"]
    assert (again["options"]["window"], again["options"]["benchmarks"]) == (32, ["medqa"])
    aside = tmp_path / "results/earlier-1"
    assert read(aside / EVALUATION) == both
    assert (aside / "items/perplexity.jsonl").is_file()


def test_results_under_other_options_are_moved_aside(teacher_folder, data, tmp_path, store, caplog):
    words = ["--model", teacher_folder, "--data", data, "--out", tmp_path]
    assert evaluate(*words, *BENCHMARKS) == 0
    before = result_of(tmp_path)
    items = (tmp_path / "results/items/benchmarks.jsonl").read_bytes()
    assert evaluate(*words, "--tasks", "perplexity", "--limit", 2) == 0
    assert set(result_of(tmp_path)["results"]) == {"perplexity"}
    assert not (tmp_path / "results/items/benchmarks.jsonl").exists()
    aside = tmp_path / "results/earlier-1"
    assert read(aside / EVALUATION) == before
    assert (aside / "items/benchmarks.jsonl").read_bytes() == items
    assert f"differs in --limit; it was moved to {aside}" in caplog.text


def test_results_of_another_model_are_moved_aside(
    teacher_folder, other_teacher_folder, data, tmp_path, store, caplog
):
    words = ["--data", data, *BENCHMARKS, "--out", tmp_path]
    for model in (teacher_folder, other_teacher_folder):
        assert evaluate("--model", model, *words) == 0
    assert "differs in the models" in caplog.text
    assert (tmp_path / "results/earlier-1/items/benchmarks.jsonl").is_file()
    assert evaluate("--model", other_teacher_folder, *words, "--system_prompt", "Be brief.") == 0
    assert (tmp_path / "results/earlier-2").is_dir()


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        ({"model": "meta-llama/Llama-3.2-1B"}, "eval_meta-llama_Llama-3.2-1B"),
        ({"model": "outputs/a/final_model"}, "eval_outputs_a_final_model"),
        ({"model": "/x/b/final_model"}, "eval_x_b_final_model"),
        ({"model": "package:p/M.Q4_1.gguf"}, "eval_package_p_M.Q4_1.gguf"),
        ({"model": "m", "keep_layers": [0, 3]}, "eval_m_layers-0-3"),
        ({"model": "m", "revision": "v1/b", "load_in_4bit": True}, "eval_m_v1_b_4bit"),
        ({"model": "m", "load_in_8bit": True}, "eval_m_8bit"),
    ],
)
def test_each_model_has_a_folder_of_its_own(options, folder):
    assert str(command.default_out(ModelOptions(**options))) == f"outputs/{folder}"


def test_an_earlier_result_that_cannot_be_read_is_not_overwritten(
    teacher_folder, data, tmp_path, store, capsys
):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / EVALUATION).write_text("{")
    words = ["--model", teacher_folder, "--data", data, "--out", tmp_path, *BENCHMARKS]
    assert "give another --out" in refused(capsys, *words)
    assert (tmp_path / "results" / EVALUATION).read_text() == "{"
