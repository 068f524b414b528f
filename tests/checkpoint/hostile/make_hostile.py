"""Makes the folders beside this file: each a checkpoint that differs from `harmless` in one thing.

    python tests/checkpoint/hostile/make_hostile.py

Every digest is right: whoever means harm computes it too. `test_hostile.py` checks that the folders
are what this makes, and that each is refused for its own reason.
"""

from __future__ import annotations

import copy
import json
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Content = dict[str, Any]


@dataclass(frozen=True)
class Hostile:
    """One hostile folder: the change that makes it, and what the refusal must say."""

    says: str
    content: Callable[[Content], Any] | None = None
    data: Callable[[bytes], bytes] | None = None
    text: Callable[[str], bytes] | None = None
    place: Callable[[Path], Any] | None = None


def part(**changes: Any) -> Callable[[Content], None]:
    return lambda m: m["parts"][0].update(changes)


def settings(**changes: Any) -> Callable[[Content], None]:
    return lambda m: m["parts"][0]["settings"].update(changes)


def written(old: str, new: str) -> Callable[[str], bytes]:
    """Replace what stands in the manifest's text, once."""

    def change(text: str) -> bytes:
        assert text.count(old) == 1, old
        return text.replace(old, new).encode("utf-8", "surrogatepass")

    return change


