//! The pipelines of writing zeroes and discarding: claim, look up, plan, link, and write as data what no entry can say.

use super::Image;
use super::allocate::{ZERO_PIECES, zero_pieces};
use super::chain::Layer;
use super::link::{Change, look_up};
use crate::alloc::Reservation;
use crate::error::{Error, Result};
use crate::format::{ClusterState, GuestOffset, Host};
use crate::plan::read::Source;
use crate::plan::zero::{Cover, Edge, Outcome, cover, plan_discard, plan_edge, plan_zero};
use crate::plan::{Span, split};
use crate::storage::{Io, IoSrc};

/// How zeroes are to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ZeroFlags {
    /// Host clusters that hold nothing any more may be let go.
    pub may_unmap: bool,
    /// Fail rather than write zeroes as data.
    pub no_fallback: bool,
    /// As for [`super::WriteFlags`].
    pub fua: bool,
}

/// A guest range inside one L2 slice for which changing entries was not enough.
enum Rest {
    /// Zeroes have to be written as data.
    Data(GuestOffset, u64),
    /// To be planned again once the data before it has been written: its cluster is no longer compressed then.
    Again(GuestOffset, u64),
}

impl Image {
    /// Makes a range read as zeroes. See [`Image::write_zeroes`].
    pub async fn write_zeroes_with<I: Io>(
        &self,
        io: &I,
        offset: GuestOffset,
        length: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        self.check_range(offset, length)?;
        if !self.may_change() {
            self.prepare_write(io).await?;
        }
        let result = self.zero_range(io, offset, length, flags).await;
        self.finish_change(io, result).await?;
        if flags.fua || self.write_through { self.flush_with(io).await } else { Ok(()) }
    }

    /// Gives up what a range holds; it reads as zeroes afterwards wherever that could be done. See [`Image::discard`].
    pub async fn discard_with<I: Io>(&self, io: &I, offset: GuestOffset, length: u64) -> Result<()> {
        self.check_range(offset, length)?;
        if !self.may_change() {
            self.prepare_write(io).await?;
        }
        if !self.unmap {
            return Ok(());
        }
        let result = self.discard_range(io, offset, length).await;
        self.finish_change(io, result).await
    }

    async fn finish_change<I: Io>(&self, io: &I, result: Result<()>) -> Result<()> {
        match result {
            Ok(()) => self.maintain(io).await,
            Err(e) => Err(self.note_error(io, e).await),
        }
    }

    pub(super) async fn zero_range<I: Io>(
        &self,
        io: &I,
        offset: GuestOffset,
        length: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        if self.active().is_raw() {
            return self.zero_raw(io, offset, length, flags.may_unmap, !flags.no_fallback).await;
        }
        let (mut at, end) = (offset, offset.0 + length);
        while at.0 < end {
            if let Some(n) = self.drop_whole(io, at, end, flags.may_unmap).await? {
                at = at.plus(n);
                self.maintain(io).await?;
                continue;
            }
            let n = split(self.active().geometry, at, end - at.0);
            let mut rest = self.zero_piece(io, at, n, flags).await?;
            rest.reverse();
            while let Some(next) = rest.pop() {
                match next {
                    Rest::Data(..) if flags.no_fallback => return Err(Error::NoFallback),
                    Rest::Data(at, n) => self.write_zero_data(io, at, n).await?,
                    Rest::Again(at, n) => rest.extend(self.zero_piece(io, at, n, flags).await?),
                }
            }
            at = at.plus(n);
        }
        Ok(())
    }

