"""paper-check says in plain words what is here and what is missing, changes nothing, and exits accordingly."""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import tomllib
from collections import namedtuple
from importlib.metadata import PackageNotFoundError

import huggingface_hub.constants as constants
import pytest
import torch
from safetensors.torch import save
from test_fetch import IMAGES, JSON, NAMES, ROWS, SIZES, a_store, jpeg, put, tree, zipped
from test_sample import a_row
from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, LlamaConfig, OPTConfig, T5Config

from mscke.config import ROOT, TRACKS
from mscke.fetching import hub, machine
from mscke.fetching import store as fetch
from mscke.models.compose import combine_configs, memory_needed
from mscke.report import paper_check

BLIP2, EYES, VICUNA = "Salesforce/blip2-opt-2.7b", "Salesforce/blip2-flan-t5-xxl", "Vision-CAIR/vicuna-7b"
THINGS = 2 + len(hub.MODELS) + 4  # data; models; the projection, two packages, one disk; a GPU is one more
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WEIGHTS = save({"w": torch.zeros(500_000)})


def a_config(text) -> Blip2Config:
    vision, qformer = Blip2VisionConfig(intermediate_size=32, **SMALL), Blip2QFormerConfig(**SMALL)
    return Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text)


@pytest.fixture
def own(tmp_path):
    """A folder with everything, in the real formats and tiny."""
    files = {f"data/{name}": body for name, body in (JSON | IMAGES).items()}
    for repo in hub.MODELS:
        prefix = f"models/{repo}/open_clip_" if repo.startswith("timm/") else f"models/{repo}/"
        files |= {f"{prefix}config.json": b"{}", f"{prefix}model.safetensors": WEIGHTS}
    own = put(tmp_path / "own", files | {"models/pretrained_minigpt4_7b.pth": b"weights"})
    llama = LlamaConfig(vocab_size=40, intermediate_size=32, **SMALL)
    for repo, config in {
        BLIP2: a_config(OPTConfig(vocab_size=40, ffn_dim=32, word_embed_proj_dim=16, **SMALL)),
        EYES: a_config(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1)),
        VICUNA: llama,
    }.items():
        config.save_pretrained(own / "models" / repo)
    return own


Usage = namedtuple("Usage", "total used free")


def card(monkeypatch, memory: float, capability: tuple[int, int] = (8, 0)) -> None:
    """PyTorch sees a GPU like this."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "compute_120"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Card", (), {"total_memory": memory}))


def no_card(monkeypatch, error: Exception | None = None) -> None:
    """PyTorch sees none, and says this of it."""

    def init():
        if error:
            raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)


def installed(monkeypatch, **versions: str) -> None:
    """Of the packages beside the lock's, these are installed."""

    really = importlib.metadata.version

    def version(name):
        if name not in ("sentencepiece", "protobuf", "bitsandbytes"):
            return really(name)
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("transformers.utils.versions.importlib.metadata.version", version)


@pytest.fixture
def run(tmp_path, own, monkeypatch, capsys):
    """Run the command on a fresh store: (exit status, what it prints). Asserts that no file changes."""
    monkeypatch.setattr("mscke.config.ROOT", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("paper", "paper-blip2"):
        small = {"n_train": SIZES["train"], "n_test": SIZES["test"], "device": "cuda", "eight_bit": False}
        monkeypatch.setitem(TRACKS, name, dataclasses.replace(TRACKS[name], **small))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Usage(2e11, 1e11, 1e11))
    installed(monkeypatch, sentencepiece="0.2.1", protobuf="6.33")
    card(monkeypatch, 80e9)

    def run(*arguments, **folders):
        def open_store(*_, online, frozen):
            assert frozen and not online
            store = a_store(tmp_path, **({"data": own / "data", "models": own / "models"} | folders))
            store.lock.frozen = True
            return store

        monkeypatch.setattr(paper_check, "open_store", open_store)
        before = tree(tmp_path)
        status = paper_check.main(list(arguments))
        assert tree(tmp_path) == before
        return status, capsys.readouterr().out

    return run


def test_everything_is_here(run, own):
    status, said = run()
    assert status == 0 and "MISSING" not in said and "Everything is here." in said
    assert "5, 0 of them in place" in said and "a card, 80.0 GB" in said
    assert said.count("         2.0 MB") == len(hub.MODELS)  # half a million float32 in each
    models = own / "models"
    needed = [
        memory_needed(Blip2Config.from_pretrained(models / BLIP2), torch.bfloat16),
        memory_needed(combine_configs(models / EYES, models / VICUNA), torch.bfloat16),
    ]
    for name, count in zip(("BLIP-2 OPT", "MiniGPT-4"), needed, strict=True):
        assert f"GPU memory, {name}: {count / 1e6:.1f} MB of weights in bfloat16" in said


