//! What is known to go wrong elsewhere, each by its name: H2 and H3 (power cuts), R1 to R3 and the punch that comes too
//! late (requests in flight at the same time). H1 and R4 are in `compressed.rs`, H4 in `tests/snapshots.rs`, L1 in
//! `tests/backing_policy.rs`. Each was seen to fail with its protection taken out.

use crate::qemu;
use std::cell::{Cell, RefCell};
use std::sync::Arc;

use crate::judge::{Judge, Layout};
use crate::stage::{Case, Start, cases, data_file_cases, disks, judge_files, open_disks, options, pattern};
use qcow2::format::GuestOffset;
use qcow2::image::options::Discard;
use qcow2::image::{Image, WriteFlags, ZeroFlags};
use qcow2::storage::sim::{CrashBudget, Rng, Scheduler, SimDisk, SimIo, Task, crash_states};
use qcow2::storage::{Blocking, IoDst, IoSrc, Storage};
use qcow2::wait::block_on;

const FUA: WriteFlags = WriteFlags { fua: true, compressed: false };
const SCHEDULES: u64 = 1500;

fn case(name: &str) -> Case {
    cases().into_iter().chain(data_file_cases()).find(|case| case.name == name).unwrap()
}

/// Writes whole clusters and flushes, in turns, and judges every crash state on the way.
fn judge_plain_writes(start: &Start, label: &str) {
    let states = Cell::new(0);
    for seed in 1..30 {
        let (disks, guest) = (disks(start), RefCell::new(start.guest()));
        let io = SimIo::new(seed, 1, disks.to_vec());
        let image = block_on(open_disks(&Blocking, &disks, start, 0)).unwrap();
        let script = async {
            for (op, &cluster) in (1..).zip(&start.hot) {
                let offset = cluster * start.cluster;
                let data = pattern(op, offset, start.cluster.min(start.guest_size - offset));
                let ticket = guest.borrow_mut().issue(offset, &data);
                let pieces = [IoSrc::from(&data[..])];
                image.write_with(&io, &pieces, GuestOffset(offset), WriteFlags::default()).await.unwrap();
                guest.borrow_mut().complete(&ticket);
                if (op + seed).is_multiple_of(3) {
                    let began = guest.borrow().now();
                    image.flush_with(&io).await.unwrap();
                    guest.borrow_mut().flushed(began);
                }
            }
            image.flush_with(&io).await.unwrap();
        };
        let (judge, mut seen) = (RefCell::new(Judge::default()), 0);
        let look = || {
            let changes = disks.iter().map(|disk| disk.changes()).sum();
            if std::mem::replace(&mut seen, changes) != changes {
                let both = disks.each_ref().map(|disk| &**disk);
                let count = crash_states(both, &mut Rng::new(seed), CrashBudget::default(), |files| {
                    let wrong = judge_files(&mut judge.borrow_mut(), files, &guest.borrow(), start, (0, 1));
                    assert!(wrong.is_empty(), "{label}, seed {seed}: {wrong:#?}");
                });
                states.set(states.get() + count);
            }
        };
        Scheduler::new(seed).run_one(script, look).unwrap();
        image.close().unwrap();
    }
    assert!(states.get() > 1000, "{label}: {} states", states.get());
}

/// H2 of the known holes: in QEMU, the entry that shows a cluster of an external data file can be durable before the
/// cluster is: two files, and the wrong one is flushed first. What the file held before shows up.
#[test]
fn h2_the_data_file_is_durable_before_the_entries_that_show_it() {
    let Some(dir) = qemu::dir("known-h2") else { return };
    for name in ["4 KiB, data file, backing", "16 KiB, extended, data file, backing", "512 B, data file"] {
        judge_plain_writes(&case(name).make(&dir), name);
    }
}

/// H3 of the known holes: in QEMU with lazy refcounts, data that needs no copy-on-write is not ordered before the entry
/// that shows it. A crash shows what was in the host cluster before: zeroes, instead of the backing file.
#[test]
fn h3_with_lazy_refcounts_data_is_durable_before_its_entry() {
    let Some(dir) = qemu::dir("known-h3") else { return };
    for (name, options) in
        [("4 KiB, backing", "lazy_refcounts=on"), ("16 KiB, extended, backing", "extended_l2=on,lazy_refcounts=on")]
    {
        judge_plain_writes(&Case { options, ..case(name) }.make(&dir), name);
    }
}

