"""Teacher completions as both models read them: for the methods that compare inner states."""

from dataclasses import dataclass

from medistill_trl.checkpoints import Totals
from medistill_trl.pairs import encode_completion_pair
from medistill_trl.prompts import PromptFormat
from medistill_trl.setting import Setting
from medistill_trl.teacher import Completion, Sampling, Teacher, complete_in_parts


@dataclass(frozen=True)
class PairWriter:
    """Encodes completions for two models that share a vocabulary, and has the teacher write those missing.

    Args:
        form: The student's prompt format.
        teacher: Writes; its prompts may differ from the student's.
        shared: Token ids the models share.
        sampling: How the teacher writes.
        totals: Where its tokens are counted.
        max_length: Of an example, in tokens; None for no limit.
        batch_size: Prompts per generation; None for all at once.
        same_prompt: Both models read the student's prompt, so that they see the same tokens all along.
    """

    form: PromptFormat
    teacher: Teacher
    shared: int
    sampling: Sampling
    totals: Totals
    max_length: int | None
    batch_size: int | None = None
    same_prompt: bool = False

    @classmethod
    def of(cls, setting: Setting, same_prompt: bool = False) -> "PairWriter":
        return cls(
            form=setting.form,
            teacher=setting.teacher,
            shared=setting.heldout.shared,
            sampling=setting.sampling,
            totals=setting.totals,
            max_length=setting.arguments.training.max_length,
            batch_size=setting.arguments.teacher.teacher_batch_size,
            same_prompt=same_prompt,
        )

    def encode(self, question: str, completion: Completion) -> dict[str, list[int]]:
        """One example, see `encode_completion_pair`."""
        read = self.form if self.same_prompt else self.teacher.form
        return encode_completion_pair(
            self.form, read, self.shared, question, completion, self.max_length
        )

    def examples(self, rows: list[dict], seed: int) -> list[dict[str, list[int]]]:
        """The examples of training rows, as stored or written now.

        Args:
            rows: `{"question", "example"}`; the teacher answers where the example is None.
            seed: Of the draw.
        """
        asked = [row["question"] for row in rows if row["example"] is None]
        before = self.teacher.generated_tokens
        prompts = [self.teacher.form.render(question) for question in asked]
        completions = complete_in_parts(
            self.teacher.complete, prompts, self.sampling, seed, self.batch_size
        )
        self.totals.generated_teacher += self.teacher.generated_tokens - before
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
