"""The package against the library: each call, each kind of buffer, each way to fail."""

import array
import ast
import ctypes
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import qcow2
from qcow2 import _library

HEADER = Path(__file__).parents[2] / "include" / "qcow2.h"


class Case(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.disk = self.folder / "disk.qcow2"

    def image(self, size: int = 1 << 20, **options: object) -> qcow2.Image:
        qcow2.create(self.disk, size, **options)
        image = qcow2.Image(self.disk)
        self.addCleanup(image.close)
        return image

    def fails(self, code: qcow2.Code, number: int, part: str):
        test = self

        class Expectation:
            def __enter__(self) -> None:
                pass

            def __exit__(self, kind, error, traceback) -> bool:
                test.assertIsInstance(error, qcow2.QcowError)
                test.assertEqual((error.code, error.errno), (code, number))
                test.assertIn(part, str(error))
                return True

        return Expectation()


class Snapshots(Case):
    def test_take_change_apply_delete(self) -> None:
        with self.image() as image:
            image.write(b"old", 70000)
            image.snapshot_create("first", date=1234567890.5, vm_clock_nsec=7)
            image.write(b"new", 70000)
            image.snapshot_create("second")
            first, second = image.snapshots()
            self.assertEqual((first.id, first.name, first.size), ("1", "first", 1 << 20))
            self.assertEqual((first.date, first.vm_clock_nsec, first.icount), (1234567890.5, 7, None))
            self.assertEqual((second.id, second.vm_state_size), ("2", 0))
            self.assertEqual([s["name"] for s in image.info()["snapshots"]], ["first", "second"])
            with image.snapshot_open("first") as opened:
                self.assertEqual(opened.read(3, 70000), b"old")
                with self.fails(qcow2.Code.READ_ONLY, errno.EROFS, "read-only"):
                    opened.write(b"x", 0)
                with self.fails(qcow2.Code.SNAPSHOT, errno.EBUSY, "first"):
                    image.snapshot_delete("first")
            image.snapshot_apply("1")
            self.assertEqual(image.read(3, 70000), b"old")
            told: list[tuple[int, int]] = []
            image.snapshot_delete("first", progress=lambda *args: told.append(args))
            self.assertEqual(told[-1][0], told[-1][1])
            self.assertEqual([s.name for s in image.snapshots()], ["second"])
            with self.fails(qcow2.Code.SNAPSHOT, errno.ENOENT, "first"):
                image.snapshot_apply("first")
        with qcow2.open(self.disk, snapshot="second") as image:
            self.assertEqual(image.read(3, 70000), b"new")

    def test_a_delete_that_is_ended_changes_nothing(self) -> None:
        with self.image() as image:
            image.write(b"old", 0)
            image.snapshot_create("s")
            with self.fails(qcow2.Code.CANCELLED, errno.ECANCELED, ""):
                image.snapshot_delete("s", progress=lambda done, total: False)
            with self.assertRaises(ZeroDivisionError):
                image.snapshot_delete("s", progress=lambda done, total: 1 // 0)
            self.assertEqual(len(image.snapshots()), 1)


class Data(Case):
    def test_read_what_was_written(self) -> None:
        with self.image(extended_l2=True) as image:
            self.assertEqual(image.size, 1 << 20)
            self.assertEqual(image.write(b"hello", 5000), 5)
            self.assertEqual(image.read(7, 4999), b"\0hello\0")
            self.assertEqual(image.read(0, 1 << 20), b"")
            image.flush()
            image.write(b"fua", 100, fua=True)
        with qcow2.open(str(self.disk), read_only=True) as image:
            self.assertEqual(image.read(5, 5000), b"hello")
            self.assertEqual(image.read(3, 100), b"fua")

    def test_write_compressed(self) -> None:
        for method in ("zlib", "zstd"):
            self.disk.unlink(missing_ok=True)
            with self.image((1 << 20) + 512, compression_type=method) as image:
                text = bytes(range(256)) * 512
                self.assertEqual(image.write(text, 65536, compressed=True), 131072)
                image.write(bytearray(b"z" * 512), 1 << 20, compressed=True, fua=True)
                compressed = [(e.start, e.length) for e in image.map() if e.compressed]
                self.assertEqual(compressed, [(65536, 131072), (1 << 20, 512)])
                self.assertEqual(image.read(131072, 65536), text)
                with self.fails(qcow2.Code.ARGUMENT, errno.EINVAL, "'offset' is 512"):
                    image.write(text, 512, compressed=True)
            self.assertLess(self.disk.stat().st_size, 7 * 65536)

    def test_any_buffer(self) -> None:
        image = self.image()
        for data in (bytearray(b"abcd"), memoryview(b"abcd"), array.array("H", [0x6261, 0x6463])):
            image.write(b"\0" * 8, 0)
            self.assertEqual(image.write(data, 2), 4)
            self.assertEqual(image.read(8, 0), b"\0\0abcd\0\0")
        whole = bytearray(8)
        self.assertEqual(image.readinto(memoryview(whole)[1:5], 2), 4)
        self.assertEqual(whole, b"\0abcd\0\0\0")
        numbers = array.array("I", [0, 0])
        image.readinto(numbers, 2)
        self.assertEqual(numbers.tobytes(), b"abcd\0\0\0\0")
        self.assertEqual(image.readinto(bytearray(), 0), 0)
        whole.extend(b"x")  # no export is left behind
        with self.assertRaises(TypeError):
            image.readinto(b"immutable", 0)
        with self.assertRaises(TypeError):
            image.write("text", 0)

    def test_readinto_does_not_copy(self) -> None:
        image = self.image()
        image.write(b"\x5a" * 65536, 0)
        buffer = bytearray(65536)
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        real = _library.lib.qcow2_pread
        seen = []

        def spy(handle, memory, length, offset, flags):
            seen.append(ctypes.addressof(memory))
            return real(handle, memory, length, offset, flags)

        with mock.patch.object(_library.lib, "qcow2_pread", spy):
            image.readinto(buffer, 0)
        self.assertEqual(seen, [address])
        self.assertEqual(buffer, b"\x5a" * 65536)

    def test_write_zeroes(self) -> None:
        image = self.image(extended_l2=True)
        image.write(b"x" * 131072, 0)
        image.write_zeroes(1000, 64536)
        self.assertEqual(image.read(64538, 999), b"x" + b"\0" * 64536 + b"x")
        self.assertEqual([e.zero for e in image.map(2048, 2048)], [True])
        self.assertIsNotNone(next(image.map(2048, 2048)).offset)
        image.write_zeroes(0, 131072, may_unmap=True, no_fallback=True, fua=True)
        self.assertIsNone(next(image.map()).offset)
        image.write(b"x" * 4096, 0)
        with self.fails(qcow2.Code.UNSUPPORTED, errno.ENOTSUP, "without writing data"):
            image.write_zeroes(100, 1000, no_fallback=True)
        self.assertEqual(image.read(4096, 0), b"x" * 4096)

    def test_discard_gives_space_back(self) -> None:
        image = self.image(16 << 20, extended_l2=True)
        image.flush()
        empty = self.disk.stat().st_blocks
        image.write(b"x" * (16 << 20), 0)
        image.flush()
        self.assertGreater(self.disk.stat().st_blocks, 16 << 11)
        image.discard(2048, 2048)
        self.assertEqual(image.read(6144, 0), b"x" * 2048 + b"\0" * 2048 + b"x" * 2048)
        image.discard(100, 100)
        self.assertEqual(image.read(1, 100), b"x")
        image.discard(0, 16 << 20)
        image.flush()
        self.assertEqual(image.read(1 << 20, 0), bytes(1 << 20))
        image.close()
        self.assertLess(self.disk.stat().st_blocks, empty + (1 << 11))

    def test_threads(self) -> None:
        image = self.image(4 << 20, extended_l2=True)
        wrong = []

        def work(me: int) -> None:
            for n in range(me, 2048, 4):
                data = bytes([1 + n % 255]) * 2048
                image.write(data, n * 2048)
                if image.read(2048, n * 2048) != data:
                    wrong.append(n)

        threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])
        self.assertEqual(image.stats()["clusters_allocated"], 64)

    def test_close_waits_for_calls_and_ends_use(self) -> None:
        image = self.image(64 << 20)
        started = threading.Event()
        outcome = []

        def work() -> None:
            started.set()
            try:
                for _ in range(100000):
                    image.read(1 << 20, 0)
            except ValueError as error:
                outcome.append(str(error))

        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        image.close()
        thread.join()
        self.assertEqual(outcome, ["the image is closed"])


