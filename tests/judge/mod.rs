//! A second reader of the format, for tests. It shares no code with `src/`: it parses bytes on its own, and says
//! which of the rules that hold at every crash state (docs/design.md, D1 to D6) an image breaks, and what the guest
//! would read (D7 and D8 are for the caller to judge).
#![allow(dead_code)] // each test file uses its own part

pub mod bitmaps;
pub mod layout;

pub use bitmaps::bitmaps;
pub use layout::{Entry, Layout};

use qcow2::storage::sim::DiskImage;

/// What a host cluster is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Nothing,
    Header,
    ActiveL1,
    SnapshotL1,
    SnapshotTable,
    RefcountTable,
    RefcountBlock,
    L2Table,
    Data,
    Compressed,
    BitmapDirectory,
    BitmapTable,
    BitmapData,
}

/// What the judge found.
#[derive(Debug, Default, Clone)]
pub struct Verdict {
    /// Broken rules, each with its number and place.
    pub violations: Vec<String>,
    /// Clusters counted more often than they are used: allowed after a crash or an error.
    pub leaks: u64,
    /// Those of them that lie in the file as long as it is.
    pub leaks_inside: u64,
}

/// The judge. Keeps its tables from image to image.
#[derive(Default)]
pub struct Judge {
    roles: Vec<Role>,
    references: Vec<u64>,
    /// What the refcount blocks say.
    counts: Vec<u64>,
    /// Last tree and address within it that referred to the cluster.
    users: Vec<(usize, u64)>,
    /// COPIED flags met: cluster, and where the flag is.
    copied: Vec<(u64, u64)>,
    verdict: Verdict,
    /// Images so far in which something was counted and not used.
    pub leaking: u64,
}

const NOBODY: (usize, u64) = (usize::MAX, u64::MAX);
/// Users that are no tree: structures that the header or a snapshot refers to, and the refcount table.
const AREAS: usize = usize::MAX - 1;
const BLOCKS: usize = usize::MAX - 2;

impl Judge {
    /// Judges the structure of an image.
    pub fn judge(&mut self, image: &DiskImage) -> Verdict {
        self.verdict = Verdict::default();
        match Layout::parse(image) {
            Ok(layout) => self.judge_layout(&layout),
            Err(why) => self.verdict.violations.push(format!("D1: {why}")),
        }
        std::mem::take(&mut self.verdict)
    }

    /// As [`judge`](Self::judge), for a header that was parsed already.
    pub fn judge_parsed(&mut self, layout: &Layout<'_>) -> Verdict {
        self.verdict = Verdict::default();
        self.judge_layout(layout);
        self.leaking += u64::from(self.verdict.leaks > 0);
        std::mem::take(&mut self.verdict)
    }

    fn bad(&mut self, what: String) {
        if self.verdict.violations.len() < 20 {
            self.verdict.violations.push(what);
        }
    }

    fn judge_layout(&mut self, layout: &Layout<'_>) {
        let clusters = layout.image.size.max(layout.image.end()).div_ceil(layout.cluster()) as usize;
        let clusters = clusters.min(layout.image.end().div_ceil(layout.cluster()) as usize + 4096);
        self.roles.clear();
        self.roles.resize(clusters, Role::Nothing);
        self.references.clear();
        self.references.resize(clusters, 0);
        self.users.clear();
        self.users.resize(clusters, NOBODY);
        self.copied.clear();
        self.area(layout, 0, 1, Role::Header, "header");
        self.area(layout, layout.l1_offset, layout.l1_entries * 8, Role::ActiveL1, "L1 table");
        let table_bytes = layout.refcount_table_clusters * layout.cluster();
        self.area(layout, layout.refcount_table_offset, table_bytes, Role::RefcountTable, "refcount table");
        if !layout.trees[1..].is_empty() {
            self.area(layout, layout.snapshots_offset, layout.snapshots_bytes, Role::SnapshotTable, "snapshot table");
        }
        for tree in &layout.trees[1..] {
            self.area(layout, tree.l1_offset, tree.l1_entries * 8, Role::SnapshotL1, "snapshot's L1 table");
        }
        let mut blocks = vec![0; table_bytes as usize / 8];
        layout.words(layout.refcount_table_offset, table_bytes / 8, &mut |index, entry| blocks[index as usize] = entry);
        for (index, &entry) in blocks.iter().enumerate().filter(|(_, e)| **e != 0) {
            let place = layout.refcount_table_offset + index as u64 * 8;
            self.pointer(layout, entry, Role::RefcountBlock, (BLOCKS, index as u64), place);
        }
        for tree in 0..layout.trees.len() {
            self.walk_tree(layout, tree);
        }
        self.walk_bitmaps(layout);
        self.compare_counts(layout, &blocks);
    }

