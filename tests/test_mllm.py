"""The multimodal language models: batching, where visual tokens go, decoding, teacher forcing."""

import gc
import hashlib
import os
import shutil
import weakref

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mscke.benchmark.answers import strict_answer
from mscke.benchmark.sample import Query
from mscke.config import ASSETS
from mscke.models import mllm as module
from mscke.models import names
from mscke.models.decoding import generate, teacher_force
from mscke.models.mllm import MLLM, load_pixels
from mscke.models.names import fingerprint
from mscke.models.prompts import IN_CONTEXT, embed

pytest_plugins = ["tiny"]


def again(mllm):
    """The same model without what it remembers."""
    return MLLM(mllm.model, mllm.tokenizer, "again")


def seen_alone(mllm, query, ids):
    """Logits (L, vocabulary) of one unpadded sequence, by transformers' own forward from pixels."""
    ids = torch.tensor([ids])
    if query.image is None:
        return mllm.model.language_model(input_ids=ids).logits[0]
    pixels = load_pixels([query.image], mllm.model.config.vision_config.image_size)
    return mllm.model(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]


def test_answers_do_not_depend_on_the_batch(mllm, queries):
    together = mllm.answer(queries)
    assert len(set(together)) > len({q.image for q in queries})  # the tiny models do tell queries apart
    few, fresh = queries[:20], again(mllm)
    assert [fresh.answer([q])[0] for q in few] == together[:20]
    assert again(mllm).answer(few, batch_size=7) == together[:20]
    assert again(mllm).answer(few[::-1]) == together[:20][::-1]


def test_forced_predictions_do_not_depend_on_the_batch(mllm, queries, gold):
    together = mllm.force(queries[:20], gold[:20])
    fresh = again(mllm)
    for query, answer, a in zip(queries[:20], gold[:20], together, strict=True):
        (b,) = fresh.force([query], [answer])
        assert a.top.shape == b.top.shape and (a.hits == b.hits).all()
        assert (a.top[:, 0] == b.top[:, 0]).all()


def test_an_image_is_looked_at_once(mllm, records):
    fresh, looked = again(mllm), []
    hook = fresh.model.vision_model.register_forward_hook(
        lambda m, a, kw, o: looked.append(len(kw["pixel_values"])), with_kwargs=True
    )
    fresh.answer(list(records[0].queries.values()))
    fresh.force([records[0].in_scope, records[0].out_of_scope], ["yes", "no"])
    fresh.answer([Query("Anything else?", records[0].edit.image)])
    hook.remove()
    assert sum(looked) == 1


def test_backbones_with_the_same_eyes_share_features_on_disk(mllm_folders, records, tmp_path, monkeypatch):
    paths = [r.edit.image for r in records]
    first = MLLM.from_pretrained(mllm_folders["opt"], "BLIP-2", cache=tmp_path)
    features = first.features(paths)
    second = MLLM.from_pretrained(mllm_folders["llama"], "MiniGPT-4", cache=tmp_path)
    monkeypatch.setattr(MLLM, "_look", lambda *_: pytest.fail("looked again"))
    assert torch.equal(second.features(paths), features)
    assert len(list(tmp_path.glob("qformer-*"))) == 1


def test_other_eyes_share_nothing(mllm_folders, tmp_path):
    mllm = MLLM.from_pretrained(mllm_folders["opt"], "BLIP-2", cache=tmp_path)
    names = {mllm.eyes()}
    model = mllm.model
    for parameter in (next(model.vision_model.parameters()), next(model.qformer.parameters()), model.query_tokens):
        with torch.no_grad():
            parameter.add_(1e-3)
        names.add(mllm.eyes())
    assert len(names) == 4


def test_frozen_weights_are_named_once(mllm_folders, records, monkeypatch):
    """Making a model costs no hash, and however many are made around one, its weights are hashed once."""
    hashed, sha256 = [], hashlib.sha256
    monkeypatch.setattr("mscke.models.names.hashlib.sha256", lambda *a: hashed.append(1) or sha256(*a))
    mllm = MLLM.from_pretrained(mllm_folders["opt"], "BLIP-2")
    others = [MLLM(mllm.model, mllm.tokenizer, "again") for _ in range(3)]
    assert not hashed
    for one in (mllm, *others):
        one.features([records[0].edit.image])
    queries = len(others)  # the query tokens, no module of their own, are hashed for each
    assert len(hashed) == 3 + queries


