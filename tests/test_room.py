"""A text that a model has no room for: refused by name, or told of where it is cut."""

import dataclasses
import warnings
from types import SimpleNamespace

import pytest
import torch

from mscke.benchmark.sample import Edit, Query, RecordError
from mscke.classifier import ScopeClassifier
from mscke.config import ASSETS, get_track
from mscke.editors import build
from mscke.editors.mscke import MSCKE
from mscke.editors.serac import MiniLMEncoder
from mscke.evaluation.protocol import evaluate
from mscke.fetching.track import Benchmark
from mscke.models import sources
from mscke.models.clip import ClipEncoder, side_texts
from mscke.models.counterfactual import CounterfactualModel
from mscke.models.mllm import MLLM
from mscke.models.prompts import TEMPLATE, TooLong
from mscke.models.room import FIELDS, check_records

pytest_plugins = ["tiny"]

LONG = " ".join(["owl"] * 1200)  # a token each
COURTESY = " ".join(["please"] * 17)


# Language models


def longest(mllm, seen):
    """The longest question that fits."""
    room = mllm.model.config.text_config.max_position_embeddings - mllm.encoder.prefix_length(seen) - 6
    text = " ".join(["owl"] * room)
    while len(mllm.encoder.tokens(TEMPLATE.format(text))) > room:
        text = text.rpartition(" ")[0]
    return text, room


@pytest.mark.parametrize("seen", [True, False])
def test_the_longest_question_is_answered_and_one_word_more_is_named(mllm, records, seen):
    image = records[0].edit.image if seen else None
    fits, room = longest(mllm, seen)
    query = Query(fits, image)
    assert len(mllm.prompts([query])[0]) == mllm.encoder.prefix_length(seen) + room
    assert mllm.answer([query]) and mllm.force([query], ["owl owl owl"])
    with pytest.raises(TooLong, match=rf"question 'owl.*' has {room + 1:,} tokens.* room for {room:,}"):
        mllm.answer([Query(fits + " owl", image), query])
    with pytest.raises(TooLong, match="question 'owl"):
        mllm.force([Query(fits + " owl", image)], ["yes"])


def test_the_context_counts(mllm, records):
    fits, _ = longest(mllm, True)
    edit = Edit(records[0].edit.image, "Who is it?", "owl")
    with pytest.raises(TooLong, match=r"question 'owl.* its context"):
        CounterfactualModel.beside(mllm).answer([Query(fits, edit.image)], [edit])


def test_an_answer_without_room_is_named(mllm, records):
    with pytest.raises(TooLong, match=r"shorten the answer ' ?owl"):
        mllm.force([records[0].in_scope], [LONG])


TOO_LONG = {  # by field of a record's JSON
    "src": lambda r: {"edit": dataclasses.replace(r.edit, prompt=LONG)},
    "alt": lambda r: {"edit": dataclasses.replace(r.edit, answer=LONG)},
    "rephrase": lambda r: {"rephrase": Query(LONG, r.edit.image)},
    "fg_gen_q": lambda r: {"in_scope": Query(LONG, r.edit.image)},
    "fg_gen_a": lambda r: {"in_scope_answer": LONG},
    "fg_loc_q": lambda r: {"out_of_scope": Query(LONG, r.edit.image)},
    "fg_loc_a": lambda r: {"out_of_scope_answer": LONG},
    "loc": lambda r: {"locality": Query(LONG)},
    "loc_ans": lambda r: {"locality_answer": LONG},
}


def spoilt(records, place, field):
    """``records``, of which one has a field that is too long."""
    bad = dataclasses.replace(records[place], **TOO_LONG[field](records[place]))
    return [*records[:place], bad, *records[place + 1 :]]


@pytest.mark.parametrize("field", TOO_LONG)
def test_a_record_is_named_with_its_field(mllm, records, field):
    assert {name for names in FIELDS.values() for name in names} == set(TOO_LONG)
    check_records(mllm, records)
    tokens, positions = len(mllm.encoder.tokens(LONG)), mllm.encoder.positions
    room = positions - mllm.encoder.prefix_length(field not in ("loc", "loc_ans"))
    with pytest.raises(RecordError) as caught:
        check_records(mllm, spoilt(records, 3, field))
    (line,) = str(caught.value).splitlines()[1:]
    assert line.startswith(f'  record {records[3].id}, field "{field}": {tokens:,} tokens, ')
    assert line.endswith(f"; {mllm.name} has room for {room:,}")


def test_what_fits_alone_may_not_fit_beside_the_edit(mllm, records):
    fits, _ = longest(mllm, True)
    query = Query(fits, records[0].edit.image)
    mllm.prompts([query])
    with pytest.raises(RecordError, match='field "fg_gen_q"'):
        check_records(mllm, [dataclasses.replace(records[0], in_scope=query)])


def test_many_bad_records_are_counted(mllm, records):
    bad = [dataclasses.replace(r, locality=Query(LONG)) for r in records]
    with pytest.raises(RecordError, match=f"and {len(bad) - 5} more"):
        check_records(mllm, bad)
    check_records(mllm, [])


def test_nothing_is_edited_before_all_records_are_found_to_fit(mllm, records):
    editor = SimpleNamespace(name="an editor", edit=lambda _: pytest.fail("it was asked to edit"))
    with pytest.raises(RecordError, match=f"record {records[2].id},"):
        evaluate(editor, mllm, spoilt(records, 2, "loc"), "tiny")


