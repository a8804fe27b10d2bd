//! The model: long random sequences of operations against a flat array of bytes, over many geometries, from one
//! thread and from several, with caches so small that tables are evicted all the time. End states are judged, and
//! shown to `qemu-img check` and `qemu-img compare`.
//!
//! `MODEL_SEED` sets the seed, `MODEL_OPS` the operations for each image.

#[path = "model/history.rs"]
mod history;
mod judge;
#[path = "model/operations.rs"]
mod operations;
mod qemu;
#[path = "model/queues.rs"]
mod queues;
mod requests;

use std::path::Path;
use std::sync::Mutex;

use judge::{Judge, Layout};
use qcow2::format::GuestOffset;
use qcow2::image::{BackingPolicy, Image, OpenOptions, WriteFlags, ZeroFlags};
use qcow2::storage::IoSrc;
use qcow2::storage::sim::{DiskImage, Rng};

/// A shape of image.
#[derive(Debug, Clone)]
struct Shape {
    cluster_bits: u32,
    extended: bool,
    refcount_bits: u32,
    version: u32,
    /// Images below this one: 0 none, 1 raw, 2 qcow2 on raw, 3 qcow2 on qcow2 on raw.
    chain: u32,
    size: u64,
}

/// Every cluster size with both kinds of L2 entries; the other properties take turns.
fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    for cluster_bits in 9..=21u32 {
        for extended in [false, true] {
            if extended && cluster_bits < 14 {
                continue;
            }
            for turn in 0..2 {
                let n = shapes.len() as u32;
                let refcount_bits = 1 << (n * 5 % 7);
                let version = if !extended && refcount_bits == 16 { 2 + turn } else { 3 };
                // Around 40 clusters, more where clusters are small, and an end inside of a cluster.
                let clusters = if cluster_bits < 14 { 700 } else { 23 };
                let size = (clusters << cluster_bits) - if turn == 0 { 512 } else { 0 };
                shapes.push(Shape { cluster_bits, extended, refcount_bits, version, chain: n % 4, size });
            }
        }
    }
    // Version 2 has 16-bit refcounts only.
    for cluster_bits in [9, 12, 16] {
        let shape = Shape { cluster_bits, extended: false, refcount_bits: 16, version: 2, chain: 2, size: 3 << 20 };
        shapes.push(shape);
    }
    shapes
}

fn random_bytes(rng: &mut Rng, length: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..length.div_ceil(8)).flat_map(|_| rng.next_u64().to_le_bytes()).collect();
    bytes.truncate(length as usize);
    bytes
}

/// Pieces of noise, of one byte repeated, and of zeroes.
fn half_random_bytes(rng: &mut Rng, length: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < length {
        let n = 1 + rng.below(3000) * rng.below(30);
        match rng.below(3) {
            0 => bytes.extend(random_bytes(rng, n)),
            1 => bytes.resize(bytes.len() + n as usize, rng.next_u64() as u8),
            _ => bytes.resize(bytes.len() + n as usize, 0),
        }
    }
    bytes.truncate(length as usize);
    bytes
}

impl Shape {
    fn options(&self) -> String {
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        let extended = if self.extended { ",extended_l2=on" } else { "" };
        let is_zstd = self.version == 3 && self.chain % 2 == 1;
        let compression = if is_zstd { ",compression_type=zstd" } else { "" };
        format!(
            "cluster_size={},compat={compat},refcount_bits={}{extended}{compression}",
            1u64 << self.cluster_bits,
            self.refcount_bits
        )
    }

    /// Makes the chain; returns the path of the image, and what it reads as.
    fn make(&self, dir: &qemu::Dir, rng: &mut Rng) -> (String, Vec<u8>) {
        let mut content = vec![0; self.size as usize];
        let mut below: Option<(String, &str)> = None;
        for level in 0..self.chain {
            // Each level is a little shorter or longer than the image.
            let size = (self.size / 2 + rng.below(self.size)) / 512 * 512;
            let path = dir.path(&format!("level{level}"));
            let data = random_bytes(rng, size.min(self.size) / 3);
            let at = rng.below(size.min(self.size) - data.len() as u64) / 512 * 512;
            if level == 0 {
                let mut raw = vec![0; size as usize];
                raw[at as usize..at as usize + data.len()].copy_from_slice(&data);
                std::fs::write(&path, raw).unwrap();
                below = Some((path, "raw"));
            } else {
                create(&path, "extended_l2=on,cluster_size=32k", &below, size);
                let patch = dir.path("patch");
                std::fs::write(&patch, &data).unwrap();
                qemu::io(&path, &[&format!("write -q -s {patch} {at} {}", data.len() / 512 * 512)]);
                below = Some((path, "qcow2"));
                // A shorter level hides what is below it past its end.
                let end = (size as usize).min(content.len());
                content[end..].fill(0);
            }
            let length = if level == 0 { data.len() } else { data.len() / 512 * 512 };
            let (from, to) = (at as usize, (at as usize + length).min(content.len()));
            content[from..to].copy_from_slice(&data[..to - from]);
        }
        let path = dir.path("image.qcow2");
        create(&path, &self.options(), &below, self.size);
        (path, content)
    }
}