    /// A structure of its own that starts at a cluster boundary.
    fn area(&mut self, layout: &Layout<'_>, offset: u64, bytes: u64, role: Role, what: &str) {
        if bytes == 0 {
            return;
        }
        if !offset.is_multiple_of(layout.cluster())
            || offset + bytes > layout.image.size.next_multiple_of(layout.cluster())
        {
            return self.bad(format!("D2: {what} at 0x{offset:x} is unaligned or outside of the file"));
        }
        for cluster in offset / layout.cluster()..(offset + bytes).div_ceil(layout.cluster()) {
            self.claim(cluster, role, (AREAS, offset), offset);
        }
    }

    /// Notes one reference to a cluster; finds a second role (D5) and a second address in the same tree (D5).
    fn claim(&mut self, cluster: u64, role: Role, user: (usize, u64), place: u64) {
        let index = cluster as usize;
        if index >= self.roles.len() + (1 << 20) {
            return self.bad(format!("D2: {role:?} of entry at 0x{place:x} is far past the end of the file"));
        }
        if index >= self.roles.len() {
            self.roles.resize(index + 1, Role::Nothing);
            self.references.resize(index + 1, 0);
            self.users.resize(index + 1, NOBODY);
        }
        let before = self.roles[index];
        if before != Role::Nothing && before != role {
            self.bad(format!("D5: host cluster {cluster} is {before:?} and {role:?} (entry at 0x{place:x})"));
        }
        if role != Role::Compressed && self.users[index].0 == user.0 {
            let first = self.users[index].1;
            self.bad(format!(
                "D5: host cluster {cluster} ({role:?}) is used for 0x{first:x} and for 0x{:x} (entry at 0x{place:x})",
                user.1
            ));
        }
        self.roles[index] = role;
        self.users[index] = user;
        self.references[index] += 1;
    }

    /// One pointer to one cluster; false where it points nowhere sensible (D2).
    fn pointer(&mut self, layout: &Layout<'_>, offset: u64, role: Role, user: (usize, u64), place: u64) -> bool {
        if !offset.is_multiple_of(layout.cluster()) || offset >= layout.image.size {
            self.bad(format!(
                "D2: {role:?} pointer 0x{offset:x} at 0x{place:x} is unaligned or past the end of the file (0x{:x})",
                layout.image.size
            ));
            return false;
        }
        self.claim(offset / layout.cluster(), role, user, place);
        true
    }

    /// Bitmaps that count: those of an extension that is out of date refer to nothing.
    fn walk_bitmaps(&mut self, layout: &Layout<'_>) {
        let (directory, found) = match (bitmaps::directory(layout), bitmaps(layout)) {
            (Ok(Some(directory)), Ok(found)) => (directory, found),
            (Ok(_), Ok(_)) => return,
            (Err(why), _) | (_, Err(why)) => return self.bad(format!("D10: {why}")),
        };
        self.area(layout, directory.0, directory.1, Role::BitmapDirectory, "bitmap directory");
        for bitmap in &found {
            let bytes = bitmap.table.len() as u64 * 8;
            self.area(layout, bitmap.table_offset, bytes, Role::BitmapTable, "bitmap table");
            for (index, &entry) in bitmap.table.iter().enumerate() {
                let place = bitmap.table_offset + index as u64 * 8;
                let offset = entry & 0x00ff_ffff_ffff_fe00;
                if entry & 0xff00_0000_0000_01fe != 0 || offset != 0 && entry & 1 == 1 {
                    self.bad(format!("D10: malformed bitmap table entry 0x{entry:x} at 0x{place:x}"));
                }
                if offset != 0 {
                    self.pointer(layout, offset, Role::BitmapData, (AREAS, place), place);
                }
            }
        }
    }

    fn walk_tree(&mut self, layout: &Layout<'_>, tree: usize) {
        let (l1_offset, l1_entries) = (layout.trees[tree].l1_offset, layout.trees[tree].l1_entries);
        layout.words(l1_offset, l1_entries, &mut |l1_index, entry| {
            let place = l1_offset + l1_index * 8;
            if entry & 0x7f00_0000_0000_01ff != 0 {
                self.bad(format!("D6: L1 entry 0x{entry:016x} at 0x{place:x} has reserved bits"));
            }
            let table = entry & 0x00ff_ffff_ffff_fe00;
            if table == 0 {
                return;
            }
            let user = (tree, l1_index | 1 << 63);
            if !self.pointer(layout, table, Role::L2Table, user, place) {
                return;
            }
            // COPIED flags in a snapshot's L1 table mean nothing: the table is a copy of an active one.
            if tree == 0 && entry >> 63 == 1 {
                self.copied.push((table / layout.cluster(), place));
            }
            let (first, words) = (l1_index * layout.l2_entries(), layout.l2_entry_bytes() / 8);
            let mut seen = u64::MAX;
            layout.words(table, layout.cluster() / 8, &mut |word, _| {
                let index = word / words;
                if std::mem::replace(&mut seen, index) != index {
                    self.walk_entry(layout, tree, first + index, table, index);
                }
            });
        });
    }

