//! The pipeline of a write, readable as its stages: split, claim, look up, plan, reserve, write, link.
//!
//! Where all of a range is allocated and ours, it is written in place at once. Everything else goes piece by piece
//! through [`Image::write_allocating`], which holds the claim of whole clusters from before it looks the state up
//! until the new state is linked (scenarios, section 0: what two requests in flight may not share is the CLUSTER).

use std::sync::atomic::Ordering::Relaxed;

use super::Image;
use super::link::{Change, look_up};
use super::options::DetectZeroes;
use crate::alloc::Reservation;
use crate::error::{Error, Result};
use crate::few::Few;
use crate::format::{ClusterState, GuestOffset, Host, HostCluster, HostOffset};
use crate::plan::read::Source;
use crate::plan::write::{Target, WritePlan, plan_write};
use crate::plan::{Span, split};
use crate::storage::pieces::{PieceCursor, PieceList};
use crate::storage::{Io, IoDst, IoSrc, total_src};
use crate::tables::{Found, Place, Tables};

/// How a write is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteFlags {
    /// The call returns only once the write, and what it needs to be found again, is durable.
    pub fua: bool,
    /// The range, which consists of whole clusters, is stored compressed as far as that makes it smaller.
    pub compressed: bool,
}

/// A write into one cluster.
struct Step {
    cluster_at: GuestOffset,
    old: ClusterState,
    plan: WritePlan,
    host: HostCluster, // where it goes; set once clusters are reserved
    early: bool,       // its entry may reach the disk before its data
}

impl Step {
    /// Where its first byte goes.
    fn writes_at(&self, tables: &Tables) -> HostOffset {
        tables.geometry.host_offset(self.host).plus(self.plan.io.start)
    }

    /// Guest range of a part of the cluster.
    fn guest(&self, span: Span) -> (GuestOffset, u64) {
        (self.cluster_at.plus(span.start), span.len())
    }
}

/// Steps whose data may have been written and that are not linked: if it stays so, what they have left in clusters of
/// ours is not zero any more. (Clusters that were reserved for them are given back.)
struct Unlinked<'a> {
    tables: &'a Tables,
    steps: &'a [Step],
}

impl Drop for Unlinked<'_> {
    fn drop(&mut self) {
        for step in self.steps.iter().filter(|step| step.plan.next.is_some()) {
            if let Target::InPlace(cluster) = step.plan.target {
                self.tables.refcounts.with(|state| state.not_fresh(cluster));
            }
        }
    }
}

/// The data of all steps is on its way to disk. Only [`Image::write_steps`] makes one, and only with one can an entry
/// be linked: an entry cannot become visible before what it points to (O2).
struct Written(());

