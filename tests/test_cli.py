"""The `medistill` command as a user types it."""

import configparser
import importlib.util
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, run_command, write_tiny_overlay
from fake_hub import TOKEN, FakeHub

from medistill_trl import cli, recipe_help
from medistill_trl.recipe import methods

COMMANDS = ("prepare", "train", "plan", "evaluate", "compare", "study", "push")
MEDISTILL = (sys.executable, "-m", "medistill_trl.cli")
SFT = "recipes/sft.yaml"


def medistill(*words, **kwargs):
    return run_command(*MEDISTILL, *words, **kwargs)


# --- help


def test_the_console_command_is_this_one():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    name, _, target = config["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert (name, module) == ("medistill", cli.__name__)
    assert getattr(cli, function) is cli.main


def test_help_lists_the_commands_within_a_second_and_without_torch():
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        result = medistill("--help")
        seconds.append(time.monotonic() - started)
    assert result.returncode == 0
    for command in COMMANDS:
        assert f" {command} " in result.stdout
    assert min(seconds) < 1, seconds
    code = "import sys, medistill_trl.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert run_command(sys.executable, "-c", code).returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate"], ["medistill evaluate outputs/sft_first", "--teacher_quantisation"]),
        (["study"], ["medistill study recipes/studies/ten_methods.yaml", "--commands"]),
        (["train"], ["--teacher_temperature", "required", "adakd", "--config_file"]),
        (["plan", "recipes/bond.yaml"], ["--jeffreys_beta", "--lora_r"]),
        (["push"], ["--repo_id", "--public", "--dry_run", "--revision", "--allow_partial"]),
    ],
)
def test_a_commands_help_is_enough_to_work_from(words, said):
    result = medistill(*words, "--help", env={**os.environ, "COLUMNS": "200"})
    assert result.returncode == 0, result.stderr
    for text in said:
        assert text in result.stdout, text


def test_the_tables_of_keys_show_defaults_as_a_recipe_spells_them(capsys):
    from rich.console import Console

    for table in recipe_help.tables("logit_kd"):
        Console(width=200).print(table)
    shown = capsys.readouterr().out
    for key, default in (
        ("--teacher_temperature", "0.0"),
        ("--teacher_top_k", "0"),
        ("--use_lora", "true"),
        ("--student_revision", "null"),
        ("--train_file", "required"),
        ("--divergence", "forward_kl"),
    ):
        assert any(line.split()[:2] == [key, default] for line in shown.splitlines()), key


@pytest.mark.parametrize("name", methods())
def test_every_method_has_a_table_of_keys(name):
    assert recipe_help.tables(name)


def test_the_shell_completes_commands_and_configs():
    def complete(*words):
        asked = {
            "_MEDISTILL_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(words),
            "COMP_CWORD": str(len(words) - 1),
        }
        return medistill(env={**os.environ, **asked}).stdout.split()

    assert complete("medistill", "p") == ["prepare", "plan", "push"]
    assert "rtx5090_qlora" in complete("medistill", "train", "--config_file", "rtx")


# --- handing on


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("prepare --out data --sample", "python -m data_prep.build --out data --sample"),
        ("evaluate outputs/x --limit 4", "python -m eval.run outputs/x --limit 4"),
        ("compare a b --baseline sft", "python -m eval.compare a b --baseline sft"),
        (
            "study x.yaml --set seeds=[1] --jobs 2",
            "python -m medistill_trl.study x.yaml --set seeds=[1] --jobs 2",
        ),
        (
            f"train {SFT} --config_file cpu --max_steps -1",
            f"accelerate launch --config_file accelerate_configs/cpu.yaml recipes/run.py {SFT} --max_steps -1",
        ),
        (
            f"train {SFT} --config_file accelerate_configs/cpu.yaml",
            f"accelerate launch --config_file accelerate_configs/cpu.yaml recipes/run.py {SFT}",
        ),
        (
            f"plan {SFT} --lora_r 4 --vram 32 --config_file cpu",
            f"python -m medistill_trl.memory {SFT} --lora_r 4 --vram 32 --config_file accelerate_configs/cpu.yaml",
        ),
    ],
)
def test_words_are_handed_on_as_they_are(words, command, monkeypatch):
    became = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "execv", lambda program, words: became.append((str(program), words)))
    cli.app(words.split(), standalone_mode=False)
    [(program, given)] = became
    assert os.path.basename(program).startswith(command.split()[0])
    assert os.access(program, os.X_OK)
    assert given == [program, *command.split()[1:]]


