"""P-tuning (Liu et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.authoring import Adapter, At, Init, SequenceSite, Stage, hookimpl, setting
from inlay_prompt.rows import PromptMethod, Rows


class Encoded(Rows):
    """Virtual tokens P (p, d) = encoder(X), X (p, d) a table; after `fold`, P alone."""

    rows: nn.Parameter | None

    def __init__(self, table: nn.Parameter, encoder: nn.Module) -> None:
        super().__init__(None)
        self.table: nn.Parameter | None = table
        self.encoder: nn.Module | None = encoder

    def forward(self, at: At) -> Tensor:
        """Return P (p, d)."""
        return self.made() if self.rows is None else self.rows

    def made(self) -> Tensor:
        assert self.encoder is not None
        rows: Tensor = self.encoder(self.table)
        return rows

    def keep(self, rows: nn.Parameter) -> Encoded:
        """Hold P itself, without what made it."""
        self.rows, self.table, self.encoder = rows, None, None
        return self


class Recurrent(nn.Module):
    """A bidirectional LSTM over the tokens in order, then W₂ relu(W₁ h + b₁) + b₂, h (p, 2m)."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        lstm = nn.LSTM(features, hidden, num_layers=2, bidirectional=True)
        self.hidden, self.weights = (
            hidden,
            nn.ParameterList(lstm.parameters()),
        )  # the module cannot be compiled
        self.mlp = mlp(2 * hidden, 2 * hidden, features)

    def forward(self, table: Tensor) -> Tensor:
        """Return P (p, d) of X (p, d)."""
        zeros = table.new_zeros(4, 1, self.hidden)
        weights = [weight for weight in self.weights]  # noqa: C416 - the compiler wants a plain list
        with torch.autocast(table.device.type, enabled=False):  # which this LSTM does not know
            hidden, *_ = torch.lstm(table[:, None], (zeros, zeros), weights, True, 2, 0.0, False, True, False)
        rows: Tensor = self.mlp(hidden[:, 0])
        return rows


def mlp(*sizes: int) -> nn.Sequential:
    """Return linear layers of these sizes with ReLU between them."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(sizes):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class PTuning(PromptMethod):
    """n virtual tokens P (n, d) in front of the embedded ones, made by a small network that is dropped later.

        P = W₂ relu(W₁ h + b₁) + b₂,   h (n, 2m) = two-layer bidirectional LSTM(X)      encoder="lstm"
        P = W₃ relu(W₂ relu(W₁ X + b₁) + b₂) + b₃,   widths d, m, m, d                  encoder="mlp"

    X (n, d) ~ N(0, 1), layers as torch starts them; m = `hidden`, by default d/2 (lstm: the authors'
    LAMA form) or d (mlp: peft's). `inlay.advance(model, name)` ends training: P is kept, n·d numbers.

    Parameters: n·d + 4·(2·m·(d + m + 2) + 2·m·(3·m + 2)) + (2·m + 1)·2·m + (2·m + 1)·d; mlp n·d + (d + 1)·m +
    (m + 1)·m + (m + 1)·d. arXiv 2103.10385, THUDM/P-tuning. There the tokens may stand anywhere in a
    pattern, and the model may learn too; here they stand in front, the base frozen, as in peft.
    """

    id: ClassVar[str] = "p_tuning"
    paper: ClassVar[str] = "2103.10385"
    lr: ClassVar[float] = 1e-3

    length: int = setting(9, least=1)
    encoder: Literal["lstm", "mlp"] = setting("lstm")
    hidden: int | None = setting(None, least=1)

    @staticmethod
    @hookimpl
    def inject(method: PTuning, sites: Sequence[SequenceSite], adapter: Adapter) -> int:  # type: ignore[override]
        for site in sites:
            init = adapter.init(site)
            delta = method.delta(site, init)
            folded = adapter.data.get("folded")
            adapter.place(site, delta.keep(init.zeros(method.length, site.features)) if folded else delta)
        return len(sites)

    def delta(self, site: SequenceSite, init: Init) -> Encoded:  # type: ignore[override]
        features = site.features
        table = init.normal(self.length, features)
        if self.encoder == "mlp":
            hidden = self.hidden or features
            return Encoded(table, init.module(lambda: mlp(features, hidden, hidden, features)))
        hidden = self.hidden or max(1, features // 2)
        return Encoded(table, init.module(lambda: Recurrent(features, hidden)))

    @staticmethod
    @hookimpl
    def stages(method: PTuning, adapter: Adapter) -> list[Stage]:
        return [] if adapter.data.get("folded") else [Stage("train", finish=fold)]


def fold(adapter: Adapter) -> None:
    """Keep what the networks make, and let them go."""
    for _, delta in adapter.placed:
        assert isinstance(delta, Encoded)
        with torch.no_grad():
            delta.keep(nn.Parameter(delta.made()))
    adapter.data["folded"] = True
