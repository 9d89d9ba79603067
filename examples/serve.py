"""Serve a saved network over HTTP with Python's standard library: images in, class scores out.

    python examples/serve.py pruned.safetensors --port 8080

POST / takes a NumPy file (.npy), float32 [N, C, H, W], and answers [N, classes] the same way; GET / says what is
served. Everything wrong with a request is its answer's text, with status 400 or 413.
"""

from __future__ import annotations

import argparse
import io
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from torch import nn

from stripe_kernels import example_input, load

LARGEST = 64 * 2**20  # bytes of one request


def parse(body: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 [N, *shape] from a .npy file; ValueError says what else it is. Runs no pickle."""
    images = np.load(io.BytesIO(body), allow_pickle=False)
    if images.dtype != np.float32 or images.shape[1:] != shape or not len(images):
        raise ValueError(
            f"need float32 [N, {', '.join(map(str, shape))}], got {images.dtype} {list(images.shape)}"
        )
    return torch.from_numpy(images)


def server(
    network: nn.Module, shape: tuple[int, ...], port: int, host: str = "127.0.0.1"
) -> ThreadingHTTPServer:
    """A server on host:port (0: any free one) that runs `network` on images of `shape` [C, H, W]."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, f"POST a .npy file, float32 [N, {', '.join(map(str, shape))}]\n".encode())

        def do_POST(self) -> None:
            try:
                # Below zero rfile would be read to the connection's end.
                length = max(0, int(self.headers.get("Content-Length") or 0))
                if length > LARGEST:
                    self.answer(413, f"{length} bytes, at most {LARGEST}\n".encode())
                    return
                images = parse(self.rfile.read(length), shape)
            except Exception as error:  # noqa: BLE001 # readers say "no" to files of strangers in every type there is
                self.answer(400, f"{error}\n".encode())
                return
            with torch.inference_mode():
                scores = network(images)
            out = io.BytesIO()
            np.save(out, scores.numpy())
            self.answer(200, out.getvalue(), "application/octet-stream")

        def answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    return ThreadingHTTPServer((host, port), Handler)


def size(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a file that stripe_kernels.save wrote")
    parser.add_argument(
        "--input", type=size, help="C x H x W of one image, as in 3x32x32; default: what the file says"
    )
    parser.add_argument("--port", type=int, default=8080)
    chosen = parser.parse_args()
    try:
        known = example_input(chosen.model)
        if chosen.input is None and not known:
            parser.error(f"{chosen.model} was saved without the size of an image: --input CxHxW")
        shape = chosen.input or tuple(known[0].shape[1:])
        serving = server(load(chosen.model), shape, chosen.port)
    except (OSError, ValueError) as error:  # no such file, none of ours, the port is taken
        parser.error(str(error))
    print(f"http://{serving.server_address[0]}:{serving.server_address[1]}", flush=True)
    with serving:
        serving.serve_forever()


if __name__ == "__main__":
    main()
