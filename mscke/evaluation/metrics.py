"""The paper's metrics (§5), in two protocols. Every value is a share in [0, 1], one per record.

``generated`` — our headline: the greedy answer, normalised, must match exactly; unchanged means the
same generated answer as before the edit. ``teacher_forced`` — the paper's: arg-max of each answer token
given the gold ones before it; unchanged means the same top-k token ids, rank by rank, at every position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mscke.models.decoding import Forced, normalise_answer

ROLES = ("reliability", "generality", "in_scope", "out_of_scope", "locality")
METRICS = dict(zip(ROLES, ("reliability", "generality", "m_in", "m_out", "locality"), strict=True))
CHANGES = ("reliability", "generality", "in_scope")  # must give the corrected answer; the others stay
TOP_K = {"out_of_scope": 10, "locality": 1}


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> np.ndarray:
    """1.0 where the normalised answers agree: float (B,)."""
    pairs = zip(answers, expected, strict=True)
    return np.array([float(normalise_answer(a) == normalise_answer(e)) for a, e in pairs])


def token_accuracy(forced: Forced) -> float:
    """Share of answer tokens predicted under teacher forcing."""
    return float(forced.hits.mean())


def unchanged_share(before: Forced, after: Forced, k: int, prefix: int) -> float:
    """Share of (position, rank) pairs at which the top-k token ids are the same before and after.

    ``prefix`` positions (visual tokens) are compared from the front and the rest from the back, so
    that an edit written into the context between them shifts nothing.
    """
    a, b = before.top[:, :k], after.top[:, :k]
    rest = len(a) - prefix
    b = np.concatenate([b[:prefix], b[len(b) - rest :]])
    return float((a == b).mean())
