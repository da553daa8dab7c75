"""Entry: `python main.py distribute VERB …` and `python main.py crawl URL…`."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

if sys.version_info < (3, 11):  # noqa: UP036  # an older one shall say so, too
    sys.exit("zmqcluster needs Python 3.11 or newer; this is " + sys.version.split()[0])

# Loading takes a moment: Ctrl-C in it ends us as it ends any program, without a traceback. Where
# it was switched off (nohup, `… &` in a script) it stays so.
_on_interrupt = signal.getsignal(signal.SIGINT)
if _on_interrupt is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

try:
    from zmqcluster.cli.app import DistributionCLI
    from zmqcluster.cli.arguments import parse
except ModuleNotFoundError as error:
    sys.exit(f"{error}. Run `make setup` once, then start with .venv/bin/python.")


def _parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The checked arguments; wrong ones end the process with one line and exit code 2."""
    return parse(argv)


if __name__ == "__main__":
    cli = DistributionCLI(_parse_args())
    signal.signal(signal.SIGINT, _on_interrupt)
    sys.exit(cli.run())
