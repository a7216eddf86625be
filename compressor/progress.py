"""How long work reports itself: named stages that advance, and one-line notes.

The library only calls these three methods; what they look like belongs to whoever passes the object in. The command
line draws bars, a notebook may draw its own, and `Silent` draws nothing.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins and the previous one is over. `total` counts its `advance` units; None when unknown."""

    def advance(self, n: int = 1) -> None:
        """`n` more units of the current stage are done."""

    def note(self, message: str) -> None:
        """One line that the user should read, such as which calibration text was used."""


class Silent:
    """The Progress of callers that passed none."""

    def stage(self, name: str, total: int | None = None) -> None:
        pass

    def advance(self, n: int = 1) -> None:
        pass

    def note(self, message: str) -> None:
        pass


NULL: Progress = Silent()
