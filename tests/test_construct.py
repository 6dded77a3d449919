"""A benchmark made of questions by a judge: FGVEdit-Scenes' labels, of which the truth is known, come back."""

import base64
import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from judge_server import complains, says, serve, status
from PIL import Image

from mscke.benchmark.generate import record
from mscke.benchmark.load import load_records
from mscke.benchmark.questions import ATTRIBUTES, OPPOSITE, Question, Reference, in_scope
from mscke.benchmark.sample import RecordError
from mscke.benchmark.scenes import CARDS, CATEGORIES, KINDS, PLACES, render, sample_scene
from mscke.construction.construct import construct, main
from mscke.construction.judge import Judge, JudgeError
from mscke.construction.verdicts import Judged, cohen_kappa, judge_pairs
from mscke.construction.vqa import COCO_NAME, Pair, VisualQuestion, propose, read_nq, read_vqa
from mscke.pretraining.questions import sample_question

NAME = "{subtype}/{image_id:012d}.png"
TYPES = {"name": "other", "count": "number", "flies": "yes/no", "animal": "yes/no", "food": "yes/no",
         "exists": "yes/no", "category": "category", "colour": "colour", "place": "place"}  # fmt: skip
SCOPES = {True: "entailed", False: "independent", None: "neither"}
N_SCENES = 12


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


# ------------------------------------------------------------------------------- the program as judge


def all_references():
    fixed = {"colour": CARDS, "place": PLACES, "category": CATEGORIES, "name": KINDS}
    yield from (Reference(kind, value) for kind, values in fixed.items() for value in values)
    yield from (Reference("relation", value, anchor) for value in OPPOSITE for anchor in KINDS)


def programs():
    """Every question that Scenes can ask, by its text."""
    found = [Question(a, r, wording=w) for r in all_references() for a in ATTRIBUTES[:-2] for w in range(6)]
    found += [Question("exists", value=v, wording=w) for v in KINDS for w in (0, 1)]
    found += [Question("count", value=v, wording=w) for v in CATEGORIES for w in (0, 1)]
    return {question.text(): question for question in found}


PROGRAMS = programs()


def truth(scene, prompt, new, other):
    """(scope, answer after the edit) by program. An edit to what is there already corrects an unknown entity."""
    edited, question = PROGRAMS[prompt], PROGRAMS[other]
    assert edited.attribute == "name"
    entity = edited.reference.resolve(scene)[0]
    after = scene.with_kind(entity.cell, new)
    before = scene if entity.kind != new else scene.with_kind(entity.cell, None)
    scope = in_scope(question, before, after, entity.cell)
    return SCOPES[scope], "" if scope is None else question.answer(after)


def text_alone(prompt, other):
    """What the words tell by themselves about an edit of what ``prompt`` means."""
    edited, question = PROGRAMS[prompt], PROGRAMS[other]
    if question.attribute in ("colour", "place"):
        return "independent"  # no card changes colour or place
    if question.reference == edited.reference:
        return "entailed"
    exclusive = question.reference and question.reference.kind == edited.reference.kind in ("colour", "place")
    return "independent" if exclusive else "unsettled"


def rewording(prompt):
    question = PROGRAMS[prompt]
    return replace(question, wording=question.wording + 1).text()


def program(pictures):
    """The server's answer: reads nothing but what the judge is sent. ``pictures``: PNG's hash -> scene."""

    def answer(body):
        system, user = body["messages"]
        facts = json.loads(user["content"][0]["text"])
        name, schema = (body["response_format"]["json_schema"][k] for k in ("name", "schema"))
        if name == "rephrase":
            return {"question": rewording(facts["question"])}
        prompt, new, other = (facts["edit"]["question"], facts["edit"]["new_answer"], facts["other"]["question"])
        if name == "text_scope":
            assert "old_answer" not in facts["other"]
            assert len(user["content"]) == 1
            verdict = {"verdict": text_alone(prompt, other)}
        else:
            scene = pictures[hashlib.sha256(user["content"][1]["image_url"]["url"].encode()).hexdigest()]
            scope, after = truth(scene, prompt, new, other)
            verdict = {"verdict": scope, "answer": after}
        assert verdict["verdict"] in schema["properties"]["verdict"]["enum"]
        assert f'"{verdict["verdict"]}"' in system["content"]
        return {"reason": "by program"} | verdict

    return answer


