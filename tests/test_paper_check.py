"""paper-check says in plain words what is here and what is missing, changes nothing, and exits accordingly."""

import huggingface_hub.constants as constants
import pytest
import torch
from safetensors.torch import save
from test_fetch import IMAGES, JSON, NAMES, SIZES, a_store, jpeg, put, tree, zipped
from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, LlamaConfig, OPTConfig, T5Config

from mscke.benchmark import hub
from mscke.models.compose import combine_configs, memory_needed
from mscke.report import paper_check

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
        paper_check.BLIP2: a_config(OPTConfig(vocab_size=40, ffn_dim=32, word_embed_proj_dim=16, **SMALL)),
        paper_check.EYES: a_config(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1)),
        paper_check.VICUNA: llama,
    }.items():
        config.save_pretrained(own / "models" / repo)
    return own


@pytest.fixture
def run(tmp_path, own, monkeypatch, capsys):
    """Run the command on a fresh store: (exit status, what it prints). Asserts that no file changes."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(paper_check.check, "__defaults__", (SIZES,))
    releases = {"sentencepiece": "0.2.1", "protobuf": "6.1", "bitsandbytes": "0.46.1"}
    monkeypatch.setattr(paper_check, "version", releases.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    card = type("Card", (), {"total_memory": 48 * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)

    def run(track="paper", **folders):
        def open_store(*_, online, frozen):
            assert frozen and not online
            store = a_store(tmp_path, **({"data": own / "data", "models": own / "models"} | folders))
            store.lock.frozen = True
            return store

        monkeypatch.setattr(paper_check, "open_store", open_store)
        before = tree(tmp_path)
        status = paper_check.main(["--track", track])
        assert tree(tmp_path) == before
        return status, capsys.readouterr().out

    return run


def test_everything_is_here(run, own):
    status, said = run()
    assert status == 0 and "MISSING" not in said and "Everything is here." in said
    assert "5, 0 of them in place" in said and "a card, 48.0 GB" in said
    assert said.count("2.0 MB") == len(hub.MODELS)  # half a million float32 in each
    models = own / "models"
    needed = [
        memory_needed(Blip2Config.from_pretrained(models / paper_check.BLIP2), torch.bfloat16),
        memory_needed(
            combine_configs(models / paper_check.EYES, models / paper_check.VICUNA), torch.bfloat16
        ),
    ]
    for name, count in zip(("BLIP-2 OPT", "MiniGPT-4"), needed, strict=True):
        assert f"GPU memory, {name}: {count / 1e6:.1f} MB of weights in bfloat16" in said


def test_nothing_is_here(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, said = run(data=None, models=None)
    things = ["ZhenZeng/FGVEdit", "COCO 2014 images", *hub.MODELS, "MiniGPT-4's 7B checkpoint", "a GPU"]
    assert "here     packages that read Vicuna's tokenizer" in said
    assert status == 1 and all(f"MISSING  {thing}" in said for thing in things)
    assert f"{len(things)} of {len(things) + 1} things are missing" in said
    assert said.count("unknown until the model's files are here") == 2


def test_one_image_or_one_shard_is_missing(run, own):
    (own / "data" / NAMES[4]).unlink()
    (own / "models" / paper_check.BLIP2 / "model.safetensors").unlink()
    status, said = run()
    assert status == 1 and "2 of 11 things are missing" in said
    assert f"1 of 5 are not here, {NAMES[4]} the first; make paper-data fetches them" in said
    assert "lacks *.safetensors" in said
    put(own / "data", {"val2014.zip": zipped("val2014")})  # as good as unpacked
    assert "1 of 11 things are missing" in run()[1]


def test_a_changed_file_is_not_here(run, own, tmp_path):
    store = a_store(tmp_path, data=own / "data", models=own / "models")
    store.benchmark(SIZES)
    store.model("facebook/opt-125m")
    assert "5, 5 of them in place" in run()[1]
    put(own / "models/facebook/opt-125m", {"model.safetensors": save({"w": torch.ones(3)})})
    (tmp_path / "data" / NAMES[0]).unlink()  # it was a link to the user's own
    put(tmp_path / "data", {NAMES[0]: jpeg(99)})
    status, said = run()
    assert status == 1 and "2 of 11 things are missing" in said
    assert "1 of 5 files of COCO 2014 are not those in" in said and "of models/facebook/opt-125m" in said


def test_a_wrong_folder_is_said(run, monkeypatch, capsys):
    monkeypatch.undo()
    assert paper_check.main(["--data", "/nowhere/at/all"]) == 1
    assert "DATA=/nowhere/at/all is not a folder" in capsys.readouterr().out


def test_blip2_alone_is_all_that_its_preset_speaks_of(run):
    status, said = run(track="paper-blip2")
    assert status == 0 and "GPU memory, BLIP-2 OPT" in said
    assert not any(word in said for word in ("MiniGPT", "Vicuna", "vicuna", "flan-t5"))


def test_a_package_that_lacks_or_is_too_old_is_named_with_what_to_do(run, monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def releases(name):
        if name == "sentencepiece":
            raise PackageNotFoundError(name)
        return {"protobuf": "6.1", "bitsandbytes": "0.45.5"}[name]

    monkeypatch.setattr(paper_check, "version", releases)
    status, said = run()
    assert status == 1 and "sentencepiece is not installed: pip install -e '.[paper]'" in said
    with pytest.raises(paper_check.FetchError, match=r"bitsandbytes 0\.45\.5 is older than 0\.46\.1"):
        paper_check._packages("bitsandbytes")


def test_a_card_that_is_too_small_is_said_with_what_to_do(run, monkeypatch):
    small = type("Card", (), {"total_memory": 16 * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: small)
    status, said = run()
    assert status == 1 and "a card has 16.0 GB, and 28.5 GB are needed" in said and "PRESET=blip2" in said


@pytest.mark.parametrize(
    ("driver", "said"),
    [("", "names no card"), ("570.86.15", "CUDA 13 needs 580 or later"), ("580.10", "the driver is 580.10")],
)
def test_an_old_driver_is_told_of(driver, said, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho {driver}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert said in paper_check._driver()
