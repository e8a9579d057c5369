"""One document → passages that fit the model's window. Knows text; knows no files, no tokenizer and no bank.

A passage ends where the text allows it: at a heading, else a paragraph, else a list item or table row, else a
sentence, else a line, else a word, else between two tokens. The document is tokenised once, in blocks, for the
places of its tokens; each passage is tokenised once more for its true count, since tokens differ at borders. Linear.

A passage's title is the document's, with the headings above its text (`Title › Chapter › Section`): those that its own
text does not begin with, that the title does not repeat, the innermost two, and as many as a quarter of the tokens
holds. So a document's first passage carries the plain title, and later parts of a long section still name it.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from regrad_cli.markdown import FENCE, UNDERLINE, heading, plain_heading
from regrad_cli.records import Document, Passage, training_text

TokenSpans = Callable[[str], list[tuple[int, int]]]

SENTENCE, ITEM, PARAGRAPH = 1, 2, 3  # strengths of a border; headings part sections, which come first
ITEM_LINE = re.compile(r"[ \t]*(?:[-*+•‣◦–][ \t]|\d{1,3}[.)][ \t]|[A-Za-z][.)][ \t]|\|)")
BLOCK_CHARS = 50_000  # tokenised at a time: some tokenizers take a whole text as one word
PROSE_CHARS = 10_000  # split into sentences at a time: sentencex is quadratic in unclosed quotes
JOINERS = "\u200d\ufe0e\ufe0f"
MIN_TOKENS = 16  # below this, a title and one emoji of a byte-level tokenizer do not fit


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of text under one heading, or under several short ones: text[start:end].

    path    the headings above its own: what its first passage's title names
    inside  the headings that hold where its text ends: what its later passages' titles name
    body    False where there is nothing but headings
    """

    start: int
    end: int
    level: int
    path: tuple[str, ...]
    inside: tuple[str, ...]
    body: bool


@dataclass(slots=True)
class Outline:
    """Sections, and the borders inside them: border i lets text end at `ends[i]` and go on at `starts[i]`."""

    sections: list[Section]
    ends: list[int]
    starts: list[int]
    strengths: list[int]


