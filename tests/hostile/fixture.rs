//! The sound images: made by QEMU, with what they read as told by QEMU.

use std::fs;

use crate::qemu;

/// How to make an image.
#[derive(Clone, Copy)]
pub struct Recipe {
    pub name: &'static str,
    /// `-o` of qemu-img.
    pub options: &'static str,
    pub cluster: u64,
    /// Guest clusters; the disk ends 512 bytes after the last of them.
    pub clusters: u64,
    pub snapshot: bool,
    pub zero: bool,
    /// Format of the backing file.
    pub backing: Option<&'static str>,
}

impl Default for Recipe {
    fn default() -> Self {
        Self { name: "", options: "", cluster: 4096, clusters: 14, snapshot: false, zero: true, backing: None }
    }
}

/// A sound image.
pub struct Fixture {
    pub path: String,
    pub bytes: Vec<u8>,
    /// What the guest reads.
    pub expected: Vec<u8>,
    pub cluster: u64,
    /// The bytes of a raw backing file.
    pub raw_backing: Option<Vec<u8>>,
}

/// Bytes that compress well, but not to nothing.
fn text(length: u64, salt: u64) -> Vec<u8> {
    (0..length)
        .map(|i| (i * i / 97 + i / 512 * salt + salt) as u8 & 0x1f | 0x40)
        .map(|b| if b & 5 == 5 { b } else { 0x40 })
        .collect()
}

impl Fixture {
    /// Guest clusters: 0 and 1 data, 2 and 3 compressed, 4 zero, 5 unallocated, 6 half written, 7 data, 8 written
    /// after the snapshot, and data at the end.
    pub fn make(dir: &qemu::Dir, recipe: &Recipe) -> Self {
        let unit = recipe.cluster;
        let size = recipe.clusters * unit + 512;
        let (path, source) = (dir.path("image"), dir.path("source"));
        let mut options = recipe.options.to_owned();
        let raw_backing = recipe.backing.map(|format| {
            let bytes = text(size - unit, 3);
            fs::write(dir.path("base"), &bytes).unwrap();
            options += &format!(",backing_file=base,backing_fmt={format}");
            bytes
        });
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, &path, &size.to_string()]);
        fs::write(&source, small_text(unit)).unwrap();
        let mut commands = vec![
            format!("write -P 1 0 {}", 2 * unit),
            format!("write -c -s {source} {} {unit}", 2 * unit),
            format!("write -c -s {source} {} {unit}", 3 * unit),
            format!("write -P 7 {} {}", 6 * unit, unit / 2),
            format!("write -P 8 {} {unit}", 7 * unit),
            format!("write -P 9 {} {unit}", (recipe.clusters - 2) * unit),
            format!("write -P 10 {} 512", recipe.clusters * unit),
        ];
        if recipe.zero {
            commands.push(format!("write -z {} {unit}", 4 * unit));
            commands.push(format!("write -z {} {}", 6 * unit + unit / 4, unit / 8));
        }
        let run = |commands: &[String]| {
            qemu::io(&path, &commands.iter().map(String::as_str).collect::<Vec<_>>());
        };
        run(&commands);
        if recipe.snapshot {
            qemu::img(&["snapshot", "-c", "one", &path]);
            run(&[format!("write -P 11 {unit} {unit}"), format!("write -P 12 {} {unit}", 8 * unit)]);
        }
        qemu::check(&path, false);
        Self::read(dir, path, unit, raw_backing)
    }

    /// An empty image over `base`, with one cluster of its own.
    pub fn overlay_of(dir: &qemu::Dir, base: &Self) -> Self {
        let path = dir.path("overlay");
        let options = format!("cluster_size=16k,extended_l2=on,backing_file={},backing_fmt=qcow2", base.path);
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, &path]);
        qemu::io(&path, &["write -P 20 1024 1k"]);
        Self::read(dir, path, 1 << 14, None)
    }

    fn read(dir: &qemu::Dir, path: String, cluster: u64, raw_backing: Option<Vec<u8>>) -> Self {
        let raw = dir.path("expected");
        qemu::img(&["convert", "-f", "qcow2", "-O", "raw", &path, &raw]);
        Self { bytes: fs::read(&path).unwrap(), expected: fs::read(raw).unwrap(), path, cluster, raw_backing }
    }
}

/// One cluster that compresses to some dozen bytes: every bit of them is flipped.
fn small_text(unit: u64) -> Vec<u8> {
    let mut bytes = vec![0x55; unit as usize];
    for (i, byte) in text(60, 5).into_iter().enumerate() {
        bytes[i * 7] = byte;
    }
    bytes
}
