//! The mapping tables of one image file: L1, cached L2 slices, cached refcount blocks, and the order in which their
//! changes reach the disk ([`order`]).

pub mod external;
pub mod file;
pub mod l1;
pub mod l2;
pub mod load;
pub mod order;
pub mod overlap;
pub mod places;
pub mod refcounts;
pub mod snapshots;

use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Corruption, CorruptionKind, Error, Result};
use crate::format::l2::{COPIED, decode_l1};
use crate::format::{
    ClusterState, Geometry, GuestOffset, Header, Host, HostCluster, HostOffset, L1Index, L2Entry, SliceIndex,
};
use crate::plan::read::{Run, Source, continues, run_at};
use crate::plan::{Span, subcluster_mask};
use crate::storage::Io;
use crate::wait::Claims;

use external::ExternalData;
use file::HostFile;
use l1::L1Table;
use l2::{L2Slices, SliceView};
use load::Sequences;
use order::Order;
use overlap::Overlap;
use refcounts::Refcounts;
use refcounts::ahead::Extend;

/// Result of a lookup that does no I/O.
pub enum Found<T> {
    /// What was asked for.
    Hit(T),
    /// This slice has to be loaded first.
    Miss(SliceIndex),
}

/// Where a range that lies inside one cluster is, as the mapped path sees it.
pub enum Place {
    /// All of it from this host offset on, as plain data.
    At(HostOffset),
    /// Nowhere in this file: nothing has ever been stored for the cluster, not even that it is zero.
    Nowhere,
    /// Not to be said without I/O or a closer look.
    Unknown,
}

/// The tables of one open image file.
pub struct Tables {
    /// Shape of the image.
    pub geometry: Geometry,
    /// The image file.
    pub file: HostFile,
    /// The file that guest clusters are in, if that is another one.
    pub external: Option<ExternalData>,
    /// The active L1 table.
    pub l1: L1Table,
    /// Cached L2 slices.
    pub l2: L2Slices,
    /// Cached refcounts.
    pub refcounts: Refcounts,
    /// What reaches the disk when.
    pub order: Order,
    slice_loads: Claims,
    sequences: Sequences,
    size_bytes: AtomicU64,
    metadata: [ClusterRange; 4], // host clusters that no L1 or L2 entry may point to; see is_metadata
    overlap: Overlap,
}

/// A range of host clusters that changes only while somebody holds the image alone.
#[derive(Default)]
struct ClusterRange {
    start: AtomicU64,
    end: AtomicU64,
}

impl ClusterRange {
    #[inline]
    fn contains(&self, cluster: u64) -> bool {
        self.start.load(Ordering::Relaxed) <= cluster && cluster < self.end.load(Ordering::Relaxed)
    }

    fn set(&self, range: &Range<u64>) {
        self.start.store(range.start, Ordering::Relaxed);
        self.end.store(range.end, Ordering::Relaxed);
    }
}

/// Clusters of the header and of what it points to. (Of the snapshot table, whose length it does not tell, the first.)
fn metadata_clusters(header: &Header) -> [Range<u64>; 4] {
    let geometry = header.geometry;
    let range = |at: HostOffset, clusters: u64| {
        let first = geometry.host_cluster(at).0;
        first..first + clusters
    };
    [
        0..1,
        range(header.l1_offset, geometry.clusters_for(u64::from(header.l1_entries) * 8)),
        range(header.snapshots_offset, u64::from(header.snapshots > 0)),
        range(header.refcount_table_offset, u64::from(header.refcount_table_clusters)),
    ]
}

impl Tables {
    /// Reads what an accepted header points to: the L1 table, in one go. Everything else comes on demand.
    pub async fn load<I: Io>(
        io: &I,
        file: HostFile,
        header: &Header,
        l2_cache_bytes: u64,
        refcount_cache_bytes: u64,
    ) -> Result<Self> {
        let l1 = L1Table::load(io, &file, header.l1_offset, u64::from(header.l1_entries)).await?;
        let tables = Self {
            geometry: header.geometry,
            l2: L2Slices::new(header.geometry, l2_cache_bytes, header.size_bytes),
            refcounts: Refcounts::new(header, &l1, refcount_cache_bytes),
            order: Order::default(),
            slice_loads: Claims::default(),
            sequences: Sequences::default(),
            size_bytes: AtomicU64::new(header.size_bytes),
            metadata: Default::default(),
            overlap: Overlap::default(),
            file,
            external: None,
            l1,
        };
        tables.note_metadata(header);
        Ok(tables)
    }