def nested(depth: int) -> Any:
    method: Any = {"method": "lora", "settings": {}}
    for _ in range(depth):
        method = {"method": "lora", "settings": {"targets": method}}
    return method


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Change the header of the tensors file, its data left as they are."""

    def changed(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + size])
        text = change(entries)
        text = (json.dumps(entries) if text is None else text).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return changed


def linked(name: str | None) -> Callable[[Path], None]:
    """Move a file away and leave a link to it in its place (None: the tensors file)."""

    def place(folder: Path) -> None:
        file = folder / (name or json.loads((folder / "inlay.json").read_text())["tensors"])
        target = folder.parent / "harmless" / (name or file.name)
        file.unlink()
        file.symlink_to(Path("..") / "harmless" / target.name)

    return place


HOSTILE: dict[str, Hostile] = {
    # sizes
    "a-rank-of-five-million": Hostile("rank is larger than", settings(rank=5_000_000)),
    "a-rank-beyond-memory": Hostile("rank is larger than", settings(rank=2**52)),
    "a-rank-no-float-holds": Hostile("rank is out of range", settings(rank=2**62)),
    "a-shape-without-data": Hostile(
        "damaged or hostile", data=header(lambda h: h["0/0.up"].update(shape=[5_000_000, 4096]))
    ),
    "an-endless-shape": Hostile(
        "damaged or hostile", data=header(lambda h: h["0/0.up"].update(shape=[2**62, 2**62]))
    ),
    "an-endless-header": Hostile(
        "a header of 18,446,744,073,709,551,615 bytes", data=lambda d: b"\xff" * 8 + d[8:]
    ),
    "a-header-beyond-the-file": Hostile(
        "damaged or hostile", data=lambda d: struct.pack("<Q", 1 << 20) + d[8:]
    ),
    "an-integer-of-70-bits": Hostile("an integer of more than 63 bits", part(seed=2**70)),
    "an-integer-of-5000-digits": Hostile(
        "Exceeds the limit", text=written('"format": 1', '"format": 1' + "0" * 5000)
    ),
    "a-long-text": Hostile("a string of 5,000 characters", part(name="x" * 5000)),
    "a-long-key": Hostile("a string of 5,000 characters", settings(**{"x" * 5000: 1})),
    "a-long-name": Hostile("cannot be the name of a part", part(name="x" * 201)),
    "many-parts": Hostile("65 parts, 1 to 64", lambda m: m.update(parts=m["parts"] * 65)),
    "no-parts": Hostile("0 parts, 1 to 64", lambda m: m.update(parts=[])),
    "many-sites": Hostile("20,001 sites", part(sites=[str(i) for i in range(20_001)])),
    "one-site-many-times": Hostile("20,000 sites: at most 20,000 different", part(sites=["0"] * 20_000)),
    "no-sites": Hostile("a part without sites", part(sites=[])),
    "layers-without-end": Hostile(
        "has the wrong type|cannot be read|wrong shape", settings(layers={"0": "0-99999999999"})
    ),
    # nesting
    "deep-lists": Hostile("damaged or hostile", text=lambda t: b"[" * 50_000),
    "deep-objects": Hostile("damaged or hostile", text=lambda t: b'{"a":' * 20_000),
    "deep-settings": Hostile(
        "values nested deeper than 16", settings(targets=[[[[[[[[[[[[[[["0"]]]]]]]]]]]]]]])
    ),
    "deep-composites": Hostile("values nested deeper than 16", settings(targets=nested(30))),
    "composites-in-composites": Hostile("has the wrong type", settings(targets=nested(3))),
    "many-composites": Hostile("65 methods inside, at most 64", settings(targets=[nested(0)] * 64)),
    # JSON that means two things, or nothing
    "a-key-twice": Hostile(
        "the key 'format' stands twice", text=written('"format": 1,', '"format": 1, "format": 1,')
    ),
    "a-setting-twice": Hostile(
        "the key 'rank' stands twice", text=written('"rank": 1', '"rank": 1, "rank": 5000000')
    ),
    "not-a-number": Hostile("NaN is not a number", text=written('"seed": 0', '"seed": NaN')),
    "minus-infinity": Hostile("-Infinity is not a number", text=written('"seed": 0', '"seed": -Infinity')),
    "one-e-999": Hostile("1e999 is not finite", text=written('"seed": 0', '"seed": 1e999')),
    "a-comment": Hostile("damaged or hostile", text=written('"format": 1,', '"format": 1, // one')),
    "two-documents": Hostile("damaged or hostile", text=lambda t: (t + "{}").encode()),
    "utf-16": Hostile("damaged or hostile", text=lambda t: t.encode("utf-16")),
    "a-byte-order-mark": Hostile("damaged or hostile", text=lambda t: b"\xef\xbb\xbf" + t.encode()),
    "half-a-character": Hostile("damaged or hostile", text=written('"name": "lora"', '"name": "\ud800"')),
    "half-a-character-escaped": Hostile("cannot be the name of a part", part(name="\ud800")),
    "nothing": Hostile("damaged or hostile", text=lambda t: b""),
    # the wrong sort of value
    "a-list": Hostile("does not have the keys", text=lambda t: b"[]"),
    "a-text": Hostile("does not have the keys", text=lambda t: b'"inlay"'),
    "parts-as-an-object": Hostile(
        "parts is a dict, not a list", lambda m: m.update(parts={"0": m["parts"][0]})
    ),
    "a-part-as-a-text": Hostile("a part does not have the keys", lambda m: m.update(parts=["lora"])),
    "an-unknown-key": Hostile("does not have the keys", lambda m: m.update(run="rm -rf ~")),
    "an-unknown-key-in-a-part": Hostile("a part does not have the keys", part(module="os")),
    "a-missing-key": Hostile("does not have the keys", lambda m: m.pop("base")),
    "a-missing-key-in-a-part": Hostile("a part does not have the keys", lambda m: m["parts"][0].pop("sites")),
    "sites-that-are-numbers": Hostile("sites: at most", part(sites=[0, 1])),
    "calibration-of-lists": Hostile("calibration tensors: at most", part(calibration=[["0"]])),
    "a-base-of-nothing": Hostile("the base does not have the keys", lambda m: m.update(base={})),
    "left-out-as-a-number": Hostile("left_out is a int, not a list", lambda m: m["base"].update(left_out=5)),
    "left-out-as-objects": Hostile("tensors left out: at most", lambda m: m["base"].update(left_out=[{}])),
    "true-as-a-format": Hostile("format is a bool, not a int", lambda m: m.update(format=True)),
    "another-format": Hostile("format 2, this inlay reads 1", lambda m: m.update(format=2)),
    "a-version-as-a-text": Hostile("method_version is a str, not a int", part(method_version="1")),
    "a-seed-as-a-float": Hostile("seed is a float, not a int", part(seed=0.5)),
    # names that reach a terminal, or a shell
    "an-escape-as-a-name": Hostile("cannot be the name of a part", part(name="\x1b[2Jlora")),
    "a-slash-in-a-name": Hostile("cannot be the name of a part", part(name="../lora")),
    "text-turned-around": Hostile("cannot be the name of a part", part(name="lora\u202egnp")),
    "two-parts-of-one-name": Hostile("same name", lambda m: m.update(parts=m["parts"] * 2)),
    "an-escape-as-a-method": Hostile(r"needs the method '\\x1b\[31mlora'", part(method="\x1b[31mlora")),
    "markup-as-a-method": Hostile(r"needs the method '\[red\]lora\[/red\]'", part(method="[red]lora[/red]")),
    "a-module-as-a-method": Hostile("needs the method 'os:system'", part(method="os:system")),
    "a-path-as-a-method": Hostile("needs the method", part(method="../../evil.py")),
    "no-name-as-a-method": Hostile("needs the method ''", part(method="")),
    "a-shell-as-a-package": Hostile(
        "saved with 'x; rm -rf ~'", part(method="gizmo", distribution="x; rm -rf ~")
    ),
    "an-escape-as-a-class": Hostile(r"\\x1b\]0;", lambda m: m["base"].update(architecture="\x1b]0;evil\x07")),
    "an-escape-as-a-site": Hostile(r"no site '\\x1b\[31m'", part(sites=["\x1b[31m", "1"])),
    "an-escape-as-a-setting": Hostile(r"no setting '\\x1b\[31m'", settings(**{"\x1b[31m": 1})),
    "an-escape-as-a-format": Hostile(r"format '\\x1b\[31m'", lambda m: m.update(format="\x1b[31m")),
    # files that are not the folder's own
    "tensors-outside": Hostile(
        "the tensors file has the name", lambda m: m.update(tensors="../harmless/" + m["tensors"])
    ),
    "tensors-anywhere": Hostile("the tensors file has the name", lambda m: m.update(tensors="/etc/passwd")),
    "tensors-of-windows": Hostile(
        "the tensors file has the name", lambda m: m.update(tensors="..\\" + m["tensors"])
    ),
    "tensors-of-two-lines": Hostile(
        "the tensors file has the name", lambda m: m.update(tensors=m["tensors"] + "\n")
    ),
    "tensors-with-a-null": Hostile(
        "the tensors file has the name", lambda m: m.update(tensors="adapter-\0.safetensors")
    ),
    "the-manifest-as-tensors": Hostile(
        "the tensors file has the name", lambda m: m.update(tensors="inlay.json")
    ),
    "tensors-elsewhere-by-a-link": Hostile("missing or not a regular file", place=linked(None)),
    "a-manifest-by-a-link": Hostile("missing or not a regular file", place=linked("inlay.json")),
    # tensors that are not what they should be
    "a-pickle": Hostile("damaged or hostile", data=lambda d: b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    "tensors-of-one-byte": Hostile("damaged or hostile", data=lambda d: b"\0"),
    "no-tensors": Hostile("damaged or hostile", data=lambda d: b""),
    "a-key-twice-in-the-header": Hostile(
        "damaged or hostile",
        data=header(
            lambda h: (
                json.dumps(h)[:-1] + ', "0/0.up": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
            )
        ),
    ),
    "tensors-on-top-of-each-other": Hostile(
        "damaged or hostile",
        data=header(lambda h: h["0/0.up"].update(data_offsets=h["0/0.down"]["data_offsets"])),
    ),
    "data-of-no-tensor": Hostile(
        "damaged or hostile", data=lambda d: d + b"PK\x03\x04 an archive behind the tensors"
    ),
    "a-negative-shape": Hostile(
        "damaged or hostile", data=header(lambda h: h["0/0.up"].update(shape=[-64, -1]))
    ),
    "codes-for-floats": Hostile("wrong dtype", data=header(lambda h: h["0/0.up"].update(dtype="I32"))),
    "a-header-of-lists": Hostile("damaged or hostile", data=header(lambda h: "[" * 10_000)),
    "a-tensor-of-no-part": Hostile(
        "belongs to no part", data=header(lambda h: h.update({"7/0.up": h.pop("0/0.up")}))
    ),
    "a-tensor-that-escapes": Hostile(
        r"'\\x1b\[31m' belongs to no part", data=header(lambda h: h.update({"\x1b[31m": h.pop("0/0.up")}))
    ),
    "values-not-finite": Hostile("not finite", data=lambda d: d[:-4] + struct.pack("<f", float("nan"))),
    # a version of a method that never was
    "a-version-to-come": Hostile(
        "this version of 'lora' cannot read the checkpoint", part(method_version=99)
    ),
    "a-version-before-the-first": Hostile(
        "this version of 'lora' cannot read the checkpoint", part(method_version=-1)
    ),
    "a-wrong-digest": Hostile(
        "does not have the digest it names",
        place=lambda f: (f / "inlay.json").write_text(
            (f / "inlay.json").read_text().replace('"seed": 0', '"seed": 1')
        ),
    ),
}


def make(where: Path) -> None:
    """Write every folder below `where`, and `harmless` beside them."""
    sys.path.insert(0, str(HERE.parent))
    import folders

    harmless = where / "harmless"
    folders.saved(harmless)
    content = folders.manifest_of(harmless)
    data = (harmless / content["tensors"]).read_bytes()
    (harmless / content["tensors"]).unlink()
    content["versions"] = {"inlay": "0.1.0", "torch": "2.13.0"}
    content["parts"][0].update(settings={"rank": 1}, distribution="inlay-lora", version="0.1.0")
    folders.put(harmless, content, data)
    for name, hostile in HOSTILE.items():
        mine = copy.deepcopy(content)
        folder = where / name
        if hostile.content is not None:
            hostile.content(mine)
        if hostile.data is not None or hostile.text is None:
            changed = data if hostile.data is None else hostile.data(data)
            tensors = mine["tensors"]
            folders.put(folder, mine, changed)
            if hostile.data is None and tensors != content["tensors"]:
                mine["tensors"] = tensors
                folders.put(folder, mine)
        else:
            folders.put(folder, mine, data)
            (folder / "inlay.json").write_bytes(hostile.text((folder / "inlay.json").read_text()))
        if hostile.place is not None:
            hostile.place(folder)


if __name__ == "__main__":
    for old in HERE.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
    make(HERE)
