//! Transfers through io_uring: one ring a queue, filled while pipelines are polled, handed to the kernel in one batch.
//!
//! A read or write that is the only transfer under way is held back until there is more to hand over. If its owner goes to
//! sleep for it instead, for however long it takes, the owner makes the system call: the kernel would do the same, and
//! where that blocks (a write into space that the file system has yet to allocate), in a thread that has to be woken first.

use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::sync::Mutex;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};

use super::bell::EventFd;
use crate::storage::{IoDst, IoSrc};
use crate::wait::lock;

/// Number of the poll that a sleeper is woken by; transfers count from 0.
const POLL: u64 = u64::MAX;
/// Files that can be registered: a chain that is longer works all the same.
const FILES_MAX: u32 = 64;

#[derive(Default)]
struct Transfer {
    outcome: Option<i32>,
    waker: Option<Waker>,
}

/// A transfer as a system call.
struct Call {
    fd: RawFd,
    pieces: *const libc::iovec,
    count: libc::c_int,
    offset: libc::off_t,
    writes: bool,
}

// SAFETY: the pieces belong to whoever awaits the transfer, which does not go before that has ended; the memory that they
// describe may be used by any thread, as by the kernel.
unsafe impl Send for Call {}

impl Call {
    fn read(file: RingFile, pieces: &[IoDst<'_>], offset: u64) -> Option<Self> {
        let (count, offset) = (pieces.len() as libc::c_int, libc::off_t::try_from(offset).ok()?);
        Some(Self { fd: file.fd, pieces: pieces.as_ptr().cast(), count, offset, writes: false })
    }

    fn write(file: RingFile, pieces: &[IoSrc<'_>], offset: u64) -> Option<Self> {
        let (count, offset) = (pieces.len() as libc::c_int, libc::off_t::try_from(offset).ok()?);
        Some(Self { fd: file.fd, pieces: pieces.as_ptr().cast(), count, offset, writes: true })
    }

    /// Makes it; what it comes to is what a completion would say.
    fn make(&self) -> i32 {
        let make = if self.writes { libc::pwritev } else { libc::preadv };
        // SAFETY: IoDst and IoSrc have the layout of struct iovec, there are at most IOV_MAX, and their makers promised
        // valid memory; all of it stays until `Ended` has seen the outcome, which is set after this.
        let n = unsafe { make(self.fd, self.pieces, self.count, self.offset) };
        let failed = || -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        if n < 0 { failed() } else { i32::try_from(n).unwrap_or(i32::MAX) }
    }
}

/// The only transfer under way, which the kernel has not been told of.
struct Held {
    index: usize,
    entry: squeue::Entry,
    call: Call,
}

struct Inner {
    uring: IoUring,
    transfers: Vec<Transfer>,
    free: Vec<usize>,
    pushed: usize, // transfers that the kernel was told of, or will be with the next batch, and that have not ended
    held: Option<Held>,
    made: Option<usize>, // a transfer that has ended without the ring, and whose pipeline was not woken
    poll_is_armed: bool,
    woken: Vec<Waker>, // empty: for the next collection
}

/// The ring of one queue.
pub struct Ring {
    inner: Mutex<Inner>,
    has_files: bool,
}

/// A file as the ring knows it.
#[derive(Debug, Clone, Copy)]
pub struct RingFile {
    fd: RawFd,
    registered: Option<u32>,
}

/// A transfer under way. Whoever drops it waits for its end: the kernel uses the memory that the caller lent.
pub struct Ended<'a> {
    ring: &'a Ring,
    index: usize,
    taken: bool,
}

/// Written out, because a closure cannot take two types of file.
macro_rules! entry {
    ($file:expr, |$fd:ident| $make:expr) => {
        match $file.registered {
            Some(index) => {
                let $fd = types::Fixed(index);
                $make.build()
            }
            None => {
                let $fd = types::Fd($file.fd);
                $make.build()
            }
        }
    };
}

impl Ring {
    /// A ring for `depth` transfers at once.
    pub fn new(depth: u32) -> io::Result<Self> {
        // One more for the poll. The completion ring has twice as many entries: it cannot overflow.
        let uring = IoUring::builder().dontfork().setup_clamp().build((depth + 1).next_power_of_two())?;
        if !uring.params().is_feature_ext_arg() || !uring.params().is_feature_nodrop() {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS)); // older than Linux 5.11
        }
        let has_files = uring.submitter().register_files_sparse(FILES_MAX).is_ok();
        let inner = Inner {
            uring,
            transfers: Vec::new(),
            free: Vec::new(),
            pushed: 0,
            held: None,
            made: None,
            poll_is_armed: false,
            woken: Vec::new(),
        };
        Ok(Self { inner: Mutex::new(inner), has_files })
    }

    /// Makes a file known to the ring as its file number `index`; one that cannot be registered costs a little more.
    pub fn add_file(&self, fd: RawFd, index: usize) -> RingFile {
        let index = index as u32;
        let fits = self.has_files && index < FILES_MAX;
        let done = fits && lock(&self.inner).uring.submitter().register_files_update(index, &[fd]).is_ok();
        RingFile { fd, registered: done.then_some(index) }
    }

    /// Makes the kernel signal `event` at each completion.
    pub fn signal_at_completions(&self, event: &EventFd) -> io::Result<()> {
        lock(&self.inner).uring.submitter().register_eventfd(event.raw())
    }

    /// Reads into the pieces, at most IOV_MAX; they stay valid until the transfer has ended.
    pub fn read<'a>(&'a self, file: RingFile, pieces: &'a [IoDst<'_>], offset: u64) -> Ended<'a> {
        let entry = match pieces {
            [piece] if u32::try_from(piece.len()).is_ok() => {
                entry!(file, |fd| opcode::Read::new(fd, piece.base(), piece.len() as u32).offset(offset))
            }
            _ => entry!(file, |fd| {
                opcode::Readv::new(fd, pieces.as_ptr().cast(), pieces.len() as u32).offset(offset)
            }),
        };
        self.start(entry, Call::read(file, pieces, offset))
    }

    /// Writes the pieces, at most IOV_MAX; they stay valid until the transfer has ended.
    pub fn write<'a>(&'a self, file: RingFile, pieces: &'a [IoSrc<'_>], offset: u64) -> Ended<'a> {
        let entry = match pieces {
            [piece] if u32::try_from(piece.len()).is_ok() => {
                entry!(file, |fd| opcode::Write::new(fd, piece.base(), piece.len() as u32).offset(offset))
            }
            _ => entry!(file, |fd| {
                opcode::Writev::new(fd, pieces.as_ptr().cast(), pieces.len() as u32).offset(offset)
            }),
        };
        self.start(entry, Call::write(file, pieces, offset))
    }

    /// As fdatasync.
    pub fn flush(&self, file: RingFile) -> Ended<'_> {
        self.start(entry!(file, |fd| opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC)), None)
    }

    /// Punches a hole.
    pub fn punch_hole(&self, file: RingFile, offset: u64, length: u64) -> Ended<'_> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        self.start(entry!(file, |fd| opcode::Fallocate::new(fd, length).offset(offset).mode(mode)), None)
    }

    /// Starts a transfer; with `call`, it may be held back.
    fn start(&self, entry: squeue::Entry, call: Option<Call>) -> Ended<'_> {
        let mut inner = lock(&self.inner);
        let index = inner.free.pop().unwrap_or_else(|| {
            inner.transfers.push(Transfer::default());
            inner.transfers.len() - 1
        });
        inner.transfers[index] = Transfer::default();
        let entry = entry.user_data(index as u64);
        match call {
            Some(call) if inner.pushed == 0 && inner.held.is_none() => inner.held = Some(Held { index, entry, call }),
            _ => {
                inner.push_held();
                inner.push_transfer(&entry);
            }
        }
        Ended { ring: self, index, taken: false }
    }

    /// Hands what was started to the kernel.
    pub fn submit(&self) {
        lock(&self.inner).submit();
    }

    /// Wakes the pipelines whose transfers have ended.
    pub fn collect(&self) {
        let mut inner = lock(&self.inner);
        let mut woken = std::mem::take(&mut inner.woken);
        inner.collect(|waker| woken.push(waker));
        if woken.is_empty() {
            inner.woken = woken;
            return;
        }
        drop(inner);
        woken.drain(..).for_each(Waker::wake);
        lock(&self.inner).woken = woken;
    }

    /// Sleeps until a transfer ends, `alarm` is signalled, or the deadline is over.
    pub fn sleep(&self, alarm: &EventFd, deadline: Option<Instant>) {
        let mut inner = lock(&self.inner);
        if deadline.is_none() && inner.make_held() {
            return;
        }
        inner.push_held();
        if !inner.poll_is_armed {
            let poll = opcode::PollAdd::new(types::Fd(alarm.raw()), libc::POLLIN as u32).build();
            inner.push(&poll.user_data(POLL));
            inner.poll_is_armed = true;
        }
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let timespec = left.map(|left: Duration| types::Timespec::new().sec(left.as_secs()).nsec(left.subsec_nanos()));
        let args = types::SubmitArgs::new();
        let args = match &timespec {
            Some(timespec) => args.timespec(timespec),
            None => args,
        };
        // Interrupted, or over: the caller looks at what there is, and comes back.
        let _ = inner.uring.submitter().submit_with_args(1, &args);
    }

    /// Waits for the end of one transfer, and collects others on the way.
    fn wait_for(&self, index: usize) -> i32 {
        loop {
            self.collect();
            let mut inner = lock(&self.inner);
            if let Some(outcome) = inner.transfers[index].outcome {
                return outcome;
            }
            inner.push_held();
            let _ = inner.uring.submit_and_wait(1); // interrupted: again
        }
    }
}

