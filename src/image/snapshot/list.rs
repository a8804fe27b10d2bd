//! The snapshots that an image has.

use crate::error::Result;
use crate::format::Snapshot;
use crate::image::Image;
use crate::image::status::CLOSED;
use crate::storage::{Blocking, Io};
use crate::tables::file::HostFile;
use crate::tables::snapshots::SnapshotTable;

impl Image {
    /// The snapshots of the image, in the order in which they were taken. Also of one that was opened to be inspected.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        self.block(self.snapshots_with(&Blocking))
    }

    /// See [`Image::snapshots`].
    pub async fn snapshots_with<I: Io>(&self, io: &I) -> Result<Vec<Snapshot>> {
        if self.status.any(CLOSED) {
            self.status.check_read()?;
        }
        let _entered = self.enter_entry().await;
        Ok(self.load_snapshots(io).await?.snapshots)
    }

    /// The snapshot table as the header says now. For who has entered the image.
    pub(super) async fn load_snapshots<I: Io>(&self, io: &I) -> Result<SnapshotTable> {
        let header = self.header();
        let file = HostFile::new(self.storage.clone());
        SnapshotTable::load(io, &file, header.snapshots_offset, header.snapshots).await
    }
}
