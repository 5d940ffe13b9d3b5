"""The S3 server and the proxy of the tests do what the tests of the data plane rely on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from botocore.exceptions import ClientError
from streaming.base.storage import CloudDownloader, CloudUploader

from s3_server import FaultyProxy, S3Server, remove_sockets

BUCKET = "server-tests"
CONTENT = bytes(range(256)) * 2**12  # 1 MiB: one part


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    s3_server.create_bucket(BUCKET)
    s3_server.put(BUCKET, "object", CONTENT)
    with FaultyProxy(s3_server.port) as proxy:
        for name, value in {**s3_server.environment, **proxy.environment}.items():
            monkeypatch.setenv(name, value)
        yield proxy


def fetch(local: Path) -> bytes:
    CloudDownloader.direct_download(f"s3://{BUCKET}/object", str(local), timeout=1.0)
    return local.read_bytes()


def test_what_streaming_uploads_comes_back(s3_server: S3Server, proxy: FaultyProxy, tmp_path: Path) -> None:
    uploader = CloudUploader.get(f"s3://{BUCKET}/up", keep_local=False)
    content = os.urandom(17 * 2**20)  # several parts
    Path(uploader.local, "big").write_bytes(content)
    uploader.upload_file("big")
    assert s3_server.get(BUCKET, "up/big") == content
    assert proxy.count(r"^PUT .*partNumber=3") == 1
    CloudDownloader.direct_download(f"s3://{BUCKET}/up/big", str(tmp_path / "big"))
    assert (tmp_path / "big").read_bytes() == content
    assert s3_server.keys(BUCKET, "up/") == ["up/big"]
    s3_server.delete(BUCKET, "up/big")
    assert s3_server.keys(BUCKET, "up/") == []


def test_wrong_key_is_refused(proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ClientError, match="not found"):  # streaming's word for 403 as well
        fetch(tmp_path / "object")


@pytest.mark.parametrize("kind", ["503", "reset", "stall", "cut"])
def test_a_fault_hits_as_many_requests_as_asked(proxy: FaultyProxy, tmp_path: Path, kind: str) -> None:
    proxy.behave(kind, num_requests=1, matching="^GET", after_bytes=0 if kind == "stall" else 1000)
    assert fetch(tmp_path / "object") == CONTENT, "botocore tries again"
    assert proxy.count("^GET /server-tests/object") == 2


def test_a_cut_answer_ends_in_the_middle(proxy: FaultyProxy) -> None:
    proxy.behave("cut", after_bytes=5)
    with pytest.raises(urllib.error.HTTPError) as caught:  # 403: no signature; the body is what matters
        urllib.request.urlopen(proxy.endpoint)
    assert int(caught.value.headers["Content-Length"]) > 5
    assert len(caught.value.fp.read1()) <= 5  # type: ignore[attr-defined]


def test_503_for_ever_then_none(proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    proxy.behave("503", matching="^(HEAD|GET) /server-tests/object")
    with pytest.raises(ClientError, match="503"):
        fetch(tmp_path / "object")
    proxy.behave("pass")
    assert fetch(tmp_path / "object") == CONTENT


def test_slow_is_slow(proxy: FaultyProxy, tmp_path: Path) -> None:
    proxy.behave("slow", bytes_per_s=2**21)
    start_s = time.monotonic()
    assert fetch(tmp_path / "object") == CONTENT
    assert time.monotonic() - start_s > 0.4


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_a_killed_test_process_leaves_no_server(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from s3_server import S3Server\n"
        "with S3Server() as server: print(server.process.pid, *server.ports, flush=True); input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).parents[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert parent.stdout is not None and parent.stdin is not None
    pid, *ports = map(int, parent.stdout.readline().split())
    server = psutil.Process(pid)
    assert "weed" in server.cmdline()[0]
    parent.kill()
    parent.wait()
    parent.stdin.close()
    remove_sockets(ports)
    deadline = time.monotonic() + 10
    with contextlib.suppress(psutil.NoSuchProcess):
        while server.status() != psutil.STATUS_ZOMBIE:  # a pid 1 may reap late
            assert time.monotonic() < deadline, "the server lives on"
            time.sleep(0.02)
