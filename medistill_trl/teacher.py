"""What a teacher gives: completions of prompts, and logits or likelihoods on given tokens.

Shapes: P prompt tokens, C completion tokens, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from medistill_trl.errors import NonFinite
from medistill_trl.losses.chunked import CHUNK_SIZE
from medistill_trl.losses.heads import OutputHead
from medistill_trl.losses.policy import token_log_probs
from medistill_trl.losses.token_kl import completion_states
from medistill_trl.out_of_memory import OutOfMemoryWriting
from medistill_trl.prompts import IGNORED, PromptFormat
from medistill_trl.sharding import is_shared_out
from medistill_trl.writer import Writer

if TYPE_CHECKING:  # it takes seconds to import, and an evaluation has no trainer
    from transformers import Trainer

DRAWS_PER_STEP = 4096  # prompts of an accumulation window on one process, at most


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_new_tokens: Length limit, in the model's own tokens.
        temperature: 0 is greedy.
        top_p: Nucleus mass, 1 for all.
        top_k: Likeliest tokens to choose among, 0 for all.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def generate_kwargs(self) -> dict:
        kwargs = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            kwargs |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return kwargs

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Completion:
    """One answer.

    Args:
        text: Without special tokens.
        token_ids: The writer's own tokens, (C,), without an end token.
        finished: True if it ended by itself, False if cut at the length limit.
        end_id: The end token the writer chose; None if it was cut, by the limit or at a stop string.
        seconds: What a stored one took to draw; None where that is not known.
    """

    text: str
    token_ids: list[int]
    finished: bool
    end_id: int | None = None
    seconds: float | None = field(default=None, compare=False)

    @property
    def num_tokens(self) -> int:
        """Tokens the writer chose, the end token among them."""
        return len(self.token_ids) + (self.end_id is not None)


class _FiniteLogits(LogitsProcessor):
    """Refuses to go on from NaN or infinite logits: greedy decoding would write on as if nothing were wrong.

    Args:
        prompts: Of the batch.
    """

    def __init__(self, prompts: Sequence[str]):
        self.prompts = prompts

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        fine_B = scores.amax(
            -1
        ).isfinite()  # NaN if any is NaN, infinite if any is infinite or all are -inf
        if fine_B.all():
            return scores
        bad = (~fine_B).nonzero().flatten().tolist()
        rows = [{"prompt": self.prompts[n], "input_ids": input_ids[n].tolist()} for n in bad]
        raise NonFinite("logits are not finite", rows)


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    form: PromptFormat,
    prompts: Sequence[str],
    sampling: Sampling,
    seed: int = 0,
) -> list[Completion]:
    """Answer rendered prompts in one left-padded batch with a KV cache.

    The global random state is left as it was, so drawing completions never shifts the dropout masks
    of training: a resumed run and an uninterrupted one stay on the same path.

    Args:
        model: Any causal language model; its training mode is restored.
        form: The model's prompt format, whose tokenizer encodes and decodes.
        prompts: Rendered prompts.
        seed: Of the draw, when sampling.

    Raises:
        NonFinite: the model's logits are NaN or infinite.
        OutOfMemoryWriting: there are too many prompts.
    """
    tokenizer = form.tokenizer
    encoded = tokenizer.pad(
        {"input_ids": [form.encode(prompt) for prompt in prompts]},
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _explained(model, prompts):
        torch.manual_seed(seed)
        sequences = model.generate(
            **encoded,
            **sampling.generate_kwargs(),
            use_cache=True,  # the training config switches it off
            stop_strings=form.stop_strings or None,
            tokenizer=tokenizer,
            synced_gpus=is_shared_out(model),
            logits_processor=LogitsProcessorList([_FiniteLogits(prompts)]),
        )
    model.train(was_training)
    ends = set(model.generation_config.eos_token_id)
    prompt_length = encoded["input_ids"].shape[1]
    return [cut(ids, ends, form) for ids in sequences[:, prompt_length:].tolist()]


@contextmanager
def _explained(model: PreTrainedModel, prompts: Sequence[str]) -> Iterator[None]:
    """What goes wrong while a model writes, with the model's name and the number of prompts."""
    try:
        yield
    except NonFinite as error:
        raise NonFinite(
            f"{model.name_or_path or model.config.model_type}: the logits it writes from are NaN or infinite, on "
            f"{len(error.rows)} of {len(prompts)} prompts. Check its weights and its dtype (float16 overflows, "
            "bfloat16 does not)",
            error.rows,
        ) from None
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryWriting(str(error), len(prompts)) from error


