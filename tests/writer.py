"""A process that writes to an edit memory until it is killed, and the record of what it was told."""

import os
from pathlib import Path

import torch

from mscke.benchmark.sample import Edit
from mscke.memory import EditMemory

DIM, BATCH = 8, 3


def content(version, image):
    """The edits and embeddings that the change ``version`` adds, whoever makes it."""
    edits = [Edit(str(image), f"prompt {version}.{i}", f"answer {version}.{i}") for i in range(BATCH)]
    return edits, torch.arange(BATCH * DIM).view(BATCH, DIM) + 100.0 * version


def change(memory, image):
    """The next change of a memory; which one follows from its version alone."""
    version = len(memory.log()) + 1
    if version % 5 == 3:
        memory.remove(memory.ids[-2:].tolist())
    elif version % 5 == 4:
        memory.undo()
    else:
        memory.add(*content(version, image))
    return version


def write(folder, image):
    """Change the memory again and again; each version is acknowledged once the memory returned."""
    torch.set_num_threads(1)
    acknowledged = os.open(Path(folder, "acknowledged"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    memory = EditMemory.open(Path(folder, "memory"), "abc", DIM)
    while True:
        os.write(acknowledged, f"{change(memory, image)}\n".encode())


def hold(path, ready, done):
    """Keep a memory open for writing until told otherwise."""
    memory = EditMemory.open(path, "abc", DIM)
    ready.set()
    done.wait(60)
    memory.close()
