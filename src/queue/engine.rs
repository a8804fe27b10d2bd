//! The inside of a queue: slots, the pipelines in them, and who polls them when.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::bell::{Bell, EventFd, waker};
use super::io::QueueIo;
use super::{Backend, Cancelled, Completion, Request};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::wait::{Help, lock};

/// Most slots of a queue.
pub const DEPTH_MAX: u32 = 4096;
/// An owner who waits for nothing but claims of others, or drops the queue, polls other queues as often.
const HELP_INTERVAL: Duration = Duration::from_micros(200);

/// What the engine and the pipeline in a slot hand each other.
#[derive(Default)]
struct Slot {
    request: Mutex<Option<Request>>,
    outcome: Mutex<Option<Result<()>>>,
}

/// A slot as the engine sees it. Its pipeline is made once, at the first request, and runs one request after the other.
struct Task {
    slot: Arc<Slot>,
    pipeline: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    waker: Waker,
    user_data: u64,
}

struct Engine {
    tasks: Vec<Task>,
    free: Vec<u32>,
    pushed: Vec<u32>, // not submitted
    under_way: usize,
    done: VecDeque<(u32, Result<()>)>,
    woken: Vec<u32>,
}

/// A queue without its owner: the threads that help hold it too.
pub struct Core {
    image: Mutex<Option<Arc<Image>>>, // until the queue is drained: those who help must not be the last to have it
    io: Arc<QueueIo>,
    bell: Arc<Bell>,
    engine: Mutex<Engine>,
}

/// Runs one request after the other, as they come to the slot.
async fn serve(image: Arc<Image>, io: Arc<QueueIo>, slot: Arc<Slot>) {
    loop {
        // The engine polls whatever it has put a request in: there is nobody to be woken by.
        let request = poll_fn(|_| lock(&slot.request).take().map_or(Poll::Pending, Poll::Ready)).await;
        let result = run(&image, &io, &request).await;
        *lock(&slot.outcome) = Some(result);
    }
}

async fn run(image: &Image, io: &QueueIo, request: &Request) -> Result<()> {
    match request {
        Request::Read(pieces, at) => image.read_with(io, pieces, *at).await,
        Request::Write(pieces, at, flags) => image.write_with(io, pieces, *at, *flags).await,
        Request::Flush => image.flush_with(io).await,
        Request::WriteZeroes(at, length, flags) => image.write_zeroes_with(io, *at, *length, *flags).await,
        Request::Discard(at, length) => image.discard_with(io, *at, *length).await,
    }
}

impl Core {
    /// A queue of `depth` slots.
    pub fn new(image: Arc<Image>, io: QueueIo, depth: u32) -> Self {
        let bell = Arc::new(Bell::new(depth));
        let task = |slot| Task { slot: Arc::default(), pipeline: None, waker: waker(&bell, slot), user_data: 0 };
        let engine = Engine {
            tasks: (0..depth).map(task).collect(),
            free: (0..depth).rev().collect(),
            pushed: Vec::new(),
            under_way: 0,
            done: VecDeque::new(),
            woken: Vec::new(),
        };
        Self { image: Mutex::new(Some(image)), io: Arc::new(io), bell, engine: Mutex::new(engine) }
    }

    fn image(&self) -> Option<Arc<Image>> {
        lock(&self.image).clone()
    }

    /// See [`super::Queue::backend`].
    pub fn backend(&self) -> Backend {
        self.io.backend()
    }

    /// See [`super::Queue::push`].
    pub fn push(&self, request: Request, user_data: u64) -> std::result::Result<(), Request> {
        let mut engine = lock(&self.engine);
        let Some(slot) = engine.free.pop() else { return Err(request) };
        let task = &mut engine.tasks[slot as usize];
        task.user_data = user_data;
        *lock(&task.slot.request) = Some(request);
        engine.pushed.push(slot);
        Ok(())
    }

    /// See [`super::Queue::submit`].
    pub fn submit(&self) -> usize {
        let mut engine = lock(&self.engine);
        self.start_pushed(&mut engine);
        self.io.submit();
        if !engine.done.is_empty() {
            self.bell.tell_owner();
        }
        engine.done.len()
    }

    fn start_pushed(&self, engine: &mut Engine) {
        self.bell.begin();
        let pushed = std::mem::take(&mut engine.pushed);
        engine.under_way += pushed.len();
        for &slot in &pushed {
            self.poll(engine, slot);
        }
        engine.pushed = pushed;
        engine.pushed.clear();
        self.go_on(engine);
    }

    /// Polls what can go on, until nothing can; then hands the transfers that were started to the kernel.
    fn drive(&self, engine: &mut Engine) {
        self.go_on(engine);
        self.io.submit();
    }

    /// Polls what can go on, until nothing can. The transfers that were started are the caller's to hand to the kernel: who
    /// sleeps then does both in one call.
    fn go_on(&self, engine: &mut Engine) {
        self.bell.begin();
        self.io.collect();
        let mut woken = std::mem::take(&mut engine.woken);
        while self.bell.take(&mut woken) {
            for &slot in &woken {
                self.poll(engine, slot);
            }
            woken.clear();
            self.io.collect();
        }
        engine.woken = woken;
    }

