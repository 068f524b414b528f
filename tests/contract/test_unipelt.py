"""UniPELT on the contract: a composite of three plugins' methods, with gates kept over a generation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_checks import (
    GREEDY,
    Batch,
    batch_for,
    build,
    check_base_unmoved,
    check_checkpointing,
    check_detach,
    check_gradients,
    check_round_trip,
    check_routing,
    logits,
    offered,
    padded,
    part,
    stir,
    uncached,
)
from rehearsal.unipelt import GatedColumns, UniPELT
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.errors import TargetError
from inlay_adapter import SerialAdapter
from inlay_lora import LoRA
from inlay_prefix import PrefixTuning

LORA = LoRA(rank=2, alpha=2)
SERIAL = SerialAdapter(placement="pfeiffer", rank=3)
FLAT, MADE = PrefixTuning(length=3, reparam=False), PrefixTuning(length=3, hidden=6)
METHOD = UniPELT(lora=LORA, adapter=SERIAL, prefix=MADE)


@pytest.fixture(autouse=True)
def _offered() -> Iterator[None]:
    with offered(UniPELT):
        yield


def attached(family: str, method: UniPELT = METHOD, name: str = "fr", *, seed: int = 0) -> nn.Module:
    model = build(family)
    inlay.attach(model, method, name, seed=seed)
    stir(model, name, seed=seed + 1)
    return model


def gates(model: nn.Module, name: str = "fr") -> dict[str, nn.Parameter]:
    adapter = part(model, name).adapter
    return {n: p for n, p in adapter.named_parameters() if ".gates." in n}


def set_gates(model: nn.Module, logit: float | dict[str, float]) -> None:
    """Make every gate the constant σ(logit), whatever it reads."""
    with torch.no_grad():
        for name, parameter in gates(model).items():
            constant = logit if isinstance(logit, float) else logit[name.replace(".bias.", ".weight.")]
            parameter.fill_(constant if ".bias." in name else 0.0)


def gate(x: Tensor, parameters: dict[str, nn.Parameter], site: str, of: str, real: Tensor) -> Tensor:
    """G(x), one row at a time."""
    w, b = parameters[f"{site}.gates.weight.{of}"], parameters[f"{site}.gates.bias.{of}"]
    return torch.stack([torch.sigmoid(row[r] @ w + b).mean() for row, r in zip(x, real, strict=True)])


def test_counts_of_bert_base() -> None:
    """LoRA 294,912 + adapter 894,528 + prefix without its MLP 184,320 + gates 36,912."""
    sizes = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    }
    with torch.device("meta"):
        model = build("bert", **sizes)
    lora, serial = LoRA(rank=8, alpha=8), SerialAdapter(placement="pfeiffer")
    prefix = PrefixTuning(length=10, reparam=False)
    assert inlay.plan(model, UniPELT(lora=lora, adapter=serial, prefix=prefix)).parameters == 1_410_672
    assert inlay.plan(model, UniPELT(adapter=serial, prefix=prefix)).parameters == 1_097_304


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_lora_and_adapter_match_plain_hooks(family: str) -> None:
    """The adapter's gate reads LN(f + a), or without a norm f + a; no mean runs over padding."""
    model, reference = attached(family, UniPELT(lora=LORA, adapter=SERIAL)), build(family)
    batch = padded(model, [7, 2, 5], left=family == "llama")
    real, found = batch["attention_mask"].bool(), gates(model)
    for site, gated in part(model, "fr").adapter.placed:
        if site.kind == "linear":
            (lora,) = gated.children_of["lora"]

            def project(
                m: nn.Module, args: Any, y: Tensor, lora: Any = lora, site: str = site.name
            ) -> Tensor:
                change = args[0] @ lora.down.T @ lora.up.T
                return y + gate(args[0], found, site, "lora", real)[:, None, None] * change

            reference.get_submodule(site.name).register_forward_hook(project)
            continue
        (serial,) = gated.children_of["adapter"]
        kept: dict[str, Any] = {}
        if family == "bert":
            block = reference.bert.encoder.layer[site.layer]
            residual_at, y_at, norm = block.output, block.output.dropout, block.output.LayerNorm
        else:
            block = reference.model.layers[site.layer]
            residual_at, y_at, norm = block.post_attention_layernorm, block.mlp, None

        def keep(m: nn.Module, args: Any, kept: Any = kept) -> None:
            kept["a"] = args[-1]

        def change(
            m: nn.Module, args: Any, f: Tensor, kept: Any = kept, norm: Any = norm, serial: Any = serial,
            site: str = site.name,
        ) -> Tensor:  # fmt: skip
            h = f + kept["a"]
            h = h if norm is None else F.layer_norm(h, h.shape[-1:], norm.weight, norm.bias, norm.eps)
            z = torch.relu(h @ serial.down.T + serial.down_bias) @ serial.up.T + serial.up_bias
            return f + gate(h, found, site, "adapter", real)[:, None, None] * z

        residual_at.register_forward_pre_hook(keep)
        y_at.register_forward_hook(change)
    wanted, got = logits(reference, batch), logits(model, batch)
    where = real if wanted.dim() == 3 else slice(None)
    torch.testing.assert_close(got[where], wanted[where], rtol=1e-5, atol=1e-5)
    assert (wanted - logits(build(family), batch))[where].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("prefix", [FLAT, MADE], ids=["flat", "generated"])
