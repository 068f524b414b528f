"""VB-LoRA: low-rank factors put together from one bank of vectors that all layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.authoring import (
    Adapter,
    ConfigError,
    Group,
    Init,
    LinearDelta,
    Method,
    Ref,
    Site,
    Stage,
    hookimpl,
    setting,
)


class Bank(nn.Module):
    """`vectors` = V (h, b), one for the whole adapter."""

    def __init__(self, init: Init, method: VBLoRA) -> None:
        super().__init__()
        self.vectors = init.uniform(method.num_vectors, method.vector_length, bound=method.bound)


class Mixture(nn.Module):
    """Sub-vectors (*, b): each the softmax-weighted sum of the k vectors of the bank with the largest logits.

    `logits` (*, h) learn. Once `chosen`, only `indices` (*, k) and `weights` (*, k − 1) are left: the last
    weight is what they lack of 1.
    """

    def __init__(self, init: Init, shape: tuple[int, ...], method: VBLoRA, *, chosen: bool) -> None:
        super().__init__()
        self.top = method.top_k
        if chosen:
            device, small = init.device, torch.uint8 if method.num_vectors <= 256 else torch.int32
            self.keep(
                torch.zeros(*shape, self.top, dtype=small, device=device),
                init.zeros(*shape, self.top - 1).data,
            )
        else:
            self.logits = init.normal(*shape, method.num_vectors, std=method.logits_std)

    def keep(self, indices: Tensor, weights: Tensor) -> None:
        self.register_buffer("indices", indices)
        self.register_buffer("weights", weights)

    def selected(self) -> tuple[Tensor, Tensor]:
        """Return indices (*, k) of the bank's vectors, and their weights (*, k)."""
        if "logits" in self._parameters:
            largest, indices = self.logits.topk(self.top, dim=-1)
            return indices, largest.softmax(-1)
        rest = 1 - self.weights.sum(-1, keepdim=True)  # type: ignore[operator, union-attr]
        return self.indices.long(), torch.cat([self.weights, rest], -1)  # type: ignore[operator, union-attr, list-item]

    def choose(self) -> None:
        """Leave what is selected now, in place of the logits."""
        small = torch.uint8 if self.logits.shape[-1] <= 256 else torch.int32
        indices, weights = (t.detach() for t in self.selected())
        del self.logits
        self.keep(indices.to(small), weights[..., :-1].contiguous())

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the sub-vectors (*, b)."""
        indices, weights = self.selected()
        return (weights.to(vectors.dtype).unsqueeze(-2) @ vectors[indices]).squeeze(-2)


class Banked(LinearDelta):
    """ΔW = B A: `down` gives A's sub-vectors (r, in/b, b), `up` those of B's columns (out/b, r, b)."""

    def __init__(self, site: Site, init: Init, bank: Ref, method: VBLoRA, *, chosen: bool) -> None:
        super().__init__()
        rank, length = method.rank, method.vector_length
        self.down = Mixture(init, (rank, site.in_features // length), method, chosen=chosen)
        self.up = Mixture(init, (site.out_features // length, rank), method, chosen=chosen)
        self.bank, self.rate = bank, method.dropout

    def factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) in the dtype of `like`."""
        vectors = self.bank.module.vectors.to(like.dtype)
        return self.down(vectors).flatten(1), self.up(vectors).transpose(1, 2).flatten(0, 1)

    def effect(self, x: Tensor) -> Tensor:
        """Return (x Aᵀ) Bᵀ (*, out) of x (*, in)."""
        down, up = self.factors(x)
        return F.linear(F.linear(x, down), up)

    def product(self, like: Tensor) -> Tensor:
        """Return B A (out, in)."""
        down, up = self.factors(like)
        return up @ down


@dataclass(frozen=True)
class VBLoRA(Method):
    """Low-rank factors cut into sub-vectors, each a mixture of a few vectors of one shared, learned bank.

        ΔW = B A,   sub-vector of A or B = Σ_{k ∈ top} softmax(logits on top)_k V[k]

    V (h, b) ~ U(±bound) once for all layers; logits (r, in/b, h) and (out/b, r, h) ~ N(0, logits_std²);
    b divides in and out. No alpha / r. The change is small at the start but not 0. The bank learns at
    bank_lr_ratio times the rate of the logits.

    Parameters: h·b + Σ h·r·(in + out) / b while training. `inlay.advance` ends it: logits give way to the
    k indices and k − 1 weights of each sub-vector, which is all that is saved then, and nothing learns
    any more. arXiv 2405.15179, leo-yangli/VB-LoRA and huggingface/peft.
    """

    id: ClassVar[str] = "vblora"
    paper: ClassVar[str] = "2405.15179"
    default_targets: ClassVar[tuple[str, ...]] = ("query", "value")
    lr: ClassVar[float] = 3e-2
    starts_as_identity: ClassVar[bool] = False

    rank: int = setting(4, least=1)
    num_vectors: int = setting(256, least=1)
    vector_length: int = setting(256, least=1)
    top_k: int = setting(2, least=1)
    bound: float = setting(0.02, above=0)
    logits_std: float = setting(0.1, least=0)
    dropout: float = setting(0.0, least=0, below=1)
    bank_lr_ratio: float = setting(0.1, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k > self.num_vectors:
            raise ConfigError(
                "VBLoRA: top_k is larger than the bank",
                saw=f"top_k={self.top_k}, num_vectors={self.num_vectors}",
                do=f"give top_k <= {self.num_vectors}",
            )

    @staticmethod
    @hookimpl
    def inject(method: VBLoRA, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        for site in sites:
            method.check(site)
        bank = adapter.share("bank", Bank(adapter.init(shared="bank"), method))
        chosen = adapter.data.get("chosen", False)
        for site in sites:
            adapter.place(site, Banked(site, adapter.init(site), bank, method, chosen=chosen))
        return len(sites)

    def check(self, site: Site) -> None:
        """Refuse a layer whose sizes the vectors' length does not divide."""
        rows, columns, length = site.out_features, site.in_features, self.vector_length
        if rows % length or columns % length:
            fit = [n for n in range(1, min(rows, columns) + 1) if rows % n == columns % n == 0]
            raise ConfigError(
                "the vectors' length does not divide the layer",
                saw=f"vector_length={length}; {site.name} is ({rows}, {columns})",
                do=f"give one of {', '.join(map(str, fit))}",
            )

    @staticmethod
    @hookimpl
    def trainable_mask(method: VBLoRA, adapter: Adapter) -> dict[str, bool]:  # type: ignore[override]
        return {name: not adapter.data.get("chosen", False) for name, _ in adapter.named_parameters()}

    @staticmethod
    @hookimpl
    def parameter_groups(method: VBLoRA, adapter: Adapter, lr: float | None) -> Sequence[Group]:  # type: ignore[override]
        rate, names = method.lr if lr is None else lr, adapter.trainable_names()
        bank = [n for n in names if n.startswith("shared.")]
        logits = [n for n in names if n not in bank]
        decay = method.weight_decay
        return [Group(logits, rate, decay), Group(bank, rate * method.bank_lr_ratio, decay)]

    @staticmethod
    @hookimpl
    def stages(method: VBLoRA, adapter: Adapter) -> Sequence[Stage]:
        return [] if adapter.data.get("chosen") else [Stage("train", finish=choose)]


def choose(adapter: Adapter) -> None:
    """End training: of the logits, keep which vectors they select and how much of each."""
    adapter.data["chosen"] = True
    for _, delta in adapter.placed:
        for module in delta.modules():
            if isinstance(module, Mixture):
                module.choose()
