//! One L2 table: what its entries refer to is counted, and what is wrong with them is told. No I/O.
//!
//! This is where a check spends its time, so that entries which continue each other are counted as one run.

use super::counts::{COPIED as COUNTED_COPIED, Counts, PLAIN};
use super::finding::FindingKind;
use super::mend::droppable;
use crate::format::l2::{COMPRESSED, COPIED, L2_RESERVED, OFFSET_MASK, ZERO};
use crate::format::{Geometry, Host, HostOffset, L2Entry};

/// What a table is scanned with.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Shape of the image.
    pub geometry: Geometry,
    /// Guest clusters are in an external data file: their clusters are not counted here.
    pub data_file: bool,
    /// Size of the file.
    pub file_bytes: u64,
    /// Entries that the repair is going to drop count as dropped.
    pub dropping: bool,
}

/// How a table is referred to.
#[derive(Debug, Clone, Copy)]
pub struct Uses {
    /// By all trees together.
    pub times: u64,
    /// By the active one.
    pub active: u64,
}

/// What the entries of the active state add up to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fragments {
    /// Guest clusters with a host cluster of their own, or compressed.
    pub allocated: u64,
    /// Those that do not continue the host cluster before them.
    pub fragmented: u64,
    /// Those that are compressed.
    pub compressed: u64,
}

/// Something wrong with the entry of that index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// Index in the table.
    pub index: usize,
    /// Kind.
    pub kind: FindingKind,
    /// What it is, in a few words.
    pub what: &'static str,
    /// The descriptor.
    pub value: u64,
}

/// One scan of one table.
pub struct Scan<'a> {
    /// Counters to add to.
    pub counts: &'a mut Counts,
    /// What holds for all tables.
    pub rules: Rules,
    /// How this table is referred to.
    pub uses: Uses,
    /// What was found, if that is wanted.
    pub problems: Option<&'a mut Vec<Problem>>,
    /// The sum of what the active entries are.
    pub fragments: Fragments,
    expected: u64, // host offset that would continue the entry before; 0: there was none
}

/// The host clusters that `[offset, offset + length)` lies in.
pub fn clusters_of(geometry: Geometry, offset: u64, length: u64) -> (u64, u64) {
    let first = offset >> geometry.cluster_bits;
    let last = offset.saturating_add(length - 1) >> geometry.cluster_bits;
    (first, last - first + 1)
}

/// Whether a range ends a cluster or more past the end of the file: only the last cluster need not be complete.
pub fn is_outside(geometry: Geometry, file_bytes: u64, offset: u64, length: u64) -> bool {
    let limit = file_bytes.saturating_add(geometry.cluster_size_bytes());
    offset.checked_add(length).is_none_or(|end| end >= limit)
}

impl<'a> Scan<'a> {
    /// A scan that has seen nothing.
    pub fn new(counts: &'a mut Counts, rules: Rules, uses: Uses, problems: Option<&'a mut Vec<Problem>>) -> Self {
        Self { counts, rules, uses, problems, fragments: Fragments::default(), expected: 0 }
    }

    /// Scans the entries of one table.
    pub fn table(&mut self, bytes: &[u8]) {
        if self.rules.geometry.extended_l2 { self.extended(bytes) } else { self.standard(bytes) }
    }

