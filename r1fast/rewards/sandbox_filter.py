"""The system calls that a sandboxed program may not make, as a seccomp program (classic BPF).

A list of what is denied, for programs need hundreds of the others: sockets, tracing and other processes'
memory, mounts and namespaces, kernel interfaces with a history of holes (bpf, io_uring, userfaultfd,
perf, keys), memory that no limit of a process counts (System V IPC, memfd), priorities and sessions (a
program that yields to all others would look like one that is kept from running, and where the scheduler
groups by session a new one is another share). Denied calls answer EPERM; clone3 answers ENOSYS, so that
libraries fall back to clone, whose flags can be read. Of sockets there are connected pairs of streams,
which event loops need: the others of a pair can send to any name.
"""

from __future__ import annotations

import errno
import platform
import struct

# name: (x86_64, aarch64); None where the architecture has no such call
DENIED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200),
    "setsid": (112, 157), "setpriority": (141, 140), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "kcmp": (312, 272), "pidfd_getfd": (438, 438), "personality": (135, 92),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "statmount": (457, 457), "listmount": (458, 458), "open_tree_attr": (467, 467),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "swapon": (167, 224), "swapoff": (168, 225),
    "acct": (163, 89), "unshare": (272, 97), "setns": (308, 268),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "shmget": (29, 194), "shmctl": (31, 195), "shmat": (30, 196),
    "semget": (64, 190), "semctl": (66, 191), "semtimedop": (220, 192), "semop": (65, 193),
    "msgget": (68, 186), "msgctl": (71, 187), "msgrcv": (70, 188), "msgsnd": (69, 189),
    "mq_open": (240, 180), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142),
    "syslog": (103, 116), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161),
    "setdomainname": (171, 162), "vhangup": (153, 58), "move_pages": (279, 239),
    "migrate_pages": (256, 238), "iopl": (172, None), "ioperm": (173, None),
    "modify_ldt": (154, None), "uselib": (134, None), "lookup_dcookie": (212, 18),
}  # fmt: skip
# column, AUDIT_ARCH, and the numbers of clone, ioctl and socketpair
_MACHINES = {
    "x86_64": (0, 0xC000003E, 56, 16, 53),
    "aarch64": (1, 0xC00000B7, 220, 29, 199),
}
_CLONE3 = 435
_NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW* that clone takes
_TERMINAL_INPUT = (0x5412, 0x541C)  # ioctl TIOCSTI and TIOCLINUX type into a terminal
_LOAD, _JEQ, _JGE, _JSET, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_SOCK_STREAM = 1
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24  # offsets in struct seccomp_data, little endian


def seccomp_program(machine: str | None = None) -> bytes:
    """The filter as an array of struct sock_filter, what `bwrap --seccomp` and seccomp(2) take.

    ValueError where the machine (default: this one) is neither x86_64 nor aarch64.
    """
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        raise ValueError(
            f"no system call filter for {machine!r}; known: {', '.join(sorted(_MACHINES))}"
        )
    column, arch, clone, ioctl, socketpair = _MACHINES[machine]
    denied = _RETURN, 0, 0, _ERRNO | errno.EPERM
    missing = _RETURN, 0, 0, _ERRNO | errno.ENOSYS
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCH),
        (_JEQ, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),  # a 32-bit call would have other numbers
        (_LOAD, 0, 0, _NR),
        (_JGE, 0, 1, 0x40000000),  # and so would the x32 calls
        missing,
        (_JEQ, 0, 1, _CLONE3),
        missing,
    ]
    for numbers in DENIED.values():
        if (number := numbers[column]) is not None:
            code += [(_JEQ, 0, 1, number), denied]
    code += [
        (_JEQ, 0, 3, clone),
        (_LOAD, 0, 0, _ARG0),
        (_JSET, 0, 1, _NEW_NAMESPACES),
        denied,
        (_LOAD, 0, 0, _NR),
        (_JEQ, 0, 4, socketpair),
        (_LOAD, 0, 0, _ARG1),
        (_AND, 0, 0, 0xF),
        (_JEQ, 7, 0, _SOCK_STREAM),
        denied,
        (_JEQ, 0, 5, ioctl),
        (_LOAD, 0, 0, _ARG1),
        (_JEQ, 0, 1, _TERMINAL_INPUT[0]),
        denied,
        (_JEQ, 0, 1, _TERMINAL_INPUT[1]),
        denied,
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)
