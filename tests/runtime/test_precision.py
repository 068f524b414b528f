"""Dtypes: of the base, of the adapter, of autocast; what is saved for backward; what is kept in files."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from faces import FACES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import inlay
from inlay.errors import CheckpointError, ConfigError
from inlay.manifest import digest_of
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, lively, shake

pytest.importorskip("transformers")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# ‖difference from float32‖ / ‖float32‖ of logits and of all gradients, by the dtype of the products
FAR = {F32: (1e-6, 1e-5), F16: (0.01, 0.02), BF16: (0.05, 0.1)}
ACTIVATION = 600  # entries: 3 rows of 7 tokens of 32 features have 672, an adapter's matrices fewer


def adapted(face: str, base: torch.dtype, own: torch.dtype | None = None) -> nn.Module:
    family, stack = FACES[face]
    model = lively(family).to(base)
    inlay.attach(model, stack, name="fr", seed=1, dtype=own)
    shake(model)
    return model


def autocast(on: bool) -> Any:
    return torch.autocast("cpu", dtype=BF16) if on else nullcontext()


class Saved:
    """Counts the entries of activations saved for backward, by dtype; parameters are none."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.entries: Counter[torch.dtype] = Counter()

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.numel() >= ACTIVATION and tensor.untyped_storage().data_ptr() not in self.own:
            self.entries[tensor.dtype] += tensor.numel()
        return tensor


def run(model: nn.Module, mixed: bool = False) -> tuple[Tensor, dict[str, Tensor], Counter[torch.dtype]]:
    """Return logits, gradients, and what was saved for backward."""
    saved = Saved(model)
    with autocast(mixed), torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
        out = model(**batch_for(model, labels=True))
    out.loss.float().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in gradients.values())
    return out.logits.detach(), gradients, saved.entries  # type: ignore[return-value]


def joined(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.float().flatten() for g in gradients.values()])


@cache
def exact(face: str) -> tuple[Tensor, Tensor]:
    logits, gradients, _ = run(adapted(face, F32))
    return logits, joined(gradients)


@cache
def of_base(family: str, base: torch.dtype, mixed: bool) -> tuple[torch.dtype, Counter[torch.dtype]]:
    """Return the bare model's own output dtype, and what it saves where its embeddings need a gradient."""
    model = lively(family).to(base).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _module, _args, y: y.requires_grad_())
    saved = Saved(model)
    with autocast(mixed), torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
        return model(**batch_for(model, labels=True)).logits.dtype, saved.entries


def refuses_itself(family: str, base: torch.dtype, mixed: bool) -> bool:
    """Whether the bare model cannot run so: torch has no layer norm of float16 under bfloat16 on the CPU."""
    if (family, base, mixed) != ("bert", F16, True):
        return False
    with pytest.raises(RuntimeError, match="mixed dtype"):
        of_base(family, base, mixed)
    return True


