"""Files in and out: each line of a file is a reading, under the same rules as at the HTTP door.

    open_source() -> its format -> JSON, one a line -> readings.decode_lines() -> ingest.Writer

What is not a reading goes to quarantine as the line that it was, with file and line in the detail.
A file can be imported again at any time: what is stored comes out as duplicate.

Each module imports only from those above it:

- `formats`: pure. Tells a format by its first line, and makes a line the JSON of a reading.
- `account`: adds up what became of every line, and shows it.
- `importer`: reads the lines, declares the device, stores the readings, assigns meter to vehicle.
- `exporter`: writes a device's history as `import` takes it.
"""

from energy_platform.files.account import Account, render_account
from energy_platform.files.exporter import Export, export_history, render_export
from energy_platform.files.formats import ImportOptions, decode_fill
from energy_platform.files.importer import import_source, open_source, prepare_database

__all__ = [
    "Account",
    "Export",
    "ImportOptions",
    "decode_fill",
    "export_history",
    "import_source",
    "open_source",
    "prepare_database",
    "render_account",
    "render_export",
]
