"""Confines the process that it is and becomes another program. Never imported; run as a script.

The lower rungs of the ladder, for machines without bubblewrap. argv[1] is JSON:

    namespaces: user, mount, pid, net, ipc, uts and cgroup namespaces, a root of their own (pivot_root)
    landlock: the kernel's own file access rules (no write outside `work`, no read outside `read`)
    filter: base64 of a seccomp program;  work: the folder to work in;  tmpfs: its size in bytes
    read: folders to see;  argv: what to become
"""

import base64
import ctypes
import json
import os
import struct
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_ALL = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DEVICES = "null zero full random urandom".split()
NUMBERS = {"x86_64": (155, 317), "aarch64": (41, 277)}  # pivot_root, seccomp
LANDLOCK = 444  # create_ruleset, and the two after it, everywhere
READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read file, read folder


def main():
    job = json.loads(sys.argv[1])
    parent = os.getppid()
    call(LIBC.prctl, 1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != parent:
        os._exit(1)
    os.umask(0o077)
    if job["namespaces"]:
        enter_namespaces(job)
    else:
        os.setsid()
    os.chdir(job["work"])
    call(LIBC.prctl, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if job["landlock"]:
        landlock(job)
    if job["filter"]:
        seccomp(base64.b64decode(job["filter"]))
    os.execve(job["argv"][0], job["argv"], {"PATH": "/usr/bin", "PYTHONHASHSEED": "0"})


def call(function, *args):
    outcome = function(*args)
    if outcome == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{getattr(function, '__name__', 'call')}: {os.strerror(number)}")
    return outcome


def mount(source, target, kind, flags, options=None):
    texts = [None if t is None else str(t).encode() for t in (source, target, kind)]
    call(LIBC.mount, *texts, ctypes.c_ulong(flags), None if options is None else options.encode())


def enter_namespaces(job):
    uid, gid = os.getuid(), os.getgid()
    call(LIBC.unshare, NEW_ALL)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    watch(os.fork())  # what follows is the first process of the new namespace
    call(LIBC.prctl, 1, 9, 0, 0, 0)
    build_root(job)
    LIBC.sethostname(b"box", 3)
    os.setsid()
    watch(os.fork())
    header = struct.pack("<II", 0x20080522, 0)  # no capabilities in the new namespace
    call(LIBC.capset, header, bytes(24))


def watch(child):
    """In the parent: wait for `child`, reap what is orphaned, end as it does. Returns in the child."""
    if child == 0:
        return
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # hold no pipe open
        os.dup2(null, standard)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def build_root(job):
    mount(None, "/", None, REC | PRIVATE)
    root = "/tmp"
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    for name in ("proc", "dev", "tmp", "old"):
        os.mkdir(f"{root}/{name}")
    for path in job["read"]:
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path):
            os.makedirs(root + path, exist_ok=True)
            mount(path, root + path, None, BIND | REC)
            kept = os.statvfs(path).f_flag & (NOSUID | NODEV | NOEXEC | 1024 | 2048)
            mount(None, root + path, None, REMOUNT | BIND | RDONLY | kept | NOSUID)
    for name in DEVICES:
        os.close(os.open(f"{root}/dev/{name}", os.O_CREAT | os.O_WRONLY, 0o666))
        mount(f"/dev/{name}", f"{root}/dev/{name}", None, BIND)
    os.symlink("/proc/self/fd", f"{root}/dev/fd")
    os.symlink("/proc/self/fd/0", f"{root}/dev/stdin")
    os.symlink("/proc/self/fd/1", f"{root}/dev/stdout")
    mount("tmpfs", f"{root}/tmp", "tmpfs", NOSUID | NODEV, f"size={job['tmpfs']},mode=700")
    try:
        mount("proc", f"{root}/proc", "proc", NOSUID | NODEV | NOEXEC)
    except OSError:
        pass  # an outer container hides parts of its own /proc: then there is none here
    os.chdir(root)
    call(LIBC.syscall, NUMBERS[os.uname().machine][0], b".", b"old")
    os.chdir("/")
    call(LIBC.umount2, b"/old", 2)
    os.rmdir("/old")
    mount(None, "/", None, REMOUNT | BIND | RDONLY | NOSUID | NODEV)


def landlock(job):
    version = LIBC.syscall(LANDLOCK, None, ctypes.c_size_t(0), 1)
    # rights of files by version of the kernel's interface: 13, refer, truncate, -, ioctl on devices
    num_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    handled = (1 << num_rights) - 1
    network, scoped = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = call(
        LIBC.syscall,
        LANDLOCK,
        struct.pack("<QQQ", handled, network, scoped),
        ctypes.c_size_t(size),
        0,
    )
    own = handled & ~(1 << 6 | 1 << 11)  # no device files
    allowed = [(path, READ) for path in job["read"]] + [(job["work"], own)]
    allowed += [("/proc", READ)] * job["namespaces"]
    write = handled & (1 << 1 | 1 << 2 | 1 << 14)
    allowed += [(f"/dev/{name}", write) for name in DEVICES]
    for path, rights in allowed:
        try:
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rule = struct.pack("<Qi", rights, folder)
        call(LIBC.syscall, LANDLOCK + 1, rules, 1, rule, 0)
        os.close(folder)
    call(LIBC.syscall, LANDLOCK + 2, rules, 0)
    os.close(rules)


def seccomp(program):
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    call(LIBC.syscall, NUMBERS[os.uname().machine][1], 1, 0, header)


if __name__ == "__main__":
    main()
