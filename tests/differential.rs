//! We and QEMU: the same random operations through both, on images made by either, then opened by the other. The
//! guest bytes are the same, and so are the L2 bitmaps and the kind of each descriptor. (Zeroes, discards and
//! compressed writes are done by QEMU on both images.)
//!
//! `DIFFERENTIAL_SEED` sets the seed.

mod judge;
mod qemu;

use std::path::Path;

use judge::Layout;
use qcow2::image::{CreateOptions, Image, OpenOptions};
use qcow2::storage::sim::{DiskImage, Rng};

/// cluster_size, extended_l2, refcount_bits, compat
const SHAPES: [(u64, bool, u32, &str); 9] = [
    (512, false, 16, "1.1"),
    (4096, false, 1, "1.1"),
    (65536, false, 16, "0.10"),
    (65536, false, 64, "1.1"),
    (2 << 20, false, 16, "1.1"),
    (16384, true, 16, "1.1"),
    (65536, true, 16, "1.1"),
    (65536, true, 2, "1.1"),
    (1 << 20, true, 32, "1.1"),
];

fn open(path: &str) -> Image {
    Image::open(Path::new(path), &OpenOptions::default()).unwrap()
}

fn create_ours(path: &str, shape: (u64, bool, u32, &str), size: u64) {
    let mut options = CreateOptions::default();
    for (key, value) in [
        ("cluster_size", shape.0.to_string()),
        ("extended_l2", if shape.1 { "on" } else { "off" }.to_string()),
        ("refcount_bits", shape.2.to_string()),
        ("compat", shape.3.to_string()),
    ] {
        options.set(key, &value).unwrap();
    }
    qcow2::image::create(Path::new(path), size, &options, true).unwrap();
}

fn create_theirs(path: &str, shape: (u64, bool, u32, &str), size: u64) {
    let extended = if shape.1 { ",extended_l2=on" } else { "" };
    let options = format!("cluster_size={},refcount_bits={},compat={}{extended}", shape.0, shape.2, shape.3);
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, path, &size.to_string()]);
}

/// Kind of descriptor, and bitmap, of each guest cluster.
fn entries(path: &str) -> Vec<(&'static str, u64)> {
    let image = DiskImage::new(std::fs::read(path).unwrap());
    let layout = Layout::parse(&image).unwrap();
    (0..layout.trees[0].guest_size.div_ceil(layout.cluster()))
        .map(|cluster| {
            let entry = layout.entry(0, cluster);
            let kind = match entry.descriptor {
                d if d >> 62 & 1 == 1 => "compressed",
                d if d & 0x00ff_ffff_ffff_fe00 == 0 => {
                    if d & 1 == 1 {
                        "zero"
                    } else {
                        "none"
                    }
                }
                d if d & 1 == 1 => "zero, preallocated",
                d if d >> 63 == 1 => "own",
                _ => "shared",
            };
            (kind, entry.bitmap)
        })
        .collect()
}

struct Pair<'a> {
    ours: &'a str,
    theirs: &'a str,
    content: Vec<u8>,
    size: u64,
    shape: (u64, bool, u32, &'static str),
}

