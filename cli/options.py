"""Options that several commands take: which model, and how to read a corpus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from embell.engine import Encoder

F = TypeVar("F", bound=Callable[..., Any])


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


@dataclass(frozen=True)
class ModelOptions:
    """What the command line says of the model; `settings` holds only what was given."""

    model: str | None
    revision: str | None
    settings: dict[str, Any]
    device: str | None
    dtype: str | None
    threads: int | None

    @property
    def given(self) -> bool:
        """Whether another encoder than a collection's own is asked for."""
        return self.model is not None or bool(self.settings)

    def load(self) -> Encoder:
        """Load the encoder. Raises EncoderError if that is not possible."""
        from embell.engine.encoder import Encoder

        return Encoder.load(
            self.model, revision=self.revision, device=self.device, dtype=self.dtype, threads=self.threads, **self.settings
        )

    def for_collection(self, path: str) -> Encoder | None:
        """The encoder for a collection: the model that is named, else the collection's own with the settings given.

        None if nothing is given: the collection then loads its own when it needs it.
        """
        if self.model is not None:
            return self.load()
        if not self.settings and self.device is None and self.dtype is None and self.threads is None:
            return None
        from pathlib import Path

        from embell.engine.encoder import Encoder
        from embell.engine.manifest import Manifest

        spec = Manifest.read(Path(path)).encoder
        if spec is None:
            return None
        return Encoder.from_spec(spec, device=self.device, dtype=self.dtype, threads=self.threads, **self.settings)


SETTINGS = ("start_layer", "pooling", "query_prompt", "document_prompt", "max_length")


def model_options(command: F) -> F:
    """Add the options of the encoder; the command receives `model: ModelOptions`."""

    def wrapped(
        *args: Any,
        model: str | None,
        revision: str | None,
        device: str | None,
        dtype: str | None,
        threads: int | None,
        **kwargs: Any,
    ) -> Any:
        context = click.get_current_context()
        settings = {}
        for name in SETTINGS:
            value = kwargs.pop(name)
            # `none` is a start layer too, so a missing option is told by its source, not by its value
            if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
                settings[name] = value
        return command(*args, model=ModelOptions(model, revision, settings, device, dtype, threads), **kwargs)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    options = [
        click.option("--model", metavar="DIR|ID", help="Model directory or hub id.  [default: embell-mini, the embedded model]"),
        click.option("--revision", help="Revision of a hub model."),
        click.option(
            "--start-layer", type=StartLayer(), help="First bidirectional layer: 0, 1, …, from the end with a minus, or none."
        ),
        click.option("--pooling", type=click.Choice(["mean", "last"]), help="How token states become one vector."),
        click.option("--query-prompt", metavar="TEMPLATE", help="Prompt for questions, with {text} in it."),
        click.option("--document-prompt", metavar="TEMPLATE", help="Prompt for documents, with {text} in it."),
        click.option("--max-length", type=click.IntRange(1), help="Longest text in tokens; the rest is cut and counted."),
        click.option("--device", help="cpu, cuda, cuda:1, …  [default: a GPU if there is one]"),
        click.option(
            "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: bf16 where the hardware has it]"
        ),
        click.option("--threads", type=click.IntRange(1), help="CPU threads."),
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
