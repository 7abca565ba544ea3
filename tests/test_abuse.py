"""The server among clients that are slow, broken or hostile: each gets its error, the others are served, nothing grows.

MOBIQUANT_LONG=1 repeats more often (a thousand cancels, hundreds of slow clients) and holds memory to it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY

from export.to_gguf import export_synthetic
from runtime import Model

uvicorn = pytest.importorskip("uvicorn", reason="needs mobiquant[server]")
pytest.importorskip("starlette", reason="needs mobiquant[server]")

from runtime import chat  # noqa: E402
from runtime.server import app, connection  # noqa: E402

LONG = os.environ.get("MOBIQUANT_LONG") == "1"
KEY = "s3cret-key"
CONNECTIONS = 12
BODY = 20_000
CONTEXT = 20_000
TALK = [{"role": "user", "content": "hello"}]

# What a file's template may do.
RUNAWAYS = ("loop", "memory", "text", "number", "recursion")
ATTACKS = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{{ 'a' | center(10 ** 10) }}",
    "text": "{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
    "number": "{{ 9 ** (9 ** 9) }}",
    "recursion": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "format": "{{ '{0.__class__.__base__}'.format(messages) }}",
    "format filter": "{{ ['{0.__class__.__base__}'] | map('format', messages) | list }}",
    "attribute filter": "{{ (messages | attr('__class__')).mro }}",
    "json": "{{ raise_exception | tojson(default='{0.__globals__}'.format) }}",
    "function": "{{ strftime_now.__globals__['sys'].modules }}",
    "file": "{% include '/etc/passwd' %}",
    "change": "{{ messages.clear() }}",
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context so long that an answer goes on until it is ended."""
    target = tmp_path_factory.mktemp("abuse") / "random.gguf"
    export_synthetic(replace(TINY, context_length=CONTEXT), target, "random")
    return target


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Any]:
    """A server in this process, with short times; its `port` and `model`."""
    with pytest.MonkeyPatch.context() as patch, Model(path, n_threads=1) as model:
        patch.setattr(connection, "HEAD_SECONDS", 1.0)
        patch.setattr(connection, "READ_SECONDS", 1.0)
        patch.setattr(app, "_BODY_SECONDS", 1.0)
        limits = app.Limits(body=BODY, sessions=1, queue=4, seconds=20)
        running = uvicorn.Server(
            uvicorn.Config(
                app.Server(model, limits, KEY).app(),
                http=connection.connection_class(CONNECTIONS),
                ws="none",
                port=0,
                log_level="critical",
            )
        )
        thread = threading.Thread(target=running.run)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        running.model = model
        listener = running.servers[0].sockets[0]
        listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
        )  # the system takes little off a client that waits
        running.port = listener.getsockname()[1]
        yield running
        running.should_exit = True
        thread.join()


def head(length: int | None = None, path: str = "/v1/completions", extra: str = "") -> bytes:
    body = "" if length is None else f"Content-Type: application/json\r\nContent-Length: {length}\r\n"
    method = "GET" if length is None else "POST"
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n{body}{extra}\r\n".encode()


