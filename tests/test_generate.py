"""FGVEdit-Scenes: the same bytes each time, sound scope labels, disjoint splits, no easy way in."""

import dataclasses
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from test_questions import meant, read, reply, touches

from mscke import config
from mscke.benchmark import write
from mscke.benchmark.facts import N_COUNTRIES, locality_facts, world_facts
from mscke.benchmark.generate import OUT_OF_SCOPE, generate, record
from mscke.benchmark.load import load_records
from mscke.benchmark.questions import IDENTITY
from mscke.benchmark.sample import FIELDS
from mscke.benchmark.scenes import HELD_OUT, KINDS, KNOWN, RECORD_FOLD, Entity, Scene, fold, render
from mscke.fetching.track import load_benchmark, loaded_once

N = 600


@pytest.fixture(scope="module")
def rows():
    """The first records of each split, as the JSON has them."""
    drawn = {split: [record(split, i)[1] for i in range(N)] for split in ("train", "test")}
    return json.loads(json.dumps(drawn))


@pytest.fixture(scope="module")
def both(rows):
    return rows["train"] + rows["test"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with 24 records a split."""
    folder = tmp_path_factory.mktemp("scenes")
    for split in ("train", "test"):
        generate(folder, split, 24)
    return folder


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def shown(row):
    """The scene of the picture."""
    scene = row["meta"]["scene"]
    entities = (Entity(**e | {"shift": tuple(e["shift"])}) for e in scene["entities"])
    return Scene(tuple(entities), scene["background"])


def sides(row):
    """What lies where before and after the edit, as plain lists; kind None: not known to the model."""
    meta = row["meta"]

    def with_kind(kind):
        things = [{k: e[k] for k in ("kind", "card", "cell")} for e in meta["scene"]["entities"]]
        return [t | {"kind": kind} if t["cell"] == meta["cell"] else t for t in things]

    return with_kind(None if meta["correction"] else meta["original"]), with_kind(meta["edited"])


# The same bytes


def test_regenerated_is_identical_to_the_byte(root, tmp_path):
    for split in ("train", "test"):
        generate(tmp_path, split, 24)
    assert files(tmp_path) == files(root)
    assert len(files(root)) == 2 * (24 + 1)


def test_smaller_is_a_prefix(root, tmp_path):
    path = generate(tmp_path, "test", 7)
    assert json.loads(path.read_text()) == json.loads((root / "test_data.json").read_text())[:7]
    for name, content in files(tmp_path / "test").items():
        assert (root / "test" / name).read_bytes() == content


@pytest.mark.parametrize(("split", "number", "text"), [
    ("train", 0, "Tell me what the thing at the middle left is. owl"),
    ("test", 0, "Tell me what the thing on the blue card is. pig"),
    ("test", 31, "Tell me what the thing just left of the shoe is. banjo"),
])  # fmt: skip
def test_records_never_move(split, number, text):
    """Committed results are of these records."""
    row = record(split, number)[1]
    assert f"{row['src']} {row['alt']}" == text


def test_what_is_there_is_kept_and_what_is_of_another_size_or_seed_is_not(tmp_path):
    path = generate(tmp_path, "test", 3)
    written, stamp = path.read_bytes(), path.stat().st_mtime_ns
    assert generate(tmp_path, "test", 3).stat().st_mtime_ns == stamp
    for changes in ({"size": 4}, {"size": 3, "seed": 1}):
        assert generate(tmp_path, "test", **changes).read_bytes() != written
        generate(tmp_path, "test", 3)
        assert path.read_bytes() == written


@pytest.mark.parametrize("damage", ["", "[", "[1]", "{}"])
def test_a_damaged_json_is_named_and_made_anew(tmp_path, damage):
    path = generate(tmp_path, "train", 1)
    whole = path.read_bytes()
    path.write_text(damage)
    if damage in ("[1]", "{}"):  # sound, and of another size or seed
        generate(tmp_path, "train", 1)
    else:
        with pytest.warns(UserWarning, match=r"train_data\.json is damaged and is made anew"):
            generate(tmp_path, "train", 1)
    assert path.read_bytes() == whole


def test_interrupted_leaves_no_json(tmp_path, monkeypatch):
    generate(tmp_path, "test", 2)

    def stop(scene):
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "render", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, "test", 3)
    assert not list(tmp_path.glob("test_data.*"))


# What is written is what is read


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_loader_reads_it(root, split):
    rows = json.loads((root / f"{split}_data.json").read_text())
    loaded = load_records(root / f"{split}_data.json", root)
    assert (loaded.skipped, len(loaded.records)) == (0, 24)
    for row, item in zip(rows, loaded.records, strict=True):
        assert set(row) == {*FIELDS, "meta"}
        questions = [q.question for q in item.queries.values()]
        assert questions == [row[k] for k in ("src", "rephrase", "fg_gen_q", "fg_loc_q", "loc")]
        answers = [row[k] for k in ("alt", "alt", "fg_gen_a", "fg_loc_a", "loc_ans")]
        assert list(item.answers.values()) == answers
        assert item.meta == row["meta"]


def test_the_picture_is_of_the_scene_in_meta(root):
    for row in json.loads((root / "test_data.json").read_text()):
        picture = np.asarray(Image.open(root / row["image"]))
        assert np.array_equal(picture, render(shown(row)))
        kind = shown(row).at(row["meta"]["cell"]).kind
        assert kind == (row["alt"] if row["meta"]["correction"] else row["meta"]["original"])


def test_a_track_is_loaded_whole_and_split_by_image(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    track = dataclasses.replace(config.TRACKS["smoke"], n_train=20, n_test=5)
    first = load_benchmark(track)
    assert load_benchmark(track) is first
    loaded_once.clear()
    assert load_benchmark(track) == first  # as it lies on disk
    assert (len(first.train), len(first.validation), len(first.test)) == (18, 2, 5)
    pictures = [{r.edit.image for r in part} for part in (first.train, first.validation, first.test)]
    assert len(set.union(*pictures)) == 25


# Scope


def test_scope_labels_are_those_that_a_reader_finds(both):
    """In scope: the answer changes with the edit, or is read off the edited entity. Out: neither."""
    for row in both:
        before, after = sides(row)
        cell = row["meta"]["cell"]
        inside = [reply(row["fg_gen_q"], side) for side in (before, after)]
        outside = [reply(row["fg_loc_q"], side) for side in (before, after)]
        assert inside[1] == row["fg_gen_a"]
        assert inside[0] != inside[1] or touches(row["fg_gen_q"], before, after, cell)
        assert outside == [row["fg_loc_a"]] * 2
        assert not touches(row["fg_loc_q"], before, after, cell)


def test_scope_labels_hold_for_whatever_else_the_edit_might_have_said(both):
    """Whatever kind the edited cell holds: identity questions in scope follow, those out of scope never do."""
    followed = 0
    for row in both[::5]:
        _, after = sides(row)
        taken = {t["kind"] for t in after if t["cell"] != row["meta"]["cell"]}
        kinds = [k for k in KINDS if k not in taken]
        worlds = [[t | {"kind": k} if t["cell"] == row["meta"]["cell"] else t for t in after] for k in kinds]
        if read(row["fg_gen_q"])[0] in IDENTITY:
            assert len({reply(row["fg_gen_q"], world) for world in worlds}) > 1
            followed += 1
        if read(row["fg_loc_q"])[0] not in ("exists", "count"):
            assert {reply(row["fg_loc_q"], world) for world in worlds} == {row["fg_loc_a"]}
    assert followed > 150


def test_edit_prompt_and_rephrase_name_the_edited_entity_in_other_words_and_in_scope_questions_otherwise(both):
    for row in both:
        before, _ = sides(row)
        (attribute, said), again = read(row["src"]), read(row["rephrase"])
        assert attribute == "name" and again == (attribute, said)
        assert row["src"] != row["rephrase"]
        assert [t["cell"] for t in meant(said, before)] == [row["meta"]["cell"]]
        attribute, asked = read(row["fg_gen_q"])
        if attribute in IDENTITY:
            assert asked != said
            assert asked[0] != said[0] or (asked[0] == "relation" and asked[2] != said[2])


def test_out_of_scope_questions_are_what_their_hardness_says(both):
    for row in both:
        before, _ = sides(row)
        attribute, thing = read(row["fg_loc_q"])
        hardness = row["meta"]["hardness"]["out_of_scope"]
        if attribute in ("exists", "count"):
            assert hardness == "other_entity"
            continue
        ((about),) = meant(thing, before)
        assert (about["cell"] == row["meta"]["cell"]) == (hardness == "other_attribute")
        if hardness == "other_attribute":
            assert attribute in ("colour", "place") and thing[0] != attribute
        if hardness == "same_wording":
            said = read(row["src"])[1]
            assert attribute == "name" and thing[0] == said[0]
            words = "|".join((*said[1:], *thing[1:]))
            assert re.sub(words, "…", row["fg_loc_q"]) == re.sub(words, "…", row["src"])


def test_meta_says_what_the_texts_say(both):
    for row in both:
        for side, key in (("edit", "src"), ("in_scope", "fg_gen_q"), ("out_of_scope", "fg_loc_q")):
            attribute, thing = read(row[key])
            kind = "none" if attribute in ("exists", "count") else thing[0]
            assert row["meta"]["reference"][side] == kind
            if side != "edit":
                assert row["meta"]["attribute"][side] == attribute


def test_every_question_is_answerable_and_the_picture_holds_each_kind_once(both):
    for row in both:
        before, after = sides(row)
        assert reply(row["fg_loc_q"], before) is not None
        for side in (before, after):
            kinds = [t["kind"] for t in side]
            assert len(kinds) == len(set(kinds))


# Corrections and counterfactuals


def test_corrections_show_a_held_out_kind_that_the_rest_never_does(both):
    for row in both:
        kinds = {e["kind"] for e in row["meta"]["scene"]["entities"]}
        if row["meta"]["correction"]:
            assert kinds & set(HELD_OUT) == {row["alt"]}
            assert row["meta"]["original"] is None
        else:
            assert kinds | {row["alt"]} <= set(KNOWN)
            assert row["meta"]["original"] in kinds and row["alt"] not in kinds


def test_about_a_quarter_of_the_edits_are_corrections(rows):
    """Somewhat more than the 25 % drawn: fewer of their questions must be drawn anew."""
    for split in rows.values():
        assert 0.22 < np.mean([row["meta"]["correction"] for row in split]) < 0.33


def test_counterfactuals_stay_within_and_leave_the_category(both):
    pairs = [(r["meta"]["original"], r["alt"]) for r in both if not r["meta"]["correction"]]
    assert 0.2 < np.mean([KINDS[a].category == KINDS[b].category for a, b in pairs]) < 0.4


# Splits


def layout(row):
    return frozenset((e["cell"], e["card"]) for e in row["meta"]["scene"]["entities"])


def test_train_and_test_share_no_layout(rows):
    train, test = ({layout(r) for r in rows[split]} for split in ("train", "test"))
    assert not train & test


def test_no_scene_of_a_record_is_one_of_pretraining(both):
    for row in both:
        scene = shown(row)
        if row["meta"]["correction"]:
            assert scene.at(row["meta"]["cell"]).kind in HELD_OUT  # which pretraining never draws
        else:
            assert fold(scene) in RECORD_FOLD


def test_locality_shares_no_country_between_splits(rows):
    countries = {}
    for split in ("train", "test"):
        allowed = locality_facts(split)
        assert {(r["loc"], r["loc_ans"]) for r in rows[split]} <= set(allowed)
        asked = re.compile(r"What is the capital of (.+)\?|On which continent is (.+)\?")
        countries[split] = {next(filter(None, asked.fullmatch(q).groups())) for q, _ in allowed}
    assert not countries["train"] & countries["test"]
    assert (len(countries["train"]), len(countries["test"])) == (70, 30)


def test_world_facts():
    facts = dict(world_facts())
    assert len(facts) == 2 * N_COUNTRIES
    assert facts["What is the capital of Japan?"] == "Tokyo"
    assert facts["On which continent is Brazil?"] == "South America"


# No easy way in


def distance(a, b):
    """Total variation distance of two samples."""
    p, q = Counter(a), Counter(b)
    return sum(abs(p[k] / len(a) - q[k] / len(b)) for k in p | q) / 2


def asked(rows, side, hardness=None):
    rows = [r for r in rows if hardness in (None, r["meta"]["hardness"][side])]
    return [(r["meta"]["reference"][side], r["meta"]["attribute"][side]) for r in rows]


@pytest.mark.parametrize("split", ["train", "test"])
def test_both_sides_of_the_scope_are_asked_alike(rows, split):
    """Kinds of reference × attributes: drawn alike, so close in total variation."""
    inside, outside = asked(rows[split], "in_scope"), asked(rows[split], "out_of_scope", "other_entity")
    assert distance(inside, outside) < 0.11
    assert distance([a for _, a in inside], [a for _, a in outside]) < 0.08


def test_hardness_is_shared_out_as_stated(both):
    counts = Counter(r["meta"]["hardness"]["out_of_scope"] for r in both)
    for name, share in OUT_OF_SCOPE.items():
        assert abs(counts[name] / len(both) - share) < 0.04
