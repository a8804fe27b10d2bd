//! The driver of a pipeline under simulation, and the scheduler of many.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use super::Rng;
use super::disk::SimDisk;
use crate::storage::{Io, IoDst, IoSrc, Storage};

/// Drives pipelines over simulated disks: each transfer takes effect at a seeded poll of its future, and is reported
/// at a later one. Storages that are not among the disks (backing files) are read and written just the same.
#[derive(Debug)]
pub struct SimIo {
    disks: Vec<Arc<SimDisk>>,
    rng: Mutex<Rng>,
    pauses_max: u64,
    transfers: AtomicU64,
}

impl SimIo {
    /// A driver. Each transfer is pending up to `pauses_max` times before and after it takes effect.
    pub fn new(seed: u64, pauses_max: u64, disks: Vec<Arc<SimDisk>>) -> Self {
        Self { disks, rng: Mutex::new(Rng::new(seed)), pauses_max, transfers: AtomicU64::new(0) }
    }

    /// Writes and flushes that went to one of the disks so far.
    pub fn transfers(&self) -> u64 {
        self.transfers.load(Ordering::Relaxed)
    }

    fn disk(&self, on: &dyn Storage) -> Option<&SimDisk> {
        let wanted = std::ptr::from_ref(on).cast::<()>();
        let disk = self.disks.iter().find(|disk| Arc::as_ptr(disk).cast::<()>() == wanted)?;
        self.transfers.fetch_add(1, Ordering::Relaxed);
        Some(disk)
    }

    async fn pause(&self) {
        let mut left = self.rng.lock().unwrap_or_else(PoisonError::into_inner).below(self.pauses_max + 1);
        poll_fn(move |cx: &mut Context<'_>| {
            if left == 0 {
                return Poll::Ready(());
            }
            left -= 1;
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }
}

impl Io for SimIo {
    async fn read(&self, on: &dyn Storage, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        self.pause().await;
        let outcome = on.read(pieces, offset);
        self.pause().await;
        outcome
    }

    async fn write(&self, on: &dyn Storage, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        let Some(disk) = self.disk(on) else { return on.write(pieces, offset) };
        self.pause().await;
        let outcome = disk.begin_write(pieces, offset);
        self.pause().await;
        disk.complete(outcome?);
        Ok(())
    }

    async fn flush(&self, on: &dyn Storage) -> io::Result<()> {
        let Some(disk) = self.disk(on) else { return on.flush() };
        self.pause().await;
        let token = disk.begin_flush();
        self.pause().await;
        disk.end_flush(token)
    }

    async fn punch_hole(&self, on: &dyn Storage, offset: u64, length: u64) -> io::Result<()> {
        let Some(disk) = self.disk(on) else { return on.punch_hole(offset, length) };
        self.pause().await;
        let outcome = disk.begin_punch(offset, length);
        self.pause().await;
        disk.complete(outcome?);
        Ok(())
    }

    async fn compute(&self, parts: usize, _part_micros: u64, work: &(dyn Fn(usize) + Sync)) {
        self.pause().await;
        (0..parts).for_each(work);
        self.pause().await;
    }
}

/// A task that a [`Scheduler`] runs.
pub type Task<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// No task can run and some are not done: a wake-up was lost, or requests wait for each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stuck {
    /// Indices of the tasks that are not done.
    pub tasks: Vec<usize>,
}

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// Runs tasks on one thread. Only a task that was woken is polled, and which one is decided by the seed.
#[derive(Debug)]
pub struct Scheduler {
    rng: Rng,
}

impl Scheduler {
    /// A scheduler with its own sequence of decisions.
    pub fn new(seed: u64) -> Self {
        Self { rng: Rng::new(seed) }
    }

    /// Runs all tasks to their end, and calls `after_step` after each poll.
    pub fn run<T>(&mut self, tasks: Vec<Task<'_, T>>, mut after_step: impl FnMut()) -> Result<Vec<T>, Stuck> {
        let mut slots: Vec<Option<Task<'_, T>>> = tasks.into_iter().map(Some).collect();
        let flags: Vec<Arc<Flag>> = slots.iter().map(|_| Arc::new(Flag(AtomicBool::new(true)))).collect();
        let mut results: Vec<Option<T>> = slots.iter().map(|_| None).collect();
        let mut ready = Vec::new();
        // Half of the runs are even-handed. In the others the task of the highest rank runs until, now and then, it
        // falls behind all others: that is how a request stays in flight while several others come and go.
        let ranked = self.rng.one_in(2);
        let mut ranks: Vec<u64> = slots.iter().map(|_| self.rng.next_u64() | 1 << 63).collect();
        let mut lowest = 1 << 62;
        while slots.iter().any(Option::is_some) {
            ready.clear();
            ready.extend((0..slots.len()).filter(|&i| slots[i].is_some() && flags[i].0.load(Ordering::Acquire)));
            if ready.is_empty() {
                return Err(Stuck { tasks: (0..slots.len()).filter(|&i| slots[i].is_some()).collect() });
            }
            let mut chosen = ready[self.rng.below(ready.len() as u64) as usize];
            if ranked {
                chosen = ready.iter().copied().max_by_key(|&i| ranks[i]).unwrap_or(chosen);
                if self.rng.one_in(12) {
                    lowest -= 1;
                    ranks[chosen] = lowest;
                }
            }
            flags[chosen].0.store(false, Ordering::Release);
            let waker = Waker::from(flags[chosen].clone());
            let task = slots[chosen].as_mut().expect("only tasks that are not done are ready");
            if let Poll::Ready(value) = task.as_mut().poll(&mut Context::from_waker(&waker)) {
                results[chosen] = Some(value);
                slots[chosen] = None;
            }
            after_step();
        }
        Ok(results.into_iter().map(|r| r.expect("all tasks are done")).collect())
    }

    /// Runs one future to its end.
    pub fn run_one<'a, T: 'a>(
        &mut self,
        task: impl Future<Output = T> + 'a,
        after_step: impl FnMut(),
    ) -> Result<T, Stuck> {
        let mut results = self.run(vec![Box::pin(task) as Task<'a, T>], after_step)?;
        Ok(results.remove(0))
    }
}
