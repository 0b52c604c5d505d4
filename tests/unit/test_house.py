"""The habits of the house, held by its tools: format, lint, types, layers, shell scripts."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.rooms import belongs, room_of
from helpers.schedule import FIRST, next_file

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("jobs", "tests", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix == ".sh" or path.name == "run"
)


def assert_passes(*command: str) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "format", "--check", "."),
        ("ruff", "check", "."),
        ("mypy",),
        ("lint-imports",),
    ],
    ids=["format", "lint", "types", "layers"],
)
def test_tool(command: tuple[str, ...]) -> None:
    tool = Path(sys.executable).with_name(command[0])
    assert_passes(str(tool), *command[1:])


def defined_in(tree: ast.Module) -> set[str]:
    """Return the names that a module binds, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names


@functools.cache
def names_of(module: str) -> set[str] | None:
    """Return the names that can be imported from a module of ours; None if there is no such."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file():
        return None
    names = defined_in(ast.parse(file.read_text(encoding="utf-8")))
    return names | ({item.stem for item in path.iterdir()} if path.is_dir() else set())


def test_what_tests_import_is_there() -> None:
    """The bodies that run on ranks are collected by nothing, and mypy sees no tests."""
    wrong = []
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            module, place = node.module or "", f"{path.relative_to(ROOT)}:{node.lineno}"
            if module.startswith("hpctrain"):
                there = names_of(module) or ()
                lacks = [alias.name for alias in node.names if alias.name not in there]
                wrong += [f"{place}: {module} has no {name}" for name in lacks]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_script(script: str) -> None:
    assert_passes("bash", "-n", script)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    assert_passes("shellcheck", "-x", script)


def test_start_up_imports_nothing_heavy() -> None:
    """`--help` and a mistake in a config are told before torch, numpy or MPI would have loaded."""
    code = (
        "import sys, hpctrain, hpctrain.cli, hpctrain.config;"
        "heavy = {'torch', 'numpy', 'h5py', 'mpi4py', 'pydantic'} & set(sys.modules);"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)"
    )
    assert_passes(sys.executable, "-c", code)


def test_the_watchdog_needs_the_standard_library_alone() -> None:
    """It starts without site-packages, in a few ms."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hpctrain.launch.watchdog.process;"
        "names = {name.partition('.')[0] for name in sys.modules};"
        "others = names - {*sys.stdlib_module_names, '__main__', 'hpctrain'};"
        "sys.exit(f'imported: {sorted(others)}' if others else 0)"
    )
    assert_passes(sys.executable, "-I", "-S", "-c", code)


def test_documented_version_is_the_packages() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    package = (ROOT / "hpctrain" / "version.py").read_text(encoding="utf-8")
    assert version is not None
    assert f'__version__ = "{version[1]}"' in package


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """The templates of the job scripts too, which no import would miss."""
    pytest.importorskip("hatchling")
    assert_passes(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("hpctrain/")}
    there = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "hpctrain").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    there |= {
        f"hpctrain/examples/{path.relative_to(ROOT)}"
        for folder in ("configs", "jobs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    assert packed == there
    assert "hpctrain/batch/templates/slurm.sh.j2" in packed


def test_no_test_imports_from_another() -> None:
    """What they share is in tests/helpers, or a file could not be moved, or run by itself."""
    imported = re.compile(r"^\s*(?:from|import) (?:[\w.]+\.)?test_\w+", re.MULTILINE)
    paths = list((ROOT / "tests").rglob("*.py"))
    assert len(paths) > 100
    assert [str(path) for path in paths if imported.search(path.read_text("utf-8"))] == []


def test_the_tour_has_every_file_of_the_package() -> None:
    tour = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+?)(?:\.py)?`", tour))
    files = [path for path in (ROOT / "hpctrain").rglob("*.py") if path.stem[:2] != "__"]
    assert len(files) > 200
    parts = [path.relative_to(ROOT / "hpctrain").with_suffix("").parts for path in files]
    known = [any("/".join(each[start:]) in named for start in range(len(each))) for each in parts]
    assert [path for path, there in zip(files, known, strict=True) if not there] == []


def test_tests_that_documents_name_are_there() -> None:
    there = {path.name for path in (ROOT / "tests").rglob("*.py")}
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {
        (path.name, test)
        for path in documents
        for test in re.findall(r"test_\w+\.py", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 20
    assert sorted(each for each in named if each[1] not in there) == []


def test_a_worker_collects_its_room_where_all_tests_run() -> None:
    tests = str(ROOT / "tests")
    assert [room_of(f"gw{number}", [tests], 8) for number in (0, 1, 4, 7)] == [
        *("unit", "jobs", "unit", "jobs")
    ]
    assert room_of("gw8", [tests], 8) is None  # in the place of any
    assert room_of("gw1", [f"{tests}/unit"], 8) is None
    assert room_of("gw1", [tests], 3) is None
    folders = [path for path in (ROOT / "tests").iterdir() if path.is_dir()]
    for path in (ROOT / "tests", *folders, ROOT / "tests/conftest.py"):
        assert belongs(path, None)
        both = [belongs(path, "unit"), belongs(path, "jobs")]
        assert both == (
            [path.name == "unit", path.name != "unit"] if path in folders else [True] * 2
        )


def test_long_files_begin_first_and_units_beside_jobs() -> None:
    """A file of that name no more would be begun late, and all would wait for it."""
    assert [file for file in FIRST if not (ROOT / file).is_file()] == []
    files = ["tests/launch/test_a.py", "tests/unit/test_b.py"]
    files += [FIRST[1], "tests/unit/test_house.py"]
    assert next_file(files, calculates=False) == FIRST[1]
    assert next_file(files, calculates=True) == "tests/unit/test_house.py"
    assert next_file(files[:2], calculates=False) == "tests/launch/test_a.py"
    assert next_file(files[:1], calculates=True) == "tests/launch/test_a.py"
