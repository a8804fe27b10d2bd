//! Files without the page cache (O_DIRECT): transfers have to be aligned, in the file and in memory. Those that are go
//! as they are; others through a buffer of our own.
//!
//! A write that covers a block in part reads the block, changes it, and writes it back. What others write to the rest of
//! that block meanwhile would be lost: so writes that share a block take turns ([`Turns`]). As transfers they are what is
//! waited for last: who has a turn waits for nothing but the disk.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;

use super::pieces::{Piece, PieceCursor};
use super::{IoDst, IoSrc, total_src};
use crate::wait::{Claim, ClaimFuture, Claims};

/// Where the kernel does not tell: larger than the blocks of any disk that is common.
const ALIGNMENT_UNTOLD: u64 = 4096;
/// Bytes that go through the buffer at once.
const BUFFER_BYTES: u64 = 1 << 20;

/// Who writes to which blocks.
pub struct Turns {
    block: u64,
    blocks: Claims,
}

impl Turns {
    fn touched(&self, pieces: &[IoSrc<'_>], offset: u64) -> Range<u64> {
        let first = offset / self.block;
        first..(offset + total_src(pieces)).div_ceil(self.block).max(first + 1)
    }

    /// The turn of a write, once the earlier ones to the same blocks have ended. It ends when it is dropped.
    pub fn take(&self, pieces: &[IoSrc<'_>], offset: u64) -> ClaimFuture<'_> {
        self.blocks.claim(self.touched(pieces, offset))
    }

    /// As [`Turns::take`], if it has come.
    pub fn try_take(&self, pieces: &[IoSrc<'_>], offset: u64) -> Option<Claim<'_>> {
        self.blocks.try_claim(self.touched(pieces, offset))
    }
}

/// What a file without the page cache asks of transfers.
pub struct Direct {
    memory: usize,
    block: u64,
    /// Of writes.
    pub turns: Turns,
}

impl std::fmt::Debug for Direct {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Direct").field("memory", &self.memory).field("block", &self.block).finish()
    }
}

/// Memory for `length` bytes that starts where `memory` divides the address.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    fn new(length: u64, memory: usize) -> Self {
        let length = length as usize;
        let bytes = vec![0; length + memory];
        let start = bytes.as_ptr().align_offset(memory);
        Self { bytes, start, length }
    }

    fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

impl Direct {
    /// Of an open file, if it is used without the page cache.
    pub fn of(fd: RawFd) -> Option<Self> {
        // SAFETY: an open descriptor; no memory is passed.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
        (flags >= 0 && flags & libc::O_DIRECT != 0).then(|| Self::new(fd))
    }

    /// Switches the page cache off for an open file.
    pub fn switch(fd: RawFd) -> io::Result<Self> {
        // SAFETY: an open descriptor; no memory is passed.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
        // SAFETY: as above.
        if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_DIRECT) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self::new(fd))
    }

    fn new(fd: RawFd) -> Self {
        // SAFETY: all-zero bytes are a valid statx, which the call fills.
        let mut facts: libc::statx = unsafe { std::mem::zeroed() };
        // SAFETY: an open descriptor, an empty name, and a writable struct.
        let told = unsafe {
            libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut facts) == 0
                && facts.stx_mask & libc::STATX_DIOALIGN != 0
        };
        let sane = |n: u32| u64::from(n).is_power_of_two() && (1..=1 << 16).contains(&n);
        let (memory, block) = match told && sane(facts.stx_dio_mem_align) && sane(facts.stx_dio_offset_align) {
            true => (u64::from(facts.stx_dio_mem_align), u64::from(facts.stx_dio_offset_align)),
            false => (ALIGNMENT_UNTOLD, ALIGNMENT_UNTOLD),
        };
        Self { memory: memory as usize, block, turns: Turns { block, blocks: Claims::default() } }
    }

    /// Whether pieces can be transferred as they are.
    pub fn accepts<P: Piece>(&self, pieces: &[P], offset: u64) -> bool {
        let fits = |p: &P| p.address().is_multiple_of(self.memory) && (p.length() as u64).is_multiple_of(self.block);
        offset.is_multiple_of(self.block) && pieces.iter().all(fits)
    }

    /// Reads through a buffer, until the pieces are full or the file ends.
    pub fn read(&self, fd: RawFd, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        let (mut cursor, end) = (PieceCursor::new(pieces), offset + super::total_dst(pieces));
        let mut at = offset;
        while at < end {
            let first = at / self.block * self.block;
            let last = end.next_multiple_of(self.block).min(first + BUFFER_BYTES);
            let mut buffer = Buffer::new(last - first, self.memory);
            let got = read_blocks(fd, buffer.get(), first, self.block)?;
            let have = (first + got as u64).min(end).saturating_sub(at);
            let part = cursor.take(have);
            super::pieces::scatter(&buffer.get()[(at - first) as usize..], part.as_slice());
            at += have;
            if first + (got as u64) < last {
                break; // the end of the file
            }
        }
        Ok((at - offset) as usize)
    }

    /// Writes through a buffer. The caller has the turn.
    pub fn write(&self, fd: RawFd, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        let end = offset + total_src(pieces);
        let (mut cursor, mut at) = (PieceCursor::new(pieces), offset);
        while at < end {
            let first = at / self.block * self.block;
            let last = end.next_multiple_of(self.block).min(first + BUFFER_BYTES);
            let mut buffer = Buffer::new(last - first, self.memory);
            let bytes = buffer.get();
            let block = self.block as usize;
            if first < at {
                read_blocks(fd, &mut bytes[..block], first, self.block)?;
            }
            if last > end && (first == at || last - first > self.block) {
                let tail = bytes.len() - block;
                read_blocks(fd, &mut bytes[tail..], last - self.block, self.block)?;
            }
            let n = last.min(end) - at;
            let mut to = (at - first) as usize;
            for piece in cursor.take(n).as_slice() {
                piece.copy_to(&mut bytes[to..to + piece.len()]);
                to += piece.len();
            }
            write_blocks(fd, bytes, first)?;
            at += n;
        }
        Ok(())
    }
}

/// Reads whole blocks until the buffer is full or the file ends.
fn read_blocks(fd: RawFd, bytes: &mut [u8], offset: u64, block: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        // SAFETY: a writable buffer of that length.
        let n = unsafe { libc::pread(fd, rest.as_mut_ptr().cast(), rest.len(), (offset + done as u64) as libc::off_t) };
        match super::file::outcome(n)? {
            None => {}
            Some(n) => {
                done += n;
                if n == 0 || !(n as u64).is_multiple_of(block) {
                    break; // the file ends here
                }
            }
        }
    }
    Ok(done)
}

/// Writes whole blocks.
fn write_blocks(fd: RawFd, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &bytes[done..];
        // SAFETY: a readable buffer of that length.
        let n = unsafe { libc::pwrite(fd, rest.as_ptr().cast(), rest.len(), (offset + done as u64) as libc::off_t) };
        match super::file::outcome(n)? {
            None => {}
            Some(0) => return Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            Some(n) => done += n,
        }
    }
    Ok(())
}
