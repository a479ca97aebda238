"""One candidate against the tests of one problem, in the launcher: which box says what, until when.

Whatever comes out of a candidate's box is only ever an answer to compare. From the moment that a
candidate's code is in the box every failure is the candidate's: `error` would earn the mean of its
group, and must not be something that a program can bring about. But for one: a box that others kept
from running (BoxStarved).
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1fast.rewards.cpp_calls import cpp_mains
from r1fast.rewards.program_output import same_output
from r1fast.rewards.sandbox_box import Box, BoxFailure, Deadline
from r1fast.rewards.sandbox_ladder import NUM_PROCESSES
from r1fast.rewards.sandbox_pool import BoxPool, Referee

_GRACE = 2.0  # seconds above a limit that a box itself keeps, before the launcher ends it
_MAX_BOXES = 8  # for one candidate: each one that it takes down costs a start
_DRIVER = Path(__file__).with_name("candidate.hpp")


@dataclass(slots=True)
class Trial:
    """What came of it; `error` is empty unless we failed."""

    loaded: str = ""  # yes | raised | unparseable | timeout, "" where it never came so far
    why: str = ""
    error: str = ""
    tests: list[dict[str, Any]] = field(default_factory=list)  # {outcome, share, why}
    outputs: list[str] = field(default_factory=list)  # of programs, where the job keeps them


async def run_trial(job: dict, pool: BoxPool, referee: Referee) -> Trial:
    """Run a job of sandbox.py. Never raises for what a candidate does."""
    trial = Trial()
    try:
        run = _run_calls if job["mode"] == "calls" else _run_programs
        await run(job, pool, referee, trial)
    except BoxFailure as error:
        trial.error = str(error)
    return trial


def _load_message(job: dict, pool: BoxPool) -> str:
    code, mains = job["code"], [""]
    if job["language"] == "cpp":
        code = f"{job['preamble']}\n{code}"
        if job["mode"] == "calls":
            mains = cpp_mains(job)
            code = f'{_DRIVER.read_text()}#line 1 "main.cpp"\n{code}\n'
    message = {
        **{name: job[name] for name in ("mode", "language", "preamble", "limits")},
        "code": code,
        "mains": mains,
        "standard": job.get("standard") or "c++17",
        "alone": pool.rung.alone,
        # without a uid of its own a box counts its processes in its own user namespace
        "processes": NUM_PROCESSES
        if pool.rung.own_pids and pool.rung.host.first_uid is None
        else 0,
        "compiler": pool.rung.host.compiler,
    }
    return ascii(message)


async def _load(job: dict, box: Box, pool: BoxPool, trial: Trial, deadline: Deadline) -> bool:
    limits = job["limits"]
    room, cpu = limits["wall"], limits["cpu"]
    if job["language"] == "cpp":
        room, cpu = room + limits["compile_wall"], cpu + limits["compile_cpu"]
    box.send(_load_message(job, pool))
    line = await box.read_answer(room, cpu, deadline)
    if line is None:
        trial.loaded, trial.why = "timeout", "while it was loaded"
        return False
    reply = _parse(line) if len(line) < 1 << 16 else None
    if not reply or reply.get("loaded") not in ("yes", "raised", "unparseable", "timeout"):
        trial.loaded, trial.why = "raised", "it ended while it was loaded"
        return False
    trial.loaded, trial.why = reply["loaded"], str(reply.get("why", ""))
    return trial.loaded == "yes"


def _parse(line: bytes) -> dict | None:
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return reply if isinstance(reply, dict) else None


def _read_output(line: bytes) -> tuple[str, str] | None:
    """(status, output) of a program's reply: two strings, so that nothing deep is ever parsed."""
    try:
        text = line.decode("ascii")
        start = text.index('"status":"') + len('"status":"')
        status, at = json.decoder.scanstring(text, start)
        if not text.startswith(',"out":"', at):
            return None
        return status, json.decoder.scanstring(text, at + len(',"out":"'))[0]
    except ValueError:
        return None


async def _run_programs(job: dict, pool: BoxPool, referee: Referee, trial: Trial) -> None:
    tests, limits = job["tests"], job["limits"]
    deadline: Deadline | None = None

    def record(outcome: str, why: str = "") -> bool:
        """Whether to go on."""
        trial.tests.append({"outcome": outcome, "share": float(outcome == "pass"), "why": why})
        return outcome == "pass" or not job["stop_early"]

    for _ in range(_MAX_BOXES):
        box = await pool.take(limits["box_memory"])
        # a box comes first: others' programs may keep it waiting for long
        deadline = deadline or Deadline.within(limits["total"], pool.patience)
        try:
            if not await _load(job, box, pool, trial, deadline):
                return
            while len(trial.tests) < len(tests):
                test = tests[len(trial.tests)]
                if deadline.left <= 0:
                    break
                box.send(ascii({"id": len(trial.tests), "stdin": test["input"]}))
                line = await box.read_answer(limits["wall"], limits["cpu"], deadline)
                late = line is None
                if late:  # the box can be asked to end the program, and be used for the next test
                    box.send(ascii({"stop": len(trial.tests)}))
                    line = await box.read_line(_GRACE)
                reply = _read_output(line) if line else None
                if reply is None:  # the rest needs a new box
                    if not record(
                        "timeout" if late else "wrong", "" if late else "it took its box down"
                    ):
                        return
                    break
                status, out = reply
                if job.get("keep_output"):
                    trial.outputs.append(f"{status}: {out}")
                if late or status == "timeout":
                    go_on = record("timeout")
                elif status != "ok":
                    go_on = record("wrong", status)
                elif same_output(out, test["output"], job["comparison"], job["tolerance"]):
                    go_on = record("pass")
                else:
                    go_on = record("wrong", "another output than expected")
                if not go_on:
                    return
        finally:
            pool.give(box)
        if len(trial.tests) == len(tests):
            return
        if deadline.left <= 0:
            break
    late = deadline is not None and deadline.left <= 0
    while len(trial.tests) < len(tests):
        record("timeout" if late else "wrong", "no time left" if late else "it takes boxes down")


