"""A wrong recipe is refused at once, with everything that is wrong with it."""

import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, run_command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medistill_trl import recipe
from medistill_trl.errors import UserError
from medistill_trl.recipe import RecipeError
from medistill_trl.run_directory import RunDirectory

SFT = str(ROOT / "recipes/sft.yaml")


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes name the packaged sample relative to it


def problems(tmp_path, text, *flags, base=SFT):
    overlay = tmp_path / "o.yaml"
    overlay.write_text(text)
    with pytest.raises(RecipeError) as caught:
        recipe.load([*([base] if base else []), str(overlay), *flags])
    return caught.value.problems


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_is_valid(path):
    assert recipe.load([str(path)]).values["method"] == path.stem


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes/overlays").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_overlay_is_valid_on_every_recipe(path):
    for base in (ROOT / "recipes").glob("*.yaml"):
        assert recipe.load([str(base), str(path)]).values["method"] == base.stem


def test_a_file_may_give_keys_to_one_method_alone(tmp_path):
    overlay = tmp_path / "o.yaml"
    overlay.write_text("sft:\n  seed: 7\nspin: {beta: 3.0, seed: 8}\nseed: 6\n")
    own = recipe.load([SFT, str(overlay)]).values
    assert own["seed"] == 7
    assert "beta" not in own
    assert not {"sft", "spin"} & set(own)
    other = recipe.load([str(ROOT / "recipes/spin.yaml"), str(overlay)]).values
    assert (other["seed"], other["beta"]) == (8, 3.0)
    assert recipe.load([str(ROOT / "recipes/cot.yaml"), str(overlay)]).values["seed"] == 6
    assert recipe.load([SFT, str(overlay), "--seed", "9"]).values["seed"] == 9


def test_keys_for_one_method_are_checked_as_others_are(tmp_path):
    found = problems(tmp_path, "sft:\n  seed: -1\n  learning_rte: 1\nspin: 3\n")
    assert found == [
        f"{tmp_path}/o.yaml:4: spin: must be a mapping of keys for this method alone",
        f"{tmp_path}/o.yaml:1: seed: must be at least 0, got -1",
        f"{tmp_path}/o.yaml:1: learning_rte: unknown key; did you mean learning_rate?",
    ]


