//! Host clusters: finding and reserving them ([`find`]), and taking them back when nobody can need them any more.
//!
//! A host cluster is free (count 0), reserved (counted, in nobody's table: a crash leaks it), live, or released: its
//! entry is gone from memory, but its count stays until (a) the removal is durable and (b) every request that could
//! hold its offset has finished. Only then the count is lowered, and only a count of 0 is ever handed out (M2).

pub mod epoch;
pub mod find;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Mutex;

use crate::error::Result;
use crate::format::{Geometry, Host, HostCluster};
use crate::storage::Io;
use crate::tables::Tables;
use crate::tables::refcounts::Refcounts;
use crate::wait::lock;

use epoch::Epochs;

/// Released runs that may wait before the caller should flush, to bound memory (M9).
const RELEASED_MAX: usize = 1 << 16;

struct Released {
    clusters: Range<u64>,
    change: u64,
    epoch: u64,
}

/// The allocator of one image.
#[derive(Default)]
pub struct Allocator {
    /// Requests under way.
    pub epochs: Epochs,
    released: Mutex<VecDeque<Released>>,
}

/// Clusters that are counted but in no table yet. Dropping it gives back those that were not linked.
pub struct Reservation<'a> {
    refcounts: &'a Refcounts,
    runs: Vec<Range<u64>>,
}

impl<'a> Reservation<'a> {
    /// Of no clusters.
    pub fn none(tables: &'a Tables) -> Self {
        Self { refcounts: &tables.refcounts, runs: Vec::new() }
    }

    /// The clusters, in order.
    pub fn clusters(&self) -> impl Iterator<Item = HostCluster> {
        self.runs.iter().cloned().flatten().map(HostCluster)
    }

    /// The tables refer to the clusters now: nothing is given back.
    pub fn keep(mut self) {
        self.runs.clear();
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let runs = std::mem::take(&mut self.runs);
        if runs.is_empty() {
            return;
        }
        self.refcounts.with(|state| {
            for cluster in runs.into_iter().flatten().map(HostCluster) {
                if !matches!(state.lower(cluster), Ok(Ok(()))) {
                    state.give_back.push(cluster); // its block is not cached: later
                }
            }
        });
    }
}

/// Host clusters that an entry refers to.
pub fn clusters_of(geometry: Geometry, host: Host) -> Range<u64> {
    match host {
        Host::None => 0..0,
        Host::Cluster { cluster, .. } => cluster.0..cluster.0 + 1,
        Host::Compressed(extent) => {
            let last = extent.offset.plus(extent.length_bytes - 1);
            geometry.host_cluster(extent.offset).0..geometry.host_cluster(last).0 + 1
        }
    }
}

impl Allocator {
    /// Reserves `count` clusters, contiguous where that can be.
    pub async fn reserve<'a, I: Io>(&self, io: &I, tables: &'a Tables, count: u64) -> Result<Reservation<'a>> {
        let mut reservation = Reservation::none(tables);
        let mut left = count;
        while left > 0 {
            match tables.refcounts.with(|state| find::take(state, left))? {
                Ok(run) => {
                    left -= run.end - run.start;
                    reservation.runs.push(run);
                }
                Err(need) => tables.refcounts.load(io, &tables.file, need).await?,
            }
        }
        Ok(reservation)
    }

    /// Takes back one reference to each cluster once that is safe. The entry that held it has been replaced in memory
    /// already; `change` is the number of that change.
    pub fn release(&self, clusters: Range<u64>, change: u64) {
        let epoch = self.epochs.removed_at();
        lock(&self.released).push_back(Released { clusters, change, epoch });
    }

    /// Whether so much waits for a flush that one should be made.
    pub fn wants_flush(&self) -> bool {
        lock(&self.released).len() >= RELEASED_MAX
    }

    /// Lowers the counts of all released clusters for which that is safe now.
    pub async fn settle<I: Io>(&self, io: &I, tables: &Tables) -> Result<()> {
        self.epochs.advance();
        let durable = tables.order.durable_through();
        let mut ready = tables.refcounts.with(|state| std::mem::take(&mut state.give_back));
        lock(&self.released).retain(|r| {
            let safe = r.change <= durable && self.epochs.has_passed(r.epoch);
            if safe {
                ready.extend(r.clusters.clone().map(HostCluster));
            }
            !safe
        });
        let mut lowering = Lowering { refcounts: &tables.refcounts, left: ready };
        while let Some(&cluster) = lowering.left.last() {
            match tables.refcounts.with(|state| state.lower(cluster)) {
                Ok(Ok(())) => drop(lowering.left.pop()),
                Ok(Err(need)) => tables.refcounts.load(io, &tables.file, need).await?,
                Err(corrupt) => {
                    lowering.left.pop(); // it cannot be lowered, now or later
                    return Err(corrupt);
                }
            }
        }
        Ok(())
    }
}

/// Clusters whose counts are being lowered; what is left when that ends early is kept for the next time.
struct Lowering<'a> {
    refcounts: &'a Refcounts,
    left: Vec<HostCluster>,
}

impl Drop for Lowering<'_> {
    fn drop(&mut self) {
        if !self.left.is_empty() {
            self.refcounts.with(|state| state.give_back.append(&mut self.left));
        }
    }
}
