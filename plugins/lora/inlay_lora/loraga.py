"""LoRA-GA: the factors start along the gradient of the layer's weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.authoring import ConfigError, ModuleSite, calls, gradients, setting
from inlay_lora.start import Factors, Layer, Start, principal

SEED = 0  # of the randomised decomposition and of direction="random"
ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class LoRAGA(Start):
    """Gradient approximation: the first steps of A and B move the weight as full training would.

        G ≈ U S Vᵀ,   A₀ = c·V_{1…r}ᵀ,   B₀ = c·U_{r+1…2r},   W' = W + s·(B A − B₀A₀)

    G (out, in) is the mean gradient of the model's own loss over the batches. `direction` says which
    r of the first 2r vectors each takes: "ArB2r" as above, "A2rBr" the other way round, "ArBr" by
    turns (B first), "random" two halves. `scale` is c: "stable" out^¼/√gamma, "unit" 1, "gd" 1/s,
    "weight_svd" the mean of √(σᵢ(W)/s) over i ≤ r. With `norm_clip` both are shrunk where s·B₀A₀ has a
    larger entry than W has.

    arXiv 2407.05000, Outsider565/LoRA-GA. Differs: measured in evaluation mode, so that no dropout adds
    noise; the base stays, and (A₀, B₀) is kept beside (A, B). variant="peft" is what huggingface/peft
    computes under this name, another method numerically: B₀ is also multiplied by its singular values,
    c acts on B alone ("stable"; "weight_svd" is σ₁(W)/σ_B there), "random" gives A and B the same half.
    """

    id: ClassVar[str] = "lora_ga"
    calibrates: ClassVar[bool] = True
    kept: ClassVar[bool] = True

    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = setting("ArB2r")
    scale: Literal["stable", "unit", "gd", "weight_svd"] = setting("stable")
    gamma: float = setting(16.0, above=0)
    norm_clip: bool = setting(False)
    variant: Literal["reference", "peft"] = setting("reference")

    def measure(self, layers: Sequence[Layer], model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
        sites = {layer.name: self._site(layer) for layer in layers}
        wanted = {id(site.tensor(site.weight_name)) for site in sites.values()}
        sums, count = dict[int, Tensor](), 0
        for found in gradients(model, calls(model, batches), wanted):
            count += 1
            for key, gradient in found.items():
                sums[key] = sums[key] + gradient.float() if key in sums else gradient.float()
        starts: dict[str, Tensor] = {}
        for layer in layers:
            site = sites[layer.name]
            total = sums.get(id(site.tensor(site.weight_name)))
            if total is None or not bool(total.isfinite().all()) or not bool(total.any()):
                raise ConfigError(
                    "lora_ga: a layer has no gradient to start along",
                    saw=f"{layer.name}: {'none' if total is None else 'all zero, or not finite'}",
                    do="give batches in which it takes part in the loss, or leave it out of the targets",
                )
            starts |= self.named(layer, *self.along(layer, site.cut(total).flatten(1) / count))
        return starts

    def _site(self, layer: Layer) -> ModuleSite:
        """Return a layer's site if its gradient can be measured, and has enough directions."""
        site, most = layer.site, min(layer.size) // 2
        if not isinstance(site, ModuleSite) or site.kind == "embedding" or site.quantised:
            raise ConfigError(
                "lora_ga: this start needs the gradient of a layer's full weight",
                saw=f"{layer.name}, {'in few bits' if getattr(site, 'quantised', False) else site.kind}",
                do="load the base in full precision, or choose another start or other targets",
            )
        if layer.rank > most:
            raise ConfigError(
                "lora_ga: this start takes 2·rank directions of a layer",
                saw=f"rank {layer.rank} at {layer.name}, {layer.size[1]} to {layer.size[0]} features",
                do=f"give a rank of at most {most} there",
            )
        return site

    def along(self, layer: Layer, gradient: Tensor) -> Factors:
        """Return A₀ and B₀ of a layer for its G (out, in)."""
        generator = torch.Generator().manual_seed(SEED)
        r = layer.rank
        left, singular, right = principal(gradient, 4 * r, ROUNDS, generator)
        a, b = self.halves(r, generator)
        down, up = right[a], left[:, b]
        if self.variant == "peft":
            up = up * singular[b]
            c, d = self._theirs(layer, float(singular[b[0]]))
            down, up = down * c, up * d
        else:
            c = self._scale(layer)
            down, up = down * c, up * c
        if self.norm_clip:
            ratio = layer.weight().abs().max() / (layer.scale * (up @ down)).abs().max()
            down, up = (factor * ratio.clamp(max=1).sqrt() for factor in (down, up))
        return down, up

    def halves(self, r: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """Return which of the first 2r directions A takes, and which B."""
        if self.direction == "random":
            order = torch.randperm(2 * r, generator=generator).tolist()
            return order[:r], order[:r] if self.variant == "peft" else order[r:]
        first, second = list(range(r)), list(range(r, 2 * r))
        if self.direction == "ArBr":
            return list(range(1, 2 * r, 2)), list(range(0, 2 * r, 2))
        return (first, second) if self.direction == "ArB2r" else (second, first)

    def _scale(self, layer: Layer) -> float:
        """Return c, which multiplies both factors."""
        if self.scale == "stable":
            return float(layer.size[0] ** 0.25 / self.gamma**0.5)
        if self.scale == "weight_svd":
            singular = torch.linalg.svdvals(layer.weight())[: layer.rank]
            return float((singular / layer.scale).sqrt().mean())
        return 1.0 if self.scale == "unit" else 1 / layer.scale

    def _theirs(self, layer: Layer, first: float) -> tuple[float, float]:
        """Return what peft multiplies A and B by; `first` is the singular value of B's first column."""
        if self.scale == "weight_svd":
            return 1.0, float(torch.linalg.svdvals(layer.weight())[0]) / first if first else 1.0
        c = self._scale(layer)
        return (c if self.scale == "gd" else 1.0), c
