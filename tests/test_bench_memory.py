"""The memory's bench: what is written is measured, recall counts what it says, the figure shows the rows."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mscke.cost import bench_memory
from mscke.memory import EditMemory
from mscke.report.memory import plot_growth

pytest_plugins = ["tiny"]


@pytest.fixture(scope="module")
def table(classifier, records, tmp_path_factory):
    return pd.DataFrame(bench_memory.rows(classifier, records, tmp_path_factory.mktemp("bench"), (1, 20, 400)))


def test_rows_of_every_kind(table):
    assert table.columns.tolist() == ["name", "n", "ours", "baseline", "ratio", "unit"]
    sizes = table.groupby("name")["n"].apply(list)
    assert sizes["memory_route"] == [1, 20, 400] and sizes["memory_route_exact"] == [400]
    assert sizes["memory_bandwidth"] == [20] and sizes["memory_open"] == [12, 400]
    assert (table["ours"] >= 0).all() and (table["ours"] > 0)[~table["name"].str.contains("recall")].all()


def test_bytes_are_those_on_disk(table, records):
    """Of the few real edits the pictures are most; of the many without, embedding and text."""
    (few, many) = table[table["name"] == "memory_bytes"]["ours"]
    pictures = np.mean([Path(r.edit.image).stat().st_size for r in records])
    assert few > pictures and 4 * 16 < many < 1000


def test_recall_is_one_where_all_are_compared_and_falls_where_it_errs(classifier, records, table, monkeypatch):
    share = table.set_index("name")["ours"]
    assert share["memory_recall"] == share["memory_recall_out_of_scope"] == share["memory_same_decision"] == 1.0
    memory = EditMemory(classifier.dim)
    memory.add([r.edit for r in records], torch.eye(len(records), classifier.dim))
    exact = memory.nearest

    def second(z, k=1, exact_asked=False, exact=exact):
        distance, ids = exact(z, 2)
        return (distance[:, :1], ids[:, :1]) if exact_asked else (distance[:, 1:], ids[:, 1:])

    monkeypatch.setattr(memory, "nearest", lambda z, k=1, exact=False: second(z, k, exact))
    for threshold, same in ((0.0, 0.0), (1.1, 1.0)):  # taken always, or never
        monkeypatch.setattr(bench_memory, "THRESHOLD", threshold)
        wrong = pd.DataFrame(bench_memory.recall(classifier, memory, records)).set_index("name")["ours"]
        assert wrong["memory_recall"] == wrong["memory_recall_out_of_scope"] == 0.0
        assert wrong["memory_same_decision"] == same


def test_the_figure_shows_exact_search_codes_and_the_pass(table):
    ax = plot_growth(table).axes[0]
    one_pass, more, exact, coded = ax.get_lines()
    route = table[table["name"] == "memory_route"]
    assert exact.get_xdata().tolist() == [1, 20, 400] and coded.get_xdata().tolist() == [400]
    assert coded.get_ydata()[0] == 1e3 * route["ours"].iloc[-1]
    assert exact.get_ydata()[-1] == 1e3 * table.set_index("name")["baseline"]["memory_route_exact"]
    np.testing.assert_allclose(more.get_ydata(), 1.5 * np.array(one_pass.get_ydata()))
