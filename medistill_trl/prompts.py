"""Question → prompt → tokens, for training and evaluation alike.

Each model keeps its own format: its chat template where its tokenizer has one, a plain template
otherwise (base models such as Meditron-7B). Completions travel between models as text.
"""

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from medistill_trl.errors import UserError

PLAIN_TEMPLATE = "{system}### Question:\n{question}\n\n### Answer:\n"
# A base model that has answered goes on with the next heading; this is where its answer ends.
PLAIN_STOP = "\n###"
IGNORED = -100  # label of a token without loss


@dataclass(frozen=True)
class PromptFormat:
    """How one model is asked.

    Args:
        tokenizer: The model's tokenizer; its chat template is used where it has one.
        system_prompt: Instruction before the question, or None.
    """

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None

    @property
    def is_chat(self) -> bool:
        return self.tokenizer.chat_template is not None

    @property
    def stop_strings(self) -> list[str]:
        """Texts at which a completion ends, besides the end-of-sequence token."""
        return [] if self.is_chat else [PLAIN_STOP]

    def render(self, question: str) -> str:
        """The prompt as text.

        Raises:
            UserError: the model's chat template refuses the conversation (some have no system role).
        """
        if not self.is_chat:
            system = f"{self.system_prompt}\n\n" if self.system_prompt else ""
            return PLAIN_TEMPLATE.format(system=system, question=question)
        messages = [{"role": "user", "content": question}]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} refuses the prompt ({error}); "
                "if it has no system role, remove system_prompt from the recipe"
            ) from error

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a rendered prompt.

        It opens with BOS where the tokenizer opens every text so (Llama 2, TinyLlama) and the chat
        template has not written it already.
        """
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        opening = [
            id for id in self.tokenizer("")["input_ids"] if id != self.tokenizer.eos_token_id
        ]
        return ids if ids[: len(opening)] == opening else opening + ids


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, finished: bool
) -> list[int]:
    """Token ids of a completion as it follows a prompt, with EOS if the writer had finished.

    The prompt's own tokens are what the model sees at inference, so they are never re-split: the
    completion's tokens are taken from the joint encoding where that begins with the prompt's, and
    from the completion alone where the boundary would merge.

    Args:
        prompt: Rendered prompt.
        completion: Text without end-of-sequence token.
        finished: False for a completion cut at its length limit: the student must not learn to stop
            there, so no EOS follows.
    """
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    joint = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    if joint[: len(start)] == start:
        ids = joint[len(start) :]
    else:
        ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if finished else ids


def encode_example(
    form: PromptFormat, question: str, completion: str, finished: bool, max_length: int | None
) -> dict[str, list[int]]:
    """One training example: loss on the completion's tokens and its EOS, on nothing else.

    Returns:
        `input_ids` and `labels`, each (time,); labels are `IGNORED` on the prompt. What exceeds
        `max_length` is cut from the completion's end.
    """
    prompt = form.render(question)
    prompt_ids = form.encode(prompt)
    completion_ids = encode_completion(form.tokenizer, prompt, completion, finished)
    if max_length is not None:
        completion_ids = completion_ids[: max(0, max_length - len(prompt_ids))]
    return {
        "input_ids": prompt_ids + completion_ids,
        "labels": [IGNORED] * len(prompt_ids) + completion_ids,
    }
