"""`python -m mobiquant` and the console command."""

import sys

from mobiquant import interrupts


def main() -> int:
    """Run the command that the process was started with; returns the exit status."""
    interrupts.end_at_once()
    from mobiquant import cli

    return interrupts.run(cli.main)


if __name__ == "__main__":
    sys.exit(main())
