"""Packages and methods for the tests of this folder: as they should be, to be broken in one thing each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from inlay.authoring import Method, OutputDelta, hookimpl

Install = Callable[..., Path]

SHIFT = """
    from dataclasses import dataclass
    from typing import ClassVar
    from inlay.authoring import Method, OutputDelta, setting

    class Constant(OutputDelta):
        def __init__(self, site, init):
            super().__init__()
            self.value = init.zeros(site.out_features)

        def forward(self, x, y, at):
            return self.value

    @dataclass(frozen=True)
    class Shift(Method):
        id: ClassVar[str] = {name!r}
        size: int = setting(1, least=1)

        def delta(self, site, init):
            return Constant(site, init)
"""

OBSERVER = """
    from inlay.authoring import hookimpl

    class Note:
        seen = []

        @hookimpl(wrapper=True)
        def inject(self, method, sites, adapter):
            Note.seen.append(method.id)
            return (yield)
"""


class Constant(OutputDelta):
    def __init__(self, site: Any, init: Any) -> None:
        super().__init__()
        self.value = init.zeros(site.out_features)

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        return self.value


class Good(Method):
    """A method as it should be; the classes below each break one thing of it."""

    id: ClassVar[str] = "good"
    default_targets: ClassVar[tuple[str, ...]] = ("0",)

    def delta(self, site: Any, init: Any) -> Any:
        return Constant(site, init)


def method(name: str, **attributes: Any) -> Method:
    """Return an instance of a fresh subclass of Good with the given attributes."""
    kind = dataclass(frozen=True)(
        type(name, (Good,), {"id": name.lower(), "__module__": __name__, **attributes})
    )
    return kind()


def hook(function: Callable[..., Any], **options: Any) -> staticmethod[..., Any]:
    return staticmethod(hookimpl(function, **options) if options else hookimpl(function))
