//! A storage in memory, for tests and for callers who want one.

use std::io;
use std::sync::{Mutex, PoisonError};

use super::{IoDst, IoSrc, Storage};

/// Bytes in memory behind a lock.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    bytes: Mutex<Vec<u8>>,
}

impl MemoryStorage {
    /// A storage that starts with these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: Mutex::new(bytes) }
    }

    /// A copy of what it holds.
    pub fn snapshot(&self) -> Vec<u8> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Storage for MemoryStorage {
    fn read(&self, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        let bytes = self.lock();
        let mut at = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let start = at;
        for piece in pieces {
            let n = piece.len().min(bytes.len() - at);
            piece.copy_from(&bytes[at..at + n]);
            at += n;
        }
        Ok(at - start)
    }

    fn write(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(super::total_src(pieces)).filter(|&end| end <= isize::MAX as u64);
        let end = end.ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))? as usize;
        let mut bytes = self.lock();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        let mut at = offset as usize;
        for piece in pieces {
            piece.copy_to(&mut bytes[at..at + piece.len()]);
            at += piece.len();
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.lock().len() as u64)
    }

    fn extend(&self, size: u64) -> io::Result<()> {
        let size = usize::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        let mut bytes = self.lock();
        if bytes.len() < size {
            bytes.resize(size, 0);
        }
        Ok(())
    }

    fn truncate(&self, size: u64) -> io::Result<()> {
        let size = usize::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        self.lock().resize(size, 0);
        Ok(())
    }
}
