"""One client's connection: uvicorn's, with a time for whatever a client may delay, and with errors in the API's form.

uvicorn itself waits for ever for the head of a request and for a client that does not read its answer, and some hundred
such clients would keep all others out. Here a connection that has not brought a whole request is given up after a
while, and at once when its place is needed.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

HEAD_SECONDS = 10.0  # for the head of a request to arrive
READ_SECONDS = 30.0  # without a byte of its answer taken


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    """An error of the OpenAI API. Whatever a client sent may be in `message`, so not all of it is Unicode text."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": status}}
    return json.dumps(body, ensure_ascii=False).encode("utf-8", errors="backslashreplace")


def connection_class(most: int) -> type[H11Protocol]:
    """A class for uvicorn's `http` option; at most so many connections are open at a time."""

    class Connection(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.started = self.loop.time()
            if len(self.connections) > most and not self._take_a_place():
                self._refuse(503, f"{most} connections are open already; try again")
            else:
                self._restart_timer(HEAD_SECONDS, self._head_too_slow)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_request:
                self._stop_timer()
            elif self._timer is None and not self.transport.is_closing():  # the next request's head has begun
                self._restart_timer(HEAD_SECONDS, self._head_too_slow)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._restart_timer(READ_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_timer()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            if self.transport.get_write_buffer_size():  # closing would wait for a client that does not read
                self.transport.abort()

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, "expected an HTTP request, found something else or a head that is too long")

        @property
        def _in_request(self) -> bool:
            """A request's head is here and its answer is not yet complete."""
            return self.cycle is not None and not self.cycle.response_complete

        @property
        def _evictable(self) -> bool:
            """Nothing whole has come that would have to be answered."""
            return not self._in_request or self.cycle.more_body

        def _take_a_place(self) -> bool:
            """Give up the oldest other connection that has no whole request; False when there is none."""
            others = [other for other in self.connections if other is not self and other._evictable]
            if others:
                oldest = min(others, key=lambda other: other.started)
                self.connections.discard(oldest)
                oldest.transport.abort()
            return bool(others)

        def _head_too_slow(self) -> None:
            self._timer = None
            if not self._in_request:
                self._refuse(408, f"expected the head of a request within {HEAD_SECONDS:g} s")

        def _refuse(self, status: int, message: str) -> None:
            """Answer without the application and close."""
            body = error_body(status, message)
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                events = (
                    h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]),
                    h11.Data(data=body),
                    h11.EndOfMessage(),
                )
                self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            self.transport.close()

        def _restart_timer(self, seconds: float, action: Any) -> None:
            self._stop_timer()
            self._timer = self.loop.call_later(seconds, action)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Connection
