"""Logit-KD from a served teacher through the real entry point: the server lost while its logits are fetched."""

import json

import planted_tokens
import pytest
from completion_server import model_answers, serving
from conftest import launch, write_tiny_overlay
from transformers import AutoModelForCausalLM, AutoTokenizer

LOGIT_KD = "recipes/logit_kd.yaml"
ADAPTER = "final_model/adapter_model.safetensors"
K, DRAWN = 16, 8 + 4  # to train on, held out
FLAGS = [
    "--teacher_completions", "stored", "--teacher_logits", "stored", "--teacher_logits_top_k", K,
    "--kd_temperature", 1, "--max_steps", 3, "--max_train_samples", 8, "--lora_dropout", 0.1,
]  # fmt: skip


def record(run) -> dict:
    return json.loads((run / "results/run.json").read_text())


def logged(run, name) -> list[float]:
    return [entry[name] for entry in record(run)["log_history"] if name in entry]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, teacher_folder, model_cache):
    """A run whose server dies while it is asked for log-probabilities, and the same once more."""
    folder = tmp_path_factory.mktemp("served-logits")
    overlay, served = write_tiny_overlay(folder, teacher_folder), folder / "served"
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    model = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    environment = planted_tokens.environment()
    words = ["--teacher_backend", "server", "--teacher_name", "tiny", "--teacher_wait", 0.5]
    words += ["--completion_store", folder / "served.sqlite"]
    # One at a time: else an answer on its way when the server dies may or may not arrive.
    words += ["--teacher_requests_in_flight", 1]
    results = []
    # Before the completions it is asked whether it gives as many log-probabilities.
    for answers, resume in ((1 + DRAWN + 5, []), (None, ["--resume"])):
        with serving(
            model_answers(model, tokenizer, max_logprobs=K), key=planted_tokens.TEACHER
        ) as server:
            server.answers_left = answers
            flags = [*FLAGS, *words, "--teacher_url", server.url, "--output_dir", served, *resume]
            results.append(launch(LOGIT_KD, overlay, *flags, env=environment))
            results[-1].asked = server.asked
    return served, overlay, words, results


def test_a_run_that_loses_its_server_says_so_and_the_next_asks_only_for_the_rest(runs):
    lost, again = runs[3]
    assert lost.returncode != 0, lost.stderr[-4000:]
    assert "it was tried for" in lost.stderr
    assert "continue with --resume" in lost.stderr
    assert "Traceback" not in lost.stderr
    assert again.returncode == 0, again.stderr[-4000:]
    asked = [[body for body in one.asked if "prompt_logprobs" in body] for one in (lost, again)]
    assert {body["prompt_logprobs"] for body in asked[0] + asked[1]} == {K}
    prompts = [[tuple(body["prompt"]) for body in bodies[1:]] for bodies in asked]
    assert [len(one) for one in prompts] == [5, DRAWN - 5]
    assert not set(prompts[0]) & set(prompts[1])
    assert len(again.asked) == 1 + DRAWN - 5  # no completion is drawn again


def test_it_trains_without_the_teachers_weights_and_says_what_is_not_measured(runs):
    served, _, _, (_, again) = runs
    assert "loading teacher" not in again.stderr
    assert (served / "COMPLETE").is_file()
    assert record(served)["models"]["teacher"].endswith("served as tiny")
    for when in ("before", "after"):
        assert record(served)["heldout"][when]["kl_nats"] is None
        assert "KL is not measured" in record(served)["heldout"][when]["note"]
    assert len(logged(served, "kl_nats")) == len(logged(served, "teacher_tail_mass")) >= 3
    assert planted_tokens.holders(served.parent) == []


@pytest.mark.slow
def test_it_trains_as_from_the_local_teachers_store_and_once_stored_without_a_server(
    runs, tmp_path
):
    served, overlay, words, _ = runs
    result = launch(LOGIT_KD, overlay, *FLAGS, "--output_dir", tmp_path / "local")
    assert result.returncode == 0, result.stderr[-4000:]
    for name in ("loss", "kl_nats", "ce_nats", "teacher_tail_mass"):
        assert logged(served, name) == pytest.approx(logged(tmp_path / "local", name), rel=1e-4), (
            name
        )
    nobody = ["--teacher_url", "http://127.0.0.1:9", "--output_dir", tmp_path / "nobody"]
    result = launch(LOGIT_KD, overlay, *FLAGS, *words, *nobody, env=planted_tokens.environment())
    assert result.returncode == 0, result.stderr[-4000:]
    assert "cannot be reached" in result.stderr
    assert (tmp_path / "nobody" / ADAPTER).read_bytes() == (served / ADAPTER).read_bytes()