impl Inner {
    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: what the entry points to lives until its completion has been seen: `Ended` borrows it, and waits
            // for that when it is dropped. (The poll of the alarm points to nothing.)
            if unsafe { self.uring.submission().push(entry) }.is_ok() {
                return;
            }
            self.submit();
        }
    }

    fn push_transfer(&mut self, entry: &squeue::Entry) {
        self.pushed += 1;
        self.push(entry);
    }

    /// What was held back goes to the kernel with the next batch.
    fn push_held(&mut self) {
        if let Some(held) = self.held.take() {
            self.push_transfer(&held.entry);
        }
    }

    /// Makes the transfer that was held back, if there is one.
    fn make_held(&mut self) -> bool {
        let Some(held) = self.held.take() else { return false };
        self.transfers[held.index].outcome = Some(held.call.make());
        self.made = Some(held.index);
        true
    }

    fn submit(&mut self) {
        self.push_held();
        // What the kernel has no room for now it takes the next time; a request that waits for it asks again.
        if !self.uring.submission().is_empty() {
            let _ = self.uring.submit();
        }
    }

    fn collect(&mut self, mut wake: impl FnMut(Waker)) {
        let Self { uring, transfers, pushed, made, poll_is_armed, .. } = self;
        if let Some(index) = made.take() {
            transfers[index].waker.take().into_iter().for_each(&mut wake);
        }
        for completion in uring.completion() {
            if completion.user_data() == POLL {
                *poll_is_armed = false;
                continue;
            }
            *pushed -= 1;
            let transfer = &mut transfers[completion.user_data() as usize];
            transfer.outcome = Some(completion.result());
            transfer.waker.take().into_iter().for_each(&mut wake);
        }
    }
}

