"""The paper track on tiny models and data in the published formats, through the doors of the real ones."""

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from test_fetch import tree

from mscke.benchmark.sample import RecordError
from mscke.classifier import FUSIONS, ScopeClassifier
from mscke.config import ROOT, TRACKS, get_track
from mscke.editors.finetune import FineTune
from mscke.editors.grid import load_clip
from mscke.editors.mend import MEND, MendNetworks
from mscke.evaluation.protocol import evaluate
from mscke.fetching import hub
from mscke.fetching.lock import FetchError
from mscke.fetching.track import load_benchmark, loaded_once
from mscke.models import prepare, sources, tiny
from mscke.models.counterfactual import LastLayers
from mscke.models.decoding import teacher_force
from mscke.models.mllm import MLLM
from mscke.report.notebook import MARK, where_told

torch.set_num_threads(1)
SHARD = "models/Salesforce/blip2-opt-2.7b/model-00001-of-00007.safetensors"


@pytest.fixture(scope="module")
def track(tmp_path_factory):
    """The tiny track in a folder of its own, its models and data written there."""
    name = str(tmp_path_factory.mktemp("paper-tiny"))
    track = dataclasses.replace(TRACKS["paper-tiny"], name=name, n_train=8, n_test=4)
    tiny.write(track)
    return track


@pytest.fixture(scope="module")
def bench(track):
    return load_benchmark(track)


@pytest.fixture(scope="module", params=["BLIP-2 OPT", "MiniGPT-4"])
def base(request, track, bench):
    return sources.load_mllm(track, request.param)


@pytest.fixture
def spoilt(track, tmp_path):
    """A copy of the track, to be spoilt."""
    shutil.copytree(track.outputs, tmp_path, dirs_exist_ok=True)
    return dataclasses.replace(track, name=str(tmp_path))


def examples(records):
    """In-scope queries, edits and answers of ``records``."""
    return [r.in_scope for r in records], [r.edit for r in records], [r.in_scope_answer for r in records]


def test_records_are_those_of_the_files_without_empty_answers(track, bench):
    assert [r.id for r in bench.test] == [1, 2, 3, 4]  # record 0 has no answer
    assert len(bench.train) + len(bench.validation) == 8
    assert bench.test[0].edit.image.endswith("data/val2014/COCO_val2014_000000000000.jpg")
    assert bench.train[0].meta == {} and bench.train[0].told("reference", "in_scope") == "unknown"


def test_everything_is_locked(track, bench, base):
    locked = json.loads(track.lock.read_text())
    assert {"COCO 2014", "datasets/ZhenZeng/FGVEdit"} <= locked.keys()
    if base.name == "MiniGPT-4":
        eyes = "Salesforce/blip2-flan-t5-xxl"
        files = {name for name in locked[f"models/{eyes}"]["files"] if name.endswith(".safetensors")}
        assert files < {path.name for path in (track.sources["models"] / eyes).iterdir()}  # only the shards that see


def test_what_is_made_once_stays(track, bench):
    before = {p: p.stat().st_mtime_ns for p in track.outputs.rglob("*") if p.is_file()}
    tiny.write(track)
    loaded_once.clear()  # not what this process remembers
    assert load_benchmark(track) == bench
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_base_models_see_at_the_papers_size_and_are_not_loaded_twice(track, base, bench):
    assert base.image_size == 364 and base.batch_size == 64
    assert len(base.answer([bench.test[0].in_scope, bench.test[0].locality])) == 2
    assert sources.load_mllm(track, base.name) is base


