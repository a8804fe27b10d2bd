//! A few threads that make blocking calls, for what io_uring cannot do, or where there is none; and those that compute,
//! of which all queues of the process share one set ([`processors`]).

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;

use crate::storage::{IoDst, IoSrc, Storage};
use crate::wait::lock;

/// Threads that make a queue's blocking calls, at most.
const IO_THREADS_MAX: usize = 4;

/// A call that a thread makes. What it points to stays valid until its outcome has been taken: see [`Job`].
#[derive(Clone, Copy)]
pub enum Call<'a> {
    /// As [`Storage::read`]; yields the bytes read.
    Read(&'a dyn Storage, &'a [IoDst<'a>], u64),
    /// As [`Storage::write_in_turn`].
    Write(&'a dyn Storage, &'a [IoSrc<'a>], u64),
    /// As [`Storage::flush`].
    Flush(&'a dyn Storage),
    /// As [`Storage::punch_hole`].
    PunchHole(&'a dyn Storage, u64, u64),
    /// One part, by its number, of what [`crate::storage::Io::compute`] was asked for.
    Compute(&'a (dyn Fn(usize) + Sync), usize),
}

impl Call<'_> {
    /// Makes the call.
    pub fn make(self) -> io::Result<usize> {
        match self {
            Self::Read(on, pieces, offset) => on.read(pieces, offset),
            Self::Write(on, pieces, offset) => on.write_in_turn(pieces, offset).map(|()| 0),
            Self::Flush(on) => on.flush().map(|()| 0),
            Self::PunchHole(on, offset, length) => on.punch_hole(offset, length).map(|()| 0),
            Self::Compute(work, part) => {
                work(part);
                Ok(0)
            }
        }
    }
}

struct Progress {
    left: usize, // calls that have not ended
    outcome: io::Result<usize>,
    waker: Option<Waker>,
    is_awaited: bool, // by a thread that sleeps
}

struct Ticket {
    progress: Mutex<Progress>,
    ended: Condvar,
}

struct Work {
    call: Call<'static>,
    ticket: Arc<Ticket>,
}

#[derive(Default)]
struct Queued {
    work: VecDeque<Work>,
    idle: usize,
    starting: usize, // threads that have not come to look for work yet
    closing: bool,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    queued: Mutex<Queued>,
    arrived: Condvar,
}

/// The threads, of which there are none before the first call. More are started as work arrives that the others are too
/// busy for.
pub struct Pool {
    shared: Arc<Shared>,
    threads_max: usize,
    name: &'static str,
}

/// Calls under way. Whoever drops it waits for their end: the calls use what the future borrows.
pub struct Job<'a> {
    ticket: Arc<Ticket>,
    _borrows: std::marker::PhantomData<&'a ()>,
}

/// The threads that compute, one for each processor: what the queues of this process share, while there are any.
pub fn processors() -> Arc<Pool> {
    static SHARED: Mutex<Weak<Pool>> = Mutex::new(Weak::new());
    let mut shared = lock(&SHARED);
    shared.upgrade().unwrap_or_else(|| {
        let threads_max = std::thread::available_parallelism().map_or(1, usize::from);
        let pool = Arc::new(Pool { shared: Arc::default(), threads_max, name: "qcow2-cpu" });
        *shared = Arc::downgrade(&pool);
        pool
    })
}

impl Pool {
    /// For the transfers of one queue.
    pub fn for_transfers() -> Self {
        Self { shared: Arc::default(), threads_max: IO_THREADS_MAX, name: "qcow2-io" }
    }

    /// Starts a call.
    pub fn start<'a>(&self, call: Call<'a>) -> Job<'a> {
        self.start_all(1, |_| call)
    }

    /// Starts as many calls, of which `of` makes each from its number.
    pub fn start_all<'a>(&self, count: usize, of: impl Fn(usize) -> Call<'a>) -> Job<'a> {
        let progress = Progress { left: count, outcome: Ok(0), waker: None, is_awaited: false };
        let ticket = Arc::new(Ticket { progress: Mutex::new(progress), ended: Condvar::new() });
        // SAFETY: only the lifetime changes. The threads use the call until its outcome is there, and `Job`, which
        // carries the true lifetime, does not go before that; it is never leaked, because it lives in a future that a
        // slot of the queue owns and drops.
        let forever = |call| unsafe { std::mem::transmute::<Call<'a>, Call<'static>>(call) };
        let mut queued = lock(&self.shared.queued);
        queued.work.extend((0..count).map(|part| Work { call: forever(of(part)), ticket: ticket.clone() }));
        let job = Job { ticket, _borrows: std::marker::PhantomData };
        while queued.idle + queued.starting < queued.work.len() && queued.threads.len() < self.threads_max {
            let shared = self.shared.clone();
            let thread = std::thread::Builder::new().name(self.name.into()).spawn(move || serve(&shared));
            let Ok(thread) = thread else { break };
            queued.threads.push(thread);
            queued.starting += 1;
        }
        let (idle, has_threads) = (queued.idle, !queued.threads.is_empty());
        drop(queued);
        for _ in 0..idle.min(count) {
            self.shared.arrived.notify_one(); // a system call each
        }
        if !has_threads {
            while self.help() {} // no thread can be had: the caller makes the calls
        }
        job
    }

    /// Whether there is a call that no thread has begun with.
    pub fn has_work(&self) -> bool {
        !lock(&self.shared.queued).work.is_empty()
    }

    /// Makes one of the calls that no thread has begun with. `false`: there is none.
    pub fn help(&self) -> bool {
        let work = lock(&self.shared.queued).work.pop_front();
        let found = work.is_some();
        work.into_iter().for_each(Work::run);
        found
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let threads = {
            let mut queued = lock(&self.shared.queued);
            queued.closing = true;
            std::mem::take(&mut queued.threads)
        };
        self.shared.arrived.notify_all();
        for thread in threads {
            // A thread that panicked has nothing left to say.
            let _ = thread.join();
        }
    }
}

