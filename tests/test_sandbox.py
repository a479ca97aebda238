"""The sandbox of code rewards: attacks are judged from outside, on every rung that this machine has."""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1fast.rewards.code_problem import read_code_problem
from r1fast.rewards.sandbox import Sandbox, SandboxUnavailable, find_compiler
from r1fast.rewards.sandbox_box import Box, BoxStarved, Deadline
from r1fast.rewards.sandbox_filter import DENIED, seccomp_program
from r1fast.rewards.sandbox_usage import LOOK_SECONDS, Meter, Thread, Usage

ROOT = Path(__file__).parents[1]
ATTACKS = json.loads((ROOT / "tests/fixtures/sandbox_attacks.json").read_text())
BY_ID = {attack["id"]: attack for attack in ATTACKS}
EXPECTED = "THE EXPECTED"
SECRET = "SECRET-of-the-trainer"
LIMITS = {"timeout": 1.0, "total_timeout": 20.0, "memory_mib": 256, "stop_early": True}
HOST_FILES = [
    "/lab_w", "/etc/lab_w", "/usr/lab_w", "/root/r1fast_w", "/var/lab_w", "/home/lab_w",
    "/dev/shm/lab_w", "/zz",
]  # fmt: skip
# kept for the rung that has everything; each takes a time-out or says what only namespaces give
LONG = {a["id"] for a in ATTACKS if a["category"] in ("dos", "parse", "hack")}


def rung(name, **options):
    sandbox = Sandbox(rung=name, **options)
    try:
        sandbox.start()
    except SandboxUnavailable as error:
        sandbox.close()
        pytest.skip(f"THIS MACHINE CANNOT HAVE THE RUNG {name}: {error}")
    return sandbox


def program(code, language="python", output=EXPECTED, **columns):
    problem = read_code_problem(
        {"tests": [{"input": "", "output": output}], "programming_language": language, **columns}
    )
    return {**problem.job(code, **LIMITS), "keep_output": True}


def outcome(result):
    return [test["outcome"] for test in result.tests]


