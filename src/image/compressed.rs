//! The pipeline of a compressed write: compress, claim, look up, reserve bytes, write, link.
//!
//! Compressed clusters are never changed in place: each new one gets bytes that nobody has had ([`crate::alloc::pack`]),
//! and what its entry referred to before is released, whatever it was. A transfer that is still on its way to a host
//! cluster of our own which is replaced here overlaps with this request, so that either order is right, as for a discard.

use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use super::Image;
use super::link::{Change, look_up};
use super::zero::change;
use crate::alloc::Reservation;
use crate::codec;
use crate::error::{Error, Result};
use crate::format::header::INCOMPATIBLE_DATA_FILE;
use crate::format::l2::CompressedExtent;
use crate::format::{ClusterState, Compression, GuestOffset};
use crate::plan::write::plan_compressed;
use crate::plan::zero::{Outcome, plan_zero};
use crate::storage::pieces::{PieceCursor, PieceList, gather};
use crate::storage::{Io, IoSrc};

/// Guest bytes that are compressed before they are written, so that neighbours become one write. At least one cluster.
const BATCH_BYTES: u64 = 1 << 20;

/// What becomes of the contents of one guest cluster.
enum Content {
    /// They are zeroes.
    Zero,
    /// These bytes of [`Batch::stored`].
    Stored(Range<usize>),
}

/// Neighbouring guest clusters of one L2 slice, compressed.
struct Batch<'m> {
    start: GuestOffset,
    length: u64,
    contents: Vec<Content>,
    stored: Vec<u8>,
    pieces: PieceList<IoSrc<'m>>, // the caller's
}

impl<'m> Batch<'m> {
    fn at(start: GuestOffset) -> Self {
        Self { start, length: 0, contents: Vec::new(), stored: Vec::new(), pieces: PieceList::default() }
    }

    fn push(&mut self, pieces: &[IoSrc<'m>], length: u64, packed: Packed) {
        self.contents.push(match packed {
            Packed::Zero => Content::Zero,
            Packed::Stored(bytes) => {
                let start = self.stored.len();
                self.stored.extend_from_slice(&bytes);
                Content::Stored(start..self.stored.len())
            }
        });
        pieces.iter().for_each(|&piece| self.pieces.push(piece));
        self.length += length;
    }

    fn stored_lengths(&self) -> impl Iterator<Item = u64> {
        self.contents.iter().filter_map(|content| match content {
            Content::Zero => None,
            Content::Stored(range) => Some(range.len() as u64),
        })
    }
}

/// One cluster, packed.
enum Packed {
    Zero,
    Stored(Vec<u8>),
}

/// The compressed bytes of a batch are on their way to disk, in these extents. Only [`Image::write_extents`] makes one,
/// and only with one can the batch be linked (O2).
struct Written(Vec<CompressedExtent>);

impl Image {
    /// Refuses ranges that cannot be stored compressed.
    #[cold]
    pub(super) fn check_compressed(&self, offset: GuestOffset, length: u64) -> Result<()> {
        let size = self.active().geometry.cluster_size_bytes();
        if self.header().incompatible & INCOMPATIBLE_DATA_FILE != 0 {
            let why = "ask for compression, and an external data file holds no compressed clusters";
            return Err(Error::Argument { name: "flags", why });
        }
        let wrong = |name, value: u64, expected| {
            let value = format!("{value}, in an image with clusters of {size} bytes");
            Err(Error::ArgumentValue { name, value, expected })
        };
        if !offset.0.is_multiple_of(size) {
            return wrong("offset", offset.0, "the start of a cluster, for a compressed write");
        }
        if !length.is_multiple_of(size) && offset.0 + length != self.size() {
            let expected = "whole clusters up to the end of the image, for a compressed write";
            return wrong("length", length, expected);
        }
        Ok(())
    }

