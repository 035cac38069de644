"""The proxy breaks lines as it says: what the tests of outages rest on."""

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.tcp_proxy import TcpProxy


class Echo:
    """Answers each chunk with itself, and remembers it."""

    def __init__(self) -> None:
        self.heard = b""
        self.told = threading.Condition()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            line, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(line,), daemon=True).start()

    def _serve(self, line: socket.socket) -> None:
        with line:
            try:
                while data := line.recv(1 << 16):
                    with self.told:
                        self.heard += data
                        self.told.notify_all()
                    line.sendall(data)
            except OSError:
                pass

    def wait_for(self, data: bytes) -> None:
        with self.told:
            assert self.told.wait_for(lambda: data in self.heard, 10)


@pytest.fixture(scope="module")
def echo() -> Echo:
    return Echo()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[TcpProxy]:
    with TcpProxy(echo.port) as proxy:
        yield proxy


def connect(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def exchange(line: socket.socket, data: bytes) -> bytes:
    line.sendall(data)
    return receive(line, len(data))


def receive(line: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size and (data := line.recv(size - len(received))):
        received += data
    return received


def test_bytes_go_both_ways_and_an_end_is_passed_on(proxy: TcpProxy) -> None:
    data = bytes(range(256)) * 4000  # more than all buffers on the way
    with connect(proxy) as line:
        sending = threading.Thread(target=line.sendall, args=(data,))
        sending.start()
        assert receive(line, len(data)) == data
        sending.join()
        line.shutdown(socket.SHUT_WR)
        assert line.recv(1) == b""


def test_cut_resets_every_connection_and_new_ones_live(proxy: TcpProxy) -> None:
    with connect(proxy) as first, connect(proxy) as second:
        assert exchange(first, b"a") == exchange(second, b"a") == b"a"
        proxy.cut()
        for line in (first, second):
            with pytest.raises(ConnectionResetError):
                line.recv(1)
    with connect(proxy) as line:
        assert exchange(line, b"b") == b"b"


def test_refuse_closes_the_port_until_accept(proxy: TcpProxy) -> None:
    port = proxy.port
    with connect(proxy) as line:
        assert exchange(line, b"a") == b"a"
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            line.recv(1)
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
    proxy.accept()
    assert proxy.port == port
    with connect(proxy) as line:
        assert exchange(line, b"a") == b"a"


def test_frozen_lines_stay_open_and_silent_until_thaw(proxy: TcpProxy) -> None:
    with connect(proxy) as old:
        assert exchange(old, b"a") == b"a"
        proxy.freeze()
        with connect(proxy) as new:
            for line in (old, new):
                line.sendall(b"held")
                line.settimeout(0.02)
                with pytest.raises(TimeoutError):
                    line.recv(1)
            proxy.thaw()
            for line in (old, new):
                line.settimeout(10)
                assert receive(line, 4) == b"held"


def test_cut_after_passes_so_many_bytes_of_the_server_and_resets_once(proxy: TcpProxy) -> None:
    with connect(proxy) as line:
        assert exchange(line, b"before") == b"before"
        proxy.cut_after(5)
        line.sendall(b"1234567")
        assert receive(line, 5) == b"12345"
        with pytest.raises(ConnectionResetError):
            line.recv(1)
    with connect(proxy) as line:
        assert exchange(line, b"1234567") == b"1234567"


def test_cut_when_sent_loses_the_reply_and_not_the_request(proxy: TcpProxy, echo: Echo) -> None:
    with connect(proxy) as line:
        assert exchange(line, b"first COM") == b"first COM"
        proxy.cut_when_sent(b"COMMIT")
        assert exchange(line, b"COM") == b"COM"
        line.sendall(b"MIT;")  # the pattern comes in two pieces
        with pytest.raises(ConnectionResetError):
            line.recv(1)
    echo.wait_for(b"COMMIT;")
    with connect(proxy) as line:
        assert exchange(line, b"COMMIT") == b"COMMIT"


def test_a_target_that_is_not_there_is_a_reset() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        # The reset may be there before `connect` has answered.
        with TcpProxy(free.getsockname()[1]) as proxy, pytest.raises(ConnectionResetError), connect(proxy) as line:
            line.recv(1)
