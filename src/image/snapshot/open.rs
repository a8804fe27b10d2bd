//! A snapshot as a handle of its own, to be read: the same file, seen from the snapshot's L1 table. Either from a path
//! (option `snapshot`), or beside an image that is open, perhaps for writing.
//!
//! Nothing in a snapshot's tree changes but COPIED flags, which readers ignore, until the snapshot is deleted; so the
//! handle needs no part in the order of the other's requests. A snapshot that is open so cannot be deleted.

use std::sync::{Arc, Mutex};

use crate::error::{Error, Result};
use crate::format::snapshot::find;
use crate::format::{Header, Snapshot};
use crate::image::Image;
use crate::image::chain::{Content, Layer};
use crate::image::status::{CORRUPT, READ_ONLY};
use crate::storage::{Blocking, Io, Storage};
use crate::tables::Tables;
use crate::tables::file::HostFile;
use crate::tables::snapshots::SnapshotTable;
use crate::wait::lock;

/// The snapshots of an image that are open as handles of their own, each as often as it is.
#[derive(Default, Clone)]
pub struct OpenedSnapshots {
    list: Arc<Mutex<Vec<Snapshot>>>,
}

/// Keeps a snapshot from being deleted.
pub struct OpenedSnapshot {
    of: OpenedSnapshots,
    snapshot: Snapshot,
}

impl OpenedSnapshots {
    pub(super) fn contains(&self, snapshot: &Snapshot) -> bool {
        lock(&self.list).contains(snapshot)
    }

    fn add(&self, snapshot: &Snapshot) -> OpenedSnapshot {
        lock(&self.list).push(snapshot.clone());
        OpenedSnapshot { of: self.clone(), snapshot: snapshot.clone() }
    }
}

impl Drop for OpenedSnapshot {
    fn drop(&mut self) {
        let mut list = lock(&self.of.list);
        if let Some(index) = list.iter().position(|s| *s == self.snapshot) {
            list.swap_remove(index);
        }
    }
}

/// The header as it would be if the disk were what the snapshot says. Checks that the snapshot's L1 table lies where it
/// can.
pub fn root_of(header: &Header, snapshot: &Snapshot, entry: u32, file_size: u64) -> Result<Header> {
    let size_bytes = snapshot.check_l1(entry, header.geometry, header.size_bytes, file_size)?;
    let root = Header { size_bytes, l1_entries: snapshot.l1_entries, l1_offset: snapshot.l1_offset, ..header.clone() };
    let cluster = header.geometry.cluster_size_bytes();
    let end = |at: u64, entries: u32| at + (u64::from(entries) * 8).next_multiple_of(cluster);
    let (own, active) = (root.l1_offset.0, header.l1_offset.0);
    let is_apart = own >= end(active, header.l1_entries) || active >= end(own, root.l1_entries);
    if root.l1_entries > 0 && (own == 0 || !is_apart || root.check_placement(file_size).is_err()) {
        return Err(Error::SnapshotTable {
            entry,
            field: "l1_table_offset",
            value: own,
            expected: "an L1 table that does not overlap the header or another table",
        });
    }
    Ok(root)
}

/// The header as a snapshot of an image that is being opened has it.
pub async fn root_named<I: Io>(
    io: &I,
    storage: &Arc<dyn Storage>,
    header: &Header,
    id_or_name: &str,
) -> Result<Header> {
    let file = HostFile::new(storage.clone());
    let table = SnapshotTable::load(io, &file, header.snapshots_offset, header.snapshots).await?;
    let index = find(&table.snapshots, id_or_name.as_bytes())
        .ok_or_else(|| Error::SnapshotMissing { wanted: id_or_name.to_owned() })?;
    root_of(header, &table.snapshots[index], index as u32, file.size_bytes()?)
}

impl Image {
    /// Opens a snapshot of the image as a handle of its own, which takes no writes. It lives as long as it is needed,
    /// also past this one; until it is closed the snapshot cannot be deleted, and the file stays locked.
    pub fn snapshot_open(&self, id_or_name: &str) -> Result<Image> {
        self.block(self.snapshot_open_with(&Blocking, id_or_name))
    }

    /// See [`Image::snapshot_open`].
    pub async fn snapshot_open_with<I: Io>(&self, io: &I, id_or_name: &str) -> Result<Image> {
        self.status.check_read()?;
        let _entered = self.enter_entry().await; // the table stays what it is until the handle is on the list
        let table = self.load_snapshots(io).await?;
        let index = find(&table.snapshots, id_or_name.as_bytes())
            .ok_or_else(|| Error::SnapshotMissing { wanted: id_or_name.to_owned() })?;
        let parent = self.active();
        let header = self.header();
        let root = root_of(&header, &table.snapshots[index], index as u32, parent.file.size_bytes()?)?;
        let (l2_bytes, refcount_bytes) = (parent.l2.budget_bytes(), 0);
        let Content::Qcow2 { compression, .. } = &self.chain.layers[0].content else {
            unreachable!("the first file of a chain is the qcow2 image")
        };
        let tables = Tables::load(io, HostFile::new(self.storage.clone()), &root, l2_bytes, refcount_bytes).await?;
        let content = Content::Qcow2 { tables: Arc::new(tables), compression: *compression };
        let chain = self.chain.beside(Layer { name: String::new(), content });
        let bits = READ_ONLY | if self.status.any(CORRUPT) { CORRUPT } else { 0 };
        let held = lock(&self.lock).clone();
        let mut image = Image::on(chain, root, held, self.storage.clone(), bits);
        image.path = self.path.clone();
        image.opened_as = Mutex::new(Some(self.opened_snapshots.add(&table.snapshots[index])));
        image.log = self.log.clone();
        Ok(image)
    }
}
