"""The one exception that the command turns into a single line for the user."""

from __future__ import annotations


class InputError(ValueError):
    """Something that the user gave is wrong: an argument, a file, a corpus that is in the way."""
