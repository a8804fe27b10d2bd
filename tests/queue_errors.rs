//! Errors of the kernel under queues: real ones, that come back through the ring. A storage lends the ring another
//! descriptor for one transfer: one that is not open for reading, or the device that is always full, which can neither
//! be synced. And a process whose files may not grow. (Errors in any call, of a storage without a descriptor, are in
//! `tests/sim/queue_faults.rs`.)

mod judge;
mod pass_on;
mod qemu;
mod requests;

use std::fs::{File, OpenOptions as FileOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

use judge::Judge;
use pass_on::pass_on;
use qcow2::Error;
use qcow2::error::{ErrorCode, IoOp};
use qcow2::format::GuestOffset;
use qcow2::image::{CreateOptions, Image, OpenOptions, SnapshotFacts, WriteFlags, ZeroFlags};
use qcow2::queue::{Backend, Queue, Request};
use qcow2::storage::file::FileStorage;
use qcow2::storage::lock::LockMode;
use qcow2::storage::sim::DiskImage;
use qcow2::storage::{IoDst, IoSrc, Storage, Turns};
use requests::{BACKENDS, Buffer, push, reap_all};

const SIZE: u64 = 2 << 20;
/// What one request changes or reads.
const PART: usize = 4096;
const NEVER: i64 = i64::MAX;

/// What the ring is being given a descriptor for. The functions are called one after the other, by whoever polls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transfer {
    Read,
    RefusedRead, // it does not go to the descriptor
    Write,
    Flush,
}

/// A file that lends another descriptor for one transfer.
struct Lender {
    file: FileStorage,
    unreadable: File,
    full: File,
    /// Transfers before that.
    left: AtomicI64,
    /// What was asked about last, and what was lent for.
    asked: Mutex<(Option<Transfer>, Option<Transfer>)>,
}

impl Lender {
    fn open(path: &str, direct: bool) -> io::Result<Self> {
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let file = FileOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
        let to_write = |path| FileOptions::new().write(true).open(path);
        Ok(Self {
            file: FileStorage::new(file),
            unreadable: to_write(path)?,
            full: to_write("/dev/full")?,
            left: AtomicI64::new(NEVER),
            asked: Mutex::default(),
        })
    }

    fn lent(&self) -> Option<Transfer> {
        self.asked.lock().unwrap().1
    }
}

impl Storage for Lender {
    pass_on!(file: read write flush size truncate);
    fn extend(&self, size: u64) -> io::Result<()> {
        self.file.extend(size)
    }
    fn lock(&self, mode: LockMode) -> io::Result<bool> {
        self.file.lock(mode)
    }
    fn unlock(&self) {
        self.file.unlock();
    }

