"""The pair, the batch and what else the benchmarks of one training step build their trainers from."""

from dataclasses import fields

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from medistill_trl import model_source, models, recipe
from medistill_trl.arguments import StudentArguments, TeacherArguments
from medistill_trl.checkpoints import Totals
from medistill_trl.pair_writer import PairWriter
from medistill_trl.prompts import IGNORED, PromptFormat
from medistill_trl.teacher import Sampling, Teacher

EMBEDDED = ["recipes/logit_kd.yaml", "recipes/overlays/embedded.yaml"]
# Of a config whose trainer is asked for its loss alone.
LOSS_ALONE = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}


def load_pair(
    mode: str, tiny: bool
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Student, teacher and tokenizer: the embedded pair, or random models."""
    student, teacher, tokenizer = (tiny_pair if tiny else embedded_pair)(lora=mode == "lora")
    # A plain forward would return the keys and values of every layer, unused.
    student.config.use_cache = teacher.config.use_cache = False
    return student.train(), teacher, tokenizer


def no_rows() -> Dataset:
    """A trainer wants a data set; its batches are made from `random_rows`."""
    return Dataset.from_list([{"question": "", "example": None}])


def pair_writer(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PairWriter:
    """One that is not asked to write."""
    form = PromptFormat(tokenizer)
    judge = Teacher(teacher, tokenizer, form, "benchmark")
    return PairWriter(form, judge, len(tokenizer), Sampling(1), Totals(), None)


def embedded_pair(
    lora: bool,
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Student, teacher and tokenizer as the recipe has them."""
    values = recipe.load([*EMBEDDED, "--use_lora", str(lora).lower()]).values
    student_args, teacher_args = (
        kind(**{f.name: values[f.name] for f in fields(kind)})
        for kind in (StudentArguments, TeacherArguments)
    )
    cpu = torch.device("cpu")
    source = model_source.resolve(teacher_args.teacher_model)
    tokenizer = models.load_tokenizer(source)
    teacher = models.load_teacher(source, tokenizer, teacher_args, student_args, cpu)
    source = model_source.resolve(
        student_args.student_model, keep_layers=student_args.student_keep_layers
    )
    return models.load_student(source, tokenizer, student_args, cpu), teacher, tokenizer


def tiny_pair(lora: bool) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Random models that take no time, to try the script itself."""
    words = {f"w{n}": n for n in range(509)} | {"<pad>": 509, "<eos>": 510, "<unk>": 511}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    student, teacher = (
        LlamaForCausalLM(LlamaConfig(vocab_size=len(words), num_hidden_layers=layers, **sizes))
        for layers in (1, 2)
    )
    if lora:
        student = get_peft_model(student, LoraConfig("CAUSAL_LM", target_modules="all-linear"))
    return student, teacher.requires_grad_(False).eval(), tokenizer


def random_rows(vocab_size: int, batch: int, tokens: int) -> list[dict[str, list[int]]]:
    """Encoded pairs of `tokens` random tokens each; the prompt is 40 to 60 % of a row.

    No padding, which TRL's loss would pay for and ours would not.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(batch):
        ids = torch.randint(vocab_size, (tokens,), generator=generator).tolist()
        share = 0.4 + 0.2 * torch.rand((), generator=generator).item()
        prompt = round(share * tokens)
        labels = [IGNORED] * prompt + ids[prompt:]
        row = {"input_ids": ids, "labels": labels}
        row |= {f"teacher_{name}": value for name, value in row.items()}
        rows.append(row | {"compared": [int(label != IGNORED) for label in labels]})
    return rows
