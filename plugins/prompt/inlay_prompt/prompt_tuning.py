"""Prompt tuning (Lester et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from inlay.authoring import ConfigError, Init, SequenceSite, setting
from inlay_prompt.rows import PromptMethod, Rows

FREQUENT = 5000  # tokens at the start of a vocabulary, where SentencePiece puts the frequent ones


@dataclass(frozen=True)
class PromptTuning(PromptMethod):
    """p learned virtual tokens P (p, d) in front of the embedded ones: X = [P; E].

    init="vocabulary": embeddings of p different tokens among the first 5000, as the embedding gives
    them (scaled, where it scales); "uniform": U(−0.5, 0.5), the only one for patches and sound, where
    the rows enter at the first block. `tokens` are ids to start from instead, repeated or cut to p.

    Parameters: p·d. arXiv 2104.08691, google-research/prompt-tuning. Encoder-decoders have the rows in
    the encoder. The first token of a decoder is not predicted from P.
    """

    id: ClassVar[str] = "prompt_tuning"
    paper: ClassVar[str] = "2104.08691"
    lr: ClassVar[float] = 1e-2

    length: int = setting(100, least=1)
    init: Literal["vocabulary", "uniform"] | None = setting(None)
    tokens: tuple[int, ...] = setting((), least=0)

    def delta(self, site: SequenceSite, init: Init) -> Rows:  # type: ignore[override]
        if site.embedding is None or (self.init == "uniform" and not self.tokens):
            _need_tokens(self, site)
            return Rows(init.uniform(self.length, site.features, bound=0.5))
        ids = self._ids(site.embedding.num_embeddings, init)
        with torch.no_grad():
            return Rows(init.tensor(site.embedding(ids.to(site.reference.device))))

    def _ids(self, vocabulary: int, init: Init) -> Tensor:
        """Return the ids of the tokens whose embeddings the rows start from (p,)."""
        if not self.tokens:
            pool = torch.randperm(min(FREQUENT, vocabulary), generator=init.generator)
        elif max(self.tokens) < vocabulary:
            pool = torch.tensor(self.tokens)
        else:
            raise ConfigError(
                "the prompt cannot start from a token that the model does not have",
                saw=f"token {max(self.tokens)}; the vocabulary has {vocabulary}",
                do="give ids of the model's own tokenizer",
            )
        return pool.repeat(-(-self.length // len(pool)))[: self.length]


def _need_tokens(method: PromptTuning, site: SequenceSite) -> None:
    if site.embedding is None and (method.tokens or method.init == "vocabulary"):
        raise ConfigError(
            "there are no tokens here to start the prompt from",
            saw=f"{site.name} reads patches or sound",
            do='use init="uniform"',
        )
