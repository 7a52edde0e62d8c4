"""Give back to the system the memory that a process does not use."""

import ctypes


def give_back() -> None:
    """Ask the C library to give free memory back to the system, where it has a call for that (glibc).

    Compiling takes hundreds of megabytes from many threads, and glibc keeps what each of them has freed.

    >>> give_back()
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # Windows, macOS, musl
        return
    trim(0)
