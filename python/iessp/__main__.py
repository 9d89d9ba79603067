"""`iessp` and `python -m iessp`: the command line, or one line that says what it lacks."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from iessp.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("iessp", "stripe_kernels"):
            raise
        sys.exit(
            f"error: the command line needs {error.name}: install stripe-kernels with its extra, as in "
            'pip install -e ".[train]"'
        )
    run()


if __name__ == "__main__":
    main()
