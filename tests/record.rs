//! The recorder: a log that a stranger can replay. The replay here knows the format of the kernel's dm-log-writes and
//! nothing of the library; what it rebuilds must be the image, byte for byte at the end, and at each flush an image that
//! reads what was flushed.

use std::sync::Arc;

use qcow2::image::{CreateOptions, Image, OpenOptions, ZeroFlags, create_with};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::record::Recorder;
use qcow2::storage::sim::Rng;
use qcow2::storage::{Blocking, Storage};
use qcow2::wait::block_on;

fn field(bytes: &[u8], index: usize) -> u64 {
    u64::from_le_bytes(bytes[index * 8..index * 8 + 8].try_into().unwrap())
}

/// Applies entries to `disk` one by one; calls `at_flush` at those that are flushes.
fn replay(log: &[u8], disk: &mut Vec<u8>, mut at_flush: impl FnMut(usize, &[u8])) -> u64 {
    assert_eq!((field(log, 0), field(log, 1), field(log, 3)), (0x6a736677736872, 1, 512));
    let (mut at, mut flushes) = (512, 0);
    for _ in 0..field(log, 2) {
        let (sector, sectors, flags) = (field(&log[at..], 0), field(&log[at..], 1), field(&log[at..], 2));
        at += 512;
        let (start, length) = (sector as usize * 512, sectors as usize * 512);
        match flags {
            1 => {
                assert_eq!(length, 0);
                at_flush(flushes, disk);
                flushes += 1;
            }
            0 | 4 => {
                disk.resize(disk.len().max(start + length), 0);
                if flags == 4 {
                    disk[start..start + length].fill(0);
                } else {
                    disk[start..start + length].copy_from_slice(&log[at..at + length]);
                    at += length;
                }
            }
            _ => panic!("flags {flags:#x}"),
        }
    }
    assert_eq!(at, log.len(), "entries that are not counted");
    flushes as u64
}

fn guest(bytes: Vec<u8>) -> Vec<u8> {
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let image = Image::open_storage(Arc::new(MemoryStorage::new(bytes)), &options).unwrap();
    let mut seen = vec![0; image.size() as usize];
    image.pread(&mut seen, 0).unwrap();
    seen
}

#[test]
fn a_recorded_run_can_be_replayed_to_any_flush() {
    const SIZE: usize = 2 << 20;
    for seed in 0..6u64 {
        let (disk, log) = (Arc::new(MemoryStorage::default()), Arc::new(MemoryStorage::new(vec![0xee; 5000])));
        let options = CreateOptions {
            cluster_size_bytes: if seed % 2 == 0 { 16 << 10 } else { 65536 },
            extended_l2: seed % 3 != 0,
            ..CreateOptions::default()
        };
        block_on(create_with(&Blocking, &*disk, SIZE as u64, &options)).unwrap();
        let before = disk.snapshot();
        let recorder = Recorder::new(disk.clone(), log.clone() as Arc<dyn Storage>).unwrap();
        let image = Image::open_storage(Arc::new(recorder), &OpenOptions::default()).unwrap();
        let (mut rng, mut model, mut flushed) = (Rng::new(seed), vec![0u8; SIZE], Vec::new());
        for round in 0..120u64 {
            let at = rng.below(SIZE as u64 - 1) as usize;
            let length = (1 + rng.below(40_000) as usize).min(SIZE - at);
            match rng.below(8) {
                0..5 => {
                    model[at..at + length].fill(round as u8 | 1);
                    image.pwrite(&model[at..at + length], at as u64).unwrap();
                }
                5 => {
                    model[at..at + length].fill(0);
                    let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
                    image.write_zeroes(at as u64, length as u64, flags).unwrap();
                }
                _ => {
                    image.flush().unwrap();
                    flushed.push(model.clone());
                }
            }
        }
        image.close().unwrap();
        drop(image);
        let mut rebuilt = before;
        // A flush of the image is one or more of the file: the states of the guest are among those, in their order.
        let mut wanted = flushed.iter().peekable();
        replay(&log.snapshot(), &mut rebuilt, |_, bytes| {
            let seen = guest(bytes.to_vec());
            while wanted.next_if(|state| **state == seen).is_some() {}
        });
        assert!(wanted.next().is_none(), "seed {seed}: {} states are missing", wanted.count() + 1);
        let mut end = disk.snapshot();
        end.resize(end.len().max(rebuilt.len()), 0);
        rebuilt.resize(end.len(), 0);
        assert!(rebuilt == end, "the replay is not the file");
        assert!(guest(rebuilt) == model);
    }
}

/// Every state that the guest has flushed is on the replayed disk when the flush returns, and stays until the next.
#[test]
fn each_flush_of_the_guest_is_found_in_the_replay() {
    let (disk, log) = (Arc::new(MemoryStorage::default()), Arc::new(MemoryStorage::default()));
    block_on(create_with(&Blocking, &*disk, 1 << 20, &CreateOptions::default())).unwrap();
    let before = disk.snapshot();
    let image = {
        let recorder = Recorder::new(disk.clone(), log.clone() as Arc<dyn Storage>).unwrap();
        Image::open_storage(Arc::new(recorder), &OpenOptions::default()).unwrap()
    };
    for value in 1..=5u8 {
        image.pwrite(&[value; 100], u64::from(value) * 70_000).unwrap();
        image.flush().unwrap();
    }
    image.close().unwrap();
    drop(image);
    let mut seen = Vec::new();
    replay(&log.snapshot(), &mut before.clone(), |_, bytes| {
        let guest = guest(bytes.to_vec());
        seen.push((1..=5).filter(|&value| guest[value * 70_000] == value as u8).count());
    });
    assert!(seen.is_sorted() && seen.first() == Some(&0) && seen.last() == Some(&5), "{seen:?}");
    for n in 1..=5 {
        assert!(seen.contains(&n), "the state after {n} flushes is missing: {seen:?}");
    }
}

#[test]
fn parts_of_sectors_and_truncations_are_replayed_too() {
    let (disk, log) =
        (Arc::new(MemoryStorage::new((0..3000u32).map(|i| i as u8 | 1).collect())), Arc::new(MemoryStorage::default()));
    let before = disk.snapshot();
    let recorder = Recorder::new(disk.clone(), log.clone() as Arc<dyn Storage>).unwrap();
    recorder.write(&[(&[7u8; 3][..]).into(), (&[8u8; 600][..]).into()], 1000).unwrap();
    recorder.truncate(1300).unwrap();
    recorder.write(&[(&[9u8; 1][..]).into()], 4000).unwrap();
    recorder.truncate(2500).unwrap();
    recorder.flush().unwrap();
    drop(recorder);
    let mut rebuilt = before;
    assert_eq!(replay(&log.snapshot(), &mut rebuilt, |_, _| ()), 1);
    let mut end = disk.snapshot();
    end.resize(rebuilt.len(), 0);
    assert!(rebuilt == end);
}
