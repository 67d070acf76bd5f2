"""On-policy distillation by REINFORCE: the student learns from its own samples, the teacher is the reward.

    L = − Σ_t ρ_t A_t log π(a_t) − β Σ_t H_t   over completion tokens, divided by their number

A_t is the credit of token t: its return under γ minus a baseline over the prompt's other samples (`losses.policy`,
`rewards`). Each accumulation window's completions are drawn in one go from the student as it is; with
`num_iterations` > 1 they are trained on several times, and ρ, exactly 1 the first time, makes up for the
student having moved on. At gamma 0 and reward token_kl this is on-policy distillation token by token, at gamma 1
the policy gradient of the sequence's reverse KL (MiniLLM, arXiv 2306.08543).

`GRPOTrainer` gives the construction, its config's keys and checks, the sampling of prompts in groups, and the
evaluation's data loading. Not used of it: its generation (drawn from the global random state, so that a
resumed run differs), its advantages (of whole sequences, scaled) and its loss (whole logits).
"""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from time import monotonic

import torch
from datasets import Dataset
from peft import PeftModel
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.base_config import _BaseConfig
from trl.trainer.utils import RepeatSampler

from medistill_trl.checkpoints import Totals
from medistill_trl.errors import UserError
from medistill_trl.losses.heads import OutputHead, last_hidden_states
from medistill_trl.losses.policy import policy_loss, sequence_advantages, token_advantages
from medistill_trl.losses.token_kl import completion_states
from medistill_trl.losses.token_means import TokenMeans
from medistill_trl.memory_plan import policy_memory
from medistill_trl.methods import Method
from medistill_trl.prompts import IGNORED, PromptFormat
from medistill_trl.rewards import Rewards, TeacherReward, completion_log_probs
from medistill_trl.rollouts import (
    Sample,
    prompt_and_completion,
    summary,
    training_batch,
    write_samples,
)
from medistill_trl.setting import Setting
from medistill_trl.teacher import DRAWS_PER_STEP, Sampling, draw_seed

# Of the keys GRPOConfig adds, those that mean something here.
USED = {
    "disable_dropout", "entropy_coef", "epsilon", "epsilon_high", "mask_truncated_completions",
    "max_completion_length", "model_init_kwargs", "num_generations", "num_generations_eval",
    "num_iterations", "shuffle_dataset", "trust_remote_code",
}  # fmt: skip


