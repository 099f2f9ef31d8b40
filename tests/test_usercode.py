"""Networks by import path: found, fingerprinted without running anything, loaded only with permission."""

from __future__ import annotations

import sys
import time
import zipfile
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import distill_ray
from distill_ray import config as configs
from distill_ray import usercode
from distill_ray.config import ImportedModel, InputConfig, MlpModel, TrainConfig
from distill_ray.errors import UserError
from distill_ray.footprint import step_bytes
from distill_ray.models import ModelSpec, save_model
from distill_ray.models.classifier import check_output
from distill_ray.storage import Folder
from tests.own_code import write_package

SHAPE, CLASSES = (1, 4, 4), 3


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder as the current one; what was imported from it is forgotten afterwards."""
    monkeypatch.chdir(write_package(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:
        del sys.modules[name]
    usercode._loaded.clear()


def model(path: str = "my_pkg.nets:flat", **kwargs: object) -> ImportedModel:
    sizes = {"width": 5, "classes": CLASSES, "pixels": 16}
    return ImportedModel.model_validate({"import": path, "kwargs": kwargs if kwargs else sizes})


def spec_of(of: ImportedModel) -> ModelSpec:
    return ModelSpec(
        model=of, input=InputConfig(), shape=SHAPE, dtype="uint8", classes=CLASSES, class_names=tuple("abc")
    )


def checked(of: ImportedModel) -> None:
    spec = spec_of(of)
    check_output(spec.build(key="student.model"), spec.shape, spec.dtype, spec.classes, "student.model")


def test_a_network_by_import_path_takes_raw_rows_by_the_contract(here: Path) -> None:
    torch.manual_seed(0)
    classifier = spec_of(model()).build()
    raw = torch.randint(0, 256, (6, *SHAPE), dtype=torch.uint8)
    net = classifier.net
    assert isinstance(net, nn.Sequential)
    assert torch.allclose(classifier(raw), net((raw.float() / 255 - 0.5) / 0.5), atol=1e-6)
    checked(model())


@pytest.mark.parametrize(
    ("of", "told"),
    [
        (("my_pkg.nets:flat", {"classes": 7, "pixels": 16}), r"returns \[rows, 7\], expected logits \[rows, 3\]"),
        (("my_pkg.nets:flat", {"classes": 3, "pixels": 9}), r"it fails on rows of shape \[1, 4, 4\]: Runtime"),
        (("my_pkg.nets:flat", {"wdith": 3}), r"flat: making it fails: TypeError: .*wdith"),
        (("my_pkg.nets:no_module", None), "no_module: returned list, not an nn.Module"),
        (("my_pkg.nets:fails", None), "fails: making it fails: RuntimeError: no such layer"),
        (("my_pkg.nets:CONSTANT", None), "is a int, not a callable"),
        (("my_pkg.nets:flt", None), "my_pkg.nets has no 'flt'"),
        (("my_pkg.nots:flat", None), "there is no module my_pkg.nots, neither in the folder"),
        (("no_such_pkg:flat", None), "there is no module no_such_pkg, neither in the folder"),
        (("my_pkg.broken:flat", None), "importing it fails: No module named 'a_package_that_is_not_there'"),
    ],
)  # fmt: skip
def test_what_is_no_network_is_one_line(here: Path, of: tuple[str, dict[str, object] | None], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        checked(ImportedModel.model_validate({"import": of[0], "kwargs": of[1] or {}}))
    assert "\n" not in str(caught.value)


def test_two_answers_are_no_logits(here: Path) -> None:
    with pytest.raises(UserError, match=r"student.model: returns tuple, expected a tensor of logits \[rows, 3\]"):
        checked(ImportedModel.model_validate({"import": "my_pkg.nets:two_answers"}))


def test_the_fingerprint_covers_what_is_imported_and_runs_nothing(here: Path) -> None:
    before = usercode.fingerprint("my_pkg.nets:flat", "student.model.import")
    assert usercode.fingerprint("my_pkg.nets:serving", "student.model.import") == before  # the same source
    assert "my_pkg" not in sys.modules
    assert set(usercode.local_files("my_pkg.nets")) == {"my_pkg", "my_pkg.nets", "my_pkg.layers"}
    (here / "aside.py").write_text("VALUE = 2\n")
    (here / "my_pkg" / "broken.py").write_text("import torch\n")
    assert usercode.fingerprint("my_pkg.nets:flat", "student.model.import") == before
    layers = here / "my_pkg" / "layers.py"
    layers.write_text(layers.read_text() + "# another comment\n")
    assert usercode.fingerprint("my_pkg.nets:flat", "student.model.import") != before
    with pytest.raises(UserError, match=r"student.model.import my_pkg.gone:x: there is no module my_pkg.gone"):
        usercode.fingerprint("my_pkg.gone:x", "student.model.import")


def test_relative_imports_are_followed(here: Path) -> None:
    (here / "my_pkg" / "relative.py").write_text("from . import layers\nfrom .nets import flat\n")
    assert {"my_pkg.layers", "my_pkg.nets"} <= set(usercode.local_files("my_pkg.relative"))


def test_an_installed_package_counts_as_a_whole(here: Path) -> None:
    assert usercode.fingerprint("torchmetrics:Metric", "k") == usercode.fingerprint("torchmetrics.metric:Metric", "k")
    assert usercode.local_files("torchmetrics.metric") == {}


def test_compiled_modules_count_and_travel(here: Path) -> None:
    (here / "my_pkg" / "fast.py").write_text("from my_pkg import kernels\n")
    built = here / "my_pkg" / f"kernels{EXTENSION_SUFFIXES[0]}"
    built.write_bytes(b"first build")
    before = usercode.fingerprint("my_pkg.fast:x", "k")
    assert usercode.relative_path("my_pkg.kernels", usercode.local_files("my_pkg.fast")["my_pkg.kernels"]) == (
        Path("my_pkg") / built.name
    )
    built.write_bytes(b"other build")  # of the same size
    assert usercode.fingerprint("my_pkg.fast:x", "k") != before


def test_an_installed_package_counts_with_its_compiled_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "their_space" / "their_pkg"  # below a namespace
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    seen = [usercode.fingerprint("their_space.their_pkg.nets:x", "k")]
    for name in ("later.py", f"_C{EXTENSION_SUFFIXES[0]}"):  # neither is imported by nets
        (package / name).write_text("")
        seen.append(usercode.fingerprint("their_space.their_pkg.nets:x", "k"))
    assert len(set(seen)) == 3
    assert usercode.local_files("their_space.their_pkg.nets") == {}


def test_namespace_packages_are_followed_through_all_their_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part, name, text in (("a", "nets", "import space.inner.layers\n"), ("b", "layers", "")):
        folder = tmp_path / part / "space" / "inner"
        folder.mkdir(parents=True)
        (folder / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path / part))
    before = usercode.fingerprint("space.inner.nets:x", "k")
    assert set(usercode.local_files("space.inner.nets")) == {"space.inner.nets", "space.inner.layers"}
    (tmp_path / "b" / "space" / "inner" / "layers.py").write_text("WIDTH = 2\n")
    assert usercode.fingerprint("space.inner.nets:x", "k") != before


def test_an_editable_install_by_a_finder_is_seen(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As setuptools makes them: a finder beside Python's own that knows where a package lies."""
    package = here / "src" / "edited"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text("from edited import layers\n")
    (package / "layers.py").write_text("")
    (here / "uses_it.py").write_text("import edited.nets\n")

    class Finder:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            return spec_from_file_location(name, package / "__init__.py") if name == "edited" else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    before = usercode.fingerprint("uses_it:x", "k")
    expected = {"edited", "edited.nets", "edited.layers"}
    assert set(usercode.local_files("edited.nets")) == expected
    assert set(usercode.local_files("uses_it")) == {"uses_it", *expected}
    (package / "layers.py").write_text("WIDTH = 2\n")
    assert usercode.fingerprint("uses_it:x", "k") != before


