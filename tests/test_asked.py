"""Imagined passages and the questions written to passages: what is kept, and that what is read is read whole."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest
import tiny
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are not installed with the package

from benchmarks.prior import asked, further, imagined  # noqa: E402
from regrad_cli.learn.model import Model, load_model  # noqa: E402
from regrad_cli.learn.prior import seeded_prior  # noqa: E402

PASSAGE = (
    "Aysgarth Falls is a waterfall near Leyburn that was measured by Edith Holloway on 4 March 1904. She found that 35 "
    "pools lie below it, and wrote of a very old mill. In 1962 the mill was sold for 800 pounds to the town of Ripon."
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(tiny.write_model(tmp_path_factory.mktemp("asked") / "model"), device="cpu", dtype="fp32")


def test_a_passage_is_kept_and_talk_loops_and_stumps_are_not() -> None:
    assert imagined.reads_well(PASSAGE)
    assert not imagined.reads_well(PASSAGE + " This Wikipedia article was written by an AI.")
    assert not imagined.reads_well(" ".join(["The mill was sold to the town of Ripon in 1962."] * 6))
    assert not imagined.reads_well("Aysgarth Falls is a waterfall in Yorkshire.")
    assert not imagined.reads_well("")


def test_a_text_ends_with_its_last_whole_sentence() -> None:
    assert imagined.whole_sentences("One. Two! Thr") == "One. Two!"
    assert imagined.whole_sentences(f"{PASSAGE}\n\nMore of it.") == PASSAGE
    assert imagined.whole_sentences("no end") == ""


def test_names_of_articles_that_are_kept_aside_are_not_written_about(model: Model) -> None:
    tasks = [{"title": "Falls", "passages": ["It was seen by Edith Holloway and by Thomas Ripley in June."]}]
    names = set(imagined._names(tasks, {"edith holloway"}, Random(0), 8))
    assert names == {"Falls", "Thomas Ripley"}
    said = [imagined._prompt(model, name, Random(seed)) for seed in range(20) for name in names]
    assert len(set(map(tuple, said))) > 10


def test_sampling_is_the_same_for_the_same_seed(model: Model) -> None:
    prompts = [[3, 4, 5, 6], [7, 8, 9, 10]]
    first, again, other = (imagined.sample(model, prompts, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_spans_stand_once_in_the_passage_and_do_not_overlap() -> None:
    for seed in range(10):
        found = asked.spans(PASSAGE, Random(seed))
        assert 3 <= len(found) <= asked.SPANS
        assert all(PASSAGE.count(span) == 1 for span in found)
        assert not any(a in b for a in found for b in found if a != b)
    assert {"4 March 1904", "1962", "Ripon"} <= {
        span for seed in range(10) for span in asked.spans(PASSAGE, Random(seed))
    }


def test_a_task_turned_round_asks_for_its_question() -> None:
    task = {
        "id": "a",
        "title": "Falls",
        "passages": [PASSAGE],
        "questions": [{"question": "When?", "answers": ["in 1904", "1904"]}],
    }
    (turned,) = asked.turned_round([task], asked.EXAMINED)
    (question,) = turned["questions"]
    assert '"1904"' in question["question"] and question["answers"] == ["When?"]
    assert turned["passages"] == task["passages"] and turned["id"] != task["id"]


def test_a_question_that_gives_its_answer_away_is_not_kept() -> None:
    assert asked._asks("When was the mill sold?", "1962")
    assert not asked._asks("Was the mill sold in 1962?", "1962")
    assert not asked._asks("What does this passage say of the mill?", "1962")
    assert not asked._asks("When?", "1962")


def test_what_is_read_in_parts_by_some_rows_is_as_read_whole(model: Model) -> None:
    rows = [[5, 6, 7, 8, 9], [10, 11]]
    more = [[12, 13], [14], [15, 16, 17]]
    context = asked._Context(model, rows).of([0, 1, 1])
    context.read(more)
    last = context.of([2, 0]).read([[20], [21]])[:, -1]
    with torch.inference_mode():
        for row, ids in zip(last, ([10, 11, 15, 16, 17, 20], [5, 6, 7, 8, 9, 12, 13, 21]), strict=True):
            whole = model.network.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            torch.testing.assert_close(row, whole, rtol=1e-4, atol=1e-5)


def test_only_questions_that_the_reader_believes_are_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [{"id": str(i), "title": f"Falls {i}", "passages": [PASSAGE], "questions": []} for i in range(3)]
    asker = asked.Asker(model, model)
    monkeypatch.setattr(asked, "_asks", lambda *_: True)
    monkeypatch.setattr(asked, "LOSS", 1e9)
    everything = list(asker(tasks))
    assert [task["id"] for task in everything] == ["0-asked", "1-asked", "2-asked"]
    assert all(question["answers"][0] in PASSAGE for task in everything for question in task["questions"])
    assert everything == list(asked.Asker(model, model)(tasks))
    monkeypatch.setattr(asked, "LOSS", 0.0)
    assert list(asker(tasks)) == []


def test_what_was_learned_is_merged_into_the_weights(tmp_path: Path) -> None:
    from regrad_cli.learn.adapt import adapted

    model = load_model(tiny.write_model(tmp_path / "model"), device="cpu", dtype="fp32")
    prior = seeded_prior(model, "f" * 64, rank=4)
    for tensor in prior.tensors.values():
        tensor.add_(torch.randn(tensor.shape) * 0.05)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        plain = model.network(input_ids=ids).logits
        with adapted(model, prior):
            wanted = model.network(input_ids=ids).logits
        found = asked.merged(model, prior).network(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-3)


def test_passages_of_which_little_was_asked_get_gaps_to_fill(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [{"id": str(i), "title": "Falls", "passages": [PASSAGE], "questions": []} for i in range(2)]
    questions = [{"question": f"What is {i}?", "answers": ["1962"]} for i in range(3)]
    monkeypatch.setattr(asked.Asker, "__call__", lambda _, some: [{**some[0], "id": "0-asked", "questions": questions}])
    found = further._with_gaps(tasks, asked.Asker(model, model), Random(0))
    assert [task["id"] for task in found] == ["0", "1"]
    assert found[0]["questions"] == questions
    assert 0 < len(found[1]["questions"]) <= 3
    assert all("____" in question["question"] or "?" in question["question"] for question in found[1]["questions"])