def test_a_base_model_is_loaded_with_room_for_its_tracks_records(blip2, records, monkeypatch):
    bench = Benchmark(records[:8], records[8:10], records[10:])
    monkeypatch.setattr(build, "load_mllm", lambda *_, **__: blip2)
    monkeypatch.setattr(build, "load_benchmark", lambda _: bench)
    assert build.load_base(get_track("smoke"), "BLIP-2-mini") is blip2
    bench.validation[:] = spoilt(records[8:10], 1, "rephrase")
    with pytest.raises(RecordError, match=f'record {records[9].id}, field "rephrase"'):
        build.load_base(get_track("smoke"), "BLIP-2-mini")


def test_a_counterfactual_model_has_the_room_of_its_base(blip2, monkeypatch):
    track = dataclasses.replace(get_track("smoke"), counterfactuals={blip2.name: "some-folder"})
    small = SimpleNamespace(language_model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=8)))
    monkeypatch.setattr(sources.CounterfactualModel, "pretrained", lambda *_: small)
    with pytest.raises(ValueError, match="some-folder has 8 positions"):
        sources.make_counterfactual(track, blip2)
    small.language_model.config.max_position_embeddings = blip2.encoder.positions
    assert sources.make_counterfactual(track, blip2) is small


# Encoders, which cut


@pytest.fixture(params=["mini", "OpenAI's", "MiniLM"])
def fresh(request, clip_name, openai_name):
    """An encoder that has told of nothing yet, and a text of one token too many for it."""
    if request.param == "MiniLM":
        return MiniLMEncoder(), " ".join(["owl"] * (512 - 1))
    if request.param == "mini":
        return ClipEncoder(clip_name), "a" + " owl" * (24 - 1)
    return ClipEncoder(openai_name), " ".join(["owl"] * (77 - 1))


def test_a_question_that_is_cut_is_told_of_once_and_counted(fresh):
    encoder, text = fresh
    limit = encoder.room.limit
    with pytest.warns(UserWarning, match=f"reads {limit} tokens of a text; 'a? ?owl.*' has {limit + 1}") as told:
        encoder([Query("Who?"), Query(text)])
    assert len(told) == 1 and encoder.room.cut == {text: limit + 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder([Query(text), Query(text.removesuffix(" owl"))])
    assert len(encoder.room.cut) == 1


def test_an_edit_that_would_lose_its_answer_is_refused(fresh):
    encoder, text = fresh
    prompt = text.removesuffix(" owl")
    encoder([Query(prompt.removesuffix(" owl"))], ["owl"])
    known = dict(encoder.texts.rows)
    with pytest.raises(TooLong, match=f"reads {encoder.room.limit} tokens.*Nothing was stored"):
        encoder([Query("Who?"), Query(prompt)], ["owl", "owl"])
    assert encoder.texts.rows == known


def test_courtesy_before_an_edit_does_not_make_it_leak(clip_name, mllm, records):
    """Thing and answer would be cut off, and every question that begins so would be the edit's."""
    torch.manual_seed(0)
    classifier = ScopeClassifier(clip_name, width=16, encoder=ClipEncoder(clip_name)).eval()
    editor = MSCKE(mllm, None, classifier)
    polite = dataclasses.replace(
        records[0], edit=dataclasses.replace(records[0].edit, prompt=f"{COURTESY} {records[0].edit.prompt}")
    )
    with pytest.raises(TooLong, match=r"'please .*shorten it"):
        editor.edit([*records[1:], polite])
    assert len(editor.edit(records).router.memory) == len(records)
    with pytest.warns(UserWarning, match="'please .* has "):
        editor.edit(records).router.route([Query(f"{COURTESY} {records[0].in_scope.question}", polite.edit.image)])


def test_a_cut_is_told_of_where_features_are_on_disk_already(clip_name, tmp_path):
    text = "a" + " owl" * 30
    for _ in range(2):
        with pytest.warns(UserWarning, match="has 32"):
            ClipEncoder(clip_name, cache=tmp_path)([Query(text)])


def test_many_cut_texts_are_one_warning(clip_name):
    texts = [f"{n}" + " owl" * 30 for n in range(9)]
    with pytest.warns(UserWarning, match="and 4 more texts") as told:
        ClipEncoder(clip_name)([Query(t) for t in texts])
    assert len(told) == 1


@pytest.mark.parametrize("name", ["clip-mini-s", "clip-mini-b", "clip-mini-l", "MiniLM"])
def test_no_text_of_scenes_is_cut(name, records):
    encoder = MiniLMEncoder() if name == "MiniLM" else ClipEncoder(f"local-dir:{ASSETS / name}")
    queries, edits = [q for r in records for q in r.queries.values()], [r.edit for r in records]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.room.check(side_texts(queries, None), stored=False)
    encoder.room.check([f"{e.prompt} {e.answer}" for e in edits], stored=True)
    assert not encoder.room.cut


@pytest.mark.parametrize("folder", ["blip2-mini", "minigpt4-mini"])
def test_all_of_scenes_fits_the_mini_models(folder, records):
    check_records(MLLM.from_pretrained(ASSETS / folder, folder), records)
