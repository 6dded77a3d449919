"""When two answers are the same: as the field compares them, and to the letter.

The evaluation of VQA (Antol et al., ICCV 2015) takes case, articles, number words, punctuation and contractions off
an answer before it compares. :func:`normalise_answer` does so with any script's letters, after Unicode's several
ways to write a letter have become one. Where it differs from VQA's own program:

* A mark becomes a blank wherever it stands. VQA drops all of its kind if one stands beside a blank ("x-ray - no").
* Of each contraction VQA has two spellings made one, by putting the apostrophe in. Here it is taken out of both, which
  makes the same answers equal. Not of every word: "cat's" is not "cats", nor "we're" "were".
* Quotation marks around a word do not count, single ones included; nor do dashes, brackets and stops of other
  scripts, nor characters that nobody sees. VQA knows ASCII's alone.
* An answer that is an article stays one ("A" of a multiple choice): "a" and "the" are two answers.
"""

from __future__ import annotations

import functools
import unicodedata

import regex as re

NUMBERS = {"none": "0"} | {w: str(n) for n, w in enumerate(
    "zero one two three four five six seven eight nine ten".split()
)}  # fmt: skip
ARTICLES = {"a", "an", "the"}
_CONTRACTED = {  # VQA's list by ending, without apostrophes
    "nt": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "ve": "could i might must not should they we what where who would you",
    "d": "he how it somebody someone something there they where who you",
    "ll": "how it somebody someone something they what who why you yall",
    "s": "he how somebody someone that there what when where who why",
    "re": "there they what why you",
    "dve": "he i it she somebody someone something there they we who yall you",
    "ntve": "could had might should would",
    "": "im maam oclock twas yall",
}
CONTRACTIONS = {word + end for end, words in _CONTRACTED.items() for word in words.split()}
MARKS = set(';/[]"{}()=+\\_-><@,?!') | set("−¿¡؟،؛۔。、।")  # VQA's, and other scripts'
MARK_KINDS = {"Pd", "Ps", "Pe", "Pi", "Pf", "Pc"}  # every dash, bracket, quotation mark and connector
UNSEEN = re.compile(r"(?![\u200c\u200d])[\p{Cf}\p{Default_Ignorable_Code_Point}]")  # but joiners: parts of words
SURROGATE = re.compile(r"[\ud800-\udfff]")
APOSTROPHES = str.maketrans(dict.fromkeys("‘’ʼ´`", "'"))


def is_text(text: str) -> bool:
    """Whether it is whole characters: half of one (a lone surrogate) can be neither read nor stored."""
    return not SURROGATE.search(text)


def strict_answer(text: str) -> str:
    """``text`` in lower case, with single blanks and no closing stop: all else counts. May be empty."""
    return " ".join(text.lower().split()).rstrip(". ")


@functools.lru_cache(maxsize=4096)
def normalise_answer(text: str) -> str:
    """What the field compares of an answer. Answers with one strict form have one normal form; twice changes nothing.

    Only blanks and stops come to nothing: an answer of articles alone keeps them, one of marks alone its marks.
    """
    folded = strict_answer(fold(text))
    plain = re.sub(r"(?<=\d),(?=\d)", "", folded)  # 12,000
    plain = re.sub(r"\.(?!\d)", "", plain)  # a.m., but 3.5
    words = "".join(" " if _is_mark(c) else c for c in plain).split()
    words = [_word(bare) for word in words if (bare := word.strip("'"))]
    return " ".join([word for word in words if word not in ARTICLES] or words) or folded


def fold(text: str) -> str:
    """One of Unicode's ways to write ``text``, without case or what nobody sees: NFKC_Casefold, and one apostrophe."""
    text = UNSEEN.sub("", text)
    for _ in range(2):  # what a letter unfolds into may fold again
        text = unicodedata.normalize("NFD", text).translate(APOSTROPHES).casefold()
        text = unicodedata.normalize("NFKC", text)
    return text


def _is_mark(c: str) -> bool:
    return c in MARKS or unicodedata.category(c) in MARK_KINDS


def _word(word: str) -> str:
    bare = word.replace("'", "")
    return bare if bare in CONTRACTIONS else NUMBERS.get(word, word)
