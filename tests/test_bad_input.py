"""What people do wrong and what disks do to them: each has its sentence, its way out and its exit code, and none has a
traceback. The rows of the table are the commands as they are typed; what a bank itself promises is held in bank/.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from faketerminal import call, settings_of_bank
from test_cli_real_bank import DIMENSION, PRIOR, add

from regrad_cli.bank import create_bank, files, layout, open_bank, pack_bank, write_bank
from regrad_cli.errors import Damaged
from regrad_cli.records import canonical_json, sha256_hex

A = "a.md"
READING = [["bank", "stats"], ["bank", "ls"], ["bank", "show", A], ["bank", "log"]]
WRITING = [["bank", "rm", A, "--yes"], ["compact", "--yes"]]
ODD_NAMES = {
    "of 300 characters": "n" * 297 + ".md",
    "of emoji": "notes/\U0001f9ed\U0001f469\u200d\U0001f52c.md",
    "with newlines": "a\nerror: forged\n.md",
    "with ..": "../../../etc/passwd",
    "with a NUL": "a\0b.md",
    "that is a flag": "--yes",
    "of nothing but spaces": "   ",
    "that ends like a passage": "a.md:0",
}


@pytest.fixture
def bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two documents in two shards, at snapshot 3."""
    monkeypatch.setattr(files.System, "fsync", staticmethod(os.fstat))
    return made(tmp_path / "x" / ".gbank")


