"""`regrad diff`: what its arguments mean, what it says and what it leaves unloaded; gradients decoded as they are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faketerminal import HOSTILE_NAME, HOSTILE_TEXT, OBEYED, call, settings_of_bank
from story_bank import story_bank
from use_cases import ingest, story, write

from regrad_cli.bank import create_bank, diff, open_bank, pack_bank, remove_documents, write_bank
from regrad_cli.comparing import Likeness, Version, versions
from regrad_cli.errors import NoBank, UsageProblem
from regrad_cli.learn.codec import Codec
from regrad_cli.records import BankSettings, CodecSettings, Passage, TensorShape, document_id, row_key, sha256_hex

PRIOR = b"a prior, as far as the bank can tell"
SHAPES = (TensorShape("up", 12, 40), TensorShape("down", 30, 6))


def made_for(**changes: object) -> BankSettings:
    codec = Codec(changes.pop("codec", CodecSettings(bits=8)), SHAPES)  # type: ignore[arg-type]
    layout = {"codec": codec.settings, "code_bytes": codec.code_bytes, "scale_count": codec.scale_count}
    fixed = {"prior": sha256_hex(PRIOR), "embedding_dim": 8, "tensors": SHAPES}
    return settings_of_bank(**(fixed | layout | changes))


def gradients(*texts: str) -> dict[str, torch.Tensor]:
    """Of rank one, so that a codec of rank one keeps them, each a function of its text."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name, _, _ in SHAPES}
    for text in texts:
        made = torch.Generator().manual_seed(int(sha256_hex(text.encode("utf-8", "replace"))[:8], 16))
        for name, height, width in SHAPES:
            rows[name].append(torch.randn(height, 1, generator=made) @ torch.randn(1, width, generator=made))
    return {name: torch.stack(each) for name, each in rows.items()}


def put(path: Path, source: str, *texts: str, title: str = "Title", factor: float = 1.0) -> int:
    """A document with these passages takes the place of the one there was; gradients are multiplied by the factor."""
    with write_bank(path) as writer:
        own = writer.snapshot.settings
        id = document_id(source)
        writer.remove([ref for ref, _, _ in writer.snapshot.passages(id)])
        passages = [Passage(id, source, title, number, 9 * number, 5, text) for number, text in enumerate(texts)]
        keys = [row_key(each, own.model, own.tokenizer, own.prior) for each in passages]
        if not own.keep_text:
            passages = [replace(each, text=None) for each in passages]
        dense = {name: factor * each for name, each in gradients(*texts).items()}
        embeddings = np.full((len(texts), own.embedding_dim), own.embedding_dim**-0.5, np.float16)
        writer.add(passages, keys, *Codec(own.codec, own.tensors).encode(dense), embeddings)
        writer.commit("ingest")
        return writer.finish()


