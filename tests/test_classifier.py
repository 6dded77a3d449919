"""The scope classifier: what ρ is, what it may depend on, and that it survives the disk."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mscke.benchmark.sample import Query
from mscke.classifier import FUSIONS, OURS, SIMILARITIES, ScopeClassifier
from mscke.models.attention import attend_folded
from mscke.models.clip import ClipEncoder

pytest_plugins = ["tiny"]


@pytest.fixture
def make(clip_name, encoder):
    """A fresh classifier of random weights, on the session's CLIP."""

    def make(fusion="dot", similarity="logistic"):
        torch.manual_seed(5)
        return ScopeClassifier(clip_name, fusion=fusion, similarity=similarity, width=16, encoder=encoder).eval()

    return make


def edits_of(records):
    return [Query(r.edit.prompt, r.edit.image) for r in records], [r.edit.answer for r in records]


def on_image(queries, image):
    return [Query(q.question, image) for q in queries]


@pytest.mark.parametrize("fusion", FUSIONS + OURS)
def test_embeddings_do_not_depend_on_the_batch(make, queries, fusion):
    classifier = make(fusion)
    together = classifier.embed(queries)
    alone = torch.cat([classifier.embed([q]) for q in queries])
    assert together.shape == (len(queries), classifier.dim)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fusion", FUSIONS + OURS)
def test_repeated_pairs_are_embedded_once(make, encoder, queries, fusion, monkeypatch):
    classifier = make(fusion)
    pairs = [*queries, Query(queries[0].question, None), Query(queries[0].question, queries[-2].image)]
    order = torch.randperm(3 * len(pairs), generator=torch.Generator().manual_seed(0)) % len(pairs)
    seen, fuse = [], classifier._fuse
    monkeypatch.setattr(classifier, "_fuse", lambda f: seen.append(len(f.text)) or fuse(f))
    repeated = classifier.embed([pairs[i] for i in order])
    assert seen == [len({q.question if fusion == "text" else q for q in pairs})]
    torch.testing.assert_close(repeated, classifier.embed(pairs)[order], atol=1e-6, rtol=0)


def test_the_answer_belongs_to_the_edit_side(make, records):
    classifier = make()
    prompts, answers = edits_of(records)
    written_out = [Query(f"{p.question} {a}", p.image) for p, a in zip(prompts, answers, strict=True)]
    assert torch.equal(classifier.embed(prompts, answers), classifier.embed(written_out))
    assert not torch.allclose(classifier.embed(prompts, answers), classifier.embed(prompts), atol=1e-3)


