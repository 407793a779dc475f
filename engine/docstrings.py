"""The corpus of `embell demo`: what the running Python's standard library says about itself.

Modules written in Python are read as source, never imported. Of the C extensions, which have no
source to read, the docstrings are taken from the imported module. A name counts as public where a
public module defines it or re-exports it from a private one (`csv.reader` comes from `_csv`).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.machinery import BuiltinImporter, ExtensionFileLoader, PathFinder
from pathlib import Path
from typing import NamedTuple

from embell.document import Document

LONGEST = 400  # characters; what a thing is for stands at the beginning
SHORTEST = 20  # characters; a shorter docstring says nothing that its name does not
NOT_WANTED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"}
UNDER_ANOTHER_NAME = {"posix", "nt"}  # their names are public as os.<name>
NOT_IMPORTED = {"readline", "xxlimited", "xxlimited_35", "xxsubtype"}  # touches the terminal; examples for C authors
SIGNATURE = re.compile(r"\A[\w.]+\([^\n]*\)(?: -> [^\n]*)?\n--\n\n")

Tree = ast.Module | ast.ClassDef
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Entry(NamedTuple):
    """One documented name of a module: its dotted name without the module, its kind, its raw docstring."""

    name: str
    kind: str
    doc: str


def standard_library() -> Iterator[Document]:
    """Yield the docstrings of the standard library's public names, sorted by id.

    The id is the dotted name (`csv.DictReader.writeheader`, `math.sqrt`), the text is that name, the
    beginning of the docstring, and on a last line what the module is for: a function often leaves that to
    its module ("csv.reader" never says that it reads files). Where Python's own sources are not installed, only the C extensions speak.
    """
    sources = python_sources()
    public = {name: path for name, path in sources.items() if is_public(name)}
    documents: dict[str, Document] = {}
    for module, path in public.items():
        collect(documents, module, python_module(module, path, sources))
    for module in sorted(sys.stdlib_module_names - public.keys() - UNDER_ANOTHER_NAME):
        if is_public(module) and (extension := c_module(module)):
            collect(documents, module, c_entries(extension))
    for name in sorted(documents):
        yield in_context(documents[name], documents)


def collect(documents: dict[str, Document], module: str, entries: Iterable[Entry]) -> None:
    """Add the entries of one module that have something to say; the first of a name stays."""
    for name, kind, doc in entries:
        dotted = f"{module}.{name}" if name else module
        text = inspect.cleandoc(SIGNATURE.sub("", doc)).strip()
        if len(text) >= SHORTEST and dotted not in documents:
            documents[dotted] = Document(dotted, f"{dotted}: {text}", {"kind": kind, "module": module})


def in_context(document: Document, documents: dict[str, Document]) -> Document:
    """The document cut to a few paragraphs, with its module's first line behind it."""
    module = documents.get(str(document.metadata["module"]))
    text = document.text
    if len(text) > LONGEST:
        text = text[: text.rfind("\n", 0, LONGEST) + 1 or LONGEST].rstrip()
    if module is not None and module is not document:
        text = f"{text}\n({module.text.splitlines()[0]})"
    return replace(document, text=text)


def is_public(dotted: str) -> bool:
    """Say whether no part of a dotted name is private."""
    return not any(part.startswith("_") for part in dotted.split("."))


# --- modules written in Python --------------------------------------------------------------------


def python_sources() -> dict[str, Path]:
    """Map the name of every standard library module that has a source file to that file, sorted."""
    sources: dict[str, Path] = {}
    unread = [(Path(sysconfig.get_path("stdlib")), "")]
    while unread:
        folder, package = unread.pop()
        for path in folder.iterdir() if folder.is_dir() else ():
            module = package + path.stem
            if not path.stem.isidentifier() or path.stem in NOT_WANTED or path.stem == "__main__":
                continue
            if not package and path.stem not in sys.stdlib_module_names:  # site-packages, a distribution's own files
                continue
            if path.stem == "__init__" and package:
                sources[package[:-1]] = path
            elif path.suffix == ".py":
                sources[module] = path
            elif not path.suffix and path.is_dir():
                unread.append((path, f"{module}."))
    return dict(sorted(sources.items()))


def parse(path: Path) -> ast.Module:
    """Parse a source file; one that cannot be read or parsed counts as empty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old escapes in old code
        try:
            return ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            return ast.Module(body=[], type_ignores=[])


def python_module(module: str, path: Path, sources: dict[str, Path]) -> Iterator[Entry]:
    """Yield what a public module says of itself, what it defines, and what it re-exports from private modules."""
    tree = parse(path)
    yield Entry("", "module", ast.get_docstring(tree, clean=False) or "")
    yield from definitions(tree)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    exported = public_names(tree)
    for origin, name, public_name in private_imports(tree.body, package, sources):
        for entry in origin_entries(origin, sources):
            head, dot, rest = entry.name.partition(".")
            renamed = head if name == "*" else public_name
            if head and name in ("*", head) and (exported is None or renamed in exported):
                yield entry._replace(name=renamed + dot + rest)


def definitions(tree: Tree, prefix: str = "", *, private: bool = False) -> Iterator[Entry]:
    """Yield the documented definitions of a module or class, those of its classes included."""
    for node in statements(tree.body):
        if not isinstance(node, Definition) or (node.name.startswith("_") and not private):
            continue
        name = prefix + node.name
        doc = ast.get_docstring(node, clean=False)
        if isinstance(node, ast.ClassDef):
            yield Entry(name, "class", doc or constructor_docstring(node))
            yield from definitions(node, f"{name}.")
        else:
            yield Entry(name, "method" if prefix else "function", doc or "")


def constructor_docstring(node: ast.ClassDef) -> str:
    """The docstring of `__init__`, or nothing."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and child.name == "__init__":
            return ast.get_docstring(child, clean=False) or ""
    return ""


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a body and of the conditions in it, but not those of `if __name__ == "__main__"`."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            if "__main__" not in ast.dump(node.test):
                yield from statements(node.body)
            yield from statements(node.orelse)
        elif isinstance(node, ast.Try):
            yield from statements(node.body)
            for handler in node.handlers:
                yield from statements(handler.body)
            yield from statements(node.orelse)
            yield from statements(node.finalbody)


