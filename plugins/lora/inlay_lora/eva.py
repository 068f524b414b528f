"""EVA: low-rank factors that start along what their layer reads, with ranks where most is explained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from inlay.authoring import ConfigError, calls, setting
from inlay_lora.inputs import Inputs
from inlay_lora.pca import NOTHING, IncrementalPCA
from inlay_lora.start import DOWN, Layer, Start

PASSES = 10  # over the data, at most


@dataclass(frozen=True, kw_only=True)
class EVA(Start):
    """Explained-variance adaptation: A₀ = the first r_l principal directions of what the layer reads.

    Inputs are gathered over tokens that are not padding and (`label_mask`) have no label −100, and go
    through an incremental PCA of up to round(rho·r) directions, until those in use have a cosine of
    at least `tau` with what they were a batch before; the data is gone through again if need be,
    10 times at most. The ranks r_l go to the directions that explain the largest shares of their
    layer's variance, over all L layers: Σ r_l = L·r. With rho=1 all are r. A layer of rank 0 gets no
    adapter. `whiten` divides row j by √σ_j, σ its singular value.

    B₀ = 0, so the output is unchanged at the start; s is alpha / r (or alpha / √r) whatever r_l.
    Embeddings start at random with rank r. Parameters: Σ r_l·(in + out). arXiv 2410.07170,
    huggingface/peft. Differs: batches of fewer tokens than directions count, too.
    """

    id: ClassVar[str] = "eva"
    calibrates: ClassVar[bool] = True

    rho: float = setting(2.0, least=1)
    tau: float = setting(0.99, above=0, most=1)
    whiten: bool = setting(False)
    label_mask: bool = setting(True)

    def measure(self, layers: Sequence[Layer], model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
        linear = {x.name: x for x in layers if x.called}
        if not linear:
            raise ConfigError(
                "eva: no target is a linear layer",
                saw="embeddings alone",
                do="target layers too, or drop start",
            )
        keep = max(self._most(layer) for layer in linear.values())
        inputs = Inputs(
            [layer.site for layer in linear.values()],
            lambda site: IncrementalPCA(min(keep, site.in_features)),
            start=self.id, label_mask=self.label_mask,
        )  # fmt: skip
        with inputs.watching():
            ranks = self._once(linear, model, inputs, batches)
            _check(linear, inputs)
            for _ in range(PASSES - 1):
                if inputs.waiting:
                    ranks = self._once(linear, model, inputs, batches)
        return {f"{name}.{DOWN}": self.first(inputs.found[name], r) for name, r in ranks.items()}

    def _most(self, layer: Layer) -> int:
        """Return the most directions that a layer may get."""
        return max(layer.rank, min(round(self.rho * layer.rank), *layer.size))

    def _once(
        self,
        layers: Mapping[str, Layer],
        model: nn.Module,
        inputs: Inputs[IncrementalPCA],
        batches: Iterable[Any],
    ) -> dict[str, int]:
        """Go through the data until all directions in use stay; return each layer's rank so far."""
        ranks: dict[str, int] = {}
        budget = sum(layer.rank for layer in layers.values())
        for call in calls(model, batches):
            inputs.run(model, call)
            shares = {n: pca.explained[: self._most(layers[n])] for n, pca in inputs.found.items()}
            ranks = shared_out(shares, budget)
            settled = {name: inputs.found[name].settled(self.tau) for name in ranks}
            inputs.waiting = {name for name, r in ranks.items() if not bool(settled[name][:r].all())}
            if len(ranks) == len(layers) and not inputs.waiting:
                break
        return ranks

    def first(self, pca: IncrementalPCA, rank: int) -> Tensor:
        """Return A₀ (rank, in) from the directions of what a layer reads."""
        rows = pca.directions[:rank].clone()  # layers that read the same share the directions
        if self.whiten and rank:
            rows /= pca.singular[:rank, None].clamp(min=NOTHING * float(pca.singular[0])).sqrt()
        return rows


def _check(layers: Mapping[str, Layer], inputs: Inputs[IncrementalPCA]) -> None:
    """Raise unless each layer has read enough to find as many directions as its rank in."""
    inputs.check_all_read()
    for name, layer in layers.items():
        tokens, width = inputs.found[name].rows, layer.site.in_features
        if layer.rank > width or layer.rank >= tokens:
            raise ConfigError(
                "eva: too little is read to find as many directions as the rank",
                saw=f"{name}: {tokens} tokens of {width} features, rank {layer.rank}",
                do="give more data (check masks and labels), or take a smaller rank",
            )


def shared_out(explained: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Return how many of the `budget` largest shares are each layer's; of equal ones, the first."""
    entries = [(-share, j, name) for name, s in explained.items() for j, share in enumerate(s.tolist())]
    ranks = dict.fromkeys(explained, 0)
    for _, _, name in sorted(entries, key=lambda entry: entry[:2])[:budget]:
        ranks[name] += 1
    return ranks
