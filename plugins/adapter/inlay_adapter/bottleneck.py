"""The bottleneck every adapter of this family shares: z = s·(U σ(D h + b_D) + b_U), without a skip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.authoring import Adapter, Group, Init, Method, OutputDelta, SublayerSite, hookimpl

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh", "identity"]
Start = Literal["houlsby", "bert", "lora"]
Scale = float | Literal["learned", "channel"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": torch.positive,
}
STD = {"houlsby": 1e-2, "bert": 0.02, "lora": 0.0}


@dataclass(frozen=True)
class Shape:
    """What a bottleneck is made from: width r, activation σ, starting values, scale s, dropout rate."""

    width: int
    act: str
    init: str
    std: float | None = None
    scale: float | str = 1.0
    dropout: float = 0.0


class Bottleneck(OutputDelta):
    """One sublayer's branch: D (r, d), b_D (r,), U (d, r), b_U (d,), and s if it learns.

    Starting values: "houlsby" D, U ~ N(0, std²) cut at 2 std, "bert" D, U ~ N(0, std²), "lora" D
    Kaiming-uniform (a=√5) and U = 0; biases 0, a learned scale 1. P(d, r) = 2dr + r + d parameters.
    """

    def __init__(self, site: SublayerSite, init: Init, shape: Shape) -> None:
        super().__init__()
        features, width = site.out_features, shape.width
        self.act, self.rate = ACTIVATIONS[shape.act], shape.dropout
        self.down, self.up = matrices(init, features, shape)
        self.down_bias, self.up_bias = init.zeros(width), init.zeros(features)
        self.scale: Tensor | float
        if isinstance(shape.scale, str):
            self.scale = init.ones(features if shape.scale == "channel" else 1)
        else:
            self.scale = float(shape.scale)

    def branch(self, h: Tensor, hidden_dropout: float = 0.0) -> Tensor:
        """Return z of h, both (..., d)."""
        inner = self.act(F.linear(h, self.down.to(h.dtype), self.down_bias.to(h.dtype)))
        inner = F.dropout(inner, hidden_dropout, self.training)
        z = F.linear(inner, self.up.to(inner.dtype), self.up_bias.to(inner.dtype))
        if isinstance(self.scale, float):
            return z if self.scale == 1.0 else z * self.scale
        return z * self.scale.to(z.dtype)

    def why_not(self) -> str:
        return "a bottleneck with a nonlinearity around a whole sublayer is no change of one layer's weights"


def matrices(init: Init, features: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return the starting D (r, d) and U (d, r)."""
    down, up = (shape.width, features), (features, shape.width)
    std = STD[shape.init] if shape.std is None else shape.std
    if shape.init == "lora":
        return init.kaiming_uniform(*down), init.zeros(*up)
    draw = init.truncated_normal if shape.init == "houlsby" else init.normal
    return draw(*down, std=std), draw(*up, std=std)


@dataclass(frozen=True)
class BottleneckMethod(Method):
    """Base of the methods here: where they stand, and weight decay on matrices only.

    Biases, norm weights and learned scales are exempt from decay, as in the authors' code.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"sublayer"})
    lr: ClassVar[float] = 1e-3

    @staticmethod
    @hookimpl
    def parameter_groups(method: BottleneckMethod, adapter: Adapter, lr: float | None) -> list[Group]:  # type: ignore[override]
        rate = method.lr if lr is None else lr
        learning = [(name, p) for name, p in adapter.named_parameters() if p.requires_grad]
        matrices = [name for name, p in learning if p.ndim > 1]
        vectors = [name for name, p in learning if p.ndim < 2]
        return [Group(matrices, rate, method.weight_decay), Group(vectors, rate, 0.0)]
