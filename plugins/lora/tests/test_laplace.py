"""Laplace-LoRA beside the exact Gauss-Newton matrix, dense algebra and finite differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import ConfigError
from inlay.testing.layers import deltas_of, settled
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, shake
from inlay_lora import Laplace, LoRA, LoRAFA, MoSLoRA, QALoRA, laplace
from inlay_lora.laplace import Directions
from inlay_lora.uses import matrices


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Softmax(nn.Module):
    """A linear classifier, all that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Output:
        return Output(self.layer(x))


def trained(method: Any = None, **changes: Any) -> nn.Module:
    model = settled("bert", num_labels=3, **changes)
    inlay.attach(model, method or LoRA(rank=2, alpha=4), name="fr", seed=0)
    shake(model)
    return model.double()


def batch(rows: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, 60, (rows, 6), generator=generator)}


def jacobian(model: nn.Module, name: str, call: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits (n, C) and their derivatives (n, C, o, i) by each matrix, one backward for each."""
    wanted = matrices(model, name)
    logits = model(**call).logits
    rows = [
        [
            torch.autograd.grad(logits[n, c], list(wanted.values()), retain_graph=True)
            for c in range(logits.shape[1])
        ]
        for n in range(len(logits))
    ]
    whole = {
        key: torch.stack([torch.stack([one[i] for one in row]) for row in rows])
        for i, key in enumerate(wanted)
    }
    return logits.detach(), whole


def fisher(logits: Tensor, whole: Tensor) -> Tensor:
    """Return Σ_n Jᵀ (diag p − p pᵀ) J of J (n, C, o, i), flattened row by row."""
    p, rows = logits.softmax(-1), whole.flatten(2)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("nca,ncd,ndb->ab", rows, inner, rows)


def test_with_one_sample_it_is_the_exact_gauss_newton_matrix() -> None:
    torch.manual_seed(0)
    model = Softmax()
    inlay.attach(model, LoRA(rank=2, targets=["layer"]), name="fr")
    shake(model)
    model.double()
    call = {"x": torch.randn(1, 6, dtype=torch.float64)}
    posterior = laplace(model, "fr", [call])
    logits, whole = jacobian(model, "fr", call)
    for key, curvature in posterior.curvatures.items():
        sides = [d.root.T @ d.root for d in (curvature.gives, curvature.reads)]
        assert distance(torch.kron(*sides), fisher(logits, whole[key])) < 1e-10


def test_factors_are_sums_over_samples_tokens_and_classes() -> None:
    """G = Σ g gᵀ with g = √p_c ∂ log p_c, Q = 1/N Σ a aᵀ: written out for one layer."""
    model = trained(LoRA(rank=2, alpha=4, targets=["classifier"]))
    calls = [batch(3, 1), batch(2, 2)]
    posterior = laplace(model, "fr", calls)
    delta: Any = next(iter(deltas_of(model, "fr").values()))
    seen: list[Tensor] = []
    handle = model.get_submodule("classifier").register_forward_pre_hook(
        lambda m, args: seen.append(args[0].detach())
    )
    p = torch.cat([model(**call).logits.softmax(-1).detach() for call in calls])
    handle.remove()
    x = torch.cat(seen)
    inner = torch.stack([torch.diag(row) - torch.outer(row, row) for row in p])
    up = 2 * delta.up.detach()
    expected = {
        "up": (inner.sum(0), 4 * (x @ delta.down.detach().T).T @ (x @ delta.down.detach().T) / 5),
        "down": (up.T @ inner.sum(0) @ up, x.T @ x / 5),
    }
    for key, curvature in posterior.curvatures.items():
        gives, reads = expected[key.rpartition(".")[2]]
        assert distance(curvature.gives.root.T @ curvature.gives.root, gives) < 1e-9
        assert distance(curvature.reads.root.T @ curvature.reads.root / 5, reads) < 1e-9


@pytest.mark.parametrize(
    "method", [LoRA(rank=2), MoSLoRA(rank=2), LoRAFA(rank=2), QALoRA(rank=2, group=4, targets=("query",))]
)
def test_the_predictive_is_the_dense_formula(method: Any) -> None:
    model = trained(method)
    posterior = laplace(model, "fr", [batch(4), batch(3, 1)])
    posterior.precision = 0.7
    call = batch(3, 5)
    mean, covariance = posterior.predict(call)
    whole = jacobian(model, "fr", call)[1] if method.id != "lora_fa" else uncorrected(model, call)[1]
    assert torch.equal(mean, model(**call).logits.detach())
    expected = torch.zeros(3, 3, 3, dtype=torch.float64)
    for key, curvature in posterior.curvatures.items():
        f = torch.kron(*(d.root.T @ d.root for d in (curvature.gives, curvature.reads))) / 7
        inverse = torch.linalg.inv(f + 0.7 * torch.eye(len(f), dtype=torch.float64))
        rows = whole[key].flatten(2)
        expected += rows @ inverse @ rows.mT
    assert distance(covariance, expected) < 1e-9
    assert torch.linalg.eigvalsh(covariance).min() >= 0
    assert torch.equal(covariance, covariance.mT)


def uncorrected(model: nn.Module, call: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the derivatives that are true: LoRA-FA's own gradient is another on purpose."""
    for delta in deltas_of(model, "fr").values():
        delta.corrected = False  # type: ignore[assignment]
    return jacobian(model, "fr", call)


def test_few_directions_with_as_many_as_there_are_is_the_whole() -> None:
    model = trained()
    calls = [batch(4), batch(3, 1)]
    whole, same = laplace(model, "fr", calls), laplace(model, "fr", calls, keep=32, whole=0)
    few = laplace(model, "fr", calls, keep=3, whole=16)
    assert {len(c.reads.root) for n, c in few.curvatures.items() if n.endswith(".down")} == {3}
    assert {len(c.gives.root) for n, c in few.curvatures.items() if n.endswith(".up")} == {3}
    assert distance(same.predict(batch(2)).covariance, whole.predict(batch(2)).covariance) < 1e-9
    assert 0 < distance(few.predict(batch(2)).covariance, whole.predict(batch(2)).covariance) < 0.5


def test_the_strongest_directions_are_found_batch_by_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    strengths = 2.0 ** -torch.arange(40, dtype=torch.float64)
    rows = torch.randn(300, 40, generator=generator, dtype=torch.float64) * strengths
    found = Directions(torch.empty(0, 40, dtype=torch.float64), 6)
    for batch_of_rows in rows.split(60):
        found.add(batch_of_rows)
    _, singular, vectors = torch.linalg.svd(rows)
    assert distance(found.values.sqrt(), singular[:6]) < 1e-3
    assert distance((found.vectors[:4] * vectors[:4]).sum(1).abs(), torch.ones(4)) < 1e-3
    assert distance(found.vectors @ found.vectors.T, torch.eye(6)) < 1e-9


def test_the_evidence_is_the_dense_formula_and_its_gradient_is_right() -> None:
    model = trained()
    posterior = laplace(model, "fr", [batch(4)])
    precision = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros((), dtype=torch.float64)
    for key, curvature in posterior.curvatures.items():
        f = torch.kron(*(d.root.T @ d.root for d in (curvature.gives, curvature.reads))) / 4
        squared = matrices(model, "fr")[key].detach().square().sum()
        determinant = torch.linalg.slogdet(f + 0.3 * torch.eye(len(f), dtype=torch.float64)).logabsdet
        expected -= (0.3 * squared + determinant - len(f) * precision.detach().log()) / 2
    assert distance(posterior.evidence(precision), expected) < 1e-9
    assert torch.autograd.gradcheck(posterior.evidence, precision)


def test_the_precision_is_where_the_evidence_is_largest() -> None:
    posterior = laplace(trained(), "fr", [batch(4)])
    best = posterior.choose_precision(steps=400, lr=0.03)
    around = [posterior.evidence(torch.tensor(best * f)) for f in (0.9, 1.0, 1.1)]
    assert around[1] > around[0]
    assert around[1] > around[2]


def test_a_larger_precision_means_less_doubt_and_none_in_the_end() -> None:
    model = trained()
    posterior = laplace(model, "fr", [batch(4)])
    spreads = []
    for precision in (0.1, 1.0, 10.0, 1e12):
        posterior.precision = precision
        spreads.append(posterior.predict(batch(2)))
    traces = [float(s.covariance.diagonal(dim1=1, dim2=2).sum()) for s in spreads]
    assert traces == sorted(traces, reverse=True)
    plain = model(**batch(2)).logits.softmax(-1)
    for samples in (None, 100_000):
        assert distance(spreads[-1].probabilities(samples), plain) < 1e-2
        found = spreads[0].probabilities(samples)
        assert torch.allclose(found.sum(-1), torch.ones(2, dtype=torch.float64))
        assert bool((found.amax(-1) < plain.amax(-1)).all())


@pytest.mark.parametrize("precision", [1e-4, 1e8])
def test_rounding_makes_no_variance_negative(precision: float) -> None:
    model = trained().float()
    posterior = laplace(model, "fr", [batch(16), batch(16, 1)])
    posterior.precision = precision
    predictive = posterior.predict(batch(4, 2))
    values = torch.linalg.eigvalsh(predictive.covariance)
    assert bool((values[:, 0] >= -1e-5 * values[:, -1]).all())
    assert torch.allclose(predictive.probabilities().sum(-1), torch.ones(4))


def test_fitting_changes_nothing_and_dropout_is_off() -> None:
    model = trained(LoRA(rank=2, dropout=0.5), hidden_dropout_prob=0.5).train()
    flags = {n: m.training for n, m in model.named_modules()}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    one, two = (laplace(model, "fr", [batch(4)]) for _ in range(2))
    assert one.precision == two.precision
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_padding_does_not_count() -> None:
    model = trained()
    call = batch(2)
    padded = {"input_ids": nn.functional.pad(call["input_ids"], (0, 3)), "attention_mask": torch.ones(2, 9)}
    padded["attention_mask"][:, 6:] = 0
    one, two = laplace(model, "fr", [call]), laplace(model, "fr", [padded])
    for key, curvature in one.curvatures.items():
        assert distance(curvature.reads.values[:2], two.curvatures[key].reads.values[:2]) < 1e-9


def test_a_frozen_adapter_is_as_sure() -> None:
    model = trained()
    posterior = laplace(model, "fr", [batch(4)])
    before = posterior.predict(batch(2))
    inlay.set_trainable(model)
    after = posterior.predict(batch(2))
    assert torch.equal(before.mean, after.mean)
    assert distance(after.covariance, before.covariance) < 1e-12


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = trained()
    posterior = laplace(model, "fr", [batch(4)], keep=3, whole=16)
    posterior.save(tmp_path / "posterior.safetensors")
    again = Laplace.load(tmp_path / "posterior.safetensors", model, "fr")
    assert again.precision == posterior.precision
    assert distance(again.predict(batch(2)).covariance, posterior.predict(batch(2)).covariance) < 1e-12
    shake(model, seed=1)
    with pytest.raises(ConfigError, match=r"the file is of another adapter[\s\S]*another norm"):
        Laplace.load(tmp_path / "posterior.safetensors", model, "fr")
    other = trained(LoRA(rank=2, targets=("key",)))
    with pytest.raises(ConfigError, match=r"the file is of another adapter[\s\S]*not in it"):
        Laplace.load(tmp_path / "posterior.safetensors", other, "fr")


def test_a_causal_model_by_its_answers() -> None:
    model = settled("llama")
    inlay.attach(model, LoRA(rank=2), name="fr", seed=0)
    shake(model)
    answers = [5, 9]
    posterior = laplace(model, "fr", [batch_for(model)], logits=lambda out: out.logits[:, -1, answers])
    mean, covariance = posterior.predict(batch_for(model))
    assert mean.shape[1] == 2
    assert covariance.shape[1:] == (2, 2)
    with pytest.raises(ConfigError, match="one row of classes for each sample"):
        laplace(model, "fr", [batch_for(model)])


@pytest.mark.parametrize(
    ("stack", "saw"), [("dora", "magnitude, of shape"), ("lora(targets=['embedding'])", "never applied")]
)
def test_what_is_no_matrix_of_a_linear_map_is_refused(stack: str, saw: str) -> None:
    model = settled("bert")
    inlay.attach(model, stack, name="fr")
    with pytest.raises(ConfigError, match=rf"is not the matrix of a linear map[\s\S]*{saw}"):
        laplace(model, "fr", [batch(2)])


def test_samples_that_are_not_apart_are_refused() -> None:
    class Flat(Softmax):
        def forward(self, x: Tensor) -> Output:
            return Output(self.layer(x.flatten(0, 1)).view(len(x), -1))

    model = Flat()
    inlay.attach(model, LoRA(rank=2, targets=["layer"]), name="fr")
    with pytest.raises(
        ConfigError, match=r"does not read its batch sample by sample[\s\S]*\(6, 6\) in a batch of 2"
    ):
        laplace(model, "fr", [{"x": torch.randn(2, 3, 6)}])
