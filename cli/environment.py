"""Settings in the environment: a misspelt one is refused, as a misspelt option is, and a wrong value is told by the variable's name."""

from __future__ import annotations

import difflib
import os

import click
from click.core import ParameterSource

from embell.errors import UsageError


def check_environment(group: click.Context, name: str | None, command: click.Command | None, args: list[str]) -> None:
    """Raises UsageError for a variable that begins like those of a command's options and is none of them.

    Not where the command is asked for help with `args`, or for what its shell may complete.
    """
    if name is None or command is None or group.resilient_parsing or {"-h", "--help"} & set(args):
        return
    prefix = f"{group.auto_envvar_prefix}_{name.upper()}_"
    if isinstance(command, click.Group):
        known = [f"{one.upper()}_" for one in command.list_commands(group)]
        wrong = next((rest for rest in _after(prefix) if not rest.startswith(tuple(known))), None)
        tried = (wrong or "").partition("_")[0] + "_"
    else:
        known = [option.name.upper() for option in command.get_params(group) if isinstance(option, click.Option) and option.name]
        wrong = next((rest for rest in _after(prefix) if rest not in known), None)
        tried = wrong or ""
    if wrong is not None:
        near = difflib.get_close_matches(tried, known, 1)
        hint = (
            f"did you mean {prefix}{near[0]}{wrong[len(tried) :]}?"
            if near
            else f"{group.command_path} {name} --help lists its options"
        )
        raise UsageError(f"environment variable {prefix}{wrong} is no setting; {hint}")


def from_environment(error: click.ClickException) -> str:
    """Where a wrong value came from, to be added to the message, if it was not from the command line."""
    if not isinstance(error, click.BadParameter) or error.ctx is None or error.param is None or error.param.name is None:
        return ""
    if error.ctx.get_parameter_source(error.param.name) != ParameterSource.ENVIRONMENT:
        return ""
    return f" It was set by {error.ctx.auto_envvar_prefix}_{error.param.name.upper()} in the environment."


def _after(prefix: str) -> list[str]:
    return sorted(variable.removeprefix(prefix) for variable in os.environ if variable.startswith(prefix))
