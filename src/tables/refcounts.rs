//! The refcount table, whole in memory once it is needed, and a bounded cache of refcount blocks.
//!
//! [`RefcountState`] is plain memory behind a lock; what it needs from disk it asks for by name ([`Need`]), and the
//! caller loads it outside of the lock. Blocks that were added, or a table that moved, exist in memory first; the
//! write-back in `order` makes them reachable on disk in the right order.

pub mod ahead;
mod streams;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::file::HostFile;
use super::l1::{DirtyL1, L1Table};
use super::l2::DirtySlices;
use super::places::Places;
use crate::error::{Corruption, CorruptionKind, Error, Result};
use crate::format::{Geometry, Header, HostCluster, HostOffset, refcount, words};
use crate::storage::{Io, IoDst};
use crate::wait::{Claims, lock};

use ahead::AheadRun;

/// Bits of a refcount table entry that are not an offset.
const TABLE_RESERVED: u64 = 0x1ff;
/// Host offsets have 56 bits in the entries of the other tables, and so in all files.
const HOST_BITS: u32 = 56;
/// Largest refcount table, in bytes (QEMU's limit, so that it can open what we grow).
pub const TABLE_BYTES_MAX: u64 = 8 << 20;
/// Blocks that may be cached whatever the budget is: growing touches two at once.
const BLOCKS_MIN: usize = 4;

/// What has to be loaded before an answer can be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The refcount table.
    Table,
    /// This refcount block.
    Block(u64),
}

struct Block {
    bytes: Box<[u8]>,
    dirty: Range<usize>, // bytes changed since the last write; empty if clean
    writing: bool,
    used: u64,
}

impl Block {
    fn note_dirty(&mut self, range: Range<usize>) {
        self.dirty = match self.dirty.is_empty() {
            true => range,
            false => self.dirty.start.min(range.start)..self.dirty.end.max(range.end),
        };
    }
}

/// The refcounts as the allocator works with them.
pub struct RefcountState {
    geometry: Geometry,
    loaded: bool,
    table: Vec<u64>,
    places: Option<Places>, // where the blocks lie, if anybody asks
    table_offset: HostOffset,
    table_clusters: u64,
    dirty_sectors: BTreeSet<u64>,
    moved: bool,
    retired: Vec<Range<u64>>, // clusters of tables that were moved away from, until the header says so durably
    blocks: BTreeMap<u64, Block>,
    blocks_max: usize,
    clock: u64,
    fixed: Vec<Range<u64>>, // clusters of header, L1 and snapshot table
    /// A cluster has become free through this handle.
    pub has_freed: bool,
    /// What is free from this cluster on has never been written: it lies past the end of the file as it was found, and
    /// past all that was freed since. None: nobody has looked at the end of the file yet.
    fresh_from: Option<u64>,
    /// One past the last cluster that was ever handed out.
    handed_out_end: u64,
    ahead: AheadRun,
    /// Nothing is counted ahead for now.
    pub holds_back: bool,
    /// Runs of clusters whose refcounts are to be lowered as soon as their blocks are at hand.
    pub give_back: Vec<Range<u64>>,
    /// No cluster below this one is free.
    pub hint: HostCluster,
    /// Where the next compressed extent goes: the first byte that nobody has had yet of a host cluster that others are
    /// in already. None once nobody is in it any more.
    pub packing: Option<HostOffset>,
    /// Where the search for runs of several clusters goes on: holes below were too short for an earlier one.
    pub run_hint: HostCluster,
}

/// The cache: the state behind its lock, and the loading of what it needs.
pub struct Refcounts {
    state: Mutex<RefcountState>,
    loads: Claims,
    has_moved: AtomicBool,
}

/// Parts of refcount blocks and of the table, taken for writing.
#[derive(Default)]
pub struct DirtyRefcounts {
    blocks: Vec<(u64, HostOffset, usize, Vec<u8>)>, // index, place of the block, start inside it, bytes
    table_at: HostOffset,                           // where the table is while it is not moved
    table: Vec<(u64, Vec<u8>)>,                     // its changed sectors
    moved: Option<(HostOffset, u64, Vec<u8>)>,      // the whole table at its new place, with its clusters
    retired: Vec<Range<u64>>,
    ahead: Option<u64>, // the run counted ahead that will be durable with these
}

