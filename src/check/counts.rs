//! How often each host cluster is referred to: two bytes a cluster, and only where there are references.
//!
//! Counters are kept in chunks that come into being with the first reference to them. When they take up more memory
//! than the caller allows, the highest chunk is dropped: this pass then counts up to there, and a later pass goes on
//! from there. So a file of any size is counted, with more passes where memory is short, and each pass gets further.
//! Where neither the file nor a refcount block reaches, no counter is needed ([`Near`]): otherwise, damaged entries that
//! point anywhere would cost a pass each.

use std::ops::Range;
use std::sync::Arc;

/// log2 of the clusters in a chunk.
const CHUNK_BITS: u32 = 12;
/// Clusters in a chunk. Their part of a refcount block is whole sectors, or whole blocks, at every width.
pub const CHUNK: u64 = 1 << CHUNK_BITS;
/// The least that a pass covers, in chunks.
const CHUNKS_MIN: u64 = 64;
/// Most chunks that one pass can keep in its directory.
const CHUNKS_MAX: u64 = 1 << 20;

/// An entry of the active state that has COPIED refers to the cluster.
pub const COPIED: u16 = 0x8000;
/// An entry of the active state that could have COPIED and has not refers to the cluster.
pub const PLAIN: u16 = 0x4000;
/// The cluster holds metadata.
pub const METADATA: u16 = 0x2000;
/// Part of a reference that reaches past the end of the file, which is not counted.
pub const OUTSIDE: u16 = 0x1000;
/// The references themselves.
const COUNT: u16 = 0x0fff;
/// A counter of two bytes with this bit is about to be full.
const HALF_FULL: u16 = 0x0800;
/// Where the flags are in a counter of eight bytes.
const WIDE_SHIFT: u32 = 48;
const WIDE_COUNT: u64 = (1 << 60) - 1;

/// One counter: references and flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counter {
    /// How many references there are.
    pub references: u64,
    /// [`COPIED`], [`PLAIN`], [`METADATA`], [`OUTSIDE`].
    pub flags: u16,
}

/// The counters of [`CHUNK`] neighbouring clusters.
pub enum Chunk {
    /// The usual case.
    Narrow(Box<[u16; CHUNK as usize]>),
    /// Some cluster has thousands of references.
    Wide(Box<[u64; CHUNK as usize]>),
}

fn widen(narrow: u16) -> u64 {
    u64::from(narrow & COUNT) | u64::from(narrow & !COUNT) << WIDE_SHIFT
}

impl Chunk {
    fn bytes(&self) -> usize {
        match self {
            Self::Narrow(c) => size_of_val(&**c),
            Self::Wide(c) => size_of_val(&**c),
        }
    }

    /// One counter.
    pub fn get(&self, index: usize) -> Counter {
        let wide = match self {
            Self::Narrow(c) => widen(c[index]),
            Self::Wide(c) => c[index],
        };
        Counter { references: wide & WIDE_COUNT, flags: (wide >> WIDE_SHIFT) as u16 & !COUNT }
    }

    /// Replaces the flags of one counter.
    pub fn set_flags(&mut self, index: usize, flags: u16) {
        match self {
            Self::Narrow(c) => c[index] = c[index] & COUNT | flags,
            Self::Wide(c) => c[index] = c[index] & WIDE_COUNT | u64::from(flags) << WIDE_SHIFT,
        }
    }

    fn widened(&self) -> Option<Self> {
        let Self::Narrow(narrow) = self else { return None };
        let mut wide = Box::new([0; CHUNK as usize]);
        narrow.iter().zip(wide.iter_mut()).for_each(|(n, w)| *w = widen(*n));
        Some(Self::Wide(wide))
    }

