"""Makes plain wh-questions from sentences whose order of words is safe to keep; knows one sentence and its title."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.prior.shapes import (
    COMMON,
    COUNT,
    DATE,
    MAKERS_NAME,
    MONTHS,
    NAME,
    NO_NAME,
    PRONOUNS,
    UPPER,
    YEAR,
    is_name,
)

_MAKERS = {
    "directed": "who directed {t}", "written": "who wrote {t}", "composed": "who composed {t}",
    "produced": "who produced {t}", "created": "who created {t}", "designed": "who designed {t}",
    "sung": "who sang {t}", "invented": "who invented {t}", "performed": "who performed {t}",
    "recorded": "who recorded {t}", "published": "who published {t}", "developed": "who developed {t}",
}  # fmt: skip
_IRREGULAR = (
    "born|built|held|written|made|sold|won|known|given|taken|begun|set|sent|shown|sung|led|brought|lost|found|put"
)
_PARTICIPLE = rf"(?:[a-z]{{2,}}ed|{_IRREGULAR})"
_WORK = (
    "film|movie|song|single|novel|book|series|sitcom|show|game|play|musical|comedy|drama|track|album|opera|ballad|"
    "thriller|story|poem|program|programme|band|magazine|comic|anime|manga|remake"
)
_BASE = {
    "won": "win", "became": "become", "began": "begin", "died": "die", "released": "release", "joined": "join",
    "moved": "move", "returned": "return", "received": "receive", "opened": "open", "closed": "close",
    "ended": "end", "started": "start", "lost": "lose", "founded": "found", "appeared": "appear", "signed": "sign",
    "published": "publish", "launched": "launch", "married": "marry", "premiered": "premiere", "debuted": "debut",
    "announced": "announce", "introduced": "introduce", "established": "establish", "reached": "reach",
    "left": "leave", "retired": "retire", "arrived": "arrive", "took": "take", "made": "make", "wrote": "write",
    "invaded": "invade", "declared": "declare", "merged": "merge", "aired": "air", "adopted": "adopt",
    "built": "build", "discovered": "discover", "completed": "complete", "acquired": "acquire", "sold": "sell",
}  # fmt: skip
_PLACE_VERBS = (
    "born|held|built|filmed|founded|located|recorded|based|buried|discovered|established|shot|raised|educated"
)


@dataclass(frozen=True)
class Made:
    """A question with its answer as it stands in the passage; `plain` when it is a wh-question by rule."""

    question: str
    answer: str
    plain: bool


def core_of(title: str) -> str:
    """The title without its bracketed part: "Small Steps (novel)" is called Small Steps in the text."""
    return re.sub(r"\s*\([^)]*\)$", "", title)


def _cased(question: str, rng: random.Random) -> str:
    return question.lower() if rng.random() < 0.5 else question[:1].upper() + question[1:].rstrip("?") + "?"


def plain(title: str, sentence: str, opening: bool, rng: random.Random) -> list[Made]:
    """Wh-questions by rules that keep the sentence's own order of words; `opening`: a title's own text has begun."""
    core = core_of(title)
    if opening:  # "It was released in 1984": the title's subject, where the text is about it
        sentence = re.sub(r"^It (?=was \w+ed |was built |was written )", f"{core} ", sentence)
    made: list[Made] = []
    for question, answer in [*_makers(title, sentence), *_roles(core, sentence, rng), *_turned(core, sentence, rng)]:
        named = question if _shares_word(title, question) else f"{question} ({title})"
        made.append(Made(_cased(named, rng), answer, True))
    return made


def _makers(title: str, sentence: str) -> Iterator[tuple[str, str]]:
    """ "X is a film directed by Y": who directed X."""
    core = re.escape(core_of(title))
    opened = re.match(rf"[\"“]?(?:The )?{core}[\"”]?(?: \([^)]*\))? (?:is|was) (?:an?|the) ", sentence)
    rest = sentence[opened.end() :] if opened else ""
    for found in re.finditer(rf"\b(\w+) by ({MAKERS_NAME})(?=[.;]|,(?! [{UPPER}])| in | for |$)", rest):
        between = rest[: found.start()]
        strays = re.search(r"\b(?:known|best|from|who|whose|of)\b", between)
        if found[1] in _MAKERS and re.search(rf"\b(?:{_WORK})\b", between) and not strays and is_name(found[2]):
            yield _MAKERS[found[1]].format(t=title), found[2]


def _roles(core: str, sentence: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """ "Y plays Z", "starring Y as Z": who plays Z in the title."""
    plays = rf"\b({NAME}) (?:plays|played|portrays|portrayed) ({NAME})(?=[.,;]| in | on |$)"
    stars = rf"\b(?:stars|starring|featuring) ({NAME}) as ({NAME})(?=[.,;]| and | in |$)"
    for found in [*re.finditer(plays, sentence), *re.finditer(stars, sentence)]:
        if is_name(found[1]) and is_name(found[2]):
            yield f"who {rng.choice(('plays', 'played'))} {found[2]} in {core}", found[1]


def _turned(core: str, sentence: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """When, where, by whom and how many, from a sentence that begins with its subject."""
    subject = r"^(?P<who>(?:The |A |An )?[\w'’\"“”&. -]{2,60}?)"
    end = r"(?=[.;]|,(?! \d)|$)"
    be = "(?P<be>was|were)"

    def read(pattern: str) -> re.Match[str] | None:
        found = re.match(f"{subject} {pattern}", sentence)
        return found if found and _is_subject(found["who"], core) else None

    def when(date: str) -> str:
        return rng.choice(("when", "in what year")) if re.fullmatch(YEAR, date) else "when"

    found = read(rf"{be} (?P<rest>{_PARTICIPLE}(?: [\w'’-]+){{0,7}}?) (?:in|on) (?P<date>{DATE}){end}")
    if found and not re.search(r" (?:by|and|or)$| and ", found["rest"]):
        yield f"{when(found['date'])} {found['be']} {_inner(found['who'])} {found['rest']}", found["date"]
    found = read(rf"{be} (?P<rest>(?:{_PLACE_VERBS})(?: and raised)?) in (?P<place>{NAME}){end}")
    if found and found["place"].split()[0] not in MONTHS:
        yield f"where {found['be']} {_inner(found['who'])} {found['rest']}", found["place"]
    found = read(rf"(?P<did>{'|'.join(_BASE)})(?P<rest>(?: [\w'’-]+){{0,8}}?) (?:in|on) (?P<date>{DATE}){end}")
    if found and " and " not in found["rest"]:
        yield f"{when(found['date'])} did {_inner(found['who'])} {_BASE[found['did']]}{found['rest']}", found["date"]
    agent = rf"by (?P<agent>{MAKERS_NAME})(?=[.;]|,(?! [{UPPER}])| in |$)"
    found = read(rf"(?P<be>was|were|is|are) (?P<rest>{_PARTICIPLE}(?: [\w'’-]+){{0,5}}?) {agent}")
    if found and is_name(found["agent"]) and not re.search(" and | by ", found["rest"]):
        yield f"who {found['be']} {_inner(found['who'])} {found['rest']} by", found["agent"]
    things = r"(?P<things>(?!more|other)(?:[a-z-]+ )?[a-z]{3,}s)(?=[.,;]| and | in |$)"
    if found := read(rf"(?P<has>has|have|had) (?P<count>{COUNT}) {things}"):
        do = {"has": "does", "have": "do", "had": "did"}[found["has"]]
        yield f"how many {found['things']} {do} {_inner(found['who'])} have", found["count"]


def _shares_word(title: str, question: str) -> bool:
    """Whether the question names the title's subject already."""
    words = {word for word in re.findall(r"\w{3,}", core_of(title).lower()) if word not in COMMON}
    return not words or bool(words & set(re.findall(r"\w{3,}", question.lower())))


def _is_subject(text: str, core: str) -> bool:
    """Whether the words can stand alone as what a question is about: a name somewhere, no pronoun, no open clause."""
    if text == core:
        return True
    words = text.replace('"', "").split()
    small = {word.lower().strip(".,'’") for word in words}
    named = any(word[0].isupper() and word.lower() not in NO_NAME for word in words)
    verbs = small & {
        "was",
        "were",
        "is",
        "are",
        "had",
        "has",
        "but",
        "and",
        "although",
        "when",
        "as",
        "in",
        "after",
        "by",
        "who",
        "to",
        "while",
        "first",
        "until",
        "on",
        "at",
        "from",
    }
    return named and not (small & PRONOUNS) and not verbs and text.count('"') % 2 == 0


def _inner(subject: str) -> str:
    """The subject within a question: its article in a small letter."""
    return re.sub(r"^(The|A|An) ", lambda match: match[0].lower(), subject)
