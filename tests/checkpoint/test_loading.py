"""Checkpoints that do not fit, are damaged, or ask for what is not here: refused, the model untouched."""

from __future__ import annotations

import hashlib
import math
import pickle
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import folders
import inlay
import pytest
import torch
from folders import edit, edit_tensors, manifest_of
from inlay.authoring import Adapter, Method, hookimpl, setting
from inlay.errors import CheckpointError, ConfigError, InlayError, RegistryError
from inlay.manifest import FILE, read_manifest
from inlay.registry import registry
from inlay.stack import need_state
from inlay.testing.models import build
from inlay.testing.refusal import refused
from inlay.testing.snapshot import differences, snapshot
from inlay_lora import LoRA
from inlay_scaling import IA3
from torch import Tensor, nn

Spoil = Callable[[Path], Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folders.saved(tmp_path / "fr")


def fresh() -> nn.Module:
    """Return a base that carries another adapter already: it must stay as it is too."""
    model = folders.base()
    inlay.attach(model, IA3(targets=["1"]), "before", seed=5)
    return model


def test_the_folder_that_all_tests_spoil_loads(folder: Path) -> None:
    model = fresh()
    assert inlay.load(model, folder, "fr") == 4
    with torch.no_grad(), inlay.use(model, "fr"):
        assert torch.equal(model(torch.ones(1, 64)), folders.adapted()(torch.ones(1, 64)))


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Spoil:
    return lambda folder: edit_tensors(folder, change)


def filled(value: float, dtype: torch.dtype = torch.float32) -> Spoil:
    def change(t: dict[str, Tensor]) -> None:
        t["0/1.up"] = t["0/1.up"].to(dtype)
        t["0/1.up"][3, 0] = value

    return tensors(change)


def cast(dtype: torch.dtype) -> Spoil:
    return tensors(lambda t: t.update({"0/0.down": t["0/0.down"].to(dtype)}))


TENSORS: dict[str, tuple[Spoil, str]] = {
    "one missing": (tensors(lambda t: t.pop("0/1.up")), r"lacks tensors of 'lora'[\s\S]*'1\.up' and 0 more"),
    "all missing": (tensors(lambda t: t.clear()), r"lacks tensors of 'lora'[\s\S]*and 3 more"),
    "one extra": (tensors(lambda t: t.update({"0/2.up": torch.zeros(1)})), r"has unknown tensors of 'lora'[\s\S]*'2\.up'"),
    "one renamed": (tensors(lambda t: t.update({"0/1.uq": t.pop("0/1.up")})), "lacks tensors of 'lora'"),
    "transposed": (tensors(lambda t: t.update({"0/0.up": t["0/0.up"].T.contiguous()})), r"a tensor of the checkpoint has the wrong shape[\s\S]*'0\.up': \[1, 64\] in the file, \[64, 1\] here"),
    "another rank": (tensors(lambda t: t.update({"0/0.down": torch.zeros(2, 64)})), r"wrong shape[\s\S]*\[2, 64\] in the file"),
    "a scalar": (tensors(lambda t: t.update({"0/0.down": torch.zeros(())})), r"wrong shape[\s\S]*\[\] in the file"),
    "empty": (tensors(lambda t: t.update({"0/0.down": torch.zeros(0, 64)})), r"wrong shape[\s\S]*\[0, 64\] in the file"),
    "integers": (cast(torch.int64), r"a tensor of the checkpoint has the wrong dtype[\s\S]*'0\.down': torch\.int64 in the file, torch\.float32 here"),
    "truth values": (cast(torch.bool), r"wrong dtype[\s\S]*torch\.bool in the file"),
    "complex": (cast(torch.complex64), r"wrong dtype[\s\S]*'0\.down': C64"),
    "eight bits": (cast(torch.float8_e4m3fn), r"wrong dtype[\s\S]*F8_E4M3"),
    "NaN": (filled(math.nan), r"values that are not finite[\s\S]*'1\.up' of 'lora'"),
    "Inf": (filled(math.inf), "values that are not finite"),
    "-Inf": (filled(-math.inf, torch.bfloat16), "values that are not finite"),
    "finite only in float64": (filled(1e300, torch.float64), r"values that are not finite[\s\S]*as torch\.float32"),
    "of no part": (tensors(lambda t: t.update({"1/0.up": torch.zeros(1)})), r"the tensor '1/0\.up' belongs to no part"),
    "of part ²": (tensors(lambda t: t.update({"²/0.up": t.pop("0/0.up")})), r"the tensor '\\xb2/0\.up' belongs to no part"),
    "of part 00": (tensors(lambda t: t.update({"00/0.up": t.pop("0/0.up")})), r"the tensor '00/0\.up' belongs to no part"),
    "without a part": (tensors(lambda t: t.update({"up": t.pop("0/0.up")})), "the tensor 'up' belongs to no part"),
    "nameless": (tensors(lambda t: t.update({"0/": t.pop("0/0.up")})), "the tensor '0/' belongs to no part"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "match"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit_are_refused(spoil: Spoil, match: str, folder: Path) -> None:
    spoil(folder)
    model = fresh()
    with refused(CheckpointError, match, model=model, folder=folder):
        inlay.load(model, folder, "fr")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_float_dtype_is_converted(dtype: torch.dtype, folder: Path) -> None:
    cast(dtype)(folder)
    model = fresh()
    assert inlay.load(model, folder, "fr") == 4
    assert {p.dtype for _, _, p in need_state(model).own_parameters()} == {torch.float32}


# -- damage --------------------------------------------------------------------------------------


def tensor_file(folder: Path) -> Path:
    return folder / manifest_of(folder)["tensors"]


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(share: float, folder: Path) -> None:
    for file in (tensor_file(folder), folder / FILE):
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * share)])
        model = fresh()
        with refused(CheckpointError, "the checkpoint is damaged or hostile", model=model, folder=folder):
            inlay.load(model, folder, "fr")
        file.write_bytes(data)
    inlay.load(fresh(), folder, "fr")


