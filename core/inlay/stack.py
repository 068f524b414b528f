"""Stacks as data (`Part`, `Stack`) and the state of one adapted model (`Placed`, `State`)."""

from __future__ import annotations

import ast
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.adapter import Adapter
from inlay.context import Call, Slot
from inlay.errors import ConfigError, StateError, near, shown
from inlay.hosts import Deltas
from inlay.method import Method
from inlay.ports import Port
from inlay.registry import registry
from inlay.sites import Site
from inlay.weights import stored_state

if TYPE_CHECKING:
    from inlay.programs import Table
    from inlay.writing import Undo

MAX_NAME, MAX_TEXT = 200, 10_000
WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module")  # where wrappers keep the model they call
MAX_TABLES = 64  # compiled choices kept; routing many adapters makes many


@dataclass(frozen=True)
class Part:
    """A method under a name within a stack."""

    name: str
    method: Method

    def __post_init__(self) -> None:
        check_name(self.name, "part")

    def __add__(self, other: Method | Part | Stack) -> Stack:
        return Stack.of(self) + other


@dataclass(frozen=True)
class Stack:
    """Methods in order, the first innermost; part names are unique."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ConfigError(
                "two parts of a stack have the same name",
                saw=", ".join(repr(n) for n in twice),
                do='name them: LoRA(...).named("first") + LoRA(...).named("second")',
            )

    @classmethod
    def of(cls, what: Method | Part | Stack | str) -> Stack:
        """Return a stack from a method, a part, a stack, or text such as "lora(rank=8) + ia3"."""
        if isinstance(what, Stack):
            return what
        if isinstance(what, str):
            return parse(what)
        if isinstance(what, Method):
            registry.check(type(what))
            return cls((Part(what.id, what),))
        if isinstance(what, Part):
            return cls((what,))
        raise ConfigError(
            "this is not a method, a part, a stack or text naming one",
            saw=f"{shown(what)} ({type(what).__name__})",
            do='pass for example LoRA(rank=8), LoRA() + IA3(), or "lora(rank=8) + ia3"',
        )

    def __add__(self, other: Method | Part | Stack) -> Stack:
        return Stack(self.parts + Stack.of(other).parts)


def check_name(name: object, what: str) -> None:
    """Refuse names that are empty, too long, hold "/" or control characters."""
    fits = isinstance(name, str) and 0 < len(name) <= MAX_NAME and "/" not in name
    if fits and not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in str(name)):
        return
    raise ConfigError(
        f"this cannot be the name of {'an' if what[0] in 'aeiou' else 'a'} {what}",
        saw=shown(name),
        do=f"use 1 to {MAX_NAME} printable characters without '/' ('/' separates adapter from part)",
    )


def parse(text: str) -> Stack:
    """Read a stack from text: method calls joined by "+", arguments literals. Nothing is evaluated."""
    if len(text) > MAX_TEXT:
        raise _unreadable(text, f"{len(text):,} characters, at most {MAX_TEXT:,} are read")
    try:
        return Stack(tuple(_parts(ast.parse(text.strip(), mode="eval").body, text)))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _unreadable(text, str(error)) from error


def _parts(node: ast.expr, text: str) -> Iterator[Part]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _parts(node.left, text)
        yield from _parts(node.right, text)
        return
    call = node
    name: Any = ""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "named":
        if len(node.args) != 1 or node.keywords:
            raise _unreadable(text, "named() takes one name")
        name, call = _literal(node.args[0], text), node.func.value
    method = _method(call, text)
    yield Part(method.id if call is node else name, method)


def _method(node: ast.expr, text: str) -> Method:
    if isinstance(node, ast.Name):
        return registry.build(node.id, {})
    named = _named(node, text)
    return registry.build(named["method"], named["settings"])


def _named(node: ast.expr, text: str) -> dict[str, Any]:
    """Return a call with keyword settings as plain data; what it names is built where it is known."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        names = [k.arg or "**" for k in node.keywords]
        if twice := [n for n in names if names.count(n) > 1]:
            raise _unreadable(text, f"{twice[0]} is given twice")
        settings = {name: _literal(k.value, text) for name, k in zip(names, node.keywords, strict=True)}
        return {"method": node.func.id, "settings": settings}
    raise _unreadable(text, f"{ast.unparse(node)!r} is not a method with keyword settings")


