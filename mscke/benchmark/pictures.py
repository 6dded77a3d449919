"""Pictures as a viewer shows them, or refused by name.

Upright (EXIF orientation), in eight bits a channel, on white where they are transparent, the first frame of those that
move. Colour profiles are not applied: neither the released code nor the models' own processors do.
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 50_000_000  # read from the header, before anything is decoded
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
EIGHTH = 8  # of its sides, at which a JPEG is decoded to see whether it can be


class PictureError(OSError):
    """A picture cannot be used; the message names the file and the fix."""


def inside(root: str, image: str) -> str:
    """The absolute path of ``image``, links followed; it may not leave ``root`` by any of these ways (PictureError)."""
    if re.match(r"\w+://", image):
        raise PictureError(f"{image!r} is an address; fetch the picture, and give its path inside {root}")
    fault = 'leaves the image root, by ".." or a link'
    if "\0" in image:
        fault = "holds a NUL"
    elif PureWindowsPath(image).anchor:  # "/a" and "C:a" alike
        fault = "is absolute"
    elif os.path.normpath(image).split(os.sep)[0] != "..":
        path = os.path.realpath(os.path.join(root, image))
        if os.path.commonpath([root, path]) == root:
            return path
    raise PictureError(f"{image!r} {fault}; give a path relative to {root}, inside it")


def open_image(path: str | Path) -> Image.Image:
    """The picture as a viewer shows it, in RGB. Raises :class:`PictureError` for a file that is none."""
    return _opened(path, lambda image: _on_white(_eight_bits(_upright(image))))


def check_image(path: str | Path) -> None:
    """Raise :class:`PictureError` unless :func:`open_image` can open the file; a JPEG is decoded at an eighth of its size."""

    def decode(image: Image.Image) -> None:
        if image.format == "PNG":
            with Image.open(path, formats=FORMATS) as again:
                again.verify()  # its checksums, which decoding leaves unread
        image.draft(image.mode, (max(1, image.width // EIGHTH), max(1, image.height // EIGHTH)))
        _on_white(_eight_bits(_upright(image)))

    _opened(path, decode)


def _opened(path: str | Path, use):
    """What ``use`` makes of the file's picture; whatever goes wrong has the file's name."""
    if not str(path):
        raise PictureError("a picture's path is empty; give its file")
    if not os.path.isfile(path):
        if os.path.lexists(path):
            raise PictureError(f"{path} is no file, nor a link to one; give a picture's, or another image root")
        raise PictureError(f"no file {path}{_close_to(Path(path))}; fetch it, or give another image root")
    if not os.access(path, os.R_OK):
        raise PictureError(f"{path} may not be read; change its permissions")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            return use(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(f"{path} has more than {MAX_PIXELS:,} pixels; scale it down") from error
    except Exception as error:  # decoders raise SyntaxError, struct.error, … on damaged files
        fault = f"is damaged or not {'/'.join(FORMATS)} ({error})"
        raise PictureError(f"{path} {fault}; fetch it again, or save it as one of these") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # damaged EXIF: a viewer shows the picture without
        turn = None
    image.load()
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, in which Pillow keeps it, scaled to 8: 65,535 becomes 255. Fully transparent is one value of it."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    grey = Image.fromarray(np.rint(np.clip(values, 0, 65_535) / 257).astype(np.uint8))
    if (hidden := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def _close_to(path: Path) -> str:
    """Which file was meant, if one is there whose name differs by slashes, case or Unicode's form."""
    if "\\" in path.name:
        meant = Path(str(path).replace("\\", "/"))
        there = f", and {meant} is there" if meant.is_file() else ""
        return f": its path has backslashes{there}; write slashes"
    found = Path(path.parts[0])
    for part in path.parts[1:]:
        if not os.path.exists(found / part):
            try:
                alike = sorted(name for name in os.listdir(found) if _folded(name) == _folded(part))
            except OSError:  # no folder, or one that may not be read
                alike = []
            if not alike:
                return ""
            part = alike[0]
        found /= part
    return f", but {found} is there: names differ by case or by how a letter is written"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
