"""A fleet that behaves, and misbehaves, like a real one, and posts to a running service.

Each module imports only from those above it:

- `fleet`: pure. A device's reading is a function of the seed, the device and the instant, so a
  second run over the same hours sends the same bytes.
- `faults`: pure. Gathers readings into bodies and spoils some of them; every line carries the name
  of its fault, and `EXPECTED` says what should become of it.
- `account`: adds up what became of every line, and shows it.
- `client`: sends, and sends again what was not answered.
- `assignments`: which meter feeds which vehicle when, as the service has it.
- `run`: declares the fleet, back-fills it, goes on live and asks at the end what the service holds.

A run over hours that another fleet (other seed, interval or faults) has filled tells the service
other values of the same instants: they come out `conflicting`, as they should.
"""

from energy_platform.simulator.account import SimulationAccount
from energy_platform.simulator.fleet import SimulationOptions
from energy_platform.simulator.run import simulate

__all__ = ["SimulationAccount", "SimulationOptions", "simulate"]
