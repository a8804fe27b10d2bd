//! External data files: a flat array against images of every shape, with QEMU writing in between; raw data files compared
//! with the disk after every operation; what is created, and what is refused.
//!
//! `DATA_FILE_SEED` sets the seed, `DATA_FILE_OPS` the operations for each image.

mod judge;
mod qemu;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use judge::{Judge, Layout};
use qcow2::error::{CorruptionKind, Error, ErrorCode};
use qcow2::format::GuestOffset;
use qcow2::image::{
    BackingPolicy, CreateOptions, Image, MapKind, OpenOptions, Preallocation, ResizeOptions, WriteFlags, ZeroFlags,
    create, create_with_data_file, load_header,
};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::sim::{DiskImage, Rng};
use qcow2::storage::{Blocking, IoSrc, Storage};
use qcow2::wait::block_on;

#[derive(Debug, Clone, Copy)]
struct Shape {
    cluster_bits: u32,
    extended: bool,
    raw: bool,
    backing: bool,
    by_us: bool,
}

fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    for (cluster_bits, extended) in [(9, false), (12, false), (16, false), (14, true), (16, true), (21, true)] {
        for (raw, backing) in [(false, false), (false, true), (true, false)] {
            let by_us = shapes.len() % 2 == 0;
            shapes.push(Shape { cluster_bits, extended, raw, backing, by_us });
        }
        shapes.push(Shape { cluster_bits, extended, raw: true, backing: false, by_us: cluster_bits != 9 });
    }
    shapes
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

fn open(path: &str) -> Image {
    Image::open(Path::new(path), &OpenOptions { backing: BackingPolicy::Relative, ..Default::default() }).unwrap()
}

/// Options from settings as in `-o` of qemu-img.
fn options(settings: &str) -> CreateOptions {
    let mut options = CreateOptions::default();
    for (key, value) in settings.split(',').filter_map(|setting| setting.split_once('=')) {
        options.set(key, value).unwrap();
    }
    options
}

/// An image and its data file, and what the disk holds.
struct Disk {
    path: String,
    data: String,
    shape: Shape,
    content: Vec<u8>,
    label: String,
}

impl Disk {
    fn make(dir: &qemu::Dir, shape: Shape, rng: &mut Rng) -> Self {
        let clusters = if shape.cluster_bits < 14 { 700 } else { 13 };
        let size = (clusters << shape.cluster_bits) - 512 * rng.below(2);
        let (path, data) = (dir.path("image.qcow2"), dir.path("image.data"));
        let on = |on: bool| if on { "on" } else { "off" };
        let mut settings = format!(
            "cluster_size={},extended_l2={},data_file=image.data,data_file_raw={}",
            1u64 << shape.cluster_bits,
            on(shape.extended),
            on(shape.raw)
        );
        let mut content = vec![0; size as usize];
        if shape.backing {
            let base: Vec<u8> = (0..size * 2 / 3).map(|i| 0x80 | (i / 512) as u8).collect();
            std::fs::write(dir.path("base.raw"), &base).unwrap();
            content[..base.len()].copy_from_slice(&base);
            settings += ",backing_file=base.raw,backing_fmt=raw";
        }
        if shape.by_us {
            create(Path::new(&path), size, &options(&settings), true).unwrap();
        } else {
            // QEMU makes the data file where it runs, and looks for it beside the image.
            let absolute = settings.replace("image.data", &data).replace("base.raw", &dir.path("base.raw"));
            qemu::img(&["create", "-q", "-f", "qcow2", "-o", &absolute, &path, &size.to_string()]);
        }
        if !shape.raw {
            // Whatever the data file held before is nobody's business.
            let file = std::fs::OpenOptions::new().write(true).open(&data).unwrap();
            file.write_all_at(&vec![0xee; size as usize], 0).unwrap();
        }
        Self { path, data, shape, content, label: format!("{shape:?}") }
    }

    fn open(&self) -> Image {
        let options = OpenOptions { backing: BackingPolicy::Any, ..Default::default() };
        Image::open(Path::new(&self.path), &options).unwrap_or_else(|why| panic!("{}: {why}", self.label))
    }

    fn range(&self, rng: &mut Rng) -> (u64, u64) {
        let (cluster, size) = (1u64 << self.shape.cluster_bits, self.content.len() as u64);
        let unit = [1, 512, cluster / 32, cluster][rng.below(4) as usize].max(1);
        let most = [512, 4096, cluster / 32, cluster, 3 * cluster][rng.below(5) as usize].max(unit);
        let offset = rng.below(size) / unit * unit;
        (offset, (1 + rng.below(most)).next_multiple_of(unit).min(size - offset))
    }