class Facts(Case):
    def test_info(self) -> None:
        image = self.image(5 << 20, cluster_size="32k", extended_l2=True, refcount_bits=8)
        info = image.info()
        self.assertEqual(info["virtual-size"], 5 << 20)
        self.assertEqual(info["cluster-size"], image.cluster_size)
        self.assertEqual(info["format-specific"]["data"]["refcount-bits"], 8)
        self.assertTrue(info["format-specific"]["data"]["extended-l2"])

    def test_map(self) -> None:
        image = self.image(1 << 20)
        image.write(b"x" * 65536, 65536)
        extents = list(image.map())
        self.assertEqual([(e.start, e.length) for e in extents], [(0, 65536), (65536, 65536), (131072, 917504)])
        self.assertEqual([e.data for e in extents], [False, True, False])
        self.assertEqual([e.zero for e in extents], [True, False, True])
        self.assertIsNone(extents[0].offset)
        self.assertEqual(extents[1].offset % 65536, 0)
        self.assertEqual(list(image.map(65536, 512))[0].length, 512)
        self.assertEqual(list(image.map(512, 0)), [])

    def test_bitmaps(self) -> None:
        image = self.image(8 << 20)
        image.add_bitmap("b", 4096)
        image.add_bitmap("off", disabled=True)
        image.write(b"x", 10000)
        on = qcow2.Bitmap("b", 4096, enabled=True, in_use=True, inconsistent=False, unusable=False)
        off = qcow2.Bitmap("off", 65536, enabled=False, in_use=False, inconsistent=False, unusable=False)
        self.assertEqual(image.bitmaps(), [on, off])
        dirty = [(e.start, e.length) for e in image.bitmap_extents("b") if e.dirty]
        self.assertEqual(dirty, [(8192, 4096)])
        self.assertEqual(list(image.bitmap_extents("b", 8200, 8)), [qcow2.DirtyExtent(8200, 8, True)])
        image.merge_bitmap("off", "b")
        other_path = self.folder / "other.qcow2"
        qcow2.create(other_path, 8 << 20)
        with qcow2.Image(other_path) as other:
            other.add_bitmap("c")
            other.write(b"x", 1 << 20)
            image.merge_bitmap("off", "c", other)
        dirty = [(e.start, e.length) for e in image.bitmap_extents("off") if e.dirty]
        self.assertEqual(dirty, [(0, 65536), (1 << 20, 65536)])
        image.clear_bitmap("off")
        image.enable_bitmap("off")
        image.disable_bitmap("b")
        self.assertEqual([b.enabled for b in image.bitmaps()], [False, True])
        image.remove_bitmap("b")
        with self.fails(qcow2.Code.BITMAP, errno.ENOENT, "no bitmap 'b'"):
            image.remove_bitmap("b")
        self.assertRaises(ValueError, image.add_bitmap, "a\0b")
        self.assertRaises(ValueError, image.add_bitmap, "a", -1)
        self.assertEqual([b.name for b in image.bitmaps()], ["off"])

    def test_data_file(self) -> None:
        qcow2.create(self.disk, 1 << 20, data_file="disk.data", data_file_raw=True)
        with self.fails(qcow2.Code.BACKING_DENIED, errno.EACCES, "disk.data"):
            qcow2.Image(self.disk)
        with qcow2.Image(self.disk, backing="relative") as image:
            image.write(b"guest", 70000)
            image.write_zeroes(70001, 2)
            self.assertEqual((self.folder / "disk.data").read_bytes()[69999:70006], b"\0g\0\0st\0")
            extent = next(image.map(70000, 5))
            self.assertEqual((extent.offset, extent.data_file), (70000, True))
            self.assertTrue(image.info()["format-specific"]["data"]["data-file-raw"])

    def test_map_over_many_calls(self) -> None:
        image = self.image(4 << 20, cluster_size=4096)
        for n in range(0, 1024, 2):
            image.write(b"x", n * 4096)
        extents = list(image.map())
        self.assertEqual(len(extents), 1024)
        self.assertEqual(sum(e.length for e in extents), 4 << 20)

    @unittest.skipUnless(shutil.which("qemu-img"), "qemu-img is not installed")
    def test_qemu_agrees(self) -> None:
        image = self.image(2 << 20, extended_l2=True)
        image.write(b"x" * 300000, 12345)
        ours = image.info(), [vars(e) for e in image.map()]
        image.close()
        run = lambda *args: subprocess.run(args, check=True, capture_output=True, text=True).stdout
        run("qemu-img", "check", "-q", str(self.disk))
        run("cp", "--sparse=never", str(self.disk), str(self.folder / "full"))
        theirs = json.loads(run("qemu-img", "map", "-f", "qcow2", "--output=json", str(self.folder / "full")))
        self.assertEqual([{"offset": None, "data_file": False, **e} for e in theirs], ours[1])
        info = json.loads(run("qemu-img", "info", "--output=json", str(self.disk)))
        self.assertEqual(set(info), set(ours[0]))

    def test_version_and_features(self) -> None:
        self.assertRegex(qcow2.version(), r"^\d+\.\d+\.\d+$")
        self.assertTrue(qcow2.has_feature("zlib"))
        self.assertFalse(qcow2.has_feature("perpetuum mobile"))
        self.assertIn("extended_l2", qcow2.option_names())


