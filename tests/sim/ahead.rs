//! Clusters that are counted ahead, a file that is made longer ahead, and what that saves: barriers and zeroes. And what
//! must not be saved, each a way in which a cluster that was never written stops being one.

use std::sync::Arc;

use qcow2::Result;
use qcow2::format::GuestOffset;
use qcow2::image::options::Discard;
use qcow2::image::{BackingFormat, CreateOptions, Image, OpenOptions, ResizeOptions, ZeroFlags, create_with};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::sim::{CrashBudget, DiskImage, Fault, Rng, SimDisk};
use qcow2::storage::{Blocking, Storage};
use qcow2::wait::block_on;

use crate::judge::Judge;

const MIB: u64 = 1 << 20;

fn created(size: u64, cluster_size_bytes: u64, backing: bool) -> Arc<SimDisk> {
    let disk = Arc::new(SimDisk::new(DiskImage::empty()));
    let mut options = CreateOptions { cluster_size_bytes, extended_l2: true, ..CreateOptions::default() };
    if backing {
        options.backing_file = Some("base".into());
        options.backing_fmt = Some(BackingFormat::Raw);
    }
    block_on(create_with(&Blocking, &*disk, size, &options)).unwrap();
    disk
}

fn open(disk: &Arc<SimDisk>, below: Option<Arc<dyn Storage>>) -> Image {
    let options = OpenOptions { backing_storages: below.into_iter().collect(), ..OpenOptions::default() };
    Image::open_storage(disk.clone(), &options).unwrap()
}

/// Flushes of the disk that one call needs.
fn flushes(disk: &SimDisk, call: impl FnOnce() -> Result<()>) -> u64 {
    let before = disk.flushes();
    call().unwrap();
    disk.flushes() - before
}

/// What a flush costs after each of some writes of 4 KiB, each to a cluster of its own or all to one.
fn costs(disk: &Arc<SimDisk>, image: &Image, step: u64) -> Vec<u64> {
    let mut costs = Vec::new();
    for n in 0..6 {
        image.pwrite(&[0x5a; 4096], 16 * MIB + n * step).unwrap();
        costs.push(flushes(disk, || image.flush()));
    }
    costs
}

#[test]
fn a_flush_after_allocating_writes_costs_one_fdatasync_once_counts_are_ahead() {
    for step in [128 << 10, 4096] {
        let disk = created(64 * MIB, 128 << 10, false);
        let image = open(&disk, None);
        assert_eq!(costs(&disk, &image, step), [2, 1, 1, 1, 1, 1], "writes {step} bytes apart");
        image.close().unwrap();
    }
}

#[test]
fn over_a_backing_file_data_is_durable_before_what_shows_it() {
    // Until then the guest sees the backing file, and zeroes would be neither old nor new (D8).
    let disk = created(64 * MIB, 128 << 10, true);
    let below: Arc<dyn Storage> = Arc::new(MemoryStorage::new(vec![0x11; 64 << 20]));
    let image = open(&disk, Some(below));
    assert_eq!(costs(&disk, &image, 128 << 10), [2; 6]);
    image.close().unwrap();
}

#[test]
fn close_gives_back_what_was_counted_ahead_and_a_crash_leaks_it() {
    let disk = created(64 * MIB, 64 << 10, false);
    let image = open(&disk, None);
    image.pwrite(&[1; 4096], 0).unwrap();
    image.flush().unwrap();
    let crashed = disk.durable();
    let verdict = Judge::default().judge(&crashed);
    assert!(verdict.violations.is_empty(), "{:?}", verdict.violations);
    assert!(verdict.leaks > 0 && crashed.size > MIB, "{} leaks, {} bytes", verdict.leaks, crashed.size);
    image.close().unwrap();
    let closed = disk.current();
    let verdict = Judge::default().judge(&closed);
    assert_eq!((verdict.violations.len(), verdict.leaks), (0, 0));
    // Header, refcount table and block, L1 and L2 table, and the data.
    assert_eq!(closed.size, 6 * (64 << 10));
}

#[test]
fn a_file_whose_discards_are_ignored_is_not_left_longer_than_what_was_used() {
    let disk = created(64 * MIB, 64 << 10, false);
    let options = OpenOptions { discard: Discard::Ignore, ..OpenOptions::default() };
    let image = Image::open_storage(disk.clone(), &options).unwrap();
    image.pwrite(&[1; 4096], 0).unwrap();
    image.close().unwrap();
    assert_eq!(disk.current().size, 6 * (64 << 10));
}

/// Every crash state of a disk reads, at each of these sectors, one of the given bytes throughout.
fn every_crash_reads(disk: &SimDisk, sectors: &[(u64, &[u8])]) -> u64 {
    disk.crash_states(&mut Rng::new(7), CrashBudget::default(), |state| {
        let verdict = Judge::default().judge(state);
        assert!(verdict.violations.is_empty(), "{:?}", verdict.violations);
        let image = open(&Arc::new(SimDisk::new(state.clone())), None);
        for (sector, possible) in sectors {
            let mut found = [0; 512];
            image.pread(&mut found, sector * 512).unwrap();
            assert!(possible.iter().any(|&byte| found == [byte; 512]), "sector {sector} reads {:x?}..", &found[..8]);
        }
    })
}

/// Bytes of the subcluster of 2 KiB at `at` once 512 bytes in its middle have been written.
fn around_a_write(image: &Image, at: u64) -> Vec<u8> {
    image.pwrite(&[0x99; 512], at + 512).unwrap();
    let mut found = vec![0; 2048];
    image.pread(&mut found, at).unwrap();
    found
}

fn written_alone() -> Vec<u8> {
    [[0; 512], [0x99; 512], [0; 512], [0; 512]].concat()
}

