//! Internal snapshots: the pipelines of creating, applying and deleting them.
//!
//! Each holds the image alone, and has the form that keeps every crash state valid (D2 to D4, D9): new tables are
//! written, counts are raised and COPIED flags cleared; a barrier; one sector of the header is switched; a barrier; what
//! the old roots alone referred to is lowered, and COPIED flags are set again. Before the switch nothing has happened
//! that a crash or an error would leave as more than a leak; after it everything has, and what is left is tidying up.

mod list;
mod open;
mod tree;

use crate::alloc::{Reservation, bulk};
use crate::error::{Error, Result};
use crate::format::header::{Header, INCOMPATIBLE_DATA_FILE, SNAPSHOTS_MAX};
use crate::format::snapshot::{NAME_BYTES_MAX, encode_table, find, next_id};
use crate::format::{HostOffset, Snapshot};
use crate::image::Image;
use crate::image::alone::{Alone, NewL1};
use crate::image::options::LogLevel;
use crate::image::progress::{Progress, ProgressFn};
use crate::storage::{Blocking, Io};
use crate::tables::Tables;
use crate::tables::snapshots::SnapshotTable;

pub(super) use open::{OpenedSnapshot, OpenedSnapshots, root_named};
use tree::{Count, Tree, own_what_is_single};

/// What the caller says of a new snapshot, apart from its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SnapshotFacts {
    /// When it was taken, in seconds and nanoseconds since the Epoch; otherwise now.
    pub date: Option<(u32, u32)>,
    /// How long the guest has been running, in nanoseconds.
    pub vm_clock_nsec: u64,
}

/// A table that has been written where nothing refers to it yet.
struct NewTable<'a> {
    at: HostOffset,
    clusters: Reservation<'a>,
}

impl Image {
    /// Takes a snapshot of the disk as it is. Returns it.
    pub fn snapshot_create(&self, name: &str, facts: &SnapshotFacts) -> Result<Snapshot> {
        self.block(self.snapshot_create_with(&Blocking, name, facts))
    }

    /// Makes the disk what it was when the snapshot was taken, its size included. The snapshot stays.
    pub fn snapshot_apply(&self, id_or_name: &str) -> Result<()> {
        self.block(self.snapshot_apply_with(&Blocking, id_or_name))
    }

    /// Deletes a snapshot. As long as `tell` can end the call, nothing has been changed.
    pub fn snapshot_delete(&self, id_or_name: &str, tell: Option<ProgressFn<'_>>) -> Result<()> {
        self.block(self.snapshot_delete_with(&Blocking, id_or_name, tell))
    }

    /// See [`Image::snapshot_create`].
    pub async fn snapshot_create_with<I: Io>(&self, io: &I, name: &str, facts: &SnapshotFacts) -> Result<Snapshot> {
        let created = self.create_snapshot(io, name, facts).await;
        self.noting(io, created).await
    }

    async fn create_snapshot<I: Io>(&self, io: &I, name: &str, facts: &SnapshotFacts) -> Result<Snapshot> {
        check_name(name)?;
        let alone = self.hold_for_snapshots(io).await?;
        let tables = alone.tables();
        let mut table = self.load_snapshots(io).await?;
        if table.snapshots.len() >= SNAPSHOTS_MAX as usize {
            return Err(Error::TooLarge { what: "the number of snapshots", limit: SNAPSHOTS_MAX.into() });
        }
        let active = Tree::active(tables);
        active.check(io, tables, Count::Raise, &Progress::none()).await?;
        let old = table.clusters(tables.geometry);
        let l1 = self.write_table(io, &l1_bytes(&active.shared_l1())).await?;
        let new = new_snapshot(&table.snapshots, name, facts, l1.at, active.work() as u32, self.size());
        table.snapshots.push(new.clone());
        let directory = self.write_table(io, &encode_table(&table.snapshots)?).await?;
        active.share(io, tables, &self.allocator).await?;
        let switched = self.switch_to_shared(io, &alone, &active, &directory, table.snapshots.len()).await;
        if let Err(e) = switched {
            self.take_back(io, &alone, &active).await;
            return Err(e);
        }
        l1.clusters.keep();
        directory.clusters.keep();
        self.tidy_up(io, &alone, async |tables| {
            bulk::lower(io, tables, &self.allocator, &old.collect::<Vec<_>>(), self.unmap).await
        })
        .await;
        Ok(new)
    }

