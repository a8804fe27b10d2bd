//! A storage that writes down what happens to it, in the format of the kernel's dm-log-writes target, so that a judge
//! who knows nothing of this library can replay it: from a copy of the file as it was, up to any entry.
//!
//! ```text
//! sector 0     magic, version, number of entries, sector size          little-endian, as all of it
//! then         one sector an entry: sector, sectors, flags, bytes of data; and its data, in whole sectors
//! ```
//! Entries are in the order in which the calls took effect: they are made one at a time. What one call could leave
//! half done after a power cut, a replay that leaves out entries since the last flush shows.

use std::io;
use std::sync::{Arc, Mutex};

use super::lock::LockMode;
use super::{Identity, IoDst, IoSrc, Storage, total_src};

/// Unit of the log: what the storage model takes as written whole or not at all.
const SECTOR: u64 = 512;
const MAGIC: u64 = 0x6a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;
/// Data of one entry: larger writes become several.
const ENTRY_BYTES_MAX: u64 = 1 << 20;

struct Log {
    to: Arc<dyn Storage>,
    entries: u64,
    end: u64, // of what has been written to it
}

/// See the module text.
pub struct Recorder {
    inner: Arc<dyn Storage>,
    log: Mutex<Log>,
}

impl Recorder {
    /// Records what happens to `inner` from now on in `log`, of which nothing remains.
    pub fn new(inner: Arc<dyn Storage>, log: Arc<dyn Storage>) -> io::Result<Self> {
        log.truncate(0)?;
        let mut log = Log { to: log, entries: 0, end: SECTOR };
        log.write_head()?;
        Ok(Self { inner, log: Mutex::new(log) })
    }

    fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Logs the sectors that a range touches, as they are now.
    fn log_range(&self, log: &mut Log, offset: u64, length: u64) -> io::Result<()> {
        let mut at = offset / SECTOR * SECTOR;
        let end = (offset + length).next_multiple_of(SECTOR);
        while at < end {
            let mut data = vec![0; (end - at).min(ENTRY_BYTES_MAX) as usize];
            self.inner.read(&[IoDst::from(&mut data[..])], at)?; // what the file lacks is zero
            log.add(at, data.len() as u64, 0, &data)?;
            at += data.len() as u64;
        }
        Ok(())
    }

    /// Logs that a range has become zero; its first and last sector may be covered in part.
    fn log_zeroes(&self, log: &mut Log, start: u64, end: u64) -> io::Result<()> {
        let whole = start.next_multiple_of(SECTOR)..end / SECTOR * SECTOR;
        if whole.is_empty() {
            return self.log_range(log, start, end - start);
        }
        self.log_range(log, start, whole.start - start)?;
        log.add(whole.start, whole.end - whole.start, DISCARD, &[])?;
        self.log_range(log, whole.end, end - whole.end)
    }
}

impl Log {
    fn write_head(&mut self) -> io::Result<()> {
        let mut head = [0; SECTOR as usize];
        for (field, value) in head.chunks_exact_mut(8).zip([MAGIC, VERSION, self.entries, SECTOR]) {
            field.copy_from_slice(&value.to_le_bytes());
        }
        self.to.write(&[IoSrc::from(&head[..])], 0)
    }

    fn add(&mut self, offset: u64, length: u64, flags: u64, data: &[u8]) -> io::Result<()> {
        let mut entry = [0; SECTOR as usize];
        for (field, value) in entry.chunks_exact_mut(8).zip([offset / SECTOR, length / SECTOR, flags, 0]) {
            field.copy_from_slice(&value.to_le_bytes());
        }
        self.to.write(&[IoSrc::from(&entry[..]), IoSrc::from(data)], self.end)?;
        self.end += SECTOR + data.len() as u64;
        self.entries += 1;
        Ok(())
    }
}

impl Storage for Recorder {
    fn read(&self, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        self.inner.read(pieces, offset)
    }

    fn write(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        let mut log = self.log();
        let result = self.inner.write(pieces, offset);
        // A write that failed may have done a part.
        self.log_range(&mut log, offset, total_src(pieces))?;
        result
    }

    fn flush(&self) -> io::Result<()> {
        let mut log = self.log();
        self.inner.flush()?;
        log.add(0, 0, FLUSH, &[])?;
        log.write_head()
    }

    fn size(&self) -> io::Result<u64> {
        self.inner.size()
    }

    fn truncate(&self, size: u64) -> io::Result<()> {
        let mut log = self.log();
        let before = self.inner.size()?;
        self.inner.truncate(size)?;
        if size < before { self.log_zeroes(&mut log, size, before) } else { Ok(()) }
    }

    fn extend(&self, size: u64) -> io::Result<()> {
        let mut log = self.log();
        self.inner.extend(size)?;
        // Zeroes there make a replayed file as long, too.
        self.log_range(&mut log, size.saturating_sub(1), 1)
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut log = self.log();
        self.inner.punch_hole(offset, length)?;
        self.log_zeroes(&mut log, offset, offset + length)
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.inner.allocate(offset, length) // what it holds stays: nothing to replay
    }

    fn lock(&self, mode: LockMode) -> io::Result<bool> {
        self.inner.lock(mode)
    }

    fn unlock(&self) {
        self.inner.unlock();
    }

    fn allocated_bytes(&self) -> Option<u64> {
        self.inner.allocated_bytes()
    }

    fn identity(&self) -> Option<Identity> {
        self.inner.identity()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let _ = self.log().write_head(); // what came after the last flush is not counted then
    }
}
