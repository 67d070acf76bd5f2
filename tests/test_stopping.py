"""Signals: a checkpoint at the step's end, the status a shell expects, no process left."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import tiny_setting
from conftest import ROOT, launch_words
from transformers import TrainerCallback

from eval.comparison.runs import find
from eval.subjects import load_run
from medistill_trl import launch, methods
from medistill_trl.checkpoints import newest_valid, problem
from medistill_trl.errors import Interrupted, UserError
from medistill_trl.hub import push
from medistill_trl.pipeline import build_trainer, train
from medistill_trl.run_directory import RunDirectory
from medistill_trl.stopping import StopRequest

SFT = "recipes/sft.yaml"
KINDS = {
    "sft": {},
    "ppo": {
        "data": {"max_prompt_tokens": 100}, "max_completion_length": 6, "num_ppo_epochs": 2,
        "num_mini_batches": 2, "kl_coef": 0.0, "per_device_train_batch_size": 1,
    },
}  # fmt: skip


class SignalAfter(TrainerCallback):
    """Sends this process a signal amid a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


def make_trainer(folder, method):
    setting = tiny_setting.make_setting(
        folder, method, max_steps=4, save_strategy="steps", save_steps=3, optim="adamw_torch", **KINDS[method]
    )  # fmt: skip
    return setting, build_trainer(methods.load(method), setting)


@pytest.mark.parametrize(
    ("method", "number", "code"),
    [
        ("sft", signal.SIGTERM, 143),
        ("sft", signal.SIGINT, 130),
        ("sft", launch.LAUNCHER_DIED, 143),
        ("ppo", signal.SIGTERM, 143),
    ],
)
def test_a_signal_saves_at_the_steps_end_and_resuming_is_as_if_it_had_never_come(
    tmp_path, method, number, code
):
    straight, trainer = make_trainer(tmp_path / "straight", method)
    train(trainer, straight.totals, None)
    setting, trainer = make_trainer(tmp_path / "stopped", method)
    trainer.add_callback(SignalAfter(2, number))
    handlers = [signal.getsignal(n) for n in launch.STOP_SIGNALS]
    with pytest.raises(Interrupted, match="after step 2 of 4, and saved") as caught:
        train(trainer, setting.totals, None)
    assert caught.value.exit_code == code
    assert [signal.getsignal(n) for n in launch.STOP_SIGNALS] == handlers
    checkpoint, passed_over = newest_valid(tmp_path / "stopped/checkpoints")
    assert (checkpoint.name, passed_over) == ("checkpoint-2", {})
    assert "optimizer.pt" in os.listdir(checkpoint)
    (checkpoint / "rng_state.pth").rename(tmp_path / "rng_state.pth")
    assert problem(checkpoint) == "rng_state.pth is missing"
    (tmp_path / "rng_state.pth").rename(checkpoint / "rng_state.pth")
    resumed, trainer = make_trainer(tmp_path / "stopped", method)
    train(trainer, resumed.totals, checkpoint)
    assert tiny_setting.weights(resumed).equal(tiny_setting.weights(straight))


def test_a_second_signal_is_the_kernels_and_the_launchers_death_is_not_one():
    with StopRequest() as request:
        os.kill(os.getpid(), launch.LAUNCHER_DIED)
        assert request.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGINT)
        assert request.number == signal.SIGINT
        assert [signal.getsignal(n) for n in launch.STOP_SIGNALS] == [signal.SIG_DFL] * 2


def start(*words, config="cpu.yaml"):
    return subprocess.Popen(
        launch_words(*words, config=config),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process, steps):
    seen = 0
    for line in process.stdout:
        seen += "'loss'" in line
        if seen >= steps:
            return
    raise AssertionError("it ended before that step")


def assert_stopped(run, process, children, code):
    output = process.stdout.read()
    process.wait(60)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []
    assert process.returncode in code, output
    assert "continue with --resume" in output
    assert not (run / "COMPLETE").exists()
    checkpoint, passed_over = newest_valid(run / "checkpoints")
    assert passed_over == {}
    # Between two scheduled ones: it is the signal's.
    assert int(checkpoint.name.split("-")[1]) % 1000 != 0
    return checkpoint


ENDLESS = ["--max_steps", 5000, "--save_steps", 1000, "--heldout_prompts", 1]


def test_sigterm_to_the_launcher_leaves_a_checkpoint_and_nothing_that_counts_as_a_run(
    tiny_overlay, tmp_path
):
    process = start(SFT, tiny_overlay, *ENDLESS)
    wait_for_step(process, 2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    run = tmp_path / "run"
    assert_stopped(run, process, children, {-signal.SIGTERM})
    for use in (
        lambda: load_run(run),
        lambda: find([run]),
        lambda: push.plan(RunDirectory(run)),
    ):
        with pytest.raises(UserError, match="allow_partial"):
            use()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "config", "code"),
    [
        (signal.SIGTERM, "cpu.yaml", {-signal.SIGTERM}),
        (signal.SIGINT, "cpu.yaml", {-signal.SIGINT, 130}),
        (signal.SIGTERM, "cpu_ddp.yaml", {-signal.SIGUSR1}),
    ],
)
def test_a_signal_to_one_training_process_stops_all(tiny_overlay, tmp_path, number, config, code):
    process = start(SFT, tiny_overlay, *ENDLESS, config=config)
    wait_for_step(process, 2)
    children = psutil.Process(process.pid).children(recursive=True)
    trainers = [child for child in children if "recipes/run.py" in child.cmdline()]
    trainers[-1].send_signal(number)
    checkpoint = assert_stopped(tmp_path / "run", process, children, code)
    if config == "cpu_ddp.yaml":
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(checkpoint))


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(tiny_overlay):
    words = [SFT, tiny_overlay, *ENDLESS, "--teacher_max_new_tokens", 50]
    process = subprocess.Popen(
        [sys.executable, "recipes/run.py", *map(str, words)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for_step(process, 1)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert process.wait(10) == -signal.SIGTERM


def test_two_launches_of_one_run_are_kept_apart(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    with (
        directory.lock(),
        pytest.raises(UserError, match="another process is at work on this run"),
    ):
        directory.lock()
    directory.lock().close()
