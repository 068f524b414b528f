"""What the anatomy shows, and how a user or a package corrects it."""

from __future__ import annotations

import importlib
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.anatomy import Anatomy
from inlay.anatomy.corrections import GROUP
from inlay.errors import ConfigError, RegistryError, TargetError
from inlay.testing.tools import distance, shake

transformers = pytest.importorskip("transformers")


class Mixer(nn.Module):
    """A layer whose names and fused layout nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta, self.gamma = nn.Linear(32, 48), nn.Linear(32, 32), nn.Linear(32, 32)
        self.w_in, self.w_out = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.alpha(x).split((32, 8, 8), -1)
        mixed = torch.sigmoid(query + (key * value).sum(-1, keepdim=True))
        x = x + self.beta(mixed)
        result: Tensor = x + self.w_out(torch.relu(self.w_in(x)))
        return result


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mixer(), Mixer()])

    def forward(self, input: Tensor) -> Tensor:
        for layer in self.layers:
            input = layer(input)
        return input


ROLES: dict[str, Any] = {
    "layers.?": "attention",
    "*.alpha": {"query": 32, "key": 8, "value": 8},
    "*.beta": "output",
    "w_in": "up",
    "w_out": "down",
}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=4, vocab_size=50)
    made: nn.Module = transformers.GPT2LMHeadModel(config)
    return made


def test_the_tree_says_what_was_found_and_writes_equal_blocks_once() -> None:
    text = str(inlay.anatomy(gpt2()))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "GPT2LMHeadModel"
    assert "0 to 2 GPT2Block block" in lines
    assert "c_attn Conv1D 32 → 96 query [0:32] · key [32:64] · value [64:96]" in lines
    assert "attn GPT2Attention attention: 4 heads of 8" in lines
    assert "wte Embedding 32 embedding" in lines
    assert "lm_head Linear 32 → 50 head" in lines
    assert sum("c_attn" in line for line in lines) == 1


def test_the_tree_leaves_an_adapters_own_modules_out() -> None:
    model = gpt2()
    before = str(inlay.anatomy(model))
    inlay.attach(model, "lora(rank=2)")
    assert str(inlay.anatomy(model)) == before


def test_experts_stand_in_one_line() -> None:
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=5,
    )  # fmt: skip
    lines = str(inlay.anatomy(transformers.MixtralForCausalLM(config))).splitlines()
    assert any(
        line.split() == ["experts", "MixtralExperts", "gate,", "up,", "down", "of", "5", "experts"]
        for line in lines
    )
    assert any("4 heads of 8, 2 for keys" in line for line in lines)


def test_only_a_module_has_an_anatomy() -> None:
    with pytest.raises(ConfigError, match="anatomy needs a torch module"):
        inlay.anatomy("gpt2")  # type: ignore[arg-type]


def test_a_user_says_what_structure_does_not() -> None:
    model, x = Strange(), torch.randn(2, 4, 32)
    base = model(x).detach()
    with pytest.raises(TargetError, match="has no 'query'"):
        inlay.plan(model, "lora(rank=2)")
    found = inlay.anatomy(model).override(ROLES)
    assert {(s.role, s.layer) for s in found.leaves if s.role} == {
        (role, i) for role in ("query", "key", "value", "output", "up", "down") for i in (0, 1)}  # fmt: skip
    inlay.attach(model, "lora(rank=2, targets=['query', 'down'])")
    shake(model)
    adapted = model(x)
    assert distance(adapted, base) > 1e-3
    inlay.merge(model, undo=False)
    torch.testing.assert_close(model(x), adapted)


def test_a_correction_stays_with_the_model_and_its_copies(tmp_path: Path) -> None:
    model = Strange()
    inlay.anatomy(model).override(ROLES)
    inlay.attach(model, "lora(rank=2)")
    inlay.save(model, tmp_path)
    again = pickle.loads(pickle.dumps(model))
    inlay.detach(again)
    inlay.load(again, tmp_path)
    assert inlay.plan(again, "lora(rank=2)").parts[0].kinds == {"query": 2, "value": 2}


def test_a_fused_projection_of_unknown_slices_says_so() -> None:
    class OddAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.head_dim = 4, 8
            self.qkv, self.proj = nn.Linear(32, 100), nn.Linear(32, 32)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"attn": OddAttention()})])

    model = Odd()
    with pytest.raises(TargetError, match="the slices of a fused projection are not known") as caught:
        inlay.plan(model, "lora(targets=['query'])")
    assert "layers.0.attn.qkv has 100 outputs, of 32 inputs" in str(caught.value)
    inlay.anatomy(model).override({"*.qkv": {"query": 32, "key": 32, "value": 36}})
    assert inlay.plan(model, "lora(targets=['value'])").parts[0].kinds == {"value": 1}


def test_a_role_can_be_taken_away() -> None:
    model = gpt2()
    inlay.anatomy(model).override({"h.1.attn.c_attn": ""})
    assert inlay.plan(model, "lora").parts[0].kinds == {"query": 2, "value": 2}


@pytest.mark.parametrize(
    ("roles", "says", "saw"),
    [
        (["query"], "roles are told as a mapping", "['query']"),
        ({"*.c_attn": "qurey"}, "'qurey' is no role a layer can be told to have", "'*.c_attn'"),
        ({"*.c_attn": {"query": 32, "keys": 64}}, "'keys' is no role", "'*.c_attn'"),
        ({3: "query"}, "3 is no role a layer can be told to have", "override: 3"),
        ({"*.c_attn": {"query": 0}}, "slices are told by their number of outputs", "{'query': 0}"),
        ({"*.attention": "query"}, "a correction names no module of this GPT2LMHeadModel", "'*.attention'"),
        ({"*.c_attn": {"query": 32, "key": 32}}, "the slices do not make up the layer", "has 96 outputs"),
    ],
)
def test_a_wrong_correction_is_refused_and_nothing_kept(roles: Any, says: str, saw: str) -> None:
    model = gpt2()
    before = dict(model.__dict__)
    with pytest.raises(ConfigError, match=says) as caught:
        inlay.anatomy(model).override(roles)
    assert saw in str(caught.value)
    assert model.__dict__ == before


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Install packages, as files on the path, that describe architectures."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(package: str, entry: str, body: str) -> None:
        (tmp_path / f"{package}.py").write_text(body)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entry}\n")
        importlib.invalidate_caches()

    yield install
    importlib.invalidate_caches()


def test_a_package_describes_an_architecture(described: Any) -> None:
    described("strange_roles", "Strange = strange_roles:ROLES", f"ROLES = {ROLES!r}\n")
    assert inlay.plan(Strange(), "lora").parts[0].kinds == {"query": 2, "value": 2}
    assert "query" in str(inlay.anatomy(Strange()))
    assert inlay.plan(gpt2(), "lora").parts[0].kinds == {"query": 3, "value": 3}


def test_two_packages_that_describe_one_architecture_are_refused(described: Any) -> None:
    for package in ("first_roles", "second_roles"):
        described(package, f"Strange = {package}:ROLES", f"ROLES = {ROLES!r}\n")
    with pytest.raises(
        RegistryError, match="the architecture 'Strange' is described more than once"
    ) as caught:
        Anatomy(Strange())
    assert "first_roles:ROLES, second_roles:ROLES" in str(caught.value)


def test_a_wrong_description_names_its_package(described: Any) -> None:
    described("wrong_roles", "Strange = wrong_roles:ROLES", "ROLES = {'*.alpha': 'first'}\n")
    with pytest.raises(ConfigError, match="'first' is no role") as caught:
        Anatomy(Strange())
    assert "wrong_roles:ROLES" in str(caught.value)


def test_a_70b_model_on_the_meta_device_takes_a_second_and_no_memory() -> None:
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) > 69e9
    found, attached = [], []
    for _ in range(3):  # the best of three: other work on the machine makes some slower
        before = time.process_time()
        assert len(Anatomy(model).blocks) == 80
        found.append(time.process_time() - before)
        before = time.process_time()
        plan = inlay.attach(model, "lora(rank=8, targets=['linear'])")
        attached.append(time.process_time() - before)
        assert len(plan.parts[0].sites) == 560
        assert all(p.device.type == "meta" for p in model.parameters())
        inlay.detach(model)
    assert min(found) < 1
    assert min(attached) < 1
