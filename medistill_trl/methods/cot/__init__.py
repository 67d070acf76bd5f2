"""Chain of thought: the student learns to reason first and to answer then, from rationales the teacher writes.

    L = Σ_t w_t CE_t / Σ_t w_t   over the tokens of rationale, separator and answer

with w = `rationale_weight` on the rationale and `answer_weight` on separator, answer and end: 1 and 1 by
default, the report's plain cross-entropy. The teacher samples several rationales of each prompt; those that are
well formed, short enough and end in the right answer pass (Ho et al. 2022, arXiv 2212.10071), ranked by
self-consistency (Wang et al. 2022, arXiv 2203.11171) and by how likely the teacher finds them.

Rationales pass as text, so the two models may have different tokenizers.
"""

from dataclasses import dataclass, field, replace

from datasets import Dataset
from trl import SFTConfig

from medistill_trl.arguments import ChunkArguments
from medistill_trl.data import Prompt
from medistill_trl.methods import Method
from medistill_trl.methods.cot.examples import plain_example, training_examples
from medistill_trl.methods.cot.trainer import CoTTrainer
from medistill_trl.rationale_selection import Selection
from medistill_trl.rationales import Limits, RationaleFormat
from medistill_trl.setting import Setting
from medistill_trl.teacher import Sampling