impl DirtyRefcounts {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty() && !self.publishes()
    }

    /// Index and place of each block.
    pub fn places(&self) -> impl Iterator<Item = (u64, HostOffset)> {
        self.blocks.iter().map(|(index, at, _, _)| (*index, *at))
    }

    /// The run counted ahead that will be durable once these are, and what was done to the file before.
    pub fn ahead(&self) -> Option<u64> {
        self.ahead
    }

    /// Whether blocks, or the table itself, have to be made reachable.
    pub fn publishes(&self) -> bool {
        !self.table.is_empty() || self.moved.is_some()
    }
}

impl RefcountState {
    /// The geometry of the image.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Entries that the table has room for.
    pub fn table_capacity(&self) -> u64 {
        self.table.len() as u64
    }

    fn split(&self, cluster: HostCluster) -> (u64, usize) {
        let bits = self.geometry.refcount_block_bits();
        (cluster.0 >> bits, (cluster.0 & ((1 << bits) - 1)) as usize)
    }

    /// First cluster that block `index` counts.
    pub fn block_start(&self, index: u64) -> HostCluster {
        HostCluster(index << self.geometry.refcount_block_bits())
    }

    /// Whether block `index` exists, once the table is loaded.
    pub fn has_block(&self, index: u64) -> std::result::Result<bool, Need> {
        if !self.loaded {
            return Err(Need::Table);
        }
        Ok(self.table.get(index as usize).is_some_and(|&entry| entry != 0))
    }

    /// Index after that of the last block, once the table is loaded.
    pub fn blocks_end(&self) -> std::result::Result<u64, Need> {
        if !self.loaded {
            return Err(Need::Table);
        }
        Ok(self.table.iter().rposition(|&entry| entry != 0).map_or(0, |last| last as u64 + 1))
    }

    /// The bytes of an existing block.
    pub fn block(&mut self, index: u64) -> std::result::Result<&[u8], Need> {
        self.clock += 1;
        let clock = self.clock;
        let block = self.blocks.get_mut(&index).ok_or(Need::Block(index))?;
        block.used = clock;
        Ok(&block.bytes)
    }

    /// Refcount of a cluster; 0 where there is no block.
    pub fn get(&mut self, cluster: HostCluster) -> std::result::Result<u64, Need> {
        let (index, entry) = self.split(cluster);
        if !self.has_block(index)? {
            return Ok(0);
        }
        let order = self.geometry.refcount_order;
        Ok(refcount::get(self.block(index)?, order, entry))
    }

    /// Sets the refcount of a cluster whose block is cached.
    pub fn set(&mut self, cluster: HostCluster, value: u64) -> std::result::Result<(), Need> {
        let (index, entry) = self.split(cluster);
        let order = self.geometry.refcount_order;
        self.block(index)?;
        let block = self.blocks.get_mut(&index).ok_or(Need::Block(index))?;
        refcount::set(&mut block.bytes, order, entry, value);
        let range = refcount::byte_range(order, entry);
        block.note_dirty(range);
        if value == 0 {
            self.end_packing(&(cluster.0..cluster.0 + 1)); // it may be anybody's in a moment
        }
        Ok(())
    }

    /// No more compressed extents go into one of these clusters.
    pub fn end_packing(&mut self, clusters: &Range<u64>) {
        self.packing.take_if(|at| clusters.contains(&self.geometry.host_cluster(*at).0));
    }

    /// Lowers a refcount by one.
    pub fn lower(&mut self, cluster: HostCluster) -> Result<std::result::Result<(), Need>> {
        let count = match self.get(cluster) {
            Ok(0) => return Err(self.corrupt(CorruptionKind::RefcountUnderflow, cluster)),
            Ok(count) => count,
            Err(need) => return Ok(Err(need)),
        };
        if count == 1 {
            self.note_freed(cluster);
        }
        Ok(self.set(cluster, count - 1))
    }

