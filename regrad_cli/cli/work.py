"""The main job's commands: init, ingest, query, ask. Parse, call the use case, render."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from regrad_cli.cli import views
from regrad_cli.cli.call import Call, SkipDamaged, Snapshot, Wait, command
from regrad_cli.errors import EXIT_DONE, EXIT_PARTIAL, UsageProblem
from regrad_cli.records import Answer, BankSettings, DocumentDone, IngestSummary, Piece
from regrad_cli.render import Line
from regrad_cli.settings import MODES

K = Annotated[
    int | None,
    typer.Option("-k", metavar="N", help="Passages to retrieve; 3, or what the prior was made for, if not set."),
]
MinScore = Annotated[
    float | None, typer.Option("--min-score", metavar="S", help="Leave out passages less similar than this (-1 to 1).")
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
        typer.Option("--codec", metavar="CODEC", help="How gradients are stored: r1-int4, r2-int4, int4, int8."),
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
        list[Path] | None, typer.Argument(metavar="PATH", help="Files and folders; - reads standard input.")
    ] = None,
    files_from: Annotated[
        str | None,
        typer.Option("--files-from", metavar="FILE", help="Read paths from FILE or -, ended by newlines or NULs."),
    ] = None,
    format: Annotated[
        StdinFormat, typer.Option("--format", metavar="text|jsonl", help="What standard input holds.")
    ] = StdinFormat.text,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="The source's name for standard input.")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Drop documents of these folders whose files are gone.")
    ] = False,
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
    """
    chosen = list(paths or [])
    reads_stdin = Path("-") in chosen or (not chosen and files_from is None and not call.terminal.in_is_terminal)
    chosen = [path for path in chosen if path != Path("-")]
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
        stdin_format=format.value,
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
    min_score: MinScore = None,
    snapshot: Snapshot = None,
    skip_damaged: SkipDamaged = False,
) -> int:
    """Show the passages nearest to a question, with their scores. No language model runs.

    Piped, a line a passage: rank, score, id, source, title, text, separated by tabs; with several questions the
    question's number comes first.
    """
    if text is None and call.terminal.in_is_terminal:
        return call.usage_help("no question was given")
    many = text is None or text == "-"
    question = "" if many else _stated(text or "")
    options: dict[str, Any] = {"k": call.value("k", k), "min_score": call.value("min_score", min_score)}
    kept: dict[str, Any] = {
        "snapshot": snapshot,
        "device": call.value("device", call.device),
        "skip_damaged": skip_damaged,
    }
    bank = call.bank_path()
    from regrad_cli import answer

    if not many:
        hits = answer.query(bank, question, **options, **kept)
        views.hits(call.terminal, question, hits)
        return EXIT_DONE
    problems = 0
    with ExitStack() as stack:
        finder: Any = None
        for line in call.terminal.questions():
            if line.problem:
                problems += _problem(call, line)
                continue
            finder = finder or stack.enter_context(answer.Finder(bank, **kept))
            views.hits(call.terminal, line.question, finder.query(line.question, **options), number=line.number)
    return EXIT_PARTIAL if problems else EXIT_DONE


def ask(
    call: Call,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="The question; - reads one a line from standard input.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            metavar="|".join(MODES),
            help="By gradients, by gradients and passages in the prompt, by passages alone, or by neither.",
            autocompletion=lambda: list(MODES),
        ),
    ] = None,
    k: K = None,
    gamma: Annotated[
        float | None, typer.Option("--gamma", metavar="G", help="Strength of the gradients; 1 if not set, 0 for none.")
    ] = None,
    min_score: MinScore = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", metavar="N", help="Longest answer, in tokens; 128 if not set.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="Where the bank's model lies; or a model to ask without a bank."),
    ] = None,
    snapshot: Snapshot = None,
    skip_damaged: SkipDamaged = False,
    sources: Annotated[
        bool | None,
        typer.Option("--sources/--no-sources", help="List passages below the answer; on a terminal if not set."),
    ] = None,
) -> int:
    """Answer a question from the bank.

    The answer is streamed. With - or piped input, many questions are answered by one loaded model, in order, one line
    each: a question a line, or JSON lines with "question".
    """
    if text is None and call.terminal.in_is_terminal:
        return call.usage_help("no question was given")
    many = text is None or text == "-"
    question = "" if many else _stated(text or "")
    chosen = call.value("mode", mode)
    flags = {"k": k, "gamma": gamma, "min_score": min_score, "max_tokens": max_tokens}
    settings = {name: call.value(name, flag) for name, flag in flags.items()}
    device, dtype = call.value("device", call.device), call.value("dtype", call.dtype)
    bank = _bank_for(call, chosen)
    from regrad_cli import answer  # here, so that a wrong option or a missing bank is told without waiting for torch

    options = answer.AskOptions(mode=chosen, **settings)
    if bank is None:
        model = call.value("model", model)
    show_sources = sources if sources is not None else call.terminal.out_is_terminal and not many
    problems = 0
    with ExitStack() as stack:
        answerer: Any = None
        lines: Iterator[Line] = call.terminal.questions() if many else iter([Line(1, question)])
        for line in lines:
            if line.problem:
                problems += _problem(call, line, keep_place=True)
                continue
            answerer = answerer or stack.enter_context(
                answer.Answerer(
                    bank,
                    modes={chosen},
                    device=device,
                    dtype=dtype,
                    snapshot=snapshot,
                    skip_damaged=skip_damaged,
                    model=model,
                )
            )
            try:
                _show_answer(call, answerer.ask(line.question, options), stream=not many, sources=show_sources)
            except UsageProblem as problem:  # this question cannot be answered; the next may be
                if not many:
                    raise
                problems += _problem(call, Line(line.number, line.question, problem.message), keep_place=True)
    return EXIT_PARTIAL if problems else EXIT_DONE


def _bank_for(call: Call, mode: str) -> Path | None:
    """The bank; None where a model alone is to answer and there is none."""
    from regrad_cli.errors import NoBank

    try:
        return call.bank_path()
    except NoBank:
        if mode == "direct" and call.value("bank", call.bank_flag) is None:
            return None
        raise


def _show_answer(call: Call, events: Iterator[Any], *, stream: bool, sources: bool) -> None:
    terminal = call.terminal
    streamed = False
    try:
        with call.follow(events) as results:
            for event in results:
                if isinstance(event, Piece) and stream and not terminal.json:
                    streamed = True  # said first: Ctrl-C may come inside the writing
                    terminal.piece(event.text)
                elif isinstance(event, Answer):
                    if not event.grounded and event.mode != "direct":
                        terminal.notice("nothing in the bank fits: the untouched model answered by itself")
                    if event.partial:
                        left_out = "; ".join(event.notices)
                        terminal.warning(f"damaged passages were left out: this answer is partial ({left_out})")
                    if streamed:
                        terminal.end_pieces()
                    views.answer(terminal, event, streamed=streamed, one_line=not stream, sources=sources)
                    streamed = False
    finally:
        if streamed:  # left by an exception or Ctrl-C: what follows starts on a line of its own
            terminal.end_pieces()


def _stated(text: str) -> str:
    if not text.strip():
        raise UsageProblem("the question is empty", 'ask with words: regrad ask "What is …?"')
    return text


def _problem(call: Call, line: Line, *, keep_place: bool = False) -> int:
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
    section = "Documents and answers"
    command(app, "init", bank=True, heavy=True, section=section)(init)
    command(app, "ingest", bank=True, device=True, dtype=True, section=section)(ingest)
    command(app, "query", bank=True, device=True, section=section)(query)
    command(app, "ask", bank=True, device=True, dtype=True, section=section)(ask)
