"""The trainer: cross-entropy on teacher completions, and hidden states that follow the teacher's.

Shapes: B batch, T time, N compared tokens of the batch, G the student's hidden size, H the teacher's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl import SFTTrainer

from medistill_trl.coverage import Coverage, span_counts
from medistill_trl.layers import captured, run_through
from medistill_trl.losses.features import FeatureLoss
from medistill_trl.losses.heads import OutputHead, states_before_head
from medistill_trl.losses.span_states import span_states
from medistill_trl.losses.token_kl import completion_states, cross_entropy
from medistill_trl.losses.token_means import TokenMeans
from medistill_trl.methods.fitnets.projections import (
    LeastSquares,
    Projections,
    map_between_heads,
)
from medistill_trl.pair_writer import PairWriter
from medistill_trl.prompts import IGNORED
from medistill_trl.teacher import window_seed

PROJECTIONS = "projections.safetensors"  # beside a checkpoint
MODULE = "distillation_projections"  # their name in the student while it trains


class FitNetsTrainer(SFTTrainer):
    """`SFTTrainer` with a loss on hidden states.

    Args:
        writer: The teacher, and how its completions are encoded for both models.
        pairs: (student layer, teacher layer), counted from 1.
    """

    _name = "FitNets"

    def __init__(self, *args, writer: PairWriter, pairs: list[tuple[int, int]], **kwargs):
        tokenizer = writer.form.tokenizer
        super().__init__(
            *args, data_collator=writer.collator(), processing_class=tokenizer, **kwargs
        )
        self.writer = writer
        self.pairs = pairs
        self.teacher_model = writer.teacher.model
        self.feature_loss = FeatureLoss(self.args.feature_loss, self.args.feature_reduction)
        # compute_loss divides by the window's tokens itself: Trainer must not divide by its steps.
        self.model_accepts_loss_kwargs = True
        self._means = {
            mode: {name: TokenMeans() for name in ("ce", "features", "spans")}
            for mode in ("train", "eval")
        }
        self._coverage = Coverage(self.args.min_coverage, self.is_world_process_zero())
        student = self.accelerator.unwrap_model(self.model)
        OutputHead.of(student).check(student)
        self.projections = None
        if self.args.projects:
            widths = [m.config.get_text_config().hidden_size for m in (student, self.teacher_model)]
            projections = Projections(len(pairs), *widths, self.args.seed)
            self.projections = projections.to(self.args.device)
            # Within the model, where DDP, clipping and the optimizer see them.
            self.model.add_module(MODULE, self.projections)

    # --- completions -----------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        """The window's micro-batches, and its completion tokens over all processes: dividing by them
        makes 1×8 and 8×1 the same step. Each batch also says how many tokens' states are compared."""
        batches = list(islice(epoch_iterator, num_batches))
        rows = [row for batch in batches for row in batch]
        examples = iter(self.writer.examples(rows, window_seed(self)))
        batches = [self.data_collator(list(islice(examples, len(batch)))) for batch in batches]
        num_items = self._get_num_items_in_batch(batches, device)
        if num_items is not None:
            self.writer.totals.trained += int(num_items)
        compared = self._count_compared(batches, device)
        return [batch | {"num_compared": compared} for batch in batches], num_items

    def _count_compared(self, batches: list[dict], device: torch.device) -> torch.Tensor:
        count = sum(self._compared_tokens(batch) for batch in batches).to(device)
        if self.args.average_tokens_across_devices:
            count = self.accelerator.gather(count).sum()
        return count

    def _compared_tokens(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.writer.tokenizers is not None:
            return torch.tensor(len(batch["spans"]))
        if self.args.feature_tokens == "all":
            return _real_tokens(batch).sum()
        return batch["compared"][:, 1:].sum()

    # --- the loss --------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        teacher_states = self._teacher_states(inputs)
        if self.writer.tokenizers is not None:
            self._means[self._mode]["spans"].add(span_counts(inputs))
        student = self.accelerator.unwrap_model(model)
        layers = [layer for layer, _ in self.pairs]
        with captured(student, layers) as states:
            hidden_BTH, last_logits = states_before_head(model, student, inputs)
        student_states = [self._compared(states[layer], inputs, "") for layer in layers]
        compared = inputs.get("num_compared")
        if compared is None:
            compared = self._count_compared([inputs], self.args.device)
        loss = self.args.alpha * self._features(student_states, teacher_states, compared)
        if self.args.alpha < 1:
            tokens = num_items_in_batch
            if tokens is None:
                tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
            ce = self._cross_entropy(student, hidden_BTH, inputs["labels"])
            loss = loss + (1 - self.args.alpha) * ce / tokens.clamp_min(1)
        else:
            # What lies behind the last mapped layer gets a gradient of zero, which DDP waits for.
            loss = loss + 0 * last_logits.sum()
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients over processes
        return (loss, ModelOutput()) if return_outputs else loss

    def _features(
        self,
        student_states: list[torch.Tensor],
        teacher_states: list[torch.Tensor],
        compared: torch.Tensor,
    ) -> torch.Tensor:
        """The sum over pairs.

        Args:
            student_states: (N, G) each.
            teacher_states: (N, H) each.
            compared: Tokens of the window, over all processes.
        """
        loss = 0.0
        sums = {"tokens": torch.tensor(float(len(teacher_states[0])), device=compared.device)}
        rows = zip(self.pairs, student_states, teacher_states, strict=True)
        for n, ((layer, teacher_layer), student_NG, teacher_NH) in enumerate(rows):
            teacher_NH = teacher_NH.to(student_NG.device)
            if self.projections is not None:
                student_NG = self.projections[n](student_NG.float())
            total = self.feature_loss.token_sum(student_NG, teacher_NH)
            sums[f"{self.feature_loss.kind}_{layer}_{teacher_layer}"] = total.detach().float()
            loss = loss + self.feature_loss.reduce(
                total, compared.clamp_min(1), teacher_NH.shape[1]
            )
        self._means[self._mode]["features"].add(sums)
        return loss

    def _cross_entropy(
        self, student: PreTrainedModel, hidden_BTH: torch.Tensor, labels_BT: torch.Tensor
    ) -> torch.Tensor:
        """The sum over completion tokens."""
        with self.accelerator.autocast():
            loss, sums = cross_entropy(
                hidden_BTH, labels_BT, OutputHead.of(student), self.args.loss_chunk_size
            )
        self._means[self._mode]["ce"].add(sums)
        return loss

    @torch.no_grad()
    def _teacher_states(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """(N, H) of each pair's layer; no later layer is run."""
        layers = [layer for _, layer in self.pairs]
        with captured(self.teacher_model, layers) as states:
            run_through(
                self.teacher_model,
                max(layers),
                inputs["teacher_input_ids"],
                inputs["teacher_attention_mask"],
            )
        return [self._compared(states[layer], inputs, "teacher_") for layer in layers]

    def _compared(
        self, hidden_BTH: torch.Tensor, inputs: dict[str, torch.Tensor], side: str
    ) -> torch.Tensor:
        """The states (N, H) of the tokens or spans that are compared, in the same order for both models.

        Args:
            side: Of the batch's columns: empty for the student's, `teacher_` for the teacher's.
        """
        device = hidden_BTH.device
        if self.writer.tokenizers is not None:
            states_NH, _ = completion_states(hidden_BTH, inputs[f"{side}labels"].to(device))
            bounds_S2 = inputs["spans"][:, 2:] if side else inputs["spans"][:, :2]
            return span_states(states_NH, bounds_S2.to(device), self.args.span_pooling)
        if self.args.feature_tokens == "all":  # both models read the same row
            return hidden_BTH[_real_tokens(inputs).to(device)]
        labels_BT = inputs["labels"]
        compared_N = inputs["compared"][:, 1:][labels_BT[:, 1:] != IGNORED].bool()
        states_NH, _ = completion_states(hidden_BTH, inputs[f"{side}labels"].to(device))
        return states_NH[compared_N.to(device)]

    # --- the projections -------------------------------------------------------------------------

    def start_projections(self, examples: list[dict]) -> None:
        """Initialise the projections as the recipe says, before training and alike on all processes.

        Args:
            examples: Encoded completions, for the least squares.
        """
        student = self.accelerator.unwrap_model(self.model)
        if self.args.projection_init == "heads":
            heads = [m.get_output_embeddings().weight for m in (student, self.teacher_model)]
            rows = self.writer.same_tokens
            heads = [w[own].to(self.args.device) for w, own in zip(heads, rows, strict=True)]
            self.projections.start_at([(map_between_heads(*heads), None)] * len(self.pairs))
        if self.args.projection_init == "least_squares":
            self.projections.start_at(fit.solve() for fit in self._fit(student, examples))

    @torch.no_grad()
    def _fit(self, student: PreTrainedModel, examples: list[dict]) -> list[LeastSquares]:
        layers = [layer for layer, _ in self.pairs]
        fits = [LeastSquares() for _ in self.pairs]
        was_training = student.training
        student.eval()
        quiet = not self.accelerator.is_main_process or self.args.disable_tqdm
        for example in tqdm(examples, "fitting projections", unit="completion", disable=quiet):
            batch = self._prepare_inputs(self.data_collator([example]))
            with captured(student, layers) as states, self.accelerator.autocast():
                run_through(student, max(layers), batch["input_ids"], batch["attention_mask"])
            theirs = self._teacher_states(batch)
            for fit, layer, teacher_NH in zip(fits, layers, theirs, strict=True):
                student_NG = self._compared(states[layer], batch, "")
                fit.add(student_NG, teacher_NH.to(student_NG.device))
        student.train(was_training)
        return fits

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The projections are a parameter group of their own, with their learning rate and no decay."""
        if self.optimizer is not None or self.projections is None:
            return super().create_optimizer(model)
        with self._student_alone():
            optimizer = super().create_optimizer(model)
        group = {"params": list(self.projections.parameters()), "weight_decay": 0.0}
        optimizer.add_param_group(group | {"lr": self.args.projection_lr})
        return optimizer

    @contextmanager
    def _student_alone(self) -> Iterator[None]:
        """The student without the projections, as it is saved."""
        if self.projections is None:
            yield
            return
        del self.model._modules[MODULE]
        try:
            yield
        finally:
            self.model.add_module(MODULE, self.projections)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None:  # DeepSpeed's, taken of all it trains
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith(f"{MODULE}.")}
        with self._student_alone():
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.projections is not None and self.args.should_save:
            save_file(self.projections.state_dict(), Path(output_dir) / PROJECTIONS)

    def checkpoint_files(self, step: int) -> set[str]:
        """See `Method`."""
        return {PROJECTIONS} if self.projections is not None else set()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        with self._student_alone():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.projections is not None:
            path = Path(resume_from_checkpoint) / PROJECTIONS
            self.projections.load_state_dict(load_file(path, device=str(self.args.device)))

    # --- the log ---------------------------------------------------------------------------------

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds means per token since the last log, over all processes."""
        prefix = "" if self._mode == "train" else "eval_"
        for means in self._means[self._mode].values():
            taken = means.take(self.accelerator)
            self._coverage.check(taken)
            logs = logs | {prefix + name: value for name, value in taken.items()}
        super().log(logs, start_time)


def _real_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T), without padding and without closing tokens, which only the student learns."""
    closing = (batch["labels"] != IGNORED) & (batch["compared"] == 0)
    return batch["attention_mask"].bool() & ~closing
