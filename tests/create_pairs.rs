//! Every creation option, and every pair of options that go together, both ways: an image that we make is read, written
//! and checked by QEMU, and one that QEMU makes is by us. Preallocated images are compared in map and size as well.
//! Prints the table.

mod qemu;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use qcow2::image::{CreateOptions, Image, OpenOptions, create};

/// The options with the values that make a difference.
const VALUES: [(&str, &str); 19] = [
    ("cluster_size", "512"),
    ("cluster_size", "4k"),
    ("cluster_size", "16k"),
    ("cluster_size", "2M"),
    ("extended_l2", "on"),
    ("refcount_bits", "1"),
    ("refcount_bits", "8"),
    ("refcount_bits", "64"),
    ("compat", "0.10"),
    ("lazy_refcounts", "on"),
    ("compression_type", "zstd"),
    ("backing_file", "base.raw"),
    ("backing_file", "base.qcow2"),
    ("preallocation", "metadata"),
    ("preallocation", "falloc"),
    ("preallocation", "full"),
    ("nocow", "on"),
    ("extent_size_hint", "1M"),
    ("cluster_size", "64k"),
];

/// No multiple of any cluster or subcluster, and longer than the backing files.
const SIZE: u64 = (5 << 20) + 7 * 512;
const BASE_BYTES: usize = (2 << 20) + 3 * 512;
/// In the middle of clusters, and at the end.
const WRITES: [(u64, u64); 3] = [(1000, 70_000), ((2 << 20) - 700, 5000), (SIZE - 2000, 2000)];

type Settings = Vec<(&'static str, String)>;

fn settings(chosen: &[(&'static str, &'static str)], dir: &qemu::Dir) -> Settings {
    let mut list = Settings::new();
    for &(key, value) in chosen {
        match key {
            "backing_file" => {
                list.push((key, dir.path(value)));
                list.push(("backing_fmt", value.rsplit('.').next().unwrap().to_owned()));
            }
            _ => list.push((key, value.to_owned())),
        }
    }
    list
}

fn options(settings: &Settings) -> CreateOptions {
    let mut options = CreateOptions::default();
    settings.iter().for_each(|(key, value)| options.set(key, value).unwrap());
    options
}

fn qemu_create(path: &str, settings: &Settings) -> bool {
    let list: Vec<String> = settings.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let mut command = std::process::Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]);
    if !list.is_empty() {
        command.args(["-o", &list.join(",")]);
    }
    command.args([path, &SIZE.to_string()]).output().unwrap().status.success()
}

fn open(path: &str) -> Image {
    let mut options = OpenOptions::default();
    options.set("backing", "any").unwrap();
    Image::open(Path::new(path), &options).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// What the guest sees after the writes, with `pattern` in them.
fn expected(has_backing: bool, pattern: u8) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    if has_backing {
        bytes[..BASE_BYTES].fill(0x77);
    }
    WRITES.iter().for_each(|&(at, n)| bytes[at as usize..(at + n) as usize].fill(pattern));
    bytes
}

fn check_content(path: &str, has_backing: bool, pattern: u8, context: &str) {
    let image = open(path);
    let mut found = vec![0xaa; SIZE as usize];
    image.pread(&mut found, 0).unwrap();
    let wrong = found.iter().zip(&expected(has_backing, pattern)).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "{context}");
}

/// The map as QEMU prints it, without host offsets, neighbours joined.
fn map(path: &str) -> Vec<(String, u64)> {
    let text = qemu::img(&["map", "--output=json", "-f", "qcow2", path]);
    let mut runs: Vec<(String, u64)> = Vec::new();
    for line in text.lines().filter(|line| line.contains("\"start\"")) {
        let field = |name: &str| {
            let rest = &line[line.find(&format!("\"{name}\": ")).unwrap() + name.len() + 4..];
            rest[..rest.find([',', '}']).unwrap()].to_owned()
        };
        let kind = ["depth", "present", "data", "compressed"].map(field).join(" ");
        let length: u64 = field("length").parse().unwrap();
        match runs.last_mut() {
            Some((last, total)) if *last == kind => *total += length,
            _ => runs.push((kind, length)),
        }
    }
    runs
}

