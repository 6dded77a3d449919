"""The judge's client against a real server: what goes over the wire, what is kept, what is survived."""

import base64
import hashlib
import json
from datetime import UTC, datetime
from email.utils import formatdate

import pytest
from judge_server import cut, drip, hang_up, says, sends, serve, silent, status, together
from PIL import Image

from mscke.benchmark import judge as judge_module
from mscke.benchmark.judge import Judge, JudgeError, Request, Task

COUNT = Task("count", "How long is the word?", {"n": {"type": "integer"}})
KEY = "sk-not-a-real-key"


def length(body):
    """The reply of a server that counts letters."""
    return {"n": len(json.loads(body["messages"][1]["content"][0]["text"])["word"])}


def words(n):
    return [Request(COUNT, {"word": "x" * i}) for i in range(1, n + 1)]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def judge(tmp_path):
    """A client that loses no time: ``judge(server)``."""

    def connect(server, **settings):
        quick = {"per_minute": 1e6, "backoff": 0.01, "timeout": 10, "attempts": 4} | settings
        return Judge(tmp_path / "verdicts", base_url=server.url, **quick)

    return connect


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.effect_noise((24, 16), 50).convert("RGB").save(path)
    return path


def test_what_goes_over_the_wire(judge, picture):
    with serve(length) as server:
        assert judge(server).ask(Request(COUNT, {"word": "naïve"}, picture)) == {"n": 5}
    (body,), (headers,) = server.bodies, server.headers
    assert headers["path"] == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "gpt-4o-mini"
    assert body["temperature"] == 0
    system, user = body["messages"]
    assert (system["role"], system["content"]) == ("system", COUNT.instructions)
    prefix, data = user["content"][1]["image_url"]["url"].split(",")
    assert prefix == "data:image/png;base64"
    assert base64.b64decode(data) == picture.read_bytes()
    form = body["response_format"]
    assert form["type"] == "json_schema"
    assert form["json_schema"]["strict"] is True
    schema = form["json_schema"]["schema"]
    assert schema["required"] == ["n"]
    assert schema["additionalProperties"] is False


def test_a_verdict_is_kept_with_its_prompt_and_model_but_without_key_or_pixels(judge, picture, tmp_path):
    with serve(length) as server:
        judge(server, model="some-model").ask(Request(COUNT, {"word": "owl"}, picture))
    (path,) = tmp_path.glob("verdicts/*/*.json")
    kept = json.loads(path.read_text())
    assert kept["reply"] == {"n": 3}
    assert kept["request"]["model"] == "some-model"
    assert kept["request"]["messages"][0]["content"] == COUNT.instructions
    assert kept["answer"]["model"] == "served-model"
    assert kept["answer"]["usage"] == {"total_tokens": 7}
    assert path.stem == hashlib.sha256(json.dumps(kept["request"]).encode()).hexdigest()
    assert KEY not in path.read_text()
    assert base64.b64encode(picture.read_bytes()).decode()[:40] not in path.read_text()


def test_a_rerun_costs_nothing_and_other_content_is_asked(judge, picture, monkeypatch):
    requests = [*words(5), Request(COUNT, {"word": "owl"}, picture)]
    with serve(length) as server:
        first = judge(server).ask_all(requests)
        assert len(server.bodies) == 6
        monkeypatch.delenv("OPENAI_API_KEY")
        assert judge(server).ask_all(requests) == first
        assert len(server.bodies) == 6
        judge(server, model="another").ask(requests[0])
        judge(server, options={}).ask(requests[0])
        judge(server).ask(Request(Task("count", "Otherwise put", COUNT.properties), requests[0].facts))
        Image.new("RGB", (8, 8)).save(picture)
        judge(server).ask(requests[-1])
        assert len(server.bodies) == 10
    assert judge(server).ask_all(requests[:5]) == first[:5]  # nobody is there any more
    assert "Authorization" not in server.headers[-1]


