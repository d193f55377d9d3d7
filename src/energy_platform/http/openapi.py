"""The OpenAPI 3.1 document and its page, both served from the package alone."""

import re
from importlib.resources import files
from typing import Any, Final

import msgspec
from litestar import Request
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme

from energy_platform import __version__
from energy_platform.corrections import CorrectionRequest
from energy_platform.fleet import AssignmentRequest, Declaration
from energy_platform.http.ingest import Account
from energy_platform.plausibility import LimitsRequest
from energy_platform.quarantine import ReplayRequest
from energy_platform.readings import MeterReading, VehicleReading

# Bodies that the routes decode themselves, so that Litestar does not know of them.
_BODIES: Final[dict[tuple[str, str], Any]] = {
    ("/v1/meters/{meter_id}", "put"): Declaration,
    ("/v1/vehicles/{vehicle_id}", "put"): Declaration,
    ("/v1/assignments", "put"): AssignmentRequest,
    ("/v1/quarantine/replay", "post"): ReplayRequest,
    ("/v1/corrections", "post"): CorrectionRequest,
    ("/v1/limits/{device_class}", "put"): LimitsRequest,
}

_REFERENCE: Final = "#/components/schemas/{name}"

_PROBLEM: Final = {
    "type": "object",
    "title": "Problem",
    "description": "RFC 9457; `code` is stable.",
    "required": ["type", "title", "status", "code", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string"},
        "detail": {"type": "string"},
    },
}

_INGEST: Final = {
    "tags": ["ingest"],
    "operationId": "PostIngest",
    "summary": "Send one reading or many",
    "description": (
        "One reading as a JSON object, many as a JSON array or as NDJSON (one a line), plain, gzip "
        "or zstd. The answer comes after the commit. Sending the same again is always safe."
    ),
    "parameters": [
        {
            "name": "Content-Encoding",
            "in": "header",
            "schema": {"type": "string", "enum": ["gzip", "zstd"]},
        }
    ],
}


def complete_document(document: dict[str, Any], *, has_ingest: bool) -> dict[str, Any]:
    """Add to Litestar's document what it cannot see: raw bodies, the ingest route, problems."""
    (reading_schemas, components) = msgspec.json.schema_components(
        [MeterReading, VehicleReading, Account, *_BODIES.values()], ref_template=_REFERENCE
    )
    meter, vehicle, account, *bodies = reading_schemas
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(components)
    schemas["Problem"] = _PROBLEM
    for (path, method), schema in zip(_BODIES, bodies, strict=True):
        if path in document["paths"]:  # a role serves some of them only
            document["paths"][path][method]["requestBody"] = _json_body(schema)
    one = {"oneOf": [meter, vehicle]}
    operation = {
        **_INGEST,
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"oneOf": [one, {"type": "array", "items": one}]}},
                "application/x-ndjson": {"schema": {"type": "string"}},
            },
        },
        "responses": {
            "200": _json_response("all stored or duplicate; one: duplicate", account),
            "201": _json_response("one reading: stored", {"type": "object"}),
            "207": _json_response("many readings, some not stored", account),
        },
    }
    for status in ("400", "401", "403", "409", "413", "415", "422", "503"):
        operation["responses"][status] = _PROBLEM_RESPONSE  # type: ignore[index]
    if has_ingest:
        document["paths"]["/v1/ingest"] = {"post": operation}
    for methods in document["paths"].values():
        for described in methods.values():
            # Litestar describes a 400 of its own shape; ours is the same for every error.
            described["responses"].pop("400", None)
            described["responses"]["default"] = _PROBLEM_RESPONSE
            for parameter in described.get("parameters", ()):
                if parameter["in"] == "path":
                    parameter["name"] = _camel(parameter["name"])
    document["paths"] = {
        re.sub(r"{(\w+)}", lambda match: f"{{{_camel(match[1])}}}", path): document["paths"][path]
        for path in sorted(document["paths"])
    }
    return document


def _camel(name: str) -> str:
    """A snake_case name as the contract writes it."""
    first, *others = name.split("_")
    return first + "".join(word.capitalize() for word in others)


_PROBLEM_RESPONSE: Final = {
    "description": "a problem document",
    "content": {
        "application/problem+json": {"schema": {"$ref": _REFERENCE.format(name="Problem")}}
    },
}


def _json_body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _json_response(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


class _CompleteJson(JsonRenderPlugin):
    """/schema/openapi.json"""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        has_ingest = any(route.path == "/v1/ingest" for route in request.app.routes)
        return msgspec.json.encode(complete_document(openapi_schema, has_ingest=has_ingest))


class _Page(OpenAPIRenderPlugin):
    """/schema: a page that reads the document and needs nothing else, so that it works offline."""

    def __init__(self) -> None:
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return files("energy_platform").joinpath("web/schema.html").read_bytes()


OPENAPI_CONFIG: Final = OpenAPIConfig(
    title="energy-platform",
    version=__version__,
    description="AC energy at the meter, DC energy in the battery, and the ratio between them.",
    path="/schema",
    render_plugins=[_Page(), _CompleteJson()],
    components=Components(
        security_schemes={
            "key": SecurityScheme(type="http", scheme="bearer", description="API key")
        }
    ),
    security=[{"key": []}],
)
