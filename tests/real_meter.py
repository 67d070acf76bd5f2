"""What real tensors take, counted as the plan counts tensors without content."""

import torch

from medistill_trl.memory.meter import Meter


class RealMeter(Meter):
    """Within it everything is computed, and counted from the operation that makes it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

    def hold(self, *models: torch.nn.Module) -> None:
        """What was made before counts too."""
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                self._count(tensor)

    @property
    def most(self) -> int:
        return max(parts.total() for parts in self.peaks.values())
