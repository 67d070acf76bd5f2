"""Completions as both models read them: for the methods that compare logits or inner states."""

from dataclasses import dataclass

from medistill_trl.checkpoints import Totals
from medistill_trl.pairs import PairCollator, encode_completion_pair
from medistill_trl.prompts import PromptFormat
from medistill_trl.setting import Setting
from medistill_trl.span_pairs import SpanCollator, encode_span_pair
from medistill_trl.spans import TokenizerPair
from medistill_trl.teacher import Completion, Sampling, Teacher, complete_in_parts


@dataclass(frozen=True)
class PairWriter:
    """Encodes completions for two models, and has the teacher write those missing.

    Args:
        form: The student's prompt format.
        teacher: Writes; its prompts may differ from the student's.
        shared: Token ids the models share; None if their tokenizers differ.
        sampling: How the teacher writes.
        totals: Where its tokens are counted.
        max_length: Of an example, in tokens; None for no limit.
        batch_size: Prompts per generation; None for all at once.
        same_prompt: Both models read the student's prompt, so that they see the same tokens all along. Of different
            tokenizers each reads its own, and the span of every token is told, the prompts' too.
        tokenizers: Of models whose tokenizers differ; None where they share one.
    """

    form: PromptFormat
    teacher: Teacher
    shared: int | None
    sampling: Sampling
    totals: Totals
    max_length: int | None
    batch_size: int | None = None
    same_prompt: bool = False
    tokenizers: TokenizerPair | None = None

    @classmethod
    def of(cls, setting: Setting, same_prompt: bool = False) -> "PairWriter":
        shared = setting.heldout.shared
        sides = setting.form.tokenizer, setting.teacher.tokenizer
        return cls(
            form=setting.form,
            teacher=setting.teacher,
            shared=shared,
            sampling=setting.sampling,
            totals=setting.totals,
            max_length=setting.arguments.training.max_length,
            batch_size=setting.arguments.teacher.teacher_batch_size,
            same_prompt=same_prompt,
            tokenizers=TokenizerPair.of(*sides) if shared is None else None,
        )

    def encode(
        self, question: str, completion: Completion, by_student: bool = False
    ) -> dict[str, list]:
        """One example, see `encode_completion_pair` and, across tokenizers, `encode_span_pair`.

        Args:
            by_student: The student wrote it, not the teacher.
        """
        if self.tokenizers is not None:
            forms = self.form, self.teacher.form
            return encode_span_pair(
                self.tokenizers,
                *forms,
                question,
                completion,
                self.max_length,
                by_student,
                with_columns=self.same_prompt,
            )
        read = self.form if self.same_prompt else self.teacher.form
        return encode_completion_pair(
            self.form, read, self.shared, question, completion, self.max_length
        )

    def collator(self) -> PairCollator:
        """What pads these examples."""
        pad = self.form.tokenizer.pad_token_id
        if self.tokenizers is None:
            return PairCollator(pad)
        return SpanCollator(pad, self.teacher.tokenizer.pad_token_id)

    @property
    def same_tokens(self) -> tuple[slice | list[int], slice | list[int]]:
        """Rows of the student's and of the teacher's output head that stand for the same tokens, in order."""
        if self.tokenizers is None:
            return slice(self.shared), slice(self.shared)
        return self.tokenizers.overlap.student_ids, self.tokenizers.overlap.teacher_ids

    def complete(self, questions: list[str], seed: int) -> list[Completion]:
        """What the teacher writes now.

        Args:
            seed: Of the draw.
        """
        before = self.teacher.generated_tokens
        prompts = [self.teacher.form.render(question) for question in questions]
        completions = complete_in_parts(
            self.teacher.complete, prompts, self.sampling, seed, self.batch_size
        )
        self.totals.generated_teacher += self.teacher.generated_tokens - before
        return completions

    def examples(self, rows: list[dict], seed: int) -> list[dict[str, list[int]]]:
        """The examples of training rows, as stored or written now.

        Args:
            rows: `{"question", "example"}`; the teacher answers where the example is None.
            seed: Of the draw.
        """
        asked = [row["question"] for row in rows if row["example"] is None]
        completions = self.complete(asked, seed)
        written = iter(
            self.encode(question, completion)
            for question, completion in zip(asked, completions, strict=True)
        )
        return [next(written) if row["example"] is None else row["example"] for row in rows]


def training_rows(setting: Setting, writer: PairWriter) -> list[dict]:
    """`{"question", "example"}` for each training prompt; the example is None until the teacher has written.

    Stored completions are drawn now: `num_completions` rows for each prompt.
    """
    prompts = setting.train_prompts
    if setting.arguments.teacher.teacher_completions == "online":
        return [{"question": prompt.question, "example": None} for prompt in prompts]
    drawn = setting.stored_completions(setting.arguments.training.num_completions)
    return [
        {"question": prompt.question, "example": writer.encode(prompt.question, completion)}
        for prompt, completions in zip(prompts, drawn, strict=True)
        for completion in completions
    ]


def heldout_rows(setting: Setting, writer: PairWriter) -> list[dict[str, list[int]]]:
    """Examples of the held-out check's completions, for the evaluation loss."""
    check = setting.heldout
    pairs = zip(check.prompts, check.completions, strict=True)
    return [writer.encode(prompt.question, completion) for prompt, completion in pairs]