impl Pair<'_> {
    fn range(&self, rng: &mut Rng) -> (u64, u64) {
        let cluster = self.shape.0;
        let unit = [1, 512, cluster / 32, cluster][rng.below(4) as usize].max(1);
        let most = [512, 4096, cluster / 32, cluster, 3 * cluster][rng.below(5) as usize].max(unit).min(3 << 20);
        let offset = rng.below(self.size) / unit * unit;
        (offset, (1 + rng.below(most)).next_multiple_of(unit).min(self.size - offset))
    }

    /// Some writes: through the library on one image, through qemu-io on the other.
    fn writes(&mut self, rng: &mut Rng) -> String {
        let image = open(self.ours);
        let mut commands = Vec::new();
        for _ in 0..1 + rng.below(6) {
            let (offset, length) = self.range(rng);
            let byte = 1 + rng.below(255) as u8;
            image.pwrite(&vec![byte; length as usize], offset).unwrap();
            commands.push(format!("write -q -P {byte} {offset} {length}"));
            self.content[offset as usize..(offset + length) as usize].fill(byte);
        }
        image.close().unwrap();
        qemu::io(self.theirs, &commands.iter().map(|c| &c[..]).collect::<Vec<_>>());
        commands.join("; ")
    }

    /// An operation that only QEMU performs yet, on both images.
    fn by_qemu(&mut self, rng: &mut Rng) -> String {
        let (mut offset, mut length) = self.range(rng);
        let mut byte = 0;
        let command = match rng.below(4) {
            0 => format!("write -q -z {offset} {length}"),
            1 => format!("write -q -z -u {offset} {length}"),
            kind => {
                let cluster = self.shape.0;
                offset = offset / cluster * cluster;
                length = cluster.min(self.size - offset);
                byte = 1 + rng.below(255) as u8;
                // QEMU refuses to compress what is allocated already.
                if kind == 2 && entries(self.ours)[(offset / cluster) as usize].0 == "none" {
                    format!("write -q -c -P {byte} {offset} {length}")
                } else {
                    byte = 0;
                    format!("discard -q {offset} {length}")
                }
            }
        };
        qemu::io(self.ours, &[&command]);
        qemu::io(self.theirs, &[&command]);
        self.content[offset as usize..(offset + length) as usize].fill(byte);
        command
    }

    fn same(&self, dir: &qemu::Dir, log: &[String], label: &str) {
        qemu::check(self.ours, false);
        let (ours, theirs) = (entries(self.ours), entries(self.theirs));
        if let Some(cluster) = (0..ours.len()).find(|&c| ours[c] != theirs[c]) {
            panic!(
                "{label}: entry of guest cluster {cluster}: ours {:x?}, QEMU's {:x?}, after\n{}",
                ours[cluster],
                theirs[cluster],
                log.join("\n")
            );
        }
        let raw = dir.path("expected.raw");
        std::fs::write(&raw, &self.content).unwrap();
        let compared = qemu::img(&["compare", "-f", "qcow2", "-F", "raw", self.ours, &raw]);
        assert!(compared.contains("identical"), "{label}: {compared}\n{}", log.join("\n"));
        // QEMU's image through us.
        let image = open(self.theirs);
        let mut found = vec![0xaa; self.size as usize];
        image.pread(&mut found, 0).unwrap();
        image.close().unwrap();
        let wrong = found.iter().zip(&self.content).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{label}: we read QEMU's image otherwise, after\n{}", log.join("\n"));
    }
}

#[test]
fn the_same_operations_leave_the_same_bytes_and_bitmaps() {
    let Some(dir) = qemu::dir("differential") else { return };
    let (ours, theirs) = (dir.path("ours.qcow2"), dir.path("theirs.qcow2"));
    let seed = std::env::var("DIFFERENTIAL_SEED").map_or(1, |s| s.parse::<u64>().unwrap());
    for (n, shape) in SHAPES.into_iter().enumerate() {
        for made_by_us in [false, true] {
            let mut rng = Rng::new(seed * 1000 + n as u64 * 2 + u64::from(made_by_us));
            let size = if shape.0 < 16384 { 300 * shape.0 } else { 9 * shape.0 } + 512 * rng.below(2);
            let create = if made_by_us { create_ours } else { create_theirs };
            create(&ours, shape, size);
            create(&theirs, shape, size);
            let mut pair = Pair { ours: &ours, theirs: &theirs, content: vec![0; size as usize], size, shape };
            let label = format!("{shape:?}, made by {}, seed {seed}", if made_by_us { "us" } else { "QEMU" });
            let mut log = Vec::new();
            for _ in 0..12 {
                // Writes of zeroes and discards through a version 2 image have no zero flag to use: policy.
                let line =
                    if rng.one_in(3) && shape.3 != "0.10" { pair.by_qemu(&mut rng) } else { pair.writes(&mut rng) };
                log.push(line);
            }
            pair.same(&dir, &log, &label);
        }
    }
}
