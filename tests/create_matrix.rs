//! Every legal combination of create options: QEMU finds nothing to say about our images, and we say of its images
//! and ours what it says. LIBQCOW2_FULL_MATRIX=1 takes all 1202 combinations; without it, half of those that differ only
//! in flags, with every cluster size x refcount width x kind of entry x version among them.

mod qemu;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use qcow2::error::Error;
use qcow2::image::{CreateOptions, Image, OpenOptions, create, load_header};
use qcow2::storage::file::FileStorage;
use qcow2::storage::{Blocking, Storage};
use qcow2::wait::block_on;

/// One combination, as `-o` of qemu-img.
#[derive(Clone, Debug)]
struct Case {
    cluster_size: u64,
    refcount_bits: u32,
    version: u32,
    extended_l2: bool,
    lazy: bool,
    zstd: bool,
    backing: bool,
    size: u64,
}

impl Case {
    fn settings(&self) -> Vec<(&'static str, String)> {
        let flag = |on: bool| if on { "on" } else { "off" }.to_owned();
        let mut list = vec![
            ("cluster_size", self.cluster_size.to_string()),
            ("refcount_bits", self.refcount_bits.to_string()),
            ("compat", if self.version == 2 { "0.10" } else { "1.1" }.to_owned()),
            ("extended_l2", flag(self.extended_l2)),
            ("lazy_refcounts", flag(self.lazy)),
            ("compression_type", if self.zstd { "zstd" } else { "zlib" }.to_owned()),
            ("preallocation", "off".to_owned()),
        ];
        if self.backing {
            list.push(("backing_file", BACKING.to_owned()));
            list.push(("backing_fmt", "raw".to_owned()));
        }
        list
    }
}

/// A name that JSON has to escape.
const BACKING: &str = "bäse \"1\".raw";

/// A small generator, so that a run can be repeated (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % n
    }
}

/// Sizes from nothing to the largest that is still cheap to check, some of them no multiple of anything.
fn some_size(random: &mut Random, cluster_size: u64) -> u64 {
    // An L1 table of 2 MiB at most: QEMU reads it for each check.
    let largest = (cluster_size / 16 * cluster_size).saturating_mul(1 << 17);
    match random.below(8) {
        0 => 0,
        1 => 1 + random.below(5000),
        2 => largest,
        3 => cluster_size * (1 + random.below(1000)),
        4 => largest / 1024 + random.below(1 << 20),
        _ => (1 << 20) + random.below(1 << 32).min(largest),
    }
}

/// Whether to take all combinations.
fn full() -> bool {
    std::env::var_os("LIBQCOW2_FULL_MATRIX").is_some()
}

fn cases() -> Vec<Case> {
    let mut random = Random(0x5eed);
    let mut list = Vec::new();
    let full = full();
    for bits in 9..=21 {
        let cluster_size = 1u64 << bits;
        let mut add = |refcount_bits, version, extended_l2, lazy, zstd, backing| {
            let size = some_size(&mut random, cluster_size);
            list.push(Case { cluster_size, refcount_bits, version, extended_l2, lazy, zstd, backing, size });
        };
        for choice in 0..8 * 2 {
            let (lazy, zstd, backing, extended_l2) =
                (choice & 1 != 0, choice & 2 != 0, choice & 4 != 0, choice & 8 != 0);
            if extended_l2 && bits < 14 {
                continue;
            }
            for order in 0..=6 {
                // Half of them, such that each pair of choices meets every cluster size and every width.
                if !full && !((choice & 7_u32).count_ones() + order + bits).is_multiple_of(2) {
                    continue;
                }
                add(1 << order, 3, extended_l2, lazy, zstd, backing);
            }
        }
        add(16, 2, false, false, false, false);
        add(16, 2, false, false, false, true);
    }
    list
}

/// What our reader says of an image.
fn our_info(path: &str) -> String {
    let storage = FileStorage::new(File::open(path).unwrap());
    let header = block_on(load_header(&Blocking, &storage)).unwrap_or_else(|e| panic!("{path}: {e}"));
    let size = storage.size().unwrap();
    header.check_supported().unwrap_or_else(|e| panic!("{path}: {e}"));
    header.check_placement(size).unwrap_or_else(|e| panic!("{path}: {e}"));
    let inspect = OpenOptions { inspect: true, ..OpenOptions::default() };
    Image::open(Path::new(path), &inspect).unwrap_or_else(|e| panic!("{path}: {e}")).info().to_json(path)
}

/// A JSON text as path -> value, so that two of them compare key by key.
fn flat(json: &str) -> BTreeMap<String, String> {
    let mut map = BTreeMap::new();
    let rest = flatten(json.trim(), "", &mut map);
    assert!(rest.is_empty(), "after the JSON: {rest}");
    map
}

