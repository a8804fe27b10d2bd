//! Host clusters: finding and reserving them ([`find`]), and taking them back when nobody can need them any more.
//!
//! A host cluster is free (count 0), reserved (counted, in nobody's table: a crash leaks it), live, or released: its
//! entry is gone from memory, but its count stays until (a) the removal is durable and (b) every request that could
//! hold its offset has finished. Only then the count is lowered, and only a count of 0 is ever handed out (M2).

pub mod bulk;
pub mod epoch;
pub mod find;
pub mod lower;
pub mod pack;
pub mod tail;

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::Result;
use crate::few::Few;
use crate::format::l2::CompressedExtent;
use crate::format::{GuestCluster, Host, HostCluster, HostOffset};
use crate::storage::Io;
use crate::tables::Tables;
use crate::tables::refcounts::ahead::{Ahead, Extend};
use crate::tables::refcounts::{Need, RefcountState, Refcounts};
use crate::wait::lock;

use epoch::Epochs;

/// Released runs, or places in a data file, that may wait before the caller should flush, to bound memory (M9).
const WAITING_MAX: usize = 1 << 16;

struct Released {
    clusters: Range<u64>,
    change: u64,
    epoch: u64,
}

/// A place in the external data file that an entry has let go of.
struct Hole {
    change: u64,
    epoch: u64,
}

/// The allocator of one image.
#[derive(Default)]
pub struct Allocator {
    /// Reads, and writes into clusters that are ours: from their lookup to the end of their I/O. They hold no claim and
    /// wait for none meanwhile, so that whoever holds one may wait for them. Requests that hold the claim of a cluster
    /// need no pin: nobody else can release what its entry refers to.
    pub transfers: Epochs,
    released: Mutex<VecDeque<Released>>,
    /// Guest clusters that have left their places in the external data file, and when they did so last.
    holes: Mutex<HashMap<GuestCluster, Hole>>,
    wants_flush: AtomicBool, // one of the two has become long
    /// Guest clusters whose host cluster stayed when some of its data was dropped, and the epoch of `transfers` then.
    dropped: Mutex<HashMap<GuestCluster, u64>>,
    /// L2 tables that a tree has let go of, but could not be read for what they refer to: with the next flush. They keep
    /// the reference of that tree, so that nobody changes them meanwhile.
    unread: Mutex<Vec<HostOffset>>,
    /// A write that clears COPIED flags of a tree has failed: what is read back of it does not have to be on the disk.
    pub flags_in_doubt: AtomicBool,
}

/// Clusters that are counted but in no table yet. Dropping it gives back those that were not linked.
pub struct Reservation<'a> {
    refcounts: &'a Refcounts,
    runs: Few<Range<u64>>,
    is_fresh: bool,
    ahead: Ahead,
}

impl<'a> Reservation<'a> {
    /// Of no clusters.
    pub fn none(tables: &'a Tables) -> Self {
        Self { refcounts: &tables.refcounts, runs: Few::default(), is_fresh: false, ahead: Ahead::Counted }
    }

    /// The clusters, in order.
    pub fn clusters(&self) -> impl Iterator<Item = HostCluster> {
        self.runs.iter().cloned().flatten().map(HostCluster)
    }

    /// The runs of clusters, in order.
    pub fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    /// Whether all of the clusters are known to have never been written: they read as zeroes, after a crash as well.
    pub fn is_fresh(&self) -> bool {
        self.is_fresh
    }

    /// Whether the file is known to reach to the end of the clusters.
    pub fn is_in_file(&self) -> bool {
        self.ahead != Ahead::Counted
    }

    /// Whether an entry may refer to the clusters on disk before anything else is durable: they are counted and inside
    /// the file after a crash, and read as zeroes until they are written.
    pub fn may_show_early(&self) -> bool {
        self.is_fresh && self.ahead == Ahead::Durable
    }

    /// The tables refer to the clusters now: nothing is given back.
    pub fn keep(mut self) {
        self.runs = Few::default();
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let runs = std::mem::take(&mut self.runs);
        if runs.is_empty() {
            return;
        }
        self.refcounts.with(|state| {
            for cluster in runs.iter().cloned().flatten() {
                if !matches!(state.lower(HostCluster(cluster)), Ok(Ok(()))) {
                    state.give_back.push(cluster..cluster + 1); // its block is not cached: later
                }
            }
        });
    }
}