def test_a_flipped_bit_in_the_tensors_is_refused(folder: Path) -> None:
    file, model = tensor_file(folder), fresh()
    data, draw = bytearray(file.read_bytes()), random.Random(0)
    for _ in range(40):
        place = draw.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        file.write_bytes(data)
        with refused(
            CheckpointError, r"damaged or hostile[\s\S]*(digest in its name|has a header of)", model=model
        ):
            inlay.load(model, folder, "fr")
        data[place // 8] ^= 1 << place % 8


def test_a_flipped_bit_in_the_manifest_is_refused_or_means_the_same(folder: Path) -> None:
    """Any bit: whitespace may change, what is read may not. Every byte of the file is tried."""
    file = folder / FILE
    data, whole, draw = bytearray(file.read_bytes()), read_manifest(folder), random.Random(0)
    same = 0
    for place in range(len(data)):
        bit = 1 << draw.randrange(8)
        data[place] ^= bit
        file.write_bytes(data)
        try:
            assert read_manifest(folder) == whole
            same += 1
        except CheckpointError:
            pass
        data[place] ^= bit
    assert same < len(data) / 4  # spaces and line ends


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_refused_and_not_opened(protocol: int, folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "ran"), "w"))

    data = pickle.dumps(Bomb(), protocol)
    model = fresh()
    (folder / FILE).rename(folder / "kept")
    (folder / FILE).write_bytes(data)
    with refused(CheckpointError, r"damaged or hostile[\s\S]*inlay\.json: ", model=model, folder=folder):
        inlay.load(model, folder, "fr")
    (folder / "kept").rename(folder / FILE)
    folders.put(folder, manifest_of(folder), data)
    with refused(CheckpointError, "damaged or hostile", model=model, folder=folder):
        inlay.load(model, folder, "fr")
    torch.save({"0/0.up": torch.zeros(1)}, folder / "checkpoint.pt")
    folders.put(folder, manifest_of(folder), (folder / "checkpoint.pt").read_bytes())
    with refused(CheckpointError, "damaged or hostile", model=model, folder=folder):
        inlay.load(model, folder, "fr")
    assert not (tmp_path / "ran").exists()


def test_what_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    model = fresh()
    for path in (tmp_path / "nowhere", folder / FILE, Path("\0")):
        with refused(CheckpointError, "there is no such checkpoint folder", model=model, folder=folder):
            inlay.load(model, path, "fr")
    for file in (tensor_file(folder), folder / FILE):
        file.unlink()
        with refused(
            CheckpointError, r"missing or not a regular file[\s\S]*check the path", model=model, folder=folder
        ):
            inlay.load(model, folder, "fr")


