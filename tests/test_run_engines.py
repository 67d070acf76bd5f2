"""Real runs on DeepSpeed with two processes of the CPU: the same steps as without it, and the same after a kill.

These tests need DeepSpeed: `DS_BUILD_OPS=0 pip install -e .[deepspeed]`.
"""

import importlib.util
import json
import os
import pickle
import shutil
import sys

import pytest
from conftest import launch, launch_words, run_command, write_tiny_overlay
from safetensors.torch import load_file

from medistill_trl.checkpoints import write_manifest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
ADAPTER = "final_model/adapter_model.safetensors"
CPU = {"env": os.environ | {"DS_ACCELERATOR": "cpu"}}
SHORT = [
    "--heldout_prompts",
    3,
    "--lora_dropout",
    0,
]  # an odd number: one process has less to measure
# Unlike Adam it does not hide a loss that is off by a factor.
PLAIN = ["--optim", "sgd", "--max_grad_norm", 0, "--max_steps", 2]


def record(run):
    return json.loads((run / "results/run.json").read_text())


def logged(run, name):
    return [entry[name] for entry in record(run)["log_history"] if name in entry]


def assert_same_steps(run, expected):
    """Losses, gradients and held-out numbers to 1e-5."""
    for name in ("loss", "grad_norm"):
        assert logged(run, name) == pytest.approx(logged(expected, name), rel=1e-5), name
    for name in ("kl_nats", "ce_nats"):
        here, there = (record(folder)["heldout"]["after"][name] for folder in (run, expected))
        assert here == pytest.approx(there, rel=1e-5), name


# --- ZeRO-2, to the end, killed, and from a forged checkpoint ---------------------------------------

# Adam keeps states; a large epsilon keeps it from making noise of rounding large.
ADAM = ["--adam_epsilon", 1e-3, "--max_steps", 4, "--save_steps", 2]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, teacher_folder, model_cache):
    """A run of four steps on ZeRO-2, its checkpoint in the middle kept."""
    folder = tmp_path_factory.mktemp("zero2")
    words = ["recipes/sft.yaml", write_tiny_overlay(folder, teacher_folder), *SHORT, *ADAM]
    result = launch(*words, config="zero2.yaml", **CPU)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder / "run", words


def as_killed(run, folder):
    """A copy as it was after the second step."""
    shutil.copytree(run, folder)
    for name in ("checkpoints/checkpoint-4", "final_model"):
        shutil.rmtree(folder / name)
    (folder / "COMPLETE").unlink()
    return folder


def test_zero2_takes_the_steps_of_one_process(straight, tmp_path):
    run, words = straight
    assert record(run)["num_processes"] == 2
    rows = ["--per_device_train_batch_size", 4, "--output_dir", tmp_path / "one"]
    result = run_command(sys.executable, "recipes/run.py", *words, *rows)
    assert result.returncode == 0, result.stderr[-4000:]
    assert_same_steps(run, tmp_path / "one")


def test_zero2_goes_on_after_a_kill_bit_for_bit(straight, tmp_path):
    run, words = straight
    held = json.loads((run / "checkpoints/checkpoint-2/manifest.json").read_text())
    assert sum(name.startswith("global_step2/") for name in held) == 3  # a model and two optimizers
    killed = as_killed(run, tmp_path / "killed")
    result = launch(*words, "--output_dir", killed, "--resume", config="zero2.yaml", **CPU)
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"resuming from {killed}/checkpoints/checkpoint-2" in result.stderr
    assert (killed / ADAPTER).read_bytes() == (run / ADAPTER).read_bytes()
    assert logged(killed, "loss") == logged(run, "loss")


class Bomb:
    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, "w")


@pytest.mark.slow
def test_a_forged_deepspeed_checkpoint_runs_no_code(straight, tmp_path):
    run, words = straight
    killed = as_killed(run, tmp_path / "killed")
    checkpoint = killed / "checkpoints/checkpoint-2"
    forged = checkpoint / "global_step2/mp_rank_00_model_states.pt"
    forged.write_bytes(pickle.dumps(Bomb(tmp_path / "trace"), protocol=2))
    write_manifest(checkpoint)
    result = launch(*words, "--output_dir", killed, "--resume", config="zero2.yaml", **CPU)
    assert result.returncode != 0
    assert "nothing of it was run" in result.stderr
    assert not (tmp_path / "trace").exists()


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_is_finished(straight, tmp_path):
    run, words = straight
    killed = tmp_path / "killed"
    shutil.copytree(run, killed)
    shutil.rmtree(killed / "final_model")
    (killed / "COMPLETE").unlink()
    result = launch(*words, "--output_dir", killed, "--resume", config="zero2.yaml", **CPU)
    assert result.returncode == 0, result.stderr[-4000:]
    assert (killed / ADAPTER).read_bytes() == (run / ADAPTER).read_bytes()


