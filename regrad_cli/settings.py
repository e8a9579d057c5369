"""Settings and their precedence: flag, REGRAD_* variable, bank, the user's config file, default. Standard library only.

Knows no terminal and no bank: what a bank was made with is handed in as plain values.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from regrad_cli.errors import UsageProblem

MODES = ("regrad", "both", "rag", "direct")
COMBINES = COMBINE_AUTO, COMBINE_LIKELIEST, COMBINE_SUM = "auto", "likeliest", "sum"
SEARCHES = ("auto", "fused", "dense", "lexical")
DTYPES = ("auto", "fp32", "bf16", "fp16")
MOST = 1_000_000_000  # of a whole number: what is more was meant as "all", or is a slip
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing that can be set, by flag, variable, config file or (where `of_bank`) by the bank itself.

    kind       "text", "int", "float", "bool", "choice", "device" or "score" (a number, "auto" or "none")
    minimum    smallest value of a number
    """

    name: str
    default: Any
    kind: str
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    of_bank: bool = False

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return f"REGRAD_{self.name.upper()}"

    def parse(self, value: Any, where: str) -> Any:
        """`value`, from a flag, a variable's text or TOML, as this setting's type.

        raises  UsageProblem naming `where` it was set
        """
        if self.kind == "bool":
            return self._bool(value, where)
        if self.kind == "score" and value in ("auto", "none"):
            return None if value == "none" else value
        if self.kind in ("int", "float", "score"):
            return self._number(value, where)
        if not isinstance(value, str) or not value:
            raise UsageProblem(f"{where}: {self.name} takes text, not {value!r}", "leave it out, or name something")
        if self.kind == "choice" and value not in self.choices:
            near = get_close_matches(value, self.choices, 1)
            hint = f"did you mean '{near[0]}'?" if near else ""
            raise UsageProblem(f"{where}: {self.name} is one of {', '.join(self.choices)}, not '{value}'", hint)
        if self.kind == "device" and not _DEVICE.fullmatch(value):
            raise UsageProblem(f"{where}: '{value}' is no device", "use auto, cpu, cuda, cuda:N or mps")
        return value

    def _bool(self, value: Any, where: str) -> bool:
        if isinstance(value, bool):
            return value
        text = str(value).lower()
        if text not in _TRUE + _FALSE:
            raise UsageProblem(f"{where}: {self.name} is true or false, not '{value}'")
        return text in _TRUE

    def _number(self, value: Any, where: str) -> int | float:
        kind: type[int] | type[float] = int if self.kind == "int" else float
        wanted = {"int": "a whole number", "score": "auto, none or a number"}.get(self.kind, "a number")
        if self.minimum is not None:
            wanted += f" of at least {self.minimum:g}"
        wrong = UsageProblem(f"{where}: {self.name} is {wanted}, not '{value}'")
        if isinstance(value, bool) or (isinstance(value, float) and kind is int):
            raise wrong
        try:
            number = kind(value)
            is_finite = math.isfinite(number)
        except (TypeError, ValueError, OverflowError):  # the last for a whole number that no float can be
            raise wrong from None
        if not is_finite or (self.minimum is not None and number < self.minimum):
            raise wrong
        if kind is int and number > MOST:
            raise UsageProblem(f"{where}: {self.name} is at most {MOST:,}, not '{value}'")
        return number


SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting("bank", None, "text", "the bank to use; otherwise .gbank here or in a parent folder"),
        Setting("model", "starter", "text", "language model of a new bank", of_bank=True),
        Setting("prior", None, "text", "prior of a new bank, a file", of_bank=True),
        Setting("embedder", "minilm", "text", "embedder of a new bank", of_bank=True),
        Setting("codec", "auto", "text", "how gradients are stored in a new bank", of_bank=True),
        Setting("chunk_tokens", 192, "int", "most tokens of a passage in a new bank", minimum=16, of_bank=True),
        Setting("chunk_overlap", 24, "int", "tokens that neighbours share in a new bank", minimum=0, of_bank=True),
        Setting("keep_text", True, "bool", "whether a new bank keeps the passages' text", of_bank=True),
        Setting("device", "auto", "device", "where to compute"),
        Setting("dtype", "auto", "choice", "number format to compute in", choices=DTYPES),
        Setting("mode", "regrad", "choice", "how `ask` answers", choices=MODES),
        Setting(
            "k", None, "int", "passages that are retrieved; otherwise as many as the prior was made for", minimum=1
        ),
        Setting("gamma", 1.0, "float", "strength of the passages' gradients", minimum=0),
        Setting("search", "auto", "choice", "how passages are found", choices=SEARCHES),
        Setting("combine", COMBINE_AUTO, "choice", "what is made of several passages' gradients", choices=COMBINES),
        Setting("min_score", "auto", "score", "least score of a passage that is used"),
        Setting("max_tokens", 128, "int", "longest answer, in tokens", minimum=1),
    )
}


@dataclass(frozen=True, slots=True)
class Resolved:
    """A value in force and where it came from: "flag", the variable's name, "bank", the config file, or "default"."""

    value: Any
    origin: str


class Settings:
    """The settings of one invocation.

    environ      the environment
    config       what `read_config` returned
    bank_values  what the bank was made with, by setting name; set once a bank is open
    """

    def __init__(self, environ: Mapping[str, str], config: Mapping[str, Any], config_file: Path | None = None) -> None:
        self.environ = environ
        self.config = config
        self.config_file = config_file
        self.bank_values: dict[str, Any] = {}

    def resolve(self, name: str, flag: Any = None) -> Resolved:
        """The value in force. `flag` is what the command line gave, None where it gave nothing.

        raises  UsageProblem where the place that decides holds something this setting cannot be
        """
        setting = SETTINGS[name]
        if flag is not None:
            return Resolved(setting.parse(flag, f"--{name.replace('_', '-')}" if len(name) > 1 else f"-{name}"), "flag")
        if self.environ.get(setting.variable):
            return Resolved(setting.parse(self.environ[setting.variable], setting.variable), setting.variable)
        if setting.of_bank and name in self.bank_values:
            return Resolved(self.bank_values[name], "bank")
        if name in self.config:
            return Resolved(setting.parse(self.config[name], str(self.config_file)), str(self.config_file))
        return Resolved(setting.default, "default")

    def value(self, name: str, flag: Any = None) -> Any:
        """The value in force, without its origin."""
        return self.resolve(name, flag).value


def read_config(file: Path) -> dict[str, Any]:
    """The user's config file as {setting name: value}; empty where there is none. Dashes in names read as underscores.

    raises  UsageProblem where the file is not TOML, cannot be read, or names a setting that does not exist
    """
    try:
        data = tomllib.loads(file.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError) as error:  # TOML's own error is a ValueError, as that of a very long number
        raise UsageProblem(f"{file} is not TOML: {error}", "mend or remove it; every setting has a default") from None
    except OSError as error:
        raise UsageProblem(f"{file} cannot be read: {error.strerror}", "mend its permissions or remove it") from None
    config = {name.replace("-", "_"): value for name, value in data.items()}
    for name, value in config.items():
        if name not in SETTINGS:
            near = get_close_matches(name, SETTINGS, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"settings are: {', '.join(SETTINGS)}"
            raise UsageProblem(f"{file} sets '{name}', which is no setting", hint)
        SETTINGS[name].parse(value, str(file))
    return config


def bank_values(settings: Any) -> dict[str, Any]:
    """What a bank's records.BankSettings decide, under the names used here."""
    return {
        "model": settings.model_name,
        "prior": settings.prior_name,
        "embedder": settings.embedder_name,
        "codec": str(settings.codec),
        "chunk_tokens": settings.chunk_tokens,
        "chunk_overlap": settings.chunk_overlap,
        "keep_text": settings.keep_text,
    }