    fn standard(&mut self, bytes: &[u8]) {
        let Rules { geometry, data_file, file_bytes, .. } = self.rules;
        let step = geometry.cluster_size_bytes();
        let (entries, _) = bytes.as_chunks::<8>();
        let zero = if geometry.version >= 3 { 0 } else { ZERO };
        let unusual = COMPRESSED | L2_RESERVED | zero | (OFFSET_MASK & (step - 1));
        let mut index = 0;
        while let Some(&entry) = entries.get(index) {
            let word = u64::from_be_bytes(entry);
            if word == 0 || word == ZERO & !unusual {
                index += 1;
                continue;
            }
            let offset = word & OFFSET_MASK;
            if word & unusual != 0 || offset == 0 || data_file {
                self.unusual(index, L2Entry { descriptor: word, bitmap: 0 });
                index += 1;
                continue;
            }
            let mut next = word;
            let run = entries[index..].iter().take_while(|entry| {
                let same = u64::from_be_bytes(**entry) == next;
                next = next.wrapping_add(step);
                same
            });
            let n = run.count() as u64;
            // Whole clusters, so that nothing reaches outside unless it begins there.
            let inside = file_bytes.saturating_sub(offset).div_ceil(step).min(n);
            self.run(offset, inside, word & COPIED != 0);
            (index + inside as usize..index + n as usize).for_each(|index| {
                let word = u64::from_be_bytes(entries[index]);
                self.unusual(index, L2Entry { descriptor: word, bitmap: 0 });
            });
            index += n as usize;
        }
    }

    fn extended(&mut self, bytes: &[u8]) {
        let Rules { geometry, data_file, file_bytes, .. } = self.rules;
        let step = geometry.cluster_size_bytes();
        let (words, _) = bytes.as_chunks::<8>();
        let (entries, _) = words.as_chunks::<2>();
        let unusual = COMPRESSED | L2_RESERVED | (OFFSET_MASK & (step - 1));
        let is_usual = |word: u64, bitmap: u64| {
            let offset = word & OFFSET_MASK;
            word & unusual == 0 && offset != 0 && offset < file_bytes && bitmap & bitmap >> 32 & 0xffff_ffff == 0
        };
        let mut index = 0;
        while let Some(entry) = entries.get(index) {
            let [word, bitmap] = entry.map(u64::from_be_bytes);
            if word | bitmap & 0xffff_ffff == 0 {
                index += 1;
                continue;
            }
            if data_file || !is_usual(word, bitmap) {
                self.unusual(index, L2Entry { descriptor: word, bitmap });
                index += 1;
                continue;
            }
            let mut next = word;
            let run = entries[index..].iter().take_while(|entry| {
                let [word, bitmap] = entry.map(u64::from_be_bytes);
                let same = word == next && is_usual(word, bitmap);
                next = next.wrapping_add(step);
                same
            });
            let n = run.count();
            self.run(word & OFFSET_MASK, n as u64, word & COPIED != 0);
            index += n;
        }
    }

    /// Counts guest clusters that follow each other in the file.
    #[inline]
    fn run(&mut self, offset: u64, n: u64, copied: bool) {
        if n == 0 {
            return;
        }
        let geometry = self.rules.geometry;
        if self.uses.active > 0 {
            self.fragments.allocated += n;
            self.fragments.fragmented += u64::from(self.expected != 0 && offset != self.expected);
            self.expected = offset + (n << geometry.cluster_bits);
        }
        let first = offset >> geometry.cluster_bits;
        self.counts.add(first, n, self.uses.times, self.copied_flag(copied));
    }

    fn copied_flag(&self, copied: bool) -> u16 {
        match (self.uses.active > 0, copied) {
            (false, _) => 0,
            (true, true) => COUNTED_COPIED,
            (true, false) => PLAIN,
        }
    }

    fn problem(&mut self, index: usize, kind: FindingKind, what: &'static str, value: u64) {
        if let Some(problems) = &mut self.problems {
            problems.push(Problem { index, kind, what, value });
        }
    }

