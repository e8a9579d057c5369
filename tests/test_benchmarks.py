"""The benchmarks' own arithmetic and tables, and that their baseline does the same job as regrad."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are not installed with the package

from benchmarks import bench, machine, passages, run  # noqa: E402
from benchmarks.measure import Figure, Ran, Target, interleaved, paired_ratio, run_process, shown, slope, table  # noqa: E402

SCRIPTS = sorted(path for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_first_what_it_does_and_is_short(path):
    source = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring
    assert source.startswith('"""') and docstring.splitlines()[0].endswith((".", ":"))
    assert len(source.splitlines()) < 300


@pytest.mark.parametrize("name", run.NAMES)
def test_a_benchmark_says_what_it_measures_and_against_what(name):
    module = importlib.import_module(f"benchmarks.{name}")
    first = module.__doc__.splitlines()[0]
    assert first.startswith("Measures ")
    assert any(word in first for word in ("against", "beside", "from their start")), first
    assert module.TITLE and set(module.DEVICES) <= {"cpu", "cuda"}


# ── arithmetic ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_slope_is_free_of_what_is_paid_once():
    for once in (0.0, 7.5):
        assert slope((60, once + 60 * 0.25), (200, once + 200 * 0.25)) == pytest.approx(0.25)


@pytest.mark.parametrize(("small", "large"), [((60, 5.0), (60, 9.0)), ((200, 5.0), (60, 9.0)), ((60, 9.0), (200, 9.0))])
def test_a_slope_of_noise_is_refused(small, large):
    with pytest.raises(ValueError):
        slope(small, large)


def test_ratios_are_paired_before_their_median_is_taken():
    ours, theirs = [1.0, 10.0, 3.0], [2.0, 20.0, 3.0]  # a machine ten times slower in the second round
    assert paired_ratio(theirs, ours) == 2.0
    with pytest.raises(ValueError):
        paired_ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError):
        paired_ratio([], [])


def test_contenders_take_turns_and_warm_up_is_left_out():
    order = []
    results = interleaved({name: lambda name=name: order.append(name) or len(order) for name in "AB"}, 2, warm_up=True)
    assert "".join(order) == "ABABAB"
    assert results == {"A": [3, 5], "B": [4, 6]}


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_table_holds_value_baseline_ratio_target_and_whether_it_is_met():
    text = table(
        [
            Figure("passages a second", 12.0, "/s", 3.0, 4.0, Target("≥", 3)),
            Figure("help", 0.3, "s", 0.02, 15.0, Target("≤", 0.25, "value")),
            Figure("a | b", None, "s", target=Target("≤", 1)),
            Figure("bytes", 61234.4, "B"),
        ]
    )
    head, rule, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()]
    assert {len(row) for row in (head, rule, *rows)} == {6}
    assert rows[0] == ["passages a second", "12 /s", "3 /s", "4 ×", "≥ 3 ×", "met"]
    assert rows[1] == ["help", "0.3 s", "0.02 s", "15 ×", "≤ 0.25 s", "not met"]
    assert rows[2] == ["a \\| b", "", "", "", "≤ 1 ×", "not measured"]
    assert rows[3] == ["bytes", "61,234 B", "", "", "", ""]


@pytest.mark.parametrize(
    ("target", "ratio", "value", "met"),
    [
        (Target("≥", 3), 3.0, 1.0, True),
        (Target("≥", 3), 2.999, 9.0, False),
        (Target("≤", 0.05), 0.05, 9.0, True),
        (Target("≤", 0, "value"), None, 0.0, True),
        (Target("≤", 0, "value"), None, 1e-30, False),
        (Target("≥", 3), None, 9.0, None),
        (None, 3.0, 9.0, None),
    ],
)
def test_a_target_holds_the_number_it_names(target, ratio, value, met):
    assert Figure("x", value, ratio=ratio, target=target).met is met


def test_numbers_have_three_digits():
    assert [shown(0.12345), shown(1.5, "s"), shown(99.96), shown(1234.5, "B"), shown(None)] == [
        "0.123",
        "1.5 s",
        "100",
        "1,234 B",
        "",
    ]


