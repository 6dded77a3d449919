"""Fetching for the paper track: resumed, whole or not there, and held to the lock file."""

import dataclasses
import hashlib
import io
import json
import os
import struct
import zipfile
from pathlib import Path

import huggingface_hub.constants as constants
import pytest
import torch
from file_server import FileServer
from PIL import Image
from safetensors.torch import save
from test_sample import a_row

from mscke.benchmark.sample import RecordError
from mscke.config import TRACKS
from mscke.fetching import __main__ as command
from mscke.fetching import coco, download
from mscke.fetching import store as fetch
from mscke.fetching.download import download as get
from mscke.fetching.lock import FetchError, Lock
from mscke.fetching.store import FILES, Store, open_store

BODY = os.urandom(200_000)
NAMES = [f"train2014/COCO_train2014_{i:012d}.jpg" for i in range(4)] + ["val2014/COCO_val2014_000000000042.jpg"]


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((24, 16), 20 + number).convert("RGB").save(file, "JPEG")
    return file.getvalue()


IMAGES = {name: jpeg(number) for number, name in enumerate(NAMES)}
ROWS = {"train": [a_row(name) for name in NAMES[:4]], "test": [a_row(NAMES[4]), a_row(NAMES[4], src="Another?")]}
SIZES = {"train": 4, "test": 2}
JSON = {FILES[split]: json.dumps(rows).encode() for split, rows in ROWS.items()}