def test_all_problems_at_once_with_file_and_line(tmp_path):
    found = problems(
        tmp_path,
        "learning_rte: 1.0e-4\n"
        "per_device_train_batch_size: -3\n"
        "lr_scheduler_type: cosin\n"
        "learning_rate: [1]\n"
        "seed: 1\n"
        "seed: 2\n",
        "--bf16",
        "maybe",
    )
    text = "\n".join(found)
    assert "o.yaml:1: learning_rte: unknown key; did you mean learning_rate?" in text
    assert "o.yaml:2: per_device_train_batch_size: must be at least 1, got -3" in text
    assert "o.yaml:3: lr_scheduler_type: 'cosin' is not a choice; did you mean cosine" in text
    assert "o.yaml:4: learning_rate: must be a number, got [1]" in text
    assert "o.yaml:6: seed: given twice, first in line 5; keep one" in text
    assert "--bf16: must be true or false" in text
    assert len(found) == 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_steps: 1.5", "max_steps: must be a whole number, got 1.5"),
        ("max_steps: true", "must be a whole number, got True"),
        ("learning_rate: '1e-4'", "remove the quotes"),
        ("learning_rate: .inf", "must be finite"),
        ("learning_rate: 0", "must be above 0, got 0"),
        ("lora_dropout: 1.0", "must be below 1"),
        ("teacher_top_p: 1.5", "must be at most 1"),
        ("save_total_limit: 1", "must be at least 2"),
        ("teacher_completions: offline", "one of online, stored"),
        ("student_keep_layers: [0, a]", "items must be a whole number, got 'a'"),
        ("student_keep_layers: [3, 1]", "ascending"),
        ("run_name: 2026-01-01", "quote it"),
        ("hub_token: abc", "not supported"),
        ("wandb_api_key: abc", "looks like a secret"),
        ("run_name: hf_abcdefghijklmnopqrstuvwxyz", "looks like a secret"),
        ("packing: true", "not supported"),
        ("torch_compile_mode: default", "read hidden states by hooks"),
        ("auto_find_batch_size: true", "no longer comparable"),
        ("teacher_load_in_8bit: true", "conflicts with teacher_load_in_4bit"),
        ("use_lora: false", "quantised weights cannot be trained"),
        ("fp16: true", "its loss scaler overflows"),
        ("num_completions: 4\nteacher_temperature: 0", "raise teacher_temperature"),
        ("num_completions: 4", "needs teacher_completions: stored"),
        ("report_to: mlflow", "not a choice; none, or some of trackio, tensorboard, wandb"),
        ("report_to: [none, tensorboard]", "'none' is not a choice"),
        ("report_to: null", "None is not a choice"),
        ("output_dir: ''", "is empty"),
        ("run_name: ../../x", "use output_dir for a path"),
        ("lora_target_modules: [q_proj, lm_head]", "leave out lm_head"),
        ("train_sampling_strategy: group_by_length", "online lengths are unknown"),
        ("label_smoothing_factor: 0.1", "not supported"),
        ("teacher_model: https://me:secret@host/model", "looks like a secret"),
        ("max_steps: 1:30", "must be a whole number, got '1:30'"),
        ("lora_target_modules: &a [*a]", "contains itself"),
        ("seed: " + "[" * 3000, "nested too deeply"),
        ("max_length: 600", "max_prompt_tokens + teacher_max_new_tokens = 512 + 256"),
        ("train_file: nowhere.jsonl", "no file nowhere.jsonl"),
        ("method: sftt", "does not exist; one of"),
        ("- a list", "must be a mapping"),
        ("a: [1", "not valid YAML"),
        ("1: 2", "keys are words"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", "a: given twice"),
        ("run_name: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_each_kind_of_problem(tmp_path, text, expected):
    assert expected in "\n".join(problems(tmp_path, text))


@pytest.mark.parametrize("method", ["cot", "spin"])
def test_a_method_says_what_it_needs_of_a_shared_key(tmp_path, method):
    [found] = problems(tmp_path, "teacher_completions: online", base=f"recipes/{method}.yaml")
    assert "o.yaml:1: teacher_completions: must be stored with this method: " in found


def test_an_inherited_key_that_means_nothing_is_refused_where_it_stands(tmp_path):
    [problem] = problems(tmp_path, "gamma: 0.5\n", base="recipes/bond.yaml")
    assert problem.endswith(
        "o.yaml:1: gamma: does nothing with this method, leave it out: "
        "a sample has one weight, for all its tokens"
    )


@pytest.mark.parametrize(
    ("method", "own"), [("adakd", "alpha"), ("bond", "truncation_penalty"), ("ppo", "reward")]
)
def test_the_resolved_recipe_holds_the_keys_of_the_method_it_extends(method, own):
    assert own in recipe.load([f"recipes/{method}.yaml"]).values


def test_the_verifier_of_an_evaluation_is_no_part_of_the_run(tmp_path):
    """It is saved with the run, which goes on under another one."""
    flags = [SFT, "--output_dir", str(tmp_path)]
    run = RunDirectory(tmp_path)
    started = recipe.load([*flags, "--verifier", "some/nli"])
    run.start(started, {})
    assert yaml.safe_load(run.recipe.read_text())["verifier"] == "some/nli"
    run.check(recipe.load([*flags, "--verifier", "other/nli", "--resume"]))
    with pytest.raises(UserError, match="lora_r"):
        run.check(recipe.load([*flags, "--lora_r", "3", "--resume"]))


def test_required_keys_are_named(tmp_path):
    found = "\n".join(problems(tmp_path, "method: sft", base=None))
    for key in ("teacher_model", "student_model", "train_file", "validation_file"):
        assert f"{key}: required" in found


def test_later_files_win_and_flags_win_over_files(tmp_path):
    overlay = tmp_path / "o.yaml"
    overlay.write_text("seed: 7\nlora_r: 4\n")
    values = recipe.load([SFT, str(overlay), "--lora_r", "8", "--run-name=12"]).values
    assert (values["seed"], values["lora_r"], values["run_name"]) == (7, 8, "12")


def test_flags_of_every_form():
    flags = ["--student_keep_layers", "0", "1", "--lora_target_modules", "q_proj", "--dry_run"]
    values = recipe.load([SFT, *flags]).values
    assert values["student_keep_layers"] == [0, 1]
    assert values["lora_target_modules"] == ["q_proj"]
    assert values["dry_run"] is True
    assert recipe.load([SFT, "--system_prompt", "Be: brief"]).values["system_prompt"] == "Be: brief"


def test_scalars_are_those_of_yaml_1_2(tmp_path):
    overlay = tmp_path / "o.yaml"
    overlay.write_text("learning_rate: 1e-4\neval_strategy: no\n")
    values = recipe.load([SFT, str(overlay)]).values
    assert values["learning_rate"] == 1e-4
    assert values["eval_strategy"] == "no"


def test_the_resolved_recipe_reproduces_itself(tmp_path):
    first = recipe.load([SFT, str(ROOT / "recipes/overlays/embedded.yaml"), "--run_name", "x"])
    saved = tmp_path / "recipe.yaml"
    saved.write_text(first.to_yaml())
    second = recipe.load([str(saved)])
    assert second.resolved() == first.resolved()
    assert second.output_dir == first.output_dir
    assert yaml.safe_load(first.to_yaml())["output_dir"] == "outputs/sft_x"


def test_a_run_begun_before_a_key_was_there_goes_on_with_its_default(tmp_path):
    run = RunDirectory(tmp_path / "run")
    words = [SFT, "--output_dir", str(run.path)]
    run.start(recipe.load(words), {})
    saved = yaml.safe_load(run.recipe.read_text())
    assert saved.pop("loss_chunk_size") == 256
    run.recipe.write_text(yaml.safe_dump(saved))
    run.check(recipe.load([*words, "--resume"]))
    with pytest.raises(UserError, match="loss_chunk_size: 256 when started, 128 now"):
        run.check(recipe.load([*words, "--resume", "--loss_chunk_size", "128"]))


def test_what_has_no_effect_is_a_warning_not_an_error():
    checked = recipe.load([SFT, "--teacher_temperature", "0", "--teacher_top_p", "0.9"])
    assert any("no effect on greedy" in warning for warning in checked.warnings)


def test_a_wrong_recipe_is_refused_fast_and_without_torch(tmp_path):
    overlay = tmp_path / "o.yaml"
    overlay.write_text("learning_rte: 1\n")
    start = time.monotonic()
    result = run_command(sys.executable, "recipes/run.py", "recipes/sft.yaml", overlay)
    seconds = time.monotonic() - start
    assert result.returncode == 2
    assert "o.yaml:1: learning_rte: unknown key" in result.stderr
    assert "Traceback" not in result.stderr
    assert seconds < 2
    code = (
        "import sys; from medistill_trl import recipe; recipe.load(['recipes/sft.yaml']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def assert_recipe_or_refusal(overlay):
    try:
        checked = recipe.load([SFT, str(overlay)])
    except RecipeError as error:
        found = error.problems
    else:
        found = checked.values
    assert found  # any other exception has already failed the test


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
keys = st.sampled_from(
    ["learning_rate", "method", "seed", "lora_r", "max_steps", "optim"]
) | st.text(max_size=8)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(keys, yaml_values, max_size=5) | yaml_values)
def test_any_yaml_is_either_a_recipe_or_a_clear_refusal(tmp_path, content):
    overlay = tmp_path / "fuzz.yaml"
    overlay.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    assert_recipe_or_refusal(overlay)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=60))
def test_any_bytes_are_either_a_recipe_or_a_clear_refusal(tmp_path, content):
    overlay = tmp_path / "fuzz.yaml"
    overlay.write_bytes(content)
    assert_recipe_or_refusal(overlay)
