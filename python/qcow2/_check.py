"""Checking and repairing images."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass

from ._image import OptionValue, PathLike, _Options
from ._library import FINDING_FN, PROGRESS_FN, CCheckResult, CFinding, check as _check, lib

_REPAIRS = {"nothing": 0, "leaks": 1, "all": 2}
_NO_OFFSET = (1 << 64) - 1


@dataclass(frozen=True)
class CheckResult:
    """What a check found; after a repair, what is left. The names are those of ``qemu-img check --output=json``."""

    corruptions: int
    leaks: int
    check_errors: int
    corruptions_fixed: int
    leaks_fixed: int
    total_clusters: int
    allocated_clusters: int
    fragmented_clusters: int
    compressed_clusters: int
    image_end_offset: int

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong, leaks aside."""
        return self.corruptions == 0 and self.check_errors == 0


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong; ``kind`` is one of the QCOW2_FINDING_ numbers of qcow2.h."""

    kind: int
    host_offset: int
    guest_offset: int | None
    value: int
    references: int
    clusters: int
    text: str


def check(
    path: PathLike | int,
    *,
    repair: str = "nothing",
    on_finding: Callable[[Finding], object] | None = None,
    on_progress: Callable[[int, int], object] | None = None,
    **options: OptionValue,
) -> CheckResult:
    """Checks the image at ``path``, or behind a file descriptor, and repairs "nothing", "leaks" or "all".

    ``on_finding`` gets each :class:`Finding`. ``on_progress`` gets how much is done and how much there is; a true
    result cancels the check (an error with code CANCELLED), and leaves an image that is no worse.
    """
    if repair not in _REPAIRS:
        raise ValueError(f"repair must be one of {', '.join(_REPAIRS)}, not {repair!r}")
    fd = isinstance(path, int)
    function, what = (lib.qcow2_check_fd, path) if fd else (lib.qcow2_check, os.fsencode(path))
    return run(lambda *rest: function(what, *rest), _REPAIRS[repair], on_finding, on_progress, options)


def run(
    function: Callable[..., int],
    flags: int,
    on_finding: Callable[[Finding], object] | None,
    on_progress: Callable[[int, int], object] | None,
    options: dict[str, OptionValue],
) -> CheckResult:
    """Has ``function`` check something. It gets what the C functions do, but for the first argument."""
    raised: list[BaseException] = []

    def finding(_: int | None, given: ctypes._Pointer[CFinding]) -> None:
        try:
            if on_finding is not None and not raised:
                on_finding(_finding(given.contents))
        except BaseException as error:
            raised.append(error)

    def progress(_: int | None, done: int, total: int) -> int:
        try:
            return 1 if raised or on_progress is not None and on_progress(done, total) else 0
        except BaseException as error:
            raised.append(error)
            return 1

    result = CCheckResult()
    out, size = ctypes.byref(result), ctypes.sizeof(result)
    # Kept until the options are freed, which hold them.
    finding_fn, progress_fn = FINDING_FN(finding), PROGRESS_FN(progress)
    with _Options(options) as handle:
        if on_finding is not None:
            _check(lib.qcow2_opts_set_finding(handle, finding_fn, None, None))
        _check(lib.qcow2_opts_set_progress(handle, progress_fn, None, None))
        code = function(handle, flags, out, size)
    if raised:
        raise raised[0]
    _check(code)
    return CheckResult(*(getattr(result, name) for name, _ in CCheckResult._fields_))


def _finding(given: CFinding) -> Finding:
    guest = None if given.guest_offset == _NO_OFFSET else given.guest_offset
    return Finding(
        kind=given.kind,
        host_offset=given.host_offset,
        guest_offset=guest,
        value=given.value,
        references=given.references,
        clusters=given.clusters,
        text=given.text.decode("utf-8", "replace"),
    )