def test_cached_features_are_those_computed_anew(clip_name, encoder, queries, tmp_path, monkeypatch):
    ClipEncoder(clip_name, cache=tmp_path)(queries)

    def never(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(ClipEncoder, "_encode_texts", never)
    monkeypatch.setattr(ClipEncoder, "_encode_images", never)
    cached = ClipEncoder(clip_name, cache=tmp_path)(queries)
    monkeypatch.undo()
    for name in ("text", "image", "pooled", "tokens", "cosine", "words", "said"):
        fresh = getattr(ClipEncoder(clip_name)(queries), name)
        torch.testing.assert_close(getattr(cached, name)[:], fresh, atol=1e-6, rtol=0)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("fusion", FUSIONS + OURS)
def test_similarity_is_the_published_formula(make, records, queries, fusion, similarity):
    classifier = make(fusion, similarity)
    z_edit, z_query = classifier.embed(*edits_of(records)), classifier.embed(queries)
    rho = classifier.similarity(z_query, z_edit)
    assert rho.shape == (len(queries), len(records))
    assert bool((rho > 0).all()) and bool((rho < 1).all())
    s, m = classifier.scale.exp().item(), classifier.margin.item()
    for i, q in enumerate(z_query.double().numpy()):
        for j, e in enumerate(z_edit.double().numpy()):
            d2 = sum((x - y) ** 2 for x, y in zip(q, e, strict=True))
            expected = 1 / (1 + math.exp(-s * (m - d2))) if similarity == "logistic" else math.exp(-d2)
            assert rho[i, j].item() == pytest.approx(expected, abs=2e-5)
    if similarity == "logistic":
        np.testing.assert_allclose(z_query.norm(dim=-1), 1, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(d2=st.floats(0, 1e4), kind=st.sampled_from(SIMILARITIES), log_s=st.floats(-3, 5), margin=st.floats(-2, 4))
def test_rho_lies_strictly_between_0_and_1(clip_name, encoder, d2, kind, log_s, margin):
    classifier = ScopeClassifier(clip_name, similarity=kind, width=4, encoder=encoder)
    classifier.scale.data.fill_(log_s)
    classifier.margin.data.fill_(margin)
    assert 0 < classifier.score(torch.tensor(d2)).item() < 1


@settings(max_examples=60, deadline=None)
@given(d2=st.floats(1e-5, 80))
def test_exponential_logit_is_the_log_odds_of_rho(clip_name, encoder, d2):
    classifier = ScopeClassifier(clip_name, similarity="exponential", width=4, encoder=encoder)
    rho = math.exp(-d2)
    odds = -d2 - math.log(-math.expm1(-d2))  # log ρ − log(1 − ρ), exactly
    logit = classifier.logit(torch.tensor(d2))
    assert logit.item() == pytest.approx(odds, rel=1e-5, abs=1e-5)
    assert logit.sigmoid().item() == pytest.approx(rho, rel=1e-4)


def slope(classifier, d2, inside):
    """|dL/dd²| of one pair's binary cross-entropy."""
    distance = torch.tensor(d2, requires_grad=True)
    F.softplus(-classifier.logit(distance) if inside else classifier.logit(distance)).backward()
    return abs(distance.grad.item())


def test_no_pair_on_the_wrong_side_stops_training(make):
    logistic, exponential = make(), make(similarity="exponential")
    for d2 in (4.0, 60.0, 100.0, 1000.0):  # far apart, yet the same edit
        assert slope(logistic, d2, inside=True) > 1
        assert slope(exponential, d2, inside=True) == pytest.approx(1, abs=0.02)
    assert slope(logistic, 0.0, inside=False) > 1  # on one spot, yet out of scope
    # Taken on ρ itself, as released, nothing is left to learn from at d² = 60, on either side.
    distance = torch.tensor(60.0, requires_grad=True)
    torch.exp(-distance).backward()
    assert abs(distance.grad.item()) < 1e-14
    assert slope(exponential, 60.0, inside=False) < 1e-14


def test_dot_attention_is_a_softmax_over_patches(make, encoder, queries):
    classifier, seen = make("dot"), [q for q in queries if q.image]
    features = encoder(seen)
    attended, weights = classifier.attend(features)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(seen)))
    proj, sharpness = encoder.model.visual.proj.double(), classifier.temperature.exp().double()
    for i in range(len(seen)):
        tokens, text = features.tokens[features.image[i]].double(), features.text[i].double()
        scores = [sharpness * torch.cosine_similarity(token @ proj, text, dim=0) for token in tokens]
        total = sum(score.exp() for score in scores)
        expected = [(score.exp() / total).item() for score in scores]
        np.testing.assert_allclose(weights[i].detach(), expected, atol=1e-5)
        mean = sum(w * token for w, token in zip(expected, tokens, strict=True))
        np.testing.assert_allclose(attended[i].detach(), mean, atol=1e-4)