fn serve(shared: &Shared) {
    let mut queued = lock(&shared.queued);
    queued.starting -= 1;
    loop {
        if let Some(work) = queued.work.pop_front() {
            drop(queued);
            work.run();
            queued = lock(&shared.queued);
        } else if queued.closing {
            return;
        } else {
            queued.idle += 1;
            queued = shared.arrived.wait(queued).unwrap_or_else(PoisonError::into_inner);
            queued.idle -= 1;
        }
    }
}

impl Work {
    fn run(self) {
        // A storage whose callback panics must not leave its request waiting for ever.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.call.make()))
            .unwrap_or_else(|_| Err(io::Error::from_raw_os_error(libc::EIO)));
        let waker = {
            let mut progress = lock(&self.ticket.progress);
            if progress.outcome.is_ok() {
                progress.outcome = outcome;
            }
            progress.left -= 1;
            if progress.left > 0 {
                return;
            }
            if progress.is_awaited {
                self.ticket.ended.notify_all();
            }
            progress.waker.take()
        };
        waker.into_iter().for_each(Waker::wake);
    }
}

impl Future for Job<'_> {
    type Output = io::Result<usize>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut progress = lock(&self.ticket.progress);
        if progress.left == 0 {
            return Poll::Ready(std::mem::replace(&mut progress.outcome, Ok(0)));
        }
        progress.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        let mut progress = lock(&self.ticket.progress);
        progress.is_awaited = true;
        while progress.left > 0 {
            progress = self.ticket.ended.wait(progress).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;
    use crate::wait::block_on;

    #[test]
    fn each_part_is_computed_once_and_what_they_use_is_theirs_until_then() {
        let pool = processors();
        for count in [1, 2, 7, 300] {
            let done: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            let work = |part: usize| {
                done[part].fetch_add(1, Ordering::Relaxed);
            };
            block_on(pool.start_all(count, |part| Call::Compute(&work, part))).unwrap();
            assert!(done.iter().all(|times| times.load(Ordering::Relaxed) == 1), "{count}");
            // One that nobody waits for has ended when it goes, however much of it others have begun.
            let slow = |part: usize| {
                std::thread::sleep(Duration::from_micros(300));
                work(part);
            };
            drop(pool.start_all(count, |part| Call::Compute(&slow, part)));
            assert!(done.iter().all(|times| times.load(Ordering::Relaxed) == 2), "{count}, dropped");
        }
        let threads = lock(&pool.shared.queued).threads.len();
        assert!((1..=pool.threads_max).contains(&threads), "{threads} threads");
        assert!(Arc::ptr_eq(&pool, &processors()), "they are shared");
    }

    #[test]
    fn a_panic_is_told_when_all_parts_have_ended() {
        let pool = processors();
        let ended = AtomicUsize::new(0);
        let work = |part: usize| {
            assert!(part != 3, "of the test");
            ended.fetch_add(1, Ordering::Relaxed);
        };
        assert!(block_on(pool.start_all(20, |part| Call::Compute(&work, part))).is_err());
        assert_eq!(ended.load(Ordering::Relaxed), 19);
        assert!(block_on(pool.start_all(1, |_| Call::Compute(&work, 0))).is_ok(), "the thread goes on");
    }
}
