"""The engines that bench_rollout.py compares, each in a process of its own.

    python benchmarks/rollout_peers.py ENGINE MODEL DTYPE THREADS

reads one JSON object a line, runs it and answers with one: {"prompts": [[ids]], "lengths": [[n]]}
is a rollout (each sample has the length that it is to reach, end tokens are ignored), with "watch": true one
that r1fast makes step by step to see how full its cache is, {"gemm": B} the bare matrix products of decode
steps of B rows. vLLM is a server in a virtual environment of its own (`vllm_build.py`), asked over HTTP
for the same.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A rollout: N prompts, and the length of each of the G completions of each."""

    prompts: list[list[int]]
    lengths: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.lengths))


def run_r1fast(path: str, dtype: str) -> tuple[Callable[[Case], dict], Any]:
    from r1fast.model import load_model
    from r1fast.rollout.engine import Engine
    from r1fast.rollout.loops import TOKENS_AT_ONCE
    from r1fast.rollout.sampler import SamplingParams

    model = load_model(path, dtype=dtype, device="cpu")
    engine = Engine(model, [0], block_size=16)
    numbers = itertools.count(1)

    def alive(rows: Any) -> int:
        """Positions of running samples, a prompt once; a last token is not in the cache yet."""
        if not rows.num_running:
            return 0
        batch = rows.batch()
        prompts = rows.prompt_length[batch.slots]
        once = prompts[batch.group_starts[:-1]].sum()
        return int((rows.length[batch.slots] - 1 - prompts).sum() + once)

    def run(case: Case, watch: bool = False) -> dict:
        engine.reset_prefix_cache()
        num_tokens, logprobs, most = 0, 0.0, (0, 0)
        sampling = SamplingParams(ignore_eos=True)
        for prompt, lengths in zip(case.prompts, case.lengths, strict=True):
            seeds = [next(numbers) for _ in lengths]
            engine.add(prompt, seeds, sampling, stream=False, lengths=lengths)
        while engine.has_work:
            for event in engine.step(1 if watch else TOKENS_AT_ONCE):
                num_tokens += len(event.token_ids)
                logprobs += sum(event.logprobs)
            if watch:
                most = max(most, (16 * engine.stats.blocks_used, alive(engine.rows)))
        found = {"tokens": num_tokens, "logprob": logprobs / num_tokens}
        return found | ({"positions": most[0], "alive": most[1]} if watch else {})

    return run, model


def run_compiled(path: str, dtype: str) -> tuple[Callable[[Case], dict], Any]:
    """The same with a static cache and a compiled forward, which transformers calls the fastest way.

    It compiles at the first run of each shape, for a minute or more.
    """
    from transformers import CompileConfig

    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True  # else on a GPU alone
    return run_generate(path, dtype, cache_implementation="static", compile_config=config)


def run_generate(path: str, dtype: str, **options: Any) -> tuple[Callable[[Case], dict], Any]:
    """transformers' `generate`, without the log-probabilities, whose scores would cost it memory.

    Its defaults, a dynamic cache and sdpa, and sampling without top-k.
    """
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    class Until(StoppingCriteria):
        def __init__(self, lengths: torch.Tensor):
            self.lengths, self.done = lengths, 0

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.done += 1
            return self.done >= self.lengths

    @torch.inference_mode()
    def run(case: Case) -> dict:
        ids = torch.tensor(case.prompts)
        lengths = torch.tensor(case.lengths)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
            num_return_sequences=lengths.shape[1], max_new_tokens=int(lengths.max()),
            eos_token_id=None, pad_token_id=0,
            stopping_criteria=[Until(lengths.flatten())], **options,
        )  # fmt: skip
        assert out.shape == (lengths.numel(), ids.shape[1] + lengths.max()), out.shape
        return {"tokens": case.num_tokens}

    return run, model


