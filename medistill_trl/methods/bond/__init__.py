"""BOND: of N samples of the student the teacher's pick is what it learns from.

    L = − Σ_k w_k Σ_t log π(a_kt)   over samples k of weight w_k ≠ 0, divided by their tokens

    best_of_n_sft         w = 1 on the sample that the teacher rewards most of a prompt's N: cross-entropy on it
    rank_policy_gradient  w = the place of each sample among the N, minus the mean of all places
    jeffreys              J-BOND (Sessa et al. 2024, arXiv 2407.14622): N samples of an anchor, a moving average of
                          the student. w = 1 − β on the best of them, which is the forward KL to best-of-N of
                          the anchor; and on a fresh sample of the student β times its log-quantile among
                          them, the backward KL

The first two compare the student with itself and so have the reward's maximum as their only rest; the third aims
at a distribution, best-of-N of the anchor (`losses.best_of_n`).

The trainer is that of on-policy distillation with other weights: sampling, scoring, the loss without whole
logits, resuming and the log are its. Its credit (gamma, baseline) and its reuse of samples are not used.
"""

import math
import os
from dataclasses import dataclass, field

from medistill_trl.errors import UserError
from medistill_trl.inputs import Loaded
from medistill_trl.memory.losses import Policy
from medistill_trl.methods import Method, on_policy
from medistill_trl.methods.bond.trainer import BondTrainer, fresh_samples
from medistill_trl.methods.on_policy import OnPolicyConfig, build_with
from medistill_trl.setting import Arguments, Setting
from medistill_trl.teacher import DRAWS_PER_STEP

# Keys of some objectives only.
OF_OBJECTIVE = {
    "rank_reward": ("rank_policy_gradient",),
    "jeffreys_beta": ("jeffreys",),
    "anchor_kl_coef": ("rank_policy_gradient", "jeffreys"),
}


@dataclass
class BondConfig(OnPolicyConfig):
    """`OnPolicyConfig` plus the comparison of a prompt's samples. The rewards that compare token by token are not
    there: best-of-N ranks whole completions by a reward that does not change with the student."""

    NAME = "bond"
    TRAINS_ON = "student"  # see schema.py
    UNUSED = {
        "gamma": "a sample has one weight, for all its tokens",
        "baseline": "weights are centred already",
        "num_generations": "num_samples is the number of samples of each prompt",
        "num_iterations": "every window of samples is trained on once",
        "epsilon": "every window of samples is trained on once",
        "epsilon_high": "every window of samples is trained on once",
        "min_coverage": "the teacher reads whole completions",
    }
    LIMITS = {
        "num_samples": {"min": 2},
        "jeffreys_beta": {"min": 0, "max": 1},
        "anchor_ema": {"min": 0, "max": 1},
        "anchor_kl_coef": {"min": 0},
    }

    objective: str = field(
        default="best_of_n_sft",
        metadata={
            "help": "best_of_n_sft (cross-entropy on the teacher's pick), rank_policy_gradient (rewards by "
            "place among the samples) or jeffreys (both KL to best-of-N of an anchor; needs LoRA).",
            "choices": ["best_of_n_sft", "rank_policy_gradient", "jeffreys"],
        },
    )
    reward: str = field(
        default="teacher_logprob",
        metadata={
            "help": "teacher_logprob (the teacher's log-probability of the completion) or sequence (likelihood "
            "and right answers).",
            "choices": ["teacher_logprob", "sequence"],
        },
    )
    num_samples: int = field(
        default=16, metadata={"help": "N, samples of each prompt that are compared."}
    )
    rank_reward: str = field(
        default="winner",
        metadata={
            "help": "Of rank_policy_gradient: winner (1 for the best) or rank (equal steps from worst to best); "
            "both minus their mean.",
            "choices": ["winner", "rank"],
        },
    )
    jeffreys_beta: float = field(
        default=0.5,
        metadata={
            "help": "β of jeffreys: weight of the backward KL; that of the forward is 1 − β."
        },
    )
    anchor_ema: float = field(
        default=0.02,
        metadata={
            "help": "η: how far the anchor moves to the student after each optimizer step; 0 fixes it."
        },
    )
    anchor_kl_coef: float = field(
        default=0.0,
        metadata={"help": "γ: weight of KL(student ‖ anchor); not with best_of_n_sft. Needs LoRA."},
    )
    num_generations: int | None = field(
        default=None, metadata={"help": "Not used: num_samples says how many."}
    )

    def __post_init__(self):
        for name, reason in self.UNUSED.items():
            self._refuse_unless_default(
                name, f"does nothing in bond and must be left out: {reason}"
            )
        for name, objectives in OF_OBJECTIVE.items():
            if self.objective not in objectives:
                self._refuse_unless_default(
                    name,
                    f"does nothing with objective {self.objective}; it is of {' and '.join(objectives)}",
                )
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps * processes
        if rows % self.num_samples:
            raise ValueError(
                f"num_samples must divide the samples of an accumulation window, per_device_train_batch_size × "
                f"gradient_accumulation_steps × processes = {rows}, got {self.num_samples}: change "
                "gradient_accumulation_steps or num_samples"
            )
        self.num_generations = self.num_samples
        super().__post_init__()

    def _refuse_unless_default(self, name: str, why: str) -> None:
        value = getattr(self, name)
        if value != self.__dataclass_fields__[name].default:
            raise ValueError(f"{name} {why}; got {value!r}")

    @property
    def keeps_anchor(self) -> bool:
        return self.objective == "jeffreys" or self.anchor_kl_coef > 0


