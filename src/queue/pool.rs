//! A few threads that make blocking calls, for what io_uring cannot do, or where there is none.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;

use crate::storage::{IoDst, IoSrc, Storage};
use crate::wait::lock;

/// Threads of a pool. They are started as work arrives that the others are too busy for.
const THREADS_MAX: usize = 4;

/// A call that a thread makes. What it points to stays valid until its outcome has been taken: see [`Job`].
#[derive(Clone, Copy)]
pub enum Call<'a> {
    /// As [`Storage::read`]; yields the bytes read.
    Read(&'a dyn Storage, &'a [IoDst<'a>], u64),
    /// As [`Storage::write`].
    Write(&'a dyn Storage, &'a [IoSrc<'a>], u64),
    /// As [`Storage::flush`].
    Flush(&'a dyn Storage),
    /// As [`Storage::punch_hole`].
    PunchHole(&'a dyn Storage, u64, u64),
}

impl Call<'_> {
    /// Makes the call.
    pub fn make(self) -> io::Result<usize> {
        match self {
            Self::Read(on, pieces, offset) => on.read(pieces, offset),
            Self::Write(on, pieces, offset) => on.write(pieces, offset).map(|()| 0),
            Self::Flush(on) => on.flush().map(|()| 0),
            Self::PunchHole(on, offset, length) => on.punch_hole(offset, length).map(|()| 0),
        }
    }
}

#[derive(Default)]
struct Progress {
    outcome: Option<io::Result<usize>>,
    waker: Option<Waker>,
}

#[derive(Default)]
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
    closing: bool,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    queued: Mutex<Queued>,
    arrived: Condvar,
}

/// The threads, of which there are none before the first call.
#[derive(Default)]
pub struct Pool {
    shared: Arc<Shared>,
}

/// A call under way. Whoever drops it waits for its end: the call uses what the future borrows.
pub struct Job<'a> {
    ticket: Arc<Ticket>,
    _borrows: std::marker::PhantomData<&'a ()>,
}

impl Pool {
    /// Starts a call.
    pub fn start<'a>(&self, call: Call<'a>) -> Job<'a> {
        let ticket = Arc::new(Ticket::default());
        // SAFETY: only the lifetime changes. The threads use the call until its outcome is there, and `Job`, which
        // carries the true lifetime, does not go before that; it is never leaked, because it lives in a future that a
        // slot of the queue owns and drops.
        let call = unsafe { std::mem::transmute::<Call<'a>, Call<'static>>(call) };
        let mut queued = lock(&self.shared.queued);
        queued.work.push_back(Work { call, ticket: ticket.clone() });
        if queued.idle < queued.work.len() && queued.threads.len() < THREADS_MAX {
            let shared = self.shared.clone();
            let thread = std::thread::Builder::new().name("qcow2-io".into()).spawn(move || serve(&shared));
            queued.threads.extend(thread);
        }
        let has_threads = !queued.threads.is_empty();
        drop(queued);
        if has_threads {
            self.shared.arrived.notify_one();
        } else {
            serve_one(&self.shared); // no thread can be had: the caller makes the call
        }
        Job { ticket, _borrows: std::marker::PhantomData }
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

fn serve_one(shared: &Shared) {
    let work = lock(&shared.queued).work.pop_front();
    work.into_iter().for_each(Work::run);
}

impl Work {
    fn run(self) {
        // A storage whose callback panics must not leave its request waiting for ever.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.call.make()))
            .unwrap_or_else(|_| Err(io::Error::from_raw_os_error(libc::EIO)));
        let waker = {
            let mut progress = lock(&self.ticket.progress);
            progress.outcome = Some(outcome);
            progress.waker.take()
        };
        self.ticket.ended.notify_all();
        waker.into_iter().for_each(Waker::wake);
    }
}

impl Future for Job<'_> {
    type Output = io::Result<usize>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut progress = lock(&self.ticket.progress);
        match &mut progress.outcome {
            Some(outcome) => Poll::Ready(std::mem::replace(outcome, Ok(0))),
            None => {
                progress.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        let mut progress = lock(&self.ticket.progress);
        while progress.outcome.is_none() {
            progress = self.ticket.ended.wait(progress).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