def _literal(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call):
        return _named(node, text)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise _unreadable(text, f"{ast.unparse(node)!r} is not a literal value") from error


def _unreadable(text: str, reason: str) -> ConfigError:
    return ConfigError(
        "the text does not describe a stack",
        saw=f"{text[:MAX_NAME]!a}: {ascii(reason)[1 : MAX_NAME + 1]}",
        do='write for example "lora(rank=8) + prefix_tuning(length=16)"',
    )


@dataclass(eq=False)
class Placed:
    """One part at work on one model. `id` is its number; names are kept here and nowhere else."""

    id: int
    adapter_name: str
    part_name: str
    method: Method
    adapter: Adapter
    trainable: bool = True
    merged: bool = False

    @property
    def path(self) -> str:
        return f"{self.adapter_name}/{self.part_name}"

    def prepare(self, call: Call) -> Any:
        """Run the method's `prepare` hook directly: no plugin machinery inside a forward pass."""
        answer = self.method.prepare(self.method, self.adapter, call)  # type: ignore[attr-defined]
        return answer if torch.compiler.is_compiling() else registry.checked("prepare", self.method, answer)

    def prepared(self, call: Call | None) -> Any:
        """Return what `prepare` computed for this call; computed anew where no call was opened."""
        from inlay.programs import Table

        if call is None:  # a part of the model is called by itself
            call = Call(Table([]), Slot())
        return call.prepared[self.id] if self.id in call.prepared else self.prepare(call)


@dataclass(eq=False)
class State:
    """Everything inlay knows about one adapted model. Lives in the model's own `__dict__`."""

    model: nn.Module
    slot: Slot = field(default_factory=Slot)
    placed: dict[int, Placed] = field(default_factory=dict)
    active: tuple[int, ...] = ()
    ports: list[Port] = field(default_factory=list)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    checkpointed: list[nn.Module] = field(default_factory=list)
    merge_undo: Undo | None = None  # what `unmerge` puts back
    undo: bool = True
    next_id: int = 0
    learning: list[nn.Parameter] | None = None  # what learns, once somebody asked; `masks` forgets it
    _table: Table | None = None
    _tables: dict[Any, Table] = field(default_factory=dict)

    # -- names -----------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(p.adapter_name for p in self.placed.values()))

    def find(self, name: str) -> list[Placed]:
        """Return the parts called `name`: a whole adapter "fr" or one part "fr/lora"."""
        parts = [p for p in self.placed.values() if name in (p.adapter_name, p.path)]
        if not parts:
            known = self.names + [p.path for p in self.placed.values()]
            raise StateError(
                f"no adapter is called {shown(name)} here",
                saw=f"attached: {self.names}",
                do=near(name, known),
            )
        return parts

    def find_all(self, names: Sequence[str]) -> list[Placed]:
        return list(dict.fromkeys(p for name in names for p in self.find(name)))

    def adapter_of(self, name: str) -> Adapter:
        """Return the one adapter that `name` means."""
        parts = self.find(name)
        if len(parts) > 1:
            raise StateError(
                f"{name!r} has several parts", saw=str([p.path for p in parts]), do="name one of them"
            )
        return parts[0].adapter

    # -- programs --------------------------------------------------------------------------------

    @property
    def table(self) -> Table:
        """The compiled programs of the active adapters."""
        if self._table is None:
            self._table = self.table_for((self.active,))
        return self._table

    def table_for(self, stacks: tuple[tuple[int, ...], ...], *, prompts: bool = True) -> Table:
        """Return the compiled programs of a choice of stacks, from the cache if it was made before."""
        from inlay.compile import compile_table

        key = (stacks, prompts)
        table = self._tables.get(key)  # other threads add and drop entries meanwhile
        if table is None:
            if len(self._tables) >= MAX_TABLES:
                self._tables.pop(list(self._tables)[0], None)  # noqa: RUF015 - list() cannot be interrupted
            table = self._tables[key] = compile_table(self, stacks, prompts=prompts)
        return table

    def default_call(self) -> Call:
        return Call(self.table, self.slot)

    def activate(self, active: Sequence[int] | None = None) -> None:
        """Make `active` (default: what is active) take part in the forward pass of every thread."""
        if active is not None:
            self.active = tuple(active)
        self._tables.clear()
        self._table = self.table_for((self.active,))
        for port, program in zip(self.ports, self._table.programs, strict=True):
            port.program = program

    def sites_of(self, module: nn.Module) -> list[tuple[Placed, Site, Any]]:
        """Return (part, site, delta) of everything placed on `module`, in stack order of attachment."""
        return [
            (placed, site, delta)
            for placed in self.placed.values()
            for site, delta in placed.adapter.placed
            if site.module is module
        ]

    def own_parameters(self) -> Iterator[tuple[Placed, str, nn.Parameter]]:
        """Yield (part, local name, parameter) of every adapter."""
        for placed in self.placed.values():
            for name, parameter in placed.adapter.named_parameters():
                yield placed, name, parameter


