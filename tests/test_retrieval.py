"""Retrieval: the words of a question in a text, the three ways to find passages, and when nothing fits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faketerminal import call
from hypothesis import given
from hypothesis import settings as run_with
from hypothesis import strategies as st
from story_bank import story_bank
from use_cases import ask, files, ingest, write

from regrad_cli import finding, lexical, retrieval
from regrad_cli.bank import create_bank, open_bank, remove_documents, write_bank
from regrad_cli.bank.shards import ShardReader
from regrad_cli.errors import Damaged, UsageProblem
from regrad_cli.lexical import Bm25, Lexicon, coverage, plain, words_of
from regrad_cli.records import (
    BankSettings,
    CodecSettings,
    Document,
    Hit,
    Passage,
    RowRef,
    TensorShape,
    document_id,
    row_key,
    sha256_hex,
)
from regrad_cli.retrieval import Retriever, least_score, way_for

WORDS = ["lamp", "keeper", "harbour", "ferry", "bell", "tower", "the", "of"]


def shares(question: str, *texts: str) -> list[float]:
    lexicon = Lexicon()
    terms = [lexicon.terms(text) for text in texts]
    return coverage(lexicon.terms(question), terms).tolist()


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_text_with_all_of_a_question_covers_it_and_one_with_nothing_of_it_does_not():
    whole, none = shares("Who lights the harbour lamp?", "Oda lights the harbour lamp.", "The ferry leaves at noon.")
    assert (whole, none) == (1.0, 0.0)


def test_forms_of_a_word_accents_and_case_are_one_word():
    text = "THE KEEPER'S LAMPS; a café, lighting it. Nao’s"
    assert shares("keeper lamp", text) == [1.0]
    assert shares("MULLER", "a Müller") == shares("Nao", "that is Nao’s") == [1.0]
    assert len(Lexicon().terms("Nao's Nao’s")) == 2


@run_with(max_examples=500, deadline=None)
@given(st.text(alphabet="ab _1'-.\n\t\x1c") | st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_are_those_of_any_text(text: str) -> None:
    lowered = plain(text)
    assert words_of(lowered) == [word for word in words_of(f"{lowered} é") if word != "é"]


def test_a_rare_word_counts_for_more_than_a_common_one():
    common = ["the lamp is lit"] * 20
    rare, usual = shares("lamp zephyr", "a zephyr blows", *common)[:2]
    assert rare > 2 * usual > 0


def test_how_it_is_asked_says_nothing():
    texts = ("the lamp of the harbour", "the harbour", "what is it, and who and when?")
    assert shares("What is the harbour lamp?", *texts) == shares("harbour lamp", *texts)
    assert shares("What is it?", *texts) == [0.0, 0.0, 0.0]


def test_neighbouring_words_count_for_more_than_the_same_words_apart():
    together, apart = shares("harbour lamp", "a harbour lamp shines", "a lamp shines over the harbour")
    assert together == 1.0 > apart


def test_words_between_which_only_little_ones_stand_are_neighbours():
    assert shares("the lamp of the harbour", "lamp harbour") == [1.0]


def test_a_pair_never_spans_two_texts():
    assert (
        shares("harbour lamp", "in the harbour", "lamp", "harbour lamp")[:2]
        == shares("harbour lamp", "in the harbour", "a lamp", "harbour lamp")[:2]
    )
    assert max(shares("harbour lamp", "the harbour", "lamp oil")) < 1


def test_chinese_and_japanese_are_read_by_characters():
    right, other = shares("東京の塔はいつ建てられたか", "東京の塔は1958年に建てられた", "大阪の城")
    assert right > 0.5 > other
    assert len(Lexicon().terms("東京abc塔")) == 4


def test_a_question_about_something_else_is_covered_little_by_a_bank_of_one_passage_too():
    text = "The keeper of the harbour lights the lamp at dusk."
    assert shares("Which keeper won the world cup in football?", text)[0] < 0.2
    assert shares("When does the keeper light the lamp?", text)[0] > 0.4


@run_with(max_examples=80, deadline=None)
@given(
    st.lists(st.sampled_from(WORDS), max_size=7),
    st.lists(st.lists(st.sampled_from(WORDS), max_size=9), min_size=1, max_size=7),
)
def test_coverage_is_what_its_definition_says(question: list[str], texts: list[list[str]]) -> None:
    """The reference: sets and sums, one text at a time."""

    def content(words: list[str]) -> list[str]:
        return [word for word in words if word not in lexical.STOPWORDS]

    def share(asked: set[Any], held: list[set[Any]], place: int) -> float:
        def weight(term: Any) -> float:
            count, having = len(held) + 100, sum(term in each for each in held)
            return math.log(1 + (count - having + 0.5) / (having + 0.5)) ** 1.5

        return sum(weight(term) for term in asked & held[place]) / sum(map(weight, asked))

    asked = content(question)
    pairs = set(pairwise(asked))
    held = [set(content(text)) for text in texts]
    held_pairs = [set(pairwise(content(text))) for text in texts]
    for place, found in enumerate(shares(" ".join(question), *map(" ".join, texts))):
        expected = share(set(asked), held, place) if asked else 0.0
        if pairs:
            expected = (expected + share(pairs, held_pairs, place)) / 2
        assert found == pytest.approx(expected, abs=1e-12)


@run_with(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([*WORDS, "unheard"]), max_size=6),
    st.lists(st.lists(st.sampled_from(WORDS), max_size=9), max_size=6),
)
def test_bm25_is_the_formula_over_the_most_that_could_be_reached(question: list[str], texts: list[list[str]]) -> None:
    found = Bm25(map(" ".join, texts), Lexicon()).scores(" ".join(question)).tolist()
    content = [[word for word in text if word not in lexical.STOPWORDS] for text in texts]
    asked = {word for word in question if word not in lexical.STOPWORDS}
    mean = sum(map(len, content)) / max(1, len(content))

    def weight(term: str) -> float:
        having = sum(term in each for each in content)
        return math.log(1 + (len(content) - having + 0.5) / (having + 0.5))

    for score, text in zip(found, content, strict=True):
        reached = sum(
            weight(term) * text.count(term) / (text.count(term) + 1.2 * (0.25 + 0.75 * len(text) / mean))
            for term in asked
            if term in text
        )
        assert score == pytest.approx(reached / (sum(map(weight, asked)) or 1), rel=1e-5)
        assert 0 <= score < 1


# ── banks of made vectors ───────────────────────────────────────────────────────────────────────────────────────────

TEXTS = {
    "lamp.md": "Oda lights the harbour lamp at dusk.",
    "ferry.md": "The ferry to Skerry leaves at noon.",
    "bell.md": "Ilse rings the bell of Brannoch in fog.",
    "tower.md": "Nobody lives in the tower of the castle.",
}
PRIOR = b"no prior"
DIMENSION = 256  # so that vectors of different texts are nearly orthogonal


def vector(seed: str) -> np.ndarray:
    made = np.random.default_rng(int(sha256_hex(seed)[:8], 16)).normal(size=DIMENSION)
    return (made / np.linalg.norm(made)).astype(np.float32)


def near(text: str, cosine: float) -> Callable[[str], np.ndarray]:
    """An embedder of one question: its vector has this cosine to the text's, as it would be without float16."""
    base = vector(text).astype(np.float64)
    other = vector("elsewhere").astype(np.float64)
    other -= (other @ base) * base
    made = cosine * base + math.sqrt(1 - cosine**2) * other / np.linalg.norm(other)
    return lambda _: made.astype(np.float32)


