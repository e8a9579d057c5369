"""The invented worlds and the cloze questions: each can be answered, and no example leaks into them."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are not installed with the package

from benchmarks.prior import cloze, wh  # noqa: E402
from benchmarks.prior.worlds import compose, grammar  # noqa: E402
from benchmarks.prior.worlds.avoid import example_names  # noqa: E402
from benchmarks.prior.worlds.write import EXAMPLES, generate  # noqa: E402

KINDS = compose.read_all_kinds()


@pytest.fixture(scope="module")
def worlds():
    return list(generate(seed=0, count=3000))


def questions_of(tasks):
    return [(task, question) for task in tasks for question in task["questions"]]


def test_no_name_of_the_examples_stands_in_a_full_generation(worlds):
    names = example_names(EXAMPLES)
    for task in worlds:
        assert names.isdisjoint(compose.words_of(task)), task


def test_the_names_of_the_examples_are_found_and_ordinary_words_are_not():
    names = example_names(EXAMPLES)
    for invented in ("quennerby", "ullandine", "petrel", "chough", "limpet", "halyard", "tarrel", "hollin", "skarrow"):
        assert invented in names
    assert names.isdisjoint(("january", "monday", "river", "battery", "bank", "the", "harbour", "winter", "metres"))


def test_a_draft_with_a_name_to_avoid_is_drawn_again():
    kind = KINDS[0]
    first = compose.compose(kind, random.Random(5), set())
    taboo = {max(compose.words_of(first) - compose.words_of(compose.compose(kind, random.Random(6), set())), key=len)}
    second = compose.compose(kind, random.Random(5), taboo)
    assert taboo <= compose.words_of(first) and taboo.isdisjoint(compose.words_of(second))


def test_every_answer_stands_in_its_passage_and_is_short(worlds):
    for task, question in questions_of(worlds):
        assert question["answers"]
        for answer in question["answers"]:
            assert answer in task["passages"][0], (task["id"], question)
            assert 1 <= len(answer.split()) <= 8, question


def test_a_task_has_one_passage_of_a_paragraph_and_three_to_six_different_questions(worlds):
    for task in worlds:
        assert list(task) == ["id", "title", "passages", "questions"]
        assert len(task["passages"]) == 1
        assert 30 <= len(task["passages"][0].split()) <= 165, task["passages"][0]
        asked = [question["question"] for question in task["questions"]]
        assert 3 <= len(asked) <= 6 and len(set(asked)) == len(asked)


def test_a_question_names_what_it_is_about(worlds):
    """Answerable without the passage: some name or code of the passage or title is in the question."""
    for task, question in questions_of(worlds):
        told = f"{task['title']} {task['passages'][0]}"
        names = {word.lower() for word in re.findall(r"\b(?:[A-Z]\w+|\w*\d\w*)", told)}
        assert names & set(re.findall(r"\w+", question["question"].lower())), question


def test_no_mark_of_the_grammar_is_left_over(worlds):
    for task in worlds:
        texts = [task["title"], *task["passages"], *(question["question"] for question in task["questions"])]
        for text in texts:
            assert not re.search(r"[{}\[\]]|\w\|\w|  |\bNone\b", text), text


def test_the_worlds_are_many_and_varied(worlds):
    assert len(KINDS) >= 25 and len({kind.label for kind in KINDS}) == len(KINDS)
    asked = [question["question"] for _, question in questions_of(worlds)]
    assert len(set(asked)) > 0.99 * len(asked)
    assert len({task["title"] for task in worlds}) > 0.99 * len(worlds)
    names = Counter(re.findall(r"\b[A-Z][a-z]{4,}\b", " ".join(task["title"] for task in worlds)))
    assert len(names) > 1500
    search = sum(question.islower() for question in asked) / len(asked)
    assert 0.2 < search < 0.5  # as people type into a search box
    listed = sum("\n" in task["passages"][0] for task in worlds) / len(worlds)
    assert 0.25 < listed < 0.75


def test_the_same_seed_gives_the_same_tasks_however_many_are_asked_for(worlds):
    assert list(generate(seed=0, count=60)) == worlds[:60]
    other = list(generate(seed=1, count=60))
    assert {task["id"] for task in other}.isdisjoint(task["id"] for task in worlds)
    assert {task["title"] for task in other} != {task["title"] for task in worlds[:60]}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.label)
def test_every_sentence_and_question_of_a_kind_can_be_written(kind):
    """Also: each value asked for is told by some sentence, and each fact is worth two sentences or questions."""
    assert kind.name and kind.titles and len(kind.facts) >= 5
    for fact in kind.facts:
        page = grammar.Page(kind, random.Random(kind.label))
        local = {}
        for variable, _, pattern in fact.values:
            local[variable] = page.expand(pattern, local)
        for say in fact.says:
            page.expand(say, local)
        assert fact.says, local
        for variable, ask in fact.asks:
            assert any(f"{{{variable}}}" in say for say in fact.says), ask
            assert page.expand(ask, local)
            assert "{N}" in ask or "{bare}" in ask or any(f"{{{name}}}" in ask for name, _ in kind.lets), ask


def test_a_line_that_is_no_part_of_the_grammar_is_named(tmp_path):
    (tmp_path / "x.txt").write_text("kind tree\nname {place}\nfact\nheight : 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.txt:4"):
        grammar.read_kinds(tmp_path)


@pytest.mark.parametrize(
    ("value", "pattern", "found"),
    [
        ("41 kilograms", "{n:1:99} kilograms", ["41 kilograms", "41"]),
        ("36 million marks", "{n:1:99} million {currency}", ["36 million marks", "36 million"]),
        ("two dictionaries", "[two dictionaries|a pen]", ["two dictionaries"]),
        ("15 September", "{day_month}", ["15 September"]),
        ("51 Holmen Street", "{n:1:99} {surname} Street", ["51 Holmen Street"]),
        ("General Ada Venn", "General {person}", ["General Ada Venn", "Ada Venn", "Venn"]),
        ("the Varsk", "the {place}", ["the Varsk", "Varsk"]),
        ("every 570 hours", "every {n:1:999} hours", ["every 570 hours", "570 hours"]),
        ('"Work sings"', '"Work sings"', ["Work sings"]),
    ],
)
def test_shorter_forms_of_an_answer_count_only_where_they_say_the_same(value, pattern, found):
    assert grammar.aliases(value, pattern) == found


PASSAGE = (
    "The Glass Harbour is a 1974 drama film directed by Ines Varga and produced by Tomas Bell. It was released on "
    "12 March 1974 in cinemas across Portugal. The score was recorded by the Lisbon Radio Orchestra, while Clara Munt "
    'plays Judge Amaro. The working title had been "Salt and Smoke" until the summer. The cast has eleven actors. '
    "Critics in Norway, Denmark, Sweden and Finland praised the film, which was seen by about 90,000 people in 1975."
)
TASK = {
    "id": "film-1",
    "title": "The Glass Harbour (film)",
    "passages": [PASSAGE],
    "questions": [{"question": "who produced the glass harbour", "answers": ["Tomas Bell"]}],
}


def all_made(seeds=40):
    return [
        one for seed in range(seeds) for one in cloze.make(TASK["title"], PASSAGE, {"tomas bell"}, random.Random(seed))
    ]


def test_a_cloze_answer_stands_once_in_the_passage_is_short_and_was_not_asked_before():
    made = all_made()
    assert len({one.answer for one in made}) >= 4
    for one in made:
        assert PASSAGE.count(one.answer) == 1 and len(one.answer.split()) <= 6
        assert "Bell" not in one.answer
        assert one.answer.lower() not in TASK["title"].lower() and one.answer.lower() not in one.question.lower()


def test_a_gap_filled_in_gives_back_the_words_of_the_passage():
    plain = " ".join(re.findall(r"\w+", PASSAGE))
    gaps = [one for one in all_made() if "____" in one.question]
    assert gaps
    for one in gaps:
        quoted = one.question.replace('"', "").replace("____", one.answer)
        start = quoted.index(one.answer)
        before, after = (
            re.findall(r"\w+", quoted[:start])[-3:],
            re.findall(r"\w+", quoted[start:])[: len(one.answer.split()) + 1],
        )
        assert " ".join(before + after[: len(one.answer.split())]) in plain, one


def test_a_cloze_question_names_the_title():
    for one in all_made():
        assert "glass harbour" in one.question.lower(), one


def test_members_of_a_list_make_no_gap():
    assert not {"Norway", "Denmark", "Sweden", "Finland"} & {one.answer for one in all_made()}


@pytest.mark.parametrize(
    ("sentence", "question", "answer"),
    [
        ("The Glass Harbour is a drama film directed by Ines Varga.", "who directed the glass harbour", "Ines Varga"),
        ("The Glass Harbour was founded in Oslo in 1911.", "glass harbour founded in oslo", "1911"),
        ("Edith Harbour was born in Turin.", "where was edith harbour born", "Turin"),
        (
            "The Glass Harbour opened to visitors on 3 May 1960.",
            "when did the glass harbour open to visitors",
            "3 May 1960",
        ),
        ("The Glass Harbour was designed by Olga Brun.", "who was the glass harbour designed by", "Olga Brun"),
        ("The Glass Harbour has nine rooms.", "how many rooms does the glass harbour have", "nine"),
    ],
)
def test_a_plain_question_keeps_the_order_of_the_sentence(sentence, question, answer):
    made = wh.plain("The Glass Harbour", sentence, False, random.Random(0))
    assert [(one.answer, question in one.question.lower()) for one in made] == [(answer, True)]


@pytest.mark.parametrize(
    "sentence",
    [
        "It was founded in 1911.",
        "While Oslo was rebuilt in 1950, nobody came.",
        "They were led by Olga Brun.",
        "His friend Edith Harbour was born in Turin.",
        "The harbour that burned was built in 1911.",
        "The Glass Harbour, a film known for a song written by Olga Brun, was lost.",
    ],
)
def test_a_sentence_whose_subject_is_unclear_makes_no_plain_question(sentence):
    assert wh.plain("The Glass Harbour", sentence, False, random.Random(0)) == []


def test_cloze_writes_each_passage_once_with_only_new_questions_and_the_same_for_a_seed(tmp_path):
    twice = TASK | {"id": "film-2", "questions": [{"question": "in which year", "answers": ["1975"]}]}
    source, out = tmp_path / "tasks.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(task) + "\n" for task in (TASK, twice)), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.prior.cloze", "--out", str(out), str(source)]
    subprocess.run(command, check=True, cwd=ROOT)
    (task,) = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert task["id"] == "film-1-cloze" and task["title"] == TASK["title"] and task["passages"] == [PASSAGE]
    assert 2 <= len(task["questions"]) <= 4
    assert not {"Tomas Bell", "1975"} & {answer for question in task["questions"] for answer in question["answers"]}
    assert list(cloze.generate([TASK, twice], 0)) == [task]


def test_worlds_are_written_as_task_lines_that_regrad_reads(tmp_path):
    tasks = pytest.importorskip("regrad_cli.tasks")
    out = tmp_path / "worlds.jsonl"
    command = [sys.executable, "-m", "benchmarks.prior.worlds", "--tasks", "50", "--out", str(out)]
    subprocess.run(command, check=True, cwd=ROOT)
    read, skipped = tasks.read_tasks([out])
    assert len(read) == 50 and not skipped
