"""The study file, its runs and their hashes; nothing here starts a run."""

import json
import re
import sys

import pytest
import yaml
from conftest import ROOT, run_command
from hypothesis import given, settings
from hypothesis import strategies as st
from study_files import PLAIN, expand, write

from medistill_trl import recipe
from medistill_trl.errors import UserError
from medistill_trl.recipe import RecipeError
from medistill_trl.recipe_reading import read_flags
from medistill_trl.study import definition, execution, grid
from medistill_trl.study.__main__ import main

EMBEDDED = "recipes/overlays/embedded.yaml"
SHIPPED = sorted((ROOT / "recipes/studies").glob("*.yaml"))


def problems(folder, content):
    with pytest.raises(RecipeError) as caught:
        expand(folder, content)
    return caught.value.problems


# --- expansion


def test_every_point_of_the_grid_is_a_run(tmp_path):
    runs = expand(tmp_path)
    assert [run.name for run in runs] == [
        f"{method}-lora_r_{rank}-seed_{seed}"
        for method in ("sft", "logit_kd")
        for rank in (4, 8)
        for seed in (1, 2)
    ]
    for run in runs:
        values = run.recipe.values
        assert values["lora_alpha"] == 2 * values["lora_r"]
        assert (values["max_steps"], values["max_train_samples"]) == (4, 16)
        assert values["completion_store"] == str(tmp_path / "out/completions.sqlite")
        assert values["teacher_completions"] == "stored"
        assert run.recipe.output_dir == tmp_path / "out" / run.name
        assert values.get("alpha") == (0.25 if run.method == "logit_kd" else None)


def test_who_wins(tmp_path):
    """A recipe, then overlays, then what the study says; of that a method's own, and --set changes it."""
    overlay = tmp_path / "o.yaml"
    overlay.write_text("learning_rate: 0.5\nmax_train_samples: 3\nlora_dropout: 0.25\n")
    content = PLAIN | {"shared": {"max_train_samples": 16, "alpha": 0.75}}
    content["grid"] = [{"method": ["logit_kd"]}]
    (run, _) = expand(tmp_path, content, ["shared.lora_dropout=0.125"], [str(overlay)])
    values = run.recipe.values
    assert values["learning_rate"] == 0.5
    assert values["max_train_samples"] == 16
    assert values["lora_dropout"] == 0.125
    assert values["alpha"] == 0.25


def test_the_words_of_a_run_are_a_recipe_by_themselves(tmp_path):
    run = expand(tmp_path)[0]
    assert run.words[0] == "recipes/sft.yaml"
    assert recipe.load(run.words).values == run.recipe.values


@pytest.mark.parametrize(
    ("budget", "keys"),
    [
        ({"optimizer_steps": 7}, {"max_steps": 7}),
        (
            {"completion_tokens": 900, "max_steps": 20},
            {"max_steps": 20, "max_completion_tokens": 900},
        ),
        ({"seconds": 1.5, "max_steps": 20}, {"max_steps": 20, "max_seconds": 1.5}),
    ],
)
def test_the_budget_is_every_runs(tmp_path, budget, keys):
    for run in expand(tmp_path, PLAIN | {"budget": budget}):
        assert {key: run.recipe.values[key] for key in keys} == keys


def test_which_runs_draw_from_the_store(tmp_path):
    content = PLAIN | {"grid": [{"method": ["sft", "on_policy", "spin"]}], "seeds": [1]}
    drawing = {run.method: run.draws_from_store for run in expand(tmp_path, content)}
    assert drawing == {"sft": True, "on_policy": False, "spin": True}
    content["shared"] = {"teacher_completions": "online"}
    content["grid"] = [{"method": ["sft"]}]
    assert not expand(tmp_path, content)[0].draws_from_store


# --- hashes


def hashes(folder, content, **kwargs):
    return {run.name: run.hash for run in expand(folder, content, **kwargs)}


@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(3)), key=st.sampled_from(["learning_rate", "lora_dropout"]))
def test_a_hash_is_of_the_recipe_alone(tmp_path_factory, order, key):
    """The order of keys, axes and values does not matter; a changed key changes every hash."""
    folder = tmp_path_factory.mktemp("hash")
    axes = [{"method": ["sft", "logit_kd"]}, {"lora_r": [4, 8]}, {"seed": [1, 2]}]
    content = {"grid": axes, "budget": {"optimizer_steps": 4}, "shared": {"lora_alpha": 8}}
    expected = hashes(folder, content)
    assert len(set(expected.values())) == 8
    mixed = [dict(reversed(list(axes[n].items()))) for n in order]
    mixed = [{key: values[::-1] for key, values in axis.items()} for axis in mixed]
    assert set(hashes(folder, content | {"grid": mixed}).values()) == set(expected.values())
    changed = hashes(folder, content | {"shared": {"lora_alpha": 8, key: 0.125}})
    assert not set(changed.values()) & set(expected.values())


