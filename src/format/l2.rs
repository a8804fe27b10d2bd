//! L1 and L2 entries: bits ([`L2Entry`]) apart from meaning ([`ClusterState`]). Spec, "Cluster mapping" and
//! "Extended L2 Entries".
//!
//! A standard cluster is a cluster of ONE subcluster here: its zero flag becomes `zero` bit 0, a host cluster without
//! the flag becomes `alloc` bit 0. Everything above works on the two masks and has no second case.

use std::ops::Range;

use super::geometry::Geometry;
use super::units::{GuestCluster, HostCluster, HostOffset};
use crate::error::CorruptionKind;

/// COPIED: the refcount of what the entry points to is exactly one.
pub const COPIED: u64 = 1 << 63;
/// Compressed cluster.
pub const COMPRESSED: u64 = 1 << 62;
/// Zero flag of a standard descriptor.
pub const ZERO: u64 = 1;
/// Bits 9 to 55: the host offset of an L1 entry or of a standard descriptor.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits that are reserved in an L1 entry.
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Host offsets have 56 bits, also where a compressed descriptor has room for more.
const HOST_BITS: u32 = 56;
/// Unit in which a compressed descriptor counts.
const SECTOR_BYTES: u64 = 512;
/// Bits that are reserved in a standard descriptor (bit 0 is treated on its own).
pub const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// The words of an L2 entry as stored: descriptor, and bitmap with extended L2 entries (0 otherwise).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct L2Entry {
    /// Cluster descriptor with its two flag bits.
    pub descriptor: u64,
    /// Subcluster allocation bitmap: alloc bits 0 to 31, zero bits 32 to 63.
    pub bitmap: u64,
}

/// Where the bytes of a cluster are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// Nowhere.
    None,
    /// In a host cluster of its own.
    Cluster {
        /// Which.
        cluster: HostCluster,
        /// The refcount is exactly one: it may be written in place.
        copied: bool,
    },
    /// Compressed, in some bytes of one or two host clusters.
    Compressed(CompressedExtent),
}

impl Host {
    /// Host clusters that an entry refers to.
    pub fn clusters(self, geometry: Geometry) -> Range<u64> {
        match self {
            Self::None => 0..0,
            Self::Cluster { cluster, .. } => cluster.0..cluster.0 + 1,
            Self::Compressed(extent) => {
                let last = extent.offset.plus(extent.length_bytes - 1);
                geometry.host_cluster(extent.offset).0..geometry.host_cluster(last).0 + 1
            }
        }
    }
}

/// The sectors that a compressed cluster may occupy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CompressedExtent {
    /// First byte; any alignment.
    pub offset: HostOffset,
    /// Bytes up to the end of the last sector.
    pub length_bytes: u64,
}

impl CompressedExtent {
    /// The extent of `stored_bytes` (not 0) bytes at `offset`.
    pub fn new(offset: HostOffset, stored_bytes: u64) -> Self {
        let end = (offset.0 + stored_bytes).next_multiple_of(SECTOR_BYTES);
        Self { offset, length_bytes: end - offset.0 }
    }

    /// Sectors after the one that it begins in.
    fn additional_sectors(self) -> u64 {
        (self.offset.0 % SECTOR_BYTES + self.length_bytes) / SECTOR_BYTES - 1
    }

    /// Whether a descriptor has room for it: the larger the clusters, the fewer bits are left for the host offset
    /// (spec, "Compressed Clusters Descriptor").
    pub fn is_encodable(self, geometry: Geometry) -> bool {
        let offset_bits = compressed_offset_bits(geometry);
        self.offset.0 >> offset_bits.min(HOST_BITS) == 0 && self.additional_sectors() >> (62 - offset_bits) == 0
    }
}

/// Bits of a compressed descriptor that hold the host offset: x in the spec. The rest, up to bit 61, counts sectors.
fn compressed_offset_bits(geometry: Geometry) -> u32 {
    62 - (geometry.cluster_bits - 8)
}

/// Meaning of an L2 entry that was found well-formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterState {
    /// Where the bytes are.
    pub host: Host,
    /// One bit for each subcluster whose data is in the host cluster. 0 for compressed clusters.
    pub alloc: u32,
    /// One bit for each subcluster that reads as zeroes. 0 for compressed clusters.
    pub zero: u32,
}