@pytest.mark.parametrize("mixed", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("base", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("face", FACES)
def test_every_face_in_every_dtype(face: str, base: torch.dtype, mixed: bool) -> None:
    family = FACES[face][0]
    if refuses_itself(family, base, mixed):
        with pytest.raises(RuntimeError, match="mixed dtype"):
            run(adapted(face, base), mixed)
        return
    dtype, frozen = of_base(family, base, mixed)
    most = FAR[BF16 if mixed else base]
    for own in (None, F32):
        model = adapted(face, base, own)
        logits, gradients, saved = run(model, mixed)
        assert logits.dtype == dtype
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.dtype == (own or base), name
                assert gradients[name].dtype == parameter.dtype, name
                assert gradients[name].isfinite().all(), name
        assert distance(logits.float(), exact(face)[0].float()) < most[0]
        assert distance(joined(gradients), exact(face)[1]) < most[1]
        if base != F32 and not (base == F16 and mixed):  # where the base's own norms save float32 as well
            assert saved[F32] <= frozen[F32], (own, saved, frozen)


# A kept start is made from the weights, which are other ones after a change of dtype.
@pytest.mark.parametrize("face", [face for face in FACES if face != "kept start"])
def test_attaching_before_or_after_a_change_of_dtype_is_the_same(face: str) -> None:
    family, stack = FACES[face]
    before, after = lively(family), lively(family).to(BF16)
    for model in (before, after):
        inlay.attach(model, stack, name="fr", seed=1)
        model.to(BF16)
        shake(model)
    batch = batch_for(before)
    with torch.no_grad():
        assert torch.equal(before(**batch).logits, after(**batch).logits)
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b), name


class Products(TorchDispatchMode):
    """Notes the dtypes of matrix products by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[int, ...], set[torch.dtype]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.setdefault(tuple(made.shape), set()).add(made.dtype)
        return made


def test_norms_of_weights_and_levels_are_computed_in_float32_under_autocast() -> None:
    """What changes weights does so in float32, activations are computed in bfloat16."""
    model = nn.Sequential(nn.Linear(8, 12))
    inlay.attach(model, "lora(rank=2, targets=['0']) + dora(rank=3, targets=['0'])")
    shake(model)
    with autocast(True), Products() as products:
        model(torch.randn(5, 8))
    assert products.seen[12, 8] == {F32}  # B A of the level
    assert products.seen[12, 3] == {F32}  # W Aᵀ and B (A Aᵀ) of the norm
    assert products.seen[5, 12] == {BF16}


# -- a dtype of its own ------------------------------------------------------------------------------


def test_a_dtype_is_planned_printed_saved_and_loaded(tmp_path: Path) -> None:
    model, stack = lively("llama").to(BF16), "lora(rank=4) + prefix_tuning(length=3, hidden=16)"
    sizes = [sum(p.bytes for p in inlay.plan(model, stack, dtype=own).parts) for own in (None, F32)]
    assert sizes[1] == 2 * sizes[0]
    inlay.attach(model, stack, name="fr", dtype=F32)
    shake(model)
    assert "bytes in float32" in str(inlay.summary(model))
    inlay.save(model, tmp_path / "own")
    for dtype, kept in ((None, F32), (F16, F16)):
        fresh = lively("llama").to(BF16)
        inlay.load(fresh, tmp_path / "own", name="fr", dtype=dtype)
        pairs = zip(learning(fresh), learning(model), strict=True)
        assert all(a.dtype == kept and torch.equal(a, b.to(kept)) for a, b in pairs)


def test_without_one_it_takes_the_dtype_of_each_base(tmp_path: Path) -> None:
    model = lively("llama")
    inlay.attach(model, "lora(rank=4)", name="fr")
    inlay.save(model, tmp_path / "base")
    assert "dtype" not in json.loads((tmp_path / "base" / "inlay.json").read_text())["parts"][0]
    fresh = lively("llama").to(BF16)
    with pytest.warns(UserWarning, match="other values than the base"):
        inlay.load(fresh, tmp_path / "base")
    assert {p.dtype for p in learning(fresh)} == {BF16}


def test_a_model_that_is_cast_takes_its_adapters_along(tmp_path: Path) -> None:
    model = lively("llama")
    inlay.attach(model, "lora(rank=4)", name="fr", dtype=F32)
    shake(model)
    model.half()
    assert inlay.summary(model).parts[0].dtype == "float16"
    inlay.save(model, tmp_path / "cast")
    assert "dtype" not in json.loads((tmp_path / "cast" / "inlay.json").read_text())["parts"][0]


def test_float32_adapters_merge_into_a_bfloat16_base() -> None:
    model = adapted("low rank", BF16, F32)
    batch = batch_for(model)
    with torch.no_grad():
        expected = model(**batch).logits.float()
        with inlay.use(model):
            effect = expected - model(**batch).logits.float()
        inlay.merge(model)
        assert (model(**batch).logits.float() - expected).norm() < 0.1 * effect.norm()


def test_sums_of_adapters_keep_the_dtype() -> None:
    model = lively("llama").to(BF16)
    for name in "ab":
        inlay.attach(model, "lora(rank=4)", name=name, dtype=F32)
    inlay.combine(model, {"a": 0.5, "b": 0.5}, how="tensors", name="mix")
    assert {p.dtype for p in inlay.summary(model).parts} == {"float32"}


def learning(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "float32"])
def test_other_dtypes_are_refused(dtype: Any, tmp_path: Path) -> None:
    model = lively("llama")
    with pytest.raises(ConfigError, match=r"cannot be kept in this dtype[\s\S]*dtype=.*(int8|float)"):
        inlay.attach(model, "lora(rank=4)", dtype=dtype)
    with pytest.raises(ConfigError, match=r"one of torch.float32, torch.bfloat16"):
        inlay.plan(model, "lora(rank=4)", dtype=dtype)
    with pytest.raises(ConfigError, match="cannot be kept in this dtype"):
        inlay.load(model, tmp_path, dtype=dtype)
    assert inlay.summary(model).parts == ()


@pytest.mark.parametrize("dtype", ["int8", "float32; import os", 32])
def test_a_file_that_asks_for_another_dtype_is_refused(dtype: Any, tmp_path: Path) -> None:
    model = lively("llama")
    inlay.attach(model, "lora(rank=4)", dtype=F32)
    inlay.save(model, tmp_path)
    file = tmp_path / "inlay.json"
    content = json.loads(file.read_text())
    content["parts"][0]["dtype"] = dtype
    file.write_text(json.dumps({**content, "digest": digest_of(content)}))
    with pytest.raises(CheckpointError, match=r"hostile[\s\S]*(a part in the dtype|dtype is a int)"):
        inlay.load(lively("llama"), tmp_path)
