"""Runs the server: the socket, the engine's size, the line that says what is served, signals."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import uvicorn

from r1fast.config import Config
from r1fast.metrics import note, say, warn
from r1fast.policy import Policy, model_name, policy_of
from r1fast.provenance import hardware
from r1fast.rollout.engine import Engine
from r1fast.rollout.sampler import SamplingParams
from r1fast.serve.app import Limits, Service
from r1fast.serve.connection import Connection

MIB = 2**20


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What can be set on the command line, beside the config's values."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    api_key: str = ""  # clients must send it
    model_name: str = ""  # what clients call the model; "": `policy.model_name`
    max_queued: int = 1024  # samples that may wait while max_batch_size are at work
    max_body_mib: int = 16  # of one request
    drain: int = 30  # seconds that running requests have after SIGTERM

    @classmethod
    def read(cls, words: Mapping[str, str]) -> ServeOptions:
        """From options such as {"max-queued": "64"}. Raises ValueError naming the option."""
        values: dict[str, str | int] = {}
        for word, text in words.items():
            name = word.replace("-", "_")
            if name not in cls.__dataclass_fields__:
                continue
            if cls.__dataclass_fields__[name].type == "int":
                low = 1 if name == "max_body_mib" else 0
                high = 65535 if name == "port" else 2**31
                if not text.isdecimal() or not low <= int(text) <= high:
                    raise ValueError(
                        f"--{word} must be a whole number from {low} to {high}, got {text!r}"
                    )
                values[name] = int(text)
            else:
                values[name] = text
        values.setdefault("api_key", os.environ.get("R1FAST_API_KEY", ""))
        return cls(**values)


def serve(config: Config, path: str, options: ServeOptions) -> None:
    """Answer requests with the model at `path` until SIGINT or SIGTERM, then let the running ones end.

    Raises ValueError where the address cannot be had or the model cannot be read.
    """
    with _bound(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        if not ipaddress.ip_address(host).is_loopback:
            key = "" if options.api_key else ", and without --api-key nothing is asked for"
            warn(f"{host} is no loopback address: whoever reaches it can use the model{key}")
        policy = policy_of(config, path)
        engine = Engine.of(policy, config.rollout, fixed_weights=True)
        # the first request is not to pay for the cache, nor for preparing the weights
        engine.generate([[policy.eos_id]], 1, SamplingParams(max_tokens=1))
        name = options.model_name or model_name(path)
        limits = Limits(
            config.rollout.max_batch_size + options.max_queued, options.max_body_mib * MIB
        )
        service = Service(policy, engine, name, limits, options.api_key)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        server = _Server(
            uvicorn.Config(
                service.app(),
                http=Connection,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=options.drain,
                server_header=False,
            ),
            f"{name}: {_described(policy, engine, config.rollout.block_size)}\nready on {url}",
            service,
        )
        logging.getLogger("asyncio").addFilter(_is_no_lost_client)
        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn raises the signal again when it is done; that must not end us with an error
            signal.signal(number, server.handle_exit)
        server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """Says when it is ready and when it begins to stop."""

    def __init__(self, config: uvicorn.Config, ready: str, service: Service):
        super().__init__(config)
        self.ready, self.service = ready, service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            say(self.ready)

    async def on_tick(self, counter: int) -> bool:
        ends = await super().on_tick(counter)
        if ends:
            waits = self.service.num_samples
            seconds = self.config.timeout_graceful_shutdown
            note(f"stopping; {waits} samples may end within {seconds} s" if waits else "stopping")
        return ends


def _is_no_lost_client(record: logging.LogRecord) -> bool:
    """asyncio warns of a client that left in the middle of a stream; /metrics counts it as aborted."""
    return record.getMessage() != "socket.send() raised exception."


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has the address but does not listen yet: the model is still to come."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; "
            "choose another --host or --port"
        ) from None
    return listener


def _described(policy: Policy, engine: Engine, block_size: int) -> str:
    """Parameters, type, device and the size of the cache."""
    count = policy.model.num_parameters()
    size = f"{count / 1e9:.2f} billion" if count >= 5e8 else f"{count / 1e6:.2f} million"
    dtype = str(policy.model.head_weight.dtype).removeprefix("torch.")
    stats = engine.stats
    gib = stats.num_blocks * stats.block_bytes / 2**30
    cache = f"{gib:.1f} GiB" if gib >= 1 else f"{1024 * gib:.0f} MiB"
    tokens = f"{stats.num_blocks * block_size:,} tokens"
    device = f"{policy.device} ({hardware(policy.device)})"
    return f"{size} parameters, {dtype} on {device}; cache up to {cache}, {tokens}"