def build(setting: Setting) -> BondTrainer:
    """The trainer. Completions of the teacher are not used, only its judgement."""
    return build_with(BondTrainer, setting)


def check(arguments: Arguments, loaded: Loaded) -> None:
    """What on-policy distillation refuses, an anchor without an adapter to be it, and too many samples."""
    args = arguments.training
    if args.keeps_anchor and not arguments.student.use_lora:
        raise UserError(
            f"recipe: objective {args.objective} with anchor_kl_coef {args.anchor_kl_coef} keeps its anchor as a "
            "second adapter, and use_lora is false: set use_lora: true, or take objective: best_of_n_sft"
        )
    if args.keeps_anchor and args.deepspeed_plugin is not None:
        raise UserError(
            f"recipe: objective {args.objective} with anchor_kl_coef {args.anchor_kl_coef} keeps an anchor, which "
            "DeepSpeed leaves out of its checkpoints: a resumed run would be another one. Take --config_file "
            "accelerate_configs/multi_gpu.yaml (on the CPU cpu_ddp.yaml), or objective: best_of_n_sft"
        )
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if (
        args.objective == "jeffreys" and 2 * rows > DRAWS_PER_STEP
    ):  # fresh samples are drawn as well
        raise UserError(
            f"recipe: a window may have {DRAWS_PER_STEP // 2} samples of the anchor a process, got {rows}: lower "
            "gradient_accumulation_steps"
        )
    on_policy.check(arguments, loaded)


@dataclass(frozen=True)
class AnchoredPolicy(Policy):
    """And BOND's anchor, a second adapter in float32; samples of weight 0 are not trained on."""

    def trained_rows(self, arguments, rows):
        args, steps = arguments.training, arguments.training.gradient_accumulation_steps
        if args.objective == "rank_policy_gradient":
            return rows
        # As many as the process has rows of prompts: a winner of each, and beside it what the student draws afresh.
        prompts = max(
            len(fresh_samples(process, rows * steps, args.num_samples))
            for process in range(args.world_size)
        )
        kept = 2 * prompts if args.objective == "jeffreys" else prompts
        return min(kept, max(rows, math.ceil(kept / steps)))

    def copies(self, arguments):
        return {"anchor": 4} if arguments.training.keeps_anchor else {}


METHOD = Method(
    name="bond",
    config=BondConfig,
    teacher_access="black_box",
    build=build,
    paper="arXiv 2407.14622",
    memory=AnchoredPolicy(),
    loss_falls=False,
    check=check,
    engines=("zero2", "zero3"),
    shards_teacher=True,
    checkpoint_files=BondTrainer.checkpoint_files,
    learns="its own samples, by how the teacher ranks them; here the reference stands in for one",
)
