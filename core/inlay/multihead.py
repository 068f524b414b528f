"""torch's own attention and encoder layers, which read the weights of their parts instead of calling them.

In `nn.MultiheadAttention` a change can act only as a change of its weights; the encoder layers'
shortcut for inference, which reads the weights of every layer inside, is not taken while adapted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from inlay.ports import Port
from inlay.sites import ModuleSite, Slice


def multihead_sites(
    name: str, module: nn.MultiheadAttention, layer: int | None, side: str, cross: bool
) -> Iterator[ModuleSite]:
    """Return query, key, value and output of one attention module called `name`."""
    width = module.embed_dim
    common: dict[str, Any] = {"module": module, "layer": layer, "side": side, "cross": cross}
    for number, role in enumerate(("query", "key", "value")):
        whole = module.in_proj_weight is not None
        yield ModuleSite(
            name=f"{name}[{role}]", role=role, layer_kind="linear",
            part=Slice(number * width, (number + 1) * width) if whole else None,
            weight_name="in_proj_weight" if whole else f"{role[0]}_proj_weight",
            bias_name="in_proj_bias" if whole else None, **common,
        )  # fmt: skip
    yield ModuleSite(name=f"{name}.out_proj", role="output", layer_kind="linear",
                     weight_name="out_proj.weight", bias_name="out_proj.bias", **common)  # fmt: skip


def takes_shortcuts(module: nn.Module) -> bool:
    """Return whether a module's forward may read the weights inside instead of calling what holds them."""
    return isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder)


class ShortcutPort(Port):
    """Keeps an encoder (layer) of torch on the path that calls its parts.

    Of padding it then gives what the layers compute there, where the shortcut gives zeros.
    """

    lasting = True
    handle: RemovableHandle | None = None
    nested = False

    def enter(self) -> None:
        if isinstance(self.module, nn.TransformerEncoder):
            self.nested = self.module.use_nested_tensor
            self.module.use_nested_tensor = False
        else:  # any hook keeps it from the shortcut
            self.handle = self.module.register_forward_hook(_nothing)

    def leave(self) -> None:
        if isinstance(self.module, nn.TransformerEncoder):
            self.module.use_nested_tensor = self.nested
        elif self.handle is not None:
            self.handle.remove()


def _nothing(module: nn.Module, args: Any, output: Any) -> None:
    """Stand in the way of the shortcut."""
