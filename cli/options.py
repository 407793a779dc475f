"""Options that several commands take: which model, and how to read a corpus."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from embell.cli.console import note

if TYPE_CHECKING:
    from embell.engine import Encoder, EncoderSpec

F = TypeVar("F", bound=Callable[..., Any])


class _Path(click.ParamType[str]):
    """Any text, which a shell completes to the name of a file or folder."""

    name = "path"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


PATH = _Path()


class StartLayer(click.ParamType[Any]):
    """A layer number, a negative one, or `none`."""

    name = "LAYER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value is None or value == "none":
            return None
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is not a layer number; use 0, 1, …, a negative number from the end, or none", param, ctx)


def is_text(value: str) -> bool:
    """Whether an argument came as UTF-8; bytes that are not stand in it as surrogates."""
    return not any("\ud800" <= sign <= "\udfff" for sign in value)


class LayerRange(click.ParamType[Any]):
    """FIRST:END, as token prepending takes it, or `none`."""

    name = "FIRST:END"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int] | None:
        if value is None or value == "none":
            return None
        try:
            first, end = value.split(":")
            return int(first), int(end)
        except ValueError:
            self.fail(f"{value!r} is not a range of layers; write FIRST:END, such as 1:7, or none", param, ctx)


class Pooling(click.ParamType[Any]):
    """A pooling, or several joined by `+`."""

    name = "POOLING"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from embell.engine.spec import POOLINGS

        for part in value.split("+"):
            if part not in POOLINGS:
                near = difflib.get_close_matches(part, POOLINGS, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(POOLINGS)}"
                self.fail(f"there is no pooling {part!r}; {hint}", param, ctx)
        return str(value)


class Template(click.ParamType[Any]):
    """A prompt; in the environment it is one, spaces and all."""

    name = "TEMPLATE"

    def split_envvar_value(self, rv: str) -> list[str]:
        return [rv]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not is_text(value):
            self.fail(f"{value!r} is not UTF-8", param, ctx)
        return str(value)


@dataclass(frozen=True)
class ModelOptions:
    """What the command line says of the model; `settings` holds only what was given."""

    model: str | None
    settings: dict[str, Any]
    device: str | None
    dtype: str | None
    threads: int | None

    @property
    def given(self) -> bool:
        """Whether another encoder than a collection's own is asked for."""
        return self.model is not None or bool(self.settings)

    def load(self, spec: EncoderSpec | None = None) -> Encoder:
        """Load the encoder, and tell what was assumed, unless it does not fit `spec`: that is then told instead.

        Raises EncoderError if that is not possible.
        """
        from embell.engine.encoder import Encoder

        encoder = Encoder.load(self.model, device=self.device, dtype=self.dtype, threads=self.threads, **self.settings)
        if spec is None or not spec.differences(encoder.spec):
            for line in encoder.notes:
                note(line)
        return encoder

    def for_collection(self, path: str) -> Encoder | None:
        """The encoder for a collection: the model that is named, else the collection's own with the settings given.

        None if nothing is given: the collection then loads its own when it needs it.
        """
        from pathlib import Path

        from embell.engine.manifest import Manifest

        spec = Manifest.read(Path(path)).encoder
        if self.model is not None:
            return self.load(spec)
        if not self.settings and self.device is None and self.dtype is None and self.threads is None:
            return None
        if spec is None:
            if self.settings:
                name = next(iter(self.settings)).replace("_", "-")
                raise click.UsageError(
                    f"--{name} is about a model, and this collection's vectors were given; name the model too: --model"
                )
            return None
        from embell.engine.encoder import Encoder

        return Encoder.from_spec(spec, device=self.device, dtype=self.dtype, threads=self.threads, **self.settings)


SETTINGS = (
    "revision", "preset", "adapter", "adapter_revision", "merge_adapter", "start_layer", "layers", "pooling", "pooled_tokens", "query_prompt",
    "document_prompt", "cleanup", "token_prepending", "max_length", "on_long", "dim",
)  # fmt: skip


