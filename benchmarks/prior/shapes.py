"""Holds the shapes that the cloze rules read a passage by: dates, counts, names; knows no question."""


def _words(text: str) -> list[str]:
    return text.split()


MONTHS = _words("January February March April May June July August September October November December")
MONTH = f"(?:{'|'.join(MONTHS)})"
YEAR = r"(?:1[0-9]{3}|20[0-2][0-9])"
COUNT = (
    r"(?:\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|"
    r"fifteen|twenty|thirty|forty|fifty|sixty)(?: (?:hundred|thousand|million|billion|percent))?"
)
UPPER = "A-ZÀ-ÖØ-ÞĆČĐŁŚŠŻŽŐİ"
CAP = rf"[{UPPER}](?:[\w-]|[.'’](?=\w)(?![sS]\b))*\w"
INITIAL = rf"[{UPPER}]\."
NAME = rf"{CAP}(?: (?:(?:of|de|van|von|of the) )?(?:{CAP}|{INITIAL}(?= [{UPPER}]))){{0,3}}"
MAKERS_NAME = rf"{NAME}(?: and {NAME})?"
DATE = rf"{YEAR}|\d{{1,2}} {MONTH},? {YEAR}|{MONTH} {YEAR}|{MONTH} \d{{1,2}}(?:, {YEAR})?"
# Capitalised words that are no answer: they open sentences, or say nothing on their own.
NO_NAME = frozenset(
    _words(
        """a an the this that these those it its he she they we i his her their our in on at by for from with as
        after before during while when where who which what although though but and or if since because
        however there here some many most all both each other another such no not one two three see list
        mr mrs dr sir lord king queen american british english french german one-time us uk new old
        north south east west"""
    )
)
PRONOUNS = frozenset(_words("it he she they we i this that these those his her their its who which there them him"))
COMMON = frozenset(
    _words(
        """the of and to in a is was were are for on with as by at from that it he she they this his her their its
        an or be been has have had which who also not but into than after before during while when where
        there then some"""
    )
)


def is_name(text: str) -> bool:
    """Whether capitalised words can be the name of something: not "The", not "British", no initials."""
    first, *more = text.split()
    first = first.lower().strip(".")
    if more:
        return first not in NO_NAME - {"new", "north", "south"}
    return first not in NO_NAME and len(first) > 2
