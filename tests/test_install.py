"""What an installation holds: one ONNX Runtime, no model hub, every file that the package reads, and kernels
of its own sources.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.parser import BytesParser
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

import own_bill
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import adapterpack
from adapterpack._native import build, lowrank, quantized_matmul, ragged_attention, row_lora

pytestmark = pytest.mark.fast

EXTRAS = ("demo", "sign", "test", "cuda", "serve", "ray")


def closure(root: str, extras: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Every (package, requirement) that installing ``root`` with ``extras`` asks for, followed through what
    is installed here.
    """
    seen: set[tuple[str, str]] = set()
    todo = [(root, extra) for extra in ("", *extras)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found: Distribution = distribution(name)
        except PackageNotFoundError:
            continue
        for text in found.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                yield name, requirement.name
                todo += [(requirement.name, inner) for inner in ("", *requirement.extras)]


def test_only_one_onnx_runtime_is_asked_for() -> None:
    """The packages ``onnxruntime`` and ``onnxruntime-gpu`` overwrite each other: nothing that we require may
    bring the second.
    """
    wanted = "onnxruntime" if sys.platform == "darwin" else "onnxruntime-gpu"
    asked = {
        (by, name)
        for by, name in closure("adapterpack", EXTRAS)
        if name.lower().replace("_", "-").startswith("onnxruntime")
    }
    assert {name for _, name in asked} == {wanted}, asked


def test_only_one_onnx_runtime_is_installed() -> None:
    """This very environment, made by the README's command, holds one of them."""
    installed = {found.metadata["Name"].lower().replace("_", "-") for found in distributions()}
    assert (
        len(installed & {"onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"})
        == 1
    )


def test_torch_is_a_range_without_a_local_version() -> None:
    """``+cpu`` and exact pins would make the package uninstallable elsewhere."""
    torch = next(
        Requirement(text)
        for text in distribution("adapterpack").requires or ()
        if Requirement(text).name == "torch"
    )
    assert torch.specifier
    assert all(clause.operator == ">=" and "+" not in clause.version for clause in torch.specifier)


def test_the_wheel_has_every_file_that_the_package_reads(tmp_path: Path) -> None:
    """Modules, templates of pages and cards, schemas, the demo's data, and the mark of typed packages."""
    root = Path(__file__).parent.parent
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])",
            str(tmp_path),
        ],
        cwd=root,
        env={**os.environ, "HATCH_BUILD_NO_HOOKS": "true"},
        check=True,
        capture_output=True,
    )
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    names = set(wheel.namelist())
    suffixes = {".py", ".jinja", ".typed", ".json"}
    package = {
        str(path.relative_to(root)) for path in (root / "adapterpack").rglob("*") if path.suffix in suffixes
    }
    shipped = {f"adapterpack/{path.relative_to(root)}" for path in (root / "schemas").glob("*.json")}
    shipped |= {f"adapterpack/{path.relative_to(root)}" for path in (root / "web" / "page").iterdir()}
    shipped |= {"adapterpack/web/dist/adapterpack.js", "adapterpack/web/site-head.html"}
    assert "adapterpack/report/templates/page.html.jinja" in package
    assert (package | shipped) - names == set()
    require_bill_of_this_package(wheel)


def require_bill_of_this_package(wheel: zipfile.ZipFile) -> None:
    """A wheel carries its bill of materials (PEP 770), valid, and of what pyproject.toml declares now: ``make
    golden`` renews it.
    """
    version = adapterpack.__version__
    text = wheel.read(f"adapterpack-{version}.dist-info/sboms/adapterpack.cdx.json").decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    assert bill == json.loads(own_bill.bill())
    assert bill["metadata"]["component"]["version"] == version
    needed = {one["name"] for one in bill["components"] if one["scope"] == "required"}
    asked = BytesParser().parsebytes(wheel.read(f"adapterpack-{version}.dist-info/METADATA"))
    found = [Requirement(text) for text in asked.get_all("Requires-Dist")]
    assert needed == {canonicalize_name(one.name) for one in found if "extra" not in str(one.marker)}


# The compiled kernels.

ROOT = Path(__file__).parent.parent
BUILD = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
LOOK = """
import sys, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from adapterpack._native import lowrank
print(sys.modules["adapterpack"].__file__)
print(lowrank.COMPILED)
for each in said:
    print(each.category.__name__, each.message)
"""