@pytest.mark.slow
def test_nan_is_no_step(straight, tmp_path):
    recipe_and_overlay = straight[1][:2]
    # The first step warms up at rate 0, the second ruins the weights, the third sees it; a held-out check in between
    # would see it before.
    flags = [*SHORT, "--optim", "sgd", "--max_steps", 4, "--learning_rate", 1e38]
    flags += ["--eval_strategy", "no", "--output_dir", tmp_path / "nan"]
    result = launch(*recipe_and_overlay, *flags, config="zero2.yaml", **CPU)
    assert result.returncode != 0
    assert "The optimizer step was not taken" in result.stderr
    assert (tmp_path / "nan/results/nonfinite_0.json").is_file()


# --- every method ----------------------------------------------------------------------------------

RATIONALES = ["--rationale_max_new_tokens", 24, "--num_rationales", 2, "--rationale_weight", 0.5]
FLAGS = {
    "sft": [],
    "logit_kd": ["--lmbda", 0],
    "adakd": ["--lmbda", 0],
    "cot": [*RATIONALES, "--on_no_rationale", "fallback"],
    "fitnets": [],
    "attention": [],
    "on_policy": [],
    "ppo": [],
    "bond": [],
}
ZERO3 = ["sft", "logit_kd", "adakd", "cot", "on_policy", "bond"]
SHARDED = ["sft", "logit_kd", "adakd", "on_policy", "bond"]
# Without a lower bound every weight of a tiny model would stay whole.
ALL_SHARED = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def train_all(folder, overlay, methods, config, extra=(), rate=1, own=FLAGS):
    """The methods' runs, in one launch: the folder that holds one for each."""
    flags = [*SHORT, *PLAIN, "--save_strategy", "no", "--eval_strategy", "no", *extra]
    flags += ["--learning_rate", rate]
    runs = [
        [f"recipes/{method}.yaml", overlay, *flags, *own[method], "--output_dir", folder / method]
        for method in methods
    ]
    folder.mkdir()
    (folder / "runs.json").write_text(json.dumps([[str(word) for word in run] for run in runs]))
    words = launch_words(config=config)[:-1]
    result = run_command(*words, "tests/engine_runs.py", folder / "runs.json", timeout=1800, **CPU)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def overlay(tmp_path_factory, teacher_folder, model_cache):
    return write_tiny_overlay(tmp_path_factory.mktemp("overlay"), teacher_folder)


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    """A config that shares out every weight."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "zero3.json").write_text(json.dumps(ALL_SHARED))
    (folder / "zero3.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\nnum_processes: 2\n"
        f"deepspeed_config:\n  deepspeed_config_file: {folder}/zero3.json\n  zero3_init_flag: false\n"
    )
    return folder / "zero3.yaml"


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, overlay):
    """Every method without DeepSpeed; that two processes take the steps of one is tested with each method."""
    return train_all(tmp_path_factory.mktemp("ddp") / "runs", overlay, FLAGS, "cpu_ddp.yaml")


@pytest.mark.slow
def test_every_method_on_zero2(ddp, overlay, tmp_path):
    runs = train_all(tmp_path / "runs", overlay, FLAGS, "zero2.yaml")
    for method in FLAGS:
        assert_same_steps(runs / method, ddp / method)


@pytest.mark.slow
def test_all_weights_on_zero2_are_saved_without_what_serves_training_alone(overlay, tmp_path):
    methods, full = ["logit_kd", "fitnets", "ppo"], ["--use_lora", "false"]
    own = FLAGS | {"ppo": ["--kl_coef", 0]}  # without an adapter there is no start policy
    one, two = (
        train_all(tmp_path / config, overlay, methods, config, full, rate=0.1, own=own)
        for config in ("cpu_ddp.yaml", "zero2.yaml")
    )
    for method in methods:
        assert_same_steps(two / method, one / method)
        names = [
            load_file(run / method / "final_model/model.safetensors").keys() for run in (one, two)
        ]
        assert names[0] == names[1]


@pytest.mark.slow
def test_the_methods_that_can_on_zero3(ddp, overlay, zero3, tmp_path):
    runs = train_all(tmp_path / "runs", overlay, ZERO3, zero3)
    for method in ZERO3:
        assert_same_steps(runs / method, ddp / method)


@pytest.mark.slow
def test_a_teacher_that_is_shared_out_teaches_the_same(ddp, overlay, zero3, tmp_path):
    runs = train_all(tmp_path / "runs", overlay, SHARDED, zero3, ["--teacher_sharding", "sharded"])
    for method in SHARDED:
        assert_same_steps(runs / method, ddp / method)