    /// Adds to neighbouring counters; `false`: they have to be widened first.
    #[inline]
    fn add(&mut self, from: usize, n: usize, times: u64, flags: u16) -> bool {
        match self {
            Self::Narrow(c) => {
                let part = &mut c[from..from + n];
                if times >= u64::from(HALF_FULL) || part.iter().fold(0, |all, c| all | c) & HALF_FULL != 0 {
                    return false;
                }
                part.iter_mut().for_each(|c| *c = (*c + times as u16) | flags);
            }
            Self::Wide(c) => {
                for c in &mut c[from..from + n] {
                    let references = (*c & WIDE_COUNT).saturating_add(times).min(WIDE_COUNT);
                    *c = *c & !WIDE_COUNT | references | u64::from(flags) << WIDE_SHIFT;
                }
            }
        }
        true
    }
}

/// Where clusters can have references or stored counts: in the file, and wherever there is a refcount block.
#[derive(Debug, Clone)]
pub struct Near {
    /// Clusters of the file. What counts as inside of it may reach into one more.
    pub file_clusters: u64,
    /// log2 of the clusters that a refcount block counts.
    pub block_bits: u32,
    /// Entries of the refcount table.
    pub blocks: Arc<[u64]>,
}

impl Near {
    #[inline]
    fn contains(&self, cluster: u64) -> bool {
        cluster <= self.file_clusters || self.has_block(cluster)
    }

    #[cold]
    fn has_block(&self, cluster: u64) -> bool {
        let index = usize::try_from(cluster >> self.block_bits).unwrap_or(usize::MAX);
        self.blocks.get(index).is_some_and(|entry| *entry != 0)
    }
}

/// The counters of one pass: of the clusters from `start` to `end`.
pub struct Counts {
    start: u64,
    end: u64,
    highest: u64, // one past the highest cluster with references, of this pass or not
    next: u64,    // lowest cluster at or after `end` that was referred to; u64::MAX: none
    chunks: Vec<Option<Chunk>>,
    used_bytes: usize,
    bytes_max: usize,
    near: Near,
    outside: Option<Range<u64>>,
    far_copied: bool,
}

impl Counts {
    /// Counters for a pass that begins at the chunk of cluster `from`. At least one chunk fits, whatever the limit.
    pub fn new(from: u64, bytes_max: usize, near: Near) -> Self {
        let start = from & !(CHUNK - 1);
        // The directory takes up to a quarter of the memory.
        let chunks = (bytes_max as u64 / 64).clamp(CHUNKS_MIN, CHUNKS_MAX);
        let end = start.saturating_add(chunks * CHUNK);
        let (chunks, used_bytes) = (Vec::new(), 0);
        Self {
            start,
            end,
            highest: 0,
            next: u64::MAX,
            chunks,
            used_bytes,
            bytes_max,
            near,
            outside: None,
            far_copied: false,
        }
    }

    /// First cluster that this pass counts.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// First cluster that this pass does not count any more.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// One past the highest cluster that was referred to, whether this pass counts it or not.
    pub fn highest(&self) -> u64 {
        self.highest
    }

    /// The lowest cluster with references that is left to the next pass.
    pub fn next(&self) -> Option<u64> {
        (self.next != u64::MAX).then_some(self.next)
    }

    /// Adds `times` references to each of `n` neighbouring clusters.
    #[inline]
    pub fn add(&mut self, first: u64, n: u64, times: u64, flags: u16) {
        let end = first.saturating_add(n);
        if times > 0 && n > 0 {
            self.highest = self.highest.max(end);
        }
        let mut at = first.max(self.start);
        while at < end {
            if at >= self.end {
                self.next = self.next.min(at);
                return;
            }
            let (chunk, within) = (((at - self.start) >> CHUNK_BITS) as usize, (at & (CHUNK - 1)) as usize);
            let n = (end - at).min(CHUNK - within as u64) as usize;
            let added = match self.chunks.get_mut(chunk) {
                Some(Some(counters)) => counters.add(within, n, times, flags),
                _ => false,
            };
            if added {
                at += n as u64;
            } else {
                self.make_room(chunk);
            }
        }
    }