class Errors(Case):
    def test_errors_carry_number_code_and_text(self) -> None:
        image = self.image()
        with self.fails(qcow2.Code.OUT_OF_RANGE, errno.EINVAL, "1048576"):
            image.read(1, 1 << 20)
        with self.fails(qcow2.Code.EXISTS, errno.EEXIST, "disk.qcow2"):
            qcow2.create(self.disk, 512)
        with self.fails(qcow2.Code.OPTION, errno.EINVAL, "cluster_sise"):
            qcow2.create(self.disk, 512, cluster_sise=65536)
        with self.fails(qcow2.Code.IO, errno.ENOENT, ""):
            qcow2.Image(self.folder / "missing")
        with self.fails(qcow2.Code.BACKING_DENIED, errno.EACCES, "base.raw"):
            qcow2.create(self.folder / "overlay", 512, backing_file="base.raw", backing_fmt="raw")
            qcow2.Image(self.folder / "overlay")
        self.assertTrue(issubclass(qcow2.QcowError, OSError))

    def test_read_only(self) -> None:
        self.image().close()
        with qcow2.Image(self.disk, read_only=True) as image:
            for call in (lambda: image.write(b"x", 0), lambda: image.write_zeroes(0, 1), lambda: image.discard(0, 1)):
                with self.fails(qcow2.Code.READ_ONLY, errno.EROFS, "read-only"):
                    call()

    def test_closed(self) -> None:
        image = self.image()
        self.assertFalse(image.closed)
        image.close()
        image.close()
        self.assertTrue(image.closed)
        for call in (
            lambda: image.read(1, 0),
            lambda: image.write_zeroes(0, 1),
            lambda: image.discard(0, 1),
            image.flush,
            image.info,
            lambda: image.size,
            lambda: list(image.map()),
        ):
            with self.assertRaisesRegex(ValueError, "closed"):
                call()

    def test_numbers_do_not_wrap(self) -> None:
        image = self.image()
        for call in (
            lambda: image.read(1, -1),
            lambda: image.read(-1, 0),
            lambda: image.write(b"x", 1 << 64),
            lambda: image.readinto(bytearray(1), -1),
            lambda: image.write_zeroes(-1, 1),
            lambda: image.write_zeroes(0, 1 << 64),
            lambda: image.discard(0, -1),
            lambda: qcow2.create(self.folder / "x", -1),
        ):
            with self.assertRaises(ValueError):
                call()

    def test_overwrite_and_descriptor(self) -> None:
        self.image().close()
        qcow2.create(self.disk, 512, overwrite=True)
        fd = os.open(self.disk, os.O_RDWR)
        with qcow2.Image(fd) as image:
            os.close(fd)
            self.assertEqual(image.size, 512)

    def test_resize_with_preallocation_and_progress(self) -> None:
        with self.image() as image:
            size = image.size
            image.write(b"x" * 100, size - 100)
            seen: list[tuple[int, int]] = []

            def watch(done: int, total: int) -> None:
                seen.append((done, total))

            image.resize(size + 500_000, preallocation="full", on_progress=watch)
            self.assertEqual(image.size, (size + 500_000 + 511) // 512 * 512)
            self.assertEqual(seen[-1][0], seen[-1][1])
            self.assertEqual(image.read(300, size - 100), b"x" * 100 + bytes(200))
            with self.assertRaises(qcow2.QcowError) as refused:
                image.resize(1000)
            self.assertEqual(refused.exception.code, qcow2.Code.ARGUMENT)
            image.resize(1000, allow_shrink=True)
            self.assertEqual(image.size, 1024)
            with self.assertRaises(qcow2.QcowError) as cancelled:
                image.resize(1 << 20, preallocation="metadata", on_progress=lambda done, total: True)
            self.assertEqual(cancelled.exception.code, qcow2.Code.CANCELLED)

            def broken(done: int, total: int) -> bool:
                raise KeyError(done)

            with self.assertRaises(KeyError):
                image.resize(1 << 20, on_progress=broken)
            self.assertEqual(image.size, 1024)
        with self.assertRaises(qcow2.QcowError):
            qcow2.create(self.disk, 1 << 20, overwrite=True, preallocation="full", on_progress=lambda done, total: True)

    def test_code_is_a_number_when_it_is_new(self) -> None:
        self.assertEqual(qcow2.QcowError(5, "text", 12345).code, 12345)


class Check(Case):
    def test_a_check_finds_and_repairs(self) -> None:
        path = self.disk
        with self.image() as image:
            image.write(b"x" * 65536, 0)
        sound = qcow2.check(path)
        self.assertTrue(sound.is_sound)
        self.assertEqual((sound.leaks, sound.allocated_clusters, sound.total_clusters), (0, 1, 16))
        with open(path, "r+b") as file:
            file.seek(0x20000 + 2 * 5)
            file.write(b"\0\3")
        findings: list[qcow2.Finding] = []
        result = qcow2.check(path, on_finding=findings.append)
        self.assertEqual((result.leaks, result.corruptions), (1, 1))
        self.assertEqual(sorted(finding.kind for finding in findings), [1, 4])
        self.assertIn("refcount 3", findings[0].text)
        with self.assertRaises(qcow2.QcowError) as caught:
            qcow2.check(path, repair="all", on_progress=lambda done, total: True)
        self.assertEqual(caught.exception.code, qcow2.Code.CANCELLED)
        with self.assertRaises(ZeroDivisionError):
            qcow2.check(path, on_progress=lambda done, total: 1 // 0)
        fixed = qcow2.check(path, repair="all", check_memory="1M")
        self.assertEqual((fixed.leaks, fixed.leaks_fixed, fixed.corruptions), (0, 1, 0))
        file_descriptor = os.open(path, os.O_RDONLY)
        self.assertTrue(qcow2.check(file_descriptor).is_sound)
        os.close(file_descriptor)
        with self.assertRaises(ValueError):
            qcow2.check(path, repair="some")

    def test_an_open_image_is_checked(self) -> None:
        with self.image() as image:
            image.write(b"x" * 65536, 0)
            image.write(b"y" * 65536, 3 * 65536)
            calls: list[int] = []
            result = image.check(on_progress=lambda done, total: calls.append(done), check_memory="1M")
            self.assertTrue(result.is_sound and calls)
            self.assertEqual((result.leaks, result.allocated_clusters, result.total_clusters), (0, 2, 16))
            image.flush()
            with open(self.disk, "r+b") as file:
                file.seek(0x20000 + 2 * 5)
                file.write(b"\0\3")
            findings: list[qcow2.Finding] = []
            self.assertEqual((image.check(on_finding=findings.append).leaks, len(findings)), (1, 2))
            with self.assertRaises(ZeroDivisionError):
                image.check(on_finding=lambda finding: 1 // 0)
            with self.assertRaises(qcow2.QcowError) as caught:
                image.check(on_progress=lambda done, total: True)
            self.assertEqual(caught.exception.code, qcow2.Code.CANCELLED)
            image.write(b"z", 0)
        with self.assertRaises(ValueError):
            image.check()


class Package(unittest.TestCase):
    def test_numbers_and_structs_are_those_of_the_header(self) -> None:
        text = HEADER.read_text()
        numbers = {name: int(value) for name, value in re.findall(r"#define QCOW2_ERR_(\w+) (\d+)", text)}
        self.assertEqual({code.name: code.value for code in qcow2.Code}, numbers)
        for name, struct in (
            ("qcow2_info", _library.CInfo),
            ("qcow2_stats", _library.CStats),
            ("qcow2_extent", _library.CExtent),
            ("qcow2_option", _library.COption),
            ("qcow2_check_result", _library.CCheckResult),
            ("qcow2_finding", _library.CFinding),
            ("qcow2_bitmap", _library.CBitmap),
        ):
            body = re.search(rf"typedef struct {name} {{(.*?)\n}}", text, re.S).group(1)
            members = re.findall(r"^    [a-z][\w ]*?[ *](\w+)(?:\[\d+\])?;", body, re.M)
            self.assertEqual([field[0] for field in struct._fields_], members)

    def test_the_library_is_found_by_variable_then_bundled_then_system(self) -> None:
        with mock.patch.dict(os.environ, {"LIBQCOW2_SO": "/x/y.so"}):
            self.assertEqual(_library.library_candidates(), ["/x/y.so"])
        with mock.patch.dict(os.environ):
            os.environ.pop("LIBQCOW2_SO", None)
            self.assertEqual(_library.library_candidates(), ["libqcow2.so.0"])
            with mock.patch.object(Path, "exists", return_value=True):
                found = _library.library_candidates()
            self.assertEqual(found, [str(Path(_library.__file__).with_name("libqcow2.so.0"))])

    def test_a_missing_library_is_named(self) -> None:
        environment = {**os.environ, "LIBQCOW2_SO": "/no/such/libqcow2.so"}
        done = subprocess.run([sys.executable, "-c", "import qcow2"], env=environment, capture_output=True, text=True)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("/no/such/libqcow2.so", done.stderr)

    def test_everything_public_is_typed(self) -> None:
        folder = Path(qcow2.__file__).parent
        self.assertTrue((folder / "py.typed").exists())
        for file in folder.glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef):
                    names = [a for a in node.args.args + node.args.kwonlyargs if a.arg != "self"]
                    self.assertTrue(node.returns is not None, f"{file.name}:{node.lineno}")
                    self.assertTrue(all(a.annotation for a in names), f"{file.name}:{node.lineno}")


if __name__ == "__main__":
    unittest.main()
