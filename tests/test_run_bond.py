"""BOND through the real entry point: recipe, processes, quantisation, kill and resume."""

import json
import os
import sys

import pytest
import torch
from conftest import ROOT, launch, launch_words, run_command
from safetensors.torch import load_file
from test_run import kill_after

from medistill_trl.losses.best_of_n import backward_weights, log_quantile

RECIPE = "recipes/bond.yaml"
EMBEDDED = "recipes/overlays/embedded.yaml"
ADAPTER = "adapter_model.safetensors"
JEFFREYS = ["--objective", "jeffreys", "--num_samples", 2, "--anchor_ema", 0.2]
LOGGED = (
    "loss", "reward_mean", "reward_std", "best_reward_mean", "kl_to_teacher_nats", "kl_to_start_nats",
    "entropy_nats", "truncation_rate", "completion_tokens_mean", "generated_tokens_per_second",
)  # fmt: skip
ANCHORED = ("anchor_reward_mean", "kl_to_anchor_nats", "log_quantile_nats")


def record(run):
    return json.loads((run / "results/run.json").read_text())


def logged(run, name):
    return [entry[name] for entry in record(run)["log_history"] if name in entry]


def run(*words):
    return run_command(sys.executable, "recipes/run.py", RECIPE, *words)


@pytest.mark.slow
def test_killed_and_resumed_it_earns_the_same_rewards(tiny_overlay, tmp_path):
    """With the anchor, which the newest checkpoint has to bring back bit by bit."""
    flags = [*JEFFREYS, "--max_steps", 8, "--save_steps", 2]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    result = run(tiny_overlay, *flags, "--output_dir", straight)
    assert result.returncode == 0, result.stderr[-4000:]
    assert (straight / "COMPLETE").is_file()
    for name in LOGGED + ANCHORED:
        assert len(logged(straight, name)) == 8, name
    tokens = record(straight)["tokens"]
    assert tokens["generated_student"] > tokens["trained"] > 0 == tokens["generated_teacher"]
    assert not (straight / "final_model/anchor").exists()
    words = [RECIPE, tiny_overlay, *flags, "--output_dir", killed]
    assert kill_after(launch_words(*words), 5), "it ended before step 5"
    assert not (killed / "COMPLETE").exists()
    result = launch(*words, "--resume")
    assert result.returncode == 0, result.stderr[-4000:]
    assert "resuming from" in result.stderr
    for path in (f"final_model/{ADAPTER}", f"checkpoints/checkpoint-8/anchor/{ADAPTER}"):
        assert (killed / path).read_bytes() == (straight / path).read_bytes(), path
    for name in ("reward_mean", "anchor_reward_mean", "kl_to_anchor_nats", "kl_to_start_nats"):
        assert logged(killed, name) == logged(straight, name)
    assert record(killed)["tokens"] == record(straight)["tokens"]


@pytest.fixture
def two_processes(tiny_overlay, tmp_path):
    """Three steps of `jeffreys`, the first at a learning rate of 0, with the record of each process; the one prompt of a step has four samples on
    each."""
    flags = ["--objective", "jeffreys", "--num_samples", 8, "--anchor_ema", 0.25, "--max_steps", 3]
    words = launch_words(
        RECIPE, tiny_overlay, *flags, "--anchor_kl_coef", 0.5, config="cpu_ddp.yaml"
    )
    words[words.index("recipes/run.py")] = str(ROOT / "tests/recorded_bond.py")
    result = run_command(*words, env=os.environ | {"RECORD": str(tmp_path)})
    assert result.returncode == 0, result.stderr[-4000:]
    return tmp_path / "run", [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)]