    /// Notes a reference to `n` neighbouring clusters, few of them, that reaches past the end of the file: it is not
    /// counted. `flags` are of the first.
    pub fn add_outside(&mut self, first: u64, n: u64, flags: u16) {
        for cluster in first..first.saturating_add(n) {
            let flags = OUTSIDE | if cluster == first { flags } else { 0 };
            if self.near.contains(cluster) {
                self.add(cluster, 1, 0, flags);
            } else {
                self.far_copied |= flags & COPIED != 0;
            }
        }
        let (low, high) = (first.max(self.near.file_clusters), first.saturating_add(n));
        if low < high {
            let known = self.outside.take().unwrap_or(low..high);
            self.outside = Some(known.start.min(low)..known.end.max(high));
        }
    }

    /// From the lowest cluster past the end of the file that something refers to, to the highest.
    pub fn outside(&self) -> Option<Range<u64>> {
        self.outside.clone()
    }

    /// Whether an entry with COPIED refers to a cluster without a stored count: this pass, the first, has to tell.
    pub fn has_far_copied(&self) -> bool {
        self.far_copied && self.start == 0
    }

    /// Brings a chunk into being, or widens it; drops the highest ones as long as there is no room.
    #[cold]
    fn make_room(&mut self, index: usize) {
        if self.chunks.len() <= index {
            self.chunks.resize_with(index + 1, || None);
        }
        let old = self.chunks[index].take();
        self.used_bytes -= old.as_ref().map_or(0, Chunk::bytes);
        let new = match old.and_then(|old| old.widened()) {
            Some(wide) => wide,
            None => Chunk::Narrow(Box::new([0; CHUNK as usize])),
        };
        self.used_bytes += new.bytes();
        self.chunks[index] = Some(new);
        while self.used_bytes > self.bytes_max
            && let Some(highest) = self.chunks.iter().rposition(Option::is_some).filter(|highest| *highest > 0)
        {
            if self.chunks[..highest].iter().all(Option::is_none) {
                break;
            }
            self.used_bytes -= self.chunks[highest].take().map_or(0, |chunk| chunk.bytes());
            self.chunks.truncate(highest);
            self.end = self.start + highest as u64 * CHUNK;
            self.next = self.end;
        }
    }

    /// The counters of the chunk that begins at `cluster`, if one of them was ever touched.
    pub fn chunk(&self, cluster: u64) -> Option<&Chunk> {
        self.chunks.get(self.index(cluster)?)?.as_ref()
    }

    /// As [`Counts::chunk`], to change its flags.
    pub fn chunk_mut(&mut self, cluster: u64) -> Option<&mut Chunk> {
        let index = self.index(cluster)?;
        self.chunks.get_mut(index)?.as_mut()
    }

    fn index(&self, cluster: u64) -> Option<usize> {
        (self.start..self.end).contains(&cluster).then(|| ((cluster - self.start) >> CHUNK_BITS) as usize)
    }

    /// Whether this pass counts the cluster. The first pass counts all that can have no references.
    pub fn covers(&self, cluster: u64) -> bool {
        if self.near.contains(cluster) { (self.start..self.end).contains(&cluster) } else { self.start == 0 }
    }

    /// The counter of a cluster that this pass counts.
    pub fn get(&self, cluster: u64) -> Counter {
        if !self.near.contains(cluster) {
            return Counter { references: 0, flags: OUTSIDE };
        }
        self.chunk(cluster).map_or_else(Counter::default, |chunk| chunk.get((cluster & (CHUNK - 1)) as usize))
    }