    /// The part of creating from when everything is shared to when the snapshot is there.
    async fn switch_to_shared<I: Io>(
        &self,
        io: &I,
        alone: &Alone<'_>,
        active: &Tree,
        directory: &NewTable<'_>,
        count: usize,
    ) -> Result<()> {
        active.disown(alone.tables());
        alone.flush(io).await?;
        let change = |header: &mut Header| {
            header.snapshots = count as u32;
            header.snapshots_offset = directory.at;
        };
        alone.switch_roots(io, change, NewL1::Kept).await
    }

    /// See [`Image::snapshot_apply`].
    pub async fn snapshot_apply_with<I: Io>(&self, io: &I, id_or_name: &str) -> Result<()> {
        let applied = self.apply_snapshot(io, id_or_name).await;
        self.noting(io, applied).await
    }

    async fn apply_snapshot<I: Io>(&self, io: &I, id_or_name: &str) -> Result<()> {
        let alone = self.hold_for_snapshots(io).await?;
        let tables = alone.tables();
        let table = self.load_snapshots(io).await?;
        let (size_bytes, tree) = self.tree_of(io, &table, id_or_name).await?.1;
        let old = Tree::active(tables);
        old.check(io, tables, Count::Lower, &Progress::none()).await?;
        tree.check(io, tables, Count::Raise, &Progress::none()).await?;
        let entries = tree.shared_l1();
        let l1 = self.write_table(io, &l1_bytes(&entries)).await?;
        tree.share(io, tables, &self.allocator).await?;
        let change = |header: &mut Header| {
            header.size_bytes = size_bytes;
            header.l1_entries = entries.len() as u32;
            header.l1_offset = l1.at;
        };
        let switched = match alone.flush(io).await {
            Ok(()) => alone.switch_roots(io, change, NewL1::Replaced(&entries)).await,
            Err(e) => Err(e),
        };
        if let Err(e) = switched {
            self.take_back(io, &alone, &tree).await;
            return Err(e);
        }
        l1.clusters.keep();
        self.tidy_up(io, &alone, async |tables| {
            let lowered = old.lower(io, tables, &self.allocator, self.unmap, &Progress::none()).await;
            lowered.and(bulk::lower(io, tables, &self.allocator, &old.l1_clusters(tables), self.unmap).await)
        })
        .await;
        Ok(())
    }

    /// See [`Image::snapshot_delete`].
    pub async fn snapshot_delete_with<I: Io>(
        &self,
        io: &I,
        id_or_name: &str,
        tell: Option<ProgressFn<'_>>,
    ) -> Result<()> {
        let deleted = self.delete_snapshot(io, id_or_name, tell).await;
        self.noting(io, deleted).await
    }

    async fn delete_snapshot<I: Io>(&self, io: &I, id_or_name: &str, tell: Option<ProgressFn<'_>>) -> Result<()> {
        let alone = self.hold_for_snapshots(io).await?;
        let tables = alone.tables();
        let mut table = self.load_snapshots(io).await?;
        let (index, (_, tree)) = self.tree_of(io, &table, id_or_name).await?;
        if self.opened_snapshots.contains(&table.snapshots[index]) {
            return Err(Error::SnapshotInUse { wanted: id_or_name.to_owned() });
        }
        let progress = Progress::new(tell, 2 * tree.work() + Tree::active(tables).work());
        tree.check(io, tables, Count::Lower, &progress).await?;
        let old = table.clusters(tables.geometry);
        table.snapshots.remove(index);
        let directory = self.write_table(io, &encode_table(&table.snapshots)?).await?;
        alone.flush(io).await?;
        let change = |header: &mut Header| {
            header.snapshots = table.snapshots.len() as u32;
            header.snapshots_offset = directory.at;
        };
        alone.switch_roots(io, change, NewL1::Kept).await?;
        directory.clusters.keep();
        self.tidy_up(io, &alone, async |tables| {
            let lowered = tree.lower(io, tables, &self.allocator, self.unmap, &progress).await;
            let mut clusters = tree.l1_clusters(tables);
            clusters.extend(old);
            clusters.sort_unstable();
            let lowered = lowered.and(bulk::lower(io, tables, &self.allocator, &clusters, self.unmap).await);
            lowered.and(own_what_is_single(io, tables, &progress).await)
        })
        .await;
        Ok(())
    }

