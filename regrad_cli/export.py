"""A question → the adapted weights as a PEFT adapter folder. Yields events; prints nothing.

Weights of the language model are loaded only to tell which of several passages answers: a bank's rows, its prior and
the model's structure are all that an adapter is.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from regrad_cli.adaptation import Adaptation
from regrad_cli.answer import Answerer, AskOptions, used
from regrad_cli.candidates import answered, ways
from regrad_cli.errors import StorageFailed, UsageProblem
from regrad_cli.finding import Retrieved
from regrad_cli.models import HUB_ID
from regrad_cli.places import expanded
from regrad_cli.records import Exported, Notice

VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be; the first if not set
# What PEFT writes into such a folder: what --force may remove.
OF_AN_ADAPTER = frozenset({"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"})
# What the system answers where the place is wrong, and not the disk.
OF_THE_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS}
OF_THE_PLACE |= {errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


def export(
    bank: Path,
    question: str,
    out: Path,
    options: AskOptions,
    *,
    force: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    snapshot: int | None = None,
    skip_damaged: bool = False,
    model: str | None = None,
    search: str = "auto",
) -> Iterator[Notice | Exported]:
    """Writes what mode regrad would answer this question with as an adapter; the last event is Exported.

    out     the folder to make: whole, or not at all
    dtype   the number format of the adapter's tensors; `auto` is fp32
    force   replaces an adapter that is there
    raises  UsageProblem where nothing in the bank fits, or `out` holds something or is no place to write to;
            StorageFailed where the disk does not take it; Damaged where a passage it needs is damaged
    """
    if not question.strip():
        raise UsageProblem("the question is empty")
    out = Path(os.path.realpath(expanded(out)))
    if bank.resolve() in (out, *out.parents):
        raise UsageProblem(f"{out} is in the bank's own folder", "name a folder elsewhere")
    with _writing(out):
        _refuse_taken(out, force)
    with Answerer(
        bank, modes={"regrad"}, device=device, snapshot=snapshot, skip_damaged=skip_damaged, model=model, search=search
    ) as answerer:
        if not answerer.passages:
            raise UsageProblem(
                "the bank holds no passages, so there is nothing to adapt the model with",
                "`regrad ingest FOLDER` adds some" if snapshot is None else "leave out --snapshot, or name a later one",
            )
        found = yield from answerer.retrieve(question, options)
        if not found.hits:
            raise UsageProblem(
                "nothing in the bank fits this question, so there is nothing to adapt the model with",
                "`regrad query` shows what is near it; a lower --min-score lets in what fits less",
            )
        settings = answerer.settings
        if not settings.prior_trained:
            yield Notice("this bank's prior is untrained: expect an adapter that answers poorly")
        from regrad_cli.learn.peft_layout import adapter_files, projections_of
        from regrad_cli.learn.prompt import question_text

        adaptation = yield from _answering(answerer, question, options, found)
        folder = answerer.model_folder
        base_model = base_model_name(model or settings.model_name, folder)
        projections = projections_of(folder)
        files = adapter_files(adaptation.prior, adaptation.change(), projections, base_model, dtype)
    rank = adaptation.prior.rank
    if rank > VLLM_RANKS[0]:
        needed = next((most for most in VLLM_RANKS if most >= rank), None)
        way = "PEFT loads it, vLLM cannot" if needed is None else f"start vLLM with --max-lora-rank {needed}"
        yield Notice(f"an adapter of rank {rank}: {way}")
    _write_folder(out, files, force)
    weights = adaptation.of_passages(len(found.hits))
    yield Exported(
        path=str(out),
        question=question,
        prompt=question_text(question),
        base_model=base_model,
        prior=settings.prior_name,
        bank=str(bank),
        rank=rank,
        modules=len(projections),
        size_bytes=sum(map(len, files.values())),
        passages=tuple(used(hit, weight) for hit, weight in zip(found.hits, weights, strict=True)),
        partial=bool(found.left_out),
        notices=found.left_out,
    )


def _answering(
    answerer: Answerer, question: str, options: AskOptions, found: Retrieved
) -> Generator[Notice, None, Adaptation]:
    """What `ask` would answer with. Where several passages may, it takes the model to tell which does."""
    adaptation = answerer.adaptation(question, found, options.gamma)
    places = [place for place, _ in ways(adaptation, options.combine)]
    place = places[0]
    if len(places) > 1:
        from regrad_cli.learn.prompt import BEGINNING

        model = yield from answerer.load()
        asked = answerer.prepared(model, question, options, found)
        ((_, given),) = answered(model, [asked.candidates], BEGINNING)
        place = given.candidate.place
    return adaptation.alone(place)


def base_model_name(name: str, folder: Path) -> str:
    """What other programs know the model by: its hub id, or its folder where it is the starter, a folder or a file."""
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else str(folder)


def _refuse_taken(out: Path, force: bool) -> None:
    """raises UsageProblem unless there is nothing at `out`, an empty folder, or, with `force`, an adapter"""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise UsageProblem(f"{out} is there and is no folder", "name another with --out")
    entries = sorted(path.name for path in out.iterdir())
    foreign = [name for name in entries if name not in OF_AN_ADAPTER]
    if foreign:
        raise UsageProblem(f"{out} holds what is not an adapter's ({foreign[0]})", "name another folder with --out")
    if entries and not force:
        raise UsageProblem(f"{out} holds an adapter already", "--force replaces it; or name another folder with --out")


def _write_folder(out: Path, files: Mapping[str, bytes], force: bool) -> None:
    """Makes the folder beside its place and renames it there: what is at `out` is whole at every moment.

    raises  UsageProblem where `out` was taken meanwhile or is no place to write to; StorageFailed
    """
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-", ignore_cleanup_errors=True) as work:
            made, old = Path(work) / "made", Path(work) / "old"
            made.mkdir()
            for name, data in files.items():
                with (made / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            _refuse_taken(out, force)
            if out.exists() and any(out.iterdir()):
                out.rename(old)
            try:
                made.rename(out)
            except BaseException:
                if old.exists():
                    old.rename(out)
                raise


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """raises  UsageProblem for what is wrong with the place, StorageFailed for what is wrong with the disk"""
    try:
        yield
    except OSError as error:
        why = str(error.strerror or error) + (f" ({error.filename})" if error.filename else "")
        if error.errno in OF_THE_PLACE:
            raise UsageProblem(f"{out} cannot be written: {why}", "give --out a folder in one that is yours") from error
        raise StorageFailed(
            f"could not write the adapter to {out}: {why}",
            "nothing was changed; make room, or name another folder with --out",
        ) from error
