"""Experts: the layers of transformers' mixtures of experts, all of whose matrices are 3-D parameters.

Every expert's matrix is a site of its own. A layer with members runs expert by expert, in the
layout its class declares to transformers; without any, its own implementation runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.context import Slot
from inlay.errors import RoutingError
from inlay.hosts import own_class
from inlay.programs import Member, Onion, Program, Routed, levels_of, split
from inlay.sites import ModuleSite, Site, Slice

DECLARED = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")


def holds_experts(module: nn.Module) -> bool:
    """Return whether a module keeps all experts' weights and declares their layout to transformers."""
    return all(name in module.__dict__ for name in DECLARED)


def expert_sites(name: str, module: Any, layer: int | None, side: str) -> Iterator[ModuleSite]:
    """Return each expert's gate, up and down as sites of `module`, called `name` in the model."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    rows = getattr(module, first).shape[2 if module.is_transposed else 1]
    places: list[tuple[str, str, Slice | None]] = [("up", first, None)]
    if module.has_gate and module.is_concatenated:
        places = [("gate", first, Slice(0, rows // 2)), ("up", first, Slice(rows // 2, rows))]
    elif module.has_gate:  # gate and up by turns
        places = [("gate", first, Slice(0, 1, rows // 2)), ("up", first, Slice(1, 2, rows // 2))]
    for expert in range(module.down_proj.shape[0]):
        for role, tensor, part in (*places, ("down", "down_proj", None)):
            yield ModuleSite(
                name=f"{name}[{expert}.{role}]", module=module, role=role, layer=layer, side=side,
                layer_kind="conv1d" if module.is_transposed else "linear", part=part, expert=expert,
                weight_name=tensor, bias_name=f"{tensor}_bias" if module.has_bias else None,
            )  # fmt: skip


class Product(Onion):
    """One expert's product with one of its matrices, with the members there around it."""

    def __init__(self, members: Sequence[Member], slot: Slot) -> None:
        folded, above = split(members)
        super().__init__(above, slot)
        self.levels = levels_of(folded)

    def over(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """Return the product of x (tokens, in) with weight (out, in) and bias, changed by the members."""
        for level in self.levels:
            part, own_bias = level.tensors()
            whole = level.site.part
            part = part.to(weight.dtype)
            weight = part if whole is None else whole.put(weight, part, 0)
            if own_bias is not None:
                own_bias = own_bias.to(weight.dtype)
                held = weight.new_zeros(len(weight)) if bias is None else bias
                bias = own_bias if whole is None else whole.put(held, own_bias, 0)
        return self.run(lambda inner: F.linear(inner, weight, bias), x)


class Experts(Program):
    """A layer of experts, those that tokens were sent to one after another."""

    def __init__(self, members: Sequence[Member], slot: Slot) -> None:
        super().__init__(slot)
        grouped: dict[tuple[int, str], list[Member]] = {}
        for member in members:
            site = member.at.site
            assert isinstance(site, ModuleSite)
            assert site.expert is not None
            grouped.setdefault((site.expert, site.weight_name), []).append(member)
        self.products = {key: Product(here, slot) for key, here in grouped.items()}
        self.plain = Product((), slot)
        self.site = members[0].at.site
        self.names = argument_names(self.site.module)

    @classmethod
    def of(cls, members: Sequence[Member], slot: Slot) -> Experts | None:
        """Return the program of a layer's members, None if there are none."""
        return cls(members, slot) if members else None

    def __call__(self, module: Any, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x, index, weights = arguments(self.names, args, kwargs)
        owners = owners_of(self.slot, self.site, x)
        first = "gate_up_proj" if module.has_gate else "up_proj"
        out, before = torch.zeros_like(x), self.slot.rows
        try:
            for expert in torch.unique(index[index < module.down_proj.shape[0]]).tolist():
                tokens, place = torch.where(index == expert)
                self.slot.rows = before if owners is None else owners[tokens]
                h = self.product(module, expert, first, x[tokens])
                h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
                h = self.product(module, expert, "down_proj", h)
                h = module.post_expert_norm(h) if module.has_post_expert_norm else h
                out.index_add_(0, tokens, (h * weights[tokens, place, None]).to(out.dtype))
        finally:
            self.slot.rows = before
        return out

    def product(self, module: nn.Module, expert: int, name: str, x: Tensor) -> Tensor:
        weight: Tensor = getattr(module, name)[expert]
        bias: Tensor | None = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        weight = weight.T if module.is_transposed else weight
        return self.products.get((expert, name), self.plain).over(weight, bias, x)


class RoutedExperts(Routed):
    """Tokens of a batch's rows under different programs of one layer of experts."""

    def __init__(self, programs: Sequence[Program | None], slot: Slot, site: Site) -> None:
        super().__init__(programs, slot, site)
        self.names = argument_names(site.module)

    def __call__(self, module: nn.Module, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = arguments(self.names, args, kwargs)
        call, owners = self.slot.call, owners_of(self.slot, self.site, given[0])
        assert call is not None
        assert call.batch is not None
        assert owners is not None
        stacks = call.index(call.expanded_rows(call.batch, self.site.name), owners.device)[owners]
        out = torch.zeros_like(given[0])
        for stack, program in enumerate(self.programs):
            tokens = (stacks == stack).nonzero()[:, 0]
            if not len(tokens):
                continue
            mine = tuple(t[tokens] for t in given)
            run = partial(base, *mine) if program is None else partial(program, module, base, mine, {})
            out = out.index_copy(0, tokens, self.on_rows(owners[tokens], run))
        return out


def owners_of(slot: Slot, site: Site, x: Tensor) -> Tensor | None:
    """Return the row of the batch that each of x's tokens (batch · length, d) is of; None if nobody asks."""
    batch = None if slot.call is None else slot.call.batch
    if slot.rows is not None or batch is None:
        return slot.rows
    length, rest = divmod(x.shape[0], batch)
    if rest or not length:
        raise RoutingError(
            f"the tokens of {site.name.split('[')[0]} cannot be told apart by rows",
            saw=f"{x.shape[0]} tokens of a batch of {batch}",
            do="route one name for the whole batch, or leave the experts out of the targets",
        )
    return torch.arange(batch, device=x.device).repeat_interleave(length)


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Return what the layer's forward calls its tokens, their experts and the experts' weights."""
    return tuple(inspect.signature(own_class(module).forward).parameters)[1:4]


def arguments(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return a layer's (tokens (n, d), experts (n, k), weights (n, k)) from a call of it."""
    return (*args, *(kwargs[name] for name in names[len(args) :]))[:3]


__all__ = ["Experts", "RoutedExperts", "expert_sites", "holds_experts"]
