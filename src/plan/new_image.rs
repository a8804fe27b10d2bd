//! Where everything of a new image goes, and what its tables hold.
//!
//! From cluster 0 on: header, refcount table, refcount blocks, L1 table; then, where space is allocated ahead, the L2
//! tables and the data, one guest cluster after the other. Every table is computed cluster by cluster, so that the
//! tables of a disk of any size are written in little memory.

use crate::format::l2::encode_l1;
use crate::format::{ClusterState, Geometry, Host, HostCluster, L2Entry, refcount};

/// The layout of a new image, in clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewImage {
    geometry: Geometry,
    /// Clusters of the refcount table, which begins at cluster 1.
    pub refcount_table_clusters: u64,
    /// Refcount blocks.
    pub refcount_blocks: u64,
    l1_clusters: u64,
    l2_tables: u64,
    data_clusters: u64,
    is_external: bool, // the data is in a file of its own
}

impl NewImage {
    /// The smallest layout for a disk of `size_bytes` (at most 2^62) whose refcount blocks count all clusters of it,
    /// themselves included. With `preallocated`, every guest cluster has a host cluster from the beginning.
    pub fn new(geometry: Geometry, size_bytes: u64, preallocated: bool) -> Self {
        Self::with_data(geometry, size_bytes, preallocated, false)
    }

    /// As [`NewImage::new`], with guest data in an external data file, where each guest cluster is at its guest offset.
    pub fn with_external_data(geometry: Geometry, size_bytes: u64, preallocated: bool) -> Self {
        Self::with_data(geometry, size_bytes, preallocated, true)
    }

    fn with_data(geometry: Geometry, size_bytes: u64, preallocated: bool, is_external: bool) -> Self {
        let l1_entries = geometry.l1_entries_for(size_bytes);
        let mut layout = Self {
            geometry,
            refcount_table_clusters: 1,
            refcount_blocks: 1,
            l1_clusters: geometry.clusters_for(l1_entries * 8),
            l2_tables: if preallocated { l1_entries } else { 0 },
            data_clusters: if preallocated { geometry.clusters_for(size_bytes) } else { 0 },
            is_external,
        };
        loop {
            // Both only grow, and each by less than what made it grow: this ends.
            let blocks = layout.total().div_ceil(geometry.refcount_block_entries());
            let table = geometry.clusters_for(blocks * 8);
            if (blocks, table) == (layout.refcount_blocks, layout.refcount_table_clusters) {
                return layout;
            }
            (layout.refcount_blocks, layout.refcount_table_clusters) = (blocks, table);
        }
    }

    /// All clusters of the image.
    pub fn total(self) -> u64 {
        self.data_at() + if self.is_external { 0 } else { self.data_clusters }
    }

    fn blocks_at(self) -> u64 {
        1 + self.refcount_table_clusters
    }

    /// First cluster of the L1 table.
    pub fn l1_at(self) -> u64 {
        self.blocks_at() + self.refcount_blocks
    }

    fn l2_at(self) -> u64 {
        self.l1_at() + self.l1_clusters
    }

    /// First cluster of the data, which is the end of the tables.
    pub fn data_at(self) -> u64 {
        self.l2_at() + self.l2_tables
    }

    /// Computes one cluster of the tables: `bytes` are zero, and as long as a cluster.
    pub fn fill(self, cluster: u64, bytes: &mut [u8]) {
        let words_per_cluster = self.geometry.cluster_size_bytes() / 8;
        let entry = |first: u64, count: u64, word: &dyn Fn(u64) -> u64, bytes: &mut [u8]| {
            let from = (cluster - first) * words_per_cluster;
            for (index, place) in (from..count).zip(bytes.chunks_exact_mut(8)) {
                place.copy_from_slice(&word(index).to_be_bytes());
            }
        };
        let geometry = self.geometry;
        let offset = |cluster: u64| geometry.host_offset(HostCluster(cluster));
        match cluster {
            0 => {}
            _ if cluster < self.blocks_at() => {
                entry(1, self.refcount_blocks, &|block| offset(self.blocks_at() + block).0, bytes);
            }
            _ if cluster < self.l1_at() => {
                let counted = (cluster - self.blocks_at()) * geometry.refcount_block_entries();
                let used = (self.total() - counted).min(geometry.refcount_block_entries());
                (0..used as usize).for_each(|index| refcount::set(bytes, geometry.refcount_order, index, 1));
            }
            _ if cluster < self.l2_at() => {
                entry(self.l1_at(), self.l2_tables, &|table| encode_l1(offset(self.l2_at() + table)), bytes);
            }
            _ => self.fill_l2(cluster - self.l2_at(), bytes),
        }
    }

