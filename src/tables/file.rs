//! One image file as the tables see it: errors typed, and a failed fdatasync that stays failed (M7).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use crate::error::{Error, IoOp, Result};
use crate::format::HostOffset;
use crate::storage::{Io, IoDst, IoSrc, Storage};

/// Why a handle writes nothing more after a failed flush: the kernel may have dropped the dirty pages, so that a
/// later fdatasync would succeed without having written them.
pub(super) const FLUSH_FAILED: &str =
    "an earlier flush to disk failed, and what it should have made durable is unknown";

/// An open image file.
pub struct HostFile {
    storage: Arc<dyn Storage>,
    stopped: OnceLock<&'static str>,
    cannot_punch: AtomicBool,
    no_flush: bool,
}

impl HostFile {
    /// Takes over an open storage.
    pub fn new(storage: Arc<dyn Storage>) -> Self {
        Self { storage, stopped: OnceLock::new(), cannot_punch: AtomicBool::new(false), no_flush: false }
    }

    /// One whose barriers make nothing durable: the caller does not care.
    pub fn without_flush(self, no_flush: bool) -> Self {
        Self { no_flush, ..self }
    }

    /// The storage below.
    pub fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    /// Current size in bytes.
    pub fn size_bytes(&self) -> Result<u64> {
        self.storage.size().map_err(|e| Error::io(IoOp::Size, 0, &e))
    }

    /// Reads until the pieces are full or the file ends; returns the bytes read.
    #[inline]
    pub async fn read<I: Io>(&self, io: &I, pieces: &[IoDst<'_>], offset: HostOffset) -> Result<usize> {
        io.read(&*self.storage, pieces, offset.0).await.map_err(|e| Error::io(IoOp::Read, offset.0, &e))
    }

    /// Ends all writing to the file. The first reason counts.
    pub fn stop_writes(&self, why: &'static str) {
        let _ = self.stopped.set(why);
    }

    /// Writes all pieces. Fails without writing once a flush has failed, or writing has been ended.
    #[inline]
    pub async fn write<I: Io>(&self, io: &I, pieces: &[IoSrc<'_>], offset: HostOffset) -> Result<()> {
        self.check_writes()?;
        io.write(&*self.storage, pieces, offset.0).await.map_err(|e| Error::io(IoOp::Write, offset.0, &e))
    }

    /// Writes one run of bytes.
    pub async fn write_bytes<I: Io>(&self, io: &I, bytes: &[u8], offset: HostOffset) -> Result<()> {
        self.write(io, &[IoSrc::from(bytes)], offset).await
    }

    /// Sets the size of the file. What lies past a smaller size must be free, durably; new bytes read as zeroes.
    pub fn set_size(&self, size: u64) -> Result<()> {
        self.check_writes()?;
        self.storage.truncate(size).map_err(|e| Error::io(IoOp::Truncate, size, &e))
    }

    /// Makes the file at least so long; what is new reads as zeroes. It is never made shorter by this, whoever else
    /// writes to it meanwhile.
    pub fn extend(&self, size: u64) -> Result<()> {
        self.check_writes()?;
        self.storage.extend(size).map_err(|e| Error::io(IoOp::Truncate, size, &e))
    }

    /// Gives up the space of a range that nothing refers to. Advice: that it cannot be done is no error.
    pub async fn punch_hole<I: Io>(&self, io: &I, offset: HostOffset, length: u64) {
        if !self.cannot_punch.load(Ordering::Relaxed) && self.check_writes().is_ok() {
            let punched = io.punch_hole(&*self.storage, offset.0, length).await;
            self.cannot_punch.fetch_or(punched.is_err(), Ordering::Relaxed);
        }
    }

    /// Makes a range read as zeroes by giving up its space. `false`: the storage cannot do that, and what the range reads
    /// as is old or zero.
    pub async fn zero_by_punching<I: Io>(&self, io: &I, offset: HostOffset, length: u64) -> Result<bool> {
        self.check_writes()?;
        self.punch_hole(io, offset, length).await;
        Ok(!self.cannot_punch.load(Ordering::Relaxed))
    }

    /// Makes all completed writes durable. A failure is final for this handle.
    pub async fn barrier<I: Io>(&self, io: &I) -> Result<()> {
        self.check_writes()?;
        if self.no_flush {
            return Ok(());
        }
        let result = io.flush(&*self.storage).await;
        if result.is_err() {
            self.stop_writes(FLUSH_FAILED);
        }
        result.map_err(|e| Error::io(IoOp::Flush, 0, &e))
    }

    /// Whether writing has been ended.
    #[inline]
    pub fn is_stopped(&self) -> bool {
        self.stopped.get().is_some()
    }

    /// Refuses a write where writing has been ended, and says why it has.
    #[inline]
    pub fn check_writes(&self) -> Result<()> {
        match self.stopped.get() {
            None => Ok(()),
            Some(why) => Err(Error::Poisoned { why }),
        }
    }
}
