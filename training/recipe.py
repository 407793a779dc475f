"""A recipe is one function; its signature is its configuration, in a TOML file and on the command line.

Its parameters are `str`, `int`, `float`, `bool`, `Path`, `Literal` of strings, tuples of these (`tuple[str, ...]`), each also
`| None`, or frozen dataclasses with such fields. The fields of all dataclasses and the parameters share one flat name space.
What a parameter is for stands in the docstring, as `name: text` under "Args:" (a function) or "Attributes:" (a dataclass).
The function returns the path of the finished model.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from embell.errors import EmbellError, UsageError

Recipe = Callable[..., Path]


@dataclass(frozen=True)
class Key:
    """One setting of a recipe; `group` is the parameter whose dataclass holds it, "" for a parameter of its own."""

    name: str
    type: Any
    default: Any  # None if it is required
    required: bool
    help: str
    group: str

    @property
    def flag(self) -> str:
        """The option of the command line."""
        return "--" + self.name.replace("_", "-")


def keys(function: Recipe) -> list[Key]:
    """The settings of a recipe, in the order of its signature.

    Raises TypeError if the function cannot serve as a recipe: a type that is not known, a name that stands twice or means
    something else, a default of another type than its parameter, a setting that the docstring does not explain or explains in vain.
    """
    where = f"recipe {function.__name__}"
    hints = get_type_hints(function)
    told = _explained(function.__doc__, "Args:", where)
    found: list[Key] = []
    for parameter in inspect.signature(function).parameters.values():
        name, required = parameter.name, parameter.default is parameter.empty
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"{where}: {name} cannot be given by its name")
        if is_dataclass(hints.get(name)):
            told.pop(name, None)
            found += _fields(name, hints[name], None if required else parameter.default)
        else:
            text = told.pop(name, "")
            found.append(Key(name, hints.get(name), None if required else parameter.default, required, text, ""))
    if told:
        raise TypeError(f"{where}: the docstring explains {', '.join(told)}, which it does not have")
    _check(found, where)
    return found


def configure(function: Recipe, toml: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments for a recipe: its defaults, over them the TOML file, over that what is given.

    The keys of the file and of `given` are flat. The word "none" stands for None wherever that is possible.
    Raises UsageError if the file cannot be read or is for another recipe, for a key that does not exist, for a value
    that is not what its key takes, and for a key that has no default and no value.
    """
    known = {key.name: key for key in keys(function)}
    values: dict[str, Any] = {key.name: key.default for key in known.values() if not key.required}
    for where, settings in ((str(toml), {} if toml is None else _read(toml, function.__name__)), ("", dict(given))):
        if settings.get("start_layer") == "none" and "causal" in known:  # as in the other commands
            settings.setdefault("causal", True)
        for name, value in settings.items():
            if name not in known:
                raise _unknown(name, value, list(known), where or function.__name__)
            what = f"{where}: {name}" if where else known[name].flag
            values[name] = _checked(_Kind.of(known[name].type), value, what)
    if missing := [key for key in known.values() if key.name not in values]:
        names, flags = (" and ".join(getattr(key, how) for key in missing) for how in ("name", "flag"))
        raise UsageError(
            f"{function.__name__} needs {names}: give {flags}, or set {names} in a TOML file and name that with --config"
        )
    hints = get_type_hints(function)
    arguments: dict[str, Any] = {}
    for name in inspect.signature(function).parameters:
        group = {key.name: values[key.name] for key in known.values() if key.group == name}
        arguments[name] = hints[name](**group) if is_dataclass(hints[name]) else values[name]
    return arguments


def refuse(function: Recipe, values: Mapping[str, Any], names: Collection[str], why: str) -> None:
    """Raises UsageError if some of these settings are not at their defaults: they would change nothing, and `why`.

    `values` are keyword arguments of the recipe, `names` those of its settings.
    """
    given = [
        key.flag
        for key in keys(function)
        if key.name in names and (getattr(values[key.group], key.name) if key.group else values[key.name]) != key.default
    ]
    if given:
        has, it = ("has", "it") if len(given) == 1 else ("have", "them")
        raise UsageError(f"{', '.join(given)} {has} no effect {why}; leave {it} out, of a TOML file too")


