"""Images as Python objects."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Union

from ._library import (
    PROGRESS_FN,
    CBitmap,
    CExtent,
    CInfo,
    Code,
    COption,
    CSnapshotFacts,
    CSnapshotInfo,
    CStats,
    QcowError,
    check,
    lib,
)

if TYPE_CHECKING:
    from ._check import CheckResult, Finding

#: Values of options: text as in qemu-img, numbers, and booleans for on and off.
OptionValue = Union[str, int, bool]
PathLike = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]
#: Called with what is done and what there is to do; a true result cancels the call.
Progress = Callable[[int, int], object]

_OVERWRITE = 1
_FUA = 1
_WRITE_COMPRESSED = 8
_MAY_UNMAP = 2
_NO_FALLBACK = 4
_ALLOW_SHRINK = 1
_EXTENTS_A_CALL = 256
_NOT_KNOWN = (1 << 64) - 1
_DATA, _ZERO, _COMPRESSED, _PRESENT, _OFFSET_VALID, _DIRTY, _DATA_FILE = (1 << bit for bit in range(7))
_ENABLED, _IN_USE, _INCONSISTENT, _UNUSABLE = (1 << bit for bit in range(4))
_DISABLED = 1


def version() -> str:
    """The version of the library."""
    text: bytes = lib.qcow2_version_string()
    return text.decode()


def has_feature(name: str) -> bool:
    """Whether this build of the library has a feature: "zlib", "zstd", "extended_l2", "discard" and so on."""
    return bool(lib.qcow2_has_feature(name.encode()))


def option_names() -> list[str]:
    """The names of all options."""
    names: list[str] = []
    option = COption()
    while lib.qcow2_option_describe(len(names), ctypes.byref(option), ctypes.sizeof(option)) == 0:
        names.append(option.name.decode())
    return names


class _Options:
    """A qcow2_opts for the length of a with block. What the progress function raises is raised at its end."""

    def __init__(self, options: dict[str, OptionValue], on_progress: Progress | None = None) -> None:
        self._options = options
        self._raised: BaseException | None = None

        def tell(_: object, done: int, total: int) -> int:
            try:
                return 1 if on_progress is not None and on_progress(done, total) else 0
            except BaseException as error:  # noqa: BLE001 - it must not pass through C
                self._raised = error
                return 1

        self._tell = PROGRESS_FN(tell) if on_progress is not None else None

    def __enter__(self) -> int:
        self._handle: int = lib.qcow2_opts_new()
        try:
            for key, value in self._options.items():
                text = ("on" if value else "off") if isinstance(value, bool) else str(value)
                check(lib.qcow2_opts_set_str(self._handle, key.encode(), text.encode()))
            if self._tell is not None:
                check(lib.qcow2_opts_set_progress(self._handle, self._tell, None, None))
        except BaseException:
            lib.qcow2_opts_free(self._handle)
            raise
        return self._handle

    def __exit__(self, *_: object) -> None:
        lib.qcow2_opts_free(self._handle)
        if self._raised is not None:
            raise self._raised


def _size(size: int) -> int:
    if size < 0 or size >= 1 << 64:
        raise ValueError(f"size must be from 0 to 2**64 - 1, not {size}")
    return size


def create(
    path: PathLike,
    size: int,
    *,
    overwrite: bool = False,
    on_progress: Progress | None = None,
    **options: OptionValue,
) -> None:
    """Creates an image of ``size`` bytes; the options are those of ``qemu-img create -o``.

    ``on_progress`` gets how many bytes are done and how many there are; a true result cancels the call (an error with
    code CANCELLED).
    """
    size = _size(size)
    with _Options(options, on_progress) as handle:
        check(lib.qcow2_create(os.fsencode(path), size, handle, _OVERWRITE if overwrite else 0))


@dataclass(frozen=True)
class Extent:
    """A range of the guest disk in which everything is of one kind; the names are those of ``qemu-img map``."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None
    #: The offset counts in the external data file of the file that ``depth`` names.
    data_file: bool = False


