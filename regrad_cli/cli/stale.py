"""`ingest --stale`: the bank moves to another prior. Called by `ingest`; calls the use case, renders."""

from pathlib import Path

from regrad_cli.cli import views
from regrad_cli.cli.call import Call
from regrad_cli.errors import EXIT_DONE, UsageProblem
from regrad_cli.records import IngestSummary


def refuse_together(stale: bool, prior: Path | None, documents: bool) -> None:
    """raises UsageProblem where options of `ingest` contradict each other; `documents`: some were named"""
    if prior is not None and not stale:
        raise UsageProblem(
            "--prior is for --stale: a bank has one prior",
            f"`regrad ingest --stale --prior {prior}` moves the bank to it, and computes every gradient anew",
        )
    if stale and documents:
        raise UsageProblem(
            "--stale takes no documents: it computes from the text in the bank", "ingest them before or afterwards"
        )


def ingest_stale(call: Call, *, prior: Path | None, dry_run: bool, commit_rows: int, wait: float) -> int:
    """Compute what is stale under the bank's next prior, and switch to it."""
    device, dtype = call.value("device", call.device), call.value("dtype", call.dtype)
    bank = call.bank_path()
    from regrad_cli import move as use_case

    options = use_case.MoveOptions(
        prior=prior, dry_run=dry_run, device=device, dtype=dtype, commit_rows=commit_rows, wait_s=wait
    )
    if not dry_run:
        call.resume = "the bank has its old prior; what was computed is kept, `regrad ingest --stale` resumes"
    with call.follow(use_case.move(bank, options)) as results:
        for event in results:
            if isinstance(event, IngestSummary):
                views.ingest_summary(call.terminal, event)
    return EXIT_DONE
