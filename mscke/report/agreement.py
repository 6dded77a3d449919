"""Does our order of methods agree with the paper's? Kendall's τ, with the uncertainty of our side."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from mscke.report.paper import PAIRED, reported_main
from mscke.report.tables import by_record, resampled_means


def specificities(rows: pd.DataFrame) -> pd.DataFrame:
    """Specificity in [0, 1] by record (rows) and method (columns), of one backbone and protocol."""
    tables = {method: by_record(group)["specificity"] for method, group in rows.groupby("method", sort=False)}
    return pd.DataFrame(tables)


def rank_agreement(rows: pd.DataFrame, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    """τ-b between the paper's Specificity column and ours: one row a backbone and protocol.

    ``rows``: per-record rows. Columns tau, lo, hi (bootstrap over our edits, 95 %; the paper gives no
    interval for its side), p (exact, two-sided, τ = 0) and n, the number of methods that both report.
    """
    reported = reported_main().query("metric == 'specificity'").set_index(["backbone", "method"])["value"]
    found = []
    for (backbone, protocol), group in rows.groupby(["backbone", "protocol"], sort=False):
        theirs = reported[PAIRED.get(backbone, backbone)]
        ours = specificities(group[group["method"].isin(theirs.index)])
        theirs = theirs[ours.columns]
        means = resampled_means(ours.to_numpy(), n_boot, seed)
        taus = [kendalltau(theirs, mean).statistic for mean in means]
        result = kendalltau(theirs, ours.mean())
        lo, hi = np.percentile(taus, (2.5, 97.5))
        found.append((backbone, protocol, result.statistic, lo, hi, result.pvalue, len(theirs)))
    return pd.DataFrame(found, columns=["backbone", "protocol", "tau", "lo", "hi", "p", "n"])


def disagreements(summary: pd.DataFrame, protocol: str = "generated") -> pd.DataFrame:
    """Pairs of methods whose Specificity we find in the other order than the paper, intervals apart.

    Columns backbone, higher_here, lower_here, ours (points between them), reported (the paper's).
    """
    reported = reported_main().query("metric == 'specificity'").set_index(["backbone", "method"])["value"]
    part, found = summary[(summary["protocol"] == protocol) & (summary["metric"] == "specificity")], []
    for backbone, group in part.groupby("backbone", sort=False):
        theirs = reported[PAIRED.get(backbone, backbone)]
        known = [r for r in group.itertuples() if r.method in theirs.index]
        for a in known:
            for b in known:
                if a.lo > b.hi and theirs[a.method] < theirs[b.method]:
                    there = theirs[a.method] - theirs[b.method]
                    found.append((backbone, a.method, b.method, a.value - b.value, there))
    return pd.DataFrame(found, columns=["backbone", "higher_here", "lower_here", "ours", "reported"])