def to_toml(function: Recipe, values: Mapping[str, Any]) -> str:
    """All settings as TOML from which `configure` makes the same values; `values` are what it returned.

    Raises UsageError for a value that is not what its key takes, KeyError for one that is missing.
    """
    lines = [f"recipe = {_toml(function.__name__)}"]
    for key in keys(function):
        value = getattr(values[key.group], key.name) if key.group else values[key.name]
        if value is None and key.name == "start_layer":  # "none" says more than that there is none: see `configure`
            continue
        lines.append(f"{key.name} = {_toml(_checked(_Kind.of(key.type), value, key.name))}")
    return "\n".join(lines) + "\n"


def command(name: str, function: Recipe) -> click.Command:
    """The recipe as a command: `--config FILE.toml` and a flag for each key. It prints where the finished model is.

    Raises TypeError if the function cannot serve as a recipe.
    """
    known = {key.name: key for key in keys(function)}

    def run(config: str | None, **flags: Any) -> None:
        context = click.get_current_context()
        given = {
            name: _parsed(_Kind.of(known[name].type), value)
            for name, value in flags.items()
            if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
        }
        first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes one tells
        try:
            model = function(**configure(function, None if config is None else Path(config), given))
        except RuntimeError as error:
            if "tried to allocate" in str(error) or "can't allocate memory" in str(error):
                raise EmbellError("out of memory; give a smaller model, --batch or --max-length, or --chunk") from error
            if first or "Connection closed by peer" not in str(error):
                raise
            raise EmbellError("the first process of this run ended, and says why") from error
        if first:
            click.echo(str(model))

    about = inspect.cleandoc(function.__doc__ or "").split("\nArgs:\n")[0].strip()
    about_config = (
        "Settings from a TOML file: key = value, a key being an option's name with _ for -. "
        "Options given here override it. Relative paths in it are relative to the current directory."
    )
    options = [click.Option(["config", "--config"], metavar="FILE.toml", type=click.Path(), help=about_config)]
    return _Command(name, callback=run, params=[*options, *map(_option, known.values())], help=about, keys=known)


# The signature


@dataclass(frozen=True)
class _Kind:
    """A type as settings know it."""

    base: type  # str, int, float, bool or Path
    choices: tuple[str, ...] = ()
    many: bool = False
    optional: bool = False

    @classmethod
    def of(cls, hint: Any) -> _Kind:
        """Raises TypeError for a type that no setting can have."""
        optional = many = False
        if get_origin(hint) in (Union, UnionType) and type(None) in get_args(hint) and len(get_args(hint)) == 2:
            hint, optional = next(part for part in get_args(hint) if part is not type(None)), True
        if get_origin(hint) is tuple and get_args(hint)[1:] == (...,):
            hint, many = get_args(hint)[0], True
        if get_origin(hint) is Literal and all(type(choice) is str for choice in get_args(hint)):
            if optional and "none" in get_args(hint):
                raise TypeError("'none' is a choice and also stands for None")
            return cls(str, get_args(hint), many, optional)
        if hint not in (str, int, float, bool, Path):
            raise TypeError(f"{hint!r} is no type of a setting")
        return cls(hint, (), many, optional)

    @property
    def words(self) -> str:
        """What a value must be, for a message."""
        if self.choices:
            one = f"one of {', '.join(self.choices)}"
            return f"a list whose items are each {one}" if self.many else one
        one, more = _WORDS[self.base]
        return f"a list of {more}" if self.many else one


_WORDS = {
    str: ("a text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a finite number", "finite numbers"),
    bool: ("true or false", "true and false"),
    Path: ("a path", "paths"),
}