def test_results_are_updated_by_section_and_never_lost_to_a_machine_without_cuda():
    first = {"ingest · cpu": "## ingest · cpu\n\nold\n", "ingest · cuda": "## ingest · cuda\n\nmeasured\n"}
    text = run.updated("", first, run.headings())
    absent = run.section("ingest", "cuda", run.NOT_RUN)
    later = {
        "ingest · cpu": "## ingest · cpu\n\nnew\n",
        "ingest · cuda": absent,
        "startup · cpu": "## startup · cpu\n\nx\n",
    }
    text = run.updated(text, later, run.headings())
    assert "new" in text and "old" not in text
    assert "measured" in text and run.NOT_RUN not in text
    assert text.index("## startup") < text.index("## ingest · cpu") < text.index("## ingest · cuda")
    assert text.count("# Results\n") == 1
    assert run.updated(text, {}, run.headings()) == text
    assert run.NOT_RUN in run.updated("", {"ingest · cuda": absent}, run.headings())


def test_a_run_writes_what_succeeded_names_what_failed_and_marks_what_needs_cuda(tmp_path, monkeypatch, capsys):
    from types import SimpleNamespace

    def fails(place, options):
        raise RuntimeError("no luck")

    def works(place, options):
        assert options.device == "cpu" and place.folder.is_dir()
        return bench.Result([Figure("speed", 2.0, "/s", 1.0, 2.0, Target("≥", 3))], ["a note"])

    modules = {"good": (("cpu", "cuda"), works), "bad": (("cpu",), fails)}
    monkeypatch.setattr(run, "NAMES", tuple(modules))
    monkeypatch.setattr(
        run, "module_of", lambda name: SimpleNamespace(TITLE=name, DEVICES=modules[name][0], run=modules[name][1])
    )
    monkeypatch.setattr(run, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(machine, "has_cuda", lambda: False)
    assert run.main([]) == 1 and not run.RESULTS.exists()  # only --write writes
    assert run.main(["--write"]) == 1
    written = run.RESULTS.read_text(encoding="utf-8")
    assert "bad · cpu failed: RuntimeError: no luck" in capsys.readouterr().err
    assert "## bad" not in written
    assert "| speed | 2 /s | 1 /s | 2 × | ≥ 3 × | not met |" in written and "- a note" in written
    assert run.NOT_RUN in written.split("## good · cuda")[1]
    assert run.main(["--only", "good", "--write"]) == 0
    assert run.main(["--device", "cuda", "--write"]) == 1


# ── machine and processes ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_machine_is_named_by_processor_versions_and_commit(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Some CPU 9000\nflags\t\t: avx2 avx512f avx512_bf16 amx_bf16\n")
    assert machine.cpu_info(info) == ("Some CPU 9000", "amx_bf16, avx512_bf16")
    info.write_text("model name\t: Old CPU\nflags\t\t: sse2 avx2\n")
    assert machine.cpu_info(info) == ("Old CPU", "avx2")
    assert machine.cpu_info(tmp_path / "none")[1] == ""
    described = machine.describe("cpu")
    for part in ("cores", "GiB", "device cpu", "torch ", "transformers ", "commit "):
        assert part in described


def test_a_process_is_measured_and_its_failure_told(tmp_path):
    import os
    import resource

    code = "import sys; sum(range(3_000_000)); print('out'); sys.exit(int(sys.argv[1]))"
    ran = run_process([sys.executable, "-c", code, "0"], cwd=tmp_path, env=os.environ)
    assert ran.stdout == "out\n"
    assert 0 < ran.cpu_s < ran.seconds + 1
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 1e6 < ran.peak_bytes < max(1e9, 1.1 * own)  # see Ran: this suite may hold more than the process does
    with pytest.raises(RuntimeError, match="ended with 7"):
        run_process([sys.executable, "-c", code, "7"], cwd=tmp_path, env=os.environ)


def test_benchmarks_ignore_the_users_settings_but_use_his_models(tmp_path, monkeypatch):
    monkeypatch.setenv("REGRAD_MODE", "rag")
    monkeypatch.setenv("REGRAD_CACHE", str(tmp_path / "models"))
    environment = bench.environment(tmp_path)
    assert "REGRAD_MODE" not in environment
    assert environment["REGRAD_CACHE"] == str(tmp_path / "models")
    assert environment["REGRAD_STATE"].startswith(str(tmp_path))


# ── what is compared ────────────────────────────────────────────────────────────────────────────────────────────────


def test_made_passages_are_as_many_as_asked_all_different_and_each_a_document_of_one(tmp_path):
    from regrad_cli.documents import read_documents, split

    def words(text):
        return [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]

    made = passages.make_passages(bench.EXAMPLES, 150, words)
    assert len({passage.training_text for passage in made}) == 150
    assert made == passages.make_passages(bench.EXAMPLES, 150, words)
    passages.write_jsonl(made, tmp_path / "passages.jsonl")
    cut = [list(split(document, words)) for document in read_documents([tmp_path], base=tmp_path)]
    assert {len(each) for each in cut} == {1}
    assert [each[0].training_text for each in cut] == [passage.training_text for passage in made]
    assert all(160 <= each[0].tokens <= 192 for each in cut)


def test_the_plain_loop_computes_the_same_gradients_as_regrad(tiny_model_folder, tmp_path, monkeypatch):
    import torch
    from safetensors.torch import load_file

    from benchmarks import plain_loop
    from regrad_cli.learn.gradients import passage_gradients
    from regrad_cli.learn.model import load_model
    from regrad_cli.learn.prior import Prior, seeded_prior

    records = [{"title": "Bell", "text": "The bell was repaired by the smith."}, {"title": "Ferry", "text": "A heron."}]
    file = tmp_path / "passages.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    torch.manual_seed(0)
    monkeypatch.setattr(plain_loop, "RANK", 8)
    network, tokenizer = plain_loop.lora_network(tiny_model_folder, "fp32", "cpu")
    ids = [tokenizer(f"{r['title']}\n{r['text']}", add_special_tokens=False)["input_ids"] for r in records]
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if "lora_B" in name:
                tensor.normal_(std=0.1)

    def own(name):  # PEFT's name of a tensor as regrad's
        return re.sub(r"^base_model\.model\.|\.default\.weight$", "", name)

    theirs = [{own(name): t for name, t in found.items()} for found in plain_loop.gradients(network, ids)]
    model = load_model(tiny_model_folder, device="cpu", dtype="fp32")
    base = seeded_prior(model, "0" * 64)
    same = {own(name): t.detach() for name, t in network.named_parameters() if t.requires_grad}
    prior = Prior({name: same[name] for name in base.tensors}, base.log_step_sizes, base.card)
    for done in passage_gradients(model, prior, ids):
        for row, position in enumerate(done.positions):
            assert set(theirs[position]) == set(done.tensors)
            for name, tensor in done.tensors.items():
                torch.testing.assert_close(tensor[row], theirs[position][name], rtol=1e-4, atol=1e-6)

    plain_loop.main([str(tiny_model_folder), "fp32", "cpu", str(file), str(tmp_path / "out")])
    saved = load_file(tmp_path / "out" / "000001.safetensors")
    assert {own(name) for name in saved} == set(prior.tensors)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_the_double_backward_loop_takes_the_same_steps_as_regrad(tiny_model_folder, tiny_embedder_folder, tmp_path):
    import torch

    from benchmarks import metatrain
    from regrad_cli.learn.meta import MetaLearner
    from regrad_cli.learn.model import load_model
    from regrad_cli.learn.prior import seeded_prior

    names = {"model": str(tiny_model_folder), "embedder": str(tiny_embedder_folder)}
    options = bench.Options(rounds=2, tasks=6, **names)
    place = bench.Bench(tmp_path, options)
    model = load_model(tiny_model_folder, device="cpu", dtype="fp32")
    learned, others = metatrain.split(6)
    assert len(learned) == 6 and len(others) == 8 and not set(learned) & set(others)
    drawn = [episode for batch in metatrain.drawn(place, options, model, learned, 2) for episode in batch]
    assert len(drawn) > metatrain.BATCH and any(len(episode.passages) > 1 for episode in drawn)
    prior = seeded_prior(model, "0" * 64, rank=2)
    theta = {name: tensor + 0.05 for name, tensor in prior.tensors.items()}
    learner = MetaLearner(model, prior.scale)
    logs = dict.fromkeys(theta, -1.0)
    for episode in drawn[:4]:
        plain = metatrain.gradient(model, theta, logs, episode)
        with learner.ready():
            ours = learner.meta_gradient(theta, {name: torch.tensor(-1.0).exp().item() for name in theta}, [episode])
        torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-4, atol=1e-5)
        for name in theta:
            torch.testing.assert_close(ours.tensors[name], plain.tensors[name], rtol=1e-3, atol=1e-5)
            assert ours.log_steps[name] == pytest.approx(plain.log_steps[name], rel=1e-2, abs=1e-5)
    assert not any(module._forward_hooks for module in model.network.modules())

    result = metatrain.run(place, options)
    speed, loss = result.figures
    assert speed.value > 0 and speed.ratio > 0 and speed.target.bound == 4
    assert loss.ratio == pytest.approx(1, abs=0.05) and loss.value < 20
    assert re.search(r"^\d+ tasks in 3 steps of 4, each of 6 tasks", result.notes[0])


