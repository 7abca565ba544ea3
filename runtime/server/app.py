"""The routes of the server, and what every request passes: key, media type, size, time.

/v1/completions and /v1/chat/completions (streamed or not), /v1/models, /health, /metrics. Errors have the form of the
OpenAI API and name the field.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from runtime.errors import MobiQuantError
from runtime.model import Model
from runtime.server.connection import error_body
from runtime.server.metrics import Metrics
from runtime.server.pool import OutOfTimeError, QueueFullError, SessionPool
from runtime.server.protocol import BadRequest, Call, parse_chat, parse_completion

_BODY_SECONDS = 30.0  # for a body to arrive
_log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Limits:
    """body: bytes. tokens: of one answer, None for the context. sessions: answered at a time. queue: requests that
    wait. seconds: for one request, waiting included."""

    body: int = 1 << 20
    tokens: int | None = None
    sessions: int = 1
    queue: int = 32
    seconds: float = 600.0


class Server:
    """The model behind the routes. api_key: None for none."""

    def __init__(self, model: Model, limits: Limits, api_key: str | None) -> None:
        forks = [model.fork(empty=True) for _ in range(limits.sessions - 1)]
        self._model_name = model.name
        self._context = model.n_ctx
        self._max_tokens = min(limits.tokens or model.n_ctx, model.n_ctx)
        self._limits = limits
        self._api_key = api_key
        self._metrics = Metrics()
        self._created = int(time.time())
        self.pool = SessionPool([model, *forks], queue_length=limits.queue, seconds=limits.seconds)

    def app(self) -> Starlette:
        """The ASGI application; at its end the sessions are closed."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            self.pool.close()

        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._guarded(self._metrics_text)),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/completions", self._guarded(self._answer_with(parse_completion)), methods=["POST"]),
                Route("/v1/chat/completions", self._guarded(self._answer_with(parse_chat)), methods=["POST"]),
            ],
            lifespan=lifespan,
            exception_handlers={HTTPException: _no_such_route},
        )

    # Routes

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics_text(self, _: Request) -> Response:
        return PlainTextResponse(self._metrics.text(waiting=self.pool.waiting, busy=self.pool.busy))

    async def _models(self, _: Request) -> Response:
        entry = {"id": self._model_name, "object": "model", "created": self._created, "owned_by": "mobiquant"}
        return JSONResponse({"object": "list", "data": [entry | {"context_length": self._context}]})

    def _answer_with(self, parse: Callable[[bytes, int], Call]) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def answer(request: Request) -> Response:
            call = parse(await self._body(request), self._max_tokens)
            results = self.pool.run(lambda model, cancelled: _results(model, call, cancelled))
            try:
                # The first result comes before the status line goes out, so that an error can still be one.
                first = await _while_connected(request.receive, anext(results))
            except BaseException:
                await results.aclose()
                raise
            if not call.stream:
                await results.aclose()
                self._metrics.count_answer(first)
                return JSONResponse(first)
            return _EventStream(first, results, call.usage, self._metrics)

        return answer

    # What every request passes

    def _guarded(
        self, route: Callable[[Request], Coroutine[Any, Any, Response]]
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def guarded(request: Request) -> Response:
            response = await self._answer_or_error(route, request)
            self._metrics.count_request(response.status_code)
            return response

        return guarded

    async def _answer_or_error(
        self, route: Callable[[Request], Coroutine[Any, Any, Response]], request: Request
    ) -> Response:
        if not self._authorized(request):
            return _error(401, "expected the header `Authorization: Bearer KEY` with this server's key")
        try:
            return await route(request)
        except _TooLarge as error:
            return _error(413, str(error))
        except _TooSlow as error:
            return _error(408, str(error))
        except BadRequest as error:
            return _error(400, str(error), error.param)
        except MobiQuantError as error:
            kind = 400 if error.status in ("MQ_ERR_CONTEXT_FULL", "MQ_ERR_ARGUMENT") else 500
            return _error(kind, str(error))
        except ValueError as error:
            return _error(400, str(error))
        except QueueFullError:
            return _error(503, f"{self._limits.queue} requests are waiting already; try again", retry_after=1)
        except OutOfTimeError:
            return _error(504, f"the request took longer than {self._limits.seconds:g} s", retry_after=1)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            return _error(500, _unexpected(error))

    def _authorized(self, request: Request) -> bool:
        if self._api_key is None:
            return True
        given = request.headers.get("authorization", "").encode("utf-8")
        return hmac.compare_digest(given, f"Bearer {self._api_key}".encode())  # in constant time

    async def _body(self, request: Request) -> bytes:
        """The body, at most so large. A page in a browser can send JSON only after asking, so it is required."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise BadRequest(f"content-type: expected application/json, found {media_type or 'none'}")

        async def read() -> bytes:
            body = bytearray()
            async for part in request.stream():
                body += part
                if len(body) > self._limits.body:
                    raise _TooLarge(f"body: expected at most {self._limits.body} bytes, found more")
            return bytes(body)

        try:
            return await asyncio.wait_for(read(), _BODY_SECONDS)
        except asyncio.TimeoutError:
            raise _TooSlow(f"body: expected all of it within {_BODY_SECONDS:g} s") from None


class _TooLarge(Exception):
    pass


class _TooSlow(Exception):
    pass


def _results(model: Model, call: Call, cancelled: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """In a session's thread."""
    result = getattr(model, call.method)(**call.arguments, cancelled=cancelled)
    if call.stream:
        yield from result
    else:
        yield result


async def _while_connected(receive: Receive, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled with ClientDisconnect when the client leaves before."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> Message:
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


class _EventStream(Response):
    """Chunks as server-sent events, as they come; the client's leaving ends the work."""

    media_type = "text/event-stream"

    def __init__(
        self, first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None], usage: bool, metrics: Metrics
    ) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._first, self._rest, self._usage, self._metrics = first, rest, usage, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await _while_connected(receive, self._send_all(send))
        except (ClientDisconnect, OSError):
            self._metrics.count_request(499)
        finally:
            await self._rest.aclose()

    async def _send_all(self, send: Send) -> None:
        async def event(data: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        try:
            await event(self._chunk(self._first))
            async for chunk in self._rest:
                await event(self._chunk(chunk))
                if "usage" in chunk:
                    self._metrics.count_answer(chunk)
                    if self._usage:
                        await event(json.dumps(chunk | {"choices": []}))
            await event("[DONE]")
        except OutOfTimeError:
            await event(error_body(500, "the request took longer than it may").decode())
        except (MobiQuantError, ValueError) as error:
            await event(error_body(500, str(error)).decode())
        except Exception as error:
            await event(error_body(500, _unexpected(error)).decode())
        await send({"type": "http.response.body", "body": b""})

    def _chunk(self, chunk: dict[str, Any]) -> str:
        """The totals stay with the last chunk, but `usage` only where the API has it: in a chunk of its own."""
        return json.dumps({name: value for name, value in chunk.items() if name != "usage"}, ensure_ascii=False)


def _error(status: int, message: str, param: str | None = None, retry_after: int | None = None) -> Response:
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    return Response(error_body(status, message, param), status, headers, "application/json")


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = "expected a path that this server has" if error.status_code == 404 else error.detail
    response = _error(error.status_code, f"{request.method} {request.url.path}: {message}")
    response.headers.update(error.headers or {})
    return response


def _unexpected(error: Exception) -> str:
    """What the client gets of an error that nobody foresaw; the log gets all of it."""
    _log.error("a request failed", exc_info=error)
    return f"the server failed at this request: {type(error).__name__}"