    fn note_freed(&mut self, cluster: HostCluster) {
        self.has_freed = true;
        self.hint = self.hint.min(cluster);
        self.run_hint = self.run_hint.min(cluster);
        self.not_fresh(cluster);
    }

    /// What is in this cluster is not only what its entry shows: it was freed, or something in it was dropped, or a write
    /// to it has failed.
    pub fn not_fresh(&mut self, cluster: HostCluster) {
        self.fresh_from = self.fresh_from.map(|from| from.max(cluster.0 + 1));
    }

    /// Whether the end of the file has to be told before anything is known to be fresh.
    pub fn wants_end_of_file(&self) -> bool {
        self.fresh_from.is_none()
    }

    /// The file, `clusters` long, ends here: behind that, everything reads as zeroes.
    pub fn note_end_of_file(&mut self, clusters: u64) {
        self.fresh_from.get_or_insert(clusters); // the first word counts: clusters may have been freed since
    }

    /// Notes that clusters were handed out.
    pub fn note_handed_out(&mut self, clusters: &Range<u64>) {
        self.handed_out_end = self.handed_out_end.max(clusters.end);
    }

    /// What was handed out so far counts as written to, wherever its entries say that there is nothing.
    pub fn forget_fresh(&mut self) {
        self.fresh_from = self.fresh_from.map(|from| from.max(self.handed_out_end));
    }

    /// From this cluster on, everything is free and reads as zeroes, where the end of the file was looked at.
    pub fn untouched_from(&self) -> Option<u64> {
        self.fresh_from.map(|from| from.max(self.handed_out_end))
    }

    /// Whether clusters that are free, or have just been handed out, have never been written. Of a cluster that is in
    /// use: whether it is zero wherever its entry shows no data.
    pub fn is_fresh(&self, clusters: &Range<u64>) -> bool {
        self.fresh_from.is_some_and(|from| from <= clusters.start)
    }

    /// The runs of clusters, of those that one block counts, that have no reference more than `times`, which is not 0.
    pub fn with_references(&mut self, clusters: &Range<u64>, times: u64) -> std::result::Result<Vec<Range<u64>>, Need> {
        let (index, entry) = self.split(HostCluster(clusters.start));
        if !self.has_block(index)? {
            return Ok(Vec::new());
        }
        let order = self.geometry.refcount_order;
        let block = self.block(index)?;
        let mut found: Vec<Range<u64>> = Vec::new();
        let mut at = clusters.start;
        while at < clusters.end {
            let entries = entry + (at - clusters.start) as usize..entry + (clusters.end - clusters.start) as usize;
            let n = refcount::run_of(block, order, entries, times) as u64;
            if n > 0 {
                found.push(at..at + n);
            }
            at += n + 1; // the next one has another count
        }
        Ok(found)
    }