def slot_processes():
    """Of the uids that boxes have."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if 30_000 <= os.stat(f"/proc/{name}").st_uid < 60_000:
                found.append(int(name))
    return found


def family(pid):
    """`pid` and everything below it."""
    children = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(name))
    found, at = [pid], 0
    while at < len(found):
        found += children.get(found[at], [])
        at += 1
    return found


def running(pids):
    """Those that are there and no zombies."""
    left = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                left.append(pid)
    return left


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return met


class Host:
    """What attacks reach for: listeners, files, a secret. And what came of it."""

    def __init__(self, folder):
        self.folder = folder
        self.listeners = []
        for family_, address in (
            (socket.AF_INET, ("127.0.0.1", 18999)),
            (socket.AF_UNIX, "/tmp/r1fast_probe/u.sock"),
            (socket.AF_UNIX, "\0lababs"),
        ):
            listener = socket.socket(family_)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):  # another test run has the port
                listener.bind(address)
                listener.listen()
            listener.setblocking(False)
            self.listeners.append(listener)
        os.chmod("/tmp/r1fast_probe/u.sock", 0o777)

    def connections(self):
        count = 0
        for listener in self.listeners:
            with contextlib.suppress(OSError):
                listener.accept()[0].close()
                count += 1
        return count

    def close(self):
        for listener in self.listeners:
            listener.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    probe = Path("/tmp/r1fast_probe")
    probe.mkdir(exist_ok=True)
    (probe / "u.sock").unlink(missing_ok=True)
    (probe / "secret.txt").write_text(SECRET)
    (probe / "public_answers.txt").write_text(EXPECTED)
    os.environ["SECRET_TOKEN"] = SECRET
    host = Host(probe)
    yield host
    host.close()
    del os.environ["SECRET_TOKEN"]
    for path in probe.iterdir():
        path.unlink()
    probe.rmdir()


def available_mib():
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if "MemAvail" in x)
    return int(line.split()[1]) / 1024


@pytest.fixture(scope="module")
def attacked(host):
    """Every attack, eight at a time, on the best rung: (results by id, what was seen outside)."""
    before = available_mib()
    with rung("bwrap", num_slots=8, num_spare=0) as sandbox:
        futures = {
            a["id"]: sandbox.submit(program(a["code"], a.get("language", "python")))
            for a in ATTACKS
            if a.get("language") != "cpp" or find_compiler()
        }
        lowest = before
        while not all(future.done() for future in futures.values()):
            lowest = min(lowest, available_mib())
            time.sleep(0.05)
        results = {name: future.result() for name, future in futures.items()}
        after = sandbox.submit(program("print('fine')", output="fine")).result()
        launcher = sandbox._launcher._process.pid
        quiet = until(lambda: not running(set(slot_processes()) & set(family(launcher))))
        seen = {
            "used_mib": before - lowest,
            "files": [p for p in HOST_FILES if os.path.exists(p)],
            "left": [p for d in ("/tmp", "/var/tmp", "/dev/shm")
                     for p in Path(d).glob("r1fast_left_*")],
            "connections": host.connections(),
            "after": after,
            "quiet": quiet,
            "restarts": sandbox.num_restarts,
        }  # fmt: skip
    return results, seen


@pytest.mark.parametrize("name", list(BY_ID))
def test_attack_is_contained(attacked, name):
    results, _ = attacked
    attack = BY_ID[name]
    if name not in results:
        pytest.skip("needs g++")
    result = results[name]
    assert result.error == "", "what a program does is never our failure"
    assert "pass" not in outcome(result)
    assert SECRET not in "".join(result.outputs)
    if "says" in attack:
        assert result.outputs == [f"ok: {attack['says']}\n"]


def test_nothing_of_the_attacks_is_seen_outside(attacked):
    _, seen = attacked
    assert seen["files"] == []
    assert seen["left"] == []
    assert seen["connections"] == 0
    assert seen["quiet"], "processes are left"
    assert seen["restarts"] == 0
    assert outcome(seen["after"]) == ["pass"]
    # eight boxes of 256 MiB, each with its files and its harness; compilers have 2 GiB
    assert seen["used_mib"] < 8 * (256 + 96 + 64) + 2 * 2048


def number(result):
    return int(result.outputs[0].split()[-1])


def test_bounds_of_what_attacks_got(attacked):
    results, _ = attacked
    assert number(results["fork_bomb"]) <= 64
    assert number(results["disk_fill"]) <= 64  # MiB
    assert number(results["disk_fill_root_tmpfs"]) == 0
    assert number(results["shm_fill"]) <= 1
    assert number(results["fd_exhaust"]) <= 256
    assert number(results["shared_memory"]) <= 256
    assert "GOT 2G" not in "".join(results["mem_bomb"].outputs)
    assert results["output_flood"].outputs[0].startswith("output: ")
    assert len(results["output_flood"].outputs[0]) <= (1 << 20) + 10
    assert results["stderr_flood"].outputs == ["ok: DONE\n"]
    assert number(results["kill_all"]) <= 4  # processes in sight
    assert number(results["signal_every_pid"]) <= 4
    for name in ("infinite_loop", "sleep_forever", "ignore_sigterm", "ignore_xcpu", "fork_cascade",
                 "stop_the_harness"):  # fmt: skip
        assert outcome(results[name]) == ["timeout"], name
    for name in ("nul_in_code", "surrogate_in_code", "minus_bomb", "nested_parentheses"):
        assert results[name].loaded == "unparseable", name
    if find_compiler():
        for name in ("cpp_reads_host", "cpp_includes_zero", "cpp_incbin", "cpp_incbin_zero",
                     "cpp_includes_itself", "cpp_template_bomb", "cpp_huge_object"):  # fmt: skip
            assert results[name].loaded in ("unparseable", "timeout"), name
        assert results["cpp_32_bit_calls"].outputs[0].startswith("signal 31")


@pytest.mark.parametrize("name", ["namespaces", "rlimits"])
def test_lower_rungs(host, name):
    """What leaves, reads, connects, signals or escapes; the long ones are the same limits."""
    with rung(name, num_slots=8, num_spare=0) as sandbox:
        info = sandbox.start()
        assert info.rung == name
        assert "seccomp" in info.parts
        futures = {
            a["id"]: sandbox.submit(program(a["code"]))
            for a in ATTACKS
            if a["id"] not in LONG and a.get("language", "python") == "python"
        }
        results = {key: future.result() for key, future in futures.items()}
        after = sandbox.submit(program("print('fine')", output="fine")).result()
        launcher = sandbox._launcher._process.pid
        assert until(lambda: not running(set(slot_processes()) & set(family(launcher))))
    assert len(results) > 15
    for key, result in results.items():
        assert result.error == "", key
        assert "pass" not in outcome(result), key
        assert SECRET not in "".join(result.outputs), key
        if "says" in BY_ID[key]:
            assert result.outputs == [f"ok: {BY_ID[key]['says']}\n"], key
    assert outcome(after) == ["pass"]
    assert host.connections() == 0
    assert not [p for p in HOST_FILES if os.path.exists(p)]
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        assert not list(Path(folder).glob("r1fast_left_*"))
    assert not list(Path("/tmp").glob("r1fast-boxes-*")), "its folders are gone"


def test_memory_without_cgroups(host):
    with rung("auto", num_slots=2, num_spare=0, cgroups=False) as sandbox:
        assert "no cgroup (not wanted)" in sandbox.start().description
        before = lowest = available_mib()
        future = sandbox.submit(program(BY_ID["forked_memory"]["code"]))
        while not future.done():
            lowest = min(lowest, available_mib())
            time.sleep(0.02)
        assert future.result().error == ""
        assert "pass" not in outcome(future.result())
        # 20 processes of 200 MiB; between two looks they may grow
        assert before - lowest < 2000
        assert outcome(sandbox.submit(program("print('fine')", output="fine")).result()) == ["pass"]


AS_NOBODY = """
import sys
sys.path.append(sys.argv[1])
from r1fast.rewards.code_problem import read_code_problem
from r1fast.rewards.sandbox import Sandbox
limits = dict(timeout=1.0, total_timeout=9.0, memory_mib=256, stop_early=True)
problem = read_code_problem({"tests": [{"input": "", "output": "x"}]})
with Sandbox(num_slots=2) as sandbox:
    print(sandbox.start().rung)
    for code in sys.argv[2:]:
        result = sandbox.submit({**problem.job(code, **limits), "keep_output": True}).result()
        print(result.error, *result.outputs)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="is not root and cannot become another user")