def test_nothing_is_here(run, monkeypatch):
    no_card(monkeypatch)
    installed(monkeypatch)
    status, said = run(data=None, models=None)
    things = ["ZhenZeng/FGVEdit", "COCO 2014 images", *hub.MODELS, "MiniGPT-4's 7B checkpoint", "a GPU"]
    things += ["sentencepiece", "protobuf"]
    assert status == 1 and all(f"MISSING  {thing}" in said for thing in things)
    assert f"{len(things)} of {THINGS + 1} things are missing" in said
    assert said.count("unknown until the model's files are here") == 2


def test_one_image_or_one_shard_is_missing(run, own):
    (own / "data" / NAMES[4]).unlink()
    (own / "models" / BLIP2 / "model.safetensors").unlink()
    status, said = run()
    assert status == 1 and f"2 of {THINGS + 1} things are missing" in said
    assert f"1 of 5 are not here, {NAMES[4]} the first; make paper-data fetches them one by one" in said
    assert "lacks *.safetensors" in said
    put(own / "data", {"val2014.zip": zipped("val2014")})  # as good as unpacked
    assert f"1 of {THINGS + 1} things are missing" in run()[1]


def test_a_changed_file_is_not_here(run, own, tmp_path):
    store = a_store(tmp_path, data=own / "data", models=own / "models")
    store.benchmark(SIZES)
    store.model("facebook/opt-125m")
    assert "5, 5 of them in place" in run()[1]
    put(own / "models/facebook/opt-125m", {"model.safetensors": save({"w": torch.ones(3)})})
    (tmp_path / "data" / NAMES[0]).unlink()  # it was a link to the user's own
    put(tmp_path / "data", {NAMES[0]: jpeg(99)})
    status, said = run()
    assert status == 1 and f"2 of {THINGS + 1} things are missing" in said
    assert "1 of 5 files of COCO 2014 are not those in" in said and "of models/facebook/opt-125m" in said


def test_records_that_are_left_out_are_counted(run, own):
    rows = [*ROWS["train"][:3], a_row(NAMES[3], rephrase="")]
    put(own / "data", {fetch.FILES["train"]: json.dumps(rows).encode()})
    status, said = run()
    assert status == 0 and "train: 1 records with a bad field are left out" in said
    assert 'record 3, field "rephrase"' in said and "here     COCO" in said and "4, 0 of them in place" in said


def test_a_wrong_folder_is_said(run, monkeypatch, capsys):
    monkeypatch.undo()
    assert paper_check.main(["--data", "/nowhere/at/all"]) == 1
    assert "DATA=/nowhere/at/all is not a folder" in capsys.readouterr().out


# The preset


def test_a_preset_is_asked_for_no_more_than_it_needs(run, own, monkeypatch):
    shutil.rmtree(own / "models/Salesforce/blip2-flan-t5-xxl")
    shutil.rmtree(own / "models/Vision-CAIR")
    (own / "models/pretrained_minigpt4_7b.pth").unlink()
    installed(monkeypatch)
    card(monkeypatch, 24e9)
    status, said = run("--track", "paper-blip2")
    assert status == 0 and "MiniGPT-4:" not in said and "icuna" not in said and "sentencepiece" not in said
    assert run()[0] == 1


@pytest.mark.parametrize("name", ["paper-tiny", "paper-dry"])
def test_what_makes_its_own_models_needs_nothing(run, name, monkeypatch):
    monkeypatch.setattr(paper_check, "check", lambda *_: pytest.fail("looked for something"))
    status, said = run("--track", name)
    assert status == 0 and f"The track {name} makes all that it needs" in said


@pytest.mark.parametrize("preset", ["", "blip2"])
def test_make_asks_of_the_preset(preset):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-n", "PYTHON=python", *([f"PRESET={preset}"] if preset else []), "paper-check", "paper-data"]
    said = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout
    track = f"paper-{preset}" if preset else "paper"
    for module in ("report.paper_check", "fetching", "models.prepare"):
        assert f'"python" -m mscke.{module} --track {track}\n' in said


# The machine


def test_a_tokenizer_that_comes_as_json_wants_no_package(run, own, monkeypatch):
    installed(monkeypatch, sentencepiece="0.2.1")
    status, said = run()
    assert status == 1 and "MISSING  protobuf>=5, for Vicuna's tokenizer" in said and "here     sentencepiece" in said
    assert "protobuf>=5 is not installed: pip install -e '.[paper]'" in said
    put(own / f"models/{VICUNA}", {"tokenizer.json": b"{}"})
    status, said = run()
    assert status == 0 and "protobuf" not in said


