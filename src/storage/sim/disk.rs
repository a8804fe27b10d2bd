//! The disk: what reads see, what is durable, and the effects in between.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::image::DiskImage;
use crate::storage::{IoDst, IoSrc, Storage, total_src};

/// What the simulated disk writes as a whole or not at all.
pub const SECTOR_BYTES: usize = 512;

/// Something that was done to the disk and is not durable yet.
#[derive(Debug, Clone)]
pub(super) struct Effect {
    pub(super) id: u64,
    pub(super) what: What,
    /// The caller was told that it is done: a flush that starts from now on covers it.
    completed: bool,
    /// A flush that should have covered it failed: the system dropped it, and no later flush brings it back.
    dropped: bool,
}

#[derive(Debug, Clone)]
pub(super) enum What {
    /// Whole sectors as they were after the write; `gone` are those that a durable later write replaced.
    Write {
        first_sector: usize,
        content: Vec<u8>,
        end: u64,
        gone: Vec<bool>,
    },
    Truncate {
        size: u64,
    },
    /// As a truncate to a larger size, but never to a smaller one.
    Extend {
        size: u64,
    },
}

/// An error to inject.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// Number of the call (counted from 0 over reads, writes, flushes and truncates of the disk) that fails.
    pub index: u64,
    /// The system error number that it reports.
    pub errno: i32,
    /// Calls that write and have to fail as well from then on (a full disk stays full).
    pub sticky: bool,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) current: DiskImage,
    pub(super) durable: DiskImage,
    pub(super) log: Vec<Effect>,
    changes: u64,
    calls: u64,
    flushes: u64,
    fault: Option<Fault>,
    failed: Option<(&'static str, u64)>,
}

/// A simulated disk. See the module text.
#[derive(Debug, Default)]
pub struct SimDisk {
    state: Mutex<State>,
}

/// A flush that has started: what it will make durable.
#[derive(Debug)]
pub(super) struct FlushToken {
    covers: Vec<u64>,
    errno: Option<i32>,
}

