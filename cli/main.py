"""The command `embell`. Commands are imported when they are called, so that --help is quick."""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from importlib import import_module
from typing import Any

import click

from embell import __version__
from embell.cli.environment import check_environment, from_environment
from embell.errors import EmbellError, EmbellWarning

_COMMANDS = {
    "index": ("index", "Index a corpus: encode what is new and write it to a collection."),
    "search": ("search", "Search a collection by meaning."),
    "similar": ("search", "Find the documents nearest to one of the collection."),
    "dedup": ("dedup", "Find near-duplicates in a corpus or a collection."),
    "outliers": ("overview", "Show the documents that resemble others least."),
    "representatives": ("overview", "Show a few documents that stand for the whole corpus."),
    "info": ("collection", "Show what a collection holds and what it was made with."),
    "optimize": ("tune", "Build the index of a collection anew."),
    "tune": ("tune", "Make search as fast as a recall allows, and measure the recall."),
    "delete": ("collection", "Delete documents from a collection."),
    "encode": ("encode", "Encode a corpus to a file of vectors."),
    "evaluate": ("evaluate", "Measure the encoder: STS, retrieval, near-duplicates."),
    "layers": ("layers", "Score an encoder at every depth: where to start, where to stop."),
    "train": ("train", "Train an encoder: contrastive, graded, distill, pretrain."),
    "demo": ("demo", "See it work on the documentation of this machine's own Python."),
}


_SHOWING = {"search", "similar", "outliers", "representatives", "info"}
"""Commands that are done when nobody reads on."""


class _Commands(click.Group):
    """A group whose commands live in modules that are imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"embell.cli.{_COMMANDS[cmd_name][0]}"), cmd_name)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and (near := difflib.get_close_matches(args[0], _COMMANDS, 1)):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]}?")
        name, command, rest = super().resolve_command(ctx, args)
        check_environment(ctx, name, command, rest)
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(
    cls=_Commands,
    context_settings={"auto_envvar_prefix": "EMBELL", "help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="embell")
def cli() -> None:
    """Semantic search and near-duplicate detection, offline, with BeLLM encoders.

    \b
    embell index notes/ --to notes.embell
    embell search notes.embell "what did we decide about backups"
    embell dedup corpus.jsonl --output kept.jsonl --removed removed.jsonl
    """


def main() -> None:
    """Run the command line. Errors are one line on stderr; the status is 1 for failed, 2 for misused."""
    shown = warnings.showwarning

    def one_line(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, EmbellWarning):
            _fail("embell", f"warning: {message}")
        else:
            shown(message, category, *where)

    warnings.showwarning = one_line  # type: ignore[assignment]
    try:
        status = cli.main(prog_name="embell", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        status = 2
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        where = context.command_path if context is not None and context.parent else "embell"
        _fail(where, error.format_message() + from_environment(error))
        status = error.exit_code
    except EmbellError as error:
        _fail("embell", str(error))
        status = error.exit_status
    except (click.Abort, KeyboardInterrupt):
        indexing = "index" in sys.argv[1:2]
        _fail("embell", "interrupted" + "; what was committed stays, the same command goes on from there" * indexing)
        status = 130
    except SystemExit as left:  # click's, when a line is completed, or with 1 when a reader of our output has seen enough
        status = 0 if left.code == 1 and set(sys.argv[1:2]) & _SHOWING else left.code
    except MemoryError:
        _fail("embell", "out of memory; index in smaller parts, or lower --commit-rows")
        status = 1
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        _fail("embell", f"{name}{error.strerror or error}")
        status = 1
    except Exception as error:
        if os.environ.get("EMBELL_TRACEBACK"):
            raise
        _fail("embell", f"unexpected {type(error).__name__}: {error}; this is a fault of embell, EMBELL_TRACEBACK=1 shows where")
        status = 1
    sys.exit(status if isinstance(status, int) else 0)


def _fail(where: str, message: str) -> None:
    click.echo(f"{where}: {' '.join(message.split())}", err=True)
