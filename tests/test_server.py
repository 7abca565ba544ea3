"""`mobiquant serve` as its clients meet it: the openai package, plain HTTP for what that package never sends."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY

from export.to_gguf import export_synthetic
from runtime import Model

pytest.importorskip("uvicorn", reason="needs mobiquant[server]")
pytest.importorskip("starlette", reason="needs mobiquant[server]")

ROOT = Path(__file__).parent.parent
KEY = "s3cret-key"
TALK = [{"role": "user", "content": "hello"}]
CONTEXT = 20_000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context so long that an answer goes on until it is ended."""
    target = tmp_path_factory.mktemp("server") / "random.gguf"
    export_synthetic(replace(TINY, context_length=CONTEXT), target, "random")
    return target


@contextmanager
def serving(*arguments: object) -> Iterator[int]:
    """A server on a free port; gives the port."""
    command = [sys.executable, "-m", "mobiquant", "serve", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        match = re.fullmatch(r"listening on http://127\.0\.0\.1:(\d+)/v1\n", line)
        assert match, line
        yield int(match[1])
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="module")
def port(path: Path) -> Iterator[int]:
    with serving("-m", path, "--api-key", KEY, "-np", 1, "--queue", 1, "--max-body", 5000, "-t", 1) as port:
        yield port


@pytest.fixture(scope="module")
def client(port: int) -> Any:
    openai = pytest.importorskip("openai", reason="needs mobiquant[test]")
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)


