"""`embell train RECIPE`."""

from __future__ import annotations

import difflib
import os
from importlib import import_module
from importlib.util import find_spec

import click

from embell.cli.environment import check_environment
from embell.errors import MissingExtraError

_RECIPES = {
    "contrastive": "From pairs or triplets: what belongs together moves together.",
    "graded": "From pairs with a score: how alike two texts are.",
    "distill": "From a teacher: a small model learns a large one's vectors.",
    "pretrain": "From plain text: a new small decoder, for the others to start from.",
}


class _Recipes(click.Group):
    """A group whose recipes live in modules of their own, imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_RECIPES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _RECIPES:
            return None
        if find_spec("accelerate") is None:  # importing it would load torch
            raise MissingExtraError("training needs accelerate: pip install 'embell[train]'")
        if "OMP_WAIT_POLICY" not in os.environ:
            # Threads of torch's OpenMP wait awake for milliseconds: where other work runs on the cores, that halves the pace.
            os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        from embell.training.recipe import command

        return command(cmd_name, getattr(import_module(f"embell.training.{cmd_name}"), cmd_name))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _RECIPES:
            near = difflib.get_close_matches(args[0], _RECIPES, 1)
            ctx.fail(
                f"No such recipe {args[0]!r}. " + (f"Did you mean {near[0]}?" if near else f"Known are {', '.join(_RECIPES)}.")
            )
        name, command, rest = super().resolve_command(ctx, args)
        check_environment(ctx, name, command, rest)
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Recipes"):
            formatter.write_dl(list(_RECIPES.items()))


@click.group(cls=_Recipes, no_args_is_help=True, subcommand_metavar="RECIPE [OPTIONS]")
def train() -> None:
    """Train an encoder with a recipe.

    \b
    embell train contrastive --model DIR --data pairs.jsonl --output RUN
    embell train graded --model DIR --data scored.tsv --output RUN
    embell train contrastive --config run.toml --learning-rate 2e-5

    A recipe's settings come from its options, from a TOML file (--config) and from the environment: --batch 64,
    batch = 64 in the file, EMBELL_TRAIN_CONTRASTIVE_BATCH=64. An option overrides the environment, and that the file.
    The folder of the finished model is printed. embell train RECIPE --help lists the settings.
    """
