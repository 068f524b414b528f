"""A base in few bits: how it is stored, and made ready to train over, in one call that says what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay import InlayError
from inlay.authoring import Trained
from inlay.backends import Backend, backend_of
from inlay.weights import parts_of

Layers = dict[str, tuple[Any, Backend]]


@dataclass(frozen=True)
class FewBits:
    """How bitsandbytes keeps a base: in 8 bits, or in 4 (NF4), with `double` the blocks' scales in 8."""

    bits: int
    double: bool
    compute: str

    def configuration(self, heads: Sequence[str]) -> Any:
        """Return it as transformers takes it: all linear layers but the heads in few bits."""
        from transformers import BitsAndBytesConfig

        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(heads))
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=getattr(torch, self.compute), llm_int8_skip_modules=list(heads),
        )  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What a base is made of, and what `prepare_quantised` did to it. Printing it says so in words."""

    layers: dict[str, int]  # kind of storage: how many layers
    stored: int  # bytes of their weights
    in_16_bits: int  # bytes that these would take
    norms: dict[str, int]  # dtype: how many
    heads: dict[str, str]  # name: dtype or kind of storage
    biases: int  # cast to what their layers compute in
    cache: bool  # whether the model kept keys and values for generation in every call
    checkpointing: bool

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        kinds = "; ".join(f"{count} layers in {kind}" for kind, count in self.layers.items())
        yield f"{kinds}: {_megabytes(self.stored)}, in 16 bits {_megabytes(self.in_16_bits)}"
        if self.norms:
            kept = ", ".join(f"{count} in {kind}" for kind, count in self.norms.items())
            yield f"norms: left as they are ({kept})"
        for name, kind in self.heads.items():
            yield f"head: {name} left in {kind}"
        if self.biases:
            yield f"biases: {self.biases} cast to what their layers compute in, as the first call would"
        if self.checkpointing:
            yield "gradient checkpointing: on, without reentry, so inputs need no gradients"
            if self.cache:
                yield "cache of keys and values: off, which checkpointing rules out in training"


def prepare_quantised(model: nn.Module, *, checkpointing: bool = True) -> Report:
    """Make a base whose layers are in few bits ready to train over, and say what was done.

    Call it once, before `inlay.attach`, which freezes the base. It casts the biases of layers in 4 bits
    to the dtype those compute in, and turns on gradient checkpointing. Norms, head and embeddings stay
    as they are.
    Raises `InlayError`, the model untouched, where no layer is quantised, something is attached already,
    a call in eval mode packed the weights for inference, or the model cannot checkpoint.
    """
    layers = _layers(model)
    _check(model, layers, checkpointing)
    heads = {name: _storage(module) for name, module in _at(model, "head").items()}
    norms = Counter(_storage(module) for module in _at(model, "norm").values())
    report = Report(
        layers=dict(Counter(_storage(module) for module, _ in layers.values())),
        stored=sum(_bytes(module) for module, _ in layers.values()),
        in_16_bits=sum(2 * m.in_features * m.out_features for m, _ in layers.values()),
        norms=dict(norms),
        heads=heads,
        biases=cast_biases(model),
        cache=_keeps_keys(model),
        checkpointing=checkpointing,
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        if report.cache:
            model.config.use_cache = False  # type: ignore[union-attr]
    return report


def cast_biases(model: nn.Module) -> int:
    """Cast the biases of bitsandbytes' layers in 4 bits to the dtype those compute in; return how many.

    Their first call does this by itself: an adapter saved behind it would not know its base again.
    """
    found = 0
    for module, backend in _layers(model).values():
        dtype, bias = backend.compute_dtype(module), module.bias
        if dtype is not None and bias is not None and bias.dtype != dtype:
            bias.data = bias.data.to(dtype)
            found += 1
    return found


def _check(model: Any, layers: Layers, checkpointing: bool) -> None:
    if not layers:
        raise InlayError(
            "no layer of this model is quantised",
            saw=f"a {type(model).__name__} of {len(list(model.modules()))} modules",
            do="load it in few bits, as in from_pretrained(..., quantization_config=...)",
        )
    if attached := inlay.summary(model).parts:
        raise InlayError(
            "the base is to be prepared before anything is attached to it",
            saw=f"{attached[0].path} and {len(attached) - 1} more",
            do="inlay.detach(model), prepare, then attach",
        )
    if packed := [name for name, (module, backend) in layers.items() if backend.inference_only(module)]:
        raise InlayError(
            "a call in eval mode packed quantised weights for inference, and no gradient passes them now",
            saw=f"{packed[0]} and {len(packed) - 1} more (bitsandbytes does this on the CPU)",
            do="load the model again, and prepare it before its first call",
        )
    if checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise InlayError(
            "this model has no gradient checkpointing",
            saw=f"{type(model).__name__}.supports_gradient_checkpointing is not true",
            do="prepare_quantised(model, checkpointing=False)",
        )


def _keeps_keys(model: Any) -> bool:
    generates = hasattr(model, "can_generate") and model.can_generate()
    return generates and bool(getattr(model.config, "use_cache", False))


def _layers(model: nn.Module) -> Layers:
    found = ((name, module, backend_of(module)) for name, module in model.named_modules())
    return {name: (module, backend) for name, module, backend in found if backend is not None}


def _at(model: nn.Module, role: str) -> dict[str, nn.Module]:
    """Return the modules that play a role, by name; none where the model has none."""
    try:
        planned = inlay.plan(model, Trained(targets=(role,)))
    except InlayError:
        return {}
    return {s.name: model.get_submodule(s.name.partition("[")[0]) for p in planned.parts for s in p.sites}


def _storage(module: Any) -> str:
    """Return in words how a layer's weight is stored."""
    backend, weight = backend_of(module), module._parameters.get("weight")
    if backend is None:
        return str(weight.dtype).removeprefix("torch.") if weight is not None else "no tensor"
    state, dtype = getattr(weight, "quant_state", None), backend.compute_dtype(module)
    double = ", its scales in 8 bits" if getattr(state, "nested", False) else ""
    kind = type(module).__name__ if state is None else f"4 bits ({state.quant_type}{double})"
    return kind if dtype is None else f"{kind} computing in {str(dtype).removeprefix('torch.')}"


def _bytes(module: Any) -> int:
    """Return what a quantised weight takes, its blocks' scales included."""
    weight = module._parameters.get("weight")
    if weight is None:
        return sum(b.nbytes for b in module.buffers(recurse=False))
    state = getattr(weight, "quant_state", None)
    inner = getattr(state, "state2", None)
    scales = [getattr(weight, "SCB", None), *(getattr(s, "absmax", None) for s in (state, inner))]
    return sum(t.nbytes for t in (*parts_of(weight), *scales) if isinstance(t, Tensor))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
