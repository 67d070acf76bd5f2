"""The held-out fidelity check: how close is the student to its teacher on what it never saw?

Every method runs it before and after training, on the same greedy teacher completions of validation
prompts, so that runs compare at a glance. Sums over tokens, float32, nats.

Shapes: C completion tokens, V shared vocabulary.
"""

import math
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, Trainer, TrainerCallback

from medistill_trl.completion_store import CompletionStore
from medistill_trl.data import Prompt
from medistill_trl.errors import UserError
from medistill_trl.guards import require_finite
from medistill_trl.heldout_states import HeldoutStates
from medistill_trl.prompts import PromptFormat, encode_completion
from medistill_trl.teacher import Completion, Sampling, Teacher, complete, completion_logits
from medistill_trl.vocabulary import shared_vocabulary

SERVED = "the teacher is served and gives no logits: KL is not measured, and top-1 is agreement with the tokens it wrote"
ROWS_PER_CHUNK = 256  # float32 copies of the logits are made for this many tokens at a time
NUM_EXAMPLES = 4  # prompts whose answers are shown


@dataclass
class Sums:
    """Sums over tokens of one or many completions.

    Args:
        kl: Σ KL(T‖S), nats.
        ce: −Σ log p_S(teacher's token), nats.
        agreed: Tokens where both models' likeliest token is the same.
        tokens: Predicted tokens, EOS included.
        num_bytes: UTF-8 bytes of the completions.
        teacher_ce: −Σ log p_T(teacher's token), nats; only where the tokenizers differ.
    """

    kl: float = 0.0
    ce: float = 0.0
    agreed: int = 0
    tokens: int = 0
    num_bytes: int = 0
    teacher_ce: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            *(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True))
        )


def compare_logits(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, target_ids: torch.Tensor
) -> Sums:
    """KL(T‖S), cross-entropy and top-1 agreement on one completion.

    Args:
        student_logits: (C, V or more); columns past the shared vocabulary must be cut already.
        teacher_logits: (C, V).
        target_ids: (C,), the teacher's tokens.
    """
    sums = Sums(tokens=len(target_ids))
    for rows in range(0, len(target_ids), ROWS_PER_CHUNK):
        chunk = slice(rows, rows + ROWS_PER_CHUNK)
        log_p_student = student_logits[chunk].float().log_softmax(-1)
        log_p_teacher = teacher_logits[chunk].float().log_softmax(-1)
        sums.kl += F.kl_div(log_p_student, log_p_teacher, reduction="sum", log_target=True).item()
        sums.ce += F.nll_loss(log_p_student, target_ids[chunk], reduction="sum").item()
        sums.agreed += (log_p_student.argmax(-1) == log_p_teacher.argmax(-1)).sum().item()
    return sums


def compare_tokens(student_logits: torch.Tensor, ids: list[int], num_bytes: int) -> Sums:
    """Cross-entropy and top-1 agreement with the tokens that a teacher wrote greedily; no KL.

    Args:
        student_logits: (C, V).
        ids: (C,).
        num_bytes: Of the completion.
    """
    sums = Sums(tokens=len(ids), num_bytes=num_bytes)
    target_ids = torch.tensor(ids, device=student_logits.device)
    parts = student_logits.split(ROWS_PER_CHUNK), target_ids.split(ROWS_PER_CHUNK)
    for logits, target in zip(*parts, strict=True):
        log_p = logits.float().log_softmax(-1)
        sums.ce += F.nll_loss(log_p, target, reduction="sum").item()
        sums.agreed += (log_p.argmax(-1) == target).sum().item()
    return sums


def comparable_ids(completion: Completion, shared: int) -> list[int]:
    """The leading tokens of a completion on which two models can be compared.

    An end token counts only if the writer itself chose it, and the first token that one of the models lacks
    ends the comparison.

    Args:
        shared: Size of the shared vocabulary.
    """
    ends = [] if completion.end_id is None else [completion.end_id]
    return list(takewhile(lambda token: token < shared, completion.token_ids + ends))


