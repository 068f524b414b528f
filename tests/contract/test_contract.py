"""What the rehearsal asked of the contract itself, each piece by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from contract_checks import (
    Batch,
    batch_for,
    build,
    check_checkpointing,
    check_gradients,
    check_round_trip,
    check_routing,
    logits,
    offered,
    padded,
    part,
    stir,
)
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.authoring import (
    Adapter,
    At,
    AttentionDelta,
    BlockSite,
    Composite,
    Delta,
    Init,
    KeyValues,
    Method,
    OutputDelta,
    Ref,
    Site,
    hookimpl,
    setting,
)
from inlay.errors import StateError
from inlay_adapter import SerialAdapter
from inlay_lora import DoRA, LoRA
from inlay_prefix import PrefixTuning
from inlay_selective import LTSFT


class Scaled(OutputDelta):
    """Δy = v·(x Aᵀ) with one learned vector v for all sites and a frozen A of each site's own."""

    def __init__(self, site: Site, init: Init, shared: Ref) -> None:
        super().__init__()
        self.vectors = [shared]
        self.register_buffer("A", init.normal(site.out_features, site.in_features, std=0.1).data)

    def matrix(self) -> Tensor:
        found: Tensor = self.vectors[0].module[0][: len(self.A), None] * self.A
        return found

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        return F.linear(x, self.matrix())

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.matrix(), bias