@dataclass
class CoTConfig(ChunkArguments, SFTConfig):
    """`trl.SFTConfig` plus how rationales are drawn, filtered, chosen and weighted."""

    REQUIRES = {  # see schema.py
        "teacher_completions": (
            "stored",
            "rationales of one prompt are compared before any is trained on",
        )
    }
    LIMITS = {
        "num_rationales": {"min": 1},
        "sampling_temperature": {"min": 0},
        "rationale_max_new_tokens": {"min": 1},
        "min_rationale_tokens": {"min": 0},
        "max_rationale_tokens": {"min": 1},
        "max_answer_tokens": {"min": 1},
        "top_k_rationales": {"min": 1},
        "rationale_weight": {"min": 0},
        "answer_weight": {"min": 0},
    }

    num_rationales: int = field(
        default=4, metadata={"help": "Rationales the teacher samples for each prompt."}
    )
    sampling_temperature: float = field(
        default=0.7,
        metadata={"help": "Of the rationales; plain completions keep teacher_temperature."},
    )
    rationale_max_new_tokens: int = field(
        default=256,
        metadata={"help": "Longest rationale with its answer, in teacher tokens."},
    )
    rationale_separator: str = field(
        default="Final answer:",
        metadata={"help": "Plain text between rationale and answer, at the beginning of a line."},
    )
    end_marker: str = field(
        default="",
        metadata={"help": "Plain text that closes the answer; empty: the end token alone does."},
    )
    rationale_instruction: str = field(
        default="First think step by step: give the reasons in a few short sentences. Then write a new line "
        'that starts with "{separator}" and gives only the answer, in as few words as possible.',
        metadata={
            "help": "What the teacher is told after the question; {separator} stands for the separator."
        },
    )
    student_sees_instruction: bool = field(
        default=False,
        metadata={
            "help": "Ask the student with the instruction too. false: the plain question, as in evaluation."
        },
    )
    min_rationale_tokens: int = field(
        default=10, metadata={"help": "Shortest rationale, in student tokens."}
    )
    max_rationale_tokens: int = field(
        default=256, metadata={"help": "Longest rationale, in student tokens."}
    )
    max_answer_tokens: int = field(
        default=48, metadata={"help": "Longest final answer, in student tokens."}
    )
    check_answer: bool = field(
        default=True,
        metadata={
            "help": "Keep only rationales that end in the prompt's `answer`, where it has one."
        },
    )
    keep: str = field(
        default="best",
        metadata={
            "help": "Of the rationales that pass: the best one, all, or the top_k_rationales best.",
            "choices": ["best", "all", "top_k"],
        },
    )
    top_k_rationales: int = field(
        default=2, metadata={"help": "How many rationales of a prompt are kept (keep: top_k)."}
    )
    rank_by: str = field(
        default="vote",
        metadata={
            "help": "vote: the share of the prompt's answers that say the same; likelihood: the teacher's mean "
            "log-likelihood. The other decides ties.",
            "choices": ["vote", "likelihood"],
        },
    )
    keep_contradictory: bool = field(
        default=False,
        metadata={"help": "Keep rationales of one prompt that end in different answers."},
    )
    on_no_rationale: str = field(
        default="fallback",
        metadata={
            "help": "A prompt that keeps no rationale: fallback trains on the teacher's plain completion of it, "
            "as SFT does; drop leaves it out.",
            "choices": ["fallback", "drop"],
        },
    )
    rationale_weight: float = field(
        default=1.0, metadata={"help": "Weight of the loss on a rationale's tokens."}
    )
    answer_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight on separator, answer and end, and on all tokens of a plain completion."
        },
    )

    def __post_init__(self):
        # Examples arrive tokenized.
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        self.remove_unused_columns = False
        super().__post_init__()
        if self.num_rationales > 1 and self.sampling_temperature == 0:
            raise ValueError(
                f"num_rationales is {self.num_rationales} and sampling_temperature 0: greedy rationales of one "
                "prompt are all alike; raise the temperature or ask for one"
            )
        weights_differ = self.rationale_weight != self.answer_weight
        if weights_differ and self.loss_type != "chunked_nll":
            raise ValueError(
                f"loss_type: {self.loss_type} knows no weights, and rationale_weight is {self.rationale_weight}, "
                f"answer_weight {self.answer_weight}; leave loss_type out, or make them equal"
            )
        if self.min_rationale_tokens > self.max_rationale_tokens:
            raise ValueError(
                f"min_rationale_tokens must not exceed max_rationale_tokens, got {self.min_rationale_tokens} "
                f"and {self.max_rationale_tokens}"
            )
        if self.rationale_weight == self.answer_weight == 0:
            raise ValueError("rationale_weight and answer_weight are both 0: nothing is learnt")
        self._check_texts()

    def _check_texts(self) -> None:
        if not self.rationale_separator.strip(" :*_#>-"):
            raise ValueError(
                f"rationale_separator must hold a word or a sign, got {self.rationale_separator!r}"
            )
        texts = {"rationale_separator": self.rationale_separator, "end_marker": self.end_marker}
        for name, value in texts.items():
            if value != value.strip() or "\n" in value:
                raise ValueError(f"{name} must be one line without blanks around it, got {value!r}")
        if "{separator}" not in self.rationale_instruction:
            raise ValueError(
                "rationale_instruction must hold {separator}, or the teacher is not told what to write, got "
                f"{self.rationale_instruction!r}"
            )

    def rationale_format(self) -> RationaleFormat:
        return RationaleFormat(
            self.rationale_separator, self.end_marker, self.rationale_instruction
        )

    def limits(self) -> Limits:
        return Limits(
            self.min_rationale_tokens,
            self.max_rationale_tokens,
            self.max_answer_tokens,
            self.check_answer,
        )

    def rationale_sampling(self, plain: Sampling) -> Sampling:
        """As plain completions are drawn, but longer and at a temperature of its own."""
        return replace(
            plain,
            max_new_tokens=self.rationale_max_new_tokens,
            temperature=self.sampling_temperature,
        )

    def selection(self) -> Selection:
        return Selection(self.keep, self.top_k_rationales, self.rank_by, self.keep_contradictory)


def build(setting: Setting) -> CoTTrainer:
    """The trainer, on the rationales that are kept; results/rationales.jsonl says what became of each."""
    heldout = zip(setting.heldout.prompts, setting.heldout.completions, strict=True)
    return CoTTrainer(
        model=setting.student,
        args=setting.arguments.training,
        train_dataset=Dataset.from_list(training_examples(setting)),
        eval_dataset=Dataset.from_list([plain_example(setting, p, c) for p, c in heldout]),
        form=setting.form,
        totals=setting.totals,
    )


def example(config: CoTConfig, prompt: Prompt) -> tuple[str, str]:
    """What the teacher is asked, and what the student learns, with the reference for a rationale."""
    form = config.rationale_format()
    target = "".join(form.render(prompt.reference, prompt.answer or "..."))
    return form.ask(prompt.question), target


METHOD = Method(
    name="cot",
    config=CoTConfig,
    teacher_access="black_box",
    build=build,
    paper="arXiv 2212.10071",
    example=example,
    engines=("zero2", "zero3"),
)
