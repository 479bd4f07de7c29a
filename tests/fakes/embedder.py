"""A server of an embedding model: OpenAI's `/v1/embeddings`, with vectors that count words, so that texts with the same
words are near each other.

`embedder.py --port N` serves until SIGTERM. While the file `--gate` names exists, it does not answer.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

WIDTH = 256
POLL_S = 0.005


def vector(text: str) -> list[float]:
    """Of length 1."""
    counts = [0.0] * WIDTH
    for word in re.findall(r"\w+", text.casefold()):
        counts[zlib.crc32(word.encode()) % WIDTH] += 1.0
    length = math.sqrt(sum(count * count for count in counts))
    return [count / length for count in counts] if length else [1.0] + [0.0] * (WIDTH - 1)


class Handler(BaseHTTPRequestHandler):
    """`GET` of anything, and embeddings of a text or a list of texts."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes
    gate: ClassVar[Path | None] = None

    def do_GET(self) -> None:
        self._send({"status": "ok"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        while self.gate is not None and self.gate.exists():
            time.sleep(POLL_S)
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        data = [{"object": "embedding", "index": place, "embedding": vector(text)} for place, text in enumerate(texts)]
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        self._send({"object": "list", "model": body["model"], "data": data, "usage": usage})

    def _send(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--gate", type=Path)
    args = parser.parse_args()
    Handler.gate = args.gate
    ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