impl ClusterState {
    /// Not allocated at all: everything is seen through the backing file.
    pub const UNALLOCATED: Self = Self { host: Host::None, alloc: 0, zero: 0 };
}

/// Decodes an L1 entry into the host offset of its L2 table (0: none) and its COPIED flag.
pub fn decode_l1(entry: u64, geometry: Geometry) -> Result<(HostOffset, bool), CorruptionKind> {
    if entry & L1_RESERVED != 0 {
        return Err(CorruptionKind::L1EntryReservedBits);
    }
    let offset = entry & OFFSET_MASK;
    if offset & (geometry.cluster_size_bytes() - 1) != 0 {
        return Err(CorruptionKind::L2TableUnaligned);
    }
    Ok((HostOffset(offset), entry & COPIED != 0 && offset != 0))
}

/// An L1 entry for an L2 table that belongs to the active state alone.
pub fn encode_l1(table: HostOffset) -> u64 {
    table.0 | COPIED
}

impl L2Entry {
    /// Decodes and verifies. Every malformed entry has a name (spec; scenarios J).
    #[inline]
    pub fn decode(self, geometry: Geometry) -> Result<ClusterState, CorruptionKind> {
        if self.descriptor & COMPRESSED != 0 {
            return self.decode_compressed(geometry);
        }
        if self.descriptor & L2_RESERVED != 0 {
            return Err(CorruptionKind::L2EntryReservedBits);
        }
        let offset = self.descriptor & OFFSET_MASK;
        if offset & (geometry.cluster_size_bytes() - 1) != 0 {
            return Err(CorruptionKind::ClusterUnaligned);
        }
        let copied = self.descriptor & COPIED != 0;
        let host = match offset {
            0 if copied => return Err(CorruptionKind::CopiedWithoutCluster),
            0 => Host::None,
            _ => Host::Cluster { cluster: HostCluster(offset >> geometry.cluster_bits), copied },
        };
        let (alloc, zero) = self.masks(geometry, offset != 0)?;
        Ok(ClusterState { host, alloc, zero })
    }

    /// The common case of [`L2Entry::decode`], as short as it can be: where the host cluster begins, if the subclusters
    /// in `touched` are plain data in it and nothing is wrong with the entry. With `in_place`, only if it is COPIED.
    #[inline]
    pub fn plain_host(self, geometry: Geometry, touched: u32, in_place: bool) -> Option<HostOffset> {
        let cluster_mask = geometry.cluster_size_bytes() - 1;
        let host = self.descriptor & OFFSET_MASK & !cluster_mask;
        let refused = COMPRESSED | L2_RESERVED | (cluster_mask & OFFSET_MASK);
        if self.descriptor & refused != 0 || host == 0 || (in_place && self.descriptor & COPIED == 0) {
            return None;
        }
        let is_plain = if geometry.extended_l2 {
            let (alloc, zero) = (self.bitmap as u32, (self.bitmap >> 32) as u32);
            alloc & zero == 0 && alloc & touched == touched
        } else {
            self.descriptor & ZERO == 0
        };
        is_plain.then_some(HostOffset(host))
    }

    /// As [`L2Entry::decode`], for the entry of guest cluster `at` in an image with an external data file. Each cluster
    /// has its own place there and an implicit count of one, so that COPIED says nothing but "allocated" where the
    /// offset is 0. Nothing can be compressed (spec, "incompatible_features", bit 2).
    #[inline]
    pub fn decode_external(self, geometry: Geometry, at: GuestCluster) -> Result<ClusterState, CorruptionKind> {
        if self.descriptor & COMPRESSED != 0 {
            return Err(CorruptionKind::CompressedInDataFile);
        }
        if self.descriptor & L2_RESERVED != 0 {
            return Err(CorruptionKind::L2EntryReservedBits);
        }
        let has_host = self.descriptor & (OFFSET_MASK | COPIED) != 0;
        if has_host && self.descriptor & OFFSET_MASK != geometry.guest_offset(at).0 {
            return Err(CorruptionKind::NotAtGuestOffset);
        }
        let (alloc, zero) = self.masks(geometry, has_host)?;
        let cluster = HostCluster(at.0);
        let host = if has_host { Host::Cluster { cluster, copied: true } } else { Host::None };
        Ok(ClusterState { host, alloc, zero })
    }