    /// First clusters of the chunks that exist, in order.
    pub fn chunk_starts(&self) -> impl Iterator<Item = u64> + '_ {
        let exists = |(index, chunk): (usize, &Option<Chunk>)| chunk.is_some().then_some(index as u64);
        self.chunks.iter().enumerate().filter_map(exists).map(|index| self.start + index * CHUNK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(file_clusters: u64) -> Near {
        Near { file_clusters, block_bits: 15, blocks: Arc::from([512, 0, 0, 512]) }
    }

    #[test]
    fn counters_widen_and_keep_their_neighbours() {
        let mut counts = Counts::new(0, 1 << 20, near(1 << 50));
        counts.add(4000, 200, 1, COPIED);
        counts.add(4001, 1, 70_000, METADATA);
        counts.add(4002, 2, 1500, 0);
        counts.add(4002, 1, 1500, 0);
        let is = |references, flags| Counter { references, flags };
        assert_eq!(counts.get(4000), is(1, COPIED));
        assert_eq!(counts.get(4001), is(70_001, COPIED | METADATA));
        assert_eq!(counts.get(4002), is(3001, COPIED));
        assert_eq!(counts.get(4003), is(1501, COPIED));
        assert_eq!(counts.get(4199), is(1, COPIED));
        assert_eq!(counts.get(4200), is(0, 0));
        counts.add(4001, 1, u64::MAX, 0);
        assert_eq!(counts.get(4001).references, WIDE_COUNT, "saturated, its flags as they were");
        assert_eq!(counts.get(4001).flags, COPIED | METADATA);
    }

    /// Whatever the limit, the passes together count what one pass without a limit counts.
    #[test]
    fn passes_with_little_memory_add_up() {
        let adds = |counts: &mut Counts| {
            for i in 0..400u64 {
                counts.add(i * i * 997 % 3_000_000, 1 + i % 7000, 1 + i % 3, if i % 2 == 0 { COPIED } else { PLAIN });
            }
            counts.add(1 << 45, 3, 1, 0);
        };
        let mut all = Counts::new(0, usize::MAX, near(1 << 50));
        adds(&mut all);
        assert_eq!(all.next(), Some(1 << 45), "too far away for one directory");
        for limit in [0, 8 << 10, 100 << 10, 3 << 20] {
            let (mut from, mut passes, mut last) = (Some(0), 0, 0);
            while let Some(start) = from {
                let mut part = Counts::new(start, limit, near(1 << 50));
                adds(&mut part);
                assert!(part.used_bytes <= limit.max(32 << 10));
                for cluster in part.start()..part.end().min(3_010_000) {
                    assert_eq!(part.get(cluster), all.get(cluster), "cluster {cluster}, limit {limit}");
                    last = cluster;
                }
                passes += 1;
                from = part.next();
            }
            assert!(last >= 3_000_000 && passes < 1000 && (limit > 1 << 20 || passes > 3), "{passes} passes");
        }
    }

    /// Entries that point anywhere past the end of the file need no counters, unless a refcount block counts there.
    #[test]
    fn what_is_far_away_takes_no_memory() {
        let mut counts = Counts::new(0, 1 << 20, near(100));
        counts.add(99, 2, 1, 0);
        (1..5000).for_each(|n| counts.add_outside((n << 40) + 7, 2, if n == 4000 { COPIED } else { PLAIN }));
        assert_eq!((counts.next(), counts.chunk_starts().count()), (None, 1));
        assert_eq!((counts.outside(), counts.has_far_copied()), (Some((1 << 40) + 7..(4999 << 40) + 9), true));
        assert!(counts.covers(4000 << 40) && counts.get(4000 << 40) == Counter { references: 0, flags: OUTSIDE });
        counts.add_outside(99, 3, COPIED);
        assert_eq!(counts.get(99), Counter { references: 1, flags: OUTSIDE | COPIED });
        assert_eq!(counts.get(100), Counter { references: 1, flags: OUTSIDE });
        assert_eq!(counts.outside().unwrap().start, 100);
        counts.add_outside(3 << 15, 1, PLAIN); // where there is a block
        assert_eq!((counts.get(3 << 15).flags, counts.chunk_starts().count()), (OUTSIDE | PLAIN, 2));
        assert!(!Counts::new(CHUNK, 0, near(100)).covers(4000 << 40), "in two passes");
    }
}
