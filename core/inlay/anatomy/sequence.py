"""Where virtual tokens can enter a model: for each stack of blocks, a site, or the reason there is none.

In a causal decoder what the rows leave in the blocks depends on them alone, so they act as keys and
values. Elsewhere the rows run through the blocks, in front of the tokens. Either way the model must
say how it marks positions, so that the rows' are before the tokens'.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from inlay.anatomy.kinds import token_embedding
from inlay.hosts import own_class
from inlay.sites import AttentionSite, SequenceSite

if TYPE_CHECKING:
    from inlay.anatomy import Anatomy
    from inlay.anatomy.blocks import Block


class Unfit(Exception):  # noqa: N818 - no error: an answer
    """Why virtual tokens cannot enter a stack of blocks."""


def find(anatomy: Anatomy) -> tuple[list[SequenceSite], list[str]]:
    """Return the model's sequence sites, and for every other stack of blocks why it has none."""
    stacks: dict[str, list[Block]] = {}
    for block in anatomy.blocks:
        stacks.setdefault(block.name.rpartition(".")[0], []).append(block)
    encodes = any(block.side == "encoder" for block in anatomy.blocks)
    readers = [path for path, blocks in stacks.items() if encodes and blocks[0].side == "decoder"]
    sites: list[SequenceSite] = []
    reasons = [] if stacks else ["no repeated blocks with attention were found"]
    for path in (p for p in stacks if p not in readers):
        try:
            sites.append(_site(anatomy, path, stacks[path], readers))
        except Unfit as reason:
            reasons.append(f"{path or 'the blocks'}: {reason}")
    inner, causal = [site.module for site in sites], [site for site in sites if not site.blocks]
    staged = [s for s in sites if inner.count(s.module) > 1 or (s in causal and len(causal) > 1)]
    reasons += [f"{site.name}: its blocks come in stages" for site in staged]
    return [site for site in sites if site not in staged], reasons


def by_default(anatomy: Anatomy) -> list[SequenceSite]:
    """Return the sites that stand for the model's text, or for its patches if it reads no tokens."""
    sites = find(anatomy)[0]
    text = [site for site in sites if site.embedding is not None or site.reader is not None]
    return text if text or token_embedding(anatomy.model) is not None else sites


def _site(anatomy: Anatomy, path: str, blocks: list[Block], readers: list[str]) -> SequenceSite:
    stack, inner = anatomy.modules[path], _inner(anatomy, path)
    attentions = _attentions(anatomy, stack, blocks, inner)
    embedding = token_embedding(inner)
    causal = _is_causal(anatomy.model, attentions, reads=embedding is not None)
    table: nn.Module | None = None if embedding is None else _position_table(anatomy, stack, inner)
    rotary, relative = _named(inner, "rotary", "rope"), _named(inner, "relative")
    if not rotary and any(
        accepts(m, "position_embeddings") for m in (blocks[0].module, attentions[0].module)
    ):
        rotary = f"{path}, from outside"
    _need(not getattr(inner.config, "trigram_input", False), "its embeddings mix neighbouring tokens")
    if causal:
        _need(embedding is not None, "no table of tokens was found")
        _need(bool(rotary) != (table is not None), "its positions are neither rotary nor one table's")
        _need(not relative, f"its attention has relative positions ({relative})")
        scaled = accepts(blocks[0].module, "attention_scaling") or _scales_by_position(inner.config)
        _need(not scaled, "it scales queries by their absolute position")
        mixes = any(isinstance(m, nn.Conv1d) for m in stack.modules())
        _need(not mixes, "its blocks mix tokens by more than attention (a convolution, a state)")
    else:
        if rotary:
            _need(embedding is not None and table is None, f"it rotates by more than a position ({rotary})")
            table = _rotation(stack, inner)
        _need(_layerdrop(inner) == 0, f"it skips blocks at random (layerdrop={_layerdrop(inner)})")
        marked = (table is not None) != bool(relative) if embedding is not None else not relative
        _need(marked, "its positions are neither one table's nor relative to each token")
    entry = None if embedding is None else _entry(inner, embedding)
    reader = _reader(anatomy, inner, blocks, readers)
    owner, width = path.rpartition(".")[0], attentions[0].features
    return SequenceSite(
        name=f"{owner}.sequence".lstrip("."), module=inner, role="embedding", side=blocks[0].side,
        features=width if embedding is None else embedding.embedding_dim, attentions=tuple(attentions),
        embedding=embedding, entry=entry, positions=table, rotary=bool(rotary), reader=reader,
        blocks=() if causal else (blocks[0].module, blocks[-1].module),
    )  # fmt: skip


def _need(fits: bool, otherwise: str) -> None:
    if not fits:
        raise Unfit(otherwise)


