//! Dirty bitmaps: what QEMU makes and records, we read; what we make and record, QEMU reads; and random sequences of
//! both against a model, bit by bit. Stored bits are read by the judge.

mod judge;
mod qemu;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use judge::bitmaps::StoredBitmap;
use judge::{Judge, Layout};
use qcow2::error::{BitmapProblem, ErrorCode};
use qcow2::image::options::Discard;
use qcow2::image::{BitmapExtent, BitmapOptions, Image, OpenOptions, Preallocation, ResizeOptions, ZeroFlags};
use qcow2::storage::sim::{DiskImage, Fault, Rng, SimDisk};
use qcow2::{Error, format};

fn open(path: &str) -> Image {
    let options = OpenOptions { discard: Discard::Unmap, ..OpenOptions::default() };
    Image::open(Path::new(path), &options).unwrap()
}

fn open_read_only(path: &str) -> Image {
    Image::open(Path::new(path), &OpenOptions { read_only: true, ..OpenOptions::default() }).unwrap()
}

/// A stored bitmap, and the granules that are dirty in it.
struct Found {
    bitmap: StoredBitmap,
    dirty: Vec<u64>,
}

impl std::ops::Deref for Found {
    type Target = StoredBitmap;

    fn deref(&self) -> &StoredBitmap {
        &self.bitmap
    }
}

impl Found {
    fn dirty(&self) -> Vec<u64> {
        self.dirty.clone()
    }
}

/// What is stored, by the judge; the image is sound and leaks nothing.
#[track_caller]
fn stored(path: &str) -> BTreeMap<String, Found> {
    let image = DiskImage::new(std::fs::read(path).unwrap());
    let verdict = Judge::default().judge(&image);
    assert!(verdict.violations.is_empty() && verdict.leaks == 0, "{verdict:?}");
    let layout = Layout::parse(&image).unwrap();
    let found = judge::bitmaps(&layout).unwrap().into_iter();
    found.map(|bitmap| (bitmap.name.clone(), Found { dirty: bitmap.dirty(&layout), bitmap })).collect()
}

/// Offsets of the dirty granules, as the library tells them: asked a few at a time.
fn dirty(image: &Image, name: &str, granularity: u64) -> Vec<u64> {
    let (mut at, mut found) = (0, Vec::new());
    while at < image.size() {
        let extents = image.bitmap_extents(name, at, image.size() - at, 3).unwrap();
        assert!(!extents.is_empty());
        for BitmapExtent { start, length, dirty } in extents {
            assert_eq!(start.0, at);
            assert!(start.0.is_multiple_of(granularity));
            if dirty {
                found.extend((start.0..start.0 + length).step_by(granularity as usize));
            }
            at += length;
        }
    }
    found
}

fn granules(ranges: &[(u64, u64)], granularity: u64) -> Vec<u64> {
    let all = ranges.iter().flat_map(|&(at, n)| at / granularity..=(at + n - 1) / granularity);
    all.map(|n| n * granularity).collect::<BTreeSet<_>>().into_iter().collect()
}

fn problem(error: &Error) -> Option<BitmapProblem> {
    match error {
        Error::Bitmap { problem, .. } => Some(*problem),
        _ => None,
    }
}

/// Kinds of images, for `qemu-img create -o`; the last one has its bitmaps extension across the end of the sector.
const KINDS: [(&str, &str); 6] = [
    ("64 KiB", "cluster_size=64k"),
    ("512 B", "cluster_size=512"),
    ("4 KiB, 1-bit refcounts", "cluster_size=4k,refcount_bits=1"),
    ("extended", "cluster_size=16k,extended_l2=on"),
    ("2 MiB", "cluster_size=2M,refcount_bits=64"),
    ("zstd", "cluster_size=64k,compression_type=zstd"),
];

const RANGES: [(u64, u64); 5] =
    [(0, 512), (65536, 4096), (1 << 20, 3 << 20), ((8 << 20) - 512, 1024), ((24 << 20) - 512, 512)];
const SIZE: u64 = 24 << 20;