@dataclass
class OnPolicyConfig(GRPOConfig):
    """`trl.GRPOConfig` plus the reward and its credit. β is its `entropy_coef`, K its `num_generations`, ε
    its `epsilon`; keys of it that would change nothing here are refused."""

    LIMITS = {  # see schema.py
        "gamma": {"min": 0, "max": 1},
        "truncation_penalty": {"min": 0},
        "likelihood_weight": {"min": 0},
        "correctness_weight": {"min": 0},
        "loss_chunk_size": {"min": 1},
        "num_generations": {"min": 2},
        "num_iterations": {"min": 1},
        "entropy_coef": {"min": 0},
        "epsilon": {"above": 0, "below": 1},
        "max_completion_length": {"min": 1},
    }

    reward: str = field(
        default="token_kl",
        metadata={
            "help": "teacher_logprob (the teacher's log-probability of the completion), token_kl (log p_T − "
            "log p_S of every token; needs a shared tokenizer) or sequence (likelihood and right answers).",
            "choices": ["teacher_logprob", "token_kl", "sequence"],
        },
    )
    logprob_reduction: str = field(
        default="mean",
        metadata={"help": "Of teacher_logprob over the tokens.", "choices": ["mean", "sum"]},
    )
    likelihood_weight: float = field(
        default=1.0, metadata={"help": "Of the mean teacher log-probability in reward sequence."}
    )
    correctness_weight: float = field(
        default=0.0,
        metadata={
            "help": "Of a right final answer in reward sequence, where the prompt has an answer."
        },
    )
    truncation_penalty: float = field(
        default=0.0,
        metadata={"help": "Taken from the reward of a completion cut at the length limit."},
    )
    gamma: float = field(
        default=1.0,
        metadata={
            "help": "Discount of later rewards in a token's credit: 0 its own only, 1 all that follow."
        },
    )
    baseline: str = field(
        default="leave_one_out",
        metadata={
            "help": "Subtracted from the credit: none, group_mean of the prompt's samples, or "
            "leave_one_out, that of the others.",
            "choices": ["none", "group_mean", "leave_one_out"],
        },
    )
    num_generations: int = field(default=4, metadata={"help": "Samples of each prompt."})
    num_generations_eval: int | None = field(
        default=1, metadata={"help": "Samples of each prompt in an evaluation."}
    )
    num_iterations: int = field(
        default=1, metadata={"help": "Optimizer steps on each window's samples."}
    )
    entropy_coef: float = field(
        default=0.0, metadata={"help": "β, weight of the entropy over the whole vocabulary."}
    )
    epsilon: float = field(
        default=0.2,
        metadata={
            "help": "How far from 1 the ratio of reused samples may go (num_iterations > 1)."
        },
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest completion of the student; null: as long as teacher_max_new_tokens."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens that prompt and completion may take together; null: any."},
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Train without dropout, so that what is trained is what was sampled."},
    )
    loss_chunk_size: int = field(
        default=256,
        metadata={"help": "Tokens whose logits exist at a time; fewer need less memory."},
    )

    def __post_init__(self):
        self.remove_unused_columns = False
        inherited = {item.name for item in fields(_BaseConfig)} | USED
        for item in fields(GRPOConfig):
            default = item.default if item.default is not MISSING else item.default_factory()
            if item.name not in inherited and getattr(self, item.name) != default:
                raise ValueError(
                    f"{item.name} does nothing in on_policy and must be left out, got {getattr(self, item.name)!r}: "
                    "samples are plain draws from the student, one set for each accumulation window"
                )
        if self.mask_truncated_completions and self.truncation_penalty:
            raise ValueError(
                "truncation_penalty must be 0 with mask_truncated_completions, which takes these completions "
                f"out of the loss, got {self.truncation_penalty}"
            )
        super().__post_init__()


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


