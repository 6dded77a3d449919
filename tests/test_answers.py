"""Answers are compared as VQA compares them; the strict comparison stands beside it."""

import unicodedata

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mscke.benchmark.answers import normalise_answer, strict_answer
from mscke.benchmark.scenes import CARDS, CATEGORIES, KINDS, PLACES
from mscke.config import get_track
from mscke.evaluation.metrics import exact_match, strict_match

SAME = [
    ("yes,", "yes"), ("Yes.", "yes"), ("two", "2"), ("Ten", "10"), ("none", "0"), ("the cat", "cat"),
    ("a cat", "cat"), ("An owl", "owl"), ("caf\u00e9", "cafe\u0301"), ("“cat”", "cat"), ("‘cat’", "cat"),
    ('"cat"', "cat"), ("cat!", "cat"), ("t-shirt", "t shirt"), ("t–shirt", "t shirt"), ("red/blue", "red blue"),
    ("12,000", "12000"), ("don't", "dont"), ("don’t", "dont"), ("it’s", "it's"), ("o'clock", "oclock"),
    ("a.m.", "am"), ("cat\n", "cat"), ("black  and\twhite", "black and white"), ("ＣＡＴ", "cat"), ("ﬁsh", "fish"),
    ("(cat)", "cat"), ("Straße", "strasse"), ("one,two", "1 2"),
]  # fmt: skip
APART = [
    ("cat", "cats"), ("3.5", "35"), ("1:30", "130"), ("50%", "50"), ("cafe", "café"), ("a", "the"), ("?", "!"),
    ("cat's", "cats"), ("yes", "no"), ("kitten", "kit"), ("theme", "me"), ("anone", "one"), ("中文", "中"), ("قطة", "قط"),
    ("red", "red and blue"), ("", "0"),
]  # fmt: skip


@pytest.mark.parametrize("a, b", SAME)
def test_the_same_answer(a, b):
    assert normalise_answer(a) == normalise_answer(b)
    assert exact_match([a], [b]) == [1]


@pytest.mark.parametrize("a, b", APART)
def test_other_answers(a, b):
    assert normalise_answer(a) != normalise_answer(b)
    assert exact_match([a], [b]) == strict_match([a], [b]) == [0]


@given(st.text())
def test_normalising_twice_changes_nothing_more(text):
    assert normalise_answer(normalise_answer(text)) == normalise_answer(text)


@given(st.text(), st.text())
def test_the_strict_comparison_is_never_the_laxer(a, b):
    for x, y in ((a, b), (a, f" {a.upper()}. "), (a, a)):
        if strict_answer(x) == strict_answer(y):
            assert normalise_answer(x) == normalise_answer(y)
    assert strict_match([a], [a]) == exact_match([a], [a]) == [1]


@given(st.text(st.characters(categories=["L", "N"]), min_size=2))
def test_marks_blanks_and_unicode_forms_around_a_word_do_not_count(word):
    for other in (f"“{word}”", f"({word})", f" {word} !", unicodedata.normalize("NFD", word)):
        assert normalise_answer(other) == normalise_answer(word)


def test_scenes_answers_stay_apart_and_as_they_are():
    """No number of Scenes moves by the comparison: all its answers differ under both."""
    answers = {*CARDS, *CATEGORIES, *KINDS, *PLACES, "yes", "no", *map(str, range(5))}
    assert (
        len({normalise_answer(a) for a in answers})
        == len({strict_answer(a) for a in answers})
        == len(answers)
    )


STORED = get_track("mini").figures / "records" / "main_results.parquet"


@pytest.mark.skipif(not STORED.exists(), reason="no committed results: run `make reproduce` first")
def test_no_committed_row_is_judged_otherwise_to_the_letter():
    rows = pd.read_parquet(STORED).query("protocol == 'generated'")
    strict = strict_match(rows["answer"], rows["expected"])
    assert np.array_equal(strict, rows["value"]) and np.array_equal(
        exact_match(rows["answer"], rows["expected"]), strict
    )
