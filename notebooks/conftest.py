"""For pytest, where nbval runs the notebooks: a busy machine is waited for."""


def pytest_itemcollected(item):
    if hasattr(item, "output_timeout"):
        item.output_timeout = 600  # seconds that an output may take to arrive; nbval's own are 5
