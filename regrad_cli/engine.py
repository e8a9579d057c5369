"""What computes for a bank: the model, prior, codec and embedder that belong to its settings, checked and loaded late.

Knows both halves, the learning one and (by its settings) the store's; reads and writes no bank itself.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from regrad_cli.errors import NonFinite, PriorMismatch
from regrad_cli.fingerprints import fingerprint, fingerprint_embedder
from regrad_cli.models import ModelFolder, quiet_libraries, resolve_embedder, resolve_model
from regrad_cli.records import BankSettings, Notice, Passage

if TYPE_CHECKING:
    import numpy as np

    from regrad_cli.embed import Embedder
    from regrad_cli.learn.model import Model
    from regrad_cli.learn.prior import Prior
    from regrad_cli.learn.rows import RowLayout
    from regrad_cli.learn.tokens import Tokenizer
    from regrad_cli.segments import Segment

T = TypeVar("T")
ABSENT = Path("not needed here")


def narrated(work: Callable[..., T], found: list[T]) -> Iterator[Notice]:
    """Runs `work(report=…)` and yields what it reports as it happens; appends its result to `found`."""
    heard: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work(report=heard.put))
        except BaseException as error:
            failed.append(error)
        finally:
            heard.put(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while (message := heard.get()) is not None:
        yield Notice(message)
    thread.join()
    if failed:
        raise failed[0]


class NewRows(NamedTuple):
    """Rows for a bank: codes (n, C) uint8, scales (n, S) float16, embeddings (n, d) float16.

    finite  [n]; False (and zeros in the arrays) where a loss, a gradient or an embedding is not finite
    """

    codes: np.ndarray
    scales: np.ndarray
    embeddings: np.ndarray
    finite: list[bool]


class Engine:
    """Model, prior, codec and embedder of one bank; each is loaded when it is first used.

    model_folder, embedder_folder   where they lie, already proved to be the bank's own
    """

    def __init__(
        self, settings: BankSettings, prior: bytes, model: Path, embedder: Path, *, device: str, dtype: str
    ) -> None:
        self.settings = settings
        self.model_folder = model
        self.embedder_folder = embedder
        self._prior_bytes = prior
        self._device = device
        self._dtype = dtype
        self._asked: tuple[str, np.ndarray] | None = None
        quiet_libraries()

    @cached_property
    def model(self) -> Model:
        from regrad_cli.learn.model import load_model

        return load_model(self.model_folder, device=self._device, dtype=self._dtype)

    @cached_property
    def prior(self) -> Prior:
        from regrad_cli.learn.prior import Prior

        return Prior.from_bytes(self._prior_bytes, f"the bank's prior '{self.settings.prior_name}'")

    @cached_property
    def layout(self) -> RowLayout:
        from regrad_cli.learn.rows import layout_of

        if self.settings.tensors != self.prior.shapes:
            raise PriorMismatch(
                f"the bank's gradients are of other tensors than its prior '{self.settings.prior_name}'",
                "take the bank from its source again",
            )
        return layout_of(self.settings)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from regrad_cli.learn.tokens import Tokenizer

        return Tokenizer(self.model_folder)

    @cached_property
    def embedder(self) -> Embedder:
        """For documents, on the chosen device."""
        from regrad_cli.embed import load_embedder
        from regrad_cli.learn.model import choose_device

        return load_embedder(self.embedder_folder, device=str(choose_device(self._device)))

    @cached_property
    def question_embedder(self) -> Embedder:
        """For one question at a time: unless a device was named, on the CPU, which needs no torch."""
        if self._device != "auto":
            return self.embedder
        from regrad_cli.embed import load_embedder

        return load_embedder(self.embedder_folder, device="cpu")

    @property
    def description(self) -> str:
        """Where it computes, for people: loads the model."""
        return f"{self.model.device}, {str(self.model.dtype).removeprefix('torch.')}"

    def question_vector(self, question: str) -> np.ndarray:
        """(d,) float32 of unit norm; that of the last question is kept."""
        if self._asked is None or self._asked[0] != question:
            self._asked = question, self.question_embedder.encode_query(question)
        return self._asked[1]

    @property
    def embeds(self) -> bool:
        """Whether there is an embedder."""
        return self.embedder_folder != ABSENT

    def gradients(self, passages: Sequence[Passage]) -> Generator[int, None, tuple[np.ndarray, np.ndarray, list[bool]]]:
        """Codes, scales and finite of passages, as in NewRows; yields how many are done, about, after every pass."""
        import numpy as np

        from regrad_cli.learn.gradients import map_gradients
        from regrad_cli.learn.rows import Parts

        layout, codec = self.layout, self.layout.codec
        cut = [self._segments(passage) for passage in passages]
        parts = [part for own in cut for part in own]
        owners = np.repeat(np.arange(len(cut)), [len(own) for own in cut])
        codes = np.zeros((len(parts), codec.code_bytes), np.uint8)
        scales = np.zeros((len(parts), codec.scale_count), np.float16)
        finite = np.zeros(len(parts), bool)
        done = 0
        yield done
        ids = [self.tokenizer.ids(part.training_text) for part in parts]
        coded = map_gradients(self.model, self.prior, ids, lambda part: (part, *codec.encode(part.tensors)))
        for part, code, scale in coded:
            for row, position in enumerate(part.positions):
                if bool(part.finite[row]) and np.isfinite(scale[row]).all():
                    codes[position], scales[position], finite[position] = code[row], scale[row], True
            done += len(part.positions)
            yield done * len(passages) // len(parts)
        vectors = None
        if layout.segments > 1:
            vectors = self._vectors([part.embedding_text for part in parts])
            finite &= np.isfinite(vectors).all(axis=1)
        good = np.ones(len(passages), bool)
        good[owners[~finite]] = False
        kept = good[owners]
        begins = np.array([part.begin for part in parts], np.int64)
        found = Parts(owners[kept], begins[kept], None if vectors is None else vectors[kept], codes[kept], scales[kept])
        return *layout.join(found, len(passages)), good.tolist()

    def _segments(self, passage: Passage) -> tuple[Segment, ...]:
        from regrad_cli.segments import cut

        most, tokens = self.settings.segments, self.prior.segment_tokens
        return cut(passage.title, passage.text or "", self.tokenizer.spans, most, tokens)

    def _vectors(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32 of unit norm, or not finite where a text has none: it is the same bits by itself."""
        import numpy as np

        try:
            return self.embedder.encode(texts)
        except NonFinite:
            vectors = np.full((len(texts), self.embedder.dimension), np.nan, np.float32)
            for position, text in enumerate(texts):
                with suppress(NonFinite):
                    vectors[position] = self.embedder.encode([text])[0]
            return vectors

    def rows(self, passages: Sequence[Passage]) -> Generator[int, None, NewRows]:
        """The bank rows of passages, returned at the end; yields how many gradients are done, after every pass."""
        import numpy as np

        codes, scales, finite = yield from self.gradients(passages)
        embeddings = self._vectors([passage.embedding_text for passage in passages]).astype(np.float16)
        for position, vector in enumerate(embeddings):
            if not np.isfinite(vector).all():
                finite[position], embeddings[position] = False, 0
        return NewRows(codes, scales, embeddings, finite)


def open_engine(
    settings: BankSettings,
    prior: bytes,
    check: Callable[..., None],
    *,
    with_model: bool = True,
    with_embedder: bool = True,
    model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    found: list[Engine],
) -> Iterator[Notice]:
    """Finds the bank's model and embedder, fetching what is missing; proves by fingerprints that they are its own.

    with_*  whether it is needed at all: what is not is neither looked for nor fetched
    check   the snapshot's `check(model=…, tokenizer=…, embedder=…)`, which raises Mismatch
    model   another place of the same model (a folder), for banks that come from elsewhere
    found   receives the Engine
    """
    places: list[Path] = []
    for wanted, resolve, name in (
        (with_model, resolve_model, model or settings.model_name),
        (with_embedder, resolve_embedder, settings.embedder_name),
    ):
        folders: list[ModelFolder] = []
        if wanted:
            yield from narrated(partial(resolve, name), folders)
        places.append(folders[0].path if wanted else ABSENT)
    if with_model:
        own = fingerprint(places[0])
        check(model=own.model, tokenizer=own.tokenizer)
    if with_embedder:
        check(embedder=fingerprint_embedder(places[1]))
    found.append(Engine(settings, prior, *places, device=device, dtype=dtype))
