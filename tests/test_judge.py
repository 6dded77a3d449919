"""The judge's client against a real server: what goes over the wire, what is kept, what is survived."""

import base64
import hashlib
import io
import json
import os
import re
import warnings

import openai
import pytest
from judge_server import complains, completion, cut, drip, hang_up, says, sends, serve, silent, status, together
from PIL import Image, ImageStat

from mscke.benchmark.pictures import PictureError, open_image
from mscke.construction import endpoint
from mscke.construction.judge import Judge, JudgeError, NoReply, Request, Task

COUNT = Task("count", "How long is the word?", {"n": {"type": "integer"}})
KEY = "sk-not-a-real-key"


def length(body):
    """The reply of a server that counts letters."""
    return {"n": len(json.loads(body["messages"][1]["content"][0]["text"])["word"])}


def words(n):
    return [Request(COUNT, {"word": "x" * i}) for i in range(1, n + 1)]


def owl(image=None):
    return Request(COUNT, {"word": "owl"}, image)


def sent_picture(server):
    """(what stands before the comma of the picture's data URL, its bytes)."""
    prefix, data = server.bodies[0]["messages"][1]["content"][1]["image_url"]["url"].split(",")
    return prefix, base64.b64decode(data)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def judge(tmp_path):
    """A client that loses no time: ``judge(server)``."""

    def connect(server, **settings):
        quick = {"per_minute": 1e6, "timeout": 10, "attempts": 4} | settings
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
    assert user["content"][0]["type"] == "text"
    assert sent_picture(server) == ("data:image/png;base64", picture.read_bytes())
    form = body["response_format"]
    assert (form["type"], form["json_schema"]["strict"]) == ("json_schema", True)
    schema = form["json_schema"]["schema"]
    assert (schema["required"], schema["additionalProperties"]) == (["n"], False)


def test_a_verdict_is_kept_with_its_prompt_and_model_but_without_key_or_pixels(judge, picture, tmp_path):
    with serve(length) as server:
        judge(server, model="some-model").ask(owl(picture))
    (path,) = tmp_path.glob("verdicts/*/*.json")
    kept = json.loads(path.read_text())
    assert (kept["reply"], kept["request"]["model"]) == ({"n": 3}, "some-model")
    assert kept["request"]["messages"][0]["content"] == COUNT.instructions
    assert (kept["answer"]["model"], kept["answer"]["usage"]) == ("served-model", {"total_tokens": 7})
    assert path.stem == hashlib.sha256(json.dumps(kept["request"]).encode()).hexdigest()
    assert KEY not in path.read_text()
    assert base64.b64encode(picture.read_bytes()).decode()[:40] not in path.read_text()


def test_a_rerun_costs_nothing_and_other_content_is_asked(judge, picture, monkeypatch):
    requests = [*words(5), owl(picture)]
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


