"""A server on this machine that speaks the part of the hub's protocol that uploads need."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What was uploaded: `files` by path, `repositories` as they were asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repositories: list[dict] = []
        self.refuse = False
        self.url = ""

    def answer(self, path: str, body: bytes) -> dict:
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.repositories.append(asked)
            name = f"{asked['organization']}/{asked['name']}"
            return {"url": f"{self.url}/{name}", "name": name, "id": "1"}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            rows = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in names]
            return {"files": rows}
        if "/commit/" in path:
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    self.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            name = "/".join(path.split("/")[3:5])
            return {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1", "success": True}
        return {"name": "someone"} if path.endswith("whoami-v2") else {}


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that listens on a free port while the context lasts."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            data = json.dumps(hub.answer(self.path, body)).encode()
            self.send_response(403 if hub.refuse else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