    /// Lowers the refcounts of clusters that one block counts by `times`. Returns how many of them were lowered: all
    /// of them, or those before one that does not have so many references.
    pub fn lower_run(&mut self, clusters: Range<u64>, times: u64) -> (u64, Result<std::result::Result<(), Need>>) {
        let (index, first) = self.split(HostCluster(clusters.start));
        match self.has_block(index) {
            Ok(true) => {}
            Ok(false) => return (0, Err(self.corrupt(CorruptionKind::RefcountUnderflow, HostCluster(clusters.start)))),
            Err(need) => return (0, Ok(Err(need))),
        }
        if let Err(need) = self.block(index) {
            return (0, Ok(Err(need)));
        }
        let Some(block) = self.blocks.get_mut(&index) else { return (0, Ok(Err(Need::Block(index)))) };
        let order = self.geometry.refcount_order;
        let (mut done, mut freed) = (0, None);
        let alike =
            refcount::run_of(&block.bytes, order, first..first + (clusters.end - clusters.start) as usize, times);
        if alike > 0 {
            refcount::clear(&mut block.bytes, order, first..first + alike);
            done = alike as u64;
            freed = Some((clusters.start, clusters.start + done - 1));
        }
        for (cluster, entry) in clusters.clone().zip(first..).skip(alike) {
            let Some(left) = refcount::get(&block.bytes, order, entry).checked_sub(times) else { break };
            refcount::set(&mut block.bytes, order, entry, left);
            if left == 0 {
                freed = Some((freed.map_or(cluster, |(lowest, _): (u64, u64)| lowest), cluster));
            }
            done += 1;
        }
        if done > 0 {
            let last = refcount::byte_range(order, first + done as usize - 1);
            block.note_dirty(refcount::byte_range(order, first).start..last.end);
        }
        if let Some((lowest, highest)) = freed {
            self.note_freed(HostCluster(lowest));
            self.not_fresh(HostCluster(highest));
            self.end_packing(&(lowest..highest + 1)); // as above; for what lies between, it costs only space
        }
        if done == clusters.end - clusters.start {
            return (done, Ok(Ok(())));
        }
        let without = HostCluster(clusters.start + done);
        (done, Err(self.corrupt(CorruptionKind::RefcountUnderflow, without)))
    }

    /// Whether each of these clusters, which are sorted, can get as many references more as it is listed. A cluster that
    /// is referred to already and counted as free is corruption.
    pub fn check_raise(&mut self, clusters: &[u64]) -> Result<std::result::Result<(), Need>> {
        for group in clusters.chunk_by(|a, b| a == b) {
            let cluster = HostCluster(group[0]);
            let count = match self.get(cluster) {
                Ok(0) => return Err(self.corrupt(CorruptionKind::ReferencedCountedFree, cluster)),
                Ok(count) => count,
                Err(need) => return Ok(Err(need)),
            };
            let max = self.geometry.refcount_max();
            if group.len() as u64 > max - count {
                let what = "the number of references to a host cluster (its width is refcount_bits)";
                return Err(Error::TooLarge { what, limit: max });
            }
        }
        Ok(Ok(()))
    }

    /// Whether each of these clusters, which are sorted, has as many references as it is listed.
    pub fn check_lower(&mut self, clusters: &[u64]) -> Result<std::result::Result<(), Need>> {
        for group in clusters.chunk_by(|a, b| a == b) {
            let cluster = HostCluster(group[0]);
            match self.get(cluster) {
                Ok(count) if count < group.len() as u64 => {
                    return Err(self.corrupt(CorruptionKind::RefcountUnderflow, cluster));
                }
                Ok(_) => {}
                Err(need) => return Ok(Err(need)),
            }
        }
        Ok(Ok(()))
    }

    /// Adds the references of [`RefcountState::check_raise`], of one block: all of them or none.
    pub fn raise(&mut self, clusters: &[u64]) -> Result<std::result::Result<(), Need>> {
        if let Err(need) = self.check_raise(clusters)? {
            return Ok(Err(need));
        }
        for &cluster in clusters {
            let cluster = HostCluster(cluster);
            let raised = self.get(cluster).and_then(|count| self.set(cluster, count + 1));
            if let Err(need) = raised {
                return Ok(Err(need)); // not after the check: all of them are in the block that it looked at
            }
        }
        Ok(Ok(()))
    }

    /// The error for a cluster whose count is wrong.
    pub fn corrupt(&self, kind: CorruptionKind, cluster: HostCluster) -> Error {
        let (index, entry) = self.split(cluster);
        let host_offset = match self.table.get(index as usize).copied().unwrap_or(0) {
            0 => self.table_offset.0 + index * 8, // there is no block: what is wrong is its entry in the table
            block => block + refcount::byte_range(self.geometry.refcount_order, entry).start as u64,
        };
        let value = self.geometry.host_offset(cluster).0;
        Error::Corrupt(Corruption { kind, host_offset, guest_offset: None, value })
    }

