"""VB-LoRA: low-rank factors put together from one bank of vectors that all layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.authoring import (
    Adapter,
    Factored,
    Group,
    Init,
    Ref,
    Site,
    Stage,
    hookimpl,
    setting,
    two_rates,
)
from inlay_reparam.sharing import FactoredDelta, SharingMethod
from inlay_reparam.sizes import check_divides, check_most


class Mixture(nn.Module):
    """Sub-vectors (*, b): each the softmax-weighted sum of the k vectors of the bank with the largest logits.

    `logits` (*, h) learn. Once chosen, only `indices` (*, k) and `weights` (*, k − 1) are left: the last
    weight is what they lack of 1.
    """

    def __init__(self, init: Init, shape: tuple[int, ...], method: VBLoRA, chosen: bool) -> None:
        super().__init__()
        self.top = method.top_k
        self.logits = init.normal(*shape, method.num_vectors, std=method.logits_std)
        if chosen:
            self.choose()

    def choose(self) -> None:
        """Leave what is selected now, in place of the logits."""
        indices, weights = self.selected()
        small = torch.uint8 if self.logits.shape[-1] <= 256 else torch.int32
        self.register_buffer("indices", indices.to(small))
        self.register_buffer("weights", weights.detach()[..., :-1].contiguous())
        del self.logits

    def selected(self) -> tuple[Tensor, Tensor]:
        """Return indices (*, k) of the bank's vectors, and their weights (*, k)."""
        if "logits" in self._parameters:
            largest, indices = self.logits.topk(self.top, dim=-1)
            return indices, largest.softmax(-1)
        return self.indices.long(), torch.cat([self.weights, 1 - self.weights.sum(-1, keepdim=True)], -1)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the sub-vectors (*, b)."""
        indices, weights = self.selected()
        return (weights.to(vectors.dtype).unsqueeze(-2) @ vectors[indices]).squeeze(-2)


class Banked(FactoredDelta):
    """ΔW = B A: `down` gives A's sub-vectors (r, in/b, b), `up` those of B's columns (out/b, r, b)."""

    def __init__(self, site: Site, init: Init, common: Ref, method: VBLoRA, chosen: bool) -> None:
        super().__init__()
        self.down = Mixture(init, (method.rank, site.in_features // method.vector_length), method, chosen)
        self.up = Mixture(init, (site.out_features // method.vector_length, method.rank), method, chosen)
        self.common, self.rate = common, method.dropout

    def factors(self, like: Tensor) -> Factored:
        vectors = self.common.module["bank"].to(like.dtype)
        return Factored(self.down(vectors).flatten(1), self.up(vectors).transpose(1, 2).flatten(0, 1))


@dataclass(frozen=True)
class VBLoRA(SharingMethod):
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
    lr: ClassVar[float] = 3e-2
    starts_as_identity: ClassVar[bool] = False

    rank: int = setting(4, least=1)
    num_vectors: int = setting(256, least=1)
    vector_length: int = setting(256, least=1)
    top_k: int = setting(2, least=1)
    bound: float = setting(0.02, above=0)
    logits_std: float = setting(0.1, least=0)
    bank_lr_ratio: float = setting(0.1, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_most("top_k", self.top_k, self.num_vectors, f"num_vectors={self.num_vectors}")

    def common(self, sites: Sequence[Site], adapter: Adapter) -> nn.Module:
        draw = adapter.init(shared="common").uniform
        return nn.ParameterDict({"bank": draw(self.num_vectors, self.vector_length, bound=self.bound)})

    def beside(self, site: Site, adapter: Adapter, common: Ref) -> Banked:
        check_divides("vector_length", self.vector_length, site, site.out_features, site.in_features)
        return Banked(site, adapter.init(site), common, self, bool(adapter.data.get("chosen")))

    @staticmethod
    @hookimpl
    def trainable_mask(method: VBLoRA, adapter: Adapter) -> dict[str, bool]:  # type: ignore[override]
        return {name: not adapter.data.get("chosen") for name, _ in adapter.named_parameters()}

    @staticmethod
    @hookimpl
    def parameter_groups(method: VBLoRA, adapter: Adapter, lr: float | None) -> Sequence[Group]:  # type: ignore[override]
        return two_rates(method, adapter, lr, ".bank", method.bank_lr_ratio)

    @staticmethod
    @hookimpl
    def stages(method: VBLoRA, adapter: Adapter) -> Sequence[Stage]:
        return [] if adapter.data.get("chosen") else [Stage("train", finish=choose)]


def choose(adapter: Adapter) -> None:
    """End training: of the logits, keep which vectors they select and how much of each."""
    adapter.data["chosen"] = True
    for _, delta in adapter.placed:
        delta.down.choose()  # type: ignore[union-attr, operator]
        delta.up.choose()  # type: ignore[union-attr, operator]