class OnPolicyTrainer(GRPOTrainer):
    """`GRPOTrainer` with rewards per token, and a loss without whole logits.

    Args:
        reward: The teacher.
        form: The student's prompt format.
        totals: Where tokens are counted.
        write_batch_size: Prompts per generation; None for a whole window at once.
    """

    _name = "On-policy distillation"

    def __init__(
        self,
        *args,
        reward: TeacherReward,
        form: PromptFormat,
        totals: Totals,
        write_batch_size: int | None = None,
        **kwargs,
    ):
        # The parent insists on a reward function; a window is scored in `_roll_out`.
        super().__init__(*args, reward_funcs=[reward], processing_class=form.tokenizer, **kwargs)
        self.reward = reward
        self.form = form
        self.totals = totals
        self.write_batch_size = write_batch_size
        self._window: list[dict[str, torch.Tensor]] = []
        self._means = TokenMeans()
        self._evaluated = 0
        for model in (self._student, reward.teacher.model):
            OutputHead.of(model).check(model)

    @property
    def _student(self):
        return self.accelerator.unwrap_model(self.model)

    # --- samples ---------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset=None) -> PromptSampler:
        prompts = self.args.generation_batch_size // self.args.num_generations
        steps = len(self.train_dataset) // prompts * self.args.num_iterations
        return PromptSampler(
            self.train_dataset,
            mini_repeat_count=self.args.num_generations,
            batch_size=prompts,
            repeat_count=self.args.num_iterations * self.args.steps_per_generation,
            shuffle=self.args.shuffle_dataset,
            seed=self.args.seed,
            epoch=lambda: self.state.global_step // steps,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The window's micro-batches, and its completion tokens over all processes: dividing by them
        makes 1×8 and 8×1 the same step."""
        # The data loader gives all prompts of the window again for each micro-batch of it.
        prompts = super().get_batch_samples(epoch_iterator, num_batches, device)[0]
        if self.state.global_step % self.args.num_iterations == 0:
            self._window = self._roll_out(prompts[0])
        tokens = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in self._window)
        num_items = self.accelerator.gather(tokens.to(device)).sum()
        self.totals.trained += int(num_items)
        return self._window, num_items

    def _prepare_inputs(self, inputs):
        """As they are: the window is on the device, and the parent would generate here."""
        return inputs

    def _roll_out(self, rows: list[dict]) -> list[dict[str, torch.Tensor]]:
        """Completions of all rows, scored and credited, in micro-batches."""
        start = monotonic()
        samples = self._write(rows, self._seed(self.state.global_step))
        seconds = monotonic() - start
        written = sum(len(sample.token_ids) for sample in samples)
        self.totals.generated_student += written
        pairs, rewards = self._score(samples, "train")
        speed = self.accelerator.gather(torch.tensor(written / seconds, device=self.args.device))
        self._metrics["train"]["generated_tokens_per_second"].append(speed.sum().item())
        credits_BT = self._advantages(rewards)
        masked = self.args.mask_truncated_completions
        learnt = [not (masked and sample.truncated) for sample in samples]
        size = self.args.per_device_train_batch_size
        window = []
        for first in range(0, len(samples), size):
            part = slice(first, first + size)
            batch = training_batch(
                pairs[part], credits_BT[part], learnt[part], self.form.tokenizer.pad_token_id
            )
            window.append({name: tensor.to(self.args.device) for name, tensor in batch.items()})
        return window

    def _write(self, rows: list[dict], seed: int) -> list[Sample]:
        sampling = Sampling(self.args.max_completion_length, temperature=1.0)
        with self.accelerator.autocast():
            samples = write_samples(
                self._student, self.form, rows, sampling, seed, self.write_batch_size
            )
        return [sample.readable(self.reward.shared) for sample in samples]

    def _score(self, samples: list[Sample], mode: str) -> tuple[list, Rewards]:
        """Tokens and rewards; puts what they are into the log."""
        pairs = [prompt_and_completion(self.form, sample) for sample in samples]
        own = self._log_probs(pairs)
        with self.accelerator.autocast():
            rewards = self.reward(samples, own)
        others = {} if rewards.teacher_log_probs is None else {"teacher": rewards.teacher_log_probs}
        if isinstance(self._student, PeftModel):
            with self._student.disable_adapter():
                others["start"] = self._log_probs(pairs)
        log_ratios = {
            f"kl_to_{name}": [s - o.to(s.device) for s, o in zip(own, log_probs, strict=True)]
            for name, log_probs in others.items()
        }
        for name, value in summary(samples, rewards.scores_B, rewards.parts, log_ratios).items():
            self._metrics[mode][name].append(value)
        return pairs, rewards

    def _log_probs(self, pairs: list) -> list[torch.Tensor]:
        with self.accelerator.autocast():
            return completion_log_probs(
                self._student,
                pairs,
                batch_size=self.args.per_device_train_batch_size,
                chunk_size=self.args.loss_chunk_size,
            )

    def _advantages(self, rewards: Rewards) -> torch.Tensor:
        """(B, T) of this process; a prompt's samples may be on several."""
        accelerator, args = self.accelerator, self.args
        here = slice(
            accelerator.process_index * len(rewards.scores_B),
            (accelerator.process_index + 1) * len(rewards.scores_B),
        )

        def everywhere(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.to(accelerator.device)
            return accelerator.gather(accelerator.pad_across_processes(tensor, dim=1))

        mask_BT = everywhere(rewards.mask_BT.long())
        credit = args.gamma, args.num_generations, args.baseline
        if rewards.per_token:
            return token_advantages(everywhere(rewards.rewards_BT), mask_BT, *credit)[here]
        return sequence_advantages(everywhere(rewards.scores_B), mask_BT, *credit)[here]

    def _seed(self, step: int) -> int:
        accelerator = self.accelerator
        return draw_seed(self.args.seed, step, accelerator.process_index, accelerator.num_processes)

    # --- the loss --------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with last_hidden_states(self.accelerator.unwrap_model(model)) as seen:
            # The head sees one position a row, for the sake of DDP, which must see a forward.
            model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                logits_to_keep=1,
                use_cache=False,
            )
        states_NH, tokens_N = completion_states(seen.hidden_BTH, inputs["labels"])
        args, reused = self.args, "old_log_probs_N" in inputs
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        with self.accelerator.autocast():
            loss, terms = policy_loss(
                states_NH,
                tokens_N,
                OutputHead.of(self._student),
                inputs["values"][:, 1:][inputs["labels"][:, 1:] != IGNORED],
                old_log_probs_N=inputs.get("old_log_probs_N"),
                clip=(args.epsilon, high),
                entropy_coef=args.entropy_coef,
                chunk_size=args.loss_chunk_size,
            )
        if args.num_iterations > 1 and not reused:  # kept in the window for the next time
            inputs["old_log_probs_N"] = terms["log_prob"]
        sums = {"tokens": tokens_N.new_tensor(len(tokens_N)).float()}
        sums["entropy"] = terms["entropy"].sum().float()
        if args.num_iterations > 1:
            sums["clipped"] = terms["clipped"].sum().float()
        self._means.add(sums)
        # DDP averages gradients over processes.
        return loss / num_items_in_batch.clamp_min(1) * self.accelerator.num_processes

    # --- evaluation and log ----------------------------------------------------------------------

    def evaluate(self, *args, **kwargs):
        """The rewards of samples of held-out prompts, drawn alike at every evaluation."""
        self._evaluated = 0
        return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """No loss: that of a policy gradient says nothing."""
        seed = self._seed(self.state.max_steps + 1 + self._evaluated)  # none of training
        self._evaluated += 1
        self._score(self._write(inputs, seed), "eval")
        return None, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds means per completion token since the last log, over all processes."""
        means = self._means.take(self.accelerator) if self.model.training else {}
        super().log({**logs, **means}, start_time)

    # --- checkpoints amid a window that is used several times ------------------------------------

    @property
    def _window_file(self) -> str:
        return f"window_{self.accelerator.process_index}.pt"

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.state.global_step % self.args.num_iterations:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            torch.save(self._window, folder / self._window_file)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.state.global_step % self.args.num_iterations:
            path = Path(checkpoint) / self._window_file
            self._window = torch.load(path, map_location=self.args.device, weights_only=True)


def build(setting: Setting) -> OnPolicyTrainer:
    """The trainer. Completions of the teacher are not used, only its judgement."""
    args, teacher_args = setting.arguments.training, setting.arguments.teacher
    if args.max_completion_length is None:
        args.max_completion_length = teacher_args.teacher_max_new_tokens
    _check(setting)
    reward = TeacherReward(
        setting.teacher,
        setting.heldout.shared,
        args.reward,
        args.logprob_reduction,
        args.likelihood_weight,
        args.correctness_weight,
        args.truncation_penalty,
        batch_size=args.per_device_train_batch_size,
        chunk_size=args.loss_chunk_size,
    )
    prompts, heldout = (
        Dataset.from_list([{"question": p.question, "answer": p.answer} for p in prompts])
        for prompts in (setting.train_prompts, setting.heldout.prompts)
    )
    return OnPolicyTrainer(
        model=setting.student,
        args=args,
        train_dataset=prompts,
        eval_dataset=heldout,
        reward=reward,
        form=setting.form,
        totals=setting.totals,
        write_batch_size=teacher_args.teacher_batch_size,
    )


def _check(setting: Setting) -> None:
    """What only the loaded data and the other keys show."""
    args = setting.arguments.training
    longest = setting.arguments.data.max_prompt_tokens + args.max_completion_length
    if args.max_length is not None and longest > args.max_length:
        raise UserError(
            f"recipe: max_prompt_tokens + max_completion_length is {longest}, more than max_length: "
            f"{args.max_length}"
        )
    needed = args.generation_batch_size // args.num_generations
    if needed > len(setting.train_prompts):
        raise UserError(
            f"recipe: an accumulation window takes {needed} prompts (generation_batch_size / "
            f"num_generations), and there are {len(setting.train_prompts)}: lower "
            "gradient_accumulation_steps or per_device_train_batch_size"
        )
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if rows > DRAWS_PER_STEP:
        raise UserError(f"recipe: a window may have {DRAWS_PER_STEP} samples a process, got {rows}")


METHOD = Method(
    name="on_policy",
    config=OnPolicyConfig,
    teacher_access="black_box",
    build=build,
    paper="arXiv 2306.08543",
    loss_memory=policy_memory,
)
