"""What a manifest may choose: methods, packages, settings, sites; and what a user expects of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import folders
import pytest
from folders import edit, manifest_of
from torch import nn

import inlay
from inlay.authoring import setting
from inlay.errors import CheckpointError, ConfigError, InlayError, RegistryError
from inlay.registry import registry
from inlay.testing.refusal import refused
from inlay_lora import LoRA
from inlay_scaling import IA3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folders.saved(tmp_path / "fr")


def fresh() -> nn.Module:
    """Return a base that carries another adapter already: it must stay as it is too."""
    model = folders.base()
    inlay.attach(model, IA3(targets=["1"]), "before", seed=5)
    return model


@pytest.mark.parametrize("allow", [[], ["ia3"], ("dora",), {"LoRA"}])
def test_only_allowed_methods_are_chosen(allow: Any, folder: Path) -> None:
    model = fresh()
    match = r"asks for a method that is not allowed here[\s\S]*'lora'[\s\S]*permits only"
    with refused(CheckpointError, match, model=model, folder=folder):
        inlay.load(model, folder, "fr", allow=allow)
    inlay.load(model, folder, "fr", allow=["ia3", "lora"])


@pytest.mark.parametrize("allow", ["lora", "lo", 5])
def test_allow_is_a_list(allow: Any, folder: Path) -> None:
    """In a text, `"lo" in "lora"` would be true."""
    model = fresh()
    with refused(ConfigError, "allow is a list of methods", model=model, folder=folder):
        inlay.load(model, folder, "fr", allow=allow)


def test_methods_inside_settings_must_be_allowed_too(folder: Path) -> None:
    @registry.register
    @dataclass(frozen=True)
    class Around(LoRA):
        id: ClassVar[str] = "around"
        inner: Any = setting(None)

    try:
        inner = {"method": "ia3", "settings": {"targets": ["0"]}}
        edit(
            folder, lambda m: m["parts"][0].update(method="around", settings={"rank": 1, "inner": [[inner]]})
        )
        model = fresh()
        with refused(CheckpointError, r"not allowed here[\s\S]*'ia3'", model=model):
            inlay.load(model, folder, "fr", allow=["around"])
        inlay.load(model, folder, "fr", allow=["around", "ia3"])
        inner["method"] = "no_such"
        edit(folder, lambda m: m["parts"][0]["settings"].update(inner=inner))
        with refused(RegistryError, r"needs the method 'no_such', which is not installed") as caught:
            inlay.load(fresh(), folder, "fr")
        assert "pip install" not in caught.error.do  # the part's package is around's, not no_such's
        inner["method"] = "ia3"
        edit(folder, lambda m: m["parts"][0]["settings"].update(inner=[inner] * 64))
        with refused(CheckpointError, "a part with 65 methods inside, at most 64 are read"):
            inlay.load(fresh(), folder, "fr")
    finally:
        registry.forget(Around)


def test_an_expected_digest_is_compared(folder: Path) -> None:
    content, model = manifest_of(folder), fresh()
    digest, tensors_alone = content["digest"], content["tensors"][8:72]
    for wrong in ("0" * 64, "", 5, digest.upper(), digest[:-1], tensors_alone):
        with refused(
            CheckpointError,
            r"this is not the checkpoint you expected[\s\S]*get the checkpoint from its author",
            model=model,
        ):
            inlay.load(model, folder, "fr", expected_digest=wrong)
    inlay.load(model, folder, "fr", expected_digest=digest)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["parts"][0]["settings"].update(alpha=1000.0),
        lambda m: m["parts"][0].update(name="trusted"),
        lambda m: m["parts"][0].update(sites=["1", "0"]),
        lambda m: m["base"].update(weights="0" * 64),
    ],
)
def test_a_changed_manifest_is_not_the_one_expected(change: Any, folder: Path) -> None:
    """The tensors are the same: a digest of them alone would let these pass."""
    digest = inlay.save(folders.adapted(), folder)
    edit(folder, change)
    model = fresh()
    with refused(CheckpointError, "this is not the checkpoint you expected", model=model, folder=folder):
        inlay.load(model, folder, "fr", expected_digest=digest)


def test_a_method_that_is_not_installed_names_its_package(folder: Path) -> None:
    edit(folder, lambda m: m["parts"][0].update(method="gizmo", distribution="inlay-random", version="0.4"))
    model = fresh()
    match = r"needs the method 'gizmo', which is not installed[\s\S]*saved with 'inlay-random' '0\.4'"
    with refused(RegistryError, match, model=model, folder=folder) as caught:
        inlay.load(model, folder, "fr")
    assert caught.error.do.startswith("pip install inlay-random ")


@pytest.mark.parametrize(
    "package",
    [
        "inlay; rm -rf ~",
        "--index-url=http://evil",
        "a b",
        "../evil",
        "\x1b[31m",
        "",
        "-r",
        "x" * 200,
        "inlay\n",
    ],
)
def test_a_package_that_is_no_name_is_not_offered_to_a_shell(package: str, folder: Path) -> None:
    edit(folder, lambda m: m["parts"][0].update(method="gizmo", distribution=package))
    with refused(RegistryError, "needs the method 'gizmo'") as caught:
        inlay.load(fresh(), folder, "fr")
    assert "pip" not in caught.error.do


def test_a_broken_plugin_stops_only_its_own_checkpoints(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "plugin" / "broken_pack-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-pack\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[inlay.methods]\nbroken = broken_pack:Broken\n")
    (tmp_path / "plugin" / "broken_pack.py").write_text("raise OSError('no licence')")
    monkeypatch.syspath_prepend(tmp_path / "plugin")
    model = fresh()
    inlay.load(model, folder, "fine")
    edit(folder, lambda m: m["parts"][0].update(method="broken"))
    with refused(
        RegistryError,
        r"method 'broken' failed to import[\s\S]*OSError: no licence in broken-pack 1\.0",
        model=model,
    ):
        inlay.load(model, folder, "fr")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank": 0}, "LoRA: rank is out of range"),
        ({"rank": "8"}, "LoRA: rank has the wrong type"),
        ({"rnak": 1}, "no setting 'rnak'"),
        ({"rank": None}, "wrong type"),
        ({"rank": {"a": 1}}, "rank says nothing of a target"),
        ({"targets": "0"}, "wrong type"),
        ({"rank": 1, "\x1b[31m": 1}, r"no setting '\\x1b\[31m'"),
        ({"bias": "\x1b]0;title\x07"}, r"bias='\\x1b\]0;title\\x07'"),
    ],
)
def test_settings_are_checked_as_a_users_are(settings: Any, match: str, folder: Path) -> None:
    edit(folder, lambda m: m["parts"][0].update(settings=settings))
    model = fresh()
    with refused(ConfigError, match, model=model, folder=folder):
        inlay.load(model, folder, "fr")


@pytest.mark.parametrize("sites", [["0", "2"], ["0", "1.weight"], [""], ["0", "\x1b[31m"], ["0", "inlay"]])
def test_sites_the_model_lacks_are_refused(sites: list[str], folder: Path) -> None:
    edit(folder, lambda m: m["parts"][0].update(sites=sites))
    model = fresh()
    with refused(InlayError, "this Sequential has no site", model=model, folder=folder):
        inlay.load(model, folder, "fr")


def test_sites_of_another_stack_are_refused_by_their_tensors(folder: Path) -> None:
    for sites, match in ((["0"], "has unknown tensors"), (["0", "before"], "no site 'before'")):
        edit(folder, lambda m, sites=sites: m["parts"][0].update(sites=sites))
        with refused(InlayError, match):
            inlay.load(fresh(), folder, "fr")