def can_compile() -> bool:
    return build.missing() is None and "ADAPTERPACK_PURE" not in os.environ


def test_the_kernels_are_compiled_where_a_compiler_is() -> None:
    """So that no test passes over a kernel that was forgotten, or is of other sources."""
    if can_compile():
        kernels = (lowrank.COMPILED, row_lora.LIBRARY, ragged_attention.LIBRARY, quantized_matmul.LIBRARY)
        assert all(kernels), "compile them: python adapterpack/_native/build.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree as a checkout has it, with a library that an earlier version left there."""
    root = tmp_path_factory.mktemp("checkout") / "adapterpack"
    for name in ("adapterpack", "schemas", "examples", "web"):
        shutil.copytree(
            ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "node_modules")
        )
    for name in (
        "pyproject.toml",
        "hatch_build.py",
        "adapterpack.cdx.json",
        "README.md",
        "LICENSE",
        ".gitignore",
    ):
        shutil.copyfile(ROOT / name, root / name)
    (root / "adapterpack" / "_native" / "_lowrank.abi3.so").write_bytes(b"of an earlier version")
    return root


def built(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A wheel of the source tree in ``out``, as an installer builds it."""
    out.mkdir()
    variables = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", BUILD, str(out)],
        cwd=source,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def looked(folder: Path) -> list[str]:
    """What a process says that imports the kernels of the package in ``folder``."""
    run = subprocess.run(
        [sys.executable, "-c", LOOK],
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    file, *said = run.stdout.splitlines()
    assert Path(file).is_relative_to(folder)
    return said


@pytest.mark.long
def test_a_wheel_holds_its_own_kernels_and_leaves_the_source_tree_alone(source: Path, tmp_path: Path) -> None:
    """Nothing is written or changed in the tree, and nothing that lay there compiled gets into the wheel.
    Kernels of other sources than those beside them are not used, which a warning says, with what to do; and
    doing that mends it.
    """
    if not can_compile():
        return
    before = state(source)
    run = built(source, tmp_path / "wheel")
    assert run.returncode == 0, run.stdout + run.stderr
    assert state(source) == before
    (wheel,) = (tmp_path / "wheel").iterdir()
    assert "-cp311-abi3-" in wheel.name
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    assert looked(installed) == ["True"]

    with (installed / "adapterpack" / "_native" / "_lowrank.c").open("a") as file:
        file.write("/* as after a pull */")
    said = looked(installed)
    assert said[0] == "False"
    (told,) = said[1:]
    assert told.startswith("UnusedKernel") and "_lowrank" in told and "other sources" in told
    remedy = said[1].rpartition(" run python ")[2]
    assert remedy == str(installed / "adapterpack" / "_native" / "build.py")
    mended = subprocess.run([sys.executable, remedy], capture_output=True, text=True, check=False)
    assert mended.returncode == 0, mended.stderr
    assert looked(installed) == ["True"]


def test_a_kernel_that_cannot_be_loaded_is_said(source: Path) -> None:
    """As one of another machine; and where there is none nothing is said."""
    said = looked(source)
    assert said[0] == "False"
    assert len(said) == 2 and said[1].startswith("UnusedKernel") and "cannot be loaded" in said[1]


def test_a_compiler_that_fails_fails_the_build_with_what_it_said(source: Path, tmp_path: Path) -> None:
    if not can_compile():
        return
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'common.h:7: error: no such luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    run = built(source, tmp_path / "wheel", CC=str(compiler))
    said = run.stdout + run.stderr
    assert run.returncode != 0 and not any((tmp_path / "wheel").iterdir()), said
    assert "common.h:7: error: no such luck" in said and "ADAPTERPACK_PURE=1" in said


@pytest.mark.parametrize(
    ("environment", "words"),
    [({"CC": "no-such-compiler"}, "no C compiler no-such-compiler"), ({"ADAPTERPACK_PURE": "1"}, "")],
)
def test_without_a_compiler_the_wheel_is_all_python(
    source: Path, tmp_path: Path, environment: dict[str, str], words: str
) -> None:
    run = built(source, tmp_path / "wheel", **environment)
    assert run.returncode == 0, run.stderr
    (wheel,) = (tmp_path / "wheel").iterdir()
    assert wheel.name.endswith("py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert words in run.stdout + run.stderr
