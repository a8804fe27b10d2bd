//! What is on disk: the directory, the tables, and runs of bits.

use std::collections::VecDeque;
use std::sync::Arc;

use super::record::Recorder;
use crate::error::{BitmapProblem, Error, Result};
use crate::format::bitmap::{BitmapEntry, BitsAt, bits_for, parse_directory};
use crate::format::extension::{self, BitmapsPointer};
use crate::format::header::AUTOCLEAR_BITMAPS;
use crate::format::{Geometry, Header, HostOffset, words};
use crate::storage::{Io, IoDst};
use crate::tables::file::HostFile;

/// Where the directory is. `None`: there are no bitmaps, or none that count. (Who does not know bitmaps clears the
/// autoclear bit before the first write, and what the extension says is out of date from then on.)
pub fn pointer(header: &Header) -> Result<Option<BitmapsPointer>> {
    if header.autoclear & AUTOCLEAR_BITMAPS == 0 {
        return Ok(None);
    }
    extension::bitmaps(&header.extensions, header.geometry).map(Some)
}

/// Reads the directory.
pub async fn load_directory<I: Io>(io: &I, file: &HostFile, header: &Header) -> Result<Vec<BitmapEntry>> {
    let Some(pointer) = pointer(header)? else { return Ok(Vec::new()) };
    let beyond =
        |expected| Error::Header { field: "bitmap_directory_offset", value: pointer.directory_offset, expected };
    // Before memory is taken for it.
    let end = pointer.directory_offset.checked_add(pointer.directory_bytes);
    let size = file.size_bytes()?;
    if end.is_none_or(|end| end > size) {
        return Err(beyond("an offset at which the whole directory lies inside the file"));
    }
    let mut bytes = vec![0; pointer.directory_bytes as usize];
    let got = file.read(io, &[IoDst::from(&mut bytes[..])], HostOffset(pointer.directory_offset)).await?;
    if got < bytes.len() {
        return Err(beyond("an offset at which the whole directory can be read"));
    }
    parse_directory(&bytes, pointer, header.geometry)
}

fn damaged(entry: &BitmapEntry, what: &'static str, value: u64) -> Error {
    Error::Bitmap { name: entry.name.clone(), problem: BitmapProblem::Damaged { what, value } }
}

/// Reads the table of a bitmap.
pub async fn load_table<I: Io>(
    io: &I,
    file: &HostFile,
    entry: &BitmapEntry,
    geometry: Geometry,
) -> Result<Vec<BitsAt>> {
    let size = file.size_bytes()?;
    if entry.table_offset.0 > size || entry.table_bytes() > size - entry.table_offset.0 {
        return Err(damaged(entry, "its bitmap table reaches past the end of the file", entry.table_offset.0));
    }
    let mut bytes = vec![0; entry.table_bytes() as usize];
    file.read(io, &[IoDst::from(&mut bytes[..])], entry.table_offset).await?;
    words(&bytes)
        .map(|word| match BitsAt::decode(word, geometry) {
            Some(BitsAt::Cluster(at)) if at.0 >= size => {
                Err(damaged(entry, "its bitmap table points past the end of the file", word))
            }
            Some(at) => Ok(at),
            None => Err(damaged(entry, "its bitmap table has a malformed entry", word)),
        })
        .collect()
}

/// One cluster of bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClusterBits {
    /// None is set.
    Zeroes,
    /// All are set.
    Ones,
    /// As stored: bit n is bit n % 8 of byte n / 8.
    Bytes(Vec<u8>),
}

/// All bits of one bitmap: what is stored and what is recorded.
pub struct Bits {
    /// Bits in all.
    pub count: u64,
    /// The bitmap table; one entry for each cluster of bits, those that are missing being zero.
    pub table: Vec<BitsAt>,
    /// What is added to it.
    pub recorders: Vec<Arc<Recorder>>,
    geometry: Geometry,
    stored_count: u64, // bits that are stored; those behind them are zero
}

impl Bits {
    /// Of a bitmap for a disk of `size_bytes`.
    pub fn new(
        size_bytes: u64,
        granularity_bits: u32,
        geometry: Geometry,
        table: Vec<BitsAt>,
        recorders: Vec<Arc<Recorder>>,
    ) -> Self {
        let count = bits_for(size_bytes, granularity_bits);
        Self { count, table, recorders, geometry, stored_count: count }
    }