fn flatten<'a>(text: &'a str, path: &str, map: &mut BTreeMap<String, String>) -> &'a str {
    let text = text.trim_start();
    let (open, mut rest) = text.split_at(1);
    let close = match open {
        "{" => '}',
        "[" => ']',
        _ => {
            let end = scalar_length(text);
            assert!(map.insert(path.to_owned(), text[..end].to_owned()).is_none(), "{path} twice");
            return &text[end..];
        }
    };
    map.insert(format!("{path}{open}"), String::new()); // an empty list is something too
    for index in 0.. {
        rest = rest.trim_start().trim_start_matches(',').trim_start();
        if let Some(after) = rest.strip_prefix(close) {
            return after;
        }
        let mut key = index.to_string();
        if close == '}' {
            let end = scalar_length(rest);
            key = rest[1..end - 1].to_owned();
            rest = rest[end..].trim_start().strip_prefix(':').unwrap();
        }
        rest = flatten(rest, &format!("{path}/{key}"), map);
    }
    unreachable!()
}

fn scalar_length(text: &str) -> usize {
    if !text.starts_with('"') {
        return text.find([',', '}', ']', '\n', ' ']).unwrap();
    }
    let mut escaped = false;
    for (i, c) in text.char_indices().skip(1) {
        match c {
            '"' if !escaped => return i + 1,
            '\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    panic!("string without end: {text}")
}

/// Compares what QEMU and we say. The size on disk can change between two looks at a file that is being written
/// back, and so is only compared to be there.
#[track_caller]
fn infos_agree(path: &str, context: &str) {
    let mut theirs = flat(&qemu::img(&["info", "--output=json", "-f", "qcow2", path]));
    let mut ours = flat(&our_info(path));
    for map in [&mut theirs, &mut ours] {
        for (key, value) in map.iter_mut().filter(|(key, _)| key.ends_with("/actual-size")) {
            assert!(value.parse::<u64>().is_ok(), "{key}: {value}");
            value.clear();
        }
    }
    assert!(theirs.len() > 20, "{theirs:?}");
    assert_eq!(ours, theirs, "{context}");
}

/// Runs `each` over the list on all cores.
fn on_all_cores<T: Sync>(list: &[T], each: impl Fn(usize, &T) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, |n| n.get()) {
            scope.spawn(|| {
                while let Some((i, item)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, list.get(i)?)))
                {
                    each(i, item);
                }
            });
        }
    });
}

#[test]
fn every_legal_combination() {
    let Some(dir) = qemu::dir("create-matrix") else { return };
    fs::write(dir.path(BACKING), [0xff; 512]).unwrap();
    let cases = cases();
    let summary = Mutex::new(BTreeMap::<String, usize>::new());
    on_all_cores(&cases, |i, case| {
        let context = format!("case {i}: {case:?}");
        let (ours, theirs) = (dir.path(&format!("{i}-ours")), dir.path(&format!("{i}-theirs")));
        let mut options = CreateOptions::default();
        for (key, value) in case.settings() {
            options.set(key, &value).unwrap();
        }
        create(Path::new(&ours), case.size, &options, false).unwrap_or_else(|e| panic!("{context}: {e}"));
        qemu::check(&ours, false);
        infos_agree(&ours, &context);
        let list: Vec<String> = case.settings().iter().map(|(key, value)| format!("{key}={value}")).collect();
        qemu::img(&["create", "-q", "-u", "-f", "qcow2", "-o", &list.join(","), &theirs, &case.size.to_string()]);
        infos_agree(&theirs, &context);
        same_header(&ours, &theirs, case, &context);
        fs::remove_file(ours).unwrap();
        fs::remove_file(theirs).unwrap();
        let kind = match (case.version, case.extended_l2) {
            (2, _) => "version 2",
            (_, false) => "version 3",
            (_, true) => "version 3, extended L2 entries",
        };
        *summary.lock().unwrap().entry(kind.to_owned()).or_default() += 1;
    });
    let summary = summary.into_inner().unwrap();
    for (kind, count) in &summary {
        println!("{kind:32} {count:5} combinations: check clean, info equal");
    }
    let counts: Vec<usize> = summary.values().copied().collect();
    // 13 cluster sizes, 7 widths, lazy x compression x backing; extended L2 entries with the 8 largest cluster sizes.
    let choices = if full() { 8 } else { 4 };
    assert_eq!(counts, [13 * 2, 13 * 7 * choices, 8 * 7 * choices]);
}

