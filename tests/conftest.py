"""Every test runs quietly and offline, draws in the project's style, and leaves no figure behind."""

import os

import pytest

os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture(autouse=True)
def styled():
    """The style is set for each test and taken back: what a test sees depends on no other's."""
    import matplotlib.pyplot as plt

    from mscke.report.figures import use_style

    with plt.rc_context():
        use_style()
        yield
    plt.close("all")
