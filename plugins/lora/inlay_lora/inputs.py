"""What layers read: the principal directions of their inputs, gathered while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from inlay.authoring import ConfigError, Site
from inlay_lora.pca import IncrementalPCA

UNLABELLED = -100


class Inputs:
    """An `IncrementalPCA` of what each layer reads, by the site's name; one for layers that read the same.

    Padding is left out, and with `label_mask` tokens without a label. While `waiting` is given, only
    those layers' inputs are taken in.
    """

    def __init__(self, sites: Sequence[Site], keep: int, *, label_mask: bool) -> None:
        self.sites, self.keep, self.label_mask = sites, keep, label_mask
        self.pcas: dict[str, IncrementalPCA] = {}
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

    def _take(self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        reader = self._read.get(x, site.name)
        self._read[x] = reader
        first = self._first.setdefault(site.name, self._first.get(reader, reader))
        if first != site.name:
            self.pcas[site.name] = self.pcas[first]
            return
        pca = self.pcas.setdefault(site.name, IncrementalPCA(min(self.keep, site.in_features)))
        if self.waiting is None or any(self._first[name] == first for name in self.waiting):
            self._learn(site, pca, self._tokens(site, x))

    def _learn(self, site: Site, pca: IncrementalPCA, tokens: Tensor) -> None:
        if not bool(tokens.isfinite().all()):
            raise ConfigError(
                "eva: a layer reads values that are not finite",
                saw=f"{site.name}: {int((~tokens.isfinite()).sum())} of {tokens.numel()}",
                do="look for NaN or huge values in the batches and in the model",
            )
        if len(tokens):
            pca.update(tokens)

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
