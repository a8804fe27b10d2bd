//! Queues: the pipelines of the blocking calls, many at once, on io_uring and on threads, on files in memory, on a
//! disk, and on a storage without a descriptor. Whatever is in flight, the guest reads what a flat array would.

mod pass_on;
mod qemu;
mod requests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

use pass_on::pass_on;
use qcow2::Error;
use qcow2::format::GuestOffset;
use qcow2::image::check::CheckOptions;
use qcow2::image::{
    BitmapOptions, CreateOptions, Image, OpenOptions, ResizeOptions, SnapshotFacts, WriteFlags, ZeroFlags, create_with,
};
use qcow2::queue::{Backend, Cancelled, Queue, Request};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::sim::Rng;
use qcow2::storage::{Blocking, IoSrc, Storage};
use qcow2::wait::block_on;
use requests::{BACKENDS, Buffer, push, reap_all};

struct Place {
    path: Option<PathBuf>, // none: in memory, without a descriptor
    storage: Arc<MemoryStorage>,
}

impl Place {
    fn all(name: &str) -> Vec<Self> {
        let file = |folder: &Path| {
            let path = folder.join(format!("libqcow2-queue-{name}-{}.qcow2", std::process::id()));
            Self { path: Some(path), storage: Arc::default() }
        };
        let mut all = vec![file(&std::env::temp_dir()), Self { path: None, storage: Arc::default() }];
        let memory = Path::new("/dev/shm");
        all.extend(memory.is_dir().then(|| file(memory)));
        all
    }

    /// The closed image, as QEMU sees it.
    fn check(&self) {
        if let (Some(path), Some(_)) = (&self.path, qemu::dir("queue")) {
            qemu::check(path.to_str().unwrap(), false);
        }
    }

