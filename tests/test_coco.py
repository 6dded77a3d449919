"""COCO's images, one by one: side by side, each an image and the locked one before it is in place."""

import threading

import pytest
from test_fetch import IMAGES, JSON, NAMES, SIZES, a_store, asked, jpeg, online, put, tree, zipped

from mscke.fetching import coco, download
from mscke.fetching.lock import FetchError, Lock

__all__ = ["online"]  # a fixture


def bring(tmp_path, server, names=NAMES) -> None:
    needed = {name: [f"train_data.json, record {number}"] for number, name in enumerate(names)}
    coco.collect(needed, tmp_path / "data", None, Lock(tmp_path / "lock"), f"{server.url}/{{}}")


def test_an_image_that_is_not_there_is_named_with_its_records_and_the_others_come(online, tmp_path):
    body = online.files.pop(f"/{NAMES[4]}")
    with pytest.raises(FetchError) as error:
        a_store(tmp_path, online).benchmark(SIZES)
    for part in ("1 of 5 images", NAMES[4], "test_data.json, record 0; test_data.json, record 1", "HTTP 404", "DATA="):
        assert part in str(error.value)
    assert tree(tmp_path / "data") == JSON | {name: IMAGES[name] for name in NAMES[:4]}
    online.files[f"/{NAMES[4]}"] = body
    online.asked.clear()
    a_store(tmp_path, online).benchmark(SIZES)
    assert asked(online) == [f"/{NAMES[4]}"]


@pytest.mark.parametrize(
    "body, message",
    [
        (b"<html>Sign in to the network</html>", "gives a web page"),
        (b"", "damaged or not PNG/JPEG"),
        (IMAGES[NAMES[1]][:-30], "damaged or not PNG/JPEG"),
    ],
    ids=["page", "nothing", "cut"],
)
def test_what_is_no_image_is_never_in_place(online, tmp_path, body, message):
    online.files[f"/{NAMES[1]}"] = body
    with pytest.raises(FetchError, match=rf"{NAMES[1]}, of train_data\.json, record 1: .*{message}"):
        bring(tmp_path, online)
    assert tree(tmp_path / "data") == {name: IMAGES[name] for name in NAMES if name != NAMES[1]}


def test_an_image_that_is_not_the_locked_one_is_never_in_place(online, tmp_path):
    a_store(tmp_path, online).benchmark(SIZES)
    (tmp_path / "data" / NAMES[4]).unlink()
    online.files[f"/{NAMES[4]}"] = jpeg(99)
    lock = (tmp_path / "paper.lock.json").read_text()
    with pytest.raises(FetchError, match=r"COCO 2014 are not those in .*paper\.lock\.json"):
        a_store(tmp_path, online).benchmark(SIZES)
    assert tree(tmp_path / "data") == JSON | {name: IMAGES[name] for name in NAMES[:4]}
    assert (tmp_path / "paper.lock.json").read_text() == lock


def test_a_host_that_is_not_there_ends_it_at_once(online, tmp_path, monkeypatch):
    monkeypatch.setattr(coco, "AT_ONCE", 1)
    online.statuses = [503] * download.ATTEMPTS
    with pytest.raises(FetchError, match=r"000000000000\.jpg cannot be fetched \(HTTP 503\).*run again"):
        bring(tmp_path, online)
    assert online.fetched(NAMES[4]) == 0
    bring(tmp_path, online)
    assert tree(tmp_path / "data") == IMAGES


def test_a_host_that_refuses_everything_is_not_asked_for_everything(online, tmp_path, monkeypatch):
    monkeypatch.setattr(coco, "AT_ONCE", 2)
    monkeypatch.setattr(coco, "TOLERATED", 3)
    names = [f"val2014/none{number:03d}.jpg" for number in range(200)]
    with pytest.raises(FetchError, match=r"200 of 200 images of COCO 2014 could not be fetched"):
        bring(tmp_path, online, names)
    assert 3 <= len(online.asked) <= 4  # one may be under way when the third is refused


def test_images_come_side_by_side_and_not_too_many(tmp_path, monkeypatch):
    """Three wait for each other, and no fourth is begun before one of them is done."""
    together, lock, now, most = threading.Barrier(3, timeout=60), threading.Lock(), [], []

    def fake(url, path, check):
        with lock:
            now.append(url)
            most.append(len(now))
        together.wait()
        with lock:
            now.remove(url)

    monkeypatch.setattr(coco, "AT_ONCE", 3)
    monkeypatch.setattr(coco, "download", fake)
    coco.fetch({f"val2014/{number}.jpg": ["a record"] for number in range(9)}, tmp_path, Lock(tmp_path / "lock"))
    assert max(most) == 3 and len(most) == 9


def test_a_name_is_quoted_in_its_address(online, tmp_path):
    online.files["/val2014/a%20b%3F%231.jpg"] = body = jpeg(7)
    bring(tmp_path, online, [name := "val2014/a b?#1.jpg"])
    assert tree(tmp_path / "data") == {name: body}


def test_what_a_local_zip_lacks_is_fetched(online, tmp_path):
    own = put(tmp_path / "own", {"train2014.zip": zipped("train2014"), "val2014.zip": zipped("train2014")})
    a_store(tmp_path, online, data=own).benchmark(SIZES)
    assert tree(tmp_path / "data") == JSON | IMAGES
    assert [path for path in asked(online) if path.endswith(".jpg")] == [f"/{NAMES[4]}"]
