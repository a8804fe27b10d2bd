//! Counts against the refcount blocks: what is counted too often (leaks), what not often enough, which COPIED flags
//! cannot be right. Chunks in which everything is as it should be are passed over in one go.

use std::sync::Arc;

use super::counts::{CHUNK, COPIED, Chunk, Counter, Counts, METADATA, PLAIN};
use super::finding::{Finding, FindingKind};
use super::{Checker, Plan};
use crate::error::Result;
use crate::format::refcount;
use crate::storage::Io;

/// The refcount table as the image has it.
#[derive(Debug, Clone, Default)]
pub struct RefcountTable {
    /// Its entries.
    pub entries: Arc<[u64]>,
    /// It lies where a table can lie.
    pub is_usable: bool,
}

/// What a refcount table entry is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// There is no block: all counts are 0.
    None,
    /// The block is here.
    At(u64),
    /// It lies past the end of the file: all counts are 0, and none can be changed.
    Outside,
    /// The entry means nothing.
    Malformed,
}

impl RefcountTable {
    /// How many blocks there are.
    pub fn blocks(&self) -> usize {
        self.entries.iter().filter(|entry| **entry != 0).count()
    }
}

/// Stored counts of a part of a block, decoded.
fn decode(part: &[u8], order: u32, n: usize, into: &mut Vec<u64>) {
    into.clear();
    match order {
        4 => into.extend(part.as_chunks::<2>().0.iter().map(|count| u64::from(u16::from_be_bytes(*count)))),
        _ => into.extend((0..n).map(|index| refcount::get(part, order, index))),
    }
}

/// Whether all of a part is as it should be; then, the index of its last cluster in use, if there is one.
fn is_healthy(part: &[u8], counters: &[u16]) -> Option<Option<usize>> {
    let mut wrong = 0;
    for (stored, counter) in part.as_chunks::<2>().0.iter().zip(counters) {
        let (stored, references) = (u16::from_be_bytes(*stored), counter & 0x0fff);
        let copied = if stored == 1 { PLAIN } else { COPIED };
        let shared = if references > 1 { METADATA } else { 0 };
        wrong |= (stored ^ references) | counter & (copied | shared);
    }
    (wrong == 0).then(|| counters.iter().rposition(|counter| counter & 0x0fff != 0))
}

/// Neighbouring clusters with the same counts.
struct Run {
    first: u64,
    n: u64,
    stored: u64,
    references: u64,
}

impl<I: Io> Checker<'_, '_, I> {
    pub(super) async fn read_refcount_table(&self) -> Result<RefcountTable> {
        let (offset, clusters) = (self.header.refcount_table_offset.0, self.header.refcount_table_clusters);
        let bytes = u64::from(clusters) << self.geometry.cluster_bits;
        let is_aligned = offset != 0 && offset & (self.geometry.cluster_size_bytes() - 1) == 0;
        let end = self.file_clusters() << self.geometry.cluster_bits;
        let is_inside = offset.checked_add(bytes).is_some_and(|table_end| table_end <= end);
        if !is_aligned || !is_inside || bytes == 0 {
            return Ok(RefcountTable::default());
        }
        // At most 8 MiB: the header has been checked.
        let mut table = vec![0; bytes as usize];
        self.read(&mut table, offset).await?;
        let entries = table.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect();
        Ok(RefcountTable { entries, is_usable: true })
    }

    /// The block that counts the clusters from `index << refcount_block_bits` on.
    pub(super) fn block(&self, index: u64) -> Block {
        let entry = usize::try_from(index).ok().and_then(|index| self.refcounts.entries.get(index)).copied();
        let Some(offset) = entry.filter(|entry| *entry != 0) else { return Block::None };
        if offset & (self.geometry.cluster_size_bytes() - 1) != 0 {
            Block::Malformed
        } else if offset >= self.file_bytes {
            Block::Outside
        } else {
            Block::At(offset)
        }
    }