/// `None`: these options do not go together, as both say.
fn compare(chosen: &[(&'static str, &'static str)], index: usize, dir: &qemu::Dir) -> Option<()> {
    let context = format!("{chosen:?}");
    let settings = settings(chosen, dir);
    let (ours, theirs) = (dir.path(&format!("{index}-ours")), dir.path(&format!("{index}-theirs")));
    let made = create(Path::new(&ours), SIZE, &options(&settings), false);
    assert_eq!(made.is_ok(), qemu_create(&theirs, &settings), "{context}: {made:?}");
    if made.is_err() {
        assert!(!Path::new(&ours).exists(), "{context}");
        return None;
    }
    let has_backing = chosen.iter().any(|(key, _)| *key == "backing_file");
    assert_eq!(map(&ours), map(&theirs), "{context}: map");
    if chosen.iter().any(|(key, value)| *key == "preallocation" && *value != "metadata") {
        let occupied = |path: &str| fs::metadata(path).unwrap().blocks() * 512;
        let (a, b) = (occupied(&ours), occupied(&theirs));
        // The order of the tables differs, and with it how many of them there are.
        assert!(a.abs_diff(b) <= (1 << 20).max(b / 8), "{context}: {a} bytes on disk, QEMU's {b}");
        assert!(a > SIZE, "{context}: {a} bytes on disk");
    }
    // Ours: QEMU checks, reads, writes, checks, and we find what it wrote.
    qemu::check(&ours, true);
    if has_backing {
        qemu::io(&ours, &[&format!("read -q -P 0x77 0 {BASE_BYTES}")]);
    }
    let writes: Vec<String> = WRITES.iter().map(|(at, n)| format!("write -q -P 0x31 {at} {n}")).collect();
    qemu::io(&ours, &writes.iter().map(String::as_str).collect::<Vec<_>>());
    qemu::check(&ours, true);
    check_content(&ours, has_backing, 0x31, &context);
    // Theirs: we read, write and close, and QEMU checks and finds what we wrote.
    let image = open(&theirs);
    for (at, n) in WRITES {
        image.pwrite(&vec![0x42; n as usize], at).unwrap();
    }
    image.close().unwrap();
    qemu::check(&theirs, true);
    let reads: Vec<String> = WRITES.iter().map(|(at, n)| format!("read -q -P 0x42 {at} {n}")).collect();
    qemu::io(&theirs, &reads.iter().map(String::as_str).collect::<Vec<_>>());
    check_content(&theirs, has_backing, 0x42, &context);
    fs::remove_file(ours).unwrap();
    fs::remove_file(theirs).unwrap();
    Some(())
}

#[test]
fn each_option_and_each_pair() {
    let Some(dir) = qemu::dir("create-pairs") else { return };
    fs::write(dir.path("base.raw"), vec![0x77; BASE_BYTES]).unwrap();
    qemu::img(&["create", "-q", "-f", "qcow2", &dir.path("base.qcow2"), &BASE_BYTES.to_string()]);
    qemu::io(&dir.path("base.qcow2"), &[&format!("write -q -P 0x77 0 {BASE_BYTES}")]);
    let mut cases: Vec<Vec<(&str, &str)>> = vec![vec![]];
    for (i, &one) in VALUES.iter().enumerate() {
        cases.push(vec![one]);
        let others = VALUES[i + 1..].iter().filter(|other| other.0 != one.0);
        cases.extend(others.map(|&other| vec![one, other]));
    }
    // Preallocation over a backing file needs subclusters: three at once.
    for mode in ["metadata", "falloc", "full"] {
        for base in ["base.raw", "base.qcow2"] {
            cases.push(vec![("preallocation", mode), ("extended_l2", "on"), ("backing_file", base)]);
        }
    }
    let next = AtomicUsize::new(0);
    let table = Mutex::new(BTreeMap::<(String, String), (u32, u32)>::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, |n| n.get()) {
            scope.spawn(|| {
                while let Some((index, case)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, cases.get(i)?)))
                {
                    let done = compare(case, index, &dir).is_some();
                    let name = |n: usize| case.get(n).map_or(String::new(), |(key, _)| (*key).to_owned());
                    let mut table = table.lock().unwrap();
                    let counts = table.entry((name(0), name(1))).or_default();
                    if done { counts.0 += 1 } else { counts.1 += 1 }
                }
            });
        }
    });
    let table = table.into_inner().unwrap();
    println!("{:<18} {:<18} {:>10} {:>10}", "option", "with", "both ways", "refused");
    for ((one, other), (done, refused)) in &table {
        println!("{one:<18} {other:<18} {done:>10} {refused:>10}");
    }
    let (done, refused) = table.values().fold((0, 0), |sum, counts| (sum.0 + counts.0, sum.1 + counts.1));
    assert_eq!((done + refused) as usize, cases.len());
    // Refused: subclusters with clusters of 512 and 4k (twice), version 3's options with version 2, and preallocation
    // over a backing file without subclusters (six times).
    assert_eq!(refused, 2 + 6 + 6, "{table:?}");
}
