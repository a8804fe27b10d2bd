//! Waiting without an executor: claims on ranges, and a driver that parks the calling thread. A leaf.
//!
//! The pipelines are `async` and know no executor. All waiting between requests happens on [`Claims`]: a request
//! claims a range, and of two overlapping claims the later one waits for the earlier. Claims are first come, first
//! served among those that overlap, so none starves; an entry leaves the list exactly once, when its [`Claim`] (or
//! the future that still waits for it) is dropped, and wakes those behind it (M8).

use std::future::Future;
use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::Duration;

/// Locks a mutex; a panic elsewhere has poisoned the image handle already and needs no second poison here.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Entry {
    id: u64,
    range: Range<u64>,
    waker: Option<Waker>,
}

#[derive(Default)]
struct List {
    entries: Vec<Entry>, // by id, which is the order of arrival
    next_id: u64,
}

impl List {
    fn position(&self, id: u64) -> Option<usize> {
        self.entries.binary_search_by_key(&id, |entry| entry.id).ok()
    }
}

/// Ranges that are claimed or waited for, in order of arrival.
#[derive(Default)]
pub struct Claims {
    list: Mutex<List>,
}

impl Claims {
    /// Claims `range` (not empty); ready once no earlier claim overlaps it.
    pub fn claim(&self, range: Range<u64>) -> ClaimFuture<'_> {
        debug_assert!(range.start < range.end);
        ClaimFuture { claims: self, range, id: None }
    }

    /// Claims everything there is: waits for all earlier claims, and all later ones wait.
    pub fn claim_all(&self) -> ClaimFuture<'_> {
        self.claim(0..u64::MAX)
    }

    /// Claims `range` (not empty) if no other claim, held or waited for, overlaps it.
    pub fn try_claim(&self, range: Range<u64>) -> Option<Claim<'_>> {
        let mut list = lock(&self.list);
        if list.entries.iter().any(|e| overlaps(&e.range, &range)) {
            return None;
        }
        let id = list.next_id;
        list.next_id += 1;
        list.entries.push(Entry { id, range, waker: None });
        Some(Claim { claims: self, id })
    }

    fn release(&self, id: u64) {
        let mut list = lock(&self.list);
        let Some(at) = list.position(id) else { return };
        let gone = list.entries.remove(at);
        for entry in &mut list.entries[at..] {
            if overlaps(&entry.range, &gone.range)
                && let Some(waker) = entry.waker.take()
            {
                waker.wake();
            }
        }
    }
}

fn overlaps(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// A claim that holds; dropping it releases the range.
pub struct Claim<'a> {
    claims: &'a Claims,
    id: u64,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.claims.release(self.id);
    }
}

/// A claim that waits for its turn.
pub struct ClaimFuture<'a> {
    claims: &'a Claims,
    range: Range<u64>,
    id: Option<u64>,
}

impl<'a> Future for ClaimFuture<'a> {
    type Output = Claim<'a>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Claim<'a>> {
        let claims = self.claims;
        let mut list = lock(&claims.list);
        let id = match self.id {
            Some(id) => id,
            None => {
                let id = list.next_id;
                list.next_id += 1;
                list.entries.push(Entry { id, range: self.range.clone(), waker: None });
                self.id = Some(id);
                id
            }
        };
        let Some(at) = list.position(id) else { unreachable!("a waiting claim is in the list until it is dropped") };
        if list.entries[..at].iter().any(|e| overlaps(&e.range, &self.range)) {
            list.entries[at].waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        list.entries[at].waker = None;
        drop(list);
        self.id = None; // from here on the guard owns the entry
        Poll::Ready(Claim { claims, id })
    }
}

impl Drop for ClaimFuture<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.claims.release(id);
        }
    }
}

/// Requests that are under way without a thread of their own, until somebody polls them.
pub trait Help: Send + Sync {
    /// Polls what can go on, unless somebody is about that already. Does not wait.
    fn help(&self);

    /// Whether requests are under way.
    fn is_busy(&self) -> bool;
}

/// Each leaves by being dropped.
#[derive(Default)]
struct HelpList {
    any: AtomicBool,
    list: Mutex<Vec<Weak<dyn Help>>>,
}

impl HelpList {
    fn add(&self, help: &Arc<dyn Help>) {
        let mut list = lock(&self.list);
        list.retain(|other| other.strong_count() > 0);
        list.push(Arc::downgrade(help));
        self.any.store(true, Ordering::SeqCst);
    }

    fn get(&self) -> Vec<Arc<dyn Help>> {
        if !self.any.load(Ordering::SeqCst) {
            return Vec::new();
        }
        lock(&self.list).iter().filter_map(Weak::upgrade).collect()
    }
}

