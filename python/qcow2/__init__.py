"""qcow2 images through libqcow2.

    import qcow2

    qcow2.create("disk.qcow2", 1 << 30, extended_l2=True)
    with qcow2.open("disk.qcow2") as image:
        image.write(b"hello", 4096)
        print(image.read(5, 4096))

Offsets and lengths are in bytes. An image may be used by several threads at once; calls release the interpreter's lock.
"""

from ._check import CheckResult, Finding, check
from ._image import Bitmap, DirtyExtent, Extent, Image, Snapshot, create, has_feature, open, option_names, version
from ._library import Code, QcowError

__all__ = [
    "Bitmap",
    "CheckResult",
    "Code",
    "DirtyExtent",
    "Extent",
    "Finding",
    "Image",
    "QcowError",
    "Snapshot",
    "check",
    "create",
    "has_feature",
    "open",
    "option_names",
    "version",
]