impl Image {
    /// Writes `pieces` at `offset`. See [`Image::write`].
    pub async fn write_with<I: Io>(
        &self,
        io: &I,
        pieces: &[IoSrc<'_>],
        offset: GuestOffset,
        flags: WriteFlags,
    ) -> Result<()> {
        let length = total_src(pieces);
        self.check_range(offset, length)?;
        if flags.compressed {
            self.status.check_write()?; // there may be no tables to ask
            self.check_compressed(offset, length)?;
        }
        if !self.may_change() {
            self.prepare_write(io).await?;
        }
        if length > 0 {
            let result = match self.detect_zeroes {
                // On the heap, so that it does not take room in every write. Zeroes are found there in any case.
                _ if flags.compressed => {
                    Box::pin(self.write_compressed(io, pieces, offset, length)).await.map(|()| true)
                }
                DetectZeroes::Off => self.write_range(io, pieces, offset, length).await,
                _ => self.write_detecting(io, pieces, offset, length).await,
            };
            match result {
                Ok(false) => {}
                Ok(true) => self.maintain(io).await?,
                Err(e) => return Err(self.note_error(io, e).await),
            }
        }
        if flags.fua || self.write_through { self.flush_with(io).await } else { Ok(()) }
    }

    /// Returns whether anything but pure overwriting was needed.
    #[inline]
    pub(super) async fn write_range<I: Io>(
        &self,
        io: &I,
        pieces: &[IoSrc<'_>],
        offset: GuestOffset,
        length: u64,
    ) -> Result<bool> {
        let tables = self.active();
        let mut has_place = false; // or may have one
        {
            let _pin = match self.try_enter() {
                Some(entered) => entered,
                None => self.enter().await,
            };
            self.check_range(offset, length)?;
            match tables.mapped(offset, length, true) {
                Place::At(host) => {
                    self.record(io, offset, length).await?;
                    tables.guest_file().write(io, pieces, host).await?;
                    return Ok(false);
                }
                Place::Nowhere => {}
                Place::Unknown => has_place = true,
            }
        }
        // A data file may need more than a place for the one cluster.
        if !has_place && tables.external.is_none() {
            self.write_allocating(io, pieces, offset, length).await?;
            return Ok(true);
        }
        self.write_pieces(io, pieces, offset, length).await
    }

    async fn write_pieces<I: Io>(
        &self,
        io: &I,
        pieces: &[IoSrc<'_>],
        offset: GuestOffset,
        length: u64,
    ) -> Result<bool> {
        let tables = self.active();
        let mut cursor = PieceCursor::new(pieces);
        let (mut at, mut left, mut allocated) = (offset, length, false);
        while left > 0 {
            let pin = self.enter().await;
            self.check_range(at, left)?;
            let n = match tables.run_in_place(at, left)? {
                Found::Miss(slice) => {
                    drop(pin);
                    tables.load_slice(io, slice).await?;
                    continue;
                }
                Found::Hit(Some((host, n))) if n == length => {
                    self.record(io, at, n).await?;
                    tables.guest_file().write(io, pieces, host).await?;
                    n
                }
                Found::Hit(Some((host, n))) => {
                    self.record(io, at, n).await?;
                    tables.guest_file().write(io, cursor.take(n).as_slice(), host).await?;
                    n
                }
                Found::Hit(None) if tables.is_raw() => {
                    drop(pin);
                    self.allocate_ahead(io, at).await?;
                    allocated = true;
                    continue;
                }
                Found::Hit(None) => {
                    drop(pin);
                    let n = split(tables.geometry, at, left);
                    match n == length {
                        true => self.write_allocating(io, pieces, at, n).await?,
                        false => self.write_allocating(io, cursor.take(n).as_slice(), at, n).await?,
                    }
                    allocated = true;
                    n
                }
            };
            at = at.plus(n);
            left -= n;
        }
        Ok(allocated)
    }

    /// A piece inside one L2 slice of which at least the first byte is not simply overwritten.
    async fn write_allocating<I: Io>(&self, io: &I, payload: &[IoSrc<'_>], at: GuestOffset, length: u64) -> Result<()> {
        let _claim = self.claim_clusters(io, at, length).await?;
        self.write_claimed(io, payload, at, length).await
    }

    /// As [`Image::write_allocating`], for who has the claim, or the image alone. What lies past the end of the disk may
    /// be written as well.
    pub(super) async fn write_claimed<I: Io>(
        &self,
        io: &I,
        payload: &[IoSrc<'_>],
        at: GuestOffset,
        length: u64,
    ) -> Result<()> {
        let tables = self.active();
        self.own_l2_table(io, tables.geometry.l1_index(at)).await?;
        let mut steps = plan_steps(io, tables, at, length).await?;
        // What is filled in where a cluster of our own was zeroed must not meet a transfer from before that. (In an
        // external data file a cluster comes back to its old place even when it was let go.)
        let stays = |s: &&Step| s.plan.target != Target::New || tables.external.is_some();
        let filled = steps.iter().filter(|s| stays(s) && s.plan.next.is_some());
        self.allocator.transfers_done(filled.map(|s| tables.geometry.guest_cluster(s.cluster_at))).await;
        let is_new = |s: &&Step| s.plan.target == Target::New;
        let new = steps.iter().filter(is_new).count() as u64;
        let first = steps.iter().find(is_new).map(|s| tables.geometry.guest_cluster(s.cluster_at));
        let counted = if tables.external.is_some() { 0 } else { new };
        let reservation = self.allocator.reserve_for(io, tables, counted, first).await?;
        assign_hosts(&mut steps, &reservation, tables);
        self.spare_zeroes(&mut steps, &reservation);
        let unlinked = Unlinked { tables, steps: &steps };
        let copies = self.fetch_copies(io, &steps).await?;
        let written = self.write_steps(io, &steps, payload, &copies).await?;
        self.link(io, &steps, reservation, written).await?;
        std::mem::forget(unlinked);
        self.counters.allocating_writes.fetch_add(1, Relaxed);
        self.counters.clusters_allocated.fetch_add(new, Relaxed);
        Ok(())
    }

    /// Where a host cluster holds zeroes that nobody has to write, and the guest saw zeroes, nothing is filled; and the
    /// entry may show such a cluster before its data is durable: the guest sees what it saw, or what it writes (D8).
    fn spare_zeroes(&self, steps: &mut [Step], reservation: &Reservation<'_>) {
        let tables = self.active();
        if tables.external.is_some() {
            return; // the file is the guest's: nobody knows what is in it
        }
        for step in steps.iter_mut().filter(|step| step.plan.next.is_some()) {
            let is_fresh = match step.plan.target {
                Target::New => reservation.is_fresh(),
                Target::InPlace(cluster) => tables.refcounts.with(|s| s.is_fresh(&(cluster.0..cluster.0 + 1))),
            };
            if !is_fresh || !step.plan.covers_zeroes(step.old, self.below_is_zero(step.cluster_at)) {
                continue;
            }
            let filled = step.plan.head().len() + step.plan.tail().len();
            self.counters.zero_filled_bytes.fetch_add(filled, Relaxed);
            step.plan = step.plan.onto_zeroes();
            step.early = step.plan.target != Target::New || reservation.may_show_early();
        }
    }

    /// Reads what the guest sees around the payload of each step: heads and tails, one after the other.
    async fn fetch_copies<I: Io>(&self, io: &I, steps: &[Step]) -> Result<Vec<u8>> {
        let spans = || steps.iter().flat_map(|s| [(s, s.plan.head()), (s, s.plan.tail())]);
        let mut bytes = vec![0u8; spans().map(|(_, span)| span.len() as usize).sum()];
        let mut rest = &mut bytes[..];
        for (step, span) in spans() {
            let (part, next) = std::mem::take(&mut rest).split_at_mut(span.len() as usize);
            rest = next;
            let (at, length) = step.guest(span);
            self.fetch_copy(io, part, at, length).await?;
        }
        Ok(bytes)
    }

    /// Fills `part`, which is zero, with what the guest sees. Past the end of the image that is nothing: zeroes.
    async fn fetch_copy<I: Io>(&self, io: &I, part: &mut [u8], at: GuestOffset, length: u64) -> Result<()> {
        let inside = length.min(self.size().saturating_sub(at.0));
        let mut done = 0;
        while done < inside {
            let extent = self.chain.resolve(io, at.plus(done), inside - done).await?;
            let n = extent.length_bytes;
            if !matches!(extent.source, Source::Zero(_) | Source::Unallocated(_)) {
                let dst = IoDst::from(&mut part[done as usize..(done + n) as usize]);
                self.chain.fill(io, &[dst], at.plus(done), extent).await?;
                self.counters.copied_bytes.fetch_add(n, Relaxed);
            } else {
                self.counters.zero_filled_bytes.fetch_add(n, Relaxed);
            }
            done += n;
        }
        self.counters.zero_filled_bytes.fetch_add(length - inside, Relaxed);
        Ok(())
    }

    /// Writes copied head, payload and copied tail of each step, as one vectored write wherever they touch on the
    /// host.
    async fn write_steps<I: Io>(
        &self,
        io: &I,
        steps: &[Step],
        payload: &[IoSrc<'_>],
        copies: &[u8],
    ) -> Result<Written> {
        let tables = self.active();
        if let [step] = steps
            && copies.is_empty()
        {
            tables.guest_file().write(io, payload, step.writes_at(tables)).await?;
            return Ok(Written(()));
        }
        let mut payload = PieceCursor::new(payload);
        let mut copies = copies;
        let mut batch = PieceList::default();
        let (mut start, mut end) = (HostOffset(0), HostOffset(0));
        for step in steps {
            let at = step.writes_at(tables);
            if at != end {
                if start != end {
                    tables.guest_file().write(io, batch.as_slice(), start).await?;
                }
                batch.clear();
                start = at;
            }
            let (head, rest) = copies.split_at(step.plan.head().len() as usize);
            let (tail, rest) = rest.split_at(step.plan.tail().len() as usize);
            copies = rest;
            batch.push(IoSrc::from(head));
            payload.take_into(step.plan.payload.len(), &mut batch);
            batch.push(IoSrc::from(tail));
            end = at.plus(step.plan.io.len());
        }
        tables.guest_file().write(io, batch.as_slice(), start).await?;
        Ok(Written(()))
    }

    /// Makes the new state of all steps visible at once, and releases the clusters that were replaced.
    async fn link<I: Io>(&self, io: &I, steps: &[Step], reservation: Reservation<'_>, _data: Written) -> Result<()> {
        let changes = steps.iter().filter_map(|step| {
            let bits = step.plan.next?;
            let host = Host::Cluster { cluster: step.host, copied: true };
            let state = ClusterState { host, alloc: bits.alloc, zero: bits.zero };
            let released = if step.plan.releases_old { step.old.host } else { Host::None };
            Some(Change { cluster_at: step.cluster_at, state, released, drops_data: false, early: step.early })
        });
        self.link_changes(io, &changes.collect::<Few<Change>>(), reservation).await
    }
}

/// Looks up and plans each cluster of a piece.
async fn plan_steps<I: Io>(io: &I, tables: &Tables, at: GuestOffset, length: u64) -> Result<Few<Step>> {
    let geometry = tables.geometry;
    let (mut at, end) = (at, at.0 + length);
    let mut steps = Few::default();
    while at.0 < end {
        let old = look_up(io, tables, at).await?;
        let start = geometry.in_cluster(at);
        let payload = Span { start, end: geometry.cluster_size_bytes().min(start + (end - at.0)) };
        let plan = plan_write(geometry, old, payload);
        let host = match plan.target {
            Target::InPlace(cluster) => cluster,
            Target::New => HostCluster(0),
        };
        let cluster_at = GuestOffset(at.0 - start);
        steps.push(Step { cluster_at, old, plan, host, early: false });
        at = at.plus(payload.len());
    }
    Ok(steps)
}

fn assign_hosts(steps: &mut [Step], reservation: &Reservation<'_>, tables: &Tables) {
    let mut clusters = reservation.clusters();
    for step in steps.iter_mut().filter(|s| s.plan.target == Target::New) {
        if let Some(cluster) = tables.fixed_host(step.cluster_at).or_else(|| clusters.next()) {
            step.host = cluster;
        }
    }
    debug_assert!(clusters.next().is_none(), "as many clusters as steps that need one");
}

impl Image {
    /// Refuses requests that reach past the end. What this says holds as long as the caller has entered the image, or
    /// has a claim on clusters: the size may change in between.
    #[inline]
    pub(super) fn check_range(&self, offset: GuestOffset, length: u64) -> Result<()> {
        match offset.0.checked_add(length) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(Error::OutOfRange { offset: offset.0, length, size: self.size() }),
        }
    }
}
