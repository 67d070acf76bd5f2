"""On-policy distillation by REINFORCE: the student learns from its own samples, the teacher is the reward.

    L = − Σ_t ρ_t A_t log π(a_t) − β Σ_t H_t   over completion tokens, divided by their number

A_t is the credit of token t: its return under γ minus a baseline over the prompt's other samples (`losses.policy`,
`rewards`). Each accumulation window's completions are drawn in one go from the student as it is; with
`num_iterations` > 1 they are trained on several times, and ρ, exactly 1 the first time, makes up for the
student having moved on. At gamma 0 and reward token_kl this is on-policy distillation token by token, at gamma 1
the policy gradient of the sequence's reverse KL (MiniLLM, arXiv 2306.08543).

`GRPOTrainer` gives the construction, its config's keys and checks, the sampling of prompts in groups, and the
evaluation's data loading. Not used of it: its generation (drawn from the global random state, so that a
resumed run differs), its advantages (of whole sequences, scaled) and its loss (whole logits).
"""

from dataclasses import MISSING, dataclass, field, fields

from trl import GRPOConfig
from trl.trainer.base_config import _BaseConfig

from medistill_trl.arguments import ChunkArguments
from medistill_trl.errors import UserError
from medistill_trl.inputs import Loaded
from medistill_trl.memory.losses import Policy
from medistill_trl.methods import Method
from medistill_trl.methods.on_policy.trainer import OnPolicyTrainer
from medistill_trl.rewards import RewardArguments, TeacherReward, check_pair
from medistill_trl.rollouts import check_lengths, longest_completion, prompt_rows
from medistill_trl.setting import Arguments, Setting
from medistill_trl.teacher import DRAWS_PER_STEP

# Of the keys GRPOConfig adds, those that mean something here.
USED = {
    "disable_dropout", "entropy_coef", "epsilon", "epsilon_high", "mask_truncated_completions",
    "max_completion_length", "model_init_kwargs", "num_generations", "num_generations_eval",
    "num_iterations", "shuffle_dataset", "trust_remote_code",
}  # fmt: skip


@dataclass
class OnPolicyConfig(RewardArguments, ChunkArguments, GRPOConfig):
    """`trl.GRPOConfig` plus the reward and its credit. β is its `entropy_coef`, K its `num_generations`, ε
    its `epsilon`; keys of it that would change nothing here are refused."""

    NAME = "on_policy"  # in messages
    TRAINS_ON = "student"  # see schema.py
    LIMITS = {
        "gamma": {"min": 0, "max": 1},
        "num_generations": {"min": 2},
        "num_iterations": {"min": 1},
        "entropy_coef": {"min": 0},
        "epsilon": {"above": 0, "below": 1},
        "max_completion_length": {"min": 1},
    }

    gamma: float = field(
        default=1.0,
        metadata={
            "help": "Discount of later rewards in a token's credit: 0 its own only, 1 all that follow."
        },
    )
    baseline: str = field(
        default="leave_one_out",
        metadata={
            "help": "Subtracted from the credit: none, group_mean of the prompt's samples, or "
            "leave_one_out, that of the others.",
            "choices": ["none", "group_mean", "leave_one_out"],
        },
    )
    num_generations: int = field(default=4, metadata={"help": "Samples of each prompt."})
    num_generations_eval: int | None = field(
        default=1, metadata={"help": "Samples of each prompt in an evaluation."}
    )
    num_iterations: int = field(
        default=1, metadata={"help": "Optimizer steps on each window's samples."}
    )
    entropy_coef: float = field(
        default=0.0, metadata={"help": "β, weight of the entropy over the whole vocabulary."}
    )
    epsilon: float = field(
        default=0.2,
        metadata={
            "help": "How far from 1 the ratio of reused samples may go (num_iterations > 1)."
        },
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
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Train without dropout, so that what is trained is what was sampled."},
    )

    def __post_init__(self):
        self.remove_unused_columns = False
        inherited = {item.name for item in fields(_BaseConfig)} | USED
        for item in fields(GRPOConfig):
            default = item.default if item.default is not MISSING else item.default_factory()
            if item.name not in inherited and getattr(self, item.name) != default:
                raise ValueError(
                    f"{item.name} does nothing in {self.NAME} and must be left out, got {getattr(self, item.name)!r}: "
                    "samples are plain draws from the student, one set for each accumulation window"
                )
        if self.mask_truncated_completions and self.truncation_penalty:
            raise ValueError(
                "truncation_penalty must be 0 with mask_truncated_completions, which takes these completions "
                f"out of the loss, got {self.truncation_penalty}"
            )
        super().__post_init__()


def build(setting: Setting) -> OnPolicyTrainer:
    """The trainer. Completions of the teacher are not used, only its judgement."""
    return build_with(OnPolicyTrainer, setting)


def build_with(trainer: type[OnPolicyTrainer], setting: Setting) -> OnPolicyTrainer:
    """`build`, for a subclass."""
    args, teacher_args = setting.arguments.training, setting.arguments.teacher
    args.max_completion_length = longest_completion(setting.arguments)
    return trainer(
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
    check_lengths(arguments)
    needed = args.generation_batch_size // args.num_generations
    if needed > len(loaded.train_prompts):
        raise UserError(
            f"recipe: an accumulation window of {args.generation_batch_size} samples takes {needed} prompts at "
            f"{args.num_generations} samples each, and there are {len(loaded.train_prompts)}: lower "
            "gradient_accumulation_steps or per_device_train_batch_size"
        )
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if rows > DRAWS_PER_STEP:
        raise UserError(f"recipe: a window may have {DRAWS_PER_STEP} samples a process, got {rows}")


METHOD = Method(
    name="on_policy",
    config=OnPolicyConfig,
    teacher_access="black_box",
    build=build,
    paper="arXiv 2306.08543",
    memory=Policy(),
    loss_falls=False,
    check=check,
    engines=("zero2", "zero3"),
    shards_teacher=True,
    checkpoint_files=OnPolicyTrainer.checkpoint_files,
    learns="its own samples, by the teacher's reward; here the reference stands in for one",
)
