//! A file or block device of the host.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::direct::Direct;
use super::lock::{self, LockMode};
use super::{Identity, IoDst, IoSrc, Storage, Turns};
use crate::wait::block_on;

/// Most pieces that one system call takes (IOV_MAX of Linux).
const PIECES_PER_CALL: usize = 1024;

/// An open file.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    is_locked: AtomicBool,
    direct: OnceLock<Direct>, // without the page cache
    is_shared: bool,          // the caller may have the same description, and rely on its position
}

/// The locks are given back by name: a process that this one has just forked may hold the description a moment longer
/// than we do, and the locks with it.
impl Drop for FileStorage {
    fn drop(&mut self) {
        self.unlock();
    }
}

impl FileStorage {
    /// Takes over an open file descriptor; if that is one without the page cache (O_DIRECT), transfers are aligned for
    /// it.
    pub fn new(file: File) -> Self {
        let direct = Direct::of(file.as_raw_fd()).map_or_else(OnceLock::new, OnceLock::from);
        Self { file, is_locked: AtomicBool::new(false), direct, is_shared: true }
    }

    /// Takes over a file that was opened with the page cache, and that nobody else has.
    pub fn cached(file: File) -> Self {
        Self { file, is_locked: AtomicBool::new(false), direct: OnceLock::new(), is_shared: false }
    }

    /// The descriptor, for drivers that submit I/O themselves.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn write_direct(&self, direct: &Direct, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        let (fd, at) = (self.fd(), signed(offset)?);
        let whole = pieces.len() <= PIECES_PER_CALL && direct.accepts(pieces, offset);
        // SAFETY: the pieces' makers promised valid memory; IoSrc has the layout of struct iovec; at most IOV_MAX pieces.
        let write = || unsafe { libc::pwritev(fd, pieces.as_ptr().cast(), pieces.len() as libc::c_int, at) };
        match whole && write() as u64 == super::total_src(pieces) {
            true => Ok(()),
            false => direct.write(fd, pieces, offset), // and what stopped the other will stop this
        }
    }
}

impl From<OwnedFd> for FileStorage {
    fn from(fd: OwnedFd) -> Self {
        Self::new(File::from(fd))
    }
}

