//! The numbers that every other module computes with, derived once from an accepted header.

use super::units::{GuestCluster, GuestOffset, HostCluster, HostOffset, L1Index, SliceIndex};

/// Smallest cluster_bits of the specification (512 bytes).
pub const CLUSTER_BITS_MIN: u32 = 9;
/// Largest cluster_bits that QEMU (and so everybody) accepts (2 MiB).
pub const CLUSTER_BITS_MAX: u32 = 21;
/// Smallest cluster_bits with extended L2 entries (16 KiB; spec, "cluster_bits").
pub const CLUSTER_BITS_MIN_EXTENDED: u32 = 14;
/// Subclusters in a cluster with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;
/// log2 of the largest L2 slice in bytes (4 KiB): what one cache miss reads.
const SLICE_BITS_MAX: u32 = 12;

/// Shape of an image: cluster size, kind of L2 entry, refcount width. Only made from values that were checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Version of the format, 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Extended L2 entries (32 subclusters in a cluster).
    pub extended_l2: bool,
    /// log2 of the refcount width in bits.
    pub refcount_order: u32,
}

impl Geometry {
    /// Cluster size in bytes.
    pub fn cluster_size_bytes(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Subclusters in a cluster: 32, or 1 for standard L2 entries (a standard cluster is one subcluster).
    pub fn subclusters(self) -> u32 {
        if self.extended_l2 { SUBCLUSTERS } else { 1 }
    }

    /// log2 of the subcluster size.
    pub fn subcluster_bits(self) -> u32 {
        if self.extended_l2 { self.cluster_bits - 5 } else { self.cluster_bits }
    }

    /// Subcluster size in bytes.
    pub fn subcluster_size_bytes(self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// Mask with one bit for each subcluster of a cluster.
    pub fn all_subclusters(self) -> u32 {
        if self.extended_l2 { u32::MAX } else { 1 }
    }

    /// Size of an L2 entry in bytes: 8 or 16.
    pub fn l2_entry_bytes(self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// log2 of the number of entries of an L2 table.
    pub fn l2_bits(self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }

    /// log2 of the size of an L2 slice in bytes.
    pub fn slice_bits(self) -> u32 {
        self.cluster_bits.min(SLICE_BITS_MAX)
    }

    /// Size of an L2 slice in bytes.
    pub fn slice_bytes(self) -> u64 {
        1 << self.slice_bits()
    }

    /// log2 of the number of entries of an L2 slice.
    pub fn slice_entry_bits(self) -> u32 {
        self.slice_bits() - if self.extended_l2 { 4 } else { 3 }
    }

    /// Slices in an L2 table.
    pub fn slices_per_table(self) -> u64 {
        self.cluster_size_bytes() / self.slice_bytes()
    }

    /// Guest bytes that one L2 table maps.
    pub fn l2_table_covers_bytes(self) -> u64 {
        1 << (self.l2_bits() + self.cluster_bits)
    }

    /// Guest bytes that one L2 slice maps.
    pub fn slice_covers_bytes(self) -> u64 {
        1 << (self.slice_entry_bits() + self.cluster_bits)
    }

    /// L1 entries that a disk of `size_bytes` needs.
    pub fn l1_entries_for(self, size_bytes: u64) -> u64 {
        size_bytes.div_ceil(self.l2_table_covers_bytes())
    }

    /// Refcount width in bits.
    pub fn refcount_bits(self) -> u32 {
        1 << self.refcount_order
    }

    /// Largest value of a refcount.
    pub fn refcount_max(self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// log2 of the number of entries of a refcount block (one cluster).
    pub fn refcount_block_bits(self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Entries of a refcount block.
    pub fn refcount_block_entries(self) -> u64 {
        1 << self.refcount_block_bits()
    }

    /// Number of clusters that `bytes` occupy.
    pub fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size_bytes())
    }

    /// Position inside a cluster.
    pub fn in_cluster(self, offset: GuestOffset) -> u64 {
        offset.0 & (self.cluster_size_bytes() - 1)
    }

    /// Cluster that a guest offset lies in.
    pub fn guest_cluster(self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.cluster_bits)
    }

    /// First byte of a guest cluster.
    pub fn guest_offset(self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset(cluster.0 << self.cluster_bits)
    }

    /// Cluster that a host offset lies in.
    pub fn host_cluster(self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.cluster_bits)
    }

    /// First byte of a host cluster.
    pub fn host_offset(self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// L1 entry that maps a guest offset.
    pub fn l1_index(self, offset: GuestOffset) -> L1Index {
        L1Index(offset.0 >> (self.l2_bits() + self.cluster_bits))
    }

    /// L2 slice that maps a guest offset.
    pub fn slice_index(self, offset: GuestOffset) -> SliceIndex {
        SliceIndex(offset.0 >> (self.slice_entry_bits() + self.cluster_bits))
    }

    /// L1 entry under which a slice lies.
    pub fn l1_index_of_slice(self, slice: SliceIndex) -> L1Index {
        L1Index(slice.0 / self.slices_per_table())
    }

    /// Byte offset of a slice inside its L2 table.
    pub fn slice_offset_in_table(self, slice: SliceIndex) -> u64 {
        (slice.0 % self.slices_per_table()) * self.slice_bytes()
    }

    /// Index of the entry for a guest offset inside its slice.
    pub fn entry_in_slice(self, offset: GuestOffset) -> usize {
        ((offset.0 >> self.cluster_bits) & ((1 << self.slice_entry_bits()) - 1)) as usize
    }

    /// Subcluster that a position inside a cluster lies in.
    pub fn subcluster_of(self, in_cluster: u64) -> u32 {
        (in_cluster >> self.subcluster_bits()) as u32
    }
}
