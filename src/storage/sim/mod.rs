//! A simulated disk and a simulated driver, for tests: every crash, fault and interleaving comes from a seed.
//!
//! [`SimDisk`] is a disk of 512-byte sectors that keeps apart what is durable and what is not yet: a write is durable
//! only once a flush that STARTED after the write COMPLETED has succeeded; until then any subset of its sectors may
//! be on the disk after a crash ([`SimDisk::crash_states`]). [`SimIo`] drives a pipeline over such disks with futures
//! that are pending a seeded number of times, and [`Scheduler`] polls many of them in a seeded order on one thread.
//! The same seeds give the same run, bit for bit.

mod crash;
mod disk;
mod driver;
mod image;

pub use crash::{CrashBudget, crash_states};
pub use disk::{Fault, SECTOR_BYTES, SimDisk};
pub use driver::{Scheduler, SimIo, Stuck, Task};
pub use image::DiskImage;

/// A small seeded generator (SplitMix64).
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator; each seed has its own sequence.
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x5851_f42d_4c95_7f2d)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next_u64() % n
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Arc;

    use super::*;
    use crate::storage::{Io, IoSrc, Storage};

    fn write(disk: &SimDisk, sector: u64, sectors: usize, with: u8) {
        let data = vec![with; sectors * SECTOR_BYTES];
        disk.write(&[IoSrc::from(&data[..])], sector * SECTOR_BYTES as u64).unwrap();
    }

    /// The first byte of each of the first four sectors, in every crash state.
    fn states(disk: &SimDisk, seed: u64) -> HashSet<[u8; 4]> {
        let mut seen = HashSet::new();
        disk.crash_states(&mut Rng::new(seed), CrashBudget { singles: 99, random: 200 }, |image| {
            seen.insert([0, 1, 2, 3].map(|s| image.part((s * SECTOR_BYTES) as u64, 1)[0]));
        });
        seen
    }

    #[test]
    fn any_subset_of_sectors_may_survive_until_a_flush() {
        let disk = SimDisk::new(DiskImage::new(vec![0; 4 * SECTOR_BYTES]));
        write(&disk, 0, 2, 1);
        write(&disk, 1, 2, 2);
        let seen = states(&disk, 1);
        for (a, b, c) in [(0, 0, 0), (1, 1, 0), (0, 2, 2), (1, 2, 2), (1, 0, 0), (0, 1, 0), (0, 0, 2)] {
            assert!(seen.contains(&[a, b, c, 0]), "{a} {b} {c} of {seen:?}");
        }
        disk.flush().unwrap();
        assert_eq!(states(&disk, 1), HashSet::from([[1, 2, 2, 0]]));
    }

    #[test]
    fn two_disks_lose_power_together_and_keep_what_they_like() {
        let disks = [0, 0].map(|byte| SimDisk::new(DiskImage::new(vec![byte; SECTOR_BYTES])));
        let seen = || {
            let mut seen = HashSet::new();
            crash_states([&disks[0], &disks[1]], &mut Rng::new(1), CrashBudget::default(), |images| {
                seen.insert(images.map(|image| image.part(0, 1)[0]));
            });
            seen
        };
        write(&disks[0], 0, 1, 1);
        write(&disks[1], 0, 1, 2);
        assert_eq!(seen(), HashSet::from([[0, 0], [1, 0], [0, 2], [1, 2]]));
        disks[0].flush().unwrap();
        assert_eq!(seen(), HashSet::from([[1, 0], [1, 2]]));
    }

    #[test]
    fn a_flush_covers_only_what_completed_before_it_started() {
        let disk = SimDisk::new(DiskImage::new(vec![0; 4 * SECTOR_BYTES]));
        let data = [7; SECTOR_BYTES];
        let id = disk.begin_write(&[IoSrc::from(&data[..])], 0).unwrap();
        let token = disk.begin_flush();
        disk.complete(id);
        disk.end_flush(token).unwrap();
        assert_eq!(states(&disk, 1), HashSet::from([[0; 4], [7, 0, 0, 0]]));
        disk.flush().unwrap();
        assert_eq!(states(&disk, 1), HashSet::from([[7, 0, 0, 0]]));
    }

    #[test]
    fn what_a_failed_flush_dropped_no_later_flush_brings_back() {
        let disk = SimDisk::new(DiskImage::new(vec![0; 4 * SECTOR_BYTES]));
        write(&disk, 0, 1, 1);
        disk.set_fault(Some(Fault { index: disk.calls(), errno: libc::EIO, sticky: false }));
        assert!(disk.flush().is_err());
        write(&disk, 1, 1, 2);
        disk.flush().unwrap();
        assert_eq!(states(&disk, 1), HashSet::from([[0, 2, 0, 0], [1, 2, 0, 0]]));
    }

    #[test]
    fn a_truncate_is_an_effect_like_any_other() {
        let disk = SimDisk::new(DiskImage::new(vec![5; 4 * SECTOR_BYTES]));
        disk.truncate(SECTOR_BYTES as u64).unwrap();
        let mut sizes = HashSet::new();
        disk.crash_states(&mut Rng::new(1), CrashBudget::default(), |image| {
            sizes.insert((image.size, image.to_file().len()));
        });
        assert_eq!(sizes, HashSet::from([(512, 512), (2048, 2048)]));
    }

    #[test]
    fn the_same_seed_gives_the_same_run_and_another_seed_another() {
        let run = |seed| {
            let disk = Arc::new(SimDisk::default());
            let io = SimIo::new(seed, 3, vec![disk.clone()]);
            let order = std::cell::RefCell::new(Vec::new());
            let tasks = (0..4u64).map(|n| {
                let (io, disk, order) = (&io, &disk, &order);
                Box::pin(async move {
                    let data = vec![n as u8; SECTOR_BYTES];
                    io.write(&**disk, &[IoSrc::from(&data[..])], 0).await.unwrap();
                    order.borrow_mut().push(n);
                }) as Task<'_, ()>
            });
            Scheduler::new(seed).run(tasks.collect(), || {}).unwrap();
            order.into_inner()
        };
        assert_eq!(run(5), run(5));
        assert!((0..20).map(run).collect::<HashSet<_>>().len() > 5);
    }

    #[test]
    fn a_lost_wake_up_is_noticed() {
        let forever = Box::pin(std::future::pending::<()>()) as Task<'_, ()>;
        let done = Box::pin(async {}) as Task<'_, ()>;
        assert_eq!(Scheduler::new(1).run(vec![done, forever], || {}), Err(Stuck { tasks: vec![1] }));
    }
}