    /// Every guest cluster has a host cluster. A standard one reads from it. Of one with subclusters none is allocated
    /// yet: what lies below is seen through them.
    fn fill_l2(self, table: u64, bytes: &mut [u8]) {
        let geometry = self.geometry;
        let first = table << geometry.l2_bits();
        for (guest, place) in
            (first..self.data_clusters).zip(bytes.chunks_exact_mut(geometry.l2_entry_bytes() as usize))
        {
            let first_data = if self.is_external { 0 } else { self.data_at() };
            let host = Host::Cluster { cluster: HostCluster(first_data + guest), copied: true };
            let alloc = u32::from(!geometry.extended_l2);
            let entry = L2Entry::encode(ClusterState { host, alloc, zero: 0 }, geometry);
            // A standard entry has no room for the bitmap.
            for (word, place) in [entry.descriptor, entry.bitmap].into_iter().zip(place.chunks_exact_mut(8)) {
                place.copy_from_slice(&word.to_be_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(cluster_bits: u32, refcount_order: u32, extended_l2: bool) -> Geometry {
        Geometry { version: 3, cluster_bits, extended_l2, refcount_order }
    }

    /// As few refcount blocks as can be, each of them in the table, and a count of 1 for each cluster and no other.
    #[test]
    fn every_cluster_is_counted_once() {
        for (geometry, size) in [
            (geometry(9, 6, false), 3_000_000),
            (geometry(9, 0, false), 3_000_000),
            (geometry(12, 4, false), 0),
            (geometry(14, 4, true), 300 << 20),
            (geometry(16, 4, true), 1),
        ] {
            for preallocated in [false, true] {
                let layout = NewImage::new(geometry, size, preallocated);
                let (blocks, total) = (layout.refcount_blocks, layout.total());
                let per_block = geometry.refcount_block_entries();
                assert!(blocks * per_block >= total && (blocks - 1) * per_block < total, "{layout:?}");
                let cluster = |n: u64| {
                    let mut bytes = vec![0; geometry.cluster_size_bytes() as usize];
                    layout.fill(n, &mut bytes);
                    bytes
                };
                for block in 0..blocks {
                    let bytes = cluster(layout.blocks_at() + block);
                    for index in 0..per_block {
                        let count = refcount::get(&bytes, geometry.refcount_order, index as usize);
                        let is_used = block * per_block + index < total;
                        assert_eq!(count, u64::from(is_used), "{layout:?}, block {block}, entry {index}");
                    }
                    let entry = block as usize * 8;
                    let table = cluster(1 + entry as u64 / geometry.cluster_size_bytes());
                    let at = entry % table.len();
                    let found = u64::from_be_bytes(table[at..at + 8].try_into().unwrap());
                    assert_eq!(found, (layout.blocks_at() + block) << geometry.cluster_bits);
                }
            }
        }
    }

    #[test]
    fn guest_clusters_follow_each_other() {
        for extended in [false, true] {
            let geometry = geometry(14, 4, extended);
            let layout = NewImage::new(geometry, 100 << 20, true);
            let mut bytes = vec![0; 1 << 14];
            let entries = 1 << geometry.l2_bits();
            layout.fill(layout.l2_at() + 1, &mut bytes);
            let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
            let step = geometry.l2_entry_bytes() as usize;
            for index in [0, 1, 500] {
                let descriptor = word(index as usize * step);
                assert_eq!(descriptor, 1 << 63 | (layout.data_at() + entries + index) << 14);
                assert!(!extended || word(index as usize * step + 8) == 0, "nothing is allocated yet");
            }
        }
    }
}