    /// The common case of [`L2Entry::decode_external`]: whether the subclusters in `touched` are plain data, and the
    /// entry is just as this library writes it.
    #[inline]
    pub fn is_plain_external(self, geometry: Geometry, at: GuestCluster, touched: u32) -> bool {
        let expected = geometry.guest_offset(at).0 & OFFSET_MASK | COPIED;
        let (alloc, zero) = (self.bitmap as u32, (self.bitmap >> 32) as u32);
        let is_plain = !geometry.extended_l2 || alloc & zero == 0 && alloc & touched == touched;
        self.descriptor == expected && is_plain
    }

    #[inline]
    fn masks(self, geometry: Geometry, has_host: bool) -> Result<(u32, u32), CorruptionKind> {
        if !geometry.extended_l2 {
            let zero = self.descriptor & ZERO != 0;
            if zero && geometry.version < 3 {
                return Err(CorruptionKind::ZeroFlagInV2);
            }
            return Ok((u32::from(has_host && !zero), u32::from(zero)));
        }
        // Bit 0 of an extended descriptor "is always 0"; QEMU ignores it (scenarios J1, J3), and so do we.
        let (alloc, zero) = (self.bitmap as u32, (self.bitmap >> 32) as u32);
        if alloc & zero != 0 {
            return Err(CorruptionKind::SubclusterAllocAndZero);
        }
        if alloc != 0 && !has_host {
            return Err(CorruptionKind::SubclusterWithoutCluster);
        }
        Ok((alloc, zero))
    }

    /// The bitmap of a compressed cluster is reserved and ignored (scenario J6).
    fn decode_compressed(self, geometry: Geometry) -> Result<ClusterState, CorruptionKind> {
        if self.descriptor & COPIED != 0 {
            return Err(CorruptionKind::CompressedCopied);
        }
        let offset_bits = compressed_offset_bits(geometry);
        let offset = self.descriptor & ((1 << offset_bits) - 1);
        if offset >> HOST_BITS != 0 {
            return Err(CorruptionKind::L2EntryReservedBits);
        }
        let sectors = ((self.descriptor & (COMPRESSED - 1)) >> offset_bits) + 1;
        let length_bytes = sectors * SECTOR_BYTES - offset % SECTOR_BYTES;
        let extent = CompressedExtent { offset: HostOffset(offset), length_bytes };
        Ok(ClusterState { host: Host::Compressed(extent), alloc: 0, zero: 0 })
    }

