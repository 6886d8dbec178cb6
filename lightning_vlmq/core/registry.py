"""A name-to-object table filled by decorator, so that one new file adds one new choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from lightning_vlmq.core.errors import unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects by name; a look-up that fails names the nearest entries.

    Args:
        kind: the word used in error messages, e.g. ``"method"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files an object under ``name``. Raises ``KeyError`` when the name is taken."""

        def file(entry: T) -> T:
            if name in self._entries:
                raise KeyError(f"{self.kind} '{name}' is registered twice")
            self._entries[name] = entry
            return entry

        return file

    def __getitem__(self, name: str) -> T:
        """Return the entry. Raises :class:`~lightning_vlmq.core.errors.VLMQError` for an unknown name."""
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
