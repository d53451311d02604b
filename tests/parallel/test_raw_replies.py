"""Bytes from a real socket that are no sound reply: an error in time, never a traceback."""

import contextlib
import socket
import threading
import time

import pytest

from polarctl.errors import PolarctlError, UsageError
from polarctl.parallel import served
from polarctl.parallel.http_client import Remote

OK = b"HTTP/1.1 200 OK\r\n"


def whole(body: bytes, more: bytes = b"") -> list[bytes]:
    return [OK + more + b"Content-Length: %d\r\n\r\n" % len(body) + body]


def forever(start: bytes, part: bytes, pause_s: float = 0.0):
    """A beginning, and then the same bytes without end."""

    def parts():
        yield start
        while True:
            yield part
            time.sleep(pause_s)

    return parts


SLOWLY = 0.1
REPLIES = {
    "no HTTP": lambda: [b"hello\r\n\r\n"],
    "nothing": lambda: [b""],
    "headers that drip": forever(OK + b"X: ", b"a", SLOWLY),
    "headers without end": forever(OK, b"X: " + b"a" * 1000 + b"\r\n"),
    "one header without end": forever(OK + b"X: ", b"a" * 1000),
    "continue without end": forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001),
    "chunks that drip": forever(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", SLOWLY),
    "chunks without end": forever(
        OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"
    ),
    "a chunk's size without end": forever(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0" * 100),
    "a body of 22 GB": forever(OK + b"Content-Length: 22000000000\r\n\r\n", b" " * 65536),
    "a length below zero": lambda: [OK + b"Content-Length: -5\r\n\r\nabc"],
    "two lengths": lambda: [OK + b"Content-Length: 5\r\nContent-Length: 2\r\n\r\n[]abc"],
    "a length of 5000 digits": lambda: [OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"],
    "another encoding": lambda: whole(b"[]", b"Content-Encoding: nonsense\r\n"),
    "a list 100,000 deep": lambda: whole(b"[" * 100_000 + b"]" * 100_000),
    "an object 100,000 deep": lambda: whole(b'{"data":' * 100_000 + b"1" + b"}" * 100_000),
    "an integer of 5000 digits": lambda: whole(b'{"data": ' + b"9" * 5000 + b"}"),
    "data that is a text": lambda: whole(b'{"data": "abc"}'),
    "models without names": lambda: whole(b'{"data": [{"id": 4e400}]}'),
    "bytes that are no text": lambda: whole(b"\xff\xfe\x00"),
    "UTF-16": lambda: whole('{"data": [{"id": "a"}, {"id": "a"}], "data": 1}'.encode("utf-16")),
}


@contextlib.contextmanager
def server(reply):
    """An address at which every connection gets these bytes after its request."""
    listening = socket.create_server(("127.0.0.1", 0))
    asked = []

    def answer(connection):
        with connection, contextlib.suppress(OSError):
            asked.append(connection.recv(65536))
            for part in reply():
                connection.sendall(part)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


@pytest.mark.parametrize("name", REPLIES)
def test_what_is_no_reply_ends_within_the_time_with_one_line(name):
    """Each request has 0.5 s; it is sent again for 0.2 s after the first fault."""
    with server(REPLIES[name]) as (url, asked):
        remote = Remote(url, concurrency=1, timeout_s=0.5, deadline_s=0.2, pause_s=0.05)
        start = time.monotonic()
        with pytest.raises(PolarctlError) as caught:
            served.models(remote, f"{url}/v1/models")
        took = time.monotonic() - start
        remote.close()
    assert asked and took < 5  # 0.5 + 0.2 + 0.5, and a machine that is busy
    assert caught.value.exit_status == 4
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status):
    """It could lead a key elsewhere."""
    with server(lambda: whole(b'{"data": [{"id": "a"}]}')) as (other, asked):
        head = b"HTTP/1.1 %d Moved\r\nContent-Length: 0\r\n" % status
        head += b"Location: " + other.encode() + b"/v1/models\r\n\r\n"
        with server(lambda: [head]) as (url, _):
            remote = Remote(url, concurrency=1, timeout_s=1, deadline_s=0.2)
            assert served.models(remote, f"{url}/v1/models") is None
            remote.close()
    assert not asked


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://" + "a" * 300, "http://" + "a" * 300 + ".com", "http://a:99999"]
)
def test_an_address_that_cannot_be_is_one_line(url):
    try:
        remote = Remote(url, concurrency=1, timeout_s=2, deadline_s=0)
        with pytest.raises(PolarctlError) as caught:
            served.models(remote, f"{url}/v1/models")
        remote.close()
        assert caught.value.exit_status == 4
    except UsageError as error:
        assert "no address" in str(error)
