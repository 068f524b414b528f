"""R22 to R26: configurations, warnings, imports, and what a method says about itself."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import inlay
from inlay.errors import ConfigError
from inlay.method import Method
from inlay.registry import registry
from inlay.settings import fits
from inlay.testing.cases import Case, Joined
from inlay.testing.effects import backward, output, stir
from inlay.testing.rule import need, raises, rule

HEAVY = ("transformers", "bitsandbytes", "accelerate", "hypothesis", "pytest")


@rule(
    "R22",
    "A configuration is data",
    means="to_dict gives JSON, from which the registry builds an equal configuration; a setting that does"
    " not exist is refused by name.",
    usually="a field holds a tensor, a module or a function, or __post_init__ changes its fields.",
    dtypes=("float32",),
    alone=True,
    share=2.0,
)
def configuration_is_data(case: Case) -> None:
    for method in (m.method for m in case.members):
        settings = json.loads(json.dumps(method.to_dict(), allow_nan=False))
        again = registry.build(method.id, settings)
        need(again == method and hash(again) == hash(method), f"{method!r} came back from JSON as {again!r}")
        need(
            type(again) is type(method),
            f"{method.id!r} builds a {type(again).__module__}.{type(again).__name__}",
        )
        for build in (
            lambda s=settings, m=method: registry.build(m.id, {**s, "unheard_of": 1}),
            lambda m=method: type(m)(unheard_of=1),
        ):
            error = raises(ConfigError, build, "an unknown setting")
            need("unheard_of" in str(error), f"the message does not name the setting: {error}")
        change = partial(setattr, method, "targets", ())
        raises(dataclasses.FrozenInstanceError, change, "changing a setting")


@rule(
    "R23",
    "A setting out of range is refused",
    means="each setting refuses values outside its range, NaN, infinity and other types, naming itself.",
    usually="the field has no range, or Any as its type.",
    dtypes=("float32",),
    alone=True,
)
def bad_settings_are_refused(case: Case) -> None:
    for method in (m.method for m in case.members):
        for field, value in _bad_values(method):
            error = raises(
                ConfigError,
                lambda m=method, f=field, v=value: dataclasses.replace(m, **{f: v}),  # type: ignore[misc]
                f"{type(method).__name__}({field}={value!r})",
            )
            need(field in str(error), f"the message does not name {field}: {error}")


def _bad_values(method: Method) -> Iterator[tuple[str, Any]]:
    """Yield (setting, value it must refuse)."""
    hints = _hints(type(method))
    for field in dataclasses.fields(method):
        hint = hints[field.name]
        candidates: list[Any] = [object(), b"bytes"]
        if fits(0.5, hint) or fits(1, hint):
            candidates += ["text", math.nan, math.inf, -math.inf]
            step: Any = 1e-3 if fits(0.5, hint) else 1
            bounds = field.metadata
            candidates += [bounds["least"] - step] if "least" in bounds else []
            candidates += [bounds["most"] + step] if "most" in bounds else []
            candidates += [bounds[k] for k in ("above", "below") if k in bounds]
        yield from ((field.name, value) for value in candidates if hint is not Any)


def _hints(kind: type) -> dict[str, Any]:
    import typing

    return typing.get_type_hints(kind)


@rule(
    "R24",
    "Nothing warns",
    means="attaching, training, merging, saving, loading and detaching raise no warning.",
    usually="a tensor is built from a tensor with torch.tensor, a shape broadcasts by accident, or "
    "something deprecated is called.",
    share=0.7,
)
def nothing_warns(case: Case) -> None:
    model, fresh = case.model(), case.model()
    with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("always")
        case.attach(model)
        stir(model, case)
        backward(model)
        inlay.save(model, folder)
        inlay.load(fresh, folder)
        if not case.lasting():
            inlay.merge(model)
        output(model)
        str(inlay.summary(model))
        inlay.detach(model)
    ours = [w for w in caught if not _foreign(w)]
    need(not ours, f"{ours[0].category.__name__}: {ours[0].message} ({ours[0].filename})" if ours else "")


def _foreign(warning: warnings.WarningMessage) -> bool:
    """Whether a deprecation is between other libraries."""
    old = issubclass(warning.category, DeprecationWarning | FutureWarning)
    return (
        old
        and re.search(r"site-packages[/\\](torch|transformers|accelerate)[/\\]", warning.filename) is not None
    )


@rule(
    "R25",
    "Importing a method is light",
    means="importing the method's package imports neither transformers nor bitsandbytes nor accelerate, "
    "nor a testing tool.",
    usually="an import at the top of a file; move it into the function that needs it.",
    once=True,
    alone=True,
)
def imports_lightly(joined: Joined) -> None:
    package = joined.kind.__module__.split(".")[0]
    module = joined.kind.__module__ if package == "inlay" else package
    heavy = _imported_with(module)
    need(not heavy, f"importing {module} imports {', '.join(heavy)}")


@cache
def _imported_with(module: str) -> tuple[str, ...]:
    code = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    need(done.returncode == 0, f"importing {module} in a fresh process failed: {done.stderr[-500:]}")
    return tuple(done.stdout.split())


@rule(
    "R26",
    "A method describes itself",
    means="its id is a lower-case name offered by its own distribution, its paper an arXiv id, its "
    "docstring says what it does and how many parameters it has, its default rate is positive, its "
    "fields are documented.",
    usually="a class attribute was left at its default.",
    once=True,
    alone=True,
)
def describes_itself(joined: Joined) -> None:
    kind = joined.kind
    need(re.fullmatch(r"[a-z][a-z0-9_]*", kind.id), f"the id {kind.id!r} is no lower-case name")
    need(registry.get(kind.id) is kind, f"{kind.id!r} is offered by another class")
    need(re.fullmatch(r"\d{4}\.\d{4,5}", kind.paper), f"paper = {kind.paper!r} is no arXiv id")
    text = (kind.__doc__ or "").strip()
    need(
        len(text.split()) >= 12 and "arameter" in text,
        "the docstring does not say what it does and its count",
    )
    need(isinstance(kind.lr, float) and kind.lr > 0, f"lr = {kind.lr!r}")
    need(
        kind.version >= 1 and kind.accepts and kind.default_targets,
        "version, accepts or default_targets is empty",
    )
