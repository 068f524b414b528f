"""Reading and writing the base's weights: the one place that knows how each layer stores them.

Everything outside sees a weight as (out, in) and a bias as (out,), float32 or wider; a norm's or
a bare tensor's weight keeps its own shape. Slices of fused projections are cut and put back here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.errors import CannotMerge
from inlay.hosts import CHILD
from inlay.sites.site import held_by, hooks_of

if TYPE_CHECKING:
    from inlay.delta import Delta
    from inlay.sites import ModuleSite


def wide(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32, or as it is if wider."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor (DTensor) in full, any other as it is; every process must ask for it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def stored(module: nn.Module, name: str) -> Tensor | None:
    """Return a module's tensor, through accelerate's weights map if it is offloaded."""
    module, name = held_by(module, name)
    tensor: Tensor | None = getattr(module, name, None)
    if tensor is None or tensor.device.type != "meta":
        return tensor
    maps = (getattr(hook, "weights_map", None) for hook in hooks_of(module))
    return next((kept[name] for kept in maps if kept is not None), tensor)


def stored_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's `state_dict()`, offloaded tensors read from where accelerate keeps them."""
    state = module.state_dict()
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.device.type == "meta":
            path, _, leaf = key.rpartition(".")
            state[key] = stored(module.get_submodule(path), leaf)
    return state


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers under their names in `state_dict`, as they lie.

    `state_dict()` itself is no pure look: bitsandbytes repacks weights in place there, with loss.
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name in (
            *module._parameters,
            *(b for b in module._buffers if b not in module._non_persistent_buffers_set),
        ):
            tensor = stored(module, name)
            if tensor is not None:
                found[f"{path}.{name}".lstrip(".")] = tensor
    return found


def is_quantised(module: nn.Module) -> bool:
    """Return whether the module keeps its weight in fewer bits than it computes in (bitsandbytes)."""
    weight = module._parameters.get("weight")
    return weight is not None and not weight.is_floating_point()


class Dequantised(nn.Linear):
    """How a quantised layer runs with changed tensors: with all their bits, in the dtype of what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


def is_packed(module: nn.Module) -> bool:
    """Return whether bitsandbytes rearranged a 4-bit weight for the CPU's inference kernel, at a forward."""
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def read(site: ModuleSite) -> tuple[Tensor, Tensor | None]:
    """Return (weight, bias) of a site, wide, dequantised, (out, in), cut to its slice."""
    weight = _dequantised(site.module) if is_quantised(site.module) else stored(site.module, site.weight_name)
    bias = stored(site.module, site.bias_name) if site.bias_name else None
    if weight is None:
        raise AttributeError(f"{site.name} has no tensor {site.weight_name!r}")
    weight = wide(site.cut(weight))
    if site.layer_kind == "norm":
        weight = weight + norm_offset(type(site.module))  # type: ignore[arg-type]
    return weight, None if bias is None else wide(site.cut(bias))


def holds_bias(site: ModuleSite) -> bool:
    """Return whether the site's module adds a bias where it has one (an RMSNorm never does)."""
    return site.has_bias or (site.is_linear and site.expert is None) or site.layer_kind == "conv"


def as_stored(changed: Iterable[tuple[ModuleSite, Tensor, Tensor | None]]) -> dict[str, Tensor]:
    """Return one module's full tensors, as it stores them, that hold (weight, bias) at its sites."""
    pieces: dict[str, list[tuple[ModuleSite, Tensor]]] = {}
    for site, weight, bias in changed:
        if site.layer_kind == "norm":
            weight = weight - norm_offset(type(site.module))  # type: ignore[arg-type]
        pieces.setdefault(site.weight_name, []).append((site, weight))
        if bias is None:
            continue
        if not holds_bias(site) or site.bias_name is None:
            raise CannotMerge(
                "a bias has no place here",
                saw=f"{site.name} is a {type(site.module).__name__} without a bias",
                do="keep this part attached, or leave layers without a bias out of its targets",
            )
        pieces.setdefault(site.bias_name, []).append((site, bias))
    return {name: _assembled(name, parts) for name, parts in pieces.items()}


def _assembled(name: str, parts: Sequence[tuple[ModuleSite, Tensor]]) -> Tensor:
    """Return a module's tensor `name` with `parts`, (out, in) or (out,), in the places of their sites."""
    site, part = parts[0]
    old = stored(site.module, name)
    like = stored(site.module, site.weight_name) if old is None else old
    assert like is not None
    dtype = like.dtype if like.is_floating_point() else part.dtype
    if site.part is None and site.expert is None:
        return site.turned(part).to(dtype).contiguous()
    if old is not None and not old.is_floating_point():
        old = _dequantised(site.module)
    if old is None:  # a bias that a fused projection has not
        old = torch.zeros_like(site.turned(like)[:, 0])
    if site.expert is None:
        return _spliced(old, parts).to(dtype).contiguous()
    rows = list(old.unbind(0))
    for expert in dict.fromkeys(s.expert for s, _ in parts if s.expert is not None):
        rows[expert] = _spliced(rows[expert], [(s, p) for s, p in parts if s.expert == expert])
    return torch.stack(rows)