    fn image(&self, size: u64, options: &CreateOptions) -> Arc<Image> {
        Arc::new(match &self.path {
            Some(path) => {
                qcow2::image::create(path, size, options, true).unwrap();
                Image::open(path, &OpenOptions::default()).unwrap()
            }
            None => {
                block_on(create_with(&Blocking, &*self.storage, size, options)).unwrap();
                Image::open_storage(self.storage.clone(), &OpenOptions::default()).unwrap()
            }
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn each(name: &str, test: impl Fn(&Place, Backend)) {
    for place in Place::all(name) {
        for backend in BACKENDS {
            test(&place, backend);
        }
    }
}

/// Requests of a batch do not overlap: what they leave is known. Their clusters do, all the time.
#[test]
fn what_a_queue_does_is_what_an_array_would_hold() {
    const SIZE: u64 = 6 << 20;
    const UNIT: u64 = 3 * 1024; // neither a sector multiple of subclusters nor of clusters
    each("model", |place, backend| {
        for (seed, extended_l2) in [(1u64, true), (2, false)] {
            let options = CreateOptions { extended_l2, ..CreateOptions::default() };
            let image = place.image(SIZE, &options);
            let mut queue = Queue::new(image.clone(), 32, backend).unwrap();
            assert_eq!(queue.backend(), backend);
            let (mut rng, mut model) = (Rng::new(seed), vec![0u8; SIZE as usize]);
            let mut buffers: Vec<Buffer> = (0..32).map(|_| Buffer::new(40 * UNIT as usize)).collect();
            for round in 0..60u64 {
                batch(&mut queue, &mut rng, &mut model, &mut buffers, round);
            }
            let mut seen = vec![0; SIZE as usize];
            image.pread(&mut seen, 0).unwrap();
            assert!(seen == model, "blocking calls read something else");
            drop(queue);
            image.close().unwrap();
            place.check();
        }
    });

    fn batch(queue: &mut Queue, rng: &mut Rng, model: &mut [u8], buffers: &mut [Buffer], round: u64) {
        let mut reads = Vec::new();
        let mut at = rng.below(50);
        for (slot, buffer) in buffers.iter_mut().enumerate() {
            let units_max = if rng.below(4) == 0 { 40 } else { 3 };
            let units = 1 + rng.below(units_max);
            if (at + units) * UNIT > SIZE {
                break;
            }
            let (offset, length) = (at * UNIT, units * UNIT);
            let range = offset as usize..(offset + length) as usize;
            let fua = rng.below(20) == 0;
            let request = match rng.below(10) {
                0..4 => {
                    let value = (round * 32 + slot as u64) as u8 | 1;
                    buffer.bytes_mut().fill(value);
                    model[range].fill(value);
                    let half = length as usize / 2 + 7;
                    let pieces = vec![buffer.src(0, half), buffer.src(half, length as usize - half)];
                    Request::Write(pieces, GuestOffset(offset), WriteFlags { fua, ..WriteFlags::default() })
                }
                4..7 => {
                    reads.push((slot, range));
                    Request::Read(vec![buffer.dst(0, length as usize)], GuestOffset(offset))
                }
                7..9 => {
                    model[range].fill(0);
                    let may_unmap = rng.below(2) == 0;
                    Request::WriteZeroes(GuestOffset(offset), length, ZeroFlags { may_unmap, fua, no_fallback: false })
                }
                _ => Request::Flush,
            };
            push(queue, request, slot as u64);
            if rng.below(3) == 0 {
                queue.submit();
            }
            at += units + rng.below(8);
        }
        for (user_data, result) in reap_all(queue) {
            result.unwrap_or_else(|e| panic!("request {user_data}: {e}"));
        }
        for (slot, range) in reads {
            assert!(buffers[slot].bytes()[..range.len()] == model[range.clone()], "round {round}: read {range:?}");
        }
    }
}

/// The thread that waits is the one that the queue would need to go on.
#[test]
fn a_blocking_call_never_waits_for_a_queue_that_waits_for_its_owner() {
    each("help", |place, backend| {
        let options = CreateOptions { extended_l2: true, ..CreateOptions::default() };
        let image = place.image(4 << 20, &options);
        let mut queue = Queue::new(image.clone(), 8, backend).unwrap();
        let buffer = Buffer::new(4096);
        for round in 0..50u64 {
            let at = round * 65536;
            for i in 0..4 {
                push(
                    &mut queue,
                    Request::Write(vec![buffer.src(0, 4096)], GuestOffset(at + i * 8192), WriteFlags::default()),
                    i,
                );
            }
            push(&mut queue, Request::Flush, 4);
            queue.submit();
            // Another subcluster of the cluster that requests under way have claimed.
            image.pwrite(&[round as u8 + 1; 4096], at + 4 * 8192).unwrap();
            image.write_zeroes(at, 4096, ZeroFlags::default()).unwrap();
            image.flush().unwrap();
            let mut seen = [0; 4096];
            image.pread(&mut seen, at + 4 * 8192).unwrap();
            assert_eq!(seen, [round as u8 + 1; 4096]);
            assert_eq!(reap_all(&mut queue).len(), 5);
        }
        drop(queue);
        image.close().unwrap();
    });
}

/// Resizing an image and changing its bitmaps (and whatever else holds it alone), in the thread of a queue with requests under way, never ended: unlike
/// reads and writes these calls did not poll the queue while they waited for its requests. Found by fuzzing C calls.
#[test]
fn what_holds_an_image_alone_does_not_wait_for_a_queue_that_waits_for_its_owner() {
    each("help-alone", |place, backend| {
        let image = place.image(4 << 20, &CreateOptions::default());
        let elsewhere = Place { path: place.path.as_ref().map(|p| p.with_extension("other")), storage: Arc::default() };
        let other = elsewhere.image(5 << 20, &CreateOptions::default());
        other.bitmap_add("there", BitmapOptions::default()).unwrap();
        let (mut queue, mut others) =
            (Queue::new(image.clone(), 8, backend).unwrap(), Queue::new(other.clone(), 8, backend).unwrap());
        let buffer = Buffer::new(4096);
        let mut begin = |round: u64| {
            for queue in [&mut queue, &mut others] {
                reap_all(queue);
                for i in 0..4 {
                    let at = GuestOffset((round * 4 + i) * 65536);
                    push(queue, Request::Write(vec![buffer.src(0, 4096)], at, WriteFlags::default()), i);
                }
                queue.submit();
            }
        };
        begin(0);
        image.resize(5 << 20, ResizeOptions::default(), None).unwrap();
        begin(1);
        image.bitmap_add("here", BitmapOptions::default()).unwrap();
        begin(2);
        image.bitmap_enable("here", false).unwrap();
        begin(3);
        image.bitmap_enable("here", true).unwrap();
        begin(4);
        assert!(image.bitmap_list().unwrap()[0].enabled);
        begin(5);
        assert!(!image.bitmap_extents("here", 0, 5 << 20, 8).unwrap().is_empty());
        begin(6);
        image.bitmap_merge("here", Some(&other), "there").unwrap();
        begin(7);
        image.bitmap_clear("here").unwrap();
        begin(8);
        image.bitmap_remove("here").unwrap();
        begin(9);
        image.snapshot_create("before", &SnapshotFacts::default()).unwrap();
        begin(10);
        image.snapshot_apply("before").unwrap();
        begin(11);
        assert!(image.check(&mut CheckOptions::default()).unwrap().is_sound());
        begin(12);
        drop(image.snapshot_open("before").unwrap());
        begin(13);
        image.snapshot_delete("before", None).unwrap();
        drop((queue, others));
        image.close().unwrap();
        other.close().unwrap();
    });
}

#[test]
fn queues_and_threads_share_an_image() {
    each("share", |place, backend| {
        let image = place.image(64 << 20, &CreateOptions { extended_l2: true, ..CreateOptions::default() });
        std::thread::scope(|scope| {
            for owner in 0..2u64 {
                let image = image.clone();
                scope.spawn(move || {
                    let mut queue = Queue::new(image, 16, backend).unwrap();
                    let buffers: Vec<Buffer> =
                        (0..16).map(|i| Buffer::of(&[(owner * 16 + i) as u8 + 1; 2048])).collect();
                    for round in 0..40u64 {
                        for (i, buffer) in buffers.iter().enumerate() {
                            // Interleaved with the other owners' in every cluster.
                            let at = GuestOffset((round * 16 + i as u64) * 8192 + owner * 2048);
                            push(&mut queue, Request::Write(vec![buffer.src(0, 2048)], at, WriteFlags::default()), 0);
                        }
                        assert!(reap_all(&mut queue).iter().all(|(_, result)| result.is_ok()));
                    }
                });
            }
            for owner in 2..4u64 {
                let image = &image;
                scope.spawn(move || {
                    for i in 0..640u64 {
                        image.pwrite(&[owner as u8 + 100; 2048], i * 8192 + owner * 2048).unwrap();
                    }
                });
            }
        });
        let mut seen = vec![0; 640 * 8192];
        image.pread(&mut seen, 0).unwrap();
        for (at, sector) in seen.chunks(2048).enumerate() {
            let (i, owner) = (at as u64 / 4, at as u64 % 4);
            let value = if owner < 2 { (owner * 16 + i % 16) as u8 + 1 } else { owner as u8 + 100 };
            assert!(sector.iter().all(|&byte| byte == value), "at {at}");
        }
        image.close().unwrap();
    });
}

fn readable(fd: i32, timeout_ms: i32) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one struct.
    unsafe { libc::poll(&raw mut poll, 1, timeout_ms) == 1 }
}

/// An event loop: nothing but the descriptor tells it when to reap, and it never waits in vain.
#[test]
fn the_descriptor_is_readable_when_there_is_something_to_do() {
    each("fd", |place, backend| {
        let image = place.image(16 << 20, &CreateOptions { extended_l2: true, ..CreateOptions::default() });
        let mut queue = Queue::new(image.clone(), 8, backend).unwrap();
        let fd = queue.fd().unwrap();
        assert!(!readable(fd, 0), "nothing has happened");
        let buffer = Buffer::new(3000);
        for round in 0..100u64 {
            for i in 0..8 {
                let at = GuestOffset(round * 100_000 + i * 3000);
                push(&mut queue, Request::Write(vec![buffer.src(0, 3000)], at, WriteFlags::default()), i);
            }
            queue.submit();
            let mut ended = 0;
            while ended < 8 {
                assert!(readable(fd, 10_000), "round {round}: nobody was told of {ended} of 8");
                ended += queue.reap(3, 0, None, |c| c.result.unwrap()).unwrap();
            }
        }
        // What a queue's request waits for may end in another thread.
        push(&mut queue, Request::Flush, 0);
        queue.submit();
        while queue.reap(1, 0, None, |c| c.result.unwrap()).unwrap() == 0 {
            assert!(readable(fd, 10_000));
        }
        drop(queue);
        image.close().unwrap();
    });
}

#[test]
fn slots_are_bounded_and_what_was_not_submitted_can_be_cancelled() {
    each("cancel", |place, backend| {
        let image = place.image(1 << 20, &CreateOptions::default());
        let mut queue = Queue::new(image.clone(), 2, backend).unwrap();
        let buffer = Buffer::of(&[5; 512]);
        let write = |at| Request::Write(vec![buffer.src(0, 512)], GuestOffset(at), WriteFlags::default());
        push(&mut queue, write(0), 10);
        push(&mut queue, write(512), 11);
        assert!(queue.push(write(1024), 12).is_err(), "two slots");
        assert_eq!(queue.cancel(11), Cancelled::Yes);
        assert_eq!((queue.cancel(12), queue.cancel(11)), (Cancelled::Unknown, Cancelled::TooLate));
        let mut ended = reap_all(&mut queue);
        ended.sort_by_key(|(user_data, _)| *user_data);
        assert!(matches!(&ended[..], [(10, Ok(())), (11, Err(Error::Cancelled))]), "{ended:?}");
        let mut seen = [0; 1024];
        image.pread(&mut seen, 0).unwrap();
        assert_eq!((seen[511], seen[512]), (5, 0));
        // Nothing to wait for: no reap sleeps, whatever it asks for.
        let start = Instant::now();
        assert_eq!(queue.reap(9, 9, None, |_| ()).unwrap(), 0);
        assert_eq!(queue.reap(9, 9, Some(Duration::from_secs(60)), |_| ()).unwrap(), 0);
        assert!(start.elapsed() < Duration::from_secs(30));
        // A request that cannot be done says so, and the slot is free again.
        for _ in 0..5 {
            push(&mut queue, write(1 << 20), 1);
            assert!(matches!(&reap_all(&mut queue)[..], [(1, Err(Error::OutOfRange { .. }))]));
        }
        for depth in [0, 4097] {
            assert!(Queue::new(image.clone(), depth, backend).is_err());
        }
        drop(queue);
        image.close().unwrap();
    });
}

#[test]
fn a_queue_that_is_dropped_and_an_image_that_is_closed_let_requests_end_first() {
    each("drop", |place, backend| {
        let image = place.image(8 << 20, &CreateOptions { extended_l2: true, ..CreateOptions::default() });
        let buffer = Buffer::of(&[9; 4096]);
        let begin = |queue: &mut Queue, first: u64| {
            for i in first..first + 16 {
                push(
                    queue,
                    Request::Write(vec![buffer.src(0, 4096)], GuestOffset(i * 65536), WriteFlags::default()),
                    i,
                );
            }
            queue.submit();
            push(queue, Request::Write(vec![buffer.src(0, 4096)], GuestOffset(7 << 20), WriteFlags::default()), 99);
        };
        let mut queue = Queue::new(image.clone(), 17, backend).unwrap();
        begin(&mut queue, 0);
        drop(queue);
        let mut queue = Queue::new(image.clone(), 17, backend).unwrap();
        begin(&mut queue, 16);
        let mut seen = [0; 4096];
        for i in 0..16 {
            image.pread(&mut seen, i * 65536).unwrap();
            assert_eq!(seen, [9; 4096]);
        }
        image.pread(&mut seen, 7 << 20).unwrap();
        assert_eq!(seen, [0; 4096], "it was never submitted");
        image.close().unwrap();
        let ended = reap_all(&mut queue);
        assert_eq!(ended.iter().filter(|(_, result)| result.is_ok()).count(), 16, "{ended:?}");
        assert!(ended.iter().any(|(user_data, result)| *user_data == 99 && result.is_err()), "the image is closed");
        drop(queue);
        place.check();
    });
}

/// A storage that fails, and one that panics in the middle.
struct Failing {
    inner: MemoryStorage,
    left: AtomicI32,
    panics: AtomicBool,
}

impl Failing {
    fn step(&self) -> std::io::Result<()> {
        if self.left.fetch_sub(1, Ordering::SeqCst) > 0 {
            return Ok(());
        }
        assert!(!self.panics.load(Ordering::SeqCst), "of the test");
        Err(std::io::Error::from_raw_os_error(libc::ENOSPC))
    }
}

impl Storage for Failing {
    pass_on!(inner: read size truncate);
    fn write(&self, pieces: &[IoSrc<'_>], offset: u64) -> std::io::Result<()> {
        self.step()?;
        self.inner.write(pieces, offset)
    }
    fn flush(&self) -> std::io::Result<()> {
        self.step()
    }
}

#[test]
fn errors_of_the_storage_end_the_requests_that_they_hit() {
    for backend in BACKENDS {
        for panics in [false, true] {
            for steps in 0..30 {
                let storage =
                    Failing { inner: MemoryStorage::default(), left: AtomicI32::new(i32::MAX), panics: panics.into() };
                block_on(create_with(&Blocking, &storage, 4 << 20, &CreateOptions::default())).unwrap();
                let storage = Arc::new(storage);
                let image = Arc::new(Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap());
                let mut queue = Queue::new(image.clone(), 8, backend).unwrap();
                let buffer = Buffer::of(&[3; 4096]);
                storage.left.store(steps, Ordering::SeqCst);
                for i in 0..7u64 {
                    let at = GuestOffset(i * 65536);
                    push(&mut queue, Request::Write(vec![buffer.src(0, 4096)], at, WriteFlags::default()), i);
                }
                push(&mut queue, Request::Flush, 7);
                let ended = reap_all(&mut queue);
                assert_eq!(ended.len(), 8, "every request ends");
                storage.left.store(i32::MAX, Ordering::SeqCst);
                for (i, result) in ended.iter().filter(|(i, _)| *i < 7) {
                    let mut seen = [0; 4096];
                    image.pread(&mut seen, i * 65536).unwrap();
                    assert!(seen == [3; 4096] || (result.is_err() && seen == [0; 4096]), "{i}: {result:?}");
                }
                drop(queue);
                drop(image);
            }
        }
    }
}

/// Text, another one in each cluster.
fn text(cluster: u64, version: u64) -> Vec<u8> {
    (0..65536u64)
        .map(|i| b"of a compressed cluster "[i as usize % 24] ^ ((i / 700 + cluster + version) % 15) as u8)
        .collect()
}

/// Compressed writes and reads of all sizes, many at once, in several queues and blocking calls; owners that wait in
/// `reap`, with a time limit and without, and owners that poll the descriptor.
#[test]
fn compressed_clusters_go_through_queues() {
    each("compressed", |place, backend| {
        let image = place.image(64 << 20, &CreateOptions::default());
        std::thread::scope(|scope| {
            for owner in 0..3u64 {
                let image = image.clone();
                scope.spawn(move || compress_and_read(&image, backend, owner));
            }
            for n in 0..60 {
                let at = (700 + n) * 65536;
                let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
                image.write(&[IoSrc::from(&text(n, 9)[..])], GuestOffset(at), flags).unwrap();
                let mut seen = [0; 5000];
                image.pread(&mut seen, at + 60_000).unwrap();
                assert!(seen[..5000] == text(n, 9)[60_000..65_000]);
            }
        });
        image.close().unwrap();
        place.check();
    });

    fn compress_and_read(image: &Arc<Image>, backend: Backend, owner: u64) {
        const CLUSTERS: u64 = 200;
        let mut queue = Queue::new(image.clone(), 16, backend).unwrap();
        let start = owner * CLUSTERS;
        let fd = queue.fd().unwrap();
        let reap = |queue: &mut Queue, count: usize| {
            let mut ended = 0;
            queue.submit();
            while ended < count {
                let (min, timeout) = match owner {
                    0 => (1, None),
                    1 => (1, Some(Duration::from_millis(3))),
                    _ => (0, None),
                };
                assert!(owner < 2 || readable(fd, 20_000), "nobody was told");
                ended += queue.reap(8, min, timeout, |c| c.result.unwrap()).unwrap();
            }
        };
        let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
        let mut written: Vec<Buffer> = Vec::new();
        for at in (0..CLUSTERS).step_by(5) {
            let data: Vec<u8> = (at..at + 5).flat_map(|n| text(start + n, 1)).collect();
            written.push(Buffer::of(&data));
        }
        for (n, buffers) in written.chunks(8).enumerate() {
            for (i, buffer) in buffers.iter().enumerate() {
                let at = GuestOffset((start + (n * 8 + i) as u64 * 5) * 65536);
                push(&mut queue, Request::Write(vec![buffer.src(0, 5 * 65536)], at, flags), 0);
            }
            reap(&mut queue, buffers.len());
        }
        let mut rng = Rng::new(owner + 1);
        let expected: Vec<u8> = (0..CLUSTERS).flat_map(|n| text(start + n, 1)).collect();
        let mut buffers: Vec<Buffer> = (0..16).map(|_| Buffer::new(1 << 20)).collect();
        for round in 0..12 {
            let mut ranges = Vec::new();
            for buffer in &mut buffers {
                let length = [4096, 5000, 65536, 1 << 20][rng.below(4) as usize];
                let at = rng.below(CLUSTERS * 65536 - length) & !(if rng.below(2) == 0 { 65535 } else { 0 });
                let half = length as usize / [1, 2, 7][rng.below(3) as usize];
                let pieces = vec![buffer.dst(0, half), buffer.dst(half, length as usize - half)];
                push(&mut queue, Request::Read(pieces, GuestOffset(start * 65536 + at)), 0);
                ranges.push(at as usize..(at + length) as usize);
            }
            reap(&mut queue, 16);
            for (buffer, range) in buffers.iter().zip(ranges) {
                assert!(
                    buffer.bytes()[..range.len()] == expected[range.clone()],
                    "owner {owner}, round {round}: {range:?}"
                );
            }
        }
        // A queue that goes while much is being computed waits for it.
        for (slot, buffer) in buffers.iter_mut().enumerate() {
            push(
                &mut queue,
                Request::Read(vec![buffer.dst(0, 1 << 20)], GuestOffset((start + slot as u64) * 65536)),
                0,
            );
        }
        queue.submit();
        drop(queue);
        let read = expected[..1 << 20] == *buffers[0].bytes();
        assert!(read, "owner {owner}: the queue has gone before its requests");
    }
}