    /// Adds block `index`, all zero, in host cluster `at`. The caller counts that cluster.
    pub fn add_block(&mut self, index: u64, at: HostCluster) {
        self.clock += 1;
        let size = self.geometry.cluster_size_bytes() as usize;
        let block = Block { bytes: vec![0; size].into(), dirty: 0..size, writing: false, used: self.clock };
        self.blocks.insert(index, block);
        self.set_entry(index, self.geometry.host_offset(at).0);
    }

    fn set_entry(&mut self, index: u64, entry: u64) {
        let old = std::mem::replace(&mut self.table[index as usize], entry);
        if let Some(places) = &mut self.places {
            places.change(old, entry);
        }
        self.dirty_sectors.insert(index / 64);
    }

    /// Where block `index`, which exists, is.
    pub fn block_place(&self, index: u64) -> HostCluster {
        self.geometry.host_cluster(HostOffset(self.table[index as usize]))
    }

    /// Drops block `index`, which counts its own cluster and nothing else: that is free once the table says so on disk.
    /// Only where nobody can be given a cluster before.
    pub fn drop_block(&mut self, index: u64) {
        let place = self.block_place(index);
        self.set_entry(index, 0);
        self.blocks.remove(&index);
        let start = self.block_start(index);
        (self.hint, self.run_hint) = (self.hint.min(start), self.run_hint.min(start));
        self.not_fresh(place);
    }

    /// The first cluster from `end` on that is known to hold a table, a block or the header.
    pub fn table_behind(&self, end: HostCluster) -> Option<HostCluster> {
        let table = self.geometry.host_cluster(self.table_offset).0;
        let table = table..table + self.table_clusters;
        let ranges = self.fixed.iter().chain(&self.retired).chain(std::iter::once(&table));
        let tables = ranges.filter(|range| !range.is_empty() && range.end > end.0).map(|range| range.start.max(end.0));
        let blocks = self.table.iter().filter(|&&entry| entry != 0).map(|entry| entry >> self.geometry.cluster_bits);
        tables.chain(blocks.filter(|&block| block >= end.0)).min().map(HostCluster)
    }

    /// From now on, [`RefcountState::block_in`] knows.
    pub fn note_places(&mut self) {
        self.places = Some(Places::of(self.geometry.cluster_size_bytes(), self.table.iter().copied()));
    }

    /// The first place in a range of host offsets where a block, other than block `own`, lies. Nothing is known before
    /// [`RefcountState::note_places`], and while the table is not loaded.
    pub fn block_in(&self, offsets: Range<u64>, own: Option<u64>) -> Option<HostOffset> {
        let own = own.and_then(|index| self.table.get(index as usize)).copied();
        self.places.as_ref()?.first_in(offsets, own).map(HostOffset)
    }

    /// Whether blocks, or the table, wait for being written.
    pub fn waits_for_write(&self) -> bool {
        self.dirty_blocks() > 0 || !self.dirty_sectors.is_empty() || self.moved
    }

    /// Moves the table to `at`, `clusters` long. The caller counts those clusters; the old ones are given back once
    /// the header points to the new place.
    pub fn move_table(&mut self, at: HostCluster, clusters: u64) {
        let first = self.geometry.host_cluster(self.table_offset).0;
        self.retired.push(first..first + self.table_clusters);
        self.table_offset = self.geometry.host_offset(at);
        self.table_clusters = clusters;
        self.table.resize((clusters * self.geometry.cluster_size_bytes() / 8) as usize, 0);
        self.moved = true;
    }

    /// Whether a run of clusters, counted as free, holds metadata (the constant part of QEMU's overlap check).
    pub fn overlaps_metadata(&self, run: &Range<u64>) -> bool {
        let (index, _) = self.split(HostCluster(run.start));
        let own_block = self.table.get(index as usize).map_or(0, |&offset| offset >> self.geometry.cluster_bits);
        run.contains(&own_block) || self.overlaps_tables(run)
    }

