"""Plans of models that are known by their shapes alone."""

from conftest import ROOT
from transformers import LlamaConfig

from medistill_trl import methods
from medistill_trl.arguments import DataArguments, RunArguments, StudentArguments, TeacherArguments
from medistill_trl.memory.plan import Planner
from medistill_trl.setting import Arguments

SHAPES = ROOT / "benchmarks/configs"
TRAINING = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none"}


def arguments(method="sft", student=(), teacher=(), prompt=48, **training) -> Arguments:
    return Arguments(
        RunArguments(method=method),
        StudentArguments(**{"student_model": "s", "student_dtype": "float32", **dict(student)}),
        TeacherArguments(
            **{"teacher_model": "t", "teacher_dtype": "float32", "teacher_max_new_tokens": 16}
            | dict(teacher)
        ),
        DataArguments(train_file="t", validation_file="v", max_prompt_tokens=prompt),
        methods.load(method).config(output_dir="o", **{**TRAINING, **training}),
    )


def planner(given: Arguments, student, teacher, device_type="cpu", lengths=None) -> Planner:
    method = methods.load(given.run.method)
    keeps = method.keeps_teacher(given)
    return Planner(given, student, teacher, method.memory, device_type, lengths, keeps)


def llama(layers, **changes) -> LlamaConfig:
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 600, "max_position_embeddings": 256,
    }  # fmt: skip
    return LlamaConfig(num_hidden_layers=layers, **(sizes | changes))


def phase(found, name):
    return next(phase for phase in found.phases if phase.name == name)
