"""Every storage that is alive while real code runs on tensors without values, by what it is for."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class _Entry:
    """One storage: its bytes, and what they count as."""

    def __init__(self, kind: str, size: int) -> None:
        self.kind, self.size = kind, size


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages made under it until they are freed, and the most there were.

    A storage counts once however many tensors share it, as `kind` at the time it was made; `book` says
    later what it turned out to be. `shares` says which part of a kind's bytes lies on one device, `block`
    what the device's allocator rounds up to.
    """

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self.kind, self.phase, self.block = "other", "", block
        self.live: Counter[str] = Counter()
        self.shares: dict[str, float] = {}
        self._entries: Any = WeakIdKeyDictionary()
        self.mark()

    def mark(self) -> None:
        """Forget the most there was so far."""
        self.at_peak, self.most, self.peak, self.where = Counter(self.live), Counter(self.live), 0.0, ""
        self._look()

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Count what is made meanwhile as `kind`."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def book(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count what these tensors are kept in as `kind`."""
        for tensor in tensors:
            entry = self._entries.get(tensor.untyped_storage())
            if entry is not None and entry.kind != kind:
                self.live[entry.kind] -= entry.size
                self.live[kind] += entry.size
                entry.kind = kind
        self._look()

    def add(self, kind: str, size: int) -> None:
        """Count bytes that no storage here stands for, from now on."""
        self.live[kind] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        self._look(str(func))
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._entries:
            return
        size = math.ceil(storage.size() / self.block) * self.block
        entry = self._entries[storage] = _Entry(self.kind, size)
        self.live[entry.kind] += entry.size
        weakref.finalize(storage, self._freed, entry)

    def _freed(self, entry: _Entry) -> None:
        self.live[entry.kind] -= entry.size

    def _look(self, operation: str = "") -> None:
        now = 0.0
        for kind, size in self.live.items():
            now += size * self.shares.get(kind, 1.0)
            if size > self.most[kind]:
                self.most[kind] = size
        if now > self.peak:
            self.peak, self.at_peak = now, Counter(self.live)
            self.where = f"{self.phase}, in {operation}" if operation else self.phase
