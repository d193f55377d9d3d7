"""TimescaleDB without a server: PostgreSQL in WebAssembly under Node.js, its data in a folder."""

from energy_platform.embedded.engine import Engine, EngineError, running_dsn

__all__ = ["Engine", "EngineError", "running_dsn"]
