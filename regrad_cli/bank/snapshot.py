"""One snapshot of a bank, opened for reading: its numbers, documents, passages, rows, and the search over them.
Knows the manifest and the readers below it; writes nothing, and no model, prior or codec is more to it than bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any

from regrad_cli.bank import layout
from regrad_cli.bank.damage import PRIOR_WAY_OUT, DamagedFile, Finding
from regrad_cli.bank.makeup import figures
from regrad_cli.bank.manifest import Counts, Manifest
from regrad_cli.bank.store import Store
from regrad_cli.errors import Mismatch, UsageProblem
from regrad_cli.records import Hit, Passage, RowRef, document_id, sha256_hex

if TYPE_CHECKING:  # numpy and what needs it are imported when rows are: `bank stats` does without (0.1 s)
    import numpy as np
    import numpy.typing as npt

    from regrad_cli.bank.nearest import Nearest
    from regrad_cli.bank.search import Candidate
    from regrad_cli.bank.shards import Row, ShardReader

HEX = frozenset("0123456789abcdef")
LEAST_DIGITS = 4  # of an id that is given in part
SEARCHED_SHARDS = 16  # for records of a file that is no document itself
SLACK = 16  # candidates beyond k: float32 may order near-equal rows otherwise than the float64 score does


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a snapshot in the order asked for, each proved by its checksum.

    codes (n, C) uint8 · scales (n, S) float16 · embeddings (n, d) float16 · keys n × 32 bytes
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    embeddings: npt.NDArray[np.float16]
    keys: tuple[bytes, ...]
    passages: tuple[Passage, ...]


class Snapshot:
    """A bank as it was at one commit; it stays that while others write. Made by `open_bank`, used in a `with`.

    store       where its files are read from
    damaged     what was skipped by calls with skip_damaged=True
    """

    def __init__(self, store: Store, manifest: Manifest, release: Callable[[], None] | None = None) -> None:
        self.path = store.path
        self.manifest = manifest
        self.number = manifest.number
        self.settings = manifest.settings
        self.damaged: list[Finding] = []
        self._release = release
        self.store = store
        self._readers: dict[int, ShardReader] = {}

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the shared lock back, or the packed bank's file."""
        release, self._release = self._release, None
        if release is not None:
            release()

    # ── what the manifest alone tells ────────────────────────────────────────────────────────────────────────────────

    def stats(self) -> dict[str, Any]:
        """What `bank stats` prints of the snapshot itself; reads no shard."""
        return figures(self.path, self.store.form, self.manifest)

    def check(
        self,
        *,
        model: str | None = None,
        tokenizer: str | None = None,
        prior: str | None = None,
        embedder: str | None = None,
    ) -> None:
        """Compares fingerprints with those the bank was made for; None is not compared.

        raises  Mismatch that names both sides and the way out
        """
        own = self.settings
        ways = {
            "model": (own.model, model, own.model_name, "use the model the bank was made with, or make a new bank"),
            "tokenizer": (own.tokenizer, tokenizer, own.model_name, "use that model's tokenizer, or make a new bank"),
            "prior": (own.prior, prior, own.prior_name, "`regrad ingest --stale --prior FILE` moves to another one"),
            "embedder": (own.embedder, embedder, own.embedder_name, "name the bank's embedder, or make a new bank"),
        }
        for what, (expected, given, name, way) in ways.items():
            if given is not None and given != expected:
                raise Mismatch(
                    f"the bank at {self.path} was made with the {what} of {name} ({expected[:12]}…), "
                    f"not with this one ({given[:12]}…)",
                    way,
                )

    def moved(self) -> Snapshot | None:
        """The rows that a move has made so far, as a snapshot under its prior; None where no move is under way."""
        move, manifest = self.manifest.move, self.manifest
        if move is None:
            return None
        made = replace(manifest, settings=move.settings, prior=move.prior, shards=move.shards, index=None, move=None)
        return Snapshot(self.store, replace(made, counts=Counts(passages=sum(shard.rows for shard in move.shards))))

    def prior_bytes(self) -> bytes:
        """The prior's safetensors file, proved by its name."""
        entry = self.manifest.prior
        name = layout.content_name("priors", entry.sha256)
        try:
            with self.store.open(name, entry.bytes) as region:
                data = region.read(0, region.length)
        except DamagedFile as error:
            raise DamagedFile(name, error.finding.what, hint=PRIOR_WAY_OUT) from error
        if sha256_hex(data) != entry.sha256:
            raise DamagedFile(name, "is damaged", hint=PRIOR_WAY_OUT)
        return data

    # ── documents and passages ───────────────────────────────────────────────────────────────────────────────────────

    def passages(
        self, document: str | None = None, *, skip_damaged: bool = False
    ) -> Iterator[tuple[RowRef, Passage, bytes]]:
        """Every live row, or those of one document: its place, its passage, its key. In the order of the shards, but
        one document's in the order of its text."""
        if document is not None:
            yield from sorted(self._document(document, skip_damaged), key=lambda item: (item[1].ordinal, item[0]))
            return
        for position in range(len(self.manifest.shards)):
            yield from self._shard_passages(position, None, skip_damaged)

    def _document(self, document: str, skip_damaged: bool) -> Iterator[tuple[RowRef, Passage, bytes]]:
        for position, shard in enumerate(self.manifest.shards):
            if shard.first <= document <= shard.last:
                yield from self._shard_passages(position, document, skip_damaged)

    def _shard_passages(
        self, position: int, document: str | None, skip_damaged: bool
    ) -> Iterator[tuple[RowRef, Passage, bytes]]:
        from regrad_cli.bank.shards import parse_line

        reader = self.reader(position)
        try:
            wanted = reader.live()
            if not wanted.any():
                return
            if document is not None:
                wanted &= reader.documents() == int(document, 16)
                if not wanted.any():
                    return
            keys = reader.block("keys")
            for row, line in reader.lines():
                if not wanted[row]:
                    continue
                try:
                    passage = parse_line(line)
                except ValueError as error:
                    raise DamagedFile(reader.entry.docs_name, f"line {row} is not a passage ({error})") from error
                yield RowRef(position, row), passage, keys[row].tobytes()
        except DamagedFile as error:
            if not skip_damaged:
                raise
            self._skip(error)

    def identities(
        self,
    ) -> Iterator[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.uint64], npt.NDArray[np.uint8]]]:
        """Of each shard, what says whose its live rows are, without a text: its position, the rows (n,), their
        documents' ids as numbers (n,), their keys (n, 32)."""
        import numpy as np

        for position in range(len(self.manifest.shards)):
            reader = self.reader(position)
            live = np.flatnonzero(reader.live())
            if len(live):
                yield position, live, reader.documents()[live], reader.block("keys")[live]

    def texts(
        self, refs: Iterable[RowRef], *, warm: bool = False, skip_damaged: bool = False
    ) -> Iterator[tuple[RowRef, Passage]]:
        """The passages of these rows, in the order of the shards, without their gradients: proved by their shard's docs
        file, or row by row where that is damaged and damage is to be skipped. `warm` as in `search`."""
        from regrad_cli.bank.shards import parse_line

        wanted: dict[int, list[int]] = {}
        for ref in refs:
            wanted.setdefault(ref.shard, []).append(ref.row)
        for position, rows in sorted(wanted.items()):
            reader = self.reader(position)
            found: list[tuple[RowRef, Passage]] = []
            try:
                for row, line in zip(rows, reader.chosen_lines(rows, warm=warm), strict=True):
                    found.append((RowRef(position, row), parse_line(line)))
            except (DamagedFile, ValueError) as error:
                damage = error if isinstance(error, DamagedFile) else DamagedFile(reader.entry.docs_name, str(error))
                if not skip_damaged:
                    raise damage from error
                self._skip(damage)
                found = []
                for row in rows:
                    with suppress(DamagedFile):  # the file was named
                        found.append((RowRef(position, row), reader.row(row).passage))
            yield from found

    def documents(self, *, skip_damaged: bool = False) -> Iterator[dict[str, Any]]:
        """A dict a document, as `bank ls` prints it, in the order of their sources."""
        found: dict[str, dict[str, Any]] = {}
        firsts: dict[str, int] = {}
        for _, passage, _ in self.passages(skip_damaged=skip_damaged):
            entry = found.setdefault(
                passage.document,
                {"id": passage.document, "source": passage.source, "title": "", "passages": 0, "tokens": 0},
            )
            if passage.ordinal <= firsts.get(passage.document, passage.ordinal):
                firsts[passage.document], entry["title"] = passage.ordinal, passage.title
            entry["passages"] += 1
            entry["tokens"] += passage.tokens
        yield from sorted(found.values(), key=lambda entry: (entry["source"], entry["id"]))

    def find_document(self, name: str) -> str:
        """The id of the document that is meant by an id, a unique beginning of one (LEAST_DIGITS or more), or a source.

        raises  UsageProblem if there is none, or several
        """
        import numpy as np

        exact = {int(document_id(name), 16)}
        prefix = name.lower() if LEAST_DIGITS <= len(name) <= 16 and not set(name.lower()) - HEX else None
        found: set[int] = set()
        meant = [(document_id(name),) * 2] + ([(prefix.ljust(16, "0"), prefix.ljust(16, "f"))] if prefix else [])
        for position, shard in enumerate(self.manifest.shards):
            if not any(shard.first <= end and start <= shard.last for start, end in meant):
                continue
            numbers = self.reader(position).live_documents()
            for start, end in meant:
                fits = (numbers >= np.uint64(int(start, 16))) & (numbers <= np.uint64(int(end, 16)))
                found.update(numbers[fits].tolist())
        if found & exact:  # a source wins over an id that looks like it
            found &= exact
        if not found:
            raise self._no_document(name)
        if len(found) > 1:
            listed = ", ".join(f"{number:016x}" for number in sorted(found)[:5])
            raise UsageProblem(f"{len(found)} documents begin with {name!r}: {listed}", "give more of the id")
        return f"{found.pop():016x}"

    def _no_document(self, name: str) -> UsageProblem:
        """Nothing has this id or source, but records of a file may be documents, which only reading lines tells: those
        of the newest shards, for a slip of the pen is not to take seconds."""
        for position in range(len(self.manifest.shards))[-SEARCHED_SHARDS:]:
            with suppress(DamagedFile, ValueError):
                if record := self.reader(position).record_of(name):
                    way_out = "records are documents of their own: name those; `regrad bank ls` lists ids and sources"
                    return UsageProblem(f"there is no document {name!r} in the bank, but {record!r} is one", way_out)
        way_out = "`regrad bank ls` lists ids and sources"
        if 0 < len(name) < LEAST_DIGITS and not set(name.lower()) - HEX:
            way_out = f"of an id give {LEAST_DIGITS} digits at least; {way_out}"
        return UsageProblem(f"there is no document {name!r} in the bank", way_out)

    # ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def row(self, ref: RowRef) -> Row:
        """One row as bytes, proved by its checksum; reads that row only. raises DamagedRow naming its document"""
        return self.reader(ref.shard).row(ref.row)

    def read_rows(self, refs: Sequence[RowRef]) -> Rows:
        """These rows as arrays, in this order, each proved by its checksum. raises DamagedFile naming the document"""
        import numpy as np

        rows = [self.row(ref) for ref in refs]

        def stack(parts: list[bytes], dtype: str, width: int) -> npt.NDArray[Any]:
            return np.frombuffer(bytearray(b"".join(parts)), dtype).reshape(len(rows), width)

        return Rows(
            codes=stack([row.codes for row in rows], "|u1", self.settings.code_bytes),
            scales=stack([row.scales for row in rows], "<f2", self.settings.scale_count),
            embeddings=stack([row.embedding for row in rows], "<f2", self.settings.embedding_dim),
            keys=tuple(row.key for row in rows),
            passages=tuple(row.passage for row in rows),
        )

    # ── search ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def nearest(
        self, vectors: npt.NDArray[np.float32], count: int, *, warm: bool = False, skip_damaged: bool = False
    ) -> list[list[Candidate]]:
        """The `count` rows nearest to each vector, best first, as places and float32 scores, whose last bits depend on
        how they were found. As `search`, but no row and no text is looked at."""
        return self._nearest(vectors, count, warm, self._skip if skip_damaged else None)

    def search(
        self, vectors: npt.NDArray[np.float32], k: int, *, warm: bool = False, skip_damaged: bool = False
    ) -> list[list[Hit]]:
        """The k most similar passages for each vector, best first; fewer where the bank has fewer.

        vectors       (q, d) float32, unit norm
        warm          many questions will follow: keep the embeddings in memory, use the search graph if there is one
        skip_damaged  leave out what is damaged and say so in `damaged`
        raises        DamagedFile naming what is damaged: a shard's embeddings, or the document of a hit
        """
        if k < 1:
            raise UsageProblem(f"k is {k}; at least one passage must be asked for")
        hits: list[list[Hit]] = []
        wanted, count = min(k, self.manifest.counts.passages), k + SLACK
        candidates = self.nearest(vectors, count, warm=warm, skip_damaged=skip_damaged)
        for query, vector in enumerate(vectors):
            chosen, mine, many = self._hits(vector, candidates[query], k, skip_damaged), candidates[query], count
            while len(chosen) < wanted and len(mine) == many:  # damaged rows took places of good ones
                many *= 4
                (mine,) = self.nearest(vector[None], many, warm=warm, skip_damaged=skip_damaged)
                chosen = self._hits(vector, mine, k, skip_damaged)
            hits.append(chosen)
        return hits

    def _hits(
        self, vector: npt.NDArray[np.float32], candidates: Sequence[Candidate], k: int, skip_damaged: bool
    ) -> list[Hit]:
        """Candidates in the order of their float64 scores, read and proved until there are k."""
        from regrad_cli.bank.search import cosine

        scored = []
        for candidate in candidates:
            reader = self.reader(candidate.ref.shard)
            try:
                embedding = reader.unproved_embeddings([candidate.ref.row])[0]
            except DamagedFile as error:
                if not skip_damaged:
                    raise
                self._skip(error)
                continue
            scored.append((-cosine(vector, embedding), candidate.ref))
        hits = islice(self.hits((ref for _, ref in sorted(scored)), vector, skip_damaged=skip_damaged), k)
        return sorted(hits, key=lambda hit: (-hit.score, hit.passage.document, hit.passage.ordinal))

    def hits(
        self, refs: Iterable[RowRef], vector: npt.NDArray[np.float32] | None = None, *, skip_damaged: bool = False
    ) -> Iterator[Hit]:
        """These rows in turn, each read and proved by its checksum when it is asked for. Scores are cosines to the
        vector, (d,) float32 of unit norm; 0 without one."""
        import numpy as np

        from regrad_cli.bank.search import cosine

        for ref in refs:
            try:
                row = self.row(ref)
            except DamagedFile as error:
                if not skip_damaged:
                    raise
                self._skip(error)
                continue
            score = 0.0 if vector is None else cosine(vector, np.frombuffer(row.embedding, "<f2"))
            yield Hit(ref, score, row.passage)

    # ── the parts below ──────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def _nearest(self) -> Nearest:
        from regrad_cli.bank.nearest import Nearest

        return Nearest(self.store, self.manifest, self.reader)

    def reader(self, position: int) -> ShardReader:
        """Of the shard in this place of the manifest; kept, with the shard's layout and its documents' ids once read.
        raises IndexError where there is no such place"""
        reader = self._readers.get(position)
        if reader is None:
            from regrad_cli.bank.shards import ShardReader

            if not 0 <= position < len(self.manifest.shards):
                raise IndexError(f"shard {position} of {len(self.manifest.shards)}")
            reader = ShardReader(self.store, self.manifest.shards[position], self.settings)
            self._readers[position] = reader
        return reader

    def _skip(self, error: DamagedFile) -> None:
        if error.finding not in self.damaged:
            self.damaged.append(error.finding)