@dataclass
class HeldoutCheck:
    """The check for one pair of models.

    Args:
        student_form: The student's prompt format.
        teacher: The frozen teacher.
        prompts: Validation prompts.
        completions: The teacher's greedy completion of each.
        autocast: Measure under bfloat16 autocast, as the student trains. Said here because accelerate
            wraps the student only once training starts: before and after would differ in numerics.

    `states` stand in for the teacher's model once `keep_states` was called.
    """

    student_form: PromptFormat
    teacher: Teacher
    prompts: list[Prompt]
    completions: list[Completion]
    autocast: bool = False
    shared: int | None = field(init=False)
    states: HeldoutStates | None = field(init=False, default=None)
    _teacher_ce: dict[int, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.shared = shared_vocabulary(self.student_form.tokenizer, self.teacher.tokenizer)

    @classmethod
    def prepare(
        cls,
        student_form: PromptFormat,
        teacher: Teacher,
        prompts: list[Prompt],
        store: CompletionStore,
        max_new_tokens: int,
        batch_size: int | None,
        autocast: bool = False,
    ) -> "HeldoutCheck":
        """Draw the teacher's greedy completions, from the store where it has them."""
        rendered = [teacher.form.render(prompt.question) for prompt in prompts]
        drawn = store.draw(
            teacher, rendered, Sampling(max_new_tokens), 1, batch_size, "held-out completions"
        )
        completions = [samples[0] for samples in drawn]
        return cls(student_form, teacher, prompts, completions, autocast)

    def keep_states(self, folder: Path, device: torch.device) -> None:
        """From now on measure without the teacher's model, which is asked only if the folder lacks its states.

        Only where the models share a tokenizer.
        """
        sequences = [self._as_the_teacher_reads(index) for index in range(len(self.prompts))]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            self.states = HeldoutStates.of(self.teacher, sequences, folder, device)

    def measure(self, student: PreTrainedModel) -> dict[str, float | int | str | None]:
        """Compare the models and sum up: `summary` of `compare`."""
        return self.summary(self.compare(student))

    def compare(self, student: PreTrainedModel) -> list[Sums]:
        """The sums of each completion, in the prompts' order; every process measures its share and all get all."""
        was_training = student.training
        student.eval()
        state = PartialState()
        measured = [n for n in range(len(self.prompts)) if self._comparable(n)]
        mine = measured[state.process_index :: state.num_processes]
        # As many on each process: models whose weights are shared out must run equally often on all.
        mine += measured[-1:] * (math.ceil(len(measured) / state.num_processes) - len(mine))
        with torch.autocast(student.device.type, torch.bfloat16, enabled=self.autocast):
            found = [(index, self._compare(student, index)) for index in mine]
        student.train(was_training)
        everyones = dict(gather_object(found))
        return [everyones.get(index, Sums()) for index in range(len(self.prompts))]

    def _comparable(self, index: int) -> bool:
        """Whether the models have a token of this completion in common, or are compared as text."""
        return self.shared is None or bool(comparable_ids(self.completions[index], self.shared))

    def summary(self, sums: list[Sums]) -> dict[str, float | int | str | None]:
        """What all completions together come to.

        Returns:
            `kl_nats`, `ce_nats` and `top1`, means over completion tokens, and `bits_per_byte`. For
            tokenizers that differ, KL and top-1 are not defined: they are None and `note` says so; and there
            is `teacher_bits_per_byte`, on the same text, which the student can hardly go below. Of a served
            teacher there are no logits: KL is None, and so is `teacher_bits_per_byte`; top-1 is that with the
            tokens it wrote, greedily.
        """
        total = sum(sums, Sums())
        if total.tokens == 0:
            raise UserError(
                f"teacher {self.teacher.identity} wrote nothing on {len(self.prompts)} validation prompts: "
                "there is nothing to distil; look at its prompt with --dry_run"
            )
        require_finite(total.kl + total.ce, "the held-out check's KL or cross-entropy")
        result = {
            "kl_nats": total.kl / total.tokens,
            "ce_nats": total.ce / total.tokens,
            "top1": total.agreed / total.tokens,
            "bits_per_byte": total.ce / math.log(2) / max(1, total.num_bytes),
            "tokens": total.tokens,
            "prompts": len(self.prompts),
        }
        if self.shared is None:
            note = "teacher and student have different tokenizers: KL and top-1 are not defined"
            result |= {"kl_nats": None, "top1": None, "note": note}
            if self.teacher.gives_logits:
                bits = total.teacher_ce / math.log(2)
                result["teacher_bits_per_byte"] = bits / max(1, total.num_bytes)
        elif not self.teacher.gives_logits:
            result |= {"kl_nats": None, "note": SERVED}
        return result

    def records(self, sums: list[Sums]) -> list[dict]:
        """A record for each completion: `id`, `tokens`, `bytes`, and sums over its tokens, `kl_nats`, `ce_nats` and
        `agreed`; what different tokenizers leave undefined is None."""
        defined = self.shared is not None
        has_kl = defined and self.teacher.gives_logits
        return [
            {
                "id": prompt.id,
                "tokens": found.tokens,
                "bytes": found.num_bytes,
                "kl_nats": found.kl if has_kl else None,
                "ce_nats": found.ce,
                "agreed": found.agreed if defined else None,
            }
            for prompt, found in zip(self.prompts, sums, strict=True)
        ]

    @torch.no_grad()
    def _compare(self, student: PreTrainedModel, index: int) -> Sums:
        question, completion = self.prompts[index].question, self.completions[index]
        student_prompt = self.student_form.render(question)
        student_prompt_ids = self.student_form.encode(student_prompt)
        num_bytes = len(completion.text.encode())
        if self.shared is None:
            ids = encode_completion(
                self.student_form.tokenizer, student_prompt, completion.text, completion.finished
            )
            logits = completion_logits(student, student_prompt_ids, ids).float()
            target = torch.tensor(ids, device=logits.device)
            ce = F.cross_entropy(logits, target, reduction="sum").item()
            teacher_ce = self._own_ce(index) if self.teacher.gives_logits else 0.0
            return Sums(ce=ce, tokens=len(ids), num_bytes=num_bytes, teacher_ce=teacher_ce)
        # The same tokens after each model's own prompt, so the positions correspond one to one.
        teacher_prompt_ids, ids = self._as_the_teacher_reads(index)
        student_logits = completion_logits(student, student_prompt_ids, ids)[:, : self.shared]
        if self.states is not None:
            teacher_logits = self.states.logits(index)
        elif self.teacher.gives_logits:
            teacher_logits = completion_logits(self.teacher.model, teacher_prompt_ids, ids)
        else:
            return compare_tokens(student_logits, ids, num_bytes)
        teacher_logits = teacher_logits[:, : self.shared]
        target = torch.tensor(ids, device=student_logits.device)
        sums = compare_logits(student_logits, teacher_logits.to(student_logits.device), target)
        sums.num_bytes = num_bytes
        return sums

    def _as_the_teacher_reads(self, index: int) -> tuple[list[int], list[int]]:
        """Token ids of its prompt, and those of the completion that are compared."""
        prompt = self.teacher.form.render(self.prompts[index].question)
        return self.teacher.form.encode(prompt), comparable_ids(
            self.completions[index], self.shared
        )

    def _own_ce(self, index: int) -> float:
        """−Σ log p_T of what the teacher wrote, nats; measured once."""
        if index not in self._teacher_ce:
            completion = self.completions[index]
            prompt = self.teacher.form.render(self.prompts[index].question)
            prompt_ids = self.teacher.form.encode(prompt)
            ends = [] if completion.end_id is None else [completion.end_id]
            ids = completion.token_ids + ends
            logits = completion_logits(self.teacher.model, prompt_ids, ids).float()
            target = torch.tensor(ids, device=logits.device)
            self._teacher_ce[index] = F.cross_entropy(logits, target, reduction="sum").item()
        return self._teacher_ce[index]

    def examples(self, student: PreTrainedModel, max_new_tokens: int) -> list[str]:
        """The student's own greedy answers to the first prompts, for a reader to look at."""
        with torch.autocast(student.device.type, torch.bfloat16, enabled=self.autocast):
            answers = complete(
                student, self.student_form, self.example_prompts(), Sampling(max_new_tokens)
            )
        return [answer.text for answer in answers]

    def example_prompts(self) -> list[str]:
        """Those that `examples` answers, as the student reads them."""
        return [self.student_form.render(p.question) for p in self.prompts[:NUM_EXAMPLES]]


class HeldoutCallback(TrainerCallback):
    """Runs the check at every evaluation and adds it to the training log, for the terminal and trackers too.

    Args:
        check: Of the run's pair.
        trainer: Whose other callbacks show the log. Its own `log` would add what it is collecting of training.
    """

    def __init__(self, check: HeldoutCheck, trainer: Trainer):
        self.check = check
        self.trainer = trainer

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        measured = self.check.measure(model)
        entry = {
            f"heldout_{name}": measured[name]
            for name in ("kl_nats", "ce_nats", "top1")
            if measured[name] is not None
        }
        state.log_history.append({**entry, "epoch": state.epoch, "step": state.global_step})
        shown = {f"eval_{name}": value for name, value in entry.items()}
        self.trainer.callback_handler.on_log(args, state, control, shown)