    fn accepts_raw_read(&self, pieces: &[IoDst<'_>], offset: u64) -> bool {
        let accepts = self.file.accepts_raw_read(pieces, offset);
        self.asked.lock().unwrap().0 = Some(if accepts { Transfer::Read } else { Transfer::RefusedRead });
        accepts
    }

    fn raw_fd(&self) -> Option<RawFd> {
        let mut asked = self.asked.lock().unwrap();
        let transfer = asked.0.take().unwrap_or(Transfer::Flush); // or a write: that is asked about next
        if transfer == Transfer::RefusedRead || self.left.fetch_sub(1, Ordering::SeqCst) != 0 {
            return self.file.raw_fd();
        }
        asked.1 = Some(transfer);
        Some(if transfer == Transfer::Read { self.unreadable.as_raw_fd() } else { self.full.as_raw_fd() })
    }

    fn accepts_raw_write(&self, pieces: &[IoSrc<'_>], offset: u64) -> bool {
        let accepts = self.file.accepts_raw_write(pieces, offset);
        let mut asked = self.asked.lock().unwrap();
        if asked.1 == Some(Transfer::Flush) && self.left.load(Ordering::SeqCst) == -1 {
            asked.1 = accepts.then_some(Transfer::Write);
            // One that does not go to the descriptor was none: the next.
            self.left.store(if accepts { -2 } else { 0 }, Ordering::SeqCst);
        }
        accepts
    }

    fn turns(&self) -> Option<&Turns> {
        self.file.turns()
    }
    fn write_in_turn(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        self.file.write_in_turn(pieces, offset)
    }
}

/// An image with data, shared with a snapshot, so that there is something to read, to copy and to overwrite.
fn make(path: &str) -> Vec<u8> {
    let options = CreateOptions { cluster_size_bytes: 16 << 10, extended_l2: true, ..CreateOptions::default() };
    qcow2::image::create(Path::new(path), SIZE, &options, true).unwrap();
    let image = Image::open(Path::new(path), &OpenOptions::default()).unwrap();
    let content: Vec<u8> = (0..SIZE).map(|at| if at < SIZE / 2 { (at / 512 % 200) as u8 + 1 } else { 0 }).collect();
    image.pwrite(&content[..SIZE as usize / 2], 0).unwrap();
    image.snapshot_create("shared", &SnapshotFacts::default()).unwrap();
    image.pwrite(&content[..64 << 10], 0).unwrap();
    image.close().unwrap();
    content
}

fn sound(path: &str, leaks_allowed: bool, label: &str) {
    qemu::check(path, leaks_allowed);
    let verdict = Judge::default().judge(&DiskImage::new(std::fs::read(path).unwrap()));
    assert!(verdict.violations.is_empty() && (leaks_allowed || verdict.leaks == 0), "{label}: {verdict:?}");
}

/// Where a request goes.
fn at(i: usize) -> usize {
    [0, SIZE as usize / 4, SIZE as usize / 2][i % 3] + i / 3 * (16 << 10)
}

/// In-place writes, copies, new clusters, zeroes, reads, and flushes in between. Returns the errors.
fn requests(queue: &mut Queue, content: &mut [u8], maybe: &mut Vec<(usize, u8)>, label: &str) -> Vec<Error> {
    let mut buffers: Vec<Buffer> = (0..24).map(|i| Buffer::of(&[201 + i; PART])).collect();
    for (i, buffer) in buffers.iter_mut().enumerate() {
        let (offset, whole) = (GuestOffset(at(i) as u64), vec![buffer.src(0, PART)]);
        let request = match i {
            // Some of what is to be read is copied a moment later: they do not overlap.
            _ if i % 4 == 3 => Request::Read(vec![buffer.dst(0, PART)], offset),
            10 => Request::WriteZeroes(offset, PART as u64, ZeroFlags::default()),
            _ => Request::Write(whole, offset, WriteFlags::default()),
        };
        push(queue, request, i as u64);
        if i % 8 == 7 {
            push(queue, Request::Flush, 100 + i as u64);
            queue.submit();
        }
    }
    let value = |i: usize| if i == 10 { 0 } else { 201 + i as u8 };
    let ended = reap_all(queue);
    assert_eq!(ended.len(), 27, "{label}: every request ends");
    let mut errors = Vec::new();
    for (i, result) in ended {
        let i = i as usize;
        match result {
            Err(e) => {
                if i < 24 && i % 4 != 3 {
                    maybe.extend((at(i)..at(i) + PART).map(|at| (at, value(i))));
                }
                errors.push(e);
            }
            Ok(()) if i >= 24 => {}
            Ok(()) if i % 4 == 3 => assert!(buffers[i].bytes() == &content[at(i)..at(i) + PART], "{label}: read {i}"),
            Ok(()) => content[at(i)..at(i) + PART].fill(value(i)),
        }
    }
    errors
}

/// What a failed write was to leave is there or not, byte by byte; everything else is as it was acknowledged.
fn look(image: &Image, content: &[u8], maybe: &[(usize, u8)], label: &str) {
    let mut seen = vec![0xaa; content.len()];
    image.pread(&mut seen, 0).unwrap();
    for &(at, value) in maybe {
        if seen[at] == value {
            seen[at] = content[at];
        }
    }
    let wrong = seen.iter().zip(content).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "{label}: {wrong:?}");
}

/// One run in which transfer `n` of the queue fails; returns what that was.
fn one(path: &str, direct: bool, n: i64) -> Option<Transfer> {
    let label = format!("direct: {direct}, transfer {n}");
    let mut content = make(path);
    let storage = Arc::new(Lender::open(path, direct).unwrap());
    let options = OpenOptions { l2_cache_size: 4096, refcount_cache_size: 4096, ..OpenOptions::default() };
    let image = Arc::new(Image::open_storage(storage.clone(), &options).unwrap());
    let mut queue = Queue::new(image.clone(), 32, Backend::IoUring).unwrap();
    storage.left.store(n, Ordering::SeqCst);
    let mut maybe = Vec::new();
    let errors = requests(&mut queue, &mut content, &mut maybe, &label);
    storage.left.store(NEVER, Ordering::SeqCst);
    let lent = storage.lent();
    let expected = match lent {
        None => None,
        Some(Transfer::Write) => Some((IoOp::Write, libc::ENOSPC)),
        Some(Transfer::Flush) => Some((IoOp::Flush, libc::EINVAL)),
        Some(_) => Some((IoOp::Read, libc::EBADF)),
    };
    let is_it = |e: &Error| matches!(e, Error::Io { op, errno, .. } if Some((*op, *errno)) == expected);
    let poisoned = lent == Some(Transfer::Flush);
    let is_known = |e: &Error| is_it(e) || poisoned && e.code() == ErrorCode::Poisoned;
    assert!(errors.iter().all(is_known), "{label}, {lent:?}: {errors:#?}");
    assert_eq!(errors.iter().any(is_it), lent.is_some(), "{label}, {lent:?}: {errors:#?}");
    look(&image, &content, &maybe, &label);
    if !poisoned {
        maybe.clear(); // all of it is written again
    }
    let again = requests(&mut queue, &mut content, &mut maybe, &label);
    look(&image, &content, &maybe, &label);
    drop(queue);
    if poisoned {
        assert_eq!(again.len(), 21, "{label}: every change and every flush: {again:?}");
        let written = image.pwrite(&content[..PART], 0).map_err(|e| e.code());
        let flushed = image.flush().map_err(|e| e.code());
        assert_eq!((written, flushed), (Err(ErrorCode::Poisoned), Err(ErrorCode::Poisoned)), "{label}");
        assert!(again.iter().all(|e| e.code() == ErrorCode::Poisoned), "{label}: {again:#?}");
        assert_eq!(image.close().unwrap_err().code(), ErrorCode::Poisoned, "{label}");
    } else {
        assert!(again.is_empty(), "{label}: {again:#?}");
        image.close().unwrap_or_else(|e| panic!("{label}: {e}"));
    }
    drop((image, storage));
    sound(path, poisoned, &label);
    if !poisoned {
        let image = Image::open(Path::new(path), &OpenOptions::default()).unwrap();
        look(&image, &content, &[], &label);
        image.close().unwrap();
    }
    lent
}

/// Most sweeps over all transfers of a run.
const SWEEPS_MAX: usize = 20;

#[test]
fn an_error_that_the_ring_reports_ends_the_requests_that_it_hits() {
    let Some(dir) = qemu::dir_on_disk("queue-errors") else { return };
    for direct in [false, true] {
        let path = dir.path("image.qcow2");
        make(&path);
        if direct && let Err(e) = Lender::open(&path, true) {
            eprintln!("SKIPPED: errors of a ring without the page cache: {e}");
            continue;
        }
        // Which transfer is the n-th is the kernel's affair as well: each sweep meets others.
        let mut all: Vec<Transfer> = Vec::new();
        let mut is_enough = false;
        for _ in 0..SWEEPS_MAX {
            all.extend((0..).map_while(|n| one(&path, direct, n)));
            let of = |kind| all.iter().filter(|&&transfer| transfer == kind).count();
            let [reads, writes, flushes] = [Transfer::Read, Transfer::Write, Transfer::Flush].map(of);
            println!("direct: {direct}: {reads} reads, {writes} writes and {flushes} flushes failed");
            is_enough = reads > 0 && writes > 5 && flushes > 0;
            if is_enough {
                break;
            }
        }
        assert!(is_enough, "direct: {direct}: some kind of transfer never failed");
    }
}

/// A file size limit stands for a full disk. It is one of a process: this one is started again.
#[test]
fn a_queue_over_a_file_that_may_not_grow_goes_on_when_it_may_again() {
    let Some(dir) = qemu::dir_on_disk("queue-limit") else { return };
    for backend in ["io_uring", "threads"] {
        let path = dir.path("image.qcow2");
        make(&path);
        let limited = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "past_the_limit", "--nocapture"])
            .env("LIBQCOW2_TEST_IMAGE", &path)
            .env("LIBQCOW2_TEST_BACKEND", backend)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&limited.stdout).into_owned() + &String::from_utf8_lossy(&limited.stderr);
        assert!(limited.status.success() && text.contains("1 passed") && text.contains(PAST_THE_LIMIT), "{text}");
        sound(&path, false, backend);
    }
}

