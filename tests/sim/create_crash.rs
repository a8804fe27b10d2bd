//! A power cut while an image is made, at every point and in every way the disk may keep what was not yet flushed:
//! what is found afterwards is the old image, the new one, or nothing that opens.

use std::sync::Mutex;

use crate::campaign::{Job, Tally};
use crate::pass_on::pass_on;

use qcow2::Error;
use qcow2::image::{CreateOptions, create_with, create_with_data_file, load_header};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::sim::{CrashBudget, DiskImage, Fault, Rng, SimDisk};
use qcow2::storage::{Blocking, Storage};
use qcow2::wait::block_on;

/// A disk whose crash states are all judged after each call.
struct Watched {
    disk: SimDisk,
    old: Vec<u8>,
    new: Vec<u8>,
    seen: Mutex<Seen>,
    seed: u64,
}

#[derive(Default, Debug)]
struct Seen {
    states: u64,
    old: u64,
    new: u64,
    nothing: u64,
    wrong: Vec<String>,
}

impl Watched {
    fn look(&self) {
        let mut seen = self.seen.lock().unwrap();
        let mut rng = Rng::new(seen.states ^ self.seed << 32);
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
                if bytes.starts_with(b"QFI\xfb") {
                    return seen.wrong.push("a half-made image has its first sector".into());
                }
                let size = bytes.len() as u64;
                let opened = block_on(load_header(&Blocking, &MemoryStorage::new(bytes)));
                let opened = opened.and_then(|header| header.check_placement(size));
                if opened.is_ok() {
                    seen.wrong.push("a half-made image opens".into());
                }
            }
        });
    }
}

impl Storage for Watched {
    pass_on!(disk: read size);
    pass_on!(disk: write flush truncate, then look);
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

/// One image being made over what was there before.
fn run(settings: &[(&str, &str)], size: u64, before: Vec<u8>, seed: u64, tally: &mut Tally) {
    let (options, new) = made(settings, size);
    let disk = SimDisk::new(DiskImage::new(&before));
    let watched = Watched { disk, old: before, new, seen: Mutex::default(), seed };
    block_on(create_with(&Blocking, &watched, size, &options)).unwrap();
    assert_eq!(watched.disk.durable().to_file(), watched.new, "done, and not durable");
    let seen = watched.seen.into_inner().unwrap();
    assert!(seen.old > 0 && seen.new > 0 && seen.nothing > 0, "{seen:?}");
    tally.scripts += 1;
    tally.states += seen.states;
    tally.add(seen.wrong, || format!("seed {seed}, {settings:?}"));
}

/// The row of the campaign.
pub fn jobs() -> Vec<Job> {
    let run_all = |share: &crate::campaign::Share<'_>| {
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
        let (mut tally, mut seed) = (Tally::default(), share.seed);
        // All of them at least once.
        while tally.scripts < 14 || share.goes_on(&tally) {
            let (settings, size) = cases[(tally.scripts / 2 % 7) as usize];
            let before = if tally.scripts.is_multiple_of(2) { Vec::new() } else { old.clone() };
            run(settings, size, before, seed, &mut tally);
            seed += 1;
        }
        tally
    };
    vec![Job { kind: "create", name: "the old image, the new one or none".into(), weight: 5, run: Box::new(run_all) }]
}

/// One creation on these disks: the image's, and that of its data file, if it has one.
fn create(disks: &[SimDisk; 2], size: u64, options: &CreateOptions, is_external: bool) -> qcow2::Result<()> {
    let data = is_external.then_some(&disks[1] as &dyn Storage);
    block_on(create_with_data_file(&Blocking, &disks[0], data, size, options, None))
}

/// Each call of a creation fails in turn: the error says which, nothing that opens is left but the old image or the new
/// one, and once the fault is gone the same storages take the image.
#[test]
fn a_creation_that_fails_says_so_and_can_be_done_again() {
    let (_, old) = made(&[("cluster_size", "4k")], 1 << 20);
    let (mut runs, mut kinds) = (0, std::collections::BTreeSet::new());
    for mode in ["off", "metadata", "falloc", "full"] {
        for (cluster, is_external, raw) in [("4k", false, "off"), ("64k", true, "off"), ("512", true, "on")] {
            let mut options = CreateOptions::default();
            let settings = [("cluster_size", cluster), ("preallocation", mode), ("data_file_raw", raw)];
            settings.iter().for_each(|(key, value)| options.set(key, value).unwrap());
            let size = 100 << 10;
            let disks = || [old.clone(), vec![0xee; 300 << 10]].map(|bytes| SimDisk::new(DiskImage::new(bytes)));
            let whole = disks();
            create(&whole, size, &options, is_external).unwrap();
            let new = whole.each_ref().map(|disk| disk.durable().to_file());
            let calls = [0, 1].map(|disk| (0..whole[disk].calls()).map(move |index| (disk, index)));
            for (disk, index) in calls.into_iter().flatten() {
                for (errno, sticky) in [(libc::EIO, false), (libc::ENOSPC, true)] {
                    let label = format!("{mode}, {cluster}, call {index} of disk {disk}, {errno}");
                    let disks = disks();
                    disks[disk].set_fault(Some(Fault { index, errno, sticky }));
                    let error = create(&disks, size, &options, is_external).unwrap_err();
                    let named = matches!(&error, Error::Io { errno: told, .. } if *told == errno);
                    assert!(named, "{label}: {error}");
                    kinds.insert(disks[disk].fault_hit().unwrap().0);
                    disks[0].crash_states(&mut Rng::new(index), CrashBudget { singles: 4, random: 4 }, |image| {
                        let bytes = image.to_file();
                        let is_whole = bytes == old || bytes == new[0];
                        assert!(is_whole || !bytes.starts_with(b"QFI\xfb"), "{label}: half an image");
                    });
                    disks[disk].set_fault(None);
                    create(&disks, size, &options, is_external).unwrap_or_else(|e| panic!("{label}: again: {e}"));
                    let again = disks.each_ref().map(|disk| disk.durable().to_file());
                    assert!(again == new, "{label}: made again, and different");
                    runs += 1;
                }
            }
        }
    }
    assert!(runs > 100 && ["flush", "truncate", "write"].iter().all(|kind| kinds.contains(kind)), "{runs}, {kinds:?}");
}