def made(path: Path, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    create_bank(path, settings_of_bank(prior=sha256_hex(PRIOR), embedding_dim=DIMENSION, **changes), PRIOR)
    add(path, A, "Alpha", "The first.", "The second.")
    add(path, "notes/b.md", "Beta", "The third.")
    return path


def newest(bank: Path) -> Path:
    return bank / layout.snapshot_name(layout.snapshot_numbers(bank)[-1])


def rewrite(bank: Path, **changes: Any) -> None:
    """The newest manifest says something else, and its checksum is right."""
    body = {key: value for key, value in json.loads(newest(bank).read_bytes()).items() if key != "sha256"} | changes
    data = (canonical_json(body | {"sha256": sha256_hex(canonical_json(body))}) + "\n").encode()
    for file in (newest(bank), newest(bank).with_suffix(".copy")):
        file.write_bytes(data)


def cut(file: Path, share: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def shard_of(bank: Path) -> Path:
    with open_bank(bank) as opened:
        return bank / opened.manifest.shards[0].name


def text_of(bank: Path) -> Path:
    with open_bank(bank) as opened:
        return bank / opened.manifest.shards[0].docs_name


def only(bank: Path, *kept: str) -> None:
    """What a copy that was broken off may have left."""
    for path in list(bank.iterdir()):
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class Case(NamedTuple):
    """What was done to a bank, and what commands say then.

    commands   names of COMMANDS
    says       part of the sentence; hint likewise of the way out
    """

    what: str
    do: Callable[[Path], object]
    commands: str
    code: int
    kind: str
    says: str
    hint: str


COMMANDS: dict[str, list[str]] = {
    "ls": ["bank", "ls"],
    "stats": ["bank", "stats"],
    "show": ["bank", "show", A],
    "rm": ["bank", "rm", A, "--yes"],
    "compact": ["compact", "--yes"],
    "compact-asked": ["compact", "--quiet"],
    "compact-dry": ["compact", "--dry-run"],
    "ingest-dry": ["ingest", ".", "--dry-run"],
    "move-dry": ["ingest", "--stale", "--dry-run"],
    "repair": ["bank", "repair"],
    "verify": ["bank", "verify"],
    "pack": ["bank", "pack", "OUT"],
    "pack-nowhere": ["bank", "pack", "/nowhere/at/all/x.gbank"],
    "unpack-nothing": ["bank", "unpack", "nothing", "OUT"],
    "rm-long": ["bank", "rm", "x" * 300, "--yes"],
    "show-above": ["bank", "show", "../../x"],
    "ls-99": ["bank", "ls", "--snapshot", "99"],
    "diff-99": ["diff", "@99"],
}
REPAIR, NEWER = "regrad bank repair", "install a newer regrad"
# fmt: off
TABLE = [Case(*row) for row in (
    ("a damaged manifest", lambda b: flip(newest(b)), "ls rm stats compact", 14, "damaged", "its own checksum", REPAIR),
    ("a damaged shard", lambda b: flip(shard_of(b)), "pack", 14, "damaged", "shards/", REPAIR),
    ("damaged text", lambda b: flip(text_of(b)), "ls show", 14, "damaged", "is damaged", REPAIR),
    ("a damaged FORMAT", lambda b: (b / "FORMAT").write_bytes(b"gbonk"), "ls rm", 14, "damaged", "FORMAT", REPAIR),
    ("a missing shard", lambda b: shard_of(b).unlink(), "ls rm compact", 14, "damaged", "is missing", REPAIR),
    ("text that was cut", lambda b: cut(text_of(b), 0.5), "ls", 14, "damaged", "bytes, not", REPAIR),
    ("half copied: no shards", lambda b: shutil.rmtree(b / "shards"), "ls rm", 14, "damaged", "is missing", REPAIR),
    ("half copied: no snapshots", lambda b: shutil.rmtree(b / "snapshots"), "ls rm stats", 14, "damaged",
        "holds no snapshot", REPAIR),
    ("half copied: FORMAT only", lambda b: only(b, "FORMAT"), "ls rm repair", 10, "no_bank", "was never finished",
        "regrad init"),
    ("half copied: nothing", lambda b: only(b), "ls rm verify", 10, "no_bank", "there is no bank", "regrad init"),
    ("a newer FORMAT", lambda b: (b / "FORMAT").write_bytes(b"gbank 2\n"), "ls rm compact", 14, "unknown_format",
        "format 2", NEWER),
    ("a newer bank", lambda b: (rewrite(b, format=2), (b / "FORMAT").write_bytes(b"gbank 2\n")), "ls verify repair",
        14, "unknown_format", "format 2", NEWER),
    ("a newer manifest", lambda b: rewrite(b, format=2), "ls rm verify repair", 14, "unknown_format",
        "format 2", NEWER),
    ("a feature for readers", lambda b: rewrite(b, reader_flags=["folded"]), "ls rm verify repair", 14,
        "unknown_format", "folded", NEWER),
    ("a feature for writers", lambda b: rewrite(b, writer_flags=["counted"]),
        "rm compact compact-asked compact-dry ingest-dry move-dry", 14, "unknown_format", "counted", NEWER),
    ("a lost newest manifest", lambda b: newest(b).unlink(), "rm compact compact-asked compact-dry ingest-dry", 14,
        "damaged", "is missing, and its copy is there", REPAIR),
    ("a folder that is a link", lambda b: _link_shards(b), "rm compact repair", 14, "damaged", "shards: is a link",
        "the bank's folder itself may be a link"),
    ("a lock that is a link", lambda b: _link_lock(b), "rm compact repair", 14, "damaged", "lock", "take it away"),
    ("a sound bank", lambda b: None, "rm-long show-above", 2, "usage", "there is no document", "regrad bank ls"),
    ("a sound bank", lambda b: None, "ls-99 diff-99", 2, "usage", "no snapshot 99", "regrad bank log"),
    ("a sound bank", lambda b: None, "pack-nowhere", 2, "usage", "there is no folder", "make it first"),
    ("a sound bank", lambda b: None, "unpack-nothing", 10, "no_bank", "is not there", "regrad bank pack"),
)]
# fmt: on
CASES = [(case, name) for case in TABLE for name in case.commands.split()]


def _link_shards(bank: Path) -> None:
    shutil.move(bank / "shards", bank.parent / "elsewhere")
    (bank / "shards").symlink_to(bank.parent / "elsewhere")


def _link_lock(bank: Path) -> None:
    (bank / "lock").unlink(missing_ok=True)
    (bank.parent / "precious").write_bytes(b"precious")
    (bank / "lock").symlink_to(bank.parent / "precious")


def told(words: list[str | Path], code: int, kind: str, says: str = "", hint: str = "") -> None:
    """The command ends so, in words and in JSON, and changes nothing on the way."""
    shown = call(*words)
    assert shown.code == code, shown
    assert "Traceback" not in shown.err and shown.err.startswith("error: "), shown.err
    assert says in shown.err and hint in shown.err, shown.err
    assert len(shown.err.splitlines()) <= 2, shown.err
    found = call(*words, "--json")
    assert found.code == code and found.out == ""
    assert (found.error["code"], found.error["kind"]) == (code, kind), found.error
    assert says in found.error["message"] and hint in found.error["hint"] and found.error["hint"], found.error


def everything(folder: Path) -> dict[str, Any]:
    return {
        str(path): (path.lstat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not (path.name == "lock" or path.is_dir())  # a writer makes folders that are missing
    }


@pytest.mark.parametrize(("case", "name"), CASES, ids=[f"{case.what}: {name}" for case, name in CASES])
def test_each_has_its_sentence_and_its_exit_code(bank: Path, tmp_path: Path, case: Case, name: str) -> None:
    case.do(bank)
    before = everything(tmp_path)
    words: list[str | Path] = [tmp_path / word if word == "OUT" else word for word in COMMANDS[name]]
    told([*words, *(["--bank", bank] if words[1] != "unpack" else [])], case.code, case.kind, case.says, case.hint)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("words", [["bank", "verify"], ["bank", "ls"]])
@pytest.mark.parametrize("damaged", [text_of, newest])
def test_no_repair_is_named_that_would_refuse_a_newer_versions_bank(
    bank: Path, words: list[str], damaged: Callable[[Path], Path]
) -> None:
    rewrite(bank, writer_flags=["counted"])
    assert call(*words, "--bank", bank).code == 0
    flip(damaged(bank))
    error = call(*words, "--bank", bank, "--json").error
    assert (error["code"], error["kind"]) == (14, "damaged")
    assert error["hint"].startswith("this version cannot write to the bank: it uses counted; install a newer regrad")
    assert "puts right" not in error["hint"]


# ── disks and other processes ───────────────────────────────────────────────────────────────────────────────────────


def test_a_full_disk_is_70_and_the_bank_is_as_it_was(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = everything(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files.System, "write", staticmethod(full))
        for words in (*WRITING, ["bank", "pack", tmp_path / "x.gbank"]):
            told([*words, "--bank", bank], 70, "storage_failed", "No space left on device", "free some space")
    assert everything(tmp_path) == before
    assert call("bank", "rm", A, "--yes", "--bank", bank).code == 0


@pytest.mark.parametrize(
    ("code", "hint"),
    [(errno.EROFS, "mounted read-only"), (errno.EACCES, "check who owns"), (errno.EPERM, "check who owns")],
)
def test_a_bank_that_may_only_be_read_is_read_and_refuses_to_be_written_with_70(
    bank: Path, monkeypatch: pytest.MonkeyPatch, code: int, hint: str
) -> None:
    """Root may write where a mode forbids it, so the system's answer is put there."""
    real = os.open

    def read_only(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(bank)):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *more, **named)

    before = everything(bank)
    monkeypatch.setattr(os, "open", read_only)
    for words in WRITING:
        told([*words, "--bank", bank], 70, "storage_failed", os.strerror(code), hint)
    for words in READING:
        assert call(*words, "--bank", bank).code == 0, words
    assert everything(bank) == before


def test_a_file_system_without_hard_links_is_no_obstacle(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(files.System, "link", staticmethod(none))
    for words in (*WRITING[:1], ["bank", "repair"], ["compact", "--yes"], ["bank", "pack", bank.parent / "x.gbank"]):
        assert call(*words, "--bank", bank).code == 0, words
    assert call("bank", "ls", "--bank", bank).out.split("\t")[1] == "notes/b.md"


def test_a_file_system_without_locks_is_70_to_writers_and_none_to_readers(
    bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(files.fcntl, "flock", none)
    for words in WRITING:
        told([*words, "--bank", bank], 70, "storage_failed", "has no locks", "a file system that has them")
    for words in READING:
        assert call(*words, "--bank", bank).code == 0, words


def test_a_second_writer_is_11_and_told_who_is_first_and_readers_are_not_kept_out(bank: Path) -> None:
    with write_bank(bank):
        for words in (*WRITING, ["bank", "repair"]):
            told([*words, "--bank", bank], 11, "locked", f"pid {os.getpid()}", "--wait")
        for words in READING:
            assert call(*words, "--bank", bank).code == 0, words
    assert call("bank", "rm", A, "--yes", "--bank", bank).code == 0


def test_a_bank_of_another_machine_is_read_and_written_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its search graph is not this machine's, so it is left alone until an ingest builds another."""
    monkeypatch.setenv("REGRAD_STATE", str(tmp_path / "their state"))
    monkeypatch.setenv("REGRAD_INDEX_FROM", "1")
    theirs = made(tmp_path / "theirs" / ".gbank")
    with open_bank(theirs) as opened:
        assert opened.manifest.index is not None
    monkeypatch.setenv("REGRAD_STATE", str(tmp_path / "my state"))
    ours = Path(shutil.copytree(theirs, tmp_path / "ours" / ".gbank"))
    for words in (*READING, ["bank", "verify"], *WRITING, ["bank", "verify"]):
        assert call(*words, "--bank", ours).code == 0, words


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_a_document_of_an_odd_name_is_listed_shown_packed_and_removed_like_any_other(
    bank: Path, tmp_path: Path, name: str
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    add(bank, name, "", "A text.")
    listed = call("bank", "ls", "--bank", bank)
    assert listed.code == 0 and len(listed.out.splitlines()) == 3
    shown = [entry for entry in call("bank", "ls", "--json", "--bank", bank).lines if entry["source"] == name]
    assert len(shown) == 1
    for words in (["bank", "show", "--", name], ["bank", "pack", tmp_path / "x.gbank"], ["bank", "verify"]):
        assert call(*words[:2], "--bank", bank, *words[2:]).code == 0, words
    assert call("bank", "unpack", tmp_path / "x.gbank", tmp_path / "again").code == 0
    for where in (bank, tmp_path / "again"):
        assert call("bank", "rm", "--yes", "--bank", where, "--", name).code == 0
        assert len(call("bank", "ls", "--bank", where).out.splitlines()) == 2
    assert {path.name for path in tmp_path.iterdir()} == before | {"x.gbank", "again"}


@pytest.mark.parametrize("name", ["n" * 300, "a\nb", "a\0b", "\U0001f9ed", "..", "/dev/null", "/dev/zero", "~~/x", ""])
@pytest.mark.parametrize(
    "words", [["bank", "ls"], ["bank", "rm", A, "--yes"], ["compact", "--yes"], ["bank", "repair"]]
)
def test_a_place_that_is_no_bank_is_2_or_10_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = call(*words, "--bank", name)
    assert shown.code in (2, 10) and "Traceback" not in shown.err, shown
    assert "hint: " in shown.err and len(shown.err.splitlines()) <= 2, shown.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["init", ""],
        ["init", "new", "--prior", ""],
        ["ingest", ""],
        ["ingest", "a.md", ""],
        ["diff", ""],
        ["diff", ".", ""],
        ["bank", "unpack", "x.gbank", ""],
    ],
)
def test_an_empty_argument_is_usage_and_not_this_folder(
    bank: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(bank)  # which `diff .` takes
    before = everything(bank)
    told(words, 2, "usage", "empty")
    assert everything(bank) == before


@pytest.mark.parametrize("name", ["n" * 300, "n" * 300 + "/x", "/dev/null", "/proc/x", "~~/x"])
def test_a_place_that_cannot_be_written_is_told_and_nothing_is_left(bank: Path, tmp_path: Path, name: str) -> None:
    pack_bank(bank, tmp_path / "x.gbank")
    before = everything(tmp_path)
    place = name if name.startswith(("/", "~")) else str(tmp_path / name)
    for words in (["bank", "pack", place, "--bank", bank], ["bank", "unpack", tmp_path / "x.gbank", place]):
        shown = call(*words)
        assert shown.code in (2, 70) and "Traceback" not in shown.err and "please report" not in shown.err, shown
        assert len(shown.err.splitlines()) <= 2, shown.err
        assert everything(tmp_path) == before


# ── packed banks, and banks that do not go together ─────────────────────────────────────────────────────────────────


def test_a_packed_bank_cut_anywhere_is_14_or_10_and_unpacks_to_nothing(bank: Path, tmp_path: Path) -> None:
    pack_bank(bank, tmp_path / "x.gbank")
    data, file = (tmp_path / "x.gbank").read_bytes(), tmp_path / "cut.gbank"
    places = {0, 1, 5, 511, 512, 513, 1024, 1535, 1536, 1537, len(data) - 1, len(data) - 513, len(data) - 1024}
    for length in sorted(places | set(range(0, len(data), 1009))):
        file.write_bytes(data[:length])
        for words in (["bank", "ls"], ["bank", "stats"]):
            shown = call(*words, "--bank", file)
            assert shown.code == (14 if length else 10) or (length < 1536 and shown.code in (10, 14)), (length, shown)
            assert shown.out == "" and "Traceback" not in shown.err and "hint: " in shown.err
        shown = call("bank", "unpack", file, tmp_path / "out")
        assert shown.code in (10, 14) and "Traceback" not in shown.err and not (tmp_path / "out").exists()
    told(["bank", "ls", "--bank", file], 14, "damaged", "bytes, not", "get the file again")


@pytest.mark.parametrize("words", [["pack", ""], ["unpack", "", "OUT"], ["unpack", "x.gbank", ""]], ids=" ".join)
def test_an_empty_path_of_a_packed_bank_is_refused(tmp_path: Path, words: list[str]) -> None:
    told(["bank", *(tmp_path / "out" if word == "OUT" else word for word in words)], 2, "usage", "a path is empty")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["n" * 300, "~~", "no\nfile", "."])
def test_what_is_to_be_unpacked_and_is_not_there_is_told(tmp_path: Path, name: str) -> None:
    shown = call("bank", "unpack", name, tmp_path / "out")
    assert shown.code in (10, 70) and "hint: " in shown.err and "please report" not in shown.err, shown


def test_a_bank_that_init_made_in_the_folder_itself_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`init .` makes the folder a bank, as its help says; who then asks for one is told."""
    made(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    told(["bank", "ls"], 10, "no_bank", "there is no .gbank in", "it is a bank itself: --bank .")
    assert call("bank", "ls", "--bank", ".").code == 0


def test_a_folder_with_other_things_is_no_place_for_a_bank_and_the_hint_names_one(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    words = (["bank", "ls"], ["bank", "repair"], ["diff", "@-1"])
    hints = {call(*each, "--bank", tmp_path, "--json").error["hint"] for each in words}
    hints.add(call("diff", tmp_path, tmp_path, "--json").error["hint"])
    assert hints == {f"`regrad init {tmp_path / '.gbank'}` makes one"}
    made(tmp_path / ".gbank")
    assert call("bank", "ls", "--bank", tmp_path / ".gbank").code == 0


@pytest.mark.parametrize("left", [(), ("tmp",), ("tmp", "mine")])
def test_what_a_killed_init_leaves_is_finished_in_its_place(tmp_path: Path, left: tuple[str, ...]) -> None:
    bank = tmp_path / "bank"
    bank.mkdir()
    if left:
        (bank / "lock").touch()
    for name in left:
        (bank / name).mkdir()
    place = bank / ".gbank" if "mine" in left else bank
    assert call("bank", "ls", "--bank", bank, "--json").error["hint"] == f"`regrad init {place}` makes one"


def test_banks_of_different_models_differ_in_their_settings_and_have_no_cosine(bank: Path, tmp_path: Path) -> None:
    other = made(tmp_path / "y" / ".gbank", model="9" * 64, model_name="another", tokenizer="8" * 64)
    shown = call("diff", bank, other)
    assert shown.code == 0 and "another" in shown.out and "starter" in shown.out and "Traceback" not in shown.err
    assert call("diff", bank, other, "--exit-code").code == 1
    found = call("diff", bank, other, "--json").document
    assert {"model", "tokenizer"} <= found["settings"].keys()
    for words in (["diff", bank, tmp_path / "nothing"], ["diff", tmp_path / "nothing", bank]):
        told(words, 10, "no_bank", "there is no bank", "regrad init")


def test_promise_16_a_bank_whose_settings_are_of_no_codec_is_14_before_memory_is_taken() -> None:
    """Rows of a few bytes that say to be gradients of a terabyte."""
    from regrad_cli.learn.rows import layout_of

    small = settings_of_bank()
    for changes in (
        {"tensors": (("x", 1 << 20, 1 << 20),)},
        {"tensors": (("x", 8, 8),), "code_bytes": 1 << 31},
        {"codec": replace(small.codec, kind="evil")},
        {"codec": replace(small.codec, group=0)},
    ):
        made_for = type(small).from_json(replace(small, **changes).to_json())
        with pytest.raises(Damaged, match="do not agree"):
            layout_of(made_for)
