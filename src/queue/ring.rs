//! Transfers through io_uring: one ring a queue, filled while pipelines are polled, handed to the kernel in one batch.

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

struct Inner {
    uring: IoUring,
    transfers: Vec<Transfer>,
    free: Vec<usize>,
    poll_is_armed: bool,
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
        let inner = Inner { uring, transfers: Vec::new(), free: Vec::new(), poll_is_armed: false };
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
        self.start(entry)
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
        self.start(entry)
    }

    /// As fdatasync.
    pub fn flush(&self, file: RingFile) -> Ended<'_> {
        self.start(entry!(file, |fd| opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC)))
    }

    /// Punches a hole.
    pub fn punch_hole(&self, file: RingFile, offset: u64, length: u64) -> Ended<'_> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        self.start(entry!(file, |fd| opcode::Fallocate::new(fd, length).offset(offset).mode(mode)))
    }

    fn start(&self, entry: squeue::Entry) -> Ended<'_> {
        let mut inner = lock(&self.inner);
        let index = inner.free.pop().unwrap_or_else(|| {
            inner.transfers.push(Transfer::default());
            inner.transfers.len() - 1
        });
        inner.transfers[index] = Transfer::default();
        inner.push(&entry.user_data(index as u64));
        Ended { ring: self, index, taken: false }
    }

    /// Hands what was started to the kernel.
    pub fn submit(&self) {
        lock(&self.inner).submit();
    }

    /// Wakes the pipelines whose transfers have ended.
    pub fn collect(&self) {
        let mut woken: Vec<Waker> = Vec::new();
        lock(&self.inner).collect(|waker| woken.push(waker));
        woken.into_iter().for_each(Waker::wake);
    }

    /// Sleeps until a transfer ends, `alarm` is signalled, or the deadline is over.
    pub fn sleep(&self, alarm: &EventFd, deadline: Option<Instant>) {
        let mut inner = lock(&self.inner);
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
            let inner = lock(&self.inner);
            if let Some(outcome) = inner.transfers[index].outcome {
                return outcome;
            }
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

    fn submit(&mut self) {
        // What the kernel has no room for now it takes the next time; a request that waits for it asks again.
        if !self.uring.submission().is_empty() {
            let _ = self.uring.submit();
        }
    }

    fn collect(&mut self, mut wake: impl FnMut(Waker)) {
        let Self { uring, transfers, poll_is_armed, .. } = self;
        for completion in uring.completion() {
            if completion.user_data() == POLL {
                *poll_is_armed = false;
                continue;
            }
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
