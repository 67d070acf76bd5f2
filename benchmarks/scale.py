"""The tables of docs/scale.md: large pairs planned from their shapes alone, without weights, hub or GPU.

python -m benchmarks.scale

The shapes stand in benchmarks/configs. Time is arithmetic: operations of the forward and backward passes over a share of
the GPU's peak, and for writing the bytes that are read per token over its bandwidth. Nothing of it is measured.
"""

import tempfile
from dataclasses import dataclass

from tqdm import tqdm

from medistill_trl import methods, model_source, recipe
from medistill_trl.memory import weightless
from medistill_trl.memory.plan import Planner, usable
from medistill_trl.pipeline import build_arguments
from medistill_trl.run_directory import RunDirectory

CONFIGS = "benchmarks/configs"
SMALL = f"--teacher_model {CONFIGS}/meditron_7b --student_model {CONFIGS}/tinyllama_1.1b"
LARGE = f"--teacher_model {CONFIGS}/meditron_70b --student_model {CONFIGS}/qwen2_1.5b"
SIXTEEN = f"recipes/logit_kd.yaml {SMALL} --max_prompt_tokens 768 --teacher_completions stored"
# Within 12 GiB. As it is the recipe writes 16 answers at a time, which of its own 768 tokens are within 12 GiB too.
REPORT = f"{SIXTEEN} --teacher_batch_size 12"
TWO_TOKENIZERS = (
    f"recipes/logit_kd.yaml recipes/overlays/meditron70b_qwen2.yaml {LARGE} --max_prompt_tokens 768"
)
# What the report's authors may have run: of each, whether it trains on 32 GB.
SUSPECTS = {
    "4-bit teacher, QLoRA, checkpointing": "",
    "without checkpointing": "--gradient_checkpointing false",
    "without checkpointing, logits of the whole batch": "--gradient_checkpointing false --loss_chunk_size 4096",
    "without checkpointing, batch 8": "--gradient_checkpointing false --per_device_train_batch_size 8",
    "teacher in bfloat16": "--teacher_load_in_4bit false",
    "teacher in bfloat16, without checkpointing": "--teacher_load_in_4bit false --gradient_checkpointing false",
    "both in bfloat16, LoRA, without checkpointing": "--teacher_load_in_4bit false --student_load_in_4bit false "
    "--gradient_checkpointing false",
    "teacher in bfloat16, all float32 weights, AdamW": "--teacher_load_in_4bit false --use_lora false "
    "--student_load_in_4bit false --student_dtype float32 --optim adamw_torch",
    "teacher in float32": "--teacher_load_in_4bit false --teacher_dtype float32",
}
LARGE_CASES = {
    "logit_kd, 4-bit teacher": "",
    "logit_kd, 8-bit teacher": "--teacher_load_in_4bit false --teacher_load_in_8bit true",
    "logit_kd, 4-bit teacher, without checkpointing": "--gradient_checkpointing false",
    "sft, 4-bit teacher": "sft",
}


@dataclass(frozen=True)
class Device:
    """What the arithmetic takes of a GPU, from its data sheet.

    Args:
        tflops: Dense bfloat16 with float32 sums, 10¹² operations a second.
        bandwidth: TB of memory a second.
        share: Of both that a run gets.
    """

    name: str
    vram: float
    tflops: float
    bandwidth: float
    share: float


RTX5090 = Device("RTX 5090", 32, 209, 1.79, 0.3)
H100 = Device("80 GB H100", 80, 989, 3.35, 0.3)


def planned(words: str) -> Planner:
    with tempfile.TemporaryDirectory() as folder:
        given = recipe.load([*words.split(), "--output_dir", f"{folder}/run"])
        method = methods.load(given.values["method"])
        arguments = build_arguments(given, method, RunDirectory(given.output_dir), True)
    models = arguments.student.student_model, arguments.teacher.teacher_model
    configs = (model_source.find_config(name) for name in models)
    return Planner(arguments, *configs, method.memory, "cuda")


