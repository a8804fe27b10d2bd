//! Where a subject lives: memory that ends, counts calls and changes, and says so when it is a read-only open that
//! changes something.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::{IoDst, IoSrc, Storage};

/// Where it ends, as a file system has a largest file.
pub const END: u64 = 8 << 20;
/// Calls of one input. A sound image takes a few thousand at most.
const CALLS_MAX: u64 = 100_000;

pub struct Disk {
    memory: MemoryStorage,
    calls: AtomicU64,
    changes: AtomicU64,
    frozen: AtomicBool,
}

impl Disk {
    pub fn new(bytes: Vec<u8>) -> Self {
        let memory = MemoryStorage::new(bytes);
        Self { memory, calls: AtomicU64::new(0), changes: AtomicU64::new(0), frozen: AtomicBool::new(false) }
    }

    /// What it holds.
    pub fn bytes(&self) -> Vec<u8> {
        self.memory.snapshot()
    }

    /// Writes, punches and truncations so far, refused ones too.
    pub fn changes(&self) -> u64 {
        self.changes.load(Relaxed)
    }

    /// From now on (or no longer), every change is a broken rule.
    pub fn freeze(&self, frozen: bool) {
        self.frozen.store(frozen, Relaxed);
    }

    fn count(&self) {
        let calls = self.calls.fetch_add(1, Relaxed);
        crate::rule!(calls < CALLS_MAX, "a hang: {calls} storage calls");
    }

    fn change(&self, end: Option<u64>) -> io::Result<()> {
        self.count();
        self.changes.fetch_add(1, Relaxed);
        crate::rule!(!self.frozen.load(Relaxed), "something that must not write has written");
        end.filter(|&end| end <= END).map(|_| ()).ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))
    }
}

impl Storage for Disk {
    fn read(&self, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        self.count();
        let end = pieces.iter().fold(offset, |end, p| end.saturating_add(p.len() as u64));
        if end > i64::MAX as u64 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL)); // as Linux: no file has such offsets
        }
        self.memory.read(pieces, offset)
    }

    fn write(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        self.change(offset.checked_add(pieces.iter().map(|p| p.len() as u64).sum()))?;
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

    fn truncate(&self, size: u64) -> io::Result<()> {
        self.change(Some(size))?;
        self.memory.truncate(size)
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(Some(0))?;
        let end = self.memory.size()?.min(offset.saturating_add(length));
        let zeroes = vec![0; end.saturating_sub(offset) as usize];
        self.memory.write(&[IoSrc::from(&zeroes[..])], offset.min(end))
    }
}