    /// Changes the entries of a piece; returns what is left to be done, in order.
    async fn zero_piece<I: Io>(&self, io: &I, at: GuestOffset, length: u64, flags: ZeroFlags) -> Result<Vec<Rest>> {
        let tables = self.active();
        let geometry = tables.geometry;
        let _claim = self.claim_clusters(io, at, length).await?;
        self.own_l2_table(io, geometry.l1_index(at)).await?;
        let (mut changes, mut rest) = (Vec::new(), Vec::new());
        for (cluster_at, span) in self.clusters_of_piece(at, length) {
            let state = look_up(io, tables, cluster_at).await?;
            let span = self.span_in(state, cluster_at, span);
            let (mask, edges) = self.plan_edges(io, state, cluster_at, span).await?;
            let has_edges = !edges.is_empty();
            rest.extend(edges.into_iter().map(|(at, n)| Rest::Data(at, n)));
            if mask == 0 {
                continue;
            }
            let below_is_zero = self.below_is_zero(cluster_at);
            match plan_zero(geometry, state, mask, flags.may_unmap, below_is_zero) {
                Outcome::Unchanged => {}
                Outcome::Entry { state: new, releases } => changes.push(change(cluster_at, state, new, releases)),
                Outcome::Write => {
                    let first = u64::from(mask.trailing_zeros()) << geometry.subcluster_bits();
                    let whole = u64::from(mask.count_ones()) << geometry.subcluster_bits();
                    let (at, n) = (cluster_at.plus(first), whole.min(self.size() - cluster_at.0 - first));
                    rest.push(if has_edges { Rest::Again(at, n) } else { Rest::Data(at, n) });
                }
            }
        }
        self.link_changes(io, &changes, Reservation::none(tables)).await?;
        Ok(rest)
    }

    /// Decides about subclusters that are covered in part: the mask of those that become zero as a whole together with
    /// the ones that are covered whole, and the ranges that have to be written.
    async fn plan_edges<I: Io>(
        &self,
        io: &I,
        state: ClusterState,
        cluster_at: GuestOffset,
        span: Span,
    ) -> Result<(u32, Vec<(GuestOffset, u64)>)> {
        let geometry = self.active().geometry;
        let size = geometry.subcluster_size_bytes();
        let Cover { mut whole, head, tail } = cover(geometry, span);
        let mut data = Vec::new();
        for subcluster in head.into_iter().chain(tail) {
            let start = u64::from(subcluster) * size;
            let write = match plan_edge(state, subcluster) {
                // Without a zero flag it stays as it is; as data, it would be written past what the request covers.
                Edge::ZeroIfBelowIs if geometry.version < 3 => {
                    !self.reads_as_zeroes(io, cluster_at.plus(start), size).await?
                }
                Edge::Nothing => false,
                Edge::Write => true,
                Edge::ZeroIfBelowIs if self.reads_as_zeroes(io, cluster_at.plus(start), size).await? => {
                    whole |= 1 << subcluster;
                    false
                }
                Edge::ZeroIfBelowIs => true,
            };
            if write {
                let from = span.start.max(start);
                let to = span.end.min(start + size).min(self.size() - cluster_at.0);
                data.push((cluster_at.plus(from), to - from));
            }
        }
        // With version 2, or a compressed cluster, no edge becomes zero: then the mask is what is whole.
        Ok((whole, data))
    }

    /// Whether all of a range reads as zeroes without looking at data.
    async fn reads_as_zeroes<I: Io>(&self, io: &I, at: GuestOffset, length: u64) -> Result<bool> {
        let mut at = at;
        let end = self.size().min(at.0 + length);
        while at.0 < end {
            let extent = self.chain.resolve(io, at, end - at.0).await?;
            if !matches!(extent.source, Source::Zero(_) | Source::Unallocated(_)) {
                return Ok(false);
            }
            at = at.plus(extent.length_bytes);
        }
        Ok(true)
    }

    async fn write_zero_data<I: Io>(&self, io: &I, at: GuestOffset, length: u64) -> Result<()> {
        let (mut at, end) = (at, at.0 + length);
        while at.0 < end {
            let mut pieces = [IoSrc::EMPTY; ZERO_PIECES];
            let n = zero_pieces(&mut pieces, end - at.0);
            self.write_range(io, &pieces, at, n).await?;
            at = at.plus(n);
        }
        Ok(())
    }

