"""One storage under several names, and one module under several paths: adapters there, and merging them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import CannotMerge, TargetError, TrainingError
from inlay.testing.models import batch_for
from inlay.testing.snapshots import differences, snapshot
from inlay.testing.tools import distance, lively, shake

pytest.importorskip("transformers")

CLOSE = 1e-5
NAMES = {"gpt2": ("transformer.wte", "lm_head"), "qwen": ("model.embed_tokens", "lm_head")}
TIED = pytest.mark.parametrize("family", list(NAMES))


def logits(model: nn.Module, batch: dict[str, Any] | None = None) -> Tensor:
    with torch.no_grad():
        return model(**(batch or batch_for(model))).logits


def states(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the first hidden states (what the embedding gave) and the logits."""
    with torch.no_grad():
        out = model(**batch_for(model), output_hidden_states=True)
    return out.hidden_states[0], out.logits


@TIED
def test_an_adapter_on_one_of_two_tied_layers_leaves_the_other_alone(family: str) -> None:
    embedding, head = NAMES[family]
    base = lively(family)
    assert base.get_submodule(embedding).weight is base.get_submodule(head).weight
    first, last = states(base)
    on_head, on_embedding, on_both = (lively(family) for _ in range(3))
    inlay.attach(on_head, f"lora(rank=4, targets=['{head}'])", seed=1)
    inlay.attach(on_embedding, f"lora(rank=4, targets=['{embedding}'])", seed=1)
    inlay.attach(on_both, f"lora(rank=4, targets=['{head}']) + trained(targets=['{embedding}'])", seed=1)
    for model in (on_head, on_embedding, on_both):
        shake(model)
    assert torch.equal(states(on_head)[0], first)
    assert distance(states(on_head)[1], last) > 0.05
    assert distance(states(on_embedding)[0], first) > 0.05
    assert distance(states(on_both)[0], first) > 0.05
    with inlay.use(on_both, "default/lora"):
        assert torch.equal(states(on_both)[0], first)
    for model in (on_head, on_embedding, on_both):
        inlay.detach(model)
        assert model.get_submodule(embedding).weight is model.get_submodule(head).weight
        assert torch.equal(logits(model), last)


@TIED
@pytest.mark.parametrize("which", ["embedding", "head"])
@pytest.mark.parametrize(
    "stack", ["lora(rank=4, targets=['{}'])", "trained(targets=['{}'])"], ids=["lora", "trained"]
)
def test_merging_into_one_of_two_tied_layers_is_refused(family: str, which: str, stack: str) -> None:
    names = NAMES[family]
    here, other = names if which == "embedding" else names[::-1]
    model = lively(family)
    inlay.attach(model, stack.format(here))
    shake(model)
    before, adapted = snapshot(model), logits(model)
    with pytest.raises(CannotMerge, match=rf"{here}: its storage is tied to {other}\.weight"):
        inlay.merge(model)
    assert differences(before, model) == []
    assert torch.equal(logits(model), adapted)
    with pytest.raises(CannotMerge, match="its storage is tied to"):
        inlay.merge(model, undo=False)
    assert differences(before, model) == []


@TIED
def test_what_is_not_tied_merges_beside_it(family: str) -> None:
    model = lively(family)
    _, head = NAMES[family]
    inlay.attach(model, f"lora(rank=4, targets=['{head}']).named('head') + lora(rank=4, targets=['query'])")
    shake(model)
    adapted = logits(model)
    inlay.merge(model, parts=["default/lora"])
    assert distance(logits(model), adapted) < CLOSE
    with inlay.use(model, "default/lora"):
        assert distance(logits(model), adapted) > 0.05


@TIED
def test_the_plan_names_what_is_tied(family: str) -> None:
    embedding, head = NAMES[family]
    plan = inlay.plan(lively(family), f"lora(targets=['{head}'])")
    assert plan.tied == [f"{embedding}.weight = {head}.weight"]
    assert f"tied storage: {embedding}.weight = {head}.weight" in str(plan)


@TIED
def test_a_trained_head_of_a_tied_model_survives_the_disk(family: str, tmp_path: Path) -> None:
    """The base's files hold one tied tensor; the trained head is the adapter's own, and comes back so."""
    model = lively(family)
    inlay.attach(model, "lora(rank=2)", train=("head",))
    shake(model)
    model.save_pretrained(tmp_path)
    fresh = type(model)._inlay_base.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(fresh), logits(lively(family)))
    inlay.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))


