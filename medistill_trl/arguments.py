"""The part of a recipe that every method shares. Plain dataclasses: importing them loads no torch.

Method-specific keys stand in `medistill_trl/methods/<name>.py`, training keys (learning rate, batch
size, ...) in the TRL and Transformers classes those extend. `schema.py` reads all of them.
"""

from dataclasses import dataclass, field


@dataclass
class StudentArguments:
    """The model that learns, and how it is loaded and adapted."""

    LIMITS = {  # see schema.py
        "lora_r": {"min": 1},
        "lora_alpha": {"min": 1},
        "lora_dropout": {"min": 0, "below": 1},
    }

    student_model: str = field(
        metadata={
            "help": "Hub id, local folder, .gguf file, or `package:NAME/FILE.gguf` for a model that an "
            "installed Python package carries."
        }
    )
    student_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the student on the hub."}
    )
    student_keep_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "Depth pruning: keep only these decoder layers of `student_model`, counted from 0. "
            "null keeps all of them."
        },
    )
    student_dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "Dtype of the student's weights and, when quantised, of its computation.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    student_load_in_4bit: bool = field(
        default=False, metadata={"help": "Load the student in 4-bit (bitsandbytes, QLoRA)."}
    )
    student_load_in_8bit: bool = field(
        default=False, metadata={"help": "Load the student in 8-bit (bitsandbytes, LLM.int8)."}
    )
    bnb_4bit_quant_type: str = field(
        default="nf4",
        metadata={"help": "4-bit data type, of both models.", "choices": ["nf4", "fp4"]},
    )
    bnb_4bit_use_double_quant: bool = field(
        default=True, metadata={"help": "Quantise the 4-bit scales too, of both models."}
    )
    attn_implementation: str = field(
        default="sdpa",
        metadata={
            "help": "Attention of both models.",
            "choices": ["sdpa", "eager", "flash_attention_2"],
        },
    )
    use_lora: bool = field(
        default=True, metadata={"help": "Train a LoRA adapter; false trains all weights."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(
        default=32, metadata={"help": "Adapter scale: its output is multiplied by alpha / r."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the adapted modules; null adapts every linear layer but the head."
        },
    )


@dataclass
class TeacherArguments:
    """The frozen model that is distilled, and how its completions are drawn."""

    LIMITS = {  # see schema.py
        "teacher_max_new_tokens": {"min": 1},
        "teacher_temperature": {"min": 0},
        "teacher_top_p": {"above": 0, "max": 1},
        "teacher_top_k": {"min": 0},
        "teacher_batch_size": {"min": 1},
        "teacher_timeout": {"above": 0},
        "teacher_wait": {"min": 0},
        "teacher_requests_in_flight": {"min": 1, "max": 1024},
    }

    teacher_model: str = field(
        metadata={
            "help": "As `student_model`: hub id, folder, .gguf file or `package:NAME/FILE.gguf`."
        }
    )
    teacher_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher on the hub."}
    )
    teacher_dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "Dtype of the teacher's weights and, when quantised, of its computation.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    teacher_load_in_4bit: bool = field(
        default=False, metadata={"help": "Load the teacher in 4-bit."}
    )
    teacher_load_in_8bit: bool = field(
        default=False, metadata={"help": "Load the teacher in 8-bit."}
    )
    teacher_completions: str = field(
        default="online",
        metadata={
            "help": "online: the teacher writes each accumulation window's completions as it is trained "
            "on. stored: every completion is drawn once, kept in `completion_store` and reused.",
            "choices": ["online", "stored"],
        },
    )
    completion_store: str = field(
        default="outputs/completions.sqlite",
        metadata={"help": "SQLite file of stored completions, shared by all runs and methods."},
    )
    teacher_max_new_tokens: int = field(
        default=256, metadata={"help": "Longest completion, in teacher tokens."}
    )
    teacher_temperature: float = field(
        default=0.0, metadata={"help": "Sampling temperature; 0 is greedy."}
    )
    teacher_top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling mass."})
    teacher_top_k: int = field(
        default=0, metadata={"help": "Sample among the k likeliest tokens; 0 means all."}
    )
    teacher_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Prompts per generation. null: online a whole accumulation window in one batch, "
            "stored and held-out 16.",
        },
    )
    teacher_sharding: str = field(
        default="replicated",
        metadata={
            "help": "replicated: every process holds the whole teacher. sharded: it is shared out, which takes ZeRO-3 "
            "(accelerate_configs/zero3.yaml) and makes it slower.",
            "choices": ["replicated", "sharded"],
        },
    )
    teacher_backend: str = field(
        default="local",
        metadata={
            "help": "local: the teacher's weights are loaded here. server: teacher_url answers for it, and only its "
            "config and tokenizer are read from teacher_model.",
            "choices": ["local", "server"],
        },
    )
    teacher_url: str | None = field(
        default=None,
        metadata={
            "help": "Of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1. A key goes into the environment "
            "variable MEDISTILL_TEACHER_API_KEY."
        },
    )
    teacher_name: str | None = field(
        default=None,
        metadata={"help": "What the server calls the teacher; null: the one model it serves."},
    )
    teacher_timeout: float = field(
        default=600.0, metadata={"help": "Longest time of one answer of the server, in seconds."}
    )
    teacher_wait: float = field(
        default=600.0,
        metadata={
            "help": "How long a request is tried again while the server does not answer, in seconds; then the run "
            "saves a checkpoint and ends."
        },
    )
    teacher_requests_in_flight: int = field(
        default=16, metadata={"help": "Requests under way at a time, of each process."}
    )
    cross_tokenizer: str = field(
        default="auto",
        metadata={
            "help": "If student and teacher have different tokenizers: auto compares them over spans of the "
            "same text where the method can, refuse stops.",
            "choices": ["auto", "refuse"],
        },
    )


