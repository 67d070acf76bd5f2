"""What each method goes on from lies in its checkpoints: with any file of one missing, cut or left out of the manifest, an
earlier one is taken."""

import json
import re
from fnmatch import fnmatch
from functools import partial

import crafted_rationales
import ppo_runs
import pytest
import spin_runs
import tiny_setting

from medistill_trl import methods, recipe
from medistill_trl.checkpoints import ASIDE, MANIFEST, choose, newest_valid, write_manifest
from medistill_trl.pipeline import build_trainer, find_checkpoint, train
from medistill_trl.run_directory import RunDirectory

SAVING = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
WRITING = {"data": {"max_prompt_tokens": 100}, "max_completion_length": 6}
JEFFREYS = {"objective": "jeffreys", "num_samples": 4, "gradient_accumulation_steps": 4, **WRITING}
WINDOW = {"num_generations": 2, "num_iterations": 2, **WRITING}

EVERY = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "totals.json"}
FULL = {"model.safetensors"}
ADAPTER = {"adapter_model.safetensors", "adapter_config.json"}
# Settings that make a method keep all it can, and which files of its third step it cannot go on without.
KINDS = {
    "sft": ({}, FULL),
    "logit_kd": ({"lora": True}, ADAPTER),
    "adakd": ({"temperature_rule": "difficulty"}, FULL | {"token_focus.json"}),
    "cot": ({}, FULL),
    "fitnets": ({"feature_loss": "mse"}, FULL | {"projections.safetensors"}),
    "attention": ({"lora": True}, ADAPTER),
    "on_policy": (WINDOW, FULL | {"window_0.pt"}),
    "ppo": ({"lora": True}, ADAPTER | {"value_head.pt", "rollout_0.pt"}),
    "bond": (JEFFREYS | {"lora": True}, ADAPTER | {"anchor/adapter_model.safetensors"}),
    "spin": ({}, ADAPTER | {"rounds.json", "ref/adapter_model.safetensors"}),
    "spin, all weights": ({"lora": False}, FULL | {"rounds.json", "reference.safetensors"}),
}
MAKERS = {
    "cot": crafted_rationales.make_setting,
    "ppo": ppo_runs.make_setting,
    "spin": spin_runs.make_setting,
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """The checkpoints after the second and the third step, and the files that must be in the latter."""
    changes, own = KINDS[request.param]
    method = request.param.split(",")[0]
    folder = tmp_path_factory.mktemp(method)
    make = MAKERS.get(method) or partial(tiny_setting.make_setting, method=method)
    setting = make(folder, **SAVING | changes)
    trainer = build_trainer(methods.load(method), setting)
    train(trainer, setting.totals, None)
    find = partial(find_checkpoint, RunDirectory(folder), methods.load(method), trainer)
    return folder / "checkpoints", EVERY | own, find


def test_every_method_is_here():
    assert {name.split(",")[0] for name in KINDS} == set(recipe.methods())


def test_a_checkpoint_holds_what_the_method_goes_on_from(saved):
    checkpoints, needed, find = saved
    assert newest_valid(checkpoints) == (checkpoints / "checkpoint-3", {})
    assert find() == checkpoints / "checkpoint-3"
    held = json.loads((checkpoints / "checkpoint-3" / MANIFEST).read_text())
    assert needed <= held.keys()


def cut(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("damage", "said"),
    [(None, "is missing"), (cut, "has changed since it was saved")],
    ids=["missing", "cut"],
)
def test_without_any_one_of_its_files_it_is_named_and_set_aside(saved, damage, said):
    checkpoints, *_ = saved
    newest = checkpoints / "checkpoint-3"
    for name in json.loads((newest / MANIFEST).read_text()):
        path = newest / name
        whole = path.read_bytes()
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage(whole))
        chosen, lines = choose(checkpoints)
        assert chosen == checkpoints / "checkpoint-2", name
        assert len(lines) == 1
        assert f"{newest}: not used: {name} {said}; kept as {checkpoints / ASIDE}" in lines[0]
        assert not newest.exists()
        (checkpoints / ASIDE / newest.name).rename(newest)
        path.write_bytes(whole)
    assert choose(checkpoints) == (newest, [])


def test_a_manifest_that_leaves_one_of_them_out_is_not_believed(saved, tmp_path, caplog):
    checkpoints, needed, find = saved
    newest = checkpoints / "checkpoint-3"
    for name in sorted(needed):
        caplog.clear()
        (newest / name).rename(tmp_path / "taken")
        write_manifest(newest)
        assert newest_valid(checkpoints) == (newest, {})  # as it stands there
        assert find() == checkpoints / "checkpoint-2", name
        lacking = re.search(
            rf"{newest}: not used: its manifest lacks (\S+), which the run goes on from; kept as "
            f"{checkpoints / ASIDE}", caplog.text
        )[1]  # fmt: skip
        assert fnmatch(name, lacking)
        (checkpoints / ASIDE / newest.name).rename(newest)
        (tmp_path / "taken").rename(newest / name)
    write_manifest(newest)
    assert find() == newest