    /// Whether a cluster belongs to the header, the L1 table, the refcount table or the start of the snapshot table.
    fn is_table(&self, cluster: u64) -> bool {
        self.overlaps_tables(&(cluster..cluster + 1))
    }

    /// Whether one of these clusters belongs to the header, the L1 table, the refcount table or the start of the snapshot
    /// table.
    pub fn overlaps_tables(&self, run: &Range<u64>) -> bool {
        let table = self.geometry.host_cluster(self.table_offset).0;
        let table = table..table + self.table_clusters;
        let mut ranges = self.fixed.iter().chain(&self.retired).chain(std::iter::once(&table));
        ranges.any(|r| r.start < run.end && run.start < r.end)
    }

    /// Where the table is, and its length in clusters: what the header says once nothing waits to be written.
    pub fn root(&self) -> (HostOffset, u64) {
        (self.table_offset, self.table_clusters)
    }

    /// Number of blocks that wait for being written.
    pub fn dirty_blocks(&self) -> usize {
        self.blocks.values().filter(|b| !b.dirty.is_empty()).count()
    }

    fn evict_to_fit(&mut self) {
        while self.blocks.len() >= self.blocks_max {
            let clean = self.blocks.iter().filter(|(_, b)| b.dirty.is_empty() && !b.writing);
            let Some((&index, _)) = clean.min_by_key(|(_, b)| b.used) else { return };
            self.blocks.remove(&index);
        }
    }

    fn table_bytes(&self, sector: Option<u64>) -> Vec<u8> {
        let entries = match sector {
            Some(s) => &self.table[(s * 64) as usize..self.table.len().min((s as usize + 1) * 64)],
            None => &self.table[..],
        };
        entries.iter().flat_map(|e| e.to_be_bytes()).collect()
    }
}

/// Clusters of the header and of the tables that it points to, except the refcount table.
fn fixed_clusters(header: &Header, l1: &L1Table) -> Vec<Range<u64>> {
    let geometry = header.geometry;
    let clusters =
        |from: HostOffset, to: HostOffset| geometry.host_cluster(from).0..to.0.div_ceil(geometry.cluster_size_bytes());
    let l1 = l1.host_range();
    let mut fixed = vec![0..1, clusters(l1.start, l1.end)];
    if header.snapshots > 0 {
        fixed.push(clusters(header.snapshots_offset, header.snapshots_offset.plus(1)));
    }
    fixed
}

impl Refcounts {
    /// A cache of at most `budget_bytes` of blocks.
    pub fn new(header: &Header, l1: &L1Table, budget_bytes: u64) -> Self {
        let geometry = header.geometry;
        let blocks_max = (budget_bytes / geometry.cluster_size_bytes()) as usize;
        let state = RefcountState {
            geometry,
            loaded: false,
            table: Vec::new(),
            places: None,
            table_offset: header.refcount_table_offset,
            table_clusters: u64::from(header.refcount_table_clusters),
            dirty_sectors: BTreeSet::new(),
            moved: false,
            retired: Vec::new(),
            blocks: BTreeMap::new(),
            blocks_max: blocks_max.max(BLOCKS_MIN),
            clock: 0,
            fixed: fixed_clusters(header, l1),
            has_freed: false,
            fresh_from: None,
            handed_out_end: 0,
            ahead: AheadRun::default(),
            holds_back: false,
            give_back: Vec::new(),
            hint: HostCluster(0),
            run_hint: HostCluster(0),
            packing: None,
        };
        Self { state: Mutex::new(state), loads: Claims::default(), has_moved: AtomicBool::new(false) }
    }

    /// Follows a header that has been written: its L1 and snapshot tables are elsewhere.
    pub fn follow_header(&self, header: &Header, l1: &L1Table) {
        self.with(|state| state.fixed = fixed_clusters(header, l1));
    }

    /// Whether the table has left the place where it was at open. Its clusters there may then hold anything.
    pub fn has_moved(&self) -> bool {
        self.has_moved.load(Ordering::Acquire)
    }