def text_bank(
    path: Path, texts: dict[str, str] = TEXTS, *, keep_text: bool = True, embedder: str = "", commit: int = 4
) -> Path:
    """A bank with one passage a source, a commit each `commit`; its embeddings are `vector(text)`."""
    settings = BankSettings(
        model=sha256_hex("model"),
        model_name="none",
        tokenizer=sha256_hex("tokenizer"),
        prior=sha256_hex(PRIOR),
        prior_name="none",
        prior_trained=False,
        tensors=(TensorShape("none", 1, 1),),
        codec=CodecSettings(),
        code_bytes=1,
        scale_count=1,
        embedder=embedder or retrieval.MEASURED_EMBEDDER,
        embedder_name="none",
        embedding_dim=DIMENSION,
        keep_text=keep_text,
    )
    create_bank(path, settings, PRIOR)
    with write_bank(path) as writer:
        items = list(texts.items())
        for start in range(0, len(items), commit):
            for source, text in items[start : start + commit]:
                passage = Passage(document_id(source), source, "", 0, 0, 9, text)
                key = row_key(passage, settings.model, settings.tokenizer, settings.prior)
                stored = passage if keep_text else Passage(document_id(source), source, "", 0, 0, 9, None)
                rows = np.zeros((1, 1))
                embedding = vector(text).astype(np.float16)[None]
                writer.add([stored], [key], rows.astype(np.uint8), rows.astype(np.float16), embedding)
            writer.commit("ingest")
        writer.finish()
    return path


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    return text_bank(tmp_path / "b")