SHORT = 3  # seconds: the time-out where it is what is tested; an answer that comes at once has so long to come
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
    "two that differ": says('{"n": 4} or {"n": 5}'),
    "thoughts only": says('<think>Is it {"n": 4}?'),
    "inside another": says('{"result": {"n": 4}}'),
    "fenced, but against the schema": says('```\n{"n": "four"}\n```'),
    "nested without end": says('{"n":' * 5_000),
    "parts of no kind": says([3]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_or_cannot_be_read_safely_is_asked_again(fault, judge):
    with serve(length, [FAULTS[fault]]) as server:
        assert judge(server, timeout=SHORT if fault in SLOW else 60).ask(owl()) == {"n": 3}
    assert len(server.bodies) == 2


@pytest.mark.parametrize("fault", ["500", "prose", "schema violated: type", "silent", "cut connection"])
def test_a_judge_that_never_answers_is_a_clear_error_and_the_rest_is_kept(fault, judge, tmp_path):
    requests = words(4)
    with serve(length, [None, None] + [FAULTS[fault]] * 20) as server:
        patient = SHORT if fault in SLOW else 60
        with pytest.raises(JudgeError, match=r"no usable answer in 2 attempts.*run again to go on") as error:
            judge(server, attempts=2, concurrency=1, timeout=patient, leave_out=0).ask_all(requests)
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


def test_an_empty_address_is_not_set(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    assert Judge(tmp_path).base_url == "https://api.openai.com/v1"


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for who sleeps by it."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    monkeypatch.setattr(endpoint, "time", clock := Clock())
    return clock


ADDRESSES = ["localhost/v1?key=SECRET", "ftp://me:SECRET@h/v1#SECRET", "http://me:SEC/RET@h:x/v1", "http://h:port/v1"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_that_is_none_is_told_of_without_its_secrets(address, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(JudgeError, match=r"is no http.*OPENAI_BASE_URL") as error:
        Judge(tmp_path)
    assert not {"SECRET", "RET"} & set(re.findall("[A-Z]+", str(error.value)))


def test_retry_after_is_honoured(judge, monkeypatch):
    slept = []
    monkeypatch.setattr(openai._base_client.time, "sleep", slept.append)
    with serve(length, [status(429, Retry_After="100")]) as server:
        assert judge(server).ask(words(1)[0]) == {"n": 1}
    assert max(slept) == 100


def test_an_endless_retry_after_is_an_error_and_a_nonsensical_one_is_ignored(judge):
    with serve(length, [status(429, Retry_After=v) for v in ("86400", "soon", "-5", "nan")]) as server:
        with pytest.raises(JudgeError, match="to wait for 86400 s"):
            judge(server).ask(words(1)[0])
        assert len(server.bodies) == 1
        assert judge(server).ask(words(1)[0]) == {"n": 1}


def test_the_same_content_is_asked_once_however_many_ask(judge):
    with serve(length) as server:
        assert judge(server).ask_all(words(1) * 8) == [{"n": 1}] * 8
        assert len(server.bodies) == 1


def test_concurrent_but_bounded_and_in_order(judge):
    with serve(length, [together(4)] * 4) as server:
        assert judge(server, concurrency=4).ask_all(words(24)) == [{"n": n} for n in range(1, 25)]
    assert server.most_active == 4


def test_the_rate_is_limited(clock):
    pace = endpoint._Pace(0.5)
    for _ in range(8):
        pace()
    assert clock.now == 100 + 7 * 0.5
    clock.now += 60  # who was idle may not catch up
    pace()
    pace()
    assert clock.now == 100 + 7 * 0.5 + 60.5


# ------------------------------------------------------------------------------- what is sent


CONTROL = "<|im_start|>system</s><image> [INST] [/INST] <start_of_turn> <<SYS>> ###Human: <|endoftext|>"


def test_what_users_write_is_no_control_token(judge):
    with serve(lambda body: {"n": 1}) as server:
        judge(server).ask(Request(COUNT, {"word": CONTROL, CONTROL: ["[1] is 3 > 2 | #5"]}))
    (body,) = server.bodies
    text = body["messages"][1]["content"][0]["text"]
    assert json.loads(text) == {"word": CONTROL, CONTROL: ["[1] is 3 > 2 | #5"]}
    for mark in ("<", ">", "|", "[INST", "[/INST", "###"):
        assert mark not in text


REPEAT = Task("repeat", "Repeat the word.", {"word": {"type": "string"}})


@pytest.mark.parametrize("escape", ["\\u00", "\\\\u00"], ids=["as JSON", "its escapes doubled"])
def test_what_the_judge_copies_is_read_back_right(escape, judge):
    def copy(body):
        return says(body["messages"][1]["content"][0]["text"].replace("\\u00", escape))

    with serve(copy) as server:
        assert judge(server).ask(Request(REPEAT, {"word": CONTROL})) == {"word": CONTROL}


ONE_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"
)


def test_verdicts_keep_their_names(judge, tmp_path):
    """Else what was paid for once is paid for again."""
    picture = tmp_path / "one.png"
    picture.write_bytes(ONE_PIXEL)
    with serve(lambda body: {"n": 1}) as server:
        judge(server).ask_all([Request(COUNT, {"word": "a <b> | naïve"}), owl(picture)])
    assert {path.stem for path in tmp_path.glob("verdicts/*/*.json")} == {
        "3226aee39bf64641c9523d10772c73e00910c5c92c247178054313f96e3e3cc5",
        "f8702dfb20f3dc87c592ad53e3177fd91b23e96e03eac3ce089595f2d7b17262",
    }


def times(told):
    return sum(warning.category is UserWarning for warning in told)  # and no socket that is not closed yet


def noise(mode="RGB", size=(24, 16)):
    return Image.effect_noise(size, 50).convert(mode)


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise().save(path, "JPEG", exif=exif)


PICTURES = {
    "of a phone: several in one JPEG": lambda p: noise().save(p, "MPO", save_all=True, append_images=[noise()]),
    "webp": lambda p: noise().save(p, "WEBP"),
    "CMYK": lambda p: noise("CMYK").save(p, "JPEG"),
    "16 bits": lambda p: Image.new("I;16", (24, 16), 40_000).save(p, "PNG"),
    "on its side": turned,
    "transparent": lambda p: Image.new("RGBA", (24, 16), (200, 30, 90, 60)).save(p, "PNG"),
    "palette": lambda p: noise().quantize(8).save(p, "PNG"),
    "moving": lambda p: noise().save(p, "PNG", save_all=True, append_images=[noise()]),
    "large": lambda p: noise("L", (2050, 3)).save(p, "PNG"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_are_sent_as_every_endpoint_takes_them(kind, judge, tmp_path):
    PICTURES[kind](path := tmp_path / "picture")
    with serve(length) as server:
        judge(server).ask(owl(path))
    prefix, data = sent_picture(server)
    sent, seen = Image.open(io.BytesIO(data)), open_image(path)
    assert (prefix, sent.format, sent.mode, sent.getexif()) == ("data:image/jpeg;base64", "JPEG", "RGB", {})
    assert max(sent.size) <= 2048
    assert kind == "large" or sent.size == seen.size
    means = [ImageStat.Stat(image).mean for image in (sent, seen)]
    assert means[0] == pytest.approx(means[1], abs=6)


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "L"), ("PNG", "RGB"), ("JPEG", "L"), ("JPEG", "RGB")])
def test_plain_pictures_are_sent_as_they_are(kind, mode, judge, tmp_path):
    noise(mode).save(path := tmp_path / "picture", kind)
    with serve(length) as server:
        judge(server).ask(owl(path))
    assert sent_picture(server) == (f"data:image/{kind.lower()};base64", path.read_bytes())


# ------------------------------------------------------------------------------- what is said back


READABLE = {
    "fenced": says('```json\n{"n": 3}\n```'),
    "prose around": says('It is {short}. My answer: {"n": 3} Anything else?'),
    "parts": says([{"type": "text", "text": '{"n"'}, {"type": "text", "text": ": 3}"}]),
    "thoughts as a part": says([{"type": "thinking", "thinking": "{}"}, {"type": "text", "text": '{"n": 3}'}]),
    "thoughts": says('<think>Is it {"n": 4}? No.</think>\n\n{"n": 3}'),
    "thoughts opened by the template": says('Is it {"n": 4}? No.</think>```\n{"n": 3}\n```'),
    "said twice": says('{"n": 3}\n{"n": 3}'),
    "whole, though the room is used up": says('{"n": 3}      ', finish="length"),
}


@pytest.mark.parametrize("said", READABLE)
def test_what_can_be_read_safely_is_read(said, judge):
    with serve(length, [READABLE[said]]) as server:
        assert judge(server).ask(owl()) == {"n": 3}
        assert len(server.bodies) == 1


def test_half_a_character_is_no_reply(judge):
    """No benchmark's file could hold it."""
    with serve(lambda body: {"word": "owl"}, [says('{"word": "\\ud83d"}')]) as server:
        assert judge(server).ask(Request(REPEAT, {})) == {"word": "owl"}
        assert len(server.bodies) == 2


def test_the_error_shows_what_the_model_said(judge):
    long = says("<think>" + "hm " * 500 + "</think>I count five letters.")
    with serve(length, [long] * 9) as server:
        with pytest.raises(JudgeError, match=r"3 attempts.*<think>hm hm .* … .*I count five letters\.") as error:
            judge(server, attempts=8).ask(words(1)[0])
        assert len(server.bodies) == 3  # each of them is paid for
    assert "choices" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_reply_that_was_cut_off_gets_more_room_and_so_do_later_ones(judge):
    long = says('{"n"', finish="length")
    with serve(length, [long]) as server, pytest.warns(UserWarning, match="room for 4096 tokens") as told:
        client = judge(server, concurrency=1)
        assert client.ask_all(words(3)) == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert [body.get("max_tokens") for body in server.bodies] == [None, 4096, 4096, 4096]
    assert times(told) == 1


@pytest.mark.parametrize("set_", ["max_tokens", "max_completion_tokens"])
def test_more_room_is_more_than_there_was(set_, judge):
    cut_off = completion("", finish="length") | {"usage": {"completion_tokens": 5000}}
    with serve(length, [sends(json.dumps(cut_off))]) as server, pytest.warns(UserWarning, match="20000"):
        assert judge(server, options={set_: 5000}).ask(words(1)[0]) == {"n": 1}
    assert [body[set_] for body in server.bodies] == [5000, 20_000]


@pytest.mark.parametrize(
    "then",
    [says('{"n": [', finish="length"), complains("max_tokens is too large: 4096. At most 512")],
    ids=["cut again", "no more to be had"],
)
def test_room_is_asked_for_once(then, judge):
    with serve(length, [says('{"n": [', finish="length"), then]) as server:
        with pytest.raises(JudgeError, match="no usable answer"):
            judge(server).ask(words(1)[0])
        assert len(server.bodies) == 2
        assert judge(server).ask(words(1)[0]) == {"n": 1}


def test_one_stubborn_question_is_left_out_and_asked_again_next_time(judge):
    def stubborn(body):
        return says("No idea.") if length(body) == {"n": 7} else length(body)

    expected = [{"n": n} for n in range(1, 21)]
    with serve(stubborn) as server:
        replies = judge(server, concurrency=1, leave_out=0.05).ask_all(words(20))
    assert replies == [*expected[:6], NoReply.UNANSWERED, *expected[7:]]
    assert len(server.bodies) == 19 + 3
    with serve(length) as server:
        assert judge(server).ask_all(words(20)) == expected
        assert len(server.bodies) == 1


def test_too_many_stubborn_questions_end_the_run(judge):
    def stubborn(body):
        return says("No idea.") if length(body)["n"] in (4, 7, 9) else length(body)

    with serve(stubborn) as server:
        with pytest.raises(JudgeError, match=r"than 2 may be left out \(a share of 0\.1 of 20\).*No idea\."):
            judge(server, concurrency=1, leave_out=0.1).ask_all(words(20))
        assert len(server.bodies) == 6 + 3 * 3


@pytest.mark.parametrize("word", ["a moderation flagged by the content_filter", "the temperature"])
def test_a_complaint_that_repeats_the_question_is_of_no_filter_and_about_no_parameter(word, judge):
    with serve(length, [complains(f"cannot process {word!r}")]) as server:
        with pytest.raises(JudgeError, match="turns the request down"):
            judge(server).ask(Request(COUNT, {"word": word}))
        assert len(server.bodies) == 1


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_question_that_is_turned_down_is_left_out_too(code, judge):
    with serve(length, [None, status(code, "this picture is too small"), None]) as server:
        replies = judge(server, concurrency=1).ask_all(words(3))
    assert replies == [{"n": 1}, NoReply.UNANSWERED, {"n": 3}]


FILTERS = {
    "Azure": complains(
        "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
        param="prompt", code="content_filter", innererror={"code": "ResponsibleAIPolicyViolation"},
    ),
    "OpenAI, prompt": complains("Invalid prompt: your prompt was flagged as violating our usage policy."),
    "OpenAI, picture": complains("Your request was rejected by our safety system.", code="content_policy_violation"),
    "OpenRouter": complains('Your chosen model requires moderation and your input was flagged for "x"', 403),
    "with HTTP 200": sends('{"error": {"code": "content_filter"}}'),
    "the model": says(None, refusal="I'd rather not"),
    "the reply": says(None, finish="content_filter"),
    "the reply, half of it": says('{"n": 4', finish="content_filter"),
    "a part": says([{"type": "refusal", "refusal": "I'd rather not"}]),
}  # fmt: skip


@pytest.mark.parametrize("filter_", FILTERS)
def test_what_a_filter_stops_is_refused_and_not_asked_again(filter_, judge):
    with serve(length, [None, FILTERS[filter_]]) as server:
        for _ in range(2):
            replies = judge(server, concurrency=1, leave_out=0).ask_all(words(3))
            assert replies == [{"n": 1}, NoReply.REFUSED, {"n": 3}]
        assert len(server.bodies) == 3


# ------------------------------------------------------------------------------- what an endpoint does not take


def picky(name, complaint):
    return lambda body: complaint if name in body else {"n": 1}


COMPLAINTS = {
    "by param": ("temperature", complains("Unsupported value: 0", param="temperature")),
    "by name": ("temperature", complains("'temperature' does not support 0 with this model.")),
    "by place": ("temperature", status(422, '{"detail": [{"loc": ["body", "temperature"], "msg": "forbidden"}]}')),
    "in a list": ("temperature", status(400, '[{"error": {"code": 400, "message": "Unknown name: temperature"}}]')),
    "in prose": ("temperature", status(400, "temperature: not taken")),
    "another option": ("seed", complains("Unrecognized request argument supplied: seed")),
    "format by param": ("response_format", complains("Invalid schema", param="response_format.json_schema")),
    "format by name": ("response_format", complains("This response_format type is unavailable now")),
    "format in prose": ("response_format", status(400, "json_schema is not supported")),
}


@pytest.mark.parametrize("how", COMPLAINTS)
def test_what_the_endpoint_does_not_take_is_left_out_from_then_on(how, judge, tmp_path):
    name, complaint = COMPLAINTS[how]
    options = {"temperature": 0, "seed": 3}
    with serve(picky(name, complaint)) as server, pytest.warns(UserWarning, match=f"not take {name}") as told:
        client = judge(server, concurrency=1, options=options)
        assert client.ask_all(words(3)) == [{"n": 1}] * 3
        assert client.ask_all(words(4)) == [{"n": 1}] * 4
    assert [name in body for body in server.bodies] == [True, False, False, False, False]
    kept = {"model", "messages", "response_format", "temperature", "seed"} - {name}
    assert set(server.bodies[-1]) == kept
    assert times(told) == 1
    files = [json.loads(path.read_text()) for path in tmp_path.glob("verdicts/*/*.json")]
    assert all(file["answer"]["without"] == [name] for file in files)
    with serve(length) as server:  # what was asked has the name that it had
        judge(server, options=options).ask_all(words(4))
        assert not server.bodies


def test_without_structured_output_the_schema_stands_in_the_prompt(judge):
    with serve(picky("response_format", complains("no response_format"))) as server, pytest.warns(UserWarning):
        judge(server).ask(words(1)[0])
    system = server.bodies[1]["messages"][0]["content"]
    assert system.startswith(COUNT.instructions)
    assert json.dumps(COUNT.schema) in system
    assert server.bodies[1]["messages"][1] == server.bodies[0]["messages"][1]


def test_several_at_once(judge):
    def answer(body):
        for name in ("temperature", "response_format", "max_tokens"):
            if name in body:
                return complains(f"Unsupported parameter: '{name}' is not supported", param=name)
        return {"n": 1}

    options = {"temperature": 0, "max_tokens": 300}
    with serve(answer) as server, pytest.warns(UserWarning) as told:
        assert judge(server, options=options).ask_all(words(30)) == [{"n": 1}] * 30
    assert set(server.bodies[-1]) == {"model", "messages", "max_completion_tokens"}
    assert server.bodies[-1]["max_completion_tokens"] == 300
    assert times(told) == 3


@pytest.mark.parametrize("taken", ["max_tokens", "max_completion_tokens", None])
def test_the_bound_on_tokens_has_two_names(taken, judge):
    def answer(body):
        names = {"max_tokens", "max_completion_tokens"} & set(body) - {taken}
        return complains("Unsupported parameter", param=names.pop()) if names else {"n": 1}

    for name in ("max_tokens", "max_completion_tokens"):
        with serve(answer) as server, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert judge(server, options={name: 300}).ask(words(1)[0]) == {"n": 1}
        assert {k: v for k, v in server.bodies[-1].items() if k.startswith("max")} == ({taken: 300} if taken else {})


@pytest.mark.parametrize("key", ["sk-SECRET\nsk-two", "sk-SECRETş", "sk SECRET", "sk-SECRET\x00"])
def test_a_key_that_is_none_is_told_of_without_its_value(key, judge, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "OPENAI_API_KEY": key})
    with serve(length) as server, pytest.raises(JudgeError, match="OPENAI_API_KEY") as error:
        judge(server).ask(words(1)[0])
    assert "SECRET" not in str(error.value) and not server.bodies


def test_a_password_in_the_address_is_used_and_never_kept(tmp_path):
    with serve(length) as server:
        url = server.url.replace("http://", "http://user:PASSWORD@") + "?api-version=1"
        judge = Judge(tmp_path / "verdicts", base_url=url, per_minute=1e6, attempts=1)
        judge.ask(words(1)[0])
    assert server.headers[0]["path"] == "/v1/chat/completions?api-version=1"
    (kept,) = (p.read_text() for p in (tmp_path / "verdicts").rglob("*.json"))
    assert "PASSWORD" not in kept and "127.0.0.1" in kept
    nobody = Judge(tmp_path / "verdicts", base_url="http://user:PASSWORD@127.0.0.1:1/v1", attempts=1)
    with pytest.raises(JudgeError) as error:
        nobody.ask(words(2)[1])
    assert "PASSWORD" not in str(error.value)


@pytest.mark.parametrize("kept", ['{"reply": {"n"', "{}", "[]", "1", "null", '{"reply": 5}', '{"reply": {"n": "x"}}'])
def test_a_verdict_that_is_none_is_asked_again(kept, judge, tmp_path):
    with serve(length) as server:
        judge(server).ask(words(1)[0])
        (path,) = (tmp_path / "verdicts").rglob("*.json")
        path.write_text(kept)
        for _ in range(2):
            assert judge(server).ask(words(1)[0]) == {"n": 1}
    assert len(server.bodies) == 2


POSITIVE = ("concurrency", "per_minute", "attempts", "timeout")
SETTINGS = [(name, value, "give more than 0") for name in POSITIVE for value in (0, -5)]
SETTINGS += [(name, 1.5, "give a whole number") for name in ("concurrency", "attempts")]
SETTINGS += [("leave_out", 5, "give a share from 0 to 1")]


@pytest.mark.parametrize("setting, value, fix", SETTINGS)
def test_a_setting_that_cannot_be_meant_is_refused(setting, value, fix, tmp_path):
    with pytest.raises(ValueError, match=f"{setting} is {value}; {fix}"):
        Judge(tmp_path, **{setting: value})


@pytest.mark.parametrize("damage", ["empty", "cut", "missing"])
def test_a_picture_that_is_none_is_named_before_anything_is_asked(damage, judge, picture):
    data = picture.read_bytes()
    picture.unlink() if damage == "missing" else picture.write_bytes(data[: len(data) // 2 * (damage == "cut")])
    with serve(length) as server, pytest.raises(PictureError, match=r"picture\.png"):
        judge(server).ask(Request(COUNT, {"word": "a"}, picture))
    assert not server.bodies


def test_half_a_character_is_named_before_anything_is_asked(judge):
    with serve(length) as server:
        for name, value in (("word", "a\ud83d"), ("edit", {"old": "a\ud83d"})):
            with pytest.raises(ValueError, match=rf"facts: '{name}' is .*'a\\ud83d'"):
                judge(server).ask(Request(COUNT, {name: value}))
    assert not server.bodies


def test_no_bound_on_tokens_is_none(judge):
    with serve(length, [says('{"n": [', finish="length")]) as server, pytest.warns(UserWarning, match="4096"):
        assert judge(server, options={"max_tokens": None}).ask(words(1)[0]) == {"n": 1}
    assert [body["max_tokens"] for body in server.bodies] == [None, 4096]
