"""Installs the engine's npm part: `python -m energy_platform.embedded.install`.

It is verified by the integrity hashes of package-lock.json. A second run finds the stamp of the
first and returns at once. With `--check-node` it installs nothing, and says by its exit status
whether a Node.js is there that could.
"""

from __future__ import annotations

import argparse
import sys

from energy_platform.embedded.node import EngineError, find_node, install_node_modules

__all__ = ["install_node_modules", "main"]


def main(arguments: list[str] | None = None) -> int:
    """Installs, says where, and returns the exit status."""
    parser = argparse.ArgumentParser(description="Install the npm part of the embedded engine.")
    parser.add_argument("--check-node", action="store_true", help="only look for Node.js and npm")
    options = parser.parse_args(arguments)
    try:
        if options.check_node:
            return 0 if find_node().npm else 1
        target = install_node_modules()
    except EngineError as error:
        if not options.check_node:
            print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"embedded engine: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