def find(bank: Path, question: str, embed: Callable[[str], Any], k: int = 4, way: str = "fused", **options: Any):
    skip = options.pop("skip_damaged", False)
    with open_bank(bank) as snapshot:
        return Retriever(snapshot, way, skip_damaged=skip).find(question, embed, k, **options)


def sources(hits: list[Hit]) -> list[str]:
    return [hit.passage.source for hit in hits]


def test_words_find_what_meaning_misses_and_meaning_what_words_miss(bank: Path) -> None:
    question = "Who rings the bell of Brannoch?"
    misled = near(TEXTS["ferry.md"], 0.4)
    assert sources(find(bank, question, misled, way="dense"))[0] == "ferry.md"
    assert sources(find(bank, question, misled, way="lexical")) == ["bell.md"]
    assert sources(find(bank, question, misled))[0] == "bell.md"
    assert sources(find(bank, "When can I cross the sound?", near(TEXTS["ferry.md"], 0.4)))[0] == "ferry.md"


def test_a_fused_score_is_five_eighths_cosine_and_three_eighths_words(bank: Path) -> None:
    hits = find(bank, "Who lights the harbour lamp?", near(TEXTS["lamp.md"], 0.7))
    assert len(hits) == 4 and hits == sorted(hits, key=lambda hit: -hit.score)
    for hit in hits:
        assert hit.score == pytest.approx(0.625 * hit.dense + 0.375 * hit.lexical)
    assert (hits[0].passage.source, hits[0].lexical) == ("lamp.md", 1.0)
    assert hits[0].dense == pytest.approx(0.7, abs=1e-3)


def test_dense_scores_are_cosines_and_lexical_ones_need_no_vector(bank: Path) -> None:
    dense = find(bank, "Who lights the lamp?", near(TEXTS["lamp.md"], 0.7), way="dense")
    assert [(hit.score, hit.lexical) for hit in dense] == [(hit.dense, None) for hit in dense]

    def refuse(_: str) -> np.ndarray:
        raise AssertionError("a vector was asked for")

    found = find(bank, "harbour lamp and the bell", refuse, way="lexical")
    assert sources(found) == ["lamp.md", "bell.md"]
    assert all(hit.score == hit.lexical and hit.dense is None for hit in found)


def test_a_hit_is_the_same_bits_cold_warm_and_at_the_hundredth_question(tmp_path: Path) -> None:
    texts = {f"{number}.md": f"Lamp {number} of the harbour, lit by keeper {number % 7}" for number in range(900)}
    made = text_bank(tmp_path / "b", texts, commit=300)
    questions = [f"Which lamp does keeper {number} light?" for number in range(7)]
    cold = [find(made, question, near(question, 0.9)) for question in questions]
    with open_bank(made) as snapshot:
        session = Retriever(snapshot, "fused")
        for _ in range(2):
            assert [session.find(question, near(question, 0.9), 4, warm=True) for question in questions] == cold


def test_more_than_there_are_gives_all_and_an_empty_bank_gives_none(bank: Path, tmp_path: Path) -> None:
    for way, count in (("fused", 4), ("dense", 4), ("lexical", 1)):
        assert len(find(bank, "harbour", near("x", 0.5), k=9, way=way)) == count
    empty = text_bank(tmp_path / "empty", {})
    for way in ("fused", "dense", "lexical"):
        assert find(empty, "harbour", near("x", 0.5), way=way) == []


def test_the_words_of_a_removed_passage_are_found_no_more_and_a_question_writes_nothing(bank: Path) -> None:
    question, embed = "Who rings the bell of Brannoch?", near("x", 0.5)
    before = files(bank)
    for way in ("fused", "lexical"):
        assert sources(find(bank, question, embed, way=way))[0] == "bell.md"
    assert files(bank) == before
    remove_documents(bank, [document_id("bell.md")])
    assert "bell.md" not in sources(find(bank, question, embed))
    assert find(bank, question, embed, way="lexical") == []


