"""Which isolation this machine can give, best first, and the command that starts a box under it.

    bwrap       bubblewrap (namespaces, an empty root, no capabilities) + seccomp + cgroup + a uid a slot
    namespaces  the same namespaces made by confine.py + Landlock + seccomp + cgroup + a uid a slot
    rlimits     resource limits + a uid a slot + seccomp (+ Landlock where the kernel has it); needs root
    unsafe      resource limits only; programs run as this user. Only where it is allowed by name

A part that a rung merely profits from (cgroup, slot uid) may be missing; what is there is said.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from r1fast.rewards.sandbox import find_compiler
from r1fast.rewards.sandbox_cgroup import CgroupTree
from r1fast.rewards.sandbox_files import make_work_folder, shared_folders
from r1fast.rewards.sandbox_filter import seccomp_program

RUNGS = ("bwrap", "namespaces", "rlimits", "unsafe")
MAX_SLOTS = 255
TMPFS_BYTES = 64 << 20
NUM_PROCESSES = 64  # of a box, threads counted
_FIRST_UID, _LAST_UID = 30_000, 60_000
_CONFINE = Path(__file__).with_name("confine.py")
_FILTER_FD = 3


class NoSandbox(RuntimeError):
    """No rung of the ladder can be stood on, with the reason for each."""


@dataclass(slots=True)
class Host:
    """What this machine has. Made once, in the launcher."""

    python: str  # inside the boxes
    read: list[str]  # folders that a box sees
    compiler: str  # g++, or ""
    filter: bytes  # seccomp program, or b""
    cgroups: CgroupTree | None
    first_uid: int | None  # of the slots; None where this is not root
    landlock: bool
    why: dict[str, str] = field(default_factory=dict)  # a part that is missing: the reason
    lock: socket.socket | None = None  # holds the block of uids
    nice: int = 0  # of boxes

    @property
    def shares_cores(self) -> bool:
        """Whether a box has a share of the cores, however many processes it has."""
        return self.cgroups is not None and self.cgroups.has_cpu


def look_around(use_cgroups: bool = True) -> Host:
    why: dict[str, str] = {}
    root = os.geteuid() == 0
    lock, first_uid = _reserve_uids() if root else (None, None)
    if first_uid is None:
        why["slot uid"] = "no free block of uids" if root else "not root"
    try:
        program = seccomp_program()
    except ValueError as error:
        program, why["seccomp"] = b"", str(error)
    cgroups = None
    try:
        if use_cgroups:
            cgroups = CgroupTree()
        else:
            why["cgroup"] = "not wanted"
    except (ValueError, OSError) as error:
        why["cgroup"] = str(error)
    if cgroups is not None and not cgroups.has_cpu:
        why["cgroup of cores"] = "not delegated"
    libc = ctypes.CDLL(None, use_errno=True)
    landlock = libc.syscall(444, None, ctypes.c_size_t(0), 1) >= 1
    if not landlock:
        why["landlock"] = "the kernel has none"
    python, prefix = _find_python(everyone=first_uid is not None)
    read = ["/usr", *(p for p in ("/lib", "/lib64", "/lib32", "/bin") if os.path.exists(p))]
    if prefix and not Path(prefix).is_relative_to("/usr"):
        read.append(prefix)
    return Host(
        python=python, read=read, compiler=find_compiler(),
        filter=program, cgroups=cgroups, first_uid=first_uid, landlock=landlock, why=why, lock=lock,
    )  # fmt: skip


def _reserve_uids() -> tuple[socket.socket | None, int | None]:
    """A block of uids that neither a user of this machine nor another launcher has.

    The lock is a name in the abstract socket space, which the kernel frees with the process.
    """
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    for first in range(_FIRST_UID, _LAST_UID, MAX_SLOTS + 1):
        if taken & set(range(first, first + MAX_SLOTS + 1)):
            continue
        lock = socket.socket(socket.AF_UNIX)
        try:
            lock.bind(f"\0r1fast-sandbox-{first}")
            return lock, first
        except OSError:
            lock.close()
    return None, None


def _find_python(everyone: bool) -> tuple[str, str]:
    """(interpreter, its prefix) for the boxes: this one where a slot's uid may reach it."""
    own = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
    tried = []
    for path in (own, "/usr/bin/python3", "/usr/local/bin/python3"):
        real = os.path.realpath(path)
        if not os.path.exists(real):
            continue
        parents = [str(parent) for parent in Path(real).parents]
        if everyone and not all(os.stat(parent).st_mode & 0o001 for parent in parents):
            tried.append(f"{real}: in a folder that only its owner may enter")
            continue
        question = "import sys; print(sys.version_info >= (3, 10), sys.base_prefix)"
        done = subprocess.run(
            [real, "-I", "-S", "-c", question], capture_output=True, text=True, env={}
        )
        good, _, prefix = done.stdout.strip().partition(" ")
        if good == "True":
            return real, prefix
        tried.append(f"{real}: {done.stderr.strip()[-200:] or 'older than Python 3.10'}")
    raise NoSandbox(
        "no Python for the sandbox that every user may run (" + "; ".join(tried) + "); "
        "install one in /usr/bin or /usr/local/bin"
    )


