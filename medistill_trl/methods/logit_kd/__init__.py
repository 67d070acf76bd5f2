"""Logit-KD: match the teacher's next-token distribution on each token the teacher writes.

    L = Σ_t (1−α) CE_t + α T² D(p_T, p_S; T)_t   over completion tokens, divided by their number

with D the forward KL by default (Hinton et al. 2015, arXiv 1503.02531; the report's α and T). A fraction
`lmbda` of the completions may come from the student itself (GKD, arXiv 2306.13649): these have no
right tokens, so they carry the divergence alone.

`GKDTrainer` gives the construction, the collation hooks and the sampling keys. Not used of it: its loss
(no CE, no T², whole logits) and its way to draw completions (per micro-batch, normalised by other tokens).
"""

from dataclasses import dataclass, field

from datasets import Dataset
from trl.experimental.gkd import GKDConfig

from medistill_trl.arguments import ChunkArguments, CompletionArguments, CoverageArguments
from medistill_trl.errors import UserError
from medistill_trl.inputs import Loaded
from medistill_trl.losses import divergences
from medistill_trl.memory.losses import Distillation
from medistill_trl.methods import Method
from medistill_trl.methods.logit_kd.stored import StoredLogitKDTrainer
from medistill_trl.methods.logit_kd.trainer import LogitKDTrainer
from medistill_trl.pair_writer import PairWriter, heldout_rows, training_rows
from medistill_trl.setting import Arguments, Setting
from medistill_trl.teacher_server import check_top_k
from medistill_trl.vocabulary import shared_vocabulary


@dataclass
class LogitKDConfig(CompletionArguments, ChunkArguments, CoverageArguments, GKDConfig):
    """`trl.experimental.gkd.GKDConfig` plus the loss. `beta` is the jsd's, `temperature` and
    `max_new_tokens` are of the student's own completions (`lmbda` > 0)."""

    LIMITS = {  # see schema.py
        "alpha": {"min": 0, "max": 1},
        "kd_temperature": {"above": 0},
        "skew": {"above": 0, "below": 1},
        "lmbda": {"min": 0, "max": 1},
        "teacher_logits_top_k": {"min": 1},
    }

    alpha: float = field(
        default=0.5,
        metadata={"help": "Weight of the divergence; 1 - alpha is the cross-entropy's."},
    )
    kd_temperature: float = field(
        default=2.0,
        metadata={"help": "Softmax temperature T of the divergence, which is scaled by T²."},
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "forward_kl KL(T‖S), reverse_kl KL(S‖T), jsd (with beta), skew_kl and "
            "skew_reverse_kl (with skew).",
            "choices": ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"],
        },
    )
    skew: float = field(
        default=0.1, metadata={"help": "Share mixed in by the skew divergences (DistiLLM)."}
    )
    lmbda: float = field(
        default=0.0,
        metadata={
            "help": "Share of completions the student writes itself (GKD's λ); 0 is the report."
        },
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature of the student's own completions."}
    )
    teacher_logits: str = field(
        default="online",
        metadata={
            "help": "online: the teacher reads every micro-batch. stored: it reads every stored completion once, before "
            "training; its likeliest tokens are kept beside `completion_store`, and it is not in memory afterwards. A "
            "served teacher needs stored, and kd_temperature: 1.",
            "choices": ["online", "stored"],
        },
    )
    teacher_logits_top_k: int = field(
        default=64,
        metadata={
            "help": "Tokens kept of each of the teacher's distributions, the others as one tail (stored only)."
        },
    )

    def __post_init__(self):
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        self.remove_unused_columns = False
        super().__post_init__()

    def divergence_function(self) -> divergences.Divergence:
        if self.divergence == "jsd":
            return divergences.by_name("jsd", beta=self.beta)
        skewed = self.divergence in ("skew_kl", "skew_reverse_kl")
        return divergences.by_name(self.divergence, **({"skew": self.skew} if skewed else {}))


def build(setting: Setting) -> LogitKDTrainer:
    """The trainer, with what the recipe wants stored drawn and read by the teacher."""
    stored = setting.arguments.training.teacher_logits == "stored"
    return _build_stored(setting) if stored else build_with(LogitKDTrainer, setting)


def build_with(trainer: type[LogitKDTrainer], setting: Setting) -> LogitKDTrainer:
    """`build`, for a subclass."""
    writer = PairWriter.of(setting)
    return trainer(
        model=setting.student,
        args=setting.arguments.training,
        train_dataset=Dataset.from_list(training_rows(setting, writer)),
        eval_dataset=Dataset.from_list(heldout_rows(setting, writer)),
        writer=writer,
    )


def _build_stored(setting: Setting) -> StoredLogitKDTrainer:
    writer = PairWriter.of(setting)
    rows, heldout = training_rows(setting, writer), heldout_rows(setting, writer)
    logits = setting.teacher_logits(
        [*(row["example"] for row in rows), *heldout],
        setting.arguments.training.teacher_logits_top_k,
        setting.arguments.training.kd_temperature,
    )
    return StoredLogitKDTrainer(
        model=setting.student,
        args=setting.arguments.training,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(heldout),
        writer=writer,
        logits=logits,
    )


def check(arguments: Arguments, loaded: Loaded) -> None:
    """Refuse what would have processes wait for each other, and distributions over tokens that one model lacks.

    Raises:
        UserError: the student writes some of the completions under ZeRO-3, where how many is chance; or teacher
            logits are to be stored, and the tokenizers differ, or a server gives fewer.
    """
    training = arguments.training
    plugin, lmbda = training.deepspeed_plugin, training.lmbda
    if plugin is not None and plugin.zero_stage == 3 and lmbda > 0:
        raise UserError(
            f"lmbda: must be 0 under ZeRO-3, where all processes have to write equally often, got {lmbda}; take "
            "--config_file accelerate_configs/zero2.yaml, or method: on_policy"
        )
    if training.teacher_logits == "stored":
        _check_stored(arguments, loaded)


def _check_stored(arguments: Arguments, loaded: Loaded) -> None:
    shared = shared_vocabulary(loaded.student_form.tokenizer, loaded.teacher_form.tokenizer)
    if shared is None:
        local = "" if loaded.server is None else " and teacher_backend: local"
        raise UserError(
            "teacher_logits: stored keeps distributions over tokens, and the tokenizers of this pair differ; set "
            f"teacher_logits: online{local}, which compares spans of the same text"
        )
    if loaded.server is not None:
        k = min(arguments.training.teacher_logits_top_k, shared)
        # Tokens that the student lacks may be among the likeliest, and as many more are asked for then.
        check_top_k(loaded.server, k + len(loaded.teacher_form.tokenizer) - shared)


def keeps_teacher(arguments: Arguments) -> bool:
    """Whether training asks the teacher's model."""
    return arguments.training.teacher_logits == "online"


METHOD = Method(
    name="logit_kd",
    config=LogitKDConfig,
    teacher_access="white_box",
    build=build,
    paper="arXiv 1503.02531",
    memory=Distillation(),
    across_tokenizers=True,
    check=check,
    engines=("zero2", "zero3"),
    shards_teacher=True,
    keeps_teacher=keeps_teacher,
    served_with={
        "teacher_logits": ("stored", "a server is asked once, not at every step"),
        "kd_temperature": (1.0, "a server says at no other what all other tokens have together"),
    },
)
