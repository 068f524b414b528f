"""EVA: where the factors start, what counts as input, and how ranks are shared out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.stack import need_state
from inlay.testing.effects import output
from inlay.testing.layers import deltas_of, settled, watch
from inlay.testing.models import batch_for, build
from inlay.testing.tools import distance, shake
from inlay_lora import EVA, DoRA, LoRA
from inlay_lora.eva import shared_out

Batch = dict[str, Any]
ALL = ("query", "key", "value", "output", "up", "down")


def data_for(model: nn.Module, batches: int = 3, rows: int = 6) -> list[Batch]:
    return [batch_for(model, rows=rows, seed=seed, labels=True) for seed in range(batches)]


def eva(model: nn.Module, data: Any, method: type = LoRA, **settings: Any) -> dict[str, Any]:
    """Attach a method that starts from EVA, `settings` its own and EVA's; return its deltas by site."""
    own = {k: settings.pop(k) for k in ("rank", "targets", "alpha", "scaling") if k in settings}
    inlay.attach(model, method(**own, start=EVA(**settings)), data=data, seed=0)
    return deltas_of(model)


def read(model: nn.Module, path: str, batch: Batch) -> Tensor:
    """Return what the module at `path` reads (B, T, in)."""
    return watch(model, path, batch)[0]