#[test]
fn what_qemu_records_is_read() {
    let Some(dir) = qemu::dir("bitmaps-theirs") else { return };
    for (kind, options) in KINDS {
        let path = dir.path("theirs.qcow2");
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", options, &path, &SIZE.to_string()]);
        for (name, granularity) in [("small", "512"), ("default", "0"), ("large", "1M")] {
            let mut args = vec!["bitmap", "--add", &path, name];
            if granularity != "0" {
                args.splice(1..1, ["-g", granularity]);
            }
            qemu::img(&args);
        }
        qemu::img(&["bitmap", "--add", "--disable", "-g", "4k", &path, "off"]);
        let writes: Vec<String> = RANGES.iter().map(|(at, n)| format!("write -q -P 7 {at} {n}")).collect();
        qemu::io(&path, &writes.iter().map(String::as_str).collect::<Vec<_>>());
        let before = std::fs::read(&path).unwrap();
        let image = open_read_only(&path);
        let list = image.bitmap_list().unwrap();
        let facts: Vec<_> =
            list.iter().map(|b| (&b.name[..], b.enabled, b.in_use, b.inconsistent, b.unusable)).collect();
        let on = |name| (name, true, false, false, None);
        assert_eq!(facts, [on("small"), on("default"), on("large"), ("off", false, false, false, None)], "{kind}");
        for bitmap in &list {
            let expected = if bitmap.enabled { granules(&RANGES, bitmap.granularity_bytes) } else { Vec::new() };
            assert_eq!(dirty(&image, &bitmap.name, bitmap.granularity_bytes), expected, "{kind}, {}", bitmap.name);
        }
        assert_eq!(problem(&image.bitmap_extents("none", 0, 1, 1).unwrap_err()), Some(BitmapProblem::Missing));
        assert_eq!(image.bitmap_clear("small").unwrap_err().code(), ErrorCode::ReadOnly);
        image.close().unwrap();
        assert!(std::fs::read(&path).unwrap() == before, "{kind}: reading changes nothing");
    }
}

