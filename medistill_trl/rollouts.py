"""Completions a student writes to learn from: whose prompts come when, how they are drawn, padded for
training, and summed up for the log.

Shapes: B completions, L tokens of the longest with its prompt, C tokens of one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from trl.trainer.utils import RepeatSampler

from medistill_trl.data import Prompt
from medistill_trl.errors import UserError
from medistill_trl.prompts import IGNORED, PromptFormat
from medistill_trl.setting import Arguments
from medistill_trl.teacher import Completion, Sampling, complete, complete_in_parts


def prompt_rows(prompts: Sequence[Prompt]) -> Dataset:
    """What a sample is written for: rows of `question` and `answer`."""
    return Dataset.from_list([{"question": p.question, "answer": p.answer} for p in prompts])


def longest_completion(arguments: Arguments) -> int:
    """Tokens a sample may have: `max_completion_length`, or as many as the teacher's completions."""
    asked = arguments.training.max_completion_length
    return arguments.teacher.teacher_max_new_tokens if asked is None else asked


def check_lengths(arguments: Arguments) -> None:
    """Refuse samples that would not fit into `max_length`.

    Raises:
        UserError: naming both lengths.
    """
    longest = arguments.data.max_prompt_tokens + longest_completion(arguments)
    limit = arguments.training.max_length
    if limit is not None and longest > limit:
        raise UserError(
            f"recipe: max_prompt_tokens + max_completion_length is {longest}, more than max_length: {limit}"
        )


@dataclass(frozen=True)
class Sample:
    """One completion of the student.

    Args:
        question: What it was asked.
        completion: What it wrote.
        answer: The reference answer, where there is one.
    """

    question: str
    completion: Completion
    answer: str | None = None

    @property
    def token_ids(self) -> list[int]:
        """The tokens it chose, (C,), its end token among them if it chose one."""
        end_id = self.completion.end_id
        return [*self.completion.token_ids, *([] if end_id is None else [end_id])]

    @property
    def truncated(self) -> bool:
        """It was cut, at the length limit or where the teacher could not read on."""
        return not self.completion.finished

    def readable(self, shared: int | None) -> "Sample":
        """Cut before the first token the teacher does not have, as if the limit had come there.

        Args:
            shared: Token ids the models share; None if they exchange text.
        """
        ids = self.token_ids
        known = ids if shared is None else list(takewhile(lambda token: token < shared, ids))
        if len(known) == len(ids):
            return self
        return replace(self, completion=Completion(self.completion.text, known, finished=False))


class PromptSampler(RepeatSampler):
    """`RepeatSampler` whose order depends on seed and epoch alone; the parent's is drawn from a generator
    that a resumed run would begin anew.

    Args:
        epoch: Tells the current epoch.
    """

    def __init__(self, *args, epoch: Callable[[], int], **kwargs):
        super().__init__(*args, **kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


def write_samples(
    student: PreTrainedModel,
    form: PromptFormat,
    rows: Sequence[dict],
    sampling: Sampling,
    seed: int,
    batch_size: int | None = None,
) -> list[Sample]:
    """One completion of each row.

    Args:
        student: Not wrapped by DDP.
        rows: `question` and `answer`; a question may come several times.
        seed: Of the first batch; the others count on from it.
        batch_size: Prompts per generation; None for all at once.
    """

    def write(prompts, sampling, seed):
        return complete(student, form, prompts, sampling, seed)

    prompts = [form.render(row["question"]) for row in rows]
    completions = complete_in_parts(write, prompts, sampling, seed, batch_size)
    return [
        Sample(row["question"], completion, row["answer"])
        for row, completion in zip(rows, completions, strict=True)
    ]


def encode_sample(form: PromptFormat, sample: Sample) -> dict[str, list[int]]:
    """The sample's own tokens after a model's prompt: `input_ids` and `labels` as in `encode_example`."""
    prompt_ids = form.encode(form.render(sample.question))
    return {
        "input_ids": prompt_ids + sample.token_ids,
        "labels": [IGNORED] * len(prompt_ids) + sample.token_ids,
    }


def training_batch(
    examples: Sequence[dict[str, list[int]]],
    values: Sequence[torch.Tensor],
    learnt: Sequence[bool],
    pad_token_id: int,
) -> dict[str, torch.Tensor]:
    """Examples padded on the right, (B, L) each.

    Args:
        examples: From `encode_sample`.
        values: A number for each completion token, (C,) each or longer.
        learnt: Whether the completion's tokens keep their labels.

    Returns:
        `input_ids`, `attention_mask`, `labels` (`IGNORED` on prompts, padding and what is not learnt) and
        `values`, each where its token stands.
    """
    columns = {"input_ids": [], "attention_mask": [], "labels": [], "values": []}
    for example, value, wanted in zip(examples, values, learnt, strict=True):
        ids, labels = torch.tensor(example["input_ids"]), torch.tensor(example["labels"])
        written = labels != IGNORED
        placed = torch.zeros(len(ids)).masked_scatter(written, value.cpu().float())
        columns["input_ids"].append(ids)
        columns["attention_mask"].append(torch.ones_like(ids))
        columns["labels"].append(labels if wanted else torch.full_like(labels, IGNORED))
        columns["values"].append(placed)
    padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED, "values": 0.0}
    return {name: pad_sequence(columns[name], True, padding[name]) for name in columns}