# -- another base --------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [lambda: folders.base(32), lambda: nn.Sequential(*folders.base(), nn.Linear(64, 64)),
                                   lambda: nn.ModuleList(folders.base()), lambda: build("bert")],
                         ids=["narrower", "longer", "another class", "a transformer"])  # fmt: skip
def test_a_base_of_another_shape_is_refused(other: Callable[[], nn.Module], folder: Path) -> None:
    model = other()
    with refused(
        CheckpointError, "this adapter was made for a base of another shape", model=model, folder=folder
    ):
        inlay.load(model, folder, "fr")


def test_another_base_of_the_same_shape_is_warned_about_and_loaded(folder: Path) -> None:
    model = folders.base()
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.warns(UserWarning, match="this adapter was saved for another base: weights: other values"):
        inlay.load(model, folder, "fr")
    assert need_state(model).names == ["fr"]


def test_a_warning_made_an_error_leaves_the_model_untouched(folder: Path) -> None:
    model = folders.base()
    with torch.no_grad():
        model[0].weight.mul_(2)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="saved for another base"):
            inlay.load(model, folder, "fr")
    assert not differences(before, model)


def test_the_same_architecture_with_another_configuration_is_warned_about(tmp_path: Path) -> None:
    model = build("llama")
    inlay.attach(model, LoRA(), "fr")
    inlay.save(model, tmp_path)
    other = build("llama")
    other.config.rms_norm_eps = 1e-3  # type: ignore[union-attr, assignment]
    with pytest.warns(UserWarning, match="another base: config: "):
        inlay.load(other, tmp_path, "fr")


# -- what a manifest may choose ------------------------------------------------------------------


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


@pytest.mark.parametrize("other", ["0" * 64, "", None, 5])
def test_an_expected_digest_is_compared(other: Any, folder: Path) -> None:
    digest, model = manifest_of(folder)["digest"], fresh()
    for wrong in (
        other,
        digest.upper(),
        digest[:-1],
        hashlib.sha256(tensor_file(folder).read_bytes()).hexdigest(),
    ):
        if wrong is None:
            continue
        with refused(
            CheckpointError,
            r"this is not the checkpoint you expected[\s\S]*get the checkpoint from its author",
            model=model,
        ):
            inlay.load(model, folder, "fr", expected_digest=wrong)
    inlay.load(model, folder, "fr", expected_digest=digest)


@pytest.mark.parametrize("change", [
    lambda m: m["parts"][0]["settings"].update(alpha=1000.0), lambda m: m["parts"][0].update(name="trusted"),
    lambda m: m["parts"][0].update(sites=["1", "0"]), lambda m: m["base"].update(weights="0" * 64),
])  # fmt: skip
def test_a_changed_manifest_is_not_the_one_expected(change: Any, folder: Path) -> None:
    """The tensors are the same: a digest of them alone would let these pass."""
    digest = inlay.save(folders.adapted(), folder)
    edit(folder, change)
    model = fresh()
    with refused(CheckpointError, "this is not the checkpoint you expected", model=model, folder=folder):
        inlay.load(model, folder, "fr", expected_digest=digest)


def test_a_method_that_is_not_installed_names_its_package(folder: Path) -> None:
    edit(folder, lambda m: m["parts"][0].update(method="vera", distribution="inlay-random", version="0.4"))
    model = fresh()
    match = r"needs the method 'vera', which is not installed[\s\S]*saved with 'inlay-random' '0\.4'[\s\S]*pip install inlay-random"
    with refused(RegistryError, match, model=model, folder=folder):
        inlay.load(model, folder, "fr")


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
    edit(folder, lambda m: m["parts"][0].update(method="vera", distribution=package))
    with refused(RegistryError, "needs the method 'vera'") as caught:
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
        ({"rank": 0}, "LoRA: rank is out of range"), ({"rank": "8"}, "LoRA: rank has the wrong type"), ({"rnak": 1}, "no setting 'rnak'"),
        ({"rank": None}, "wrong type"), ({"rank": {"a": 1}}, "wrong type"), ({"targets": "0"}, "wrong type"),
        ({"rank": 1, "\x1b[31m": 1}, r"no setting '\\x1b\[31m'"), ({"init": "\x1b]0;title\x07"}, r"init='\\x1b\]0;title\\x07'"),
    ],
)  # fmt: skip
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


