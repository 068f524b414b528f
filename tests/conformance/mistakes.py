"""Methods broken in one way each: what authors get wrong, and the rule that says so."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.authoring import Adapter, At, Init, Method, Site, hookimpl, register, setting
from inlay.testing import neighbours as kit

COUNTER = itertools.count()


class Broken(kit.LowRank):
    """A low-rank change with one mistake, named by `how`."""

    scratch: ClassVar[dict[str, Any]] = {}

    def __init__(self, site: Site, init: Init, how: str) -> None:
        super().__init__(site, init, 2)
        self.how, self.name, self.calls = how, site.name, 0
        getattr(self, f"make_{how}", lambda *_: None)(site, init)

    # -- mistakes of making ----------------------------------------------------------------------------

    def make_starts_elsewhere(self, site: Site, init: Init) -> None:
        self.B = init.ones(site.out_features, 2)

    def make_draws_globally(self, site: Site, init: Init) -> None:
        self.A = nn.Parameter(torch.randn(2, site.in_features).to(init.dtype))

    def make_counts(self, site: Site, init: Init) -> None:
        self.A = init.full(2, site.in_features, value=1.0 + next(COUNTER) % 5)

    def make_unused(self, site: Site, init: Init) -> None:
        self.C = init.ones(3)

    def make_unsaved(self, site: Site, init: Init) -> None:
        self.factor = 1.0 + next(COUNTER)

    def make_hashed(self, site: Site, init: Init) -> None:
        self.factor = 1.0 + hash(site.name) % 1000

    def make_unpicklable(self, site: Site, init: Init) -> None:
        self.function = lambda x: x

    def make_tied(self, site: Site, init: Init) -> None:
        self.tied = site.module.weight

    def make_on_the_class(self, site: Site, init: Init) -> None:
        self.B = self.scratch.setdefault(site.name, self.B)

    def make_writes_base(self, site: Site, init: Init) -> None:
        self.write = lambda: site.module.weight.data.mul_(1.001)

    def make_copies_base(self, site: Site, init: Init) -> None:
        self.A = nn.Parameter(site.module.weight.detach()[:2].clone())

    def make_reads_base(self, site: Site, init: Init) -> None:
        self.weight = lambda: site.module.weight

    def make_asks_the_config(self, site: Site, init: Init) -> None:
        if site.layer is None:
            raise TypeError("what layer is this?")

    # -- mistakes of running ---------------------------------------------------------------------------

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        change = super().forward(x, y, at) * getattr(self, "factor", 1.0)
        return getattr(self, f"run_{self.how}", lambda x, y, change: change)(x, y, change)

    def run_writes_base(self, x: Tensor, y: Tensor, change: Tensor) -> Tensor:
        if self.training:
            self.write()
        return change

    def run_warns(self, x: Tensor, y: Tensor, change: Tensor) -> Tensor:
        warnings.warn("a shape broadcasts", stacklevel=1)
        return change

    def run_mixes_rows(self, x: Tensor, y: Tensor, change: Tensor) -> Tensor:
        return change + 0.5 * change.mean(0, keepdim=True)

    def run_returns_the_whole_output(self, x: Tensor, y: Tensor, change: Tensor) -> Tensor:
        return y + change

    def run_forgets_to_scale(self, x: Tensor, y: Tensor, change: Tensor) -> Tensor:
        return 2 * change

    def run_drops_always(self, x: Tensor, y: Tensor, change: Tensor) -> Tensor:
        return nn.functional.dropout(change, 0.2, training=True)

    def run_averages_over_padding(self, x: Tensor, y: Tensor, change: Tensor) -> Tensor:
        return change + change.mean(-2, keepdim=True)

    def run_keeps_the_first_shape(self, x: Tensor, y: Tensor, change: Tensor) -> Tensor:
        return change * self.scratch.setdefault(self.name, torch.ones(x.shape[:-1])).unsqueeze(-1)

    def run_counts_positions_from_the_call(self, x: Tensor, y: Tensor, change: Tensor) -> Tensor:
        return change * torch.arange(1.0, 1 + x.shape[-2]).unsqueeze(-1)

    def run_counts_calls(self, x: Tensor, y: Tensor, change: Tensor) -> Tensor:
        self.calls += 1
        return change * self.calls

    def run_draws_from_python(self, x: Tensor, y: Tensor, change: Tensor) -> Tensor:
        return change * random.random()

    def run_wants_one_dtype(self, x: Tensor, y: Tensor, change: Tensor) -> Tensor:
        return torch.zeros_like(y).lerp(change.float(), 1.0)

    def run_looks_at_values(self, x: Tensor, y: Tensor, change: Tensor) -> Tensor:
        return change if change.sum().item() != 1.5 else 2 * change

    def run_detaches(self, x: Tensor, y: Tensor, change: Tensor) -> Tensor:
        return change + change.detach() * change

    def run_reads_base(self, x: Tensor, y: Tensor, change: Tensor) -> Tensor:
        return change + change.sum() * (x @ self.weight().T)

    # -- mistakes of folding ---------------------------------------------------------------------------

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        folded, bias = super().fold(weight, bias)
        return getattr(self, f"fold_{self.how}", lambda weight, folded, bias: (folded, bias))(
            weight, folded, bias
        )

    def fold_folds_nearly(self, weight: Tensor, folded: Tensor, bias: Any) -> tuple[Tensor, Any]:
        return weight + (folded - weight) * (1 + 4e-4), bias

    def fold_folds_transposed(self, weight: Tensor, folded: Tensor, bias: Any) -> tuple[Tensor, Any]:
        change = folded - weight
        return weight + change.flatten().view(change.T.shape).T, bias

    def fold_folds_coarsely(self, weight: Tensor, folded: Tensor, bias: Any) -> tuple[Tensor, Any]:
        step = 2 ** (folded.abs().log2().floor() - 5)  # six bits; bfloat16 has eight
        return (folded / step).round() * step, bias

    def fold_folds_and_changes(self, weight: Tensor, folded: Tensor, bias: Any) -> tuple[Tensor, Any]:
        self.A.data.neg_(), self.B.data.neg_()
        return folded, bias

    def fold_adds_bias(self, weight: Tensor, folded: Tensor, bias: Any) -> tuple[Tensor, Any]:
        return folded, folded.new_zeros(folded.shape[0]) if bias is None else bias


@register
@dataclass(frozen=True)
class Mistaken(Method):
    """A method with one mistake."""

    id: ClassVar[str] = "mistaken"
    how: str = setting("not at all")

    def delta(self, site: Site, init: Init) -> Broken:
        return Broken(site, init, self.how)

    @staticmethod
    @hookimpl
    def inject(method: Mistaken, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        if method.how == "hooks" and not adapter.meta:
            sites[0].module.register_forward_hook(lambda module, args, output: output * 1.5)
        if method.how == "touches" and not adapter.meta:
            sites[-1].module.weight.data.neg_()
        return Method.inject(method, sites, adapter)

    @staticmethod
    @hookimpl
    def trainable_mask(method: Mistaken, adapter: Adapter) -> dict[str, bool]:  # type: ignore[override]
        mask = Method.trainable_mask(method, adapter)
        return {n: on for n, on in mask.items() if not (method.how == "masks_half" and n.endswith("A"))}

    @staticmethod
    @hookimpl
    def state_dict(method: Mistaken, adapter: Adapter) -> dict[str, Tensor]:  # type: ignore[override]
        state = Method.state_dict(method, adapter)
        if method.how == "saves_copies":
            return {name: tensor.clone() for name, tensor in state.items()}
        if method.how == "saves_half":
            return {name: tensor for name, tensor in state.items() if not name.endswith("A")}
        return state


@register
@dataclass(frozen=True)
class Unchecked(Mistaken):
    """A method that does not check its settings."""

    id: ClassVar[str] = "unchecked"

    def __post_init__(self) -> None:
        object.__setattr__(self, "note", self.how)


@register
@dataclass(frozen=True)
class Opaque(Mistaken):
    """A method with a setting that is no data."""

    id: ClassVar[str] = "opaque"
    function: Any = setting(abs)


class Heavy(Mistaken):
    """A method whose module imports transformers."""

    __module__ = "transformers"


def fewer(method: Method, sites: Sequence[Site]) -> int:
    """A documented count that forgets a tensor."""
    return sum(2 * (s.in_features + s.out_features) for s in sites)


@dataclass(frozen=True)
class Mistake:
    """What is wrong, in words; the rule that catches it, what that says, and how the method makes it."""

    what: str
    rule: str
    says: str
    how: str = "not at all"
    kind: type[Method] = Mistaken
    declared: dict[str, Any] = field(default_factory=dict)
    seed: int = 1


MISTAKES = [
    Mistake("a factor does not start at zero", "R01", "attaching: the output differs", "starts_elsewhere"),
    Mistake("returns y + Δy where Δy is asked for", "R01", "attaching: the output differs",
            "returns_the_whole_output"),
    Mistake("leaks a hook on detach", "R02", "q_proj: content of _forward_hooks", "hooks"),
    Mistake("changes the base when it is placed", "R03", "after a failure at inject .*v_proj: tensor weight",
            "touches"),
    Mistake("acts through a hook of its own", "R04", r"use\(model\): the output differs", "hooks"),
    Mistake("uses global random state", "R05", "drew from torch's generator", "draws_globally"),
    Mistake("depends on the order of creation", "R05", "gave .* other|differ|same seed", "counts"),
    Mistake("writes to the base in its forward", "R06", "AdamW changed the base", "writes_base"),
    Mistake("owns a parameter that is never used", "R07", r"flag or gradient of .*q_proj\.C", "unused"),
    Mistake("trains the base", "R07", "a base tensor", "tied"),
    Mistake("leaves a name out of the mask", "R07", "mask", "masks_half"),
    Mistake("documents too few parameters", "R08", "has 460 parameters; its expression gives 448", "unused",
            declared={"parameters": fewer}),
    Mistake("folds with a slightly wrong factor", "R09", "error .*, effect", "folds_nearly"),
    Mistake("forgets to scale when it merges", "R09", "error 5.0e-01 of the effect", "forgets_to_scale"),
    Mistake("merges transposed", "R09", "error 1.4.* of the effect", "folds_transposed"),
    Mistake("folds in few bits", "R10", "does not do what the adapted one does", "folds_coarsely"),
    Mistake("changes its own tensors when it folds", "R11", "after merge and unmerge .*tensor A",
            "folds_and_changes"),
    Mistake("gives a bias to layers without one", "R12", "the merged model is not plain: .*tensor bias",
            "adds_bias"),
    Mistake("has a fold it does not declare", "R14", "merging raised nothing", declared={"merges": False}),
    Mistake("keeps a number that is not saved", "R15", "loading: the output differs", "unsaved"),
    Mistake("saves copies of its tensors", "R15", "gives copies", "saves_copies"),
    Mistake("saves only some of its tensors", "R15", "load|differs|tensors", "saves_half"),
    Mistake("drops out in evaluation too", "R15", "loading: the output differs", "drops_always"),
    Mistake("depends on the process", "R16", "the other process computed other bits", "hashed"),
    Mistake("holds a function that cannot be pickled", "R17", "pickle local object", "unpicklable"),
    Mistake("registers a tensor of the base", "R18", r"loading a base changed .*q_proj\.tied", "tied"),
    Mistake("keeps a number that save_pretrained does not see", "R19",
            "from_pretrained and load: the output differs", "unsaved"),
    Mistake("mixes the rows of a batch", "R20", r"row 1 \(fr\) is .* off the sample alone", "mixes_rows"),
    Mistake("shares a tensor between adapters", "R21",
            "training 'de' changed .*q_proj.B|attaching, training and", "on_the_class"),
    Mistake("has a setting that is no data", "R22", "is not JSON serializable", kind=Opaque),
    Mistake("does not check its settings", "R23", r"Unchecked\(targets=.*raised nothing", kind=Unchecked),
    Mistake("warns", "R24", "UserWarning: a shape broadcasts", "warns"),
    Mistake("imports transformers at the top of a file", "R25", "importing transformers imports transformers",
            kind=Heavy),
    Mistake("has no paper and no description", "R26", "is no arXiv id"),
    Mistake("ignores the mask", "R27", "off the row alone", "averages_over_padding"),
    Mistake("keeps a tensor of the first call's shape", "R27", "must match", "keeps_the_first_shape"),
    Mistake("counts positions from the start of the call", "R28", "through the cache the logits are",
            "counts_positions_from_the_call"),
    Mistake("loses its state when a block runs again", "R29", "checkpointing .* off", "counts_calls"),
    Mistake("draws from a generator nobody restores", "R29", "checkpointing .* off", "draws_from_python"),
    Mistake("wants all tensors in one dtype", "R30", "dtype", "wants_one_dtype"),
    Mistake("branches on a tensor's values", "R31", "item|[Gg]raph break|Unsupported",
            "looks_at_values"),
    Mistake("detaches a factor", "R32", "off the difference quotient", "detaches"),
    Mistake("renames a tensor on users' disks", "R34", "differ in: settings: .*; tensors: ", "unused"),
    Mistake("copies the base when it is made", "R35", "has no values", "copies_base"),
    Mistake("reads the packed bytes of a quantised weight", "R36", "shape|size|dtype|cannot be multiplied",
            "reads_base"),
    Mistake("asks for what only transformers' models have", "R37", "what layer is this", "asks_the_config"),
]  # fmt: skip