def test_a_user_without_rights_has_a_sandbox_too():
    python, nobody = "/usr/bin/python3", 23_456
    reachable = all(os.stat(folder).st_mode & 0o001 for folder in (ROOT / "r1fast").parents)
    known = subprocess.run(
        [python, "-c", "import sys; print(sys.version_info >= (3, 11))"],
        capture_output=True, text=True, check=False,
    ) if os.path.exists(python) else None  # fmt: skip
    if not reachable or known is None or known.stdout.strip() != "True":
        pytest.skip("needs Python 3.11 in /usr/bin and a tree that everybody may read")
    codes = [BY_ID["fork_bomb"]["code"], BY_ID["syscalls"]["code"], "import os; print(os.getuid())"]
    done = subprocess.run(
        [python, "-B", "-c", AS_NOBODY, str(ROOT), *codes],
        capture_output=True, text=True, user=nobody, group=nobody, extra_groups=[], cwd="/",
        timeout=100, env={"PATH": "/usr/bin:/bin"}, check=False,
    )  # fmt: skip
    if "no sandbox on this machine" in done.stderr:
        pytest.skip(f"A USER WITHOUT RIGHTS HAS NO SANDBOX HERE: {done.stderr[-300:]}")
    rung_, forks, calls, uid = filter(str.strip, done.stdout.splitlines())
    assert rung_ in ("bwrap", "namespaces")
    assert int(forks.split()[-1]) <= 64
    assert calls.strip() == "ok: DONE []"
    assert uid.strip() == f"ok: {nobody}"