# -- versions of a method ------------------------------------------------------------------------


@dataclass(frozen=True)
class Newer(LoRA):
    """Version 3 of a method: version 1 called its factors A and B, version 2 as now."""

    id: ClassVar[str] = "aging"
    version: ClassVar[int] = 3
    wrong: str = setting("")

    @staticmethod
    @hookimpl
    def migrate(method: Any, state: Any, from_version: int) -> Any:
        if method.wrong == "raises":
            raise KeyError("A")
        if method.wrong == "nothing":
            return None
        if method.wrong == "a list":
            return [*state]
        names = {"A": "down", "B": "up"} if from_version == 1 else {}
        moved = {
            ".".join([k.split(".")[0], names.get(k.split(".")[1], k.split(".")[1])]): t
            for k, t in state.items()
        }
        if method.wrong == "forgets":
            moved.popitem()
        if method.wrong == "not finite":
            moved["0.up"] = moved["0.up"] / 0
        return moved


@dataclass(frozen=True)
class Unmoved(LoRA):
    id: ClassVar[str] = "aging"
    version: ClassVar[int] = 3


@pytest.fixture
def aging() -> Iterator[None]:
    registry.register(Newer)
    yield
    registry.forget(Newer)


def aged(folder: Path, version: int, **settings: Any) -> None:
    names = {"down": "A", "up": "B"} if version == 1 else {}
    edit_tensors(folder, lambda t: [t.update({f"{k.rsplit('.', 1)[0]}.{new}": t.pop(k)}) for k in list(t)
                                    if (new := names.get(k.rsplit(".", 1)[1]))])  # fmt: skip
    edit(
        folder,
        lambda m: m["parts"][0].update(
            method="aging", method_version=version, settings={"rank": 1, **settings}
        ),
    )


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_older_version_is_migrated(version: int, folder: Path, aging: None) -> None:
    aged(folder, version)
    model = folders.base()
    assert inlay.load(model, folder, "fr") == 4
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(model(x), folders.adapted()(x))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ("raises", r"cannot be built[\s\S]*KeyError"), ("nothing", "the hook 'migrate' gave no answer"), ("a list", "'migrate' gave an answer of the wrong type"),
        ("forgets", "lacks tensors of"), ("not finite", "values that are not finite"),
    ],
)  # fmt: skip
def test_what_migration_gives_is_checked_again(wrong: str, match: str, folder: Path, aging: None) -> None:
    aged(folder, 1, wrong=wrong)
    model = fresh()
    with refused(InlayError, match, model=model, folder=folder):
        inlay.load(model, folder, "fr")


@pytest.mark.parametrize("version", [4, 0, -1])
def test_a_version_from_elsewhere_is_refused(version: int, folder: Path, aging: None) -> None:
    aged(folder, version)
    model = fresh()
    match = rf"this version of 'aging' cannot read the checkpoint[\s\S]*saved by version {version}, installed is 3"
    with refused(CheckpointError, match, model=model, folder=folder):
        inlay.load(model, folder, "fr")


def test_a_version_that_cannot_be_migrated_is_refused(folder: Path) -> None:
    aged(folder, 2)
    registry.register(Unmoved)
    try:
        with refused(CheckpointError, "this version of 'aging' cannot read the checkpoint"):
            inlay.load(fresh(), folder, "fr")
    finally:
        registry.forget(Unmoved)


# -- methods that load badly ---------------------------------------------------------------------


class Base(LoRA):
    id: ClassVar[str] = "spoilt"


@pytest.fixture
def spoilt(folder: Path) -> Iterator[Callable[[type[Method]], Path]]:
    """Return a function that makes a folder of a checkpoint of the given class."""
    made: list[type[Method]] = []

    def make(kind: type[Method]) -> Path:
        made.append(registry.register(dataclass(frozen=True)(kind)))
        edit(folder, lambda m: m["parts"][0].update(method="spoilt", settings={"rank": 1}))
        return folder

    yield make
    for kind in made:
        registry.forget(kind)


