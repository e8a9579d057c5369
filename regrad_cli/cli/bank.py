"""`regrad bank …`: stats, ls, show, rm, log. Parse, ask the bank, render; torch is never imported here."""

from pathlib import Path
from typing import Annotated, Any

import typer

from regrad_cli.cli import overview, views
from regrad_cli.cli.call import Call, SkipDamaged, Snapshot, Wait, Yes, command
from regrad_cli.errors import EXIT_DONE, EXIT_INTERRUPTED, UsageProblem
from regrad_cli.shown import count, visible_line

group = typer.Typer(rich_markup_mode=None)

NAMED_DOCUMENTS = 5  # documents that are named in the question before removal; the rest are counted


@command(group, "stats", bank=True)
def stats(call: Call, snapshot: Snapshot = None) -> int:
    """Count documents, passages and bytes, and tell what the bank was made with."""
    from regrad_cli.bank import beside, open_bank

    with open_bank(call.bank_path(), snapshot) as opened:
        overview.stats(call.terminal, opened.stats(), beside(opened))
    return EXIT_DONE


@command(group, "ls", bank=True)
def ls(call: Call, snapshot: Snapshot = None, skip_damaged: SkipDamaged = False) -> int:
    """List the documents.

    Piped, a line a document: id, source, title, passages, tokens, separated by tabs.
    """
    from regrad_cli.bank import open_bank

    with open_bank(call.bank_path(), snapshot) as opened:
        views.documents(call.terminal, opened.documents(skip_damaged=skip_damaged))
        _say_damaged(call, opened)
    return EXIT_DONE


@command(group, "show", bank=True)
def show(
    call: Call,
    id: Annotated[
        str, typer.Argument(metavar="ID", help="A document (id, start of it, or source), or a passage ID:N.")
    ],
    snapshot: Snapshot = None,
    skip_damaged: SkipDamaged = False,
) -> int:
    """Show a document with its passages, or one passage."""
    from regrad_cli.bank import open_bank

    with open_bank(call.bank_path(), snapshot) as opened:
        document, ordinal = _find(opened, id)
        found = [(passage, key) for _, passage, key in opened.passages(document, skip_damaged=skip_damaged)]
        _say_damaged(call, opened)
        if ordinal is None:
            views.document(call.terminal, found)
            return EXIT_DONE
        for passage, key in found:
            if passage.ordinal == ordinal:
                views.passage(call.terminal, passage, key)
                return EXIT_DONE
        numbers = [passage.ordinal for passage, _ in found]
        there = f"it has {min(numbers)} to {max(numbers)}" if numbers else ""
        raise UsageProblem(f"document {document} has no passage {ordinal}", there)


def _say_damaged(call: Call, opened: Any) -> None:
    """What --skip-damaged left out, by name."""
    for each in opened.damaged:
        call.terminal.warning(f"left out: {each.file}: {each.what}")


def _find(opened: Any, wanted: str) -> tuple[str, int | None]:
    """`wanted` as a document's id and, where it names a passage, its ordinal. A source may itself end in :N."""
    head, colon, tail = wanted.rpartition(":")
    if not colon or not tail.isascii() or not tail.isdecimal():
        return opened.find_document(wanted), None
    try:
        return opened.find_document(head), int(tail)
    except UsageProblem as problem:
        try:
            return opened.find_document(wanted), None
        except UsageProblem:
            raise problem from None


@command(group, "rm", bank=True)
def rm(
    call: Call,
    ids: Annotated[
        list[str], typer.Argument(metavar="ID", help="Documents: their ids, the starts of them, or their sources.")
    ],
    yes: Yes = False,
    wait: Wait = 0.0,
) -> int:
    """Remove documents from the bank. Their files are not touched.

    What was removed is found no more, but stays on the disk until `regrad compact`.
    """
    from regrad_cli.bank import check_format, remove_documents

    path = call.bank_path()
    check_format(path)  # a packed bank is refused before anybody is asked
    if not yes and not _agreed(call, path, ids):
        call.terminal.notice("nothing was removed")
        return EXIT_INTERRUPTED
    views.removed(call.terminal, remove_documents(path, ids, wait_s=wait))
    return EXIT_DONE


def _agreed(call: Call, path: Path, ids: list[str]) -> bool:
    """Ask, naming what would go."""
    from regrad_cli.bank import open_bank

    with open_bank(path) as opened:
        wanted = list(dict.fromkeys(opened.find_document(each) for each in ids))
        rows = [[passage for _, passage, _ in opened.passages(each)] for each in wanted]
    named = ", ".join(visible_line(found[0].source) for found in rows[:NAMED_DOCUMENTS])
    more = f" and {count(len(rows) - NAMED_DOCUMENTS, 'other')}" if len(rows) > NAMED_DOCUMENTS else ""
    passages = count(sum(map(len, rows)), "passage")
    return call.terminal.confirm(f"Remove {count(len(rows), 'document')} ({named}{more}; {passages})?")


@command(group, "log", bank=True)
def log(call: Call) -> int:
    """List the snapshots: when each was made, and by what."""
    from regrad_cli import bank

    views.log(call.terminal, bank.log(call.bank_path()))
    return EXIT_DONE
