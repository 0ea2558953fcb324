"""Bytes on disk: one file a rank, written once from front to back, and read where they are needed."""

from __future__ import annotations

import copy
import ctypes
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from unishard.checkpoint.archive import data_offset, envelope
from unishard.checkpoint.boxes import Box, intersection, row_strides, split_rows, whole, within
from unishard.checkpoint.catalog import BLOCK, MANIFEST, Blob, Catalog, Chunk, Known, TensorInfo
from unishard.checkpoint.commit import is_shard
from unishard.errors import CheckpointError, CorruptCheckpointError
from unishard.kernels.crc32 import crc32

_LARGEST_CHUNK = 1 << 30
_KICK = (
    32 << 20
)  # bytes after which the kernel is asked to start writing to disk, so that fsync finds little left
_HEAD = 8192
_PIECE = 1 << 20
"""Bytes of the one buffer for what cannot be read to where it belongs: other dtypes, devices, scattered elements."""
_SHORT_RUN = 4096  # bytes: shorter runs are read together with what lies between them
_START_WRITEBACK = 2  # SYNC_FILE_RANGE_WRITE

Progress = Callable[[int], None]
"""Told of each number of bytes that was written or read."""


def _silent(done: int) -> None:
    return None


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, not copied."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


class RankFile:
    """What one rank writes. Use as a context manager; on a clean exit everything is on the disk."""

    def __init__(self, folder: Path, name: str, progress: Progress = _silent) -> None:
        self.name = name
        self.catalog = Catalog()
        self._progress = progress
        self._path = folder / name
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._position = 0
        self._kicked = 0

    def __enter__(self) -> RankFile:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
                self.catalog.files[self.name] = self._position
        finally:
            os.close(self._descriptor)

    def add_tensor(self, key: str, shape: tuple[int, ...], box: Box, tensor: torch.Tensor) -> None:
        """Write `box` of the tensor `key` of global `shape`; `tensor` is contiguous and holds the box's elements."""
        info = self.catalog.tensors.setdefault(key, TensorInfo(shape, tensor.dtype))
        parts = -(-tensor.numel() * tensor.element_size() // _LARGEST_CHUNK)
        flat, start = tensor.detach().reshape(-1), 0
        for piece in split_rows(box, parts) if parts > 1 and box.sizes else [box]:
            part = flat[start : start + piece.numel]
            start += piece.numel
            info.chunks.append(self._chunk(key, piece, part.cpu()))

    def _chunk(self, key: str, box: Box, part: torch.Tensor) -> Chunk:
        raw = raw_bytes(part)
        head, tail = envelope(part.dtype, box.sizes, len(raw))
        begin = self._position
        self._write(head)
        data, checksums = self._position, []
        for start in range(0, len(raw), BLOCK):
            block = raw[start : start + BLOCK]
            checksums.append(crc32(block))
            self._write(block)
        self._write(tail)
        return Chunk(box.offsets, box.sizes, self.name, begin, self._position - begin, data, tuple(checksums))

    def add_blob(self, key: str, value: Any) -> None:
        """Write any value that `torch.save` takes."""
        buffer = io.BytesIO()
        torch.save(value, buffer)
        content = buffer.getvalue()
        self.catalog.blobs[key] = Blob(self.name, self._position, len(content), crc32(content))
        self._write(content)

    def _write(self, content: Any) -> None:
        view = memoryview(content)
        while view:
            done = os.write(self._descriptor, view)
            view = view[done:]
            self._position += done
            self._progress(done)
        if self._position - self._kicked >= _KICK:
            _start_writeback(self._descriptor, self._kicked, self._position - self._kicked)
            self._kicked = self._position


_sync_range: Any = getattr(ctypes.CDLL(None), "sync_file_range", None)


def _start_writeback(descriptor: int, start: int, size: int) -> None:
    if _sync_range is not None:
        _sync_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), _START_WRITEBACK)