/// An image that gives freed clusters back to the file.
fn open_unmapping(disk: &Arc<SimDisk>, start: &Start) -> Image {
    let mut options = options(start, 0);
    options.discard = Discard::Unmap;
    block_on(Image::open_with(&Blocking, disk.clone() as Arc<dyn Storage>, &options)).unwrap()
}

async fn write(image: &Image, io: &SimIo, op: u64, offset: u64, length: u64, flags: WriteFlags) {
    let data = pattern(op, offset, length);
    image.write_with(io, &[IoSrc::from(&data[..])], GuestOffset(offset), flags).await.unwrap();
}

/// Runs two clients on a fresh image under many schedules. `first` writes what is there beforehand. Afterwards `expect`
/// says of each sector that it knows whether it may read so: while the image is open, and on the disk once it is closed.
fn race<'a>(
    (name, dir): (&str, &qemu::Dir),
    first: impl Fn(&Image, &Start),
    clients: impl for<'b> Fn(&'b Image, &'b SimIo, &'b Start) -> Vec<Task<'b, ()>>,
    expect: impl Fn(&Start, u64, &[u8; 512]) -> bool + 'a,
) {
    let start = case(name).make(dir);
    for seed in 1..SCHEDULES {
        let disk = Arc::new(SimDisk::new(start.image.clone()));
        let image = open_unmapping(&disk, &start);
        first(&image, &start);
        image.flush().unwrap();
        let io = SimIo::new(seed, 3, vec![disk.clone()]);
        Scheduler::new(seed).run(clients(&image, &io, &start), || {}).unwrap();
        let label =
            |sector, found| format!("{name}, seed {seed}: sector {sector} reads {}", crate::stage::content_of(found));
        let mut found = [0; 512];
        for &sector in &start.hot_sectors {
            image.pread(&mut found, sector * 512).unwrap();
            assert!(expect(&start, sector, &found), "{}", label(sector, &found));
        }
        image.close().unwrap();
        let end = disk.durable();
        let layout = Layout::parse(&end).unwrap();
        for &sector in &start.hot_sectors {
            if layout.read(0, sector, &mut found).unwrap().is_none() {
                found = start.backing_sector(sector);
            }
            assert!(expect(&start, sector, &found), "closed, {}", label(sector, &found));
        }
        let verdict = Judge::default().judge(&end);
        assert!(verdict.violations.is_empty() && verdict.leaks == 0, "{name}, seed {seed}: {verdict:?}");
    }
}

fn is_written(op: u64, sector: u64, found: &[u8; 512]) -> bool {
    pattern(op, sector * 512, 512) == found
}

/// R1 of the known holes: in QEMU, a write in place is in flight while its cluster is discarded and handed out again: it
/// lands in somebody else's data, for good.
#[test]
fn r1_a_write_in_place_never_lands_in_a_cluster_that_was_given_to_somebody_else() {
    let Some(dir) = qemu::dir("known-r1") else { return };
    let first = |image: &Image, start: &Start| image.pwrite(&pattern(1, 0, start.cluster), 0).unwrap();
    for name in ["4 KiB", "16 KiB, extended"] {
        race(
            (name, &dir),
            first,
            |image, io, start| {
                let cluster = start.cluster;
                let slow = write(image, io, 2, cluster / 2, 512, WriteFlags::default());
                let other = async move {
                    image.discard_with(io, GuestOffset(0), cluster).await.unwrap();
                    image.flush_with(io).await.unwrap();
                    write(image, io, 3, cluster, 2 * cluster, FUA).await;
                };
                vec![Box::pin(slow), Box::pin(other)]
            },
            |start, sector, found| match sector * 512 / start.cluster {
                0 if sector * 512 == start.cluster / 2 => is_written(2, sector, found) || *found == [0; 512],
                1 | 2 => is_written(3, sector, found),
                _ => *found == [0; 512],
            },
        );
    }
}

