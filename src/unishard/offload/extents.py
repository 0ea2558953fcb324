"""Which parts of a file are free."""

from __future__ import annotations

from bisect import bisect_left


class Extents:
    """Room in a file that grows at its end: freed extents are joined, and the smallest that fits is used again.

    >>> room = Extents()
    >>> room.take(3), room.take(2), room.end
    (None, None, 0)
    >>> room.grow(5)
    >>> room.take(3), room.take(2), room.take(1)
    (0, 3, None)
    >>> room.give(0, 3), room.give(3, 2)
    (None, None)
    >>> room.take(5)
    0
    """

    def __init__(self) -> None:
        self.end = 0
        """The length of the file."""
        self._offsets: list[int] = []
        self._sizes: dict[int, int] = {}

    def take(self, size: int) -> int | None:
        """The offset of a free extent of `size`, or `None` if the file has to grow first."""
        fitting = [(self._sizes[offset], offset) for offset in self._offsets if self._sizes[offset] >= size]
        if not fitting:
            return None
        found, offset = min(fitting)
        self._remove(offset)
        if found > size:
            self._insert(offset + size, found - size)
        return offset

    def missing(self, size: int) -> int:
        """By how much the file has to grow so that `take(size)` succeeds: a free end counts."""
        last = self._offsets[-1] if self._offsets else self.end
        return size - (self.end - last if last + self._sizes.get(last, 0) == self.end else 0)

    def grow(self, size: int) -> None:
        """The file is longer by `size`, which is free."""
        self.end += size
        self.give(self.end - size, size)

    def give(self, offset: int, size: int) -> None:
        """`size` at `offset` is free."""
        at = bisect_left(self._offsets, offset)
        if at < len(self._offsets) and self._offsets[at] == offset + size:
            size += self._remove(offset + size)
        if at > 0:
            before = self._offsets[at - 1]
            if before + self._sizes[before] == offset:
                offset, size = before, size + self._remove(before)
        self._insert(offset, size)

    def _insert(self, offset: int, size: int) -> None:
        self._offsets.insert(bisect_left(self._offsets, offset), offset)
        self._sizes[offset] = size

    def _remove(self, offset: int) -> int:
        del self._offsets[bisect_left(self._offsets, offset)]
        return self._sizes.pop(offset)
