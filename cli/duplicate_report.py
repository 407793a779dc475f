"""The near-duplicate report: one HTML file in which a person sees the duplicates and judges them.

The page is `duplicate_report.html`; the findings are embedded as JSON. Texts are strangers': they reach
the page as text nodes only, and a policy in the page lets nothing run or load but the page's own script and style.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

_TEMPLATE = Path(__file__).with_suffix(".html")


@dataclass(frozen=True)
class Member:
    """A dropped text: its score with the kept one, the kind of duplicate and the kept one's id."""

    id: str
    text: str
    score: float
    kind: str
    kept_id: str


@dataclass(frozen=True)
class Group:
    """A kept text, and those that were dropped for it."""

    id: str
    text: str
    members: list[Member]


@dataclass(frozen=True)
class Report:
    """What the page shows.

    `dropped`, `thresholds` and `histogram` are by kind; a histogram is a list of (low, high, pairs).
    `groups` are those shown, read once, from first to last; `all_groups` counts the others too. `capped` counts documents
    with so many partners that only the links to a few, and to a kept one, are among the pairs.
    """

    title: str
    documents: int
    kept: int
    dropped: dict[str, int]
    thresholds: dict[str, float]
    rule: str
    keep: str
    histogram: dict[str, list[tuple[float, float, int]]]
    groups: Iterable[Group]
    all_groups: int
    capped: int
    notes: list[str]


def write_report(report: Report, file: IO[str]) -> None:
    """Write the page, group by group; the same report gives the same bytes.

    Raises ValueError for a member whose `kept_id` is not its group's: a person would judge a pair that is not shown.
    """
    head, tail = _TEMPLATE.read_text(encoding="utf-8").split("{{data}}")
    head = head.replace("{{policy}}", _policy(head + tail))
    file.write(head.replace("{{title}}", html.escape(report.title)))  # last: a title may hold anything
    summary = {field.name: getattr(report, field.name) for field in fields(Report) if field.name != "groups"}
    file.write(_embedded(summary)[:-1] + ',"groups":[\n')
    for number, group in enumerate(report.groups):
        file.write((",\n" if number else "") + _embedded(_group(group)))
    file.write("\n]}" + tail)


def _group(group: Group) -> dict[str, Any]:
    members = []
    for member in group.members:
        if member.kept_id != group.id:
            raise ValueError(f"{member.id}: dropped for {member.kept_id}, but listed under {group.id}")
        row = asdict(member) | {"score": float(member.score), "key": _key(group, member)}
        del row["kept_id"]
        members.append(row)
    return {"id": group.id, "text": group.text, "members": members}


def _key(group: Group, member: Member) -> str:
    """Under what a browser remembers the decision on a pair: it holds in each report on these two texts."""
    pair = json.dumps([group.id, group.text, member.id, member.text])
    return hashlib.blake2b(pair.encode(), digest_size=12).hexdigest()


def _embedded(value: object) -> str:
    """JSON that is harmless inside <script>, and that can be encoded even if a text holds half a surrogate pair."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _policy(page: str) -> str:
    """The Content-Security-Policy: no network at all; style and script by their hashes, so none can be added."""
    allowed = []
    for tag in ("style", "script"):
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        allowed.append(f"{tag}-src 'sha256-{digest}'")
    rest = ["base-uri 'none'", "form-action 'none'", "require-trusted-types-for 'script'", "trusted-types 'none'"]
    return "; ".join(["default-src 'none'", *allowed, *rest])
