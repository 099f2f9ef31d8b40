"""The two ways a command can fail, and the exit code of each."""

from __future__ import annotations


class DistillRayError(Exception):
    """A failure that is told in one line. ``exit_code`` is what the command ends with."""

    exit_code = 1


class UserError(DistillRayError):
    """The user's to mend: config, paths, resources. The message says what is wrong, where, and what to do."""

    exit_code = 2


class Interrupted(DistillRayError):
    """Ctrl-C or SIGTERM."""

    exit_code = 130


class RunError(DistillRayError):
    """A failure while running: what was finished stays, the same command continues."""

    exit_code = 1
