"""LoHa, LoKr, C3A and GraLoRA beside huggingface/peft: the same weights in; and where peft is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.testing.layers import deltas_of, settled
from inlay.testing.models import batch_for
from inlay.testing.tools import distance

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from layer_methods import LINEAR, acts, batch_of, logits, ours, own, same, theirs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")

NAMES = {
    "lokr_w1": "w1", "lokr_w1_a": "w1_up", "lokr_w1_b": "w1_down", "lokr_t2": "w2_core",
    "lokr_w2": "w2", "lokr_w2_a": "w2_up", "lokr_w2_b": "w2_down",
    "hada_w1_a": "up1", "hada_w1_b": "down1", "hada_w2_a": "up2", "hada_w2_b": "down2",
    "hada_t1": "core1", "hada_t2": "core2", "c3a_kernel": "kernel",
    "gralora_A": "down", "gralora_B": "up",
    "gralora_A_general": "hybrid_down", "gralora_B_general": "hybrid_up",
}  # fmt: skip
# What peft is told, what inlay is told; peft's other three know no Conv1D, so GPT-2 is GraLoRA's alone.
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "lokr": (peft.LoKrConfig, {"r": 2, "alpha": 5}, "lokr(rank=2, alpha=5, targets={})"),
    "lokr, both": (
        peft.LoKrConfig,
        {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4, "init_weights": "lycoris"},
        "lokr(rank=1, alpha=3, decompose_both=True, decompose_factor=4, zero='w2', targets={})",
    ),
    "lokr, whole": (peft.LoKrConfig, {"r": 8, "alpha": 8}, "lokr(targets={})"),
    "loha": (peft.LoHaConfig, {"r": 2, "alpha": 5}, "loha(rank=2, alpha=5, targets={})"),
    "loha, dense": (peft.LoHaConfig, {"r": 6, "alpha": 3}, "loha(rank=6, alpha=3, targets={})"),
    "c3a": (peft.C3AConfig, {"block_size": 8, "init_weights": "gaussian"}, "c3a(block_size=8, targets={})"),
    "gralora": (peft.GraloraConfig, {"r": 4, "alpha": 6}, "gralora(rank=4, alpha=6, targets={})"),
    "gralora, hybrid": (
        peft.GraloraConfig,
        {"r": 8, "alpha": 6, "gralora_k": 4, "hybrid_r": 3},
        "gralora(rank=8, alpha=6, k=4, hybrid_rank=3, targets={})",
    ),
}  # fmt: skip
PLACES = [(c, f) for c in CASES for f in ("llama", "bert", "gpt2") if f != "gpt2" or c.startswith("gralora")]
EVERYWHERE = pytest.mark.parametrize(("case", "family"), PLACES)


def renamed(model: nn.Module) -> dict[str, Tensor]:
    """Return peft's tensors under the names they have here."""
    found: dict[str, Tensor] = {}
    for name, tensor in own(model).items():
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        found[f"{path}.{NAMES[leaf]}"] = tensor
    return found


def pair(case: str, family: str) -> tuple[nn.Module, nn.Module]:
    kind, settings, stack = CASES[case]
    other = theirs(family, kind(target_modules=LINEAR[family], **settings))
    return other, ours(family, stack.format(LINEAR[family]), renamed(other))


def gradients_of(other: nn.Module, model: nn.Module, family: str) -> list[tuple[str, Tensor, Tensor]]:
    """Return (tensor, gradient here, gradient in peft) in float64."""
    for each in (other.double(), model.double()):
        each(**batch_of(family)).loss.backward()
    expected = {name: p.grad for name, p in renamed(other).items()}
    found = {f"{site}.{n}": p.grad for site, d in deltas_of(model).items() for n, p in d.named_parameters()}
    assert found.keys() == expected.keys()
    return [(name, found[name], expected[name]) for name in found]


@EVERYWHERE
def test_the_same_weights_give_the_same_logits(case: str, family: str) -> None:
    other, model = pair(case, family)
    batch = batch_of(family)
    assert case == "c3a" or acts(family, model)
    assert same(logits(model, batch), logits(other, batch))