    fn poll(&self, engine: &mut Engine, slot: u32) {
        let Some(task) = engine.tasks.get_mut(slot as usize) else { return }; // the queue is gone
        let pipeline = match &mut task.pipeline {
            Some(pipeline) => pipeline,
            none => {
                let Some(image) = self.image() else { return };
                none.insert(Box::pin(serve(image, self.io.clone(), task.slot.clone())))
            }
        };
        let mut context = Context::from_waker(&task.waker);
        if catch_unwind(AssertUnwindSafe(|| pipeline.as_mut().poll(&mut context))).is_err() {
            self.image().inspect(|image| image.poison("a bug in the library: a request of a queue panicked"));
            task.pipeline = None;
            *lock(&task.slot.outcome) = Some(Err(Error::Poisoned { why: "a request of a queue panicked" }));
        }
        if let Some(result) = lock(&task.slot.outcome).take() {
            engine.under_way -= 1;
            engine.done.push_back((slot, result));
        }
    }

    /// Adds what has ended to `ended`, until there are `max`. See [`super::Queue::reap`].
    pub fn reap(
        &self,
        max: usize,
        min: usize,
        timeout: Option<Duration>,
        ended: &mut VecDeque<Completion>,
    ) -> Result<()> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut engine = lock(&self.engine);
        self.bell.owner.get().into_iter().for_each(EventFd::clear);
        self.start_pushed(&mut engine);
        loop {
            while ended.len() < max
                && let Some((slot, result)) = engine.done.pop_front()
            {
                let user_data = engine.tasks[slot as usize].user_data;
                engine.free.push(slot);
                ended.push_back(Completion { user_data, result });
            }
            let is_over = deadline.is_some_and(|at| Instant::now() >= at);
            if ended.len() >= min.min(max) || engine.under_way == 0 || is_over {
                break;
            }
            if deadline.is_none() && self.io.has_to_compute() {
                // Who would sleep, for however long it takes, computes instead: one thread less to be woken.
                self.io.submit();
                self.io.help_compute();
            } else if self.io.is_idle() {
                // All that is under way waits for requests elsewhere: in queues, perhaps, whose owner is this thread too.
                self.image().inspect(|image| _ = image.helpers().help());
                let soon = Instant::now() + HELP_INTERVAL;
                self.sleep(Some(deadline.map_or(soon, |at| at.min(soon))))?;
            } else {
                self.sleep(deadline)?;
            }
            self.go_on(&mut engine);
        }
        self.io.submit();
        if !engine.done.is_empty() {
            self.bell.tell_owner();
        }
        Ok(())
    }

    fn sleep(&self, deadline: Option<Instant>) -> Result<()> {
        if self.backend() == Backend::IoUring && self.bell.sleeper.get().is_none() {
            let made = EventFd::new().map_err(|e| Error::io(crate::error::IoOp::Open, 0, &e))?;
            let _ = self.bell.sleeper.set(made); // nobody else makes one: the engine is locked
        }
        if self.bell.lie_down() {
            self.io.sleep(&self.bell, deadline);
            self.bell.get_up();
        }
        Ok(())
    }

    /// See [`super::Queue::fd`].
    pub fn fd(&self) -> io::Result<RawFd> {
        let engine = lock(&self.engine);
        if self.bell.owner.get().is_none() {
            let event = EventFd::new()?;
            self.io.signal_at_completions(&event)?;
            let _ = self.bell.owner.set(event); // nobody else makes one: the engine is locked
        }
        if !engine.done.is_empty() || engine.under_way > 0 {
            self.bell.tell_owner(); // what came before there was a descriptor
        }
        Ok(self.bell.owner.get().map_or(-1, EventFd::raw))
    }

    /// See [`super::Queue::cancel`].
    pub fn cancel(&self, user_data: u64) -> Cancelled {
        let mut engine = lock(&self.engine);
        let is_it = |engine: &Engine, slot: u32| engine.tasks[slot as usize].user_data == user_data;
        if let Some(at) = engine.pushed.iter().position(|&slot| is_it(&engine, slot)) {
            let slot = engine.pushed.remove(at);
            lock(&engine.tasks[slot as usize].slot.request).take();
            engine.done.push_back((slot, Err(Error::Cancelled)));
            self.bell.tell_owner();
            return Cancelled::Yes;
        }
        let depth = engine.tasks.len() as u32;
        let known = (0..depth).any(|slot| !engine.free.contains(&slot) && is_it(&engine, slot));
        if known { Cancelled::TooLate } else { Cancelled::Unknown }
    }

    /// Waits until nothing is under way. What was pushed and not submitted is dropped; what has ended is not handed
    /// out any more.
    pub fn drain(&self) {
        loop {
            let mut engine = lock(&self.engine);
            engine.pushed.clear();
            self.drive(&mut engine);
            if engine.under_way == 0 {
                engine.tasks.clear(); // with their pipelines, which hold the image
                drop(engine);
                drop(lock(&self.image).take());
                return;
            }
            let deadline = Instant::now() + HELP_INTERVAL;
            if self.sleep(Some(deadline)).is_err() {
                std::thread::sleep(HELP_INTERVAL);
            }
            drop(engine);
            self.image().inspect(|image| _ = image.helpers().help());
        }
    }
}

impl Help for Core {
    fn help(&self) {
        if let Ok(mut engine) = self.engine.try_lock() {
            self.drive(&mut engine);
            if !engine.done.is_empty() {
                self.bell.tell_owner();
            }
        }
    }

    fn is_busy(&self) -> bool {
        self.engine.try_lock().map_or(true, |engine| engine.under_way > 0)
    }
}
