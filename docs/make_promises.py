"""Writes the table of docs/promises.md from the tests: `python docs/make_promises.py`. A test holds it current.

A test belongs to a promise by its name (`test_promise_07_…`, `test_promise_01_and_11_…`); those named otherwise that
also hold one are listed here.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).with_name("promises.md")
TESTS = Path(__file__).parent.parent / "tests"
BEGIN, END = "<!-- table: python docs/make_promises.py -->\n\n", "\n<!-- end of the table -->\n"


class Promise(NamedTuple):
    """What is promised now, and the tests that hold it without its number in their names."""

    number: int
    text: str
    also: tuple[str, ...] = ()


PROMISES = (
    Promise(
        1,
        "Killed at any moment of `init`, `ingest` (a move to another prior too), `bank rm` or `compact`, the bank "
        "opens at the old or the new snapshot; killed in `bank repair`, it is no worse than it was; killed in `bank "
        "pack` or `unpack`, what they write is there whole or not at all; killed in `meta-train`, it goes on to the "
        "prior that it would have made",
        ("test_ctrl_c_in_ingest_and_again_to_resume_as_a_process",),
    ),
    Promise(
        2,
        "A commit that was reported survives a power cut",
        ("test_interrupted_between_link_and_answer_a_writer_stops",),
    ),
    Promise(
        3,
        "A flipped bit in any file is noticed before a weight changes",
        (
            "test_a_damaged_hit_names_its_document_and_source",
            "test_a_damaged_hit_is_14_and_can_be_skipped",
            "test_verify_names_a_flipped_bit_and_reading_it_is_14",
            "test_of_what_nothing_else_says_the_one_row_is_lost_and_the_others_stay",
        ),
    ),
    Promise(4, "A file cut short is an error, not a crash", ("test_a_file_of_another_size_is_told_so",)),
    Promise(
        5,
        "A missing file is named; `--skip-damaged` answers from the rest and says that the answer is partial",
        (
            "test_a_damaged_newest_snapshot_is_refused_with_the_way_out",
            "test_damaged_rows_do_not_push_good_ones_out",
            "test_a_damaged_passage_is_named_or_left_out_and_said_every_time",
            "test_a_shard_without_its_embeddings_makes_every_answer_partial",
        ),
    ),
    Promise(
        6, "What a crash leaves behind is harmless and goes away", ("test_leftovers_of_a_crash_are_told_and_no_damage",)
    ),
    Promise(7, "A full disk or an I/O error at any write leaves the bank as it was and is told"),
    Promise(
        8,
        "Of two writers one waits or is refused by name; nothing is lost",
        (
            "test_a_snapshot_that_another_process_took_is_not_overwritten",
            "test_while_one_ingest_runs_another_is_refused_and_the_bank_can_be_read",
            "test_a_bank_that_is_written_to_is_11",
        ),
    ),
    Promise(9, "A dead writer's lock keeps nobody out", ("test_a_lock_file_that_was_removed_guards_nothing",)),
    Promise(
        10,
        "A reader sees one snapshot from start to end, while others ingest and compact",
        (
            "test_a_reader_that_loses_the_race_for_a_snapshot_takes_the_newest",
            "test_an_older_snapshot_answers_from_what_it_held",
            "test_a_reader_keeps_its_snapshot_through_a_move",
            "test_a_session_of_questions_keeps_its_prior_and_its_rows_through_a_move",
        ),
    ),
    Promise(
        11,
        "An ingest that was interrupted and started again ends with the same rows, bit for bit, and after `compact` "
        "with the same files, byte for byte",
        (
            "test_after_rm_and_compact_a_bank_is_what_ingesting_without_that_document_makes",
            "test_rows_do_not_depend_on_how_they_were_committed",
            "test_a_gradient_is_the_same_bits_in_any_company_and_place",
            "test_a_gradient_is_the_same_bits_however_many_workers_there_are",
            "test_on_the_starter_a_gradient_is_the_same_bits_in_any_company_and_place",
            "test_a_row_is_the_same_bits_alone_and_in_company",
            "test_a_texts_vector_has_the_same_bits_whatever_its_neighbours",
        ),
    ),
    Promise(
        12,
        "Ingesting again changes nothing",
        ("test_ingesting_again_makes_no_snapshot_and_computes_nothing", "test_ingest_again_changes_nothing"),
    ),
    Promise(
        13,
        "A `compact` that fails or is interrupted neither makes the bank grow nor loses a row; a `bank repair` leaves "
        "a bank that is no worse",
        ("test_a_damaged_row_stops_it_before_anything_changes", "test_without_room_it_does_not_begin"),
    ),
    Promise(
        14,
        "A search graph that is missing, damaged, hostile or another bank's never crashes: exact results instead",
        ("test_a_copied_bank_answers_without_its_index",),
    ),
    Promise(
        15,
        "Nothing is written outside of the folder it is meant for, whatever a packed bank holds and whatever stands in "
        "the place of a bank's files and folders",
        (
            "test_pack_replaces_a_packed_bank_only_when_told_and_nothing_else_ever",
            "test_unpack_takes_a_free_place_only",
        ),
    ),
    Promise(
        16,
        "A hostile header, manifest or line costs bounded time and memory",
        (
            "test_a_region_reads_nothing_outside_itself",
            "test_a_pipe_in_place_of_a_file_does_not_block",
            "test_hostile_lines_take_linear_time",
            "test_hostile_weights_are_an_error_with_a_way_out",
        ),
    ),
    Promise(
        17,
        "No pickle is ever loaded",
        (
            "test_no_pickle_is_named_anywhere",
            "test_a_folder_with_pickles_only_is_refused_unread_with_the_way_to_convert",
        ),
    ),
    Promise(
        18,
        "Another base model, tokenizer, prior or embedder is refused, and both are named",
        (
            "test_another_model_is_12",
            "test_a_prior_of_another_model_is_refused",
            "test_what_changes_the_mathematics_changes_its_fingerprint",
        ),
    ),
    Promise(
        19,
        "Weights and prior are the same bits after every answer, also after an exception or Ctrl-C inside it",
        ("test_model_and_prior_are_left_as_they_were", "test_an_answer_left_in_the_middle_leaves_nothing_behind"),
    ),
    Promise(
        20,
        "A newer format, or a feature that this version does not know, is refused; banks of every released format "
        "open, hold what they held and can be written to",
        ("test_the_reader_in_the_formats_page_reads_them_too", "test_every_kind_of_codec_has_a_golden_bank"),
    ),
    Promise(
        21,
        "Documents cannot forge output: what a terminal would obey is shown, and JSON stays valid",
        ("test_pieces_are_flushed_as_they_come", "test_an_answer_in_pieces_is_shown_like_the_whole"),
    ),
    Promise(
        22,
        "A loss, gradient or embedding that is not finite never enters a bank",
        ("test_a_vector_that_is_not_finite_is_refused",),
    ),
)


def tests() -> dict[str, list[str]]:
    """{a test's name: the files it is in, below tests/}, in the order of the files."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.setdefault(node.name, []).append(path.relative_to(TESTS).as_posix())
    return found


def numbers(name: str) -> set[int]:
    """The promises that a test's name tells of."""
    match = re.match(r"test_promise_((?:\d\d_)(?:and_\d\d_)*)", name)
    return {int(number) for number in re.findall(r"\d\d", match[1])} if match else set()


def table() -> str:
    """The whole table. raises KeyError for a test of PROMISES that is not there"""
    known = tests()
    rows = ["| # | promise | held by |", "| --- | --- | --- |"]
    for promise in PROMISES:
        names = [name for name in known if promise.number in numbers(name)] + list(promise.also)
        by_file: dict[str, list[str]] = {}
        for name in names:
            for file in known[name]:
                by_file.setdefault(file, []).append(f"`{name}`")
        cell = "<br>".join(f"[{file}](../tests/{file}): {', '.join(listed)}" for file, listed in by_file.items())
        rows.append(f"| {promise.number} | {promise.text} | {cell} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """The page with its table made anew."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