def _inner(anatomy: Anatomy, path: str) -> nn.Module:
    """Return the transformers model that runs the blocks: the nearest one around their list."""
    while path:
        path = path.rpartition(".")[0]
        module = anatomy.modules[path]
        if hasattr(module, "save_pretrained") and hasattr(module, "config"):
            return module
    raise Unfit("no transformers model is around them")


def _attentions(anatomy: Anatomy, stack: nn.Module, blocks: list[Block], inner: Any) -> list[AttentionSite]:
    """Return the self-attention of each block; every block must have one, and run once."""
    from inlay.anatomy import uses_attention_interface

    here = {id(module) for block in blocks for _, module, _ in block.attentions}
    found = [site for site in anatomy.attentions if id(site.module) in here]
    own = [site for site in found if not site.cross]
    length = len(list(stack.children()))
    _need(
        len(own) == len(blocks) == length, f"{len(own)} of its {length} blocks have attention of a known kind"
    )
    _need(len(found) == len(own), "its blocks also read an encoder")
    old = next((s for s in own if not uses_attention_interface(s.module)), None)
    _need(old is None, "its attention does not go through transformers' attention interface")
    runs = getattr(inner.config, "num_hidden_layers", length)
    _need(not isinstance(runs, int) or runs <= length, f"its {length} blocks run {runs} times")
    return own


def _is_causal(model: Any, attentions: list[AttentionSite], *, reads: bool) -> bool:
    causal = {bool(getattr(site.module, "is_causal", False)) for site in attentions}
    _need(len(causal) == 1, "some of its blocks are causal, others not")
    writes = reads and not attentions[0].side and getattr(model, "can_generate", lambda: False)()
    _need(causal == {True} or not writes, "it generates, but its attention does not say it is causal")
    return causal.pop()


def _position_table(anatomy: Anatomy, stack: nn.Module, inner: Any) -> nn.Embedding | None:
    """Return the table of learned (or computed) positions beside the blocks, if there is just one."""
    inside = {id(m) for m in stack.modules()}
    found = [
        m for m in inner.modules()
        if isinstance(m, nn.Embedding) and id(m) not in inside and m in anatomy.names
        and ("position" in (leaf := anatomy.names[m].rpartition(".")[2]) or leaf == "wpe")
    ]  # fmt: skip
    _need(len(found) < 2, f"it has {len(found)} tables of positions")
    if not found:
        return None
    most = getattr(inner.config, "max_position_embeddings", None)
    fits = not isinstance(most, int) or 0 <= found[0].num_embeddings - most <= 4  # RoBERTa, OPT begin later
    _need(fits, f"its table of positions has {found[0].num_embeddings} rows for {most} positions")
    return found[0]


def _rotation(stack: nn.Module, inner: nn.Module) -> nn.Module:
    """Return the one module beside the blocks that makes of positions how far queries and keys turn."""
    inside = {id(m) for m in stack.modules()}
    found = [
        m for m in inner.modules()
        if "Rotary" in type(m).__name__ and id(m) not in inside and accepts(m, "position_ids")
    ]  # fmt: skip
    _need(len(found) == 1, "its queries and keys turn by more than one module")
    return found[0]


def _named(inner: nn.Module, *words: str) -> str:
    """Return the first module or parameter below `inner` whose name or class holds one of `words`."""
    kinds = ((name, f"{name.rpartition('.')[2]} {type(m).__name__}") for name, m in inner.named_modules())
    tensors = ((name, name.rpartition(".")[2]) for name, _ in inner.named_parameters())
    hits = (name for source in (kinds, tensors) for name, text in source
            if name and any(word in text.lower() for word in words))  # fmt: skip
    return next(hits, "")


def _scales_by_position(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    return bool(getattr(config, "attn_temperature_tuning", False) or "llama_4_scaling_beta" in rope)


def _layerdrop(inner: Any) -> float:
    values = (getattr(inner.config, name, 0.0) for name in ("layerdrop", "encoder_layerdrop"))
    return max((float(v) for v in values if isinstance(v, (int, float))), default=0.0)


def _entry(inner: nn.Module, embedding: nn.Module) -> nn.Module:
    """Return what turns embedded tokens into what the first block reads, up to that block at least."""
    for module in (inner, *inner.children()):
        if accepts(module, "inputs_embeds") and any(m is embedding for m in module.modules()):
            return module
    raise Unfit("it takes no embedded tokens (inputs_embeds)")


def _reader(anatomy: Anatomy, inner: nn.Module, blocks: list[Block], readers: list[str]) -> nn.Module | None:
    """Return the decoder that reads what these blocks give, if there is one."""
    if blocks[0].side != "encoder" or not readers:
        return None
    _need(len(readers) == 1, "several decoders read it")
    model: Any = anatomy.model
    _need(model.get_encoder() is inner, "it is a part of the encoder, not all of it")
    return _inner(anatomy, readers[0])


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether a module's own forward has an argument of that name."""
    kind = own_class(module)  # a host's own forward takes anything
    return argument in inspect.signature(kind.forward).parameters
