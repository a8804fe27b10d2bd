//! Who may use an image file at the same time, in the way that QEMU asks and tells it.
//!
//! Locks of the open file description (F_OFD_SETLK) on single bytes, always read locks: byte 100 + n says "I do this",
//! byte 200 + n says "I let nobody else do this". Whoever opens the file takes all its bytes first and then asks,
//! with F_OFD_GETLK for a write lock, whether anybody else holds a byte that contradicts. Taking first and asking
//! second means that of two who come at once at least one sees the other. The locks go with the descriptor.

use std::io;
use std::os::fd::RawFd;

/// Reads guest data and relies on its staying consistent.
const CONSISTENT_READ: i64 = 0;
/// Writes.
const WRITE: i64 = 1;
/// Changes the size of the disk.
const RESIZE: i64 = 3;
const USED: i64 = 100;
const NOT_SHARED: i64 = 200;

/// First of bytes that follow each other, and how many. What holds for each of them can be had, and asked, at once.
type Bytes = (i64, i64);

/// What an opener does with a file and what it lets others do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// Reads and writes; others may do neither.
    Writer,
    /// Reads; others may read as well.
    Reader,
    /// Looks at the metadata only; others may read as well.
    Inspector,
    /// Reads, and lets others do anything, even write.
    SharingReader,
    /// Reads and writes, and lets others do so as well: they know what they are doing.
    SharingWriter,
}

/// From the first byte that anybody locks to the last, counted from [`USED`].
const ALL: Bytes = (CONSISTENT_READ, NOT_SHARED + RESIZE + 1 - USED);

impl LockMode {
    /// What it does, and what others may not do.
    fn uses(self) -> (&'static [Bytes], &'static [Bytes]) {
        const READS: Bytes = (CONSISTENT_READ, 1);
        const READS_AND_WRITES: Bytes = (CONSISTENT_READ, 1 + WRITE - CONSISTENT_READ);
        const WRITES: Bytes = (WRITE, 1);
        const RESIZES: Bytes = (RESIZE, 1);
        match self {
            Self::Writer => (&[READS_AND_WRITES, RESIZES], &[WRITES, RESIZES]),
            Self::Reader => (&[READS], &[WRITES, RESIZES]),
            Self::Inspector => (&[], &[WRITES, RESIZES]),
            Self::SharingReader => (&[READS], &[]),
            Self::SharingWriter => (&[READS_AND_WRITES, RESIZES], &[]),
        }
    }
}

fn byte_lock(kind: libc::c_int, base: i64, (first, count): Bytes) -> libc::flock {
    // SAFETY: all-zero is a valid flock.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = base + first;
    lock.l_len = count;
    lock
}

fn set(fd: RawFd, kind: libc::c_int, base: i64, bytes: Bytes) -> io::Result<()> {
    let lock = byte_lock(kind, base, bytes);
    // SAFETY: a descriptor of the caller's and a flock that lives through the call.
    let done = unsafe { libc::fcntl(fd, libc::F_OFD_SETLK, &raw const lock) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn is_held_by_another(fd: RawFd, base: i64, bytes: Bytes) -> io::Result<bool> {
    let mut lock = byte_lock(libc::F_WRLCK, base, bytes);
    // SAFETY: a descriptor of the caller's and a flock that lives through the call.
    let done = unsafe { libc::fcntl(fd, libc::F_OFD_GETLK, &raw mut lock) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(i32::from(lock.l_type) != libc::F_UNLCK) }
}

/// Takes the locks of `mode`. `false`: somebody else's use contradicts, and nothing is held.
pub fn acquire(fd: RawFd, mode: LockMode) -> io::Result<bool> {
    let granted = try_acquire(fd, mode);
    if !matches!(granted, Ok(true)) {
        release(fd);
    }
    granted
}

fn try_acquire(fd: RawFd, mode: LockMode) -> io::Result<bool> {
    let (used, not_shared) = mode.uses();
    let own = used.iter().map(|n| (USED, n)).chain(not_shared.iter().map(|n| (NOT_SHARED, n)));
    for (base, bytes) in own {
        match set(fd, libc::F_RDLCK, base, *bytes) {
            Ok(()) => {}
            // Somebody holds a write lock there, which nobody who follows these rules does.
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => return Ok(false),
            Err(e) => return Err(e),
        }
    }
    // Nearly always nobody else holds anything at all, and one question tells; only otherwise each byte is asked for.
    if !is_held_by_another(fd, USED, ALL)? {
        return Ok(true);
    }
    let contradicting = used.iter().map(|n| (NOT_SHARED, n)).chain(not_shared.iter().map(|n| (USED, n)));
    for (base, bytes) in contradicting {
        if is_held_by_another(fd, base, *bytes)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Gives back all locks of this description.
pub fn release(fd: RawFd) {
    // Nothing to be done if it fails: closing the descriptor gives them back as well.
    let _ = set(fd, libc::F_UNLCK, USED, ALL);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn who_excludes_whom() {
        use LockMode::{Inspector, Reader, SharingReader, SharingWriter, Writer};
        let path = std::env::temp_dir().join(format!("libqcow2-lock-{}", std::process::id()));
        std::fs::write(&path, "x").unwrap();
        let open = || std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let modes = [Writer, Reader, Inspector, SharingReader, SharingWriter];
        let expected = [
            // second: Writer, Reader, Inspector, SharingReader, SharingWriter
            [false, false, false, true, false],
            [false, true, true, true, false],
            [false, true, true, true, false],
            [true, true, true, true, true],
            [false, false, false, true, true],
        ];
        for (first, row) in modes.into_iter().zip(expected) {
            for (second, granted) in modes.into_iter().zip(row) {
                let (a, b) = (open(), open());
                assert!(acquire(a.as_raw_fd(), first).unwrap());
                assert_eq!(acquire(b.as_raw_fd(), second).unwrap(), granted, "{first:?} then {second:?}");
                release(a.as_raw_fd());
                assert!(acquire(b.as_raw_fd(), second).unwrap(), "{second:?} alone");
            }
        }
        std::fs::remove_file(&path).unwrap();
    }
}
