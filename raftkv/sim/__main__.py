"""`python -m raftkv.sim`: see main.py."""

import sys

from raftkv.sim.main import main

sys.exit(main(sys.argv[1:]))
