//! What an attempt runs on: a storage that counts, and ends before absurd offsets, and a heap that counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::{IoDst, IoSrc, Storage};

/// Where the storage ends, as a file system has a largest file.
pub const END: u64 = 4 << 20;
/// Storage calls of one attempt. A sound image takes a few hundred.
const CALLS_MAX: u64 = 20_000;

/// Memory that counts calls and refuses to grow past [`END`].
pub struct Guarded {
    memory: MemoryStorage,
    calls: AtomicU64,
    changes: AtomicU64,
}

impl Guarded {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { memory: MemoryStorage::new(bytes), calls: AtomicU64::new(0), changes: AtomicU64::new(0) }
    }

    /// What it holds.
    pub fn bytes(&self) -> Vec<u8> {
        self.memory.snapshot()
    }

    /// Writes and truncations so far, refused ones too.
    pub fn changes(&self) -> u64 {
        self.changes.load(Relaxed)
    }

    fn count(&self) {
        let calls = self.calls.fetch_add(1, Relaxed);
        assert!(calls < CALLS_MAX, "a hang: {calls} storage calls");
    }

    fn check_end(&self, end: Option<u64>) -> io::Result<()> {
        self.changes.fetch_add(1, Relaxed);
        end.filter(|&end| end <= END).map(|_| ()).ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))
    }
}

impl Storage for Guarded {
    fn read(&self, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        self.count();
        let end = pieces.iter().fold(offset, |end, p| end.saturating_add(p.len() as u64));
        if end > i64::MAX as u64 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL)); // as Linux: no file has such offsets
        }
        self.memory.read(pieces, offset)
    }

    fn write(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        self.count();
        self.check_end(offset.checked_add(pieces.iter().map(|p| p.len() as u64).sum()))?;
        self.memory.write(pieces, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.count();
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        self.count();
        self.memory.size()
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.count();
        self.changes.fetch_add(1, Relaxed);
        let end = self.memory.size()?.min(offset.saturating_add(length));
        let zeroes = vec![0; end.saturating_sub(offset) as usize];
        self.memory.write(&[IoSrc::from(&zeroes[..])], offset.min(end))
    }

    fn truncate(&self, size: u64) -> io::Result<()> {
        self.count();
        self.check_end(Some(size))?;
        self.memory.truncate(size)
    }
}

/// The system's heap, with what the current thread holds counted.
pub struct Heap;

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

impl Heap {
    /// Forgets the peak; returns what is held now.
    pub fn start() -> usize {
        let held = HELD.get();
        PEAK.set(held);
        held
    }

    /// Most bytes that were held at once since `start`, beyond what was held then.
    pub fn peak_since(start: usize) -> usize {
        PEAK.get().saturating_sub(start)
    }

    fn changed(by: isize) {
        // Memory may be given back by another thread than the one that took it.
        let held = HELD.get().saturating_add_signed(by);
        HELD.set(held);
        PEAK.set(PEAK.get().max(held));
    }
}

// SAFETY: all of it is the system's allocator; counting touches plain thread-local cells and allocates nothing.
unsafe impl GlobalAlloc for Heap {
    // SAFETY: the caller's promises are handed on.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::changed(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    // SAFETY: the caller's promises are handed on.
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::changed(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    // SAFETY: the caller's promises are handed on.
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        Self::changed(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}