def test_the_ladder_ends_in_a_refusal():
    with (
        pytest.raises(SandboxUnavailable, match="allow_unsafe_sandbox = true"),
        Sandbox(rung="unsafe") as sandbox,
    ):
        sandbox.start()
    with pytest.raises(ValueError, match="sandbox must be auto or one of bwrap, namespaces"):
        Sandbox(rung="docker")
    with Sandbox(rung="unsafe", allow_unsafe=True, num_slots=1) as sandbox:
        info = sandbox.start()
        assert (info.rung, info.level) == ("unsafe", 3)
        assert outcome(sandbox.submit(program("print('fine')", output="fine")).result()) == ["pass"]
        slow = sandbox.submit(program(BY_ID["sleep_forever"]["code"])).result()
        assert outcome(slow) == ["timeout"]


CHILD = """
import json, sys
from r1fast.rewards.code_problem import read_code_problem
from r1fast.rewards.sandbox import Sandbox
sandbox = Sandbox(rung=sys.argv[1], num_slots=4)
sandbox.start()
limits = dict(timeout=60.0, total_timeout=100.0, memory_mib=256, stop_early=True)
job = read_code_problem({"tests": [{"input": "", "output": "x"}]}).job
for code in ("while True: pass", "import time; time.sleep(60)",
             "import os, time\\nif os.fork() == 0:\\n os.setsid()\\n os.fork()\\n time.sleep(90)\\ntime.sleep(90)"):
    sandbox.submit(job(code, **limits))
calls = read_code_problem({"tests": ["assert f(1) == 1"]})
sandbox.submit(calls.job("def f(x):\\n while True: pass", **limits))
print(sandbox._launcher._process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["bwrap", "namespaces", "rlimits"])
@pytest.mark.parametrize("also_launcher", [False, True])
def test_kill_9_leaves_no_orphans(name, also_launcher):
    rung(name, num_slots=1).close()
    trainer = subprocess.Popen(
        [sys.executable, "-c", CHILD, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    launcher = int(trainer.stdout.readline())

    # bubblewrap or confine.py, the harness and the program of four boxes, and the referee's
    assert until(lambda: len(family(launcher)) >= (10 if name == "rlimits" else 15), 20)
    time.sleep(0.3)
    everything = family(launcher)
    os.kill(trainer.pid, signal.SIGKILL)
    if also_launcher:
        os.kill(launcher, signal.SIGKILL)
    trainer.wait()
    assert until(lambda: not running(everything), 10), running(everything)
    assert until(lambda: not list(Path("/tmp").glob(f"r1fast-boxes-{launcher}-*")))
    trainer.stdin.close()
    trainer.stdout.close()


def test_folders_of_killed_launchers_go_when_the_next_one_starts():
    done = subprocess.Popen(["/bin/true"])
    done.wait()
    stale, held = (Path(f"/tmp/r1fast-boxes-{done.pid}-{name}") for name in ("stale", "held"))
    for folder in (stale, held):
        (folder / "box").mkdir(parents=True)
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as a launcher in another container has it
    try:
        with rung("rlimits", num_slots=1):
            assert not stale.exists()
            assert held.exists()
    finally:
        os.close(lock)
        shutil.rmtree(held)
        shutil.rmtree(stale, ignore_errors=True)


# what one box does to the others

SPINNERS = """
import os
for _ in range(58):
    if os.fork() == 0:
        try: os.setsid()
        except OSError: pass
        while True: pass
