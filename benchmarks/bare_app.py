"""The bare HTTP server: decodes a reading and answers, and stores nothing.

ingest_single.py starts it: what it does is the most that any service could do on this server, with
these decoders.
"""

import os
import socket
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any

import msgspec
import uvicorn

from energy_platform.cli import uvicorn_config
from energy_platform.settings import Settings

Instant = Annotated[datetime, msgspec.Meta(tz=True)]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class MeterReading(msgspec.Struct, rename="camel", gc=False):
    meter_id: str
    kwh_consumed_ac: float
    voltage: float
    timestamp: Instant


class VehicleReading(msgspec.Struct, rename="camel", gc=False):
    vehicle_id: str
    soc: float
    kwh_delivered_dc: float
    battery_temp: float
    timestamp: Instant


_meter_decoder = msgspec.json.Decoder(MeterReading)
_vehicle_decoder = msgspec.json.Decoder(VehicleReading)


async def receive_reading(receive: Receive) -> MeterReading | VehicleReading:
    """The reading in a request's body."""
    body = b""
    more = True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    if b'"meterId"' in body:
        return _meter_decoder.decode(body)
    return _vehicle_decoder.decode(body)


async def send_stored(send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"20")]
    await send({"type": "http.response.start", "status": 201, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"outcome":"stored"}'})


async def run_lifespan(receive: Receive, send: Send) -> None:
    for event in ("startup", "shutdown"):
        message = await receive()
        assert message["type"] == f"lifespan.{event}"
        await send({"type": f"lifespan.{event}.complete"})


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await run_lifespan(receive, send)
        return
    if scope["method"] == "POST":
        await receive_reading(receive)
    await send_stored(send)


def serve(app: Any) -> None:
    """Run an application as the service is run, on the port that the harness chose."""
    settings = Settings(port=int(os.environ["ENERGY_PORT"]))
    listener = socket.create_server((settings.host, settings.port), backlog=2048)
    uvicorn.Server(uvicorn_config(app, settings)).run(sockets=[listener])


if __name__ == "__main__":
    serve(app)
