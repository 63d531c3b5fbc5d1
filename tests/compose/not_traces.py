"""In the place of the OpenTelemetry collector and of Jaeger, in containers: `not_traces.py [URL …]`.

What comes by OTLP over HTTP to port 4318 is passed on to URL, unread. Without one it is kept, and port 16686 gives all
of it, each body as a line of base64; port 13133 says that all is well. The standard library suffices.
"""

from __future__ import annotations

import base64
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OTLP, PAGE, HEALTH = 4318, 16686, 13133
CONTENT = ("content-type", "content-encoding")


class Handler(BaseHTTPRequestHandler):
    url = ""
    kept: list[bytes] = []  # noqa: RUF012 - of the process, as all of this

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.url:
            headers = {name: self.headers[name] for name in CONTENT if name in self.headers}
            passed = urllib.request.Request(self.url + self.path, body, headers)
            urllib.request.urlopen(passed, timeout=10).close()
        else:
            self.kept.append(base64.b64encode(body))
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"\n".join(self.kept))

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    Handler.url = next(iter(sys.argv[1:]), "")
    for port in (PAGE, HEALTH):
        threading.Thread(target=ThreadingHTTPServer(("", port), Handler).serve_forever).start()
    ThreadingHTTPServer(("", OTLP), Handler).serve_forever()
