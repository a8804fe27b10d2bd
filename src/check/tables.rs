//! L1 tables, and the L2 tables behind them: each L2 table is read once, however many entries refer to it.

use super::counts::{COPIED as COUNTED_COPIED, Counts, METADATA, PLAIN};
use super::finding::{Finding, FindingKind};
use super::l2::{Problem, Scan, Uses, clusters_of, is_outside};
use super::walk::Area;
use super::{Checker, Plan, READ_BYTES};
use crate::error::Result;
use crate::format::l2::{COPIED, L1_RESERVED, OFFSET_MASK};
use crate::storage::Io;

/// An L1 table is read in pieces of this size.
const L1_PIECE_BYTES: u64 = 128 << 10;
/// L2 tables further apart than this are read one by one.
const GAP_BYTES: u64 = 4096;

/// An L2 table, and who refers to it.
#[derive(Debug, Clone, Copy)]
pub struct TableUse {
    /// Where it begins: as the entries say, so not necessarily at a cluster.
    pub offset: u64,
    /// How often it is referred to, in all and by the active tree.
    pub uses: Uses,
    /// The L1 index that it is met at; of the active tree, if it is referred to there.
    index: u32,
    flags: u16,
}

/// Some of the L2 tables, by offset.
#[derive(Default)]
pub struct TableList {
    /// In order; each once.
    pub tables: Vec<TableUse>,
    max: usize,
    /// Where the next list begins, if this one does not hold all of them.
    pub end: Option<u64>,
}

impl TableList {
    fn push(&mut self, table: TableUse) {
        if self.end.is_some_and(|end| table.offset >= end) {
            return;
        }
        self.tables.push(table);
        if self.tables.len() >= 2 * self.max {
            self.merge();
            if self.tables.len() > self.max {
                self.end = Some(self.tables[self.max].offset);
                self.tables.truncate(self.max);
            }
        }
    }

    fn merge(&mut self) {
        self.tables.sort_unstable_by_key(|table| table.offset);
        self.tables.dedup_by(|next, first| {
            let is_same = next.offset == first.offset;
            if is_same {
                if first.uses.active == 0 && next.uses.active > 0 {
                    first.index = next.index;
                }
                first.uses.times += next.uses.times;
                first.uses.active += next.uses.active;
                first.flags |= next.flags;
            }
            is_same
        });
    }
}

impl<I: Io> Checker<'_, '_, I> {
    /// The entries of an L1 table that are not 0, in pieces: index and entry.
    pub(super) async fn l1_piece(&self, table: Area, from: u64, entries: &mut Vec<(u64, u64)>) -> Result<u64> {
        let length = (table.bytes - from * 8).min(L1_PIECE_BYTES);
        let mut bytes = vec![0; length as usize];
        self.read(&mut bytes, table.offset + from * 8).await?;
        entries.clear();
        let words = bytes.as_chunks::<8>().0.iter().zip(from..);
        entries.extend(words.filter(|(word, _)| **word != [0; 8]).map(|(word, i)| (i, u64::from_be_bytes(*word))));
        Ok(from + length / 8)
    }

    /// The L2 tables from host offset `from` on, as many as memory allows.
    pub(super) async fn list_tables(&mut self, l1_tables: &[Area], from: u64, plan: Plan) -> Result<TableList> {
        let max = self.options.memory_bytes as usize / 8 / size_of::<TableUse>();
        let mut list = TableList { max, ..TableList::default() };
        let mut entries = Vec::new();
        for (tree, table) in l1_tables.iter().enumerate() {
            let is_active = tree == 0;
            let mut at = 0;
            if is_outside(self.geometry, self.file_bytes, table.offset, table.bytes) {
                continue;
            }
            while at < table.bytes / 8 {
                at = self.l1_piece(*table, at, &mut entries).await?;
                for &(index, word) in &entries {
                    if word & L1_RESERVED != 0 && plan.report && from == 0 {
                        self.wrong_l1(FindingKind::ReservedBits, "L1 entry", table.offset, index, word);
                    }
                    let offset = word & OFFSET_MASK;
                    if offset == 0 && word & COPIED != 0 && plan.report && from == 0 {
                        let what = "COPIED in an L1 entry without an L2 table";
                        self.wrong_l1(FindingKind::MalformedEntry, what, table.offset, index, word);
                    }
                    if offset == 0 || offset < from {
                        continue;
                    }
                    let flags = match (is_active, word & COPIED != 0) {
                        (false, _) => 0,
                        (true, true) => COUNTED_COPIED,
                        (true, false) => PLAIN,
                    };
                    let uses = Uses { times: 1, active: u64::from(is_active) };
                    list.push(TableUse { offset, uses, index: index as u32, flags });
                }
            }
        }
        list.merge();
        Ok(list)
    }

    pub(super) fn wrong_l1(&mut self, kind: FindingKind, what: &'static str, table: u64, index: u64, value: u64) {
        let guest_offset = Some(index * self.geometry.l2_table_covers_bytes());
        let host_offset = table + index * 8;
        self.find(Finding { kind, what, host_offset, guest_offset, value, references: 0, clusters: 1 });
    }