/// Where the tables go is ours to say, and so is how many refcount blocks there are; everything else in the first
/// cluster is as QEMU writes it.
fn same_header(ours: &str, theirs: &str, case: &Case, context: &str) {
    let header = |path| block_on(load_header(&Blocking, &FileStorage::new(File::open(path).unwrap()))).unwrap();
    let (ours, mut theirs) = (header(ours), header(theirs));
    if case.cluster_size == 65536 && case.size > 0 && case.size < 1 << 29 {
        assert_eq!(ours.l1_offset.0, 0x30000, "{context}: the default layout");
        assert_eq!(ours, theirs, "{context}");
    }
    theirs.l1_offset = ours.l1_offset;
    theirs.refcount_table_offset = ours.refcount_table_offset;
    theirs.refcount_table_clusters = ours.refcount_table_clusters;
    assert_eq!(ours, theirs, "{context}");
}

/// With an external data file, raw or not: QEMU finds nothing to say about our images, both say the same of both, and the
/// headers are the same but for the places of the tables. The data file is as long as the disk.
#[test]
fn every_combination_with_a_data_file() {
    let Some(dir) = qemu::dir("create-data-file") else { return };
    fs::write(dir.path("base.raw"), [0xff; 512]).unwrap();
    let mut cases = Vec::new();
    for bits in [9, 12, 14, 16, 21] {
        for choice in 0..32_u32 {
            let on = |bit: u32| choice >> bit & 1 == 1;
            let (extended, raw, lazy, zstd, backing) = (on(0), on(1), on(2), on(3), on(4));
            if !(extended && bits < 14 || raw && backing) {
                cases.push((bits, extended, raw, lazy, zstd, backing));
            }
        }
    }
    on_all_cores(&cases, |i, &(bits, extended, raw, lazy, zstd, backing)| {
        let flag = |on: bool| if on { "on" } else { "off" };
        let (file, size) = (format!("{i}.data"), (1_000_000 + i as u64 * 7777) >> (16_u32.saturating_sub(bits)));
        let mut settings = format!(
            "cluster_size={},extended_l2={},data_file={file},data_file_raw={},lazy_refcounts={},compression_type={}",
            1u64 << bits,
            flag(extended),
            flag(raw),
            flag(lazy),
            if zstd { "zstd" } else { "zlib" }
        );
        if backing {
            settings += ",backing_file=base.raw,backing_fmt=raw";
        }
        let mut options = CreateOptions::default();
        for (key, value) in settings.split(',').filter_map(|setting| setting.split_once('=')) {
            options.set(key, value).unwrap();
        }
        let (ours, theirs) = (dir.path(&format!("{i}-ours")), dir.path(&format!("{i}-theirs")));
        create(Path::new(&ours), size, &options, false).unwrap_or_else(|e| panic!("{settings}: {e}"));
        assert_eq!(fs::metadata(dir.path(&file)).unwrap().len(), size.next_multiple_of(512), "{settings}");
        qemu::check(&ours, false);
        infos_agree(&ours, &settings);
        qemu::img(&["create", "-q", "-u", "-f", "qcow2", "-o", &settings, &theirs, &size.to_string()]);
        infos_agree(&theirs, &settings);
        let header = |path| block_on(load_header(&Blocking, &FileStorage::new(File::open(path).unwrap()))).unwrap();
        let (ours, mut theirs) = (header(&ours), header(&theirs));
        theirs.l1_offset = ours.l1_offset;
        theirs.l1_entries = ours.l1_entries;
        theirs.refcount_table_offset = ours.refcount_table_offset;
        theirs.refcount_table_clusters = ours.refcount_table_clusters;
        assert_eq!(ours, theirs, "{settings}");
    });
    println!("{} combinations with a data file", cases.len());
}

#[test]
fn the_largest_disks_and_the_first_too_large_ones() {
    let Some(dir) = qemu::dir("create-largest") else { return };
    for (cluster_size, refcount_bits, extended_l2) in [
        (512, 1, false),
        (512, 64, false),
        (4096, 64, false),
        (16384, 16, true),
        (65536, 16, false),
        (2 << 20, 16, true),
    ] {
        let options =
            CreateOptions { cluster_size_bytes: cluster_size, refcount_bits, extended_l2, ..Default::default() };
        let entry = if extended_l2 { 16 } else { 8 };
        let largest = (cluster_size / entry * cluster_size) << 22;
        let path = dir.path("largest");
        create(Path::new(&path), largest, &options, false).unwrap();
        qemu::check(&path, false);
        infos_agree(&path, &format!("largest with {options:?}"));
        fs::remove_file(&path).unwrap();
        let e = create(Path::new(&path), largest + 1, &options, false).unwrap_err();
        assert!(matches!(e, Error::TooLarge { limit, .. } if limit == largest), "{e}");
        assert!(!Path::new(&path).exists(), "refused, but a file is there");
    }
}

