//! Growing: whatever lies past the old end, in this file or below it, is made to read as zeroes before the new size
//! shows it.

use std::ops::Range;

use super::Alone;
use crate::alloc::Reservation;
use crate::error::{Error, Result};
use crate::format::{ClusterState, GuestOffset, Host, HostCluster, HostOffset, L1Index};
use crate::image::allocate::{ZEROES, allocate, write_zeroes};
use crate::image::alone::NewL1;
use crate::image::link::{Change, look_up};
use crate::image::options::Preallocation;
use crate::image::progress::{Progress, ProgressFn};
use crate::plan::resize::{Ahead, Grown, cut, kept_subclusters, plan_grown};
use crate::plan::split;
use crate::storage::pieces::PieceList;
use crate::storage::{Io, IoSrc};

/// The clusters of a piece with what they have to become.
struct Cluster {
    at: GuestOffset,
    old: ClusterState,
    new: Grown,
}

impl Alone<'_> {
    /// Makes the disk larger. After an error it has its old size.
    pub(super) async fn grow<I: Io>(
        &self,
        io: &I,
        size: u64,
        mode: Preallocation,
        tell: Option<ProgressFn<'_>>,
    ) -> Result<()> {
        let old = self.image().size();
        let geometry = self.tables().geometry;
        let below = self.image().size_below();
        if geometry.version < 3 && below > old {
            let feature = "growing a version 2 image over a longer backing file: it has no zero flag to hide that with";
            return Err(Error::Unsupported { feature: feature.to_owned() });
        }
        let progress = Progress::new(tell, size - old);
        progress.advance(0)?;
        let result = match self.drop_past(io, old).await {
            Ok(()) => self.fill_new_area(io, old, size, mode, &progress).await,
            Err(e) => Err(e),
        };
        let result = match result {
            Ok(()) => self.switch_to_larger(io, size).await,
            Err(e) => Err(e),
        };
        if result.is_err() {
            let undone = self.undo_growth(io, old).await;
            self.note("what was allocated for a disk that could not grow is given up only in part", undone);
            let freed = self.give_back(io).await;
            self.note("the space of a disk that could not grow is not given back", freed);
        }
        result
    }

    /// Everything that the larger disk has is there: the new size comes into force.
    async fn switch_to_larger<I: Io>(&self, io: &I, size: u64) -> Result<()> {
        self.flush(io).await?;
        let (present, wanted) = (self.tables().l1.count(), self.tables().geometry.l1_entries_for(size));
        if wanted <= present {
            return self.switch_roots(io, |header| header.size_bytes = size, NewL1::Kept).await;
        }
        let entries = self.tables().l1.entries_to(wanted);
        self.switch_table(io, size, &entries).await
    }

    /// The disk keeps its old size: whatever was made for the larger one goes.
    async fn undo_growth<I: Io>(&self, io: &I, old: u64) -> Result<()> {
        self.flush(io).await?;
        self.drop_past(io, old).await?;
        match &self.tables().external {
            Some(external) if external.file.size_bytes()? > old => external.file.set_size(old),
            _ => Ok(()),
        }
    }

    /// Gives up whatever the tables hold past `end`, which is the end of the disk: stale entries that somebody else has
    /// left, or those of a disk that could not grow.
    async fn drop_past<I: Io>(&self, io: &I, end: u64) -> Result<()> {
        let tables = self.tables();
        let geometry = tables.geometry;
        let covers = geometry.l2_table_covers_bytes();
        let first_whole = end.div_ceil(covers);
        let mut at = GuestOffset(end - geometry.in_cluster(GuestOffset(end)));
        let limit = first_whole.saturating_mul(covers);
        while at.0 < limit && tables.l1.get(geometry.l1_index(at)) != 0 {
            let n = split(geometry, at, limit - at.0);
            if !self.cut_piece(io, at, n, end).await?.is_empty() {
                self.image().own_l2_table(io, geometry.l1_index(at)).await?;
                let changes = self.cut_piece(io, at, n, end).await?;
                self.image().link_changes(io, &changes, Reservation::none(tables)).await?;
            }
            at = at.plus(n);
        }
        for index in (first_whole..tables.l1.count()).map(L1Index) {
            let Some(table) = self.stored_table(io, index, tables.l1.get(index)).await? else { continue };
            tables.replace_table(index, 0, false).await;
            self.release_table(&table, index)?;
            self.maintain(io).await?;
        }
        Ok(())
    }

    /// The changes that make a piece hold nothing past `end`.
    async fn cut_piece<I: Io>(&self, io: &I, at: GuestOffset, length: u64, end: u64) -> Result<Vec<Change>> {
        let tables = self.tables();
        let geometry = tables.geometry;
        let mut changes = Vec::new();
        for cluster_at in (at.0..at.0 + length).step_by(geometry.cluster_size_bytes() as usize).map(GuestOffset) {
            let old = look_up(io, tables, cluster_at).await?;
            let state = cut(old, kept_subclusters(geometry, cluster_at.0, end));
            if state != old {
                let released = if state.host == Host::None { old.host } else { Host::None };
                changes.push(Change { cluster_at, state, released, drops_data: true, early: false });
            }
        }
        Ok(changes)
    }

    /// Makes `[old, size)` read as zeroes, with host clusters as `mode` says.
    async fn fill_new_area<I: Io>(
        &self,
        io: &I,
        old: u64,
        size: u64,
        mode: Preallocation,
        progress: &Progress<'_>,
    ) -> Result<()> {
        let geometry = self.tables().geometry;
        self.lengthen_data_file(old, size)?;
        self.zero_behind(io, old).await?;
        let end = match mode {
            Preallocation::Off => size.min(self.image().size_below()),
            _ => size,
        };
        if end <= old {
            return Ok(());
        }
        let needed = geometry.l1_entries_for(end);
        if needed > self.tables().l1.count() {
            self.flush(io).await?;
            let entries = self.tables().l1.entries_to(needed);
            self.switch_table(io, old, &entries).await?;
        }
        let mut at = GuestOffset(old - geometry.in_cluster(GuestOffset(old)));
        while at.0 < end {
            let n = split(geometry, at, end - at.0);
            self.fill_piece(io, at, n, old, mode).await?;
            self.maintain(io).await?;
            progress.advance(at.0 + n - old.max(at.0))?;
            at = at.plus(n);
        }
        Ok(())
    }

    /// Makes the external data file as long as the new disk. What it holds past the old one is nobody's, and would show
    /// up there: it is cut off first.
    fn lengthen_data_file(&self, old: u64, size: u64) -> Result<()> {
        let Some(external) = &self.tables().external else { return Ok(()) };
        if external.file.size_bytes()? > old {
            external.file.set_size(old)?;
        }
        external.file.set_size(size)
    }

    /// Writes zeroes from the old end to the end of its subcluster, if that holds anything: bytes of this file, or those
    /// below. A compressed cluster is no longer compressed then: it holds nothing past the end.
    async fn zero_behind<I: Io>(&self, io: &I, old: u64) -> Result<()> {
        let tables = self.tables();
        let geometry = tables.geometry;
        let at = GuestOffset(old);
        let start = geometry.in_cluster(at);
        if start == 0 {
            return Ok(());
        }
        let index = geometry.l1_index(at);
        let state = match tables.table(index)?.0 {
            HostOffset(0) => ClusterState::UNALLOCATED,
            _ => look_up(io, tables, at).await?,
        };
        let subcluster = geometry.subcluster_size_bytes();
        let bit = 1 << geometry.subcluster_of(start);
        let is_cut = !start.is_multiple_of(subcluster);
        let holds = match state.host {
            Host::Compressed(_) => true,
            _ if !is_cut || state.zero & bit != 0 => false,
            // An external data file ended there.
            _ if state.alloc & bit != 0 => tables.external.is_none(),
            _ => !self.image().below_is_zero(at),
        };
        if !holds {
            return Ok(());
        }
        let length = (start + 1).next_multiple_of(subcluster) - start;
        let mut payload = PieceList::default();
        for from in (0..length).step_by(ZEROES.len()) {
            payload.push(IoSrc::from(&ZEROES[..(length - from).min(ZEROES.len() as u64) as usize]));
        }
        self.image().write_claimed(io, payload.as_slice(), at, length).await
    }

    /// Gives each cluster of a piece the entry that it begins its life on the larger disk with.
    async fn fill_piece<I: Io>(
        &self,
        io: &I,
        at: GuestOffset,
        length: u64,
        old: u64,
        mode: Preallocation,
    ) -> Result<()> {
        let tables = self.tables();
        let geometry = tables.geometry;
        let ahead = match mode {
            Preallocation::Off => Ahead::Nothing,
            Preallocation::Metadata => Ahead::Clusters,
            Preallocation::Falloc | Preallocation::Full => Ahead::Space,
        };
        self.image().own_l2_table(io, geometry.l1_index(at)).await?;
        let mut clusters = Vec::new();
        for cluster_at in (at.0..at.0 + length).step_by(geometry.cluster_size_bytes() as usize).map(GuestOffset) {
            let state = look_up(io, tables, cluster_at).await?;
            let kept = kept_subclusters(geometry, cluster_at.0, old);
            let below_is_zero = self.image().below_is_zero(GuestOffset(cluster_at.0.max(old)));
            let new = plan_grown(geometry, state, kept, ahead, below_is_zero);
            if new.wants_host || (new.alloc, new.zero) != (state.alloc, state.zero) {
                clusters.push(Cluster { at: cluster_at, old: state, new });
            }
        }
        let wanted = clusters.iter().filter(|c| c.new.wants_host).count() as u64;
        let counted = if tables.external.is_some() { 0 } else { wanted };
        let reservation = self.allocator().reserve_fresh(io, tables, counted).await?;
        self.make_space(io, &reservation, mode).await?;
        if tables.external.is_some() {
            self.give_space(io, old.max(at.0)..at.0 + length, mode).await?;
        }
        let mut hosts = reservation.clusters();
        let changes = clusters.iter().map(|cluster| {
            let place = |()| tables.fixed_host(cluster.at).or_else(|| hosts.next());
            let fresh = cluster.new.wants_host.then_some(()).and_then(place);
            let host = fresh.map_or(cluster.old.host, |cluster: HostCluster| Host::Cluster { cluster, copied: true });
            let state = ClusterState { host, alloc: cluster.new.alloc, zero: cluster.new.zero };
            Change { cluster_at: cluster.at, state, released: Host::None, drops_data: false, early: false }
        });
        let changes: Vec<Change> = changes.collect();
        drop(hosts);
        self.image().link_changes(io, &changes, reservation).await
    }

    /// Makes the file as long as its new clusters need it, and gives them space.
    async fn make_space<I: Io>(&self, io: &I, reservation: &Reservation<'_>, mode: Preallocation) -> Result<()> {
        let tables = self.tables();
        for run in reservation.runs() {
            let (from, to) = (
                tables.geometry.host_offset(HostCluster(run.start)).0,
                tables.geometry.host_offset(HostCluster(run.end)).0,
            );
            // Always: what was set aside does not count as written everywhere, and has to lie inside the file.
            if tables.file.size_bytes()? < to {
                tables.file.set_size(to)?;
            }
            self.give_space(io, from..to, mode).await?;
        }
        Ok(())
    }

    /// Gives space to a range of the file that guest data is in, which reads as zeroes.
    async fn give_space<I: Io>(&self, io: &I, range: Range<u64>, mode: Preallocation) -> Result<()> {
        let storage = self.tables().guest_file().storage();
        let (silent, length) = (Progress::none(), range.end - range.start);
        match mode {
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc => allocate(io, storage, range.start, length, &silent).await,
            Preallocation::Full => write_zeroes(io, storage, range.start, length, &silent).await,
        }
    }
}