def test_names_outlive_their_process(mllm_folders, tmp_path, monkeypatch):
    """As long as the files are those, and nothing changed the weights since."""
    folder = shutil.copytree(mllm_folders["opt"], tmp_path / "model")
    hashed, as_it_is = [], names._hash
    monkeypatch.setattr(names, "_hash", lambda tensors: hashed.append(1) or as_it_is(tensors))

    def named(change=None, **options):
        mllm = MLLM.from_pretrained(folder, "BLIP-2", cache=tmp_path / "cache", **options)
        if change:
            change(mllm.model)
        hashed.clear()
        return (mllm.eyes(), fingerprint(mllm.model)), len(hashed)

    def louder(model):
        with torch.no_grad():
            model.vision_model.embeddings.class_embedding.add_(1)

    found, n = named()
    assert n == 4  # what sees, the query tokens, and all of it
    assert named() == (found, 1)  # the query tokens are no module of their own
    changed, n = named(louder)
    assert n == 3 and changed[0] != found[0] and changed[1] != found[1]
    assert named() == (found, 1)
    assert named(dtype=torch.bfloat16)[1] == 4
    (weights,) = folder.glob("*.safetensors")
    os.utime(weights, ns=(1, 1))
    assert named() == (found, 4)
    (tmp_path / "cache" / names.KEPT).write_text("[1")
    assert named() == (found, 4) and named() == (found, 1)


def test_a_model_is_gone_when_nobody_holds_it(mllm_folders, records):
    """Without the collector: on a GPU the next one needs its room."""
    mllm = MLLM.from_pretrained(mllm_folders["opt"], "BLIP-2")
    mllm.answer([records[0].in_scope])
    gone = weakref.ref(mllm), weakref.ref(mllm.model)
    gc.disable()
    try:
        del mllm
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


def test_visual_tokens_go_where_they_belong(mllm, queries):
    """A batch of image and text-only queries, against transformers' own forward, one by one and as a batch."""
    few = [queries[i] for i in (4, 0, 9, 12, 14, 5)]  # text, image, text, image, text, image
    assert [q.image is None for q in few] == [True, False] * 3
    prompts = mllm.prompts(few)
    batch = mllm.encoder.collate(prompts)
    inputs = embed(mllm.model.language_model, batch.ids, mllm.encoder.image_id, mllm.see(few))
    ours = mllm.model.language_model(inputs_embeds=inputs, attention_mask=batch.mask).logits
    for query, prompt, row in zip(few, prompts, ours, strict=True):
        assert prompt.count(mllm.encoder.image_id) == (9 if query.image else 0)
        torch.testing.assert_close(row[: len(prompt)], seen_alone(mllm, query, prompt), atol=2e-4, rtol=1e-4)
    pixels = load_pixels([q.image for q in few if q.image], mllm.model.config.vision_config.image_size)
    theirs = mllm.model(pixel_values=pixels, input_ids=batch.ids, attention_mask=batch.mask).logits
    real = batch.mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=2e-4, rtol=1e-4)