    fn set(&mut self, (offset, length): (u64, u64), byte: u8) {
        self.content[offset as usize..(offset + length) as usize].fill(byte);
    }

    /// The raw data file is the disk, to the byte; what it is short of is zero.
    #[track_caller]
    fn check_raw(&self, when: &str) {
        if !self.shape.raw {
            return;
        }
        let alone = std::fs::read(&self.data).unwrap();
        let same = (0..self.content.len()).find(|&i| alone.get(i).copied().unwrap_or(0) != self.content[i]);
        assert_eq!(same, None, "{}, {when}: the raw data file differs from the disk", self.label);
    }

    /// Some operations of QEMU.
    fn by_qemu(&mut self, rng: &mut Rng) {
        let mut commands = Vec::new();
        for _ in 0..1 + rng.below(5) {
            let (range, byte) = (self.range(rng), 1 + rng.below(255) as u8);
            let (command, byte) = match rng.below(6) {
                0 => ("write -q -z".to_owned(), 0),
                1 => ("write -q -z -u".to_owned(), 0),
                _ => (format!("write -q -P {byte}"), byte),
            };
            commands.push(format!("{command} {} {}", range.0, range.1));
            self.set(range, byte);
        }
        qemu::io(&self.path, &commands.iter().map(|command| &command[..]).collect::<Vec<_>>());
    }

    /// Another size, by us (with any preallocation) or by QEMU.
    fn resize(&mut self, image: Option<&Image>, rng: &mut Rng) -> String {
        let cluster = 1u64 << self.shape.cluster_bits;
        let old = self.content.len() as u64;
        let new = match rng.below(4) {
            0 => old.saturating_sub(512 * (1 + rng.below(20))),
            1 => old + 512 * (1 + rng.below(20)),
            2 => rng.below(20 * cluster + (300 << 10)).next_multiple_of(512),
            _ => rng.below(20 * cluster + (300 << 10)).next_multiple_of(cluster),
        }
        .max(512);
        let modes = ["off", "metadata", "falloc", "full"];
        let mode = modes[if new > old { rng.below(4) as usize } else { 0 }];
        match image {
            Some(image) => {
                let preallocation = Preallocation::from_name(mode).unwrap();
                let done = image.resize(new, ResizeOptions { allow_shrink: true, preallocation }, None);
                done.unwrap_or_else(|e| panic!("{}: {old} to {new}, {mode}: {e}", self.label));
                let length = std::fs::metadata(&self.data).unwrap().len();
                assert_eq!(length, new, "{}: {old} to {new}, {mode}: length of the data file", self.label);
            }
            None => {
                qemu::img(&["resize", "-q", "-f", "qcow2", "--shrink", &self.path, &new.to_string()]);
            }
        }
        self.content.resize(new as usize, 0);
        format!("resize from {old} to {new}, {mode}")
    }

    fn step(&mut self, image: &Image, rng: &mut Rng) -> String {
        let cluster = 1u64 << self.shape.cluster_bits;
        if rng.one_in(12) {
            return self.resize(Some(image), rng);
        }
        let (offset, length) = self.range(rng);
        let what = match rng.below(10) {
            0 => {
                image.flush().unwrap();
                "flush"
            }
            1..=2 => {
                let flags = ZeroFlags { may_unmap: rng.one_in(2), fua: rng.one_in(9), ..Default::default() };
                image.write_zeroes(offset, length, flags).unwrap();
                self.set((offset, length), 0);
                "zeroes"
            }
            3..=4 => {
                let from = offset / cluster * cluster;
                let to = (offset + length).next_multiple_of(cluster).min(image.size());
                image.discard(from, to - from).unwrap();
                self.set((from, to - from), 0);
                "discard"
            }
            5..=6 => {
                let mut found = vec![0xaa; length as usize];
                image.pread(&mut found, offset).unwrap();
                assert!(found == self.content[offset as usize..][..length as usize], "{}: {offset}", self.label);
                "read"
            }
            _ => {
                let byte = 1 + rng.below(255) as u8;
                image.pwrite(&vec![byte; length as usize], offset).unwrap();
                self.set((offset, length), byte);
                "write"
            }
        };
        format!("{what} of {length} at {offset}")
    }

