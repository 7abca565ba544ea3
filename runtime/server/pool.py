"""A few sessions of one model, shared by many requests: a bounded queue, a time limit, and an end when nobody listens.

A session works in a thread, and its results come to the event loop through a queue. Sessions go round: who finishes
hands the session to the request that has waited longest.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from runtime.model import Model

Work = Callable[[Model, Callable[[], bool]], Iterator[Any]]
"""(session, cancelled) -> results; asks `cancelled` often and ends when it is true."""


class QueueFullError(Exception):
    """As many requests wait as may."""


class OutOfTimeError(Exception):
    """The request's time was over before its end."""


_END = object()


class SessionPool:
    """sessions: used by one request at a time each. queue_length: requests that may wait. seconds: for one request, its
    time in the queue included. All methods belong to one event loop."""

    def __init__(self, sessions: Sequence[Model], *, queue_length: int, seconds: float) -> None:
        self._sessions = list(sessions)
        self._idle = list(sessions)
        self._waiting: deque[asyncio.Future[Model]] = deque()
        self._queue_length = queue_length
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(len(self._sessions), thread_name_prefix="session")

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> int:
        return len(self._sessions) - len(self._idle)

    async def run(self, work: Work) -> AsyncGenerator[Any, None]:
        """What `work` gives. Closing or cancelling the iterator ends the work. Raises QueueFullError, OutOfTimeError,
        and what the work raises."""
        deadline = time.monotonic() + self._seconds
        session = await self._take(deadline)
        results: asyncio.Queue[Any] = asyncio.Queue()
        loop, given_up = asyncio.get_running_loop(), threading.Event()

        def cancelled() -> bool:
            return given_up.is_set() or time.monotonic() > deadline

        def produce() -> None:
            try:
                for result in work(session, cancelled):
                    if time.monotonic() > deadline:
                        raise OutOfTimeError
                    loop.call_soon_threadsafe(results.put_nowait, result)
                end: object = _END
            except Exception as error:
                end = error
            except BaseException as error:  # a panic in a package; without an end the request would wait for ever
                end = RuntimeError(f"{type(error).__name__}: {error}")
            loop.call_soon_threadsafe(results.put_nowait, end)

        done = loop.run_in_executor(self._threads, produce)
        done.add_done_callback(lambda _: self._give_back(session))
        try:
            while (result := await results.get()) is not _END:
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            given_up.set()  # the session comes back when its thread has noticed

    def close(self) -> None:
        """Wait for the threads, then close the sessions."""
        self._threads.shutdown()
        for session in self._sessions:
            session.close()

    async def _take(self, deadline: float) -> Model:
        if self._idle:
            return self._idle.pop()
        if len(self._waiting) >= self._queue_length:
            raise QueueFullError
        ticket: asyncio.Future[Model] = asyncio.get_running_loop().create_future()
        self._waiting.append(ticket)
        try:
            await asyncio.wait({ticket}, timeout=max(0.0, deadline - time.monotonic()))
        except asyncio.CancelledError:
            if ticket.done():
                self._give_back(ticket.result())
            raise
        finally:
            if not ticket.done():
                self._waiting.remove(ticket)
        if not ticket.done():
            raise OutOfTimeError
        return ticket.result()

    def _give_back(self, session: Model) -> None:
        if self._waiting:
            self._waiting.popleft().set_result(session)
        else:
            self._idle.append(session)