def test_left_padded_generation_is_greedy_decoding_without_padding(mllm, queries):
    few = queries[:6]
    prompts = mllm.prompts(few)
    assert len({len(p) for p in prompts}) > 1
    padded = generate(mllm.model.language_model, mllm.encoder, prompts, mllm.see(few))
    for query, prompt, answer in zip(few, prompts, padded, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and (ids[-1] != mllm.encoder.eos_id or len(ids) == len(prompt)):
            ids.append(int(seen_alone(mllm, query, ids)[-1].argmax()))
        text = mllm.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        assert answer == strict_answer(text)


def test_teacher_forcing_is_the_arg_max_at_each_step(mllm, queries, gold):
    few, answers = queries[:6], [mllm.encoder.answer(a, eos=False) for a in gold[:6]]
    answers[1] = answers[1] + [5, 9, 700]  # several tokens
    prompts = mllm.prompts(few)
    answers[2] = [int(seen_alone(mllm, few[2], prompts[2])[-1].argmax()), 3]  # one hit
    forced = teacher_force(mllm.model.language_model, mllm.encoder, prompts, answers, mllm.see(few))
    for query, prompt, answer, found in zip(few, prompts, answers, forced, strict=True):
        steps = [seen_alone(mllm, query, prompt + answer[:t])[-1] for t in range(len(answer))]
        assert found.hits.tolist() == [int(s.argmax()) == a for s, a in zip(steps, answer, strict=True)]
        assert found.top.shape == (len(prompt) + len(answer) - 1, 10)  # visual tokens included
        for step, top in zip(steps, found.top[len(prompt) - 1 :], strict=True):
            assert top.tolist() == step.topk(10).indices.tolist()
    assert forced[2].hits.tolist()[0] is True


def test_prompts_of_both_backbones(blip2, minigpt4):
    seen, context, template = Query("Who?", "/a.png"), "New Fact: a b\nPrompt: ", "Question: Who? Short answer:"
    for mllm, before, after in ((blip2, "", "</s>"), (minigpt4, "<s>###Human: <Img>", "</Img> ")):
        (ids,), encoder = mllm.prompts([seen]), mllm.encoder
        assert mllm.tokenizer.decode(ids) == before + "<image>" * 9 + after + template
        assert encoder.prefix_length(True) == ids.index(encoder.tokens("Question")[0])
        assert mllm.tokenizer.decode(mllm.prompts([Query("Who?")], [context])[0]) == "</s>" + context + template
        assert encoder.prefix_length(False) == 1


def test_an_edit_in_context_stands_before_the_question(mllm):
    context = IN_CONTEXT.format("Who is it?", "owl")
    plain, told = (mllm.prompts([Query("Who?", "/a.png")], [c])[0] for c in ("", context))
    prefix = mllm.encoder.prefix_length(True)
    added = len(told) - len(plain)
    assert told[:prefix] == plain[:prefix] and told[prefix + added :] == plain[prefix:]
    assert mllm.tokenizer.decode(told[prefix : prefix + added]) == context


def test_answers_are_written_as_the_release_does(mllm):
    ids = mllm.encoder.answer("owl")
    assert mllm.tokenizer.decode(ids[:-1]) == " owl" and ids[-1] == mllm.encoder.eos_id
    assert mllm.encoder.answer("owl", eos=False) == ids[:-1]


@pytest.mark.parametrize("left", [False, True])
def test_collate(mllm, left):
    batch = mllm.encoder.collate([[7, 8, 9], [7]], [[1, 2], [3]], left=left)
    pad = mllm.encoder.pad_id
    short = [pad] * 3 + [7] if left else [7] + [pad] * 3
    assert batch.ids.tolist() == [[7, 8, 9, 1], short]  # the last answer token is predicted, never read
    assert batch.mask.tolist() == [[1, 1, 1, 1], [int(i != pad) for i in short]]
    assert batch.labels.tolist() == [[-100, -100, 1, 2], [3 if i == 7 else -100 for i in short]]


def test_images_are_normalised_as_clip_does(tmp_path):
    Image.new("RGB", (10, 6), (255, 0, 51)).save(tmp_path / "a.png")
    pixels = load_pixels([str(tmp_path / "a.png")], 8)
    assert pixels.shape == (1, 3, 8, 8)
    expected = [(v - m) / s for v, m, s in zip((1, 0, 0.2), module.MEAN, module.STD, strict=True)]
    torch.testing.assert_close(pixels, torch.tensor(expected).view(1, 3, 1, 1).expand(1, 3, 8, 8))


STRICT = {" Yes. ": "yes", "T-Rex": "t-rex", "two  owls\n": "two owls", "": "", "no ..": "no", "u.s.a.": "u.s.a"}


@pytest.mark.parametrize("text", STRICT)
def test_strict_answer(text):
    assert strict_answer(text) == STRICT[text]


@example("a. .")
@settings(deadline=None)
@given(st.text(alphabet=" .aB\n-é", max_size=12))
def test_normalising_twice_changes_nothing(text):
    assert strict_answer(strict_answer(text)) == strict_answer(text)


@pytest.mark.parametrize("folder", ["blip2-mini", "minigpt4-mini"])
def test_teacher_forcing_knows_what_greedy_decoding_says(folder, records):
    """Of a model that ends its answers: what it says is predicted to its end, and nothing else is."""
    model = MLLM.from_pretrained(ASSETS / folder, folder)
    asked = [r.queries[role] for r in records[:8] for role in ("reliability", "in_scope", "out_of_scope")]
    said = model.answer(asked)
    assert len(set(said)) > 4 and all(f.is_greedy() for f in model.force(asked, said))
    assert not any(f.is_greedy() for f in model.force(asked, [f"{answer} and an owl" for answer in said]))


def test_answers_may_be_as_long_as_the_records_have_them(mllm_folders):
    mllm = MLLM.from_pretrained(mllm_folders["opt"], "BLIP-2")
    before = mllm.encoder.reserve
    mllm.make_room(["no", "two"])
    assert mllm.encoder.reserve == before  # never fewer
    mllm.make_room([long := "seven sleepy owls and one more owl on the blue card"])
    assert mllm.encoder.reserve == len(mllm.encoder.answer(long, eos=False)) > before
    query = Query("What is it?")
    with torch.no_grad():
        mllm.model.language_model.lm_head.weight.mul_(0)  # the first token, for ever
    asked = mllm.model.language_model, mllm.encoder, mllm.prompts([query]), None
    assert generate(*asked) == generate(*asked, mllm.encoder.reserve)
    (forced,) = mllm.force([query], [long])
    assert not forced.is_greedy(before)
