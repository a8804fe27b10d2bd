//! Threads on one image over a storage of plain memory, which orders nothing by itself: no lock, and nothing atomic that
//! one thread could learn from another. What orders two transfers to the same place in the file is the engine alone, so
//! that the thread sanitizer (`make tsan`) sees whether anything does: a cluster that is handed out, punched or moved
//! under a transfer, a table that is loaded while it is written. Without it, the content is checked, and the image.

mod judge;
mod requests;

use std::cell::UnsafeCell;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use judge::Judge;
use qcow2::check::CheckOptions;
use qcow2::format::GuestOffset;
use qcow2::image::{BitmapOptions, CreateOptions, Image, OpenOptions, WriteFlags, ZeroFlags, create_with};
use qcow2::queue::{Backend, Queue, Request};
use qcow2::storage::sim::{DiskImage, Rng};
use qcow2::storage::{Blocking, IoDst, IoSrc, Storage};
use qcow2::wait::block_on;
use requests::{Buffer, push, reap_all};

/// Most bytes of an image.
const CAPACITY: usize = 64 << 20;
const THREADS: u64 = 4;
/// What belongs to one thread where they share clusters: less than a subcluster.
const UNIT: u64 = 512;

struct PlainMemory {
    bytes: Box<[UnsafeCell<u8>]>,
    size: AtomicU64, // relaxed throughout: a thread that sees another's size has learned nothing else
    reads: AtomicU64,
}

// SAFETY: not in itself: that two threads never use the same bytes at once, one of them to change them, is the promise of
// the engine that these tests hold it to.
unsafe impl Sync for PlainMemory {}

impl PlainMemory {
    fn new() -> Self {
        // SAFETY: zeroes are bytes.
        let bytes = unsafe { Box::new_zeroed_slice(CAPACITY).assume_init() };
        Self { bytes, size: AtomicU64::new(0), reads: AtomicU64::new(0) }
    }

    fn place(&self, offset: u64, length: u64) -> io::Result<*mut u8> {
        let inside = offset.checked_add(length).is_some_and(|end| end <= CAPACITY as u64);
        if !inside {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        Ok(UnsafeCell::raw_get(self.bytes[offset as usize..].as_ptr()))
    }

    /// Copies between the memory here, from `at` on, and the piece of a transfer. What lies in `atomic` goes byte by byte.
    fn copy(&self, at: u64, piece: *mut u8, length: u64, atomic: &Range<u64>, writes: bool) -> io::Result<()> {
        let here = self.place(at, length)?;
        let (start, end) = (atomic.start.clamp(at, at + length) - at, atomic.end.clamp(at, at + length) - at);
        // SAFETY: both are valid memory of that length; what is the piece's is nobody else's meanwhile.
        unsafe {
            for (from, n) in [(0, start), (end.max(start), length - end.max(start))] {
                let (here, piece) = (here.add(from as usize), piece.add(from as usize));
                let (from, to) = if writes { (piece, here) } else { (here, piece) };
                std::ptr::copy_nonoverlapping(from, to, n as usize);
            }
            for i in start as usize..end.max(start) as usize {
                let (here, piece) = (AtomicU8::from_ptr(here.add(i)), piece.add(i));
                if writes { here.store(*piece, Ordering::Relaxed) } else { *piece = here.load(Ordering::Relaxed) }
            }
        }
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: inside of the memory.
        unsafe { std::ptr::write_bytes(self.place(offset, length)?, 0, length as usize) };
        Ok(())
    }

    /// What a closed image is.
    fn image(&self) -> DiskImage {
        let mut bytes = vec![0; self.size.load(Ordering::Relaxed) as usize];
        self.read(&[IoDst::from(&mut bytes[..])], 0).unwrap();
        DiskImage::new(bytes)
    }
}

impl Storage for PlainMemory {
    // Entries know of compressed clusters how many sectors they end in, and not where in the last one. So that sector is read
    // as a whole, while the next extent may be written into it, and the codec looks at its own bytes only. Nothing else
    // that is written starts within a sector. Atomic bytes on both sides are no race, and whatever else meets them is one.
    fn read(&self, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        if self.reads.fetch_add(1, Ordering::Relaxed).is_multiple_of(16) {
            std::thread::sleep(Duration::from_micros(300)); // meanwhile others free clusters, and use them again
        }
        let (size, mut at) = (self.size.load(Ordering::Relaxed), offset);
        let wanted: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        let last_sector = (offset + wanted).saturating_sub(UNIT)..offset + wanted;
        for piece in pieces {
            let n = (piece.len() as u64).min(size.saturating_sub(at));
            self.copy(at, piece.base(), n, &last_sector, false)?;
            at += n;
        }
        Ok((at - offset) as usize)
    }

    fn write(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        let (shared, mut at) = (offset..offset.next_multiple_of(UNIT), offset);
        for piece in pieces {
            self.copy(at, piece.base(), piece.len() as u64, &shared, true)?;
            at += piece.len() as u64;
        }
        self.extend(at)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.size.load(Ordering::Relaxed))
    }

