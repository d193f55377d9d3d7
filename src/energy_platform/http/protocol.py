"""HTTP/1.1 for uvicorn, with one write to the socket for a response instead of two.

Uvicorn writes the head of a response and its body one after the other, and uvloop sends each at
once: two system calls, two packets, and a client that is woken twice. What is written in one turn
of the event loop is sent together here, when the turn ends.
"""

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

PENDING_BYTES_MAX: Final = 65_536


class JoinedWritesProtocol(HttpToolsProtocol):
    """Uvicorn's protocol on a transport that joins writes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_JoinedWrites(transport, self.loop))  # type: ignore[arg-type]

    def eof_received(self) -> None:
        """The client will send no more, and the event loop closes the transport after this."""
        self.transport.flush()  # type: ignore[attr-defined]
        super().eof_received()


class _JoinedWrites:
    """A transport that keeps what is written until the event loop's turn ends, if it is little."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._call_soon = loop.call_soon
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self.is_closing = transport.is_closing
        self.resume_reading = transport.resume_reading
        self.pause_reading = transport.pause_reading

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, content: bytes) -> None:
        if not self._pending:
            self._call_soon(self.flush)
        self._pending.append(content)
        self._pending_bytes += len(content)
        if self._pending_bytes >= PENDING_BYTES_MAX:
            self.flush()  # the transport can only hold up a writer of what it knows

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def flush(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, []
            self._pending_bytes = 0
            if not self._transport.is_closing():
                self._transport.write(b"".join(pending))