    fn check_end(&self, dir: &qemu::Dir) {
        let raw = dir.path("expected.raw");
        std::fs::write(&raw, &self.content).unwrap();
        qemu::check(&self.path, false);
        let compared = qemu::img(&["compare", "-f", "qcow2", "-F", "raw", &self.path, &raw]);
        assert!(compared.contains("identical"), "{}: {compared}", self.label);
        let image = DiskImage::new(std::fs::read(&self.path).unwrap());
        let verdict = Judge::default().judge(&image);
        assert!(verdict.violations.is_empty() && verdict.leaks == 0, "{}: {verdict:?}", self.label);
        let header = block_on(load_header(&Blocking, &MemoryStorage::new(image.to_file()))).unwrap();
        assert_eq!((header.has_data_file(), header.data_file_is_raw()), (true, self.shape.raw), "{}", self.label);
        self.check_raw("at the end");
    }
}

#[test]
fn a_flat_array_and_qemu_in_between() {
    for (n, shape) in shapes().into_iter().enumerate() {
        let Some(dir) = qemu::dir(&format!("data-file-{n}")) else { return };
        let mut rng = Rng::new(number("DATA_FILE_SEED", 1) * 1000 + n as u64);
        let mut disk = Disk::make(&dir, shape, &mut rng);
        let mut image = disk.open();
        for op in 0..number("DATA_FILE_OPS", 120) {
            if rng.one_in(20) {
                image.close().unwrap();
                disk.check_end(&dir);
                disk.by_qemu(&mut rng);
                if rng.one_in(2) {
                    disk.resize(None, &mut rng);
                }
                image = disk.open();
                disk.check_raw("after QEMU");
            }
            let what = disk.step(&image, &mut rng);
            if op % 4 == 0 || what.starts_with('z') || what.starts_with("resize") || what.starts_with('d') {
                disk.check_raw(&format!("op {op}, {what}"));
            }
        }
        let mut seen = vec![0xaa; disk.content.len()];
        image.pread(&mut seen, 0).unwrap();
        assert!(seen == disk.content, "{}: the disk reads otherwise", disk.label);
        image.close().unwrap();
        disk.check_end(&dir);
    }
}

/// Compressed clusters have no place in an external data file.
#[test]
fn compressed_writes_are_refused_by_name() {
    let Some(dir) = qemu::dir("data-file-compressed") else { return };
    let path = dir.path("plain.qcow2");
    create(Path::new(&path), 1 << 20, &options("data_file=plain.data"), false).unwrap();
    let image = open(&path);
    let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
    let error = image.write(&[IoSrc::from(&[1; 65536][..])], GuestOffset(0), flags).unwrap_err();
    let named = matches!(&error, Error::Argument { name: "flags", why } if why.contains("external data file"));
    assert!(named, "{error}");
    let mut seen = [9; 512];
    image.pread(&mut seen, 0).unwrap();
    assert_eq!(seen, [0; 512]);
}

/// Storages of the caller that cannot punch: a raw data file gets its zeroes written.
#[test]
fn a_raw_data_file_that_cannot_be_punched_gets_zeroes_written() {
    let (file, data) = (Arc::new(MemoryStorage::default()), Arc::new(MemoryStorage::new(vec![9; 5 << 20])));
    let settings = options("data_file_raw=on,extended_l2=on");
    block_on(create_with_data_file(&Blocking, &*file, Some(&*data), 3 << 20, &settings, None)).unwrap();
    assert_eq!(data.snapshot(), vec![0; 3 << 20], "of the storage nothing remains");
    let given = OpenOptions { data_file_storages: vec![Some(data.clone() as Arc<dyn Storage>)], ..Default::default() };
    let image = Image::open_storage(file.clone(), &given).unwrap();
    let mut expected = vec![0; 3 << 20];
    image.pwrite(&vec![7; 2 << 20], 1000).unwrap();
    expected[1000..1000 + (2 << 20)].fill(7);
    assert!(data.snapshot() == expected);
    image.discard(100_000, 100_000).unwrap();
    image.write_zeroes(500_000, 100_000, ZeroFlags::default()).unwrap();
    image.write_zeroes(700_000, 100_000, ZeroFlags { may_unmap: true, ..Default::default() }).unwrap();
    for from in [100_000, 500_000, 700_000] {
        expected[from..from + 100_000].fill(0);
    }
    let flags = ZeroFlags { may_unmap: true, no_fallback: true, ..Default::default() };
    assert_eq!(image.write_zeroes(900_000, 1, flags), Err(Error::NoFallback));
    assert!(data.snapshot() == expected);
    image.close().unwrap();
    // The place of a data file that a careless writer left rubbish in, under entries that say zero.
    let (file, data) = (Arc::new(MemoryStorage::default()), Arc::new(MemoryStorage::default()));
    block_on(create_with_data_file(&Blocking, &*file, Some(&*data), 1 << 20, &settings, None)).unwrap();
    data.write(&[qcow2::storage::IoSrc::from(&[5; 70_000][..])], 3).unwrap();
    let given = OpenOptions { data_file_storages: vec![Some(data.clone() as Arc<dyn Storage>)], ..Default::default() };
    let image = Image::open_storage(file, &given).unwrap();
    image.pwrite(&[6; 10], 5000).unwrap();
    let mut expected = vec![0; 1 << 20];
    expected[5000..5010].fill(6);
    let mut seen = vec![1; 1 << 20];
    image.pread(&mut seen, 0).unwrap();
    assert!(seen == expected && data.snapshot() == expected);
}

