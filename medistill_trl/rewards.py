"""What the teacher makes of completions the student wrote: rewards, in nats where they are log-probabilities.

    teacher_logprob   mean (or sum) over the completion of log p_T(a_t); one score a completion
    token_kl          r_t = log p_T(a_t) − log p_S(a_t) for every token, a constant to the gradient: the expected
                      sum is −KL(S‖T) of the whole completion (MiniLLM, arXiv 2306.08543)
    sequence          w_l · mean log p_T + w_c · [final answer right], one score a completion; a prompt without
                      a reference answer has the first part only

The teacher reads all completions in batches, one forward each, and its logits exist for a chunk of completion
tokens at a time. With a shared tokenizer it reads the student's own tokens; otherwise the text, in tokens and after
a prompt of its own. token_kl then rewards spans, the pieces of text that both have split into whole tokens
(`spans`), each at its last student token; what a cut completion ends amid earns nothing.

An end token counts as a token only if the student wrote it. A completion cut at its length limit has none, and
may be charged for it. An empty one has score 0 (plus what its answer earns, which is nothing).

Shapes: B completions, T tokens of the longest, C tokens of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from medistill_trl.answer_matching import matches
from medistill_trl.arguments import CoverageArguments
from medistill_trl.errors import NonFinite, UserError
from medistill_trl.losses.chunked import CHUNK_SIZE
from medistill_trl.losses.policy import at_last, span_rewards
from medistill_trl.prompts import IGNORED, PromptFormat, encode_example
from medistill_trl.rationales import RationaleFormat
from medistill_trl.rollouts import Sample, encode_sample
from medistill_trl.setting import Setting
from medistill_trl.span_columns import span_numbers
from medistill_trl.spans import Span, TokenizerPair
from medistill_trl.teacher import Teacher
from medistill_trl.vocabulary import shared_vocabulary

KINDS = ("teacher_logprob", "token_kl", "sequence")
REDUCTIONS = ("mean", "sum")
ANSWER_FORMAT = RationaleFormat(separator="Final answer:", end_marker="", instruction="")


@dataclass
class RewardArguments(CoverageArguments):
    """The keys of the methods that the teacher rewards."""

    LIMITS = {  # see schema.py
        "truncation_penalty": {"min": 0},
        "likelihood_weight": {"min": 0},
        "correctness_weight": {"min": 0},
    }

    reward: str = field(
        default="token_kl",
        metadata={
            "help": "teacher_logprob (the teacher's log-probability of the completion), token_kl (log p_T − "
            "log p_S of every token; of every span of text where tokenizers differ) or sequence (likelihood and "
            "right answers).",
            "choices": ["teacher_logprob", "token_kl", "sequence"],
        },
    )
    logprob_reduction: str = field(
        default="mean",
        metadata={"help": "Of teacher_logprob over the tokens.", "choices": ["mean", "sum"]},
    )
    likelihood_weight: float = field(
        default=1.0, metadata={"help": "Of the mean teacher log-probability in reward sequence."}
    )
    correctness_weight: float = field(
        default=0.0,
        metadata={
            "help": "Of a right final answer in reward sequence, where the prompt has an answer."
        },
    )
    truncation_penalty: float = field(
        default=0.0,
        metadata={"help": "Taken from the reward of a completion cut at the length limit."},
    )


@dataclass(frozen=True)
class Rewards:
    """What some completions earned.

    Args:
        per_token: Every token has a reward of its own; otherwise the score stands at the last one.
        rewards_BT: (B, T), float32; 0 outside of completions.
        scores_B: Σ_t r_t, or the score; that of an empty completion too.
        mask_BT: (B, T), bool, the completions' tokens.
        parts: What the scores were made of, for the log: (n,) each, of those completions it is defined for.
        teacher_log_probs: log p_T of the student's tokens, (C,) each. If the teacher reads text: what makes the
            difference to log p_S the token's reward, or None without such rewards.
        tokens_in_spans: Of each completion, those the reward looked at; None where it does not look at spans.
    """

    per_token: bool
    rewards_BT: torch.Tensor
    scores_B: torch.Tensor
    mask_BT: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    teacher_log_probs: list[torch.Tensor] | None = None
    tokens_in_spans: list[int] | None = None


def answer_is_right(text: str, reference: str) -> bool:
    """Does a completion's final answer, or all of a completion without one, say what the reference says?"""
    parsed = ANSWER_FORMAT.parse(text)
    stated = text if parsed.answer is None else parsed.answer
    return not parsed.answers_differ and matches(stated, reference)


