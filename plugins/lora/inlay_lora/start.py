"""Starting points of low-rank factors: one strategy each, given to a method as `start=`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from inlay.authoring import Site, Strategy

DOWN = ".down"


@dataclass(frozen=True, kw_only=True)
class Start(Strategy):
    """Where the factors of a low-rank method start, found from the bare model and data.

    A subclass with an `id` is a starting point: `LoRA(start=EVA())`, as text `lora(start=eva())`.
    """

    def measure(
        self, rank: int, model: nn.Module, sites: Sequence[Site], batches: Iterable[Any]
    ) -> Mapping[str, Tensor]:
        """Return A₀ (r, in) of sites as "<site>.down"; r may differ, and a site of r = 0 is left out.

        A site without one starts at random, at the method's own rank. B starts at 0.
        """
        raise NotImplementedError