@dataclass(frozen=True)
class SharedVector(Method):
    """A shared part that learns, under members that look at the weight below them."""

    id: ClassVar[str] = "contract_shared_vector"

    @staticmethod
    @hookimpl
    def inject(method: SharedVector, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        width = max(s.out_features for s in sites)
        shared = adapter.share("vector", nn.ParameterList([adapter.init(shared="vector").ones(width)]))
        for site in sites:
            adapter.place(site, Scaled(site, adapter.init(site), shared))
        return len(sites)


class SideBySide(AttentionDelta):
    """The columns of two prefixes, one after the other."""

    def __init__(self, children: Mapping[str, Sequence[Delta]]) -> None:
        super().__init__()
        self.columns = nn.ModuleDict({name: own[0] for name, own in children.items()})

    def forward(self, at: At) -> KeyValues:
        found = [delta(at.part(name)) for name, delta in self.columns.items()]
        return KeyValues(
            *(torch.cat(pair, dim=2) for pair in ([f.key for f in found], [f.value for f in found]))
        )


@dataclass(frozen=True)
class TwoPrefixes(Composite):
    """Two parts of one method, whose prepared tensors have the same names."""

    id: ClassVar[str] = "contract_two_prefixes"
    first: Method = setting()
    second: Method = setting()

    def parts(self) -> Mapping[str, Method]:
        return {"first": self.first, "second": self.second}

    def combine(self, site: Site, children: Mapping[str, Sequence[Delta]], init: Init) -> Delta:
        return SideBySide(children)


@dataclass(frozen=True)
class Wrapped(Composite):
    """A composite of one part that stands there as it is."""

    id: ClassVar[str] = "contract_wrapped"
    inner: Method = setting()

    def parts(self) -> Mapping[str, Method]:
        return {"inner": self.inner}

    def combine(self, site: Site, children: Mapping[str, Sequence[Delta]], init: Init) -> Delta:
        return children["inner"][0]


class Witness(OutputDelta):
    """Adds nothing; notes what it is told about its call."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = nn.Parameter(torch.ones(1))
        self.seen: list[tuple[Any, ...]] = []
        self.kept: list[tuple[int, int]] = []

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        real = at.real(y)
        at.store["steps"] = at.store.get("steps", 0) + 1
        self.kept.append((at.store.setdefault("who", id(self)), at.store["steps"]))
        self.seen.append((at.call.past_length, None if real is None else real.int().tolist()))
        return y.new_zeros(()) * self.unit


@dataclass(frozen=True)
class Witnesses(Method):
    """A witness behind each block."""

    id: ClassVar[str] = "contract_witnesses"
    accepts: ClassVar[frozenset[str]] = frozenset({"block"})
    default_targets: ClassVar[tuple[str, ...]] = ("block",)
    reads_call: ClassVar[bool] = True

    def delta(self, site: BlockSite, init: Init) -> Witness:  # type: ignore[override]
        return Witness()


class TaskShift(OutputDelta):
    """Δy = task · v: another value for every row."""

    def __init__(self, site: Site, init: Init) -> None:
        super().__init__()
        self.v = init.ones(site.out_features)

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        assert at.tasks is not None
        return at.tasks[:, None, None] * self.v


@dataclass(frozen=True)
class TaskShifts(Method):
    """A shift behind each norm that depends on the row's task."""

    id: ClassVar[str] = "contract_task_shifts"
    accepts: ClassVar[frozenset[str]] = frozenset({"norm"})
    default_targets: ClassVar[tuple[str, ...]] = ("norm",)
    reads_call: ClassVar[bool] = True

    def delta(self, site: Site, init: Init) -> TaskShift:
        return TaskShift(site, init)


@pytest.fixture(autouse=True)
def _offered() -> Iterator[None]:
    with offered(SharedVector, TwoPrefixes, Wrapped, Witnesses, TaskShifts):
        yield


def test_a_level_follows_shared_parts_that_learn() -> None:
    """DoRA reads the weight below it, which a shared vector changes that is none of the delta's own."""
    model = build("llama")
    batch = batch_for(model, labels=True)
    inlay.attach(model, SharedVector() + DoRA(rank=2), "fr", seed=0)
    stir(model, "fr", std=0.1)
    logits(model, batch)
    with torch.no_grad():
        part(model, "fr/contract_shared_vector").adapter.shared["vector"][0].mul_(3.0)
    changed = logits(model, batch)
    inlay.merge(model)
    torch.testing.assert_close(logits(model, batch), changed, rtol=1e-5, atol=1e-5)
    inlay.unmerge(model)
    for placed in ("fr/contract_shared_vector", "fr/dora"):
        check_gradients_of(model, placed, batch)


def check_gradients_of(model: nn.Module, name: str, batch: Batch) -> None:
    inlay.set_trainable(model, name)
    check_gradients(model, name, batch)


def test_shared_parts_start_from_streams_of_their_own() -> None:
    model = build("llama")
    inlay.attach(model, SharedVector(), "fr", seed=0)
    adapter = part(model, "fr").adapter
    one, two = (adapter.init(shared=name).normal(8) for name in ("one", "two"))
    assert not torch.equal(one, two)
    assert torch.equal(one, adapter.init(shared="one").normal(8))


def test_a_maker_seeded_by_a_method_forgets_the_adapters_seed() -> None:
    """What a method draws from a key of its own is alike in every adapter; the maker itself goes on."""
    model = build("llama")
    inlay.attach(model, SharedVector(), "fr", seed=0)
    inlay.attach(model, SharedVector(), "de", seed=1)
    makers = [part(model, name).adapter.init(shared="one") for name in ("fr", "de")]
    keyed = [maker.seeded("key").normal(8) for maker in makers]
    assert torch.equal(*keyed)
    assert not torch.equal(keyed[0], makers[0].seeded("other").normal(8))
    own = [maker.normal(8) for maker in makers]
    assert not torch.equal(*own)
    assert torch.equal(own[0], part(model, "fr").adapter.init(shared="one").normal(8))


def test_base_size_leaves_adapters_out() -> None:
    model = build("qwen")
    size = sum(p.numel() for p in model.parameters())
    inlay.attach(model, SharedVector(), "fr")
    inlay.attach(model, LoRA(), "de")
    assert part(model, "de").adapter.base_size == size


@pytest.mark.parametrize("reentrant", [False, True])
def test_parts_of_a_composite_read_their_own_prepared_tensors(reentrant: bool, tmp_path: Path) -> None:
    """Two generated prefixes in one composite equal the two stacked."""
    first, second = PrefixTuning(length=3, hidden=5), PrefixTuning(length=2, hidden=4)
    model, reference = build("llama"), build("llama")
    inlay.attach(model, TwoPrefixes(first=first, second=second), "fr", seed=0)
    stir(model, "fr")
    inlay.attach(reference, first.named("first") + second.named("second"), "fr", seed=0)
    for name, child in part(model, "fr").adapter.children.items():
        part(reference, f"fr/{name}").adapter.shared.load_state_dict(child.shared.state_dict())
    batch = batch_for(model, labels=True)
    torch.testing.assert_close(logits(model, batch), logits(reference, batch), rtol=1e-5, atol=1e-6)
    check_gradients(model, "fr", batch)
    check_checkpointing(model, batch, reentrant=reentrant)
    assert [s.name for s in inlay.stages(model, "fr")] == ["first/train", "second/train"]
    assert inlay.advance(model, "fr") == "second/train"
    torch.testing.assert_close(logits(model, batch), logits(reference, batch), rtol=1e-5, atol=1e-6)
    check_round_trip(lambda: build("llama"), model, "fr", batch_for(model), tmp_path)


def test_a_parts_stages_data_and_loss_work_inside_a_composite(tmp_path: Path) -> None:
    inner = LTSFT(count=20, targets=("query",), penalty=0.5)
    model, reference = build("llama"), build("llama")
    inlay.attach(model, Wrapped(inner=inner), "fr", seed=0)
    inlay.attach(reference, inner, "fr", seed=0)
    for m in (model, reference):
        stir(m, "fr")
    loss = inlay.auxiliary_loss(reference)
    assert loss > 0
    torch.testing.assert_close(inlay.auxiliary_loss(model), loss)
    assert [s.name for s in inlay.stages(model, "fr")] == ["inner/full 1", "inner/sparse 1"]
    assert inlay.advance(model, "fr") == "inner/sparse 1"
    assert inlay.advance(reference, "fr") == "sparse 1"
    for m in (model, reference):
        stir(m, "fr")
    batch = batch_for(model)
    assert torch.equal(logits(model, batch), logits(reference, batch))
    assert part(model, "fr").adapter.data == {"inner": part(reference, "fr").adapter.data}
    check_round_trip(lambda: build("llama"), model, "fr", batch, tmp_path)


def witnessed(model: nn.Module) -> list[list[tuple[Any, ...]]]:
    return [delta.seen for _, delta in part(model, "fr").adapter.placed]


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}],
                         ids=["dynamic", "static"])  # fmt: skip
