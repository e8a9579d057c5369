"""The main job's commands up to the answer: init, ingest, query. Parse, call the use case, render."""

import os
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from regrad_cli.cli import views
from regrad_cli.cli.call import Call, SkipDamaged, Snapshot, Wait, command
from regrad_cli.cli.stale import ingest_stale, refuse_together
from regrad_cli.errors import EXIT_DONE, EXIT_PARTIAL, UsageProblem
from regrad_cli.questions import Line, read_questions
from regrad_cli.records import BankSettings, DocumentDone, DocumentGone, IngestSummary
from regrad_cli.settings import COMBINES, SEARCHES

SECTION = "Documents and answers"
K = Annotated[
    int | None,
    typer.Option("-k", metavar="N", help="Passages to retrieve; 3, or what the prior was made for, if not set."),
]
MinScore = Annotated[
    str | None,
    typer.Option(
        "--min-score",
        metavar="auto|none|S",
        help="Least score of a passage that is used: a measured one (auto, if not set), none, or a number.",
    ),
]
Search = Annotated[
    str | None,
    typer.Option(
        "--search",
        metavar="|".join(SEARCHES),
        help="Find passages by meaning and words (fused), by meaning or by words; auto is fused where there is text.",
        autocompletion=lambda: list(SEARCHES),
    ),
]
Combine = Annotated[
    str | None,
    typer.Option(
        "--combine",
        metavar="|".join(COMBINES),
        help="Let each passage's gradient answer by itself and give the likeliest answer, or add the gradients up; "
        "auto is likeliest where the prior weighs passages by their scores.",
        autocompletion=lambda: list(COMBINES),
    ),
]
Gamma = Annotated[
    float | None, typer.Option("--gamma", metavar="G", help="Strength of the gradients; 1 if not set, 0 for none.")
]


class StdinFormat(StrEnum):
    """What standard input holds."""

    text = "text"
    jsonl = "jsonl"


def init(
    call: Call,
    path: Annotated[Path | None, typer.Argument(metavar="PATH", help="The bank itself; ./.gbank if left out.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="starter, a local folder, a GGUF file or a hub id.")
    ] = None,
    prior: Annotated[
        Path | None, typer.Option("--prior", metavar="FILE", help="A learned prior of this model.")
    ] = None,
    embedder: Annotated[
        str | None, typer.Option("--embedder", metavar="NAME", help="minilm, a local folder or a hub id.")
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            "--codec",
            metavar="CODEC",
            help="How gradients are stored: r1-int4, int8 …; the prior's own if not set.",
        ),
    ] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option("--chunk-tokens", metavar="N", help="Most tokens of a passage; 192 if not set.")
    ] = None,
    chunk_overlap: Annotated[
        int | None, typer.Option("--chunk-overlap", metavar="N", help="Tokens neighbours share; 24 if not set.")
    ] = None,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Keep no text of passages. Their gradients still tell about it.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the prior's start.")] = 0,
) -> int:
    """Make a bank.

    Fetches the model and the embedder where they are missing. What a bank is made with (model, prior, embedder, codec,
    chunking) stays as it is.
    """
    from regrad_cli import ingest

    path = path or Path(call.value("bank", call.bank_flag) or ".gbank")
    prior_file = call.value("prior", None if prior is None else str(prior))
    events = ingest.initialise(
        path,
        model=call.value("model", model),
        prior=None if prior_file is None else Path(prior_file),
        embedder=call.value("embedder", embedder),
        codec=call.value("codec", codec),
        chunk_tokens=call.value("chunk_tokens", chunk_tokens),
        chunk_overlap=call.value("chunk_overlap", chunk_overlap),
        keep_text=call.value("keep_text", False if no_text else None),
        seed=seed,
    )
    with call.follow(events) as results:
        for event in results:
            if isinstance(event, BankSettings):
                views.initialised(call.terminal, path, event)
    return EXIT_DONE