impl SimDisk {
    /// A disk with these durable contents.
    pub fn new(image: DiskImage) -> Self {
        Self { state: Mutex::new(State { current: image.clone(), durable: image, ..State::default() }) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a reader sees now.
    pub fn current(&self) -> DiskImage {
        self.lock().current.clone()
    }

    /// What is durable for certain.
    pub fn durable(&self) -> DiskImage {
        self.lock().durable.clone()
    }

    /// Counts up whenever the set of possible crash states changes.
    pub fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// Calls so far (see [`Fault::index`]).
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }

    /// Flushes so far.
    pub fn flushes(&self) -> u64 {
        self.lock().flushes
    }

    /// Arms a fault, or none. Calls are counted on.
    pub fn set_fault(&self, fault: Option<Fault>) {
        let mut state = self.lock();
        state.fault = fault;
        state.failed = None;
    }

    /// The call that the armed fault has hit first: what it was, and its offset.
    pub fn fault_hit(&self) -> Option<(&'static str, u64)> {
        self.lock().failed
    }

    /// Performs a write; it is not covered by flushes until it is completed. A failing write may have left a part.
    pub(super) fn begin_write(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<u64> {
        let mut state = self.lock();
        let mut data = vec![0; total_src(pieces) as usize];
        let mut at = 0;
        for piece in pieces {
            piece.copy_to(&mut data[at..at + piece.len()]);
            at += piece.len();
        }
        let outcome = state.fault_for("write", offset);
        if outcome.is_err() {
            // About half of a failed write may be there, in whole sectors.
            let end = (offset as usize + data.len() / 2) / SECTOR_BYTES * SECTOR_BYTES;
            data.truncate(end.saturating_sub(offset as usize));
        }
        let id = state.write(&data, offset);
        outcome.map(|()| id)
    }

    /// Performs a punch: zeroes, up to the end of the file.
    pub(super) fn begin_punch(&self, offset: u64, length: u64) -> io::Result<u64> {
        let mut state = self.lock();
        state.fault_for("punch", offset)?;
        let inside = length.min(state.current.size.saturating_sub(offset));
        Ok(state.write(&vec![0; inside as usize], offset))
    }

    /// The write has been reported to its caller.
    pub(super) fn complete(&self, id: u64) {
        let mut state = self.lock();
        if let Some(effect) = state.log.iter_mut().find(|e| e.id == id) {
            effect.completed = true;
        }
    }

    /// Starts a flush: it covers what has completed by now.
    pub(super) fn begin_flush(&self) -> FlushToken {
        let mut state = self.lock();
        state.flushes += 1;
        let errno = state.fault_for("flush", 0).err().and_then(|e| e.raw_os_error());
        let covers = state.log.iter().filter(|e| e.completed && !e.dropped).map(|e| e.id).collect();
        FlushToken { covers, errno }
    }

    /// Ends a flush: all that it covers is durable, or lost.
    pub(super) fn end_flush(&self, token: FlushToken) -> io::Result<()> {
        let mut state = self.lock();
        if let Some(errno) = token.errno {
            for effect in state.log.iter_mut().filter(|e| token.covers.contains(&e.id)) {
                effect.dropped = true;
            }
            return Err(io::Error::from_raw_os_error(errno));
        }
        state.make_durable(&token.covers);
        Ok(())
    }
}

impl State {
    fn fault_for(&mut self, what: &'static str, offset: u64) -> io::Result<()> {
        let index = self.calls;
        self.calls += 1;
        let Some(fault) = self.fault else { return Ok(()) };
        if index == fault.index
            || fault.sticky && index > fault.index && matches!(what, "write" | "truncate" | "extend")
        {
            self.failed.get_or_insert((what, offset));
            return Err(io::Error::from_raw_os_error(fault.errno));
        }
        Ok(())
    }

    fn push(&mut self, what: What, completed: bool) -> u64 {
        // Counted over all disks: several that lose power together have one order of effects.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        self.changes += 1;
        self.log.push(Effect { id, what, completed, dropped: false });
        id
    }

    fn write(&mut self, data: &[u8], offset: u64) -> u64 {
        let (from, end) = (offset as usize, offset as usize + data.len());
        let (first, last) = (from / SECTOR_BYTES, end.div_ceil(SECTOR_BYTES));
        if data.is_empty() {
            return u64::MAX; // no effect has this number
        }
        self.current.put(from as u64, data);
        let mut content = vec![0; (last - first) * SECTOR_BYTES];
        self.current.read((first * SECTOR_BYTES) as u64, &mut content);
        let end = self.current.size;
        self.push(What::Write { first_sector: first, content, end, gone: vec![false; last - first] }, false)
    }

    /// Applies the effects of `covers` to the durable contents. Effects that are older, overlap and are not covered
    /// can't come back over them any more.
    fn make_durable(&mut self, covers: &[u64]) {
        self.changes += 1;
        let mut keep: Vec<Effect> = Vec::new();
        for effect in std::mem::take(&mut self.log) {
            if !covers.contains(&effect.id) {
                keep.push(effect);
                continue;
            }
            match &effect.what {
                What::Truncate { size } => {
                    self.durable.truncate(*size);
                    keep.retain(|e| !matches!(e.what, What::Truncate { .. } | What::Extend { .. }));
                    let first_cut = size.div_ceil(SECTOR_BYTES as u64) as usize;
                    keep.iter_mut().for_each(|e| e.forget(first_cut..usize::MAX));
                }
                What::Extend { size } => self.durable.size = self.durable.size.max(*size),
                What::Write { first_sector, content, end, gone } => {
                    for (i, sector) in content.chunks(SECTOR_BYTES).enumerate().filter(|(i, _)| !gone[*i]) {
                        self.durable.put_sectors(first_sector + i, sector, *end);
                    }
                    let range = *first_sector..first_sector + gone.len();
                    keep.iter_mut().for_each(|e| e.forget(range.clone()));
                }
            }
        }
        self.log = keep;
    }
}

impl Effect {
    fn forget(&mut self, range: std::ops::Range<usize>) {
        if let What::Write { first_sector, gone, .. } = &mut self.what {
            for (i, gone) in gone.iter_mut().enumerate() {
                *gone |= range.contains(&(*first_sector + i));
            }
        }
    }
}

impl Storage for SimDisk {
    fn read(&self, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        let mut state = self.lock();
        state.fault_for("read", offset)?;
        let size = state.current.size;
        let mut at = offset;
        let mut bytes = Vec::new();
        for piece in pieces {
            let n = (piece.len() as u64).min(size.saturating_sub(at)) as usize;
            bytes.resize(n, 0);
            state.current.read(at, &mut bytes);
            piece.copy_from(&bytes);
            at += n as u64;
        }
        Ok((at - offset) as usize)
    }

    fn write(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        let id = self.begin_write(pieces, offset)?;
        self.complete(id);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let token = self.begin_flush();
        self.end_flush(token)
    }

    fn extend(&self, size: u64) -> io::Result<()> {
        let mut state = self.lock();
        state.fault_for("extend", size)?;
        if state.current.size < size {
            state.current.size = size;
            state.push(What::Extend { size }, true);
        }
        Ok(())
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        let id = self.begin_punch(offset, length)?;
        self.complete(id);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.lock().current.size)
    }

    fn truncate(&self, size: u64) -> io::Result<()> {
        let mut state = self.lock();
        state.fault_for("truncate", size)?;
        state.current.truncate(size);
        state.push(What::Truncate { size }, true);
        Ok(())
    }
}
