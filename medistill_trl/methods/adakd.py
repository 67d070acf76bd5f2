"""AdaKD: Logit-KD whose temperature follows each token.

Two rules, both without gradient through the temperature:

`inverse_confidence`, the report's: T_t = clip(T_base / (c_t + ε), T_min, T_max), c_t = max_v p_S(v).
A student that is sure sees a sharp teacher, one that is not a soft one.

`difficulty`, AdaKD of arXiv 2510.11615: with s_t the distance of the two distributions (Hellinger),
T_t = T_base · exp(−c · tanh(log(s_t / median s))), so hard tokens get a low temperature; and of the
tokens only the hardest share is distilled, a share that follows the loss (its token selection, LATF, see
`TokenFocus`). The median and the selection are over a micro-batch's completion tokens on one process.

Across tokenizers a token is a span (see `losses.span_kl`), and c_t and s_t are those of the outcomes compared.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import TrainerCallback

from medistill_trl.files import write_text
from medistill_trl.losses.comparisons import Comparison
from medistill_trl.losses.token_means import TokenMeans
from medistill_trl.losses.token_terms import InverseConfidence, TemperatureRule
from medistill_trl.memory.losses import Distillation
from medistill_trl.methods import Method
from medistill_trl.methods.logit_kd import LogitKDConfig, LogitKDTrainer, build_with, check
from medistill_trl.setting import Setting

FOCUS = "token_focus.json"  # in a checkpoint


@dataclass
class AdaKDConfig(LogitKDConfig):
    """`LogitKDConfig` plus the temperature rule. `kd_temperature` is not used: `base_temperature` is."""

    LIMITS = {  # see schema.py
        "base_temperature": {"above": 0},
        "min_temperature": {"above": 0},
        "max_temperature": {"above": 0},
        "temperature_epsilon": {"min": 0},
        "difficulty_strength": {"min": 0},
        "token_share": {"above": 0, "max": 1},
        "min_token_share": {"above": 0, "max": 1},
        "token_share_step": {"min": 0, "below": 1},
        "token_share_tolerance": {"above": 0, "below": 1},
        "loss_average_decay": {"min": 0, "below": 1},
    }
    REQUIRES = {
        "teacher_logits": (
            "online",
            "each token has a temperature of its own, which follows the student, and the tail is stored at one",
        )
    }
    UNUSED = {"teacher_logits_top_k": "the teacher's logits are never stored"}

    temperature_rule: str = field(
        default="inverse_confidence",
        metadata={
            "help": "inverse_confidence (the report) or difficulty (arXiv 2510.11615).",
            "choices": ["inverse_confidence", "difficulty"],
        },
    )
    base_temperature: float = field(default=1.0, metadata={"help": "T_base of both rules."})
    min_temperature: float = field(
        default=1.0, metadata={"help": "Lower bound of the temperature, T_min."}
    )
    max_temperature: float = field(
        default=4.0, metadata={"help": "Upper bound of the temperature, T_max."}
    )
    temperature_epsilon: float = field(
        default=1e-6, metadata={"help": "ε added to the confidence (inverse_confidence)."}
    )
    difficulty_strength: float = field(
        default=0.5, metadata={"help": "c: how far difficulty moves the temperature (difficulty)."}
    )
    token_share: float = field(
        default=1.0,
        metadata={
            "help": "Share of the tokens, hardest first, that are distilled at the start (difficulty)."
        },
    )
    min_token_share: float = field(
        default=0.1, metadata={"help": "The share falls no lower (difficulty)."}
    )
    token_share_step: float = field(
        default=0.05,
        metadata={
            "help": "σ: how far the share moves at a time, relative to itself; 0 fixes it (difficulty)."
        },
    )
    token_share_tolerance: float = field(
        default=0.05,
        metadata={
            "help": "ε: relative change of the average divergence that moves the share (difficulty)."
        },
    )
    loss_average_decay: float = field(
        default=0.99, metadata={"help": "Of that running average, per step (difficulty)."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.min_temperature > self.max_temperature:
            raise ValueError(
                f"min_temperature must not exceed max_temperature, got {self.min_temperature} and "
                f"{self.max_temperature}"
            )
        if self.min_token_share > self.token_share:
            raise ValueError(
                f"min_token_share must not exceed token_share, got {self.min_token_share} and "
                f"{self.token_share}"
            )


def difficulty_temperatures(
    scores_N: torch.Tensor, base: float, strength: float, minimum: float, maximum: float
) -> torch.Tensor:
    """T_base · exp(−c · tanh(log(s_t / median s))), clipped; (N,).

    Args:
        scores_N: Distance of the models on each token, at least 0.
    """
    if len(scores_N) == 0:
        return scores_N
    tiny = torch.finfo(scores_N.dtype).tiny  # a token on which the models agree exactly
    relative_N = (scores_N.clamp_min(tiny) / scores_N.median().clamp_min(tiny)).log()
    return (base * torch.exp(-strength * relative_N.tanh())).clamp(minimum, maximum)


def hardest(scores_N: torch.Tensor, share: float) -> torch.Tensor:
    """(N,) 1 for the share of the tokens with the highest scores, 0 for the others."""
    kept_N = torch.zeros_like(scores_N)
    count = max(1, round(share * len(scores_N))) if len(scores_N) else 0
    kept_N[scores_N.topk(count).indices] = 1
    return kept_N


@dataclass
class TokenFocus:
    """LATF of arXiv 2510.11615: the share of the tokens that is distilled follows the loss.

    Where the running average of the divergence has fallen by ε since the share last moved, the student is
    learning, and the share shrinks to the harder tokens: r ← max(r (1−σ), r_min). Where it has risen by ε,
    the share widens: r ← min(r (1+σ), 1). The average is of all completion tokens' divergence, chosen or
    not, so that moving the share does not itself move what it is judged by.

    Args:
        share: r, from 0 to 1.
        average: Nats; None before the first step.
        reference: The average when the share last moved; None until learning rates have warmed up.
    """

    share: float
    average: float | None = None
    reference: float | None = None

    def observe(self, divergence: float, args: AdaKDConfig, warmed_up: bool) -> None:
        """One optimizer step's mean divergence, in nats."""
        decay = args.loss_average_decay
        before = divergence if self.average is None else self.average
        self.average = decay * before + (1 - decay) * divergence
        if self.reference is None:
            self.reference = self.average if warmed_up else None
            return
        change = self.average / self.reference - 1 if self.reference > 0 else 0.0
        if abs(change) <= args.token_share_tolerance:
            return
        factor = 1 - args.token_share_step if change < 0 else 1 + args.token_share_step
        self.share = min(1.0, max(args.min_token_share, self.share * factor))
        self.reference = self.average


