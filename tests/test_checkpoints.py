"""Only a whole checkpoint is ever resumed."""

import json
from types import SimpleNamespace

import pytest

from medistill_trl.checkpoints import MANIFEST, files_of, newest_valid, problem, write_manifest


@pytest.fixture
def checkpoints(tmp_path):
    for step in (4, 8, 12):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth"):
            (folder / name).write_bytes(f"{name} at {step}".encode() * 50)
        write_manifest(folder)
    (tmp_path / "checkpoint-tmp").mkdir()
    return tmp_path


def test_the_newest_is_chosen(checkpoints):
    assert newest_valid(checkpoints) == (checkpoints / "checkpoint-12", {})


def truncate(folder):
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(folder):
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "rng_state.pth").unlink(), "rng_state.pth is missing"),
        (lambda f: (f / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (truncate, "optimizer.pt has changed"),
        (flip_a_bit, "adapter_model.safetensors has changed"),
        (lambda f: (f / MANIFEST).unlink(), "never finished"),
        (lambda f: (f / MANIFEST).write_text('{"a": '), "manifest cannot be read"),
        (lambda f: (f / MANIFEST).write_text('{"a": 1}'), "manifest cannot be read"),
        (lambda f: (f / MANIFEST).write_text("[]"), "manifest cannot be read"),
        (lambda f: (f / "more.bin").write_bytes(b"x"), "more.bin was put there after it was saved"),
    ],
)
def test_a_damaged_one_is_passed_over_and_named(checkpoints, damage, reason):
    damage(checkpoints / "checkpoint-12")
    chosen, passed_over = newest_valid(checkpoints)
    assert chosen == checkpoints / "checkpoint-8"
    assert list(passed_over) == [checkpoints / "checkpoint-12"]
    assert reason in passed_over[checkpoints / "checkpoint-12"]


def test_saving_the_same_step_again_replaces_the_manifest(checkpoints):
    folder = checkpoints / "checkpoint-12"
    truncate(folder)
    assert problem(folder)
    write_manifest(folder)
    assert problem(folder) is None


INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def split(folder, index):
    for name in SHARDS:
        (folder / name).write_bytes(name.encode())
    (folder / INDEX).write_text(index)


@pytest.mark.parametrize("lacking", [None, INDEX, *SHARDS])
def test_split_weights_are_whole_or_not_taken(checkpoints, lacking):
    folder = checkpoints / "checkpoint-12"
    split(folder, json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}))
    if lacking is not None:
        (folder / lacking).unlink()
    write_manifest(folder)
    found = problem(folder, lambda step: {"model*.safetensors"})
    assert found == (lacking and f"its manifest lacks {lacking}, which the run goes on from")


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_named(checkpoints, index):
    folder = checkpoints / "checkpoint-12"
    split(folder, index)
    write_manifest(folder)
    assert problem(folder, lambda step: set()) == f"its {INDEX} cannot be read"


@pytest.mark.parametrize(
    ("config", "kept_apart"),
    [({}, True), ({"optimizer": {"type": "Adam"}}, False), ({"scheduler": {}}, False)],
)
def test_a_deepspeed_config_may_keep_the_schedule_to_itself(config, kept_apart):
    """DeepSpeed is not installed in these tests: what is read of a trainer that uses it."""
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    trainer = SimpleNamespace(
        args=SimpleNamespace(world_size=2), model=None, is_fsdp_enabled=False, is_deepspeed_enabled=True,
        accelerator=SimpleNamespace(state=state),
    )  # fmt: skip
    assert ("scheduler.pt" in files_of(trainer, 4)) == kept_apart


def test_no_checkpoint_at_all(tmp_path):
    assert newest_valid(tmp_path) == (None, {})
