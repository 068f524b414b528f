"""FishMask: training the entries that the Fisher information of the task points at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.authoring import (
    Adapter,
    ConfigError,
    Method,
    OwnValues,
    Site,
    calls,
    gradients,
    hookimpl,
    own_loss,
    rows,
    setting,
)
from inlay.authoring.sparse import Place, distinct, largest, place_entries, places, undecided


def class_losses(output: Any) -> Sequence[Tensor]:
    """Return √p(y)·(−log p(y)) of one sample for every class y: the squares of its gradients sum to E_y."""
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != 2:
        raise ConfigError(
            'fishmask: fisher="expect" is for models that classify',
            saw="no logits" if logits is None else f"logits of shape {tuple(logits.shape)}",
            do='take fisher="label", with labels in the batches',
        )
    logs = logits[0].float().log_softmax(-1)
    return list(-logs * logs.detach().mul(0.5).exp())


LOSSES = {"label": own_loss, "expect": class_losses}


@dataclass(frozen=True)
class FishMask(Method):
    """A fixed sparse mask: the entries of all parameters with the largest Fisher information learn.

        θ' = θ + m ⊙ δ,   F = Σ_x (∂ log p(y|x) / ∂θ)²,   m the largest F of all targets together

    y is the sample's label (the empirical Fisher), or, with fisher="expect", every class by its
    probability. F is summed over the first `samples` samples of the data, one by one. A new task's
    head learns whole; a language model's head is chosen from like the rest. Ties: the first entries.

    Parameters: ⌊density·N⌋, the head's among them, N the parameters of the targets (a tied one
    once); by default these are all of the model's. arXiv 2111.09839, varunnair18/FISH. Differs: δ is
    kept at the chosen entries alone, so an optimizer holds nothing else and moves nothing else.
    """

    id: ClassVar[str] = "fishmask"
    paper: ClassVar[str] = "2111.09839"
    accepts: ClassVar[frozenset[str]] = frozenset(
        {"linear", "conv1d", "conv", "embedding", "norm", "parameter"}
    )
    default_targets: ClassVar[tuple[str, ...]] = ("",)  # the whole model
    calibrates: ClassVar[bool] = True
    lr: ClassVar[float] = 3e-3
    weight_decay: ClassVar[float | None] = 0.0

    density: float = setting(0.005, above=0, most=1)
    samples: int = setting(1024, least=1)
    fisher: Literal["label", "expect"] = setting("label")

    def suits(self, site: Site) -> bool:
        relative = site.kind == "embedding" and site.layer is not None
        return not relative and all(place.tensor.is_floating_point() for place in places([site]))

    def unsuited(self) -> str:
        return "quantised weights have no gradients, and relative positions no rows; choose other targets"

    @staticmethod
    @hookimpl
    def calibrate(
        method: FishMask, model: nn.Module, sites: Sequence[Site], batches: Iterable[Any]
    ) -> dict[str, Tensor]:
        _, found, count = method.split(model, sites)
        scores = {id(p.tensor): torch.zeros_like(p.tensor, dtype=torch.float32) for p in found}
        samples = islice((row for call in calls(model, batches) for row in rows(call)), method.samples)
        for measured in gradients(model, samples, scores.keys(), LOSSES[method.fisher]):
            for key, gradient in measured.items():
                scores[key].addcmul_(gradient.float(), gradient.float())
        return largest({p.label: p.view(scores[id(p.tensor)]) for p in found}, count)

    @staticmethod
    @hookimpl
    def inject(method: FishMask, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        heads, found, count = method.split(adapter.model, sites)
        for site in heads:
            adapter.place(site, OwnValues(site, adapter.init(site)))  # type: ignore[arg-type]
        chosen = adapter.calibration or undecided(found, count)
        place_entries(adapter, [site for site in sites if site not in heads], chosen)
        return len(sites)

    def split(self, model: nn.Module, sites: Sequence[Site]) -> tuple[list[Site], list[Place], int]:
        """Return the head's sites (they learn whole), the other tensors, and how many of their entries do."""
        getter: Any = getattr(model, "get_output_embeddings", None)
        new = getter is None or getter() is None
        heads = [site for site in sites if new and site.role == "head"]
        found = distinct(places(site for site in sites if site not in heads))
        of_heads = sum(place.size for place in distinct(places(heads)))
        whole = of_heads + sum(place.size for place in found)
        count = int(self.density * whole) - of_heads
        if count <= 0:
            raise ConfigError(
                "fishmask: the density leaves no entry to choose",
                saw=f"density={self.density} of {whole:,} parameters, of which the head has {of_heads:,}",
                do=f"take a larger density, such as {1.5 * (of_heads + 1) / whole:.2g}",
            )
        return heads, found, count
