"""`bank stats, ls, show, rm, log, verify`: tables and JSON, asking before removal, and hostile documents."""

from __future__ import annotations

import re

import pytest
from faketerminal import BESIDE, HOSTILE_NAME, HOSTILE_TEXT, LOG_ENTRY, OBEYED, Fakes, FakeSnapshot, call, passage

from regrad_cli.bank.damage import Finding
from regrad_cli.records import document_id

STATS = {"path", "form", "snapshot", "documents", "passages", "stale", "dead", "bytes", "bytes_per_passage", "model"}
STATS |= {"prior", "codec", "embedder"}
A, B = document_id("a.md"), document_id("b.md")


@pytest.fixture
def fakes(monkeypatch):
    return Fakes().install(monkeypatch)


def test_stats_as_a_picture(fakes):
    out = call("bank", "stats", tty=True, NO_COLOR="1").out
    assert out.splitlines() == [
        "/b/.gbank  live, snapshot 4",
        "2 documents, 3 passages, 1.0 kB, 500 B a passage",
        "",
        "  " + 56 * "█" + 6 * "▓" + 2 * "▒",
        "  █ gradients   900 B   90 %",
        "  ▓ embeddings   90 B    9 %",
        "  ▒ text         10 B    1 %",
        "",
        "  " + 38 * "█" + 26 * "▓",
        "  █ live     3   60 %",
        "  ▓ removed  2   40 %",
        "",
        "2 removed passages still on disk; `regrad compact` drops them",
        "beside it on disk: 3 other snapshots with 250 B of their own",
        "",
        "  model     starter",
        "  prior     seeded",
        "  codec     r1-int4",
        "  embedder  minilm",
    ]
    coloured = call("bank", "stats", tty=True).out
    assert "\x1b[36m█" in coloured
    assert re.sub("\x1b\\[[0-9;]*m", "", coloured) == out


def test_the_picture_fits_a_narrow_terminal(fakes):
    out = call("bank", "stats", tty=True, COLUMNS="40", NO_COLOR="1").out
    assert "2 documents, 3 passages, 1.0 kB,\n500 B a passage\n" in out
    assert max(map(len, out.splitlines())) <= 40
    narrow = call("bank", "stats", tty=True, COLUMNS="20", NO_COLOR="1")
    assert narrow.code == 0
    assert "█" in narrow.out


def test_stats_in_a_pipe_are_lines_without_colours(fakes):
    assert call("bank", "stats").out.splitlines() == [
        "/b/.gbank  live, snapshot 4",
        "2 documents, 3 passages, 1.0 kB, 500 B a passage",
        "2 removed passages still on disk",
        "  gradients   900 B  " + 40 * "█",
        "  embeddings   90 B  " + 4 * "█",
        "  text         10 B  █",
        "  index         0 B",
        "  model     starter",
        "  prior     seeded",
        "  codec     r1-int4",
        "  embedder  minilm",
    ]


def test_the_picture_of_a_bank_that_moves_shows_how_far_it_is(fakes):
    stats = fakes.snapshot.stats()
    stats |= {"move": {"prior": "learned", "passages": 1}, "stale": 3, "dead": 0}
    stats["bytes"] |= {"moved": 300}
    fakes.snapshot.stats = lambda: stats
    out = call("bank", "stats", tty=True, NO_COLOR="1").out
    assert "  █ recomputed  1   33 %\n  ▓ stale       2   67 %\n" in out
    assert "▓ moved       300 B" in out
    assert "on the way to prior learned: 1 of 3 passages computed; `regrad ingest --stale` goes on" in out


def test_what_removed_passages_take_is_counted_once(fakes):
    stats = fakes.snapshot.stats() | {"removed_bytes": {"gradients": 400, "embeddings": 40, "text": 10, "total": 450}}
    fakes.snapshot.stats = lambda: stats
    out = call("bank", "stats", tty=True, NO_COLOR="1").out
    assert re.findall(r"[█▓▒░] (\w+) +(\d+) B", out) == [("gradients", "500"), ("embeddings", "50"), ("removed", "450")]


def test_stats_json_has_the_names_that_others_rely_on(fakes):
    document = call("bank", "stats", "--json").document
    assert set(document) >= STATS
    assert set(document["bytes"]) == {"gradients", "embeddings", "text", "index", "total"}
    assert document["beside"] == BESIDE


def test_ls_is_a_line_a_document(fakes):
    assert call("bank", "ls").out == f"{A}\ta.md\tTitle\t2\t7\n{B}\tb.md\tSecond\t1\t7\n"
    first, _ = call("bank", "ls", "--json").lines
    assert first == {"id": A, "source": "a.md", "title": "Title", "passages": 2, "tokens": 7}
    assert "passages" in call("bank", "ls", tty=True).out


def test_ls_of_many_documents_is_drawn_piece_by_piece(fakes):
    fakes.snapshot = FakeSnapshot([passage(f"{number}.md") for number in range(1200)])
    out = call("bank", "ls", tty=True, NO_COLOR="1").out
    assert all(f" {number}.md " in out for number in (0, 499, 500, 1199))


def test_show_a_document_by_id_prefix_or_source(fakes):
    for wanted in (A, A[:6], "a.md"):
        out = call("bank", "show", wanted).out
        assert "Some text." in out
        assert "More." in out
    document = call("bank", "show", "a.md", "--json").document
    assert [each["ordinal"] for each in document["passages"]] == [0, 1]
    assert (document["id"], document["tokens"]) == (A, 14)