# ------------------------------------------------------------------------------- Scenes as VQAv2


def url_digest(path):
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return hashlib.sha256(url.encode()).hexdigest()


class Dump:
    """Scenes' questions as files in VQAv2's format, with the pictures and NQ-open beside them."""

    def __init__(self, root: Path):
        self.root, self.scenes = root, {}
        rng, rows = np.random.default_rng(5), []
        (root / "val2014").mkdir(parents=True)
        for image_id in range(1, N_SCENES + 1):
            scene = sample_scene(rng, n=4)
            path = NAME.format(subtype="val2014", image_id=image_id)
            Image.fromarray(render(scene)).save(root / path)
            self.scenes[path] = scene
            kinds = ("colour", "place", "relation")
            asked = {q.text(): q for q in (sample_question(rng, scene, kinds=kinds) for _ in range(9))}
            rows += [(image_id, question, question.answer(scene)) for question in asked.values()]
        self.pictures = {url_digest(root / path): scene for path, scene in self.scenes.items()}
        self.questions = root / "questions.json"
        self.annotations = root / "annotations.json"
        asked = [{"image_id": i, "question_id": 1000 + n, "question": q.text()} for n, (i, q, _) in enumerate(rows)]
        answered = [
            {
                "question_id": 1000 + n, "image_id": i, "question_type": q.attribute, "answer_type": TYPES[q.attribute],
                "multiple_choice_answer": answer,
                "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)],
            }
            for n, (i, q, answer) in enumerate(rows)
        ]  # fmt: skip
        answered.reverse()  # the format promises no order
        self.questions.write_text(json.dumps({"data_subtype": "val2014", "questions": asked}))
        self.annotations.write_text(json.dumps({"data_subtype": "val2014", "annotations": answered}))
        self.nq = root / "NQ-open.train.jsonl"
        lines = [{"question": f"who wrote book {n}", "answer": [f"Author {n}", "Anon"]} for n in range(60)]
        self.nq.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def read(self):
        return read_vqa(self.questions, self.annotations, NAME)

    def changed(self, part, folder, change):
        """The paths of both files; ``part`` is one in which ``change`` has been at work on the rows."""
        paths = {"questions": self.questions, "annotations": self.annotations}
        file = json.loads(paths[part].read_text())
        change(file[part])
        paths[part] = folder / f"{part}.json"
        paths[part].write_text(json.dumps(file))
        return paths.values()

    def construct(self, server, out, repeat=20, **settings):
        return construct(self.read(), read_nq(self.nq), self.root, judge(server, out, **settings), out, repeat)

    def options(self, out):
        paths = {"questions": self.questions, "annotations": self.annotations, "images": self.root, "nq": self.nq}
        return [f"--{k}={v}" for k, v in (paths | {"out": out, "image-name": NAME}).items()] + ["--per-minute=1e6"]


def judge(server, out, **settings):
    quick = {"per_minute": 1e6, "attempts": 3} | settings
    return Judge(out / "verdicts", base_url=server.url, **quick)


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    return Dump(tmp_path_factory.mktemp("dump"))


@pytest.fixture(scope="module")
def built(dump, tmp_path_factory):
    """(folder, report, how many requests) of one construction, by a server that stumbles now and then."""
    out = tmp_path_factory.mktemp("built")
    faults = [status(429, Retry_After="0"), None, says("{}"), None, status(500)]
    with pytest.MonkeyPatch.context() as patch, serve(program(dump.pictures), faults) as server:
        patch.setenv("NO_PROXY", "127.0.0.1")
        return out, dump.construct(server, out), len(server.bodies) - 3


