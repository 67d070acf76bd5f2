"""`python -m eval.run`, as a user types it: on a trained run and on models by name."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, launch, run_command, save_pair, write_tiny_overlay
from evaluations import evaluate, own_store, refused, result_of
from sealed import read

from eval import compare
from eval import run as command
from eval.comparison.measures import FAMILIES
from eval.comparison.result import build
from eval.comparison.runs import find
from eval.made import is_made
from eval.options import ModelOptions
from eval.subjects import load_models, load_run
from medistill_trl.errors import UserError
from medistill_trl.run_directory import EVALUATION
from medistill_trl.sealed_json import write_record

BENCHMARKS = ["--tasks", "benchmarks", "--limit", "3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, teacher_folder, model_cache):
    """One finished run of the tiny pair, looked at by several tests."""
    folder = tmp_path_factory.mktemp("trained")
    overlay = write_tiny_overlay(folder, teacher_folder)
    result = launch("recipes/sft.yaml", overlay, "--max_steps", 2)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder / "run"


@pytest.fixture(scope="module")
def data(sample_build):
    return sample_build[0]


@pytest.fixture
def store(tmp_path, monkeypatch):
    return own_store(tmp_path, monkeypatch)


def without_cost(content):
    """What two evaluations of the same have in common: not what time they took."""
    results = {name: part for name, part in content["results"].items() if name != "speed"}
    return {key: value for key, value in content.items() if key != "cost"} | {"results": results}


# --- a run -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(trained, data):
    assert evaluate(trained, "--data", data, *BENCHMARKS) == 0
    return result_of(trained)


def test_the_result_says_what_was_evaluated(evaluated, trained, data):
    assert evaluated["schema_version"] == command.SCHEMA_VERSION == 2
    assert evaluated["run"] == str(trained)
    recipe = evaluated["recipe"]
    assert recipe["method"] == "sft"
    teacher, student = (evaluated["subjects"][name] for name in ("teacher", "student"))
    inputs = json.loads((trained / "inputs.json").read_text())
    assert teacher["fingerprint"] == inputs["teacher"]
    assert student["fingerprint"].startswith(inputs["student"] + " float32 adapter sha256:")
    assert evaluated["options"]["limit"] == 3
    assert len(evaluated["data"]["sha256"]["benchmarks/medqa.jsonl"]) == 64
    for key in ("versions", "git_commit", "device", "num_threads"):
        assert key in evaluated
    cost = evaluated["cost"]["benchmarks"]
    assert cost["seconds"] > 0
    assert 0.1 < cost["peak_host_memory_gb"] < 8
    assert cost["items_computed"] == 2 * (3 * 5 + 3 * 2)  # two models; two lettered ones twice
    assert cost["items_from_store"] == 0


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (BENCHMARKS, True),
        ([*BENCHMARKS, "--seed", "42"], True),  # as by default
        ([*BENCHMARKS, "--few_shot", "1"], False),
        (["--tasks", "benchmarks", "--limit", "2"], False),
        (["--tasks", "benchmarks", "perplexity", "--limit", "3"], False),
        ([*BENCHMARKS, "--out", "elsewhere"], False),
        ([*BENCHMARKS, "--no_such_flag"], False),
    ],
)
def test_an_evaluation_that_lies_there_is_known_by_what_it_depends_on(
    evaluated, trained, data, words, made
):
    assert is_made([str(trained), "--data", str(data), *words]) is made


def test_an_evaluation_of_other_data_or_another_recipe_is_not_the_one_that_is_wanted(
    evaluated, trained, data, tmp_path
):
    run, other = tmp_path / "run", tmp_path / "data"
    shutil.copytree(trained, run)
    shutil.copytree(data, other)
    words = [str(run), "--data", str(other), *BENCHMARKS]
    assert is_made(words)
    file = other / "benchmarks/medqa.jsonl"
    text = file.read_text()
    file.write_text(text + "\n")
    assert not is_made(words)
    file.write_text(text)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "weight_decay: 0.5\n")
    assert not is_made(words)


def test_both_models_have_results_and_items(evaluated, trained):
    medqa = evaluated["results"]["benchmarks"]["medqa"]
    for subject in ("student", "teacher"):
        assert medqa[subject]["accuracy"]["n"] == 3
    lines = (trained / "results/items/benchmarks.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    assert len(items) == 2 * 5 * 3
    right = [i["right"] for i in items if (i["benchmark"], i["subject"]) == ("medqa", "student")]
    assert sum(right) / 3 == pytest.approx(medqa["student"]["accuracy"]["value"])


def test_every_part_runs_and_the_second_time_computes_nothing(trained, data, tmp_path, store):
    words = [
        trained,
        "--data",
        data,
        "--limit",
        2,
        "--fidelity_questions",
        2,
        "--benchmarks",
        "medqa",
    ]
    words += ["--answer_tokens", 8, "--generative_tokens", 8]
    assert evaluate(*words, "--out", tmp_path / "1") == 0
    first = result_of(tmp_path / "1")
    assert list(first["results"]) == list(first["cost"]) == list(command.PARTS)
    assert store.is_dir()
    page = (tmp_path / "1/results/report.html").read_text()
    for name, part in first["results"].items():
        assert ("skipped" in part) != (f'<section id="{name}">' in page), name
    assert "Some questions are not shown" not in page
    assert evaluate(*words, "--out", tmp_path / "2") == 0
    second = result_of(tmp_path / "2")
    assert without_cost(second) == without_cost(first)
    assert sum(cost["items_computed"] for cost in second["cost"].values()) == 0
    for name in command.PARTS:
        items = [tmp_path / out / f"results/items/{name}.jsonl" for out in ("1", "2")]
        assert items[0].read_bytes() == items[1].read_bytes()
    compare_with_itself(trained, tmp_path)


def compare_with_itself(trained, folder):
    """What `eval.compare` reads is what is written here: the same student as two runs is told apart nowhere."""
    runs = []
    for rate in (1, 2):
        run = shutil.copytree(trained, folder / f"rate_{rate}")
        shutil.copytree(folder / "1/results", run / "results", dirs_exist_ok=True)
        for name in ("run.json", EVALUATION):
            content = read(run / "results" / name)
            content["recipe"]["learning_rate"] = rate
            write_record(run / "results" / name, content)
        runs.append(run)
    content = build(find(runs), resamples=99)
    families = {measure["family"] for measure in content["measures"].values()}
    assert families == set(FAMILIES)
    assert content["primary"][0]["n"] == 2  # answers
    assert content["differences"]["heldout"][0]["n"] == 4  # prompts
    tests = [test for family in content["differences"].values() for test in family]
    assert tests
    assert all(test["value"] == 0 and test["p"] in (1, None) for test in tests)
    # A run by itself gets the pictures, and they go into its own page.
    assert compare.main([str(runs[0])]) == 0
    report = (runs[0] / "results/report.html").read_text()
    for title in ("Training: the loss", "Benchmarks, with intervals", "Fidelity to the teacher"):
        assert title in report


def test_the_student_is_the_trained_one(trained):
    pair = load_run(trained)
    adapted = [name for name, _ in pair.student.model.named_parameters() if "lora_B" in name]
    assert adapted
    assert any(pair.student.model.get_parameter(name).any() for name in adapted)
    assert not pair.student.model.training
    assert not any(p.requires_grad for p in pair.student.model.parameters())
    assert pair.student.model.config.num_hidden_layers == 2
    assert pair.teacher.model.config.num_hidden_layers == 4
    # The adapter by itself, named as a model, is the same student.
    by_name = load_models(ModelOptions(model=str(trained / "final_model")))
    assert by_name.student.fingerprint == pair.student.fingerprint


def test_evaluated_again_everything_is_stored_and_the_same(evaluated, trained, data, tmp_path):
    assert evaluate(trained, "--data", data, *BENCHMARKS, "--out", tmp_path) == 0
    again = result_of(tmp_path)
    assert without_cost(again) == without_cost(evaluated)
    assert again["cost"]["benchmarks"]["items_computed"] == 0


def test_a_teacher_whose_results_are_stored_is_not_loaded(evaluated, trained, data, caplog):
    assert evaluate(trained, "--data", data, *BENCHMARKS) == 0
    assert "loading the teacher" not in caplog.text
    other = ["--tasks", "benchmarks", "--limit", "4", "--out", trained.parent / "other"]
    assert evaluate(trained, "--data", data, *other) == 0
    assert "loading the teacher" in caplog.text


def test_a_run_that_is_not_finished_is_refused_unless_asked_for(trained, data, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "COMPLETE").unlink()
    assert "--allow_partial" in refused(capsys, run, "--data", data, *BENCHMARKS)
    assert load_run(run, allow_partial=True).student.fingerprint
    shutil.rmtree(run / "final_model")
    with pytest.raises(UserError, match="no model in"):
        load_run(run, allow_partial=True)


def test_a_base_model_that_changed_is_refused(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    write_record(run / "inputs.json", read(run / "inputs.json") | {"student": "sha256:other"})
    with pytest.raises(UserError, match="as sha256:other, and that model is sha256:"):
        load_run(run)


@pytest.mark.parametrize(
    ("flags", "named"), [([], "./recipes_own"), (["--verifier", "./given"], "./given")]
)
def test_the_verifier_of_the_recipe_is_used_unless_another_is_named(
    trained, data, tmp_path, capsys, flags, named
):
    run = shutil.copytree(trained, tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"verifier": "./recipes_own"}))
    words = [run, "--data", data, "--tasks", "faithfulness", *flags]
    assert f"model {named}: no such folder" in refused(capsys, *words)


# --- models by name --------------------------------------------------------------------------------


def test_a_model_without_a_run_and_without_a_teacher(teacher_folder, data, tmp_path, store):
    words = ["--model", teacher_folder, "--out", tmp_path, "--keep_layers", "0", "3"]
    assert evaluate(*words, "--data", data, *BENCHMARKS, "--benchmarks", "pubmedqa") == 0
    content = result_of(tmp_path)
    assert content["run"] is None
    assert list(content["subjects"]) == ["student"]
    benchmarks = content["results"]["benchmarks"]
    assert "teacher" not in benchmarks["pubmedqa"]
    assert "medqa" not in benchmarks
    assert store.is_dir()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "name either a run directory or a --model"),
        (["outputs/x", "--model", "y"], "name either a run directory or a --model"),
        (["outputs/x", "--dtype", "float32"], "--dtype is not for a run"),
        (["--model", "x", "--limit", "0"], "--limit: must be at least 1, got 0"),
        (["--model", "x", "--limit", "many"], "--limit: invalid int value"),
        (["--model", "x", "--batch_size", "big"], "--batch_size: invalid"),
        (["--model", "x", "--tasks", "benchmrks"], "invalid choice: 'benchmrks'"),
        (["--model", "x", "--lmit", "3"], "unrecognized arguments: --lmit"),
        (["--model", "x", "--data", "nowhere"], "python -m data_prep.build --out"),
    ],
)
def test_what_is_wrong_with_a_command_is_said(capsys, words, expected):
    assert expected in refused(capsys, *words)


def test_what_is_wrong_with_a_model_is_said(capsys, data, trained, tmp_path):
    place = ["--data", data, *BENCHMARKS]
    assert "no run is here" in refused(capsys, tmp_path, *place)
    assert "no such folder" in refused(capsys, "--model", tmp_path / "x", *place)
    assert "a run is here" in refused(capsys, "--model", trained, *place)


def test_several_processes_are_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in refused(capsys, "--model", "x")


def test_an_interrupted_evaluation_says_how_it_goes_on(
    teacher_folder, data, tmp_path, capsys, monkeypatch
):
    def interrupted(request):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate", interrupted)
    words = ["--model", teacher_folder, "--data", data, "--out", tmp_path]
    assert evaluate(*words, *BENCHMARKS) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_the_command_lists_its_options():
    result = run_command(sys.executable, "-m", "eval.run", "--help")
    assert result.returncode == 0
    for shown in (
        "--few_shot",
        "--option_shuffles",
        "--allow_partial",
        "python -m eval.run outputs/RUN",
    ):
        assert shown in result.stdout


# --- interrupted -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_evaluated_again_gives_the_same_result(data, tmp_path):
    folder = save_pair(tmp_path / "model")
    words = ["--model", folder, "--data", data, "--tasks", "benchmarks", "--option_shuffles", 0]
    cache = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-m", "eval.run", *map(str, words), "--out", str(tmp_path / "killed")],
        cwd=ROOT,
        env=os.environ | {"MEDISTILL_CACHE": str(cache)},
        stderr=subprocess.DEVNULL,
    )
    kill_after_lines(process, cache / "evaluations", 20)
    assert not (tmp_path / "killed/results").exists()
    (stored,) = (cache / "evaluations").glob("*.jsonl")
    before = len(stored.read_text().splitlines()) - 1
    for out, place in (("killed", cache), ("straight", tmp_path / "fresh")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MEDISTILL_CACHE", str(place))
            assert evaluate(*words, "--out", tmp_path / out) == 0
    killed, straight = result_of(tmp_path / "killed"), result_of(tmp_path / "straight")
    assert without_cost(killed) == without_cost(straight)
    cost = killed["cost"]["benchmarks"]
    assert cost["items_from_store"] == before > 0
    assert cost["items_computed"] > 0
    items = [tmp_path / out / "results/items/benchmarks.jsonl" for out in ("killed", "straight")]
    assert items[0].read_bytes() == items[1].read_bytes()


def kill_after_lines(process, folder, lines):
    """SIGKILL as soon as so many results are on disk."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        files = list(folder.glob("*.jsonl"))
        if files and len(files[0].read_bytes().splitlines()) > lines:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    assert process.wait(10) == -signal.SIGKILL, "it ended before it could be killed"
