"""`recipes/run.py` on a machine whose memory holds a micro-batch of `ROWS` rows, and prompts of `PROMPTS` at a time.

It raises what an accelerator raises, where it would: amid a forward; of training from step `STEP` of SGD on.
"""

import os
import runpy

import torch
from transformers import LlamaModel

ROWS, STEP = int(os.environ["ROWS"]), int(os.environ.get("STEP", "0"))
PROMPTS = int(os.environ.get("PROMPTS", "1000"))
forward = LlamaModel.forward
steps = 0


def limited(self, *args, **kwargs):
    ids = kwargs.get("input_ids", args[0] if args else None)
    if len(ids) > (ROWS if self.training and steps >= STEP else PROMPTS):
        raise torch.OutOfMemoryError(f"out of memory: tried to allocate {len(ids)} rows")
    return forward(self, *args, **kwargs)


def counted(self, *args, **kwargs):
    global steps
    steps += 1
    return step(self, *args, **kwargs)


step = torch.optim.SGD.step
LlamaModel.forward, torch.optim.SGD.step = limited, counted
runpy.run_path("recipes/run.py", run_name="__main__")
