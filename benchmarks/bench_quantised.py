"""What merging into a quantised layer costs, by kind and by the size of the change.

One layer of 1024 × 1024, entries N(0, 1/1024), with a LoRA of rank 8 whose change is 1, 3 or 10 % of the
weight. "plain" is the weight made plain and merged into, "few bits" the merged weight in the same bits
again: how far the output of the layer is then from that of the layer with its adapter, as a share of what
the adapter does. "base" is what quantising the base cost in the first place, as a share of its output.
"""

from __future__ import annotations

import warnings

import torch
from common import report
from torch import Tensor, nn

import inlay
from inlay.stack import need_state
from inlay.testing.quantised import few_bits, kinds

SIZE, RANK, CHANGES = 1024, 8, (0.01, 0.03, 0.1)


def adapted(kind: str, change: float) -> tuple[nn.Module, nn.Linear]:
    """Return a model of one layer with its adapter, and the plain layer."""
    torch.manual_seed(0)
    plain = nn.Linear(SIZE, SIZE, bias=False)
    nn.init.normal_(plain.weight, std=SIZE**-0.5)
    layer = nn.Linear(SIZE, SIZE, bias=False)
    layer.weight = nn.Parameter(plain.weight.detach().clone())
    model = nn.Sequential(few_bits(layer, kind)).train()
    inlay.attach(model, f"lora(rank={RANK}, targets=['0'])", seed=0)
    down, up = (p for _, _, p in need_state(model).own_parameters())
    with torch.no_grad():
        up.normal_()
        up.mul_(change * plain.weight.norm() / (up @ down).norm())
    return model, plain


@torch.no_grad()
def measured(kind: str, change: float) -> dict[str, object]:
    model, plain = adapted(kind, change)
    x = torch.randn(256, SIZE)
    acting = model(x)
    with inlay.use(model):
        base = model(x)
    effect = (acting - base).norm()
    row: dict[str, object] = {"kind": kind, "change": f"{change:.0%}"}
    row["base"] = share(base - plain(x), plain(x).norm())
    for way, name in (("dequantise", "plain"), ("requantise", "few bits")):
        merged = inlay.merge(model, quantised=way)
        row[name] = share(model(x) - acting, effect)
        row[f"{name}, of the weight"] = f"{merged.sites[0].noise:.1e}"
        inlay.unmerge(model)
    return row


def share(difference: Tensor, whole: Tensor) -> str:
    return f"{float(difference.norm() / whole):.1e}"


def main() -> None:
    warnings.filterwarnings("ignore", "MatMul8bitLt")
    report("quantised", [measured(kind, change) for kind in kinds() for change in CHANGES])


if __name__ == "__main__":
    main()