class _FollowLoss(TrainerCallback):
    def __init__(self, trainer: "AdaKDTrainer"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.follow_loss()


class AdaKDTrainer(LogitKDTrainer):
    """`LogitKDTrainer` with a temperature per token."""

    _name = "AdaKD"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.focus = TokenFocus(self.args.token_share)
        self._step = TokenMeans()
        # At alpha 0 nothing is distilled, so there is no divergence to follow.
        self.selects = self.args.temperature_rule == "difficulty" and self.args.alpha > 0
        self.follows = self.selects and self.args.token_share_step > 0
        if self.follows:
            self.add_callback(_FollowLoss(self))

    def _temperatures(
        self, comparison: Comparison
    ) -> tuple[float | torch.Tensor | TemperatureRule, torch.Tensor | None]:
        args = self.args
        bounds = args.min_temperature, args.max_temperature
        if args.temperature_rule == "inverse_confidence":
            return InverseConfidence(args.base_temperature, *bounds, args.temperature_epsilon), None
        with self.accelerator.autocast():
            scores_C = comparison.scores("hellinger")
        temperatures_C = difficulty_temperatures(
            scores_C, args.base_temperature, args.difficulty_strength, *bounds
        )
        return temperatures_C, hardest(scores_C, self.focus.share)

    def _record(self, sums: dict[str, torch.Tensor]) -> None:
        super()._record(sums)
        if self.follows and self.model.training:
            self._step.add({name: sums[name] for name in ("tokens", "divergence")})

    def follow_loss(self) -> None:
        """Let the share follow the step that has just been taken, the same on every process."""
        means = self._step.take(self.accelerator)
        warmed_up = self.state.global_step > self.args.get_warmup_steps(self.state.max_steps)
        self.focus.observe(means["divergence_nats"], self.args, warmed_up)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.selects and self.model.training:
            logs = {**logs, "token_share": self.focus.share}
        super().log(logs, start_time)

    # The share belongs to what a resumed run goes on from.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.follows and self.args.should_save:
            write_text(Path(output_dir) / FOCUS, json.dumps(asdict(self.focus)))

    def checkpoint_files(self, step: int) -> set[str]:
        """See `Method`."""
        return {FOCUS} if self.follows else set()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.follows and checkpoint is not None:
            self.focus = TokenFocus(**json.loads((Path(checkpoint) / FOCUS).read_text()))


def build(setting: Setting) -> AdaKDTrainer:
    """The trainer, with stored completions drawn if the recipe asks for them."""
    return build_with(AdaKDTrainer, setting)


METHOD = Method(
    name="adakd",
    config=AdaKDConfig,
    teacher_access="white_box",
    build=build,
    paper="arXiv 2510.11615",
    memory=Distillation(),
    across_tokenizers=True,
    check=check,
    engines=("zero2", "zero3"),
    shards_teacher=True,
    checkpoint_files=AdaKDTrainer.checkpoint_files,
)
