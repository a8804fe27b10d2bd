//! Epochs: when has every request finished that could still hold a host offset?
//!
//! A request pins the current epoch before it looks anything up and unpins when its I/O is done (M1). Whoever removed
//! a reference asks for the epoch afterwards ([`Epochs::removed_at`]); once [`Epochs::has_passed`] holds for it, no
//! request that could have seen the reference is left, and the cluster may be overwritten, punched or handed out.
//!
//! Pins are counted by the parity of their epoch, in shards, so that threads do not share a line. The epoch moves
//! from e to e+1 only when no pin of the other parity, (e+1) & 1, is left. Two moves that both began after the removal
//! have therefore each seen one of the parities empty, and so each older pin gone, even one whose thread was delayed
//! between reading the epoch and counting itself. The first move that is seen may have begun before: hence three.
//!
//! Most of the time nobody waits for an epoch. Whoever has to ([`Epochs::passed`]) holds no pin, and requests that end
//! look whether somebody waits. A pinned request waits for nothing but I/O, so no circle can close.

use std::cell::Cell;
use std::future::poll_fn;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::task::{Poll, Waker};

use crate::wait::lock;

const SHARDS: usize = 16;
const MOVES: u64 = 3;

#[repr(align(128))]
#[derive(Default)]
struct Shard {
    pins: [AtomicU64; 2],
}

/// The epochs of one image.
#[derive(Default)]
pub struct Epochs {
    epoch: AtomicU64,
    has_waiters: AtomicBool,
    waiters: Mutex<Vec<Waker>>,
    shards: [Shard; SHARDS],
}

/// A request that is under way.
pub struct Pin<'a> {
    epochs: &'a Epochs,
    count: &'a AtomicU64,
}

impl Drop for Pin<'_> {
    #[inline]
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::SeqCst);
        fence_after_locked_add();
        if self.epochs.has_waiters.load(Ordering::Relaxed) {
            self.epochs.wake_waiters();
        }
    }
}

/// A full fence after an atomic addition, which on x86 is one already.
#[inline]
fn fence_after_locked_add() {
    if cfg!(not(target_arch = "x86_64")) {
        fence(Ordering::SeqCst);
    }
}

fn shard_of_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static SHARD: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    SHARD.with(|shard| {
        if shard.get() == usize::MAX {
            shard.set(NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS);
        }
        shard.get()
    })
}

impl Epochs {
    /// Pins the current epoch.
    #[inline]
    pub fn pin(&self) -> Pin<'_> {
        let parity = (self.epoch.load(Ordering::Relaxed) & 1) as usize;
        let count = &self.shards[shard_of_thread()].pins[parity];
        count.fetch_add(1, Ordering::SeqCst);
        fence_after_locked_add(); // counted before anything is looked up
        Pin { epochs: self, count }
    }

    /// The epoch of a removal that has just been made visible.
    pub fn removed_at(&self) -> u64 {
        fence(Ordering::SeqCst);
        self.epoch.load(Ordering::SeqCst)
    }

    /// Whether all requests are done that were under way when something was removed at `epoch`.
    pub fn has_passed(&self, epoch: u64) -> bool {
        self.epoch.load(Ordering::SeqCst) >= epoch + MOVES
    }

    /// Waits until [`Epochs::has_passed`] holds. The caller holds no pin.
    pub async fn passed(&self, epoch: u64) {
        poll_fn(|context| {
            if !self.has_passed(epoch) {
                lock(&self.waiters).push(context.waker().clone());
                // Announced before the last look: a request that ends after it sees the announcement.
                self.has_waiters.store(true, Ordering::SeqCst);
                self.advance();
            }
            if self.has_passed(epoch) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    #[cold]
    fn wake_waiters(&self) {
        self.advance();
        let waiters = {
            let mut waiters = lock(&self.waiters);
            self.has_waiters.store(false, Ordering::SeqCst);
            std::mem::take(&mut *waiters)
        };
        waiters.into_iter().for_each(Waker::wake);
    }

    /// Moves the epoch on as far as the requests under way allow.
    pub fn advance(&self) {
        for _ in 0..MOVES {
            fence(Ordering::SeqCst);
            let epoch = self.epoch.load(Ordering::SeqCst);
            let parity = ((epoch + 1) & 1) as usize;
            if self.shards.iter().any(|s| s.pins[parity].load(Ordering::SeqCst) != 0) {
                return;
            }
            // Somebody else may have moved it: then that move counts.
            let _ = self.epoch.compare_exchange(epoch, epoch + 1, Ordering::SeqCst, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removal_waits_for_the_requests_that_could_have_seen_it() {
        let epochs = Epochs::default();
        let reader = epochs.pin();
        let removed = epochs.removed_at();
        for _ in 0..5 {
            epochs.advance();
            drop(epochs.pin()); // later requests come and go
            assert!(!epochs.has_passed(removed));
        }
        drop(reader);
        epochs.advance();
        assert!(epochs.has_passed(removed));
    }

    #[test]
    fn who_waits_for_an_epoch_is_woken_by_the_last_request() {
        let epochs = Epochs::default();
        for _ in 0..500 {
            std::thread::scope(|scope| {
                let pins = [epochs.pin(), epochs.pin()];
                let removed = epochs.removed_at();
                let waiter = scope.spawn({
                    let epochs = &epochs;
                    move || crate::wait::block_on(epochs.passed(removed))
                });
                for pin in pins {
                    scope.spawn(move || drop(pin));
                }
                waiter.join().unwrap();
            });
        }
    }

    #[test]
    fn readers_never_hold_what_was_handed_out_again() {
        use std::sync::atomic::AtomicBool;
        let (epochs, slot, stop) = (Epochs::default(), AtomicU64::new(1), AtomicBool::new(false));
        let freed: Vec<AtomicBool> = (0..20_000).map(|_| AtomicBool::new(false)).collect();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let _pin = epochs.pin();
                        let seen = slot.load(Ordering::Acquire);
                        std::hint::spin_loop();
                        assert!(!freed[seen as usize].load(Ordering::SeqCst), "{seen} was freed under a reader");
                    }
                });
            }
            let mut pending = Vec::new();
            for next in 2..20_000u64 {
                let old = slot.swap(next, Ordering::AcqRel);
                pending.push((old, epochs.removed_at()));
                epochs.advance();
                pending.retain(|&(old, at)| {
                    let passed = epochs.has_passed(at);
                    freed[old as usize].fetch_or(passed, Ordering::SeqCst);
                    !passed
                });
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
