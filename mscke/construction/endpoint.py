"""One chat endpoint, asked through OpenAI's SDK, at a bounded rate and as it takes it, until a reply is read."""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass

import httpx2
import openai

from mscke.construction.asked import TWINS, Fit
from mscke.construction.replies import TOO_LARGE, Unreadable, filtered, named_parameter, read_reply, shown

PAID = 3  # replies to one question, all unreadable, after which it has none
ROOM = 4096  # tokens, at least, for a reply that was cut off
PASSING = (408, 409, 429)  # and from 500 on: what the SDK tries again


class JudgeError(RuntimeError):
    """The endpoint gives no usable answer; the message says what it did and that the cache is kept."""


class Unanswered(JudgeError):
    """This question gets no usable reply; others may."""


@dataclass
class Endpoint:
    """Where chat completions are asked for. Safe to use from many threads; the key is ``OPENAI_API_KEY``."""

    base_url: str
    concurrency: int
    per_minute: float
    attempts: int
    timeout: float

    def __post_init__(self):
        url = _address(self.base_url)
        self.shown = str(url.copy_with(userinfo=b"", query=None))  # in messages and in what is kept: no password
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise JudgeError("OPENAI_API_KEY holds characters that no key has (a line break, say): set it anew")
        limits = httpx2.Limits(max_connections=self.concurrency)
        hooks = {"request": [_Pace(60 / self.per_minute)]}
        self._options = {} if key else {"headers": {"Authorization": openai.Omit()}}  # local endpoints need none
        self._client = openai.OpenAI(
            base_url=str(url.copy_with(query=None)), api_key=key or "none", max_retries=self.attempts - 1,
            timeout=self.timeout, default_query=dict(url.params),
            http_client=httpx2.Client(transport=_Whole(self.timeout, limits), event_hooks=hooks),
        )  # fmt: skip
        self._fit = Fit(self.shown)

    def complete(self, body: dict, schema: dict) -> tuple[dict | None, dict]:
        """(the reply that follows ``schema``, None if it is refused; the rest of the answer). Raises as ``Judge.ask``."""
        tries = min(PAID, self.attempts)
        for tried in range(1, tries + 1):
            try:
                return self._ask(body, schema)
            except Unreadable as error:  # it was paid for
                if tried == tries or error.cut:
                    said = f"no usable answer in {tried} attempts; the last one: {error}"
                    raise Unanswered(f"{self.shown} gave {said}") from error

    def _ask(self, body: dict, schema: dict) -> tuple[dict | None, dict]:
        """Asked again at once without what the endpoint does not take, and with more room if a reply was cut off."""
        room = 0
        while True:
            sent = self._fit(body, room)
            status, content = self._post(sent)
            said = f"HTTP {status}: {shown(content)}"
            if status in (400, 403, 422, 451) and filtered(content, sent):
                return None, {"said": said}
            if status in (400, 422) and (name := named_parameter(content, sent)):
                if name in TWINS and TOO_LARGE.search(said):
                    raise Unreadable(f"no room for a whole reply, {said}", cut=True)
                self._fit.learn(name, said)
                continue
            if status != 200:
                hint = "; see that OPENAI_API_KEY is the key of this endpoint" if status in (401, 403) else ""
                kind = Unanswered if status in (400, 413, 422) else JudgeError  # which is about all questions
                raise kind(f"{self.shown} turns the request down, {said}{hint}")
            try:
                reply, rest = read_reply(content, schema)
            except Unreadable as error:
                if room or not error.cut:
                    raise
                room = max(ROOM, 4 * max(error.tokens, *(sent.get(name) or 0 for name in TWINS)))
                continue
            self._fit.leave_room(room)
            without = sorted(set(body) - set(sent))
            return reply, rest | ({"without": without} if without else {})

    def _post(self, body: dict) -> tuple[int, bytes]:
        """(status, content), as it came: endpoints put into it what no schema of the SDK's has."""
        try:
            response = self._client.post("/chat/completions", body=body, cast_to=httpx2.Response, options=self._options)
            return response.status_code, response.content
        except openai.APIStatusError as error:
            if error.status_code not in PASSING and error.status_code < 500:
                return error.status_code, error.response.content
            last = f"HTTP {error.status_code}: {shown(error.response.content)}"
            if wait := error.response.headers.get("retry-after"):
                last += f", to wait for {wait} s"
        except openai.APIConnectionError as error:
            last = str(error.__cause__ or error)
        raise JudgeError(f"{self.shown} gave no usable answer in {self.attempts} attempts; the last one: {last}")


class _Pace:
    """Called before each request, it lets threads go one by one, ``interval`` seconds apart."""

    def __init__(self, interval: float):
        self.interval, self.next, self.lock = interval, 0.0, threading.Lock()

    def __call__(self, request: httpx2.Request | None = None) -> None:
        with self.lock:
            start = max(self.next, time.monotonic())
            self.next = start + self.interval
        time.sleep(max(0.0, start - time.monotonic()))


class _Whole(httpx2.HTTPTransport):
    """Its timeout holds for the whole answer, not for each piece of it: some endpoints send blanks while they think."""

    def __init__(self, seconds: float, limits: httpx2.Limits):
        super().__init__(limits=limits)
        self.seconds = seconds

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        deadline, response = time.monotonic() + self.seconds, super().handle_request(request)
        response.stream = _Until(response.stream, deadline)
        return response


@dataclass
class _Until(httpx2.SyncByteStream):
    """A stream that ends in a timeout after ``deadline``."""

    stream: httpx2.SyncByteStream
    deadline: float

    def __iter__(self):
        for piece in self.stream:
            if time.monotonic() > self.deadline:
                raise httpx2.ReadTimeout("the answer is not whole when its time is over")
            yield piece

    def close(self) -> None:
        self.stream.close()


def _address(url: str) -> httpx2.URL:
    try:
        if (found := httpx2.URL(url)).scheme in ("http", "https"):
            return found
    except httpx2.InvalidURL:
        pass
    shown = re.split("[?#]", url.rpartition("@")[2])[0]  # a password stands before this, a key may follow it
    raise JudgeError(f"{shown} is no http(s) address; mend OPENAI_BASE_URL")