    /// Runs `f` on the state; nothing in it may wait.
    pub fn with<R>(&self, f: impl FnOnce(&mut RefcountState) -> R) -> R {
        f(&mut lock(&self.state))
    }

    /// Whether so many blocks are dirty that they should be written before more become so.
    pub fn wants_write_back(&self) -> bool {
        self.with(|s| s.dirty_blocks() * 2 >= s.blocks_max)
    }

    /// Loads what the state asked for.
    pub async fn load<I: Io>(&self, io: &I, file: &HostFile, need: Need) -> Result<()> {
        match need {
            Need::Table => self.load_table(io, file).await,
            Need::Block(index) => self.load_block(io, file, index).await,
        }
    }

    /// Loads the refcount table, if that has not been done.
    pub async fn load_table<I: Io>(&self, io: &I, file: &HostFile) -> Result<()> {
        let _loading = self.loads.claim_all().await;
        let (loaded, offset, bytes) =
            self.with(|s| (s.loaded, s.table_offset, s.table_clusters * s.geometry.cluster_size_bytes()));
        if loaded {
            return Ok(());
        }
        let mut bytes = vec![0u8; bytes as usize];
        // Its place was checked; what the file lacks of its last cluster reads as zeroes.
        file.read(io, &[IoDst::from(&mut bytes[..])], offset).await?;
        self.with(|s| {
            s.table = words(&bytes).collect();
            s.loaded = true;
            if let Some(places) = &mut s.places {
                places.refill(s.table.iter().copied());
            }
        });
        Ok(())
    }

    async fn load_block<I: Io>(&self, io: &I, file: &HostFile, index: u64) -> Result<()> {
        let _loading = self.loads.claim(index..index + 1).await;
        let (cached, geometry, entry, entry_offset, in_table) = self.with(|s| {
            let entry = s.table.get(index as usize).copied().unwrap_or(0);
            let in_table = s.is_table(entry >> s.geometry.cluster_bits);
            (s.blocks.contains_key(&index), s.geometry, entry, s.table_offset.plus(index * 8).0, in_table)
        });
        if cached {
            return Ok(());
        }
        let corrupt =
            |kind| Error::Corrupt(Corruption { kind, host_offset: entry_offset, guest_offset: None, value: entry });
        if entry >> HOST_BITS != 0 {
            return Err(corrupt(CorruptionKind::RefcountBlockBeyondEof)); // no file is asked for offsets like that
        }
        // Counts are never written over the header or a table, whatever the entry says.
        let misplaced = entry == 0 || in_table || entry & (geometry.cluster_size_bytes() - 1) != 0;
        if misplaced || entry & TABLE_RESERVED != 0 {
            return Err(corrupt(CorruptionKind::RefcountTableEntry));
        }
        let mut bytes = vec![0u8; geometry.cluster_size_bytes() as usize];
        let got = file.read(io, &[IoDst::from(&mut bytes[..])], HostOffset(entry)).await?;
        if got < bytes.len() {
            return Err(corrupt(CorruptionKind::RefcountBlockBeyondEof));
        }
        self.with(|s| {
            s.evict_to_fit();
            s.clock += 1;
            let used = s.clock;
            s.blocks.entry(index).or_insert(Block { bytes: bytes.into(), dirty: 0..0, writing: false, used });
        });
        Ok(())
    }

    /// Takes everything that changed for writing, as it is now.
    ///
    /// It asks for the entries that were collected before it: counts taken earlier might miss clusters that these refer
    /// to (M3), and so the wrong order does not compile.
    pub fn collect_dirty(&self, _slices: &DirtySlices, _l1: &DirtyL1) -> DirtyRefcounts {
        self.with(|s| {
            let mut taken = DirtyRefcounts { table_at: s.table_offset, ..DirtyRefcounts::default() };
            for (&index, block) in &mut s.blocks {
                if block.dirty.is_empty() {
                    continue;
                }
                // Whole sectors, so that a torn write cannot split an entry of any width.
                let range = block.dirty.start / 512 * 512..block.dirty.end.next_multiple_of(512);
                let at = HostOffset(s.table[index as usize]);
                taken.blocks.push((index, at, range.start, block.bytes[range].to_vec()));
                block.dirty = 0..0;
                block.writing = true;
            }
            taken.ahead = s.ahead_in_file();
            let sectors = std::mem::take(&mut s.dirty_sectors);
            if std::mem::take(&mut s.moved) {
                taken.moved = Some((s.table_offset, s.table_clusters, s.table_bytes(None)));
                taken.retired = std::mem::take(&mut s.retired);
            } else {
                taken.table = sectors.into_iter().map(|sector| (sector, s.table_bytes(Some(sector)))).collect();
            }
            taken
        })
    }