@dataclass
class DataArguments:
    """Prompts: JSONL rows with `id`, `source`, `question`, `reference` and optionally `answer`."""

    LIMITS = {  # see schema.py
        "max_prompt_tokens": {"min": 1},
        "max_train_samples": {"min": 1},
    }

    train_file: str = field(metadata={"help": "JSONL of training prompts."})
    validation_file: str = field(metadata={"help": "JSONL of prompts the student never trains on."})
    on_bad_row: str = field(
        default="fail",
        metadata={
            "help": "A broken line, a missing column, a wrong type or a prompt over the limit: fail "
            "names them all and stops, skip leaves them out, counted and named.",
            "choices": ["fail", "skip"],
        },
    )
    max_prompt_tokens: int = field(
        default=512, metadata={"help": "Longest prompt, in tokens of either model."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only the first N rows of `train_file`."}
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "Instruction placed before every question, for both models."},
    )


@dataclass
class RunArguments:
    """Which method runs, and what happens around training."""

    LIMITS = {  # see schema.py
        "heldout_prompts": {"min": 1},
        "max_completion_tokens": {"min": 1},
        "max_seconds": {"above": 0},
        "divergence_window": {"min": 1},
        "divergence_factor": {"above": 1},
    }

    method: str = field(metadata={"help": "Name of a module in medistill_trl/methods."})
    heldout_prompts: int = field(
        default=64,
        metadata={
            "help": "Validation prompts in the fidelity check before and after training, and at each "
            "evaluation.",
        },
    )
    max_completion_tokens: int | None = field(
        default=None,
        metadata={
            "help": "End training once the loss was taken on so many completion tokens, over all "
            "processes; max_steps ends it too, and the learning rate follows that."
        },
    )
    max_seconds: float | None = field(
        default=None,
        metadata={
            "help": "End training after so much time, over all launches, drawing stored completions not "
            "counted; max_steps ends it too, and the learning rate follows that."
        },
    )
    divergence_action: str = field(
        default="warn",
        metadata={
            "help": "Once loss, KL or reward has gone far from the best it was: warn, stop the run, or none.",
            "choices": ["warn", "stop", "none"],
        },
    )
    divergence_window: int = field(
        default=10, metadata={"help": "Logs over whose mean a number is judged."}
    )
    divergence_factor: float = field(
        default=3.0,
        metadata={
            "help": "How far is far: so many times the lowest loss or KL; of a reward, so many standard deviations "
            "below the highest."
        },
    )
    verifier: str | None = field(
        default=None,
        metadata={
            "help": "Cross-encoder for natural language inference, a hub id or folder: judges claims when eval.run "
            "evaluates this run, unless --verifier is given. Training does not use it."
        },
    )
    resume: bool = field(
        default=False,
        metadata={"help": "Continue the run in `output_dir` from its newest checkpoint."},
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Check everything, print recipe, memory plan and one example, then stop."
        },
    )


SHARED = (RunArguments, StudentArguments, TeacherArguments, DataArguments)
TRANSIENT = ("resume", "dry_run")  # how this launch behaves, not what the run is
# A resumed run may change them: its numbers do not depend on them.
FREE_ON_RESUME = (
    "output_dir", "divergence_action", "divergence_window", "divergence_factor",
    "teacher_url", "teacher_timeout", "teacher_wait", "teacher_requests_in_flight",
)  # fmt: skip


# --- shared by several methods, whose configs inherit them


@dataclass
class CompletionArguments:
    """Of the methods that train on the teacher's completions as they are."""

    LIMITS = {"num_completions": {"min": 1}}

    num_completions: int = field(
        default=1,
        metadata={
            "help": "Sampled completions per prompt (stored only): each becomes a training example.",
        },
    )


@dataclass
class ChunkArguments:
    """Of the methods whose loss goes through the output heads a chunk of tokens at a time."""

    LIMITS = {"loss_chunk_size": {"min": 1}}

    loss_chunk_size: int = field(
        default=256,
        metadata={"help": "Tokens whose logits exist at a time; fewer need less memory."},
    )


@dataclass
class CoverageArguments:
    """Of the methods that compare more than text."""

    LIMITS = {"min_coverage": {"min": 0, "max": 1}}

    min_coverage: float = field(
        default=0.3,
        metadata={
            "help": "Where the tokenizers differ, warn once if a smaller share of the student's tokens is compared. For "
            "Logit-KD and AdaKD also if the teacher gives the tokens that both have less probability."
        },
    )


EVALUATION_KEYS = ("verifier",)  # saved with the run for eval.run, and no part of what the run is