def _fields(group: str, cls: Any, preset: Any) -> list[Key]:
    where = cls.__name__
    if not cls.__dataclass_params__.frozen:
        raise TypeError(f"{where} is not a frozen dataclass")
    told: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        told |= _explained(base.__dict__.get("__doc__"), "Attributes:", where)
    hints = get_type_hints(cls)
    found = []
    for field in fields(cls):
        if not field.init:
            raise TypeError(f"{where}: {field.name} cannot be given")
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if preset is not None:
            default = getattr(preset, field.name)
        required = default is MISSING
        text = told.pop(field.name, "")
        found.append(Key(field.name, hints[field.name], None if required else default, required, text, group))
    if told:
        raise TypeError(f"{where}: the docstring explains {', '.join(told)}, which it does not have")
    return found


def _explained(docstring: str | None, heading: str, where: str) -> dict[str, str]:
    """The entries `name: text` below the heading; a text may go on in lines that are indented further."""
    lines = inspect.cleandoc(docstring or "").split("\n")
    if heading not in lines:
        return {}
    told: dict[str, str] = {}
    indent, last = "", ""
    for line in lines[lines.index(heading) + 1 :]:
        if not line.strip():
            continue
        if not line.startswith(" "):
            break
        indent = indent or line[: len(line) - len(line.lstrip())]
        entry = re.fullmatch(rf"{indent}(\w+): (.+)", line)
        if entry:
            last = entry[1]
            told[last] = entry[2].strip()
        elif last and line.startswith(indent + " "):
            told[last] += " " + line.strip()
        else:
            raise TypeError(f"{where}: {line.strip()!r} below {heading} is not `name: text`")
    return told


def _check(found: list[Key], where: str) -> None:
    """Raises TypeError for what is wrong with the keys of a recipe."""
    taken = {"--config", "--help", "--recipe"}
    for key in found:
        try:
            kind = _Kind.of(key.type)
            flags = {key.flag} | ({f"--no-{key.flag[2:]}"} if kind.base is bool else set())
            if not taken.isdisjoint(flags):
                raise TypeError(f"{' or '.join(sorted(taken & flags))} is taken")
            taken |= flags
            if kind.base is bool and kind.many:
                raise TypeError("a tuple of bool is no type of a setting")
            if not key.required and _checked(kind, key.default, "the default") != key.default:
                raise TypeError(f"the default is {key.default!r}, not {kind.words}")
            if not key.help:
                raise TypeError("the docstring does not explain it")
        except (TypeError, UsageError) as error:
            raise TypeError(f"{where}: {key.name}: {error}") from None


# Values


def _checked(kind: _Kind, value: Any, what: str) -> Any:
    """The value as its key takes it. Raises UsageError, in which `what` names the key."""
    if kind.optional and (value is None or value == "none"):
        return None
    try:
        if not kind.many:
            return _one(kind, value)
        if not isinstance(value, (list, tuple)):
            raise ValueError
        return tuple(_one(kind, item) for item in value)
    except (ValueError, OverflowError):
        hint = ""
        if kind.choices and isinstance(value, str) and (near := difflib.get_close_matches(value, kind.choices, 1)):
            hint = f"; did you mean {near[0]!r}?"
        elif (
            kind.many and type(value) in (str, int, float) and not (isinstance(value, (int, float)) and kind.base in (str, Path))
        ):
            hint = f"; write [{_shown(value)}]"
        raise UsageError(f"{what} is {_shown(value)}, not {kind.words}{' or none' * kind.optional}{hint}") from None


def _one(kind: _Kind, value: Any) -> Any:
    """Raises ValueError, or OverflowError for a whole number that is too large for a float."""
    if kind.base is float and type(value) is int:
        value = float(value)
    if kind.base is Path and isinstance(value, (str, Path)):
        value = str(value)
        if not value or "\0" in value:
            raise ValueError
    elif type(value) is not kind.base:
        raise ValueError
    if kind.base is float and not math.isfinite(value):
        raise ValueError
    if isinstance(value, str):
        value.encode()  # what came as bytes that are not UTF-8 could not be written to a TOML file
    if kind.choices and value not in kind.choices:
        raise ValueError
    return Path(value) if kind.base is Path else value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str).encode(errors="replace").decode()
    return text if len(text) <= 60 else text[:57] + "…"