    /// Size of the guest disk.
    #[inline]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// Follows a header that has been written: another size, L1 table or snapshot table. With `l1_entries`, the L1
    /// table is another one, and nothing that was cached of the old one's L2 tables counts any more. Only for who holds
    /// the image alone, with nothing of the old tables waiting to be written.
    pub async fn follow_header(&self, header: &Header, l1_entries: Option<&[u64]>) {
        let _gate = self.order.hold_gate().await;
        let _loading = self.slice_loads.claim_all().await;
        if let Some(entries) = l1_entries {
            self.l2.forget_all();
            self.l1.replace(header.l1_offset, entries);
        }
        self.l2.fit(header.size_bytes);
        self.refcounts.follow_header(header, &self.l1);
        self.note_metadata(header);
        self.size_bytes.store(header.size_bytes, Ordering::Release);
    }

    /// The mapped path: where a range is that lies inside one cluster, if its slice is cached. With `in_place`, only
    /// where it may be overwritten. Where this says [`Place::Unknown`], ask [`Tables::run`].
    #[inline]
    pub fn mapped(&self, offset: GuestOffset, length: u64, in_place: bool) -> Place {
        let geometry = self.geometry;
        let start = geometry.in_cluster(offset);
        if length > geometry.cluster_size_bytes() - start {
            return Place::Unknown;
        }
        let l1_entry = self.l1.get(geometry.l1_index(offset));
        if l1_entry == 0 || (in_place && l1_entry & COPIED == 0) {
            return Place::Unknown;
        }
        let index = geometry.entry_in_slice(offset);
        match self.l2.look(geometry.slice_index(offset), |view| view.entry(index)) {
            None => Place::Unknown,
            Some(entry) if entry == L2Entry::default() => Place::Nowhere,
            Some(entry) => self.plain_place(entry, offset, length, in_place).map_or(Place::Unknown, Place::At),
        }
    }

    /// Host offset of a range inside one cluster that has this entry, if all of it is plain data.
    #[inline]
    fn plain_place(&self, entry: L2Entry, offset: GuestOffset, length: u64, in_place: bool) -> Option<HostOffset> {
        let geometry = self.geometry;
        let start = geometry.in_cluster(offset);
        let (first, last) = (geometry.subcluster_of(start), geometry.subcluster_of(start + length - 1));
        let touched = subcluster_mask(first, last);
        if self.external.is_some() {
            let is_plain = entry.is_plain_external(geometry, geometry.guest_cluster(offset), touched);
            return is_plain.then_some(HostOffset(offset.0));
        }
        let host = entry.plain_host(geometry, touched, in_place)?;
        if in_place && self.metadata_in(geometry.host_cluster(host)).is_some() {
            return None;
        }
        Some(host.plus(start))
    }

    /// The run of bytes with one source that starts at `offset`, at most `max` long and inside one slice (or, where
    /// there are no L2 tables, over as many of them as are missing).
    #[inline]
    pub fn run(&self, offset: GuestOffset, max: u64) -> Result<Found<Run>> {
        let index = self.geometry.l1_index(offset);
        // The offset decides: an entry that is nothing but COPIED has no table either.
        if self.table(index)?.0 == HostOffset(0) {
            return Ok(Found::Hit(self.missing_tables(index, offset, max)));
        }
        self.scan(offset, max, |_| true)
    }

    /// As [`Tables::run`], but only data that may be overwritten in place; `None` where the first byte may not.
    #[inline]
    pub fn run_in_place(&self, offset: GuestOffset, max: u64) -> Result<Found<Option<(HostOffset, u64)>>> {
        let (_, ours) = self.table(self.geometry.l1_index(offset))?;
        if !ours {
            return Ok(Found::Hit(None));
        }
        Ok(match self.scan(offset, max, |state| self.is_ours(state))? {
            Found::Miss(slice) => Found::Miss(slice),
            Found::Hit(Run { source: Source::Data(host), length_bytes }) if length_bytes > 0 => {
                Found::Hit(Some((host, length_bytes)))
            }
            Found::Hit(_) => Found::Hit(None),
        })
    }

    /// Whether data may be written into the host cluster, as far as its entry tells: in-place writes must not reach the
    /// header or the tables, wherever a damaged entry points.
    #[inline]
    fn is_ours(&self, state: &ClusterState) -> bool {
        let reaches_tables = |cluster| self.external.is_none() && self.metadata_in(cluster).is_some();
        matches!(state.host, Host::Cluster { cluster, copied: true } if !reaches_tables(cluster))
    }

