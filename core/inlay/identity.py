"""The identity of a base model: architecture, configuration, shapes, and a sample of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from inlay.backends import backend_of
from inlay.stack import State, base_modules, only_base, state_of
from inlay.weights import tensors_of, whole

VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "id2label",
            "label2id", "architectures", "output_hidden_states", "output_attentions")  # fmt: skip
SAMPLES = 16


def identity(model: nn.Module) -> dict[str, Any]:
    """Return what says whether an adapter was made for this base.

    Tensors that an adapter replaces (trained heads) are left out of the weights' sample: freshly
    initialised, they differ in every process. So are quantised ones, which stand there with the
    shape of what they stand for.
    """
    left_out = sorted(_replaced(state_of(model)))
    return {**_facts(model, left_out), "left_out": left_out}


def differences(saved: dict[str, Any], model: nn.Module) -> list[str]:
    """Return in words how `model` differs from the base an adapter was saved for."""
    now = _facts(model, saved.get("left_out", ()))
    found = [
        f"{key}: {saved.get(key)} then, {now[key]} now"
        for key in ("architecture", "config", "shapes")
        if saved.get(key) != now[key]
    ]
    if None not in (saved.get("weights"), now["weights"]) and saved["weights"] != now["weights"]:
        found.append("weights: other values than the base it was trained on")
    return found


def _facts(model: nn.Module, left_out: Iterable[str]) -> dict[str, Any]:
    tensors = only_base(model, tensors_of)
    layers = [(n, m, backend) for n, m in base_modules(model).items() if (backend := backend_of(m))]
    quantised: dict[str, Any] = {f"{n}.weight".lstrip("."): m for n, m, b in layers if b.readable}
    acting = {f"{n}.bias".lstrip("."): b.compute_dtype(m) for n, m, b in layers}  # some cast it when called
    shapes = {k: list(t.shape) for k, t in tensors.items()}
    shapes |= {k: [m.out_features, m.in_features] for k, m in quantised.items()}
    omitted = {*left_out, *quantised}
    return {
        "architecture": _own_class(model).__name__,
        "config": _digest(json.dumps(_config(model), sort_keys=True, default=str).encode()),
        "shapes": _digest(json.dumps(shapes, sort_keys=True).encode()),
        "weights": sample({k: t.to(acting.get(k)) for k, t in tensors.items() if k not in omitted}),
    }


def _own_class(model: nn.Module) -> type:
    """Return the class the model was written as, under what adapters and FSDP put on top of it."""
    kinds = type(model).__mro__
    under = next((i for i, kind in enumerate(kinds) if kind.__name__ == "FSDPModule"), -1)
    return kinds[under + 1]


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    if "problem_type" in values:
        values["problem_type"] = None  # a classifier's own forward sets it, at its first labels
    return {k: v for k, v in values.items() if k not in VOLATILE}


def _replaced(state: State | None) -> set[str]:
    names: set[str] = set()
    if state is None:
        return names
    paths = {id(m): n for n, m in state.model.named_modules()}
    for placed in state.placed.values():
        for site, delta in placed.adapter.placed:
            if delta.replaces:
                path = paths[id(site.module)]
                names |= {f"{path}.{n}".lstrip(".") for n, _ in site.module.named_parameters(recurse=False)}
    return names


def sample(tensors: dict[str, torch.Tensor]) -> str | None:
    """Digest a few evenly spaced values of every tensor; None where there are none (meta)."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.device.type == "meta":
            return None
        if tensor.numel() == 0:
            continue
        flat = whole(tensor.detach()).reshape(-1)
        count = min(SAMPLES, flat.numel())  # in integers: floats name no place beyond 2^24 exactly
        steps = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
        values = flat[steps].cpu()
        values = values.double() if values.is_floating_point() else values.long()
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
