"""What the tests run on one process and on two: tiny trainings, an interruption, an evaluation.

    accelerate launch tests/launched.py FOLDER OUT

FOLDER holds ``clip``, ``opt`` and ``data``, as :mod:`tiny` makes them.
"""

import signal
import sys
from pathlib import Path

import pandas as pd
import torch

from mscke.benchmark.load import load_records
from mscke.classifier import ClipEncoder, ScopeClassifier
from mscke.editors.finetune import FineTune
from mscke.editors.mend import MEND, MendNetworks
from mscke.editors.mend_training import train_mend
from mscke.editors.mscke import MSCKE
from mscke.evaluation.protocol import evaluate_shared, save_rows
from mscke.models.counterfactual import CounterfactualModel
from mscke.models.mllm import MLLM
from mscke.system.workers import processes
from mscke.training.scope import train_classifier, train_counterfactual

SETTINGS = {"epochs": 2, "batch_size": 5}  # of 9 records: batches of 5 and 4, which two cannot halve alike


def main(folder: Path, out: Path) -> None:
    records = load_records(folder / "data" / "train_data.json", folder / "data").records
    train, held = records[:9], records[9:]
    base = MLLM.from_pretrained(folder / "opt", "BLIP-2-tiny")
    clip = f"local-dir:{folder / 'clip'}"
    encoder = ClipEncoder(clip)

    def classifier() -> ScopeClassifier:
        torch.manual_seed(0)
        return ScopeClassifier(clip, width=8, encoder=encoder)

    scope, in_scope, mend = classifier(), plain(base), MEND(base, networks(base))
    train_classifier(scope, train, held, out / "scope", **SETTINGS)
    train_counterfactual(in_scope, train, held, out / "counterfactual", patience=5, **SETTINGS)
    train_mend(mend, train, held, out / "mend", **SETTINGS)
    for _ in range(2):  # stops after a step of the second epoch; the second call goes on from there
        interrupted(classifier(), train, held, out / "stopped")
    editors = [FineTune(base), mend, MSCKE(base, in_scope, scope)]
    rows = [evaluate_shared(editor, base, records, "tiny", at_once=5) for editor in editors]
    if processes().is_main_process:
        save_rows(pd.concat(rows, ignore_index=True), out / "rows.parquet")
    one = evaluate_shared(editors[0], base, records[:1], "tiny")  # fewer records than processes
    assert len(one) == 10 and set(one["record"]) == {0}


def plain(base: MLLM) -> CounterfactualModel:
    """A counterfactual model without dropout, which differs between processes."""
    torch.manual_seed(0)
    text = base.model.config.text_config.to_diff_dict() | {"num_hidden_layers": 1, "dropout": 0.0}
    return CounterfactualModel(text, base.model.config.qformer_config.hidden_size).attach(base)


def networks(base: MLLM) -> MendNetworks:
    torch.manual_seed(0)
    return MendNetworks.beside(base, layers=1, rank=4)


def interrupted(classifier: ScopeClassifier, train, held, folder: Path) -> None:
    """Train, but let the last process be asked to stop in the third step, if this call takes so many."""
    forward, calls = classifier.forward, []

    def counted(features):
        calls.append(1)
        if len(calls) == 7 and processes().is_last_process:  # two a step, two a validation
            signal.raise_signal(signal.SIGTERM)
        return forward(features)

    classifier.forward = counted
    try:
        train_classifier(classifier, train, held, folder, **SETTINGS)
    except KeyboardInterrupt:
        (folder / "stopped").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    processes().destroy_process_group()
