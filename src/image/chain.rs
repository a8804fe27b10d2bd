//! The image and what lies under it: which file a guest range reads from, and reading it.
//!
//! The chain is a list, not a tree of handles: resolving walks down it in a loop, so that depth costs neither stack
//! nor heap.

use std::sync::Arc;

use super::cluster_cache::ClusterCache;
use super::scratch::Scratches;
use crate::error::{Error, Result};
use crate::format::{Compression, GuestOffset, HostOffset};
use crate::plan::read::{Run, Source};
use crate::storage::pieces::{Piece, PieceCursor, zero_from};
use crate::storage::{Io, IoDst};
use crate::tables::file::HostFile;
use crate::tables::{Found, Place, Tables};
use crate::wait::Helpers;

/// One file of the chain. Shared by handles that read different states of the first one.
#[derive(Clone)]
pub struct Layer {
    /// Name under which its overlay refers to it; empty for the image itself.
    pub name: String,
    /// What it holds.
    pub content: Content,
}

/// What a file of the chain holds.
#[derive(Clone)]
pub enum Content {
    /// A qcow2 image.
    Qcow2 {
        /// Its tables.
        tables: Arc<Tables>,
        /// Method of its compressed clusters.
        compression: Compression,
    },
    /// Raw bytes.
    Raw {
        /// The file.
        file: Arc<HostFile>,
        /// Its size when it was opened.
        size_bytes: u64,
    },
}

impl Layer {
    /// Size of the disk that the file holds.
    pub fn size_bytes(&self) -> u64 {
        match &self.content {
            Content::Qcow2 { tables, .. } => tables.size_bytes(),
            Content::Raw { size_bytes, .. } => *size_bytes,
        }
    }

    /// Whether that file has its data in an external data file.
    pub(super) fn has_data_file(&self) -> bool {
        matches!(&self.content, Content::Qcow2 { tables, .. } if tables.external.is_some())
    }

    /// The file that plain data is in.
    #[inline]
    fn data_file(&self) -> &HostFile {
        match &self.content {
            Content::Qcow2 { tables, .. } => tables.guest_file(),
            Content::Raw { file, .. } => file,
        }
    }

    /// The run at `offset` in this file alone.
    #[inline]
    fn run(&self, offset: GuestOffset, max: u64) -> Result<Found<Run>> {
        match &self.content {
            Content::Qcow2 { tables, .. } => tables.run(offset, max),
            Content::Raw { .. } => {
                Ok(Found::Hit(Run { source: Source::Data(HostOffset(offset.0)), length_bytes: max }))
            }
        }
    }
}

/// A guest range with one source, in one file of the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Index of the file in the chain; 0 is the image itself.
    pub depth: usize,
    /// Where the bytes are. `Unallocated`: nowhere in the chain.
    pub source: Source,
    /// How many.
    pub length_bytes: u64,
}

/// The image (first) and its backing files.
pub struct Chain {
    /// At least one.
    pub layers: Vec<Layer>,
    /// Clusters of all of them that have been decompressed.
    pub(super) clusters: ClusterCache,
    /// What compressing and decompressing needs.
    pub(super) scratches: Scratches,
    /// Queues on this handle, and on all that share files with it: their requests load slices for each other.
    pub(super) helpers: Helpers,
}

impl Chain {
    /// These files, nothing of which is cached yet; `cluster_bytes` is how much of them may be kept decompressed.
    pub fn new(layers: Vec<Layer>, cluster_bytes: u64) -> Self {
        let (scratches, helpers) = (Scratches::default(), Helpers::default());
        Self { layers, clusters: ClusterCache::new(cluster_bytes), scratches, helpers }
    }

    /// Another state of the image over the same backing files, which the two share.
    pub fn beside(&self, first: Layer) -> Self {
        let layers = std::iter::once(first).chain(self.layers[1..].iter().cloned()).collect();
        Self { helpers: self.helpers.of_another(), ..Self::new(layers, self.clusters.budget_bytes()) }
    }