    /// An entry that is not plain data in a cluster of its own: compressed, without a cluster, or wrong.
    #[cold]
    fn unusual(&mut self, index: usize, entry: L2Entry) {
        if entry.descriptor & COMPRESSED != 0 {
            return self.compressed(index, entry);
        }
        let Rules { geometry, data_file, dropping, .. } = self.rules;
        let word = entry.descriptor;
        if word & L2_RESERVED != 0 {
            self.problem(index, FindingKind::ReservedBits, "L2 entry", word);
        }
        if !geometry.extended_l2 && word & ZERO != 0 && geometry.version < 3 {
            self.problem(index, FindingKind::MalformedEntry, "zero flag in an L2 entry of a version 2 image", word);
        }
        let offset = word & OFFSET_MASK;
        let (alloc, zero) = (entry.bitmap as u32, (entry.bitmap >> 32) as u32);
        let plain_zero = !geometry.extended_l2 && word & ZERO != 0;
        if offset == 0 && (!data_file || word & COPIED == 0 || plain_zero) {
            if alloc != 0 {
                self.problem(index, FindingKind::MalformedEntry, "L2 bitmap allocates without a cluster", word);
            }
            if word & COPIED != 0 {
                self.problem(index, FindingKind::MalformedEntry, "COPIED in an L2 entry without a cluster", word);
            }
            return;
        }
        if alloc & zero != 0 {
            self.problem(index, FindingKind::MalformedEntry, "L2 bitmap has subclusters allocated and zero", word);
        }
        if offset & (geometry.cluster_size_bytes() - 1) != 0 {
            let is_preallocated = droppable(entry, geometry);
            let what = if is_preallocated { "preallocated cluster" } else { "data cluster" };
            self.problem(index, FindingKind::Unaligned, what, word);
            if is_preallocated && dropping {
                return;
            }
        }
        self.cluster(index, word, offset);
    }

    /// Counts a reference to a cluster that may be anywhere.
    fn cluster(&mut self, index: usize, word: u64, offset: u64) {
        let Rules { geometry, data_file, file_bytes, .. } = self.rules;
        let size = geometry.cluster_size_bytes();
        if self.uses.active > 0 {
            self.fragments.allocated += 1;
            self.fragments.fragmented += u64::from(self.expected != 0 && offset != self.expected);
            self.expected = offset + size;
        }
        if data_file {
            if self.uses.active > 0 && word & COPIED == 0 {
                self.problem(index, FindingKind::CopiedFlag, "a cluster in the data file", word);
            }
            return;
        }
        let (first, n) = clusters_of(geometry, offset, size);
        let flag = self.copied_flag(word & COPIED != 0);
        if is_outside(geometry, file_bytes, offset, size) {
            self.problem(index, FindingKind::OutsideFile, "data cluster", word);
            return self.counts.add_outside(first, n, flag);
        }
        self.counts.add(first, 1, self.uses.times, flag);
        self.counts.add(first + 1, n - 1, self.uses.times, 0);
    }

    fn compressed(&mut self, index: usize, entry: L2Entry) {
        let Rules { geometry, data_file, file_bytes, .. } = self.rules;
        let word = entry.descriptor;
        if word & COPIED != 0 {
            self.problem(index, FindingKind::MalformedEntry, "COPIED in an L2 entry of a compressed cluster", word);
        }
        if entry.bitmap != 0 {
            let what = "L2 bitmap of a compressed cluster is not 0";
            self.problem(index, FindingKind::MalformedEntry, what, word);
        }
        if data_file {
            return self.problem(index, FindingKind::MalformedEntry, "compressed cluster with a data file", word);
        }
        if self.uses.active > 0 {
            self.fragments.allocated += 1;
            self.fragments.compressed += 1;
            self.fragments.fragmented += 1;
        }
        let plain = L2Entry { descriptor: word & !COPIED, bitmap: 0 };
        let Ok(Host::Compressed(extent)) = plain.decode(geometry).map(|state| state.host) else {
            return self.problem(index, FindingKind::ReservedBits, "L2 entry of a compressed cluster", word);
        };
        let HostOffset(offset) = extent.offset;
        let (first, n) = clusters_of(geometry, offset, extent.length_bytes);
        if is_outside(geometry, file_bytes, offset, extent.length_bytes) {
            self.problem(index, FindingKind::OutsideFile, "compressed cluster", word);
            return self.counts.add_outside(first, n, 0);
        }
        self.counts.add(first, n, self.uses.times, 0);
    }
}