/// What is discarded gives its space back, once that is safe.
#[test]
fn a_discard_gives_back_the_space_of_the_data_file() {
    let Some(dir) = qemu::dir("data-file-space") else { return };
    for settings in ["", "extended_l2=on", "data_file_raw=on"] {
        let (path, data) = (dir.path("space.qcow2"), dir.path("space.data"));
        create(Path::new(&path), 64 << 20, &options(&format!("data_file=space.data,{settings}")), true).unwrap();
        let image = open(&path);
        let occupied = || std::fs::metadata(&data).unwrap().blocks() * 512;
        image.pwrite(&vec![7; 32 << 20], 0).unwrap();
        image.flush().unwrap();
        assert!(occupied() >= 32 << 20);
        image.discard(0, 31 << 20).unwrap();
        image.flush().unwrap();
        image.flush().unwrap();
        assert!(occupied() <= 2 << 20, "{settings}: {} bytes are left", occupied());
        image.close().unwrap();
        qemu::check(&path, false);
        let used = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!(used < 1 << 20, "the image file has {used} bytes of tables alone");
    }
}

/// An entry that was let go and written again before its hole was punched: the data stays. (The entry of the second
/// discard is not durable yet when the hole of the first one would be.)
#[test]
fn what_is_written_again_is_not_punched() {
    let Some(dir) = qemu::dir("data-file-again") else { return };
    let path = dir.path("again.qcow2");
    create(Path::new(&path), 1 << 20, &options("data_file=again.data"), false).unwrap();
    let image = open(&path);
    let mut seen = [0; 65536];
    for round in 1..20u8 {
        image.pwrite(&[round; 65536], 65536).unwrap();
        image.flush().unwrap();
        image.discard(65536, 65536).unwrap();
        image.pwrite(&[round; 512], 65536).unwrap();
        image.flush().unwrap();
        image.pread(&mut seen, 65536).unwrap();
        assert!(seen[..512] == [round; 512] && seen[512..].iter().all(|&b| b == 0), "round {round}");
    }
    image.close().unwrap();
    qemu::check(&path, false);
}