def split(
    document: Document, token_spans: TokenSpans, *, max_tokens: int = 192, overlap: int = 24
) -> Iterator[Passage]:
    """The document's passages, in order.

    token_spans  text → (start, end) characters of each token, the model's own tokenizer
    max_tokens   no passage's `training_text` has more; at least 16
    overlap      up to so many tokens of whole sentences are repeated from the passage before, never over a heading;
                 at most a third of max_tokens
    yields       passages with text == document.text[offset : offset + len(text)]; each non-space character is in one
    raises       ValueError if max_tokens < 16 or overlap < 0
    """
    if max_tokens < MIN_TOKENS or overlap < 0:
        raise ValueError(f"passages need max_tokens ≥ {MIN_TOKENS} and overlap ≥ 0")
    overlap = min(overlap, max_tokens // 3)
    text, title = document.text, " ".join(document.title.split())
    outline = read_outline(text)
    tokens = Tokens(text, token_spans)
    cutter = Cutter(text, outline, tokens, Titles(title, token_spans, max_tokens // 4), max_tokens, overlap)
    ordinal = 0
    for section in merged(outline.sections, tokens, max_tokens):
        for start, stop, line, count in cutter.cut(section):
            yield Passage(document.id, document.source, line, ordinal, start, count, text[start:stop])
            ordinal += 1


# ── what the text is made of ────────────────────────────────────────────────────────────────────────────────────────


def read_outline(text: str) -> Outline:
    """Headings, paragraphs, items and sentences of a text, by one pass over its lines."""
    headings: list[tuple[int, int, int, str]] = []  # where the heading starts and its text goes on, level, words
    borders: dict[int, int] = {}  # where text goes on → strength
    prose: list[tuple[int, int]] = []
    fence, position, lone = "", 0, None  # lone: a paragraph's first line, which an underline would make a heading
    blank, item, row, closed = True, False, False, True  # of the line before; closed: no cut after it
    for line in text.split("\n"):
        start, position = position, position + len(line) + 1
        if not line or line.isspace():
            blank, lone = True, None
            continue
        first = start + len(line) - len(line.lstrip())
        mark = FENCE.match(line)
        found = None if fence or mark else heading(line)
        if lone is not None and UNDERLINE.match(line):
            found, first = (1 if "=" in line else 2, plain_heading(text[lone:start])), lone
            borders.pop(lone, None)
        if found is not None:
            headings.append((first, position, *found))
            blank, item, row, closed, lone = True, False, False, True, None
            continue
        plain = not fence and not mark
        is_row = plain and (line.count("|") > 1 or "\t" in line.strip())
        is_item = plain and not is_row and ITEM_LINE.match(line) is not None
        rule = is_row and not line.strip("|:-+= \t")
        strength = 0
        if fence:
            strength = SENTENCE if blank else 0  # a blank line in code parts less than one in prose
        elif blank:
            strength = ITEM if is_item and item else PARAGRAPH
        elif is_item or is_row or row or mark:
            strength = ITEM
        if strength and not closed and not rule:  # a heading stays with what follows, a table's head with its first row
            borders[first] = strength
        if plain and not is_row:
            if prose and not blank and not is_item and prose[-1][1] == start:
                prose[-1] = (prose[-1][0], position)
            else:
                prose.append((start, position))
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence):
            fence = ""
        lone = first if blank and plain and not is_row and not is_item else None
        blank, item, row, closed = False, is_item or (item and not blank), is_row, rule
    for place in sentences(text, prose):
        borders.setdefault(place, SENTENCE)
    starts = sorted(borders)
    ends = [last_of(text, 0, place) for place in starts]
    return Outline(sections_of(text, headings), ends, starts, [borders[place] for place in starts])


def last_of(text: str, start: int, end: int) -> int:
    """Where text[start:end] ends without its trailing whitespace."""
    while end > start and text[end - 1].isspace():
        end -= 1
    return end


def first_of(text: str, start: int, end: int) -> int:
    """Where text[start:end] begins without its leading whitespace."""
    while start < end and text[start].isspace():
        start += 1
    return start


def sentences(text: str, prose: list[tuple[int, int]]) -> Iterator[int]:
    """Where a sentence starts inside the given stretches.

    sentencex: MIT, in Rust, offsets in characters, many scripts' full stops; 60 MB/s where pysbd and syntok ran at
    0.3 MB/s and left out no fewer abbreviations (docs/readers.md).
    """
    from sentencex import get_sentence_boundaries

    for begin, end in prose:
        while begin < end:
            stop = min(end, begin + PROSE_CHARS)
            if stop < end:
                space = max(text.rfind(" ", begin, stop), text.rfind("\n", begin, stop))
                stop = space + 1 if space > begin else stop
            for border in get_sentence_boundaries("en", text[begin:stop]):
                place = first_of(text, begin + border["start_index"], stop)
                if begin < place < stop:
                    yield place
            begin = stop


def sections_of(text: str, headings: list[tuple[int, int, int, str]]) -> list[Section]:
    """The text between headings, each with the path of headings above it; stretches of white space are left out."""
    found = [Section(0, headings[0][0] if headings else len(text), 0, (), (), True)]
    above: list[tuple[int, str]] = []
    for number, (start, goes_on, level, words) in enumerate(headings):
        end = headings[number + 1][0] if number + 1 < len(headings) else len(text)
        while above and above[-1][0] >= level:
            above.pop()
        body = first_of(text, min(goes_on, end), end) < end
        path = tuple(name for _, name in above)
        found.append(Section(start, end, level, path, (*path, words), body))
        above.append((level, words))
    return [section for section in found if first_of(text, section.start, section.end) < section.end]


# ── cutting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Tokens:
    """Where a text's tokens end, for counts of any stretch without tokenising it again. Counts are near, not exact."""

    def __init__(self, text: str, token_spans: TokenSpans) -> None:
        self.ends: list[int] = []
        begin = 0
        while begin < len(text):
            stop = begin + BLOCK_CHARS
            for gap in ("\n\n", "\n", " "):
                place = text.rfind(gap, begin + BLOCK_CHARS // 2, stop)
                if place > 0 and stop < len(text):
                    stop = place
                    break
            self.ends += sorted(begin + e for s, e in token_spans(text[begin:stop]) if e > s)
            begin = stop

    def count(self, start: int, end: int) -> int:
        return bisect_right(self.ends, end) - bisect_right(self.ends, start)

    def reach(self, start: int, end: int, budget: int) -> int:
        """How far at most `budget` tokens from `start` go, up to `end`; a character of several tokens stays whole."""
        first, after = bisect_right(self.ends, start), bisect_right(self.ends, end)
        if after - first <= budget:
            return end
        last = first + budget - 1
        while last >= first and self.ends[last] == self.ends[last + 1]:
            last -= 1
        return self.ends[last] if last >= first else start


class Titles:
    """The first line of passages: the document's title with the headings above, in no more than `room` tokens."""

    def __init__(self, title: str, token_spans: TokenSpans, room: int) -> None:
        self.title, self.token_spans, self.room = title, token_spans, room
        self.known: dict[tuple[str, ...], tuple[str, int]] = {}

    def line(self, path: tuple[str, ...]) -> tuple[str, int]:
        """(title, its tokens with the line's end) for a passage below the headings `path`."""
        if path not in self.known:
            self.known[path] = self._line(path)
        return self.known[path]

    def _line(self, path: tuple[str, ...]) -> tuple[str, int]:
        told = bool(path) and self.title.casefold().startswith(path[0].casefold())
        names = [name for name in dict.fromkeys(path[1:] if told else path) if name][-2:]
        for kept in range(len(names), -1, -1):
            line = " › ".join(part for part in (self.title, *names[len(names) - kept :]) if part)
            if (count := self._count(line)) <= self.room:
                return line, count
        line, keep = self.title, self.room
        while line and (count := self._count(line)) > self.room:
            spans = self.token_spans(line)
            keep = min(keep, len(spans)) - 1
            line = line[: spans[keep][0]] if keep > 0 else ""
            line = (line.rsplit(" ", 1)[0] if " " in line else line).rstrip()
        return line, self._count(line)

    def _count(self, line: str) -> int:
        return len(self.token_spans(line + "\n")) if line else 0


def merged(sections: list[Section], tokens: Tokens, max_tokens: int) -> Iterator[Section]:
    """Sections, short neighbours made one: a heading with no text of its own goes with what follows; a section below a
    quarter of the window goes with its neighbour of no higher rank, while both fill no more than half of it."""
    waiting: Section | None = None
    for section in sections:
        if waiting is not None:
            both = tokens.count(waiting.start, section.end)
            least = min(tokens.count(one.start, one.end) for one in (waiting, section))
            short = least < max_tokens // 4 and both <= max_tokens // 2 and section.level >= waiting.level
            if short or not waiting.body:
                shared = [one for one, other in zip(waiting.path, section.path, strict=False) if one == other]
                level = min(waiting.level, section.level)
                section = Section(
                    waiting.start, section.end, level, tuple(shared), section.inside, waiting.body or section.body
                )
            else:
                yield waiting
        waiting = section
    if waiting is not None:
        yield waiting


@dataclass(slots=True)
class Cutter:
    """Cuts sections of one text into stretches that fit."""

    text: str
    outline: Outline
    tokens: Tokens
    titles: Titles
    max_tokens: int
    overlap: int

    def cut(self, section: Section) -> Iterator[tuple[int, int, str, int]]:
        """(start, end, title, tokens of the training text) of each passage of a section."""
        fresh, end = first_of(self.text, section.start, section.end), last_of(self.text, section.start, section.end)
        begin, path = fresh, section.path
        while fresh < end:
            begin, stop, line, count = self._fit(begin, fresh, end, path)
            yield begin, stop, line, count
            before, fresh, path = begin, first_of(self.text, stop, end), section.inside
            begin = self._overlapped(before, stop, fresh)

    def _fit(self, begin: int, fresh: int, end: int, path: tuple[str, ...]) -> tuple[int, int, str, int]:
        """The longest passage from `begin` whose true token count is within the limit, and that goes past `fresh`."""
        line, cost = self.titles.line(path)
        budget = self.max_tokens - cost
        while True:
            stop = last_of(self.text, begin, self._choose(begin, fresh, end, budget))
            count = len(self.titles.token_spans(training_text(line, self.text[begin:stop])))
            if count <= self.max_tokens and stop > fresh:
                return begin, stop, line, count
            budget -= max(1, count - self.max_tokens)
            if stop > fresh and budget > 0:
                continue
            budget = self.max_tokens - cost
            if begin < fresh:
                begin = fresh  # without what is repeated
            elif stop > begin + 1:
                end = begin + (stop - begin) // 2  # one token there, too many by itself
            elif line:
                line, cost, budget = "", 0, self.max_tokens
            else:  # one character of more tokens than the limit: no tokenizer does this, and no text may be lost
                return begin, begin + 1, line, count

    def _choose(self, begin: int, fresh: int, end: int, budget: int) -> int:
        """Where a passage from `begin` of at most `budget` tokens had best end; `fresh` if it cannot go past that."""
        furthest = self.tokens.reach(begin, end, budget)
        if furthest >= end:
            return end
        if furthest <= fresh:
            return fresh + 1 if begin == fresh else fresh
        outline, total = self.outline, self.tokens.count(begin, end)
        least, aim = budget // 2, budget
        if total <= 2 * budget - self.overlap - 8:  # two passages hold the rest: halves, not a whole and a crumb
            least, aim = max(total - budget + self.overlap + 8, total // 3), (total + 1) // 2
        low, near = self.tokens.reach(begin, end, least), self.tokens.reach(begin, end, aim)
        first, after = bisect_right(outline.starts, fresh), bisect_right(outline.ends, furthest)
        if first < after:
            full = [place for place in range(first, after) if outline.ends[place] >= low]
            best = max(
                full or [after - 1], key=lambda place: (outline.strengths[place], -abs(outline.ends[place] - near))
            )
            return outline.ends[best]
        return self._choose_inside(fresh, max(fresh, self.tokens.reach(begin, end, budget // 4)), furthest)

    def _choose_inside(self, fresh: int, quarter: int, furthest: int) -> int:
        """The same where no sentence ends: a line past a quarter (sooner, it would be a heading alone), a word, else
        any character that the next does not modify."""
        text = self.text
        if (place := text.rfind("\n", quarter + 1, furthest + 1)) > 0:
            return place
        for place in range(furthest, fresh, -1):
            if text[place].isspace():
                return place
        for place in range(furthest, max(fresh, furthest - 16), -1):
            if not (unicodedata.combining(text[place]) or text[place] in JOINERS or text[place - 1] == "\u200d"):
                return place
        return furthest

    def _overlapped(self, before: int, stop: int, fresh: int) -> int:
        """Where the next passage starts: at `fresh`, or up to `overlap` tokens of whole sentences before it."""
        starts = self.outline.starts
        place, begin = bisect_left(starts, fresh), fresh
        if place == len(starts) or starts[place] != fresh or self.outline.strengths[place] == ITEM:
            return fresh  # the cut was inside a sentence, or between items and rows, each of which stands alone
        while place > 0 and starts[place - 1] > before and self.tokens.count(starts[place - 1], stop) <= self.overlap:
            place -= 1
            begin = starts[place]
        return begin
