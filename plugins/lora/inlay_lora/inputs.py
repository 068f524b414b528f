"""What layers read, gathered while the model runs: one statistic for layers that read the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from inlay.authoring import ConfigError, Site

UNLABELLED = -100


class Statistic(Protocol):
    """What becomes of the rows (m, in) that a layer reads, batch by batch."""

    def update(self, rows: Tensor) -> None: ...


Kind = TypeVar("Kind", bound=Statistic)


class Inputs(Generic[Kind]):
    """A statistic of what each layer reads, by the site's name; `make` begins one, `start` names who asks.

    Padding is left out, and with `label_mask` tokens without a label. While `waiting` is given, only
    those layers' inputs are taken in.
    """

    def __init__(
        self, sites: Sequence[Site], make: Callable[[Site], Kind], *, start: str, label_mask: bool
    ) -> None:
        self.sites, self.make, self.start, self.label_mask = sites, make, start, label_mask
        self.found: dict[str, Kind] = {}
        self.waiting: set[str] | None = None
        self._call: Mapping[str, Any] = {}
        self._read = WeakTensorKeyDictionary()  # in this call: a tensor's first reader
        self._first: dict[str, str] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at what the layers read within the block."""
        handles = [
            site.module.register_forward_pre_hook(partial(self._take, site), with_kwargs=True)
            for site in self.sites
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, model: nn.Module, call: Mapping[str, Any]) -> None:
        """Call the model, taking in what is read."""
        self._call = call
        self._read = WeakTensorKeyDictionary()
        with torch.no_grad():
            model(**call)

    def check_all_read(self) -> None:
        """Raise if a layer has read nothing."""
        if unread := [site.name for site in self.sites if site.name not in self.found]:
            raise ConfigError(
                f"{self.start}: a layer read nothing in all the data",
                saw=f"{unread[0]} and {len(unread) - 1} more were not called",
                do="leave it out of the targets, or give data for which the model calls it",
            )

    def _take(self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        reader = self._read.get(x, site.name)
        self._read[x] = reader
        first = self._first.setdefault(site.name, self._first.get(reader, reader))
        if first != site.name:
            self.found[site.name] = self.found[first]
            return
        statistic = self.found.setdefault(site.name, self.make(site))
        if self.waiting is None or any(self._first[name] == first for name in self.waiting):
            self._learn(site, statistic, self._tokens(site, x))

    def _learn(self, site: Site, statistic: Kind, tokens: Tensor) -> None:
        if not bool(tokens.isfinite().all()):
            raise ConfigError(
                f"{self.start}: a layer reads values that are not finite",
                saw=f"{site.name}: {int((~tokens.isfinite()).sum())} of {tokens.numel()}",
                do="look for NaN or huge values in the batches and in the model",
            )
        if len(tokens):
            statistic.update(tokens)

    def _tokens(self, site: Site, x: Tensor) -> Tensor:
        """Return the rows (m, in) of x (..., in) that count."""
        encoded = site.side != "decoder" or (site.cross and site.role in ("key", "value"))
        mask = self._call.get("attention_mask" if encoded else "decoder_attention_mask")
        labels = self._call.get("labels") if self.label_mask and site.side != "encoder" else None
        counts = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        if mask is not None and mask.shape == counts.shape:
            counts &= mask.bool()
        if labels is not None and labels.shape == counts.shape and not (encoded and site.side):
            counts &= labels != UNLABELLED
        return x[counts]