def rows_of(out):
    return {split: json.loads((out / f"{split}_data.json").read_text()) for split in ("train", "test")}


def test_scenes_labels_are_recovered(dump, built):
    """Each record is in scope, out of scope and hard as the program says, and no edit that could give one is left out."""
    out, report, _ = built
    rows = [row for part in rows_of(out).values() for row in part]
    for row in rows:
        scene = dump.scenes[row["image"]]
        assert truth(scene, row["src"], row["alt"], row["fg_gen_q"]) == ("entailed", row["fg_gen_a"])
        assert truth(scene, row["src"], row["alt"], row["fg_loc_q"]) == ("independent", row["fg_loc_a"])
        assert row["fg_loc_a"] == PROGRAMS[row["fg_loc_q"]].answer(scene)
        assert text_alone(row["src"], row["fg_gen_q"]) != "entailed"
        assert text_alone(row["src"], row["fg_loc_q"]) != "independent"
        assert PROGRAMS[row["src"]].answer(scene) == row["meta"]["original"] != row["alt"]
        assert row["rephrase"] == rewording(row["src"]) != row["src"]

    expected, counts = set(), Counter()
    for edited, pairs in groupby(propose(dump.read()), key=lambda pair: pair.edited):
        sides = set()
        for pair in pairs:
            prompt, other = pair.edited.question, pair.candidate.question
            scope, _ = truth(dump.scenes[edited.image], prompt, pair.answer, other)
            hard = "easy" if text_alone(prompt, other) == scope else "hard"
            counts[scope if scope == "neither" else f"{scope}, {hard}"] += 1
            sides |= {scope} if hard == "hard" else set()
        if {"entailed", "independent"} <= sides:
            expected.add(edited.id)
    assert {row["meta"]["question_ids"]["edit"] for row in rows} == expected
    assert {key: report[key] for key in counts} == counts
    assert len(counts) == 5  # nothing that the stages tell apart is absent from this test
    assert len(rows) == report["train"] + report["test"] >= 10


def test_the_files_are_a_benchmark(dump, built):
    out, report, _ = built
    parts = {split: load_records(out / f"{split}_data.json", dump.root).records for split in ("train", "test")}
    images = {split: {r.edit.image for r in records} for split, records in parts.items()}
    assert not images["train"] & images["test"]
    everything = parts["train"] + parts["test"]
    assert len(parts["test"]) / len(everything) == pytest.approx(1 / 4, abs=2 / len(everything))
    questions = {q.id: q for q in dump.read()}
    for one in everything:
        ids = one.meta["question_ids"]
        assert questions[ids["in_scope"]].question == one.in_scope.question
        assert questions[ids["out_of_scope"]].question == one.out_of_scope.question
    nq = dict(read_nq(dump.nq))
    assert all(nq[r.locality.question] == r.locality_answer for r in everything)
    assert len({r.locality.question for r in everything}) == len(everything)
    assert json.loads((out / "report.json").read_text()) == report


def test_a_program_agrees_with_itself(built):
    for stage in built[1]["agreement"].values():
        assert stage == {"kappa": 1.0, "lo": 1.0, "hi": 1.0, "n": 20}


