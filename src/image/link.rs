//! What every change of guest data has in common: the claim on clusters, the lookup under it, and the one place where
//! L2 entries are written.

use super::Image;
use crate::alloc::Reservation;
use crate::error::Result;
use crate::few::Few;
use crate::format::{ClusterState, GuestOffset, Host, L2Entry};
use crate::storage::Io;
use crate::tables::{Found, Tables};
use crate::wait::Claim;

/// A new entry for a cluster.
pub(super) struct Change {
    /// First byte of the cluster.
    pub(super) cluster_at: GuestOffset,
    /// Its new state, from `plan`.
    pub(super) state: ClusterState,
    /// What the old entry referred to, if the new one does not.
    pub(super) released: Host,
    /// The host cluster stays, but some of the data in it is dropped.
    pub(super) drops_data: bool,
    /// The entry may reach the disk before the data that it shows, and before counts: see `tables::order`.
    pub(super) early: bool,
}

impl Image {
    /// Claims all clusters that a range touches: what two changes in flight may not share is the CLUSTER, however
    /// little of it they change (scenarios, section 0 and R).
    /// Whoever has them keeps out those who want to hold the image alone: its size and its L1 table stay.
    /// The range is noted in the bitmaps that are enabled.
    pub(super) async fn claim_clusters<I: Io>(&self, io: &I, at: GuestOffset, length: u64) -> Result<Claim<'_>> {
        let geometry = self.active().geometry;
        let (first, last) = (geometry.guest_cluster(at), geometry.guest_cluster(at.plus(length - 1)));
        let claim = self.cluster_claims.claim(first.0..last.0 + 1).await;
        self.check_range(at, length)?; // the disk may have shrunk before the claim was had
        self.record(io, at, length).await?;
        Ok(claim)
    }

    /// Makes new entries of one slice visible at once, and releases what they no longer refer to. Whoever links a host
    /// cluster has reserved it, and has written to it what the entry says is there.
    pub(super) async fn link_changes<I: Io>(
        &self,
        io: &I,
        changes: &[Change],
        reservation: Reservation<'_>,
    ) -> Result<()> {
        let Some(first) = changes.first() else { return Ok(()) };
        let tables = self.active();
        let geometry = tables.geometry;
        let slice = geometry.slice_index(first.cluster_at);
        let encode = |c: &Change| (geometry.entry_in_slice(c.cluster_at), L2Entry::encode(c.state, geometry));
        let entries: Few<(usize, L2Entry)> = changes.iter().map(encode).collect();
        let early = changes.iter().all(|change| change.early);
        while !tables.l2.update(slice, &entries, early) {
            tables.load_slice(io, slice).await?; // it was evicted meanwhile
        }
        let number = tables.order.number_change();
        reservation.keep();
        let is_external = tables.external.is_some();
        if !is_external {
            for change in changes.iter().filter(|c| c.drops_data) {
                if let Host::Cluster { cluster, .. } = change.state.host {
                    tables.refcounts.with(|state| state.not_fresh(cluster));
                }
            }
        }
        let dropped = changes.iter().filter(|c| c.drops_data || is_external && c.released != Host::None);
        self.allocator.note_dropped(dropped.map(|c| geometry.guest_cluster(c.cluster_at)));
        if is_external {
            let left = changes.iter().filter(|c| c.released != Host::None && self.unmap);
            self.allocator.note_holes(left.map(|c| geometry.guest_cluster(c.cluster_at)), number);
            return Ok(());
        }
        for change in changes.iter().filter(|c| c.released != Host::None) {
            self.allocator.release(change.released.clusters(geometry), number);
        }
        let dropped = changes.iter().filter(|c| c.released != Host::None && c.state.host == Host::None).count();
        self.note_emptied(first.cluster_at, dropped as u64);
        Ok(())
    }
}

/// State of a cluster whose L2 table exists.
pub(super) async fn look_up<I: Io>(io: &I, tables: &Tables, at: GuestOffset) -> Result<ClusterState> {
    loop {
        match tables.state(at)? {
            Found::Hit(state) => return Ok(state),
            Found::Miss(slice) => tables.load_slice(io, slice).await?,
        }
    }
}
