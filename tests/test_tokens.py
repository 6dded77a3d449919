"""What a user writes is text: no tokenizer here takes any of it for a control token."""

from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from mscke.benchmark.sample import Edit, Query
from mscke.config import ASSETS
from mscke.editors.ike import IKE
from mscke.editors.serac import MiniLMEncoder
from mscke.models.clip import ClipEncoder
from mscke.models.counterfactual import CounterfactualModel
from mscke.models.prompts import BLIP2_FORMAT, IN_CONTEXT, MINIGPT4_FORMAT, PromptEncoder
from mscke.models.tiny import llama_tokenizer, opt_tokenizer

pytest_plugins = ["tiny"]

VISUAL = 4
MARKS = ["<image>", "<Img>", "</Img>", "###Human:", "###Assistant:", "<s>", "</s>", "<pad>", "<unk>", "[SEP]"]
PLAIN = ["What", " ", "owl", "s", "?", "<", ">", "New Fact:", "\n"]
KINDS = ("BLIP-2-mini", "MiniGPT-4-mini", "OPT", "Llama", "slow")


def a_tokenizer(kind):
    if kind.endswith("mini"):
        return AutoTokenizer.from_pretrained(ASSETS / kind.lower().replace("-2", "2").replace("-4", "4"))
    words = [*MARKS, *PLAIN, "Question: Short answer:", "Prompt:"]
    makers = {"OPT": opt_tokenizer, "Llama": llama_tokenizer}
    return makers[kind](words) if kind in makers else ByT5Tokenizer(bos_token="</s>")


@pytest.fixture(scope="module", params=KINDS)
def prompter(request):
    """The language models' tokenizers: mini, in the formats of the published ones, and one in Python alone."""
    kind = request.param
    prompt = MINIGPT4_FORMAT if kind in ("MiniGPT-4-mini", "Llama") else BLIP2_FORMAT
    return PromptEncoder(a_tokenizer(kind), prompt, VISUAL)


@pytest.fixture(scope="module")
def minilm():
    return MiniLMEncoder()


@pytest.fixture(scope="module", params=["clip_name", "openai_name"])
def clip(request):
    """A CLIP with a tokenizer of transformers, and one with OpenAI's own."""
    return ClipEncoder(request.getfixturevalue(request.param))


def control(tokenizer):
    """Ids by the control tokens' texts."""
    if isinstance(tokenizer, open_clip.tokenizer.SimpleTokenizer):
        return {tokenizer.decoder[i]: i for i in tokenizer.all_special_ids}
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    return dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def hostile(tokenizer):
    return sorted({*control(tokenizer), *MARKS})


def a_text(tokenizer):
    """Control tokens, whole and broken, between words and right inside them."""
    return st.lists(st.sampled_from(hostile(tokenizer) + PLAIN), min_size=1, max_size=6).map("".join)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_no_field_of_a_prompt_holds_a_control_token(prompter, data):
    question, prompt, answer = (data.draw(a_text(prompter.tokenizer)) for _ in range(3))
    marks = {*control(prompter.tokenizer).values(), prompter.image_id}
    context = IN_CONTEXT.format(prompt, answer)
    for ids in (
        *(prompter.prompt(question, seen, c)[prompter.prefix_length(seen) :] for seen in (True, False) for c in ("", context)),
        prompter.answer(answer, eos=False),
        prompter.answer(answer)[:-1],
    ):  # fmt: skip
        assert not marks & set(ids)
    assert prompter.prompt(question, True, context).count(prompter.image_id) == VISUAL


@pytest.mark.parametrize("kind", ["BLIP-2-mini", "OPT"])
def test_the_very_characters_are_read(kind):
    prompter = PromptEncoder(a_tokenizer(kind), BLIP2_FORMAT, VISUAL)
    text = "Is <image></s> ###Human:<pad> here?"
    assert prompter.tokenizer.decode(prompter.tokens(text)) == text


def test_our_own_pieces_are_control_tokens(prompter):
    ids, known = prompter.prompt("Who?", True), control(prompter.tokenizer)
    pieces = {BLIP2_FORMAT.stop: ["</s>"], MINIGPT4_FORMAT.stop: ["<s>", "<Img>", "</Img>"]}[prompter.stop]
    for piece in pieces:
        if piece in known:
            assert known[piece] in ids[: prompter.prefix_length(True)]
    assert prompter.answer("owl")[-1] == prompter.eos_id == known["</s>"]


