"""A reproducible companion to MSCKE (Zeng et al., ICCV 2025). Read classifier, memory and router first."""

from importlib import import_module

_HOME = {
    "Edit": "benchmark.sample", "EditRecord": "benchmark.sample", "Query": "benchmark.sample",
    "get_track": "config", "load_benchmark": "fetching.track", "load_base": "editors.build", "editor": "editors.build",
    "MLLM": "models.mllm", "CounterfactualModel": "models.counterfactual", "ScopeClassifier": "classifier",
    "EditMemory": "memory", "ScopeRouter": "router", "MSCKE": "editors.mscke", "evaluate": "evaluation.protocol",
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name: str):
    """Import a name when it is first asked for: reading a table should not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'mscke' has no attribute {name!r}; it exports {', '.join(__all__)}")
    return getattr(import_module(f"mscke.{_HOME[name]}"), name)