def test_prefix_is_the_plugins_own_scaled_by_the_gate(family: str, prefix: PrefixTuning) -> None:
    """Each row equals a plain prefix whose keys and values were multiplied by that row's gate."""
    model, reference = attached(family, UniPELT(prefix=prefix)), build(family)
    batch = padded(model, [7, 2, 5], left=False)
    inlay.attach(reference, FLAT, "fr", seed=0)
    seen: dict[str, Tensor] = {}
    for site, gated in part(model, "fr").adapter.placed:
        assert isinstance(gated, GatedColumns)
        gated.register_forward_hook(
            lambda m, a, out, name=site.name: seen.update({name: out.key, name + "v": out.value})
        )
    got = logits(model, batch)
    for row, length in enumerate([7, 2, 5]):
        for site, plain in part(reference, "fr").adapter.placed:
            plain.hold(nn.Parameter(seen[site.name][row]), nn.Parameter(seen[site.name + "v"][row]))
        own = {k: v[row : row + 1, :length] for k, v in batch.items()}
        alone = got[row : row + 1] if got.dim() == 2 else got[row : row + 1, :length]
        torch.testing.assert_close(alone, logits(reference, own), rtol=1e-5, atol=1e-5)
    ratio = torch.stack([seen[name] for name in seen if not name.endswith("v")])
    numbers = ratio[:, 0] / ratio[:, 1]
    torch.testing.assert_close(numbers, numbers[:, :1, :1, :1].expand_as(numbers), rtol=1e-4, atol=1e-5)
    assert (numbers[:, 0, 0, 0] - 1).abs().min() > 1e-4


def test_gates_start_at_a_half_and_a_closed_prefix_is_not_the_base() -> None:
    model = build("llama")
    batch = batch_for(model)
    inlay.attach(model, METHOD, "fr", seed=0)
    found: list[Tensor] = []
    for _, gated in part(model, "fr").adapter.placed:
        gated.gates.register_forward_hook(lambda m, a, out: found.append(out))
    plain = logits(build("llama"), batch)
    logits(model, batch)
    assert len(found) == 2 * (2 + 1 + 1)
    assert all(g.shape == (3, 1, 1) and (g - 0.5).abs().max() < 0.1 for g in found)
    set_gates(model, -60.0)
    closed = logits(model, batch)
    assert (closed - plain).abs().max() > 1e-3
    inlay.detach(model)
    inlay.attach(model, UniPELT(lora=LORA, adapter=SERIAL), "fr", seed=0)
    stir(model, "fr")
    set_gates(model, -200.0)
    assert torch.equal(logits(model, batch), plain)