def _spliced(matrix: Tensor, parts: Sequence[tuple[ModuleSite, Tensor]]) -> Tensor:
    """Return a stored matrix, or a bias, with the rows of slices replaced."""
    matrix = parts[0][0].turned(matrix)
    for site, part in parts:
        part = part.to(matrix.dtype)
        matrix = part if site.part is None else site.part.put(matrix, part, 0)
    return parts[0][0].turned(matrix)


def _dequantised(module: Any) -> Tensor:
    """Return a bitsandbytes layer's weight as it acts, (out, in)."""
    bnb = sys.modules["bitsandbytes"]
    if isinstance(module, bnb.nn.Linear4bit):
        weight = module.weight
        if is_packed(module):  # only the layer itself reads that
            eye = torch.eye(module.in_features, dtype=module.compute_dtype or torch.float32)
            with torch.no_grad():
                out: Tensor = bnb.nn.Linear4bit.forward(_without_bias(module), eye)
            return out.T.float()
        dequantised: Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return dequantised.float()
    state, weight = module.state, module.weight
    scale = weight.SCB if weight.SCB is not None else state.SCB
    codes = weight.data if weight.SCB is not None or state.CB is None else state.CB
    values: Tensor = codes.float() * scale.float().view(-1, 1) / 127.0
    return values


def _without_bias(module: Any) -> Any:
    base = getattr(type(module), "_inlay_base", type(module))
    shadow = object.__new__(base)
    shadow.__dict__ = {**module.__dict__, "_parameters": {**module._parameters, "bias": None}}
    return shadow


def norm_offset(kind: type[nn.Module]) -> float:
    """Return c where a norm class multiplies by (c + weight): 0, or 1 for Gemma's way."""
    kind = getattr(kind, "_inlay_base", kind)
    if issubclass(kind, (nn.LayerNorm, nn.RMSNorm)):
        return 0.0
    return 1.0 if "Gemma" in kind.__name__ and "Gemma3n" not in kind.__name__ else 0.0


def sources(site: ModuleSite) -> list[Tensor]:
    """Return the tensors that a site's weight and bias are, or (parametrized) are computed from."""
    module = site.module
    owner, leaf = held_by(module, site.weight_name)
    if leaf not in owner._parameters:
        return [p for n, p in module.named_parameters() if not n.startswith(f"{CHILD}.")]
    found = (stored(module, name) for name in (site.weight_name, site.bias_name) if name)
    return [tensor for tensor in found if tensor is not None]


class Level:
    """Weight and bias of a site after the folds of the members below, as deltas above may ask for.

    The sum of nothing is the base's own tensor. Where lower members learn, the level follows them
    and carries their gradient; where nothing learns it is computed once.
    """

    def __init__(self, site: ModuleSite, below: Sequence[Delta]) -> None:
        self.site, self.below = site, tuple(below)
        self._key: tuple[int, ...] | None = None
        self._value: tuple[Tensor, Tensor | None] | None = None
        self._squares: tuple[Any, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        return self.tensors()[0]

    @property
    def bias(self) -> Tensor | None:
        return self.tensors()[1]

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Return (weight, bias), cached while neither the base nor the members below change."""
        if torch.compiler.is_compiling():  # asked first: what follows cannot be traced
            return self._folded()
        learning = torch.is_grad_enabled() and any(p.requires_grad for d in self.below for p in d.reached())
        if learning or torch.is_inference_mode_enabled():
            return self._folded()
        key = self._versions()
        if self._value is None or self._key != key:
            with torch.no_grad():
                self._key, self._value = key, self._folded()
        return self._value

    def measured(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return (weight, bias, Σⱼ Wᵢⱼ² of each row), the sums without gradient and kept with the tensors."""
        value = self.tensors()
        if torch.compiler.is_compiling() or value is not self._value:
            return (*value, value[0].detach().square().sum(1))
        if self._squares is None or self._squares[0] is not value:
            self._squares = (value, value[0].detach().square().sum(1))
        return (*value, self._squares[1])

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = read(self.site)
        for delta in self.below:
            weight, bias = delta.fold(weight, bias)
        return weight, bias

    def _versions(self) -> tuple[int, ...]:
        tensors = [*sources(self.site), *(p for d in self.below for p in d.reached())]
        return tuple(v for t in tensors for v in (t.data_ptr(), t._version))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_key": None, "_value": None, "_squares": None}