    /// What is stored was stored for a disk of `old_size_bytes`: what its last cluster has past that end says nothing.
    pub fn stored_for(self, old_size_bytes: u64, granularity_bits: u32) -> Self {
        Self { stored_count: bits_for(old_size_bytes, granularity_bits), ..self }
    }

    /// Bits in a cluster.
    pub fn per_cluster(&self) -> u64 {
        self.geometry.cluster_size_bytes() * 8
    }

    /// Clusters of bits.
    pub fn clusters(&self) -> u64 {
        self.count.div_ceil(self.per_cluster())
    }

    /// Bits of cluster `index` that count.
    fn bits_in(&self, index: u64) -> u64 {
        (self.count - index * self.per_cluster()).min(self.per_cluster())
    }

    /// Bits of cluster `index` that are stored and count.
    fn stored_in(&self, index: u64) -> u64 {
        self.bits_in(index).min(self.stored_count.saturating_sub(index * self.per_cluster()))
    }

    /// Whether cluster `index` may have stored bits past the old end, or the new one, of a disk that got another size.
    pub fn is_cut(&self, index: u64) -> bool {
        let ends = |count: u64| count.div_ceil(self.per_cluster()) == index + 1;
        self.stored_count != self.count && (ends(self.count) || ends(self.stored_count))
    }

    /// What the table says about cluster `index`.
    pub fn stored_at(&self, index: u64) -> BitsAt {
        self.table.get(index as usize).copied().unwrap_or(BitsAt::Zeroes)
    }

    /// Whether something was recorded in cluster `index`.
    pub fn is_recorded(&self, index: u64) -> bool {
        let (first, bits) = (index * self.per_cluster(), self.bits_in(index));
        self.recorders.iter().any(|recorder| recorder.touches(first, bits))
    }

    /// Cluster `index` as it is stored.
    pub async fn load_stored<I: Io>(&self, io: &I, file: &HostFile, index: u64) -> Result<ClusterBits> {
        let mut bytes = vec![0; self.geometry.cluster_size_bytes() as usize];
        match self.stored_at(index) {
            BitsAt::Zeroes => return Ok(ClusterBits::Zeroes),
            BitsAt::Ones if self.stored_in(index) == self.bits_in(index) => return Ok(ClusterBits::Ones),
            BitsAt::Ones => bytes.fill(0xff),
            // What the file lacks of its last cluster reads as zeroes.
            BitsAt::Cluster(at) => drop(file.read(io, &[IoDst::from(&mut bytes[..])], at).await?),
        }
        Ok(normal(self.stored_in(index), bytes))
    }

    /// Cluster `index` with what was recorded.
    pub async fn load<I: Io>(&self, io: &I, file: &HostFile, index: u64) -> Result<ClusterBits> {
        let stored = self.load_stored(io, file, index).await?;
        let has_tail = self.bits_in(index) < self.per_cluster();
        if stored == ClusterBits::Ones && !has_tail || !self.is_recorded(index) && stored != ClusterBits::Ones {
            return Ok(stored);
        }
        let length = self.geometry.cluster_size_bytes() as usize;
        let mut bytes = match stored {
            ClusterBits::Bytes(bytes) => bytes,
            ClusterBits::Zeroes => vec![0; length],
            ClusterBits::Ones => vec![0xff; length],
        };
        for recorder in &self.recorders {
            recorder.or_into(index * self.per_cluster(), &mut bytes);
        }
        Ok(normal(self.bits_in(index), bytes))
    }
}

/// Bits from `count` on are zero; clusters of nothing but zeroes or ones take no space.
fn normal(count: u64, mut bytes: Vec<u8>) -> ClusterBits {
    let bits = count as usize;
    if bits < bytes.len() * 8 {
        bytes[bits.div_ceil(8)..].fill(0);
        if !bits.is_multiple_of(8) {
            bytes[bits / 8] &= (1 << (bits % 8)) - 1;
        }
    }
    if bytes.iter().all(|&byte| byte == 0) {
        ClusterBits::Zeroes
    } else if bytes.iter().all(|&byte| byte == 0xff) {
        ClusterBits::Ones
    } else {
        ClusterBits::Bytes(bytes)
    }
}

/// Walks over runs of equal bits.
pub struct Runs<'a> {
    bits: &'a Bits,
    at: u64,
    end: u64,
    cluster: u64,
    loaded: VecDeque<(bool, u64)>, // runs of the current cluster, from `at` on
}

impl<'a> Runs<'a> {
    /// Over the bits `[first, end)`.
    pub fn new(bits: &'a Bits, first: u64, end: u64) -> Self {
        let cluster = first / bits.per_cluster();
        Self { bits, at: first, end: end.min(bits.count), cluster, loaded: VecDeque::new() }
    }