#[test]
fn a_new_cluster_shows_early_what_was_seen_before() {
    let disk = created(64 * MIB, 64 << 10, false);
    let image = open(&disk, None);
    image.pwrite(&[1; 2048], 0).unwrap();
    image.flush().unwrap();
    image.pwrite(&[2; 2048], MIB).unwrap(); // a cluster that was counted ahead
    image.pwrite(&[3; 2048], 2048).unwrap(); // a subcluster of one that is there
    disk.set_fault(Some(Fault { index: disk.calls() + 1, errno: libc::EIO, sticky: false }));
    assert!(image.flush().is_err(), "the entries are written, and the barrier fails");
    let sectors: [(u64, &[u8]); 3] = [(0, &[1]), (2048, &[0, 2]), (4, &[0, 3])];
    every_crash_reads(&disk, &sectors);
}

#[test]
fn what_is_dropped_in_a_cluster_does_not_come_back_around_a_later_write() {
    let disk = created(64 * MIB, 64 << 10, false);
    let image = open(&disk, None);
    image.pwrite(&[0x77; 8192], 0).unwrap();
    image.write_zeroes(2048, 2048, ZeroFlags::default()).unwrap();
    assert_eq!(around_a_write(&image, 2048), written_alone());
}

#[test]
fn what_a_failed_write_has_left_does_not_come_up_around_a_later_one() {
    let disk = created(64 * MIB, 64 << 10, false);
    let image = open(&disk, None);
    image.pwrite(&[0x77; 2048], 0).unwrap();
    disk.set_fault(Some(Fault { index: disk.calls(), errno: libc::EIO, sticky: false }));
    assert!(image.pwrite(&[0x66; 4096], 2048).is_err(), "half of it is in the file now");
    disk.set_fault(None);
    assert_eq!(around_a_write(&image, 2048), written_alone());
}

#[test]
fn what_a_smaller_disk_has_lost_is_not_in_a_larger_one() {
    let disk = created(64 * MIB, 64 << 10, false);
    let image = open(&disk, None);
    // A hole in the file: the L1 and L2 tables that shrinking writes, and moves down afterwards, go there. Behind the data
    // they would be freed clusters, and nothing before such a one counts as never written.
    image.pwrite(&[0x55; 128 << 10], MIB).unwrap();
    image.pwrite(&[0x77; 32 << 10], 0).unwrap();
    image.write_zeroes(MIB, 128 << 10, ZeroFlags { may_unmap: true, ..ZeroFlags::default() }).unwrap();
    image.flush().unwrap();
    image.flush().unwrap();
    image.resize(8192, ResizeOptions { allow_shrink: true, ..ResizeOptions::default() }, None).unwrap();
    image.resize(MIB, ResizeOptions::default(), None).unwrap();
    assert_eq!(around_a_write(&image, 16 << 10), written_alone());
}

#[test]
fn freed_clusters_are_not_taken_for_new_ones() {
    let disk = created(64 * MIB, 64 << 10, false);
    // Nothing is punched: what was in a cluster stays there.
    let options = OpenOptions { discard: Discard::Ignore, ..OpenOptions::default() };
    let image = Image::open_storage(disk.clone(), &options).unwrap();
    image.pwrite(&[0x77; 64 << 10], 0).unwrap();
    image.write_zeroes(0, 64 << 10, ZeroFlags { may_unmap: true, ..ZeroFlags::default() }).unwrap();
    image.flush().unwrap();
    image.flush().unwrap();
    assert_eq!(around_a_write(&image, MIB), written_alone());
}

/// Two sequential writers had their clusters in turns, and whoever read one of them back later had as many reads as
/// clusters. Whole clusters of both are written in turns, with a flush now and then; what a crash leaves is sound, and so
/// is what is left when the image is held alone in between and when it is closed.
#[test]
fn sequential_writers_do_not_get_their_clusters_in_turns() {
    const CLUSTER: u64 = 64 << 10;
    let disk = created(64 * MIB, CLUSTER, false);
    let image = open(&disk, None);
    let starts = [3 * CLUSTER, 32 * MIB];
    let write = |range: std::ops::Range<u64>| {
        for n in range {
            for (byte, start) in (1..).zip(starts) {
                image.pwrite(&vec![byte; CLUSTER as usize], start + n * CLUSTER).unwrap();
            }
            if n % 50 == 7 {
                image.flush().unwrap();
                let verdict = Judge::default().judge(&disk.durable());
                assert!(verdict.violations.is_empty(), "{:?}", verdict.violations);
            }
        }
    };
    write(0..180);
    for start in starts {
        let (mut at, end, mut pieces) = (start, start + 180 * CLUSTER, 0);
        while at < end {
            at += image.map(GuestOffset(at), end - at).unwrap().length;
            pieces += 1;
        }
        assert!(pieces <= 20, "{pieces} pieces of 180 clusters");
    }
    image.resize(65 * MIB, ResizeOptions::default(), None).unwrap(); // what is kept for the writers is given back
    write(180..200);
    image.close().unwrap();
    let closed = disk.current();
    let verdict = Judge::default().judge(&closed);
    assert_eq!((verdict.violations.len(), verdict.leaks), (0, 0));
    // Header, refcount table and block, L1 and L2 table, the data, and less than what two writers may keep.
    assert!(closed.size < (5 + 400 + 32) * CLUSTER, "{} clusters", closed.size / CLUSTER);
    let image = open(&disk, None);
    for (byte, start) in (1..).zip(starts) {
        let mut found = vec![0; 200 * CLUSTER as usize];
        image.pread(&mut found, start).unwrap();
        assert!(found.iter().all(|&b| b == byte));
    }
}