#[test]
fn a_name_in_an_image_leads_nowhere_unless_that_is_allowed() {
    let Some(dir) = qemu::dir("data-file-policy") else { return };
    let path = dir.path("image.qcow2");
    create(Path::new(&path), 1 << 20, &options("data_file=image.data"), false).unwrap();
    open(&path).pwrite(&[3; 512], 0).unwrap();
    let refused = |options: &OpenOptions| Image::open(Path::new(&path), options).err().unwrap();
    let denied = refused(&OpenOptions::default());
    assert_eq!((denied.code(), denied.errno()), (ErrorCode::BackingDenied, libc::EACCES));
    assert!(denied.to_string().contains("external data file 'image.data'") && denied.to_string().contains("backing"));
    let inspected = Image::open(Path::new(&path), &OpenOptions { inspect: true, ..Default::default() }).unwrap();
    assert_eq!(inspected.info().data_file.as_deref(), Some("image.data"));
    drop(inspected);
    // A path of the caller's own needs no permission.
    let mut own = OpenOptions { read_only: true, ..Default::default() };
    own.set("data_file", &dir.path("image.data")).unwrap();
    let mut seen = [0; 512];
    Image::open(Path::new(&path), &own).unwrap().pread(&mut seen, 0).unwrap();
    assert_eq!(seen, [3; 512]);
    // Names that lead out of the folder, in every way.
    let outside = qemu::Dir::new("data-file-outside");
    std::fs::write(outside.path("secret"), [9; 512]).unwrap();
    std::os::unix::fs::symlink(outside.path("secret"), dir.path("link")).unwrap();
    let relative = OpenOptions { backing: BackingPolicy::Relative, ..Default::default() };
    for name in [outside.path("secret"), "../secret".into(), "link".into(), "nbd://host/x".into(), "json:{}".into()] {
        let path = dir.path("hostile.qcow2");
        let file = MemoryStorage::default();
        let settings = CreateOptions { data_file: Some(name.clone()), ..Default::default() };
        let nowhere = MemoryStorage::default();
        block_on(create_with_data_file(&Blocking, &file, Some(&nowhere), 1 << 20, &settings, None)).unwrap();
        std::fs::write(&path, file.snapshot()).unwrap();
        let e = Image::open(Path::new(&path), &relative).err().unwrap();
        assert!(matches!(&e, Error::DataFileDenied { name: n, .. } if *n == name), "{name}: {e}");
        assert_eq!(std::fs::read(outside.path("secret")).unwrap(), [9; 512]);
    }
    // Files that are missing, of no kind that can be used, or used already.
    std::fs::remove_file(dir.path("image.data")).unwrap();
    let missing = refused(&relative);
    assert!(missing.errno() == libc::ENOENT && missing.to_string().contains("image.data"), "{missing}");
    std::fs::create_dir(dir.path("image.data")).unwrap();
    assert!(matches!(refused(&relative), Error::DataFile { .. }));
    std::fs::remove_dir(dir.path("image.data")).unwrap();
    std::fs::hard_link(&path, dir.path("image.data")).unwrap();
    let shared = refused(&relative);
    assert!(matches!(shared, Error::DataFileShared { .. } | Error::Locked { .. }), "{shared}");
}

#[test]
fn files_of_a_chain_are_told_apart() {
    let Some(dir) = qemu::dir("data-file-chain") else { return };
    // A backing file with a data file of its own, under an image with one.
    let (base, top) = (dir.path("base.qcow2"), dir.path("top.qcow2"));
    create(Path::new(&base), 1 << 20, &options("data_file=base.data"), false).unwrap();
    open(&base).pwrite(&[1; 4096], 0).unwrap();
    let settings = options("data_file=top.data,backing_file=base.qcow2,backing_fmt=qcow2");
    create(Path::new(&top), 1 << 20, &settings, false).unwrap();
    let image = open(&top);
    image.pwrite(&[2; 1024], 512).unwrap();
    let mut seen = [0; 4096];
    image.pread(&mut seen, 0).unwrap();
    assert!(seen[..512] == [1; 512] && seen[512..1536] == [2; 1024] && seen[1536..] == [1; 2560]);
    let extent = image.map(GuestOffset(0), 1 << 20).unwrap();
    assert_eq!((extent.kind, extent.depth, extent.in_data_file), (MapKind::Data, 0, true));
    image.close().unwrap();
    qemu::check(&top, false);
    // The raw backing file and the data file are one file.
    std::fs::copy(dir.path("base.data"), dir.path("one")).unwrap();
    let settings = options("data_file=top.data,backing_file=one,backing_fmt=raw");
    create(Path::new(&top), 1 << 20, &settings, true).unwrap();
    std::fs::remove_file(dir.path("top.data")).unwrap();
    std::fs::hard_link(dir.path("one"), dir.path("top.data")).unwrap();
    let options = OpenOptions { backing: BackingPolicy::Relative, ..Default::default() };
    let e = Image::open(Path::new(&top), &options).err().unwrap();
    assert_eq!(e.code(), ErrorCode::Chain, "{e}");
}