@pytest.mark.parametrize(
    "module", ["data_prep.build", "eval.run", "eval.compare", "medistill_trl.study"]
)
def test_the_modules_that_commands_become_exist(module):
    if module == "eval.compare" and not (ROOT / "eval/compare.py").exists():
        pytest.skip("eval.compare is not here yet")
    assert importlib.util.find_spec(module) is not None


def test_a_wrong_recipe_is_refused_before_anything_is_launched():
    result = medistill("train", SFT, "--learning_rte", "1")
    assert result.returncode == 2
    assert "did you mean learning_rate?" in result.stderr
    assert "accelerate" not in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_config_is_refused_with_those_there_are():
    result = medistill("train", SFT, "--config_file", "gpu")
    assert result.returncode == 2
    assert "not one of cpu, cpu_ddp, fsdp2, multi_gpu, rtx5090_qlora, zero2, zero3" in result.stderr


def test_from_another_folder_the_repository_is_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli._in_repository("recipes/run.py") == str(ROOT / "recipes/run.py")
    assert cli._config_path("cpu") == str(ROOT / "accelerate_configs/cpu.yaml")


def test_the_exit_status_and_the_message_are_the_commands():
    result = medistill("evaluate", "outputs/nowhere", "--model", "x")
    assert result.returncode == 2
    assert "name either a run directory or a --model" in result.stderr
    assert medistill("study", "nowhere.yaml").returncode == 2


# --- a run, from its plan to the hub


@pytest.fixture(scope="module")
def trained(tmp_path_factory, teacher_folder, model_cache):
    folder = tmp_path_factory.mktemp("cli")
    overlay = write_tiny_overlay(folder, teacher_folder)
    result = medistill("train", SFT, overlay, "--config_file", "cpu", "--max_steps", 2)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder / "run", result


def test_train_trains(trained):
    run, result = trained
    assert (run / "COMPLETE").is_file()
    assert result.stderr.startswith("accelerate launch --config_file accelerate_configs/cpu.yaml")


@pytest.mark.slow  # it hands the same words on as train, and a dry run has tests of its own
def test_plan_shows_the_plan_and_writes_nothing(tiny_overlay, tmp_path):
    result = medistill("plan", SFT, tiny_overlay, "--config_file", "cpu")
    assert result.returncode == 0, result.stderr[-4000:]
    assert "# memory plan" in result.stdout
    assert not (tmp_path / "run").exists()


def test_push_shows_and_pushes_what_training_left(trained):
    run, _ = trained
    with FakeHub().running() as hub:
        there = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
        }
        words = ("push", run, "--repo_id", "me/tiny")
        env = {**os.environ, **there}
        shown = medistill(*words, "--dry_run", env={**env, "COLUMNS": "150"})
        assert shown.returncode == 0, shown.stderr
        for said in ("adapter_model.safetensors", "checkpoints/", "private; nothing was sent"):
            assert said in shown.stdout
        assert "not as training wrote it" not in shown.stdout
        assert hub.asked == []
        pushed = medistill(*words, env=env)
        assert pushed.returncode == 0, pushed.stderr
        assert f"{hub.endpoint}/me/tiny/tree/" in pushed.stdout
        repository = hub.repositories["me/tiny"]
    names = repository.files().keys() - {".gitattributes"}
    assert names == {path.name for path in (run / "final_model").iterdir()}
    assert repository.private
    assert TOKEN not in shown.stdout + shown.stderr + pushed.stdout + pushed.stderr


def test_push_tells_a_users_error_in_a_line(tmp_path):
    result = medistill("push", tmp_path, "--repo_id", "me/x", "--dry_run")
    assert result.returncode == 2
    assert "no run is here" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_interrupt_stops_what_the_command_has_started(tiny_overlay):
    words = [
        *MEDISTILL,
        "train",
        SFT,
        str(tiny_overlay),
        "--config_file",
        "cpu",
        "--max_steps",
        "5000",
    ]
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        children = wait_for_children(psutil.Process(process.pid))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=240) != 0
        _, alive = psutil.wait_procs(children, timeout=120)
        assert alive == []
    finally:
        process.kill()


def wait_for_children(parent: psutil.Process) -> list[psutil.Process]:
    """The training processes, once they have tied themselves to their launcher: before they load torch."""
    for _ in range(600):
        found = [c for c in parent.children(recursive=True) if "recipes/run.py" in c.cmdline()]
        if found and any("libtorch" in used.path for used in found[0].memory_maps()):
            return found
        time.sleep(0.1)
    raise AssertionError("no training process came up")