    /// Whether a cluster is the header's, the L1, refcount or snapshot table's.
    #[inline]
    pub fn is_metadata(&self, cluster: HostCluster) -> bool {
        self.constant_in(cluster).is_some()
    }

    /// Whether one of these clusters is the header's, the L1, refcount or snapshot table's.
    pub fn holds_metadata(&self, clusters: Range<u64>) -> bool {
        self.refcounts.with(|state| state.overlaps_tables(&clusters))
    }

    fn missing_tables(&self, first: L1Index, offset: GuestOffset, max: u64) -> Run {
        let covers = self.geometry.l2_table_covers_bytes();
        let mut length = covers - (offset.0 & (covers - 1));
        let mut index = first.0 + 1;
        while length < max && self.l1.get(L1Index(index)) == 0 {
            length = length.saturating_add(covers);
            index += 1;
        }
        Run { source: Source::Unallocated(None), length_bytes: length.min(max) }
    }

    /// Joins the runs of clusters from `offset` on inside its slice, as far as `accept` holds for their states; a
    /// run of length 0 if it does not hold for the first.
    #[inline]
    fn scan(&self, offset: GuestOffset, max: u64, accept: impl Fn(&ClusterState) -> bool) -> Result<Found<Run>> {
        let geometry = self.geometry;
        let slice = geometry.slice_index(offset);
        let max = crate::plan::split(geometry, offset, max);
        let found = self.l2.look(slice, |view| {
            let mut joined = Run { source: Source::Unallocated(None), length_bytes: 0 };
            let mut at = offset;
            while joined.length_bytes < max {
                let step = self.scan_cluster(view, at, max - joined.length_bytes, &joined, &accept)?;
                let ControlFlow::Continue(run) = step else { break };
                if joined.length_bytes == 0 {
                    joined.source = run.source;
                }
                joined.length_bytes += run.length_bytes;
                at = at.plus(run.length_bytes);
                if geometry.in_cluster(at) != 0 {
                    break; // the run ended inside a cluster
                }
            }
            Ok(joined)
        });
        match found {
            None => Ok(Found::Miss(slice)),
            Some(Ok(run)) => Ok(Found::Hit(run)),
            Some(Err((kind, at, value))) => Err(self.corrupt_entry(kind, at, value)),
        }
    }

    /// State of the cluster that `offset` lies in, for a write. COPIED only counts if its L2 table is ours as well.
    pub fn state(&self, offset: GuestOffset) -> Result<Found<ClusterState>> {
        let (table, ours) = self.table(self.geometry.l1_index(offset))?;
        if table == HostOffset(0) {
            return Ok(Found::Hit(ClusterState::UNALLOCATED));
        }
        let slice = self.geometry.slice_index(offset);
        let entry = self.l2.look(slice, |view| view.entry(self.geometry.entry_in_slice(offset)));
        let Some(entry) = entry else { return Ok(Found::Miss(slice)) };
        self.meaning(entry, offset, ours).map(Found::Hit)
    }

    /// What the entry of the cluster that `offset` lies in means for a write; `ours`: its table belongs to the active
    /// state alone.
    pub fn meaning(&self, entry: L2Entry, offset: GuestOffset, ours: bool) -> Result<ClusterState> {
        let mut state =
            self.decode(entry, offset).map_err(|kind| self.corrupt_entry(kind, offset, entry.descriptor))?;
        // Not only where it would be overwritten: what a write replaces is released, and perhaps punched.
        if self.external.is_none()
            && let Some(structure) = state.host.clusters(self.geometry).find_map(|c| self.metadata_in(HostCluster(c)))
        {
            return Err(self.corrupt_entry(CorruptionKind::ClusterInMetadata(structure), offset, entry.descriptor));
        }
        if let Host::Cluster { copied, .. } = &mut state.host {
            *copied &= ours;
        }
        Ok(state)
    }

    /// Host offset of the L2 table behind an L1 entry (0: none), and whether it belongs to the active state alone.
    #[inline]
    pub fn table(&self, index: L1Index) -> Result<(HostOffset, bool)> {
        self.decode_l1(index, self.l1.get(index))
    }

