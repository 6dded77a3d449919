"""When two answers are the same: as VQA compares them, and to the letter.

VQA's evaluation (Antol et al., ICCV 2015) takes case, articles, number words, punctuation and contractions off an
answer before it compares. :func:`normalise_answer` does that, and first makes one of Unicode's ways to write a
letter. Of VQA's rules two are simplified: an apostrophe is dropped from its list of contractions instead of put
into them, and the other marks become blanks wherever they stand.
"""

from __future__ import annotations

import re
import unicodedata

NUMBERS = dict(
    zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True)
)
NUMBERS |= {"none": "0"}
ARTICLES = {"a", "an", "the"}
_NOT = "ai are ca could did does do had has have is might must need sha should was were wo would".split()
_HAVE = "could might must should would i they we you".split()
_IS = "he how she somebody someone something that there what when where who why let".split()
_REST = "im youre theyre theyd theyll youd youll itd itll whod wholl howd howll maam oclock yall".split()
CONTRACTIONS = {
    *(f"{v}nt" for v in _NOT),
    *(f"{v}ve" for v in _HAVE),
    *(f"{v}s" for v in _IS),
    *_REST,
}  # no apostrophe
MARKS = set(';/[]"{}()=+\\_-><@`,?!')  # VQA's; and every other dash, bracket and quotation mark:
MARK_KINDS = {"Pd", "Ps", "Pe", "Pi", "Pf", "Pc"}
APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u00b4\u0060", "'"))


def strict_answer(text: str) -> str:
    """Case, blanks and the closing stop do not matter; all else does."""
    return " ".join(text.lower().split()).rstrip(". ")


def normalise_answer(text: str) -> str:
    """What is left of an answer for VQA to compare; where nothing is ("The."), its strict form."""
    strict = strict_answer(text)
    folded = unicodedata.normalize(
        "NFKC", unicodedata.normalize("NFKC", strict.translate(APOSTROPHES)).casefold()
    )
    folded = re.sub(r"(?<=\d),(?=\d)", "", folded)  # 12,000
    folded = re.sub(r"\.(?!\d)", "", folded)  # but 3.5
    words = "".join(" " if _is_mark(c) else c for c in folded).split()
    words = (NUMBERS.get(word, word) for word in words if word not in ARTICLES)
    plain = ((word, word.replace("'", "")) for word in words)
    kept = (bare if bare in CONTRACTIONS else word.strip("'") for word, bare in plain)
    return " ".join(word for word in kept if word) or strict


def _is_mark(c: str) -> bool:
    return c in MARKS or unicodedata.category(c) in MARK_KINDS