    /// The next run: whether its bits are set, its first bit and their number. Runs are as long as they can be.
    pub async fn next<I: Io>(&mut self, io: &I, file: &HostFile) -> Result<Option<(bool, u64, u64)>> {
        let (start, mut set) = (self.at, None);
        while self.at < self.end {
            if self.loaded.is_empty() {
                self.load(io, file).await?;
            }
            let Some(&(value, count)) = self.loaded.front() else { break };
            if set.is_some_and(|set| set != value) {
                break;
            }
            set = Some(value);
            self.loaded.pop_front();
            self.at += count.min(self.end - self.at);
        }
        Ok(set.map(|set| (set, start, self.at - start)))
    }

    async fn load<I: Io>(&mut self, io: &I, file: &HostFile) -> Result<()> {
        let index = self.cluster;
        self.cluster += 1;
        let from = self.at - index * self.bits.per_cluster();
        let to = self.bits.bits_in(index);
        match self.bits.load(io, file, index).await? {
            ClusterBits::Zeroes => self.loaded.push_back((false, to - from)),
            ClusterBits::Ones => self.loaded.push_back((true, to - from)),
            ClusterBits::Bytes(bytes) => {
                let mut at = from;
                while at < to {
                    let (value, count) = run_of_bits(&bytes, at, to);
                    self.loaded.push_back((value, count));
                    at += count;
                }
            }
        }
        Ok(())
    }
}

/// The run of equal bits that begins with bit `from`, up to bit `to`.
fn run_of_bits(bytes: &[u8], from: u64, to: u64) -> (bool, u64) {
    let bit = |at: u64| bytes[at as usize / 8] >> (at % 8) & 1 == 1;
    let value = bit(from);
    let whole = if value { 0xff } else { 0 };
    let mut at = from + 1;
    while at < to {
        if at.is_multiple_of(8) && bytes[at as usize / 8] == whole && at + 8 <= to {
            at += 8;
        } else if bit(at) == value {
            at += 1;
        } else {
            break;
        }
    }
    (value, at - from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bitmap::record::Budget;
    use crate::storage::Blocking;
    use crate::storage::memory::MemoryStorage;
    use crate::wait::block_on;

    #[test]
    fn runs_join_over_clusters_of_bits_stored_and_recorded() {
        let geometry = Geometry { version: 3, cluster_bits: 9, extended_l2: false, refcount_order: 4 };
        // Four and a half clusters of bits: ones, zeroes, stored, ones, stored.
        let mut content = vec![0u8; 1024];
        content[0] = 0b0000_0111;
        content[511] = 0x80;
        content[512] = 0x0f;
        content[1023] = 0xff; // past the end of the bitmap
        let file = HostFile::new(Arc::new(MemoryStorage::new(content)));
        let table = vec![
            BitsAt::Ones,
            BitsAt::Zeroes,
            BitsAt::Cluster(HostOffset(0)),
            BitsAt::Ones,
            BitsAt::Cluster(HostOffset(512)),
        ];
        let bits = 4096 * 4 + 2048;
        let recorder = Arc::new(Recorder::new(bits, 0, &Arc::new(Budget::new(1 << 20))));
        recorder.note(4096, 10);
        recorder.note(4096 * 4 + 4, 4);
        let all = Bits::new(bits, 0, geometry, table, vec![recorder]);
        let collect = |first, end| {
            let mut runs = Runs::new(&all, first, end);
            let mut found = Vec::new();
            while let Some(run) = block_on(runs.next(&Blocking, &file)).unwrap() {
                found.push(run);
            }
            found
        };
        let expected = [
            (true, 0, 4106),
            (false, 4106, 4086),
            (true, 8192, 3),
            (false, 8195, 4092),
            (true, 12287, 1 + 4096 + 8),
            (false, 16392, 2040),
        ];
        assert_eq!(collect(0, u64::MAX), expected);
        assert_eq!(collect(8193, 8196), [(true, 8193, 2), (false, 8195, 1)]);
        assert_eq!(collect(20, 30), [(true, 20, 10)]);
        assert_eq!(collect(bits, bits + 5), []);
        for first in (0..bits).step_by(97) {
            let (set, at, n) = collect(first, bits)[0];
            let run = expected.iter().find(|(_, from, count)| (*from..from + count).contains(&first)).unwrap();
            assert_eq!((set, at, at + n), (run.0, first, run.1 + run.2));
        }
    }
}