def test_a_bank_without_text_is_searched_by_meaning_alone(tmp_path: Path) -> None:
    made = text_bank(tmp_path / "b", keep_text=False)
    with open_bank(made) as snapshot:
        assert way_for(snapshot.settings, "auto") == way_for(snapshot.settings, "dense") == "dense"
        for way in ("fused", "lexical"):
            with pytest.raises(UsageProblem, match="no text"):
                way_for(snapshot.settings, way)
    assert sources(find(made, "?", near(TEXTS["bell.md"], 0.8), way="dense"))[0] == "bell.md"


def test_damaged_text_is_refused_or_left_out_and_the_rest_of_its_file_is_still_read(tmp_path: Path) -> None:
    made = text_bank(tmp_path / "b", TEXTS | {f"{number}.md": f"A passage {number}" for number in range(9)})
    broken(made, b"Brannoch")
    question, embed = "Who lights the harbour lamp?", near("x", 0.5)
    for way in ("fused", "lexical"):
        with pytest.raises(Damaged):
            find(made, question, embed, way=way)
    with open_bank(made) as snapshot:
        hits = Retriever(snapshot, "fused", skip_damaged=True).find(question, embed, 13)
        assert [finding.file for finding in snapshot.damaged] == [snapshot.manifest.shards[0].docs_name]
    assert len(hits) == 12 and "bell.md" not in sources(hits)
    assert hits[0].passage.source == "lamp.md"


def broken(bank: Path, word: bytes) -> None:
    """One letter of a passage with this word is another now."""
    with open_bank(bank) as snapshot:
        docs = [bank / shard.docs_name for shard in snapshot.manifest.shards]
    (path,) = [each for each in docs if word in each.read_bytes()]
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data.replace(word, bytes([word[0] ^ 1]) + word[1:]))


def test_good_passages_take_the_places_of_damaged_ones(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "CANDIDATES", 1)
    embed = near(TEXTS["bell.md"], 0.9)
    assert sources(find(bank, "Who rings the bell?", embed, k=1)) == ["bell.md"]
    broken(bank, b"Brannoch")
    assert len(find(bank, "Who rings the bell?", embed, k=1, skip_damaged=True)) == 1


def test_a_session_hashes_a_file_once_and_proves_each_line_that_it_reads_later(
    bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[str] = []
    real = ShardReader._docs
    monkeypatch.setattr(ShardReader, "_docs", lambda reader: whole.append(reader.entry.docs_name) or real(reader))
    monkeypatch.setattr(retrieval, "CANDIDATES", 1)

    def found(session: Retriever, source: str) -> list[str]:
        return sources(session.find("harbour", near(TEXTS[source], 0.9), 1, warm=True))

    with open_bank(bank) as snapshot:
        session = Retriever(snapshot, "fused")
        assert found(session, "lamp.md") == ["lamp.md"]
        assert found(session, "ferry.md") == ["ferry.md"]
        assert len(whole) == 1
        broken(bank, b"Brannoch")
        assert found(session, "tower.md") == ["tower.md"]
        refs = [ref for ref, passage, _ in snapshot.passages(skip_damaged=True) if passage.source == "bell.md"]
        assert refs == [], "the file as a whole is damaged"
        with pytest.raises(Damaged):
            list(snapshot.texts([RowRef(0, row) for row in range(4)], warm=True))


# ── nothing fits ────────────────────────────────────────────────────────────────────────────────────────────────────


def settings_of(bank: Path) -> BankSettings:
    with open_bank(bank) as snapshot:
        return snapshot.settings


def test_the_rule_is_a_number_of_the_way_and_only_for_cosines_that_were_measured(bank: Path, tmp_path: Path) -> None:
    other = settings_of(text_bank(tmp_path / "other", embedder=sha256_hex("another")))
    for way, least in retrieval.LEAST_SCORES.items():
        assert least_score("auto", way, settings_of(bank)) == least
        assert least_score(None, way, settings_of(bank)) is None
        assert least_score(0.9, way, other) == 0.9
    assert [least_score("auto", way, other) for way in ("fused", "dense")] == [None, None]
    assert least_score("auto", "lexical", other) == retrieval.LEAST_SCORES["lexical"]


def test_hits_say_whether_they_fit(bank: Path) -> None:
    question = "Who lights the harbour lamp?"
    fits = [hit.fits for hit in find(bank, question, near(TEXTS["lamp.md"], 0.7), min_score="auto")]
    assert fits == [True, False, False, False]
    nothing = find(bank, "Which team won the cup?", near(TEXTS["lamp.md"], 0.3), min_score="auto")
    assert [hit.fits for hit in nothing] == [False] * 4
    assert [hit.fits for hit in find(bank, question, near("x", 0.1))] == [None] * 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path) -> Path:
    return story_bank(tmp_path_factory.mktemp("retrieval"), tiny_model_folder, tiny_embedder_folder)


