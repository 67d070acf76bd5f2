"""Damaged folders: models, trained runs, and what is read of runs afterwards."""

import contextlib
import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path

import report_runs
import run_folders
import torch
import yaml
from conftest import ROOT, save_pair
from crafted_run import write_run as pushable_run
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torture.mutate import damage_bytes, damage_value

from eval import compare, subjects
from eval.report import __main__ as report_command
from medistill_trl import model_source, models, recipe
from medistill_trl.arguments import StudentArguments, TeacherArguments
from medistill_trl.checkpoints import load_totals, newest_valid, write_manifest
from medistill_trl.hub import push
from medistill_trl.prompts import PromptFormat
from medistill_trl.run_directory import RunDirectory
from medistill_trl.sealed_json import write_record

CPU = torch.device("cpu")


@cache
def _pristine() -> Path:
    """Made once: a model, and what is read of runs. Removed by nobody: it lies in the system's temporary folder."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-whole-"))
    save_pair(root / "model", layers=2)
    _write_trained(root / "run", root / "model")
    with contextlib.chdir(ROOT):
        for name, skill in (("a", 0.3), ("b", 0.6)):
            run_folders.write_run(root / "pair" / name, ("sft", "logit_kd")[name == "b"], skill=skill, items=12, prompts=4)  # fmt: skip
        shown = report_runs.write_run(root / "shown/sft_x")
    report_runs.write_evaluation(shown, root / "shown/data", {"medqa": (0.3, 0.5)}, items=8)
    report_runs.write_comparison(root / "shown/compared", {"sft": shown, "logit_kd": shown})
    pushable_run(root / "pushed")
    return root


def _write_trained(run: Path, base: Path) -> None:
    """What training leaves of a LoRA run, without training."""
    directory = RunDirectory(run)
    content = {
        "method": "sft", "student_model": str(base), "teacher_model": str(base), "student_dtype": "float32",
        "teacher_dtype": "float32", "use_lora": True, "seed": 42, "output_dir": str(run),
    }  # fmt: skip
    found = model_source.resolve(str(base))
    arguments = StudentArguments(student_model=str(base), student_dtype="float32", use_lora=False)
    student = models.load_student(found, models.load_tokenizer(found), arguments, CPU)
    adapter = get_peft_model(
        student, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    )
    adapter.save_pretrained(directory.final_model)
    directory.recipe.write_text(yaml.safe_dump(content))
    write_record(directory.inputs, {"student": found.fingerprint, "num_processes": 1})
    directory.complete.write_text("x\n")


# --- models


def _damage_file(path: Path, draw: random.Random) -> None:
    if path.suffix == ".json" and draw.random() < 0.6:
        value = damage_value(json.loads(path.read_bytes()), draw)
        path.write_text(json.dumps(value, default=str), encoding="utf-8", errors="surrogatepass")
    elif path.suffix == ".safetensors" and draw.random() < 0.6:
        _damage_weights(path, draw)
    elif draw.random() < 0.15:
        path.unlink()
    else:
        path.write_bytes(damage_bytes(path.read_bytes(), draw))


def _damage_weights(path: Path, draw: random.Random) -> None:
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    tensor = tensors.pop(name)
    match draw.randrange(6):
        case 0:  # left out
            pass
        case 1:
            tensors[f"{name}.more"] = tensor
        case 2:
            tensors[name] = tensor[: len(tensor) // 2].clone()
        case 3:
            tensor.flatten()[draw.randrange(tensor.numel())] = draw.choice(
                (float("nan"), float("inf"))
            )
            tensors[name] = tensor
        case 4:
            tensors[name] = tensor.to(draw.choice((torch.int8, torch.float16, torch.bool)))
        case 5:
            tensors[name] = tensor.unsqueeze(0)
    save_file(tensors, path, metadata={"format": "pt"})


def model(draw: random.Random, folder: Path):
    copy = folder / "model"
    shutil.copytree(_pristine() / "model", copy)
    _damage_file(draw.choice(sorted(path for path in copy.iterdir() if path.is_file())), draw)
    as_teacher = draw.random() < 0.5

    def start():
        found = model_source.resolve(str(copy))
        form = PromptFormat(models.load_tokenizer(found))
        form.encode(form.render("Why does rest help?"))
        student = StudentArguments(student_model=str(copy), student_dtype="float32")
        if as_teacher:
            teacher = TeacherArguments(teacher_model=str(copy), teacher_dtype="float32")
            models.load_teacher(found, form.tokenizer, teacher, student, CPU)
        else:
            models.load_student(found, form.tokenizer, student, CPU)

    return start


def trained_run(draw: random.Random, folder: Path):
    """A run that is evaluated: its recipe, its inputs, its adapter."""
    copy = folder / "run"
    shutil.copytree(_pristine() / "run", copy)
    _damage_file(draw.choice(sorted(path for path in copy.rglob("*") if path.is_file())), draw)

    def start():
        pair = subjects.load_run(copy)
        assert pair.student.model is not None

    return start


# --- what is read of runs


def _copy(name: str, folder: Path) -> Path:
    return shutil.copytree(_pristine() / name, folder / name)


def _damage_one(folder: Path, draw: random.Random, suffixes: tuple[str, ...]) -> None:
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix in suffixes]
    path = draw.choice(found)
    if path.suffix == ".yaml" and draw.random() < 0.5:
        path.write_text(yaml.safe_dump(damage_value(yaml.safe_load(path.read_text()), draw)))
    elif path.suffix == ".jsonl" and path.stat().st_size and draw.random() < 0.5:
        lines = path.read_text().splitlines()
        number = draw.randrange(len(lines))
        lines[number] = json.dumps(damage_value(json.loads(lines[number]), draw), default=str)
        path.write_text("\n".join(lines) + "\n")
    else:
        _damage_file(path, draw)


def compared(draw: random.Random, folder: Path):
    pair = _copy("pair", folder)
    _damage_one(pair, draw, (".json", ".jsonl"))
    words = [str(pair / "a"), str(pair / "b"), "--out", str(folder / "written")]
    return lambda: compare.main(words)


def reported(draw: random.Random, folder: Path):
    shown = _copy("shown", folder)
    _damage_one(shown, draw, (".json", ".jsonl", ".png"))
    whole = draw.choice((shown / "compared", shown / "sft_x"))
    return lambda: report_command.main([str(whole), "--data", str(shown / "data")])


def pushed(draw: random.Random, folder: Path):
    run = _copy("pushed", folder) / "sft_x"
    _damage_one(run, draw, (".json", ".yaml", ".md", ".safetensors", ".jinja"))
    return lambda: push.plan(RunDirectory(run))


def resumed(draw: random.Random, folder: Path):
    """A run that was interrupted, from its recipe to its newest checkpoint."""
    run = RunDirectory(folder / "run")
    words = ["recipes/sft.yaml", "--output_dir", str(run.path)]
    started = recipe.load(words)
    run.start(started, {"num_processes": 1, "student": "s"})
    for step in (2, 4):
        checkpoint = run.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "optimizer.pt").write_bytes(draw.randbytes(64))
        totals = {"seconds": 1.0, "seconds_drawing": 0.0, "trained": 3, "generated_teacher": 2, "generated_student": 0}  # fmt: skip
        (checkpoint / "totals.json").write_text(json.dumps(totals))
        write_manifest(checkpoint)
    _damage_one(run.path, draw, (".json", ".yaml", ".pt"))

    def start():
        run.check(recipe.load([*words, "--resume"]))
        run.check_same_inputs({"num_processes": 1, "student": "s"})
        checkpoint = newest_valid(run.checkpoints)[0]
        if checkpoint is not None:
            load_totals(checkpoint)

    return start


TARGETS = (
    ("model", model, 10),
    ("trained_run", trained_run, 6),
    ("compared", compared, 6),
    ("reported", reported, 8),
    ("pushed", pushed, 6),
    ("resumed", resumed, 10),
)
