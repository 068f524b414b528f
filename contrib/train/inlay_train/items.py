"""Whether a model's loss is a mean over the whole step's items, as transformers takes for granted.

transformers hands the number of items of a step (of all batches, in all processes) to every model whose
forward takes any keyword, and multiplies the loss by what it should have been divided by. Classifiers and
older models give the mean of their own batch all the same: their gradient would be too large by the number
of batches, or of processes.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any


def counts_items(model: Any) -> bool:
    """Return whether the model's forward hands the number of items on to its loss; True where unknown."""
    kind = getattr(type(model), "_inlay_base", type(model))
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))
    except (OSError, TypeError):  # made at run time
        return True
    return any(_gives_count(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))


def _gives_count(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    return name == "loss_function" and any(k.arg in (None, "num_items_in_batch") for k in call.keywords)