    /// The extent at `offset`, at most `max` long.
    #[inline]
    pub async fn resolve<I: Io>(&self, io: &I, offset: GuestOffset, max: u64) -> Result<Extent> {
        let (mut depth, mut max) = (0, max);
        loop {
            let run = match self.layers[depth].run(offset, max) {
                Ok(Found::Hit(run)) => run,
                Ok(Found::Miss(slice)) => {
                    if let Content::Qcow2 { tables, .. } = &self.layers[depth].content {
                        tables.load_slice(io, slice).await.map_err(|e| self.at(depth, e))?;
                    }
                    continue;
                }
                Err(e) => return Err(self.at(depth, e)),
            };
            if !matches!(run.source, Source::Unallocated(_)) {
                return Ok(Extent { depth, source: run.source, length_bytes: run.length_bytes });
            }
            // Below: nothing, or a file that may end before this one does; past its end everything is zero.
            let size_below = self.layers.get(depth + 1).map_or(0, Layer::size_bytes);
            if offset.0 >= size_below {
                return Ok(Extent { depth, source: run.source, length_bytes: run.length_bytes });
            }
            max = run.length_bytes.min(size_below - offset.0);
            depth += 1;
        }
    }

    /// Errors of backing files say which file they are about.
    pub(super) fn at(&self, depth: usize, error: Error) -> Error {
        match depth {
            0 => error,
            _ => Error::Backing { name: self.layers[depth].name.clone(), source: Box::new(error) },
        }
    }

    /// Reads what the guest sees. `length_bytes` is the total of the pieces, and lies inside the image.
    #[inline]
    pub async fn read<I: Io>(
        &self,
        io: &I,
        pieces: &[IoDst<'_>],
        offset: GuestOffset,
        length_bytes: u64,
    ) -> Result<()> {
        if let Content::Qcow2 { tables, .. } = &self.layers[0].content
            && let Place::At(host) = tables.mapped(offset, length_bytes, false)
        {
            let got = tables.guest_file().read(io, pieces, host).await?;
            if (got as u64) < length_bytes {
                zero_from(pieces, got);
            }
            return Ok(());
        }
        self.read_resolved(io, pieces, offset, length_bytes).await
    }

    async fn read_resolved<I: Io>(
        &self,
        io: &I,
        pieces: &[IoDst<'_>],
        offset: GuestOffset,
        length_bytes: u64,
    ) -> Result<()> {
        let extent = self.resolve(io, offset, length_bytes).await?;
        if extent.length_bytes == length_bytes {
            return self.fill(io, pieces, offset, extent).await;
        }
        self.read_extents(io, pieces, offset, extent).await
    }

    /// A read that spans several extents: one transfer for each, or for a run of compressed ones.
    async fn read_extents<I: Io>(
        &self,
        io: &I,
        pieces: &[IoDst<'_>],
        offset: GuestOffset,
        first: Extent,
    ) -> Result<()> {
        let end = offset.0 + pieces.iter().map(|p| p.length() as u64).sum::<u64>();
        let mut cursor = PieceCursor::new(pieces);
        let (mut at, mut extent) = (offset, first);
        loop {
            let run = self.read_compressed_run(io, &mut cursor, (at, end), extent).await?;
            let (next_at, known) = match run {
                Some(read) => read,
                None => {
                    let part = cursor.take(extent.length_bytes);
                    self.fill(io, part.as_slice(), at, extent).await?;
                    (at.plus(extent.length_bytes), None)
                }
            };
            at = next_at;
            extent = match known {
                _ if at.0 == end => return Ok(()),
                Some(extent) => extent,
                None => self.resolve(io, at, end - at.0).await?,
            };
        }
    }

    /// Fills pieces from one extent of the same length. Data past the end of a file reads as zeroes.
    #[inline]
    pub async fn fill<I: Io>(&self, io: &I, pieces: &[IoDst<'_>], offset: GuestOffset, extent: Extent) -> Result<()> {
        match extent.source {
            Source::Data(host) => {
                let file = self.layers[extent.depth].data_file();
                let got = file.read(io, pieces, host).await.map_err(|e| self.at(extent.depth, e))?;
                if (got as u64) < extent.length_bytes {
                    zero_from(pieces, got);
                }
                Ok(())
            }
            Source::Zero(_) | Source::Unallocated(_) => {
                zero_from(pieces, 0);
                Ok(())
            }
            Source::Compressed(stored) => {
                let result = self.fill_compressed(io, pieces, offset, extent.depth, stored).await;
                result.map_err(|e| self.at(extent.depth, e))
            }
        }
    }
}
