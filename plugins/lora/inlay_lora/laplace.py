"""Laplace-LoRA: how sure a trained adapter is, by a Gaussian around what it learned."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from inlay.authoring import ConfigError, calls
from inlay_lora.uses import Use, matrices, uses

Logits = Callable[[Any], Tensor]
SPARE, POWERS = 8, 2  # of the iteration that finds the strongest directions


def own_logits(output: Any) -> Tensor:
    """Return the model's logits."""
    found: Tensor = output.logits
    return found


class Curvature:
    """The Fisher information of one matrix M (o, i), as a Kronecker product G ⊗ Q of two sums.

    G = Σ g gᵀ of gradients g at what M gives, Q = 1/N Σ a aᵀ of what it reads, over all samples and
    tokens. Each is kept as `Directions`.
    """

    def __init__(self, matrix: Tensor, keep: int, whole: int) -> None:
        out, inner = matrix.shape
        wide = torch.promote_types(matrix.dtype, torch.float32)
        self.gives, self.reads = (
            Directions(torch.empty(0, n, dtype=wide, device=matrix.device), n if n <= whole else keep)
            for n in (out, inner)
        )
        self.squared = float(matrix.detach().to(wide).square().sum())

    def add(self, read: Tensor, gradients: Tensor) -> None:
        """Take in a (n, t, i) and gradients (C, n, t, o); tokens that no logit depends on do not count."""
        counts = gradients.abs().amax((0, 3)) > 0
        self.reads.add(read[counts])
        self.gives.add(gradients[:, counts].flatten(0, 1))

    def strengths(self, samples: int) -> Tensor:
        """Return the eigenvalues γᵢ qⱼ (k, l) of G ⊗ Q that were kept; the others count as 0."""
        return torch.outer(self.gives.values, self.reads.values / samples)

    def spread(self, jacobian: Tensor, samples: int, precision: Tensor) -> Tensor:
        """Return J (G ⊗ Q + λ)⁻¹ Jᵀ (n, C, C) of J (n, C, o, i).

        (G ⊗ Q + λ)⁻¹ is 1/(γq + λ) along the kept directions, 1/λ for what is left of J beside them:
        two sums of squares, so that no rounding makes a variance negative.
        """
        gives, reads = self.gives.vectors, self.reads.vectors
        inside = gives @ jacobian @ reads.T
        beside = jacobian - gives.T @ inside @ reads
        certain = 1 / (self.strengths(samples) + precision)
        left = torch.einsum("ncoi,ndoi->ncd", beside, beside) / precision
        return left + torch.einsum("ncoi,oi,ndoi->ncd", inside, certain, inside)


class Directions:
    """Σ v vᵀ of rows v (m, d), by its `keep` strongest directions: `root` (k, d), whose rows are orthogonal.

    Exact with keep = d; otherwise what is cut off at each `add` is lost.
    """

    def __init__(self, root: Tensor, keep: int) -> None:
        self.root, self.keep = root, keep

    def add(self, rows: Tensor) -> None:
        """Take in rows (m, d)."""
        stacked = torch.cat([self.root, rows.to(self.root)])
        basis = self.basis(stacked) if self.keep < stacked.shape[1] else None
        inside = stacked if basis is None else stacked @ basis
        values, vectors = torch.linalg.eigh(inside.T @ inside)
        directions = vectors if basis is None else basis @ vectors
        self.root = (values.clamp(min=0).sqrt() * directions).T.flip(0)[: self.keep].contiguous()

    def basis(self, rows: Tensor) -> Tensor:
        """Return an orthonormal basis (d, q) near the strongest directions of rows (m, d): power iteration.

        From the directions so far and a fixed draw, a few more than are kept.
        """
        drawn = torch.randn(
            rows.shape[1], self.keep + SPARE, generator=torch.Generator().manual_seed(0), dtype=rows.dtype
        )
        basis = torch.cat([self.root.T, drawn.to(rows)], 1)[:, : rows.shape[1]]
        for _ in range(POWERS):
            basis = torch.linalg.qr(rows.T @ (rows @ torch.linalg.qr(basis).Q)).Q
        return basis

    @property
    def values(self) -> Tensor:
        """The eigenvalues (k,)."""
        return self.root.square().sum(1)

    @property
    def vectors(self) -> Tensor:
        """The eigenvectors (k, d), 0 where the eigenvalue is."""
        norm = self.root.norm(dim=1, keepdim=True)
        return self.root / norm.clamp(min=torch.finfo(norm.dtype).tiny)


class Predictive(NamedTuple):
    """A Gaussian over each sample's logits: `mean` (n, C), what the model says, `covariance` (n, C, C)."""

    mean: Tensor
    covariance: Tensor

    def probabilities(self, samples: int | None = 10_000, *, seed: int = 0) -> Tensor:
        """Return the mean softmax (n, C) of `samples` draws; with None the probit approximation."""
        if samples is None:
            spread = self.covariance.diagonal(dim1=1, dim2=2)
            return (self.mean / (1 + math.pi / 8 * spread).sqrt()).softmax(-1)
        classes = self.mean.shape[1]
        drawn = torch.randn(
            samples, classes, generator=torch.Generator().manual_seed(seed), dtype=self.mean.dtype
        )
        values, vectors = torch.linalg.eigh(self.covariance)
        root = vectors * values.clamp(min=0).sqrt()[:, None]
        return torch.stack(
            [(m + drawn.to(m) @ r.T).softmax(-1).mean(0) for m, r in zip(self.mean, root, strict=True)]
        )


