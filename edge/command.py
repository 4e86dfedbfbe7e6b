"""How every command ends: a sentence on stderr and a documented exit code, or 0."""

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from stpm.edge.errors import StorageError, StpmError

INTERRUPTED = 130

EXIT_CODES = (
    "exit codes: 0 done; 2 wrong command line; 3 images or weights; 4 bundle; 5 engine or self test; 6 camera; "
    "7 PLC; 8 disk; 9 training; 130 interrupted"
)


def parser(name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=name,
        description=summary,
        epilog=f"examples:\n{examples}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run_command(name: str, command: Callable[[], None], when_interrupted: str) -> int:
    """Run a command and give its exit code. A bug is not caught: its traceback is wanted."""
    try:
        command()
    except StpmError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {when_interrupted}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of our output has left; Python would complain once more while it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"{name}: no space left on the disk ({error.filename or error}): free some space and run it again",
            file=sys.stderr,
        )
        return StorageError.exit_code
    return 0


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second signal interrupts at once. The old handlers come back after."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
