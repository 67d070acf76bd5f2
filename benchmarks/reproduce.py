"""The report's experiment on the embedded pair: is Logit-KD to SFT what the report says it is?

python -m benchmarks.reproduce [--work DIR] [--seeds 42 43 44] [--max_steps N]

Trains both methods once per seed, on the same stored teacher completions, each as a user would: through
`accelerate launch recipes/run.py`. Finished runs are kept and an unfinished one is resumed, so the command
may be interrupted and given again. Then it measures every final student against the teacher on prompts
none of them was trained on, and writes the table to docs/reproduction.md. With other seeds or fewer steps
(a trial) that document stays as it is. DIR/measurements.json and DIR/results.md are always written.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from transformers import PreTrainedModel

from benchmarks.fidelity import Answer, measure_student
from benchmarks.reproduction_table import Measurements, insert, table
from medistill_trl import console, methods, models, recipe, run_record
from medistill_trl.data import read_prompts
from medistill_trl.errors import UserError
from medistill_trl.inputs import Loaded, load_inputs, load_models
from medistill_trl.pipeline import build_arguments
from medistill_trl.recipe import Recipe
from medistill_trl.run_directory import RunDirectory
from medistill_trl.setting import Setting
from medistill_trl.teacher import Completion, Sampling, completion_logits

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs/reproduction.md"
TEST_FILE = ROOT / "data_prep/sample/processed/test.jsonl"
METHODS = ("sft", "logit_kd")
SEEDS = [42, 43, 44]
# The report's settings, said here so that a changed recipe does not change the experiment.
SHARED_FLAGS = {
    "teacher_completions": "stored",
    "max_train_samples": 64,
    "heldout_prompts": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
}
METHOD_FLAGS = {"sft": {}, "logit_kd": {"alpha": 0.5, "kd_temperature": 2.0}}
SAME_NUMBER = 1e-3  # relative; the trained student and the saved one, in the same arithmetic


# --- training


def run_words(method: str, seed: int, work: Path, max_steps: int | None) -> list[str]:
    """What `recipes/run.py` is given for one run."""
    name = f"reproduce_{seed}"
    flags = {
        "seed": seed,
        "run_name": name,
        "output_dir": work / f"{method}_{name}",
        "completion_store": work / "completions.sqlite",
        **SHARED_FLAGS,
        **METHOD_FLAGS[method],
    }
    if max_steps is not None:
        flags["max_steps"] = max_steps
    words = [f"recipes/{method}.yaml", "recipes/overlays/embedded.yaml"]
    return words + [str(word) for key, value in flags.items() for word in (f"--{key}", value)]


def train(method: str, seed: int, work: Path, max_steps: int | None) -> RunDirectory:
    """Train one student, unless that was done before.

    Raises:
        UserError: a finished run of that name had another recipe.
        SystemExit: training failed; it has said why.
    """
    words = run_words(method, seed, work, max_steps)
    checked = recipe.load(words)
    directory = RunDirectory(checked.output_dir)
    if directory.is_complete:
        require_same_recipe(directory, checked)
        print(f"== {directory.path}: finished already", flush=True)
        return directory
    if directory.recipe.exists():
        words.append("--resume")
    launcher = ["launch", "--config_file", "accelerate_configs/cpu.yaml", "recipes/run.py"]
    command = ["accelerate", *launcher, *words]
    print(f"== {' '.join(command)}", flush=True)
    command[0] = str(Path(sys.executable).with_name("accelerate"))  # of this environment
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status != 0:
        sys.exit(f"{directory.path}: the run ended with status {status}; give the command again")
    return directory


def require_same_recipe(directory: RunDirectory, checked: Recipe) -> None:
    """A trial of two steps must not pass for the experiment."""
    saved = yaml.safe_load(directory.recipe.read_text(encoding="utf-8"))
    now = yaml.safe_load(checked.to_yaml())
    different = sorted(key for key in {*saved, *now} if saved.get(key) != now.get(key))
    if different:
        raise UserError(
            f"{directory.path}: finished, but with other values of {', '.join(different)}; remove the "
            "folder or choose another --work"
        )


# --- measuring


@dataclass
class Reference:
    """The teacher's side, made once: what the students are measured against.

    Args:
        training: The stored completions all students were trained on.
        heldout: Greedy answers to validation and test prompts, with the teacher's logits.
    """

    loaded: Loaded
    setting: Setting
    training: list[Answer]
    heldout: list[Answer]

    @classmethod
    def of(cls, directory: RunDirectory) -> "Reference":
        """From any of the runs: they share teacher, prompts and completions."""
        checked = recipe.load([str(directory.recipe)])
        method = methods.load(checked.values["method"])
        arguments = build_arguments(checked, method, directory, use_cpu=True)
        loaded = load_inputs(arguments)
        setting = load_models(arguments, loaded)
        tests, _ = read_prompts(str(TEST_FILE), "fail")
        teacher, args = setting.teacher, arguments.teacher
        prompts = [*loaded.validation_prompts, *tests]
        rendered = [teacher.form.render(prompt.question) for prompt in prompts]
        greedy = Sampling(args.teacher_max_new_tokens)
        drawn = setting.store.draw(teacher, rendered, greedy, 1, args.teacher_batch_size)
        heldout = [
            teacher_answer(setting, p.question, c) for p, (c,) in zip(prompts, drawn, strict=True)
        ]
        stored = zip(setting.train_prompts, setting.stored_completions(1), strict=True)
        training = [plain_answer(setting, p.question, c) for p, (c,) in stored]
        return cls(loaded, setting, training, [a for a in heldout if a.token_ids])


def plain_answer(setting: Setting, question: str, completion: Completion) -> Answer:
    ends = [] if completion.end_id is None else [completion.end_id]
    return Answer(setting.form.render(question), completion.text, completion.token_ids + ends)


def teacher_answer(setting: Setting, question: str, completion: Completion) -> Answer:
    """With the teacher's logits on its own tokens."""
    answer = plain_answer(setting, question, completion)
    form = setting.teacher.form
    prompt_ids = form.encode(form.render(question))
    logits = completion_logits(setting.teacher.model, prompt_ids, answer.token_ids)
    return replace(answer, teacher_logits=logits)


