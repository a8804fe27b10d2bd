//! An L2 table as a whole: what its entries refer to, and their COPIED flags. For whatever walks all of a tree:
//! snapshots share it, let it go, or make it the active one's alone again.

use super::geometry::Geometry;
use super::l2::{COMPRESSED, COPIED, L2Entry, OFFSET_MASK};
use super::units::{HostCluster, words};
use crate::error::CorruptionKind;

/// The byte of a descriptor that holds its flags.
const COMPRESSED_BYTE: u8 = (COMPRESSED >> 56) as u8;
const COPIED_BYTE: u8 = (COPIED >> 56) as u8;

/// A malformed entry of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadEntry {
    /// Its index.
    pub index: u64,
    /// What is wrong with it.
    pub kind: CorruptionKind,
    /// Its descriptor.
    pub descriptor: u64,
}

/// The entry in these bytes: of one word or, extended, of two.
pub fn entry_of(stored: &[u8]) -> L2Entry {
    let mut words = words(stored);
    L2Entry { descriptor: words.next().unwrap_or(0), bitmap: words.next().unwrap_or(0) }
}

/// The host clusters that the entries refer to, sorted, each as many times as it is referred to.
pub fn references(table: &[u8], geometry: Geometry) -> Result<Vec<u64>, BadEntry> {
    let mut clusters = Vec::with_capacity(table.len() / geometry.l2_entry_bytes() as usize);
    for (index, bytes) in table.chunks_exact(geometry.l2_entry_bytes() as usize).enumerate() {
        let entry = entry_of(bytes);
        if entry == L2Entry::default() {
            continue;
        }
        let bad = |kind| BadEntry { index: index as u64, kind, descriptor: entry.descriptor };
        clusters.extend(entry.decode(geometry).map_err(bad)?.host.clusters(geometry));
    }
    clusters.sort_unstable();
    Ok(clusters)
}

/// Clears all COPIED flags: nothing that the table refers to can be taken to be ours alone. Whether any was set.
pub fn clear_copied(table: &mut [u8], geometry: Geometry) -> bool {
    let mut any = false;
    for entry in table.chunks_exact_mut(geometry.l2_entry_bytes() as usize) {
        if entry[0] & COMPRESSED_BYTE == 0 {
            any |= entry[0] & COPIED_BYTE != 0;
            entry[0] &= !COPIED_BYTE;
        }
    }
    any
}

/// Makes the COPIED flags say which standard entries have a host cluster with one reference, whatever they said before.
/// Whether that changed any.
pub fn rebuild_copied(table: &mut [u8], geometry: Geometry, has_one_reference: impl Fn(HostCluster) -> bool) -> bool {
    let mut any = false;
    for entry in table.chunks_exact_mut(geometry.l2_entry_bytes() as usize) {
        let descriptor = entry_of(entry).descriptor;
        let offset = descriptor & OFFSET_MASK;
        if descriptor & COMPRESSED == 0 && offset != 0 {
            let single = has_one_reference(HostCluster(offset >> geometry.cluster_bits));
            let flag = if single { COPIED_BYTE } else { 0 };
            any |= entry[0] & COPIED_BYTE != flag;
            entry[0] = entry[0] & !COPIED_BYTE | flag;
        }
    }
    any
}

#[cfg(test)]
mod tests {
    use super::*;

    const STD: Geometry = Geometry { version: 3, cluster_bits: 9, extended_l2: false, refcount_order: 4 };
    const EXT: Geometry = Geometry { version: 3, cluster_bits: 14, extended_l2: true, refcount_order: 4 };

    fn table(geometry: Geometry, entries: &[(usize, u64)]) -> Vec<u8> {
        let mut table = vec![0; geometry.cluster_size_bytes() as usize];
        for &(index, descriptor) in entries {
            let at = index * geometry.l2_entry_bytes() as usize;
            table[at..at + 8].copy_from_slice(&descriptor.to_be_bytes());
        }
        table
    }

    #[test]
    fn references_count_each_cluster_as_often_as_it_is_used() {
        let compressed = COMPRESSED | 1 << 61 | (5 * 512 + 100); // two sectors from the middle of cluster 5 on
        let t = table(STD, &[(0, COPIED | 0x1000), (3, 0x400), (9, compressed), (63, compressed)]);
        assert_eq!(references(&t, STD), Ok(vec![2, 5, 5, 6, 6, 8]));
        let bad = table(STD, &[(4, COPIED)]);
        let found = BadEntry { index: 4, kind: CorruptionKind::CopiedWithoutCluster, descriptor: COPIED };
        assert_eq!(references(&bad, STD), Err(found));
    }

    #[test]
    fn flags_are_those_of_standard_clusters_alone() {
        for geometry in [STD, EXT] {
            let size = geometry.cluster_size_bytes();
            let compressed = COMPRESSED | (5 * size + 100);
            let entries = [(0, COPIED | size), (1, 2 * size), (2, 1), (5, compressed), (7, COPIED | (3 * size))];
            let mut t = table(geometry, &entries);
            if geometry.extended_l2 {
                t[8] = 0x80; // a bitmap is no descriptor
            }
            let before = t.clone();
            assert!(clear_copied(&mut t, geometry));
            let cleared = t.clone();
            assert!(!clear_copied(&mut t, geometry));
            assert_eq!(t, cleared);
            assert!(rebuild_copied(&mut t, geometry, |cluster| cluster.0 != 2));
            assert_eq!(t, before);
            assert!(!rebuild_copied(&mut t, geometry, |cluster| cluster.0 != 2));
            assert!(rebuild_copied(&mut t, geometry, |_| false), "flags that are stale go");
            assert_eq!(t, cleared);
        }
    }
}