impl Future for Ended<'_> {
    type Output = io::Result<usize>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut inner = lock(&self.ring.inner);
        let transfer = &mut inner.transfers[self.index];
        let Some(outcome) = transfer.outcome else {
            transfer.waker = Some(context.waker().clone());
            return Poll::Pending;
        };
        inner.free.push(self.index);
        drop(inner);
        self.taken = true;
        Poll::Ready(match outcome {
            n @ 0.. => Ok(n as usize),
            errno => Err(io::Error::from_raw_os_error(-errno)),
        })
    }
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if !self.taken {
            self.ring.wait_for(self.index);
            lock(&self.ring.inner).free.push(self.index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::task::Wake;

    struct Nobody;

    impl Wake for Nobody {
        fn wake(self: std::sync::Arc<Self>) {}
    }

    fn polled(ended: &mut Ended<'_>) -> Poll<io::Result<usize>> {
        let waker = Waker::from(std::sync::Arc::new(Nobody));
        Pin::new(ended).poll(&mut Context::from_waker(&waker))
    }

    /// A file of 8 KiB: 1 and then 2; and a ring that knows it. None where there is no io_uring.
    fn ring_on_a_file(name: &str) -> Option<(Ring, RingFile, File, EventFd)> {
        let path = std::env::temp_dir().join(format!("libqcow2-ring-{name}-{}", std::process::id()));
        std::fs::write(&path, [[1u8; 4096], [2; 4096]].concat()).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let ring = Ring::new(8).ok()?;
        let known = ring.add_file(file.as_raw_fd(), 0);
        Some((ring, known, file, EventFd::new().unwrap()))
    }

    /// A write into space that ext4 had yet to allocate took 4 times as long with one request under way as pwrite does,
    /// because the kernel woke a thread for it; the owner, who sleeps meanwhile, makes it now. Told from the ring, because
    /// no other number tells: nothing was pushed.
    #[test]
    fn the_only_transfer_is_made_by_who_would_sleep_for_it_and_others_are_not() {
        let Some((ring, file, _open, alarm)) = ring_on_a_file("only") else { return };
        let pushed = || lock(&ring.inner).pushed;
        let (mut first, mut second) = ([0u8; 4096], [0u8; 4096]);
        let pieces = [IoDst::from(&mut first[..])];
        let mut read = ring.read(file, &pieces, 0);
        assert!(polled(&mut read).is_pending());
        ring.sleep(&alarm, None);
        assert_eq!(pushed(), 0);
        ring.collect();
        assert!(matches!(polled(&mut read), Poll::Ready(Ok(4096))));
        drop(read);
        // Two: the ring has both. So it has one with a deadline, or after it was submitted.
        let (one, two) = ([IoDst::from(&mut first[..])], [IoDst::from(&mut second[..])]);
        let (mut read, mut other) = (ring.read(file, &one, 0), ring.read(file, &two, 4096));
        assert_eq!(pushed(), 2);
        while pushed() > 0 {
            ring.sleep(&alarm, None);
            ring.collect();
        }
        assert!(matches!((polled(&mut read), polled(&mut other)), (Poll::Ready(Ok(4096)), Poll::Ready(Ok(4096)))));
        drop((read, other));
        for submits in [false, true] {
            let pieces = [IoSrc::from(&[3u8; 4096][..])];
            let mut write = ring.write(file, &pieces, 0);
            if submits {
                ring.submit();
                assert_eq!(pushed(), 1);
            }
            while polled(&mut write).is_pending() {
                let deadline = (!submits).then(|| Instant::now() + Duration::from_secs(60));
                ring.sleep(&alarm, deadline);
                ring.collect();
            }
            let ring = lock(&ring.inner);
            assert!(ring.made.is_none() && ring.poll_is_armed, "the ring has made it");
        }
        assert_eq!((first[0], second[0]), (1, 2));
    }

    #[test]
    fn a_transfer_that_was_held_back_fails_as_in_the_ring_and_ends_when_it_is_dropped() {
        let Some((ring, file, open, alarm)) = ring_on_a_file("held") else { return };
        let bytes = [9u8; 4096];
        let pieces = [IoSrc::from(&bytes[..])];
        let nowhere = RingFile { fd: -1, registered: None };
        let mut write = ring.write(nowhere, &pieces, 0);
        assert!(polled(&mut write).is_pending());
        ring.sleep(&alarm, None);
        let Poll::Ready(Err(error)) = polled(&mut write) else { panic!("it has ended") };
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        drop(write);
        drop(ring.write(file, &pieces, 4096)); // its memory is the caller's again, so it has ended
        assert!(lock(&ring.inner).held.is_none());
        let mut read = [0u8; 4096];
        std::os::unix::fs::FileExt::read_exact_at(&open, &mut read, 4096).unwrap();
        assert_eq!(read, bytes);
        // Behind it, everything is as before.
        let mut flush = ring.flush(file);
        while polled(&mut flush).is_pending() {
            ring.sleep(&alarm, None);
            ring.collect();
        }
    }
}
