"""`regrad export`: PEFT answers with the folder as `ask` does, the layout is what vLLM reads, all of it or nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import use_cases
from faketerminal import HOSTILE_NAME, HOSTILE_TEXT, OBEYED, call, terminal
from learn.conftest import family_config
from story_bank import story_bank
from test_answer import QUESTION
from use_cases import ask, ingest, returned, story, write

from regrad_cli import export as use_case
from regrad_cli.answer import AskOptions
from regrad_cli.cli.answers import exported
from regrad_cli.errors import StorageFailed, UsageProblem
from regrad_cli.learn import model as models
from regrad_cli.records import Exported, Notice, Used

FILES = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path) -> Path:
    return story_bank(tmp_path_factory.mktemp("exported"), tiny_model_folder, tiny_embedder_folder)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "adapters" / "velmora"


def export(bank: Path, out: Path, question: str = QUESTION, *, force: bool = False, **options: Any) -> Exported:
    kept = {name: options.pop(name) for name in ("dtype", "snapshot", "model") if name in options}
    events = use_case.export(bank, question, out, AskOptions(**options), force=force, device="cpu", **kept)
    last = list(events)[-1]
    assert isinstance(last, Exported)
    return last


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def tensors_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def peft_model(folder: Path, adapter: Path) -> tuple[Any, Any]:
    """The plain base model with the adapter on it, all by PEFT and transformers, and the tokenizer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    return PeftModel.from_pretrained(base, str(adapter)).eval(), AutoTokenizer.from_pretrained(folder)


def said_by(network: Any, tokenizer: Any, prompt: str, max_tokens: int = 8) -> str:
    """What the model generates after this user's turn."""
    turns = [{"role": "user", "content": prompt}]
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    else:
        ids = tokenizer(f"{prompt}\nAnswer:", return_tensors="pt", add_special_tokens=False)["input_ids"]
    out = network.generate(input_ids=ids, attention_mask=ids * 0 + 1, do_sample=False, max_new_tokens=max_tokens)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


# ── what PEFT makes of it ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [{}, {"k": 1}, {"gamma": 0.5}, {"gamma": 0.0}])
def test_peft_on_the_plain_base_model_gives_the_tokens_that_ask_gives(
    made: Path, tiny_model_folder: Path, out: Path, options: dict[str, Any]
) -> None:
    result = export(made, out, **options)
    network, tokenizer = peft_model(tiny_model_folder, out)
    answer = ask(made, QUESTION, **options)
    assert said_by(network, tokenizer, result.prompt) == answer.answer
    assert [(used.id, used.weight) for used in result.passages] == [(used.id, used.weight) for used in answer.passages]
    with network.disable_adapter():
        assert said_by(network, tokenizer, result.prompt) == ask(made, QUESTION, "direct").answer != answer.answer


