"""Pictures as a viewer shows them; what passes the check can be opened; what cannot be used is named."""

import json
import random
import struct
import unicodedata
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from mscke.benchmark.load import load_records
from mscke.benchmark.pictures import PictureError, check_image, inside, open_image
from mscke.benchmark.sample import FIELDS, RecordError

GREY = np.array([[0, 257 * 3, 65_535], [30_000, 128, 129]], np.uint16)
SHOWN = np.array([[0, 3, 255], [117, 0, 1]])


def png(header: bytes, data: bytes, hidden: bytes = b"") -> bytes:
    """A PNG of these chunks, which need not fit each other; ``hidden``: the value that is transparent."""
    chunks = [(b"IHDR", header), *([(b"tRNS", hidden)] if hidden else []), (b"IDAT", data), (b"IEND", b"")]
    whole = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def png16(rows: np.ndarray, kind: int, hidden: bytes = b"") -> bytes:
    """A PNG of 16 bits a channel; ``kind``: its colour type."""
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, kind, 0, 0, 0)
    return png(header, zlib.compress(lines), hidden)


def seen(path) -> np.ndarray:
    check_image(path)
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png16(GREY, 0))
    assert (seen(path) == SHOWN[..., None]).all()
    colour = np.stack([GREY, GREY[::-1], GREY], -1)
    path.write_bytes(png16(colour, 2))
    assert np.abs(seen(path).astype(int) - np.stack([SHOWN, SHOWN[::-1], SHOWN], -1)).max() <= 1


def drawn(mode):
    """A picture of 8×6 in this mode: its left half is to be seen, its right half is not."""
    image = Image.new("RGBA", (8, 6), (200, 10, 10, 255))
    image.paste((10, 200, 10, 0), (4, 0, 8, 6))
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_what_is_transparent_is_white(tmp_path, kind):
    drawn("RGBA").save(path := tmp_path / f"x.{kind}", lossless=True, exact=True)
    assert seen(path)[0, 0].tolist() == [200, 10, 10] and seen(path)[0, 7].tolist() == [255] * 3


@pytest.mark.parametrize("mode", ["LA", "L", "RGB", "P", "1", "I;16"])
def test_transparency_in_every_way_that_png_has(tmp_path, mode):
    path, hidden = tmp_path / "x.png", {"L": 77, "RGB": (1, 2, 3), "1": 0}
    if mode == "LA":
        drawn("LA").save(path)
    elif mode == "P":
        drawn("RGBA").quantize(4).save(path)
    elif mode == "I;16":
        rows = np.full((6, 8), 30_000, np.uint16)
        rows[:, 4:] = 777
        path.write_bytes(png16(rows, 0, struct.pack(">H", 777)))
    else:
        image = Image.new(mode, (8, 6), {"RGB": (50, 60, 70)}.get(mode, 1))
        image.paste(hidden[mode], (4, 0, 8, 6))
        image.save(path, transparency=hidden[mode])
    assert seen(path)[0, 7].tolist() == [255] * 3
    assert mode == "1" or seen(path)[0, 0].tolist() != [255] * 3


def test_a_picture_without_transparency_is_its_pixels(tmp_path):
    noise = Image.effect_noise((24, 16), 60).convert("RGB")
    noise.save(tmp_path / "x.png")
    assert (seen(tmp_path / "x.png") == np.asarray(noise)).all()
    noise.convert("RGBA").save(tmp_path / "y.png")
    assert (seen(tmp_path / "y.png") == np.asarray(noise)).all()


def test_a_moving_picture_is_its_first_frame(tmp_path):
    first, then = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first.save(tmp_path / "x.webp", save_all=True, append_images=[then], lossless=True)
    assert seen(tmp_path / "x.webp")[0, 0].tolist() == [255, 0, 0]


def test_open_image_is_upright_rgb(tmp_path):
    image = Image.new("L", (6, 4))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # shot with the camera turned: rotate 90° clockwise to view
    image.save(tmp_path / "turned.png", exif=exif)
    upright = open_image(tmp_path / "turned.png")
    assert (upright.mode, upright.size) == ("RGB", (4, 6))
    assert upright.getpixel((3, 0)) == (255, 255, 255)
    with pytest.raises(PictureError, match=r"page\.png is damaged or not PNG/JPEG/WEBP .*cannot identify"):
        (tmp_path / "page.png").write_text("no image")
        open_image(tmp_path / "page.png")