    /// Counts the refcount table and its blocks, the last of all: a block that is referred to already is unusable.
    pub(super) fn count_blocks(&mut self, counts: &mut Counts, plan: Plan) {
        let table = self.header.refcount_table_offset.0;
        if !self.refcounts.is_usable {
            self.sum.rebuild = true;
            if plan.report {
                self.wrong_block(FindingKind::RefcountTable, "refcount table is not inside of the file", 0, table);
            }
            return;
        }
        let bits = self.geometry.cluster_bits;
        let clusters = u64::from(self.header.refcount_table_clusters);
        counts.add(table >> bits, clusters, 1, METADATA);
        let is_shared = (0..clusters).any(|n| counts.get((table >> bits) + n).references > 1);
        self.sum.rebuild |= is_shared;
        for index in 0..self.refcounts.entries.len() as u64 {
            let place = table + index * 8;
            match self.block(index) {
                Block::None => {}
                Block::At(offset) => {
                    let is_taken = counts.get(offset >> bits).references > 0;
                    counts.add(offset >> bits, 1, 1, 0);
                    if is_taken {
                        self.sum.rebuild = true;
                        // Where counts have one bit, the count that cannot be two is the corruption that counts.
                        if plan.look && self.geometry.refcount_max() > 1 {
                            let what = "refcount block lies where something else does";
                            self.wrong_block(FindingKind::RefcountBlock, what, place, offset);
                        }
                    }
                }
                Block::Malformed | Block::Outside => {
                    self.sum.rebuild = true;
                    if plan.report {
                        let value = self.refcounts.entries[index as usize];
                        let what = "refcount block is not aligned to a cluster, or past the end of the file";
                        self.wrong_block(FindingKind::RefcountBlock, what, place, value);
                    }
                }
            }
        }
    }

    fn wrong_block(&mut self, kind: FindingKind, what: &'static str, host_offset: u64, value: u64) {
        self.find(Finding { kind, what, host_offset, guest_offset: None, value, references: 0, clusters: 1 });
    }

    /// Indices of the blocks that have anything to say about the window, in order.
    pub(super) fn blocks_of(&self, counts: &Counts) -> Vec<u64> {
        let bits = self.geometry.refcount_block_bits();
        let (start, end) = (counts.start() >> bits, ((counts.end() - 1) >> bits) + 1);
        let last = self.file_clusters().div_ceil(1 << bits).min(self.refcounts.entries.len() as u64).min(end);
        let stored = (start.min(last)..last).filter(|&index| self.refcounts.entries[index as usize] != 0);
        let counted = counts.chunk_starts().flat_map(|first| first >> bits..((first + CHUNK - 1) >> bits) + 1);
        let mut blocks: Vec<u64> = stored.chain(counted).collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }

    /// The clusters of a block that the window has, in parts that lie in one chunk: first cluster and number.
    pub(super) fn parts(&self, counts: &Counts, block: u64) -> impl Iterator<Item = (u64, u64)> + use<I> {
        let bits = self.geometry.refcount_block_bits();
        let end = ((block + 1) << bits).min(counts.end());
        let mut at = (block << bits).max(counts.start());
        std::iter::from_fn(move || {
            let n = (CHUNK - at % CHUNK).min(end.saturating_sub(at));
            let part = (at, n);
            at += n;
            (n > 0).then_some(part)
        })
    }

    /// Byte offset inside its block of the count of a cluster that begins a part.
    pub(super) fn offset_in_block(&self, cluster: u64) -> u64 {
        let index = cluster & (self.geometry.refcount_block_entries() - 1);
        (index << self.geometry.refcount_order) / 8
    }

    /// Compares the window. Returns whether some COPIED flag is wrong: then the counters' flag says what is right.
    pub(super) async fn compare(&mut self, counts: &mut Counts) -> Result<bool> {
        let order = self.geometry.refcount_order;
        let mut bytes = std::mem::take(&mut self.buffer);
        let mut stored = Vec::new();
        let mut copied_wrong = counts.has_far_copied();
        for index in self.blocks_of(counts) {
            let block = self.block(index);
            let (mut parts, size) = (self.parts(counts, index).peekable(), self.geometry.cluster_size_bytes());
            let Some(&(first, _)) = parts.peek() else { continue };
            let base = self.offset_in_block(first);
            bytes.resize(bytes.len().max(size as usize), 0);
            match block {
                Block::At(offset) => self.read(&mut bytes[base as usize..size as usize], offset + base).await?,
                Block::None | Block::Outside => bytes[..size as usize].fill(0),
                // What the counts are is not known: that is one corruption. What is wrong whatever they are is told, as the
                // next check would.
                Block::Malformed => {
                    let max = self.geometry.refcount_max();
                    for (first, n) in parts {
                        let right = (first..first + n).map(|cluster| counts.get(cluster).references.min(max));
                        let right: Vec<u64> = right.collect();
                        copied_wrong |= self.compare_part(counts, block, first, &right);
                    }
                    continue;
                }
            }
            for (first, n) in parts {
                let at = self.offset_in_block(first) as usize;
                let part = &bytes[at..at + ((n << order) / 8) as usize];
                if !self.pass_over(counts, part, first, n) {
                    decode(part, order, n as usize, &mut stored);
                    copied_wrong |= self.compare_part(counts, block, first, &stored);
                }
            }
            self.progress(1)?;
        }
        self.buffer = bytes;
        Ok(copied_wrong)
    }