def test_open_gates_are_the_plain_stack() -> None:
    """σ = 1: the parts as the plugins place them by themselves."""
    model, reference = attached("bert"), build("bert")
    set_gates(model, 60.0)
    inlay.attach(reference, LORA + SERIAL + MADE, "fr", seed=0)
    children = part(model, "fr").adapter.children
    for name, plain in (("lora", "lora"), ("adapter", "serial_adapter"), ("prefix", "prefix_tuning")):
        twin = part(reference, f"fr/{plain}").adapter
        for (_, ours), (_, theirs) in zip(children[name].placed, twin.placed, strict=True):
            theirs.load_state_dict(ours.state_dict())
        twin.shared.load_state_dict(children[name].shared.state_dict())
    batch = batch_for(model)
    torch.testing.assert_close(logits(model, batch), logits(reference, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["greedy", "beams", "static"],
)
def test_generation_keeps_the_prompts_gates(options: dict[str, Any]) -> None:
    """Each row alone, its gates fixed to what its prompt gives: the same continuation."""
    model = attached("llama")
    stir(model, "fr", seed=7, std=1.0)
    batch = padded(model, [6, 2, 5])
    together = model.generate(**batch, max_new_tokens=6, **GREEDY, **options)[:, 6:]
    for row, length in enumerate([6, 2, 5]):
        own = {k: v[row : row + 1, 6 - length :] for k, v in batch.items()}
        fixed = attached("llama")
        stir(fixed, "fr", seed=7, std=1.0)
        set_gates(fixed, prompt_logits(model, own))
        if options.get("num_beams"):
            wanted = fixed.generate(**own, max_new_tokens=6, **GREEDY, use_cache=False, **options)[:, length:]
        else:
            wanted = uncached(fixed, own, 6)
        assert torch.equal(together[row], wanted[0])


def prompt_logits(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Return the logit of every gate for this one prompt, by the name of its weight."""
    found: dict[str, float] = {}
    handles = []
    for site, gated in part(model, "fr").adapter.placed:

        def note(module: nn.Module, args: Any, out: Tensor, site: str = site.name) -> None:
            found[f"{site}.gates.weight.{args[0]}"] = float(torch.logit(out.flatten()[0].double()))

        handles.append(gated.gates.register_forward_hook(note))
    logits(model, batch)
    for handle in handles:
        handle.remove()
    return found


def test_two_generations_do_not_share_gates() -> None:
    model = attached("llama")
    first, second = padded(model, [6, 3]), padded(model, [4, 5], seed=5)
    alone = model.generate(**second, max_new_tokens=4, **GREEDY)
    model.generate(**first, max_new_tokens=4, **GREEDY)
    assert torch.equal(model.generate(**second, max_new_tokens=4, **GREEDY), alone)


def test_t5_gates_of_both_stacks_leave_padding_out() -> None:
    model = attached("t5")
    ids = batch_for(model, rows=1, length=5)["input_ids"]
    labels = batch_for(model, rows=1, length=4, seed=3)["labels"]
    alone = logits(model, {"input_ids": ids, "labels": labels})
    two = {
        "input_ids": torch.cat([F.pad(ids, (0, 3)), torch.full((1, 8), 9)]),
        "attention_mask": torch.tensor([[1] * 5 + [0] * 3, [1] * 8]),
        "decoder_input_ids": torch.cat([F.pad(model._shift_right(labels), (0, 2)), torch.full((1, 6), 5)]),
        "decoder_attention_mask": torch.tensor([[1] * 4 + [0] * 2, [1] * 6]),
    }
    torch.testing.assert_close(logits(model, two)[:1, :4], alone, rtol=1e-5, atol=1e-5)
    got = model.generate(
        input_ids=two["input_ids"], attention_mask=two["attention_mask"], max_new_tokens=4, **GREEDY
    )
    assert torch.equal(got[0], model.generate(input_ids=ids, max_new_tokens=4, **GREEDY)[0])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradients_routing_and_detach(family: str) -> None:
    model = build(family)
    batch = padded(model, [7, 2, 5, 4], left=False)
    labelled = batch_for(model, labels=True)
    check_detach(model, lambda: inlay.attach(model, METHOD, "fr", seed=0), batch)
    inlay.attach(model, METHOD, "fr", seed=0)
    stir(model, "fr")
    check_gradients(model, "fr", labelled)
    check_base_unmoved(model, labelled)
    inlay.attach(model, UniPELT(lora=LORA, prefix=FLAT), "de", seed=1, activate=False)
    stir(model, "de", seed=2)
    check_routing(model, ["fr", None, "de", "fr"], batch)


def test_generation_routed_per_sample_equals_alone() -> None:
    """Two adapters with gates at the same sites keep them apart."""
    model = attached("llama")
    inlay.attach(model, UniPELT(lora=LORA, prefix=FLAT), "de", seed=1)
    stir(model, "de", seed=2, std=1.0)
    batch = padded(model, [6, 3, 5])
    for options in ({}, {"num_beams": 2}):
        with inlay.route(model, ["de", None, "fr"]):
            together = model.generate(**batch, max_new_tokens=4, **GREEDY, **options)
        for row, name in enumerate(("de", None, "fr")):
            own = {k: v[row : row + 1] for k, v in batch.items()}
            with inlay.route(model, name):
                alone = model.generate(**own, max_new_tokens=4, **GREEDY, **options)
            assert torch.equal(together[row], alone[0]), (name, options)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_checkpointing(family: str, reentrant: bool) -> None:
    """The prefix is generated once per call; gates are computed again with their block."""
    model = attached(family)
    check_checkpointing(model, batch_for(model, labels=True), reentrant=reentrant)
    inlay.attach(model, UniPELT(lora=LORA, prefix=FLAT), "de", seed=1)
    check_checkpointing(model, batch_for(model, labels=True), reentrant=reentrant, names=["fr", "de", None])


def test_folding_the_prefix_is_a_stage_and_survives_saving(tmp_path: Path) -> None:
    """A part's own stage and data, inside the composite."""
    model = attached("llama")
    batch = batch_for(model)
    check_round_trip(lambda: build("llama"), model, "fr", batch, tmp_path / "made")
    before = logits(model, batch)
    assert [s.name for s in inlay.stages(model, "fr")] == ["prefix/train"]
    assert inlay.advance(model, "fr") is None
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-5, atol=1e-6)
    assert part(model, "fr").adapter.data["prefix"] == {"folded": True}
    names = [n for n, _ in part(model, "fr").adapter.named_parameters()]
    assert not [n for n in names if n.startswith("shared.")]
    fresh = check_round_trip(lambda: build("llama"), model, "fr", batch, tmp_path / "folded")
    check_gradients(fresh, "fr", batch_for(model, labels=True))


def test_merging_is_refused_with_the_reason() -> None:
    model = attached("llama")
    with pytest.raises(inlay.CannotMerge, match="its gate depends on the input"):
        inlay.merge(model)


def test_parts_keep_their_own_groups_and_take_the_composites_layers() -> None:
    model = build("bert")
    inlay.attach(model, UniPELT(lora=LORA, adapter=SERIAL, layers=[1]), "fr", seed=0)
    assert {s.layer for s in part(model, "fr").adapter.sites} == {1}
    named = {id(p): n.rsplit(".", 1)[-1] for n, p in part(model, "fr").adapter.named_parameters()}
    decays = {}
    for group in inlay.parameter_groups(model):
        for parameter in group["params"]:
            decays[named[id(parameter)]] = group.get("weight_decay", "optimizer's")
    assert decays["up_bias"] == decays["down_bias"] == 0.0
    assert decays["lora"] == "optimizer's"
    with pytest.raises(TargetError, match="attention"):
        inlay.plan(build("llama"), UniPELT(lora=LORA, prefix=FLAT, targets=["query"]))