def ingest(
    call: Call,
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="PATH", help="Files and folders; - reads standard input.")
    ] = None,
    files_from: Annotated[
        str | None,
        typer.Option("--files-from", metavar="FILE", help="Read paths from FILE or -, ended by newlines or NULs."),
    ] = None,
    format: Annotated[
        StdinFormat | None,
        typer.Option("--format", metavar="text|jsonl", help="What standard input holds; text if not set."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="The source's name for standard input.")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Drop documents of these folders whose files are gone.")
    ] = False,
    stale: Annotated[
        bool, typer.Option("--stale", help="Finish a move to another prior; with --prior, begin one. No documents.")
    ] = False,
    prior: Annotated[
        Path | None,
        typer.Option(
            "--prior", metavar="FILE", help="With --stale: the prior to move to; `shipped` for the model's own."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Only say what would be added, its size and its time.")
    ] = False,
    title_field: Annotated[
        str, typer.Option("--title-field", metavar="FIELD", help="Field or column of titles in JSONL and CSV.")
    ] = "title",
    text_field: Annotated[
        str, typer.Option("--text-field", metavar="FIELD", help="Field or column of texts in JSONL and CSV.")
    ] = "text",
    commit_rows: Annotated[
        int, typer.Option("--commit-rows", metavar="N", min=1, hidden=True, help="Passages between commits.")
    ] = 256,
    wait: Wait = 0.0,
) -> int:
    """Add documents to the bank, or bring it up to date with them.

    Reads text, Markdown, HTML, PDF, JSONL and CSV, and honours .gitignore. What is there and unchanged is left alone;
    a changed file replaces its own passages. Commits as it goes: interrupted, the same command again resumes. Inputs
    that cannot be read are named and skipped; the exit code is then 3.

    With --stale the bank moves to another prior: all gradients are computed anew from the stored text, and one commit
    switches to them. Until then the bank answers as before.
    """
    named = list(paths or [])
    if "" in named:
        raise UsageProblem("a path is empty", "name a file or a folder; . is this one")
    chosen = [Path(path) for path in named if path != "-"]  # ./- is a file of that name
    of_stdin = name is not None or format is not None
    refuse_together(stale, prior, bool(named or files_from is not None or prune or of_stdin))
    if stale:
        return ingest_stale(call, prior=prior, dry_run=dry_run, commit_rows=commit_rows, wait=wait)
    reads_stdin = "-" in named or (not named and files_from is None and not call.terminal.in_is_terminal)
    if of_stdin and not reads_stdin:
        raise UsageProblem("--name and --format are for standard input, which is not read", "name - among the paths")
    if name == "":
        raise UsageProblem("--name is empty", "leave it out, or name something")
    if files_from == "-" and reads_stdin:
        raise UsageProblem("standard input cannot be both a document and the list of files", "name a file for one")
    if files_from is not None:
        chosen += _listed_files(call, files_from)
    elif not chosen and not reads_stdin:
        return call.usage_help("no document was given")
    device, dtype = call.value("device", call.device), call.value("dtype", call.dtype)
    bank = call.bank_path()
    from regrad_cli import ingest as use_case

    options = use_case.IngestOptions(
        paths=tuple(chosen),
        stdin=call.terminal.input if reads_stdin else None,
        stdin_format=(format or StdinFormat.text).value,
        stdin_name=name,
        prune=prune,
        dry_run=dry_run,
        device=device,
        dtype=dtype,
        title_field=title_field,
        text_field=text_field,
        commit_rows=commit_rows,
        wait_s=wait,
    )
    if not dry_run:
        call.resume = "what was committed stays in the bank; run the same command again to resume"
    partial = False
    with call.follow(use_case.ingest(bank, options)) as results:
        for event in results:
            if isinstance(event, DocumentDone):
                views.document_done(call.terminal, event)
            elif isinstance(event, DocumentGone):
                views.document_gone(call.terminal, event, dry_run=dry_run)
            elif isinstance(event, IngestSummary):
                views.ingest_summary(call.terminal, event)
                partial = bool(event.skipped)
    return EXIT_PARTIAL if partial else EXIT_DONE


def _listed_files(call: Call, source: str) -> list[Path]:
    """Paths from a file or standard input: NUL-separated where there is a NUL, else one a line."""
    try:
        data = call.terminal.input.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise UsageProblem(f"--files-from {source}: {error.strerror}") from None
    names = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [Path(os.fsdecode(name)) for name in names if name]


def query(
    call: Call,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="What to look for; - reads one a line from standard input.")
    ] = None,
    k: K = None,
    search: Search = None,
    min_score: MinScore = None,
    snapshot: Snapshot = None,
    skip_damaged: SkipDamaged = False,
) -> int:
    """Show the passages that fit a question best, with their scores. No language model runs.

    Passages that score too little for `ask` to use them are marked; a number for --min-score leaves them out. Piped, a
    line a passage: rank, score, id, source, title, text, separated by tabs; with several questions the question's
    number comes first.
    """
    if text is None and call.terminal.in_is_terminal:
        return call.usage_help("no question was given")
    many = text is None or text == "-"
    question = "" if many else stated(text or "")
    options: dict[str, Any] = {"k": call.value("k", k), "min_score": call.value("min_score", min_score)}
    kept: dict[str, Any] = {
        "snapshot": snapshot,
        "device": call.value("device", call.device),
        "skip_damaged": skip_damaged,
        "search": call.value("search", search),
    }
    bank = call.bank_path()
    from regrad_cli import finding

    if not many:
        hits = finding.query(bank, question, **options, **kept)
        views.hits(call.terminal, question, hits)
        return EXIT_DONE
    problems = 0
    with ExitStack() as stack:
        finder: Any = None
        for line in read_questions(call.terminal.input):
            if line.problem:
                problems += problem(call, line)
                continue
            finder = finder or stack.enter_context(finding.Finder(bank, **kept))
            views.hits(call.terminal, line.question, finder.query(line.question, **options), number=line.number)
    return EXIT_PARTIAL if problems else EXIT_DONE


def stated(text: str) -> str:
    """The question on the command line.

    raises  UsageProblem where there is none in it
    """
    if not text.strip():
        raise UsageProblem("the question is empty", 'ask with words: "What is …?"')
    try:
        text.encode()
    except UnicodeEncodeError:  # the shell's bytes, as Python escapes them
        raise UsageProblem("the question is not UTF-8", "write it in UTF-8") from None
    return text


def problem(call: Call, line: Line, *, keep_place: bool = False) -> int:
    """A line that has no answer: named on stderr; `keep_place` gives it a line on stdout, so that both stay in step."""
    call.terminal.skipped(f"standard input, line {line.number}", line.problem)
    if not keep_place:
        return 1
    if call.terminal.json:
        call.terminal.record({"question": line.question or None, "answer": None, "error": {"message": line.problem}})
    else:
        call.terminal.text("")
        call.terminal.stdout.flush()
    return 1


def register(app: typer.Typer) -> None:
    """Put the commands of this file into the application."""
    command(app, "init", bank=True, heavy=True, section=SECTION)(init)
    command(app, "ingest", bank=True, device=True, dtype=True, section=SECTION)(ingest)
    command(app, "query", bank=True, device=True, section=SECTION)(query)