/// Result of a system call, or its error; `None` where it was interrupted and is to be repeated.
pub(super) fn outcome(n: libc::ssize_t) -> io::Result<Option<usize>> {
    if n >= 0 {
        return Ok(Some(n as usize));
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted { Ok(None) } else { Err(error) }
}

fn signed(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

fn fallocate(fd: RawFd, mode: libc::c_int, offset: u64, length: u64) -> io::Result<()> {
    let (offset, length) = (signed(offset)?, signed(length)?);
    loop {
        // SAFETY: an own descriptor, and no memory is passed.
        let done = unsafe { libc::fallocate(fd, mode, offset, length) };
        if outcome(done as libc::ssize_t)?.is_some() {
            return Ok(());
        }
    }
}

/// Repeats `call(pieces, offset)` until all pieces are done or it returns 0; returns the bytes done.
/// `$piece` is the type of the pieces; both have the layout of `struct iovec`.
macro_rules! transfer {
    ($pieces:expr, $offset:expr, $one:expr, $many:expr) => {{
        let mut at = $offset;
        let mut index = 0; // first piece not done
        let mut within = 0; // bytes of it that are done
        let mut done = 0usize;
        while index < $pieces.len() {
            let piece = $pieces[index];
            if within == piece.len() {
                index += 1;
                within = 0;
                continue;
            }
            let n = if within > 0 || index + 1 == $pieces.len() {
                outcome($one(piece.slice(within, piece.len() - within), signed(at)?))?
            } else {
                let last = $pieces.len().min(index + PIECES_PER_CALL);
                outcome($many(&$pieces[index..last], signed(at)?))?
            };
            let Some(mut n) = n else { continue };
            if n == 0 {
                break;
            }
            at += n as u64;
            done += n;
            while n > 0 {
                let step = n.min($pieces[index].len() - within);
                n -= step;
                within += step;
                if within == $pieces[index].len() {
                    index += 1;
                    within = 0;
                }
            }
        }
        done
    }};
}

impl Storage for FileStorage {
    fn read(&self, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        let fd = self.fd();
        // SAFETY: the pieces' makers promised valid memory; IoDst has the layout of struct iovec.
        let one = |p: IoDst<'_>, at| unsafe { libc::pread(fd, p.base().cast(), p.len(), at) };
        if let [piece] = pieces
            && one(*piece, signed(offset)?) == piece.len() as libc::ssize_t
        {
            return Ok(piece.len()); // nearly always; the rest has to be looked at
        }
        // SAFETY: as above; the list has at most IOV_MAX pieces.
        let many = |p: &[IoDst<'_>], at| unsafe { libc::preadv(fd, p.as_ptr().cast(), p.len() as libc::c_int, at) };
        if let Some(direct) = self.direct.get() {
            let whole = pieces.len() <= PIECES_PER_CALL && direct.accepts(pieces, offset);
            return match whole && many(pieces, signed(offset)?) as u64 == super::total_dst(pieces) {
                true => Ok(super::total_dst(pieces) as usize),
                false => direct.read(fd, pieces, offset),
            };
        }
        Ok(transfer!(pieces, offset, one, many))
    }

    fn write(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        let fd = self.fd();
        // SAFETY: the pieces' makers promised valid memory; IoSrc has the layout of struct iovec.
        let one = |p: IoSrc<'_>, at| unsafe { libc::pwrite(fd, p.base().cast(), p.len(), at) };
        if let Some(direct) = self.direct.get() {
            let _turn = block_on(direct.turns.take(pieces, offset));
            return self.write_direct(direct, pieces, offset);
        }
        if let [piece] = pieces
            && one(*piece, signed(offset)?) == piece.len() as libc::ssize_t
        {
            return Ok(());
        }
        // SAFETY: as above; the list has at most IOV_MAX pieces.
        let many = |p: &[IoSrc<'_>], at| unsafe { libc::pwritev(fd, p.as_ptr().cast(), p.len() as libc::c_int, at) };
        let done = transfer!(pieces, offset, one, many);
        // A write that makes no progress without an error: the device has no room.
        if (done as u64) < super::total_src(pieces) { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn size(&self) -> io::Result<u64> {
        if self.is_shared {
            let meta = self.file.metadata()?;
            if !meta.file_type().is_block_device() {
                return Ok(meta.len());
            }
        }
        // SAFETY: lseek on an own descriptor; no memory is passed. We do all I/O at given positions.
        let end = unsafe { libc::lseek(self.fd(), 0, libc::SEEK_END) };
        if end < 0 { Err(io::Error::last_os_error()) } else { Ok(end as u64) }
    }

    fn truncate(&self, size: u64) -> io::Result<()> {
        self.file.set_len(size)
    }

    /// Space for the last bytes, and nothing else, is what makes a file longer that must not become shorter: the size that
    /// ftruncate sets may be too small by the time it is set.
    fn extend(&self, size: u64) -> io::Result<()> {
        let last = size.min(4096);
        fallocate(self.fd(), 0, size - last, last)
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        fallocate(self.fd(), libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, length)
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        fallocate(self.fd(), 0, offset, length)
    }

    fn lock(&self, mode: LockMode) -> io::Result<bool> {
        let granted = lock::acquire(self.fd(), mode)?;
        self.is_locked.store(granted, Ordering::Release);
        Ok(granted)
    }

    fn unlock(&self) {
        if self.is_locked.swap(false, Ordering::AcqRel) {
            lock::release(self.fd());
        }
    }

    fn raw_fd(&self) -> Option<RawFd> {
        Some(self.fd())
    }

    fn accepts_raw_read(&self, pieces: &[IoDst<'_>], offset: u64) -> bool {
        self.direct.get().is_none_or(|direct| direct.accepts(pieces, offset))
    }

    fn accepts_raw_write(&self, pieces: &[IoSrc<'_>], offset: u64) -> bool {
        self.direct.get().is_none_or(|direct| direct.accepts(pieces, offset))
    }

    fn turns(&self) -> Option<&Turns> {
        self.direct.get().map(|direct| &direct.turns)
    }

    fn write_in_turn(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        match self.direct.get() {
            Some(direct) => self.write_direct(direct, pieces, offset),
            None => self.write(pieces, offset),
        }
    }

    fn avoid_page_cache(&self) -> io::Result<()> {
        if self.direct.get().is_none() {
            // Somebody else may have switched it meanwhile: to the same.
            let _ = self.direct.set(Direct::switch(self.fd())?);
        }
        Ok(())
    }

    fn allocated_bytes(&self) -> Option<u64> {
        self.file.metadata().ok().map(|m| m.blocks() * 512)
    }

    fn identity(&self) -> Option<Identity> {
        self.file.metadata().ok().map(|m| (m.dev(), m.ino()))
    }
}