    fn truncate(&self, size: u64) -> io::Result<()> {
        let old = self.size.swap(size, Ordering::Relaxed);
        self.zero(size, old.saturating_sub(size))
    }

    fn extend(&self, size: u64) -> io::Result<()> {
        self.place(size, 0)?;
        self.size.fetch_max(size, Ordering::Relaxed);
        Ok(())
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length)
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

fn created(options: &CreateOptions, size: u64) -> (Arc<PlainMemory>, Arc<Image>) {
    let storage = Arc::new(PlainMemory::new());
    block_on(create_with(&Blocking, &*storage, size, options)).unwrap();
    // Caches that hold a part of the tables: slices and blocks are written, dropped and loaded again all the time.
    let small = OpenOptions { l2_cache_size: 16 << 10, refcount_cache_size: 8 << 10, ..OpenOptions::default() };
    let image = Arc::new(Image::open_storage(storage.clone(), &small).unwrap());
    (storage, image)
}

fn close(storage: &PlainMemory, image: &Image, what: &str) {
    image.close().unwrap();
    let verdict = Judge::default().judge(&storage.image());
    assert!(
        verdict.violations.is_empty() && verdict.leaks == 0,
        "{what}: {} leaks, {:?}",
        verdict.leaks,
        verdict.violations
    );
}

/// The disk: units of all threads in turn, and then clusters of all threads in turn.
struct Plan {
    cluster: u64,
    units: u64,    // of one thread
    clusters: u64, // of one thread
}

impl Plan {
    fn unit(&self, thread: u64, n: u64) -> u64 {
        (n * THREADS + thread) * UNIT
    }

    fn cluster(&self, thread: u64, n: u64) -> u64 {
        self.units * THREADS * UNIT + (n * THREADS + thread) * self.cluster
    }

    fn size(&self) -> u64 {
        self.cluster(0, self.clusters)
    }
}

/// A thread, and what its units and its clusters hold.
struct Owner<'a> {
    plan: &'a Plan,
    image: &'a Image,
    thread: u64,
    rng: Rng,
    units: Vec<u8>,
    clusters: Vec<u8>,
}

impl Owner<'_> {
    fn in_a_unit(&mut self) {
        let n = self.rng.below(self.plan.units);
        let (at, value) = (self.plan.unit(self.thread, n), self.rng.next_u64() as u8);
        self.units[n as usize] = match self.rng.below(8) {
            0..3 => self.image.pwrite(&[value; UNIT as usize], at).map(|()| value).unwrap(),
            3 => self.image.write_zeroes(at, UNIT, ZeroFlags::default()).map(|()| 0).unwrap(),
            kind => return self.expect(at, UNIT, self.units[n as usize], kind),
        };
    }

    /// A cluster comes and goes, and others are given what it was in. It is never written in place, so that whoever reads
    /// it meanwhile finds all of it as it was at one moment.
    fn in_a_cluster(&mut self) {
        let n = self.rng.below(self.plan.clusters);
        let (at, length) = (self.plan.cluster(self.thread, n), self.plan.cluster);
        let (value, is_empty) = (self.rng.next_u64() as u8 | 1, self.clusters[n as usize] == 0);
        let data = vec![value; length as usize];
        self.clusters[n as usize] = match self.rng.below(8) {
            0 => {
                let flags = WriteFlags { fua: false, compressed: true };
                self.image.write(&[IoSrc::from(&data[..])], GuestOffset(at), flags).map(|()| value).unwrap()
            }
            1..4 if is_empty => self.image.pwrite(&data, at).map(|()| value).unwrap(),
            1 => self.image.discard(at, length).map(|()| 0).unwrap(),
            2 => {
                let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
                self.image.write_zeroes(at, length, flags).map(|()| 0).unwrap()
            }
            3 => return self.expect(at, length, self.clusters[n as usize], 3),
            _ => {
                let mut found = data;
                self.image.pread(&mut found, self.plan.cluster(self.rng.below(THREADS), n)).unwrap();
                return assert!(found.iter().all(|&byte| byte == found[0]), "cluster {n}, of somebody");
            }
        };
    }

    fn expect(&self, at: u64, length: u64, value: u8, kind: u64) {
        let mut found = vec![!value; length as usize];
        self.image.pread(&mut found, at).unwrap();
        assert!(found.iter().all(|&byte| byte == value), "thread {}, 0x{at:x}, kind {kind}", self.thread);
    }
}