def split_batch(batch: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """A batch of `training_batch` as several of equal size.

    Args:
        batch: Columns (B, L), and columns (N,) of a number for each completion token that is learnt.
        parts: They divide B.
    """
    labels_BL = batch["labels"]
    tokens = [int((part[:, 1:] != IGNORED).sum()) for part in labels_BL.chunk(parts)]
    columns = {
        name: tensor.chunk(parts) if tensor.dim() == 2 else tensor.split(tokens)
        for name, tensor in batch.items()
    }
    return [{name: column[n] for name, column in columns.items()} for n in range(parts)]


def token_log_ratios(
    own: Sequence[torch.Tensor], others: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """log p_S − log p of another model of each completion's tokens, (C,) each, on the student's device."""
    return [mine - other.to(mine.device) for mine, other in zip(own, others, strict=True)]


def summary(
    samples: Sequence[Sample],
    scores_B: torch.Tensor,
    parts: dict[str, torch.Tensor],
    log_ratios: dict[str, Sequence[torch.Tensor]],
    tokens_in_spans: Sequence[int] | None = None,
) -> dict[str, float]:
    """What is logged of completions, over all processes, which all must ask.

    Args:
        scores_B: Their rewards.
        parts: What the rewards were made of, (n,) each.
        log_ratios: By name, log p_S − log p of another model for the tokens of the completions, or of some of them, (C,)
            each: their mean estimates KL(S‖other) per token.
        tokens_in_spans: See `rewards.Rewards`.
    """
    mine = {
        "reward": scores_B.tolist(),
        "tokens": [len(sample.token_ids) for sample in samples],
        "truncated": [float(sample.truncated) for sample in samples],
        "empty": [float(not sample.token_ids) for sample in samples],
        **{f"part {name}": values.tolist() for name, values in parts.items()},
        **{name: [v.sum().item() for v in values] for name, values in log_ratios.items()},
        **{f"tokens {name}": [len(v) for v in values] for name, values in log_ratios.items()},
        **({} if tokens_in_spans is None else {"in spans": tokens_in_spans}),
    }
    everyone = gather_object([mine])
    pooled = {
        name: torch.tensor([value for part in everyone for value in part[name]], dtype=torch.double)
        for name in mine
    }
    reward, tokens = pooled["reward"], pooled["tokens"]
    total = tokens.sum().clamp_min(1)
    means = {f"reward_{name}": pooled[f"part {name}"] for name in parts}
    kl = {
        f"{name}_nats": pooled[name].sum() / pooled[f"tokens {name}"].sum().clamp_min(1)
        for name in log_ratios
    }
    logged = {
        "reward_mean": reward.mean(),
        "reward_std": reward.std(correction=0),
        **{name: values.mean() for name, values in means.items() if len(values)},
        **kl,
        **({"span_share": pooled["in spans"].sum() / total} if "in spans" in pooled else {}),
        "completion_tokens_mean": tokens.mean(),
        "completion_tokens_min": tokens.min(),
        "completion_tokens_max": tokens.max(),
        "truncation_rate": pooled["truncated"].mean(),
        "empty_rate": pooled["empty"].mean(),
    }
    return {name: value.item() for name, value in logged.items()}
