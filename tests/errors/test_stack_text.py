"""Stacks written as text: read, never evaluated."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import inlay
from inlay.errors import ConfigError, InlayError, RegistryError
from inlay.stack import MAX_TEXT, Stack, parse
from inlay.testing.models import build
from inlay.testing.refusal import refused
from inlay_lora import LoRA
from inlay_prefix import PrefixTuning
from inlay_scaling import IA3

READ = {
    "lora": LoRA(),
    "lora()": LoRA(),
    " lora ( rank = 4 ) ": LoRA(rank=4),
    "lora(rank=8) + prefix_tuning(length=16)": LoRA(rank=8) + PrefixTuning(length=16),
    "lora + ia3 + lora(rank=2).named('b')": LoRA() + IA3() + LoRA(rank=2).named("b"),
    "(lora + ia3)": LoRA() + IA3(),
    "lora + (ia3 + prefix_tuning)": LoRA() + (IA3() + PrefixTuning()),
    "lora(targets=['query', \"value\"], layers='0-1')": LoRA(targets=["query", "value"], layers="0-1"),
    "lora(alpha=1e1, dropout=.5)": LoRA(alpha=10.0, dropout=0.5),
    "lora.named('style')": LoRA().named("style"),
}

# What runs code, reads variables or is no stack: each must be refused with the file beside it not written.
HOSTILE = [
    "__import__('os').system('touch {marker}')",
    "__import__('os')",
    "open('{marker}', 'w')",
    "lora(rank=open('{marker}', 'w'))",
    "lora(rank=__import__('os').system('touch {marker}'))",
    "eval(\"open('{marker}', 'w')\")",
    "exec('1')",
    "(lambda: lora)()",
    "lora(rank=(lambda: 8)())",
    "[lora for _ in open('{marker}', 'w')]",
    "lora(targets=[t for t in ('query',)])",
    "lora(rank=(x := 8))",
    "lora(rank=f'{{open(1)}}')",
    "f'{{1}}'",
    "lora.__class__",
    "lora.__init__.__globals__",
    "lora['rank']",
    "lora if True else ia3",
    "lora and ia3",
    "not lora",
    "-lora",
    "lora - ia3",
    "lora * 2",
    "lora @ ia3",
    "lora | ia3",
    "lora(8)",
    "lora(*[8])",
    "lora(**{{'rank': 8}})",
    "lora(rank=rank)",
    "lora(rank=1, rank=2)",
    "lora(rank=2**3)",
    "lora(rank=10**10**10)",
    "lora(targets='query' * 10**9)",
    "lora(rank=...)",
    "lora(rank=lora)",
    "lora()()",
    "lora().named()",
    "lora().named('a', 'b')",
    "lora().named(name='a')",
    "lora().named('a').named('b')",
    "lora().named(x)",
    "lora().to_dict()",
    "lora().nmaed('a')",
    "lora; ia3",
    "lora\nia3",
    "lora + ",
    "+ lora",
    "",
    " ",
    "\0",
    "lora\0",
    "import os",
    "await lora",
    "lora(rank=await x)",
    "lora(rank=8",
    "lora)",
    "'lora'",
    "8",
    "None",
    "lora,",
    "lora(rank={{1: 2, []: 3}})",
    "lora(targets={{'query'}})",
    "lora(rank=\ud800)",
    "lora(rank='\\N{{no such}}')",
    "lora(rank=" + "9" * 5000 + ")",
    "lora(rank=" + "(" * 300 + "8" + ")" * 300 + ")",
    "lora(rank=" + "-" * 3000 + "8)",
    "+".join(["lora"] * 2500),
    "lora" + "+lora" * (MAX_TEXT // 5),
    "lora(alpha=" + "1+" * 3000 + "1)",
    "lora(targets=[" + "'q'," * (MAX_TEXT // 4) + "])",
    "lora # + __import__('os')\n+ ia3 +",
]


class Watch:
    """Notes what an audit hook sees of code run or files written while it is on (hooks cannot be removed)."""

    def __init__(self) -> None:
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes or event in ("exec", "os.system", "subprocess.Popen", "os.exec", "import"):
            self.seen.append(f"{event} {arguments!r:.200}")


WATCH = Watch()


@pytest.mark.parametrize("text", READ)
def test_text_means_what_python_would(text: str) -> None:
    assert parse(text) == Stack.of(READ[text])


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_refused_and_nothing_runs(text: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    text = text.replace("{marker}", str(marker)).replace("{{", "{").replace("}}", "}")
    parse("lora + ia3")  # their code is imported now, not under watch
    WATCH.seen.clear()
    WATCH.on = True
    try:
        with refused(
            InlayError,
            "the text does not describe a stack|has no setting|no installed package offers|"
            "wrong type|out of range|same name|cannot be the name",
        ) as caught:
            parse(text)
    finally:
        WATCH.on = False
    assert isinstance(caught.error, (ConfigError, RegistryError))
    assert not marker.exists()
    assert WATCH.seen == []
    assert len(str(caught.error)) < 2000


def test_the_watch_sees_code_that_runs(tmp_path: Path) -> None:
    WATCH.seen.clear()
    WATCH.on = True
    try:
        eval(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    finally:
        WATCH.on = False
    assert [line.split()[0] for line in WATCH.seen] == ["exec", "open"]


def test_a_text_that_is_too_long_says_so() -> None:
    with refused(ConfigError, r"the text does not describe a stack[\s\S]*at most 10,000 are read"):
        parse("lora" + " " * MAX_TEXT)


def test_what_is_given_twice_is_named() -> None:
    with refused(ConfigError, "rank is given twice"):
        parse("lora(rank=1, alpha=2, rank=2)")
    with refused(ConfigError, r"named\(\) takes one name"):
        parse("lora.named('a', 'b')")
    with refused(ConfigError, "is not a literal value"):
        parse("lora(rank=x)")
    with refused(ConfigError, "is not a method with keyword settings"):
        parse("lora(8)")


def test_a_model_is_untouched_by_text_that_is_refused() -> None:
    model = build("llama")
    for text in ("lora(rank=x)", "lora + nothing_like_it", "lora + lora", "lora(targets=['query', 'vlaue'])"):
        with refused(InlayError, ".", model=model):
            inlay.attach(model, text)


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=40)
    | st.lists(
        st.sampled_from(
            ["lora", "ia3", "(", ")", "+", ".named", "'a'", "rank=", "8", ",", "**", "[", "]", " "]
        ),
        max_size=12,
    ).map("".join)
)
def test_any_text_is_a_stack_or_an_error_in_three_beats(text: str) -> None:
    try:
        stack = parse(text)
    except InlayError:
        with refused(InlayError, "."):
            parse(text)
    else:
        assert 1 <= len(stack.parts) <= 12
