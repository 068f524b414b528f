"""How much code there is: core as a whole, each file of it, and each method.

Goals: core ≤ 3,000 lines of code, a method ≤ 80; see `counting.py` for what counts.
"""

from __future__ import annotations

from common import ROOT, report
from counting import code_lines, method_lines

import inlay

CORE, METHOD = 3000, 80


def main() -> None:
    files = {str(p.relative_to(ROOT)): code_lines(p.read_text())
             for p in sorted((ROOT / "core" / "inlay").rglob("*.py"))}  # fmt: skip
    total = sum(files.values())
    kit = sum(lines for path, lines in files.items() if "/testing/" in path)
    rows = [_row("core", total, CORE), _row("core without inlay.testing", total - kit, CORE)]
    offers = {name: origin.value for name, origin in inlay.methods().items()}
    counted = method_lines(offers)
    rows += [_row(name, lines, METHOD) for name, lines in sorted(counted.items()) if name in offers]
    rows += [_row(name, lines, None) for name, lines in sorted(counted.items()) if name not in offers]
    report("size", rows, files=files)


def _row(what: str, lines: int, goal: int | None) -> dict[str, object]:
    kept: object = "" if goal is None else lines <= goal
    return {"what": what, "lines": lines, "goal": "" if goal is None else goal, "kept": kept}


if __name__ == "__main__":
    main()