@pytest.fixture
def measured(made: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes the tiny embedder the one whose cosines were measured, with this least score."""

    def as_measured(least: float) -> None:
        monkeypatch.setattr(retrieval, "MEASURED_EMBEDDER", settings_of(made).embedder)
        monkeypatch.setattr(retrieval, "LEAST_SCORES", dict.fromkeys(retrieval.LEAST_SCORES, least))

    return as_measured


QUESTION = "What is lit in Velmora at dusk?"


@pytest.mark.parametrize("mode", ["regrad", "both", "rag"])
def test_where_nothing_fits_the_untouched_model_answers_and_the_answer_says_so(
    made: Path, measured: Callable[[float], None], mode: str
) -> None:
    measured(0.999)
    alone = ask(made, QUESTION, "direct")
    found = ask(made, QUESTION, mode)
    assert not found.grounded and found.passages == ()
    assert (found.answer, found.tokens) == (alone.answer, alone.tokens)
    kept = ask(made, QUESTION, mode, min_score=None)
    assert kept.grounded and len(kept.passages) == 3
    measured(-0.999)
    assert ask(made, QUESTION, mode).passages == kept.passages


def test_what_fits_too_little_is_left_out_of_an_answer_that_has_something_better(
    made: Path, measured: Callable[[float], None]
) -> None:
    scores = [used.score for used in ask(made, QUESTION, min_score=None).passages]
    measured((scores[0] + scores[1]) / 2)
    answered = ask(made, QUESTION)
    assert answered.grounded and [used.score for used in answered.passages] == scores[:1]


def test_ask_says_on_stderr_that_nothing_fits(made: Path, measured: Callable[[float], None]) -> None:
    words = ["ask", QUESTION, "--bank", made, "--max-tokens", "2", "--device", "cpu"]
    measured(0.999)
    result = call(*words, "--json")
    assert result.lines[0]["grounded"] is False and result.lines[0]["passages"] == []
    result = call(*words)
    assert result.code == 0 and "nothing in the bank fits" in result.err and "fits" not in result.out
    assert "fits" not in call(*words, "--min-score", "none").err


def test_query_marks_what_ask_would_leave_out_and_a_number_leaves_it_out(
    made: Path, measured: Callable[[float], None]
) -> None:
    words = ["query", QUESTION, "--bank", made, "--json"]
    scores = [line["score"] for line in call(*words).lines]
    assert [line["fits"] for line in call(*words).lines] == [None] * 3, "another embedder: no rule"
    measured((scores[0] + scores[1]) / 2)
    assert [line["fits"] for line in call(*words).lines] == [True, False, False]
    assert [line["fits"] for line in call(*words, "--min-score", "none").lines] == [None] * 3
    assert [line["score"] for line in call(*words, "--min-score", str(scores[1] - 1e-4)).lines] == scores[:2]
    measured(0.999)
    result = call("query", QUESTION, "--bank", made)
    assert "nothing fits" in result.err and len(result.out.splitlines()) == 3
    assert "fits too little" in call("query", QUESTION, "--bank", made, tty=True).out


def test_query_and_ask_search_as_they_are_told(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["query", "the bell rung by Ilse", "--bank", made, "--json"]
    fused, dense, by_words = (call(*words, "--search", way).lines for way in ("fused", "dense", "lexical"))
    assert call(*words).lines == fused
    assert all(line["score"] == line["dense"] and line["lexical"] is None for line in dense)
    assert all(line["score"] == line["lexical"] and line["dense"] is None for line in by_words)
    monkeypatch.setenv("REGRAD_SEARCH", "dense")
    assert call(*words).lines == dense
    assert call(*words, "--search", "fuzzy").code == 2
    answered = call("ask", "the bell?", "--bank", made, "--search", "lexical", "--max-tokens", "1", "--json").lines[0]
    assert "bell" in answered["passages"][0]["text"]


def test_searching_by_words_needs_no_embedder(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from regrad_cli import engine

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("the embedder was looked for")

    monkeypatch.setattr(engine, "resolve_embedder", refuse)
    assert finding.query(made, "the bell rung by Ilse", search="lexical")[0].passage.source.endswith("Brannoch.md")


def test_a_bank_without_text_refuses_words_in_a_sentence(
    tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    from use_cases import make_bank

    made = make_bank(tmp_path / ".gbank", tiny_model_folder, tiny_embedder_folder, keep_text=False)
    ingest(made, write(tmp_path / "docs", {"a.md": "The lamp of the harbour is lit at dusk.\n"}))
    assert call("query", "lamp", "--bank", made, "--json").lines[0]["lexical"] is None
    refused = call("query", "lamp", "--bank", made, "--search", "fused", "--json")
    assert refused.code == 2 and "no text" in json.loads(refused.err)["error"]["message"]


# ── the real embedder ───────────────────────────────────────────────────────────────────────────────────────────────

ROOT = Path(__file__).parents[1]
FOREIGN = [
    "who wrote the opera carmen",
    "what is the capital of mongolia",
    "when did the roman empire fall",
    "how many chromosomes does a human cell have",
    "who was the first woman to fly across the atlantic",
    "what language is spoken in brazil",
    "which planet has the most moons",
    "who painted the ceiling of the sistine chapel",
    "what is the boiling point of mercury",
    "when was the printing press invented",
    "who won the world cup in 1998",
    "what causes a solar eclipse",
    "how many players are there in a cricket team",
    "who is the author of war and peace",
    "what is the currency of thailand",
    "where does chocolate come from",
    "when did the berlin wall come down",
    "what does dna stand for",
    "which organ produces insulin",
    "who discovered penicillin",
]


@pytest.mark.starter
@pytest.mark.slow
def test_the_examples_find_their_passages_and_turn_other_questions_away(
    tmp_path: Path, embedder_folder: Path, starter_folder: Path
) -> None:
    from regrad_cli.documents import read_documents
    from regrad_cli.embed import load_embedder
    from regrad_cli.fingerprints import fingerprint_embedder
    from regrad_cli.learn.tokens import Tokenizer
    from regrad_cli.passages import split

    assert fingerprint_embedder(embedder_folder) == retrieval.MEASURED_EMBEDDER
    embedder, spans = load_embedder(embedder_folder), Tokenizer(starter_folder).spans
    documents = [each for each in read_documents([ROOT / "examples/docs"], base=ROOT) if isinstance(each, Document)]
    passages = [passage for document in documents for passage in split(document, spans)]
    vectors = embedder.encode([passage.embedding_text for passage in passages])
    lexicon = Lexicon()
    terms = [lexicon.terms(passage.embedding_text) for passage in passages]

    def scored(question: str) -> np.ndarray:
        cosines = vectors @ embedder.encode_query(question)
        return retrieval.COSINE_SHARE * cosines + (1 - retrieval.COSINE_SHARE) * coverage(
            lexicon.terms(question), terms
        )

    lines = (ROOT / "examples" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [(each["question"], each["answers"]) for line in lines for each in json.loads(line)["questions"]]
    best = [(scored(question), answers) for question, answers in asked]
    kept = sum(scores.max() >= retrieval.LEAST_SCORES["fused"] for scores, _ in best)
    assert kept >= 0.95 * len(asked)
    found = 0
    for scores, answers in best:
        texts = [" ".join((passages[place].text or "").split()) for place in np.argsort(-scores)[:3]]
        found += any(answer in text for answer in answers for text in texts)
    assert found >= 0.92 * len(asked)
    away = sum(scored(question).max() < retrieval.LEAST_SCORES["fused"] for question in FOREIGN)
    assert away >= 0.9 * len(FOREIGN)
