"""What each command's result looks like: one function a result, JSON under cli.md's names or text for people.

Knows records and the terminal; knows no use case, no bank and no stream.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regrad_cli.records import Answer, BankSettings, DocumentDone, DocumentGone, Hit, IngestSummary, Passage
from regrad_cli.render import Column, Terminal
from regrad_cli.settings import Resolved
from regrad_cli.shown import count, duration, size

SNIPPET_CHARS = 300


def initialised(terminal: Terminal, path: Path, settings: BankSettings) -> None:
    """A new bank."""
    if terminal.json:
        terminal.document(
            {
                "path": str(path),
                "model": settings.model_name,
                "prior": settings.prior_name,
                "prior_trained": settings.prior_trained,
                "embedder": settings.embedder_name,
                "codec": str(settings.codec),
                "segments": settings.segments,
                "chunk_tokens": settings.chunk_tokens,
                "chunk_overlap": settings.chunk_overlap,
                "keep_text": settings.keep_text,
            }
        )
        return
    terminal.parts((f"Made an empty bank in {path}",))
    prior = settings.prior_name
    if not settings.prior_trained and prior != "untrained":
        prior += " (untrained)"
    made_with = f"model {settings.model_name}, prior {prior}, embedder {settings.embedder_name}, codec {settings.codec}"
    if settings.segments > 1:
        made_with += f", {settings.segments} segments a passage"
    terminal.parts((made_with,))


def document_done(terminal: Terminal, event: DocumentDone) -> None:
    """A document that is in the bank; people see only the summary."""
    if terminal.json:
        terminal.record({"type": "document", **asdict(event)})


def document_gone(terminal: Terminal, event: DocumentGone, *, dry_run: bool) -> None:
    """A document that was pruned, or would be."""
    if terminal.json:
        terminal.record({"type": "removed", **asdict(event)})
    else:
        terminal.notice(f"{'would remove' if dry_run else 'removed'}: {event.source}, which is gone")


def ingest_summary(terminal: Terminal, summary: IngestSummary) -> None:
    """The end of an ingest."""
    if terminal.json:
        fields = asdict(summary)
        if not summary.dry_run:
            del fields["estimated_bytes"], fields["estimated_seconds"]
        terminal.record({"type": "summary", **fields})
        return
    passages = f"{count(summary.documents, 'document')}, {count(summary.passages, 'passage')}"
    skipped = f", {len(summary.skipped):,} skipped" if summary.skipped else ""
    if summary.dry_run:
        cost = f"about {size(summary.estimated_bytes)} and {duration(summary.estimated_seconds)}"
        would = f"recompute {summary.recomputed:,}" if summary.recomputed else f"add {summary.added:,}"
        removed = f", would remove {count(summary.removed, 'document')}" if summary.removed else ""
        terminal.text(f"{passages}: would {would} ({cost}), {summary.unchanged:,} unchanged{removed}{skipped}")
        return
    parts = [f"{summary.recomputed:,} recomputed"] if summary.recomputed else [f"{summary.added:,} added"]
    parts += [f"{summary.unchanged:,} unchanged"]
    parts += [f"{count(summary.replaced, 'document')} replaced"] if summary.replaced else []
    parts += [f"{count(summary.removed, 'document')} removed"] if summary.removed else []
    terminal.text(f"{passages}: {', '.join(parts)}{skipped}, in {duration(summary.seconds)}")


def hits(terminal: Terminal, question: str, found: Sequence[Hit], number: int | None = None) -> None:
    """Passages that fit a question best; `number` is the question's line where there are several questions."""
    if not terminal.json:
        if not found:
            terminal.notice(f"nothing found for: {question}")
        elif all(hit.fits is False for hit in found):
            terminal.notice(f"nothing fits, these are only the nearest: {question}")
    for rank, hit in enumerate(found, 1):
        passage = hit.passage
        if terminal.json:
            terminal.record(
                {
                    "rank": rank,
                    "score": round(float(hit.score), 6),
                    "id": passage.id,
                    "source": passage.source,
                    "title": passage.title,
                    "text": passage.text,
                    "question": question,
                    "dense": _rounded(hit.dense),
                    "lexical": _rounded(hit.lexical),
                    "fits": hit.fits,
                }
            )
        elif terminal.out_is_terminal:
            style, too_little = ("dim", "  fits too little") if hit.fits is False else ("cyan", "")
            head = ((f"{rank}. ", "bold"), (f"{hit.score:.3f}  ", style), (passage.title or passage.source, "bold"))
            terminal.parts(*head, (f"  {passage.source}  {passage.id}", "dim"), (too_little, "yellow"))
            terminal.text(_indented(_snippet(passage.text)))
        else:
            cells = [str(rank), f"{hit.score:.4f}", passage.id, passage.source, passage.title, passage.text or ""]
            terminal.table((), [cells if number is None else [str(number), *cells]])
    terminal.stdout.flush()