def texts_of(records):
    asked = [q.question for r in records for q in r.queries.values()]
    return [*asked, *(f" {a}" for r in records for a in r.answers.values())] + [
        IN_CONTEXT.format(r.edit.prompt, r.edit.answer) for r in records
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_other_text_is_read_as_ever(kind, records):
    texts, tokenizer = texts_of(records), a_tokenizer(kind)
    before = tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompter = PromptEncoder(tokenizer, BLIP2_FORMAT, VISUAL)
    assert [prompter.tokens(text) for text in texts] == prompter.text_ids(texts) == before


def test_other_text_is_read_as_ever_by_the_encoders(records, clip_name, openai_name, minilm):
    texts = texts_of(records)
    for name in (clip_name, openai_name):
        assert torch.equal(ClipEncoder(name).tokenizer(texts), open_clip.get_tokenizer(name)(texts))
    plain = AutoTokenizer.from_pretrained(minilm.tokenizer.name_or_path)
    assert minilm.tokenizer(texts)["input_ids"] == plain(texts)["input_ids"]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_clips_marks_are_where_clip_puts_them(clip, data):
    question, answer = (data.draw(a_text(clip.tokenizer)) for _ in range(2))
    ids, known = (clip.tokenizer([f"{question} {answer}".upper(), f"{question} {answer}"]), control(clip.tokenizer))
    openai = "<start_of_text>" in known
    begin, end, pad = (1, "<end_of_text>", 0) if openai else (0, "</s>", known["<pad>"])
    for row in ids.tolist():
        end_at = row.index(known[end])
        assert not set(known.values()) & set(row[begin:end_at])
        assert set(row[end_at + 1 :]) <= {pad}


def test_openais_marks_are_text_written_as_html_too(openai_name):
    read = ClipEncoder(openai_name).tokenizer
    (ids,) = read("an owl &lt;End_Of_Text&gt; on a card").tolist()
    assert ids.index(read.eot_token_id) == len(read.encode("an owl < end _ of _ text > on a card")) + 1


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_minilms_marks_are_where_bert_puts_them(minilm, data):
    text = " ".join(data.draw(a_text(minilm.tokenizer)) for _ in range(2))
    begin, *ids, end = minilm.tokenizer(text)["input_ids"]
    known = control(minilm.tokenizer)
    assert (begin, end) == (known["[CLS]"], known["[SEP]"]) and not set(known.values()) & set(ids)


def test_such_texts_have_features_of_their_own_batched_or_not(clip, minilm):
    for encoder in (clip, minilm):
        texts = [f"an owl {mark} on a card" for mark in hostile(encoder.tokenizer)] + ["an owl"]
        together = encoder.texts.compute(texts)[0]
        alone = torch.cat([encoder.texts.compute([text])[0] for text in texts])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
        assert all((row - together[-1]).abs().max() > 1e-3 for row in together[:-1])  # nothing ended at the mark


@pytest.fixture(scope="module")
def asked(mllm, records):
    """Such questions, about a picture and about none, with such edits and answers."""
    marks = hostile(mllm.tokenizer)
    images = [records[i % len(records)].edit.image if i % 3 else None for i in range(len(marks))]
    queries = [Query(f"Is {mark} it{mark}?", image) for mark, image in zip(marks, images, strict=True)]
    edits = [Edit(records[0].edit.image, f"What{mark} is {mark}?", f"{mark}owl") for mark in marks]
    return queries, edits, [f"two {mark}" for mark in marks]


def test_the_base_model_answers_such_questions_batched_as_alone(mllm, asked):
    queries, _, answers = asked
    alone = [mllm.__class__(mllm.model, mllm.tokenizer, "alone") for _ in queries]
    forced = mllm.force(queries, answers)
    assert mllm.answer(queries) == [m.answer([q])[0] for m, q in zip(alone, queries, strict=True)]
    for m, query, answer, found in zip(alone, queries, answers, forced, strict=True):
        assert np.array_equal(m.force([query], [answer])[0].top[:, 0], found.top[:, 0])


def test_the_counterfactual_model_reads_such_edits(mllm, asked):
    queries, edits, answers = asked
    torch.manual_seed(0)
    model = CounterfactualModel.beside(mllm).eval()
    assert model.answer(queries, edits) == [model.answer([q], [e])[0] for q, e in zip(queries, edits, strict=True)]
    assert model.loss(queries, edits, answers).isfinite()
    assert len(model.force(queries, edits, answers)) == len(queries)


def test_ikes_contexts_hold_no_control_token(mllm, asked, records, minilm):
    queries, _, answers = asked
    told = [
        replace(records[0], edit=e, in_scope=q, in_scope_answer=a) for q, e, a in zip(*asked[:2], answers, strict=True)
    ]
    edited = IKE(mllm, told, minilm, 2).edit(told)
    among, marks = torch.arange(len(told)), set(control(mllm.tokenizer).values())
    for query, ids in zip(queries, edited.prompts(queries, among), strict=True):
        assert not marks & set(ids[mllm.encoder.prefix_length(query.image is not None) :])
    assert len(edited.answer(queries, among)) == len(edited.force(queries, answers, among)) == len(told)
