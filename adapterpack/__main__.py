"""The entry point of ``adapterpack`` and ``python -m adapterpack``; Ctrl-C ends it quietly, even while the
command line is being imported.
"""

from __future__ import annotations

import signal

from .signals import end_at_once


def main() -> None:
    """Runs the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    # Import only now: during imports, libraries would turn the exception of a signal into errors of their
    # own.
    from .cli.main import main as commands  # noqa: PLC0415

    commands()


if __name__ == "__main__":
    main()
