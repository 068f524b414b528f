"""Reading and writing the base's weights: the one place that knows how each layer stores them.

Everything outside sees a weight as (out, in) and a bias as (out,), float32 or wider; a norm's or
a bare tensor's weight keeps its own shape. Slices of fused projections are cut and put back here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.backends import Backend, backend_of
from inlay.errors import AttachError, CannotMerge
from inlay.hosts import CHILD, own_class
from inlay.sites.site import hooks_of

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


def parts_of(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor is made of: itself, or those of a wrapping subclass."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for name in flatten()[0]:
        yield from parts_of(getattr(tensor, name))


def stored(module: nn.Module, name: str) -> Tensor | None:
    """Return a module's tensor, through accelerate's weights map if it is offloaded."""
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


class Dequantised(nn.Linear):
    """How a quantised layer runs with changed tensors: with all their bits, in the dtype of what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


def read(site: ModuleSite) -> tuple[Tensor, Tensor | None]:
    """Return (weight, bias) of a site, wide, dequantised, (out, in), cut to its slice."""
    return read_by(backend_of(site.module), site)


def read_by(backend: Backend | None, site: ModuleSite) -> tuple[Tensor, Tensor | None]:
    """Return what `read` does, given what knows how the module's weight is quantised."""
    if backend is not None and not backend.readable:
        kind = own_class(site.module)
        raise AttachError(
            "the weight of a quantised layer cannot be read",
            saw=f"{site.name}, a {kind.__module__}.{kind.__name__}: no backend knows how it packs its weight",
            do="choose other targets, or install a package that offers a backend for it (inlay.backends)",
        )
    found = stored(site.module, site.weight_name) if backend is None else backend.dequantize(site.module)
    bias = stored(site.module, site.bias_name) if site.bias_name else None
    if found is None:
        raise AttributeError(f"{site.name} has no tensor {site.weight_name!r}")
    weight = wide(found).T if site.layer_kind == "conv1d" else wide(found)
    if site.layer_kind == "norm":
        weight = weight + norm_offset(type(site.module))  # type: ignore[arg-type]
    bias = None if bias is None else wide(bias)
    if site.part is None:
        return weight, bias
    return site.part.take(weight, 0), None if bias is None else site.part.take(bias, 0)


def holds_bias(site: ModuleSite) -> bool:
    """Return whether the site's module adds a bias where it has one (an RMSNorm never does)."""
    return site.has_bias or site.is_linear or site.layer_kind == "conv2d"


def as_stored(
    site: ModuleSite,
    weight: Tensor,
    bias: Tensor | None,
    changed: Mapping[str, Tensor] | None = None,
    backend: Backend | None = None,
) -> dict[str, Tensor]:
    """Return the module's full tensors, in storage layout and dtype, that hold (weight, bias) at the site.

    `changed` are full tensors that hold other slices of a fused projection already. What a quantised
    layer's `backend` read stays as wide as it is.
    """
    module = site.module
    old, old_bias = stored(module, site.weight_name), stored(module, site.bias_name or "")
    if site.layer_kind == "norm":
        weight = weight - norm_offset(type(module))  # type: ignore[arg-type]
    if bias is not None and not holds_bias(site):
        raise CannotMerge(
            "a bias has no place here",
            saw=f"{site.name} is a {type(module).__name__} without a bias",
            do="keep this part attached, or leave norms without a bias out of its targets",
        )
    if site.part is not None:
        weight, bias = _spliced(site, weight, bias, changed or {}, backend)
    weight = weight.T if site.layer_kind == "conv1d" else weight
    dtype = weight.dtype if old is None or backend is not None else old.dtype
    tensors = {site.weight_name: weight.to(dtype).contiguous()}
    if bias is not None and site.bias_name:
        tensors[site.bias_name] = bias.to(dtype if old_bias is None else old_bias.dtype).contiguous()
    return tensors


def _spliced(
    site: ModuleSite,
    weight: Tensor,
    bias: Tensor | None,
    changed: Mapping[str, Tensor],
    backend: Backend | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the whole fused projection's tensors with the slice's rows replaced."""
    from dataclasses import replace

    assert site.part is not None
    whole, whole_bias = read_by(backend, replace(site, part=None))
    if site.weight_name in changed:
        whole = wide(changed[site.weight_name])
        whole = whole.T if site.layer_kind == "conv1d" else whole
        held = changed.get(site.bias_name or "")
        whole_bias = whole_bias if held is None else wide(held)
    if bias is not None:
        whole_bias = torch.zeros_like(whole[:, 0]) if whole_bias is None else whole_bias
        whole_bias = site.part.put(whole_bias, bias, 0)
    return site.part.put(whole, weight, 0), whole_bias


def norm_offset(kind: type[nn.Module]) -> float:
    """Return c where a norm class multiplies by (c + weight): 0, or 1 for Gemma's way."""
    kind = getattr(kind, "_inlay_base", kind)
    if issubclass(kind, (nn.LayerNorm, nn.RMSNorm)):
        return 0.0
    return 1.0 if "Gemma" in kind.__name__ and "Gemma3n" not in kind.__name__ else 0.0


def sources(site: ModuleSite) -> list[Tensor]:
    """Return the tensors that a site's weight and bias are, or (parametrized) are computed from."""
    module = site.module
    if site.weight_name not in module._parameters:
        return [p for n, p in module.named_parameters() if not n.startswith(f"{CHILD}.")]
    found = (stored(module, name) for name in (site.weight_name, site.bias_name) if name)
    return [tensor for tensor in found if tensor is not None]


class Level:
    """Weight and bias of a site after the folds of the members below, as deltas above may ask for.

    The sum of nothing is the base's own tensor. Where lower members learn, the level follows them
    and carries their gradient; where nothing learns it is computed once.
    """

    def __init__(self, site: ModuleSite, below: Sequence[Delta]) -> None:
        self.site, self.below, self.backend = site, tuple(below), backend_of(site.module)
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
        weight, bias = read_by(self.backend, self.site)
        for delta in self.below:
            weight, bias = delta.fold(weight, bias)
        return weight, bias

    def _versions(self) -> tuple[int, ...]:
        tensors = [*sources(self.site), *(p for d in self.below for p in d.reached())]
        return tuple(v for t in tensors for v in (t.data_ptr(), t._version))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_key": None, "_value": None, "_squares": None}
