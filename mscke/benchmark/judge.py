"""A language model as judge, behind any OpenAI-compatible chat endpoint.

Requests run concurrently at a bounded rate, failures are retried with back-off and jitter, and every
reply is kept on disk under the content that was asked, with its prompt and model: what was judged once
is never paid for again, whatever happens later::

    judge = Judge("outputs/judge")  # OPENAI_BASE_URL and OPENAI_API_KEY say where
    replies = judge.ask_all([Request(task, {"question": "What is this?"}, Path("image.jpg"))])
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx2
import jsonschema
from PIL import Image
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from tqdm import tqdm

OPENAI = "https://api.openai.com/v1"
LONGEST_WAIT = 300  # seconds; an endpoint that asks for more (a day's quota, say) is an error
SHARD = 3  # hex digits of a verdict's hash that name its folder
SHOWN = 300  # characters of an endpoint's complaint that an error repeats


class JudgeError(RuntimeError):
    """The endpoint gives no usable answer; the message says what it did and that the cache is kept."""


class _TryAgain(Exception):
    """This attempt failed in a way that another may not."""


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

    ``options`` are sent along as they are. One request takes at most ``attempts`` tries of ``timeout``
    seconds; the waits between them grow from ``backoff`` seconds, drawn at random, up to a minute.
    """

    cache: str | Path
    model: str = "gpt-4o-mini"
    base_url: str = field(default_factory=lambda: os.environ.get("OPENAI_BASE_URL") or OPENAI)
    options: dict = field(default_factory=lambda: {"temperature": 0})
    concurrency: int = 8
    per_minute: float = 300
    attempts: int = 8
    timeout: float = 60
    backoff: float = 1

    def __post_init__(self):
        self.url = self.base_url.rstrip("/") + "/chat/completions"
        _check_address(self.url)
        key = os.environ.get("OPENAI_API_KEY", "").strip()  # local endpoints need none
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_connections=self.concurrency)
        self._client = httpx2.Client(headers=headers, timeout=self.timeout, limits=limits)
        self._pace = _Pace(60 / self.per_minute)
        self._locks = [threading.Lock() for _ in range(16**SHARD)]

    def ask_all(self, requests: Sequence[Request], desc: str = "") -> list[dict | None]:
        """:meth:`ask` each of ``requests``; replies in their order. After a failure none is begun."""
        failed = threading.Event()

        def ask(request):
            try:
                return None if failed.is_set() else self.ask(request)
            except BaseException:
                failed.set()
                raise

        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(tqdm(pool.map(ask, requests), total=len(requests), desc=desc, mininterval=2))

    def ask(self, request: Request) -> dict | None:
        """The reply, following the task's schema; None when the model refuses to give one.

        Raises :class:`JudgeError` when there is none after the last attempt, or none can be expected.
        """
        image = _data_url(request.image) if request.image else None
        asked = self._body(request, image and "sha256:" + _digest(image))
        digest = _digest(json.dumps(asked))
        path = Path(self.cache) / digest[:SHARD] / f"{digest}.json"
        with self._locks[int(digest[:SHARD], 16)]:  # the same content is asked by one thread only
            try:
                return json.loads(path.read_bytes())["reply"]
            except (FileNotFoundError, ValueError):  # ValueError: a disk that lost half of it
                reply, answer = self._persist(self._body(request, image), request.task.schema)
            kept = {"reply": reply, "endpoint": self.base_url, "answer": answer, "request": asked}
            write_json(path, kept)
        return reply

    def _body(self, request: Request, image: str | None) -> dict:
        task = request.task
        content = [{"type": "text", "text": json.dumps(request.facts, ensure_ascii=False)}]
        if image:
            content.append({"type": "image_url", "image_url": {"url": image}})
        schema = {"name": task.name, "strict": True, "schema": task.schema}
        return {
            "model": self.model,
            "messages": [
                {"role": "system", "content": task.instructions},
                {"role": "user", "content": content},
            ],
            "response_format": {"type": "json_schema", "json_schema": schema},
        } | self.options

    def _persist(self, body: dict, schema: dict) -> tuple[dict | None, dict]:
        """(reply, the endpoint's whole answer): attempts until one succeeds."""
        attempts = Retrying(
            stop=stop_after_attempt(self.attempts),
            wait=wait_random_exponential(self.backoff, max=60),
            retry=retry_if_exception_type((_TryAgain, httpx2.RequestError)),
            reraise=True,
        )
        try:
            return attempts(self._attempt, body, schema)
        except (_TryAgain, httpx2.RequestError) as error:
            last = str(error) or type(error).__name__
            fault = f"{self.url} gave no usable answer in {self.attempts} attempts; the last one: {last}"
            raise JudgeError(f"{fault}. {self._kept()}") from error

    def _attempt(self, body: dict, schema: dict) -> tuple[dict | None, dict]:
        self._pace.wait()
        status, headers, content = self._post(body)
        said = f"HTTP {status}: {content[:SHOWN].decode(errors='replace')}"
        if status in (408, 409, 425, 429) or status >= 500:
            if (seconds := _retry_after(headers.get("retry-after", ""))) > LONGEST_WAIT:
                raise JudgeError(f"{self.url} asks to wait for {seconds:.0f} s ({said}). {self._kept()}")
            self._pace.hold(seconds)
            raise _TryAgain(said)
        if status != 200:
            hint = "; is OPENAI_API_KEY the key of this endpoint?" if status in (401, 403) else ""
            raise JudgeError(f"{self.url} turns the request down, {said}{hint} {self._kept()}")
        try:
            answer = json.loads(content)
            message = answer["choices"][0]["message"]
            reply = None if message.get("refusal") else json.loads(message["content"])
            if reply is not None:
                jsonschema.validate(reply, schema)
        except (ValueError, LookupError, TypeError, AttributeError, jsonschema.ValidationError) as error:
            raise _TryAgain(f"a reply that does not follow the schema, {said}") from error
        return reply, {k: v for k, v in answer.items() if k != "choices"}

    def _post(self, body: dict) -> tuple[int, httpx2.Headers, bytes]:
        """(status, headers, content). The timeout holds for the whole answer, not for each piece of it."""
        deadline, content = time.monotonic() + self.timeout, b""
        with self._client.stream("POST", self.url, json=body) as response:
            for piece in response.iter_bytes():
                content += piece
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout(f"still sending after {self.timeout} s")
            return response.status_code, response.headers, content

    def _kept(self) -> str:
        return f"Every verdict so far is kept in {self.cache}: run again to go on from there."


class _Pace:
    """Lets threads go one by one, ``interval`` seconds apart, and later when any was told to wait."""

    def __init__(self, interval: float):
        self.interval, self.next, self.lock = interval, 0.0, threading.Lock()

    def wait(self) -> None:
        with self.lock:
            start = max(self.next, time.monotonic())
            self.next = start + self.interval
        time.sleep(max(0.0, start - time.monotonic()))

    def hold(self, seconds: float) -> None:
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)


def _check_address(url: str) -> None:
    try:
        sound = httpx2.URL(url).scheme in ("http", "https")
    except httpx2.InvalidURL:
        sound = False
    if not sound:
        raise JudgeError(f"{url} is no http(s) address; mend OPENAI_BASE_URL")


def _retry_after(value: str) -> float:
    """Seconds that a ``Retry-After`` header asks for, given as a number or as a date; 0 if it says nothing."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _data_url(image: Path) -> str:
    with Image.open(image) as opened:
        kind = opened.get_format_mimetype()
    return f"data:{kind};base64,{base64.b64encode(Path(image).read_bytes()).decode()}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write ``value`` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(temporary, path)