@dataclass(slots=True)
class Rung:
    """One way to start boxes."""

    name: str
    host: Host
    options: list[str] = field(default_factory=list)  # of bwrap
    work: str = ""  # where rlimits and unsafe make their folders
    work_lock: int = -1
    shared: list[str] = field(default_factory=list)  # folders that boxes can write into

    @property
    def own_pids(self) -> bool:
        return self.name in ("bwrap", "namespaces")

    @property
    def alone(self) -> bool:
        """Whether a signal to everything that a box can reach stays in the box."""
        return self.own_pids or (self.name == "rlimits" and self.host.first_uid is not None)

    def parts(self) -> list[str]:
        host = self.host
        parts = {
            "bwrap": ["bubblewrap"], "namespaces": ["namespaces"], "rlimits": [], "unsafe": [],
        }[self.name]  # fmt: skip
        if self.name != "unsafe":
            parts += ["seccomp"] if host.filter else []
            parts += ["Landlock"] if host.landlock and self.name != "bwrap" else []
            parts += ["slot uid"] if host.first_uid is not None else []
        parts += [f"cgroup v{host.cgroups.version}"] if host.cgroups else []
        return [*parts, "rlimits"]

    def describe(self) -> str:
        missing = [f"no {part} ({reason})" for part, reason in self.host.why.items()]
        return f"{self.name}: {' + '.join(self.parts())}" + "".join(f"; {m}" for m in missing)

    def command(self, argv: list[str], folder: str) -> list[str]:
        """What to execute for a box that runs `argv`; descriptor 3 is the filter (bwrap)."""
        if self.name == "bwrap":
            return [*self.options, *argv]
        if self.name == "unsafe":
            return argv
        namespaces = self.name == "namespaces"
        job = {
            "namespaces": namespaces,
            "landlock": self.host.landlock,
            "filter": base64.b64encode(self.host.filter).decode(),
            "work": "/tmp" if namespaces else folder,
            "tmpfs": TMPFS_BYTES,
            "read": self.host.read,
            "argv": argv,
        }
        # a script in a folder that the slot's uid cannot enter would not be found: it goes as text
        return [self.host.python, "-I", "-S", "-c", _CONFINE.read_text(), json.dumps(job)]


def rung_of(name: str, host: Host) -> Rung:
    """The rung `name` on this host; ValueError says which part is missing."""
    if name == "unsafe":
        return _with_folder(Rung(name, host))
    if not host.filter:
        raise ValueError(host.why["seccomp"])
    if name == "bwrap":
        return Rung(name, host, options=_bwrap_options(host))
    if name == "rlimits":
        if host.first_uid is None:
            raise ValueError(f"needs a uid for each slot: {host.why['slot uid']}")
        return _with_folder(Rung(name, host, shared=[] if host.landlock else shared_folders()))
    return Rung(name, host)


def _with_folder(rung: Rung) -> Rung:
    rung.work, rung.work_lock = make_work_folder()
    return rung


def _bwrap_options(host: Host) -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise ValueError("bubblewrap is not installed (apt-get install bubblewrap)")
    known = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    options = [
        program, "--seccomp", str(_FILTER_FD), "--unshare-all", "--unshare-user", "--die-with-parent",
        "--new-session", "--cap-drop", "ALL", "--clearenv", "--setenv", "PATH", "/usr/bin",
        "--setenv", "PYTHONHASHSEED", "0", "--hostname", "box",
    ]  # fmt: skip
    if "--disable-userns" in known:  # the filter denies new namespaces as well
        options.append("--disable-userns")
    sized = "--size " in known
    if not sized and host.cgroups is None:
        raise ValueError("this bubblewrap cannot bound a tmpfs (0.7 can) and there is no cgroup")
    for path in host.read:
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        else:
            options += ["--ro-bind", path, path]
    options += ["--proc", "/proc", "--dev", "/dev"]
    options += ["--size", str(TMPFS_BYTES)] * sized + ["--tmpfs", "/tmp"]
    options += ["--size", str(1 << 20)] * sized + ["--tmpfs", "/dev/shm"]
    return [*options, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]


def remove_work(rung: Rung) -> None:
    if rung.work:
        with contextlib.suppress(OSError):
            shutil.rmtree(rung.work)