@pytest.mark.parametrize(("case", "family"), [p for p in PLACES if p[0] != "c3a"])
def test_the_same_weights_get_the_same_gradients(case: str, family: str) -> None:
    for name, a, b in gradients_of(*pair(case, family), family):
        assert same(a, b), name


@EVERYWHERE
def test_merged_weights_are_the_same(case: str, family: str) -> None:
    other, model = pair(case, family)
    inlay.merge(model, undo=False)
    merged: nn.Module = other.merge_and_unload()
    assert model.state_dict().keys() == merged.state_dict().keys()
    plain = settled(family).state_dict()
    changed = [n for n, tensor in merged.state_dict().items() if not torch.equal(tensor, plain[n])]
    assert len(changed) == len(LINEAR[family]) * 2
    assert all(same(model.state_dict()[name], merged.state_dict()[name]) for name in plain)


def circulant(kernel: Tensor, columns: int) -> Tensor:
    """Return C3A's ΔW (out, in): entry (l, q) of block (i, j) is w_ij[(q − l) mod b] / in."""
    rows = [torch.cat([torch.stack([w.roll(l) for l in range(len(w))]) for w in row], 1) for row in kernel]
    return torch.cat(rows) / columns


def dense_gradients(family: str, kernels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of every kernel through the dense weights W + ΔW."""
    model = settled(family).double()
    free = {site: kernel.detach().clone().requires_grad_() for site, kernel in kernels.items()}
    weights = {}
    for site, kernel in free.items():
        layer: Any = model.get_submodule(site)
        weights[f"{site}.weight"] = layer.weight.detach() + circulant(kernel, layer.in_features)
    loss = torch.func.functional_call(model, weights, (), batch_of(family)).loss
    return dict(zip(free, torch.autograd.grad(loss, list(free.values())), strict=True))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_c3a_has_the_gradient_of_its_forward_where_peft_has_not(family: str) -> None:
    """peft's hand-written gradient of the input is a reversed correlation: layers below train on it."""
    other, model = pair("c3a", family)
    kernels = {site: delta.kernel.double() for site, delta in deltas_of(model).items()}
    right, wrong = dense_gradients(family, kernels), 0
    for name, a, b in gradients_of(other, model, family):
        expected = right[name.removesuffix(".kernel")]
        assert same(a, expected), name
        wrong += not same(b, expected)
    assert wrong > len(kernels) // 2


def test_c3a_input_gradient_of_one_layer() -> None:
    base = nn.Sequential(nn.Linear(16, 16, bias=False)).double()
    other = peft.get_peft_model(
        base, peft.C3AConfig(block_size=8, target_modules=["0"], init_weights="gaussian")
    )
    kernel = next(p for p in other.parameters() if p.requires_grad)
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).double()
    model[0].weight.data.copy_(
        next(p for n, p in other.named_parameters() if n.endswith("base_layer.weight"))
    )
    inlay.attach(model, "c3a(block_size=8, targets=['0'])")
    deltas_of(model)["0"].kernel.data.copy_(kernel.detach())
    x = torch.randn(
        3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    dense = model[0].weight.detach() + circulant(kernel.detach(), 16)
    outputs = [F.linear(x, dense), model(x), other(x)]
    assert distance(outputs[1], outputs[0]) < 1e-6
    assert distance(outputs[2], outputs[0]) < 1e-6
    right, here, there = (torch.autograd.grad((y * y.detach().sin()).sum(), x)[0] for y in outputs)
    assert distance(here, right) < 1e-6
    assert distance(there, right) > 0.02


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Conv2d(4, 6, 3, padding=1)
        self.one = nn.Conv1d(6, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 8, *) of x (B, 4, h, w)."""
        return self.one(self.two(x).tanh().flatten(2))


CONVOLUTIONS = {
    "lokr": (peft.LoKrConfig, "lokr(rank=1, alpha=2, effective_conv={}, targets=['one', 'two'])"),
    "loha": (peft.LoHaConfig, "loha(rank=1, alpha=2, effective_conv={}, targets=['one', 'two'])"),
}


@pytest.mark.parametrize(("method", "effective"), [("lokr", False), ("loha", False), ("loha", True)])
def test_convolutions(method: str, effective: bool) -> None:
    """The same output and merged weight, and the same gradient, but for LoHa's effective form.

    LoKr's effective form raises in peft on this torch: it views a tensor that is not contiguous.
    """
    kind, stack = CONVOLUTIONS[method]
    stack = stack.replace("rank=1", "rank=2") if method == "loha" else stack
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = Convolution().double()
        state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        rank = 2 if method == "loha" else 1
        config = kind(
            r=rank, alpha=2, use_effective_conv2d=effective, target_modules=["one", "two"], init_weights=False
        )
        other = peft.get_peft_model(base, config).double().eval()
    model = Convolution().double().eval()
    model.load_state_dict(state)
    inlay.attach(model, stack.format(effective))
    tensors = renamed(other)
    for site, delta in deltas_of(model).items():
        for name, parameter in delta.named_parameters():
            parameter.data.copy_(tensors[f"{site}.{name}"].detach().view(parameter.shape))
    assert distance(model(x), other(x)) < 1e-6
    for each in (model, other):
        each(x).square().sum().backward()
    wrong = set()
    for site, delta in deltas_of(model).items():
        for name, parameter in delta.named_parameters():
            if not same(parameter.grad, tensors[f"{site}.{name}"].grad.view(parameter.shape)):
                wrong.add(name)
    assert wrong == ({"up1", "up2"} if effective and method == "loha" else set())
    inlay.merge(model, undo=False)
    merged = other.merge_and_unload()
    assert all(distance(model.state_dict()[n], merged.state_dict()[n]) < 1e-6 for n in state)


def test_loha_effective_form_has_autograds_gradient_where_peft_has_not() -> None:
    """peft contracts the gradient of A1 with T2 and B2, and that of A2 with T1 and B1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 6, 3)).double()
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    inlay.attach(model, "loha(rank=2, alpha=2, effective_conv=True, init='normal', targets=['0'])", seed=0)
    (delta,) = deltas_of(model).values()
    with torch.no_grad():
        delta.up2.normal_(generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    free = {name: p.detach().clone().requires_grad_() for name, p in delta.named_parameters()}
    parts = [
        torch.einsum("ijkl,jr,ip->prkl", free[f"core{j}"], free[f"down{j}"], free[f"up{j}"]) for j in (1, 2)
    ]
    base: Any = model[0]
    y = F.conv2d(x, base.weight.detach() + parts[0] * parts[1], base.bias.detach())
    expected = torch.autograd.grad(y.square().sum(), list(free.values()))
    for (name, p), g in zip(delta.named_parameters(), expected, strict=True):
        assert p.grad is not None
        assert distance(p.grad, g) < 1e-9, name


def test_loha_rank_dropout_stays_finite_where_peft_divides_by_nothing_kept() -> None:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    config = peft.LoHaConfig(r=1, rank_dropout=0.9, target_modules=["0"], init_weights=False)
    other = peft.get_peft_model(nn.Sequential(nn.Linear(4, 2)), config).train()
    model = nn.Sequential(nn.Linear(4, 2)).train()
    inlay.attach(model, "loha(rank=1, rank_dropout=0.9, targets=['0'])")
    torch.manual_seed(0)
    assert any(bool(other(x).isnan().any()) for _ in range(20))
    assert not any(bool(model(x).isnan().any()) for _ in range(200))


def test_lokr_and_loha_act_on_gpt2_where_peft_refuses() -> None:
    with pytest.raises((TypeError, ValueError)):
        peft.get_peft_model(settled("gpt2"), peft.LoHaConfig(target_modules=["c_fc"]))
    model = settled("gpt2")
    inlay.attach(model, "loha(rank=2, targets=['c_fc']) + lokr(rank=2, targets=['c_fc'])")
    model(**batch_for(model, labels=True)).loss.backward()
    inlay.check_training(model)