def test_memory_is_said_before_anything_is_loaded(track, bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(MLLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(sources, "memory_needed", lambda *_: 7 * 10**9)
    with pytest.raises(pytest.fail.Exception):
        sources.load_mllm(track, "BLIP-2 OPT", cache=tmp_path)
    assert "BLIP-2 OPT: 7.00 GB of weights on cpu" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (6 * 10**9, 24 * 10**9))
    gpu = torch.device("cuda", 0)
    with pytest.raises(MemoryError, match=r"needs 7\.0 GB and cuda:0 has 6\.0 GB free; set MSCKE_8BIT=1"):
        sources.check_memory("BLIP-2 OPT", 7 * 10**9, gpu, rounded=False)
    sources.check_memory("BLIP-2 OPT", 7 * 10**9, gpu, rounded=True)


@pytest.mark.parametrize("there", [False, True])
def test_the_paper_track_computes_on_a_gpu_or_where_the_user_says(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu, auto, cpu = (dataclasses.replace(TRACKS["paper"], device=d) for d in ("cuda", "auto", "cpu"))
    assert sources.device_of(cpu) == sources.device_of(TRACKS["mini"]) == torch.device("cpu")
    assert sources.device_of(auto) == (torch.device("cuda", 0) if there else torch.device("cpu"))
    if there:
        assert sources.device_of(gpu) == torch.device("cuda", 0)
    else:
        with pytest.raises(RuntimeError, match=r"wants a GPU, and PyTorch sees none: make paper-check .*MSCKE_CPU=1"):
            sources.device_of(gpu)


@pytest.mark.parametrize("said", ["", "0", "1"])
def test_the_environment_says_where_the_paper_track_computes(said):
    names = ("paper", "paper-blip2", "paper-tiny", "paper-dry", "mini")
    code = f"from mscke.config import TRACKS; print(*(TRACKS[n].device for n in {names}))"
    told = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"MSCKE_CPU": said}, cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert told == (["cpu"] * 5 if said == "1" else ["cuda", "cuda", "auto", "auto", "cpu"])


def test_make_paper_asks_for_the_gpu_before_it_fetches(monkeypatch, capsys):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    said = subprocess.run(
        ["make", "-n", "-B", "paper", "PYTHON=python"], cwd=ROOT, env=clean, capture_output=True, text=True, check=True
    ).stdout
    steps = [
        "models.prepare --track paper --device",
        "mscke.fetching --track paper",
        "models.prepare --track paper\n",
        "papermill",
    ]
    places = [said.index(step) for step in steps]
    assert places == sorted(places)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(TRACKS, "paper", dataclasses.replace(TRACKS["paper"], device="cuda"))
    assert prepare.main(["--device"]) == 1 and "MSCKE_CPU=1" in capsys.readouterr().err
    assert prepare.main(["--device", "--track", "mini"]) == 0 and "mini computes on cpu" in capsys.readouterr().out


def test_minigpt4_is_composed_with_the_data(track, bench, spoilt, monkeypatch, capsys):
    """Before a notebook wants it; what does not fit is said then."""
    shutil.rmtree(spoilt.models, ignore_errors=True)
    monkeypatch.setitem(TRACKS, "spoilt", spoilt)
    assert prepare.main(["--track", "spoilt"]) == 0
    assert (spoilt.models / "minigpt4" / "config.json").is_file() and "minigpt4:" in capsys.readouterr().out
    shutil.rmtree(spoilt.models)
    (vicuna := spoilt.sources["models"] / "Vision-CAIR/vicuna-7b/tokenizer.json").unlink()
    spoilt.lock.unlink()
    assert not vicuna.exists() and prepare.main(["--track", "spoilt"]) == 1
    assert "no tokenizer.json and no tokenizer.model" in capsys.readouterr().err
    assert not spoilt.models.exists()
    blip2 = {name: source for name, source in spoilt.backbones.items() if name == "BLIP-2 OPT"}
    monkeypatch.setitem(TRACKS, "spoilt", dataclasses.replace(spoilt, backbones=blip2))
    assert prepare.main(["--track", "spoilt"]) == 0


def test_what_is_left_out_of_the_files_is_noted(track, bench, spoilt):
    path = spoilt.sources["data"] / "train_data.json"
    rows = json.loads(path.read_text())
    rows[5] |= {"rephrase": ""}
    path.unlink()
    path.write_text(json.dumps(rows))
    (spoilt.data / "train_data.json").unlink(missing_ok=True)
    spoilt.lock.unlink()
    found = load_benchmark(spoilt)
    assert len(found.train) + len(found.validation) == 7 and len(found.test) == 4
    assert bench.notes == tuple(f"{split}: 1 records without an answer are left out" for split in ("train", "test"))
    assert "train: 1 records with a bad field are left out (counted from 0):" in found.notes
    assert any(note.startswith('train:   record 5, field "rephrase"') for note in found.notes)


def test_eight_bits_leave_out_what_sees_and_what_is_trained_and_do_not_flood_a_log(base):
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    with warnings.catch_warnings():
        rounded = sources.eight_bit(base.model.config)
    assert rounded.load_in_8bit and not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)
    assert all(base.model.get_submodule(name) is not None for name in rounded.llm_int8_skip_modules)
    assert rounded.llm_int8_skip_modules[-1].endswith(".layers.1")


