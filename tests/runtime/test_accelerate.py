"""accelerate's hooks (offload, dispatch) stand before a module's class: adapters act all the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import AttachError, CannotMerge, TrainingError
from inlay.testing.models import batch_for
from inlay.testing.snapshots import differences, snapshot
from inlay.testing.tools import distance, lively, shake

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from accelerate.hooks import remove_hook_from_module  # noqa: E402

MERGING = "lora(rank=4) + ia3()"
REST = "prefix_tuning(length=3, hidden=16) + serial_adapter(rank=8) + dora(rank=2, targets=['both.output'])"
STACK = f"{MERGING} + {REST}"
FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
CPU = torch.device("cpu")
CLOSE = 1e-6  # the same arithmetic in the same order


def adapted(family: str, stack: str = STACK, *, offload: Any = None) -> nn.Module:
    """Return a lively model, offloaded by `offload` if given, with `stack` attached and acting."""
    model = lively(family)
    if offload is not None:
        offload(model)
    inlay.attach(model, stack, seed=3)
    shake(model)
    return model


def offload(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=CPU)


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def own(model: nn.Module) -> list[nn.Parameter]:
    return [p for _, _, p in model._inlay_state.own_parameters()]


@FAMILIES
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloading_before_or_after_attaching_changes_nothing(family: str, when: str) -> None:
    expected_from = adapted(family)
    batch = batch_for(expected_from)
    expected = logits(expected_from, batch)
    model = adapted(family, offload=offload if when == "before" else None)
    if when == "after":
        offload(model)
    base = model.get_submodule({"llama": "lm_head", "t5": "lm_head"}.get(family, "")).parameters(recurse=True)
    assert any(p.is_meta for p in base), "nothing was offloaded"
    assert distance(logits(model, batch), expected) < CLOSE
    assert distance(logits(model, batch), logits(lively(family), batch)) > 0.05
    inlay.detach(model)
    assert torch.equal(logits(model, batch), logits(lively(family), batch))


@FAMILIES
def test_detaching_leaves_the_offloaded_model_as_it_was(family: str) -> None:
    model = lively(family)
    offload(model)
    before = snapshot(model)
    inlay.attach(model, STACK)
    inlay.detach(model)
    assert differences(before, model) == []


def test_adapters_attached_to_an_offloaded_model_stay_where_it_computes() -> None:
    model = adapted("llama", offload=offload).train()
    assert [p for p in own(model) if p.device != CPU] == []
    batch = batch_for(model, labels=True)
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model, lr=1e-2))
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        inlay.check_training(model, optimizer)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert [p for p in own(model) if p.device != CPU or p.grad is None] == []


def test_adapters_offloaded_with_their_model_come_back_to_learn() -> None:
    """accelerate gives every call fresh copies of offloaded tensors: their gradients would go nowhere."""
    model = adapted("llama", "lora(rank=2) + prefix_tuning(length=3, hidden=16)")
    batch = batch_for(model, labels=True)
    expected = logits(model, batch)
    offload(model)
    assert [p for p in own(model) if not p.is_meta] == []
    model(**batch).loss.backward()
    with pytest.raises(TrainingError, match=r"tensors are offloaded(.|\n)*default/lora: .*\(13 in all\)"):
        inlay.check_training(model)
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    assert model.lm_head.weight.is_meta
    assert distance(logits(model, batch), expected) < CLOSE
    model(**batch).loss.backward()
    inlay.check_training(model, optimizer)


def test_offloaded_adapters_are_saved_with_their_values(tmp_path: Path) -> None:
    model = adapted("llama")
    batch = batch_for(model)
    expected = logits(model, batch)
    offload(model)
    inlay.save(model, tmp_path)
    fresh = lively("llama")
    inlay.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, batch), expected)


def test_a_checkpoint_loads_into_an_offloaded_model(tmp_path: Path) -> None:
    model = adapted("llama")
    batch = batch_for(model)
    expected = logits(model, batch)
    inlay.save(model, tmp_path)
    fresh = lively("llama")
    offload(fresh)
    inlay.load(fresh, tmp_path)  # a warning about another base would be an error here
    assert distance(logits(fresh, batch), expected) < CLOSE


def test_save_pretrained_of_an_offloaded_model_writes_the_base(tmp_path: Path) -> None:
    model = adapted("llama", offload=offload)
    batch = batch_for(model)
    model.save_pretrained(tmp_path)
    fresh = type(model)._inlay_base.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(fresh, batch), logits(lively("llama"), batch))
    inlay.load(fresh, tmp_path)
    assert distance(logits(fresh, batch), logits(model, batch)) < CLOSE


@pytest.mark.parametrize("when", ["before", "after"])
def test_merging_writes_through_the_offload(when: str) -> None:
    model = adapted("llama", MERGING, offload=offload if when == "before" else None)
    batch = batch_for(model)
    unmerged = logits(model, batch)
    if when == "after":
        offload(model)
    inlay.merge(model)
    assert distance(logits(model, batch), unmerged) < 1e-5
    with torch.no_grad():
        assert not any(port.program for port in model._inlay_state.ports)
    inlay.unmerge(model)
    assert distance(logits(model, batch), unmerged) < CLOSE
    inlay.detach(model)
    assert torch.equal(logits(model, batch), logits(lively("llama"), batch))


def test_merging_for_good_into_an_offloaded_model_leaves_a_plain_one() -> None:
    model = adapted("llama", MERGING, offload=offload)
    batch = batch_for(model)
    unmerged = logits(model, batch)
    inlay.merge(model, undo=False)
    assert distance(logits(model, batch), unmerged) < 1e-5
    assert "_inlay_state" not in model.__dict__
    remove_hook_from_module(model, recurse=True)
    assert distance(logits(model, batch), unmerged) < 1e-5


def test_merging_into_an_offloaded_tied_head_is_refused() -> None:
    """The offload keeps one tensor under two names; the storage says so, the names don't."""
    model = adapted("gpt2", "lora(rank=2, targets=['lm_head'])", offload=offload)
    with pytest.raises(CannotMerge, match=r"lm_head: its storage is tied to transformer\.wte\.weight"):
        inlay.merge(model)