class _Candidate:
    """The box of a function problem's candidate, started again when it is gone."""

    def __init__(self, job: dict, pool: BoxPool, trial: Trial, deadline: Deadline):
        self.job, self.pool, self.trial, self.deadline = job, pool, trial, deadline
        self.box: Box | None = None
        self.num_boxes = 0

    async def load(self) -> bool:
        if self.box is None:
            self.box = await self.pool.take(self.job["limits"]["box_memory"])
            self.num_boxes += 1
            if not await _load(self.job, self.box, self.pool, self.trial, self.deadline):
                self.drop()
                return False
        return True

    def drop(self) -> None:
        if self.box is not None:
            self.pool.give(self.box)
            self.box = None

    async def answer(self, call: dict) -> bytes:
        """The reply for the referee, as a line."""
        if self.deadline.left <= 0:
            return _gone("timeout", "no time left")
        if self.num_boxes >= _MAX_BOXES and self.box is None:
            return _gone("wrong", "it takes boxes down")
        if not await self.load():
            return _gone("timeout" if self.trial.loaded == "timeout" else "wrong", self.trial.why)
        assert self.box is not None
        number, result_from = call["call"], call["result_from"]
        if self.job["language"] == "cpp":
            self.box.send(f"{number} {-1 if result_from is None else result_from} {call['args']}")
        else:
            self.box.send(
                f"{{'id':{number},'name':{call['name']!r},'result_from':{result_from!r},"
                f"'args':{call['args']}}}"
            )
        limits = self.job["limits"]
        line = await self.box.read_answer(limits["wall"], limits["cpu"], self.deadline)
        if line:  # as a string: what a candidate writes is never read as a word of the launcher's
            return json.dumps({"said": line.decode("utf-8", "replace")}).encode() + b"\n"
        self.drop()
        if line is None:
            return _gone("timeout", "a call took too long")
        return _gone("wrong", "the program ended during a call")


def _gone(kind: str, why: str) -> bytes:
    return json.dumps({"gone": kind, "why": why}).encode() + b"\n"


async def _run_calls(job: dict, pool: BoxPool, referee: Referee, trial: Trial) -> None:
    limits = job["limits"]
    # a box comes first: referees are not limited in number, and none should wait for a slot
    box = await pool.take(limits["box_memory"])
    candidate = _Candidate(job, pool, trial, Deadline.within(limits["total"], pool.patience))
    candidate.box, candidate.num_boxes = box, 1
    writer = None
    try:
        opening = asyncio.ensure_future(referee.open())
        try:
            loaded = await _load(job, candidate.box, pool, trial, candidate.deadline)
        finally:
            reader, writer = await opening
        if not loaded:
            return
        names = ("setup", "check", "names", "tests", "stop_early")
        message = {name: job[name] for name in names} | {
            "cpu": int(limits["total"]) + 10,
            # seconds of a core that the tests may take for themselves between two answers
            "think": limits["wall"] + _GRACE,
            "memory": limits["referee_memory"],
            "json_args": job["language"] == "cpp",
        }
        writer.write(json.dumps(message).encode() + b"\n")
        await _relay(reader, writer, candidate, trial, len(job["tests"]))
    finally:
        candidate.drop()
        if writer is not None:
            writer.close()


async def _relay(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    candidate: _Candidate,
    trial: Trial,
    num_tests: int,
) -> None:
    """Carry calls to the candidate and answers back, until the referee is done."""
    num_calls, patience = 0, candidate.pool.patience
    while True:  # a hanging test ends at its own alarm; the time-out is for one that has none
        try:
            async with asyncio.timeout(patience * (candidate.job["limits"]["wall"] + 2 * _GRACE)):
                message = _parse(await reader.readline())
        except (TimeoutError, ValueError, OSError):
            message = None
        if (
            message is None
        ):  # its process ended, or does not: after a reply that is the reply's doing
            if not num_calls:
                trial.error = "the tests ended or hung before they called the candidate"
            elif len(trial.tests) < num_tests:
                why = "a value that the tests choked on"
                trial.tests.append({"outcome": "wrong", "share": 0.0, "why": why})
            return
        if "call" in message:
            num_calls += 1
            writer.write(await candidate.answer(message))
        elif "test" in message:
            outcome, why = message["outcome"], message["why"]
            if outcome == "error":
                trial.error = why
            elif outcome not in ("pass", "wrong", "timeout"):
                trial.error = f"a referee's outcome was {outcome!r:.100}"
            else:
                trial.tests.append({"outcome": outcome, "share": message["share"], "why": why})
        else:
            trial.error = trial.error or message.get("error", "")
            return
