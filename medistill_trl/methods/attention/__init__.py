"""Attention transfer: the student looks where its teacher looks.

    L = (1−α) · CE + α · Σ over layer pairs of D(A_S, A_T)

CE over the tokens the teacher writes; D compares the rows of the two attention maps, or MiniLMv2's
relations, see `losses.attention`. The report: D = Σ over heads ‖A_S − A_T‖².

Both models read the same tokens, in the student's prompt format, since a row is a distribution over the
tokens before it. Where their tokenizers differ each reads its own, and maps over spans of text are compared
(`losses.span_attention`). The maps are recomputed from queries and keys that the forward passes make anyway.
"""

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import PretrainedConfig
from trl import SFTConfig

from medistill_trl.arguments import ChunkArguments, CompletionArguments, CoverageArguments
from medistill_trl.errors import UserError
from medistill_trl.inputs import Loaded
from medistill_trl.layers import LayerArguments, pairs_of
from medistill_trl.losses.attention import most_relation_heads
from medistill_trl.methods import Method
from medistill_trl.methods.attention.memory import AttentionMemory
from medistill_trl.methods.attention.trainer import AttentionTrainer
from medistill_trl.pair_writer import PairWriter, heldout_rows, training_rows
from medistill_trl.setting import Arguments, Setting
from medistill_trl.vocabulary import shared_vocabulary


@dataclass
class AttentionConfig(
    LayerArguments, CompletionArguments, ChunkArguments, CoverageArguments, SFTConfig
):
    """`trl.SFTConfig` plus the attention loss."""

    LIMITS = {  # see schema.py
        "alpha": {"min": 0, "max": 1},
        "num_relation_heads": {"min": 1},
        "attention_chunk_size": {"min": 1},
    }

    alpha: float = field(
        default=0.5,
        metadata={"help": "Weight of the attention loss; 1 - alpha is the cross-entropy's."},
    )
    attention_loss: str = field(
        default="map_mse",
        metadata={
            "help": "map_mse the report's squared difference of attention maps, row_kl KL(T‖S) of each row, "
            "relations MiniLMv2's Q-Q, K-K and V-V.",
            "choices": ["map_mse", "row_kl", "relations"],
        },
    )
    match_all_heads: bool = field(
        default=True,
        metadata={
            "help": "Head h learns from head h, which takes as many heads in both; false compares the means "
            "over heads. Relations regroup heads and do not look at it."
        },
    )
    num_relation_heads: int | None = field(
        default=None,
        metadata={
            "help": "Relation heads that all widths are cut into; left out, as many as the student's heads, or "
            "the most below that divide the widths."
        },
    )
    attention_rows: str = field(
        default="completion",
        metadata={
            "help": "Whose rows are compared: the completion's tokens, or all of the sequence.",
            "choices": ["completion", "all"],
        },
    )
    attention_reduction: str = field(
        default="mean",
        metadata={
            "help": "Over the rows of the whole accumulation window: mean, or sum, the report's bare sum, which grows with "
            "their number, so that alpha must be small.",
            "choices": ["mean", "sum"],
        },
    )
    attention_chunk_size: int = field(
        default=64,
        metadata={"help": "Positions whose rows exist at a time; fewer need less memory."},
    )

    def __post_init__(self):
        # Examples arrive tokenized, or as questions that still await the teacher.
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        self.remove_unused_columns = False
        super().__post_init__()


def check(arguments: Arguments, loaded: Loaded) -> None:
    """Refuse a pair that does not have these layers, heads or tokens."""
    args = arguments.training
    student, teacher = (
        source.config.get_text_config() for source in (loaded.student, loaded.teacher)
    )
    pairs_of(args, student, teacher)
    if args.attention_loss == "relations":
        relation_heads_of(args, student, teacher)
    elif args.match_all_heads and student.num_attention_heads != teacher.num_attention_heads:
        raise UserError(
            f"match_all_heads: the student has {student.num_attention_heads} attention heads and the teacher "
            f"{teacher.num_attention_heads}; set match_all_heads: false to compare the means over heads, or "
            "attention_loss: relations, which regroups heads"
        )
    for role, config in (("student", student), ("teacher", teacher)):
        _check_window(role, config, args.max_length)
    forms = loaded.student_form, loaded.teacher_form
    if shared_vocabulary(*(form.tokenizer for form in forms)) is not None:
        _check_tokens(loaded)
    elif args.attention_rows == "all":
        raise UserError(
            "attention_rows: all compares the rows of the prompts too, and the two models' tokenizers differ: what "
            "their templates have in front of the question does not correspond; take attention_rows: completion"
        )


def relation_heads_of(
    args: AttentionConfig, student: PretrainedConfig, teacher: PretrainedConfig
) -> int | None:
    """R; None where heads are not regrouped.

    Raises:
        UserError: it does not divide the width of both models' queries, keys and values.
    """
    if args.attention_loss != "relations":
        return None
    widths = sorted({width for config in (student, teacher) for width in _widths(config)})
    most = most_relation_heads(widths, student.num_attention_heads)
    if args.num_relation_heads is None:
        return most
    if any(width % args.num_relation_heads for width in widths):
        raise UserError(
            f"num_relation_heads: must divide the widths of queries, keys and values of both models, "
            f"{', '.join(map(str, widths))}; got {args.num_relation_heads}, {most} would do"
        )
    return args.num_relation_heads


def _widths(config: PretrainedConfig) -> tuple[int, int]:
    """Of the query projection, and of the key and value projections."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size


def _check_window(role: str, config: PretrainedConfig, max_length: int | None) -> None:
    window = getattr(config, "sliding_window", None)
    if window is not None and (max_length is None or max_length > window):
        raise UserError(
            f"max_length: is {max_length}, and the {role} ({config.model_type}) attends to the last {window} "
            "tokens only, while the loss compares rows over all of them; lower max_length"
        )


def _check_tokens(loaded: Loaded) -> None:
    """The teacher reads the student's prompts, so it must have all their tokens."""
    form, known = loaded.student_form, len(loaded.teacher_form.tokenizer)
    if len(form.tokenizer) <= known:
        return
    for prompt in loaded.train_prompts + loaded.validation_prompts:
        foreign = [token for token in form.encode(form.render(prompt.question)) if token >= known]
        if foreign:
            raise UserError(
                f"prompt {prompt.id}: the student's prompt has the token "
                f"{form.tokenizer.convert_ids_to_tokens(foreign[0])!r}, which the teacher does not know; for "
                "attention both must read the same. Take a chat template without it, or logit_kd or fitnets, "
                "where each model reads its own prompt"
            )


def build(setting: Setting) -> AttentionTrainer:
    """The trainer, with stored completions drawn if the recipe asks for them."""
    args = setting.arguments.training
    configs = [model.config.get_text_config() for model in (setting.student, setting.teacher.model)]
    writer = PairWriter.of(setting, same_prompt=True)
    return AttentionTrainer(
        model=setting.student,
        args=args,
        train_dataset=Dataset.from_list(training_rows(setting, writer)),
        eval_dataset=Dataset.from_list(heldout_rows(setting, writer)),
        writer=writer,
        pairs=pairs_of(args, *configs),
        relation_heads=relation_heads_of(args, *configs),
    )


METHOD = Method(
    name="attention",
    config=AttentionConfig,
    teacher_access="white_box",
    build=build,
    paper="arXiv 2012.15828",
    memory=AttentionMemory(relation_heads=relation_heads_of),
    check=check,
    engines=("zero2",),
    engine_note="it reads inner layers, which reentrant checkpointing under ZeRO-3 runs without a graph",
    across_tokenizers=True,
)
