//! Who can go on, and how a queue's owner learns of it: slots that were woken, and the ways to wake a sleeper.
//!
//! Whoever drives the queue takes the woken slots and polls them until none is left. A slot that is woken while nobody
//! drives rings the bell: an owner that sleeps in `reap` wakes up, and the descriptor that it may be polling becomes
//! readable.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::task::{Wake, Waker};
use std::time::Instant;

use crate::wait::lock;

/// A counter in the kernel that can be polled for.
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
}

impl EventFd {
    /// One that is not readable.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that was just made, and that nobody else has.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Its number.
    pub fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Makes it readable.
    pub fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight readable bytes. It fails only when the counter is full: then it is readable anyway.
        unsafe { libc::write(self.raw(), one.as_ptr().cast(), one.len()) };
    }

    /// Makes it unreadable.
    pub fn clear(&self) {
        let mut count = [0u8; 8];
        // SAFETY: eight writable bytes. It fails only when the counter is 0: then it is unreadable anyway.
        unsafe { libc::read(self.raw(), count.as_mut_ptr().cast(), count.len()) };
    }
}

#[derive(Default)]
struct State {
    ready: Vec<u32>,   // slots that were woken
    queued: Vec<bool>, // by slot: it is in `ready`
    is_driven: bool,   // somebody is polling: what is woken now is polled before that ends
    sleeps: bool,      // the owner sleeps, or is about to
    has_rung: bool,    // and was woken by its descriptor
}

/// See the module text.
#[derive(Default)]
pub struct Bell {
    state: Mutex<State>,
    awake: Condvar,
    /// What an owner that sleeps in io_uring is woken by.
    pub sleeper: OnceLock<EventFd>,
    /// What the owner polls outside of the queue.
    pub owner: OnceLock<EventFd>,
}

impl Bell {
    /// A bell of `slots` slots.
    pub fn new(slots: u32) -> Self {
        let bell = Self::default();
        lock(&bell.state).queued = vec![false; slots as usize];
        bell
    }

    /// Notes that a slot can go on, and rings unless somebody is polling already.
    pub fn wake(&self, slot: u32) {
        let mut state = lock(&self.state);
        if std::mem::replace(&mut state.queued[slot as usize], true) {
            return;
        }
        state.ready.push(slot);
        let (is_driven, sleeps) = (state.is_driven, state.sleeps);
        state.has_rung |= sleeps;
        drop(state);
        if sleeps {
            self.awake.notify_all();
            self.sleeper.get().into_iter().for_each(EventFd::signal);
        }
        if !is_driven {
            self.tell_owner();
        }
    }

    /// Makes the owner's descriptor readable, if it has one.
    pub fn tell_owner(&self) {
        self.owner.get().into_iter().for_each(EventFd::signal);
    }

    /// The caller is going to poll, until [`Bell::take`] finds nothing.
    pub fn begin(&self) {
        lock(&self.state).is_driven = true;
    }

    /// Takes the slots that were woken into `slots`, which is empty. `false`: there are none, and the caller stops
    /// polling; until then it is the one who polls.
    pub fn take(&self, slots: &mut Vec<u32>) -> bool {
        let mut state = lock(&self.state);
        std::mem::swap(&mut state.ready, slots);
        for &slot in &*slots {
            state.queued[slot as usize] = false;
        }
        state.is_driven = !slots.is_empty();
        state.is_driven
    }

    /// Announces that the owner is going to sleep. `false`: there is something to do first.
    pub fn lie_down(&self) -> bool {
        let mut state = lock(&self.state);
        state.sleeps = state.ready.is_empty();
        state.sleeps
    }

    /// The owner is awake again.
    pub fn get_up(&self) {
        let mut state = lock(&self.state);
        state.sleeps = false;
        if std::mem::take(&mut state.has_rung) {
            drop(state);
            self.sleeper.get().into_iter().for_each(EventFd::clear);
        }
    }

    /// Sleeps until a slot is woken, or until `deadline`.
    pub fn sleep(&self, deadline: Option<Instant>) {
        let mut state = lock(&self.state);
        while state.ready.is_empty() {
            state = match deadline.map(|at| at.saturating_duration_since(Instant::now())) {
                None => self.awake.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(left) if left.is_zero() => return,
                Some(left) => self.awake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
    }
}

struct SlotWaker {
    bell: Arc<Bell>,
    slot: u32,
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        self.bell.wake(self.slot);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.bell.wake(self.slot);
    }
}

/// The waker of a slot.
pub fn waker(bell: &Arc<Bell>, slot: u32) -> Waker {
    Waker::from(Arc::new(SlotWaker { bell: bell.clone(), slot }))
}
