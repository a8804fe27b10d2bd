//! Giving back the space of an external data file, where guest clusters have let go of their places.
//!
//! A place belongs to its guest cluster for good, so that a write may come back to it at any moment, and no count tells
//! whether it has. Therefore a place is punched only under the claim on its cluster, after a look at the entry.

use super::Image;
use super::link::look_up;
use crate::error::Result;
use crate::format::{GuestCluster, Host, HostOffset};
use crate::storage::Io;

impl Image {
    /// Punches the places that may be punched now. Where somebody works on a cluster, it is left for later.
    pub(super) async fn punch_holes<I: Io>(&self, io: &I) -> Result<()> {
        let tables = self.active();
        if tables.external.is_none() {
            return Ok(());
        }
        let ready = self.allocator.holes(tables);
        let mut left = &ready[..];
        while let Some(first) = left.first() {
            let per_slice = tables.geometry.slice_covers_bytes() >> tables.geometry.cluster_bits;
            let together = |at: u64| at / per_slice == first.0 / per_slice;
            let run = left.iter().zip(first.0..).take_while(|(cluster, at)| cluster.0 == *at && together(*at));
            let (run, rest) = left.split_at(run.count());
            left = rest;
            self.punch_run(io, run).await?;
        }
        Ok(())
    }

    /// Punches neighbours of one slice, as far as they are still without data.
    async fn punch_run<I: Io>(&self, io: &I, run: &[GuestCluster]) -> Result<()> {
        let tables = self.active();
        let geometry = tables.geometry;
        let first = run[0].0;
        let Some(_claim) = self.cluster_claims.try_claim(first..first + run.len() as u64) else {
            return Ok(());
        };
        let mut hole = 0..0;
        for &cluster in run {
            let at = geometry.guest_offset(cluster);
            if !self.allocator.take_hole(cluster, tables) {
                continue;
            }
            if at.0 >= self.size() || tables.table(geometry.l1_index(at))?.0 == HostOffset(0) {
                continue; // the disk has shrunk
            }
            if look_up(io, tables, at).await?.host != Host::None {
                continue; // written again
            }
            if hole.end != at.0 {
                self.punch_range(io, hole).await;
                hole = at.0..at.0;
            }
            hole.end += geometry.cluster_size_bytes();
        }
        self.punch_range(io, hole).await;
        Ok(())
    }

    async fn punch_range<I: Io>(&self, io: &I, range: std::ops::Range<u64>) {
        if !range.is_empty() {
            self.active().guest_file().punch_hole(io, HostOffset(range.start), range.end - range.start).await;
        }
    }
}
