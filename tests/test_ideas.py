"""What was tried: each idea differs from ``grounded`` in what it says, and in nothing else."""

import dataclasses

import pytest
import torch

from mscke.classifier import ScopeClassifier
from mscke.config import get_track
from mscke.editors.grid import Shared, Spec
from mscke.editors.ideas import IDEAS, Averaged, OneReader, SecondStep, TwoCodes
from mscke.models.names import fingerprint

pytest_plugins = ["tiny"]


@pytest.fixture
def make(clip_name, encoder):
    def make(kind):
        torch.manual_seed(5)
        return kind(clip_name, fusion="grounded", width=16, encoder=encoder).eval()

    return make


@pytest.mark.parametrize("kind", IDEAS.values())
def test_an_idea_embeds_as_ours_does(make, queries, kind):
    classifier = make(kind)
    together = classifier.embed(queries)
    assert together.shape == (len(queries), classifier.dim) and bool(together.isfinite().all())
    alone = torch.cat([classifier.embed([q]) for q in queries])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_averaged_words_are_their_mean(make, encoder, queries):
    classifier, f = make(Averaged), encoder(queries)
    read, _ = classifier.read(f)
    for i, row in enumerate(f.said.tolist()):
        words = f.words[row][f.words[row].any(-1)]
        for part in read[i].unflatten(0, (classifier.readers, -1)):
            torch.testing.assert_close(part, words.mean(0))


def test_one_reader_is_one(make):
    assert make(OneReader).reader.weight.shape[0] == 1


def test_two_codes_are_in_scope_only_together(make, queries):
    z = make(TwoCodes).embed(queries)
    halves = z.unflatten(-1, (2, -1))
    torch.testing.assert_close(halves.norm(dim=-1), torch.ones(len(z), 2))
    which, what = ((halves[:1] - halves).square().sum(-1)).T  # the distance is the sum of theirs
    torch.testing.assert_close((z[:1] - z).square().sum(-1), which + what)


def test_a_second_step_knows_what_the_first_found(make, encoder, queries):
    classifier, f = make(SecondStep), encoder([q for q in queries if q.image])
    first, second = ScopeClassifier.attend(classifier, f)[1], classifier.attend(f)[1]
    torch.testing.assert_close(second.sum(-1), torch.ones(len(second)))
    assert not torch.allclose(first, second)
    moved = dataclasses.replace(f, cosine=f.cosine.roll(1, 1))
    assert not torch.allclose(classifier.attend(moved)[1], second)


def test_an_idea_starts_from_the_weights_of_ours(clip_name, tmp_path):
    track = dataclasses.replace(
        get_track("smoke"), name=str(tmp_path), n_train=24, n_test=4, clips={"tiny": clip_name}, clip="tiny"
    )
    shared = Shared.of(track)
    ours, theirs = (shared.fresh(Spec("grounded"), kind) for kind in (ScopeClassifier, TwoCodes))
    assert isinstance(theirs, TwoCodes) and fingerprint(ours) == fingerprint(theirs)
    assert ours.fingerprint() != theirs.fingerprint()  # their embeddings are of no use to each other
