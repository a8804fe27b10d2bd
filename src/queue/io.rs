//! How the pipelines of a queue reach their files: at once where that cannot block, through the ring, or by threads.

use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use super::Backend;
use super::bell::{Bell, EventFd};
use super::pool::{Call, Pool, processors};
use super::ring::{Ring, RingFile};
use crate::storage::{Io, IoDst, IoSrc, Storage, total_dst, total_src};
use crate::wait::lock;

/// Most pieces of one transfer (IOV_MAX of Linux).
const PIECES_MAX: usize = 1024;
/// What takes less time than this is computed by who polls: to have it done elsewhere takes some, too.
const COMPUTED_AT_ONCE_MICROS: u64 = 40;
/// A file system that is nothing but the page cache.
const TMPFS: i64 = 0x0102_1994;

/// Whether a kind of transfer is tried at once, before it is handed to the ring: what is in the page cache is copied
/// faster than a ring is told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AtOnce {
    /// The file is in memory: no transfer ever blocks.
    Always,
    /// With RWF_NOWAIT, which fails where it would block.
    Try,
    /// The file does not know RWF_NOWAIT, or is not cached.
    Never,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    fd: RawFd,
    file: RingFile,
    reads: AtOnce,
    writes: AtOnce,
}

/// See the module text.
pub struct QueueIo {
    ring: Option<Ring>,
    files: Mutex<Vec<Known>>,
    pool: Pool,
    processors: OnceLock<Arc<Pool>>, // once there is something to compute
    elsewhere: AtomicUsize,          // transfers and computations under way; changed by who polls only
}

impl QueueIo {
    /// For `depth` transfers at once.
    pub fn new(depth: u32, backend: Backend) -> io::Result<Self> {
        let ring = match backend {
            Backend::Threads => None,
            Backend::IoUring => Some(Ring::new(depth)?),
            Backend::Auto => Ring::new(depth).ok(),
        };
        let (pool, processors) = (Pool::for_transfers(), OnceLock::new());
        Ok(Self { ring, files: Mutex::default(), pool, processors, elsewhere: AtomicUsize::new(0) })
    }

    /// What performs transfers on files.
    pub fn backend(&self) -> Backend {
        if self.ring.is_some() { Backend::IoUring } else { Backend::Threads }
    }

    /// Hands what the pipelines have started to the kernel.
    pub fn submit(&self) {
        self.ring.iter().for_each(Ring::submit);
    }

    /// Wakes the pipelines whose transfers have ended.
    pub fn collect(&self) {
        self.ring.iter().for_each(Ring::collect);
    }

    /// Whether no transfer and no computation is under way: what pipelines wait for then is the business of others. For who
    /// polls them.
    pub fn is_idle(&self) -> bool {
        self.elsewhere.load(Ordering::Relaxed) == 0
    }

    /// Waits for what the kernel or a thread is doing.
    async fn done<F: Future>(&self, elsewhere: F) -> F::Output {
        self.elsewhere.fetch_add(1, Ordering::Relaxed);
        let _counted = Counted(&self.elsewhere);
        elsewhere.await
    }

    /// Whether something waits for a processor.
    pub fn has_to_compute(&self) -> bool {
        self.processors.get().is_some_and(|processors| processors.has_work())
    }

    /// Computes a part of what waits for a processor. `false`: nothing does.
    pub fn help_compute(&self) -> bool {
        self.processors.get().is_some_and(|processors| processors.help())
    }

    /// Makes `event` signalled when transfers end.
    pub fn signal_at_completions(&self, event: &EventFd) -> io::Result<()> {
        self.ring.as_ref().map_or(Ok(()), |ring| ring.signal_at_completions(event))
    }

    /// Sleeps until a transfer may have ended or a slot was woken, or until `deadline`.
    pub fn sleep(&self, bell: &Bell, deadline: Option<Instant>) {
        match (&self.ring, bell.sleeper.get()) {
            (Some(ring), Some(alarm)) => ring.sleep(alarm, deadline),
            _ => bell.sleep(deadline),
        }
    }

