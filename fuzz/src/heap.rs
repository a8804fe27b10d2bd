//! The system's heap, with what the current thread holds counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

pub struct Heap;

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

/// Runs `body` and returns what it returns; it must not hold more than `limit` bytes at once.
pub fn limited<T>(limit: usize, body: impl FnOnce() -> T) -> T {
    let before = HELD.get();
    PEAK.set(before);
    let result = body();
    let held = PEAK.get().saturating_sub(before);
    crate::rule!(held <= limit, "{held} bytes of memory were held, {limit} are allowed");
    result
}

/// Most bytes that were held since [`limited`] began.
pub fn peak() -> usize {
    PEAK.get()
}

fn changed(by: isize) {
    // Memory may be given back by another thread than the one that took it.
    let held = HELD.get().saturating_add_signed(by);
    HELD.set(held);
    PEAK.set(PEAK.get().max(held));
}

// SAFETY: all of it is the system's allocator; counting touches plain thread-local cells and allocates nothing.
unsafe impl GlobalAlloc for Heap {
    // SAFETY: the caller's promises are handed on.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        changed(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    // SAFETY: the caller's promises are handed on.
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        changed(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    // SAFETY: the caller's promises are handed on.
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        changed(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}
