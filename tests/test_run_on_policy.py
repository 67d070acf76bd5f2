"""On-policy distillation through the real entry point: recipe, processes, quantisation, kill and resume."""

import json
import sys

import pytest
import torch
from conftest import launch, launch_words, run_command
from test_run import kill_after
from transformers import AutoModelForCausalLM

RECIPE = "recipes/on_policy.yaml"
ADAPTER = "final_model/adapter_model.safetensors"


def record(run):
    return json.loads((run / "results/run.json").read_text())


def logged(run, name):
    return [entry[name] for entry in record(run)["log_history"] if name in entry]


def run(*words):
    return run_command(sys.executable, "recipes/run.py", RECIPE, *words)


def test_two_steps_of_the_recipe(tiny_overlay, tmp_path):
    result = launch(RECIPE, tiny_overlay, "--max_steps", 2)
    assert result.returncode == 0, result.stderr[-4000:]
    out = tmp_path / "run"
    assert (out / "COMPLETE").is_file()
    for name in (
        "loss", "reward_mean", "reward_std", "kl_to_teacher_nats", "kl_to_start_nats", "entropy_nats",
        "truncation_rate", "completion_tokens_mean", "generated_tokens_per_second",
    ):  # fmt: skip
        assert len(logged(out, name)) == 2, name
    assert len(logged(out, "eval_reward_mean")) == 1
    tokens = record(out)["tokens"]
    assert tokens["generated_student"] == tokens["trained"] > 0
    assert tokens["generated_teacher"] == 0


def plain_log_probs(model, ids, first):
    return model(torch.tensor([ids])).logits[0, first - 1 : -1].log_softmax(-1)


def test_two_processes_take_one_step_on_what_both_drew(tiny_overlay, tmp_path, teacher_folder):
    """A prompt's four samples are on both processes. Kept amid its uses, the window tells what was drawn;
    advantages and step are computed from it anew."""
    flags = ["--use_lora", "false", "--optim", "sgd", "--learning_rate", 1, "--max_grad_norm", 0]
    flags += ["--lr_scheduler_type", "constant", "--gradient_accumulation_steps", 1]
    flags += ["--num_iterations", 2, "--save_steps", 1, "--max_steps", 2, "--entropy_coef", 0.1]
    result = launch(RECIPE, tiny_overlay, *flags, config="cpu_ddp.yaml")
    assert result.returncode == 0, result.stderr[-4000:]
    folder = tmp_path / "run/checkpoints/checkpoint-1"
    windows = [torch.load(folder / f"window_{n}.pt", weights_only=True)[0] for n in range(2)]
    assert not (tmp_path / "run/checkpoints/checkpoint-2/window_0.pt").exists()
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    student = AutoModelForCausalLM.from_pretrained(teacher_folder)
    student.model.layers = torch.nn.ModuleList([student.model.layers[n] for n in (0, 3)])
    for number, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = number
    student.config.num_hidden_layers = 2
    terms, returns, credited = [], [], []
    for window in windows:
        for row in range(2):
            labels = window["labels"][row]
            first = int((labels >= 0).nonzero()[0])
            ids = window["input_ids"][row][: int(window["attention_mask"][row].sum())].tolist()
            log_p = plain_log_probs(student, ids, first)
            chosen = log_p[range(len(ids) - first), ids[first:]]
            with torch.no_grad():
                wanted = plain_log_probs(teacher, ids, first)[range(len(chosen)), ids[first:]]
            rewards = wanted - chosen.detach()
            returns.append(rewards.flip(0).cumsum(0).flip(0))
            credited.append(window["values"][row][first : len(ids)])
            terms.append((chosen, -(log_p.exp() * log_p).sum(-1)))
    assert windows[0]["input_ids"].tolist() != windows[1]["input_ids"].tolist()
    loss, tokens = 0, sum(map(len, returns))
    for n, (chosen, entropy) in enumerate(terms):
        others = torch.stack(
            [torch.nn.functional.pad(r, (0, 12 - len(r)), value=torch.nan) for r in returns]
        )[[m for m in range(4) if m != n], : len(chosen)]
        advantages = returns[n] - others.nanmean(0).nan_to_num()
        torch.testing.assert_close(credited[n], advantages, rtol=1e-3, atol=1e-3)
        loss = loss - (advantages * chosen).sum() / tokens - 0.1 * entropy.sum() / tokens
    loss.backward()
    assert logged(tmp_path / "run", "loss")[0] == pytest.approx(loss.item(), rel=1e-3, abs=1e-4)
    after = AutoModelForCausalLM.from_pretrained(folder)
    for (name, before), stepped in zip(student.named_parameters(), after.parameters(), strict=True):
        expected = before.detach() - before.grad
        torch.testing.assert_close(stepped, expected, rtol=1e-3, atol=1e-4, msg=name)


def test_4bit_teacher_and_student_with_gradients_after_an_evaluation(tiny_overlay, tmp_path):
    flags = ["--max_steps", 3, "--eval_strategy", "steps", "--eval_steps", 1]
    for role in ("teacher", "student"):
        flags += [f"--{role}_load_in_4bit", "true", f"--{role}_dtype", "bfloat16"]
    flags += ["--bf16", "true", "--gradient_checkpointing", "true", "--optim", "paged_adamw_8bit"]
    result = run(tiny_overlay, *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    norms = logged(tmp_path / "run", "grad_norm")
    assert len(norms) == 3
    assert all(norm > 0 for norm in norms)


def test_killed_and_resumed_it_earns_the_same_rewards(tiny_overlay, tmp_path):
    """In two processes, with three uses of each window, so that the newest checkpoint lies amid one."""
    flags = ["--num_iterations", 3, "--max_steps", 10, "--save_steps", 2]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    result = launch(RECIPE, tiny_overlay, *flags, "--output_dir", straight, config="cpu_ddp.yaml")
    assert result.returncode == 0, result.stderr[-4000:]
    words = [RECIPE, tiny_overlay, *flags, "--output_dir", killed]
    assert kill_after(launch_words(*words, config="cpu_ddp.yaml"), 6), "it ended before step 6"
    assert not (killed / "COMPLETE").exists()
    result = launch(*words, "--resume", config="cpu_ddp.yaml")
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"resuming from {killed}/checkpoints" in result.stderr
    assert "its manifest lacks" not in result.stderr
    assert (killed / ADAPTER).read_bytes() == (straight / ADAPTER).read_bytes()
    for name in ("reward_mean", "kl_to_teacher_nats", "kl_to_start_nats"):
        assert logged(killed, name) == logged(straight, name)
    assert record(killed)["tokens"] == record(straight)["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu.yaml", "cpu_ddp.yaml"])
def test_the_embedded_pair(tmp_path, model_cache, config):
    flags = ["--per_device_train_batch_size", 2, "--num_generations", 2, "--max_steps", 2]
    flags += [
        "--teacher_max_new_tokens",
        16,
        "--heldout_prompts",
        2,
        "--output_dir",
        tmp_path / "e",
    ]
    result = launch(RECIPE, "recipes/overlays/embedded.yaml", *flags, config=config, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(logged(tmp_path / "e", "reward_mean")) == 2
    assert all(norm > 0 for norm in logged(tmp_path / "e", "grad_norm"))