#[test]
fn a_directory_of_qemu_is_written_as_it_was_read() {
    let Some(dir) = qemu::dir("bitmaps-directory") else { return };
    let path = dir.path("theirs.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &path, "1G"]);
    for name in ["a", "eight888", "nine99999", &"n".repeat(1023)] {
        qemu::img(&["bitmap", "--add", "--disable", &path, name]);
    }
    let bytes = std::fs::read(&path).unwrap();
    let header = format::Header::parse(&bytes[..65536]).unwrap();
    let pointer = format::extension::bitmaps(&header.extensions, header.geometry).unwrap();
    let directory = &bytes[pointer.directory_offset as usize..][..pointer.directory_bytes as usize];
    let entries = format::bitmap::parse_directory(directory, pointer, header.geometry).unwrap();
    assert_eq!(entries.len(), 4);
    assert!(format::bitmap::encode_directory(&entries).unwrap() == directory);
}

#[test]
fn what_we_record_is_what_qemu_finds() {
    let Some(dir) = qemu::dir("bitmaps-ours") else { return };
    for (kind, options) in KINDS {
        let path = dir.path("ours.qcow2");
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", options, &path, &SIZE.to_string()]);
        let image = open(&path);
        for (name, granularity_bytes, disabled) in
            [("small", 512, false), ("default", 0, false), ("off", 1 << 20, true)]
        {
            image.bitmap_add(name, BitmapOptions { granularity_bytes, disabled }).unwrap();
        }
        for (at, n) in RANGES {
            image.pwrite(&vec![9; n as usize], at).unwrap();
        }
        let granularity = image.bitmap_list().unwrap()[1].granularity_bytes;
        assert_eq!(
            dirty(&image, "default", granularity),
            granules(&RANGES, granularity),
            "{kind}, before it is stored"
        );
        image.close().unwrap();
        let found = stored(&path);
        assert_eq!(found["small"].dirty(), granules(&RANGES, 512), "{kind}");
        assert_eq!(found["default"].dirty(), granules(&RANGES, granularity), "{kind}");
        assert_eq!(found["off"].dirty(), [0u64; 0], "{kind}");
        assert!(found.values().all(|bitmap| !bitmap.in_use) && !found["off"].auto && found["small"].auto);
        qemu::check(&path, false);
        // QEMU reads ours: what it merges is what we have stored.
        qemu::img(&["bitmap", "--merge", "small", &path, "off"]);
        assert_eq!(stored(&path)["off"].dirty(), granules(&RANGES, 1 << 20), "{kind}");
        let info = qemu::img(&["info", "--output=json", &path]);
        assert!(info.contains("\"name\": \"small\"") && info.contains("\"granularity\": 512"), "{info}");
        // And it takes them away.
        for name in ["small", "default", "off"] {
            qemu::img(&["bitmap", "--remove", &path, name]);
        }
        qemu::check(&path, false);
        assert_eq!(open_read_only(&path).bitmap_list().unwrap(), []);
    }
}

#[test]
fn zeroes_and_discards_are_changes() {
    let Some(dir) = qemu::dir("bitmaps-zeroes") else { return };
    let path = dir.path("zeroes.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &path, "4M"]);
    qemu::io(&path, &["write -q 0 4M"]);
    let image = open(&path);
    image.bitmap_add("b", BitmapOptions { granularity_bytes: 4096, disabled: false }).unwrap();
    image.write_zeroes(1 << 20, 65536, ZeroFlags::default()).unwrap();
    image.write_zeroes((2 << 20) + 100, 10, ZeroFlags { may_unmap: true, ..ZeroFlags::default() }).unwrap();
    image.discard(3 << 20, 131072).unwrap();
    image.close().unwrap();
    let expected = granules(&[(1 << 20, 65536), (2 << 20, 4096), (3 << 20, 131072)], 4096);
    assert_eq!(stored(&path)["b"].dirty(), expected);
    qemu::check(&path, false);
}

#[test]
fn a_handle_that_goes_without_closing_leaves_the_mark() {
    let Some(dir) = qemu::dir("bitmaps-mark") else { return };
    let (path, copy) = (dir.path("mark.qcow2"), dir.path("copy.qcow2"));
    qemu::img(&["create", "-q", "-f", "qcow2", &path, "4M"]);
    qemu::img(&["bitmap", "--add", &path, "on"]);
    qemu::img(&["bitmap", "--add", "--disable", &path, "off"]);
    let image = open(&path);
    assert!(!stored(&path)["on"].in_use, "opening changes nothing");
    image.pwrite(&[1; 512], 0).unwrap();
    std::fs::copy(&path, &copy).unwrap();
    assert!(stored(&path)["on"].in_use && !stored(&path)["off"].in_use);
    assert!(!image.bitmap_list().unwrap()[0].inconsistent, "it is ours");
    image.close().unwrap();
    assert!(!stored(&path)["on"].in_use);

    // The copy is what a crash would have left.
    let image = open(&copy);
    let list = image.bitmap_list().unwrap();
    assert_eq!((list[0].in_use, list[0].inconsistent, list[1].in_use), (true, true, false));
    let refused: [qcow2::Result<()>; 5] = [
        image.bitmap_clear("on"),
        image.bitmap_enable("on", false),
        image.bitmap_merge("on", None, "off"),
        image.bitmap_merge("off", None, "on"),
        image.bitmap_extents("on", 0, 512, 1).map(drop),
    ];
    for result in refused {
        assert_eq!(problem(&result.unwrap_err()), Some(BitmapProblem::Inconsistent));
    }
    image.pwrite(&[1; 512], 0).unwrap();
    image.close().unwrap();
    assert!(stored(&copy)["on"].in_use, "nobody knows what it lacks");
    let image = open(&copy);
    image.bitmap_remove("on").unwrap();
    image.close().unwrap();
    assert_eq!(stored(&copy).into_keys().collect::<Vec<_>>(), ["off"]);
    qemu::check(&copy, false);
}

#[test]
fn who_does_not_know_bitmaps_puts_them_out_of_force() {
    let Some(dir) = qemu::dir("bitmaps-stale") else { return };
    let path = dir.path("stale.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &path, "4M"]);
    qemu::img(&["bitmap", "--add", &path, "b"]);
    let mut bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes[95], 1);
    bytes[95] = 0;
    std::fs::write(&path, &bytes).unwrap();
    let image = open(&path);
    assert_eq!(image.bitmap_list().unwrap(), []);
    image.pwrite(&[1; 512], 0).unwrap();
    image.bitmap_add("b", BitmapOptions::default()).unwrap();
    image.pwrite(&[1; 512], 1 << 20).unwrap();
    image.close().unwrap();
    let image = DiskImage::new(std::fs::read(&path).unwrap());
    let layout = Layout::parse(&image).unwrap();
    let found = judge::bitmaps(&layout).unwrap();
    assert_eq!((found.len(), found[0].dirty(&layout)), (1, vec![1 << 20]));
    qemu::check(&path, true); // what the old extension referred to is leaked: nobody can know what it was
}

#[test]
fn a_directory_that_makes_no_sense_is_given_up_and_the_disk_is_not() {
    let Some(dir) = qemu::dir("bitmaps-malformed") else { return };
    let path = dir.path("malformed.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &path, "4M"]);
    qemu::img(&["bitmap", "--add", &path, "b"]);
    let good = std::fs::read(&path).unwrap();
    let header = format::Header::parse(&good[..65536]).unwrap();
    let pointer = format::extension::bitmaps(&header.extensions, header.geometry).unwrap();
    let at = pointer.directory_offset as usize;
    let extension = good.windows(8).position(|w| w == [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]).unwrap();
    // Type, flags, table offset; a directory in the refcount table, in the L1 table and past the end of the file.
    let damages: [(usize, &[u8], &str); 6] = [
        (at + 16, &[9], "type"),
        (at + 12, &[1], "flags"),
        (at + 7, &[1], "bitmap_table_offset"),
        (extension + 24, &0x10000u64.to_be_bytes(), "bitmap_table_size"),
        (extension + 24, &0x30000u64.to_be_bytes(), "bitmap_table_offset"),
        (extension + 24, &(1u64 << 40).to_be_bytes(), "bitmap_directory_offset"),
    ];
    for (at, value, field) in damages {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        std::fs::write(&path, &bytes).unwrap();
        let image = open(&path);
        let error = image.bitmap_list().unwrap_err();
        assert!(error.to_string().contains(field) && error.code() == ErrorCode::BadHeader, "{error}");
        assert!(image.bitmap_add("c", BitmapOptions::default()).is_err(), "{field}");
        image.pwrite(&[1; 512], 0).unwrap();
        assert_eq!(image.bitmap_list().unwrap(), [], "{field}");
        image.close().unwrap();
        let after = std::fs::read(&path).unwrap();
        assert_eq!(
            (after[95], &after[at..at + value.len()]),
            (0, value),
            "{field}: out of force, and otherwise as it was"
        );
        let mut found = [0; 512];
        open(&path).pread(&mut found, 0).unwrap();
        assert_eq!(found, [1; 512]);
    }
}

/// The mark was written to wherever the extension said the directory was: here into the refcount table.
#[test]
fn a_directory_in_another_table_is_not_written_to() {
    let Some(dir) = qemu::dir("bitmaps-overlap") else { return };
    let path = dir.path("overlap.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &path, "4M"]);
    qemu::img(&["bitmap", "--add", &path, "b"]);
    let mut bytes = std::fs::read(&path).unwrap();
    let header = format::Header::parse(&bytes[..65536]).unwrap();
    let at = header.refcount_table_offset.0 as usize;
    let pointer = format::extension::bitmaps(&header.extensions, header.geometry).unwrap();
    let directory = bytes[pointer.directory_offset as usize..][..32].to_vec();
    // The first entry of the table stays what it is, and is the offset of a bitmap table as well.
    bytes[at + 8..at + 32].copy_from_slice(&directory[8..]);
    let extension = bytes.windows(8).position(|w| w == [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]).unwrap();
    bytes[extension + 24..extension + 32].copy_from_slice(&(at as u64).to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let image = open(&path);
    assert_eq!(image.bitmap_list().unwrap().len(), 1, "as far as it can be told");
    image.pwrite(&[1; 512], 0).unwrap();
    image.close().unwrap();
    let after = std::fs::read(&path).unwrap();
    assert!(after[at..at + 32] == bytes[at..at + 32], "the refcount table is as it was");
    assert_eq!(after[95], 0);
}

/// What its directory says can be kept, although it cannot be used.
#[test]
fn bitmaps_with_unknown_extra_data_are_left_as_they_are() {
    let Some(dir) = qemu::dir("bitmaps-extra") else { return };
    let path = dir.path("extra.qcow2");
    for (compatible, auto) in [(false, false), (false, true), (true, true)] {
        qemu::img(&["create", "-q", "-f", "qcow2", &path, "4M"]);
        qemu::img(&["bitmap", "--add", "--disable", &path, "b"]);
        let mut bytes = std::fs::read(&path).unwrap();
        let header = format::Header::parse(&bytes[..65536]).unwrap();
        let pointer = format::extension::bitmaps(&header.extensions, header.geometry).unwrap();
        let directory = &bytes[pointer.directory_offset as usize..][..pointer.directory_bytes as usize];
        let mut entries = format::bitmap::parse_directory(directory, pointer, header.geometry).unwrap();
        entries[0].extra_data = b"from the future".to_vec();
        (entries[0].extra_data_compatible, entries[0].auto) = (compatible, auto);
        let directory = format::bitmap::encode_directory(&entries).unwrap();
        bytes.truncate(pointer.directory_offset as usize); // it is the last thing in the file
        bytes.extend_from_slice(&directory);
        let extension = bytes.windows(8).position(|w| w == [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]).unwrap();
        bytes[extension + 16..extension + 24].copy_from_slice(&(directory.len() as u64).to_be_bytes());
        std::fs::write(&path, &bytes).unwrap();

        let image = open(&path);
        let unusable = image.bitmap_list().unwrap()[0].unusable;
        assert_eq!(unusable.is_some(), !compatible, "{unusable:?}");
        image.pwrite(&[1; 512], 0).unwrap();
        image.bitmap_add("new", BitmapOptions::default()).unwrap();
        image.pwrite(&[1; 512], 1 << 20).unwrap();
        image.close().unwrap();
        let found = stored(&path);
        // One that is enabled and that we cannot keep lacks our changes, and says so.
        assert_eq!(found["b"].in_use, auto && !compatible);
        let expected = if compatible { vec![0, 1 << 20] } else { Vec::new() };
        assert_eq!((found["b"].dirty(), found["new"].dirty()), (expected, vec![1 << 20]));
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes.windows(15).any(|w| w == b"from the future"));
        open(&path).bitmap_remove("b").unwrap();
        assert_eq!(stored(&path).len(), 1);
    }
}

#[test]
fn arguments_that_cannot_be_are_refused_and_change_nothing() {
    let Some(dir) = qemu::dir("bitmaps-arguments") else { return };
    let (path, old, other) = (dir.path("a.qcow2"), dir.path("v2.qcow2"), dir.path("other.qcow2"));
    qemu::img(&["create", "-q", "-f", "qcow2", &path, "4M"]);
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", "compat=0.10", &old, "4M"]);
    qemu::img(&["create", "-q", "-f", "qcow2", &other, "5M"]);
    let image = open(&path);
    let with = |granularity_bytes| BitmapOptions { granularity_bytes, disabled: false };
    for granularity in [1, 256, 513, 3 << 20, 1 << 32, u64::MAX] {
        assert_eq!(image.bitmap_add("b", with(granularity)).unwrap_err().code(), ErrorCode::Argument, "{granularity}");
    }
    for name in ["", "a\nb", &"n".repeat(1024)] {
        assert_eq!(image.bitmap_add(name, with(0)).unwrap_err().code(), ErrorCode::Argument, "{name}");
    }
    image.bitmap_add("b", with(0)).unwrap();
    assert_eq!(problem(&image.bitmap_add("b", with(0)).unwrap_err()), Some(BitmapProblem::Exists));
    let none: [qcow2::Result<()>; 5] = [
        image.bitmap_remove("c"),
        image.bitmap_clear("c"),
        image.bitmap_enable("c", true),
        image.bitmap_merge("c", None, "b"),
        image.bitmap_merge("b", None, "c"),
    ];
    for result in none {
        let error = result.unwrap_err();
        assert_eq!((problem(&error), error.errno()), (Some(BitmapProblem::Missing), libc::ENOENT));
    }
    assert!(image.bitmap_extents("b", 4 << 20, 1, 1).is_err(), "past the end");
    let second = open(&other);
    second.bitmap_add("b", with(0)).unwrap();
    let error = image.bitmap_merge("b", Some(&second), "b").unwrap_err();
    assert!(error.to_string().contains("5242880"), "{error}");
    image.close().unwrap();
    assert_eq!(stored(&path).len(), 1);
    let image = open(&old);
    let error = image.bitmap_add("b", with(0)).unwrap_err();
    assert!(error.to_string().contains("version 2"), "{error}");
    // A disk so large that a bitmap of small granules would take more than 512 MiB.
    let large = dir.path("large.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &large, "4T"]);
    let image = open(&large);
    assert!(image.bitmap_add("b", with(512)).unwrap_err().to_string().contains("512 MiB"));
    image.bitmap_add("b", with(0)).unwrap();
    image.pwrite(&[1; 512], (4 << 40) - 512).unwrap();
    image.close().unwrap();
    assert_eq!(stored(&large)["b"].dirty(), [(4 << 40) - 65536]);
    qemu::check(&large, false);
}

#[test]
fn merging_joins_granularities_and_images() {
    let Some(dir) = qemu::dir("bitmaps-merge") else { return };
    let (a, b) = (dir.path("a.qcow2"), dir.path("b.qcow2"));
    for path in [&a, &b] {
        qemu::img(&["create", "-q", "-f", "qcow2", path, "8M"]);
    }
    let (first, second) = (open(&a), open(&b));
    let add = |image: &Image, name: &str, granularity_bytes, disabled| {
        image.bitmap_add(name, BitmapOptions { granularity_bytes, disabled }).unwrap();
    };
    add(&first, "fine", 512, false);
    add(&first, "coarse", 1 << 20, true);
    add(&second, "b", 4096, false);
    first.pwrite(&[1; 512], 512).unwrap();
    first.pwrite(&[1; 512], (5 << 20) + 1024).unwrap();
    second.pwrite(&[1; 512], 3 << 20).unwrap();
    first.bitmap_merge("coarse", None, "fine").unwrap();
    assert_eq!(dirty(&first, "coarse", 1 << 20), [0, 5 << 20]);
    first.bitmap_merge("fine", Some(&second), "b").unwrap();
    let mut expected = granules(&[(512, 512), (3 << 20, 4096), ((5 << 20) + 1024, 512)], 512);
    assert_eq!(dirty(&first, "fine", 512), expected);
    // From coarse to fine: what one bit covers counts as a whole.
    first.bitmap_merge("fine", None, "coarse").unwrap();
    expected = granules(&[(0, 1 << 20), (3 << 20, 4096), (5 << 20, 1 << 20)], 512);
    assert_eq!(dirty(&first, "fine", 512), expected);
    // Into itself: nothing new.
    first.bitmap_merge("fine", None, "fine").unwrap();
    first.close().unwrap();
    second.close().unwrap();
    assert_eq!(stored(&a)["fine"].dirty(), expected);
    // QEMU does the same.
    qemu::img(&["bitmap", "--merge", "fine", &a, "coarse"]);
    assert_eq!(stored(&a)["coarse"].dirty(), [0, 3 << 20, 5 << 20]);
    qemu::check(&a, false);
}

/// The model of one bitmap.
#[derive(Debug, Clone, PartialEq)]
struct Model {
    granularity: u64,
    enabled: bool,
    dirty: BTreeSet<u64>,
}

impl Model {
    fn note(&mut self, at: u64, n: u64) {
        let g = self.granularity;
        self.dirty.extend((at / g..=(at + n - 1) / g).map(|i| i * g));
    }
}

/// One random operation on the bitmaps, by us or by QEMU.
fn random_operation(rng: &mut Rng, models: &mut BTreeMap<String, Model>, path: &str, image: Option<&Image>, size: u64) {
    let name = format!("b{}", rng.below(4));
    let Some(model) = models.get_mut(&name) else {
        let (granularity, disabled) = (512u64 << (rng.below(4) * 3), rng.one_in(3));
        match image {
            Some(image) => image.bitmap_add(&name, BitmapOptions { granularity_bytes: granularity, disabled }).unwrap(),
            None => {
                let granularity = granularity.to_string();
                let mut args = vec!["bitmap", "--add", "-g", &granularity, path, &name];
                if disabled {
                    args.insert(2, "--disable");
                }
                drop(qemu::img(&args));
            }
        }
        models.insert(name, Model { granularity, enabled: !disabled, dirty: BTreeSet::new() });
        return;
    };
    let theirs = |what: &str| drop(qemu::img(&["bitmap", what, path, &name]));
    match rng.below(6) {
        0 => {
            image.map_or_else(|| theirs("--remove"), |image| image.bitmap_remove(&name).unwrap());
            models.remove(&name);
        }
        1 => {
            image.map_or_else(|| theirs("--clear"), |image| image.bitmap_clear(&name).unwrap());
            model.dirty.clear();
        }
        2 | 3 => {
            model.enabled = !model.enabled;
            let what = if model.enabled { "--enable" } else { "--disable" };
            image.map_or_else(|| theirs(what), |image| image.bitmap_enable(&name, model.enabled).unwrap());
        }
        _ => {
            let from = format!("b{}", rng.below(4));
            let Some(source) = models.get(&from).cloned() else { return };
            match image {
                Some(image) => image.bitmap_merge(&name, None, &from).unwrap(),
                None if from == name => return,
                None => drop(qemu::img(&["bitmap", "--merge", &from, path, &name])),
            }
            let model = models.get_mut(&name).unwrap();
            source.dirty.iter().for_each(|&at| model.note(at, source.granularity.min(size - at)));
        }
    }
}

/// Another size, by us or by QEMU. What the disk gains is dirty for us, and clean for QEMU; what it loses is forgotten.
fn random_size(
    rng: &mut Rng,
    models: &mut BTreeMap<String, Model>,
    path: &str,
    image: Option<&Image>,
    old: u64,
) -> u64 {
    let size = match rng.below(3) {
        0 => (old + 512 * rng.below(300)).saturating_sub(512 * rng.below(300)),
        _ => rng.below(6 << 20) / 512 * 512,
    }
    .max(512);
    match image {
        Some(image) => {
            let modes = ["off", "metadata", "falloc", "full"];
            let mode = modes[if size > old { rng.below(4) as usize } else { 0 }];
            let preallocation = Preallocation::from_name(mode).unwrap();
            image.resize(size, ResizeOptions { allow_shrink: true, preallocation }, None).unwrap();
        }
        None => drop(qemu::img(&["resize", "-q", "-f", "qcow2", "--shrink", path, &size.to_string()])),
    }
    for model in models.values_mut() {
        if size > old && image.is_some() && model.enabled {
            model.note(old, size - old);
        }
        model.dirty.retain(|&at| at < size);
    }
    size
}

const MODEL_SIZE: u64 = (3 << 20) + 512;

#[test]
fn random_sequences_of_ours_and_theirs_against_a_model() {
    let Some(dir) = qemu::dir("bitmaps-model") else { return };
    for (n, (kind, options)) in KINDS.into_iter().enumerate() {
        let path = dir.path("model.qcow2");
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", options, &path, &MODEL_SIZE.to_string()]);
        let mut rng = Rng::new(number("MODEL_SEED", 1) * 100 + n as u64);
        let mut models: BTreeMap<String, Model> = BTreeMap::new();
        let mut size = MODEL_SIZE;
        for round in 0..number("MODEL_OPS", 12) {
            let image = (!rng.one_in(3)).then(|| open(&path));
            for _ in 0..1 + rng.below(6) {
                if rng.one_in(6) {
                    size = random_size(&mut rng, &mut models, &path, image.as_ref(), size);
                    continue;
                }
                if rng.one_in(2) {
                    random_operation(&mut rng, &mut models, &path, image.as_ref(), size);
                    continue;
                }
                let at = rng.below(size / 512) * 512;
                let length = (512 << rng.below(8)).min(size - at);
                match &image {
                    Some(image) if rng.one_in(4) => image.write_zeroes(at, length, ZeroFlags::default()).unwrap(),
                    Some(image) => image.pwrite(&vec![rng.next_u64() as u8; length as usize], at).unwrap(),
                    None => drop(qemu::io(&path, &[&format!("write -q {at} {length}")])),
                }
                models.values_mut().filter(|model| model.enabled).for_each(|model| model.note(at, length));
            }
            for (name, model) in image.iter().flat_map(|image| models.iter().map(move |(n, m)| ((image, n), m))) {
                let found = dirty(name.0, name.1, model.granularity);
                assert_eq!(found, model.dirty.iter().copied().collect::<Vec<_>>(), "{kind}, round {round}: {}", name.1);
            }
            image.inspect(|image| image.close().unwrap());
            let found = stored(&path);
            assert!(found.values().all(|bitmap| !bitmap.in_use), "{kind}, round {round}");
            let describe = |bitmap: &Found| Model {
                granularity: bitmap.granularity,
                enabled: bitmap.auto,
                dirty: bitmap.dirty().into_iter().collect(),
            };
            let found: BTreeMap<_, _> = found.iter().map(|(name, bitmap)| (name.clone(), describe(bitmap))).collect();
            assert_eq!(found, models, "{kind}, round {round}");
        }
        qemu::check(&path, false);
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Threads that write at the same time as bitmaps come and go: no change is missed.
#[test]
fn no_change_gets_past_an_operation() {
    let Some(dir) = qemu::dir("bitmaps-threads") else { return };
    let path = dir.path("threads.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &path, "16M"]);
    let image = open(&path);
    image.bitmap_add("b", BitmapOptions { granularity_bytes: 4096, disabled: false }).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let mut rng = Rng::new(5);
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let (image, stop) = (&image, &stop);
            let mut rng = Rng::new(thread);
            scope.spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let at = (rng.below(1365) * 3 + thread) * 4096;
                    image.pwrite(&rng.next_u64().to_be_bytes().repeat(512), at).unwrap();
                }
            });
        }
        for _ in 0..25 {
            // What is there when the bitmap is cleared; whatever is different later has to be dirty.
            image.bitmap_clear("b").unwrap();
            let mut before = vec![0; 16 << 20];
            image.pread(&mut before, 0).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(rng.below(4)));
            let mut after = vec![0; 16 << 20];
            image.pread(&mut after, 0).unwrap();
            let dirty: BTreeSet<u64> = dirty(&image, "b", 4096).into_iter().collect();
            for at in (0..16 << 20).step_by(4096).filter(|at| before[*at..at + 4096] != after[*at..at + 4096]) {
                assert!(dirty.contains(&(at as u64)), "0x{at:x} has changed and is not dirty");
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    image.close().unwrap();
    assert!(!stored(&path)["b"].in_use);
    qemu::check(&path, false);
}

/// What reads differently after a switch to a snapshot is dirty, and nothing else.
#[test]
fn applying_a_snapshot_is_a_change() {
    let Some(dir) = qemu::dir("bitmaps-snapshot") else { return };
    let path = dir.path("snapshot.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", &path, "1M"]);
    qemu::io(&path, &["write -q 0 1M"]);
    let image = open(&path);
    image.snapshot_create("s", &Default::default()).unwrap();
    image.bitmap_add("on", BitmapOptions { granularity_bytes: 4096, disabled: false }).unwrap();
    image.bitmap_add("off", BitmapOptions { granularity_bytes: 4096, disabled: true }).unwrap();
    image.pwrite(&[1; 512], 100 << 10).unwrap();
    image.bitmap_clear("on").unwrap();
    image.snapshot_apply("s").unwrap();
    // One L2 table of 64 entries maps 32 KiB.
    let expected = granules(&[(96 << 10, 32 << 10)], 4096);
    assert_eq!(dirty(&image, "on", 4096), expected);
    image.pwrite(&[1; 512], 0).unwrap();
    image.close().unwrap();
    let found = stored(&path);
    assert_eq!(found["on"].dirty(), granules(&[(0, 512), (96 << 10, 32 << 10)], 4096));
    assert!(found["off"].dirty().is_empty() && !found["off"].in_use && !found["on"].in_use);
    qemu::check(&path, false);
}

/// A mark that could not be written was taken for written, and the change went ahead without it.
#[test]
fn without_the_mark_nothing_is_changed() {
    let Some(dir) = qemu::dir("bitmaps-no-mark") else { return };
    let path = dir.path("mark.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &path, "4M"]);
    qemu::io(&path, &["write -q 0 64k"]);
    qemu::img(&["bitmap", "--add", &path, "b"]);
    let start = DiskImage::new(std::fs::read(&path).unwrap());
    let mut failed = BTreeSet::new();
    for call in 0.. {
        let disk = Arc::new(SimDisk::new(start.clone()));
        let image = Image::open_storage(disk.clone(), &OpenOptions::default()).unwrap();
        disk.set_fault(Some(Fault { index: disk.calls() + call, errno: libc::EIO, sticky: false }));
        let result = image.pwrite(&[7; 512], 0);
        let Some((what, _)) = disk.fault_hit() else { break };
        failed.insert(what);
        assert_eq!(result.unwrap_err().errno(), libc::EIO, "call {call}, a {what}, has failed");
        let now = disk.current();
        let layout = Layout::parse(&now).unwrap();
        let mut content = [0; 512];
        layout.read(0, 0, &mut content).unwrap().unwrap();
        let found = judge::bitmaps(&layout).unwrap();
        assert!(content != [7; 512] || found[0].in_use, "call {call}, a {what}");
    }
    assert_eq!(failed.into_iter().collect::<Vec<_>>(), ["flush", "read", "write"]);
}

/// Who opens an image with an enabled bitmap and only reads leaves it byte by byte as it was, whatever QEMU does.
#[test]
fn looking_at_an_image_changes_nothing() {
    let Some(dir) = qemu::dir("bitmaps-look") else { return };
    let path = dir.path("look.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &path, "4M"]);
    qemu::img(&["bitmap", "--add", &path, "b"]);
    let before = std::fs::read(&path).unwrap();
    let image = open(&path);
    image.pread(&mut [0; 512], 0).unwrap();
    image.bitmap_list().unwrap();
    image.bitmap_extents("b", 0, 4 << 20, 9).unwrap();
    image.flush().unwrap();
    image.close().unwrap();
    let inspected = Image::open(Path::new(&path), &OpenOptions { inspect: true, ..OpenOptions::default() }).unwrap();
    assert_eq!(inspected.bitmap_list().unwrap().len(), 1);
    drop(inspected);
    assert!(std::fs::read(&path).unwrap() == before);
    let list = Command::new("qemu-img").args(["info", &path]).output().unwrap();
    assert!(list.status.success());
}
