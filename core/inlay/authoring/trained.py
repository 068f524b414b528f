"""Training the base's own tensors: heads, norms, biases, as deltas like any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from inlay.delta import Change, WeightDelta, Weights
from inlay.method import Method
from inlay.weights import read

if TYPE_CHECKING:
    from inlay.adapter import Init
    from inlay.sites import ModuleSite, Site


class OwnValues(WeightDelta):
    """Full values of a site's weight and bias, in place of the base's: W' = weight, b' = bias.

    They are copies of the base's at the start. A freshly initialised head differs in every
    process, so its values are saved whole and not as a difference.
    """

    replaces: ClassVar[bool] = True

    def __init__(self, site: ModuleSite, init: Init) -> None:
        super().__init__()
        weight, bias = read(site)
        self.weight = init.tensor(weight)
        self.bias = None if bias is None else init.tensor(bias)

    def forward(self, level: Weights) -> Change:
        return Change(self.weight, self.bias, replaces=True)


class Shift(WeightDelta):
    """Differences added to a site's weight and/or bias, zero at the start: W' = W + δ, b' = b + δ_b.

    Of a bias only where there is one, or, if `anew`, everywhere.
    """

    def __init__(
        self, site: ModuleSite, init: Init, *, weight: bool = True, bias: bool = True, anew: bool = False
    ) -> None:
        super().__init__()
        shape, bias_shape = shapes(site)
        self.weight = init.zeros(*shape) if weight else None
        self.bias = init.zeros(*bias_shape) if bias and (site.has_bias or anew) else None

    def forward(self, level: Weights) -> Change:
        return Change(self.weight, self.bias)


def shapes(site: ModuleSite) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a site's weight and bias as folds see them."""
    if site.is_linear:
        return (site.out_features, site.in_features), (site.out_features,)
    tensor = site.tensor(site.weight_name)
    assert tensor is not None
    return tuple(tensor.shape), (tensor.shape[0],)


@dataclass(frozen=True)
class Trained(Method):
    """Train the base's own tensors at the targets, whatever they are: heads, norms, whole layers.

    θ' = values, a copy of θ at the start. Parameters: as many as the targets hold. What
    `attach(train=("head",))` adds to a stack.
    """

    id: ClassVar[str] = "trained"
    accepts: ClassVar[frozenset[str]] = frozenset(
        {"linear", "conv1d", "conv", "embedding", "norm", "parameter"}
    )
    default_targets: ClassVar[tuple[str, ...]] = ("head",)
    lr: ClassVar[float] = 1e-3

    def delta(self, site: Site, init: Init) -> OwnValues:
        return OwnValues(site, init)  # type: ignore[arg-type]