def test_a_key_of_one_run_changes_one_hash(tmp_path):
    content = PLAIN | {"grid": [{"method": ["sft", "logit_kd"]}], "seeds": [1]}
    before = hashes(tmp_path, content)
    content["methods"] = {"logit_kd": {"alpha": 0.5}}
    after = hashes(tmp_path, content)
    assert after["sft-seed_1"] == before["sft-seed_1"]
    assert after["logit_kd-seed_1"] != before["logit_kd-seed_1"]


def test_places_and_spellings_do_not_change_a_hash(tmp_path):
    elsewhere = {"completion_store": "elsewhere.sqlite", "verifier": "some/nli"}
    content = PLAIN | {"shared": {"lora_dropout": 0, **elsewhere}}
    other = tmp_path / "other"
    other.mkdir()
    same = PLAIN | {"shared": {"lora_dropout": 0.0, "system_prompt": None}}
    assert hashes(tmp_path, content) == hashes(other, same)


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.floats(allow_nan=False, allow_infinity=False),
    texts,
    st.lists(st.one_of(st.integers(0, 99), texts), max_size=3),
)


@given(values)
def test_a_value_survives_the_command_line(value):
    found = []
    (entry,) = read_flags(["--key", grid.flag_text(value)], found)
    assert found == []
    assert entry.value == value
    assert type(entry.value) is type(value)


# --- refusals


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gird": []}, ": gird: unknown key; did you mean grid?"),
        (
            {"budget": {}},
            "budget: needs exactly one of optimizer_steps, completion_tokens, seconds",
        ),
        ({"budget": {"optimizer_steps": 3, "seconds": 2}}, "budget: needs exactly one of"),
        ({"budget": {"seconds": 3}}, "budget: max_steps: required with seconds"),
        (
            {"budget": {"optimizer_steps": 3, "max_steps": 2}},
            "max_steps: is optimizer_steps itself",
        ),
        ({"budget": {"optimizer_steps": 0}}, "optimizer_steps: must be a positive number, got 0"),
        ({"budget": {"optimizer_steps": 2.5}}, "must be a positive number, got 2.5"),
        ({"budget": {"steps": 3}}, "budget: steps: unknown key"),
        ({"seeds": [1, 1]}, "seeds: seed: a value is given twice"),
        ({"seeds": 3}, "seeds: must be a list, got 3"),
        ({"grid": [{"method": ["sft"]}, {"seed": [3]}]}, "grid: seed: varies twice"),
        ({"grid": [{"method": ["sft"]}, {"lora_r": 3}]}, "grid: lora_r: must be a list of values"),
        (
            {"grid": [{"method": ["sft"]}, {"lora_r": [1, 2], "lora_alpha": [1]}]},
            "lora_r, lora_alpha: keys of one axis move together",
        ),
        ({"grid": [{"lora_r": [1, 2]}]}, "no method: give"),
        (
            {"grid": [{"method": ["sft"]}, {"max_train_samples": [1, 2]}]},
            "max_train_samples: varies here and is fixed in shared",
        ),
        ({"shared": {"max_steps": 3}}, "shared: max_steps: not for a study to give: the budget"),
        ({"methods": {"sft": {"output_dir": "x"}}}, "methods: output_dir: not for a study to give"),
        ({"methods": {"sftt": {}}}, "methods: sftt: no such method; did you mean sft?"),
        ({"name": "a/b"}, "name: names a folder"),
        ({"evaluate": 3}, "evaluate: must be true or false or a mapping, got 3"),
    ],
)
def test_a_wrong_study_is_refused(tmp_path, changes, expected):
    assert any(expected in problem for problem in problems(tmp_path, PLAIN | changes))


def test_all_problems_of_all_runs_at_once_named_by_run(tmp_path):
    content = PLAIN | {
        "shared": {"lora_rr": 3},
        "grid": [{"method": ["sft", "logit_kd", "foo"]}],
        "seeds": [1, -2],
        "methods": {"logit_kd": {"alpha": 2}},
    }
    where = f"{tmp_path}/study.yaml"
    assert problems(tmp_path, content) == [
        f"{where}:2: shared: lora_rr: unknown key; did you mean lora_r? (4 of 6 runs: sft-seed_1, "
        "sft-seed_-2, logit_kd-seed_1, logit_kd-seed_-2)",
        f"{where}:9: seeds: seed: must be at least 0, got -2 (2 of 6 runs: sft-seed_-2, logit_kd-seed_-2)",
        f"{where}:12: methods.logit_kd: alpha: must be at most 1, got 2 (2 of 6 runs: logit_kd-seed_1, "
        "logit_kd-seed_-2)",
        f"{where}:4: grid: method: 'foo' does not exist; one of {', '.join(recipe.methods())} (2 of 6 "
        "runs: foo-seed_1, foo-seed_-2)",
    ]


