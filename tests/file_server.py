"""A web server on this machine for files, and for repositories as the Hugging Face hub serves them.

It misbehaves on request: ``cuts`` end so many of the next answers after that many bytes, ``statuses``
answer the next requests with an error.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer:
    """Serves ``files``, path to bytes, with ranges and ETags; ``asked`` lists (method, path, range)."""

    def __init__(self):
        self.files, self.repos, self.asked, self.cuts, self.statuses = {}, {}, [], [], []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def publish(self, repo: str, files: dict[str, bytes], kind: str = "model") -> str:
        """A new commit of ``repo``; returns its hash."""
        commit = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        api, prefix = f"/api/{kind}s/{repo}", "" if kind == "model" else f"/{kind}s"
        tree = [
            {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            for name, body in files.items()
        ]
        self.files[f"{api}/revision/main"] = json.dumps({"id": repo, "sha": commit, "siblings": []}).encode()
        self.files[f"{api}/tree/{commit}"] = json.dumps(tree).encode()
        for name, body in files.items():
            self.files[path := f"{prefix}/{repo}/resolve/{commit}/{name}"] = body
            self.repos[path] = commit
        return commit

    def fetched(self, name: str) -> int:
        """How often a file of this name was asked for with GET."""
        return sum(method == "GET" and path.endswith(name) for method, path, _ in self.asked)

    def _handler(outer):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path, wanted = self.path.split("?")[0], self.headers.get("Range")
                outer.asked.append((self.command, path, wanted))
                if self.command == "GET" and outer.statuses:
                    return self.answer(outer.statuses.pop(0))
                if path not in outer.files:
                    return self.answer(404)
                body, start = outer.files[path], 0
                headers = {"ETag": '"' + hashlib.sha1(body).hexdigest() + '"'}
                if path.startswith("/api/"):
                    headers["Content-Type"] = "application/json"
                if path in outer.repos:
                    headers["X-Repo-Commit"] = outer.repos[path]
                if wanted:
                    start = int(wanted.removeprefix("bytes=").split("-")[0])
                    headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                self.answer(206 if start else 200, body[start:], headers)

            do_HEAD = do_GET

            def answer(self, status, body=b"", headers=None):
                self.send_response(status)
                for name, value in ({"Content-Length": len(body)} | (headers or {})).items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command == "GET" and body:
                    self.wfile.write(body[: outer.cuts.pop(0)] if outer.cuts else body)
                self.close_connection = True

            def log_message(self, *_):
                pass

        return Handler