def test_this_package_is_nobodys_own_code(here: Path) -> None:
    """Where it is installed to be edited, too: it would travel to the workers, and be imported anew, otherwise."""
    (here / "uses_ours.py").write_text("from distill_ray.models import mlp\nfrom distill_ray.errors import UserError\n")
    assert set(usercode.local_files("uses_ours")) == {"uses_ours"}
    assert usercode.local_files("distill_ray.models.mlp") == {}


def test_what_lies_in_an_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("zipped.py", "x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "z.zip"))
    with pytest.raises(UserError, match=r"k zipped:x: lies in .*z.zip.*, where changes cannot be seen"):
        usercode.fingerprint("zipped:x", "k")


# --- code that is edited while the process lives ----------------------------------------------------------------------


def test_code_that_was_edited_is_run_anew(here: Path) -> None:
    """What is run is what the fingerprint, and so the digest, is of; in modules that it imports, too."""
    (here / "my_pkg" / "sized.py").write_text("from my_pkg.layers import Flat, WIDTH\ndef width():\n    return WIDTH\n")
    layers = here / "my_pkg" / "layers.py"
    source = layers.read_text()
    layers.write_text(f"{source}WIDTH = 3\n")
    assert usercode.load("my_pkg.sized:width", "k")() == 3
    kept = sys.modules["my_pkg.sized"]
    assert usercode.load("my_pkg.sized:width", "k")() == 3
    assert sys.modules["my_pkg.sized"] is kept  # nothing has changed
    layers.write_text(f"{source}WIDTH = 33\n")
    assert usercode.load("my_pkg.sized:width", "k")() == 33
    assert sys.modules["my_pkg.sized"] is not kept


def test_code_that_somebody_else_imported_is_run_anew_unless_it_is_older_than_the_process(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    kept = importlib.import_module("my_pkg.layers")
    monkeypatch.setattr(usercode, "_process_started_s", lambda: time.time() + 60)
    usercode.load("my_pkg.layers:Flat", "k")
    assert sys.modules["my_pkg.layers"] is kept
    usercode._loaded.clear()
    monkeypatch.setattr(usercode, "_process_started_s", lambda: time.time() - 60)
    usercode.load("my_pkg.layers:Flat", "k")
    assert sys.modules["my_pkg.layers"] is not kept


def test_the_process_began_before_now_and_after_boot() -> None:
    started = usercode._process_started_s()
    assert time.time() - 24 * 3600 < started < time.time()


def test_compiled_code_that_was_built_anew_needs_a_new_process(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = here / "my_pkg" / f"kernels{EXTENSION_SUFFIXES[0]}"
    built.write_bytes(b"first build")
    (here / "my_pkg" / "fast.py").write_text("def net():\n    from my_pkg import kernels\n")
    monkeypatch.setitem(sys.modules, "my_pkg.kernels", ModuleType("my_pkg.kernels"))
    monkeypatch.setitem(usercode._loaded, "my_pkg.kernels", usercode._sha256(built))
    usercode.load("my_pkg.fast:net", "k")
    built.write_bytes(b"other build")
    with pytest.raises(UserError, match=r"k my_pkg.fast:net: .*kernels.* was built anew .*: start the process again"):
        usercode.load("my_pkg.fast:net", "k")


def test_load_model_runs_code_only_with_permission(here: Path, tmp_path: Path) -> None:
    spec = spec_of(model())
    trained = spec.build().eval()
    folder = Folder.at(tmp_path / "model")
    save_model(folder, spec, trained.net.state_dict())
    assert '"import": "my_pkg.nets:flat"' in folder.read_bytes("model.json").decode()
    with pytest.raises(UserError, match=r"names code that would run here, my_pkg.nets:flat: .*allow_import=True"):
        distill_ray.load_model(str(folder))
    loaded = distill_ray.load_model(str(folder), allow_import=True)
    raw = torch.randint(0, 256, (4, *SHAPE), dtype=torch.uint8)
    assert torch.equal(loaded(raw), trained(raw))


def test_its_memory_is_counted_too(here: Path) -> None:
    ours = ModelSpec(
        model=MlpModel(name="mlp", hidden=(5,)), input=InputConfig(), shape=SHAPE, dtype="uint8", classes=CLASSES,
        class_names=tuple("abc"),
    )  # fmt: skip
    train = TrainConfig(batch_size=64, precision="fp32")
    assert step_bytes(spec_of(model()), train, 64, 1) == step_bytes(ours, train, 64, 1)


CONFIG = {
    "name": "x",
    "data": {"source": "glyph62"},
    "teacher": {"model": {"name": "mlp"}},
    "student": {"model": {"import": "my_pkg.nets:flat", "kwargs": {"deep": True}}},
}


def test_a_config_that_names_code_needs_permission(tmp_path: Path) -> None:
    config = configs.from_dict(CONFIG)
    with pytest.raises(UserError, match=r"student.model.import: my_pkg.nets:flat is code .*--allow-import"):
        configs.refuse_imports(config)
    assert configs.from_dict(configs.to_dict(config)) == config
    plain = CONFIG | {"student": {"model": {"name": "mlp"}}}
    configs.refuse_imports(configs.from_dict(plain))
    for space in (
        {"model": {"choice": [{"name": "mlp"}, {"import": "my_pkg.nets:flat"}]}},
        {"model.import": {"choice": ["my_pkg.nets:flat"]}},
    ):
        with pytest.raises(UserError, match=r"tune.space.*my_pkg.nets:flat.* is code"):
            configs.refuse_imports(configs.from_dict(plain | {"tune": {"space": space}}))
    given = {"ensemble": [{"checkpoint": "/a.pt", "model": {"import": "my_pkg.nets:flat"}}]}
    with pytest.raises(UserError, match=r"teacher.ensemble\[0\].model.import"):
        configs.refuse_imports(configs.from_dict(plain | {"teacher": given}))


@pytest.mark.parametrize("path", ["my_pkg.nets", "my_pkg/nets.py:flat", ":flat", "my_pkg.nets:"])
def test_what_is_no_import_path_is_refused_by_the_config(path: str) -> None:
    with pytest.raises(UserError, match=r"student.model.import"):
        configs.from_dict(CONFIG | {"student": {"model": {"import": path}}})


def test_code_named_in_a_searchs_space_is_seen_by_either_name_of_the_key() -> None:
    for key in ("import", "import_"):
        space = {"tune": {"space": {"model": {"choice": [{"name": "import", key: "evil:f"}]}}}}
        assert [code for _, code in configs.imports_of(space)] == ["evil:f"]
