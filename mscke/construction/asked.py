"""What a judge is sent: facts in which no text acts as a control token, and pictures that every endpoint takes."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import warnings
from pathlib import Path

from PIL import Image

from mscke.benchmark.answers import is_text
from mscke.benchmark.pictures import ORIENTATION, check_image, open_image

LONGEST_SIDE = 2048  # pixels; larger pictures are scaled down, as endpoints do themselves
MOST_BYTES = 3 << 20  # of a file that is sent as it is
PNG_DEPTH = 24  # the byte that holds the bits a channel
TWINS = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
_CONTROL = re.compile(r"[<>|]|#(?=#)|\[(?=/?[A-Z])")


def facts_text(facts: dict) -> str:
    """``facts`` as JSON that holds no control token of a chat model: ``<`` and its like are escaped (``\\u003c``).

    Such tokens are ``<|im_start|>``, ``</s>``, ``<image>``, ``[INST]``, ``###``. The JSON means the same. Raises
    ValueError for half a character (a lone surrogate).
    """
    for name, value in facts.items():
        if not is_text(json.dumps({name: value}, ensure_ascii=False)):
            raise ValueError(f"facts: {name!a} is {value!a}, with half a character; write it anew")
    text = json.dumps(facts, ensure_ascii=False)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)  # these stand in strings only


def file_url(image: Path) -> str:
    """The file as it is, as a data URL. Raises :class:`PictureError` for a file that is no whole picture."""
    check_image(image)
    with Image.open(image) as opened:
        return _url(opened.get_format_mimetype(), Path(image).read_bytes())


def picture_url(image: Path) -> str:
    """The picture as a data URL: the file as it is where every endpoint takes it, else a JPEG made of it.

    Raises :class:`PictureError` for a file that is no picture.
    """
    data = Path(image).read_bytes()
    with Image.open(io.BytesIO(data)) as opened:
        if _is_plain(opened, data):
            return _url(opened.get_format_mimetype(), data)
    seen, out = open_image(image), io.BytesIO()
    seen.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    seen.save(out, "JPEG", quality=95)
    return _url("image/jpeg", out.getvalue())


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """A PNG or JPEG of one upright frame, opaque, grey or RGB of 8 bits a channel, and not large."""
    try:
        upright = image.getexif().get(ORIENTATION, 1) == 1
    except Exception:  # damaged EXIF: leave it behind
        upright = False
    bits = data[PNG_DEPTH] if image.format == "PNG" else 8
    one_frame = getattr(image, "n_frames", 1) == 1
    opaque = image.mode in ("L", "RGB") and not image.has_transparency_data
    small = max(image.size) <= LONGEST_SIDE and len(data) <= MOST_BYTES
    return image.format in ("PNG", "JPEG") and upright and bits == 8 and one_frame and opaque and small


def _url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


class Fit:
    """Requests as one endpoint takes them. A run's threads share it, and each thing that it learns is said once.

    A parameter that was turned down is left out from then on, or goes by its other name (:data:`TWINS`).
    Without ``response_format`` the schema stands in the prompt.
    """

    def __init__(self, url: str):
        self.url, self.without, self.room = url, set(), 0
        self._lock = threading.Lock()

    def __call__(self, body: dict, room: int = 0) -> dict:
        """``body`` as it is sent, with ``room`` for so many tokens in the reply (0: what ``body`` asks for)."""
        if room := max(room, self.room):
            body = body | {next((name for name in TWINS if name in body), "max_tokens"): room}
        sent = {}
        for name, value in body.items():
            other = TWINS.get(name)
            if name not in self.without:
                sent[name] = value
            elif other and other not in self.without:
                sent[other] = value
        if "response_format" in body and "response_format" not in sent:
            schema = json.dumps(body["response_format"]["json_schema"]["schema"])
            system, *rest = body["messages"]
            asked = "Reply with one JSON object that follows this JSON schema, and with nothing else:"
            sent["messages"] = [system | {"content": f"{system['content']}\n\n{asked}\n{schema}"}, *rest]
        return sent

    def learn(self, name: str, said: str) -> None:
        """The endpoint turned down the parameter ``name``, and ``said`` why."""
        with self._lock:
            if name not in self.without:
                self.without.add(name)
                now = "from now on it is asked without it, or under its other name"
                self._say(f"does not take {name} as it was sent; {now} ({said})")

    def leave_room(self, room: int) -> None:
        """Replies were cut off, and are whole with room for ``room`` tokens."""
        with self._lock:
            if room > self.room:
                if not self.room:
                    self._say(f"cut a reply off; from now on there is room for {room} tokens")
                self.room = room

    def _say(self, what: str) -> None:
        warnings.warn(f"{self.url} {what}", stacklevel=4)
