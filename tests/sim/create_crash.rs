//! A power cut while an image is made, at every point and in every way the disk may keep what was not yet flushed:
//! what is found afterwards is the old image, the new one, or nothing that opens.

use std::io;
use std::sync::Mutex;

use qcow2::image::{CreateOptions, create_with, load_header};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::sim::{CrashBudget, DiskImage, Rng, SimDisk};
use qcow2::storage::{Blocking, IoDst, IoSrc, Storage};
use qcow2::wait::block_on;

/// A disk whose crash states are all judged after each call.
struct Watched {
    disk: SimDisk,
    old: Vec<u8>,
    new: Vec<u8>,
    seen: Mutex<Seen>,
}

#[derive(Default, Debug)]
struct Seen {
    states: u64,
    old: u64,
    new: u64,
    nothing: u64,
}

impl Watched {
    fn look(&self) {
        let mut seen = self.seen.lock().unwrap();
        let mut rng = Rng::new(seen.states);
        self.disk.crash_states(&mut rng, CrashBudget::default(), |image| {
            let bytes = image.to_file();
            seen.states += 1;
            if bytes == self.new {
                seen.new += 1;
            } else if bytes == self.old {
                seen.old += 1;
            } else {
                seen.nothing += 1;
                // Other readers take more than we do (a name of NULs, say): not even the magic may be there.
                assert!(!bytes.starts_with(b"QFI\xfb"), "a half-made image has its first sector");
                let size = bytes.len() as u64;
                let opened = block_on(load_header(&Blocking, &MemoryStorage::new(bytes)));
                let opened = opened.and_then(|header| header.check_placement(size));
                assert!(opened.is_err(), "a half-made image opens");
            }
        });
    }
}

impl Storage for Watched {
    fn read(&self, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        self.disk.read(pieces, offset)
    }
    fn write(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        let result = self.disk.write(pieces, offset);
        self.look();
        result
    }
    fn flush(&self) -> io::Result<()> {
        let result = self.disk.flush();
        self.look();
        result
    }
    fn size(&self) -> io::Result<u64> {
        self.disk.size()
    }
    fn truncate(&self, size: u64) -> io::Result<()> {
        let result = self.disk.truncate(size);
        self.look();
        result
    }
}

fn made(settings: &[(&str, &str)], size: u64) -> (CreateOptions, Vec<u8>) {
    let mut options = CreateOptions::default();
    for (key, value) in settings {
        options.set(key, value).unwrap();
    }
    let storage = MemoryStorage::default();
    block_on(create_with(&Blocking, &storage, size, &options)).unwrap();
    (options, storage.snapshot())
}

#[test]
fn a_power_cut_leaves_the_old_image_the_new_one_or_none() {
    let (_, old) = made(&[("cluster_size", "4k"), ("backing_file", "old"), ("backing_fmt", "raw")], 4 << 20);
    let long_name = "n".repeat(700);
    let cases: [(&[(&str, &str)], u64); 7] = [
        (&[("cluster_size", "4k"), ("backing_file", &long_name), ("backing_fmt", "qcow2")], 1 << 20),
        (&[("cluster_size", "16k"), ("extended_l2", "on"), ("refcount_bits", "1")], 64 << 20),
        (&[("cluster_size", "512"), ("refcount_bits", "64")], 4 << 20),
        (&[("cluster_size", "64k"), ("compat", "v2")], 1 << 20),
        (&[("cluster_size", "4k"), ("preallocation", "metadata")], 100_000),
        (&[("cluster_size", "512"), ("preallocation", "falloc")], 50_000),
        (&[("cluster_size", "16k"), ("extended_l2", "on"), ("preallocation", "full")], 100_000),
    ];
    for (settings, size) in cases {
        for before in [Vec::new(), old.clone()] {
            let (options, new) = made(settings, size);
            let disk = SimDisk::new(DiskImage::new(before.clone()));
            let watched = Watched { disk, old: before, new, seen: Mutex::default() };
            block_on(create_with(&Blocking, &watched, size, &options)).unwrap();
            assert_eq!(watched.disk.durable().to_file(), watched.new, "done, and not durable");
            let seen = watched.seen.into_inner().unwrap();
            println!("{size} bytes: {seen:?}");
            assert!(seen.old > 0 && seen.new > 0 && seen.nothing > 0, "{seen:?}");
        }
    }
}