#[test]
fn images_with_a_history() {
    let Some(dir) = qemu::dir("create-history") else { return };
    let path = dir.path("image");
    qemu::img(&["create", "-q", "-f", "qcow2", &path, "10M"]);
    qemu::io(&path, &["write 1M 2M", "write -z 5M 1M"]);
    infos_agree(&path, "after writes");
    qemu::img(&["resize", "-q", &path, "20M"]);
    infos_agree(&path, "after a resize");
    qemu::img(&["amend", "-f", "qcow2", "-o", "compat=0.10", &path]);
    infos_agree(&path, "after a downgrade");
    qemu::img(&["bitmap", "--add", "-f", "qcow2", &upgraded(&path), "b"]);
    qemu::img(&["bitmap", "--add", "--disable", "-g", "1M", "-f", "qcow2", &path, "d"]);
    infos_agree(&path, "with bitmaps");
    assert!(our_info(&path).contains("\"granularity\": 1048576"));
    // The dirty bit, as a crash under lazy refcounts leaves it.
    let lazy = dir.path("lazy");
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", &lazy, "1M"]);
    let mut bytes = fs::read(&lazy).unwrap();
    bytes[79] |= 1;
    fs::write(&lazy, bytes).unwrap();
    infos_agree(&lazy, "dirty");
    assert!(our_info(&lazy).contains("\"dirty-flag\": true\n}"), "{}", our_info(&lazy));
    // The corrupt bit.
    let mut bytes = fs::read(&lazy).unwrap();
    bytes[79] = 2;
    fs::write(&lazy, bytes).unwrap();
    infos_agree(&lazy, "corrupt");
}

fn upgraded(path: &str) -> String {
    qemu::img(&["amend", "-f", "qcow2", "-o", "compat=1.1", path]);
    path.to_owned()
}

#[test]
fn files_that_exist_are_kept_unless_asked() {
    let Some(dir) = qemu::dir("create-exists") else { return };
    let path = dir.path("image");
    fs::write(&path, "precious").unwrap();
    let e = create(Path::new(&path), 1 << 20, &CreateOptions::default(), false).unwrap_err();
    assert!(matches!(&e, Error::Exists { path: named } if *named == path), "{e}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    let bad = CreateOptions { refcount_bits: 5, ..Default::default() };
    create(Path::new(&path), 1 << 20, &bad, true).unwrap_err();
    assert_eq!(fs::read(&path).unwrap(), b"precious", "refused options must not cost the old file");
    create(Path::new(&path), 1 << 20, &CreateOptions::default(), true).unwrap();
    qemu::check(&path, false);
    let e = create(Path::new(&dir.path("")), 1 << 20, &CreateOptions::default(), true).unwrap_err();
    assert!(matches!(e, Error::Path { .. } | Error::OpenFile { errno: libc::EISDIR, .. }), "{e}");
    let e = create(Path::new(&dir.path("no/such/folder")), 1 << 20, &CreateOptions::default(), false).unwrap_err();
    assert!(matches!(e, Error::OpenFile { errno: libc::ENOENT, .. }), "{e}");
}

#[test]
fn a_file_that_cannot_be_completed_is_removed() {
    // A file size limit stands for a full disk: the image ends behind it.
    let Some(dir) = qemu::dir("create-enospc") else { return };
    let path = dir.path("image");
    let limited = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$0\" --exact create_past_the_limit --nocapture"])
        .arg(std::env::current_exe().unwrap())
        .env("LIBQCOW2_TEST_IMAGE", &path)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&limited.stdout).into_owned() + &String::from_utf8_lossy(&limited.stderr);
    assert!(limited.status.success() && text.contains("1 passed") && text.contains(PAST_THE_LIMIT), "{text}");
    assert!(!Path::new(&path).exists(), "a half image was left: {text}");
}

/// Started a second time by `a_file_that_cannot_be_completed_is_removed`, under a limit; alone it has nothing to do.
#[test]
fn create_past_the_limit() {
    let Ok(path) = std::env::var("LIBQCOW2_TEST_IMAGE") else { return };
    let e = create(Path::new(&path), 1 << 20, &CreateOptions::default(), false).unwrap_err();
    assert!(matches!(e, Error::Io { errno: libc::EFBIG, .. }), "{e}");
    println!("{PAST_THE_LIMIT}");
}

/// Tells a run under the limit from one that had nothing to do.
const PAST_THE_LIMIT: &str = "creating past the limit was refused";
