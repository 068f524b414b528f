"""Models written in plain torch: its attention and encoder layers, convolutions, ViTs as timm writes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.anatomy import Anatomy
from inlay.errors import AttachError
from inlay.testing.tools import distance, shake


class Encoder(nn.Module):
    """A classifier on torch's encoder; every second layer norm first."""

    def __init__(self, norm_first: bool = False, bias: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True, norm_first=norm_first, bias=bias)
        self.embedding = nn.Embedding(50, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first and bias)
        self.head = nn.Linear(32, 3)

    def forward(self, input: Tensor, padding: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.encoder(self.embedding(input), src_key_padding_mask=padding)
        result: Tensor = self.head(hidden[:, 0])
        return result


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.both = nn.Transformer(32, 4, 2, 2, 48, 0.0, batch_first=True)

    def forward(self, input: Tensor) -> Tensor:
        x = self.embedding(input)
        result: Tensor = self.both(x, x[:, :4])
        return result


class Convolutions(nn.Module):
    """All kinds: groups, strides, dilation, another padding, a missing bias, one to three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(6, 8, 3, stride=2, padding=1, groups=2)
        self.c2 = nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")
        self.c3 = nn.Conv3d(1, 2, (1, 3, 3), padding="same", dilation=(1, 2, 2), bias=False)

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = self.c3(self.c2(self.c1(input)[:, None])[:, None])
        return result


class TimmAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 8
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        result: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 32))
        return result


class TimmBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(32), nn.LayerNorm(32), TimmAttention()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(32, 48), "fc2": nn.Linear(48, 32)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        result: Tensor = x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return result


class TimmViT(nn.Module):
    """As timm's VisionTransformer is built: blocks in a Sequential, a fused qkv, patches by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 8, stride=8)
        self.blocks = nn.Sequential(TimmBlock(), TimmBlock())
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, input: Tensor) -> Tensor:
        x = self.blocks(self.patch_embed(input).flatten(2).transpose(1, 2))
        result: Tensor = self.head(self.norm(x).mean(1))
        return result


def tokens() -> Tensor:
    return torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(0))


