//! What a handle may still do: one word that every call looks at, and why it says no.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::wait::lock;

/// Opened for reading.
pub const READ_ONLY: u32 = 1;
/// Opened to be inspected.
pub const INSPECT: u32 = 2;
/// Closed.
pub const CLOSED: u32 = 4;
/// A panic or a failed flush left the state unknown.
pub const POISONED: u32 = 8;
/// Corruption was found.
pub const CORRUPT: u32 = 16;
/// Nothing has been written yet: the header may have to be changed first (O6).
pub const UNTOUCHED: u32 = 32;
/// Somebody holds the image alone, or waits until everybody else has left (see `alone`).
pub const ALONE: u32 = 64;

/// Bitmaps are enabled: changes are noted in them (see `bitmaps`).
pub const RECORDING: u32 = 128;
/// Enabled bitmaps have to be marked in use before the next change.
pub const UNMARKED: u32 = 256;

/// Metadata that only the file tells of has to be listed before the next change (see `inactive`).
pub const UNLISTED: u32 = 512;

/// State of a handle.
pub struct Status {
    bits: AtomicU32,
    why: Mutex<&'static str>,
}

impl Status {
    /// A handle that starts with these bits.
    pub fn new(bits: u32) -> Self {
        Self { bits: AtomicU32::new(bits), why: Mutex::new("") }
    }

    /// Whether any of these bits is set.
    #[inline]
    pub fn any(&self, bits: u32) -> bool {
        self.bits.load(Ordering::Acquire) & bits != 0
    }

    /// Whether a write may go ahead with no further question.
    #[inline]
    pub fn is_clear(&self) -> bool {
        self.bits.load(Ordering::Acquire) & !(RECORDING | UNMARKED) == 0
    }

    /// Sets bits; returns those that were set before.
    pub fn set(&self, bits: u32) -> u32 {
        self.bits.fetch_or(bits, Ordering::AcqRel)
    }

    /// Clears bits.
    pub fn clear(&self, bits: u32) {
        self.bits.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Poisons the handle.
    pub fn poison(&self, why: &'static str) {
        *lock(&self.why) = why;
        self.set(POISONED);
    }

    /// Refuses reads where they cannot be.
    #[inline]
    pub fn check_read(&self) -> Result<()> {
        if self.any(CLOSED | INSPECT) { Err(self.refusal()) } else { Ok(()) }
    }

    /// Refuses a handle that is closed.
    pub fn check_open(&self) -> Result<()> {
        if self.any(CLOSED) { Err(self.refusal()) } else { Ok(()) }
    }

    /// Refuses writes where they cannot be. [`UNTOUCHED`], [`ALONE`], [`UNLISTED`] and what bitmaps need are no
    /// refusals.
    pub fn check_write(&self) -> Result<()> {
        if self.any(!(UNTOUCHED | ALONE | RECORDING | UNMARKED | UNLISTED)) { Err(self.refusal()) } else { Ok(()) }
    }

    #[cold]
    fn refusal(&self) -> Error {
        if self.any(CLOSED) {
            Error::Argument { name: "image", why: "is closed" }
        } else if self.any(INSPECT) {
            Error::InspectOnly
        } else if self.any(READ_ONLY) {
            Error::ReadOnly
        } else if self.any(CORRUPT) {
            Error::MarkedCorrupt
        } else {
            Error::Poisoned { why: *lock(&self.why) }
        }
    }
}

/// What a handle has done so far, as counted by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Bytes that were read from old clusters or backing files to fill up what a write did not cover.
    pub copied_bytes: u64,
    /// Bytes around a write that read as zeroes and are zeroes in the host cluster now: written as such, or because it
    /// was never written to.
    pub zero_filled_bytes: u64,
    /// Host clusters allocated for guest data.
    pub clusters_allocated: u64,
    /// L2 tables allocated or copied.
    pub l2_tables_allocated: u64,
    /// Writes that were not pure overwrites of allocated data.
    pub allocating_writes: u64,
}

/// The counters behind [`Stats`]; only paths that allocate touch them.
#[derive(Default)]
pub struct Counters {
    /// See [`Stats::copied_bytes`].
    pub copied_bytes: AtomicU64,
    /// See [`Stats::zero_filled_bytes`].
    pub zero_filled_bytes: AtomicU64,
    /// See [`Stats::clusters_allocated`].
    pub clusters_allocated: AtomicU64,
    /// See [`Stats::l2_tables_allocated`].
    pub l2_tables_allocated: AtomicU64,
    /// See [`Stats::allocating_writes`].
    pub allocating_writes: AtomicU64,
}

impl Counters {
    /// Their values now.
    pub fn stats(&self) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            copied_bytes: get(&self.copied_bytes),
            zero_filled_bytes: get(&self.zero_filled_bytes),
            clusters_allocated: get(&self.clusters_allocated),
            l2_tables_allocated: get(&self.l2_tables_allocated),
            allocating_writes: get(&self.allocating_writes),
        }
    }
}