def run_continuous(path: str, dtype: str) -> tuple[Callable[[Case], dict], Any]:
    """transformers' continuous batching (the manager behind `generate_batch`), with logprobs."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    def run(case: Case) -> dict:
        num_samples = sum(map(len, case.lengths))
        longest = len(case.prompts[0]) + max(map(max, case.lengths))
        generation = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, eos_token_id=-1, pad_token_id=0,
            max_new_tokens=max(map(max, case.lengths)),
        )  # fmt: skip
        page = 16
        batching = ContinuousBatchingConfig(
            page_size=page, num_blocks=num_samples * (longest // page + 2),
            max_batch_tokens=2 * num_samples, return_logprobs=True,
        )  # fmt: skip
        found = {}
        with (
            torch.no_grad(),
            model.continuous_batching_context_manager(
                generation_config=generation,
                continuous_batching_config=batching,
                block=True,
                timeout=5,
            ) as manager,
        ):
            for prompt, lengths in zip(case.prompts, case.lengths, strict=True):
                for n in lengths:
                    manager.add_request(prompt, max_new_tokens=n, eos_token_id=-1)
            while len(found) < num_samples:
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("continuous batching stopped")
                elif result.is_finished():
                    found[result.request_id] = result
        errors = [r.error for r in found.values() if r.error]
        if errors:
            raise RuntimeError(errors[0])
        num_tokens = sum(len(r.generated_tokens) for r in found.values())
        logprobs = sum(sum(r.logprobs) for r in found.values())
        return {"tokens": num_tokens, "logprob": logprobs / num_tokens}

    return run, model


ENGINES = {
    "r1fast": run_r1fast,
    "generate": run_generate,
    "compiled generate": run_compiled,
    "continuous batching": run_continuous,
}


def gemm_rate(model: Any, rows: int, seconds: float = 1.0) -> float:
    """Tokens a second of nothing but the matrix products of decode steps of `rows` rows.

    The weights are the model's own; the fastest library for a whole step counts.
    """
    import torch
    import torch.nn.functional as F

    weights = []
    for layer in model.layers:
        weights += [layer.qkv.weight, layer.o.weight, layer.gate_up.weight, layer.down.weight]
    weights.append(model.head_weight)
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=w.dtype) for w in weights}

    def plain() -> None:
        for w in weights:
            F.linear(inputs[w.shape[1]], w)

    def packed() -> None:
        for w, rearranged in zip(weights, reordered, strict=True):
            torch.ops.mkldnn._linear_pointwise(inputs[w.shape[1]], rearranged, None, "none", [], "")

    best = float("inf")
    with torch.inference_mode():
        steps = [plain]
        try:  # oneDNN, weights in its own order; private operators, which other builds may lack
            reordered = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]
            packed()
            steps.append(packed)
        except (AttributeError, RuntimeError):
            pass
        for step in steps:
            times, began = [], time.perf_counter()
            while time.perf_counter() - began < seconds / len(steps) or len(times) < 3:
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
            best = min(best, sorted(times)[len(times) // 2])
    return rows / best


def worker(engine: str, path: str, dtype: str, threads: str) -> None:
    """Read cases, answer with what they took."""
    import torch

    torch.set_num_threads(int(threads))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    run, model = ENGINES[engine](path, dtype)
    _answer(out, {"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "gemm" in asked:
                _answer(out, {"rate": gemm_rate(model, asked["gemm"])})
                continue
            more = {"watch": True} if asked.pop("watch", False) else {}
            case = Case(**asked)
            before = reset_peak([os.getpid()])
            cpu, start = time.process_time(), time.perf_counter()
            found = run(case, **more)
            found["seconds"] = time.perf_counter() - start
            found["cpu_seconds"] = time.process_time() - cpu
            found["rss"], found["peak_rss"] = before, peak_bytes([os.getpid()])
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        _answer(out, found)


def _answer(out: Any, body: dict) -> None:
    out.write(json.dumps(body) + "\n")
    out.flush()


def reset_peak(pids: list[int]) -> int:
    """Let the high-water marks start again from here. Returns the resident bytes."""
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _status_bytes(pids, "VmRSS")


def peak_bytes(pids: list[int]) -> int:
    return _status_bytes(pids, "VmHWM")


def _status_bytes(pids: list[int], field: str) -> int:
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/status") as file:
            total += next(
                1024 * int(line.split()[1]) for line in file if line.startswith(f"{field}:")
            )
    return total


class Worker:
    """One engine in a process of its own; `start_seconds` until it could take a request."""

    def __init__(self, engine: str, path: str, dtype: str, threads: int):
        self.name, start = engine, time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, __file__, engine, path, dtype, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._read()
        self.start_seconds = time.perf_counter() - start

    def run(self, case: Case) -> dict:
        """{"tokens", "seconds", "cpu_seconds", "rss", "peak_rss", ...} or {"error"}."""
        return self._ask(case._asdict())

    def watched(self, case: Case) -> dict:
        """Of r1fast: {"positions", "alive"} where most blocks are held, from a slower run."""
        return self._ask(case._asdict() | {"watch": True})

    def gemm_rate(self, rows: int) -> float:
        return self._ask({"gemm": rows})["rate"]

    def _ask(self, body: dict) -> dict:
        self.process.stdin.write(json.dumps(body) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()


class VllmServer:
    """vLLM's CPU build as a server, in the virtual environment `venv`."""

    def __init__(
        self, venv: Path, path: str, dtype: str, log: Path, *, eager: bool, timeout: float
    ):
        start = time.perf_counter()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1",
        }  # fmt: skip
        words = [
            venv / "bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", path,
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", dtype,
            "--logprobs-mode", "processed_logprobs", "--max-num-seqs", "256",
            *["--enforce-eager"] * eager,
        ]  # fmt: skip
        with log.open("w") as file:
            self.process = subprocess.Popen(
                words, stdout=file, stderr=file, env=environment, cwd="/", start_new_session=True
            )
        while not self._answers():
            if self.process.poll() is not None or time.perf_counter() - start > timeout:
                self.close()
                raise RuntimeError(f"vLLM did not start, see {log}")
            time.sleep(0.2)
        self.start_seconds = time.perf_counter() - start
        self.path, self.pool = path, ThreadPoolExecutor(256)

    def run(self, case: Case) -> dict:
        """As Worker.run: a request a prompt where its samples are of one length, else one a sample."""
        bodies = []
        for prompt, lengths in zip(case.prompts, case.lengths, strict=True):
            same = len(set(lengths)) == 1
            for length in lengths[:1] if same else lengths:
                bodies.append({
                    "model": self.path, "prompt": prompt, "n": len(lengths) if same else 1,
                    "max_tokens": length, "ignore_eos": True, "temperature": 1.0, "logprobs": 0,
                    "return_token_ids": True,
                })  # fmt: skip
        pids = self._pids()
        before, cpu, start = reset_peak(pids), self._cpu_seconds(pids), time.perf_counter()
        answers = list(self.pool.map(lambda body: self._post("/v1/completions", body), bodies))
        seconds = time.perf_counter() - start
        choices = [choice for answer in answers for choice in answer["choices"]]
        return {
            "tokens": sum(len(choice["token_ids"]) for choice in choices),
            "seconds": seconds, "cpu_seconds": self._cpu_seconds(pids) - cpu,
            "rss": before, "peak_rss": peak_bytes(pids),
        }  # fmt: skip

    def _post(self, path: str, body: dict) -> dict:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            if response.status != 200:
                raise RuntimeError(f"vLLM answers {response.status}: {answer[:300]}")
            return json.loads(answer)
        finally:
            connection.close()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _pids(self) -> list[int]:
        import psutil

        main = psutil.Process(self.process.pid)
        return [main.pid, *(child.pid for child in main.children(recursive=True))]

    def _cpu_seconds(self, pids: list[int]) -> float:
        import psutil

        return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


if __name__ == "__main__":
    worker(*sys.argv[1:])
