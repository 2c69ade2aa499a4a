"""What a program asks of a device, counted on a machine without one: operations, kernels, bytes, and waits for an answer.

Contract: counts are those of torch's dispatcher, forward and backward, and do not depend on the machine. On CPU a device's
tensors are told from the host's by descent: from the tensors given at the start, and whatever is computed from them.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# the shape of what they return depends on numbers, so a host waits for them
_READING_OPERATIONS = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten.equal",
    "aten._unique2",
)
# these fetch numbers without an operation, where the tensor is on the CPU anyway
_READING_METHODS = {Tensor.tolist: "tolist", Tensor.cpu: "cpu", Tensor.numpy: "numpy"}
# they make or name memory, and run nothing
_FREE = ("aten.empty", "aten.new_empty", "aten.detach", "aten.lift", "aten._unsafe_view", "aten.alias")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Operations(TorchDispatchMode):
    """Counts what is dispatched while it is in force.

    Attributes:
        dispatched: operations, views included: what the host pays for.
        kernels: those that run something on a device.
        moved_bytes: that kernels read and write, every tensor counted once a kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dispatched, self.kernels, self.moved_bytes = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.dispatched += 1
        if not func.is_view and not str(func).startswith(_FREE):
            self.kernels += 1
            tensors = _tensors((args, kwargs, result))
            # By identity: a tensor that is read and written in place counts once.
            self.moved_bytes += sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        return result


class Collectives(TorchDispatchMode):
    """Counts the bytes that collectives move while it is in force.

    Attributes:
        moved_bytes: as sizes of reduce-scatters and all-gathers, each by the larger tensor of this rank; an all-reduce is
            one of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("c10d"):
            largest = max((t.numel() * t.element_size() for t in _tensors((args, kwargs))), default=0)
            self.moved_bytes += largest * (2 if "allreduce" in str(func) else 1)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING_METHODS and args and self._reads.is_on_device(args[0]):
            self._reads.note(_READING_METHODS[func])
        return func(*args, **(kwargs or {}))


class HostReads(TorchDispatchMode):
    """Counts where the host would wait for a device.

    Args:
        on_device: tensors that a GPU run has there; their descendants follow.

    Attributes:
        found: file:line and kind of every read -> how often.
    """

    def __init__(self, on_device: Iterable[Tensor]) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        # storages are kept, or their addresses would be given out again
        self._storages: dict[int, Any] = {}
        self.mark(on_device)

    @contextmanager
    def counting(self) -> Iterator[HostReads]:
        """Inside, reads are counted."""
        # Both: some reads are methods without an operation, others operations without a method.
        with _Methods(self), self:
            yield self

    def mark(self, tensors: Iterable[Tensor]) -> None:
        """These are on the device too."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # By storage: a view is where its base is.
            self._storages[storage._cdata] = storage

    def is_on_device(self, tensor: Any) -> bool:
        """Whether a GPU run would have it there."""
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._storages

    def note(self, kind: str) -> None:
        """Remember a read by the line of ours, or of an engine's, that asked for it."""
        here = Path(__file__).name
        # From the innermost outwards: the first frame of the product names the line to change.
        for frame in reversed(traceback.extract_stack()):
            path = frame.filename
            if any(part in path for part in ("bd3_megatron", "megatron", "deepspeed")) and not path.endswith(here):
                self.found[f"{Path(path).name}:{frame.lineno} {kind}"] += 1
                return
        self.found[f"elsewhere {kind}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _tensors((args, kwargs))
        # Collectives run on the device whatever tensors they are given.
        touched = any(map(self.is_on_device, given)) or str(func).startswith("c10d")
        if touched and self._waits(func, args):
            self.note(str(func).removesuffix(".default"))
        result = func(*args, **(kwargs or {}))
        if touched:
            self.mark(_tensors(result))
            # what is written into is on the device as well
            written = [
                a for a, value in zip(func._schema.arguments, args, strict=False) if a.alias_info and value is not None
            ]
            if written:
                self.mark(given)
        return result

    def _waits(self, func: Any, args: Any) -> bool:
        name = str(func)
        if name.startswith("aten.index_put") and args[2].dim() == 0 and not self.is_on_device(args[2]):
            # torch fills under the mask instead where a number of the host is put (TensorAdvancedIndexing.cpp)
            return False
        if name.startswith(("aten.index.Tensor", "aten.index_put")):
            # a mask is turned into positions, and their number is not known beforehand
            return any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
        return name.startswith(_READING_OPERATIONS)
