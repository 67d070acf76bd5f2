"""The benchmark of performance: its bare steps and its arithmetic, on tiny models."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT
from tiny_setting import make_form, make_setting

from benchmarks.performance import commands, document, generation, growth, startup, steps
from benchmarks.performance.__main__ import main
from benchmarks.performance.bare_steps import BARE
from benchmarks.performance.trl_losses import TRL, WHY_NOT, samples_for_grpo
from medistill_trl.recipe import methods

# What makes a repetition short.
SMALL = {
    "bond": {"num_samples": 2},
    "on_policy": {"num_generations": 2},
    "ppo": {"num_ppo_epochs": 2},
    "spin": {"max_length": None, "generation_batch_size": 8},
    "cot": {"num_rationales": 1},
}


def test_every_method_is_measured_and_compared_or_it_is_said_why_not():
    assert set(BARE) == set(methods()) == set(TRL) | set(WHY_NOT)
    assert not set(TRL) & set(WHY_NOT)


@pytest.mark.parametrize("method", methods())
def test_a_step_is_measured(method, tmp_path):
    teacher = {"teacher_completions": "stored"} if not BARE[method].samples else {}
    setting = make_setting(
        tmp_path, method, lora=True, teacher=teacher, **{"max_steps": 20, **SMALL.get(method, {})}
    )
    measured = steps.measure(setting, repetitions=2)
    names = ["step", "bare", *(["loss", "trl"] if method in TRL else [])]
    assert list(measured.seconds) == names
    assert all(len(values) == 2 and min(values) > 0 for values in measured.seconds.values())
    assert list(measured.peak_bytes) == names
    assert 0 < measured.completion_tokens < measured.tokens
    assert all(p.grad is None for p in setting.student.parameters())


# --- the arithmetic and the page


def found_steps(method: str, step: list[float], bare: list[float]) -> dict:
    measured = steps.Measured(
        method, 400, 200, {"step": step, "bare": bare}, {"step": 2 * 10**9, "bare": 10**9}
    )
    if method in TRL:
        measured.seconds |= {"loss": [1.0, 1.0], "trl": [2.0, 2.5]}
        measured.peak_bytes |= {"loss": 10**9, "trl": 4 * 10**9}
    return {"machine": "a machine", "repetitions": 2, "found": asdict(measured)}


def test_overhead_is_the_share_of_a_step_and_paired():
    """Ratios 1.25, 1.25 and 5: the machine was slow for one step and not for its bare one."""
    seconds = {"step": [5.0, 10.0, 5.0], "bare": [4.0, 8.0, 1.0]}
    assert document.overhead(seconds) == pytest.approx(0.2)


def test_the_table_says_what_holds_and_what_does_not():
    text = document.steps(
        {
            "fitnets": found_steps("fitnets", [1.1, 1.1], [1.0, 1.0]),
            "logit_kd": found_steps("logit_kd", [1.2, 1.2], [1.0, 1.0]),
        }
    )
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert "| 9.1% | holds | 2.00 | 1.00 | – | – | – |" in rows["| fitnets"]
    assert "| 16.7% | **does not hold** |" in rows["| logit_kd"]
    assert "| GKDTrainer | 0.45 (0.40–0.50) | 0.25 |" in rows["| logit_kd"]
    assert len({line.count("|") for line in rows.values()}) == 1
    assert "- fitnets: teacher forward up to its last mapped layer" in text
    assert "- fitnets: SFTTrainer has no teacher" in text
    assert "- logit_kd: GKD" not in text


def test_the_page_keeps_its_prose(tmp_path):
    prose = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    empty = document.page(tmp_path, prose)
    assert empty.count(document.MISSING) == 7
    (tmp_path / "steps_sft.json").write_text(json.dumps(found_steps("sft", [2.0, 2], [1, 1])))
    (tmp_path / "data.json").write_text(
        json.dumps(
            {
                "machine": "m",
                "repetitions": 5,
                "found": [{"rows": 5000, "read": 9000, "seconds": 3.0, "gib": 0.5}],
            }
        )
    )
    text = document.page(tmp_path, empty)
    assert "| 5,000 | 9,000 | 3 | 3,000 | 0.50 |" in text
    assert "| 50.0% | **does not hold** |" in text
    assert text.count(document.MISSING) == 5
    assert document.page(tmp_path, text) == text
    assert text.partition(document.BEGIN)[0] == prose.partition(document.BEGIN)[0]
    with pytest.raises(ValueError, match="needs the lines"):
        document.page(tmp_path, "nothing")


def test_growth_generation_and_evaluation_make_tables():
    seconds = {"step": [2.0], "bare": [1.0]}
    bond = {"samples": 4, "seconds": seconds, "peak_bytes": {"step": 10**9, "bare": 1}}
    text = document.growth(
        {
            "shapes": [{"batch": 2, "tokens": 100, "seconds": seconds, "peak_bytes": 10**9}],
            "examples": [
                {"examples": 1000, "seconds": {"stored": 2.0, "looked_up": 1, "encoded": 1}}
            ],
            "samples": [bond],
        }
    )
    assert "| 2 × 100 | 2.00 | 10.0 | 50.0% | 1.00 |" in text
    assert "| 1,000 | 2.00 (2.00) | 1.00 (1.00) | 1.00 (1.00) |" in text
    assert "| 4 | 2.00 | 1.00 | 50.0% | 1.00 |" in text
    text = document.generation(
        {
            "prompts": 2,
            "tokens": 60,
            "seconds": {"store, first time": [3.0], "generate, same batch": [2.0]},
        }
    )
    assert "| store, first time | 3.00 | 20 | 1.50 (1.50–1.50) |" in text
    cost = {"seconds": 2.0, "items_computed": 8, "peak_host_memory_gb": 1.5}
    totals = {"first": [9.0, 8.0], "again": [5.0, 4.0]}
    text = document.evaluation(
        {"limit": 8, "seconds": totals, "first": {"fidelity": cost}, "again": {"fidelity": cost}}
    )
    assert "| fidelity | 2.0 | 8 | 1.50 | 2.0 |" in text
    assert "| the whole command | 9.0 |  |  | 5.0 |" in text


def test_startup_is_judged_by_the_clock():
    command = {"command": "python -m eval.run --help", "seconds": 0.4, "processor_seconds": 0.6}
    stage = {"stage": "first optimizer step", "seconds": 21.0, "processor_seconds": 19.0}
    text = document.startup([command])
    assert "| `python -m eval.run --help` | 0.40 | 0.60 | 0.5 | holds |" in text
    text = document.first_step([stage])
    assert "| first optimizer step | 21.00 | 19.00 | 20 | **does not hold** |" in text


# --- what is measured


def test_trl_gets_the_same_tokens():
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 7, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, 7, 8, 9], [-100, 7, 9, -100, -100]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = samples_for_grpo(batch, pad_token_id=1)
    assert found["prompt_ids"].tolist() == [[5, 6], [1, 5]]
    assert found["prompt_mask"].tolist() == [[1, 1], [0, 1]]
    assert found["completion_ids"].tolist() == [[7, 8, 9], [7, 9, 1]]
    assert found["completion_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_examples_and_generation_are_timed(tmp_path):
    (counted,) = growth.examples((50,), make_form())
    assert list(counted["seconds"]) == ["stored", "looked_up", "encoded"]
    setting = make_setting(tmp_path, "sft")
    found = generation.compare(setting, repetitions=1)
    assert found["prompts"] == 8
    assert 0 < found["tokens"] <= 8 * generation.NEW_TOKENS
    plain, again = (
        found["seconds"][name][0] for name in ("generate, same batch", "store, second time")
    )
    assert again < plain


def test_growing_steps_are_timed():
    found = growth.shapes(1, tiny=True, sizes=[(1, 16), (2, 32)])
    assert [(one["batch"], one["tokens"]) for one in found] == [(1, 16), (2, 32)]
    assert all(len(one["seconds"]["step"]) == 1 for one in found)


def test_a_command_is_measured_and_must_succeed():
    clock, processor = startup.of_command([sys.executable, "-c", "sum(range(10**6))"])
    assert 0 < processor < 20
    assert clock > 0
    with pytest.raises(subprocess.CalledProcessError):
        startup.of_command([sys.executable, "-c", "raise SystemExit(3)"])


def test_evaluations_start_from_an_empty_store(tmp_path):
    (tmp_path / "cache/evaluations").mkdir(parents=True)
    (tmp_path / "cache/model").mkdir()
    own = commands.cache_of_its_own(tmp_path / "cache", tmp_path / "own")
    assert [path.name for path in own.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "no part nothing"),
        (["steps", "--repetitions", "0"], "must be from 1 to 10"),
        (["steps", "--repetitions", "11"], "must be from 1 to 10"),
    ],
)
def test_a_wrong_command_is_refused(words, said, capsys):
    assert main(words) != 0
    assert said in capsys.readouterr().err
