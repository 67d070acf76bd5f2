"""Bytes that tensors take, counted on tensors without content.

Floating-point tensors are fake (`torch._subclasses.fake_tensor`): they have shape, dtype and storage size, and every
operation on them costs microseconds and no memory. Token ids, labels and masks are real, since shapes depend on
what they hold: which positions a loss is taken on, how many chunks that makes. So the functions that train can be run
as they are.

`torch.distributed._tools.mem_tracker.MemTracker` counts in the same way, by module; here it is by part of the plan,
and masks have to be real.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REAL = (torch.bool, torch.int32, torch.int64)
DEVICE = torch.ops.prim.device.default
aten = torch.ops.aten


class Meter(TorchDispatchMode):
    """Within it, tensors of floats have no content, and what is alive is counted by label.

    A storage counts from the operation that makes it until nothing refers to it any more, the graph of a later
    backward pass included. What a kernel takes for itself while it runs is not seen.

    Attributes:
        peaks: Moment → label → bytes, when most was alive within that moment.
    """

    def __init__(self):
        super().__init__()
        self.peaks: dict[str, Counter[str]] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._storages: dict[int, tuple[weakref.ref, list]] = {}  # by address: bytes and label
        self._live: Counter[str] = Counter()
        self._total = 0
        self._label = self._moment = ""
        self._most = -1

    # --- labels and moments

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """What is allocated within goes by this name."""
        before, self._label = self._label, name
        try:
            yield
        finally:
            self._label = before

    def switch(self, name: str) -> None:
        """From here on, until the label in force ends."""
        self._label = name

    def relabel(self, tensor: torch.Tensor, name: str) -> None:
        entry = self._storages[tensor.untyped_storage()._cdata][1]
        size, before = entry
        self._live[before] -= size
        self._live[name] += size
        entry[1] = name

    def begin(self, moment: str) -> None:
        """Peaks from here on are of this moment; of one that comes again, the larger counts."""
        self._moment = moment
        self._most = self.peaks[moment].total() if moment in self.peaks else -1
        self._look()

    def _look(self) -> None:
        if self._total > self._most and self._moment:
            self._most = self._total
            self.peaks[self._moment] = Counter(self._live)

    # --- every operation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is DEVICE:  # most of all calls, by the library itself
            return args[0].fake_device
        kwargs = kwargs or {}
        fake = FakeTensor in types
        if fake and func is aten._local_scalar_dense.default:
            return 1.0  # nobody knows
        if not fake and (_tensors((args, kwargs)) or _makes_integers(func, kwargs)):
            result = _really(func, args, kwargs)
        else:
            if func is aten.index.Tensor:
                args = (args[0], _as_positions(args[1]))
            result = self._fake.dispatch(func, types, args, kwargs)
        for tensor in _tensors(result):
            self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._storages:
            return
        entry = [storage.nbytes(), self._label]
        gone = weakref.ref(storage, lambda _: self._forget(address))
        self._storages[address] = gone, entry
        self._live[self._label] += entry[0]
        self._total += entry[0]
        self._look()

    def _forget(self, address: int) -> None:
        _, (size, label) = self._storages.pop(address)
        self._live[label] -= size
        self._total -= size


def _tensors(values: object) -> list[torch.Tensor]:
    """Within what an operation takes or gives."""
    if isinstance(values, torch.Tensor):
        return [values]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _really(func, args, kwargs):
    with torch._C._DisableTorchDispatch():
        return func(*args, **kwargs)


def _makes_integers(func, kwargs: dict) -> bool:
    dtype = kwargs.get("dtype")
    return dtype in REAL or (dtype is None and func.overloadpacket is aten.arange)


def _as_positions(indices: list) -> list:
    """Masks as the positions where they are true: how many there are decides the result's shape."""
    found = []
    for index in indices:
        is_mask = index is not None and index.dtype is torch.bool
        found += _really(index.nonzero, (), {}).unbind(1) if is_mask else [index]
    return found
