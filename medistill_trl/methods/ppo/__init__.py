"""PPO: the student learns from its own samples, judged by the teacher and by a critic on its own trunk.

    L = −Σ_t min(ρ_t A_t, clip(ρ_t, 1−ε, 1+ε) A_t) + c · Σ_t ½ max((V−R)², (V_clip−R)²) − β Σ_t H_t

over completion tokens, divided by their number (Schulman et al. 2017, arXiv 1707.06347). ρ_t = π / π_old, A_t and R_t are
those of GAE(γ, λ) (`losses.advantages`), V and R stand there in units of the first rollout's returns. A token's reward is the teacher's
(`rewards`) minus `kl_coef` times log π − log π_start, where π_start is the student without its adapter (Ziegler et al.
2019, arXiv 1909.08593).

`PPOTrainer` is TRL 1.12's, gone in 1.13: no other module may import it. Used of it: its config's keys and its place in the
model card; see `trainer`.
"""

from dataclasses import dataclass, field, fields

import torch
from trl.experimental.ppo import PPOConfig
from trl.trainer.base_config import _BaseConfig

from medistill_trl.arguments import ChunkArguments
from medistill_trl.errors import UserError
from medistill_trl.inputs import Loaded
from medistill_trl.methods import Method
from medistill_trl.methods.ppo.memory import RolloutMemory
from medistill_trl.methods.ppo.trainer import PPODistillTrainer
from medistill_trl.rewards import RewardArguments, TeacherReward, check_pair
from medistill_trl.rollouts import check_lengths, longest_completion, prompt_rows
from medistill_trl.setting import Arguments, Setting
from medistill_trl.teacher import DRAWS_PER_STEP

# Of the keys PPOConfig adds, those that mean something here, and for some of the others what does.
USED = {"gamma", "lam", "kl_coef", "num_ppo_epochs", "num_mini_batches"}
INSTEAD = {
    "cliprange": "epsilon",
    "cliprange_value": "value_clip",
    "vf_coef": "value_coef",
    "response_length": "max_completion_length",
    "missing_eos_penalty": "truncation_penalty",
    "total_episodes": "max_steps or num_train_epochs",
    "local_rollout_forward_batch_size": "per_device_train_batch_size",
    "whiten_rewards": "whiten_advantages",
}


