"""Writes docs/models.md: what is found in every model type of transformers' auto classes.

python docs/tools/models.py
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NONE = "no attention and feed-forward"
HEAD = """# Models

Roles are found by structure: the names and shapes of what stands in a model's blocks, with a table of names
but none of architectures. This page is made by `docs/tools/models.py` from the default configuration of every
model class in transformers' auto classes for causal and masked language models, sequence to sequence,
sequence and image classification, on the meta device with few layers. A mark says that the method finds its
default places there; what a method does at its places is tested on Llama, GPT-2, BERT, T5, ViT, and on every
layout of fused projections.

"""


def page(everything: Sequence[Any], reasons: Mapping[str, str]) -> str:
    """Return the page's text."""
    built = [found for found in everything if not found.unbuilt]
    methods = list(built[0].methods)
    whole = sum(not found.missing for found in built)
    text = HEAD + f"{len(built)} classes could be built; all roles were found in {whole}.\n\n"
    text += (
        "| class | roles | " + " | ".join(f"`{m}`" for m in methods) + " |\n|---|---|" + "---|" * len(methods)
    )
    for found in sorted(built, key=lambda f: f.kind):
        marks = " | ".join("✓" if found.methods[m] else "" for m in methods)
        said = "all" if not found.missing else reasons[found.type]
        text += f"\n| {found.kind} | {said} | {marks} |"
    text += "\n\nNot built from their default configurations, so not looked at:\n\n"
    text += "\n".join(
        f"- {f.kind}: {f.unbuilt}" for f in sorted(everything, key=lambda f: f.kind) if f.unbuilt
    )
    return text + "\n"


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests" / "models"))
    import survey
    from test_every_model import NOT_FOUND, WITHOUT

    reasons = {**NOT_FOUND, **dict.fromkeys(WITHOUT, NONE)}
    (ROOT / "docs" / "models.md").write_text(page(list(survey.everything()), reasons))


if __name__ == "__main__":
    main()
