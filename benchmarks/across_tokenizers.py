"""Is distilling across tokenizers as good as with one? The embedded pair, with a student of other tokens.

python -m benchmarks.across_tokenizers [--work DIR] [--max_steps N] [--vocab_size V] [--seeds S …]

The student is the embedded one, 21 of the teacher's 30 layers. For all arms but the first it gets a
SentencePiece-style tokenizer trained on the packaged sample; the embedding of each new token is the mean of
those of the pieces that the old tokenizer cuts its text into. All arms learn all weights from the same stored
completions, each as a user would train it; a seed decides their order. Bits per byte of the teacher's answers to the
sample's validation and test prompts compare what token counts cannot. Finished runs are kept.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from benchmarks.sentence_piece import train_sentence_piece
from medistill_trl import model_source, models
from medistill_trl.overlap import Overlap
from medistill_trl.token_bytes import TokenBytes

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data_prep/sample/processed"
OVERLAY = ROOT / "recipes/overlays/embedded.yaml"
ARMS = {
    "same tokenizer, Logit-KD": {},
    "other tokenizer, Logit-KD over spans": {"retokenised": True},
    "other tokenizer, cross-entropy alone": {"retokenised": True, "alpha": 0.0},
    "other tokenizer, spans alone": {"retokenised": True, "alpha": 1.0},
}


def make_student(folder: Path, vocab_size: int) -> Path:
    """The embedded student with another tokenizer, as a folder."""
    if (folder / "config.json").is_file():
        return folder
    pair = yaml.safe_load(OVERLAY.read_text(encoding="utf-8"))
    name, keep = pair["student_model"], pair["student_keep_layers"]
    source = model_source.resolve(name, None, keep, False)
    old = models.load_tokenizer(source, False)
    lines = (SAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [f"{row['question']}\n{row['reference']}" for row in map(json.loads, lines)]
    new = train_sentence_piece(
        texts,
        vocab_size,
        old.all_special_tokens,
        bos_token=old.bos_token,
        eos_token=old.eos_token,
        pad_token=old.pad_token,
    )
    new.chat_template = old.chat_template
    model = AutoModelForCausalLM.from_pretrained(source.location, dtype=torch.float32)
    weight = model.get_input_embeddings().weight.data
    rows = torch.stack([weight[ids].mean(0) for ids in old_pieces(new, old)])
    model.resize_token_embeddings(len(new), mean_resizing=False)
    model.get_input_embeddings().weight.data.copy_(rows)
    model.get_output_embeddings().weight.data.copy_(rows)  # tied, and if not, still right
    model.save_pretrained(folder)
    new.save_pretrained(folder)
    return folder


def old_pieces(new: PreTrainedTokenizerBase, old: PreTrainedTokenizerBase) -> list[list[int]]:
    """Old tokens that say what each new token says: the same one, or its text's; all if there is none."""
    partners = Overlap.of(new, old).partners
    texts = TokenBytes.of(new).texts
    everything = list(range(len(old)))
    found = []
    for id in range(len(new)):
        text = texts.get(id, b"").decode(errors="ignore")
        ids = [partners[id]] if id in partners else old.encode(text, add_special_tokens=False)
        found.append(ids or everything)
    return found


def vocabularies(student: Path) -> str:
    """What the retokenised student's tokens and its teacher's have in common, in a sentence."""
    name = yaml.safe_load(OVERLAY.read_text(encoding="utf-8"))["teacher_model"]
    own, teacher = (
        models.load_tokenizer(model_source.resolve(each)) for each in (str(student), name)
    )
    overlap = Overlap.of(own, teacher)
    shared = len(overlap.student_ids)
    tails = [
        sum(n == shared for n in outcomes.values())
        for outcomes in (overlap.student_outcomes, overlap.teacher_outcomes)
    ]
    return (
        f"Of the student's {len(own)} tokens and the teacher's {len(teacher)}, {shared} are in both; the tail has "
        f"{tails[0]} and {tails[1]}, and the others count for their first pieces."
    )


def train(name: str, changes: dict, work: Path, student: Path, max_steps: int, seed: int) -> dict:
    """One run's results/run.json, trained unless it was before.

    Raises:
        SystemExit: training failed; it has said why.
    """
    values = {key: value for key, value in changes.items() if key != "retokenised"}
    run_name = f"{name.replace(',', '').replace(' ', '_')}-seed_{seed}"
    values |= {
        "run_name": run_name,
        "output_dir": str(work / run_name),
        "seed": seed,
        "completion_store": str(work / "completions.sqlite"),
        "teacher_completions": "stored",
        "teacher_temperature": 0.0,
        "teacher_max_new_tokens": 48,
        "validation_file": str(work / "heldout.jsonl"),
        "heldout_prompts": 8,
        "per_device_train_batch_size": 2,
        "max_steps": max_steps,
        "use_lora": False,
        "learning_rate": 1e-4,
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    if changes.get("retokenised"):
        values |= {"student_model": str(student), "student_keep_layers": None}
    output = Path(values["output_dir"])
    if not (output / "COMPLETE").is_file():
        overlay = work / f"{run_name}.yaml"
        overlay.write_text(yaml.safe_dump(values), encoding="utf-8")
        recipe = ["recipes/run.py", "recipes/logit_kd.yaml", str(OVERLAY), str(overlay)]
        status = subprocess.run([sys.executable, *recipe], cwd=ROOT, check=False).returncode
        if status != 0:
            sys.exit(f"{name}: the run ended with status {status}")
    return json.loads((output / "results/run.json").read_text(encoding="utf-8"))


def table(records: dict[str, list[dict]]) -> str:
    """Bits per byte before and after, and the share of the way to the teacher, as Markdown: the mean over an arm's
    seeds, and from the least to the greatest of them."""
    lasts = [record["heldout"]["after"] for runs in records.values() for record in runs]
    teacher = next(
        last["teacher_bits_per_byte"] for last in lasts if "teacher_bits_per_byte" in last
    )
    lines = [
        "| student | bits per byte, before | after | less by | of the way to the teacher | one-to-one | teacher on shared |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in records.items():
        before = runs[0]["heldout"]["before"][
            "bits_per_byte"
        ]  # of the same model whatever the seed
        after = [record["heldout"]["after"]["bits_per_byte"] for record in runs]
        logged = [entry for record in runs for entry in record["log_history"]]
        shares = ["one_to_one_share", "teacher_shared_mass"]
        cells = [
            f"{before:.3f}",
            _spread(after),
            _spread([before - each for each in after]),
            f"{(before - _mean(after)) / (before - teacher):.0%}",
            *(_logged_mean(logged, share) for share in shares),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"\nThe teacher itself: {teacher:.3f} bits per byte.")
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _spread(values: list[float]) -> str:
    mean = f"{_mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}–{max(values):.3f})"


def _logged_mean(logged: list[dict], name: str) -> str:
    values = [entry[name] for entry in logged if name in entry]
    return f"{_mean(values):.2f}" if values else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("outputs/across_tokenizers"))
    parser.add_argument("--max_steps", type=int, default=24)
    parser.add_argument("--vocab_size", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    heldout = [(SAMPLE / f"{split}.jsonl").read_text("utf-8") for split in ("validation", "test")]
    (work / "heldout.jsonl").write_text("".join(heldout), encoding="utf-8")
    student = make_student(work / f"student_{args.vocab_size}", args.vocab_size)
    records = {
        name: [train(name, changes, work, student, args.max_steps, seed) for seed in args.seeds]
        for name, changes in ARMS.items()
    }
    print(table(records))
    print(vocabularies(student))


if __name__ == "__main__":
    main()
