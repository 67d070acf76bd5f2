"""A task with a known answer: the teacher's likelihood prefers one pattern of tokens after every prompt."""

import copy
import math
from functools import cache

import torch
from conftest import make_model
from tiny_setting import PROMPTS, make_form

from medistill_trl.rollouts import encode_sample, write_samples
from medistill_trl.teacher import Sampling, completion_log_probs

PATTERN = [20, 30, 40, 50]


@cache
def _trained():
    form = make_form()
    teacher = make_model(len(form.tokenizer), seed=1)
    prompts = [form.encode(form.render(prompt.question)) for prompt in PROMPTS]
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for _ in range(25):
        for ids in prompts[::2]:
            row = torch.tensor([ids + PATTERN])
            log_p = teacher(row).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            optimizer.zero_grad()
            (-log_p[range(4), PATTERN].mean()).backward()
            optimizer.step()
    return teacher


def planted_teacher():
    """A copy of the teacher, for `make_setting`."""
    return copy.deepcopy(_trained())


def expected_reward(trainer, samples=32):
    """The mean reward of fresh samples of every prompt, and its standard error."""
    student, form = trainer.model, trainer.form
    rows = [{"question": p.question, "answer": None} for p in PROMPTS for _ in range(samples)]
    written = write_samples(student, form, rows, Sampling(len(PATTERN), 1.0), 12345)
    own = completion_log_probs(student, [encode_sample(form, one) for one in written])
    scores = trainer.reward(written, own).scores_B
    return scores.mean().item(), (scores.std() / len(scores) ** 0.5).item()


def assert_reward_rises(trainer, name):
    """Trains, and compares what samples earn before and after.

    Args:
        name: Of the case, for the output.
    """
    before, error_before = expected_reward(trainer)
    trainer.train()
    after, error_after = expected_reward(trainer)
    rise, error = after - before, math.hypot(error_before, error_after)
    print(f"planted: {name}: {before:.3f} → {after:.3f}, standard error {error:.3f}")
    assert rise > 5 * error
