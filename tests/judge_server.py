"""A chat endpoint on this machine that speaks OpenAI's protocol, and misbehaves when told to."""

import json
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JudgeServer(ThreadingHTTPServer):
    """``answer(body)`` makes the reply's object, or is itself such a fault. Each request meets the next of ``faults``, if any is left:
    a function of the handler that returns True when it has dealt with the request itself."""

    daemon_threads = True

    def __init__(self, answer, faults=()):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.faults, self.lock = answer, deque(faults), threading.Lock()
        self.bodies, self.headers = [], []
        self.active = self.most_active = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that gave up is what some tests are about


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.headers.append({name.title(): value for name, value in self.headers.items()} | {"path": self.path})
            server.active += 1
            server.most_active = max(server.most_active, server.active)
            fault = server.faults.popleft() if server.faults else None
        try:
            if not (fault and fault(self)):
                answer = server.answer(body)
                answer(self) if callable(answer) else self.reply(json.dumps(completion(json.dumps(answer))))
        finally:
            with server.lock:
                server.active -= 1

    def reply(self, text, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())
        return True

    def log_message(self, *_):
        pass


def completion(content, finish="stop", **message):
    """The object that a chat completion is."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content} | message}
    return {"object": "chat.completion", "model": "served-model", "choices": [choice], "usage": {"total_tokens": 7}}


@contextmanager
def serve(answer, faults=()):
    server = JudgeServer(answer, faults)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# ------------------------------------------------------------------------------- what can go wrong


def status(code, text="try later", **headers):
    return lambda handler: handler.reply(text, code, **headers)


def says(content, finish="stop", **message):
    """A sound HTTP answer with this message."""
    return lambda handler: handler.reply(json.dumps(completion(content, finish, **message)))


def complains(message, http=400, **error):
    """As OpenAI's endpoint complains."""
    return status(http, json.dumps({"error": {"message": message, "param": None, "code": None} | error}))


def sends(text):
    """HTTP 200 with this body."""
    return lambda handler: handler.reply(text)


def silent(handler):
    """Say nothing until the client has gone."""
    with suppress(OSError):
        handler.connection.recv(1)
    return hang_up(handler)


def together(n):
    """Answer when n requests are there at once."""
    barrier = threading.Barrier(n, timeout=120)
    return lambda handler: barrier.wait() and False


def cut(handler):
    """Promise more than is sent."""
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"choices": [')
    handler.close_connection = True
    return True


def hang_up(handler):
    """Close without a word."""
    handler.close_connection = True
    return True


def drip(handler):
    """Never quite silent, never done: a space every 50 ms until the client has gone."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    with suppress(OSError):
        while True:
            handler.wfile.write(b" ")
            time.sleep(0.05)
    return hang_up(handler)
