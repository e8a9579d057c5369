"""What a comparison of two banks looks like: a diff of documents, or JSON. Knows the terminal and what was compared."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from regrad_cli.records import Passage
from regrad_cli.render import Terminal
from regrad_cli.shown import count

if TYPE_CHECKING:
    from regrad_cli.comparing import Compared

MARKS = {"added": "+", "removed": "-", "changed": "~", "recomputed": "*", "unknown": "?"}
COLOURS = {"+": "green", "-": "red", "~": "yellow", "*": "cyan", "?": "yellow", "!": "yellow"}
CONTEXT_LINES = 1
PRINT_DIGITS = 12  # of a fingerprint
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+")


def difference(terminal: Terminal, compared: Compared, *, text: bool) -> None:
    """Everything that differs; nothing on stdout where nothing does, as with git. `text`: changed passages too."""
    found = compared.difference
    for each in found.left_out:
        terminal.warning(f"left out: {each}")
    if terminal.json:
        terminal.document(_document(compared, text))
        return
    if found.identical:
        where = f"{compared.before.path}@{compared.before.number} and {compared.after.path}@{compared.after.number}"
        terminal.notice(f"no difference between {where}")
        return
    for mark, side in (("---", compared.before), ("+++", compared.after)):
        made = f"  {side.manifest.time}  {side.manifest.operation}"
        terminal.parts((f"{mark} {side.path}@{side.number}", "bold"), (made, "dim"))
    for name, (before, after) in found.settings.items():
        terminal.parts((f"! {name.replace('_', ' ')}  {_setting(before)} → {_setting(after)}", COLOURS["!"]))
    for mark, document in _ordered(found):
        title = f"  {document.title}" if document.title and document.title != document.source else ""
        terminal.parts((f"{mark} {document.source}", COLOURS[mark]), (f"{title}  ({_told(mark, document)})", "dim"))
        if text:
            for change in document.changes:
                _text(terminal, change.ordinal, compared.passages(change))
    if not found.comparable and found.recomputed:
        same = f"* {count(len(found.recomputed), 'document')} with the same text"
        terminal.parts((same, COLOURS["*"]), ("  (gradients of other tensors cannot be compared)", "dim"))
    terminal.parts((_summary(found), "bold"))


def _ordered(found: Any) -> list[tuple[str, Any]]:
    """(mark, document) in the order of sources."""
    listed = [
        (mark, document)
        for name, mark in MARKS.items()
        if found.comparable or name != "recomputed"
        for document in getattr(found, name)
    ]
    return sorted(listed, key=lambda entry: (entry[1].source, entry[1].id))


def _told(mark: str, document: Any) -> str:
    if mark == "~":
        passages = _span([change.ordinal for change in document.changes])
        return f"passage{'' if passages.isdecimal() else 's'} {passages}"
    passages = count(document.passages, "passage")
    if mark == "?":
        return f"{passages}; without their text it cannot be told whether it changed"
    if mark != "*":
        return passages
    cosine, ratio = document.cosine, document.norm_ratio
    worst = f", at worst {cosine.worst:.4f}" if document.passages > 1 else ""
    norm = "" if ratio.mean is None else f", norm × {ratio.mean:.3g}"
    return f"{passages}, cosine {cosine.mean:.4f}{worst}{norm}"


def _span(numbers: Sequence[int]) -> str:
    """Ascending numbers in few words: `0, 2–4`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number <= runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def _setting(value: Any) -> str:
    """One side of a setting, in few words."""
    if value is None:
        return "none"
    if not isinstance(value, Mapping):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if "values" in value:
        return f"{count(value['count'], 'tensor')} of {value['values']:,} values"
    if "passages" in value:
        return f"to {value['name']}, {count(value['passages'], 'passage')} so far"
    print_ = f"{value['fingerprint'][:PRINT_DIGITS]}…" if "fingerprint" in value else ""
    if "name" not in value:
        return print_
    return f"{value['name']} ({print_})" if print_ else str(value["name"])


def _text(terminal: Terminal, ordinal: int, sides: Sequence[Passage | None]) -> None:
    """A changed passage as a diff of its sentences."""
    terminal.parts((f"@@ passage {ordinal} @@", "cyan"))
    retitled = None not in sides and len({side.title for side in sides if side is not None}) > 1
    for line in _diff_lines(*(list(_sentences(side, with_title=retitled)) for side in sides)):
        style = {"-": ("red",), "+": ("green",)}.get(line[0], ())
        terminal.parts((line, *style))


def _sentences(passage: Passage | None, *, with_title: bool) -> Iterator[str]:
    if passage is None:
        return
    if with_title:
        yield passage.title
    if passage.text is None:
        yield "(this bank keeps no text)"
        return
    for line in passage.text.splitlines():
        yield from _SENTENCE_END.split(line)


def _diff_lines(before: list[str], after: list[str]) -> Iterator[str]:
    lines = difflib.unified_diff(before, after, lineterm="", n=CONTEXT_LINES)
    for number, line in enumerate(lines):
        if number > 1 and not line.startswith("@@"):
            yield line


def _summary(found: Any) -> str:
    documents = [f"{len(getattr(found, name)):,} {name}" for name in MARKS if getattr(found, name)]
    passages = [f"{number:,} {name}" for name, number in found.passages.items() if number]
    parts = [f"documents: {', '.join(documents)}"] if documents else []
    parts += [f"passages: {', '.join(passages)}"] if passages else []
    if found.other:
        parts.append(f"{count(found.other, 'passage')} the same at another place or with another embedding")
    if found.settings:
        parts.append(f"settings: {', '.join(name.replace('_', ' ') for name in found.settings)}")
    return "; ".join(parts)


def _document(compared: Compared, text: bool) -> dict[str, Any]:
    """Under the names that others rely on."""
    found = compared.difference
    lists = {name: [_entry(name, document) for document in getattr(found, name)] for name in MARKS}
    for entry, document in zip(lists["changed"], found.changed, strict=True):
        entry["changes"] = [_change(compared, change, text) for change in document.changes]
    summary: dict[str, Any] = {name: len(documents) for name, documents in lists.items()}
    summary |= {f"passages_{name}": number for name, number in found.passages.items()}
    summary |= {"passages_otherwise": found.other, "settings": len(found.settings), "partial": bool(found.left_out)}
    return {
        **{name: _side(side) for name, side in (("before", compared.before), ("after", compared.after))},
        "identical": found.identical,
        **lists,
        "settings": {name: {"before": old, "after": new} for name, (old, new) in found.settings.items()},
        "summary": summary,
        "left_out": list(found.left_out),
    }


def _side(side: Any) -> dict[str, Any]:
    manifest = side.manifest
    told = {"time": manifest.time, "operation": manifest.operation, "passages": manifest.counts.passages}
    return {"path": str(side.path), "form": side.store.form, "snapshot": side.number, **told}


def _entry(name: str, document: Any) -> dict[str, Any]:
    entry = {field: getattr(document, field) for field in ("id", "source", "title", "passages")}
    if name == "recomputed":
        entry |= {"cosine": asdict(document.cosine), "norm_ratio": asdict(document.norm_ratio)}
    return entry


def _change(compared: Compared, change: Any, text: bool) -> dict[str, Any]:
    kind = "added" if change.before is None else "removed" if change.after is None else "changed"
    entry = {"ordinal": change.ordinal, "kind": kind}
    if text:
        sides = zip(("before", "after"), compared.passages(change), strict=True)
        entry |= {name: None if side is None else {"title": side.title, "text": side.text} for name, side in sides}
    return entry
