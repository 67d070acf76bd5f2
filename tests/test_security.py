"""Nothing that comes from elsewhere runs code here, leads out of its folder, or is pushed with a secret."""

import json
import pickle
import re
import shutil
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch, make_model, make_tokenizer, run_command, write_tiny_overlay
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from peft import LoraConfig, get_peft_model
from planted_tokens import GIT, HUB, environment, holders
from run_folders import write_run
from tiny_setting import make_setting, train

from eval import subjects
from eval.comparison.runs import find
from eval.metrics.semantic_similarity import load_encoder
from eval.options import ModelOptions
from eval.questions import load_benchmarks
from eval.run import main as evaluate
from medistill_trl import model_source, models, pipeline, recipe
from medistill_trl.arguments import StudentArguments
from medistill_trl.checkpoints import Totals, newest_valid, write_manifest
from medistill_trl.errors import UserError
from medistill_trl.recipe import RecipeError
from medistill_trl.run_directory import RunDirectory
from medistill_trl.sealed_json import write_record
from medistill_trl.study import definition

CPU = torch.device("cpu")
PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")  # of a checkpoint, read on resume


class Bomb:
    """Unpickled anywhere, it makes a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture
def trace(tmp_path) -> Path:
    """The file a bomb makes; the test has shown that it does."""
    trace = tmp_path / "exploded"
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()
    trace.unlink()
    yield trace
    assert not trace.exists()


def load(folder: Path):
    source = model_source.resolve(str(folder))
    arguments = StudentArguments(student_model=str(folder), student_dtype="float32", use_lora=False)
    return models.load_student(source, models.load_tokenizer(source), arguments, CPU)


@pytest.fixture
def model(tmp_path, teacher_folder) -> Path:
    return shutil.copytree(teacher_folder, tmp_path / "model")


# --- pickles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "tf_model.h5"])
def test_a_model_of_pickles_alone_is_refused(model, trace, name):
    (model / "model.safetensors").unlink()
    torch.save(Bomb(trace), model / name)
    with pytest.raises(UserError, match="Only safetensors are read"):
        load(model)
    with pytest.raises(UserError, match="Only safetensors are read"):
        model_source.resolve(str(model), keep_layers=[0])


def test_a_pickle_beside_safetensors_is_not_opened(model, trace):
    torch.save(Bomb(trace), model / "pytorch_model.bin")
    torch.save(Bomb(trace), model / "training_args.bin")
    load(model)


def test_an_adapter_that_is_a_pickle_is_refused(tmp_path, model, trace):
    adapter = tmp_path / "adapter"
    get_peft_model(load(model), LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    weights = adapter / "adapter_model.safetensors"
    assert subjects.load_models(ModelOptions(model=str(adapter))).student.model is not None
    weights.unlink()
    torch.save(Bomb(trace), adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"there is no adapter_model\.safetensors"):
        _ = subjects.load_models(ModelOptions(model=str(adapter))).student.model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    setting = make_setting(folder, "sft", save_strategy="steps", save_steps=1)
    train(setting)
    return folder / "checkpoints/checkpoint-1"


@pytest.fixture
def checkpoints(tmp_path, checkpoint) -> Path:
    copy = tmp_path / "run/checkpoints"
    shutil.copytree(checkpoint, copy / "checkpoint-1")
    (copy / "checkpoint-1/totals.json").write_text(json.dumps(vars(Totals()), default=str))
    write_manifest(copy / "checkpoint-1")
    assert newest_valid(copy)[0] == copy / "checkpoint-1"
    return copy


@pytest.mark.parametrize("name", [*PICKLES, "training_args.bin", "pytorch_model.bin", "x/more.pt"])
def test_a_pickle_in_a_checkpoint_that_was_not_saved_there_is_never_read(checkpoints, trace, name):
    folder = checkpoints / "checkpoint-1"
    (folder / name).parent.mkdir(exist_ok=True)
    torch.save(Bomb(trace), folder / name)
    chosen, passed_over = newest_valid(checkpoints)
    assert chosen is None
    said = str(passed_over)
    assert name in said
    assert "changed since it was saved" in said or "put there after it was saved" in said


@pytest.mark.parametrize("name", PICKLES)
def test_even_with_a_forged_manifest_a_checkpoint_runs_no_code(tmp_path, checkpoints, trace, name):
    torch.save(Bomb(trace), checkpoints / f"checkpoint-1/{name}")
    (checkpoints / "checkpoint-1/totals.json").write_text("{}")
    write_manifest(checkpoints / "checkpoint-1")
    directory = RunDirectory(checkpoints.parent)
    setting = make_setting(tmp_path / "again", "sft", save_strategy="no")
    sft = pipeline.methods.load("sft")
    trainer = pipeline.build_trainer(sft, setting)
    found = pipeline.find_checkpoint(directory, sft, trainer)
    with pytest.raises(UserError, match=r"nothing of it was run"):
        pipeline.train(trainer, setting.totals, found)


# --- code that comes with a model ------------------------------------------------------------------


@pytest.fixture
def with_code(model, trace) -> Path:
    """A model whose config, model and tokenizer are classes of its own."""
    (model / "own.py").write_text(
        f"open({str(trace)!r}, 'w')\n"
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n"
    )
    for name, maps in (
        ("config.json", {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "own.T"]}),
    ):
        path = model / name
        content = json.loads(path.read_text()) | {"auto_map": maps}
        if name == "config.json":
            content["model_type"] = "its_own"
        else:
            content["tokenizer_class"] = "OwnTokenizer"
        path.write_text(json.dumps(content))
    return model


def test_a_model_with_code_of_its_own_is_refused(with_code):
    with pytest.raises(UserError, match="trust_remote_code"):
        model_source.resolve(str(with_code))
    with pytest.raises(UserError, match="trust_remote_code"):
        subjects.load_models(ModelOptions(model=str(with_code)))
    source = model_source.ModelSource("m", str(with_code), None, make_model(600).config, "f")
    with pytest.raises(UserError, match="trust_remote_code"):
        models.load_tokenizer(source)


def test_a_sentence_encoder_with_code_of_its_own_is_refused(tmp_path, trace):
    (tmp_path / "encoder").mkdir()
    module = [{"idx": 0, "name": "0", "path": "", "type": "own.Encoder"}]
    (tmp_path / "encoder/modules.json").write_text(json.dumps(module))
    (tmp_path / "encoder/own.py").write_text(f"open({str(trace)!r}, 'w')\nclass Encoder: pass\n")
    with pytest.raises(UserError, match="brings Python code of its own"):
        load_encoder(str(tmp_path / "encoder"))


def test_a_run_from_elsewhere_cannot_say_that_its_code_is_trusted(tmp_path, with_code, capsys):
    run = write_run(tmp_path / "run", student_model=str(with_code), trust_remote_code=True)
    (run / "final_model").mkdir()
    (run / "final_model/config.json").write_text("{}")
    write_record(run / "inputs.json", {"student": "sha256:s"})
    words = [str(run), "--data", str(ROOT / "data_prep/sample")]
    assert evaluate(words) == 2
    assert "evaluate with --trust_remote_code" in capsys.readouterr().err


def test_trusting_code_is_said_loudly(caplog, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = recipe.load(["recipes/sft.yaml", "--trust_remote_code", "true"])
    assert any("runs Python code" in warning for warning in loaded.warnings)
    assert subjects.warn_of_remote_code(True)
    assert "Python code that comes with the models is run here" in caplog.text
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert "trust_remote_code" not in path.read_text()


def test_a_chat_template_runs_in_a_sandbox(trace):
    from medistill_trl.prompts import PromptFormat

    tokenizer = make_tokenizer()
    reach = "cycler.__init__.__globals__.os.system"
    for template in (
        f"{{{{ {reach}('touch {trace}') }}}}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match="chat template"):
            PromptFormat(tokenizer).render("Why?")


def test_text_of_a_benchmark_is_no_template(tmp_path):
    from eval.options import Options

    shutil.copytree(ROOT / "data_prep/sample/benchmarks", tmp_path / "benchmarks")
    path = tmp_path / "benchmarks/pubhealth.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["question"] = "Is {{ 7 * 7 }} {% for x in range(9) %}n{% endfor %} {0} true?"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, _ = load_benchmarks(tmp_path, Options(limit=1, benchmarks=["pubhealth"]))
    assert rows[0]["question"] in found["pubhealth"].questions[0].prompt


# --- ways out of a folder --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "a\\b", "a\nb", "x" * 300])
def test_a_run_name_is_one_part_of_a_path(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(RecipeError, match="run_name"):
        recipe.load(["recipes/sft.yaml", "--run_name", json.dumps(name)])


@pytest.mark.parametrize("name", ["../x", "..", ".hidden", "a/b", "/etc"])
def test_a_study_name_is_one_part_of_a_path(tmp_path, name):
    path = tmp_path / "study.yaml"
    path.write_text(f"name: '{name}'\nshared: {{method: sft}}\nbudget: {{optimizer_steps: 2}}\n")
    with pytest.raises(RecipeError, match="names a folder"):
        definition.read(str(path), [], [])


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "..", ""])
def test_a_study_from_elsewhere_names_runs_in_its_own_folder_only(tmp_path, name):
    content = {"runs": [{"name": name, "state": "finished"}], "grid": []}
    write_record(tmp_path / "study.json", content)
    with pytest.raises(UserError, match="no name of a run in the study's folder"):
        find([tmp_path])


@pytest.mark.parametrize(
    "name",
    ["package:json/../../../x.gguf", "package:json//etc/passwd.gguf", "package:../x/y.gguf"],
)
def test_a_packaged_model_lies_within_its_package(name):
    with pytest.raises(UserError, match=r"leads out of the package|is not installed"):
        model_source.resolve(name)


@pytest.mark.parametrize(
    "name", ["../../etc", "someone/../../x", "a/b/c", "", "\0", "x" * 5000, "a b/c"]
)
def test_what_is_no_hub_id_is_refused(name):
    with pytest.raises(UserError, match=r"^model "):
        model_source.resolve(name)


# --- tokens ----------------------------------------------------------------------------------------


def test_the_search_for_tokens_finds_them(tmp_path):
    (tmp_path / "a").write_text("nothing")
    assert holders(tmp_path, "nothing either") == []
    (tmp_path / "b.bin").write_bytes(b"\0\xff" + HUB.encode() + b"\0")
    assert holders(tmp_path) == [str(tmp_path / "b.bin")]
    assert holders(f"pushed to https://ann:{GIT}@x")


@pytest.mark.slow
def test_no_token_is_in_anything_a_run_its_evaluation_or_a_comparison_writes(
    tmp_path, teacher_folder, model_cache
):
    overlay = write_tiny_overlay(tmp_path, teacher_folder)
    settings = environment() | {"MEDISTILL_CACHE": str(tmp_path / "cache")}
    run = tmp_path / "run"
    trained = launch("recipes/sft.yaml", overlay, "--max_steps", 2, "--save_steps", 1, env=settings)
    commands = (
        ["-m", "eval.run", run, "--data", "data_prep/sample", "--limit", 3, "--tasks", "benchmarks", "fidelity"],
        ["-m", "eval.compare", run, "--out", tmp_path / "compared"],
    )  # fmt: skip
    done = [trained, *(run_command(sys.executable, *words, env=settings) for words in commands)]
    for result in done:
        assert result.returncode == 0, result.stderr[-4000:]
    assert (run / "checkpoints/checkpoint-2/training_args.bin").is_file()
    assert holders(tmp_path, *(text for d in done for text in (d.stdout, d.stderr))) == []


# --- what is installed -----------------------------------------------------------------------------


def test_the_lock_holds_every_tested_version_with_the_digests_of_its_files():
    pins = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    lock = (ROOT / "requirements.lock").read_text()
    entries = re.findall(
        r"^([\w.-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}[ \\]*\n)+)", lock, re.M
    )
    locked = {name: version for name, version, _ in entries}
    assert len(pins) > 30
    assert {name: version for name, version in pins if locked.get(name) != version} == {}
    assert len(locked) == len(re.findall(r"^[\w.-]+==", lock, re.M))
    assert "://" not in lock


def test_the_lock_leaves_out_nothing_that_a_package_needs():
    """It is installed without looking for what packages ask for: older versions of pip refuse a hashed file in which
    a package is asked for once with extras and once without."""
    text = (ROOT / "requirements.lock").read_text()
    locked = {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", text, re.M)}
    assert "pip install --no-deps --require-hashes -r requirements.lock" in text.splitlines()[2]
    installed = {canonicalize_name(found.name): found for found in distributions()}
    looked_at = locked & installed.keys()
    assert len(looked_at) > 100
    missing = {
        f"{name} needs {needed}"
        for name in looked_at
        for needed in map(Requirement, installed[name].requires or [])
        if needed.marker is None or needed.marker.evaluate({"extra": ""})
        if canonicalize_name(needed.name) not in locked
    }
    assert missing == set()
