"""Which engine a run is on, what is refused there, and how the configs of accelerate are read."""

import re
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import ROOT, launch
from tiny_setting import check, make_setting

from medistill_trl import engines, methods
from medistill_trl.arguments import DataArguments, RunArguments, StudentArguments, TeacherArguments
from medistill_trl.errors import UserError
from medistill_trl.recipe import methods as method_names
from medistill_trl.recipe_rules import conflicts
from medistill_trl.setting import Arguments

ZERO3 = SimpleNamespace(zero_stage=3)


def arguments_of(tmp_path, method="sft", student=(), **teacher) -> Arguments:
    return Arguments(
        RunArguments(method=method),
        StudentArguments(student_model="s", **dict(student)),
        TeacherArguments(teacher_model="t", **teacher),
        DataArguments(train_file="t", validation_file="v"),
        methods.load(method).config(output_dir=str(tmp_path), use_cpu=True, bf16=False),
    )


# --- what the launcher makes of the configs --------------------------------------------------------


def environment(name: str) -> dict[str, str]:
    """What `accelerate launch` tells each process."""
    words = ["--config_file", str(ROOT / f"accelerate_configs/{name}.yaml"), "recipes/run.py"]
    launched, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert launched.num_processes == 2
    if launched.use_deepspeed:
        launched.deepspeed_fields_from_accelerate_config = ""  # launch_command adds it
        return prepare_deepspeed_cmd_env(launched)[1]
    return prepare_multi_gpu_env(launched)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_deepspeed_configs_leave_to_the_recipe_what_is_its(stage):
    found = environment(f"zero{stage}")
    assert found["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert found["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
    assert found["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"
    assert found["ACCELERATE_GRADIENT_CLIPPING"] == "auto"
    assert found["ACCELERATE_MIXED_PRECISION"] == "no"  # the recipe's bf16 raises it
    if stage == 3:
        assert found["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
        assert found["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"


def test_the_fsdp_config_is_of_version_2_and_saves_whole_weights():
    found = environment("fsdp2")
    assert found["ACCELERATE_USE_FSDP"] == "true"
    assert found["FSDP_VERSION"] == "2"
    assert found["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    assert found["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert found["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert found["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.slow
def test_fsdp_without_gpus_is_refused_by_the_run(tiny_overlay):
    result = launch("recipes/sft.yaml", tiny_overlay, config="fsdp2.yaml")
    assert result.returncode != 0
    assert "accelerate runs FSDP2 on GPUs alone" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_engine_that_needs_gpus_names_those_that_do_not():
    with pytest.raises(UserError, match=r"FSDP2 on GPUs alone.*cpu_ddp\.yaml, or zero2\.yaml"):
        engines.values_without_accelerator(True, "FSDP")
    assert engines.values_without_accelerator(True, None)["use_cpu"]
    # use_cpu would have accelerate forget about DeepSpeed.
    assert "use_cpu" not in engines.values_without_accelerator(True, "DEEPSPEED")


@pytest.mark.parametrize(("stage", "expected"), [(1, "zero2"), (2, "zero2"), (3, "zero3")])
def test_the_stage_tells_the_engine(tmp_path, stage, expected):
    arguments = arguments_of(tmp_path)
    assert engines.engine_of(arguments, PartialState()) == "ddp"
    arguments.training.deepspeed_plugin = SimpleNamespace(zero_stage=stage)
    assert engines.engine_of(arguments, PartialState()) == expected


ON_THE_PAGE = dict(
    re.findall(r"^\| `(\w+)` \|(.*)\|$", (ROOT / "docs/engines.md").read_text(), re.MULTILINE)
)


@pytest.mark.parametrize("name", ON_THE_PAGE)
def test_a_method_says_why_it_does_not_run_on_an_engine(name):
    method = methods.load(name)
    assert set(method.engines) <= {"zero2", "zero3", "fsdp2"}
    assert bool(method.engine_note) != ({"zero2", "zero3"} <= set(method.engines))


def test_a_new_method_runs_on_no_engine_until_it_names_one(tmp_path):
    method = methods.Method(
        name="new",
        config=methods.load("sft").config,
        teacher_access="black_box",
        build=methods.load("sft").build,
        paper="-",
    )
    arguments = arguments_of(tmp_path)
    for engine in ("zero2", "zero3", "fsdp2"):
        with pytest.raises(UserError, match=rf"new does not run on {engine}; .* cpu_ddp\.yaml$"):
            engines.check(method, arguments, engine)
    engines.check(method, arguments, "ddp")


@pytest.mark.parametrize(
    ("method", "engine", "expected"),
    [
        ("spin", "zero2", r"spin does not run on zero2 \(its optimizer.*multi_gpu\.yaml, on the CPU cpu_ddp\.yaml$"),
        ("fitnets", "zero3", r"fitnets does not run on zero3 .* or zero2\.yaml$"),
        ("ppo", "zero3", "ppo does not run on zero3"),
        ("logit_kd", "fsdp2", r"logit_kd does not run on fsdp2; .* or zero2\.yaml or zero3\.yaml$"),
    ],
)  # fmt: skip
def test_a_method_is_refused_by_name_with_what_works(tmp_path, method, engine, expected):
    arguments = arguments_of(tmp_path)
    with pytest.raises(UserError, match=expected):
        engines.check(methods.load(method), arguments, engine)
    engines.check(methods.load(method), arguments, "ddp")


@pytest.mark.parametrize(
    ("method", "engine", "student", "teacher", "expected"),
    [
        ("sft", "zero2", {}, "sharded", "needs ZeRO-3, and this run's engine is zero2"),
        ("sft", "ddp", {}, "sharded", "needs ZeRO-3, and this run's engine is ddp"),
        ("cot", "zero3", {}, "sharded", "does not work with cot"),
        ("sft", "zero3", {"student_load_in_4bit": True}, "replicated", "plain weights only"),
        ("sft", "zero3", {"use_lora": False}, "replicated", "set use_lora: true"),
    ],
)
def test_keys_an_engine_cannot_serve_are_refused(
    tmp_path, method, engine, student, teacher, expected
):
    arguments = arguments_of(tmp_path, student=student, teacher_sharding=teacher)
    with pytest.raises(UserError, match=expected):
        engines.check(methods.load(method), arguments, engine)


def test_a_quantised_teacher_is_not_shared_out():
    found = dict(conflicts({"teacher_sharding": "sharded", "teacher_load_in_4bit": True}))
    assert "set teacher_load_in_4bit: false" in found["teacher_sharding"]


def test_an_anchor_and_chance_are_refused_where_they_would_go_wrong(tmp_path):
    sizes = {"max_completion_length": 4, "data": {"max_prompt_tokens": 100}, "num_samples": 2}
    bond = make_setting(tmp_path / "b", "bond", lora=True, objective="jeffreys", **sizes)
    check(bond)
    bond.arguments.training.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    with pytest.raises(UserError, match="leaves out of its checkpoints"):
        check(bond)
    kd = make_setting(tmp_path / "k", "logit_kd", lmbda=0.5)
    check(kd)
    kd.arguments.training.deepspeed_plugin = ZERO3
    with pytest.raises(UserError, match="lmbda: must be 0 under ZeRO-3"):
        check(kd)


@pytest.mark.parametrize("name", method_names())
def test_a_method_runs_on_the_engines_that_its_row_of_the_page_says(name):
    method = methods.load(name)
    if name not in ON_THE_PAGE:
        assert method.engines == ()
        return
    cells = dict(
        zip(("zero2", "zero3", "sharded", "fsdp2"), ON_THE_PAGE[name].split("|"), strict=True)
    )
    for engine in ("zero2", "zero3", "fsdp2"):
        assert ("refused" in cells[engine]) == (engine not in method.engines), engine
    works = method.shards_teacher and "zero3" in method.engines
    assert ("refused" in cells["sharded"]) != works


def test_the_page_has_a_row_for_each_of_the_ten():
    assert len(ON_THE_PAGE) == 10
    assert set(ON_THE_PAGE) <= set(method_names())
