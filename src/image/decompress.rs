//! Reading compressed clusters. Whole ones that lie one behind the other in the file are one transfer, and are
//! decompressed wherever there are processors for it; of others, what is decompressed is kept for the next small read.

use std::sync::Mutex;

use super::chain::{Chain, Content, Extent};
use super::cluster_cache::Found;
use crate::codec::{self, BadData};
use crate::error::{Corruption, CorruptionKind, Error, Result};
use crate::format::l2::CompressedExtent;
use crate::format::{Compression, Geometry, GuestOffset};
use crate::plan::read::Source;
use crate::storage::pieces::{PieceCursor, PieceList, scatter};
use crate::storage::{Io, IoDst};
use crate::tables::Tables;
use crate::wait::lock;

/// Guest bytes that are read with one transfer, at most; or two clusters, if these are larger.
const RUN_BYTES: u64 = 4 << 20;

/// Clusters that are too small to be worth a part of their own are handed over so many at once that they take as long.
const PART_MICROS: u64 = 50;

/// A range of one cluster that is compressed, and where its bytes are wanted.
struct Wanted<'m> {
    at: GuestOffset,
    stored: CompressedExtent,
    pieces: PieceList<IoDst<'m>>,
}

/// Calls `work` for each of `count` clusters, as [`Io::compute`] does.
pub(super) async fn for_each_cluster<I: Io>(io: &I, count: usize, micros: u64, work: &(dyn Fn(usize) + Sync)) {
    let together = PART_MICROS.div_ceil(micros.max(1)) as usize;
    let part = |part: usize| (part * together..count.min((part + 1) * together)).for_each(work);
    io.compute(count.div_ceil(together), micros * together.min(count) as u64, &part).await;
}

impl Chain {
    /// Layer of a compressed cluster.
    fn compressed_layer(&self, depth: usize) -> (&Tables, Compression) {
        match &self.layers[depth].content {
            Content::Qcow2 { tables, compression } => (tables, *compression),
            Content::Raw { .. } => unreachable!("only qcow2 images have compressed clusters"),
        }
    }