#[test]
fn creating_makes_both_files_or_none() {
    let Some(dir) = qemu::dir("data-file-create") else { return };
    let (path, data) = (dir.path("new.qcow2"), dir.path("new.data"));
    let make = |settings: &str, overwrite| create(Path::new(&path), 1_000_000, &options(settings), overwrite);
    let none = || !Path::new(&path).exists() && !Path::new(&data).exists();
    for (settings, culprit) in [
        ("data_file_raw=on", "data_file_raw"),
        ("data_file=new.data,compat=0.10", "data_file"),
        ("data_file=new.data,data_file_raw=on,backing_file=b,backing_fmt=raw", "data_file_raw"),
    ] {
        let e = make(settings, false).unwrap_err();
        assert!(matches!(&e, Error::OptionValue { key, .. } if key == culprit) && none(), "{settings}: {e}");
    }
    std::fs::write(&data, [1; 3000]).unwrap();
    assert!(matches!(make("data_file=new.data", false), Err(Error::Exists { path }) if path == data));
    assert!(!Path::new(&path).exists() && std::fs::read(&data).unwrap() == [1; 3000], "refused, and nothing changed");
    make("data_file=new.data", true).unwrap();
    assert_eq!(std::fs::read(&data).unwrap(), vec![0; 1_000_448], "emptied, and as long as the disk");
    let e = make("data_file=new.qcow2", true).unwrap_err();
    assert!(matches!(e, Error::DataFileShared { .. }) || matches!(e, Error::Locked { .. }), "{e}");
    std::fs::remove_file(&path).unwrap();
    let e = make("data_file=missing/new.data", false).unwrap_err();
    assert!(e.errno() == libc::ENOENT && !Path::new(&path).exists(), "{e}");
    // Allocated ahead, in the data file.
    for mode in ["metadata", "falloc", "full"] {
        make(&format!("data_file=new.data,data_file_raw=on,preallocation={mode}"), true).unwrap();
        let occupied = std::fs::metadata(&data).unwrap().blocks() * 512;
        assert_eq!(occupied >= 1_000_000, mode != "metadata", "{mode}: {occupied} bytes");
        qemu::check(&path, false);
        let image = open(&path);
        assert_eq!(image.map(GuestOffset(0), 1_000_448).unwrap().length, 1_000_448);
        image.pwrite(&[1; 512], 70_000).unwrap();
        assert_eq!(image.stats().allocating_writes, 0, "{mode}");
    }
}

/// Stores a big-endian word in a file.
fn patch(path: &str, at: u64, word: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&word.to_be_bytes(), at).unwrap();
}

#[test]
fn what_does_not_go_with_a_data_file_is_named() {
    let Some(dir) = qemu::dir("data-file-malformed") else { return };
    let path = dir.path("bad.qcow2");
    let fresh = || {
        create(Path::new(&path), 1 << 20, &options("data_file=bad.data"), true).unwrap();
        let image = open(&path);
        image.pwrite(&[1; 65536], 0).unwrap();
        image.pwrite(&[2; 65536], 65536).unwrap();
        image.close().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        Layout::parse(&DiskImage::new(bytes)).unwrap().u64(0x30000) & 0x00ff_ffff_ffff_fe00
    };
    let relative = OpenOptions { backing: BackingPolicy::Relative, ..Default::default() };
    let header = |at, word, expected: &str| {
        fresh();
        patch(&path, at, word);
        let e = Image::open(Path::new(&path), &relative).err().unwrap();
        assert!(matches!(&e, Error::Header { field, .. } if *field == expected), "{e}");
    };
    header(60, 1 << 32, "nb_snapshots");
    header(24, 1 << 57, "size");
    let (copied, compressed) = (1u64 << 63, 1u64 << 62);
    for (index, descriptor, kind) in [
        (1, copied | 0x20000, CorruptionKind::NotAtGuestOffset),
        (1, copied, CorruptionKind::NotAtGuestOffset),
        (0, copied | 0x10000, CorruptionKind::NotAtGuestOffset),
        (1, compressed | 0x10000, CorruptionKind::CompressedInDataFile),
        (1, copied | 0x10000 | 2, CorruptionKind::L2EntryReservedBits),
    ] {
        let table = fresh();
        patch(&path, table + index * 8, descriptor);
        let image = open(&path);
        let e = image.pread(&mut [0; 512], index * 65536).unwrap_err();
        assert!(matches!(&e, Error::Corrupt(found) if found.kind == kind), "{descriptor:x}: {e}");
        assert!(image.pwrite(&[0; 512], index * 65536).is_err());
    }
    // Without a name, and with one where no data file is.
    fresh();
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
    let data = MemoryStorage::default();
    block_on(create_with_data_file(&Blocking, &*storage, Some(&data), 1 << 20, &CreateOptions::default(), None))
        .unwrap();
    assert_eq!(Image::open_storage(storage.clone(), &relative).err(), Some(Error::DataFileMissing));
    create(Path::new(&path), 1 << 20, &CreateOptions::default(), true).unwrap();
    let mut named = relative;
    named.set("data_file", "bad.data").unwrap();
    let e = Image::open(Path::new(&path), &named).err().unwrap();
    assert!(matches!(&e, Error::OptionValue { key, .. } if key == "data_file"), "{e}");
}