@dataclass(frozen=True)
class Bitmap:
    """A persistent dirty bitmap."""

    name: str
    granularity: int
    enabled: bool
    in_use: bool
    inconsistent: bool
    unusable: bool


@dataclass(frozen=True)
class DirtyExtent:
    """A range of the guest disk of which a bitmap says that it was changed, or that it was not."""

    start: int
    length: int
    dirty: bool


@dataclass(frozen=True)
class Snapshot:
    """An internal snapshot. ``size`` is that of its disk, ``None`` where the image does not record it."""

    id: str
    name: str
    size: int | None
    date: float
    vm_clock_nsec: int
    vm_state_size: int
    icount: int | None


class Image:
    """An open image. Use it in a with block, or call :meth:`close`."""

    def __init__(self, path: PathLike | int, **options: OptionValue) -> None:
        """Opens the image at ``path``, or behind a file descriptor (which stays the caller's).

        Options are those of the library, ``read_only=True`` or ``backing="relative"`` for example; see
        :func:`option_names`.
        """
        self._handle = ctypes.c_void_p()
        # Calls under way, so that close waits for them: the library's own close must be alone.
        self._users = 0
        self._idle = threading.Condition()
        with _Options(options) as handle:
            if isinstance(path, int):
                check(lib.qcow2_open_fd(path, handle, ctypes.byref(self._handle)))
            else:
                check(lib.qcow2_open(os.fsencode(path), handle, ctypes.byref(self._handle)))

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Only reached without users; an error has nobody left to go to.
        if getattr(self, "_handle", None):
            lib.qcow2_close(self._handle)
            self._handle = ctypes.c_void_p()

    def _call(self, function: Any, *arguments: Any) -> int:
        return check(self._returned(function, *arguments))

    def _returned(self, function: Any, *arguments: Any) -> int:
        with self._idle:
            if not self._handle:
                raise ValueError("the image is closed")
            self._users += 1
        try:
            return int(function(self._handle, *arguments))
        finally:
            with self._idle:
                self._users -= 1
                self._idle.notify_all()

    def close(self) -> None:
        """Makes everything durable and closes the image; closing again does nothing."""
        with self._idle:
            handle, self._handle = self._handle, ctypes.c_void_p()
            self._idle.wait_for(lambda: self._users == 0)
        if handle:
            check(lib.qcow2_close(handle))

    @property
    def closed(self) -> bool:
        """Whether the image has been closed."""
        return not self._handle

    @property
    def size(self) -> int:
        """Size of the guest disk in bytes."""
        return self._call(lib.qcow2_size)

    def resize(
        self,
        size: int,
        *,
        allow_shrink: bool = False,
        preallocation: str = "off",
        on_progress: Progress | None = None,
    ) -> None:
        """Gives the guest disk another size in bytes. What it grows by reads as zeroes."""
        size = _size(size)
        options: dict[str, OptionValue] = {} if preallocation == "off" else {"preallocation": preallocation}
        with _Options(options, on_progress) as handle:
            self._call(lib.qcow2_resize, size, handle, _ALLOW_SHRINK if allow_shrink else 0)

    def readinto(self, buffer: Any, offset: int) -> int:
        """Fills a writable buffer (bytearray, memoryview, array, ...) from ``offset``, without a copy in between.

        Returns its length in bytes.
        """
        with memoryview(buffer) as view, view.cast("B") as bytes_view:
            if bytes_view.readonly:
                raise TypeError("readinto needs a writable buffer")
            length = bytes_view.nbytes
            if length:
                memory = (ctypes.c_char * length).from_buffer(bytes_view)
                try:
                    self._call(lib.qcow2_pread, memory, length, _offset(offset), 0)
                finally:
                    del memory  # gives the export of the view back
            else:
                self._call(lib.qcow2_pread, None, 0, _offset(offset), 0)
            return length

    def read(self, length: int, offset: int) -> bytes:
        """Reads ``length`` bytes at ``offset``."""
        if length < 0:
            raise ValueError(f"length must not be negative, but is {length}")
        memory = ctypes.create_string_buffer(length)
        self._call(lib.qcow2_pread, memory, length, _offset(offset), 0)
        return memory.raw

    def write(self, data: Any, offset: int, *, fua: bool = False, compressed: bool = False) -> int:
        """Writes ``data`` (bytes, or anything with a buffer) at ``offset``; with ``fua`` it is durable on return.

        With ``compressed``, whole clusters (the last one of the image may be short) are stored compressed as far as
        that makes them smaller. Returns the number of bytes.
        """
        flags = _FUA * fua | _WRITE_COMPRESSED * compressed
        if isinstance(data, bytes):
            self._call(lib.qcow2_pwrite, data, len(data), _offset(offset), flags)
            return len(data)
        with memoryview(data) as view, view.cast("B") as bytes_view:
            length = bytes_view.nbytes
            if bytes_view.readonly or not length:
                # No address can be had of these without a copy.
                self._call(lib.qcow2_pwrite, bytes(bytes_view), length, _offset(offset), flags)
            else:
                memory = (ctypes.c_char * length).from_buffer(bytes_view)
                try:
                    self._call(lib.qcow2_pwrite, memory, length, _offset(offset), flags)
                finally:
                    del memory
            return length

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """Makes ``length`` bytes at ``offset`` read as zeroes, with as little writing as possible.

        With ``may_unmap``, clusters that hold nothing else any more are given up. With ``no_fallback`` the call fails
        with ``errno.ENOTSUP`` where zeroes would have to be written as data. With ``fua`` it is durable on return.
        """
        flags = _MAY_UNMAP * may_unmap | _NO_FALLBACK * no_fallback | _FUA * fua
        self._call(lib.qcow2_write_zeroes, _offset(offset), _length(length), flags)

    def discard(self, offset: int, length: int) -> None:
        """Gives up what ``length`` bytes at ``offset`` hold, as advice.

        Subclusters (or clusters) that lie in the range as a whole are dropped where that is cheap, and read as zeroes
        then; the rest of the range stays as it is.
        """
        self._call(lib.qcow2_discard, _offset(offset), _length(length), 0)

    def flush(self) -> None:
        """Makes everything durable that was written before."""
        self._call(lib.qcow2_flush)

    def map(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """The extents of a range (by default of the whole disk), as ``qemu-img map`` lists them."""
        end = self.size if length is None else offset + length
        extents = (CExtent * _EXTENTS_A_CALL)()
        count = ctypes.c_size_t()
        while offset < end:
            self._call(
                lib.qcow2_map, _offset(offset), end - offset, 0, extents, _EXTENTS_A_CALL, ctypes.byref(count)
            )
            for extent in extents[: count.value]:
                yield _extent(extent)
                offset = extent.start + extent.length

    def bitmaps(self) -> list[Bitmap]:
        """The persistent dirty bitmaps of the image."""
        found: list[Bitmap] = []
        bitmap = CBitmap()
        while True:
            try:
                self._call(lib.qcow2_bitmap_describe, len(found), ctypes.byref(bitmap), ctypes.sizeof(bitmap))
            except QcowError as error:
                if error.code != Code.BITMAP:
                    raise
                return found
            flags = bitmap.flags
            found.append(
                Bitmap(
                    name=bitmap.name.decode(),
                    granularity=bitmap.granularity_bytes,
                    enabled=bool(flags & _ENABLED),
                    in_use=bool(flags & _IN_USE),
                    inconsistent=bool(flags & _INCONSISTENT),
                    unusable=bool(flags & _UNUSABLE),
                )
            )

    def add_bitmap(self, name: str, granularity: int = 0, *, disabled: bool = False) -> None:
        """Adds a bitmap, which records changes from now on unless it is ``disabled``."""
        self._call(lib.qcow2_bitmap_add, _name(name), _u64("granularity", granularity), _DISABLED * disabled)

    def remove_bitmap(self, name: str) -> None:
        """Removes a bitmap, whatever state it is in."""
        self._call(lib.qcow2_bitmap_remove, _name(name))

    def clear_bitmap(self, name: str) -> None:
        """Makes a bitmap start anew."""
        self._call(lib.qcow2_bitmap_clear, _name(name))

    def enable_bitmap(self, name: str) -> None:
        """Lets a bitmap record changes from now on."""
        self._call(lib.qcow2_bitmap_enable, _name(name))

    def disable_bitmap(self, name: str) -> None:
        """Lets a bitmap record no more changes."""
        self._call(lib.qcow2_bitmap_disable, _name(name))

    def merge_bitmap(self, name: str, other: str, image: Image | None = None) -> None:
        """Adds to a bitmap what the bitmap ``other`` says, of this image or of another ``image`` of the same size."""
        if image is None or image is self:
            self._call(lib.qcow2_bitmap_merge, _name(name), None, _name(other))
            return
        image._call(lambda handle: self._call(lib.qcow2_bitmap_merge, _name(name), handle, _name(other)))

    def bitmap_extents(self, name: str, offset: int = 0, length: int | None = None) -> Iterator[DirtyExtent]:
        """What a bitmap says about a range (by default the whole disk), written and not yet stored included."""
        end = self.size if length is None else offset + length
        extents = (CExtent * _EXTENTS_A_CALL)()
        count = ctypes.c_size_t()
        while offset < end:
            self._call(
                lib.qcow2_bitmap_extents,
                _name(name),
                _offset(offset),
                end - offset,
                0,
                extents,
                _EXTENTS_A_CALL,
                ctypes.byref(count),
            )
            for extent in extents[: count.value]:
                yield DirtyExtent(extent.start, extent.length, bool(extent.flags & _DIRTY))
                offset = extent.start + extent.length

    def info(self) -> dict[str, Any]:
        """Facts about the image, with the keys of ``qemu-img info --output=json``."""
        text = ctypes.c_void_p()
        self._call(lib.qcow2_info_json, ctypes.byref(text))
        try:
            facts: dict[str, Any] = json.loads(ctypes.string_at(text.value or 0))
        finally:
            lib.qcow2_string_free(text)
        return facts

    def snapshots(self) -> list[Snapshot]:
        """The internal snapshots, in the order in which they were taken."""
        handle = ctypes.c_void_p()
        self._call(lib.qcow2_snapshot_list, ctypes.byref(handle))
        try:
            infos = []
            for index in range(lib.qcow2_snapshots_count(handle)):
                info = CSnapshotInfo()
                check(lib.qcow2_snapshots_get(handle, index, ctypes.byref(info), ctypes.sizeof(info)))
                infos.append(_snapshot(info))
            return infos
        finally:
            lib.qcow2_snapshots_free(handle)

    def snapshot_create(self, name: str, *, date: float | None = None, vm_clock_nsec: int = 0) -> None:
        """Takes a snapshot of the disk as it is; ``date`` is in seconds since the Epoch, by default now."""
        facts = CSnapshotFacts(ctypes.sizeof(CSnapshotFacts), _u64("vm_clock_nsec", vm_clock_nsec))
        if date is not None:
            if date < 0 or date >= 1 << 32:
                raise ValueError(f"date must be from 0 to 2**32, not {date}")
            facts.date_sec, facts.date_nsec = int(date), int(date % 1 * 1e9)
        self._call(lib.qcow2_snapshot_create, name.encode(), ctypes.byref(facts), 0)

    def check(
        self,
        *,
        on_finding: Callable[[Finding], object] | None = None,
        on_progress: Progress | None = None,
        **options: OptionValue,
    ) -> CheckResult:
        """Checks the image as it is now, while it is open; other threads wait. Repairs nothing: see :func:`qcow2.check`.

        The functions are as there, and must not use the image.
        """
        from ._check import run

        return run(functools.partial(self._returned, lib.qcow2_check_image), 0, on_finding, on_progress, options)

    def snapshot_apply(self, id_or_name: str) -> None:
        """Makes the disk what it was when the snapshot was taken, its size included."""
        self._call(lib.qcow2_snapshot_apply, id_or_name.encode(), 0)

    def snapshot_delete(self, id_or_name: str, *, progress: Callable[[int, int], bool] | None = None) -> None:
        """Deletes a snapshot.

        ``progress`` is called with how much is done and how much there is in all. As long as the snapshot is only
        verified, ``False`` (not ``None``) or an exception ends the call, and nothing has been changed.
        """
        failed: list[BaseException] = []

        def tell(_: int | None, done: int, total: int) -> int:
            try:
                return int(progress is not None and progress(done, total) is False)
            except BaseException as error:  # no exception crosses C
                failed.append(error)
                return 1

        try:
            self._call(lib.qcow2_snapshot_delete, id_or_name.encode(), 0, PROGRESS_FN(tell), None)
        finally:
            if failed:
                raise failed[0]

    def snapshot_open(self, id_or_name: str) -> Image:
        """Opens a snapshot as an image of its own, which takes no writes and keeps it from being deleted."""
        opened = Image.__new__(Image)
        opened._handle = ctypes.c_void_p()
        opened._users = 0
        opened._idle = threading.Condition()
        self._call(lib.qcow2_snapshot_open, id_or_name.encode(), 0, ctypes.byref(opened._handle))
        return opened

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        info = CInfo()
        self._call(lib.qcow2_get_info, ctypes.byref(info), ctypes.sizeof(info))
        return int(info.cluster_size_bytes)

    def stats(self) -> dict[str, int]:
        """The counters of this handle."""
        stats = CStats()
        self._call(lib.qcow2_get_stats, ctypes.byref(stats), ctypes.sizeof(stats))
        return {name: getattr(stats, name) for name, *_ in CStats._fields_}


def open(path: PathLike | int, **options: OptionValue) -> Image:  # as gzip.open: the module is its namespace
    """Opens an image: the same as :class:`Image`, by the name that one looks for first."""
    return Image(path, **options)


def _name(name: str) -> bytes:
    if "\0" in name:
        raise ValueError("a name must not contain a zero character")
    return name.encode()


def _offset(offset: int) -> int:
    return _u64("offset", offset)


def _length(length: int) -> int:
    return _u64("length", length)


def _u64(name: str, value: int) -> int:
    # ctypes would silently take it modulo 2**64.
    if value < 0 or value >= 1 << 64:
        raise ValueError(f"{name} must be from 0 to 2**64 - 1, not {value}")
    return value


def _snapshot(info: CSnapshotInfo) -> Snapshot:
    return Snapshot(
        id=(info.id or b"").decode("utf-8", "replace"),
        name=(info.name or b"").decode("utf-8", "replace"),
        size=None if info.size_bytes == _NOT_KNOWN else info.size_bytes,
        date=info.date_sec + info.date_nsec / 1e9,
        vm_clock_nsec=info.vm_clock_nsec,
        vm_state_size=info.vm_state_bytes,
        icount=None if info.icount == _NOT_KNOWN else info.icount,
    )


def _extent(extent: CExtent) -> Extent:
    flags = extent.flags
    return Extent(
        start=extent.start,
        length=extent.length,
        depth=extent.depth,
        present=bool(flags & _PRESENT),
        zero=bool(flags & _ZERO),
        data=bool(flags & _DATA),
        compressed=bool(flags & _COMPRESSED),
        offset=extent.host_offset if flags & _OFFSET_VALID else None,
        data_file=bool(flags & _DATA_FILE),
    )
