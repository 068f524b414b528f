"""Reading and writing the base's weights: the one place that knows how each layer stores them.

Everything outside sees a weight as (out, in) and a bias as (out,), float32 or wider; a norm's or
a bare tensor's weight keeps its own shape. Slices of fused projections are cut and put back here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.backends import Backend, backend_of
from inlay.errors import AttachError, CannotMerge, CheckpointError
from inlay.hosts import CHILD, own_class
from inlay.reached import several
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
    if getattr(tensor, "ds_id", None) is not None and tensor.numel() == 0:
        raise CheckpointError(
            "a tensor is in parts that only DeepSpeed can put together",
            saw="0 of its values in this process (ZeRO stage 3)",
            do="save inside deepspeed.zero.GatheredParameters(model.parameters()), or use stage 2",
        )
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
    if found is None:
        raise AttributeError(f"{site.name} has no tensor {site.weight_name!r}")
    weight = wide(site.cut(whole(found)))
    if site.layer_kind == "norm":
        weight = weight + norm_offset(type(site.module))  # type: ignore[arg-type]
    return weight, read_bias(site)


def read_bias(site: ModuleSite) -> Tensor | None:
    """Return the bias of a site alone, wide, cut to its slice."""
    bias = stored(site.module, site.bias_name) if site.bias_name else None
    return None if bias is None else wide(site.cut(whole(bias)))


def holds_bias(site: ModuleSite) -> bool:
    """Return whether the site's module adds a bias where it has one (an RMSNorm never does)."""
    return site.has_bias or (site.is_linear and site.expert is None) or site.layer_kind == "conv"


def as_stored(
    changed: Iterable[tuple[ModuleSite, Tensor, Tensor | None]], backend: Backend | None = None
) -> dict[str, Tensor]:
    """Return one module's full tensors, as it stores them, that hold (weight, bias) at its sites.

    Of a quantised layer, given what knows how it is: as a plain one would store them.
    """
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
    return {name: _assembled(name, parts, backend) for name, parts in pieces.items()}


def _assembled(name: str, parts: Sequence[tuple[ModuleSite, Tensor]], backend: Backend | None) -> Tensor:
    """Return a module's tensor `name` with `parts`, (out, in) or (out,), in the places of their sites."""
    site, part = parts[0]
    old = stored(site.module, name)
    if backend is not None and name == site.weight_name:
        old = backend.dequantize(site.module)
    like = stored(site.module, site.weight_name) if old is None else old
    assert like is not None
    dtype = like.dtype if like.is_floating_point() and backend is None else part.dtype
    if site.part is None and site.expert is None:
        return site.turned(part).to(dtype).contiguous()
    if old is None:  # a bias that a fused projection has not
        old = part.new_zeros(site.turned(like).shape[0])
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
        self.site, self.below, self.backend = site, tuple(below), backend_of(site.module)
        self._key: tuple[int, ...] | None = None
        self._value: tuple[Tensor, Tensor | None] | None = None
        self._squares: tuple[Any, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        return self.tensors()[0]

    @property
    def bias(self) -> Tensor | None:
        """The bias; where nothing lies below, without reading the weight."""
        return self.tensors()[1] if self.below else read_bias(self.site)

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Return (weight, bias), cached while neither the base nor the members below change."""
        if torch.compiler.is_compiling():  # asked first: what follows cannot be traced
            return self._folded()
        # What FSDP gathers anew has neither a new address nor a new version: nothing would show a change.
        noticed = torch.is_grad_enabled() or several()
        learning = noticed and any(p.requires_grad for d in self.below for p in d.reached())
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