    /// Passes over a part in which nothing is wrong.
    fn pass_over(&mut self, counts: &Counts, part: &[u8], first: u64, n: u64) -> bool {
        let within = (first % CHUNK) as usize;
        let last = match counts.chunk(first) {
            None => return part.iter().all(|byte| *byte == 0),
            Some(Chunk::Narrow(counters)) if self.geometry.refcount_order == 4 => {
                is_healthy(part, &counters[within..within + n as usize])
            }
            Some(_) => None,
        };
        let Some(last) = last else { return false };
        if let Some(last) = last {
            self.sum.used_end = self.sum.used_end.max(first + last as u64 + 1);
        }
        true
    }

    fn compare_part(&mut self, counts: &mut Counts, block: Block, first: u64, stored: &[u64]) -> bool {
        let mut copied_wrong = false;
        let mut run: Option<Run> = None;
        for (cluster, &stored) in (first..).zip(stored) {
            let counter = counts.get(cluster);
            let is_inside = cluster < self.file_clusters();
            if is_inside || counter.references > 0 {
                self.compare_one(&mut run, block, cluster, stored, counter);
            }
            let is_one = stored == 1;
            copied_wrong |= counter.flags & if is_one { PLAIN } else { COPIED } != 0;
            if let Some(chunk) = counts.chunk_mut(cluster) {
                let flags = counter.flags & !(COPIED | PLAIN) | if is_one { COPIED } else { 0 };
                chunk.set_flags((cluster % CHUNK) as usize, flags);
            }
        }
        self.end_run(run);
        copied_wrong
    }

    fn compare_one(&mut self, run: &mut Option<Run>, block: Block, cluster: u64, stored: u64, counter: Counter) {
        let max = self.geometry.refcount_max();
        let references = counter.references.min(max);
        if counter.references > max {
            let host_offset = cluster << self.geometry.cluster_bits;
            let (what, clusters) = ("cluster", counter.references - max);
            let (kind, value) = (FindingKind::CountOverflow, stored);
            let references = counter.references;
            self.find(Finding { kind, what, host_offset, guest_offset: None, value, references, clusters });
        }
        if stored > 0 || references > 0 {
            self.sum.used_end = self.sum.used_end.max(cluster + 1);
        }
        if counter.flags & METADATA != 0 && counter.references > 1 {
            self.sum.overlap = true;
            let host_offset = cluster << self.geometry.cluster_bits;
            let (kind, what, value) = (FindingKind::Overlap, "metadata", stored);
            let finding = Finding { kind, what, host_offset, guest_offset: None, value, references, clusters: 1 };
            // Where the count is too low as well, that is the corruption that counts.
            if stored >= counter.references { self.find(finding) } else { self.tell(&finding) }
        }
        if stored == references {
            return;
        }
        self.sum.rebuild |= stored < references && !matches!(block, Block::At(_));
        match run {
            Some(run) if (run.first + run.n, run.stored, run.references) == (cluster, stored, references) => run.n += 1,
            _ => self.end_run(run.replace(Run { first: cluster, n: 1, stored, references })),
        }
    }

    fn end_run(&mut self, run: Option<Run>) {
        let Some(Run { first, n, stored, references }) = run else { return };
        let kind = if stored > references { FindingKind::Leak } else { FindingKind::CountTooLow };
        self.find(Finding {
            kind,
            what: "clusters",
            host_offset: first << self.geometry.cluster_bits,
            guest_offset: None,
            value: stored,
            references,
            clusters: n,
        });
    }

    /// Where the next window begins, if anything is left to be counted or compared.
    pub(super) fn next_window(&self, counts: &Counts) -> Option<u64> {
        let bits = self.geometry.refcount_block_bits();
        let (end, clusters) = (counts.end(), self.file_clusters());
        let last = clusters.div_ceil(1 << bits).min(self.refcounts.entries.len() as u64);
        let mut stored = (end >> bits).min(last)..last;
        let stored = stored.find(|&index| self.refcounts.entries[index as usize] != 0);
        let stored = stored.map(|index| (index << bits).max(end)).filter(|&first| first < clusters);
        [counts.next(), stored].into_iter().flatten().min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn healthy_is_what_has_nothing_to_tell() {
        let stored = |counts: &[u16]| counts.iter().flat_map(|c| c.to_be_bytes()).collect::<Vec<u8>>();
        assert_eq!(is_healthy(&stored(&[1, 0, 3, 1]), &[1 | COPIED, 0, 3 | PLAIN, 1]), Some(Some(3)));
        assert_eq!(is_healthy(&stored(&[0, 0]), &[0, 0]), Some(None));
        for (count, counter) in
            [(1, 0), (0, 1), (2, 1), (1, 1 | PLAIN), (2, 2 | COPIED), (2, 2 | METADATA), (0, COPIED)]
        {
            assert_eq!(is_healthy(&stored(&[count]), &[counter]), None, "{count} {counter:x}");
        }
    }
}
