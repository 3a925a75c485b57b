"""`python -m gateway` is the command `gateway`: first of all it sees that what it needs is there."""

import json
import sys

from gateway.requirements import unmet

REFUSED = 1


def main() -> int:
    """Run one command; returns the exit code."""
    if missing := unmet():
        sys.stderr.write(json.dumps({"error": {"message": "; ".join(missing)}}) + "\n")
        return REFUSED
    from gateway.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
