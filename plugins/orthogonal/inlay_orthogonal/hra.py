"""HRA: what a layer reads, reflected a few times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.authoring import Adapter, ConfigError, Init, Method, Site, hookimpl, setting
from inlay_orthogonal.rotation import Rotated, Rotation, rotated, width


class Reflections(Rotation):
    """R = H_r … H₁, H_i = I − 2 u_i u_iᵀ: `u` (d, r), its columns of any length.

    Kept compact: I − R = V T Vᵀ with V the columns of length one and T (r, r).
    """

    def __init__(self, site: Site, init: Init, method: HRA) -> None:
        super().__init__()
        self.paired = method.form == "chain"
        columns = method.rank // 2 if self.paired else method.rank
        drawn = init.uniform(width(site), columns, bound=columns**-0.5)
        self.u = init.tensor(drawn.repeat_interleave(2, dim=1)) if self.paired else drawn

    def forward(self, x: Tensor, back: bool = False) -> Tensor:
        """Return x (R − I), or x (Rᵀ − I), of x (*, d)."""
        with torch.autocast(x.device.type, enabled=False):
            v = self.directions()
            t = self.compact(v)
        v = v.to(x.dtype)
        inner = (x @ v).to(t.dtype) @ (t.mT if back else t)
        return -F.linear(inner.to(x.dtype), v)

    def directions(self) -> Tensor:
        """Return V (d, r), float32 or wider."""
        u = self.u if self.u.dtype == torch.float64 else self.u.float()
        return u / u.norm(dim=0)

    def compact(self, v: Tensor) -> Tensor:
        """Return T (r, r) of V.

        A product of reflections: T⁻¹ = ½ I + the strict lower triangle of VᵀV, the first factor standing
        last. Of orthogonalised columns (all of V's span reflected at once): T⁻¹ = ½ VᵀV.
        """
        gram = v.mT @ v
        if not self.paired:
            return 2 * torch.linalg.inv(gram)
        half = 0.5 * torch.eye(len(gram), dtype=v.dtype, device=v.device)
        return torch.linalg.solve_triangular(gram.tril(-1) + half, 2 * half, upper=False)


@dataclass(frozen=True)
class HRA(Method):
    """Householder reflection adaptation: what each layer reads is reflected r times.

        y = (x R) Wᵀ + b,   R = H_r … H₁,   H_i = I − 2 u_i u_iᵀ / ‖u_i‖²,   W' = W H₁ … H_r

    U = (u₁ … u_r) (in, r), r even: each column drawn twice, side by side, so that pairs cancel and R = I at
    the start up to rounding. R − I has rank r at most. form="gram_schmidt" reflects at
    orthogonalised columns, R = I − 2 Q Qᵀ: it does not start at the base model, and any r goes.
    `penalty` = λ adds λ·Σ ‖VᵀV − I‖² over the layers to the loss, V the columns of length one
    (λ → ∞ is "gram_schmidt"). Convolutions: W as (out, in·|kernel|).

    Parameters: r·in per layer. No weight decay: it changes no direction. arXiv 2405.17484,
    DaShenZi721/HRA. Differs: computed as x − (x V) T Vᵀ, T (r, r), never as an (in, in) matrix.
    peft starts "gram_schmidt" (apply_GS) from pairs, whose second column orthogonalises to rounding.
    """

    id: ClassVar[str] = "hra"
    paper: ClassVar[str] = "2405.17484"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv"})
    lr: ClassVar[float] = 4e-3
    weight_decay: ClassVar[float | None] = 0.0

    rank: int = setting(8, least=1)
    form: Literal["chain", "gram_schmidt"] = setting("chain")
    penalty: float = setting(0.0, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "chain" and self.rank % 2:
            raise ConfigError(
                "an odd number of reflections cannot start at the base model",
                saw=f"rank={self.rank}",
                do=f"give rank={self.rank + 1}, or form='gram_schmidt'",
            )

    @property
    def starts_as_identity(self) -> bool:  # type: ignore[override]
        return self.form == "chain"

    def delta(self, site: Site, init: Init) -> Rotated:
        if self.rank > width(site):
            raise ConfigError(
                "more reflections than a layer has features",
                saw=f"rank={self.rank}, {site.name} has {width(site)}",
                do=f"give a rank of at most {width(site)}, or choose other targets",
            )
        return rotated(site, Reflections(site, init, self))

    @staticmethod
    @hookimpl
    def auxiliary_loss(method: HRA, adapter: Adapter) -> Tensor | None:
        if not method.penalty:
            return None
        turns = (delta.rotation.directions() for _, delta in adapter.placed)  # type: ignore[operator, union-attr]
        grams = [v.mT @ v for v in turns]
        off = sum((g - torch.eye(len(g), dtype=g.dtype, device=g.device)).square().sum() for g in grams)
        return method.penalty * off
