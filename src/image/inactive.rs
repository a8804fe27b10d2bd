//! Where the metadata lies that is not in memory, for the overlap checks of classes `cached` and `all`.

use super::Image;
use super::status::UNLISTED;
use crate::bitmap::stored::{load_directory, pointer};
use crate::error::{Result, Structure};
use crate::format::l2::OFFSET_MASK;
use crate::format::{Geometry, HostOffset};
use crate::storage::{Io, IoDst};
use crate::tables::overlap::{Inactive, OverlapCheck};
use crate::tables::snapshots::SnapshotTable;

/// What is read of an L1 table at once.
const PIECE_BYTES: u64 = 64 << 10;

fn clusters(geometry: Geometry, at: HostOffset, bytes: u64) -> std::ops::Range<u64> {
    geometry.host_cluster(at).0..at.0.saturating_add(bytes).div_ceil(geometry.cluster_size_bytes())
}

impl Image {
    /// Forgets what was listed: somebody is about to change it. Until it is listed again, what can be freed meanwhile is
    /// not taken for metadata.
    pub(super) fn forget_inactive(&self) {
        if self.active().overlap_check() == OverlapCheck::All {
            self.status.set(UNLISTED);
            self.active().set_inactive(Inactive::default());
        }
    }

    /// Loads the refcount table, and lists L1 and L2 tables of snapshots, bitmap directory and bitmap tables. Not for who has a claim or a pin, as
    /// [`Image::enter_entry`] is not.
    pub(super) async fn list_inactive<I: Io>(&self, io: &I) -> Result<()> {
        let _entered = self.enter_entry().await; // nobody moves them meanwhile
        let tables = self.active();
        tables.refcounts.load_table(io, &tables.file).await?;
        if tables.overlap_check() < OverlapCheck::All {
            self.status.clear(UNLISTED);
            return Ok(());
        }
        let (header, geometry) = (self.header(), tables.geometry);
        let mut found = Inactive::default();
        let table = SnapshotTable::load(io, &tables.file, header.snapshots_offset, header.snapshots).await?;
        if header.snapshots > 0 {
            found.add_range(clusters(geometry, table.offset, table.bytes), Structure::SnapshotTable);
        }
        let size = tables.file.size_bytes()?;
        for (entry, snapshot) in (0..).zip(&table.snapshots) {
            snapshot.check_l1(entry, geometry, header.size_bytes, size)?;
            let bytes = u64::from(snapshot.l1_entries) * 8;
            found.add_range(clusters(geometry, snapshot.l1_offset, bytes), Structure::InactiveL1Table);
            let mut at = 0;
            while at < bytes {
                let mut piece = vec![0; PIECE_BYTES.min(bytes - at) as usize];
                tables.file.read(io, &[IoDst::from(&mut piece[..])], snapshot.l1_offset.plus(at)).await?;
                for word in piece.as_chunks::<8>().0 {
                    let table = u64::from_be_bytes(*word) & OFFSET_MASK;
                    // One that the active state shares is its L2 table, which is not written to while it is shared.
                    if table != 0 {
                        found.add(geometry.host_cluster(HostOffset(table)).0, Structure::InactiveL2Table);
                    }
                }
                at += piece.len() as u64;
            }
        }
        if let Some(pointer) = pointer(&header)? {
            let directory = HostOffset(pointer.directory_offset);
            found.add_range(clusters(geometry, directory, pointer.directory_bytes), Structure::Bitmaps);
            for bitmap in load_directory(io, &tables.file, &header).await? {
                found.add_range(clusters(geometry, bitmap.table_offset, bitmap.table_bytes()), Structure::Bitmaps);
            }
        }
        tables.set_inactive(found);
        self.status.clear(UNLISTED);
        Ok(())
    }
}