SHORT = (
    3  # seconds: the time-out where it is what is tested; an answer that comes at once has so long to come
)
SLOW = ("silent", "drip")
FAULTS = {
    "429": status(429),
    "500": status(500),
    "503 with a page": status(503, "<html>"),
    "malformed JSON": sends('{"choices": [{"mess'),
    "JSON of another kind": sends("[1, 2]"),
    "no choices": sends('{"choices": []}'),
    "no message": sends(json.dumps({"choices": ["?"]})),
    "prose": says("I count five letters."),
    "reply cut": says('{"n": 1'),
    "no content": says(None),
    "schema violated: type": says('{"n": "one"}'),
    "schema violated: missing": says("{}"),
    "schema violated: more": says('{"n": 1, "why": "so"}'),
    "not UTF-8": lambda h: h.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe") or True,
    "not gzip": lambda h: h.reply("plain", Content_Encoding="gzip"),
    "silent": silent,
    "drip": drip,
    "cut connection": cut,
    "hang up": hang_up,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_survives(fault, judge):
    with serve(length, [FAULTS[fault]]) as server:
        assert judge(server, timeout=SHORT if fault in SLOW else 60).ask(Request(COUNT, {"word": "owl"})) == {
            "n": 3
        }
    assert len(server.bodies) == 2


@pytest.mark.parametrize("fault", ["500", "prose", "schema violated: type", *SLOW, "cut connection"])
def test_a_judge_that_never_answers_is_a_clear_error_and_the_rest_is_kept(fault, judge, tmp_path):
    requests = words(4)
    with serve(length, [None, None] + [FAULTS[fault]] * 20) as server:
        patient = SHORT if fault in SLOW else 60
        with pytest.raises(JudgeError, match=r"no usable answer in 2 attempts.*run again to go on") as error:
            judge(server, attempts=2, concurrency=1, timeout=patient).ask_all(requests)
        assert server.url in str(error.value)
        assert KEY not in str(error.value)
        assert len(server.bodies) == 4  # two answered, one tried twice, the last never begun
        server.faults.clear()
        assert judge(server).ask_all(requests) == [{"n": n} for n in (1, 2, 3, 4)]
        assert len(server.bodies) == 6
    assert not list(tmp_path.rglob("*.tmp"))


def test_nobody_listens(judge):
    with serve(length) as server:
        pass
    with pytest.raises(JudgeError, match="4 attempts"):
        judge(server).ask(words(1)[0])


@pytest.mark.parametrize("code", [400, 401, 403, 404, 307])
def test_what_will_not_get_better_is_not_tried_again(code, judge):
    with serve(length, [status(code, "the reason")] * 3) as server:
        with pytest.raises(JudgeError, match=f"HTTP {code}: the reason") as error:
            judge(server).ask(words(1)[0])
        assert len(server.bodies) == 1
    assert ("OPENAI_API_KEY" in str(error.value)) == (code in (401, 403))


@pytest.mark.parametrize("address", ["localhost:8000/v1", "", "ftp://host/v1", "http://host:port/v1"])
def test_an_address_that_is_none(address, tmp_path, monkeypatch):
    if not address:  # an empty variable means that it is not set
        monkeypatch.setenv("OPENAI_BASE_URL", address)
        assert Judge(tmp_path).url == "https://api.openai.com/v1/chat/completions"
        return
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(JudgeError, match="OPENAI_BASE_URL"):
        Judge(tmp_path)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for who sleeps by it."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    monkeypatch.setattr(judge_module, "time", clock := Clock())
    return clock


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(form, judge, monkeypatch):
    held = []
    monkeypatch.setattr(judge_module._Pace, "hold", lambda self, seconds: held.append(seconds))
    value = "250" if form == "seconds" else formatdate(datetime.now(UTC).timestamp() + 250, usegmt=True)
    with serve(length, [status(429, Retry_After=value)]) as server:
        assert judge(server).ask(words(1)[0]) == {"n": 1}
    assert held == [250.0] if form == "seconds" else 0 < held[0] <= 250


def test_one_told_to_wait_holds_them_all(clock):
    pace = judge_module._Pace(0.0)
    pace.wait()
    pace.hold(2.0)
    pace.wait()
    assert clock.now == 102.0
    pace.wait()
    assert clock.now == 102.0


def test_an_endless_retry_after_is_an_error(judge):
    with serve(length, [status(429, Retry_After="86400")]) as server:
        with pytest.raises(JudgeError, match="86400 s"):
            judge(server).ask(words(1)[0])
        assert len(server.bodies) == 1


def test_a_nonsensical_retry_after_is_ignored(judge):
    with serve(length, [status(429, Retry_After=v) for v in ("soon", "-5", "nan")]) as server:
        assert judge(server).ask(words(1)[0]) == {"n": 1}


def test_a_refusal_is_an_answer(judge):
    with serve(length, [says(None, refusal="I'd rather not")]) as server:
        assert judge(server).ask(words(1)[0]) is None
        assert judge(server).ask(words(1)[0]) is None
        assert len(server.bodies) == 1


def test_the_same_content_is_asked_once_however_many_ask(judge):
    with serve(length) as server:
        assert judge(server).ask_all(words(1) * 8) == [{"n": 1}] * 8
        assert len(server.bodies) == 1


def test_a_damaged_verdict_is_asked_again(judge, tmp_path):
    with serve(length) as server:
        judge(server).ask(words(1)[0])
        (path,) = tmp_path.glob("verdicts/*/*.json")
        path.write_bytes(path.read_bytes()[:50])
        assert judge(server).ask(words(1)[0]) == {"n": 1}
        assert judge(server).ask(words(1)[0]) == {"n": 1}
        assert len(server.bodies) == 2


def test_concurrent_but_bounded_and_in_order(judge):
    with serve(length, [together(4)] * 4) as server:
        assert judge(server, concurrency=4).ask_all(words(24)) == [{"n": n} for n in range(1, 25)]
    assert server.most_active == 4


def test_the_rate_is_limited(clock):
    pace = judge_module._Pace(0.5)
    for _ in range(8):
        pace.wait()
    assert clock.now == 100 + 7 * 0.5
    clock.now += 60  # who was idle may not catch up
    pace.wait()
    pace.wait()
    assert clock.now == 100 + 7 * 0.5 + 60.5
