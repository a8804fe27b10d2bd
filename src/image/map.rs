//! What a guest range reads from, for callers.

use super::Image;
use crate::error::{Error, Result};
use crate::format::{GuestOffset, HostOffset};
use crate::plan::read::Source;
use crate::storage::Io;

/// What an extent reads as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapKind {
    /// Data, plain in the file at `host_offset`.
    Data,
    /// Zeroes, and some file of the chain says so.
    Zero,
    /// Nowhere in the chain: reads as zeroes.
    Unallocated,
    /// Data, compressed.
    Compressed,
}

/// A guest range that reads from one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapExtent {
    /// First byte.
    pub start: GuestOffset,
    /// Length in bytes.
    pub length: u64,
    /// File of the chain that decides: 0 is the image itself. For [`MapKind::Unallocated`] the last one that was asked.
    pub depth: u32,
    /// What it reads as.
    pub kind: MapKind,
    /// Offset into that file, where a host cluster exists; for zeroes it is only preallocated.
    pub host_offset: Option<HostOffset>,
    /// The host cluster is in that file's external data file.
    pub in_data_file: bool,
}

impl Image {
    /// The extent that starts at `offset`, at most `length` long. See [`Image::map`].
    pub async fn map_with<I: Io>(&self, io: &I, offset: GuestOffset, length: u64) -> Result<MapExtent> {
        self.status.check_read()?;
        if length == 0 {
            return Err(Error::Argument { name: "length", why: "must not be 0" });
        }
        let _pin = self.enter().await;
        self.check_range(offset, length)?;
        let extent = match self.chain.resolve(io, offset, length).await {
            Ok(extent) => extent,
            Err(e) => return Err(self.note_error(io, e).await),
        };
        let (kind, host_offset) = match extent.source {
            Source::Data(host) => (MapKind::Data, Some(host)),
            Source::Zero(host) => (MapKind::Zero, host),
            Source::Unallocated(host) => (MapKind::Unallocated, host),
            Source::Compressed(_) => (MapKind::Compressed, None),
        };
        let in_data_file = host_offset.is_some() && self.chain.layers[extent.depth].has_data_file();
        let depth = extent.depth as u32;
        Ok(MapExtent { start: offset, length: extent.length_bytes, depth, kind, host_offset, in_data_file })
    }
}