    async fn discard_range<I: Io>(&self, io: &I, offset: GuestOffset, length: u64) -> Result<()> {
        let tables = self.active();
        if tables.is_raw() {
            return self.zero_raw(io, offset, length, true, true).await;
        }
        let (mut at, end) = (offset, offset.0 + length);
        while at.0 < end {
            if let Some(n) = self.drop_whole(io, at, end, true).await? {
                at = at.plus(n);
                self.maintain(io).await?;
                continue;
            }
            let n = split(tables.geometry, at, end - at.0);
            // Where no table exists and nothing lies below, there is nothing to give up.
            if tables.l1.get(tables.geometry.l1_index(at)) != 0 || !self.below_is_zero(at) {
                self.discard_piece(io, at, n).await?;
            }
            at = at.plus(n);
        }
        Ok(())
    }

    async fn discard_piece<I: Io>(&self, io: &I, at: GuestOffset, length: u64) -> Result<()> {
        let tables = self.active();
        let geometry = tables.geometry;
        let _claim = self.claim_clusters(io, at, length).await?;
        self.own_l2_table(io, geometry.l1_index(at)).await?;
        let mut changes = Vec::new();
        for (cluster_at, span) in self.clusters_of_piece(at, length) {
            let state = look_up(io, tables, cluster_at).await?;
            let mask = cover(geometry, self.span_in(state, cluster_at, span)).whole;
            if mask == 0 {
                continue;
            }
            let planned = plan_discard(geometry, state, mask, self.below_is_zero(cluster_at));
            if let Outcome::Entry { state: new, releases } = planned {
                changes.push(change(cluster_at, state, new, releases));
            }
        }
        self.link_changes(io, &changes, Reservation::none(tables)).await
    }

    /// Size of the disk that lies below; 0 where nothing does.
    pub(super) fn size_below(&self) -> u64 {
        self.chain.layers.get(1).map_or(0, Layer::size_bytes)
    }

    /// Whether nothing lies below a cluster that could be seen through it. (What lies there may still read as zeroes.)
    pub(super) fn below_is_zero(&self, cluster_at: GuestOffset) -> bool {
        cluster_at.0 >= self.size_below()
    }

    /// What a span covers of a cluster in a state: a compressed cluster has no subclusters, and so all that the image has
    /// of it is all of it.
    fn span_in(&self, state: ClusterState, cluster_at: GuestOffset, span: Span) -> Span {
        let is_all = span.start == 0 && cluster_at.0 + span.end >= self.size();
        match state.host {
            Host::Compressed(_) if is_all => Span { start: 0, end: self.active().geometry.cluster_size_bytes() },
            _ => span,
        }
    }

    /// The clusters of a piece with the part of each that it covers. A part that reaches the end of the image counts to
    /// the end of its subcluster: nobody can see what lies past the end.
    fn clusters_of_piece(&self, at: GuestOffset, length: u64) -> impl Iterator<Item = (GuestOffset, Span)> {
        let geometry = self.active().geometry;
        let (mut at, end, size) = (at, at.0 + length, self.size());
        std::iter::from_fn(move || {
            if at.0 >= end {
                return None;
            }
            let start = geometry.in_cluster(at);
            let n = (geometry.cluster_size_bytes() - start).min(end - at.0);
            let cluster_at = GuestOffset(at.0 - start);
            at = at.plus(n);
            let mut span = Span { start, end: start + n };
            if at.0 == size {
                span.end = span.end.next_multiple_of(geometry.subcluster_size_bytes());
            }
            Some((cluster_at, span))
        })
    }
}

pub(super) fn change(cluster_at: GuestOffset, old: ClusterState, new: ClusterState, releases: bool) -> Change {
    let drops_data = !releases && old.alloc & !new.alloc != 0;
    Change { cluster_at, state: new, released: if releases { old.host } else { Host::None }, drops_data, early: false }
}
