"""``adapterpack`` and ``python -m adapterpack`` are the command line; from here on Ctrl-C ends it quietly,
also while it is imported.
"""

from __future__ import annotations

import signal

from .signals import end_at_once


def main() -> None:
    """Runs the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    # a signal meanwhile would become errors of libraries
    from .cli.main import main as commands  # noqa: PLC0415

    commands()


if __name__ == "__main__":
    main()
