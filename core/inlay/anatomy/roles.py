"""What model authors call the layers of attention and feed-forward, and how they fuse them.

The tables hold names and layouts, no architectures but the few that use a name in another way than
all others do. A finding is used only if the shapes bear it out.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from inlay.sites import Slice

ATTENTION = {
    "query": ("q_proj", "query", "q", "q_lin", "q_attn", "query_proj", "q_head", "project_q", "Wq",
              "q_b_proj", "projection_query", "to_query", "to_q"),
    "key": ("k_proj", "key", "k", "k_lin", "key_proj", "k_head", "project_k", "Wk", "projection_key",
            "to_key", "to_k"),
    "value": ("v_proj", "value", "v", "v_lin", "value_proj", "v_head", "project_v", "Wv", "projection_value",
              "to_value", "to_v"),
    "output": ("o_proj", "out_proj", "o", "out_lin", "c_proj", "dense", "post_proj", "attention_out", "Wo",
               "proj", "projection", "attn_out", "to_out"),
}  # fmt: skip
FEED_FORWARD = {
    "gate": ("gate_proj", "wi_0", "w1", "w_0"),
    "up": ("up_proj", "fc1", "c_fc", "wi", "wi_1", "lin1", "fc_in", "dense_h_to_4h", "linear_1", "layer_1",
           "linear_fc1", "w3", "intermediate_dense", "dense1", "ffn", "input_linear", "linear1",
           "w_1", "intermediate"),
    "down": ("down_proj", "fc2", "wo", "lin2", "fc_out", "dense_4h_to_h", "linear_2", "layer_2", "linear_fc2",
             "w2", "output_dense", "dense2", "ffn_output", "output_linear", "linear2", "Wo", "c_proj",
             "w_out", "output"),
}  # fmt: skip
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
DIMS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")

Parts = list[tuple[str, Slice]]


def alias(leaf: str, names: dict[str, tuple[str, ...]]) -> str:
    """Return the role a layer's own name stands for, or ""."""
    return next((role for role, known in names.items() if leaf in known), "")


def of(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """Return the first of these numbers that an attention module, or its configuration, gives."""
    for source in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def heads_of(attention: nn.Module, width: int) -> tuple[int, int, int] | None:
    """Return (heads, key-value heads, size of a head), None where they are not told."""
    heads = of(attention, HEADS)
    if heads is None:
        return None
    return heads, of(attention, KV_HEADS) or heads, of(attention, DIMS) or width // heads


def run(*sizes: tuple[str, int], groups: int = 1) -> Parts:
    """Return slices that follow each other in each of `groups` groups."""
    found, at = [], 0
    for role, size in sizes:
        found.append((role, Slice(at, at + size, groups)))
        at += size
    return found


def side_by_side(attention: nn.Module, rows: int, width: int) -> Parts:
    """Queries, then keys, then values; fewer of the latter where they are shared among heads."""
    known = heads_of(attention, width)
    if known is not None:
        heads, shared, dim = known
        if (heads + 2 * shared) * dim == rows:
            return run(("query", heads * dim), ("key", shared * dim), ("value", shared * dim))
    if rows == 2 * width:  # GPT-2's cross-attention: its queries come from a layer of their own
        return run(("key", width), ("value", width))
    return run(("query", width), ("key", width), ("value", width)) if rows == 3 * width else []


def head_by_head(attention: nn.Module, rows: int, width: int) -> Parts:
    """Each head's query, key and value beside each other (GPT-NeoX, Bloom, Persimmon, DeBERTa)."""
    known = heads_of(attention, width)
    if known is None:
        return []
    heads, _, dim = known
    return run(("query", dim), ("key", dim), ("value", dim), groups=heads)


def falcon(attention: nn.Module, rows: int, width: int) -> Parts:
    """Falcon: as `head_by_head`; or one key and value for all heads; or for each group of heads."""
    known = heads_of(attention, width)
    if known is None:
        return []
    heads, shared, dim = known
    if getattr(attention, "new_decoder_architecture", False):
        return run(("query", heads // shared * dim), ("key", dim), ("value", dim), groups=shared)
    if getattr(attention, "multi_query", False):
        return run(("query", heads * dim), ("key", dim), ("value", dim))
    return head_by_head(attention, rows, width)


def big_code(attention: nn.Module, rows: int, width: int) -> Parts:
    """GPTBigCode: one key and value for all heads, or as `head_by_head`."""
    if getattr(attention, "multi_query", False):
        shared = (rows - width) // 2
        return run(("query", width), ("key", shared), ("value", shared))
    return head_by_head(attention, rows, width)


def codegen(attention: nn.Module, rows: int, width: int) -> Parts:
    """CodeGen: four groups of heads, each with its queries, values, keys."""
    return run(("query", width // 4), ("value", width // 4), ("key", width // 4), groups=4)


def latent(attention: nn.Module, rows: int, width: int) -> Parts:
    """Multi-head latent attention: what expands the latent gives each head's key and value."""
    heads, key, value = (of(attention, n) for n in (HEADS, ("qk_nope_head_dim",), ("v_head_dim",)))
    if heads is None or key is None or value is None:
        return []
    return run(("key", key), ("value", value), groups=heads)


Layout = Callable[[nn.Module, int, int], Parts]
FUSED: dict[str, Layout] = {
    "c_attn": side_by_side, "qkv_proj": side_by_side, "qkv": side_by_side, "Wqkv": side_by_side,
    "query_key_value": head_by_head, "in_proj": head_by_head, "kv_b_proj": latent,
}  # fmt: skip
OTHERWISE: dict[tuple[str, str], Layout] = {
    ("query_key_value", "falcon"): falcon,
    ("c_attn", "gpt_bigcode"): big_code,
    ("qkv_proj", "codegen"): codegen,
}
GATED = {"gate_up_proj": ("gate", "up"), "Wi": ("gate", "up")}  # two halves; the first is activated


def fused_parts(leaf: str, attention: nn.Module, rows: int, width: int) -> Parts:
    """Return the slices of a fused projection inside an attention module, none where they are not known.

    Slices that do not make up the layer's rows are no finding.
    """
    package = type(attention).__module__.rpartition(".")[0].rpartition(".")[2]
    layout = OTHERWISE.get((leaf, package), FUSED.get(leaf))
    parts = [] if layout is None else layout(attention, rows, width)
    return parts if sum(part.size for _, part in parts) == rows else []


def gated_parts(leaf: str, rows: int) -> Parts:
    """Return the two halves of a gated feed-forward's fused first layer."""
    names = GATED.get(leaf)
    return run(*((role, rows // 2) for role in names)) if names and rows % 2 == 0 else []


def is_attention(module: nn.Module) -> bool:
    """Return whether a module has queries, keys and values among its own children."""
    children = dict(module.named_children())
    if "kv_b_proj" in children or isinstance(module, nn.MultiheadAttention):
        return True  # latent attention, by whatever name; torch's own
    if "Attention" not in type(module).__name__ and "Attn" not in type(module).__name__:
        own = ATTENTION  # under another name, only the plainest names count
        return all(any(c in own[role][:4] for c in children) for role in ("query", "key", "value"))
    if any(leaf in children for leaf in FUSED):
        return True
    return all(any(c in ATTENTION[role] for c in children) for role in ("query", "key", "value"))