def test_cross_attention_is_torchs_own(make, encoder, queries):
    classifier, f = make("cross"), encoder([q for q in queries if q.image])
    tokens = f.tokens[f.image]
    attended, weights = classifier.attend(f)
    expected, expected_weights = classifier.attention(classifier.query(f.text).unsqueeze(1), tokens, tokens)
    torch.testing.assert_close(attended, expected.squeeze(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights, expected_weights.squeeze(1), atol=1e-6, rtol=1e-4)


def test_words_are_the_last_states_of_one_pass_and_end_with_the_text(encoder, queries):
    texts = [q.question for q in queries]
    tokens, clip = encoder.tokenizer(texts), encoder.model
    embeddings, words = encoder.read(tokens)
    assert torch.equal(embeddings, clip.encode_text(tokens))
    assert torch.equal(words.any(-1), tokens != encoder.tokenizer.tokenizer.pad_token_id)
    ends = (tokens == clip.text_eos_id).int().argmax(1)
    torch.testing.assert_close(words[torch.arange(len(texts)), ends] @ clip.text_projection, embeddings)


def test_readers_are_a_softmax_over_the_words(make, encoder, queries):
    classifier, f = make("grounded"), encoder(queries)
    read, weights = classifier.read(f)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(queries), classifier.readers))
    directions = classifier.reader.weight.double()
    for i, row in enumerate(f.said.tolist()):
        words = f.words[row][f.words[row].any(-1)].double()
        assert not weights[i, len(words) :].any()  # nothing is read past a text's end
        expected = (words @ directions.T).softmax(0).T @ words
        np.testing.assert_allclose(read[i].detach(), expected.flatten().detach(), atol=1e-4)


def test_the_readers_learn_from_features_just_computed(clip_name, queries):
    """Frozen features are made in inference mode; what is trained on them is not."""
    classifier = ScopeClassifier(clip_name, fusion="grounded", width=16)
    z = classifier(classifier.encoder(queries))
    classifier.logit((z[:1] - z[1:]).square().sum(-1)).sum().backward()
    assert bool(classifier.reader.weight.grad.any()) and bool(classifier.temperature.grad.any())


def test_a_grounded_embedding_depends_on_what_is_asked_and_on_what_it_is_asked_of(make, encoder, queries):
    classifier, f = make("grounded"), encoder([q for q in queries if q.image])
    z = classifier(f)
    for changed in (replace(f, said=f.said.roll(1)), replace(f, tokens=f.tokens.roll(1, 0))):
        assert bool((classifier(changed) != z).any(-1).all())
    dot = make("dot")
    assert torch.equal(dot(replace(f, said=f.said.roll(1))), dot(f))


def test_attention_over_one_key_is_that_key(make, encoder, queries):
    """Which is why dot-product attention over a single pooled image, as released, is concatenation."""
    classifier, f = make("dot"), encoder([q for q in queries if q.image])
    one = replace(f, tokens=f.tokens[:, :1], cosine=f.cosine[:, :1])
    attended, weights = classifier.attend(one)
    assert torch.equal(weights, torch.ones_like(weights))
    assert torch.equal(attended, f.tokens[f.image, 0])


def test_released_form_cannot_see_when_edit_and_query_share_an_image(make, records):
    """ρ depends on the text alone: any other image on both sides gives the same; not so with patches."""
    images = [r.edit.image for r in records]
    moved = {}
    for fusion in ("dot_pooled", "dot"):
        classifier, moved[fusion] = make(fusion), 0.0
        for record in records:
            (prompt,), answer = edits_of([record])
            asked = [q for q in record.queries.values() if q.image]
            rho = [
                classifier.similarity(
                    classifier.embed(on_image(asked, image)), classifier.embed(on_image([prompt], image), answer)
                )
                for image in images
            ]
            moved[fusion] = max(moved[fusion], max((r - rho[0]).abs().max().item() for r in rho))
    assert moved["dot_pooled"] < 1e-5
    assert moved["dot"] > 1e-3


def test_released_form_sees_when_the_images_differ(make, records):
    classifier = make("dot_pooled")
    (prompt,), answer = edits_of(records[:1])
    z = classifier.embed(on_image([records[0].in_scope] * 2, prompt.image)[:1])
    other = classifier.embed(on_image([records[0].in_scope], records[1].edit.image))
    edit = classifier.embed([prompt], answer)
    assert classifier.similarity(z, edit).item() > classifier.similarity(other, edit).item()


