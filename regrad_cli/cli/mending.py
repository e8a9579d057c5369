"""`regrad bank verify` and `repair`: is it all as it was written, and what can be put right. Parse, ask the bank,
render; no torch, but where a lost prior is looked for.
"""

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regrad_cli.cli.call import Call, Wait, Yes, command
from regrad_cli.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_PARTIAL, Damaged, UsageProblem
from regrad_cli.records import BankSettings
from regrad_cli.render import Terminal
from regrad_cli.shown import count, visible_line

if TYPE_CHECKING:
    from regrad_cli.bank.repair import Repaired
    from regrad_cli.bank.survey import Back, LostDocument, Plan

NAMED_DOCUMENTS = 5  # documents that are named in the question before a repair; the rest are counted
NAMELESS = "documents that nothing names any more"
SEED_BITS = 32


def verify(
    call: Call,
    sample: Annotated[
        float | None,
        typer.Option("--sample", metavar="P", help="Read P per cent of the rows and blocks only, chosen at random."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Read every byte; the default.")] = False,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", min=0, help="Choose the sample so; a new one each time.")
    ] = None,
) -> int:
    """Read every file and check every checksum.

    Exit code 14 where something is damaged; each finding is named. With --sample P it takes about P per cent of the
    time: manifests, priors and the sizes of files are all checked, of the rest a share, and the answer says so.
    """
    from regrad_cli import bank

    if sample is None and seed is not None:
        raise UsageProblem("--seed chooses a sample", "give --sample P too")
    if sample is not None and full:
        raise UsageProblem("--sample and --full contradict each other", "leave one of them out")
    if sample is not None and not (math.isfinite(sample) and 0 < sample <= 100):
        raise UsageProblem(f"--sample {sample:g} is no share in per cent", "give a number above 0 and up to 100")
    path = call.bank_path()
    chosen = None if sample is None else bank.Sample(sample, secrets.randbits(SEED_BITS) if seed is None else seed)
    checked = bank.Checked()
    report = call.megabytes("verifying")
    findings = [asdict(finding) for finding in bank.verify(path, report, sample=chosen, checked=checked)]
    damage = [finding for finding in findings if not finding["note"]]
    verified(call.terminal, path, findings, bool(damage), asdict(checked))
    if not damage:
        return EXIT_DONE
    documents = sorted(set(chain.from_iterable(finding["documents"] for finding in damage)))
    touched = f", of {count(len(documents), 'document')}" if documents else ""
    told = Damaged(f"{path}: {count(len(damage), 'finding')}{touched}", bank.way_out(path))
    return call.terminal.error(told)


def verified(
    terminal: Terminal,
    path: Path,
    findings: Sequence[Mapping[str, Any]],
    is_damaged: bool,
    checked: Mapping[str, Any],
) -> None:
    """What is wrong with a bank, or that nothing is, in what was looked at."""
    if terminal.json:
        terminal.document({"path": str(path), "ok": not is_damaged, "findings": list(findings), "checked": checked})
        return
    for finding in findings:
        documents = f"  (document {', '.join(finding['documents'])})" if finding["documents"] else ""
        note = "  (harmless)" if finding["note"] else ""
        style = "dim" if finding["note"] else "red"
        terminal.parts((finding["file"], style), (f": {finding['what']}{documents}{note}",))
    looked_at = (
        f"{checked['rows']:,} of {count(checked['rows_total'], 'row')} and {checked['blocks']:,} of "
        f"{count(checked['blocks_total'], 'block')} were read (a sample of {checked['percent']:g} %, --seed "
        f"{checked['seed']}), and every manifest and prior; of other files the size"
    )
    if checked["seed"] is not None:
        terminal.parts((looked_at if is_damaged else f"{path}: no damage was seen: {looked_at}",))
    elif not is_damaged:
        terminal.parts((f"{path} is sound: every file and every row is what its checksum says",))


def repair(
    call: Call,
    prior: Annotated[
        Path | None, typer.Option("--prior", metavar="FILE", help="Where the bank's prior may be had again.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")] = False,
    yes: Yes = False,
    wait: Wait = 0.0,
) -> int:
    """Bring a damaged bank back to where every command works.

    What is known again is put back, passages that are proved are kept, the others are dropped and their documents
    named: ingest them again. Damaged files go to quarantine/, which `regrad compact` empties. If it fails or is
    interrupted, the bank is no worse. Exit code 3 where something was dropped, 14 where damage is left.
    """
    from regrad_cli import bank

    path = call.bank_path()
    report = call.megabytes("verifying")
    priors = partial(_same_prior, prior)
    with bank.repair_bank(path, priors=priors, wait_s=wait, dry_run=dry_run, report=report) as work:
        if dry_run:
            repaired(call.terminal, work.foreseen())
            return EXIT_DONE
        if work.plan.destroys and not yes and not call.terminal.confirm(_question(work.plan)):
            call.terminal.notice("nothing was changed")
            return EXIT_INTERRUPTED
        call.resume = "the bank is no worse than before; run the same command again"
        result = work.carry_out()
    repaired(call.terminal, result)
    return _code(call.terminal, result)


def _same_prior(file: Path | None, settings: BankSettings) -> Iterator[bytes]:
    from regrad_cli.priors import same_prior

    yield from same_prior(settings, file)


