"""The model card beside an adapter: README.md, as the hub reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import inlay
from inlay_train import figures

if TYPE_CHECKING:
    from inlay_train.trainer import Trainer

TEXT = """# {title}

An adapter for `{base}`, written by [inlay](https://pypi.org/project/inlay/). It holds {parameters:,}
parameters, {share:.3g} % of the base's {size:,}; the base itself is not in it.

| part | method | sites | parameters |
|---|---|---|---|
{parts}

## Use

```python
import inlay

model = ...  # {architecture} from {base}
inlay.load(model, "path/to/this/folder")
```

## Figures

{figures}
"""


def of(trainer: Trainer, tags: Sequence[str] | str = ()) -> str:
    """Return the card of what a Trainer trained, with the figures of the step it ended with."""
    from huggingface_hub import ModelCardData

    model = trainer.model
    found = inlay.summary(model)
    parts = [part for part in found.parts if part.path.partition("/")[0] == trainer.adapter]
    name = str(getattr(model.config, "_name_or_path", "") or "")
    base = Path(name).name if Path(name).is_dir() else name
    methods = list(dict.fromkeys(part.method for part in parts))
    data = ModelCardData(
        library_name="inlay",
        tags=list(dict.fromkeys(["inlay", *methods, *([tags] if isinstance(tags, str) else tags)])),
        base_model=name if name and not Path(name).is_dir() else None,
    )
    parameters = sum(part.parameters for part in parts)
    rows = "\n".join(
        f"| {p.path.partition('/')[2]} | {p.method} | {p.sites} | {p.parameters:,} |" for p in parts
    )
    text = TEXT.format(
        title=" + ".join(methods), base=base or type(model).__name__, parameters=parameters,
        share=100 * parameters / max(1, found.base_parameters), size=found.base_parameters, parts=rows,
        architecture=type(model).__name__,
        figures=_figures(trainer.state, best=trainer.args.load_best_model_at_end),
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _figures(state: Any, *, best: bool) -> str:
    """Return the evaluation of the best step, if that was kept, or of the last."""
    found = figures.evaluations(state.log_history)
    chosen = [e for e in found if e["step"] == state.best_global_step] if best else []
    if not found:
        return f"Trained for {state.global_step} steps; not evaluated."
    last = (chosen or found)[-1]
    rows = [f"| {key} | {value:.4g} |" for key, value in last.items() if key != "step"]
    table = "\n".join(["| on rows held out | |", "|---|---|", *rows])
    return f"After {last['step']} of {state.global_step} steps:\n\n{table}"