def cut(ids: list[int], ends: set[int], form: PromptFormat) -> Completion:
    """Drop EOS, what follows it, and what follows a stop string."""
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    ids, end_id = (ids, None) if stop is None else (ids[:stop], ids[stop])
    tokenizer = form.tokenizer
    text = tokenizer.decode(ids, skip_special_tokens=True)
    found = [text.find(stop) for stop in form.stop_strings if stop in text]
    if found:
        text, end_id = text[: min(found)], None
        while ids and len(tokenizer.decode(ids[:-1], skip_special_tokens=True)) >= len(text):
            ids = ids[:-1]
    return Completion(text, ids, finished=bool(found) or end_id is not None, end_id=end_id)


class Teacher(Writer):
    """The frozen model behind one interface.

    Args:
        model: Frozen causal language model; None if a server has it, see `served_teacher`.
        tokenizer: Its own tokenizer.
        form: Its prompt format.
        identity: Names the exact weights, dtype and quantisation; part of every stored completion's key.
    """

    gives_logits = True  # of given tokens, over the whole vocabulary

    def __init__(
        self,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        form: PromptFormat,
        identity: str,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.form = form
        self.identity = identity
        self.generated_tokens = 0  # on this process, for the run record

    def complete(
        self, prompts: Sequence[str], sampling: Sampling, seed: int = 0
    ) -> list[Completion]:
        """Answer rendered prompts, see `complete`."""
        completions = complete(self.model, self.form, prompts, sampling, seed)
        self.generated_tokens += sum(c.num_tokens for c in completions)
        return completions

    @property
    def writes_with_others(self) -> bool:
        return is_shared_out(self.model)

    @property
    def context_length(self) -> int | None:
        """Tokens it attends to; None for architectures without position embeddings."""
        return context_length(self.model.config)

    def completion_log_probs(
        self,
        examples: Sequence[dict[str, list[int]]],
        vocab_size: int | None = None,
        batch_size: int | None = None,
        chunk_size: int = CHUNK_SIZE,
    ) -> list[torch.Tensor]:
        """log p_T of every completion token, see `completion_log_probs`."""
        return completion_log_probs(self.model, examples, vocab_size, batch_size, chunk_size)

    def check_log_probs(self) -> None:
        """Prove that `completion_log_probs` are the model's own.

        Raises:
            ValueError: its output head does something the loss does not know.
        """
        OutputHead.of(self.model).check(self.model)


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens a model attends to; None for architectures without position embeddings."""
    return config.get_text_config().to_dict().get("max_position_embeddings")


def complete_in_parts(
    writer: Callable[[Sequence[str], Sampling, int], list[Completion]],
    prompts: Sequence[str],
    sampling: Sampling,
    seed: int,
    batch_size: int | None,
) -> list[Completion]:
    """Completions of many prompts, `batch_size` at a time (None: all at once), no two draws of a seed.

    Args:
        writer: `Teacher.complete`, or anything that answers as it does.
        seed: Of the first part; the others count on from it.
    """
    size = batch_size or max(1, len(prompts))
    completions = []
    for start in range(0, len(prompts), size):
        completions += writer(prompts[start : start + size], sampling, seed + start)
    return completions


def draw_seed(run_seed: int, step: int, process: int, num_processes: int) -> int:
    """Of what is drawn at a step: not of what ran before, so that a resumed run draws alike.

    Leaves room for `DRAWS_PER_STEP` draws on each process.
    """
    # torch seeds its CPU generator with the low 32 bits alone, so the run's seed must be in them too.
    offset = int.from_bytes(hashlib.sha256(str(run_seed).encode()).digest()[:4], "big")
    draws = (step * num_processes + process) * DRAWS_PER_STEP
    return (run_seed << 32) + (offset + draws) % 2**32


def window_seed(trainer: "Trainer", step: int | None = None) -> int:
    """`draw_seed` for a trainer's process.

    Args:
        step: By default that of the accumulation window at hand.
    """
    accelerator = trainer.accelerator
    step = trainer.state.global_step if step is None else step
    return draw_seed(trainer.args.seed, step, accelerator.process_index, accelerator.num_processes)


@torch.no_grad()
def completion_logits(
    model: PreTrainedModel, prompt_ids: list[int], completion_ids: list[int]
) -> torch.Tensor:
    """Logits that predict each token of a completion.

    Only these positions go through the output head.

    Args:
        prompt_ids: (P,), not empty.
        completion_ids: (C,).

    Returns:
        (C, V) in the model's dtype: row t is the prediction of `completion_ids[t]`.
    """
    input_ids = torch.tensor([prompt_ids + completion_ids], device=model.device)
    first = len(prompt_ids) - 1  # the last prompt token predicts the first completion token
    positions = torch.arange(first, first + len(completion_ids), device=model.device)
    logits = model(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        logits_to_keep=positions,
        use_cache=False,
    ).logits
    return logits[0]


def predicting_states(
    model: PreTrainedModel, examples: Sequence[dict[str, list[int]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last hidden states that predict the examples' completion tokens, in one right-padded forward.

    Args:
        model: A causal language model, not wrapped by DDP, in the mode it is wanted in.
        examples: `input_ids` and `labels` as `encode_example` gives them.

    Returns:
        States (N, H) and tokens (N,), those of one example after those of another; each has `num_targets`.
    """
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    labels = [torch.tensor(example["labels"]) for example in examples]
    # What stands in the padding is masked and on the right: any token will do.
    hidden_BTH = model.get_decoder()(
        input_ids=pad_sequence(ids, True).to(model.device),
        attention_mask=pad_sequence([torch.ones_like(row) for row in ids], True).to(model.device),
        use_cache=False,
    ).last_hidden_state
    return completion_states(hidden_BTH, pad_sequence(labels, True, IGNORED).to(model.device))


def num_targets(example: dict[str, list[int]]) -> int:
    """Tokens of an example that are predicted: the first of a sequence never is."""
    return sum(label != IGNORED for label in example["labels"][1:])


@torch.no_grad()
def completion_log_probs(
    model: PreTrainedModel,
    examples: Sequence[dict[str, list[int]]],
    vocab_size: int | None = None,
    batch_size: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> list[torch.Tensor]:
    """log p(y_t | x, y_<t) of every completion token, at temperature 1 and without dropout.

    Only the states that predict completion tokens go through the output head, a chunk at a time.

    Args:
        model: A causal language model, not wrapped by DDP; its training mode is restored.
        examples: `input_ids` and `labels` as `encode_example` gives them.
        vocab_size: Leading tokens that the distributions are over; None for all.
        batch_size: Examples in one forward; None for all.
        chunk_size: Tokens whose logits exist at a time.

    Returns:
        (C,) each, float32, nats; empty for an example without completion tokens.
    """
    was_training = model.training
    model.eval()
    head = OutputHead.of(model)
    log_probs = []
    size = batch_size or max(1, len(examples))
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        states_NH, tokens_N = predicting_states(model, part)
        found_N = token_log_probs(
            states_NH, tokens_N, head, vocab_size=vocab_size, chunk_size=chunk_size
        )
        log_probs += found_N.split([num_targets(example) for example in part])
    model.train(was_training)
    return log_probs


def mean_log_likelihoods(log_probs: Sequence[torch.Tensor]) -> list[float]:
    """How likely a model finds completions: the mean log-probability of their tokens, in nats.

    Args:
        log_probs: Of each completion, see `completion_log_probs`.

    Returns:
        At most 0; 0 for a completion without tokens.
    """
    return [values.mean().item() if len(values) else 0.0 for values in log_probs]
