"""IKE: what stands in the context, that batching changes nothing, that the base model is never touched."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from mscke.editors import build
from mscke.editors.ike import IKE, ROTATION, InContextModel, choose_k, demonstration, largest_k
from mscke.editors.mscke import own_edits
from mscke.editors.serac import MiniLMEncoder
from mscke.models.mllm import MLLM
from mscke.models.names import fingerprint
from mscke.models.prompts import IN_CONTEXT, TEMPLATE
from mscke.training.scope import ROLES

pytest_plugins = ["tiny"]


@pytest.fixture(scope="module")
def minilm():
    return MiniLMEncoder()


@pytest.fixture(scope="module")
def split(records):
    """(demonstrations, edited records)."""
    return records[3:], records[:3]


@pytest.fixture(scope="module")
def asked(split):
    few = split[1]
    return ([q for r in few for q in r.queries.values()], [a for r in few for a in r.answers.values()], own_edits(3, 5))


def fact(record):
    return IN_CONTEXT.format(record.edit.prompt, record.edit.answer)


def brute_force(minilm, record, others, k):
    """The k nearest by cosine, each pair encoded apart."""
    text = lambda r: minilm.encode([f"{r.edit.prompt} {r.edit.answer}"])[0][0]  # noqa: E731
    cosine = [float(torch.cosine_similarity(text(record), text(r), dim=0)) for r in others]
    return sorted(range(len(others)), key=lambda i: -cosine[i])[:k]


@pytest.mark.parametrize("k", [0, 1, 4, 9, 50])
def test_the_prompt_holds_the_k_nearest_the_nearest_last(blip2, minilm, split, k):
    others, few = split
    edited = IKE(blip2, others, minilm, k).edit(few)
    for record, context in zip(few, edited.contexts, strict=True):
        order = brute_force(minilm, record, others, k)
        cases = [demonstration(others[i], ROTATION[j % len(ROTATION)]) for j, i in enumerate(order)]
        assert context == "".join(reversed(cases)) + fact(record)


def test_a_prompt_read_back(blip2, minilm, split):
    others, few = split
    query = few[0].in_scope
    ids = IKE(blip2, others, minilm, 2).edit(few).prompts([query], torch.tensor([0]))[0]
    prefix = blip2.encoder.prefix_length(True)
    assert ids[:prefix] == blip2.prompts([query])[0][:prefix]  # the image stands in front, as ever
    text = blip2.tokenizer.decode(ids[prefix:])
    assert text.count("New Fact:") == 3
    assert text.endswith(f"{few[0].edit.answer}\nPrompt: {TEMPLATE.format(query.question)}")


def test_32_demonstrations_are_ikes_copies_updates_and_retained():
    kinds = [ROTATION[rank % len(ROTATION)] for rank in range(32)]
    assert kinds.count("reliability") == 4
    assert kinds.count("in_scope") + kinds.count("generality") == 12
    assert kinds.count("out_of_scope") + kinds.count("locality") == 16


def test_a_retaining_demonstration_gives_the_answer_from_before(records):
    record = records[0]
    shown = demonstration(record, "out_of_scope")
    assert shown.startswith(fact(record))
    assert shown.endswith(f"{record.out_of_scope.question} Short answer: {record.out_of_scope_answer}\n\n")


def test_batched_is_one_by_one(mllm, minilm, split, asked):
    (others, few), (queries, answers, among) = split, asked
    editor = IKE(mllm, others, minilm, 3)
    batch = editor.edit(few)
    got, forced = batch.answer(queries, among), batch.force(queries, answers, among)
    for i, query in enumerate(queries):
        alone = editor.edit([few[int(among[i])]])
        assert alone.answer([query]) == [got[i]]  # its one edit is the nearest
        top, hits = (lambda f: (f.top, f.hits))(alone.force([query], [answers[i]])[0])
        assert (top[:, 0] == forced[i].top[:, 0]).all() and (hits == forced[i].hits).all()


def test_all_in_force_the_edit_nearest_in_text_is_told(blip2, minilm, split):
    others, few = split
    edited = IKE(blip2, others, minilm, 1).edit(few)
    queries = [r.queries["reliability"] for r in few]
    expected = []
    for query in queries:
        vector = minilm.encode([query.question])[0][0]
        edits = minilm.encode([f"{r.edit.prompt} {r.edit.answer}" for r in few])[0]
        expected.append(int((edits @ vector).argmax()))
    assert edited.prompts(queries) == edited.prompts(queries, torch.tensor(expected))


def test_without_an_edit_it_is_the_base_model(blip2, minilm, split, asked):
    queries, edited = asked[0], IKE(blip2, split[0], minilm, 4).edit([])
    assert edited.prompts(queries) == blip2.prompts(queries)
    assert edited.answer(queries) == blip2.answer(queries)


def test_editing_never_touches_the_base_model(mllm, minilm, split, asked):
    (others, few), (queries, answers, among) = split, asked
    before = fingerprint(mllm.model)
    first = MLLM(mllm.model, mllm.tokenizer, "again").answer(queries)
    edited = IKE(mllm, others, minilm, 2).edit(few)
    edited.answer(queries, among)
    edited.force(queries, answers, among)
    assert fingerprint(mllm.model) == before
    assert MLLM(mllm.model, mllm.tokenizer, "again").answer(queries) == first


def test_the_largest_k_fits_and_a_few_more_do_not(blip2, minilm, records):
    k = largest_k(blip2, records)
    many = records * 10  # more than fit
    queries = [q for r in records for q in r.queries.values()]
    among = own_edits(len(records), 5)
    limit = blip2.model.config.text_config.max_position_embeddings
    prompts = IKE(blip2, many, minilm, k).edit(records).prompts(queries, among)
    assert 0 < max(map(len, prompts)) <= limit - 6
    with pytest.raises(ValueError, match="lower k"):
        IKE(blip2, many, minilm, 2 * k).edit(records).prompts(queries, among)


def test_choose_k_takes_the_best_mean_of_four(blip2, minilm, split):
    others, few = split
    k, table = choose_k(blip2, others, minilm, few, ks=(0, 2, 1000))
    assert table["k"].tolist() == [0, 2, largest_k(blip2, others)]
    assert table["score"][table["k"] == k].item() == table["score"].max()
    four = table[["reliability", "generality", "locality", "specificity"]].mean(axis=1)
    torch.testing.assert_close(torch.tensor(four), torch.tensor(table["score"]))
    retained = IKE(blip2, others, minilm, 2).edit(few).answer([r.locality for r in few], torch.arange(3))
    share = sum(a == b for a, b in zip(retained, blip2.answer([r.locality for r in few]), strict=True)) / 3
    assert table["locality"][1] == pytest.approx(share)


def test_choose_k_compares_as_the_metrics_do(blip2, minilm, split, monkeypatch):
    others, few = split
    said = lambda text: lambda self, queries, *_: [text] * len(queries)  # noqa: E731
    monkeypatch.setattr(type(few[0]), "answers", property(lambda r: dict.fromkeys(ROLES, "Cat")))
    monkeypatch.setattr(MLLM, "answer", said("a cat"))
    monkeypatch.setattr(InContextModel, "answer", said("“the cat”,"))
    _, table = choose_k(blip2, others, minilm, few, ks=(0,))
    assert (table.drop(columns="k") == 1).all(axis=None)


def test_a_choice_that_other_code_made_is_made_anew(blip2, split, tmp_path, monkeypatch):
    others, few = split
    made, codes = [], iter(["this", "this", "that"])
    table = pd.DataFrame({"k": [0], "score": [1.0]})
    monkeypatch.setattr(build, "choose_k", lambda *_: made.append(0) or (0, table))
    monkeypatch.setattr(build, "MiniLMEncoder", lambda _: None)
    monkeypatch.setattr(build, "code_of", lambda *_: next(codes))
    track = SimpleNamespace(ike_records=2, outputs=tmp_path, features=None)
    for n in (1, 1, 2):
        assert build.ike_choices(track, SimpleNamespace(train=others, validation=few), blip2).equals(table)
        assert len(made) == n
