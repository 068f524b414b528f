"""docs/hooks.md against the contract: a heading with the exact signature, an example and a test per hook."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay import hookspecs
from inlay.authoring import (
    Adapter,
    CannotMerge,
    Group,
    Method,
    OutputDelta,
    Site,
    Stage,
    Step,
    hookimpl,
    register,
    setting,
)
from inlay.contract import HOOKS
from inlay.errors import CheckpointError, ConfigError, RegistryError
from inlay.registry import registry

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "hooks.md").read_text()
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def signatures() -> dict[str, str]:
    """Return every hook's signature as it is written in hookspecs.py."""
    tree = ast.parse(Path(str(hookspecs.__file__)).read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    return {
        n.name: f"{n.name}({ast.unparse(n.args)}) -> {ast.unparse(n.returns)}" for n in found if n.returns
    }


def sections() -> dict[str, str]:
    """Return the text under each heading of the page that is a signature, by hook."""
    parts = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    return {part.partition("(")[0].strip("`"): part for part in parts if part.startswith("`")}


def test_the_contract_is_what_pluggy_sees() -> None:
    assert tuple(signatures()) == HOOKS
    assert {"inject", "trainable_mask", "merge", "state_dict"} <= set(HOOKS)


def test_every_hook_has_its_exact_signature_as_a_heading_and_no_other_has_one() -> None:
    headings = re.findall(r"^## `(.+)`$", PAGE, flags=re.MULTILINE)
    assert headings == list(signatures().values())


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_an_example_that_implements_it(hook: str) -> None:
    """That the example runs is tested with the page, in test_pages.py."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", sections()[hook], flags=re.DOTALL))
    assert re.search(rf"@hookimpl\n    def {hook}\(", code)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test_here(hook: str) -> None:
    assert callable(globals()[f"test_hook_{hook}"])


# -- a tiny method, and what it is tried on -------------------------------------------------------


class Scaling(OutputDelta):
    """Δy = a·s ⊙ y, with s (out,) zero and a scalar a, one."""

    reads: ClassVar[frozenset[str]] = frozenset({"y"})

    def __init__(self, site: Site, init: Any) -> None:
        super().__init__()
        self.scale, self.by = init.zeros(site.out_features), init.ones(1)

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        return self.by * self.scale * y

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = 1 + (self.by * self.scale).to(weight.dtype)
        return factor[:, None] * weight, None if bias is None else factor * bias


@dataclass(frozen=True, kw_only=True)
class Tiny(Method):
    id: ClassVar[str] = "tiny"
    amount: float = setting(1.0, above=0)

    def delta(self, site: Site, init: Any) -> Scaling:
        return Scaling(site, init)


def two_layers() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6))


def fill(model: nn.Module, value: float, ending: str = ".scale") -> None:
    """Set every adapter tensor of one name, so that the adapter has an effect."""
    hit = [p for name, p in model.named_parameters() if name.endswith(ending)]
    assert hit
    with torch.no_grad():
        for parameter in hit:
            parameter.fill_(value)


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    before = dict(registry._local)
    yield
    registry._local.clear()
    registry._local.update(before)


# -- one test per hook ----------------------------------------------------------------------------


def test_hook_inject() -> None:
    calls: list[tuple[str, ...]] = []

    @dataclass(frozen=True, kw_only=True)
    class Twice(Tiny):
        id: ClassVar[str] = "twice"

        @staticmethod
        @hookimpl
        def inject(method: Twice, sites: Sequence[Site], adapter: Adapter) -> int:
            calls.append(tuple(site.name for site in sites))
            for site in sites:
                for _ in range(2):
                    adapter.place(site, Scaling(site, adapter.init(site)))
            return len(sites)

    model, plain = two_layers(), two_layers()
    inlay.attach(model, Twice(targets=["2", "0"]))
    assert calls == [("0", "2")], "sites come in model order, once"
    fill(model, 0.5)
    hidden = torch.tanh(plain[0](X) * 1.5 * 1.5)
    torch.testing.assert_close(model(X), plain[2](hidden) * 1.5 * 1.5)


def test_hook_inject_that_answers_nothing_is_an_error_and_the_model_stays_untouched() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Silent(Tiny):
        id: ClassVar[str] = "silent"

        @staticmethod
        @hookimpl
        def inject(method: Silent, sites: Sequence[Site], adapter: Adapter) -> None:
            for site in sites:
                adapter.place(site, method.delta(site, adapter.init(site)))

    model = two_layers()
    before = [(type(m), sorted(m.__dict__)) for m in model.modules()]
    with pytest.raises(RegistryError, match=r"the hook 'inject' gave no answer"):
        inlay.attach(model, Silent(targets=["0"]))
    assert [(type(m), sorted(m.__dict__)) for m in model.modules()] == before


def test_hook_trainable_mask() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Half(Tiny):
        id: ClassVar[str] = "half"

        @staticmethod
        @hookimpl
        def trainable_mask(method: Half, adapter: Adapter) -> dict[str, bool]:
            return {name: name.endswith(".scale") for name, _ in adapter.named_parameters()}

    model = two_layers()
    inlay.attach(model, Half(targets=["0", "2"]))
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(learning) == 2
    assert all(name.endswith(".scale") for name in learning)


def test_hook_trainable_mask_must_name_exactly_the_parameters() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wrong(Tiny):
        id: ClassVar[str] = "wrong"

        @staticmethod
        @hookimpl
        def trainable_mask(method: Wrong, adapter: Adapter) -> dict[str, bool]:
            return {"nobody": True}

    model = two_layers()
    with pytest.raises(RegistryError, match=r"mask of 'wrong' does not name .*\n.*'0.by'"):
        inlay.attach(model, Wrong(targets=["0"]))
    assert type(model[0]) is nn.Linear


def test_hook_merge() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Careful(Tiny):
        id: ClassVar[str] = "careful"

        @staticmethod
        @hookimpl
        def merge(method: Careful, adapter: Adapter) -> dict[Site, Any]:
            if method.amount > 1:
                raise CannotMerge("amount is above 1", saw=f"amount={method.amount}", do="keep it attached")
            return {site: delta.fold for site, delta in adapter.placed}

    model = two_layers()
    inlay.attach(model, Careful(targets=["0", "2"]))
    fill(model, 0.5)
    adapted, weight = model(X), model[0].weight.clone()
    inlay.merge(model)
    assert not torch.equal(model[0].weight, weight)
    torch.testing.assert_close(model(X), adapted)
    inlay.detach(model)
    inlay.attach(model, Careful(targets=["0"], amount=2.0))
    with pytest.raises(CannotMerge, match=r"amount=2\.0"):
        inlay.merge(model)


def test_hook_state_dict(tmp_path: Path) -> None:
    @register
    @dataclass(frozen=True, kw_only=True)
    class Sparing(Tiny):
        id: ClassVar[str] = "sparing"

        @staticmethod
        @hookimpl
        def state_dict(method: Sparing, adapter: Adapter) -> dict[str, Tensor]:
            return {name: t for name, t in adapter.tensors().items() if name.endswith(".scale")}

    model, fresh = two_layers(), two_layers()
    inlay.attach(model, Sparing(targets=["0", "2"]))
    fill(model, 0.5)
    inlay.save(model, tmp_path)
    assert inlay.load(fresh, tmp_path) == 2
    assert torch.equal(fresh(X), model(X))


def test_hook_migrate(tmp_path: Path) -> None:
    asked: list[int] = []

    @dataclass(frozen=True, kw_only=True)
    class Newer(Tiny):
        version: ClassVar[int] = 2

        @staticmethod
        @hookimpl
        def migrate(method: Newer, state: Mapping[str, Tensor], from_version: int) -> dict[str, Tensor]:
            asked.append(from_version)
            return {name: 2 * t if name.endswith(".scale") else t for name, t in state.items()}

    @dataclass(frozen=True, kw_only=True)
    class Careless(Tiny):
        version: ClassVar[int] = 2

    old, new, plain = two_layers(), two_layers(), two_layers()
    inlay.attach(old, Tiny(targets=["2"]))
    fill(old, 0.25)
    inlay.save(old, tmp_path)
    register(Newer)
    inlay.load(new, tmp_path)
    assert asked == [1]
    torch.testing.assert_close(new(X), 1.5 * plain(X))
    register(Careless)
    with pytest.raises(CheckpointError, match=r"saved by version 1, installed is 2"):
        inlay.load(plain, tmp_path)


def test_hook_calibrate(tmp_path: Path) -> None:
    @register
    @dataclass(frozen=True, kw_only=True)
    class Seen(Tiny):
        id: ClassVar[str] = "seen"
        calibrates: ClassVar[bool] = True

        @staticmethod
        @hookimpl
        def calibrate(method: Seen, model: nn.Module, sites: Any, batches: Any) -> dict[str, Tensor]:
            assert type(model[0]) is nn.Linear
            return {site.name: torch.stack([model(b).mean() for b in batches]).detach() for site in sites}

    model, fresh = two_layers(), two_layers()
    expected = torch.stack([model(X).mean(), model(2 * X).mean()]).detach()
    with pytest.raises(ConfigError, match=r"'seen' must see data before it is placed"):
        inlay.attach(model, Seen(targets=["0"]))
    inlay.attach(model, Seen(targets=["0"]), data=iter([X, 2 * X]))
    inlay.save(model, tmp_path)
    kept: list[Mapping[str, Tensor]] = []

    class Look:
        @hookimpl(wrapper=True)
        def inject(self, method: Method, adapter: Adapter) -> Any:
            if not adapter.meta:
                kept.append(adapter.calibration)
            return (yield)

    with inlay.observe(Look()):
        inlay.load(fresh, tmp_path)
    assert torch.equal(kept[0]["0"], expected)


class Told(OutputDelta):
    """Δy = p ⊙ y, with p (out,) prepared once per call."""

    reads: ClassVar[frozenset[str]] = frozenset({"y"})

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        return at.prepared["vector"] * y


def test_hook_prepare() -> None:
    calls: list[Any] = []

    @dataclass(frozen=True, kw_only=True)
    class Shared(Tiny):
        id: ClassVar[str] = "shared"
        prepares: ClassVar[bool] = True

        @staticmethod
        @hookimpl
        def inject(method: Shared, sites: Sequence[Site], adapter: Adapter) -> int:
            adapter.share("seed", nn.ParameterDict({"row": adapter.init().ones(6)}))
            for site in sites:
                adapter.place(site, Told())
            return len(sites)

        @staticmethod
        @hookimpl
        def prepare(method: Shared, adapter: Adapter, call: Any) -> dict[str, Tensor]:
            calls.append(call.argument("input"))
            return {"vector": 0.5 * adapter.shared["seed"]["row"]}

    model, plain = two_layers(), two_layers()
    inlay.attach(model, Shared(targets=["0", "2"]))
    y = model(X)
    assert len(calls) == 1, "once for two sites"
    assert calls[0] is X
    torch.testing.assert_close(y, 1.5 * plain[2](torch.tanh(1.5 * plain[0](X))))
    y.sum().backward()
    inlay.check_training(model)


def test_hook_auxiliary_loss() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Penalised(Tiny):
        id: ClassVar[str] = "penalised"

        @staticmethod
        @hookimpl
        def auxiliary_loss(method: Penalised, adapter: Adapter) -> Tensor | None:
            scales = [p for name, p in adapter.named_parameters() if name.endswith(".scale")]
            return torch.stack([s.square().sum() for s in scales]).sum() if method.amount > 1 else None

    model = two_layers()
    inlay.attach(model, Penalised(targets=["0"], amount=2.0), name="a")
    inlay.attach(model, Penalised(targets=["2"], amount=2.0), name="b")
    inlay.attach(model, Penalised(targets=["2"]), name="none")
    fill(model, 0.5)
    assert inlay.auxiliary_loss(model).item() == pytest.approx(2 * 6 * 0.25)


def around(*hooks: str) -> tuple[type[Method], list[tuple[Any, ...]]]:
    """Return a method with these hooks around a step, and the list they write (hook, step, draw) to."""
    seen: list[tuple[Any, ...]] = []

    def noting(hook: str) -> Any:
        def note(method: Method, adapter: Adapter, step: Step) -> None:
            gradient = next(iter(adapter.named_parameters()))[1].grad
            draw = int(torch.randint(1 << 30, (), generator=step.generator()))
            step.memory["sum"] = step.memory.get("sum", torch.zeros(())) + step.number
            seen.append((hook, step.number, step.total, gradient is not None, draw))

        return staticmethod(hookimpl(_named(note, hook)))

    return type("Noting", (Tiny,), {"id": "noting", **{hook: noting(hook) for hook in hooks}}), seen


def _named(function: Any, name: str) -> Any:
    function.__name__ = name
    return function


def test_hook_before_step() -> None:
    kind, seen = around("before_step")
    model = two_layers()
    inlay.attach(model, kind(targets=["0"]), seed=3)
    optimizer = torch.optim.SGD(inlay.parameter_groups(model))
    following = inlay.lifecycle(model, optimizer, steps=2)
    for _ in range(2):
        model(X).sum().backward()
        model(X).sum().backward()  # accumulated
        optimizer.step()
        optimizer.zero_grad()
    assert [s[:4] for s in seen] == [("before_step", n, 2, n > 1) for n in (1, 2, 3)], "zero_grad comes later"
    assert len({s[4] for s in seen}) == 3, "each step draws anew"
    assert following.step == 2
    following.remove()
    optimizer.step()
    assert len(seen) == 3, "removed: no longer followed"
    inlay.lifecycle(model, optimizer, steps=2)
    assert seen[-1] == seen[0], "the same step draws the same"


def test_hook_after_backward() -> None:
    kind, seen = around("after_backward")
    model = two_layers()
    inlay.attach(model, kind(targets=["0"]))
    optimizer = torch.optim.SGD(inlay.parameter_groups(model))
    inlay.lifecycle(model, optimizer)
    model(X).sum().backward()
    optimizer.step()
    assert [s[:4] for s in seen] == [("after_backward", 1, None, True)]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(X).sum()
        loss.backward()
        seen.append(("closure", 2))
        return loss

    for given in ({"closure": closure}, None):
        optimizer.step(closure) if given is None else optimizer.step(**given)
        assert [s[0] for s in seen[-2:]] == ["closure", "after_backward"], "when the closure has run"


def test_hook_after_step() -> None:
    kind, seen = around("after_step", "before_step", "after_backward")
    model = two_layers()
    inlay.attach(model, kind(targets=["0"]))
    optimizer = torch.optim.SGD(inlay.parameter_groups(model))
    following = inlay.lifecycle(model, optimizer, 9)
    model(X).sum().backward()
    optimizer.step()
    assert [s[:2] for s in seen] == [
        ("before_step", 1), ("after_backward", 1), ("after_step", 1), ("before_step", 2),
    ]  # fmt: skip
    assert following.state_dict() == {"step": 1, "parts": {"default/noting": {"sum": torch.tensor(5.0)}}}


def test_hook_parameter_groups() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Rates(Tiny):
        id: ClassVar[str] = "rates"

        @staticmethod
        @hookimpl
        def parameter_groups(method: Rates, adapter: Adapter, lr: float | None) -> list[Group]:
            rate = method.lr if lr is None else lr
            return [Group([n], rate * (2 if n.endswith("by") else 1), 0.1) for n in adapter.trainable_names()]

    @dataclass(frozen=True, kw_only=True)
    class Half(Tiny):
        id: ClassVar[str] = "half"

        @staticmethod
        @hookimpl
        def parameter_groups(method: Half, adapter: Adapter, lr: float | None) -> list[Group]:
            return [Group(adapter.trainable_names()[:1], 1.0)]

    model = two_layers()
    inlay.attach(model, Rates(targets=["0"]))
    groups = inlay.parameter_groups(model, lr=0.5)
    assert sorted((g["lr"], g["weight_decay"], len(g["params"])) for g in groups) == [
        (0.5, 0.1, 1),
        (1.0, 0.1, 1),
    ]
    inlay.detach(model)
    inlay.attach(model, Half(targets=["0"]))
    with pytest.raises(RegistryError, match=r"of 'half' do not cover .*\n.*1 names for 2 parameters"):
        inlay.parameter_groups(model)


def test_hook_stages() -> None:
    def double(adapter: Adapter) -> None:
        for _, delta in adapter.placed:
            delta.scale.data *= 2
        adapter.data["doubled"] = True

    @dataclass(frozen=True, kw_only=True)
    class Staged(Tiny):
        id: ClassVar[str] = "staged"

        @staticmethod
        @hookimpl
        def stages(method: Staged, adapter: Adapter) -> list[Stage]:
            return (
                [Stage("second")]
                if adapter.data.get("doubled")
                else [Stage("first", 5, double), Stage("second")]
            )

    model, plain = two_layers(), two_layers()
    inlay.attach(model, Staged(targets=["2"]), name="s")
    fill(model, 0.25)
    assert [(s.name, s.steps) for s in inlay.stages(model, "s")] == [("first", 5), ("second", None)]
    assert inlay.advance(model, "s") == "second"
    assert [s.name for s in inlay.stages(model, "s")] == ["second"]
    torch.testing.assert_close(model(X), 1.5 * plain(X))