/// Those whom a thread that has to wait may help meanwhile: what it waits for may be theirs, and their owner elsewhere,
/// or waiting itself, right here. Each handle has its own; handles that share something help those of all of them.
#[derive(Default)]
pub struct Helpers {
    own: HelpList,
    all: Arc<HelpList>,
}

impl Helpers {
    /// How often a waiting thread looks after them.
    const INTERVAL: Duration = Duration::from_micros(100);

    /// Those of another handle, which shares something with this one.
    pub fn of_another(&self) -> Self {
        Self { own: HelpList::default(), all: self.all.clone() }
    }

    /// Adds one, which leaves by being dropped.
    pub fn add(&self, help: &Arc<dyn Help>) {
        self.own.add(help);
        self.all.add(help);
    }

    /// Helps all that there are once, those of other handles too. `false`: there are none.
    pub fn help(&self) -> bool {
        let all = self.all.get();
        all.iter().for_each(|help| help.help());
        !all.is_empty()
    }

    /// Helps until none of this handle has a request under way.
    pub fn drain(&self) {
        while self.own.get().iter().any(|help| help.is_busy()) {
            self.help();
            std::thread::park_timeout(Self::INTERVAL);
        }
    }
}

struct Parker {
    thread: Thread,
    woken: AtomicBool,
}

impl Wake for Parker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

/// Drives a future to its end in the calling thread, which sleeps while another request has to finish first.
///
/// With inline I/O the future is ready at its first poll unless it waits for a claim; so that this common case costs
/// nothing, the waker that parks is only made at the second poll (a claim registers the waker of the latest poll).
#[inline]
pub fn block_on<F: Future>(future: F) -> F::Output {
    block_on_helping(future, &[])
}

/// As [`block_on`]; while the thread waits, it helps all of these.
#[inline]
pub fn block_on_helping<F: Future>(future: F, helpers: &[&Helpers]) -> F::Output {
    let mut future = pin!(future);
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => park_until_ready(future, helpers),
    }
}

#[cold]
fn park_until_ready<F: Future>(mut future: Pin<&mut F>, helpers: &[&Helpers]) -> F::Output {
    let parker = Arc::new(Parker { thread: std::thread::current(), woken: AtomicBool::new(true) });
    let waker = Waker::from(parker.clone());
    let mut context = Context::from_waker(&waker);
    loop {
        while !parker.woken.swap(false, Ordering::Acquire) {
            // What is waited for may be a request of a queue that did not exist before: asked each time. All of them
            // are, whatever the first has to say.
            if helpers.iter().filter(|helpers| helpers.help()).count() > 0 {
                std::thread::park_timeout(Helpers::INTERVAL);
            } else {
                std::thread::park();
            }
        }
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    fn poll<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
        Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn overlapping_claims_are_first_come_first_served() {
        let claims = Claims::default();
        let (mut a, mut b, mut c) = (claims.claim(0..4), claims.claim(2..6), claims.claim(5..8));
        let Poll::Ready(held) = poll(&mut a) else { panic!("nothing was before a") };
        assert!(poll(&mut b).is_pending());
        assert!(poll(&mut c).is_pending(), "c waits for b, although b only waits itself");
        drop(held);
        let Poll::Ready(held) = poll(&mut b) else { panic!("a is gone") };
        assert!(poll(&mut c).is_pending());
        drop(held);
        assert!(poll(&mut c).is_ready());
    }

    #[test]
    fn a_try_takes_what_nobody_wants() {
        let claims = Claims::default();
        let held = claims.try_claim(0..4).unwrap();
        assert!(claims.try_claim(3..5).is_none() && claims.try_claim(4..5).is_some());
        let mut waits = claims.claim(3..6);
        assert!(poll(&mut waits).is_pending());
        assert!(claims.try_claim(5..7).is_none(), "somebody waits for it");
        drop(held);
        assert!(poll(&mut waits).is_ready());
    }

    #[test]
    fn a_dropped_waiter_leaves_nothing_behind() {
        let claims = Claims::default();
        let Poll::Ready(held) = poll(&mut claims.claim(0..1)) else { panic!() };
        let mut waits = claims.claim_all();
        assert!(poll(&mut waits).is_pending());
        drop(waits);
        drop(held);
        assert!(lock(&claims.list).entries.is_empty());
    }

    #[test]
    fn threads_take_turns_and_lose_no_wake_up() {
        let claims = Claims::default();
        let inside = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for i in 0..2000u64 {
                        let claim = block_on(claims.claim(i % 3..i % 3 + 2));
                        if i % 3 == 0 {
                            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                            inside.fetch_sub(1, Ordering::SeqCst);
                        }
                        drop(claim);
                    }
                });
            }
        });
        assert!(lock(&claims.list).entries.is_empty());
    }
}