    /// Writes a range that [`Image::check_compressed`] let through.
    pub(super) async fn write_compressed<I: Io>(
        &self,
        io: &I,
        pieces: &[IoSrc<'_>],
        offset: GuestOffset,
        length: u64,
    ) -> Result<()> {
        let geometry = self.active().geometry;
        let method = self.header().compression;
        let mut cluster = vec![0; geometry.cluster_size_bytes() as usize];
        let mut cursor = PieceCursor::new(pieces);
        let (mut at, end) = (offset, offset.0 + length);
        let mut batch = Batch::at(at);
        while at.0 < end {
            let n = geometry.cluster_size_bytes().min(end - at.0);
            let part = cursor.take(n);
            gather(part.as_slice(), &mut cluster);
            cluster[n as usize..].fill(0); // past the end of the image
            let packed = pack(method, &cluster, geometry.version >= 3)?;
            let next = at.plus(n);
            let is_plain = packed.is_none();
            if let Some(packed) = packed {
                batch.push(part.as_slice(), n, packed);
            }
            let ends_slice = geometry.slice_index(next) != geometry.slice_index(at);
            if is_plain || ends_slice || batch.length >= BATCH_BYTES || next.0 == end {
                self.write_batch(io, &batch).await?;
                batch = Batch::at(next);
            }
            if is_plain {
                self.write_range(io, part.as_slice(), at, n).await?;
            }
            at = next;
        }
        Ok(())
    }

    async fn write_batch<I: Io>(&self, io: &I, batch: &Batch<'_>) -> Result<()> {
        if batch.length == 0 || self.pack_batch(io, batch).await? {
            return Ok(());
        }
        self.write_range(io, batch.pieces.as_slice(), batch.start, batch.length).await.map(drop)
    }

    /// Packs a batch into host clusters. `false`: it has to be written plain instead, and nothing has happened.
    async fn pack_batch<I: Io>(&self, io: &I, batch: &Batch<'_>) -> Result<bool> {
        let tables = self.active();
        let geometry = tables.geometry;
        let end = batch.start.plus(batch.length);
        let _claim = self.claim_clusters(io, batch.start, batch.length).await?;
        if geometry.in_cluster(end) != 0 && end.0 != self.size() {
            return Ok(false); // the image has grown: what follows in the last cluster is no longer nobody's
        }
        self.own_l2_table(io, geometry.l1_index(batch.start)).await?;
        let mut old = Vec::with_capacity(batch.contents.len());
        for index in 0..batch.contents.len() as u64 {
            old.push(look_up(io, tables, batch.start.plus(index << geometry.cluster_bits)).await?);
        }
        let (reservation, extents) = self.allocator.reserve_bytes(io, tables, batch.stored_lengths()).await?;
        if !extents.iter().all(|extent| extent.is_encodable(geometry)) {
            return Ok(false); // further up in the file than a compressed descriptor reaches
        }
        let written = self.write_extents(io, batch, extents).await?;
        self.link_batch(io, batch, &old, reservation, written).await?;
        self.counters.allocating_writes.fetch_add(1, Relaxed);
        Ok(true)
    }

    /// Writes the bytes of a batch, with one write wherever they touch on the host.
    async fn write_extents<I: Io>(&self, io: &I, batch: &Batch<'_>, extents: Vec<CompressedExtent>) -> Result<Written> {
        let file = &self.active().file;
        let (mut from, mut to) = (0, 0); // of the bytes that are not written yet
        let mut start = extents.first().map_or_else(Default::default, |extent| extent.offset);
        for (extent, length) in extents.iter().zip(batch.stored_lengths()) {
            if extent.offset != start.plus((to - from) as u64) {
                file.write_bytes(io, &batch.stored[from..to], start).await?;
                (from, start) = (to, extent.offset);
            }
            to += length as usize;
        }
        if from < to {
            file.write_bytes(io, &batch.stored[from..to], start).await?;
        }
        Ok(Written(extents))
    }

    async fn link_batch<I: Io>(
        &self,
        io: &I,
        batch: &Batch<'_>,
        old: &[ClusterState],
        reservation: Reservation<'_>,
        written: Written,
    ) -> Result<()> {
        let geometry = self.active().geometry;
        let mut extents = written.0.into_iter();
        let mut changes: Vec<Change> = Vec::with_capacity(old.len());
        for ((index, &old), content) in (0u64..).zip(old).zip(&batch.contents) {
            let cluster_at = batch.start.plus(index << geometry.cluster_bits);
            let (state, releases) = match content {
                Content::Zero => match plan_zero(geometry, old, geometry.all_subclusters(), true, true) {
                    Outcome::Entry { state, releases } => (state, releases),
                    _ => continue, // it is zero already
                },
                Content::Stored(_) => match extents.next() {
                    Some(extent) => plan_compressed(old, extent),
                    None => unreachable!("as many extents as clusters that are stored"),
                },
            };
            changes.push(change(cluster_at, old, state, releases));
        }
        self.link_changes(io, changes, reservation).await
    }
}

/// Packs one cluster; `None` if it is better written as it is.
fn pack(method: Compression, cluster: &[u8], has_zero_flag: bool) -> Result<Option<Packed>> {
    if has_zero_flag && IoSrc::from(cluster).is_zero() {
        return Ok(Some(Packed::Zero));
    }
    Ok(codec::compress(method, cluster)?.map(Packed::Stored))
}