def row(name: str, planner: Planner, vram: float) -> str:
    found, training = planner.plan(), planner.arguments.training
    generate, score, train = (phase.gb for phase in found.phases)
    room = usable(vram)
    most = planner.largest_micro_batch(room, bool(training.gradient_checkpointing))
    fits = "yes" if found.peak.gb <= room else f"no ({found.peak.name})"
    cells = (name, *(f"{gb:.1f}" for gb in (generate, score, train)), fits, most or "none")
    return "| " + " | ".join(map(str, cells)) + " |"


def memory_table(cases: dict[str, str], base: str, vram: float) -> str:
    lines = [
        f"| | generate | score | train, GB | on {vram:g} GB | largest micro-batch |",
        "|---|---|---|---|---|---|",
    ]
    for name, flags in tqdm(cases.items(), desc="planning", unit="setting", disable=None):
        words = (
            base.replace("recipes/logit_kd", "recipes/sft") if flags == "sft" else f"{base} {flags}"
        )
        lines.append(row(name, planned(words), vram))
    return "\n".join(lines)


def time_table(cases: list[tuple[str, str, Device, int]], examples: int, epochs: int) -> str:
    """Hours of training and of writing every completion once.

    Args:
        cases: Name, words, device, how many of them.
    """
    lines = [
        "| | steps | 10¹² operations an example | training, hours | writing once, hours |",
        "|---|---|---|---|---|",
    ]
    for name, words, device, count in cases:
        planner = planned(words)
        training, lengths = planner.arguments.training, planner.lengths
        window = training.per_device_train_batch_size * training.gradient_accumulation_steps
        student, teacher = (parameters(config) for config in (planner.student, planner.teacher))
        # A product costs two operations a weight and token. Of frozen weights backward takes only the gradient of
        # their input, as many again; checkpointing one more forward.
        passes = 2 + bool(training.gradient_checkpointing)
        operations = 2 * lengths.total * (teacher + passes * student)
        speed = device.tflops * 1e12 * device.share * count
        hours = examples * epochs * operations / speed / 3600
        # 4-bit weights of a batch are read, written out in 16 bits and read again for every token.
        per_token = teacher * (0.5 + 2 + 2) / (device.bandwidth * 1e12 * device.share)
        rows = planner.arguments.teacher.teacher_batch_size or 16
        writing = examples / rows / count * lengths.completion * per_token / 3600
        steps = -(-examples // (window * count)) * epochs
        cells = (name, f"{steps:,}", f"{operations / 1e12:.1f}", f"{hours:.0f}", f"{writing:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parameters(config) -> int:
    """Weights that a token goes through."""
    few = [weightless.at_depth(config, depth) for depth in (1, 2)]
    sizes = [_weights(one) for one in few]
    layers = config.get_text_config().num_hidden_layers
    return sizes[0] + (layers - 1) * (sizes[1] - sizes[0])


def _weights(config) -> int:
    from medistill_trl.arguments import StudentArguments

    model = weightless.student(config, StudentArguments(student_model="", use_lora=False))
    text = config.get_text_config()
    embeddings = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    return sum(p.numel() for p in model.parameters()) - embeddings


def main() -> None:
    with weightless.quiet():
        print("## The report's pair, 4 examples of 768 + 256 tokens\n")
        print(memory_table(SUSPECTS, REPORT, RTX5090.vram))
        print(row("first row, 16 answers at a time", planned(SIXTEEN), RTX5090.vram))
        print("\n## Meditron-70B → Qwen2-1.5B, 2 examples of 768 + 256 tokens\n")
        print(memory_table(LARGE_CASES, TWO_TOKENIZERS, H100.vram))
        print("\n## Steps and hours for 80,000 examples, three times\n")
        cases = [
            (f"7B → 1.1B, one {RTX5090.name}", REPORT, RTX5090, 1),
            (
                f"7B → 1.1B, one {RTX5090.name}, 16 answers at a time",
                SIXTEEN,
                RTX5090,
                1,
            ),
            (f"70B → 1.5B, one {H100.name}", TWO_TOKENIZERS, H100, 1),
            (f"70B → 1.5B, eight {H100.name}", TWO_TOKENIZERS, H100, 8),
        ]
        print(time_table(cases, 80_000, 3))


if __name__ == "__main__":
    main()