def model_options(command: F) -> F:
    """Add the options of the encoder; the command receives `model: ModelOptions`."""

    def wrapped(
        *args: Any, model: str | None, device: str | None, dtype: str | None, threads: int | None, **kwargs: Any
    ) -> Any:  # fmt: skip
        context = click.get_current_context()
        settings = {}
        for name in SETTINGS:
            value = kwargs.pop(name)
            # `none` is a start layer too, so a missing option is told by its source, not by its value
            if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
                settings[name] = value[0] if isinstance(value, tuple) and name.endswith("_prompt") and len(value) == 1 else value
        return command(*args, model=ModelOptions(model, settings, device, dtype, threads), **kwargs)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    options = [
        click.option(
            "--model", metavar="DIR|ID", type=PATH, help="Model directory or hub id.  [default: embell-mini, the embedded model]"
        ),
        click.option("--revision", help="Revision of a hub model."),
        click.option("--adapter", metavar="DIR|ID", type=PATH, help="LoRA adapter to put over the model."),
        click.option("--adapter-revision", help="Revision of a hub adapter."),
        click.option("--merge-adapter", is_flag=True, help="Add the adapter to the weights: quicker, rounds a little."),
        click.option(
            "--preset",
            metavar="NAME",
            help="Settings of a known method: bellm, prompteol, summarize, knowledge, cot, metaeol, echo.",
        ),
        click.option(
            "--start-layer", type=StartLayer(), help="First bidirectional layer: 0, 1, …, from the end with a minus, or none."
        ),
        click.option(
            "--layers", metavar="N", type=click.IntRange(1), help="Keep the first N layers: quicker, see embell layers."
        ),
        click.option(
            "--pooling",
            type=Pooling(),
            help="How token states become one vector: mean, last, cls, max, weighted-mean, mean-sqrt-length; several with +.",
        ),
        click.option(
            "--pooled-tokens", type=click.Choice(["all", "text"]), help="Which tokens are pooled: all, or the text's own."
        ),
        click.option(
            "--query-prompt",
            type=Template(),
            multiple=True,
            help="Prompt for questions, with {text} in it; several are averaged.",
        ),
        click.option(
            "--document-prompt",
            type=Template(),
            multiple=True,
            help="Prompt for documents, with {text} in it; several are averaged.",
        ),
        click.option(
            "--cleanup",
            type=click.Choice(["none", "period", "period-quotes"]),
            help="End each text with a full stop, for prompts; it takes the place of a question mark.",
        ),
        click.option(
            "--token-prepending", type=LayerRange(), help="Layers in which <PST> in the prompt takes the last token's state."
        ),
        click.option("--dim", metavar="N", type=click.IntRange(1), help="Keep the first N components of each vector."),
        click.option("--max-length", metavar="N", type=click.IntRange(1), help="Longest text in tokens, prompt included."),
        click.option(
            "--on-long",
            type=click.Choice(["truncate", "chunk", "error"]),
            help="A longer text is cut and counted, encoded in pieces that are averaged, or refused.  [default: truncate]",
        ),
        click.option("--device", help="cpu, cuda, cuda:1, …  [default: a GPU if there is one]"),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            help="[default: bf16 where the hardware has it, else float32, on a graphics card float16]",
        ),
        click.option("--threads", metavar="N", type=click.IntRange(1), help="CPU threads."),
    ]
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


def corpus_options(command: F) -> F:
    """Add the options that say how to read a corpus; the command receives `corpus: CorpusOptions`."""

    def wrapped(
        *args: Any, id_field: str | None, text_field: tuple[str, ...], string_field: tuple[str, ...], keep_going: bool, **kwargs: Any
    ) -> Any:  # fmt: skip
        from embell.indexers.corpora import CorpusOptions

        return command(*args, corpus=CorpusOptions(id_field, text_field, None, string_field, keep_going), **kwargs)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    options = [
        click.option("--id-field", metavar="F", help="Field that holds the id.  [default: id, else _id, else path#row]"),
        click.option(
            "--text-field",
            metavar="F",
            multiple=True,
            help="Field that holds the text; several are joined.  [default: title and text]",
        ),
        click.option(
            "--string-field", metavar="F", multiple=True, help="Store this field as text, whatever it holds (repeatable)."
        ),
        click.option("--keep-going", is_flag=True, help="Skip rows that cannot be used instead of stopping."),
    ]
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON Lines.")
