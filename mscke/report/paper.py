"""What the paper reports, quoted for comparison and never mixed with what is measured here.

Zeng, Gu, Yang, Duan, Shi, Wang: *Visual-Oriented Fine-Grained Knowledge Editing for MultiModal Large
Language Models*, ICCV 2025, arXiv:2411.12790. Full-size models, FGVEdit on COCO 2014 images and
teacher-forced accuracies: a standard to look at, not one that the mini track could meet number by number.
"""

from __future__ import annotations

import pandas as pd

PAIRED = {"BLIP-2-mini": "BLIP-2 OPT", "MiniGPT-4-mini": "MiniGPT-4"}  # our mini -> the paper's backbone
MAIN_METRICS = ("reliability", "generality", "locality", "specificity")

_MAIN = {  # method -> reliability, generality, locality, specificity on BLIP-2 OPT; the same on MiniGPT-4
    "FT-LLM": ((100.0, 100.0, 76.9, 24.2), (93.4, 93.4, 86.3, 35.0)),
    "IKE": ((99.9, 98.0, 48.5, 20.1), (100.0, 98.9, 52.5, 25.3)),
    "SERAC": ((93.1, 96.8, 99.9, 31.9), (99.5, 92.9, 100.0, 37.9)),
    "MEND": ((97.0, 96.4, 98.6, 65.9), (94.9, 94.8, 98.6, 67.4)),
    "MSCKE": ((99.1, 98.6, 100.0, 61.6), (99.5, 93.0, 100.0, 57.2)),
    "MSCKE-MEND": ((97.4, 96.5, 100.0, 68.4), (97.1, 96.7, 100.0, 72.0)),
}


def reported_main() -> pd.DataFrame:
    """The paper's main table, FGVEdit test split: columns backbone, method, metric, value (per cent)."""
    rows = [
        (backbone, method, metric, value)
        for column, backbone in enumerate(PAIRED.values())
        for method, both in _MAIN.items()
        for metric, value in zip(MAIN_METRICS, both[column], strict=True)
    ]
    return pd.DataFrame(rows, columns=["backbone", "method", "metric", "value"])


def reported_ablation() -> pd.DataFrame:
    """The paper's ablation of fusion × CLIP: columns fusion, clip, value (Specificity, per cent)."""
    rows = [
        ("concatenation", "ViT-B/32", 63.70),
        ("concatenation", "ViT-L/14", 63.80),
        ("cross-attention", "ViT-B/32", 64.45),
        ("cross-attention", "ViT-L/14", 64.35),
        ("dot-product attention", "ViT-B/32", 64.73),
        ("dot-product attention", "ViT-L/14", 64.85),
    ]
    return pd.DataFrame(rows, columns=["fusion", "clip", "value"])


def reported_transfer() -> pd.DataFrame:
    """The paper's transfer of the scope classifier between backbones: Specificity, per cent.

    Columns source, target, method, transferred (the classifier comes from ``source``), retrained
    (it was trained for ``target``).
    """
    rows = [
        ("BLIP-2 OPT", "BLIP-2 OPT", "MSCKE-MEND", 68.35, 68.38),
        ("BLIP-2 OPT", "MiniGPT-4", "MSCKE", 57.09, 57.20),
        ("BLIP-2 OPT", "MiniGPT-4", "MSCKE-MEND", 72.16, 71.98),
    ]
    return pd.DataFrame(rows, columns=["source", "target", "method", "transferred", "retrained"])


def reported_cost() -> pd.DataFrame:
    """The paper's cost of each part: columns part, milliseconds (a query), memory (as printed, "G")."""
    rows = [("scope classifier", 36.0, 0.56), ("base model", 121.0, 9.10), ("counterfactual model", 85.0, 4.22)]
    return pd.DataFrame(rows, columns=["part", "milliseconds", "memory"])