class Reader:
    """Reads parts of one checkpoint. Files are opened when first needed and closed at the end of the block."""

    def __init__(
        self, folder: Path, catalog: Catalog, *, verify: bool = True, progress: Progress = _silent
    ) -> None:
        self._folder = folder
        self._catalog = catalog
        self._verify = verify
        self._progress = progress
        self._open: dict[str, int] = {}
        self._checked: set[tuple[str, int, int]] = set()
        self._buffer: bytearray | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: Any) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def blob(self, key: str, *, trust: bool = False) -> Any:
        """A value by its key; classes other than torch's safe ones only with `trust`.

        Raises `CheckpointError` if it is absent or not allowed, `CorruptCheckpointError` if its bytes changed.
        """
        blob = self._catalog.blobs.get(key)
        if blob is None:
            raise CheckpointError(f"{self._folder} holds no {key!r}")
        if isinstance(blob, Known):
            return copy.deepcopy(blob.value)
        content = self._pread(blob.file, blob.offset, blob.length, key)
        if self._verify and blob.checksum is not None and crc32(content) != blob.checksum:
            raise self._changed(blob.file, key, blob.offset)
        try:
            return torch.load(io.BytesIO(content), weights_only=not trust)
        except Exception as error:
            raise CheckpointError(
                f"{key} in {self._folder} cannot be read: {error}. If it holds classes of your own and you trust the "
                "file, set UNISHARD_TRUST_CHECKPOINTS=1, or register them with torch.serialization.add_safe_globals"
            ) from error

    def fill(self, key: str, box: Box, target: torch.Tensor) -> None:
        """Copy `box` of the tensor `key` into `target`, a tensor of the box's sizes; dtypes may differ.

        Raises `CheckpointError` if the checkpoint does not hold all of it. Nothing has changed then, and at most
        `_PIECE` bytes are held besides.
        """
        info = self._catalog.find(key)
        if info is None:
            raise CheckpointError(f"{self._folder} holds no tensor {key!r}")
        if info.value is not None:
            target.copy_(info.value[within(box, whole(info.shape))])
            return
        self.check(key, box)
        for chunk in info.chunks:
            shared = intersection(box, chunk.box)
            if shared is not None:
                view = target[within(shared, box)] if box.sizes else target
                if _row_major(chunk):
                    self._stream(key, info, chunk, shared, shared, view)
                else:
                    view.copy_(self._shared(key, info, chunk, shared))
        _note_written(target)

    def fill_fresh(self, key: str, box: Box, target: torch.Tensor) -> None:
        """As `fill`, for memory whose values nobody wants if this raises: bytes are read once and compared in place."""
        info = self._catalog.find(key)
        if info is None or info.value is not None or not _plain(target, info.dtype):
            self.fill(key, box, target)
            return
        self._require_all(key, info, box)
        for chunk in info.chunks:
            shared = intersection(box, chunk.box)
            if shared is None:
                continue
            view = target[within(shared, box)] if box.sizes else target
            first, last = _span(shared, chunk, info.dtype.itemsize)
            if chunk.checksums and _row_major(chunk) and last - first == view.nbytes and view.is_contiguous():
                self._stream_checked(key, info, chunk, first, raw_bytes(view))
            else:
                self.fill(key, shared, view)
        _note_written(target)

    def _stream_checked(
        self, key: str, info: TensorInfo, chunk: Chunk, first: int, target: memoryview
    ) -> None:
        """Fill `target` with a chunk's bytes from `first` on, whole blocks straight into their place."""
        total, last = chunk.box.numel * info.dtype.itemsize, first + len(target)
        for block in range(first // BLOCK, -(-last // BLOCK)):
            start, stop = block * BLOCK, min((block + 1) * BLOCK, total)
            place = target[max(start, first) - first : min(stop, last) - first]
            whole_block = len(place) == stop - start
            content = place if whole_block else self._piece(stop - start)
            self._compare(key, chunk, block, content)
            if not whole_block:
                place[:] = content[max(start, first) - start : min(stop, last) - start]
            self._progress(len(place))

    def check(self, key: str, box: Box) -> None:
        """Raise `CorruptCheckpointError` unless all of `box` is there and its bytes are those that were written.

        Checksums cover blocks of 1 MiB, and each block is read once for all boxes that lie in it.
        """
        info = self._catalog.find(key)
        if info is None:
            raise CheckpointError(f"{self._folder} holds no tensor {key!r}")
        if info.value is not None:
            return
        self._require_all(key, info, box)
        for chunk in info.chunks if self._verify else ():
            shared = intersection(box, chunk.box)
            if shared is not None and chunk.checksums and _row_major(chunk):
                first, last = _span(shared, chunk, info.dtype.itemsize)
                for block in range(first // BLOCK, -(-last // BLOCK)):
                    self._check_block(key, info, chunk, block)

    def _require_all(self, key: str, info: TensorInfo, box: Box) -> None:
        shared = [intersection(box, chunk.box) for chunk in info.chunks]
        covered = sum(part.numel for part in shared if part is not None)
        if covered != box.numel:
            raise CorruptCheckpointError(
                f"{self._folder}: {key} is there in part only, {covered} of {box.numel} elements of "
                f"{box.offsets} + {box.sizes}"
            )

    def _check_block(self, key: str, info: TensorInfo, chunk: Chunk, block: int) -> None:
        known = (chunk.file, chunk.data or 0, block)
        if known not in self._checked:
            size = min(BLOCK, chunk.box.numel * info.dtype.itemsize - block * BLOCK)
            self._compare(key, chunk, block, self._piece(size))
            self._checked.add(known)

    def _compare(self, key: str, chunk: Chunk, block: int, content: memoryview) -> None:
        """Read a whole block into `content`. Raises `CorruptCheckpointError` if it is not what was written."""
        offset = (chunk.data or 0) + block * BLOCK
        self._read_into(chunk.file, offset, content, key)
        if crc32(content) != chunk.checksums[block]:
            raise self._changed(chunk.file, key, offset)

    def _piece(self, size: int) -> memoryview:
        """The beginning of the one buffer."""
        if self._buffer is None:
            self._buffer = bytearray(_PIECE)
        return memoryview(self._buffer)[:size]

    def _stream(
        self, key: str, info: TensorInfo, chunk: Chunk, part: Box, held: Box, view: torch.Tensor
    ) -> None:
        """Read the elements of `part` from a chunk into their place in `view`, which holds `held`."""
        width = info.dtype.itemsize
        first, last = _span(part, chunk, width)
        size, needed, data = last - first, part.numel * width, (chunk.data or 0) + first
        if not needed:
            return
        target = view[within(part, held)] if part.sizes else view
        if size == needed and _plain(target, info.dtype) and target.is_contiguous():
            self._read_into(chunk.file, data, raw_bytes(target), key)
            self._progress(needed)
        elif size <= _PIECE and (size == needed or part.sizes[-1] * width < _SHORT_RUN):
            content = self._piece(size)
            self._read_into(chunk.file, data, content, key)
            found = torch.frombuffer(content, dtype=info.dtype)
            target.copy_(found.as_strided(part.sizes, row_strides(chunk.sizes)))
            self._progress(needed)
        else:
            for half in _halves(part):
                self._stream(key, info, chunk, half, held, view)

    def _shared(self, key: str, info: TensorInfo, chunk: Chunk, shared: Box) -> torch.Tensor:
        """The elements of `shared`, read as the shortest run of the chunk's bytes that contains them."""
        strides = chunk.strides if chunk.strides is not None else row_strides(chunk.sizes)
        starts = [a - b for a, b in zip(shared.offsets, chunk.offsets, strict=True)]
        first = sum(a * b for a, b in zip(starts, strides, strict=True))
        last = first + sum((size - 1) * b for size, b in zip(shared.sizes, strides, strict=True))
        width = info.dtype.itemsize
        content = self._raw(key, info, chunk, first * width, (last + 1 - first) * width)
        return torch.frombuffer(content, dtype=info.dtype).as_strided(shared.sizes, strides)

    def _raw(self, key: str, info: TensorInfo, chunk: Chunk, start: int, size: int) -> bytearray:
        """Raw bytes [start, start + size) of a chunk, checked block by block where checksums are known."""
        data = chunk.data if chunk.data is not None else self._find_data(key, info, chunk)
        if data is None:
            return self._unpacked(key, info, chunk)[start : start + size]
        if not (self._verify and chunk.checksums):
            return self._pread(chunk.file, data + start, size, key)
        total = chunk.box.numel * info.dtype.itemsize
        begin, end = start // BLOCK * BLOCK, min(-(-(start + size) // BLOCK) * BLOCK, total)
        content = self._pread(chunk.file, data + begin, end - begin, key)
        for block in range(begin // BLOCK, -(-end // BLOCK)):
            part = memoryview(content)[block * BLOCK - begin : (block + 1) * BLOCK - begin]
            if crc32(part) != chunk.checksums[block]:
                raise self._changed(chunk.file, key, data + block * BLOCK)
        return content[start - begin : start - begin + size]

    def _find_data(self, key: str, info: TensorInfo, chunk: Chunk) -> int | None:
        """Where a foreign archive keeps its raw bytes; `None` if it may hold more, or less, than the chunk."""
        head = bytes(self._pread(chunk.file, chunk.offset, min(_HEAD, chunk.length), key))
        found = data_offset(head, chunk.sizes)
        size = chunk.box.numel * info.dtype.itemsize
        # A view saved with all of its storage has far more bytes than a head and a tail around the chunk.
        plain = found is not None and 0 <= chunk.length - found - size < _HEAD
        return chunk.offset + found if plain and found is not None else None

    def _unpacked(self, key: str, info: TensorInfo, chunk: Chunk) -> bytearray:
        content = self._pread(chunk.file, chunk.offset, chunk.length, key)
        tensor = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        if tuple(tensor.shape) != chunk.sizes or tensor.dtype != info.dtype:
            raise CorruptCheckpointError(f"{self._folder / chunk.file}: {key} is not what the metadata says")
        return bytearray(raw_bytes(tensor.contiguous()))

    def _pread(self, file: str, offset: int, size: int, key: str) -> bytearray:
        content = bytearray(size)
        self._read_into(file, offset, memoryview(content), key)
        self._progress(size)
        return content

    def _read_into(self, file: str, offset: int, view: memoryview, key: str) -> None:
        descriptor, size, done = self._descriptor(file, key), len(view), 0
        while done < size:
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise CorruptCheckpointError(
                    f"{self._folder / file} is truncated: {key} needs bytes up to {offset + size}, and it ends at "
                    f"{offset + done}"
                )
            done += count

    def _descriptor(self, file: str, key: str) -> int:
        if file not in self._open:
            try:
                self._open[file] = os.open(self._folder / file, os.O_RDONLY)
            except OSError as error:
                raise CorruptCheckpointError(
                    f"{self._folder / file}, which holds part of {key}, cannot be opened: {error.strerror}"
                ) from error
        return self._open[file]

    def _changed(self, file: str, key: str, offset: int) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self._folder / file}: the bytes of {key} near {offset} are not those that were written (checksum); "
            "restore the file, or load another checkpoint"
        )


def _plain(target: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether bytes of a checkpoint can go where they belong as they are."""
    return target.device.type == "cpu" and target.dtype == dtype


def _note_written(target: torch.Tensor) -> None:
    """Reading straight into memory does not count as a write by itself."""
    if not target.is_inference():
        torch.autograd.graph.increment_version([target])


def _row_major(chunk: Chunk) -> bool:
    """Whether it is known where the chunk's elements lie, and that they lie in row order."""
    return chunk.data is not None and getattr(chunk, "strides", None) is None


def _span(part: Box, chunk: Chunk, width: int) -> tuple[int, int]:
    """Bytes [first, last) of a row-major chunk that contain the elements of `part`."""
    if not part.numel:
        return 0, 0
    strides = row_strides(chunk.sizes)
    first = sum((a - b) * s for a, b, s in zip(part.offsets, chunk.offsets, strides, strict=True))
    last = first + sum((size - 1) * s for size, s in zip(part.sizes, strides, strict=True))
    return first * width, (last + 1) * width


def _halves(part: Box) -> Iterator[Box]:
    """Two boxes that make up `part`, cut along the first dim that has more than one element."""
    dim = next(d for d, size in enumerate(part.sizes) if size > 1)
    middle = part.sizes[dim] // 2
    for start, size in ((0, middle), (middle, part.sizes[dim] - middle)):
        offsets = (*part.offsets[:dim], part.offsets[dim] + start, *part.offsets[dim + 1 :])
        yield Box(offsets, (*part.sizes[:dim], size, *part.sizes[dim + 1 :]))


def missing_files(folder: Path, catalog: Catalog) -> Iterator[str]:
    """What is wrong with the files of a checkpoint, one line each: absent, of another size or checkpoint."""
    sizes: Mapping[str, int] = catalog.files
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            yield f"{name}{_contents(catalog, name)} is missing"
        elif path.stat().st_size != size:
            yield f"{name}{_contents(catalog, name)} has {path.stat().st_size} bytes instead of {size}"


def unlisted_files(folder: Path, catalog: Catalog, *, shards_only: bool = False) -> Iterator[str]:
    """Files in the folder of a checkpoint of ours that are no part of it, one line each; hidden ones are left alone.

    With `shards_only`, those that are called as what ranks write: of another checkpoint, then. Others may be a user's.
    """
    if not (folder / MANIFEST).is_file():
        return
    for path in sorted(folder.iterdir()):
        known = path.name in catalog.files or path.name == MANIFEST or path.name.startswith(".")
        if not known and (is_shard(path.name) or not shards_only):
            yield f"{path.name} is not of this checkpoint; move it away"


def _contents(catalog: Catalog, file: str) -> str:
    """What a file holds, in short."""
    held = [key for key, info in catalog.tensors.items() if any(chunk.file == file for chunk in info.chunks)]
    held += [key for key, blob in catalog.blobs.items() if getattr(blob, "file", None) == file]
    more = f" and {len(held) - 2} more" if len(held) > 2 else ""
    return f" (with {', '.join(held[:2])}{more})" if held else ""
