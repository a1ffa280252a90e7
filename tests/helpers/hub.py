"""A hub on loopback, as far as fetching a snapshot needs one."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from typing import Iterator, Mapping

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub(name: str, files: Mapping[str, bytes], kind: str = "datasets") -> Iterator[tuple[str, list[str]]]:
    """Its address, and the paths that were asked for; it has one repository."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self, body: bool = True) -> None:
            path = self.path.split("?")[0]
            asked.append(path)
            owned = f"{'' if kind == 'models' else kind + '/'}{name}/resolve/"
            data, headers = b"{}", {"Content-Type": "application/json"}
            if path.startswith(f"/api/{kind}/{name}/tree/"):
                tree = [
                    {"type": "file", "path": file, "size": len(content), "oid": _etag(content)} for file, content in files.items()
                ]
                data = json.dumps(tree).encode()
            elif path.startswith(f"/api/{kind}/{name}"):
                siblings = [{"rfilename": file} for file in files]
                data = json.dumps({"id": name, "_id": "1", "sha": COMMIT, "siblings": siblings}).encode()
            elif path.startswith("/" + owned) and path[len(owned) + 1 :].partition("/")[2] in files:
                data = files[path[len(owned) + 1 :].partition("/")[2]]  # behind the commit
                headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT}
            else:
                self.send_error(404)
                return
            self.send_response(200)
            for header, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(header, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