def test_a_prompts_samples_on_two_processes_are_compared_with_each_other(two_processes):
    path, both = two_processes
    assert (path / "COMPLETE").is_file()
    for name in LOGGED + ANCHORED:
        assert len(logged(path, name)) == 3, name
    assert len(logged(path, "eval_reward_mean")) == 1
    for step in range(3):
        drawn, fresh = ([one["written"][2 * step + n] for one in both] for n in range(2))
        assert [len(part) for part in drawn + fresh] == [4, 4, 1, 1]
        assert drawn[0] != drawn[1]
        assert fresh[0] != fresh[1]
        judged = torch.tensor([one["scores"][2 * step] for one in both]).flatten()
        best = int(judged.argmax())
        earned = torch.tensor([one["scores"][2 * step + 1] for one in both]).flatten()
        quantiles = log_quantile(earned, judged.expand(2, 8))
        ratios = torch.tensor([one["ratios"][step] for one in both]).flatten()
        assert bool(ratios.abs().min() > 1e-6) == (step == 2)
        weights = backward_weights(quantiles, ratios, 8, 0.5, 0.5) / 2  # half a prompt's each
        for n, one in enumerate(both):
            expected = [(fresh[n][0], pytest.approx(weights[n].item(), rel=1e-4))]
            if weights[n] == 0:
                expected = []
            if best // 4 == n:
                expected.insert(0, (drawn[n][best % 4], 0.5))
            assert [tuple(pair) for pair in one["trained"][step]] == expected
    tokens = sum(len(ids) for one in both for part in one["trained"] for ids, _ in part)
    written = sum(len(ids) for one in both for part in one["written"][:6] for ids in part)
    assert record(path)["tokens"]["trained"] == tokens
    assert record(path)["tokens"]["generated_student"] == written
    # Both hold the same anchor, which has moved.
    assert both[0]["anchor"] == both[1]["anchor"]
    assert both[0]["anchor"][0] != both[0]["anchor"][2]
    folder = path / "checkpoints/checkpoint-3"
    anchor, policy = load_file(folder / f"anchor/{ADAPTER}"), load_file(folder / ADAPTER)
    assert anchor.keys() == policy.keys()
    assert any(not torch.equal(anchor[name], policy[name]) for name in anchor)
    assert not (path / "final_model/anchor").exists()


@pytest.mark.slow
def test_4bit_teacher_and_student_with_gradients_after_an_evaluation(tiny_overlay, tmp_path):
    """The anchor is in float32 beside an adapter in bfloat16, and writes the samples."""
    flags = [*JEFFREYS, "--max_steps", 3, "--eval_strategy", "steps", "--eval_steps", 1]
    for role in ("teacher", "student"):
        flags += [f"--{role}_load_in_4bit", "true", f"--{role}_dtype", "bfloat16"]
    flags += ["--bf16", "true", "--gradient_checkpointing", "true", "--optim", "paged_adamw_8bit"]
    flags += ["--save_steps", 3]
    result = run(tiny_overlay, *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    norms = logged(tmp_path / "run", "grad_norm")
    assert len(norms) == 3
    assert all(norm > 0 for norm in norms)
    folder = tmp_path / "run/checkpoints/checkpoint-3"
    kinds = [
        {tensor.dtype for tensor in load_file(path / ADAPTER).values()}
        for path in (folder, folder / "anchor")
    ]
    assert kinds == [{torch.bfloat16}, {torch.float32}]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["best_of_n_sft", "rank_policy_gradient"])
@pytest.mark.parametrize("config", ["cpu.yaml", "cpu_ddp.yaml"])
def test_two_steps_of_the_recipe(tiny_overlay, tmp_path, objective, config):
    """On two processes eight samples of one prompt: one of them has no winner, and trains on nothing."""
    words = ["--max_steps", 2, "--objective", objective]
    words += ["--num_samples", 8] if config == "cpu_ddp.yaml" else []
    result = launch(RECIPE, tiny_overlay, *words, config=config)
    assert result.returncode == 0, result.stderr[-4000:]
    out = tmp_path / "run"
    assert (out / "COMPLETE").is_file()
    for name in LOGGED:
        assert len(logged(out, name)) == 2, name
    assert all(norm > 0 for norm in logged(out, "grad_norm"))
    tokens = record(out)["tokens"]
    assert (tokens["generated_student"] > tokens["trained"]) == (objective == "best_of_n_sft")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu.yaml", "cpu_ddp.yaml"])
@pytest.mark.parametrize("flags", [[], JEFFREYS], ids=["best_of_n_sft", "jeffreys"])
def test_the_recipe_on_the_embedded_pair(tmp_path, model_cache, flags, config):
    words = [
        *flags,
        "--max_steps",
        2,
        "--teacher_max_new_tokens",
        16,
        "--output_dir",
        tmp_path / "run",
    ]
    words += ["--completion_store", tmp_path / "completions.sqlite"]
    result = launch(RECIPE, EMBEDDED, *words, config=config, timeout=1200)
    assert result.returncode == 0, result.stderr[-4000:]
    out = tmp_path / "run"
    assert (out / "COMPLETE").is_file()
    assert len(logged(out, "reward_mean")) == 2
    assert all(norm > 0 for norm in logged(out, "grad_norm"))