def public_names(tree: ast.Module) -> set[str] | None:
    """The names in `__all__`, or None where it is missing or not a plain list of strings."""
    names: set[str] | None = None
    for node in statements(tree.body):
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            value: ast.expr = node.value
        elif (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Attribute)  # __all__.append(…), .extend(…)
            and node.value.args
        ):
            targets, value = [node.value.func.value], node.value.args[0]
        else:
            continue
        if not any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            continue
        try:
            given = ast.literal_eval(value)
            names = (names or set()) | ({given} if isinstance(given, str) else set(given))
        except (TypeError, ValueError):
            return None
    return names


def private_imports(body: Iterable[ast.stmt], package: str, sources: dict[str, Path]) -> Iterator[tuple[str, str, str]]:
    """Yield `(private module, its name or "*", public name)` for every name taken from a private module."""
    for node in body:
        if isinstance(node, ast.If):
            yield from private_imports([*node.body, *node.orelse], package, sources)
        elif isinstance(node, ast.Try):
            found = list(private_imports(node.body, package, sources))
            if not any(origin in sources or c_module(origin) for origin, _, _ in found):
                found += private_imports([child for handler in node.handlers for child in handler.body], package, sources)
            yield from found
            yield from private_imports(node.orelse, package, sources)
        elif isinstance(node, ast.ImportFrom) and node.module:
            origin = node.module
            if node.level:
                origin = ".".join([*package.split(".")[: package.count(".") + 2 - node.level], node.module])
            if origin == "__future__" or (is_public(origin) and origin not in UNDER_ANOTHER_NAME):
                continue
            for alias in node.names:
                public_name = alias.asname or alias.name
                if not public_name.startswith("_"):
                    yield origin, alias.name, public_name


def origin_entries(origin: str, sources: dict[str, Path]) -> list[Entry]:
    """What a private module documents, itself left out; names with an underscore may be re-exported under another."""
    if origin in sources:
        tree = parse(sources[origin])
        exported = public_names(tree)
        entries = definitions(tree, private=True)
        return [entry for entry in entries if exported is None or entry.name.partition(".")[0] in exported]
    extension = c_module(origin)
    return list(c_entries(extension)) if extension else []


# --- modules written in C -------------------------------------------------------------------------


def c_module(name: str) -> types.ModuleType | None:
    """Import a module that is built in or a C extension of the standard library; None for any other."""
    if name in NOT_IMPORTED or "." in name:
        return None
    if name not in sys.builtin_module_names:
        folders = {sysconfig.get_path("platstdlib"), sysconfig.get_path("stdlib")}
        places = [str(Path(folder, sub)) for folder in sorted(folders) for sub in ("lib-dynload", "../DLLs", ".")]
        spec = PathFinder.find_spec(name, [*places, *filter(None, [sysconfig.get_config_var("DESTSHARED")])])
        if spec is None or not isinstance(spec.loader, ExtensionFileLoader):
            return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about deprecated modules
            module = importlib.import_module(name)
    except Exception:  # an extension without its shared library, say
        return None
    loader = getattr(module, "__loader__", None)
    is_c = name in sys.builtin_module_names or loader is BuiltinImporter or isinstance(loader, ExtensionFileLoader)
    return module if is_c else None


def c_entries(module: types.ModuleType) -> Iterator[Entry]:
    """Yield what a C extension says of itself, of its functions, of its classes and of their methods."""
    yield Entry("", "module", module.__doc__ or "")
    for name, value in sorted(vars(module).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, types.BuiltinFunctionType):
            yield Entry(name, "function", value.__doc__ or "")
        elif isinstance(value, type) and not is_alias(module, name, value):
            yield Entry(name, "class", own_docstring(value))
            for method, descriptor in sorted(vars(value).items()):
                if not method.startswith("_") and inspect.isroutine(descriptor):
                    yield Entry(f"{name}.{method}", "method", descriptor.__doc__ or "")


def is_alias(module: types.ModuleType, name: str, value: type) -> bool:
    """Say whether a class is another's second name (`socket.error` is OSError)."""
    if module.__name__ != "builtins" and value.__module__ == "builtins":
        return getattr(sys.modules["builtins"], value.__name__, None) is value
    return name != value.__name__ and vars(module).get(value.__name__) is value


def own_docstring(value: type) -> str:
    """A class's docstring, unless it is only inherited."""
    doc = value.__doc__
    inherited = any(base.__doc__ == doc for base in value.__mro__[1:])
    return doc if isinstance(doc, str) and not inherited else ""