    fn known(&self, ring: &Ring, fd: RawFd) -> Known {
        let mut files = lock(&self.files);
        if let Some(known) = files.iter().find(|known| known.fd == fd) {
            return *known;
        }
        let at_once = at_once(fd);
        let known = Known { fd, file: ring.add_file(fd, files.len()), reads: at_once, writes: at_once };
        files.push(known);
        known
    }

    /// The file did not take RWF_NOWAIT: it is not asked again.
    fn give_up_at_once(&self, fd: RawFd, reads: bool) {
        let mut files = lock(&self.files);
        for known in files.iter_mut().filter(|known| known.fd == fd) {
            *(if reads { &mut known.reads } else { &mut known.writes }) = AtOnce::Never;
        }
    }

    fn file(&self, on: &dyn Storage) -> Option<(&Ring, Known)> {
        let ring = self.ring.as_ref()?;
        Some((ring, self.known(ring, on.raw_fd()?)))
    }
}

fn at_once(fd: RawFd) -> AtOnce {
    // SAFETY: a descriptor of an open storage; no memory is passed.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 || flags & libc::O_DIRECT != 0 {
        return AtOnce::Never;
    }
    // SAFETY: all-zero bytes are a valid statfs, which the call fills.
    let mut facts: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: as above, and a writable struct.
    let known = unsafe { libc::fstatfs(fd, &raw mut facts) } == 0;
    if known && facts.f_type as i64 == TMPFS && is_regular(fd) { AtOnce::Always } else { AtOnce::Try }
}

/// Whether a descriptor is one of a regular file. A device is asked about the file system that its name is on, and /dev
/// says that it is in memory.
fn is_regular(fd: RawFd) -> bool {
    // SAFETY: all-zero bytes are a valid stat, which the call fills.
    let mut facts: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: a descriptor of an open storage, and a writable struct.
    let known = unsafe { libc::fstat(fd, &raw mut facts) } == 0;
    known && facts.st_mode & libc::S_IFMT == libc::S_IFREG
}

/// What an attempt at once came to: `None` where it would have blocked, or did a part only.
enum Attempt {
    Done(usize),
    Blocks,
    NotSupported,
}

fn attempt(n: libc::ssize_t, length: u64) -> Attempt {
    if n >= 0 && n as u64 == length {
        return Attempt::Done(n as usize);
    }
    let unsupported =
        n < 0 && matches!(io::Error::last_os_error().raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL));
    if unsupported { Attempt::NotSupported } else { Attempt::Blocks }
}

