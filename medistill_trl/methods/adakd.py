"""AdaKD: Logit-KD whose temperature follows each token.

Two rules, both without gradient through the temperature:

`inverse_confidence`, the report's: T_t = clip(T_base / (c_t + ε), T_min, T_max), c_t = max_v p_S(v).
A student that is sure sees a sharp teacher, one that is not a soft one.

`difficulty`, AdaKD of arXiv 2510.11615: with s_t the distance of the two distributions (Hellinger),
T_t = T_base · exp(−c · tanh(log(s_t / median s))), so hard tokens get a low temperature; and of the
tokens only the hardest share `token_share` is distilled (its token selection, LATF). The median and the
selection are over a micro-batch's completion tokens on one process.
"""

from dataclasses import dataclass, field

import torch

from medistill_trl.losses.heads import OutputHead
from medistill_trl.losses.token_kl import token_scores
from medistill_trl.losses.token_terms import InverseConfidence, TemperatureRule
from medistill_trl.memory_plan import distillation_memory
from medistill_trl.methods import Method
from medistill_trl.methods.logit_kd import LogitKDConfig, LogitKDTrainer, build_with
from medistill_trl.setting import Setting


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
    }

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
        metadata={"help": "Share of the tokens, hardest first, that are distilled (difficulty)."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.min_temperature > self.max_temperature:
            raise ValueError(
                f"min_temperature must not exceed max_temperature, got {self.min_temperature} and "
                f"{self.max_temperature}"
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


class AdaKDTrainer(LogitKDTrainer):
    """`LogitKDTrainer` with a temperature per token."""

    _name = "AdaKD"

    def _temperatures(
        self,
        heads: tuple[OutputHead, OutputHead],
        student_NH: torch.Tensor,
        teacher_NH: torch.Tensor,
    ) -> tuple[float | torch.Tensor | TemperatureRule, torch.Tensor | None]:
        args = self.args
        bounds = args.min_temperature, args.max_temperature
        if args.temperature_rule == "inverse_confidence":
            return InverseConfidence(args.base_temperature, *bounds, args.temperature_epsilon), None
        with self.accelerator.autocast():
            scores_N = token_scores(
                student_NH,
                teacher_NH,
                *heads,
                score="hellinger",
                vocab_size=self.shared,
                chunk_size=args.loss_chunk_size,
            )
        temperatures_N = difficulty_temperatures(
            scores_N, args.base_temperature, args.difficulty_strength, *bounds
        )
        return temperatures_N, hardest(scores_N, args.token_share)


def build(setting: Setting) -> AdaKDTrainer:
    """The trainer, with stored completions drawn if the recipe asks for them."""
    return build_with(AdaKDTrainer, setting)


METHOD = Method(
    name="adakd",
    config=AdaKDConfig,
    teacher_access="white_box",
    build=build,
    paper="arXiv 2510.11615",
    loss_memory=distillation_memory,
)
