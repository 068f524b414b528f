"""A conformance class for a method that declares none: what it can do is found by trying."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

import inlay
from inlay.errors import CannotMerge, InlayError, RegistryError
from inlay.method import Method
from inlay.registry import registry
from inlay.stack import need_state
from inlay.testing import Case, Joined, Member, MethodConformance
from inlay.testing.cases import FAMILIES, NAME
from inlay.testing.effects import output, share
from inlay.testing.quantised import PACKED_SIZES, packed
from inlay_train.check.choices import PLACES, configurations

ROUNDING = 1e-5
SMALL = {torch.float32: ROUNDING, torch.bfloat16: 3e-2}  # what rounding may do to the output
Key = tuple[Method, str]


def conformance_of(name: str) -> type[MethodConformance]:
    """Return a conformance class for an installed method; raise if nothing can be derived."""
    kind = registry.get(name)
    drawn = list(configurations(kind))
    families = families_of(drawn[0])
    methods = [m for m in drawn if all(plans(m, family) is None for family in families)]
    small = methods[0]
    found: dict[str, Any] = {
        "families": families,
        "by_layer": by_layer(small, families),
        "quantised": "llama" not in families or quantised(small),
        "start_tolerance": ROUNDING if any(rounds(small, family) for family in families) else 0.0,
        **abilities({(m, family): tried(m, family) for family in families for m in methods}),
    }
    told = {k: v if isinstance(v, (bool, float, tuple)) else "somewhere" for k, v in found.items()}
    told["configurations"] = [repr(m) for m in methods]
    return type(
        f"Test{kind.__name__}",
        (MethodConformance,),
        {"method": kind, "configurations": st.sampled_from(methods), **found, "derived": told},
    )


def families_of(method: Method) -> tuple[str, ...]:
    """Return the kit's models on which a method acts; raise if there is none."""
    refused = {family: plans(method, family) for family in FAMILIES}
    if all(refused.values()):
        family, error = next(iter(refused.items()))
        raise RegistryError(
            f"{method.id!r} acts on none of the kit's models, so nothing can be derived for it",
            saw=f"on {family}: {error}",
            do="declare a conformance class: docs/conformance.md#joining",
        )
    return tuple(family for family, error in refused.items() if error is None)


def plans(method: Method, family: str) -> InlayError | None:
    """Return the refusal with which a plan ends; whatever else it raises is for the rules to tell."""
    try:
        inlay.plan(case_of(method, family).model(), method)
    except RegistryError:
        raise
    except InlayError as error:
        return error
    except Exception:
        return None
    return None


def case_of(method: Method, family: str, dtype: torch.dtype = torch.float32) -> Case:
    joined = Joined(type(method), st.just(method))
    return Case(family, dtype, (Member("subject", method, joined),))


def by_layer(method: Method, families: tuple[str, ...]) -> bool:
    limited = [dataclasses.replace(method, layers=layers) for layers in ((1,), "0-1")]
    return all(plans(m, family) is None for m in limited for family in families)


def quantised(method: Method) -> bool:
    """Return whether the method takes layers in four bits; True where that cannot be tried."""
    try:
        model = packed("llama", **PACKED_SIZES)
        case_of(method, "llama").attach(model)
    except InlayError:
        return False
    except Exception:
        return True
    return True


@dataclass(frozen=True)
class Tried:
    """What one configuration did on one model."""

    replaces: bool = False
    merges: bool = False
    adds_biases: bool = False


def tried(method: Method, family: str) -> Tried:
    """Attach and merge; what goes wrong on the way, other than a refusal, the rules will tell."""
    case = case_of(method, family)
    model, found = case.model(), Tried()
    keys = set(model.state_dict())
    try:
        case.attach(model)
        deltas = [d for p in need_state(model).placed.values() for _, d in p.adapter.placed]
        found = Tried(any(d.replaces for d in deltas))
        inlay.merge(model, [f"{NAME}/subject"], undo=False)
    except CannotMerge:
        return found
    except Exception:
        return dataclasses.replace(found, merges=True)
    return dataclasses.replace(found, merges=True, adds_biases=not set(model.state_dict()) <= keys)


def rounds(method: Method, family: str) -> bool:
    """Return whether the output at the start differs by what rounding explains, and no more."""
    differs = []
    for dtype, small in SMALL.items():
        case = case_of(method, family, dtype)
        model = case.model()
        plain = output(model)
        try:
            case.attach(model)
            off = share(output(model), plain)
        except Exception:  # the rules will tell
            return False
        if off > small:
            return False
        differs.append(off > 0)
    return any(differs)


def abilities(found: dict[Key, Tried]) -> dict[str, Any]:
    """Return what `MethodConformance` wants to know, from what was seen for each (method, family)."""

    def merges(method: Method, family: str) -> bool:
        return found[dataclasses.replace(method, **dict.fromkeys(PLACES)), family].merges

    seen = {tried.merges for tried in found.values()}
    return {
        "merges": seen.pop() if len(seen) == 1 else staticmethod(merges),
        "adds_biases": any(tried.adds_biases for tried in found.values()),
        "replaces": any(tried.replaces for tried in found.values()),
    }