fn read_at_once(fd: RawFd, pieces: &[IoDst<'_>], offset: u64) -> Attempt {
    let (iov, count) = (pieces.as_ptr().cast(), pieces.len() as libc::c_int);
    // SAFETY: the pieces' makers promised valid memory, and IoDst has the layout of struct iovec; at most IOV_MAX.
    let n = unsafe { libc::preadv2(fd, iov, count, offset as libc::off_t, libc::RWF_NOWAIT) };
    attempt(n, total_dst(pieces))
}

fn write_at_once(fd: RawFd, pieces: &[IoSrc<'_>], offset: u64) -> Attempt {
    let (iov, count) = (pieces.as_ptr().cast(), pieces.len() as libc::c_int);
    // SAFETY: as for reading.
    let n = unsafe { libc::pwritev2(fd, iov, count, offset as libc::off_t, libc::RWF_NOWAIT) };
    attempt(n, total_src(pieces))
}

/// One that is under way elsewhere, as long as this lives.
struct Counted<'a>(&'a AtomicUsize);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Io for QueueIo {
    async fn read(&self, on: &dyn Storage, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        let fits = pieces.len() <= PIECES_MAX && on.accepts_raw_read(pieces, offset);
        let Some((ring, known)) = self.file(on).filter(|_| fits) else {
            return self.done(self.pool.start(Call::Read(on, pieces, offset))).await;
        };
        match known.reads {
            AtOnce::Always => return on.read(pieces, offset),
            AtOnce::Try => match read_at_once(known.fd, pieces, offset) {
                Attempt::Done(n) => return Ok(n),
                Attempt::Blocks => {}
                Attempt::NotSupported => self.give_up_at_once(known.fd, true),
            },
            AtOnce::Never => {}
        }
        match self.done(ring.read(known.file, pieces, offset)).await {
            Ok(n) if n as u64 == total_dst(pieces) => Ok(n),
            // The end of the file, or interrupted: rare, and what is left is there or not.
            Ok(_) => on.read(pieces, offset),
            Err(e) if is_to_be_repeated(&e) => on.read(pieces, offset),
            Err(e) => Err(e),
        }
    }

    async fn write(&self, on: &dyn Storage, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        let _turn = match on.turns() {
            Some(turns) => Some(turns.take(pieces, offset).await),
            None => None,
        };
        let fits = |_: &_| pieces.len() <= PIECES_MAX && on.accepts_raw_write(pieces, offset);
        let Some((ring, known)) = self.file(on).filter(fits) else {
            return self.done(self.pool.start(Call::Write(on, pieces, offset))).await.map(|_| ());
        };
        match known.writes {
            AtOnce::Always => return on.write_in_turn(pieces, offset),
            AtOnce::Try => match write_at_once(known.fd, pieces, offset) {
                Attempt::Done(_) => return Ok(()),
                Attempt::Blocks => {}
                Attempt::NotSupported => self.give_up_at_once(known.fd, false),
            },
            AtOnce::Never => {}
        }
        match self.done(ring.write(known.file, pieces, offset)).await {
            Ok(n) if n as u64 == total_src(pieces) => Ok(()),
            // No room, as a rule: the blocking call says so.
            Ok(_) => on.write_in_turn(pieces, offset),
            Err(e) if is_to_be_repeated(&e) => on.write_in_turn(pieces, offset),
            Err(e) => Err(e),
        }
    }

    async fn flush(&self, on: &dyn Storage) -> io::Result<()> {
        match self.file(on) {
            Some((_, known)) if known.writes == AtOnce::Always => on.flush(),
            Some((ring, known)) => self.done(ring.flush(known.file)).await.map(|_| ()),
            None => self.done(self.pool.start(Call::Flush(on))).await.map(|_| ()),
        }
    }

    async fn punch_hole(&self, on: &dyn Storage, offset: u64, length: u64) -> io::Result<()> {
        match self.file(on) {
            Some((_, known)) if known.writes == AtOnce::Always => on.punch_hole(offset, length),
            Some((ring, known)) => self.done(ring.punch_hole(known.file, offset, length)).await.map(|_| ()),
            None => self.done(self.pool.start(Call::PunchHole(on, offset, length))).await.map(|_| ()),
        }
    }

    async fn compute(&self, parts: usize, part_micros: u64, work: &(dyn Fn(usize) + Sync)) {
        if parts as u64 * part_micros < COMPUTED_AT_ONCE_MICROS {
            return (0..parts).for_each(work);
        }
        let processors = self.processors.get_or_init(processors);
        if self.done(processors.start_all(parts, |part| Call::Compute(work, part))).await.is_err() {
            panic!("a computation panicked"); // its message has been printed by then
        }
    }
}

fn is_to_be_repeated(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    /// Block devices were taken for files in memory, because /dev is a tmpfs: each transfer of a queue on a disk was made
    /// while its owner waited. Found by lending a ring the device that is always full.
    #[test]
    fn a_device_is_no_file_in_memory_although_its_name_is() {
        let full = std::fs::File::open("/dev/full").unwrap();
        assert_eq!(at_once(full.as_raw_fd()), AtOnce::Try);
        let folder = std::path::Path::new("/dev/shm");
        if folder.is_dir() {
            let path = folder.join(format!("libqcow2-at-once-{}", std::process::id()));
            let file = std::fs::File::create(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            assert_eq!(at_once(file.as_raw_fd()), AtOnce::Always);
        }
    }
}