fn create(path: &str, options: &str, below: &Option<(String, &str)>, size: u64) {
    let size = size.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
    if let Some((name, format)) = below {
        args.extend(["-b", &name[..], "-F", format]);
    }
    args.extend([path, &size[..]]);
    qemu::img(&args);
}

fn open(path: &str, tiny: bool) -> Image {
    Image::open(Path::new(path), &open_options(tiny)).unwrap()
}

fn open_options(tiny: bool) -> OpenOptions {
    let mut options = OpenOptions { backing: BackingPolicy::Any, ..OpenOptions::default() };
    if tiny {
        options.l2_cache_size = 4096;
        options.refcount_cache_size = 4096;
    }
    options
}

/// A range: mostly small, sometimes over several clusters, aligned or not.
fn range(rng: &mut Rng, shape: &Shape, from: u64, to: u64) -> (u64, u64) {
    let cluster = 1u64 << shape.cluster_bits;
    let unit = [1, 512, cluster / 32, cluster][rng.below(4) as usize].max(1);
    let most = [512, 4096, cluster / 32, cluster, 3 * cluster][rng.below(5) as usize].max(unit).min(3 << 20);
    let offset = from + rng.below(to - from) / unit * unit;
    let length = (1 + rng.below(most)).next_multiple_of(unit);
    (offset, length.min(to - offset))
}

/// The image is valid, holds `content`, and QEMU sees the same.
fn check_end(path: &str, dir: &qemu::Dir, content: &[u8], label: &str) {
    let raw = dir.path("expected.raw");
    std::fs::write(&raw, content).unwrap();
    qemu::check(path, false);
    let compared = qemu::img(&["compare", "-f", "qcow2", "-F", "raw", path, &raw]);
    assert!(compared.contains("identical"), "{label}: {compared}");
    let image = DiskImage::new(std::fs::read(path).unwrap());
    let verdict = Judge::default().judge(&image);
    assert!(verdict.violations.is_empty() && verdict.leaks == 0, "{label}: {verdict:?}");
    assert!(!Layout::parse(&image).unwrap().dirty, "{label}: dirty bit after close");
}