    /// A barrier after the writing of everything that was collected has succeeded.
    pub fn durable(&self, ahead: Option<u64>) {
        if let Some(number) = ahead {
            self.with(|s| s.ahead_is_durable(number));
        }
    }

    /// Gives back what was counted ahead, loading what that needs.
    pub async fn give_ahead_back<I: Io>(&self, io: &I, file: &HostFile) -> Result<()> {
        while let Err(need) = self.with(RefcountState::give_ahead_back) {
            self.load(io, file, need).await?;
        }
        Ok(())
    }

    /// Ends the writing of what was collected; after a failure it is dirty again.
    pub fn written(&self, taken: DirtyRefcounts, succeeded: bool) {
        self.with(|s| {
            for (index, _, start, bytes) in taken.blocks {
                let Some(block) = s.blocks.get_mut(&index) else { continue };
                block.writing = false;
                if !succeeded {
                    let failed = start..start + bytes.len();
                    let was = if block.dirty.is_empty() { failed.clone() } else { block.dirty.clone() };
                    block.dirty = failed.start.min(was.start)..failed.end.max(was.end);
                }
            }
            let retired = taken.retired;
            if succeeded {
                // Before anybody can be handed the old clusters.
                self.has_moved.fetch_or(!retired.is_empty(), Ordering::AcqRel);
                s.give_back.extend(retired);
            } else {
                s.dirty_sectors.extend(taken.table.iter().map(|(sector, _)| *sector));
                s.moved |= taken.moved.is_some();
                s.retired.extend(retired);
            }
        });
    }

    /// Writes the blocks that were collected.
    pub async fn write_blocks<I: Io>(&self, io: &I, file: &HostFile, taken: &DirtyRefcounts) -> Result<()> {
        for (_, at, start, bytes) in &taken.blocks {
            file.write_bytes(io, bytes, at.plus(*start as u64)).await?;
        }
        Ok(())
    }

    /// Writes a table that moved at its new place. The blocks must be durable: an earlier pass may have pointed the
    /// header here although it was told that this failed. `false`: there was nothing to do.
    pub async fn write_moved_table<I: Io>(&self, io: &I, file: &HostFile, taken: &DirtyRefcounts) -> Result<bool> {
        let Some((at, _, bytes)) = &taken.moved else { return Ok(false) };
        file.write_bytes(io, bytes, *at).await?;
        Ok(true)
    }

    /// Makes new blocks (or the moved table) reachable. They must be durable. `false`: there was nothing to do.
    pub async fn publish<I: Io>(&self, io: &I, file: &HostFile, taken: &DirtyRefcounts) -> Result<bool> {
        if let Some((at, clusters, _)) = &taken.moved {
            // refcount_table_offset and refcount_table_clusters lie side by side in the header's first sector (D1).
            let mut root = [0u8; 12];
            root[..8].copy_from_slice(&at.0.to_be_bytes());
            root[8..].copy_from_slice(&(*clusters as u32).to_be_bytes());
            file.write_bytes(io, &root, HostOffset(crate::format::header::OFFSET_REFCOUNT_TABLE)).await?;
            return Ok(true);
        }
        for (sector, bytes) in &taken.table {
            file.write_bytes(io, bytes, taken.table_at.plus(sector * 512)).await?;
        }
        Ok(!taken.table.is_empty())
    }
}