def answer(terminal: Terminal, result: Answer, *, streamed: bool, one_line: bool, sources: bool) -> None:
    """An answer: JSON, or its text (on one line where there are many) unless it was streamed, and its passages."""
    if terminal.json:
        terminal.record(asdict(result))
        return
    if not streamed:
        terminal.text(" ".join(result.answer.split()) if one_line else result.answer)
    if sources:
        passages_used(terminal, result)
    terminal.stdout.flush()


def passages_used(terminal: Terminal, result: Answer) -> None:
    """The passages that an answer used, with their scores and weights."""
    terminal.text("")
    if not result.passages:
        terminal.text("No passage was used: the model answered by itself.", "dim")
        return
    terminal.text("Sources", "bold")
    for number, used in enumerate(result.passages, 1):
        weight = "" if used.weight is None else f", weight {used.weight:.2f}"
        where = "" if used.title == used.source or not used.title else f"  {used.source}"
        tail = f"{where}  {used.id}  (score {used.score:.2f}{weight})"
        terminal.parts((f"  {number}. ",), (used.title or used.source, "cyan"), (tail, "dim"))


def documents(terminal: Terminal, found: Iterable[Mapping[str, Any]]) -> None:
    """Documents of a bank, a line each."""
    if terminal.json:
        for document in found:
            terminal.record(document)
        return
    columns = (
        Column("id"),
        Column("source", share=3),
        Column("title", share=2),
        Column("passages", number=True),
        Column("tokens", number=True),
    )
    names = ("id", "source", "title", "passages", "tokens")
    terminal.table(columns, ([str(document[name]) for name in names] for document in found))


def passage_record(passage: Passage, key: bytes | None = None) -> dict[str, Any]:
    """A passage under the names `bank show --json` has."""
    record = {
        "id": passage.id,
        "document": passage.document,
        "source": passage.source,
        "title": passage.title,
        "ordinal": passage.ordinal,
        "offset": passage.offset,
        "tokens": passage.tokens,
        "text": passage.text,
    }
    return record if key is None else record | {"key": key.hex()}


def document(terminal: Terminal, passages: Sequence[tuple[Passage, bytes]]) -> None:
    """A document with its passages."""
    first = passages[0][0]
    if terminal.json:
        records = [passage_record(passage, key) for passage, key in passages]
        for record in records:
            for name in ("document", "source", "title"):
                del record[name]
        tokens = sum(passage.tokens for passage, _ in passages)
        head = {"id": first.document, "source": first.source, "title": first.title}
        terminal.document(head | {"tokens": tokens, "passages": records})
        return
    terminal.parts((first.title or first.source, "bold"))
    terminal.parts((f"{first.source}  {first.document}  {count(len(passages), 'passage')}", "dim"))
    for passage, _ in passages:
        terminal.text("")
        terminal.parts((passage.id, "cyan"), (f"  from character {passage.offset}, {passage.tokens} tokens", "dim"))
        terminal.text(_text_of(passage))


def passage(terminal: Terminal, shown: Passage, key: bytes) -> None:
    """One passage."""
    if terminal.json:
        terminal.document(passage_record(shown, key))
        return
    terminal.parts((shown.title or shown.source, "bold"))
    where = f"{shown.source}  {shown.id}  from character {shown.offset}, {shown.tokens} tokens"
    terminal.parts((where, "dim"))
    terminal.text("")
    terminal.text(_text_of(shown))


def removed(terminal: Terminal, result: Mapping[str, Any]) -> None:
    """Documents that were removed, as `bank.remove_documents` tells it."""
    if terminal.json:
        terminal.document({"removed": result["documents"], "snapshot": result["snapshot"]})
        return
    for each in result["documents"]:
        terminal.parts((f"removed {each['source']} ({count(each['passages'], 'passage')})",))


