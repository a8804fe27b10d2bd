"""The C library behind the package: finding it, its signatures, and its errors."""

from __future__ import annotations

import ctypes
import ctypes.util
import enum
import os
from pathlib import Path
from typing import Any

SONAME = "libqcow2.so.0"


class Code(enum.IntEnum):
    """Why a call failed: the QCOW2_ERR_ numbers of qcow2.h."""

    NONE = 0
    IO = 1
    CORRUPT = 2
    BAD_HEADER = 3
    NOT_QCOW2 = 4
    UNSUPPORTED = 5
    BACKING_DENIED = 6
    BACKING_FORMAT = 7
    CHAIN = 8
    NEEDS_REPAIR = 9
    READ_ONLY = 10
    POISONED = 11
    OUT_OF_RANGE = 12
    ARGUMENT = 13
    OPTION = 14
    TOO_LARGE = 15
    EXISTS = 16
    PANIC = 17
    LOCKED = 18
    BAD_SECRET = 19
    CANCELLED = 20
    SNAPSHOT = 23
    BITMAP = 24
    QUEUE = 30


class QcowError(OSError):
    """A call of the library failed. ``errno`` is the system's number, ``code`` says why, the text names the value."""

    code: int

    def __init__(self, errno: int, text: str, code: int) -> None:
        super().__init__(errno, text)
        # A number that a newer library has and this enum has not stays a plain number.
        self.code = Code(code) if code in Code._value2member_map_ else code