/// Tells a run under the limit from one that had nothing to do.
const PAST_THE_LIMIT: &str = "some requests went past the limit";

fn limit_file_size(bytes: Option<u64>) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a struct that the call fills.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) }, 0);
    limit.rlim_cur = bytes.unwrap_or(limit.rlim_max);
    // SAFETY: a struct that the call reads; the signal is one that the limit sends, and ignoring it runs no code.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
    }
}

/// Started a second time by `a_queue_over_a_file_that_may_not_grow_goes_on_when_it_may_again`; alone it has nothing to do.
#[test]
fn past_the_limit() {
    let Ok(path) = std::env::var("LIBQCOW2_TEST_IMAGE") else { return };
    let backend = BACKENDS[usize::from(std::env::var("LIBQCOW2_TEST_BACKEND").unwrap() == "threads")];
    const PART: u64 = 16 << 10; // whole clusters
    let image = Arc::new(Image::open(Path::new(&path), &OpenOptions::default()).unwrap());
    let mut queue = Queue::new(image.clone(), 64, backend).unwrap();
    let mut content = vec![0; SIZE as usize];
    image.pread(&mut content, 0).unwrap();
    let buffers: Vec<Buffer> = (0..60).map(|i| Buffer::of(&[200 - i; PART as usize])).collect();
    let write = |i: usize| {
        let at = GuestOffset(SIZE / 2 + i as u64 * PART);
        Request::Write(vec![buffers[i].src(0, PART as usize)], at, WriteFlags::default())
    };
    limit_file_size(Some(std::fs::metadata(&path).unwrap().len() + 20 * PART));
    (0..60).for_each(|i| push(&mut queue, write(i), i as u64));
    queue.submit();
    push(&mut queue, Request::Flush, 60);
    let (mut failed, mut maybe) = (Vec::new(), Vec::new());
    for (i, result) in reap_all(&mut queue) {
        let range = (SIZE / 2 + i * PART) as usize..(SIZE / 2 + (i + 1) * PART) as usize;
        match result {
            Ok(()) if i < 60 => content[range].fill(200 - i as u8),
            Ok(()) => {}
            Err(Error::Io { op: IoOp::Write, errno: libc::EFBIG, .. }) if i < 60 => {
                failed.push(i as usize);
                maybe.extend(range.map(|at| (at, 200 - i as u8)));
            }
            Err(Error::Io { errno: libc::EFBIG, .. }) => {}
            Err(e) => panic!("request {i}: {e}"),
        }
    }
    assert!((20..59).contains(&failed.len()), "{failed:?}");
    look(&image, &content, &maybe, "under the limit");
    limit_file_size(None);
    for &i in &failed {
        push(&mut queue, write(i), i as u64);
        let at = SIZE as usize / 2 + i * PART as usize;
        content[at..at + PART as usize].fill(200 - i as u8);
    }
    queue.submit();
    push(&mut queue, Request::Flush, 60);
    assert!(reap_all(&mut queue).iter().all(|(_, result)| result.is_ok()));
    push(&mut queue, Request::Flush, 61);
    assert!(reap_all(&mut queue).iter().all(|(_, result)| result.is_ok()));
    look(&image, &content, &[], "without the limit");
    drop(queue);
    image.close().unwrap();
    println!("{PAST_THE_LIMIT}: {} of 60, {:?}", failed.len(), backend);
}