/// R2 of the known holes: in QEMU, a copy-on-write into subcluster 0 of a shared cluster is in flight while a write of
/// zeroes to subcluster 5 completes: the copy brings the old data of 5 back.
#[test]
fn r2_zeroes_that_complete_during_a_copy_on_write_stay_zeroes() {
    let Some(dir) = qemu::dir("known-r2") else { return };
    for name in ["16 KiB, extended", "16 KiB, extended, snapshot", "4 KiB"] {
        let first = |image: &Image, start: &Start| {
            image.pwrite(&pattern(1, 0, start.cluster), 0).unwrap();
            image.snapshot_create("r2", &Default::default()).unwrap();
        };
        let zeroes = |start: &Start| (start.cluster / 32 * 5 / 512 * 512, (start.cluster / 32).max(512));
        race(
            (name, &dir),
            first,
            |image, io, start| {
                let slow = write(image, io, 2, 0, 512, WriteFlags::default());
                let (at, length) = zeroes(start);
                let other = async move {
                    image.write_zeroes_with(io, GuestOffset(at), length, ZeroFlags::default()).await.unwrap();
                    let mut found = vec![1; length as usize];
                    image.read_with(io, &[IoDst::from(&mut found[..])], GuestOffset(at)).await.unwrap();
                    assert!(found.iter().all(|byte| *byte == 0), "what was zeroed reads otherwise");
                };
                vec![Box::pin(slow), Box::pin(other)]
            },
            |start, sector, found| {
                let (at, length) = zeroes(start);
                match sector * 512 {
                    0 => is_written(2, sector, found),
                    offset if (at..at + length).contains(&offset) => *found == [0; 512],
                    offset if offset < start.cluster => is_written(1, sector, found),
                    _ => true,
                }
            },
        );
    }
}

/// R3 of the known holes: in QEMU, a read is in flight while its cluster is discarded and handed out again: it returns
/// another address's data.
#[test]
fn r3_a_read_never_returns_what_was_written_elsewhere() {
    let Some(dir) = qemu::dir("known-r3") else { return };
    let first = |image: &Image, start: &Start| image.pwrite(&pattern(1, 0, start.cluster), 0).unwrap();
    for name in ["4 KiB", "16 KiB, extended"] {
        race(
            (name, &dir),
            first,
            |image, io, start| {
                let cluster = start.cluster;
                let reader = async move {
                    let mut found = vec![0; cluster as usize];
                    image.read_with(io, &[IoDst::from(&mut found[..])], GuestOffset(0)).await.unwrap();
                    for (sector, bytes) in (0..).zip(found.chunks_exact(512)) {
                        let bytes: &[u8; 512] = bytes.try_into().unwrap();
                        let is_right = is_written(1, sector, bytes) || *bytes == [0; 512];
                        assert!(is_right, "a read of sector {sector} saw {}", crate::stage::content_of(bytes));
                    }
                };
                let other = async move {
                    image.discard_with(io, GuestOffset(0), cluster).await.unwrap();
                    image.flush_with(io).await.unwrap();
                    write(image, io, 3, cluster, 2 * cluster, FUA).await;
                };
                vec![Box::pin(reader), Box::pin(other)]
            },
            |start, sector, found| match sector * 512 / start.cluster {
                1 | 2 => is_written(3, sector, found),
                _ => *found == [0; 512],
            },
        );
    }
}

/// A report of 2026 about another implementation: the hole was punched after the cluster had been handed out again, and
/// took the new data with it.
#[test]
fn a_hole_is_punched_before_its_cluster_is_handed_out_again() {
    let Some(dir) = qemu::dir("known-punch") else { return };
    let first = |image: &Image, start: &Start| image.pwrite(&pattern(1, 0, 2 * start.cluster), 0).unwrap();
    for name in ["4 KiB", "16 KiB, extended"] {
        race(
            (name, &dir),
            first,
            |image, io, start| {
                let cluster = start.cluster;
                let punches = async move {
                    image.discard_with(io, GuestOffset(0), 2 * cluster).await.unwrap();
                    image.flush_with(io).await.unwrap();
                };
                let writes = async move {
                    write(image, io, 2, 2 * cluster, cluster, WriteFlags::default()).await;
                    write(image, io, 2, 3 * cluster, cluster, WriteFlags::default()).await;
                    let far = start.hot[4] * cluster;
                    write(image, io, 2, far, 2 * cluster, WriteFlags::default()).await;
                };
                vec![Box::pin(punches), Box::pin(writes)]
            },
            |start, sector, found| match start.hot.iter().position(|hot| *hot == sector * 512 / start.cluster) {
                Some(2..=5) => is_written(2, sector, found),
                _ => *found == [0; 512],
            },
        );
    }
}
