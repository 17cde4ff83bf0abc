"""Helper processes that compare LaTeX expressions, with hard limits on CPU time and memory.

Model output is never evaluated as Python. LaTeX is parsed by Math-Verify's ANTLR grammar, in a process of its own
(`math_server`): sympy can hang in C code (9^{9^{9}}), where neither a signal nor a thread can interrupt it, and the
grader must work from any thread.
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import threading
from pathlib import Path


class SymbolicChecker:
    """A helper process that compares LaTeX answers. It is replaced when a comparison makes it hang or die.

    A comparison that takes more than `timeout_s` of CPU time, or ends the helper, counts as "not equal". May be used
    from any thread.

    Args:
        timeout_s: CPU time of one comparison: a grade must not depend on what else the machine does.
        memory_bytes: address space of the helper.
        stuck_s: wall-clock time after which a helper that uses no CPU time is replaced.

    Attributes:
        timeouts: comparisons that took too long or ended their helper.
    """

    def __init__(self, timeout_s: float = 5.0, memory_bytes: int = 4 << 30, stuck_s: float = 600.0) -> None:
        self.timeout_s = timeout_s
        self.stuck_s = stuck_s
        self.memory_bytes = memory_bytes
        self.timeouts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def equal(self, gold: str, given: str, mode: str = "value") -> bool:
        """Whether two LaTeX expressions agree, within the time limit; see `math_server.compare`."""
        with self._lock:
            process = self._process
            # A forked child must not write to its parent's pipe.
            if process is None or process.poll() is not None or self._owner != os.getpid():
                process = self._start()
            try:
                process.stdin.write(json.dumps([gold, given, mode]).encode() + b"\n")
                process.stdin.flush()
                reply = self._read_line(process, self.stuck_s)
            except BrokenPipeError:
                reply = None
            if reply is None:
                self.timeouts += 1
                self._kill()
                return False
            return reply == b"1"

    def close(self) -> None:
        """End the helper process, if this process started one."""
        with self._lock:
            self._kill()

    def _start(self) -> subprocess.Popen[bytes]:
        # -P keeps this file's folder off the helper's module path.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_server.py"))]
        limits = [str(self.timeout_s), str(self.memory_bytes)]
        self._process = subprocess.Popen(
            command + limits,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self._owner = os.getpid()
        if self._read_line(self._process, 120.0) != b"ready":
            self._kill()
            raise RuntimeError("the helper process for symbolic grading did not start; is math-verify installed?")
        return self._process

    @staticmethod
    def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
        """One line of the helper, which writes each line at once, or None after `timeout_s` or at its end."""
        readable, _, _ = select.select([process.stdout.fileno()], [], [], timeout_s)
        return process.stdout.readline().strip() or None if readable else None

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


class CheckerPool:
    """Several helpers; a comparison takes one that is idle. Each starts when all others are busy, and holds 70 MB.

    Args:
        count: most helpers.
    """

    def __init__(self, count: int) -> None:
        self.checkers = [SymbolicChecker() for _ in range(count)]
        # Last in, first out: one that has started is taken before one that has not.
        self._idle: queue.LifoQueue[SymbolicChecker] = queue.LifoQueue()
        for checker in self.checkers:
            self._idle.put(checker)

    def equal(self, gold: str, given: str, mode: str = "value") -> bool:
        """See `SymbolicChecker.equal`; waits while all helpers are busy."""
        checker = self._idle.get()
        try:
            return checker.equal(gold, given, mode)
        finally:
            self._idle.put(checker)

    def close(self) -> None:
        """Ends the helpers."""
        for checker in self.checkers:
            checker.close()