def directions(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the first right singular vectors (count, in) of centred rows (..., in), and all their shares."""
    x = x.flatten(0, -2)
    centred = x.double() - x.double().mean(0)
    _, singular, found = torch.linalg.svd(centred, full_matrices=False)
    return found[:count], singular**2 / centred.square().sum()


# -- the start -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit"])
def test_the_output_is_the_base_s_at_the_start(family: str) -> None:
    model = build(family)
    data = data_for(model)
    base = output(model)
    deltas = eva(model, data, rank=3)
    assert torch.equal(output(model), base)
    assert all((d.up == 0).all() and (d.down != 0).any() for d in deltas.values())


def test_a_starts_at_the_principal_directions_of_what_each_layer_reads() -> None:
    """One batch, so that nothing is cut off before the end: exactly the SVD, padding left out."""
    model, plain = settled("bert"), settled("bert")
    batch = batch_for(model, rows=6)
    batch["attention_mask"] = torch.ones(6, 7)
    batch["attention_mask"][::2, 5:] = 0
    deltas = eva(model, [batch], rank=4, rho=1.0, targets=ALL)
    assert len(deltas) == 12
    for path, delta in deltas.items():
        expected, _ = directions(read(plain, path, batch)[batch["attention_mask"].bool()], 4)
        cosines = (delta.down.double() * expected).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(4).double(), atol=1e-4, rtol=0)
        torch.testing.assert_close(delta.down @ delta.down.T, torch.eye(4), atol=1e-4, rtol=0)


def test_a_fused_projection_s_slices_start_at_the_directions_of_their_common_input() -> None:
    model, plain = settled("gpt2"), settled("gpt2")
    data = data_for(model, batches=1)
    deltas = eva(model, data, rank=4, rho=1.0, targets=["query", "down"])
    for path, delta in deltas.items():
        expected, _ = directions(read(plain, path.removesuffix("[query]"), data[0]), 4)
        assert (delta.down.double() * expected).sum(1).abs().min() > 1 - 1e-4
    assert {d.down.shape[1] for d in deltas.values()} == {32, 128}


def test_the_padding_s_content_makes_no_difference() -> None:
    starts = []
    for filling in (3, 60):
        model = settled("bert")
        batch = batch_for(model, rows=6)
        batch["attention_mask"] = torch.ones(6, 7)
        batch["attention_mask"][:, 5:] = 0
        batch["input_ids"][:, 5:] = filling
        starts.append(eva(model, [batch], rank=3))
    for path, delta in starts[0].items():
        torch.testing.assert_close(delta.down, starts[1][path].down, atol=1e-4, rtol=0)


@pytest.mark.parametrize("label_mask", [True, False])
def test_tokens_without_a_label_are_left_out_if_asked(label_mask: bool) -> None:
    model, plain = settled("llama"), settled("llama")
    batch = batch_for(model, rows=6, length=9)
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    path = "model.layers.1.self_attn.q_proj"
    deltas = eva(model, [{**batch, "labels": labels}], rank=3, rho=1.0, label_mask=label_mask)
    x = read(plain, path, batch)
    counted = x[labels != -100] if label_mask else x
    expected, _ = directions(counted, 3)
    assert (deltas[path].down.double() * expected).sum(1).abs().min() > 1 - 1e-4


def test_each_side_of_an_encoder_decoder_has_its_own_mask() -> None:
    """Encoder and cross-attention keys read the source; the decoder's tokens count where they have labels."""
    model, plain = settled("t5"), settled("t5")
    batch = batch_for(model, rows=6)
    batch["attention_mask"] = torch.ones(6, 7)
    batch["attention_mask"][:, 4:] = 0
    batch["labels"][:, 5:] = -100
    deltas = eva(model, [batch], rank=3, rho=1.0, targets=["both.query", "both.value"])
    masks = {"source": batch["attention_mask"].bool(), "target": batch["labels"] != -100}
    for path, mask in {
        "encoder.block.1.layer.0.SelfAttention.q": "source",
        "decoder.block.1.layer.0.SelfAttention.q": "target",
        "decoder.block.1.layer.1.EncDecAttention.q": "target",
        "decoder.block.1.layer.1.EncDecAttention.v": "source",
    }.items():
        seen = read(plain, path, batch)[masks[mask]]
        expected, _ = directions(seen, 3)
        assert (deltas[path].down.double() * expected).sum(1).abs().min() > 1 - 1e-3, path


def test_whitening_divides_each_row_once_by_the_root_of_its_singular_value() -> None:
    """Query, key and value read the same: peft divides their common rows three times.

    The one batch is gone through twice, until nothing moves: σ is that of all tokens taken in.
    """
    plain, white = settled("bert"), settled("bert")
    data = data_for(plain, batches=1)
    one = eva(plain, data, rank=3, rho=1.0, targets=["query", "key", "value"])
    two = eva(white, data, rank=3, rho=1.0, targets=["query", "key", "value"], whiten=True)
    x = read(settled("bert"), "bert.encoder.layer.0.attention.self.query", data[0]).flatten(0, 1)
    singular = torch.linalg.svdvals(torch.cat([x, x]) - x.mean(0))[:3]
    for role in ("query", "key", "value"):
        path = f"bert.encoder.layer.0.attention.self.{role}"
        torch.testing.assert_close(two[path].down.norm(dim=1), singular**-0.5, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            two[path].down, one[path].down / singular.sqrt()[:, None], rtol=1e-4, atol=1e-5
        )


def test_layers_that_read_the_same_start_alike_up_to_their_ranks() -> None:
    model = settled("bert")
    deltas = eva(model, data_for(model), rank=2, targets=ALL)
    for layer in range(2):
        name = f"bert.encoder.layer.{layer}.attention.self"
        q, k, v = (deltas[f"{name}.{role}"].down for role in ("query", "key", "value"))
        least = min(len(q), len(k), len(v))
        assert least > 0
        assert torch.equal(q[:least], k[:least])
        assert torch.equal(q[:least], v[:least])


def test_other_adapters_and_dropout_play_no_part() -> None:
    plain, model = settled("bert"), settled("bert", hidden_dropout_prob=0.5)
    data = data_for(plain)
    expected = eva(plain, data, rank=3)
    inlay.attach(model, LoRA(rank=2, targets=list(ALL)), name="before")
    shake(model, size=2.0)
    model.train()
    inlay.attach(model, LoRA(rank=3, start=EVA()), name="fr", data=data)
    assert model.training
    for path, delta in deltas_of(model, "fr").items():
        assert torch.equal(delta.down, expected[path].down)


def test_dora_starts_there_too() -> None:
    model, plain = settled("bert"), settled("bert")
    data = data_for(model)
    base = output(model)
    dora, lora = (eva(m, data, kind, rank=3, targets=["query"]) for m, kind in ((model, DoRA), (plain, LoRA)))
    assert distance(output(model), base) < 1e-6
    assert all(torch.equal(dora[path].down, lora[path].down) for path in lora)


def test_embeddings_start_at_random_with_the_method_s_rank() -> None:
    model = build("llama")
    deltas = eva(model, data_for(model), rank=3, targets=["embedding", "query"])
    assert deltas["model.embed_tokens"].down.shape == (3, 64)
    assert (deltas["model.embed_tokens"].up != 0).all()


# -- ranks ---------------------------------------------------------------------------------------


def test_ranks_go_to_the_directions_that_explain_most() -> None:
    """One batch and rho = 8: every direction is known, so this is the definition itself."""
    model, plain = settled("bert"), settled("bert")
    data = data_for(model, batches=1, rows=12)
    deltas = eva(model, data, rank=4, rho=8.0, targets=ALL)
    paths = [site.name for site in need_state(model).placed[0].adapter.sites]
    shares = {path: directions(read(plain, path, data[0]), 1)[1][:32] for path in paths}
    line = sorted(((float(s), path) for path, own in shares.items() for s in own), reverse=True)[
        : 4 * len(paths)
    ]
    expected = {path: sum(p == path for _, p in line) for path in paths}
    got = {path: len(deltas[path].down) if path in deltas else 0 for path in paths}
    groups = {
        path: path.rsplit(".", 1)[0] if "self" in path else path for path in paths
    }  # ties share an input
    for group in set(groups.values()):
        own = [path for path in paths if groups[path] == group]
        assert sum(got[p] for p in own) == sum(expected[p] for p in own), group
        assert max(got[p] for p in own) - min(got[p] for p in own) <= 1
    assert sum(got.values()) == 4 * len(paths)
    assert len(set(got.values())) > 2


def test_shared_out_takes_the_largest_and_of_equal_ones_the_first() -> None:
    shares = {"a": torch.tensor([0.5, 0.1]), "b": torch.tensor([0.5, 0.4]), "c": torch.tensor([0.05])}
    assert shared_out(shares, 3) == {"a": 1, "b": 2, "c": 0}
    assert shared_out({"a": torch.tensor([0.3, 0.3]), "b": torch.tensor([0.3, 0.3])}, 3) == {"a": 2, "b": 1}
    assert shared_out(shares, 9) == {"a": 2, "b": 2, "c": 1}


@pytest.mark.parametrize("scaling", ["standard", "rsqrt"])
def test_s_is_the_same_whatever_a_layer_s_rank(scaling: str) -> None:
    model = settled("bert")
    deltas = eva(model, data_for(model), rank=3, alpha=6, scaling=scaling, targets=ALL)
    assert len({len(delta.down) for delta in deltas.values()}) > 1
    expected = 6 / 3 if scaling == "standard" else 6 / 3**0.5
    assert [delta.scale for delta in deltas.values()] == pytest.approx([expected] * len(deltas))


def test_rho_1_leaves_all_ranks_equal() -> None:
    model = settled("bert")
    deltas = eva(model, data_for(model), rank=3, rho=1.0, targets=ALL)
    assert {delta.down.shape[0] for delta in deltas.values()} == {3}


def test_the_parameters_are_those_of_the_ranks_that_were_shared_out() -> None:
    model = settled("bert")
    plan_before = inlay.plan(model, LoRA(rank=3, targets=list(ALL), start=EVA()))
    method = LoRA(rank=3, targets=list(ALL), start=EVA())
    report = inlay.attach(model, method, data=data_for(model))
    adapter = need_state(model).placed[0].adapter
    sizes = {site.name: site.in_features + site.out_features for site in adapter.sites}
    ranks = adapter.data["ranks"]
    assert sum(ranks.values()) == 3 * len(sizes)
    assert report.parameters == sum(ranks[name] * size for name, size in sizes.items())
    assert plan_before.parameters == sum(3 * size for size in sizes.values())  # a dry run sees no data
