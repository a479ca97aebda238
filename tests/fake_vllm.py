"""A server that speaks as much of vLLM's HTTP API as r1fast uses, over an engine of ours: for its failures."""

import json
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from r1fast.hf_folder import read_tensors
from r1fast.policy import Policy
from r1fast.rollout.engine import Engine
from r1fast.rollout.sampler import SamplingParams
from r1fast.rollout.vllm.sync import NEEDED


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # with 5, one that connects when a step begins waits for a second


class FakeVllm:
    """On a free port of this machine, with the weights of `policy` until it is given others.

    `fault(path, n)` may name what goes wrong with the n-th request of a path: "500", "400", "hang",
    "garbage", "empty", "reset", "short" (a body that breaks off), "redirect", "abort", "nan".
    """

    def __init__(self, policy: Policy, *, port: int = 0, fault=lambda path, n: "", room: int = 0):
        self.policy, self.fault = policy, fault
        self.engine = Engine(policy.model, policy.eos_ids)
        self.room = room or policy.model.spec.max_position_embeddings
        self.label, self.is_paused, self.is_updating = "default", False, False
        self.seen, self.bodies, self.updates = Counter(), [], []
        self.lock, self.delay, self.ended = threading.Lock(), 0.0, threading.Event()
        self.spares_canaries = False  # no fault of /v1/completions is theirs, and no delay
        self.num_sampling = self.num_aborts = 0
        self.keeps = frozenset()  # names of weights that an update does not reach
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                owner.answer(self, None)

            def do_POST(self):
                length = int(self.headers.get("Content-Length") or 0)
                owner.answer(self, json.loads(self.rfile.read(length) or b"null"))

        self.http = _Http(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def answer(self, handler: BaseHTTPRequestHandler, body) -> None:
        url = urlsplit(handler.path)
        with self.lock:
            self.seen[url.path] += 1
            n = self.seen[url.path]
        fault = "reset" if self.ended.is_set() else self.fault(url.path, n)
        if self.spares_canaries and url.path == "/v1/completions" and body["ignore_eos"]:
            fault = ""
        status, headers, reply = 200, {}, {}
        if fault == "hang":
            self.ended.wait(60)
            fault = "reset"
        if fault == "reset":
            handler.close_connection = True
            return
        if fault == "redirect":
            status, headers = 307, {"Location": self.url + "/elsewhere"}
        elif fault.isdigit():
            status, reply = int(fault), {"error": "a fault that was injected"}
        else:
            try:
                reply = self.respond(url.path, parse_qs(url.query), body, fault)
            except AssertionError as error:
                status, reply = 500, {"error": str(error)}
        if reply is None:
            status, reply = 404, {"error": "no such path"}
        raw = b"not json" if fault == "garbage" else json.dumps(reply).encode()
        if self.ended.is_set():
            handler.close_connection = True
            return
        try:
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(raw)))
            handler.end_headers()
            handler.wfile.write(raw[: len(raw) // 2] if fault == "short" else raw)
        except OSError:  # who asked has gone
            pass
        if fault == "short":
            handler.close_connection = True

    def respond(self, path: str, query: dict, body, fault: str):
        if path == "/v1/completions":
            return self.complete(body, fault)
        if path == "/pause":
            self.pause(query["mode"][0])
        elif path == "/resume":
            self.is_paused = False
        elif path == "/update_weight_version":
            self.label = body["new_version"]
        elif path == "/start_weight_update":
            assert not self.is_updating, "an update is already active"
            self.is_updating = True
        elif path == "/update_weights":
            assert self.is_updating, "start_weight_update must come first"
            self.load(body["update_info"]["files"])
        elif path == "/finish_weight_update":
            assert self.is_updating, "no update is active"
            self.is_updating = False
            if body:
                self.label = body["weight_version"]
        elif path == "/reset_prefix_cache":
            self.updates.append((self.label, query["reset_running_requests"][0]))
            return {"success": True}
        else:
            return {
                "/health": {},
                "/v1/models": {"data": [{"id": "fake", "max_model_len": self.room}]},
                "/openapi.json": {"paths": {name: {} for name in NEEDED}},
                "/weight_info": {"weight_version": self.label},
            }.get(path)
        return {}

    def pause(self, mode: str) -> None:
        with self.lock:
            self.is_paused = True
            self.num_aborts += mode == "abort"
        while mode == "wait" and self.num_sampling:
            time.sleep(0.005)

    def load(self, files: list[str]) -> None:
        own = self.policy.model.hf_tensors()
        with self.lock:
            for file in map(Path, files):
                for name, read, _ in read_tensors(file.parent, file.name):
                    if name not in self.keeps:
                        own[name].copy_(read())
            self.engine.reset_prefix_cache()

    def complete(self, body: dict, fault: str):
        while True:
            with self.lock:
                if not self.is_paused:
                    self.num_sampling += 1
                    before = self.num_aborts
                    break
            time.sleep(0.005)
        try:
            is_slow = not (self.spares_canaries and body["ignore_eos"])
            done = time.monotonic() + self.delay * is_slow
            while (left := done - time.monotonic()) > 0 and self.num_aborts == before:
                if self.ended.wait(min(left, 0.01)):
                    return None
            if fault == "abort" or self.num_aborts != before:
                none = {"token_logprobs": []}
                return {"choices": [{"finish_reason": "abort", "token_ids": [], "logprobs": none}]}
            return self.sample(body, fault)
        finally:
            with self.lock:
                self.num_sampling -= 1

    def sample(self, body: dict, fault: str) -> dict:
        assert body["n"] == 1
        assert body["return_token_ids"]
        names = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "ignore_eos")
        sampling = SamplingParams(**{name: body[name] for name in names})
        with self.lock:
            self.bodies.append(body)
            (group,) = self.engine.generate(
                [body["prompt"]], None, sampling, seeds=[[body["seed"]]]
            )
        (c,) = group.completions
        logprobs = [float("nan")] * len(c.logprobs) if fault == "nan" else c.logprobs
        if fault == "empty":
            logprobs = []
        return {
            "choices": [{
                "index": 0, "finish_reason": c.finish_reason, "stop_reason": None,
                "token_ids": c.token_ids, "logprobs": {"token_logprobs": logprobs},
            }]
        }  # fmt: skip


def main(words: list[str]) -> None:
    """As vLLM's own server is started: of what comes, --model and --port are read."""
    from r1fast.policy import load_policy

    def value(name: str) -> str:
        return words[words.index(name) + 1]

    FakeVllm(load_policy(value("--model"), device="cpu"), port=int(value("--port")))
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv)
