"""Trackers: who is told, what, under which name, and who is refused."""

import importlib
import importlib.metadata
import json
import os

import pytest
import yaml
from conftest import ROOT, launch, write_tiny_overlay
from tiny_setting import make_setting

from medistill_trl import methods, recipe, trackers
from medistill_trl.errors import UserError
from medistill_trl.pipeline import build_trainer

SFT = str(ROOT / "recipes/sft.yaml")
INSTALLED = {found.name for found in importlib.metadata.distributions()}
MISSING = [name for name in trackers.TRACKERS if name not in INSTALLED]
needs_wandb = pytest.mark.skipif("wandb" not in INSTALLED, reason="wandb is not installed")
needs_tensorboard = pytest.mark.skipif(
    "tensorboard" not in INSTALLED, reason="tensorboard is not installed"
)


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of everything the event files of a folder hold."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def in_log(log_history: list[dict], name: str) -> list[tuple]:
    """The same of a trainer's log."""
    return [(entry["step"], pytest.approx(entry[name])) for entry in log_history if name in entry]


# --- who is refused


def test_no_recipe_reports_to_anybody():
    for method in recipe.methods():
        text = (ROOT / f"recipes/{method}.yaml").read_text()
        assert yaml.safe_load(text)["report_to"] == "none"


@pytest.mark.parametrize("tracker", MISSING)
def test_a_tracker_that_is_not_installed_is_refused_with_the_package_to_install(tracker):
    with pytest.raises(recipe.RecipeError) as refused:
        recipe.load([SFT, "--report_to", tracker])
    assert f"--report_to: {tracker} is not installed: `pip install" in str(refused.value)
    assert refused.value.exit_code == 2


@pytest.mark.skipif("wandb" in INSTALLED, reason="wandb is installed")
def test_the_folder_of_an_offline_run_does_not_pass_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert list(trackers.problems("wandb"))


@pytest.mark.parametrize("wrong", ["all", "mlflow", None, ["none", "none"], [["wandb"]]])
def test_anything_else_is_no_choice(wrong):
    assert "is not a choice; none, or some of" in next(trackers.problems(wrong))


@pytest.mark.slow
@needs_wandb
def test_without_a_login_wandb_is_refused_before_weights_are_loaded(tiny_overlay, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    result = launch(
        SFT, tiny_overlay, "--report_to", "wandb", env=environment | {"HOME": str(tmp_path)}
    )
    assert result.returncode != 0
    assert "wandb refuses the run" in result.stderr
    assert "wandb login" in result.stderr
    assert "loading teacher" not in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def fresh_wandb(monkeypatch, tmp_path):
    """One that knows no login, and of the environment what a test sets: it reads that once a process."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wandb = importlib.import_module("wandb")
    yield wandb
    wandb.teardown()


def test_only_what_was_made_for_wandb_is_taken_back(tmp_path):
    """Another launch may have begun the run while it asked for a login."""
    for name in ("new", "begun"):
        (tmp_path / name / "wandb").mkdir(parents=True)
        (tmp_path / name / "wandb/debug.log").touch()
    (tmp_path / "begun/recipe.yaml").touch()
    for name in ("new", "begun"):
        trackers._take_back(tmp_path / name)
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "begun").iterdir()] == ["recipe.yaml"]


@needs_wandb
def test_where_wandb_refuses_nothing_is_left_of_a_folder_made_for_it(tmp_path, fresh_wandb):
    known = tmp_path / "known"
    known.mkdir()
    (known / "recipe.yaml").touch()
    for folder in (tmp_path / "new", known):
        with pytest.raises(UserError, match="wandb refuses the run"):
            trackers.start(["wandb"], trackers.PROJECT, folder, main_process=True)
    assert not (tmp_path / "new").exists()
    assert (known / "recipe.yaml").exists()


@needs_wandb
def test_a_folder_that_wandb_writes_into_is_kept(tmp_path, monkeypatch, fresh_wandb):
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.start(["wandb"], trackers.PROJECT, tmp_path / "new", main_process=True)
    fresh_wandb.finish()
    assert list((tmp_path / "new/wandb").glob("offline-run-*"))


# --- who is told what


@pytest.fixture(scope="module")
def reported(tmp_path_factory, teacher_folder, model_cache):
    """A run that reports to TensorBoard, and the environment's tokens."""
    folder = tmp_path_factory.mktemp("reported")
    overlay = write_tiny_overlay(folder, teacher_folder)
    flags = ("--max_steps", 2, "--report_to", "tensorboard", "--eval_on_start", "true")
    environment = os.environ | {"HF_TOKEN": "hf_planted0planted0planted0planted0"}
    result = launch(SFT, overlay, *flags, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder / "run"


@needs_tensorboard
def test_event_files_hold_the_loss_and_the_held_out_check(reported):
    log = json.loads((reported / "results/run.json").read_text())["log_history"]
    told = scalars(reported / "tensorboard")
    assert told["train/loss"] == in_log(log, "loss")
    assert [step for step, _ in told["train/loss"]] == [1, 2]
    for name in ("heldout_kl_nats", "heldout_ce_nats", "heldout_top1"):
        assert told[f"eval/{name}"] == in_log(log, name)
        assert [step for step, _ in told[f"eval/{name}"]] == [0, 2]
    before = json.loads((reported / "results/heldout_before.json").read_text())["measured"]
    assert told["eval/heldout_kl_nats"][0][1] == pytest.approx(before["kl_nats"])


@needs_tensorboard
def test_files_lie_in_the_run_directory_under_its_name_without_tokens(reported):
    assert not list((reported / "checkpoints").glob("runs*"))
    (events,) = (reported / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b'"run_name": "run"' in content  # the folder's name
    assert b'"project": "medistill_trl"' in content
    assert b"planted" not in content
    saved = recipe.load([str(reported / "recipe.yaml")]).values
    assert (
        "run_name" not in saved or saved["run_name"] is None
    )  # what the user wrote, not what is shown


@needs_tensorboard
@pytest.mark.parametrize("method", ["ppo", "spin"])
def test_methods_with_a_loop_of_their_own_tell_as_much(method, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "restored afterwards")
    changes = {"teacher": {"teacher_completions": "stored"}} if method == "spin" else {}
    setting = make_setting(
        tmp_path,
        method,
        lora=True,
        report_to="tensorboard",
        eval_strategy="steps",
        eval_steps=1,
        **changes,
    )
    trackers.start(["tensorboard"], trackers.PROJECT, tmp_path, main_process=True)
    trainer = build_trainer(methods.load(method), setting)
    trainer.train()
    told, log = scalars(tmp_path / "tensorboard"), trainer.state.log_history
    for name, tag in (("heldout_kl_nats", "eval/heldout_kl_nats"), ("loss", "train/loss")):
        assert len(told[tag]) == 2
        assert told[tag] == in_log(log, name)