@pytest.fixture
def bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Snapshots 1 (empty), 2 (a.md), 3 (b.md beside it); in the folder that is current."""
    path = tmp_path / ".gbank"
    create_bank(path, made_for(), PRIOR)
    put(path, "a.md", "The first. It is long.", "The second.", "The third.", title="Alpha")
    put(path, "docs/b.md", "Another.", title="Beta")
    monkeypatch.chdir(tmp_path)
    return path


def lines(*words: str | Path, **options: object) -> list[str]:
    result = call("diff", *words, **options)  # type: ignore[arg-type]
    assert (result.code, result.err) in ((0, ""), (0, "decoding gradients on cpu\n"))
    return result.out.splitlines()


# ── what is meant ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_snapshot_is_named_by_its_number_or_counted_back(bank: Path, tmp_path: Path) -> None:
    def in_force() -> Path:
        return bank

    def never() -> Path:
        pytest.fail("looked for the bank in force")

    named = f"{bank}@2"
    assert versions([], in_force) == (Version(bank, 2), Version(bank, 3))
    assert versions(["@2"], in_force) == (Version(bank, 2), Version(bank, None))
    assert versions(["@-2", "@-0"], in_force) == (Version(bank, 1), Version(bank, 3))
    assert versions([named, f"{bank}@-1"], never) == (Version(bank, 2), Version(bank, 2))
    assert versions([str(bank), ".gbank@3"], never) == (Version(bank, None), Version(Path(".gbank"), 3))


def test_a_path_that_contains_an_at_sign_is_that_path(bank: Path, tmp_path: Path) -> None:
    odd = tmp_path / "mine@2"
    shutil.copytree(bank, odd)
    remove_documents(odd, ["a.md"])
    assert versions([str(odd), f"{odd}@3"], Path) == (Version(odd, None), Version(odd, 3))
    assert call("diff", odd, bank, "--json").document["added"][0]["source"] == "a.md"
    assert call("diff", f"{odd}@3", bank, "--exit-code").code == 0


@pytest.mark.parametrize(
    ("words", "kind", "part"),
    [
        (["@7"], "usage", "there are 1, 2, 3"),
        (["@-3"], "usage", "there are 3 snapshots"),
        (["@x"], "usage", "@x is neither a bank nor a snapshot"),
        ([".gbank@newest"], "usage", "BANK@42"),
        (["nowhere@2"], "no_bank", "there is no bank at nowhere"),
        (["nowhere"], "no_bank", "there is no bank at nowhere"),
        ([".", "@2"], "no_bank", "it holds one: --bank .gbank"),
        (["x" * 300], "no_bank", "there is no bank at"),
        (["a\x00b@2"], "no_bank", "there is no bank at"),
    ],
)
def test_what_is_no_version_is_said_with_the_way_out(bank: Path, words: list[str], kind: str, part: str) -> None:
    error = call("diff", *words, "--json").error
    assert error["kind"] == kind
    assert part in error["message"] + error["hint"]


def test_a_new_bank_has_nothing_to_compare_its_newest_snapshot_with(tmp_path: Path) -> None:
    create_bank(tmp_path / "new", made_for(), PRIOR)
    for where in (tmp_path / "new", tmp_path / "new.gbank"):
        if not where.exists():
            pack_bank(tmp_path / "new", where)
        with pytest.raises(UsageProblem, match="there is one snapshot") as caught:
            versions([], lambda where=where: where)
        assert "name another bank" in caught.value.hint


def test_without_a_bank_it_is_10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("diff").code == 10
    with pytest.raises(NoBank):
        versions(["nowhere", "@2"], lambda: tmp_path)


# ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_reads_like_a_diff(bank: Path) -> None:
    put(bank, "a.md", "The first. It is short.", "The second.", "The third.", "The fourth.", title="Alpha")
    put(bank, "docs/b.md", "Another.", title="Beta", factor=2.0)
    put(bank, "c.md", "New.")
    head, new_head, *body, summary = lines("@3")
    assert re.fullmatch(r"--- \S*\.gbank@3  2\S+Z  ingest", head)
    assert re.fullmatch(r"\+\+\+ \S*\.gbank@6  2\S+Z  ingest", new_head)
    assert body == [
        "~ a.md  Alpha  (passages 0, 3)",
        "+ c.md  Title  (1 passage)",
        "* docs/b.md  Beta  (1 passage, cosine 1.0000, norm × 2)",
    ]
    assert summary == "documents: 1 added, 1 changed, 1 recomputed; passages: 3 added, 1 removed, 1 recomputed"
    assert lines("@6", "@3")[3] == "- c.md  Title  (1 passage)"


def test_with_text_changed_passages_are_shown_by_sentence(bank: Path) -> None:
    put(bank, "a.md", "The first. It is short.", "The third.", title="Alpha")
    assert lines("--text")[2:-1] == [
        "~ a.md  Alpha  (passages 0–1)",
        "@@ passage 0 @@",
        " The first.",
        "-It is long.",
        "+It is short.",
        "@@ passage 1 @@",
        "-The second.",
    ]
    put(bank, "a.md", "The first. It is short.", "The third.", title="Omega")
    assert lines("--text")[3:7] == ["@@ passage 0 @@", "-Alpha", "+Omega", " The first."]


def test_colours_are_for_terminals_and_no_color_is_heeded(bank: Path) -> None:
    assert "\x1b" not in "".join(lines())
    shown = call("diff", tty=True).out
    assert "\x1b[32m+ docs/b.md\x1b[0m" in shown
    plain = call("diff", tty=True, NO_COLOR="1").out
    assert plain == re.sub("\x1b\\[[0-9;]*m", "", shown)


def test_where_nothing_differs_stdout_is_empty_and_stderr_says_so(bank: Path) -> None:
    result = call("diff", bank, "@-0", "--exit-code")
    assert (result.code, result.out) == (0, "")
    assert "no difference between" in result.err
    assert call("diff", bank, "@-0", "-q").err == ""
    document = call("diff", bank, "@-0", "--json", "--exit-code").document
    assert document["identical"] is True
    assert not any(document[name] for name in ("added", "removed", "changed", "recomputed", "unknown", "settings"))


def test_exit_code_1_only_where_it_is_asked_for(bank: Path) -> None:
    assert (call("diff").code, call("diff", "--exit-code").code, call("diff", "--json", "--exit-code").code) == (
        0,
        1,
        1,
    )


def test_json_has_the_names_that_others_rely_on(bank: Path) -> None:
    put(bank, "a.md", "The first. It is short.", "The second.", title="Alpha")
    put(bank, "docs/b.md", "Another.", title="Beta", factor=0.5)
    document = call("diff", "@3", "--json", "--text").document
    assert {"added", "removed", "changed", "recomputed", "settings", "summary", "identical"} <= set(document)
    (changed,), (recomputed,) = document["changed"], document["recomputed"]
    assert {name: changed[name] for name in ("id", "source", "title", "passages")} == {
        "id": document_id("a.md"), "source": "a.md", "title": "Alpha", "passages": 2,
    }  # fmt: skip
    first, last = changed["changes"]
    assert (first["ordinal"], first["kind"], first["before"]["text"]) == (0, "changed", "The first. It is long.")
    assert (last["ordinal"], last["kind"], last["after"]) == (2, "removed", None)
    assert recomputed["cosine"] == {"worst": pytest.approx(1), "mean": pytest.approx(1)}
    assert recomputed["norm_ratio"] == {"worst": pytest.approx(0.5), "mean": pytest.approx(0.5)}
    assert document["summary"]["passages_removed"] == 2
    assert (document["before"]["snapshot"], document["after"]["snapshot"]) == (3, 5)
    assert "before" not in call("diff", "@3", "--json").document["changed"][0]["changes"][0]


def test_banks_of_other_settings_are_told_setting_by_setting(bank: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    changes = {"model": "a" * 64, "model_name": "larger", "codec": CodecSettings(rank=2), "chunk_tokens": 96}
    create_bank(other, made_for(**changes, keep_text=False), PRIOR)
    put(other, "a.md", "The first. It is long.", "The second.", "The third.", title="Alpha")
    shown = lines(other, bank)
    assert "! model  larger (aaaaaaaaaaaa…) → starter (111111111111…)" in shown
    assert "! codec  r2-int4 → r1-int8" in shown
    assert "! chunk tokens  96 → 192" in shown
    assert "! keep text  false → true" in shown
    assert shown[-1].endswith("settings: model, codec, chunk tokens, keep text")
    (recomputed,) = call("diff", other, bank, "--json").document["recomputed"]
    assert (recomputed["passages"], recomputed["cosine"]["worst"] > 0.9) == (3, True)


def test_gradients_of_other_tensors_have_one_line_and_no_cosine(bank: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    create_bank(other, made_for(tensors=SHAPES[:1], model="a" * 64), PRIOR)
    with write_bank(other) as writer:
        own = writer.snapshot.settings
        passage = Passage(document_id("docs/b.md"), "docs/b.md", "Beta", 0, 0, 5, "Another.")
        codes, scales = np.ones((1, own.code_bytes), np.uint8), np.ones((1, own.scale_count), np.float16)
        writer.add([passage], [row_key(passage, own.model, "", "")], codes, scales, np.ones((1, 8), np.float16))
        writer.commit("ingest")
    shown = lines(bank, other)
    assert "! tensors  2 tensors of 660 values → 1 tensor of 480 values" in shown
    assert shown[-3:-1] == [
        "- a.md  Alpha  (3 passages)",
        "* 1 document with the same text  (gradients of other tensors cannot be compared)",
    ]
    assert call("diff", bank, other, "--json").document["recomputed"][0]["cosine"] == {"worst": None, "mean": None}


def test_without_text_and_model_in_common_it_says_that_nobody_can_tell(tmp_path: Path) -> None:
    for name in ("one", "two"):
        create_bank(tmp_path / name, made_for(keep_text=False, model=sha256_hex(name)), PRIOR)
        put(tmp_path / name, "a.md", "Text.")
    result = call("diff", tmp_path / "one", tmp_path / "two", "--exit-code")
    assert result.code == 1
    assert "? a.md  Title  (1 passage; without their text it cannot be told whether it changed)" in result.out


def test_a_packed_bank_is_compared_as_it_is(bank: Path, tmp_path: Path) -> None:
    packed = tmp_path / "bank.gbank"
    pack_bank(bank, packed)
    remove_documents(bank, ["a.md"])
    assert [line for line in lines(packed) if line.startswith("- ")] == ["- a.md  Alpha  (3 passages)"]
    assert call("diff", packed, packed, "--exit-code").code == 0
    assert call("diff", f"{packed}@3", packed, "--exit-code").code == 0
    assert call("diff", f"{packed}@2").code == 2


def test_promise_21_hostile_documents_cannot_forge_a_difference(bank: Path) -> None:
    put(bank, HOSTILE_NAME, HOSTILE_TEXT, title=HOSTILE_TEXT)
    put(bank, HOSTILE_NAME, "changed " + HOSTILE_TEXT, title=HOSTILE_TEXT)
    for words in (["@3"], ["--text"], ["@3", "--json"], ["--json", "--text"]):
        for tty in (False, True):
            result = call("diff", *words, tty=tty, NO_COLOR="1")
            assert result.code == 0
            assert not [character for character in OBEYED if character in result.out.replace("\n", "")]
    assert not [line for line in call("diff", "--text").out.splitlines() if line.startswith("error")]
    assert call("diff", "--json").document["changed"][0]["source"].startswith("docs/\x1b]0;owned")


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o600)
    file.write_bytes(bytes(data))


def test_damage_is_14_and_named_and_can_be_passed_over(bank: Path) -> None:
    put(bank, "a.md", "The first. It is short.", title="Alpha")
    with open_bank(bank) as opened:
        shard = opened.manifest.shards[-1]
    damage(bank / shard.docs_name)
    result = call("diff", "--json")
    assert result.error["code"] == 14
    assert shard.docs.sha256 in result.error["message"]
    result = call("diff", "--skip-damaged")
    assert result.code == 0
    assert f"left out: {shard.docs_name}" in result.err
    assert "a.md" not in result.out
    assert call("diff", "--skip-damaged", "--json").document["summary"]["partial"] is True


def test_a_broken_manifest_is_14(bank: Path) -> None:
    damage(bank / "snapshots" / "00000002.json")
    assert call("diff").code == 14
    assert call("diff", "@1", "@3").code == 0


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────────


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_cosine_and_ratio_are_those_of_the_decoded_gradients(device: str) -> None:
    old, new = made_for(), made_for(codec=CodecSettings(rank=2, bits=4))
    first, second = Codec(old.codec, SHAPES), Codec(new.codec, SHAPES)
    one, two = first.encode(gradients(*"abcdefghi")), second.encode(gradients(*"ABCDEFGHI"))
    likeness = Likeness(old, new, device)
    likeness._rows = 4
    assert likeness.unsaid == ""
    cosines, ratios = likeness(*one, *two)
    assert likeness.unsaid.startswith(f"decoding gradients on {device}")
    flat = [
        np.concatenate([each.flatten(1).double().numpy() for each in codec.decode(*row).values()], axis=1)
        for codec, row in ((first, one), (second, two))
    ]
    norms = [np.linalg.norm(each, axis=1) for each in flat]
    assert cosines == pytest.approx((flat[0] * flat[1]).sum(axis=1) / norms[0] / norms[1], abs=1e-6)
    assert ratios == pytest.approx(norms[1] / norms[0], rel=1e-6)
    assert likeness(*one, *two)[0] == pytest.approx(cosines, abs=0)


def test_gradients_of_zeros_have_a_cosine_too() -> None:
    own = made_for()
    codec = Codec(own.codec, SHAPES)
    none = codec.encode({name: torch.zeros(1, rows, cols) for name, rows, cols in SHAPES})
    some = codec.encode(gradients("x"))
    likeness = Likeness(own, own, "cpu")
    assert [each.tolist() for each in likeness(*none, *none)] == [[1.0], [1.0]]
    assert [each.tolist() for each in likeness(*none, *some)] == [[0.0], [float("inf")]]
    assert [each.tolist() for each in likeness(*some, *none)] == [[0.0], [0.0]]


def test_a_device_that_is_not_there_is_13_once_there_is_something_to_decode(bank: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    assert call("diff", "--device", "cuda").code == 0
    put(bank, "docs/b.md", "Another.", title="Beta", factor=2.0)
    assert call("diff", "--device", "cuda").code == 13


def test_where_it_decodes_is_said_once(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "BATCH_ROWS", 1)
    put(bank, "a.md", "The first. It is long.", "The second.", "The third.", title="Alpha", factor=2.0)
    assert call("diff").err == "decoding gradients on cpu\n"


def loaded_by(*words: str, bank: Path) -> set[str]:
    code = f"from regrad_cli.cli import main; main({list(words)!r})\n"
    code += "import sys, json; sys.__stdout__.write(chr(10) + json.dumps(sorted(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=bank.parent)
    return set(json.loads(ran.stdout.splitlines()[-1]))


def test_torch_is_loaded_only_where_something_was_recomputed(bank: Path) -> None:
    put(bank, "a.md", "The first. It is short.", title="Alpha")
    assert "torch" not in loaded_by("diff", "--text", bank=bank)
    put(bank, "docs/b.md", "Another.", title="Beta", factor=2.0)
    assert "torch" in loaded_by("diff", bank=bank)


# ── with everything real but the model's size ────────────────────────────────────────────────────────────────────────


def test_what_an_ingest_did_is_what_diff_says(
    tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    bank = story_bank(tmp_path, tiny_model_folder, tiny_embedder_folder)
    text = story("Skerry").replace("keeper 1 has 4 keys", "keeper 1 has no key")
    write(tmp_path / "docs", {"Skerry.md": text, "Odde.md": story("Odde")})
    (tmp_path / "docs" / "Velmora.md").unlink()
    ingest(bank, tmp_path / "docs", prune=True)
    document = call("diff", "--bank", bank, "--json").document
    assert [[each["source"] for each in document[name]] for name in ("added", "removed", "changed", "recomputed")] == [
        ["docs/Odde.md"], ["docs/Velmora.md"], ["docs/Skerry.md"], [],
    ]  # fmt: skip
    shown = call("diff", "--bank", bank, "--text").out.splitlines()
    assert "-Here in Skerry the lamp is lit at dusk, and keeper 1 has 4 keys." in shown
    assert "+Here in Skerry the lamp is lit at dusk, and keeper 1 has no key." in shown
    ingest(bank, tmp_path / "docs", prune=True)
    assert call("diff", "--bank", bank, "--json").document["added"] == document["added"]


def test_computed_again_in_another_number_format_gradients_are_close(
    tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    (tmp_path / "first").mkdir()
    first = story_bank(tmp_path / "first", tiny_model_folder, tiny_embedder_folder)
    second = tmp_path / "second" / ".gbank"
    (tmp_path / "second").mkdir()
    shutil.copytree(first, second)
    remove_documents(second, ["docs/Skerry.md"])
    ingest(second, write(tmp_path / "second" / "docs", {"Skerry.md": story("Skerry")}), dtype="bf16")
    document = call("diff", first, second, "--json", "--device", "cpu").document
    (recomputed,) = document["recomputed"]
    assert recomputed["source"] == "docs/Skerry.md"
    assert 0.9 < recomputed["cosine"]["worst"] <= recomputed["cosine"]["mean"] <= 1
    assert recomputed["norm_ratio"]["mean"] == pytest.approx(1, abs=0.1)
    assert document["changed"] == document["added"] == []
