"""What boxes write where they have no file system of their own: the rungs `rlimits` and `unsafe`.

A limit on each file bounds nothing, and neither does a look at a folder: files without a name count as
long as a process has them open. The folders of a launcher that was killed go when the next one starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterable, Iterator

from r1fast.rewards.sandbox_usage import status_of

MAX_ENTRIES, MAX_DEPTH = 10_000, 40
MAX_HIDDEN = 3  # looks in a row
_PREFIX = "r1fast-boxes-"


def make_work_folder() -> tuple[str, int]:
    """(a folder for boxes, the descriptor of its lock, which ends with this process)."""
    remove_stale()
    folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.chmod(folder, 0o711)
    return folder, lock


def remove_stale() -> None:
    """Remove the folders of launchers that were killed: gone from /proc, and their lock is free."""
    with os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            pid = entry.name.removeprefix(_PREFIX).partition("-")[0]
            if not entry.name.startswith(_PREFIX) or not pid.isdigit():
                continue
            if os.path.exists(f"/proc/{pid}"):
                continue
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_uid != os.geteuid():
                    continue
                lock = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:  # another container may share the folder, and has other pids
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(entry.path, ignore_errors=True)
                finally:
                    os.close(lock)


def shared_folders() -> list[str]:
    """Where every user may write: temporary folders, and what else is near the root."""
    found = ["/tmp", "/var/tmp", "/dev/shm"]
    for top, names, _ in os.walk("/"):
        with contextlib.suppress(OSError):
            mode = os.lstat(top).st_mode
            if stat.S_ISDIR(mode) and mode & stat.S_IWOTH and top not in found:
                found.append(top)
        deep = top.count("/") >= 3 or top in found or top in ("/proc", "/sys")
        names[:] = [] if deep else names
    return [os.path.realpath(folder) for folder in found if os.path.isdir(folder)]


def owned(folders: Iterable[str], uid: int) -> Iterator[os.DirEntry]:
    """What this user has directly in `folders`."""
    for folder in folders:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_uid == uid:
                        yield entry


def sweep_files(folders: Iterable[str], uid: int | None) -> None:
    """Remove what a program left in shared folders."""
    for entry in owned(folders, uid) if uid is not None else ():
        with contextlib.suppress(OSError):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


def holds_more(
    most: int,
    folder: str,
    shared: Iterable[str],
    uid: int | None,
    pids: Iterable[int],
    hidden: dict[int, int],
) -> bool:
    """Whether a box has more than `most` bytes of files: in its folder, in `shared`, or open.

    Also where it has so many of them, or so deep, that counting would take long; and where one of
    its processes hides what it has open. `hidden` counts for how many looks in a row each did, and is
    kept between them: a process that has become this user and not yet started its program does too.
    """
    if not os.path.isdir(folder):
        return False
    seen: set[tuple[int, int]] = set()
    todo = [(folder, 0)]
    size = 0

    def add(found: os.stat_result) -> None:
        nonlocal size
        if (found.st_dev, found.st_ino) not in seen:
            seen.add((found.st_dev, found.st_ino))
            size += found.st_blocks * 512

    for entry in owned(shared, uid) if uid is not None else ():
        with contextlib.suppress(OSError):
            add(entry.stat(follow_symlinks=False))
            if entry.is_dir(follow_symlinks=False):
                todo.append((entry.path, 1))
    while todo:
        at, depth = todo.pop()
        with contextlib.suppress(OSError), os.scandir(at) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    add(entry.stat(follow_symlinks=False))
                    if entry.is_dir(follow_symlinks=False):
                        todo.append((entry.path, depth + 1))
                if size > most or len(seen) > MAX_ENTRIES:
                    return True
        if depth > MAX_DEPTH:
            return True
    with _as_user(uid):
        for pid in pids:
            try:
                for found in _nameless(pid):
                    add(found)
                hidden.pop(pid, None)
            except OSError as error:  # it has ended, or has yet to become this user
                if isinstance(error, PermissionError) and _is_of(pid, uid):
                    hidden[pid] = hidden.get(pid, 0) + 1
                    if hidden[pid] >= MAX_HIDDEN:
                        return True
            if size > most:
                return True
    return False


def _is_of(pid: int, uid: int | None) -> bool:
    """Whether it runs as this user; one that ends has no memory any more, and hides by that."""
    try:
        status = status_of(pid)
    except OSError:
        return False
    return "VmSize" in status and status["Uid"].split()[0] == str(uid)


def _nameless(pid: int) -> Iterator[os.stat_result]:
    """Files without a name that a process has open or mapped."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(f"/proc/{pid}/fd/{name}")
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 0:
                yield found
    with open(f"/proc/{pid}/maps", "rb") as lines:
        for line in lines:
            if line.endswith(b" (deleted)\n") and b"/dev/zero" not in line:
                span, _, _, device, inode = line.split()[:5]
                low, _, high = span.partition(b"-")
                major, _, minor = device.partition(b":")
                size = int(high, 16) - int(low, 16)
                number = os.makedev(int(major, 16), int(minor, 16))
                # what is mapped is what can be known of it here
                yield os.stat_result((0, int(inode), number, 0, 0, 0, size, 0, 0, 0),
                                     {"st_blocks": size // 512})  # fmt: skip


@contextlib.contextmanager
def _as_user(uid: int | None) -> Iterator[None]:
    """With the file rights of a box: root without the right to trace may not look into others."""
    if uid is None:
        yield
        return
    libc = ctypes.CDLL(None)
    groups, users = libc.setfsgid(uid), libc.setfsuid(uid)
    try:
        yield
    finally:
        libc.setfsuid(users)
        libc.setfsgid(groups)


def guard(folder: str, uids: Iterable[int], lock: int) -> None:
    """Fork a process that outlives this one, ends what runs under `uids` and removes `folder`.

    For rungs whose boxes do not end with their launcher when that is killed. `lock` is the descriptor
    that reserves the uids: it is held until that is done, so that no new launcher's boxes have them.
    """
    uids = list(uids)
    reader, _writer = os.pipe()  # the writer stays open until this process ends
    pid = os.fork()
    if pid:
        os.close(reader)
        return
    try:
        os.setsid()
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        os.dup2(lock, 1)
        os.dup2(reader, 0)
        os.closerange(2, 1 << 16)
        while os.read(0, 1):
            pass
        for uid in uids:
            kill_user(uid)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os._exit(0)


def kill_user(uid: int) -> None:
    """SIGKILL to all that runs under this uid, at once: nothing can fork away from it."""
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(uid, uid, uid)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)