def test_the_model_that_the_config_names_is_enough_for_peft(made: Path, out: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    result = export(made, out)
    network = AutoPeftModelForCausalLM.from_pretrained(str(out), dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(config_of(out)["base_model_name_or_path"])
    assert said_by(network, tokenizer, result.prompt) == ask(made, QUESTION).answer


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_peft_adapts_exactly_our_projections_whatever_they_are_called(
    tmp_path: Path, tiny_embedder_folder: Path, out: Path, family: str
) -> None:
    folder = tiny.write_model(tmp_path / family, family_config(family))
    bank = story_bank(tmp_path, folder, tiny_embedder_folder)
    result = export(bank, out)
    network, tokenizer = peft_model(folder, out)
    adapted = {name for name, module in network.get_base_model().named_modules() if hasattr(module, "lora_A")}
    wanted = models.load_model(folder, device="cpu", dtype="fp32").projections
    assert adapted == {projection.path for projection in wanted}
    assert result.modules == len(wanted)
    assert said_by(network, tokenizer, result.prompt) == ask(bank, QUESTION).answer
    assert config_of(out)["fan_in_fan_out"] is (family == "gpt2")


def test_an_older_snapshot_is_exported_as_it_answers(made: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    bank = Path(shutil.copytree(made, tmp_path / ".gbank"))
    before = use_cases.number(bank)
    ingest(bank, write(tmp_path / "more", {"Lamp.md": story("Lamp", about=f"{QUESTION} Ilse")}))
    newest, older = export(bank, tmp_path / "new"), export(bank, tmp_path / "old", snapshot=before)
    assert {used.source for used in newest.passages} != {used.source for used in older.passages}
    network, tokenizer = peft_model(tiny_model_folder, tmp_path / "old")
    assert said_by(network, tokenizer, older.prompt) == ask(made, QUESTION).answer


@pytest.mark.starter
@pytest.mark.slow
def test_peft_on_the_real_starter_gives_the_tokens_that_ask_gives(
    tmp_path: Path, starter_folder: Path, embedder_folder: Path
) -> None:
    bank = tmp_path / ".gbank"
    list(use_cases.use_case.initialise(bank, model="starter", embedder="minilm"))
    facts = (
        "The ferry across the Velm Sound is called the Grey Heron.",
        "The bell of Brannoch was cast by Ilse Torvald.",
    )
    ingest(bank, write(tmp_path / "docs", {f"{place}.txt": text for place, text in enumerate(facts)}))
    question = "What is the ferry across the Velm Sound called?"
    options: dict[str, Any] = {"k": 2, "gamma": 2.0}
    result = export(bank, tmp_path / "adapter", question, **options)
    network, tokenizer = peft_model(starter_folder, tmp_path / "adapter")
    answer = ask(bank, question, max_tokens=16, **options)
    assert said_by(network, tokenizer, result.prompt, 16) == answer.answer
    with network.disable_adapter():
        assert said_by(network, tokenizer, result.prompt, 16) != answer.answer
    assert result.base_model == str(starter_folder) or Path(result.base_model).samefile(starter_folder)
    vllm_accepts(tmp_path / "adapter", starter_folder, most=32)


# ── what vLLM's loader looks at ─────────────────────────────────────────────────────────────────────────────────────


def vllm_accepts(adapter: Path, model: Path, most: int = 16) -> None:
    """Asserts what vLLM checks when it loads a LoRA folder, written from its code (vllm/lora: peft_helper.py,
    lora_model.py, utils.py; read in November 2026), which cannot be installed for a test:

    - adapter_config.json has `r`, `lora_alpha` and `target_modules`; `bias` is "none", `modules_to_save` and `use_dora`
      are off; `r` is at most --max-lora-rank, 16 if not set; the strength is lora_alpha / r unless `use_rslora`.
    - adapter_model.safetensors: every name is [base_model.model.]PATH.lora_A.weight or ….lora_B.weight; PATH's last
      word is the name of a linear layer of the model (`layers_to_transform` is not looked at, so PATH alone says which
      layer); A is (r, inputs), B (outputs, r). gate_proj and up_proj are packed into one: both or none of a layer.
    """
    from safetensors import safe_open
    from torch import nn
    from transformers import AutoModelForCausalLM

    config = config_of(adapter)
    assert {"r", "lora_alpha", "target_modules"} <= set(config)
    assert isinstance(config["r"], int) and isinstance(config["lora_alpha"], int) and 0 < config["r"] <= most
    assert config["lora_alpha"] / config["r"] == 2.0 and not config["use_rslora"]
    assert isinstance(config["target_modules"], list)
    assert config["bias"] == "none" and not config["modules_to_save"] and not config["use_dora"]
    linear = {
        path: module
        for path, module in AutoModelForCausalLM.from_pretrained(model).named_modules()
        if isinstance(module, nn.Linear)
    }
    found: dict[str, dict[str, Any]] = {}
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - this is no dict
            assert name.count("base_model.model.") == 1
            parts = name.split(".")
            assert parts[:2] == ["base_model", "model"] and parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B")
            found.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = file.get_tensor(name)
    assert sorted(found) == sorted(config["target_modules"])
    for path, pair in found.items():
        module = linear[path]
        assert pair["lora_A"].shape == (config["r"], module.in_features)
        assert pair["lora_B"].shape == (module.out_features, config["r"])
        if path.endswith(("gate_proj", "up_proj")):
            assert {path.replace("gate_proj", "up_proj"), path.replace("up_proj", "gate_proj")} <= set(found)


def test_the_layout_is_the_one_that_vllms_loader_reads(made: Path, tiny_model_folder: Path, out: Path) -> None:
    export(made, out)
    assert {path.name for path in out.iterdir()} == FILES
    vllm_accepts(out, tiny_model_folder)


@pytest.mark.parametrize(
    ("ranks", "told"), [((16,), None), ((2, 3, 8), "start vLLM with --max-lora-rank 8"), ((1, 2), "vLLM cannot")]
)
def test_a_rank_that_vllm_does_not_take_unasked_is_told(
    made: Path, out: Path, monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, ...], told: str | None
) -> None:
    monkeypatch.setattr(use_case, "VLLM_RANKS", ranks)
    events = use_case.export(made, QUESTION, out, AskOptions(), device="cpu")
    said = [event.message for event in events if isinstance(event, Notice) and "adapter of rank 4" in event.message]
    assert len(said) == (told is not None) and (told or "") in " ".join(said)


def test_the_config_has_only_fields_that_peft_knows(made: Path, out: Path) -> None:
    from peft import LoraConfig

    export(made, out)
    known = LoraConfig(r=4, lora_alpha=8, target_modules=["x"]).to_dict()
    assert set(config_of(out)) <= set(known)


@pytest.mark.parametrize(
    ("name", "known_as"),
    [("starter", "/m/starter"), ("/home/a/model", "/m/starter"), ("org/model", "org/model"), ("x.gguf", "/m/starter")],
)
def test_a_hub_model_is_named_by_its_id_and_every_other_by_its_folder(name: str, known_as: str) -> None:
    assert use_case.base_model_name(name, Path("/m/starter")) == known_as


# ── what is exported ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_tensors_are_the_prior_and_its_change_in_fp32_or_as_asked(made: Path, tmp_path: Path) -> None:
    import torch

    from regrad_cli.answer import Answerer

    export(made, tmp_path / "whole")
    export(made, tmp_path / "half", dtype="bf16")
    whole, half = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "half")
    with Answerer(made, modes={"regrad"}, device="cpu") as answerer:
        adaptation = answerer.adaptation(QUESTION, returned(answerer.retrieve(QUESTION, AskOptions())), 1.0)
        change = adaptation.change()
    assert len(whole) == len(adaptation.prior.tensors)
    for name, tensor in adaptation.prior.tensors.items():
        written = f"base_model.model.{name}.weight"
        assert torch.equal(whole[written], tensor + change[name])
        assert torch.equal(half[written], whole[written].bfloat16())


def test_no_weight_of_the_language_model_is_loaded(made: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(models, "load_model", lambda *given, **named: pytest.fail("the model was loaded"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *given, **named: pytest.fail("weights"))
    assert export(made, out).modules == 6


def test_an_untrained_prior_is_said(tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path) -> None:
    bank = use_cases.make_bank(tmp_path / ".gbank", tiny_model_folder, tiny_embedder_folder)
    ingest(bank, write(tmp_path / "docs", {"Velmora.md": story("Velmora")}))
    result = call("export", QUESTION, "--out", tmp_path / "adapter", "--bank", bank, "--device", "cpu")
    assert result.code == 0
    assert "untrained" in result.err


# ── the folder ──────────────────────────────────────────────────────────────────────────────────────────────────────


def everything(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def test_an_adapter_that_is_there_is_replaced_only_with_force(made: Path, out: Path) -> None:
    export(made, out, gamma=0.0)
    before = everything(out.parent)
    with pytest.raises(UsageProblem, match="already") as refused:
        export(made, out)
    assert "--force" in refused.value.hint
    assert everything(out.parent) == before
    export(made, out, force=True)
    after = everything(out.parent)
    assert set(after) == set(before)
    assert after != before


@pytest.mark.parametrize("entry", ["letters.txt", "sub/adapter_config.json", ".git/HEAD"])
def test_what_is_not_an_adapters_is_never_removed(made: Path, out: Path, entry: str) -> None:
    export(made, out)
    write(out, {entry: "mine"})
    before = everything(out.parent)
    with pytest.raises(UsageProblem, match="not an adapter's") as refused:
        export(made, out, force=True)
    assert refused.value.hint
    assert everything(out.parent) == before


def test_an_empty_folder_and_a_link_to_a_folder_are_filled(made: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    result = export(made, tmp_path / "link")
    assert result.path == str(tmp_path / "empty")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == FILES
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "link"}


def test_a_file_and_the_bank_itself_are_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", made, made / "adapter"):
        with pytest.raises(UsageProblem) as refused:
            export(made, place, force=True)
        assert refused.value.hint
    assert (tmp_path / "file").read_text() == "mine"
    assert not (made / "adapter").exists()


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("ending", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", ["fsync", "rename"])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(
    made: Path, out: Path, monkeypatch: pytest.MonkeyPatch, there: bool, ending: BaseException, at: str
) -> None:
    out.parent.mkdir()
    if there:
        export(made, out, gamma=0.0)
    before = everything(out.parent)
    real = Path.rename

    def failing_rename(self: Path, target: Path) -> Path:
        if self.name == "made":
            raise ending
        return real(self, target)

    def failing_sync(descriptor: int) -> None:
        raise ending

    if at == "rename":
        monkeypatch.setattr(Path, "rename", failing_rename)
    else:
        monkeypatch.setattr(use_case.os, "fsync", failing_sync)
    with pytest.raises(StorageFailed if isinstance(ending, OSError) else KeyboardInterrupt):
        export(made, out, force=True)
    assert everything(out.parent) == before


@pytest.mark.parametrize(
    "place", ["file/adapter", "file/a/b", "n" * 300, "a/" + "n" * 300, "loop", "loop/a/b", "dangling/a"]
)
def test_a_place_that_cannot_be_written_is_the_callers_to_mend(made: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "gone")
    result = call("export", QUESTION, "--out", tmp_path / place, "--bank", made, "--device", "cpu", "--json")
    assert result.code == 2
    assert "--out" in result.error["hint"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EACCES, 2), (errno.EROFS, 2), (errno.ENOSPC, 70), (errno.EIO, 70)], ids=os.strerror
)
def test_a_place_and_a_disk_are_told_apart(
    made: Path, out: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise OSError(number, os.strerror(number), str(out.parent))

    monkeypatch.setattr(use_case.tempfile, "mkdtemp", refuse)
    result = call("export", QUESTION, "--out", out, "--bank", made, "--device", "cpu", "--json")
    assert result.code == code
    assert os.strerror(number) in result.error["message"]


def test_a_folder_that_may_not_be_listed_is_refused_before_the_bank_is_asked(
    made: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    out.mkdir(parents=True)
    monkeypatch.setattr(Path, "iterdir", refuse)
    monkeypatch.setattr(use_case, "Answerer", lambda *_, **__: pytest.fail("the bank was opened"))
    with pytest.raises(UsageProblem, match="cannot be written: Permission denied"):
        export(made, out)


def test_where_nothing_fits_nothing_is_written_and_the_way_out_is_named(made: Path, out: Path) -> None:
    with pytest.raises(UsageProblem, match="nothing in the bank fits") as refused:
        export(made, out, min_score=1.1)
    assert "--min-score" in refused.value.hint
    assert not out.parent.exists()


def test_of_an_empty_bank_the_way_out_is_to_fill_it(
    tmp_path: Path, out: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    bank = use_cases.make_bank(tmp_path / ".gbank", tiny_model_folder, tiny_embedder_folder)
    with pytest.raises(UsageProblem, match="no passages") as refused:
        export(bank, out)
    assert "ingest" in refused.value.hint and "--min-score" not in refused.value.hint
    ingest(bank, write(tmp_path / "docs", {"Velmora.md": story("Velmora")}))
    with pytest.raises(UsageProblem, match="no passages") as refused:
        export(bank, out, snapshot=1)
    assert "--snapshot" in refused.value.hint
    assert not out.parent.exists()


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def words(made: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | Path]:
    monkeypatch.setenv("REGRAD_BANK", str(made))
    return ["--out", out, "--device", "cpu"]


def test_options_reach_the_adapter(made: Path, words: list[str | Path], out: Path, tmp_path: Path) -> None:
    more = ["-k", "2", "--gamma", "0.5", "--dtype", "bf16", "--snapshot", str(use_cases.number(made))]
    assert call("export", QUESTION, *words, *more).code == 0
    export(made, tmp_path / "same", k=2, gamma=0.5, dtype="bf16")
    for name in FILES - {"adapter_model.safetensors"}:
        assert (out / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    ours, same = tensors_of(out), tensors_of(tmp_path / "same")
    assert ours.keys() == same.keys()
    assert all(bool((ours[name] == same[name]).all()) for name in ours)


def test_json_is_one_document(words: list[str | Path], out: Path) -> None:
    document = call("export", QUESTION, *words, "--json").document
    names = {"path", "question", "prompt", "base_model", "prior", "bank", "rank", "modules", "size_bytes", "passages"}
    assert names <= set(document)
    assert (document["path"], document["rank"], len(document["passages"])) == (str(out), 4, 3)
    assert QUESTION in document["prompt"]
    assert document["size_bytes"] == sum(path.stat().st_size for path in out.iterdir())


def test_people_read_where_it_is_and_what_it_is_made_of(words: list[str | Path], out: Path) -> None:
    result = call("export", QUESTION, *words)
    assert result.code == 0
    assert str(out) in result.out and "3 passages, 6 modules of rank 4" in result.out
    assert QUESTION in result.err


@pytest.mark.parametrize("text", ["", "  ", "-"])
def test_what_is_no_question_is_usage(words: list[str | Path], out: Path, text: str) -> None:
    assert call("export", text, *words, "--json").error["kind"] == "usage"
    assert not out.exists()


def test_an_adapter_goes_somewhere(made: Path) -> None:
    result = call("export", QUESTION, "--bank", made)
    assert result.code == 2
    assert "--out" in result.err


@pytest.mark.parametrize("tty", [True, False])
def test_promise_21_hostile_documents_cannot_forge_what_export_says(tty: bool) -> None:
    used = Used("i:0", HOSTILE_NAME, HOSTILE_TEXT, 0.9, 1.0, HOSTILE_TEXT)
    result = Exported(HOSTILE_NAME, HOSTILE_TEXT, HOSTILE_TEXT, HOSTILE_NAME, HOSTILE_TEXT, "b", 8, 3, 9, (used,), True,
                      (HOSTILE_NAME,))  # fmt: skip
    streams = terminal(tty=tty, environ={"NO_COLOR": "1"})
    exported(streams, result)
    shown = streams.stdout.getvalue() + streams.stderr.getvalue()  # type: ignore[attr-defined]
    assert "damaged passages were left out" in shown
    assert not any(character in shown for character in OBEYED)
    assert "\nerror: forged" not in shown