def test_a_rerun_asks_nothing_and_writes_the_same(dump, built, monkeypatch, capsys):
    out, report, _ = built
    names = ("train_data.json", "test_data.json", "report.json")
    before = {name: (out / name).read_bytes() for name in names}
    with serve(program(dump.pictures)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        main([*dump.options(out), "--repeat=20"])
        assert not server.bodies
    assert json.loads(capsys.readouterr().out) == report
    assert {name: (out / name).read_bytes() for name in names} == before


def test_a_judge_that_dies_half_way_loses_nothing(dump, built, tmp_path, monkeypatch):
    complete, _, requests = built
    die = [None] * (requests // 2) + [status(503)] * 1000
    with serve(program(dump.pictures), die) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        with pytest.raises(JudgeError, match="run again to go on"):
            dump.construct(server, tmp_path)
        assert not (tmp_path / "train_data.json").exists()
        server.faults.clear()
        server.bodies.clear()
        dump.construct(server, tmp_path)
        assert len(server.bodies) == requests - requests // 2
    assert rows_of(tmp_path) == rows_of(complete)


def test_generated_records_are_judged_as_generated(tmp_path):
    """The generator's own edits, corrections of what is misnamed among them: its fields are the labels."""
    pairs, sides, pictures = [], [], {}
    for number in range(16):
        scene, row = record("train", number)
        path = tmp_path / f"{number}.png"
        Image.fromarray(render(scene)).save(path)
        pictures[url_digest(path)] = scene
        ask = VisualQuestion(3 * number, path.name, row["src"], row["meta"]["original"], ("other", ""), frozenset())
        inside = replace(ask, id=ask.id + 1, question=row["fg_gen_q"], answer="?")
        outside = replace(ask, id=ask.id + 2, question=row["fg_loc_q"], answer=row["fg_loc_a"])
        pairs += [Pair(ask, row["alt"], inside), Pair(ask, row["alt"], outside)]
        sides += [("entailed", row["fg_gen_a"]), ("independent", row["fg_loc_a"])]
    with serve(program(pictures)) as server:
        judged, *_ = judge_pairs(judge(server, tmp_path), pairs, tmp_path, repeat=0)
    assert [j.pair for j in judged] == pairs
    assert [(j.scope, j.answer) for j in judged] == sides


# ------------------------------------------------------------------------------- judges of all sorts


def a_judge_that_says(verdicts, texts=("unsettled",)):
    """Goes through its lists, whatever it is asked."""
    counts = Counter()

    def answer(body):
        name = body["response_format"]["json_schema"]["name"]
        counts[name] += 1
        if name == "rephrase":
            return {"question": "And what?"}
        said = {"scope": verdicts, "text_scope": texts}[name]
        verdict = {"reason": "", "verdict": said[(counts[name] - 1) % len(said)]}
        return verdict | ({"answer": "x"} if name == "scope" else {})

    return answer


def judged_by(answer, dump, out, faults=(), repeat=0):
    pairs = propose(dump.read())[:12]
    with serve(answer, faults) as server:
        return pairs, *judge_pairs(judge(server, out, concurrency=1), pairs, dump.root, repeat)


def test_refusals_neithers_and_empty_answers_are_left_out(dump, tmp_path):
    empty = json.dumps({"reason": "", "verdict": "entailed", "answer": " "})
    faults = [says(None, refusal="no"), says(empty), None, None]
    pairs, judged, _, missing = judged_by(a_judge_that_says(["independent", "neither"]), dump, tmp_path, faults)
    assert [j.pair for j in judged] == pairs[2::2]
    (one,) = missing
    assert one == {"stage": "image and text", "why": "refused", "image": pairs[0].edited.image,
                   "edit": pairs[0].edited.id, "question": pairs[0].candidate.id}  # fmt: skip
    assert judged[0] == Judged(pairs[2], "independent", pairs[2].candidate.answer, hard=True)


def test_agreement_of_a_fickle_judge(dump, tmp_path):
    rng, said = np.random.default_rng(0), {}

    def fickle(body):
        facts = json.loads(body["messages"][1]["content"][0]["text"])
        about = (facts["edit"]["question"], facts["other"]["question"])
        if "old_answer" not in facts["other"]:
            return {"reason": "", "verdict": "unsettled"}
        verdict = ("entailed", "independent", "neither")[rng.integers(3)]
        said.setdefault(about, []).append((verdict, *facts))
        return {"reason": "", "verdict": verdict, "answer": "x"}

    pairs, _, agreement, _ = judged_by(fickle, dump, tmp_path, repeat=9)
    first, second = zip(*(v for v in said.values() if len(v) == 2), strict=True)
    assert len(said) == len(pairs) == 12
    assert {v[1:] for v in first} == {("edit", "other")}
    assert {v[1:] for v in second} == {("other", "edit")}
    found = agreement["image_and_text"]
    assert found["n"] == len(first) == 9
    assert found["kappa"] == pytest.approx(cohen_kappa([v[0] for v in first], [v[0] for v in second]))
    assert -1 <= found["lo"] < found["kappa"] < found["hi"] <= 1
    assert agreement["text_alone"]["kappa"] is None  # one label only: agreement means nothing


def test_kappa_of_a_known_table():
    a = np.repeat(["yes", "yes", "no", "no"], [20, 5, 10, 15])
    b = np.repeat(["yes", "no", "yes", "no"], [20, 5, 10, 15])
    assert cohen_kappa(a, b) == pytest.approx(0.4)  # observed 0.7, by chance 0.5
    assert cohen_kappa(b, a) == pytest.approx(0.4)
    assert cohen_kappa(["x", "y"], ["y", "x"]) == pytest.approx(-1)
    assert cohen_kappa(["x", "y", "z"], ["x", "y", "z"]) == 1
    assert np.isnan(cohen_kappa(["x"] * 7, ["x"] * 7))


# ------------------------------------------------------------------------------- proposals


def test_proposals(dump):
    questions = dump.read()
    pairs = propose(questions, edits_per_image=1)
    assert pairs == propose(questions, edits_per_image=1)
    assert [p.answer for p in pairs] != [p.answer for p in propose(questions, edits_per_image=1, seed=1)]
    answers = {kind: {q.answer for q in questions if q.kind == kind} for kind in {q.kind for q in questions}}
    for edited, group in groupby(pairs, key=lambda pair: pair.edited):
        group = list(group)
        assert edited.kind[0] == "other"
        assert len({p.answer for p in group}) == 1
        assert group[0].answer in answers[edited.kind] - edited.given
        others = {q for q in questions if q.image == edited.image and q.question != edited.question}
        assert {p.candidate for p in group} == others
    assert len({p.edited.image for p in pairs}) == len({p.edited for p in pairs}) > N_SCENES / 2
    assert len({p.edited.image for p in propose(questions, n_images=5)}) <= 5
    assert {p.edited.kind[0] for p in propose(questions, answer_types=("number", "yes/no"))} <= {"number", "yes/no"}


def test_no_annotator_gave_the_new_answer():
    kind = ("other", "what is the")
    ask = VisualQuestion(1, "a.png", "What is the bird?", "owl", kind, frozenset({"owl", "barn owl", "bird"}))
    others = [replace(ask, id=i, image="b.png", answer=a) for i, a in enumerate(("owl", "barn owl", "bird"), 2)]
    pair = replace(ask, id=9, question="What is the cat?", kind=("other", "what is"))
    assert not [p for p in propose([ask, pair, *others]) if p.edited == ask]
    kite = replace(ask, id=5, image="b.png", answer="kite")
    assert [p.answer for p in propose([ask, pair, *others, kite]) if p.edited == ask] == ["kite"]


GREYS = ("Gray", "gray", "gray ", "GRAY.", "grey")


def test_no_edit_changes_only_case_blanks_or_stops():
    """Nor is one proposed that an annotator gave in another form."""
    asked = [
        VisualQuestion(i, f"{i}.png", "What colour?", answer, ("other", ""), frozenset({answer}))
        for i, answer in enumerate(GREYS * 4)
    ]
    others = [replace(q, id=100 + q.id, question="What is it?", kind=("no", "")) for q in asked]
    for seed in range(5):
        pairs = propose([*asked, *others], seed=seed)
        assert {(p.edited.answer == "grey") != (p.answer == "grey") for p in pairs} == {True}
        assert len(pairs) >= 16
    given = [replace(q, given=frozenset({"grey", "the GRAY"})) for q in asked]
    assert not propose([*given, *others])


def test_a_question_in_another_case_or_a_blank_one_is_no_other_question():
    ask = VisualQuestion(1, "a.png", "What is it?", "owl", ("other", ""), frozenset({"owl"}))
    kite = replace(ask, id=2, image="b.png", answer="kite")
    for question, answer in (("what  is it", "owl"), ("WHAT IS IT ?", "owl"), (" ", "owl"), ("Who?", "")):
        assert not propose([ask, kite, replace(ask, id=3, question=question, answer=answer)])
    assert len(propose([ask, kite, replace(ask, id=5, question="Who is it?", kind=("no", ""))])) == 1


@pytest.mark.parametrize("make", [str, "q{}".format, "22MexNkBPpdZGX6sxbxVBH/{}".format])
def test_ids_may_be_text(make, dump, tmp_path):
    """As A-OKVQA's are; numbers written as text are drawn for as numbers."""
    files = [json.loads(path.read_text()) for path in (dump.questions, dump.annotations)]
    for file, part in zip(files, ("questions", "annotations"), strict=True):
        for row in file[part]:
            row["question_id"] = make(row["question_id"])
        (tmp_path / part).write_bytes(b"\xef\xbb\xbf" + json.dumps(file, indent=1).replace("\n", "\r\n").encode())
    questions = read_vqa(tmp_path / "questions", tmp_path / "annotations", NAME)
    assert [q.id for q in questions] == [make(q.id) for q in dump.read()]
    pairs = propose(questions)
    assert pairs == propose(questions)
    assert len({p.edited.image for p in pairs}) > N_SCENES / 2
    numbered = [(p.edited.question, p.answer, p.candidate.question) for p in propose(dump.read())]
    same = [(p.edited.question, p.answer, p.candidate.question) for p in pairs] == numbered
    assert same == (make is str)


def test_image_ids_may_be_text(dump, tmp_path):
    paths = dump.changed("questions", tmp_path, lambda rows: [r.update(image_id=f"img-{r['image_id']}") for r in rows])
    assert read_vqa(*paths, "{subtype}/{image_id}.jpg")[0].image == "val2014/img-1.jpg"
    with pytest.raises(RecordError, match=r"makes no path of image_id 'img-1'.*\{image_id\} alone takes text"):
        read_vqa(*paths)


BROKEN = {
    "an id": ("questions", "question_id", None, "question_id.: found None"),
    "a question": ("questions", "question", 5, "question.: found 5 where text"),
    "an image": ("questions", "image_id", [1], "image_id"),
    "half a character": ("questions", "question", "\ud83d?", "question.*half a character"),
    "an answer": ("annotations", "multiple_choice_answer", None, "multiple_choice_answer"),
    "answers": ("annotations", "answers", "owl", "answers.: found 'owl' where a list"),
    "one of the answers": ("annotations", "answers", ["owl"], "found 'owl' where an object"),
    "a type": ("annotations", "answer_type", ["other"], "answer_type"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_in_a_vqa_file_is_named(what, dump, tmp_path):
    part, field, value, said = BROKEN[what]
    paths = dump.changed(part, tmp_path, lambda rows: rows[7].update({field: value}))
    with pytest.raises(RecordError, match=rf'{part}\.json, "{part}" 7: .*{said}.*give'):
        read_vqa(*paths, NAME)


@pytest.mark.parametrize("part", ["questions", "annotations"])
def test_rows_that_come_twice(part, dump, tmp_path):
    same = dump.changed(part, tmp_path, lambda rows: rows.append(rows[0]))
    assert read_vqa(*same, NAME) == dump.read()
    other = dump.changed(part, tmp_path, lambda rows: rows.append(rows[0] | {"image_id": 77}))
    with pytest.raises(RecordError, match=rf'{part}\.json, "{part}" \d+: field "question_id": .* is also that of 0'):
        read_vqa(*other, NAME)


# ------------------------------------------------------------------------------- bad input


def test_vqa_files_that_are_cut_or_do_not_belong_together(dump, tmp_path):
    cut = tmp_path / "cut.json"
    cut.write_bytes(dump.questions.read_bytes()[:500])
    with pytest.raises(RecordError, match=r"cut\.json: not JSON.*fetch it again"):
        read_vqa(cut, dump.annotations)
    with pytest.raises(RecordError, match=r'questions\.json: field "annotations": missing.*same split'):
        read_vqa(dump.annotations, dump.questions)
    with pytest.raises(RecordError, match="annotations of the same split"):
        read_vqa(*dump.changed("annotations", tmp_path, lambda rows: rows.pop(0)), NAME)
    with pytest.raises(RecordError, match=r"'\{number\}\.jpg' makes no path of image_id 1 .*--image-name"):
        read_vqa(dump.questions, dump.annotations, "{number}.jpg")


def test_coco_names():
    assert COCO_NAME.format(subtype="val2014", image_id=42) == "val2014/COCO_val2014_000000000042.jpg"


def test_nq_open(tmp_path):
    path = tmp_path / "nq.jsonl"
    rows = [
        {"question": "where is the owl", "answer": ["in the\u2028wood", "at home"]},
        {"question": "who wrote it ", "answer": ["Ann"]},
        {"question": "who wrote it", "answer": ["Ben"]},
        {"question": "why", "answer": [""]},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for start, end, last in (("", "\n", ""), ("\ufeff", "\r\n", "\r\n"), ("", "\n", "\n"), ("", "\n\n", " \t\n")):
        path.write_bytes((start + "".join(line + end for line in lines) + last).encode())
        assert read_nq(path) == [("where is the owl", "in the\u2028wood"), ("who wrote it", "Ann")]


@pytest.mark.parametrize("bad", [
    '{"question": "who', '{"question": "who"}', '{"question": "who", "answer": []}',
    '{"question": "who", "answer": "Ann"}', '{"question": "who", "answer": [5]}',
    '{"question": ["who"], "answer": ["Ann"]}', '{"question": "who", "answer": ["\\ud83d"]}', "[" * 9_999, "[1]", "\xff",
], ids=lambda bad: bad[:40])  # fmt: skip
def test_a_line_that_is_not_of_nq_open(bad, tmp_path):
    (path := tmp_path / "nq.jsonl").write_bytes(b'{"question": "a", "answer": ["b"]}\n' + bad.encode("latin-1"))
    with pytest.raises(RecordError, match=r"line 2: .*fetch NQ-open again"):
        read_nq(path)


@pytest.mark.parametrize("fault", ["missing", "cut short", "outside", "no picture"])
def test_an_image_that_cannot_be_used_is_found_before_anything_is_asked(fault, dump, tmp_path):
    shutil.copytree(dump.root / "val2014", tmp_path / "images" / "val2014")
    picture = tmp_path / "images" / sorted(dump.scenes)[3]
    whole = picture.read_bytes()
    picture.unlink()
    if fault == "outside":
        (tmp_path / "elsewhere.png").write_bytes(whole)
        picture.symlink_to(tmp_path / "elsewhere.png")
    elif fault != "missing":
        picture.write_bytes(whole[: len(whole) // 2] if fault == "cut short" else b"<svg/>")
    with serve(program(dump.pictures)) as server:
        client = judge(server, tmp_path)
        with pytest.raises(RecordError, match=rf"1 of 12 images cannot be used.*\n  val2014/{picture.name}: "):
            construct(dump.read(), read_nq(dump.nq), tmp_path / "images", client, tmp_path)
        assert not server.bodies


def test_a_filtered_picture_and_a_stubborn_question_are_left_out_and_named(dump, built, tmp_path):
    complete, report, _ = built
    name = rows_of(complete)["train"][0]["image"]
    asked = [q for q in dump.read() if q.image == name]
    (filtered,) = {digest for digest, scene in dump.pictures.items() if scene is dump.scenes[name]}
    honest, stubborn = program(dump.pictures), []

    def answer(body):
        content = body["messages"][1]["content"]
        if len(content) == 2 and filtered == hashlib.sha256(content[1]["image_url"]["url"].encode()).hexdigest():
            return complains("filtered", code="content_filter")
        facts = json.loads(content[0]["text"])
        if len(content) == 2 and not stubborn:
            stubborn.append(facts)
        return says("Hm.") if facts in stubborn else honest(body)

    with serve(answer) as server:
        found = dump.construct(server, tmp_path, repeat=0, concurrency=1)
        answered = len(server.bodies)
        again = dump.construct(server, tmp_path, repeat=0, concurrency=1)
        assert len(server.bodies) == answered + 3  # what is refused is refused, what is stubborn gets another chance
    assert again == found == json.loads((tmp_path / "report.json").read_text())
    refused = [one for one in found["left_out"] if one["why"] == "refused"]
    assert {one["image"] for one in refused} == {name}
    assert {one["question"] for one in refused} <= {q.id for q in asked}
    assert len(refused) == found["refused"] == len([p for p in propose(dump.read()) if p.edited.image == name])
    assert found["unanswered"] == len(found["left_out"]) - len(refused) == 1
    assert found["pairs"] == report["pairs"]
    usable = sum(v for k, v in found.items() if k.startswith(("entailed", "independent")))
    assert found["pairs"] == usable + found["neither"] + found["refused"] + found["unanswered"]
    assert name not in {row["image"] for part in rows_of(tmp_path).values() for row in part}
    assert report["refused"] == report["unanswered"] == len(report["left_out"]) == 0


def test_a_rewording_that_is_none_is_left_out(dump, built, tmp_path):
    """The same words in another case, or with other stops, reword nothing."""
    honest = program(dump.pictures)

    def answer(body):
        if body["response_format"]["json_schema"]["name"] != "rephrase":
            return honest(body)
        question = json.loads(body["messages"][1]["content"][0]["text"])["question"]
        return {"question": question.upper().replace("?", " ?!")}

    with serve(answer) as server, pytest.raises(RecordError, match="gave 0 records"):
        dump.construct(server, tmp_path, repeat=0)


@pytest.mark.parametrize("given", ["none", "0", "0.5"])
def test_the_temperature_is_an_option(given, dump, built, tmp_path, monkeypatch):
    out, _, requests = built
    for path in out.glob("verdicts"):
        shutil.copytree(path, tmp_path / "verdicts")
    with serve(program(dump.pictures)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        main([*dump.options(tmp_path), "--repeat=20", f"--temperature={given}"])
        expected = {"none": [None] * requests, "0": [], "0.5": [0.5] * requests}  # 0 is what was asked before
        assert [body.get("temperature") for body in server.bodies] == expected[given]


BAD_OPTIONS = {f"--temperature={value}": "invalid temperature value" for value in ("warm", "-1", "nan")}
BAD_OPTIONS["--annotations a.json b.json"] = "1 questions files and 2 of annotations"  # they come in pairs


@pytest.mark.parametrize("given", BAD_OPTIONS)
def test_an_option_that_cannot_be_meant(given, dump, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*dump.options(tmp_path), *given.split()])
    assert BAD_OPTIONS[given] in capsys.readouterr().err


def test_too_little_of_anything(dump, built, tmp_path):
    out, *_ = built
    with serve(program(dump.pictures)) as server:
        again = judge(server, out)
        with pytest.raises(RecordError, match="NQ-open pairs, 3 are there"):
            construct(dump.read(), read_nq(dump.nq)[:3], dump.root, again, tmp_path, 20)
        with pytest.raises(RecordError, match="too few to split"):
            construct(dump.read(), read_nq(dump.nq), dump.root, again, tmp_path, 0, n_images=1)


def test_the_command_says_what_is_wrong(dump, tmp_path, monkeypatch):
    with serve(program(dump.pictures), [status(401, "who are you?")] * 50) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        with pytest.raises(SystemExit, match=r"construct: .*HTTP 401: who are you\?.*OPENAI_API_KEY"):
            main(dump.options(tmp_path))
    with pytest.raises(SystemExit, match="no-such-file"):
        main([*dump.options(tmp_path), f"--nq={tmp_path / 'no-such-file'}"])
