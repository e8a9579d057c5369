"""`compact` and `diff`: a bank is rewritten without what was removed; two are compared. Parse, ask, call, render."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from regrad_cli.cli.call import Call, SkipDamaged, Wait, Yes, command
from regrad_cli.errors import EXIT_DIFFERS, EXIT_DONE, EXIT_INTERRUPTED
from regrad_cli.render import Terminal
from regrad_cli.shown import count, duration, size

SECTION = "Look after it"
NAMED_SNAPSHOTS = 8  # that a warning names; the rest are counted


def compact(
    call: Call,
    keep: Annotated[
        int,
        typer.Option("--keep", metavar="N", min=0, help="Keep the N newest older snapshots, and what they hold."),
    ] = 0,
    codec: Annotated[
        str | None,
        typer.Option("--codec", metavar="CODEC", help="Store all gradients anew: r1-int4, r4-int4, int8 …"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")] = False,
    yes: Yes = False,
    wait: Wait = 0.0,
) -> int:
    """Rewrite the bank without removed passages, and drop older snapshots.

    What was removed is gone from the disk then. Shards are put in order and merged, so that a bank's files depend on
    what is in it and not on how it came there. If it fails or is interrupted, the bank is as it was. Meanwhile the bank
    takes up to twice its room.
    """
    from regrad_cli import maintain

    path = call.bank_path()
    if not (dry_run or yes) and not _agreed(call, path, keep, codec):
        call.terminal.notice("nothing was changed")
        return EXIT_INTERRUPTED
    device = call.value("device", call.device)
    options = maintain.CompactOptions(keep=keep, codec=codec, device=device, dry_run=dry_run, wait_s=wait)
    if not dry_run:
        call.resume = "no passage is lost; run the same command again"
    with call.follow(maintain.compact(path, options, call.terminal.progress)) as results:
        for result in results:
            compacted(call.terminal, asdict(result))
    return EXIT_DONE


def _agreed(call: Call, path: Path, keep: int, codec: str | None) -> bool:
    """Ask, naming what would be lost; not where nothing would be."""
    from regrad_cli import maintain

    stake = maintain.stake(path, keep)
    drop = _listed(stake.snapshots, stake.passages, stake.files)
    if codec is not None:
        dropped = f", and drop {drop}," if drop else ""
        return call.terminal.confirm(f"Store every gradient under the codec {codec}{dropped} for good?")
    return not drop or call.terminal.confirm(f"Drop {drop} for good?")


def _listed(snapshots: int, passages: int, files: int) -> str:
    """Those that are not none: `a`, `a and b`, `a, b and c`."""
    named = ((snapshots, "older snapshot"), (passages, "removed passage"), (files, "quarantined file"))
    parts = [count(number, name) for number, name in named if number]
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)


def compacted(terminal: Terminal, result: dict[str, Any]) -> None:
    """What compacting came to, or would."""
    kept, held, dry = result["kept_snapshots"], result["held_snapshots"], result["dry_run"]
    if kept:
        terminal.warning(f"what was removed is still in {count(len(kept), 'snapshot')} that {_stay(kept)}")
    if held:
        terminal.notice(f"{count(len(held), 'older snapshot')} being read: the next one who writes drops what is free")
    if terminal.json:
        terminal.document(result)
        return
    shards, took = result["shards"], result["bytes"]
    if not result["changed"]:
        terminal.parts((f"already compact: {count(shards['after'], 'shard')}, {size(took['after'])}",))
        return
    drop = _listed(len(result["dropped_snapshots"]), result["dead"], result["quarantined"])
    if drop:
        terminal.parts((f"{'would drop' if dry else 'dropped'} {drop}",))
    became = f"{count(shards['after'], 'shard')} for {shards['before']:,}, {shards['rewritten']:,} of them written anew"
    bytes_ = f"{size(took['after'])} for {size(took['before'])}"
    took_s = "" if dry else f", in {duration(result['seconds'])}"
    terminal.parts((f"{'would be ' if dry else ''}{became}; {'about ' if dry else ''}{bytes_}{took_s}",))


def _stay(kept: Sequence[int]) -> str:
    named = ", ".join(map(str, kept[-NAMED_SNAPSHOTS:]))
    stays = "stays" if len(kept) == 1 else "stay"
    return f"{stays}: {'…, ' if len(kept) > NAMED_SNAPSHOTS else ''}{named}"


def diff(
    call: Call,
    before: Annotated[
        str | None,
        typer.Argument(metavar="A", help="A bank, BANK@42 for one of its snapshots, or @42, @-1 of the bank in force."),
    ] = None,
    after: Annotated[
        str | None, typer.Argument(metavar="B", help="What to compare it with; otherwise the bank in force.")
    ] = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 where anything differs.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Show the text of changed passages, before and after.")] = False,
    skip_damaged: SkipDamaged = False,
) -> int:
    """Compare two banks, or two snapshots of one; without arguments, the newest with the one before it.

    A snapshot is named by its number (`regrad bank log`), or counted back from the newest: @-1 is the one before it. A
    line a document: + added, - removed, ~ text changed, * gradients recomputed from the same text; ! a setting.
    """
    from regrad_cli import comparing
    from regrad_cli.cli import differences

    words = [word for word in (before, after) if word is not None]
    versions = comparing.versions(words, call.bank_path)
    events = comparing.compare(*versions, device=call.value("device", call.device), skip_damaged=skip_damaged)
    code = EXIT_DONE
    with call.follow(events) as found:
        for compared in found:
            differences.difference(call.terminal, compared, text=text)
            if exit_code and not compared.difference.identical:
                code = EXIT_DIFFERS
    return code


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    command(app, "compact", bank=True, device=True, section=SECTION)(compact)
    command(app, "diff", bank=True, device=True, section=SECTION)(diff)