class CInfo(ctypes.Structure):
    """struct qcow2_info."""

    _fields_ = [
        ("size_bytes", ctypes.c_uint64),
        ("cluster_size_bytes", ctypes.c_uint64),
        ("subcluster_size_bytes", ctypes.c_uint64),
        ("file_size_bytes", ctypes.c_uint64),
        ("allocated_bytes", ctypes.c_uint64),
        ("incompatible_features", ctypes.c_uint64),
        ("compatible_features", ctypes.c_uint64),
        ("autoclear_features", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        ("refcount_bits", ctypes.c_uint32),
        ("compression_type", ctypes.c_uint32),
        ("snapshots", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("backing_file", ctypes.c_char * 1024),
        ("backing_fmt", ctypes.c_char * 64),
    ]


class CStats(ctypes.Structure):
    """struct qcow2_stats."""

    _fields_ = [
        ("copied_bytes", ctypes.c_uint64),
        ("zero_filled_bytes", ctypes.c_uint64),
        ("clusters_allocated", ctypes.c_uint64),
        ("l2_tables_allocated", ctypes.c_uint64),
        ("allocating_writes", ctypes.c_uint64),
    ]


class CExtent(ctypes.Structure):
    """struct qcow2_extent."""

    _fields_ = [
        ("start", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("host_offset", ctypes.c_uint64),
        ("depth", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("reserved", ctypes.c_uint64 * 4),
    ]


class CBitmap(ctypes.Structure):
    """struct qcow2_bitmap."""

    _fields_ = [
        ("name", ctypes.c_char * 1024),
        ("granularity_bytes", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]


class CSnapshotInfo(ctypes.Structure):
    """struct qcow2_snapshot_info."""

    _fields_ = [
        ("id", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("size_bytes", ctypes.c_uint64),
        ("vm_state_bytes", ctypes.c_uint64),
        ("vm_clock_nsec", ctypes.c_uint64),
        ("icount", ctypes.c_uint64),
        ("date_sec", ctypes.c_uint32),
        ("date_nsec", ctypes.c_uint32),
    ]


class CSnapshotFacts(ctypes.Structure):
    """struct qcow2_snapshot_facts."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("vm_clock_nsec", ctypes.c_uint64),
        ("date_sec", ctypes.c_uint32),
        ("date_nsec", ctypes.c_uint32),
    ]


class COption(ctypes.Structure):
    """struct qcow2_option."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("help", ctypes.c_char_p),
        ("default_value", ctypes.c_char_p),
        ("values", ctypes.c_char_p),
        ("kind", ctypes.c_uint32),
        ("used_by", ctypes.c_uint32),
    ]


class CCheckResult(ctypes.Structure):
    """struct qcow2_check_result."""

    _fields_ = [
        ("corruptions", ctypes.c_uint64),
        ("leaks", ctypes.c_uint64),
        ("check_errors", ctypes.c_uint64),
        ("corruptions_fixed", ctypes.c_uint64),
        ("leaks_fixed", ctypes.c_uint64),
        ("total_clusters", ctypes.c_uint64),
        ("allocated_clusters", ctypes.c_uint64),
        ("fragmented_clusters", ctypes.c_uint64),
        ("compressed_clusters", ctypes.c_uint64),
        ("image_end_offset", ctypes.c_uint64),
    ]


class CFinding(ctypes.Structure):
    """struct qcow2_finding."""

    _fields_ = [
        ("host_offset", ctypes.c_uint64),
        ("guest_offset", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("references", ctypes.c_uint64),
        ("clusters", ctypes.c_uint64),
        ("kind", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("text", ctypes.c_char_p),
    ]


#: Functions of the caller.
FINDING_FN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(CFinding))
PROGRESS_FN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)

_HANDLE = ctypes.c_void_p
_OUT = ctypes.POINTER(ctypes.c_void_p)

#: Name: (result, parameters).
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "qcow2_version_string": (ctypes.c_char_p, []),
    "qcow2_has_feature": (ctypes.c_int, [ctypes.c_char_p]),
    "qcow2_last_error": (ctypes.c_char_p, []),
    "qcow2_last_error_code": (ctypes.c_int, []),
    "qcow2_open": (ctypes.c_int, [ctypes.c_char_p, _HANDLE, _OUT]),
    "qcow2_open_fd": (ctypes.c_int, [ctypes.c_int, _HANDLE, _OUT]),
    "qcow2_close": (ctypes.c_int, [_HANDLE]),
    "qcow2_flush": (ctypes.c_int, [_HANDLE]),
    "qcow2_size": (ctypes.c_int64, [_HANDLE]),
    "qcow2_pread": (ctypes.c_int, [_HANDLE, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint32]),
    "qcow2_pwrite": (ctypes.c_int, [_HANDLE, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint32]),
    "qcow2_write_zeroes": (ctypes.c_int, [_HANDLE, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32]),
    "qcow2_discard": (ctypes.c_int, [_HANDLE, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32]),
    "qcow2_create": (ctypes.c_int, [ctypes.c_char_p, ctypes.c_uint64, _HANDLE, ctypes.c_uint32]),
    "qcow2_resize": (ctypes.c_int, [_HANDLE, ctypes.c_uint64, _HANDLE, ctypes.c_uint32]),
    "qcow2_opts_new": (_HANDLE, []),
    "qcow2_opts_free": (None, [_HANDLE]),
    "qcow2_opts_set_str": (ctypes.c_int, [_HANDLE, ctypes.c_char_p, ctypes.c_char_p]),
    "qcow2_opts_set_progress": (ctypes.c_int, [_HANDLE, PROGRESS_FN, ctypes.c_void_p, ctypes.c_void_p]),
    "qcow2_option_describe": (ctypes.c_int, [ctypes.c_size_t, ctypes.POINTER(COption), ctypes.c_size_t]),
    "qcow2_get_info": (ctypes.c_int, [_HANDLE, ctypes.POINTER(CInfo), ctypes.c_size_t]),
    "qcow2_info_json": (ctypes.c_int, [_HANDLE, _OUT]),
    "qcow2_string_free": (None, [ctypes.c_void_p]),
    "qcow2_get_stats": (ctypes.c_int, [_HANDLE, ctypes.POINTER(CStats), ctypes.c_size_t]),
    "qcow2_opts_set_finding": (ctypes.c_int, [_HANDLE, FINDING_FN, ctypes.c_void_p, ctypes.c_void_p]),
    "qcow2_check": (
        ctypes.c_int,
        [ctypes.c_char_p, _HANDLE, ctypes.c_uint32, ctypes.POINTER(CCheckResult), ctypes.c_size_t],
    ),
    "qcow2_check_fd": (
        ctypes.c_int,
        [ctypes.c_int, _HANDLE, ctypes.c_uint32, ctypes.POINTER(CCheckResult), ctypes.c_size_t],
    ),
    "qcow2_check_image": (
        ctypes.c_int,
        [_HANDLE, _HANDLE, ctypes.c_uint32, ctypes.POINTER(CCheckResult), ctypes.c_size_t],
    ),
    "qcow2_bitmap_describe": (
        ctypes.c_int,
        [_HANDLE, ctypes.c_size_t, ctypes.POINTER(CBitmap), ctypes.c_size_t],
    ),
    "qcow2_bitmap_add": (ctypes.c_int, [_HANDLE, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint32]),
    "qcow2_bitmap_remove": (ctypes.c_int, [_HANDLE, ctypes.c_char_p]),
    "qcow2_bitmap_clear": (ctypes.c_int, [_HANDLE, ctypes.c_char_p]),
    "qcow2_bitmap_enable": (ctypes.c_int, [_HANDLE, ctypes.c_char_p]),
    "qcow2_bitmap_disable": (ctypes.c_int, [_HANDLE, ctypes.c_char_p]),
    "qcow2_bitmap_merge": (ctypes.c_int, [_HANDLE, ctypes.c_char_p, _HANDLE, ctypes.c_char_p]),
    "qcow2_bitmap_extents": (
        ctypes.c_int,
        [
            _HANDLE,
            ctypes.c_char_p,
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.c_uint32,
            ctypes.POINTER(CExtent),
            ctypes.c_size_t,
            ctypes.POINTER(ctypes.c_size_t),
        ],
    ),
    "qcow2_map": (
        ctypes.c_int,
        [
            _HANDLE,
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.c_uint32,
            ctypes.POINTER(CExtent),
            ctypes.c_size_t,
            ctypes.POINTER(ctypes.c_size_t),
        ],
    ),
    "qcow2_snapshot_list": (ctypes.c_int, [_HANDLE, _OUT]),
    "qcow2_snapshots_count": (ctypes.c_size_t, [ctypes.c_void_p]),
    "qcow2_snapshots_get": (
        ctypes.c_int,
        [ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(CSnapshotInfo), ctypes.c_size_t],
    ),
    "qcow2_snapshots_free": (None, [ctypes.c_void_p]),
    "qcow2_snapshot_create": (
        ctypes.c_int,
        [_HANDLE, ctypes.c_char_p, ctypes.POINTER(CSnapshotFacts), ctypes.c_uint32],
    ),
    "qcow2_snapshot_apply": (ctypes.c_int, [_HANDLE, ctypes.c_char_p, ctypes.c_uint32]),
    "qcow2_snapshot_delete": (
        ctypes.c_int,
        [_HANDLE, ctypes.c_char_p, ctypes.c_uint32, PROGRESS_FN, ctypes.c_void_p],
    ),
    "qcow2_snapshot_open": (ctypes.c_int, [_HANDLE, ctypes.c_char_p, ctypes.c_uint32, _OUT]),
}


def library_candidates() -> list[str]:
    """Where the library is looked for: ``$LIBQCOW2_SO`` alone if it is set, else bundled, else the system's."""
    chosen = os.environ.get("LIBQCOW2_SO")
    if chosen:
        return [chosen]
    bundled = Path(__file__).with_name(SONAME)
    return [str(bundled)] if bundled.exists() else [SONAME]


def _load() -> ctypes.CDLL:
    for name in library_candidates():
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            raise ImportError(
                f"libqcow2 cannot be loaded from {name!r}: {error}; install it, or set LIBQCOW2_SO to its path"
            ) from error
    for function, (result, parameters) in _SIGNATURES.items():
        getattr(library, function).restype = result
        getattr(library, function).argtypes = parameters
    return library


lib = _load()


def check(result: int) -> int:
    """Turns a negative result into the exception that says why."""
    if result < 0:
        text = lib.qcow2_last_error().decode("utf-8", "replace")
        raise QcowError(-result, text, lib.qcow2_last_error_code())
    return result