/// The snapshots hold what they should, for QEMU and for us; `size` is that of the disk now.
fn check_snapshots(path: &str, dir: &qemu::Dir, snapshots: &[(String, Vec<u8>)], size: usize, label: &str) {
    let raw = dir.path("snapshot.raw");
    for (name, content) in snapshots {
        let which = format!("snapshot.name={name}");
        qemu::img(&["convert", "-f", "qcow2", "-O", "raw", "-l", &which, path, &raw]);
        // It shows what the snapshot has of the size that the disk has now.
        let (theirs, both) = (std::fs::read(&raw).unwrap(), content.len().min(size));
        assert!(theirs[..both] == content[..both], "{label}: snapshot {name}, by QEMU");
        let image = open(path, false);
        let snapshot = image.snapshot_open(name).unwrap();
        assert_eq!(snapshot.size(), content.len() as u64, "{label}: snapshot {name}");
        let mut seen = vec![0xaa; content.len()];
        snapshot.pread(&mut seen, 0).unwrap();
        assert!(seen == *content, "{label}: snapshot {name}");
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

#[test]
fn one_thread_against_a_flat_array() {
    let Some(dir) = qemu::dir("model-one") else { return };
    for (n, shape) in shapes().into_iter().enumerate() {
        let label = format!("shape {n}: {shape:?}");
        let mut rng = Rng::new(number("MODEL_SEED", 1) * 1000 + n as u64);
        let (path, mut content) = shape.make(&dir, &mut rng);
        let tiny = n % 2 == 0;
        let mut image = open(&path, tiny);
        assert_eq!(image.size(), shape.size, "{label}");
        for op in 0..number("MODEL_OPS", 200) {
            let (offset, length) = range(&mut rng, &shape, 0, shape.size);
            let slice = offset as usize..(offset + length) as usize;
            match rng.below(22) {
                20.. => {
                    let cluster = 1u64 << shape.cluster_bits;
                    let from = offset / cluster * cluster;
                    let to = (offset + length).next_multiple_of(cluster).min(shape.size);
                    let data = half_random_bytes(&mut rng, to - from);
                    let flags = WriteFlags { compressed: true, fua: rng.one_in(9) };
                    let done = image.write(&[IoSrc::from(&data[..])], GuestOffset(from), flags);
                    done.unwrap_or_else(|why| panic!("{label}, op {op}: compressed write of {from}..{to}: {why}"));
                    content[from as usize..to as usize].copy_from_slice(&data);
                }
                0 => image.flush().unwrap_or_else(|why| panic!("{label}, op {op}: {why}")),
                1 => {
                    image.close().unwrap_or_else(|why| panic!("{label}, op {op}: close: {why}"));
                    image = open(&path, tiny);
                }
                2 => {
                    let flags = ZeroFlags { may_unmap: rng.one_in(2), fua: rng.one_in(9), ..ZeroFlags::default() };
                    let done = image.write_zeroes(offset, length, flags);
                    done.unwrap_or_else(|why| panic!("{label}, op {op}: zeroes, {length} at {offset}: {why}"));
                    content[slice].fill(0);
                }
                3 if shape.version == 3 => {
                    let cluster = 1u64 << shape.cluster_bits;
                    let from = offset / cluster * cluster;
                    let to = (offset + length).next_multiple_of(cluster).min(shape.size);
                    let done = image.discard(from, to - from);
                    done.unwrap_or_else(|why| panic!("{label}, op {op}: discard of {from}..{to}: {why}"));
                    content[from as usize..to as usize].fill(0);
                }
                3..8 => {
                    let mut found = vec![0xaa; length as usize];
                    image.pread(&mut found, offset).unwrap_or_else(|why| panic!("{label}, op {op}: read: {why}"));
                    let wrong = found.iter().zip(&content[slice]).position(|(a, b)| a != b);
                    assert_eq!(wrong, None, "{label}, op {op}: read of {length} at {offset} differs");
                }
                _ => {
                    let data = random_bytes(&mut rng, length);
                    let done = image.pwrite(&data, offset);
                    done.unwrap_or_else(|why| panic!("{label}, op {op}: write of {length} at {offset}: {why}"));
                    content[slice].copy_from_slice(&data);
                }
            }
        }
        image.close().unwrap();
        check_end(&path, &dir, &content, &label);
        std::fs::remove_file(&path).unwrap();
    }
}

/// Shapes for the tests with threads: small clusters (many tables), and subclusters.
fn threaded_shapes() -> Vec<Shape> {
    let shape = |cluster_bits, extended, chain| Shape {
        cluster_bits,
        extended,
        refcount_bits: if extended { 64 } else { 16 },
        version: 3,
        chain,
        size: if cluster_bits < 14 { 1 << 20 } else { 4 << 20 },
    };
    vec![shape(9, false, 0), shape(12, false, 1), shape(14, true, 1), shape(16, true, 2), shape(16, false, 3)]
}

const THREADS: u64 = 4;

#[test]
fn threads_on_their_own_ranges_see_only_their_own_writes() {
    let Some(dir) = qemu::dir("model-disjoint") else { return };
    for (n, shape) in threaded_shapes().into_iter().enumerate() {
        let label = format!("shape {n}: {shape:?}");
        let mut rng = Rng::new(number("MODEL_SEED", 1) * 1000 + n as u64);
        let (path, mut content) = shape.make(&dir, &mut rng);
        let image = open(&path, n % 2 == 0);
        // Stripes smaller than a cluster: the threads meet in every cluster, and never on a byte.
        let stripe = if shape.extended { (1 << shape.cluster_bits) / 32 * 3 / 2 } else { 700 };
        let shared = Mutex::new(&mut content);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (image, shared, shape, label) = (&image, &shared, &shape, &label);
                let mut rng = Rng::new(rng.next_u64());
                scope.spawn(move || {
                    let mut mine = shared.lock().unwrap().to_vec();
                    let stripes = shape.size / stripe / THREADS;
                    for op in 0..number("MODEL_OPS", 200) * 3 {
                        let from = (rng.below(stripes.min(60)) * THREADS + thread) * stripe;
                        let offset = from + rng.below(stripe);
                        let length = 1 + rng.below(from + stripe - offset);
                        let slice = offset as usize..(offset + length) as usize;
                        match rng.below(8) {
                            0 if rng.one_in(8) => image.flush().unwrap(),
                            0..4 => {
                                let mut found = vec![0; length as usize];
                                image.pread(&mut found, offset).unwrap();
                                assert!(
                                    found == mine[slice],
                                    "{label}, thread {thread}, op {op}: {length} at {offset}"
                                );
                            }
                            _ => {
                                let data = random_bytes(&mut rng, length);
                                image.pwrite(&data, offset).unwrap();
                                mine[slice].copy_from_slice(&data);
                            }
                        }
                    }
                    let mut all = shared.lock().unwrap();
                    for from in (0..shape.size / stripe).filter(|s| s % THREADS == thread).map(|s| s * stripe) {
                        let slice = from as usize..(from + stripe) as usize;
                        all[slice.clone()].copy_from_slice(&mine[slice]);
                    }
                });
            }
        });
        image.close().unwrap();
        check_end(&path, &dir, &content, &label);
        std::fs::remove_file(&path).unwrap();
    }
}

