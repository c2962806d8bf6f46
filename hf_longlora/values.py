"""What a configuration's values may be: one check and one message for each kind of value."""

from typing import Any, get_args


def check_whole(least: int, *, none: bool = False, **values: Any) -> None:
    """Raise a `ValueError` unless each value is a whole number of at least `least`, or with `none` is `None`."""
    for name, value in values.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not whole and not (none and value is None):
            raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")


def check_share(**values: Any) -> None:
    """Raise a `ValueError` unless each value is `None` or a number in (0, 1]."""
    for name, value in values.items():
        share = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
        if not share and value is not None:
            raise ValueError(f"`{name}` must be a number in (0, 1], got {value!r}.")


def check_one_of(choices: Any, **values: Any) -> None:
    """Raise a `ValueError` unless each value is `None` or one of the values of a `Literal`."""
    for name, value in values.items():
        if value is not None and value not in get_args(choices):
            raise ValueError(f"`{name}` must be one of {get_args(choices)}, got {value!r}.")