class Views(nn.Module):
    """Two layers whose weights are different parameters over one storage: no name and no identity tells."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 12, bias=False)
        self.first.weight, self.second.weight = nn.Parameter(whole[:8]), nn.Parameter(whole)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_sharing_is_found_by_storage() -> None:
    model = Views()
    inlay.attach(model, "lora(rank=2, targets=['first'])")
    shake(model)
    with pytest.raises(CannotMerge, match=r"first: its storage is tied to second\.weight"):
        inlay.merge(model)


class Twice(nn.Module):
    """One layer under two paths, called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.mix = nn.Linear(8, 16), nn.Linear(16, 16)
        self.again = self.mix
        self.blocks = nn.ModuleList([self.mix, nn.Linear(16, 16), self.mix])

    def forward(self, input: Tensor) -> Tensor:
        h = torch.tanh(self.mix(torch.tanh(self.again(self.up(input)))))
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return h


def inputs() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


LORA = "lora(rank=4, targets=['mix'])"
STACKS = [LORA, "ia3(targets=['mix'])", f"{LORA} + dora(rank=2, targets=['mix'])", "trained(targets=['mix'])"]


@pytest.mark.parametrize("stack", STACKS)
def test_an_adapter_acts_wherever_its_module_is_called(stack: str) -> None:
    model, plain = Twice(), Twice()
    before, base = snapshot(model), plain(inputs())
    inlay.attach(model, stack, seed=1)
    shake(model)
    folded = read_back(model, plain, stack)
    assert distance(model(inputs()), folded) < CLOSE
    assert distance(folded, base) > 0.05
    model(inputs()).sum().backward()
    inlay.check_training(model)
    model.zero_grad()
    inlay.detach(model)
    assert differences(before, model) == []


def read_back(model: Twice, plain: Twice, stack: str) -> Tensor:
    """Return the output of `plain` with its one `mix` layer replaced by what the adapted one computes."""
    with torch.no_grad():
        bias = model.mix(torch.zeros(1, 16))[0]
        plain.mix.weight.copy_((model.mix(torch.eye(16)) - bias).T)
        plain.mix.bias.copy_(bias)
        return plain(inputs())


@pytest.mark.parametrize("undo", [True, False])
@pytest.mark.parametrize("stack", STACKS)
def test_a_module_under_several_paths_is_merged_once(stack: str, undo: bool) -> None:
    model = Twice()
    base = model(inputs()).detach()
    inlay.attach(model, stack, seed=1)
    shake(model)
    adapted = model(inputs()).detach()
    weight = model.mix.weight.detach().clone()
    report = inlay.merge(model, undo=undo)
    assert [site.site for site in report.sites] == ["mix"]
    assert distance(model.mix.weight, weight) > 0.01
    assert distance(model(inputs()), adapted) < CLOSE
    if undo:
        inlay.unmerge(model)
        assert torch.equal(model.mix.weight, weight)
        inlay.detach(model)
        assert torch.equal(model(inputs()), base)
    assert type(model.mix) is nn.Linear


def test_a_base_state_dict_loads_strictly_into_a_module_under_several_paths() -> None:
    model, other = Twice(), Twice()
    with torch.no_grad():
        other.mix.weight.mul_(2)
    inlay.attach(model, STACKS[0], seed=1)
    shake(model)
    own = copy.deepcopy({k: v for k, v in model.state_dict().items() if ".inlay." in k})
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(model.mix.weight, other.mix.weight)
    assert len(own) == 8  # two tensors under four paths
    assert all(torch.equal(model.state_dict()[k], v) for k, v in own.items())


def test_an_adapter_on_a_module_under_several_paths_survives_the_disk(tmp_path: Path) -> None:
    model, fresh = Twice(), Twice()
    inlay.attach(model, STACKS[0], seed=1)
    shake(model)
    inlay.save(model, tmp_path)
    assert inlay.load(fresh, tmp_path) == 2
    assert torch.equal(fresh(inputs()), model(inputs()))


def test_a_second_path_of_a_module_is_no_target_of_its_own() -> None:
    with pytest.raises(TargetError, match="the target 'again' matches nothing"):
        inlay.attach(Twice(), "lora(rank=2, targets=['again'])")


def test_the_embedding_role_finds_the_layers_that_run() -> None:
    """T5 ties three embedding modules; `shared` itself is never called."""
    model = lively("t5")
    assert model.shared is not model.encoder.embed_tokens
    assert model.shared.weight is model.encoder.embed_tokens.weight
    with torch.no_grad():
        base = model(**batch_for(model), output_hidden_states=True)
        inlay.attach(model, "lora(rank=2, targets=['embedding'])")
        shake(model)
        out = model(**batch_for(model), output_hidden_states=True)
    for name in ("encoder_hidden_states", "decoder_hidden_states"):
        assert distance(out[name][0], base[name][0]) > 0.05


def test_an_adapter_on_a_layer_that_never_runs_is_noticed() -> None:
    model = lively("t5")
    inlay.attach(model, "lora(rank=2, targets=['shared'])")
    loss = model(**batch_for(model)).loss
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()
    with pytest.raises(TrainingError, match=r"got no gradient(.|\n)*shared\.inlay"):
        inlay.check_training(model)