def test_show_one_passage(fakes):
    assert "More." in call("bank", "show", f"{A}:1").out
    assert "Some text." not in call("bank", "show", f"{A}:1").out
    shown = call("bank", "show", f"{A}:1", "--json").document
    assert (shown["id"], shown["text"], len(shown["key"])) == (f"{A}:1", "More.", 64)
    result = call("bank", "show", f"{A}:7")
    assert result.code == 2
    assert "0 to 1" in result.err


def test_a_source_that_ends_like_a_passage_is_found(fakes):
    fakes.snapshot = FakeSnapshot([passage("feed:12", text="The twelfth.")])
    assert "The twelfth." in call("bank", "show", "feed:12").out


def test_an_unknown_document_is_named(fakes):
    result = call("bank", "show", "zzz")
    assert result.code == 2
    assert "zzz" in result.err


def test_rm_needs_yes_where_nobody_can_be_asked(fakes):
    result = call("bank", "rm", "a.md")
    assert result.code == 2
    assert "--yes" in result.err
    assert fakes.removed == []
    assert call("bank", "rm", "a.md", B, "a.md", "--yes").out == "removed a.md (2 passages)\nremoved b.md (1 passage)\n"
    assert fakes.removed == [A, B]


def test_rm_asks_on_a_terminal_and_takes_no_for_an_answer(fakes):
    result = call("bank", "rm", "a.md", stdin=b"n\n", piped_in=False, tty=True)
    assert result.code == 130
    assert fakes.removed == []
    assert "Remove 1 document (a.md; 2 passages)?" in result.err
    assert call("bank", "rm", "a.md", stdin=b"y\n", piped_in=False, tty=True).code == 0
    assert fakes.removed == [A]


def test_rm_json_tells_what_went(fakes):
    document = call("bank", "rm", "b.md", "--yes", "--json").document
    assert document["removed"] == [{"id": B, "source": "b.md", "title": "Second", "passages": 1}]
    assert document["snapshot"] == 5


def test_rm_of_an_unknown_document_removes_nothing(fakes):
    assert call("bank", "rm", "a.md", "zzz", "--yes").code == 2
    assert fakes.removed == []


def test_log(fakes):
    assert call("bank", "log").out == "4\t2026-01-02T03:04:05Z\tingest\t2\t3\t0\t12345\t\n"
    assert call("bank", "log", "--json").lines == [LOG_ENTRY]
    assert "12.3 kB" in call("bank", "log", tty=True).out


def test_verify_of_a_sound_bank_is_0(fakes):
    assert call("bank", "verify").code == 0
    document = call("bank", "verify", "--json").document
    assert set(document.pop("checked")) == {
        "percent", "seed", "snapshots", "rows", "rows_total", "blocks", "blocks_total"
    }  # fmt: skip
    assert document == {"path": "/b/.gbank", "ok": True, "findings": []}


def test_verify_of_a_damaged_bank_names_each_finding_and_is_14(fakes):
    fakes.findings = [Finding("shards/x.safetensors", "row 3 is damaged", (A,)), Finding("docs/y.jsonl", "is missing")]
    result = call("bank", "verify")
    assert result.code == 14
    assert result.out.splitlines() == [
        f"shards/x.safetensors: row 3 is damaged  (document {A})",
        "docs/y.jsonl: is missing",
    ]
    assert "2 findings, of 1 document" in result.err
    result = call("bank", "verify", "--json")
    assert (result.code, result.document["ok"], result.error["kind"]) == (14, False, "damaged")


def test_leftovers_of_a_crash_are_told_and_no_damage(fakes):
    fakes.findings = [Finding("tmp/z", "left by a crash", note=True)]
    result = call("bank", "verify")
    assert result.code == 0
    assert "harmless" in result.out


def test_a_closed_pipe_ends_quietly(fakes, monkeypatch):
    def gone(self, text):
        raise BrokenPipeError

    monkeypatch.setattr("faketerminal.Out.write", gone)
    result = call("bank", "ls")
    assert (result.code, result.out, result.err) == (141, "", "")


@pytest.mark.parametrize("tty", [True, False])
@pytest.mark.parametrize(
    "words", [["ls"], ["show", "ID"], ["show", "ID:0"], ["rm", "ID", "--yes"], ["verify"], ["log"]]
)
def test_promise_21_documents_cannot_forge_output(fakes, monkeypatch, words, tty):
    hostile = passage(HOSTILE_NAME, HOSTILE_TEXT, HOSTILE_TEXT)
    fakes.snapshot = FakeSnapshot([hostile])
    fakes.findings = [Finding("tmp/z", HOSTILE_TEXT, (HOSTILE_NAME,), note=True)]
    monkeypatch.setattr("regrad_cli.bank.log", lambda path: [{**LOG_ENTRY, "operation": HOSTILE_TEXT}])
    words = [word.replace("ID", hostile.document) for word in words]
    result = call("bank", *words, tty=tty, NO_COLOR="1")
    assert result.code == 0
    assert not any(character in result.out + result.err for character in OBEYED)
    assert "\nerror: forged" not in result.out
    result = call("bank", *words, "--json", tty=tty)
    assert result.code == 0
    assert not any(character in result.out for character in OBEYED)
    _ = result.lines if words[0] in ("ls", "log") else result.document


def test_promise_21_the_question_before_removal_cannot_be_forged(fakes):
    hostile = passage(HOSTILE_NAME, HOSTILE_TEXT, HOSTILE_TEXT)
    fakes.snapshot = FakeSnapshot([hostile])
    result = call("bank", "rm", hostile.document, stdin=b"n\n", piped_in=False, tty=True, NO_COLOR="1")
    assert not any(character in result.err for character in OBEYED)
    assert "\nerror: forged" not in result.err
