"""LoRA+: LoRA whose up factors learn faster than its down factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from inlay.authoring import Adapter, Group, hookimpl, setting
from inlay_lora.lora import LoRA


@dataclass(frozen=True)
class LoRAPlus(LoRA):
    """LoRA with a learning rate for each factor: B's is `ratio` times A's.

        lr_A = lr,   lr_B = ratio·lr,   both factors of an embedding: embedding_lr

    The change, its start and its parameters are LoRA's: r·(in + out) per layer, r·(V + d) per
    embedding. With ratio=1 and no embedding every step is LoRA's to the bit. A scheduler scales each
    group's own rate, so the ratio stays. arXiv 2402.12354, nikhil-ghosh-berkeley/loraplus. Differs:
    the reference also speeds up every vector that learns, biases and norms among them; here what is
    not a factor belongs to other parts of the stack, which have rates of their own.
    """

    id: ClassVar[str] = "lora_plus"
    paper: ClassVar[str] = "2402.12354"
    lr: ClassVar[float] = 5e-4

    ratio: float = setting(16.0, least=1)
    embedding_lr: float = setting(1e-6, least=0)

    @staticmethod
    @hookimpl
    def parameter_groups(method: LoRAPlus, adapter: Adapter, lr: float | None) -> list[Group]:  # type: ignore[override]
        slow = method.lr if lr is None else lr
        tables = {id(p) for s, delta in adapter.placed if s.kind == "embedding" for p in delta.parameters()}
        groups: dict[float, list[str]] = {}
        for name, parameter in adapter.named_parameters():
            own = slow * method.ratio if name.endswith(".up") else slow
            if parameter.requires_grad:
                groups.setdefault(method.embedding_lr if id(parameter) in tables else own, []).append(name)
        return [Group(names, own, method.weight_decay) for own, names in groups.items()]