while True: pass
"""
WORK = "s = 0\nfor i in range(6_000_000): s += i * i % 7\n"


@pytest.mark.parametrize(
    ("name", "cgroups"), [("bwrap", True), ("bwrap", False), ("rlimits", False)]
)
def test_a_program_with_many_processes_does_not_make_others_late(name, cgroups):
    calls = read_code_problem(
        {"tests": [{"args": [3], "expected": 9}], "entry_point": "f", "time_limit": 3}
    )
    body = "".join(f"    {line}\n" for line in WORK.splitlines())
    function = calls.job(f"def f(n):\n{body}    return n * n", **LIMITS)
    with rung(name, num_slots=4, cgroups=cgroups) as sandbox:
        attackers = [sandbox.submit(program(SPINNERS, time_limit=8)) for _ in range(3)]
        time.sleep(0.5)
        for job in (function, program(WORK + "print('fine')", output="fine", time_limit=3)):
            result = sandbox.submit(job).result()
            assert (outcome(result), result.error) == (["pass"], "")
        if cgroups:  # elsewhere the pages that so many processes share may count as too much memory
            assert not all(future.done() for future in attackers), "they were to be in the way"
        if not cgroups:  # each of n weighs an nth, where the scheduler does not group by session
            pids = set(slot_processes()) & set(family(sandbox._launcher._process.pid))
            nice = [os.getpriority(os.PRIO_PROCESS, pid) for pid in running(pids)]
            assert sum(n >= 15 for n in nice) >= 3 * 59, nice


def seen(cpu, **threads):
    return Usage(cpu_seconds=cpu, threads={k: Thread(*t) for k, t in threads.items()})


def test_the_clock_of_a_box():
    def own(*looks):
        meter = Meter(0.0)
        for at, cpu, threads in looks:
            meter.look(at, seen(cpu, **threads))
        return meter.own, meter.busy

    asleep = own((1.0, 0, {"a": (0, 0, False)}), (9.0, 0, {"a": (0, 0, False)}))
    assert asleep == (pytest.approx(8 + 2 * LOOK_SECONDS), 0), "before the first look: a moment"
    # it has run for a second, waited for six, and slept for one
    waited = own((0.1, 0, {"a": (0, 0, True)}), (8.1, 1, {"a": (1, 6, False)}))
    assert waited == (pytest.approx(2.1), pytest.approx(1))
    # the kernel counts a wait when it ends
    waits = own((0.1, 0, {"a": (0, 0, True)}), (8.1, 0, {"a": (0, 0, True)}))
    assert waits == (pytest.approx(0.1), 0)
    # two of its own processes wait for each other: the box runs all the time
    itself = own(
        (0.1, 0, {"a": (0, 0, True), "b": (0, 0, True)}),
        (8.1, 8, {"a": (4, 4, True), "b": (4, 4, True)}),
    )
    assert itself == (pytest.approx(8.1), pytest.approx(8))
    # a kernel that does not say how long: who is runnable, and has not had the core
    unknown = own((0.1, 0, {"a": (0, None, True)}), (8.1, 2, {"a": (2, None, True)}))
    assert unknown == (pytest.approx(2.1), pytest.approx(2))
    gone = Meter(0.0)
    gone.look(0.1, None)
    gone.look(5.0, None)
    assert gone.own == pytest.approx(5.0)


def test_a_box_that_never_has_a_core_is_our_failure():
    """Nothing that it did: `error` where even patience ends, and not `timeout`."""

    class Census:
        interval, seen = 0.01, {}

        def look(self):  # runnable, and never runs
            at = time.monotonic()
            return at, {box.pid: seen(0.0, a=(0.0, 0.0, True))}

    async def wait(nice):
        box.slot.nice = nice
        box.reader = asyncio.StreamReader()
        return await box.read_answer(0.2, 1.0, Deadline.within(10.0, 4.0))

    box = Box(SimpleNamespace(nice=0, uid=None), Census(), 4.0)
    start = time.monotonic()
    with pytest.raises(BoxStarved, match=r"the machine was too busy: 0\.0 s of a core in 0\.8 s"):
        asyncio.run(wait(0))
    assert time.monotonic() - start >= 0.8
    # where its own processes are why
    assert asyncio.run(wait(18)) is None


def test_time_in_the_queue_does_not_count():
    limits = {**LIMITS, "timeout": 0.5, "total_timeout": 1.0}
    job = read_code_problem({"tests": [{"input": "", "output": "fine"}]}).job
    with rung("auto", num_slots=1) as sandbox:
        slow = [sandbox.submit(job("import time; time.sleep(9)", **limits)) for _ in range(3)]
        after = sandbox.submit(job("print('fine')", **limits))
        assert outcome(after.result()) == ["pass"]
        assert [outcome(future.result()) for future in slow] == [["timeout"]] * 3


# the lower rungs have the host's file system

WRITERS = {
    "files": "open(f'f{i}', 'wb').write(block)",
    "files without a name": "f = open('f', 'wb', 0); os.unlink('f'); kept.append(f); f.write(block)",
    "mapped files": "f = open('f', 'w+b'); f.write(block); f.flush(); os.unlink('f')\n"
    "    kept.append(mmap.mmap(f.fileno(), 0)); f.close()",
    "deep folders": "os.mkdir('d'); os.chdir('d'); open('f', 'wb').write(block)",
}


@pytest.mark.parametrize("way", list(WRITERS))
def test_files_are_bounded_without_a_file_system_of_their_own(way):
    code = f"""