@dataclass
class PPODistillConfig(RewardArguments, ChunkArguments, PPOConfig):
    """`trl.experimental.ppo.PPOConfig` plus the reward, and the coefficients under the report's names; keys of it that
    would change nothing here are refused."""

    TRAINS_ON = "student"  # see schema.py
    LIMITS = {
        "gamma": {"min": 0, "max": 1},
        "lam": {"min": 0, "max": 1},
        "kl_coef": {"min": 0},
        "num_ppo_epochs": {"min": 1},
        "num_mini_batches": {"min": 1},
        "epsilon": {"above": 0, "below": 1},
        "entropy_coef": {"min": 0},
        "value_clip": {"above": 0},
        "value_coef": {"min": 0},
        "value_learning_rate": {"above": 0},
        "max_completion_length": {"min": 1},
    }

    gamma: float = field(
        default=1.0, metadata={"help": "γ, discount of later rewards: 1 counts all that follow."}
    )
    lam: float = field(
        default=0.95,
        metadata={"help": "λ of GAE: 0 trusts the critic after one token, 1 only what was earned."},
    )
    kl_coef: float = field(
        default=0.05,
        metadata={
            "help": "Penalty on log π − log π_start of every token; needs LoRA, since the start is the student "
            "without its adapter."
        },
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Times each rollout is trained on."})
    num_mini_batches: int = field(
        default=1,
        metadata={
            "help": "Optimizer steps in one time through a rollout, which has so many accumulation windows."
        },
    )
    epsilon: float = field(
        default=0.2, metadata={"help": "ε: how far from 1 the ratio to the old policy may go."}
    )
    entropy_coef: float = field(
        default=0.0, metadata={"help": "β, weight of the entropy over the whole vocabulary."}
    )
    whiten_advantages: bool = field(
        default=True,
        metadata={"help": "Advantages of mean 0 and variance 1 over a rollout's tokens."},
    )
    value_coef: float = field(default=0.1, metadata={"help": "c, weight of the value loss."})
    value_clip: float | None = field(
        default=0.2,
        metadata={
            "help": "How far a value may go from what it was at the rollout, in standard deviations of the first "
            "rollout's returns; null: any way."
        },
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the value head; null: learning_rate."}
    )
    value_gradient_to_trunk: bool = field(
        default=False,
        metadata={"help": "Let the value loss move the student too, not the value head alone."},
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest completion of the student; null: as long as teacher_max_new_tokens."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens that prompt and completion may take together; null: any."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with a model."}
    )

    def __post_init__(self):
        self.remove_unused_columns = False
        inherited = {item.name for item in fields(_BaseConfig)} | USED
        for item in fields(PPOConfig):
            if item.name not in inherited and getattr(self, item.name) != item.default:
                instead = INSTEAD.get(item.name)
                raise ValueError(
                    f"{item.name} does nothing in ppo and must be left out, got {getattr(self, item.name)!r}"
                    + (f"; use {instead}" if instead else "")
                )
        super().__post_init__()
        # The parent's field of this name hides the property that Trainer asks.
        self.world_size = self.distributed_state.num_processes

    @property
    def rollout_size(self) -> int:
        """Samples of a rollout on each process."""
        window = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return window * self.num_mini_batches

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps from one rollout to the next."""
        return self.num_ppo_epochs * self.num_mini_batches


def build(setting: Setting) -> PPODistillTrainer:
    """The trainer. Completions of the teacher are not used, only its judgement."""
    args, teacher_args = setting.arguments.training, setting.arguments.teacher
    student_args = setting.arguments.student
    args.max_completion_length = longest_completion(setting.arguments)
    if student_args.student_load_in_4bit or student_args.student_load_in_8bit:
        # As TRL's stable trainers do (QLoRA, arXiv 2305.14314, section 3), so that methods compare.
        for parameter in setting.student.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return PPODistillTrainer(
        model=setting.student,
        args=args,
        train_dataset=prompt_rows(setting.train_prompts),
        eval_dataset=prompt_rows(setting.heldout.prompts),
        reward=TeacherReward.of(setting),
        form=setting.form,
        totals=setting.totals,
        write_batch_size=teacher_args.teacher_batch_size,
    )


def check(arguments: Arguments, loaded: Loaded) -> None:
    """What only the other keys, the data and the tokenizers show."""
    args = arguments.training
    cross_tokenizer = arguments.teacher.cross_tokenizer
    check_pair(args.reward, loaded.student_form, loaded.teacher_form, cross_tokenizer)
    if args.kl_coef and not arguments.student.use_lora:
        raise UserError(
            f"recipe: kl_coef must be 0 with use_lora: false, got {args.kl_coef}: the start policy is the student "
            "without its adapter"
        )
    check_lengths(arguments)
    needed = args.rollout_size * args.world_size
    if needed > len(loaded.train_prompts):
        raise UserError(
            f"recipe: a rollout takes {needed} prompts (per_device_train_batch_size × "
            "gradient_accumulation_steps × num_mini_batches × processes), and there are "
            f"{len(loaded.train_prompts)}: lower one of them"
        )
    if args.rollout_size > DRAWS_PER_STEP:
        raise UserError(
            f"recipe: a rollout may have {DRAWS_PER_STEP} samples a process, got {args.rollout_size}"
        )


METHOD = Method(
    name="ppo",
    config=PPODistillConfig,
    teacher_access="black_box",
    build=build,
    paper="arXiv 1707.06347",
    memory=RolloutMemory(),
    loss_falls=False,
    checkpoint_files=PPODistillTrainer.checkpoint_files,
    engines=("zero2",),
    engine_note="its trainer does not set the kind of checkpointing that an adapter needs under ZeRO-3",
    check=check,
    learns="its own samples, by the teacher's reward; here the reference stands in for one",
)
