"""A language model as judge, behind any OpenAI-compatible chat endpoint.

Every reply is kept on disk under the content that was asked, with its prompt and model, and is never paid for again.
That the model refuses, or a content filter stops a request, is a reply too. Its file says ``"reply": null``: delete
it to ask again::

    judge = Judge("outputs/judge")  # OPENAI_BASE_URL and OPENAI_API_KEY say where
    replies = judge.ask_all([Request(task, {"question": "What is this?"}, Path("image.jpg"))])
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import jsonschema
from tqdm import tqdm

from mscke.construction.asked import facts_text, file_url, picture_url
from mscke.construction.endpoint import Endpoint, JudgeError, Unanswered
from mscke.system.files import replacing

OPENAI = "https://api.openai.com/v1"
SHARD = 3  # hex digits of a verdict's hash that name its folder


class NoReply(Enum):
    """Why a question has no reply; false."""

    REFUSED = "refused"  # by the model, or by a content filter
    UNANSWERED = "unanswered"  # turned down, or what was said could not be read

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class Task:
    """What a judge is asked to do, and the JSON schema of its reply. ``name``: letters, digits, ``_-``."""

    name: str
    instructions: str
    properties: dict[str, dict]  # name of each field of the reply -> its schema; all are required

    @property
    def schema(self) -> dict:
        return {
            "type": "object",
            "properties": self.properties,
            "required": list(self.properties),
            "additionalProperties": False,
        }


@dataclass(frozen=True)
class Request:
    """One thing to judge: ``facts`` go to the judge as JSON, with the image beside them if there is one."""

    task: Task
    facts: dict
    image: Path | None = None


@dataclass
class Judge:
    """A client of one model. Safe to use from many threads.

    ``options`` are sent along. One that the endpoint turns down is left out from then on (:class:`Fit`).
    One request takes at most ``attempts`` tries of ``timeout`` seconds. ``leave_out`` is the share of questions, rounded
    up, that :meth:`ask_all` may leave without a usable reply. Refusals are not among them.
    """

    cache: str | Path
    model: str = "gpt-4o-mini"
    base_url: str = field(default_factory=lambda: os.environ.get("OPENAI_BASE_URL") or OPENAI)
    options: dict = field(default_factory=lambda: {"temperature": 0})
    concurrency: int = 8
    per_minute: float = 300
    attempts: int = 8
    timeout: float = 60
    leave_out: float = 0.05

    def __post_init__(self):
        if not 0 <= self.leave_out <= 1:
            raise ValueError(f"leave_out is {self.leave_out}; give a share from 0 to 1")
        for name in ("concurrency", "per_minute", "attempts", "timeout"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name} is {value}; give more than 0")
            if name in ("concurrency", "attempts") and value != int(value):
                raise ValueError(f"{name} is {value}; give a whole number")
        self._endpoint = Endpoint(self.base_url, self.concurrency, self.per_minute, self.attempts, self.timeout)
        self._locks = [threading.Lock() for _ in range(16**SHARD)]

    def ask_all(self, requests: Sequence[Request], desc: str = "") -> list[dict | NoReply]:
        """:meth:`ask` each of ``requests``; replies in their order. After a failure none is begun.

        Raises as :meth:`ask` does, but for questions without a usable reply only beyond the share ``leave_out``.
        """
        failed, unanswered = threading.Event(), []
        most = math.ceil(self.leave_out * len(requests))

        def ask(request):
            try:
                return NoReply.UNANSWERED if failed.is_set() else self.ask(request)
            except Unanswered as error:
                unanswered.append(error)
                if len(unanswered) <= most:
                    return NoReply.UNANSWERED
                failed.set()
                share = f"{most} may be left out (a share of {self.leave_out:g} of {len(requests)})"
                raise JudgeError(f"more questions have no reply than {share}: {error}") from error
            except BaseException:
                failed.set()
                raise

        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(tqdm(pool.map(ask, requests), total=len(requests), desc=desc, mininterval=2))

    def ask(self, request: Request) -> dict | NoReply:
        """The reply, following the task's schema; ``NoReply.REFUSED`` when the model or a filter refuses one.

        Raises :class:`Unanswered` when this question gets no usable reply, :class:`JudgeError` when the endpoint
        does not work, :class:`PictureError` for an image that is none.
        """
        task, image, told = request.task, request.image, facts_text(request.facts)
        plain = json.dumps(request.facts, ensure_ascii=False)  # named by what is asked, not by how it is sent
        asked = self._body(task, plain, image and "sha256:" + _digest(file_url(image)))
        digest = _digest(json.dumps(asked))
        path = Path(self.cache) / digest[:SHARD] / f"{digest}.json"
        with self._locks[int(digest[:SHARD], 16)]:  # the same content is asked by one thread only
            try:
                reply = json.loads(path.read_bytes())["reply"]
                if reply is not None:
                    jsonschema.validate(reply, task.schema)
            # a disk that lost half of it, or someone who mended it by hand
            except (FileNotFoundError, ValueError, LookupError, TypeError, jsonschema.ValidationError):
                try:
                    body = self._body(task, told, image and picture_url(image))
                    reply, answer = self._endpoint.complete(body, task.schema)
                except JudgeError as error:
                    kept = f"Every verdict so far is kept in {self.cache}: run again to go on from there."
                    raise type(error)(f"{error}. {kept}") from error
                write_json(path, {"reply": reply, "endpoint": self._endpoint.shown, "answer": answer, "request": asked})
        return NoReply.REFUSED if reply is None else reply

    def _body(self, task: Task, text: str, image: str | None) -> dict:
        content = [{"type": "text", "text": text}]
        if image:
            content.append({"type": "image_url", "image_url": {"url": image}})
        schema = {"name": task.name, "strict": True, "schema": task.schema}
        return {
            "model": self.model,
            "messages": [{"role": "system", "content": task.instructions}, {"role": "user", "content": content}],
            "response_format": {"type": "json_schema", "json_schema": schema},
        } | self.options


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write ``value`` whole or not at all."""
    with replacing(path) as whole:
        whole.write_text(json.dumps(value, indent=1), encoding="utf-8")