def state_of(model: nn.Module) -> State | None:
    """Return the state of an adapted model, or of the one that a wrapper (DDP, torch.compile) holds."""
    state = getattr(model, "__dict__", {}).get("_inlay_state")
    if isinstance(state, State) and state.model is model:
        return state
    inner = wrapped_in(model)
    return None if inner is None else state_of(inner)


def wrapped_in(model: nn.Module) -> nn.Module | None:
    """Return the model that a wrapper calls: DDP's and DeepSpeed's `module`, torch.compile's."""
    held = getattr(model, "_modules", {})
    return next((held[name] for name in WRAPPED if held.get(name) is not None), None)


def need_state(model: nn.Module) -> State:
    """Return the state of an adapted model, or raise."""
    state = state_of(model)
    if state is None:
        raise StateError(
            "nothing is attached to this model",
            saw=f"a {type(model).__name__} without adapters",
            do="inlay.attach(model, ...) first; pass the same object that was attached to",
        )
    return state


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the base's own tensors under their own names, as if nothing were attached or merged."""
    return only_base(model, stored_state)


def only_base(model: nn.Module, read: Callable[[nn.Module], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what `read` gives of the base alone, with the layers and values it had before a merge."""
    state = state_of(model)
    if state is None:
        return read(model)
    own = _own_prefixes(state)
    tensors = {key: tensor for key, tensor in read(model).items() if not key.startswith(own)}
    if state.merge_undo is None:
        return tensors
    kept = {(id(module), name): tensor for module, name, tensor in reversed(state.merge_undo.tensors)}
    result = {}
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        original = kept.get((id(model.get_submodule(path)), leaf), tensor)
        if original is not None:
            result[key] = original
    for path, layer in base_modules(model).items():
        if layer is not model.get_submodule(path):
            result = {k: t for k, t in result.items() if not k.startswith(f"{path}.")}
            result |= {f"{path}.{name}": tensor for name, tensor in read(layer).items()}
    return result


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by path, quantised layers as they were before a merge."""
    state = state_of(model)
    before = {} if state is None or state.merge_undo is None else state.merge_undo.layers
    return {name: before.get(m, m) for name, m in model.named_modules(remove_duplicate=False)}


def _own_prefixes(state: State) -> tuple[str, ...]:
    modules = state.model.named_modules(remove_duplicate=False)
    return tuple(f"{name}." for name, m in modules if isinstance(m, Deltas))