def test_operations_are_counted_by_the_formula(tiny_model_folder, tiny_embedder_folder):
    from benchmarks import flops
    from regrad_cli.learn.model import find_projections

    hidden, inner = 32, 64
    network = flops.skeleton(tiny_model_folder)
    vocabulary = network.config.vocab_size
    attention = 2 * hidden * hidden + 2 * hidden * (hidden // 2)  # q and o; k and v of half the heads
    layer = attention + 3 * hidden * inner
    tokens = 10
    linear = (
        4 * layer + (layer + hidden * inner) + 2 * hidden * vocabulary
    )  # 4 forward; back: 1 layer and one down_proj
    scores = 2 * tokens**2 * hidden * (4 + 2)
    adapters = 6 * tokens * flops.RANK * 6 * (hidden + inner)
    assert flops.count_gradient(network, tokens)[0] == 2 * tokens * linear + scores + adapters
    width = 16
    encoder = 2 * (4 * width * width + 2 * width * 2 * width)
    assert flops.count_embedder(tiny_embedder_folder, tokens)[0] == 2 * tokens * encoder + 4 * tokens**2 * width * 2
    found = flops.count(tiny_model_folder, tiny_embedder_folder, tokens)
    assert sum(p.per_token for p in found.products) * tokens == 2 * tokens * (linear + encoder)
    assert found.plain == found.gradient == flops.count_gradient(network, tokens)[0]

    # Gradients of the uppermost layer's last projection alone: backward goes no further than that.
    last = find_projections(network)[-1]
    found = flops.count(tiny_model_folder, tiny_embedder_folder, tokens, {last.name_b})
    linear -= layer
    scores = 2 * tokens**2 * hidden * 4
    adapters = 2 * tokens * flops.RANK * (6 + 2) * (hidden + inner)
    assert found.gradient == 2 * tokens * linear + scores + adapters < found.plain


# ── a million rows ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_growth_is_an_exponent_and_what_should_not_grow_is_marked():
    from benchmarks import rows

    assert rows.exponent((1_000, 0.2), (10_000, 0.2)) == 0
    assert rows.exponent((1_000, 0.2), (10_000, 2.0)) == pytest.approx(1)
    assert rows.exponent((1_000, 4.0), (8_000, 1.0)) == pytest.approx(-2 / 3)

    def column(number, seconds, peak_bytes):
        ran = Ran(9.0, 9.0, peak_bytes, "")
        return rows.Column(number, found={step.name: (ran, {"seconds": 9.0, "cpu_s": seconds}) for step in rows.STEPS})

    lines = rows.growth([column(1_000, 1.0, 10**7), column(10_000, 10.0, 10**7 + 9_000 * 900)]).splitlines()
    assert len(lines) == 2 * (len(rows.STEPS) + 2) + 3
    for step, seconds, memory in zip(rows.STEPS, lines[2:], lines[-len(rows.STEPS) :], strict=False):
        assert seconds.split("|")[1].strip() == memory.split("|")[1].strip() == step.name
        assert seconds.endswith("as it may |" if step.seconds == "linear" else "**grows** |"), seconds
        assert memory.endswith("as it may |" if step.memory in ("embeddings", "graph") else "**grows** |"), memory
    short = [column(1_000, 1e-3, 10**7), column(10_000, 1e-3 + 9_000 * 30e-9, 10**7)]
    for step, seconds in zip(rows.STEPS, rows.growth(short).splitlines()[2:], strict=False):
        assert seconds.endswith("**grows** |" if step.seconds == "constant" else "as it may |"), seconds
        assert ("rows^0.10, 30 ns a row" in seconds) == (step.seconds in rows.NANOSECONDS), seconds
    one = rows.growth([column(1_000, 1.0, 10**7)])
    assert "grows** |" not in one and "as it may" not in one


def test_every_operation_on_synthetic_rows_does_what_it_is_timed_for(tmp_path, monkeypatch):
    import os

    from benchmarks import rows, rowwork

    monkeypatch.setenv("REGRAD_STATE", str(tmp_path / "state"))
    monkeypatch.setattr("regrad_cli.bank.files.System.fsync", staticmethod(os.fstat))
    monkeypatch.delenv("REGRAD_INDEX_FROM", raising=False)
    said = []

    class Inside(bench.Bench):
        """Does in this process what a benchmark starts processes for."""

        def python(self, module, *arguments):
            with monkeypatch.context() as patched:
                patched.setenv("REGRAD_INDEX_FROM", "")  # an operation sets it for its own process
                clock, (name, folder, *given) = rowwork.Clock(), arguments
                counted = rowwork.OPERATIONS[name](clock, Path(folder), *rowwork.given(given))
            said.append((name, counted))
            return Ran(1.0, 1.0, 10**6, json.dumps({"seconds": clock.seconds, "cpu_s": clock.cpu_s} | counted))

        def run(self, *command, given=""):
            return Ran(0.1, 0.1, 10**6, "")

    options = bench.Options(rows=(512, 1024), graph_rows=512)
    result = rows.run(Inside(tmp_path, options), options)
    assert not list(tmp_path.glob("rows-*"))
    asked = {name for name, _ in said}
    assert asked == set(rowwork.OPERATIONS)
    for name, counted in said:
        assert counted.get("right", 1) == 1 and counted.get("findings", 0) == 0 and counted.get("recall", 1) == 1, name
    of = dict(said)  # the last of each, on the larger bank
    assert of["ingest"].items() >= {"documents": 128, "passages": 1024, "dead": 0}.items()
    assert of["diff"] == {"removed": 1, "added": 0} and of["removing"] == {"passages": 8}
    assert of["reading"] == {"passages": 1032} and of["holding"]["passages"] == 8 and of["verifying"]["rows"] == 1032
    assert of["compacting"] == {"shards": 1, "rewritten": 0}
    assert [figure.met for figure in result.figures].count(None) >= 2  # no graph on the larger bank, no target
    assert "not run" in result.more and "1,024 rows" in result.more
    assert "No graph above 512 rows" in " ".join(result.notes)


def test_synthetic_rows_are_laid_out_as_the_codec_would_lay_them_out():
    from benchmarks.made_rows import KINDS, rows, settings
    from regrad_cli.learn.rows import layout_of, widths

    for kind in KINDS:
        made_for = settings(kind)
        own = widths(made_for.codec, made_for.tensors, made_for.segments, made_for.embedding_dim)
        assert own == (made_for.code_bytes, made_for.scale_count)
        _, _, codes, scales, _ = rows(made_for, 0, 2)
        assert len(layout_of(made_for).split(codes, scales).owners) == 2 * made_for.segments
    assert settings("starter").code_bytes + 2 * settings("starter").scale_count == 179_364
    first, again, other = (rows(settings("small"), block, 16) for block in (3, 3, 4))
    assert first[0] == again[0] and all((a == b).all() for a, b in zip(first[2:], again[2:], strict=True))
    assert len({passage.training_text for passage in first[0] + other[0]}) == 32
    assert len({passage.document for passage in first[0]}) == 2


def test_an_operation_is_a_process_that_says_what_it_took(tmp_path, monkeypatch):
    for name, value in bench.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    place = bench.Bench(tmp_path, bench.Options())
    ran = place.python("rowwork", "ingest", tmp_path, "256", "small")
    assert json.loads(ran.stdout)["passages"] == 256 and json.loads(ran.stdout)["seconds"] > 0


def test_the_peak_memory_of_ingests_of_several_sizes_is_told_a_passage(tmp_path, monkeypatch):
    from benchmarks import memory
    from benchmarks.bench import Bench, Options

    began = []

    def ingest(place: Bench, bank: Path, begin: int, count: int) -> Ran:
        began.append((begin, count, os.environ["REGRAD_INDEX_FROM"]))
        return Ran(1.0, 1.0, 1000 * count + 5_000_000, "")

    monkeypatch.setattr(memory, "_ingest", ingest)
    monkeypatch.setattr(Bench, "python", lambda *_: None)
    monkeypatch.setattr(Bench, "regrad", lambda *_: (tmp_path / "tiny.gbank").mkdir())
    found = memory.run(Bench(tmp_path, Options(sizes=(10, 20))), Options(sizes=(10, 20)))
    assert began == [(0, 10, "1000000000000"), (0, 20, "1000000000000"), (20, 8, "1")]  # the graph is built apart
    more = found.figures[2]
    assert more.value == 1000 and more.met is False
    assert len({record["text"] for record in memory.records(0, 3000)}) == 3000
