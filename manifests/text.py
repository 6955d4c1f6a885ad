"""Text that files and tokenizers take."""

from __future__ import annotations


def is_utf8(text: str) -> bool:
    """Whether text can be written: half of a surrogate pair, from a broken JSON escape or a file's name, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
