"""`-hf user/model` against a hub on loopback: choice of the file, resume, the cache when offline, errors."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tiny import TINY

from export.to_gguf import export_synthetic

pytest.importorskip("huggingface_hub", reason="needs mobiquant[hub]")

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """The few routes of the hub that a download needs. repositories: name -> file name -> bytes; cut: bytes after which
    the next transfer breaks off; sent: ranges asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.cut: int | None = None
        self.ranges: list[str | None] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            files = self.server.repositories.get("/".join(parts[2:4]))
            if files is None:
                return self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()
            ]
            whole = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self._send(200, json.dumps(entries if "tree" in parts else whole).encode(), {}, body)
        data = self.server.repositories.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if not body:
            return self._send(200, data, headers, body)
        self.server.ranges.append(wanted)
        if wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self._send(206, data[start:], headers, body)
        return self._send(200, data, headers, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.server.cut is not None and self.server.cut < len(data):
            self.wfile.write(data[: self.server.cut])
            self.wfile.flush()
            self.server.cut = None
            self.close_connection = True
        elif body:
            self.wfile.write(data)


@pytest.fixture(scope="module")
def model_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    target = tmp_path_factory.mktemp("hub") / "random.gguf"
    export_synthetic(TINY, target, "random")
    return target.read_bytes()


@pytest.fixture
def hub(model_bytes: bytes) -> Iterator[Hub]:
    server = Hub()
    server.repositories = {
        "user/one": {"README.md": b"text", "model.gguf": model_bytes},
        "user/two": {"small.gguf": model_bytes, "large.gguf": model_bytes},
        "user/none": {"README.md": b"text"},
    }
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(hub: Hub, home: Path, repository: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mobiquant", "run", "-hf", repository, "-p", "hi", "-n", "4", "--temp", "0"],
        cwd=ROOT,
        env={
            "PYTHONPATH": str(ROOT),
            "PATH": "",
            "HOME": str(home),
            "HF_HOME": str(home),
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_model_is_downloaded_once_and_then_runs_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    first = run(hub, tmp_path, "user/one")
    assert first.returncode == 0, first.stderr
    assert "average bits 8.00" in first.stderr and len(hub.ranges) == 1
    assert run(hub, tmp_path, "user/one").stdout == first.stdout
    assert len(hub.ranges) == 1
    offline = run(hub, tmp_path, "user/one", HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout, offline.stderr


def test_download_that_breaks_off_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    file = tmp_path / "large.gguf"
    export_synthetic(replace(TINY, vocab_size=100_000), file, "random")
    chunk = 10 << 20  # huggingface_hub writes so much at a time
    hub.repositories["user/one"] = {"model.gguf": file.read_bytes()}
    hub.cut = chunk + 1000
    done = run(hub, tmp_path, "user/one")
    assert done.returncode == 0, done.stderr
    assert hub.ranges == [None, f"bytes={chunk}-"]


def test_file_is_named_after_a_colon_where_there_are_several(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "user/two")
    message = "expected one GGUF file, or its name after a colon, found large.gguf, small.gguf"
    assert (done.returncode, done.stderr) == (1, f"error: user/two: {message}\n")
    assert run(hub, tmp_path, "user/two:small.gguf").returncode == 0


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        ("user/none", "user/none: expected one GGUF file, or its name after a colon, found none"),
        ("user/missing", "user/missing: no such repository on the hub, or it is private; then run: hf auth login"),
        ("user/one:other.gguf", "user/one: no file other.gguf in it"),
        ("a/b/c", "a/b/c: expected a repository as USER/MODEL"),
    ],
)
def test_what_is_not_there_is_named(hub: Hub, tmp_path: Path, repository: str, message: str) -> None:
    done = run(hub, tmp_path, repository)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1, done.stderr


def test_hub_out_of_reach_is_one_line(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "user/one", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: user/one: the hub cannot be reached") and done.stderr.count("\n") == 1


def test_without_the_package_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None; from mobiquant.cli import main;"
        "sys.exit(main(['run', '-hf', 'user/one', '-p', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    expected = "error: downloading needs huggingface_hub; run: pip install 'mobiquant[hub]'\n"
    assert (done.returncode, done.stderr) == (1, expected)