LOG_COLUMNS = ("snapshot", "time", "operation", "documents", "passages", "dead", "bytes", "damaged")


def log(terminal: Terminal, entries: Sequence[Mapping[str, Any]]) -> None:
    """A bank's snapshots, newest first as the bank gives them."""
    if terminal.json:
        for entry in entries:
            terminal.record(entry)
        return
    broken = any("damaged" in entry for entry in entries)
    names = [name for name in LOG_COLUMNS if name != "damaged" or broken or not terminal.out_is_terminal]
    columns = [Column(name, number=name in ("snapshot", "documents", "passages", "dead", "bytes")) for name in names]
    rows = ([_figure(terminal, name, entry.get(name)) for name in names] for entry in entries)
    terminal.table(columns, rows)


def _figure(terminal: Terminal, name: str, value: Any) -> str:
    """A cell; bytes and times are shortened for people."""
    if terminal.out_is_terminal and name == "bytes" and value is not None:
        return size(value)
    return "" if value is None else str(value)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return "" if value is None else str(value)


def models(terminal: Terminal, found: Sequence[Mapping[str, Any]]) -> None:
    """Models and embedders, a line each."""
    if terminal.json:
        for each in found:
            terminal.record(each)
        return
    columns = (Column("name"), Column("kind"), Column("present"), Column("size", number=True), Column("path", share=1))
    terminal.table(
        columns,
        (
            [
                str(each["name"]),
                str(each["kind"]),
                "yes" if each.get("present") else "no",
                size(each["bytes"]) if each.get("bytes") else "",
                str(each.get("path") or ""),
            ]
            for each in found
        ),
    )


def fetched(terminal: Terminal, models: Sequence[Mapping[str, Any]]) -> None:
    """Models that are there now."""
    for each in models:
        if terminal.json:
            terminal.record(each)
        else:
            terminal.table((Column("name"), Column("path")), [[str(each["name"]), str(each["path"])]])


def settings(terminal: Terminal, config_file: Path, exists: bool, values: Mapping[str, Resolved], help: Any) -> None:
    """Settings in force and where each came from."""
    if terminal.json:
        listed = [
            {"name": name, "value": each.value, "origin": each.origin, "variable": help[name].variable}
            for name, each in values.items()
        ]
        terminal.document({"config_file": str(config_file), "exists": exists, "settings": listed})
        return
    terminal.notice(f"config file: {config_file}" + ("" if exists else " (not there)"))
    columns = (Column("setting"), Column("value", share=1), Column("from", share=1), Column("what it is", share=2))
    rows = ([name, _setting(each.value), each.origin, help[name].help] for name, each in values.items())
    terminal.table(columns, rows)


def _setting(value: Any) -> str:
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)


def health(terminal: Terminal, report: Mapping[str, Any]) -> None:
    """`doctor`'s report: a section each, and what is wrong at the end."""
    if terminal.json:
        terminal.document(report)
        return
    for section, values in report.items():
        if section == "problems" or not values:
            continue
        terminal.text(section, "bold")
        if not isinstance(values, Mapping):  # models
            values = {
                str(each["name"]): f"{each['kind']}, {'there' if each['present'] else 'not there yet'}  {each['path']}"
                for each in values
            }
        rows = values.items()
        width = max(len(str(name)) for name, _ in rows)
        for name, value in rows:
            shown = size(value) if name.endswith("bytes") else _cell(value)
            terminal.parts((f"  {name.replace('_bytes', '').replace('_', ' '):<{width}}  ", "dim"), (shown,))
    for problem in report["problems"]:
        terminal.warning(problem)
    if not report["problems"]:
        terminal.text("All is well.", "green")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _snippet(text: str | None) -> str:
    if text is None:
        return "(this bank keeps no text)"
    flat = " ".join(text.split())
    return flat if len(flat) <= SNIPPET_CHARS else flat[: SNIPPET_CHARS - 2].rstrip() + " …"


def _text_of(passage: Passage) -> str:
    return "(this bank keeps no text)" if passage.text is None else passage.text


def _indented(text: str) -> str:
    return "\n".join(f"   {line}" for line in text.split("\n"))