def test_every_layer_is_told_the_same_about_a_call(options: dict[str, Any]) -> None:
    """The cache grows while a call runs; what it held before is one number for all layers."""
    model = build("llama")
    inlay.attach(model, Witnesses(), "fr")
    model.generate(**padded(model, [4, 2]), max_new_tokens=3, do_sample=False, eos_token_id=None, **options)
    prompt = (0, [[1, 1, 1, 1], [0, 0, 1, 1]])
    assert witnessed(model) == [[prompt, (4, [[1], [1]]), (5, [[1], [1]])]] * 2


def test_the_store_is_a_parts_own_at_a_site_and_lasts_one_generation() -> None:
    model = build("llama")
    for name in ("fr", "de"):
        inlay.attach(model, Witnesses(), name)
    for _ in range(2):
        model.generate(**padded(model, [4, 2]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    for name in ("fr", "de"):
        for _, delta in part(model, name).adapter.placed:
            assert delta.kept == [(id(delta), step) for step in (1, 2, 3)] * 2
            delta.kept.clear()
    logits(model, batch_for(model))
    assert delta.kept == [(id(delta), 1)]


def test_a_routed_delta_is_told_about_its_own_rows() -> None:
    model = build("llama")
    inlay.attach(model, Witnesses(), "fr")
    with inlay.route(model, [None, "fr", None, "fr"]):
        logits(model, padded(model, [4, 2, 3, 1]))
        logits(model, {"input_ids": padded(model, [4, 2, 3, 1])["input_ids"]})
    assert witnessed(model) == [[(0, [[0, 0, 1, 1], [0, 0, 0, 1]]), (0, None)]] * 2


def test_a_routed_delta_may_run_a_module_that_is_routed_itself() -> None:
    """Pfeiffer's adapter applies the block's norm, which rows of the batch have trained differently."""
    model = build("bert")
    serial = SerialAdapter(placement="pfeiffer", rank=2)
    inlay.attach(model, serial, "fr", seed=0, train=("norm",))
    inlay.attach(model, LoRA(rank=2), "de", seed=1, train=("norm",))
    inlay.attach(model, serial, "it", seed=2)
    for number, name in enumerate(("fr", "de", "it")):
        stir(model, name, seed=number)
    check_routing(model, ["it", "fr", None, "de", "fr", "it"], batch_for(model, rows=6))


def test_rows_and_tasks_hold_in_modules_that_deltas_run() -> None:
    model = build("bert")
    serial = SerialAdapter(placement="pfeiffer", rank=2)
    inlay.attach(model, serial + TaskShifts(), "fr", seed=0)
    inlay.attach(model, serial + TaskShifts(), "de", seed=1)
    for name in ("fr", "de"):
        stir(model, name, seed=len(name) + ord(name[0]))
    batch = batch_for(model, rows=5)
    check_routing(model, ["de", "fr", None, "fr", "de"], batch, tasks=[1, 2, 3, 4, 5])


def test_encoder_decoder_masks_are_told_apart() -> None:
    model = build("t5")
    inlay.attach(model, Witnesses(), "fr")
    logits(model, {
        "input_ids": torch.full((1, 3), 5), "attention_mask": torch.tensor([[1, 1, 0]]),
        "decoder_input_ids": torch.full((1, 2), 5), "decoder_attention_mask": torch.tensor([[0, 1]]),
    })  # fmt: skip
    assert witnessed(model) == [[(0, [[1, 1, 0]])]] * 2 + [[(0, [[0, 1]])]] * 2


def test_default_devices_do_not_change_where_values_are_drawn() -> None:
    model, other = build("llama"), build("llama")
    inlay.attach(model, PrefixTuning(length=2, hidden=4), "fr", seed=0)
    with torch.device("meta"):
        inlay.attach(other, PrefixTuning(length=2, hidden=4), "fr", seed=0)
        inlay.attach(other, LoRA(rank=2), "drawn")
    ours, theirs = part(model, "fr").adapter.tensors(), part(other, "fr").adapter.tensors()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert {t.device.type for t in part(other, "drawn").adapter.tensors().values()} == {"cpu"}


def test_others_cannot_be_reached_where_nothing_is_attached() -> None:
    adapter = Adapter((), model=build("llama"))
    with pytest.raises(inlay.InlayError, match="other adapters cannot be reached here"):
        adapter.attached("fr")
    with pytest.raises(StateError, match="nothing is attached"):
        inlay.stages(build("llama"), "fr")
