"""`python -m energy_platform` is the command line."""

import sys

from energy_platform.cli import main

sys.exit(main())
