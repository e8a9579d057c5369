"""Settings: precedence, parsing, and what a wrong value says."""

from pathlib import Path

import pytest

from regrad_cli.errors import UsageProblem
from regrad_cli.settings import SETTINGS, Settings, read_config

FILE = Path("/home/someone/config.toml")


def resolve(name, *, flag=None, variable=None, bank=None, config=None):
    environ = {} if variable is None else {SETTINGS[name].variable: variable}
    settings = Settings(environ, {} if config is None else {name: config}, FILE)
    settings.bank_values = {} if bank is None else {name: bank}
    found = settings.resolve(name, flag)
    return found.value, found.origin


def test_flag_beats_variable_beats_bank_beats_config_beats_default():
    everything = {"flag": "int4", "variable": "int8", "bank": "r2-int4", "config": "r3-int4"}
    expected = [("int4", "flag"), ("int8", "REGRAD_CODEC"), ("r2-int4", "bank"), ("r3-int4", str(FILE))]
    for wanted in expected:
        assert resolve("codec", **everything) == wanted
        del everything[next(iter(everything))]
    assert resolve("codec") == ("auto", "default")


def test_bank_decides_only_what_it_was_made_with():
    assert not SETTINGS["device"].of_bank
    assert resolve("device", bank="cuda", config="cpu") == ("cpu", str(FILE))


def test_an_empty_variable_is_as_good_as_none():
    assert resolve("k", variable="", config=7) == (7, str(FILE))


def test_variables_are_read_as_their_settings_type():
    assert resolve("k", variable="5") == (5, "REGRAD_K")
    assert resolve("gamma", variable="0.5") == (0.5, "REGRAD_GAMMA")
    assert resolve("keep_text", variable="no") == (False, "REGRAD_KEEP_TEXT")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("k", "0", "at least 1"),
        ("k", "9" * 23, "at most 1,000,000,000"),
        ("k", "many", "whole number"),
        ("k", "2.5", "whole number"),
        ("gamma", "nan", "a number"),
        ("gamma", "-1", "at least 0"),
        ("min_score", "inf", "a number"),
        ("mode", "rga", "regrad, both, rag, direct"),
        ("dtype", "fp8", "auto, fp32, bf16, fp16"),
        ("device", "gpu", "no device"),
        ("device", "cuda:x", "no device"),
        ("keep_text", "perhaps", "true or false"),
    ],
)
def test_a_wrong_value_names_where_it_was_set(name, value, says):
    with pytest.raises(UsageProblem) as caught:
        resolve(name, variable=value)
    assert says in caught.value.message
    assert SETTINGS[name].variable in caught.value.message


def test_a_near_miss_of_a_choice_is_suggested():
    with pytest.raises(UsageProblem) as caught:
        resolve("mode", flag="regard")
    assert caught.value.hint == "did you mean 'regrad'?"
    assert "--mode" in caught.value.message


def test_config_file_is_optional_and_takes_dashes(tmp_path):
    file = tmp_path / "config.toml"
    assert read_config(file) == {}
    file.write_text('device = "cpu"\nchunk-tokens = 64\n')
    assert read_config(file) == {"device": "cpu", "chunk_tokens": 64}


@pytest.mark.parametrize(
    ("text", "says"),
    [('devise = "cpu"', "devise"), ("k = 0", "at least 1"), ("k = true", "whole number"), ("k =", "not TOML")],
)
def test_a_wrong_config_file_is_named(tmp_path, text, says):
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(UsageProblem) as caught:
        read_config(file)
    assert says in caught.value.message
    assert str(file) in caught.value.message


def test_a_mistyped_setting_in_the_config_file_is_suggested(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('devise = "cpu"')
    with pytest.raises(UsageProblem) as caught:
        read_config(file)
    assert caught.value.hint == "did you mean 'device'?"


def test_config_file_that_is_not_utf8_is_an_error_not_a_crash(tmp_path):
    file = tmp_path / "config.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageProblem):
        read_config(file)


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 3000, "1" * 400])
def test_a_config_file_of_numbers_and_brackets_without_end_is_a_usage_problem(tmp_path: Path, value: str) -> None:
    file = tmp_path / "config.toml"
    for name in ("k", "gamma"):
        file.write_text(f"{name} = {value}\n", encoding="utf-8")
        with pytest.raises(UsageProblem):
            Settings({}, read_config(file), file).value(name)