def zipped(folder: str) -> bytes:
    """COCO's zip of ``folder``, with an image that FGVEdit does not name."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, body in (IMAGES | {f"{folder}/other.jpg": b"not named"}).items():
            if name.startswith(folder):
                archive.writestr(name, body)
    return file.getvalue()


@pytest.fixture
def online(tmp_path, monkeypatch):
    """A server in the place of the hub and of COCO."""
    server = FileServer()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    server.publish(fetch.FGVEDIT, JSON, "dataset")
    server.files |= {f"/{name}": body for name, body in IMAGES.items()} | {"/train2014/other.jpg": b"not named"}
    yield server
    server.close()


def a_store(tmp_path, server=None, **changes) -> Store:
    """A store in ``tmp_path``, with the lock read anew."""
    images = f"{server.url}/{{}}" if server else "none"
    lock = Lock(tmp_path / "paper.lock.json")
    return dataclasses.replace(Store(tmp_path / "data", lock, online=server is not None, images=images), **changes)


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def locked(tmp_path) -> dict:
    path = tmp_path / "paper.lock.json"
    return json.loads(path.read_text()) if path.exists() else {}


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(body).hexdigest() for name, body in sorted(files.items())}


def asked(server) -> list[str]:
    return [path for _, path, _ in server.asked]


def small_track(monkeypatch, **sources) -> None:
    """The paper track with the few records here, and no models but those of ``sources``."""
    sources = {"backbones": {}, "clips": {}, "counterfactuals": {}} | sources
    sizes = {f"n_{split}": size for split, size in SIZES.items()}
    monkeypatch.setitem(TRACKS, "paper", dataclasses.replace(TRACKS["paper"], **sources, **sizes))


# One file over HTTP


def no_check(path):
    pass


@pytest.mark.parametrize("trouble", [{"cuts": [70_000, 50_000]}, {"statuses": [503, 429]}], ids=["cut", "refused"])
def test_failures_that_pass_are_tried_again(online, tmp_path, trouble):
    online.files["/file"] = BODY
    vars(online).update(trouble)
    get(f"{online.url}/file", tmp_path / "file", no_check)
    assert tree(tmp_path) == {"file": BODY} and not online.cuts and not online.statuses


def test_failures_that_last_are_not(online, tmp_path):
    with pytest.raises(download.Refused, match="HTTP 404"):
        get(f"{online.url}/none", tmp_path / "file", no_check)
    assert len(online.asked) == 1
    with pytest.raises(FetchError, match="run again"):
        get("http://127.0.0.1:9/file", tmp_path / "file", no_check)
    assert tree(tmp_path) == {}


# The lock


def test_the_lock_trusts_once_and_verifies_ever_after(tmp_path):
    put(tmp_path, {"a": b"one", "b": b"two"})
    files = {name: tmp_path / name for name in "ba"}
    Lock(tmp_path / "lock").check("source", files, "r1")
    written = json.loads((tmp_path / "lock").read_text())
    assert written == {"source": {"revision": "r1", "files": digests({"a": b"one", "b": b"two"})}}
    assert list(written["source"]["files"]) == ["a", "b"]

    lock = Lock(tmp_path / "lock")
    lock.check("source", files)  # a revision that is not known does not undo the one that was
    assert lock.revision("source") == "r1" and json.loads((tmp_path / "lock").read_text()) == written
    (tmp_path / "b").write_bytes(b"changed")
    with pytest.raises(FetchError, match=r"1 of 2 files of source .*/b has"):
        lock.check("source", files)
    assert json.loads((tmp_path / "lock").read_text()) == written


def test_a_frozen_lock_is_never_written(tmp_path):
    put(tmp_path, {"a": b"one"})
    Lock(tmp_path / "lock", frozen=True).check("source", {"a": tmp_path / "a"})
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"source": 3}', '{"source": {"revision": null}}'])
def test_what_is_no_lock_is_refused(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with pytest.raises(FetchError, match="not a lock file"):
        Lock(tmp_path / "lock")
    assert (tmp_path / "lock").read_text() == text


# FGVEdit and COCO


def test_everything_is_fetched_locked_and_then_left_alone(online, tmp_path):
    loaded = a_store(tmp_path, online).benchmark(SIZES)
    assert [len(loaded[split].records) for split in SIZES] == [4, 2]
    assert tree(tmp_path / "data") == JSON | IMAGES
    assert sorted(path for path in asked(online) if path.endswith((".jpg", ".zip"))) == [f"/{n}" for n in NAMES]

    lock, commit = locked(tmp_path), next(iter(online.repos.values()))
    assert lock[f"datasets/{fetch.FGVEDIT}"] == {"revision": commit, "files": digests(JSON)}
    assert lock["COCO 2014"]["files"] == digests(IMAGES)

    online.asked.clear()
    a_store(tmp_path, online).benchmark(SIZES)
    assert online.asked == []


def test_a_local_folder_is_used_and_not_written(tmp_path):
    own = put(tmp_path / "own", JSON | IMAGES)
    for path in own.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    own.chmod(0o555)
    before = tree(own)
    a_store(tmp_path, data=own).benchmark(SIZES)
    assert tree(tmp_path / "data") == before == tree(own)
    for path in (own, *own.rglob("*")):
        path.chmod(0o755)


def test_local_zips_are_used_and_kept(tmp_path):
    files = JSON | {f"{folder}.zip": zipped(folder) for folder in coco.FOLDERS}
    own = put(tmp_path / "own", files)
    assert coco.absent(NAMES, tmp_path / "data", own) == []
    assert coco.absent([*NAMES, "val2014/none.jpg"], tmp_path / "data", own) == ["val2014/none.jpg"]
    a_store(tmp_path, data=own).benchmark(SIZES)
    assert tree(tmp_path / "data") == JSON | IMAGES and tree(own) == files


def test_a_copy_is_made_where_no_link_can_be(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("another disk")

    monkeypatch.setattr(coco.os, "link", refuse)
    put(tmp_path, {"a": b"one"})
    coco.place(tmp_path / "a", tmp_path / "b" / "c")
    assert tree(tmp_path) == {"a": b"one", "b/c": b"one"}


def test_a_changed_file_is_an_error_that_names_it(online, tmp_path):
    a_store(tmp_path, online).benchmark(SIZES)
    (tmp_path / "data" / NAMES[2]).write_bytes(jpeg(99))
    with pytest.raises(FetchError, match=r"1 of 5 files of COCO 2014 .*000000000002\.jpg"):
        a_store(tmp_path, online).benchmark(SIZES)


def test_the_locked_revision_is_fetched_whatever_is_newer(online, tmp_path, monkeypatch):
    a_store(tmp_path, online).benchmark(SIZES)
    online.publish(fetch.FGVEDIT, JSON | {"test_data.json": json.dumps(ROWS["test"][::-1]).encode()}, "dataset")
    lock = (tmp_path / "paper.lock.json").read_text()
    elsewhere = put(tmp_path / "elsewhere", {"paper.lock.json": lock.encode()})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(elsewhere / "cache"))
    a_store(elsewhere, online).benchmark(SIZES)
    assert tree(elsewhere / "data") == JSON | IMAGES
    assert (elsewhere / "paper.lock.json").read_text() == lock


def test_a_damaged_member_is_found_by_its_crc(tmp_path):
    body = bytearray(zipped("train2014"))
    at = body.index(IMAGES[NAMES[2]])
    body[at + 200] ^= 1
    own = put(tmp_path / "own", JSON | {"train2014.zip": bytes(body), "val2014.zip": zipped("val2014")})
    with pytest.raises(FetchError, match=r"train2014\.zip is damaged at .*002\.jpg"):
        a_store(tmp_path, data=own).benchmark(SIZES)
    assert set(tree(tmp_path / "data")) == {*JSON, *NAMES[:2]}  # those before it are kept, no half image


@pytest.mark.parametrize(
    "files, message",
    [
        ({"train2014.zip": zipped("train2014")[:-100]}, r"train2014\.zip is cut short or no zip"),
        ({"train2014.zip": zipped("train2014"), "val2014.zip": zipped("train2014")}, r"1 images are not there, .*000042\.jpg"),
        ({name: IMAGES[name] for name in NAMES[:4]}, r"1 images are not there.*have|val2014/ or val2014\.zip"),
        (IMAGES | {"train_data.json": JSON["train_data.json"][:-40]}, "cut short"),
        (IMAGES | {"train_data.json": json.dumps(ROWS["train"][:3]).encode()}, r"3 records .* not 4: 1 are missing"),
        (IMAGES | {"test_data.json": json.dumps(ROWS["test"] * 2).encode()}, r"not 2: 2 are too many"),
        (IMAGES | {NAMES[1]: IMAGES[NAMES[1]][:-30]}, r"record 1, .*damaged"),
        (IMAGES | {"test_data.json": json.dumps([a_row("flickr/1.jpg")] * 2).encode()}, "no folder of COCO 2014"),
        (IMAGES | {"test_data.json": json.dumps([a_row("../1.jpg")] * 2).encode()}, "leaves the image root"),
    ],
    ids=["cut zip", "image not in zip", "no val", "cut JSON", "too few", "too many", "cut image", "not COCO", "climbs"],
)  # fmt: skip
def test_bad_input_is_named_and_never_locked(tmp_path, files, message):
    own = put(tmp_path / "own", JSON | files)
    with pytest.raises((FetchError, RecordError), match=message):
        a_store(tmp_path, data=own).benchmark(SIZES)
    assert "COCO 2014" not in locked(tmp_path)
    assert not [name for name in tree(tmp_path) if name.endswith(".tmp")]


@pytest.mark.parametrize("more, sizes, left_out", [([], (2, 3), []), ([a_row(NAMES[4], loc="")], (3, 4), [3])])
def test_records_without_an_answer_count_or_do_not(tmp_path, more, sizes, left_out):
    """Those with a bad field count as what they should have been."""
    rows = [*ROWS["test"], a_row(NAMES[4], alt=""), *more]
    own = put(tmp_path / "own", JSON | IMAGES | {"test_data.json": json.dumps(rows).encode()})
    for size in sizes:
        found = a_store(tmp_path, data=own).benchmark({"train": 4, "test": size})["test"]
        assert (len(found.records), found.skipped, list(found.left_out)) == (2, 1, left_out)
    with pytest.raises(FetchError, match=rf"{len(rows)} records \(1 of them without an answer\), not 5"):
        a_store(tmp_path, data=own).benchmark({"train": 4, "test": 5})


def test_offline_without_data_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FetchError, match="ZhenZeng/FGVEdit is not in the hub's cache"):
        a_store(tmp_path).benchmark(SIZES)


def test_a_hub_without_the_files_is_an_error(online, tmp_path):
    online.publish(fetch.FGVEDIT, {"README.md": b"moved"}, "dataset")
    with pytest.raises(FetchError, match=r"lacks train_data\.json"):
        a_store(tmp_path, online).benchmark(SIZES)


@pytest.mark.parametrize("folder", ["annotations", "FGVEdit/v1"])
@pytest.mark.parametrize("where", ["hub", "data"])
def test_annotations_may_lie_in_a_folder(online, tmp_path, folder, where):
    nested = {f"{folder}/{name}": body for name, body in JSON.items()}
    online.publish(fetch.FGVEDIT, (nested if where == "hub" else {}) | {"my_train_data.json": b"no"}, "dataset")
    data = put(tmp_path / "own", nested | IMAGES) if where == "data" else None
    a_store(tmp_path, online, data=data).benchmark(SIZES)
    assert tree(tmp_path / "data") == JSON | IMAGES and online.fetched("my_train_data.json") == 0
    online.asked.clear()
    a_store(tmp_path, online, data=data).benchmark(SIZES)
    assert online.asked == []


def test_annotations_of_two_folders_are_not_chosen_from(tmp_path):
    own = put(tmp_path / "own", {f"{folder}/{name}": body for name, body in JSON.items() for folder in ("new", "old")})
    with pytest.raises(FetchError, match=r"new/train_data\.json and old/train_data\.json: give DATA="):
        a_store(tmp_path, data=own).benchmark(SIZES)
    put(own, JSON | IMAGES)  # those at the top are meant
    a_store(tmp_path, data=own).benchmark(SIZES)


def test_records_with_a_bad_field_are_left_out_and_noted(online, tmp_path, monkeypatch, capsys):
    """Their images are not fetched; the others keep their numbers, and the count is that of the file."""
    rows = [*ROWS["train"][:3], a_row(NAMES[3], rephrase=" ")]
    online.publish(fetch.FGVEDIT, JSON | {"train_data.json": json.dumps(rows).encode()}, "dataset")
    train = a_store(tmp_path, online).benchmark(SIZES)["train"]
    assert [r.id for r in train.records] == [0, 1, 2] and list(train.left_out) == [3]
    assert f"/{NAMES[3]}" not in asked(online)
    monkeypatch.setattr(command, "open_store", lambda *_: a_store(tmp_path, online))
    small_track(monkeypatch)
    assert command.main([]) == 0
    said = capsys.readouterr().out
    assert "train: 1 records with a bad field are left out" in said and 'record 3, field "rephrase": found' in said


# Models

SHARDS = {
    "model-1.safetensors": {"vision_model.a": torch.zeros(2), "query_tokens": torch.zeros(1)},
    "model-2.safetensors": {"qformer.b": torch.ones(2), "language_model.c": torch.ones(3)},
    "model-3.safetensors": {"language_model.d": torch.ones(4), "language_projection.weight": torch.ones(1)},
}
INDEX = {"weight_map": {tensor: file for file, tensors in SHARDS.items() for tensor in tensors}}
SHARDED = {name: save(tensors) for name, tensors in SHARDS.items()} | {
    "config.json": b"{}", "model.safetensors.index.json": json.dumps(INDEX).encode(), "pytorch_model.bin": b"old",
}  # fmt: skip
EYES = "Salesforce/blip2-flan-t5-xxl"


def test_only_the_shards_that_see_are_fetched(online, tmp_path):
    commit = online.publish(EYES, SHARDED)
    folder = a_store(tmp_path, online).model(EYES)
    wanted = ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    assert sorted(os.listdir(folder)) == wanted
    entry = {"revision": commit, "files": digests({name: SHARDED[name] for name in wanted})}
    assert locked(tmp_path)[f"models/{EYES}"] == entry
    assert a_store(tmp_path).model(EYES) == folder  # offline, from the hub's cache


def test_old_weights_are_taken_where_there_are_no_others(online, tmp_path):
    online.publish("an/old", {"config.json": b"{}", "pytorch_model.bin": b"old", "flax_model.msgpack": b"no"})
    assert sorted(os.listdir(a_store(tmp_path, online).model("an/old"))) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize("name", ["an/owner", "owner"])
def test_a_local_model_comes_first_and_is_held_to_the_lock(online, tmp_path, name):
    online.publish("an/owner", SHARDED)
    a_store(tmp_path, online).model("an/owner")
    own = put(tmp_path / "own", {f"{name}/{file}": body for file, body in SHARDED.items()})
    assert a_store(tmp_path, models=own).model("an/owner") == own / name
    put(own, {f"{name}/model-2.safetensors": save({"qformer.b": torch.zeros(2)})})
    with pytest.raises(FetchError, match=r"model-2\.safetensors has"):
        a_store(tmp_path, models=own).model("an/owner")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model-2.safetensors": None}, r"lacks model-2\.safetensors"),
        ({"model-2.safetensors": SHARDED["model-2.safetensors"][:-3]}, r"model-2\.safetensors is damaged or cut"),
        ({"model-2.safetensors": struct.pack("<Q", 2**40)}, r"model-2\.safetensors is damaged or cut"),
        ({"model.safetensors.index.json": b'{"weight_m'}, "no index of weights"),
        ({"config.json": b'{"model_'}, r"config\.json is damaged or cut short"),
        (dict.fromkeys(SHARDED), r"lacks \*\.json, \*\.safetensors"),
    ],
)
def test_an_unsound_model_is_named_and_never_locked(tmp_path, change, message):
    files = {f"m/{name}": body for name, body in (SHARDED | change).items() if body is not None}
    (tmp_path / "own" / "m").mkdir(parents=True)
    own = put(tmp_path / "own", files)
    with pytest.raises(FetchError, match=message):
        a_store(tmp_path, models=own).model("an/m")
    assert locked(tmp_path) == {}


def test_a_hub_that_refuses_is_an_error(online, tmp_path):
    with pytest.raises(FetchError, match=r"a/none cannot be fetched .*MODELS="):
        a_store(tmp_path, online).model("a/none")


@pytest.fixture
def weights(online, monkeypatch):
    """What passes for MiniGPT-4's checkpoint as published; Google Drive is on the server here."""
    body = b"weights"
    monkeypatch.setattr(fetch, "MINIGPT4_BYTES", len(body))
    monkeypatch.setattr(fetch, "MINIGPT4_SHA256", hashlib.sha256(body).hexdigest()[:12] + ".*")
    monkeypatch.setattr(fetch, "DRIVE", f"{online.url}/drive")
    return body


