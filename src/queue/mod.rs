//! Completion queues: many requests of one thread under way at once, on the pipelines that blocking calls run.
//!
//! ```text
//! push     a request goes into a slot                    nothing happens yet
//! submit   its pipeline runs until it has to wait        transfers go to the kernel in one batch
//! reap     completions wake pipelines; what has ended is handed out
//! ```
//! There is no executor behind a queue: pipelines are polled by whoever calls `submit` or `reap` ([`engine`]), and
//! transfers are io_uring's ([`ring`]), or a few threads' where there is none ([`pool`]). Only what takes a processor for
//! long, compressing and decompressing, is handed to threads that all queues of the process share, and that exist from
//! the first such work until the last queue goes. So that a
//! blocking call never waits for a queue whose owner is elsewhere (or is the caller itself), threads that have to wait
//! for a claim poll the queues of the image, and of what shares files with it, meanwhile ([`crate::wait::Help`]). So does an
//! owner who waits for nothing but claims of others.

mod bell;
mod engine;
mod io;
mod pool;
#[cfg_attr(not(feature = "io_uring"), path = "no_ring.rs")]
mod ring;

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, IoOp, Result};
use crate::format::GuestOffset;
use crate::image::{Image, WriteFlags, ZeroFlags};
use crate::storage::{IoDst, IoSrc};
use crate::wait::Help;

use engine::{Core, DEPTH_MAX};
use io::QueueIo;

/// What performs the transfers of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// io_uring where it is to be had, threads otherwise.
    #[default]
    Auto,
    /// io_uring.
    IoUring,
    /// A few threads that make blocking calls.
    Threads,
}

/// What is to be done. Pieces stay valid, and unchanged by others, until the request has been reaped.
pub enum Request {
    /// As [`Image::read`].
    Read(Vec<IoDst<'static>>, GuestOffset),
    /// As [`Image::write`].
    Write(Vec<IoSrc<'static>>, GuestOffset, WriteFlags),
    /// As [`Image::flush`]: covers what had been reaped, or could have been, when it was submitted.
    Flush,
    /// As [`Image::write_zeroes`].
    WriteZeroes(GuestOffset, u64, ZeroFlags),
    /// As [`Image::discard`].
    Discard(GuestOffset, u64),
}

/// A request that has ended.
#[derive(Debug)]
pub struct Completion {
    /// The number that the request came with.
    pub user_data: u64,
    /// What the blocking call would have returned.
    pub result: Result<()>,
}

/// What became of an attempt to cancel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    /// It had not been submitted, and ends with [`Error::Cancelled`].
    Yes,
    /// It is under way, or has ended: it completes as if nobody had asked.
    TooLate,
    /// There is no such request.
    Unknown,
}

/// A queue. It belongs to one thread at a time; any number of queues and blocking calls may use one image at once.
///
/// Dropping it waits until every request that was submitted has ended.
pub struct Queue {
    core: Arc<Core>,
    ended: VecDeque<Completion>, // on its way to the owner; empty between calls, unless one has panicked
}

impl Queue {
    /// A queue of `depth` slots: so many requests may be between [`Queue::push`] and [`Queue::reap`].
    pub fn new(image: Arc<Image>, depth: u32, backend: Backend) -> Result<Self> {
        if !(1..=DEPTH_MAX).contains(&depth) {
            let expected = "1 to 4096 requests";
            return Err(Error::ArgumentValue { name: "depth", value: depth.to_string(), expected });
        }
        let io = QueueIo::new(depth, backend).map_err(|e| Error::io(IoOp::Open, 0, &e))?;
        let core = Arc::new(Core::new(image.clone(), io, depth));
        image.helpers().add(&(core.clone() as Arc<dyn Help>));
        Ok(Self { core, ended: VecDeque::new() })
    }

    /// What performs its transfers: never [`Backend::Auto`].
    pub fn backend(&self) -> Backend {
        self.core.backend()
    }

    /// Takes a request. Nothing happens before [`Queue::submit`]. Gives it back if all slots are taken.
    pub fn push(&mut self, request: Request, user_data: u64) -> std::result::Result<(), Request> {
        self.core.push(request, user_data)
    }

    /// Begins what was pushed; returns how many requests have ended and wait to be reaped.
    pub fn submit(&mut self) -> usize {
        self.core.submit()
    }

    /// Takes requests that have ended, at most `max`, oldest first, and hands each to `take`, which may use the image.
    /// Waits until at least `min` of them have (or all there are, or `timeout` is over). Returns how many. Pushed requests
    /// are submitted.
    pub fn reap(
        &mut self,
        max: usize,
        min: usize,
        timeout: Option<Duration>,
        take: impl FnMut(Completion),
    ) -> Result<usize> {
        self.core.reap(max, min, timeout, &mut self.ended)?;
        // Only now, when others can poll the queue: a call on the image may have to wait for its requests.
        let count = self.ended.len().min(max);
        std::iter::from_fn(|| self.ended.pop_front()).take(count).for_each(take);
        Ok(count)
    }

    /// A descriptor that becomes readable when there is something to reap, or something that can go on. It stays the
    /// queue's. It is made at the first call: who never asks for it never pays for it.
    pub fn fd(&mut self) -> Result<RawFd> {
        self.core.fd().map_err(|e| Error::io(IoOp::Open, 0, &e))
    }

    /// Tries to take back the first request with this number. See [`Cancelled`].
    pub fn cancel(&mut self, user_data: u64) -> Cancelled {
        self.core.cancel(user_data)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.core.drain();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{CreateOptions, OpenOptions, create_with};
    use crate::storage::Blocking;
    use crate::storage::memory::MemoryStorage;
    use crate::wait::block_on;

    /// A thread that was polling the queues of a handle, because it waited for one on another, could be the last to have
    /// that handle, and so close it: some time after its owner had let it go.
    #[test]
    fn who_helps_a_queue_does_not_keep_its_image() {
        let storage = Arc::new(MemoryStorage::default());
        block_on(create_with(&Blocking, &*storage, 1 << 20, &CreateOptions::default())).unwrap();
        let image = Arc::new(Image::open_storage(storage, &OpenOptions::default()).unwrap());
        let mut queue = Queue::new(image.clone(), 2, Backend::Threads).unwrap();
        assert!(queue.push(Request::Flush, 1).is_ok());
        queue.submit();
        let helper: Arc<dyn Help> = queue.core.clone();
        drop(queue);
        assert_eq!(Arc::strong_count(&image), 1);
        helper.help();
        assert!(!helper.is_busy());
    }
}