def check_pair(
    kind: str, student: PromptFormat, teacher: PromptFormat, cross_tokenizer: str
) -> None:
    """Refuse a reward that the pair cannot serve.

    Args:
        cross_tokenizer: The recipe's key.

    Raises:
        UserError: naming the rewards that work.
    """
    if kind != "token_kl" or shared_vocabulary(student.tokenizer, teacher.tokenizer) is not None:
        return
    if cross_tokenizer == "refuse":
        raise UserError(
            "reward: token_kl compares the two models token by token, and their tokenizers differ. For this pair "
            "set cross_tokenizer: auto, which compares spans of text; or take reward: teacher_logprob or sequence, "
            "which pass text; or a student with the teacher's tokenizer."
        )
    # Raises where tokens cannot be read as bytes.
    TokenizerPair.of(student.tokenizer, teacher.tokenizer)


@dataclass(frozen=True)
class TeacherReward:
    """The rewards of one pair of models.

    Args:
        teacher: The frozen teacher.
        shared: Token ids the two models share; None if their tokenizers differ.
        tokenizers: Of both models, for token_kl where they differ.
        kind: One of `KINDS`.
        reduction: Of teacher_logprob: `mean`, nats per token, or `sum`, which longer completions pay for.
        likelihood_weight: w_l of sequence.
        correctness_weight: w_c of sequence.
        truncation_penalty: Taken from the score of a completion cut at its length limit, at its last token.
        is_right: (text, reference answer) → whether the final answer is right.
        batch_size: Completions in one forward of the teacher.
        chunk_size: Tokens whose logits exist at a time.

    Raises:
        ValueError: an unknown kind or reduction, or token_kl of other tokens without `tokenizers`.
    """

    teacher: Teacher
    shared: int | None
    kind: str
    reduction: str = "mean"
    likelihood_weight: float = 1.0
    correctness_weight: float = 0.0
    truncation_penalty: float = 0.0
    is_right: Callable[[str, str], bool] = answer_is_right
    batch_size: int = 8
    chunk_size: int = CHUNK_SIZE
    tokenizers: TokenizerPair | None = None

    @classmethod
    def of(cls, setting: Setting) -> "TeacherReward":
        """By the recipe's keys."""
        args, shared = setting.arguments.training, setting.heldout.shared
        tokenizers = None
        if args.reward == "token_kl" and shared is None:
            tokenizers = TokenizerPair.of(setting.form.tokenizer, setting.teacher.tokenizer)
        return cls(
            setting.teacher,
            shared,
            args.reward,
            args.logprob_reduction,
            args.likelihood_weight,
            args.correctness_weight,
            args.truncation_penalty,
            batch_size=args.per_device_train_batch_size,
            chunk_size=args.loss_chunk_size,
            tokenizers=tokenizers,
        )

    def __post_init__(self):
        if self.kind not in KINDS or self.reduction not in REDUCTIONS:
            raise ValueError(
                f"reward must be one of {', '.join(KINDS)} and its reduction one of "
                f"{', '.join(REDUCTIONS)}, got {self.kind!r} and {self.reduction!r}"
            )
        if self.kind == "token_kl" and self.shared is None and self.tokenizers is None:
            raise ValueError(
                "token_kl needs shared tokens, or the two tokenizers to find spans with"
            )

    @property
    def _judges_answers(self) -> bool:
        return self.kind == "sequence" and self.correctness_weight != 0

    def __call__(
        self, samples: Sequence[Sample], student_log_probs: Sequence[torch.Tensor] | None = None
    ) -> Rewards:
        """Rewards of completions, in their order.

        Args:
            samples: At least one.
            student_log_probs: log p_S of each completion's tokens, (C,); only token_kl looks at them.

        Raises:
            NonFinite: a reward is NaN or infinite.
        """
        examples = [self._read(sample) for sample in samples]
        log_probs = self.teacher.completion_log_probs(
            examples, self.shared, self.batch_size, self.chunk_size
        )
        device = log_probs[0].device
        lengths = torch.tensor([len(sample.token_ids) for sample in samples], device=device)
        mask_BT = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
        charges_B = self._charges(samples).to(device)
        parts, in_spans = {}, None
        if self.kind == "token_kl":
            own = [values.to(device) for values in student_log_probs]
            if self.tokenizers is None:
                rewards = [t - s for t, s in zip(log_probs, own, strict=True)]
            else:
                rewards, in_spans = self._by_span(samples, examples, log_probs, own)
                log_probs = [s + reward for s, reward in zip(own, rewards, strict=True)]
            rewards_BT = pad_sequence(rewards, batch_first=True)
            scores_B = rewards_BT.sum(1) - charges_B
            rewards_BT = rewards_BT - at_last(charges_B, mask_BT)
        else:
            scores_B, parts = self._scores(samples, log_probs)
            scores_B = scores_B - charges_B
            rewards_BT = at_last(scores_B, mask_BT)
        aligned = None if self.shared is None and self.tokenizers is None else log_probs
        self._require_finite(samples, rewards_BT, scores_B)
        per_token = self.kind == "token_kl"
        return Rewards(per_token, rewards_BT, scores_B, mask_BT, parts, aligned, in_spans)

    def _require_finite(self, samples, rewards_BT: torch.Tensor, scores_B: torch.Tensor) -> None:
        fine_B = rewards_BT.isfinite().all(1) & scores_B.isfinite()
        if fine_B.all():
            return
        bad = (~fine_B).nonzero().flatten().tolist()
        rows = [
            {
                "question": samples[n].question,
                "completion": samples[n].completion.text,
                "token_ids": samples[n].token_ids,
                "reward": str(scores_B[n].item()),
            }
            for n in bad
        ]
        raise NonFinite(
            f"the rewards ({self.kind}) of {len(bad)} of {len(samples)} samples are NaN or infinite: the logits of "
            "the teacher, or for token_kl of the student, are. Check weights and dtypes (float16 overflows, bfloat16 "
            "does not)",
            rows,
        )

    def _read(self, sample: Sample) -> dict[str, list[int]]:
        """The completion as the teacher reads it."""
        form = self.teacher.form
        if self.shared is not None:
            return encode_sample(form, sample)
        completion = sample.completion
        return encode_example(form, sample.question, completion.text, completion.finished, None)

    def _by_span(
        self,
        samples: Sequence[Sample],
        examples: Sequence[dict[str, list[int]]],
        teacher_log_probs: Sequence[torch.Tensor],
        student_log_probs: Sequence[torch.Tensor],
    ) -> tuple[list[torch.Tensor], list[int]]:
        """The rewards of spans, (C,) each, and how many of the C tokens are in one."""
        found, in_spans = [], []
        columns = zip(samples, examples, teacher_log_probs, student_log_probs, strict=True)
        for sample, example, theirs, own in columns:
            spans = self._spans(sample, [id for id in example["labels"] if id != IGNORED])
            numbers = span_numbers(spans, len(own), len(theirs))
            in_spans.append(sum(number != IGNORED for number in numbers[0]))
            numbers = (
                torch.tensor(column, dtype=torch.long, device=own.device) for column in numbers
            )
            found.append(span_rewards(own, theirs, *numbers))
        return found, in_spans

    def _spans(self, sample: Sample, teacher_ids: list[int]) -> list[Span]:
        completion = sample.completion
        if completion.finished and completion.end_id is None:
            teacher_ids = teacher_ids[:-1]  # the end, which the student did not write as a token
        ended = completion.end_id is not None
        spans = self.tokenizers.spans(sample.token_ids, teacher_ids, completion.text, ended)
        amid = sample.truncated and spans and not spans[-1].exact
        return spans[:-1] if amid else spans

    def _charges(self, samples: Sequence[Sample]) -> torch.Tensor:
        cut = [self.truncation_penalty if sample.truncated else 0.0 for sample in samples]
        return torch.tensor(cut)

    def _scores(
        self, samples: Sequence[Sample], log_probs: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        sums_B = torch.stack([values.sum() for values in log_probs])
        if self.kind == "teacher_logprob" and self.reduction == "sum":
            return sums_B, {"likelihood": sums_B}
        counts = [max(1, len(values)) for values in log_probs]
        means_B = sums_B / torch.tensor(counts, device=sums_B.device)
        parts = {"likelihood": means_B}
        if self.kind == "teacher_logprob":
            return means_B, parts
        scores_B = self.likelihood_weight * means_B
        if self._judges_answers:
            asked = [n for n, sample in enumerate(samples) if sample.answer is not None]
            right = [self.is_right(samples[n].completion.text, samples[n].answer) for n in asked]
            parts["correct"] = torch.tensor(right, dtype=scores_B.dtype, device=scores_B.device)
            scores_B[asked] += self.correctness_weight * parts["correct"]
        return scores_B, parts
