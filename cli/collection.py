"""`embell info` and `embell delete`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from embell.cli.console import counted, write_json
from embell.cli.options import PATH, json_option

if TYPE_CHECKING:
    from embell.engine.spec import EncoderSpec


@click.command(no_args_is_help=True)
@click.argument("directory", metavar="DIR", type=PATH)
@json_option
def info(directory: str, as_json: bool) -> None:
    """Show what a collection holds and what it was made with."""
    from embell.engine.collection import Collection
    from embell.engine.pair_list import PARTNERS
    from embell.engine.saved_pairs import SavedPairs

    collection = Collection.open(directory)
    manifest, store = collection.manifest, collection.store
    encoder = manifest.encoder
    listed = SavedPairs.told(Path(directory))
    size = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
    facts = {
        "path": directory,
        "rows": len(collection),
        "documents": store.documents,
        "chunk": manifest.chunk,
        "columns": {name: str(kind) for name, kind in store.metadata_types.items()},
        "dim": manifest.dim,
        "own_vectors": manifest.own_vectors,
        "encoder": None if encoder is None else encoder.to_dict(),
        "index": manifest.index,
        "recall": manifest.recall,
        "target": manifest.target,
        "tuned": manifest.tuned,
        "duplicates": listed,
        "bytes": size,
        "table_version": store.version,
    }
    if as_json:
        write_json(facts)
        return
    lines = [("documents", f"{facts['documents']:,}")]
    if manifest.chunk is not None:
        lines.append(("chunks", f"{facts['rows']:,}, of at most {manifest.chunk} tokens"))
    if encoder is None:
        lines.append(("vectors", f"given, {manifest.dim} wide; text queries need --model"))
    else:
        lines.append(
            ("model", f"{encoder.backbone} ({_layers(encoder)}, {encoder.pooling} pooling, {encoder.dim} wide, {encoder.dtype})")
        )
        if encoder.adapter is not None:
            lines.append(("adapter", encoder.adapter))
        for name, prompt in (("query", encoder.query_prompt), ("document", encoder.document_prompt)):
            if prompt != "{text}":
                lines.append((f"{name}", prompt if isinstance(prompt, str) else f"{len(prompt)} prompts, averaged"))
        others = [("pooled tokens", encoder.pooled_tokens, "all"), ("clean-up", encoder.cleanup, "none")]
        told = [f"{name} {value}" for name, value, usual in others if value != usual]
        if encoder.token_prepending is not None:
            first, end = encoder.token_prepending
            told.append(f"token prepending before layers {first} to {end - 1}")
        if told:
            lines.append(("settings", ", ".join(told)))
        long = {
            "truncate": "longer texts are cut",
            "chunk": "longer texts in pieces, averaged",
            "error": "longer texts are refused",
        }
        lines.append(("max length", f"{encoder.max_length:,} tokens; {long[encoder.on_long]}"))
    recall = "not measured" if manifest.recall is None else f"{manifest.recall:.3f}"
    if (tuned := manifest.tuned) is not None:
        recall += f" (more than {tuned['low']:.3f} with 95 % certainty, measured on {tuned['of']}; {tuned['qps']:,.0f} queries/s)"
    lines.append(("index", f"{manifest.index}, recall@10 {recall}"))
    lines.append(("metadata", ", ".join(f"{name} {kind}" for name, kind in store.metadata_types.items()) or "none"))
    if listed is not None:
        at = ", ".join(f"{kind} {value:g}" for kind, value in listed["thresholds"].items() if kind != "exact")
        capped = (
            f"; {counted(listed['capped'], 'row')} with more than {PARTNERS:,} partners, not all listed"
            if listed["capped"]
            else ""
        )
        lines.append(
            ("duplicates", f"{counted(listed['pairs'], 'pair')} of {listed['rows']:,} rows ({at or 'exact'} or more){capped}")
        )
    lines.append(("size", f"{size / 1e6:,.1f} MB"))
    for name, value in lines:
        click.echo(f"{name:<11}{value}")


def _layers(encoder: EncoderSpec) -> str:
    """Which layers look where, in words."""
    if not encoder.layers:
        return "a static model"
    if encoder.start_layer is None:
        return f"{encoder.layers} causal layers"
    both = encoder.layers - encoder.start_layer
    return f"{'all' if both == encoder.layers else f'the last {both} of'} {encoder.layers} layers look both ways"


@click.command(no_args_is_help=True)
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--id", "ids", metavar="ID", multiple=True, help="Document to delete (repeatable).")
@click.option("--where", metavar="EXPR", help="Delete documents that match this condition.")
@json_option
def delete(directory: str, ids: tuple[str, ...], where: str | None, as_json: bool) -> None:
    """Delete documents from a collection.

    \b
    embell delete notes.embell --id old.md
    embell delete news.embell --where "year < 1990"
    """
    if not ids and where is None:
        raise click.UsageError("say what to delete: --id ID, or --where EXPR")
    from embell.engine.collection import Collection

    deleted = Collection.open(directory).delete(ids, where=where)
    if as_json:
        write_json({"deleted": deleted})
    else:
        click.echo(f"{counted(deleted, 'row')} deleted")
