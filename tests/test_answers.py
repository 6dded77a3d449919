"""Answers are compared as VQA compares them; the strict comparison stands beside it."""

import unicodedata
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mscke.benchmark.answers import normalise_answer, strict_answer
from mscke.benchmark.facts import kind_facts, world_facts
from mscke.benchmark.sample import Query
from mscke.benchmark.scenes import CARDS, CATEGORIES, KINDS, PLACES
from mscke.config import get_track
from mscke.evaluation.metrics import ROLES, exact_match, strict_match
from mscke.evaluation.protocol import ask
from mscke.report.tables import beside_strict

SAME = [
    ("yes,", "yes"), ("Yes.", "yes"), ("two", "2"), ("Ten", "10"), ("none", "0"), ("the cat", "cat"),
    ("a cat", "cat"), ("An owl", "owl"), ("caf\u00e9", "cafe\u0301"), ("“cat”", "cat"), ("‘cat’", "cat"),
    ('"cat"', "cat"), ("cat!", "cat"), ("t-shirt", "t shirt"), ("t–shirt", "t shirt"), ("red/blue", "red blue"),
    ("12,000", "12000"), ("don't", "dont"), ("don’t", "dont"), ("it’s", "it's"), ("o'clock", "oclock"),
    ("a.m.", "am"), ("cat\n", "cat"), ("black  and\twhite", "black and white"), ("ＣＡＴ", "cat"), ("ﬁsh", "fish"),
    ("(cat)", "cat"), ("Straße", "strasse"), ("one,two", "1 2"), ("‘two’", "2"), ("'the' cat", "cat"), ("(A)", "a"),
    ("don`t", "dont"), ("Couldn't've", "couldntve"), ("I’m", "im"), ("猫。", "猫"), ("قطة؟", "قطة"), ("¿Gato?", "gato"),
    ("cat\u200b", "cat"), ("קנגורו\u200f", "קנגורו"), ("\u22125", "-5"), ("…", ""),
]  # fmt: skip
APART = [
    ("cat", "cats"), ("3.5", "35"), ("1:30", "130"), ("50%", "50"), ("cafe", "café"), ("a", "the"), ("?", "!"),
    ("cat's", "cats"), ("yes", "no"), ("kitten", "kit"), ("theme", "me"), ("anone", "one"), ("中文", "中"), ("قطة", "قط"),
    ("red", "red and blue"), ("", "0"), ("we're", "were"), ("it's", "its"), ("she'll", "shell"), ("a", "an"), ("the", ""),
    ("हिंदी", "हदी"), ("می\u200cخواهم", "میخواهم"), ("猫", "犬"), ("cant", "cat"), ("vitamin c", "vitamin d"),
]  # fmt: skip


@pytest.mark.parametrize("a, b", SAME)
def test_the_same_answer(a, b):
    assert normalise_answer(a) == normalise_answer(b)
    assert exact_match([a], [b]) == [1]


@pytest.mark.parametrize("a, b", APART)
def test_other_answers(a, b):
    assert normalise_answer(a) != normalise_answer(b)
    assert exact_match([a], [b]) == strict_match([a], [b]) == [0]


PIECES = """a an the two none cat don't dont 's Σ ẞ é e\u0301 \u0345 中 ंि . , ' " ’ “ … ´ ¨ ŉ - – ! ? ; 1 ½ ⒈ \u200b""".split()
ANSWERS = st.text() | st.lists(st.sampled_from([*PIECES, " ", "\n"]), max_size=8).map("".join)


@given(ANSWERS)
def test_normalising_twice_changes_nothing_more(text):
    assert normalise_answer(normalise_answer(text)) == normalise_answer(text)


@given(ANSWERS)
def test_how_unicode_writes_a_letter_does_not_count(text):
    for form in ("NFC", "NFD"):
        assert normalise_answer(unicodedata.normalize(form, text)) == normalise_answer(text)


