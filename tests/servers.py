"""A server of OpenAI's chat completions for tests, which answers by a script and misbehaves in every known way.

    server = Server(refuse(500, "oops"), good("hello"))   # the last item answers all further requests
    server.url, server.requests, server.headers, server.times, server.connections

An item is (status, headers, body), a function of the handler that writes to the wire itself, or a function of the
handler that returns such a triple (handler.body is the request).
"""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    def __init__(self, *script, models=("m",)):
        self.script, self.models = list(script), models
        self.requests, self.headers, self.times, self.paths = [], [], [], []
        self.connections, self.now, self.most, self.lock = 0, 0, 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                outer.connections += 1

            def do_GET(self):
                listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in outer.models or ()]}
                send(self, *((200, {}, listed) if outer.models is not None else refuse(404, "Not Found")))

            def do_POST(self):
                self.body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    outer.requests.append(self.body)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    outer.times.append(time.monotonic())
                    outer.paths.append(self.path)
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                    item = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                try:
                    item = item(self) if callable(item) else item
                finally:
                    with outer.lock:
                        outer.now -= 1
                if item:
                    send(self, *item)

            def log_message(self, *_):
                pass

        class Http(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, *_):  # clients that hang up
                pass

        self.http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def send(handler, status: int, headers: dict, answer) -> None:
    data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
    handler.send_response(status)
    for name, value in ({"content-type": "application/json", "content-length": len(data)} | headers).items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(data)


def good(text: str | None, finish: str | None = "stop", usage: bool = True, **more):
    """A whole answer; more: further fields of the message."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text} | more,
              "logprobs": {"content": [{"token": "h", "logprob": -0.5, "top_logprobs": []},
                                       {"token": "i", "logprob": -1.5, "top_logprobs": []}]}}  # fmt: skip
    counts = {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13,
              "prompt_tokens_details": {"cached_tokens": 8}}  # fmt: skip
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return 200, {}, body | ({"usage": counts} if usage else {})


def refuse(status: int, message: str, code: str | None = None, headers: dict | None = None):
    return status, headers or {}, {"error": {"message": message, "type": "x", "code": code}}


def cut(handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def cut_in_the_middle(handler) -> None:
    begin(handler)
    handler.close_connection = True


def drip(handler) -> None:
    """A byte every now and then: each of them in time, the answer never whole."""
    begin(handler)
    try:
        for _ in range(40):
            time.sleep(0.1)
            handler.wfile.write(b" ")
            handler.wfile.flush()
    except OSError:  # given up
        pass
    handler.close_connection = True


def hang(handler) -> None:
    time.sleep(4)
    handler.close_connection = True


def begin(handler) -> None:
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "1", "choi')
    handler.wfile.flush()