def load_final(directory: RunDirectory, reference: Reference) -> PreTrainedModel:
    """The trained student, as it was saved."""
    args = replace(reference.setting.arguments.student, use_lora=False)
    tokenizer = reference.setting.form.tokenizer
    base = models.load_student(reference.loaded.student, tokenizer, args, torch.device("cpu"))
    return PeftModel.from_pretrained(base, directory.final_model).eval()


def measure(directory: RunDirectory, reference: Reference) -> dict[str, float]:
    """One run's row of numbers.

    Raises:
        UserError: the saved student is not the one the run's record measured.
    """
    record = directory.read_result("run.json")
    student = load_final(directory, reference)
    recorded = record["heldout"]["after"]["kl_nats"]
    now = reference.setting.heldout.measure(student)["kl_nats"]
    if abs(now - recorded) > SAME_NUMBER * recorded:
        raise UserError(
            f"{directory.path}: its record says KL {recorded:.4f} on the validation prompts, its saved "
            f"student has {now:.4f}"
        )
    measured = measure_student(
        student,
        reference.setting.form,
        reference.training,
        reference.heldout,
        reference.setting.arguments.teacher.teacher_max_new_tokens,
    )
    own_loss = next(entry["loss"] for entry in reversed(record["log_history"]) if "loss" in entry)
    return {**measured, "own_loss": own_loss}


# --- results


def results(
    measurements: Measurements, reference: Reference, records: list[dict], seconds: float
) -> str:
    """The table and what it depends on, as markdown.

    Args:
        records: `run.json` of every run.
        seconds: What measuring took.
    """
    here = run_record.environment()
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    values = records[0]["recipe"]
    settings = (
        f"{len(reference.training)} training completions, {len(reference.heldout)} held-out prompts, batch "
        f"{values['per_device_train_batch_size']}, {records[0]['log_history'][-1]['step']} steps, learning rate "
        f"{values['learning_rate']}, LoRA r={values['lora_r']}, α {METHOD_FLAGS['logit_kd']['alpha']}, "
        f"T {METHOD_FLAGS['logit_kd']['kd_temperature']}."
    )
    minutes = sum(record["seconds"] for record in records) / 60
    before = records[0]["heldout"]["before"]
    command = " ".join(["python -m benchmarks.reproduce", *sys.argv[1:]])
    facts = [
        f"- The student before training, on the validation prompts: CE {before['ce_nats']:.3f}, "
        f"KL {before['kl_nats']:.3f} nats, top-1 {before['top1']:.3f}",
        f"- Machine: {len(os.sched_getaffinity(0))} cores; {here['device']}",
        f"- Time: {len(records)} runs {minutes:.1f} min of training together, measuring {seconds / 60:.1f} min",
        f"- Versions: {versions}",
        f"- Commits: trained at {', '.join(sorted({str(r['git_commit']) for r in records}))}",
        f"- Command: `{command}`",
    ]
    note = "Mean ± standard deviation over the seeds; the students' own answers are greedy."
    return "\n\n".join([f"{settings} {note}", table(measurements), "\n".join(facts)])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/reproduce"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--max_steps", type=int, help="a quick trial; docs/ is left as it is")
    return parser.parse_args()


def main() -> None:
    given = parse()
    console.set_up(main_process=True)
    console.quiet_loading_bars()
    work = given.work.absolute()
    os.chdir(ROOT)  # recipes name their files from here
    runs = {
        (method, seed): train(method, seed, work, given.max_steps)
        for seed in given.seeds
        for method in METHODS
    }
    start = time.perf_counter()
    reference = Reference.of(next(iter(runs.values())))
    measurements: Measurements = {method: {} for method in METHODS}
    for (method, seed), directory in runs.items():
        print(f"== measuring {directory.path}", flush=True)
        measurements[method][seed] = measure(directory, reference)
    seconds = time.perf_counter() - start
    records = [directory.read_result("run.json") for directory in runs.values()]
    text = results(measurements, reference, records, seconds)
    (work / "measurements.json").write_text(json.dumps(measurements, indent=2) + "\n")
    (work / "results.md").write_text(text + "\n", encoding="utf-8")
    if given.max_steps is None and given.seeds == SEEDS:
        DOCUMENT.write_text(insert(DOCUMENT.read_text(encoding="utf-8"), text), encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"reproduce: {error}")