def jpeg(**options) -> bytes:
    file = BytesIO()
    Image.effect_noise((40, 24), 60).convert("RGB").save(file, "JPEG", **options)
    return file.getvalue()


def exif(numerator: int, denominator: int, kind: int = 10) -> bytes:
    """EXIF that says how the camera was turned (6), and a resolution that no camera has; ``kind``: of its number."""
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    entries = struct.pack("<H", 2) + turned + struct.pack("<HHII", 0x011A, kind, 1, 38) + bytes(4)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + struct.pack("<ii", numerator, denominator)


TURNED, AS_IT_IS = (24, 40), (40, 24)
EXIF = [(exif(*n), TURNED) for n in ((-5, 1), (1, -1), (72, 0, 5), (0, 0))] + [(exif(-5, 1)[:-4], None)]
EXIF += [(damaged, AS_IT_IS) for damaged in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0")]


@pytest.mark.parametrize("damaged, size", EXIF)
@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF data")
def test_damaged_exif_is_passed_over(tmp_path, damaged, size):
    (tmp_path / "x.jpg").write_bytes(jpeg(exif=damaged))
    shape = seen(tmp_path / "x.jpg").shape
    assert shape[1::-1] == size or (size is None and sorted(shape) == [3, 24, 40])


def test_a_jpeg_without_its_quantisation_table_is_refused_by_name(tmp_path):
    whole = jpeg()
    at = whole.index(b"\xff\xdb")
    length = struct.unpack(">H", whole[at + 2 : at + 4])[0]
    (tmp_path / "x.jpg").write_bytes(whole[:at] + whole[at + 2 + length :])
    for use in (check_image, open_image):
        with pytest.raises(PictureError, match=r"x\.jpg is damaged.*fetch it again"):
            use(tmp_path / "x.jpg")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_what_passes_the_check_opens_and_all_else_is_named(tmp_path, kind):
    file, rng = BytesIO(), random.Random(kind)
    Image.effect_noise((40, 24), 60).convert("RGBA" if kind != "JPEG" else "RGB").save(file, kind)
    whole, passed = file.getvalue(), 0
    for i in range(150):
        damaged = bytearray(whole[: rng.randrange(1, len(whole))] if i % 3 == 0 else whole)
        for _ in range(rng.randrange(0, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path = tmp_path / f"{i}.{kind.lower()}"
        path.write_bytes(damaged)
        try:
            check_image(path)
        except PictureError as error:
            assert str(path) in str(error)
            continue
        passed += 1
        found = np.asarray(open_image(path))
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
    assert 0 < passed < 150


def test_a_file_that_is_close_is_named(tmp_path):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "sub" / "x.jpg")
    name = unicodedata.normalize("NFD", "é.png")
    Image.new("RGB", (4, 4)).save(tmp_path / name)
    meant = {"sub\\x.jpg": "backslashes, and .*sub/x.jpg is there; write slashes", "Sub/X.JPG": "sub/x.jpg is there"}
    meant |= {unicodedata.normalize("NFC", name): "is there", "none\\x.jpg": "backslashes; write slashes"}
    for path, message in meant.items():
        with pytest.raises(PictureError, match=message):
            check_image(tmp_path / path)
    with pytest.raises(PictureError, match=r"no file .*y\.jpg; fetch it"):
        check_image(tmp_path / "sub" / "y.jpg")
    with pytest.raises(PictureError, match="is an address; fetch the picture"):
        inside(str(tmp_path), "https://host/x.jpg")


def test_the_loader_says_which_record_and_field(tmp_path):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "sub" / "x.jpg")
    row = dict.fromkeys(FIELDS, "text") | {"image": "sub\\x.jpg"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(RecordError, match=r'record 0, field "image": no file .*backslashes, and .*sub/x\.jpg is there'):
        load_records(tmp_path / "rows.json", tmp_path)


@pytest.mark.parametrize("use", [check_image, open_image])
def test_an_empty_path_is_no_picture(use):
    with pytest.raises(PictureError, match="is empty; give its file"):
        use("")
