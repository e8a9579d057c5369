"""Markdown's marks: front matter, headings, code fences. Knows lines of text; knows no files and no passages."""

from __future__ import annotations

import contextlib
import html
import re
from typing import Any

from regrad_cli.characters import clean_title

UNDERLINE = re.compile(r"^ {0,3}(=+|-{3,})[ \t]*$")
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")


def front_matter(text: str) -> tuple[str, str]:
    """(its title or "", the text after it); ("", text) where the text has none. YAML between ---, TOML between +++."""
    match = re.match(r"(---|\+\+\+)[ \t]*\n(.*?\n)??(?:\1|\.\.\.)[ \t]*(?:\n|\Z)", text, re.S)
    if match is None:
        return "", text
    block = match[2] or ""
    values: Any = None
    if match[1] == "+++":
        import tomllib

        with contextlib.suppress(ValueError, RecursionError):
            values = tomllib.loads(block)
    else:
        import yaml

        try:
            values = yaml.load(block, Loader=yaml.BaseLoader)  # text, lists and mappings: nothing is constructed
        except (yaml.YAMLError, RecursionError):  # much YAML in the wild is not quite YAML
            values = dict(re.findall(r"^(\w+):[ \t]+(\S.*)$", block, re.M))
    if not isinstance(values, dict) or (block.strip() and not values):
        return "", text  # a rule, a paragraph and another rule: no front matter
    title = values.get("title", "")
    return (clean_title(title.strip("'\"")) if isinstance(title, str) else ""), text[match.end() :]


def heading(line: str) -> tuple[int, str] | None:
    """(level, words) of a Markdown heading that starts with #, or None. Linear in the line."""
    match = re.match(r" {0,3}(#{1,6})[ \t]+(\S.*)", line)
    if match is None:
        return None
    words = match[2].rstrip()
    closing = words.rstrip("#")
    return len(match[1]), plain_heading(closing.rstrip() if closing != words and closing[-1:] in " \t" else words)


def plain_heading(markup: str) -> str:
    """A heading's words without Markdown's marks: links become their text, emphasis and code lose their signs."""
    markup = markup[:1000]
    markup = re.sub(r"!?\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])", r"\1", markup)
    markup = re.sub(r"(\*\*|__|`+)(.+?)\1", r"\2", markup)
    markup = re.sub(r"(?<!\w)([*_])(\S(?:.*?\S)?)\1(?!\w)", r"\2", markup)
    return clean_title(html.unescape(re.sub(r"\s*\{#[^}]*\}$", "", re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markup))))


def first_heading(text: str) -> str:
    """The words of the first Markdown heading outside code, or ""."""
    fence, above = "", ""
    for line in text.split("\n"):
        if mark := FENCE.match(line):
            if not fence:
                fence = mark[1]
            elif mark[1].startswith(fence):
                fence = ""
        elif not fence and (found := heading(line)):
            return found[1]
        elif not fence and above and UNDERLINE.match(line):
            return plain_heading(above)
        above = line.strip() if not fence and not above and "|" not in line else ""
    return ""
