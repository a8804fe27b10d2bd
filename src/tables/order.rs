//! Which flush comes before which: the only place that writes changed tables.
//!
//! ```text
//! collect     L2 slices, then L1 sectors, then refcounts, as they are now. In that order: the refcounts then cover
//!             every reference in the slices (M3), whatever goes on meanwhile
//! write       refcount blocks (raised counts; lowered ones only after step 4 of an earlier pass)
//! BARRIER 1   data, copied data, new L2 tables and refcounts are durable           O1 O2
//!             (of an external data file too: it is made durable first, whether it was written to or not)
//!             Left out if every changed entry may show EARLY: it refers to clusters whose counts are durable and that
//!             read as zeroes until they are written, where the guest saw zeroes before (`refcounts::ahead`)
//! [publish    new refcount blocks in the refcount table, or the header's pointer to a table that moved (the table
//!             itself is written between the two, with a barrier of its own)
//!  BARRIER    they are reachable]                       only if there are any        D2
//! write       L2 slices and L1 sectors: entries become visible after a crash
//! BARRIER 2   what was removed from them is gone                                    O3 O4 O7
//! ```
//! A pass for eviction leaves out barrier 2; the first barrier of the next pass plays its part.
//! Changes are numbered, so that whoever freed a cluster can ask whether its removal is durable
//! ([`Order::durable_through`]); only then its refcount is lowered, and only after that it can be allocated again.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Tables;
use super::file::FLUSH_FAILED;
use super::l1::DirtyL1;
use super::l2::DirtySlices;
use super::refcounts::DirtyRefcounts;
use crate::error::Result;
use crate::storage::Io;
use crate::wait::{ClaimFuture, Claims};

/// Numbers of changes and flushes.
#[derive(Default)]
pub struct Order {
    gate: Claims, // one pass at a time
    changes: AtomicU64,
    written_through: AtomicU64,
    durable_through: AtomicU64,
    flushes_started: AtomicU64,
    flushes_done: AtomicU64,
}

impl Order {
    /// Numbers a change that has been made to an L2 slice or the L1 table in memory.
    pub fn number_change(&self) -> u64 {
        self.changes.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Keeps passes out.
    pub(super) fn hold_gate(&self) -> ClaimFuture<'_> {
        self.gate.claim(0..1)
    }

    /// All changes up to this number are durable.
    pub fn durable_through(&self) -> u64 {
        self.durable_through.load(Ordering::SeqCst)
    }
}

/// What one pass has collected. If it ends early, for whatever reason, all of it is dirty again.
struct Pass<'a> {
    tables: &'a Tables,
    slices: DirtySlices,
    l1: DirtyL1,
    refcounts: DirtyRefcounts,
    through: u64,
    succeeded: bool,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.tables.l2.written(&self.slices, self.succeeded);
        if !self.succeeded {
            self.tables.l1.redirty(&self.l1);
        }
        self.tables.refcounts.written(std::mem::take(&mut self.refcounts), self.succeeded);
    }
}

/// What a pass has done.
pub(super) struct Passed {
    /// It has made an external data file durable as it stood after the pass began.
    external_is_durable: bool,
    /// The run counted ahead that the next barrier makes durable.
    ahead: Option<u64>,
}

impl<'a> Pass<'a> {
    fn collect(tables: &'a Tables) -> Self {
        let through = tables.order.changes.load(Ordering::SeqCst);
        let slices = tables.l2.collect_dirty();
        let l1 = tables.l1.collect_dirty();
        let refcounts = tables.refcounts.collect_dirty(&slices, &l1);
        Self { tables, slices, l1, refcounts, through, succeeded: false }
    }

    /// Whether anything becomes visible that has to wait for the first barrier.
    fn has_entries_that_wait(&self) -> bool {
        let is_early = !self.slices.wait_for_data() && (self.l1.is_early || self.l1.sectors.is_empty());
        let has_entries = !self.slices.is_empty() || !self.l1.sectors.is_empty();
        has_entries && (!is_early || self.tables.external.is_some())
    }

    /// Steps up to the second barrier.
    async fn write<I: Io>(&self, io: &I) -> Result<()> {
        let Tables { file, refcounts, l1, geometry, .. } = self.tables;
        self.tables.check_blocks(&self.refcounts)?;
        refcounts.write_blocks(io, file, &self.refcounts).await?;
        if self.has_entries_that_wait() {
            self.tables.external_barrier(io).await?;
        }
        if self.has_entries_that_wait() || self.refcounts.publishes() {
            self.tables.barrier(io).await?;
        }
        if refcounts.write_moved_table(io, file, &self.refcounts).await? {
            self.tables.barrier(io).await?;
        }
        if refcounts.publish(io, file, &self.refcounts).await? {
            self.tables.barrier(io).await?;
        }
        for (first, bytes) in self.slices.runs(*geometry) {
            let index = geometry.l1_index_of_slice(first);
            self.tables.check_table(index)?;
            let (table, _) = self.tables.table(index)?;
            file.write_bytes(io, bytes, table.plus(geometry.slice_offset_in_table(first))).await?;
        }
        l1.write(io, file, &self.l1).await
    }
}

impl Tables {
    /// Writes all changed tables back so that their slots can be reused. Not a flush: what was written last may still
    /// be lost.
    pub async fn write_back<I: Io>(&self, io: &I) -> Result<()> {
        let _gate = self.order.gate.claim(0..1).await;
        self.pass(io).await.map(drop)
    }

    /// Makes everything durable that was acknowledged before the call (O7). Flushes that wait for a running one
    /// share the next.
    pub async fn flush<I: Io>(&self, io: &I) -> Result<()> {
        let order = &self.order;
        let before = order.flushes_started.load(Ordering::SeqCst);
        let _gate = order.gate.claim(0..1).await;
        if order.flushes_done.load(Ordering::SeqCst) > before {
            return Ok(()); // a flush that started after this call has succeeded
        }
        let number = order.flushes_started.fetch_add(1, Ordering::SeqCst) + 1;
        let Passed { external_is_durable, ahead } = self.pass(io).await?;
        if !external_is_durable {
            self.external_barrier(io).await?;
        }
        self.barrier(io).await?;
        self.refcounts.durable(ahead);
        order.flushes_done.store(number, Ordering::SeqCst);
        Ok(())
    }

    /// A barrier by itself, for what was written to the header.
    pub async fn sync<I: Io>(&self, io: &I) -> Result<()> {
        let _gate = self.order.gate.claim(0..1).await;
        self.barrier(io).await
    }

    /// One pass.
    pub(super) async fn pass<I: Io>(&self, io: &I) -> Result<Passed> {
        let mut pass = Pass::collect(self);
        pass.write(io).await?;
        pass.succeeded = true;
        self.order.written_through.fetch_max(pass.through, Ordering::SeqCst);
        Ok(Passed { external_is_durable: pass.has_entries_that_wait(), ahead: pass.refcounts.ahead() })
    }

    pub(super) async fn barrier<I: Io>(&self, io: &I) -> Result<()> {
        let written = self.order.written_through.load(Ordering::SeqCst);
        if let Err(e) = self.file.barrier(io).await {
            self.stop_writes(FLUSH_FAILED);
            return Err(e);
        }
        self.order.durable_through.fetch_max(written, Ordering::SeqCst);
        Ok(())
    }
}