def dispatch(model: nn.Module, folder: Path) -> None:
    device_map = {"inlay": "cpu"} if hasattr(model, "inlay") else {}  # accelerate wants every parameter named
    device_map |= {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu",
                  "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_dispatched_to_cpu_and_disk(when: str, tmp_path: Path) -> None:
    model = adapted("llama", offload=(lambda m: dispatch(m, tmp_path)) if when == "before" else None)
    if when == "after":
        dispatch(model, tmp_path)
    assert model.lm_head.weight.is_meta
    batch = batch_for(model)
    assert distance(logits(model, batch), logits(adapted("llama"), batch)) < CLOSE
    inlay.detach(model)
    assert torch.equal(logits(model, batch), logits(lively("llama"), batch))


def test_merging_into_a_weight_on_disk_is_refused(tmp_path: Path) -> None:
    model = adapted("llama", MERGING, offload=lambda m: dispatch(m, tmp_path))
    batch = batch_for(model)
    before = logits(model, batch)
    with pytest.raises(CannotMerge, match=r"layers\.0.*: its weight is offloaded to disk"):
        inlay.merge(model)
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("order", ["unhook then detach", "detach then unhook"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_may_go_in_any_order(when: str, order: str) -> None:
    model = adapted("llama", offload=offload if when == "before" else None)
    batch = batch_for(model)
    if when == "after":
        offload(model)
    expected = logits(model, batch)
    if order == "unhook then detach":
        remove_hook_from_module(model, recurse=True)
        assert distance(logits(model, batch), expected) < CLOSE
        inlay.detach(model)
    else:
        inlay.detach(model)
        remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model, batch), logits(lively("llama"), batch))
    inlay.attach(model, STACK, seed=3)  # what accelerate leaves on the instances is no foreign patch
    shake(model)
    assert distance(logits(model, batch), expected) < CLOSE


def test_routes_and_generation_work_on_an_offloaded_model() -> None:
    model, plain = adapted("llama", offload=offload), adapted("llama")
    batch = batch_for(model)
    with inlay.route(model, ["default", None, "default/lora"]):
        found = logits(model, batch)
    with inlay.route(plain, ["default", None, "default/lora"]):
        assert distance(found, logits(plain, batch)) < CLOSE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(**batch, **options), plain.generate(**batch, **options))


def test_a_patch_under_the_hook_is_refused_by_name() -> None:
    model = lively("llama")
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = lambda x: x
    offload(model)
    with pytest.raises(
        AttachError, match=r"forward has been replaced(.|\n)*layers\.0\.self_attn\.q_proj\.forward is"
    ):
        inlay.attach(model, "lora(rank=2)")
    assert not hasattr(model, "_inlay_state")


@pytest.fixture
def accelerator() -> Any:
    """Mixed precision in one process; accelerate's state is forgotten afterwards."""
    from accelerate.state import AcceleratorState

    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_model_and_optimizer_prepared_for_mixed_precision_are_known(accelerator: Any) -> None:
    model = adapted("llama", "lora(rank=2)").train()
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model, lr=1e-2))
    prepared, stepping = accelerator.prepare(model, optimizer)
    batch = batch_for(model, labels=True)
    losses = []
    for _ in range(3):
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        inlay.check_training(prepared, stepping)
        stepping.step()
        stepping.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert inlay.summary(prepared).trainable == sum(p.numel() for p in own(model))
    inlay.attach(prepared, "ia3()", name="second")
    inlay.detach(prepared, "second")


def test_the_last_adapter_goes_only_once_its_models_forward_is_unwrapped(accelerator: Any) -> None:
    """The wrapper would call the forward of a class that the model no longer has."""
    model = adapted("llama", "lora(rank=2)")
    batch = batch_for(model)
    accelerator.prepare(model)
    saw = r"LlamaForCausalLM\.forward is convert_outputs_to_fp32"
    with pytest.raises(AttachError, match=rf"forward was wrapped after the adapter was attached(.|\n)*{saw}"):
        inlay.detach(model)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    inlay.detach(model)
    assert torch.equal(logits(model, batch), logits(lively("llama"), batch))