    /// As [`Tables::table`], for an entry that is, or was, at this place.
    #[inline]
    pub fn decode_l1(&self, index: L1Index, entry: u64) -> Result<(HostOffset, bool)> {
        let decoded = decode_l1(entry, self.geometry).and_then(|(table, ours)| {
            let cluster = self.geometry.host_cluster(table);
            // Not the snapshot table: if that is where something is wrong, the disk can still be read.
            let in_snapshots = self.metadata[2].contains(cluster.0);
            if table.0 != 0 && !in_snapshots && self.is_metadata(cluster) {
                Err(CorruptionKind::L2TableInMetadata)
            } else {
                Ok((table, ours))
            }
        });
        decoded.map_err(|kind| {
            let guest_offset = Some(index.0 * self.geometry.l2_table_covers_bytes());
            let host_offset = self.l1.entry_offset(index).0;
            Error::Corrupt(Corruption { kind, host_offset, guest_offset, value: entry })
        })
    }

    /// The error for a malformed entry, with its place.
    pub fn corrupt_entry(&self, kind: CorruptionKind, guest: GuestOffset, value: u64) -> Error {
        let slice = self.geometry.slice_index(guest);
        let table = self.table(self.geometry.l1_index(guest)).map_or(0, |(table, _)| table.0);
        let entry = self.geometry.entry_in_slice(guest) as u64 * self.geometry.l2_entry_bytes();
        let host_offset = table + self.geometry.slice_offset_in_table(slice) + entry;
        let guest_offset = Some(guest.0 - self.geometry.in_cluster(guest));
        Error::Corrupt(Corruption { kind, host_offset, guest_offset, value })
    }
}

type BadEntry = (CorruptionKind, GuestOffset, u64);

impl Tables {
    /// One step of [`Tables::scan`]: the run at `at`, or the end of the joined run.
    #[inline]
    fn scan_cluster(
        &self,
        view: &SliceView<'_>,
        at: GuestOffset,
        max: u64,
        joined: &Run,
        accept: impl Fn(&ClusterState) -> bool,
    ) -> std::result::Result<ControlFlow<(), Run>, BadEntry> {
        let geometry = self.geometry;
        let is_first = joined.length_bytes == 0;
        let entry = view.entry(geometry.entry_in_slice(at));
        let state = match self.decode(entry, at) {
            Ok(state) => state,
            Err(kind) if is_first => return Err((kind, at, entry.descriptor)),
            Err(_) => return Ok(ControlFlow::Break(())), // whoever asks for that cluster gets the error
        };
        if !accept(&state) {
            return Ok(ControlFlow::Break(()));
        }
        let start = geometry.in_cluster(at);
        let end = geometry.cluster_size_bytes().min(start.saturating_add(max));
        let run = run_at(geometry, state, Span { start, end });
        if !is_first && !continues(joined, &run) {
            return Ok(ControlFlow::Break(()));
        }
        Ok(ControlFlow::Continue(run))
    }

    /// Makes the file reach to the end of what was counted ahead, where the storage can do that.
    pub fn extend_file(&self, extend: Extend) {
        let end = self.geometry.host_offset(HostCluster(extend.end));
        let extended = self.file.extend(end.0).is_ok();
        self.refcounts.with(|state| state.extended(extend, extended));
    }

    /// Publishes a new L2 table in memory. What is cached of the old one is forgotten: its COPIED flags meant nothing.
    /// Forgotten FIRST: whoever sees that the table is ours believes the flags, and links into the cached slice.
    /// `early`: see [`L1Table::set`].
    pub async fn replace_table(&self, index: L1Index, entry: u64, early: bool) {
        let slices = self.geometry.slices_per_table();
        let first = index.0 * slices;
        // No load may be under way that has read the old table and not yet installed it.
        let _loading = self.slice_loads.claim(first..first + slices).await;
        self.l2.forget(SliceIndex(first)..SliceIndex(first + slices));
        self.l1.set(index, entry, early);
    }

    /// Gives up an L2 table: there is none at this place from now on, and what waited to be written to it never will be.
    /// Returns the number of the change. The caller keeps everybody from changing its entries.
    pub async fn give_up_table(&self, index: L1Index) -> u64 {
        let slices = self.geometry.slices_per_table();
        let first = index.0 * slices;
        // No load may be under way that has read the table and not yet installed it, and no pass that writes to it.
        let _loading = self.slice_loads.claim(first..first + slices).await;
        let _gate = self.order.hold_gate().await;
        self.l1.set(index, 0, false);
        self.l2.give_up(SliceIndex(first)..SliceIndex(first + slices));
        self.order.number_change()
    }
}