@pytest.mark.parametrize("fusion", FUSIONS + OURS)
def test_the_no_image_token_matters_to_text_only_queries_alone(make, queries, fusion):
    classifier = make(fusion)
    before = classifier.embed(queries)
    torch.manual_seed(6)
    classifier.no_image.data.add_(torch.randn_like(classifier.no_image))
    moved = (classifier.embed(queries) != before).any(-1)
    blind = torch.tensor([q.image is None for q in queries])
    assert torch.equal(moved, blind if fusion != "text" else torch.zeros_like(blind))


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("fusion", FUSIONS + OURS)
def test_save_and_load(make, encoder, records, queries, tmp_path, fusion, similarity):
    classifier = make(fusion, similarity)
    classifier.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {name for name, _ in classifier.named_parameters()}  # CLIP is not in it
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["fusion"], config["similarity"], config["width"]) == (fusion, similarity, 16)
    assert config.get("encoder") is None
    torch.manual_seed(99)
    shared = ScopeClassifier.from_pretrained(tmp_path, encoder=encoder)
    assert shared.encoder is encoder
    alone = ScopeClassifier.from_pretrained(tmp_path)  # loads the CLIP that the config names
    z = classifier.embed(queries)
    for loaded in (shared, alone):
        assert not loaded.training
        assert loaded.fingerprint() == classifier.fingerprint()
        rho = classifier.similarity(z, classifier.embed(*edits_of(records)))
        assert torch.equal(loaded.embed(queries), z)
        assert torch.equal(loaded.similarity(z, loaded.embed(*edits_of(records))), rho)


def test_fingerprint_names_the_trained_weights(make):
    classifier = make()
    before = classifier.fingerprint()
    assert make().fingerprint() == before
    classifier.margin.data.add_(1e-6)
    assert classifier.fingerprint() != before


def test_fingerprint_names_what_embeds_and_not_the_head_alone(make, encoder, monkeypatch):
    """The same trained weights on another CLIP, or fused otherwise, embed otherwise."""
    found = {make().fingerprint()}
    for name, value in (("fusion", "cross"), ("kind", "exponential")):
        other = make()
        monkeypatch.setattr(other, name, value)
        found.add(other.fingerprint())
    monkeypatch.setattr(encoder.model.logit_scale, "data", encoder.model.logit_scale.data + 1)
    found.add(make().fingerprint())
    assert len(found) == 4


def test_clip_is_neither_trained_nor_counted(make, encoder, queries):
    classifier = make().train()
    assert not any(name.startswith("encoder") for name in classifier.state_dict())
    classifier(encoder(queries)).square().sum().backward()
    assert all(p.grad is None for p in encoder.model.parameters())
    assert not encoder.model.training


@pytest.mark.parametrize("wrong", [{"fusion": "sum"}, {"similarity": "cosine"}])
def test_unknown_forms_are_refused(clip_name, encoder, wrong):
    with pytest.raises(ValueError, match="must be one of"):
        ScopeClassifier(clip_name, encoder=encoder, **wrong)


def test_folded_attention_is_attention_over_each_rows_own_image():
    torch.manual_seed(0)
    attention, tokens, query = (
        torch.nn.MultiheadAttention(8, 2, batch_first=True),
        torch.randn(5, 3, 8),
        torch.randn(7, 8),
    )
    image = torch.tensor([3, -1, 0, 3, 4, -1, 3])
    found, weights = attend_folded(attention, query, tokens, image)
    some = image >= 0
    seen = tokens[image[some]]
    expected = attention(query[some].unsqueeze(1), seen, seen)
    torch.testing.assert_close(found[some], expected[0].squeeze(1))
    torch.testing.assert_close(weights[some], expected[1].squeeze(1))
    assert not weights[~some].any()
    assert not attend_folded(attention, query, tokens, torch.full((7,), -1))[1].any()