def _parsed(kind: _Kind, value: Any) -> Any:
    """What the command line says, as TOML would hold it; text that is no number stays, and `configure` refuses it."""
    if isinstance(value, (tuple, list)):
        return "none" if kind.optional and list(value) == ["none"] else tuple(_parsed(kind, item) for item in value)
    if kind.base not in (int, float) or not isinstance(value, str):
        return value
    try:
        return kind.base(value)
    except ValueError:
        return value


# TOML


def _read(path: Path, recipe: str) -> dict[str, Any]:
    tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        settings: dict[str, Any] = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        fault = "cannot be read" if isinstance(error, OSError) else "not valid TOML"
        raise UsageError(f"{path}: {fault} ({getattr(error, 'strerror', None) or error})") from error
    named = settings.pop("recipe", recipe)
    if named != recipe:
        raise UsageError(f"{path}: recipe is {_shown(named)}, and this is {recipe}")
    return settings


def _unknown(name: str, value: Any, known: list[str], where: str) -> UsageError:
    if isinstance(value, dict):
        return UsageError(f"{where}: unknown table [{name}]; all keys stand at the top, without tables")
    near = difflib.get_close_matches(name, known, 1)
    return UsageError(
        f"{where}: unknown key {name!r}, " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}")
    )


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Path):
        value = "./none" if value == Path("none") else str(value)
    # JSON's strings are TOML's, but for the one control character that JSON leaves as it is.
    return json.dumps("none" if value is None else value, ensure_ascii=False).replace("\x7f", "\\u007f")


# The command line


class _Command(click.Command):
    """A command whose options are listed by group."""

    def __init__(self, name: str, *, keys: Mapping[str, Key], **options: Any) -> None:
        super().__init__(name, **options)
        self._keys = keys

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"": []}
        for parameter in self.get_params(ctx):
            key = self._keys.get(parameter.name or "")
            if record := parameter.get_help_record(ctx):
                sections.setdefault(key.group if key else "", []).append(record)
        for group, records in sections.items():
            with formatter.section(f"{group.capitalize().replace('_', ' ')} options" if group else "Options"):
                formatter.write_dl(records)


class _Choice(click.Choice[str]):
    """Choices for the shell to complete; what is none of them is refused by `configure`, which names the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value


_METAVARS = {str: "TEXT", int: "N", float: "NUMBER", Path: "PATH"}


def _option(key: Key) -> click.Option:
    """The flag of a key. Its default is shown but not set: what is not given must not override the TOML file."""
    kind = _Kind.of(key.type)
    text = key.help + " (repeatable)" * kind.many
    if key.required:
        text += "  [required]"
    elif key.default != () and not (key.default is None and "default: " in key.help):  # the help says what none means
        text += f"  [default: {_default(key)}]"
    if kind.base is bool:
        return click.Option([key.name, f"{key.flag}/--no-{key.flag[2:]}"], default=None, help=text)
    takes: click.ParamType[Any] = click.Path() if kind.base is Path else click.STRING
    metavar = _METAVARS[kind.base] + "|none" * kind.optional
    if kind.choices:
        choices = [*kind.choices, *["none"] * kind.optional]
        takes, metavar = _Choice(choices), f"[{'|'.join(choices)}]"
    return click.Option([key.name, key.flag], type=takes, metavar=metavar, multiple=kind.many, default=None, help=text)


def _default(key: Key) -> str:
    if isinstance(key.default, bool):
        return key.flag[2:] if key.default else f"no-{key.flag[2:]}"
    if isinstance(key.default, tuple):
        return ", ".join(map(str, key.default))
    return "none" if key.default is None else str(key.default)
