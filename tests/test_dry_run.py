"""The dry run: a part that fails ends nothing, and hours follow from seconds."""

import math

import pytest

from mscke.config import get_track
from mscke.cost.dry_run import COUNTERFACTUAL, EVALUATION, IMAGES, MENDING, SCOPE
from mscke.cost.watch import Log, Row, Steps
from mscke.models import shapes
from mscke.models.compose import outline
from mscke.report.dry_run import hours, main, write_report


def row(part, seconds, backbone="BLIP-2 OPT", unit="record", note="", gpu=0):
    return Row(backbone, part, unit, 3, seconds, gpu, 10**9, note)


def test_a_part_that_fails_is_told_of_and_the_next_one_begins(capsys):
    written = []
    log = Log(lambda log: written.append(len(log.rows)), minutes=1)

    def broken():
        raise RuntimeError("found at least two devices")

    assert log.part("B", "one", broken) is None
    assert log.part("B", "two", lambda: "reads 100.00", "record", 4) == "reads 100.00"
    assert written == [1, 2] and [r.part for r in log.failed] == ["one"]
    one, two = log.rows
    assert math.isnan(one.seconds) and one.note == "FAILED: RuntimeError: found at least two devices"
    assert two.seconds >= 0 and two.note == "reads 100.00" and two.host > 0
    assert "found at least two devices" in capsys.readouterr().err


def test_what_the_time_has_no_room_for_is_not_run():
    log = Log(lambda log: None, minutes=0)
    assert log.part("B", "one", lambda: pytest.fail("was run")) is None
    assert log.rows[0].note.startswith("not run") and not log.failed


def test_a_loss_that_is_no_number_is_a_failure():
    import torch

    layer = torch.nn.Linear(1, 1)
    training = Steps(layer, lambda step: layer(torch.ones(1)).sum() * (1 if step < 2 else torch.nan))
    training(2)
    with pytest.raises(ArithmeticError, match="not finite"):
        training(1)


def test_hours_are_seconds_times_the_full_tracks_units():
    track = get_track("paper-dry")
    rows = [
        row(IMAGES, 1.0), row(COUNTERFACTUAL, 1.0, unit="step of 1 records"), row(MENDING, 1.0),
        row(f"FT-LLM{EVALUATION}", 1.0), row(f"MEND{EVALUATION}", math.nan),
        row(SCOPE, 1.0, "", "step of 58 records"), row("load", 1.0),
    ]  # fmt: skip
    found = hours(rows, track).set_index("job")["hours"] * 3600
    assert found[IMAGES] == 8334 + 2778
    assert found[COUNTERFACTUAL] == pytest.approx(7 * 7501, abs=1)
    assert found[MENDING] == pytest.approx(4 * 7501, abs=1)
    assert found[f"FT-LLM{EVALUATION}"] == 2778
    assert f"MEND{EVALUATION}" not in found and "load" not in found


def test_the_report_says_what_failed_and_which_gpu_is_large_enough(tmp_path):
    rows = [row("load", 1.0, gpu=21 * 10**9), row(MENDING, math.nan, note="FAILED: OutOfMemoryError: …")]
    write_report(rows, get_track("paper-dry"), tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "**1 of 2 parts failed.**" in text and "OutOfMemoryError" in text and "random weights" in text
    assert "BLIP-2 OPT: 21.0 GB at its peak, so a GPU of 24 GB holds it." in text


def test_a_backbone_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--track", "paper-dry-tiny", "--backbone", "LLaVA"])
    assert "must be one of BLIP-2 OPT, MiniGPT-4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "parameters"), [("opt-2.7b", 3_744_761_856), ("vicuna-7b", 7.8e9), ("opt-125m", 125_239_296)]
)
def test_shapes_are_the_published_ones(text, parameters):
    """BLIP-2 OPT-2.7B's count is that of the hub's index; OPT-125M's is transformers' for facebook/opt-125m."""
    import torch
    from transformers import AutoModelForCausalLM

    if text == "opt-125m":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shapes.TEXTS[text])
    else:
        model = outline(shapes.blip2_config(text, side=224))
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(parameters, rel=0 if text == "opt-125m" else 1e-3 if "opt" in text else 0.02)