/// Batches through a queue: the units of a batch are written, read back into other memory, and compared.
fn through_a_queue(image: Arc<Image>, plan: &Plan, thread: u64, mut rng: Rng, batches: u64) {
    let mut queue = Queue::new(image, 16, Backend::Threads).unwrap();
    let mut buffers: Vec<[Buffer; 2]> = (0..8).map(|_| [(); 2].map(|()| Buffer::new(UNIT as usize))).collect();
    for _ in 0..batches {
        let first = rng.below(plan.units - 8);
        let at = |i: usize| GuestOffset(plan.unit(thread, first + i as u64));
        for (i, [from, to]) in buffers.iter_mut().enumerate() {
            from.bytes_mut().fill(rng.next_u64() as u8);
            to.bytes_mut().fill(!from.bytes()[0]);
            let data = vec![from.src(0, UNIT as usize)];
            push(&mut queue, Request::Write(data, at(i), WriteFlags::default()), 0);
        }
        assert!(reap_all(&mut queue).iter().all(|(_, result)| result.is_ok()));
        for (i, [_, to]) in buffers.iter_mut().enumerate() {
            push(&mut queue, Request::Read(vec![to.dst(0, UNIT as usize)], at(i)), 0);
        }
        if rng.one_in(4) {
            push(&mut queue, Request::Flush, 0);
        }
        assert!(reap_all(&mut queue).iter().all(|(_, result)| result.is_ok()));
        assert!(buffers.iter().all(|[from, to]| from.bytes() == to.bytes()), "thread {thread}, units from {first} on");
    }
}

/// What concerns the image as a whole, until the others are done: flushes, snapshots, bitmaps, checks.
fn operations(image: &Image, mut rng: Rng, stop: &AtomicBool) {
    let bitmap = BitmapOptions { granularity_bytes: 4096, disabled: false };
    image.bitmap_add("b", bitmap).unwrap();
    while !stop.load(Ordering::Relaxed) {
        match rng.below(12) {
            0 => {
                image.snapshot_create("s", &Default::default()).unwrap();
                image.flush().unwrap();
                image.snapshot_delete("s", None).unwrap();
            }
            1 => image.bitmap_clear("b").unwrap(),
            2 => {
                let found = image.check(&mut CheckOptions::default()).unwrap();
                assert_eq!((found.corruptions, found.check_errors), (0, 0));
            }
            _ => image.flush().unwrap(),
        }
        std::thread::sleep(Duration::from_micros(rng.below(2000)));
    }
    image.bitmap_remove("b").unwrap();
}

/// Each thread finds what it wrote, and nothing is left behind in the file.
#[test]
fn threads_share_tables_clusters_and_what_is_free() {
    for (cluster_size_bytes, extended_l2) in [(4096, false), (64 << 10, true)] {
        for queues in [0, 2] {
            let options = CreateOptions { cluster_size_bytes, extended_l2, ..CreateOptions::default() };
            let plan = Plan { cluster: cluster_size_bytes, units: 256, clusters: 24 };
            let (storage, image) = created(&options, plan.size());
            let (steps, stop) = (number("SHARED_STEPS", 1500), AtomicBool::new(false));
            std::thread::scope(|scope| {
                let (plan, stop) = (&plan, &stop);
                let threads: Vec<_> = (0..THREADS)
                    .map(|thread| {
                        let (image, rng) = (image.clone(), Rng::new(thread));
                        scope.spawn(move || {
                            if thread < queues {
                                return through_a_queue(image, plan, thread, rng, steps / 16);
                            }
                            let (units, clusters) = (vec![0; plan.units as usize], vec![0; plan.clusters as usize]);
                            let mut owner = Owner { plan, image: &image, thread, rng, units, clusters };
                            for step in 0..steps {
                                if step % 2 == 0 { owner.in_a_unit() } else { owner.in_a_cluster() }
                            }
                        })
                    })
                    .collect();
                let image = &image;
                scope.spawn(move || operations(image, Rng::new(99), stop));
                let ended: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
                stop.store(true, Ordering::Relaxed);
                ended.into_iter().for_each(|end| end.unwrap());
            });
            close(&storage, &image, &format!("{options:?}, {queues} queues"));
        }
    }
}

/// Two threads write side by side. (`tests/races` has them write to one place, with SHARED_APART=0: that is a race of the
/// caller's own, inside of the library, and has to be reported.)
#[test]
fn writes_side_by_side_do_not_meet() {
    let apart = number("SHARED_APART", UNIT);
    let (storage, image) = created(&CreateOptions::default(), 1 << 20);
    image.pwrite(&[9; 2 * UNIT as usize], 0).unwrap();
    let start = Barrier::new(2);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let (image, start) = (&image, &start);
            let data = [thread as u8 + 1; UNIT as usize];
            scope.spawn(move || {
                start.wait();
                (0..1000).for_each(|_| image.pwrite(&data, thread * apart).unwrap());
            });
        }
    });
    let mut found = [0; 2 * UNIT as usize];
    image.pread(&mut found, 0).unwrap();
    assert!(apart == 0 || found == [[1; UNIT as usize], [2; UNIT as usize]].concat()[..]);
    close(&storage, &image, "two threads");
}
