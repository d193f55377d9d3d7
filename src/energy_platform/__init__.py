"""AC energy paid for at the meter, DC energy delivered to the battery, and what is between."""

from importlib.metadata import version

__version__ = version("energy-platform")