def out(model: nn.Module, *args: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(*args)
    return result


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_changes_as_its_weights_would(norm_first: bool, bias: bool) -> None:
    """Every adapted layer acts, with gradients and without: the inference shortcut would pass them by."""
    torch.manual_seed(0)
    model = Encoder(norm_first, bias).eval()
    base = out(model, tokens())
    inlay.attach(model, "lora(rank=2, targets=['linear'])")
    torch.testing.assert_close(out(model, tokens()), base, rtol=1e-4, atol=1e-5)
    shake(model)
    adapted = model(tokens())
    assert distance(adapted, base) > 1e-3
    torch.testing.assert_close(out(model, tokens()), adapted, rtol=1e-4, atol=1e-5)
    adapted.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    inlay.merge(model, undo=False)
    torch.testing.assert_close(out(model, tokens()), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_the_shortcut_is_back_after_detach() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = True
    base = out(model, tokens(), padding)
    inlay.attach(model, "lora(rank=2, targets=['up'])")
    assert model.encoder.use_nested_tensor is False
    torch.testing.assert_close(out(model, tokens(), padding), base, rtol=1e-4, atol=1e-5)
    inlay.detach(model)
    assert model.encoder.use_nested_tensor is True
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(out(model, tokens(), padding), base)


def test_sides_and_cross_attention_of_a_transformer_are_told_apart() -> None:
    sites = Anatomy(Translator()).leaves
    assert {(s.side, s.cross) for s in sites if s.role == "query"} == {
        ("encoder", False), ("decoder", False), ("decoder", True)}  # fmt: skip
    assert {s.side for s in sites if s.role == "down"} == {"encoder", "decoder"}


@pytest.mark.parametrize("kind", [Encoder, Translator])
def test_a_stack_of_other_methods_acts_too(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    base = out(model, tokens())
    around = "serial_adapter(rank=4, targets=['both.attention', 'both.ffn'])"
    inlay.attach(model, f"lora(rank=2) + {around} + bitfit + dora(rank=2)")
    shake(model)
    adapted = model(tokens())
    assert distance(adapted, base) > 1e-3
    adapted.square().sum().backward()
    still = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not still
    inlay.detach(model)
    assert torch.equal(out(model, tokens()), base)


def test_keys_and_values_of_other_widths_have_matrices_of_their_own() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.MultiheadAttention(32, 4, kdim=16, vdim=8, batch_first=True)])

        def forward(self, input: Tensor) -> Tensor:
            result: Tensor = self.layers[0](input, input[..., :16], input[..., :8])[0]
            return result

    torch.manual_seed(0)
    model, x = Cross().eval(), torch.randn(2, 5, 32)
    assert {s.role: s.in_features for s in Anatomy(model).leaves} == {
        "query": 32, "key": 16, "value": 8, "output": 32}  # fmt: skip
    inlay.attach(model, "lora(rank=2, targets=['linear'])")
    shake(model)
    adapted = out(model, x)
    inlay.merge(model, undo=False)
    torch.testing.assert_close(out(model, x), adapted, rtol=1e-4, atol=1e-5)


def test_what_has_no_weight_form_is_refused_in_attention() -> None:
    model = Encoder()
    with pytest.raises(AttachError, match="cannot act where only a layer's weights are read") as caught:
        inlay.attach(model, "lora(dropout=0.1, targets=['query'])")
    assert "encoder.layers.0.self_attn[query] of a MultiheadAttention: dropout=0.1" in str(caught.value)
    inlay.plan(model, "parallel_adapter(targets=['attention'])")  # around the whole of it anything can act


@pytest.mark.parametrize("method", ["lora(rank=2, targets={})", "ssf(targets={})", "trained(targets={})"])
def test_convolutions_of_every_kind(method: str) -> None:
    torch.manual_seed(0)
    model, x = Convolutions().eval(), torch.randn(3, 6, 16)
    base = out(model, x)
    inlay.attach(model, method.format("['c1', 'c2', 'c3']" if "ssf" not in method else "['c1', 'c2']"))
    shake(model)
    adapted = model(x)
    assert distance(adapted, base) > 1e-3
    adapted.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    inlay.merge(model)
    torch.testing.assert_close(out(model, x), adapted, rtol=1e-4, atol=1e-5)
    inlay.detach(model)
    assert torch.equal(out(model, x), base)


def test_lora_on_a_convolution_is_one_with_a_changed_kernel() -> None:
    """W'[o] = W[o] + s Σᵣ B[o, r] A[r], whatever the groups; written here without ours."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)).eval(),
        torch.randn(2, 4, 8, 8),
    )
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    plan = inlay.attach(model, "lora(rank=2, alpha=6.0, targets=['0'])")
    assert plan.parameters == 2 * (4 // 2 * 3 * 3 + 6)
    shake(model)
    named: dict[str, Any] = {
        n.rsplit(".", 1)[-1]: p.detach() for n, p in model.named_parameters() if ".inlay." in n
    }
    kernel = weight + 3.0 * torch.einsum("or,rihw->oihw", named["up"], named["down"])
    torch.testing.assert_close(out(model, x), F.conv2d(x, kernel, bias, 2, 1, groups=2), rtol=1e-4, atol=1e-5)


def test_a_vit_as_timm_writes_it() -> None:
    torch.manual_seed(0)
    model, x = TimmViT().eval(), torch.randn(2, 3, 16, 16)
    roles = {(s.role, s.layer) for s in Anatomy(model).leaves}
    every = ("query", "key", "value", "output", "up", "down", "norm")
    assert roles == {(r, i) for r in every for i in (0, 1)} | {
        ("embedding", None),
        ("norm", None),
        ("head", None),
    }
    base = out(model, x)
    inlay.attach(model, "lora(rank=2, targets=['linear', 'embedding']) + serial_adapter", train=("head",))
    shake(model)
    adapted = out(model, x)
    assert distance(adapted, base) > 1e-3
    inlay.merge(model, ["default/lora"])
    torch.testing.assert_close(out(model, x), adapted, rtol=1e-4, atol=1e-4)


def test_no_transformer_at_all() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    base = out(model, x)
    inlay.attach(model, "lora(rank=2, targets=['0', '2'])")
    shake(model)
    adapted = out(model, x)
    assert distance(adapted, base) > 1e-3
    inlay.merge(model, undo=False)
    torch.testing.assert_close(out(model, x), adapted)
    assert type(model) is nn.Sequential
