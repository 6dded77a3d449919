"""The paper's metrics (§5), in two protocols. Every value is a share in [0, 1], one per record.

``generated`` — our headline: the greedy answer must be the expected one, as the field compares answers
(:mod:`mscke.benchmark.answers`); unchanged means the same generated answer as before the edit. The strict
comparison stands beside it. ``teacher_forced`` — the paper's: arg-max of each answer token given the gold ones
before it; unchanged means the same top-k token ids, rank by rank, at every position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mscke.benchmark.answers import normalise_answer, strict_answer
from mscke.models.decoding import Forced

ROLES = ("reliability", "generality", "in_scope", "out_of_scope", "locality")
METRICS = dict(zip(ROLES, ("reliability", "generality", "m_in", "m_out", "locality"), strict=True))
CHANGES = ("reliability", "generality", "in_scope")  # must give the corrected answer; the others stay
TOP_K = {"out_of_scope": 10, "locality": 1}


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> np.ndarray:
    """1.0 where two answers are the same, as the field compares them: float (B,)."""
    return _agree(normalise_answer, answers, expected)


def strict_match(answers: Sequence[str], expected: Sequence[str]) -> np.ndarray:
    """1.0 where two answers are the same to the letter, but for case, blanks and a closing stop: float (B,).

    Never above :func:`exact_match`."""
    return _agree(strict_answer, answers, expected)


def _agree(form: Callable[[str], str], answers: Sequence[str], expected: Sequence[str]) -> np.ndarray:
    return np.array([float(form(a) == form(e)) for a, e in zip(answers, expected, strict=True)])


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