const ATOM: u64 = 64;

/// The atom that an operation of a thread writes: it names both.
fn atom(thread: u64, op: u64, at: u64) -> Vec<u8> {
    [thread + 1, op, at, !op, thread ^ at, op ^ at, 1, 2].map(u64::to_be_bytes).concat()
}

/// One of several threads that write and read the same area. Returns its last operation on each atom.
fn write_and_read(image: &Image, before: &[u8], area: u64, thread: u64, mut rng: Rng, label: &str) -> Vec<u64> {
    let mut last = vec![0u64; (area / ATOM) as usize];
    let cluster = image.info().cluster_size_bytes;
    for op in 1..number("MODEL_OPS", 200) * 3 {
        let first = rng.below(area / ATOM);
        let atoms = (1 + rng.below(60)).min(area / ATOM - first);
        if rng.one_in(3) {
            let mut found = vec![0; (atoms * ATOM) as usize];
            image.pread(&mut found, first * ATOM).unwrap();
            for (i, got) in (first..).zip(found.chunks(ATOM as usize)) {
                let own = last[i as usize];
                // The kernel may show half of an atom that is being overwritten; what stays is to be explained.
                let mut got = got.to_vec();
                let mut tries = 0;
                while !may_be_there(&got, before, i, thread, own) {
                    tries += 1;
                    assert!(tries < 100, "{label}, thread {thread}, op {op}: atom {i} (own op {own}) is {got:02x?}");
                    image.pread(&mut got, i * ATOM).unwrap();
                }
            }
            continue;
        }
        let per_cluster = cluster / ATOM;
        let (first, atoms, compressed) = match first / per_cluster * per_cluster {
            first if rng.one_in(4) && first + per_cluster <= area / ATOM => (first, per_cluster, true),
            _ => (first, atoms, false),
        };
        let data: Vec<u8> = (first..first + atoms).flat_map(|at| atom(thread, op, at)).collect();
        let flags = WriteFlags { fua: false, compressed };
        image.write(&[IoSrc::from(&data[..])], GuestOffset(first * ATOM), flags).unwrap();
        (first..first + atoms).for_each(|i| last[i as usize] = op);
        if rng.one_in(40) {
            image.flush().unwrap();
        }
    }
    last
}

/// Whether atom `i` may hold `got`, seen by a thread whose last write to it was `own` (0: none).
fn may_be_there(got: &[u8], before: &[u8], i: u64, thread: u64, own: u64) -> bool {
    if got == &before[(i * ATOM) as usize..][..ATOM as usize] {
        return own == 0;
    }
    let word = |w: usize| u64::from_be_bytes(got[w * 8..][..8].try_into().unwrap());
    got == atom(word(0).wrapping_sub(1), word(1), i) && (word(0) != thread + 1 || word(1) == own)
}

#[test]
fn threads_on_the_same_ranges_leave_the_last_write_of_one_of_them() {
    let Some(dir) = qemu::dir("model-overlapping") else { return };
    for (n, shape) in threaded_shapes().into_iter().enumerate() {
        let label = format!("shape {n}: {shape:?}");
        let mut rng = Rng::new(number("MODEL_SEED", 1) * 1000 + n as u64);
        let (path, before) = shape.make(&dir, &mut rng);
        let image = open(&path, n % 2 == 1);
        let area = (6u64 << shape.cluster_bits).max(48 << 10).min(shape.size);
        let last: Vec<Vec<u64>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let (image, before, label) = (&image, &before, &label);
                    let rng = Rng::new(rng.next_u64());
                    scope.spawn(move || write_and_read(image, before, area, thread, rng, label))
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        image.close().unwrap();
        let reopened = open(&path, false);
        let mut content = before.clone();
        reopened.pread(&mut content[..area as usize], 0).unwrap();
        reopened.close().unwrap();
        for i in 0..(area / ATOM) as usize {
            let got = &content[i * ATOM as usize..][..ATOM as usize];
            let candidates = (0..THREADS).filter(|t| last[*t as usize][i] != 0);
            let mut allowed: Vec<Vec<u8>> = candidates.map(|t| atom(t, last[t as usize][i], i as u64)).collect();
            if allowed.is_empty() {
                allowed.push(before[i * ATOM as usize..][..ATOM as usize].to_vec());
            }
            assert!(allowed.iter().any(|a| a == got), "{label}: atom {i} ends as {got:02x?}, allowed {allowed:02x?}");
        }
        check_end(&path, &dir, &content, &label);
        std::fs::remove_file(&path).unwrap();
    }
}
