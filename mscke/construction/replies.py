"""What a judge's endpoint says back, read safely: replies, refusals, complaints.

A reply is read as it stands, or else found in what models put around one: fences, prose, parts, thoughts. Either way
it has to follow the schema, and where two that differ are found neither is taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import jsonschema

SHOWN = 300  # characters of what was said that an error repeats
CUT = ("length", "max_tokens")  # finish reasons: the room was too small
REFUSED = ("content_filter", "refusal", "safety")
TOO_LARGE = re.compile("too (large|big|long)|exceed|at most|maximum|less than", re.IGNORECASE)
_FILTER = re.compile(
    r"content.?filter|content.?policy|content management policy|responsible.?ai|moderation|safety system"
    r"|flagged|data_inspection|prohibited.?content",
    re.IGNORECASE,
)
_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>.*?(</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_THOUGHTS_END = re.compile(r"</(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_ESCAPE = re.compile(r"\\u00(3c|3e|7c|23|5b)", re.IGNORECASE)  # what facts_text escapes
_FORMAT = r"response.?format|response.?schema|json.?schema|structured.?output|guided.?json|grammar"


class Unreadable(Exception):
    """A reply that cannot be read; the message shows what the model said.

    ``cut``: it had no room for more than ``tokens`` (0 where it does not say how many).
    """

    def __init__(self, message: str, cut: bool = False, tokens: int = 0):
        super().__init__(message)
        self.cut, self.tokens = cut, tokens


def read_reply(content: bytes, schema: dict) -> tuple[dict | None, dict]:
    """(the reply, the rest of the chat completion in ``content``); the reply is None if the model refuses.

    Raises :class:`Unreadable` where nothing follows ``schema``, or more than one thing does.
    """
    try:
        answer = json.loads(content)
        choice = answer["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        parts = _parts(message.get("content"))
        refused = message.get("refusal") or any(part.get("refusal") for part in parts) or finish in REFUSED
        text = "".join(part["text"] for part in parts if part.get("type") in ("text", "output_text", None))
        tokens = (answer.get("usage") or {}).get("completion_tokens")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if _error(content) and _FILTER.search(content.decode(errors="replace")):  # a complaint with HTTP 200
            return None, {"said": shown(content)}
        raise Unreadable(f"no chat completion: {shown(content)}") from error
    rest = {k: v for k, v in answer.items() if k != "choices"}
    if refused:
        return None, rest
    if (reply := _find(text, schema)) is None:
        fault = f"a reply that does not follow the schema (finish_reason {finish}): {shown(text or content)}"
        raise Unreadable(fault, finish in CUT, tokens if isinstance(tokens, int) else 0)
    return {k: _unescaped(v) if isinstance(v, str) else v for k, v in reply.items()}, rest


def filtered(content: bytes, sent: dict) -> bool:
    """Whether a complaint says that a content filter stopped the request ``sent``."""
    return _says(_FILTER, content, sent)


def named_parameter(content: bytes, sent: dict) -> str | None:
    """Which parameter of the request ``sent`` a complaint is about; None if it is about something else."""
    param = _error(content).get("param")  # as OpenAI's endpoint says it
    head = re.split(r"[.\[]", param)[0] if isinstance(param, str) else ""
    if head in ("model", "messages", "prompt"):
        return None
    known = [name for name in sent if name not in ("model", "messages")]
    if head in known:
        return head
    for name in known:
        pattern = _FORMAT if name == "response_format" else rf"\b{re.escape(name)}\b"
        if _says(re.compile(pattern, re.IGNORECASE), content, sent):
            return name
    return None


def _says(pattern: re.Pattern, content: bytes, sent: dict) -> bool:
    """Whether the complaint has ``pattern`` of its own: it may repeat the question."""
    found = pattern.search(content.decode(errors="replace"))
    return bool(found) and not pattern.search(json.dumps(sent["messages"]))


def shown(said: str | bytes) -> str:
    """The beginning of what was said, and its end: thoughts stand first, the reply last."""
    text = said.decode(errors="replace") if isinstance(said, bytes) else said
    half = SHOWN // 2
    return text if len(text) <= SHOWN else f"{text[:half]} … {text[-half:]}"


def _parts(content: str | list | None) -> list[dict]:
    listed = content if isinstance(content, list) else [content or ""]
    return [{"text": part} if isinstance(part, str) else part for part in listed]


def _find(text: str, schema: dict) -> dict | None:
    """The one object in ``text`` that follows ``schema``."""
    follows = jsonschema.Draft202012Validator(schema).is_valid
    try:
        if _is_text(whole := json.loads(text, object_pairs_hook=_once)) and follows(whole):
            return whole
    except (ValueError, RecursionError):
        pass
    outside = _THOUGHTS_END.split(_THOUGHT.sub("", text))[-1]  # a template may have opened the thoughts
    found = [value for value in _objects(outside) if _is_text(value) and follows(value)]
    return found[0] if found and all(value == found[0] for value in found) else None


def _objects(text: str) -> Iterator[dict]:
    """The JSON objects in ``text`` that stand in no other."""
    at, decoder = 0, json.JSONDecoder(object_pairs_hook=_once)
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except _Twice:  # it says two things: what stands in it says neither
            value, at = {}, json.JSONDecoder().raw_decode(text, at)[1]
        except (ValueError, RecursionError) as error:
            if getattr(error, "pos", 0) >= len(text.rstrip()):
                return  # cut off: what stands in it is part of what is not there
            at += 1
        else:
            yield value


class _Twice(ValueError):
    """A JSON object gives one name two values."""


def _once(pairs: list[tuple[str, object]]) -> dict:
    if len(found := dict(pairs)) < len(pairs):
        raise _Twice
    return found


def _is_text(value: object) -> bool:
    """Whether it can be written in UTF-8: half a character (a lone surrogate) cannot."""
    try:
        return bool(json.dumps(value, ensure_ascii=False).encode())
    except (ValueError, RecursionError):
        return False


def _unescaped(text: str) -> str:
    """A judge that copies an escape of the facts with its backslash doubled means the character."""
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text)


def _error(content: bytes) -> dict:
    """The complaint's object, wherever an endpoint puts it; empty if it has none."""
    try:
        body = json.loads(content)
        error = (body[0] if isinstance(body, list) else body)["error"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return error if isinstance(error, dict) else {}