    /// Reads from a position on, at which `extent` is, as many whole compressed clusters as lie one behind the other,
    /// and returns the end of what it has read, with the extent there unless that is `end`. `None`: it is for others to
    /// read.
    pub(super) async fn read_compressed_run<'m, I: Io>(
        &self,
        io: &I,
        cursor: &mut PieceCursor<'_, IoDst<'m>>,
        (at, end): (GuestOffset, u64),
        extent: Extent,
    ) -> Result<Option<(GuestOffset, Option<Extent>)>> {
        let Source::Compressed(mut stored) = extent.source else { return Ok(None) };
        let depth = extent.depth;
        let cluster = self.compressed_layer(depth).0.geometry.cluster_size_bytes();
        if extent.length_bytes != cluster {
            return Ok(None);
        }
        let most = RUN_BYTES.max(2 * cluster) / cluster;
        let (mut run, mut next_at) = (Vec::new(), at);
        let next = loop {
            run.push(Wanted { at: next_at, stored, pieces: cursor.take(cluster) });
            next_at = next_at.plus(cluster);
            if next_at.0 == end {
                break Ok(None);
            }
            let next = match self.resolve(io, next_at, end - next_at.0).await {
                Ok(next) => next,
                Err(e) => break Err(e), // after what lies before it has been read
            };
            match next.source {
                Source::Compressed(follows)
                    if (next.depth, next.length_bytes) == (depth, cluster)
                        && (run.len() as u64) < most
                        && is_behind(stored, follows) =>
                {
                    stored = follows;
                }
                _ => break Ok(Some(next)),
            }
        };
        self.fill_run(io, depth, &run).await.map_err(|e| self.at(depth, e))?;
        Ok(Some((next_at, next?)))
    }

    /// Fills pieces from one cluster.
    pub(super) async fn fill_compressed<I: Io>(
        &self,
        io: &I,
        pieces: &[IoDst<'_>],
        at: GuestOffset,
        depth: usize,
        stored: CompressedExtent,
    ) -> Result<()> {
        let (tables, method) = self.compressed_layer(depth);
        let geometry = tables.geometry;
        let length: usize = pieces.iter().map(IoDst::len).sum();
        let is_whole = length as u64 == geometry.cluster_size_bytes();
        if is_whole || !self.clusters.takes(geometry.cluster_size_bytes()) {
            let mut wanted = Wanted { at, stored, pieces: PieceList::default() };
            pieces.iter().for_each(|&piece| wanted.pieces.push(piece));
            return self.fill_run(io, depth, &[wanted]).await;
        }
        let within = geometry.in_cluster(at) as usize;
        let load = match self.clusters.find((depth, stored)).await {
            Found::Kept(cluster) => {
                scatter(&cluster[within..], pieces);
                return Ok(());
            }
            Found::Load(load) => load,
        };
        let mut bytes = self.scratches.take_stored(stored.length_bytes as usize);
        let got = tables.file.read(io, &[IoDst::from(bytes.bytes_mut())], stored.offset).await?;
        let bytes = &bytes.bytes()[..got];
        let outcome = Mutex::new(Ok(()));
        let work = |_| {
            let unpacked = self.unpack(geometry, method, bytes, (at, stored), |cluster| {
                load.keep(cluster);
                scatter(&cluster[within..], pieces);
            });
            *lock(&outcome) = unpacked;
        };
        io.compute(1, codec::decompress_micros(method, geometry.cluster_size_bytes()), &work).await;
        outcome.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Fills what is wanted, with one transfer. Of several clusters that are bad, the first one counts.
    async fn fill_run<I: Io>(&self, io: &I, depth: usize, run: &[Wanted<'_>]) -> Result<()> {
        let (tables, method) = self.compressed_layer(depth);
        let geometry = tables.geometry;
        let start = run[0].stored.offset;
        let end = run.iter().map(|wanted| wanted.stored.offset.0 + wanted.stored.length_bytes).max();
        let mut bytes = self.scratches.take_stored((end.unwrap_or(start.0) - start.0) as usize);
        let got = tables.file.read(io, &[IoDst::from(bytes.bytes_mut())], start).await?;
        let bytes = &bytes.bytes()[..got];
        let failed: Mutex<Option<(usize, Error)>> = Mutex::new(None);
        let work = |index: usize| {
            let Wanted { at, stored, ref pieces } = run[index];
            let from = (stored.offset.0 - start.0) as usize;
            let own = &bytes[from.min(got)..got.min(from + stored.length_bytes as usize)];
            let unpacked = match pieces.as_slice() {
                [piece] if piece.len() as u64 == geometry.cluster_size_bytes() => {
                    self.unpack_to(geometry, method, own, (at, stored), *piece)
                }
                pieces => self.unpack(geometry, method, own, (at, stored), |cluster| {
                    scatter(&cluster[geometry.in_cluster(at) as usize..], pieces);
                }),
            };
            if let Err(e) = unpacked {
                let mut failed = lock(&failed);
                if failed.as_ref().is_none_or(|&(first, _)| index < first) {
                    *failed = Some((index, e));
                }
            }
        };
        let micros = codec::decompress_micros(method, geometry.cluster_size_bytes());
        for_each_cluster(io, run.len(), micros, &work).await;
        match failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            None => Ok(()),
            Some((_, e)) => Err(e),
        }
    }

    /// Decompresses a cluster, and shows it to `take`.
    fn unpack(
        &self,
        geometry: Geometry,
        method: Compression,
        bytes: &[u8],
        (at, stored): (GuestOffset, CompressedExtent),
        take: impl FnOnce(&[u8]),
    ) -> Result<()> {
        let size = geometry.cluster_size_bytes() as usize;
        self.scratches.with(size, |scratch| {
            let cluster = &mut scratch.cluster[..size];
            let unpacked = scratch.codec.decompress(method, bytes, cluster)?;
            unpacked.map_err(|BadData| corrupt(geometry, at, stored, bytes))?;
            take(cluster);
            Ok(())
        })
    }

    /// Decompresses a cluster to where it is wanted, if the method can do that, or by way of a buffer.
    fn unpack_to(
        &self,
        geometry: Geometry,
        method: Compression,
        bytes: &[u8],
        (at, stored): (GuestOffset, CompressedExtent),
        wanted: IoDst<'_>,
    ) -> Result<()> {
        let direct = self.scratches.with(0, |scratch| scratch.codec.decompress_to(method, bytes, wanted));
        match direct {
            Some(unpacked) => unpacked?.map_err(|BadData| corrupt(geometry, at, stored, bytes)),
            None => self.unpack(geometry, method, bytes, (at, stored), |cluster| wanted.copy_from(cluster)),
        }
    }
}

/// The error for an extent that is no cluster, of which so many bytes were there. (The last sector may reach past the end
/// of the file, and so may be missing; what counts is that a cluster comes out.)
fn corrupt(geometry: Geometry, at: GuestOffset, stored: CompressedExtent, bytes: &[u8]) -> Error {
    let kind = match bytes {
        [] => CorruptionKind::CompressedBeyondEof,
        _ => CorruptionKind::CompressedData,
    };
    let guest_offset = Some(at.0 - geometry.in_cluster(at));
    Error::Corrupt(Corruption { kind, host_offset: stored.offset.0, guest_offset, value: stored.length_bytes })
}

/// Whether one transfer that reads the one reads the other as well, and nothing else.
fn is_behind(stored: CompressedExtent, follows: CompressedExtent) -> bool {
    (stored.offset.0..=stored.offset.0 + stored.length_bytes).contains(&follows.offset.0)
}