    /// Encodes a state. A compressed extent must be encodable ([`CompressedExtent::is_encodable`]).
    pub fn encode(state: ClusterState, geometry: Geometry) -> Self {
        let mut descriptor = match state.host {
            Host::None => 0,
            Host::Cluster { cluster, copied } => geometry.host_offset(cluster).0 | if copied { COPIED } else { 0 },
            Host::Compressed(extent) => {
                debug_assert!(extent.is_encodable(geometry), "compressed extent out of reach");
                COMPRESSED | extent.additional_sectors() << compressed_offset_bits(geometry) | extent.offset.0
            }
        };
        debug_assert_eq!(state.alloc & state.zero, 0, "D6: a subcluster is allocated or zero, never both");
        debug_assert!(state.alloc == 0 || state.host != Host::None, "D6: allocated implies a host cluster");
        debug_assert!(
            !matches!(state.host, Host::Compressed(_)) || state.alloc | state.zero == 0,
            "D6: a compressed cluster has no subclusters"
        );
        let mut bitmap = 0;
        if geometry.extended_l2 {
            bitmap = u64::from(state.alloc) | u64::from(state.zero) << 32;
        } else if state.zero != 0 {
            descriptor |= ZERO;
        }
        Self { descriptor, bitmap }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXT: Geometry = Geometry { version: 3, cluster_bits: 16, extended_l2: true, refcount_order: 4 };
    const STD: Geometry = Geometry { version: 3, cluster_bits: 16, extended_l2: false, refcount_order: 4 };

    #[test]
    fn every_malformed_entry_has_its_name() {
        let ext = |descriptor, bitmap| L2Entry { descriptor, bitmap }.decode(EXT);
        assert_eq!(ext(COPIED | 0x50200, 1), Err(CorruptionKind::ClusterUnaligned));
        assert_eq!(ext(COPIED | 0x50000, 0x1_0000_0001), Err(CorruptionKind::SubclusterAllocAndZero));
        assert_eq!(ext(0, 1), Err(CorruptionKind::SubclusterWithoutCluster));
        assert_eq!(ext(COPIED, 0), Err(CorruptionKind::CopiedWithoutCluster));
        assert_eq!(ext(COPIED | 0x50002, 1), Err(CorruptionKind::L2EntryReservedBits));
        assert_eq!(ext(COPIED | COMPRESSED | 0x50000, 0), Err(CorruptionKind::CompressedCopied));
        let v2 = Geometry { version: 2, ..STD };
        assert_eq!(L2Entry { descriptor: 1, bitmap: 0 }.decode(v2), Err(CorruptionKind::ZeroFlagInV2));
        assert_eq!(decode_l1(0x50200, STD), Err(CorruptionKind::L2TableUnaligned));
        assert_eq!(decode_l1(0x50001, STD), Err(CorruptionKind::L1EntryReservedBits));
    }

    /// The short way says what the long one says, for entries with every bit flipped and every pair of flags.
    #[test]
    fn plain_host_agrees_with_decode() {
        let v2 = Geometry { version: 2, ..STD };
        let small = Geometry { cluster_bits: 9, ..STD };
        let bitmaps = [0, 1, 0xffff_ffff, 0xffff_fffe, 0x1_0000_0001, 0x1_ffff_fffe, 0x8000_0000];
        for (geometry, bitmap) in [EXT, STD, v2, small].into_iter().flat_map(|g| bitmaps.map(|b| (g, b))) {
            for base in [0, 0x50000, COPIED | 0x50000, COPIED | 0x00ff_ffff_ffff_0000] {
                for (a, b) in (0..64).flat_map(|a| (a..64).map(move |b| (a, b))) {
                    let entry = L2Entry { descriptor: base ^ (1 << a) ^ (1 << b), bitmap };
                    for (touched, in_place) in [(1, false), (1, true), (geometry.all_subclusters(), true)] {
                        let long = entry.decode(geometry).ok().and_then(|state| match state.host {
                            Host::Cluster { cluster, copied } if state.alloc & touched == touched => {
                                (copied || !in_place).then(|| geometry.host_offset(cluster))
                            }
                            _ => None,
                        });
                        assert_eq!(entry.plain_host(geometry, touched, in_place), long, "{entry:x?}");
                    }
                }
            }
        }
    }

    /// With an external data file: the place is the guest's own, offset 0 with COPIED is a place, and the short way says
    /// what the long one does.
    #[test]
    fn entries_of_external_data_files() {
        let at = |descriptor, bitmap, at| L2Entry { descriptor, bitmap }.decode_external(EXT, GuestCluster(at));
        let host = |cluster| Host::Cluster { cluster: HostCluster(cluster), copied: true };
        assert_eq!(at(COPIED, 1, 0), Ok(ClusterState { host: host(0), alloc: 1, zero: 0 }));
        assert_eq!(at(0, 0, 0), Ok(ClusterState::UNALLOCATED));
        assert_eq!(at(0, 1, 0), Err(CorruptionKind::SubclusterWithoutCluster));
        assert_eq!(at(COPIED, 0, 5), Err(CorruptionKind::NotAtGuestOffset));
        assert_eq!(at(0x50000, 1, 5), Ok(ClusterState { host: host(5), alloc: 1, zero: 0 }), "COPIED should be set");
        assert_eq!(at(COPIED | 0x50000, 1, 6), Err(CorruptionKind::NotAtGuestOffset));
        assert_eq!(at(COPIED | 0x50200, 1, 5), Err(CorruptionKind::NotAtGuestOffset));
        assert_eq!(at(COMPRESSED | 0x50000, 0, 5), Err(CorruptionKind::CompressedInDataFile));
        assert_eq!(at(COPIED | 0x50002, 1, 5), Err(CorruptionKind::L2EntryReservedBits));
        assert_eq!(at(COPIED | 0x50000, 0x1_0000_0001, 5), Err(CorruptionKind::SubclusterAllocAndZero));
        for (geometry, bitmap) in [EXT, STD].into_iter().flat_map(|g| [0, 1, u32::MAX.into(), 1 << 32].map(|b| (g, b)))
        {
            let bits = |a: u32, b: u32| 1u64 << a ^ 1 << b;
            for (cluster, flip) in
                [0, 5].into_iter().flat_map(|c| (0..64).flat_map(move |a| (a..64).map(move |b| (c, bits(a, b)))))
            {
                let entry = L2Entry { descriptor: (COPIED | cluster << 16) ^ flip, bitmap };
                let state = entry.decode_external(geometry, GuestCluster(cluster));
                let long = state.is_ok_and(|s| s.host != Host::None && s.alloc & 1 == 1);
                let short = entry.is_plain_external(geometry, GuestCluster(cluster), 1);
                assert!(long || !short, "{entry:x?}");
                assert!(short || !long || entry.descriptor & (COPIED | ZERO) != COPIED, "{entry:x?}");
                assert!(!short || L2Entry::encode(state.unwrap(), geometry).descriptor == entry.descriptor);
            }
        }
    }

    #[test]
    fn bit_0_of_an_extended_descriptor_is_ignored() {
        let state = L2Entry { descriptor: COPIED | 0x50001, bitmap: 1 }.decode(EXT).unwrap();
        assert_eq!(state, L2Entry { descriptor: COPIED | 0x50000, bitmap: 1 }.decode(EXT).unwrap());
    }

    #[test]
    fn compressed_descriptor_splits_at_x() {
        // x = 62 - (16 - 8) = 54: three sectors at 0x50040b.
        let state = L2Entry { descriptor: COMPRESSED | 2 << 54 | 0x50040b, bitmap: 7 }.decode(EXT).unwrap();
        let extent = CompressedExtent { offset: HostOffset(0x50040b), length_bytes: 3 * 512 - 0x0b };
        assert_eq!(state.host, Host::Compressed(extent));
        assert_eq!((state.alloc, state.zero), (0, 0));
    }

    #[test]
    fn compressed_extents_survive_encoding_as_far_as_a_descriptor_reaches() {
        for cluster_bits in 9..=21u32 {
            let geometry = Geometry { cluster_bits, ..STD };
            let size = 1u64 << cluster_bits;
            let reach = 1u64 << (62 - (cluster_bits - 8)).min(56); // 512 TiB with clusters of 2 MiB
            for offset in [512, 1000, 1023, size * 3 - 1, reach - size, reach - 1] {
                for stored in [1, 2, size / 2, size - 1] {
                    let extent = CompressedExtent::new(HostOffset(offset), stored);
                    assert!(extent.is_encodable(geometry) && extent.length_bytes >= stored, "{extent:?}");
                    assert!(extent.length_bytes < stored + 512 && (offset + extent.length_bytes).is_multiple_of(512));
                    let state = ClusterState { host: Host::Compressed(extent), alloc: 0, zero: 0 };
                    let entry = L2Entry::encode(state, geometry);
                    assert_eq!((entry.decode(geometry), entry.descriptor >> 62), (Ok(state), 1));
                }
            }
            assert!(!CompressedExtent::new(HostOffset(reach), 1).is_encodable(geometry));
            assert!(!CompressedExtent::new(HostOffset(0), 2 * size + 1).is_encodable(geometry));
        }
    }

    #[test]
    fn states_survive_encoding() {
        let cluster = HostCluster(5);
        for (geometry, alloc, zero) in [(EXT, 0xff, 0xff00), (EXT, 0, u32::MAX), (STD, 1, 0), (STD, 0, 1)] {
            for copied in [false, true] {
                let state = ClusterState { host: Host::Cluster { cluster, copied }, alloc, zero };
                assert_eq!(L2Entry::encode(state, geometry).decode(geometry), Ok(state));
            }
        }
    }
}
