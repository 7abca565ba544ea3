"""`python -m mobiquant` is the console command."""

import sys

from mobiquant.cli import main

sys.exit(main())
