"""R15 to R19: checkpoints, copies, and the base's own ways of being saved and loaded."""

from __future__ import annotations

import copy
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import inlay
from inlay.testing import elsewhere
from inlay.testing.cases import NAME, Case, tiny
from inlay.testing.effects import acting, output, output_of, same_output, tensors_of, train
from inlay.testing.rule import need, rule
from inlay.testing.snapshots import digest, same_bits


def reloaded(kind: Any, folder: str) -> nn.Module:
    """Return the float32 model in a transformers folder.

    Its tensors are copied: those mapped from a file lie at odd addresses, where sums round otherwise.
    """
    model: nn.Module = kind.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def trained(case: Case) -> nn.Module:
    """Return a model whose stack has learnt a little and has an effect."""
    model = acting(case)
    train(model, "SGD", steps=1)
    return model


@rule(
    "R15",
    "A checkpoint brings everything back",
    means="loaded onto a fresh base, a saved stack has the same tensors and gives the same output bit for"
    " bit; so does each part alone; saving twice writes the same file.",
    usually="a tensor is neither a parameter nor a persistent buffer, or inject does not rebuild the same "
    "modules from configuration, sites and data.",
)
def survives_saving(case: Case) -> None:
    model = trained(case)
    own = tensors_of(model)
    with tempfile.TemporaryDirectory() as folder:
        whole, again = Path(folder, "whole"), Path(folder, "again")
        need(inlay.save(model, whole) == inlay.save(model, again), "saving twice gave two digests")
        fresh = case.model()
        count = inlay.load(fresh, whole, NAME)
        need(count == len(own), f"load counted {count} tensors of {len(own)}")
        loaded = tensors_of(fresh)
        wrong = sorted(own.keys() ^ loaded.keys()) or [k for k in own if not same_bits(own[k], loaded[k])]
        need(not wrong, f"the loaded adapter differs in {wrong[:1]} ({len(wrong)} in all)")
        same_output(output(model), output(fresh), "loading")
        for member in case.members if len(case.members) > 1 else ():
            path = f"{NAME}/{member.name}"
            inlay.save(model, Path(folder, member.name), path)
            fresh = case.model()
            inlay.load(fresh, Path(folder, member.name), "alone")
            same_output(output_of(model, path), output(fresh), f"loading {path} alone")


@rule(
    "R16",
    "A checkpoint loads in another process",
    means="a fresh interpreter that never saw the model loads the checkpoint and computes the very same "
    "bits.",
    usually="something depends on the process: hash order, object ids, torch's generator, a registration.",
    share=0.5,
    costly=True,
)
def loads_elsewhere(case: Case) -> None:
    model, modules = trained(case), {type(m.method).__module__ for m in case.members}
    with tempfile.TemporaryDirectory() as folder:
        inlay.save(model, folder)
        answer = elsewhere.ask(
            folder=folder, family=case.family, seed=case.seed, dtype=str(case.dtype).removeprefix("torch."),
            modules={name: sys.modules[name].__file__ for name in modules},
        )  # fmt: skip
    need("error" not in answer, f"the other process failed: {answer.get('error')}")
    need(answer["digest"] == digest({"logits": output(model)}), "the other process computed other bits")


@rule(
    "R17",
    "Copies are copies",
    means="deepcopy and pickle give models with the same output, on which use and detach work, and which "
    "share nothing with the original.",
    usually="a delta keeps a module or the site outside of core's reach, a lambda, or a class made on the "
    "fly.",
)
def copies_work(case: Case) -> None:
    model = trained(case)
    shown, plain = output(model), output_of(model)
    for how, copied in {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
    }.items():
        same_output(shown, output(copied), how)
        same_output(plain, output_of(copied), f"use on a {how}")
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(1)
        same_output(shown, output(model), f"changing a {how} and then the original")
        inlay.detach(copied)
        same_output(shown, output(model), f"detaching from a {how} and then the original")
        need(type(copied) is type(case.model()), f"a detached {how} keeps a class of ours")


@rule(
    "R18",
    "The base's state_dict loads while adapted",
    means="state_dict() holds the base's keys unchanged and the adapters' beside them; a plain base "
    "state_dict loads strictly, changes the base and leaves the adapters.",
    usually="a delta is registered outside core's container, or reads base tensors it copied when made.",
)
def base_loads_strictly(case: Case) -> None:
    model, keys = trained(case), list(case.model().state_dict())
    extra = [k for k in model.state_dict() if k not in set(keys)]
    need([k for k in model.state_dict() if k not in set(extra)] == keys, "the base's keys changed")
    need(extra and all("inlay" in k.split(".") for k in extra), "adapter keys are not under 'inlay'")
    other = tiny(case.family, seed=case.seed + 1, dtype=case.dtype)
    own, shown = tensors_of(model), output(model)
    kept = copy.deepcopy(model.state_dict())
    model.load_state_dict(other.state_dict(), strict=True)
    same_output(output(other), output_of(model), "loading another base's state_dict")
    wrong = [k for k, t in tensors_of(model).items() if not same_bits(t, own[k])]
    need(not wrong, f"loading a base changed {wrong[:1]} of the adapter")
    model.load_state_dict(kept, strict=True)
    same_output(shown, output(model), "loading the adapted model's own state_dict")


@rule(
    "R19",
    "save_pretrained writes base and stack",
    means="save_pretrained of an adapted model writes the base alone, which from_pretrained loads, and "
    "the stack beside it, which inlay.load brings back: same bits both times.",
    usually="as R15 and R18; or save_pretrained met a key it does not know.",
    dtypes=("float32",),
    share=0.7,
)
def survives_save_pretrained(case: Case) -> None:
    kind, model = type(case.model()), trained(case)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        fresh = reloaded(kind, folder)
        same_output(output_of(model), output(fresh), "from_pretrained")
        inlay.load(fresh, folder, NAME)
        same_output(output(model), output(fresh), "from_pretrained and load")