/// A table that has to be copied before it is ours: the entry of cluster 0 is nothing but its COPIED flag, which a copy
/// loses where it stands for a count. It did: the data of the first cluster was gone.
#[test]
fn the_first_cluster_survives_a_copy_of_its_table() {
    let Some(dir) = qemu::dir("data-file-copied") else { return };
    let path = dir.path("copied.qcow2");
    create(Path::new(&path), 1 << 20, &options("data_file=copied.data"), false).unwrap();
    let image = open(&path);
    image.pwrite(&[5; 65536], 0).unwrap();
    image.close().unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let l1_entry = Layout::parse(&DiskImage::new(bytes)).unwrap().u64(0x30000);
    patch(&path, 0x30000, l1_entry & !(1 << 63));
    let image = open(&path);
    image.pwrite(&[6; 512], 65536).unwrap();
    let mut seen = [0; 512];
    image.pread(&mut seen, 0).unwrap();
    assert_eq!(seen, [5; 512]);
    image.close().unwrap();
    qemu::check(&path, false);
}

#[test]
fn a_data_file_in_use_is_locked_and_given_back() {
    let Some(dir) = qemu::dir("data-file-lock") else { return };
    let (path, data) = (dir.path("lock.qcow2"), dir.path("lock.data"));
    create(Path::new(&path), 1 << 20, &options("data_file=lock.data,data_file_raw=on"), false).unwrap();
    let write =
        || std::process::Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 512", &data]).output().unwrap();
    let image = open(&path);
    assert!(!write().status.success(), "QEMU writes to a data file that is in use");
    image.close().unwrap();
    assert!(write().status.success(), "{:?}", write());
    let reader = Image::open(
        Path::new(&path),
        &OpenOptions { backing: BackingPolicy::Relative, read_only: true, ..Default::default() },
    )
    .unwrap();
    assert!(!write().status.success(), "QEMU writes to a data file that is being read");
    drop(reader);
}

#[test]
fn facts_are_told_without_the_data_file() {
    let Some(dir) = qemu::dir("data-file-facts") else { return };
    let path = dir.path("facts.qcow2");
    for raw in ["on", "off"] {
        create(Path::new(&path), 1 << 20, &options(&format!("data_file=facts.data,data_file_raw={raw}")), true)
            .unwrap();
        let theirs = qemu::img(&["info", "--output=json", "-f", "qcow2", &path]);
        std::fs::remove_file(dir.path("facts.data")).unwrap();
        let image = Image::open(Path::new(&path), &OpenOptions { inspect: true, ..Default::default() }).unwrap();
        let ours = image.info().to_json(&path);
        let lines = |text: &str| {
            let kept = text.lines().filter(|line| !line.contains("actual-size"));
            kept.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(lines(&ours), lines(&theirs));
    }
}

/// A data file that is shorter than the disk: past its end everything is zero.
#[test]
fn a_short_data_file_reads_as_zeroes() {
    let Some(dir) = qemu::dir("data-file-short") else { return };
    let path = dir.path("short.qcow2");
    for raw in ["on", "off"] {
        create(Path::new(&path), 1 << 20, &options(&format!("data_file=short.data,data_file_raw={raw}")), true)
            .unwrap();
        let image = open(&path);
        image.pwrite(&vec![7; 1 << 20], 0).unwrap();
        image.close().unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(dir.path("short.data")).unwrap();
        file.set_len(100_000).unwrap();
        let image = open(&path);
        let mut seen = vec![1; 1 << 20];
        image.pread(&mut seen, 0).unwrap();
        assert!(seen[..100_000] == vec![7; 100_000] && seen[100_000..].iter().all(|&byte| byte == 0));
        image.pwrite(&[8; 10], 500_000).unwrap();
        image.pread(&mut seen[..20], 499_995).unwrap();
        assert_eq!(seen[..20], [0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 0, 0, 0, 0, 0]);
        image.close().unwrap();
        qemu::check(&path, false);
    }
}
