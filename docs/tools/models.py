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
but none of architectures. `print(inlay.anatomy(model))` shows it for yours. This page is made by
`docs/tools/models.py` from the default configuration of every model class in transformers' auto classes for
causal and masked language models, sequence to sequence, sequence and image classification, on the meta device
with few layers. A mark under a method says that it finds its default places there. "Measured" counts the
layers (and slices and experts) of a tiny model of the class that LoRA was put on, all that have a role: its
output changed, each of them got a gradient if the base's weight there gets one, merging gave the same output,
and detaching the first one bit for bit.

"""


def page(everything: Sequence[Any], proofs: Sequence[Any], reasons: Mapping[str, str]) -> str:
    """Return the page's text."""
    built = [found for found in everything if not found.unbuilt]
    methods = list(built[0].methods)
    whole = sum(not found.missing for found in built)
    measured = {p.kind: p.sites for p in proofs if p.sites and not p.wrong}
    asked = [found for found in built if reasons.get(found.type) != NONE]
    share = f"{100 * whole / len(asked):.1f} %"
    text = HEAD + (
        f"{len(built)} classes could be built, {len(asked)} of them with attention and a feed-forward part; "
        f"all roles were found in {whole} ({share}), {len(measured)} were measured.\n\n"
    )
    heads = ["class", "roles", *(f"`{m}`" for m in methods), "measured"]
    text += "| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|"
    for found in sorted(built, key=lambda f: f.kind):
        marks = " | ".join("✓" if found.methods[m] else "" for m in methods)
        said = "all" if not found.missing else reasons[found.type]
        text += f"\n| {found.kind} | {said} | {marks} | {measured.get(found.kind, '')} |"
    text += "\n\nBuilt, but not run so small:\n\n"
    text += "\n".join(f"- {p.kind}: {p.unrun}" for p in sorted(proofs, key=lambda p: p.kind) if p.unrun)
    text += "\n\nNot built from their default configurations, so not looked at:\n\n"
    text += "\n".join(
        f"- {f.kind}: {f.unbuilt}" for f in sorted(everything, key=lambda f: f.kind) if f.unbuilt
    )
    return text + "\n"


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests" / "models"))
    import proof
    import survey
    from test_every_model import NOT_FOUND, WITHOUT

    reasons = {**NOT_FOUND, **dict.fromkeys(WITHOUT, NONE)}
    everything = list(survey.everything())
    proofs = [proof.prove(f.kind, f.type, f.task) for f in everything if not f.unbuilt]
    (ROOT / "docs" / "models.md").write_text(page(everything, proofs, reasons))


if __name__ == "__main__":
    main()
