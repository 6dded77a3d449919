"""Is an edit that is revised answered by its later form, and is nothing else taken for a revision?

Measured on what the generator knows of each question: whether it words the edit's prompt anew, or asks of another
thing, or something else. Every answer is an :class:`mscke.memory.EditMemory`'s own::

    taken_for_revision(classifier, bench.validation).groupby("kind").revised.mean()
    answered_by_later(classifier, bench.validation).groupby(["prompt", "rule"]).later.mean()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch

from mscke.benchmark.sample import Edit, EditRecord, Query
from mscke.classifier import ScopeClassifier
from mscke.memory import EditMemory
from mscke.training.scope import IN_ROLES, ROLES

KINDS = {  # what a second edit's prompt is to the first one's, by how hard the generator calls the question
    "other_entity": "another thing",
    "same_wording": "another thing, in the same words",
    "other_attribute": "another fact about it",
    "other_reference": "another name of it",
    "derived": "what follows from it",
    "presence": "what follows from it",
}


def earlier(record: EditRecord) -> Edit:
    """An edit that this record's revises: to the answer before, where the record tells it."""
    return replace(record.edit, answer=record.meta.get("original") or "nothing")


def embed_edits(classifier: ScopeClassifier, edits: Sequence[Edit]) -> torch.Tensor:
    """z (N, d) of edits, their answers included."""
    return classifier.embed([Query(e.prompt, e.image) for e in edits], [e.answer for e in edits])


def second_edits(record: EditRecord, elsewhere: str) -> list[tuple[str, Edit]]:
    """(what it is to the record's edit, an edit with another answer): of each kind that the record has.

    ``elsewhere``: another picture. Whether the edits are a revision is known: the first two are, the others are not.
    """
    image, edit, before = record.edit.image, record.edit, earlier(record).answer
    found = [
        ("the same words", Edit(image, edit.prompt, before)),
        ("reworded", Edit(image, record.rephrase.question, before)),
        ("the same words, another picture", Edit(elsewhere, edit.prompt, before)),
    ]
    for role in ("in_scope", "out_of_scope"):
        if kind := KINDS.get(record.told("hardness", role)):
            found.append((kind, Edit(image, record.queries[role].question, record.answers[role])))
    return found


def taken_for_revision(classifier: ScopeClassifier, records: Sequence[EditRecord]) -> pd.DataFrame:
    """A row a record and second edit: its ``kind`` and whether a memory with the record's edit takes it for a
    revision of that one (``revised``, bool). Records are to have pictures of their own."""
    first = [r.edit for r in records]
    memory, rows = EditMemory.of(classifier), []
    memory.add(first, embed_edits(classifier, first))
    elsewhere = [e.image for e in first[1:] + first[:1]]
    seconds = [
        (i, *kind_and_edit) for i, record in enumerate(records) for kind_and_edit in second_edits(record, elsewhere[i])
    ]
    z = embed_edits(classifier, [edit for *_, edit in seconds])
    for (i, kind, edit), row in zip(seconds, z, strict=True):
        memory.add([edit], row.unsqueeze(0))
        rows.append({"record": records[i].id, "kind": kind, "revised": i in memory.log()[-1].replaced})
        memory.undo()
    return pd.DataFrame(rows)


def answered_by_later(classifier: ScopeClassifier, records: Sequence[EditRecord]) -> pd.DataFrame:
    """A row a record, in-scope role, form of the later ``prompt`` and ``rule``: does the later edit answer, of the
    record's two on one fact (``later``, bool)? Rules: the later replaces the earlier where it is taken for a revision
    of it, or both stay; of two that stand the nearer answers. No other record's edits are in the way."""
    asked = [role for role, inside in zip(ROLES, IN_ROLES, strict=True) if inside]
    z = classifier.embed([r.queries[role] for r in records for role in asked])
    first = [earlier(r) for r in records]
    prompts = {"the same words": "reliability", "reworded": "generality"}
    frames, z_earlier = [], embed_edits(classifier, first)
    for prompt, role in prompts.items():
        later = [Edit(r.edit.image, r.queries[role].question, r.edit.answer) for r in records]
        z_later = embed_edits(classifier, later)
        memory = EditMemory.of(classifier)
        memory.add(first, z_earlier)
        memory.add(later, z_later)
        replaced = torch.zeros(len(memory.log()[0].ids) + len(later), dtype=torch.bool)
        replaced[list(memory.log()[-1].replaced)] = True
        both = (z.unflatten(0, (len(records), -1)) - side.unsqueeze(1) for side in (z_earlier, z_later))
        near, nearer = (apart.square().sum(-1).flatten() for apart in both)
        alone = replaced[: len(records)].repeat_interleave(len(asked))  # the later one stands alone
        found = {"the later replaces": alone | (nearer < near), "the nearer answers": nearer < near}
        named = {"record": [r.id for r in records for _ in asked], "role": asked * len(records)}
        frames += [
            pd.DataFrame(named | {"prompt": prompt, "rule": rule, "later": later_wins.numpy()})
            for rule, later_wins in found.items()
        ]
    return pd.concat(frames, ignore_index=True)
