//! The pipeline of a compressed write: compress, claim, look up, reserve bytes, write, link.
//!
//! Compressed clusters are never changed in place: each new one gets bytes that nobody has had ([`crate::alloc::pack`]),
//! and what its entry referred to before is released, whatever it was. A transfer that is still on its way to a host
//! cluster of our own which is replaced here overlaps with this request, so that either order is right, as for a discard.

use std::sync::OnceLock;
use std::sync::atomic::Ordering::Relaxed;

use super::Image;
use super::decompress::for_each_cluster;
use super::link::{Change, look_up};
use super::zero::change;
use crate::alloc::Reservation;
use crate::codec;
use crate::error::{Error, Result};
use crate::format::header::INCOMPATIBLE_DATA_FILE;
use crate::format::l2::CompressedExtent;
use crate::format::{ClusterState, GuestOffset};
use crate::plan::write::plan_compressed;
use crate::plan::zero::{Outcome, plan_zero};
use crate::storage::pieces::{PieceCursor, PieceList, gather};
use crate::storage::{Io, IoSrc};

/// Guest bytes that are compressed before they are written, so that neighbours become one write; or two clusters, if
/// these are larger.
const BATCH_BYTES: u64 = 1 << 20;

/// One guest cluster, or the start of the last one of a disk that ends within.
struct Part<'m> {
    pieces: PieceList<IoSrc<'m>>,
    length: u64,
}

/// What is stored of a cluster.
enum Packed {
    /// Nothing: it is zeroes.
    Zero,
    /// These bytes.
    Stored(Box<[u8]>),
    /// All of it: compressing does not make it smaller.
    Plain,
}

/// Neighbouring guest clusters of one L2 slice, none of them plain.
struct Batch<'b, 'm> {
    start: GuestOffset,
    length: u64,
    parts: &'b [Part<'m>],
    packed: &'b [Packed],
}

