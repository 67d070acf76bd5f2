"""SPIN: the student learns to tell the teacher's answers from its own, over several iterations.

    L = −log σ(β [(log π(y⁺|x) − log π_k(y⁺|x)) − (log π(y⁻|x) − log π_k(y⁻|x))]),
    y⁺ the teacher's, y⁻ ~ π_k(·|x), π_k the student as iteration k began

the mean over pairs (Chen et al. 2024, arXiv 2401.01335). After each iteration the student is the next
π_k, its answers are written anew, and optimizer and learning rate start afresh. `reference: none` leaves
log π_k out: the report's formula.

`DPOTrainer` gives the construction, with LoRA the reference adapter among it, the collation and the log.
Not used of it: its loss (mean over a micro-batch, no pair left out), and its variants of the loss.
"""

import logging
from dataclasses import dataclass, field

from trl import DPOConfig

from medistill_trl.arguments import ChunkArguments
from medistill_trl.methods import Method
from medistill_trl.methods.spin.memory import PreferenceMemory
from medistill_trl.methods.spin.schedule import Schedule
from medistill_trl.methods.spin.trainer import SpinTrainer
from medistill_trl.setting import Setting
from medistill_trl.teacher import Sampling

logger = logging.getLogger(__name__)

# What DPOTrainer offers and this loss does not do: no other value is accepted.
FIXED = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "label_smoothing": 0.0,
    "use_weighting": False,
    "precompute_ref_log_probs": False,
    "sync_ref_model": False,
    "use_liger_kernel": False,
    "disable_dropout": True,
    "load_best_model_at_end": False,
}


@dataclass
class SpinConfig(ChunkArguments, DPOConfig):
    """`trl.DPOConfig` plus the iterations. An epoch of the evaluation, save and logging strategies is an
    iteration."""

    REQUIRES = {  # see schema.py
        "teacher_completions": ("stored", "every iteration trains on the same answers")
    }
    LIMITS = {
        "beta": {"above": 0},
        "num_iterations": {"min": 1},
        "epochs_per_iteration": {"min": 1},
        "keep_rounds": {"min": 1},
        "generation_temperature": {"min": 0},
        "max_new_tokens": {"min": 1},
        "generation_batch_size": {"min": 1},
    }

    reference: str = field(
        default="previous",
        metadata={
            "help": "previous: the student as the iteration began (the paper). none: no reference (the "
            "report).",
            "choices": ["previous", "none"],
        },
    )
    beta: float = field(default=0.1, metadata={"help": "β: scale of the log-ratios in the loss."})
    num_iterations: int = field(
        default=3, metadata={"help": "How often the student answers anew and is trained."}
    )
    epochs_per_iteration: int = field(
        default=1, metadata={"help": "Passes over an iteration's pairs."}
    )
    keep_rounds: int = field(
        default=1,
        metadata={"help": "Rounds of pairs an iteration trains on; 2 adds those of the last one."},
    )
    num_train_epochs: float = field(
        default=1.0,
        metadata={"help": "Not used: num_iterations and epochs_per_iteration say how long."},
    )
    generation_temperature: float = field(
        default=1.0,
        metadata={"help": "Sampling temperature of the student's answers; 0 is greedy."},
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Longest answer of the student, in its tokens; null: teacher_max_new_tokens."
        },
    )
    generation_batch_size: int = field(
        default=16, metadata={"help": "Prompts the student answers at a time, on each process."}
    )
    stop_margin: float | None = field(
        default=None,
        metadata={
            "help": "Stop after an iteration that ends with a mean margin below this; null: never."
        },
    )

    def __post_init__(self):
        self.remove_unused_columns = False
        super().__post_init__()
        for name, value in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} must be {value} with spin, whose loss and log-probabilities it would "
                    f"change; got {getattr(self, name)}"
                )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                "train_sampling_strategy must be random with spin, which shuffles within each pass; got "
                f"{self.train_sampling_strategy}"
            )
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"lr_scheduler_type {self.lr_scheduler_type.value} follows an evaluation loss, and spin "
                "has none; use linear or cosine"
            )


def build(setting: Setting) -> SpinTrainer:
    """The trainer, with the teacher's completions drawn.

    Raises:
        ValueError: the student's answers would not fit into `max_length`.
    """
    args = setting.arguments.training
    new_tokens = args.max_new_tokens or setting.arguments.teacher.teacher_max_new_tokens
    prompt_tokens = setting.arguments.data.max_prompt_tokens
    if args.max_length is not None and prompt_tokens + new_tokens > args.max_length:
        raise ValueError(
            f"max_length is {args.max_length}, less than max_prompt_tokens + max_new_tokens = "
            f"{prompt_tokens} + {new_tokens}: the student's answers would be cut"
        )
    schedule = _schedule(setting)
    # Every length is the schedule's; to Trainer the run is one pass over it.
    args.num_train_epochs, args.max_steps = 1, -1
    return SpinTrainer(
        model=setting.student,
        args=args,
        schedule=schedule,
        prompts=setting.train_prompts,
        chosen=[samples[0] for samples in setting.stored_completions(1)],
        form=setting.form,
        sampling=Sampling(new_tokens, args.generation_temperature),
        totals=setting.totals,
        directory=setting.run_directory,
        write_batch_size=setting.arguments.teacher.teacher_batch_size,
    )


def _schedule(setting: Setting) -> Schedule:
    args = setting.arguments.training
    schedule = Schedule(
        num_prompts=len(setting.train_prompts),
        num_iterations=args.num_iterations,
        epochs_per_iteration=args.epochs_per_iteration,
        keep_rounds=args.keep_rounds,
        pairs_per_step=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        seed=args.seed,
        max_steps=args.max_steps,
    )
    if args.num_train_epochs != 1:
        logger.info(
            "num_train_epochs: %g is not used by spin: %d iterations of %d epochs are %d steps",
            args.num_train_epochs, args.num_iterations, args.epochs_per_iteration, schedule.num_steps,
        )  # fmt: skip
    if args.max_steps > schedule.num_steps:
        logger.warning(
            "max_steps: %d: the iterations end after %d steps", args.max_steps, schedule.num_steps
        )
    return schedule


METHOD = Method(
    name="spin",
    config=SpinConfig,
    teacher_access="black_box",
    build=build,
    paper="arXiv 2401.01335",
    memory=PreferenceMemory(),
    loss_falls=False,
    checkpoint_files=SpinTrainer.checkpoint_files,
    engines=(),
    engine_note="its optimizer and its reference start afresh with each iteration, and DeepSpeed keeps both to itself",
)
