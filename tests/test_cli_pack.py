"""`bank pack` and `unpack`, and every reading command on a packed bank as on the folder it was made of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import use_cases
from faketerminal import HOSTILE_NAME, HOSTILE_TEXT, OBEYED, Result, call
from story_bank import story_bank
from test_answer import QUESTION
from use_cases import ask, write

from regrad_cli import export
from regrad_cli.answer import AskOptions
from regrad_cli.bank import open_bank, remove_documents
from regrad_cli.records import document_id

ROOT = Path(__file__).parent.parent
ON_CPU = ["--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path) -> Path:
    """Three documents of which one is removed, under a prior that changes answers."""
    bank = story_bank(tmp_path_factory.mktemp("a bank"), tiny_model_folder, tiny_embedder_folder)
    remove_documents(bank, ["docs/Skerry.md"])
    return bank


@pytest.fixture(scope="module")
def packed(live: Path) -> Path:
    out = live.parent / "packed bank.gbank"
    assert call("bank", "pack", out, "--bank", live).code == 0
    return out


def process(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    line = [sys.executable, "-m", "regrad_cli", *map(str, words)]
    return subprocess.run(line, capture_output=True, cwd=ROOT, check=False, **options)


def plain(value: Any) -> Any:
    """A result without what may differ: where the bank is, in which form, beside what else, how long it took."""
    differs = ("path", "form", "beside", "bank", "seconds")
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if key not in differs}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


# ── the same output ──────────────────────────────────────────────────────────────────────────────────────────────────

COMMANDS = [
    ["bank", "stats"],
    ["bank", "stats", "--snapshot", "LATEST"],
    ["bank", "ls"],
    ["bank", "show", "docs/Velmora.md"],
    ["bank", "show", document_id("docs/Velmora.md")[:6] + ":1"],
    ["query", QUESTION, "-k", "3"],
    ["query", QUESTION, "--search", "lexical"],
    ["query", QUESTION, "--snapshot", "LATEST"],
    ["ask", QUESTION, "--mode", "regrad", *ON_CPU],
    ["ask", QUESTION, "--mode", "both", *ON_CPU],
    ["ask", QUESTION, "--mode", "rag", "--sources", *ON_CPU],
    ["ask", QUESTION, "--explain", *ON_CPU],
    ["ask", QUESTION, "--compare", *ON_CPU],
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_reading_commands_give_the_same_live_and_packed(live: Path, packed: Path, words: list[str]) -> None:
    with open_bank(live) as opened:
        words = [word.replace("LATEST", str(opened.number)) for word in words]
    found = []
    for bank in (live, packed):
        result = call(*words, "--bank", bank, "--json")
        assert result.code == 0, result.err
        found.append(([plain(json.loads(line)) for line in result.out.splitlines()], result.err))
    assert found[0] == found[1]
    assert found[0][0]


@pytest.mark.parametrize("words", [["bank", "ls"], ["bank", "show", "docs/Velmora.md"], ["query", QUESTION]])
def test_and_for_people(live: Path, packed: Path, words: list[str]) -> None:
    for tty in (True, False):
        out = {call(*words, "--bank", bank, tty=tty).out for bank in (live, packed)}
        assert len(out) == 1 and out != {""}


def test_the_form_is_told(live: Path, packed: Path) -> None:
    for bank, form in ((live, "live"), (packed, "packed")):
        assert call("bank", "stats", "--bank", bank, "--json").document["form"] == form
        assert f"{bank}  {form}, snapshot" in call("bank", "stats", "--bank", bank).out
        report = call("doctor", "--bank", bank, "--json").document["bank"]
        assert (report["form"], report["documents"]) == (form, 2)


def test_log_of_a_packed_bank_is_its_snapshot(live: Path, packed: Path) -> None:
    (entry,) = call("bank", "log", "--bank", packed, "--json").lines
    assert entry == call("bank", "log", "--bank", live, "--json").lines[0]
    assert entry["operation"] == "rm"


def test_regrad_bank_names_a_packed_bank(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAD_BANK", str(packed))
    assert call("bank", "stats", "--json").document["path"] == str(packed)
    shown = {each["name"]: each for each in call("config", "show", "--json").document["settings"]}
    assert (shown["bank"]["value"], shown["codec"]["origin"]) == (str(packed), "bank")


def test_a_session_of_questions_and_an_exported_adapter(live: Path, packed: Path, tmp_path: Path) -> None:
    asked = []
    for bank in (live, packed):
        result = call("ask", "-", "--json", "--bank", bank, *ON_CPU, stdin=f"{QUESTION}\nWho rings?\n".encode())
        assert result.code == 0
        asked.append(plain(result.lines))
    assert asked[0] == asked[1] and len(asked[0]) == 2
    for number, bank in enumerate((live, packed)):
        list(export.export(bank, QUESTION, tmp_path / str(number), AskOptions(mode="regrad"), device="cpu"))
    assert use_cases.files(tmp_path / "0") == use_cases.files(tmp_path / "1")


def test_eval_takes_its_passages_from_a_packed_bank(live: Path, packed: Path, tmp_path: Path) -> None:
    task = {"title": "Velmora", "passages": ["x"], "questions": [{"question": QUESTION, "answers": ["keeper"]}]}
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps(task) + "\n")
    words = ["eval", tasks, "--retrieval", "bank", "--modes", "regrad,rag", "--max-tokens", "4", "--json", *ON_CPU]
    found = [call(*words, "--bank", bank) for bank in (live, packed)]
    assert [result.code for result in found] == [0, 0], found[0].err
    scores = [[mode["f1"] for mode in result.document["modes"].values()] for result in found]
    assert scores[0] == scores[1] and found[0].document["retrieval"] == found[1].document["retrieval"]


def test_a_damaged_packed_bank_is_14_and_can_be_answered_from(packed: Path, tmp_path: Path) -> None:
    with open_bank(packed) as opened, opened.store.open(opened.manifest.shards[0].docs_name) as region:
        lines = region.read(0, region.length)
    data = bytearray(packed.read_bytes())
    data[bytes(data).index(lines) + lines.index(b"Velmora the lamp") + 3] ^= 1
    file = tmp_path / "x.gbank"
    file.write_bytes(data)
    result = call("bank", "verify", "--bank", file)
    assert result.code == 14 and "docs/" in result.out and "get the file again" in result.err
    assert call("bank", "ls", "--bank", file).code == 14
    result = call("query", QUESTION, "--bank", file)
    assert result.code == 14 and "get the file again" in result.err
    assert call("query", QUESTION, "--bank", file, "--skip-damaged").code == 0
    assert call("bank", "pack", tmp_path / "y.gbank", "--bank", file).code == 14
    assert call("bank", "unpack", file, tmp_path / "u").code == 14
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x.gbank"]
    file.write_bytes(data[:5000])
    for words in (["bank", "stats"], ["bank", "log"], ["ask", QUESTION], ["query", QUESTION]):
        error = call(*words, "--bank", file, "--json").error
        assert (error["code"], error["kind"]) == (14, "damaged") and "x.gbank" in error["message"] and error["hint"]
    assert call("bank", "verify", "--bank", file).code == 14


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar here")
def test_what_is_left_of_a_cut_file_is_put_in_order_as_the_error_says(live: Path, tmp_path: Path) -> None:
    with open_bank(live) as opened:
        older = opened.number - 1
    call("bank", "pack", tmp_path / "x.gbank", "--bank", live, "--snapshot", str(older))
    whole = (tmp_path / "x.gbank").read_bytes()
    (tmp_path / "x.gbank").write_bytes(whole[: len(whole) - 2000])
    error = call("bank", "ls", "--bank", tmp_path / "x.gbank", "--json").error
    assert "tar xf FILE -C FOLDER" in error["hint"] and "regrad bank repair" in error["hint"]
    (tmp_path / "left").mkdir()
    subprocess.run(["tar", "xf", tmp_path / "x.gbank", "-C", tmp_path / "left"], capture_output=True, check=False)
    assert call("bank", "verify", "--bank", tmp_path / "left").code == 14
    assert call("bank", "repair", "--yes", "--bank", tmp_path / "left").code in (0, 3)
    assert call("bank", "verify", "--bank", tmp_path / "left").code == 0


# ── pack ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pack_says_what_it_wrote(live: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gbank"
    result = call("bank", "pack", out, "--bank", live, "--json")
    document = result.document
    assert set(document) == {"path", "bytes", "sha256", "snapshot", "documents", "passages", "dead"}
    assert (document["path"], document["bytes"], document["documents"]) == (str(out), out.stat().st_size, 2)
    assert "3 removed passages; `regrad compact` first" in result.err
    said = call("bank", "pack", out, "--bank", live, "--force", "-q")
    assert f"Packed snapshot {document['snapshot']} (2 documents, 6 passages" in said.out
    assert "3 removed passages" in said.err


def test_pack_asks_before_it_replaces_and_needs_force_elsewhere(live: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gbank"
    out.write_bytes(packed.read_bytes()[:2000])
    words = ["bank", "pack", out, "--bank", live]
    result = call(*words)
    assert (result.code, out.stat().st_size) == (2, 2000) and "--force" in result.err
    result = call(*words, stdin=b"n\n", piped_in=False, tty=True)
    assert (result.code, out.stat().st_size) == (130, 2000)
    assert "Replace" in result.err and "nothing was written" in result.err
    assert call(*words, stdin=b"y\n", piped_in=False, tty=True).code == 0
    assert out.read_bytes() == packed.read_bytes()
    (tmp_path / "thesis.pdf").write_bytes(b"%PDF")
    for target in (tmp_path / "thesis.pdf", tmp_path, tmp_path / "none" / "x.gbank", live / "x.gbank"):
        result = call("bank", "pack", target, "--bank", live, stdin=b"y\n", piped_in=False, tty=True)
        assert result.code == 2 and "Replace" not in result.err
        assert call("bank", "pack", target, "--bank", live, "--force").code == 2
    assert (tmp_path / "thesis.pdf").read_bytes() == b"%PDF"


def test_pack_of_what_is_not_there(live: Path, packed: Path, tmp_path: Path) -> None:
    assert call("bank", "pack", tmp_path / "x.gbank", "--bank", tmp_path / "none").code == 10
    assert call("bank", "pack", tmp_path / "x.gbank", "--bank", live, "--snapshot", "99").code == 2
    result = call("bank", "stats", "--bank", packed, "--snapshot", "1")
    assert result.code == 2 and "a packed bank holds one" in result.err
    (tmp_path / "x.pdf").write_bytes(b"%PDF-1.4")
    for words in (
        ["bank", "stats", "--bank", tmp_path / "x.pdf"],
        ["bank", "unpack", tmp_path / "x.pdf", tmp_path / "u"],
    ):
        result = call(*words)
        assert result.code == 10 and "not a bank" in result.err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x.pdf"]


def test_an_older_snapshot_can_be_packed(live: Path, tmp_path: Path) -> None:
    before = call("bank", "log", "--bank", live, "--json").lines[1]
    call("bank", "pack", tmp_path / "x.gbank", "--bank", live, "--snapshot", str(before["snapshot"]))
    assert call("bank", "stats", "--bank", tmp_path / "x.gbank", "--json").document["documents"] == 3


def test_pack_to_a_pipe_and_unpack_from_one(live: Path, packed: Path, tmp_path: Path) -> None:
    piped = process("bank", "pack", "-", "--bank", live)
    assert piped.returncode == 0 and piped.stdout == packed.read_bytes()
    assert b"packed snapshot" in piped.stderr
    unpacked = process("bank", "unpack", "-", tmp_path / "u", "--json", input=piped.stdout)
    assert unpacked.returncode == 0, unpacked.stderr
    assert json.loads(unpacked.stdout)["path"] == str(tmp_path / "u")
    cut = process("bank", "unpack", "-", tmp_path / "v", input=piped.stdout[:-1])
    assert cut.returncode == 14 and not (tmp_path / "v").exists()
    result = call("bank", "pack", "-", "--bank", live, tty=True)
    assert result.code == 2 and result.out == ""
    assert call("bank", "unpack", "-", tmp_path / "v", piped_in=False).code == 2


def test_pack_to_a_pipe_that_closes_ends_quietly_and_to_a_full_disk_with_an_error(live: Path) -> None:
    code = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.PIPE);"
    code += "p.stdout.read(100); p.stdout.close(); err = p.stderr.read(); sys.exit(p.wait() if not err else 99)"
    words = [sys.executable, "-m", "regrad_cli", "bank", "pack", "-", "-q", "--bank", str(live)]
    with open_bank(live) as opened:
        dead = opened.manifest.counts.dead
    ran = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, check=False)
    assert dead and ran.returncode in (141, 99)  # all of it may have gone into the pipe before that was closed
    with Path("/dev/full").open("wb") as full:
        ran = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    assert ran.returncode == 70 and b"No space left" in ran.stderr and b"Traceback" not in ran.stderr


# ── unpack ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_unpack_says_what_it_made_and_ingest_goes_on_there(
    live: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = write(tmp_path, {"docs/new.md": "# New\n\nHere the gate opens at dawn.\n"})
    result = call("bank", "unpack", packed, tmp_path / ".gbank", "--json")
    document = result.document
    assert set(document) == {"path", "bytes", "snapshot", "documents", "passages"}
    assert (document["documents"], document["path"]) == (2, str(tmp_path / ".gbank"))
    assert (tmp_path / ".gbank" / ".gitignore").read_text() == "*\n"
    monkeypatch.chdir(tmp_path)
    assert call("bank", "verify").code == 0
    assert call("ingest", copied / "docs", *ON_CPU, "-q").code == 0
    assert {line["source"] for line in call("bank", "ls", "--json").lines} == {
        "docs/Brannoch.md", "docs/Velmora.md", "docs/new.md",
    }  # fmt: skip
    with open_bank(live) as opened:
        number = opened.number
    assert number in [line["snapshot"] for line in call("bank", "log", "--json").lines]
    assert call("bank", "unpack", packed, tmp_path / "other").out == (
        f"Unpacked snapshot {number} (2 documents, 6 passages) into {tmp_path / 'other'}\n"
    )


def test_unpack_refuses_a_place_that_is_taken_and_a_file_that_is_not_there(packed: Path, live: Path) -> None:
    for words, code, said in (
        ([packed, live], 2, "there is a bank"),
        ([packed, packed], 2, "is a file"),
        ([packed, ROOT], 2, "holds other things"),
        ([live, "x"], 10, "is a folder"),
        (["none.gbank", "x"], 10, "is not there"),
    ):
        result = call("bank", "unpack", *words)
        assert (result.code, result.out) == (code, "") and said in result.err and "hint" in result.err


# ── nothing is written to a packed bank ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tty", [True, False])
def test_writing_commands_refuse_a_packed_bank_and_say_the_way_out(packed: Path, tmp_path: Path, tty: bool) -> None:
    before = packed.read_bytes(), sorted(packed.parent.iterdir())
    write(tmp_path, {"docs/a.md": "# A\n\nText.\n"})
    for words in (
        ["ingest", tmp_path / "docs"],
        ["ingest", tmp_path / "docs", "--dry-run"],
        ["ingest", "--stale"],
        ["ingest", "--stale", "--dry-run"],
        ["bank", "rm", "docs/Velmora.md"],
        ["bank", "rm", "docs/Velmora.md", "--yes"],
        ["bank", "repair", "--yes"],
        ["compact", "--yes"],
        ["compact", "--dry-run"],
    ):
        result = call(*words, "--bank", packed, "-q", tty=tty, piped_in=not tty, stdin=b"y\n")
        assert result.code == 2, words
        assert "is packed and cannot be written to" in result.err
        assert "regrad bank unpack" in result.err and "Remove" not in result.err
    assert call("init", packed).code == 2
    assert (packed.read_bytes(), sorted(packed.parent.iterdir())) == before


def test_ingest_never_reads_a_packed_bank_whatever_its_name(packed: Path, tmp_path: Path) -> None:
    from regrad_cli.folders import files_of

    write(
        tmp_path, {"docs/a.md": "# A\n\nText.\n", "docs/blocks.txt": "x" * 1024, "docs/FORMAT.tar": b"FORMAT\0" * 512}
    )
    for name in ("x.gbank", "backup.tar", "plain"):
        shutil.copy(packed, tmp_path / "docs" / name)
    found = [path.name for path, reason in files_of(tmp_path / "docs") if not reason]
    assert found == ["FORMAT.tar", "a.md", "blocks.txt"]
    ((_, reason),) = files_of(tmp_path / "docs" / "backup.tar")
    assert "a bank" in reason


# ── a light start, and hostile documents ─────────────────────────────────────────────────────────────────────────────


def test_stats_of_a_packed_bank_imports_no_numpy_and_pack_no_torch(live: Path, packed: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from regrad_cli.cli import main; code = main(sys.argv[2:]);"
        "sys.exit(code or bool(set(sys.argv[1].split()) & set(sys.modules)))"
    )
    heavy = "torch transformers sentence_transformers hnswlib"
    for absent, words in (
        (f"{heavy} numpy tarfile rich", ["bank", "stats", "--bank", packed]),
        (f"{heavy} numpy", ["bank", "log", "--bank", packed]),
        (f"{heavy} numpy", ["bank", "pack", tmp_path / "x.gbank", "--bank", live]),
        (f"{heavy} numpy", ["bank", "unpack", packed, tmp_path / "u"]),
    ):
        ran = subprocess.run([sys.executable, "-c", code, absent, *words], capture_output=True, cwd=ROOT, check=False)
        assert ran.returncode == 0, (words, ran.stderr)


@pytest.mark.parametrize("tty", [True, False])
def test_promise_21_a_hostile_document_in_a_packed_bank(
    tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path, tty: bool
) -> None:
    bank = use_cases.make_bank(tmp_path / ".gbank", tiny_model_folder, tiny_embedder_folder)
    records = [{"title": HOSTILE_TEXT, "text": HOSTILE_TEXT}]
    (tmp_path / "a.jsonl").write_text(json.dumps(records[0]) + "\n")
    use_cases.ingest(bank, tmp_path / "a.jsonl")
    out = tmp_path / os.fsdecode(os.fsencode(HOSTILE_NAME).replace(b"/", b"_"))

    def checked(result: Result) -> None:
        assert result.code == 0, result.err
        assert not any(character in result.out + result.err for character in OBEYED)
        assert "\nerror: forged" not in result.out + result.err

    checked(call("bank", "pack", out, "-q", "--bank", bank, tty=tty, NO_COLOR="1"))
    document = call("bank", "pack", out, "--bank", bank, "--force", "--json", tty=tty).document
    assert document["documents"] == 1
    for words in (["stats"], ["ls"], ["show", document_id("a.jsonl#1")], ["log"], ["verify"]):
        checked(call("bank", *words, "-q", "--bank", out, tty=tty, NO_COLOR="1"))
    result = call("bank", "rm", "a.jsonl#1", "--bank", out, tty=tty, NO_COLOR="1")
    assert result.code == 2 and not any(character in result.err for character in OBEYED)
    checked(call("bank", "unpack", out, tmp_path / "u", "-q", tty=tty, NO_COLOR="1"))


def test_answers_from_a_packed_bank_are_the_same_through_the_use_case(live: Path, packed: Path) -> None:
    first, second = (ask(bank, QUESTION) for bank in (live, packed))
    assert first.passages == second.passages and first.answer == second.answer and first.grounded
