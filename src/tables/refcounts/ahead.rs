//! Clusters that are counted before anybody asks for them.
//!
//! They lie past everything that was ever written, are counted a run at a time, and the file is made long enough for
//! them at once. That saves three things: the search through a refcount block for each cluster, growing the file with
//! each write (which file systems do one after the other), and, once a flush has made counts and length durable
//! ([`Ahead::Durable`]), the barrier between the counts and the entries that refer to the clusters. What a crash leaves
//! of them is counted and referred to by nobody: leaks, and a longer file. What nobody took is given back at close, and
//! whenever the image is held alone.

use std::ops::Range;

use super::streams::Streams;
use super::{Need, RefcountState};
use crate::format::{HostCluster, refcount};

/// Bytes of the first run; each is twice the last, up to [`MOST_BYTES`].
const FIRST_BYTES: u64 = 1 << 20;
/// Bytes of the longest run.
const MOST_BYTES: u64 = 64 << 20;
/// Bytes that a stream of writes keeps for itself at a time, at most.
const REGION_BYTES: u64 = 1 << 20;
/// Least clusters of a run, where clusters are large.
const CLUSTERS_MIN: u64 = 8;

/// How far a run that is counted ahead is prepared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Ahead {
    /// Counted in memory.
    #[default]
    Counted,
    /// And the file reaches to its end.
    InFile,
    /// And both will be found after a crash.
    Durable,
}

/// The run that is counted ahead.
#[derive(Debug, Default)]
pub(super) struct AheadRun {
    left: Range<u64>,
    streams: Streams,
    state: Ahead,
    number: u64, // of runs so far: what was said of an older one does not count
    next_bytes: u64,
    refused: bool, // the storage cannot be made longer ahead
    has_extended: bool,
}

/// A run that has just been counted: the file should reach to `end`.
#[derive(Debug, Clone, Copy)]
pub struct Extend {
    number: u64,
    /// One past its last cluster.
    pub end: u64,
}

impl RefcountState {
    /// Takes up to `want` clusters from what was counted ahead; `None` where nothing is left. `at`: the guest cluster that
    /// the first of them is for.
    pub fn take_ahead(&mut self, want: u64, at: Option<u64>) -> Option<Range<u64>> {
        let most = REGION_BYTES / self.geometry.cluster_size_bytes();
        self.ahead.streams.take(&mut self.ahead.left, want, at, most)
    }

    /// Where what was counted ahead and is not taken begins, or where all of it ends that streams of writes have kept for
    /// themselves: nothing in between is free.
    pub fn ahead_start(&self) -> Option<u64> {
        let AheadRun { left, streams, .. } = &self.ahead;
        (!left.is_empty() || streams.kept().next().is_some()).then_some(left.start)
    }

    /// How far a cluster that has just been taken is prepared.
    pub fn ahead_state(&self) -> Ahead {
        self.ahead.state
    }

    /// Counts free clusters behind `taken`, a run that was just taken from space that was never written. Memory only: no
    /// further than the block that counts `taken`.
    pub fn count_ahead(&mut self, taken: &Range<u64>) -> Option<Extend> {
        if self.holds_back || self.ahead_start().is_some() || !self.is_fresh(taken) {
            return None;
        }
        let bytes = self.ahead.next_bytes.clamp(FIRST_BYTES, MOST_BYTES);
        let most = (bytes / self.geometry.cluster_size_bytes()).max(CLUSTERS_MIN);
        let (index, entry) = self.split(HostCluster(taken.end - 1));
        let order = self.geometry.refcount_order;
        let entries = self.geometry.refcount_block_entries() as usize;
        let block = self.block(index).ok()?;
        let limit = entries.min(entry + 1 + most as usize);
        let free = (entry + 1..limit).take_while(|&e| refcount::get(block, order, e) == 0).count() as u64;
        let run = taken.end..taken.end + free;
        if run.is_empty() || self.overlaps_metadata(&run) {
            return None;
        }
        for cluster in run.clone() {
            self.set(HostCluster(cluster), 1).ok()?; // the block is at hand
        }
        self.ahead.left = run.clone();
        self.ahead.state = Ahead::Counted;
        self.ahead.number += 1;
        self.ahead.next_bytes = bytes * 2;
        (!self.ahead.refused).then_some(Extend { number: self.ahead.number, end: run.end })
    }

    /// The file has been made as long as was asked for, or could not be.
    pub fn extended(&mut self, extend: Extend, succeeded: bool) {
        self.ahead.refused |= !succeeded;
        self.ahead.has_extended |= succeeded;
        if succeeded && extend.number == self.ahead.number {
            self.ahead.state = Ahead::InFile;
        }
    }

    /// Number of the run whose counts and length the next barrier makes durable, once all changed blocks are written.
    pub(super) fn ahead_in_file(&self) -> Option<u64> {
        (self.ahead.state == Ahead::InFile).then_some(self.ahead.number)
    }

    /// A barrier has made durable what was written of run `number`.
    pub(super) fn ahead_is_durable(&mut self, number: u64) {
        if self.ahead.number == number && self.ahead.state == Ahead::InFile {
            self.ahead.state = Ahead::Durable;
        }
    }

    /// Gives back what was counted ahead and not taken: it is free, and as fresh as it was.
    pub fn give_ahead_back(&mut self) -> std::result::Result<(), Need> {
        let left = self.ahead.left.clone();
        let ranges: Vec<_> =
            self.ahead.streams.kept().chain(Some(left.clone()).filter(|left| !left.is_empty())).collect();
        let Some(start) = ranges.iter().map(|range| range.start).min() else { return Ok(()) };
        self.get(HostCluster(start))?; // all of them are in this block
        for cluster in ranges.into_iter().flatten() {
            self.set(HostCluster(cluster), 0)?;
        }
        self.ahead.left = left.start..left.start;
        self.ahead.streams = Streams::default();
        let start = HostCluster(start);
        (self.hint, self.run_hint) = (self.hint.min(start), self.run_hint.min(start));
        Ok(())
    }

    /// Whether the file was made longer ahead, and nobody has cut it since.
    pub fn has_extended(&self) -> bool {
        self.ahead.has_extended
    }

    /// The file has been cut after its last cluster in use.
    pub fn note_cut(&mut self) {
        self.ahead.has_extended = false;
        // What is counted and taken of the run is inside; what is left of it no more.
        self.ahead.state = Ahead::Counted;
        self.ahead.number += 1;
    }
}