def _question(plan: "Plan") -> str:
    """What would be given up."""
    back = f"Go back to snapshot {plan.back.to}, for {plan.back.lost} cannot be read? " if plan.back else ""
    if not plan.lost:
        return back.rstrip()
    named = ", ".join(visible_line(_name(each)) for each in plan.lost[:NAMED_DOCUMENTS])
    more = f" and {count(len(plan.lost) - NAMED_DOCUMENTS, 'other')}" if len(plan.lost) > NAMED_DOCUMENTS else ""
    return f"{back}Drop {_passages(plan.lost)} that cannot be read any more, of {named}{more}?"


def _passages(lost: Sequence["LostDocument"]) -> str:
    return count(sum(each.passages for each in lost), "passage")


def _name(lost: "LostDocument") -> str:
    return lost.source or (f"document {lost.id}" if lost.id else NAMELESS)


def _documents(lost: Sequence["LostDocument"]) -> str:
    """How many lost passages; those that nothing names are one entry, and nobody knows how many they are."""
    known = sum(_name(each) != NAMELESS for each in lost)
    return " and ".join([count(known, "document")] * (known > 0) + [NAMELESS] * (known < len(lost)))


def repaired(terminal: Terminal, result: "Repaired") -> None:
    """What a repair came to, or would."""
    if terminal.json:
        terminal.document(_as_json(result))
        return
    if not result.damage:
        terminal.parts((f"{result.path} is sound, and nothing was changed",))
        return
    for what, style, text in _lines(result):
        terminal.parts((f"{what:<14}", style), (text,))
    would = "would be " if result.dry_run else ""
    terminal.parts((f"snapshot {result.snapshot} {would or 'is '}the bank, with {count(result.passages, 'passage')}",))
    if result.quarantined:
        terminal.notice(f"{count(len(result.quarantined), 'file')} put into quarantine/; `regrad compact` empties it")


def _lines(result: "Repaired") -> Iterator[tuple[str, str, str]]:
    """(what, style, text) for each thing that was done, or would be."""
    for back in result.put_back:
        yield "put back", "green", f"{back.file}: {back.whence}"
    for new in result.rewritten:
        yield "written anew", "yellow", f"{new.file}: {new.kept:,} of {count(new.live, 'passage')} kept"
    if result.index_dropped:
        yield "dropped", "yellow", "the search graph; the next ingest builds it again where one is due"
    if result.move_given_up:
        yield "given up", "yellow", "the move to another prior; `regrad ingest --stale --prior FILE` begins it again"
    if result.back is not None:
        yield "went back", "red", _back(result.back)
    for snapshot in result.dropped_snapshots:
        yield "dropped", "yellow", f"snapshot {snapshot.snapshot}: {snapshot.why}"
    for lost in result.lost:
        id = f" ({lost.id})" if lost.source and lost.id else ""
        yield "lost", "red", f"{_name(lost)}{id}: {count(lost.passages, 'passage')}"
    for finding in result.left:
        yield "left", "red", f"{finding.file}: {finding.what}"


def _back(back: "Back") -> str:
    held = ""
    if back.documents is not None and back.passages is not None:
        documents, passages = count(back.documents, "document"), count(back.passages, "passage")
        held = f"; it says that it held {documents}, {passages}"
    return f"to snapshot {back.to}, for {back.lost} cannot be read, nor its copy{held}"


def _as_json(result: "Repaired") -> dict[str, Any]:
    """Under names that others may rely on."""
    return {
        "path": result.path,
        "ok": not result.left,
        "snapshot": result.snapshot,
        "passages": result.passages,
        "damage": [asdict(finding) for finding in result.damage],
        "put_back": [each._asdict() for each in result.put_back],
        "rewritten": [each._asdict() for each in result.rewritten],
        "lost": [each._asdict() for each in result.lost],
        "back": None if result.back is None else result.back._asdict(),
        "dropped_snapshots": [each._asdict() for each in result.dropped_snapshots],
        "index_dropped": result.index_dropped,
        "move_given_up": result.move_given_up,
        "quarantined": [each._asdict() for each in result.quarantined],
        "left": [asdict(finding) for finding in result.left],
        "dry_run": result.dry_run,
    }


def _code(terminal: Terminal, result: "Repaired") -> int:
    if result.lost:
        named = f"{_passages(result.lost)} of {_documents(result.lost)}"
        terminal.warning(f"{named} could not be kept; `regrad ingest` of those files adds them again, and only them")
    elif result.back is not None:
        terminal.warning("what came after that snapshot is gone; `regrad ingest` of your files adds it again")
    if result.left:
        first = result.left[0]
        more = f" and {count(len(result.left) - 1, 'other')}" if len(result.left) > 1 else ""
        what, _, hint = first.what.partition("; ")
        return terminal.error(Damaged(f"could not be put right: {first.file}{more}: {what}", hint))
    return EXIT_PARTIAL if result.lost or result.back is not None else EXIT_DONE


def register(group: typer.Typer) -> None:
    """Put the commands into the group of the bank's."""
    command(group, "verify", bank=True)(verify)
    command(group, "repair", bank=True)(repair)