impl Batch<'_, '_> {
    /// What is to be stored, in order.
    fn stored(&self) -> impl Iterator<Item = &[u8]> {
        self.packed.iter().filter_map(|packed| match packed {
            Packed::Stored(bytes) => Some(&bytes[..]),
            _ => None,
        })
    }
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
        let size = geometry.cluster_size_bytes();
        let mut cursor = PieceCursor::new(pieces);
        let (mut at, end) = (offset, offset.0 + length);
        while at.0 < end {
            let slice_end = (geometry.slice_index(at).0 + 1) * geometry.slice_covers_bytes();
            let batch_end = end.min(slice_end).min(at.0 + BATCH_BYTES.max(2 * size));
            let lengths = (at.0..batch_end).step_by(size as usize).map(|at| size.min(batch_end - at));
            let parts: Vec<Part<'_>> = lengths.map(|length| Part { pieces: cursor.take(length), length }).collect();
            let packed = self.pack(io, &parts).await?;
            self.write_packed(io, at, &parts, &packed).await?;
            at = GuestOffset(batch_end);
        }
        Ok(())
    }

    /// Compresses clusters, on as many processors as there are.
    async fn pack<I: Io>(&self, io: &I, parts: &[Part<'_>]) -> Result<Vec<Packed>> {
        let geometry = self.active().geometry;
        let size = geometry.cluster_size_bytes() as usize;
        let (method, has_zero_flag) = (self.header().compression, geometry.version >= 3);
        let outcomes: Vec<OnceLock<Result<Packed>>> = parts.iter().map(|_| OnceLock::new()).collect();
        let work = |index: usize| {
            let part = &parts[index];
            let packed = self.chain.scratches.with(size, |scratch| {
                let (codec, cluster, room) = scratch.split(size);
                gather(part.pieces.as_slice(), cluster);
                cluster[part.length as usize..].fill(0); // past the end of the image
                if has_zero_flag && IoSrc::from(&*cluster).is_zero() {
                    return Ok(Packed::Zero);
                }
                let length = codec.compress(method, cluster, room)?;
                Ok(length.map_or(Packed::Plain, |length| Packed::Stored(Box::from(&room[..length]))))
            });
            let _ = outcomes[index].set(packed); // nobody else sets it
        };
        for_each_cluster(io, parts.len(), codec::compress_micros(method, size as u64), &work).await;
        let packed = |outcome: OnceLock<_>| outcome.into_inner().unwrap_or_else(|| unreachable!("each part is done"));
        outcomes.into_iter().map(packed).collect()
    }

    /// Writes clusters: what became smaller batch by batch, the rest as it is.
    async fn write_packed<I: Io>(&self, io: &I, at: GuestOffset, parts: &[Part<'_>], packed: &[Packed]) -> Result<()> {
        let is_plain = |packed: &Packed| matches!(packed, Packed::Plain);
        let (mut at, mut from) = (at, 0);
        while from < parts.len() {
            let to = from + packed[from..].iter().position(is_plain).unwrap_or(parts.len() - from);
            let length = parts[from..to].iter().map(|part| part.length).sum();
            let batch = Batch { start: at, length, parts: &parts[from..to], packed: &packed[from..to] };
            self.write_batch(io, &batch).await?;
            at = at.plus(length);
            if let Some(plain) = parts.get(to) {
                self.write_range(io, plain.pieces.as_slice(), at, plain.length).await?;
                at = at.plus(plain.length);
            }
            from = to + 1;
        }
        Ok(())
    }

    async fn write_batch<I: Io>(&self, io: &I, batch: &Batch<'_, '_>) -> Result<()> {
        if batch.length == 0 || self.pack_batch(io, batch).await? {
            return Ok(());
        }
        let mut pieces = PieceList::default();
        batch.parts.iter().flat_map(|part| part.pieces.as_slice()).for_each(|&piece| pieces.push(piece));
        self.write_range(io, pieces.as_slice(), batch.start, batch.length).await.map(drop)
    }

    /// Packs a batch into host clusters. `false`: it has to be written plain instead, and nothing has happened.
    async fn pack_batch<I: Io>(&self, io: &I, batch: &Batch<'_, '_>) -> Result<bool> {
        let tables = self.active();
        let geometry = tables.geometry;
        let end = batch.start.plus(batch.length);
        let _claim = self.claim_clusters(io, batch.start, batch.length).await?;
        if geometry.in_cluster(end) != 0 && end.0 != self.size() {
            return Ok(false); // the image has grown: what follows in the last cluster is no longer nobody's
        }
        self.own_l2_table(io, geometry.l1_index(batch.start)).await?;
        let mut old = Vec::with_capacity(batch.packed.len());
        for index in 0..batch.packed.len() as u64 {
            old.push(look_up(io, tables, batch.start.plus(index << geometry.cluster_bits)).await?);
        }
        let lengths = batch.stored().map(|bytes| bytes.len() as u64);
        let (reservation, extents) = self.allocator.reserve_bytes(io, tables, lengths).await?;
        self.chain.clusters.forget(&extents);
        if !extents.iter().all(|extent| extent.is_encodable(geometry)) {
            return Ok(false); // further up in the file than a compressed descriptor reaches
        }
        let written = self.write_extents(io, batch, extents).await?;
        self.link_batch(io, batch, &old, reservation, written).await?;
        self.counters.allocating_writes.fetch_add(1, Relaxed);
        Ok(true)
    }

    /// Writes the bytes of a batch, with one write wherever they touch on the host.
    async fn write_extents<I: Io>(
        &self,
        io: &I,
        batch: &Batch<'_, '_>,
        extents: Vec<CompressedExtent>,
    ) -> Result<Written> {
        let file = &self.active().file;
        let mut pieces: PieceList<IoSrc<'_>> = PieceList::default(); // that are not written yet
        let mut start = extents.first().map_or_else(Default::default, |extent| extent.offset);
        let mut end = start;
        for (extent, bytes) in extents.iter().zip(batch.stored()) {
            if extent.offset != end {
                file.write(io, pieces.as_slice(), start).await?;
                pieces.clear();
                start = extent.offset;
            }
            pieces.push(IoSrc::from(bytes));
            end = extent.offset.plus(bytes.len() as u64);
        }
        if start != end {
            file.write(io, pieces.as_slice(), start).await?;
        }
        Ok(Written(extents))
    }

    async fn link_batch<I: Io>(
        &self,
        io: &I,
        batch: &Batch<'_, '_>,
        old: &[ClusterState],
        reservation: Reservation<'_>,
        written: Written,
    ) -> Result<()> {
        let geometry = self.active().geometry;
        let mut extents = written.0.into_iter();
        let mut changes: Vec<Change> = Vec::with_capacity(old.len());
        for ((index, &old), packed) in (0u64..).zip(old).zip(batch.packed) {
            let cluster_at = batch.start.plus(index << geometry.cluster_bits);
            let (state, releases) = match packed {
                Packed::Zero => match plan_zero(geometry, old, geometry.all_subclusters(), true, true) {
                    Outcome::Entry { state, releases } => (state, releases),
                    _ => continue, // it is zero already
                },
                Packed::Stored(_) => match extents.next() {
                    Some(extent) => plan_compressed(old, extent),
                    None => unreachable!("as many extents as clusters that are stored"),
                },
                Packed::Plain => unreachable!("no cluster of a batch is plain"),
            };
            changes.push(change(cluster_at, old, state, releases));
        }
        self.link_changes(io, &changes, reservation).await
    }
}
