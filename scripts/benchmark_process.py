"""A process that answers questions: a compile that hangs, a crash or an illegal access ends that process and no other.

The benchmark holds one worker per implementation and lets them take turns, so their rounds alternate although they share nothing but the
GPU. A question that is not answered in time ends the worker with everything it started; the next question starts it anew.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_SECONDS = 120.0


class WorkerFailure(Exception):
    """An implementation gave no answer: it raised, crashed, or ran out of time."""


class Worker:
    """The caller's end. `serve(connection, *args)` runs in the other process and answers each message with `(ok, value)`."""

    def __init__(self, serve: Callable[..., None], *args: Any, log: Path):
        self.serve, self.args, self.log = serve, args, log
        self.process: multiprocessing.process.BaseProcess | None = None
        self.connection: Connection | None = None
        self.has_answered = False

    def start(self) -> None:
        """Without waiting until it is ready, so that several can start at once."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        self.connection, far_end = context.Pipe()
        self.process = context.Process(
            target=_run, args=(far_end, str(self.log), self.serve, *self.args)
        )
        self.process.start()
        self.has_answered = False
        far_end.close()

    def ask(self, message: tuple, limit_seconds: float) -> Any:
        """The answer to a message. WorkerFailure with one line of why there is none; the log has the rest."""
        if self.process is None:
            self.start()
        if not self.has_answered:
            limit_seconds += START_SECONDS
        assert self.connection is not None and self.process is not None
        try:
            self.connection.send(message)
            if not self.connection.poll(limit_seconds):
                self.stop()
                raise WorkerFailure(f"no answer to '{message[0]}' within {limit_seconds:.0f} s")
            ok, value = self.connection.recv()
            self.has_answered = True
        except (EOFError, OSError) as error:
            self.process.join(5)
            code = self.process.exitcode
            self.stop()
            raise WorkerFailure(f"its process ended with exit code {code}") from error
        if not ok:
            self.stop()  # an error of the GPU would meet every later call
            raise WorkerFailure(value)
        return value

    def stop(self) -> None:
        """End the process and those it started (compilers)."""
        if self.process is None or self.connection is None:
            return
        self.connection.close()
        if self.process.pid is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # already gone, or not yet the leader of its group
                self.process.kill()
        self.process.join()
        self.process = self.connection = None


def _run(connection: Connection, log: str, serve: Callable[..., None], *args: Any) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    serve(connection, *args)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
