//! The external data file: guest clusters are in a file of their own, each at its guest offset. It has no refcounts and
//! no tables; the image file has everything else.

use super::Tables;
use super::file::{FLUSH_FAILED, HostFile};
use crate::error::{CorruptionKind, Result};
use crate::format::{ClusterState, GuestOffset, HostCluster, L2Entry, SliceIndex};
use crate::storage::Io;

/// An external data file.
pub struct ExternalData {
    /// The file.
    pub file: HostFile,
    /// It is a raw image of the disk by itself, at every moment (autoclear bit 1).
    pub is_raw: bool,
}

impl Tables {
    /// Where guest data is: the external data file, or the image file itself.
    #[inline]
    pub fn guest_file(&self) -> &HostFile {
        match &self.external {
            None => &self.file,
            Some(external) => &external.file,
        }
    }

    /// Whether guest data is in an external data file that is a raw image by itself.
    #[inline]
    pub fn is_raw(&self) -> bool {
        self.external.as_ref().is_some_and(|external| external.is_raw)
    }

    /// The host cluster of a guest cluster, where that is fixed: in an external data file.
    pub fn fixed_host(&self, at: GuestOffset) -> Option<HostCluster> {
        self.external.is_some().then(|| HostCluster(self.geometry.guest_cluster(at).0))
    }

    /// Ends all writing, to the image file and to the external data file.
    pub fn stop_writes(&self, why: &'static str) {
        self.file.stop_writes(why);
        if let Some(external) = &self.external {
            external.file.stop_writes(why);
        }
    }

    #[inline]
    pub(super) fn decode(&self, entry: L2Entry, at: GuestOffset) -> std::result::Result<ClusterState, CorruptionKind> {
        match self.external {
            None => entry.decode(self.geometry),
            Some(_) => entry.decode_external(self.geometry, self.geometry.guest_cluster(at)),
        }
    }

    /// Makes guest data in the external data file durable, if there is one. What failed here must never be shown by an
    /// entry: nothing more is written to either file (M7).
    pub(super) async fn external_barrier<I: Io>(&self, io: &I) -> Result<()> {
        let Some(external) = &self.external else { return Ok(()) };
        let result = external.file.barrier(io).await;
        if result.is_err() {
            self.file.stop_writes(FLUSH_FAILED);
        }
        result
    }

    /// Replaces the first entries of a slice durably BEFORE anybody sees them in memory, and so before anybody acts on
    /// them. Only for entries that nobody else changes: the caller holds the claim on their clusters.
    pub async fn publish_ahead<I: Io>(&self, io: &I, slice: SliceIndex, entries: &[L2Entry]) -> Result<()> {
        let geometry = self.geometry;
        let _loading = self.slice_loads.claim(slice.0..slice.0 + 1).await;
        let _gate = self.order.hold_gate().await;
        self.pass(io).await?; // the table that the slice is in, and what leads to it
        let (table, _) = self.table(geometry.l1_index_of_slice(slice))?;
        let words = |e: &L2Entry| if geometry.extended_l2 { vec![e.descriptor, e.bitmap] } else { vec![e.descriptor] };
        let bytes: Vec<u8> = entries.iter().flat_map(words).flat_map(u64::to_be_bytes).collect();
        self.external_barrier(io).await?;
        self.barrier(io).await?;
        self.file.write_bytes(io, &bytes, table.plus(geometry.slice_offset_in_table(slice))).await?;
        self.barrier(io).await?;
        let numbered: Vec<(usize, L2Entry)> = entries.iter().copied().enumerate().collect();
        // If it is not cached, the next load finds it on the disk.
        let _ = self.l2.update(slice, &numbered, false);
        Ok(())
    }
}