@pytest.mark.parametrize("name", fetch.MINIGPT4_NAMES)
def test_a_projection_of_the_users_own_is_taken_by_either_name(tmp_path, name):
    own = put(tmp_path / "own", {name: b"of any bytes"})
    assert a_store(tmp_path, models=own).minigpt4() == own / name
    files = locked(tmp_path)[f"spaces/{fetch.SPACE}"]["files"]
    assert files == digests({fetch.PROJECTION: b"of any bytes"})


def test_the_projection_comes_off_its_space_on_the_hub(online, tmp_path, monkeypatch, weights):
    commit = online.publish(fetch.SPACE, {fetch.PROJECTION: weights, "app.py": b"no"}, "space")
    path = a_store(tmp_path, online).minigpt4()
    assert path.read_bytes() == weights and "/drive" not in asked(online) and online.fetched("app.py") == 0
    assert locked(tmp_path)[f"spaces/{fetch.SPACE}"]["revision"] == commit
    assert a_store(tmp_path).minigpt4() == path  # offline, from the hub's cache
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    with pytest.raises(FetchError, match=rf"{fetch.PROJECTION}: .*go online"):
        a_store(tmp_path / "other").minigpt4()


@pytest.mark.parametrize("space", [None, {"README.md": b"moved"}, {fetch.PROJECTION: b"another"}])
def test_google_drive_is_second(online, tmp_path, capsys, weights, space):
    if space:
        online.publish(fetch.SPACE, space, "space")
    online.files["/drive"] = weights
    path = a_store(tmp_path, online).minigpt4()
    assert path.read_bytes() == weights and a_store(tmp_path).minigpt4() == path
    assert "Google Drive is asked" in capsys.readouterr().err