def connect(server: Any, data: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    client.sendall(data)
    return client


def reply(client: socket.socket) -> tuple[int, Any]:
    """Status and JSON of one answer; status 0 when the server closed without one."""
    response = http.client.HTTPResponse(client)
    try:
        response.begin()
        text = response.read()
    except (http.client.HTTPException, OSError):
        return 0, None
    finally:
        client.close()
    return response.status, json.loads(text) if text.startswith(b"{") else text.decode()


def ask(server: Any, body: Any, path: str = "/v1/completions") -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return reply(connect(server, head(len(data), path) + data))


def is_error(status: int, answer: Any, expected: int) -> bool:
    return status == expected == answer["error"]["code"] and set(answer["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }


def wait_until(condition: Any, what: str) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def busy(server: Any) -> float:
    text = reply(connect(server, head(path="/metrics")))[1]
    match = re.search(r"^mobiquant_sessions_busy (\S+)$", text, re.MULTILINE)
    assert match
    return float(match[1])


@pytest.fixture(autouse=True)
def works_after_it(server: Any) -> Iterator[None]:
    """Whatever a test did, the server answers, no session is lost, and no descriptor or thread is left open."""
    wait_until(lambda: len(server.server_state.connections) == 0, "connections are open")
    ask(server, {"prompt": "x", "max_tokens": 1})
    before = descriptors(), threading.active_count()
    yield
    wait_until(lambda: ask(server, {"prompt": "x", "max_tokens": 1})[0] == 200, "the server no longer answers")
    wait_until(lambda: busy(server) == 0, "a session is lost")
    wait_until(
        lambda: (descriptors(), threading.active_count()) <= before, f"{descriptors()} descriptors, not {before}"
    )


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def own_memory() -> int:
    """Bytes of this process's memory that no file backs."""
    match = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    assert match
    return int(match[1]) << 10


# Clients that delay


def test_clients_that_never_finish_a_request_do_not_keep_others_out(server: Any) -> None:
    beginnings = [b"", b"GET /v1/mod", head()[:-2], head(100), head(100) + b'{"prompt"', head()]
    slow = [
        connect(server, beginnings[n % len(beginnings)]) for n in range(20 * CONNECTIONS if LONG else 3 * CONNECTIONS)
    ]
    for _ in range(5):
        assert reply(connect(server, head(path="/v1/models")))[0] == 200
    assert len(server.server_state.connections) <= CONNECTIONS
    for client in slow:
        client.close()


@pytest.mark.parametrize("second", [False, True], ids=["first request", "second request"])
@pytest.mark.parametrize("beginning", [b"P", b"POST /v1", head()[:-2]], ids=["letter", "line", "head"])
def test_head_that_does_not_come_is_given_up(server: Any, beginning: bytes, second: bool) -> None:
    client = connect(server)
    if second:
        client.sendall(head(path="/health"))
        while not client.recv(10_000).endswith(b'{"status":"ok"}'):
            pass
    client.sendall(beginning)
    status, answer = reply(client)
    assert is_error(status, answer, 408) and "expected the head of a request" in answer["error"]["message"]


def test_dribbled_head_is_given_up_too(server: Any) -> None:
    client = connect(server, b"GET /health HTTP/1.1\r\n")
    begin = time.monotonic()
    with contextlib.suppress(OSError):
        while time.monotonic() < begin + 5:
            client.sendall(b"a: b\r\n")
            time.sleep(0.1)
    assert time.monotonic() - begin < 4
    client.close()


def test_body_that_does_not_come_is_given_up(server: Any) -> None:
    status, answer = reply(connect(server, head(100) + b'{"prompt"'))
    assert is_error(status, answer, 408) and "body: expected all of it within 1 s" in answer["error"]["message"]


def test_client_that_does_not_read_its_answer_is_given_up(server: Any) -> None:
    body = {"prompt": "x", "max_tokens": CONTEXT, "stream": True, "logprobs": 20, "temperature": 2.0, "top_k": 0}
    data = json.dumps(body).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    client.sendall(head(len(data)) + data)
    wait_until(lambda: busy(server) == 1, "it did not begin")
    wait_until(lambda: busy(server) == 0 and not server.server_state.connections, "the answer goes on")
    client.close()


@pytest.mark.parametrize("stream", [False, True])
def test_half_closed_connection_ends_its_request(server: Any, stream: bool) -> None:
    data = json.dumps({"prompt": "x", "max_tokens": CONTEXT, "stream": stream}).encode()
    client = connect(server, head(len(data)) + data)
    client.shutdown(socket.SHUT_WR)
    wait_until(lambda: busy(server) == 0, "the session works for nobody")
    client.close()


def test_every_cancelled_request_gives_its_session_back(server: Any) -> None:
    count, stops = (1000, 100) if LONG else (30, 10)
    body = json.dumps({"prompt": "x", "max_tokens": CONTEXT, "stream": True, "temperature": 2.0, "top_k": 0}).encode()
    sizes = []
    for number in range(count):
        client = connect(server, head(len(body)) + body)
        if number % 3:  # some leave at once, some after the first bytes
            client.recv(200)
        client.close()
        if number % stops == stops - 1:
            wait_until(lambda: busy(server) == 0, "a session is lost")
            sizes.append(own_memory())
    if LONG:
        assert sizes[-1] - sizes[len(sizes) // 2] < 2 << 20, sizes


# Requests that are none


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\r\n" * 20_000,
        b"GET " + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"h%d: v\r\n" % n for n in range(10_000)) + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nh: " + b"v" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"\x00" * 100,
    ],
    ids=[
        "tls",
        "http2",
        "lines",
        "path",
        "headers",
        "header",
        "no colon",
        "hosts",
        "negative",
        "lengths",
        "large",
        "zeros",
    ],
)
def test_what_is_no_http_request_gets_an_error_of_the_api(server: Any, data: bytes) -> None:
    client = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    with contextlib.suppress(OSError):  # it may be answered and closed before all is sent
        client.sendall(data)
    status, answer = reply(client)
    assert status == 0 or is_error(status, answer, status), (status, answer)
    assert status in (0, 400, 404, 408)


def test_broken_chunks_of_a_body_end_the_connection_and_no_more(server: Any) -> None:
    start = head(5).replace(b"Content-Length: 5", b"Transfer-Encoding: chunked")
    for chunks in (b"zz\r\n", b"ffffffffffffffffffff\r\n", b"-5\r\n", b"5\r\n{}}}}}}\r\n"):
        status, _ = reply(connect(server, start + chunks))
        assert status in (0, 400, 408, 413)
    status, answer = reply(connect(server, start + b"%x\r\n" % (2 * BODY) + b" " * 2 * BODY + b"\r\n0\r\n\r\n"))
    assert is_error(status, answer, 413)


@pytest.mark.parametrize(
    ("method", "route", "status"), [("GET", "/", 404), ("PUT", "/health", 405), ("GET", "/v1/chat/completions", 405)]
)
def test_unknown_route_is_an_error_of_the_api(server: Any, method: str, route: str, status: int) -> None:
    assert is_error(*reply(connect(server, f"{method} {route} HTTP/1.1\r\nHost: x\r\n\r\n".encode())), status)


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", f"bearer {KEY}", f"Basic {KEY}", KEY, f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Bearer {KEY * 999}"],
)
def test_wrong_key_is_refused(server: Any, value: str) -> None:
    for wrong in (value, value + "\xff"):
        data = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: {wrong}\r\n\r\n".encode("latin-1")
        assert is_error(*reply(connect(server, data)), 401)