/// A run that was taken.
struct Taken {
    run: Range<u64>,
    is_fresh: bool,
    ahead: Ahead,
    /// What was counted behind it, for the next ones.
    extend: Option<Extend>,
}

/// As [`find::take_for`]; if nothing is left of what was counted ahead, more is counted.
fn take_noting(state: &mut RefcountState, want: u64, at: Option<u64>) -> Result<std::result::Result<Taken, Need>> {
    Ok(find::take_for(state, want, at)?.map(|(run, is_ahead)| {
        let ahead = if is_ahead { state.ahead_state() } else { Ahead::Counted };
        let is_fresh = state.is_fresh(&run);
        let extend = state.count_ahead(&run);
        Taken { run, is_fresh, ahead, extend }
    }))
}

impl Allocator {
    /// Reserves `count` clusters, contiguous where that can be.
    pub async fn reserve<'a, I: Io>(&self, io: &I, tables: &'a Tables, count: u64) -> Result<Reservation<'a>> {
        self.reserve_for(io, tables, count, None).await
    }

    /// As [`Allocator::reserve`]; the first is for the data of guest cluster `at`, and lies, where that can be, behind that
    /// of the one before.
    pub async fn reserve_for<'a, I: Io>(
        &self,
        io: &I,
        tables: &'a Tables,
        count: u64,
        at: Option<GuestCluster>,
    ) -> Result<Reservation<'a>> {
        let mut reservation = Reservation::none(tables);
        (reservation.is_fresh, reservation.ahead) = (true, Ahead::Durable);
        let mut left = count;
        while left > 0 {
            let at = at.map(|at| at.0 + (count - left));
            let taken = tables.refcounts.with(|state| match state.wants_end_of_file() {
                true => Ok(None),
                false => take_noting(state, left, at).map(Some),
            })?;
            let Some(taken) = taken else {
                let end = tables.file.size_bytes()?.div_ceil(tables.geometry.cluster_size_bytes());
                tables.refcounts.with(|state| state.note_end_of_file(end));
                continue;
            };
            match taken {
                Ok(taken) => {
                    left -= taken.run.end - taken.run.start;
                    reservation.is_fresh &= taken.is_fresh;
                    reservation.ahead = reservation.ahead.min(taken.ahead);
                    reservation.runs.push(taken.run.clone());
                    tables.check_unused(taken.run)?;
                    if let Some(extend) = taken.extend {
                        tables.extend_file(extend);
                    }
                }
                Err(need) => tables.refcounts.load(io, &tables.file, need).await?,
            }
        }
        Ok(reservation)
    }

    /// Reserves `count` clusters past all that was ever written, where everything reads as zeroes. Only for who holds the
    /// image alone.
    pub async fn reserve_fresh<'a, I: Io>(&self, io: &I, tables: &'a Tables, count: u64) -> Result<Reservation<'a>> {
        let mut reservation = Reservation::none(tables);
        let from = match tables.refcounts.with(|state| state.untouched_from()) {
            Some(from) => from,
            None => tables.file.size_bytes()?.div_ceil(tables.geometry.cluster_size_bytes()),
        };
        let (mut from, mut left) = (HostCluster(from), count);
        while left > 0 {
            match tables.refcounts.with(|state| find::take_from(state, from, left))? {
                Ok(run) => {
                    left -= run.end - run.start;
                    from = HostCluster(run.end);
                    reservation.runs.push(run.clone());
                    tables.check_unused(run)?;
                }
                Err(need) => tables.refcounts.load(io, &tables.file, need).await?,
            }
        }
        Ok(reservation)
    }

    /// Reserves `count` clusters in one piece, for a table.
    pub async fn reserve_run<'a, I: Io>(&self, io: &I, tables: &'a Tables, count: u64) -> Result<Reservation<'a>> {
        let fits_a_block = count < tables.geometry.refcount_block_entries();
        let mut too_short = Reservation::none(tables); // given back in the end
        loop {
            let taken = tables.refcounts.with(|state| match fits_a_block {
                true => find::take(state, count),
                false => find::take_behind(state, count),
            })?;
            match taken {
                Ok(run) if run.end - run.start == count => {
                    let reservation = Reservation { runs: Few::One([run.clone()]), ..Reservation::none(tables) };
                    tables.check_unused(run)?;
                    return Ok(reservation);
                }
                Ok(run) => too_short.runs.push(run),
                Err(need) => tables.refcounts.load(io, &tables.file, need).await?,
            }
        }
    }

    /// Reserves room for compressed clusters of these lengths, each shorter than a cluster and counted in every host
    /// cluster that it touches. They lie one behind the other as far as that can be.
    pub async fn reserve_bytes<'a, I: Io>(
        &self,
        io: &I,
        tables: &'a Tables,
        lengths: impl Iterator<Item = u64>,
    ) -> Result<(Reservation<'a>, Vec<CompressedExtent>)> {
        let mut reservation = Reservation::none(tables);
        let mut extents = Vec::new();
        for length in lengths {
            let extent = loop {
                match tables.refcounts.with(|state| pack::take_bytes(state, length))? {
                    Ok(at) => break CompressedExtent::new(at, length),
                    Err(need) => tables.refcounts.load(io, &tables.file, need).await?,
                }
            };
            let clusters = Host::Compressed(extent).clusters(tables.geometry);
            reservation.runs.push(clusters.clone());
            tables.check_unused(clusters)?;
            extents.push(extent);
        }
        Ok((reservation, extents))
    }

    /// Takes back one reference to each cluster once that is safe. The entry that held it has been replaced in memory
    /// already; `change` is the number of that change.
    pub fn release(&self, clusters: Range<u64>, change: u64) {
        let epoch = self.transfers.removed_at();
        let mut released = lock(&self.released);
        released.push_back(Released { clusters, change, epoch });
        self.note_waiting(released.len());
    }

    /// Notes how much waits for a flush, after something was added to it.
    fn note_waiting(&self, count: usize) {
        if count >= WAITING_MAX {
            self.wants_flush.store(true, Ordering::Relaxed);
        }
    }

    /// Notes guest clusters that keep their host cluster although their entries have just stopped showing some of the
    /// data in it. The caller holds the claim on them.
    pub fn note_dropped(&self, clusters: impl Iterator<Item = GuestCluster>) {
        let mut clusters = clusters.peekable();
        if clusters.peek().is_some() {
            let epoch = self.transfers.removed_at();
            let mut dropped = lock(&self.dropped);
            dropped.retain(|_, &mut at| !self.transfers.has_passed(at));
            dropped.extend(clusters.map(|cluster| (cluster, epoch)));
        }
    }

    /// Waits for all transfers that may still reach data which was dropped in these clusters. Otherwise an older write
    /// could land on what is filled in there now and show up again once that is linked; and an older read could see
    /// what is filled in before a newer one still sees zeroes. The caller holds the claim on the clusters.
    pub async fn transfers_done(&self, clusters: impl Iterator<Item = GuestCluster>) {
        let latest = self.dropped_at(clusters);
        if let Some(epoch) = latest {
            self.transfers.passed(epoch).await;
        }
    }

    /// When something was dropped last in these clusters.
    fn dropped_at(&self, clusters: impl Iterator<Item = GuestCluster>) -> Option<u64> {
        let mut clusters = clusters.peekable();
        clusters.peek()?; // nearly always, and then the lock is not needed
        let dropped = lock(&self.dropped);
        clusters.filter_map(|cluster| dropped.get(&cluster).copied()).max()
    }

    /// Notes guest clusters whose entries have just let go of their places in the external data file. `change` is the
    /// number of that change; it replaces what an earlier one has noted.
    pub fn note_holes(&self, clusters: impl Iterator<Item = GuestCluster>, change: u64) {
        let epoch = self.transfers.removed_at();
        let mut holes = lock(&self.holes);
        holes.extend(clusters.map(|cluster| (cluster, Hole { change, epoch })));
        self.note_waiting(holes.len());
    }

    /// Whether nobody reaches the place any more, neither by an older request nor after a crash.
    fn is_safe(&self, hole: &Hole, tables: &Tables) -> bool {
        hole.change <= tables.order.durable_through() && self.transfers.has_passed(hole.epoch)
    }

    /// Guest clusters whose places may be punched, in order.
    pub fn holes(&self, tables: &Tables) -> Vec<GuestCluster> {
        let holes = lock(&self.holes);
        let safe = holes.iter().filter(|(_, hole)| self.is_safe(hole, tables));
        let mut clusters: Vec<GuestCluster> = safe.map(|(cluster, _)| *cluster).collect();
        clusters.sort_unstable();
        clusters
    }

    /// Takes one of them, if it still is one: it may have been written and let go again since. The caller holds the
    /// claim on the cluster, so that this cannot happen from now on.
    pub fn take_hole(&self, cluster: GuestCluster, tables: &Tables) -> bool {
        let mut holes = lock(&self.holes);
        let is_safe = holes.get(&cluster).is_some_and(|hole| self.is_safe(hole, tables));
        if is_safe {
            holes.remove(&cluster);
        }
        is_safe
    }

    /// Whether so much waits for a flush that one should be made. It is asked for once; what still waits after that flush,
    /// because it is not safe yet, asks again with the next that is added to it.
    pub fn takes_flush(&self) -> bool {
        self.wants_flush.load(Ordering::Relaxed) && self.wants_flush.swap(false, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{CreateOptions, create_with, load_header};
    use crate::storage::Blocking;
    use crate::storage::memory::MemoryStorage;
    use crate::tables::file::HostFile;
    use crate::wait::block_on;

    /// What waits to be freed, or punched, is bounded by a flush that whoever adds to it has to make (M9). Asked for once,
    /// and again by the next that is added: what is not safe yet still waits after the flush.
    #[test]
    fn a_flush_is_asked_for_when_much_waits_for_one_and_again_while_it_does() {
        let releases = |allocator: &Allocator| allocator.release(7..8, 0);
        let leaves_places = |allocator: &Allocator| {
            let waiting = lock(&allocator.holes).len() as u64;
            allocator.note_holes(std::iter::once(GuestCluster(waiting)), 0);
        };
        for add in [releases as fn(&Allocator), leaves_places] {
            let allocator = Allocator::default();
            (1..WAITING_MAX).for_each(|_| add(&allocator));
            assert!(!allocator.takes_flush());
            for _ in 0..2 {
                add(&allocator);
                assert!(allocator.takes_flush());
                assert!(!allocator.takes_flush());
            }
        }
    }

    #[test]
    fn a_run_is_in_one_piece_however_long_it_is() {
        for refcount_bits in [1, 64] {
            let storage = std::sync::Arc::new(MemoryStorage::default());
            let options = CreateOptions { cluster_size_bytes: 512, refcount_bits, ..Default::default() };
            block_on(create_with(&Blocking, &*storage, 1 << 20, &options)).unwrap();
            let header = block_on(load_header(&Blocking, &*storage)).unwrap();
            let file = HostFile::new(storage);
            let tables = block_on(Tables::load(&Blocking, file, &header, 1 << 20, 1 << 20)).unwrap();
            let allocator = Allocator::default();
            let mut taken: Vec<u64> = Vec::new();
            for count in [1, 3, 63, 64, 65, 200, 5, 5000, 40000, 1, 62] {
                let run = block_on(allocator.reserve_run(&Blocking, &tables, count)).unwrap();
                let clusters: Vec<u64> = run.clusters().map(|cluster| cluster.0).collect();
                assert_eq!(clusters.len() as u64, count);
                assert!(clusters.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{count} clusters in pieces");
                let counted = |cluster: &u64| tables.refcounts.with(|state| state.get(HostCluster(*cluster)).unwrap());
                assert!(clusters.iter().all(|cluster| counted(cluster) == 1));
                taken.extend(clusters);
                run.keep();
            }
            let all = taken.len();
            taken.sort_unstable();
            taken.dedup();
            assert_eq!(taken.len(), all, "no cluster was handed out twice");
            // What is not kept is free again.
            let given_back = block_on(allocator.reserve_run(&Blocking, &tables, 9)).unwrap().clusters().next();
            let again = block_on(allocator.reserve_run(&Blocking, &tables, 9)).unwrap();
            assert_eq!(again.clusters().next(), given_back);
            again.keep();
            block_on(tables.flush(&Blocking)).unwrap();
        }
    }
}