import mmap, os, time
kept, block = [], bytes(10 << 20)
for i in range(40):
    {WRITERS[way]}
    time.sleep(0.05)
print('DONE')
"""
    with rung("rlimits", num_slots=1, num_spare=0) as sandbox:
        result = sandbox.submit(program(code, time_limit=20)).result()
        assert (outcome(result), result.outputs) == (["wrong"], [])
        assert result.tests[0]["why"] == "it took its box down"
        small = code.replace("range(40)", "range(4)")
        assert sandbox.submit(program(small, output="DONE")).result().outputs == ["ok: DONE\n"]


@pytest.mark.parametrize("name", ["bwrap", "rlimits"])
def test_no_word_to_the_host_and_no_other_priority(host, name):
    code = """
import asyncio, os, socket
def failure(work, *args):
    try: return work(*args)
    except OSError as error: return error.errno
one, other = socket.socketpair()
other.close()
path, abstract = '/tmp/r1fast_probe/u.sock', chr(0) + 'lababs'
print([failure(socket.socketpair, socket.AF_UNIX, kind) for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)],
      [failure(one.connect, to) for to in (path, abstract)], failure(one.bind, 'x'),
      [failure(one.sendto, b'x', to) is not None for to in (path, abstract)],
      failure(os.nice, 5), failure(os.sched_setscheduler, 0, os.SCHED_IDLE, os.sched_param(0)),
      failure(os.setsid), asyncio.run(asyncio.sleep(0, 'asyncio')))
"""
    said = "[1, 1] [1, 1] 1 [True, True] 1 1 1 asyncio"
    with rung(name, num_slots=1) as sandbox:
        result = sandbox.submit(program(code, output=said)).result()
    assert result.outputs == [f"ok: {said}\n"]
    assert host.connections() == 0


def test_a_killed_launcher_is_an_error_and_the_next_job_has_a_new_one():
    with rung("bwrap", num_slots=2) as sandbox:
        slow = sandbox.submit(program("import time; time.sleep(60)"))
        launcher = sandbox._launcher._process.pid
        time.sleep(0.2)
        os.kill(launcher, signal.SIGKILL)
        assert slow.result(timeout=10).error == "the sandbox's launcher has ended"
        until(lambda: sandbox._launcher.ended)
        assert outcome(sandbox.submit(program("print('fine')", output="fine")).result()) == ["pass"]
        assert sandbox.num_restarts == 1
    with pytest.raises(RuntimeError, match="the sandbox is closed"):
        sandbox.start()


def test_one_slow_of_64_holds_nobody_up():
    with rung("auto", num_slots=64, num_spare=0) as sandbox:
        job = read_code_problem({"tests": [{"input": "", "output": "x"}]}).job
        limits = {**LIMITS, "timeout": 60.0, "total_timeout": 100.0}
        slow = sandbox.submit(job("import time; time.sleep(90)", **limits))
        quick = [sandbox.submit(program("print('fine')", output="fine")) for _ in range(63)]
        assert all(outcome(future.result(timeout=60)) == ["pass"] for future in quick)
        assert not slow.done()


def test_boxes_are_new_for_every_candidate():
    with rung("auto", num_slots=1) as sandbox:
        first = sandbox.submit(program("open('left','w').write('x'); print('fine')", output="fine"))
        second = sandbox.submit(program("import os; print(os.listdir('.'))", output="[]"))
        assert outcome(first.result()) == outcome(second.result()) == ["pass"]


def test_filter_of_both_machines():
    for machine, socket_call in (("x86_64", 41), ("aarch64", 198)):
        program_ = seccomp_program(machine)
        assert len(program_) % 8 == 0
        numbers = [
            int.from_bytes(program_[i + 4 : i + 8], "little") for i in range(0, len(program_), 8)
        ]
        assert socket_call in numbers
    assert len({numbers[0] for numbers in DENIED.values()}) == len(DENIED)
    with pytest.raises(ValueError, match="no system call filter for 'riscv64'"):
        seccomp_program("riscv64")
