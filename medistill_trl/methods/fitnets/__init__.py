"""FitNets: the student's hidden states follow the teacher's, layer by layer.

    L = (1−α) · CE + α · Σ over layer pairs (s, h), over tokens t: ‖P_s(g_t) − h_t‖²

with g and h the outputs of the two layers and P an affine map that is learned beside the student (Romero et al.
2015, arXiv 1412.6550, "hints"; for transformers TinyBERT, arXiv 1909.10351, and PKD, arXiv 1908.09355). CE is on
what the teacher writes. By default the squared error is divided by ‖h_t‖², and a mean over tokens. Where the tokenizers
differ t are spans of text, and g and h pooled states (`losses.span_states`).

Neither model keeps hidden states but those of its mapped layers, the teacher is run to its last mapped layer
only, and logits exist for one chunk of tokens at a time.
"""

import logging
from dataclasses import dataclass, field

from datasets import Dataset
from trl import SFTConfig

from medistill_trl.arguments import ChunkArguments, CompletionArguments, CoverageArguments
from medistill_trl.errors import UserError
from medistill_trl.inputs import Loaded
from medistill_trl.layers import LayerArguments, pairs_of
from medistill_trl.losses.features import FeatureLoss
from medistill_trl.methods import Method
from medistill_trl.methods.fitnets.memory import FeatureMemory
from medistill_trl.methods.fitnets.trainer import FitNetsTrainer
from medistill_trl.pair_writer import PairWriter, heldout_rows, training_rows
from medistill_trl.setting import Arguments, Setting
from medistill_trl.vocabulary import shared_vocabulary

logger = logging.getLogger(__name__)


@dataclass
class FitNetsConfig(
    LayerArguments, CompletionArguments, ChunkArguments, CoverageArguments, SFTConfig
):
    """`trl.SFTConfig` plus the loss on hidden states and the projections."""

    LIMITS = {  # see schema.py
        "alpha": {"above": 0, "max": 1},
        "projection_lr": {"above": 0},
        "projection_init_prompts": {"min": 1},
    }

    alpha: float = field(
        default=0.5,
        metadata={"help": "Weight of the hidden states; 1 - alpha is the cross-entropy's."},
    )
    feature_loss: str = field(
        default="normalised_mse",
        metadata={
            "help": "mse (FitNets and the report), normalised_mse (over the teacher state's squared norm, so "
            "that alpha means the same at every layer), cosine, or cka, which needs no projection.",
            "choices": ["mse", "normalised_mse", "cosine", "cka"],
        },
    )
    feature_reduction: str = field(
        default="mean",
        metadata={
            "help": "mean over tokens and (mse) dimensions; sum over both is the report's formula.",
            "choices": ["mean", "sum"],
        },
    )
    feature_tokens: str = field(
        default="completion",
        metadata={
            "help": "completion: the states that predict the completion's tokens. all: those of the prompt "
            "too, if both models are asked alike.",
            "choices": ["completion", "all"],
        },
    )
    span_pooling: str = field(
        default="mean",
        metadata={
            "help": "Where the tokenizers differ, of the states that predict a span of text: their mean, or the "
            "first, up to which both models have read the same.",
            "choices": ["mean", "first"],
        },
    )
    use_projections: bool = field(
        default=True,
        metadata={
            "help": "Map the student's states to the teacher's width; false needs equal widths. cka has none."
        },
    )
    projection_lr: float = field(
        default=1e-4, metadata={"help": "Learning rate of the projections, same schedule."}
    )
    projection_init: str = field(
        default="least_squares",
        metadata={
            "help": "least_squares on the first completions, heads (the teacher head's pseudo-inverse times "
            "the student's head), or orthogonal.",
            "choices": ["least_squares", "heads", "orthogonal"],
        },
    )
    projection_init_prompts: int = field(
        default=32,
        metadata={"help": "Training prompts whose completions the least squares takes."},
    )

    def __post_init__(self):
        # Examples arrive tokenized, or as prompts that still await the teacher.
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        self.remove_unused_columns = False
        super().__post_init__()

    @property
    def projects(self) -> bool:
        """Whether there are projections; CKA compares states of any widths."""
        return self.use_projections and self.feature_loss != "cka"


def check(arguments: Arguments, loaded: Loaded) -> None:
    """Refuse layers, widths and tokens that the pair does not have."""
    args = arguments.training
    student, teacher = (
        source.config.get_text_config() for source in (loaded.student, loaded.teacher)
    )
    pairs = pairs_of(args, student, teacher)
    if (
        not args.projects
        and args.feature_loss != "cka"
        and student.hidden_size != teacher.hidden_size
    ):
        raise UserError(
            f"use_projections: false compares states as they are, and the student's are {student.hidden_size} wide, "
            f"the teacher's {teacher.hidden_size}; set it to true, or take feature_loss: cka"
        )
    if args.feature_tokens == "all":
        _require_same_prompts(loaded)
    logger.info(
        "hidden states (%s): %s",
        FeatureLoss(args.feature_loss, args.feature_reduction),
        ", ".join(f"student layer {s} ← teacher layer {t}" for s, t in pairs),
    )


def _require_same_prompts(loaded: Loaded) -> None:
    tokenizers = (form.tokenizer for form in (loaded.student_form, loaded.teacher_form))
    if shared_vocabulary(*tokenizers) is None:
        raise UserError(
            "feature_tokens: all compares the prompts' tokens too, and the two models' tokenizers differ; take "
            "feature_tokens: completion, which compares spans of the completion's text"
        )
    question = loaded.train_prompts[0].question
    ids = [
        form.encode(form.render(question)) for form in (loaded.student_form, loaded.teacher_form)
    ]
    if ids[0] != ids[1]:
        raise UserError(
            "feature_tokens: all compares the prompts' tokens too, and the two models are asked in different "
            "formats (see --dry_run), so these do not correspond; take feature_tokens: completion"
        )


def build(setting: Setting) -> FitNetsTrainer:
    """The trainer, with stored completions drawn if the recipe asks for them, and projections fitted."""
    args = setting.arguments.training
    configs = [model.config.get_text_config() for model in (setting.student, setting.teacher.model)]
    writer = PairWriter.of(setting)
    trainer = FitNetsTrainer(
        model=setting.student,
        args=args,
        train_dataset=Dataset.from_list(training_rows(setting, writer)),
        eval_dataset=Dataset.from_list(heldout_rows(setting, writer)),
        writer=writer,
        pairs=pairs_of(args, *configs),
    )
    if args.projects:
        trainer.start_projections(_first_examples(setting, writer))
    return trainer


def _first_examples(setting: Setting, writer: PairWriter) -> list[dict]:
    """Completions of the first training prompts, by way of the store: the same on every process."""
    args = setting.arguments.training
    if args.projection_init != "least_squares":
        return []
    questions = [p.question for p in setting.train_prompts[: args.projection_init_prompts]]
    drawn = setting.draw(questions, setting.sampling, 1, "completions for the projections")
    return [
        writer.encode(question, samples[0])
        for question, samples in zip(questions, drawn, strict=True)
    ]


METHOD = Method(
    name="fitnets",
    config=FitNetsConfig,
    teacher_access="white_box",
    build=build,
    paper="arXiv 1412.6550",
    memory=FeatureMemory(),
    check=check,
    checkpoint_files=FitNetsTrainer.checkpoint_files,
    engines=("zero2",),
    engine_note="it reads inner layers, which reentrant checkpointing under ZeRO-3 runs without a graph",
    across_tokenizers=True,
)
