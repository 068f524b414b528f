"""Prefix tuning at work: gradients through the generator, learning, routing, folding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import StateError
from inlay.stack import need_state
from inlay.testing.effects import output
from inlay.testing.layers import fit, gradients
from inlay.testing.models import batch_for, build
from inlay_prefix import PrefixTuning, fold

DOUBLE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
FORMS = {"generator": PrefixTuning(hidden=16), "flat": PrefixTuning(reparam=False)}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def adapter(model: nn.Module) -> Any:
    return need_state(model).adapter_of("default")


def adapted(family: str, method: Any, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a float64 model with the method attached, and a batch."""
    model = build(family, dtype=torch.float64, **changes)
    inlay.attach(model, method, seed=3)
    return model, batch_for(model)


def padded(model: nn.Module, rows: int = 2) -> dict[str, Any]:
    """Return a batch whose first row is three tokens shorter, padded on the left."""
    batch = batch_for(model, rows=rows)
    batch.pop("labels", None)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :3] = 0
    batch["input_ids"][0, :3] = 0
    return batch


def values(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return each site's keys and values (H_kv, p, D) as the method's text defines them, in plain torch."""
    found = []
    for site, delta in adapter(model).placed:
        if delta.key is not None:
            found.append((delta.key, delta.value))
            continue
        group = f"{site.side}_" * bool(site.side) + ("cross" if site.cross else "self")
        g = adapter(model).shared[group]
        rows = torch.tanh(g.table @ g.down.T + g.down_bias) @ g.up.T + g.up_bias
        rows = rows.view(rows.shape[0], site.count, 2, site.kv_heads, site.head_dim)[:, site.index]
        found.append((rows[:, 0].transpose(0, 1), rows[:, 1].transpose(0, 1)))
    return [(k.detach(), v.detach()) for k, v in found]


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_gradient_checkpointing_gives_the_same_gradients(family: str, form: str, reentrant: bool) -> None:
    changes: dict[str, Any] = {
        "llama": {}, "t5": {"dropout_rate": 0.0},
        "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    }[family]  # fmt: skip
    model, _ = adapted(family, FORMS[form], **changes)
    model.train()
    batch = batch_for(model, labels=True)
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for _ in range(2):  # a second step, so that nothing of the first may be left over
        found = gradients(model, batch)
        assert expected.keys() == found.keys()
        assert len(expected) == len(list(adapter(model).named_parameters()))
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(found[name], gradient, **DOUBLE)


def test_gradients_of_the_generator_equal_those_of_its_values() -> None:
    """Chain rule by hand: the folded prefix's gradients, pulled back through the formula."""
    model, _ = adapted("llama", PrefixTuning(hidden=16))
    batch = batch_for(model, labels=True)
    found = gradients(model, batch)
    g = copy.deepcopy(adapter(model).shared["self"])
    fold(model, "default")
    model.zero_grad()
    model(**batch).loss.backward()
    pulled = 0.0
    for (_site, delta), pair in zip(adapter(model).placed, g().values(), strict=True):
        pulled = pulled + (pair * torch.stack((delta.key.grad, delta.value.grad))).sum()
    pulled.backward()  # type: ignore[attr-defined]
    for name, parameter in g.named_parameters():
        matching = [v for k, v in found.items() if k.endswith(f".self.{name}")]
        torch.testing.assert_close(matching, [parameter.grad], **DOUBLE)


def test_dropout_acts_on_the_prefix_in_training_only() -> None:
    for reparam in (True, False):
        model = build("llama")
        inlay.attach(model, PrefixTuning(hidden=16, reparam=reparam, dropout=0.5))
        batch = batch_for(model)
        assert torch.equal(output(model, batch), output(model, batch))
        model.train()
        assert not torch.equal(output(model, batch), output(model, batch))


@pytest.mark.parametrize("form", FORMS)
def test_it_learns(form: str) -> None:
    """Sixty AdamW steps at the method's own rate on one batch, the head frozen."""
    model = build("bert", initializer_range=0.2)  # with 0.02 a random base passes almost nothing on
    method = PrefixTuning() if form == "generator" else PrefixTuning(reparam=False)
    inlay.attach(model, method, seed=0)
    batch = batch_for(model, rows=8, labels=True)
    before, after = fit(model, batch)
    assert after < {"generator": 0.65, "flat": 0.3}[form] * before


def test_a_generator_takes_a_smaller_rate_than_its_values() -> None:
    model = build("bert")
    inlay.attach(model, PrefixTuning(hidden=16))
    assert [(g["lr"], g["weight_decay"]) for g in inlay.parameter_groups(model)] == [(1e-4, 0.0)]
    fold(model, "default")
    assert [(g["lr"], g["weight_decay"]) for g in inlay.parameter_groups(model)] == [(5e-2, 0.0)]
    assert [g["lr"] for g in inlay.parameter_groups(model, lr=0.3)] == [0.3]


def test_rows_of_a_batch_take_their_own_prefixes() -> None:
    model = build("llama", dtype=torch.float64)
    inlay.attach(model, PrefixTuning(hidden=16), name="fr", seed=1)
    inlay.attach(model, PrefixTuning(length=4, hidden=16), name="de", seed=2)
    batch = padded(model, rows=3)
    alone = []
    for row, names in enumerate((("fr",), ("de",), ())):
        with inlay.use(model, *names):
            alone.append(output(model, batch)[row])
    with inlay.route(model, ["fr", "de", None]):
        routed = output(model, batch)
    real = batch["attention_mask"] == 1
    torch.testing.assert_close(routed[real], torch.stack(alone)[real], **DOUBLE)
    assert not torch.allclose(alone[0], alone[1])


# -- folding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_folding_keeps_the_function_and_drops_the_generator(family: str, tmp_path: Path) -> None:
    model, batch = adapted(family, PrefixTuning(hidden=16, dropout=0.3))
    model.train()
    before_values, before = values(model), output(model.eval(), batch)
    model.train()
    assert [stage.name for stage in inlay.stages(model, "default")] == ["train"]
    fold(model, "default")
    model.eval()
    assert torch.equal(output(model, batch), before)
    torch.testing.assert_close(values(model), before_values, **DOUBLE)
    assert not adapter(model).shared
    assert not any("_shared." in name for name in model.state_dict())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * len(adapter(model).placed)
    inlay.save(model, tmp_path / "folded")
    inlay.detach(model)
    inlay.load(model, tmp_path / "folded")
    assert torch.equal(output(model, batch), before)
    assert not adapter(model).shared


def test_a_folded_prefix_trains_on() -> None:
    model, _ = adapted("bert", PrefixTuning(hidden=16))
    batch = batch_for(model, labels=True)
    fold(model, "default")
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model, lr=1e-3))
    loss = model(**batch).loss
    loss.backward()
    inlay.check_training(model, optimizer)
    optimizer.step()
    assert model(**batch).loss < loss


def test_folding_one_part_of_a_stack_leaves_the_rest() -> None:
    model = build("llama")
    stack = PrefixTuning(hidden=16).named("a") + PrefixTuning(hidden=16).named("b")
    inlay.attach(model, stack, name="fr")
    batch = batch_for(model)
    before = output(model, batch)
    fold(model, "fr/b")
    torch.testing.assert_close(output(model, batch), before)
    assert need_state(model).adapter_of("fr/a").shared
    assert not need_state(model).adapter_of("fr/b").shared
    fold(model, "fr")
    assert not need_state(model).adapter_of("fr/a").shared
    with pytest.raises(StateError, match=r"'fr' has no prefix generator.*\n.*fr/a \(flat\), fr/b \(flat\)"):
        fold(model, "fr")
