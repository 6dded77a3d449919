"""A dry run of the paper track: what will it take, and does it finish? ``python -m mscke.report.dry_run`` (``make paper-dry``).

Nothing is downloaded: the models have their published shapes and random weights, and the records are a few of
FGVEdit-Scenes. The report has seconds and peak memory a part, the hours that these make of ``make paper``, and the
least memory of a GPU. The exit status is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers

from mscke.config import TRACKS, Track, get_track
from mscke.cost.dry_run import COUNTERFACTUAL, EVALUATION, IMAGES, MENDING, SCOPE, backbone_parts, shared_parts
from mscke.cost.watch import Log, Row
from mscke.fetching.track import load_benchmark
from mscke.models.sources import device_of
from mscke.system.files import replacing

CPU_RECORDS, CPU_TRAIN = (2, 12)  # records edited, unless told, and records trained on: BLIP-2 takes its time there
CARDS = (16, 24, 32, 40, 48, 80, 141)  # GB that GPUs have
CONTEXT = 1.5e9  # bytes that CUDA itself takes, and what its allocator cannot use
CLASSIFIERS = 70  # that the ablation trains, about
KS = 6  # numbers of demonstrations among which IKE's is chosen


def dry_run(track: Track, backbones: Sequence[str], records: int, minutes: float, path: Path) -> Log:
    """Run it all; the report is at ``path`` from the first part on."""
    few = device_of(track).type == "cpu" and not small(track)
    track = replace(track, n_test=records, n_train=CPU_TRAIN if few else track.n_train)
    data, log = load_benchmark(track), Log(lambda log: write_report(log.rows, track, path), minutes)
    scope = shared_parts(log, track, data)
    for backbone in backbones if scope else ():
        backbone_parts(log, track, data, backbone, scope)
    return log


def small(track: Track) -> bool:
    """Whether its models are the tiny ones."""
    return all(source.endswith("tiny") for source in track.backbones.values())


def hours(rows: Sequence[Row], track: Track) -> pd.DataFrame:
    """What the full track's jobs take, from seconds a unit here: columns backbone, job, units, hours.

    Every record is taken to have an image of its own. A job whose part did not run has no hours.
    """
    full, found = TRACKS["paper"], []
    n_train = round(full.n_train * (1 - full.validation))
    for row in rows:
        recipe = {kind: track.recipe(kind, row.backbone) for kind in ("counterfactual", "mend")}
        if row.part.endswith(IMAGES):
            units = full.n_train + full.n_test
        elif row.part == COUNTERFACTUAL:
            epochs = recipe["counterfactual"].get("epochs", full.counterfactual_epochs)
            units = epochs * n_train / recipe["counterfactual"].get("batch_size", 64)
        elif row.part == MENDING:
            units = full.mend_epochs * n_train
        elif row.part == SCOPE:
            units = CLASSIFIERS * full.classifier_epochs * n_train / int(row.unit.split()[2])
        elif row.part.endswith(EVALUATION):
            units = full.n_test + (KS * full.ike_records if row.part.startswith("IKE") else 0)
        else:
            continue
        if not np.isfinite(row.seconds):
            continue
        found.append((row.backbone or "shared", row.part, round(units), units * row.seconds / 3600))
    return pd.DataFrame(found, columns=["backbone", "job", "units", "hours"])


def write_report(rows: Sequence[Row], track: Track, path: Path) -> None:
    """``report.md``: where it ran, a table of the parts, the hours, and what they come to."""
    table = pd.DataFrame(rows)
    table["backbone"] = table["backbone"].replace("", "shared")
    for name in ("gpu", "host"):
        table[name] = (table[name] / 1e9).round(2)
    table["seconds"] = [f"{s:.3g}" if np.isfinite(s) else "" for s in table["seconds"]]
    reckoned = hours(rows, track)
    sums = reckoned.groupby("backbone", sort=False)["hours"].sum()
    failed = table[table["note"].str.startswith("FAILED")]
    lines = [
        "# A dry run of the paper track",
        f"The models have their published shapes and **random weights**: nothing here says how well anything edits. "
        f"{track.n_test} records of FGVEdit-Scenes at {track.image_size}² pixels, {_where(track)}. The threshold is "
        "such that half of the questions are in scope.",
        f"**{len(failed)} of {len(table)} parts failed.** " + ("" if failed.empty else "See their notes."),
        "`seconds` are for one unit; `gpu` and `host` are peak memory in GB (`host`: of the process so far).",
        table.rename(columns={"gpu": "gpu GB", "host": "host GB"}).to_markdown(index=False),
        "## What `make paper` would take",
        f"The seconds above times the full track's units; what did not run is not counted. Classifiers: about "
        f"{CLASSIFIERS}.",
        reckoned.to_markdown(index=False, floatfmt=".2f"),
        "; ".join(f"{who}: {h:.1f} hours" for who, h in sums.items()) + f"; together {sums.sum():.1f}.",
        _least(table),
    ]
    text = "\n\n".join(line for line in lines if line)
    with replacing(path) as whole:
        whole.write_text(text + "\n", encoding="utf-8")


def _where(track: Track) -> str:
    device = device_of(track)
    name = "a CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"on {name}, bfloat16, PyTorch {torch.__version__}, transformers {transformers.__version__}"


def _least(table: pd.DataFrame) -> str:
    """The smallest GPU that each backbone's largest part would have fitted on."""
    told = []
    for backbone, peak in table.groupby("backbone", sort=False)["gpu"].max().items():
        if peak and backbone != "shared":
            card = next((c for c in CARDS if 1e9 * peak + CONTEXT < c * 1e9), None)
            fits = f"a GPU of {card} GB holds it" if card else "no GPU of one card holds it"
            told.append(f"{backbone}: {peak:.1f} GB at its peak, so {fits}.")
    return " ".join(told)


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status is 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--track", default="paper-dry", help="paper-dry, or paper-dry-tiny")
    parser.add_argument("--backbone", help="BLIP-2 OPT or MiniGPT-4; unless told both on a GPU, else BLIP-2 OPT")
    parser.add_argument("--records", type=int, help="test records that are edited and asked")
    parser.add_argument("--minutes", type=float, default=60, help="after which no part begins")
    told = parser.parse_args(arguments)
    track = get_track(told.track)
    all_of_it = device_of(track).type == "cuda" or small(track)
    if told.backbone not in (None, *track.backbones):
        parser.error(f"--backbone must be one of {', '.join(track.backbones)}")
    backbones = [told.backbone] if told.backbone else list(track.backbones)[: 2 if all_of_it else 1]
    records = told.records or (track.n_test if all_of_it else CPU_RECORDS)
    path = track.outputs / "report.md"
    log = dry_run(track, backbones, records, told.minutes, path)
    print(f"{path}: {len(log.rows)} parts, {len(log.failed)} failed")
    return int(bool(log.failed))


if __name__ == "__main__":
    sys.exit(main())
