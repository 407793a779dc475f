"""What is installed, and who imports whom.

The folders at the top level install under one name. Nothing may be forgotten in the wheel, nothing
may be added by accident, and data runs one way: corpus → encoder → store → index → query.
"""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTALLED_AS = {
    "base": "embell",
    "engine": "embell/engine",
    "indexers": "embell/indexers",
    "cli": "embell/cli",
    "training": "embell/training",
}
MAY_IMPORT = {
    "base": set[str](),
    "indexers": {"base"},
    "engine": {"base", "indexers"},
    "training": {"base", "engine", "indexers"},
    "cli": {"base", "indexers", "engine", "training"},
}
ENTRANCES = {"base/__init__.py", "base/__main__.py"}  # they lead to the others, when asked


def tracked_files() -> list[Path]:
    """The files under version control; in an unpacked source distribution, which has none, all files."""
    if (ROOT / ".git").exists():
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        files = [Path(os.fsdecode(name)) for name in listing.split(b"\0") if name]
    else:
        made = {"__pycache__", ".venv", ".types", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "build", "dist"}
        files = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        files = [path for path in files if made.isdisjoint(path.parts) and not path.parts[0].endswith(".egg-info")]
    return sorted(path for path in files if (ROOT / path).is_file())


def python_files() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".py"]


# --- what is installed ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files alone, so that nothing else can help a build."""
    folder = tmp_path_factory.mktemp("tree") / "a copy"
    for path in tracked_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)
    return folder


def build(kind: str, tree: Path, output: Path) -> Path:
    """Build a wheel or a source distribution the way pip does, without its isolation (and thus without network)."""
    output.mkdir()
    call = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", call, str(output)], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", tree, folder / "dist")) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.glob("embell-*")
    return unpacked


@pytest.fixture(scope="module", params=["the tree", "the source distribution"])
def wheel(request: pytest.FixtureRequest, tree: Path, sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the wheel that is built from the tree, or from the source distribution."""
    source = tree if request.param == "the tree" else sdist
    with zipfile.ZipFile(build("wheel", source, tmp_path_factory.mktemp("wheel") / "dist")) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_every_module_and_weight_file_and_nothing_else(wheel: dict[str, bytes]) -> None:
    expected = {}
    for path in tracked_files():
        folder, inner = path.parts[0], path.as_posix().partition("/")[2]
        if folder in INSTALLED_AS and (
            path.suffix == ".py"
            or path.name in ("py.typed", "duplicate_report.html")
            or path.parts[:2] in (("engine", "models"), ("training", "presets"))
        ):
            expected[f"{INSTALLED_AS[folder]}/{inner}"] = (ROOT / path).read_bytes()
    installed = {name: content for name, content in wheel.items() if ".dist-info/" not in name}
    assert sorted(installed) == sorted(expected)
    assert [name for name in expected if installed[name] != expected[name]] == []


def test_the_wheel_has_one_top_level_name_and_one_command(wheel: dict[str, bytes]) -> None:
    assert {name.partition("/")[0] for name in wheel if ".dist-info/" not in name} == {"embell"}
    (commands,) = (content for name, content in wheel.items() if name.endswith(".dist-info/entry_points.txt"))
    assert commands.decode().split() == ["[console_scripts]", "embell", "=", "embell.cli.main:main"]
    assert "embell/cli/main.py" in wheel
    assert any(name.endswith("/licenses/LICENSE") for name in wheel)


def test_the_source_distribution_holds_what_tests_and_documentation_need(sdist: Path) -> None:
    not_shipped = {".gitignore", ".gitattributes"}
    missing = [path.as_posix() for path in tracked_files() if path.as_posix() not in not_shipped and not (sdist / path).is_file()]
    assert missing == []


# --- who imports whom -----------------------------------------------------------------------------


def imports(source: str) -> Iterator[str]:
    """Yield the dotted name of everything that a file imports, inside functions too; a relative import begins with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def layer(imported: str) -> str | None:
    """Name the folder that a dotted name leads to, or None for somebody else's package."""
    first, _, rest = imported.partition(".")
    if first != "embell":
        return None
    part = rest.partition(".")[0]
    if part in INSTALLED_AS:
        return part
    in_base = not part or part.startswith("__") or (ROOT / "base" / part).with_suffix(".py").exists()
    return "base" if in_base else "engine"  # the public names of `embell` are those of the engine


def test_no_file_imports_a_folder_by_its_bare_name() -> None:
    wrong = []
    for path in python_files():
        for imported in imports((ROOT / path).read_text(encoding="utf-8")):
            if imported.partition(".")[0] in ("", *INSTALLED_AS):
                wrong.append(f"{path.as_posix()} imports {imported}")
    assert wrong == []


def test_imports_follow_the_layers() -> None:
    wrong = []
    for path in python_files():
        folder = path.parts[0]
        if folder not in INSTALLED_AS or path.as_posix() in ENTRANCES:
            continue
        for imported in imports((ROOT / path).read_text(encoding="utf-8")):
            target = layer(imported)
            if target is not None and target != folder and target not in MAY_IMPORT[folder]:
                wrong.append(f"{path.as_posix()} imports {imported}")
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import embell.engine.bellm", ["engine"]),
        ("from embell import Collection", ["engine"]),
        ("from embell import __version__, errors", ["base", "base"]),
        ("def f():\n    from embell.cli.main import main", ["cli"]),
        ("from importlib import import_module\nimport_module('embell.training')", [None, "training"]),
        ("import numpy", [None]),
    ],
)
def test_the_layer_of_an_import_is_recognised(source: str, found: list[str | None]) -> None:
    assert [layer(imported) for imported in imports(source)] == found


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = "import sys, embell, embell.document, embell.errors; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & {"torch", "transformers", "numpy", "pyarrow", "lancedb", "scipy"} == set()


def test_every_public_name_is_what_it_says_however_often_it_is_imported() -> None:
    code = """
import inspect, embell
for package in ("embell", "embell.engine"):
    for name in __import__(package, fromlist=["__all__"]).__all__:
        for _ in range(2):
            exec(f"from {package} import {name} as found")
            assert isinstance(found, str) or inspect.isclass(found) or inspect.isfunction(found), (package, name, found)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
