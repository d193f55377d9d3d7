"""Does a client get all of a response, whoever ends the connection, and however large it is?"""

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from conftest import RunningService

CHUNK, CHUNKS = b"x" * 50_000, 100


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once: /large in chunks, everything else with its own path."""
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"].removeprefix("lifespan.")
            await send({"type": f"lifespan.{kind}.complete"})
            if kind == "shutdown":
                return
    is_large = scope["path"] == "/large"
    content = CHUNK * CHUNKS if is_large else scope["path"].encode()
    length = str(len(content)).encode()
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]}
    )
    if is_large:
        for _ in range(CHUNKS):
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
        content = b""
    await send({"type": "http.response.body", "body": content})


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    with RunningService(app) as client:
        yield "127.0.0.1", client.base_url.port or 0


def ask(client: socket.socket, path: str) -> None:
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())


def test_a_client_that_ends_its_side_gets_its_answer(address: tuple[str, int]) -> None:
    for _ in range(20):
        with socket.create_connection(address, timeout=10) as client:
            ask(client, "/one")
            client.shutdown(socket.SHUT_WR)
            received = b"".join(iter(lambda: client.recv(65_536), b""))
        assert received.endswith(b"/one")


def test_responses_come_whole_and_in_order(address: tuple[str, int]) -> None:
    """Also where the client asks for several at once, and one is larger than any buffer."""
    with socket.create_connection(address, timeout=10) as client:
        for path in ("/one", "/large", "/two"):
            ask(client, path)
        received = b""
        while not received.endswith(b"/two"):
            received += client.recv(2**20)
    heads = [part for part in received.split(b"HTTP/1.1 200 OK") if part]
    assert heads[0].endswith(b"\r\n\r\n/one")
    assert heads[1].endswith(b"\r\n\r\n" + CHUNK * CHUNKS)
    assert len(heads) == 3
