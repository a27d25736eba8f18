"""What the whole command line shares: how a person wants it to talk, and whether it was interrupted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Session:
    """Of one process.

    Attributes:
        debug: whether errors show where they were raised.
        quiet: whether progress is not shown.
        interrupted: by a signal; told: whether the person has read so.
        follows: whether another of the processes that work together is the one that talks.
    """

    debug: bool = False
    quiet: bool = False
    interrupted: bool = False
    told: bool = False
    follows: bool = False


session = Session()