    /// Counts the L2 tables and all that their entries refer to.
    pub(super) async fn count_tables(&mut self, counts: &mut Counts, l1_tables: &[Area], plan: Plan) -> Result<()> {
        let mut list = self.list_tables(l1_tables, 0, plan).await?;
        let is_whole = list.end.is_none();
        loop {
            self.scan_list(counts, &list, plan).await?;
            match list.end {
                Some(from) => list = self.list_tables(l1_tables, from, plan).await?,
                None => break,
            }
        }
        // An L2 table that trees share is no overlap. Only now all other references are counted.
        let mut from = 0;
        loop {
            if !is_whole {
                list = self.list_tables(l1_tables, from, Plan { report: false, ..plan }).await?;
            }
            self.accept_shared(counts, &list);
            match list.end {
                Some(end) => from = end,
                None => return Ok(()),
            }
        }
    }

    fn accept_shared(&self, counts: &mut Counts, list: &TableList) {
        for table in list.tables.iter().filter(|table| table.uses.times > 1) {
            let cluster = table.offset >> self.geometry.cluster_bits;
            let counter = counts.get(cluster);
            let index = (cluster % super::counts::CHUNK) as usize;
            if counter.references == table.uses.times
                && let Some(chunk) = counts.chunk_mut(cluster)
            {
                chunk.set_flags(index, counter.flags & !METADATA);
            }
        }
    }

    async fn scan_list(&mut self, counts: &mut Counts, list: &TableList, plan: Plan) -> Result<()> {
        self.to_do = self.to_do.max(self.done + (list.tables.len() + self.refcounts.blocks()) as u64);
        let size = self.geometry.cluster_size_bytes();
        let mut bytes = std::mem::take(&mut self.buffer);
        let mut rest = &list.tables[..];
        let mut result = Ok(());
        while let (Some(first), Ok(())) = (rest.first(), &result) {
            let end = |n: usize| rest[n].offset + size;
            let mut n = 1;
            while n < rest.len()
                && rest[n].offset <= end(n - 1) + GAP_BYTES
                && end(n) - first.offset <= READ_BYTES as u64
            {
                n += 1;
            }
            let length = (end(n - 1) - first.offset) as usize;
            bytes.resize(length.max(bytes.len()), 0);
            result = self.read(&mut bytes[..length], first.offset).await;
            if result.is_ok() {
                for table in &rest[..n] {
                    let at = (table.offset - first.offset) as usize;
                    self.scan_table(counts, table, &bytes[at..at + size as usize], plan);
                }
                rest = &rest[n..];
                result = self.progress(n as u64);
            }
        }
        self.buffer = bytes;
        result
    }

    fn scan_table(&mut self, counts: &mut Counts, table: &TableUse, bytes: &[u8], plan: Plan) {
        let size = self.geometry.cluster_size_bytes();
        let times = table.uses.times;
        let (first, n) = clusters_of(self.geometry, table.offset, size);
        let is_aligned = table.offset & (size - 1) == 0;
        let outside = is_outside(self.geometry, self.file_bytes, table.offset, size);
        if outside {
            self.wrong_table(plan, FindingKind::OutsideFile, table);
            counts.add_outside(first, n, table.flags);
        } else if is_aligned {
            counts.add(first, 1, times, METADATA | table.flags);
        } else {
            counts.add(first, 1, times, table.flags);
            counts.add(first + 1, n - 1, times, 0);
        }
        if !is_aligned {
            self.wrong_table(plan, FindingKind::Unaligned, table);
        }
        if table.offset >= self.file_bytes {
            return;
        }
        let mut problems = Vec::new();
        let mut scan = Scan::new(counts, self.rules(), table.uses, plan.report.then_some(&mut problems));
        scan.table(bytes);
        let found = scan.fragments;
        if plan.report {
            let sum = &mut self.sum.fragments;
            sum.allocated += found.allocated * table.uses.active;
            sum.fragmented += found.fragmented * table.uses.active;
            sum.compressed += found.compressed * table.uses.active;
        }
        problems.into_iter().for_each(|problem| self.wrong_entry(table, problem));
    }

    fn wrong_table(&mut self, plan: Plan, kind: FindingKind, table: &TableUse) {
        if plan.report {
            let guest_offset = Some(u64::from(table.index) * self.geometry.l2_table_covers_bytes());
            let (host_offset, clusters) = (table.offset, table.uses.times);
            let what = "L2 table";
            self.find(Finding { kind, what, host_offset, guest_offset, value: host_offset, references: 0, clusters });
        }
    }

    pub(super) fn wrong_entry(&mut self, table: &TableUse, problem: Problem) {
        let Problem { index, kind, what, value } = problem;
        let clusters = if kind == FindingKind::CopiedFlag { table.uses.active } else { table.uses.times };
        let guest = (u64::from(table.index) << self.geometry.l2_bits()) + index as u64;
        let guest_offset = Some(guest << self.geometry.cluster_bits);
        let host_offset = table.offset + index as u64 * self.geometry.l2_entry_bytes();
        self.find(Finding { kind, what, host_offset, guest_offset, value, references: 0, clusters });
    }
}