HUGE = b"9" * 400


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"prompt":"x","temperature":%s}' % HUGE, "temperature: expected a number of at most 308 digits"),
        (b'{"prompt":"x","avg_bits":%s}' % HUGE, "avg_bits: expected a number of at most 308 digits"),
        (b'{"prompt":"x","avg_bits":NaN}', "average bits: expected a number from 2 to 8, found nan"),
        (b'{"prompt":"x","seed":%s}' % (b"9" * 5000), "body: expected JSON: Exceeds the limit"),
        (b'{"prompt":"\\ud800"}', "text: expected Unicode text, found half a surrogate pair"),
        (b'{"prompt":"x","\\ud800":1}', "\ud800: expected a field that this server knows"),
        (b'{"prompt":"x","n":"\\ud800"}', "n: expected 1"),
        (b'{"prompt":"\xff"}', "body: expected JSON"),
        (b'{"prompt":' + b"[" * 3000 + b"]" * 3000 + b"}", "body: expected JSON: maximum recursion depth exceeded"),
        (b'{"prompt":"x","logit_bias":{"1":1e308}}', "a finite largest one after bias and penalties, found inf"),
        (json.dumps({"prompt": "x", "logit_bias": dict.fromkeys(range(272), -1e308)}).encode(), "found none"),
        (b'{"prompt":"x","logit_bias":{"%s":1}}' % (b"9" * 5000), "logit_bias: expected an object of token ids"),
        (b'{"prompt":"x","repeat_penalty":1e999}', "repeat_penalty: expected a number from"),
        (b"", "body: expected JSON"),
        (b"\x00" * 1000, "body: expected JSON"),
    ],
)  # fmt: skip
def test_values_that_no_field_may_have_are_named(server: Any, body: bytes, message: str) -> None:
    status, answer = ask(server, body)
    assert is_error(status, answer, 400) and message in answer["error"]["message"], answer


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":"x","max_tokens":%s,"stop":"e"}' % HUGE,
        b'{"prompt":"x","max_tokens":2,"seed":%s,"top_k":%s,"last_n":%s,"repeat_penalty":1.1}' % (HUGE, HUGE, HUGE),
        b'{"prompt":"x","max_tokens":2,"temperature":1e-320}',
        b'{"prompt":"x","max_tokens":2,"temperature":1e308,"top_k":0,"min_p":0}',
        b'{"prompt":"x","max_tokens":2,"top_p":0,"typical_p":0,"min_p":1}',
        b'{"prompt":"x","max_tokens":2,"repeat_penalty":1e300,"frequency_penalty":1e300}',
        b'{"prompt":"x","max_tokens":2,"mirostat_mode":2,"mirostat_tau":1e308,"mirostat_eta":1}',
        b'{"prompt":"a\\u0000b","max_tokens":2,"stop":["","\\ud800"]}',
    ],
)
def test_extreme_values_that_a_field_may_have_are_answered(server: Any, body: bytes) -> None:
    assert ask(server, body)[0] == 200


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (b'[{"role":"user","content":"x","y":' + b"[" * 900 + b"]" * 900 + b"}]", "messages: expected fewer levels"),
        (b'[{"role":"user","content":"\\ud800"}]', "text: expected Unicode text, found half a surrogate pair"),
        (b'[{"role":"user","content":[{"type":"text"}]}]', "messages[0].content: expected parts of type text"),
        (b'[{"role":["user"],"content":"x"}]', "messages[0].role: expected a name such as user"),
    ],
)
def test_messages_that_no_conversation_has_are_named(server: Any, messages: bytes, message: str) -> None:
    status, answer = ask(server, b'{"max_tokens":2,"messages":' + messages + b"}", "/v1/chat/completions")
    assert is_error(status, answer, 400) and message in answer["error"]["message"], answer


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_template_is_an_error_of_the_request_and_tells_nothing(
    server: Any, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "RENDER_SECONDS", 1.0 if attack in RUNAWAYS else 30.0)
    template = chat.ChatTemplate(ATTACKS[attack], server.model.tokenizer)
    monkeypatch.setitem(server.model.__dict__, "chat", template)
    body = {"messages": TALK, "max_tokens": 1}
    status, answer = ask(server, body, "/v1/chat/completions")
    assert is_error(status, answer, 400) and answer["error"]["message"].startswith("chat template: "), answer
    assert "<class" not in str(answer)
    assert attack in RUNAWAYS or re.search("SecurityError|TypeError|UndefinedError", answer["error"]["message"]), answer


def test_error_that_nobody_foresaw_is_an_error_of_the_api(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """As a package of compiled code raises."""

    for error in (ZeroDivisionError("x"), Panic("x")):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(app, "_results", fail)
            for stream in (False, True):
                status, answer = ask(server, {"prompt": "x", "stream": stream})
                assert is_error(status, answer, 500) and answer["error"]["type"] == "server_error"
