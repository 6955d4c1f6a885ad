"""Errors meant for users: one line that says what is wrong, where, and what to do.

The command line prints these without a traceback and exits with `exit_code`; any other exception is a bug
and keeps its traceback.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_QUARANTINED = 3
EXIT_PREEMPTED = 75


class LatentlineError(Exception):
    """Something the user can act on failed while running."""

    exit_code = EXIT_FAILURE


class UsageError(LatentlineError):
    """The recipe, an option or an input is wrong; nothing was started."""

    exit_code = EXIT_USAGE


class StaleCacheError(UsageError):
    """The cache was made by another producer than the one now asked for."""


class CorruptError(LatentlineError):
    """Bytes in the cache differ from what their manifest promises."""


class Preempted(LatentlineError):
    """Stopped on a signal at a safe point; the same command, run again, continues."""

    exit_code = EXIT_PREEMPTED
