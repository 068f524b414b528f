"""HiWi: equations, folding into differences, counts, what is refused, and that it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_checks import adapted, learns, starts_at_the_base
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import RobertaConfig, RobertaModel

import inlay
from inlay.errors import ConfigError, StateError
from inlay.testing.layers import deltas_of, gradients, settled, watch
from inlay.testing.models import batch_for, build
from inlay.testing.tools import distance
from inlay_reparam import HiWi, KAdaptation, fold

ACT = {"relu": F.relu, "gelu": F.gelu}
LINEAR = ("linear",)


def moved(theta: Tensor, delta: nn.Module, act: str) -> Tensor:
    """Return θ + f(θ D) U for θ (rows, out)."""
    return theta + ACT[act](theta @ delta.down.T) @ delta.up.T


def values_of(model: nn.Module, site: str, method: HiWi) -> tuple[Tensor, Tensor | None]:
    """Return the layer's (W', b')."""
    layer, delta = model.get_submodule(site), deltas_of(model)[site]
    if method.target == "bias":
        return layer.weight, moved(layer.bias[None], delta, method.act)[0]
    return moved(layer.weight.T, delta, method.act).T, layer.bias


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize(
    ("family", "target", "targets"),
    [("bert", "bias", None), ("bert", "bias", LINEAR), ("bert", "weight", LINEAR), ("llama", "weight", None)],
)
def test_output_merge_and_gradients_are_the_formulas(
    family: str, target: str, targets: tuple[str, ...] | None, act: str
) -> None:
    method = HiWi(target=target, rank=5, act=act, targets=targets)
    model = adapted(family, method)
    batch, wanted = batch_for(model, labels=True), dict[str, tuple[Tensor, Tensor | None]]()
    for site in deltas_of(model):
        weight, bias = values_of(model, site, method)
        x, y = watch(model, site, batch)
        assert distance(y, F.linear(x, weight, bias)) < 1e-9
        layer = model.get_submodule(site)
        assert distance(y, F.linear(x, layer.weight, layer.bias)) > 1e-4
        wanted[site] = weight, bias
    before, found = model(**batch).logits, gradients(model, batch)
    site = next(iter(wanted))
    layer, delta = model.get_submodule(site), deltas_of(model)[site]
    own = [found[f"{site}.inlay.{n}"] for n in found_names(found, site)]
    expected = by_hand(model, site, batch, wanted[site], list(delta.parameters()))
    assert all(distance(a, b) < 1e-8 for a, b in zip(own, expected, strict=True))
    inlay.merge(model, undo=False)
    for name, (weight, bias) in wanted.items():
        assert distance(model.get_submodule(name).weight, weight) < 1e-9
        assert bias is None or distance(model.get_submodule(name).bias, bias) < 1e-9
    assert distance(model(**batch).logits, before) < 1e-9
    assert layer is model.get_submodule(site)


def found_names(found: dict[str, Tensor], site: str) -> list[str]:
    return [name.removeprefix(f"{site}.inlay.") for name in found if name.startswith(f"{site}.inlay.")]


def by_hand(
    model: nn.Module,
    site: str,
    batch: dict[str, Tensor],
    new: tuple[Tensor, Tensor | None],
    own: list[Tensor],
) -> tuple[Tensor, ...]:
    """Return the gradients of a layer's own tensors, its output replaced by that of (W', b')."""

    def replaced(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.linear(args[0], *new)

    handle = model.get_submodule(site).register_forward_hook(replaced)
    try:
        return torch.autograd.grad(model(**batch).loss, own)
    finally:
        handle.remove()


@pytest.mark.parametrize(("family", "target"), [("bert", "bias"), ("gpt2", "bias"), ("llama", "weight")])
def test_starts_exactly_at_the_base(family: str, target: str) -> None:
    starts_at_the_base(family, HiWi(target=target))


def test_a_gradient_reaches_d_once_u_is_not_zero() -> None:
    model = settled("bert")
    inlay.attach(model, HiWi(), seed=0)
    batch = batch_for(model, labels=True)
    first = gradients(model, batch)
    assert all(g.any() == name.endswith(".up") for name, g in first.items())
    torch.optim.AdamW(inlay.parameter_groups(model)).step()
    assert all(g.any() for g in gradients(model, batch).values())


def test_counts_of_roberta_large() -> None:
    with torch.device("meta"):
        sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}
        model = RobertaModel(RobertaConfig(num_attention_heads=16, **sizes))
    assert inlay.plan(model, HiWi(rank=64)).parameters == 24 * 2 * 64 * (4096 + 1024)
    assert inlay.plan(model, HiWi(rank=1)).parameters // 2 == 24 * (4096 + 1024) == 122_880  # what is stored