@pytest.mark.parametrize("drive", ["page", "another", "none"])
def test_a_projection_that_is_nowhere_says_so_of_both(online, tmp_path, weights, drive):
    said = {"page": "gives a web page", "another": "is not the checkpoint that was published", "none": "HTTP 404"}
    if drive != "none":
        online.files["/drive"] = b"<html>quota" if drive == "page" else b"WEIGHTS"
    with pytest.raises(
        FetchError, match=rf"{fetch.SPACE} cannot be fetched.*{said[drive]}.*give MODELS=.*{fetch.PROJECTION}"
    ):
        a_store(tmp_path, online).minigpt4()
    assert tree(tmp_path / "data") == {} == locked(tmp_path)


def test_options_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MSCKE_DATA", str(tmp_path))
    store = open_store()
    assert store.data == tmp_path.resolve() and store.models is None
    assert not store.online  # HF_HUB_OFFLINE=1 in every test
    with pytest.raises(FetchError, match=r"MODELS=.* is not a folder"):
        open_store(models=str(tmp_path / "none"))


def test_the_command_fetches_everything_or_says_what_is_missing(online, tmp_path, monkeypatch, capsys, weights):
    monkeypatch.setattr(command, "open_store", lambda *_: a_store(tmp_path, online))
    small_track(monkeypatch, backbones={"MiniGPT-4": f"minigpt4:{EYES}+{EYES}"})
    assert command.main([]) == 1 and f"{EYES} cannot be fetched" in capsys.readouterr().err
    online.publish(EYES, SHARDED)
    online.publish(fetch.SPACE, {fetch.PROJECTION: weights}, "space")
    assert command.main([]) == 0 and "paper.lock.json: commit it" in capsys.readouterr().out
