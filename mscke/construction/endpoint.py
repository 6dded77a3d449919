"""One chat endpoint: a request goes out at a bounded rate, fitted to what the endpoint takes, until a reply is read."""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2
from tenacity import Retrying, retry_if_exception_type, wait_random_exponential

from mscke.construction.asked import TWINS, Fit
from mscke.construction.replies import Unreadable, filtered, named_parameter, read_reply, shown

LONGEST_WAIT = 300  # seconds; an endpoint that asks for more (a day's quota, say) is an error
PAID = 3  # replies to one question, all unreadable, after which it has none
ROOM = 4096  # tokens, at least, for a reply that was cut off
TOO_LARGE = re.compile("too (large|big|long)|exceed|at most|maximum|less than", re.IGNORECASE)


class JudgeError(RuntimeError):
    """The endpoint gives no usable answer; the message says what it did and that the cache is kept."""


class Unanswered(JudgeError):
    """This question gets no usable reply; others may."""


class _TryAgain(Exception):
    """This attempt failed in a way that another may not."""


@dataclass
class Endpoint:
    """Where chat completions are asked for. Safe to use from many threads; the key is ``OPENAI_API_KEY``."""

    base_url: str
    concurrency: int
    per_minute: float
    attempts: int
    timeout: float
    backoff: float

    def __post_init__(self):
        url = _address(self.base_url)
        self.url = url.copy_with(path=url.path.rstrip("/") + "/chat/completions")
        self.shown = str(url.copy_with(userinfo=b"", query=None))  # in messages and in what is kept: no password
        key = os.environ.get("OPENAI_API_KEY", "").strip()  # local endpoints need none
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise JudgeError("OPENAI_API_KEY holds characters that no key has (a line break, say): set it anew")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_connections=self.concurrency)
        self._client = httpx2.Client(headers=headers, timeout=self.timeout, limits=limits)
        self._pace = _Pace(60 / self.per_minute)
        self._fit = Fit(self.shown)

    def complete(self, body: dict, schema: dict) -> tuple[dict | None, dict]:
        """(the reply that follows ``schema``, None if it is refused; the rest of the answer).

        Raises :class:`Unanswered` when this ``body`` gets no usable reply, :class:`JudgeError` when none does.
        """
        unread = []

        def attempt():
            try:
                return self._attempt(body, schema)
            except Unreadable as error:  # it was paid for
                unread.append(error)
                raise

        def enough(state):
            in_vain = len(unread) >= PAID or any(error.cut for error in unread)
            return in_vain or state.attempt_number >= self.attempts

        attempts = Retrying(
            stop=enough,
            wait=wait_random_exponential(self.backoff, max=60),
            retry=retry_if_exception_type((_TryAgain, Unreadable, httpx2.RequestError)),
            reraise=True,
        )
        try:
            return attempts(attempt)
        except (_TryAgain, Unreadable, httpx2.RequestError) as error:
            last, tried = str(error) or type(error).__name__, attempts.statistics["attempt_number"]
            kind = Unanswered if isinstance(error, Unreadable) else JudgeError
            raise kind(f"{self.shown} gave no usable answer in {tried} attempts; the last one: {last}") from error

    def _attempt(self, body: dict, schema: dict) -> tuple[dict | None, dict]:
        """One try; asked again at once without what the endpoint does not take, and with more room if cut off."""
        room = 0
        while True:
            self._pace.wait()
            sent = self._fit(body, room)
            status, headers, content = self._post(sent)
            said = f"HTTP {status}: {shown(content)}"
            if status in (408, 409, 425, 429) or status >= 500:
                if (seconds := _retry_after(headers.get("retry-after", ""))) > LONGEST_WAIT:
                    raise JudgeError(f"{self.shown} asks to wait for {seconds:.0f} s ({said})")
                self._pace.hold(seconds)
                raise _TryAgain(said)
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
                found = read_reply(content, schema)
            except Unreadable as error:
                if room or not error.cut:
                    raise
                room = max(ROOM, 4 * max(error.tokens, *(sent.get(name, 0) for name in TWINS)))
                continue
            self._fit.leave_room(room)
            reply, rest = found
            without = sorted(set(body) - set(sent))
            return reply, rest | ({"without": without} if without else {})

    def _post(self, body: dict) -> tuple[int, httpx2.Headers, bytes]:
        """(status, headers, content). The timeout holds for the whole answer, not for each piece of it."""
        deadline, content = time.monotonic() + self.timeout, b""
        with self._client.stream("POST", self.url, json=body) as response:
            for piece in response.iter_bytes():
                content += piece
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout(f"still sending after {self.timeout} s")
            return response.status_code, response.headers, content


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


def _address(url: str) -> httpx2.URL:
    try:
        if (found := httpx2.URL(url)).scheme in ("http", "https"):
            return found
    except httpx2.InvalidURL:
        pass
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