@given(ANSWERS)
def test_only_blanks_and_stops_come_to_nothing(text):
    seen = "".join(c for c in text if unicodedata.category(c) != "Cf")
    if strict_answer(unicodedata.normalize("NFKC", seen)):
        assert normalise_answer(text)


@given(ANSWERS, ANSWERS)
def test_the_strict_comparison_is_never_the_laxer(a, b):
    for x, y in ((a, b), (a, f" {a.upper()}. "), (a, a)):
        if strict_answer(x) == strict_answer(y):
            assert normalise_answer(x) == normalise_answer(y)
    assert strict_match([a], [a]) == exact_match([a], [a]) == [1]


@given(st.text(st.characters(categories=["L", "N"]), min_size=1))
def test_marks_blanks_and_unicode_forms_around_a_word_do_not_count(word):
    for other in (f"“{word}”", f"'{word}'", f"({word})", f" {word} !", f"\t{word}.\n"):
        assert normalise_answer(other) == normalise_answer(word)


def test_scenes_answers_stay_apart_and_as_they_are():
    """No number of Scenes moves by the comparison: whatever a question there can be answered with."""
    facts = {fact for _, fact in (*world_facts(), *kind_facts())}
    answers = {*CARDS, *CATEGORIES, *KINDS, *PLACES, *facts, "yes", "no", *map(str, range(10))}
    for form in (normalise_answer, strict_answer):
        assert len({form(a) for a in answers}) == len(answers) > 150


STORED = get_track("mini").figures / "records" / "main_results.parquet"


@pytest.mark.skipif(not STORED.exists(), reason="no committed results: run `make reproduce` first")
def test_no_committed_row_is_judged_otherwise_to_the_letter():
    rows = pd.read_parquet(STORED).query("protocol == 'generated'")
    asked = rows["answer"], rows["expected"]
    for found in (exact_match(*asked), strict_match(*asked), rows["strict"]):
        assert np.array_equal(found, rows["value"])


# ----------------------------------------------------------------------------- in the results


class Says:
    """A model that says ``text`` to everything, and said "cat"."""

    chunk = None

    def __init__(self, text):
        self.text = text

    def answer(self, queries, among=None):
        return [self.text] * len(queries)

    def unedited(self):
        return Says("cat")


def test_rows_say_what_was_said_and_what_either_comparison_makes_of_it():
    queries, answers = dict.fromkeys(ROLES, Query("What is it?")), dict.fromkeys(ROLES, "Cat")
    record = SimpleNamespace(id=3, queries=queries, answers=answers)
    rows = ask(Says("the cat"), None, [record], None, ("generated",)).set_index("metric")
    assert set(rows["answer"]) == {"the cat"}
    assert (rows["value"] == 1).all() and (rows["strict"] == 0).all()  # right, and unchanged


def test_the_table_shows_the_difference():
    names = {"track": "mini", "backbone": "B", "method": "MSCKE", "protocol": "generated", "record": [0, 1]}
    rows = [pd.DataFrame(names | {"metric": m, "value": [1.0, 1.0], "strict": [1.0, 0.0]}) for m in ("m_in", "m_out")]
    rows.append(rows[0].assign(protocol="teacher_forced", value=0.0, strict=0.0))
    table = beside_strict(pd.concat(rows)).set_index("metric")
    assert table.loc["specificity", ["field", "strict", "difference"]].tolist() == [100, 50, 50]


@pytest.mark.parametrize("unseen", ["\ufe0f", "\u034f", "\u115f", "\u00ad", "\u200b", "\U000e0100"])
def test_what_nobody_sees_does_not_count(unseen):
    assert exact_match([f"\u2764{unseen}", f"c{unseen}at"], ["\u2764", "cat"]).tolist() == [1.0, 1.0]


def test_joiners_are_parts_of_words():
    assert exact_match(["\u0645\u06cc\u200c\u062e"], ["\u0645\u06cc\u062e"]).tolist() == [0.0]