def test_the_counterfactual_is_the_papers(track, base, bench):
    model = sources.make_counterfactual(track, base)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in model.parameters())
    if base.name == "MiniGPT-4":
        assert isinstance(model, LastLayers) and set(model.state_dict()) == {
            *(f"own.0.{n}" for n in base.model.language_model.get_decoder().layers[-1].state_dict()),
            "projection.weight", "projection.bias",
        }  # fmt: skip
    else:
        weights = torch.load(track.sources["models"] / "facebook/opt-125m/pytorch_model.bin", weights_only=True)
        for name, tensor in model.language_model.state_dict().items():
            assert torch.equal(tensor[: len(weights[name])], weights[name]), name
    model.loss(*(part[:2] for part in examples(bench.train))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad is None for p in base.model.parameters())


def test_the_last_layer_starts_as_the_base_and_leaves_it_alone(track, bench):
    base = sources.load_mllm(track, "MiniGPT-4")
    model, (queries, edits, answers) = LastLayers(base), examples(bench.train)
    encoder, before = base.encoder, {n: p.clone() for n, p in base.model.named_parameters()}
    prompts, ids = model.prompts(queries, edits), [encoder.answer(a, eos=False) for a in answers]
    theirs = teacher_force(base.model.language_model, encoder, prompts, ids, base.see(queries))
    for ours, expected in zip(model.force(queries, edits, answers), theirs, strict=True):
        assert (ours.top == expected.top).all()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    start = model.loss(queries, edits, answers)
    start.backward()
    optimiser.step()
    assert model.loss(queries, edits, answers) < start
    assert all(torch.equal(p, before[n]) for n, p in base.model.named_parameters())


def test_a_vocabulary_that_lacks_the_image_token_grows(track, bench, tmp_path):
    base = sources.load_mllm(track, "BLIP-2 OPT")
    small = sources.CounterfactualModel.pretrained(base, sources.find(track, "hub:facebook/opt-125m"))
    small.language_model.resize_token_embeddings(base.encoder.image_id)
    small.language_model.save_pretrained(tmp_path)
    grown = sources.CounterfactualModel.pretrained(base, tmp_path)
    assert grown.language_model.get_input_embeddings().num_embeddings > base.encoder.image_id
    assert grown.answer(*(part[:1] for part in examples(bench.test)[:2]))


@pytest.mark.parametrize("backbone", TRACKS["paper"].backbones)
def test_beside_a_base_in_bfloat16_training_is_mixed(track, bench, backbone):
    folder = sources.find(track, track.backbones[backbone])
    base = MLLM.from_pretrained(folder, backbone, image_size=364, dtype=torch.bfloat16)
    model, batch = sources.make_counterfactual(track, base), [part[:2] for part in examples(bench.train)]
    model.loss(*batch).backward()
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert len(model.answer(*batch[:2])) == len(model.force(*batch)) == 2
    mend = MEND(base, MendNetworks.beside(base, rank=4))
    assert evaluate(mend, base, bench.test[:1], "t")["value"].between(0, 1).all()


def test_few_copies_at_once_are_many(base, bench):
    all_kept, two = (evaluate(FineTune(base, steps=3, at_once=n), base, bench.test, "t") for n in (None, 2))
    assert (all_kept["answer"] == two["answer"]).all()
    assert ((all_kept["value"] - two["value"]).abs() < 0.05).all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_features_in_half_precision_are_nearly_the_same(track, bench, fusion):
    """Read where they lie, image by image, they give the embeddings of the whole ones, and can be trained on."""
    whole = load_clip(dataclasses.replace(track, half_features=False), "ViT-L-14")
    half, queries = load_clip(track, "ViT-L-14"), [q for r in bench.test for q in r.queries.values()]
    found = half(queries)
    assert half.half and found.tokens.dtype == torch.float16 and found.tokens is half.images.columns[1]
    torch.testing.assert_close(found.cosine, whole(queries).cosine, atol=5e-3, rtol=0)
    torch.manual_seed(0)
    classifier = ScopeClassifier("", fusion=fusion, encoder=whole)
    other = ScopeClassifier("", fusion=fusion, encoder=half)
    other.load_state_dict(classifier.state_dict())
    torch.testing.assert_close(other.embed(queries), classifier.embed(queries), atol=5e-3, rtol=0)
    other(found.select(torch.tensor([0, 7, 4]))).sum().backward()
    assert other.head[1].weight.grad.isfinite().all()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def another(path):
    """The next file of its folder in its place."""
    shutil.copy(next(p for p in sorted(path.parent.iterdir()) if p > path), path)