@pytest.mark.parametrize("version", [None, "0.45.5", "0.46.1", "0.50.2"])
def test_eight_bits_want_a_bitsandbytes_that_transformers_takes(run, monkeypatch, version):
    others = {"sentencepiece": "0.2.1", "protobuf": "6.33"}
    installed(monkeypatch, **others | ({"bitsandbytes": version} if version else {}))
    card(monkeypatch, 24e9)
    monkeypatch.setitem(TRACKS, "paper", dataclasses.replace(TRACKS["paper"], eight_bit=True))
    status, said = run()
    right = version in ("0.46.1", "0.50.2")
    assert status == (not right)
    why = f"found bitsandbytes=={version}" if version else "bitsandbytes>=0.46.1 is not installed"
    assert right or (why in said and "pip install -e '.[paper]'" in said)


def test_the_extra_asks_for_what_the_check_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]["paper"]
    assert [line.partition(",")[0] for line in extra] == ["bitsandbytes>=0.46.1", "protobuf>=5", "sentencepiece>=0.2"]


def test_a_full_disk_is_said_of_the_disk_that_is_full(run, monkeypatch):
    """The hub's cache and outputs/ on one disk, then each on its own."""

    def with_free(free: float) -> str:
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Usage(2e11, 2e11 - free, free))
        return run(data=None, models=None)[1]

    said = with_free(5e10)
    assert "MISSING  disk for models as published and disk for images" in said
    assert "50.0 GB free; still to come, at most: 41.1 GB of models as published" in said
    assert "Set HF_HOME to a folder on a disk with room" in said and "make outputs/ a link to a folder" in said
    monkeypatch.setattr(paper_check, "by_disk", lambda rooms: [[room] for room in rooms])
    for free, models in ((5e10, "here   "), (4e10, "MISSING")):
        said = with_free(free)
        assert f"{models}  disk for models as published\n" in said and "here     disk for images" in said


def test_rooms_are_told_apart_by_their_disks(tmp_path, monkeypatch):
    rooms = [machine.Room(name, tmp_path / name / "not" / "there", 1e9, "") for name in "abc"]
    assert machine.by_disk(rooms) == [rooms]
    disks = {name: type("Stat", (), {"st_dev": name == "b"}) for name in "abc"}
    monkeypatch.setattr(
        machine.Room, "there", property(lambda room: type("P", (), {"stat": lambda _: disks[room.what]})())
    )
    assert machine.by_disk(rooms) == [[rooms[0], rooms[2]], [rooms[1]]]


@pytest.mark.parametrize(
    "error, why",
    [
        (RuntimeError("The NVIDIA driver on your system is too old (found version 12020)."), "driver on your system is too old"),
        (RuntimeError("Found no NVIDIA driver on your system."), "Found no NVIDIA driver"),
        (AssertionError("Torch not compiled with CUDA enabled"), "not compiled with CUDA"),
        (None, "no CUDA device is visible"),
    ],
)  # fmt: skip
def test_why_there_is_no_gpu(run, monkeypatch, error, why):
    no_card(monkeypatch, error)
    status, said = run()
    assert status == 1 and "MISSING  a GPU" in said and why in said
    assert all(fix in said for fix in ("MSCKE_CPU=1", "make env", "CUDA_VISIBLE_DEVICES"))


def test_a_gpu_that_will_not_do(run, monkeypatch):
    card(monkeypatch, 24e9)
    status, said = run()
    assert status == 1 and "a card, 24.0 GB; by our count 48.0 GB are wanted for BLIP-2 OPT and MiniGPT-4" in said
    assert "PRESET=blip2 wants 24.0 GB" in said and "MSCKE_8BIT=1" in said
    card(monkeypatch, 16e9)
    status, said = run("--track", "paper-blip2")
    assert status == 1 and "24.0 GB are wanted for BLIP-2 OPT" in said and "PRESET=blip2" not in said
    card(monkeypatch, 80e9, (7, 0))
    assert "compute capability 7.0" in (said := run()[1]) and "built for 7.5 and newer" in said


def test_without_a_gpu_as_the_user_says(run, monkeypatch):
    no_card(monkeypatch)
    monkeypatch.setitem(TRACKS, "paper", dataclasses.replace(TRACKS["paper"], device="cpu"))
    status, said = run()
    assert status == 0 and "none is wanted: MSCKE_CPU=1" in said