def test_a_state_dict_of_copies_is_refused(spoilt: Callable[[type[Method]], Path]) -> None:
    class Copies(Base):
        @staticmethod
        @hookimpl
        def state_dict(method: Any, adapter: Adapter) -> dict[str, Tensor]:
            return {k: t.clone() for k, t in adapter.tensors().items()}

    model = fresh()
    with refused(
        RegistryError,
        "the state_dict of 'spoilt' gives copies, so nothing can be loaded into it",
        model=model,
    ):
        inlay.load(model, spoilt(Copies), "fr")


def test_what_a_method_raises_on_hostile_data_is_an_error_about_the_checkpoint(
    spoilt: Callable[[type[Method]], Path],
) -> None:
    class Reads(Base):
        @staticmethod
        @hookimpl
        def inject(method: Any, sites: Any, adapter: Adapter) -> int:
            return LoRA.inject(method, sites[: adapter.data["count"]], adapter)

    model, folder = fresh(), spoilt(Reads)
    for data, error in (({}, "KeyError"), ({"count": "\x1b[31m"}, "TypeError"), ({"count": []}, "TypeError")):
        edit(folder, lambda m, data=data: m["parts"][0].update(data=data))
        with refused(
            CheckpointError, rf"the part 'lora' of the checkpoint cannot be built[\s\S]*{error}", model=model
        ):
            inlay.load(model, folder, "fr")
    edit(folder, lambda m: m["parts"][0].update(data={"count": 2}))
    inlay.load(model, folder, "fr")


def test_settings_that_ask_for_more_than_the_file_holds_are_refused(
    spoilt: Callable[[type[Method]], Path],
) -> None:
    class Draws(Base):
        width: int = setting(1, least=1)

        @staticmethod
        @hookimpl
        def inject(method: Any, sites: Any, adapter: Adapter) -> int:
            LoRA.inject(method, sites, adapter)
            adapter.share("noise", adapter.init(shared="noise").module(lambda: nn.Linear(64, method.width)))
            return 1

        @staticmethod
        @hookimpl
        def state_dict(method: Any, adapter: Adapter) -> dict[str, Tensor]:
            return {k: t for k, t in adapter.tensors().items() if not k.startswith("shared.")}

    Draws.__annotations__ = {"width": "int"}
    folder, model = spoilt(Draws), fresh()
    edit(folder, lambda m: m["parts"][0]["settings"].update(width=10**9))
    with refused(
        CheckpointError, "the settings ask for 65,000,000,000 numbers that are not in the file", model=model
    ):
        inlay.load(model, folder, "fr")
    edit(folder, lambda m: m["parts"][0]["settings"].update(width=10))
    inlay.load(model, folder, "fr")


def test_calibration_tensors_are_checked(spoilt: Callable[[type[Method]], Path]) -> None:
    class Measured(Base):
        @staticmethod
        @hookimpl
        def calibrate(method: Any, model: Any, sites: Any, batches: Any) -> dict[str, Tensor]:
            return {"order": torch.tensor([1, 0])}

    folder, model = spoilt(Measured), fresh()
    edit(folder, lambda m: m["parts"][0].update(calibration=["order"]))
    with refused(CheckpointError, "the calibration tensors are not those the manifest lists", model=model):
        inlay.load(model, folder, "fr")
    edit_tensors(folder, lambda t: t.update({"0/calibration:order": torch.tensor([1, 0])}))
    inlay.load(model, folder, "right")
    assert need_state(model).adapter_of("right").calibration["order"].tolist() == [1, 0]
    edit_tensors(folder, lambda t: t.update({"0/calibration:order": torch.tensor([1.0, math.nan])}))
    with refused(CheckpointError, "values that are not finite", model=model):
        inlay.load(model, folder, "fr")
    edit(folder, lambda m: m["parts"][0].update(calibration=[]))
    with refused(CheckpointError, "the calibration tensors are not those the manifest lists", model=model):
        inlay.load(model, folder, "fr")


def test_what_cannot_be_placed_is_refused_with_the_model_untouched(tmp_path: Path) -> None:
    """Everything about the file is right; the model has a patched layer."""
    folder = folders.saved(tmp_path / "fr")
    model = folders.base()
    model[1].forward = lambda x: x  # type: ignore[assignment]
    with refused(
        InlayError, "a module's forward has been replaced on the instance", model=model, folder=folder
    ):
        inlay.load(model, folder, "fr")
    del model[1].forward
    shutil.copytree(folder, tmp_path / "copy")
    inlay.load(model, tmp_path / "copy", "fr")
