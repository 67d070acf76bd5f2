"""A whole run whose teacher a server has, the server killed in the middle of it."""

import json

import planted_tokens
import pytest
from completion_server import model_answers, serving
from conftest import launch, write_tiny_overlay
from transformers import AutoModelForCausalLM, AutoTokenizer

from medistill_trl.checkpoints import newest_valid

SFT = "recipes/sft.yaml"
# Four steps an epoch. The checkpoints are those of the mishap alone.
FLAGS = ["--max_steps", 6, "--save_steps", 100, "--lora_dropout", 0.1, "--teacher_wait", 1.5]
HELD_OUT, STEP = 4, 4  # completions


def weights(run) -> bytes:
    return (run / "final_model/adapter_model.safetensors").read_bytes()


def record(run) -> dict:
    return json.loads((run / "results/run.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, teacher_folder, model_cache):
    """A run whose server dies in the first step of the second epoch, and the same resumed."""
    folder = tmp_path_factory.mktemp("served")
    overlay, served = write_tiny_overlay(folder, teacher_folder), folder / "served"
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    model = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    environment = planted_tokens.environment()
    results = []
    for resume, answers in (([], HELD_OUT + 4 * STEP + 2), (["--resume"], None)):
        with serving(model_answers(model, tokenizer), key=planted_tokens.TEACHER) as server:
            server.answers_left = answers
            # Another port the second time.
            words = ["--teacher_backend", "server", "--teacher_url", server.url, *resume]
            words += ["--completion_store", folder / "served.sqlite", "--output_dir", served]
            results.append(launch(SFT, overlay, *FLAGS, *words, env=environment))
            results[-1].url = server.url
            results[-1].checkpoints = newest_valid(served / "checkpoints")
    return served, overlay, results


def test_a_run_that_loses_its_server_waits_saves_the_last_step_and_says_how_to_go_on(runs):
    lost = runs[2][0]
    assert lost.returncode != 0, lost.stderr[-4000:]
    for part in (
        lost.url,
        "trying again, for 2 seconds",
        "it was tried for",
        "continue with --resume",
    ):
        assert part in lost.stderr
    assert "saved after step 4 of 6" in lost.stderr
    assert "Traceback" not in lost.stderr
    checkpoint, passed_over = lost.checkpoints
    assert (checkpoint.name, passed_over) == ("checkpoint-4", {})


def test_resumed_it_completes_without_the_teachers_weights_or_its_kl(runs):
    served, _, (_, resumed) = runs
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert (served / "COMPLETE").is_file()
    assert record(served)["models"]["teacher"].endswith("served as tiny")
    for when in ("before", "after"):
        assert record(served)["heldout"][when]["kl_nats"] is None
        assert "KL is not measured" in record(served)["heldout"][when]["note"]
    report = (served / "results/report.html").read_text()
    assert "KL is not measured" in report
    assert "loading teacher" not in resumed.stderr


def test_the_servers_key_is_in_nothing_a_run_writes(runs):
    served, _, results = runs
    texts = [text for result in results for text in (result.stdout, result.stderr)]
    assert planted_tokens.holders(served, *texts) == []
    assert planted_tokens.holders(served.parent) == []


@pytest.mark.slow
def test_lost_and_resumed_it_is_the_run_with_a_local_teacher_bit_for_bit(runs, tmp_path):
    served, overlay, _ = runs
    result = launch(SFT, overlay, *FLAGS, "--output_dir", tmp_path / "straight")
    assert result.returncode == 0, result.stderr[-4000:]
    assert weights(served) == weights(tmp_path / "straight")
    one, two = record(tmp_path / "straight"), record(served)
    assert two["tokens"]["trained"] == one["tokens"]["trained"]
    for when in ("before", "after"):
        assert two["heldout"][when]["ce_nats"] == pytest.approx(one["heldout"][when]["ce_nats"])
        assert two["heldout"][when]["top1"] == one["heldout"][when]["top1"]
