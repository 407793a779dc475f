"""Errors that a user of embell may meet; every one derives from `EmbellError`."""


class EmbellError(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do.

    The command line prints the message as one line and exits with `exit_status`.
    """

    exit_status = 1


class UsageError(EmbellError):
    """The call itself is wrong: a field, option or expression that does not exist."""

    exit_status = 2


class CorpusError(EmbellError):
    """A source cannot be read, or one of its rows cannot be used."""


class EncoderError(EmbellError):
    """A model cannot serve as an encoder, or not in the way that was asked."""


class TextError(EncoderError):
    """Some of the texts given cannot be encoded.

    `positions` are theirs, from 0, in the order given; `reason` says what is wrong with the first, without naming it.
    """

    def __init__(self, positions: list[int], reason: str) -> None:
        super().__init__(f"text {positions[0] + 1} {reason}")
        self.positions = positions
        self.reason = reason


class CollectionError(EmbellError):
    """A collection is missing, damaged, locked, or does not fit what is asked of it."""


class MissingExtraError(EmbellError):
    """An optional dependency is needed. The message carries the exact install line."""


class EmbellWarning(UserWarning):
    """Something that the caller should know and that does not stop the work."""