    fn walk_entry(&mut self, layout: &Layout<'_>, tree: usize, guest_cluster: u64, table: u64, index: u64) {
        let place = table + index * layout.l2_entry_bytes();
        let Entry { descriptor, bitmap } = layout.entry_at(place);
        if descriptor == 0 && bitmap == 0 {
            return;
        }
        if let Some(why) = layout.malformed(Entry { descriptor, bitmap }) {
            self.bad(format!("D6: L2 entry 0x{descriptor:016x}/0x{bitmap:016x} at 0x{place:x}: {why}"));
        }
        if descriptor >> 62 & 1 == 1 && layout.data.is_none() {
            let (offset, bytes) = layout.compressed_extent(descriptor);
            if offset >= layout.image.size {
                return self.bad(format!("D2: compressed cluster 0x{offset:x} is past the end of the file"));
            }
            for cluster in offset / layout.cluster()..=(offset + bytes - 1) / layout.cluster() {
                self.claim(cluster, Role::Compressed, (tree, guest_cluster), place);
            }
            return;
        }
        let host = descriptor & 0x00ff_ffff_ffff_fe00;
        if layout.data.is_some() {
            // Not counted, and each cluster has its own place.
            if descriptor >> 62 != 0 && (descriptor >> 62 & 1 == 1 || host != guest_cluster * layout.cluster()) {
                self.bad(format!("D6: L2 entry 0x{descriptor:016x} at 0x{place:x} of guest cluster {guest_cluster} leads elsewhere in the data file"));
            }
            if host != 0 && descriptor >> 63 == 0 {
                self.bad(format!(
                    "D4: L2 entry 0x{descriptor:016x} at 0x{place:x} is allocated in the data file without COPIED"
                ));
            }
            return;
        }
        if host == 0 {
            return;
        }
        // A preallocated cluster without data may lie past the end.
        let reads = if layout.extended { bitmap as u32 != 0 } else { descriptor & 1 == 0 };
        if !reads && host % layout.cluster() == 0 && host >= layout.image.size {
            self.claim(host / layout.cluster(), Role::Data, (tree, guest_cluster), place);
        } else if !self.pointer(layout, host, Role::Data, (tree, guest_cluster), place) {
            return;
        }
        if descriptor >> 63 == 1 {
            self.copied.push((host / layout.cluster(), place));
        }
    }

    /// D3 (refcount >= references, unless the dirty bit says that counts are off), D4 (COPIED), leaks.
    fn compare_counts(&mut self, layout: &Layout<'_>, blocks: &[u64]) {
        let per_block = (layout.cluster() * 8) >> layout.refcount_order;
        let mut counts = std::mem::take(&mut self.counts);
        counts.clear();
        counts.resize(self.references.len(), 0);
        for (index, &block) in blocks.iter().enumerate().filter(|(_, b)| **b != 0) {
            layout.counted(block, &mut |entry, count| {
                let cluster = (index as u64 * per_block + entry) as usize;
                let is_leak = count > self.references.get(cluster).copied().unwrap_or(0);
                let is_inside = (cluster as u64) < layout.image.size.div_ceil(layout.cluster());
                self.verdict.leaks += u64::from(is_leak);
                self.verdict.leaks_inside += u64::from(is_leak && is_inside);
                counts.get_mut(cluster).into_iter().for_each(|slot| *slot = count);
            });
        }
        for (cluster, &count) in counts.iter().enumerate() {
            let references = self.references[cluster];
            if count < references && !layout.dirty {
                let role = self.roles[cluster];
                self.bad(format!(
                    "D3: host cluster {cluster} ({role:?}) has {references} references and refcount {count}"
                ));
            }
        }
        self.counts = counts;
        for (cluster, place) in std::mem::take(&mut self.copied) {
            if self.references[cluster as usize] != 1 {
                let references = self.references[cluster as usize];
                self.bad(format!("D4: COPIED at 0x{place:x} for host cluster {cluster} with {references} references"));
            }
        }
    }
}
