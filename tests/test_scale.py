"""Two processes under ``accelerate launch`` train and evaluate as one does."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import launched
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from mscke.config import ROOT

pytest_plugins = ["tiny"]
pytestmark = pytest.mark.slow
TRAININGS = ("scope", "counterfactual", "mend", "stopped")


def launch(script: Path, *arguments: Path) -> None:
    """Two processes on the CPU, with gloo. As on GPUs, but for the first variable."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    settings = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    ran = subprocess.run(
        [*command, *settings, "--main_process_port", str(port), script, *arguments],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, records, clip_name, mllm_folders):
    """What one process and two processes wrote."""
    folder = tmp_path_factory.mktemp("launched")
    shutil.copytree(clip_name.removeprefix("local-dir:"), folder / "clip")
    shutil.copytree(mllm_folders["opt"], folder / "opt")
    data = next(p for p in Path(records[0].edit.image).parents if (p / "train_data.json").exists())
    shutil.copytree(data, folder / "data")
    launched.main(folder, folder / "one")
    launch(Path(launched.__file__), folder, folder / "two")
    return folder / "one", folder / "two"


def test_rows_are_equal_row_for_row(runs):
    one, two = (pd.read_parquet(run / "rows.parquet") for run in runs)
    assert len(one) == 3 * 12 * 5 * 2 and one["answer"].nunique() > 3
    pd.testing.assert_frame_equal(one, two, check_exact=True)


@pytest.mark.parametrize("name", TRAININGS)
def test_trainings_are_equal_to_float_tolerance(runs, name):
    """Within 1e-4, a tenth of one AdamW step: it scales gradients up, and with them their rounding.

    Keys' biases are left out: the softmax cancels them, so that their gradient is rounding alone.
    """
    one, two = (load_file(run / name / "model.safetensors") for run in runs)
    for key, weight in one.items():
        if key.endswith("k_proj.bias"):
            continue
        torch.testing.assert_close(two[key], weight, rtol=0, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    curves = [pd.read_csv(run / name / "curve.csv") for run in runs]
    assert list(curves[0].columns) == list(curves[1].columns)
    np.testing.assert_allclose(*curves, atol=1e-4)


def test_a_process_asked_to_stop_stops_all_and_the_next_call_goes_on(runs):
    for run in runs:
        assert (run / "stopped" / "stopped").exists() and not (run / "scope" / "stopped").exists()
        for name in ("model.safetensors", "curve.csv"):
            assert (run / "stopped" / name).read_bytes() == (run / "scope" / name).read_bytes()