IMAGE = "data/val2014/COCO_val2014_000000000002.jpg"
SPOILT = {  # what is spoilt, how, what is then said
    "another shard": (f"sources/{SHARD}", another, "are not those in"),
    "missing image": (IMAGE, Path.unlink, None),
    "truncated image": (IMAGE, cut, "damaged"),
    "another image": (IMAGE, another, "of COCO 2014 are not those"),
    "JSON cut in the middle": ("data/train_data.json", cut, "cut short"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_spoilt_is_named_and_nothing_is_lost(track, bench, spoilt, case):
    sources.find(track, "hub:Salesforce/blip2-opt-2.7b")  # known to the lock
    shutil.copy(track.lock, spoilt.lock)
    name, spoil, message = SPOILT[case]
    path = spoilt.outputs / name
    shutil.copy(path, path.with_suffix(".own"))  # not a link to the sources any more
    path.with_suffix(".own").rename(path)
    spoil(path)
    before = tree(spoilt.outputs)
    with nullcontext() if message is None else pytest.raises((FetchError, RecordError), match=message):
        load_benchmark(spoilt)
        sources.find(spoilt, "hub:Salesforce/blip2-opt-2.7b")
    assert before.items() <= tree(spoilt.outputs).items()
    assert path.exists()  # the missing one is taken from the zip again


def test_the_real_track_needs_what_fetching_brings():
    paper = TRACKS["paper"]
    assert paper.fetches == set(hub.MODELS)
    blip2 = TRACKS["paper-blip2"]
    assert blip2.fetches < paper.fetches and not any("vicuna" in repo for repo in blip2.fetches)
    assert (blip2.data, blip2.lock) == (paper.data, paper.lock) and blip2.figures != paper.figures
    assert (paper.n_train, paper.n_test) == (8334, 2778) and paper.lock == ROOT / "paper.lock.json"
    recipe = {"lr": 1e-5, "batch_size": 1, "clip": 100.0, "epochs": 3}
    assert paper.recipe("counterfactual", "MiniGPT-4") == recipe


# Cells that need what a benchmark does not tell


def test_a_cell_that_needs_more_is_not_run():
    cell = [MARK + "scene, reference\n", "record.meta['scene']\n"]
    assert where_told(cell, {"scene", "reference", "other"}) == cell
    assert where_told(cell[1:], set()) == cell[1:] and where_told([], set()) == []
    (line,) = where_told(cell, {"reference"})
    assert line == "print('This benchmark does not tell the scene of its records: nothing to show.')\n"


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("0[1-6]_*.ipynb")), ids=lambda p: p.stem)
def test_marked_cells_need_what_scenes_tell(path):
    told = {"scene", "reference", "attribute", "hardness", "correction"}
    cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"]]
    for cell in cells:
        if MARK in cell:
            assert cell.startswith(MARK), "the mark stands in a cell's first line"
            assert set(cell.partition("\n")[0].removeprefix(MARK).split(", ")) <= told
        else:
            assert not re.search(r'\.meta\["', cell), cell
    assert any("begin(track" in c for c in cells)  # which passes over what a benchmark does not tell


def test_make_paper_writes_below_outputs_alone():
    said = subprocess.run(
        ["make", "-n", "-B", "paper", "PRESET=tiny", "PYTHON=python"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.count('MSCKE_TRACK=paper-tiny "python" -m papermill') == 6
    for line in re.findall(r"papermill .* (\S+\.ipynb)$", said, re.MULTILINE):
        assert line.startswith("outputs/paper-tiny/notebooks/")


def test_figures_go_where_they_are_told(monkeypatch, tmp_path):
    monkeypatch.delenv("MSCKE_FIGURES", raising=False)
    assert get_track("mini").figures == ROOT / "figures" and get_track("smoke").figures != ROOT / "figures"
    monkeypatch.setenv("MSCKE_FIGURES", str(tmp_path))
    assert {get_track(name).figures for name in TRACKS} == {tmp_path}