def request(
    port: int, path: str, body: object = None, *, key: str | None = KEY, media_type: str = "application/json"
) -> tuple[int, Any]:
    """Status and parsed body of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    if body is None:
        connection.request("GET", path, headers=headers)
    else:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, headers | {"Content-Type": media_type})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, json.loads(text) if text.startswith("{") else text


def metric(port: int, name: str) -> float:
    text = request(port, "/metrics")[1]
    match = re.search(rf"^mobiquant_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(match[1]) if match else 0.0


def wait_until_idle(port: int) -> None:
    end = time.monotonic() + 20
    while metric(port, "sessions_busy"):
        assert time.monotonic() < end, "the session still works"
        time.sleep(0.02)


# The openai client


def test_openai_client_completes_as_the_model_does(client: Any, path: Path) -> None:
    options = {"max_tokens": 20, "temperature": 1.2, "seed": 4}
    result = client.completions.create(model="any", prompt="hello", **options)
    with Model(path) as model:
        expected = model.create_completion("hello", **options)
    assert result.choices[0].text == expected["choices"][0]["text"]
    assert result.usage.model_dump(exclude_none=True) == expected["usage"]
    assert result.choices[0].finish_reason == "length"


def test_openai_client_streams_a_chat(client: Any) -> None:
    options = {"model": "any", "messages": TALK, "max_tokens": 20, "temperature": 1.2, "seed": 4}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_openai_client_sets_the_bits_of_one_request(client: Any) -> None:
    def average(**extra: float) -> float:
        result = client.completions.create(model="any", prompt="hello", max_tokens=8, extra_body=extra)
        return result.bits["average"]

    assert (average(bits=2), average(), average(bits=6)) == (2, 8, 6)
    assert 2 < average(avg_bits=3.0) < 4.5


def test_openai_client_gets_likelihoods(client: Any) -> None:
    result = client.completions.create(model="any", prompt="hello", max_tokens=0, echo=True, logprobs=1)
    logprobs = result.choices[0].logprobs
    assert len(logprobs.tokens) == 6 and logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
    chat = client.chat.completions.create(model="any", messages=TALK, max_tokens=2, logprobs=True, top_logprobs=3)
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 3


def test_openai_client_lists_the_model(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.context_length == CONTEXT


def test_openai_client_gets_errors_that_name_the_field(client: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="n: expected 1, which is all that this server can do, found 2"):
        client.completions.create(model="any", prompt="x", n=2)
    with pytest.raises(openai.BadRequestError, match="average bits: expected a number from 2 to 8, found 9"):
        client.completions.create(model="any", prompt="x", extra_body={"avg_bits": 9})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


# Limits


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "body: expected JSON"),
        (b"[" * 2000, "body: expected JSON"),
        (b"[]", "body: expected a JSON object, found list"),
        ({}, "prompt: expected it, found nothing"),
        ({"prompt": [1, "x"]}, "prompt: expected one text or a list of token ids"),
        ({"prompt": [999]}, "token 0: expected an id from 0 to 271, found 999"),
        ({"prompt": ""}, None),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens: expected an integer from 0"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens: expected an integer from 0"),
        ({"prompt": "x", "temperature": "hot"}, "temperature: expected a number, found 'hot'"),
        ({"prompt": "x", "temperature": -1}, "temperature: expected a number from 0"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop: expected a text or a list of at most 16"),
        ({"prompt": "x", "stop": "a" * 501}, "stop: expected a text or a list of at most 16, each of at most 500"),
        ({"prompt": "x", "bits": 3}, "bits: expected 2, 4, 6, 8 or static:X with X from 2 to 8, found 3"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias: expected an object of token ids and numbers"),
        ({"prompt": "x", "logit_bias": {"999": 1}}, "logit_bias: expected token ids from 0 to 271, found 999"),
        ({"prompt": "x", "bits": 2, "avg_bits": 3}, "budget: expected bits or average bits, found both"),
        ({"prompt": "x", "best_of": 3}, "best_of: expected 1"),
        ({"prompt": "x", "avg_bit": 3}, "avg_bit: expected a field that this server knows"),
        ({"prompt": "x" * 4900, "echo": 1}, "echo: expected true or false"),
    ],
)
def test_malformed_completion_request_is_answered_with_what_is_wrong(
    port: int, body: object, message: str | None
) -> None:
    status, answer = request(port, "/v1/completions", body)
    if message is None:  # the begin-of-text token alone is a prompt
        assert status == 200
        return
    assert status == 400
    assert message in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages: expected it, found nothing"),
        ({"messages": []}, "messages: expected a list of messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: expected text"),
        ({"messages": TALK, "tools": [{"type": "function"}]}, "tools: expected []"),
        ({"messages": TALK, "response_format": {"type": "json_object"}}, "response_format: expected {'type': 'text'}"),
        ({"messages": TALK, "top_logprobs": 21, "logprobs": True}, "top_logprobs: expected an integer from 0 to 20"),
    ],
)
def test_malformed_chat_request_is_answered_with_what_is_wrong(port: int, body: object, message: str) -> None:
    status, answer = request(port, "/v1/chat/completions", body)
    assert (status, message in answer["error"]["message"]) == (400, True), answer


def test_body_over_the_limit_is_refused(port: int) -> None:
    status, answer = request(port, "/v1/completions", {"prompt": "x" * 5000})
    assert (status, "at most 5000 bytes" in answer["error"]["message"]) == (413, True)


def test_only_json_is_read(port: int) -> None:
    status, answer = request(port, "/v1/completions", {"prompt": "x"}, media_type="text/plain")
    assert (status, "expected application/json, found text/plain" in answer["error"]["message"]) == (400, True)


def test_everything_but_health_needs_the_key(port: int) -> None:
    assert request(port, "/health", key=None) == (200, {"status": "ok"})
    for path in ("/v1/models", "/metrics"):
        assert request(port, path, key=None)[0] == 401
        assert request(port, path, key=KEY + "x")[0] == 401
    assert request(port, "/v1/completions", {"prompt": "x"}, key=None)[0] == 401
    assert request(port, "/v1/models")[0] == 200
    assert request(port, "/nothing")[0] == 404


def open_stream(port: int) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """An answer that would take very long, with its first event read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = json.dumps({"prompt": "x", "max_tokens": CONTEXT, "stream": True, "temperature": 2.0, "top_k": 0})
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}".encode()}
    connection.request("POST", "/v1/completions", body, headers)
    response = connection.getresponse()
    assert (response.status, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert response.readline().startswith(b"data: {")
    return connection, response


def leave(connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
    response.close()
    connection.close()


def test_a_client_that_leaves_ends_its_answer_and_frees_the_session(port: int) -> None:
    wait_until_idle(port)
    before = metric(port, 'requests_total{status="499"}')
    stream = open_stream(port)
    assert metric(port, "sessions_busy") == 1
    leave(*stream)
    wait_until_idle(port)
    assert metric(port, 'requests_total{status="499"}') == before + 1


def test_a_waiting_client_that_leaves_frees_its_place_and_one_too_many_is_refused(port: int) -> None:
    wait_until_idle(port)
    stream = open_stream(port)
    body = json.dumps({"prompt": "x", "max_tokens": 1})
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}".encode()}

    def wait_in_line() -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", "/v1/completions", body, headers)
        while metric(port, "requests_waiting") != 1:
            time.sleep(0.02)
        return connection

    first = wait_in_line()
    status, answer = request(port, "/v1/completions", {"prompt": "x"})
    assert (status, "1 requests are waiting already" in answer["error"]["message"]) == (503, True)
    first.close()
    while metric(port, "requests_waiting"):
        time.sleep(0.02)
    second = wait_in_line()
    leave(*stream)
    assert second.getresponse().status == 200
    second.close()


def test_time_and_token_limits_end_an_answer(path: Path) -> None:
    with serving("-m", path, "--timeout", 30, "--max-tokens", 5) as port:
        status, answer = request(port, "/v1/chat/completions", {"messages": TALK, "max_tokens": 100})
        assert (status, answer["usage"]["completion_tokens"]) == (200, 5)
    with serving("-m", path, "--timeout", 0.5) as port:
        body = {"prompt": "x", "max_tokens": CONTEXT, "temperature": 2.0, "top_k": 0}
        status, answer = request(port, "/v1/completions", body, key=None)
        assert (status, "longer than 0.5 s" in answer["error"]["message"]) == (504, True)
        status, text = request(port, "/v1/completions", body | {"stream": True}, key=None)
        assert status == 200 and "longer than it may" in text and not text.endswith("[DONE]\n\n")
        wait_until_idle(port)


def test_two_sessions_answer_at_the_same_time(path: Path) -> None:
    with serving("-m", path, "-np", 2, "-t", 1) as port:
        body = {"prompt": "same", "max_tokens": 30, "seed": 1, "temperature": 1.0}
        texts: list[str] = []
        workers = [
            threading.Thread(
                target=lambda: texts.append(request(port, "/v1/completions", body)[1]["choices"][0]["text"])
            )
            for _ in range(8)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(texts) == 8 and len(set(texts)) == 1
        assert metric(port, "generated_tokens_total") == 240
        assert metric(port, "generated_bits_total") == 8 * 240


# Starting


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0: others can reach it, so expected an --api-key, found none"),
        (("--parallel", "0"), "--parallel: expected more than 0, found 0"),
        (("-m", "missing.gguf"), "missing.gguf"),
    ],
)
def test_server_that_cannot_start_says_why(path: Path, options: tuple[str, ...], message: str) -> None:
    command = [sys.executable, "-m", "mobiquant", "serve", "-m", str(path), "--port", "0", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_missing_packages_say_what_to_install(path: Path) -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None; from mobiquant.cli import main;"
        f"sys.exit(main(['serve', '-m', {str(path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "run: pip install 'mobiquant[server]'" in done.stderr