    async fn hold_for_snapshots<I: Io>(&self, io: &I) -> Result<Alone<'_>> {
        self.status.check_write()?;
        if self.header().incompatible & INCOMPATIBLE_DATA_FILE != 0 {
            let feature = "snapshots of an image with an external data file, whose clusters have no refcounts".into();
            return Err(Error::Unsupported { feature });
        }
        self.hold_alone(io).await
    }

    /// The snapshot that is meant, and its size and tree once both have been checked.
    async fn tree_of<I: Io>(&self, io: &I, table: &SnapshotTable, id_or_name: &str) -> Result<(usize, (u64, Tree))> {
        let index = find(&table.snapshots, id_or_name.as_bytes())
            .ok_or_else(|| Error::SnapshotMissing { wanted: id_or_name.to_owned() })?;
        let snapshot = &table.snapshots[index];
        let root = open::root_of(&self.header(), snapshot, index as u32, self.active().file.size_bytes()?)?;
        let tree = Tree::load(io, self.active(), snapshot.l1_offset, snapshot.l1_entries).await?;
        Ok((index, (root.size_bytes, tree)))
    }

    /// Writes a table to clusters of its own. One of no bytes is nowhere.
    async fn write_table<I: Io>(&self, io: &I, bytes: &[u8]) -> Result<NewTable<'_>> {
        let tables = self.active();
        if bytes.is_empty() {
            return Ok(NewTable { at: HostOffset(0), clusters: Reservation::none(tables) });
        }
        let count = tables.geometry.clusters_for(bytes.len() as u64);
        let clusters = self.allocator.reserve_run(io, tables, count).await?;
        let Some(first) = clusters.clusters().next() else { unreachable!("at least one was asked for") };
        let at = tables.geometry.host_offset(first);
        tables.file.write_bytes(io, bytes, at).await?;
        Ok(NewTable { at, clusters })
    }

    /// After an error between sharing and the switch: what was raised is lowered, and what was alone is again.
    async fn take_back<I: Io>(&self, io: &I, alone: &Alone<'_>, shared: &Tree) {
        self.tidy_up(io, alone, async |tables| {
            shared.lower(io, tables, &self.allocator, false, &Progress::none()).await?;
            own_what_is_single(io, tables, &Progress::none()).await
        })
        .await;
    }

    /// Does what is left once it is decided which roots count. An error there leaves clusters that are counted too
    /// often until a later flush, or copied although they need not be, and nothing else: it is no error of the call.
    async fn tidy_up<I: Io>(&self, io: &I, alone: &Alone<'_>, work: impl AsyncFnOnce(&Tables) -> Result<()>) {
        let done = match work(alone.tables()).await {
            Ok(()) => alone.flush(io).await,
            Err(e) => Err(e),
        };
        if let Err(e) = done {
            self.log(
                LogLevel::Warning,
                &format!("letting go of clusters after a snapshot operation failed, and is tried again later: {e}"),
            );
        }
    }
}

fn l1_bytes(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}

fn check_name(name: &str) -> Result<()> {
    let why = match name.len() {
        0 => "must not be empty",
        n if n > NAME_BYTES_MAX => "must be at most 255 bytes long",
        _ if name.contains('\0') => "must not contain a zero byte",
        _ => return Ok(()),
    };
    Err(Error::Argument { name: "name", why })
}

fn new_snapshot(
    others: &[Snapshot],
    name: &str,
    facts: &SnapshotFacts,
    l1_offset: HostOffset,
    l1_entries: u32,
    disk_bytes: u64,
) -> Snapshot {
    let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    let (date_sec, date_nsec) = facts.date.unwrap_or((now.as_secs() as u32, now.subsec_nanos()));
    Snapshot {
        l1_offset,
        l1_entries,
        date_sec,
        date_nsec,
        vm_clock_nsec: facts.vm_clock_nsec,
        vm_state_size: 0,
        extra: Snapshot::new_extra(disk_bytes),
        id: next_id(others),
        name: name.into(),
    }
}
