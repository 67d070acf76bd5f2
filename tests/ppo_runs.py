"""PPO on the tiny pair."""

import tiny_setting
from tiny_setting import train

from medistill_trl import methods
from medistill_trl.prompts import IGNORED

TINY = {
    "data": {"max_prompt_tokens": 100},
    "max_completion_length": 6,
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
}


def make_setting(folder, lora=False, **changes):
    kl_coef = {"kl_coef": 0.05 if lora else 0.0}
    return tiny_setting.make_setting(folder, "ppo", lora=lora, **TINY | kl_coef | changes)


def trained(folder, resume=None, **changes):
    return train(make_setting(folder, **changes), resume)


def build(folder, **changes):
    return methods.load("ppo").build(make_setting(folder, **changes))


def plain_log_probs(model, sample):
    """log π of the whole vocabulary at each completion token, and of the tokens."""
    labels = sample["labels"]
    first = int((labels != IGNORED).nonzero()[0])
    log_p = model(sample["input_ids"][None]).logits[0, first - 1 : -1].log_softmax(-1)
    return log_p, log_p[range(len(labels) - first), labels[first:]]
