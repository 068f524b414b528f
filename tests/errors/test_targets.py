"""Targets that do not name what the user thinks: refused as a whole, with the nearest names."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import inlay
from inlay.anatomy import Anatomy
from inlay.errors import ConfigError, TargetError
from inlay.targets import by_name, resolve
from inlay.testing.models import FAMILIES, build
from inlay.testing.refusal import refused
from inlay_lora import DoRA, LoRA
from inlay_prefix import PrefixTuning
from inlay_scaling import IA3
from inlay_selective import BitFit

MODELS = {family: build(family) for family in FAMILIES}

NOTHING = {
    "one misspelt of two": (
        "llama",
        LoRA(targets=["q_proj", "v_porj"]),
        r"target 'v_porj' matches nothing.*[\s\S]*did you mean 'v_proj'",
    ),
    "one of five, in the middle": (
        "bert",
        LoRA(targets=["query", "key", "valeu", "up", "down"]),
        "target 'valeu' matches nothing",
    ),
    "a glob over nothing": (
        "gpt2",
        LoRA(targets=["*.mlp.*", "*.mpl.*"]),
        r"target '\*\.mpl\.\*' matches nothing",
    ),
    "an unfinished glob": ("llama", LoRA(targets=["*.[q_proj"]), r"matches nothing in this LlamaForCausalLM"),
    "an empty text": ("llama", LoRA(targets=[""]), "target '' matches nothing"),
    "a path of another model": (
        "bert",
        LoRA(targets=["model.layers.0.self_attn.q_proj"]),
        "matches nothing in this BertFor",
    ),
    "half a path component": ("llama", LoRA(targets=["proj"]), "target 'proj' matches nothing"),
    "case": ("llama", LoRA(targets=["Q_proj"]), r"matches nothing.*[\s\S]*did you mean 'q_proj'"),
    "a second part": (
        "llama",
        LoRA() + IA3(targets=["k_proj", "dwon_proj"]),
        "target 'dwon_proj' matches nothing",
    ),
    "in train=": ("bert", LoRA(), "target 'haed' matches nothing"),
}

ROLES = {
    "no gate": (
        "bert",
        LoRA(targets=["query", "gate"]),
        r"has no 'gate' that lora could act on[\s\S]*roles found here: .*\bup\b",
    ),
    "no cross-attention": ("llama", LoRA(targets=["cross_attention"]), "has no 'cross_attention'"),
    "no embedding of tokens": ("vit", DoRA(targets=["embedding"]), "has no 'embedding'"),
    "a block for LoRA": ("llama", LoRA(targets=["block"]), "has no 'block' that lora could act on"),
    "layers for a prefix": (
        "llama",
        PrefixTuning(targets=["query"]),
        "has no 'query' that prefix_tuning could act on",
    ),
}

UNSUITED = {
    "a container for LoRA": ("llama", LoRA(targets=["self_attn"]), "names modules that lora cannot act on"),
    "a norm for LoRA": ("llama", LoRA(targets=["input_layernorm"]), "names modules that lora cannot act on"),
    "a layer for a prefix": (
        "llama",
        PrefixTuning(targets=["q_proj"]),
        "names modules that prefix_tuning cannot act on",
    ),
    "biases where there are none": (
        "llama",
        BitFit(targets=["q_proj"]),
        r"does not suit what 'q_proj' names[\s\S]*do:.*have no bias",
    ),
    "no targets": ("llama", LoRA(targets=[]), "lora has no targets"),
}

LAYERS = {
    "beyond the last": ((0, 2), r"layers name blocks this model lacks[\s\S]*layers \[2\]; it has 0 to 1"),
    "a range beyond": (range(4), r"layers \[2, 3\]"),
    "negative": ((-1,), r"layers \[-1\]"),
    "one number": (7, r"layers \[7\]"),
    "none": ((), "lora has no layers"),
    "words": ("first", "the layers cannot be read"),
    "no end": ("0-", "the layers cannot be read"),
    "backwards": ("1-0", "the layers cannot be read"),
    "empty": ("", "the layers cannot be read"),
    "an empty piece": ("0,,1", "the layers cannot be read"),
    "other digits": ("²", "the layers cannot be read"),
    "a trillion": ("0-999999999999", "the layers cannot be read"),
    "many missing are cut": ("0-9999", r"layers \[2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13\];"),
}


@pytest.mark.parametrize(
    ("family", "stack", "match"),
    [*NOTHING.values(), *ROLES.values(), *UNSUITED.values()],
    ids=[*NOTHING, *ROLES, *UNSUITED],
)
def test_a_target_that_names_nothing_is_refused(family: str, stack: Any, match: str) -> None:
    model = MODELS[family]
    train = ("head", "haed") if "haed" in match else ()
    with refused(TargetError, match, model=model):
        inlay.plan(model, stack, train=train)
    with refused(TargetError, match, model=model):
        inlay.attach(model, stack, train=train)


@pytest.mark.parametrize(("layers", "match"), LAYERS.values(), ids=LAYERS)
def test_layers_that_are_not_there_are_refused(layers: Any, match: str) -> None:
    with refused(TargetError, match, model=MODELS["llama"]):
        inlay.attach(MODELS["llama"], LoRA(layers=layers))


def test_layers_that_are_there_are_taken() -> None:
    model = MODELS["llama"]
    for layers in (1, [1], "1", " 1 ", "1-1", range(1, 2)):
        assert [s.layer for s in inlay.plan(model, LoRA(layers=layers)).parts[0].sites] == [1, 1]
    assert len(inlay.plan(model, LoRA(layers="0-1")).parts[0].sites) == 4


def test_an_adapted_model_is_untouched_too() -> None:
    model = build("llama")
    inlay.attach(model, LoRA(), "fr")
    with refused(TargetError, "matches nothing", model=model):
        inlay.attach(model, IA3(targets=["value", "vlaue"]), "de")


@pytest.mark.parametrize("train", ["head", 5, {"head"}])
def test_train_that_is_no_list_is_refused(train: Any) -> None:
    with refused(ConfigError, "train is a list of targets", model=MODELS["bert"]):
        inlay.attach(MODELS["bert"], LoRA(), train=train)


@pytest.mark.parametrize("seed", ["0", 1.0, -1, 2**60])
def test_a_seed_that_is_no_number_is_refused(seed: Any) -> None:
    with refused(ConfigError, "this cannot be a seed", model=MODELS["bert"]):
        inlay.attach(MODELS["bert"], LoRA(), seed=seed)


@pytest.mark.parametrize("thing", [None, "bert-base-uncased", {}, nn.Linear])
def test_what_is_no_model_is_refused(thing: Any) -> None:
    with refused(ConfigError, "attach needs a torch module"):
        inlay.attach(thing, LoRA())
    with refused(ConfigError, "plan needs a torch module"):
        inlay.plan(thing, LoRA())


@pytest.mark.parametrize("thing", [None, LoRA, 3, {"rank": 8}, [LoRA()]])
def test_what_is_no_stack_is_refused(thing: Any) -> None:
    with refused(ConfigError, "not a method, a part, a stack or text", model=MODELS["bert"]):
        inlay.attach(MODELS["bert"], thing)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_has_a_name_of_its_own(family: str) -> None:
    """A checkpoint lists sites by name, and a composite may act on all sorts of them."""
    anatomy = Anatomy(MODELS[family])
    sites = [*anatomy.leaves, *anatomy.sublayers, *anatomy.attentions, *anatomy.block_sites()]
    sites += anatomy.sequence_sites()
    assert len({site.name for site in sites}) == len(sites)


def test_a_site_of_another_model_is_refused() -> None:
    with refused(TargetError, r"this BertFor\w+ has no site 'model\.layers\.0\.self_attn\.q_proj'"):
        by_name(Anatomy(MODELS["bert"]), LoRA(), ["model.layers.0.self_attn.q_proj"])


NAMES = sorted(
    {part for model in MODELS.values() for name, _ in model.named_modules() for part in name.split(".")}
)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.lists(
        st.sampled_from(NAMES).flatmap(lambda n: st.sampled_from([n, n[::-1], f"*{n}*", n + "x"])),
        min_size=1,
        max_size=3,
    ),
)
def test_every_entry_matches_or_nothing_is_done(family: str, targets: list[str]) -> None:
    model = MODELS[family]
    anatomy = Anatomy(model)
    try:
        sites = resolve(anatomy, LoRA(targets=targets))
    except TargetError:
        with refused(TargetError, "|".join(re.escape(repr(entry)) for entry in targets)):
            resolve(anatomy, LoRA(targets=targets))
        return
    for entry in targets:
        alone = {s.name for s in resolve(anatomy, LoRA(targets=[entry]))}
        assert alone
        assert alone <= {s.name for s in sites}


def test_a_role_on_both_sides_asks_which_is_meant() -> None:
    model = build("t5")
    match = (
        r"'query' is in the encoder and in the decoder of this T5For[\s\S]*2 in the encoder, 4 in the decoder"
    )
    with refused(TargetError, match, model=model):
        inlay.attach(model, LoRA(targets=["query"]))
    sides = {t: inlay.plan(model, LoRA(targets=[t])).parts[0].sites for t in
             ("encoder.query", "decoder.query", "both.query", "cross_attention")}  # fmt: skip
    assert {s.side for s in sides["encoder.query"]} == {"encoder"}
    assert {s.side for s in sides["decoder.query"]} == {"decoder"}
    assert len(sides["both.query"]) == len(sides["encoder.query"]) + len(sides["decoder.query"]) == 6
    inlay.plan(model, LoRA(targets=["linear"]))  # all layers are all layers
    inlay.plan(model, LoRA())  # and a method's own default its paper's setting
    inlay.plan(build("llama"), LoRA(targets=["both.query"]))