@pytest.mark.parametrize(("target", "stored"), [("bias", 2 * (48 + 32)), ("weight", 2 * 2 * 48 * 32)])
def test_what_is_stored_after_folding_does_not_depend_on_the_rank(
    target: str, stored: int, tmp_path: Path
) -> None:
    sizes = set()
    for rank in (2, 64):
        model = adapted("bert", HiWi(target=target, rank=rank)).float()
        batch = batch_for(model)
        before = model(**batch).logits
        inlay.save(model, str(tmp_path / f"unfolded-{rank}"), "default")
        fold(model, "default")
        assert distance(model(**batch).logits, before) < 1e-6
        assert sum(p.numel() for d in deltas_of(model).values() for p in d.parameters()) == stored
        inlay.save(model, str(tmp_path / str(rank)), "default")
        sizes.update(file.stat().st_size for file in (tmp_path / str(rank)).glob("*.safetensors"))
        again = settled("bert")
        inlay.load(again, str(tmp_path / str(rank)))
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        resumed = settled("bert")
        inlay.load(resumed, str(tmp_path / f"unfolded-{rank}"))
        assert torch.equal(resumed(**batch).logits, before)
    assert len(sizes) == 1


def test_merged_there_is_no_module_left() -> None:
    model = adapted("bert", HiWi())
    batch = batch_for(model)
    before = model(**batch).logits
    fold(model, "default")
    inlay.merge(model, undo=False)
    assert not any(".inlay" in name for name, _ in model.named_modules())
    assert distance(model(**batch).logits, before) < 1e-9


def test_folding_reads_what_lies_below() -> None:
    model = settled("bert").double()
    inlay.attach(model, KAdaptation(n=4, targets=["up"]) + HiWi(), seed=0)
    for site, delta in deltas_of(model).items():
        with torch.no_grad():
            for p in delta.parameters():
                p.add_(
                    0.3
                    * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(len(site)))
                )
    batch = batch_for(model)
    before = model(**batch).logits
    fold(model, "default")
    assert distance(model(**batch).logits, before) < 1e-9


def test_a_folded_difference_goes_on_learning() -> None:
    model = adapted("bert", HiWi()).float()
    assert [stage.name for stage in inlay.stages(model, "default")] == ["train"]
    assert inlay.advance(model, "default") is None
    batch = batch_for(model, labels=True)
    assert all(g.any() for g in gradients(model, batch).values())
    inlay.check_training(model, torch.optim.AdamW(inlay.parameter_groups(model)))


def test_folding_twice_is_refused() -> None:
    model = adapted("bert", HiWi())
    fold(model, "default")
    with pytest.raises(StateError, match=r"has no parameter adapter to fold[\s\S]*\(folded\)"):
        fold(model, "default")


def test_layers_without_a_bias_are_refused_by_name() -> None:
    model = settled("llama")
    with pytest.raises(
        ConfigError, match=r"a layer has no bias to adapt[\s\S]*layers.0.mlp.up_proj, [\s\S]*4 of 4"
    ):
        inlay.attach(model, HiWi())
    assert "_inlay_state" not in vars(model)


def test_biases_of_zero_are_refused_by_name() -> None:
    model = build("bert")
    with pytest.raises(ConfigError, match=r"a bias that is 0, from which[\s\S]*layer.0.intermediate.dense"):
        inlay.attach(model, HiWi())


@pytest.mark.parametrize(("setting", "value"), [("rank", 0), ("act", "tanh"), ("target", "norm")])
def test_settings_are_checked(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{setting}={value!r}"):
        HiWi(**{setting: value})


@pytest.mark.parametrize(
    ("family", "method"),
    [("bert", HiWi(targets=LINEAR)), ("bert", HiWi(target="weight")), ("llama", HiWi(target="weight"))],
)
def test_it_learns(family: str, method: HiWi) -> None:
    learns(family, method)