@dataclass
class Laplace:
    """The posterior of the adapter `name`: N(θ, P⁻¹) over its matrices' entries, P = F + λI, prior N(0, I/λ).

    `precision` is λ. The adapter is as it was: dropping this object leaves what was trained.
    """

    model: nn.Module
    name: str
    curvatures: dict[str, Curvature]
    samples: int
    logits: Logits = own_logits
    precision: float = 1.0

    def evidence(self, precision: Tensor) -> Tensor:
        """Return log p(data | λ) up to what does not depend on λ: −½ (λ‖θ‖² + log det P − n log λ)."""
        total = torch.zeros_like(precision)
        for curvature in self.curvatures.values():
            strengths = curvature.strengths(self.samples)
            total = total + precision * curvature.squared + (strengths / precision).log1p().sum()
        return -total / 2

    def choose_precision(self, *, steps: int = 100, lr: float = 0.1) -> float:
        """Set λ to where the evidence is largest: Adam on log λ from where it is now."""
        root = next(iter(self.curvatures.values())).gives.root
        log = root.new_tensor(math.log(self.precision)).detach().requires_grad_()
        optimizer = torch.optim.Adam([log], lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            (-self.evidence(log.exp())).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        self.precision = math.exp(float(log.detach()))
        return self.precision

    def predict(self, batch: Mapping[str, Any]) -> Predictive:
        """Return the logits of a batch as the model linearised in θ gives them: N(f(x), J P⁻¹ Jᵀ)."""
        (call,) = calls(self.model, [batch])
        wanted = matrices(self.model, self.name)
        mean, found = uses(self.model, wanted, call, self.logits)
        jacobians: dict[str, Tensor] = {}
        for use in found:
            root = self.curvatures[use.name].gives.root
            part = torch.einsum("cnto,nti->ncoi", use.gradients.to(root), use.read.to(root))
            jacobians[use.name] = jacobians.get(use.name, 0) + part
        covariance = mean.new_zeros(*mean.shape, mean.shape[1])
        precision = torch.tensor(self.precision, dtype=mean.dtype, device=mean.device)
        for name, jacobian in jacobians.items():
            covariance += self.curvatures[name].spread(jacobian, self.samples, precision).to(mean)
        return Predictive(mean, (covariance + covariance.mT) / 2)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the factors and λ; the adapter itself is saved by `inlay.save`."""
        tensors = {
            f"{name}/{side}": getattr(c, side).root.contiguous()
            for name, c in self.curvatures.items()
            for side in ("gives", "reads")
        }
        numbers = {"samples": str(self.samples), "precision": repr(self.precision)}
        save_file(tensors, file, metadata=numbers | {n: repr(c.squared) for n, c in self.curvatures.items()})

    @classmethod
    def load(
        cls, file: str | os.PathLike[str], model: nn.Module, name: str, *, logits: Logits = own_logits
    ) -> Laplace:
        """Read what `save` wrote, for the very adapter it was made from."""
        made = {n: Curvature(matrix, 0, 0) for n, matrix in matrices(model, name).items()}
        with safe_open(file, framework="pt") as opened:
            numbers, keys = opened.metadata(), opened.keys()
            for n, curvature in made.items():
                same = f"{n}/gives" in keys and math.isclose(
                    float(numbers[n]), curvature.squared, rel_tol=1e-4
                )
                if not same or len(keys) != 2 * len(made):
                    raise ConfigError(
                        "laplace: the file is of another adapter",
                        saw=f"{n}: {'another norm' if f'{n}/gives' in keys else 'not in it'}",
                        do="load the adapter it was made from, as it was then",
                    )
                for side in (curvature.gives, curvature.reads):
                    kept = opened.get_tensor(f"{n}/{'gives' if side is curvature.gives else 'reads'}")
                    side.root, side.keep = kept.to(side.root), len(kept)
        return cls(model, name, made, int(numbers["samples"]), logits, float(numbers["precision"]))


def laplace(
    model: nn.Module,
    name: str,
    batches: Iterable[Mapping[str, Any]],
    *,
    logits: Logits = own_logits,
    keep: int = 10,
    whole: int = 512,
) -> Laplace:
    """Return the posterior of the trained adapter (or part) `name`, fitted on the data it learned from.

    `logits` gives (n, classes) of the model's output; of a causal model those of the answers, at
    their place: `lambda out: out.logits[:, -1, answers]`. Labels are not looked at: the Fisher
    information is that of the model's own distribution over the classes. Sides of a matrix with
    more than `whole` features are kept by their `keep` strongest directions. λ is where the
    evidence is largest. arXiv 2308.13111, adamxyang/laplace-lora.
    """
    wanted = matrices(model, name)
    curvatures = {n: Curvature(matrix, keep, whole) for n, matrix in wanted.items()}
    samples = 0
    for call in calls(model, batches):
        outputs, found = uses(model, wanted, call, logits)
        samples += len(outputs)
        for use in found:
            curvatures[use.name].add(use.read, scores(outputs, use))
    posterior = Laplace(model, name, curvatures, samples, logits)
    posterior.choose_precision()
    return posterior


def scores(logits: Tensor, use: Use) -> Tensor:
    """Return √p_c times the gradients (C, n, t, o) of log p_c, of logits (n, C)."""
    p = logits.softmax(-1).T[:, :, None, None].to(use.gradients)
    return p.sqrt() * (use.gradients - (p * use.gradients).sum(0))
