"""Runs a command and ends it, with all its children, when whoever started this is gone, however that came.

    python guard.py COMMAND ...     standard input is a pipe from the one that is watched

Standard library alone: it is run by path, without r1fast.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

PATIENCE = 20.0  # seconds from SIGTERM to SIGKILL
TIDY = 2.0  # that its children have after it
PR_SET_PDEATHSIG = 1


def main(words: list[str]) -> int:
    libc = ctypes.CDLL(None, use_errno=True)

    def die_with_me() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    child = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_me
    )

    def end() -> None:
        child.terminate()  # it alone, so that it can tidy up after its own: shared memory, sockets
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            for _ in range(20):  # its own tidy up too: shared memory goes with the last of them
                os.killpg(child.pid, 0)
                time.sleep(TIDY / 20)
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)  # waits are the main thread's

    def stop(*_: object) -> None:
        raise SystemExit(143)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    threading.Thread(target=watch, daemon=True).start()
    try:
        return child.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