def test_two_runs_of_one_recipe_are_refused(tmp_path):
    content = PLAIN | {"grid": [{"method": ["sft"]}, {"lora_r": [8, 8.0]}], "seeds": [1]}
    assert any("a value is given twice" in problem for problem in problems(tmp_path, content))
    content["grid"] = [{"method": ["sft"]}, {"system_prompt": ["Be brief.", "Be brief?"]}]
    assert any("names two runs" in problem for problem in problems(tmp_path, content))
    content["grid"] = [{"method": ["sft"]}, {"completion_store": ["a", "b"]}]
    found = problems(tmp_path, content)
    assert (
        "sft-completion_store_a-seed_1 and sft-completion_store_b-seed_1 are the same run"
        in found[0]
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("budget", "must be a place of the study file and its value"),
        ("lora_r=3", "places begin with name, description"),
        ("name.x=3", "name holds no keys"),
        ("shared.lora_r=[", "cannot be read"),
        ("shared.lora_r=-1", "--set shared.lora_r=-1: shared: lora_r: must be at least 1, got -1"),
    ],
)
def test_a_wrong_set_is_refused(tmp_path, change, expected):
    content = PLAIN | {"grid": [{"method": ["sft"]}]}
    with pytest.raises(RecipeError, match=re.escape(expected)):
        expand(tmp_path, content, [change])


# --- the shipped studies


@pytest.mark.parametrize("overlays", [[], [EMBEDDED]], ids=["default", "embedded"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_study_is_valid(path, overlays, tmp_path):
    study = definition.read(str(path), overlays, [])
    missing = {point["method"] for axis in study.axes for point in axis if "method" in point}
    missing -= set(recipe.methods())
    if missing:
        pytest.skip(f"methods not there yet: {', '.join(sorted(missing))}")
    runs = grid.expand(study, tmp_path)
    assert study.name == path.stem
    assert study.description
    assert len(runs) >= 6
    assert not [warning for run in runs for warning in run.recipe.warnings]


def test_the_example_of_the_page_is_valid(tmp_path):
    page = (ROOT / "docs/study.md").read_text()
    path = tmp_path / "example.yaml"
    path.write_text(re.search(r"^```yaml\n(.*?)^```", page, re.M | re.S)[1])
    study = definition.read(str(path), [], [])
    assert set(yaml.safe_load(path.read_text())) == set(definition.KEYS)
    assert len(grid.expand(study, tmp_path)) == 12


def test_the_shipped_studies_are_those_named():
    assert [path.stem for path in SHIPPED] == [
        "alpha", "dataset_size", "lora_rank", "report_reproduction", "temperature", "ten_methods",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("evaluate", "expected"), [(False, None), (True, {}), ({}, {}), ({"limit": 3}, {"limit": 3})]
)
def test_an_evaluation_may_have_flags(tmp_path, evaluate, expected):
    path = write(tmp_path, PLAIN | {"evaluate": evaluate})
    assert definition.read(path, [], []).evaluate == expected


def test_commands_are_what_a_user_would_type(tmp_path, capsys):
    path = write(
        tmp_path, PLAIN | {"evaluate": {"limit": 8, "tasks": ["benchmarks", "perplexity"]}}
    )
    out = tmp_path / "out"
    config = "accelerate_configs/cpu.yaml"
    assert main([path, EMBEDDED, "--out", str(out), "--commands", "--config_file", config]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[8:] == ["# when all of them have ended:", f"python -m eval.compare {out}"]
    launch, evaluate = lines[0].split(" && ")
    assert launch.startswith(
        f"accelerate launch --config_file {config} --main_process_port 0 recipes/run.py recipes/sft.yaml {EMBEDDED} "
    )
    assert evaluate == (
        f"python -m eval.run {out}/sft-lora_r_4-seed_1 --limit 8 --tasks benchmarks perplexity"
    )
    states = [run["state"] for run in json.loads((out / "study.json").read_text())["runs"]]
    assert states == ["waiting"] * 8  # so the last command finds the runs


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--jobs", "0"], "--jobs: must be at least 1"),
        (["--config_file", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_a_wrong_command_is_refused(tmp_path, words, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        main([write(tmp_path, PLAIN), *words])


def test_a_study_that_is_not_there_is_an_error_and_no_traceback():
    result = run_command(sys.executable, "-m", "medistill_trl.study", "recipes/studies/none.yaml")
    assert result.returncode == 2
    assert "recipes/studies/none.yaml: cannot be read" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_second_study_in_a_folder_is_kept_out(tmp_path):
    refused = pytest.raises(UserError, match="a study is at work here")
    with execution.only_study(tmp_path), refused, execution.only_study(tmp_path):
        pass
    assert (tmp_path / ".lock").exists()
